//! Attributes of an open file: statx, mode, owner, size and times.
//!
//! Invariant: only what the FUSE layouts have is asked for and told.

use std::os::fd::BorrowedFd;

use ringfs_wire::abi;
use rustix::fs::{AtFlags, CWD, Gid, Mode, StatxFlags, Timespec, Timestamps, Uid};
use rustix::io::{Errno, Result, retry_on_intr};

use super::{ProcPath, not_sticky};

/// What a statx for FUSE may report: `STATX_BASIC_STATS | STATX_BTIME`. Further bits would name
/// fields that the FUSE layout has not.
const STATX_MASK: u32 = 0x07ff | 0x0800;

/// `AT_STATX_SYNC_TYPE` (linux/fcntl.h): the only flags of a guest's statx that go on.
const STATX_SYNC_TYPE: u32 = 0x6000;

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
