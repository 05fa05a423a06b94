//! `cargo xtask deps`: installs what the other commands need and this machine lacks.
//!
//! Invariant: what is there is left alone, what is installed is said first, and nothing but Debian
//! packages goes outside `target/`. A machine with a toolchain, git and apt is enough.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::paths;
use crate::proc::Cmd;

/// Debian packages of the file-system tests.
pub const TEST_PACKAGES: &[&str] = &[
    "acl",
    "attr",
    "e2fsprogs",
    "fio",
    "fuse3",
    "gcc",
    "git",
    "libacl1-dev",
    "libfuse3-dev",
    "mount",
    "pkg-config",
    "procps",
    "stress-ng",
    "util-linux",
    "xfsprogs",
];

/// What the demo alone needs.
pub const DEMO_PACKAGES: &[&str] = &["fuse3"];

/// Tools that cargo installs into `target/tools`: name and exact version.
const CARGO_TOOLS: &[(&str, &str)] = &[("pjdfstest", "0.2.2"), ("fsx", "0.3.2")];

/// libfuse's example, built as the peer that shows what a local FUSE file system does.
const PASSTHROUGH_LL: &str = "passthrough_ll";

const APT_LIMIT: Duration = Duration::from_secs(600);
const CARGO_LIMIT: Duration = Duration::from_secs(900);

/// Everything that the tests need.
pub fn all() -> Result<()> {
    debian(TEST_PACKAGES)?;
    for (name, version) in CARGO_TOOLS {
        cargo_tool(name, version)?;
    }
    passthrough_ll()
}

/// Installs those of `packages` that are missing.
pub fn debian(packages: &[&str]) -> Result<()> {
    let mut missing = Vec::new();
    for package in packages {
        if !installed(package)? {
            missing.push(*package);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !rustix::process::geteuid().is_root() {
        bail!(
            "Debian packages are missing; run this first:\n  \
             sudo apt-get update && sudo apt-get install --no-install-recommends {list}"
        );
    }
    println!("deps: installing Debian packages: {list}");
    apt(&["update", "-qq"])?;
    let mut args = vec!["install", "-y", "-qq", "--no-install-recommends"];
    args.extend(missing);
    apt(&args)
}

fn apt(args: &[&str]) -> Result<()> {
    let apt = Cmd::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive");
    // Another apt may hold the lock for a while, on a machine that has just been started.
    apt.args(["-o", "DPkg::Lock::Timeout=120"]).args(args).limit(APT_LIMIT).run().map(drop)
}

fn installed(package: &str) -> Result<bool> {
    let query = Cmd::new("dpkg-query").args(["-W", "-f=${Status}", package]).output();
    let output = query.context("dpkg-query: these commands install Debian packages")?;
    Ok(output.status.success() && output.text.trim() == "install ok installed")
}

fn cargo_tool(name: &str, version: &str) -> Result<()> {
    let path = paths::tools().join("bin").join(name);
    if path.is_file() {
        let said = Cmd::new(&path).arg("--version").output()?;
        if said.text.trim() == format!("{name} {version}") {
            return Ok(());
        }
    }
    println!("deps: building {name} {version} into {}", paths::tools().display());
    let install = paths::cargo().args(["install", "--quiet", "--locked", "--force", "--root"]);
    let install = install.arg(paths::tools()).args([name, "--version", version]);
    install.limit(CARGO_LIMIT).run().map(drop)
}

fn passthrough_ll() -> Result<()> {
    let program = paths::tools().join("bin").join(PASSTHROUGH_LL);
    if program.is_file() {
        return Ok(());
    }
    let examples = Path::new("/usr/share/doc/libfuse3-dev/examples");
    let build = paths::tools().join("src");
    fs::create_dir_all(&build)?;
    for name in ["passthrough_ll.c", "passthrough_helpers.h"] {
        unpack(&examples.join(name), &build.join(name))?;
    }
    println!("deps: building libfuse's {PASSTHROUGH_LL} into {}", paths::tools().display());
    let flags = Cmd::new("pkg-config").args(["--cflags", "--libs", "fuse3"]).run()?;
    let gcc = Cmd::new("gcc").dir(&build).args(["-O2", "passthrough_ll.c", "-o"]).arg(&program);
    gcc.args(flags.split_whitespace()).run().map(drop)
}

/// Debian compresses some documentation files, depending on their size.
fn unpack(from: &Path, to: &Path) -> Result<()> {
    let mut packed = from.as_os_str().to_owned();
    packed.push(".gz");
    if Path::new(&packed).is_file() {
        let text = Cmd::new("gzip").args(["-dc"]).arg(&packed).run()?;
        fs::write(to, text)?;
    } else {
        fs::copy(from, to).with_context(|| {
            format!("copy {} (does dpkg drop /usr/share/doc here?)", from.display())
        })?;
    }
    Ok(())
}
