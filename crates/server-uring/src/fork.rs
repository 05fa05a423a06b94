//! The worker's process: made, told apart from the parent's, and waited for.
//!
//! Invariant: a worker has of the parent's fds those that it was given, and no others: a listener
//! that it held would go on taking guests in for a parent that is gone. It ends with its parent.

#![allow(unsafe_code, reason = "fork, and what is to be put right in the new process")]

use crate::channel::{Channel, ToParent, ToWorker};
use crate::sandbox::root::Inside;
use crate::sandbox::users::{self, Ids, Lent};
use crate::share::ShareDir;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, getegid, geteuid, kill_process, pidfd_open,
    waitpid,
};
use rustix::thread::{UnshareFlags, set_thread_groups, unshare_unsafe};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// The exit code of a worker that could not go on.
const FAILED: i32 = 1;
/// That of a helper which has done it, with `false` to tell; no errno.
const DONE_OTHERWISE: i32 = 255;
/// How long a helper may take: the parent accepts nobody meanwhile, and a share's file system may
/// not answer.
const HELPER_LIMIT: Duration = Duration::from_secs(10);
/// And how long to end when it is killed. What the kernel does not let go of is left alone.
const KILL_LIMIT: Duration = Duration::from_secs(1);

/// A running worker, from its parent's side; killed and reaped with this value.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    /// How it ended, once that is known.
    ended: Option<WaitStatus>,
    /// Shares that it has been given.
    shares: usize,
    /// Where it is; see [`Child::serves`].
    inside: Option<Inside>,
    /// Helpers that were killed and had not ended.
    stray: Vec<Pid>,
    /// To the worker; hung up when it has ended.
    pub channel: Channel,
}

impl Child {
    /// Makes a worker that runs `work` and ends with the code that this returns, in `spaces` of its
    /// own, with so many `shares`. Of the fds that are open it has `keep`, its end of the channel,
    /// and the standard streams.
    ///
    /// # Errors
    /// What socketpair and fork say; `OTHER` where there are no such namespaces.
    pub fn start(
        keep: &[BorrowedFd<'_>],
        shares: usize,
        spaces: Option<Spaces>,
        work: impl FnOnce(Channel) -> i32,
    ) -> io::Result<Child> {
        wait_for_one_thread();
        let (ours, theirs) = Channel::pair()?;
        // The one that makes the worker in its namespaces ends at once: the worker is ours then.
        let us = rustix::process::getpid();
        rustix::process::set_child_subreaper(spaces.as_ref().map(|_| us))?;
        let Some(pid) = fork()? else {
            drop(ours);
            let mut kept: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
            kept.extend([0, 1, 2, theirs.as_fd().as_raw_fd()]);
            close_all_but(kept);
            ignore_signals();
            // A panic must not unwind into what is the parent's.
            let code = catch_unwind(AssertUnwindSafe(|| {
                if let Some(spaces) = spaces {
                    match spaces.enter(&theirs) {
                        Ok(Side::Outside) => return 0,
                        Ok(Side::Inside) => {}
                        Err(error) => return fail(&theirs, &error),
                    }
                }
                begin(&theirs).map_or(FAILED, |()| work(theirs))
            }));
            std::process::exit(code.unwrap_or(FAILED));
        };
        let mut child = Child::of(pid, shares, ours);
        drop(theirs);
        if spaces.is_some() {
            let how = child.wait();
            child.pid = match child.channel.receive()? {
                Some((ToParent::Pid(pid), _)) if how.is_empty() => {
                    Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?
                }
                Some((ToParent::Failed(text), _)) => return Err(io::Error::other(text)),
                _ => return Err(io::Error::other(format!("no worker was made ({how})"))),
            };
            child.ended = None;
        }
        child.channel.send(&ToWorker::Begin, None)?;
        Ok(child)
    }

    fn of(pid: Pid, shares: usize, channel: Channel) -> Child {
        Child { pid, ended: None, shares, inside: None, stray: Vec::new(), channel }
    }

    /// The worker's root stands, and it has had no guest yet. Its namespaces can be had now: once
    /// it has taken on a guest's user for a moment, it is a stranger to who is not root.
    ///
    /// # Errors
    /// What the system calls say.
    pub fn serves(&mut self, own_users: bool) -> io::Result<()> {
        self.inside = Some(Inside::of(self.pid.as_raw_pid(), own_users)?);
        Ok(())
    }

    /// Puts a further share's tree into the worker's root; which directory that is.
    ///
    /// # Errors
    /// What the system calls say.
    pub fn attach(&mut self, tree: BorrowedFd<'_>) -> io::Result<usize> {
        let index = self.shares;
        self.by_helper(&[tree], |inside| inside.attach(tree, index).map(|()| true))?;
        Ok(index)
    }

    /// The same with a share of a worker in a user namespace of its own; also whether what is
    /// mounted below it is hidden, or is to be seen.
    ///
    /// # Errors
    /// What the system calls say.
    pub fn attach_in_own_users(&mut self, share: &ShareDir, ids: Ids) -> io::Result<(usize, bool)> {
        let index = self.shares;
        let hidden = self.by_helper(&[], |inside| {
            inside.enter_users()?;
            // What the worker could not open, its successor could not.
            drop_other_groups(ids)?;
            let copy = share.copy_in_own_users()?;
            inside.attach(copy.as_fd(), index)?;
            Ok(copy.hidden())
        })?;
        Ok((index, hidden))
    }

    /// A process of its own, with `keep` of the parent's fds, goes into the worker's namespaces and
    /// puts a share there.
    fn by_helper(
        &mut self,
        keep: &[BorrowedFd<'_>],
        work: impl FnOnce(&Inside) -> Result<bool, Errno>,
    ) -> io::Result<bool> {
        let Some(inside) = &self.inside else {
            return Err(io::Error::other("the worker's namespaces could not be had"));
        };
        self.stray.retain(|&pid| matches!(waitpid(Some(pid), WaitOptions::NOHANG), Ok(None)));
        let keep: Vec<_> = inside.fds().chain(keep.iter().copied()).collect();
        let helper = Helper::start(&keep, || work(inside))?;
        let done = helper.ends_within(HELPER_LIMIT, &mut self.stray);
        // One that was killed may have begun: nobody else has its place.
        if done.as_ref().err().is_none_or(|error| error.kind() == io::ErrorKind::TimedOut) {
            self.shares += 1;
        }
        done
    }

    /// Waits until it has ended, and says how.
    pub fn wait(&mut self) -> String {
        while self.ended.is_none() {
            match waitpid(Some(self.pid), WaitOptions::empty()) {
                Ok(Some((_, status))) => self.ended = Some(status),
                Ok(None) | Err(Errno::INTR) => {}
                Err(error) => return error.to_string(),
            }
        }
        let Some(status) = self.ended else { return String::new() };
        match (status.exit_status(), status.terminating_signal()) {
            (Some(0), _) => String::new(),
            (Some(code), _) => format!("exit code {code}"),
            (None, signal) => format!("signal {}", signal.unwrap_or_default()),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = kill_process(self.pid, Signal::KILL);
            self.wait();
        }
    }
}

/// A process that does one thing for the parent.
struct Helper(Pid);

impl Helper {
    /// It has the fds that it needs, and no listener: where it is stuck it may outlive its parent.
    fn start(
        keep: &[BorrowedFd<'_>],
        work: impl FnOnce() -> Result<bool, Errno>,
    ) -> io::Result<Helper> {
        wait_for_one_thread();
        let Some(pid) = fork()? else {
            let kept = keep.iter().map(AsRawFd::as_raw_fd);
            close_all_but(kept.chain([0, 1, 2]).collect());
            exit_now(match work() {
                Ok(true) => 0,
                Ok(false) => DONE_OTHERWISE,
                Err(errno) => errno.raw_os_error(),
            })
        };
        Ok(Helper(pid))
    }

    /// What it says; `TimedOut`: it was killed, and is among the strays if not even that ends it.
    fn ends_within(self, limit: Duration, stray: &mut Vec<Pid>) -> io::Result<bool> {
        let Helper(pid) = self;
        let code = match status_within(pid, limit)? {
            Some(status) => status.exit_status(),
            None => {
                kill_process(pid, Signal::KILL)?;
                if status_within(pid, KILL_LIMIT)?.is_none() {
                    stray.push(pid);
                }
                let text = format!("it does not answer within {limit:?}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        };
        match code {
            Some(0) => Ok(true),
            Some(DONE_OTHERWISE) => Ok(false),
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Err(Errno::IO.into()),
        }
    }
}

/// How a process of ours has ended; `None`: it has not, in that time.
fn status_within(pid: Pid, limit: Duration) -> io::Result<Option<WaitStatus>> {
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let until = Instant::now() + limit;
    loop {
        if let Some((_, status)) = waitpid(Some(pid), WaitOptions::NOHANG)? {
            return Ok(Some(status));
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Namespaces that a worker has for itself: mounts, processes, network, IPC and host name.
#[derive(Clone, Copy, Debug)]
pub struct Spaces {
    /// In one of users, which takes no right.
    pub own_users: Option<Ids>,
}

enum Side {
    /// In the process that has made the worker.
    Outside,
    /// In the worker.
    Inside,
}

/// Why there are none.
#[derive(Debug, thiserror::Error)]
#[error("cannot make namespaces for the worker: {cure}")]
struct NoSpaces {
    cure: &'static str,
    source: io::Error,
}

impl Spaces {
    /// A pid namespace is of the processes that are made next.
    fn enter(self, channel: &Channel) -> Result<Side, NoSpaces> {
        let (uid, gid) = (geteuid(), getegid());
        // Whoever maps lent ids must have stayed outside.
        let not_lent =
            |source| NoSpaces { cure: "without --subordinate-ids it needs none", source };
        let mapper = match self.own_users {
            Some(Ids::Lent(lent)) => Some(Mapper::start(lent).map_err(not_lent)?),
            Some(Ids::Own) | None => None,
        };
        let cure = match self.own_users {
            Some(_) => users::why_not(),
            None => "--sandbox=landlock does without them",
        };
        let failed = |source| NoSpaces { cure, source };
        self.unshare().map_err(failed)?;
        match (self.own_users, mapper) {
            (Some(Ids::Own), _) => users::map_own(uid, gid).map_err(failed)?,
            (Some(ids), Some(mapper)) => {
                mapper.map().map_err(not_lent)?;
                drop_other_groups(ids).map_err(|errno| not_lent(errno.into()))?;
            }
            (Some(Ids::Lent(_)) | None, _) => {}
        }
        let Some(worker) = fork().map_err(failed)? else { return Ok(Side::Inside) };
        let pid = ToParent::Pid(worker.as_raw_nonzero().get());
        channel.send(&pid, None).map_err(|errno| failed(errno.into()))?;
        Ok(Side::Outside)
    }

    fn unshare(self) -> io::Result<()> {
        let mut spaces = UnshareFlags::NEWNS
            | UnshareFlags::NEWPID
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS;
        spaces.set(UnshareFlags::NEWUSER, self.own_users.is_some());
        // SAFETY: no fds are taken apart, and this process has one thread.
        Ok(unsafe { unshare_unsafe(spaces) }?)
    }
}

/// A process that is made before its maker enters a user namespace, and maps ids of that then.
struct Mapper(Child);

impl Mapper {
    fn start(lent: Lent) -> io::Result<Mapper> {
        let (ours, theirs) = Channel::pair()?;
        let (maker, uid, gid) = (rustix::process::getpid(), geteuid(), getegid());
        let Some(pid) = fork()? else {
            drop(ours);
            if !matches!(theirs.receive(), Ok(Some((ToWorker::Begin, _)))) {
                exit_now(FAILED);
            }
            exit_now(match lent.map(maker, uid, gid) {
                Ok(()) => 0,
                Err(error) => fail(&theirs, &error),
            })
        };
        Ok(Mapper(Child::of(pid, 0, ours)))
    }

    fn map(mut self) -> io::Result<()> {
        self.0.channel.send(&ToWorker::Begin, None)?;
        match (self.0.wait(), self.0.channel.receive()) {
            (how, _) if how.is_empty() => Ok(()),
            (_, Ok(Some((ToParent::Failed(text), _)))) => Err(io::Error::other(text)),
            (how, _) => Err(io::Error::other(format!("the ids were not mapped ({how})"))),
        }
    }
}

/// With lent ids the user's other groups have no id in there, so a thread that takes on a guest's
/// could not go back to them.
fn drop_other_groups(ids: Ids) -> Result<(), Errno> {
    match ids {
        Ids::Own => Ok(()),
        Ids::Lent(_) => set_thread_groups(&[]),
    }
}

/// In the worker: its parent's end is its own, from here on.
fn begin(channel: &Channel) -> Option<()> {
    // Not before: whoever has made the worker in its namespaces has ended when this comes.
    let begun = channel.receive::<ToWorker>();
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).ok()?;
    // A parent that goes just now is found out by the channel's end.
    matches!(begun, Ok(Some((ToWorker::Begin, None)))).then_some(())
}

/// A fork copies the locks that other threads hold, and not those threads. The parent has another
/// one only while it reads its configuration; one that is stuck there holds none.
fn wait_for_one_thread() {
    let threads = || std::fs::read_dir("/proc/self/task").map_or(1, |all| all.count());
    for _ in 0..100 {
        if threads() == 1 {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    tracing::warn!("a worker is made while another thread of the parent is stuck");
}

/// `None` in the new process.
fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the caller has waited for this process to have one thread, or one besides that is
    // stuck in the kernel: no lock is held by a thread that the copy lacks.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Signals that end the daemon come to the parent, which tells the worker. Its handlers write to
/// an fd that the worker does not have.
fn ignore_signals() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        // SAFETY: to ignore a signal runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Without anything that is the parent's to do at its end.
fn exit_now(code: i32) -> ! {
    // SAFETY: it ends the process at once.
    unsafe { libc::_exit(code) }
}

fn close_all_but(mut kept: Vec<RawFd>) {
    kept.sort_unstable();
    let mut from = 0;
    for fd in kept.into_iter().chain([RawFd::MAX]) {
        if from < fd {
            // SAFETY: the values that own these fds are the parent's. Nothing in this process uses
            // or drops them: it runs what it was given, and exits.
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = fd.saturating_add(1);
    }
}

/// What it says, and what its causes do.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Tells the parent why there will be no worker.
pub fn fail(channel: &Channel, error: &(dyn std::error::Error + 'static)) -> i32 {
    let text = with_causes(error);
    if channel.send(&ToParent::Failed(text.clone()), None).is_err() {
        tracing::error!("the worker has failed: {text}");
    }
    FAILED
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::test_kill_process;

    fn helped(work: impl FnOnce() -> Result<bool, Errno>) -> (Pid, io::Result<bool>) {
        let helper = Helper::start(&[], work).expect("fork");
        let (pid, mut stray) = (helper.0, Vec::new());
        let done = helper.ends_within(Duration::from_secs(1), &mut stray);
        assert!(stray.is_empty() && test_kill_process(pid) == Err(Errno::SRCH), "it has ended");
        (pid, done)
    }

    #[test]
    fn a_helper_that_is_stuck_holds_nobody_up() {
        // It waits for what never comes, as a call does on a file system that does not answer.
        let begun = Instant::now();
        let stuck = || {
            let (ours, _theirs) = rustix::pipe::pipe()?;
            rustix::io::read(&ours, &mut [0; 1]).map(|_| true)
        };
        let (_, done) = helped(stuck);
        assert_eq!(done.expect_err("stuck").kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() < Duration::from_secs(60));
        for (told, expected) in
            [(Ok(true), Ok(true)), (Ok(false), Ok(false)), (Err(Errno::STALE), Err(Errno::STALE))]
        {
            let said = helped(|| told).1.map_err(|error| Errno::from_io_error(&error));
            assert_eq!(said, expected.map_err(Some));
        }
    }

    #[test]
    fn a_helper_has_the_fds_that_it_was_given() {
        let (ours, theirs) = rustix::pipe::pipe().expect("a pipe");
        let helper = Helper::start(&[ours.as_fd()], || {
            let (has, lacks) = (rustix::io::fcntl_getfd(&ours), rustix::io::fcntl_getfd(&theirs));
            Ok(has.is_ok() && lacks == Err(Errno::BADF))
        });
        let done = helper.expect("fork").ends_within(Duration::from_secs(60), &mut Vec::new());
        assert!(done.expect("it ends"));
    }
}
