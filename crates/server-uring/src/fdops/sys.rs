//! The raw calls, which rustix lacks or offers only for trusted records: the only unsafe of fdops.
//!
//! `getdents64` into a lent byte buffer (rustix wants uninitialised memory and trusts the records),
//! `close` with its error reported (rustix has it only as an unsafe call), SIOCOUTQ, ioprio_set,
//! and SO_PEERCRED of a peer without a number here (rustix has no such pid). Invariant: one
//! function is one call, and the kernel keeps no reference to what it is lent.
#![allow(unsafe_code, reason = "calls that rustix lacks or offers only for trusted records")]

use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};

use rustix::io::{Errno, Result};

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

pub(super) fn getdents64(dir: BorrowedFd<'_>, into: &mut [u8]) -> Result<usize> {
    let len = u32::try_from(into.len()).unwrap_or(u32::MAX);
    // SAFETY: the fd is open (borrowed); the pointer is valid for writes of `len` bytes, as
    // `len` is at most the slice's length; the kernel keeps no reference after the call.
    let n = unsafe { libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), into.as_mut_ptr(), len) };
    usize::try_from(n).map_err(|_| last_errno())
}

/// Bytes that a socket holds and the peer has not received, in the kernel's own count (SIOCOUTQ).
///
/// # Errors
/// `EINVAL` for what is no connected socket.
pub fn unsent_bytes(socket: BorrowedFd<'_>) -> Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ (SIOCOUTQ) writes one int, and `bytes` is one that outlives the call;
    // the fd is open (borrowed).
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if done == 0 { usize::try_from(bytes).map_err(|_| Errno::INVAL) } else { Err(last_errno()) }
}

/// Who is at the other end of a Unix socket: user, group and process (SO_PEERCRED). The process is
/// 0 where it has no number here: this daemon is in a pid namespace that the peer is not in.
///
/// # Errors
/// What getsockopt(2) says.
pub fn peer_of(socket: BorrowedFd<'_>) -> Result<(u32, u32, u32)> {
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
    if done == 0 { Ok((peer.uid, peer.gid, peer.pid.cast_unsigned())) } else { Err(last_errno()) }
}

pub(super) fn close(fd: OwnedFd) -> Result<()> {
    // SAFETY: `into_raw_fd` gave up the ownership, so this is the only close of this fd.
    if unsafe { libc::close(fd.into_raw_fd()) } == 0 { Ok(()) } else { Err(last_errno()) }
}

/// The priority of this thread's disk accesses, and of those of threads that it starts.
///
/// # Errors
/// What ioprio_set(2) says.
pub fn set_io_priority(value: u16) -> Result<()> {
    const WHO_PROCESS: libc::c_int = 1;
    let value = libc::c_int::from(value);
    // SAFETY: the call takes numbers alone.
    let done = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, value) };
    if done == 0 { Ok(()) } else { Err(last_errno()) }
}
