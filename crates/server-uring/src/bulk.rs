//! Large replies from memory, a bounded number of bytes a turn.
//!
//! Part of [`Shard`]. Such a reply takes the shard hundreds of microseconds, and as long again the
//! peer that receives it. So a request for one is put off until the small ones that have come with
//! it, or come meanwhile, are answered, and until the peer has taken most of the one before: what
//! a small reply finds before it in the socket is one large one, not a buffer full of them.
//!
//! Invariant: a reply that is put off counts in its connection's `running`, is looked at again (its
//! connection is touched, sends, or waits for room), and is forgotten when its stream is cut.

use super::*;
use crate::fdops;
use crate::handles::Cached;
use std::os::fd::AsFd;

/// A READ whose reply is put off.
pub(super) struct Bulk {
    pub tag: RequestTag,
    pub file: Arc<OpenFile>,
    pub offset: u64,
    pub len: usize,
    pub buf: Buf,
}

impl<R: Ring> Shard<R> {
    pub(super) fn put_off(&mut self, mut bulk: Bulk) {
        bulk.tag.place = Place::Peer;
        self.conns[bulk.tag.conn].running += 1;
        self.bulk.push_back(bulk);
    }

    /// Makes replies until a turn's bytes are made or nobody takes more.
    pub(super) fn make_bulk(&mut self) {
        let mut made = 0;
        let mut at = 0;
        while at < self.bulk.len() && made < BULK_BYTES_A_TURN {
            let key = self.bulk[at].tag.conn;
            if !self.has_turn(key) || !self.takes_bulk(key) {
                at += 1;
                continue;
            }
            let Some(bulk) = self.bulk.remove(at) else { return };
            made += bulk.len;
            self.conns[bulk.tag.conn].running -= 1;
            let turn = self.begin_turn();
            self.make(bulk);
            self.end_turn(key, turn);
            // It may have waited for its replies to leave, or to end.
            let conn = &self.conns[key];
            if conn.link.has_input() || conn.link.closing.is_some() {
                self.touched.push(key);
            }
        }
        if let Some(next) = self.bulk.get(at) {
            self.touched.push(next.tag.conn);
        }
    }

    /// Whether the peer has taken so much that a large reply is next.
    fn takes_bulk(&mut self, key: usize) -> bool {
        let link = &mut self.conns[key].link;
        // What it has set aside keeps its requests out: a reply that is made may be shorter.
        if link.has_input() {
            return true;
        }
        if link.room_since.is_some() || link.has_output() {
            return false;
        }
        // The kernel says that there is room when three quarters of the buffer are free.
        let SendBuffer::Bytes(bytes) = link.send_buffer else { return true };
        let Some(socket) = link.socket.clone() else { return true };
        if fdops::unsent_bytes(socket.as_fd()).is_ok_and(|unsent| unsent <= bytes / 4) {
            return true;
        }
        link.room_since = Some(Instant::now());
        link.in_flight += 1;
        self.submit(Op { io: Io::Room { socket }, tag: Tag::Stream(key) });
        false
    }

    pub(super) fn has_room(&mut self, key: usize) {
        let link = &mut self.conns[key].link;
        link.room_since = None;
        link.in_flight -= 1;
        self.touched.push(key);
    }

    /// The stream is cut: what was put off has not run, and is asked for again.
    pub(super) fn drop_bulk(&mut self, key: usize) {
        while let Some(at) = self.bulk.iter().position(|bulk| bulk.tag.conn == key) {
            self.drop_bulk_at(at);
        }
    }

    /// Answers one that is put off without making it; see [`Shard::abandon`].
    pub(super) fn drop_bulk_of(&mut self, tag: &RequestTag) {
        let of = |bulk: &bulk::Bulk| (bulk.tag.conn, bulk.tag.lane, bulk.tag.at);
        let named = (tag.conn, tag.lane, tag.at);
        if let Some(at) = self.bulk.iter().position(|bulk| of(bulk) == named) {
            self.drop_bulk_at(at);
        }
    }

    fn drop_bulk_at(&mut self, at: usize) {
        if let Some(Bulk { tag, file, buf, .. }) = self.bulk.remove(at) {
            self.buffers.give(buf);
            self.let_go(tag.conn, Handle::File(file));
            self.finish(tag, Err(Errno::INTR));
        }
    }

    /// The pages themselves, else what the page cache has, else by the ring.
    fn make(&mut self, bulk: Bulk) {
        let Bulk { tag, file, offset, len, buf } = bulk;
        let Err(mut buf) = self.splice(tag, &file, offset, len, buf) else {
            return self.let_go(tag.conn, Handle::File(file));
        };
        match file.read_cached(&mut buf[BODY_AT..BODY_AT + len], offset) {
            Cached::All(n) => self.read_done(tag, file, buf, n),
            Cached::Part(done) => {
                let range = BODY_AT + done..BODY_AT + len;
                self.begin(tag, Io::Read { file, buf, range, offset: offset + done as u64 });
            }
            Cached::Failed(errno) => {
                self.buffers.give(buf);
                self.let_go(tag.conn, Handle::File(file));
                self.answer(tag, Err(errno));
            }
        }
    }
}
