//! One process that serves, and one mount: started, waited for, and gone when dropped.

use crate::proc;
use crate::undo::{Guard, Undo};
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long a server may take to come up, or to go.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running process of ours.
#[derive(Debug)]
pub struct Server {
    child: Child,
    guard: Option<Guard>,
    line: String,
}

impl Server {
    /// Starts it; what it says on standard error is ours to see.
    pub fn start(mut command: Command) -> Result<Server> {
        let line = line_of(&command);
        command.stdout(Stdio::null()).env("RUST_LOG", "warn").env("NO_COLOR", "1");
        let child = command.spawn().with_context(|| format!("cannot run `{line}`"))?;
        let guard = Some(Guard::new(Undo::Process(child.id() as i32)));
        Ok(Server { child, guard, line })
    }

    /// The command line.
    pub fn line(&self) -> &str {
        &self.line
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits until `ready` says so; an error if the process ends before, or takes too long.
    pub fn wait_for(&mut self, what: &str, mut ready: impl FnMut() -> bool) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !ready() {
            self.check().with_context(|| format!("while waiting for {what}"))?;
            ensure!(Instant::now() < until, "{what} did not appear within {PATIENCE:?}");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// An error if it has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("`{}` ended with {status}", self.line),
            None => Ok(()),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let until = Instant::now() + PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(guard) = self.guard.take() {
            guard.disarm();
        }
    }
}

/// A FUSE mount at a directory of its own.
#[derive(Debug)]
pub struct Mount {
    at: PathBuf,
    _guard: Guard,
}

impl Mount {
    /// Makes the directory `at`, where `start` then mounts, and waits until it is there.
    pub fn new(at: &Path, start: impl FnOnce() -> Result<Server>) -> Result<(Mount, Server)> {
        std::fs::create_dir(at).with_context(|| format!("cannot make {at:?}"))?;
        let at = at.canonicalize()?;
        let mount = Mount { _guard: Guard::new(Undo::Mount(at.clone())), at };
        let mut server = start()?;
        server.wait_for("the mount", || mount.check().is_ok())?;
        Ok((mount, server))
    }

    /// Where.
    pub fn at(&self) -> &Path {
        &self.at
    }

    /// An error unless exactly one FUSE mount is there: the directory below must never be measured.
    pub fn check(&self) -> Result<proc::Mount> {
        let mut mounts = proc::mounts_at(&self.at);
        match mounts.pop() {
            Some(mount) if mount.is_fuse() && mounts.is_empty() => Ok(mount),
            other => bail!("{:?} is not one FUSE mount: {other:?} over {mounts:?}", self.at),
        }
    }

    /// The kernel's readahead of this mount.
    pub fn readahead_file(&self) -> Result<PathBuf> {
        Ok(format!("/sys/class/bdi/{}/read_ahead_kb", self.check()?.device).into())
    }
}

/// A command line as a person would type it, but for quotes.
pub fn line_of(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

/// What a program prints on that argument, both streams; empty if it cannot run.
pub fn said(program: &Path, args: &[&str]) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    output.map_or_else(
        |_| String::new(),
        |output| {
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.push_str(&String::from_utf8_lossy(&output.stderr));
            text
        },
    )
}
