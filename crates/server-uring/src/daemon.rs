//! The daemon's life: the parent opens shares and listeners, and makes the worker, which serves.
//!
//! All that the worker has is opened before it starts, or is handed to it over its channel: share
//! roots as fds, and accepted connections. Everything that reads a guest's bytes is behind that
//! line.

use crate::accept::{Accepted, Address, ListenError, Listener};
use crate::channel::{Channel, ToParent, ToWorker};
use crate::control::Control;
use crate::fds::Fds;
use crate::fork::{self, Child, Spaces};
use crate::fs::{Fs, FsError, FsOptions, ShareDir, ShareRoot, Submounts};
use crate::greet::Share;
use crate::parent::Parent;
use crate::sandbox::{self, Needs, Sandbox};
use crate::state_dir::{Held, StateDir, StateError, StateOption};
use crate::worker::Worker;
use ringfs_wire::limits::SHARE_NAME_BYTES_MAX;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_getaffinity};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// How files and sockets are driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring.
    Uring,
    /// Blocking threads.
    Threads,
}

/// All that the daemon is told, checked.
pub struct Config {
    /// What to share.
    pub shares: Vec<ShareConfig>,
    /// Where to listen.
    pub listen: Vec<Address>,
    /// CPUs to use; all that are allowed by default.
    pub cpus: Option<Vec<usize>>,
    /// How files and sockets are driven.
    pub engine: Engine,
    /// Looks for input before a thread sleeps; 0: none.
    pub spin: u32,
    /// How long a session without connections is kept.
    pub grace: Duration,
    /// Where what is known of sessions outlives this daemon.
    pub state_dir: StateOption,
    /// Path of the control socket.
    pub control: Option<PathBuf>,
    /// What a worker may still do.
    pub sandbox: Sandbox,
}

/// `NAME=DIR[,OPTION...]`.
#[derive(Clone, Debug)]
pub struct ShareConfig {
    /// What guests call it.
    pub name: String,
    /// The directory.
    pub dir: PathBuf,
    /// How it is served, whatever guests ask for.
    pub options: FsOptions,
}

/// Why the daemon cannot serve.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum DaemonError {
    #[error("the share name {0:?} is given twice")]
    Twice(String),
    #[error("cannot serve the share {name:?}")]
    Serve { name: String, source: crate::fs::FsError },
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot make the control socket")]
    Control(#[source] ListenError),
    #[error(
        "io_uring is not to be had: {0}; allow it (sysctl kernel.io_uring_disabled=0, or the \
         container's seccomp profile), or start with --engine=threads"
    )]
    Uring(std::io::Error),
    #[error("CPU {0} is not among those that this process may use ({1:?})")]
    Cpu(usize, Vec<usize>),
    #[error(
        "cannot copy a share's mount (it takes CAP_SYS_ADMIN), as the sandbox needs; \
         --sandbox=none does without"
    )]
    NoCopies,
    #[error(transparent)]
    Sandbox(#[from] sandbox::SandboxError),
    #[error("{0}")]
    Worker(String),
    #[error("cannot start")]
    Start(#[from] std::io::Error),
}

impl From<rustix::io::Errno> for DaemonError {
    fn from(errno: rustix::io::Errno) -> Self {
        DaemonError::Start(errno.into())
    }
}

impl FromStr for ShareConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<ShareConfig, String> {
        let (name, rest) =
            text.split_once('=').ok_or("a share is NAME=DIR or NAME=DIR,OPTION...")?;
        let mut options = FsOptions::default();
        let mut dir = rest;
        // From the right, so that only the last parts can be options and a directory may have
        // commas.
        while let Some((before, word)) = dir.rsplit_once(',') {
            match word {
                "ro" => options.read_only = true,
                "rw" => options.read_only = false,
                "direct_io=pass" => options.direct_io = true,
                "direct_io=buffered" => options.direct_io = false,
                "submounts=merge" => options.submounts = Submounts::Merge,
                "submounts=hide" => options.submounts = Submounts::Hide,
                "dev" => options.device_nodes = true,
                "nodev" => options.device_nodes = false,
                _ => break,
            }
            dir = before;
        }
        if name.is_empty() || name.len() > SHARE_NAME_BYTES_MAX || name.contains(['/', '@']) {
            return Err(format!(
                "the share name {name:?} must have 1 to {SHARE_NAME_BYTES_MAX} bytes, and no / or @"
            ));
        }
        if dir.is_empty() {
            return Err(format!("the share {name:?} has no directory"));
        }
        Ok(ShareConfig { name: name.into(), dir: dir.into(), options })
    }
}

/// Reads a list such as `0-3,8`.
pub fn parse_cpus(text: &str) -> Result<Vec<usize>, String> {
    let bad = |_| format!("{text:?} is no list of CPUs such as 0-3,8");
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().map_err(bad)?;
        let last: usize = last.trim().parse().map_err(bad)?;
        if first > last || last >= CpuSet::MAX_CPU {
            return Err(format!("{part:?} is no range of CPUs"));
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(cpus)
}

/// The CPUs to serve on: those asked for, all of them allowed ones.
fn choose_cpus(asked: Option<Vec<usize>>) -> Result<Vec<usize>, DaemonError> {
    let mask = sched_getaffinity(None)?;
    let allowed: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| mask.is_set(cpu)).collect();
    let Some(asked) = asked else { return Ok(allowed) };
    match asked.iter().find(|cpu| !allowed.contains(cpu)) {
        Some(&cpu) => Err(DaemonError::Cpu(cpu, allowed)),
        None => Ok(asked),
    }
}

/// A share, from which each worker gets a copy.
struct Shared {
    config: ShareConfig,
    dir: ShareDir,
}

fn open_share(config: ShareConfig) -> Result<Shared, DaemonError> {
    let serve = |source| DaemonError::Serve { name: config.name.clone(), source };
    let FsOptions { submounts, read_only, .. } = config.options;
    let dir = ShareDir::open(&config.dir, submounts, read_only).map_err(serve)?;
    // Tried once, so that what can never be served is said at the start.
    let root = dir.root().map_err(|errno| serve(FsError::Root(errno)))?;
    Fs::on(root, config.options.clone()).map_err(serve)?;
    Ok(Shared { config, dir })
}

/// An inode that a guest uses costs an fd: as many as the kernel gives a process, or at least as
/// many as the hard limit allows.
fn raise_open_files() {
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open").ok();
    let most = most.and_then(|text| text.trim().parse::<u64>().ok());
    if setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).is_ok() {
        return;
    }
    let hard = getrlimit(Resource::Nofile).maximum;
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard }) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// A root daemon has root's group too, whatever it was started with: creations switch to the
/// guest's ids and back to 0, and where 0 is not its own the way back would be barred.
fn become_root_group() -> Result<(), DaemonError> {
    if rustix::process::geteuid().is_root() && !rustix::process::getegid().is_root() {
        let root = rustix::process::Gid::ROOT;
        rustix::thread::set_thread_res_gid(root, root, root)?;
    }
    Ok(())
}

/// What a worker is made of, all of it opened by the parent.
struct Plan {
    shares: Vec<Shared>,
    cpus: Vec<usize>,
    engine: Engine,
    spin: u32,
    grace: Duration,
    state: Option<Held>,
    sandbox: Sandbox,
}

/// Serves until SIGTERM or SIGINT: the parent's part.
pub fn run(config: Config) -> Result<(), DaemonError> {
    let (stop, signalled) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
    }
    raise_open_files();
    become_root_group()?;
    let mut shares = Vec::new();
    let fds = Fds::of_process();
    for mut share in config.shares {
        share.options.fds = Arc::clone(&fds);
        if shares.iter().any(|known: &Shared| known.config.name == share.name) {
            return Err(DaemonError::Twice(share.name));
        }
        shares.push(open_share(share)?);
    }
    let cpus = choose_cpus(config.cpus)?;
    let listeners: Vec<Listener> =
        config.listen.iter().cloned().map(Listener::bind).collect::<Result<_, _>>()?;
    let control = config.control.map(|path| Listener::bind(Address::Unix(path)));
    let control = control.transpose().map_err(DaemonError::Control)?;
    // Without a grace time nobody comes back.
    let state = match config.grace.is_zero() {
        true => None,
        false => config.state_dir.hold(&config.listen, config.grace)?,
    };
    let (engine, spin, grace, sandbox) = (config.engine, config.spin, config.grace, config.sandbox);
    let plan = Plan { shares, cpus, engine, spin, grace, state, sandbox };
    let parent = Parent { listeners, control, stop: stop.into() };
    parent.run(
        || start(&plan),
        || {
            for address in &config.listen {
                tracing::info!(%address, cpus = ?plan.cpus, ?engine, "listening");
            }
        },
    )
}

fn start(plan: &Plan) -> std::io::Result<Child> {
    let roots = plan.shares.iter().map(|share| share.dir.root()).collect::<Result<Vec<_>, _>>()?;
    let mut keep: Vec<_> = roots.iter().map(AsFd::as_fd).collect();
    keep.extend(plan.state.as_ref().map(AsFd::as_fd));
    let spaces = (plan.sandbox == Sandbox::Namespace).then_some(Spaces);
    Child::start(&keep, spaces, |channel| match work(plan, &roots, &channel) {
        Ok(()) => 0,
        Err(error) => fork::fail(&channel, &error),
    })
}

/// The worker's part: serves what the parent hands over.
fn work(plan: &Plan, roots: &[ShareRoot], channel: &Channel) -> Result<(), DaemonError> {
    let Plan { cpus, engine, spin, grace, .. } = plan;
    let shares = shut_in(plan, roots)?;
    let state = plan.state.as_ref().map(Held::lend).transpose()?;
    let state = state.map(|held| StateDir::on(held, *grace)).transpose()?;
    let worker = Worker::start(shares, cpus, *engine, *spin, *grace, state)?;
    let control = Control::start(worker.counters())?;
    if plan.sandbox == Sandbox::Namespace {
        sandbox::seal()?;
    }
    channel.send(&ToParent::Ready, None)?;
    loop {
        match channel.receive()? {
            Some((ToWorker::Guest { peer, owner }, Some(socket))) => {
                worker.greet(Accepted { socket, peer, owner });
            }
            Some((ToWorker::Control, Some(asker))) => control.answer(asker),
            Some((ToWorker::Stop, _)) => break,
            Some((message, _)) => tracing::warn!(?message, "the parent says what cannot be"),
            // Killed: as if we had been, too.
            None => std::process::exit(1),
        }
    }
    let totals = worker.counters().totals();
    worker.stop();
    tracing::info!("stopped; {}", totals.to_json().trim_end());
    Ok(())
}

/// Takes from this process what it will not need; the shares as they are then.
fn shut_in(plan: &Plan, roots: &[ShareRoot]) -> Result<Vec<Share>, DaemonError> {
    if plan.sandbox == Sandbox::Namespace {
        let trees = roots.iter().map(ShareRoot::tree).collect::<Option<Vec<_>>>();
        let shares = trees.ok_or(DaemonError::NoCopies)?;
        let state = plan.state.as_ref().map(AsFd::as_fd);
        let device_nodes = plan.shares.iter().any(|share| share.config.options.device_nodes);
        sandbox::enter(&Needs { shares: &shares, state, device_nodes })?;
    }
    let shares = plan.shares.iter().zip(roots).enumerate().map(|(index, (share, root))| {
        let root = match plan.sandbox {
            Sandbox::Namespace => root.at(sandbox::root::open_share(index)?),
            Sandbox::None => root.try_clone()?,
        };
        let ShareConfig { name, dir, options } = share.config.clone();
        Ok(Share { name, dir, root, options })
    });
    shares.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares() {
        let check = |text: &str, expected: Option<(&str, &str, bool, bool, Submounts)>| {
            let parsed = text.parse::<ShareConfig>().ok();
            let found = parsed.as_ref().map(|share| {
                let FsOptions { read_only, direct_io, submounts, .. } = share.options;
                let dir = share.dir.to_str().unwrap_or_default();
                (share.name.as_str(), dir, read_only, direct_io, submounts)
            });
            assert_eq!(found, expected, "{text}");
        };
        let (hide, merge) = (Submounts::Hide, Submounts::Merge);
        check("a=/b", Some(("a", "/b", false, false, hide)));
        check("a=/b,ro", Some(("a", "/b", true, false, hide)));
        check("a=/b,c,ro,direct_io=pass", Some(("a", "/b,c", true, true, hide)));
        check("a=/b=c,submounts=merge", Some(("a", "/b=c", false, false, merge)));
        check("a=/b,unknown", Some(("a", "/b,unknown", false, false, hide)));
        for bad in ["", "a", "=/b", "a=", "a/b=/c", "a@b=/c", "a=,ro"] {
            check(bad, None);
        }
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpus("0-2,5, 1"), Ok(vec![0, 1, 2, 5]));
        for bad in ["", "x", "3-1", "0-99999999", "-1", "1,,2"] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
    }
}
