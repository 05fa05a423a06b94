//! Bodies of replies: kernel layouts written into a lent buffer.
//!
//! A buffer that is too small is our bug and not the guest's: `Fs::execute` refuses it before
//! anything happens, so [`put`] fails only where a bound is wrong.

use ringfs_wire::abi;
use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use crate::passthrough::Stat;

/// Writes one structure to the start of `out`.
pub fn put<T: IntoBytes + Immutable>(out: &mut [u8], value: &T) -> Result<usize, Errno> {
    put_bytes(out, value.as_bytes())
}

/// Writes bytes to the start of `out`.
pub fn put_bytes(out: &mut [u8], bytes: &[u8]) -> Result<usize, Errno> {
    out.get_mut(..bytes.len()).ok_or(Errno::OVERFLOW)?.copy_from_slice(bytes);
    Ok(bytes.len())
}

/// `ino` is what the guest shall see, which is not always the host's.
pub fn attr(stat: &Stat, ino: u64) -> abi::Attr {
    abi::Attr {
        ino,
        size: stat.size,
        blocks: stat.blocks,
        atime: stat.atime.0 as u64,
        mtime: stat.mtime.0 as u64,
        ctime: stat.ctime.0 as u64,
        atimensec: stat.atime.1,
        mtimensec: stat.mtime.1,
        ctimensec: stat.ctime.1,
        mode: stat.mode,
        nlink: u32::try_from(stat.nlink).unwrap_or(u32::MAX),
        uid: stat.uid,
        gid: stat.gid,
        rdev: device_to_guest(stat.rdev),
        blksize: u32::try_from(stat.blksize).unwrap_or(4096),
        flags: 0,
    }
}

/// The kernel's `new_encode_dev`: 20 bits of minor around 12 bits of major.
fn device_to_guest(rdev: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}
