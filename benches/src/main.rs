//! `ringfs-bench`: the same work on the bare directory, on a local FUSE passthrough and on ringfs,
//! in interleaved rounds of one run.
//!
//! This machine's speed changes from minute to minute, so the figure to quote is the median over
//! the rounds of the ratio to the local passthrough within a round, never an absolute time.

mod contender;
mod report;
mod work;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use contender::{Contender, Kind};
use report::Report;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use work::Work;

/// Times ringfs against the bare directory and a local libfuse passthrough.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Interleaved rounds; 7 or more for a claim.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Short runs of each work, 3 rounds: to see that it works.
    #[arg(long)]
    quick: bool,
    /// What the shared directory lies on.
    #[arg(long, value_enum, default_value = "tmpfs")]
    backing: Backing,
    /// Contenders to leave out or keep: a comma-separated list of their names.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Run only work whose name contains this.
    #[arg(long)]
    work: Option<String>,
    /// Where the programs are; built there if --build is given.
    #[arg(long, default_value = "target/release")]
    bin: PathBuf,
    /// Further -o options of the ringfs mount.
    #[arg(long)]
    options: Option<String>,
    /// Write the report as JSON there.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Backing {
    /// Memory: measures the path, not a disk.
    Tmpfs,
    /// The directory for temporary files, on whatever it lies.
    Disk,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, stop.clone())?;
    }
    let parent = match cli.backing {
        Backing::Tmpfs => PathBuf::from("/dev/shm"),
        Backing::Disk => std::env::temp_dir(),
    };
    let scratch = tempfile::Builder::new().prefix("ringfs-bench-").tempdir_in(&parent)?;
    let tools = tempfile::Builder::new().prefix("ringfs-bench-tools-").tempdir()?;
    let mut report = Report::default();
    let outcome = run(&cli, scratch.path(), tools.path(), &stop, &mut report);
    report.print();
    if let Some(path) = &cli.json {
        std::fs::write(path, serde_json::to_string_pretty(&report.to_json())?)
            .with_context(|| format!("cannot write {path:?}"))?;
    }
    outcome
}

fn run(
    cli: &Cli,
    scratch: &Path,
    tools: &Path,
    stop: &AtomicBool,
    report: &mut Report,
) -> Result<()> {
    let backing = scratch.join("backing");
    std::fs::create_dir(&backing)?;
    let kept = |kind: &Kind| cli.only.is_empty() || cli.only.iter().any(|name| name == kind.name());
    let mut contenders = Vec::new();
    for kind in Kind::ALL.into_iter().filter(kept) {
        let mountpoint = tools.join(kind.name());
        let started =
            Contender::start(kind, &backing, &mountpoint, tools, &cli.bin, cli.options.as_deref());
        contenders.push(started.with_context(|| format!("cannot start {}", kind.name()))?);
    }
    for contender in &contenders {
        println!("{:<8} {}", contender.name(), contender.command());
    }
    let rounds = if cli.quick { 3 } else { cli.rounds };
    let wanted = |work: &Work| cli.work.as_ref().is_none_or(|part| work.name().contains(part));
    let works: Vec<Work> = Work::all(cli.quick).into_iter().filter(wanted).collect();
    for (index, work) in works.iter().enumerate() {
        work.prepare(&backing)?;
        for round in 0..rounds {
            // Another one begins each round, so that no place in the order is anybody's.
            for turn in 0..contenders.len() {
                if stop.load(Ordering::Relaxed) {
                    bail!("stopped; the rounds so far are reported");
                }
                let contender = &contenders[(round + turn) % contenders.len()];
                eprint!(
                    "\r\x1b[K[{}/{}] {}: round {}/{rounds}, {}",
                    index + 1,
                    works.len(),
                    work.name(),
                    round + 1,
                    contender.name()
                );
                let rate = work
                    .run(contender.path())
                    .with_context(|| format!("{} on {}", work.name(), contender.name()))?;
                report.add(work.name(), work.unit(), contender.name(), round, rate);
            }
        }
        work.clean(&backing)?;
    }
    eprintln!("\r\x1b[K");
    Ok(())
}
