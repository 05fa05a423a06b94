//! One connection of a session, which outlives its sockets: the tables of its lanes' slots, and
//! what is in flight for them. What belongs to a socket is in link.rs. No fd is touched here.
//!
//! A connection is open, or cut and waiting for the last operations on its old socket, or detached.
//! Requests in flight end into the table either way. Invariant: a reply is put on a link only where
//! the table says that its request came by that link.

use crate::buffers::BufferPool;
use crate::dispatch::Request;
use crate::greet::Newcomer;
use crate::limits::*;
use crate::link::Link;
use crate::notes::Notes;
use crate::op::RequestTag;
use crate::pool::PastOf;
use crate::session::Session;
use crate::state_dir::Cells;
use ringfs_wire::batch::{Kind, RecordHeader};
use ringfs_wire::limits::RECORD_HEADER_BYTES;
use ringfs_wire::slot::{SlotError, SlotUse};
use ringfs_wire::table::{Abandon, Begin, Fate, Past, SlotTable};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Those who say that this is their connection, while its old socket is still there.
#[derive(Default)]
pub struct Waiting {
    /// Who, the last one last.
    pub newcomers: VecDeque<Box<Newcomer>>,
    /// So many of them, the first ones, had come when the PING was sent that is on its way.
    pub asked_for: usize,
}

impl Waiting {
    /// The first one waits no more.
    pub fn drop_first(&mut self) -> Option<Box<Newcomer>> {
        self.asked_for = self.asked_for.saturating_sub(1);
        self.newcomers.pop_front()
    }

    /// Those for whom the peer was asked, whether it lives: they wait no more.
    pub fn asked_for(&mut self) -> VecDeque<Box<Newcomer>> {
        let later = self.newcomers.split_off(std::mem::take(&mut self.asked_for));
        std::mem::replace(&mut self.newcomers, later)
    }
}

/// One connection of a session.
pub struct Connection {
    /// The session that it belongs to.
    pub session: Arc<Session>,
    /// Which of the session's connections it is.
    pub index: u16,
    /// Its socket, if it has one.
    pub link: Link,
    /// Operations and jobs of requests that will still name this connection.
    pub running: usize,
    /// The session is over for this connection: nobody resumes it.
    pub ended: bool,
    /// Until when its peer may end the stream by itself.
    pub leave_by: Option<Instant>,
    /// Who want to go on in its place.
    pub waiting: Waiting,
    /// When the request that is looked at may run, where a rate delays it: it is paid for.
    /// The number is that of the limits' change under which it was.
    pub runs_at: Option<(Instant, u64)>,
    /// From when on it may receive something large, where a rate keeps it from that.
    pub large_at: Option<Instant>,
    /// It is in the shard's list of those that wait for a rate.
    pub delayed: bool,
    /// The tables of lanes `index`, `index + conns`, ...
    lanes: Vec<SlotTable<Cells>>,
    /// Bytes of replies that are being made.
    reserved: usize,
}

impl Connection {
    /// A connection without a socket, no slot in use.
    pub fn new(session: Arc<Session>, index: u16) -> Connection {
        let lanes = (index..session.terms.lanes).step_by(usize::from(session.terms.conns.max(1)));
        let table = |lane: u16| match &session.file {
            Some(file) => file.table(lane as u8),
            None => Cells::table(session.terms.slots, session.rebuild.is_some()),
        };
        let lanes = lanes.map(table).collect();
        Connection {
            session,
            index,
            link: Link::none(),
            running: 0,
            ended: false,
            leave_by: None,
            waiting: Waiting::default(),
            runs_at: None,
            large_at: None,
            delayed: false,
            lanes,
            reserved: 0,
        }
    }

    /// Whether it has a socket.
    pub fn is_attached(&self) -> bool {
        self.link.socket.is_some()
    }

    /// Requests being executed.
    pub fn slots_in_use(&self) -> usize {
        self.lanes.iter().map(SlotTable::in_use).sum()
    }

    /// Whether any request has come in on it.
    pub fn is_used(&self) -> bool {
        self.lanes.iter().any(SlotTable::is_used)
    }

    /// The link is dead: what ends from now on stays in the table.
    pub fn cut(&mut self) {
        self.lanes.iter_mut().for_each(SlotTable::cut);
        self.session.fs.noted_is_lost();
    }

    fn lane(&mut self, lane: u8) -> Option<&mut SlotTable<Cells>> {
        let conns = self.session.terms.conns;
        if u16::from(lane) % conns != self.index {
            return None;
        }
        self.lanes.get_mut(usize::from(u16::from(lane) / conns))
    }

    /// The table that a record names, and the use of a slot in it.
    fn place(
        &mut self,
        record: &RecordHeader,
    ) -> Result<(&mut SlotTable<Cells>, SlotUse), SlotError> {
        let at = SlotUse { slot: record.slot, seq: record.slot_seq };
        let slots = self.lane(record.lane).ok_or(SlotError::Range { slot: at.slot, granted: 0 })?;
        Ok((slots, at))
    }

    /// A request came in on its slot.
    pub fn begin(&mut self, record: &RecordHeader, opcode: u32) -> Result<Begin, SlotError> {
        let (slots, at) = self.place(record)?;
        slots.begin(at, opcode)
    }

    /// What is known of a request that a dead daemon began, and that came again.
    pub fn past(&mut self, record: &RecordHeader) -> Option<PastOf> {
        let (slots, at) = self.place(record).ok()?;
        let done = match slots.past(at)? {
            Past::Running => None,
            Past::Done(reply) => Some(reply.to_vec()),
        };
        Some(PastOf { done })
    }

    /// The request that a record names comes next, and may have run for another daemon.
    pub fn doubt(&mut self, record: &RecordHeader) -> Result<(), SlotError> {
        let (slots, at) = self.place(record)?;
        slots.doubt(at)
    }

    /// Begins a request that may have run before, or ends it where it must not run twice.
    pub fn begin_unsure(
        &mut self,
        record: &RecordHeader,
        opcode: u32,
        runs_once: bool,
    ) -> Result<Begin, SlotError> {
        let (slots, at) = self.place(record)?;
        if runs_once {
            slots.give_up(at)?;
            return Ok(Begin::Replay);
        }
        slots.trust(at)?;
        slots.begin(at, opcode)
    }

    /// Nobody will take the reply to the request that a record names.
    pub fn abandon(&mut self, record: &RecordHeader) -> Result<Abandon, SlotError> {
        let (slots, at) = self.place(record)?;
        slots.abandon(at)
    }

    /// Whether the request that a CANCEL names is being executed.
    pub fn is_running(&mut self, record: &RecordHeader) -> bool {
        self.place(record).is_ok_and(|(slots, at)| slots.is_running(at))
    }

    /// Sets reply bytes aside; false while the peer has too many to take first.
    pub fn reserve(&mut self, bytes: usize) -> bool {
        self.reserve_within(bytes, REPLY_BYTES_PER_CONN_MAX)
    }

    /// As [`Connection::reserve`] with a bound of the session's own.
    pub fn reserve_within(&mut self, bytes: usize, most: usize) -> bool {
        // Where no large one fits any more, small ones still do.
        let spare = if bytes > REPLY_INLINE_BYTES_MAX { 0 } else { 2 * REPLY_INLINE_BYTES_MAX };
        let max = most + spare;
        let held = self.reply_bytes();
        let fits = held == 0 || held + bytes <= max;
        if fits {
            self.reserved += bytes;
        }
        fits
    }

    /// Whether the request that is looked at may run, which moves so many bytes. It is paid for
    /// when this is asked first. One that lies in a large buffer may always: others need the
    /// buffer, and what comes next waits the longer.
    pub fn may_run(&mut self, bytes: usize, in_large: bool) -> bool {
        let now = Instant::now();
        let quota = &self.session.fs.quota;
        let change = quota.change();
        let runs_at = match self.runs_at {
            Some((runs_at, under)) if under == change => runs_at,
            Some(_) | None => now + quota.take(bytes as u64),
        };
        self.runs_at = Some((runs_at, change));
        runs_at <= now || in_large
    }

    /// What was set aside is not needed.
    pub fn unreserve(&mut self, bytes: usize) {
        self.reserved -= bytes;
    }

    /// Bytes of replies that are being made or wait to be sent.
    fn reply_bytes(&self) -> usize {
        self.reserved + self.link.bytes()
    }

    /// A request is over: what becomes of its reply.
    pub fn settle(&mut self, tag: &RequestTag, errno: u32, body: &[u8]) -> Fate {
        self.unreserve(tag.reserved as usize);
        let fate = self.lane(tag.lane).and_then(|slots| slots.finish(tag.at, errno, body).ok());
        debug_assert!(fate.is_some(), "a reply to {tag:?}, which is not running");
        fate.unwrap_or(Fate::Keep)
    }

    /// As [`Connection::settle`] for a request that came in just now, with a body of `len` bytes in
    /// what [`Link::reply_room`] gave: its reply goes out.
    pub fn reply_made(&mut self, tag: &RequestTag, errno: u32, len: usize) {
        self.reserved -= tag.reserved as usize;
        let conns = self.session.terms.conns;
        if let Some(slots) = self.lanes.get_mut(usize::from(u16::from(tag.lane) / conns)) {
            let finished = slots.finish(tag.at, errno, self.link.room(len));
            debug_assert_eq!(finished, Ok(Fate::Send), "a reply to {tag:?}");
        }
        self.link.commit(reply_header(tag, errno, len));
    }

    /// Sends the kept reply of a request that came again, and what finds the nodes that it gives.
    pub fn replay(
        &mut self,
        record: &RecordHeader,
        request: Option<&Request<'_>>,
        notes: &Notes,
        buffers: &mut BufferPool,
    ) {
        let conns = self.session.terms.conns;
        let Some(slots) = self.lanes.get(usize::from(u16::from(record.lane) / conns)) else {
            return;
        };
        let at = SlotUse { slot: record.slot, seq: record.slot_seq };
        if let Some((errno, body)) = slots.kept(at) {
            if let Some(request) = request.filter(|_| errno == 0) {
                self.session.fs.note_again(request, body, notes);
                self.link.push_nodes(&notes.body(), buffers);
                notes.clear();
            }
            let tag = RequestTag::of(0, record);
            self.link.reply(reply_header(&tag, errno, body.len()), body, buffers);
        }
    }

    /// Whether what it has sent is not read on, for want of a buffer or by a rate.
    pub fn is_kept_waiting(&self) -> bool {
        (self.link.starving || self.delayed) && self.link.has_input()
    }

    /// Whether one batch takes the peer longer than `limit`: one that comes in and holds a large
    /// buffer, or one that goes out while more is held than a small buffer has.
    pub fn is_stalled(&self, now: Instant, limit: Duration) -> bool {
        let link = &self.link;
        let holds = link.closing.is_some() || self.reply_bytes() > REPLY_INLINE_BYTES_MAX;
        let since = [link.receiving_since, link.sending_since.filter(|_| holds), link.room_since];
        since.into_iter().flatten().any(|since| now.saturating_duration_since(since) > limit)
    }
}

/// The header of a reply with a body of `len` bytes.
pub fn reply_header(tag: &RequestTag, errno: u32, len: usize) -> RecordHeader {
    RecordHeader {
        len: (RECORD_HEADER_BYTES + len) as u32,
        kind: Kind::Reply as u8,
        lane: tag.lane,
        slot: tag.at.slot,
        slot_seq: tag.at.seq,
        code: errno,
    }
}
