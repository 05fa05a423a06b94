//! The daemon's life: opens shares and listeners, starts the shards, waits for signals.
//!
//! What is done before [`Worker`] starts, and what it is given, is what a parent outside a sandbox
//! would do and pass: share roots as fds, and accepted connections. Everything that reads a guest's
//! bytes is behind that line.

use crate::accept::{self, Address, Door, ListenError, Listener};
use crate::cgroup::{Limits, Placement};
use crate::config::{Config, Source};
use crate::fdops;
use crate::fds::Fds;
use crate::reload::{InForce, open_share};
use crate::state_dir::StateError;
use crate::systemd::{self, Notify};
use crate::worker::{Update, Worker};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
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
    #[error("cannot have this --nice or --ioprio")]
    Nice(#[source] rustix::io::Errno),
    #[error("cannot start")]
    Start(#[from] std::io::Error),
}

impl From<rustix::io::Errno> for DaemonError {
    fn from(errno: rustix::io::Errno) -> Self {
        DaemonError::Start(errno.into())
    }
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

/// Before any thread starts: they inherit it.
fn set_priorities(config: &Config) -> Result<(), DaemonError> {
    if let Some(nice) = config.nice {
        rustix::process::setpriority_process(None, nice).map_err(DaemonError::Nice)?;
    }
    if let Some(priority) = config.ioprio {
        fdops::set_io_priority(priority.value()).map_err(DaemonError::Nice)?;
    }
    Ok(())
}

/// Sockets that were bound for this process, by what they are for.
fn passed_sockets() -> Result<Vec<(Door, Listener)>, DaemonError> {
    let sockets = systemd::take()?.into_iter();
    let listeners = sockets.map(|(name, socket)| {
        let door = match name.as_str() {
            "control" => Door::Control,
            "metrics" => Door::Metrics,
            _ => Door::Guests,
        };
        Ok((door, Listener::passed(socket)?))
    });
    listeners.collect()
}

/// What is readable once one of these signals has come.
fn on_signals(signals: &[i32]) -> std::io::Result<UnixStream> {
    let (come, signalled) = UnixStream::pair()?;
    come.set_nonblocking(true)?;
    for &signal in signals {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
    }
    Ok(come)
}

/// A control socket that was asked for must be there; the default one may fail.
fn bind_control(config: &Config) -> Result<Option<Listener>, DaemonError> {
    let Some(path) = config.control.path() else { return Ok(None) };
    match Listener::bind_private(Address::Unix(path)) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if config.control == Default::default() => {
            tracing::warn!(%error, "no control socket");
            Ok(None)
        }
        Err(error) => Err(DaemonError::Control(error)),
    }
}

/// Serves until SIGTERM or SIGINT. `source` is where `config` is from, and is read again on SIGHUP.
///
/// # Errors
/// See [`DaemonError`].
pub fn run(config: Config, source: Source) -> Result<(), DaemonError> {
    let stop = on_signals(&[SIGTERM, SIGINT])?;
    let mut hangup = on_signals(&[SIGHUP])?;
    let notify = Notify::from_environment();
    set_priorities(&config)?;
    raise_open_files();
    become_root_group()?;
    let fds = Fds::of_process();
    let mut shares = Vec::new();
    for share in &config.shares {
        let failed = |source| DaemonError::Serve { name: share.name.clone(), source };
        shares.push(open_share(share, &fds).map_err(failed)?);
    }
    let limits = Limits::read(Path::new("/"));
    let placement = Placement::new(config.cpus.clone(), &limits)?;
    let mut listeners = passed_sockets()?;
    for listen in &config.listen {
        if !listeners.iter().any(|(_, passed)| *passed.address() == listen.address) {
            listeners.push((Door::Guests, Listener::bind(listen.address.clone())?));
        }
    }
    let guests = listeners.iter().filter(|(door, _)| *door == Door::Guests);
    let addresses: Vec<Address> = guests.map(|(_, one)| one.address().clone()).collect();
    // Without a grace time nobody comes back.
    let state = match config.grace.is_zero() {
        true => None,
        false => config.state_dir.open(&addresses, config.grace)?,
    };
    let has = |door| listeners.iter().any(|(known, _)| *known == door);
    let control = if has(Door::Control) { None } else { bind_control(&config)? };
    let metrics = config.metrics.clone().map(Listener::bind_private).transpose()?;
    let Placement { cpus, shards, large_buffers, .. } = placement.clone();
    let worker = Worker::start(shares, placement, config.engine, config.spin, config.grace, state)?;
    listeners.extend(control.map(|listener| (Door::Control, listener)));
    listeners.extend(metrics.map(|listener| (Door::Metrics, listener)));
    worker.update(Update::Slow(config.slow_op));
    let engine = config.engine;
    for address in &addresses {
        tracing::info!(%address, "listening");
    }
    tracing::info!(shards, ?cpus, large_buffers, ?limits, ?engine, "serving");
    let mut in_force = InForce::new(source, config, fds);
    worker.update(Update::Config(in_force.state(&listeners)));
    notify.ready(&in_force.summary());
    loop {
        let alive = || notify.alive();
        let beat: (_, &dyn Fn()) = (notify.watchdog, &alive);
        let wakes = accept::run(&listeners, &[&stop, &hangup], beat, |door, accepted| match door {
            Door::Guests => worker.greet(accepted),
            Door::Control => worker.control(accepted.socket),
            Door::Metrics => worker.metrics(accepted.socket),
        });
        if wakes != Some(1) {
            break;
        }
        while hangup.read(&mut [0; 64]).is_ok_and(|n| n > 0) {}
        notify.reloading();
        in_force.reload(&mut listeners, &worker);
        notify.ready(&in_force.summary());
    }
    notify.stopping();
    tracing::info!("stopping");
    drop(listeners);
    let totals = worker.counters().totals();
    worker.stop();
    tracing::info!("stopped; {}", totals.to_json().trim_end());
    Ok(())
}
