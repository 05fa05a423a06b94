//! The registry: the sessions of this daemon, who joins which by what ticket, and who is reaped.
//!
//! A session lives until it is ended: by its guest, by a violation of the protocol, or because all
//! its connections were cut for longer than the grace time. Invariant: a ticket leads to one
//! session, and a session has the ticket that its guest has shown last, and at most one that is
//! newer. Nothing here is touched on the way of a frame.

use crate::fs::Fs;
use crate::limits::*;
use crate::mailbox::{Mail, Mailbox};
use crate::metrics::Metrics;
use crate::session::{ConnWork, Rebuild, Session, Terms, let_go};
use crate::state_dir::{StateDir, StateFile, StateTerms};
use crate::status::SessionStatus;
use ringfs_wire::hello::{Reason, Ticket};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A session that has not ended.
struct Live {
    session: Arc<Session>,
    /// The newest ticket that the guest has used.
    ticket: Ticket,
    /// One that it was given since, and by which connection. Until the guest shows that it has it,
    /// the WELCOME may be lost.
    unused: Option<(Ticket, u16)>,
    /// Another daemon had given the first ticket, and copies of the guest may have it.
    adopted: bool,
    /// Connections that a shard has a table of, a bit each.
    known: u32,
    /// Those of them that have a socket.
    joined: u32,
    /// Since when none has.
    cut: Option<Instant>,
    /// One that was cut had brought a request: there is something to keep.
    used: bool,
}

#[derive(Default)]
struct Sessions {
    live: HashMap<u64, Live>,
    tickets: HashMap<Ticket, u64>,
    /// The last tickets of sessions that ended while their guests may come again, the oldest first,
    /// and the sessions: as long as something of one runs, its shards hold it.
    gone: VecDeque<(Ticket, Weak<Session>)>,
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

    fn lock(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a session, and gives its first ticket. Where there are too many, the one that was cut
    /// longest ago makes room. Of two openings by one ticket (a guest whose HELLO was cut off has
    /// come again) the second gets the first one's session: there is one table of what ran.
    pub fn open(&self, terms: Terms, fs: Fs) -> Result<(Arc<Session>, Ticket), Reason> {
        let fresh = new_ticket().ok_or(Reason::Internal)?;
        let shards = self.shards.get().map_or(1, Vec::len);
        let metrics = self.metrics.of(&terms.share, shards);
        let of = terms.of_file();
        let adopted = |sessions: &Sessions| {
            let presented = terms.presented?;
            let live = sessions.tickets.get(&presented).and_then(|id| sessions.live.get(id));
            match live {
                Some(live) => Some((presented, Err(live.session.clone()))),
                None => Some((presented, Ok(self.state.as_ref()?.adopt(presented, &of)?))),
            }
        };
        let mut sessions = self.lock();
        let before = terms.presented.and_then(|ticket| sessions.gone(ticket));
        if before.is_some_and(|before| before.strong_count() > 0) {
            // Nobody can tell yet what it will have done.
            return Err(Reason::Timeout);
        }
        // This daemon knows its own sessions: who has an older ticket is a clone.
        let is_own = terms.epoch == self.epoch;
        let is_heir = terms.rebuilt && terms.presented.is_some() && (!is_own || before.is_some());
        let (file, ticket) = match adopted(&sessions) {
            Some((ticket, Err(session))) => return Ok((session, ticket)),
            Some((ticket, Ok(file))) => (Some(file), ticket),
            None => {
                drop(sessions);
                let file = self.create_file(&of, fresh, terms.rebuilt);
                sessions = self.lock();
                (file, fresh)
            }
        };
        let session = Arc::new(Session {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            share: terms.share,
            subdir: terms.subdir,
            peer: terms.peer,
            owner: terms.owner,
            work: (0..terms.conns).map(|_| ConnWork::default()).collect(),
            metrics,
            since: Instant::now(),
            fs: Arc::new(fs),
            lanes: terms.lanes,
            conns: terms.conns,
            slots: terms.slots,
            features: terms.features,
            rebuilt: terms.rebuilt.then(Rebuild::default),
            is_heir,
            file,
        });
        let mut ended = None;
        let owner = session.owner;
        let of_owner = sessions.of(owner) >= SESSIONS_PER_PEER_MAX;
        if of_owner || sessions.live.len() >= SESSIONS_MAX {
            let oldest = sessions.oldest_cut(|live| !of_owner || live.session.owner == owner);
            let Some(oldest) = oldest else {
                self.end_file(&session, Reason::Limit);
                return Err(Reason::Limit);
            };
            ended = self.take_out(&mut sessions, oldest, Reason::Limit);
        }
        sessions.tickets.insert(ticket, session.id);
        let live = Live {
            session: session.clone(),
            ticket,
            unused: None,
            adopted: ticket != fresh,
            known: 0,
            joined: 0,
            cut: None,
            used: false,
        };
        sessions.live.insert(session.id, live);
        drop(sessions);
        ended.into_iter().for_each(|ended| self.bury(ended, Reason::Limit));
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
    fn take_out(&self, sessions: &mut Sessions, id: u64, reason: Reason) -> Option<Live> {
        let live = sessions.remove(id)?;
        self.end_file(&live.session, reason);
        let may_come_again = match live.session.is_ready() {
            true => matches!(reason, Reason::Timeout | Reason::Limit),
            // Nothing has run on this one; but for who had it before.
            false => live.session.is_heir,
        };
        if may_come_again {
            let unused = live.unused.map(|(unused, _)| unused);
            let tickets = [Some(live.ticket), unused].into_iter().flatten();
            let session = Arc::downgrade(&live.session);
            sessions.gone.extend(tickets.map(|ticket| (ticket, session.clone())));
            let excess = sessions.gone.len().saturating_sub(GONE_TICKETS_MAX);
            sessions.gone.drain(..excess);
        }
        Some(live)
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

    /// Whether another session of this peer may be opened.
    pub fn has_room(&self, owner: u64) -> bool {
        let sessions = self.lock();
        if sessions.of(owner) >= SESSIONS_PER_PEER_MAX {
            return sessions.oldest_cut(|live| live.session.owner == owner).is_some();
        }
        sessions.live.len() < SESSIONS_MAX || sessions.oldest_cut(|_| true).is_some()
    }

    /// The session that a guest names.
    pub fn find(&self, ticket: Ticket) -> Option<Arc<Session>> {
        let sessions = self.lock();
        let id = sessions.tickets.get(&ticket)?;
        Some(sessions.live.get(id)?.session.clone())
    }

    /// Whether the session that a guest names has not ended.
    pub fn knows(&self, ticket: Ticket) -> bool {
        self.lock().tickets.contains_key(&ticket)
    }

    /// A connection joins by a ticket, or resumes, and then has a new one for the next time.
    /// `None`: the session has ended, or the ticket was used up meanwhile.
    pub fn join(
        &self,
        session: &Session,
        conn: u16,
        ticket: Ticket,
        resumes: bool,
    ) -> Option<Ticket> {
        let fresh = new_ticket()?;
        let mut sessions = self.lock();
        let Sessions { live, tickets, .. } = &mut *sessions;
        let live = live.get_mut(&session.id).filter(|_| conn < session.conns)?;
        match live.unused {
            Some((unused, _)) if unused == ticket => live.prove(ticket, tickets),
            // Who has not got the new one comes again for the same connection. For another one
            // comes a copy of the guest, which would share the session with it.
            Some((_, told)) if told != conn => return None,
            Some(_) | None if live.ticket != ticket => return None,
            Some(_) | None => {}
        }
        let fresh = (resumes || live.adopted && live.known == 0).then_some(fresh);
        if let Some(fresh) = fresh {
            if let Some((lost, _)) = live.unused.replace((fresh, conn)) {
                tickets.remove(&lost);
            }
            tickets.insert(fresh, session.id);
        }
        live.write_tickets();
        live.known |= 1 << conn;
        live.joined |= 1 << conn;
        live.cut = None;
        Some(fresh.unwrap_or(ticket))
    }

    /// Something came by the connection that was given this ticket, so it has arrived: whoever has
    /// an older one is a copy of the guest from before, and must not find what was done since.
    pub fn prove(&self, session: &Session, ticket: Ticket) {
        let mut sessions = self.lock();
        let Sessions { live, tickets, .. } = &mut *sessions;
        let Some(live) = live.get_mut(&session.id) else { return };
        if live.unused.is_some_and(|(unused, _)| unused == ticket) {
            live.prove(ticket, tickets);
            live.write_tickets();
        }
    }

    /// A connection lost its socket, and its shard keeps what is needed to resume it. A session
    /// that was never `used` ends with its last connection: a mount that failed has nothing to
    /// keep.
    pub fn cut(&self, session: &Session, conn: u16, used: bool) {
        let mut sessions = self.lock();
        let Some(live) = sessions.live.get_mut(&session.id) else { return };
        live.joined &= !(1 << conn);
        live.used |= used;
        if live.joined != 0 || live.cut.is_some() {
            return;
        }
        if !live.used || self.grace.is_zero() {
            let reason = if live.used { Reason::Timeout } else { Reason::Unmounted };
            drop(sessions);
            return self.end(session.id, reason);
        }
        live.cut = Some(Instant::now());
        tracing::info!(session = session.id, grace = ?self.grace, "session cut");
        let oldest = sessions.too_many(session.owner);
        let ended = oldest.and_then(|id| self.take_out(&mut sessions, id, Reason::Limit));
        drop(sessions);
        self.changed.notify_all();
        ended.into_iter().for_each(|ended| self.bury(ended, Reason::Limit));
    }

    /// A shard has dropped a connection for good; with the last one the session ends.
    pub fn left(&self, session: Arc<Session>, conn: u16) {
        let mut sessions = self.lock();
        let mut ended = None;
        // A guest that is told of the shutdown comes again, to the next daemon.
        let reason = if sessions.stopped { Reason::Shutdown } else { Reason::Unmounted };
        if let Some(live) = sessions.live.get_mut(&session.id) {
            live.known &= !(1 << conn);
            live.joined &= !(1 << conn);
            if live.known == 0 {
                ended = self.take_out(&mut sessions, session.id, reason);
            } else if live.joined == 0 {
                live.cut.get_or_insert_with(Instant::now);
                self.changed.notify_all();
            }
        }
        drop(sessions);
        ended.into_iter().for_each(|ended| self.bury(ended, reason));
        let_go(session);
    }

    /// Ends a session at once, wherever its connections are.
    pub fn end(&self, id: u64, reason: Reason) {
        let ended = self.take_out(&mut self.lock(), id, reason);
        ended.into_iter().for_each(|ended| self.bury(ended, reason));
    }

    /// All that a rebuilt session needs is there: its connections may go on.
    pub fn tell_restored(&self, session: &Session) {
        for conn in 0..session.conns {
            if let Some(shard) = self.shard(session, conn) {
                shard.post(Mail::Restored { session: session.id, conn });
            }
        }
    }

    /// Has the peers of all connections but one asked whether they live.
    pub fn ask_others(&self, session: &Session, but: u16) {
        for conn in (0..session.conns).filter(|&conn| conn != but) {
            if let Some(shard) = self.shard(session, conn) {
                shard.post(Mail::Ask { session: session.id, conn });
            }
        }
    }

    /// Has the connections of a session joined anew: how many; `None`: there is no such session.
    pub fn reconnect(&self, id: u64) -> Option<u32> {
        let (session, joined) = {
            let mut sessions = self.lock();
            let live = sessions.live.get_mut(&id)?;
            // Who asks next is to find them gone.
            (live.session.clone(), std::mem::take(&mut live.joined))
        };
        for conn in (0..session.conns).filter(|conn| joined & 1 << conn != 0) {
            if let Some(shard) = self.shard(&session, conn) {
                shard.post(Mail::Cut { session: id, conn });
            }
        }
        let_go(session);
        Some(joined.count_ones())
    }

    fn bury(&self, ended: Live, reason: Reason) {
        let Live { session, known, .. } = ended;
        tracing::info!(session = session.id, share = session.share, ?reason, "session ended");
        for conn in (0..session.conns).filter(|conn| known & 1 << conn != 0) {
            if let Some(shard) = self.shard(&session, conn) {
                shard.post(Mail::End { session: session.id, conn, reason });
            }
        }
        let_go(session);
    }

    /// Ends sessions whose grace time is over, until [`Registry::stop`].
    pub fn reap(&self) {
        let mut sessions = self.lock();
        while !sessions.stopped {
            let now = Instant::now();
            let files = self.state.as_ref().and_then(StateDir::reap);
            let Some(id) = sessions.oldest_cut(|_| true) else {
                sessions = match files {
                    None => self.changed.wait(sessions).unwrap_or_else(PoisonError::into_inner),
                    Some(left) => {
                        let waited = self.changed.wait_timeout(sessions, left);
                        waited.unwrap_or_else(PoisonError::into_inner).0
                    }
                };
                continue;
            };
            let cut = sessions.live.get(&id).and_then(|live| live.cut).unwrap_or(now);
            let left = self.grace.saturating_sub(now.saturating_duration_since(cut));
            if left.is_zero() {
                let ended = self.take_out(&mut sessions, id, Reason::Timeout);
                drop(sessions);
                ended.into_iter().for_each(|ended| self.bury(ended, Reason::Timeout));
                sessions = self.lock();
                continue;
            }
            let left = files.map_or(left, |files| files.min(left));
            let waited = self.changed.wait_timeout(sessions, left);
            sessions = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the reaping.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// What every session has and does.
    pub fn status(&self) -> Vec<SessionStatus> {
        let sessions: Vec<_> = {
            let sessions = self.lock();
            let of = |live: &Live| (live.session.clone(), live.cut, live.known, live.joined);
            sessions.live.values().map(of).collect()
        };
        let now = Instant::now();
        let age = |at: Instant| now.saturating_duration_since(at).as_secs();
        let of = |(session, cut, known, joined): (Arc<Session>, Option<Instant>, u32, u32)| {
            let counts = session.fs.counts();
            let (requests, in_flight) = session.work();
            let status = SessionStatus {
                id: session.id,
                share: session.share.clone(),
                subdir: String::from_utf8_lossy(&session.subdir).into_owned(),
                peer: session.peer.clone(),
                age_s: age(session.since),
                cut_s: cut.map(age),
                lanes: session.lanes,
                connections: joined.count_ones(),
                connections_cut: (known & !joined).count_ones(),
                requests,
                in_flight,
                nodes: counts.nodes as u64,
                handles: counts.handles as u64,
            };
            let_go(session);
            status
        };
        let mut all: Vec<SessionStatus> = sessions.into_iter().map(of).collect();
        all.sort_by_key(|session| session.id);
        all
    }

    /// Ends all sessions of a share.
    pub fn end_share(&self, name: &str) {
        let ended: Vec<Live> = {
            let mut sessions = self.lock();
            let of_it = sessions.live.iter().filter(|(_, live)| live.session.share == name);
            let ids: Vec<u64> = of_it.map(|(id, _)| *id).collect();
            let mut out = |id| self.take_out(&mut sessions, id, Reason::UnknownShare);
            ids.into_iter().filter_map(&mut out).collect()
        };
        ended.into_iter().for_each(|ended| self.bury(ended, Reason::UnknownShare));
    }

    /// Numbers over all sessions: sessions, nodes, handles, fds.
    pub fn totals(&self) -> Vec<(&'static str, u64)> {
        let (sessions, cut): (Vec<Arc<Session>>, usize) = {
            let sessions = self.lock();
            let cut = sessions.live.values().filter(|live| live.cut.is_some()).count();
            (sessions.live.values().map(|live| live.session.clone()).collect(), cut)
        };
        let counts: Vec<_> = sessions.iter().map(|session| session.fs.counts()).collect();
        let numbers = vec![
            ("sessions", sessions.len() as u64),
            ("sessions_detached", cut as u64),
            ("nodes", counts.iter().map(|c| c.nodes as u64).sum()),
            ("nodes_with_fd", counts.iter().map(|c| c.nodes_with_fd as u64).sum()),
            ("handles", counts.iter().map(|c| c.handles as u64).sum()),
        ];
        sessions.into_iter().for_each(let_go);
        numbers
    }
}

impl Live {
    /// The new ticket has arrived.
    fn prove(&mut self, ticket: Ticket, tickets: &mut HashMap<Ticket, u64>) {
        tickets.remove(&self.ticket);
        (self.ticket, self.unused) = (ticket, None);
    }

    fn write_tickets(&self) {
        if let Some(file) = &self.session.file {
            file.set_tickets(self.ticket, self.unused.map(|(unused, _)| unused));
        }
    }
}

impl Sessions {
    /// The session that had that ticket last, and has ended without its guest's doing.
    fn gone(&self, ticket: Ticket) -> Option<&Weak<Session>> {
        self.gone.iter().find(|(its, _)| *its == ticket).map(|(_, session)| session)
    }

    /// How many one peer has.
    fn of(&self, owner: u64) -> usize {
        self.live.values().filter(|live| live.session.owner == owner).count()
    }

    /// Which of the sessions without connections has been so longest.
    fn oldest_cut(&self, which: impl Fn(&Live) -> bool) -> Option<u64> {
        let cut = self.live.iter().filter(|(_, live)| which(live));
        let cut = cut.filter_map(|(id, live)| Some((live.cut?, *id)));
        cut.min().map(|(_, id)| id)
    }

    /// The oldest of the sessions without connections where there are too many.
    fn too_many(&self, owner: u64) -> Option<u64> {
        let cut = self.live.values().filter(|live| live.cut.is_some());
        let owners = cut.clone().filter(|live| live.session.owner == owner).count();
        if owners > DETACHED_PER_PEER_MAX {
            self.oldest_cut(|live| live.session.owner == owner)
        } else if cut.count() > DETACHED_MAX {
            self.oldest_cut(|_| true)
        } else {
            None
        }
    }

    fn remove(&mut self, id: u64) -> Option<Live> {
        let live = self.live.remove(&id)?;
        self.tickets.remove(&live.ticket);
        if let Some((unused, _)) = &live.unused {
            self.tickets.remove(unused);
        }
        Some(live)
    }
}

/// Somewhere: the next worker's sessions have other numbers in the logs, and a guest, who is told
/// his, does not learn how many there were.
fn first_id() -> u64 {
    let random = new_ticket().and_then(|ticket| ticket.0.first_chunk::<8>().copied());
    1 + (u64::from_le_bytes(random.unwrap_or_default()) >> (64 - FIRST_ID_BITS))
}

fn new_ticket() -> Option<Ticket> {
    let mut ticket = Ticket::NONE;
    let filled = rustix::rand::getrandom(&mut ticket.0, rustix::rand::GetRandomFlags::empty());
    (filled == Ok(ticket.0.len()) && ticket != Ticket::NONE).then_some(ticket)
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
        let join = |conn| registry.join(&session, conn, ticket, false).is_some();
        assert!(join(1) && join(0) && !join(2));
        registry.left(session.clone(), 1);
        assert!(join(1));
        // A greeter has found the session; then its last connection goes.
        let found = registry.find(ticket).expect("open");
        registry.left(session.clone(), 0);
        registry.left(session.clone(), 1);
        assert!(registry.join(&found, 0, ticket, false).is_none(), "a session that nobody counts");
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
            assert!(registry.join(&session, 0, ticket, false).is_some());
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
    fn a_ticket_is_good_until_the_next_one_is_used() {
        let (dir, registry) = registry(Duration::from_secs(600));
        let (session, first) = open(&dir, &registry, 0);
        let resume = |ticket| registry.join(&session, 0, ticket, true);
        assert_eq!(registry.join(&session, 0, first, false), Some(first));
        registry.cut(&session, 0, true);
        let lost = resume(first).expect("the first one");
        // The WELCOME that brought it was lost: the guest comes with what it has.
        let second = resume(first).expect("the first one again");
        assert!(second != lost && second != first);
        assert_eq!((resume(lost), registry.find(lost).is_some()), (None, false));
        let third = resume(second).expect("the second");
        assert_eq!((resume(first), registry.find(first).is_some()), (None, false));
        assert!(resume(second).is_some() && resume(third).is_none());
        registry.end(session.id, Reason::Unmounted);
        assert!(registry.find(second).is_none() && registry.lock().tickets.is_empty());
    }

    #[test]
    fn a_copy_of_the_guest_finds_nothing_that_was_done_since() {
        let (dir, registry) = registry(Duration::from_secs(600));
        let (session, first) = open(&dir, &registry, 0);
        for conn in [0, 1] {
            assert_eq!(registry.join(&session, conn, first, false), Some(first));
        }
        // Guest and copy have the first ticket. Whoever resumes has the session to itself.
        let second = registry.join(&session, 0, first, true).expect("the first ticket");
        assert_eq!(registry.join(&session, 1, first, true), None, "half of a session");
        // Its first batch: the copy could go on with none of its connections.
        registry.prove(&session, second);
        assert_eq!(registry.join(&session, 0, first, true), None);
        assert!(registry.find(first).is_none() && registry.find(second).is_some());
        // A late word about an older connection changes nothing.
        let third = registry.join(&session, 1, second, true).expect("the second");
        registry.prove(&session, second);
        assert!(registry.join(&session, 0, third, true).is_some());
        registry.end(session.id, Reason::Unmounted);
        assert!(registry.lock().tickets.is_empty());
    }

    #[test]
    fn the_session_that_was_cut_first_makes_room() {
        let (dir, registry) = registry(Duration::from_secs(600));
        let mut sessions = Vec::new();
        for n in 0..DETACHED_PER_PEER_MAX + 2 {
            let owner = u64::from(n == 0);
            let (session, ticket) = open(&dir, &registry, owner);
            assert!(registry.join(&session, 0, ticket, false).is_some());
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
            assert!(registry.join(&session, conn, ticket, false).is_some());
        }
        registry.cut(&session, 0, true);
        let newer = registry.join(&session, 0, ticket, true).expect("one of two");
        registry.cut(&session, 1, false);
        assert!(registry.find(newer).is_some());
        registry.cut(&session, 0, true);
        assert!(registry.find(newer).is_none() && registry.lock().live.is_empty());
        // What it had in flight may have run for this guest, which comes again by either ticket.
        for ticket in [ticket, newer] {
            assert!(registry.lock().gone(ticket).is_some());
        }
    }

    #[test]
    fn nobody_goes_on_with_what_still_runs() {
        let (dir, registry) = registry(Duration::ZERO);
        let (session, ticket) = open(&dir, &registry, 0);
        assert!(registry.join(&session, 0, ticket, false).is_some());
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
        assert!(registry.join(&session, 0, ticket, false).is_some());
        let (other, kept) = open(&dir, &registry, 0);
        assert!(registry.join(&other, 0, kept, false).is_some());
        registry.cut(&session, 0, true);
        while registry.find(ticket).is_some() {
            std::thread::yield_now();
        }
        assert!(registry.find(kept).is_some());
        registry.stop();
        reaper.join().expect("the reaper");
    }
}
