//! The entries of a directory as getdents64 gives them, in a buffer of the caller.
//!
//! Invariant: each record is checked before it is believed, the kernel's too.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;

use rustix::io::{Errno, Result};

use super::{NAME_BYTES_MAX, sys};

/// Reads a piece of a directory from the fd's position into a lent buffer; no entries is the end.
/// Set the position with [`seek`](super::seek) (SEEK_SET and a `next_offset` seen, or 0). A buffer
/// of 280 bytes holds any one entry. Source: getdents64(2).
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
    /// Position after this entry, for [`seek`](super::seek): opaque.
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
