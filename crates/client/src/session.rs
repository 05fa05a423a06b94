//! What the lanes of a mount share: INIT, interrupts, what is lost, and how it ends.
//!
//! Invariant: the first reason to end wins and is kept; from then on no request waits for the
//! daemon. Nothing here is locked on the way of a frame.

use crate::conn::Conn;
use crate::connector::ResumeError;
use crate::expire::{Expire, Manner, Name};
use crate::forgets::Forgets;
use crate::handshake::refusal;
use crate::interrupts::Interrupts;
use crate::known::{Asked, Known};
use crate::lane::{Lane, LaneCounters, lock};
use crate::prune::Prune;
use crate::resume::Resume;
use fuser_fork::device::DeviceError;
use fuser_fork::init::{self, InitError, Limits, Negotiated};
use fuser_fork::notify::store_is_clean;
use fuser_fork::uring::UringError;
use ringfs_wire::abi::{self, InitIn, Opcode};
use ringfs_wire::hello::Reason;
use ringfs_wire::session::LinkError;
use ringfs_wire::slot::{SlotError, SlotUse};
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use thiserror::Error;

/// How far the kernel's numbers may have run ahead of a kept interrupt's.
const EARLY_INTERRUPT_AGE_MAX: u64 = 1 << 20;
/// Interrupts kept for requests that no lane has seen.
const EARLY_INTERRUPTS_MAX: usize = 64;

/// Why a mount's session is over.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum End {
    #[error("unmounted")]
    Unmounted,
    #[error("aborted by a second signal: what was in flight has failed")]
    Aborted,
    #[error("the keeper was killed: what was in flight has failed")]
    Forsaken,
    #[error("connection {conn} to the daemon is lost ({errno}): what was in flight has failed")]
    Lost { conn: usize, errno: Errno },
    #[error("the daemon closed connection {conn}: what was in flight has failed")]
    Closed { conn: usize },
    #[error("the daemon is silent on connection {conn}: what was in flight has failed")]
    Silent { conn: usize },
    #[error("the session cannot go on: what was in flight has failed")]
    NotResumed(#[source] ResumeError),
    #[error("the daemon ended the session: {}", refusal(*.reason, .text))]
    Goodbye { reason: Option<Reason>, text: String },
    #[error("the daemon broke the protocol")]
    Link(#[from] LinkError),
    #[error("the daemon broke the protocol")]
    Slot(#[from] SlotError),
    #[error("the daemon broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the daemon refuses to serve the mount (errno {0} for INIT); its log says more")]
    InitRefused(u32),
    #[error("no common ground with the kernel")]
    Init(#[from] InitError),
    #[error("the FUSE device failed")]
    Device(#[from] DeviceError),
    #[error("the FUSE rings failed")]
    Uring(#[from] UringError),
    #[error("a thread failed")]
    Thread(#[source] io::Error),
}

impl End {
    /// Whether another connection helps.
    pub fn is_cut(&self) -> bool {
        match self {
            // Numbers that cannot be are the daemon's own fault; all else the transport's.
            End::Link(error) => !matches!(error, LinkError::Ack { .. }),
            End::Lost { .. } | End::Closed { .. } | End::Silent { .. } => true,
            // A session that was lost on its way to being rebuilt can be rebuilt; whether one that
            // is unknown can, the next HELLO tells.
            End::Goodbye { reason: Some(Reason::UnknownSession), .. } => true,
            End::Goodbye { reason, .. } => reason.is_some_and(|reason| reason.is_passing()),
            End::Unmounted
            | End::Aborted
            | End::Forsaken
            | End::NotResumed(_)
            | End::Slot(_)
            | End::Protocol(_)
            | End::InitRefused(_)
            | End::Init(_)
            | End::Device(_)
            | End::Uring(_)
            | End::Thread(_) => false,
        }
    }
}

/// How many lanes are awake, so that for a frame nobody is woken while somebody looks anyway.
///
/// Invariant: the last lane that falls asleep watches the device, or wakes a spare one that will.
#[derive(Debug, Default)]
pub struct Watch {
    awake: AtomicUsize,
}

impl Watch {
    /// A lane is awake, and will look at the device before it sleeps.
    pub fn wake(&self) {
        self.awake.fetch_add(1, Ordering::SeqCst);
    }

    /// A lane is about to sleep; whether another one is awake.
    pub fn sleep(&self) -> bool {
        self.awake.fetch_sub(1, Ordering::SeqCst) > 1
    }

    /// Wakes a lane that sleeps for want of work, if there is one.
    pub fn call_help(&self, lanes: &[Lane]) {
        if let Some(spare) = lanes.iter().find(|lane| lane.is_spare()) {
            spare.kick();
        }
    }
}

/// Where INIT stands.
#[derive(Debug, Default)]
struct InitState {
    kernel: Option<InitIn>,
    agreed: Option<Negotiated>,
}

/// A mount's session.
#[derive(Debug)]
pub struct Session {
    /// The lanes; a record's `lane` is an index into them.
    pub lanes: Vec<Lane>,
    /// The connections, one a lane, and how they come again.
    pub resume: Resume,
    /// Which lanes look at the device.
    pub watch: Watch,
    /// NODE records seen.
    pub nodes_seen: AtomicU64,
    /// What a daemon that does not know the session has to be told.
    pub known: Known,
    /// Node ids to give back, by whichever lane can.
    pub forgets: Forgets,
    /// Held by who sees whether a turn is over.
    turning: Mutex<()>,
    /// Optional records that this version does not know.
    pub records_skipped: AtomicU64,
    /// Writes that were answered EIO here, behind an append that may have been done.
    pub writes_refused: AtomicU64,
    /// Nodes that the daemon would like to have back.
    pub prune: Prune,
    /// Names that it is to look up again.
    pub expire: Expire,
    /// The number of the connection, where it is known.
    pub dev_minor: OnceLock<u32>,
    /// Requests whose tasks have signals.
    pub interrupts: Interrupts,
    /// What a file holds may be put into this kernel's page cache.
    pub stores: bool,
    limits: Limits,
    append_groups: AtomicBool,
    rings: AtomicBool,
    init_answered: AtomicBool,
    early: Mutex<VecDeque<u64>>,
    early_len: AtomicUsize,
    init: Mutex<InitState>,
    end: OnceLock<Arc<End>>,
    stopping: AtomicBool,
    events: OwnedFd,
}

/// Whether this kernel can be given a file's content ([`store_is_clean`]).
pub fn kernel_stores() -> bool {
    store_is_clean(&rustix::system::uname().release().to_string_lossy())
}

impl Session {
    /// Lanes and connections, nothing running yet.
    pub fn new(
        lanes: Vec<Lane>,
        resume: Resume,
        known: Known,
        limits: Limits,
    ) -> io::Result<Session> {
        Ok(Session {
            lanes,
            resume,
            watch: Watch::default(),
            nodes_seen: AtomicU64::new(0),
            known,
            forgets: Forgets::default(),
            turning: Mutex::default(),
            records_skipped: AtomicU64::new(0),
            writes_refused: AtomicU64::new(0),
            prune: Prune::default(),
            expire: Expire::default(),
            dev_minor: OnceLock::new(),
            interrupts: Interrupts::default(),
            stores: kernel_stores(),
            limits,
            append_groups: AtomicBool::new(false),
            rings: AtomicBool::new(false),
            init_answered: AtomicBool::new(false),
            early: Mutex::default(),
            early_len: AtomicUsize::new(0),
            init: Mutex::default(),
            end: OnceLock::new(),
            stopping: AtomicBool::new(false),
            events: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// The session is over. The first reason counts; requests that wait get `EIO`, later ones
    /// `ENOTCONN`, so that an unmount can go through.
    pub fn end(&self, end: End) {
        let unmounted = matches!(end, End::Unmounted);
        if self.end.set(Arc::new(end)).is_err() {
            return;
        }
        if !unmounted {
            // It need not keep the session for a resume.
            self.resume.say_goodbye(Reason::Unmounted);
            self.resume.shutdown(false);
            self.lanes.iter().for_each(|lane| lane.close(Errno::IO));
        }
        self.notify();
    }

    /// Why it is over, if it is.
    pub fn ended(&self) -> Option<Arc<End>> {
        self.end.get().cloned()
    }

    /// A lane's connection is over. Once the mount is ready that may be no more than a cut: then
    /// the lane gets another one, and a kick when it has come.
    pub fn lost(&self, lane: &Lane, conn: &Arc<Conn>, end: End, unsent: &[SlotUse]) {
        conn.shutdown();
        if !self.resume.is_on() || !end.is_cut() || self.end.get().is_some() {
            return self.end(end);
        }
        lane.cut(unsent);
        self.resume.lost(lane.index, conn, &end);
        // It may have come before the old one was seen to be gone.
        lane.kick();
        self.notify();
    }

    /// Another turn begins if all is over that was in flight when this one began: what is known
    /// only for the sake of those can go. To be called now and then, where things become that.
    pub fn turn(&self) {
        let Ok(_turning) = self.turning.try_lock() else { return };
        if self.lanes.iter().all(Lane::has_ended_turn) {
            // First, so that nothing of this turn on is taken for older than what is in flight.
            self.known.next_turn();
            self.lanes.iter().for_each(Lane::begin_turn);
        }
    }

    /// The same where a lane has had nothing to do for a while.
    pub fn rest(&self) {
        self.turn();
        self.known.sweep();
    }

    /// Has all threads end, after the mount is gone.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.resume.shutdown(true);
        self.lanes.iter().for_each(Lane::kick);
        self.interrupts.ring();
    }

    /// Whether [`Session::stop`] was called.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Readable when something has happened that the main thread should look at.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Wakes the main thread.
    pub fn notify(&self) {
        // It can fail only by a full counter, which is readable as well.
        let _ = rustix::io::write(&self.events, &1u64.to_ne_bytes());
    }

    /// Makes [`Session::events`] unreadable again.
    pub fn drain_events(&self) {
        let mut count = [0u8; 8];
        // Nothing to drain is fine.
        let _ = rustix::io::read(&self.events, &mut count);
    }

    /// The kernel's INIT: what the daemon is asked, or the answer for the kernel.
    pub fn offer_init(&self, args: &[u8]) -> Result<Result<InitIn, abi::InitOut>, InitError> {
        let kernel = init::parse_in(args)?;
        if let init::Version::AskAgain(answer) = init::version_of(&kernel)? {
            return Ok(Err(answer));
        }
        lock(&self.init).kernel = Some(kernel);
        Ok(Ok(init::offer(&kernel, &self.limits)))
    }

    /// The daemon's answer to INIT: what the kernel may be told. [`Session::init_done`] follows.
    pub fn agree_init(&self, body: &[u8]) -> Result<Negotiated, End> {
        let daemon = init::parse_out(body)?;
        let mut state = lock(&self.init);
        let Some(kernel) = &state.kernel else {
            return Err(End::Protocol("an answer to an INIT that was not asked"));
        };
        let limits = Limits { rings: self.rings.load(Ordering::Relaxed), ..self.limits };
        let agreed = init::negotiate(kernel, &daemon, &limits)?;
        if agreed.dropped != 0 {
            tracing::debug!(flags = agreed.dropped, "INIT flags of the daemon's were dropped");
        }
        state.agreed = Some(agreed);
        let kernel_sends = agreed.offered & abi::init::CREATE_SUPP_GROUP != 0;
        self.append_groups.store(!kernel_sends, Ordering::Relaxed);
        Ok(agreed)
    }

    /// INIT came to that in the client before, and the kernel knows.
    pub fn inherit_init(&self, agreed: Negotiated) {
        lock(&self.init).agreed = Some(agreed);
        let kernel_sends = agreed.offered & abi::init::CREATE_SUPP_GROUP != 0;
        self.append_groups.store(!kernel_sends, Ordering::Relaxed);
        self.init_answered.store(true, Ordering::Release);
    }

    /// What INIT came to, once it has.
    pub fn agreed(&self) -> Option<Negotiated> {
        lock(&self.init).agreed
    }

    /// Lanes are there to serve queues: INIT may agree on rings.
    pub fn offer_rings(&self) {
        self.rings.store(true, Ordering::Relaxed);
    }

    /// A request that the kernel was told to have failed, or to be over, may have made these names
    /// or taken them away. To be called when it was told.
    pub fn doubt_names(&self, lane: &Lane, names: Vec<Name>) {
        if names.is_empty() {
            return;
        }
        let offered = self.agreed().map_or(0, |agreed| agreed.offered);
        let drops = offered & abi::init::HAS_EXPIRE_ONLY == 0;
        let manner = Manner { dev_minor: self.dev_minor.get().copied(), drops };
        self.expire.look_again(&lane.device, manner, names);
    }

    /// A request has just come. Whether it is to fail with EIO, and no daemon is to see it: it
    /// writes on behind an append that was told to have failed, and may have been done.
    /// [`Session::refused`] follows.
    pub fn refuses(&self, opcode: u32, asked: impl FnOnce() -> Asked) -> Option<Asked> {
        match Opcode::from_u32(opcode) {
            Some(Opcode::Write) => self.known.is_doubted(asked),
            Some(Opcode::Setattr) => {
                self.known.is_changed(&asked());
                None
            }
            Some(_) | None => None,
        }
    }

    /// The kernel has that answer.
    pub fn refused(&self, asked: &Asked) {
        self.known.doubt_is_told(asked);
        self.writes_refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!("a write behind an append that may have been done: answered EIO too");
    }

    /// The kernel has its answer to INIT.
    pub fn init_is_answered(&self) {
        self.init_answered.store(true, Ordering::Release);
        self.notify();
    }

    /// What INIT came to, once the kernel knows.
    pub fn answered(&self) -> Option<Negotiated> {
        if self.init_answered.load(Ordering::Acquire) { self.agreed() } else { None }
    }

    /// The task that waits for `unique` has a signal: a thread sees to it. False if no lane has it.
    pub fn note_interrupt(&self, unique: u64) -> bool {
        for lane in &self.lanes {
            if let Some(pid) = lane.waits(unique) {
                LaneCounters::add(&lane.counters.interrupts, 1);
                self.interrupts.add(lane.index, unique, pid);
                return true;
            }
        }
        false
    }

    /// Keeps an interrupt whose request no lane has: it may be in a queue entry that its lane has
    /// not looked at yet, and the kernel sends it once. The lanes must be asked once more then.
    /// False without rings: there the kernel can be asked to send it again.
    pub fn keep_early_interrupt(&self, unique: u64) -> bool {
        if !self.rings.load(Ordering::Relaxed) {
            return false;
        }
        let mut early = lock(&self.early);
        // The oldest are of requests that were answered meanwhile; ids do not come again.
        if early.len() == EARLY_INTERRUPTS_MAX {
            early.pop_front();
        }
        early.push_back(unique);
        self.early_len.store(early.len(), Ordering::Release);
        true
    }

    /// Whether such an interrupt is kept for `unique`; it is forgotten with that.
    pub fn take_early_interrupt(&self, unique: u64) -> bool {
        if self.early_len.load(Ordering::Acquire) == 0 {
            return false;
        }
        let mut early = lock(&self.early);
        // Requests are numbered in turn: what is so far behind was answered before its interrupt.
        early.retain(|its| its.saturating_add(EARLY_INTERRUPT_AGE_MAX) > unique);
        let found = early.iter().position(|&its| its == unique);
        found.map(|at| early.remove(at));
        self.early_len.store(early.len(), Ordering::Release);
        found.is_some()
    }

    /// Whether creations need their caller's groups from us.
    pub fn appends_groups(&self) -> bool {
        self.append_groups.load(Ordering::Relaxed)
    }
}
