//! A file's bytes in memory, shared with the file: what a killed process wrote, the next one reads.
//!
//! Invariant: each byte of a mapping belongs to one [`Part`], and parts are never copied, so a part
//! is memory like any other. It must not grow, shrink or follow a file: whoever maps one has made
//! it, of this length and with its blocks allocated (a page that the file system has no room for
//! would be a SIGBUS), and nobody else may write to it. This is the only `unsafe` of what
//! outlives a process, on both ends.

#![allow(unsafe_code, reason = "memory that is a file's: mmap")]

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use zerocopy::{FromBytes, IntoBytes};

#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is the process's, not a thread's, and a `Mapping` gives no access to it: each
// part of it is reached by its one `Part` alone.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and `bytes` are what mmap gave, unmapped here alone, and no `Part` is
        // left: each holds the mapping.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// A slice of a mapping, and its only owner.
#[derive(Debug)]
pub struct Part<T> {
    start: NonNull<T>,
    len: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: a `Part` is the only way to its memory, as a `Box<[T]>` is.
unsafe impl<T: Send> Send for Part<T> {}
// SAFETY: as above; `&Part<T>` gives `&[T]` and nothing else.
unsafe impl<T: Sync> Sync for Part<T> {}

/// What is still to be given out of a mapping, from its start on.
#[derive(Debug)]
pub struct Parts {
    mapping: Arc<Mapping>,
    at: usize,
}

impl Parts {
    /// Maps the first `bytes` of a file, for reading and writing.
    ///
    /// # Errors
    /// mmap(2)'s; `EINVAL` for no bytes.
    pub fn of(file: BorrowedFd<'_>, bytes: usize) -> Result<Parts, Errno> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: no address is asked for, so no memory that is in use is replaced. What lies in
        // the file may be anything; only types for which all bytes are valid are made of it.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, prot, MapFlags::SHARED, file, 0) }?;
        // SAFETY: the range is the mapping just made, and the advice changes nothing in it. A core
        // dump would write it out, holes included; a refusal costs that alone.
        let _ = unsafe { madvise(start, bytes, Advice::LinuxDontDump) };
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Parts { mapping: Arc::new(Mapping { start, bytes }), at: 0 })
    }

    /// The next `len` of them, or `None` where so many are not left, or do not begin where a `T`
    /// may.
    pub fn take<T: FromBytes + IntoBytes>(&mut self, len: usize) -> Option<Part<T>> {
        let bytes = len.checked_mul(size_of::<T>())?;
        let end = self.at.checked_add(bytes).filter(|&end| end <= self.mapping.bytes)?;
        // A mapping starts at a page.
        if !self.at.is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: `at` is within the mapping, or just behind it where nothing is taken.
        let start = unsafe { self.mapping.start.add(self.at) }.cast();
        self.at = end;
        Some(Part { start, len, _mapping: Arc::clone(&self.mapping) })
    }
}

impl<T> AsRef<[T]> for Part<T> {
    fn as_ref(&self) -> &[T] {
        // SAFETY: `take` has checked that so many lie there, aligned; any bytes are a `T`
        // (FromBytes); they are mapped as long as `self` is; nobody else has this part, in this
        // process or another (see the file's head), and `&self` keeps `&mut` away.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> AsMut<[T]> for Part<T> {
    fn as_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `&mut self` is the only borrow.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn parts_lie_side_by_side_and_outlive_their_mapping_in_the_file() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(4096).expect("length");
        let mut parts = Parts::of(file.as_fd(), 4096).expect("mapped");
        let mut first = parts.take::<u64>(3).expect("three");
        let mut bytes = parts.take::<u8>(1).expect("one");
        assert!(parts.take::<u64>(1).is_none(), "not aligned");
        let mut rest = parts.take::<u8>(4096 - 25).expect("the rest");
        assert!(parts.take::<u8>(1).is_none() && parts.take::<u64>(usize::MAX).is_none());
        assert!(parts.take::<u8>(0).is_some());
        drop(parts);
        first.as_mut().fill(u64::from_le_bytes([1; 8]));
        bytes.as_mut().fill(2);
        rest.as_mut().fill(3);
        assert_eq!(first.as_ref().len(), 3);
        drop((first, bytes, rest));
        let mut seen = [0; 4096];
        rustix::io::pread(&file, &mut seen, 0).expect("read");
        assert!(seen[..24] == [1; 24] && seen[24] == 2 && seen[25..].iter().all(|&byte| byte == 3));
        assert_eq!(Parts::of(file.as_fd(), 0).err(), Some(Errno::INVAL));
    }
}
