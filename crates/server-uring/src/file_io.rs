//! What a shard does with READ and WRITE: the page cache at once, the pages themselves to the
//! socket, or the ring, which goes on after short ones.
//!
//! Part of [`Shard`]. Invariant: a request that was begun here is answered once, with all bytes
//! that the file had, or an error; and its buffer is given back.

use super::*;
use crate::fdops;
use crate::handles::Cached;
use crate::link::SPLICE_HEAD_BYTES;
use ringfs_wire::abi::WriteOut;
use ringfs_wire::limits::RECORD_ALIGN;
use rustix::net::SendFlags;
use std::os::fd::AsFd;

impl<R: Ring> Shard<R> {
    /// Reads what is in the page cache at once, and the rest by the ring.
    pub(super) fn begin_read(
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
                match file.read_cached(&mut room[..len], offset) {
                    Cached::All(n) => {
                        conn.reply_made(&tag, 0, n);
                        self.was_read(tag.conn, n);
                        self.let_go(tag.conn, Handle::File(file));
                        return self.op_ends(&tag, 0, true);
                    }
                    Cached::Part(_) => {}
                    Cached::Failed(errno) => {
                        self.let_go(tag.conn, Handle::File(file));
                        return self.answer(tag, Err(errno));
                    }
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
                self.let_go(tag.conn, Handle::File(file));
                return self.answer(tag, Err(errno));
            }
        };
        // A direct read that ends off the block size has met the end of the file.
        let more = n > 0 && n < range.len() && !file.direct;
        if more {
            let (range, offset) = (range.start + n..range.end, offset + n as u64);
            return self.begin(tag, Io::Read { file, buf, range, offset });
        }
        self.read_done(tag, file, buf, range.start + n - BODY_AT);
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

    pub(super) fn read_done(&mut self, tag: RequestTag, file: Arc<OpenFile>, buf: Buf, len: usize) {
        self.was_read(tag.conn, len);
        self.let_go(tag.conn, Handle::File(file));
        self.reply_from(tag, buf, len);
        self.touched.push(tag.conn);
    }

    pub(super) fn begin_write(
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
            return self.write_answer(tag, file, result);
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
        self.write_answer(tag, file, result);
    }

    fn write_answer(&mut self, tag: RequestTag, file: Arc<OpenFile>, result: IoResult) {
        self.let_go(tag.conn, Handle::File(file));
        if let Ok(n) = result {
            self.was_written(tag.conn, n);
        }
        let out = result.map(|n| WriteOut { size: n as u32, padding: 0 });
        self.answer(tag, out.as_ref().map(WriteOut::as_bytes).map_err(|&errno| errno));
    }
}
