//! Both ends of ringfs at work: a daemon on a Unix socket, and mounts of its shares.
//!
//! Invariant: a daemon and a mount are in the undo list from their start, so that neither outlives
//! us. They are driven by their command lines alone, as a user drives them; nothing of theirs is
//! linked in.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Add;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::process::{Pid, Signal};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::guard::{self, Guard, Undo};
use crate::paths::Bins;
use crate::proc::{self, Cmd, Process};
use crate::sandbox::{Sandbox, wait_unmounted};
use crate::{mode, mounts};

/// How long a daemon or a mount may take to come up, to go, or to settle.
pub const SETTLE: Duration = Duration::from_secs(15);
/// A reply of the control socket is never larger.
const STATUS_BYTES_MAX: u64 = 1 << 20;

/// What the daemon counts, as its control socket writes it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
pub struct Counters {
    /// Guests connected now.
    pub sessions: u64,
    /// Nodes known to guests now.
    pub nodes: u64,
    /// Open files and directories now.
    pub handles: u64,
    /// Descriptors the daemon holds now.
    pub fds: u64,
    /// Requests taken and not answered now.
    pub slots_in_use: u64,
    /// Buffers of the pools that are lent out now.
    pub buffers_in_use: u64,
    /// Operations served since the start, by kind.
    #[serde(default)]
    pub ops: BTreeMap<String, u64>,
    /// Payload given to guests since the start.
    #[serde(default)]
    pub bytes_read: u64,
    /// Payload taken from guests since the start.
    #[serde(default)]
    pub bytes_written: u64,
    /// What else it counts.
    #[serde(flatten)]
    pub others: BTreeMap<String, serde_json::Value>,
}

impl Counters {
    /// What a daemon must come back to when all guests have gone.
    pub fn held(&self) -> [(&'static str, u64); 6] {
        [
            ("sessions", self.sessions),
            ("nodes", self.nodes),
            ("handles", self.handles),
            ("fds", self.fds),
            ("slots_in_use", self.slots_in_use),
            ("buffers_in_use", self.buffers_in_use),
        ]
    }
}

/// What the limits of a daemon's shares did.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Limited {
    /// Requests that waited for a rate.
    pub delayed: u64,
    /// Files that were not opened or not made known.
    pub refused: u64,
}

impl Add for Limited {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let Self { delayed, refused } = self;
        Self { delayed: delayed + other.delayed, refused: refused + other.refused }
    }
}

impl fmt::Display for Limited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} delayed and {} refused by limits", self.delayed, self.refused)
    }
}

/// As `{"ask":"status"}` is answered, of which this is of use here.
#[derive(Deserialize)]
struct Status {
    shares: Vec<Share>,
}

#[derive(Deserialize)]
struct Share {
    limits: Vec<Limited>,
}

/// What a mount's client tells of itself, as `ringfs status --json` writes it.
#[derive(Clone, Debug, Deserialize)]
#[allow(missing_docs, reason = "docs/operations.md has them")]
pub struct Told {
    pub pid: u32,
    pub lanes: Granted,
    pub slots_per_lane: u64,
    pub in_flight: u64,
    pub parked: u64,
    pub parked_bytes: u64,
    pub replies_spliced: u64,
    pub stored: u64,
    pub nodes_known: u64,
    pub handles_known: u64,
    pub rebuilds: u64,
    pub nodes_restored: u64,
    pub nodes_lost: u64,
    pub handles_restored: u64,
    pub rebuild_bytes: u64,
    pub rebuild_us: u64,
    pub rings: Rings,
}

/// FUSE-over-io_uring, as a client has it.
#[derive(Clone, Debug, Deserialize)]
pub struct Rings {
    /// Queues that requests come by; 0: by /dev/fuse.
    pub queues: u16,
}

/// Of what was asked for.
#[derive(Clone, Debug, Deserialize)]
pub struct Granted {
    /// So many were given.
    pub got: u64,
}

/// One line of the table of mounts.
#[derive(Deserialize)]
struct Listed {
    mountpoint: PathBuf,
    client: Option<Told>,
}

/// A running `ringfsd`.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    /// The Unix socket it listens on.
    pub socket: PathBuf,
    control: PathBuf,
    log: PathBuf,
    ringfs: PathBuf,
    ringfsd: PathBuf,
    /// All that it is given.
    arguments: Vec<OsString>,
    /// How often it was killed and started again.
    restarts: u32,
    /// Those that take over, each with the FIFO that lets it go and its log.
    spares: VecDeque<(PathBuf, Process, PathBuf)>,
}

impl Daemon {
    /// Starts a daemon called `name` that serves `shares` (`NAME=DIR[,ro]`), and waits until it
    /// accepts.
    pub fn start(
        sandbox: &Sandbox,
        bins: &Bins,
        name: &str,
        shares: &[String],
        extra: &[&str],
    ) -> Result<Self> {
        let socket = sandbox.path(&format!("{name}.sock"));
        let control = sandbox.path(&format!("{name}.ctl"));
        let log = sandbox.path(&format!("{name}.log"));
        let mut arguments: Vec<OsString> =
            mode::Mode::current().daemon_arguments().iter().map(OsString::from).collect();
        for share in shares {
            arguments.extend(["--share".into(), share.into()]);
        }
        arguments.extend(["--listen".into(), format!("unix:{}", socket.display()).into()]);
        arguments.extend(["--control".into(), control.clone().into()]);
        arguments.extend(extra.iter().map(OsString::from));
        let process = launch(&bins.ringfsd, &arguments, &log)?;
        let (ringfs, ringfsd) = (bins.ringfs.clone(), bins.ringfsd.clone());
        let mut daemon = Self {
            process,
            socket,
            control,
            log,
            ringfs,
            ringfsd,
            arguments,
            restarts: 0,
            spares: VecDeque::new(),
        };
        daemon.wait_ready()?;
        Ok(daemon)
    }

    /// Its processes: the parent, and its workers.
    pub fn pids(&self) -> Result<(Pid, Vec<Pid>)> {
        Ok((self.process.pid(), guard::child_pids(self.process.pid())?))
    }

    /// Kills it without a warning and starts it again on the same sockets; its log goes on in a
    /// file of its own.
    pub fn kill_and_start_again(&mut self) -> Result<()> {
        self.kill()?;
        self.start_again()?;
        self.wait_ready()
    }

    /// Kills it without a warning. Its worker may be in a call that ends later: the next daemon
    /// waits for that by the lock of the state directory, else somebody must.
    pub fn kill(&mut self) -> Result<()> {
        let has_lock = !self.arguments.iter().any(|argument| argument == "--state-dir=none");
        let workers = if has_lock { Vec::new() } else { guard::children(self.process.pid())? };
        self.process.signal(Signal::KILL)?;
        ensure!(self.process.wait(SETTLE)?.is_some(), "ringfsd survives SIGKILL for {SETTLE:?}");
        for worker in workers {
            ensure!(
                guard::wait_ended(&worker, SETTLE)?,
                "a worker survives ringfsd for {SETTLE:?}"
            );
        }
        Ok(())
    }

    /// Starts it after a [`Daemon::kill`], and does not wait until it accepts.
    pub fn start_again(&mut self) -> Result<()> {
        self.restarts += 1;
        if let Some((go, process, log)) = self.spares.pop_front() {
            (self.process, self.log) = (process, log);
            fs::write(&go, "\n").with_context(|| format!("write {}", go.display()))?;
        } else {
            // Not of the last one's name, which would grow with each.
            self.log = self.socket.with_extension(format!("{}.log", self.restarts));
            self.process = launch(&self.ringfsd, &self.arguments, &self.log)?;
        }
        Ok(())
    }

    /// Makes processes ready for that many restarts. One that is forked later inherits the files
    /// that we hold on a mount, and closes them at its exec: a FLUSH, which waits for the daemon
    /// that it is to become.
    pub fn make_spares(&mut self, count: u32) -> Result<()> {
        for n in 1..=count {
            let go = self.socket.with_extension(format!("{n}.go"));
            mkfifoat(CWD, &go, Mode::from_raw_mode(0o600)).context("make a FIFO")?;
            let log = self.socket.with_extension(format!("{n}.log"));
            let wait = Cmd::new("sh").env("NO_COLOR", "1");
            let wait = wait.args(["-c", "read -r _ <\"$0\"; exec \"$@\""]).arg(&go);
            let process = wait.arg(&self.ringfsd).args(&self.arguments).spawn(&log)?;
            self.spares.push_back((go, process, log));
        }
        Ok(())
    }

    /// Whether it takes guests.
    pub fn accepts(&self) -> bool {
        UnixStream::connect(&self.socket).is_ok()
    }

    /// Waits until it takes guests and can be asked.
    pub fn wait_ready(&mut self) -> Result<()> {
        let ready = guard::poll_until(SETTLE, || {
            if let Some(status) = self.process.wait(Duration::ZERO)? {
                bail!("ringfsd ended with {status} at its start:\n{}", self.log_tail());
            }
            Ok(self.accepts() && UnixStream::connect(&self.control).is_ok())
        })?;
        ensure!(ready, "ringfsd does not accept after {SETTLE:?}:\n{}", self.log_tail());
        Ok(())
    }

    /// Its log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        proc::tail_of(&self.log)
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// What it counts now.
    pub fn counters(&self) -> Result<Counters> {
        self.ask("counters")
    }

    /// What the limits of its shares did since its start.
    pub fn limited(&self) -> Result<Limited> {
        let status: Status = self.ask("status")?;
        let limits = status.shares.into_iter().flat_map(|share| share.limits);
        Ok(limits.fold(Limited::default(), Add::add))
    }

    fn ask<T: DeserializeOwned>(&self, what: &str) -> Result<T> {
        let mut stream = UnixStream::connect(&self.control)
            .with_context(|| format!("connect to {}", self.control.display()))?;
        stream.set_read_timeout(Some(SETTLE))?;
        stream.write_all(format!("{{\"ask\":\"{what}\"}}\n").as_bytes())?;
        let mut text = String::new();
        stream.take(STATUS_BYTES_MAX).read_to_string(&mut text).context(what.to_owned())?;
        serde_json::from_str(&text)
            .with_context(|| format!("the control socket wrote something else: {text}"))
    }

    /// The counters as soon as nobody is connected; what was held then is what a later
    /// [`Daemon::assert_back_at`] compares with.
    pub fn counters_at_rest(&self) -> Result<Counters> {
        let mut last = self.counters()?;
        guard::poll_until(SETTLE, || {
            last = self.counters()?;
            Ok(last.sessions == 0)
        })?;
        ensure!(
            last.sessions == 0,
            "{} sessions stay after {SETTLE:?}{}",
            last.sessions,
            self.held_elsewhere()
        );
        Ok(last)
    }

    /// Fails unless everything held is back at what it was; cleaning up may take a moment.
    pub fn assert_back_at(&self, start: &Counters) -> Result<()> {
        let mut now = self.counters()?;
        guard::poll_until(SETTLE, || {
            now = self.counters()?;
            Ok(now.held().iter().zip(start.held()).all(|((_, now), (_, was))| *now <= was))
        })?;
        // Less is no leak: at the start a connection of the starter's may not have been closed yet.
        let before = start.held();
        let leaks = now.held().into_iter().zip(before).filter(|((_, now), (_, was))| now > was);
        let leaks: Vec<String> =
            leaks.map(|((name, now), (_, was))| format!("{name}: {was} -> {now}")).collect();
        ensure!(
            leaks.is_empty(),
            "left over after all guests had gone: {}{}",
            leaks.join(", "),
            self.held_elsewhere()
        );
        Ok(())
    }

    /// Why a session may stay that is unmounted, for the message.
    fn held_elsewhere(&self) -> String {
        let dir = self.socket.parent().unwrap_or(&self.socket);
        match mounts::held_elsewhere(dir) {
            Ok(holders) if holders.is_empty() => String::new(),
            Ok(holders) => {
                format!("; copies of mounts are in namespaces of others: {}", holders.join(", "))
            }
            Err(error) => format!("; who holds mounts elsewhere cannot be told: {error:#}"),
        }
    }

    /// Mounts `share` on a new directory called `name`, with `-o options` unless they are empty.
    pub fn mount(
        &self,
        sandbox: &Sandbox,
        share: &str,
        name: &str,
        options: &str,
    ) -> Result<Mount> {
        let dir = sandbox.make_dir(name)?;
        self.mount_on(share, &dir, options)
    }

    /// Mounts `share` on the existing directory `dir`.
    pub fn mount_on(&self, share: &str, dir: &Path, options: &str) -> Result<Mount> {
        self.mounted(self.mount_cmd(share, dir, options), dir, options)
    }

    /// The same by the way of `socket`, where somebody passes on to the daemon; the client writes
    /// what it has to say into `log`.
    pub fn mount_through(
        &self,
        socket: &Path,
        share: &str,
        dir: &Path,
        options: &str,
        log: &Path,
    ) -> Result<Mount> {
        let cmd = mount_cmd(&self.ringfs, socket, share, dir, options);
        self.mounted(cmd.arg("--log").arg(log), dir, options)
    }

    fn mounted(&self, cmd: Cmd, dir: &Path, options: &str) -> Result<Mount> {
        let guard = Guard::new(Undo::Mount(dir.to_path_buf()));
        cmd.run()?;
        ensure!(!mounts::at(dir)?.is_empty(), "`ringfs mount` ended with 0 and mounted nothing");
        let mount = Mount { dir: dir.into(), ringfs: self.ringfs.clone(), guard: Some(guard) };
        if mode::Mode::current() == mode::Mode::Rings && !options.contains("uring=off") {
            ensure!(
                mount.told()?.rings.queues > 0,
                "{}: no rings in the mode of rings",
                dir.display()
            );
        }
        Ok(mount)
    }

    /// The command that mounts `share` on `dir`, not run yet.
    pub fn mount_cmd(&self, share: &str, dir: &Path, options: &str) -> Cmd {
        mount_cmd(&self.ringfs, &self.socket, share, dir, options)
    }

    /// Ends it with SIGTERM; it must say 0.
    pub fn stop(self) -> Result<()> {
        let log = self.log.clone();
        let status: ExitStatus = self.process.stop(SETTLE)?;
        ensure!(status.success(), "ringfsd ended with {status}:\n{}", proc::tail_of(&log));
        Ok(())
    }
}

/// A mounted share.
#[derive(Debug)]
pub struct Mount {
    /// Where it is mounted.
    pub dir: PathBuf,
    ringfs: PathBuf,
    guard: Option<Guard>,
}

/// Asks a client to reconnect, by a process that was made before files were opened on the mount.
/// One that is forked later inherits them, and closes them at its exec: a FLUSH, which waits for
/// the connection that it is to ask for.
#[derive(Debug)]
pub struct Asker {
    fifo: File,
    _process: Process,
}

impl Asker {
    /// Asks once, and does not wait.
    pub fn reconnect(&mut self) -> Result<()> {
        self.fifo.write_all(b"\n").context("ask for a reconnect")
    }
}

impl Mount {
    /// Makes it ready to be asked while files are open on it; what fails stands in `NAME.ask.log`.
    pub fn asker(&self, sandbox: &Sandbox, name: &str) -> Result<Asker> {
        let path = sandbox.path(&format!("{name}.ask"));
        mkfifoat(CWD, &path, Mode::from_raw_mode(0o600)).context("make a FIFO")?;
        let fifo = File::options().read(true).write(true).open(&path)?;
        let each = "exec <>\"$0\"; while read -r _; do \"$1\" reconnect \"$2\"; done";
        let sh = Cmd::new("sh").args(["-c", each]).arg(&path).arg(&self.ringfs).arg(&self.dir);
        let process = sh.spawn(&sandbox.path(&format!("{name}.ask.log")))?;
        Ok(Asker { fifo, _process: process })
    }

    /// What its client tells. The command gives it a second to answer, which may be too short where
    /// the machine stands still.
    pub fn told(&self) -> Result<Told> {
        let mut told = None;
        guard::poll_until(SETTLE, || {
            told = self.told_now()?;
            Ok(told.is_some())
        })?;
        told.with_context(|| format!("no client answers for {}", self.dir.display()))
    }

    fn told_now(&self) -> Result<Option<Told>> {
        let text = Cmd::new(&self.ringfs).args(["status", "--json"]).limit(SETTLE).run()?;
        let listed: Vec<Listed> =
            serde_json::from_str(&text).with_context(|| format!("`ringfs status`: {text}"))?;
        let mut own = listed.into_iter().filter(|listed| listed.mountpoint == self.dir);
        Ok(own.next().and_then(|listed| listed.client))
    }

    /// `ringfs reconnect`.
    pub fn reconnect(&self) -> Result<()> {
        Cmd::new(&self.ringfs).arg("reconnect").arg(&self.dir).limit(SETTLE).run().map(drop)
    }

    /// Unmounts in the orderly way, and sees it gone.
    pub fn umount(mut self) -> Result<()> {
        Cmd::new(&self.ringfs).arg("umount").arg(&self.dir).limit(SETTLE).run()?;
        wait_unmounted(&self.dir, SETTLE)?;
        if let Some(guard) = self.guard.take() {
            guard.disarm();
        }
        Ok(())
    }
}

/// Kills the process that serves the mount at `dir`, as the keeper has started it; false: there is
/// none now. The mount is not touched, nor a process forked, which would have its files open.
pub fn kill_client_of(dir: &Path) -> Result<bool> {
    let killed = |pid| rustix::process::kill_process(pid, Signal::KILL).is_ok();
    Ok(client_of(dir)?.is_some_and(killed))
}

/// The process that serves the mount at `dir`; the mount is not touched.
pub fn client_of(dir: &Path) -> Result<Option<Pid>> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may be gone by now.
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let is_worker = words.contains(&&b"--worker"[..]);
        if is_worker && words.contains(&dir.as_os_str().as_bytes()) {
            return Ok(Some(Pid::from_raw(pid).context("a process number")?));
        }
    }
    Ok(None)
}

fn launch(ringfsd: &Path, arguments: &[OsString], log: &Path) -> Result<Process> {
    Cmd::new(ringfsd).env("NO_COLOR", "1").args(arguments).spawn(log)
}

fn mount_cmd(ringfs: &Path, socket: &Path, share: &str, dir: &Path, options: &str) -> Cmd {
    let source = format!("{share}@unix:{}", socket.display());
    let mut cmd = Cmd::new(ringfs).arg("mount").arg(source).arg(dir);
    for options in [mode::Mode::current().mount_options(), options] {
        if !options.is_empty() {
            cmd = cmd.args(["-o", options]);
        }
    }
    cmd.limit(SETTLE)
}

/// `NAME=DIR`, as `--share` takes it.
pub fn share(name: &str, dir: &Path) -> String {
    format!("{name}={}", dir.display())
}

/// libfuse's passthrough_ll over `source`: the peer that shows what a local file system does.
pub fn mount_passthrough(program: &Path, source: &Path, dir: &Path) -> Result<Guard> {
    fs::create_dir(dir).with_context(|| format!("create {}", dir.display()))?;
    let guard = Guard::new(Undo::Mount(dir.to_path_buf()));
    let options = format!("source={},allow_other,default_permissions,xattr", source.display());
    Cmd::new(program).arg("-o").arg(options).arg(dir).run()?;
    ensure!(!mounts::at(dir)?.is_empty(), "passthrough_ll mounted nothing");
    Ok(guard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_and_unknown_ones_are_let_pass() {
        let text = r#"{"sessions":1,"nodes":2,"handles":3,"fds":4,"slots_in_use":5,
            "buffers_in_use":6,"ops":{"LOOKUP":7},"bytes_read":8,"bytes_written":9,"later":0}"#;
        let counters: Counters = serde_json::from_str(text).unwrap();
        assert_eq!(counters.held().map(|(_, n)| n), [1, 2, 3, 4, 5, 6]);
        assert_eq!(counters.ops["LOOKUP"], 7);
        assert_eq!(counters.others["later"], 0);
        assert!(serde_json::from_str::<Counters>("{}").is_err());
    }
}
