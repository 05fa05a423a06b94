//! Threads of one shard for file operations: all of them where there is no io_uring, and those that
//! the kernel's own threads do not come to (ring.rs).
//!
//! Whose is next is decided as in the pool (jobs.rs): peers take turns, and one has half of the
//! threads at most, since what it asks for may hang as long as its file system is frozen. How many
//! wait is bounded by the sessions' slots. The threads are started when they are first needed.

use crate::jobs::{Begun, Jobs, Next, Pace};
use crate::limits::FILE_THREADS_MAX;
use crate::op::{Io, Op};
use crate::ring::IoResult;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

struct Queue {
    jobs: Jobs<Op>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    /// Rings when something is done.
    bell: OwnedFd,
}

/// See the module.
pub(crate) struct FileThreads {
    shared: Arc<Shared>,
    finished: Receiver<(Op, IoResult)>,
    finish: Sender<(Op, IoResult)>,
    in_flight: usize,
    threads: Vec<JoinHandle<()>>,
}

impl FileThreads {
    /// None is started yet.
    pub(crate) fn new() -> io::Result<FileThreads> {
        let (finish, finished) = channel();
        let shared = Shared {
            queue: Mutex::new(Queue { jobs: Jobs::new(FILE_THREADS_MAX / 2), closed: false }),
            work: Condvar::new(),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        };
        let shared = Arc::new(shared);
        Ok(FileThreads { shared, finished, finish, in_flight: 0, threads: Vec::new() })
    }

    /// To be waited for until it can be read; then [`FileThreads::collect`].
    pub(crate) fn bell(&self) -> &OwnedFd {
        &self.shared.bell
    }

    /// Operations that run or wait.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Takes an operation on a file.
    pub(crate) fn submit(&mut self, op: Op) {
        if self.threads.len() < FILE_THREADS_MAX && self.threads.len() <= self.in_flight {
            let (shared, finish) = (self.shared.clone(), self.finish.clone());
            let thread = std::thread::Builder::new().name("ringfs-file".into());
            match thread.spawn(move || shared.run(&finish)) {
                Ok(thread) => self.threads.push(thread),
                Err(error) => tracing::warn!(%error, "cannot start a thread for file operations"),
            }
        }
        self.in_flight += 1;
        if self.threads.is_empty() {
            self.shared.finish(op, &self.finish);
            return;
        }
        let may_begin = self.shared.lock().jobs.push(op.tag.owner(), op);
        if may_begin {
            self.shared.work.notify_one();
        }
    }

    /// Moves what has ended to `done`.
    pub(crate) fn collect(&mut self, done: &mut Vec<(Op, IoResult)>) {
        let _ = rustix::io::read(self.bell(), &mut [0; 8]);
        let before = done.len();
        done.extend(self.finished.try_iter());
        self.in_flight -= done.len() - before;
    }

    /// Waits for what is in flight until then; false: some of it does not end, and the threads
    /// keep it, with its memory and its file.
    pub(crate) fn end(&mut self, until: Instant) -> bool {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
        while self.in_flight > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if self.finished.recv_timeout(left).is_err() {
                return false;
            }
            self.in_flight -= 1;
        }
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
        true
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, finish: &Sender<(Op, IoResult)>) {
        while let Some(begun) = self.wait_for_job() {
            let (op, bill) = begun.into_parts();
            self.finish(op, finish);
            self.lock().jobs.ended(bill, 0, 0, Pace::ALONE);
        }
    }

    /// `None`: it is over, and nothing is left to do.
    fn wait_for_job(&self) -> Option<Begun<Op>> {
        let mut queue = self.lock();
        loop {
            match queue.jobs.next(0, Pace::ALONE) {
                Next::Task(begun) => return Some(begun),
                Next::At(_) | Next::Nothing if queue.closed && queue.jobs.load().1 == 0 => {
                    // The others wait for what this one has done.
                    self.work.notify_all();
                    return None;
                }
                Next::At(_) | Next::Nothing => {
                    queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn finish(&self, op: Op, finish: &Sender<(Op, IoResult)>) {
        // Nobody takes it where the ring was given up.
        if finish.send(run_file(op)).is_ok() {
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
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
