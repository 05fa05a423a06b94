//! `cargo xtask`: the project's commands.

use clap::{Parser, Subcommand};

mod vm;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "commands of the ringfs project")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a QEMU guest that mounts a host share over vsock, and run a scenario in it.
    Vm(vm::VmArgs),
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Vm(args) => vm::run(args),
    }
}
