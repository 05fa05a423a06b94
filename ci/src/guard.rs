//! What must be undone, whatever happens: on drop, on panic and on Ctrl-C.
//!
//! Invariant: everything that outlives a function call (process group, mount, loop device,
//! temporary directory) stands in one list from the moment it exists, and leaves the list when it
//! is undone. A guard undoes its entry when it is dropped; the signal thread undoes the whole
//! list, newest first, and ends the process. Must not touch a path on a mount that may be dead:
//! mounts are looked up in /proc/self/mountinfo, and FUSE is aborted before it is detached.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, mpsc};
use std::time::{Duration, Instant};
use std::{fs, process, thread};

use anyhow::{Context, Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::mounts;

/// How long a process may take to follow SIGTERM before SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(5);
/// How long the end after a signal may take; beyond it something hangs.
const END_LIMIT: Duration = Duration::from_secs(60);

/// One thing to undo.
#[derive(Debug)]
pub enum Undo {
    /// A process that leads its own group: SIGTERM, then SIGKILL, to the group.
    Group(Pid),
    /// A mount point: aborted if it is FUSE, then detached.
    Mount(PathBuf),
    /// A loop device, by its node.
    Loop(PathBuf),
    /// A directory that is ours, with all below it on the same file system.
    Dir(PathBuf),
    /// A file of the kernel's settings, and what stood in it.
    Setting(PathBuf, String),
}

struct List {
    next: u64,
    entries: Vec<(u64, Undo)>,
    /// Guards that are undoing their entry, which is off the list by then.
    dropping: usize,
}

static LIST: Mutex<List> = Mutex::new(List { next: 0, entries: Vec::new(), dropping: 0 });

fn list() -> MutexGuard<'static, List> {
    // A panic while the list was held cannot have left it half changed: go on with it.
    LIST.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Owns one entry of the list; dropping it undoes the entry.
#[must_use = "dropping the guard undoes it at once"]
#[derive(Debug)]
pub struct Guard(u64);

impl Guard {
    /// Enters `undo` into the list.
    pub fn new(undo: Undo) -> Self {
        let mut list = list();
        let id = list.next;
        list.next += 1;
        list.entries.push((id, undo));
        Self(id)
    }

    /// Takes the entry out without undoing it: it was undone in an orderly way.
    pub fn disarm(self) {
        drop(self.take(&mut list()));
    }

    fn take(&self, list: &mut List) -> Option<Undo> {
        let at = list.entries.iter().position(|(id, _)| *id == self.0)?;
        Some(list.entries.remove(at).1)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut locked = list();
        if let Some(undo) = self.take(&mut locked) {
            locked.dropping += 1;
            drop(locked);
            undo.perform();
            list().dropping -= 1;
        }
    }
}

/// A signal has come, and the signal thread ends the process.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Where the next signal goes instead of ending the process.
static NEXT_SIGNAL: Mutex<Option<mpsc::Sender<()>>> = Mutex::new(None);

/// Starts the thread that undoes everything on SIGINT, SIGTERM and SIGHUP.
pub fn on_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("install signal handlers")?;
    thread::spawn(move || {
        for signal in signals.forever() {
            let waiting = NEXT_SIGNAL.lock().map(|mut next| next.take()).unwrap_or_default();
            if waiting.is_some_and(|waiting| waiting.send(()).is_ok()) {
                continue;
            }
            eprintln!("\nxtask: signal {signal}: cleaning up");
            ENDING.store(true, Ordering::SeqCst);
            undo_all();
            // What another thread has begun to undo is not cut off.
            let _ = poll_until(END_LIMIT, || Ok(list().dropping == 0));
            process::exit(128 + signal);
        }
    });
    Ok(())
}

/// After a signal, leaves the end to the signal thread: whoever sees its work fail because that
/// thread has taken away what it stood on must neither report a failure nor end the process.
pub fn rest_if_ending() {
    if ENDING.load(Ordering::SeqCst) {
        thread::sleep(END_LIMIT);
    }
}

/// Gives the next signal to the receiver, as the ordinary end of a command; one after that cleans
/// up and ends the process as always.
pub fn next_signal() -> mpsc::Receiver<()> {
    let (sender, receiver) = mpsc::channel();
    if let Ok(mut next) = NEXT_SIGNAL.lock() {
        *next = Some(sender);
    }
    receiver
}

/// Undoes everything that is still listed, newest first.
pub fn undo_all() {
    loop {
        let last = list().entries.pop();
        match last {
            Some((_, undo)) => undo.perform(),
            None => return,
        }
    }
}

impl Undo {
    /// Does it; what fails is said and left, because the rest must be undone too.
    fn perform(self) {
        let done = match &self {
            Undo::Group(pid) => end_group(*pid),
            Undo::Mount(path) => detach(path),
            Undo::Loop(device) => detach_loop(device),
            Undo::Dir(path) => remove_dir(path),
            Undo::Setting(path, value) => fs::write(path, value).context("write it back"),
        };
        if let Err(error) = done {
            eprintln!("xtask: could not undo {self:?}: {error:#}");
        }
    }
}

/// A descriptor that becomes readable when process `pid` has ended.
pub fn pidfd(pid: Pid) -> Result<OwnedFd> {
    pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open")
}

/// The processes that this one has made.
pub fn children(pid: Pid) -> Result<Vec<OwnedFd>> {
    // One that is gone has no pidfd.
    Ok(child_pids(pid)?.into_iter().filter_map(|pid| pidfd(pid).ok()).collect())
}

/// The same, by their numbers, which are theirs until this process or that one takes their end.
pub fn child_pids(pid: Pid) -> Result<Vec<Pid>> {
    let pid = pid.as_raw_nonzero();
    let listed = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    Ok(listed.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect())
}

/// The time in which we have run. Limits are held against it: while all of us stand still (a
/// freezer, a suspended machine) nothing can be done in time, and nothing is late for it.
#[derive(Debug)]
pub struct Running {
    seen: Instant,
    passed: Duration,
}

impl Running {
    /// Who looks more often than this loses nothing; of a longer gap this much counts.
    pub const GAP_MAX: Duration = Duration::from_secs(1);

    /// It begins.
    pub fn begin() -> Self {
        Self { seen: Instant::now(), passed: Duration::ZERO }
    }

    /// How much it is now.
    pub fn passed(&mut self) -> Duration {
        let now = Instant::now();
        self.passed += (now - self.seen).min(Self::GAP_MAX);
        self.seen = now;
        self.passed
    }
}

/// Waits until the process behind `pidfd` has ended; false when `limit` passed before.
pub fn wait_ended(pidfd: &OwnedFd, limit: Duration) -> Result<bool> {
    let mut running = Running::begin();
    let mut is_late = false;
    loop {
        let left = limit.saturating_sub(running.passed()).min(Running::GAP_MAX / 2);
        let timeout =
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos() as i64 };
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) if is_late => return Ok(false),
            Ok(0) => is_late = running.passed() >= limit,
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll a pidfd"),
        }
    }
}

/// Asks `done` every few milliseconds until it says yes; false when `limit` passed before. For
/// states of the kernel that have no descriptor to wait on, and never in place of one.
pub fn poll_until(limit: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
    const STEP: Duration = Duration::from_millis(10);
    let mut running = Running::begin();
    loop {
        // Asked once more after the limit: it may have come about while we stood still.
        let is_late = running.passed() >= limit;
        if done()? {
            return Ok(true);
        }
        if is_late {
            return Ok(false);
        }
        thread::sleep(STEP);
    }
}

/// Ends the process group that `pid` leads: SIGTERM, a grace time, SIGKILL.
pub fn end_group(pid: Pid) -> Result<()> {
    let Ok(fd) = pidfd(pid) else { return Ok(()) };
    // ESRCH: it has gone in between, which is what we want.
    let _ = kill_process_group(pid, Signal::TERM);
    if !wait_ended(&fd, TERM_GRACE)? {
        let _ = kill_process_group(pid, Signal::KILL);
        wait_ended(&fd, TERM_GRACE)?;
    }
    Ok(())
}

/// Takes the mount point off the tree without asking the file system behind it.
pub fn detach(path: &Path) -> Result<()> {
    for _mount in mounts::at(path)? {
        // FORCE ends a FUSE connection: processes that wait in the mount get out, and the client's
        // reader ends. To ext4 it means nothing.
        unmount(path, UnmountFlags::DETACH | UnmountFlags::FORCE)
            .with_context(|| format!("unmount {}", path.display()))?;
    }
    Ok(())
}

/// Does `work`; when it takes longer than `limit`, all our FUSE mounts are aborted, so that what
/// waits in them fails instead of hanging, and the work is said to have hung.
pub fn with_limit<T>(limit: Duration, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (done, waiting) = mpsc::channel::<()>();
    let watcher = thread::spawn(move || {
        let mut running = Running::begin();
        while running.passed() < limit {
            let left = limit.saturating_sub(running.passed()).min(Running::GAP_MAX / 2);
            if waiting.recv_timeout(left) != Err(mpsc::RecvTimeoutError::Timeout) {
                return false;
            }
        }
        eprintln!("xtask: nothing moves after {limit:?}: aborting the mounts");
        abort_mounts();
        true
    });
    let result = work();
    drop(done);
    match (watcher.join(), result) {
        (Ok(true), Ok(_)) => Err(anyhow!("took longer than {limit:?}")),
        (Ok(true), Err(error)) => Err(error.context(format!("hung for {limit:?}"))),
        (_, result) => result,
    }
}

/// Ends all our FUSE mounts: what waits in them fails.
pub fn abort_mounts() {
    let paths: Vec<PathBuf> = {
        let list = list();
        let paths = list.entries.iter().filter_map(|(_, undo)| match undo {
            Undo::Mount(path) => Some(path.clone()),
            Undo::Group(_) | Undo::Loop(_) | Undo::Dir(_) | Undo::Setting(..) => None,
        });
        paths.collect()
    };
    for path in paths {
        let mounts = mounts::at(&path).unwrap_or_default();
        if mounts.iter().any(mounts::Mount::is_fuse)
            && let Err(error) = detach(&path)
        {
            eprintln!("xtask: {error:#}");
        }
    }
}

fn detach_loop(device: &Path) -> Result<()> {
    crate::proc::Cmd::new("losetup")
        .arg("--detach")
        .arg(device)
        .limit(Duration::from_secs(20))
        .run()
        .map(drop)
}

fn remove_dir(path: &Path) -> Result<()> {
    // Something may still be mounted below when an error came in between: never delete through it.
    for mount in mounts::below(path)? {
        detach(&mount.point)?;
    }
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("remove {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_in_which_we_stand_still_is_no_time() {
        let mut running = Running::begin();
        running.seen -= Duration::from_secs(90);
        let passed = running.passed();
        assert!(passed >= Running::GAP_MAX && passed < 2 * Running::GAP_MAX, "{passed:?}");
    }

    #[test]
    fn a_guard_undoes_on_drop_and_on_panic_and_not_when_disarmed() {
        let base = std::env::temp_dir().join(format!("ringfs-guard-test.{}", process::id()));
        let make = |name: &str| {
            let dir = base.join(name);
            fs::create_dir_all(dir.join("below")).unwrap();
            dir
        };
        let dropped = make("dropped");
        drop(Guard::new(Undo::Dir(dropped.clone())));
        assert!(!dropped.exists());

        let panicked = make("panicked");
        let path = panicked.clone();
        let result = std::panic::catch_unwind(move || {
            let _guard = Guard::new(Undo::Dir(path));
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        assert!(result.is_err() && !panicked.exists());

        let kept = make("kept");
        Guard::new(Undo::Dir(kept.clone())).disarm();
        assert!(kept.exists());
        drop(Guard::new(Undo::Dir(base.clone())));
        assert!(!base.exists());
    }
}
