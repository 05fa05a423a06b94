//! The guest's node ids, and what stands behind each.
//!
//! Invariants: an id is never given twice, also over restarts of the daemon (ids count up from the
//! wall clock in nanoseconds); one inode has one node as long as the guest knows it; the crate is
//! owed one `forget` for each lookup that it counted, paid when the last user of the node is gone,
//! so that an operation in flight never meets a reused inode number.
//!
//! Counts change only under the lock of the inode's shard: a LOOKUP that races the FORGET of the
//! same inode either revives the node before it dies, or makes a new one with a new id.
//! Lock order: shard by inode, then shard by id.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use ringfs_wire::abi::FUSE_ROOT_ID;
use rustix::io::Errno;

use crate::passthrough::{Backend, Found, ROOT_INODE};

const SHARDS: usize = 64;
/// Stands for "the crate does not know this file".
const NO_INODE: u64 = 0;

/// One file, directory or other inode that the guest knows.
pub struct Node {
    /// What the guest calls it.
    pub id: u64,
    /// Its file type: one of `S_IFREG`, `S_IFDIR`, ...; an inode never changes it.
    pub kind: u32,
    inode: AtomicU64,
    /// A file that has no name yet (`O_TMPFILE`) and so is unknown to the crate.
    unnamed: Option<OwnedFd>,
    /// Lookups given to the guest and not yet given back; changes under the inode shard's lock.
    given: AtomicU64,
    /// Lookups that the crate counts for this node.
    owed: AtomicU64,
    backend: Arc<Backend>,
}

/// How to reach a node's file.
#[derive(Clone, Copy)]
pub enum Backing<'a> {
    /// The crate holds it under this number.
    Crate(u64),
    /// Only we hold it: no name leads to it.
    Fd(BorrowedFd<'a>),
}

impl Node {
    /// Where its file is.
    ///
    /// # Errors
    /// `ESTALE` for a node that is known by id alone and was not imported.
    pub fn backing(&self) -> Result<Backing<'_>, Errno> {
        match (self.inode.load(Ordering::Acquire), &self.unnamed) {
            (NO_INODE, Some(fd)) => Ok(Backing::Fd(fd.as_fd())),
            (NO_INODE, None) => Err(Errno::STALE),
            (inode, _) => Ok(Backing::Crate(inode)),
        }
    }

    /// The crate's inode, for operations that only named files can serve.
    pub fn inode(&self) -> Result<u64, Errno> {
        match self.backing()? {
            Backing::Crate(inode) => Ok(inode),
            Backing::Fd(_) => Err(Errno::NOENT),
        }
    }

    /// True for a directory.
    pub fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let (inode, owed) = (*self.inode.get_mut(), *self.owed.get_mut());
        if inode != NO_INODE && owed > 0 {
            self.backend.forget(inode, owed);
        }
    }
}

/// Nodes that a FORGET let go. Dropping them closes fds, which may free the blocks of large
/// deleted files: where that must not hold anything up, drop it on another thread.
#[must_use = "dropping it closes files, which may take long"]
#[derive(Default)]
pub struct Released(Vec<Arc<Node>>);

impl Released {
    /// Nothing to close: no need to bother another thread.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// All nodes of a session.
pub struct Nodes {
    by_id: Vec<RwLock<HashMap<u64, Arc<Node>>>>,
    by_inode: Vec<Mutex<HashMap<u64, Arc<Node>>>>,
    next_id: AtomicU64,
    count: AtomicUsize,
    count_max: usize,
    overdrawn: AtomicU64,
    backend: Arc<Backend>,
}

impl Nodes {
    /// Only the root is known at first.
    pub fn new(backend: Arc<Backend>, count_max: usize) -> Nodes {
        let root = Arc::new(Node {
            id: FUSE_ROOT_ID,
            kind: libc::S_IFDIR,
            inode: AtomicU64::new(ROOT_INODE),
            unnamed: None,
            given: AtomicU64::new(1),
            owed: AtomicU64::new(0),
            backend: Arc::clone(&backend),
        });
        let nodes = Nodes {
            by_id: (0..SHARDS).map(|_| RwLock::default()).collect(),
            by_inode: (0..SHARDS).map(|_| Mutex::default()).collect(),
            next_id: AtomicU64::new(first_id()),
            count: AtomicUsize::new(1),
            count_max,
            overdrawn: AtomicU64::new(0),
            backend,
        };
        nodes.inode_shard(ROOT_INODE).insert(ROOT_INODE, Arc::clone(&root));
        nodes.insert_id(root);
        nodes
    }

    /// The node that a guest names.
    ///
    /// # Errors
    /// `ESTALE`: never given, or already forgotten.
    pub fn find(&self, id: u64) -> Result<Arc<Node>, Errno> {
        let shard = self.by_id[shard_of(id)].read().unwrap_or_else(PoisonError::into_inner);
        shard.get(&id).cloned().ok_or(Errno::STALE)
    }

    /// Refuses early what would make a node that then has no place.
    pub fn check_room(&self) -> Result<(), Errno> {
        if self.count.load(Ordering::Relaxed) < self.count_max {
            return Ok(());
        }
        Err(Errno::NFILE)
    }

    /// Gives a lookup of the crate to the guest: the count passes from `found` into the node.
    pub fn give(&self, found: &Found) -> Result<Arc<Node>, Errno> {
        let mut shard = self.inode_shard(found.inode);
        if let Some(node) = shard.get(&found.inode) {
            node.given.fetch_add(1, Ordering::Relaxed);
            node.owed.fetch_add(1, Ordering::Relaxed);
            return Ok(Arc::clone(node));
        }
        if let Err(error) = self.check_room() {
            drop(shard);
            self.backend.forget(found.inode, 1);
            return Err(error);
        }
        let node = Arc::new(Node {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            kind: found.stat.mode & libc::S_IFMT,
            inode: AtomicU64::new(found.inode),
            unnamed: None,
            given: AtomicU64::new(1),
            owed: AtomicU64::new(1),
            backend: Arc::clone(&self.backend),
        });
        shard.insert(found.inode, Arc::clone(&node));
        self.count.fetch_add(1, Ordering::Relaxed);
        self.insert_id(Arc::clone(&node));
        Ok(node)
    }

    /// A node for a regular file that has no name.
    pub fn give_unnamed(&self, fd: OwnedFd) -> Result<Arc<Node>, Errno> {
        self.check_room()?;
        let node = Arc::new(Node {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            kind: libc::S_IFREG,
            inode: AtomicU64::new(NO_INODE),
            unnamed: Some(fd),
            given: AtomicU64::new(1),
            owed: AtomicU64::new(0),
            backend: Arc::clone(&self.backend),
        });
        self.count.fetch_add(1, Ordering::Relaxed);
        self.insert_id(Arc::clone(&node));
        Ok(node)
    }

    /// An unnamed file got its first name, and the crate found it there: from now on both lead to
    /// the same node, unless a LOOKUP of the new name was faster; then that node is the name's.
    pub fn give_named(&self, node: &Arc<Node>, found: &Found) -> Result<Arc<Node>, Errno> {
        {
            let mut shard = self.inode_shard(found.inode);
            if !shard.contains_key(&found.inode) {
                // Under the old key too, so that a FORGET sees either state and nothing between.
                let _unnamed = (shard_of(found.inode) != shard_of(NO_INODE))
                    .then(|| self.inode_shard(NO_INODE));
                if node.given.load(Ordering::Relaxed) == 0 {
                    drop(shard);
                    self.backend.forget(found.inode, 1);
                    return Err(Errno::STALE);
                }
                node.inode.store(found.inode, Ordering::Release);
                node.given.fetch_add(1, Ordering::Relaxed);
                node.owed.fetch_add(1, Ordering::Relaxed);
                shard.insert(found.inode, Arc::clone(node));
                return Ok(Arc::clone(node));
            }
        }
        self.give(found)
    }

    /// The guest gives back `count` lookups of `id`. Unknown ids and the root are left alone, and
    /// more than was given counts as all of it.
    pub fn forget(&self, id: u64, count: u64, released: &mut Released) {
        if id == FUSE_ROOT_ID || count == 0 {
            return;
        }
        let Ok(node) = self.find(id) else {
            self.overdrawn.fetch_add(1, Ordering::Relaxed);
            return;
        };
        loop {
            let inode = node.inode.load(Ordering::Acquire);
            let mut shard = self.inode_shard(inode);
            if node.inode.load(Ordering::Acquire) != inode {
                continue;
            }
            let given = node.given.load(Ordering::Relaxed);
            if count > given {
                self.overdrawn.fetch_add(1, Ordering::Relaxed);
            }
            let left = given.saturating_sub(count);
            node.given.store(left, Ordering::Relaxed);
            if left == 0 && given > 0 {
                if shard.get(&inode).is_some_and(|other| Arc::ptr_eq(other, &node)) {
                    shard.remove(&inode);
                }
                self.remove_id(id);
                drop(shard);
                released.0.push(node);
            }
            return;
        }
    }

    /// Nodes known now, the root among them.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// How often a guest gave back what it did not have.
    pub fn overdrawn(&self) -> u64 {
        self.overdrawn.load(Ordering::Relaxed)
    }

    fn inode_shard(&self, inode: u64) -> MutexGuard<'_, HashMap<u64, Arc<Node>>> {
        self.by_inode[shard_of(inode)].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert_id(&self, node: Arc<Node>) {
        let shard = &self.by_id[shard_of(node.id)];
        shard.write().unwrap_or_else(PoisonError::into_inner).insert(node.id, node);
    }

    fn remove_id(&self, id: u64) {
        let shard = &self.by_id[shard_of(id)];
        if shard.write().unwrap_or_else(PoisonError::into_inner).remove(&id).is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Ids count up from the wall clock in nanoseconds: far fewer than one a nanosecond are given, so
/// a session that starts later never meets an id of an earlier one. handles.rs does the same.
pub fn first_id() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX / 2).max(FUSE_ROOT_ID + 1)
}

fn shard_of(key: u64) -> usize {
    (key % SHARDS as u64) as usize
}
