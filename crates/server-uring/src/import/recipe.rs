//! What is remembered of a node, and whether a file is the one that was described.
//!
//! Invariant: a file is taken for the described one only by what its file system never gives to
//! two files: its handle, or inode number with birth time or generation. Where the file is, and how
//! it is reached, `import.rs` says.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::handle::{Handle, HandleKind};
use super::{ImportError, O_PATH, sys};
use crate::fdops;

/// What [`Seen`] has.
const IDENTITY: StatxFlags =
    StatxFlags::TYPE.union(StatxFlags::NLINK).union(StatxFlags::INO).union(StatxFlags::BTIME);

/// Which file system: `f_fsid` of statfs(2) stays over remounts for ext4 and btrfs; the device
/// number tells apart, while they are mounted, what has no such id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MountIdentity {
    /// `f_fsid`; 0 where the file system has none.
    pub fs_id: u64,
    /// Major and minor device number of statx(2).
    pub device: (u32, u32),
}

/// What rebuilds one node: the content of a NODE record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// Where the file system has one.
    pub handle: Option<Handle>,
    /// By another name of the same file, where the guest has seen one: opens to a true path.
    pub other: Option<Handle>,
    /// The file system.
    pub mount: MountIdentity,
    /// Inode number on the host.
    pub ino: u64,
    /// `S_IFMT` bits: a file does not change its kind.
    pub kind: u16,
    /// Birth time, seconds and nanoseconds, where the file system keeps it.
    pub btime: Option<(i64, u32)>,
    /// FS_IOC_GETVERSION; only asked for without a handle (which contains it).
    pub generation: Option<u32>,
    /// The guest's id of the directory that it was found in.
    pub parent: u64,
    /// Its name there: one component.
    pub name: CString,
}

impl Recipe {
    /// Describes `name` in `dir` (which the guest knows as `parent`).
    ///
    /// # Errors
    /// [`ImportError::Stale`] if it is not there; [`ImportError::Host`], with `EINVAL` for what is
    /// not one component.
    pub fn of(dir: BorrowedFd<'_>, name: &CStr, parent: u64) -> Result<Recipe, ImportError> {
        fdops::check_name(name).map_err(ImportError::Host)?;
        let fd =
            rustix::fs::openat(dir, name, O_PATH, Mode::empty()).map_err(ImportError::from_walk)?;
        Recipe::of_fd(dir, name, parent, fd.as_fd())
    }

    /// As [`Recipe::of`], with the fd of the file in hand: spares the open.
    ///
    /// # Errors
    /// As there.
    pub fn of_fd(
        dir: BorrowedFd<'_>,
        name: &CStr,
        parent: u64,
        fd: BorrowedFd<'_>,
    ) -> Result<Recipe, ImportError> {
        Recipe::with(Handle::of(dir, name, fd), name, parent, fd)
    }

    /// As [`Recipe::of`], for as long as this daemon runs: the handle does not depend on the name,
    /// so that any link of the file can be compared with it.
    ///
    /// # Errors
    /// As there.
    pub fn brief(dir: BorrowedFd<'_>, name: &CStr, parent: u64) -> Result<Recipe, ImportError> {
        fdops::check_name(name).map_err(ImportError::Host)?;
        let fd =
            rustix::fs::openat(dir, name, O_PATH, Mode::empty()).map_err(ImportError::from_walk)?;
        Recipe::with(Handle::nameless(fd.as_fd()), name, parent, fd.as_fd())
    }

    /// As [`Recipe::brief`] without asking for the file system, where the file lies on `mount` and
    /// has a handle that opens it; else `None`.
    pub(crate) fn brief_on(
        mount: MountIdentity,
        dir: BorrowedFd<'_>,
        name: &CStr,
        parent: u64,
    ) -> Option<Recipe> {
        // The name may be given to another file between two calls by it.
        let fd = rustix::fs::openat(dir, name, O_PATH, Mode::empty()).ok()?;
        let handle = Some(Handle::of_kind(HandleKind::Plain, dir, name, fd.as_fd())?);
        let Seen { ino, kind, btime, links, device } = Seen::of(fd.as_fd()).ok()?;
        let (other, generation, name) = (None, None, name.into());
        let is_there = links > 0 && device == mount.device;
        let recipe = Recipe { handle, other, mount, ino, kind, btime, generation, parent, name };
        is_there.then_some(recipe)
    }

    /// As [`Recipe::brief`] with the file's fd, for a name that cannot be looked at now: whether it
    /// leads there the import will see.
    ///
    /// # Errors
    /// As there.
    pub fn brief_of_fd(
        fd: BorrowedFd<'_>,
        name: &CStr,
        parent: u64,
    ) -> Result<Recipe, ImportError> {
        Recipe::with(Handle::nameless(fd), name, parent, fd)
    }

    /// Whether it tells its file from another one that got the same inode number.
    pub fn proves_identity(&self) -> bool {
        self.handle.is_some() || self.btime.is_some() || self.generation.is_some()
    }

    fn with(
        handle: Option<Handle>,
        name: &CStr,
        parent: u64,
        fd: BorrowedFd<'_>,
    ) -> Result<Recipe, ImportError> {
        let seen = Seen::of(fd).map_err(ImportError::Host)?;
        let generation = if handle.is_none() { generation(fd, seen.kind) } else { None };
        let mount =
            MountIdentity { fs_id: fs_id(fd).map_err(ImportError::Host)?, device: seen.device };
        let Seen { ino, kind, btime, .. } = seen;
        let (other, name) = (None, name.into());
        Ok(Recipe { handle, other, mount, ino, kind, btime, generation, parent, name })
    }

    /// Is the file at its name in `dir`, open as `fd`, the one that was described?
    ///
    /// # Errors
    /// The host could not look.
    pub fn describes(&self, dir: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> Result<bool, Errno> {
        let seen = Seen::of(fd)?;
        if seen.links == 0 || seen.kind != self.kind {
            return Ok(false);
        }
        let now = self.handle.as_ref().and_then(|h| Handle::of_kind(h.kind(), dir, &self.name, fd));
        match (&self.handle, now) {
            // The first write to a lower file gives it another birth time, and this handle stays.
            (Some(handle), Some(now)) if handle.is_overlay() => Ok(handle.same_file(&now)),
            // Inode number, generation and birth time: enough on whatever device it is now.
            (Some(handle), Some(now)) => Ok(handle.same_file(&now) && self.resembles(&seen)),
            (Some(_) | None, _) => {
                // Where a handle cannot be had now, it proves nothing.
                if self.btime.is_none() && self.generation.is_none() {
                    return Ok(false);
                }
                let same_generation =
                    self.generation.is_none() || self.generation == generation(fd, seen.kind);
                Ok(self.resembles(&seen) && same_generation && fs_id(fd)? == self.mount.fs_id)
            }
        }
    }

    pub(super) fn resembles(&self, seen: &Seen) -> bool {
        let same_birth = self.btime.is_none() || self.btime == seen.btime;
        seen.links > 0 && (self.ino, self.kind) == (seen.ino, seen.kind) && same_birth
    }
}

/// What one statx tells.
pub(crate) struct Seen {
    pub(super) ino: u64,
    kind: u16,
    links: u32,
    btime: Option<(i64, u32)>,
    pub(super) device: (u32, u32),
}

impl Seen {
    pub(super) fn of(fd: BorrowedFd<'_>) -> Result<Seen, Errno> {
        let got = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, IDENTITY)?;
        let btime = (got.stx_btime.tv_sec, got.stx_btime.tv_nsec);
        Ok(Seen {
            ino: got.stx_ino,
            kind: got.stx_mode & 0o170_000,
            links: got.stx_nlink,
            btime: (got.stx_mask & StatxFlags::BTIME.bits() != 0).then_some(btime),
            device: (got.stx_dev_major, got.stx_dev_minor),
        })
    }
}

pub(super) fn fs_id(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    Ok(rustix::fs::fstatvfs(fd)?.f_fsid)
}

/// Wants a real fd, so only for what may be opened without harm.
fn generation(fd: BorrowedFd<'_>, kind: u16) -> Option<u32> {
    let harmless = [FileType::RegularFile, FileType::Directory];
    if !harmless.contains(&FileType::from_raw_mode(kind.into())) {
        return None;
    }
    let real = fdops::reopen(fd, OFlags::RDONLY | OFlags::NONBLOCK).ok()?;
    sys::generation(real.as_fd()).ok()
}
