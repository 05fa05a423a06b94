//! The daemon's life: opens shares and listeners, starts the shards, waits for the signal to end.
//!
//! What is done before [`Worker`] starts, and what it is given, is what a parent outside a sandbox
//! would do and pass: share roots as fds, and accepted connections. Everything that reads a guest's
//! bytes is behind that line.

use crate::accept::{self, Address, ListenError, Listener};
use crate::config::{Config, ShareConfig};
use crate::control::Control;
use crate::fds::Fds;
use crate::fs::{Fs, ShareRoot};
use crate::greet::Share;
use crate::state_dir::StateError;
use crate::worker::Worker;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_getaffinity};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use thiserror::Error;

/// Why the daemon cannot serve.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum DaemonError {
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
    #[error("cannot start")]
    Start(#[from] std::io::Error),
}

impl From<rustix::io::Errno> for DaemonError {
    fn from(errno: rustix::io::Errno) -> Self {
        DaemonError::Start(errno.into())
    }
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

fn open_share(config: ShareConfig, fds: &Arc<Fds>) -> Result<Share, DaemonError> {
    let options = config.options(fds);
    let ShareConfig { name, path: dir, .. } = config;
    let serve = |source| DaemonError::Serve { name: name.clone(), source };
    let root = ShareRoot::open(&dir, options.submounts).map_err(serve)?;
    // Tried once, so that what can never be served is said at the start.
    root.try_clone().and_then(|root| Fs::on(root, options.clone())).map_err(serve)?;
    Ok(Share { name, dir, root, options })
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

/// Serves until SIGTERM or SIGINT.
pub fn run(config: Config) -> Result<(), DaemonError> {
    let (stop, signalled) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
    }
    raise_open_files();
    become_root_group()?;
    let fds = Fds::of_process();
    let shares = config.shares.into_iter().map(|share| open_share(share, &fds));
    let shares = shares.collect::<Result<Vec<_>, _>>()?;
    let cpus = choose_cpus(config.cpus)?;
    let addresses: Vec<Address> = config.listen.into_iter().map(|listen| listen.address).collect();
    let listeners: Vec<Listener> =
        addresses.iter().cloned().map(Listener::bind).collect::<Result<_, _>>()?;
    // Without a grace time nobody comes back.
    let state = match config.grace.is_zero() {
        true => None,
        false => config.state_dir.open(&addresses, config.grace)?,
    };
    let worker = Worker::start(shares, &cpus, config.engine, config.spin, config.grace, state)?;
    let control = config.control.map(|path| Control::start(path, worker.counters())).transpose()?;
    for address in &addresses {
        tracing::info!(%address, ?cpus, engine = ?config.engine, "listening");
    }
    accept::run(&listeners, &OwnedFd::from(stop), |accepted| worker.greet(accepted));
    tracing::info!("stopping");
    drop(listeners);
    let totals = worker.counters().totals();
    worker.stop();
    drop(control);
    tracing::info!("stopped; {}", totals.to_json().trim_end());
    Ok(())
}
