//! Processes that end with us: on return, on panic, on Ctrl-C and when we are killed.
//!
//! `setpriv --pdeathsig KILL` has the kernel end the child when the thread that started it ends,
//! so start from the main thread only. On ordinary ways out the guard asks first (SIGTERM), waits
//! for a limited time, and kills by pid; on Ctrl-C the list of `guard` does.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};

use crate::guard::{Guard, Undo};

/// How long a process may take to end on SIGTERM.
const TERM_WAIT_MAX: Duration = Duration::from_secs(5);
/// How often an ending process is looked at.
const POLL: Duration = Duration::from_millis(20);

/// A running program; dropping it ends it.
pub struct Process {
    child: Child,
    name: &'static str,
    log: PathBuf,
    /// Ends it on Ctrl-C.
    guard: Option<Guard>,
}

impl Process {
    /// Starts `program` with `arguments` in `dir`; its output goes to `dir/NAME.log`, except for
    /// stdin and stdout if `piped`.
    pub fn start(
        name: &'static str,
        program: &Path,
        arguments: &[String],
        dir: &Path,
        piped: bool,
    ) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let (input, out) = if piped {
            (Stdio::piped(), Stdio::piped())
        } else {
            (Stdio::null(), file.try_clone()?.into())
        };
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments)
            .current_dir(dir)
            // Ctrl-C in a terminal is for us alone: the guards decide the order of the end.
            .process_group(0)
            .stdin(input)
            .stdout(out)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {name} ({})", program.display()))?;
        let guard = Some(Guard::new(Undo::Group(Pid::from_child(&child))));
        Ok(Self { child, name, log, guard })
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs; if not, an error with the end of its log.
    pub fn check_running(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            anyhow::bail!("{} has ended ({status}):\n{}", self.name, self.log_tail(20));
        }
        Ok(())
    }

    /// Waits until `path` exists, which is how these programs say that they listen.
    pub fn wait_for(&mut self, path: &Path, limit: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + limit;
        while !path.exists() {
            self.check_running()?;
            anyhow::ensure!(
                Instant::now() < end,
                "{} made no {} within {limit:?}:\n{}",
                self.name,
                path.display(),
                self.log_tail(20)
            );
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits for the program to end by itself; false if the time is over.
    pub fn wait_end(&mut self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            match self.child.try_wait() {
                Ok(Some(_)) | Err(_) => return true,
                Ok(None) if Instant::now() >= end => return false,
                Ok(None) => std::thread::sleep(POLL),
            }
        }
    }

    /// Ends it without a warning.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().with_context(|| format!("killing {}", self.name))?;
        self.child.wait()?;
        Ok(())
    }

    /// The last lines of the log.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.disarm();
        }
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // It may end in this very moment; the wait below sees that too.
            let _ended_already = kill_process(pid, Signal::TERM);
        }
        if !self.wait_end(TERM_WAIT_MAX) {
            eprintln!("vm: {} does not end on SIGTERM; killing it", self.name);
            let _ended_already = self.child.kill();
            let _reaped = self.child.wait();
        }
    }
}

/// The last `lines` lines of a text file, or why there are none.
pub fn tail(file: &Path, lines: usize) -> String {
    match std::fs::read(file) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
        Err(error) => format!("({}: {error})", file.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_process_has_ended() {
        let dir = std::env::temp_dir();
        let sleep = Process::start("sleep", Path::new("sleep"), &["60".into()], &dir, false)
            .expect("sleep starts");
        let proc = PathBuf::from(format!("/proc/{}", sleep.id()));
        assert!(proc.exists());
        drop(sleep);
        assert!(!proc.exists());
    }
}
