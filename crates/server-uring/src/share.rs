//! The directory that a share gives: as the host has it, and as a worker gets it.
//!
//! Invariant: a [`ShareRoot`] shows of the host's mounts what it is to show, or says that it does
//! not ([`ShareRoot::hidden`]); then other devices are refused by whoever serves it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use crate::fs::{FsError, Submounts};
use crate::passthrough::Stat;
use crate::sandbox::root;

/// The directory that a share gives, opened: what a process without rights can be handed.
///
/// With `submounts=hide` it is the root of a private copy of the one mount: nothing that is or gets
/// mounted on the host below it can be seen, and no path leads out of it. The copy lives as long as
/// an fd of it does, or a worker has it in its root.
#[derive(Debug)]
pub struct ShareRoot {
    fd: OwnedFd,
    /// False where mounts below could not be hidden so: other devices are refused then (EXDEV).
    hidden: bool,
}

/// A share's directory as the host has it, from which workers get copies.
#[derive(Debug)]
pub struct ShareDir {
    path: PathBuf,
    plain: OwnedFd,
    identity: Identity,
    merged: bool,
    read_only: bool,
}

impl ShareDir {
    /// Opens `dir`.
    ///
    /// # Errors
    /// [`FsError::Open`].
    pub fn open(dir: &Path, submounts: Submounts, read_only: bool) -> Result<ShareDir, FsError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let plain = rustix::fs::openat(CWD, dir, flags, Mode::empty());
        let plain = plain.map_err(|source| FsError::Open { path: dir.to_owned(), source })?;
        let identity = Identity::of(&plain).map_err(FsError::Root)?;
        let merged = submounts == Submounts::Merge;
        Ok(ShareDir { path: dir.to_owned(), plain, identity, merged, read_only })
    }

    /// Where it was.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What whoever is given it has.
    pub fn given(&self) -> Given {
        Given { identity: self.identity, read_only: self.read_only }
    }

    /// For this process: the directory itself where mounts below are to be seen, else a copy. That
    /// wants CAP_SYS_ADMIN; without, mounts are hidden by refusing other devices.
    ///
    /// # Errors
    /// What open_tree says.
    pub fn root(&self) -> Result<ShareRoot, Errno> {
        let copy = if self.merged { Err(Errno::PERM) } else { self.copy() };
        match copy {
            Err(Errno::PERM | Errno::INVAL | Errno::NOSYS | Errno::ACCESS) => {
                let fd = rustix::io::fcntl_dupfd_cloexec(&self.plain, 0)?;
                Ok(ShareRoot { fd, hidden: self.merged })
            }
            other => other,
        }
    }

    /// A copy of its mount, for another root; with what is mounted below where that is to be seen,
    /// and what will be where the host's mounts are shared.
    ///
    /// # Errors
    /// What open_tree says.
    pub fn copy(&self) -> Result<ShareRoot, Errno> {
        self.copy_of(self.plain.as_fd(), self.merged).map(|fd| ShareRoot { fd, hidden: true })
    }

    /// A copy in a user namespace of one's own, where the mounts are copies already: the directory
    /// is found by its path, and must be the same; an fd of the old mount would lead out of it.
    /// What is mounted below cannot be taken away there, so it comes with it and is refused as
    /// another device, where it is to be hidden.
    ///
    /// # Errors
    /// What the system calls say; `STALE`: the path leads elsewhere by now.
    pub fn copy_in_own_users(&self) -> Result<ShareRoot, Errno> {
        let here = self.identity.find(&self.path)?;
        match self.copy_of(here.as_fd(), self.merged) {
            Err(Errno::INVAL) if !self.merged => {
                let fd = self.copy_of(here.as_fd(), true)?;
                Ok(ShareRoot { fd, hidden: false })
            }
            other => other.map(|fd| ShareRoot { fd, hidden: true }),
        }
    }

    fn copy_of(&self, dir: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
        let fd = rustix::mount::open_tree(dir, c"", flags)?;
        if let Err(error) = root::harden(fd.as_fd(), self.read_only, self.merged) {
            tracing::warn!(%error, "an old kernel: what a share may not, only the daemon prevents");
        }
        Ok(fd)
    }
}

impl ShareRoot {
    /// The same directory where a worker has it.
    pub fn at(fd: OwnedFd, hidden: bool) -> ShareRoot {
        ShareRoot { fd, hidden }
    }

    /// Whether mounts below cannot be seen, or are to be.
    pub fn hidden(&self) -> bool {
        self.hidden
    }

    /// Another one of the same copy, for another session.
    ///
    /// # Errors
    /// No fd is left.
    pub fn try_clone(&self) -> std::io::Result<ShareRoot> {
        Ok(ShareRoot { fd: self.fd.try_clone()?, hidden: self.hidden })
    }

    /// A directory below, or this one for an empty path. Guests may have made links in the share:
    /// none is followed, nothing leads out, nor into a mount that is to be hidden.
    ///
    /// # Errors
    /// What openat2 says; `EXDEV` where the path leads out.
    pub fn descend(&self, path: &[u8]) -> Result<ShareRoot, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        if !self.hidden {
            resolve |= ResolveFlags::NO_XDEV;
        }
        let path = if path.is_empty() { b".".as_slice() } else { path };
        let fd = rustix::fs::openat2(&self.fd, path, flags, Mode::empty(), resolve)?;
        Ok(ShareRoot { fd, hidden: self.hidden })
    }
}

/// A directory, and whether it may be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    identity: Identity,
    read_only: bool,
}

impl Given {
    /// Whether who has this one has the other one, too.
    pub fn covers(self, other: Given) -> bool {
        self.is_of(other) && (other.read_only || !self.read_only)
    }

    /// Whether it is the same directory.
    pub fn is_of(self, other: Given) -> bool {
        self.identity == other.identity
    }
}

/// Which directory it is, wherever its file system is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    dev: u64,
    ino: u64,
}

impl Identity {
    /// Of an fd.
    ///
    /// # Errors
    /// What statx says.
    pub fn of(dir: &OwnedFd) -> Result<Identity, Errno> {
        let Stat { dev, ino, .. } = Stat::of(dir)?;
        Ok(Identity { dev, ino })
    }

    /// The directory in the mounts that this process sees, where it was before.
    ///
    /// # Errors
    /// What the system calls say; `STALE`: the path leads elsewhere by now.
    pub fn find(self, path: &Path) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let here = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
        if Identity::of(&here)? == self { Ok(here) } else { Err(Errno::STALE) }
    }
}

impl From<ShareRoot> for OwnedFd {
    fn from(root: ShareRoot) -> OwnedFd {
        root.fd
    }
}

impl AsFd for ShareRoot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
