//! One node: what is kept of a file that the guest knows and an fd stands behind.
//!
//! There may be a million of them, so its size is asserted: what all nodes of a session have in
//! common stands in one [`Home`], a short name needs no memory of its own, and both tables of
//! nodes.rs hold nothing but pointers ([`Shard`]). Who may change what, and when, nodes.rs says.

use std::collections::hash_map::RandomState;
use std::ffi::CStr;
use std::hash::BuildHasher;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use hashbrown::HashTable;
use ringfs_wire::abi::FUSE_ROOT_ID;
use rustix::io::Errno;

use crate::fds::Fds;
use crate::passthrough::Backend;

/// Stands for "the crate does not know this file".
pub(crate) const NO_INODE: u64 = 0;

/// Where the crate's number of a file has the host's, unless that is too long.
const HOST_INO: u64 = (1 << 47) - 1;

/// It lies on the root's device, and the crate's number of it has the host's.
const TELLS_INO: u16 = 1;

/// A shard gives no room back below so many nodes.
const SHARD_ROOM_KEPT: usize = 64;

/// What the nodes of a session share.
pub(crate) struct Home {
    pub(crate) backend: Arc<Backend>,
    pub(crate) fds: Arc<Fds>,
}

/// One file, directory or other inode that the guest knows.
pub struct Node {
    /// What the guest calls it.
    pub id: u64,
    pub(crate) inode: AtomicU64,
    /// Lookups given to the guest and not yet given back; changes under the inode shard's lock.
    pub(crate) given: AtomicU64,
    /// Lookups that the crate counts for this node.
    pub(crate) owed: AtomicU64,
    /// By which connections a NODE entry of it has left; see notes.rs.
    pub(crate) noted: AtomicU64,
    home: Arc<Home>,
    /// Where it was seen last.
    place: Mutex<Place>,
    /// A directory's, for notes.rs.
    dir: OnceLock<OwnedFd>,
    /// A file that has no name yet (`O_TMPFILE`) and so is unknown to the crate.
    unnamed: Option<OwnedFd>,
    /// Its file type, which an inode never changes; and [`TELLS_INO`].
    kind: u16,
    /// Used since evict.rs last came by.
    used: AtomicBool,
    /// It was never opened, so the guest's kernel has no pages of it: see store.rs.
    is_unopened: AtomicBool,
}

// With the counts of its Arc and what malloc adds: 128.
const _: () = assert!(size_of::<Node>() <= 104);

/// A directory, by its node id, and a name in it.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) parent: u64,
    pub(crate) name: Name,
}

/// A name; a short one allocates nothing.
#[derive(Clone)]
pub(crate) enum Name {
    /// Ends with the first NUL.
    Short([u8; 23]),
    Long(Box<CStr>),
}

impl From<&CStr> for Name {
    fn from(name: &CStr) -> Name {
        let bytes = name.to_bytes_with_nul();
        let mut short = [0; 23];
        match short.get_mut(..bytes.len()) {
            Some(room) => {
                room.copy_from_slice(bytes);
                Name::Short(short)
            }
            None => Name::Long(name.into()),
        }
    }
}

impl Deref for Name {
    type Target = CStr;

    fn deref(&self) -> &CStr {
        match self {
            Name::Short(bytes) => CStr::from_bytes_until_nul(bytes).unwrap_or_default(),
            Name::Long(name) => name,
        }
    }
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
    /// One that is in no table yet, and whose fd is counted from now on: `mode` has its file type,
    /// `owed` lookups of `inode` are counted by the crate.
    pub(crate) fn new(
        home: &Arc<Home>,
        id: u64,
        mode: u32,
        (inode, owed): (u64, u64),
        given: u64,
        place: Place,
    ) -> Node {
        home.fds.add_node();
        Node {
            id,
            inode: AtomicU64::new(inode),
            given: AtomicU64::new(given),
            owed: AtomicU64::new(owed),
            noted: AtomicU64::new(0),
            home: Arc::clone(home),
            place: Mutex::new(place),
            dir: OnceLock::new(),
            unnamed: None,
            kind: (mode & libc::S_IFMT) as u16,
            used: AtomicBool::new(true),
            is_unopened: AtomicBool::new(false),
        }
    }

    /// The same for a file that the guest did not know before.
    pub(crate) fn unopened(mut self) -> Node {
        *self.is_unopened.get_mut() = true;
        self
    }

    /// The same for a file without a name.
    pub(crate) fn unnamed(home: &Arc<Home>, id: u64, fd: OwnedFd) -> Node {
        let place = Place { parent: id, name: c"".into() };
        let mut node = Node::new(home, id, libc::S_IFREG, (NO_INODE, 0), 1, place);
        node.unnamed = Some(fd);
        node
    }

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

    /// It has this inode number there.
    pub(crate) fn lies_on_root(&mut self, ino: u64) {
        if *self.inode.get_mut() & HOST_INO == ino {
            self.kind |= TELLS_INO;
        }
    }

    /// Its inode number on the root's device, where that is known without a call.
    pub(crate) fn ino_on_root(&self) -> Option<u64> {
        (self.kind & TELLS_INO != 0).then(|| self.inode.load(Ordering::Relaxed) & HOST_INO)
    }

    /// The crate's inode, for operations that only named files can serve.
    pub fn inode(&self) -> Result<u64, Errno> {
        match self.backing()? {
            Backing::Crate(inode) => Ok(inode),
            Backing::Fd(_) => Err(Errno::NOENT),
        }
    }

    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    pub(crate) fn place(&self) -> Place {
        self.place.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The directory of its place.
    pub(crate) fn parent(&self) -> u64 {
        self.place.lock().unwrap_or_else(PoisonError::into_inner).parent
    }

    /// Where it was seen before, if elsewhere.
    pub(crate) fn seen_at(&self, parent: u64, name: &CStr) -> Option<Place> {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        let news = place.parent != parent || *place.name != *name;
        news.then(|| std::mem::replace(&mut *place, Place { parent, name: name.into() }))
    }

    /// We have found it there ourselves: what the guest was told is of the place before.
    pub(crate) fn place_found(&self, parent: u64, name: &CStr) {
        if self.seen_at(parent, name).is_some() {
            self.noted.store(0, Ordering::Relaxed);
        }
    }

    /// May its fd be closed? Not the root's, and not that of a file that no name leads to.
    pub(crate) fn is_evictable(&self) -> bool {
        let named = self.inode.load(Ordering::Acquire) != NO_INODE && self.unnamed.is_none();
        named && self.id != FUSE_ROOT_ID
    }

    /// It is used now.
    pub(crate) fn touch(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it was used since this was asked last.
    pub(crate) fn take_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// It is being opened now; whether for the first time, as far as is known.
    pub(crate) fn take_unopened(&self) -> bool {
        self.is_unopened.load(Ordering::Relaxed) && self.is_unopened.swap(false, Ordering::Relaxed)
    }

    /// Its file type: one of `S_IFREG`, `S_IFDIR`, ...
    pub fn kind(&self) -> u32 {
        u32::from(self.kind) & libc::S_IFMT
    }

    /// True for a directory.
    pub fn is_dir(&self) -> bool {
        self.kind() == libc::S_IFDIR
    }

    /// The fd that was kept for its entries.
    pub(crate) fn dir(&self) -> Option<BorrowedFd<'_>> {
        self.dir.get().map(AsFd::as_fd)
    }

    /// Keeps one, unless one is there.
    pub(crate) fn keep_dir(&self, fd: OwnedFd) -> BorrowedFd<'_> {
        let kept = self.dir.get_or_init(|| {
            self.home.fds.add();
            fd
        });
        kept.as_fd()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let (inode, owed) = (*self.inode.get_mut(), *self.owed.get_mut());
        if inode != NO_INODE && owed > 0 {
            self.home.backend.forget(inode, owed);
        }
        self.home.fds.remove_node();
        self.home.fds.remove(usize::from(self.dir.get().is_some()));
    }
}

/// Nodes behind one lock, found by a number that each of them has.
pub(crate) struct Shard {
    nodes: HashTable<Arc<Node>>,
    number: fn(&Node) -> u64,
    hasher: RandomState,
}

impl Shard {
    pub(crate) fn by_id() -> Shard {
        Shard::by(|node| node.id)
    }

    /// By the crate's inode, which does not change while the node is in here.
    pub(crate) fn by_inode() -> Shard {
        Shard::by(|node| node.inode.load(Ordering::Relaxed))
    }

    fn by(number: fn(&Node) -> u64) -> Shard {
        Shard { nodes: HashTable::new(), number, hasher: RandomState::new() }
    }

    pub(crate) fn get(&self, number: u64) -> Option<&Arc<Node>> {
        let hash = self.hasher.hash_one(number);
        self.nodes.find(hash, |node| (self.number)(node) == number)
    }

    /// It must not be in here, nor another one of its number.
    pub(crate) fn insert(&mut self, node: &Arc<Node>) {
        let Shard { nodes, number, hasher } = self;
        let hash = |node: &Arc<Node>| hasher.hash_one(number(node));
        nodes.insert_unique(hash(node), Arc::clone(node), hash);
    }

    pub(crate) fn remove(&mut self, number: u64) -> Option<Arc<Node>> {
        let Shard { nodes, number: of, hasher } = self;
        let found = nodes.find_entry(hasher.hash_one(number), |node| of(node) == number).ok()?;
        let (node, _) = found.remove();
        // A guest that walked through millions of files and forgot them has its memory back.
        if nodes.capacity() > SHARD_ROOM_KEPT && nodes.len() * 4 < nodes.capacity() {
            nodes.shrink_to(nodes.len() * 2, |node| hasher.hash_one(of(node)));
        }
        Some(node)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;

    #[test]
    fn names_of_any_length_stay_what_they_are() {
        for length in [0, 1, 21, 22, 23, 24, 255] {
            let name = CString::new(vec![b'n'; length]).expect("no NUL");
            let kept = Name::from(name.as_c_str());
            assert_eq!(&*kept, name.as_c_str());
            assert_eq!(matches!(kept, Name::Short(_)), length <= 22);
        }
    }
}
