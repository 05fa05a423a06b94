//! What is counted and timed of each request.
//!
//! Part of [`Shard`]. Every request that begins is over once: [`Shard::op_begins`] and
//! [`Shard::op_ends`] stand in pairs, however it ends.

use super::*;
use crate::status::SlowOp;
use ringfs_wire::abi::Opcode;
use ringfs_wire::slot::SlotUse;
use std::time::{SystemTime, UNIX_EPOCH};

/// Of [`RequestTag::begun`].
const TICK_SHIFT: u32 = 11;

/// What a request is called on both sides, in logs and by `ringfsd status`.
struct OpName {
    session: u64,
    lane: u8,
    at: SlotUse,
}

impl OpName {
    fn of(session: u64, tag: &RequestTag) -> OpName {
        OpName { session, lane: tag.lane, at: tag.at }
    }
}

impl std::fmt::Display for OpName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}.{}", self.session, self.lane, self.at.slot, self.at.seq)
    }
}

impl<R: Ring> Shard<R> {
    fn clock_ns(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    /// A request is taken up. That was when the one before it was over, if there was one in this
    /// turn: the clock need not be asked again.
    pub(super) fn op_begins(&mut self, tag: &mut RequestTag, node: u64) {
        self.shared.stats.begin_op(tag.opcode.into());
        let now = match self.now_ns {
            Some(now) => now,
            None => *self.now_ns.insert(self.clock_ns()),
        };
        (tag.begun, tag.node) = ((now >> TICK_SHIFT) as u32, node);
        (self.begun_ns, self.waited_us) = (now, 0);
        let conn = &self.conns[tag.conn];
        add(&conn.session.work[usize::from(conn.index)].begun, 1);
    }

    /// A request is over; whether its reply goes out.
    pub(super) fn op_ends(&mut self, tag: &RequestTag, errno: u32, sent: bool) {
        let now = self.clock_ns();
        self.now_ns = Some(now);
        self.shared.stats.end_op(sent);
        let conn = &self.conns[tag.conn];
        add(&conn.session.work[usize::from(conn.index)].ended, 1);
        let took = match tag.place {
            // It is the last that has begun.
            Place::Shard => now.saturating_sub(self.begun_ns),
            Place::Ring | Place::Pool | Place::Peer => {
                u64::from(((now >> TICK_SHIFT) as u32).wrapping_sub(tag.begun)) << TICK_SHIFT
            }
        };
        let took = Duration::from_nanos(took);
        self.count(tag.conn).record(tag.opcode.into(), took, errno);
        tracing::trace!(
            session = conn.session.id,
            op = %OpName::of(conn.session.id, tag),
            opcode = tag.opcode,
            errno,
            took_us = took.as_micros() as u64,
            "answered"
        );
        if self.shared.registry.metrics.is_slow(took) {
            self.was_slow(tag, took);
        }
    }

    /// What this shard counts of a connection's share.
    fn count(&self, key: usize) -> &crate::metrics::ShareShard {
        &self.conns[key].session.metrics.shards[self.shared.index]
    }

    /// Bytes of a file go to a guest.
    pub(super) fn was_read(&self, key: usize, bytes: usize) {
        add(&self.shared.stats.bytes_read, bytes);
        add(&self.count(key).bytes_read, bytes);
    }

    /// Bytes of a guest are in a file.
    pub(super) fn was_written(&self, key: usize, bytes: usize) {
        add(&self.shared.stats.bytes_written, bytes);
        add(&self.count(key).bytes_written, bytes);
    }

    #[cold]
    fn was_slow(&self, tag: &RequestTag, took: Duration) {
        self.count(tag.conn).record_slow();
        let session = &self.conns[tag.conn].session;
        let opcode = Opcode::from_u32(tag.opcode.into());
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.shared.registry.metrics.slow(SlowOp {
            unix_s: unix.as_secs(),
            share: session.terms.share.clone(),
            session: session.id,
            op: OpName::of(session.id, tag).to_string(),
            opcode: opcode.map_or("UNKNOWN".into(), |op| format!("{op:?}").to_uppercase()),
            node: tag.node,
            path: session.fs.known_path(tag.node),
            took_us: took.as_micros() as u64,
            waited_us: if tag.place == Place::Pool { self.waited_us.into() } else { 0 },
            place: tag.place.name().into(),
        });
    }
}
