//! What is mounted, from `/proc/self/mountinfo`: the only way to ask about a mount that may be
//! dead.
//!
//! ```text
//! 36 35 0:98 / /mnt\040a rw,nosuid master:1 - fuse.ringfs share@unix:/s rw,user_id=0
//! id parent dev root mount-point options tags* - type source super-options      (proc(5))
//! ```
//!
//! Invariant: no path of a mount is ever touched here (a stat of a dead one parks its task in the
//! kernel). Lines that do not parse are left out.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The type that our mounts carry in the mount table.
pub const FS_TYPE: &str = "fuse.ringfs";

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// One mount of this process's mount namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    /// The mount's id; the kernel uses it again once the mount is gone.
    pub mount_id: u32,
    /// The id of the mount below.
    pub parent_id: u32,
    /// The file system's device; 0 for FUSE.
    pub dev_major: u32,
    /// For FUSE the connection's number under `/sys/fs/fuse/connections`.
    pub dev_minor: u32,
    /// What of the file system is mounted (not `/` for bind mounts of a part).
    pub root: PathBuf,
    /// Where.
    pub mount_point: PathBuf,
    /// Options of the mount (`rw,nosuid,nodev`).
    pub options: String,
    /// The type (`fuse.ringfs`).
    pub fs_type: String,
    /// The source (`share@vsock:2:5640`).
    pub source: OsString,
    /// Options of the file system (`rw,user_id=0,group_id=0,allow_other`).
    pub super_options: String,
}

impl MountInfo {
    /// Whether any FUSE daemon stands behind it.
    pub fn is_fuse(&self) -> bool {
        matches!(self.fs_type.as_str(), "fuse" | "fuseblk")
            || self.fs_type.starts_with("fuse.")
            || self.fs_type.starts_with("fuseblk.")
    }

    /// Whether nothing can be written by it.
    pub fn is_read_only(&self) -> bool {
        self.has("ro")
    }

    /// Whether `word` stands among its options, or those of its file system.
    pub fn has(&self, word: &str) -> bool {
        let lists = [&self.options, &self.super_options];
        lists.iter().any(|list| list.split(',').any(|one| one == word))
    }

    /// Whether it is one of ours.
    pub fn is_ringfs(&self) -> bool {
        self.fs_type == FS_TYPE
    }
}

/// The ringfs mounts of this mount namespace, in the kernel's order.
pub fn find_mounts() -> io::Result<Vec<MountInfo>> {
    let mut all = all_mounts()?;
    all.retain(MountInfo::is_ringfs);
    Ok(all)
}

/// Every mount of this mount namespace.
pub(crate) fn all_mounts() -> io::Result<Vec<MountInfo>> {
    Ok(parse(&fs::read(MOUNTINFO)?))
}

/// The mount that a path's users see where several are stacked on `mount_point`.
pub(crate) fn top_at<'a>(mounts: &'a [MountInfo], mount_point: &Path) -> Option<&'a MountInfo> {
    let here = || mounts.iter().filter(|mount| mount.mount_point == mount_point);
    here().rfind(|one| !here().any(|other| other.parent_id == one.mount_id))
}

fn parse(table: &[u8]) -> Vec<MountInfo> {
    table.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mount_id = number(fields.next()?)?;
    let parent_id = number(fields.next()?)?;
    let mut device = fields.next()?.split(|&byte| byte == b':');
    let (dev_major, dev_minor) = (number(device.next()?)?, number(device.next()?)?);
    let root = path(fields.next()?);
    let mount_point = path(fields.next()?);
    let options = text(fields.next()?);
    fields.find(|&field| field == b"-")?;
    Some(MountInfo {
        mount_id,
        parent_id,
        dev_major,
        dev_minor,
        root,
        mount_point,
        options,
        fs_type: text(fields.next()?),
        source: OsString::from_vec(unescape(fields.next()?)),
        super_options: text(fields.next().unwrap_or_default()),
    })
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn path(field: &[u8]) -> PathBuf {
    OsString::from_vec(unescape(field)).into()
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&unescape(field)).into_owned()
}

/// Undoes the kernel's `\ooo` for blanks, tabs, newlines, backslashes and `#`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        rest = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] if *first == b'\\' => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                after
            }
            _ => {
                out.push(*first);
                tail
            }
        };
    }
    out
}

/// Whether `path` is a mount point of type `fs_type`, by the table alone.
pub(crate) fn is_mounted_as(path: &Path, fs_type: &str) -> bool {
    all_mounts()
        .is_ok_and(|mounts| top_at(&mounts, path).is_some_and(|mount| mount.fs_type == fs_type))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn lines_of_every_shape() {
        let table = b"22 27 0:21 / /proc rw,relatime - proc proc rw\n\
            60 27 0:44 / /mnt/a\\040b\\134c\\011 rw,nosuid shared:1 master:2 - fuse.ringfs \
            share@unix:/s\\040x rw,user_id=0\n\
            61 60 0:45 /sub /mnt/\xff rw - fuse none rw\n\
            62 60 0:46 / /mnt/short rw - fuse.sshfs\n\
            bad line\n\
            63 x 0:46 / /mnt/y rw - tmpfs tmpfs rw\n\n";
        let mounts = parse(table);
        let points: Vec<_> = mounts.iter().map(|mount| mount.mount_point.as_path()).collect();
        let odd = Path::new(std::ffi::OsStr::from_bytes(b"/mnt/\xff"));
        assert_eq!(points, [Path::new("/proc"), Path::new("/mnt/a b\\c\t"), odd]);
        let ours = &mounts[1];
        assert!(ours.is_ringfs() && ours.is_fuse());
        assert!(mounts[2].is_fuse() && !mounts[2].is_ringfs() && !mounts[0].is_fuse());
        assert_eq!((ours.mount_id, ours.parent_id, ours.dev_minor), (60, 27, 44));
        assert_eq!(ours.source, "share@unix:/s x");
        assert_eq!((&*ours.options, &*ours.super_options), ("rw,nosuid", "rw,user_id=0"));
        assert_eq!(mounts[2].root, Path::new("/sub"));
    }

    #[test]
    fn escapes() {
        let check = |field: &[u8], expected: &[u8]| assert_eq!(unescape(field), expected);
        check(b"", b"");
        check(b"\\040", b" ");
        check(b"a\\", b"a\\");
        check(b"a\\04", b"a\\04");
        check(b"\\999", b"\\999");
        check(b"\\477", b"\\477");
        check(b"\\377\\000", b"\xff\0");
        check(b"\\134040", b"\\040");
    }

    #[test]
    fn the_top_of_a_stack_is_nobodys_parent() {
        let table = b"70 27 0:50 / /m rw - fuse.ringfs upper rw\n\
            60 70 0:44 / /m rw - tmpfs top rw\n\
            62 60 0:44 / /m/below rw - tmpfs other rw\n";
        let mounts = parse(table);
        assert_eq!(top_at(&mounts, Path::new("/m")).map(|mount| mount.mount_id), Some(60));
        assert_eq!(top_at(&mounts, Path::new("/n")), None);
    }

    #[test]
    fn the_real_table_parses() {
        assert!(is_mounted_as(Path::new("/proc"), "proc"));
        assert!(find_mounts().expect("mountinfo").iter().all(MountInfo::is_ringfs));
    }
}
