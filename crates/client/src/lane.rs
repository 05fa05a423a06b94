//! One lane: a clone of the FUSE device, its slots, its park, and the kick that wakes its up
//! thread.
//!
//! Invariant: every request that the lane's device has read is in its table, in its park, or
//! answered; whoever takes it out of there owes the kernel the answer, by this lane's device. No
//! lane's lock is taken while another's is held. It must not touch sockets or batches.

use fuser_fork::device::{Device, DeviceError, ReplyOutcome};
use fuser_fork::frame::error_reply;
use ringfs_wire::batch::{Kind, RecordHeader};
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

/// What is kept of a request until its reply. A resume will find here what to send again.
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
    },
    /// Node ids given back: the kernel waits for nothing.
    Forget,
}

/// What the thread sends besides requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// The task of the request in that slot is dying.
    Cancel(SlotUse),
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
    /// None is free: park. The lane is kicked when one is.
    Full,
    /// The session is over: answer locally.
    Closed,
}

/// What an interrupt came to.
#[derive(Debug)]
pub enum Interrupted {
    /// The target is in flight: a CANCEL will go out.
    Cancelled,
    /// It had not been sent: answer it now.
    Parked(Parked),
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
}

impl LaneCounters {
    /// Adds to one of them.
    pub fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Table {
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
        })
    }

    /// A slot for a request, behind those that are parked.
    pub fn claim(&self, request: InFlight) -> Claim {
        let mut table = lock(&self.table);
        if table.closed {
            return Claim::Closed;
        }
        if table.park.is_empty()
            && let Ok(at) = table.slots.claim(request)
        {
            return Claim::Slot(at);
        }
        table.starved = true;
        Claim::Full
    }

    /// Keeps a request for which [`Lane::claim`] had no slot; gives it back if the session is over.
    pub fn park(&self, parked: Parked) -> Result<(), Parked> {
        let mut table = lock(&self.table);
        if table.closed {
            return Err(parked);
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
        let (unique, opcode, pid) = (front.unique, front.opcode, front.pid);
        let Ok(at) = table.slots.claim(InFlight::Request { unique, opcode, pid }) else {
            table.starved = true;
            return None;
        };
        let parked = table.park.pop_front()?;
        table.park_bytes -= parked.frame.len();
        Some((at, parked))
    }

    /// Requests and bytes parked.
    pub fn parked(&self) -> (usize, usize) {
        let table = lock(&self.table);
        (table.park.len(), table.park_bytes)
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        lock(&self.table).slots.in_use()
    }

    /// The reply to a request is here, as the lane's own thread finds.
    pub fn complete(&self, at: SlotUse) -> Result<InFlight, SlotError> {
        let mut table = lock(&self.table);
        let request = table.slots.complete(at)?;
        self.slot_is_free(table);
        Ok(request)
    }

    /// The request is not sent after all, as the lane's own thread finds: the slot is free for the
    /// same use, and a CANCEL that waits would be for whoever has that next. An error: the session
    /// has ended meanwhile, and the request with it.
    pub fn unclaim(&self, at: SlotUse) -> Result<InFlight, SlotError> {
        let mut table = lock(&self.table);
        let request = table.slots.unclaim(at)?;
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
        let parked = table.park.iter().map(|parked| (parked.unique, parked.pid));
        let in_flight = table.slots.in_flight().filter_map(|(_, request)| match request {
            InFlight::Request { unique, pid, .. } => Some((*unique, *pid)),
            InFlight::Forget => None,
        });
        parked.chain(in_flight).find(|(its, _)| *its == unique).map(|(_, pid)| pid)
    }

    /// Nobody waits for `unique` any more: takes it from the park, or has the daemon told.
    pub fn interrupt(&self, unique: u64) -> Interrupted {
        let mut table = lock(&self.table);
        if let Some(at) = table.park.iter().position(|parked| parked.unique == unique)
            && let Some(parked) = table.park.remove(at)
        {
            table.park_bytes -= parked.frame.len();
            return Interrupted::Parked(parked);
        }
        let is_target = |request: &InFlight| match request {
            InFlight::Request { unique: its, .. } => *its == unique,
            InFlight::Forget => false,
        };
        let found = table.slots.in_flight().find(|(_, request)| is_target(request));
        let Some((at, _)) = found else { return Interrupted::Unknown };
        let cancel = Control::Cancel(at);
        if table.controls.len() < CONTROLS_MAX && !table.controls.contains(&cancel) {
            table.controls.push_back(cancel);
        }
        drop(table);
        self.kick();
        Interrupted::Cancelled
    }

    /// Has the thread answer a PING. A peer that asks faster than we answer is not heard.
    pub fn queue_pong(&self) {
        let mut table = lock(&self.table);
        if !table.controls.contains(&Control::Pong) && table.controls.len() < CONTROLS_MAX {
            table.controls.push_back(Control::Pong);
        }
        drop(table);
        self.kick();
    }

    /// The next of what [`Lane::interrupt`] and [`Lane::queue_pong`] left.
    pub fn next_control(&self) -> Option<Control> {
        lock(&self.table).controls.pop_front()
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
        match self.device.reply(reply) {
            Ok(ReplyOutcome::Delivered | ReplyOutcome::Gone | ReplyOutcome::Unmounted) => {}
            Ok(ReplyOutcome::Refused) => {
                LaneCounters::add(&self.counters.refused_replies, 1);
                let bytes = reply.len();
                tracing::warn!(lane = self.index, bytes, "the kernel refused a reply's length");
            }
            Err(error) => self.report(&error),
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
        InFlight::Request { unique, opcode: 1, pid: 0 }
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
        assert_eq!(lane.next_control(), Some(Control::Cancel(at)));
        assert_eq!(lane.next_control(), None);
        assert!(matches!(lane.interrupt(4), Interrupted::Parked(Parked { unique: 4, .. })));
        assert_eq!(lane.parked(), (0, 0));
        assert_eq!(lane.waits(4), None);
        assert!(matches!(lane.interrupt(4), Interrupted::Unknown));
    }

    #[test]
    fn what_is_not_sent_leaves_no_trace() {
        let lane = lane(1);
        let Claim::Slot(at) = lane.claim(request(2)) else { panic!("no slot") };
        lane.park(parked(4)).expect("open");
        lane.queue_pong();
        assert!(matches!(lane.interrupt(2), Interrupted::Cancelled));
        assert!(lane.take_kick());
        assert_eq!(lane.unclaim(at), Ok(request(2)));
        assert!(lane.take_kick(), "a parked request can have the slot");
        let (next, parked) = lane.unpark().expect("a slot and a request");
        assert_eq!((next, parked.unique), (at, 4));
        // The cancel named this use of the slot, and meant another request.
        assert_eq!(lane.next_control(), Some(Control::Pong));
        assert_eq!(lane.next_control(), None);
    }

    #[test]
    fn pings_do_not_pile_up() {
        let lane = lane(1);
        for _ in 0..CONTROLS_MAX * 2 {
            lane.queue_pong();
        }
        assert_eq!(lane.next_control(), Some(Control::Pong));
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
}
