//! Requests whose task has a signal: which of them may be dropped.
//!
//! FUSE tells a server of any signal of a waiting task, once, and of a later SIGKILL no more. On a
//! disk a caught signal does not disturb stat, open, unlink or a read; so a request is dropped
//! (EINTR from the park, a CANCEL to the daemon) only when its task is dying. That is looked up in
//! `/proc/PID/stat`, at once and then every [`LOOK_INTERVAL`] until the request is answered: by a
//! thread of its own, which sleeps while no interrupted request waits.
//!
//! Invariant: a request of a task that lives, or of which nothing is known (pid 0: a task outside
//! of our pid namespace; no /proc), is never dropped. It must not read devices or sockets.

use crate::lane::{Interrupted, Lane, lock};
use crate::session::Session;
use rustix::io::Errno;
use rustix::process::Signal;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How soon a killed process gets out that had another signal before.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Tasks that are looked up in one go; with more, the others have their turn at the next.
const LOOKS_MAX: usize = 512;
/// `PF_EXITING` of `include/linux/sched.h`: past the point where signals matter.
const PF_EXITING: u64 = 0x4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Suspect {
    lane: usize,
    unique: u64,
    pid: u32,
}

/// The interrupted requests of a session that nobody has looked at yet.
#[derive(Debug, Default)]
pub struct Interrupts {
    fresh: Mutex<Vec<Suspect>>,
    bell: Condvar,
}

impl Interrupts {
    /// The kernel interrupts `unique`, which the lane has in flight or parked for the task `pid`,
    /// or might without telling. Once a request and cut: what lanes hold bounds this.
    pub fn add(&self, lane: u8, unique: u64, pid: u32) {
        lock(&self.fresh).push(Suspect { lane: usize::from(lane), unique, pid });
        self.bell.notify_one();
    }

    /// Wakes the thread, to see that the session is over.
    pub fn ring(&self) {
        // Under the lock: else it might come between the thread's look and its sleep.
        let _fresh = lock(&self.fresh);
        self.bell.notify_one();
    }
}

/// Watches until the session stops.
pub fn run(session: &Arc<Session>) {
    let mut waiting: VecDeque<Suspect> = VecDeque::new();
    let mut look_at = Instant::now();
    while !session.is_stopping() {
        let patience =
            (!waiting.is_empty()).then(|| look_at.saturating_duration_since(Instant::now()));
        let fresh = wait_for_fresh(session, patience);
        if waiting.is_empty() {
            look_at = Instant::now() + LOOK_INTERVAL;
        }
        let fresh = fresh.into_iter().filter(|suspect| still_waits(&session.lanes, suspect));
        waiting.extend(fresh.collect::<Vec<_>>());
        if Instant::now() >= look_at {
            for _ in 0..waiting.len().min(LOOKS_MAX) {
                let Some(suspect) = waiting.pop_front() else { break };
                if still_waits(&session.lanes, &suspect) {
                    waiting.push_back(suspect);
                }
            }
            look_at = Instant::now() + LOOK_INTERVAL;
        }
    }
}

/// What has come; sleeps until something does, the patience is over, or the session is.
fn wait_for_fresh(session: &Session, patience: Option<Duration>) -> Vec<Suspect> {
    let Interrupts { fresh, bell } = &session.interrupts;
    let idle = |fresh: &mut Vec<Suspect>| fresh.is_empty() && !session.is_stopping();
    let mut fresh = match patience {
        None => bell.wait_while(lock(fresh), idle).unwrap_or_else(PoisonError::into_inner),
        Some(patience) => {
            let woken = bell.wait_timeout_while(lock(fresh), patience, idle);
            woken.unwrap_or_else(PoisonError::into_inner).0
        }
    };
    std::mem::take(&mut fresh)
}

/// False once the request is answered, or is dropped here because its task is dying.
fn still_waits(lanes: &[Lane], suspect: &Suspect) -> bool {
    let Some(lane) = lanes.get(suspect.lane) else { return false };
    if lane.waits(suspect.unique).is_none() {
        return false;
    }
    if !is_dying(suspect.pid) {
        return true;
    }
    match lane.interrupt(suspect.unique) {
        Interrupted::Parked | Interrupted::Abandoned => {
            lane.answer_error(suspect.unique, Errno::INTR);
        }
        Interrupted::Cancelled | Interrupted::Unknown => {}
    }
    false
}

/// Whether a task will never run its program again. False where that cannot be known.
fn is_dying(pid: u32) -> bool {
    if pid == 0 {
        return false;
    }
    std::fs::read(format!("/proc/{pid}/stat")).is_ok_and(|stat| says_dying(&stat))
}

/// proc_pid_stat(5): after the name, which may hold anything, come the fields from the third on;
/// the flags are the ninth, the task's own pending signals the 31st. A signal that is fatal and
/// makes no core comes as a SIGKILL to each task of the process (kernel/signal.c).
fn says_dying(stat: &[u8]) -> bool {
    let Some(name_end) = stat.iter().rposition(|&byte| byte == b')') else { return false };
    let mut fields = stat[name_end + 1..].split(u8::is_ascii_whitespace).filter(|f| !f.is_empty());
    let mut number = |skip| {
        let field = fields.nth(skip).and_then(|field| std::str::from_utf8(field).ok());
        field.and_then(|field| field.parse::<u64>().ok()).unwrap_or(0)
    };
    let flags = number(9 - 3);
    let pending = number(31 - 9 - 1);
    flags & PF_EXITING != 0 || pending & 1 << (Signal::KILL.as_raw() - 1) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_that_die() {
        let stat = |name: &str, flags: u64, pending: u64| {
            let middle = "0 ".repeat(21);
            format!("7 ({name}) D 1 7 7 0 -1 {flags} {middle}{pending} 0 0 0 1\n").into_bytes()
        };
        let check = |stat: &[u8], dying| assert_eq!(says_dying(stat), dying);
        check(&stat("cat", 0x400000, 0), false);
        check(&stat("cat", 0x400000, 0x100), true);
        check(&stat("cat", 0x400000, 0x2200), false);
        check(&stat("cat", 0x400004, 0), true);
        check(&stat(") D 1 7 7 0 -1 4 (", 0x400000, 0), false);
        for garbage in [&b""[..], b"7 (cat", b"7 (cat) D", b"\xff)\xff", b"7 (cat) D 1 7 7 0 -1"] {
            check(garbage, false);
        }
    }

    #[test]
    fn whoever_is_unknown_lives() {
        assert!(!is_dying(0));
        assert!(!is_dying(u32::MAX));
        assert!(!is_dying(std::process::id()));
    }

    #[test]
    fn a_killed_child_dies() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        assert!(!is_dying(child.id()));
        child.kill().expect("kill");
        // Not reaped yet, so its number is still its own.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_dying(child.id()) {
            assert!(Instant::now() < deadline, "it lives");
            std::thread::yield_now();
        }
        child.wait().expect("wait");
    }
}
