//! Connections that are lost come again: the connector's thread, and what it shares with lanes.
//!
//! A lane that loses its connection says so ([`Resume::lost`]) and goes on without; the connector
//! joins one connection at a time, with the newest ticket, and the lane takes it
//! ([`Resume::take`]). A daemon that does not know the session is told of it first (rebuild.rs),
//! and then no lane has a connection of before. Invariant: a port has at most one connection that
//! counts; whoever still holds an older one only drops it. It must not touch requests.

use crate::conn::{Conn, ConnRx};
use crate::handshake::{self, HandshakeError, Joined, join};
use crate::keep::Keep;
use crate::known::Restored;
use crate::lane::{InFlight, Lane, lock};
use crate::rebuild;
use crate::rings::with_causes;
use crate::session::{End, Session};
use crate::status::unix_now_s;
use crate::transport::{Address, ConnectError, Socket};
use ringfs_wire::hello::{Hello, Reason, Ticket, Welcome, feature, welcome_flag};
use ringfs_wire::slot::SlotUse;
use rustix::net::Shutdown;
use rustix::rand::{GetRandomFlags, getrandom};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Between the first two tries after one that failed.
const BACKOFF_FIRST: Duration = Duration::from_millis(10);
/// Between two tries at most: the first answer is to come half a second after a daemon does,
/// however long there was none, and the rebuild has its part of that.
const BACKOFF_MAX: Duration = Duration::from_millis(300);
/// A daemon that refuses the ticket so often in a row, at first perhaps as it is just letting go
/// of the session, does not have it for us.
const UNKNOWN_MAX: u32 = 2;
/// A connection that lived shorter did not help: the back-off goes on where it was.
const WORTH: Duration = Duration::from_secs(1);

/// What a lane sends of a slot in use, first of all on a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resend {
    /// That the frame, which comes next, may have run before the session was rebuilt.
    Unsure(SlotUse),
    /// The frame that is kept.
    Frame(SlotUse),
    /// Nobody will take the reply.
    Abandon(SlotUse),
}

/// What has to be sent again of what is in flight.
pub fn resends<'r>(in_flight: impl Iterator<Item = (SlotUse, &'r InFlight)>) -> VecDeque<Resend> {
    let resend = |(at, request): (SlotUse, &InFlight)| match request {
        InFlight::Request { unsure: true, .. } => {
            [Some(Resend::Unsure(at)), Some(Resend::Frame(at))]
        }
        InFlight::Request { .. } | InFlight::Forget => [None, Some(Resend::Frame(at))],
        InFlight::Abandoned => [None, Some(Resend::Abandon(at))],
    };
    in_flight.flat_map(resend).flatten().collect()
}

/// When the next try is due: at once, then doubling, each somewhere in the upper half.
#[derive(Debug, Default)]
struct Backoff {
    next: Duration,
}

impl Backoff {
    fn delay(&mut self, random: u64) -> Duration {
        let full = self.next;
        self.next = (full * 2).clamp(BACKOFF_FIRST, BACKOFF_MAX);
        let half = full / 2;
        let span = (full - half).as_micros() as u64 + 1;
        half + Duration::from_micros(random % span)
    }
}

/// A number that other guests of the same snapshot do not draw too.
fn random() -> u64 {
    let mut bytes = [0; 8];
    // Without it (an early boot) tries come as close together as they may.
    let _ = getrandom(&mut bytes, GetRandomFlags::NONBLOCK);
    u64::from_ne_bytes(bytes)
}

/// Where the connection of one lane stands.
#[derive(Debug)]
struct Port {
    conn: Option<Arc<Conn>>,
    /// The half for the lane's thread, until that takes it.
    fresh: Option<ConnRx>,
    /// The lane's thread acts on a connection, be it this one or one that counts no more.
    is_held: bool,
    joined: Instant,
}

#[derive(Debug)]
struct State {
    ports: Vec<Port>,
    backoff: Backoff,
    /// A handshake in progress: its socket.
    trying: Option<OwnedFd>,
    /// The connection whose last try ended without a word.
    unsure: Option<u16>,
    /// Somebody wants a try at once.
    hurry: bool,
    stopping: bool,
    /// Since when all are connected, or not.
    since: Instant,
    since_unix_s: u64,
    last_cut: Option<String>,
    rebuilds: u64,
    restored: Restored,
}

/// What lanes, main thread and connector share.
#[derive(Debug)]
pub struct Resume {
    state: Mutex<State>,
    bell: Condvar,
    is_on: AtomicBool,
    /// How long requests wait for a connection; `None`: as long as it takes.
    pub soft: Option<Duration>,
    /// Connections lost.
    pub cuts: AtomicU64,
    /// Connections joined anew.
    pub resumes: AtomicU64,
}

/// How the connections are, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outlook {
    /// Lanes without a connection.
    pub missing: usize,
    /// Since when all have one, or not all.
    pub since_unix_s: u64,
    /// Why a connection was last lost.
    pub last_cut: Option<String>,
    /// Daemons that were told of the session.
    pub rebuilds: u64,
    /// What the last one was told.
    pub restored: Restored,
}

impl Resume {
    /// The first connections, one a lane.
    pub fn new(conns: Vec<(Conn, ConnRx)>, soft: Option<Duration>) -> Resume {
        let now = Instant::now();
        let port = |(conn, half)| Port {
            conn: Some(Arc::new(conn)),
            fresh: Some(half),
            is_held: false,
            joined: now,
        };
        Resume::of(conns.into_iter().map(port).collect(), soft)
    }

    /// None of so many: another client has left them. `unsure`: whose handshake had begun.
    pub fn cut(conns: usize, soft: Option<Duration>, unsure: Option<u16>) -> Resume {
        let joined = Instant::now();
        let port = |_| Port { conn: None, fresh: None, is_held: false, joined };
        let resume = Resume::of((0..conns).map(port).collect(), soft);
        let mut state = lock(&resume.state);
        state.unsure = unsure;
        state.last_cut = Some("the client died".to_owned());
        drop(state);
        resume
    }

    fn of(ports: Vec<Port>, soft: Option<Duration>) -> Resume {
        let now = Instant::now();
        Resume {
            state: Mutex::new(State {
                ports,
                backoff: Backoff::default(),
                trying: None,
                unsure: None,
                hurry: false,
                stopping: false,
                since: now,
                since_unix_s: unix_now_s(),
                last_cut: None,
                rebuilds: 0,
                restored: Restored::default(),
            }),
            bell: Condvar::new(),
            is_on: AtomicBool::new(false),
            soft,
            cuts: AtomicU64::new(0),
            resumes: AtomicU64::new(0),
        }
    }

    /// The mount is ready: from now on a cut does not end it.
    pub fn begin(&self) {
        self.is_on.store(true, Ordering::Release);
    }

    /// Whether it has begun.
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Acquire)
    }

    /// A connection that the lane's thread has not taken yet.
    pub fn take(&self, lane: u8) -> Option<(Arc<Conn>, ConnRx)> {
        let mut state = lock(&self.state);
        let port = state.ports.get_mut(usize::from(lane))?;
        let taken = (Arc::clone(port.conn.as_ref()?), port.fresh.take()?);
        port.is_held = true;
        Some(taken)
    }

    /// The lane's connection is lost: its thread will act on nothing more of it. Another one
    /// is needed if it is still the one that counts.
    pub fn lost(&self, lane: u8, conn: &Arc<Conn>, why: &End) {
        let mut state = lock(&self.state);
        let Some(port) = state.ports.get_mut(usize::from(lane)) else { return };
        port.is_held = false;
        self.bell.notify_all();
        if !port.conn.as_ref().is_some_and(|its| Arc::ptr_eq(its, conn)) {
            return;
        }
        if port.joined.elapsed() >= WORTH {
            state.backoff = Backoff::default();
        }
        let why = with_causes(why);
        if state.missing() == 0 {
            tracing::warn!(lane, why, "a connection is lost: resuming, requests wait");
            state.turn();
        }
        state.drop_conn(usize::from(lane));
        state.last_cut = Some(why);
        self.cuts.fetch_add(1, Ordering::Relaxed);
    }

    /// `ringfs reconnect`: whatever connections there are count no more, and new ones are joined
    /// at once.
    pub fn reconnect(&self) {
        let mut state = lock(&self.state);
        tracing::warn!("asked to reconnect: resuming, requests wait");
        self.drop_all(&mut state);
        state.last_cut = Some("asked to reconnect".to_owned());
        state.backoff = Backoff::default();
        state.hurry = true;
        state.abort_try();
        self.bell.notify_all();
    }

    /// The daemon does not know the session: all connections of before count no more. Returns when
    /// no lane acts on one any longer; false: it is over.
    fn leave_old_daemon(&self, ask_again_at_once: bool) -> bool {
        let mut state = lock(&self.state);
        self.drop_all(&mut state);
        state.hurry |= ask_again_at_once;
        while !state.stopping && state.ports.iter().any(|port| port.is_held) {
            state = self.bell.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        !state.stopping
    }

    fn drop_all(&self, state: &mut State) {
        if state.missing() == 0 {
            state.turn();
        }
        for port in 0..state.ports.len() {
            if state.drop_conn(port) {
                self.cuts.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// A daemon was told of the session.
    fn has_told(&self, restored: Restored) {
        let mut state = lock(&self.state);
        state.rebuilds += 1;
        state.restored = restored;
        let Restored { nodes, nodes_lost, handles, bytes, took_us } = restored;
        tracing::warn!(
            nodes,
            nodes_lost,
            handles,
            bytes,
            took_us,
            "the daemon did not know the session: rebuilt"
        );
    }

    /// Ends the connections that there are, and the try for another.
    pub fn shutdown(&self, is_last: bool) {
        let mut state = lock(&self.state);
        state.ports.iter().filter_map(|port| port.conn.as_ref()).for_each(|conn| conn.shutdown());
        if is_last {
            state.stopping = true;
            state.abort_try();
            self.bell.notify_all();
        }
    }

    /// Tells the daemon that the mount is gone for good.
    pub fn say_goodbye(&self, reason: Reason) {
        let conns: Vec<_> =
            lock(&self.state).ports.iter().filter_map(|port| port.conn.clone()).collect();
        conns.iter().for_each(|conn| conn.say_goodbye(reason));
    }

    /// For `ringfs status`.
    pub fn outlook(&self) -> Outlook {
        let state = lock(&self.state);
        Outlook {
            missing: state.missing(),
            since_unix_s: state.since_unix_s,
            last_cut: state.last_cut.clone(),
            rebuilds: state.rebuilds,
            restored: state.restored,
        }
    }

    /// Sleeps until a connection is missing and a try is due: which. `None`: it is over.
    fn next_job(&self) -> Option<u16> {
        let mut state = lock(&self.state);
        let mut due: Option<Instant> = None;
        loop {
            if state.stopping {
                return None;
            }
            let Some(port) = state.missing_port() else {
                due = None;
                state = self.bell.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            if std::mem::take(&mut state.hurry) {
                return Some(port as u16);
            }
            let now = Instant::now();
            let due = *due.get_or_insert_with(|| now + state.backoff.delay(random()));
            let Some(left) = due.checked_duration_since(now).filter(|left| !left.is_zero()) else {
                return Some(port as u16);
            };
            let woken = self.bell.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A handshake begins on that socket; false: it must not.
    fn begin_try(&self, socket: &Socket) -> bool {
        let mut state = lock(&self.state);
        state.trying = socket.as_fd().try_clone_to_owned().ok();
        !state.stopping && state.trying.is_some()
    }

    /// The connection by which a new ticket may be on its way, after a try of `port`.
    fn end_unsure(&self, port: u16, error: Option<&ResumeError>) -> Option<u16> {
        let mut state = lock(&self.state);
        // Who has not reached a daemon knows no more than before.
        if !matches!(error, Some(ResumeError::Connect(_))) {
            let is_unsure = error.is_some_and(ResumeError::may_have_lost_a_ticket);
            state.unsure = Some(port).filter(|_| is_unsure);
        }
        state.unsure
    }

    /// What came of it: the connection counts, unless somebody has ended the try.
    fn end_try(&self, port: u16, joined: Option<Joined>) -> bool {
        let mut state = lock(&self.state);
        let is_wanted = state.trying.take().is_some();
        let Some(joined) = joined.filter(|_| is_wanted) else { return false };
        let (conn, half) = Conn::new(joined);
        let place = &mut state.ports[usize::from(port)];
        (place.conn, place.fresh) = (Some(Arc::new(conn)), Some(half));
        let before = std::mem::replace(&mut place.joined, Instant::now());
        if before.elapsed() >= WORTH {
            state.backoff = Backoff::default();
        }
        self.resumes.fetch_add(1, Ordering::Relaxed);
        if state.missing() == 0 {
            let after_ms = state.since.elapsed().as_millis() as u64;
            // As loud as the loss: whoever reads of that wants to read of this.
            tracing::warn!(after_ms, "resumed: all lanes are connected");
            state.turn();
        }
        true
    }
}

impl State {
    /// The connection to try next. Where a WELCOME may be lost, with a new ticket, the one that we
    /// have is good for the same connection alone (docs/sessions.md).
    fn missing_port(&self) -> Option<usize> {
        let is_missing = |port: &usize| self.ports[*port].conn.is_none();
        let unsure = self.unsure.map(usize::from).filter(is_missing);
        unsure.or_else(|| (0..self.ports.len()).find(is_missing))
    }

    fn missing(&self) -> usize {
        self.ports.iter().filter(|port| port.conn.is_none()).count()
    }

    fn turn(&mut self) {
        (self.since, self.since_unix_s) = (Instant::now(), unix_now_s());
    }

    fn drop_conn(&mut self, port: usize) -> bool {
        let port = &mut self.ports[port];
        port.fresh = None;
        let conn = port.conn.take();
        // Its lane wakes, if it has not lost it by itself.
        conn.inspect(|conn| conn.shutdown()).is_some()
    }

    fn abort_try(&mut self) {
        if let Some(socket) = self.trying.take() {
            // An error says that it is over already.
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        }
    }
}

/// How the daemon is asked again.
#[derive(Debug)]
pub struct Terms {
    address: Address,
    /// The first HELLO.
    hello: Hello,
    /// The newest WELCOME.
    welcome: Welcome,
    /// A daemon that does not know the session ends the mount.
    is_strict: bool,
    /// The ports that the session has had a connection of, one bit each.
    joined: u8,
    /// A daemon asked for a rebuild and has not been told all.
    is_untold: bool,
    /// How often in a row a daemon would not know the session by its ticket.
    unknown: u32,
    /// Where the next client finds them.
    keep: Option<Arc<Keep>>,
}

impl Terms {
    /// After the first connections.
    pub fn new(address: &Address, hello: Hello, welcome: Welcome, is_strict: bool) -> Terms {
        Terms {
            address: address.clone(),
            hello,
            welcome,
            is_strict,
            joined: u8::MAX,
            is_untold: false,
            unknown: 0,
            keep: None,
        }
    }

    /// They are put down there from now on.
    pub fn keeping(self, keep: Arc<Keep>) -> Terms {
        let terms = Terms { keep: Some(keep), ..self };
        terms.put_down(None);
        terms
    }

    /// As another client has left them.
    pub fn inherited(self, keep: Arc<Keep>) -> Terms {
        let kept = keep.terms();
        let (welcome, is_untold) = (kept.welcome, kept.is_untold != 0);
        Terms { welcome, is_untold, joined: kept.joined as u8, keep: Some(keep), ..self }
    }

    /// `unsure`: the connection by which a new ticket may be on its way.
    fn put_down(&self, unsure: Option<u16>) {
        let Some(keep) = &self.keep else { return };
        keep.change(|kept| {
            (kept.welcome, kept.joined) = (self.welcome, self.joined.into());
            kept.is_untold = self.is_untold.into();
            kept.trying = unsure.map_or(0, |port| u32::from(port) + 1);
        });
    }

    /// Whether it makes sense to ask for a session of our own instead.
    fn can_begin_anew(&self) -> bool {
        let restores = self.welcome.features & feature::RESTORE != 0;
        restores && !self.is_strict && self.welcome.ticket != Ticket::NONE
    }
}

/// Why one try came to nothing.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ResumeError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(
        "the daemon does not know the session (it was restarted, or the session's grace is over), \
         and the mount is `strict`: mount again"
    )]
    Strict,
    #[error(
        "the daemon does not know the session (it was restarted, or the session's grace is over), \
         and one of the two daemons cannot have it rebuilt: update ringfsd, and mount again"
    )]
    NoRestore,
    #[error("the daemon takes the connection for a new one: update ringfsd")]
    NotResumed,
    #[error("the daemon has other {0} than before")]
    Changed(&'static str),
    #[error("the daemon does not know the session, and grants fewer {0} than it has: mount again")]
    Fewer(&'static str),
    #[error("somebody asked for another try")]
    Overtaken,
}

impl ResumeError {
    /// Whether the ticket is no good there: somebody else, a clone of ours, has the session.
    fn is_unknown_session(&self) -> bool {
        let ResumeError::Handshake(HandshakeError::Refused { reason, .. }) = self else {
            return false;
        };
        *reason == Some(Reason::UnknownSession)
    }

    /// Whether the daemon may have welcomed us, and we do not know.
    fn may_have_lost_a_ticket(&self) -> bool {
        let is_refused = |error: &_| matches!(error, HandshakeError::Refused { .. });
        matches!(self, ResumeError::Handshake(error) if !is_refused(error))
    }

    /// Whether another try makes sense.
    fn is_passing(&self) -> bool {
        match self {
            ResumeError::Connect(_) | ResumeError::Overtaken => true,
            ResumeError::Handshake(error) => match error {
                HandshakeError::Refused { reason, .. } => {
                    reason.is_some_and(|reason| reason.is_passing())
                }
                HandshakeError::Version(_) | HandshakeError::Excess(_) => false,
                HandshakeError::Timeout
                | HandshakeError::Closed
                | HandshakeError::Io(_)
                | HandshakeError::Link(_)
                | HandshakeError::Hello(_)
                | HandshakeError::TooLong(_)
                | HandshakeError::Unexpected(_) => true,
            },
            ResumeError::Strict
            | ResumeError::NoRestore
            | ResumeError::NotResumed
            | ResumeError::Changed(_)
            | ResumeError::Fewer(_) => false,
        }
    }
}

/// The connector's thread: until the session is over.
pub fn run(session: &Session, mut terms: Terms) {
    let mut has_told = false;
    while let Some(port) = session.resume.next_job() {
        let tried = resume(session, &mut terms, port);
        let unsure = session.resume.end_unsure(port, tried.as_ref().err());
        terms.put_down(unsure);
        match tried {
            Ok(()) => {
                session.lanes[usize::from(port)].kick();
                session.notify();
                terms.unknown = 0;
                has_told &= session.resume.outlook().missing > 0;
            }
            Err(ResumeError::Overtaken) => {}
            Err(error) if error.is_unknown_session() && terms.can_begin_anew() => {
                terms.unknown += 1;
                if terms.unknown == UNKNOWN_MAX {
                    tracing::warn!("the session is another guest's: asking for one of our own");
                    session.resume.leave_old_daemon(true);
                    terms.welcome.ticket = Ticket::NONE;
                    terms.put_down(None);
                }
            }
            Err(error) if error.is_passing() => {
                let why = with_causes(&error);
                // The first of an outage; the others would say the same.
                match std::mem::replace(&mut has_told, true) {
                    false => tracing::warn!(why, "no new connection yet; trying on"),
                    true => tracing::debug!(why, "no new connection yet"),
                }
            }
            Err(error) => return session.end(End::NotResumed(error)),
        }
    }
}

/// One try.
fn resume(session: &Session, terms: &mut Terms, port: u16) -> Result<(), ResumeError> {
    let resume = &session.resume;
    let begun = Instant::now();
    let socket = Socket::connect(&terms.address, handshake::LIMIT)?;
    if !resume.begin_try(&socket) {
        return Err(ResumeError::Overtaken);
    }
    let hello = Hello {
        ticket: terms.welcome.ticket,
        epoch_seen: terms.welcome.epoch,
        conn: port,
        init: session.agreed().map(|agreed| agreed.served),
        ..terms.hello.clone()
    };
    terms.put_down(Some(port));
    let mut joined = match join(socket, &hello) {
        Ok(joined) => joined,
        Err(error) => {
            resume.end_try(port, None);
            return Err(error.into());
        }
    };
    let welcome = joined.welcome;
    let used = Used { lanes: session.lanes.len() as u16, slots: session.lanes[0].slots() };
    let is_rebuild = check_terms(terms, port, used, &welcome)?;
    // Whatever becomes of this connection: the daemon may know the new ticket alone by now.
    terms.welcome = welcome;
    terms.put_down(None);
    if is_rebuild && let Err(error) = rebuild(session, terms, port, &mut joined, begun) {
        resume.end_try(port, None);
        return Err(error);
    }
    terms.joined |= 1 << port;
    match resume.end_try(port, Some(joined)) {
        true => {
            session.lanes[usize::from(port)].renew();
            Ok(())
        }
        false => Err(ResumeError::Overtaken),
    }
}

/// Tells the daemon of the session; the connection is that of lane 0 and goes on, or is of no use.
fn rebuild(
    session: &Session,
    terms: &mut Terms,
    port: u16,
    joined: &mut Joined,
    begun: Instant,
) -> Result<(), ResumeError> {
    (terms.is_untold, terms.joined) = (true, 0);
    terms.put_down(None);
    let is_first = port == 0;
    // What lanes still take from old connections would be told wrongly.
    if !session.resume.leave_old_daemon(!is_first) || !is_first {
        return Err(ResumeError::Overtaken);
    }
    session.lanes.iter().for_each(Lane::doubt);
    let restored = rebuild::tell(joined, &session.known)?;
    let took_us = begun.elapsed().as_micros() as u64;
    let restored = Restored { took_us, ..restored };
    terms.is_untold = false;
    session.resume.has_told(restored);
    Ok(())
}

/// What the mount has of its terms.
#[derive(Clone, Copy)]
struct Used {
    lanes: u16,
    slots: u16,
}

/// Whether the session is to be rebuilt; an error: it cannot go on.
fn check_terms(terms: &Terms, port: u16, used: Used, now: &Welcome) -> Result<bool, ResumeError> {
    let before = &terms.welcome;
    let is_rebuild = now.flags & welcome_flag::REBUILD != 0;
    let is_resumed = now.flags & welcome_flag::RESUMED != 0;
    let is_first_join = !is_resumed && terms.joined >> port & 1 == 0;
    if is_rebuild && terms.is_strict {
        return Err(ResumeError::Strict);
    }
    if is_rebuild && before.features & now.features & feature::RESTORE == 0 {
        return Err(ResumeError::NoRestore);
    }
    // Who was not told all does not go on as if.
    if !is_rebuild && (terms.is_untold || !is_resumed && !is_first_join) {
        return Err(ResumeError::NotResumed);
    }
    let same = |is_same: bool, what| if is_same { Ok(()) } else { Err(ResumeError::Changed(what)) };
    same(before.version == now.version, "versions")?;
    same(before.features == now.features, "features")?;
    if is_rebuild {
        let enough =
            |is_enough: bool, what| if is_enough { Ok(()) } else { Err(ResumeError::Fewer(what)) };
        enough(now.lanes >= used.lanes && now.conns >= used.lanes, "lanes")?;
        enough(now.slots >= used.slots, "slots")?;
        return Ok(true);
    }
    same(before.lanes == now.lanes && before.conns == now.conns, "lanes")?;
    same(before.slots == now.slots, "slots")?;
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfs_wire::hello::CacheMode;

    fn zeros() -> Welcome {
        Welcome::default()
    }

    #[test]
    fn tries_become_rare() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.delay(u64::MAX), Duration::ZERO);
        for full in [10, 20, 40, 80, 160, 300, 300] {
            let mut twin = Backoff { next: backoff.next };
            let (low, high) = (Duration::from_millis(full) / 2, Duration::from_millis(full));
            assert_eq!(twin.delay(0), low);
            let delay = backoff.delay(0x9E37_79B9_7F4A_7C15);
            assert!((low..=high).contains(&delay), "{delay:?} of {full} ms");
        }
    }

    #[test]
    fn what_is_sent_first() {
        let at = |slot| SlotUse { slot, seq: 7 };
        let old =
            InFlight::Request { unique: 4, opcode: 1, pid: 0, cancelled: false, unsure: true };
        let requests = [InFlight::request(2, 1, 0), InFlight::Abandoned, InFlight::Forget, old];
        let in_flight = requests.iter().enumerate().map(|(slot, r)| (at(slot as u16), r));
        let expected = [
            Resend::Frame(at(0)),
            Resend::Abandon(at(1)),
            Resend::Frame(at(2)),
            Resend::Unsure(at(3)),
            Resend::Frame(at(3)),
        ];
        assert_eq!(resends(in_flight), expected);
        assert!(resends(std::iter::empty()).is_empty());
    }

    fn terms(welcome: Welcome) -> Terms {
        let hello = Hello {
            versions: (1, 1),
            features: welcome.features,
            ticket: welcome.ticket,
            epoch_seen: 0,
            lanes: 2,
            conn: 0,
            conns: 2,
            slots: 8,
            mount_flags: 0,
            cache: CacheMode::Auto,
            share: "s".into(),
            subdir: Vec::new(),
            init: None,
        };
        Terms::new(&Address::Unix("/s".into()), hello, welcome, false)
    }

    #[test]
    fn terms_that_cannot_go_on() {
        let (flags, features) = (welcome_flag::RESUMED, feature::RESTORE);
        let before =
            Welcome { version: 1, lanes: 2, slots: 8, conns: 2, flags, features, ..zeros() };
        let plain = terms(before);
        let check = |terms: &Terms, now: Welcome, expected: Result<bool, &str>| {
            let used = Used { lanes: 2, slots: 8 };
            let found = check_terms(terms, 1, used, &now).map_err(|error| {
                assert!(!error.is_passing());
                error.to_string()
            });
            match (&found, expected) {
                (Ok(is_rebuild), expected) => assert_eq!(Ok(*is_rebuild), expected),
                (Err(text), Err(part)) => assert!(text.contains(part), "{text}"),
                (Err(text), Ok(_)) => panic!("{text}"),
            }
        };
        check(&plain, Welcome { epoch: 9, ..before }, Ok(false));
        check(&plain, Welcome { flags: 0, ..before }, Err("update ringfsd"));
        check(&plain, Welcome { slots: 7, ..before }, Err("other slots"));
        check(&plain, Welcome { lanes: 1, ..before }, Err("other lanes"));
        check(&plain, Welcome { features: 3, ..before }, Err("other features"));

        let rebuild = Welcome { flags: welcome_flag::REBUILD, ..before };
        check(&plain, rebuild, Ok(true));
        check(&plain, Welcome { lanes: 3, conns: 3, slots: 9, ..rebuild }, Ok(true));
        check(&plain, Welcome { lanes: 1, conns: 1, ..rebuild }, Err("fewer lanes"));
        check(&plain, Welcome { conns: 1, ..rebuild }, Err("fewer lanes"));
        check(&plain, Welcome { slots: 7, ..rebuild }, Err("fewer slots"));
        check(&plain, Welcome { features: 0, ..rebuild }, Err("cannot have it rebuilt"));
        check(&plain, Welcome { features: 3, ..rebuild }, Err("other features"));
        let old = terms(Welcome { features: 0, ..before });
        check(&old, rebuild, Err("cannot have it rebuilt"));
        check(&Terms { is_strict: true, ..terms(before) }, rebuild, Err("`strict`"));

        // After a rebuild the other connections join as those of a new session do, once.
        let told = |joined| Terms { joined, ..terms(rebuild) };
        check(&told(1), Welcome { flags: 0, ..before }, Ok(false));
        check(&told(1), before, Ok(false));
        check(&told(3), Welcome { flags: 0, ..before }, Err("update ringfsd"));
        let untold = || Terms { is_untold: true, ..told(0) };
        check(&untold(), rebuild, Ok(true));
        for flags in [0, welcome_flag::RESUMED] {
            check(&untold(), Welcome { flags, ..before }, Err("update ringfsd"));
        }
    }

    #[test]
    fn refusals_that_pass() {
        let refused = |reason| HandshakeError::Refused { reason, text: String::new() };
        for (error, expected) in [
            (refused(Some(Reason::Shutdown)), true),
            (refused(Some(Reason::Limit)), true),
            (refused(Some(Reason::UnknownSession)), false),
            (refused(Some(Reason::Denied)), false),
            (refused(None), false),
            (HandshakeError::Timeout, true),
            (HandshakeError::Closed, true),
            (HandshakeError::Version(9), false),
        ] {
            let error = ResumeError::from(error);
            assert_eq!(error.is_passing(), expected, "{error}");
        }
    }
}
