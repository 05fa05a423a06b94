//! One direction of a proxied connection: whole batches in, and out as the schedule says.
//!
//! Invariant: bytes reach the other end in order and unharmed unless a fault of the schedule says
//! otherwise, and each fault is logged before it shows. After a fault that harms the stream the
//! pump goes on, as a bad transport would: it is for the ends to notice.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use ringfs_wire::batch::{self, BatchHeader, Cursor, RecordHeader};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::limits::RECORD_ALIGN;
use std::ops::Range;

use super::link::Link;
use super::proxy::Shared;
use super::schedule::{Benign, Direction, Event, Fault, Plan};

/// A batch that is to come behind the next one waits for it so long.
const SWAP_WAIT: Duration = Duration::from_millis(20);
/// How long a close waits for bytes that it can leave unread.
const UNREAD_WAIT: Duration = Duration::from_millis(30);
/// Some go on later than others, where all stood still.
const STRAGGLE_MS: u64 = 1500;
/// Longer than a lane waits for any sign of life: 1 s, then 2 s after its PING.
const STALL_LONG: Duration = Duration::from_millis(3500);
/// Of a batch that comes in pieces so much does; the rest comes at once.
const SPLIT_BYTES_MAX: usize = 4096;

/// The record that a fault hits.
struct Target {
    header: RecordHeader,
    /// Its bytes in the batch, the padding not.
    span: Range<usize>,
}

/// Carries one direction.
#[derive(Debug)]
pub struct Pump {
    shared: Arc<Shared>,
    link: Arc<Link>,
    direction: Direction,
    plan: Plan,
    /// Index of the next record.
    record: u64,
    /// Sequence number of the next batch.
    batch: u64,
    /// A batch that is to come behind the next one.
    held: Option<Vec<u8>>,
}

impl Pump {
    /// A pump at the start of a connection.
    pub fn new(shared: Arc<Shared>, link: Arc<Link>, direction: Direction) -> Self {
        let plan = shared.schedule.plan(link.conn, direction);
        Self { shared, link, direction, plan, record: 0, batch: 0, held: None }
    }

    fn source(&self) -> &UnixStream {
        match self.direction {
            Direction::Up => &self.link.guest,
            Direction::Down => &self.link.daemon,
        }
    }

    /// Waits while the proxy stands still; after that not all go on at once.
    fn wait_thawed(&self) {
        while self.shared.wait_thawed() {
            let mut rng = self.shared.schedule.straggle(self.link.conn, self.direction, self.batch);
            if rng.once_in(2) {
                self.link.pause(Duration::from_millis(rng.below(STRAGGLE_MS)));
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> bool {
        self.wait_thawed();
        let side = match self.direction {
            Direction::Up => &self.link.daemon,
            Direction::Down => &self.link.guest,
        };
        self.link.send(side, bytes).is_ok()
    }

    /// Carries until the connection ends.
    pub fn run(mut self) {
        let mut deframer = Deframer::new();
        while self.receive(&mut deframer) {
            loop {
                match deframer.next_batch() {
                    Ok(Some(batch)) => {
                        if !self.forward(batch) {
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        self.finding(&error.to_string());
                        return self.link.cut();
                    }
                }
            }
        }
        self.wait_thawed();
        // One end has gone: the other learns of it, and of all that was sent before.
        if !self.link.stopped() {
            self.link.cut();
        }
    }

    /// Receives something; false at the end.
    fn receive(&mut self, deframer: &mut Deframer) -> bool {
        loop {
            let limit = self.held.is_some().then_some(SWAP_WAIT);
            let readable = self.link.readable(self.source(), limit);
            if self.link.stopped() {
                return false;
            }
            if !readable {
                let Some(held) = self.held.take() else { continue };
                if !self.send(&held) {
                    return false;
                }
                continue;
            }
            match self.source().read(deframer.spare()) {
                Ok(0) => return false,
                Ok(n) => {
                    deframer.filled(n);
                    return true;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return false,
            }
        }
    }

    fn finding(&self, what: &str) {
        let (conn, arrow) = (self.link.conn, self.direction.arrow());
        self.shared.finding(format!("conn {conn} {arrow} batch {}: {what}", self.batch));
    }

    /// Holds what an end sent against the wire's rules.
    fn check(&mut self, bytes: &[u8]) -> Option<BatchHeader> {
        let checked = batch::verify(bytes, true).or_else(|_| batch::verify(bytes, false));
        let header = match checked {
            Ok(header) => header,
            Err(error) => {
                self.finding(&error.to_string());
                return None;
            }
        };
        if header.seq != self.batch {
            self.finding(&format!("has sequence number {}", header.seq));
        }
        self.batch += 1;
        Some(header)
    }

    /// Sends a batch on, or does to it what is due; false when the pump is over.
    fn forward(&mut self, bytes: &[u8]) -> bool {
        let Some(header) = self.check(bytes) else {
            self.link.cut();
            return false;
        };
        self.shared.tally.batches.fetch_add(1, Relaxed);
        self.shared.tally.records.fetch_add(header.count.into(), Relaxed);
        if !self.shared.armed() {
            // The handshake, at least, was let pass: record 0 is behind us.
            self.record = 1;
            return self.pass(bytes, None);
        }
        let mut due = None;
        let mut benign = None;
        let mut cursor = Cursor::new(&header);
        while let Some((header, span)) = cursor.next(bytes) {
            if let (Some(event), None) = (self.plan.due(self.record), &due) {
                due = Some((event, Target { header, span }));
            }
            let (conn, direction) = (self.link.conn, self.direction);
            benign = benign.or(self.shared.schedule.benign(conn, direction, self.record));
            self.record += 1;
        }
        match due {
            Some((event, target)) => self.harm(bytes, event, &target),
            None => self.pass(bytes, benign),
        }
    }

    /// Sends a batch on, and behind it the one that was held back.
    fn pass(&mut self, bytes: &[u8], benign: Option<Benign>) -> bool {
        if benign.is_some() {
            self.shared.tally.benign.fetch_add(1, Relaxed);
        }
        let sent = match benign {
            None => self.send(bytes),
            Some(Benign::Delay(ms)) => {
                self.link.pause(Duration::from_millis(ms)) && self.send(bytes)
            }
            Some(Benign::Split(n)) => {
                let (first, rest) = bytes.split_at(bytes.len().min(SPLIT_BYTES_MAX));
                first.chunks(n).all(|piece| self.send(piece)) && self.send(rest)
            }
        };
        sent && self.held.take().is_none_or(|held| self.send(&held))
    }

    fn account(&self, event: Event, target: &Target, what: &str) {
        let tally = &self.shared.tally;
        tally.faults[event.fault.index()].fetch_add(1, Relaxed);
        if event.record == 0 {
            tally.handshakes.fetch_add(1, Relaxed);
        }
        let (conn, arrow, h) = (self.link.conn, self.direction.arrow(), &target.header);
        self.shared.log(&format!(
            "conn {conn} {arrow} record {}: {:?}{what} (batch {}, kind {}, lane {}, slot {}, \
             slot_seq {}, code {}, {} bytes)",
            event.record,
            event.fault,
            self.batch - 1,
            h.kind,
            h.lane,
            h.slot,
            h.slot_seq,
            h.code,
            h.len
        ));
    }

    /// Does to a batch what is due; false when the pump is over.
    fn harm(&mut self, bytes: &[u8], event: Event, target: &Target) -> bool {
        let Range { start, end } = target.span;
        let inside = start + 1 + (event.dice as usize % (end - start - 1));
        let any = event.dice as usize % bytes.len();
        let cut_at = match event.fault {
            Fault::CutBefore => start,
            Fault::CutInside | Fault::CutUnread => inside,
            Fault::CutAfter => end.next_multiple_of(RECORD_ALIGN),
            Fault::Truncate | Fault::Lose => any,
            Fault::SilentToGuest | Fault::SilentToDaemon => start,
            Fault::Flip | Fault::Double | Fault::Swap | Fault::Stall | Fault::StallLong => 0,
        };
        let stall = match event.fault {
            Fault::StallLong => STALL_LONG,
            _ => Duration::from_millis(5 + event.dice % 400),
        };
        let bit = event.dice as usize % (bytes.len() * 8);
        let what = match event.fault {
            Fault::Flip => format!(" bit {bit} of {} bytes", bytes.len()),
            Fault::Stall | Fault::StallLong => format!(" {stall:?}"),
            Fault::Double | Fault::Swap => String::new(),
            _ => format!(" at byte {cut_at} of {}", bytes.len()),
        };
        self.account(event, target, &what);
        match event.fault {
            Fault::CutBefore | Fault::CutInside | Fault::CutAfter | Fault::Truncate => {
                self.send(&bytes[..cut_at]);
                self.link.cut();
                false
            }
            Fault::CutUnread => {
                self.send(&bytes[..cut_at]);
                self.link.stop();
                self.link.wait_unread(UNREAD_WAIT);
                false
            }
            Fault::SilentToGuest | Fault::SilentToDaemon => {
                self.send(&bytes[..cut_at]);
                self.silence(event);
                false
            }
            Fault::Lose => self.send(&bytes[..cut_at]),
            Fault::Flip => {
                let mut harmed = bytes.to_vec();
                harmed[bit / 8] ^= 1 << (bit % 8);
                self.pass(&harmed, None)
            }
            Fault::Double => self.pass(bytes, None) && self.send(bytes),
            Fault::Swap => {
                // Two swaps in a row: the first is over before the second begins.
                let before = self.held.replace(bytes.to_vec());
                before.is_none_or(|before| self.send(&before))
            }
            Fault::Stall | Fault::StallLong => self.link.pause(stall) && self.pass(bytes, None),
        }
    }

    /// Closes one end and keeps the other without a sign of life.
    fn silence(&self, event: Event) {
        let (gone, kept) = match event.fault {
            Fault::SilentToGuest => (&self.link.daemon, &self.link.guest),
            _ => (&self.link.guest, &self.link.daemon),
        };
        self.link.mute(event.fault == Fault::SilentToGuest);
        self.link.stop();
        // It may have gone already.
        let _ = gone.shutdown(std::net::Shutdown::Both);
        if self.link.hold(kept, event.dice.is_multiple_of(2)) {
            self.shared.tally.silent_closed.fetch_add(1, Relaxed);
        }
        self.link.mute(false);
    }
}
