//! A file handle: what a file system calls one of its files, whatever its names are.
//!
//! Invariant: no more bytes than the kernel's longest. What a handle says proves nothing by itself:
//! one that a guest tells is two small numbers, easily made up.

use std::ffi::CStr;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::sys::{self, HANDLE_BYTES_MAX};

/// `handle_type` of overlayfs (`OVL_FILEID_V1`, fs/overlayfs/overlayfs.h): the file system and
/// handle of the layer that the file first came from.
const OVERLAY_HANDLE: i32 = 0xf8;

/// Longer ones by another name are not kept; btrfs has 40 bytes.
pub(crate) const OTHER_BYTES_MAX: usize = 64;

/// Tries of what the host has no memory for.
const NOMEM_TRIES_MAX: usize = 64;

/// What a file handle is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandleKind {
    /// `AT_HANDLE_CONNECTABLE` (Linux 6.13): opens to a true path, also when nothing is cached.
    Connectable,
    /// Opens; a path is known for directories, and for files that the host has cached.
    Plain,
    /// `AT_HANDLE_FID` (Linux 6.5): cannot be opened, only compared.
    IdentityOnly,
}

/// A file handle: inode number and generation in the file system's own form.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Handle {
    kind: HandleKind,
    raw_type: i32,
    bytes: Box<[u8]>,
}

impl Handle {
    /// From a record of a peer; `None` beyond [`HANDLE_BYTES_MAX`] bytes.
    pub fn new(kind: HandleKind, raw_type: i32, bytes: &[u8]) -> Option<Handle> {
        let fits = bytes.len() <= HANDLE_BYTES_MAX;
        fits.then(|| Handle { kind, raw_type, bytes: bytes.into() })
    }

    /// What it is good for.
    pub const fn kind(&self) -> HandleKind {
        self.kind
    }

    /// `handle_type` of `struct file_handle`.
    pub const fn raw_type(&self) -> i32 {
        self.raw_type
    }

    /// The opaque bytes, at most [`HANDLE_BYTES_MAX`].
    pub const fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The upper half of the type are the kernel's own flags (`FILEID_IS_CONNECTABLE` and others),
    /// which may differ between kernels.
    const fn file_system_type(&self) -> i32 {
        self.raw_type & 0xffff
    }

    pub(super) const fn is_overlay(&self) -> bool {
        self.file_system_type() == OVERLAY_HANDLE
    }

    pub(super) fn same_file(&self, other: &Handle) -> bool {
        self.file_system_type() == other.file_system_type() && self.bytes == other.bytes
    }

    /// The best handle that the kernel and the file system give for `name` in `dir`, which `fd`
    /// is; `None` where there is none. Needs no privilege. Source: name_to_handle_at(2).
    pub fn of(dir: BorrowedFd<'_>, name: &CStr, fd: BorrowedFd<'_>) -> Option<Handle> {
        use HandleKind::{Connectable, IdentityOnly, Plain};
        let mut kinds = [Connectable, Plain, IdentityOnly].into_iter();
        kinds.find_map(|kind| Handle::of_kind(kind, dir, name, fd))
    }

    /// One that leads to `name` in `dir` also where the host has nothing cached, if it is short.
    pub(crate) fn of_other_name(dir: BorrowedFd<'_>, name: &CStr) -> Option<Handle> {
        let mut bytes = [0; HANDLE_BYTES_MAX];
        let (raw_type, len) = Handle::read(HandleKind::Connectable, dir, name, &mut bytes).ok()?;
        let bytes = bytes.get(..len).filter(|bytes| bytes.len() <= OTHER_BYTES_MAX)?;
        Handle::new(HandleKind::Connectable, raw_type, bytes)
    }

    /// One that does not depend on the name: the same for all links of a file.
    pub(super) fn nameless(fd: BorrowedFd<'_>) -> Option<Handle> {
        use HandleKind::{IdentityOnly, Plain};
        [Plain, IdentityOnly].into_iter().find_map(|kind| Handle::of_kind(kind, fd, c"", fd))
    }

    /// The bytes of one that does not depend on the name, of `name` in `dir`: its type and length.
    pub(crate) fn read(
        kind: HandleKind,
        dir: BorrowedFd<'_>,
        name: &CStr,
        into: &mut [u8; HANDLE_BYTES_MAX],
    ) -> Result<(i32, usize), Errno> {
        let flags = match kind {
            HandleKind::Connectable => 0x2,
            HandleKind::Plain => 0,
            HandleKind::IdentityOnly => 0x200,
        };
        let (raw_type, len, _mount_id) = sys::name_to_handle(dir, name, flags, into)?;
        Ok((raw_type, len))
    }

    /// Its file on the file system of `mount`, as `O_PATH`. Wants CAP_DAC_READ_SEARCH.
    ///
    /// Linux has no memory also for an inode whose number is being given to a new file
    /// (`iget_locked`), and says a moment later that the handle is stale.
    pub(super) fn open(&self, mount: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        let flags = (libc::O_PATH | libc::O_NOFOLLOW) | libc::O_CLOEXEC;
        let open = || sys::open_by_handle(mount, self.raw_type, &self.bytes, flags);
        for _ in 1..NOMEM_TRIES_MAX {
            match open() {
                Err(Errno::NOMEM) => rustix::thread::sched_yield(),
                other => return other,
            }
        }
        open()
    }

    pub(super) fn of_kind(
        kind: HandleKind,
        dir: BorrowedFd<'_>,
        name: &CStr,
        fd: BorrowedFd<'_>,
    ) -> Option<Handle> {
        let mut bytes = [0; HANDLE_BYTES_MAX];
        let got = match kind {
            // Excludes AT_EMPTY_PATH. If another file takes the name just now, handle and inode
            // number disagree, and the import ends in ESTALE.
            HandleKind::Connectable => sys::name_to_handle(dir, name, 0x2, &mut bytes),
            HandleKind::Plain => sys::name_to_handle(fd, c"", 0x1000, &mut bytes),
            HandleKind::IdentityOnly => sys::name_to_handle(fd, c"", 0x1200, &mut bytes),
        };
        let (raw_type, len, _mount_id) = got.ok()?;
        Handle::new(kind, raw_type, bytes.get(..len)?)
    }
}
