//! Connections that are lost come again: what lanes, main thread and connector share of that.
//!
//! A lane that loses its connection says so ([`Resume::lost`]) and goes on without; the connector
//! (connector.rs) joins another one, and the lane takes it ([`Resume::take`]). Invariant: a port
//! has at most one connection that counts; whoever still holds an older one only drops it. It must
//! not touch requests.

use crate::conn::{Conn, ConnRx};
use crate::handshake::Joined;
use crate::known::Restored;
use crate::lane::{InFlight, lock};
use crate::rings::with_causes;
use crate::session::End;
use crate::status::unix_now_s;
use crate::transport::Socket;
use ringfs_wire::batch::{BatchBuilder, BatchHeader, Cursor, Kind};
use ringfs_wire::hello::Reason;
use ringfs_wire::slot::SlotUse;
use rustix::net::Shutdown;
use rustix::rand::{GetRandomFlags, getrandom};
use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

/// Between the first two tries after one that failed.
const BACKOFF_FIRST: Duration = Duration::from_millis(10);
/// Between two tries at most: the first answer is to come half a second after a daemon does,
/// however long there was none, and the rebuild has its part of that.
const BACKOFF_MAX: Duration = Duration::from_millis(300);
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

/// The requests that no daemon can have of what a connection was to send: those of the batch that
/// is made, or of which nothing has left of `sending`, and those that were to follow.
pub fn unsent(
    batch: &BatchBuilder,
    sending: &Range<usize>,
    buffer: &[u8],
    follow: &VecDeque<Resend>,
) -> Vec<SlotUse> {
    let sealed = BatchHeader::read_from_prefix(buffer).ok().map(|(header, _)| header);
    let records = match sending {
        none if none.is_empty() => Some(batch.records()),
        whole if whole.start == 0 => sealed.as_ref().map(Cursor::new),
        _ => None,
    };
    let mut records = records.unwrap_or_else(|| BatchBuilder::new().records());
    let records = std::iter::from_fn(|| records.next(buffer)).map(|(record, _)| record);
    let requests = records.filter(|record| record.kind == Kind::Request as u8);
    let requests = requests.map(|record| SlotUse { slot: record.slot, seq: record.slot_seq });
    let follow = follow.iter().filter_map(|resend| match resend {
        Resend::Frame(at) => Some(*at),
        Resend::Unsure(_) | Resend::Abandon(_) => None,
    });
    requests.chain(follow).collect()
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
    /// The last try has brought a connection: the daemon is there for the others too.
    is_there: bool,
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
                is_there: false,
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
    pub fn leave_old_daemon(&self, ask_again_at_once: bool) -> bool {
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
    pub fn has_told(&self, restored: Restored) {
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
    pub fn next_job(&self) -> Option<u16> {
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
            let due = *due.get_or_insert_with(|| now + state.delay());
            let Some(left) = due.checked_duration_since(now).filter(|left| !left.is_zero()) else {
                return Some(port as u16);
            };
            let woken = self.bell.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A handshake begins on that socket; false: it must not.
    pub fn begin_try(&self, socket: &Socket) -> bool {
        let mut state = lock(&self.state);
        state.trying = socket.as_fd().try_clone_to_owned().ok();
        !state.stopping && state.trying.is_some()
    }

    /// The connection by which a new ticket may be on its way, after a try of `port`: whether by
    /// that; `None`: it was not welcomed, so nothing more is known than before.
    pub fn end_unsure(&self, port: u16, is_unsure: Option<bool>) -> Option<u16> {
        let mut state = lock(&self.state);
        if let Some(is_unsure) = is_unsure {
            state.unsure = Some(port).filter(|_| is_unsure);
        }
        state.unsure
    }

    /// What came of it: the connection counts, unless somebody has ended the try.
    pub fn end_try(&self, port: u16, joined: Option<Joined>) -> bool {
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
        state.is_there = true;
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

    /// Until the next try. A daemon that takes connections and lets them go at once is not tried
    /// more often than [`BACKOFF_FIRST`] says.
    fn delay(&mut self) -> Duration {
        let delay = self.backoff.delay(random());
        match std::mem::take(&mut self.is_there) {
            true => delay.min(BACKOFF_FIRST),
            false => delay,
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use ringfs_wire::batch::RecordHeader;
    use ringfs_wire::session::LinkTx;

    #[test]
    fn what_has_not_left_is_unsent() {
        let at = |slot| SlotUse { slot, seq: 5 };
        let mut buffer = vec![0; 1 << 10];
        let mut builder = BatchBuilder::new();
        for (kind, slot) in [(Kind::Request, 1), (Kind::Cancel, 2), (Kind::Request, 3)] {
            let header =
                RecordHeader { kind: kind as u8, slot, slot_seq: 5, ..RecordHeader::default() };
            assert!(builder.push(&mut buffer, header, &[7; 20]));
        }
        let follow = [Resend::Unsure(at(7)), Resend::Frame(at(7)), Resend::Abandon(at(8))].into();
        let all = [at(1), at(3), at(7)];
        assert_eq!(unsent(&builder, &(0..0), &buffer, &follow), all);
        let len = LinkTx::new(true).seal(&mut builder, &mut buffer, 0).len();
        assert_eq!(unsent(&builder, &(0..len), &buffer, &follow), all);
        for left in [1, len - 1, len] {
            assert_eq!(unsent(&builder, &(left..len), &buffer, &follow), [at(7)], "{left}");
        }
        assert_eq!(unsent(&builder, &(0..0), &buffer, &follow), [at(7)], "there is no batch");
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
        let old = InFlight::Request {
            unique: 4,
            opcode: 1,
            pid: 0,
            cancelled: false,
            sent: true,
            unsure: true,
        };
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
}
