//! `cargo xtask fuzz`: the fuzz targets of `crates/wire/fuzz` under libFuzzer.
//!
//! They start from good streams, and keep what they found new in `target/fuzz/corpus`. Invariant: a
//! finding fails the command and is kept in `target/fuzz/artifacts`. CI runs the same bodies on
//! stable for a few seconds (`crates/wire/tests/fuzz_short.rs`).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::deps;
use crate::paths;
use crate::proc::Cmd;

const TARGETS: &[&str] = &["deframe", "records", "handshake"];
/// Longest input: a due batch with a large record behind it tells no more than a shorter one.
const INPUT_BYTES_MAX: usize = 80_000;
/// Building the targets, or a toolchain, once.
const BUILD_LIMIT: Duration = Duration::from_secs(1500);
/// What libFuzzer may need beyond its time.
const GRACE: Duration = Duration::from_secs(60);

/// What `cargo xtask fuzz` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Only targets whose name holds this: deframe, records, handshake
    #[arg(default_value = "")]
    pattern: String,
    /// Seconds a target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// Runs the targets; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    nightly()?;
    let cargo_fuzz = deps::cargo_tool(deps::CARGO_FUZZ)?;
    let place = paths::target().join("fuzz");
    let seeds = place.join("seeds");
    fs::create_dir_all(&seeds)?;
    let example = ["run", "--quiet", "--locked", "-p", "ringfs-wire", "--example", "fuzz_seeds"];
    paths::cargo().args(example).arg("--").arg(&seeds).limit(BUILD_LIMIT).run()?;
    let mut lines = Vec::new();
    for target in TARGETS.iter().filter(|target| target.contains(&args.pattern)) {
        lines.push(format!("{target} {}", fuzz(&cargo_fuzz, target, &place, args.seconds)?));
    }
    ensure!(!lines.is_empty(), "no target is called {}", args.pattern);
    Ok(format!("no finding: {}", lines.join(", ")))
}

/// A nightly compiler, which libFuzzer's instrumentation wants.
fn nightly() -> Result<()> {
    let there = Cmd::new("rustup").args(["run", "nightly", "cargo", "--version"]).output();
    let there = there.context("rustup: it gives the nightly compiler that fuzzing wants")?;
    if there.status.success() {
        return Ok(());
    }
    println!("fuzz: installing the nightly compiler");
    let install = ["toolchain", "install", "nightly", "--profile", "minimal"];
    Cmd::new("rustup").args(install).limit(BUILD_LIMIT).run().map(drop)
}

fn cargo_fuzz(program: &Path, command: &str, target: &str, place: &Path) -> Cmd {
    let cmd = Cmd::new("rustup").dir(paths::root()).args(["run", "nightly"]).arg(program);
    let dir = paths::root().join("crates/wire/fuzz");
    // As a cargo command: its first word is its own name.
    let cmd = cmd.args(["fuzz", command, "--fuzz-dir"]).arg(dir);
    cmd.arg("--target-dir").arg(place).arg(target)
}

/// Runs one target; how many runs, and how many a second.
fn fuzz(program: &Path, target: &str, place: &Path, seconds: u64) -> Result<String> {
    let corpus: PathBuf = place.join("corpus").join(target);
    let artifacts = place.join("artifacts").join(target);
    fs::create_dir_all(&corpus)?;
    fs::create_dir_all(&artifacts)?;
    println!("fuzz: building {target}");
    cargo_fuzz(program, "build", target, place).limit(BUILD_LIMIT).run()?;
    let begun = Instant::now();
    let cmd = cargo_fuzz(program, "run", target, place).arg(&corpus).arg(place.join("seeds"));
    let cmd = cmd.arg("--").arg(format!("-max_total_time={seconds}"));
    let cmd = cmd.arg(format!("-max_len={INPUT_BYTES_MAX}")).arg("-print_final_stats=1");
    let cmd = cmd.arg(format!("-artifact_prefix={}/", artifacts.display()));
    let text = cmd.limit(Duration::from_secs(seconds) + GRACE).run()?;
    let stat = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map_or("?", str::trim).to_owned()
    };
    let (runs, rate) =
        (stat("stat::number_of_executed_units:"), stat("stat::average_exec_per_sec:"));
    let took = begun.elapsed();
    Ok(format!("{runs} runs in {took:.0?} ({rate}/s)"))
}
