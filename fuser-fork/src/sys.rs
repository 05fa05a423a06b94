//! What no safe crate wraps: `FUSE_DEV_IOC_CLONE`, fds that came with the process, an io_uring
//! whose commands lend memory to the FUSE driver, and how malloc holds what is as large as a frame.
//!
//! Invariant: the only file of the crate with `unsafe`. The memory of a queue entry is the
//! kernel's from the moment its command is pushed until its completion is taken, and nobody gets a
//! slice of it in between; memory that the kernel may still write to is never unmapped, but leaked.
//! It must not decide anything: what a completion means is `uring.rs`' business.
#![allow(unsafe_code, reason = "the ioctl, the ring's memory and mallopt have no safe wrapper")]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode as ioctl_opcode};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// `_IOR(229, 0, uint32_t)` of `include/uapi/linux/fuse.h`.
const FUSE_DEV_IOC_CLONE: Opcode = ioctl_opcode::read::<u32>(229, 0);

/// Makes `new`, a fresh fd of `/dev/fuse`, a clone of the session behind `session`.
///
/// Errors: `EINVAL` (`session` is not mounted, or `new` is already of a session), `ENOTTY` (a
/// kernel older than 4.2), `EBADF`.
pub(crate) fn fuse_dev_clone(new: BorrowedFd<'_>, session: BorrowedFd<'_>) -> Result<(), Errno> {
    let session_fd = session.as_raw_fd().cast_unsigned();
    // SAFETY: the opcode's argument is a pointer to a u32 that the kernel only reads, and `Setter`
    // passes a pointer to the u32 that it owns until the call has returned. Both fds are borrowed,
    // so they are open during the call; another kind of file behind them is an errno, since the
    // opcode's type byte (229) is FUSE's own.
    unsafe {
        let arg = Setter::<FUSE_DEV_IOC_CLONE, u32>::new(session_fd);
        ioctl(new, arg)
    }
}

/// Allocations from this size on are mappings of their own.
const MAPPED_BYTES_MIN: libc::c_int = 256 << 10;
/// Free memory that stays at the end of a heap.
const TRIM_BYTES: libc::c_int = 1 << 20;

/// Has malloc give buffers of a frame's size back to the kernel when they are freed. Left alone,
/// glibc raises its bound for mappings to the first of them that is freed; later ones lie in
/// heaps, between things that stay, and each leaves a hole of its size when it goes.
pub fn return_large_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in
        [(libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN), (libc::M_TRIM_THRESHOLD, TRIM_BYTES)]
    {
        // SAFETY: mallopt takes two numbers, no memory, and locks what it changes. A value that it
        // does not take changes nothing.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// The first fd that a service manager passes (`SD_LISTEN_FDS_START`).
const PASSED_AT: i32 = 3;

/// The fds that a service manager has passed, close-on-exec from now on. They are taken once: the
/// next call, and one that finds an fd missing, gives none.
pub(crate) fn take_passed(count: u16) -> Vec<OwnedFd> {
    static ARE_TAKEN: AtomicBool = AtomicBool::new(false);
    let raw = PASSED_AT..PASSED_AT + i32::from(count);
    // SAFETY: the fd is borrowed for one call that looks at it and fails where it is not open.
    let is_open = |fd| rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok();
    if !raw.clone().all(is_open) || ARE_TAKEN.swap(true, Ordering::AcqRel) {
        return Vec::new();
    }
    // SAFETY: by the protocol (sd_listen_fds(3)), which the caller has checked to be meant for
    // this process, these numbers were open when it started and are its own; nothing of ours has
    // opened them, and the flag has them taken once.
    let fds: Vec<_> = raw.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
    for fd in &fds {
        // It cannot fail: the fd is open.
        let _ = rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC);
    }
    fds
}

/// `struct fuse_uring_req_header`: `in_out` 128, `op_in` 128, `ring_ent_in_out` 32.
pub(crate) const HEADERS_BYTES: usize = 288;
/// Where the payload begins in an entry's memory: a page, since payloads are paged.
const PAYLOAD_AT: usize = 4096;
/// Where `sqe.len` is; io-uring 0.7 has no setter for a command's.
const SQE_LEN_AT: usize = 24;
/// `FUSE_IO_URING_CMD_REGISTER` and `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`.
const CMD_REGISTER: u32 = 1;
const CMD_COMMIT_AND_FETCH: u32 = 2;
/// Completions of polls, told from those of entries by this bit.
const POLL: u64 = 1 << 63;

/// What a completion was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// A queue entry; it is ours again.
    Entry {
        /// Its index.
        entry: usize,
        /// 0: it holds a request; else a negative errno.
        result: i32,
    },
    /// A watched fd is ready, or in error; it is watched no more.
    Watched {
        /// As given to [`CommandRing::push_watch`].
        token: u32,
    },
}

/// As `struct iovec`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct IoVec {
    base: *mut u8,
    len: usize,
}

/// Anonymous memory, one stretch an entry: a page with the headers, then the payload.
#[derive(Debug)]
struct EntryMemory {
    base: NonNull<u8>,
    entries: usize,
    payload_bytes: usize,
}

impl EntryMemory {
    fn map(entries: usize, payload_bytes: usize) -> Result<EntryMemory, Errno> {
        let bytes = entries.checked_mul(PAYLOAD_AT + payload_bytes).ok_or(Errno::NOMEM)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new anonymous mapping wherever the kernel likes touches no memory of ours.
        let base =
            unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE)? };
        // SAFETY: the range is the mapping just made, and the advice changes none of its contents.
        // It keeps a payload's first byte from costing a huge page; a refusal costs memory only.
        let _ = unsafe { madvise(base, bytes, Advice::LinuxNoHugepage) };
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(EntryMemory { base, entries, payload_bytes })
    }

    fn bytes(&self) -> usize {
        self.entries * (PAYLOAD_AT + self.payload_bytes)
    }

    /// Where the entry's headers are; its payload follows at `PAYLOAD_AT`.
    fn headers(&self, entry: usize) -> *mut u8 {
        assert!(entry < self.entries, "entry {entry} of {}", self.entries);
        // SAFETY: the index was checked, so the offset is inside the one mapping.
        unsafe { self.base.as_ptr().add(entry * (PAYLOAD_AT + self.payload_bytes)) }
    }

    fn payload(&self, entry: usize) -> *mut u8 {
        // SAFETY: every entry's stretch is PAYLOAD_AT and payload_bytes long.
        unsafe { self.headers(entry).add(PAYLOAD_AT) }
    }

    fn iovecs(&self, entry: usize) -> [IoVec; 2] {
        [
            IoVec { base: self.headers(entry), len: HEADERS_BYTES },
            IoVec { base: self.payload(entry), len: self.payload_bytes },
        ]
    }
}

impl Drop for EntryMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, made by `map` with this length, and slices of it borrow
        // `self`. The kernel has no use of it left: `CommandRing` forgets the memory otherwise.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.bytes()) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// An io_uring for the commands of FUSE queue entries, and for watching other fds.
///
/// Only the thread that made it may use it (the kernel insists; the raw pointers make it so).
pub(crate) struct CommandRing {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    memory: Option<EntryMemory>,
    /// What the registrations point to; read when they are submitted.
    iovecs: Vec<[IoVec; 2]>,
    /// Whose each entry's memory is.
    is_kernels: Vec<bool>,
    /// What is watched; a token is an index.
    watched: Vec<OwnedFd>,
}

/// EBUSY: completions wait to be taken first, and what was not submitted stays pushed. ETIME: the
/// time is over.
fn harmless(error: &io::Error) -> Result<(), Errno> {
    match Errno::from_io_error(error).unwrap_or(Errno::IO) {
        Errno::INTR | Errno::BUSY | Errno::TIME => Ok(()),
        errno => Err(errno),
    }
}

impl CommandRing {
    /// A ring with room for so many commands between two submissions.
    pub(crate) fn new(commands: u32) -> io::Result<CommandRing> {
        let ring = IoUring::<squeue::Entry128, cqueue::Entry>::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(commands)?;
        Ok(CommandRing {
            ring,
            memory: None,
            iovecs: Vec::new(),
            is_kernels: Vec::new(),
            watched: Vec::new(),
        })
    }

    /// Memory for so many entries; once.
    pub(crate) fn map(&mut self, entries: usize, payload_bytes: usize) -> Result<(), Errno> {
        assert!(self.memory.is_none(), "the memory of a ring is mapped once");
        let memory = EntryMemory::map(entries, payload_bytes)?;
        self.iovecs = (0..entries).map(|entry| memory.iovecs(entry)).collect();
        self.is_kernels = vec![false; entries];
        self.memory = Some(memory);
        Ok(())
    }

    /// Pushes an entry's first command. `device` must stay open until it has been submitted.
    pub(crate) fn push_register(
        &mut self,
        entry: usize,
        device: BorrowedFd<'_>,
        qid: u16,
    ) -> Result<(), Errno> {
        let iovecs = self.iovecs[entry].as_ptr() as u64;
        let command = request_of(0, qid);
        let command = opcode::UringCmd80::new(types::Fd(device.as_raw_fd()), CMD_REGISTER)
            .cmd(command)
            .addr(Some(iovecs));
        self.push_command(entry, command.build())
    }

    /// Pushes the reply in the entry's memory, and the wish for the next request.
    pub(crate) fn push_commit(
        &mut self,
        entry: usize,
        device: BorrowedFd<'_>,
        qid: u16,
        commit_id: u64,
    ) -> Result<(), Errno> {
        let command = request_of(commit_id, qid);
        let fd = types::Fd(device.as_raw_fd());
        let command = opcode::UringCmd80::new(fd, CMD_COMMIT_AND_FETCH).cmd(command);
        self.push_command(entry, command.build())
    }

    fn push_command(&mut self, entry: usize, sqe: squeue::Entry128) -> Result<(), Errno> {
        assert!(!self.is_kernels[entry], "entry {entry} is the kernel's");
        let mut sqe = sqe.user_data(entry as u64);
        // SAFETY: Entry128 is `repr(C)` over `struct io_uring_sqe` of 128 bytes, aligned to 8; the
        // u32 at byte 24 is its `len` and lies inside of it. REGISTER wants the number of iovecs
        // there; the other command does not look.
        unsafe { (&raw mut sqe).cast::<u8>().add(SQE_LEN_AT).cast::<u32>().write(2) };
        // SAFETY: the kernel reads the iovecs, which stand still in `self.iovecs`, and uses the
        // entry's memory until the completion: it is marked as the kernel's from here on, nobody
        // gets a slice of it, and a drop of `self` leaks it while the mark stands.
        let pushed = unsafe { self.ring.submission().push(&sqe) };
        pushed.map_err(|_| Errno::BUSY)?;
        self.is_kernels[entry] = true;
        Ok(())
    }

    /// Takes an fd to be watched; the token of its watches.
    pub(crate) fn add_watched(&mut self, fd: OwnedFd) -> u32 {
        self.watched.push(fd);
        (self.watched.len() - 1) as u32
    }

    /// Another fd in the place of a watched one, whose last watch must be over.
    pub(crate) fn replace_watched(&mut self, token: u32, fd: OwnedFd) {
        if let Some(watched) = self.watched.get_mut(token as usize) {
            *watched = fd;
        }
    }

    /// Watches an fd once, for input or for room to write.
    pub(crate) fn push_watch(&mut self, token: u32, for_write: bool) -> Result<(), Errno> {
        // poll(2)'s POLLIN and POLLOUT; errors and hang-ups always count.
        let mask = if for_write { 4 } else { 1 };
        let fd = self.watched.get(token as usize).ok_or(Errno::BADF)?;
        let sqe = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), mask).build();
        let sqe = squeue::Entry128::from(sqe.user_data(POLL | u64::from(token)));
        // SAFETY: a poll names no memory, and its fd is open as long as `self` lives.
        let pushed = unsafe { self.ring.submission().push(&sqe) };
        pushed.map_err(|_| Errno::BUSY)
    }

    /// io_uring_enter(2): submits what was pushed, waits for `want` completions.
    pub(crate) fn submit_and_wait(&mut self, want: usize) -> Result<(), Errno> {
        match self.ring.submit_and_wait(want) {
            Ok(_) => Ok(()),
            Err(error) => harmless(&error),
        }
    }

    /// As [`CommandRing::submit_and_wait`] for one completion, but no longer than `limit`; it is
    /// the same system call.
    pub(crate) fn submit_and_wait_for(&mut self, limit: Duration) -> Result<(), Errno> {
        let limit = types::Timespec::from(limit);
        let args = types::SubmitArgs::new().timespec(&limit);
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => Ok(()),
            Err(error) => harmless(&error),
        }
    }

    /// Whether a submission would bring completions: to look costs no system call.
    pub(crate) fn is_due(&mut self) -> bool {
        self.ring.submission().taskrun() || !self.ring.completion().is_empty()
    }

    /// The next completion that is there.
    pub(crate) fn next_done(&mut self) -> Option<Done> {
        let completed = self.ring.completion().next()?;
        let data = completed.user_data();
        if data & POLL != 0 {
            return Some(Done::Watched { token: data as u32 });
        }
        let entry = data as usize;
        self.is_kernels[entry] = false;
        Some(Done::Entry { entry, result: completed.result() })
    }

    /// Headers and payload of an entry, if it is ours.
    pub(crate) fn parts(&mut self, entry: usize) -> Option<(&mut [u8; HEADERS_BYTES], &mut [u8])> {
        let memory = self.memory.as_ref().filter(|_| !self.is_kernels[entry])?;
        // SAFETY: the pointer is to HEADERS_BYTES initialised bytes of a mapping that lives as
        // long as `self`; the entry is not the kernel's (its completion was taken, which orders
        // the kernel's writes before), and `&mut self` keeps it so while the slice lives.
        let headers = unsafe { &mut *memory.headers(entry).cast() };
        // SAFETY: as for the headers; the payload lies behind them and has its own length.
        let payload =
            unsafe { std::slice::from_raw_parts_mut(memory.payload(entry), memory.payload_bytes) };
        Some((headers, payload))
    }
}

impl fmt::Debug for CommandRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommandRing").field("entries", &self.is_kernels.len()).finish()
    }
}

impl Drop for CommandRing {
    fn drop(&mut self) {
        // Commands of this kind cannot be cancelled one by one, and closing a ring does not wait:
        // a request could still be written into the entry.
        if self.is_kernels.contains(&true) {
            std::mem::forget(self.memory.take());
            std::mem::forget(std::mem::take(&mut self.iovecs));
        }
    }
}

/// `struct fuse_uring_cmd_req`: flags u64, commit_id u64, qid u16, padding.
fn request_of(commit_id: u64, qid: u16) -> [u8; 80] {
    let mut command = [0; 80];
    command[8..16].copy_from_slice(&commit_id.to_ne_bytes());
    command[16..18].copy_from_slice(&qid.to_ne_bytes());
    command
}
