//! `cargo xtask soak`: several guests on one daemon for long, with kills, cuts and reconnects.
//!
//! Invariant: no program sees an error or a wrong byte; when the guests have gone the daemon holds
//! what it held before they came; and the memory of the daemon and of each client in the last third
//! is at most 1.05 times that in the middle third. Each third begins with its kills, so that
//! daemons of the same age are compared; cuts and reconnects go on all the time.

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::deps;
use crate::faults::proxy::Proxy;
use crate::faults::rng::Rng;
use crate::faults::schedule::Schedule;
use crate::guard::{self, Running};
use crate::paths::Bins;
use crate::rig::{self, Counters, Daemon, Limited, Mount};
use crate::sandbox::{LoopFs, LoopShape, Sandbox};
use crate::survive::away::{Worker, warm};
use crate::survive::memory::{self, mib};

const IMAGE_BYTES: u64 = 4 << 30;
const TICK: Duration = Duration::from_millis(250);
/// Memory is compared from here on in each third: before it kills, caches and tables are not yet
/// what they will be.
const SETTLED: f64 = 0.4;
const GROWTH_MAX: f64 = 1.05;
/// A run that is shorter shows what it used and asks for nothing: there was no time to level off.
const MEMORY_MINUTES_MIN: f64 = 5.0;
/// What a session may hold open and know: several times what the work needs, and what the greedy
/// guest soon has. All of them together have room for each one's part, or one that comes back
/// after a kill would find its own taken.
const OPEN_FILES: usize = 120;
const NODES: usize = 500;
/// Rates that bursts exceed, and the mean of the work does not.
const RATES: &str = "ops=1500,bytes=24M,total-ops=8000,total-bytes=128M,in-flight=2M";
/// What each guest's mount is like, in turn.
const OPTIONS: [&str; 8] = [
    "cache=auto",
    "cache=never",
    "cache=always",
    "cache=metadata",
    "cache=auto,lanes=1",
    "cache=always,writeback",
    "cache=never,lanes=4",
    "cache=auto,spin=0",
];

/// What `cargo xtask soak` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// How long
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Guests
    #[arg(long, default_value_t = 8)]
    sessions: usize,
    /// Threads of each guest
    #[arg(long, default_value_t = 7)]
    threads: u64,
    /// Of what is cut when
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Rates of the share and its sessions; empty: no limits at all, and no greedy guest
    #[arg(long, default_value = RATES)]
    rates: String,
    /// More arguments for ringfsd
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    daemon_args: String,
}

impl Args {
    fn short() -> Self {
        let (rates, daemon_args) = (RATES.to_owned(), String::new());
        Self { minutes: 0.3, sessions: 8, threads: 7, seed: 1, rates, daemon_args }
    }

    /// What `--share` is given.
    fn share(&self, dir: &Path) -> String {
        let share = rig::share("x", dir);
        if self.rates.is_empty() {
            return share;
        }
        let all = (self.sessions + 1) * OPEN_FILES;
        let Self { rates, .. } = self;
        format!("{share},{rates},open-files={OPEN_FILES},nodes={NODES},total-open-files={all}")
    }
}

/// Short enough for CI.
pub fn run_short() -> Result<String> {
    run(&Args::short())
}

/// Runs it; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    deps::debian(deps::TEST_PACKAGES)?;
    let bins = Bins::build()?;
    let sandbox = Sandbox::new()?;
    let backing = LoopFs::new(&sandbox, "backing", LoopShape::ext4(IMAGE_BYTES))?;
    let time = Duration::from_secs_f64(args.minutes * 60.0);
    let done = guard::with_limit(time * 2 + Duration::from_secs(400), || {
        let state = sandbox.path("state").display().to_string();
        let mut extra = vec!["--state-dir", &state];
        extra.extend(args.daemon_args.split_whitespace());
        let daemon = Daemon::start(&sandbox, &bins, "d", &[args.share(&backing.dir)], &extra)?;
        let start = warm(&sandbox, &daemon)?;
        Soak::start(args, &sandbox, daemon, start)?.run(time)
    });
    sandbox.logged("soak", done)
}

/// One guest.
struct Guest {
    name: String,
    mount: Mount,
    proxy: Proxy,
    worker: Worker,
    pid: u32,
}

/// Resident bytes, the daemon's first, and which part of the run had passed.
struct Sample {
    part: f64,
    resident: Vec<u64>,
}

#[derive(Default)]
struct Done {
    kills: u32,
    cuts: u32,
    reconnects: u32,
    /// By the daemons that were killed.
    limited: Limited,
}

impl Guest {
    /// Mounts, through a proxy, and starts a program on it: which part of `survive`, the number of
    /// the guest, and what the program is told.
    fn start(
        args: &Args,
        sandbox: &Sandbox,
        daemon: &Daemon,
        name: String,
        (part, n, more): (&str, usize, &[String]),
    ) -> Result<Self> {
        let schedule = Schedule { seed: args.seed, gap_max: 1, calm: true, unchecked: false };
        let log = File::create(sandbox.path(&format!("p{n}.log")))?;
        let socket = sandbox.path(&format!("p{n}.sock"));
        let proxy = Proxy::start(&socket, &daemon.socket, schedule, log)?;
        let dir = sandbox.make_dir(&format!("m{n}"))?;
        let log = sandbox.path(&format!("m{n}.log"));
        let options = OPTIONS[n % OPTIONS.len()];
        let mount = daemon.mount_through(&proxy.socket, "x", &dir, options, &log)?;
        let pid = mount.told()?.pid;
        let worker = Worker::start_part(sandbox, &dir, part, &format!("guest{n}"), more)?;
        Ok(Self { name, mount, proxy, worker, pid })
    }
}

struct Soak<'a> {
    args: &'a Args,
    daemon: Daemon,
    start: Counters,
    guests: Vec<Guest>,
    samples: Vec<Sample>,
    done: Done,
    rng: Rng,
}

impl<'a> Soak<'a> {
    fn start(args: &'a Args, sandbox: &Sandbox, daemon: Daemon, start: Counters) -> Result<Self> {
        let mut guests = Vec::new();
        for n in 0..args.sessions.max(1) {
            let name = format!("client {n} ({})", OPTIONS[n % OPTIONS.len()]);
            let seed = format!("--seed={}", args.seed + n as u64);
            let threads = format!("--threads={}", args.threads);
            let more = [seed, threads, "--rest-ms=2".to_owned()];
            guests.push(Guest::start(args, sandbox, &daemon, name, ("work", n, &more))?);
        }
        if !args.rates.is_empty() {
            let more = [format!("--open-files={OPEN_FILES}"), format!("--nodes={NODES}")];
            let part = ("greedy", guests.len(), &more[..]);
            guests.push(Guest::start(args, sandbox, &daemon, "greedy client".to_owned(), part)?);
        }
        let (samples, done) = (Vec::new(), Done::default());
        Ok(Self { args, daemon, start, guests, samples, done, rng: Rng::of(&[args.seed]) })
    }

    fn run(mut self, time: Duration) -> Result<String> {
        // In each third, so many, so far apart.
        let kills = if self.args.minutes < 1.0 { 1 } else { 5 };
        let apart = (time.as_secs_f64() / 3.0 * SETTLED / 2.0 / f64::from(kills)).min(6.0);
        let progress = (time / 40).max(Duration::from_secs(5));
        let mut running = Running::begin();
        let (mut told, mut sampled) = (Instant::now(), Instant::now());
        while running.passed() < time {
            thread::sleep(TICK);
            let at = running.passed().as_secs_f64();
            let third = time.as_secs_f64() / 3.0;
            let before = ((at / third) as u32).min(2);
            let since = at - third * f64::from(before);
            let due = before * kills + ((since / apart) as u32 + 1).min(kills);
            if self.done.kills < due {
                self.done.kills += 1;
                self.done.limited = self.done.limited + self.daemon.limited()?;
                self.daemon.kill_and_start_again()?;
            }
            self.disturb()?;
            for guest in &mut self.guests {
                guest.worker.check()?;
            }
            if sampled.elapsed() >= Duration::from_secs(1) {
                sampled = Instant::now();
                self.sample(at / time.as_secs_f64())?;
            }
            if told.elapsed() >= progress {
                told = Instant::now();
                self.tell(running.passed())?;
            }
        }
        self.end()
    }

    /// Cuts one guest's connections now and then, or has it reconnect.
    fn disturb(&mut self) -> Result<()> {
        let which = self.rng.below(self.guests.len() as u64) as usize;
        match self.rng.below(12) {
            0..3 => {
                self.done.cuts += 1;
                self.guests[which].proxy.cut();
            }
            3 => {
                self.done.reconnects += 1;
                self.guests[which].mount.reconnect()?;
            }
            _ => {}
        }
        Ok(())
    }

    fn sample(&mut self, part: f64) -> Result<()> {
        let daemon = self.daemon.process().pid().as_raw_pid() as u32;
        let mut resident = vec![memory::resident_with_children(daemon)?];
        for guest in &self.guests {
            resident.push(memory::resident(guest.pid)?);
        }
        self.samples.push(Sample { part, resident });
        Ok(())
    }

    fn tell(&self, after: Duration) -> Result<()> {
        let counters = self.daemon.counters()?;
        let steps: u64 = self.guests.iter().map(|guest| guest.worker.state().steps).sum();
        let resident = self.samples.last().map(|sample| sample.resident.clone());
        let resident = resident.unwrap_or_default();
        let limited = self.done.limited + self.daemon.limited()?;
        println!(
            "soak: {after:.0?}: {steps} steps, {limited}, {} kills, {} cuts, {} reconnects, \
             {} nodes, {} open, {} fds, daemon {:.1} MiB, clients {:.1} MiB, 0 errors",
            self.done.kills,
            self.done.cuts,
            self.done.reconnects,
            counters.nodes,
            counters.handles,
            counters.fds,
            mib(resident.first().copied().unwrap_or_default()),
            mib(resident.iter().skip(1).sum())
        );
        Ok(())
    }

    /// All stop, leave, and nothing is left.
    fn end(self) -> Result<String> {
        let limited = self.done.limited + self.daemon.limited()?;
        let names: Vec<String> = self.guests.iter().map(|guest| guest.name.clone()).collect();
        let compared = compare(&names, &self.samples, self.args.minutes >= MEMORY_MINUTES_MIN);
        let (mut steps, mut slowest) = (0, 0);
        let (mut mounts, mut proxies) = (Vec::new(), Vec::new());
        for guest in self.guests {
            let state = guest.worker.stop().context(guest.name)?;
            steps += state.steps;
            slowest = slowest.max(state.slowest_ms);
            mounts.push(guest.mount);
            proxies.push(guest.proxy);
        }
        mounts.into_iter().try_for_each(Mount::umount)?;
        self.daemon.assert_back_at(&self.start)?;
        let left = self.daemon.counters()?;
        println!(
            "soak: after the unmounts: nodes {} (at the start {}), fds {} ({}), open {} ({})",
            left.nodes,
            self.start.nodes,
            left.fds,
            self.start.fds,
            left.handles,
            self.start.handles
        );
        for proxy in &proxies {
            ensure!(proxy.findings().is_empty(), "{:?}", proxy.findings());
        }
        self.daemon.stop()?;
        ensure!(
            self.args.rates.is_empty() || limited.delayed > 0 && limited.refused > 0,
            "the limits were never met: {limited}"
        );
        compared?;
        let Done { kills, cuts, reconnects, .. } = self.done;
        Ok(format!(
            "{} guests, {steps} steps, {limited}, {kills} kills, {cuts} cuts, {reconnects} \
             reconnects, the slowest step {slowest} ms, 0 errors",
            proxies.len()
        ))
    }
}

/// The mean of one process in a third, kills and the time after them left out.
fn mean(samples: &[Sample], third: u32, process: usize) -> Option<u64> {
    let from = (f64::from(third) + SETTLED) / 3.0;
    let to = f64::from(third + 1) / 3.0;
    let within = samples.iter().filter(|sample| (from..to).contains(&sample.part));
    let values: Vec<u64> = within.filter_map(|s| s.resident.get(process).copied()).collect();
    values.iter().sum::<u64>().checked_div(values.len() as u64)
}

/// Holds the last third against the middle one.
fn compare(names: &[String], samples: &[Sample], is_asked: bool) -> Result<()> {
    let processes = samples.first().map_or(0, |sample| sample.resident.len());
    let mut grown = Vec::new();
    for process in 0..processes {
        let of = |third| mean(samples, third, process);
        let (Some(middle), Some(last)) = (of(1), of(2)) else { continue };
        let name = process.checked_sub(1).map_or("daemon", |n| &names[n]);
        let ratio = last as f64 / middle.max(1) as f64;
        println!("soak: {name:<36} {:>7.1} -> {:>7.1} MiB, x {ratio:.3}", mib(middle), mib(last));
        if ratio > GROWTH_MAX {
            grown.push(format!("{name} x {ratio:.3}"));
        }
    }
    ensure!(grown.is_empty() || !is_asked, "memory grows: {}", grown.join(", "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_in_the_last_third_is_found() {
        let run = |last: u64| -> Vec<Sample> {
            let at = |n: u64| Sample {
                part: n as f64 / 300.0,
                resident: vec![if n < 200 { 100 << 20 } else { last }, 1 << 20],
            };
            (0..300).map(at).collect()
        };
        let names = ["one".to_owned()];
        assert!(compare(&names, &run(104 << 20), true).is_ok());
        let error = compare(&names, &run(106 << 20), true).unwrap_err();
        assert!(error.to_string().contains("daemon x 1.060"), "{error}");
        assert!(compare(&names, &run(106 << 20), false).is_ok());
        assert!(compare(&names, &[], true).is_ok());
    }
}
