//! `cargo xtask deps`: installs what the other commands need and this machine lacks.
//!
//! Invariant: what is there is left alone, what is installed is said first, and nothing but Debian
//! packages goes outside `target/`. A machine with a toolchain, git and apt is enough.

use std::fs;
use std::path::{Path, PathBuf};
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
    "uidmap",
    "util-linux",
    "xfsprogs",
];

/// What the bench needs beside a toolchain.
pub const BENCH_PACKAGES: &[&str] = &[
    "e2fsprogs",
    "fio",
    "fuse3",
    "gcc",
    "git",
    "libfuse3-dev",
    "linux-perf",
    "mount",
    "openssh-sftp-server",
    "pkg-config",
    "sshfs",
    "util-linux",
];

/// What the demo alone needs.
pub const DEMO_PACKAGES: &[&str] = &["fuse3"];

/// A program that cargo installs into `target/tools`: name and exact version.
pub type CargoTool = (&'static str, &'static str);

/// The POSIX suite.
pub const PJDFSTEST: CargoTool = ("pjdfstest", "0.2.2");
const FSX: CargoTool = ("fsx", "0.3.2");
/// The vhost-user vsock device that docs and step limits were measured with.
pub const VHOST_VSOCK: CargoTool = ("vhost-device-vsock", "0.3.0");
/// The host's end of virtio-fs, whom `bench --vm` compares with.
pub const VIRTIOFSD: CargoTool = ("virtiofsd", "1.14.0");
/// What it is built with.
pub const VIRTIOFSD_PACKAGES: &[&str] = &["libcap-ng-dev", "libseccomp-dev"];
/// Drives libFuzzer; wants a nightly compiler.
pub const CARGO_FUZZ: CargoTool = ("cargo-fuzz", "0.13.1");

/// libfuse's example, built as the peer that shows what a local FUSE file system does.
const PASSTHROUGH_LL: &str = "passthrough_ll";

const APT_LIMIT: Duration = Duration::from_secs(600);
const CARGO_LIMIT: Duration = Duration::from_secs(900);

/// Everything that the tests need.
pub fn all() -> Result<()> {
    debian(TEST_PACKAGES)?;
    cargo_tool(PJDFSTEST)?;
    cargo_tool(FSX)?;
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
    // Where another release's package is in the way (qemu-utils beside an older qemu-system-x86),
    // apt may go back to ours.
    let mut args = vec!["install", "-y", "-qq", "--no-install-recommends", "--allow-downgrades"];
    args.extend(missing);
    if apt(&args).is_ok() {
        return Ok(());
    }
    // A fresh machine has no package lists, an old one such as lead nowhere any more.
    apt_update()?;
    apt(&args).context("apt-get install failed: does it reach a Debian mirror?")
}

/// Has apt read its mirrors' lists anew.
pub fn apt_update() -> Result<()> {
    apt(&["update", "-qq"])
}

fn apt(args: &[&str]) -> Result<()> {
    let apt = Cmd::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive");
    // Another apt may hold the lock for a while, on a machine that has just been started.
    apt.args(["-o", "DPkg::Lock::Timeout=300"]).args(args).limit(APT_LIMIT).run().map(drop)
}

fn installed(package: &str) -> Result<bool> {
    let query = Cmd::new("dpkg-query").args(["-W", "-f=${Status}", package]).output();
    let output = query.context("dpkg-query: these commands install Debian packages")?;
    Ok(output.status.success() && output.text.trim() == "install ok installed")
}

/// Where the tool stands, after building it if it is not there in that version.
pub fn cargo_tool((name, version): CargoTool) -> Result<PathBuf> {
    let path = paths::tools().join("bin").join(name);
    if path.is_file() {
        let said = Cmd::new(&path).arg("--version").output()?;
        if said.text.trim() == format!("{name} {version}") {
            return Ok(path);
        }
    }
    println!("deps: building {name} {version} into {}", paths::tools().display());
    let install = paths::cargo().args(["install", "--quiet", "--locked", "--force", "--root"]);
    let install = install.arg(paths::tools()).args([name, "--version", version]);
    install.limit(CARGO_LIMIT).run()?;
    Ok(path)
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
