//! How long calls have taken that hardly ever take long: those that may free blocks.
//!
//! Removing a name frees the blocks of a huge file at times (on a disk that is the pool's work from
//! the start: its journal may have to be waited for). To ask for its size first costs nearly what
//! the removal of a small file costs (3.7 us and 4.4 us); so the first slow one of a session runs
//! where it came, and what follows goes to the pool for a while.
//!
//! Invariant: a session holds its shard up by such a call at most once in [`DISTRUST`]. It must not
//! look at files.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A call that takes longer is slow; on a busy machine others take a few milliseconds as well.
const SLOW: Duration = Duration::from_millis(10);
/// How long calls go to the pool after a slow one.
const DISTRUST: Duration = Duration::from_secs(10);

/// The calls of one session.
#[derive(Debug)]
pub struct History {
    since: Instant,
    /// In milliseconds from `since`.
    distrusted_until: AtomicU64,
}

impl Default for History {
    fn default() -> Self {
        History { since: Instant::now(), distrusted_until: AtomicU64::new(0) }
    }
}

impl History {
    /// Whether the next call had better run in the pool.
    pub fn is_slow(&self, now: Instant) -> bool {
        // Most sessions never have a slow one.
        let until = self.distrusted_until.load(Ordering::Relaxed);
        until > 0 && self.millis(now) < until
    }

    /// A call that was begun then is done.
    pub fn done(&self, begun: Instant, now: Instant) {
        if now.saturating_duration_since(begun) > SLOW {
            self.distrusted_until.fetch_max(self.millis(now + DISTRUST), Ordering::Relaxed);
        }
    }

    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.since).as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::{Request, Route};
    use crate::fs::{Fs, FsOptions};
    use ringfs_wire::abi::Opcode;

    #[test]
    fn after_a_slow_removal_the_next_goes_to_the_pool() {
        // On a disk they never run on the shard.
        let dir = tempfile::tempdir_in("/dev/shm").expect("a temporary directory");
        let fs = Fs::new(dir.path(), FsOptions::default()).expect("a file system");
        // The root's id, the rest of the header, and arguments.
        let body = [&1u64.to_le_bytes()[..], &[0; 16], b"name\0"].concat();
        let in_pool = |opcode| {
            let request = Request::parse(opcode as u32, &body).expect("a request");
            matches!(fs.route(&request), Route::Pool)
        };
        let frees = [Opcode::Unlink, Opcode::Rename, Opcode::Rename2];
        assert_eq!(frees.map(in_pool), [false; 3]);
        let now = Instant::now();
        fs.history.done(now, now + SLOW * 2);
        assert_eq!(frees.map(in_pool), [true; 3]);
        assert!(!in_pool(Opcode::Lookup));
    }

    #[test]
    fn a_slow_call_is_remembered_for_a_while() {
        let history = History::default();
        let start = history.since;
        let at = |millis| start + Duration::from_millis(millis);
        assert!(!history.is_slow(start));
        history.done(at(5), at(15));
        assert!(!history.is_slow(at(15)));
        history.done(at(10), at(30));
        assert!(history.is_slow(at(30)) && history.is_slow(at(10_029)));
        assert!(!history.is_slow(at(10_030)));
        // One that ran in the pool counts too, and an older one takes nothing back.
        history.done(at(5_000), at(6_000));
        history.done(at(40), at(60));
        assert!(history.is_slow(at(15_999)) && !history.is_slow(at(16_000)));
    }
}
