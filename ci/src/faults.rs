//! `cargo xtask faults`: a guest and a daemon whose connections are cut, silenced and garbled.
//!
//! Invariant: nothing may be lost, doubled, torn or failed, whatever the proxy does, as long as the
//! daemon lives. A run is told by its seed: the proxy's decisions and each thread's operations
//! follow from it, and both ends' logs with the list of decisions are kept in `target/faults`.

mod checker;
mod link;
mod model;
mod op;
pub mod proxy;
mod pump;
mod real;
pub mod rng;
pub mod schedule;
mod shared;
mod workload;
mod world;

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::e2e::load;
use crate::fsx;
use crate::guard::{self, Guard};
use crate::paths::{self, Bins};
use crate::rig::{self, Asker, Daemon, Mount};
use crate::sandbox::{LoopFs, LoopShape, Sandbox};
use crate::{deps, mounts};

use checker::Account;
use proxy::Proxy;
use schedule::Schedule;

const IMAGE_BYTES: u64 = 1 << 30;
const PROGRESS: Duration = Duration::from_secs(5);
/// A connection that is missing for so long is asked for.
const HURRY: Duration = Duration::from_millis(40);
/// Daemons that are made ready to take over from a killed one.
const SPARES_MAX: u64 = 1000;
/// What a run may take beyond its seconds: fsx and fio end when they are done.
const SLACK: Duration = Duration::from_secs(300);
/// Too few cuts after the seconds: the threads go on, at most as many times as long.
const MORE_TIMES: u32 = 4;
/// The seed of CI's first run; the second one's is random.
const CI_SEED: u64 = 1;
const FSX_OPS: u64 = 2000;
/// Times between kills of the client, in twelfths: some come while the next one begins.
const CLIENT_KILLS: [u32; 4] = [12, 1, 20, 3];

/// Which work is done under the faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Work {
    /// Threads that know what each of their operations must give
    Checker,
    /// The file system exerciser
    Fsx,
    /// Random writes with verification
    Fio,
    /// One after the other
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Engine {
    Uring,
    Threads,
}

/// What `cargo xtask faults` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Of the decisions and the operations; random, and printed, if not given
    #[arg(long)]
    seed: Option<u64>,
    /// At least so many cuts must be made
    #[arg(long, default_value_t = 100)]
    cuts: u64,
    /// How long the checker works
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// What is done meanwhile
    #[arg(long, value_enum, default_value = "all")]
    work: Work,
    /// The daemon's engine
    #[arg(long, value_enum, default_value = "uring")]
    engine: Engine,
    /// Mount with FUSE-over-io_uring
    #[arg(long)]
    rings: bool,
    /// Kill the daemon that often, in milliseconds, and start it again
    #[arg(long, value_name = "MS")]
    kill_every: Option<u64>,
    /// Kill the client that often, in milliseconds: another one takes the mount over
    #[arg(long, value_name = "MS")]
    kill_client_every: Option<u64>,
    /// Threads of the checker
    #[arg(long, default_value_t = 6)]
    threads: u64,
    /// At most so many records between two faults of a direction of a connection
    #[arg(long, default_value_t = 2000)]
    gap: u64,
    /// Delays and writes in pieces alone: no end may notice anything
    #[arg(long)]
    calm: bool,
    /// The checker on the bare directory, to see what it says itself
    #[arg(long)]
    bare: bool,
    /// What CI runs, whatever else is given: a fixed seed, then a random one
    #[arg(long)]
    short: bool,
    /// More mount options
    #[arg(long, default_value = "")]
    options: String,
    /// More arguments for ringfsd
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    daemon_args: String,
}

impl Args {
    fn short() -> Self {
        Self {
            seed: None,
            cuts: 50,
            seconds: 12,
            work: Work::Checker,
            engine: Engine::Uring,
            rings: false,
            kill_every: None,
            kill_client_every: None,
            threads: 6,
            gap: 2000,
            calm: false,
            bare: false,
            short: false,
            options: String::new(),
            daemon_args: String::new(),
        }
    }

    /// How to do the same again.
    fn line(&self, seed: u64) -> String {
        let mut line = format!("cargo xtask faults --seed {seed} --gap {}", self.gap);
        line += &format!(" --seconds {} --threads {}", self.seconds, self.threads);
        line += match self.work {
            Work::Checker => " --work checker",
            Work::Fsx => " --work fsx",
            Work::Fio => " --work fio",
            Work::All => "",
        };
        for (is, word) in [
            (self.engine == Engine::Threads, " --engine threads"),
            (self.rings, " --rings"),
            (self.calm, " --calm"),
        ] {
            line += if is { word } else { "" };
        }
        if let Some(ms) = self.kill_every {
            line += &format!(" --kill-every {ms}");
        }
        if let Some(ms) = self.kill_client_every {
            line += &format!(" --kill-client-every {ms}");
        }
        if !self.options.is_empty() {
            line += &format!(" --options {}", self.options);
        }
        if !self.daemon_args.is_empty() {
            line += &format!(" --daemon-args='{}'", self.daemon_args);
        }
        line
    }
}

/// Short enough for CI: a fixed seed, then a random one.
pub fn run_short() -> Result<String> {
    let args = Args::short();
    let first = run(&Args { seed: Some(CI_SEED), ..args.clone() })?;
    let second = run(&args)?;
    Ok(format!("{first}; {second}"))
}

/// Runs with one seed; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    if args.short {
        return run_short();
    }
    let seed = args.seed.unwrap_or_else(|| RandomState::new().hash_one(0) % 1_000_000_000);
    println!("faults: seed {seed}: {}", args.line(seed));
    match args.work {
        Work::Checker | Work::Fio => deps::debian(deps::TEST_PACKAGES)?,
        Work::Fsx | Work::All => deps::all()?,
    }
    let sandbox = Sandbox::new()?;
    let backing = LoopFs::new(&sandbox, "backing", LoopShape::ext4(IMAGE_BYTES))?;
    let in_parts = args.daemon_args.split_whitespace().any(|arg| arg == "--state-dir=none");
    let account = Account::new(in_parts);
    let limit = Duration::from_secs(args.seconds) * (MORE_TIMES + 1) + SLACK;
    if args.bare {
        let time = Duration::from_secs(args.seconds);
        let place = (&*backing.dir, &*backing.dir, "bare");
        checker::run(place, seed, args.threads, time, || false, &account)?;
        return verdict(&account, &[], format!("{} operations", account.ops.load(Relaxed)));
    }
    let bins = Bins::build()?;
    let under = Under::start(args, seed, &sandbox, &backing.dir, &bins)?;
    let result = guard::with_limit(limit, || under.all(&account));
    let closing = under.close(&account);
    // What is kept of a run is kept however it ended.
    let logs = under.keep_logs();
    if let Err(error) = result {
        account.problem(format!("{error:#}"));
    }
    let closing = match closing {
        Ok(closing) => closing,
        Err(error) => {
            account.problem(format!("{error:#}"));
            String::new()
        }
    };
    let mut problems = under.proxy.findings();
    let cuts = under.proxy.tally().cuts();
    if cuts < args.cuts && !args.calm {
        problems.push(format!("{cuts} cuts were made, {} are asked for", args.cuts));
    }
    verdict(&account, &problems, format!("seed {seed}, {closing}"))
        .with_context(|| format!("logs in {}; again: {}", logs.display(), args.line(seed)))
}

/// Fails if there is any problem.
fn verdict(account: &Account, findings: &[String], closing: String) -> Result<String> {
    let mut problems = account.problems();
    problems.extend_from_slice(findings);
    if problems.is_empty() {
        return Ok(format!("{closing}, 0 errors"));
    }
    let count = account.count.load(Relaxed) + findings.len() as u64;
    bail!("{count} errors ({closing}):\n  {}", problems.join("\n  "));
}

/// A daemon with a proxy before it.
struct Under<'a> {
    args: &'a Args,
    seed: u64,
    sandbox: &'a Sandbox,
    backing: &'a Path,
    daemon: Mutex<Daemon>,
    start: rig::Counters,
    proxy: Proxy,
    begun: Instant,
    client_kills: AtomicU64,
    _rings: Option<Guard>,
}

fn lock(daemon: &Mutex<Daemon>) -> MutexGuard<'_, Daemon> {
    daemon.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl<'a> Under<'a> {
    fn start(
        args: &'a Args,
        seed: u64,
        sandbox: &'a Sandbox,
        backing: &'a Path,
        bins: &Bins,
    ) -> Result<Self> {
        let rings = args.rings.then(fsx::switch_rings_on).transpose()?;
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
        let schedule = Schedule { seed, gap_max: args.gap, calm: args.calm };
        let log = File::create(sandbox.path("decisions.log"))?;
        let proxy = Proxy::start(&sandbox.path("p.sock"), &daemon.socket, schedule, log)?;
        let (daemon, begun) = (Mutex::new(daemon), Instant::now());
        let client_kills = AtomicU64::new(0);
        let _rings = rings;
        Ok(Self { args, seed, sandbox, backing, daemon, start, proxy, begun, client_kills, _rings })
    }

    /// All work that is asked for, with progress lines and kills beside it.
    fn all(&self, account: &Account) -> Result<()> {
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
        let mut options = format!("{cache},checksum=on");
        options += if self.args.rings { ",uring=on" } else { "" };
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
            let result = work(&mount, &name);
            drop(done);
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
        mount.umount().context("after the faults")?;
        if self.args.kill_every.is_none() && account.count.load(Relaxed) == before {
            lock(&self.daemon).assert_back_at(&self.start)?;
        }
        Ok(())
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

    /// The closing line, with what the daemon counted.
    fn close(&self, account: &Account) -> Result<String> {
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
        if kills > 0 {
            let tolerated = account.tolerated.load(Relaxed);
            closing += &format!(", {kills} kills with {tolerated} allowed errors");
        }
        Ok(closing)
    }

    /// Copies the logs to where they outlive the run.
    fn keep_logs(&self) -> PathBuf {
        let dir = paths::target().join("faults").join(format!("seed-{}", self.seed));
        self.sandbox.keep_logs(&dir);
        dir
    }
}
