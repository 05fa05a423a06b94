//! The loop of one core: enter the ring, reap, step, send. A shard owns its ring, connections and
//! buffers and shares nothing on the way of a frame.
//!
//! A turn: completions are copied out; each is stepped (bytes received, bytes sent, a request's
//! file operation done); then every connection that was touched works through its input, a bounded
//! number of records, and what it has to say goes out in one send.

use crate::buffers::{Buf, BufferPool};
use crate::connection::{Connection, reply_header};
use crate::dispatch::Request;
use crate::handles::{Handle, OpenFile};
use crate::limits::*;
use crate::link::{BODY_AT, Next};
use crate::mailbox::{Mail, Mailbox};
use crate::notes::Notes;
use crate::op::{Io, Op, Place, RequestTag, Tag};
use crate::pool::{Done, Pool};
use crate::registry::Registry;
use crate::ring::{IoResult, Ring};
use crate::splice::{SendBuffer, Splicer};
use crate::stats::{ShardStats, add};
use ringfs_wire::batch::{Kind, RecordHeader, cancel};
use ringfs_wire::hello::Reason;
use ringfs_wire::session::LinkError;
use ringfs_wire::spin::Spin;
use ringfs_wire::table::{Abandon, Begin, Fate};
use rustix::io::Errno;
use slab::Slab;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

#[path = "account.rs"]
mod account;
#[path = "bulk.rs"]
mod bulk;
#[path = "fair.rs"]
mod fair;
#[path = "file_io.rs"]
mod file_io;
#[path = "join.rs"]
mod join;
#[path = "once.rs"]
mod once;
#[path = "probe.rs"]
mod probe;
#[path = "serve.rs"]
mod serve;
#[path = "stream.rs"]
mod stream;

pub(crate) use probe::Asked;

/// How long a shard that ends waits for what is in flight.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(3);

/// What a shard shares with the rest of the daemon.
pub struct Shared {
    /// Sessions.
    pub registry: Arc<Registry>,
    /// Threads for what blocks.
    pub pool: Arc<Pool>,
    /// This shard's mail.
    pub mailbox: Arc<Mailbox>,
    /// This shard's counters.
    pub stats: Arc<ShardStats>,
    /// Which of the shards this is.
    pub index: usize,
    /// Large buffers that it may have.
    pub large_buffers: usize,
}

/// One core's share of the work.
pub struct Shard<R: Ring> {
    ring: R,
    shared: Shared,
    conns: Slab<Connection>,
    buffers: BufferPool,
    splicer: Splicer,
    /// Connections that have a socket.
    attached: usize,
    /// Sockets with a buffer for the largest reply.
    large_sockets: usize,
    /// Connections that wait for input and may be looked at before the shard sleeps.
    listening: Vec<stream::Listening>,
    spin: Spin,
    /// Connections to look at in this turn.
    touched: Vec<usize>,
    /// Large replies that will be made from memory, in the order in which they were asked for.
    bulk: VecDeque<bulk::Bulk>,
    /// Connections that wait for large buffers, in the order of their turns.
    starved: Vec<usize>,
    /// Large buffers that had come back when those were looked at last.
    large_returned: u64,
    /// Connections that wait until a rate lets their next request through.
    delayed: Vec<usize>,
    /// When the first of them may go on.
    delayed_until: Option<Instant>,
    turns: fair::Turns,
    /// When to look for peers that hold up others.
    sweep_at: Option<Instant>,
    /// What finds the nodes again that a request has given.
    notes: Notes,
    /// A reply that lies where its NODE goes.
    scratch: Vec<u8>,
    /// Operations that the ring had no room for.
    refused: Vec<Op>,
    ending: Option<Instant>,
    /// Where the shard's clock begins.
    origin: Instant,
    /// What the clock said last in this turn.
    now_ns: Option<u64>,
    /// When the last request was taken up.
    begun_ns: u64,
    /// How long the one that is answered waited for a thread of the pool.
    waited_us: u32,
}

/// What working on one record came to.
enum Step {
    /// It was taken.
    Taken,
    /// It must wait until the peer has taken replies.
    PeerFull,
    /// It must wait until a large buffer is free.
    Starved,
    /// It must wait until a rate lets it through.
    Delayed,
    /// It must wait until the guest has told all of what its session was.
    Unready,
}

impl<R: Ring> Shard<R> {
    /// A shard without connections, which looks up to `spin` times for input before it sleeps.
    pub fn new(ring: R, shared: Shared, spin: u32) -> Shard<R> {
        Shard {
            ring,
            conns: Slab::new(),
            buffers: BufferPool::new(shared.large_buffers),
            shared,
            splicer: Splicer::default(),
            attached: 0,
            large_sockets: 0,
            listening: Vec::new(),
            spin: Spin::new(spin),
            touched: Vec::new(),
            bulk: VecDeque::new(),
            starved: Vec::new(),
            large_returned: 0,
            delayed: Vec::new(),
            delayed_until: None,
            turns: fair::Turns::default(),
            sweep_at: None,
            notes: Notes::new(),
            scratch: Vec::new(),
            refused: Vec::new(),
            ending: None,
            origin: Instant::now(),
            now_ns: None,
            begun_ns: 0,
            waited_us: 0,
        }
    }

    /// Serves until a [`Mail::Shutdown`].
    pub fn run(&mut self) -> std::io::Result<()> {
        self.wait_for_mail();
        let mut done = Vec::new();
        loop {
            self.wait()?;
            self.now_ns = None;
            self.ring.reap(&mut done);
            for op in std::mem::take(&mut self.refused) {
                self.submit(op);
            }
            // What is done, or a connection that ended, may have brought buffers back.
            let returned = self.buffers.large_returned();
            let starved = match done.is_empty() && returned == self.large_returned {
                true => Vec::new(),
                false => std::mem::take(&mut self.starved),
            };
            self.large_returned = returned;
            for (op, result) in done.drain(..) {
                self.step(op, result);
            }
            self.go_on_with_delayed();
            self.work(starved);
            self.sweep();
            self.publish();
            if self.is_over() {
                return Ok(());
            }
        }
    }

    fn patience(&self) -> Option<Duration> {
        if !self.touched.is_empty() || !self.refused.is_empty() {
            Some(Duration::ZERO)
        } else if let Some(at) = [self.sweep_at, self.delayed_until].into_iter().flatten().min() {
            Some(at.saturating_duration_since(Instant::now()))
        } else if self.ending.is_some() {
            Some(Duration::from_millis(50))
        } else {
            None
        }
    }

    fn is_over(&self) -> bool {
        let Some(since) = self.ending else { return false };
        self.conns.is_empty() || since.elapsed() > SHUTDOWN_LIMIT
    }

    fn publish(&self) {
        let stats = &self.shared.stats;
        stats.connections.store(self.attached as u64, Relaxed);
        // Each open connection has one buffer to receive into.
        stats.buffers_in_use.store(self.buffers.in_use() as u64, Relaxed);
        stats.ring_in_flight.store(self.ring.in_flight() as u64, Relaxed);
        stats.replies_put_off.store(self.bulk.len() as u64, Relaxed);
        stats.starved.store(self.starved.len() as u64, Relaxed);
    }

    fn submit(&mut self, op: Op) {
        if let Err(op) = self.ring.submit(op) {
            self.refused.push(op);
        }
    }

    fn wait_for_mail(&mut self) {
        let io = Io::Wake { event: self.shared.mailbox.event(), count: Box::default() };
        self.submit(Op { io, tag: Tag::Shard });
    }

    fn step(&mut self, op: Op, result: IoResult) {
        match (op.io, op.tag) {
            (Io::Wake { .. }, _) => {
                self.wait_for_mail();
                for mail in self.shared.mailbox.take() {
                    self.step_mail(mail);
                }
            }
            (Io::Recv { buf, range, .. }, Tag::Stream(key)) => {
                self.received(key, buf, range, result);
            }
            (Io::Send { buf, range, .. }, Tag::Stream(key)) => self.sent(key, buf, range, result),
            (Io::Room { .. }, Tag::Stream(key)) => self.has_room(key),
            (Io::Read { file, buf, range, offset }, Tag::Request(tag)) => {
                self.read(tag, file, buf, range, offset, result);
            }
            (Io::Write { file, buf, range, offset }, Tag::Request(tag)) => {
                self.wrote(tag, file, buf, range, offset, result);
            }
            (Io::Fsync { file, data_only }, Tag::Request(tag)) => match result {
                Err(Errno::INTR | Errno::AGAIN) => {
                    self.submit(Op { io: Io::Fsync { file, data_only }, tag: op.tag });
                }
                _ => {
                    self.let_go(tag.conn, Handle::File(file));
                    self.finish(tag, result.map(|_| &[][..]));
                }
            },
            (io, tag) => unreachable!("{io:?} is never submitted for {tag:?}"),
        }
    }

    fn step_mail(&mut self, mail: Mail) {
        match mail {
            Mail::Join(newcomer) => self.join(newcomer),
            Mail::Of { session, conn, news } => self.hear(session, conn, news),
            Mail::Done(done) => self.end_job(done),
            Mail::Shutdown => {
                self.ending = Some(Instant::now());
                let keys: Vec<usize> = self.conns.iter().map(|(key, _)| key).collect();
                keys.into_iter().for_each(|key| self.close(key, Reason::Shutdown));
            }
        }
    }

    /// Looks at every connection that was touched; `starved` ones come first, in their order, so
    /// that nobody who is touched more often takes each buffer from them.
    fn work(&mut self, starved: Vec<usize>) {
        let returned = self.buffers.large_returned();
        for key in starved {
            if let Some(conn) = self.conns.get_mut(key) {
                conn.link.starving = false;
                self.work_on(key);
            }
        }
        let mut touched = std::mem::take(&mut self.touched);
        touched.sort_unstable();
        touched.dedup();
        self.begin_turns(&mut touched);
        for &key in &touched {
            if self.conns.contains(key) && self.has_turn(key) {
                self.work_on(key);
            }
        }
        touched.clear();
        if self.touched.is_empty() {
            self.touched = touched; // keeps the allocation
        }
        self.make_bulk();
        // A buffer may have come back after the one that waits for it was looked at.
        if self.buffers.large_returned() != returned {
            for key in std::mem::take(&mut self.starved) {
                if let Some(conn) = self.conns.get_mut(key) {
                    conn.link.starving = false;
                    self.touched.push(key);
                }
            }
        }
    }

    fn work_on(&mut self, key: usize) {
        let touched = self.touched.len();
        let turn = self.begin_turn();
        let again = self.work_through(key, turn);
        self.end_turn(key, turn);
        // What it has touched is itself, and flushed.
        self.touched.truncate(touched);
        if again {
            self.touched.push(key);
        }
    }

    /// Whether it has more to do.
    fn work_through(&mut self, key: usize, turn: Option<fair::Turn>) -> bool {
        self.hold_large(key);
        self.ask_back(key);
        for _ in 0..RECORDS_A_TURN_MAX {
            if turn.is_some_and(|turn| turn.is_over()) {
                break;
            }
            let conn = &mut self.conns[key];
            let link = &mut conn.link;
            let before = link.batches_received();
            let next = link.poll_input(&mut self.buffers);
            let batches = (link.batches_received() - before) as usize;
            // Before its replies leave: who has one may look at the counters.
            add(&self.shared.stats.batches_in, batches);
            if batches > 0
                && let Some(ticket) = link.unproven.take()
            {
                self.shared.registry.prove(&conn.session, ticket);
            }
            match next {
                Ok(Next::Record(header, buf, body)) => match self.record(key, header, &buf, body) {
                    Ok(Step::Taken) => {
                        self.conns[key].link.record_taken();
                        self.buffers.give_shared(buf);
                    }
                    Ok(wait) => {
                        self.buffers.give_shared(buf);
                        match wait {
                            Step::Starved => self.starve(key),
                            Step::Delayed => self.delay(key),
                            Step::Taken | Step::PeerFull | Step::Unready => {}
                        }
                        // A peer that was full has taken something: there may be room again.
                        let full = matches!(wait, Step::PeerFull);
                        return self.flush(key) && full && self.conns.contains(key);
                    }
                    Err(reason) => {
                        self.buffers.give_shared(buf);
                        let violation = reason == Reason::Protocol;
                        add(&self.shared.stats.protocol_errors, usize::from(violation));
                        self.close(key, reason);
                        return false;
                    }
                },
                Ok(Next::Receive(buf, range)) => {
                    self.receive(key, buf, range);
                    self.flush(key);
                    return false;
                }
                Ok(Next::Wait) => {
                    if link.has_input() && link.hold_large {
                        self.delay(key);
                    } else if link.has_input() {
                        self.starve(key);
                    }
                    self.flush(key);
                    return false;
                }
                Err(error) => {
                    self.damaged(key, error);
                    return false;
                }
            }
        }
        self.flush(key);
        true
    }

    /// A batch that is none. Its bytes are not what the peer sent, or nobody could tell: a cut. An
    /// acknowledgement that cannot be stands in a batch that is whole: the peer's own fault.
    fn damaged(&mut self, key: usize, error: LinkError) {
        let session = self.conns[key].session.id;
        add(&self.shared.stats.protocol_errors, 1);
        tracing::warn!(session, %error, "closing a connection");
        match error {
            LinkError::Batch(_) | LinkError::Sequence { .. } => {
                self.hang_up(key, Reason::Protocol);
            }
            LinkError::Ack { .. } => self.close(key, Reason::Protocol),
        }
    }

    fn starve(&mut self, key: usize) {
        let link = &mut self.conns[key].link;
        if !std::mem::replace(&mut link.starving, true) {
            self.starved.push(key);
            self.plan_sweep();
        }
    }

    fn record(
        &mut self,
        key: usize,
        header: RecordHeader,
        buf: &Arc<Buf>,
        body: Range<usize>,
    ) -> Result<Step, Reason> {
        match Kind::from_u8(header.kind) {
            Some(Kind::Request | Kind::Forget | Kind::Cancel | Kind::Unsure)
                if !self.conns[key].session.is_ready() =>
            {
                Ok(Step::Unready)
            }
            Some(Kind::Restore) => self.restore(key, &buf[body]),
            Some(Kind::Request) => self.request(key, header, buf, body),
            Some(Kind::Unsure) => self.doubt(key, header),
            Some(Kind::Forget) => self.forget(key, header, &buf[body]),
            Some(Kind::Cancel) if header.code == cancel::INTERRUPT => {
                self.cancel(key, header);
                Ok(Step::Taken)
            }
            Some(Kind::Cancel) if header.code == cancel::ABANDON => self.abandon(key, header),
            Some(Kind::Cancel) => Err(self.protocol(key, "an unknown kind of CANCEL")),
            Some(Kind::Ping) => {
                // Each costs an answer, and no slot bounds them.
                if !self.conns[key].reserve(0) {
                    return Ok(Step::PeerFull);
                }
                self.conns[key].link.push(Kind::Pong, header.code, &[], &mut self.buffers);
                Ok(Step::Taken)
            }
            Some(Kind::Pong) => {
                self.ponged(key);
                Ok(Step::Taken)
            }
            Some(Kind::Goodbye) => Err(Reason::Unmounted),
            Some(Kind::Hello | Kind::Welcome | Kind::Reply | Kind::Node) => {
                Err(self.protocol(key, "a record that guests do not send"))
            }
            Some(Kind::Notify) => Err(self.protocol(key, "a record that guests do not send")),
            Some(Kind::Session) => Ok(Step::Taken),
            None if Kind::is_optional(header.kind) => Ok(Step::Taken),
            None => Err(self.protocol(key, "an unknown kind of record")),
        }
    }

    pub(crate) fn protocol(&self, key: usize, what: impl std::fmt::Display) -> Reason {
        tracing::warn!(session = self.conns[key].session.id, "ending a session: {what}");
        Reason::Protocol
    }
}
