//! The daemon's file descriptors: how many there are, and which session gives some up.
//!
//! Each file that a guest knows costs the daemon an `O_PATH` fd, and each file that it holds open
//! another one. Both are counted here, for the whole process. Where they run short, the session
//! with the most known files lets some of them go ([`Nodes::evict`]): its guest goes on knowing
//! them, and they are taken in again on their next use. The same is done where there are more of
//! them than `--nodes-with-fd` allows, for the memory that they take; but this bound refuses
//! nothing, and only lets go what handles find again.
//!
//! Whoever needs an fd does this, on its own thread, for sessions of local file systems and for its
//! own. What is of others may wait for ever: a thread apart does it, and nobody waits for that.
//!
//! The count is of what lasts; fds for the length of a call, sockets and rings have the rest of
//! the limit. It must not open or close anything itself.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::cold::ColdMemory;
use crate::limits::{COLD_BYTES_OF_MEMORY, NODES_WITH_FD_DEFAULT};
use crate::nodes::Nodes;

/// Nodes let go at a time: some hundred microseconds of work.
const EVICTED_AT_ONCE: usize = 32;
/// By the thread apart.
const EVICTED_APART: usize = 256;

/// How long is waited where another thread evicts just now, or changes names: a few milliseconds.
const BUSY_TRIES_MAX: usize = 32;
const BUSY_PAUSE: Duration = Duration::from_micros(100);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Relief {
    /// So many were let go.
    Some(usize),
    /// There was nothing that could be.
    Nothing,
    /// Another thread is at it.
    Busy,
}

fn machine_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into())
}

/// The count and its bound.
#[derive(Debug)]
pub struct Fds {
    used: AtomicUsize,
    most: usize,
    /// Known files that have one.
    nodes: AtomicUsize,
    /// How many there may be before some are let go.
    nodes_most: usize,
    /// The same, or more where most of them were in use.
    nodes_relief: AtomicUsize,
    /// What is kept of files without one.
    pub(crate) cold: Arc<ColdMemory>,
    sessions: Mutex<Vec<Weak<Nodes>>>,
    /// The thread apart is at work.
    is_apart: Arc<AtomicBool>,
}

impl Fds {
    /// At most `most` fds in nodes and open files; a sixteenth more is for sessions
    /// that have few.
    pub fn new(most: usize) -> Arc<Fds> {
        Fds::within(most, machine_memory())
    }

    /// As [`Fds::new`], and remembers files without fds in a part of `memory` bytes.
    pub fn within(most: usize, memory: u64) -> Arc<Fds> {
        Fds::bounded(most, memory, NODES_WITH_FD_DEFAULT)
    }

    /// Three quarters of what the process may have open, and its part of the memory that it may
    /// have; with no limit said, of the machine's. Of known files `nodes_most` have one, as far as
    /// they are not in use.
    pub fn of_process(memory: Option<u64>, nodes_most: usize) -> Arc<Fds> {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let most = usize::try_from(limit / 4 * 3).unwrap_or(usize::MAX).clamp(16, 1 << 30);
        let memory = memory.map_or_else(machine_memory, |most| most.min(machine_memory()));
        Fds::bounded(most, memory, nodes_most)
    }

    fn bounded(most: usize, memory: u64, nodes_most: usize) -> Arc<Fds> {
        let nodes_most = nodes_most.max(EVICTED_AT_ONCE);
        let cold = usize::try_from(memory / COLD_BYTES_OF_MEMORY).unwrap_or(usize::MAX);
        Arc::new(Fds {
            used: AtomicUsize::new(0),
            most,
            nodes: AtomicUsize::new(0),
            nodes_most,
            nodes_relief: AtomicUsize::new(nodes_most),
            cold: ColdMemory::new(cold),
            sessions: Mutex::default(),
            is_apart: Arc::default(),
        })
    }

    /// In use now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether half of them are free: some may be held for speed alone.
    pub fn has_plenty(&self) -> bool {
        self.used() < self.most / 2
    }

    /// Whether nodes may be taken in before they are used.
    pub(crate) fn may_warm(&self) -> bool {
        self.has_plenty() && self.nodes.load(Ordering::Relaxed) < self.nodes_most
    }

    /// The most open files that one session may hold: each has an fd, and pins its node's.
    pub fn handles_max(&self) -> usize {
        self.most / 8 * 3
    }

    /// Before something new is opened that lasts, by a session that has `mine`; its nodes, where
    /// the calling thread may wait for their file system.
    ///
    /// # Errors
    /// `ENFILE`: all are in use, and none can be had back.
    pub(crate) fn make_room(&self, mine: usize, own: Option<&Nodes>) -> Result<(), Errno> {
        self.relieve_memory(own);
        let spare = self.most / 16;
        for _ in 0..BUSY_TRIES_MAX {
            if self.used() < self.most {
                return Ok(());
            }
            let relief = self.relieve(own, |_| true);
            let used = self.used();
            if used < self.most || relief == Relief::Busy && used < self.most + spare {
                return Ok(());
            }
            if relief == Relief::Nothing {
                break;
            }
            std::thread::sleep(BUSY_PAUSE);
        }
        // What is left is for those who have not taken the rest.
        let alive = self.lock().len().max(1);
        let modest = mine <= self.most / (2 * alive);
        if modest && self.used() < self.most + spare { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// Lets some nodes go where too many have an fd.
    fn relieve_memory(&self, own: Option<&Nodes>) {
        if self.nodes.load(Ordering::Relaxed) < self.nodes_relief.load(Ordering::Relaxed) {
            return;
        }
        let relief = self.relieve(own, Nodes::finds_by_handle);
        let left = self.nodes.load(Ordering::Relaxed);
        let next = match relief {
            // Another thread is at it; who comes next need not look again at once.
            Relief::Busy => left.max(self.nodes_most) + EVICTED_AT_ONCE,
            Relief::Some(count) if count >= EVICTED_AT_ONCE => self.nodes_most,
            // The rest is in use: who looks for what is not looks at all of it, so not too often.
            Relief::Some(_) | Relief::Nothing => (left + left / 16).max(self.nodes_most),
        };
        self.nodes_relief.store(next, Ordering::Relaxed);
    }

    /// The session with the most nodes gives up some. Where it cannot, the next one is asked.
    fn relieve(&self, own: Option<&Nodes>, may: impl Fn(&Nodes) -> bool) -> Relief {
        let mut sessions = match self.sessions.try_lock() {
            Ok(sessions) => sessions,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Relief::Busy,
        };
        sessions.retain(|session| session.strong_count() > 0);
        let mut alive: Vec<_> = sessions.iter().filter_map(Weak::upgrade).collect();
        drop(sessions);
        alive.retain(|nodes| may(nodes));
        alive.sort_by_key(|nodes| std::cmp::Reverse(nodes.resident()));
        let mut relief = Relief::Nothing;
        for nodes in alive {
            let is_own = own.is_some_and(|own| std::ptr::eq(own, &*nodes));
            let evicted = match nodes.may_hang && !is_own {
                true => self.evict_apart(nodes),
                false => nodes.evict(EVICTED_AT_ONCE),
            };
            match evicted {
                None => relief = Relief::Busy,
                Some(0) => {}
                Some(count) => return Relief::Some(count),
            }
        }
        relief
    }

    /// As [`Nodes::evict`], by another thread, of which there is one: `None` while it is at work.
    fn evict_apart(&self, nodes: Arc<Nodes>) -> Option<usize> {
        if self.is_apart.swap(true, Ordering::AcqRel) {
            return None;
        }
        let is_apart = Arc::clone(&self.is_apart);
        let thread = std::thread::Builder::new().name("ringfs-evict".into());
        let spawned = thread.spawn(move || {
            let _ = nodes.evict(EVICTED_APART);
            drop(nodes);
            is_apart.store(false, Ordering::Release);
        });
        if spawned.is_ok() {
            return None;
        }
        self.is_apart.store(false, Ordering::Release);
        Some(0)
    }

    /// Counts one more, which is a known file's.
    pub(crate) fn add_node(&self) {
        self.nodes.fetch_add(1, Ordering::Relaxed);
        self.add();
    }

    pub(crate) fn remove_node(&self) {
        self.nodes.fetch_sub(1, Ordering::Relaxed);
        self.remove(1);
    }

    /// Counts one more, until it is removed.
    pub(crate) fn add(&self) {
        self.used.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn remove(&self, count: usize) {
        self.used.fetch_sub(count, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Nodes>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on these nodes may be asked to go.
    pub(crate) fn join(&self, nodes: &Arc<Nodes>) {
        let mut sessions = self.lock();
        // Guests may come and go without end, and nobody else may ever ask for relief.
        sessions.retain(|session| session.strong_count() > 0);
        sessions.push(Arc::downgrade(nodes));
    }
}

/// One fd that is counted as long as this lives.
#[derive(Debug)]
pub struct Counted(Arc<Fds>);

impl Counted {
    /// Counts one more.
    pub fn new(fds: &Arc<Fds>) -> Counted {
        fds.add();
        Counted(Arc::clone(fds))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.remove(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::{Fs, FsOptions};

    #[test]
    fn sessions_that_ended_leave_nothing() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let fds = Fds::new(64);
        let options = FsOptions { fds: Arc::clone(&fds), ..FsOptions::default() };
        for _ in 0..100 {
            drop(Fs::new(dir.path(), options.clone()).expect("a session"));
        }
        assert!(fds.lock().len() <= 1 && fds.used() == 0);
    }
}
