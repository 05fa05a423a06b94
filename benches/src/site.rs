//! A contender at work: its processes, its mount, and how what it uses is measured.
//!
//! Invariant: `path` is either the bare directory of a contender that is meant to be bare, or lies
//! on the mount of the contender's own server; `check` proves it before and after every work.

use crate::contender::{ENABLE_URING, Kind, Spec, Tools, sftp_server};
use crate::counting::{self, Counted, Relay};
use crate::proc::{Snapshot, Usage, mounts_at};
use crate::server::{Mount, Server};
use crate::undo::{Guard, Undo};
use anyhow::{Context, Result, ensure};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// A started contender. Fields are dropped in this order: unmounted first, then its servers end.
#[derive(Debug)]
pub struct Site {
    /// Who.
    pub spec: Spec,
    mount: Option<Mount>,
    /// The process that serves the mount first, then what it talks to.
    servers: Vec<Server>,
    path: PathBuf,
    /// The directory behind, on the file system that all share.
    backing: PathBuf,
    /// The daemon's counters, where it is ringfs's.
    control: Option<PathBuf>,
    relay: Option<Relay>,
    /// How it is mounted, where that was done by others.
    mounted: Option<String>,
    scratch: PathBuf,
    /// Whether `measure` counts what cannot be counted without disturbing.
    pub counting: bool,
}

/// Where a contender is to run.
pub struct Place<'a> {
    /// The directory to serve.
    pub backing: &'a Path,
    /// Of this run, for sockets and mount points.
    pub scratch: &'a Path,
    /// Programs of others.
    pub tools: &'a Tools,
    /// Distinguishes mounts of one contender.
    pub label: &'a str,
    /// Whether a relay that counts stands between client and daemon.
    pub relayed: bool,
}

impl Site {
    /// Starts it.
    pub fn start(spec: &Spec, place: &Place<'_>) -> Result<Site> {
        let at = place.scratch.join(place.label);
        let mut site = Site {
            spec: spec.clone(),
            mount: None,
            servers: Vec::new(),
            path: at.clone(),
            backing: place.backing.to_owned(),
            control: None,
            relay: None,
            mounted: None,
            scratch: place.scratch.to_owned(),
            counting: place.relayed,
        };
        let (mount, server) = match spec.kind {
            Kind::Bare => {
                site.path = place.backing.to_owned();
                return Ok(site);
            }
            Kind::Mounted => {
                let inside = place.backing.strip_prefix(&spec.behind);
                let inside = inside.with_context(|| format!("--backing {:?}", spec.behind))?;
                site.path = spec.mounted.join(inside);
                site.mounted = Some(mounted_line(&spec.mounted)?);
                return Ok(site);
            }
            Kind::Local => Mount::new(&at, || local(place, &at))?,
            Kind::Fuser => Mount::new(&at, || fuser(place, &at))?,
            Kind::Sshfs => {
                let (ours, theirs) = UnixStream::pair()?;
                site.servers.push(sftp(theirs)?);
                Mount::new(&at, || sshfs(place, &at, ours))?
            }
            Kind::Ringfs => {
                let daemon = Daemon::start(spec, place, &[("bench", place.backing)])?;
                site.control = Some(daemon.control.clone());
                let mut socket = daemon.socket.clone();
                if place.relayed {
                    socket = place.scratch.join(format!("{}.relay", place.label));
                    site.relay = Some(Relay::start(&socket, &daemon.socket)?);
                }
                let mounted = mount_ringfs(spec, "bench", &socket, &at)?;
                site.servers.push(daemon.server);
                mounted
            }
        };
        site.path = mount.at().to_owned();
        site.mount = Some(mount);
        site.servers.insert(0, server);
        Ok(site)
    }

    /// Where the work is done.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same directory, behind the contender's back.
    pub fn backing(&self) -> &Path {
        &self.backing
    }

    /// Its mount, unless it is bare.
    pub fn mount(&self) -> Option<&Mount> {
        self.mount.as_ref()
    }

    /// The processes that were started; they may have children.
    pub fn pids(&self) -> Vec<i32> {
        self.servers.iter().map(Server::pid).collect()
    }

    /// All command lines.
    pub fn lines(&self) -> Vec<&str> {
        self.servers.iter().map(Server::line).chain(self.mounted.as_deref()).collect()
    }

    /// An error if a server has ended or the mount has gone.
    pub fn check(&mut self) -> Result<()> {
        for server in &mut self.servers {
            server.check()?;
        }
        if self.mounted.is_some() {
            mounted_line(&self.spec.mounted)?;
        }
        self.mount.as_ref().map_or(Ok(()), |mount| mount.check().map(drop))
    }

    /// Waits until its processes rest: what the last work left (FORGETs, RELEASEs) is not to be
    /// counted to the next. Bounded: an idle loop in a server must not stop the bench.
    pub fn settle(&self) {
        const STEP: Duration = Duration::from_millis(4);
        let pids = self.pids();
        let until = Instant::now() + Duration::from_secs(2);
        let mut last = Snapshot::take(&pids).cpu_ns();
        while !pids.is_empty() && Instant::now() < until {
            thread::sleep(STEP);
            let now = Snapshot::take(&pids).cpu_ns();
            // Reading /proc wakes nobody; a server that uses under 5 % rests.
            if now.saturating_sub(last) < 200_000 {
                return;
            }
            last = now;
        }
    }

    /// Does it, and says how long it took and what the servers used for it.
    pub fn measure<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Measured)> {
        self.settle();
        let pids = self.pids();
        let mut counted = Counted::default();
        let before = Snapshot::take(&pids);
        let start = Instant::now();
        let value = if self.counting {
            let (control, relay) = (self.control.as_deref(), self.relay.as_ref());
            let done = counting::during(&pids, control, relay, &self.scratch, work)?;
            counted = done.1;
            done.0
        } else {
            work()?
        };
        let elapsed = start.elapsed();
        let usage = Snapshot::take(&pids).since(&before);
        let usage = (!pids.is_empty()).then_some(usage);
        Ok((value, Measured { elapsed, usage, counted }))
    }
}

/// Time and use of one piece of work.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// By the clock.
    pub elapsed: Duration,
    /// Of the servers; the bare directory has none.
    pub usage: Option<Usage>,
    /// In a pass of its own.
    pub counted: Counted,
}

impl Measured {
    /// Counts a further piece to it.
    pub fn add(&mut self, other: &Measured) {
        self.elapsed += other.elapsed;
        if let (Some(usage), Some(other)) = (&mut self.usage, &other.usage) {
            usage.cpu += other.cpu;
            usage.wakeups += other.wakeups;
            usage.preempted += other.preempted;
        }
        let (ours, other) = (&mut self.counted, &other.counted);
        let sum = |a: Option<u64>, b: Option<u64>| a.zip(b).map(|(a, b)| a + b);
        ours.syscalls = sum(ours.syscalls, other.syscalls);
        ours.wire = sum(ours.wire, other.wire);
        ours.batches = ours.batches.zip(other.batches).map(|(a, b)| (a.0 + b.0, a.1 + b.1));
    }
}

/// A running `ringfsd`.
#[derive(Debug)]
pub struct Daemon {
    /// The process.
    pub server: Server,
    socket: PathBuf,
    /// Its counters.
    pub control: PathBuf,
    spec: Spec,
}

impl Daemon {
    /// Serves these directories by name.
    pub fn start(spec: &Spec, place: &Place<'_>, shares: &[(&str, &Path)]) -> Result<Daemon> {
        let socket = place.scratch.join(format!("{}.sock", place.label));
        let control = place.scratch.join(format!("{}.ctl", place.label));
        let mut command = Command::new(spec.bin.join("ringfsd"));
        for (name, dir) in shares {
            command.arg("--share").arg(format!("{name}={}", dir.display()));
        }
        command.arg("--listen").arg(format!("unix:{}", socket.display()));
        command.arg("--control").arg(&control).args(&spec.daemon_args).stdin(Stdio::null());
        let mut server = Server::start(command)?;
        server.wait_for("the daemon's socket", || UnixStream::connect(&control).is_ok())?;
        server.wait_for("the daemon's socket", || socket.exists())?;
        Ok(Daemon { server, socket, control, spec: spec.clone() })
    }

    /// Mounts one of its shares.
    pub fn mount(&self, share: &str, at: &Path) -> Result<(Mount, Server)> {
        mount_ringfs(&self.spec, share, &self.socket, at)
    }
}

/// Mounts a share that is served at `socket`.
pub fn mount_ringfs(spec: &Spec, share: &str, socket: &Path, at: &Path) -> Result<(Mount, Server)> {
    Mount::new(at, || {
        let mut command = Command::new(spec.bin.join("ringfs"));
        command.arg("mount").arg(format!("{share}@unix:{}", socket.display()));
        command.arg(at).arg("--foreground").stdin(Stdio::null());
        if !spec.options.is_empty() {
            command.args(["-o", &spec.options]);
        }
        Server::start(command)
    })
}

/// With extended attributes, as ringfs has them: a kernel that is refused once asks no more.
fn local(place: &Place<'_>, at: &Path) -> Result<Server> {
    let source = format!("source={},cache=auto,timeout=1,xattr", place.backing.display());
    let mut command = Command::new(place.tools.passthrough());
    command.args(["-f", "-o", "clone_fd", "-o", "allow_other,default_permissions"]);
    command.args(["-o", &source]).arg(at).stdin(Stdio::null());
    Server::start(command)
}

fn fuser(place: &Place<'_>, at: &Path) -> Result<Server> {
    let mut command = Command::new(place.tools.fuser());
    command.arg(place.backing).arg(at).stdin(Stdio::null());
    Server::start(command)
}

fn sftp(socket: UnixStream) -> Result<Server> {
    let program = sftp_server().context("there is no sftp-server")?;
    // Server::start gives standard output away; sftp-server answers there.
    let line = format!("exec {} 1>&0", program.display());
    let mut shell = Command::new("sh");
    shell.args(["-c", &line]).stdin(OwnedFd::from(socket));
    Server::start(shell)
}

fn sshfs(place: &Place<'_>, at: &Path, socket: UnixStream) -> Result<Server> {
    // `passive`: SFTP on standard input and output, no ssh. Output is the same socket as input.
    let source = format!(":{}", place.backing.display());
    let line = "exec sshfs -f -o passive,allow_other,default_permissions \"$0\" \"$1\" 1>&0";
    let mut shell = Command::new("sh");
    shell.args(["-c", line, &source]).arg(at).stdin(OwnedFd::from(socket));
    Server::start(shell)
}

/// What the kernel says of the one mount at that place; an error unless there is one.
fn mounted_line(at: &Path) -> Result<String> {
    ensure!(mounts_at(at).len() == 1, "not one mount is at {at:?}");
    let text = fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
    let line = text.lines().find(|line| line.split(' ').nth(1).map(Path::new) == Some(at));
    Ok(format!("mount: {}", line.context("a mount that has no line")?))
}

/// Switches FUSE over io_uring on, until the guard is dropped.
pub fn enable_uring() -> Result<Option<Guard>> {
    let was = fs::read_to_string(ENABLE_URING).context("read the switch of FUSE over io_uring")?;
    if was.trim() == "Y" {
        return Ok(None);
    }
    let guard = Guard::new(Undo::Setting(ENABLE_URING.into(), was.trim().to_owned()));
    fs::write(ENABLE_URING, "Y").context("enable FUSE over io_uring")?;
    Ok(Some(guard))
}
