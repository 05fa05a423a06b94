//! The daemon's life: the parent opens shares and listeners, and makes the worker, which serves.
//!
//! All that the worker has is opened before it starts, or is handed to it over its channel: share
//! roots, and accepted connections. Everything that reads a guest's bytes is behind that line.

use crate::accept::{Door, ListenError, Listener};
use crate::address::Address;
use crate::cgroup::{Limits, Placement};
use crate::config::{Config, FileMode, ListenConfig, Source};
use crate::control;
use crate::entrance::Entrance;
use crate::fdops;
use crate::fds::Fds;
use crate::parent::{Parent, Plan};
use crate::reload::{InForce, open_share};
use crate::sandbox::users::NotInside;
use crate::sandbox::{SandboxError, Walls};
use crate::state_hold::{self, StateError};
use crate::systemd::{self, Notify};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
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
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("the worker cannot have {}", .0.part)]
    NotInside(#[from] NotInside),
    #[error("{0}")]
    Worker(String),
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
fn passed_sockets() -> Result<Vec<Entrance>, DaemonError> {
    let sockets = systemd::take()?.into_iter();
    let listeners = sockets.map(|(name, socket)| {
        let door = match name.as_str() {
            "control" => Door::Control,
            "metrics" => Door::Metrics,
            _ => Door::Guests,
        };
        let listener = Listener::passed(socket)?;
        let address = listener.address().clone();
        Ok(Entrance::of(door, ListenConfig { address, ..Default::default() }, listener))
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
fn bind_control(config: &Config) -> Result<Option<Entrance>, DaemonError> {
    let Some(path) = control::path(&config.control) else { return Ok(None) };
    let mode = Some(FileMode(0o600));
    let listen = ListenConfig { address: Address::Unix(path), mode, ..Default::default() };
    match Listener::bind(&listen) {
        Ok(listener) => Ok(Some(Entrance::of(Door::Control, listen, listener))),
        Err(error) if config.control == Default::default() => {
            tracing::warn!(%error, "no control socket");
            Ok(None)
        }
        Err(error) => Err(DaemonError::Control(error)),
    }
}

fn bind_metrics(config: &Config) -> Result<Option<Entrance>, DaemonError> {
    let Some(address) = config.metrics.clone() else { return Ok(None) };
    let listen = ListenConfig { address, mode: Some(FileMode(0o600)), ..Default::default() };
    let listener = Listener::bind(&listen)?;
    Ok(Some(Entrance::of(Door::Metrics, listen, listener)))
}

/// Serves until SIGTERM or SIGINT. `source` is where `config` is from, and is read again on SIGHUP.
///
/// # Errors
/// See [`DaemonError`].
pub fn run(config: Config, source: Source) -> Result<(), DaemonError> {
    let stop = on_signals(&[SIGTERM, SIGINT])?;
    let hangup = on_signals(&[SIGHUP])?;
    let notify = Notify::from_environment();
    set_priorities(&config)?;
    raise_open_files();
    become_root_group()?;
    let limits = Limits::read(Path::new("/"));
    let fds = Fds::of_process(limits.memory, config.nodes_with_fd);
    let mut shares = Vec::new();
    for share in &config.shares {
        let failed = |source| DaemonError::Serve { name: share.name.clone(), source };
        shares.push(open_share(share, &fds).map_err(failed)?);
    }
    let placement = Placement::new(config.cpus.clone(), &limits)?;
    let mut entrances = passed_sockets()?;
    for listen in &config.listen {
        let mut passed = entrances.iter_mut().filter(|one| one.config().address == listen.address);
        match passed.next() {
            Some(passed) => passed.change(listen),
            None => entrances.push(Entrance::open(Door::Guests, listen)?),
        }
    }
    let guests = entrances.iter().filter(|one| one.door() == Door::Guests);
    let addresses: Vec<Address> = guests.map(|one| one.config().address.clone()).collect();
    // What is not kept for a guest that was cut is not kept for another daemon either.
    let state = match config.grace.is_zero() {
        true => None,
        false => state_hold::hold(&config.state_dir, &addresses, config.grace)?,
    };
    let has_control = entrances.iter().any(|one| one.door() == Door::Control);
    entrances.extend(if has_control { None } else { bind_control(&config)? });
    entrances.extend(bind_metrics(&config)?);
    let plan = Plan {
        shares,
        placement,
        limits,
        engine: config.engine,
        spin: config.spin,
        grace: config.grace,
        state,
        walls: Walls::of(config.sandbox, config.subordinate_ids)?,
        file_handles: config.file_handles,
        slow_op: config.slow_op,
        fds: fds.clone(),
    };
    let in_force = InForce::new(source, config, fds);
    let begun_with = Vec::new();
    Parent { entrances, stop, hangup, notify, plan, in_force, begun_with }.run()
}
