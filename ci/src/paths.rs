//! Where things stand: the workspace, what cargo built, the tools that we install.
//!
//! Invariant: nothing is installed outside `target/` but Debian packages.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::proc::Cmd;

/// The workspace's directory.
pub fn root() -> PathBuf {
    let manifest_dir = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest_dir.parent().map_or_else(|| manifest_dir.clone(), Path::to_path_buf)
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// Where `deps` installs cargo-installed and self-built tools.
pub fn tools() -> PathBuf {
    target().join("tools")
}

/// A tool that `deps` installed.
pub fn tool(name: &str) -> Result<PathBuf> {
    let path = tools().join("bin").join(name);
    if !path.is_file() {
        bail!("{} is missing: run `cargo xtask deps`", path.display());
    }
    Ok(path)
}

/// The cargo that runs us.
pub fn cargo() -> Cmd {
    Cmd::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).dir(root())
}

/// The two programs of ringfs.
#[derive(Clone, Debug)]
pub struct Bins {
    /// The host daemon.
    pub ringfsd: PathBuf,
    /// The guest's mount client.
    pub ringfs: PathBuf,
}

impl Bins {
    /// Builds both in release form.
    pub fn build() -> Result<Self> {
        let limit = Duration::from_secs(1500);
        let packages = ["-p", "ringfs-client", "-p", "ringfs-server-uring"];
        cargo()
            .args(["build", "--release", "--locked", "--bins"])
            .args(packages)
            .limit(limit)
            .show()
            .context("build ringfs and ringfsd")?;
        let release = target().join("release");
        let bins = Self { ringfsd: release.join("ringfsd"), ringfs: release.join("ringfs") };
        for bin in [&bins.ringfsd, &bins.ringfs] {
            if !bin.is_file() {
                bail!("cargo built no {}", bin.display());
            }
        }
        Ok(bins)
    }
}
