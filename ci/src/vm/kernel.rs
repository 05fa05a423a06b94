//! Guest kernels: Debian's, unpacked below target/vm and never installed.
//!
//! A kernel is its vmlinuz and the few modules that the guest loads, in an order in which each
//! finds what it depends on. The order is read from the modules themselves (`depends=` in
//! .modinfo), so neither depmod nor a guest modprobe is needed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

use super::tools;

/// What the guest needs beyond the kernel's image, in no particular order. A name that a kernel
/// has built in, or does not know at all, is left out: the guest's steps show what is missing.
const MODULES: [&str; 8] = [
    "virtio_pci",
    "fuse",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "vsock_loopback",
    "9p",
    "9pnet_virtio",
    "overlay",
];

/// The kernel series that can be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Series {
    /// What Firecracker guests commonly run.
    V6_1,
    /// Debian 13's.
    V6_12,
}

impl Series {
    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }
}

/// One module, ready for insmod.
pub struct Module {
    /// Name without suffix.
    pub name: String,
    /// The object, no longer compressed.
    pub object: Vec<u8>,
}

/// A kernel that can be booted.
pub struct Kernel {
    /// Debian's package name, which holds the whole version.
    pub package: String,
    /// For QEMU's `-kernel`.
    pub image: PathBuf,
    /// In the order in which they load.
    pub modules: Vec<Module>,
}

/// Downloads (once) the newest kernel of `series` and collects its modules.
pub fn fetch(series: Series, cache: &Path) -> anyhow::Result<Kernel> {
    let package = newest(series, cache)?;
    let deb = tools::apt_download(&package, &cache.join("debs"))?;
    let dir = cache.join("kernels").join(&package);
    if !dir.join("unpacked").is_file() {
        unpack(&deb, &dir)?;
    }
    let boot = dir.join("boot");
    let image = only_file(&boot, "vmlinuz-")?;
    let mut files = Vec::new();
    module_files(&dir.join("lib/modules"), &mut files, 0)?;
    let modules = in_load_order(&files)?;
    Ok(Kernel { package, image, modules })
}

/// The newest package name of the series: apt's, else one that was downloaded before (so that a
/// cached kernel boots without a network).
fn newest(series: Series, cache: &Path) -> anyhow::Result<String> {
    let prefix = format!("linux-image-{}.", series.name());
    let mut names = tools::apt_names(&prefix).unwrap_or_default();
    if names.is_empty() {
        let debs = std::fs::read_dir(cache.join("debs")).into_iter().flatten().flatten();
        names = debs
            .filter_map(|e| e.file_name().to_str()?.split('_').next().map(str::to_owned))
            .collect();
    }
    pick_newest(names, &prefix)
        .with_context(|| format!("apt offers no package {prefix}*-amd64 (apt-get update?)"))
}

/// Generic kernels only: cloud kernels have no 9p, and rt and unsigned ones are other builds.
fn pick_newest(names: Vec<String>, prefix: &str) -> Option<String> {
    names
        .into_iter()
        .filter(|name| {
            name.strip_prefix(prefix)
                .and_then(|rest| rest.strip_suffix("-amd64"))
                .is_some_and(|version| !version.ends_with("-cloud") && !version.ends_with("-rt"))
        })
        .max_by_key(|name| version_numbers(name))
}

/// `6.1.0-56` and `6.12.117+deb12` compare well by their runs of digits.
fn version_numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

fn unpack(deb: &Path, dir: &Path) -> anyhow::Result<()> {
    println!("vm: unpacking {}", deb.display());
    if dir.exists() {
        std::fs::remove_dir_all(dir)?;
    }
    std::fs::create_dir_all(dir)?;
    let mut packed = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(Stdio::piped())
        .spawn()
        .context("starting dpkg-deb")?;
    let tar = packed.stdout.take().context("dpkg-deb without a pipe")?;
    // Drivers for real hardware are nine tenths of the package.
    let unpacked = tools::run(
        Command::new("tar")
            .args(["-x", "--wildcards", "-C"])
            .arg(dir)
            .args(["./boot/vmlinuz-*", "*/kernel/fs/*", "*/kernel/net/*", "*/kernel/lib/*"])
            .args(["*/kernel/drivers/virtio/*"])
            .arg("*/kernel/crypto/*")
            .stdin(tar),
    );
    let status = packed.wait()?;
    unpacked?;
    if !status.success() {
        bail!("dpkg-deb {}: {status}", deb.display());
    }
    std::fs::write(dir.join("unpacked"), "")?;
    Ok(())
}

fn only_file(dir: &Path, start: &str) -> anyhow::Result<PathBuf> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(start) {
            return Ok(entry.path());
        }
    }
    bail!("no {start}* in {}", dir.display())
}

/// All module files below `dir`. Debian's trees are a handful of levels deep.
fn module_files(dir: &Path, files: &mut Vec<PathBuf>, depth: u32) -> anyhow::Result<()> {
    const DEPTH_MAX: u32 = 12;
    if depth > DEPTH_MAX {
        return Ok(());
    }
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            module_files(&entry.path(), files, depth + 1)?;
        } else if entry.file_name().to_string_lossy().contains(".ko") {
            files.push(entry.path());
        }
    }
    Ok(())
}

fn in_load_order(files: &[PathBuf]) -> anyhow::Result<Vec<Module>> {
    let mut loaded = Vec::new();
    let mut seen = BTreeSet::new();
    for name in MODULES {
        add_with_dependencies(name, files, &mut seen, &mut loaded)?;
    }
    Ok(loaded)
}

fn add_with_dependencies(
    name: &str,
    files: &[PathBuf],
    seen: &mut BTreeSet<String>,
    loaded: &mut Vec<Module>,
) -> anyhow::Result<()> {
    if !seen.insert(name.to_owned()) {
        return Ok(()); // also ends a circle, which the kernel's build forbids anyway
    }
    let Some(file) = files.iter().find(|file| module_name(file) == Some(name.to_owned())) else {
        return Ok(()); // built in
    };
    let object = decompress(file)?;
    for dependency in depends_on(&object) {
        add_with_dependencies(&dependency, files, seen, loaded)?;
    }
    loaded.push(Module { name: name.to_owned(), object });
    Ok(())
}

/// File names may have a dash where the module has an underscore.
fn module_name(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    Some(name.split(".ko").next()?.replace('-', "_"))
}

fn decompress(file: &Path) -> anyhow::Result<Vec<u8>> {
    let program = match file.extension().and_then(|e| e.to_str()) {
        Some("ko") => return std::fs::read(file).with_context(|| format!("{}", file.display())),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => bail!("{}: unknown compression", file.display()),
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(file)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {program}"))?;
    if !output.status.success() {
        bail!("{program} -dc {}: {}", file.display(), output.status);
    }
    Ok(output.stdout)
}

/// The names in the module's .modinfo entry `depends=a,b`, which is text between NUL bytes.
fn depends_on(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = object.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &object[at + KEY.len()..];
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_generic_kernel_is_picked() {
        fn check(names: &[&str], prefix: &str, expected: Option<&str>) {
            let names = names.iter().map(|&name| name.to_owned()).collect();
            assert_eq!(pick_newest(names, prefix).as_deref(), expected);
        }
        check(
            &[
                "linux-image-6.1.0-9-amd64",
                "linux-image-6.1.0-56-amd64",
                "linux-image-6.1.0-57-cloud-amd64",
                "linux-image-6.1.0-58-rt-amd64",
                "linux-image-6.1.0-59-amd64-dbg",
                "linux-image-6.1.0-60-amd64-unsigned",
            ],
            "linux-image-6.1.",
            Some("linux-image-6.1.0-56-amd64"),
        );
        check(
            &["linux-image-6.12.99+deb12-amd64", "linux-image-6.12.117+deb12-amd64"],
            "linux-image-6.12.",
            Some("linux-image-6.12.117+deb12-amd64"),
        );
        check(&["linux-image-6.12-amd64"], "linux-image-6.12.", None);
    }

    #[test]
    fn dependencies_are_read_from_modinfo() {
        fn check(object: &[u8], expected: &[&str]) {
            assert_eq!(depends_on(object), expected);
        }
        check(b"\x7fELF\0license=GPL\0depends=vsock,a-b\0retpoline=Y\0", &["vsock", "a_b"]);
        check(b"\0depends=\0name=x\0", &[]);
        check(b"\0depends=never ends", &[]);
        check(b"nothing", &[]);
    }

    #[test]
    fn module_names_have_underscores() {
        assert_eq!(
            module_name(Path::new("/m/crc32c-intel.ko.xz")).as_deref(),
            Some("crc32c_intel")
        );
        assert_eq!(module_name(Path::new("/m/9p.ko")).as_deref(), Some("9p"));
    }
}
