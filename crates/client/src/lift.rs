//! Large replies to READ from the socket to the device without a copy of ours.
//!
//! While such a reply is due, the front of the next batch alone is received: what the head
//! checksum covers. If it is that reply, the pipe gets the FUSE header and the data that came with
//! the front, then, as it comes, the rest from the socket, and the device gets the whole frame at
//! once. What does not fit into the pipe, though it should, goes back to where batches are
//! received.
//!
//! Invariant: between two replies the pipe is empty, and what is in it is the beginning of one
//! frame, of which the kernel has seen nothing: a cut discards it, and the request is in flight as
//! before. It must not wait, and must not change a slot: `down` does, once the reply is whole.

use crate::conn::{Conn, ConnRx};
use crate::lane::Lane;
use fuser_fork::frame::out_header;
use ringfs_wire::batch::{BATCH_FRONT_BYTES, BatchHeader, Kind, RecordHeader};
use ringfs_wire::limits::{BATCH_HEADER_BYTES, RECORD_HEADER_BYTES};
use ringfs_wire::slot::SlotUse;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use std::os::fd::{AsFd, OwnedFd};
use zerocopy::IntoBytes;

/// READs that ask for so much are worth it.
pub const LIFT_BYTES_MIN: usize = 64 << 10;

/// What pipes are made for: twice the largest reply, as most of their pages are full.
const PIPE_BYTES: usize = 2 << 20;
/// What the unprivileged get.
const PIPE_BYTES_SMALL: usize = 1 << 20;

/// A reply on its way.
#[derive(Clone, Copy, Debug)]
pub struct Lifted {
    /// Heads its batch.
    pub header: BatchHeader,
    /// Heads its only record.
    pub record: RecordHeader,
    /// The FUSE header that is in the pipe.
    pub out: [u8; RECORD_HEADER_BYTES],
    /// Bytes that are still to come.
    left: usize,
}

/// The pipe of one lane, and what is in it.
#[derive(Debug, Default)]
pub struct Lift {
    pipe: Option<Pipe>,
    /// The kernel gives no pipe of this size.
    refused: bool,
    lifted: Option<Lifted>,
}

#[derive(Debug)]
struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
    /// The largest frame that is put into it.
    frame_bytes_max: usize,
}

impl Lift {
    /// Receives what is there; `EAGAIN`: nothing. 0: the peer has closed. `is_due`: a large reply
    /// may be next.
    pub fn receive(
        &mut self,
        lane: &Lane,
        conn: &Conn,
        half: &mut ConnRx,
        is_due: bool,
    ) -> Result<usize, Errno> {
        if self.lifted.is_some() {
            return self.raise(conn, half);
        }
        if !is_due || !half.can_lift || half.deframer.pending() > 0 || self.refused {
            return receive_bytes(conn, half);
        }
        let front = &mut half.deframer.spare()[..BATCH_FRONT_BYTES];
        let bytes = conn.try_receive(front)?;
        if bytes == BATCH_FRONT_BYTES && self.begin(lane, conn, half) {
            return Ok(bytes + self.raise(conn, half).unwrap_or(0));
        }
        half.deframer.filled(bytes);
        if bytes < BATCH_FRONT_BYTES {
            return Ok(bytes);
        }
        // Another batch: an error, or the end, will be there again.
        Ok(bytes + receive_bytes(conn, half).unwrap_or(0))
    }

    /// Whether a reply, of which the front has been received into the deframer's spare room and
    /// does not count there, is one to be lifted.
    fn begin(&mut self, lane: &Lane, conn: &Conn, half: &mut ConnRx) -> bool {
        let ConnRx { rx, deframer, .. } = half;
        let Some(front) = deframer.spare().first_chunk::<BATCH_FRONT_BYTES>() else {
            return false;
        };
        let Some((header, record)) = rx.look_at_front(front, conn.sent()) else { return false };
        let at = SlotUse { slot: record.slot, seq: record.slot_seq };
        let len = record.len as usize;
        let is_ours = record.lane == lane.index && record.kind == Kind::Reply as u8;
        let Some(unique) =
            lane.read_in(at).filter(|_| is_ours && record.code == 0 && len >= LIFT_BYTES_MIN)
        else {
            return false;
        };
        let Some(pipe) = self.pipe().filter(|pipe| len <= pipe.frame_bytes_max) else {
            return false;
        };
        let out = out_header(unique, len - RECORD_HEADER_BYTES);
        let mut frame = [0; BATCH_FRONT_BYTES - BATCH_HEADER_BYTES];
        frame.copy_from_slice(&front[BATCH_HEADER_BYTES..]);
        frame[..RECORD_HEADER_BYTES].copy_from_slice(&out);
        if rustix::io::write(&pipe.into, &frame) != Ok(frame.len()) {
            self.discard();
            return false;
        }
        self.lifted = Some(Lifted { header, record, out, left: len - frame.len() });
        true
    }

    /// Takes what is there of the rest.
    fn raise(&mut self, conn: &Conn, half: &mut ConnRx) -> Result<usize, Errno> {
        let (Some(pipe), Some(lifted)) = (&self.pipe, &mut self.lifted) else { return Ok(0) };
        let mut done = 0;
        while lifted.left > 0 {
            let flags = SpliceFlags::NONBLOCK;
            match splice(conn.socket(), None, &pipe.into, None, lifted.left, flags) {
                Ok(0) => break,
                Ok(n) => {
                    done += n;
                    lifted.left -= n;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if !pipe.is_full() => {
                    return if done > 0 { Ok(done) } else { Err(Errno::AGAIN) };
                }
                Err(Errno::AGAIN) => {
                    self.put_back(half)?;
                    return match receive_bytes(conn, half) {
                        Err(_) if done > 0 => Ok(done),
                        more => more.map(|more| done + more),
                    };
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(done)
    }

    /// The pipe is full, though more is to come: what is in it goes where batches are received, as
    /// it came.
    fn put_back(&mut self, half: &mut ConnRx) -> Result<(), Errno> {
        let (Some(pipe), Some(lifted)) = (&self.pipe, self.lifted.take()) else { return Ok(()) };
        let bytes = BATCH_HEADER_BYTES + lifted.bytes();
        let (header, frame) = half.deframer.spare()[..bytes].split_at_mut(BATCH_HEADER_BYTES);
        header.copy_from_slice(lifted.header.as_bytes());
        let mut room = &mut *frame;
        while !room.is_empty() {
            match rustix::io::read(&pipe.out, &mut *room) {
                Ok(n) if n > 0 => room = &mut room[n..],
                Err(Errno::INTR) => {}
                end => return Err(end.err().unwrap_or(Errno::IO)),
            }
        }
        frame[..RECORD_HEADER_BYTES].copy_from_slice(lifted.record.as_bytes());
        half.deframer.filled(bytes);
        Ok(())
    }

    /// The reply that is in the pipe, if it is whole.
    pub fn whole(&self) -> Option<Lifted> {
        self.lifted.filter(|lifted| lifted.left == 0)
    }

    /// Bytes that are in the pipe.
    pub fn held(&self) -> usize {
        self.lifted.map_or(0, |lifted| lifted.bytes())
    }

    /// The whole reply goes to the kernel, by the lane of its slot.
    pub fn deliver(&mut self, lane: &Lane) {
        let (Some(pipe), Some(lifted)) = (&self.pipe, self.lifted.take()) else { return };
        let is_taken = lane.answer_from(pipe.out.as_fd(), &lifted.out, lifted.bytes());
        if !is_taken {
            self.discard();
        }
    }

    /// Empties the pipe: the next use makes a new one.
    pub fn discard(&mut self) {
        (self.pipe, self.lifted) = (None, None);
    }

    fn pipe(&mut self) -> Option<&Pipe> {
        if self.pipe.is_none() && !self.refused {
            self.pipe = Pipe::new().ok();
            self.refused = self.pipe.is_none();
        }
        self.pipe.as_ref()
    }
}

fn receive_bytes(conn: &Conn, half: &mut ConnRx) -> Result<usize, Errno> {
    let bytes = conn.try_receive(half.deframer.spare())?;
    half.deframer.filled(bytes);
    Ok(bytes)
}

impl Lifted {
    /// Of its frame, so far.
    fn bytes(&self) -> usize {
        self.record.len as usize - self.left
    }
}

impl Pipe {
    fn new() -> Result<Pipe, Errno> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let size = fcntl_setpipe_size(&into, PIPE_BYTES)
            .or_else(|_| fcntl_setpipe_size(&into, PIPE_BYTES_SMALL))?;
        tracing::debug!(size, "a pipe for large replies");
        Ok(Pipe { out, into, frame_bytes_max: size / 2 + RECORD_HEADER_BYTES })
    }

    fn is_full(&self) -> bool {
        let mut fds = [PollFd::new(&self.into, PollFlags::OUT)];
        poll(&mut fds, Some(&Timespec::default())) == Ok(0)
    }
}
