//! `cargo xtask test`: everything that CI checks, in order, with a summary.
//!
//! Invariant: a step is real or absent: none is faked, and none is skipped without being counted
//! and named in the summary. The exit code is 0 only if no step failed. The whole stays below
//! 30 minutes on two cores; each step's time is printed, so that growth is seen.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::paths::{self, Bins};
use crate::vm::{self, VmArgs};
use crate::{demo, deny, deps, e2e, faults, find, fsx, pjdfstest, soak, stress, survive};

/// The slowest single cargo call, a release build from nothing on two busy cores.
const CARGO_LIMIT: Duration = Duration::from_secs(1500);

/// What `cargo xtask test` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only steps whose name holds this
    #[arg(default_value = "")]
    pattern: String,
    /// Leave out steps whose name holds this; they are counted as skipped
    #[arg(long)]
    skip: Vec<String>,
    /// Print the names and end
    #[arg(long)]
    list: bool,
}

struct Step {
    name: &'static str,
    /// Gives a closing line.
    run: fn() -> Result<String>,
}

const STEPS: &[Step] = &[
    Step { name: "format", run: || cargo(&["fmt", "--all", "--check"]) },
    Step { name: "clippy", run: clippy },
    Step { name: "deny", run: deny::run },
    Step { name: "unit", run: || cargo(&["test", "--workspace", "--locked", "--no-fail-fast"]) },
    Step { name: "deps", run: || deps::all().map(|()| "all there".into()) },
    Step { name: "build", run: || Bins::build().map(|_| "ringfsd and ringfs, release".into()) },
    Step { name: "e2e", run: || e2e::run(&e2e::Args::default()) },
    Step { name: "pjdfstest", run: || pjdfstest::run(&pjdfstest::Args::default()) },
    Step { name: "fsx", run: || fsx::run(&fsx::Args::short()) },
    Step { name: "stress", run: || stress::run(&stress::Args::short()) },
    Step { name: "faults", run: faults::run_short },
    Step { name: "survive", run: survive::run_short },
    Step { name: "soak", run: soak::run_short },
    Step { name: "find", run: find::run_short },
    Step { name: "vm", run: vm },
    Step { name: "demo", run: || demo::run(&demo::Args::once()) },
];

enum Verdict {
    Passed(String),
    Failed(String),
    Skipped,
}

/// Runs the steps and prints the summary; fails if any did.
pub fn run(args: &Args) -> Result<()> {
    let mut verdicts = Vec::new();
    for step in STEPS.iter().filter(|step| step.name.contains(&args.pattern)) {
        if args.list {
            println!("{}", step.name);
            continue;
        }
        let begun = Instant::now();
        let verdict = if args.skip.iter().any(|skip| step.name.contains(skip.as_str())) {
            Verdict::Skipped
        } else {
            println!("\n==== {} ====", step.name);
            match (step.run)() {
                Ok(closing) => Verdict::Passed(closing),
                Err(error) => Verdict::Failed(format!("{error:#}")),
            }
        };
        if let Verdict::Failed(error) = &verdict {
            eprintln!("{}: {error}", step.name);
        }
        verdicts.push((step.name, verdict, begun.elapsed()));
    }
    if args.list {
        return Ok(());
    }
    if verdicts.is_empty() {
        bail!("no step is called {}", args.pattern);
    }
    summary(&verdicts)
}

fn summary(verdicts: &[(&str, Verdict, Duration)]) -> Result<()> {
    println!("\n==== summary ====");
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, verdict, took) in verdicts {
        let (count, word, line) = match verdict {
            Verdict::Passed(closing) => (&mut passed, "passed", closing.as_str()),
            Verdict::Failed(error) => (&mut failed, "FAILED", error.lines().next().unwrap_or("")),
            Verdict::Skipped => (&mut skipped, "skipped", "left out by --skip"),
        };
        *count += 1;
        println!("{word:<8}{name:<11}{:>7.1} s  {line}", took.as_secs_f64());
    }
    let total: Duration = verdicts.iter().map(|(_, _, took)| *took).sum();
    println!("in {:.0} s", total.as_secs_f64());
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed > 0 {
        bail!("{failed} of {} steps failed", verdicts.len());
    }
    Ok(())
}

fn cargo(args: &[&str]) -> Result<String> {
    paths::cargo().args(args).limit(CARGO_LIMIT).show()?;
    Ok(format!("cargo {}", args.join(" ")))
}

fn vm() -> Result<String> {
    VmArgs::short().into_iter().try_for_each(vm::run)?;
    Ok("smoke and a root file system, on 6.12".into())
}

fn clippy() -> Result<String> {
    cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ])
}
