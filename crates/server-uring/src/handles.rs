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

use crate::fds::{Counted, Fds};
use crate::nodes::{Node, first_id};

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
            _counted: Counted::new(node.fds()),
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
        let fd = crate::fdops::reopen(self.fd.as_fd(), OFlags::from_bits_retain(flags))?;
        let waits = match (self.nowait, self.memory) {
            (true, _) => Waits::Nowait,
            (_, true) => Waits::Never,
            (false, false) => Waits::Maybe,
        };
        let pages = Arc::new(OpenFile::new(Arc::clone(&self.node), fd, flags, waits));
        Ok(Arc::clone(self.pages.get_or_init(|| pages)))
    }
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
    /// For getdents64; its position belongs to the holder of `position`'s lock.
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
}

/// All handles of a session.
pub struct Handles {
    shards: Vec<RwLock<HashMap<u64, Handle>>>,
    next: AtomicU64,
    count: AtomicUsize,
    count_max: usize,
    fds: Arc<Fds>,
}

impl Handles {
    /// None open yet; no session may have more than a fair part of the fds.
    pub fn new(count_max: usize, fds: &Arc<Fds>) -> Handles {
        Handles {
            fds: Arc::clone(fds),
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            next: AtomicU64::new(first_id()),
            count: AtomicUsize::new(0),
            count_max: count_max.min(fds.handles_max()),
        }
    }

    /// Refuses before anything is opened.
    ///
    /// # Errors
    /// `ENFILE`: the session holds as many files open as it may.
    pub fn check_room(&self) -> Result<(), Errno> {
        let count = self.count.load(Ordering::Relaxed);
        if count >= self.count_max {
            return Err(Errno::NFILE);
        }
        self.fds.make_room(count)
    }

    /// Numbers a handle.
    pub fn insert(&self, handle: Handle) -> u64 {
        let fh = self.next.fetch_add(1, Ordering::Relaxed);
        let mut shard = self.shard(fh).write().unwrap_or_else(PoisonError::into_inner);
        shard.insert(fh, handle);
        self.count.fetch_add(1, Ordering::Relaxed);
        fh
    }

    /// An open file of the node `nodeid`.
    ///
    /// # Errors
    /// `EBADF`: no such handle, a directory's, or another node's.
    pub fn file(&self, fh: u64, nodeid: u64) -> Result<Arc<OpenFile>, Errno> {
        match self.shard(fh).read().unwrap_or_else(PoisonError::into_inner).get(&fh) {
            Some(Handle::File(file)) if file.node.id == nodeid => Ok(Arc::clone(file)),
            Some(Handle::File(_) | Handle::Dir(_)) | None => Err(Errno::BADF),
        }
    }

    /// An open directory of the node `nodeid`; errors as for [`Handles::file`].
    pub fn dir(&self, fh: u64, nodeid: u64) -> Result<Arc<OpenDir>, Errno> {
        match self.shard(fh).read().unwrap_or_else(PoisonError::into_inner).get(&fh) {
            Some(Handle::Dir(dir)) if dir.node.id == nodeid => Ok(Arc::clone(dir)),
            Some(Handle::File(_) | Handle::Dir(_)) | None => Err(Errno::BADF),
        }
    }

    /// Takes a handle out; it closes when the last operation on it ends.
    pub fn remove(&self, fh: u64, nodeid: u64) -> Result<Handle, Errno> {
        let mut shard = self.shard(fh).write().unwrap_or_else(PoisonError::into_inner);
        let owner = match shard.get(&fh) {
            Some(Handle::File(file)) => file.node.id,
            Some(Handle::Dir(dir)) => dir.node.id,
            None => return Err(Errno::BADF),
        };
        if owner != nodeid {
            return Err(Errno::BADF);
        }
        self.count.fetch_sub(1, Ordering::Relaxed);
        shard.remove(&fh).ok_or(Errno::BADF)
    }

    /// Takes a handle out that nobody will use: the guest never learned of it.
    pub fn take_back(&self, fh: u64) -> Option<Handle> {
        let handle = self.shard(fh).write().unwrap_or_else(PoisonError::into_inner).remove(&fh);
        self.count.fetch_sub(usize::from(handle.is_some()), Ordering::Relaxed);
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
