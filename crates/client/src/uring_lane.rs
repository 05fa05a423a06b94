//! A lane of FUSE-over-io_uring: one thread that owns the queues of some CPUs and a connection.
//!
//! It stands in for the thread of a device lane: a request is copied from its queue entry into the
//! batch as the record that a frame of `/dev/fuse` would make, and the reply is committed to the
//! entry that fetched the request. Invariant: an entry's request is in the lane's table, in its
//! park (its bytes stay in the entry), or answered; nothing is waited for but in the ring, so
//! neither a full socket nor a daemon that is gone holds replies up. INIT, FORGET and INTERRUPT are
//! lane 0's, by the device.

use crate::groups;
use crate::lane::{Claim, Control, InFlight, Lane, LaneCounters, Parked};
use crate::rings::Answer;
use crate::session::{Conn, ConnRx, End, Session};
use crate::{down, pump};
use fuser_fork::uring::{EntryId, Event, Plan, Ring, WatchId};
use ringfs_wire::abi::InHeader;
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind};
use ringfs_wire::limits::{BATCH_BYTES_MAX, RECORD_HEADER_BYTES};
use ringfs_wire::session::{LinkError, LinkTx};
use ringfs_wire::slot::SlotUse;
use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_setaffinity};
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, MutexGuard};

/// What the main thread has a lane's thread do.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// INIT has agreed on rings: give the lane's queues their entries, and tell how it went.
    Register(Plan),
    /// All lanes have: serve.
    Serve,
    /// There are no rings: serve the lane as one of the device.
    UseDevice,
}

/// The `ring`th of `rings` lanes with queues, which is lane `lane`.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Which lane.
    pub lane: usize,
    /// Which of the rings.
    pub ring: u16,
    /// How many there are.
    pub rings: u16,
}

/// The thread of a lane that may get queues: makes its ring, and follows orders until it serves.
pub fn run(
    session: &Arc<Session>,
    place: Place,
    half: ConnRx,
    spin: u32,
    orders: &Receiver<Order>,
    done: &Sender<Answer>,
) {
    // Who does not listen any more has dropped the orders as well.
    let (ring, made) = match Ring::new() {
        Ok(ring) => (Some(ring), Ok(())),
        Err(error) => (None, Err(error)),
    };
    let _ = done.send(made);
    let mut ring = ring;
    while let Ok(order) = orders.recv() {
        match (order, &mut ring) {
            (Order::Register(plan), Some(ring)) => {
                pin(plan.queues_of(place.ring, place.rings));
                let queues = plan.queues_of(place.ring, place.rings);
                let device = &session.lanes[place.lane].device;
                let _ = done.send(ring.register(device, plan, queues));
            }
            (Order::Serve, Some(_)) => break,
            (Order::UseDevice | Order::Register(_) | Order::Serve, _) => {
                drop(ring);
                return pump::run(session, place.lane, half, spin);
            }
        }
    }
    let Some(ring) = ring.filter(|ring| ring.entries() > 0) else { return };
    match RingLane::new(session, place.lane, half, ring).and_then(|mut lane| lane.serve()) {
        Ok(()) if session.is_stopping() => {}
        Ok(()) => session.end(End::Unmounted),
        Err(end) => session.end(end),
    }
}

/// Keeps the thread on the CPUs whose queues it serves: it runs where the task that waits does,
/// which is most of what rings are worth (docs/performance.md).
fn pin(cpus: impl Iterator<Item = u16>) {
    let mut set = CpuSet::new();
    cpus.map(usize::from).filter(|&cpu| cpu < CpuSet::MAX_CPU).for_each(|cpu| set.set(cpu));
    // Outside of our cpuset, or offline so far: then anywhere.
    if let Err(errno) = sched_setaffinity(None, &set) {
        tracing::debug!(%errno, "a lane with queues is not pinned to their CPUs");
    }
}

struct RingLane<'s> {
    session: &'s Session,
    lane: &'s Lane,
    conn: &'s Conn,
    conn_index: usize,
    half: ConnRx,
    ring: Ring,
    input: WatchId,
    room: WatchId,
    kick: WatchId,
    builder: BatchBuilder,
    buffer: Vec<u8>,
    /// A batch that the socket has not taken whole.
    sending: Option<(MutexGuard<'s, LinkTx>, Range<usize>)>,
    /// Requests were parked, for want of a slot or of room in the batch, and may be still.
    has_parked: bool,
    /// What each entry's request is called, until it is answered.
    uniques: Vec<Option<u64>>,
    entry_of_slot: Vec<EntryId>,
    /// The connection is lost: the session has ended, and requests are answered here.
    is_cut: bool,
}

impl<'s> RingLane<'s> {
    fn new(
        session: &'s Session,
        lane: usize,
        half: ConnRx,
        mut ring: Ring,
    ) -> Result<RingLane<'s>, End> {
        let (conn_index, conn) = (lane, &session.conns[lane]);
        let lane = &session.lanes[lane];
        let input = ring.watch(conn.socket()).map_err(End::Thread)?;
        let room = ring.watch(conn.socket()).map_err(End::Thread)?;
        let kick = ring.watch(lane.kick_fd()).map_err(End::Thread)?;
        lane.answers_by_ring();
        Ok(RingLane {
            session,
            lane,
            conn,
            conn_index,
            half,
            input,
            room,
            kick,
            builder: BatchBuilder::new(),
            buffer: vec![0; BATCH_BYTES_MAX],
            sending: None,
            has_parked: false,
            uniques: vec![None; ring.entries()],
            entry_of_slot: vec![EntryId(0); usize::from(lane.slots())],
            is_cut: false,
            ring,
        })
    }

    fn serve(&mut self) -> Result<(), End> {
        // What came behind the WELCOME.
        self.take_received()?;
        loop {
            while let Some(event) = self.ring.next_event() {
                self.take(event)?;
            }
            if self.session.is_stopping() || self.ring.is_ended() {
                return Ok(());
            }
            if self.lane.take_kick() {
                self.take_local_answers()?;
                self.put_controls();
            }
            self.put_parked()?;
            self.send();
            if !self.lane.is_kicked() {
                self.wait()?;
            }
        }
    }

    fn wait(&mut self) -> Result<(), End> {
        self.ring.arm(self.kick, false)?;
        if !self.is_cut {
            self.ring.arm(self.input, false)?;
            if self.sending.is_some() {
                self.ring.arm(self.room, true)?;
            }
        }
        Ok(self.ring.wait()?)
    }

    fn take(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Request(id) => self.take_request(id),
            Event::Ready(watch) if watch == self.input => self.receive(),
            Event::Ready(watch) => {
                if watch == self.kick {
                    self.lane.drain_kick();
                }
                Ok(())
            }
        }
    }

    /// Whether the batch takes another record now.
    fn has_room(&mut self) -> bool {
        if self.sending.is_some() || self.builder.is_due() {
            self.send();
        }
        self.sending.is_none() && !self.builder.is_due()
    }

    /// Has an entry's request put into the batch, parked, or answered.
    fn take_request(&mut self, id: EntryId) -> Result<(), End> {
        let InHeader { unique, opcode, pid, .. } = match self.ring.request(id) {
            Ok(parts) => *parts.header(),
            Err(error) => {
                tracing::error!(lane = self.lane.index, %error, "a kernel's frame is refused");
                return Ok(self.ring.reply(id, Err(Errno::IO.raw_os_error()))?);
            }
        };
        self.uniques[usize::from(id.0)] = Some(unique);
        // While a batch is being sent its buffer is in use.
        let claim = match self.has_room() {
            true => self.lane.claim(InFlight::Request { unique, opcode, pid }),
            false => Claim::Full,
        };
        let is_closed = match claim {
            Claim::Slot(at) => {
                self.put(id, at)?;
                false
            }
            Claim::Full => {
                self.has_parked = true;
                let frame = Box::default();
                self.lane.park(Parked { unique, opcode, pid, frame }).is_err()
            }
            Claim::Closed => true,
        };
        if is_closed {
            self.uniques[usize::from(id.0)] = None;
            return Ok(self.ring.reply(id, Err(Errno::NOTCONN.raw_os_error()))?);
        }
        // The interrupt may have come by the device before this.
        if self.session.take_early_interrupt(unique) {
            self.session.note_interrupt(unique);
        }
        Ok(())
    }

    /// Parked requests, in their order, as far as slots and room go.
    fn put_parked(&mut self) -> Result<(), End> {
        while self.has_parked && self.has_room() {
            let Some((at, parked)) = self.lane.unpark() else {
                self.has_parked = self.lane.parked().0 > 0;
                break;
            };
            match self.entry_of(parked.unique) {
                Some(id) => self.put(id, at)?,
                // It was answered meanwhile.
                None => drop(self.lane.unclaim(at)),
            }
        }
        Ok(())
    }

    fn entry_of(&self, unique: u64) -> Option<EntryId> {
        let at = self.uniques.iter().position(|&its| its == Some(unique));
        at.map(|at| EntryId(at as u16))
    }

    /// Puts an entry's request into the batch, which has room.
    fn put(&mut self, id: EntryId, at: SlotUse) -> Result<(), End> {
        let spare = self.builder.spare(&mut self.buffer);
        // A batch that is not due has room for the largest record.
        let put = self.ring.request(id).ok();
        let put = put.and_then(|parts| Some((*parts.header(), parts.copy_to(spare)?)));
        let Some((header, mut bytes)) = put else {
            self.uniques[usize::from(id.0)] = None;
            // The daemon has not seen this use of the slot, and waits for it.
            let _ = self.lane.unclaim(at);
            return Ok(self.ring.reply(id, Err(Errno::IO.raw_os_error()))?);
        };
        if groups::matter_to(header.opcode, header.uid) && self.session.appends_groups() {
            bytes = groups::append(spare, bytes, &groups::of_pid(header.pid));
        }
        let record = self.lane.record(Kind::Request, at, header.opcode, bytes);
        self.builder.commit(&mut self.buffer, record);
        self.entry_of_slot[usize::from(at.slot)] = id;
        LaneCounters::add(&self.lane.counters.requests, 1);
        Ok(())
    }

    /// Cancels and pongs, as many as the batch takes.
    fn put_controls(&mut self) {
        while self.has_room()
            && let Some(control) = self.lane.next_control()
        {
            let (kind, at) = match control {
                Control::Cancel(at) => {
                    LaneCounters::add(&self.lane.counters.cancels, 1);
                    (Kind::Cancel, at)
                }
                Control::Pong => (Kind::Pong, SlotUse { slot: 0, seq: 0 }),
            };
            let record = self.lane.record(kind, at, 0, RECORD_HEADER_BYTES);
            self.builder.commit(&mut self.buffer, record);
        }
    }

    /// Answers that others have found for requests of ours.
    fn take_local_answers(&mut self) -> Result<(), End> {
        for (unique, errno) in self.lane.take_local_answers() {
            if let Some(id) = self.entry_of(unique) {
                self.uniques[usize::from(id.0)] = None;
                self.ring.reply(id, Err(errno.raw_os_error()))?;
            }
        }
        Ok(())
    }

    /// Sends what the socket takes of the batch.
    fn send(&mut self) {
        if self.is_cut {
            // What is in it has slots, so the session's end answers it.
            self.builder = BatchBuilder::new();
            return;
        }
        if self.sending.is_none() && !self.builder.is_empty() {
            let (guard, bytes) = self.conn.seal(&mut self.builder, &mut self.buffer);
            LaneCounters::add(&self.lane.counters.batches, 1);
            LaneCounters::add(&self.lane.counters.bytes_up, bytes);
            self.sending = Some((guard, 0..bytes));
        }
        while let Some((_, range)) = &mut self.sending {
            match self.conn.try_send(&self.buffer[range.clone()]) {
                Ok(sent) => range.start += sent,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(errno) => return self.cut(End::Lost { conn: self.conn_index, errno }),
            }
            if range.start == range.end {
                self.sending = None;
            }
        }
    }

    /// The connection is over: what is in flight is answered by the session's end.
    fn cut(&mut self, end: End) {
        self.is_cut = true;
        self.sending = None;
        self.builder = BatchBuilder::new();
        self.session.end(end);
    }

    fn receive(&mut self) -> Result<(), End> {
        if self.is_cut {
            return Ok(());
        }
        match self.conn.try_receive(self.half.deframer.spare()) {
            Ok(0) => self.cut(End::Closed { conn: self.conn_index }),
            Ok(bytes) => {
                self.half.deframer.filled(bytes);
                return self.take_received();
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => self.cut(End::Lost { conn: self.conn_index, errno }),
        }
        Ok(())
    }

    fn take_received(&mut self) -> Result<(), End> {
        match self.take_batches() {
            // The ring's own failure is the thread's; all else is the peer's doing.
            Err(end @ End::Uring(_)) => return Err(end),
            Err(end) => self.cut(end),
            Ok(()) => {}
        }
        Ok(())
    }

    fn take_batches(&mut self) -> Result<(), End> {
        while let Some(bytes) = self.half.deframer.next_batch().map_err(LinkError::from)? {
            let header = self.half.rx.accept(bytes, self.conn.sent())?;
            let mut cursor = Cursor::new(&header);
            while let Some((record, span)) = cursor.next(bytes) {
                if record.kind != Kind::Reply as u8 {
                    down::take_record(self.session, self.lane, record, &mut bytes[span])?;
                    continue;
                }
                if record.lane != self.lane.index {
                    return Err(End::Protocol("a reply for a lane of another connection"));
                }
                let at = SlotUse { slot: record.slot, seq: record.slot_seq };
                let request = self.lane.complete(at)?;
                LaneCounters::add(&self.lane.counters.replies, 1);
                LaneCounters::add(&self.lane.counters.bytes_down, span.len());
                // Only requests take slots of this lane.
                let InFlight::Request { .. } = request else { continue };
                let id = self.entry_of_slot[usize::from(at.slot)];
                self.uniques[usize::from(id.0)] = None;
                let reply = match record.code {
                    0 => Ok(&bytes[span][RECORD_HEADER_BYTES..]),
                    code => Err(down::errno_of(code).raw_os_error()),
                };
                self.ring.reply(id, reply)?;
            }
            self.conn.set_received(self.half.rx.received());
        }
        Ok(())
    }
}
