//! Open files and directories: the guest's `fh` <-> fds of our own.
//!
//! Handles are numbered like nodes: from the wall clock, never twice. A handle belongs to one node
//! and is good for nothing on another; it keeps its node alive, also after a FORGET. Reads, writes
//! and syncs go to the fd here, so the crate holds no handle at all.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::fdops;
use crate::fds::{Counted, Fds};
use crate::nodes::{Node, first_id};
use crate::passthrough::Stat;
use crate::quota::Quota;

const SHARDS: usize = 64;

/// What is known of waiting for a file system's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waits {
    /// It has none (tmpfs).
    Never,
    /// Calls with `RWF_NOWAIT` say EAGAIN instead of waiting.
    Nowait,
    /// Any call may wait.
    Maybe,
}

/// A regular file that a guest holds open.
pub struct OpenFile {
    /// Whose file it is.
    pub node: Arc<Node>,
    fd: OwnedFd,
    /// Opened with `O_DIRECT`: offsets, lengths and memory must be aligned.
    pub direct: bool,
    /// The file system answers reads that would block with EAGAIN (`RWF_NOWAIT`).
    pub nowait: bool,
    /// The file system keeps everything in memory: nothing on it waits for a disk.
    pub memory: bool,
    /// Writes append, whatever offset they carry.
    pub append: bool,
    /// Reads are allowed.
    pub readable: bool,
    /// Writes are allowed.
    pub writable: bool,
    /// The same file for page writes, once one came; see [`OpenFile::for_pages`].
    pages: OnceLock<Arc<OpenFile>>,
    _counted: Counted,
}

impl OpenFile {
    /// `flags` are those of open(2) that the fd was opened with.
    pub fn new(node: Arc<Node>, fd: OwnedFd, flags: u32, waits: Waits) -> OpenFile {
        let mode = flags & libc::O_ACCMODE as u32;
        OpenFile {
            _counted: Counted::new(&node.home().fds),
            node,
            fd,
            direct: flags & libc::O_DIRECT as u32 != 0,
            nowait: waits == Waits::Nowait,
            memory: waits == Waits::Never,
            append: flags & libc::O_APPEND as u32 != 0,
            readable: mode != libc::O_WRONLY as u32,
            writable: mode != libc::O_RDONLY as u32,
            pages: OnceLock::new(),
        }
    }

    /// The fd for pages that the guest's kernel writes back: it picks any handle of the file, so
    /// the offset counts, whatever `O_APPEND` or `O_DIRECT` say.
    pub fn for_pages(self: Arc<Self>) -> Result<Arc<OpenFile>, Errno> {
        if !self.append && !self.direct {
            return Ok(self);
        }
        if let Some(pages) = self.pages.get() {
            return Ok(Arc::clone(pages));
        }
        let flags = if self.readable { libc::O_RDWR } else { libc::O_WRONLY } as u32;
        let fd = fdops::reopen(self.fd.as_fd(), OFlags::from_bits_retain(flags))?;
        let waits = match (self.nowait, self.memory) {
            (true, _) => Waits::Nowait,
            (_, true) => Waits::Never,
            (false, false) => Waits::Maybe,
        };
        let pages = Arc::new(OpenFile::new(Arc::clone(&self.node), fd, flags, waits));
        Ok(Arc::clone(self.pages.get_or_init(|| pages)))
    }

    /// Reads what is there without a wait.
    pub(crate) fn read_cached(&self, room: &mut [u8], offset: u64) -> Cached {
        if self.direct || !(self.nowait || self.memory) {
            return Cached::Part(0);
        }
        let mut done = 0;
        while done < room.len() {
            let (at, rest) = (offset + done as u64, &mut room[done..]);
            let read = match self.memory {
                true => fdops::read_at(self.as_fd(), at, rest),
                false => fdops::try_read_nowait(self.as_fd(), at, rest),
            };
            match read {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::AGAIN | Errno::OPNOTSUPP) => return Cached::Part(done),
                Err(errno) => return Cached::Failed(errno),
            }
        }
        Cached::All(done)
    }
}

/// What the page cache had of a range.
pub(crate) enum Cached {
    /// All of it, or all up to the end of the file.
    All(usize),
    /// So many bytes; the rest is on the disk.
    Part(usize),
    Failed(Errno),
}

impl std::fmt::Debug for OpenFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OpenFile({:?} of node {})", self.fd, self.node.id)
    }
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A directory that a guest holds open.
pub struct OpenDir {
    /// Whose directory it is.
    pub node: Arc<Node>,
    /// For getdents64; its position belongs to the holder of `position`'s lock, for which nobody
    /// waits.
    pub fd: OwnedFd,
    /// The host's device, for the inode numbers of entries.
    pub dev: u64,
    /// Counts the fd.
    pub counted: Counted,
    /// The offset at which the fd stands, or `None` where a read left it somewhere else.
    pub position: Mutex<Option<u64>>,
}

/// What a handle stands for.
#[derive(Clone)]
pub enum Handle {
    /// From OPEN, CREATE or TMPFILE.
    File(Arc<OpenFile>),
    /// From OPENDIR.
    Dir(Arc<OpenDir>),
    /// Open on a daemon before this one; not used here yet.
    Unopened(Unopened),
    /// Such a handle whose file could not be opened.
    Lost(Unopened),
}

impl Handle {
    /// Blocks that its end frees, if nothing else holds its file.
    pub fn blocks_freed(&self) -> u64 {
        match self {
            Handle::File(file) => blocks_freed(&file.fd),
            Handle::Dir(dir) => blocks_freed(&dir.fd),
            Handle::Unopened(_) | Handle::Lost(_) => 0,
        }
    }
}

fn blocks_freed(fd: &OwnedFd) -> u64 {
    Stat::of(fd).map_or(0, |stat| stat.blocks_freed())
}

/// What a handle stood for, and nothing uses any more.
#[must_use = "dropping it closes a file, which may take long"]
pub enum Last {
    /// A file.
    File(OpenFile),
    /// A directory.
    Dir(OpenDir),
}

impl Last {
    /// `None` where an operation in flight has it still, or another handle: whoever ends last asks
    /// this again.
    pub fn of(handle: Handle) -> Option<Last> {
        match handle {
            Handle::File(file) => Arc::into_inner(file).map(Last::File),
            Handle::Dir(dir) => Arc::into_inner(dir).map(Last::Dir),
            Handle::Unopened(_) | Handle::Lost(_) => None,
        }
    }

    /// Blocks that its end frees.
    pub fn blocks_freed(&self) -> u64 {
        match self {
            Last::File(file) => blocks_freed(&file.fd),
            Last::Dir(dir) => blocks_freed(&dir.fd),
        }
    }
}

impl From<Last> for Handle {
    fn from(last: Last) -> Handle {
        match last {
            Last::File(file) => Handle::File(Arc::new(file)),
            Last::Dir(dir) => Handle::Dir(Arc::new(dir)),
        }
    }
}

/// How a handle was opened on another daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unopened {
    /// Whose.
    pub node: u64,
    /// Flags of open(2), the guest's.
    pub flags: u32,
    /// From OPENDIR.
    pub directory: bool,
}

impl Handle {
    /// Whose it is, and whether it is a directory's.
    fn owner(&self) -> (u64, bool) {
        match self {
            Handle::File(file) => (file.node.id, false),
            Handle::Dir(dir) => (dir.node.id, true),
            Handle::Unopened(was) | Handle::Lost(was) => (was.node, was.directory),
        }
    }

    /// Why an operation that wants another kind fails. An unopened one is opened before.
    fn refusal(&self, nodeid: u64, directory: bool) -> Errno {
        match self {
            Handle::Unopened(_) | Handle::Lost(_) if self.owner() == (nodeid, directory) => {
                Errno::STALE
            }
            _ => Errno::BADF,
        }
    }
}

/// All handles of a session.
pub struct Handles {
    shards: Vec<RwLock<HashMap<u64, Handle>>>,
    next: AtomicU64,
    count: AtomicUsize,
    /// Those of [`Handle::Unopened`]: where there is none, nobody looks for them.
    unopened: AtomicUsize,
    /// Those that ended as [`Handle::Lost`].
    lost: AtomicUsize,
    count_max: usize,
    quota: Arc<Quota>,
    fds: Arc<Fds>,
}

impl Handles {
    /// None open yet; no session may have more than a fair part of the fds.
    pub fn new(count_max: usize, fds: &Arc<Fds>, quota: &Arc<Quota>) -> Handles {
        Handles {
            fds: Arc::clone(fds),
            quota: Arc::clone(quota),
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            next: AtomicU64::new(first_id()),
            count: AtomicUsize::new(0),
            unopened: AtomicUsize::new(0),
            lost: AtomicUsize::new(0),
            count_max: count_max.min(fds.handles_max()),
        }
    }

    /// Refuses before anything is opened.
    ///
    /// # Errors
    /// `ENFILE`: the session holds as many files open as it may.
    pub fn check_room(&self) -> Result<(), Errno> {
        let count = self.check_count()?;
        self.fds.make_room(count, None)
    }

    fn check_count(&self) -> Result<usize, Errno> {
        let count = self.count.load(Ordering::Relaxed);
        if self.quota.may_open(count, self.count_max) { Ok(count) } else { Err(Errno::NFILE) }
    }

    fn counted(&self, more: usize, less: usize) {
        self.count.fetch_add(more, Ordering::Relaxed);
        self.count.fetch_sub(less, Ordering::Relaxed);
        self.quota.opened(more);
        self.quota.closed(less);
    }

    /// Numbers a handle.
    pub fn insert(&self, handle: Handle) -> u64 {
        let fh = self.next.fetch_add(1, Ordering::Relaxed);
        let mut shard = self.shard(fh).write().unwrap_or_else(PoisonError::into_inner);
        shard.insert(fh, handle);
        self.counted(1, 0);
        fh
    }

    /// Puts a handle down that was open on another daemon. No number that is given from now on
    /// meets it.
    ///
    /// # Errors
    /// `ENFILE`: too many. `EEXIST`.
    pub fn restore(&self, fh: u64, was: Unopened) -> Result<(), Errno> {
        self.check_count()?;
        let mut shard = self.shard(fh).write().unwrap_or_else(PoisonError::into_inner);
        if shard.contains_key(&fh) {
            return Err(Errno::EXIST);
        }
        shard.insert(fh, Handle::Unopened(was));
        self.counted(1, 0);
        self.unopened.fetch_add(1, Ordering::Relaxed);
        self.count_on_from(fh);
        Ok(())
    }

    /// Handles given from now on are beyond `fh`.
    pub fn count_on_from(&self, fh: u64) {
        self.next.fetch_max(fh.saturating_add(1), Ordering::Relaxed);
    }

    /// Whether there are any to be opened.
    pub fn has_unopened(&self) -> bool {
        self.unopened.load(Ordering::Relaxed) > 0
    }

    /// How to open this one, if it is still to be.
    pub fn unopened(&self, fh: u64) -> Option<Unopened> {
        match self.shard(fh).read().unwrap_or_else(PoisonError::into_inner).get(&fh)? {
            Handle::Unopened(was) => Some(*was),
            Handle::File(_) | Handle::Dir(_) | Handle::Lost(_) => None,
        }
    }

    /// Those that could not be opened.
    pub fn lost(&self) -> usize {
        self.lost.load(Ordering::Relaxed)
    }

    /// It was opened, or is lost. Whoever was faster has the better one.
    pub fn opened(&self, fh: u64, handle: Handle) {
        let mut shard = self.shard(fh).write().unwrap_or_else(PoisonError::into_inner);
        if let Some(unopened @ Handle::Unopened(_)) = shard.get_mut(&fh) {
            if matches!(handle, Handle::Lost(_)) {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
            let was = std::mem::replace(unopened, handle);
            self.unopened.fetch_sub(1, Ordering::Relaxed);
            drop((shard, was));
        }
    }

    /// Whether what is written to it goes to the file's end; of one that is still to be opened, as
    /// it was opened.
    pub fn appends(&self, fh: u64) -> bool {
        match self.shard(fh).read().unwrap_or_else(PoisonError::into_inner).get(&fh) {
            Some(Handle::File(file)) => file.append,
            Some(Handle::Unopened(was)) => was.flags & libc::O_APPEND as u32 != 0,
            Some(Handle::Dir(_) | Handle::Lost(_)) | None => false,
        }
    }

    /// An open file of the node `nodeid`.
    ///
    /// # Errors
    /// `EBADF`: no such handle, a directory's, or another node's. `ESTALE`: lost with a daemon.
    pub fn file(&self, fh: u64, nodeid: u64) -> Result<Arc<OpenFile>, Errno> {
        match self.shard(fh).read().unwrap_or_else(PoisonError::into_inner).get(&fh) {
            Some(Handle::File(file)) if file.node.id == nodeid => Ok(Arc::clone(file)),
            Some(other) => Err(other.refusal(nodeid, false)),
            None => Err(Errno::BADF),
        }
    }

    /// An open directory of the node `nodeid`; errors as for [`Handles::file`].
    pub fn dir(&self, fh: u64, nodeid: u64) -> Result<Arc<OpenDir>, Errno> {
        match self.shard(fh).read().unwrap_or_else(PoisonError::into_inner).get(&fh) {
            Some(Handle::Dir(dir)) if dir.node.id == nodeid => Ok(Arc::clone(dir)),
            Some(other) => Err(other.refusal(nodeid, true)),
            None => Err(Errno::BADF),
        }
    }

    /// Takes a handle out, a directory's or a file's; it closes when the last operation on it ends.
    ///
    /// # Errors
    /// `EBADF`: no such handle, of another kind, or another node's.
    pub fn remove(&self, fh: u64, nodeid: u64, directory: bool) -> Result<Handle, Errno> {
        let mut shard = self.shard(fh).write().unwrap_or_else(PoisonError::into_inner);
        if shard.get(&fh).map(Handle::owner) != Some((nodeid, directory)) {
            return Err(Errno::BADF);
        }
        let handle = shard.remove(&fh).ok_or(Errno::BADF)?;
        self.counted(0, 1);
        if let Handle::Unopened(_) = handle {
            self.unopened.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(handle)
    }

    /// Takes a handle out that nobody will use: the guest never learned of it.
    pub fn take_back(&self, fh: u64) -> Option<Handle> {
        let handle = self.shard(fh).write().unwrap_or_else(PoisonError::into_inner).remove(&fh);
        self.counted(0, usize::from(handle.is_some()));
        handle
    }

    /// Handles open now.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    fn shard(&self, fh: u64) -> &RwLock<HashMap<u64, Handle>> {
        &self.shards[(fh % SHARDS as u64) as usize]
    }
}

impl Drop for Handles {
    fn drop(&mut self) {
        self.quota.closed(self.count());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fds::Fds;
    use crate::fs::{Fs, FsOptions};
    use ringfs_wire::abi::FUSE_ROOT_ID;

    #[test]
    fn whoever_uses_a_handle_last_has_to_close_it() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let fds = Fds::new(64);
        let options = FsOptions { fds: Arc::clone(&fds), ..FsOptions::default() };
        let fs = Fs::new(dir.path(), options).expect("a session");
        let before = fds.used();
        let node = fs.nodes.find(FUSE_ROOT_ID).expect("the root");
        let path = dir.path().join("file");
        std::fs::write(&path, "x").expect("a file");
        let fd = std::fs::File::open(&path).expect("open").into();
        let fh = fs.insert_file(node, fd, libc::O_RDONLY as u32);
        let in_flight = fs.handles.file(fh, FUSE_ROOT_ID).expect("open");
        let released = fs.handles.remove(fh, FUSE_ROOT_ID, false).expect("open");
        assert!(Last::of(released).is_none(), "an operation has it still");
        let last = Last::of(Handle::File(in_flight)).expect("the last one");
        assert_eq!(last.blocks_freed(), 0);
        std::fs::remove_file(&path).expect("remove");
        assert!(last.blocks_freed() > 0);
        // On its way to the pool it is open.
        let handle = Handle::from(last);
        assert_eq!(fds.used(), before + 1);
        drop(handle);
        assert_eq!(fds.used(), before);
    }
}
