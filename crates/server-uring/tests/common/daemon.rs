//! A daemon in a process of its own: how it is started, what it tells, how it ends.
//!
//! Invariant: it does not outlive its test, and leaves no socket where it ends by itself.

use super::*;
use ringfs_server::control;
use ringfs_server::status::Status;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Output, Stdio};

/// Counters that must be back where they were once the guests are gone.
pub const GAUGES: &[&str] =
    &["sessions", "nodes", "handles", "slots_in_use", "buffers_in_use", "connections", "fds"];

/// The daemon's program: what cargo built for this test, or where the environment says.
fn ringfsd() -> String {
    let built = option_env!("CARGO_BIN_EXE_ringfsd").map(str::to_owned);
    built.or_else(|| std::env::var("RINGFSD").ok()).expect("RINGFSD names the daemon's program")
}

/// A running `ringfsd` with two shares, `share` and `ro`, of one directory.
pub struct Daemon {
    child: Held,
    dir: tempfile::TempDir,
}

impl Daemon {
    /// One whose sessions end with their last connection.
    pub fn start(engine: &str) -> Daemon {
        Daemon::start_as(engine, |daemon, _| Command::new(daemon))
    }

    /// One that keeps sessions that were cut for so many seconds.
    pub fn start_with_grace(engine: &str, seconds: u32) -> Daemon {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let grace = format!("--grace={seconds}");
        Daemon::start_in(dir, engine, |daemon, _| {
            let mut command = Command::new(daemon);
            command.arg(grace);
            command
        })
    }

    /// One whose share lies in memory (tmpfs).
    pub fn start_in_memory(engine: &str) -> Daemon {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in /dev/shm");
        Daemon::start_in(dir, engine, |daemon, _| Command::new(daemon))
    }

    /// One on one CPU whose share lies in memory.
    pub fn start_for_rate() -> Daemon {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in /dev/shm");
        Daemon::start_in(dir, "uring", |daemon, _| {
            let mut command = Command::new(daemon);
            command.arg("--cpus=0");
            command
        })
    }

    /// `command` makes the command that runs the daemon at the first path over the second's share.
    pub fn start_as(engine: &str, command: impl FnOnce(&str, &Path) -> Command) -> Daemon {
        Daemon::start_in(tempfile::tempdir().expect("a temporary directory"), engine, command)
    }

    /// The same below that directory.
    pub fn start_in(
        dir: tempfile::TempDir,
        engine: &str,
        command: impl FnOnce(&str, &Path) -> Command,
    ) -> Daemon {
        let share = dir.path().join("share");
        std::fs::create_dir(&share).expect("the share's directory");
        let at = |name: &str| dir.path().join(name).display().to_string();
        let mut command = command(&ringfsd(), &share);
        if !command.get_args().any(|arg| arg.to_string_lossy().starts_with("--grace")) {
            command.arg("--grace=0");
        }
        command
            .args(["--share", &format!("share={}", share.display())])
            .args(["--share", &format!("ro={},ro", share.display())])
            .args(["--listen", &format!("unix:{}", at("s"))])
            .args(["--control", &at("c")])
            .arg(format!("--engine={engine}"));
        Daemon::run(command, dir, "error")
    }

    /// One that has all but its control socket from a file, which `text` makes for its directory.
    pub fn start_with_file(text: impl FnOnce(&Path) -> String) -> Daemon {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join("share")).expect("the share's directory");
        std::fs::write(dir.path().join("ringfsd.toml"), text(dir.path())).expect("write");
        let mut command = Command::new(ringfsd());
        command.arg("--config").arg(dir.path().join("ringfsd.toml"));
        command.arg("--control").arg(dir.path().join("c"));
        Daemon::run(command, dir, "off")
    }

    /// `log` is what it logs where the environment does not say.
    fn run(mut command: Command, dir: tempfile::TempDir, log: &str) -> Daemon {
        command.env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or(log.into()));
        let child = command.stdin(Stdio::null()).spawn().expect("ringfsd starts");
        let daemon = Daemon { child: Held(child), dir };
        until("the control socket", || UnixStream::connect(daemon.path("c")).ok());
        daemon
    }

    /// Runs a subcommand of `ringfsd` on this daemon.
    pub fn command(&self, words: &[&str]) -> Output {
        let mut command = Command::new(ringfsd());
        command.args(words).arg("--control").arg(self.path("c")).output().expect("ringfsd runs")
    }

    /// Has it read its configuration anew, which goes well: what it says of it.
    pub fn reload(&self) -> String {
        let output = self.command(&["reload"]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    pub fn status(&self) -> Status {
        // Not answered is who was stopped for a second before he asked.
        until("a status", || control::ask_status(&self.path("c")).ok())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn share(&self) -> PathBuf {
        self.path("share")
    }

    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    pub fn counters(&self) -> BTreeMap<String, u64> {
        let text = until("the counters", || {
            let told = control::ask(&self.path("c"), control::Ask::Counters);
            told.ok().filter(|text| text.ends_with("}\n"))
        });
        let pairs = text.split(['{', '}', ',']).filter_map(|pair| pair.split_once(':'));
        pairs
            .filter_map(|(name, n)| Some((name.trim_matches('"').to_owned(), n.parse().ok()?)))
            .collect()
    }

    pub fn gauges(&self) -> Vec<(&'static str, u64)> {
        let counters = self.counters();
        GAUGES.iter().map(|&name| (name, counters[name])).collect()
    }

    /// The gauges once nothing is in flight: a connection then has its one buffer to receive into.
    pub fn gauges_at_rest(&self) -> Vec<(&'static str, u64)> {
        until("rest", || {
            let gauges = self.gauges();
            let value = |name| gauges.iter().find(|(found, _)| *found == name).map(|(_, n)| *n);
            let rests = value("buffers_in_use") == value("connections");
            (rests && value("slots_in_use") == Some(0)).then_some(gauges)
        })
    }

    /// The daemon holds again what it held before, no more and no less.
    pub fn settles_at(&self, before: &[(&'static str, u64)]) {
        let start = Instant::now();
        loop {
            let now = self.gauges();
            if now == before {
                return;
            }
            assert!(start.elapsed() < LIMIT, "left behind:\n{now:?}\n{before:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The process that serves guests.
    pub fn worker_pid(&self) -> u32 {
        // Answered by it: then it is there, and what has made it is gone.
        self.counters();
        let path = format!("/proc/{0}/task/{0}/children", self.pid());
        let children = std::fs::read_to_string(path).expect("proc");
        children.trim().parse().expect("one child")
    }

    /// Kills the worker; another one serves when this returns.
    pub fn kill_worker(&self) {
        let old = self.worker_pid();
        kill(old, Signal::KILL);
        until("another worker", || {
            // While there is none nobody answers.
            control::ask_status(&self.path("c")).ok()?;
            (self.worker_pid() != old).then_some(())
        });
    }

    /// What is sent to it meanwhile it finds at once.
    pub fn while_stopped(&self, send: impl FnOnce()) {
        let worker = self.worker_pid();
        kill(worker, Signal::STOP);
        send();
        kill(worker, Signal::CONT);
    }

    /// The worker's resident memory.
    pub fn memory_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.worker_pid());
        let status = std::fs::read_to_string(path).expect("proc");
        let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("VmRSS");
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
    }

    pub fn threads(&self) -> usize {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.worker_pid()));
        tasks.expect("the daemon runs").count()
    }

    pub fn connect(&self) -> UnixStream {
        connect(&self.path("s"))
    }

    pub fn guest(&self) -> Guest {
        self.mount("share").expect("welcome")
    }

    /// A session on that share, or why there is none.
    pub fn mount(&self, share: &str) -> Result<Guest, Reason> {
        mount(&self.path("s"), share)
    }

    pub fn signal_to_reload(&self) {
        kill(self.pid(), Signal::HUP);
    }

    pub fn signal_to_end(&self) {
        kill(self.pid(), Signal::TERM);
    }

    /// Ends the daemon by SIGTERM: it must exit by itself, and its sockets must be gone.
    pub fn stop(mut self) -> ExitStatus {
        self.signal_to_end();
        let status = until("the daemon's end", || self.child.0.try_wait().expect("wait"));
        for name in ["s", "c"] {
            assert!(!self.path(name).exists(), "the socket {name} was left behind");
        }
        status
    }

    pub fn stop_well(self) {
        assert_eq!(self.stop().code(), Some(0));
    }
}
