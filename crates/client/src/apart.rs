//! What a client has other processes do at its own mount: the first look at its root, the unmount.
//!
//! Invariant: no thread of a client waits for its client's own mount. Who waits for the reply to a
//! request that was read cannot be killed: such a client would never end, hold the session's fds
//! for ever, and have its keeper wait. An unmount waits for whoever reads the superblock, and that
//! may be a process that has no file open here (ustat(2), which asks STATFS). (NOTIFY_PRUNE, which
//! prune.rs sends, waits for no request: fuser-fork/tests/session.rs.)

use fuser_fork::mount::{MountError, unmount_path};
use rustix::io::Errno;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

const EIO: u8 = Errno::IO.raw_os_error() as u8;

/// This program, for whoever serves nothing.
fn other(words: &[&str], path: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("ringfs").args(words).arg("--").arg(path).stdin(Stdio::null());
    command
}

/// The first GETATTR, by another process: it may hang with the daemon; the session's end lets it
/// go, also that by this client's death.
pub fn ask(path: &Path) -> Result<(), Errno> {
    let status = other(&["answers"], path).stdout(Stdio::null()).status();
    let status = status.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(errno) => Err(Errno::from_raw_os_error(errno)),
        None => Err(Errno::INTR),
    }
}

/// That process: how it ends is what the kernel says, EIO for what no exit code can be.
pub fn look(path: &Path) -> ExitCode {
    let code = rustix::fs::stat(path).map_or_else(Errno::raw_os_error, |_| 0);
    ExitCode::from(u8::try_from(code).unwrap_or(EIO))
}

/// `ringfs umount`. Where the system has no process to give, the caller does it.
pub fn unmount(path: &Path, lazy: bool) -> Result<(), MountError> {
    let words: &[_] = if lazy { &["umount", "--lazy"] } else { &["umount"] };
    let Ok(output) = other(words, path).output() else { return unmount_path(path, lazy) };
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words = words.trim().trim_start_matches("ringfs: ").to_owned();
    Err(MountError::Elsewhere { path: path.to_owned(), words })
}
