//! How a shard moves the bytes of its connections: at once where it can, by the ring where it must
//! wait, and a few looks before it sleeps.
//!
//! Part of [`Shard`]. Invariant: a connection that waits for input stands in `listening` or has a
//! receive in the ring, never both, and `listening` is empty while the shard sleeps.

use super::*;
use ringfs_wire::spin::Look;
use rustix::net::{RecvFlags, SendFlags};

/// A connection that waits for input, and where to.
pub(super) type Listening = (usize, Buf, Range<usize>);

impl<R: Ring> Shard<R> {
    pub(super) fn receive(&mut self, key: usize, buf: Buf, range: Range<usize>) {
        let conn = &mut self.conns[key];
        let link = &mut conn.link;
        link.in_flight += 1;
        if buf.is_large() {
            conn.large_at = None;
            link.receiving_since.get_or_insert_with(Instant::now);
        }
        self.listen(key, buf, range);
    }

    pub(super) fn received(&mut self, key: usize, buf: Buf, range: Range<usize>, result: IoResult) {
        let conn = &mut self.conns[key];
        let link = &mut conn.link;
        link.in_flight -= 1;
        match result {
            Ok(n) if n > 0 => {
                if n == range.len() {
                    // A large buffer is filled up to the end of its batch.
                    link.receiving_since = None;
                }
                link.handle_received(buf, 0..range.start + n, &mut self.buffers);
                link.asked.iter_mut().for_each(|asked| asked.heard = true);
                self.touched.push(key);
            }
            Err(Errno::INTR | Errno::AGAIN) => self.receive(key, buf, range),
            end => {
                self.buffers.give(buf);
                link.end_receiving();
                let (session, conn) = (conn.session.id, conn.index);
                match end {
                    Err(error) if link.closing.is_none() => {
                        tracing::info!(session, conn, %error, "connection lost");
                    }
                    _ => tracing::debug!(session, conn, "connection closed by the peer"),
                }
                self.hang_up(key, Reason::Unmounted);
            }
        }
    }

    /// Has the connection wait for input in `buf[range]`.
    pub(super) fn listen(&mut self, key: usize, buf: Buf, range: Range<usize>) {
        if self.spin.is_on() && !self.ring.takes_all() && self.listening.len() < LISTENING_MAX {
            return self.listening.push((key, buf, range));
        }
        self.receive_by_ring((key, buf, range));
    }

    fn receive_by_ring(&mut self, (key, buf, range): Listening) {
        match self.conns[key].link.socket.clone() {
            Some(socket) => {
                self.submit(Op { io: Io::Recv { socket, buf, range }, tag: Tag::Stream(key) });
            }
            None => unreachable!("connection {key} waits for input without a socket"),
        }
    }

    /// Waits until there is something to step, at most for [`Shard::patience`].
    pub(super) fn wait(&mut self) -> std::io::Result<()> {
        let patience = self.patience();
        let in_a_hurry = patience == Some(Duration::ZERO);
        let tries = match self.listening.is_empty() {
            true => 0,
            false if in_a_hurry => 1,
            false => self.spin.tries(),
        };
        if tries > 0 {
            let look = self.look(tries)?;
            if in_a_hurry {
                return Ok(());
            }
            self.spin.tried(look);
            if look == Look::Found {
                return Ok(());
            }
        }
        let mut listening = std::mem::take(&mut self.listening);
        listening.drain(..).for_each(|waits| self.receive_by_ring(waits));
        self.listening = listening; // keeps the allocation
        let since = self.spin.is_on().then(Instant::now);
        self.ring.enter(patience)?;
        if let Some(since) = since {
            self.spin.slept(since.elapsed());
        }
        Ok(())
    }

    /// So many looks at the listening connections and the ring.
    fn look(&mut self, tries: u32) -> std::io::Result<Look> {
        let mut last = Instant::now();
        for n in 1..=tries {
            let received = self.receive_now();
            if self.ring.peek()? || received {
                return Ok(Look::Found);
            }
            if n == tries {
                break;
            }
            rustix::thread::sched_yield();
            let now = Instant::now();
            if let Some(look) = Look::of_yield(now - last) {
                return Ok(look);
            }
            last = now;
        }
        Ok(Look::Nothing)
    }

    fn receive_now(&mut self) -> bool {
        let mut any = false;
        let mut at = 0;
        while let Some((key, buf, range)) = self.listening.get_mut(at) {
            let Some(socket) = &self.conns[*key].link.socket else {
                unreachable!("connection {key} waits for input without a socket");
            };
            let room = &mut buf[range.clone()];
            match rustix::net::recv(&**socket, room, RecvFlags::DONTWAIT) {
                Err(Errno::AGAIN | Errno::INTR) => at += 1,
                result => {
                    any = true;
                    let (key, buf, range) = self.listening.swap_remove(at);
                    self.received(key, buf, range, result.map(|(n, _)| n));
                }
            }
        }
        any
    }

    pub(super) fn send(&mut self, key: usize, buf: Buf, range: Range<usize>) {
        let link = &mut self.conns[key].link;
        let Some(socket) = link.socket.clone() else { return self.buffers.give(buf) };
        link.in_flight += 1;
        link.sending_since.get_or_insert_with(Instant::now);
        self.submit(Op { io: Io::Send { socket, buf, range }, tag: Tag::Stream(key) });
    }

    pub(super) fn sent(&mut self, key: usize, buf: Buf, range: Range<usize>, result: IoResult) {
        let conn = &mut self.conns[key];
        conn.link.in_flight -= 1;
        let done = match result {
            Ok(n) => n,
            Err(Errno::INTR | Errno::AGAIN) => 0,
            Err(error) => {
                tracing::debug!(session = conn.session.id, %error, "cannot send");
                self.buffers.give(buf);
                return self.hang_up(key, Reason::Unmounted);
            }
        };
        match conn.link.handle_sent(buf, range, done, &mut self.buffers) {
            Some((buf, rest)) => self.send(key, buf, rest),
            None => {
                conn.link.sending_since = None;
                add(&self.shared.stats.batches_out, 1);
                self.touched.push(key);
            }
        }
    }

    /// Sends what the socket takes now, and leaves the rest to the ring; whether all is gone.
    pub(super) fn send_now(&mut self, key: usize, buf: Buf, range: Range<usize>) -> bool {
        if self.ring.takes_all() {
            self.send(key, buf, range);
            return false;
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let link = &mut self.conns[key].link;
        let sent =
            link.socket.as_ref().map(|to| rustix::net::send(&**to, &buf[range.clone()], flags));
        // The ring meets the error again, if it is one.
        let done = sent.and_then(Result::ok).unwrap_or_default();
        match link.handle_sent(buf, range, done, &mut self.buffers) {
            None => {
                add(&self.shared.stats.batches_out, 1);
                true
            }
            Some((buf, rest)) => {
                self.send(key, buf, rest);
                false
            }
        }
    }
}
