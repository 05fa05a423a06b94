//! `cargo xtask`: the project's own commands, from the first demo to all of CI.
//!
//! Invariant: a command leaves nothing behind (mounts, processes, loop devices, files), also when
//! it fails or is interrupted; see `guard`. Nothing of the product is linked in but the wire's
//! layouts, for the fault proxy: both ends are driven by their command lines, as a user does.

mod bench;
mod demo;
mod deny;
mod deps;
mod e2e;
mod faults;
mod find;
mod fsx;
mod fuzz;
mod guard;
mod hostile;
mod lex;
mod mode;
mod mounts;
mod package;
mod paths;
mod pjdfstest;
mod proc;
mod rig;
mod sandbox;
mod soak;
mod stress;
mod survive;
mod test;
mod tidy;
mod vm;
mod walk;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::mode::Mode;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The commands of the ringfs project")]
struct Cli {
    /// How both ends are set, but for the cargo tests, the bench and the emulated guest
    #[arg(long, global = true, value_enum, default_value_t)]
    mode: Mode,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build, start both ends, mount, and show it at work with a verified copy
    Demo(demo::Args),
    /// Everything that CI checks
    Test(test::Args),
    /// Install what the other commands need and this machine lacks
    Deps,
    /// Check what we depend on: licences, sources, bans
    Deny,
    /// Check the workspace's boundaries: who uses whom, unsafe, lengths
    Tidy,
    /// Both ends on real mounts: what a file system must do, trees, load, bad input
    E2e(e2e::Args),
    /// The POSIX suite on a mount, compared with the bare directory case by case
    Pjdfstest(pjdfstest::Args),
    /// The file system exerciser in every cache mode
    Fsx(fsx::Args),
    /// Connections cut, silenced and garbled by a seeded proxy while everything is checked
    Faults(faults::Args),
    /// A guest that attacks the daemon; with --rate, how fast others are served beside it
    Hostile(hostile::Args),
    /// How soon a mount goes on after its connections or its daemon are lost
    Survive(survive::Args),
    /// Several guests for a long time, with kills, cuts and reconnects
    Soak(soak::Args),
    /// A guest walks over more files than its daemon may open
    Find(find::Args),
    /// The fuzz targets of the wire, under libFuzzer with a nightly compiler
    Fuzz(fuzz::Args),
    /// Debian packages, a static tarball and the container's place, in target/packages
    Package(package::Args),
    /// stress-ng's file-system stressors on one and on several mounts
    Stress(stress::Args),
    /// ringfs against the bare directory and a local FUSE passthrough, in interleaved rounds
    Bench(bench::Args),
    /// A real guest under QEMU
    Vm(vm::VmArgs),
    /// From an empty Debian to a mounted share by the README's commands alone, timed
    Walk(walk::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = guard::on_signals().and_then(|()| dispatch(cli));
    guard::rest_if_ending();
    guard::undo_all();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(Cli { mode, command }: Cli) -> Result<()> {
    let _mode = mode.enter()?;
    match command {
        Command::Demo(args) => demo::run(&args).map(drop),
        Command::Test(args) => test::run(&args),
        Command::Deny => close("deny", deny::run()?),
        Command::Deps => deps::all(),
        Command::Tidy => tidy::run(),
        Command::E2e(args) => close("e2e", e2e::run(&args)?),
        Command::Pjdfstest(args) => close("pjdfstest", pjdfstest::run(&args)?),
        Command::Fsx(args) => close("fsx", fsx::run(&args)?),
        Command::Faults(args) => close("faults", faults::run(&args)?),
        Command::Hostile(args) => hostile::run(&args),
        Command::Survive(args) => close("survive", survive::run(&args)?),
        Command::Soak(args) => close("soak", soak::run(&args)?),
        Command::Find(args) => close("find", find::run(&args)?),
        Command::Fuzz(args) => close("fuzz", fuzz::run(&args)?),
        Command::Package(args) => close("package", package::run(&args)?),
        Command::Stress(args) => close("stress", stress::run(&args)?),
        Command::Bench(args) => bench::run(&args),
        Command::Vm(args) => vm::run(args),
        Command::Walk(args) => close("walk", walk::run(&args)?),
    }
}

fn close(name: &str, line: String) -> Result<()> {
    println!("{name}: {line}");
    Ok(())
}
