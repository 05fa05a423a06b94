//! What a shard does with a request: the answer at once, the ring, or the pool.
//!
//! Part of [`Shard`]: here is what happens between a REQUEST and its REPLY, and to a FORGET; READ
//! and WRITE go on in `file_io.rs`.

use super::*;
use crate::decide::Outcome;
use crate::dispatch::{REQUEST_HEAD_BYTES, Route};
use crate::handles::Last;
use crate::intent;
use crate::nodes::Released;
use crate::pool::{Body, Job};
use ringfs_wire::abi::{ForgetOne, NotifyStoreOut, Opcode};
use ringfs_wire::batch::notify;
use ringfs_wire::limits::FORGETS_PER_RECORD_MAX;
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
            most = fs.quota.in_flight(conn.session.terms.conns, most);
            let bytes = match &route {
                Route::Write { payload, .. } => payload.len(),
                Route::Pool if header.code == Opcode::Write as u32 => body.len(),
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
                self.let_go(key, Handle::File(file));
                self.answer(tag, synced.map(|()| &[][..]));
            }
            Route::Fsync { file, data_only } => {
                self.begin(tag, Io::Fsync { file, data_only });
            }
            Route::Pool => {
                tag.place = Place::Pool;
                let shard_ns = self.job_ns();
                let long = fs.long_call(&request);
                let conn = &mut self.conns[key];
                conn.running += 1;
                self.shared.pool.submit(Job {
                    owner: conn.session.terms.owner,
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
                    long,
                });
            }
            Route::Release { fh, directory } => {
                let handle = fs.handles.remove(fh, request.nodeid, directory);
                let result = handle.map(|handle| self.let_go(key, handle));
                self.answer(tag, result.map(|()| &[][..]));
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
                        self.send_notes(tag.conn);
                        let conn = &mut self.conns[tag.conn];
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
    pub(super) fn reply_from(&mut self, tag: RequestTag, buf: Buf, len: usize) {
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

    /// What finds the nodes again that the next reply gives, and what the file holds that it opens.
    fn send_notes(&mut self, key: usize) {
        if self.notes.is_empty() {
            return;
        }
        let link = &mut self.conns[key].link;
        link.push_nodes(&self.notes.body(), &mut self.buffers);
        let content = self.notes.content().len().saturating_sub(size_of::<NotifyStoreOut>());
        if content > 0 {
            link.push(Kind::Notify, notify::STORE, &self.notes.content(), &mut self.buffers);
            self.was_read(key, content);
        }
        self.notes.clear();
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
        let conn = &mut self.conns[tag.conn];
        tag.place = Place::Ring;
        tag.owner = conn.session.terms.owner;
        conn.running += 1;
        self.submit(Op { io, tag: Tag::Request(tag) });
    }

    /// An operation of this connection has done with a handle, or it was given back. Where nothing
    /// else uses it, it closes: here, or in the pool where that frees many blocks.
    pub(super) fn let_go(&self, key: usize, handle: Handle) {
        let Some(last) = Last::of(handle) else { return };
        let session = &self.conns[key].session;
        let most = session.fs.blocks_freed_at_once();
        if last.blocks_freed() > most {
            let dear = (Released::default(), Some(last.into()));
            self.shared.pool.give_back(session.terms.owner, dear, most);
        }
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
        let owner = self.conns[key].session.terms.owner;
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
