//! The calls on file handles, and FS_IOC_GETVERSION, which rustix lacks: all that is unsafe here.
//!
//! Invariant: one function is one call, and the memory that it takes is its own.
#![allow(unsafe_code, reason = "system calls that rustix lacks")]

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{Errno, Result};

/// Bytes of a file handle at most (`MAX_HANDLE_SZ`, linux/exportfs.h).
pub const HANDLE_BYTES_MAX: usize = 128;

/// `struct file_handle` with room for the longest one.
#[repr(C)]
struct RawHandle {
    handle_bytes: u32,
    handle_type: i32,
    bytes: [u8; HANDLE_BYTES_MAX],
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// name_to_handle_at(2): writes the handle's bytes, returns (type, length, mount id).
pub(super) fn name_to_handle(
    dir: BorrowedFd<'_>,
    name: &CStr,
    flags: i32,
    into: &mut [u8; HANDLE_BYTES_MAX],
) -> Result<(i32, usize, i32)> {
    let mut raw = RawHandle {
        handle_bytes: HANDLE_BYTES_MAX as u32,
        handle_type: 0,
        bytes: [0; HANDLE_BYTES_MAX],
    };
    let mut mount_id = 0i32;
    // SAFETY: the fd is open, the name ends in NUL; `raw` has the layout of struct file_handle
    // with `handle_bytes` bytes behind its header, and both pointers are valid for the call.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            dir.as_raw_fd(),
            name.as_ptr(),
            &raw mut raw,
            &raw mut mount_id,
            flags,
        )
    };
    if rc != 0 {
        return Err(last_errno());
    }
    let len = (raw.handle_bytes as usize).min(HANDLE_BYTES_MAX);
    *into = raw.bytes;
    Ok((raw.handle_type, len, mount_id))
}

/// open_by_handle_at(2). Wants CAP_DAC_READ_SEARCH; `mount` is any fd on the file system.
pub(super) fn open_by_handle(
    mount: BorrowedFd<'_>,
    handle_type: i32,
    handle: &[u8],
    flags: i32,
) -> Result<OwnedFd> {
    let mut raw = RawHandle { handle_bytes: 0, handle_type, bytes: [0; HANDLE_BYTES_MAX] };
    let target = raw.bytes.get_mut(..handle.len()).ok_or(Errno::INVAL)?;
    target.copy_from_slice(handle);
    raw.handle_bytes = handle.len() as u32;
    // SAFETY: the fd is open; `raw` has the layout of struct file_handle and holds
    // `handle_bytes` bytes; the kernel only reads it, during the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw const raw,
            flags | libc::O_CLOEXEC,
        )
    };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this fd for us; nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(last_errno()),
    }
}

/// FS_IOC_GETVERSION: the inode's generation. Not on `O_PATH` fds.
pub(super) fn generation(fd: BorrowedFd<'_>) -> Result<u32> {
    // The request is _IOR('v', 1, long), but every file system writes an int; a long's room
    // is right for either.
    let mut version: libc::c_long = 0;
    // SAFETY: the fd is open; the pointer is valid for writes of a long during the call.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FS_IOC_GETVERSION as _, &raw mut version) };
    if rc == 0 { Ok(version as u32) } else { Err(last_errno()) }
}
