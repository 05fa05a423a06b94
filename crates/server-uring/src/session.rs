//! A session: what the connections of one guest share, and how far its rebuild is.
//!
//! Nothing here is touched on the way of a frame but through an `Arc` that the connection holds.
//! Invariant: whoever lets go of a session does it by [`let_go`], so that no shard closes its
//! files. Which sessions there are, and how long, is the registry's (registry.rs).

use crate::fs::Fs;
use crate::metrics::ShareMetrics;
use crate::restore::{Restoring, TakeOverError};
use crate::state_dir::{StateFile, StateTerms};
use crate::status::SessionStatus;
use ringfs_wire::hello::Ticket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// One guest's mount of one share.
pub struct Session {
    /// Counts up from 1 in this daemon.
    pub id: u64,
    /// What was agreed on with its guest.
    pub terms: Terms,
    /// What each of its connections has done.
    pub work: Box<[ConnWork]>,
    /// What is counted of its share.
    pub metrics: Arc<ShareMetrics>,
    /// Since when.
    since: Instant,
    /// Executes its requests.
    pub fs: Arc<Fs>,
    /// Another daemon had it, and the guest tells what it was.
    pub rebuild: Option<Rebuild>,
    /// What its guest had in flight may have been done for that guest, and nobody can tell. Not so
    /// for a clone: what its original had in flight is the original's.
    pub is_heir: bool,
    /// Its file in the state directory.
    pub file: Option<Arc<StateFile>>,
}

/// What one connection has done. Written by its shard alone.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct ConnWork {
    /// Requests begun.
    pub begun: AtomicU64,
    /// Requests that are over.
    pub ended: AtomicU64,
}

/// How far a rebuild is.
pub struct Rebuild {
    /// `None`: it was given up, and nothing will ever run on the session.
    restoring: Mutex<Option<Restoring>>,
    complete: AtomicBool,
}

impl Default for Rebuild {
    fn default() -> Rebuild {
        Rebuild { restoring: Mutex::new(Some(Restoring::default())), complete: false.into() }
    }
}

impl Session {
    pub(crate) fn new(
        id: u64,
        terms: Terms,
        fs: Fs,
        metrics: Arc<ShareMetrics>,
        is_heir: bool,
        file: Option<Arc<StateFile>>,
    ) -> Session {
        Session {
            id,
            work: (0..terms.conns).map(|_| ConnWork::default()).collect(),
            metrics,
            since: Instant::now(),
            fs: Arc::new(fs),
            rebuild: terms.rebuilt.then(Rebuild::default),
            is_heir,
            file,
            terms,
        }
    }

    /// What is told of it; of its connections the registry knows.
    pub(crate) fn status(&self) -> SessionStatus {
        let counts = self.fs.counts();
        let (requests, in_flight) = self.work();
        SessionStatus {
            id: self.id,
            share: self.terms.share.clone(),
            subdir: String::from_utf8_lossy(&self.terms.subdir).into_owned(),
            peer: self.terms.peer.clone(),
            age_s: self.since.elapsed().as_secs(),
            lanes: self.terms.lanes,
            requests,
            in_flight,
            nodes: counts.nodes as u64,
            handles: counts.handles as u64,
            ..Default::default()
        }
    }

    /// Whether it goes on with what a daemon before this one left in its file.
    pub(crate) fn is_adopted(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.adopted)
    }

    /// Requests begun, and those of them that are not over.
    fn work(&self) -> (u64, u64) {
        let sum = |pick: fn(&ConnWork) -> &AtomicU64| {
            self.work.iter().map(|work| pick(work).load(Ordering::Relaxed)).sum::<u64>()
        };
        // In this order none is over that has not begun.
        let ended = sum(|work| &work.ended);
        let begun = sum(|work| &work.begun);
        (begun, begun.saturating_sub(ended))
    }

    /// Whether requests may run: all that is to be restored is there.
    pub fn is_ready(&self) -> bool {
        self.rebuild.as_ref().is_none_or(|rebuild| rebuild.complete.load(Ordering::Acquire))
    }

    /// Takes the body of a RESTORE; `true` with the last one.
    ///
    /// # Errors
    /// See [`TakeOverError`]; the session is of no use then.
    pub fn restore(&self, body: &[u8]) -> Result<bool, TakeOverError> {
        let Some(rebuild) = &self.rebuild else { return Err(TakeOverError::Uncalled) };
        let mut restoring = rebuild.restoring.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(restoring) = &mut *restoring else { return Err(TakeOverError::GivenUp) };
        let complete = restoring.record(&self.fs, body)?;
        rebuild.complete.store(complete, Ordering::Release);
        Ok(complete)
    }

    /// Where not all is restored, nothing will be: the guest tells it anew, to another session, and
    /// what is in the file is that one's. False where requests may run already.
    pub fn give_up(&self) -> bool {
        let Some(rebuild) = &self.rebuild else { return false };
        let mut restoring = rebuild.restoring.lock().unwrap_or_else(PoisonError::into_inner);
        if rebuild.complete.load(Ordering::Acquire) {
            return false;
        }
        *restoring = None;
        true
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // A guest says how many: each by itself is no line of the log.
        let lost = self.fs.handles.lost();
        if lost > 0 {
            tracing::info!(session = self.id, lost, "open files of another daemon were lost");
        }
    }
}

/// What a guest and this daemon have agreed on for a session.
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
    /// The guest tells what its session was, which another daemon had.
    pub rebuilt: bool,
    /// The daemon that the guest has had its ticket from.
    pub epoch: u64,
    /// The directory below the share that the guest has.
    pub subdir: Vec<u8>,
    /// By which the guest came, where this daemon has not given it.
    pub presented: Option<Ticket>,
}

impl Terms {
    pub(crate) fn of_file(&self) -> StateTerms {
        StateTerms {
            share: self.share.clone(),
            subdir: self.subdir.clone(),
            lanes: self.lanes,
            slots: self.slots,
            conns: self.conns,
        }
    }
}

/// Lets go of a session. The last one closes its files, which takes long: not on this thread.
pub fn let_go(session: Arc<Session>) {
    let Some(session) = Arc::into_inner(session) else { return };
    let closing = std::thread::Builder::new().name("ringfs-close".into());
    if closing.spawn(move || drop(session)).is_err() {
        tracing::warn!("no thread to close a session's files; closing them here");
    }
}
