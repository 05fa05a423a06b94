//! /proc/self/mountinfo, read: which mounts exist, without touching any of them.
//!
//! Invariant: nothing here stats, opens or lists a path on a mount, because one that is dead would
//! park us in an uninterruptible wait.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// One line of mountinfo, of which we need this much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    /// File system type, such as `ext4` or `fuse.ringfs`.
    pub fs_type: String,
    /// What is mounted, as its file system calls it.
    pub source: OsString,
}

impl Mount {
    /// Whether a user-space file system stands behind it.
    pub fn is_fuse(&self) -> bool {
        self.fs_type == "fuse" || self.fs_type.starts_with("fuse.")
    }
}

/// All mounts of this namespace, oldest first.
pub fn all() -> Result<Vec<Mount>> {
    let bytes = fs::read("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    Ok(bytes.split(|byte| *byte == b'\n').filter_map(parse_line).collect())
}

/// The mounts on exactly `path`, topmost first.
pub fn at(path: &Path) -> Result<Vec<Mount>> {
    Ok(all()?.into_iter().rev().filter(|mount| mount.point == path).collect())
}

/// The mounts on and below `path`, deepest and newest first.
pub fn below(path: &Path) -> Result<Vec<Mount>> {
    Ok(all()?.into_iter().rev().filter(|mount| mount.point.starts_with(path)).collect())
}

/// Who has, in another mount namespace than ours, FUSE mounts of a source that names something
/// below `path`, as `PID (NAME)`. A namespace that was made while they were mounted has copies, and
/// they are served until those are gone too, whatever was unmounted here.
pub fn held_elsewhere(path: &Path) -> Result<Vec<String>> {
    let ours = fs::read_link("/proc/self/ns/mnt").context("our mount namespace")?;
    let mut holders = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let of = entry.path();
        // Whoever is gone by now, or no process, has none.
        let (Ok(theirs), Ok(mounts)) =
            (fs::read_link(of.join("ns/mnt")), fs::read(of.join("mountinfo")))
        else {
            continue;
        };
        if theirs != ours && has_fuse_of(&mounts, path) {
            let name = fs::read_to_string(of.join("comm")).unwrap_or_default();
            holders.push(format!("{} ({})", entry.file_name().display(), name.trim_end()));
        }
    }
    Ok(holders)
}

fn has_fuse_of(mountinfo: &[u8], path: &Path) -> bool {
    let path = path.as_os_str().as_bytes();
    let is_of = |mount: Mount| {
        mount.is_fuse() && mount.source.as_bytes().windows(path.len()).any(|part| part == path)
    };
    mountinfo.split(|byte| *byte == b'\n').filter_map(parse_line).any(is_of)
}

/// `36 35 0:45 / /mnt/my\040dir rw,nosuid shared:1 - fuse.ringfs src rw,user_id=0`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let point = PathBuf::from(unescape(fields.nth(4)?));
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
    Some(Mount { point, fs_type, source: unescape(fields.next()?) })
}

/// The kernel writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(u8::is_ascii_digit));
        match digits {
            Some(digits) => {
                let value = digits.iter().fold(0u32, |sum, d| sum * 8 + u32::from(d - b'0'));
                out.push(value as u8);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_the_kernel_writes_them() {
        let line = b"44 27 0:39 / /tmp/a\\040b\\134c rw,nosuid shared:5 - fuse.ringfs x\\040y rw";
        let mount = parse_line(line).unwrap();
        assert_eq!(mount.point, Path::new("/tmp/a b\\c"));
        assert_eq!(mount.source, "x y");
        assert!(mount.is_fuse());
        for odd in [&b""[..], b"1 2 3", b"44 27 0:39 / /a rw -"] {
            assert_eq!(parse_line(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn copies_of_a_mount_are_known_by_their_source() {
        let line = |kind, source| {
            format!("1 1 0:1 / / rw - ext4 /dev/x rw\n44 27 0:39 / /a rw - {kind} {source} rw\n")
        };
        let check = |kind, source, expected| {
            let text = line(kind, source);
            assert_eq!(has_fuse_of(text.as_bytes(), Path::new("/tmp/d")), expected, "{text}");
        };
        check("fuse.ringfs", "x@unix:/tmp/d/p0.sock", true);
        check("fuse.ringfs", "x@unix:/tmp/e/p0.sock", false);
        check("ext4", "/tmp/d/image", false);
    }

    #[test]
    fn this_machine_has_a_root_mount() {
        assert!(all().unwrap().iter().any(|mount| mount.point == Path::new("/")));
        assert_eq!(at(Path::new("/no/such/mount")).unwrap(), []);
    }
}
