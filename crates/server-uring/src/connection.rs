//! One connection: bytes in, batches out. No fd is touched here; the shard moves the bytes.
//!
//! Received bytes lie in a [`Buf`]; whole batches are worked through where they lie, shared with
//! the operations that write from them. What is left of an incomplete batch moves to the front of
//! the next buffer. Replies gather in one batch until the socket is free; large ones are sent from
//! the buffer that they were read into.

use crate::buffers::{Buf, BufferPool};
use crate::limits::*;
use crate::op::RequestTag;
use crate::session::Session;
use crate::splice::SendBuffer;
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader, peek_len};
use ringfs_wire::hello::{Reason, feature};
use ringfs_wire::limits::*;
use ringfs_wire::session::{LinkError, LinkRx, LinkTx};
use ringfs_wire::slot::{ServerSlots, SlotError, SlotUse};
use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where a large reply's body starts in its buffer: aligned, with room for both headers before it.
pub const BODY_AT: usize = BUFFER_ALIGN;
/// Where the batch of a large reply starts.
const LARGE_BATCH_AT: usize = BODY_AT - BATCH_HEADER_BYTES - RECORD_HEADER_BYTES;

/// What the head checksum covers of a reply's body.
pub const SPLICE_HEAD_BYTES: usize = RECORD_HEAD_BYTES - RECORD_HEADER_BYTES;

/// What the bytes that came in are doing.
#[derive(Debug)]
enum Input {
    /// A receive holds the buffer.
    Receiving,
    /// `buf[range]` was received and is worked through.
    Working { buf: Arc<Buf>, range: Range<usize>, batch: Option<(Cursor, usize)> },
    /// `buf[range]` is the start of a batch that needs a larger buffer than there is now.
    Starved { buf: Buf, range: Range<usize> },
    /// Nothing more is read.
    Ended,
}

/// What the shard does next with the input.
#[derive(Debug)]
pub enum Next {
    /// A record: its header, and its body in the batch's buffer.
    Record(RecordHeader, Arc<Buf>, Range<usize>),
    /// Receive into this part of this buffer.
    Receive(Buf, Range<usize>),
    /// Nothing now.
    Wait,
}

/// One connection of a session.
pub struct Connection {
    /// The stream.
    pub socket: Arc<OwnedFd>,
    /// The session that it belongs to.
    pub session: Arc<Session>,
    /// Which of the session's connections it is.
    pub index: u16,
    /// Operations and jobs that will still name this connection.
    pub in_flight: usize,
    /// Why it ends, once it does.
    pub closing: Option<Reason>,
    /// It is in the shard's list of those that wait for a large buffer.
    pub starving: bool,
    /// Since when large replies wait until the peer has taken most of what was sent.
    pub room_since: Option<Instant>,
    /// Since when a large buffer waits for the rest of its batch.
    pub receiving_since: Option<Instant>,
    /// Since when the batch that is being sent is being sent.
    pub sending_since: Option<Instant>,
    /// What the socket holds of large replies that are spliced into it.
    pub send_buffer: SendBuffer,
    tx: LinkTx,
    rx: LinkRx,
    /// The tables of lanes `index`, `index + conns`, ...
    lanes: Vec<ServerSlots>,
    input: Input,
    builder: BatchBuilder,
    building: Option<Buf>,
    /// Batches in the order of their numbers.
    queue: VecDeque<(Buf, Range<usize>)>,
    /// Replies with a batch of their own, which have no number yet.
    large: VecDeque<(Buf, RecordHeader)>,
    /// A large one comes next, though small ones wait.
    large_next: bool,
    sending: bool,
    /// Bytes of replies that are being made or wait to be sent.
    reply_bytes: usize,
}

/// The halves of a connection's link after the handshake.
pub struct Link {
    /// Sends.
    pub tx: LinkTx,
    /// Receives.
    pub rx: LinkRx,
}

impl Connection {
    /// A connection whose handshake is over.
    pub fn new(
        socket: Arc<OwnedFd>,
        session: Arc<Session>,
        index: u16,
        mut link: Link,
    ) -> Connection {
        let payload_crc = session.features & feature::PAYLOAD_CRC != 0;
        link.tx.set_payload_crc(payload_crc);
        link.rx.set_payload_crc(payload_crc);
        let lanes = (index..session.lanes).step_by(session.conns as usize);
        let lanes = lanes.map(|_| ServerSlots::new(session.slots)).collect();
        Connection {
            socket,
            session,
            index,
            in_flight: 0,
            closing: None,
            starving: false,
            room_since: None,
            receiving_since: None,
            sending_since: None,
            send_buffer: SendBuffer::Unknown,
            tx: link.tx,
            rx: link.rx,
            lanes,
            input: Input::Receiving,
            builder: BatchBuilder::new(),
            building: None,
            queue: VecDeque::new(),
            large: VecDeque::new(),
            large_next: false,
            sending: false,
            reply_bytes: 0,
        }
    }

    /// Requests being executed.
    pub fn slots_in_use(&self) -> usize {
        self.lanes.iter().map(ServerSlots::in_use).sum()
    }

    /// The first receive: where to.
    pub fn start(&mut self, buffers: &mut BufferPool) -> (Buf, Range<usize>) {
        let buf = buffers.small();
        let len = buf.len();
        (buf, 0..len)
    }

    /// `buf[range]` was received.
    pub fn handle_received(&mut self, buf: Buf, range: Range<usize>, buffers: &mut BufferPool) {
        if self.closing.is_some() {
            self.input = Input::Ended;
            return buffers.give(buf);
        }
        self.input = Input::Working { buf: Arc::new(buf), range, batch: None };
    }

    /// The next thing to do with what came in. The same [`Next::Record`] is given until
    /// [`Connection::record_taken`] says that it was worked on.
    pub fn poll_input(&mut self, buffers: &mut BufferPool) -> Result<Next, LinkError> {
        loop {
            match std::mem::replace(&mut self.input, Input::Receiving) {
                Input::Receiving => return Ok(Next::Wait),
                Input::Ended => {
                    self.input = Input::Ended;
                    return Ok(Next::Wait);
                }
                Input::Starved { buf, range } => {
                    return self.receive_more(Some(buf), range, buffers);
                }
                Input::Working { buf, range, batch: Some((cursor, end)) } => {
                    let found = cursor.clone().next(&buf[range.start..end]);
                    let Some((header, span)) = found else {
                        let range = end..range.end;
                        self.input = Input::Working { buf, range, batch: None };
                        continue;
                    };
                    let body =
                        range.start + span.start + RECORD_HEADER_BYTES..range.start + span.end;
                    let batch = Some((cursor, end));
                    self.input = Input::Working { buf: buf.clone(), range, batch };
                    return Ok(Next::Record(header, buf, body));
                }
                Input::Working { buf, range, batch: None } => match peek_len(&buf[range.clone()]) {
                    Err(error) => {
                        self.input = Input::Working { buf, range, batch: None };
                        return Err(error.into());
                    }
                    Ok(Some(len)) if len <= range.len() => {
                        let bytes = &buf[range.start..range.start + len];
                        let accepted = self.rx.accept(bytes, self.tx.sent());
                        let batch = accepted
                            .as_ref()
                            .ok()
                            .map(|header| (Cursor::new(header), range.start + len));
                        self.input = Input::Working { buf, range, batch };
                        accepted?;
                    }
                    Ok(_) => return self.next_buffer(buf, range, buffers),
                },
            }
        }
    }

    /// All whole batches of `buf` are done; `buf[range]` is the start of the next, or empty.
    fn next_buffer(
        &mut self,
        buf: Arc<Buf>,
        range: Range<usize>,
        buffers: &mut BufferPool,
    ) -> Result<Next, LinkError> {
        match Arc::try_unwrap(buf) {
            // A large buffer with a small rest goes back, so that it is there for somebody's data.
            Ok(buf) if !buf.is_large() || range.len() > SMALL_BUFFER_BYTES => {
                self.receive_more(Some(buf), range, buffers)
            }
            Ok(large) => {
                let (small, range) = moved(&large[range], buffers.small());
                buffers.give(large);
                self.receive_more(Some(small), range, buffers)
            }
            Err(shared) if range.len() <= SMALL_BUFFER_BYTES => {
                let (small, range) = moved(&shared[range], buffers.small());
                buffers.give_shared(shared);
                self.receive_more(Some(small), range, buffers)
            }
            Err(shared) => {
                let Some(large) = buffers.large_for_input() else {
                    self.input = Input::Working { buf: shared, range, batch: None };
                    return Ok(Next::Wait);
                };
                let (large, range) = moved(&shared[range], large);
                buffers.give_shared(shared);
                self.receive_more(Some(large), range, buffers)
            }
        }
    }

    /// Makes room behind `buf[range]` for the rest of its batch.
    fn receive_more(
        &mut self,
        buf: Option<Buf>,
        range: Range<usize>,
        buffers: &mut BufferPool,
    ) -> Result<Next, LinkError> {
        let Some(mut buf) = buf else { return Ok(Next::Wait) };
        let want = peek_len(&buf[range.clone()])?.unwrap_or(BATCH_HEADER_BYTES);
        if want > buf.len() {
            let Some(large) = buffers.large_for_input() else {
                self.input = Input::Starved { buf, range };
                return Ok(Next::Wait);
            };
            let (large, range) = moved(&buf[range], large);
            buffers.give(buf);
            // Exactly this batch: nothing of the next one has to be moved again.
            return Ok(Next::Receive(large, range.end..want));
        }
        let len = range.len();
        buf.copy_within(range, 0);
        let end = if buf.is_large() { want } else { buf.len() };
        Ok(Next::Receive(buf, len..end))
    }

    /// The record that [`Connection::poll_input`] gave last was worked on: the next one comes.
    pub fn record_taken(&mut self) {
        if let Input::Working { range, buf, batch: Some((cursor, end)) } = &mut self.input {
            cursor.next(&buf[range.start..*end]);
        }
    }

    /// Whether received bytes wait to be worked on.
    pub fn has_input(&self) -> bool {
        matches!(self.input, Input::Working { .. } | Input::Starved { .. })
    }

    /// Gives back what the input holds; nothing more is read.
    pub fn end_input(&mut self, buffers: &mut BufferPool) {
        match std::mem::replace(&mut self.input, Input::Ended) {
            Input::Working { buf, .. } => buffers.give_shared(buf),
            Input::Starved { buf, .. } => buffers.give(buf),
            Input::Receiving => self.input = Input::Receiving,
            Input::Ended => {}
        }
    }

    /// The receive that was in flight is over and there will be no other.
    pub fn end_receiving(&mut self) {
        self.input = Input::Ended;
    }

    /// The received half counts batches for the statistics.
    pub fn batches_received(&self) -> u64 {
        self.rx.received()
    }

    fn lane(&mut self, lane: u8) -> Option<&mut ServerSlots> {
        let conns = self.session.conns;
        if u16::from(lane) % conns != self.index {
            return None;
        }
        self.lanes.get_mut(usize::from(u16::from(lane) / conns))
    }

    /// A request begins on its slot.
    pub fn begin(&mut self, record: &RecordHeader) -> Result<RequestTag, SlotError> {
        let at = SlotUse { slot: record.slot, seq: record.slot_seq };
        let slots = self.lane(record.lane).ok_or(SlotError::Range { slot: at.slot, granted: 0 })?;
        slots.begin(at)?;
        Ok(RequestTag { conn: 0, lane: record.lane, at, reserved: 0, stored: 0, pages: false })
    }

    /// Whether the request that a CANCEL names is being executed.
    pub fn is_running(&mut self, record: &RecordHeader) -> bool {
        let at = SlotUse { slot: record.slot, seq: record.slot_seq };
        self.lane(record.lane).is_some_and(|slots| slots.is_running(at))
    }

    /// Sets reply bytes aside; false while the peer has too many to take first.
    pub fn reserve(&mut self, bytes: usize) -> bool {
        // Where no large one fits any more, small ones still do.
        let spare = if bytes > REPLY_INLINE_BYTES_MAX { 0 } else { 2 * REPLY_INLINE_BYTES_MAX };
        let max = REPLY_BYTES_PER_CONN_MAX + spare;
        let fits = self.reply_bytes == 0 || self.reply_bytes + bytes <= max;
        if fits {
            self.reply_bytes += bytes;
        }
        fits
    }

    /// Room of at least `len` bytes for the body of a small reply, in the batch that gathers.
    pub fn reply_room(&mut self, len: usize, buffers: &mut BufferPool) -> &mut [u8] {
        let needed = (RECORD_HEADER_BYTES + len).next_multiple_of(RECORD_ALIGN);
        let full = self.builder.is_due()
            || self.building.as_ref().is_some_and(|buf| buf.len() - self.builder.len() < needed);
        if full {
            self.seal();
        }
        let buf = self.building.get_or_insert_with(|| buffers.small());
        &mut self.builder.spare(buf)[RECORD_HEADER_BYTES..]
    }

    /// The reply's body of `len` bytes stands in what [`Connection::reply_room`] gave.
    pub fn reply_made(&mut self, tag: &RequestTag, errno: u32, len: usize) {
        let header = self.finish(tag, errno, len);
        if let Some(buf) = &mut self.building {
            self.builder.commit(buf, header);
        }
    }

    /// A small reply whose body is elsewhere.
    pub fn reply(&mut self, tag: &RequestTag, errno: u32, body: &[u8], buffers: &mut BufferPool) {
        self.reply_room(body.len(), buffers)[..body.len()].copy_from_slice(body);
        self.reply_made(tag, errno, body.len());
    }

    /// A reply whose body of `len` bytes stands at [`BODY_AT`] of its own buffer.
    pub fn reply_large(&mut self, tag: &RequestTag, buf: Buf, len: usize) {
        let header = self.finish(tag, 0, len);
        self.reply_bytes += len;
        self.large.push_back((buf, header));
    }

    /// Completes the batch of one large reply.
    fn seal_large(&mut self, buf: &mut Buf, header: RecordHeader) -> Range<usize> {
        let room = &mut buf[LARGE_BATCH_AT..];
        let mut builder = BatchBuilder::new();
        builder.commit(room, header);
        let bytes = self.tx.seal(&mut builder, room, self.rx.received()).len();
        LARGE_BATCH_AT..LARGE_BATCH_AT + bytes
    }

    /// Whether a reply that is sent now would come behind nothing else, and without a checksum of
    /// its bytes.
    pub fn can_splice(&self) -> bool {
        !self.has_output()
            && self.closing.is_none()
            && self.session.features & feature::PAYLOAD_CRC == 0
    }

    /// As [`Connection::reply_large`] for a body of which the first [`SPLICE_HEAD_BYTES`] alone
    /// stand in `buf`. What the range names must be sent next, the body's rest behind it.
    pub fn reply_spliced(&mut self, tag: &RequestTag, buf: &mut Buf, len: usize) -> Range<usize> {
        debug_assert!(self.can_splice() && len.is_multiple_of(RECORD_ALIGN), "{len} bytes");
        let header = self.finish(tag, 0, len);
        self.seal_large(buf, header)
    }

    /// The rest of a spliced reply that the socket did not take, now as bytes.
    pub fn queue_rest(&mut self, buf: Buf, range: Range<usize>) {
        self.reply_bytes += range.len();
        self.queue.push_front((buf, range));
    }

    fn finish(&mut self, tag: &RequestTag, errno: u32, len: usize) -> RecordHeader {
        self.reply_bytes -= tag.reserved as usize;
        if let Some(slots) = self.lane(tag.lane) {
            let finished = slots.finish(tag.at);
            debug_assert!(finished.is_ok(), "a reply to {tag:?}, which is not running");
        }
        RecordHeader {
            len: (RECORD_HEADER_BYTES + len) as u32,
            kind: Kind::Reply as u8,
            lane: tag.lane,
            slot: tag.at.slot,
            slot_seq: tag.at.seq,
            code: errno,
        }
    }

    /// Adds a record that answers no request.
    pub fn push(&mut self, kind: Kind, code: u32, body: &[u8], buffers: &mut BufferPool) {
        self.reply_room(body.len(), buffers);
        if let Some(buf) = &mut self.building {
            let header = RecordHeader { kind: kind as u8, code, ..Default::default() };
            let pushed = self.builder.push(buf, header, body);
            debug_assert!(pushed, "reply_room made the room");
        }
    }

    /// Closes the batch that gathers and queues it.
    fn seal(&mut self) {
        if self.builder.is_empty() {
            return;
        }
        if let Some(mut buf) = self.building.take() {
            let len = self.tx.seal(&mut self.builder, &mut buf, self.rx.received()).len();
            self.reply_bytes += len;
            self.queue.push_back((buf, 0..len));
        }
    }

    /// What to send now, if the socket is free. Small replies do not wait behind all the large ones
    /// (a megabyte each), but behind one: they take turns. A GOODBYE comes after both.
    pub fn poll_send(&mut self) -> Option<(Buf, Range<usize>)> {
        if self.sending {
            return None;
        }
        if self.queue.is_empty() {
            let large_first = self.large_next || self.builder.is_empty() || self.closing.is_some();
            self.large_next = false;
            match self.large.pop_front_if(|_| large_first) {
                Some((mut buf, header)) => {
                    let range = self.seal_large(&mut buf, header);
                    // Counted so far: the body.
                    self.reply_bytes += range.len();
                    self.reply_bytes -= header.len as usize - RECORD_HEADER_BYTES;
                    self.queue.push_back((buf, range));
                }
                None => {
                    self.large_next = !self.large.is_empty();
                    self.seal();
                }
            }
        }
        let next = self.queue.pop_front();
        self.sending = next.is_some();
        next
    }

    /// A send is over: `done` of it were sent. Gives back what is left, if anything is.
    pub fn handle_sent(
        &mut self,
        buf: Buf,
        range: Range<usize>,
        done: usize,
        buffers: &mut BufferPool,
    ) -> Option<(Buf, Range<usize>)> {
        self.reply_bytes -= done.min(range.len());
        if done < range.len() {
            return Some((buf, range.start + done..range.end));
        }
        self.sending = false;
        // An idle connection keeps nothing; a busy one builds its next batch here.
        buffers.give(buf);
        None
    }

    /// Whether one batch takes the peer longer than `limit`: one that comes in and holds a large
    /// buffer, or one that goes out while more is held than a small buffer has.
    pub fn is_stalled(&self, now: Instant, limit: Duration) -> bool {
        let holds = self.closing.is_some() || self.reply_bytes > REPLY_INLINE_BYTES_MAX;
        let since = [self.receiving_since, self.sending_since.filter(|_| holds), self.room_since];
        since.into_iter().flatten().any(|since| now.saturating_duration_since(since) > limit)
    }

    /// Whether anything waits to be sent or is being sent.
    pub fn has_output(&self) -> bool {
        let waits = !self.queue.is_empty() || !self.large.is_empty();
        self.sending || waits || !self.builder.is_empty()
    }

    /// Drops what waits to be sent; used when the socket is dead.
    pub fn drop_output(&mut self, buffers: &mut BufferPool) {
        self.sending = false;
        self.builder = BatchBuilder::new();
        self.building.take().into_iter().for_each(|buf| buffers.give(buf));
        self.queue.drain(..).for_each(|(buf, _)| buffers.give(buf));
        self.large.drain(..).for_each(|(buf, _)| buffers.give(buf));
    }
}

/// Copies `bytes` to the start of `to`.
fn moved(bytes: &[u8], mut to: Buf) -> (Buf, Range<usize>) {
    to[..bytes.len()].copy_from_slice(bytes);
    (to, 0..bytes.len())
}
