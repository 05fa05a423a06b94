//! The last way to a file: its inode number is looked for in the share, directory by directory.
//!
//! For a file that is there and none of whose names is known: the one that is left is a third one,
//! or in a directory that the guest has forgotten, or a RENAME gave it whose reply was lost with
//! its daemon. A handle opens such a file, and tells no path where the host has none in its cache.
//!
//! Invariants: what is given back was reached by a walk from the root, as everything is, and no
//! directory is read that was not. What a guest can make this cost is bounded, for each search and
//! for all of a session: it may make up recipes, and directories as deep as it likes.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{Dir, FileType, OFlags};

use super::recipe::Seen;
use super::{Found, ImportError, Recipe, Root, joined};
use crate::fdops;

/// Of a larger share some are not found. A step is an entry, or a component of a path; a
/// directory's long name is some more, so that what is kept of them takes some 10 MB at most.
const STEPS_MAX: usize = 1 << 17;
/// Of all searches of a session, whether they find something or not.
const ALL_STEPS_MAX: usize = 32 * STEPS_MAX;

/// Directories in the order in which they are read: (the one above, its name, how deep).
struct Directories(Vec<(usize, CString, usize)>);

impl Directories {
    fn path(&self, mut at: usize) -> Vec<CString> {
        let mut path = Vec::new();
        while let Some((above, name, _)) = self.0.get(at).filter(|_| at != 0) {
            path.push(name.clone());
            at = *above;
        }
        path.reverse();
        path
    }

    fn depth(&self, at: usize) -> usize {
        self.0.get(at).map_or(0, |(_, _, depth)| *depth)
    }

    fn push(&mut self, above: usize, name: &CStr) {
        self.0.push((above, name.to_owned(), self.depth(above) + 1));
    }
}

/// What one search may still do.
struct Steps<'a> {
    root: &'a Root,
    left: usize,
}

impl Steps<'_> {
    fn take(&mut self, steps: usize) -> Option<()> {
        self.left = self.left.checked_sub(steps)?;
        let before = self.root.searched.fetch_add(steps, Ordering::Relaxed);
        (before < ALL_STEPS_MAX).then_some(())
    }
}

impl Root {
    /// Finds a file by its number. Directories tell where they are by themselves. Takes long.
    ///
    /// # Errors
    /// See [`ImportError`].
    pub(crate) fn by_search(&self, recipe: &Recipe) -> Result<Found, ImportError> {
        let is_over = self.searched.load(Ordering::Relaxed) >= ALL_STEPS_MAX;
        if is_over || recipe.kind == libc::S_IFDIR as u16 {
            return Err(ImportError::Stale);
        }
        // Open, so that the number stays its own. One that no name leads to is not looked for.
        let (_opened, seen) = self.open_handle(recipe)?;
        let (fd, path) = self.search(&seen).ok_or(ImportError::Stale)?;
        tracing::debug!(?path, "a file was found by its number alone");
        Ok(Found::ByPath(fd, path))
    }

    fn search(&self, wanted: &Seen) -> Option<(OwnedFd, Vec<CString>)> {
        let mut steps = Steps { root: self, left: STEPS_MAX };
        let mut directories = Directories(vec![(0, CString::default(), 0)]);
        let mut next = 0;
        while next < directories.0.len() {
            let at = next;
            next += 1;
            steps.take(1 + directories.depth(at))?;
            // What is gone by now, or on another file system, is not looked into.
            let dir = self.directory_at(&directories.path(at)).ok().map(Dir::new);
            for entry in dir.into_iter().flatten().flatten().map_while(Result::ok) {
                steps.take(1)?;
                let (name, kind) = (entry.file_name(), entry.file_type());
                if matches!(name.to_bytes(), b"." | b"..") {
                    continue;
                }
                if entry.ino() == wanted.ino {
                    steps.take(1 + directories.depth(at))?;
                    let mut path = directories.path(at);
                    path.push(name.to_owned());
                    if let Some(fd) = self.is_at(&path, wanted) {
                        return Some((fd, path));
                    }
                }
                if matches!(kind, FileType::Directory | FileType::Unknown) {
                    steps.take(name.to_bytes().len() / 32)?;
                    directories.push(at, name);
                }
            }
        }
        None
    }

    fn directory_at(&self, path: &[CString]) -> Result<OwnedFd, ImportError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        if path.is_empty() {
            return fdops::reopen(self.dir.as_fd(), flags).map_err(ImportError::Host);
        }
        let fd = self.walk(self.dir.as_fd(), &joined(path)?)?;
        self.check_device(fd.as_fd())?;
        fdops::reopen(fd.as_fd(), flags).map_err(ImportError::Host)
    }

    fn is_at(&self, path: &[CString], wanted: &Seen) -> Option<OwnedFd> {
        let fd = self.walk(self.dir.as_fd(), &joined(path).ok()?).ok()?;
        self.check_device(fd.as_fd()).ok()?;
        let seen = Seen::of(fd.as_fd()).ok()?;
        ((seen.device, seen.ino) == (wanted.device, wanted.ino)).then_some(fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(path: &std::path::Path) -> Seen {
        Seen::of(std::fs::File::open(path).expect("open").as_fd()).expect("stat")
    }

    #[test]
    fn what_a_guest_can_have_searched_is_bounded() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (share, outside) = (dir.path().join("share"), dir.path().join("outside"));
        // The way to each is longer than the one before: steps, and not entries, are what it costs.
        std::fs::create_dir_all(share.join("d/".repeat(600))).expect("mkdir");
        std::fs::write(share.join("there"), "").expect("write");
        std::fs::write(&outside, "").expect("write");
        let opened = std::fs::File::open(&share).expect("open");
        let root = Root::new(opened.as_fd(), false).expect("a root");
        let searched = || root.searched.load(Ordering::Relaxed);
        let there = seen(&share.join("there"));
        let (_, path) = root.search(&there).expect("found");
        assert_eq!((path, searched() < 16), (vec![c"there".to_owned()], true));
        let mut searches = 0;
        while searched() < ALL_STEPS_MAX {
            let before = searched();
            assert!(root.search(&seen(&outside)).is_none());
            assert!(searched() - before <= STEPS_MAX);
            searches += 1;
        }
        assert_eq!(searches, 33);
        assert!(root.search(&there).is_none(), "also what would be found");
        assert!(searched() <= ALL_STEPS_MAX + STEPS_MAX + 16);
    }
}
