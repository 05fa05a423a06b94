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
mod run;
pub mod schedule;
mod shared;
mod stall;
mod workload;
mod world;

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::deps;
use crate::guard;
use crate::mode::Mode;
use crate::paths::Bins;
use crate::sandbox::{LoopFs, LoopShape, Sandbox};

use checker::Account;
use run::Run;

const IMAGE_BYTES: u64 = 1 << 30;
/// What a run may take beyond its seconds: fsx and fio end when they are done.
const SLACK: Duration = Duration::from_secs(300);
/// Too few cuts after the seconds: the threads go on, at most as many times as long.
const MORE_TIMES: u32 = 4;
/// The seed of CI's first run; the second one's is random.
const CI_SEED: u64 = 1;

/// Which work is done under the faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Work {
    /// Threads that know what each of their operations must give
    Checker,
    /// The file system exerciser
    Fsx,
    /// Random writes with verification
    Fio,
    /// The same with large ones, read back past the guest's cache
    Large,
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
    /// Kill the daemon that often, in milliseconds, and start it again
    #[arg(long, value_name = "MS")]
    kill_every: Option<u64>,
    /// Kill the client that often, in milliseconds: another one takes the mount over
    #[arg(long, value_name = "MS")]
    kill_client_every: Option<u64>,
    /// Stop a process, or the proxy, about that often, in milliseconds, for up to 20 s
    #[arg(long, value_name = "MS")]
    stall_every: Option<u64>,
    /// Threads of the checker
    #[arg(long, default_value_t = 6)]
    threads: u64,
    /// At most so many records between two faults of a direction of a connection
    #[arg(long, default_value_t = 2000)]
    gap: u64,
    /// Delays and writes in pieces alone: no end may notice anything
    #[arg(long)]
    calm: bool,
    /// Mount without payload checksums, so that large replies are spliced; without the faults that
    /// only those find
    #[arg(long)]
    unchecked: bool,
    /// The checker on the bare directory, to see what it says itself
    #[arg(long)]
    bare: bool,
    /// What CI runs, whatever else is given: a fixed seed, then random ones, the last unchecked
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
            kill_every: None,
            kill_client_every: None,
            stall_every: None,
            threads: 6,
            gap: 2000,
            calm: false,
            unchecked: false,
            bare: false,
            short: false,
            options: String::new(),
            daemon_args: String::new(),
        }
    }

    /// Whether the client has to splice: rings have no pipe, and what a killed one did is not
    /// counted.
    fn splices(&self, mode: Mode) -> bool {
        self.unchecked
            && mode != Mode::Rings
            && self.kill_client_every.is_none()
            && matches!(self.work, Work::Large | Work::All)
    }

    /// How to do the same again.
    fn line(&self, mode: Mode, seed: u64) -> String {
        let mut line = format!("cargo xtask faults --seed {seed} --gap {}", self.gap);
        if let Some(mode) = mode.to_possible_value().filter(|_| mode != Mode::Defaults) {
            line += &format!(" --mode {}", mode.get_name());
        }
        line += &format!(" --seconds {} --threads {}", self.seconds, self.threads);
        line += match self.work {
            Work::Checker => " --work checker",
            Work::Fsx => " --work fsx",
            Work::Fio => " --work fio",
            Work::Large => " --work large",
            Work::All => "",
        };
        for (is, word) in [
            (self.engine == Engine::Threads, " --engine threads"),
            (self.calm, " --calm"),
            (self.unchecked, " --unchecked"),
        ] {
            line += if is { word } else { "" };
        }
        if let Some(ms) = self.kill_every {
            line += &format!(" --kill-every {ms}");
        }
        if let Some(ms) = self.kill_client_every {
            line += &format!(" --kill-client-every {ms}");
        }
        if let Some(ms) = self.stall_every {
            line += &format!(" --stall-every {ms}");
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

/// Short enough for CI: a fixed seed, then random ones, the last without payload checksums.
pub fn run_short() -> Result<String> {
    let args = Args::short();
    let first = run(&Args { seed: Some(CI_SEED), ..args.clone() })?;
    let second = run(&args)?;
    let work = Work::Large;
    let third = run(&Args { unchecked: true, work, cuts: 5, gap: 200, ..args })?;
    Ok(format!("{first}; {second}; unchecked: {third}"))
}

/// Runs with one seed; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    if args.short {
        return run_short();
    }
    let seed = args.seed.unwrap_or_else(|| RandomState::new().hash_one(0) % 1_000_000_000);
    let mode = Mode::current();
    let again = args.line(mode, seed);
    println!("faults: seed {seed}: {again}");
    match args.work {
        Work::Checker | Work::Fio | Work::Large => deps::debian(deps::TEST_PACKAGES)?,
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
    let under = Run::start(args, seed, &sandbox, &backing.dir, &bins)?;
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
    if args.splices(mode) && under.spliced() == 0 {
        problems.push("no large reply was spliced".into());
    }
    verdict(&account, &problems, format!("seed {seed}, {closing}"))
        .with_context(|| format!("logs in {}; again: {again}", logs.display()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_told_and_rings_need_not_splice() {
        let large = Args { unchecked: true, work: Work::Large, ..Args::short() };
        let check = |mode, splices, told| {
            assert_eq!(large.splices(mode), splices, "{mode:?}");
            let line = large.line(mode, 7);
            assert_eq!(line.split(" --").find(|word| word.starts_with("mode")), told);
        };
        check(Mode::Defaults, true, None);
        check(Mode::NoSpin, true, Some("mode no-spin"));
        check(Mode::Rings, false, Some("mode rings"));
    }
}
