//! The one system call that no safe crate wraps: `FUSE_DEV_IOC_CLONE`.
//!
//! Invariant: the only file of the crate with `unsafe`. It must not decide anything: it turns one
//! call into one safe function.
#![allow(unsafe_code, reason = "the ioctl has no safe wrapper in the crates that we use")]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

/// `_IOR(229, 0, uint32_t)` of `include/uapi/linux/fuse.h`.
const FUSE_DEV_IOC_CLONE: Opcode = opcode::read::<u32>(229, 0);

/// Makes `new`, a fresh fd of `/dev/fuse`, a clone of the session behind `session`.
///
/// Errors: `EINVAL` (`session` is not mounted, or `new` is already of a session), `ENOTTY` (a
/// kernel older than 4.2), `EBADF`.
pub(crate) fn fuse_dev_clone(new: BorrowedFd<'_>, session: BorrowedFd<'_>) -> Result<(), Errno> {
    let session_fd = session.as_raw_fd().cast_unsigned();
    // SAFETY: the opcode's argument is a pointer to a u32 that the kernel only reads, and `Setter`
    // passes a pointer to the u32 that it owns until the call has returned. Both fds are borrowed,
    // so they are open during the call; another kind of file behind them is an errno, since the
    // opcode's type byte (229) is FUSE's own.
    unsafe {
        let arg = Setter::<FUSE_DEV_IOC_CLONE, u32>::new(session_fd);
        ioctl(new, arg)
    }
}
