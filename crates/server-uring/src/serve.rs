//! What a shard does with a request: the answer at once, the ring, or the pool.
//!
//! Part of [`Shard`]: here is what happens between a REQUEST and its REPLY.

use super::*;
use crate::decide::Outcome;
use crate::dispatch::REQUEST_HEAD_BYTES;
use crate::fdops;
use crate::intent;
use ringfs_wire::abi::Opcode;
use ringfs_wire::batch::notify;
use ringfs_wire::limits::RECORD_ALIGN;
use rustix::net::SendFlags;
use std::os::fd::AsFd;

impl<R: Ring> Shard<R> {
    pub(super) fn request(
        &mut self,
        key: usize,
        header: RecordHeader,
        batch: &Arc<Buf>,
        body: Range<usize>,
    ) -> Result<Step, Reason> {
        let Some(request) = Request::parse(header.code, &batch[body.clone()]) else {
            return Err(self.protocol(key, "a request that is too short"));
        };
        let conn = &mut self.conns[key];
        let fs = conn.session.fs.clone();
        let reserved = fs.reply_bytes_max(&request);
        let route = fs.route(&request);
        // A large reply has a buffer of its own, and so have bytes that must be aligned.
        let own_bytes = match &route {
            Route::Write { file, payload, .. } if file.direct => payload.len(),
            _ if reserved > REPLY_INLINE_BYTES_MAX => reserved,
            _ => 0,
        };
        let mut most = REPLY_BYTES_PER_CONN_MAX;
        if fs.quota.is_limited() {
            most = fs.quota.in_flight(conn.session.conns, most);
            let bytes = match &route {
                Route::Write { payload, .. } => payload.len(),
                Route::Read { len, .. } => *len as usize,
                _ => 0,
            };
            if !conn.may_run(bytes, batch.is_large()) {
                return Ok(Step::Delayed);
            }
        }
        let mut own = None;
        if own_bytes > 0 {
            own = self.buffers.for_bytes(own_bytes);
            if own.is_none() {
                return Ok(Step::Starved);
            }
        }
        if !conn.reserve_within(reserved, most) {
            fs.quota.is_full();
            own.into_iter().for_each(|buf| self.buffers.give(buf));
            return Ok(Step::PeerFull);
        }
        conn.runs_at = None;
        let (mut again, mut past) = (false, None);
        match conn.begin(&header, header.code) {
            Ok(Begin::Execute) => {}
            begun => {
                again = true;
                if begun == Ok(Begin::Decide) {
                    past = conn.past(&header);
                }
                let rerun = self.come_again(key, &header, Some(&request), begun);
                if !matches!(rerun, Ok(true)) {
                    self.conns[key].unreserve(reserved);
                    own.into_iter().for_each(|buf| self.buffers.give(buf));
                    return rerun.map(|_| Step::Taken);
                }
            }
        }
        let mut tag = RequestTag::of(key, &header);
        tag.reserved = reserved as u32;
        self.op_begins(&mut tag, request.nodeid);
        let session = &self.conns[key].session;
        // Finding out what became of it may wait.
        let route = if past.is_some() { Route::Pool } else { route };
        match route {
            Route::Inline => {
                if let Some(file) = &session.file
                    && let Some(intent) = fs.intent(&request)
                {
                    file.intend(tag.lane, tag.at, &intent);
                }
                self.notes.begin(self.conns[key].index, again);
                return Ok(self.execute(tag, &fs, &request, own));
            }
            Route::Read { file, offset, len } => {
                self.begin_read(tag, file, offset, reserved.min(len as usize), own.take());
            }
            Route::Write { file, offset, payload, pages } => {
                tag.pages = pages;
                if let Some(state) = session.file.as_ref().filter(|_| file.append && !pages) {
                    state.intend(tag.lane, tag.at, &intent::of_append(&file));
                }
                // `payload` counts from the arguments, which end where the body's extension starts.
                let args_at = body.start + REQUEST_HEAD_BYTES;
                let range = args_at + payload.start..args_at + payload.end;
                self.begin_write(tag, file, offset, batch, range, own.take());
            }
            // Nothing to wait for, and the ring would ask a worker thread.
            Route::Fsync { file, data_only } if file.memory && !self.ring.takes_all() => {
                let synced = match data_only {
                    true => rustix::fs::fdatasync(file.as_fd()),
                    false => rustix::fs::fsync(file.as_fd()),
                };
                self.answer(tag, synced.map(|()| &[][..]));
            }
            Route::Fsync { file, data_only } => {
                self.begin(tag, Io::Fsync { file, data_only });
            }
            Route::Pool => {
                tag.place = Place::Pool;
                let shard_ns = self.job_ns();
                let conn = &mut self.conns[key];
                conn.running += 1;
                self.shared.pool.submit(Job {
                    owner: conn.session.owner,
                    session: conn.session.id,
                    fs,
                    opcode: header.code,
                    body: Body::of(batch, body),
                    tag,
                    own: own.take(),
                    conn: conn.index,
                    again,
                    place: conn.session.file.as_ref().and_then(|f| f.intent(tag.lane, tag.at)),
                    past,
                    mailbox: self.shared.mailbox.clone(),
                    queued: Instant::now(),
                    shard_ns,
                });
            }
            Route::Refuse(errno) => self.answer(tag, Err(errno)),
            // Such a frame has no place in a REQUEST; its slot is freed all the same.
            Route::NoReply => self.answer(tag, Err(Errno::NOSYS)),
        }
        own.into_iter().for_each(|buf| self.buffers.give(buf));
        Ok(Step::Taken)
    }

    fn execute(
        &mut self,
        tag: RequestTag,
        fs: &crate::fs::Fs,
        request: &Request,
        own: Option<Buf>,
    ) -> Step {
        let conn = &mut self.conns[tag.conn];
        let request = &request.noting(&self.notes);
        match own {
            None => {
                let len = tag.reserved as usize;
                let room = conn.link.reply_room(len, &mut self.buffers);
                let mut failed = 0;
                match fs.execute(request, &mut room[..len]) {
                    Ok(len) if self.notes.is_empty() => conn.reply_made(&tag, 0, len),
                    Ok(len) => {
                        self.scratch.clear();
                        self.scratch.extend_from_slice(&room[..len]);
                        conn.link.push_nodes(&self.notes.body(), &mut self.buffers);
                        self.notes.clear();
                        let room = conn.link.reply_room(len, &mut self.buffers);
                        room[..len].copy_from_slice(&self.scratch);
                        conn.reply_made(&tag, 0, len);
                    }
                    Err(errno) => {
                        failed = errno.raw_os_error() as u32;
                        conn.reply_made(&tag, failed, 0);
                        add(&self.shared.stats.errors, 1);
                    }
                }
                self.op_ends(&tag, failed, true);
            }
            Some(mut buf) => match fs.execute(request, &mut buf[BODY_AT..]) {
                Ok(len) => self.reply_from(tag, buf, len),
                Err(errno) => {
                    self.buffers.give(buf);
                    self.answer(tag, Err(errno));
                }
            },
        }
        Step::Taken
    }

    /// Answers from a buffer with the body at [`BODY_AT`]: as it is if large, else copied.
    fn reply_from(&mut self, tag: RequestTag, buf: Buf, len: usize) {
        if !self.settle(&tag, 0, &buf[BODY_AT..BODY_AT + len]) {
            self.notes.clear();
            return self.buffers.give(buf);
        }
        self.send_notes(tag.conn);
        let link = &mut self.conns[tag.conn].link;
        let header = reply_header(&tag, 0, len);
        if len > REPLY_INLINE_BYTES_MAX {
            link.reply_large(header, buf);
        } else {
            link.reply(header, &buf[BODY_AT..BODY_AT + len], &mut self.buffers);
            self.buffers.give(buf);
        }
    }

    pub(super) fn answer(&mut self, tag: RequestTag, result: Result<&[u8], Errno>) {
        let (errno, body) = match result {
            Ok(body) => (0, body),
            Err(errno) => (errno.raw_os_error() as u32, &[][..]),
        };
        add(&self.shared.stats.errors, usize::from(errno != 0));
        if self.settle(&tag, errno, body) {
            self.send_notes(tag.conn);
            let header = reply_header(&tag, errno, body.len());
            self.conns[tag.conn].link.reply(header, body, &mut self.buffers);
        }
        self.notes.clear();
        self.touched.push(tag.conn);
    }

    /// What finds the nodes again that the next reply gives.
    fn send_notes(&mut self, key: usize) {
        if !self.notes.is_empty() {
            self.conns[key].link.push_nodes(&self.notes.body(), &mut self.buffers);
            self.notes.clear();
        }
    }

    /// Answers a request that was in flight.
    pub(super) fn finish(&mut self, tag: RequestTag, result: Result<&[u8], Errno>) {
        self.conns[tag.conn].running -= 1;
        self.answer(tag, result);
    }

    /// Answers a request that the pool has executed.
    pub(super) fn executed(&mut self, done: Done) {
        let Done { tag, result, small, own, outcome, notes, batch, waited_us } = done;
        self.waited_us = waited_us;
        add(&self.shared.stats.recovered, usize::from(outcome.is_some()));
        add(&self.shared.stats.ambiguous, usize::from(outcome == Some(Outcome::Ambiguous)));
        batch.into_iter().for_each(|batch| self.buffers.give_shared(batch));
        if !notes.is_empty() {
            self.notes = Notes::of(notes);
        }
        match (own, result) {
            (Some(buf), Ok(len)) => {
                self.conns[tag.conn].running -= 1;
                self.reply_from(tag, buf, len);
                self.touched.push(tag.conn);
            }
            (own, result) => {
                own.into_iter().for_each(|buf| self.buffers.give(buf));
                self.finish(tag, result.map(|len| &small[..len]));
            }
        }
    }

    pub(super) fn begin(&mut self, mut tag: RequestTag, io: Io) {
        tag.place = Place::Ring;
        self.conns[tag.conn].running += 1;
        self.submit(Op { io, tag: Tag::Request(tag) });
    }

    /// Reads what is in the page cache at once, and the rest by the ring.
    fn begin_read(
        &mut self,
        tag: RequestTag,
        file: Arc<OpenFile>,
        offset: u64,
        len: usize,
        own: Option<Buf>,
    ) {
        let own = match own {
            Some(buf) if !file.direct && (file.memory || file.nowait) && !self.ring.takes_all() => {
                return self.put_off(bulk::Bulk { tag, file, offset, len, buf });
            }
            own => own,
        };
        let conn = &mut self.conns[tag.conn];
        let try_cache = !self.ring.takes_all();
        let buf = match own {
            // Not for the cache to answer: see `put_off`.
            Some(buf) => buf,
            None if !try_cache => self.buffers.small(),
            None => {
                let room = conn.link.reply_room(len, &mut self.buffers);
                match read_cached(&file, &mut room[..len], offset) {
                    Cached::All(n) => {
                        conn.reply_made(&tag, 0, n);
                        self.was_read(tag.conn, n);
                        return self.op_ends(&tag, 0, true);
                    }
                    Cached::Part(_) => {}
                    Cached::Failed(errno) => return self.answer(tag, Err(errno)),
                }
                self.buffers.small()
            }
        };
        self.begin(tag, Io::Read { file, buf, range: BODY_AT..BODY_AT + len, offset });
    }

    /// A ring read is over: goes on after a short one, answers at the end of the file.
    pub(super) fn read(
        &mut self,
        tag: RequestTag,
        file: Arc<OpenFile>,
        buf: Buf,
        range: Range<usize>,
        offset: u64,
        result: IoResult,
    ) {
        self.conns[tag.conn].running -= 1;
        let n = match result {
            Ok(n) => n,
            Err(Errno::INTR | Errno::AGAIN) => {
                return self.begin(tag, Io::Read { file, buf, range, offset });
            }
            // Also after some bytes: a short answer would be the end of the file to the guest.
            Err(errno) => {
                self.buffers.give(buf);
                return self.answer(tag, Err(errno));
            }
        };
        // A direct read that ends off the block size has met the end of the file.
        let more = n > 0 && n < range.len() && !file.direct;
        if more {
            let (range, offset) = (range.start + n..range.end, offset + n as u64);
            return self.begin(tag, Io::Read { file, buf, range, offset });
        }
        self.read_done(tag, buf, range.start + n - BODY_AT);
    }

    /// Answers a large read by the pages themselves; else gives the buffer back untouched. See
    /// splice.rs.
    pub(super) fn splice(
        &mut self,
        tag: RequestTag,
        file: &OpenFile,
        offset: u64,
        len: usize,
        mut buf: Buf,
    ) -> Result<(), Buf> {
        if len < SPLICE_BYTES_MIN || !file.memory || !self.socket_takes(tag.conn, len) {
            return Err(buf);
        }
        let Some(taken) = self.splicer.take(file.as_fd(), offset, len) else { return Err(buf) };
        let head = BODY_AT..BODY_AT + SPLICE_HEAD_BYTES;
        let short = taken < SPLICE_BYTES_MIN || !taken.is_multiple_of(RECORD_ALIGN);
        if short || self.splicer.read(&mut buf[head.clone()]).is_err() {
            self.splicer.discard();
            return Err(buf);
        }
        self.was_read(tag.conn, taken);
        let wanted = self.settle(&tag, 0, &[]);
        let link = &mut self.conns[tag.conn].link;
        let Some(socket) = link.socket.clone().filter(|_| wanted) else {
            self.splicer.discard();
            self.buffers.give(buf);
            return Ok(());
        };
        let batch = link.reply_spliced(reply_header(&tag, 0, taken), &mut buf);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL | SendFlags::MORE;
        let sent = rustix::net::send(&socket, &buf[batch.start..head.end], flags).unwrap_or(0);
        let mut at = batch.start + sent;
        if at == head.end {
            at += self.splicer.pour(socket.as_fd(), batch.end - at);
        }
        link.sent += (at - batch.start) as u64;
        if at == batch.end {
            self.buffers.give(buf);
            add(&self.shared.stats.batches_out, 1);
            return Ok(());
        }
        if self.splicer.read(&mut buf[at.max(head.end)..batch.end]).is_err() {
            // What was promised cannot be had any more: better no connection than wrong bytes. The
            // receive that is in flight, or comes next, finds it ended.
            let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Both);
            self.buffers.give(buf);
            return Ok(());
        }
        self.conns[tag.conn].link.queue_rest(buf, at..batch.end);
        self.touched.push(tag.conn);
        Ok(())
    }

    fn socket_takes(&mut self, key: usize, len: usize) -> bool {
        let link = &mut self.conns[key].link;
        let Some(socket) = link.socket.as_ref().filter(|_| link.can_splice()) else { return false };
        if link.send_buffer == SendBuffer::Unknown && self.large_sockets < SPLICE_SOCKETS_MAX {
            link.send_buffer = SendBuffer::enlarge(socket.as_fd());
            self.large_sockets += usize::from(matches!(link.send_buffer, SendBuffer::Bytes(_)));
        }
        link.send_buffer.has_room(socket.as_fd(), len)
    }

    pub(super) fn read_done(&mut self, tag: RequestTag, buf: Buf, len: usize) {
        self.was_read(tag.conn, len);
        self.reply_from(tag, buf, len);
        self.touched.push(tag.conn);
    }

    fn begin_write(
        &mut self,
        tag: RequestTag,
        file: Arc<OpenFile>,
        offset: u64,
        batch: &Arc<Buf>,
        range: Range<usize>,
        own: Option<Buf>,
    ) {
        if file.memory && !self.ring.takes_all() {
            // No disk can make this wait, and the ring would send it to a worker thread.
            let result = fdops::write_all_at(file.as_fd(), offset, &batch[range], tag.pages);
            return self.write_answer(tag, result);
        }
        if let Some(mut aligned) = own {
            let len = range.len();
            aligned[..len].copy_from_slice(&batch[range]);
            let buf = Arc::new(aligned);
            return self.begin(tag, Io::Write { file, buf, range: 0..len, offset });
        }
        self.begin(tag, Io::Write { file, buf: batch.clone(), range, offset });
    }

    /// A ring write is over: goes on after a short one.
    pub(super) fn wrote(
        &mut self,
        mut tag: RequestTag,
        file: Arc<OpenFile>,
        buf: Arc<Buf>,
        range: Range<usize>,
        offset: u64,
        result: IoResult,
    ) {
        self.conns[tag.conn].running -= 1;
        let result = match result {
            Err(Errno::INTR | Errno::AGAIN) => {
                return self.begin(tag, Io::Write { file, buf, range, offset });
            }
            Ok(n) if 0 < n && n < range.len() => {
                tag.stored += n as u32;
                let (range, offset) = (range.start + n..range.end, offset + n as u64);
                return self.begin(tag, Io::Write { file, buf, range, offset });
            }
            Ok(n) if tag.pages && n < range.len() => Err(Errno::IO),
            Ok(n) => Ok(tag.stored as usize + n),
            // The error comes with the guest's next write, as write(2) has it.
            Err(_) if tag.stored > 0 && !tag.pages => Ok(tag.stored as usize),
            Err(errno) => Err(errno),
        };
        self.buffers.give_shared(buf);
        self.write_answer(tag, result);
    }

    fn write_answer(&mut self, tag: RequestTag, result: IoResult) {
        if let Ok(n) = result {
            self.was_written(tag.conn, n);
        }
        let out = result.map(|n| WriteOut { size: n as u32, padding: 0 });
        self.answer(tag, out.as_ref().map(WriteOut::as_bytes).map_err(|&errno| errno));
    }

    /// Asks the guest for nodes where it soon knows as many as it may.
    pub(super) fn ask_back(&mut self, key: usize) {
        let conn = &mut self.conns[key];
        // Who does not take what there is gets no more of it.
        if conn.link.closing.is_some() || conn.link.bytes() > REPLY_INLINE_BYTES_MAX {
            return;
        }
        let ids = conn.session.fs.nodes.wanted_back();
        if !ids.is_empty() {
            add(&self.shared.stats.wanted_back, ids.len());
            let body = ids.as_bytes();
            conn.link.push(Kind::Notify, notify::GIVE_BACK, body, &mut self.buffers);
        }
    }

    pub(super) fn forget(
        &mut self,
        key: usize,
        header: RecordHeader,
        body: &[u8],
    ) -> Result<Step, Reason> {
        let forgets = <[ForgetOne]>::ref_from_bytes(body).ok();
        let entries = body.len() / size_of::<ForgetOne>();
        if !body.len().is_multiple_of(size_of::<ForgetOne>()) || entries > FORGETS_PER_RECORD_MAX {
            return Err(self.protocol(key, "a FORGET of a length that cannot be"));
        }
        let conn = &mut self.conns[key];
        // The slot is free again before the guest has read the answer, so it bounds nothing.
        if !conn.reserve(0) {
            return Ok(Step::PeerFull);
        }
        let opcode = Opcode::Forget as u32;
        match conn.begin(&header, opcode) {
            Ok(Begin::Execute) => {}
            begun => {
                if !self.come_again(key, &header, None, begun)? {
                    return Ok(Step::Taken);
                }
            }
        }
        let fs = self.conns[key].session.fs.clone();
        let mut released = match forgets {
            Some(forgets) => fs.forget_later(forgets.iter().map(|one| (one.nodeid, one.nlookup))),
            // Not aligned where it lies.
            None => {
                fs.forget_later(body.chunks_exact(size_of::<ForgetOne>()).filter_map(|bytes| {
                    let one = ForgetOne::read_from_bytes(bytes).ok()?;
                    Some((one.nodeid, one.nlookup))
                }))
            }
        };
        let owner = self.conns[key].session.owner;
        let most = fs.blocks_freed_at_once();
        if released.len() > RELEASED_INLINE_MAX {
            self.shared.pool.release(owner, released, most);
        } else {
            self.shared.pool.free(owner, released.take_dear(most));
        }
        let mut tag = RequestTag::of(key, &header);
        tag.opcode = opcode as u8;
        self.op_begins(&mut tag, 0);
        self.answer(tag, Ok(&[]));
        Ok(Step::Taken)
    }
}

/// Nodes of one FORGET that are closed on the shard itself.
const RELEASED_INLINE_MAX: usize = 64;

/// What the page cache had of a range.
pub(super) enum Cached {
    /// All of it, or all up to the end of the file.
    All(usize),
    /// So many bytes; the rest is on the disk.
    Part(usize),
    Failed(Errno),
}

pub(super) fn read_cached(file: &OpenFile, room: &mut [u8], offset: u64) -> Cached {
    if file.direct || !(file.nowait || file.memory) {
        return Cached::Part(0);
    }
    let mut done = 0;
    while done < room.len() {
        let (at, rest) = (offset + done as u64, &mut room[done..]);
        let read = match file.memory {
            true => fdops::read_at(file.as_fd(), at, rest),
            false => fdops::try_read_nowait(file.as_fd(), at, rest),
        };
        match read {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::AGAIN | Errno::OPNOTSUPP) => return Cached::Part(done),
            Err(errno) => return Cached::Failed(errno),
        }
    }
    Cached::All(done)
}
