//! What serves guests: the greeter's thread, a thread and a ring a CPU, and the pool.

use crate::accept::Accepted;
use crate::cgroup::Placement;
use crate::config::Engine;
use crate::control;
use crate::daemon::DaemonError;
use crate::greet::Greeter;
use crate::limits::{CPUS_LOOKED_AT_MS, POOL_THREADS_MAX, VISITORS_MAX};
use crate::mailbox::{Mail, Mailbox};
use crate::metrics::ShareTotals;
use crate::pool::Pool;
use crate::prometheus;
use crate::registry::Registry;
use crate::ring::{Ring, UringRing};
use crate::ring_threads::ThreadRing;
use crate::shard::{Shard, Shared};
use crate::shares::{Share, Shares};
use crate::state_dir::StateDir;
use crate::stats::{ShardStats, Totals};
use crate::status::{ConfigState, ShareStatus, Status};
use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{Pid, gettid, sched_setaffinity};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The running threads.
pub struct Worker {
    registry: Arc<Registry>,
    pool: Arc<Pool>,
    shards: Vec<ShardThread>,
    greeter: JoinHandle<()>,
    reaper: JoinHandle<()>,
    accepted: mpsc::Sender<Accepted>,
    bell: Arc<OwnedFd>,
    shares: Arc<Shares>,
    counters: Counters,
    visitors: [Visitors; 2],
    /// Closing it ends the thread.
    keeper: (mpsc::Sender<()>, JoinHandle<()>),
}

/// Whoever asks for something that is told; answered one after the other.
struct Visitors {
    come: SyncSender<OwnedFd>,
    teller: JoinHandle<()>,
}

impl Visitors {
    fn start(
        name: &str,
        counters: &Counters,
        serve: fn(OwnedFd, &Counters),
    ) -> std::io::Result<Visitors> {
        let (come, asking) = mpsc::sync_channel::<OwnedFd>(VISITORS_MAX);
        let counters = counters.clone();
        let thread = std::thread::Builder::new().name(name.into());
        let teller = thread.spawn(move || asking.iter().for_each(|one| serve(one, &counters)))?;
        Ok(Visitors { come, teller })
    }
}

struct ShardThread {
    tid: Pid,
    mailbox: Arc<Mailbox>,
    stats: Arc<ShardStats>,
    thread: JoinHandle<()>,
}

/// What can be asked of a worker while it runs.
#[derive(Clone)]
pub struct Counters {
    registry: Arc<Registry>,
    pool: Arc<Pool>,
    stats: Vec<Arc<ShardStats>>,
    shares: Arc<Shares>,
    cpus: Arc<Mutex<Vec<usize>>>,
    large_buffers: usize,
    since: Instant,
    config: Arc<Mutex<ConfigState>>,
}

impl Counters {
    /// The sums over everything.
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::of_shards(self.stats.iter().map(|stats| &**stats));
        totals.numbers.splice(0..0, self.registry.totals());
        let (threads, running, waiting) = self.pool.load();
        let pool =
            [("pool_threads", threads), ("pool_running", running), ("pool_waiting", waiting)];
        totals.numbers.extend(pool.map(|(name, n)| (name, n as u64)));
        totals.numbers.insert(0, ("fds", open_fds()));
        totals
    }

    /// Has the connections of a session joined anew: how many; `None`: there is no such session.
    pub fn reconnect(&self, session: u64) -> Option<u32> {
        self.registry.reconnect(session)
    }

    /// All that is told to people.
    pub fn status(&self) -> Status {
        let sessions = self.registry.status();
        let mut shares: Vec<ShareStatus> = self.shares.all().iter().map(|s| s.status()).collect();
        for session in &sessions {
            match shares.iter_mut().find(|share| share.name == session.share) {
                Some(share) => share.sessions += 1,
                None => shares.push(ShareStatus {
                    name: session.share.clone(),
                    removed: true,
                    sessions: 1,
                    ..Default::default()
                }),
            }
        }
        for share in &mut shares {
            let Some(totals) = self.share(&share.name) else { continue };
            (share.bytes_read, share.bytes_written) = (totals.bytes_read, totals.bytes_written);
            share.errors = totals.errors.iter().map(|(_, times)| times).sum();
            (share.slow, share.operations) = (totals.slow, totals.operations);
        }
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: config.pid,
            up_s: self.since.elapsed().as_secs(),
            shards: self.stats.len(),
            cpus: self.cpus.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            large_buffers: self.large_buffers,
            fds: open_fds(),
            fds_max: getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX),
            config,
            shares,
            sessions,
            slow: self.registry.metrics.recent_slow(),
        }
    }

    /// What was counted of a share, if anything.
    pub fn share(&self, name: &str) -> Option<ShareTotals> {
        self.registry.metrics.totals(name)
    }
}

fn open_fds() -> u64 {
    std::fs::read_dir("/proc/self/fd").map_or(0, |dir| dir.count() as u64)
}

impl Worker {
    /// Starts the shards; fails if one of them cannot have its ring.
    pub fn start(
        shares: Vec<Share>,
        placement: Placement,
        engine: Engine,
        spin: u32,
        grace: Duration,
        state: Option<StateDir>,
    ) -> Result<Worker, DaemonError> {
        let registry = Arc::new(Registry::new(grace, state));
        let threads = (placement.shards * 4).min(POOL_THREADS_MAX);
        let pool = Pool::new(threads, placement.mask());
        let mut shards = Vec::new();
        for index in 0..placement.shards {
            shards.push(start_shard((index, &placement), engine, spin, &registry, &pool)?);
        }
        registry.set_shards(shards.iter().map(|shard| shard.mailbox.clone()).collect());
        let known = Arc::new(Shares::default());
        shares.into_iter().for_each(|share| known.put(share));
        let greeter = Arc::new(Greeter { shares: known.clone(), registry: registry.clone() });
        let counters = Counters {
            registry: registry.clone(),
            pool: pool.clone(),
            stats: shards.iter().map(|shard| shard.stats.clone()).collect(),
            shares: known.clone(),
            cpus: Arc::new(Mutex::new(placement.cpus.clone())),
            large_buffers: placement.large_buffers,
            since: Instant::now(),
            config: Arc::default(),
        };
        let visitors = [
            Visitors::start("ringfs-control", &counters, control::serve)?,
            Visitors::start("ringfs-metrics", &counters, prometheus::serve)?,
        ];
        let keeper = keep_placed(placement, &shards, &pool, counters.cpus.clone())?;
        let (accepted, incoming) = mpsc::channel();
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let greeter = {
            let bell = bell.clone();
            let thread = std::thread::Builder::new().name("ringfs-greet".into());
            thread.spawn(move || greeter.run(&incoming, &bell))?
        };
        let reaper = {
            let registry = registry.clone();
            let thread = std::thread::Builder::new().name("ringfs-reap".into());
            thread.spawn(move || registry.reap())?
        };
        let shares = known;
        Ok(Worker {
            registry,
            pool,
            shards,
            greeter,
            reaper,
            accepted,
            bell,
            shares,
            counters,
            visitors,
            keeper,
        })
    }

    /// Takes a connection in.
    pub fn greet(&self, accepted: Accepted) {
        if self.accepted.send(accepted).is_ok() {
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }

    /// Answers somebody on the control socket. Where too many wait already he is cut off.
    pub fn control(&self, socket: OwnedFd) {
        let _ = self.visitors[0].come.try_send(socket);
    }

    /// Answers somebody who wants metrics.
    pub fn metrics(&self, socket: OwnedFd) {
        let _ = self.visitors[1].come.try_send(socket);
    }

    /// A share is new, or is served in another way from the next mount on.
    pub fn put_share(&self, share: Share) {
        self.shares.put(share);
    }

    /// A share that is to be served and cannot be now: who has it waits.
    pub fn set_away(&self, name: &str) {
        self.shares.set_away(name);
    }

    /// Nobody mounts it any more; with `ends_sessions` those who have it lose it.
    pub fn remove_share(&self, name: &str, ends_sessions: bool) {
        self.shares.remove(name);
        if ends_sessions {
            self.registry.end_share(name);
        }
        let shares = self.shares.all();
        self.registry.metrics.sweep(|name: &str| shares.iter().any(|share| share.name == name));
    }

    /// From which time on a request is slow; 0: none is.
    pub fn set_slow(&self, from: Duration) {
        self.registry.metrics.set_slow(from);
    }

    /// What the parent says is in force.
    pub fn set_config(&self, state: ConfigState) {
        *self.counters.config.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// What can be told.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Says goodbye to all guests and ends the threads.
    pub fn stop(self) {
        let Worker { registry, pool, shards, greeter, reaper, accepted, bell, visitors, .. } = self;
        let (stop, keeper) = self.keeper;
        drop(stop);
        let _ = keeper.join();
        registry.stop();
        let _ = reaper.join();
        drop(accepted);
        let _ = rustix::io::write(&bell, &1u64.to_ne_bytes());
        let _ = greeter.join();
        shards.iter().for_each(|shard| shard.mailbox.post(Mail::Shutdown));
        for shard in shards {
            let _ = shard.thread.join();
        }
        pool.close();
        for Visitors { come, teller } in visitors {
            drop(come);
            let _ = teller.join();
        }
    }
}

/// Looks now and then whether the daemon may use other CPUs, and moves its threads there.
fn keep_placed(
    mut placement: Placement,
    shards: &[ShardThread],
    pool: &Arc<Pool>,
    told: Arc<Mutex<Vec<usize>>>,
) -> std::io::Result<(mpsc::Sender<()>, JoinHandle<()>)> {
    let tids: Vec<Pid> = shards.iter().map(|shard| shard.tid).collect();
    let pool = pool.clone();
    let (stop, stopped) = mpsc::channel::<()>();
    let often = Duration::from_millis(CPUS_LOOKED_AT_MS);
    let thread = std::thread::Builder::new().name("ringfs-cpus".into());
    let thread = thread.spawn(move || {
        // This thread is bound to nothing, so its mask is that of the control group.
        while stopped.recv_timeout(often) == Err(RecvTimeoutError::Timeout) {
            if !placement.look() {
                continue;
            }
            tracing::info!(cpus = ?placement.cpus, "other CPUs from now on");
            for (shard, &tid) in tids.iter().enumerate() {
                if let Err(error) = sched_setaffinity(Some(tid), &placement.mask_of(shard)) {
                    tracing::warn!(shard, %error, "cannot move a shard");
                }
            }
            pool.move_to(placement.mask());
            *told.lock().unwrap_or_else(PoisonError::into_inner) = placement.cpus.clone();
        }
    })?;
    Ok((stop, thread))
}

fn start_shard(
    (index, placement): (usize, &Placement),
    engine: Engine,
    spin: u32,
    registry: &Arc<Registry>,
    pool: &Arc<Pool>,
) -> Result<ShardThread, DaemonError> {
    let mailbox = Mailbox::new()?;
    let stats = Arc::new(ShardStats::default());
    let shared = Shared {
        registry: registry.clone(),
        pool: pool.clone(),
        mailbox: mailbox.clone(),
        stats: stats.clone(),
        index,
        large_buffers: placement.large_buffers,
    };
    let (ready, started) = mpsc::channel();
    let (tell, told) = mpsc::channel();
    let mask = placement.mask_of(index);
    let body = move || {
        if let Err(error) = sched_setaffinity(None, &mask) {
            tracing::warn!(index, %error, "cannot pin a shard to its CPU");
        }
        let _ = tell.send(gettid());
        // A ring belongs to the thread that made it.
        match engine {
            Engine::Uring => serve(UringRing::new(), &ready, shared, spin),
            Engine::Threads => serve(ThreadRing::new(), &ready, shared, spin),
        }
    };
    let thread = std::thread::Builder::new().name(format!("ringfs-shard-{index}")).spawn(body)?;
    let gone = || DaemonError::Start(std::io::ErrorKind::BrokenPipe.into());
    let tid = told.recv().map_err(|_| gone())?;
    match started.recv() {
        Ok(Ok(())) => Ok(ShardThread { tid, mailbox, stats, thread }),
        Ok(Err(error)) if engine == Engine::Uring => Err(DaemonError::Uring(error)),
        Ok(Err(error)) => Err(DaemonError::Start(error)),
        Err(_) => Err(gone()),
    }
}

fn serve<R: Ring>(
    ring: std::io::Result<R>,
    ready: &mpsc::Sender<std::io::Result<()>>,
    shared: Shared,
    spin: u32,
) {
    let shard = shared.index;
    let ring = match ring {
        Ok(ring) => ring,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let _ = ready.send(Ok(()));
    if let Err(error) = Shard::new(ring, shared, spin).run() {
        tracing::error!(shard, %error, "a shard has failed; its guests are cut off");
        std::process::exit(1);
    }
}
