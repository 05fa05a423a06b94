//! A scratch place for one run: directories and loop file systems, all gone at the end.
//!
//! Invariant: everything stands below one directory named after our process id, and every piece is
//! in the undo list. What a killed run left behind is swept by the next one, and nothing else is.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, mount};

use crate::guard::{self, Guard, Undo};
use crate::mounts;
use crate::paths;
use crate::proc::Cmd;

/// Directories are called `PREFIX.pid.n`; short, because socket paths hold 107 bytes.
const PREFIX: &str = "ringfs-xtask";

/// A temporary directory.
#[derive(Debug)]
pub struct Sandbox {
    dir: PathBuf,
    _guard: Guard,
}

impl Sandbox {
    /// Makes an empty one, after sweeping what dead runs left.
    pub fn new() -> Result<Self> {
        Self::within(&std::env::temp_dir())
    }

    /// The same in memory, whatever holds the machine's temporary files.
    pub fn in_memory() -> Result<Self> {
        Self::within(Path::new("/dev/shm"))
    }

    fn within(parent: &Path) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        sweep(parent);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = parent.join(format!("{PREFIX}.{}.{n}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Self { _guard: Guard::new(Undo::Dir(dir.clone())), dir })
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Copies its logs to `dir`, where they outlive the run.
    pub fn keep_logs(&self, dir: &Path) {
        let copied = fs::create_dir_all(dir).and_then(|()| {
            for entry in fs::read_dir(&self.dir)?.flatten() {
                if entry.path().extension().is_some_and(|extension| extension == "log") {
                    fs::copy(entry.path(), dir.join(entry.file_name()))?;
                }
            }
            Ok(())
        });
        if let Err(error) = copied {
            eprintln!("xtask: cannot keep the logs in {}: {error}", dir.display());
        }
    }

    /// The same where `result` is an error, in a directory of `target` called `name`, and the
    /// error says so.
    pub fn logged<T>(&self, name: &str, result: Result<T>) -> Result<T> {
        if result.is_ok() {
            return result;
        }
        let dir = paths::target().join(name);
        self.keep_logs(&dir);
        result.with_context(|| format!("logs in {}", dir.display()))
    }

    /// A new directory in it.
    pub fn make_dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(path)
    }
}

/// Takes away what runs that were killed left: only what carries our name and a dead process id.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('.')) else {
            continue;
        };
        let pid = rest.split('.').next().and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            drop(Guard::new(Undo::Dir(entry.path())));
        }
    }
}

/// A file system in an image file, mounted.
#[derive(Debug)]
pub struct LoopFs {
    /// Where it is mounted.
    pub dir: PathBuf,
    // In the order in which they are undone.
    mounted: Option<Guard>,
    device: Option<Guard>,
}

/// What a loop file system is made of.
#[derive(Clone, Copy, Debug)]
pub struct LoopShape {
    /// `ext4` or `xfs`.
    pub fs_type: &'static str,
    /// Size of the (sparse) image.
    pub bytes: u64,
    /// Logical sector size of the loop device: 512 or 4096.
    pub sector_bytes: u32,
}

impl LoopShape {
    /// ext4 with 4096-byte blocks on 512-byte sectors.
    pub const fn ext4(bytes: u64) -> Self {
        Self { fs_type: "ext4", bytes, sector_bytes: 512 }
    }
}

impl LoopFs {
    /// Makes an image called `name`, a file system in it, and mounts it (needs root).
    pub fn new(sandbox: &Sandbox, name: &str, shape: LoopShape) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!("a loop mount needs root: run the same command with sudo");
        }
        let image = sandbox.path(&format!("{name}.img"));
        File::create(&image)?.set_len(shape.bytes)?;
        let losetup = Cmd::new("losetup").args(["--find", "--show", "--sector-size"]);
        let losetup = losetup.arg(shape.sector_bytes.to_string()).arg(&image);
        let device = losetup.run().context("attach a loop device (modprobe loop?)")?;
        let device = PathBuf::from(device.trim());
        let device_guard = Guard::new(Undo::Loop(device.clone()));
        let quiet = if shape.fs_type == "ext4" { ["-q", "-F"] } else { ["-q", "-f"] };
        Cmd::new(format!("mkfs.{}", shape.fs_type)).args(quiet).arg(&device).run()?;
        let dir = sandbox.make_dir(name)?;
        mount(&device, &dir, shape.fs_type, MountFlags::empty(), None)
            .with_context(|| format!("mount {} on {}", device.display(), dir.display()))?;
        let mounted = Some(Guard::new(Undo::Mount(dir.clone())));
        Ok(Self { dir, mounted, device: Some(device_guard) })
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        drop(self.mounted.take());
        drop(self.device.take());
    }
}

/// Waits until nothing is mounted on `path` any more.
pub fn wait_unmounted(path: &Path, limit: Duration) -> Result<()> {
    guard::poll_until(limit, || Ok(mounts::at(path)?.is_empty()))?
        .then_some(())
        .with_context(|| format!("{} is still mounted after {limit:?}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_file_system_comes_and_goes() {
        let sandbox = Sandbox::new().unwrap();
        let fs = LoopFs::new(&sandbox, "disk", LoopShape::ext4(32 << 20));
        if !rustix::process::geteuid().is_root() {
            assert!(fs.unwrap_err().to_string().contains("sudo"));
            return;
        }
        let fs = fs.unwrap();
        let dir = fs.dir.clone();
        std::fs::write(dir.join("file"), "x").unwrap();
        assert_eq!(mounts::at(&dir).unwrap()[0].fs_type, "ext4");
        drop(fs);
        assert!(mounts::at(&dir).unwrap().is_empty());
        let path = sandbox.path("");
        drop(sandbox);
        assert!(!path.exists());
    }
}
