//! Bounded threads for calls that may block long.
//!
//! Whose job is next is decided in jobs.rs: a peer with many slow calls, or with many sessions,
//! delays its own only. One peer has half of the threads at most: calls on a frozen file system
//! hang for as long as it is frozen.

use crate::buffers::Buf;
use crate::decide::Outcome;
use crate::dispatch::Request;
use crate::fs::Fs;
use crate::handles::Handle;
use crate::jobs::{Begun, Jobs, Next, Pace};
use crate::limits::{POOL_COPY_BYTES_MAX, POOL_NICE, WARMED_A_TURN_MAX};
use crate::link::BODY_AT;
use crate::long_calls::LongCall;
use crate::mailbox::{Mail, Mailbox};
use crate::nodes::Released;
use crate::notes::Notes;
use crate::op::RequestTag;
use crate::quota::now_ns;
use crate::state_dir::IntentPlace;
use ringfs_wire::table::Past;
use rustix::io::Errno;
use rustix::thread::{CpuSet, Pid, gettid, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Where the request of a job is.
pub enum Body {
    /// In the batch that it came in, whose buffer waits with it.
    Held(Arc<Buf>, Range<usize>),
    /// Copied, so that the batch's buffer goes on receiving however long the job waits.
    Copied(Vec<u8>),
}

impl Body {
    /// Of a request that lies there in a batch.
    pub fn of(batch: &Arc<Buf>, range: Range<usize>) -> Body {
        match range.len() <= POOL_COPY_BYTES_MAX {
            true => Body::Copied(batch[range].to_vec()),
            false => Body::Held(Arc::clone(batch), range),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Body::Held(batch, range) => &batch[range.clone()],
            Body::Copied(bytes) => bytes,
        }
    }

    /// The batch, if it was held.
    pub fn into_batch(self) -> Option<Arc<Buf>> {
        match self {
            Body::Held(batch, _) => Some(batch),
            Body::Copied(_) => None,
        }
    }
}

/// A request to be executed off the shard.
pub struct Job {
    /// Turns are taken by this.
    pub owner: u64,
    /// With `tag`, names the request.
    pub session: u64,
    /// Executes it.
    pub fs: Arc<Fs>,
    /// The request's opcode.
    pub opcode: u32,
    /// Its body.
    pub body: Body,
    /// Where the reply goes.
    pub tag: RequestTag,
    /// For the body of a large reply, at [`BODY_AT`].
    pub own: Option<Buf>,
    /// By which of the session's connections it came.
    pub conn: u16,
    /// It runs again: its reply was lost.
    pub again: bool,
    /// Where what must be known before it runs is written.
    pub place: Option<IntentPlace>,
    /// A dead daemon began it.
    pub past: Option<PastOf>,
    /// The shard that waits.
    pub mailbox: Arc<Mailbox>,
    /// Since when it waits for a thread.
    pub queued: Instant,
    /// What it takes of the shard's time, besides its own.
    pub shard_ns: u32,
    /// Others keep away from its locks as long as this is there.
    pub long: Option<LongCall>,
}

/// What is known of a request that a dead daemon began.
pub struct PastOf {
    /// It was done, with this reply.
    pub done: Option<Vec<u8>>,
}

/// What became of a job.
pub struct Done {
    /// The job's.
    pub tag: RequestTag,
    /// The length of the reply's body.
    pub result: Result<usize, Errno>,
    /// The body, where the job had no buffer for it.
    pub small: Vec<u8>,
    /// The job's, with the body at [`BODY_AT`].
    pub own: Option<Buf>,
    /// A dead daemon had begun it: how that ended.
    pub outcome: Option<Outcome>,
    /// What finds the nodes again that the reply gives; see notes.rs.
    pub notes: Vec<u8>,
    /// The job's batch, so that its memory returns to the shard.
    pub batch: Option<Arc<Buf>>,
    /// How long it waited for a thread.
    pub waited_us: u32,
}

/// What waits for a thread.
enum Task {
    Request(Box<Job>),
    /// Files to close, nobody waits for it. What frees more blocks than so many is left to do.
    Release(Released, Option<Handle>, u64),
    /// That.
    Free(Released, Option<Handle>),
    /// Nodes to take in before they are used, nobody waits for it.
    Warm(Arc<Fs>, Vec<u64>),
}

struct Queue {
    jobs: Jobs<Task>,
    /// When the first one wakes of the threads that sleep until a job may begin which is not paid
    /// for yet.
    timed_at: Option<u64>,
    closed: bool,
}

/// The threads, started when the first job needs them.
pub struct Pool {
    queue: Mutex<Queue>,
    work: Condvar,
    threads: usize,
    /// Peers that compete for the CPUs.
    rivals: AtomicU64,
    /// Until when, in nanoseconds of [`now_ns`].
    rivals_until: AtomicU64,
    /// Where the threads may run: whoever starts one is itself bound to one CPU.
    cpus: Mutex<CpuSet>,
    cpu_count: AtomicU64,
    /// Its threads, as the kernel names them.
    tids: Mutex<Vec<Pid>>,
    handles: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

impl Pool {
    /// At most `threads` threads on `cpus`.
    pub fn new(threads: usize, cpus: CpuSet) -> Arc<Pool> {
        Arc::new(Pool {
            queue: Mutex::new(Queue {
                jobs: Jobs::new(threads.div_ceil(2)),
                timed_at: None,
                closed: false,
            }),
            work: Condvar::new(),
            threads: threads.max(2),
            rivals: AtomicU64::new(1),
            rivals_until: AtomicU64::new(0),
            cpu_count: AtomicU64::new(cpus.count().into()),
            cpus: Mutex::new(cpus),
            tids: Mutex::default(),
            handles: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Queues a job. How many wait is bounded by the sessions' slots.
    pub fn submit(self: &Arc<Self>, job: Job) {
        self.queue(job.owner, Task::Request(Box::new(job)));
    }

    /// Closes files that a peer has given back: before its other jobs, and whatever it owes, since
    /// their fds are missing to all. But what frees more blocks than `most` is a job like others.
    pub fn release(self: &Arc<Self>, owner: u64, released: Released, most: u64) {
        self.give_back(owner, (released, None), most);
    }

    /// As [`Pool::release`], and closes a handle.
    pub fn give_back(
        self: &Arc<Self>,
        owner: u64,
        (released, handle): (Released, Option<Handle>),
        most: u64,
    ) {
        if !released.is_empty() || handle.is_some() {
            self.queue(owner, Task::Release(released, handle, most));
        }
    }

    /// Closes files whose blocks are freed then.
    pub fn free(self: &Arc<Self>, owner: u64, dear: Released) {
        if !dear.is_empty() {
            self.queue(owner, Task::Free(dear, None));
        }
    }

    /// Takes in what a rebuilt session knows, a few nodes a turn: while any is cold, what changes
    /// names has to look for it.
    pub fn warm(self: &Arc<Self>, owner: u64, fs: Arc<Fs>) {
        let cold = fs.cold_nodes();
        if !cold.is_empty() {
            self.queue(owner, Task::Warm(fs, cold));
        }
    }

    fn queue(self: &Arc<Self>, owner: u64, task: Task) {
        let mut queue = self.lock();
        let may_begin = match task {
            Task::Release(..) => queue.jobs.push_return(owner, task),
            Task::Request(_) | Task::Free(..) | Task::Warm(..) => queue.jobs.push(owner, task),
        };
        let (running, waiting) = queue.jobs.load();
        drop(queue);
        if may_begin {
            self.work.notify_one();
        }
        self.grow(running + waiting);
    }

    fn grow(self: &Arc<Self>, busy: usize) {
        let mut handles = self.handles.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if handles.len() < self.threads && handles.len() < busy {
            let pool = self.clone();
            let name = format!("ringfs-pool-{}", handles.len());
            let body = move || {
                yield_to_shards();
                pool.run();
            };
            match std::thread::Builder::new().name(name).spawn(body) {
                Ok(handle) => handles.push(handle),
                Err(error) if handles.is_empty() => {
                    // Without any thread the job would wait for ever.
                    tracing::error!(%error, "no pool thread; the job runs on the shard");
                    drop(handles);
                    let next = self.lock().jobs.next(now_ns(), Pace::ALONE);
                    if let Next::Task(begun) = next {
                        let (task, bill) = begun.into_parts();
                        // What is left of it may be left: nobody waits.
                        let _ = execute(task);
                        self.lock().jobs.ended(bill, 0, now_ns(), Pace::ALONE);
                    }
                }
                Err(error) => tracing::warn!(%error, "cannot start another pool thread"),
            }
        }
    }

    /// Takes a request out that has not begun. A cancelled request is still answered: by the
    /// caller.
    pub fn cancel(&self, owner: u64, session: u64, tag: RequestTag) -> Option<Job> {
        let is_it = |task: &Task| match task {
            Task::Request(job) => {
                (job.session, job.tag.conn, job.tag.lane, job.tag.at)
                    == (session, tag.conn, tag.lane, tag.at)
            }
            Task::Release(..) | Task::Free(..) | Task::Warm(..) => false,
        };
        match self.lock().jobs.remove(owner, now_ns(), is_it) {
            Some(Task::Request(job)) => Some(*job),
            Some(Task::Release(..) | Task::Free(..) | Task::Warm(..)) | None => None,
        }
    }

    /// So many peers compete for the CPUs from now on, for a while.
    pub fn shared_by(&self, peers: usize, time: Duration) {
        self.rivals.store(peers as u64, Relaxed);
        self.rivals_until.store(now_ns() + time.as_nanos() as u64, Relaxed);
    }

    fn pace(&self) -> Pace {
        let peers = match self.rivals_until.load(Relaxed) {
            0 => 1,
            until if until <= now_ns() => 1,
            _ => self.rivals.load(Relaxed),
        };
        Pace { peers, cpus: self.cpu_count.load(Relaxed) }
    }

    fn run(self: &Arc<Self>) {
        {
            let cpus = self.cpus.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = sched_setaffinity(None, &cpus) {
                tracing::debug!(%error, "cannot let a pool thread run on all CPUs");
            }
            self.tids.lock().unwrap_or_else(PoisonError::into_inner).push(gettid());
        }
        let mut cpu_before = cpu_ns();
        while let Some(begun) = self.wait_for_job() {
            let owner = begun.owner;
            let (task, bill) = begun.into_parts();
            let shard_ns = match &task {
                Task::Request(job) => job.shard_ns.into(),
                Task::Release(..) | Task::Free(..) | Task::Warm(..) => 0,
            };
            let rest = execute(task);
            // With what it took to wake up for it.
            let cpu = cpu_ns();
            let mut queue = self.lock();
            queue.jobs.ended(bill, cpu - cpu_before + shard_ns, now_ns(), self.pace());
            cpu_before = cpu;
            let closed = queue.closed;
            drop(queue);
            if let Some(rest) = rest.filter(|_| !closed) {
                self.queue(owner, rest);
            }
        }
    }

    /// `None`: it is over, and nothing is left to do.
    fn wait_for_job(&self) -> Option<Begun<Task>> {
        let mut queue = self.lock();
        let mut has_slept = false;
        loop {
            // What is closed has no time to wait until it is paid for.
            let pace = if queue.closed { Pace::ALONE } else { self.pace() };
            let now = now_ns();
            match queue.jobs.next(now, pace) {
                Next::Task(begun) => {
                    // There may be more for those who sleep, or to wait for.
                    if has_slept && queue.jobs.load().1 > 0 {
                        self.work.notify_one();
                    }
                    return Some(begun);
                }
                // One thread is enough to wait for that, and for the end of the competition.
                Next::At(at) if queue.timed_at.is_none_or(|timed_at| at < timed_at) => {
                    let at = at.min(self.rivals_until.load(Relaxed)).max(now);
                    queue.timed_at = Some(at);
                    let waited = self.work.wait_timeout(queue, Duration::from_nanos(at - now));
                    queue = waited.unwrap_or_else(PoisonError::into_inner).0;
                    queue.timed_at = queue.timed_at.filter(|&timed_at| timed_at != at);
                }
                Next::Nothing if queue.closed => return None,
                Next::At(_) | Next::Nothing => {
                    queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
            }
            has_slept = true;
        }
    }

    /// The threads run there from now on.
    pub fn move_to(&self, cpus: CpuSet) {
        let mut now = self.cpus.lock().unwrap_or_else(PoisonError::into_inner);
        *now = cpus;
        self.cpu_count.store(cpus.count().into(), Relaxed);
        for &tid in &*self.tids.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = sched_setaffinity(Some(tid), &now);
        }
    }

    /// Threads, jobs that run, and jobs that wait.
    pub fn load(&self) -> (usize, usize, usize) {
        let threads = self.handles.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).len();
        let (running, waiting) = self.lock().jobs.load();
        (threads, running, waiting)
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

/// What is left to do of it.
fn execute(task: Task) -> Option<Task> {
    match task {
        Task::Request(job) => execute_request(*job),
        Task::Release(mut released, handle, most) => {
            let dear = released.take_dear(most);
            let (handle, dear_handle) = match handle {
                Some(handle) if handle.blocks_freed() > most => (None, Some(handle)),
                other => (other, None),
            };
            drop((released, handle));
            if !dear.is_empty() || dear_handle.is_some() {
                return Some(Task::Free(dear, dear_handle));
            }
        }
        Task::Free(released, handle) => drop((released, handle)),
        Task::Warm(fs, mut cold) => {
            // A session that has ended is not kept for it.
            if Arc::strong_count(&fs) > 1 && fs.warm(&mut cold, WARMED_A_TURN_MAX) {
                return Some(Task::Warm(fs, cold));
            }
        }
    }
    None
}

fn execute_request(job: Job) {
    let Job {
        fs,
        opcode,
        body,
        tag,
        mut own,
        conn,
        again,
        place,
        past,
        mailbox,
        queued,
        shard_ns: _,
        long,
        owner: _,
        session: _,
    } = job;
    let waited_us = u32::try_from(queued.elapsed().as_micros()).unwrap_or(u32::MAX);
    let mut outcome = None;
    let mut small = Vec::new();
    let notes = Notes::of_pool();
    notes.begin(conn, again);
    let result = match Request::parse(opcode, body.bytes()) {
        Some(request) => {
            let out = match &mut own {
                Some(buf) => &mut buf[BODY_AT..],
                None => {
                    small.resize(fs.reply_bytes_max(&request), 0);
                    &mut small[..]
                }
            };
            let request = request.noting(&notes);
            match (past, &place) {
                (Some(past), Some(place)) => {
                    let past = past.done.as_deref().map_or(Past::Running, Past::Done);
                    let (how, result) = fs.recover(&request, past, place, out);
                    outcome = Some(how);
                    result
                }
                (None | Some(_), place) => {
                    let intent = place.as_ref().and_then(|_| fs.intent(&request));
                    if let (Some(place), Some(intent)) = (place, intent) {
                        place.write(&intent);
                    }
                    fs.execute(&request, out)
                }
            }
        }
        None => Err(Errno::INVAL),
    };
    drop(long);
    mailbox.post(Mail::Done(Done {
        tag,
        result,
        small,
        own,
        outcome,
        notes: notes.into_body(),
        batch: body.into_batch(),
        waited_us,
    }));
}

/// The CPU time that this thread has used.
fn cpu_ns() -> u64 {
    let used = clock_gettime(ClockId::ThreadCPUTime);
    used.tv_sec as u64 * 1_000_000_000 + used.tv_nsec as u64
}

/// Long calls of one guest must not keep the shard of their CPU from others: it runs when it wakes,
/// and has more of a CPU that is short.
fn yield_to_shards() {
    let nice = rustix::process::getpriority_process(None).map(|now| now + POOL_NICE);
    // Where it is forbidden, all have the same.
    if let Err(error) = nice.and_then(|nice| rustix::process::setpriority_process(None, nice)) {
        tracing::debug!(%error, "pool threads are as important as shards");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fds::Fds;
    use crate::fs::FsOptions;
    use ringfs_wire::abi::{EntryOut, Opcode};
    use zerocopy::FromBytes;

    /// As a guest has them that spoils its pool time with dear calls.
    #[test]
    fn what_a_debtor_gives_back_is_closed_at_once() {
        const MINUTES: u64 = 600_000_000_000;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let names = ["file", "gone"];
        for name in names {
            std::fs::write(dir.path().join(name), "x").expect("a file");
        }
        let fds = Fds::new(64);
        let options = FsOptions { fds: Arc::clone(&fds), ..FsOptions::default() };
        let fs = Arc::new(Fs::new(dir.path(), options).expect("a session"));
        let root = fds.used();
        let nodes = names.map(|name| {
            let lookup = [&1u64.to_le_bytes()[..], &[0; 16], name.as_bytes(), b"\0"].concat();
            let request = Request::parse(Opcode::Lookup as u32, &lookup).expect("a request");
            let mut reply = [0; 256];
            fs.execute(&request, &mut reply).expect("a reply");
            EntryOut::read_from_prefix(&reply).expect("an entry").0.nodeid
        });
        std::fs::remove_file(dir.path().join("gone")).expect("rm");

        let pool = Pool::new(2, rustix::thread::sched_getaffinity(None).expect("CPUs"));
        pool.shared_by(2, Duration::from_nanos(MINUTES));
        let mut queue = pool.lock();
        queue.jobs.push(1, Task::Warm(Arc::clone(&fs), Vec::new()));
        let Next::Task(begun) = queue.jobs.next(now_ns(), pool.pace()) else { panic!("a job") };
        queue.jobs.ended(begun.into_parts().1, MINUTES, now_ns(), pool.pace());
        drop(queue);

        assert_eq!(fds.used(), root + 2);
        pool.release(1, fs.forget_later(nodes.map(|node| (node, 1)).into_iter()), 0);
        let start = Instant::now();
        while fds.used() > root + 1 || pool.load() != (1, 0, 1) {
            assert!(start.elapsed() < Duration::from_secs(20), "it waits until all is paid for");
            std::thread::sleep(Duration::from_millis(1));
        }
        // What frees blocks is a dear call, and waits like others.
        let waits = pool.lock().jobs.next(now_ns(), pool.pace());
        assert!(matches!(waits, Next::At(at) if at > now_ns()), "{:?}", pool.load());
        pool.close();
        assert_eq!(fds.used(), root);
    }
}
