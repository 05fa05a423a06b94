//! `fusermount3`, the setuid program that mounts for users who may not: it opens the device,
//! mounts, and passes the fd back over a socket (`_FUSE_COMMFD`, SCM_RIGHTS).
//!
//! Invariant: bounded in time; a program that hangs is killed and not waited for. The socket is
//! the program's standard input: no fd has to be made inheritable, so none leaks into processes
//! that other threads start.

use std::ffi::OsStr;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::device::{DEVICE_PATH, DeviceError};
use crate::mount::MountError;

/// The program's name where nobody says otherwise.
pub(crate) const PROGRAM: &str = "fusermount3";

/// How long it may take.
const WAIT: Duration = Duration::from_secs(10);

/// How much of its complaints is kept, bytes.
const MESSAGE_BYTES_MAX: u64 = 1024;

/// Mounts, and gives the fd of the new session.
pub(crate) fn mount(
    program: &Path,
    mountpoint: &Path,
    options: &OsStr,
) -> Result<OwnedFd, MountError> {
    let os = |source: Errno| MountError::Os { what: "set up", path: mountpoint.into(), source };
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(os)?;
    let mut command = Command::new(program);
    command.arg("-o").arg(options).arg("--").arg(mountpoint);
    command.env("_FUSE_COMMFD", "0").stdin(Stdio::from(theirs));
    let child = spawn(&mut command, program)?;
    // `command` holds their end of the socket: without this we would never see it closed.
    drop(command);
    let device = match wait_for(ours.as_fd()) {
        true => receive_fd(ours.as_fd()).map_err(os)?,
        false => None,
    };
    finish(child, program, mountpoint)?;
    device.ok_or_else(|| MountError::Fusermount {
        program: program.to_owned(),
        path: mountpoint.to_owned(),
        message: "it passed no device back".to_owned(),
    })
}

/// Unmounts a mount of this user's.
pub(crate) fn unmount(program: &Path, mountpoint: &Path, lazy: bool) -> Result<(), MountError> {
    let mut command = Command::new(program);
    command.arg("-u").args(lazy.then_some("-z")).arg("--").arg(mountpoint).stdin(Stdio::null());
    let child = spawn(&mut command, program)?;
    finish(child, program, mountpoint)
}

fn spawn(command: &mut Command, program: &Path) -> Result<Child, MountError> {
    command.stdout(Stdio::null()).stderr(Stdio::piped()).env("LC_ALL", "C");
    command.spawn().map_err(|source| {
        if source.kind() == io::ErrorKind::NotFound {
            MountError::FusermountMissing { program: program.to_owned() }
        } else {
            MountError::FusermountStart { program: program.to_owned(), source }
        }
    })
}

/// Waits for the program's end, and turns a failure's words into an error.
fn finish(mut child: Child, program: &Path, path: &Path) -> Result<(), MountError> {
    let start = |source: io::Error| MountError::FusermountStart { program: program.into(), source };
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pidfd = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty()));
    // Without pidfds (before Linux 5.3) the wait has no limit.
    let ended = pidfd.and_then(Result::ok).is_none_or(|pidfd| wait_for(pidfd.as_fd()));
    if !ended {
        // It may sit in the kernel on a dead mount, where even SIGKILL does not reach it.
        child.kill().map_err(start)?;
        let message = format!("no answer within {} s", WAIT.as_secs());
        return Err(MountError::Fusermount { program: program.into(), path: path.into(), message });
    }
    let status = child.wait().map_err(start)?;
    if status.success() {
        return Ok(());
    }
    let mut message = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        // What another process may still hold open must not keep us.
        rustix::io::ioctl_fionbio(&stderr, true).map_err(|errno| start(errno.into()))?;
        let read = stderr.take(MESSAGE_BYTES_MAX).read_to_end(&mut message);
        if let Err(error) = read {
            tracing::debug!(%error, "the complaints of fusermount3 end early");
        }
    }
    let message = String::from_utf8_lossy(&message).trim().to_owned();
    if message.contains(DEVICE_PATH) && message.contains("Permission denied") {
        // It opens the device with the user's rights.
        return Err(DeviceError::Permission { path: DEVICE_PATH.into() }.into());
    }
    let message = if message.is_empty() { status.to_string() } else { message };
    Err(MountError::Fusermount { program: program.into(), path: path.into(), message })
}

/// Whether `fd` became readable (or closed) in time.
fn wait_for(fd: BorrowedFd<'_>) -> bool {
    let until = std::time::Instant::now() + WAIT;
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let limit = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&limit)) {
            Err(Errno::INTR) => continue,
            Ok(ready) => return ready > 0,
            Err(_) => return false,
        }
    }
}

/// The fd that comes with one byte; `None` if the other end closed without.
fn receive_fd(socket: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    let mut parts = [IoSliceMut::new(&mut byte)];
    rustix::io::retry_on_intr(|| {
        recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(fd)
}
