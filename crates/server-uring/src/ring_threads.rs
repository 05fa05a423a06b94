//! [`Ring`] on blocking threads, for hosts that forbid io_uring.
//!
//! Sockets and the mailbox are waited for by poll(2) on the shard's own thread; file operations run
//! on threads of the shard's (file_threads.rs).

use crate::file_threads::FileThreads;
use crate::op::{Io, Op};
use crate::ring::{DROP_LIMIT, IoResult, Ring};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// [`Ring`] on poll and threads.
pub struct ThreadRing {
    /// Wait for their fd.
    waiting: Vec<Op>,
    done: Vec<(Op, IoResult)>,
    files: FileThreads,
}

impl ThreadRing {
    /// A ring for the calling thread.
    pub fn new() -> io::Result<ThreadRing> {
        let files = FileThreads::new()?;
        Ok(ThreadRing { waiting: Vec::new(), done: Vec::new(), files })
    }
}

impl Ring for ThreadRing {
    fn submit(&mut self, op: Op) -> Result<(), Op> {
        match op.is_on_file() {
            true => self.files.submit(op),
            false => self.waiting.push(op),
        }
        Ok(())
    }

    fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = if self.done.is_empty() { timeout } else { Some(Duration::ZERO) };
        let timespec = timeout
            .map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) });
        let mut fds = vec![PollFd::new(self.files.bell(), PollFlags::IN)];
        fds.extend(self.waiting.iter().map(|op| {
            let events = match op.io {
                Io::Send { .. } | Io::Room { .. } => PollFlags::OUT,
                _ => PollFlags::IN,
            };
            PollFd::from_borrowed_fd(op.io.fd(), events)
        }));
        match poll(&mut fds, timespec.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ready: Vec<bool> = fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect();
        let rung = !fds[0].revents().is_empty();
        drop(fds);
        let waiting = std::mem::take(&mut self.waiting);
        for (mut op, ready) in waiting.into_iter().zip(ready) {
            match ready.then(|| run_socket(&mut op)) {
                Some(Err(Errno::AGAIN | Errno::INTR)) | None => self.waiting.push(op),
                Some(result) => self.done.push((op, result)),
            }
        }
        if rung {
            self.files.collect(&mut self.done);
        }
        Ok(())
    }

    fn peek(&mut self) -> io::Result<bool> {
        self.enter(Some(Duration::ZERO))?;
        Ok(!self.done.is_empty())
    }

    fn reap(&mut self, done: &mut Vec<(Op, IoResult)>) {
        done.append(&mut self.done);
    }

    fn in_flight(&self) -> usize {
        self.waiting.len() + self.done.len() + self.files.in_flight()
    }
}

impl Drop for ThreadRing {
    fn drop(&mut self) {
        if !self.files.end(Instant::now() + DROP_LIMIT) {
            tracing::error!(left = self.files.in_flight(), "file operations do not end");
        }
    }
}

fn run_socket(op: &mut Op) -> IoResult {
    match &mut op.io {
        Io::Recv { socket, buf, range } => {
            let room = &mut buf[range.clone()];
            rustix::net::recv(socket.as_fd(), room, RecvFlags::DONTWAIT).map(|(n, _)| n)
        }
        Io::Send { socket, buf, range } => {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            rustix::net::send(socket.as_fd(), &buf[range.clone()], flags)
        }
        Io::Room { .. } => Ok(0),
        Io::Wake { event, count } => rustix::io::read(event.as_fd(), &mut count[..]),
        Io::Read { .. } | Io::Write { .. } | Io::Fsync { .. } => Err(Errno::INVAL),
    }
}
