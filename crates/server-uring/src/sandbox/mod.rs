//! What a worker may still do once it serves: less than its guests could use.
//!
//! The layers stand on their own, so that each stops what another one lets through, and each is a
//! file here: a root that holds the shares alone (root.rs), few capabilities (caps.rs), few system
//! calls (filter.rs), files of the shares alone (landlock.rs). A daemon without rights makes its
//! namespaces in one of users (users.rs). What each of them stops is tried in tests/sandbox.
//!
//! Invariant: all of it is done by the worker's first thread before there is another one; threads
//! inherit it, and nothing takes it back.

pub mod caps;
pub mod filter;
pub mod landlock;
pub mod root;
pub mod users;

use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};
use std::os::fd::BorrowedFd;
use std::path::Path;
use thiserror::Error;
use users::{Ids, Lent};

/// How much of it, as `--sandbox` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sandbox {
    /// All layers, in namespaces of its own.
    #[default]
    Namespace,
    /// All but the namespaces: landlock alone keeps it from the host's files.
    Landlock,
    /// None: the worker has the rights of the daemon.
    None,
}

/// What a worker is shut in by: what was asked for, as the daemon's rights can give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walls {
    /// Namespaces and all other layers; it takes CAP_SYS_ADMIN.
    Namespaces,
    /// The same in a user namespace of its own, which takes no right.
    OwnUsers(Ids),
    /// All layers but namespaces.
    Landlock,
    /// None.
    None,
}

impl Walls {
    /// What this process can make; `lent`: with the ids that are lent to its user.
    ///
    /// # Errors
    /// [`SandboxError`]: root without CAP_SYS_ADMIN. In a user namespace with root alone it could
    /// not serve what other users have. Or there are no such ids.
    pub fn of(asked: Sandbox, lent: bool) -> Result<Walls, SandboxError> {
        let can_mount = rustix::thread::capabilities(None)
            .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
        match asked {
            Sandbox::Namespace if !can_mount && !rustix::process::geteuid().is_root() => {
                if !lent {
                    return Ok(Walls::OwnUsers(Ids::Own));
                }
                let lent = Lent::to_us().map_err(|source| SandboxError {
                    step: "subordinate ids",
                    cure: "usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER"
                        .into(),
                    source,
                })?;
                Ok(Walls::OwnUsers(Ids::Lent(lent)))
            }
            _ if lent => Err(SandboxError {
                step: "subordinate ids",
                cure: "they are for a user without rights, with --sandbox=namespace".into(),
                source: Errno::INVAL.into(),
            }),
            Sandbox::None => Ok(Walls::None),
            Sandbox::Landlock => Ok(Walls::Landlock),
            Sandbox::Namespace if can_mount => Ok(Walls::Namespaces),
            Sandbox::Namespace => Err(SandboxError {
                step: "namespaces",
                cure: "root needs CAP_SYS_ADMIN for them; --sandbox=landlock does without".into(),
                source: Errno::PERM.into(),
            }),
        }
    }

    /// Who there is in the worker's user namespace, if it has one.
    pub fn ids(self) -> Option<Ids> {
        match self {
            Walls::OwnUsers(ids) => Some(ids),
            Walls::Namespaces | Walls::Landlock | Walls::None => None,
        }
    }

    /// Whether the worker has a root of its own, with the shares in it.
    pub fn has_root(self) -> bool {
        match self {
            Walls::Namespaces | Walls::OwnUsers(_) => true,
            Walls::Landlock | Walls::None => false,
        }
    }
}

/// Why a worker is not sandboxed. It must not serve then.
#[derive(Debug, Error)]
#[error("cannot set the sandbox up ({step}): {cure}")]
pub struct SandboxError {
    step: &'static str,
    cure: String,
    source: std::io::Error,
}

impl SandboxError {
    fn of(step: &'static str) -> impl Fn(std::io::Error) -> SandboxError {
        let cure = "--sandbox=none does without";
        move |source| SandboxError { step, cure: cure.into(), source }
    }

    fn errno(step: &'static str) -> impl Fn(Errno) -> SandboxError {
        move |errno| SandboxError::of(step)(errno.into())
    }
}

/// A share's directory, and what a worker may do there.
#[derive(Clone, Copy, Debug)]
pub struct Offered<'a> {
    /// A detached tree of mounts: `shares/0` and so on, below the new root; without one the
    /// directory itself.
    pub dir: BorrowedFd<'a>,
    /// Nothing in it is to be changed.
    pub read_only: bool,
}

/// What a worker goes on to need.
#[derive(Debug)]
pub struct Needs<'a> {
    /// What it is shut in by.
    pub walls: Walls,
    /// What it serves.
    pub shares: &'a [Offered<'a>],
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
    let Needs { walls, shares, state, device_nodes, file_handles } = *needs;
    if walls == Walls::None {
        return Ok(());
    }
    if walls.has_root() {
        let trees: Vec<_> = shares.iter().map(|share| share.dir).collect();
        root::build(&trees).map_err(|errno| SandboxError {
            cure: match walls {
                Walls::OwnUsers(_) => users::why_not().into(),
                _ => "--sandbox=landlock does without".into(),
            },
            ..SandboxError::errno("a root of its own")(errno)
        })?;
    }
    let kept = match walls {
        Walls::OwnUsers(Ids::Own) => CapabilitySet::empty(),
        Walls::OwnUsers(Ids::Lent(_)) => caps::kept(false, false),
        _ => caps::kept(device_nodes, file_handles),
    };
    caps::cut(kept).map_err(SandboxError::errno("capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(SandboxError::errno("no_new_privs"))?;
    let landlock = match walls.has_root() {
        true => landlock::restrict(Path::new(root::SHARES), state),
        false => landlock::restrict_to(shares, state),
    };
    landlock.map_err(SandboxError::of("landlock"))?;
    // In a root of its own the mounts see to that, and the next share may be another.
    let looks_only = !walls.has_root() && shares.iter().all(|share| share.read_only);
    filter::install(looks_only).map_err(SandboxError::of("seccomp"))
}

/// The last word, when all threads run.
///
/// # Errors
/// [`SandboxError`].
pub fn seal() -> Result<(), SandboxError> {
    filter::seal().map_err(SandboxError::of("seccomp for all threads"))
}
