//! One lane: a clone of the FUSE device, its slots, its park, and the kick that wakes its up
//! thread.
//!
//! Invariant: every request that the lane's device has read is in its table, in its park, or
//! answered; whoever takes it out of there owes the kernel the answer, by this lane's device. A
//! slot is in use until the daemon has said what became of its request, answered here or not. No
//! lane's lock is taken while another's is held. It must not touch sockets or batches.

use crate::keep::LaneKeep;
use crate::resume::{Resend, resends};
use fuser_fork::device::{Device, DeviceError, ReplyOutcome};
use fuser_fork::frame::{UNIQUE_RESEND, error_reply};
use ringfs_wire::abi::{ForgetOne, Opcode};
use ringfs_wire::batch::{Kind, RecordHeader};
use ringfs_wire::limits::RECORD_HEADER_BYTES;
use ringfs_wire::slot::{ClientSlots, SlotError, SlotUse};
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Requests that one lane parks.
pub const PARK_FRAMES_MAX: usize = 512;
/// Bytes that one lane parks; a last frame may exceed it.
pub const PARK_BYTES_MAX: usize = 4 << 20;
/// Cancels and pongs that wait for the thread.
pub const CONTROLS_MAX: usize = 2048;

/// What others may see of a request until its reply; its frame is the thread's (`kept`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InFlight {
    /// A request of the kernel's.
    Request {
        /// Its id.
        unique: u64,
        /// What it asks.
        opcode: u32,
        /// The task that waits for it; 0 where it cannot be named here.
        pid: u32,
        /// That task is dying, and the daemon has been told.
        cancelled: bool,
        /// It was sent to a daemon of which the one that has the session now knows nothing.
        unsure: bool,
    },
    /// Node ids given back: the kernel waits for nothing.
    Forget,
    /// Answered here: it is never sent again, and what the daemon says of it is for the slot alone.
    Abandoned,
}

impl InFlight {
    /// A request that nobody has interrupted.
    pub fn request(unique: u64, opcode: u32, pid: u32) -> InFlight {
        InFlight::Request { unique, opcode, pid, cancelled: false, unsure: false }
    }
}

/// What the thread sends besides requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// The task of the request in that slot is dying.
    Cancel(SlotUse),
    /// We ask whether the daemon is there.
    Ping,
    /// The daemon asked whether we are there.
    Pong,
}

/// A request that waits for a slot.
#[derive(Debug)]
pub struct Parked {
    /// Its id.
    pub unique: u64,
    /// What it asks.
    pub opcode: u32,
    /// The task that waits for it; 0 where it cannot be named here.
    pub pid: u32,
    /// The frame, as read.
    pub frame: Box<[u8]>,
}

/// What a wish for a slot came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is yours.
    Slot(SlotUse),
    /// None is free, or there is no connection: park. The lane is kicked when that changes.
    Full,
    /// The session is over: answer locally.
    Closed,
}

/// What an interrupt came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupted {
    /// The target is in flight: a CANCEL will go out.
    Cancelled,
    /// It had not been sent: answer it now.
    Parked,
    /// It may have been sent, and the connection is gone: answer it now.
    Abandoned,
    /// Not of this lane.
    Unknown,
}

/// What a lane has done so far.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "the names say it")]
pub struct LaneCounters {
    pub requests: AtomicU64,
    pub replies: AtomicU64,
    pub forgets: AtomicU64,
    pub interrupts: AtomicU64,
    pub cancels: AtomicU64,
    pub batches: AtomicU64,
    pub bytes_up: AtomicU64,
    pub bytes_down: AtomicU64,
    pub parked_total: AtomicU64,
    pub refused_replies: AtomicU64,
    pub abandoned_total: AtomicU64,
}

impl LaneCounters {
    /// Adds to one of them.
    pub fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }
}

/// Whether requests can leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// The connection is gone.
    Cut,
    /// There is a new one, and what was in flight goes first.
    Resending,
}

#[derive(Debug)]
struct Table {
    phase: Phase,
    /// What waits for a connection any longer fails with this.
    overdue: Option<Errno>,
    slots: ClientSlots<InFlight>,
    park: VecDeque<Parked>,
    park_bytes: usize,
    controls: VecDeque<Control>,
    /// Somebody waits for a slot.
    starved: bool,
    closed: bool,
}

/// One lane.
#[derive(Debug)]
pub struct Lane {
    /// Its number, as records name it.
    pub index: u8,
    /// The clone that reads its requests and takes their replies.
    pub device: Arc<Device>,
    /// What it has done.
    pub counters: LaneCounters,
    table: Mutex<Table>,
    kick: OwnedFd,
    kicked: AtomicBool,
    spare: AtomicBool,
    slots: u16,
    by_ring: AtomicBool,
    local_answers: Mutex<Vec<(u64, Errno)>>,
    /// For the client that takes over, if one can.
    keep: Option<LaneKeep>,
    /// Whose requests the client before had read: by this one they were read again.
    resent_by: Option<Arc<Device>>,
    inherited: Mutex<Inherited>,
}

/// What a lane's thread begins with, when the client before has died.
#[derive(Debug, Default)]
pub struct Inherited {
    /// The records in flight, by slot.
    pub records: Vec<(u16, Vec<u8>)>,
    /// Frames that were read and not looked at.
    pub frames: Vec<Vec<u8>>,
    /// Node ids to give back.
    pub forgets: Vec<ForgetOne>,
}

impl Table {
    fn waiting(&self) -> impl Iterator<Item = (u64, u32)> {
        let parked = self.park.iter().map(|parked| (parked.unique, parked.pid));
        let in_flight = self.slots.in_flight().filter_map(|(_, request)| match request {
            InFlight::Request { unique, pid, .. } => Some((*unique, *pid)),
            InFlight::Forget | InFlight::Abandoned => None,
        });
        parked.chain(in_flight)
    }

    /// Has the requests that `choose` means answered here: their ids.
    fn abandon(&mut self, keep: Option<&LaneKeep>, choose: impl Fn(&InFlight) -> bool) -> Vec<u64> {
        let chosen = self.slots.in_flight_mut().filter(|(_, request)| choose(request));
        let ids = chosen.filter_map(|(at, request)| {
            if let Some(keep) = keep {
                keep.abandoned(at);
            }
            match std::mem::replace(request, InFlight::Abandoned) {
                InFlight::Request { unique, .. } => Some(unique),
                InFlight::Forget | InFlight::Abandoned => None,
            }
        });
        ids.collect()
    }
}

/// Whether a task waits for that request.
fn is_waited_for(opcode: u32) -> bool {
    !matches!(Opcode::from_u32(opcode), Some(Opcode::Release | Opcode::Releasedir))
}

/// A lock whose holder panicked is taken over: the process is about to end anyway.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lane {
    /// A lane over `device` with `slots` slots.
    pub fn new(index: u8, device: Arc<Device>, slots: u16) -> io::Result<Lane> {
        Ok(Lane {
            index,
            device,
            counters: LaneCounters::default(),
            table: Mutex::new(Table {
                phase: Phase::Open,
                overdue: None,
                slots: ClientSlots::new(slots),
                park: VecDeque::new(),
                park_bytes: 0,
                controls: VecDeque::new(),
                starved: false,
                closed: false,
            }),
            kick: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            kicked: AtomicBool::new(false),
            spare: AtomicBool::new(false),
            slots,
            by_ring: AtomicBool::new(false),
            local_answers: Mutex::default(),
            keep: None,
            resent_by: None,
            inherited: Mutex::default(),
        })
    }

    /// What happens to its slots is put down there.
    pub fn keeping(self, keep: LaneKeep) -> Lane {
        Lane { keep: Some(keep), ..self }
    }

    /// What another client has left of it: its slots, without a connection, and what its thread
    /// begins with. Requests that the kernel has sent again are answered by `resent_by`.
    pub fn inherit(
        &mut self,
        slots: Vec<(u32, Option<InFlight>)>,
        inherited: Inherited,
        resent_by: Arc<Device>,
    ) {
        let mut table = lock(&self.table);
        table.phase = Phase::Cut;
        table.slots = ClientSlots::restored(slots);
        drop(table);
        *lock(&self.inherited) = inherited;
        self.resent_by = Some(resent_by);
    }

    /// Whether another client has had it before.
    pub fn is_inherited(&self) -> bool {
        self.resent_by.is_some()
    }

    /// What it has inherited, once.
    pub fn take_inherited(&self) -> Inherited {
        std::mem::take(&mut *lock(&self.inherited))
    }

    /// So many forgets were waiting for a slot; now all of these are.
    pub fn forgets_wait(&self, before: usize, forgets: &[ForgetOne]) {
        if let Some(keep) = &self.keep {
            keep.waiting(before, forgets);
        }
    }

    /// A slot for these forgets; `rest` wait further.
    pub fn claim_forget(&self, forgets: &[ForgetOne], rest: usize) -> Claim {
        let claim = self.claim(InFlight::Forget);
        if let (Claim::Slot(at), Some(keep)) = (claim, &self.keep) {
            keep.forgets_claimed(at, forgets, rest);
        }
        claim
    }

    /// The reply to that use of a slot goes to the kernel next.
    pub fn delivering(&self, at: SlotUse) {
        if let Some(keep) = &self.keep {
            keep.delivering(at);
        }
    }

    /// All that the reply to that use of a slot changes is changed.
    pub fn settled(&self, at: SlotUse) {
        if let Some(keep) = &self.keep {
            keep.freed(at, true);
        }
    }

    fn put_down(&self, at: SlotUse, request: InFlight) {
        if let (InFlight::Request { unique, opcode, .. }, Some(keep)) = (request, &self.keep) {
            keep.claimed(at, unique, opcode);
        }
    }

    /// A slot for a request, behind those that are parked.
    pub fn claim(&self, request: InFlight) -> Claim {
        let mut table = lock(&self.table);
        if table.closed {
            return Claim::Closed;
        }
        if table.park.is_empty()
            && table.phase == Phase::Open
            && let Ok(at) = table.slots.claim(request)
        {
            self.put_down(at, request);
            self.trace(at, request, "asked");
            return Claim::Slot(at);
        }
        table.starved = true;
        Claim::Full
    }

    /// Keeps a request for which [`Lane::claim`] had no slot; an error is its answer.
    pub fn park(&self, parked: Parked) -> Result<(), Errno> {
        let mut table = lock(&self.table);
        if table.closed {
            return Err(Errno::NOTCONN);
        }
        if let Some(errno) = table.overdue
            && is_waited_for(parked.opcode)
        {
            return Err(errno);
        }
        table.park_bytes += parked.frame.len();
        table.park.push_back(parked);
        table.starved = true;
        LaneCounters::add(&self.counters.parked_total, 1);
        Ok(())
    }

    /// The request that has been parked for longest, with a slot, if there are both.
    pub fn unpark(&self) -> Option<(SlotUse, Parked)> {
        let mut table = lock(&self.table);
        let front = table.park.front()?;
        let request = InFlight::request(front.unique, front.opcode, front.pid);
        let at = (table.phase == Phase::Open).then(|| table.slots.claim(request).ok()).flatten();
        let Some(at) = at else {
            table.starved = true;
            return None;
        };
        self.put_down(at, request);
        let parked = table.park.pop_front()?;
        table.park_bytes -= parked.frame.len();
        self.trace(at, request, "asked");
        Some((at, parked))
    }

    /// What a request is called on both sides: the daemon's log of slow ones has the same `op`.
    fn trace(&self, at: SlotUse, request: InFlight, what: &str) {
        let op = format_args!("{}.{}.{}", self.index, at.slot, at.seq);
        tracing::trace!(%op, ?request, "{what}");
    }

    /// What is parked waits for something else than a slot, which the next reply may bring.
    pub fn starve(&self) {
        lock(&self.table).starved = true;
    }

    /// Requests and bytes parked.
    pub fn parked(&self) -> (usize, usize) {
        let table = lock(&self.table);
        (table.park.len(), table.park_bytes)
    }

    /// Requests in flight, those that are abandoned included.
    pub fn in_flight(&self) -> usize {
        lock(&self.table).slots.in_use()
    }

    /// Those of them that were answered here.
    pub fn abandoned(&self) -> usize {
        let table = lock(&self.table);
        table.slots.in_flight().filter(|(_, request)| **request == InFlight::Abandoned).count()
    }

    /// The connection is gone: nothing gets a slot until [`Lane::reopen`], and the tasks that are
    /// known to be dying get out.
    pub fn cut(&self) {
        let mut table = lock(&self.table);
        table.phase = Phase::Cut;
        table.controls.clear();
        let dying =
            |request: &InFlight| matches!(request, InFlight::Request { cancelled: true, .. });
        let out = table.abandon(self.keep.as_ref(), dying);
        drop(table);
        self.answer_abandoned(&out, Errno::INTR);
    }

    /// The cut has lasted too long: all that waits is answered `errno`, and what comes before the
    /// next connection too. Nobody waits for a RELEASE, and not to send it would leak a handle.
    pub fn fail_overdue(&self, errno: Errno) {
        let mut table = lock(&self.table);
        if table.phase != Phase::Cut || table.closed {
            return;
        }
        table.overdue = Some(errno);
        let out = table.abandon(
            self.keep.as_ref(),
            |request| matches!(request, InFlight::Request { opcode, .. } if is_waited_for(*opcode)),
        );
        let all = std::mem::take(&mut table.park);
        let (parked, stay) = all.into_iter().partition(|parked| is_waited_for(parked.opcode));
        table.park = stay;
        table.park_bytes = table.park.iter().map(|parked| parked.frame.len()).sum();
        drop(table);
        self.answer_abandoned(&out, errno);
        let parked: VecDeque<Parked> = parked;
        parked.iter().for_each(|parked| self.answer_error(parked.unique, errno));
    }

    fn answer_abandoned(&self, uniques: &[u64], errno: Errno) {
        LaneCounters::add(&self.counters.abandoned_total, uniques.len());
        uniques.iter().for_each(|&unique| self.answer_error(unique, errno));
    }

    /// There will be a connection at once: to wait makes sense again.
    pub fn renew(&self) {
        lock(&self.table).overdue = None;
    }

    /// There is a connection: what has to be sent on it before all else.
    pub fn resend(&self) -> VecDeque<Resend> {
        let mut table = lock(&self.table);
        table.phase = Phase::Resending;
        table.overdue = None;
        resends(table.slots.in_flight())
    }

    /// The session is rebuilt: whatever has been sent may have run, and only we know that it was.
    pub fn doubt(&self) {
        let mut table = lock(&self.table);
        for (at, request) in table.slots.in_flight_mut() {
            if let InFlight::Request { opcode, unsure, .. } = request {
                *unsure = true;
                if let Some(keep) = &self.keep {
                    keep.doubted(at, *opcode);
                }
            }
        }
    }

    /// All of that is in batches: requests get slots again.
    pub fn reopen(&self) {
        lock(&self.table).phase = Phase::Open;
        self.kicked.store(true, Ordering::Release);
    }

    /// The reply to a request is here, as the lane's own thread finds.
    pub fn complete(&self, at: SlotUse) -> Result<InFlight, SlotError> {
        let mut table = lock(&self.table);
        let request = table.slots.complete(at)?;
        self.slot_is_free(table);
        self.trace(at, request, "answered");
        Ok(request)
    }

    /// The request is not sent after all, as the lane's own thread finds: the slot is free for the
    /// same use, and a CANCEL that waits would be for whoever has that next. An error: the session
    /// has ended meanwhile, and the request with it.
    pub fn unclaim(&self, at: SlotUse) -> Result<InFlight, SlotError> {
        let mut table = lock(&self.table);
        let request = table.slots.unclaim(at)?;
        if let Some(keep) = &self.keep {
            keep.freed(at, false);
        }
        table.controls.retain(|control| *control != Control::Cancel(at));
        self.slot_is_free(table);
        Ok(request)
    }

    fn slot_is_free(&self, mut table: MutexGuard<'_, Table>) {
        let starved = std::mem::take(&mut table.starved);
        drop(table);
        if starved {
            // Its own thread looks at this before it sleeps.
            self.kicked.store(true, Ordering::Release);
        }
    }

    /// The task that waits for the answer to `unique`, if that is parked or in flight here.
    pub fn waits(&self, unique: u64) -> Option<u32> {
        let table = lock(&self.table);
        table.waiting().find(|(its, _)| *its == unique).map(|(_, pid)| pid)
    }

    /// All that is parked or in flight here, with the tasks that wait.
    pub fn waiting(&self) -> Vec<(u64, u32)> {
        lock(&self.table).waiting().collect()
    }

    /// Nobody waits for `unique` any more: takes it from the park, or has the daemon told.
    pub fn interrupt(&self, unique: u64) -> Interrupted {
        let mut table = lock(&self.table);
        if let Some(at) = table.park.iter().position(|parked| parked.unique == unique)
            && let Some(parked) = table.park.remove(at)
        {
            table.park_bytes -= parked.frame.len();
            return Interrupted::Parked;
        }
        let is_cut = table.phase == Phase::Cut;
        let target = table.slots.in_flight_mut().find_map(|(at, request)| match request {
            InFlight::Request { unique: its, cancelled, .. } if *its == unique => {
                *cancelled = true;
                if is_cut {
                    if let Some(keep) = &self.keep {
                        keep.abandoned(at);
                    }
                    *request = InFlight::Abandoned;
                }
                Some(at)
            }
            InFlight::Request { .. } | InFlight::Forget | InFlight::Abandoned => None,
        });
        let Some(at) = target else { return Interrupted::Unknown };
        if is_cut {
            LaneCounters::add(&self.counters.abandoned_total, 1);
            return Interrupted::Abandoned;
        }
        let cancel = Control::Cancel(at);
        if table.controls.len() < CONTROLS_MAX && !table.controls.contains(&cancel) {
            table.controls.push_back(cancel);
        }
        drop(table);
        self.kick();
        Interrupted::Cancelled
    }

    /// Has the thread send a PING or a PONG: one of each, however often the peer has asked
    /// meanwhile, and behind as many cancels as there are.
    pub fn queue(&self, control: Control) {
        let mut table = lock(&self.table);
        if !table.controls.contains(&control) {
            table.controls.push_back(control);
        }
        drop(table);
        self.kick();
    }

    /// The record of the next that [`Lane::interrupt`] and [`Lane::queue`] left.
    pub fn next_control(&self) -> Option<RecordHeader> {
        let control = lock(&self.table).controls.pop_front()?;
        let nobody = SlotUse { slot: 0, seq: 0 };
        let (kind, at) = match control {
            Control::Cancel(at) => {
                LaneCounters::add(&self.counters.cancels, 1);
                (Kind::Cancel, at)
            }
            Control::Ping => (Kind::Ping, nobody),
            Control::Pong => (Kind::Pong, nobody),
        };
        Some(self.record(kind, at, 0, RECORD_HEADER_BYTES))
    }

    /// The session is over: nothing gets a slot any more, and all that waits is answered `errno`.
    pub fn close(&self, errno: Errno) {
        let mut table = lock(&self.table);
        table.closed = true;
        table.controls.clear();
        table.park_bytes = 0;
        let mut waiting: Vec<u64> = table.park.drain(..).map(|parked| parked.unique).collect();
        let in_flight: Vec<_> = table.slots.in_flight().map(|(at, _)| at).collect();
        for at in in_flight {
            if let Ok(InFlight::Request { unique, .. }) = table.slots.complete(at) {
                waiting.push(unique);
            }
        }
        drop(table);
        for unique in waiting {
            self.answer_error(unique, errno);
        }
        self.kick();
    }

    /// Slots of this lane.
    pub fn slots(&self) -> u16 {
        self.slots
    }

    /// From now on requests come by queue entries: the lane's thread alone can answer them.
    pub fn answers_by_ring(&self) {
        self.by_ring.store(true, Ordering::Release);
    }

    /// What [`Lane::answer_error`] left to the thread; at most one answer a slot.
    pub fn take_local_answers(&self) -> Vec<(u64, Errno)> {
        std::mem::take(&mut *lock(&self.local_answers))
    }

    /// Answers a request without the daemon.
    pub fn answer_error(&self, unique: u64, errno: Errno) {
        if self.by_ring.load(Ordering::Acquire) {
            lock(&self.local_answers).push((unique, errno));
            return self.kick();
        }
        self.answer(&error_reply(unique, errno.raw_os_error()));
    }

    /// Writes a reply; what the kernel thinks of it is counted and logged, since nobody else can
    /// act on it.
    pub fn answer(&self, reply: &[u8]) {
        match self.device_of(reply).reply(reply) {
            Ok(ReplyOutcome::Delivered | ReplyOutcome::Gone | ReplyOutcome::Unmounted) => {}
            Ok(ReplyOutcome::Refused) => {
                LaneCounters::add(&self.counters.refused_replies, 1);
                let bytes = reply.len();
                tracing::warn!(lane = self.index, bytes, "the kernel refused a reply's length");
            }
            Err(error) => self.report(&error),
        }
    }

    /// The one that has read what `reply` answers.
    fn device_of(&self, reply: &[u8]) -> &Device {
        let Some(resent_by) = &self.resent_by else { return &self.device };
        let unique = reply.get(8..16).and_then(|id| id.try_into().ok()).map(u64::from_ne_bytes);
        match unique {
            Some(unique) if unique & UNIQUE_RESEND != 0 => resent_by,
            _ => &self.device,
        }
    }

    fn report(&self, error: &DeviceError) {
        LaneCounters::add(&self.counters.refused_replies, 1);
        tracing::error!(lane = self.index, %error, "a reply could not be written");
    }

    /// Wakes the thread, or has it look again before it sleeps.
    pub fn kick(&self) {
        if !self.kicked.swap(true, Ordering::AcqRel) {
            // It can fail only by a full counter, which is readable as well.
            let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
        }
    }

    /// Says whether the lane sleeps for want of work. It is said before the sleep, so that whoever
    /// then finds nobody awake finds this lane.
    pub fn set_spare(&self, spare: bool) {
        self.spare.store(spare, Ordering::SeqCst);
    }

    /// Whether the lane sleeps for want of work, and nobody has kicked it yet.
    pub fn is_spare(&self) -> bool {
        self.spare.load(Ordering::SeqCst) && !self.is_kicked()
    }

    /// The header of a record of this lane, of `bytes` bytes with it.
    pub fn record(&self, kind: Kind, at: SlotUse, code: u32, bytes: usize) -> RecordHeader {
        RecordHeader {
            len: bytes as u32,
            kind: kind as u8,
            lane: self.index,
            slot: at.slot,
            slot_seq: at.seq,
            code,
        }
    }

    /// Whether [`Lane::take_kick`] would find a kick.
    pub fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::Relaxed)
    }

    /// Whether somebody has kicked since the last call.
    pub fn take_kick(&self) -> bool {
        self.kicked.load(Ordering::Relaxed) && self.kicked.swap(false, Ordering::AcqRel)
    }

    /// What a sleeping thread polls.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// Makes the kick unreadable again.
    pub fn drain_kick(&self) {
        let mut count = [0u8; 8];
        // Nothing to drain is fine.
        let _ = rustix::io::read(&self.kick, &mut count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(slots: u16) -> Lane {
        let device = Device::open("/dev/fuse").expect("the tests need /dev/fuse");
        Lane::new(0, Arc::new(device), slots).expect("lane")
    }

    fn request(unique: u64) -> InFlight {
        InFlight::request(unique, 1, 0)
    }

    fn parked(unique: u64) -> Parked {
        Parked { unique, opcode: 1, pid: 77, frame: vec![0; 48].into() }
    }

    fn readable(lane: &Lane) -> bool {
        let mut fds =
            [rustix::event::PollFd::from_borrowed_fd(lane.kick_fd(), rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())).expect("poll") == 1
    }

    #[test]
    fn what_is_parked_goes_first_and_in_order() {
        let lane = lane(1);
        let Claim::Slot(first) = lane.claim(request(2)) else { panic!("no slot") };
        for unique in [4, 6] {
            assert_eq!(lane.claim(request(unique)), Claim::Full);
            lane.park(parked(unique)).expect("open");
        }
        assert_eq!(lane.parked(), (2, 96));
        assert!(lane.unpark().is_none());
        assert!(!lane.is_kicked());
        assert_eq!(lane.complete(first), Ok(request(2)));
        assert!(lane.take_kick() && !lane.take_kick() && !readable(&lane));
        // A newcomer has to wait its turn.
        assert_eq!(lane.claim(request(8)), Claim::Full);
        let (at, next) = lane.unpark().expect("a slot and a request");
        assert_eq!((next.unique, at.seq), (4, 1));
        assert!(lane.unpark().is_none());
        assert_eq!((lane.parked(), lane.in_flight()), ((1, 48), 1));
    }

    #[test]
    fn interrupts_find_their_target() {
        let lane = lane(1);
        let Claim::Slot(at) = lane.claim(request(2)) else { panic!("no slot") };
        lane.park(parked(4)).expect("open");
        assert!(matches!(lane.interrupt(9), Interrupted::Unknown));
        assert_eq!([9, 2, 4].map(|unique| lane.waits(unique)), [None, Some(0), Some(77)]);
        assert!(!readable(&lane));
        // Twice, and one cancel.
        assert!(matches!(lane.interrupt(2), Interrupted::Cancelled));
        assert!(matches!(lane.interrupt(2), Interrupted::Cancelled));
        assert!(readable(&lane));
        assert_eq!(lane.next_control(), Some(lane.record(Kind::Cancel, at, 0, 16)));
        assert_eq!(lane.next_control(), None);
        assert!(matches!(lane.interrupt(4), Interrupted::Parked));
        assert_eq!(lane.parked(), (0, 0));
        assert_eq!(lane.waits(4), None);
        assert!(matches!(lane.interrupt(4), Interrupted::Unknown));
    }

    #[test]
    fn what_is_not_sent_leaves_no_trace() {
        let lane = lane(1);
        let Claim::Slot(at) = lane.claim(request(2)) else { panic!("no slot") };
        lane.park(parked(4)).expect("open");
        lane.queue(Control::Pong);
        assert!(matches!(lane.interrupt(2), Interrupted::Cancelled));
        assert!(lane.take_kick());
        assert!(matches!(lane.unclaim(at), Ok(InFlight::Request { unique: 2, .. })));
        assert!(lane.take_kick(), "a parked request can have the slot");
        let (next, parked) = lane.unpark().expect("a slot and a request");
        assert_eq!((next, parked.unique), (at, 4));
        // The cancel named this use of the slot, and meant another request.
        assert_eq!(lane.next_control().map(|record| record.kind), Some(Kind::Pong as u8));
        assert_eq!(lane.next_control(), None);
    }

    #[test]
    fn pings_do_not_pile_up() {
        let lane = lane(1);
        for _ in 0..CONTROLS_MAX * 2 {
            lane.queue(Control::Pong);
        }
        assert_eq!(lane.next_control().map(|record| record.kind), Some(Kind::Pong as u8));
        assert_eq!(lane.next_control(), None);
    }

    #[test]
    fn a_closed_lane_takes_nothing() {
        let lane = lane(2);
        let Claim::Slot(at) = lane.claim(request(2)) else { panic!("no slot") };
        assert_eq!(lane.claim(InFlight::Forget), Claim::Slot(SlotUse { slot: 1, seq: 0 }));
        lane.close(Errno::IO);
        assert_eq!(lane.claim(request(4)), Claim::Closed);
        assert!(lane.park(parked(6)).is_err());
        assert_eq!(lane.in_flight(), 0);
        assert!(lane.complete(at).is_err());
        assert!(lane.take_kick());
    }

    #[test]
    fn while_cut_all_is_parked_and_the_dying_get_out() {
        let lane = lane(3);
        let Claim::Slot(dying) = lane.claim(request(2)) else { panic!("no slot") };
        let Claim::Slot(living) = lane.claim(request(4)) else { panic!("no slot") };
        let Claim::Slot(forget) = lane.claim(InFlight::Forget) else { panic!("no slot") };
        assert!(matches!(lane.interrupt(2), Interrupted::Cancelled));
        lane.cut();
        // It was answered; its slot stays, and its CANCEL was for the old connection.
        assert_eq!((lane.in_flight(), lane.abandoned(), lane.waits(2)), (3, 1, None));
        assert_eq!(lane.next_control(), None);
        assert!(matches!(lane.interrupt(2), Interrupted::Unknown));
        assert_eq!(lane.claim(request(6)), Claim::Full);
        lane.park(parked(6)).expect("open");
        assert!(lane.unpark().is_none());
        assert_eq!(
            lane.resend(),
            [Resend::Abandon(dying), Resend::Frame(living), Resend::Frame(forget)]
        );
        assert!(lane.unpark().is_none() && lane.claim(request(8)) == Claim::Full);
        lane.take_kick();
        lane.reopen();
        assert!(lane.take_kick(), "what is parked can go");
        assert_eq!(lane.complete(dying), Ok(InFlight::Abandoned));
        assert_eq!(lane.unpark().map(|(at, parked)| (at.slot, parked.unique)), Some((0, 6)));
        // In flight, and cut again: a task that dies meanwhile is let go at once.
        lane.cut();
        assert!(matches!(lane.interrupt(4), Interrupted::Abandoned));
        assert_eq!(lane.abandoned(), 1);
    }

    #[test]
    fn a_cut_that_lasts_too_long_fails_what_somebody_waits_for() {
        let lane = lane(3);
        let release = Opcode::Release as u32;
        for request in [request(2), InFlight::request(4, release, 0), InFlight::Forget] {
            assert!(matches!(lane.claim(request), Claim::Slot(_)));
        }
        lane.park(parked(6)).expect("open");
        lane.fail_overdue(Errno::IO);
        assert_eq!((lane.abandoned(), lane.parked().0), (0, 1), "it is not cut");
        lane.cut();
        lane.park(Parked { opcode: release, ..parked(8) }).expect("open");
        lane.fail_overdue(Errno::IO);
        assert_eq!((lane.abandoned(), lane.parked()), (1, (1, 48)));
        assert_eq!(lane.park(parked(10)), Err(Errno::IO));
        lane.park(Parked { opcode: release, ..parked(12) }).expect("nobody waits for it");
        assert_eq!(lane.resend().len(), 3);
        lane.reopen();
        lane.park(parked(14)).expect("a new connection");
    }
}
