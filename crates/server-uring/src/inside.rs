//! The worker's first thread: it shuts itself in, starts the others, and does what its parent says.

use crate::accept::Accepted;
use crate::channel::{Channel, ToParent, ToWorker};
use crate::config::ShareConfig;
use crate::daemon::DaemonError;
use crate::fds::Fds;
use crate::fs::FsError;
use crate::greet::Share;
use crate::parent::Plan;
use crate::sandbox::{self, Needs, Offered, Walls};
use crate::share::ShareRoot;
use crate::state_dir::StateDir;
use crate::state_hold::Held;
use crate::status::ConfigState;
use crate::worker::Worker;
use std::os::fd::AsFd;
use std::sync::Arc;

/// Serves what the parent hands over, until it says stop.
///
/// # Errors
/// The worker cannot start.
pub fn work(
    plan: &Plan,
    roots: &[ShareRoot],
    config: ConfigState,
    channel: &Channel,
) -> Result<(), DaemonError> {
    let (shares, state) = shut_in(plan, roots)?;
    let state = state.map(|held| StateDir::on(held, plan.grace)).transpose()?;
    let Plan { engine, spin, grace, .. } = *plan;
    let worker = Worker::start(shares, plan.placement.clone(), engine, spin, grace, state)?;
    worker.set_config(config);
    worker.set_slow(plan.slow_op);
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

/// Takes from this process what it will not need; the shares as they are then.
fn shut_in(plan: &Plan, roots: &[ShareRoot]) -> Result<(Vec<Share>, Option<Held>), DaemonError> {
    let own;
    let (roots, held) = match plan.walls {
        Walls::OwnUsers(_) => {
            own = copies_in_own_users(plan)?;
            (&own[..], plan.state.as_ref().and_then(state_in_own_users))
        }
        Walls::Namespaces | Walls::Landlock | Walls::None => {
            (roots, plan.state.as_ref().map(Held::lend).transpose()?)
        }
    };
    let shares = plan.shares.iter().zip(roots);
    let shares: Vec<_> = shares
        .map(|(share, root)| Offered { dir: root.as_fd(), read_only: share.config.ro })
        .collect();
    let state = held.as_ref().map(AsFd::as_fd);
    let device_nodes = plan.shares.iter().any(|share| share.config.dev);
    let (walls, file_handles) = (plan.walls, plan.file_handles);
    sandbox::enter(&Needs { walls, shares: &shares, state, device_nodes, file_handles })?;
    let shares = plan.shares.iter().zip(roots).enumerate().map(|(index, (share, root))| {
        let root = match plan.walls.has_root() {
            true => ShareRoot::at(sandbox::root::open_share(index)?, root.hidden()),
            false => root.try_clone()?,
        };
        Ok(share_of(&share.config, root, &plan.fds))
    });
    let shares: Result<_, DaemonError> = shares.collect();
    Ok((shares?, held))
}

/// A directory that somebody has moved since is no reason not to serve.
fn state_in_own_users(held: &Held) -> Option<Held> {
    match held.copy_in_own_users() {
        Ok(copy) => Some(copy),
        Err(error) => {
            let why = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, why, "no state directory for this worker");
            None
        }
    }
}

/// The parent has no right to make them.
fn copies_in_own_users(plan: &Plan) -> Result<Vec<ShareRoot>, DaemonError> {
    let copies = plan.shares.iter().map(|share| {
        let failed = |source| DaemonError::Serve {
            name: share.config.name.clone(),
            source: FsError::Root(source),
        };
        share.dir.copy_in_own_users().map_err(failed)
    });
    copies.collect()
}

fn share_of(config: &ShareConfig, root: ShareRoot, fds: &Arc<Fds>) -> Share {
    let options = config.options(fds);
    let (name, dir) = (config.name.clone(), config.path.clone());
    Share { name, dir, root, options, opening: 0.into() }
}
