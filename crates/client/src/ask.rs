//! `ringfs reconnect` and `ringfs wait`: what orchestrators ask of the clients of mounts.
//!
//! Invariant: a mount point is never touched; mounts are found in the mount table, and their
//! clients by their sockets. Whoever asks learns the truth by the exit code.

use crate::status::{self, Ask};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a client may take to answer: one that has just been restored with its whole machine
/// has more to do.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Why it was not done.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum AskError {
    #[error("cannot read the mount table")]
    Mounts(#[source] io::Error),
    #[error("no ringfs mount at {0}; `ringfs status` shows those that there are")]
    NoMount(PathBuf),
    #[error("no client answers for {0}: dead, stuck, or another user's")]
    NoClient(PathBuf),
    #[error("the client of {0} gives no answer; did the mount end?")]
    NoAnswer(PathBuf, #[source] io::Error),
    #[error("{0} has no connection after {1} s; `ringfs status` says why, and it goes on trying")]
    TimedOut(PathBuf, u64),
}

impl AskError {
    /// Whether waiting longer might have helped.
    pub fn is_timeout(&self) -> bool {
        matches!(self, AskError::TimedOut(..))
    }
}

/// Does `act` with each mount that is meant, that one or all, as soon as its client has answered:
/// none waits for another one's that is stuck. How many there are, or the first error.
fn each(
    at: Option<&Path>,
    mut act: impl FnMut(&Path, &Path) -> Result<(), AskError>,
) -> Result<usize, AskError> {
    let mut entries = status::mounts().map_err(AskError::Mounts)?;
    if let Some(path) = at {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        entries.retain(|entry| entry.mountpoint == path);
        if entries.is_empty() {
            return Err(AskError::NoMount(path));
        }
    }
    let mut done = Ok(());
    status::each_client(&status::dirs(), &mut entries, ANSWER_LIMIT, |entry| {
        if let Some(socket) = &entry.socket {
            let acted = act(&entry.mountpoint, socket);
            done = std::mem::replace(&mut done, Ok(())).and(acted);
        }
    });
    let stuck = entries.iter().find(|entry| entry.socket.is_none());
    match stuck {
        Some(entry) => done.and(Err(AskError::NoClient(entry.mountpoint.clone()))),
        None => done.map(|()| entries.len()),
    }
}

/// Has connections dropped and joined anew; how many mounts were asked.
pub fn reconnect(at: Option<&Path>) -> Result<usize, AskError> {
    each(at, |mountpoint, socket| {
        let asked = status::ask(socket, Ask::Reconnect, Some(ANSWER_LIMIT));
        asked.map(drop).map_err(|error| AskError::NoAnswer(mountpoint.to_owned(), error))
    })
}

/// Waits until all lanes have their connections; how many mounts were asked.
pub fn wait_resumed(at: Option<&Path>, limit: Option<Duration>) -> Result<usize, AskError> {
    let deadline = limit.map(|limit| Instant::now() + limit);
    let mut mounts = Vec::new();
    each(at, |mountpoint, socket| {
        mounts.push((mountpoint.to_owned(), socket.to_owned()));
        Ok(())
    })?;
    for (mountpoint, socket) in &mounts {
        // At least a moment: to ask without waiting is to ask as well.
        let left = deadline
            .map(|at| at.saturating_duration_since(Instant::now()).max(Duration::from_millis(100)));
        match status::ask(socket, Ask::WaitResumed, left) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let seconds = limit.unwrap_or_default().as_secs();
                return Err(AskError::TimedOut(mountpoint.clone(), seconds));
            }
            Err(error) => return Err(AskError::NoAnswer(mountpoint.clone(), error)),
        }
    }
    Ok(mounts.len())
}
