//! The reactor: [`Ring`], and [`UringRing`] on io_uring. The only unsafe code on the way of a
//! frame.
//!
//! Invariant: from `submit` until its completion an [`Op`] lies still in the ring's table, and with
//! it the memory and the fds that the kernel was told of. If the ring is dropped with operations in
//! flight, it cancels them and waits for the last one before the memory goes.
//!
//! The kernel's threads, to which it gives what would wait, know no peers: operations on one file
//! system that stands still have them all, and keep a file's number in their table from those that
//! have the same one (64). So where two peers' operations take long, what the kernel's threads have
//! not begun, and all that comes until the ring has no file operation more, is done by threads of
//! our own, of which each peer has its part (file_threads.rs). WRITEs of files with the same number
//! are given to a kernel's thread all at once, and those behind one that hangs cannot be cancelled:
//! so the ring has WRITEs of one peer at a time, and those of the others such threads do.
//!
//! Completions are copied out before they are stepped; nothing is stepped inside `reap`.

#![allow(unsafe_code, reason = "the kernel is given pointers into buffers that the table owns")]

use crate::buffers::Buf;
use crate::file_threads::FileThreads;
use crate::limits::{LARGE_BUFFERS_KEPT, RING_ENTRIES, RING_LOOK_MS};
use crate::op::{Io, Op};
use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use slab::Slab;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// What a completed operation returned: bytes, or an errno.
pub type IoResult = Result<usize, rustix::io::Errno>;

/// Submits operations and gives them back.
pub trait Ring {
    /// Takes `op`; gives it back when it cannot be taken now.
    #[allow(clippy::result_large_err, reason = "it is given back as it came, and hardly ever")]
    fn submit(&mut self, op: Op) -> Result<(), Op>;
    /// Starts all that was submitted. With a `timeout` it waits for a completion until then
    /// (`None`: for ever); `Some(ZERO)` does not wait.
    fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()>;
    /// As [`Ring::enter`] without waiting, and without a system call where there is nothing to do;
    /// whether something may have completed.
    fn peek(&mut self) -> io::Result<bool>;
    /// Moves what has completed to `done`.
    fn reap(&mut self, done: &mut Vec<(Op, IoResult)>);
    /// Operations in flight.
    fn in_flight(&self) -> usize;
    /// Whether file operations must come here even where they would not wait for anything: a
    /// simulation wants to decide about each.
    fn takes_all(&self) -> bool {
        false
    }
}

/// [`Ring`] on io_uring.
pub struct UringRing {
    // Field order: the kernel's side goes before the memory that it may touch.
    uring: IoUring,
    ops: Slab<Flying>,
    /// Those of them that work on files.
    on_files: usize,
    /// WRITEs among those, and the peer whose they are.
    writes: usize,
    writer: u64,
    /// How often it was looked whether they end.
    looks: u32,
    /// It will be again.
    is_watched: bool,
    /// Threads that have what would not end in the ring; none but while they are needed.
    threads: Option<FileThreads>,
    /// They take all.
    is_stuck: bool,
    /// Their bell is waited for.
    is_rung: bool,
    /// Which of the buffers that live as long as the shard the kernel knows by their slot.
    registered: [Registered; LARGE_BUFFERS_KEPT],
}

struct Flying {
    op: Op,
    /// [`UringRing::looks`] when it began.
    since: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Registered {
    NotYet,
    Yes,
    /// The kernel would not have it (RLIMIT_MEMLOCK, an old kernel): plain calls do.
    Refused,
}

/// All that a ring will do; the kernel refuses the rest, whoever fills the queue.
const OPCODES: &[u8] = &[
    opcode::Recv::CODE,
    opcode::Send::CODE,
    opcode::PollAdd::CODE,
    opcode::Read::CODE,
    opcode::ReadFixed::CODE,
    opcode::Write::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::AsyncCancel2::CODE,
    opcode::Timeout::CODE,
];

/// IORING_REGISTER_BUFFERS_UPDATE of linux/io_uring.h, which the crate does not name.
const REGISTER_BUFFERS_UPDATE: u8 = 16;

/// How long a ring that is dropped waits for what cannot be cancelled.
pub(crate) const DROP_LIMIT: Duration = Duration::from_secs(5);

/// Marks completions that belong to no operation.
const NO_OP: u64 = u64::MAX;
/// It is time to look at the file operations.
const LOOK: u64 = u64::MAX - 1;
/// Something has ended on a thread.
const BELL: u64 = u64::MAX - 2;

static LOOK_AFTER: types::Timespec = types::Timespec::new().nsec(RING_LOOK_MS * 1_000_000);

impl UringRing {
    /// A ring for the calling thread, which must be the only one that uses it.
    pub fn new() -> io::Result<UringRing> {
        let modern = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_r_disabled()
            .setup_cqsize(RING_ENTRIES * 4)
            .build(RING_ENTRIES);
        let uring = match modern {
            // Kernels before 6.1 know neither of the flags.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
                .setup_r_disabled()
                .setup_cqsize(RING_ENTRIES * 4)
                .build(RING_ENTRIES)?,
            other => other?,
        };
        let sparse = uring.submitter().register_buffers_sparse(LARGE_BUFFERS_KEPT as u32);
        let first = if sparse.is_ok() { Registered::NotYet } else { Registered::Refused };
        let mut allowed: Vec<_> = OPCODES.iter().map(|&code| Restriction::sqe_op(code)).collect();
        allowed.push(Restriction::register_op(REGISTER_BUFFERS_UPDATE));
        uring.submitter().register_restrictions(&mut allowed)?;
        uring.submitter().register_enable_rings()?;
        Ok(UringRing {
            uring,
            ops: Slab::with_capacity(RING_ENTRIES as usize),
            on_files: 0,
            writes: 0,
            writer: 0,
            looks: 0,
            is_watched: false,
            threads: None,
            is_stuck: false,
            is_rung: false,
            registered: [first; LARGE_BUFFERS_KEPT],
        })
    }

    /// The slot by which the kernel knows the operation's buffer; made known at its first use.
    fn registered_slot(&mut self, io: &Io) -> Option<u16> {
        let buf: &Buf = match io {
            Io::Read { buf, .. } => buf,
            Io::Write { buf, .. } => buf,
            Io::Recv { .. }
            | Io::Send { .. }
            | Io::Room { .. }
            | Io::Fsync { .. }
            | Io::Wake { .. } => return None,
        };
        let slot = buf.slot()?;
        let known = &mut self.registered[usize::from(slot)];
        if *known == Registered::NotYet {
            let iovec =
                libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
            // SAFETY: a buffer with a slot is freed with its shard's pool only, and the ring that
            // pins it is dropped before: see the order of fields in `Shard`.
            let update = unsafe {
                self.uring.submitter().register_buffers_update(slot.into(), &[iovec], None)
            };
            *known = if update.is_ok() { Registered::Yes } else { Registered::Refused };
        }
        (*known == Registered::Yes).then_some(slot)
    }

    fn entry(io: &mut Io, slot: Option<u16>) -> squeue::Entry {
        let fd = types::Fd(io.fd().as_raw_fd());
        match io {
            Io::Recv { buf, range, .. } => {
                let room = &mut buf[range.clone()];
                opcode::Recv::new(fd, room.as_mut_ptr(), room.len() as u32).build()
            }
            Io::Send { buf, range, .. } => {
                let bytes = &buf[range.clone()];
                opcode::Send::new(fd, bytes.as_ptr(), bytes.len() as u32)
                    .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
                    .build()
            }
            Io::Room { .. } => opcode::PollAdd::new(fd, libc::POLLOUT as u32).build(),
            Io::Read { buf, range, offset, .. } => {
                let room = &mut buf[range.clone()];
                let (start, len) = (room.as_mut_ptr(), room.len() as u32);
                match slot {
                    Some(slot) => {
                        opcode::ReadFixed::new(fd, start, len, slot).offset(*offset).build()
                    }
                    None => opcode::Read::new(fd, start, len).offset(*offset).build(),
                }
            }
            Io::Write { buf, range, offset, .. } => {
                let bytes = &buf[range.clone()];
                let (start, len) = (bytes.as_ptr(), bytes.len() as u32);
                match slot {
                    Some(slot) => {
                        opcode::WriteFixed::new(fd, start, len, slot).offset(*offset).build()
                    }
                    None => opcode::Write::new(fd, start, len).offset(*offset).build(),
                }
            }
            Io::Fsync { data_only, .. } => {
                let flags = if *data_only {
                    types::FsyncFlags::DATASYNC
                } else {
                    types::FsyncFlags::empty()
                };
                opcode::Fsync::new(fd).flags(flags).build()
            }
            Io::Wake { count, .. } => {
                opcode::Read::new(fd, count.as_mut_ptr(), count.len() as u32).build()
            }
        }
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the entry points into memory of an op in `self.ops`, which stays there until its
        // completion is reaped, or at a static, or nowhere.
        if unsafe { self.uring.submission().push(entry) }.is_ok() {
            return Ok(());
        }
        self.uring.submit()?;
        // SAFETY: as above.
        unsafe { self.uring.submission().push(entry) }.map_err(|_| io::ErrorKind::WouldBlock.into())
    }

    fn watch(&mut self) {
        if (self.on_files > 0 || self.threads.is_some()) && !self.is_watched {
            let look = opcode::Timeout::new(&LOOK_AFTER).build().user_data(LOOK);
            self.is_watched = self.push(&look).is_ok();
        }
    }

    /// Whether file operations of two peers take long: one of them may be what the others wait for.
    fn peers_wait(&self) -> bool {
        let long =
            |flying: &Flying| flying.op.is_on_file() && self.looks.wrapping_sub(flying.since) >= 2;
        let mut owners = (self.ops.iter())
            .filter(|(_, flying)| long(flying))
            .map(|(_, flying)| flying.op.tag.owner());
        owners.next().is_some_and(|first| owners.any(|other| other != first))
    }

    fn has_threads(&mut self) -> bool {
        if self.threads.is_none() {
            match FileThreads::new() {
                Ok(threads) => self.threads = Some(threads),
                Err(error) => tracing::warn!(%error, "no threads for file operations"),
            }
        }
        self.threads.is_some()
    }

    fn look(&mut self) {
        self.looks = self.looks.wrapping_add(1);
        if !self.is_stuck && self.peers_wait() && self.has_threads() {
            self.is_stuck = true;
            let on_file = self.ops.iter().filter(|(_, flying)| flying.op.is_on_file());
            let keys: Vec<u64> = on_file.map(|(key, _)| key as u64).collect();
            for key in keys {
                // Ends what has not begun; the others go on.
                let cancel = types::CancelBuilder::user_data(key);
                let _ = self.push(&opcode::AsyncCancel2::new(cancel).build().user_data(NO_OP));
            }
        }
        if !self.is_stuck && self.threads.as_ref().is_some_and(|own| own.in_flight() == 0) {
            self.threads.take().map(|mut own| own.end(Instant::now()));
        }
        self.watch();
    }

    fn reap_threads(&mut self, untaken: Vec<Op>, done: &mut Vec<(Op, IoResult)>) {
        let Some(threads) = &mut self.threads else { return };
        untaken.into_iter().for_each(|op| threads.submit(op));
        if !self.is_rung {
            threads.collect(done);
        }
        self.is_stuck &= self.on_files > 0;
        self.listen();
    }

    /// Waits for the threads' bell while they have anything.
    fn listen(&mut self) {
        let Some(threads) = self.threads.as_ref().filter(|threads| threads.in_flight() > 0) else {
            return;
        };
        if !self.is_rung {
            let fd = types::Fd(threads.bell().as_raw_fd());
            let bell = opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(BELL);
            self.is_rung = self.push(&bell).is_ok();
        }
    }
}

impl Ring for UringRing {
    fn submit(&mut self, op: Op) -> Result<(), Op> {
        let (on_file, is_write) = (op.is_on_file(), matches!(op.io, Io::Write { .. }));
        let owner = op.tag.owner();
        let is_apart = is_write && self.writes > 0 && owner != self.writer;
        if (is_apart || on_file && self.is_stuck)
            && self.has_threads()
            && let Some(threads) = &mut self.threads
        {
            threads.submit(op);
            self.listen();
            self.watch();
            return Ok(());
        }
        let slot = self.registered_slot(&op.io);
        let key = self.ops.insert(Flying { op, since: self.looks });
        let entry = Self::entry(&mut self.ops[key].op.io, slot).user_data(key as u64);
        self.push(&entry).map_err(|_| self.ops.remove(key).op)?;
        if on_file {
            self.on_files += 1;
            self.writes += usize::from(is_write);
            self.writer = if is_write { owner } else { self.writer };
            self.watch();
        }
        Ok(())
    }

    fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        // Waiting for zero time still enters the kernel for completions, which with deferred task
        // work appear at no other time.
        let result = match timeout {
            None => self.uring.submit_and_wait(1),
            Some(timeout) => {
                let timespec = types::Timespec::from(timeout);
                let args = types::SubmitArgs::new().timespec(&timespec);
                self.uring.submitter().submit_with_args(1, &args)
            }
        };
        match result {
            Ok(_) => Ok(()),
            Err(e) => match e.raw_os_error() {
                // Nothing came in time; a signal; or the completions must be reaped first.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(e),
            },
        }
    }

    fn peek(&mut self) -> io::Result<bool> {
        let submission = self.uring.submission();
        let is_due = !submission.is_empty() || submission.taskrun() || submission.cq_overflow();
        drop(submission);
        if is_due {
            self.enter(Some(Duration::ZERO))?;
        }
        Ok(!self.uring.completion().is_empty())
    }

    fn reap(&mut self, done: &mut Vec<(Op, IoResult)>) {
        let (mut looked, mut untaken) = (false, Vec::new());
        for completion in self.uring.completion() {
            match completion.user_data() {
                NO_OP => {}
                LOOK => looked = true,
                BELL => self.is_rung = false,
                key => {
                    let Some(Flying { op, .. }) = self.ops.try_remove(key as usize) else {
                        continue;
                    };
                    let result = completion.result();
                    let on_file = op.is_on_file();
                    self.on_files -= usize::from(on_file);
                    self.writes -= usize::from(matches!(op.io, Io::Write { .. }));
                    // Not begun, or nothing done: the cancel wakes also who waits on a file system
                    // that lets itself be woken.
                    if on_file && self.is_stuck && matches!(-result, libc::ECANCELED | libc::EINTR)
                    {
                        untaken.push(op);
                        continue;
                    }
                    let result = usize::try_from(result)
                        .map_err(|_| rustix::io::Errno::from_raw_os_error(-result));
                    done.push((op, result));
                }
            }
        }
        if looked {
            self.is_watched = false;
            self.look();
        }
        if self.threads.is_some() {
            self.reap_threads(untaken, done);
        }
    }

    fn in_flight(&self) -> usize {
        self.ops.len() + self.threads.as_ref().map_or(0, FileThreads::in_flight)
    }
}

impl Drop for UringRing {
    fn drop(&mut self) {
        let until = Instant::now() + DROP_LIMIT;
        while !self.ops.is_empty() {
            // In each round: a cancel that found no room, or met an operation between two tries,
            // has ended nothing.
            let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build();
            let _ = self.push(&cancel.user_data(NO_OP));
            let waited = self.enter(Some(Duration::from_millis(100)));
            self.reap(&mut Vec::new());
            if waited.is_err() || Instant::now() > until {
                // A dead disk holds them. The kernel still owns the memory: losing it is safe,
                // freeing it is not.
                tracing::error!(left = self.ops.len(), "file operations do not end");
                std::mem::forget(std::mem::take(&mut self.ops));
            }
        }
        if let Some(threads) = &mut self.threads
            && !threads.end(until)
        {
            tracing::error!(left = threads.in_flight(), "file operations do not end");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_refuses_what_it_is_not_for() {
        let mut ring = UringRing::new().expect("a ring");
        ring.push(&opcode::Nop::new().build().user_data(7)).expect("room");
        ring.enter(Some(Duration::from_secs(10))).expect("enter");
        let done = ring.uring.completion().next().expect("a completion");
        assert_eq!((done.user_data(), done.result()), (7, -libc::EACCES));
        let files = ring.uring.submitter().register_files(&[0]);
        assert_eq!(files.expect_err("refused").raw_os_error(), Some(libc::EACCES));
    }
}
