//! What we tell the kernel unasked: that an inode or a name is stale, gone, or to be asked again.
//!
//! ```text
//! | OutHeader 16: len, error = the code, unique = 0 | NotifyXxxOut | name, NUL |
//! ```
//!
//! Invariant: a notification goes to any fd of the session, whole, in one write. What the kernel
//! says about its own cache (nothing cached, still in use) is an outcome.
//!
//! **Trap**: the kernel takes the parent's inode lock for names, and waits for locked pages for
//! inodes. A thread that serves requests of the same mount must never send these, or it waits for a
//! task which waits for it; and a process whose thread waits so does not end when it is killed.
//! [`Notice::resend`] and [`Notice::inc_epoch`] wait for nothing, [`Notice::prune`] for no request,
//! and [`store`] for none where none can have locked a page: of a node that nobody has opened.

use ringfs_wire::abi::{
    NotifyDeleteOut, NotifyInvalEntryOut, NotifyInvalInodeOut, NotifyPruneOut, OutHeader,
    notify as code,
};
use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use crate::device::{Device, DeviceError, io_error};

/// The longest name that every kernel takes (`FUSE_NAME_MAX`), bytes.
pub const NAME_BYTES_MAX: usize = 1024;

/// The name can be none of a directory entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the name of a directory entry: {why}")]
pub struct NameError {
    why: &'static str,
}

/// What became of a notification.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotifyOutcome {
    /// The kernel did it.
    Done,
    /// `ENOENT` or `ENOTDIR`: nothing of the kind is cached. As good as done.
    NotCached,
    /// `ENOTEMPTY` or `EBUSY` (DELETE): a directory with entries, or a mount point.
    InUse,
    /// `ENOSYS`, or `EINVAL` for a code that this kernel does not know.
    Unsupported,
    /// The mount is gone, or was never there.
    Unmounted,
}

/// A whole notification, ready to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice(Vec<u8>);

impl Notice {
    /// Drops cached attributes of `nodeid`, and its pages from `offset` on: `len` bytes, 0 for all
    /// that follow. A negative offset drops attributes alone.
    pub fn inval_inode(nodeid: u64, offset: i64, len: i64) -> Notice {
        let body = NotifyInvalInodeOut { ino: nodeid, off: offset, len };
        Notice::build(code::INVAL_INODE, &body, &[])
    }

    /// Drops the cached entry `name` of `parent`, with all below it.
    pub fn inval_entry(parent: u64, name: &[u8]) -> Result<Notice, NameError> {
        Notice::entry(parent, name, 0)
    }

    /// Ends the validity of an entry: it is looked up again at its next use, and not dropped while
    /// in use. For kernels that offer `HAS_EXPIRE_ONLY` in INIT; older ones drop the entry.
    pub fn expire_entry(parent: u64, name: &[u8]) -> Result<Notice, NameError> {
        Notice::entry(parent, name, code::EXPIRE_ONLY)
    }

    /// Like [`Notice::inval_entry`], for a file that was removed: if the entry still names `child`,
    /// watchers see its deletion.
    pub fn delete(parent: u64, child: u64, name: &[u8]) -> Result<Notice, NameError> {
        let namelen = check_name(name)?;
        let body = NotifyDeleteOut { parent, child, namelen, padding: 0 };
        Ok(Notice::build(code::DELETE, &body, &with_nul(name)))
    }

    /// Asks for all requests in work again, each with bit 63 of `unique` (for kernels that offer
    /// `HAS_RESEND`). They may come by another clone than before, and then belong to that one.
    pub fn resend() -> Notice {
        Notice::build(code::RESEND, &(), &[])
    }

    /// Ends the validity of all cached entries of the mount (6.16).
    pub fn inc_epoch() -> Notice {
        Notice::build(code::INC_EPOCH, &(), &[])
    }

    /// Asks for nodes that nobody uses to be forgotten (6.18). Those in use stay.
    pub fn prune(nodes: &[u64]) -> Notice {
        let body = NotifyPruneOut { count: nodes.len() as u32, ..Default::default() };
        Notice::build(code::PRUNE, &body, nodes.as_bytes())
    }

    /// The bytes, as they are written.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// write(2) to an fd of the session. See the file's head for who must not do this.
    pub fn send(&self, device: &Device) -> Result<NotifyOutcome, DeviceError> {
        send(device, &self.0)
    }

    fn entry(parent: u64, name: &[u8], flags: u32) -> Result<Notice, NameError> {
        let namelen = check_name(name)?;
        let body = NotifyInvalEntryOut { parent, namelen, flags };
        Ok(Notice::build(code::INVAL_ENTRY, &body, &with_nul(name)))
    }

    fn build(code: i32, body: &(impl IntoBytes + Immutable), tail: &[u8]) -> Notice {
        let len = size_of::<OutHeader>() + body.as_bytes().len() + tail.len();
        // A name or some node ids: the cast cannot cut.
        let header = OutHeader { len: len as u32, error: code, unique: 0 };
        Notice([header.as_bytes(), body.as_bytes(), tail].concat())
    }
}

/// Puts bytes into the page cache: `frame` is room for a head, `NotifyStoreOut` and the bytes.
/// Where they reach beyond the end of the file that the kernel knows, it is moved; a page is filled
/// whole, or up to that end.
pub fn store(device: &Device, frame: &mut [u8]) -> Result<NotifyOutcome, DeviceError> {
    let len = u32::try_from(frame.len()).unwrap_or(u32::MAX);
    let head = OutHeader { len, error: code::STORE, unique: 0 };
    let Some(room) = frame.get_mut(..size_of::<OutHeader>()) else {
        return Ok(NotifyOutcome::Unsupported);
    };
    room.copy_from_slice(head.as_bytes());
    send(device, frame)
}

/// Whether a kernel of this release clears what is behind the end of a file in a page that
/// [`store`] fills. Others show there what their memory held before (CVE-2024-44947).
pub fn store_is_clean(release: &str) -> bool {
    const FIXED: [(u32, u32, u32); 7] = [
        (4, 19, 321),
        (5, 4, 283),
        (5, 10, 225),
        (5, 15, 166),
        (6, 1, 107),
        (6, 6, 48),
        (6, 10, 7),
    ];
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    let (major, minor, patch) = (next(), next(), next());
    (major, minor) >= (6, 11)
        || FIXED.iter().any(|&(a, b, c)| (a, b) == (major, minor) && c <= patch)
}

fn send(device: &Device, frame: &[u8]) -> Result<NotifyOutcome, DeviceError> {
    match device.write_notice(frame) {
        Ok(len) if len == frame.len() => Ok(NotifyOutcome::Done),
        Ok(_) => Err(io_error("write the whole of a notification to", Errno::IO)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(NotifyOutcome::NotCached),
        Err(Errno::NOTEMPTY | Errno::BUSY) => Ok(NotifyOutcome::InUse),
        Err(Errno::NOSYS | Errno::INVAL) => Ok(NotifyOutcome::Unsupported),
        Err(Errno::NODEV | Errno::CONNABORTED | Errno::PERM) => Ok(NotifyOutcome::Unmounted),
        Err(errno) => Err(io_error("notify", errno)),
    }
}

fn with_nul(name: &[u8]) -> Vec<u8> {
    [name, b"\0"].concat()
}

fn check_name(name: &[u8]) -> Result<u32, NameError> {
    let refuse = |why| Err(NameError { why });
    match name {
        b"" => refuse("it is empty"),
        b"." | b".." => refuse("it is a dot name"),
        _ if name.contains(&b'/') => refuse("it has a slash"),
        _ if name.contains(&0) => refuse("it has a NUL"),
        _ if name.len() > NAME_BYTES_MAX => refuse("it is longer than 1024 bytes"),
        _ => Ok(name.len() as u32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let check = |notice: Notice, words: &[u32], name: &[u8]| {
            let head: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            assert_eq!(notice.as_bytes(), [&head[..], name].concat());
        };
        let minus = u32::MAX;
        check(Notice::inval_inode(5, -1, 0), &[40, 2, 0, 0, 5, 0, minus, minus, 0, 0], b"");
        let entry = Notice::inval_entry(1, b"ab").expect("name");
        check(entry, &[35, 3, 0, 0, 1, 0, 2, 0], b"ab\0");
        let entry = Notice::expire_entry(1, b"ab").expect("name");
        check(entry, &[35, 3, 0, 0, 1, 0, 2, 1], b"ab\0");
        let entry = Notice::delete(1, 9, b"x").expect("name");
        check(entry, &[42, 6, 0, 0, 1, 0, 9, 0, 1, 0], b"x\0");
        check(Notice::resend(), &[16, 7, 0, 0], b"");
        check(Notice::inc_epoch(), &[16, 8, 0, 0], b"");
        let prune = Notice::prune(&[5, 7]);
        check(prune, &[48, 9, 0, 0, 2, 0, 0, 0, 5, 0, 7, 0], b"");
    }

    #[test]
    fn kernels_that_clear_the_rest_of_a_page() {
        for (release, is_clean) in [
            ("6.18.5", true),
            ("7.0.0-rc1", true),
            ("6.11.0-8-generic", true),
            ("6.10.6", false),
            ("6.10.7-200.fc40", true),
            ("6.1.106", false),
            ("6.1.107", true),
            ("5.10.224", false),
            ("5.10.225", true),
            ("5.15.0-91-generic", false),
            ("6.7.12", false),
            ("4.19.321+", true),
            ("", false),
            ("99999999999.1", false),
        ] {
            assert_eq!(store_is_clean(release), is_clean, "{release}");
        }
    }

    #[test]
    fn names_that_are_none() {
        let long = [b'a'; NAME_BYTES_MAX + 1];
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &long] {
            assert!(Notice::inval_entry(1, name).is_err());
            assert!(Notice::expire_entry(1, name).is_err());
            assert!(Notice::delete(1, 2, name).is_err());
        }
        assert!(Notice::inval_entry(1, &long[1..]).is_ok());
    }
}
