//! `ringfs mount` in the background: a child that serves, and a parent that waits until it does.
//!
//! The child's standard output is a pipe to the parent: one line on it says that the mount answers,
//! its end without a line that there will be none. The child's standard error is the parent's until
//! then, so that the user sees what went wrong. Invariant: the parent's exit status is the truth.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use thiserror::Error;

/// Why there is no mount.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum BackgroundError {
    #[error("cannot start the background process: {what}")]
    Start { what: &'static str, source: io::Error },
    /// It has said why on standard error.
    #[error("the background process ended: {0}")]
    Child(ExitStatus),
}

fn start(what: &'static str) -> impl Fn(io::Error) -> BackgroundError {
    move |source| BackgroundError::Start { what, source }
}

/// Runs this program with `args` in the background, until it is ready or has failed. `for_root`:
/// its name begins with an `@`, so that systemd lets it live at the shutdown of what it serves
/// (<https://systemd.io/ROOT_STORAGE_DAEMONS/>).
pub fn spawn<S: AsRef<OsStr>>(args: &[S], for_root: bool) -> Result<(), BackgroundError> {
    let program = program().map_err(start("find this program; is /proc mounted?"))?;
    let (mut ready, theirs) = io::pipe().map_err(start("pipe"))?;
    let mut command = Command::new(program);
    command
        .arg0(if for_root { "@ringfs" } else { "ringfs" })
        .args(args)
        .stdin(Stdio::null())
        .stdout(theirs);
    let mut child = command.spawn().map_err(start("spawn"))?;
    // It holds our copy of the pipe's other end.
    drop(command);
    let mut byte = [0];
    match ready.read(&mut byte) {
        Ok(1) => Ok(()),
        _ => Err(BackgroundError::Child(child.wait().map_err(start("wait"))?)),
    }
}

fn program() -> io::Result<OsString> {
    std::env::current_exe().map(OsString::from)
}

/// The child's first step: away from the terminal and its signals.
pub fn leave_terminal() {
    // It fails only for a process group's leader: then a shell has started us by hand.
    let _ = rustix::process::setsid();
}

/// The child's last step before it serves: standard error goes to `log`, all else nowhere.
pub fn detach(log: Option<&File>) -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    redirect_errors(Some(log.unwrap_or(&null)))?;
    // Last: its closing, without the line, would mean failure.
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}

/// Standard error goes to `log`, if there is one.
pub fn redirect_errors(log: Option<&File>) -> io::Result<()> {
    match log {
        Some(log) => Ok(rustix::stdio::dup2_stderr(log)?),
        None => Ok(()),
    }
}

/// Opens a log to append to.
pub fn open_log(path: &Path) -> io::Result<File> {
    File::options().append(true).create(true).open(path)
}
