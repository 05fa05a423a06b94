//! A lane of FUSE-over-io_uring: one thread that owns the queues of some CPUs and a connection.
//!
//! It stands in for the thread of a device lane: a request is copied from its queue entry into the
//! batch as the record that a frame of `/dev/fuse` would make, and the reply is committed to the
//! entry that fetched the request. Invariant: an entry's request is in the lane's table, in its
//! park (its bytes stay in the entry until then), or answered; nothing is waited for but in the
//! ring, so neither a full socket nor a daemon that is gone holds replies up. INIT, FORGET and
//! INTERRUPT come to lane 0, by the device; of the nodes given back it leaves us some (forgets.rs).

use crate::conn::coarse_now;
use crate::expire::{Name, names_of};
use crate::forgets::SHARED_PER_RECORD_MAX;
use crate::groups;
use crate::heart::Beat;
use crate::known::Asked;
use crate::lane::{Claim, Control, InFlight, Lane, LaneCounters, Parked};
use crate::pump::{Link, Rest};
use crate::resume::{Resend, unsent};
use crate::rings::Answer;
use crate::session::{End, Session};
use crate::{down, pump};
use fuser_fork::uring::{EntryId, Event, Plan, Ring, WatchId};
use ringfs_wire::abi::{ForgetOne, InHeader, Opcode};
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader, cancel};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::limits::{BATCH_BYTES_MAX, RECORD_HEADER_BYTES};
use ringfs_wire::session::LinkError;
use ringfs_wire::slot::SlotUse;
use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_setaffinity};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use zerocopy::IntoBytes;

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
                return pump::run(session, place.lane, spin);
            }
        }
    }
    let Some(ring) = ring.filter(|ring| ring.entries() > 0) else { return };
    match RingLane::new(session, place.lane, ring).and_then(|mut lane| lane.serve()) {
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
    /// `None` while it is cut.
    link: Option<Link>,
    /// What the connection before has received into.
    before: Option<Deframer>,
    ring: Ring,
    /// Of the connection; made with the first one.
    sockets: Option<Sockets>,
    kick: WatchId,
    builder: BatchBuilder,
    buffer: Vec<u8>,
    /// A batch that the socket has not taken whole.
    sending: Option<Range<usize>>,
    /// What has to go first on a new connection.
    resends: Option<VecDeque<Resend>>,
    /// Controls may be there to send.
    look: bool,
    /// Requests were parked, for want of a slot or of room in the batch, and may be still.
    has_parked: bool,
    /// What each entry's request is called, until it is answered.
    uniques: Vec<Option<u64>>,
    entry_of_slot: Vec<EntryId>,
    /// What is given back and not answered; one record at a time.
    forget: Option<(SlotUse, Vec<ForgetOne>)>,
}

#[derive(Clone, Copy)]
struct Sockets {
    input: WatchId,
    room: WatchId,
}

impl<'s> RingLane<'s> {
    fn new(session: &'s Session, lane: usize, mut ring: Ring) -> Result<RingLane<'s>, End> {
        let lane = &session.lanes[lane];
        let kick = ring.watch(lane.kick_fd()).map_err(End::Thread)?;
        lane.answers_by_ring();
        session.forgets.share();
        // Until it has a connection.
        session.interrupts.set_deaf(lane.index, true);
        Ok(RingLane {
            session,
            lane,
            link: None,
            before: None,
            sockets: None,
            kick,
            builder: BatchBuilder::new(),
            buffer: vec![0; BATCH_BYTES_MAX],
            sending: None,
            resends: None,
            look: false,
            has_parked: false,
            uniques: vec![None; ring.entries()],
            entry_of_slot: vec![EntryId(0); usize::from(lane.slots())],
            forget: None,
            ring,
        })
    }

    fn serve(&mut self) -> Result<(), End> {
        // Also for the first connection.
        self.lane.kick();
        loop {
            while let Some(event) = self.ring.next_event() {
                self.take(event)?;
            }
            if self.session.is_stopping() || self.ring.is_ended() {
                return Ok(());
            }
            if self.link.is_none() {
                self.take_link()?;
            }
            if self.lane.take_kick() {
                self.take_local_answers()?;
                self.look = true;
            }
            self.put_resends();
            self.put_controls();
            self.put_parked()?;
            self.put_forgets();
            self.send();
            if !self.lane.is_kicked() {
                self.wait()?;
            }
        }
    }

    /// Takes the next connection, if it is there, once the ring has let the old one go.
    fn take_link(&mut self) -> Result<(), End> {
        let is_armed = |at: Sockets| self.ring.is_armed(at.input) || self.ring.is_armed(at.room);
        if self.sockets.is_some_and(is_armed) {
            return Ok(());
        }
        let Some(link) = Link::take(self.session, self.lane, &mut self.before) else {
            return Ok(());
        };
        let (ring, socket) = (&mut self.ring, link.conn.socket());
        match self.sockets {
            Some(Sockets { input, room }) => {
                let moved = ring.rewatch(input, socket).and_then(|()| ring.rewatch(room, socket));
                moved.map_err(End::Thread)?;
            }
            None => {
                let mut watch = || ring.watch(socket).map_err(End::Thread);
                self.sockets = Some(Sockets { input: watch()?, room: watch()? });
            }
        }
        self.link = Some(link);
        // Whose task was killed meanwhile is not told: they are looked at until they are answered.
        for (unique, pid) in self.lane.waiting() {
            self.session.interrupts.add(self.lane.index, unique, pid);
        }
        self.session.interrupts.set_deaf(self.lane.index, false);
        // What it holds has slots, and is among what is sent again.
        self.builder = BatchBuilder::new();
        self.resends = Some(self.lane.resend());
        // What came behind the WELCOME.
        self.take_received()
    }

    fn wait(&mut self) -> Result<(), End> {
        let Rest::For(limit) = self.rest() else { return Ok(()) };
        self.ring.arm(self.kick, false)?;
        if let (Some(sockets), true) = (self.sockets, self.link.is_some()) {
            self.ring.arm(sockets.input, false)?;
            if self.sending.is_some() {
                self.ring.arm(sockets.room, true)?;
            }
        }
        match limit {
            Some(limit) => self.ring.wait_for(limit)?,
            None => self.ring.wait()?,
        }
        Ok(())
    }

    /// Before a sleep: how long it may be.
    fn rest(&mut self) -> Rest {
        let Some(link) = &mut self.link else {
            return Rest::For(self.lane.patience(self.session.resume.soft, coarse_now()));
        };
        let is_expected = self.lane.in_flight() > 0;
        let heard = link.heard.take(link.half.rx.received());
        let beat = link.heart.beat(coarse_now(), heard, is_expected);
        match beat {
            Beat::Wait(limit) => return Rest::For(Some(limit)),
            Beat::Ping => {
                if !is_expected {
                    self.session.rest();
                }
                self.lane.queue(Control::Ping);
            }
            Beat::Dead => self.cut(End::Silent { conn: self.lane.index.into() }),
        }
        Rest::None
    }

    fn take(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Request(id) => self.take_request(id),
            Event::Ready(watch) if watch == self.kick => {
                self.lane.drain_kick();
                Ok(())
            }
            // There may be room to send, which the loop looks at, or bytes.
            Event::Ready(watch) => match self.sockets {
                Some(sockets) if sockets.input == watch => self.receive(),
                _ => Ok(()),
            },
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
        let (InHeader { unique, opcode, pid, .. }, asked) = match self.ring.request(id) {
            Ok(parts) => {
                let header = *parts.header();
                (header, Asked::new(header.nodeid, parts.first_arg()))
            }
            Err(error) => {
                tracing::error!(lane = self.lane.index, %error, "a kernel's frame is refused");
                return Ok(self.ring.reply(id, Err(Errno::IO.raw_os_error()))?);
            }
        };
        if let Some(asked) = self.session.refuses(opcode, || asked) {
            self.ring.reply(id, Err(Errno::IO.raw_os_error()))?;
            self.session.refused(&asked);
            return Ok(());
        }
        self.uniques[usize::from(id.0)] = Some(unique);
        // While a batch is being sent its buffer is in use.
        let claim = match self.has_room() {
            true => self.lane.claim(InFlight::request(unique, opcode, pid)),
            false => Claim::Full,
        };
        let taken = match claim {
            Claim::Slot(at) => {
                self.put_new(id, at)?;
                Ok(())
            }
            Claim::Full => {
                self.has_parked = true;
                let frame = Box::default();
                self.lane.park(Parked { unique, opcode, pid, frame })
            }
            Claim::Closed => Err(Errno::NOTCONN),
        };
        if let Err(errno) = taken {
            self.uniques[usize::from(id.0)] = None;
            return Ok(self.ring.reply(id, Err(errno.raw_os_error()))?);
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
                Some(id) => self.put_new(id, at)?,
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

    /// What was in flight when the connection was cut: the entries have it still. As much as the
    /// batch takes.
    fn put_resends(&mut self) {
        while let Some(resends) = &mut self.resends {
            let Some(next) = resends.front().copied() else {
                self.resends = None;
                self.lane.reopen();
                break;
            };
            if !self.has_room() {
                break;
            }
            self.resends.as_mut().map(VecDeque::pop_front);
            match next {
                Resend::Frame(at) if self.forget.as_ref().is_some_and(|its| its.0 == at) => {
                    self.put_forget();
                }
                Resend::Frame(at) => {
                    let id = self.entry_of_slot[usize::from(at.slot)];
                    // A hostile daemon may have answered what it was not sent yet.
                    if self.uniques[usize::from(id.0)].is_some() && !self.put(id, at) {
                        self.lane.give_up(at);
                        self.put_word(Kind::Cancel, at, cancel::ABANDON);
                    }
                }
                Resend::Unsure(at) => self.put_word(Kind::Unsure, at, 0),
                Resend::Abandon(at) => self.put_word(Kind::Cancel, at, cancel::ABANDON),
            }
        }
    }

    /// Puts an entry's request into the batch, which has room, for the first time.
    fn put_new(&mut self, id: EntryId, at: SlotUse) -> Result<(), End> {
        if self.put(id, at) {
            return Ok(());
        }
        self.uniques[usize::from(id.0)] = None;
        // The daemon has not seen this use of the slot, and waits for it.
        let _ = self.lane.unclaim(at);
        Ok(self.ring.reply(id, Err(Errno::IO.raw_os_error()))?)
    }

    /// The same, also of one that a daemon may have; false: the entry does not hold a request.
    fn put(&mut self, id: EntryId, at: SlotUse) -> bool {
        let spare = self.builder.spare(&mut self.buffer);
        // A batch that is not due has room for the largest record.
        let put = self.ring.request(id).ok();
        let put = put.and_then(|parts| Some((*parts.header(), parts.copy_to(spare)?)));
        let Some((header, mut bytes)) = put else { return false };
        if groups::matter_to(header.opcode, header.uid) && self.session.appends_groups() {
            bytes = groups::append(spare, bytes, &groups::of_pid(header.pid));
        }
        let record = self.lane.record(Kind::Request, at, header.opcode, bytes);
        self.builder.commit(&mut self.buffer, record);
        self.entry_of_slot[usize::from(at.slot)] = id;
        LaneCounters::add(&self.lane.counters.requests, 1);
        true
    }

    /// A record without a body.
    fn put_word(&mut self, kind: Kind, at: SlotUse, code: u32) {
        let record = self.lane.record(kind, at, code, RECORD_HEADER_BYTES);
        self.builder.commit(&mut self.buffer, record);
    }

    /// Cancels and pongs, as many as the batch takes.
    fn put_controls(&mut self) {
        while self.look && self.link.is_some() && self.resends.is_none() && self.has_room() {
            match self.lane.next_control() {
                Some(record) => self.builder.commit(&mut self.buffer, record),
                None => self.look = false,
            }
        }
    }

    /// Nodes that the kernel gives back, which another lane has read and cannot send yet.
    fn put_forgets(&mut self) {
        let can = self.link.is_some() && self.resends.is_none() && self.forget.is_none();
        if !can || self.session.forgets.is_empty() || !self.has_room() {
            return;
        }
        let Claim::Slot(at) = self.lane.claim(InFlight::Forget) else { return };
        let forgets = self.session.forgets.take(SHARED_PER_RECORD_MAX);
        if forgets.is_empty() {
            // Others were faster. An error: the session has ended.
            let _ = self.lane.unclaim(at);
            return;
        }
        LaneCounters::add(&self.lane.counters.forgets, forgets.len());
        self.forget = Some((at, forgets));
        self.put_forget();
    }

    /// Puts them into the batch, which has room.
    fn put_forget(&mut self) {
        let Some((at, forgets)) = &self.forget else { return };
        let record = self.lane.record(Kind::Forget, *at, 0, 0);
        let fits = self.builder.push(&mut self.buffer, record, forgets.as_bytes());
        debug_assert!(fits, "{} forgets", forgets.len());
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
        let Some(link) = &self.link else {
            // What is in it has slots: it comes again, or the session's end has answered it.
            self.builder = BatchBuilder::new();
            return;
        };
        if self.sending.is_none() && !self.builder.is_empty() {
            let bytes = link.conn.seal(&mut self.builder, &mut self.buffer);
            LaneCounters::add(&self.lane.counters.batches, 1);
            LaneCounters::add(&self.lane.counters.bytes_up, bytes);
            self.sending = Some(0..bytes);
        }
        while let Some(range) = &mut self.sending {
            match link.conn.try_send(&self.buffer[range.clone()]) {
                Ok(sent) => range.start += sent,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(errno) => return self.cut(End::Lost { conn: self.lane.index.into(), errno }),
            }
            if range.start == range.end {
                self.sending = None;
                link.conn.has_sent();
            }
        }
    }

    /// The connection is over. The lane goes on, as one of the device does.
    fn cut(&mut self, end: End) {
        let Some(link) = self.link.take() else { return };
        let sending = self.sending.take().unwrap_or_default();
        let resends = self.resends.take().unwrap_or_default();
        let unsent = unsent(&self.builder, &sending, &self.buffer, &resends);
        self.builder = BatchBuilder::new();
        self.before = Some(link.half.deframer);
        self.session.lost(self.lane, &link.conn, end, &unsent);
        // The kernel does not tell of a signal that comes while it hands a request to its entry, as
        // with the FLUSH of a killed process; and while it is cut nothing else would answer.
        self.session.interrupts.set_deaf(self.lane.index, true);
    }

    fn receive(&mut self) -> Result<(), End> {
        let Some(link) = &mut self.link else { return Ok(()) };
        match link.conn.try_receive(link.half.deframer.spare()) {
            Ok(0) => self.cut(End::Closed { conn: self.lane.index.into() }),
            Ok(bytes) => {
                link.heard.bytes(bytes);
                link.half.deframer.filled(bytes);
                return self.take_received();
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => self.cut(End::Lost { conn: self.lane.index.into(), errno }),
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
        let Some(link) = &mut self.link else { return Ok(()) };
        while let Some(bytes) = link.half.deframer.next_batch().map_err(LinkError::from)? {
            let header = link.half.rx.accept(bytes, link.conn.sent())?;
            let mut cursor = Cursor::new(&header);
            while let Some((record, span)) = cursor.next(bytes) {
                if record.kind != Kind::Reply as u8 {
                    down::take_record(self.session, self.lane, record, &mut bytes[span])?;
                    continue;
                }
                let reply = &bytes[span];
                let taken = take_reply(self.lane, &self.entry_of_slot, record, reply)?;
                let at = SlotUse { slot: record.slot, seq: record.slot_seq };
                if let Some((_, forgets)) = self.forget.take_if(|its| its.0 == at) {
                    self.session.known.forgotten(0, forgets.as_bytes());
                }
                if let Some((id, request @ InFlight::Request { opcode, .. })) = taken {
                    let doubted = match request.may_have_run(record.code) {
                        true => names_in(&mut self.ring, id),
                        false => Vec::new(),
                    };
                    self.uniques[usize::from(id.0)] = None;
                    let body = &reply[RECORD_HEADER_BYTES..];
                    let mut asked = || {
                        let parts = self.ring.request(id).ok()?;
                        Some(Asked::new(parts.header().nodeid, parts.first_arg()))
                    };
                    if opcode == Opcode::Write as u32
                        && request.may_have_run(record.code)
                        && let Some(asked) = asked()
                    {
                        self.session.known.doubt_write(&asked);
                    }
                    self.session.known.answered(0, opcode, asked, record.code, body);
                    self.ring.reply(id, down::outcome_of(record, reply))?;
                    self.session.doubt_names(self.lane, doubted);
                }
                self.lane.counted();
            }
            link.conn.set_received(link.half.rx.received());
        }
        Ok(())
    }
}

/// The names that an entry's request makes or takes away.
fn names_in(ring: &mut Ring, id: EntryId) -> Vec<Name> {
    let Ok(parts) = ring.request(id) else { return Vec::new() };
    let mut frame = vec![0; parts.frame_bytes()];
    let InHeader { opcode, nodeid, .. } = *parts.header();
    match parts.copy_to(&mut frame) {
        Some(_) => names_of(opcode, nodeid, &frame[size_of::<InHeader>()..]),
        None => Vec::new(),
    }
}

/// The slot of a reply is free; the entry that waits for it, if one does, and what it asked.
fn take_reply(
    lane: &Lane,
    entry_of_slot: &[EntryId],
    record: RecordHeader,
    bytes: &[u8],
) -> Result<Option<(EntryId, InFlight)>, End> {
    if record.lane != lane.index {
        return Err(End::Protocol("a reply for a lane of another connection"));
    }
    let at = SlotUse { slot: record.slot, seq: record.slot_seq };
    let request = lane.complete(at)?;
    LaneCounters::add(&lane.counters.replies, 1);
    LaneCounters::add(&lane.counters.bytes_down, bytes.len());
    match request {
        InFlight::Request { .. } => Ok(Some((entry_of_slot[usize::from(at.slot)], request))),
        // The entry may have the next request by now.
        InFlight::Abandoned | InFlight::Forget => Ok(None),
    }
}
