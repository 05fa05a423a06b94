//! `ringfs mount`, `ringfs umount`: what is asked, what can go wrong, and the life of a mount from
//! its beginning ([`begin`]) to its end ([`Life`]).
//!
//! Invariant: nothing is mounted before the daemon has granted the share, and nothing stays mounted
//! when this returns or fails.

use crate::begin;
use crate::handshake::HandshakeError;
use crate::life::Life;
use crate::options::Options;
use crate::service::Service;
use crate::session::End;
use crate::status::Facts;
use crate::takeover::TakeoverError;
use crate::transport::{Address, ConnectError, Target};
use fuser_fork::mount::{MountError, unmount_path};
use rustix::io::Errno;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

/// How long INIT and the first GETATTR may take together.
pub const READY_LIMIT: Duration = Duration::from_secs(10);

/// What is to be mounted, where and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// The share.
    pub target: Target,
    /// The mount point, absolute.
    pub mountpoint: PathBuf,
    /// From `-o`.
    pub options: Options,
    /// The lists that those were read from.
    pub lists: Vec<String>,
}

/// Why a mount did not come about, or ended badly.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Failure {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("no session with the daemon at {address}")]
    Handshake { address: Address, source: HandshakeError },
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("cannot {what}")]
    System { what: &'static str, source: io::Error },
    #[error("the daemon did not answer {what} within {} s: is it stuck?", READY_LIMIT.as_secs())]
    Silent { what: &'static str },
    #[error("the mount's root cannot be read: {0}")]
    Root(Errno),
    #[error("cannot take the mount over")]
    TakeOver(#[from] TakeoverError),
    #[error("interrupted by a signal before the mount was ready")]
    Interrupted,
    #[error("the mount ended before it was ready")]
    Early(#[source] Arc<End>),
    #[error(transparent)]
    Over(Arc<End>),
    #[error("the FUSE connection was aborted from outside; the mount is removed")]
    AbortedOutside,
}

impl Failure {
    /// Whether the mount had been ready.
    pub fn is_late(&self) -> bool {
        matches!(self, Failure::Over(_) | Failure::TakeOver(_) | Failure::AbortedOutside)
    }
}

/// A system call's.
pub fn system(what: &'static str) -> impl Fn(io::Error) -> Failure {
    move |source| Failure::System { what, source }
}

/// Mounts, or takes a mount over, calls `on_ready` once the mount answers, serves until it is
/// unmounted.
pub fn run(
    request: &Request,
    service: Service,
    on_ready: impl FnOnce(&Facts) -> io::Result<()>,
) -> Result<(), Failure> {
    // `ps` is to tell what it is.
    let _ = rustix::thread::set_name(c"ringfs");
    fuser_fork::return_large_memory();
    let is_takeover = service.is_takeover;
    let mut life = Life::of(match is_takeover {
        true => begin::take_over(request, service)?,
        false => begin::start(request, service)?,
    });
    let ready = match is_takeover {
        true => life.go_on(),
        false => life.become_ready(),
    };
    let started = ready
        .and_then(|()| life.tell_keeper())
        .and_then(|()| on_ready(&life.facts).map_err(system("tell that the mount is ready")));
    let outcome = match started {
        Ok(()) => life.wait_for_end(),
        Err(failure) => Err(failure),
    };
    life.finish(outcome)
}

/// `ringfs umount`: never touches the path of a mount that may be dead.
pub fn unmount(path: &Path, lazy: bool) -> Result<(), MountError> {
    unmount_path(path, lazy)
}
