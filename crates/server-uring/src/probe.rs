//! Peers that hold others up: is the one alive whose connection somebody else wants, and who takes
//! too long over a batch.
//!
//! Part of [`Shard`]. Newcomers of a connection that has a socket have its peer asked, by a PING. A
//! PONG shows that they are clones; silence, that the socket is dead. Invariant: nobody is cut off
//! for what keeps us from reading, and while nobody waits, nobody's time is up: a paused guest may
//! take its time.

use super::*;
use crate::fdops;
use crate::handshake::refuse;
use crate::link::Link;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, OwnedFd};

/// A PING whose PONG is yet to come.
pub(crate) struct Asked {
    /// Until when its peer has time for that.
    until: Instant,
    /// As long as it sends something else, or takes what is on its way to it: until when at the
    /// latest.
    last: Instant,
    /// It has sent something since it was looked at.
    pub(super) heard: bool,
    /// See [`taken_by_peer`], when it was looked at.
    taken: Option<i64>,
}

impl Asked {
    /// One that is sent now.
    fn at(now: Instant) -> Asked {
        let (until, last) = (now + PROBE, now + PROBE_BUSY);
        Asked { until, last, heard: false, taken: None }
    }

    /// When to look again; `None`: its time is up. `taken`: what the peer has taken of what was
    /// sent, while the question may be on its way still. A dead one takes nothing, or as much as
    /// its VMM has room for. `is_held_up`: it is not read now. `closing`: that counts no more.
    fn until(
        &mut self,
        now: Instant,
        taken: Option<i64>,
        is_held_up: bool,
        closing: bool,
    ) -> Option<Instant> {
        let takes = taken.zip(self.taken).is_some_and(|(now, before)| now > before);
        self.taken = taken;
        let has_time = self.last > now && !closing;
        if takes && has_time {
            self.until = now + PROBE;
        }
        if self.until > now {
            return Some(taken.map_or(self.until, |_| self.until.min(now + PROBE_LOOK)));
        }
        let is_busy = std::mem::take(&mut self.heard) && has_time;
        if is_held_up {
            // Not its fault.
            *self = Asked::at(now);
        } else if is_busy {
            self.until = now + PROBE;
        } else {
            return None;
        }
        Some(self.until)
    }
}

/// Whether the peer has closed its end.
pub(super) fn has_hung_up(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    let over = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().intersects(over)
}

/// Bytes that the peer has taken, in the kernel's count, which differs from ours: only a later and
/// higher one says something. `None`: it has taken all, or nobody can tell.
fn taken_by_peer(link: &Link) -> Option<i64> {
    let held = fdops::unsent_bytes(link.socket.as_ref()?.as_fd()).ok()?;
    (held > 0 || link.has_output()).then(|| (link.sent as i64).wrapping_sub(held as i64))
}

impl<R: Ring> Shard<R> {
    /// Asks a connection's peer whether it lives. One PING is on its way at a time: what answers it
    /// says nothing of who has come since, for whom another one follows.
    pub(super) fn ask(&mut self, key: usize) {
        let conn = &mut self.conns[key];
        let (link, waiting) = (&mut conn.link, &mut conn.waiting);
        if link.socket.is_none() {
            return;
        }
        let asked = link.asked.take().unwrap_or_else(|| {
            tracing::debug!(session = conn.session.id, conn = conn.index, "is the old one alive?");
            if link.closing.is_none() {
                link.push(Kind::Ping, 0, &[], &mut self.buffers);
            }
            waiting.asked_for = waiting.newcomers.len();
            Asked::at(Instant::now())
        });
        let until = link.asked.insert(asked).until;
        if !waiting.newcomers.is_empty() {
            self.plan_sweep_at(until.min(Instant::now() + PROBE_LOOK));
        }
    }

    /// A PONG: the old socket's peer lives. Those who had come when it was asked are clones, as a
    /// guest lets go of a connection before it asks for the next.
    pub(super) fn ponged(&mut self, key: usize) {
        let conn = &mut self.conns[key];
        if conn.link.asked.take().is_none() {
            return;
        }
        let clones = conn.waiting.asked_for();
        let is_over = conn.waiting.newcomers.is_empty();
        for clone in clones {
            tracing::warn!(session = clone.session.id, conn = clone.conn, "a clone was refused");
            add(&self.shared.stats.clones_refused, 1);
            let text = "this session is in use by another guest; mount again";
            self.turn_away(*clone, refuse(Reason::UnknownSession, text));
        }
        if !is_over {
            self.ask(key);
        }
    }

    pub(super) fn plan_sweep(&mut self) {
        self.plan_sweep_at(Instant::now() + Duration::from_millis(SWEEP_INTERVAL_MS));
    }

    pub(super) fn plan_sweep_at(&mut self, at: Instant) {
        self.sweep_at = Some(self.sweep_at.map_or(at, |planned| planned.min(at)));
    }

    /// Cuts off peers that take too long over a batch while somebody waits for their buffers, or
    /// while they are being closed, and those whose time is up. Nobody else is in a hurry: a paused
    /// guest may take its time.
    pub(super) fn sweep(&mut self) {
        let Some(at) = self.sweep_at else { return };
        let now = Instant::now();
        if now < at {
            return;
        }
        self.sweep_at = None;
        let limit = Duration::from_millis(STALL_LIMIT_MS);
        let pressed = !self.starved.is_empty();
        let (mut stalled, mut kept_waiting) = (Vec::new(), Vec::new());
        let mut next = pressed.then(|| now + Duration::from_millis(SWEEP_INTERVAL_MS));
        let mut again = |at: Instant| next = Some(next.map_or(at, |next| next.min(at)));
        for (key, conn) in self.conns.iter_mut().filter(|(_, conn)| conn.is_attached()) {
            let closing = conn.link.closing.is_some();
            if closing {
                again(now + Duration::from_millis(SWEEP_INTERVAL_MS));
            }
            let late = conn.leave_by.is_some_and(|until| until <= now);
            if late || (pressed || closing) && conn.is_stalled(now, limit) {
                stalled.push((key, "cutting off a connection that takes no data or stays"));
                continue;
            }
            conn.leave_by.into_iter().for_each(&mut again);
            if conn.is_kept_waiting() && !closing {
                again(now + Duration::from_millis(SWEEP_INTERVAL_MS));
                kept_waiting.push(key);
            }
            if conn.waiting.newcomers.is_empty() {
                continue;
            }
            // What it has sent and we have not read hides its end.
            let is_gone = conn.link.socket.as_ref().is_none_or(|socket| has_hung_up(socket));
            let taken = taken_by_peer(&conn.link);
            let is_held_up = conn.link.starving || conn.delayed;
            let asked = conn.link.asked.as_mut();
            let until = asked.and_then(|asked| asked.until(now, taken, is_held_up, closing));
            match until.filter(|_| !is_gone) {
                Some(until) => again(until),
                None => stalled.push((key, "an old connection does not answer: it is dead")),
            }
        }
        next.into_iter().for_each(|next| self.plan_sweep_at(next));
        // It cannot ask behind what we do not read, and would take us for dead.
        for key in kept_waiting {
            if !self.conns[key].link.has_output() {
                self.conns[key].link.push(Kind::Pong, 0, &[], &mut self.buffers);
                self.flush(key);
            }
        }
        for (key, why) in stalled {
            tracing::warn!(session = self.conns[key].session.id, "{why}");
            self.hang_up(key, Reason::Timeout);
        }
    }
}
