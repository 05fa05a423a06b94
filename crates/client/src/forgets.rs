//! Node ids to give back that any lane may send, where lanes have queues: the kernel hands them to
//! those that read the device, which may be one lane alone. What is stuck with that one's
//! connection counts with the daemon as known, while it gives other lanes more.
//!
//! Invariant: bounded; who puts ids here has a FORGET in flight or no slot, and looks here again
//! when that changes, so that none is left. Nobody is woken: the lanes that bring new nodes are
//! awake.

use crate::lane::lock;
use crate::up::FORGETS_WAITING_MAX;
use ringfs_wire::abi::ForgetOne;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Ids in one record of a lane that shares: so many are stuck with it at most.
pub const SHARED_PER_RECORD_MAX: usize = 64;

/// The ids that wait.
#[derive(Debug, Default)]
pub struct Forgets {
    is_shared: AtomicBool,
    waiting: Mutex<Vec<ForgetOne>>,
    len: AtomicUsize,
}

impl Forgets {
    /// Lanes with queues look here from now on.
    pub fn share(&self) {
        self.is_shared.store(true, Ordering::Release);
    }

    /// Whether they do.
    pub fn is_shared(&self) -> bool {
        self.is_shared.load(Ordering::Acquire)
    }

    /// Whether none waits; it may be of a moment ago.
    pub fn is_empty(&self) -> bool {
        self.len.load(Ordering::Acquire) == 0
    }

    /// Leaves them to others, as many as there is room for.
    pub fn put(&self, forgets: &mut Vec<ForgetOne>) {
        let mut waiting = lock(&self.waiting);
        let room = FORGETS_WAITING_MAX.saturating_sub(waiting.len());
        waiting.extend(forgets.drain(forgets.len().saturating_sub(room)..));
        self.len.store(waiting.len(), Ordering::Release);
    }

    /// Takes up to so many.
    pub fn take(&self, most: usize) -> Vec<ForgetOne> {
        let mut waiting = lock(&self.waiting);
        let rest = waiting.len().saturating_sub(most);
        let taken = waiting.split_off(rest);
        self.len.store(rest, Ordering::Release);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_is_lost_and_no_more_are_taken_than_fit() {
        let forgets = Forgets::default();
        let ids = 0..FORGETS_WAITING_MAX as u64 + 5;
        let mut all: Vec<_> = ids.map(|nodeid| ForgetOne { nodeid, nlookup: 1 }).collect();
        let count = all.len();
        forgets.put(&mut all);
        assert_eq!((all.len(), forgets.is_empty()), (5, false));
        all.extend(forgets.take(3));
        assert_eq!(all.len(), 8);
        all.extend(forgets.take(usize::MAX));
        assert!(forgets.is_empty() && forgets.take(1).is_empty());
        let mut ids: Vec<u64> = all.iter().map(|forget| forget.nodeid).collect();
        ids.sort_unstable();
        assert!(ids.iter().copied().eq(0..count as u64));
    }
}
