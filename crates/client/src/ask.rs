//! `ringfs reconnect` and `ringfs wait`: what orchestrators ask of the clients of mounts.
//!
//! Invariant: a mount point is never touched; mounts are found in the mount table, and their
//! clients by their sockets. Whoever asks learns the truth by the exit code.

use crate::status::{self, Ask, Entry};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a client may take to say that it reconnects.
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

/// The mounts that are meant: that one, or all.
fn mounts(at: Option<&Path>) -> Result<Vec<(PathBuf, PathBuf)>, AskError> {
    let entries = status::collect(&status::dirs()).map_err(AskError::Mounts)?;
    let absolute = at.map(|path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned()));
    let meant = |entry: &Entry| absolute.as_ref().is_none_or(|path| entry.mountpoint == *path);
    let found: Vec<Entry> = entries.into_iter().filter(meant).collect();
    if let (Some(path), true) = (absolute, found.is_empty()) {
        return Err(AskError::NoMount(path));
    }
    let with_socket = |entry: Entry| match entry.socket {
        Some(socket) => Ok((entry.mountpoint, socket)),
        None => Err(AskError::NoClient(entry.mountpoint)),
    };
    found.into_iter().map(with_socket).collect()
}

/// Has connections dropped and joined anew; how many mounts were asked.
pub fn reconnect(at: Option<&Path>) -> Result<usize, AskError> {
    let mounts = mounts(at)?;
    for (mountpoint, socket) in &mounts {
        let asked = status::ask(socket, Ask::Reconnect, Some(ANSWER_LIMIT));
        asked.map_err(|error| AskError::NoAnswer(mountpoint.clone(), error))?;
    }
    Ok(mounts.len())
}

/// Waits until all lanes have their connections; how many mounts were asked.
pub fn wait_resumed(at: Option<&Path>, limit: Option<Duration>) -> Result<usize, AskError> {
    let deadline = limit.map(|limit| Instant::now() + limit);
    let mounts = mounts(at)?;
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
