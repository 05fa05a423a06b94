//! Bounded threads for calls that may block long.
//!
//! Jobs wait in one queue a session, and the queues take turns, so that a session with many slow
//! calls delays its own only. One session never has all threads.

use crate::buffers::Buf;
use crate::dispatch::Request;
use crate::fs::Fs;
use crate::mailbox::{Mail, Mailbox};
use crate::op::RequestTag;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// A request to be executed off the shard.
pub struct Job {
    /// Turns are taken by this.
    pub session: u64,
    /// Executes it.
    pub fs: Arc<Fs>,
    /// The request's opcode.
    pub opcode: u32,
    /// The batch that it came in.
    pub batch: Arc<Buf>,
    /// Its body there.
    pub body: Range<usize>,
    /// Where the reply goes.
    pub tag: RequestTag,
    /// The shard that waits.
    pub mailbox: Arc<Mailbox>,
}

/// What became of a job.
pub struct Done {
    /// The job's.
    pub tag: RequestTag,
    /// The body of the reply.
    pub result: Result<Vec<u8>, Errno>,
    /// The job's batch, so that its memory returns to the shard.
    pub batch: Arc<Buf>,
}

#[derive(Default)]
struct Turn {
    session: u64,
    running: usize,
    waiting: VecDeque<Job>,
}

#[derive(Default)]
struct Queue {
    /// Sessions with jobs, in the order of their turns.
    turns: VecDeque<Turn>,
    closed: bool,
}

/// The threads, started when the first job needs them.
pub struct Pool {
    queue: Mutex<Queue>,
    work: Condvar,
    threads: usize,
    /// How many of the threads one session may have.
    share: usize,
    handles: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

impl Pool {
    /// At most `threads` threads.
    pub fn new(threads: usize) -> Arc<Pool> {
        Arc::new(Pool {
            queue: Mutex::default(),
            work: Condvar::new(),
            threads: threads.max(2),
            share: threads.max(2) - 1,
            handles: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Queues a job. How many wait is bounded by the sessions' slots.
    pub fn submit(self: &Arc<Self>, job: Job) {
        let mut queue = self.lock();
        let session = job.session;
        match queue.turns.iter_mut().find(|turn| turn.session == session) {
            Some(turn) => turn.waiting.push_back(job),
            None => {
                queue.turns.push_back(Turn { session, running: 0, waiting: VecDeque::from([job]) })
            }
        }
        let busy: usize = queue.turns.iter().map(|turn| turn.running + turn.waiting.len()).sum();
        drop(queue);
        self.work.notify_one();
        self.grow(busy);
    }

    fn grow(self: &Arc<Self>, busy: usize) {
        let mut handles = self.handles.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if handles.len() < self.threads && handles.len() < busy {
            let pool = self.clone();
            let name = format!("ringfs-pool-{}", handles.len());
            match std::thread::Builder::new().name(name).spawn(move || pool.run()) {
                Ok(handle) => handles.push(handle),
                Err(error) if handles.is_empty() => {
                    // Without any thread the job would wait for ever.
                    tracing::error!(%error, "cannot start a pool thread; the job runs on the shard");
                    drop(handles);
                    if let Some(job) = self.lock().take_next(self.share) {
                        execute(job);
                    }
                }
                Err(error) => tracing::warn!(%error, "cannot start another pool thread"),
            }
        }
    }

    /// Takes a request out that has not begun. A cancelled request is still answered: by the caller.
    pub fn cancel(&self, session: u64, tag: RequestTag) -> Option<Job> {
        let mut queue = self.lock();
        let turn = queue.turns.iter_mut().find(|turn| turn.session == session)?;
        let index = turn.waiting.iter().position(|job| {
            (job.tag.conn, job.tag.lane, job.tag.at) == (tag.conn, tag.lane, tag.at)
        })?;
        turn.waiting.remove(index)
    }

    fn run(&self) {
        loop {
            let mut queue = self.lock();
            let job = loop {
                if let Some(job) = queue.take_next(self.share) {
                    break job;
                }
                if queue.closed {
                    return;
                }
                queue = self.work.wait(queue).unwrap_or_else(|poisoned| poisoned.into_inner());
            };
            drop(queue);
            let session = job.session;
            execute(job);
            self.lock().finished(session);
            // A session that was at its share may go on.
            self.work.notify_one();
        }
    }

    /// Lets the threads finish what is queued, and waits for them.
    pub fn close(&self) {
        self.lock().closed = true;
        self.work.notify_all();
        let handles = std::mem::take(
            &mut *self.handles.lock().unwrap_or_else(|poisoned| poisoned.into_inner()),
        );
        for handle in handles {
            let _ = handle.join();
        }
    }
}

impl Queue {
    fn take_next(&mut self, share: usize) -> Option<Job> {
        let index =
            self.turns.iter().position(|turn| turn.running < share && !turn.waiting.is_empty())?;
        let mut turn = self.turns.remove(index)?;
        let job = turn.waiting.pop_front();
        turn.running += 1;
        self.turns.push_back(turn);
        job
    }

    fn finished(&mut self, session: u64) {
        if let Some(index) = self.turns.iter().position(|turn| turn.session == session) {
            let turn = &mut self.turns[index];
            turn.running -= 1;
            if turn.running == 0 && turn.waiting.is_empty() {
                self.turns.remove(index);
            }
        }
    }
}

fn execute(job: Job) {
    let result = match Request::parse(job.opcode, &job.batch[job.body.clone()]) {
        Some(request) => {
            let mut out = vec![0; job.fs.reply_bytes_max(&request)];
            job.fs.execute(&request, &mut out).map(|len| {
                out.truncate(len);
                out
            })
        }
        None => Err(Errno::INVAL),
    };
    job.mailbox.post(Mail::Done(Done { tag: job.tag, result, batch: job.batch }));
}
