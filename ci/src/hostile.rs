//! `cargo xtask hostile`: the guest that attacks, and how fast others are served beside it.
//!
//! The attacks are tests of the daemon (crates/server-uring/tests/hostile), which CI runs with all
//! others. The rates are by hand: they say how fast, and a machine that does something else
//! falsifies them.

use std::time::Duration;

use anyhow::Result;

use crate::paths::{self, Bins};

/// Nothing takes longer: a build from nothing on two busy cores, or all attacks.
const LIMIT: Duration = Duration::from_secs(1500);

/// Arguments of `cargo xtask hostile`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Instead: a guest's rate beside each hostile one by its rate beside a well-behaved one, five
    /// paired rounds each. Fails below 80 %. Wants an idle machine
    #[arg(long)]
    rate: bool,
    /// Only attacks whose name holds this
    #[arg(default_value = "")]
    pattern: String,
}

/// Runs the attacks.
pub fn run(args: &Args) -> Result<()> {
    let Args { rate, pattern } = args;
    if !rate {
        let test = ["test", "-p", "ringfs-server-uring", "--locked", "--test", "hostile", "--"];
        return paths::cargo().args(test).arg(pattern).limit(LIMIT).show();
    }
    let ringfsd = Bins::build()?.ringfsd;
    let example = ["run", "--release", "--locked", "-p", "ringfs-server-uring", "--example"];
    let run = paths::cargo().args(example).args(["hostile_rate", "--"]).arg(pattern);
    run.env("RINGFSD", ringfsd).limit(LIMIT).show()
}
