//! One run: a daemon behind the proxy, mounts of it with work on them, and who kills and hurries
//! meanwhile.
//!
//! Invariant: the proxy harms nothing while there is no work, so that a mount and its unmount go
//! well; after a run without kills and errors the daemon holds what it held before.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Pid;

use super::checker::{self, Account};
use super::proxy::Proxy;
use super::schedule::Schedule;
use super::{Args, Engine, MORE_TIMES, Work};
use crate::e2e::load;
use crate::guard;
use crate::paths::{self, Bins};
use crate::rig::{self, Asker, Daemon, Mount};
use crate::sandbox::Sandbox;
use crate::{fsx, mounts};

const PROGRESS: Duration = Duration::from_secs(5);
/// A connection that is missing for so long is asked for.
const HURRY: Duration = Duration::from_millis(40);
/// Daemons that are made ready to take over from a killed one.
const SPARES_MAX: u64 = 1000;
const FSX_OPS: u64 = 2000;
/// Times between kills of the client, in twelfths: some come while the next one begins.
const CLIENT_KILLS: [u32; 4] = [12, 1, 20, 3];

/// A daemon with a proxy before it.
pub(super) struct Run<'a> {
    args: &'a Args,
    pub(super) seed: u64,
    sandbox: &'a Sandbox,
    backing: &'a Path,
    daemon: Mutex<Daemon>,
    start: rig::Counters,
    pub(super) proxy: Proxy,
    begun: Instant,
    client_kills: AtomicU64,
    pub(super) stalls: AtomicU64,
    spliced: AtomicU64,
}

fn lock(daemon: &Mutex<Daemon>) -> MutexGuard<'_, Daemon> {
    daemon.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl<'a> Run<'a> {
    pub(super) fn start(
        args: &'a Args,
        seed: u64,
        sandbox: &'a Sandbox,
        backing: &'a Path,
        bins: &Bins,
    ) -> Result<Self> {
        let mut extra: Vec<&str> = args.daemon_args.split_whitespace().collect();
        if args.engine == Engine::Threads {
            extra.push("--engine=threads");
        }
        let state = sandbox.path("state").display().to_string();
        if !extra.iter().any(|arg| arg.starts_with("--state-dir")) {
            extra.extend(["--state-dir", &state]);
        }
        let mut daemon = Daemon::start(sandbox, bins, "d", &[rig::share("x", backing)], &extra)?;
        if let Some(ms) = args.kill_every {
            let kills = args.seconds.saturating_mul(4000) / ms.max(1);
            daemon.make_spares(kills.clamp(8, SPARES_MAX) as u32)?;
        }
        let start = daemon.counters_at_rest()?;
        let schedule =
            Schedule { seed, gap_max: args.gap, calm: args.calm, unchecked: args.unchecked };
        let log = File::create(sandbox.path("decisions.log"))?;
        let proxy = Proxy::start(&sandbox.path("p.sock"), &daemon.socket, schedule, log)?;
        let (daemon, begun) = (Mutex::new(daemon), Instant::now());
        Ok(Self {
            args,
            seed,
            sandbox,
            backing,
            daemon,
            start,
            proxy,
            begun,
            client_kills: AtomicU64::new(0),
            stalls: AtomicU64::new(0),
            spliced: AtomicU64::new(0),
        })
    }

    /// All work that is asked for, with progress lines and kills beside it.
    pub(super) fn all(&self, account: &Account) -> Result<()> {
        let (done, progress_over) = mpsc::channel::<()>();
        let (done_too, kills_over) = mpsc::channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || self.progress(&progress_over, account));
            if let Some(ms) = self.args.kill_every {
                let every = Duration::from_millis(ms);
                scope.spawn(move || self.kill(&kills_over, every, account));
            }
            let result = self.each(account);
            drop((done, done_too));
            result
        })
    }

    fn progress(&self, over: &mpsc::Receiver<()>, account: &Account) {
        while over.recv_timeout(PROGRESS) == Err(mpsc::RecvTimeoutError::Timeout) {
            let (tally, count) =
                (self.proxy.tally(), |n: &std::sync::atomic::AtomicU64| n.load(Relaxed));
            println!(
                "faults: {:.0?}: {} operations, {} cuts, {} connections, {} records, {} errors",
                self.begun.elapsed(),
                count(&account.ops),
                tally.cuts(),
                count(&tally.conns),
                count(&tally.records),
                count(&account.count)
            );
        }
    }

    fn kill(&self, over: &mpsc::Receiver<()>, every: Duration, account: &Account) {
        while over.recv_timeout(every) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _quiet = account.quiet();
            // Counted before, so that no error of it comes too early to be allowed.
            let kills = account.kills.fetch_add(1, Relaxed) + 1;
            self.proxy.note(&format!("kill {kills} of the daemon"));
            if let Err(error) = lock(&self.daemon).kill_and_start_again() {
                account.problem(format!("the daemon after kill {kills}: {error:#}"));
                // Nobody will answer what waits for it.
                return guard::abort_mounts();
            }
        }
    }

    fn each(&self, account: &Account) -> Result<()> {
        let work = self.args.work;
        let time = Duration::from_secs(self.args.seconds) / 2;
        if matches!(work, Work::Checker | Work::All) {
            for (n, cache) in ["cache=never", "cache=auto"].into_iter().enumerate() {
                let share = self.args.cuts * (n as u64 + 1) / 2;
                self.mounted(cache, account, |mount, name| {
                    let place = (&*mount.dir, self.backing, name);
                    let begun = Instant::now();
                    let more = || {
                        !self.args.calm
                            && self.proxy.tally().cuts() < share
                            && begun.elapsed() < time * MORE_TIMES
                    };
                    let seed = self.seed + n as u64;
                    checker::run(place, seed, self.args.threads, time, more, account)
                })?;
            }
        }
        if matches!(work, Work::Fsx | Work::All) {
            for cache in ["cache=auto", "cache=never"] {
                self.mounted(cache, account, |mount, _| {
                    fsx::exercise(self.sandbox, &mount.dir, cache, self.seed, FSX_OPS)
                })?;
            }
        }
        if matches!(work, Work::Fio | Work::All) {
            self.mounted("cache=auto", account, |mount, _| {
                let small = ["--bs=4k", "--ioengine=psync", "--numjobs=4", "--size=4m"];
                load::fio(&mount.dir, "small", &small)?;
                let mixed = ["--bsrange=512-1m", "--ioengine=libaio", "--iodepth=16", "--size=16m"];
                load::fio(&mount.dir, "mixed", &mixed)
            })?;
        }
        if matches!(work, Work::Large | Work::All) {
            self.mounted("cache=auto", account, |mount, _| {
                let large = ["--bsrange=64k-256k", "--direct=1", "--ioengine=libaio"];
                load::fio(&mount.dir, "large", &[&large[..], &["--iodepth=4"]].concat())
            })?;
        }
        Ok(())
    }

    /// Does `work` on a mount whose connections are harmed meanwhile, then unmounts in peace.
    fn mounted(
        &self,
        cache: &str,
        account: &Account,
        work: impl FnOnce(&Mount, &str) -> Result<()>,
    ) -> Result<()> {
        let name = format!("m{}-{cache}", self.proxy.tally().conns.load(Relaxed));
        let dir = self.sandbox.make_dir(&name)?;
        let checksum = if self.args.unchecked { "off" } else { "on" };
        let mut options = format!("{cache},checksum={checksum}");
        if !self.args.options.is_empty() {
            options += &format!(",{}", self.args.options);
        }
        self.proxy.note(&format!("mount -o {options}"));
        let log = self.sandbox.path(&format!("{name}.log"));
        let through = &self.proxy.socket;
        let mount = lock(&self.daemon).mount_through(through, "x", &dir, &options, &log)?;
        let asker = mount.asker(self.sandbox, &name)?;
        self.proxy.arm(true);
        let before = account.count.load(Relaxed);
        let result = thread::scope(|scope| {
            let (done, over) = mpsc::channel::<()>();
            scope.spawn(move || self.hurry(asker, &over));
            let (_done_too, kills_over) = mpsc::channel::<()>();
            if let Some(ms) = self.args.kill_client_every {
                let (every, dir) = (Duration::from_millis(ms), &mount.dir);
                scope.spawn(move || self.kill_clients(&kills_over, every, dir, account));
            }
            let (done_as_well, stalls_over) = mpsc::channel::<()>();
            if let Some(ms) = self.args.stall_every {
                let (every, dir) = (Duration::from_millis(ms), &mount.dir);
                scope.spawn(move || self.stall(&stalls_over, every, dir, account));
            }
            let result = work(&mount, &name);
            drop((done, done_as_well));
            result
        });
        self.proxy.arm(false);
        let gone = mounts::at(&dir)?.is_empty();
        let result = result.with_context(|| format!("under {options}"));
        if gone {
            let why = result.err().map(|error| format!(": {error:#}")).unwrap_or_default();
            bail!("the mount has ended{why}");
        }
        result?;
        if self.args.unchecked {
            self.spliced.fetch_add(mount.told()?.replies_spliced, Relaxed);
        }
        mount.umount().context("after the faults")?;
        if self.args.kill_every.is_none() && account.count.load(Relaxed) == before {
            lock(&self.daemon).assert_back_at(&self.start)?;
        }
        Ok(())
    }

    /// The daemon's processes: the parent, and its workers.
    pub(super) fn daemon_pids(&self) -> Result<(Pid, Vec<Pid>)> {
        lock(&self.daemon).pids()
    }

    /// Kills whoever serves the mount, also soon after it was killed.
    fn kill_clients(
        &self,
        over: &mpsc::Receiver<()>,
        every: Duration,
        dir: &Path,
        account: &Account,
    ) {
        let delays = CLIENT_KILLS.iter().cycle().map(|twelfths| every * *twelfths / 12);
        for delay in delays {
            if over.recv_timeout(delay) != Err(mpsc::RecvTimeoutError::Timeout) {
                return;
            }
            match rig::kill_client_of(dir) {
                // The next one is not there yet.
                Ok(false) => {}
                Ok(true) => {
                    let kills = self.client_kills.fetch_add(1, Relaxed) + 1;
                    self.proxy.note(&format!("kill {kills} of the client"));
                }
                Err(error) => {
                    account.problem(format!("no client is killed: {error:#}"));
                    return;
                }
            }
        }
    }

    /// A guest that is cut often waits for up to 0.3 s before it comes again; one that is told to
    /// comes at once, and so there is more to see.
    fn hurry(&self, mut asker: Asker, over: &mpsc::Receiver<()>) {
        let all = self.proxy.live();
        self.proxy.note(&format!("{all} connections"));
        let mut missing = false;
        while over.recv_timeout(HURRY) == Err(mpsc::RecvTimeoutError::Timeout) {
            let was_missing = std::mem::replace(&mut missing, self.proxy.live() < all);
            if was_missing && missing {
                self.proxy.note("ringfs reconnect");
            }
            if was_missing
                && missing
                && let Err(error) = asker.reconnect()
            {
                return self.proxy.note(&format!("ringfs reconnect: {error:#}"));
            }
        }
    }

    /// Replies that the clients have spliced.
    pub(super) fn spliced(&self) -> u64 {
        self.spliced.load(Relaxed)
    }

    /// The closing line, with what the daemon counted.
    pub(super) fn close(&self, account: &Account) -> Result<String> {
        let (tally, kills) = (self.proxy.tally(), account.kills.load(Relaxed));
        println!("faults: by kind: {}", tally.by_kind());
        println!(
            "faults: {} connections ({} found no daemon), {} faults at handshakes, {} benign, \
             {} silent ends closed, {} batches, {} records, the slowest operation {} ms",
            tally.conns.load(Relaxed),
            tally.refused.load(Relaxed),
            tally.handshakes.load(Relaxed),
            tally.benign.load(Relaxed),
            tally.silent_closed.load(Relaxed),
            tally.batches.load(Relaxed),
            tally.records.load(Relaxed),
            account.slowest_ms.load(Relaxed)
        );
        let counters = lock(&self.daemon).counters()?;
        const WORDS: [&str; 6] = ["resum", "rebuil", "kept", "clone", "detach", "abandon"];
        let told =
            counters.others.iter().filter(|(name, _)| WORDS.iter().any(|w| name.contains(w)));
        let told: Vec<String> = told.map(|(name, n)| format!("{name} {n}")).collect();
        println!(
            "faults: the daemon counts {told:?} and protocol_errors {:?}",
            counters.others.get("protocol_errors")
        );
        let mut closing =
            format!("{} operations, {} cuts", account.ops.load(Relaxed), tally.cuts());
        let client_kills = self.client_kills.load(Relaxed);
        if client_kills > 0 {
            closing += &format!(", {client_kills} kills of the client");
        }
        let stalls = self.stalls.load(Relaxed);
        if stalls > 0 {
            closing += &format!(", {stalls} stalls");
        }
        if self.args.unchecked {
            closing += &format!(", {} replies spliced", self.spliced());
        }
        if kills > 0 {
            let tolerated = account.tolerated.load(Relaxed);
            closing += &format!(", {kills} kills with {tolerated} allowed errors");
        }
        Ok(closing)
    }

    /// Copies the logs to where they outlive the run.
    pub(super) fn keep_logs(&self) -> PathBuf {
        let dir = paths::target().join("faults").join(format!("seed-{}", self.seed));
        self.sandbox.keep_logs(&dir);
        dir
    }
}
