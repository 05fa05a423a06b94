//! Takes a node in again from what the guest remembers of it: a daemon that restarted, or closed
//! fds for want of them, finds the same file, or says ESTALE for this one node.
//!
//! Three ways, the cheap ones first:
//! ```text
//! parent fd + name -> openat2, one component --------------------------.
//! file handle -> open_by_handle_at -> /proc/self/fd -> path below root -+-> identity compared
//!                       | no path: readdir from the root on, by number -'
//! ```
//! A [`Recipe`] comes from a guest and may be forged, its [`Handle`] too (it is two small numbers).
//!
//! Invariants: the fd that is given back was reached by a walk from the share's root (or from a
//! parent that was) with openat2, RESOLVE_BENEATH and no symbolic links: a path read from the
//! kernel only proposes the walk. It is `O_PATH`, so that a forged recipe opens no FIFO and no
//! device. Another file never takes the place of the one that is gone.
//!
//! It must not keep node ids or counts (that is `nodes.rs`) or call the pass-through crate.

mod handle;
mod packed;
mod recipe;
mod search;
mod sys;

pub use handle::{Handle, HandleKind};
pub(crate) use packed::{OTHER_HEAD_BYTES, Packed};
pub use recipe::{MountIdentity, Recipe};
pub use sys::HANDLE_BYTES_MAX;

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicUsize;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::fdops::{self, ProcPath};
use recipe::{Seen, fs_id};

/// File systems of one share that handles can be opened on; beyond them nodes come back by name.
pub const MOUNTS_MAX: usize = 256;

/// RESOLVE_BENEATH answers EAGAIN when a rename anywhere may have disturbed it (openat2(2)).
const WALK_TRIES_MAX: usize = 16;

const O_PATH: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Why a node could not be taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// Removed, or moved where neither way finds it, or another file has its name or number.
    #[error("the file is gone or another one stands in its place")]
    Stale,
    /// It exists, but no way leads to it from the share's root. To the guest this is the same.
    #[error("the file lies outside of the share")]
    Outside,
    /// It was there when its handle was opened, and not where the kernel said that it is: somebody
    /// moves it, or its directories, and it may be looked for again.
    #[error("the file is being moved")]
    Moved,
    /// The host could not look, for a reason that says nothing about the file: it may be tried
    /// again.
    #[error("the host could not look for the file: {0}")]
    Host(#[source] Errno),
}

impl ImportError {
    /// What the guest is told. Gone and outside are not told apart.
    pub const fn errno(self) -> Errno {
        match self {
            ImportError::Stale | ImportError::Outside | ImportError::Moved => Errno::STALE,
            ImportError::Host(errno) => errno,
        }
    }

    fn from_walk(errno: Errno) -> ImportError {
        match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE | Errno::ACCESS => {
                ImportError::Stale
            }
            Errno::XDEV => ImportError::Outside,
            other => ImportError::Host(other),
        }
    }
}

struct Mount {
    identity: MountIdentity,
    /// Not `O_PATH`: open_by_handle_at wants a real fd.
    dir: OwnedFd,
}

/// The root of a share and the file systems below it that handles can be opened on.
pub struct Root {
    dir: OwnedFd,
    cross_mounts: bool,
    /// Nothing on another device than this one is part of the share.
    only_device: Option<(u32, u32)>,
    mounts: Vec<Mount>,
    /// Steps of all searches: see search.rs.
    searched: AtomicUsize,
    opens_handles: bool,
}

/// A file found again; the fd is `O_PATH`.
#[derive(Debug)]
pub enum Found {
    /// Under the parent and name of the recipe.
    ByName(OwnedFd),
    /// By these components below the root; none of them is the root itself.
    ByPath(OwnedFd, Vec<CString>),
}

impl Found {
    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Found::ByName(fd) | Found::ByPath(fd, _) => fd.as_fd(),
        }
    }
}

impl Root {
    /// For a directory (the fd may be `O_PATH`). `cross_mounts`: are files on file systems mounted
    /// below it part of the share?
    ///
    /// # Errors
    /// [`ImportError::Host`].
    pub fn new(dir: BorrowedFd<'_>, cross_mounts: bool) -> Result<Root, ImportError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let real = fdops::reopen(dir, flags).map_err(ImportError::Host)?;
        let (only_device, mounts, searched) = (None, Vec::new(), AtomicUsize::new(0));
        let handle = Handle::nameless(dir).filter(|handle| handle.kind() == HandleKind::Plain);
        let opens_handles = handle.is_some_and(|handle| handle.open(real.as_fd()).is_ok());
        let mut root =
            Root { dir: real, cross_mounts, only_device, mounts, searched, opens_handles };
        root.add_mount(dir)?;
        Ok(root)
    }

    /// Whether files are found by their handles, wherever they were moved.
    pub(crate) fn opens_handles(&self) -> bool {
        self.opens_handles
    }

    /// Refuses what lies on another device than the root: for a share whose mounts below could
    /// not be hidden.
    pub fn stay_on_device(mut self) -> Root {
        self.only_device = self.mounts.first().map(|mount| mount.identity.device);
        self
    }

    /// The root itself.
    pub(crate) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// The root's file system.
    pub(crate) fn identity(&self) -> Option<MountIdentity> {
        self.mounts.first().map(|mount| mount.identity)
    }

    /// The same file system as it is mounted now: device numbers change over a reboot.
    pub(crate) fn identity_now(&self, then: MountIdentity) -> MountIdentity {
        self.mount_of(&then).map_or(then, |mount| mount.identity)
    }

    /// Makes handles of the file system of `dir` resolvable. For the root of each mount below the
    /// share, before the first import: two mounts of copies of one image are only told apart where
    /// both are known. Returns whether it was new.
    ///
    /// # Errors
    /// [`ImportError::Host`], with `ENOSPC` beyond [`MOUNTS_MAX`].
    pub fn add_mount(&mut self, dir: BorrowedFd<'_>) -> Result<bool, ImportError> {
        let host = ImportError::Host;
        let device = Seen::of(dir).map_err(host)?.device;
        let identity = MountIdentity { fs_id: fs_id(dir).map_err(host)?, device };
        if self.mounts.iter().any(|mount| mount.identity == identity) {
            return Ok(false);
        }
        if self.mounts.len() >= MOUNTS_MAX {
            return Err(host(Errno::NOSPC));
        }
        let dir = fdops::reopen(dir, OFlags::RDONLY | OFlags::DIRECTORY).map_err(host)?;
        self.mounts.push(Mount { identity, dir });
        Ok(true)
    }

    /// Finds the file of a recipe: under its name in `parent` (which the caller has imported
    /// already), else by its handle, else by that of another name.
    ///
    /// # Errors
    /// See [`ImportError`].
    pub fn resolve(
        &self,
        recipe: &Recipe,
        parent: Option<BorrowedFd<'_>>,
    ) -> Result<Found, ImportError> {
        if let Some(parent) = parent {
            match self.by_name(recipe, parent) {
                Err(ImportError::Stale | ImportError::Outside) => {}
                other => return other,
            }
        }
        match self.by_handle(recipe) {
            Err(ImportError::Stale | ImportError::Outside) if recipe.other.is_some() => {
                self.by_other_name(recipe)
            }
            found => found,
        }
    }

    /// What the handle by another name leads to, if it is the file that the other handle names.
    fn by_other_name(&self, recipe: &Recipe) -> Result<Found, ImportError> {
        let other = Recipe { handle: recipe.other.clone(), ..recipe.clone() };
        let found = self.by_handle(&other)?;
        let now = Handle::nameless(found.fd());
        let is_it = recipe.handle.as_ref().zip(now).is_some_and(|(then, now)| then.same_file(&now));
        if is_it { Ok(found) } else { Err(ImportError::Stale) }
    }

    /// By parent and name alone: no privilege needed.
    ///
    /// # Errors
    /// See [`ImportError`].
    pub fn by_name(&self, recipe: &Recipe, parent: BorrowedFd<'_>) -> Result<Found, ImportError> {
        fdops::check_name(&recipe.name).map_err(|_| ImportError::Stale)?;
        let fd = self.walk(parent, &recipe.name)?;
        self.check_device(fd.as_fd())?;
        let same = recipe.describes(parent, fd.as_fd()).map_err(ImportError::Host)?;
        if same { Ok(Found::ByName(fd)) } else { Err(ImportError::Stale) }
    }

    /// The file, whatever its name, and wherever it is: not for guests.
    pub(crate) fn open_handle(&self, recipe: &Recipe) -> Result<(OwnedFd, Seen), ImportError> {
        let Some(handle) = &recipe.handle else { return Err(ImportError::Stale) };
        if handle.kind() == HandleKind::IdentityOnly {
            return Err(ImportError::Stale);
        }
        let mount = self.mount_of(&recipe.mount).ok_or(ImportError::Stale)?;
        let opened = handle.open(mount.dir.as_fd()).map_err(|errno| match errno {
            Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::IO | Errno::INTR => {
                ImportError::Host(errno)
            }
            // ESTALE; EPERM without the capability; EINVAL, EOPNOTSUPP for a forged one, or one
            // of a newer kernel.
            _ => ImportError::Stale,
        })?;
        let seen = Seen::of(opened.as_fd()).map_err(ImportError::Host)?;
        if !recipe.resembles(&seen) {
            return Err(ImportError::Stale);
        }
        Ok((opened, seen))
    }

    /// By the handle alone: finds renamed files and moved directories too. Wants
    /// CAP_DAC_READ_SEARCH; without it everything is [`ImportError::Stale`].
    ///
    /// # Errors
    /// See [`ImportError`].
    pub fn by_handle(&self, recipe: &Recipe) -> Result<Found, ImportError> {
        let (opened, seen) = self.open_handle(recipe)?;
        let components = self.path_below(opened.as_fd())?;
        let fd =
            self.walk(self.dir.as_fd(), &joined(&components)?).map_err(|error| match error {
                ImportError::Stale => ImportError::Moved,
                other => other,
            })?;
        self.check_device(fd.as_fd())?;
        let walked = Seen::of(fd.as_fd()).map_err(ImportError::Host)?;
        // Both are open, so equal numbers are one file.
        if (walked.device, walked.ino) != (seen.device, seen.ino) {
            return Err(ImportError::Moved);
        }
        Ok(Found::ByPath(fd, components))
    }

    /// The only mount with this file system's id. Device numbers do not decide: they change hands
    /// with a remount, and copies of one image (which have one id, and equal handles) would be
    /// taken for each other; with two alike, only names and their mount points tell.
    fn mount_of(&self, wanted: &MountIdentity) -> Option<&Mount> {
        let mut alike = self.mounts.iter().filter(|mount| {
            let same_id = mount.identity.fs_id == wanted.fs_id;
            same_id && (wanted.fs_id != 0 || mount.identity == *wanted)
        });
        let only = alike.next()?;
        alike.next().is_none().then_some(only)
    }

    fn check_device(&self, fd: BorrowedFd<'_>) -> Result<(), ImportError> {
        let Some(only) = self.only_device else { return Ok(()) };
        let seen = Seen::of(fd).map_err(ImportError::Host)?;
        if seen.device == only { Ok(()) } else { Err(ImportError::Outside) }
    }

    /// The components that the kernel names, as a proposal: a walk decides.
    ///
    /// # Errors
    /// See [`ImportError`].
    pub fn path_below(&self, fd: BorrowedFd<'_>) -> Result<Vec<CString>, ImportError> {
        let root = path_of(self.dir.as_fd())?;
        let path = path_of(fd)?;
        let root = root.to_bytes().strip_suffix(b"/").unwrap_or(root.to_bytes());
        let below = path.to_bytes().strip_prefix(root).and_then(|rest| rest.strip_prefix(b"/"));
        let below = below.ok_or(ImportError::Outside)?;
        let components = below.split(|&byte| byte == b'/').map(|component| {
            let name = CString::new(component).map_err(|_| ImportError::Stale)?;
            fdops::check_name(&name).map_err(|_| ImportError::Stale)?;
            Ok(name)
        });
        components.collect()
    }

    fn walk(&self, from: BorrowedFd<'_>, path: &CStr) -> Result<OwnedFd, ImportError> {
        let mut how =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        if !self.cross_mounts {
            how |= ResolveFlags::NO_XDEV;
        }
        for _ in 0..WALK_TRIES_MAX {
            match rustix::fs::openat2(from, path, O_PATH, Mode::empty(), how) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other.map_err(ImportError::from_walk),
            }
        }
        Err(ImportError::Host(Errno::AGAIN))
    }
}

fn joined(components: &[CString]) -> Result<CString, ImportError> {
    let parts: Vec<&[u8]> = components.iter().map(|name| name.to_bytes()).collect();
    CString::new(parts.join(&b'/')).map_err(|_| ImportError::Stale)
}

/// Longer than PATH_MAX: no path is known, which the name may cure.
fn path_of(fd: BorrowedFd<'_>) -> Result<CString, ImportError> {
    let path = rustix::fs::readlinkat(CWD, ProcPath::of(fd).as_c_str(), Vec::new());
    path.map_err(|errno| match errno {
        Errno::NAMETOOLONG => ImportError::Stale,
        other => ImportError::Host(other),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fdops::{FsKind, LocalFs};
    use rustix::fs::{RenameFlags, renameat_with};
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    #[test]
    fn a_recipe_is_of_one_file_while_two_change_names() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let opened = std::fs::File::open(dir.path()).expect("open");
        let root = Root::new(opened.as_fd(), false).expect("a root");
        let mount = root.identity().expect("a file system");
        let recipe = |name: &CStr| {
            std::fs::write(dir.path().join(name.to_str().expect("UTF-8")), "").expect("write");
            Recipe::brief(opened.as_fd(), name, 1).expect("a recipe")
        };
        let both = [recipe(c"one"), recipe(c"two")];
        let now = || Recipe::brief_on(mount, opened.as_fd(), c"one", 1);
        if now().is_none() {
            eprintln!("SKIPPED: the temporary directory's file system has no such handles");
            return;
        }
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (dir, flags) = (&opened, RenameFlags::EXCHANGE);
                while !over.load(Relaxed) {
                    renameat_with(dir, c"one", dir, c"two", flags).expect("rename");
                }
            });
            let what = |recipe: &Recipe| (recipe.handle.clone(), recipe.ino);
            let known = both.each_ref().map(what);
            let is_of_one = |_| now().is_some_and(|now| known.contains(&what(&now)));
            let right = (0..200_000).all(is_of_one);
            over.store(true, Relaxed);
            assert!(right, "the handle of one and the number of the other");
        });
    }

    #[test]
    fn a_file_that_is_gone_is_stale_also_while_a_new_one_gets_its_number() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| dir.path().join(name);
        let opened = std::fs::File::open(dir.path()).expect("open");
        if fdops::fs_kind(opened.as_fd()) == Ok(FsKind::Local(LocalFs::Tmpfs)) {
            eprintln!("SKIPPED: the temporary directory is in memory, where no number comes again");
            return;
        }
        let root = Root::new(opened.as_fd(), false).expect("a root");
        std::fs::write(path("gone"), "").expect("write");
        let recipe = Recipe::of(opened.as_fd(), c"gone", 1).expect("a recipe");
        std::fs::remove_file(path("gone")).expect("remove");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Relaxed) {
                    std::fs::write(path("new"), "").expect("write");
                    std::fs::remove_file(path("new")).expect("remove");
                }
            });
            let found = (0..20_000).map(|_| root.open_handle(&recipe).err());
            let wrong = found.filter(|found| !matches!(found, Some(ImportError::Stale))).count();
            over.store(true, Relaxed);
            assert_eq!(wrong, 0);
        });
    }
}
