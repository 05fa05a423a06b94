//! `cargo xtask survive`: how soon a mount goes on after a cut, and what it costs to wait.
//!
//! Invariant: an answer that is late may miss a bound; one that is wrong, or an error, fails the
//! run whatever is measured. Times hold for the machine they were taken on: CI checks the answers.

pub mod away;
pub mod figures;
pub mod greedy;
pub mod memory;
pub mod times;
pub mod work;

use anyhow::Result;
use clap::Subcommand;

/// What `cargo xtask survive` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// From a reset, a kill or a restore to the first answer, held against issue 4's bounds
    Times(times::Args),
    /// Memory of both ends while the daemon is away under load, held against computed bounds
    Away(away::Args),
    /// One guest's programs: verified work on a mount until a file appears (for the other commands)
    #[command(hide = true)]
    Work(work::Args),
    /// One guest's program that takes until it is refused (for the other commands)
    #[command(hide = true)]
    Greedy(greedy::Args),
}

/// Runs one part; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    match &args.part {
        Part::Times(args) => times::run(args),
        Part::Away(args) => away::run(args),
        Part::Work(args) => work::run(args),
        Part::Greedy(args) => greedy::run(args),
    }
}

/// Short enough for CI, and without bounds of time.
pub fn run_short() -> Result<String> {
    let times = times::run(&times::Args::short())?;
    let away = away::run(&away::Args::short())?;
    Ok(format!("{times}; {away}"))
}
