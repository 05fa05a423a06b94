//! /proc/self/mountinfo, read: which mounts exist, without touching any of them.
//!
//! Invariant: nothing here stats, opens or lists a path on a mount, because one that is dead would
//! park us in an uninterruptible wait.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// One line of mountinfo, of which we need this much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    /// File system type, such as `ext4` or `fuse.ringfs`.
    pub fs_type: String,
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

/// `36 35 0:45 / /mnt/my\040dir rw,nosuid shared:1 - fuse.ringfs src rw,user_id=0`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let point = PathBuf::from(unescape(fields.nth(4)?));
    let fs_type = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mount { point, fs_type: String::from_utf8_lossy(fs_type).into_owned() })
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
        assert!(mount.is_fuse());
        for odd in [&b""[..], b"1 2 3", b"44 27 0:39 / /a rw -"] {
            assert_eq!(parse_line(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn this_machine_has_a_root_mount() {
        assert!(all().unwrap().iter().any(|mount| mount.point == Path::new("/")));
        assert_eq!(at(Path::new("/no/such/mount")).unwrap(), []);
    }
}
