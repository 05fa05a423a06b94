//! Connections that are lost come again: the connector's thread, and what it shares with lanes.
//!
//! A lane that loses its connection says so ([`Resume::lost`]) and goes on without; the connector
//! joins one connection at a time, with the newest ticket, and the lane takes it
//! ([`Resume::take`]). Invariant: a port has at most one connection that counts; whoever still
//! holds an older one only drops it. It must not touch requests.

use crate::conn::{Conn, ConnRx};
use crate::handshake::{self, HandshakeError, Joined, join};
use crate::lane::{InFlight, lock};
use crate::rings::with_causes;
use crate::session::{End, Session};
use crate::status::unix_now_s;
use crate::transport::{Address, ConnectError, Socket};
use ringfs_wire::hello::{Hello, Reason, Welcome, welcome_flag};
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
/// Between two tries at most.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A connection that lived shorter did not help: the back-off goes on where it was.
const WORTH: Duration = Duration::from_secs(1);

/// What a lane sends of a slot in use, first of all on a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resend {
    /// The frame that is kept.
    Frame(SlotUse),
    /// Nobody will take the reply.
    Abandon(SlotUse),
}

/// What has to be sent again of what is in flight.
pub fn resends<'r>(in_flight: impl Iterator<Item = (SlotUse, &'r InFlight)>) -> VecDeque<Resend> {
    let resend = |(at, request): (SlotUse, &InFlight)| match request {
        InFlight::Request { .. } | InFlight::Forget => Resend::Frame(at),
        InFlight::Abandoned => Resend::Abandon(at),
    };
    in_flight.map(resend).collect()
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
    joined: Instant,
}

#[derive(Debug)]
struct State {
    ports: Vec<Port>,
    backoff: Backoff,
    /// A handshake in progress: its socket.
    trying: Option<OwnedFd>,
    /// Somebody wants a try at once.
    hurry: bool,
    stopping: bool,
    /// Since when all are connected, or not.
    since: Instant,
    since_unix_s: u64,
    last_cut: Option<String>,
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
}

impl Resume {
    /// The first connections, one a lane.
    pub fn new(conns: Vec<(Conn, ConnRx)>, soft: Option<Duration>) -> Resume {
        let now = Instant::now();
        let port =
            |(conn, half)| Port { conn: Some(Arc::new(conn)), fresh: Some(half), joined: now };
        Resume {
            state: Mutex::new(State {
                ports: conns.into_iter().map(port).collect(),
                backoff: Backoff::default(),
                trying: None,
                hurry: false,
                stopping: false,
                since: now,
                since_unix_s: unix_now_s(),
                last_cut: None,
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
        Some((Arc::clone(port.conn.as_ref()?), port.fresh.take()?))
    }

    /// The lane's connection is lost, if it is still the one that counts.
    pub fn lost(&self, lane: u8, conn: &Arc<Conn>, why: &End) {
        let mut state = lock(&self.state);
        let Some(port) = state.ports.get_mut(usize::from(lane)) else { return };
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
        self.bell.notify_all();
    }

    /// `ringfs reconnect`: whatever connections there are count no more, and new ones are joined
    /// at once.
    pub fn reconnect(&self) {
        let mut state = lock(&self.state);
        tracing::warn!("asked to reconnect: resuming, requests wait");
        if state.missing() == 0 {
            state.turn();
        }
        for port in 0..state.ports.len() {
            if state.drop_conn(port) {
                self.cuts.fetch_add(1, Ordering::Relaxed);
            }
        }
        state.last_cut = Some("asked to reconnect".to_owned());
        state.backoff = Backoff::default();
        state.hurry = true;
        state.abort_try();
        self.bell.notify_all();
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
        let last_cut = state.last_cut.clone();
        Outlook { missing: state.missing(), since_unix_s: state.since_unix_s, last_cut }
    }

    /// Sleeps until a connection is missing and a try is due: which. `None`: it is over.
    fn next_job(&self) -> Option<u16> {
        let mut state = lock(&self.state);
        let mut due: Option<Instant> = None;
        loop {
            if state.stopping {
                return None;
            }
            let Some(port) = state.ports.iter().position(|port| port.conn.is_none()) else {
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

    /// What came of it: the connection counts, unless somebody has ended the try.
    fn end_try(&self, port: u16, joined: Option<Joined>) -> bool {
        let mut state = lock(&self.state);
        let is_wanted = state.trying.take().is_some();
        let Some(joined) = joined.filter(|_| is_wanted) else { return false };
        if state.ports[usize::from(port)].joined.elapsed() >= WORTH {
            state.backoff = Backoff::default();
        }
        let (conn, half) = Conn::new(joined);
        state.ports[usize::from(port)] =
            Port { conn: Some(Arc::new(conn)), fresh: Some(half), joined: Instant::now() };
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
    /// Where it is.
    pub address: Address,
    /// The first HELLO.
    pub hello: Hello,
    /// The newest WELCOME.
    pub welcome: Welcome,
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
        "the daemon has to rebuild the session (it was restarted, or the session's grace is \
         over), which this version cannot: mount again"
    )]
    Rebuild,
    #[error("the daemon takes the connection for a new one: update ringfsd")]
    NotResumed,
    #[error("the daemon has other {0} than before")]
    Changed(&'static str),
    #[error("somebody asked for another try")]
    Overtaken,
}

impl ResumeError {
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
            ResumeError::Rebuild | ResumeError::NotResumed | ResumeError::Changed(_) => false,
        }
    }
}

/// The connector's thread: until the session is over.
pub fn run(session: &Session, mut terms: Terms) {
    let mut has_told = false;
    while let Some(port) = session.resume.next_job() {
        match resume(session, &mut terms, port) {
            Ok(()) => {
                session.lanes[usize::from(port)].kick();
                session.notify();
                has_told &= session.resume.outlook().missing > 0;
            }
            Err(ResumeError::Overtaken) => {}
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
    let socket = Socket::connect(&terms.address, handshake::LIMIT)?;
    if !resume.begin_try(&socket) {
        return Err(ResumeError::Overtaken);
    }
    let hello = Hello {
        ticket: terms.welcome.ticket,
        epoch_seen: terms.welcome.epoch,
        conn: port,
        init: session.agreed().map(|agreed| agreed.out),
        ..terms.hello.clone()
    };
    let joined = match join(socket, &hello) {
        Ok(joined) => joined,
        Err(error) => {
            resume.end_try(port, None);
            return Err(error.into());
        }
    };
    let welcome = joined.welcome;
    check_terms(&terms.welcome, &welcome)?;
    // Whatever becomes of this connection: the daemon may know the new ticket alone by now.
    terms.welcome = welcome;
    match resume.end_try(port, Some(joined)) {
        true => {
            session.lanes[usize::from(port)].renew();
            Ok(())
        }
        false => Err(ResumeError::Overtaken),
    }
}

fn check_terms(before: &Welcome, now: &Welcome) -> Result<(), ResumeError> {
    if now.flags & welcome_flag::REBUILD != 0 {
        return Err(ResumeError::Rebuild);
    }
    if now.flags & welcome_flag::RESUMED == 0 {
        return Err(ResumeError::NotResumed);
    }
    for (is_same, what) in [
        (before.version == now.version, "versions"),
        (before.lanes == now.lanes && before.conns == now.conns, "lanes"),
        (before.slots == now.slots, "slots"),
        (before.features == now.features, "features"),
    ] {
        if !is_same {
            return Err(ResumeError::Changed(what));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_become_rare() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.delay(u64::MAX), Duration::ZERO);
        for full in [10, 20, 40, 80, 160, 320, 640, 1000, 1000] {
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
        let requests = [InFlight::request(2, 1, 0), InFlight::Abandoned, InFlight::Forget];
        let in_flight = requests.iter().enumerate().map(|(slot, r)| (at(slot as u16), r));
        let expected = [Resend::Frame(at(0)), Resend::Abandon(at(1)), Resend::Frame(at(2))];
        assert_eq!(resends(in_flight), expected);
        assert!(resends(std::iter::empty()).is_empty());
    }

    #[test]
    fn terms_that_cannot_go_on() {
        let flags = welcome_flag::RESUMED;
        let before =
            Welcome { version: 1, lanes: 2, slots: 8, conns: 2, flags, ..Welcome::default() };
        let check = |now: Welcome, expected: Option<&str>| {
            let error = check_terms(&before, &now).err();
            assert!(error.as_ref().is_none_or(|error| !error.is_passing()));
            let text = error.map(|error| error.to_string());
            assert_eq!(text.is_some(), expected.is_some(), "{text:?}");
            let (text, expected) = (text.unwrap_or_default(), expected.unwrap_or_default());
            assert!(text.contains(expected), "{text}");
        };
        check(Welcome { epoch: 9, ..before }, None);
        check(Welcome { flags: 0, ..before }, Some("update ringfsd"));
        check(Welcome { flags: welcome_flag::REBUILD, ..before }, Some("mount again"));
        check(Welcome { slots: 7, ..before }, Some("other slots"));
        check(Welcome { lanes: 1, ..before }, Some("other lanes"));
        check(Welcome { features: 1, ..before }, Some("other features"));
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
