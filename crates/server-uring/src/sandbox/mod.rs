//! What a worker may still do once it serves: less than its guests could use.
//!
//! The layers stand on their own, so that each stops what another one lets through, and each is a
//! file here: a root that holds the shares alone (root.rs), few capabilities (caps.rs), few system
//! calls (filter.rs), files of the shares alone (landlock.rs). What each of them stops is tried in
//! tests/sandbox.rs.
//!
//! Invariant: all of it is done by the worker's first thread before there is another one; threads
//! inherit it, and nothing takes it back.

pub mod caps;
pub mod filter;
pub mod landlock;
pub mod root;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::os::fd::BorrowedFd;
use std::path::Path;
use thiserror::Error;

/// How much of it, as `--sandbox` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sandbox {
    /// All layers, in namespaces of its own.
    #[default]
    Namespace,
    /// None: the worker has the rights of the daemon.
    None,
}

/// Why a worker is not sandboxed. It must not serve then.
#[derive(Debug, Error)]
#[error("cannot set the sandbox up ({step}); --sandbox=none does without")]
pub struct SandboxError {
    step: &'static str,
    source: std::io::Error,
}

impl SandboxError {
    fn of(step: &'static str) -> impl Fn(std::io::Error) -> SandboxError {
        move |source| SandboxError { step, source }
    }

    fn errno(step: &'static str) -> impl Fn(Errno) -> SandboxError {
        move |errno| SandboxError { step, source: errno.into() }
    }
}

/// What a worker goes on to need.
#[derive(Debug)]
pub struct Needs<'a> {
    /// Detached trees of mounts: `shares/0` and so on, below the new root.
    pub shares: &'a [BorrowedFd<'a>],
    /// The state directory.
    pub state: Option<BorrowedFd<'a>>,
    /// A share where guests may make device nodes.
    pub device_nodes: bool,
    /// Files that have moved are found again by their handles.
    pub file_handles: bool,
}

/// Lays on all layers but the last word of the filter, [`filter::seal`]; in the namespaces that the
/// worker was made in.
///
/// # Errors
/// [`SandboxError`].
pub fn enter(needs: &Needs<'_>) -> Result<(), SandboxError> {
    root::build(needs.shares).map_err(SandboxError::errno("a root of its own"))?;
    caps::cut(needs.device_nodes, needs.file_handles)
        .map_err(SandboxError::errno("capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(SandboxError::errno("no_new_privs"))?;
    landlock::restrict(Path::new(root::SHARES), needs.state)
        .map_err(SandboxError::of("landlock"))?;
    filter::install().map_err(SandboxError::of("seccomp"))
}

/// The last word, when all threads run.
///
/// # Errors
/// [`SandboxError`].
pub fn seal() -> Result<(), SandboxError> {
    filter::seal().map_err(SandboxError::of("seccomp for all threads"))
}
