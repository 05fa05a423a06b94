//! `cargo xtask vm`: a real guest. Written next.

use anyhow::{Result, bail};

/// What `cargo xtask vm` takes.
#[derive(Debug, clap::Args)]
pub struct VmArgs {}

/// Boots the guest.
pub fn run(_args: VmArgs) -> Result<()> {
    bail!("written next")
}
