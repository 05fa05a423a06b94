//! `cargo xtask`: the project's own commands, from the first demo to all of CI.
//!
//! Invariant: a command leaves nothing behind (mounts, processes, loop devices, files), also when
//! it fails or is interrupted; see `guard`. Nothing of the product is linked in: both ends are
//! driven by their command lines, as a user drives them.

mod deps;
mod fsx;
mod guard;
mod lex;
mod mounts;
mod paths;
mod pjdfstest;
mod proc;
mod rig;
mod sandbox;
mod stress;
mod tidy;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The commands of the ringfs project")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install what the other commands need and this machine lacks
    Deps,
    /// Check the workspace's boundaries: who uses whom, unsafe, lengths
    Tidy,
    /// The POSIX suite on a mount, compared with the bare directory case by case
    Pjdfstest(pjdfstest::Args),
    /// The file system exerciser in every cache mode
    Fsx(fsx::Args),
    /// stress-ng's file-system stressors on one and on several mounts
    Stress(stress::Args),
    /// A real guest under QEMU
    Vm(vm::VmArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = guard::on_signals().and_then(|()| dispatch(cli.command));
    guard::undo_all();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Deps => deps::all(),
        Command::Tidy => tidy::run(),
        Command::Pjdfstest(args) => close("pjdfstest", pjdfstest::run(&args)?),
        Command::Fsx(args) => close("fsx", fsx::run(&args)?),
        Command::Stress(args) => close("stress", stress::run(&args)?),
        Command::Vm(args) => vm::run(args),
    }
}

fn close(name: &str, line: String) -> Result<()> {
    println!("{name}: {line}");
    Ok(())
}
