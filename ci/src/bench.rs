//! `cargo xtask bench`: installs what the bench needs, builds it, both programs of ringfs and the
//! peers, and runs it.
//!
//! The measuring itself is the crate `ringfs-benches`; its `--help` lists the arguments. The peers
//! (`benches/peers`) are a workspace of their own, because they depend on what the product must
//! not. With `--vm` the same program measures inside a guest (`vm/bench.rs`).

use std::time::Duration;

use anyhow::{Context, Result};

use crate::deps;
use crate::paths::{self, Bins};
use crate::vm;

/// A full run of all work and contenders takes an hour; nothing takes longer than this.
const LIMIT: Duration = Duration::from_secs(3 * 3600);
/// Building the peers, from nothing on two busy cores.
const BUILD_LIMIT: Duration = Duration::from_secs(900);

/// Arguments of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Instead, in an emulated guest: virtiofsd, QEMU's 9p and ringfs over vsock. Orders only.
    /// Takes --quick, --rounds N, --work A,B, --keep
    #[arg(long)]
    vm: bool,
    /// Passed to ringfs-bench: --quick, --goals, --rounds N, --backing tmpfs|ext4|DIR, --contenders
    /// A,B, --work PART, --ab LABEL=DIR, --engine-ab, --growth; see `cargo xtask bench --help-all`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
    /// The bench's own help
    #[arg(long)]
    help_all: bool,
}

/// Runs the bench.
pub fn run(args: &Args) -> Result<()> {
    let bench = || paths::cargo().args(["run", "--release", "--locked", "-p", "ringfs-benches"]);
    if args.help_all {
        return bench().args(["--", "--help"]).limit(BUILD_LIMIT).show();
    }
    // Also behind another argument, where clap leaves it to the bench.
    if args.vm || args.args.iter().any(|arg| arg == "--vm") {
        return vm::bench::run(args.args.iter().filter(|arg| *arg != "--vm"));
    }
    deps::debian(deps::BENCH_PACKAGES)?;
    let bins = Bins::build()?;
    let dir = bins.ringfs.parent().context("the programs have a directory")?.to_owned();
    let peers = paths::target().join("peers");
    let build = paths::cargo().args(["build", "--release", "--locked", "--manifest-path"]);
    let manifest = paths::root().join("benches/peers/Cargo.toml");
    build.arg(manifest).arg("--target-dir").arg(&peers).limit(BUILD_LIMIT).show()?;
    bench()
        .args(["--", "--ringfs-bin"])
        .arg(dir)
        .arg("--peers")
        .arg(peers.join("release"))
        .args(&args.args)
        .limit(LIMIT)
        .show()
}
