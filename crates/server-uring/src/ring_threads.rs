//! [`Ring`] on blocking threads, for hosts that forbid io_uring.
//!
//! Sockets and the mailbox are waited for by poll(2) on the shard's own thread; file operations run
//! on a few threads of the shard's, which are started when they are first needed.

use crate::op::{Io, Op};
use crate::ring::{IoResult, Ring};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// File operations of one shard that run at once.
const WORKERS_MAX: usize = 4;

/// [`Ring`] on poll and threads.
pub struct ThreadRing {
    /// Wait for their fd.
    waiting: Vec<Op>,
    done: Vec<(Op, IoResult)>,
    on_threads: usize,
    jobs: Option<Sender<Op>>,
    queue: Arc<Mutex<Receiver<Op>>>,
    finished: Receiver<(Op, IoResult)>,
    finish: Sender<(Op, IoResult)>,
    bell: Arc<OwnedFd>,
    workers: Vec<JoinHandle<()>>,
}

impl ThreadRing {
    /// A ring for the calling thread.
    pub fn new() -> io::Result<ThreadRing> {
        let (jobs, queue) = channel();
        let (finish, finished) = channel();
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(ThreadRing {
            waiting: Vec::new(),
            done: Vec::new(),
            on_threads: 0,
            jobs: Some(jobs),
            queue: Arc::new(Mutex::new(queue)),
            finished,
            finish,
            bell: Arc::new(eventfd(0, flags)?),
            workers: Vec::new(),
        })
    }

    fn hand_over(&mut self, op: Op) -> Result<(), Op> {
        if self.workers.len() < WORKERS_MAX && self.workers.len() <= self.on_threads {
            let (queue, finish, bell) =
                (self.queue.clone(), self.finish.clone(), self.bell.clone());
            let thread = std::thread::Builder::new().name("ringfs-file".into());
            match thread.spawn(move || work(&queue, &finish, &bell)) {
                Ok(worker) => self.workers.push(worker),
                Err(error) => tracing::warn!(%error, "cannot start a thread for file operations"),
            }
        }
        if self.workers.is_empty() {
            let (op, result) = run_file(op);
            self.done.push((op, result));
            return Ok(());
        }
        let Some(jobs) = &self.jobs else { return Err(op) };
        jobs.send(op).map_err(|unsent| unsent.0)?;
        self.on_threads += 1;
        Ok(())
    }

    fn collect(&mut self) {
        while let Ok(found) = self.finished.try_recv() {
            self.on_threads -= 1;
            self.done.push(found);
        }
    }
}

impl Ring for ThreadRing {
    fn submit(&mut self, op: Op) -> Result<(), Op> {
        match op.io {
            Io::Recv { .. } | Io::Send { .. } | Io::Room { .. } | Io::Wake { .. } => {
                self.waiting.push(op);
            }
            Io::Read { .. } | Io::Write { .. } | Io::Fsync { .. } => return self.hand_over(op),
        }
        Ok(())
    }

    fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = if self.done.is_empty() { timeout } else { Some(Duration::ZERO) };
        let timespec = timeout
            .map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) });
        let mut fds = vec![PollFd::new(&*self.bell, PollFlags::IN)];
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
            let _ = rustix::io::read(&self.bell, &mut [0; 8]);
            self.collect();
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
        self.waiting.len() + self.done.len() + self.on_threads
    }
}

impl Drop for ThreadRing {
    fn drop(&mut self) {
        drop(self.jobs.take());
        for worker in self.workers.drain(..) {
            let _ = worker.join();
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

fn work(queue: &Mutex<Receiver<Op>>, finish: &Sender<(Op, IoResult)>, bell: &OwnedFd) {
    loop {
        let next = queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).recv();
        let Ok(op) = next else { return };
        if finish.send(run_file(op)).is_err() {
            return;
        }
        let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
    }
}

fn run_file(mut op: Op) -> (Op, IoResult) {
    let result = match &mut op.io {
        Io::Read { file, buf, range, offset } => {
            rustix::io::pread(file.as_fd(), &mut buf[range.clone()], *offset)
        }
        Io::Write { file, buf, range, offset } => {
            rustix::io::pwrite(file.as_fd(), &buf[range.clone()], *offset)
        }
        Io::Fsync { file, data_only: true } => rustix::fs::fdatasync(file.as_fd()).map(|()| 0),
        Io::Fsync { file, data_only: false } => rustix::fs::fsync(file.as_fd()).map(|()| 0),
        Io::Recv { .. } | Io::Send { .. } | Io::Room { .. } | Io::Wake { .. } => Err(Errno::INVAL),
    };
    (op, result)
}
