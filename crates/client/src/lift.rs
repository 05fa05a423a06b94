//! Large replies to READ from the socket to the device without a copy of ours.
//!
//! While such a reply is due, the front of the next batch alone is received: what the head
//! checksum covers. If it is that reply, the pipe gets the FUSE header and the data that came with
//! the front, then, as it comes, the rest from the socket, and the device gets the whole frame at
//! once. What the pipe does not take, though it should, goes back to where batches are received,
//! and so does what splice(2) fails on: recv(2) knows better whether the connection is lost.
//!
//! Invariant: between two replies the pipe is empty, and what is in it is the beginning of one
//! frame, of which the kernel has seen nothing: a cut discards it, and the request is in flight as
//! before. It must not wait, and must not change a slot: `down` does, once the reply is whole.

use crate::conn::{Conn, ConnRx};
use crate::lane::Lane;
use fuser_fork::device::ReplyOutcome;
use fuser_fork::frame::out_header;
use ringfs_wire::batch::{BATCH_FRONT_BYTES, BatchHeader, Kind, RecordHeader};
use ringfs_wire::limits::{BATCH_HEADER_BYTES, RECORD_HEADER_BYTES};
use ringfs_wire::slot::SlotUse;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use zerocopy::IntoBytes;

/// READs that ask for so much are worth it.
pub const LIFT_BYTES_MIN: usize = 64 << 10;

/// A pipe is twice as large as what goes through it, as most of its pages are full then; no larger,
/// as a user may have so many pages of pipes (`fs.pipe-user-pages-soft`).
const PIPE_BYTES_MAX: usize = 2 << 20;

/// A reply on its way.
#[derive(Clone, Copy, Debug)]
pub struct Lifted {
    /// Heads its batch.
    pub header: BatchHeader,
    /// Heads its only record.
    pub record: RecordHeader,
    /// Bytes that are still to come.
    left: usize,
}

/// The pipe of one lane, and what is in it.
#[derive(Debug)]
pub struct Lift {
    pipe: Option<Pipe>,
    /// The kernel gives no pipe for larger ones, or does not splice at all.
    frame_bytes_max: usize,
    lifted: Option<Lifted>,
}

#[derive(Debug)]
struct Pipe {
    out: File,
    into: OwnedFd,
    bytes: usize,
}

impl Default for Lift {
    fn default() -> Lift {
        Lift { pipe: None, frame_bytes_max: frame_bytes_max(PIPE_BYTES_MAX), lifted: None }
    }
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
        if !is_due
            || !half.can_lift
            || half.deframer.pending() > 0
            || self.frame_bytes_max < LIFT_BYTES_MIN
        {
            return receive_bytes(conn, half);
        }
        let front = &mut half.deframer.spare()[..BATCH_FRONT_BYTES];
        let bytes = conn.try_receive(front)?;
        if bytes == BATCH_FRONT_BYTES && self.begin(lane, conn, half) {
            return bytes_and(bytes, self.raise(conn, half));
        }
        half.deframer.filled(bytes);
        if bytes < BATCH_FRONT_BYTES {
            return Ok(bytes);
        }
        bytes_and(bytes, receive_bytes(conn, half))
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
        let Some(pipe) = self.pipe_for(len) else { return false };
        let mut frame = [0; BATCH_FRONT_BYTES - BATCH_HEADER_BYTES];
        frame.copy_from_slice(&front[BATCH_HEADER_BYTES..]);
        let out = out_header(unique, len - RECORD_HEADER_BYTES);
        frame[..RECORD_HEADER_BYTES].copy_from_slice(&out);
        if rustix::io::write(&pipe.into, &frame) != Ok(frame.len()) {
            self.discard();
            return false;
        }
        self.lifted = Some(Lifted { header, record, left: len - frame.len() });
        true
    }

    /// Takes what is there of the rest.
    fn raise(&mut self, conn: &Conn, half: &mut ConnRx) -> Result<usize, Errno> {
        let (Some(pipe), Some(lifted)) = (&self.pipe, &mut self.lifted) else {
            return Err(Errno::IO);
        };
        let mut done = 0;
        while lifted.left > 0 {
            let flags = SpliceFlags::NONBLOCK;
            match splice(conn.socket(), None, &pipe.into, None, lifted.left, flags) {
                Ok(n) if n > 0 => {
                    done += n;
                    lifted.left -= n;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if done > 0 || !pipe.is_full() => {
                    return bytes_and(done, Err(Errno::AGAIN));
                }
                end => {
                    if end != Err(Errno::AGAIN) {
                        self.frame_bytes_max = 0;
                    }
                    self.put_back(half)?;
                    return bytes_and(done, receive_bytes(conn, half));
                }
            }
        }
        Ok(done)
    }

    /// More is to come, and the pipe does not get it: what is in it goes where batches are
    /// received, as it came. If it cannot, the connection goes no further.
    fn put_back(&mut self, half: &mut ConnRx) -> Result<(), Errno> {
        let (Some(pipe), Some(lifted)) = (&self.pipe, self.lifted) else { return Err(Errno::IO) };
        let bytes = BATCH_HEADER_BYTES + lifted.bytes();
        let (header, frame) = half.deframer.spare()[..bytes].split_at_mut(BATCH_HEADER_BYTES);
        header.copy_from_slice(lifted.header.as_bytes());
        if (&pipe.out).read_exact(frame).is_err() {
            self.pipe = None;
            return Err(Errno::IO);
        }
        self.lifted = None;
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

    /// The whole reply to the request `unique` goes to the kernel, by the lane of its slot; whether
    /// it was wanted.
    pub fn deliver(&mut self, lane: &Lane, unique: u64) -> bool {
        let (Some(pipe), Some(lifted)) = (&self.pipe, self.lifted.take()) else { return false };
        let told = lane.answer_from(pipe.out.as_fd(), unique, lifted.bytes());
        if told != ReplyOutcome::Delivered {
            self.discard();
        }
        if told == ReplyOutcome::Refused {
            self.frame_bytes_max = 0;
        }
        told == ReplyOutcome::Delivered
    }

    /// Gives the pipe back, with what is in it: the next use makes a new one, and what was refused
    /// is tried again.
    pub fn discard(&mut self) {
        *self = Lift::default();
    }

    /// A pipe that takes such a frame.
    fn pipe_for(&mut self, frame_bytes: usize) -> Option<&Pipe> {
        if frame_bytes > self.frame_bytes_max {
            return None;
        }
        if self.pipe.as_ref().is_none_or(|pipe| frame_bytes > frame_bytes_max(pipe.bytes)) {
            let bytes = (2 * (frame_bytes - RECORD_HEADER_BYTES)).next_power_of_two();
            let Ok(pipe) = Pipe::new(bytes) else {
                self.frame_bytes_max = frame_bytes_max(bytes / 2);
                return None;
            };
            self.pipe = Some(pipe);
        }
        self.pipe.as_ref()
    }
}

/// The largest frame that is put into such a pipe.
const fn frame_bytes_max(pipe_bytes: usize) -> usize {
    pipe_bytes / 2 + RECORD_HEADER_BYTES
}

/// So many bytes, and what came behind them: an error, or the end, will be there again.
fn bytes_and(bytes: usize, more: Result<usize, Errno>) -> Result<usize, Errno> {
    match more {
        Err(_) if bytes > 0 => Ok(bytes),
        more => more.map(|more| bytes + more),
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
    fn new(bytes: usize) -> Result<Pipe, Errno> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let bytes = fcntl_setpipe_size(&into, bytes)?;
        tracing::debug!(bytes, "a pipe for large replies");
        Ok(Pipe { out: out.into(), into, bytes })
    }

    fn is_full(&self) -> bool {
        let mut fds = [PollFd::new(&self.into, PollFlags::OUT)];
        poll(&mut fds, Some(&Timespec::default())) == Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_is_as_large_as_its_replies_and_goes_when_the_lane_rests() {
        let mut lift = Lift::default();
        for (data, expected) in [
            (LIFT_BYTES_MIN, 128 << 10),
            (128 << 10, 256 << 10),
            (LIFT_BYTES_MIN, 256 << 10),
            (300_000, 1 << 20),
        ] {
            let pipe = lift.pipe_for(data + RECORD_HEADER_BYTES).expect("a pipe");
            assert_eq!(pipe.bytes, expected, "for {data}");
        }
        assert!(lift.pipe_for(2 << 20).is_none());
        lift.discard();
        assert!(lift.pipe.is_none());
    }
}
