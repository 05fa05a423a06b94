//! Sessions: what the connections of one guest share, and the registry that finds them by ticket.
//!
//! Nothing here is touched on the way of a frame but through an `Arc` that the connection holds.

use crate::fs::Fs;
use crate::limits::SESSIONS_MAX;
use ringfs_wire::hello::{Reason, Ticket};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// One guest's mount of one share.
pub struct Session {
    /// Counts up from 1 in this daemon.
    pub id: u64,
    /// What the guest names it by.
    pub ticket: Ticket,
    /// The share's name.
    pub share: String,
    /// The peer, for people.
    pub peer: String,
    /// Stands for the peer where peers are treated alike; see [`crate::accept::Accepted`].
    pub owner: u64,
    /// Since when.
    pub since: Instant,
    /// Executes its requests.
    pub fs: Arc<Fs>,
    /// Lanes granted.
    pub lanes: u16,
    /// Connections granted.
    pub conns: u16,
    /// Slots of each lane.
    pub slots: u16,
    /// Features in force.
    pub features: u64,
    /// Which connections are open, a bit each.
    open: AtomicUsize,
}

impl Session {
    /// Marks a connection as open; false if it was already, or is none of the session's.
    fn attach(&self, conn: u16) -> bool {
        conn < self.conns && self.open.fetch_or(1 << conn, Ordering::AcqRel) & (1 << conn) == 0
    }

    /// The connection ended; true if it was the last one.
    fn detach(&self, conn: u16) -> bool {
        let bit = 1 << conn;
        self.open.fetch_and(!bit, Ordering::AcqRel) == bit
    }
}

/// What a new session is made of.
pub struct Terms {
    /// The share's name.
    pub share: String,
    /// The peer, for people.
    pub peer: String,
    /// Stands for the peer where peers are treated alike; see [`crate::accept::Accepted`].
    pub owner: u64,
    /// Lanes granted.
    pub lanes: u16,
    /// Connections granted.
    pub conns: u16,
    /// Slots of each lane.
    pub slots: u16,
    /// Features in force.
    pub features: u64,
}

/// All sessions of this daemon.
pub struct Registry {
    /// New at each start: tells a guest whether the daemon is the one that it knew.
    pub epoch: u64,
    next_id: AtomicU64,
    sessions: Mutex<HashMap<Ticket, Arc<Session>>>,
}

impl Default for Registry {
    fn default() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Registry {
            epoch: now.as_nanos() as u64,
            next_id: AtomicU64::new(1),
            sessions: Mutex::default(),
        }
    }
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, HashMap<Ticket, Arc<Session>>> {
        self.sessions.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Opens a session.
    pub fn open(&self, terms: Terms, fs: Fs) -> Result<Arc<Session>, Reason> {
        let mut ticket = Ticket::NONE;
        let filled = rustix::rand::getrandom(&mut ticket.0, rustix::rand::GetRandomFlags::empty());
        if filled != Ok(ticket.0.len()) || ticket == Ticket::NONE {
            return Err(Reason::Internal);
        }
        let session = Arc::new(Session {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            ticket,
            share: terms.share,
            peer: terms.peer,
            owner: terms.owner,
            since: Instant::now(),
            fs: Arc::new(fs),
            lanes: terms.lanes,
            conns: terms.conns,
            slots: terms.slots,
            features: terms.features,
            open: AtomicUsize::new(0),
        });
        let mut sessions = self.lock();
        if sessions.len() >= SESSIONS_MAX {
            return Err(Reason::Limit);
        }
        sessions.insert(ticket, session.clone());
        Ok(session)
    }

    /// Whether another session may be opened.
    pub fn has_room(&self) -> bool {
        self.lock().len() < SESSIONS_MAX
    }

    /// The session that a guest names.
    pub fn find(&self, ticket: Ticket) -> Option<Arc<Session>> {
        self.lock().get(&ticket).cloned()
    }

    /// Marks a connection of a session as open; false if it was already, is none of the session's,
    /// or the session has ended meanwhile.
    pub fn attach(&self, session: &Session, conn: u16) -> bool {
        let sessions = self.lock();
        sessions.contains_key(&session.ticket) && session.attach(conn)
    }

    /// A connection ended; with the last one the session ends, until sessions can be resumed.
    pub fn detach(&self, session: &Session, conn: u16) {
        // Under the lock, so that nobody joins a session that is just ending.
        let mut sessions = self.lock();
        if session.detach(conn) {
            let ended = sessions.remove(&session.ticket);
            drop(sessions);
            tracing::info!(session = session.id, share = session.share, "session ended");
            if let Some(ended) = ended {
                // Closing the files of a large session takes long: not on a shard's thread.
                let closing = std::thread::Builder::new().name("ringfs-close".into());
                if closing.spawn(move || drop(ended)).is_err() {
                    tracing::warn!("no thread to close a session's files; closing them here");
                }
            }
        }
    }

    /// Numbers over all sessions: sessions, nodes, handles, fds.
    pub fn totals(&self) -> Vec<(&'static str, u64)> {
        let sessions: Vec<Arc<Session>> = self.lock().values().cloned().collect();
        let counts: Vec<_> = sessions.iter().map(|session| session.fs.counts()).collect();
        vec![
            ("sessions", sessions.len() as u64),
            ("nodes", counts.iter().map(|c| c.nodes as u64).sum()),
            ("nodes_with_fd", counts.iter().map(|c| c.nodes_with_fd as u64).sum()),
            ("handles", counts.iter().map(|c| c.handles as u64).sum()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::FsOptions;

    #[test]
    fn nobody_joins_a_session_that_has_ended() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let registry = Registry::default();
        let terms = Terms {
            share: "share".into(),
            peer: "peer".into(),
            owner: 0,
            lanes: 2,
            conns: 2,
            slots: 1,
            features: 0,
        };
        let fs = Fs::new(dir.path(), FsOptions::default()).expect("a file system");
        let session = registry.open(terms, fs).expect("a session");
        assert!(registry.attach(&session, 1) && !registry.attach(&session, 1));
        assert!(registry.attach(&session, 0) && !registry.attach(&session, 2));
        registry.detach(&session, 1);
        assert!(registry.attach(&session, 1));
        // A greeter has found the session; then its last connection goes.
        let found = registry.find(session.ticket).expect("open");
        registry.detach(&session, 0);
        registry.detach(&session, 1);
        assert!(!registry.attach(&found, 0), "a session that nobody counts");
    }
}
