//! The worker's first thread: it shuts itself in, starts the others, and does what its parent says.

use crate::accept::Accepted;
use crate::channel::{Channel, Part, ToParent, ToWorker};
use crate::config::ShareConfig;
use crate::daemon::DaemonError;
use crate::fds::Fds;
use crate::fork::with_causes;
use crate::parent::Plan;
use crate::reload::Shared;
use crate::sandbox::users::{Ids, NotInside};
use crate::sandbox::{self, Needs, Offered, Walls};
use crate::share::ShareRoot;
use crate::shares::Share;
use crate::state_dir::StateDir;
use crate::state_hold::Held;
use crate::status::ConfigState;
use crate::worker::Worker;
use rustix::fs::Mode;
use rustix::io::Errno;
use std::os::fd::AsFd;
use std::sync::Arc;

/// What a share is served from, or why it cannot be.
pub type Root = Result<ShareRoot, String>;

/// Serves what the parent hands over, until it says stop. The daemon's first worker has all that it
/// was told or fails; a later one goes on without what it cannot have, or guests of a share would
/// lose theirs because of another one.
///
/// # Errors
/// The worker cannot start.
pub fn work(
    plan: &Plan,
    roots: &[Root],
    config: ConfigState,
    is_first: bool,
    channel: &Channel,
) -> Result<(), DaemonError> {
    // What guests make has the mode that they say: their umask is applied already.
    rustix::process::umask(Mode::empty());
    let Offer { shares, lacks, state } = shut_in(plan, roots, is_first)?;
    let state = state.map(|held| StateDir::on(held, plan.grace)).transpose()?;
    let Plan { engine, spin, grace, .. } = *plan;
    let worker = Worker::start(shares, plan.placement.clone(), engine, spin, grace, state)?;
    worker.set_config(config);
    worker.set_slow(plan.slow_op);
    for (part, why) in lacks {
        if let Part::Share(name) = &part {
            worker.set_away(name);
        }
        channel.send(&ToParent::Lacks(part, why), None)?;
    }
    if plan.walls != Walls::None {
        sandbox::seal()?;
    }
    channel.send(&ToParent::Ready, None)?;
    loop {
        let Some((message, fd)) = channel.receive()? else {
            // Killed: as if we had been, too.
            std::process::exit(1)
        };
        match (message, fd) {
            (ToWorker::Guest { peer, owner, offers }, Some(socket)) => {
                worker.greet(Accepted { socket, peer, owner, offers });
            }
            (ToWorker::Control, Some(asker)) => worker.control(asker),
            (ToWorker::Metrics, Some(asker)) => worker.metrics(asker),
            (ToWorker::Slow(from), _) => worker.set_slow(from),
            (ToWorker::Share { name, config, index, hidden }, fd) => {
                let fd = match index {
                    Some(index) => sandbox::root::open_share(index).map_err(std::io::Error::from),
                    None => fd.ok_or_else(|| std::io::ErrorKind::InvalidInput.into()),
                };
                let config = ShareConfig { name, ..config };
                match fd {
                    Ok(fd) => {
                        let root = ShareRoot::at(fd, hidden);
                        worker.put_share(share_of(&config, root, &plan.fds));
                    }
                    Err(error) => tracing::error!(share = config.name, %error, "cannot open it"),
                }
            }
            (ToWorker::ShareGone { name, ends_sessions }, _) => {
                worker.remove_share(&name, ends_sessions);
            }
            (ToWorker::Config(state), _) => worker.set_config(state),
            (ToWorker::Stop, _) => break,
            (message, _) => tracing::warn!(?message, "the parent says what cannot be"),
        }
    }
    let totals = worker.counters().totals();
    worker.stop();
    tracing::info!("stopped; {}", totals.to_json().trim_end());
    Ok(())
}

/// What it serves.
struct Offer {
    shares: Vec<Share>,
    /// What it was to have, and cannot; and why.
    lacks: Vec<(Part, String)>,
    state: Option<Held>,
}

/// Takes from this process what it will not need; the shares as they are then.
fn shut_in(plan: &Plan, roots: &[Root], is_first: bool) -> Result<Offer, DaemonError> {
    let mut lacks = Vec::new();
    let own;
    let (roots, state) = match plan.walls {
        Walls::OwnUsers(ids) => {
            own = copies_in_own_users(plan, ids, is_first)?;
            (&own[..], state_in_own_users(plan, ids, is_first, &mut lacks)?)
        }
        Walls::Namespaces | Walls::Landlock | Walls::None => {
            (roots, plan.state.as_ref().map(Held::lend).transpose()?)
        }
    };
    let mut had = Vec::new();
    for (share, root) in plan.shares.iter().zip(roots) {
        match root {
            Ok(root) => had.push((share, root)),
            Err(why) => lacks.push((Part::Share(share.config.name.clone()), why.clone())),
        }
    }
    let offered = had.iter();
    let offered: Vec<_> = offered
        .map(|(share, root)| Offered { dir: root.as_fd(), read_only: share.config.ro })
        .collect();
    let state_dir = state.as_ref().map(AsFd::as_fd);
    let device_nodes = plan.shares.iter().any(|share| share.config.dev);
    let (walls, file_handles) = (plan.walls, plan.file_handles);
    let needs = Needs { walls, shares: &offered, state: state_dir, device_nodes, file_handles };
    sandbox::enter(&needs)?;
    let shares = had.iter().enumerate().map(|(index, (share, root))| {
        let root = match plan.walls.has_root() {
            true => ShareRoot::at(sandbox::root::open_share(index)?, root.hidden()),
            false => root.try_clone()?,
        };
        Ok(share_of(&share.config, root, &plan.fds))
    });
    let shares: Result<_, DaemonError> = shares.collect();
    Ok(Offer { shares: shares?, lacks, state })
}

/// The parent has no right to make them.
fn copies_in_own_users(plan: &Plan, ids: Ids, is_first: bool) -> Result<Vec<Root>, NotInside> {
    let copies = plan.shares.iter().map(|Shared { config, dir }| {
        let failed = |errno: Errno| {
            NotInside::of(Part::Share(config.name.clone()), dir.path(), ids, errno.into())
        };
        match dir.copy_in_own_users().map_err(failed) {
            Err(error) if !is_first => Ok(Err(with_causes(&error))),
            other => other.map(Ok),
        }
    });
    copies.collect()
}

/// A default one that cannot be had is no reason not to start.
fn state_in_own_users(
    plan: &Plan,
    ids: Ids,
    is_first: bool,
    lacks: &mut Vec<(Part, String)>,
) -> Result<Option<Held>, NotInside> {
    let Some(held) = &plan.state else { return Ok(None) };
    let failed = |errno: Errno| NotInside::of(Part::StateDir, held.path(), ids, errno.into());
    match held.copy_in_own_users().map_err(failed) {
        Err(error) if !(is_first && held.was_asked_for()) => {
            lacks.push((Part::StateDir, with_causes(&error)));
            Ok(None)
        }
        other => other.map(Some),
    }
}

fn share_of(config: &ShareConfig, root: ShareRoot, fds: &Arc<Fds>) -> Share {
    let options = config.options(fds);
    let (name, dir) = (config.name.clone(), config.path.clone());
    Share { name, dir, root, options, opening: 0.into() }
}
