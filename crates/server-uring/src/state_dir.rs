//! The state directory: one mapped file a session, which outlives a daemon that is killed.
//!
//! A file has a random name, which it gets when it is whole; what it holds is state_file.rs.
//! Invariants: of two daemons one has the directory (flock); a file is one session's; what is not
//! wholly as we write it is removed, and its session rebuilt without it; their number is bounded.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ringfs_wire::hello::Ticket;
use ringfs_wire::table::{are_whole, rebuild};
use rustix::fs::{AtFlags, Dir, FallocateFlags, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::{Errno, retry_on_intr};
use rustix::rand::GetRandomFlags;

use zerocopy::{FromZeros, IntoBytes};

use crate::address::Address;
use crate::config::Place;
use crate::fdops::{self, FsKind, LocalFs};
use crate::limits::SESSIONS_MAX;
use crate::sandbox::root;
use crate::sha256::sha256;
use crate::share::Identity;
pub use crate::state_file::{Cells, IntentPlace, StateFile, StateTerms};
use crate::state_file::{HEADER_BYTES, Header, Opened, TicketHash, hash_of};

const KEY_BYTES: usize = 16;
const SUFFIX: &str = ".session";
const UNFINISHED: &str = ".new";
/// Another daemon's directory of this name may go while it is opened.
const TRIES_MAX: usize = 16;
/// Entries of the directory that are looked at: more than we ever leave in it.
const ENTRIES_MAX: usize = 4 * SESSIONS_MAX;

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

/// A file whose daemon is gone.
struct Left {
    name: CString,
    /// When that was found, in seconds of the wall clock.
    at: u64,
    tickets: Vec<TicketHash>,
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
    fn take(path: &Path, passing: bool) -> Result<Held, StateError> {
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
    pub fn copy_in_own_users(&self) -> Result<Held, StateError> {
        let failed = |source| StateError::Open { path: self.path.clone(), source };
        let dir = self.identity.find(&self.path).and_then(|dir| root::copy_of(dir.as_fd()));
        let dir = dir.map_err(failed)?;
        share_lock(&dir).map_err(failed)?;
        let path = self.path.clone();
        Ok(Held { dir, path, identity: self.identity, passing: false })
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

pub(crate) struct Shared {
    held: Held,
    /// Files that sessions of ours have.
    pub(crate) ours: AtomicUsize,
}

impl Shared {
    pub(crate) fn unlink(&self, name: &CStr) {
        match rustix::fs::unlinkat(&self.held.dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => tracing::warn!(?name, %error, "cannot remove a session's file"),
        }
    }
}

/// The directory, and the files in it that dead daemons left.
pub struct StateDir {
    shared: Arc<Shared>,
    grace: Duration,
    left: Mutex<Vec<Left>>,
}

impl StateDir {
    /// Makes the directory where there is none, and takes it for this daemon alone. Files that are
    /// no good, or that nobody has asked for within `grace` of a daemon's first start after their
    /// own had died, are removed.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn open(path: &Path, grace: Duration) -> Result<StateDir, StateError> {
        StateDir::on(Held::take(path, false)?, grace)
    }

    /// The same on one that is taken already.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn on(held: Held, grace: Duration) -> Result<StateDir, StateError> {
        let path = held.path.clone();
        if fdops::fs_kind(held.dir.as_fd()) != Ok(FsKind::Local(LocalFs::Tmpfs)) {
            tracing::warn!(dir = %path.display(), "the state directory is not in memory: slower");
        }
        let state = StateDir::of(held, grace);
        state.look().map_err(|source| StateError::Open { path, source })?;
        if state.left() > 0 {
            tracing::info!(sessions = state.left(), "a daemon before this one has left sessions");
        }
        Ok(state)
    }

    fn of(held: Held, grace: Duration) -> StateDir {
        let shared = Shared { held, ours: AtomicUsize::new(0) };
        StateDir { shared: Arc::new(shared), grace, left: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Left>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds what dead daemons left.
    fn look(&self) -> Result<(), Errno> {
        let mut left = Vec::new();
        for entry in Dir::read_from(&self.shared.held.dir)?.take(ENTRIES_MAX) {
            let name = entry?.file_name().to_owned();
            if name.to_bytes().ends_with(UNFINISHED.as_bytes()) {
                self.shared.unlink(&name);
            } else if name.to_bytes().ends_with(SUFFIX.as_bytes()) {
                match self.read_left(&name) {
                    Some(one) => left.push(one),
                    None => {
                        tracing::warn!(?name, "a session's file is damaged or of another version");
                        self.shared.unlink(&name);
                    }
                }
            }
        }
        left.sort_by_key(|one| one.at);
        let more = left.len().saturating_sub(SESSIONS_MAX);
        left.drain(..more).for_each(|one| self.shared.unlink(&one.name));
        *self.lock() = left;
        self.reap();
        Ok(())
    }

    fn read_left(&self, name: &CStr) -> Option<Left> {
        let (mut opened, _) = self.map(name)?;
        let header = opened.header.as_mut().first_mut()?;
        let tickets: Vec<_> = header.tickets().collect();
        let at = match header.left_at.load(Ordering::Relaxed) {
            // A clock that was set back must not keep a file for ever.
            0 => now_secs(),
            at => at.min(now_secs()),
        };
        header.left_at.store(at, Ordering::Relaxed);
        (!tickets.is_empty()).then(|| Left { name: name.to_owned(), at, tickets })
    }

    /// Removes files that nobody has asked for within the grace time; in how long to look again.
    pub fn reap(&self) -> Option<Duration> {
        let (now, grace) = (now_secs(), self.grace.as_secs());
        let mut left = self.lock();
        left.retain(|one| {
            let keep = now.saturating_sub(one.at) < grace;
            if !keep {
                self.shared.unlink(&one.name);
            }
            keep
        });
        let oldest = left.iter().map(|one| one.at).min()?;
        Some(Duration::from_secs((oldest + grace).saturating_sub(now).max(1)))
    }

    /// Sessions of dead daemons that nobody has asked for yet.
    pub fn left(&self) -> usize {
        self.lock().len()
    }

    /// Makes the file of a new session, or of one that is rebuilt without one.
    ///
    /// # Errors
    /// [`StateError::Create`]; the session goes on without.
    pub fn create(
        &self,
        terms: &StateTerms,
        ticket: Ticket,
        rebuilt: bool,
    ) -> Result<Arc<StateFile>, StateError> {
        if self.shared.ours.load(Ordering::Relaxed) >= 2 * SESSIONS_MAX {
            return Err(StateError::Create(Errno::NOSPC));
        }
        let mut key = [0; KEY_BYTES];
        rustix::rand::getrandom(&mut key, GetRandomFlags::empty()).map_err(StateError::Create)?;
        let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        let named = |suffix| CString::new(format!("{key}{suffix}")).unwrap_or_default();
        let (unfinished, name) = (named(UNFINISHED), named(SUFFIX));
        let made = self.make(&unfinished, terms, ticket, rebuilt).and_then(|opened| {
            rustix::fs::renameat(&self.shared.held.dir, &unfinished, &self.shared.held.dir, &name)?;
            Ok(opened)
        });
        match made {
            Ok(opened) => Ok(StateFile::new(Arc::clone(&self.shared), name, opened, terms, false)),
            Err(errno) => {
                self.shared.unlink(&unfinished);
                Err(StateError::Create(errno))
            }
        }
    }

    fn make(
        &self,
        name: &CStr,
        terms: &StateTerms,
        ticket: Ticket,
        rebuilt: bool,
    ) -> Result<Opened, Errno> {
        let bytes = terms.file_bytes().ok_or(Errno::INVAL)?;
        let header = Header::of(terms, ticket).ok_or(Errno::INVAL)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.shared.held.dir, name, flags, FILE_MODE)?;
        // All of its blocks: a mapped page without one would kill the daemon where there is no
        // room for it any more.
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes as u64)?;
        let mut opened = Opened::map(file.as_fd(), terms, bytes)?;
        if let Some(to) = opened.header.as_mut().first_mut() {
            *to = header;
        }
        if rebuilt {
            opened.lanes.iter_mut().for_each(|lane| rebuild(lane.as_mut()));
        }
        Ok(opened)
    }

    /// Goes on with the session that a guest names by its ticket, where a dead daemon left it. What
    /// is not as the guest says is removed.
    pub fn adopt(&self, ticket: Ticket, terms: &StateTerms) -> Option<Arc<StateFile>> {
        let hash = hash_of(ticket);
        let name = {
            let mut left = self.lock();
            let at = left.iter().position(|one| one.tickets.contains(&hash))?;
            left.swap_remove(at).name
        };
        let mapped = self.map(&name).filter(|(opened, said)| {
            said == terms && opened.lanes.iter().all(|lane| are_whole(lane.as_ref()))
        });
        let Some((opened, _)) = mapped else {
            tracing::warn!(?name, "a session's file is not of use: rebuilt without it");
            self.shared.unlink(&name);
            return None;
        };
        if let Some(header) = opened.header.as_ref().first() {
            header.left_at.store(0, Ordering::Relaxed);
        }
        Some(StateFile::new(Arc::clone(&self.shared), name, opened, terms, true))
    }

    /// Takes back a file whose session was not rebuilt after all: the guest will ask for it again.
    pub fn give_back(&self, file: &StateFile) {
        let Some(header) = file.header.as_ref().first() else { return };
        let tickets = header.tickets().collect();
        self.lock().push(Left { name: file.name.clone(), at: now_secs(), tickets });
    }

    /// A file that is wholly one of ours, and what it says that it is of.
    fn map(&self, name: &CStr) -> Option<(Opened, StateTerms)> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.shared.held.dir, name, flags, Mode::empty()).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        let plain = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !plain || !is_ours(&stat) || stat.st_mode & 0o7777 != 0o600 || stat.st_nlink != 1 {
            return None;
        }
        let mut header = Header::new_zeroed();
        let read = rustix::io::pread(&file, header.as_mut_bytes(), 0).ok()?;
        let terms = header.terms().filter(|_| read == HEADER_BYTES)?;
        let bytes = terms.file_bytes()?;
        // Holes are filled as at the start: see `make`.
        let whole = u64::try_from(stat.st_size) == Ok(bytes as u64)
            && rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes as u64).is_ok();
        if !whole {
            return None;
        }
        let opened = Opened::map(file.as_fd(), &terms, bytes).ok()?;
        Some((opened, terms))
    }
}

fn now_secs() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
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

const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);

fn is_ours(stat: &Stat) -> bool {
    stat.st_uid == rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intent::Intent;
    use ringfs_wire::abi::Opcode;
    use ringfs_wire::slot::SlotUse;
    use ringfs_wire::table::{Begin, Past};
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

    const GRACE: Duration = Duration::from_secs(600);
    const MKDIR: u32 = Opcode::Mkdir as u32;
    const AT: SlotUse = SlotUse { slot: 3, seq: 0 };

    fn terms() -> StateTerms {
        StateTerms { share: "share".into(), subdir: b"a/b".into(), lanes: 3, slots: 5, conns: 2 }
    }

    fn ticket(n: u8) -> Ticket {
        Ticket([n; 16])
    }

    /// What a test leaves alone: other tests may fork.
    fn open(path: &Path) -> StateDir {
        let until = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            match StateDir::open(path, GRACE) {
                Err(StateError::InUse { .. }) if std::time::Instant::now() < until => {
                    std::thread::yield_now();
                }
                opened => return opened.expect("a state directory"),
            }
        }
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("state");
        (dir, path)
    }

    /// The only session's file.
    fn only(path: &Path) -> PathBuf {
        let files = std::fs::read_dir(path).expect("list").flatten().map(|entry| entry.path());
        let mut files = files.filter(|path| path.extension().is_some_and(|ext| ext == "session"));
        let one = files.next().expect("a file");
        assert!(files.next().is_none());
        one
    }

    #[test]
    fn what_a_killed_daemon_wrote_the_next_one_reads() {
        let (_dir, path) = place();
        let state = open(&path);
        let file = state.create(&terms(), ticket(1), false).expect("a file");
        assert!(!file.adopted && state.left() == 0);
        let mut tables: Vec<_> = (0..3).map(|lane| file.table(lane)).collect();
        let intent = Intent { opcode: MKDIR, known: true, when: 77, ..Intent::default() };
        for (lane, table) in tables.iter_mut().enumerate() {
            assert_eq!(table.begin(AT, MKDIR), Ok(Begin::Execute));
            file.intend(lane as u8, AT, &Intent { size: lane as u64, ..intent });
        }
        assert!(tables[1].finish(AT, 17, &[]).is_ok());
        drop((tables, file, state));
        let state = open(&path);
        assert_eq!(state.left(), 1);
        assert!(state.adopt(ticket(2), &terms()).is_none());
        let file = state.adopt(ticket(1), &terms()).expect("the file");
        assert!(file.adopted && state.left() == 0);
        assert!(state.adopt(ticket(1), &terms()).is_none(), "twice");
        for (lane, expected) in
            [Begin::Decide, Begin::Replay, Begin::Decide].into_iter().enumerate()
        {
            let lane = lane as u8;
            assert_eq!(file.table(lane).begin(AT, MKDIR), Ok(expected));
            let size = u64::from(lane);
            assert_eq!(file.intended(lane, AT), Some(Intent { size, ..intent }));
            assert_eq!(file.intended(lane, SlotUse { seq: 1, ..AT }), None);
            assert_eq!(file.intended(lane, SlotUse { slot: 2, ..AT }), None);
        }
        assert!(
            file.intent(3, AT).is_none() && file.intent(0, SlotUse { slot: 5, seq: 0 }).is_none()
        );
        file.remove();
        drop((file, state));
        assert_eq!(open(&path).left(), 0);
    }

    /// What the next daemon would find, had this one been killed now.
    #[test]
    fn the_file_at_each_step_of_a_request() {
        let (dir, path) = place();
        let state = open(&path);
        let file = state.create(&terms(), ticket(1), false).expect("a file");
        let mut table = file.table(1);
        let mut steps = 0;
        let mut check = |begin: Begin, past: Option<Past<'_>>, intended: bool| {
            steps += 1;
            let copied = dir.path().join(format!("copy{steps}"));
            drop(open(&copied));
            let one = only(&path);
            std::fs::copy(&one, copied.join(one.file_name().expect("a name"))).expect("copy");
            let next = open(&copied).adopt(ticket(1), &terms()).expect("the file");
            let mut table = next.table(1);
            assert_eq!(table.begin(AT, MKDIR), Ok(begin), "step {steps}");
            assert_eq!(table.past(AT), past.or(Some(Past::Running)), "step {steps}");
            assert_eq!(next.intended(1, AT).is_some(), intended, "step {steps}");
        };
        check(Begin::Execute, None, false);
        assert_eq!(table.begin(AT, MKDIR), Ok(Begin::Execute));
        check(Begin::Decide, None, false);
        file.intend(1, AT, &Intent { opcode: MKDIR, ..Intent::default() });
        check(Begin::Decide, None, true);
        assert!(table.finish(AT, 0, &[7; 128]).is_ok());
        check(Begin::Decide, Some(Past::Done(&[7; 128])), true);
        assert_eq!(table.begin(SlotUse { seq: 1, ..AT }, MKDIR), Ok(Begin::Execute));
    }

    #[test]
    fn a_table_that_was_dropped_can_be_had_again() {
        let (_dir, path) = place();
        let state = open(&path);
        let file = state.create(&terms(), ticket(1), true).expect("a file");
        let far = SlotUse { slot: 0, seq: 900 };
        // Rebuilt: the guest knows how often a slot was used.
        assert_eq!(file.table(0).begin(far, MKDIR), Ok(Begin::Execute));
        assert_eq!(file.table(0).begin(far, MKDIR), Ok(Begin::Decide));
        let mut own = Cells::table(1, true);
        assert_eq!(own.begin(far, MKDIR), Ok(Begin::Execute));
        let mut own = Cells::table(1, false);
        assert!(own.begin(far, MKDIR).is_err());
    }

    #[test]
    fn tickets_rotate() {
        let check = |story: &[(u8, Option<u8>)], good: &[u8]| {
            let (_dir, path) = place();
            let state = open(&path);
            let file = state.create(&terms(), ticket(1), false).expect("a file");
            for &(used, unused) in story {
                file.set_tickets(ticket(used), unused.map(ticket));
            }
            drop((file, state));
            for n in 1..6 {
                let state = open(&path);
                let left: Vec<_> =
                    state.lock().iter().flat_map(|one| one.tickets.clone()).collect();
                assert_eq!(left.contains(&hash_of(ticket(n))), good.contains(&n), "{story:?}: {n}");
            }
        };
        check(&[], &[1]);
        check(&[(1, Some(2))], &[1, 2]);
        check(&[(1, Some(2)), (1, Some(3))], &[1, 3]);
        check(&[(1, Some(2)), (2, None)], &[2]);
        check(&[(1, Some(2)), (2, Some(3)), (3, Some(4)), (3, Some(5))], &[3, 5]);
    }

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
        // In whoever may not copy mounts this is tried by tests/other_user.rs.
        let Ok(copy) = held.copy_in_own_users() else { return };
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

    #[test]
    fn what_is_not_wholly_ours_is_removed() {
        let check = |name: &str, harm: &dyn Fn(&Path), said: &StateTerms| {
            let (_dir, path) = place();
            let state = open(&path);
            let file = state.create(&terms(), ticket(1), false).expect("a file");
            drop((file, state));
            let one = only(&path);
            assert_eq!(std::fs::metadata(&one).expect("stat").mode() & 0o7777, 0o600);
            harm(&one);
            let state = open(&path);
            assert!(state.adopt(ticket(1), said).is_none(), "{name}");
            assert!(!one.exists(), "{name}");
        };
        let write = |at: u64, bytes: &'static [u8]| {
            move |path: &Path| {
                let file = std::fs::File::options().write(true).open(path).expect("open");
                file.write_all_at(bytes, at).expect("write");
            }
        };
        let set_len = |bytes: u64| {
            move |path: &Path| {
                let file = std::fs::File::options().write(true).open(path).expect("open");
                file.set_len(bytes).expect("length");
            }
        };
        check("foreign", &write(0, b"another"), &terms());
        check("of another version", &write(8, &[9]), &terms());
        check("of other cells", &write(14, &[9]), &terms());
        check("of another boot", &write(28, b"x"), &terms());
        check("of other lanes", &write(18, &[200]), &terms());
        check("a share that is not proved", &write(80, b"x"), &terms());
        check("empty", &set_len(0), &terms());
        check("short", &set_len(4096), &terms());
        check("long", &set_len(1 << 20), &terms());
        check("a mark that cannot be", &write(4096, &[0xff; 8]), &terms());
        check("no ticket", &write(std::mem::offset_of!(Header, good) as u64, &[0]), &terms());
        check(
            "others may read it",
            &|path| {
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))
                    .expect("chmod");
            },
            &terms(),
        );
        check(
            "linked",
            &|path| {
                std::fs::hard_link(path, path.with_extension("more")).expect("link");
            },
            &terms(),
        );
        check(
            "no file",
            &|path| {
                std::fs::remove_file(path).expect("remove");
                symlink("/dev/zero", path).expect("symlink");
                assert!(std::fs::symlink_metadata(path).is_ok());
            },
            &terms(),
        );
        check("another share", &|_| {}, &StateTerms { share: "other".into(), ..terms() });
        check("another directory", &|_| {}, &StateTerms { subdir: Vec::new(), ..terms() });
        check("other slots", &|_| {}, &StateTerms { slots: 4, ..terms() });
    }

    #[test]
    fn what_nobody_asks_for_is_removed_and_bounded() {
        let (_dir, path) = place();
        let state = open(&path);
        let file = state.create(&terms(), ticket(1), false).expect("a file");
        drop((file, state));
        std::fs::write(path.join("0123.new"), "half").expect("file");
        std::fs::write(path.join("notes"), "another's").expect("file");
        // Its grace begins when a daemon first finds it, and goes on with the next one.
        let state = open(&path);
        let left = state.reap().expect("one");
        assert!(left <= GRACE && left > GRACE / 2);
        state.lock()[0].at -= GRACE.as_secs();
        assert!(state.reap().is_none() && state.left() == 0);
        let names: Vec<_> = std::fs::read_dir(&path).expect("list").flatten().collect();
        assert_eq!(names.len(), 1, "what is not ours: {names:?}");
        drop(state);
        let state = open(&path);
        let file = state.create(&terms(), ticket(1), false).expect("a file");
        drop((file, state));
        let found = open(&path);
        let at = found.lock()[0].at;
        drop(found);
        let file = std::fs::File::options().write(true).open(only(&path)).expect("open");
        let early = (at - GRACE.as_secs()).to_le_bytes();
        file.write_all_at(&early, std::mem::offset_of!(Header, left_at) as u64).expect("write");
        assert_eq!(open(&path).left(), 0, "it was left long ago");
        let wrong = StateTerms { lanes: 9, ..terms() };
        let state = open(&path);
        assert!(state.create(&wrong, ticket(1), false).is_err());
        assert!(state.create(&StateTerms { slots: 0, ..terms() }, ticket(1), false).is_err());
        let long = StateTerms { subdir: vec![b'x'; 4000], ..terms() };
        assert!(state.create(&long, ticket(1), false).is_err());
        assert_eq!(std::fs::read_dir(&path).expect("list").count(), 1, "nothing half made");
    }
}
