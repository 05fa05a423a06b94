//! What the shared directory lies on: memory, an ext4 image on a loop device, or a given directory.

use crate::undo::{Guard, Undo};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// As `--backing` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A directory below /dev/shm: measures the path, not a disk.
    Tmpfs,
    /// A new ext4 on a loop device.
    Ext4,
    /// A new directory in this one.
    Dir(PathBuf),
}

impl std::str::FromStr for Backing {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Backing, Self::Err> {
        Ok(match text {
            "tmpfs" => Backing::Tmpfs,
            "ext4" => Backing::Ext4,
            dir => Backing::Dir(dir.into()),
        })
    }
}

/// A directory that exists as long as this value.
#[derive(Debug)]
pub struct Ground {
    dir: PathBuf,
    // Undone in this order.
    _guards: Vec<Guard>,
}

impl Ground {
    /// Makes it.
    pub fn new(backing: &Backing, scratch: &Path) -> Result<Ground> {
        let parent = match backing {
            Backing::Tmpfs => Path::new("/dev/shm"),
            Backing::Dir(dir) => dir,
            Backing::Ext4 => return loop_ext4(scratch, "ground", 2048),
        };
        let (dir, guard) = temporary_dir(parent)?;
        Ok(Ground { dir, _guards: vec![guard] })
    }

    /// Where.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// A new directory in `parent` that vanishes with its guard.
pub fn temporary_dir(parent: &Path) -> Result<(PathBuf, Guard)> {
    let made = tempfile::Builder::new().prefix("ringfs-bench-").tempdir_in(parent);
    let dir = made.with_context(|| format!("make a directory in {parent:?}"))?.keep();
    let guard = Guard::new(Undo::Dir(dir.clone()));
    fs::create_dir_all(&dir)?;
    Ok((dir.canonicalize()?, guard))
}

/// A fresh ext4 of that many MiB, on an image in `scratch`.
pub fn loop_ext4(scratch: &Path, name: &str, mib: u64) -> Result<Ground> {
    let image = scratch.join(format!("{name}.img"));
    fs::File::create(&image)?.set_len(mib << 20)?;
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image))?;
    let device = run(Command::new("losetup").args(["--find", "--show"]).arg(&image))?;
    let device = PathBuf::from(device.trim());
    let looped = Guard::new(Undo::Loop(device.clone()));
    let dir = scratch.join(name);
    fs::create_dir(&dir)?;
    run(Command::new("mount").arg(&device).arg(&dir))?;
    let mounted = Guard::new(Undo::Mount(dir.clone()));
    Ok(Ground { dir, _guards: vec![mounted, looped] })
}

/// Runs a command to its end and gives its output.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run {command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} ended with {}: {errors}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Builds libfuse's example, which Debian ships as source.
pub fn build_passthrough(program: &Path, scratch: &Path) -> Result<()> {
    let examples = Path::new("/usr/share/doc/libfuse3-dev/examples");
    for name in ["passthrough_ll.c", "passthrough_helpers.h"] {
        let (plain, copy) = (examples.join(name), scratch.join(name));
        let packed = examples.join(format!("{name}.gz"));
        if packed.exists() {
            fs::write(&copy, run(Command::new("gzip").arg("-dc").arg(packed))?)?;
        } else {
            fs::copy(&plain, &copy).with_context(|| {
                format!("copy {plain:?}: apt-get install libfuse3-dev gcc pkg-config")
            })?;
        }
    }
    let flags = run(Command::new("pkg-config").args(["--cflags", "--libs", "fuse3"]))?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-o"]).arg(program).arg(scratch.join("passthrough_ll.c"));
    run(gcc.args(flags.split_whitespace())).map(drop)
}
