//! Nodes without an fd: let go where fds run short, and taken in again on their next use.
//!
//! A node goes by its name: what is kept (import.rs) says which directory and name lead to it, and
//! how to tell that the same file is still there. So the guest may walk through more files than
//! the daemon may open. The kernel of the guest notices nothing.
//!
//! What is in use stays: an open file, a request in flight, a directory that is being read each
//! hold a reference. So does what no name leads to. Names that the guest is about to remove or
//! replace are taken in first ([`Nodes::hold_name`]), since an fd keeps what a name no longer can.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLockReadGuard};
use std::time::{Duration, Instant};

use ringfs_wire::limits::FORGETS_PER_RECORD_MAX;
use rustix::io::Errno;

use crate::import::{self, ImportError, Recipe};
use crate::node::Place;
use crate::nodes::{Node, Nodes, SHARDS};
use crate::passthrough::{Found, ROOT_INODE, Stat};

/// How often a file that is being moved is looked for.
const MOVED_TRIES_MAX: u32 = 8;

/// Directories above a node that may be cold too. A path has fewer, a tree may have more.
const DEPTH_MAX: usize = 65_536;
/// After so many of them that are gone the node is looked for by itself: a guest may have made up
/// a chain of directories each of which takes the host long to not find.
const LOST_MAX: usize = 32;
/// Nodes that a guest is asked to give back at once: as many as one FORGET can name.
const WANTED_BACK_MAX: usize = FORGETS_PER_RECORD_MAX;
/// After so many of them it is asked whether there are fds.
const CHECK_EVERY: usize = 16;
/// Nodes that an eviction tries in vain: it may run on any guest's shard.
const FAILURES_MAX: u32 = 64;
/// Directories that it takes in by their handles, each of which may take a search of the disk.
const LOADS_MAX: u32 = 1;
/// How long a session is left alone that had nothing to give up.
const REST: Duration = Duration::from_secs(1);

/// Names that stay what they are until this is dropped, and the file that one of them leads to.
#[must_use = "names may be evicted by as soon as it is dropped"]
pub struct HeldNames<'a> {
    _frozen: RwLockReadGuard<'a, ()>,
    _nodes: Vec<Arc<Node>>,
}

/// The directory that was looked at last.
struct OpenDir {
    node: Arc<Node>,
    /// Where the node keeps none.
    fd: Option<OwnedFd>,
}

/// One eviction.
#[derive(Default)]
struct Eviction {
    directory: Option<OpenDir>,
    loads: u32,
    failures: u32,
}

impl Nodes {
    /// Closes the fds of up to `want` nodes that were not used for a while; how many it were.
    /// `None` while another thread evicts, or changes names. Opens nothing that lasts, but for the
    /// directory of a link or special file.
    ///
    /// Whoever needs an fd runs this, also the shard of another guest: so it gives up after a
    /// bounded number of tries, and then this session is not asked again for a while.
    pub fn evict(&self, want: usize) -> Option<usize> {
        let _frozen = self.freeze_names()?;
        let now = Instant::now();
        let mut rests_until = self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
        if rests_until.is_some_and(|until| now < until) {
            return Some(0);
        }
        let mut evicted = 0;
        let mut eviction = Eviction::default();
        // The first round finds what was not used since the last one, the second all the rest.
        for _ in 0..2 * SHARDS {
            if evicted >= want || eviction.failures >= FAILURES_MAX {
                break;
            }
            let mut idle = self.idle_nodes(want - evicted);
            // Siblings together: their directory is opened once.
            idle.sort_by_cached_key(|node| node.parent());
            for node in idle {
                let id = node.id;
                if self.evict_one(node, &mut eviction).unwrap_or(false) {
                    evicted += 1;
                } else {
                    eviction.failures += 1;
                    // It stays, and others have their turn before it is tried again.
                    let _ = self.find_resident(id);
                }
            }
            eviction.directory = None;
        }
        *rests_until = (evicted == 0 && eviction.failures >= FAILURES_MAX).then(|| now + REST);
        Some(evicted)
    }

    /// Nodes that the guest's kernel had better give back, before there are so many that it may
    /// know no more; none while there is room, or where it was asked a moment ago.
    pub fn wanted_back(&self) -> Vec<u64> {
        let (count, most) = (self.count(), self.most());
        let step = (most / 16).max(1);
        if count < most / 4 * 3 {
            // One node less is no room, or who gives it back and takes it is asked each time.
            if count + step < most / 4 * 3 && self.asked_at.load(Ordering::Relaxed) > 0 {
                self.asked_at.store(0, Ordering::Relaxed);
            }
            return Vec::new();
        }
        // Again when there are as many as then, give or take what may have come and gone since.
        let asked_at = self.asked_at.load(Ordering::Relaxed);
        if asked_at > 0 && count.abs_diff(asked_at) < step {
            return Vec::new();
        }
        self.asked_at.store(count, Ordering::Relaxed);
        let want = (count / 4).min(WANTED_BACK_MAX);
        // Those that were not used for the longest time.
        let mut ids = self.cold.some(want);
        for _ in 0..2 * SHARDS {
            if ids.len() >= want {
                break;
            }
            ids.extend(self.idle_nodes(want - ids.len()).iter().map(|node| node.id));
        }
        ids
    }

    /// Nodes of the next shard that nobody uses or has used since they were looked at last.
    fn idle_nodes(&self, most: usize) -> Vec<Arc<Node>> {
        let hand = self.hand.fetch_add(1, Ordering::Relaxed) % SHARDS;
        let shard = self.id_shard(hand as u64).read().unwrap_or_else(PoisonError::into_inner);
        // Two references are the maps'.
        let free = shard.iter().filter(|node| {
            Arc::strong_count(node) == 2 && node.is_evictable() && !node.take_used()
        });
        free.take(most).cloned().collect()
    }

    fn evict_one(&self, node: Arc<Node>, eviction: &mut Eviction) -> Result<bool, Errno> {
        let inode = node.inode()?;
        let recipe = match self.recipe_by_name(&node, eviction) {
            Some(recipe) => recipe,
            None => {
                let stat = self.backend.getattr(inode)?;
                if stat.nlink == 0 {
                    return Ok(false);
                }
                self.recipe_of(&node, inode, &stat, eviction)?
            }
        };
        let recipe = Recipe { other: self.other_names.handle(node.id), ..recipe };
        Ok(recipe.proves_identity() && self.cool(node, inode, &recipe))
    }

    /// As [`Nodes::recipe_of`] by fewer calls, for a file of the root's device that its last name
    /// leads to, in a directory that is not cold.
    fn recipe_by_name(&self, node: &Node, eviction: &mut Eviction) -> Option<Recipe> {
        let ino = node.ino_on_root()?;
        let place = node.place();
        if !self.open_directory(place.parent, eviction, true).ok()? {
            return None;
        }
        let dir = self.directory_of(eviction).ok()?;
        let recipe = Recipe::brief_on(self.root.identity()?, dir, &place.name, place.parent)?;
        (recipe.ino == ino).then_some(recipe)
    }

    fn recipe_of(
        &self,
        node: &Node,
        inode: u64,
        stat: &Stat,
        eviction: &mut Eviction,
    ) -> Result<Recipe, Errno> {
        let is_it = |recipe: &Recipe| {
            let (major, minor) = recipe.mount.device;
            (rustix::fs::makedev(major, minor), recipe.ino) == (stat.dev, stat.ino)
        };
        let place = node.place();
        let can_open = matches!(node.kind(), libc::S_IFREG | libc::S_IFDIR);
        if !self.open_directory(place.parent, eviction, can_open)? {
            // Cold, and stays so: to take it in may take as many fds as the path has parts.
            let fd = self.backend.path_fd(inode)?;
            let recipe = Recipe::brief_of_fd(fd.as_fd(), &place.name, place.parent);
            return recipe.map_err(ImportError::errno);
        }
        match self.recipe_in(eviction, &place) {
            Ok(recipe) if is_it(&recipe) => return Ok(recipe),
            Ok(_) | Err(_) if !can_open => return Err(Errno::STALE),
            Ok(_) | Err(_) => {}
        }
        // Renamed on the host, or since the guest looked it up; the kernel knows the name.
        let place = self.place_now(inode)?;
        self.open_directory(place.parent, eviction, false)?;
        self.recipe_in(eviction, &place).ok().filter(is_it).ok_or(Errno::STALE)
    }

    fn recipe_in(&self, eviction: &Eviction, place: &Place) -> Result<Recipe, Errno> {
        let recipe = Recipe::brief(self.directory_of(eviction)?, &place.name, place.parent);
        recipe.map_err(ImportError::errno)
    }

    fn directory_of<'a>(&'a self, eviction: &'a Eviction) -> Result<BorrowedFd<'a>, Errno> {
        let OpenDir { node, fd } = eviction.directory.as_ref().ok_or(Errno::STALE)?;
        self.kept_dir(node).or(fd.as_ref().map(AsFd::as_fd)).ok_or(Errno::STALE)
    }

    /// Opens a directory, and says whether: not a cold one where the caller can do without.
    fn open_directory(
        &self,
        id: u64,
        eviction: &mut Eviction,
        dispensable: bool,
    ) -> Result<bool, Errno> {
        if eviction.directory.as_ref().is_some_and(|open| open.node.id == id) {
            return Ok(true);
        }
        let node = match self.find_resident(id) {
            Some(node) => node,
            None if dispensable => return Ok(false),
            // By its handle, without the directories above it; a handle that a guest has told may
            // be made up, so that the disk is searched in vain.
            None if eviction.loads < LOADS_MAX => {
                let recipe = self.cold.own_recipe(id).ok_or(Errno::STALE)?;
                eviction.loads += 1;
                self.load_one(id, &recipe)?
            }
            None => return Err(Errno::STALE),
        };
        let is_kept = self.kept_dir(&node).is_some();
        let fd = if is_kept { None } else { Some(self.backend.path_fd(node.inode()?)?) };
        eviction.directory = Some(OpenDir { node, fd });
        Ok(true)
    }

    /// Where the host's kernel says that the file is.
    fn place_now(&self, inode: u64) -> Result<Place, Errno> {
        let fd = self.backend.path_fd(inode)?;
        let mut path = self.root.path_below(fd.as_fd()).map_err(ImportError::errno)?;
        let name = path.pop().ok_or(Errno::STALE)?;
        let parent = self.descend(&path)?;
        let known = self.inode_shard(parent).get(parent).map(|node| node.id);
        if parent != ROOT_INODE {
            self.backend.forget(parent, 1);
        }
        Ok(Place { parent: known.ok_or(Errno::STALE)?, name: name.as_c_str().into() })
    }

    /// The crate's inode at a path below the root. The caller is given one count of it, but for
    /// the root.
    fn descend(&self, path: &[CString]) -> Result<u64, Errno> {
        let mut inode = ROOT_INODE;
        for name in path {
            let next = self.backend.lookup(inode, name);
            if inode != ROOT_INODE {
                self.backend.forget(inode, 1);
            }
            inode = next?.inode;
        }
        Ok(inode)
    }

    /// Takes a cold node in again, and the directories above it before. Each is held until the one
    /// below it is there.
    ///
    /// # Errors
    /// `ESTALE`: unknown, or the host has no such file any more. `ENFILE`, and what the host said.
    pub(crate) fn load(&self, id: u64) -> Result<Arc<Node>, Errno> {
        match self.load_known(id) {
            Err(Errno::STALE) => self.load_searched(id),
            other => other,
        }
    }

    /// It may be there, and none of its names be known.
    fn load_searched(&self, id: u64) -> Result<Arc<Node>, Errno> {
        let recipe = self.cold.recipe(id).ok_or(Errno::STALE)?;
        let found = self.root.by_search(&recipe);
        let node = found.and_then(|found| self.take_in(id, &recipe, &found, None));
        node.map_err(ImportError::errno)
    }

    /// By names and handles.
    fn load_known(&self, id: u64) -> Result<Arc<Node>, Errno> {
        let chain = self.cold_above(id);
        let top = chain.last().and_then(|&top| self.cold.recipe(top));
        let mut last = top.and_then(|top| self.find_resident(top.parent)).ok_or(Errno::STALE);
        let mut lost = 0;
        for (n, &id) in chain.iter().rev().enumerate() {
            if lost >= LOST_MAX && n + 1 < chain.len() {
                continue;
            }
            if n % CHECK_EVERY == CHECK_EVERY - 1 {
                self.check_fds()?;
            }
            let loaded = match self.cold.recipe(id) {
                Some(recipe) => self.load_one(id, &recipe),
                None => self.find_resident(id).ok_or(Errno::STALE),
            };
            // A directory that is gone: what is below it may have moved, and is found by handle.
            if matches!(loaded, Err(errno) if errno != Errno::STALE) {
                return loaded;
            }
            lost += usize::from(loaded.is_err());
            last = loaded;
        }
        last
    }

    /// Takes in some of the nodes named, from the end, as long as there are plenty of fds; `false`
    /// when that is over. What cannot be found is left as it is.
    pub(crate) fn load_some(&self, ids: &mut Vec<u64>, most: usize) -> bool {
        for _ in 0..most {
            let Some(id) = ids.pop().filter(|_| self.fds.may_warm()) else { return false };
            let _ = self.load_known(id);
        }
        true
    }

    /// A node, and the cold directories above it. Moves of directories may have left parents that
    /// lead in a circle: then it ends where it began.
    fn cold_above(&self, id: u64) -> Vec<u64> {
        let mut seen = HashSet::from([id]);
        let above = |&id: &u64| {
            let parent = self.cold.recipe(id)?.parent;
            (self.cold.contains(parent) && seen.insert(parent)).then_some(parent)
        };
        std::iter::successors(Some(id), above).take(DEPTH_MAX).collect()
    }

    /// Others move names meanwhile: what moves is looked for again.
    fn load_one(&self, id: u64, recipe: &Recipe) -> Result<Arc<Node>, Errno> {
        for _ in 0..MOVED_TRIES_MAX {
            match self.try_load(id, recipe) {
                Err(ImportError::Moved) => {}
                other => return other.map_err(ImportError::errno),
            }
        }
        Err(Errno::STALE)
    }

    fn try_load(&self, id: u64, recipe: &Recipe) -> Result<Arc<Node>, ImportError> {
        let host = ImportError::Host;
        let parent = self.find_resident(recipe.parent);
        let parent = parent.and_then(|parent| Some((parent.inode().ok()?, parent)));
        let dir = parent.as_ref().map(|(inode, _)| self.backend.path_fd(*inode));
        let dir = dir.transpose().map_err(host)?;
        let file = self.root.resolve(recipe, dir.as_ref().map(AsFd::as_fd))?;
        self.take_in(id, recipe, &file, parent)
    }

    fn take_in(
        &self,
        id: u64,
        recipe: &Recipe,
        file: &import::Found,
        parent: Option<(u64, Arc<Node>)>,
    ) -> Result<Arc<Node>, ImportError> {
        // What was there a moment ago.
        let moved = |errno| match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::STALE => ImportError::Moved,
            other => ImportError::Host(other),
        };
        let (found, place) = match (file, &parent) {
            (import::Found::ByName(_), Some((inode, node))) => {
                let found = self.backend.lookup(*inode, &recipe.name).map_err(moved)?;
                (found, Place { parent: node.id, name: recipe.name.as_c_str().into() })
            }
            (import::Found::ByName(_), None) => return Err(ImportError::Stale),
            (import::Found::ByPath(_, path), _) => self.found_at(path, recipe).map_err(moved)?,
        };
        let wanted = Stat::of(file.fd()).map_err(ImportError::Host)?;
        if (found.stat.dev, found.stat.ino) == (wanted.dev, wanted.ino) {
            let mut shard = self.inode_shard(found.inode);
            let free = shard.get(found.inode).is_none();
            let warmed = free.then(|| self.warm(&mut shard, id, &found, 0, Some(place))).flatten();
            if let Some(node) = warmed {
                return Ok(node);
            }
        }
        // Another thread was faster, or another file has the name.
        self.backend.forget(found.inode, 1);
        self.find_resident(id).ok_or(ImportError::Moved)
    }

    fn found_at(&self, path: &[CString], recipe: &Recipe) -> Result<(Found, Place), Errno> {
        let (name, above) = path.split_last().ok_or(Errno::STALE)?;
        let dir = self.descend(above)?;
        let known = self.inode_shard(dir).get(dir).map(|node| node.id);
        let found = self.backend.lookup(dir, name);
        if dir != ROOT_INODE {
            self.backend.forget(dir, 1);
        }
        let place = Place { parent: known.unwrap_or(recipe.parent), name: name.as_c_str().into() };
        Ok((found?, place))
    }

    /// For a call that takes names away, replaces or moves them: (directory, name) each.
    ///
    /// # Errors
    /// What keeps the host from looking; then nothing may be changed.
    pub fn hold(&self, names: &[(&Node, &CStr)]) -> Result<HeldNames<'_>, Errno> {
        let frozen = self.hold_names();
        let names = if self.has_cold() { names } else { &[] };
        let nodes = names.iter().filter_map(|(dir, name)| self.held(dir, name).transpose());
        Ok(HeldNames { _nodes: nodes.collect::<Result<_, _>>()?, _frozen: frozen })
    }

    fn held(&self, dir: &Node, name: &CStr) -> Result<Option<Arc<Node>>, Errno> {
        // A name that is not there is the call's own business.
        let seen = self.with_dir(dir, |at| Stat::at(at, name))?;
        let is_cold = |stat: Stat| !self.cold.ids_of((stat.dev, stat.ino)).is_empty();
        if !seen.is_ok_and(is_cold) {
            return Ok(None);
        }
        let Ok(found) = self.backend.lookup(dir.inode()?, name) else { return Ok(None) };
        let twin = self.cold_twin(&found, dir, name);
        if let Ok(Some(id)) = twin {
            let mut shard = self.inode_shard(found.inode);
            let free = shard.get(found.inode).is_none();
            let warmed = free.then(|| self.warm(&mut shard, id, &found, 0, None)).flatten();
            if warmed.is_some() {
                return Ok(warmed);
            }
        }
        self.backend.forget(found.inode, 1);
        twin.map(|_| None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fds::Fds;
    use crate::fs::{Fs, FsOptions};

    #[test]
    fn what_has_no_fd_is_wanted_back_first_and_though_all_else_is_in_use() {
        const KNOWN: usize = 320;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let names: Vec<_> = (0..400).map(|i| format!("f{i:03}")).collect();
        names.iter().for_each(|name| std::fs::write(dir.path().join(name), "").expect("file"));
        let fds = Fds::of_process(None, 32);
        let options = FsOptions { fds, nodes_max: 400, ..FsOptions::default() };
        let fs = Fs::new(dir.path(), options).expect("a session");
        let nodes = &fs.nodes;
        let root = nodes.find(1).expect("root");
        let look = |name: &String| {
            let name = CString::new(name.as_str()).expect("no NUL");
            nodes.check_fds()?;
            let found = nodes.backend.lookup(1, &name)?;
            Ok::<_, Errno>(nodes.give(&found, &root, &name)?.node)
        };
        let ids: Vec<_> =
            names[..KNOWN].iter().map(|name| look(name).expect("lookup").id).collect();
        let wanted = nodes.wanted_back();
        assert_eq!(wanted.len(), nodes.count() / 4);
        assert!(wanted.iter().all(|id| nodes.cold.contains(*id)), "others have an fd");
        assert!(wanted.iter().all(|id| ids[..KNOWN / 2].contains(id)), "others are newer");
        // Those with an fd are in use from now on.
        let mut held: Vec<_> = ids.iter().filter_map(|&id| nodes.find_resident(id)).collect();
        let mut asked: HashSet<_> = wanted.into_iter().collect();
        for name in &names[KNOWN..] {
            held.extend(look(name));
            asked.extend(nodes.wanted_back());
        }
        assert!(asked.len() > KNOWN / 2, "{} are wanted back before there is no room", asked.len());
        assert!(!held.is_empty());
    }
}
