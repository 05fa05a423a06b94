//! File operations on a real fd that `fuse-backend-rs` does not implement or does not do well.
//!
//! One function is one operation of the FUSE protocol (or a part of one): it takes a borrowed fd
//! that the caller knows to be the right file, and gives the errno that the guest is to see.
//!
//! Invariants:
//! - nothing here resolves a path that a peer wrote. Names are single components, checked by
//!   [`check_name`]; `/proc/self/fd/N` is only made from a number that we hold open.
//! - nothing here allocates by a length that a peer wrote: buffers are lent by the caller.
//! - `ENOSYS` never leaves these files: in the guest it is sticky for the life of the mount, so a
//!   host kernel's missing call becomes `EOPNOTSUPP`.
//!
//! It must not keep state, change credentials (that is `creds.rs`) or know node ids. Here stand the
//! operations on names and on the fd itself; the others by family, as in `ops/`.

mod attrs;
mod dirents;
mod fs_kind;
mod io;
mod sys;
mod xattrs;

pub use attrs::{SetTime, chmod_fd, chown_fd, statx, truncate_fd, utimens_fd};
pub use dirents::{DirEntries, DirEntry, getdents};
pub use fs_kind::{FsKind, LocalFs, fs_kind};
pub use io::{COPY_BYTES_MAX, copy_file_range, fallocate, flush, read_at, seek, syncfs};
pub use io::{try_read_nowait, try_write_nowait, write_all_at, write_at};
pub use sys::{peer_of, set_io_priority, unsent_bytes};
pub use xattrs::{XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX};
pub use xattrs::{getxattr, listxattr, removexattr, setxattr};

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::{Errno, Result, retry_on_intr};

/// Longest name of a directory entry, in bytes (`NAME_MAX`, limits.h).
pub const NAME_BYTES_MAX: usize = 255;

/// Is this one component of a path, and not a way up?
///
/// # Errors
/// `EINVAL` for the empty name, `.`, `..` and a name with `/`; `ENAMETOOLONG` beyond
/// [`NAME_BYTES_MAX`].
pub fn check_name(name: &CStr) -> Result<()> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(Errno::INVAL);
    }
    if bytes.len() > NAME_BYTES_MAX { Err(Errno::NAMETOOLONG) } else { Ok(()) }
}

/// A file without a name in `dir` (which may be `O_PATH`). Access mode, `O_APPEND`, `O_SYNC`,
/// `O_DSYNC`, `O_DIRECT`, `O_NONBLOCK` and `O_EXCL` (never to be linked) are taken from `flags`,
/// all else is dropped. `mode` is used under the process's umask. Source: open(2).
///
/// # Errors
/// The call's errno: `EOPNOTSUPP` where the file system has none, `EINVAL` for a read-only mode.
pub fn open_tmpfile(dir: BorrowedFd<'_>, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    let keep = OFlags::RWMODE
        | OFlags::APPEND
        | OFlags::SYNC
        | OFlags::DSYNC
        | OFlags::DIRECT
        | OFlags::NONBLOCK
        | OFlags::EXCL;
    // O_SYNC contains O_DSYNC, and O_TMPFILE contains O_DIRECTORY: all bits are set together.
    let flags = (flags & keep) | OFlags::TMPFILE | OFlags::CLOEXEC | OFlags::LARGEFILE;
    retry_on_intr(|| rustix::fs::openat(dir, c".", flags, mode)).map_err(not_sticky)
}

/// Gives a file a (further) name. `fd` may be `O_PATH` or nameless (not of `O_TMPFILE | O_EXCL`).
///
/// By `AT_EMPTY_PATH`, which wants CAP_DAC_READ_SEARCH (or, since Linux 6.10, the credentials that
/// opened the fd), else by `/proc/self/fd`. Source: linkat(2).
///
/// # Errors
/// As [`check_name`], and the call's errno.
pub fn link_fd(fd: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    check_name(name)?;
    match rustix::fs::linkat(fd, c"", dir, name, AtFlags::EMPTY_PATH) {
        // Without the capability the kernel says ENOENT; some security modules say EPERM.
        Err(Errno::NOENT | Errno::PERM) => {}
        other => return other,
    }
    let path = ProcPath::of(fd);
    rustix::fs::linkat(CWD, path.as_c_str(), dir, name, AtFlags::SYMLINK_FOLLOW)
}

/// Opens the file of `fd` again (a new open file description), also one without a name.
///
/// Regular files and directories only: the open of a FIFO could wait for ever, that of a device
/// is not ours to give. `O_CREAT`, `O_EXCL`, `O_TRUNC`, `O_TMPFILE` and `O_NOFOLLOW` (which would
/// refuse the link in /proc) are dropped. Wants /proc. Source: open(2), proc_pid_fd(5).
///
/// # Errors
/// `EINVAL` for another kind of file; `ENOTDIR` for `O_DIRECTORY` on a file; the call's errno.
pub fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd> {
    if !matches!(file_type(fd)?, FileType::RegularFile | FileType::Directory) {
        return Err(Errno::INVAL);
    }
    // The bit of O_TMPFILE alone: the flag holds O_DIRECTORY too, which stays.
    let tmpfile = OFlags::TMPFILE - OFlags::DIRECTORY;
    let drop = OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC | OFlags::NOFOLLOW | tmpfile;
    let flags = (flags - drop) | OFlags::CLOEXEC | OFlags::LARGEFILE | OFlags::NOCTTY;
    let path = ProcPath::of(fd);
    retry_on_intr(|| rustix::fs::openat(CWD, path.as_c_str(), flags, Mode::empty()))
}

/// The kind of file behind `fd`.
///
/// # Errors
/// The errno of fstat(2).
pub fn file_type(fd: BorrowedFd<'_>) -> Result<FileType> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode))
}

/// A missing call on the host is not one that the guest may never try again.
fn not_sticky(errno: Errno) -> Errno {
    if errno == Errno::NOSYS { Errno::OPNOTSUPP } else { errno }
}

/// `/proc/self/fd/N` with its NUL, on the stack. True as long as the fd is open, which the
/// borrower sees to.
pub(crate) struct ProcPath {
    bytes: [u8; 32],
}

impl ProcPath {
    pub(crate) fn of(fd: BorrowedFd<'_>) -> ProcPath {
        let mut bytes = [0; 32];
        let prefix = b"/proc/self/fd/";
        bytes[..prefix.len()].copy_from_slice(prefix);
        let mut number = fd.as_raw_fd().unsigned_abs();
        let mut digits = [0u8; 10];
        let mut first = digits.len();
        loop {
            first -= 1;
            digits[first] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        // 14 + at most 10 digits: the last bytes stay NUL.
        let digits = &digits[first..];
        bytes[prefix.len()..prefix.len() + digits.len()].copy_from_slice(digits);
        ProcPath { bytes }
    }

    pub(crate) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or(c"")
    }
}
