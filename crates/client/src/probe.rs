//! Whether the root of a new mount answers: looked at by a process of its own.
//!
//! Invariant: no thread of a client waits for its client's own mount. Who waits for the reply to a
//! request that was read cannot be killed: such a client would never end, hold the session's fds
//! for ever, and have its keeper wait. (NOTIFY_PRUNE, which prune.rs sends, waits for no request:
//! fuser-fork/tests/session.rs.)

use rustix::io::Errno;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

/// The first GETATTR, by another process: it may hang with the daemon; the session's end lets it
/// go, also that by this client's death.
pub fn ask(path: &Path) -> Result<(), Errno> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("ringfs").args(["answers", "--"]).arg(path);
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    let status = status.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(errno) => Err(Errno::from_raw_os_error(errno)),
        None => Err(Errno::INTR),
    }
}

/// That process: how it ends is what the kernel says.
pub fn look(path: &Path) -> ExitCode {
    let looked = rustix::fs::stat(path);
    ExitCode::from(looked.map_or_else(|errno| errno.raw_os_error() as u8, |_| 0))
}
