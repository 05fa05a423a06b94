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
    /// Builds both in release form; with RINGFS_BIN_DIR set, takes those that stand there (a build
    /// with sanitizers, an older version).
    pub fn build() -> Result<Self> {
        if let Some(dir) = env::var_os("RINGFS_BIN_DIR") {
            return Self::in_dir(Path::new(&dir));
        }
        let limit = Duration::from_secs(1500);
        let packages = ["-p", "ringfs-client", "-p", "ringfs-server-uring"];
        cargo()
            .args(["build", "--release", "--locked", "--bins"])
            .args(packages)
            .limit(limit)
            .show()
            .context("build ringfs and ringfsd")?;
        Self::in_dir(&target().join("release"))
    }

    fn in_dir(dir: &Path) -> Result<Self> {
        let bins = Self { ringfsd: dir.join("ringfsd"), ringfs: dir.join("ringfs") };
        for bin in [&bins.ringfsd, &bins.ringfs] {
            if !bin.is_file() {
                bail!("there is no {}", bin.display());
            }
        }
        Ok(bins)
    }
}
