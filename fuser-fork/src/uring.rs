//! FUSE-over-io_uring (kernel 6.14 and newer): the queues of some CPUs, served by one thread, and
//! whatever else that thread waits for.
//!
//! What rules it (`Documentation/filesystems/fuse/fuse-io-uring.rst`, `fs/fuse/dev_uring.c`):
//!
//! - It must be enabled on the module (`/sys/module/fuse/parameters/enable_uring`) and agreed in
//!   INIT ([`crate::init::Limits::rings`]). INIT, FORGET, INTERRUPT and notifications stay on
//!   `/dev/fuse`, so a session with rings still needs a reader.
//! - Every possible CPU has a queue. From INIT's answer on the kernel holds requests back until
//!   each queue has an entry; a refused registration ends the wait, and all goes by `/dev/fuse`.
//! - A reply is a COMMIT_AND_FETCH on the queue that gave the request, by the thread that
//!   registered the entry, and fetches the next request: the rule of the clones again.
//! - An interrupt may be read from `/dev/fuse` before the request's completion was taken here, and
//!   cannot be answered EAGAIN there: whoever reads it must remember it.
//! - A queue without a free entry keeps further requests in the kernel, where a kill reaches them.
//!
//! Invariant: an entry holds at most one request, whose reply is the only way to free it; frames
//! are the same bytes as those of `/dev/fuse` ([`crate::frame::Parts`]). It must not look into
//! frames further, and never waits without being told to.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use crate::device::Device;
use crate::frame::{FrameError, Parts, put_reply};
use crate::sys::{CommandRing, Done};

/// Entries of one queue: so many requests of one CPU are in work at once; the next ones wait in the
/// kernel, also behind requests that hang.
pub const ENTRIES_PER_QUEUE_MAX: u16 = 32;
/// Memory for payloads of all queues, bytes; with many CPUs queues get fewer entries. It is used,
/// and counts, only as far as payloads have come by; the kernel takes the entry used last first.
pub const PAYLOADS_BYTES_MAX: usize = 64 << 20;
/// With one entry a queue this is the end: no rings on machines that would need more.
const PAYLOADS_BYTES_LIMIT: usize = 256 << 20;
/// Entries of one ring: commands that can wait for one submission, beside the watches.
const ENTRIES_PER_RING_MAX: usize = 496;
const COMMANDS: u32 = 512;

const ENABLED_PATH: &str = "/sys/module/fuse/parameters/enable_uring";
const POSSIBLE_PATH: &str = "/sys/devices/system/cpu/possible";

/// The kernel's `FUSE_MIN_READ_BUFFER`: a payload has room for at least this.
const PAYLOAD_BYTES_MIN: usize = 8192;

/// Why there are no rings.
#[derive(Debug, thiserror::Error)]
pub enum UringError {
    /// No such parameter.
    #[error("this kernel's FUSE has no rings (needs Linux 6.14 with CONFIG_FUSE_IO_URING)")]
    Kernel,
    /// The parameter says no.
    #[error("FUSE's rings are switched off: `echo Y > {ENABLED_PATH}` before mounting")]
    Disabled,
    /// `/sys/devices/system/cpu/possible` is missing, or its numbers have gaps.
    #[error("the possible CPUs cannot be told from {POSSIBLE_PATH} (`{text}`)")]
    Cpus {
        /// What stands there.
        text: String,
    },
    /// Too many queues for the memory that we allow.
    #[error("{queues} queues of {payload_bytes} bytes an entry are too much memory")]
    Memory {
        /// Possible CPUs.
        queues: u16,
        /// Bytes of one payload.
        payload_bytes: usize,
    },
    /// io_uring_setup(2) failed.
    #[error("io_uring cannot be set up (is `kernel.io_uring_disabled` set?)")]
    Setup(#[source] io::Error),
    /// Buffers could not be had.
    #[error("no memory for the rings' buffers")]
    Map(#[source] io::Error),
    /// The kernel took no entry for a queue.
    #[error("the kernel refuses an entry for the queue of CPU {qid}")]
    Refused {
        /// The queue.
        qid: u16,
        /// Why.
        source: io::Error,
    },
    /// io_uring_enter(2) failed.
    #[error("io_uring failed")]
    Enter(#[source] io::Error),
}

impl UringError {
    /// After [`Ring::register`]: whether a queue is without an entry for good because the kernel
    /// has refused one. Then it uses `/dev/fuse`; after another error it may hold requests back,
    /// or have them fetched by rings only, as soon as the other queues have their entries.
    pub fn leaves_device(&self) -> bool {
        matches!(self, UringError::Refused { .. } | UringError::Map(_))
    }
}

/// Whether this kernel would do it now: the number of queues, one a possible CPU.
pub fn available() -> Result<u16, UringError> {
    match std::fs::read_to_string(ENABLED_PATH) {
        Ok(text) if text.trim() == "Y" => possible_cpus(Path::new(POSSIBLE_PATH)),
        Ok(_) => Err(UringError::Disabled),
        Err(_) => Err(UringError::Kernel),
    }
}

fn possible_cpus(path: &Path) -> Result<u16, UringError> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    count_cpus(text.trim()).ok_or(UringError::Cpus { text })
}

/// `0` or `0-N`; queues are numbered by CPU, so a gap would leave CPUs beyond the last queue.
fn count_cpus(text: &str) -> Option<u16> {
    let last = match text.split_once('-') {
        None if text == "0" => "0",
        Some(("0", last)) => last,
        _ => return None,
    };
    last.parse::<u16>().ok()?.checked_add(1)
}

/// How queues, entries and memory are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// One a possible CPU.
    pub queues: u16,
    /// Of each queue.
    pub entries_per_queue: u16,
    /// Room of an entry's payload, bytes.
    pub payload_bytes: usize,
}

impl Plan {
    /// For what INIT agreed on, or may agree on at most; `threads` serve the queues.
    pub fn new(
        queues: u16,
        threads: u16,
        max_write: u32,
        max_pages: u16,
        page_bytes: u32,
    ) -> Result<Plan, UringError> {
        let pages_bytes = usize::from(max_pages) * page_bytes as usize;
        let payload_bytes = PAYLOAD_BYTES_MIN.max(max_write as usize).max(pages_bytes);
        let one_each = usize::from(queues.max(1)).saturating_mul(payload_bytes);
        let queues_per_thread = usize::from(queues.div_ceil(threads.max(1))).max(1);
        if one_each > PAYLOADS_BYTES_LIMIT || queues_per_thread > ENTRIES_PER_RING_MAX {
            return Err(UringError::Memory { queues, payload_bytes });
        }
        let entries = (PAYLOADS_BYTES_MAX / one_each)
            .min(ENTRIES_PER_RING_MAX / queues_per_thread)
            .clamp(1, usize::from(ENTRIES_PER_QUEUE_MAX));
        Ok(Plan { queues, entries_per_queue: entries as u16, payload_bytes })
    }

    /// The queues that the `thread`th of `threads` serves.
    pub fn queues_of(&self, thread: u16, threads: u16) -> impl Iterator<Item = u16> + use<> {
        (thread..self.queues).step_by(usize::from(threads.max(1)))
    }

    /// All payloads together, bytes.
    pub fn payloads_bytes(&self) -> usize {
        usize::from(self.queues) * usize::from(self.entries_per_queue) * self.payload_bytes
    }
}

/// An entry of a queue, by its place in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EntryId(pub u16);

/// An fd that the ring watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchId(u32);

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The entry holds a request, until [`Ring::reply`].
    Request(EntryId),
    /// What [`Ring::arm`] asked for.
    Ready(WatchId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Waits for a request, or is on the way there.
    Kernel,
    /// Holds a request.
    Request,
    /// Not registered, or given up by the kernel.
    Gone,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    qid: u16,
    state: State,
    commit_id: u64,
    unique: u64,
}

/// The queues of one thread. It stays on the thread that made it.
#[derive(Debug)]
pub struct Ring {
    commands: CommandRing,
    device: Option<Arc<Device>>,
    entries: Vec<Entry>,
    armed: Vec<bool>,
    pending: VecDeque<Event>,
    ended: bool,
    lost: u64,
    last_errno: Errno,
}

impl Ring {
    /// A ring of the calling thread, without queues.
    pub fn new() -> Result<Ring, UringError> {
        Ok(Ring {
            commands: CommandRing::new(COMMANDS).map_err(UringError::Setup)?,
            device: None,
            entries: Vec::new(),
            armed: Vec::new(),
            pending: VecDeque::new(),
            ended: false,
            lost: 0,
            last_errno: Errno::IO,
        })
    }

    /// Gives each of `queues` its entries, after INIT was answered; once.
    ///
    /// After an error that [`UringError::leaves_device`] nothing comes by this ring, and the kernel
    /// uses `/dev/fuse` for the whole session, whatever becomes of the other queues. After another
    /// error a session that cannot be served by all its rings has to end.
    pub fn register(
        &mut self,
        device: &Arc<Device>,
        plan: Plan,
        queues: impl Iterator<Item = u16>,
    ) -> Result<(), UringError> {
        let queues: Vec<u16> = queues.collect();
        // Of each queue one first: whether the kernel takes entries is told by those.
        let qids = std::iter::repeat_n(&queues, plan.entries_per_queue.into()).flatten();
        let entry = |&qid| Entry { qid, state: State::Gone, commit_id: 0, unique: 0 };
        self.entries = qids.map(entry).collect();
        self.device = Some(Arc::clone(device));
        if let Err(errno) = self.commands.map(self.entries.len(), plan.payload_bytes) {
            self.refuse(device)?;
            return Err(UringError::Map(errno.into()));
        }
        let (first, all) = (queues.len(), self.entries.len());
        self.push_registrations(0..first)?;
        let refused = self.entries[..first].iter().find(|entry| entry.state == State::Gone);
        if let Some(&Entry { qid, .. }) = refused {
            return Err(UringError::Refused { qid, source: self.last_errno.into() });
        }
        self.push_registrations(first..all)
    }

    /// Pushes and submits; whoever is refused is gone afterwards.
    fn push_registrations(&mut self, range: std::ops::Range<usize>) -> Result<(), UringError> {
        let Some(device) = self.device.clone() else { return Ok(()) };
        for at in range {
            let qid = self.entries[at].qid;
            let pushed = self.commands.push_register(at, device.as_fd(), qid);
            pushed.map_err(|errno| UringError::Enter(errno.into()))?;
            self.entries[at].state = State::Kernel;
        }
        self.enter(0)
    }

    /// Has the kernel refuse a registration, so that it waits for no other: the way out when INIT
    /// has agreed on rings and none can be had. For a ring without entries. An error: it has not,
    /// and waits on.
    pub fn refuse(&mut self, device: &Device) -> Result<(), UringError> {
        self.entries.clear();
        let tiny = self.commands.map(1, 0);
        let pushed = tiny.and_then(|()| self.commands.push_register(0, device.as_fd(), 0));
        let done = pushed.and_then(|()| self.commands.submit_and_wait(1));
        while self.commands.next_done().is_some() {}
        tracing::debug!(?done, "a registration was made to be refused");
        done.map_err(|errno| UringError::Enter(errno.into()))
    }

    /// Watches `fd` too; nothing happens before [`Ring::arm`].
    pub fn watch(&mut self, fd: impl AsFd) -> io::Result<WatchId> {
        let own = fd.as_fd().try_clone_to_owned()?;
        self.armed.push(false);
        Ok(WatchId(self.commands.add_watched(own)))
    }

    /// Whether an [`Event::Ready`] of that watch is still to come.
    pub fn is_armed(&self, watch: WatchId) -> bool {
        self.armed[watch.0 as usize]
    }

    /// Has a watch that is not armed watch another fd from now on.
    ///
    /// # Panics
    /// When it is armed: the kernel still looks at the old fd.
    pub fn rewatch(&mut self, watch: WatchId, fd: impl AsFd) -> io::Result<()> {
        assert!(!self.is_armed(watch), "{watch:?} is armed");
        let own = fd.as_fd().try_clone_to_owned()?;
        self.commands.replace_watched(watch.0, own);
        Ok(())
    }

    /// Tells once when the fd is readable (or writable); it must not be a `/dev/fuse`.
    pub fn arm(&mut self, watch: WatchId, for_write: bool) -> Result<(), UringError> {
        if std::mem::replace(&mut self.armed[watch.0 as usize], true) {
            return Ok(());
        }
        let pushed = self.commands.push_watch(watch.0, for_write);
        pushed.map_err(|errno| UringError::Enter(errno.into()))
    }

    /// io_uring_enter(2): hands over replies and watches, and waits for an event.
    pub fn wait(&mut self) -> Result<(), UringError> {
        let want = usize::from(self.pending.is_empty());
        self.enter(want)
    }

    /// As [`Ring::wait`], but no longer than `limit`.
    pub fn wait_for(&mut self, limit: Duration) -> Result<(), UringError> {
        if !self.pending.is_empty() {
            return self.enter(0);
        }
        let done = self.commands.submit_and_wait_for(limit);
        self.take_done();
        done.map_err(|errno| UringError::Enter(errno.into()))
    }

    /// As [`Ring::wait`] without waiting.
    pub fn submit(&mut self) -> Result<(), UringError> {
        self.enter(0)
    }

    /// Whether something has happened that [`Ring::submit`] would bring; no system call.
    pub fn is_due(&mut self) -> bool {
        !self.pending.is_empty() || self.commands.is_due()
    }

    fn enter(&mut self, want: usize) -> Result<(), UringError> {
        let done = self.commands.submit_and_wait(want);
        self.take_done();
        done.map_err(|errno| UringError::Enter(errno.into()))
    }

    fn take_done(&mut self) {
        while let Some(done) = self.commands.next_done() {
            match done {
                Done::Watched { token } => {
                    self.armed[token as usize] = false;
                    self.pending.push_back(Event::Ready(WatchId(token)));
                }
                Done::Entry { entry, result } => self.take_entry(entry, result),
            }
        }
    }

    fn take_entry(&mut self, at: usize, result: i32) {
        let entry = &mut self.entries[at];
        if result == 0 {
            entry.state = State::Request;
            self.pending.push_back(Event::Request(EntryId(at as u16)));
            return;
        }
        entry.state = State::Gone;
        self.last_errno = Errno::from_raw_os_error(-result);
        match self.last_errno {
            Errno::NOTCONN | Errno::CONNABORTED | Errno::NODEV | Errno::CANCELED => {
                self.ended = true;
            }
            errno => {
                self.lost += 1;
                tracing::warn!(qid = entry.qid, %errno, "the kernel gave up an entry of a queue");
            }
        }
    }

    /// The next event of those that the last [`Ring::wait`] brought.
    pub fn next_event(&mut self) -> Option<Event> {
        self.pending.pop_front()
    }

    /// The request that an entry holds; an error is the kernel's fault, and owes a reply as well.
    ///
    /// # Panics
    /// When no [`Event::Request`] gave the entry, or it was answered.
    pub fn request(&mut self, id: EntryId) -> Result<Parts<'_>, FrameError> {
        let entry = &mut self.entries[usize::from(id.0)];
        assert_eq!(entry.state, State::Request, "{id:?}");
        let parts = self.commands.parts(id.0.into());
        let Some((headers, payload)) = parts else {
            return Err(FrameError::NoHeader { len: 0 });
        };
        // Before the lengths are looked at: whatever they are, a reply is owed.
        entry.unique = u64_at(headers, 8);
        entry.commit_id = u64_at(headers, 264);
        Parts::parse(headers, payload)
    }

    /// Puts the reply into the entry (a body, or a positive errno); the next submission hands it
    /// over. An entry that holds no request is left alone.
    pub fn reply(&mut self, id: EntryId, reply: Result<&[u8], i32>) -> Result<(), UringError> {
        let Some(entry) = self.entries.get_mut(usize::from(id.0)) else { return Ok(()) };
        let Some(device) = self.device.as_ref().filter(|_| entry.state == State::Request) else {
            return Ok(());
        };
        let at = usize::from(id.0);
        let Some((headers, payload)) = self.commands.parts(at) else { return Ok(()) };
        put_reply(headers, payload, entry.unique, reply);
        let pushed = self.commands.push_commit(at, device.as_fd(), entry.qid, entry.commit_id);
        pushed.map_err(|errno| UringError::Enter(errno.into()))?;
        entry.state = State::Kernel;
        Ok(())
    }

    /// Whether the kernel has taken the queues down: the mount is gone.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// Entries that the kernel gave up without taking the queues down.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Entries of this ring.
    pub fn entries(&self) -> usize {
        self.entries.len()
    }
}

fn u64_at(headers: &[u8; 288], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&headers[at..at + 8]);
    u64::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn possible_cpus_in_one_stretch() {
        for (text, expected) in [
            ("0", Some(1)),
            ("0-1", Some(2)),
            ("0-127", Some(128)),
            ("", None),
            ("1", None),
            ("1-2", None),
            ("0-1,4-5", None),
            ("0,2", None),
            ("0-x", None),
            ("0-65535", None),
        ] {
            assert_eq!(count_cpus(text), expected, "{text}");
        }
        assert!(matches!(possible_cpus(Path::new("/nonexistent")), Err(UringError::Cpus { .. })));
    }

    #[test]
    fn memory_is_bounded() {
        let check = |queues: u16, threads: u16, max_write: u32, expected: Option<(u16, usize)>| {
            let plan = Plan::new(queues, threads, max_write, (max_write / 4096) as u16, 4096);
            let plan = plan.ok();
            if let Some(plan) = plan {
                let one_each = usize::from(queues) * plan.payload_bytes;
                assert!(plan.payloads_bytes() <= PAYLOADS_BYTES_MAX.max(one_each));
            }
            let got = plan.map(|plan| (plan.entries_per_queue, plan.payload_bytes));
            assert_eq!(got, expected, "{queues} {threads} {max_write}");
        };
        check(1, 1, 1 << 20, Some((32, 1 << 20)));
        check(2, 2, 1 << 20, Some((32, 1 << 20)));
        check(4, 4, 1 << 20, Some((16, 1 << 20)));
        check(8, 7, 1 << 20, Some((8, 1 << 20)));
        check(64, 7, 1 << 20, Some((1, 1 << 20)));
        check(256, 7, 1 << 20, Some((1, 1 << 20)));
        check(257, 7, 1 << 20, None);
        check(2, 2, 4096, Some((32, 8192)));
        check(4096, 1, 4096, None);
        check(300, 1, 4096, Some((1, 8192)));
        let plan = Plan::new(5, 2, 4096, 1, 4096).expect("plan");
        assert_eq!(plan.queues_of(0, 2).collect::<Vec<_>>(), [0, 2, 4]);
        assert_eq!(plan.queues_of(1, 2).collect::<Vec<_>>(), [1, 3]);
    }

    #[test]
    fn watches_tell_once() {
        let mut ring = Ring::new().expect("io_uring");
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let watch = ring.watch(&reader).expect("watch");
        ring.arm(watch, false).expect("arm");
        ring.arm(watch, false).expect("armed already");
        ring.submit().expect("submit");
        assert!(ring.next_event().is_none() && !ring.is_due());
        rustix::io::write(&writer, b"x").expect("write");
        assert!(ring.is_due(), "seen without a system call");
        ring.wait().expect("wait");
        assert_eq!(ring.next_event(), Some(Event::Ready(watch)));
        assert_eq!(ring.next_event(), None);
        // Level, not edge: what is there is told again.
        ring.arm(watch, false).expect("arm");
        ring.wait().expect("wait");
        assert_eq!(ring.next_event(), Some(Event::Ready(watch)));
    }

    #[test]
    fn waits_end_and_watches_move() {
        let mut ring = Ring::new().expect("io_uring");
        let ends = [(); 2].map(|()| rustix::pipe::pipe().expect("pipe"));
        let watch = ring.watch(&ends[0].0).expect("watch");
        ring.arm(watch, false).expect("arm");
        ring.wait_for(Duration::from_millis(1)).expect("the time is over");
        assert!(ring.next_event().is_none() && ring.is_armed(watch));
        rustix::io::write(&ends[0].1, b"x").expect("write");
        ring.wait_for(Duration::from_secs(30)).expect("wait");
        assert_eq!(ring.next_event(), Some(Event::Ready(watch)));
        assert!(!ring.is_armed(watch));
        ring.rewatch(watch, &ends[1].0).expect("the other pipe");
        ring.arm(watch, false).expect("arm");
        ring.wait_for(Duration::from_millis(1)).expect("the time is over");
        assert_eq!(ring.next_event(), None);
        rustix::io::write(&ends[1].1, b"x").expect("write");
        ring.wait_for(Duration::from_secs(30)).expect("wait");
        assert_eq!(ring.next_event(), Some(Event::Ready(watch)));
    }
}
