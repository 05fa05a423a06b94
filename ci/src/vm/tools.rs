//! What a guest run needs from outside: Debian packages, crates that are programs, our binaries.
//!
//! Everything is installed once and found again; nothing is built twice for the same flags (the
//! static client has a target directory of its own, so that its RUSTFLAGS do not thrash the
//! cache). Nothing here starts a guest.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};

use super::scenario::{self, Scenario, Step};
use crate::deps;

/// The guest client must run where no libc is installed.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Paths of the programs that a run starts.
pub struct Tools {
    /// QEMU, from Debian.
    pub qemu: PathBuf,
    /// Debian's static busybox: the whole user land of the initramfs.
    pub busybox: PathBuf,
    /// rust-vmm's vhost-user device for AF_VSOCK.
    pub vhost_vsock: PathBuf,
    /// The test suite, when the scenario wants it.
    pub pjdfstest: Option<PathBuf>,
    /// Ours, when the plan wants it.
    pub product: Option<Product>,
    /// The guest's end of the echo, `ci/examples/vsock_ping.rs`.
    pub ping: PathBuf,
    /// What `bench --vm` needs beside.
    pub bench: Option<Bench>,
}

/// The programs of `bench --vm`.
pub struct Bench {
    /// The host's end of virtio-fs.
    pub virtiofsd: PathBuf,
    /// `ringfs-bench`, run in the guest.
    pub program: PathBuf,
}

/// The programs under test.
pub struct Product {
    /// Statically linked `ringfs`.
    pub client: PathBuf,
    /// `ringfsd` of the host, also run in the guest for the loopback steps.
    pub daemon: PathBuf,
}

impl Tools {
    /// Installs and builds what `plan` needs and is missing. `root` is the repository.
    pub fn ready(root: &Path, plan: &[Step]) -> anyhow::Result<Self> {
        let want_pjdfstest = plan.iter().any(|step| step.name.contains("pjdfstest"));
        let want_bench = plan.iter().any(|step| step.name == scenario::BENCH.name);
        // The steps of the scenario `boot`, and some on demand, go without.
        let want_product = want_bench
            || plan.iter().any(|step| {
                matches!(step.from, Scenario::Smoke | Scenario::Full | Scenario::Rootfs)
            });
        // util-linux: setpriv; xz-utils: the modules of a guest's kernel.
        let mut packages =
            vec!["qemu-system-x86", "busybox-static", "xz-utils", "util-linux", "fio"];
        if want_pjdfstest {
            packages.extend(["acl", "libacl1-dev"]);
        }
        if want_bench {
            packages.extend(deps::VIRTIOFSD_PACKAGES);
        }
        deps::debian(&packages)?;
        let pjdfstest = want_pjdfstest.then(|| deps::cargo_tool(deps::PJDFSTEST)).transpose()?;
        Ok(Self {
            qemu: find("qemu-system-x86_64")?,
            busybox: find("busybox")?,
            vhost_vsock: deps::cargo_tool(deps::VHOST_VSOCK)?,
            pjdfstest,
            product: want_product.then(|| product(root)).transpose()?,
            ping: ping(root)?,
            bench: want_bench.then(|| bench(root)).transpose()?,
        })
    }
}

/// Downloads `package` (a .deb, not installed) into `dir` and returns the file.
pub fn apt_download(package: &str, dir: &Path) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(dir)?;
    if let Some(found) = deb_of(package, dir)? {
        return Ok(found);
    }
    println!("vm: downloading {package}");
    // `_apt` cannot write below a private directory; root fetches, as apt itself then says.
    run(Command::new("apt-get")
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
        .current_dir(dir)
        .stdout(Stdio::null()))?;
    deb_of(package, dir)?.with_context(|| format!("apt-get download {package} left no file"))
}

/// The names of all packages that apt knows and that start with `prefix`.
pub fn apt_names(prefix: &str) -> anyhow::Result<Vec<String>> {
    let names = || -> anyhow::Result<Vec<String>> {
        let text = output(Command::new("apt-cache").args(["pkgnames", prefix]))?;
        Ok(text.lines().map(str::to_owned).collect())
    };
    let found = names()?;
    if !found.is_empty() {
        return Ok(found);
    }
    deps::apt_update()?; // a fresh machine has no package lists
    names()
}

/// Runs a command to its end; an exit code other than 0 is an error that names the command.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// Like [`run`], and returns what was printed.
pub fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    String::from_utf8(output.stdout).with_context(|| format!("{command:?} printed no UTF-8"))
}

fn deb_of(package: &str, dir: &Path) -> anyhow::Result<Option<PathBuf>> {
    let start = format!("{package}_");
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        if name.starts_with(&start) && name.ends_with(".deb") {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

fn find(program: &str) -> anyhow::Result<PathBuf> {
    which(program).with_context(|| format!("{program} is not in PATH"))
}

fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Debian keeps some programs out of a plain user's PATH.
    let more = ["/usr/sbin", "/sbin"].into_iter().map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|dir| dir.join(program)).find(|p| p.is_file())
}

fn product(root: &Path) -> anyhow::Result<Product> {
    Ok(Product { client: static_program(root, "ringfs-client", "ringfs")?, daemon: daemon(root)? })
}

/// Builds a program of ours that needs no libc where it runs.
pub fn static_program(root: &Path, package: &str, name: &str) -> anyhow::Result<PathBuf> {
    let target = root.join("target/static");
    run(cargo(root)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["build", "--quiet", "--release", "--locked", "-p", package, "--bin", name])
        .args(["--target", STATIC_TARGET, "--target-dir"])
        .arg(&target))?;
    let program = target.join(STATIC_TARGET).join("release").join(name);
    let kind = std::fs::read(&program).with_context(|| format!("reading {}", program.display()))?;
    if has_interpreter(&kind) {
        bail!("{} is not static: it asks for a dynamic loader", program.display());
    }
    Ok(program)
}

fn daemon(root: &Path) -> anyhow::Result<PathBuf> {
    run(cargo(root).args([
        "build",
        "--quiet",
        "--release",
        "-p",
        "ringfs-server-uring",
        "--bin",
        "ringfsd",
    ]))?;
    Ok(root.join("target/release/ringfsd"))
}

fn bench(root: &Path) -> anyhow::Result<Bench> {
    let virtiofsd = deps::cargo_tool(deps::VIRTIOFSD)?;
    run(cargo(root).args(["build", "--quiet", "--release", "-p", "ringfs-benches"]))?;
    Ok(Bench { virtiofsd, program: root.join("target/release/ringfs-bench") })
}

fn ping(root: &Path) -> anyhow::Result<PathBuf> {
    run(cargo(root).args(["build", "--quiet", "-p", "xtask", "--example", "vsock_ping"]))?;
    Ok(root.join("target/debug/examples/vsock_ping"))
}

fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    // What `cargo run` put there for us is not meant for another package's build.
    for (key, _) in std::env::vars_os() {
        let name = key.to_string_lossy().into_owned();
        if name.starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR" {
            command.env_remove(key);
        }
    }
    command
}

/// Whether an ELF file for x86-64 has a PT_INTERP header, that is, needs a dynamic loader.
fn has_interpreter(elf: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let u16_at = |at: usize| elf.get(at..at + 2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    let headers_at = elf.get(32..40).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let (Some(start), Some(size), Some(count)) = (headers_at, u16_at(54), u16_at(56)) else {
        return false;
    };
    (0..usize::from(count)).any(|i| {
        let at = usize::try_from(start).unwrap_or(usize::MAX).saturating_add(i * usize::from(size));
        elf.get(at..at.saturating_add(4)) == Some(&PT_INTERP.to_le_bytes()[..])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpreter_is_seen_in_a_dynamic_program_only() {
        let this_test = std::fs::read("/proc/self/exe").expect("own program");
        assert!(has_interpreter(&this_test));
        for garbage in [&b""[..], b"\x7fELF", &[0xff; 64]] {
            assert!(!has_interpreter(garbage));
        }
    }
}
