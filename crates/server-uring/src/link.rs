//! What belongs to one socket: bytes in, batches out. No fd is touched here; the shard moves the
//! bytes.
//!
//! Received bytes lie in a [`Buf`]; whole batches are worked through where they lie, shared with
//! the operations that write from them. What is left of an incomplete batch moves to the front of
//! the next buffer. Replies gather in one batch until the socket is free; large ones are sent from
//! the buffer that they were read into. Nothing here outlives the socket: what must is in
//! connection.rs.

use crate::buffers::{Buf, BufferPool};
use crate::limits::*;
use crate::shard::Asked;
use crate::splice::SendBuffer;
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader, peek_len};
use ringfs_wire::hello::{Reason, Ticket};
use ringfs_wire::limits::*;
use ringfs_wire::restore::split_nodes;
use ringfs_wire::session::{LinkError, LinkRx, LinkTx};
use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

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

/// The numbers of a connection's batches, both ways, after its handshake.
pub struct Numbers {
    /// Sends.
    pub tx: LinkTx,
    /// Receives.
    pub rx: LinkRx,
}

/// One socket of a connection, or none.
pub struct Link {
    /// The stream; none between a cut and the resume.
    pub socket: Option<Arc<OwnedFd>>,
    /// Operations on the socket that are in flight.
    pub in_flight: usize,
    /// It may have no large buffer now: its session has to wait for a rate.
    pub hold_large: bool,
    /// Why it ends, once it does.
    pub closing: Option<Reason>,
    /// Nothing can be sent or received any more.
    pub dead: bool,
    /// It is in the shard's list of those that wait for a large buffer.
    pub starving: bool,
    /// The ticket that its WELCOME gave, until something shows that this has arrived.
    pub unproven: Option<Ticket>,
    /// Its peer was asked whether it lives.
    pub(crate) asked: Option<Asked>,
    /// Since when large replies wait until the peer has taken most of what was sent.
    pub room_since: Option<Instant>,
    /// Since when a large buffer waits for the rest of its batch.
    pub receiving_since: Option<Instant>,
    /// Since when the batch that is being sent is being sent.
    pub sending_since: Option<Instant>,
    /// What the socket holds of large replies that are spliced into it.
    pub send_buffer: SendBuffer,
    /// Bytes that the socket has taken so far.
    pub sent: u64,
    payload_crc: bool,
    tx: LinkTx,
    rx: LinkRx,
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
    /// Bytes of replies that wait to be sent, but for the batch that gathers.
    bytes: usize,
}

impl Link {
    /// A socket whose handshake is over.
    pub fn new(socket: Arc<OwnedFd>, numbers: Numbers, payload_crc: bool) -> Link {
        let Numbers { mut tx, mut rx } = numbers;
        tx.set_payload_crc(payload_crc);
        rx.set_payload_crc(payload_crc);
        let (socket, input) = (Some(socket), Input::Receiving);
        Link { socket, payload_crc, tx, rx, input, ..Link::none() }
    }

    /// No socket: nothing comes in, and nothing may go out.
    pub fn none() -> Link {
        Link {
            socket: None,
            in_flight: 0,
            hold_large: false,
            closing: None,
            dead: false,
            starving: false,
            unproven: None,
            asked: None,
            room_since: None,
            receiving_since: None,
            sending_since: None,
            send_buffer: SendBuffer::Unknown,
            sent: 0,
            payload_crc: true,
            tx: LinkTx::new(true),
            rx: LinkRx::new(true),
            input: Input::Ended,
            builder: BatchBuilder::new(),
            building: None,
            queue: VecDeque::new(),
            large: VecDeque::new(),
            large_next: false,
            sending: false,
            bytes: 0,
        }
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
    /// [`Link::record_taken`] says that it was worked on.
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
                let Some(large) = self.large_for_input(buffers) else {
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
            let Some(large) = self.large_for_input(buffers) else {
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

    fn large_for_input(&self, buffers: &mut BufferPool) -> Option<Buf> {
        if self.hold_large { None } else { buffers.large_for_input() }
    }

    /// The record that [`Link::poll_input`] gave last was worked on: the next one comes.
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

    /// The first `len` bytes of what [`Link::reply_room`] gave last.
    pub fn room(&mut self, len: usize) -> &[u8] {
        match &mut self.building {
            Some(buf) => &self.builder.spare(buf)[RECORD_HEADER_BYTES..][..len],
            None => &[],
        }
    }

    /// The body of a record stands in what [`Link::reply_room`] gave.
    pub fn commit(&mut self, header: RecordHeader) {
        if let Some(buf) = &mut self.building {
            self.builder.commit(buf, header);
        }
    }

    /// A small record whose body is elsewhere.
    pub fn reply(&mut self, header: RecordHeader, body: &[u8], buffers: &mut BufferPool) {
        self.reply_room(body.len(), buffers)[..body.len()].copy_from_slice(body);
        self.commit(header);
    }

    /// A reply whose body stands at [`BODY_AT`] of its own buffer.
    pub fn reply_large(&mut self, header: RecordHeader, buf: Buf) {
        self.bytes += header.len as usize - RECORD_HEADER_BYTES;
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
        !self.has_output() && self.closing.is_none() && self.socket.is_some() && !self.payload_crc
    }

    /// As [`Link::reply_large`] for a body of which the first [`SPLICE_HEAD_BYTES`] alone stand in
    /// `buf`. What the range names must be sent next, the body's rest behind it.
    pub fn reply_spliced(&mut self, header: RecordHeader, buf: &mut Buf) -> Range<usize> {
        debug_assert!(self.can_splice() && (header.len as usize).is_multiple_of(RECORD_ALIGN));
        self.seal_large(buf, header)
    }

    /// The rest of a spliced reply that the socket did not take, now as bytes.
    pub fn queue_rest(&mut self, buf: Buf, range: Range<usize>) {
        self.bytes += range.len();
        self.queue.push_front((buf, range));
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

    /// What finds nodes again: it leaves before the reply that gives them.
    pub fn push_nodes(&mut self, body: &[u8], buffers: &mut BufferPool) {
        for part in split_nodes(body, REPLY_INLINE_BYTES_MAX) {
            self.push(Kind::Node, 0, part, buffers);
        }
    }

    /// Closes the batch that gathers and queues it.
    fn seal(&mut self) {
        if self.builder.is_empty() {
            return;
        }
        if let Some(mut buf) = self.building.take() {
            let len = self.tx.seal(&mut self.builder, &mut buf, self.rx.received()).len();
            self.bytes += len;
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
                    self.bytes += range.len();
                    self.bytes -= header.len as usize - RECORD_HEADER_BYTES;
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
        self.sent += done as u64;
        // None of it counts any more where the output was dropped meanwhile.
        self.bytes = self.bytes.saturating_sub(done.min(range.len()));
        if done < range.len() {
            return Some((buf, range.start + done..range.end));
        }
        self.sending = false;
        // An idle connection keeps nothing; a busy one builds its next batch here.
        buffers.give(buf);
        None
    }

    /// Bytes of replies that wait to be sent.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether anything waits to be sent or is being sent.
    pub fn has_output(&self) -> bool {
        let waits = !self.queue.is_empty() || !self.large.is_empty();
        self.sending || waits || !self.builder.is_empty()
    }

    /// Drops what waits to be sent; used when the socket is dead.
    pub fn drop_output(&mut self, buffers: &mut BufferPool) {
        (self.sending, self.large_next, self.bytes) = (false, false, 0);
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
