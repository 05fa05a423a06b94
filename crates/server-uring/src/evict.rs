//! Nodes without an fd: let go where fds run short, and taken in again on their next use.
//!
//! A node goes by its name: what is kept (import.rs) says which directory and name lead to it, and
//! how to tell that the same file is still there. So the guest may walk through more files than
//! the daemon may open. The kernel of the guest notices nothing.
//!
//! What is in use stays: an open file, a request in flight, a directory that is being read each
//! hold a reference. So does what no name leads to. Names that the guest is about to remove or
//! replace are taken in first ([`Nodes::hold_name`]), since an fd keeps what a name no longer can.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLockReadGuard};

use rustix::io::Errno;

use crate::import::{self, ImportError, Recipe};
use crate::nodes::{Node, Nodes, Place, SHARDS};
use crate::passthrough::{Found, ROOT_INODE};

/// Directories above a node that may be cold too: more than a path can have.
const DEPTH_MAX: usize = 4096;

/// Names that stay what they are until this is dropped, and the file that one of them leads to.
#[must_use = "names may be evicted by as soon as it is dropped"]
pub struct HeldNames<'a> {
    _frozen: RwLockReadGuard<'a, ()>,
    _nodes: Vec<Arc<Node>>,
}

impl Nodes {
    /// Closes the fds of up to `want` nodes that were not used for a while; how many it were.
    pub fn evict(&self, want: usize) -> usize {
        let Some(_frozen) = self.freeze_names() else { return 0 };
        let mut evicted = 0;
        // The first round finds what was not used since the last one, the second all the rest.
        for _ in 0..2 * SHARDS {
            let mut idle = self.idle_nodes(want - evicted);
            // Siblings together: their directory is opened once.
            idle.sort_by_cached_key(|node| node.place().parent);
            let mut directory = None;
            for node in idle {
                evicted += usize::from(self.evict_one(node, &mut directory).unwrap_or(false));
            }
            if evicted >= want {
                break;
            }
        }
        evicted
    }

    /// Nodes of the next shard that nobody uses or has used since they were looked at last.
    fn idle_nodes(&self, most: usize) -> Vec<Arc<Node>> {
        let hand = self.hand.fetch_add(1, Ordering::Relaxed) % SHARDS;
        let shard = self.id_shard(hand as u64).read().unwrap_or_else(PoisonError::into_inner);
        // Two references are the maps'.
        let free = shard.values().filter(|node| {
            Arc::strong_count(node) == 2 && node.is_evictable() && !node.take_used()
        });
        free.take(most).cloned().collect()
    }

    fn evict_one(
        &self,
        node: Arc<Node>,
        directory: &mut Option<(Arc<Node>, OwnedFd)>,
    ) -> Result<bool, Errno> {
        let inode = node.inode()?;
        let stat = self.backend.getattr(inode)?;
        if stat.nlink == 0 {
            return Ok(false);
        }
        let leads_here = |recipe: &Recipe| {
            let (major, minor) = recipe.mount.device;
            (rustix::fs::makedev(major, minor), recipe.ino) == (stat.dev, stat.ino)
        };
        let recipe = self.recipe_at(&node.place(), directory).ok().filter(leads_here);
        let recipe = match recipe {
            Some(recipe) => recipe,
            // Renamed since the guest looked it up; the kernel knows the name, by the fd.
            None => match self.recipe_at(&self.place_now(&node, inode)?, directory) {
                Ok(recipe) if leads_here(&recipe) => recipe,
                Ok(_) | Err(_) => return Ok(false),
            },
        };
        Ok(self.cool(node, inode, &recipe))
    }

    fn recipe_at(
        &self,
        place: &Place,
        directory: &mut Option<(Arc<Node>, OwnedFd)>,
    ) -> Result<Recipe, Errno> {
        if directory.as_ref().is_none_or(|(node, _)| node.id != place.parent) {
            let parent = self.find_resident(place.parent);
            let parent = parent.map_or_else(|| self.load(place.parent), Ok)?;
            let fd = self.backend.path_fd(parent.inode()?)?;
            *directory = Some((parent, fd));
        }
        let (_, fd) = directory.as_ref().ok_or(Errno::STALE)?;
        Recipe::brief(fd.as_fd(), &place.name, place.parent).map_err(ImportError::errno)
    }

    /// Where the host's kernel says that the file is.
    fn place_now(&self, node: &Node, inode: u64) -> Result<Place, Errno> {
        if !matches!(node.kind, libc::S_IFREG | libc::S_IFDIR) {
            return Err(Errno::STALE);
        }
        let fd = self.backend.path_fd(inode)?;
        let mut path = self.root.path_below(fd.as_fd()).map_err(ImportError::errno)?;
        let name = path.pop().ok_or(Errno::STALE)?;
        let parent = self.descend(&path)?;
        let known = self.inode_shard(parent).get(&parent).map(|node| node.id);
        if parent != ROOT_INODE {
            self.backend.forget(parent, 1);
        }
        Ok(Place { parent: known.ok_or(Errno::STALE)?, name: name.into_boxed_c_str() })
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

    /// Takes a cold node in again, and the directories above it before. Evicts nothing: that needs
    /// this.
    ///
    /// # Errors
    /// `ESTALE`: unknown, or the host has no such file any more.
    pub(crate) fn load(&self, id: u64) -> Result<Arc<Node>, Errno> {
        // Moves of directories may have left parents that lead in a circle: handles help then.
        let above = |&id: &u64| self.cold.recipe(id).map(|recipe| recipe.parent);
        let cold: Vec<u64> = std::iter::successors(Some(id), above).take(DEPTH_MAX).collect();
        for &id in cold.iter().rev() {
            if let Some(recipe) = self.cold.recipe(id) {
                // A directory that is gone: what is below it may have moved.
                let _ = self.load_one(id, &recipe);
            }
        }
        self.find_resident(id).ok_or(Errno::STALE)
    }

    fn load_one(&self, id: u64, recipe: &Recipe) -> Result<(), Errno> {
        let parent = self.find_resident(recipe.parent);
        let parent = parent.and_then(|parent| Some((parent.inode().ok()?, parent)));
        let dir = parent.as_ref().map(|(inode, _)| self.backend.path_fd(*inode)).transpose()?;
        let file = self.root.resolve(recipe, dir.as_ref().map(AsFd::as_fd));
        let file = file.map_err(ImportError::errno)?;
        let (found, place) = match (&file, &parent) {
            (import::Found::ByName(_), Some((inode, node))) => {
                let found = self.backend.lookup(*inode, &recipe.name)?;
                (found, Place { parent: node.id, name: recipe.name.as_c_str().into() })
            }
            (import::Found::ByName(_), None) => return Err(Errno::STALE),
            (import::Found::ByPath(_, path), _) => self.found_at(path, recipe)?,
        };
        let wanted = crate::passthrough::Stat::of(file.fd())?;
        if (found.stat.dev, found.stat.ino) == (wanted.dev, wanted.ino) {
            let mut shard = self.inode_shard(found.inode);
            let taken = shard.contains_key(&found.inode);
            if !taken && self.warm(&mut shard, id, &found, 0, place).is_some() {
                return Ok(());
            }
        }
        // Another thread was faster, or another file has the name.
        self.backend.forget(found.inode, 1);
        Err(Errno::STALE)
    }

    fn found_at(&self, path: &[CString], recipe: &Recipe) -> Result<(Found, Place), Errno> {
        let (name, above) = path.split_last().ok_or(Errno::STALE)?;
        let dir = self.descend(above)?;
        let known = self.inode_shard(dir).get(&dir).map(|node| node.id);
        let found = self.backend.lookup(dir, name);
        if dir != ROOT_INODE {
            self.backend.forget(dir, 1);
        }
        let place = Place { parent: known.unwrap_or(recipe.parent), name: name.as_c_str().into() };
        Ok((found?, place))
    }

    /// For a call that takes names away, replaces or moves them: (directory, name) each.
    pub fn hold(&self, names: &[(&Node, &CStr)]) -> HeldNames<'_> {
        let frozen = self.hold_names();
        let cold = self.cold.count() > 0;
        let held = names.iter().filter(|_| cold).filter_map(|(dir, name)| self.held(dir, name));
        let nodes = held.collect();
        HeldNames { _frozen: frozen, _nodes: nodes }
    }

    fn held(&self, dir: &Node, name: &CStr) -> Option<Arc<Node>> {
        let found = self.backend.lookup(dir.inode().ok()?, name).ok()?;
        let id = self.cold.id_of((found.stat.dev, found.stat.ino));
        let node = id.and_then(|id| self.load(id).ok());
        self.backend.forget(found.inode, 1);
        node
    }
}
