//! The guest's node ids, and what stands behind each.
//!
//! Invariants: an id is never given twice, also over restarts of the daemon (ids count up from the
//! wall clock in nanoseconds); one inode has one node as long as the guest knows it; the crate is
//! owed one `forget` for each lookup that it counted, paid when the last user of the node is gone,
//! so that an operation in flight never meets a reused inode number.
//!
//! Counts change only under the lock of the inode's shard: a LOOKUP that races the FORGET of the
//! same inode either revives the node before it dies, or makes a new one with a new id.
//!
//! A node is **resident** (the crate holds an fd of it) or **cold** (cold.rs; only its recipe is
//! kept). evict.rs moves it from one to the other and back, on use. Both moves are made under the
//! lock of its shard by id, so that who holds that lock finds a known node in one of the two.
//! Lock order: names, shard by inode, shard by id, cold.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use ringfs_wire::abi::FUSE_ROOT_ID;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::cold::Cold;
use crate::fds::Fds;
use crate::import::{self, HANDLE_BYTES_MAX, HandleKind, Recipe};
use crate::node::{Home, NO_INODE, Place, Shard};
use crate::notes::{HandleKinds, Notes};
use crate::other_names::OtherNames;
use crate::passthrough::{Backend, Found, ROOT_INODE, Stat};
use crate::quota::Quota;

pub use crate::node::{Backing, Node};

pub(crate) const SHARDS: usize = 64;

/// A node that was given to the guest.
pub struct NodeGiven {
    /// Its count went up by one.
    pub node: Arc<Node>,
    /// The guest has no recipe of it, or one of another place: it is to be noted.
    pub news: bool,
}

/// Nodes that a FORGET let go. Dropping them closes fds, and that is when the blocks of a deleted
/// file are freed (not at its UNLINK: the node still holds it then).
#[must_use = "dropping it closes files, which may take long"]
#[derive(Default)]
pub struct Released(Vec<Arc<Node>>);

impl Released {
    /// Nothing to close.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many fds dropping this closes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes those out whose end frees blocks, beyond so many that are left in: that may take long.
    pub fn take_dear(&mut self, most: u64) -> Released {
        let mut left = most;
        let is_dear = |node: &mut Arc<Node>| match left.checked_sub(blocks_freed(node)) {
            Some(rest) => {
                left = rest;
                false
            }
            None => true,
        };
        Released(self.0.extract_if(.., is_dear).collect())
    }
}

fn blocks_freed(node: &Node) -> u64 {
    let stat = node.backing().ok().and_then(|backing| match backing {
        Backing::Crate(inode) => node.home().backend.getattr(inode).ok(),
        Backing::Fd(fd) => Stat::of(fd).ok(),
    });
    stat.map_or(0, |stat| stat.blocks_freed())
}

/// How many nodes a session may know.
pub struct Bound {
    /// Whatever else is said.
    pub most: usize,
    /// What is said of its share.
    pub quota: Arc<Quota>,
}

/// All nodes of a session.
pub struct Nodes {
    by_id: Vec<RwLock<Shard>>,
    by_inode: Vec<Mutex<Shard>>,
    pub(crate) cold: Cold,
    pub(crate) other_names: OtherNames,
    next_id: AtomicU64,
    resident: AtomicUsize,
    bound: Bound,
    /// Calls on its file system may wait for ever: only its own threads make them, or one apart.
    pub(crate) may_hang: bool,
    overdrawn: AtomicU64,
    home: Arc<Home>,
    pub(crate) backend: Arc<Backend>,
    pub(crate) root: import::Root,
    pub(crate) fds: Arc<Fds>,
    pub(crate) handle_kinds: HandleKinds,
    /// Counts up when a connection is cut; see notes.rs.
    pub(crate) noted_life: AtomicU32,
    /// Read while the guest changes names, written while nodes are evicted by their names.
    names: RwLock<()>,
    /// Which shard by id evict.rs looks at next.
    pub(crate) hand: AtomicUsize,
    /// How many nodes there were when the guest was asked to give some back.
    pub(crate) asked_at: AtomicUsize,
    /// Nothing could be evicted: nobody tries until then.
    pub(crate) rests_until: Mutex<Option<Instant>>,
}

impl Nodes {
    /// Only the root is known at first.
    pub fn new(
        backend: Arc<Backend>,
        root: import::Root,
        fds: &Arc<Fds>,
        bound: Bound,
        may_hang: bool,
    ) -> Arc<Nodes> {
        let nodes = Arc::new(Nodes {
            by_id: (0..SHARDS).map(|_| RwLock::new(Shard::by_id())).collect(),
            by_inode: (0..SHARDS).map(|_| Mutex::new(Shard::by_inode())).collect(),
            cold: Cold::new(&fds.cold),
            other_names: OtherNames::default(),
            next_id: AtomicU64::new(first_id()),
            resident: AtomicUsize::new(0),
            bound,
            may_hang,
            overdrawn: AtomicU64::new(0),
            home: Arc::new(Home { backend: Arc::clone(&backend), fds: Arc::clone(fds) }),
            backend,
            root,
            fds: Arc::clone(fds),
            handle_kinds: HandleKinds::default(),
            noted_life: AtomicU32::new(1),
            names: RwLock::new(()),
            hand: AtomicUsize::new(0),
            asked_at: AtomicUsize::new(0),
            rests_until: Mutex::default(),
        });
        let place = Place { parent: FUSE_ROOT_ID, name: c".".into() };
        let root = (ROOT_INODE, 0);
        let node = Arc::new(Node::new(&nodes.home, FUSE_ROOT_ID, libc::S_IFDIR, root, 1, place));
        nodes.inode_shard(ROOT_INODE).insert(&node);
        nodes.enter(&mut nodes.lock_id(FUSE_ROOT_ID), &node);
        fds.join(&nodes);
        nodes
    }

    /// The node that a guest names; a cold one is taken in first, which opens files.
    ///
    /// # Errors
    /// `ESTALE`: never given, already forgotten, or no longer to be found on the host.
    pub fn find(&self, id: u64) -> Result<Arc<Node>, Errno> {
        if let Some(node) = self.find_resident(id) {
            return Ok(node);
        }
        self.check_fds()?;
        self.load(id)
    }

    /// The node, unless it is cold or unknown.
    pub(crate) fn find_resident(&self, id: u64) -> Option<Arc<Node>> {
        let shard = self.id_shard(id).read().unwrap_or_else(PoisonError::into_inner);
        let node = shard.get(id)?;
        node.touch();
        Some(Arc::clone(node))
    }

    /// True where [`Nodes::find`] would have to open files.
    pub fn is_cold(&self, id: u64) -> bool {
        self.cold.contains(id)
    }

    /// Whether a name may lead to a cold node.
    pub fn has_cold(&self) -> bool {
        self.cold.has_files()
    }

    /// The guest has moved a node to this name: what no open file leads to is found by it alone,
    /// and by another daemon everything.
    pub fn moved(&self, parent: &Node, name: &CStr, notes: Option<&Notes>) {
        let Ok(found) = parent.inode().and_then(|dir| self.backend.lookup(dir, name)) else {
            return;
        };
        let node = self.inode_shard(found.inode).get(found.inode).cloned();
        if let Some(node) = node {
            self.seen(&node, &found, parent, name);
            if let Some(notes) = notes {
                self.note(&node, &found, parent, name, notes);
            }
        }
        self.backend.forget(found.inode, 1);
    }

    /// Refuses early what would make a node that then has no place, and sees to it that there are
    /// fds.
    ///
    /// # Errors
    /// `ENFILE`.
    pub fn check_room(&self) -> Result<(), Errno> {
        self.check_count()?;
        self.check_fds()
    }

    /// Sees to it that there are fds.
    pub(crate) fn check_fds(&self) -> Result<(), Errno> {
        self.fds.make_room(self.resident(), Some(self))
    }

    pub(crate) fn check_count(&self) -> Result<(), Errno> {
        let Bound { most, quota } = &self.bound;
        if quota.may_know(self.count(), *most) { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// Gives a lookup of the crate to the guest: the count passes from `found`, which was seen as
    /// `name` in the directory `parent`, into the node.
    pub fn give(&self, found: &Found, parent: &Node, name: &CStr) -> Result<NodeGiven, Errno> {
        let mut shard = self.inode_shard(found.inode);
        if let Some(node) = shard.get(found.inode) {
            node.given.fetch_add(1, Ordering::Relaxed);
            node.owed.fetch_add(1, Ordering::Relaxed);
            let node = Arc::clone(node);
            drop(shard);
            let news = self.seen(&node, found, parent, name);
            return Ok(NodeGiven { node, news });
        }
        let place = Place { parent: parent.id, name: name.into() };
        let node = match self.cold_twin(found, parent, name) {
            Ok(twin) => {
                let warmed = twin.and_then(|id| self.warm(&mut shard, id, found, 1, None));
                warmed.map_or_else(|| self.give_new(&mut shard, found, place), Ok)
            }
            Err(error) => Err(error),
        };
        drop(shard);
        if node.is_err() {
            self.backend.forget(found.inode, 1);
        }
        let node = node?;
        // A cold one has a recipe, but its place may be another by now. A new one is not noted.
        let news = self.seen(&node, found, parent, name);
        Ok(NodeGiven { node, news })
    }

    fn give_new(&self, shard: &mut Shard, found: &Found, place: Place) -> Result<Arc<Node>, Errno> {
        self.check_count()?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let node = Arc::new(self.node_of(id, found, 1, place).unopened());
        shard.insert(&node);
        self.enter(&mut self.lock_id(id), &node);
        Ok(node)
    }

    fn node_of(&self, id: u64, found: &Found, given: u64, place: Place) -> Node {
        let Stat { mode, dev, ino, .. } = found.stat;
        let mut node = Node::new(&self.home, id, mode, (found.inode, 1), given, place);
        let device = (rustix::fs::major(dev), rustix::fs::minor(dev));
        if self.root.identity().is_some_and(|root| root.device == device) {
            node.lies_on_root(ino);
        }
        node
    }

    /// The cold node of a file that the crate has just found.
    pub(crate) fn cold_twin(
        &self,
        found: &Found,
        parent: &Node,
        name: &CStr,
    ) -> Result<Option<u64>, Errno> {
        let file = (found.stat.dev, found.stat.ino);
        let ids = self.cold.ids_of(file);
        if ids.is_empty() {
            return Ok(None);
        }
        if let Some(id) = self.proved_twin(found, parent, name) {
            return Ok(Some(id));
        }
        let dir = self.backend.path_fd(parent.inode()?)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&dir, name, flags, Mode::empty())?;
        let seen = Stat::of(&fd)?;
        if (seen.dev, seen.ino) != file {
            // The name was replaced just now; the kernel asks again.
            return Err(Errno::STALE);
        }
        for id in ids {
            let Some(recipe) = self.cold.recipe(id) else { continue };
            if recipe.describes(dir.as_fd(), fd.as_fd())? {
                return Ok(Some(id));
            }
            // The inode number was used again: that node is stale, and stays so.
            self.cold.disown(file, id);
        }
        Ok(None)
    }

    /// The same by one call and no open, as far as a handle that opens the file proves it. The name
    /// may lead to another file by now; but what has this handle has that number, as long as the
    /// crate holds the file of that number.
    fn proved_twin(&self, found: &Found, parent: &Node, name: &CStr) -> Option<u64> {
        let Stat { dev, ino, mode, .. } = found.stat;
        let mut bytes = [0; HANDLE_BYTES_MAX];
        let read = self
            .with_dir(parent, |dir| import::Handle::read(HandleKind::Plain, dir, name, &mut bytes));
        let (raw_type, len) = read.ok()?.ok()?;
        let kind = (mode & libc::S_IFMT) as u16;
        self.cold.id_by_handle((dev, ino), kind, (raw_type, bytes.get(..len)?))
    }

    /// A cold node becomes resident, and the guest is given `more` lookups of it; the crate counts
    /// the one of `found`. It was found at `place`; without one the recipe's is kept, as the name
    /// that it was met under may be taken away now. `None`: the guest has forgotten it meanwhile,
    /// or it is resident already.
    pub(crate) fn warm(
        &self,
        shard: &mut Shard,
        id: u64,
        found: &Found,
        more: u64,
        place: Option<Place>,
    ) -> Option<Arc<Node>> {
        let mut ids = self.lock_id(id);
        let (given, noted, recipe) = self.cold.remove(id)?;
        let given = given.saturating_add(more);
        // What was found has a recipe.
        let recipe = recipe?;
        let own = Place { parent: recipe.parent, name: recipe.name.as_c_str().into() };
        if let Some(other) = recipe.other.clone() {
            self.other_names.put(id, other);
        }
        let node = Arc::new(self.node_of(id, found, given, own));
        node.noted.store(noted, Ordering::Relaxed);
        if let Some(Place { parent, name }) = place {
            node.place_found(parent, &name);
        }
        shard.insert(&node);
        self.enter(&mut ids, &node);
        Some(node)
    }

    /// A resident node of which the caller has the only other reference becomes cold. `false`:
    /// somebody uses it, or it is gone.
    pub(crate) fn cool(&self, node: Arc<Node>, inode: u64, recipe: &Recipe) -> bool {
        let mut shard = self.inode_shard(inode);
        let mut ids = self.lock_id(node.id);
        let here = shard.get(inode).is_some_and(|other| Arc::ptr_eq(other, &node));
        let given = node.given.load(Ordering::Relaxed);
        // One in each map, and ours.
        if !here || given == 0 || Arc::strong_count(&node) != 3 {
            return false;
        }
        node.place_found(recipe.parent, &recipe.name);
        let noted = node.noted.load(Ordering::Relaxed);
        if !self.cold.insert(node.id, given, noted, recipe) {
            return false;
        }
        shard.remove(inode);
        self.leave(&mut ids, node.id);
        // Closing needs no lock.
        drop((ids, shard));
        true
    }

    /// A node for a regular file that has no name.
    pub fn give_unnamed(&self, fd: OwnedFd) -> Result<Arc<Node>, Errno> {
        self.check_room()?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let node = Arc::new(Node::unnamed(&self.home, id, fd));
        self.enter(&mut self.lock_id(id), &node);
        Ok(node)
    }

    /// An unnamed file got its first name, and the crate found it there: from now on both lead to
    /// the same node, unless a LOOKUP of the new name was faster; then that node is the name's.
    pub fn give_named(
        &self,
        node: &Arc<Node>,
        found: &Found,
        parent: &Node,
        name: &CStr,
    ) -> Result<NodeGiven, Errno> {
        {
            let mut shard = self.inode_shard(found.inode);
            if shard.get(found.inode).is_none() {
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
                shard.insert(node);
                node.seen_at(parent.id, name);
                return Ok(NodeGiven { node: Arc::clone(node), news: true });
            }
        }
        self.give(found, parent, name)
    }

    /// The guest gives back `count` lookups of `id`. Unknown ids and the root are left alone, and
    /// more than was given counts as all of it.
    pub fn forget(&self, id: u64, count: u64, released: &mut Released) {
        if id == FUSE_ROOT_ID || count == 0 {
            return;
        }
        let Some(node) = self.forget_cold(id, count) else { return };
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
            // The guest has forgotten what it was told, or was not: what it has, or will have when
            // a reply arrives, is to be told again.
            node.noted.store(0, Ordering::Relaxed);
            if left == 0 && given > 0 {
                if shard.get(inode).is_some_and(|other| Arc::ptr_eq(other, &node)) {
                    shard.remove(inode);
                }
                self.leave(&mut self.lock_id(id), id);
                drop(shard);
                released.0.push(node);
            }
            return;
        }
    }

    /// The resident node, or none where it was cold (and has been told) or unknown.
    fn forget_cold(&self, id: u64, count: u64) -> Option<Arc<Node>> {
        let shard = self.id_shard(id).read().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = shard.get(id) {
            return Some(Arc::clone(node));
        }
        if !matches!(self.cold.forget(id, count), Some((_, 0))) {
            self.overdrawn.fetch_add(1, Ordering::Relaxed);
        }
        None
    }

    /// Ids given from now on are beyond `id`.
    pub(crate) fn count_on_from(&self, id: u64) {
        self.next_id.fetch_max(id.saturating_add(1), Ordering::Relaxed);
    }

    /// Nodes known now, the root among them.
    pub fn count(&self) -> usize {
        self.resident() + self.cold.count()
    }

    /// How many there may be.
    pub(crate) fn most(&self) -> usize {
        self.bound.quota.nodes_max(self.bound.most)
    }

    /// Nodes with an fd behind them.
    pub fn resident(&self) -> usize {
        self.resident.load(Ordering::Relaxed)
    }

    /// Whether what is let go can be opened by its handle.
    pub(crate) fn finds_by_handle(&self) -> bool {
        self.root.opens_handles()
    }

    /// How often a guest gave back what it did not have.
    pub fn overdrawn(&self) -> u64 {
        self.overdrawn.load(Ordering::Relaxed)
    }

    /// Held while names are removed or replaced: nothing is evicted by a name that goes away.
    pub(crate) fn hold_names(&self) -> RwLockReadGuard<'_, ()> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Not while anybody changes names.
    pub(crate) fn freeze_names(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        self.names.try_write().ok()
    }

    pub(crate) fn inode_shard(&self, inode: u64) -> MutexGuard<'_, Shard> {
        self.by_inode[shard_of(inode)].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, ids: &mut Shard, node: &Arc<Node>) {
        self.resident.fetch_add(1, Ordering::Relaxed);
        ids.insert(node);
    }

    fn leave(&self, ids: &mut Shard, id: u64) {
        if ids.remove(id).is_some() {
            self.resident.fetch_sub(1, Ordering::Relaxed);
            self.other_names.remove(id);
        }
    }

    pub(crate) fn id_shard(&self, id: u64) -> &RwLock<Shard> {
        &self.by_id[shard_of(id)]
    }

    pub(crate) fn lock_id(&self, id: u64) -> RwLockWriteGuard<'_, Shard> {
        self.id_shard(id).write().unwrap_or_else(PoisonError::into_inner)
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
