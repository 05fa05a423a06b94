//! `cargo xtask survive away`: what both ends hold while the daemon is away under load.
//!
//! Verified work goes on, programs are started and killed, the kernel gives nodes back. Invariant:
//! the client grows by no more than its slots and its park hold, killed programs get out, and when
//! the daemon comes back all goes on without an error. We hold no file of the mount.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use rustix::thread::sched_getaffinity;

use super::memory::{self, mib};
use super::work::{self, State};
use crate::guard;
use crate::paths::Bins;
use crate::proc::{Cmd, Process};
use crate::rig::{self, Counters, Daemon, Mount, SETTLE};
use crate::sandbox::Sandbox;

const SAMPLE: Duration = Duration::from_millis(50);
/// What the daemon gives without copying it.
const LARGE_BYTES: usize = 1 << 20;
/// Files that the guest knows and its kernel may give back.
const KNOWN: usize = 20_000;
const KNOWN_PER_DIR: usize = 1000;
/// Programs that are started at once, to be killed.
const VICTIMS: usize = 12;
/// They come to wait for the daemon within it.
const VICTIM_LIFE: Duration = Duration::from_millis(300);
/// A killed program that has not gone by then waits for the daemon, which comes back only after it.
const VICTIM_END: Duration = Duration::from_secs(60);
/// Work that has done nothing for so long has stopped.
const STUCK: Duration = Duration::from_secs(180);
/// How long anything but the waiting may take.
const LIMIT: Duration = Duration::from_secs(300);

/// What `cargo xtask survive away` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// How long the daemon is away
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Threads that work
    #[arg(long, default_value_t = 84)]
    threads: u64,
    /// More of them, each with a write of 1 MiB in flight
    #[arg(long, default_value_t = 64)]
    floods: u64,
}

impl Args {
    /// For CI.
    pub fn short() -> Self {
        Self { seconds: 5, threads: 28, floods: 64 }
    }
}

/// Runs it; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    let bins = Bins::build()?;
    let sandbox = Sandbox::in_memory()?;
    let limit = LIMIT + Duration::from_secs(args.seconds);
    let done = guard::with_limit(limit, || away(args, &bins, &sandbox));
    sandbox.logged("survive", done)
}

/// Verified work in a process of its own.
pub struct Worker {
    process: Process,
    log: PathBuf,
    stop: PathBuf,
}

impl Worker {
    /// Starts it in a new directory `name` of a mount.
    pub fn start(sandbox: &Sandbox, mount: &Path, name: &str, more: &[String]) -> Result<Self> {
        Self::start_part(sandbox, mount, "work", name, more)
    }

    /// The same of another part of `survive` that tells its state as [`work`] does.
    pub fn start_part(
        sandbox: &Sandbox,
        mount: &Path,
        part: &str,
        name: &str,
        more: &[String],
    ) -> Result<Self> {
        let dir = mount.join(name);
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let (log, stop) = (sandbox.path(&format!("{name}.log")), sandbox.path(name));
        let cmd = Cmd::new(std::env::current_exe()?).args(["survive", part, "--dir"]).arg(dir);
        let process = cmd.arg("--stop").arg(&stop).args(more).spawn(&log)?;
        Ok(Self { process, log, stop })
    }

    /// What it has done so far.
    pub fn state(&self) -> State {
        work::newest(&self.log).unwrap_or_default()
    }

    /// Fails if something was wrong, or it has ended by itself.
    pub fn check(&mut self) -> Result<()> {
        let state = self.state();
        ensure!(state.problems.is_empty(), "{}: {:?}", self.log.display(), state.problems);
        let ended = self.process.wait(Duration::ZERO)?;
        ensure!(ended.is_none(), "it ended by itself:\n{}", crate::proc::tail_of(&self.log));
        Ok(())
    }

    /// Waits until it has done so many more steps.
    pub fn wait_for_steps(&mut self, more: u64) -> Result<()> {
        let before = self.state().steps;
        let goes_on = guard::poll_until(STUCK, || {
            self.check()?;
            Ok(self.state().steps >= before + more)
        })?;
        ensure!(goes_on, "no {more} steps in {STUCK:?}: {:?}", self.state());
        Ok(())
    }

    /// Lets it end, which it must do well.
    pub fn stop(mut self) -> Result<State> {
        fs::write(&self.stop, "")?;
        let status = self.process.wait(SETTLE * 8)?.context("it does not stop")?;
        ensure!(status.success(), "{status}:\n{}", crate::proc::tail_of(&self.log));
        Ok(self.state())
    }
}

/// What a daemon holds without guests, once it has had some: each shard makes a pipe for its first
/// large reply.
pub fn warm(sandbox: &Sandbox, daemon: &Daemon) -> Result<Counters> {
    let mount = daemon.mount(sandbox, "x", "warm", "cache=never")?;
    let mut worker = Worker::start(sandbox, &mount.dir, "warmth", &["--threads=14".to_owned()])?;
    worker.wait_for_steps(1000)?;
    worker.stop()?;
    mount.umount()?;
    // The only connection of each session is on the shard after the last one's. With more of them
    // a shard may be asked for nothing large: with rings all may come from one CPU.
    for n in 0..sched_getaffinity(None)?.count() {
        let options = "cache=never,lanes=1,uring=off";
        let mount = daemon.mount(sandbox, "x", &format!("warm{n}"), options)?;
        let file = mount.dir.join("large");
        fs::write(&file, vec![0; LARGE_BYTES])?;
        ensure!(fs::read(&file)?.len() == LARGE_BYTES, "{} is another one", file.display());
        fs::remove_file(&file)?;
        mount.umount()?;
    }
    let start = daemon.counters_at_rest()?;
    let held = (start.nodes, start.handles, start.slots_in_use);
    ensure!(held == (0, 0, 0), "nodes, handles and slots are left: {held:?}");
    Ok(start)
}

/// Programs that wait for the daemon, each killed; they must be gone at once.
fn kill_some(sandbox: &Sandbox, mount: &Path, round: usize) -> Result<usize> {
    let program = |n: usize| {
        let path = mount.join(format!("victim-{n}"));
        match n % 4 {
            0 => Cmd::new("dd").args(["if=/dev/zero", "bs=1M", "count=8"]).arg(dd_to(&path)),
            1 => Cmd::new("cat").arg(mount.join(format!("d{n}/{round}"))),
            2 => Cmd::new("mkdir").arg(path),
            _ => Cmd::new("ls").arg(mount.join(format!("d{n}"))),
        }
    };
    let log = sandbox.path("victims.log");
    let victims = (0..VICTIMS).map(|n| program(n).spawn(&log)).collect::<Result<Vec<_>>>()?;
    thread::sleep(VICTIM_LIFE);
    for victim in &victims {
        // It may have ended by itself: a cache had what it wanted.
        let _ = victim.signal(Signal::KILL);
    }
    for (n, mut victim) in victims.into_iter().enumerate() {
        let gone = victim.wait(VICTIM_END)?;
        ensure!(gone.is_some(), "killed program {n} of round {round} waits for the daemon");
    }
    Ok(VICTIMS)
}

fn dd_to(path: &Path) -> String {
    format!("of={}", path.display())
}

fn make_known(behind: &Path) -> Result<()> {
    for n in 0..KNOWN {
        let dir = behind.join(format!("d{}", n / KNOWN_PER_DIR));
        if n % KNOWN_PER_DIR == 0 {
            fs::create_dir(&dir)?;
        }
        fs::write(dir.join((n % KNOWN_PER_DIR).to_string()), "")?;
    }
    Ok(())
}

/// Has the kernel give back what nobody uses: a FORGET for each node.
fn give_back() -> Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "2").context("drop_caches")
}

fn away(args: &Args, bins: &Bins, sandbox: &Sandbox) -> Result<String> {
    let behind = sandbox.make_dir("backing")?;
    make_known(&behind)?;
    let state_dir = sandbox.path("state");
    let extra = ["--state-dir", &state_dir.display().to_string()];
    let mut daemon = Daemon::start(sandbox, bins, "d", &[rig::share("x", &behind)], &extra)?;
    let start = warm(sandbox, &daemon)?;
    let mount = daemon.mount(sandbox, "x", "m", "cache=auto")?;
    Cmd::new("ls").arg("-lR").arg(&mount.dir).run()?;
    let load = [("--threads", args.threads), ("--floods", args.floods)];
    let load = load.map(|(name, n)| format!("{name}={n}"));
    let mut worker = Worker::start(sandbox, &mount.dir, "work", &load)?;
    worker.wait_for_steps(500)?;
    let told = mount.told()?;
    let (lanes, slots) = (told.lanes.got, told.slots_per_lane);
    let before = memory::resident(told.pid)?;
    let daemon_pid = daemon.process().pid().as_raw_pid() as u32;
    let daemon_before = memory::resident_with_children(daemon_pid)?;
    let known = told.nodes_known;
    daemon.kill()?;
    let seen = while_away(args, sandbox, &mount, told.pid)?;
    let files = memory::files_in(&state_dir)?;
    let waiting = mount.told()?;
    daemon.start_again()?;
    daemon.wait_ready()?;
    worker.wait_for_steps(500)?;
    let after = memory::resident(told.pid)?;
    let daemon_pid = daemon.process().pid().as_raw_pid() as u32;
    let daemon_after = memory::resident_with_children(daemon_pid)?;
    let state = worker.stop()?;
    mount.umount()?;
    daemon.assert_back_at(&start)?;
    daemon.stop()?;

    let bound = memory::client_growth_max(lanes);
    let peak = seen.peak.max(after);
    let file_bound = memory::state_file_max(lanes, slots);
    println!(
        "away for {} s, {lanes} lanes of {slots} slots, {} threads, {} of them flood",
        args.seconds,
        args.threads + args.floods,
        args.floods
    );
    println!("  client, before the kill            {:>9.1} MiB ({known} nodes known)", mib(before));
    println!("  client, peak while away and after  {:>9.1} MiB", mib(peak));
    println!(
        "  its growth                         {:>9.1} MiB, slots and park allow {:.1} MiB",
        mib(peak.saturating_sub(before)),
        mib(bound)
    );
    println!(
        "  waiting at the end                 {:>9} in slots, {} parked ({:.1} MiB); {} killed",
        waiting.in_flight,
        waiting.parked,
        mib(waiting.parked_bytes),
        seen.killed
    );
    println!(
        "  daemon                             {:>9.1} MiB before, {:.1} MiB after its return",
        mib(daemon_before),
        mib(daemon_after)
    );
    println!(
        "  its replies kept                   {:>9.1} KiB a session, in",
        memory::replies_max(lanes, slots) as f64 / 1024.0
    );
    println!(
        "  its state directory                {:>9.1} KiB in {} files, a session's is {:.1} KiB",
        files.1 as f64 / 1024.0,
        files.0,
        file_bound as f64 / 1024.0
    );
    ensure!(peak.saturating_sub(before) <= bound, "the client grew beyond its bound");
    ensure!(files.0 == 1 && files.1 <= file_bound, "the state directory is beyond its bound");
    Ok(format!(
        "away {} s: {} steps, the slowest {} ms, +{:.1} of {:.1} MiB",
        args.seconds,
        state.steps,
        state.slowest_ms,
        mib(peak.saturating_sub(before)),
        mib(bound)
    ))
}

struct Seen {
    peak: u64,
    killed: usize,
}

fn while_away(args: &Args, sandbox: &Sandbox, mount: &Mount, pid: u32) -> Result<Seen> {
    let over = Instant::now() + Duration::from_secs(args.seconds);
    let mut seen = Seen { peak: 0, killed: 0 };
    thread::scope(|scope| {
        let killer = scope.spawn(|| -> Result<usize> {
            let mut killed = 0;
            for round in 0.. {
                if Instant::now() + VICTIM_LIFE > over {
                    break;
                }
                killed += kill_some(sandbox, &mount.dir, round)?;
                if round % 20 == 1 {
                    give_back()?;
                }
            }
            Ok(killed)
        });
        while Instant::now() < over {
            seen.peak = seen.peak.max(memory::resident(pid)?);
            thread::sleep(SAMPLE);
        }
        seen.killed = killer.join().map_err(|_| anyhow::anyhow!("the killer panicked"))??;
        Ok(seen)
    })
}
