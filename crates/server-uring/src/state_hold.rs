//! Which state directory a daemon has: the one that it was told, or one of its own by where it
//! listens.
//!
//! Invariants: it is a directory of ours that others cannot reach; of two daemons one has it
//! (flock), as long as any process of that one may write there. What is in it is state_dir.rs.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Dir, FlockOperation, Mode, OFlags, Stat};
use rustix::io::{Errno, retry_on_intr};

use crate::address::Address;
use crate::config::Place;
use crate::sandbox::root;
use crate::sha256::sha256;
use crate::share::Identity;
use crate::state_dir::StateDir;

/// Another daemon's directory of this name may go while it is opened.
const TRIES_MAX: usize = 16;

/// Why there is no state directory, or no file in it.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be made or opened.
    #[error("cannot use {path} as the state directory (--state-dir)")]
    Open {
        /// As configured.
        path: PathBuf,
        /// The kernel's answer.
        source: Errno,
    },
    /// Others might read or change what is in it.
    #[error("{path} is no state directory: it must be a directory of ours, with mode 0700")]
    NotOurs {
        /// As configured.
        path: PathBuf,
    },
    /// Another daemon works with it.
    #[error("{path} is in use by another daemon: give each its own --state-dir")]
    InUse {
        /// As configured.
        path: PathBuf,
    },
    /// A session's file cannot be made.
    #[error("cannot make a session's file in the state directory")]
    Create(#[source] Errno),
}

const DEFAULT_ABOVE: &str = "/run/ringfsd";
const IN_USE_PATIENCE: Duration = Duration::from_secs(3);
const IN_USE_PAUSE: Duration = Duration::from_millis(10);

/// Takes the directory that `--state-dir` says. By default the daemon that listens where this one
/// does, after it, has the same, and others have another. Without a default one it goes on, and
/// says so.
///
/// # Errors
/// See [`StateError`]: a directory that was asked for.
pub fn hold(
    option: &Place,
    listen: &[Address],
    grace: Duration,
) -> Result<Option<Held>, StateError> {
    let take = || match option {
        Place::None => Ok(None),
        Place::At(path) => Held::take(path, false).map(Some),
        Place::Default => hold_default(Path::new(DEFAULT_ABOVE), listen, grace).map(Some),
    };
    // The worker of a daemon that was killed ends a moment after it.
    // Counted in looks: a machine that stands still meanwhile gives it no time to end.
    let mut looks = IN_USE_PATIENCE.as_millis() / IN_USE_PAUSE.as_millis();
    let held = loop {
        match take() {
            Err(StateError::InUse { .. }) if looks > 0 => {
                looks -= 1;
                std::thread::sleep(IN_USE_PAUSE);
            }
            other => break other,
        }
    };
    match held {
        Ok(held) => Ok(held),
        Err(error) if matches!(option, Place::At(_)) => Err(error),
        Err(error) => {
            let why = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, why, "no state directory: were this daemon killed, requests \
                that were running then would run again");
            Ok(None)
        }
    }
}

/// Of daemons that are gone, as many are looked at when one starts.
const SWEPT_MAX: usize = 64;

/// The directory of this daemon's listeners, which no two daemons share. What others have left
/// whose grace time is over, and that none has taken up, goes: no daemon may ever listen there.
fn hold_default(above: &Path, listen: &[Address], grace: Duration) -> Result<Held, StateError> {
    let failed = |source| StateError::Open { path: above.to_owned(), source };
    let held = open_ours(above, Mode::WGRP | Mode::WOTH)?
        .ok_or(StateError::InUse { path: above.to_owned() })?;
    // So that nobody finds his own in the hands of one who looks.
    let locked = retry_on_intr(|| rustix::fs::flock(&held, FlockOperation::LockExclusive));
    locked.map_err(failed)?;
    let path = above.join(name_of(listen));
    let ours = Held::take(&path, true)?;
    let names = Dir::read_from(&held).map_err(failed)?.flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let others = names.map(|name| above.join(name)).filter(|other| {
        let name = other.file_name().unwrap_or_default();
        name.len() == NAME_CHARS && *other != path
    });
    for other in others.take(SWEPT_MAX) {
        if let Ok(Some(dir)) = take(&other) {
            let held = Held::of(dir, other, true)?;
            let _ = StateDir::of(held, grace).look();
        }
    }
    Ok(ours)
}

const NAME_CHARS: usize = 16;

fn name_of(listen: &[Address]) -> String {
    let mut names: Vec<_> = listen.iter().map(ToString::to_string).collect();
    names.sort();
    let hash = sha256(names.join("\n").as_bytes());
    hash[..NAME_CHARS / 2].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A state directory that this daemon has taken, and has not looked into.
#[derive(Debug)]
pub struct Held {
    /// Locked against other daemons as long as anything of this one may write: whoever of it has
    /// an fd shares in the lock.
    dir: OwnedFd,
    path: PathBuf,
    identity: Identity,
    /// Removed at the end, if nothing is in it.
    passing: bool,
}

impl Held {
    pub(crate) fn take(path: &Path, passing: bool) -> Result<Held, StateError> {
        // Somebody who takes his empty directory away does it with the lock in his hand.
        let taken = (0..TRIES_MAX).find_map(|_| take(path).transpose());
        let dir = taken.unwrap_or(Err(StateError::InUse { path: path.to_owned() }))?;
        Held::of(dir, path.to_owned(), passing)
    }

    fn of(dir: OwnedFd, path: PathBuf, passing: bool) -> Result<Held, StateError> {
        match Identity::of(&dir) {
            Ok(identity) => Ok(Held { dir, path, identity, passing }),
            Err(source) => Err(StateError::Open { path, source }),
        }
    }

    /// For the worker; the directory stays when that one ends.
    ///
    /// # Errors
    /// No fd is left.
    pub fn lend(&self) -> std::io::Result<Held> {
        let (dir, path) = (self.dir.try_clone()?, self.path.clone());
        Ok(Held { dir, path, identity: self.identity, passing: false })
    }

    /// For a worker in a user namespace of its own, which must not have the parent's fd: that one
    /// is of the host's mounts, and leads up from there. As
    /// [`ShareDir::copy_in_own_users`](crate::share::ShareDir::copy_in_own_users).
    ///
    /// # Errors
    /// What the system calls say; `STALE`: the path leads elsewhere by now.
    pub fn copy_in_own_users(&self) -> Result<Held, Errno> {
        let dir = self.identity.find(&self.path)?;
        let dir = root::copy_of(dir.as_fd())?;
        share_lock(&dir)?;
        let path = self.path.clone();
        Ok(Held { dir, path, identity: self.identity, passing: false })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// By its name, and not one of those that a daemon has for itself.
    pub(crate) fn was_asked_for(&self) -> bool {
        !self.passing
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.passing {
            // Not empty: the next daemon's.
            let _ = rustix::fs::rmdir(&self.path);
        }
    }
}

/// Makes and opens a directory of ours in which others have none of the rights `denied`; `None`: it
/// was taken away meanwhile.
fn open_ours(path: &Path, denied: Mode) -> Result<Option<OwnedFd>, StateError> {
    let failed = |source| StateError::Open { path: path.to_owned(), source };
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(failed(errno)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(dir) => dir,
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP | Errno::NOTDIR) => {
            return Err(StateError::NotOurs { path: path.to_owned() });
        }
        Err(errno) => return Err(failed(errno)),
    };
    let stat = rustix::fs::fstat(&dir).map_err(failed)?;
    let mode = Mode::from_raw_mode(stat.st_mode);
    if !is_ours(&stat) || mode.intersects(denied) || !mode.contains(Mode::RWXU) {
        return Err(StateError::NotOurs { path: path.to_owned() });
    }
    Ok(Some(dir))
}

/// The same, and locks it.
fn take(path: &Path) -> Result<Option<OwnedFd>, StateError> {
    let failed = |source| StateError::Open { path: path.to_owned(), source };
    let Some(dir) = open_ours(path, Mode::RWXG | Mode::RWXO)? else { return Ok(None) };
    // A mount of its own, which no path leads out of: a worker gets this fd.
    let dir = root::copy_of(dir.as_fd()).unwrap_or(dir);
    // Taken by one alone, and then shared with its own worker: whoever comes in between has it.
    let lock = rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive);
    match lock.and_then(|()| share_lock(&dir)) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(StateError::InUse { path: path.to_owned() }),
        Err(errno) => return Err(failed(errno)),
    }
    let is_there = rustix::fs::fstat(&dir).map_err(failed)?.st_nlink > 0;
    Ok(is_there.then_some(dir))
}

fn share_lock(dir: &OwnedFd) -> Result<(), Errno> {
    rustix::fs::flock(dir, FlockOperation::NonBlockingLockShared)
}

pub(crate) fn is_ours(stat: &Stat) -> bool {
    stat.st_uid == rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_dir::tests::{GRACE, open, place, terms, ticket};
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn each_set_of_listeners_has_its_own_directory() {
        let (_dir, path) = place();
        let listen = |texts: &[&str]| -> Vec<Address> {
            texts.iter().map(|text| text.parse().expect("an address")).collect()
        };
        let both = name_of(&listen(&["unix:/run/a", "vsock:5640"]));
        assert_eq!(both, name_of(&listen(&["vsock:5640", "unix:/run/a"])));
        assert_ne!(both, name_of(&listen(&["unix:/run/a"])));
        let both = path.join(both);
        assert_eq!(both.file_name().map_or(0, std::ffi::OsStr::len), NAME_CHARS);
        drop(open(&path));
        assert_eq!(open(&both).left(), 0);
        let at = Place::At(both.clone());
        assert_eq!(both.to_str().expect("text").parse(), Ok(at.clone()));
        assert_eq!(("none".parse(), "".parse::<Place>().ok()), (Ok(Place::None), None));
        assert!(hold(&Place::None, &[], GRACE).expect("none").is_none());
        let passing = || {
            let held = Held::take(&both, true).expect("passing");
            StateDir::on(held, GRACE).expect("a state directory")
        };
        drop(passing());
        assert!(!both.exists(), "nothing was in it");
        let state = passing();
        assert!(state.create(&terms(), ticket(1), false).is_ok());
        drop(state);
        assert!(both.exists(), "a session is in it");
        let held = open(&both);
        assert!(hold(&at, &[], GRACE).is_err(), "in use");
        drop(held);
    }

    #[test]
    fn what_daemons_leave_that_never_come_back_goes() {
        let (_dir, path) = place();
        let listen = |text: &str| vec![text.parse().expect("an address")];
        let start =
            |text: &str, grace| StateDir::on(hold_default(&path, &listen(text), grace)?, grace);
        let below = |text: &str| path.join(name_of(&listen(text)));
        let running = start("unix:/run/a", GRACE).expect("the first");
        let killed = start("unix:/run/b", GRACE).expect("the second");
        assert!(killed.create(&terms(), ticket(1), false).is_ok());
        drop(killed);
        std::fs::create_dir(path.join("another's")).expect("directory");
        let third = start("unix:/run/c", GRACE).expect("the third");
        assert!(below("unix:/run/a").exists() && below("unix:/run/b").exists(), "in its grace");
        drop(third);
        let third = start("unix:/run/c", Duration::ZERO).expect("the third again");
        assert!(below("unix:/run/a").exists() && !below("unix:/run/b").exists());
        drop((third, running));
        let left = std::fs::read_dir(&path).expect("list").count();
        assert_eq!(left, 1, "another's");
    }

    #[test]
    fn a_workers_copy_keeps_other_daemons_out() {
        let (_dir, path) = place();
        let held = Held::take(&path, false).expect("taken");
        let Ok(copy) = held.copy_in_own_users() else {
            return eprintln!("SKIPPED: to copy mounts takes root; tests/other_user.rs tries it");
        };
        let in_use = || matches!(Held::take(&path, false), Err(StateError::InUse { .. }));
        assert!(in_use());
        drop(held);
        assert!(in_use(), "the parent has gone first");
        drop(copy);
        assert!(!in_use());
    }

    #[test]
    fn a_directory_that_others_reach_or_use_is_refused() {
        let (dir, path) = place();
        let first = open(&path);
        assert!(matches!(StateDir::open(&path, GRACE), Err(StateError::InUse { .. })));
        drop(first);
        let refused =
            |path: &Path| matches!(StateDir::open(path, GRACE), Err(StateError::NotOurs { .. }));
        let mode = |mode| std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&path, mode(0o755)).expect("chmod");
        assert!(refused(&path));
        std::fs::set_permissions(&path, mode(0o700)).expect("chmod");
        let link = dir.path().join("link");
        symlink(&path, &link).expect("symlink");
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("file");
        assert!(refused(&link) && refused(&file));
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(4711), None).expect("chown");
            assert!(refused(&path));
        }
        let none = StateDir::open(&dir.path().join("a/b"), GRACE);
        assert!(matches!(none, Err(StateError::Open { .. })));
    }
}
