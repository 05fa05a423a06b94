//! The state directory: one mapped file a session, which outlives a daemon that is killed.
//!
//! A file has a random name, which it gets when it is whole; what it holds is state_file.rs.
//! Which directory it is, and that no other daemon has it, is state_hold.rs. Invariants: a file is
//! one session's; what is not wholly as we write it is removed, and its session rebuilt without it;
//! their number is bounded.

use std::ffi::{CStr, CString};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ringfs_wire::hello::Ticket;
use ringfs_wire::table::{are_whole, rebuild};
use rustix::fs::{AtFlags, Dir, FallocateFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

use zerocopy::{FromZeros, IntoBytes};

use crate::fdops::{self, FsKind, LocalFs};
use crate::limits::SESSIONS_MAX;
pub use crate::state_file::{Cells, IntentPlace, StateFile, StateTerms};
use crate::state_file::{HEADER_BYTES, Header, Opened, TicketHash, hash_of};
pub use crate::state_hold::StateError;
use crate::state_hold::{Held, is_ours};

const KEY_BYTES: usize = 16;
const SUFFIX: &str = ".session";
const UNFINISHED: &str = ".new";
/// Entries of the directory that are looked at: more than we ever leave in it.
const ENTRIES_MAX: usize = 4 * SESSIONS_MAX;

/// A file whose daemon is gone.
struct Left {
    name: CString,
    /// When that was found, in seconds of the wall clock.
    at: u64,
    tickets: Vec<TicketHash>,
}

pub(crate) struct Shared {
    held: Held,
    /// Files that sessions of ours have.
    pub(crate) ours: AtomicUsize,
}

impl Shared {
    pub(crate) fn unlink(&self, name: &CStr) {
        match rustix::fs::unlinkat(&self.held, name, AtFlags::empty()) {
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
        let path = held.path().to_owned();
        if fdops::fs_kind(held.as_fd()) != Ok(FsKind::Local(LocalFs::Tmpfs)) {
            tracing::warn!(dir = %path.display(), "the state directory is not in memory: slower");
        }
        let state = StateDir::of(held, grace);
        state.look().map_err(|source| StateError::Open { path, source })?;
        if state.left() > 0 {
            tracing::info!(sessions = state.left(), "a daemon before this one has left sessions");
        }
        Ok(state)
    }

    pub(crate) fn of(held: Held, grace: Duration) -> StateDir {
        let shared = Shared { held, ours: AtomicUsize::new(0) };
        StateDir { shared: Arc::new(shared), grace, left: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Left>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds what dead daemons left.
    pub(crate) fn look(&self) -> Result<(), Errno> {
        let mut left = Vec::new();
        for entry in Dir::read_from(&self.shared.held)?.take(ENTRIES_MAX) {
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
            rustix::fs::renameat(&self.shared.held, &unfinished, &self.shared.held, &name)?;
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
        let file = rustix::fs::openat(&self.shared.held, name, flags, FILE_MODE)?;
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
        let file = rustix::fs::openat(&self.shared.held, name, flags, Mode::empty()).ok()?;
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

const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::intent::Intent;
    use ringfs_wire::abi::Opcode;
    use ringfs_wire::slot::SlotUse;
    use ringfs_wire::table::{Begin, Past};
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
    use std::path::PathBuf;

    pub(crate) const GRACE: Duration = Duration::from_secs(600);
    const MKDIR: u32 = Opcode::Mkdir as u32;
    const AT: SlotUse = SlotUse { slot: 3, seq: 0 };

    pub(crate) fn terms() -> StateTerms {
        StateTerms { share: "share".into(), subdir: b"a/b".into(), lanes: 3, slots: 5, conns: 2 }
    }

    pub(crate) fn ticket(n: u8) -> Ticket {
        Ticket([n; 16])
    }

    /// What a test leaves alone: other tests may fork.
    pub(crate) fn open(path: &Path) -> StateDir {
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

    pub(crate) fn place() -> (tempfile::TempDir, PathBuf) {
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
