//! The data of an open file: read, write, copy, seek, allocate, write back.
//!
//! Invariant: every read and write says where, so that the file position is nobody's but
//! [`seek`]'s; an offset that the kernel would take for something else is refused.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;

use rustix::fs::{FallocateFlags, FileType, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags, Result, retry_on_intr};

use super::{file_type, not_sticky, sys};

/// Reads at an offset in bytes; fewer bytes than asked means the end or a signal.
///
/// # Errors
/// The errno of pread(2).
pub fn read_at(fd: BorrowedFd<'_>, offset: u64, into: &mut [u8]) -> Result<usize> {
    retry_on_intr(|| rustix::io::pread(fd, &mut *into, offset))
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

/// Most bytes that one [`copy_file_range`] moves: a pool thread is not held longer than about a
/// quarter of a second by it. A multiple of every block size, so that reflinks stay possible.
pub const COPY_BYTES_MAX: u64 = 256 << 20;

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

/// lseek with the numbers of the FUSE protocol (0 SET, 1 CUR, 2 END, 3 DATA, 4 HOLE).
///
/// The FUSE kernel side sends only DATA and HOLE. The call moves the file position, which a
/// restarted search shares with nobody: all our reads and writes are positional. On a directory the
/// position is [`getdents`](super::getdents)' own, so DATA and HOLE are refused there. Source:
/// lseek(2).
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

/// Writes back the whole file system of `fd`, and reports a write error since the last call on
/// this open file. May take long: never on a shard's thread. Source: syncfs(2).
///
/// # Errors
/// `EIO`, `ENOSPC`, `EDQUOT` of an earlier write; `EBADF` for `O_PATH`.
pub fn syncfs(fd: BorrowedFd<'_>) -> Result<()> {
    rustix::fs::syncfs(fd).map_err(not_sticky)
}
