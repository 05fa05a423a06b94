//! Large replies from the page cache into the socket without a copy: file, pipe, socket.
//!
//! The pages are taken into the pipe before the reply's header is made, so the header says exactly
//! what follows, and a short file or an error is answered as ever: nothing is promised that is not
//! in hand. What the socket does not take at once is read out of the pipe and sent as bytes.
//!
//! The receiver sees a page as it is when the bytes are copied out of it, which a guest may leave
//! to its kernel: as with any read that runs beside a write, each byte is one that the file had
//! while the guest waited for the answer.
//!
//! Invariant: the pipe is empty between two replies. It must not wait, for the file or the socket:
//! the caller asks for files that are in memory only, and for room in the socket first.

use rustix::io::Errno;
use rustix::net::{AddressFamily, sockopt};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::dispatch::IO_BYTES_MAX;
use crate::fdops;
use crate::limits::SPLICE_SEND_BUFFER_BYTES;

/// The kernel's own cost of what waits in a socket, beside the bytes: a header for each 64 KiB.
const OVERHEAD_BYTES: usize = 64 << 10;

/// The pipe of one shard.
#[derive(Debug, Default)]
pub struct Splicer {
    pipe: Option<Pipe>,
    /// The kernel gives no pipe of this size.
    refused: bool,
}

#[derive(Debug)]
struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
}

impl Splicer {
    fn pipe(&mut self) -> Option<&Pipe> {
        if self.pipe.is_none() && !self.refused {
            self.pipe = Pipe::new().ok();
            self.refused = self.pipe.is_none();
        }
        self.pipe.as_ref()
    }

    /// Takes the pages of exactly `len` bytes from the offset on, or up to the end of the file.
    /// `None`: not so; then the pipe is empty, and the caller reads.
    pub fn take(&mut self, file: BorrowedFd<'_>, mut offset: u64, len: usize) -> Option<usize> {
        let pipe = self.pipe()?;
        let mut done = 0;
        while done < len {
            let (rest, flags) = (len - done, SpliceFlags::NONBLOCK);
            match splice(file, Some(&mut offset), &pipe.into, None, rest, flags) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(_) => {
                    self.discard();
                    return None;
                }
            }
        }
        Some(done)
    }

    /// Reads what is in the pipe, all of `room`. After an error there is no telling what is left:
    /// it is gone.
    pub fn read(&mut self, mut room: &mut [u8]) -> Result<(), Errno> {
        while !room.is_empty() {
            let pipe = self.pipe.as_ref().ok_or(Errno::IO)?;
            match rustix::io::read(&pipe.out, &mut *room) {
                Ok(n) if n > 0 => room = &mut room[n..],
                Err(Errno::INTR) => {}
                end => {
                    self.discard();
                    return Err(end.err().unwrap_or(Errno::IO));
                }
            }
        }
        Ok(())
    }

    /// Sends `len` bytes of the pipe as far as the socket takes them; says how many it took.
    pub fn pour(&self, socket: BorrowedFd<'_>, len: usize) -> usize {
        let Some(pipe) = &self.pipe else { return 0 };
        let mut done = 0;
        while done < len {
            let flags = SpliceFlags::NONBLOCK;
            match splice(&pipe.out, None, socket, None, len - done, flags) {
                Ok(n) if n > 0 => done += n,
                Err(Errno::INTR) => {}
                _ => break,
            }
        }
        done
    }

    /// Empties the pipe: the next use makes a new one.
    pub fn discard(&mut self) {
        self.pipe = None;
    }
}

impl Pipe {
    fn new() -> Result<Pipe, Errno> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // A page at each end may be there in part.
        let wanted = IO_BYTES_MAX + 2 * crate::limits::BUFFER_ALIGN;
        let size = fcntl_setpipe_size(&into, wanted)
            .or_else(|_| fcntl_setpipe_size(&into, IO_BYTES_MAX))?;
        tracing::debug!(size, "a pipe for large replies");
        Ok(Pipe { out, into })
    }
}

/// What a socket holds at most: known once it is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SendBuffer {
    /// Not looked at.
    #[default]
    Unknown,
    /// No socket for this: not a Unix one, or with a small buffer.
    Small,
    /// So many bytes of the kernel's count.
    Bytes(usize),
}

impl SendBuffer {
    /// Enlarges the buffer of a Unix socket so that it holds the largest reply.
    pub fn enlarge(socket: BorrowedFd<'_>) -> SendBuffer {
        if sockopt::socket_domain(socket) != Ok(AddressFamily::UNIX) {
            return SendBuffer::Small;
        }
        // A parent with more rights than we have may have done it.
        if sockopt::socket_send_buffer_size(socket).is_ok_and(|now| now < SPLICE_SEND_BUFFER_BYTES)
        {
            // The kernel doubles it, as it counts its own headers too.
            let half = SPLICE_SEND_BUFFER_BYTES / 2;
            if sockopt::set_socket_send_buffer_size_force(socket, half).is_err() {
                let _ = sockopt::set_socket_send_buffer_size(socket, half);
            }
        }
        match sockopt::socket_send_buffer_size(socket) {
            Ok(bytes) if bytes >= IO_BYTES_MAX + 2 * OVERHEAD_BYTES => SendBuffer::Bytes(bytes),
            _ => SendBuffer::Small,
        }
    }

    /// Whether a reply of `len` bytes would be taken without waiting.
    pub fn has_room(self, socket: BorrowedFd<'_>, len: usize) -> bool {
        let SendBuffer::Bytes(bytes) = self else { return false };
        fdops::unsent_bytes(socket).is_ok_and(|unsent| unsent + len + OVERHEAD_BYTES <= bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_arrive_in_order_however_they_leave() {
        let mut file = tempfile::tempfile().expect("file");
        let bytes: Vec<u8> = (0..IO_BYTES_MAX + 5000).map(|i| (i % 251) as u8).collect();
        file.write_all(&bytes).expect("write");
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let room = SendBuffer::enlarge(ours.as_fd());
        let mut splicer = Splicer::default();
        for (offset, len, expected) in [
            (0, IO_BYTES_MAX, IO_BYTES_MAX),
            (4097, IO_BYTES_MAX, IO_BYTES_MAX),
            (IO_BYTES_MAX, IO_BYTES_MAX, 5000),
            (bytes.len() + 9, 4096, 0),
        ] {
            let taken = splicer.take(file.as_fd(), offset as u64, len);
            // An unprivileged pipe may be a page too small for what is not aligned.
            let Some(taken) = taken else { continue };
            assert_eq!(taken, expected);
            let mut head = vec![0; taken.min(240)];
            splicer.read(&mut head).expect("head");
            let rest = taken - head.len();
            let poured = match room.has_room(ours.as_fd(), rest) {
                true => splicer.pour(ours.as_fd(), rest),
                false => 0,
            };
            let mut received = vec![0; poured];
            theirs.read_exact(&mut received).expect("received");
            let mut left = vec![0; rest - poured];
            splicer.read(&mut left).expect("left");
            assert_eq!(
                [head, received, left].concat(),
                bytes.get(offset..offset + taken).unwrap_or_default()
            );
        }
    }

    #[test]
    fn a_full_socket_has_no_room() {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let room = SendBuffer::enlarge(ours.as_fd());
        assert!(!SendBuffer::Small.has_room(ours.as_fd(), 1));
        if let SendBuffer::Bytes(bytes) = room {
            assert!(room.has_room(ours.as_fd(), IO_BYTES_MAX));
            assert!(!room.has_room(ours.as_fd(), bytes));
            (&ours).write_all(&vec![0; 1 << 20]).expect("write");
            assert!(!room.has_room(ours.as_fd(), bytes - IO_BYTES_MAX));
        }
        drop(theirs);
    }
}
