//! Requests whose task has a signal: which of them may be dropped.
//!
//! FUSE tells a server of any signal of a waiting task, once, and of a later SIGKILL no more. On a
//! disk a caught signal does not disturb stat, open, unlink or a read; so a request is dropped
//! (EINTR from the park, a CANCEL to the daemon) only when its task is dying. That is looked up in
//! `/proc/PID/status`, at once and then every [`LOOK_INTERVAL`] until the request is answered: by a
//! thread of its own, which sleeps while no interrupted request waits. Not in `stat`: whoever reads
//! that of a task in execve waits for it, and it may wait for us, with the FLUSH of a file. Where a
//! lane cannot be told, because the device is not read, say, all that waits in it is looked up.
//!
//! Invariant: a request of a task that lives, or of which nothing is known (pid 0: a task outside
//! of our pid namespace; no /proc), is never dropped. It must not read devices or sockets.

use crate::lane::{Interrupted, Lane, lock};
use crate::session::Session;
use ringfs_wire::limits::LANES_MAX;
use rustix::io::Errno;
use rustix::process::Signal;
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How soon a killed process gets out that had another signal before.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Tasks that are looked up in one go; with more, the others have their turn at the next.
const LOOKS_MAX: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Suspect {
    lane: usize,
    unique: u64,
    pid: u32,
}

const _: () = assert!(LANES_MAX <= u32::BITS as usize);

/// What the thread is told.
#[derive(Debug, Default)]
struct News {
    /// Interrupted requests that it has not looked at yet.
    fresh: Vec<Suspect>,
    /// The lanes that may have others, one bit each.
    deaf: u32,
}

/// The interrupted requests of a session.
#[derive(Debug, Default)]
pub struct Interrupts {
    news: Mutex<News>,
    bell: Condvar,
}

impl Interrupts {
    /// The kernel interrupts `unique`, which the lane has in flight or parked for the task `pid`.
    /// It says so once.
    pub fn add(&self, lane: u8, unique: u64, pid: u32) {
        lock(&self.news).fresh.push(Suspect { lane: usize::from(lane), unique, pid });
        self.bell.notify_one();
    }

    /// Whether, from now on, the kernel may interrupt requests of that lane without our seeing it:
    /// then the tasks of all that waits there are looked up.
    pub fn set_deaf(&self, lane: u8, is_deaf: bool) {
        let mut news = lock(&self.news);
        match is_deaf {
            true => news.deaf |= 1 << lane,
            false => news.deaf &= !(1 << lane),
        }
        drop(news);
        self.bell.notify_one();
    }

    /// Wakes the thread, to see that the session is over.
    pub fn ring(&self) {
        // Under the lock: else it might come between the thread's look and its sleep.
        let _news = lock(&self.news);
        self.bell.notify_one();
    }
}

/// Watches until the session stops.
pub fn run(session: &Arc<Session>) {
    let mut told: HashMap<u64, Suspect> = HashMap::new();
    let (mut deaf, mut last) = (0, 0);
    let mut look_at = Instant::now();
    while !session.is_stopping() {
        let is_idle = told.is_empty() && deaf == 0;
        let patience = (!is_idle).then(|| look_at.saturating_duration_since(Instant::now()));
        let news = wait_for_news(session, deaf, patience);
        if is_idle {
            look_at = Instant::now() + LOOK_INTERVAL;
        }
        deaf = news.deaf;
        let fresh = news.fresh.into_iter().filter(|suspect| still_waits(&session.lanes, suspect));
        told.extend(fresh.map(|suspect| (suspect.unique, suspect)));
        if Instant::now() >= look_at {
            let all = told.values().copied().chain(all_of(&session.lanes, deaf));
            for suspect in next_looks(all, &mut last) {
                if !still_waits(&session.lanes, &suspect) {
                    told.remove(&suspect.unique);
                }
            }
            look_at = Instant::now() + LOOK_INTERVAL;
        }
    }
}

/// What has come; sleeps until something does, the patience is over, or the session is.
fn wait_for_news(session: &Session, deaf: u32, patience: Option<Duration>) -> News {
    let Interrupts { news, bell } = &session.interrupts;
    let idle =
        |news: &mut News| news.fresh.is_empty() && news.deaf == deaf && !session.is_stopping();
    let mut news = match patience {
        None => bell.wait_while(lock(news), idle).unwrap_or_else(PoisonError::into_inner),
        Some(patience) => {
            let woken = bell.wait_timeout_while(lock(news), patience, idle);
            woken.unwrap_or_else(PoisonError::into_inner).0
        }
    };
    News { fresh: std::mem::take(&mut news.fresh), deaf: news.deaf }
}

/// All that waits in these lanes.
fn all_of(lanes: &[Lane], deaf: u32) -> impl Iterator<Item = Suspect> {
    let deaf = lanes.iter().enumerate().filter(move |(lane, _)| deaf >> lane & 1 == 1);
    deaf.flat_map(|(lane, its)| {
        its.waiting().into_iter().map(move |(unique, pid)| Suspect { lane, unique, pid })
    })
}

/// Those whose turn it is, each once: from behind the `last` one that had its turn on.
fn next_looks(all: impl Iterator<Item = Suspect>, last: &mut u64) -> Vec<Suspect> {
    let mut all: Vec<Suspect> = all.collect();
    all.sort_unstable_by_key(|suspect| suspect.unique);
    all.dedup_by_key(|suspect| suspect.unique);
    let behind = all.partition_point(|suspect| suspect.unique <= *last);
    all.rotate_left(behind);
    all.truncate(LOOKS_MAX);
    *last = all.last().map_or(0, |suspect| suspect.unique);
    all
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
    std::fs::read(format!("/proc/{pid}/status")).is_ok_and(|status| says_dying(&status))
}

/// proc_pid_status(5): a line for each field; the name is escaped. A task that exits has no memory
/// any more. Nor has a thread of the kernel, of a loop device, say, or of an NFS server; those
/// ignore SIGSTOP, which no program can. A signal that is fatal and makes no core comes as a
/// SIGKILL to each task of the process (kernel/signal.c).
fn says_dying(status: &[u8]) -> bool {
    let field = |name: &str| {
        let mut lines = status.split(|&byte| byte == b'\n');
        lines.find_map(|line| line.strip_prefix(name.as_bytes())?.strip_prefix(b":"))
    };
    let has = |set: &str, signal: Signal| {
        let bits = std::str::from_utf8(field(set)?).ok()?;
        let bits = u64::from_str_radix(bits.trim(), 16).ok()?;
        Some(bits & 1 << (signal.as_raw() - 1) != 0)
    };
    match (has("SigPnd", Signal::KILL), has("SigIgn", Signal::STOP)) {
        (Some(is_killed), Some(false)) => is_killed || field("VmSize").is_none(),
        (_, Some(true) | None) | (None, _) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_that_die() {
        let ignoring = |name: &str, vm: &str, pending: u64, ignored: u64| {
            let head = format!("Name:\t{name}\nState:\tD (disk sleep)\nTgid:\t7\n{vm}");
            let rest = format!("ShdPnd:\t{:016x}\nSigIgn:\t{ignored:016x}\n", 0x100);
            format!("{head}Threads:\t1\nSigPnd:\t{pending:016x}\n{rest}")
        };
        let status = |name: &str, vm: &str, pending: u64| ignoring(name, vm, pending, 0x1000);
        let check = |status: &[u8], dying| assert_eq!(says_dying(status), dying);
        let vm = "VmSize:\t     100 kB\n";
        check(status("cat", vm, 0).as_bytes(), false);
        check(status("cat", vm, 0x100).as_bytes(), true);
        check(status("cat", vm, 0x2200).as_bytes(), false);
        check(status("cat", "", 0).as_bytes(), true);
        check(status("SigPnd:\\n", vm, 0).as_bytes(), false);
        // Threads of the kernel's; one that can be killed.
        check(ignoring("kworker/0:1", "", 0, u64::MAX).as_bytes(), false);
        check(ignoring("lockd", "", 0, !0x100).as_bytes(), false);
        for garbage in
            [&b""[..], b"Name:\tcat", b"State:\tD\n", b"\xff", b"State:\tD\nSigPnd:\tx\n"]
        {
            check(garbage, false);
        }
    }

    #[test]
    fn all_have_their_turn_and_each_once() {
        let suspect = |unique| Suspect { lane: 0, unique, pid: 0 };
        let count = 2 * LOOKS_MAX as u64 - 9;
        // They are told of again and again.
        let all = || (1..=count).chain(1..=count).map(suspect);
        let mut last = 0;
        let uniques = |looks: &[Suspect]| looks.iter().map(|s| s.unique).collect::<Vec<_>>();
        let most = LOOKS_MAX as u64;
        assert_eq!(uniques(&next_looks(all(), &mut last)), Vec::from_iter(1..=most));
        let second = Vec::from_iter((most + 1..=count).chain(1..=9));
        assert_eq!(uniques(&next_looks(all(), &mut last)), second);
        assert_eq!(last, 9);
        assert_eq!(next_looks(std::iter::empty(), &mut last), []);
    }

    #[test]
    fn whoever_is_unknown_lives() {
        assert!(!is_dying(0));
        assert!(!is_dying(u32::MAX));
        assert!(!is_dying(std::process::id()));
    }

    #[test]
    fn threads_of_the_kernel_live() {
        let tasks = std::fs::read_dir("/proc").expect("/proc").filter_map(|entry| {
            let pid = entry.ok()?.file_name().to_str()?.parse::<u32>().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let flags: u32 = stat.rsplit(')').next()?.split(' ').nth(7)?.parse().ok()?;
            // PF_KTHREAD
            (flags & 0x20_0000 != 0).then_some((pid, stat))
        });
        // None in a container.
        for (pid, stat) in tasks {
            assert!(!is_dying(pid), "{stat}");
        }
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
