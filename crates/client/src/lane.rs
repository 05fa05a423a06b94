//! One lane: a clone of the FUSE device, its slots, its park, and the kick that wakes its up
//! thread.
//!
//! Invariant: every request that the lane's device has read is in its table, in its park, or
//! answered; whoever takes it out of there owes the kernel the answer, by this lane's device. A
//! slot is in use until the daemon has said what became of its request, answered here or not. No
//! lane's lock is taken while another's is held. It must not touch sockets or batches.

use crate::keep::LaneKeep;
use fuser_fork::device::{Device, DeviceError, ReplyOutcome};
use fuser_fork::frame::{UNIQUE_RESEND, error_reply, out_header};
use ringfs_wire::abi::ForgetOne;
use ringfs_wire::batch::{Kind, RecordHeader};
use ringfs_wire::limits::RECORD_HEADER_BYTES;
use ringfs_wire::slot::SlotUse;
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use table::Table;

mod table;

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
        /// Some daemon may have it. Known at the first cut.
        sent: bool,
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
        InFlight::Request { unique, opcode, pid, cancelled: false, sent: false, unsure: false }
    }

    /// Whether it may have run although the kernel is told, or was, that it has failed: with what
    /// the daemon says of it in the end.
    pub fn may_have_run(&self, code: u32) -> bool {
        match self {
            InFlight::Request { sent, .. } => *sent && code == Errno::IO.raw_os_error() as u32,
            InFlight::Abandoned => true,
            InFlight::Forget => false,
        }
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
    pub replies_spliced: AtomicU64,
    pub stored: AtomicU64,
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

/// One lane.
#[derive(Debug)]
pub struct Lane {
    /// Its number, as records name it.
    pub index: u8,
    /// What the daemon's log calls the session.
    session: AtomicU64,
    /// The clone that reads its requests and takes their replies.
    pub device: Arc<Device>,
    /// What it has done.
    pub counters: LaneCounters,
    table: Mutex<Table>,
    /// A reply's slot is free, and what it gives does not count yet: its turn has not ended.
    counting: AtomicBool,
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

/// A lock whose holder panicked is taken over: the process is about to end anyway.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lane {
    /// A lane over `device` with `slots` slots.
    pub fn new(index: u8, device: Arc<Device>, slots: u16) -> io::Result<Lane> {
        Ok(Lane {
            index,
            session: AtomicU64::new(0),
            device,
            counters: LaneCounters::default(),
            table: Mutex::new(Table::new(slots)),
            counting: AtomicBool::new(false),
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

    /// From now on its requests are those of a session that the daemon calls so.
    pub fn is_of(&self, session: u64) {
        self.session.store(session, Ordering::Relaxed);
    }

    /// What happens to its slots is put down there.
    pub fn keeping(self, keep: LaneKeep) -> Lane {
        Lane { keep: Some(keep), ..self }
    }

    /// Whether another client has had it before.
    pub fn is_inherited(&self) -> bool {
        self.resent_by.is_some()
    }

    /// What it has inherited, once.
    pub fn take_inherited(&self) -> Inherited {
        std::mem::take(&mut *lock(&self.inherited))
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
        let unique = reply.get(8..16).and_then(|id| id.try_into().ok()).map(u64::from_ne_bytes);
        let _ = self.tell(unique.unwrap_or(0), |device| device.reply(reply));
    }

    /// The same of a reply to `unique`, header and body, that is all that the pipe holds.
    pub fn answer_from(&self, pipe: BorrowedFd<'_>, unique: u64, bytes: usize) -> ReplyOutcome {
        let header = out_header(unique, bytes - RECORD_HEADER_BYTES);
        self.tell(unique, |device| device.reply_spliced(pipe, &header))
    }

    fn tell(
        &self,
        unique: u64,
        how: impl FnOnce(&Device) -> Result<ReplyOutcome, DeviceError>,
    ) -> ReplyOutcome {
        let device = self.device_of(unique);
        match how(device) {
            Ok(ReplyOutcome::Refused) => {
                tracing::warn!(lane = self.index, "the kernel refused a reply's length");
            }
            Ok(told) => return told,
            Err(error) => {
                tracing::error!(lane = self.index, %error, "a reply could not be written");
            }
        }
        LaneCounters::add(&self.counters.refused_replies, 1);
        // It may not have looked whose reply it was, and whoever asked would wait for ever. If it
        // has, there is nobody to be told.
        let _ = device.reply(&error_reply(unique, Errno::IO.raw_os_error()));
        ReplyOutcome::Refused
    }

    /// The one that has read that request.
    fn device_of(&self, unique: u64) -> &Device {
        let resent_by = self.resent_by.as_ref().filter(|_| unique & UNIQUE_RESEND != 0);
        resent_by.unwrap_or(&self.device)
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
