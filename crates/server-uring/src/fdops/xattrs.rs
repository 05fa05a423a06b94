//! Extended attributes of an open file, of one that is only `O_PATH` too.
//!
//! Invariant: names and values are bounded before the kernel sees them.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;

use rustix::fs::XattrFlags;
use rustix::io::{Errno, Result};

use super::{ProcPath, not_sticky};

/// Longest name of an extended attribute, in bytes (`XATTR_NAME_MAX`, linux/limits.h).
pub const XATTR_NAME_BYTES_MAX: usize = 255;

/// Longest value of an extended attribute, in bytes (`XATTR_SIZE_MAX`, linux/limits.h).
pub const XATTR_VALUE_BYTES_MAX: usize = 65536;

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
