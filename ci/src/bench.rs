//! `cargo xtask bench`: installs what the bench needs, builds it and both programs, and runs it.
//!
//! The measuring itself is the crate `ringfs-benches`; its `--help` lists the arguments.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::deps;
use crate::paths::{self, Bins};

/// A full run of all work and contenders takes minutes; nothing takes longer than this.
const LIMIT: Duration = Duration::from_secs(2 * 3600);

/// Arguments of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Passed to ringfs-bench: --quick, --rounds N, --backing tmpfs|disk, --work PART, --json FILE
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// Runs the bench.
pub fn run(args: &Args) -> Result<()> {
    deps::debian(&["fio", "gcc", "libfuse3-dev", "pkg-config"])?;
    let bins = Bins::build()?;
    let dir = bins.ringfs.parent().context("the programs have a directory")?.to_owned();
    paths::cargo()
        .args(["run", "--release", "--locked", "-p", "ringfs-benches", "--", "--bin"])
        .arg(dir)
        .args(&args.args)
        .limit(LIMIT)
        .show()
}
