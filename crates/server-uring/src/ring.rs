//! The reactor: [`Ring`], and [`UringRing`] on io_uring. The only unsafe code on the way of a frame.
//!
//! Invariant: from `submit` until its completion an [`Op`] lies still in the ring's table, and with
//! it the memory and the fds that the kernel was told of. If the ring is dropped with operations in
//! flight, it cancels them and waits for the last one before the memory goes.
//!
//! Completions are copied out before they are stepped; nothing happens inside `reap`.

#![allow(unsafe_code, reason = "the kernel is given pointers into buffers that the table owns")]

use crate::limits::RING_ENTRIES;
use crate::op::{Io, Op};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use slab::Slab;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// What a completed operation returned: bytes, or an errno.
pub type IoResult = Result<usize, rustix::io::Errno>;

/// Submits operations and gives them back.
pub trait Ring {
    /// Takes `op`; gives it back when it cannot be taken now.
    fn submit(&mut self, op: Op) -> Result<(), Op>;
    /// Starts all that was submitted. With a `timeout` it waits for a completion until then
    /// (`None`: for ever); `Some(ZERO)` does not wait.
    fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()>;
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
    ops: Slab<Op>,
}

/// Marks completions that belong to no operation.
const NO_OP: u64 = u64::MAX;

impl UringRing {
    /// A ring for the calling thread, which must be the only one that uses it.
    pub fn new() -> io::Result<UringRing> {
        let modern = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_cqsize(RING_ENTRIES * 4)
            .build(RING_ENTRIES);
        let uring = match modern {
            // Kernels before 6.1 know neither of the flags.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().setup_cqsize(RING_ENTRIES * 4).build(RING_ENTRIES)?
            }
            other => other?,
        };
        Ok(UringRing { uring, ops: Slab::with_capacity(RING_ENTRIES as usize) })
    }

    fn entry(io: &mut Io) -> squeue::Entry {
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
            Io::Read { buf, range, offset, .. } => {
                let room = &mut buf[range.clone()];
                opcode::Read::new(fd, room.as_mut_ptr(), room.len() as u32).offset(*offset).build()
            }
            Io::Write { buf, range, offset, .. } => {
                let bytes = &buf[range.clone()];
                opcode::Write::new(fd, bytes.as_ptr(), bytes.len() as u32).offset(*offset).build()
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
        // completion is reaped, or is a cancel, which points nowhere.
        if unsafe { self.uring.submission().push(entry) }.is_ok() {
            return Ok(());
        }
        self.uring.submit()?;
        // SAFETY: as above.
        unsafe { self.uring.submission().push(entry) }.map_err(|_| io::ErrorKind::WouldBlock.into())
    }
}

impl Ring for UringRing {
    fn submit(&mut self, op: Op) -> Result<(), Op> {
        let key = self.ops.insert(op);
        let entry = Self::entry(&mut self.ops[key].io).user_data(key as u64);
        self.push(&entry).map_err(|_| self.ops.remove(key))
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

    fn reap(&mut self, done: &mut Vec<(Op, IoResult)>) {
        let queue = self.uring.completion();
        for completion in queue {
            if let Some(found) = take(&mut self.ops, &completion) {
                done.push(found);
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.ops.len()
    }
}

fn take(ops: &mut Slab<Op>, completion: &cqueue::Entry) -> Option<(Op, IoResult)> {
    if completion.user_data() == NO_OP {
        return None;
    }
    let op = ops.try_remove(completion.user_data() as usize)?;
    let result = usize::try_from(completion.result())
        .map_err(|_| rustix::io::Errno::from_raw_os_error(-completion.result()));
    Some((op, result))
}

impl Drop for UringRing {
    fn drop(&mut self) {
        while !self.ops.is_empty() {
            // In each round: a cancel that found no room, or met an operation between two tries,
            // has ended nothing.
            let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build();
            let _ = self.push(&cancel.user_data(NO_OP));
            let waited = self.enter(Some(Duration::from_secs(1)));
            let mut done = Vec::new();
            self.reap(&mut done);
            if waited.is_err() {
                // The kernel still owns the memory: losing it is safe, freeing it is not.
                std::mem::forget(std::mem::take(&mut self.ops));
            }
        }
    }
}
