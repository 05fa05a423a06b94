//! File operations on a real fd that `fuse-backend-rs` does not implement or does not do well.
//!
//! One function is one operation of the FUSE protocol (or a part of one): it takes a borrowed fd
//! that the caller knows to be the right file, and gives the errno that the guest is to see.
//!
//! Invariants:
//! - nothing here resolves a path that a peer wrote. Names are single components, checked by
//!   [`check_name`]; `/proc/self/fd/N` is only made from a number that we hold open.
//! - nothing here allocates by a length that a peer wrote: buffers are lent by the caller.
//! - `ENOSYS` never leaves this file: in the guest it is sticky for the life of the mount, so a
//!   host kernel's missing call becomes `EOPNOTSUPP`.
//!
//! It must not keep state, change credentials (that is `creds.rs`) or know node ids.
//!
//! Exception to the rule that raw libc stands in `ring.rs` alone: `mod sys` at the end calls
//! `getdents64` into a lent byte buffer (rustix wants uninitialised memory and trusts the records),
//! `close` with its error reported (rustix has it only as an unsafe call), SIOCOUTQ, ioprio_set,
//! and SO_PEERCRED of a peer without a number here (rustix has no such pid). It is the only unsafe
//! code of this file.

use std::ffi::CStr;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use ringfs_wire::abi;
use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, SeekFrom, Timespec};
use rustix::fs::{StatxFlags, Timestamps, Uid, XattrFlags};
use rustix::io::{Errno, ReadWriteFlags, Result, retry_on_intr};

/// Most bytes that one [`copy_file_range`] moves: a pool thread is not held longer than about a
/// quarter of a second by it. A multiple of every block size, so that reflinks stay possible.
pub const COPY_BYTES_MAX: u64 = 256 << 20;

/// Longest name of a directory entry, in bytes (`NAME_MAX`, limits.h).
pub const NAME_BYTES_MAX: usize = 255;

/// Longest name of an extended attribute, in bytes (`XATTR_NAME_MAX`, linux/limits.h).
pub const XATTR_NAME_BYTES_MAX: usize = 255;

/// Longest value of an extended attribute, in bytes (`XATTR_SIZE_MAX`, linux/limits.h).
pub const XATTR_VALUE_BYTES_MAX: usize = 65536;

/// What a statx for FUSE may report: `STATX_BASIC_STATS | STATX_BTIME`. Further bits would name
/// fields that the FUSE layout has not.
const STATX_MASK: u32 = 0x07ff | 0x0800;

/// `AT_STATX_SYNC_TYPE` (linux/fcntl.h): the only flags of a guest's statx that go on.
const STATX_SYNC_TYPE: u32 = 0x6000;

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

/// Copies bytes from file to file inside the host; returns how many, at most [`COPY_BYTES_MAX`].
/// Fewer than asked is a success, 0 is the end of the source.
///
/// No copy loop of ours: for `EOPNOTSUPP` (since Linux 4.20) and `EXDEV` (since 5.3) the guest's
/// kernel copies by itself through its page cache (fs/fuse/file.c, `fuse_copy_file_range`), and cp
/// does so on older ones. Every other error reaches the program there, so each must be true:
/// `EINVAL` is an overlap or no regular file. Source: copy_file_range(2).
///
/// # Errors
/// The call's errno; `ENOSYS` as `EOPNOTSUPP`; `EOVERFLOW` for ranges beyond `i64::MAX`.
pub fn copy_file_range(
    input: BorrowedFd<'_>,
    offset_in: u64,
    output: BorrowedFd<'_>,
    offset_out: u64,
    len: u64,
) -> Result<u64> {
    let len = len.min(COPY_BYTES_MAX);
    for offset in [offset_in, offset_out] {
        if offset.checked_add(len).is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(Errno::OVERFLOW);
        }
    }
    // The kernel moves the offsets only when it has copied, so a retry starts from fresh copies.
    let copied = retry_on_intr(|| {
        let (mut from, mut to) = (offset_in, offset_out);
        rustix::fs::copy_file_range(input, Some(&mut from), output, Some(&mut to), len as usize)
    });
    copied.map(|n| n as u64).map_err(not_sticky)
}

/// Attributes with birth time, in the layout of `FUSE_STATX`. `fd` may be `O_PATH`.
///
/// `mask` is limited to the basic fields and the birth time, `flags` to `AT_STATX_SYNC_TYPE`: we
/// never force a sync that the guest did not ask for. The answer's `mask` says what the file system
/// really gave. Inode number and device are the host's. Source: statx(2), linux/stat.h.
///
/// # Errors
/// The call's errno; `ENOSYS` as `EOPNOTSUPP`.
pub fn statx(fd: BorrowedFd<'_>, mask: u32, flags: u32) -> Result<abi::Statx> {
    let at = AtFlags::EMPTY_PATH | AtFlags::from_bits_retain(flags & STATX_SYNC_TYPE);
    let want = StatxFlags::from_bits_retain(mask & STATX_MASK);
    let got = rustix::fs::statx(fd, c"", at, want).map_err(not_sticky)?;
    let time = |t: rustix::fs::StatxTimestamp| abi::SxTime {
        tv_sec: t.tv_sec,
        tv_nsec: t.tv_nsec,
        reserved: 0,
    };
    Ok(abi::Statx {
        mask: got.stx_mask & STATX_MASK,
        blksize: got.stx_blksize,
        attributes: got.stx_attributes.bits(),
        nlink: got.stx_nlink,
        uid: got.stx_uid,
        gid: got.stx_gid,
        mode: got.stx_mode,
        spare0: 0,
        ino: got.stx_ino,
        size: got.stx_size,
        blocks: got.stx_blocks,
        attributes_mask: got.stx_attributes_mask.bits(),
        atime: time(got.stx_atime),
        btime: time(got.stx_btime),
        ctime: time(got.stx_ctime),
        mtime: time(got.stx_mtime),
        rdev_major: got.stx_rdev_major,
        rdev_minor: got.stx_rdev_minor,
        dev_major: got.stx_dev_major,
        dev_minor: got.stx_dev_minor,
        spare2: [0; 14],
    })
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

/// Writes back the whole file system of `fd`, and reports a write error since the last call on
/// this open file. May take long: never on a shard's thread. Source: syncfs(2).
///
/// # Errors
/// `EIO`, `ENOSPC`, `EDQUOT` of an earlier write; `EBADF` for `O_PATH`.
pub fn syncfs(fd: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::syncfs(fd).map_err(not_sticky)
}

/// lseek with the numbers of the FUSE protocol (0 SET, 1 CUR, 2 END, 3 DATA, 4 HOLE).
///
/// The FUSE kernel side sends only DATA and HOLE. The call moves the file position, which a
/// restarted search shares with nobody: all our reads and writes are positional. On a directory the
/// position is [`getdents`]' own, so DATA and HOLE are refused there. Source: lseek(2).
///
/// # Errors
/// `ENXIO` past the end; `EINVAL` for another whence or an offset beyond `i64::MAX`; `EISDIR`.
pub fn seek(fd: BorrowedFd<'_>, offset: u64, whence: u32) -> Result<u64> {
    let checked = || i64::try_from(offset).map(|_| offset).map_err(|_| Errno::INVAL);
    let target = match whence {
        0 => SeekFrom::Start(checked()?),
        1 => SeekFrom::Current(offset.cast_signed()),
        2 => SeekFrom::End(offset.cast_signed()),
        3 | 4 if file_type(fd)? == FileType::Directory => return Err(Errno::ISDIR),
        3 => SeekFrom::Data(checked()?),
        4 => SeekFrom::Hole(checked()?),
        _ => return Err(Errno::INVAL),
    };
    rustix::fs::seek(fd, target)
}

/// Reserves, punches or zeroes a range. `mode` is FALLOC_FL_*: 0, KEEP_SIZE,
/// PUNCH_HOLE|KEEP_SIZE, ZERO_RANGE, ZERO_RANGE|KEEP_SIZE, as the FUSE kernel side itself allows.
/// May take long. Source: fallocate(2).
///
/// # Errors
/// `EOPNOTSUPP` for every other mode and where the file system cannot; else the call's errno.
pub fn fallocate(fd: BorrowedFd<'_>, mode: u32, offset: u64, len: u64) -> Result<()> {
    let flags = FallocateFlags::from_bits_retain(mode);
    let (keep, punch) = (FallocateFlags::KEEP_SIZE, FallocateFlags::PUNCH_HOLE);
    let zero = FallocateFlags::ZERO_RANGE;
    let known = [FallocateFlags::empty(), keep, punch | keep, zero, zero | keep];
    if !known.contains(&flags) {
        return Err(Errno::OPNOTSUPP);
    }
    if i64::try_from(offset).is_err() || i64::try_from(len).is_err() {
        return Err(Errno::FBIG);
    }
    retry_on_intr(|| rustix::fs::fallocate(fd, flags, offset, len)).map_err(not_sticky)
}

/// What close(2) in the guest does to the host's file: the close of a duplicate runs the file
/// system's flush, and its error (NFS, FUSE, quota) is the guest's.
///
/// It also releases the daemon's POSIX locks on the file: take none on such fds (open file
/// description locks are not touched).
///
/// # Errors
/// `EMFILE` for the duplicate; what close reports: `EIO`, `ENOSPC`, `EDQUOT`.
pub fn flush(fd: BorrowedFd<'_>) -> Result<()> {
    let copy = rustix::io::fcntl_dupfd_cloexec(fd, 3)?;
    match sys::close(copy) {
        // The fd is closed all the same (close(2)); the flush has been started, as in the guest.
        Err(Errno::INTR) => Ok(()),
        other => other,
    }
}

/// Changes the permission bits. `fd` may be `O_PATH` and nameless. Source: fchmod(2).
///
/// # Errors
/// The call's errno; `EOPNOTSUPP` for a symbolic link.
pub fn chmod_fd(fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
    let mode = Mode::from_raw_mode(mode & 0o7777);
    match rustix::fs::fchmod(fd, mode) {
        Err(Errno::BADF) => rustix::fs::chmod(ProcPath::of(fd).as_c_str(), mode),
        other => other,
    }
    .map_err(not_sticky)
}

/// Changes owner and group; `None` leaves it. `fd` may be `O_PATH` and nameless.
/// Source: fchownat(2) with `AT_EMPTY_PATH`.
///
/// # Errors
/// `EINVAL` for the id `u32::MAX`; else the call's errno.
pub fn chown_fd(fd: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
    if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
        return Err(Errno::INVAL);
    }
    let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
    rustix::fs::chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH)
}

/// Sets the size in bytes. `fd` must be open for writing. Source: ftruncate(2).
///
/// # Errors
/// `EFBIG` beyond `i64::MAX`; `EINVAL` or `EBADF` where `fd` is not writable; the call's errno.
pub fn truncate_fd(fd: BorrowedFd<'_>, bytes: u64) -> Result<()> {
    if i64::try_from(bytes).is_err() {
        return Err(Errno::FBIG);
    }
    retry_on_intr(|| rustix::fs::ftruncate(fd, bytes))
}

/// One time stamp of [`utimens_fd`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// Leave it.
    Omit,
    /// The host's clock.
    Now,
    /// Seconds (may be before 1970) and nanoseconds below 10^9.
    At(i64, u32),
}

/// Sets access and modification time. `fd` may be `O_PATH` and nameless. Source: utimensat(2).
///
/// # Errors
/// `EINVAL` for nanoseconds of 10^9 and more; else the call's errno.
pub fn utimens_fd(fd: BorrowedFd<'_>, atime: SetTime, mtime: SetTime) -> Result<()> {
    let times = Timestamps { last_access: timespec(atime)?, last_modification: timespec(mtime)? };
    match rustix::fs::futimens(fd, &times) {
        Err(Errno::BADF) => {
            let path = ProcPath::of(fd);
            rustix::fs::utimensat(CWD, path.as_c_str(), &times, AtFlags::empty())
        }
        other => other,
    }
}

fn timespec(time: SetTime) -> Result<Timespec> {
    match time {
        SetTime::Omit => Ok(Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT }),
        SetTime::Now => Ok(Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW }),
        SetTime::At(_, nsec) if nsec >= 1_000_000_000 => Err(Errno::INVAL),
        SetTime::At(tv_sec, nsec) => Ok(Timespec { tv_sec, tv_nsec: nsec.into() }),
    }
}

/// Reads an extended attribute into a lent buffer; an empty buffer asks for the length. `fd` may
/// be `O_PATH`, also of a symbolic link. Source: fgetxattr(2).
///
/// # Errors
/// `ENODATA`, `ERANGE` (buffer too small), `EOPNOTSUPP`; `ERANGE` for an impossible name.
pub fn getxattr(fd: BorrowedFd<'_>, name: &CStr, value: &mut [u8]) -> Result<usize> {
    check_xattr_name(name)?;
    let by_path = |path: ProcPath, value: &mut [u8]| match value {
        [] => rustix::fs::getxattr_query(path.as_c_str(), name),
        value => rustix::fs::getxattr(path.as_c_str(), name, value),
    };
    let by_fd = match &mut *value {
        [] => rustix::fs::fgetxattr_query(fd, name),
        value => rustix::fs::fgetxattr(fd, name, value),
    };
    match by_fd {
        Err(Errno::BADF) => by_path(ProcPath::of(fd), value),
        other => other,
    }
    .map_err(not_sticky)
}

/// Sets an extended attribute; `flags` are XATTR_CREATE (1) and XATTR_REPLACE (2). `fd` may be
/// `O_PATH`. Source: fsetxattr(2).
///
/// # Errors
/// `E2BIG` beyond [`XATTR_VALUE_BYTES_MAX`]; `EINVAL` for other flags; the call's errno.
pub fn setxattr(fd: BorrowedFd<'_>, name: &CStr, value: &[u8], flags: u32) -> Result<()> {
    check_xattr_name(name)?;
    if value.len() > XATTR_VALUE_BYTES_MAX {
        return Err(Errno::TOOBIG);
    }
    if flags & !3 != 0 {
        return Err(Errno::INVAL);
    }
    let flags = XattrFlags::from_bits_retain(flags);
    match rustix::fs::fsetxattr(fd, name, value, flags) {
        Err(Errno::BADF) => rustix::fs::setxattr(ProcPath::of(fd).as_c_str(), name, value, flags),
        other => other,
    }
    .map_err(not_sticky)
}

/// Lists the names of extended attributes (each with its NUL) into a lent buffer; an empty buffer
/// asks for the length. `fd` may be `O_PATH`. Source: flistxattr(2).
///
/// # Errors
/// `ERANGE` (buffer too small); the call's errno.
pub fn listxattr(fd: BorrowedFd<'_>, list: &mut [u8]) -> Result<usize> {
    let by_path = |path: ProcPath, list: &mut [u8]| match list {
        [] => rustix::fs::listxattr_query(path.as_c_str()),
        list => rustix::fs::listxattr(path.as_c_str(), list),
    };
    let by_fd = match &mut *list {
        [] => rustix::fs::flistxattr_query(fd),
        list => rustix::fs::flistxattr(fd, list),
    };
    match by_fd {
        Err(Errno::BADF) => by_path(ProcPath::of(fd), list),
        other => other,
    }
    .map_err(not_sticky)
}

/// Removes an extended attribute. `fd` may be `O_PATH`. Source: fremovexattr(2).
///
/// # Errors
/// `ENODATA`; the call's errno.
pub fn removexattr(fd: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    check_xattr_name(name)?;
    match rustix::fs::fremovexattr(fd, name) {
        Err(Errno::BADF) => rustix::fs::removexattr(ProcPath::of(fd).as_c_str(), name),
        other => other,
    }
    .map_err(not_sticky)
}

fn check_xattr_name(name: &CStr) -> Result<()> {
    let len = name.to_bytes().len();
    if len == 0 || len > XATTR_NAME_BYTES_MAX { Err(Errno::RANGE) } else { Ok(()) }
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

/// Reads at an offset in bytes; fewer bytes than asked means the end or a signal.
///
/// # Errors
/// The errno of pread(2).
pub fn read_at(fd: BorrowedFd<'_>, offset: u64, into: &mut [u8]) -> Result<usize> {
    retry_on_intr(|| rustix::io::pread(fd, &mut *into, offset))
}

/// Tries of what the host has no memory for.
const NOMEM_TRIES_MAX: usize = 64;

/// Opens a file handle. Linux has no memory also for an inode whose number is being given to a new
/// file (`iget_locked`), and says a moment later that the handle is stale.
pub fn retry_on_nomem<T>(open: impl Fn() -> Result<T>) -> Result<T> {
    for _ in 1..NOMEM_TRIES_MAX {
        match open() {
            Err(Errno::NOMEM) => rustix::thread::sched_yield(),
            other => return other,
        }
    }
    open()
}

/// Writes at an offset in bytes; may write fewer. With `O_APPEND` on the fd the kernel ignores
/// the offset (pwrite(2), BUGS).
///
/// # Errors
/// The errno of pwrite(2).
pub fn write_at(fd: BorrowedFd<'_>, offset: u64, from: &[u8]) -> Result<usize> {
    retry_on_intr(|| rustix::io::pwrite(fd, from, offset))
}

/// Goes on after short writes. With `whole`, an error after some bytes is the result; else their
/// count is, as write(2) has it, and the error comes with the next call.
pub fn write_all_at(fd: BorrowedFd<'_>, offset: u64, from: &[u8], whole: bool) -> Result<usize> {
    let mut done = 0;
    while done < from.len() {
        match write_at(fd, offset + done as u64, &from[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(_) if done > 0 && !whole => break,
            Err(errno) => return Err(errno),
        }
    }
    if whole && done < from.len() { Err(Errno::IO) } else { Ok(done) }
}

/// [`read_at`] that gives up where it would wait for the disk: what the page cache holds, or an
/// error. A short count is the end of the file or of the cached part. Source: preadv2(2).
///
/// # Errors
/// `EAGAIN`: nothing cached; `EOPNOTSUPP`: the file system cannot say (tmpfs, overlay).
pub fn try_read_nowait(fd: BorrowedFd<'_>, offset: u64, into: &mut [u8]) -> Result<usize> {
    let mut into = [IoSliceMut::new(into)];
    // preadv2 takes -1 as "the current position".
    if i64::try_from(offset).is_err() {
        return Err(Errno::INVAL);
    }
    let flags = ReadWriteFlags::NOWAIT;
    retry_on_intr(|| rustix::io::preadv2(fd, &mut into, offset, flags)).map_err(not_sticky)
}

/// [`write_at`] that gives up where it would wait. Most file systems refuse buffered ones.
///
/// # Errors
/// `EAGAIN`, `EOPNOTSUPP`, and the errno of pwritev2(2).
pub fn try_write_nowait(fd: BorrowedFd<'_>, offset: u64, from: &[u8]) -> Result<usize> {
    let from = [IoSlice::new(from)];
    if i64::try_from(offset).is_err() {
        return Err(Errno::INVAL);
    }
    let flags = ReadWriteFlags::NOWAIT;
    retry_on_intr(|| rustix::io::pwritev2(fd, &from, offset, flags)).map_err(not_sticky)
}

/// A local file system whose calls wait for nothing but the disk and its own locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LocalFs {
    /// ext2, ext3 and ext4 have one magic.
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// F2FS.
    F2fs,
    /// tmpfs (also memfd and shmem).
    Tmpfs,
}

/// What kind of file system holds a file: may its calls be made on a shard's thread?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FsKind {
    /// Known, local.
    Local(LocalFs),
    /// Behind a network: any call may wait for ever.
    Network,
    /// Behind a user's process: any call may wait for ever.
    Fuse,
    /// Unknown (the magic number), overlay included: treat it as one that waits.
    Other(u64),
}

impl FsKind {
    /// The kind for a `f_type` of statfs(2) (linux/magic.h).
    pub const fn from_magic(magic: u64) -> FsKind {
        match magic {
            0xef53 => FsKind::Local(LocalFs::Ext4),
            0x5846_5342 => FsKind::Local(LocalFs::Xfs),
            0x9123_683e => FsKind::Local(LocalFs::Btrfs),
            0xf2f5_2010 => FsKind::Local(LocalFs::F2fs),
            0x0102_1994 => FsKind::Local(LocalFs::Tmpfs),
            0x6573_5546 => FsKind::Fuse,
            // NFS, SMB, SMB2, CIFS, 9p, Ceph, AFS (two), Coda, GFS2, OCFS2, Lustre, GPFS, vboxsf
            0x6969 | 0x517b | 0xfe53_4d42 | 0xff53_4d42 | 0x0102_1997 | 0x00c3_6400
            | 0x5346_414f | 0x6b41_4653 | 0x7375_7245 | 0x0116_1970 | 0x7461_636f | 0x0bd0_0bd0
            | 0x4750_4653 | 0x786f_4256 => FsKind::Network,
            other => FsKind::Other(other),
        }
    }

    /// May metadata calls run inline on a shard's thread?
    pub const fn is_local(self) -> bool {
        matches!(self, FsKind::Local(_))
    }

    /// Does [`try_read_nowait`] work there? (tmpfs never sets `FMODE_NOWAIT`.)
    pub const fn supports_nowait(self) -> bool {
        matches!(self, FsKind::Local(fs) if !matches!(fs, LocalFs::Tmpfs))
    }
}

/// The kind of file system of `fd`, which may be `O_PATH`. Itself may wait on a dead network or
/// FUSE mount: ask once a share or device, not on a shard's thread. Source: fstatfs(2).
///
/// # Errors
/// The call's errno.
pub fn fs_kind(fd: BorrowedFd<'_>) -> Result<FsKind> {
    let magic = rustix::fs::fstatfs(fd)?.f_type;
    // Magics are 32 bits; a signed word would carry 0xff534d42 as a negative number elsewhere.
    Ok(FsKind::from_magic(u64::from(magic as u32)))
}

/// Reads a piece of a directory from the fd's position into a lent buffer; no entries is the end.
/// Set the position with [`seek`] (SEEK_SET and a `next_offset` seen, or 0). A buffer of 280 bytes
/// holds any one entry. Source: getdents64(2).
///
/// # Errors
/// `EINVAL`: the buffer does not hold the next entry; `ENOTDIR`; `ENOENT`: a removed directory.
pub fn getdents<'a>(dir: BorrowedFd<'_>, into: &'a mut [u8]) -> Result<DirEntries<'a>> {
    let filled = sys::getdents64(dir, into)?;
    Ok(DirEntries { rest: into.get(..filled).unwrap_or_default() })
}

/// One entry of a directory, borrowed from the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Inode number on the host.
    pub ino: u64,
    /// Position after this entry, for [`seek`]: opaque.
    pub next_offset: u64,
    /// `DT_*` (dirent.h); 0 where the file system does not say.
    pub kind: u8,
    /// The name, without NUL; 1 to 255 bytes; `.` and `..` included.
    pub name: &'a [u8],
}

/// The entries in a filled buffer, in the kernel's order. Each record is checked; the first that
/// cannot be (a bug of the host's file system) is `EIO`, and the last item.
///
/// ```text
/// 0        8          16        18      19
/// | ino 8  | offset 8 | len 2   | kind 1 | name.. NUL .. padding |   `len` is of the whole record
/// ```
#[derive(Clone, Debug)]
pub struct DirEntries<'a> {
    rest: &'a [u8],
}

const DIRENT_NAME: usize = 19;

impl<'a> DirEntries<'a> {
    /// Over bytes that `getdents64` gave.
    pub const fn new(bytes: &'a [u8]) -> DirEntries<'a> {
        DirEntries { rest: bytes }
    }

    /// Nothing left: after [`getdents`], the end of the directory.
    pub const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    fn take(&mut self) -> Option<DirEntry<'a>> {
        let (head, _) = self.rest.split_first_chunk::<DIRENT_NAME>()?;
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, len_low, len_high, kind] = *head;
        let record = usize::from(u16::from_ne_bytes([len_low, len_high]));
        let (this, rest) = self.rest.split_at_checked(record)?;
        let padded = this.get(DIRENT_NAME..)?;
        let name = CStr::from_bytes_until_nul(padded).ok()?.to_bytes();
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(&b'/') {
            return None;
        }
        self.rest = rest;
        let ino = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
        let next_offset = u64::from_ne_bytes([i, j, k, l, m, n, o, p]);
        Some(DirEntry { ino, next_offset, kind, name })
    }
}

impl<'a> Iterator for DirEntries<'a> {
    type Item = Result<DirEntry<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let entry = self.take();
        if entry.is_none() {
            self.rest = &[];
        }
        Some(entry.ok_or(Errno::IO))
    }
}

/// Bytes that a socket holds and the peer has not received, in the kernel's own count (SIOCOUTQ).
///
/// # Errors
/// `EINVAL` for what is no connected socket.
pub fn unsent_bytes(socket: BorrowedFd<'_>) -> Result<usize> {
    sys::unsent_bytes(socket)
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

/// Who is at the other end of a Unix socket: user, group and process (SO_PEERCRED). The process is
/// 0 where it has no number here: this daemon is in a pid namespace that the peer is not in.
///
/// # Errors
/// What getsockopt(2) says.
pub fn peer_of(socket: BorrowedFd<'_>) -> Result<(u32, u32, u32)> {
    sys::peer_of(socket)
}

/// The priority of this thread's disk accesses, and of those of threads that it starts.
///
/// # Errors
/// What ioprio_set(2) says.
pub fn set_io_priority(value: u16) -> Result<()> {
    sys::set_io_priority(value)
}

/// The raw calls; see the head of the file for why each is here.
#[allow(unsafe_code, reason = "calls that rustix lacks or offers only for trusted records")]
mod sys {
    use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};

    use rustix::io::{Errno, Result};

    fn last_errno() -> Errno {
        Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
    }

    pub(super) fn getdents64(dir: BorrowedFd<'_>, into: &mut [u8]) -> Result<usize> {
        let len = u32::try_from(into.len()).unwrap_or(u32::MAX);
        // SAFETY: the fd is open (borrowed); the pointer is valid for writes of `len` bytes, as
        // `len` is at most the slice's length; the kernel keeps no reference after the call.
        let n =
            unsafe { libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), into.as_mut_ptr(), len) };
        usize::try_from(n).map_err(|_| last_errno())
    }

    pub(super) fn unsent_bytes(socket: BorrowedFd<'_>) -> Result<usize> {
        let mut bytes: libc::c_int = 0;
        // SAFETY: TIOCOUTQ (SIOCOUTQ) writes one int, and `bytes` is one that outlives the call;
        // the fd is open (borrowed).
        let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
        if done == 0 { usize::try_from(bytes).map_err(|_| Errno::INVAL) } else { Err(last_errno()) }
    }

    pub(super) fn peer_of(socket: BorrowedFd<'_>) -> Result<(u32, u32, u32)> {
        let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: the fd is open (borrowed); the kernel writes at most `len` bytes, which `peer`
        // has, and the length; both outlive the call.
        let done = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut peer).cast(),
                &raw mut len,
            )
        };
        if done == 0 {
            Ok((peer.uid, peer.gid, peer.pid.cast_unsigned()))
        } else {
            Err(last_errno())
        }
    }

    pub(super) fn close(fd: OwnedFd) -> Result<()> {
        // SAFETY: `into_raw_fd` gave up the ownership, so this is the only close of this fd.
        if unsafe { libc::close(fd.into_raw_fd()) } == 0 { Ok(()) } else { Err(last_errno()) }
    }

    pub(super) fn set_io_priority(value: u16) -> Result<()> {
        const WHO_PROCESS: libc::c_int = 1;
        let value = libc::c_int::from(value);
        // SAFETY: the call takes numbers alone.
        let done = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, value) };
        if done == 0 { Ok(()) } else { Err(last_errno()) }
    }
}
