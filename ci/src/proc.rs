//! External commands: each leads its own process group, has a time limit, and is in the undo list.
//!
//! Invariant: no command runs without a limit, and none outlives us. Waiting is done on a pidfd, so
//! that there is neither a busy loop nor a signal handler in the way.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::guard::{self, Guard, Undo};

/// What a command may run unless it says otherwise.
const LIMIT: Duration = Duration::from_secs(60);
/// Of captured output we keep this much.
const OUTPUT_BYTES_MAX: u64 = 16 << 20;
/// Lines of output shown when a command fails: from its start and from its end.
const TAIL_LINES: usize = 25;
const HEAD_LINES: usize = 8;

/// A command to run, to be built up as `std::process::Command` is.
#[derive(Debug)]
pub struct Cmd {
    inner: Command,
    limit: Duration,
}

/// What a command that ended left behind.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output and standard error, in the order they were written.
    pub text: String,
}

impl Cmd {
    /// A command without arguments, limited to 60 s, its input empty.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut inner = Command::new(program);
        inner.stdin(Stdio::null()).process_group(0);
        Self { inner, limit: LIMIT }
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.inner.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.inner.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.inner.env(name, value);
        self
    }

    /// Sets the working directory.
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.inner.current_dir(dir);
        self
    }

    /// Sets the time after which the whole group is killed.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The command line, for messages.
    pub fn line(&self) -> String {
        let mut line = self.inner.get_program().to_string_lossy().into_owned();
        for arg in self.inner.get_args() {
            line.push(' ');
            line.push_str(&arg.to_string_lossy());
        }
        line
    }

    /// Runs it with our own output streams; an error unless it ends with 0.
    pub fn show(mut self) -> Result<()> {
        let line = self.line();
        let status = self.wait()?;
        if !status.success() {
            bail!("`{line}` ended with {status}");
        }
        Ok(())
    }

    /// Runs it and gives what it printed, however it ended.
    pub fn output(mut self) -> Result<Output> {
        let capture = memfd_create("output", MemfdFlags::CLOEXEC).context("memfd_create")?;
        let mut capture = File::from(capture);
        self.inner.stdout(capture.try_clone()?).stderr(capture.try_clone()?);
        let status = self.wait();
        capture.seek(SeekFrom::Start(0))?;
        let mut bytes = Vec::new();
        capture.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        match status {
            Ok(status) => Ok(Output { status, text }),
            Err(error) => Err(error.context(tail(&text))),
        }
    }

    /// Runs it and gives what it printed; an error, with the last lines, unless it ends with 0.
    pub fn run(self) -> Result<String> {
        let line = self.line();
        let output = self.output()?;
        if !output.status.success() {
            bail!("`{line}` ended with {}:\n{}", output.status, tail(&output.text));
        }
        Ok(output.text)
    }

    /// Starts it, its output going to the file `log`; it ends when the `Process` is dropped.
    pub fn spawn(mut self, log: &Path) -> Result<Process> {
        let line = self.line();
        let file = File::create(log).with_context(|| format!("create {}", log.display()))?;
        self.inner.stdout(file.try_clone()?).stderr(file);
        Process::start(&mut self.inner, line)
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        let line = self.line();
        let mut process = Process::start(&mut self.inner, line)?;
        match process.wait(self.limit)? {
            Some(status) => Ok(status),
            None => {
                bail!("`{}` was stopped after its limit of {:?}", process.line, self.limit)
            }
        }
    }
}

/// A running process that leads its own group.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pidfd: OwnedFd,
    guard: Option<Guard>,
    line: String,
}

impl Process {
    fn start(command: &mut Command, line: String) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("start `{line}`"))?;
        let pid = Pid::from_child(&child);
        let guard = Some(Guard::new(Undo::Group(pid)));
        Ok(Self { child, pidfd: guard::pidfd(pid)?, guard, line })
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits for its end; `None` when `limit` passes before.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        if self.guard.is_some() && !guard::wait_ended(&self.pidfd, limit)? {
            return Ok(None);
        }
        if let Some(guard) = self.guard.take() {
            guard.disarm();
        }
        Ok(Some(self.child.wait()?))
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid(), signal).with_context(|| format!("signal `{}`", self.line))
    }

    /// Sends a signal to the process and its children, whatever groups they are in.
    pub fn signal_all(&self, signal: Signal) -> Result<()> {
        let pid = self.pid().as_raw_nonzero();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
            .with_context(|| format!("children of `{}`", self.line))?;
        self.signal(signal)?;
        for child in children.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
        {
            kill_process(child, signal)
                .with_context(|| format!("signal a child of `{}`", self.line))?;
        }
        Ok(())
    }

    /// Asks it to end with SIGTERM and gives its status; an error when it does not obey in `limit`.
    pub fn stop(mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        match self.wait(limit)? {
            Some(status) => Ok(status),
            None => bail!("`{}` did not end within {limit:?} of SIGTERM", self.line),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(guard) = self.guard.take() {
            if std::thread::panicking() {
                let _ = kill_process_group(self.pid(), Signal::KILL);
            }
            drop(guard);
            // Reaps it, so that the process id is not kept; one stuck in the kernel is left behind.
            if guard::wait_ended(&self.pidfd, Duration::ZERO).unwrap_or(false) {
                let _ = self.child.wait();
            }
        }
    }
}

/// The first and last lines of a text, for an error message.
pub fn tail(text: &str) -> String {
    let mut lines: Vec<&str> = text.lines().collect();
    if lines.len() > HEAD_LINES + TAIL_LINES {
        lines.splice(HEAD_LINES..lines.len() - TAIL_LINES, ["..."]);
    }
    lines.join("\n")
}

/// The last lines of a log file, or why it cannot be read.
pub fn tail_of(log: &Path) -> String {
    match fs::read(log) {
        Ok(bytes) => tail(&String::from_utf8_lossy(&bytes)),
        Err(error) => format!("({}: {error})", log.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_captured_in_order_and_failures_carry_it() {
        let both = Cmd::new("sh").args(["-c", "echo a; echo b >&2; echo c"]).run().unwrap();
        assert_eq!(both, "a\nb\nc\n");
        let error = Cmd::new("sh").args(["-c", "echo why; exit 3"]).run().unwrap_err();
        assert!(error.to_string().contains("why"), "{error:#}");
    }

    #[test]
    fn a_command_over_its_limit_is_killed_with_its_children() {
        let begun = std::time::Instant::now();
        let limit = Duration::from_millis(200);
        let error = Cmd::new("sh").args(["-c", "sleep 77 & wait"]).limit(limit).run().unwrap_err();
        assert!(format!("{error:#}").contains("limit"), "{error:#}");
        assert!(begun.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_process_that_obeys_is_reaped_with_its_status() {
        let log = std::env::temp_dir().join(format!("ringfs-proc-test.{}", std::process::id()));
        let process = Cmd::new("sleep").arg("77").spawn(&log).unwrap();
        assert!(!process.stop(Duration::from_secs(10)).unwrap().success());
        fs::remove_file(log).unwrap();
    }
}
