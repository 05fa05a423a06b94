//! The registry: the sessions of this daemon, which connections each has, and who is reaped.
//!
//! A session lives until it is ended: by its guest, by a violation of the protocol, or because all
//! its connections were cut for longer than the grace time. Invariant: whoever takes a session out
//! tells the shards of all its connections, once the lock is free. Nothing here is touched on the
//! way of a frame. By which ticket a session is found: tickets.rs.

use crate::fs::{Fs, FsCounts};
use crate::limits::*;
use crate::mailbox::{Mail, Mailbox, News};
use crate::metrics::Metrics;
use crate::session::{Session, Terms, let_go};
use crate::state_dir::{StateDir, StateFile, StateTerms};
use crate::status::SessionStatus;
use crate::tickets::{self, Held, Tickets};
use ringfs_wire::hello::{Reason, Ticket};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A session that has not ended.
struct Live {
    session: Arc<Session>,
    tickets: Held,
    /// The last HELLO that was welcomed.
    nth: u32,
    here: Here,
}

/// By what a guest's HELLO names its session.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    /// The newest that it has.
    pub ticket: Ticket,
    /// Which of its HELLOs it is; 0: it does not count them.
    pub nth: u32,
}

/// What there is of a session's connections, a bit each.
#[derive(Clone, Copy, Default)]
struct Here {
    /// Those that a shard has a table of.
    known: u32,
    /// Those of them that have a socket.
    joined: u32,
    /// Since when none has.
    cut: Option<Instant>,
    /// One that was cut had brought a request: there is something to keep.
    used: bool,
}

/// A session that was taken out, whose connections have yet to hear of it.
struct Ended {
    session: Arc<Session>,
    known: u32,
    reason: Reason,
}

#[derive(Default)]
struct Sessions {
    live: HashMap<u64, Live>,
    tickets: Tickets,
    stopped: bool,
}

/// Of the first session's number, so that people can read it.
const FIRST_ID_BITS: u32 = 24;

/// All sessions of this daemon.
pub struct Registry {
    /// New at each start: tells a guest whether the daemon is the one that it knew.
    pub epoch: u64,
    /// How long a session without connections is kept.
    pub grace: Duration,
    /// What is counted of the shares.
    pub metrics: Metrics,
    /// Where what outlives this daemon is.
    state: Option<StateDir>,
    next_id: AtomicU64,
    sessions: Mutex<Sessions>,
    /// A session lost its last connection, or the daemon stops.
    changed: Condvar,
    /// Of the shards, in their order.
    shards: OnceLock<Vec<Arc<Mailbox>>>,
}

impl Registry {
    /// Without sessions. Without `grace` that time is over as soon as a session's last connection
    /// is cut.
    pub fn new(grace: Duration, state: Option<StateDir>) -> Registry {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Registry {
            epoch: now.as_nanos() as u64,
            grace,
            metrics: Metrics::default(),
            state,
            next_id: AtomicU64::new(first_id()),
            sessions: Mutex::default(),
            changed: Condvar::new(),
            shards: OnceLock::new(),
        }
    }

    /// Where the connections of sessions are; said once, before the first session.
    pub fn set_shards(&self, shards: Vec<Arc<Mailbox>>) {
        let known = self.shards.set(shards);
        debug_assert!(known.is_ok(), "the shards were told twice");
    }

    /// The shard of a session's connection.
    pub fn shard(&self, session: &Session, conn: u16) -> Option<&Arc<Mailbox>> {
        let shards = self.shards.get()?;
        shards.get((session.id as usize).wrapping_add(usize::from(conn)) % shards.len().max(1))
    }

    /// Tells the shards of those of a session's connections, a bit each.
    fn tell(&self, session: &Session, conns: u32, news: News) {
        for conn in (0..session.terms.conns).filter(|conn| conns & 1 << conn != 0) {
            if let Some(shard) = self.shard(session, conn) {
                shard.post(Mail::Of { session: session.id, conn, news });
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a session, and gives its first ticket. Where there are too many, the one that was cut
    /// longest ago makes room. Of two openings by one ticket (a guest whose HELLO was cut off has
    /// come again) the second gets the first one's session: there is one table of what ran.
    pub fn open(&self, terms: Terms, fs: Fs) -> Result<(Arc<Session>, Ticket), Reason> {
        let fresh = tickets::fresh().ok_or(Reason::Internal)?;
        let shards = self.shards.get().map_or(1, Vec::len);
        let metrics = self.metrics.of(&terms.share, shards);
        let of_file = terms.of_file();
        let mut sessions = self.lock();
        let before = terms.presented.and_then(|ticket| sessions.tickets.gone(ticket));
        if before.is_some_and(|before| before.strong_count() > 0) {
            // Nobody can tell yet what it will have done.
            return Err(Reason::Timeout);
        }
        // This daemon knows its own sessions: who has an older ticket is a clone.
        let is_own = terms.epoch == self.epoch;
        let is_heir = terms.rebuilt && terms.presented.is_some() && (!is_own || before.is_some());
        if let Some(ticket) = terms.presented
            && let Some(session) = sessions.find(ticket)
        {
            // The share that was asked for is one that the listener offers; that one's may not be.
            let its = &session.terms;
            return match its.share == terms.share && its.subdir == terms.subdir {
                true => Ok((session, ticket)),
                false => Err(Reason::UnknownSession),
            };
        }
        let left = terms.presented.zip(self.state.as_ref());
        let left = left.and_then(|(ticket, state)| Some((state.adopt(ticket, &of_file)?, ticket)));
        let (file, ticket) = match left {
            Some((file, ticket)) => (Some(file), ticket),
            None => {
                drop(sessions);
                let file = self.create_file(&of_file, fresh, terms.rebuilt);
                sessions = self.lock();
                (file, fresh)
            }
        };
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let session = Arc::new(Session::new(id, terms, fs, metrics, is_heir, file));
        let ended = match sessions.makes_room(session.terms.owner) {
            Ok(oldest) => oldest.and_then(|id| self.take_out(&mut sessions, id, Reason::Limit)),
            Err(reason) => {
                self.end_file(&session, reason);
                return Err(reason);
            }
        };
        let tickets = sessions.tickets.add(id, ticket);
        let live = Live { session: session.clone(), tickets, nth: 0, here: Here::default() };
        sessions.live.insert(id, live);
        drop(sessions);
        self.bury(ended);
        Ok((session, ticket))
    }

    fn create_file(
        &self,
        of: &StateTerms,
        ticket: Ticket,
        rebuilt: bool,
    ) -> Option<Arc<StateFile>> {
        let created = self.state.as_ref()?.create(of, ticket, rebuilt);
        let without = "what a session has in flight dies with this daemon";
        created.inspect_err(|error| tracing::warn!(%error, "{without}")).ok()
    }

    /// Takes a session out, and sees to its file.
    fn take_out(&self, sessions: &mut Sessions, id: u64, reason: Reason) -> Option<Ended> {
        let Live { session, tickets, here, .. } = sessions.live.remove(&id)?;
        self.end_file(&session, reason);
        let may_come_again = match session.is_ready() {
            true => matches!(reason, Reason::Timeout | Reason::Limit),
            // Nothing has run on this one; but for who had it before.
            false => session.is_heir,
        };
        sessions.tickets.end(&tickets, may_come_again.then(|| Arc::downgrade(&session)));
        Some(Ended { session, known: here.known, reason })
    }

    /// A file that a dead daemon left, and whose session was not rebuilt after all, is there for
    /// the next HELLO that names it, with nothing in between: under the registry's lock.
    fn end_file(&self, session: &Session, reason: Reason) {
        match (&session.file, &self.state) {
            // The daemon after this one goes on with it.
            (Some(_), _) if reason == Reason::Shutdown => {}
            (Some(file), Some(state)) if file.adopted && session.give_up() => {
                state.give_back(file);
            }
            (Some(file), _) => file.remove(),
            (None, _) => {}
        }
    }

    /// What is told of sessions that were taken out, without the lock.
    fn bury(&self, ended: impl IntoIterator<Item = Ended>) {
        for Ended { session, known, reason } in ended {
            let share = &session.terms.share;
            tracing::info!(session = session.id, share, ?reason, "session ended");
            self.tell(&session, known, News::End(reason));
            let_go(session);
        }
    }

    /// Whether another session of this peer may be opened.
    pub fn has_room(&self, owner: u64) -> bool {
        self.lock().makes_room(owner).is_ok()
    }

    /// The session that a guest names.
    pub fn find(&self, ticket: Ticket) -> Option<Arc<Session>> {
        self.lock().find(ticket)
    }

    /// Whether the session that a guest names has not ended.
    pub fn knows(&self, ticket: Ticket) -> bool {
        self.lock().tickets.find(ticket).is_some()
    }

    /// Whether a later HELLO of that guest's was welcomed: it has long let go of this one, which
    /// somebody on the way has kept back, and a ticket for it would void the one that it was given.
    pub fn is_late(&self, session: &Session, shown: Shown) -> bool {
        self.lock().live.get(&session.id).is_some_and(|live| live.is_late(shown))
    }

    /// A connection joins by a ticket, or resumes, and then has a new one for the next time.
    /// `None`: the session has ended, the ticket was used up meanwhile, or the HELLO is late.
    pub fn join(
        &self,
        session: &Session,
        conn: u16,
        shown: Shown,
        resumes: bool,
    ) -> Option<Ticket> {
        let mut sessions = self.lock();
        let Sessions { live, tickets, .. } = &mut *sessions;
        let live = live.get_mut(&session.id).filter(|_| conn < session.terms.conns)?;
        if live.is_late(shown) {
            return None;
        }
        // Another daemon had given the first ticket, and copies of the guest may have it.
        let is_first = session.is_adopted() && live.here.known == 0;
        let ticket = tickets.join(&mut live.tickets, conn, shown.ticket, resumes || is_first)?;
        live.write_tickets();
        live.nth = live.nth.max(shown.nth);
        live.here.known |= 1 << conn;
        live.here.joined |= 1 << conn;
        live.here.cut = None;
        Some(ticket)
    }

    /// Something came by the connection that was given this ticket, so it has arrived.
    pub fn prove(&self, session: &Session, ticket: Ticket) {
        let mut sessions = self.lock();
        let Sessions { live, tickets, .. } = &mut *sessions;
        let Some(live) = live.get_mut(&session.id) else { return };
        if tickets.prove(&mut live.tickets, ticket) {
            live.write_tickets();
        }
    }

    /// A connection lost its socket, and its shard keeps what is needed to resume it. A session
    /// that was never `used` ends with its last connection: a mount that failed has nothing to
    /// keep.
    pub fn cut(&self, session: &Session, conn: u16, used: bool) {
        let mut sessions = self.lock();
        let Some(Live { here, .. }) = sessions.live.get_mut(&session.id) else { return };
        here.joined &= !(1 << conn);
        here.used |= used;
        if here.joined != 0 || here.cut.is_some() {
            return;
        }
        if !here.used || self.grace.is_zero() {
            let reason = if here.used { Reason::Timeout } else { Reason::Unmounted };
            drop(sessions);
            return self.end(session.id, reason);
        }
        here.cut = Some(Instant::now());
        tracing::info!(session = session.id, grace = ?self.grace, "session cut");
        let oldest = sessions.too_many(session.terms.owner);
        let ended = oldest.and_then(|id| self.take_out(&mut sessions, id, Reason::Limit));
        drop(sessions);
        self.changed.notify_all();
        self.bury(ended);
    }

    /// A shard has dropped a connection for good; with the last one the session ends.
    pub fn left(&self, session: Arc<Session>, conn: u16) {
        let mut sessions = self.lock();
        let mut ended = None;
        // A guest that is told of the shutdown comes again, to the next daemon.
        let reason = if sessions.stopped { Reason::Shutdown } else { Reason::Unmounted };
        if let Some(Live { here, .. }) = sessions.live.get_mut(&session.id) {
            here.known &= !(1 << conn);
            here.joined &= !(1 << conn);
            if here.known == 0 {
                ended = self.take_out(&mut sessions, session.id, reason);
            } else if here.joined == 0 {
                here.cut.get_or_insert_with(Instant::now);
                self.changed.notify_all();
            }
        }
        drop(sessions);
        self.bury(ended);
        let_go(session);
    }

    /// Ends a session at once, wherever its connections are.
    pub fn end(&self, id: u64, reason: Reason) {
        let ended = self.take_out(&mut self.lock(), id, reason);
        self.bury(ended);
    }

    /// Ends all sessions of a share.
    pub fn end_share(&self, name: &str) {
        let mut sessions = self.lock();
        let of_it = sessions.live.values().filter(|live| live.session.terms.share == name);
        let ids: Vec<u64> = of_it.map(|live| live.session.id).collect();
        let mut out = |id| self.take_out(&mut sessions, id, Reason::UnknownShare);
        let ended: Vec<Ended> = ids.into_iter().filter_map(&mut out).collect();
        drop(sessions);
        self.bury(ended);
    }

    /// All that a rebuilt session needs is there: its connections may go on.
    pub fn tell_restored(&self, session: &Session) {
        self.tell(session, u32::MAX, News::Restored);
    }

    /// Has the peers of all connections but one asked whether they live.
    pub fn ask_others(&self, session: &Session, but: u16) {
        self.tell(session, !(1 << but), News::Ask);
    }

    /// Has the connections of a session joined anew: how many; `None`: there is no such session.
    pub fn reconnect(&self, id: u64) -> Option<u32> {
        let (session, joined) = {
            let mut sessions = self.lock();
            let live = sessions.live.get_mut(&id)?;
            // Who asks next is to find them gone.
            (live.session.clone(), std::mem::take(&mut live.here.joined))
        };
        self.tell(&session, joined, News::Cut);
        let_go(session);
        Some(joined.count_ones())
    }

    /// Ends sessions whose grace time is over, until [`Registry::stop`].
    pub fn reap(&self) {
        let mut sessions = self.lock();
        while !sessions.stopped {
            let files = self.state.as_ref().and_then(StateDir::reap);
            let oldest = sessions.oldest_cut(|_| true);
            let left = oldest.map(|(since, _)| self.grace.saturating_sub(since.elapsed()));
            if let Some((_, id)) = oldest.filter(|_| left == Some(Duration::ZERO)) {
                let ended = self.take_out(&mut sessions, id, Reason::Timeout);
                drop(sessions);
                self.bury(ended);
                sessions = self.lock();
                continue;
            }
            sessions = match left.into_iter().chain(files).min() {
                None => self.changed.wait(sessions).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let waited = self.changed.wait_timeout(sessions, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Ends the reaping.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// What every session has and does.
    pub fn status(&self) -> Vec<SessionStatus> {
        let mut all = self.each(|session, here| SessionStatus {
            cut_s: here.cut.map(|cut| cut.elapsed().as_secs()),
            connections: here.joined.count_ones(),
            connections_cut: (here.known & !here.joined).count_ones(),
            ..session.status()
        });
        all.sort_by_key(|session| session.id);
        all
    }

    /// Numbers over all sessions: sessions, nodes, handles, fds.
    pub fn totals(&self) -> Vec<(&'static str, u64)> {
        let all = self.each(|session, here| (session.fs.counts(), here.cut.is_some()));
        let sum =
            |of: fn(&FsCounts) -> usize| all.iter().map(|(counts, _)| of(counts) as u64).sum();
        vec![
            ("sessions", all.len() as u64),
            ("sessions_detached", all.iter().filter(|(_, is_cut)| *is_cut).count() as u64),
            ("nodes", sum(|counts| counts.nodes)),
            ("nodes_with_fd", sum(|counts| counts.nodes_with_fd)),
            ("handles", sum(|counts| counts.handles)),
        ]
    }

    /// Looks at every session, without the lock: to count its nodes takes a while.
    fn each<T>(&self, look: impl Fn(&Session, Here) -> T) -> Vec<T> {
        let of = |live: &Live| (live.session.clone(), live.here);
        let all: Vec<_> = self.lock().live.values().map(of).collect();
        let look = |(session, here): (Arc<Session>, Here)| {
            let seen = look(&session, here);
            let_go(session);
            seen
        };
        all.into_iter().map(look).collect()
    }
}

impl Live {
    fn is_late(&self, shown: Shown) -> bool {
        shown.nth != 0 && shown.nth < self.nth
    }

    fn write_tickets(&self) {
        if let Some(file) = &self.session.file {
            let (shown, unused) = self.tickets.all();
            file.set_tickets(shown, unused);
        }
    }
}

impl Sessions {
    fn find(&self, ticket: Ticket) -> Option<Arc<Session>> {
        Some(self.live.get(&self.tickets.find(ticket)?)?.session.clone())
    }

    /// Which session has to go for another one of this peer, if one has to.
    fn makes_room(&self, owner: u64) -> Result<Option<u64>, Reason> {
        let of_owner = |live: &Live| live.session.terms.owner == owner;
        let owners = self.live.values().filter(|live| of_owner(live)).count();
        let oldest = if owners >= SESSIONS_PER_PEER_MAX {
            self.oldest_cut(of_owner)
        } else if self.live.len() >= SESSIONS_MAX {
            self.oldest_cut(|_| true)
        } else {
            return Ok(None);
        };
        oldest.map(|(_, id)| Some(id)).ok_or(Reason::Limit)
    }

    /// The oldest of the sessions without connections where there are too many.
    fn too_many(&self, owner: u64) -> Option<u64> {
        let of_owner = |live: &Live| live.session.terms.owner == owner;
        let cut = self.live.values().filter(|live| live.here.cut.is_some());
        let oldest = if cut.clone().filter(|live| of_owner(live)).count() > DETACHED_PER_PEER_MAX {
            self.oldest_cut(of_owner)
        } else if cut.count() > DETACHED_MAX {
            self.oldest_cut(|_| true)
        } else {
            None
        };
        oldest.map(|(_, id)| id)
    }

    /// Which of the sessions without connections has been so longest, and since when.
    fn oldest_cut(&self, which: impl Fn(&Live) -> bool) -> Option<(Instant, u64)> {
        let cut = self.live.values().filter(|live| which(live));
        cut.filter_map(|live| Some((live.here.cut?, live.session.id))).min()
    }
}

/// Somewhere: the next worker's sessions have other numbers in the logs, and a guest, who is told
/// his, does not learn how many there were.
fn first_id() -> u64 {
    let random = tickets::fresh().and_then(|ticket| ticket.0.first_chunk::<8>().copied());
    1 + (u64::from_le_bytes(random.unwrap_or_default()) >> (64 - FIRST_ID_BITS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::FsOptions;

    fn registry(grace: Duration) -> (tempfile::TempDir, Registry) {
        (tempfile::tempdir().expect("a temporary directory"), Registry::new(grace, None))
    }

    fn open(dir: &tempfile::TempDir, registry: &Registry, owner: u64) -> (Arc<Session>, Ticket) {
        try_open(dir, registry, owner, None).expect("a session")
    }

    fn by(ticket: Ticket) -> Shown {
        Shown { ticket, nth: 0 }
    }

    /// Of who has `presented` a ticket of this daemon's the session is rebuilt.
    fn try_open(
        dir: &tempfile::TempDir,
        registry: &Registry,
        owner: u64,
        presented: Option<Ticket>,
    ) -> Result<(Arc<Session>, Ticket), Reason> {
        let terms = Terms {
            share: "share".into(),
            peer: "peer".into(),
            owner,
            lanes: 2,
            conns: 2,
            slots: 1,
            features: 0,
            rebuilt: presented.is_some(),
            epoch: presented.map_or(0, |_| registry.epoch),
            subdir: Vec::new(),
            presented,
        };
        let fs = Fs::new(dir.path(), FsOptions::default()).expect("a file system");
        registry.open(terms, fs)
    }

    #[test]
    fn nobody_joins_a_session_that_has_ended() {
        let (dir, registry) = registry(Duration::from_secs(600));
        let (session, ticket) = open(&dir, &registry, 0);
        let join = |conn| registry.join(&session, conn, by(ticket), false).is_some();
        assert!(join(1) && join(0) && !join(2));
        registry.left(session.clone(), 1);
        assert!(join(1));
        // A greeter has found the session; then its last connection goes.
        let found = registry.find(ticket).expect("open");
        registry.left(session.clone(), 0);
        registry.left(session.clone(), 1);
        assert!(
            registry.join(&found, 0, by(ticket), false).is_none(),
            "a session that nobody counts"
        );
        assert!(registry.find(ticket).is_none());
    }

    #[test]
    fn a_file_stays_for_the_next_daemon_alone() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let check = |name: &str, end: &dyn Fn(&Registry, Arc<Session>), expected: usize| {
            let path = dir.path().join(name);
            let state = StateDir::open(&path, Duration::from_secs(600)).expect("a state directory");
            let registry = Registry::new(Duration::from_secs(600), Some(state));
            let (session, ticket) = open(&dir, &registry, 0);
            assert!(registry.join(&session, 0, by(ticket), false).is_some());
            end(&registry, session);
            let files = std::fs::read_dir(&path).expect("list").flatten();
            let sessions = files.filter(|file| file.path().extension().is_some());
            assert_eq!(sessions.count(), expected);
        };
        check("a", &|registry, session| registry.end(session.id, Reason::Unmounted), 0);
        check("b", &|registry, session| registry.end(session.id, Reason::Protocol), 0);
        check("c", &|registry, session| registry.left(session, 0), 0);
        let shutdown = |registry: &Registry, session| {
            registry.stop();
            registry.left(session, 0);
        };
        check("d", &shutdown, 1);
    }

    #[test]
    fn the_session_that_was_cut_first_makes_room() {
        let (dir, registry) = registry(Duration::from_secs(600));
        let mut sessions = Vec::new();
        for n in 0..DETACHED_PER_PEER_MAX + 2 {
            let owner = u64::from(n == 0);
            let (session, ticket) = open(&dir, &registry, owner);
            assert!(registry.join(&session, 0, by(ticket), false).is_some());
            registry.cut(&session, 0, true);
            sessions.push(ticket);
        }
        let gone: Vec<usize> =
            (0..sessions.len()).filter(|&n| registry.find(sessions[n]).is_none()).collect();
        assert_eq!(gone, [1], "the oldest of that peer");
    }

    #[test]
    fn without_a_grace_time_it_is_over_with_the_last_connection() {
        let (dir, registry) = registry(Duration::ZERO);
        let (session, ticket) = open(&dir, &registry, 0);
        for conn in [0, 1] {
            assert!(registry.join(&session, conn, by(ticket), false).is_some());
        }
        registry.cut(&session, 0, true);
        let newer = registry.join(&session, 0, by(ticket), true).expect("one of two");
        registry.cut(&session, 1, false);
        assert!(registry.find(newer).is_some());
        registry.cut(&session, 0, true);
        assert!(registry.find(newer).is_none() && registry.lock().live.is_empty());
        // What it had in flight may have run for this guest, which comes again by either ticket.
        for ticket in [ticket, newer] {
            assert!(registry.lock().tickets.gone(ticket).is_some());
        }
    }

    #[test]
    fn nobody_goes_on_with_what_still_runs() {
        let (dir, registry) = registry(Duration::ZERO);
        let (session, ticket) = open(&dir, &registry, 0);
        assert!(registry.join(&session, 0, by(ticket), false).is_some());
        registry.cut(&session, 0, true);
        // A shard holds a session as long as it waits for something of it.
        let refused = try_open(&dir, &registry, 0, Some(ticket)).map(drop);
        assert_eq!(refused, Err(Reason::Timeout));
        assert!(Reason::Timeout.is_passing());
        let_go(session);
        let (heir, _) = try_open(&dir, &registry, 0, Some(ticket)).expect("a session");
        assert!(heir.is_heir);
        let (clone, _) = try_open(&dir, &registry, 0, Some(Ticket([7; 16]))).expect("a session");
        assert!(!clone.is_heir, "a ticket of this daemon's that it does not know");
    }

    #[test]
    fn a_session_is_reaped_after_its_grace_time() {
        let (dir, registry) = registry(Duration::from_millis(20));
        let registry = Arc::new(registry);
        let reaper = registry.clone();
        let reaper = std::thread::spawn(move || reaper.reap());
        let (session, ticket) = open(&dir, &registry, 0);
        assert!(registry.join(&session, 0, by(ticket), false).is_some());
        let (other, kept) = open(&dir, &registry, 0);
        assert!(registry.join(&other, 0, by(kept), false).is_some());
        registry.cut(&session, 0, true);
        while registry.find(ticket).is_some() {
            std::thread::yield_now();
        }
        assert!(registry.find(kept).is_some());
        registry.stop();
        reaper.join().expect("the reaper");
    }
}
