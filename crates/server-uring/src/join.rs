//! How connections come and go: they join, are cut, resume, and end.
//!
//! Part of [`Shard`]. A connection has a socket or is detached; its key stays the same until it is
//! dropped, so that whatever is in flight finds it. Invariant: the next socket is taken only when
//! the last operation on the one before has come back, and a newcomer is either welcomed or told
//! why not.

use super::probe::has_hung_up;
use super::*;
use crate::greet::Newcomer;
use crate::handshake::{Refusal, refuse, send};
use crate::link::{Link, Numbers};
use crate::mailbox::News;
use crate::restore::TakeOverError;
use crate::session::{Session, let_go};
use ringfs_wire::hello::{Welcome, feature, welcome_flag};

/// Why nobody can have that session. One that was cut while it was rebuilt is to be had anew, with
/// what it was, by the same HELLO.
fn ended(session: &Session) -> Refusal {
    match session.is_ready() {
        true => refuse(Reason::UnknownSession, "no such session here any more; mount again"),
        false => refuse(Reason::Timeout, "it was cut while it was rebuilt; come again"),
    }
}

impl<R: Ring> Shard<R> {
    /// Somebody said HELLO.
    pub(super) fn join(&mut self, newcomer: Box<Newcomer>) {
        if self.ending.is_some() {
            return self.turn_away(*newcomer, refuse(Reason::Shutdown, "the daemon is stopping"));
        }
        let (session, index) = (newcomer.session.id, newcomer.conn);
        if let Some(key) = self.key_of(session, index) {
            return self.meet(key, newcomer);
        }
        if self.conns.len() >= CONNS_PER_SHARD_MAX {
            return self.turn_away(*newcomer, refuse(Reason::Limit, "too many connections"));
        }
        let conn = Connection::new(newcomer.session.clone(), newcomer.conn);
        let key = self.conns.insert(conn);
        if !self.welcome(key, *newcomer, false) {
            // Nothing was ever done on it.
            self.conns[key].ended = true;
            self.drop_if_over(key);
        }
    }

    /// Sessions come rarely, so they are looked for.
    fn key_of(&self, session: u64, index: u16) -> Option<usize> {
        let mut conns = self.conns.iter();
        conns.find(|(_, c)| c.session.id == session && c.index == index).map(|(key, _)| key)
    }

    /// The newcomer names a connection that is known. If its socket is still there, that one's peer
    /// is asked whether it lives; the last one of those who wait is the one that may go on.
    fn meet(&mut self, key: usize, newcomer: Box<Newcomer>) {
        let is_known = self.shared.registry.knows(newcomer.shown.ticket);
        if !is_known || self.shared.registry.is_late(&newcomer.session, newcomer.shown) {
            let refusal = self.why_not(&newcomer);
            return self.turn_away(*newcomer, refusal);
        }
        let conn = &mut self.conns[key];
        if conn.waiting.newcomers.is_empty() && conn.is_attached() {
            // Who has lost one without our knowing has lost them all, and comes for them in turn.
            self.shared.registry.ask_others(&conn.session, conn.index);
        }
        conn.waiting.newcomers.push_back(newcomer);
        let crowded = self.too_many_wait_for();
        let overtaken = crowded.and_then(|key| self.conns[key].waiting.drop_first());
        self.overtake(overtaken);
        self.ask(key);
        self.flush(key);
    }

    /// The connection of which one newcomer less may wait: that of most.
    fn too_many_wait_for(&self) -> Option<usize> {
        let waiting = self.conns.iter().map(|(key, conn)| (conn.waiting.newcomers.len(), key));
        let all: usize = waiting.clone().map(|(newcomers, _)| newcomers).sum();
        let (most, key) = waiting.max()?;
        (most > NEWCOMERS_MAX || all > NEWCOMERS_PER_SHARD_MAX).then_some(key)
    }

    /// Those who waited for what another one gets.
    fn overtake(&self, newcomers: impl IntoIterator<Item = Box<Newcomer>>) {
        for newcomer in newcomers {
            let text = "another connection came in its place";
            self.turn_away(*newcomer, refuse(Reason::Timeout, text));
        }
    }

    /// What the registry tells of a session.
    pub(super) fn hear(&mut self, session: u64, index: u16, news: News) {
        let Some(key) = self.key_of(session, index) else { return };
        match news {
            News::End(reason) => self.session_ended(key, reason),
            News::Ask => {
                self.ask(key);
                self.flush(key);
            }
            // An orchestrator knows that the socket is dead, or wants another one.
            News::Cut if self.conns[key].is_attached() => {
                tracing::info!(session, conn = index, "cut off, as asked");
                self.hang_up(key, Reason::Timeout);
            }
            News::Cut => {}
            // Requests that have waited for it may run.
            News::Restored => self.touched.push(key),
        }
    }

    /// Why the registry does not let it join.
    fn why_not(&self, newcomer: &Newcomer) -> Refusal {
        match self.shared.registry.is_late(&newcomer.session, newcomer.shown) {
            // A copy of the guest that has said HELLO less often comes again until it is no longer.
            true => refuse(Reason::Timeout, "a later HELLO came before this one"),
            false => ended(&newcomer.session),
        }
    }

    pub(super) fn turn_away(&self, newcomer: Newcomer, refusal: Refusal) {
        refusal.tell(&newcomer.socket, &newcomer.peer);
        let_go(newcomer.session);
    }

    /// Gives the connection, which has no socket, this one. False: the newcomer is gone or was
    /// turned away.
    fn welcome(&mut self, key: usize, newcomer: Newcomer, resumes: bool) -> bool {
        let registry = self.shared.registry.clone();
        let (index, presented) = (newcomer.conn, newcomer.shown.ticket);
        if has_hung_up(&newcomer.socket) {
            // A ticket for it would void the one that its guest may have got since.
            tracing::info!(session = newcomer.session.id, conn = index, "gone before the WELCOME");
            let_go(newcomer.session);
            return false;
        }
        let Some(ticket) = registry.join(&newcomer.session, index, newcomer.shown, resumes) else {
            let refusal = self.why_not(&newcomer);
            self.turn_away(newcomer, refusal);
            return false;
        };
        let Newcomer { socket, session, version, numbers, .. } = newcomer;
        let Numbers { mut tx, rx } = numbers;
        let welcome = Welcome {
            version,
            lanes: session.terms.lanes,
            slots: session.terms.slots,
            conns: session.terms.conns,
            features: session.terms.features,
            ticket,
            epoch: registry.epoch,
            grace_s: u32::try_from(registry.grace.as_secs()).unwrap_or(u32::MAX),
            flags: match resumes {
                true => welcome_flag::RESUMED,
                // On its first connection; the others come when that has been told all.
                false if index == 0 && !session.is_ready() => welcome_flag::REBUILD,
                false => 0,
            },
        };
        let name = session.id.to_le_bytes();
        let records = [(Kind::Welcome, 0, welcome.as_bytes()), (Kind::Session, 0, &name)];
        if !send(&socket, &mut tx, rx.received(), &records) {
            tracing::info!(session = session.id, conn = index, "gone before the WELCOME");
            let_go(session);
            return false;
        }
        // The ring waits for readiness itself; a non-blocking socket would answer EAGAIN instead.
        let _ = rustix::io::ioctl_fionbio(&socket, false);
        let payload_crc = session.terms.features & feature::PAYLOAD_CRC != 0;
        let conn = &mut self.conns[key];
        conn.link = Link::new(Arc::new(socket), Numbers { tx, rx }, payload_crc);
        conn.link.unproven = Some(ticket).filter(|_| ticket != presented);
        let (buf, range) = conn.link.start(&mut self.buffers);
        self.attached += 1;
        if resumes {
            add(&self.shared.stats.resumes, 1);
            tracing::info!(session = session.id, conn = index, "connection resumed");
        }
        let_go(session);
        self.receive(key, buf, range);
        true
    }

    /// Sends what the connection has to say, and goes on with its life when its socket is over;
    /// whether something has left at once, of which no completion will tell.
    pub(super) fn flush(&mut self, key: usize) -> bool {
        let mut has_sent = false;
        while let Some((buf, range)) = self.conns[key].link.poll_send() {
            if !self.send_now(key, buf, range) {
                return has_sent;
            }
            has_sent = true;
        }
        let conn = &self.conns[key];
        let (link, running) = (&conn.link, conn.running);
        if link.closing.is_some()
            && let Some(socket) = &link.socket
        {
            // A GOODBYE leaves behind the replies; a dead stream takes none.
            if link.in_flight == 0 && (link.dead || running == 0) {
                self.unlink(key);
            } else if !link.has_output() {
                // Wakes the receive that is still in flight.
                let _ = rustix::net::shutdown(&**socket, rustix::net::Shutdown::Both);
            }
        }
        if !self.conns[key].is_attached() {
            self.drop_if_over(key);
        }
        has_sent
    }

    /// The last operation on the socket has come back: closes it.
    fn unlink(&mut self, key: usize) {
        let conn = &mut self.conns[key];
        let mut link = std::mem::replace(&mut conn.link, Link::none());
        link.end_input(&mut self.buffers);
        link.drop_output(&mut self.buffers);
        self.large_sockets -= usize::from(matches!(link.send_buffer, SendBuffer::Bytes(_)));
        self.attached -= 1;
        if !link.dead {
            conn.cut();
        }
        if link.starving {
            self.starved.retain(|&other| other != key);
        }
        let registry = &self.shared.registry;
        // Only what this connection brings can rebuild it; another one may come and go meanwhile.
        if !conn.ended && conn.index == 0 && conn.session.give_up() {
            // The guest tells all of it again, to a new one.
            tracing::info!(session = conn.session.id, "cut before it was rebuilt");
            conn.ended = true;
            registry.end(conn.session.id, Reason::UnknownSession);
        }
        if !conn.ended {
            tracing::info!(session = conn.session.id, conn = conn.index, "connection detached");
        }
    }

    /// A connection without a socket: goes on with one of those who wait, or ends, or stays. It is
    /// not cut before nobody is found: a session without a grace time would end by that.
    fn drop_if_over(&mut self, key: usize) {
        let conn = &mut self.conns[key];
        if !conn.ended {
            let mut newcomers = std::mem::take(&mut conn.waiting).newcomers;
            while let Some(last) = newcomers.pop_back() {
                if self.welcome(key, *last, true) {
                    return self.overtake(newcomers);
                }
            }
            let conn = &self.conns[key];
            return self.shared.registry.cut(&conn.session, conn.index, conn.is_used());
        }
        if conn.running > 0 {
            return;
        }
        debug_assert_eq!(conn.slots_in_use(), 0, "requests that nobody will finish");
        // Its tables go at once: whoever comes in its place takes them.
        let Connection { session, index, waiting, .. } = self.conns.remove(key);
        self.shared.registry.left(session, index);
        // They find that the session is no more.
        for newcomer in waiting.newcomers {
            self.join(newcomer);
        }
    }

    /// The guest tells what its session was.
    pub(super) fn restore(&mut self, key: usize, body: &[u8]) -> Result<Step, Reason> {
        let session = self.conns[key].session.clone();
        match session.restore(body) {
            Ok(false) => {}
            Ok(true) => {
                let counts = session.fs.counts();
                let (nodes, handles) = (counts.nodes, counts.handles);
                tracing::info!(session = session.id, nodes, handles, "session rebuilt");
                add(&self.shared.stats.rebuilds, 1);
                self.shared.registry.tell_restored(&session);
                self.shared.pool.warm(session.terms.owner, session.fs.clone());
            }
            Err(error @ (TakeOverError::TooMany | TakeOverError::NoMemory)) => {
                tracing::warn!(session = session.id, %error, "cannot rebuild a session");
                return Err(Reason::Limit);
            }
            // Its end is on the way here.
            Err(TakeOverError::GivenUp) => return Err(Reason::Timeout),
            Err(error) => return Err(self.protocol(key, error)),
        }
        Ok(Step::Taken)
    }

    /// Ends a connection and its session, with a GOODBYE.
    pub(super) fn close(&mut self, key: usize, reason: Reason) {
        let conn = &mut self.conns[key];
        if conn.is_attached() && conn.link.closing.is_none() {
            let text = format!("{reason:?}");
            conn.link.push(Kind::Goodbye, reason as u32, text.as_bytes(), &mut self.buffers);
        }
        conn.ended = true;
        let session = conn.session.id;
        self.shared.registry.end(session, reason);
        self.end(key, reason);
    }

    /// A connection whose stream is dead: what is asked for on it is kept for the next one.
    pub(super) fn hang_up(&mut self, key: usize, reason: Reason) {
        let conn = &mut self.conns[key];
        conn.link.drop_output(&mut self.buffers);
        if !std::mem::replace(&mut conn.link.dead, true) {
            conn.cut();
            self.drop_bulk(key);
        }
        self.end(key, reason);
    }

    fn end(&mut self, key: usize, reason: Reason) {
        let conn = &mut self.conns[key];
        if conn.is_attached() {
            conn.link.closing.get_or_insert(reason);
            conn.link.end_input(&mut self.buffers);
            self.plan_sweep();
        }
        self.flush(key);
    }

    /// The session has ended, perhaps by another of its connections.
    fn session_ended(&mut self, key: usize, reason: Reason) {
        let conn = &mut self.conns[key];
        conn.ended = true;
        // A guest that unmounts says so on each connection, or hangs up.
        if reason == Reason::Unmounted && conn.is_attached() {
            let until = Instant::now() + Duration::from_millis(STALL_LIMIT_MS);
            conn.leave_by = Some(until);
            self.plan_sweep_at(until);
            self.flush(key);
        } else {
            self.close(key, reason);
        }
    }
}
