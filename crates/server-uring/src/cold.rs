//! Nodes that the guest knows and no fd of ours stands behind: what remains of them in memory.
//!
//! A few more bytes than a recipe each ([`Recipe::pack`]), found by node id, and by the file's
//! device and inode number, so that a LOOKUP that meets the file again gives the same id. Several
//! may have one number: of files that are gone, which the guest has open still, and of the file
//! that has the number now.
//! nodes.rs moves nodes in and out under its own locks; nothing here calls the kernel.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::import::Recipe;
use crate::limits::{COLD_BYTES_PER_SESSION_MAX, COLD_NODE_BYTES};

/// Device and inode number.
pub(crate) type FileKey = (u64, u64);

/// Nodes of one number that are looked at for one file: a guest may have made up any number.
const TWINS_MAX: usize = 16;

/// What cold nodes that guests tell of (restore.rs) take of the daemon's memory: they cost a guest
/// nothing but bytes, so they are bounded here. Those that were let go were looked up one by one.
#[derive(Debug)]
pub(crate) struct ColdMemory {
    used: AtomicUsize,
    /// What may be known of files that a guest tells of.
    most: usize,
}

/// What there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// Another node.
    Whole,
    /// The number of one, to which nothing leads.
    Lost,
    /// Nothing.
    Nothing,
}

impl ColdMemory {
    /// At most `most` bytes of what is told, and as much again until nothing more is taken.
    pub(crate) fn new(most: usize) -> Arc<ColdMemory> {
        Arc::new(ColdMemory { used: AtomicUsize::new(0), most })
    }
}

/// All of a session's.
pub(crate) struct Cold {
    memory: Arc<ColdMemory>,
    bytes: AtomicUsize,
    /// So that nobody takes the lock where there is nothing: nodes, and files that a name may lead
    /// to.
    count: AtomicUsize,
    files: AtomicUsize,
    maps: Mutex<Maps>,
}

#[derive(Default)]
struct Maps {
    by_id: HashMap<u64, Entry>,
    by_file: BTreeSet<(FileKey, u64)>,
}

struct Entry {
    given: u64,
    recipe: Box<[u8]>,
    /// Made here, of a file that was there; else it is a guest's word.
    ours: bool,
}

fn key_of(recipe: &Recipe) -> FileKey {
    let (major, minor) = recipe.mount.device;
    (rustix::fs::makedev(major, minor), recipe.ino)
}

impl Entry {
    /// Of the memory that is bounded.
    fn bytes(&self) -> usize {
        if self.ours { 0 } else { COLD_NODE_BYTES + self.recipe.len() }
    }
}

impl Drop for Cold {
    fn drop(&mut self) {
        self.memory.used.fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

impl Cold {
    pub(crate) fn new(memory: &Arc<ColdMemory>) -> Cold {
        Cold {
            memory: Arc::clone(memory),
            bytes: AtomicUsize::new(0),
            count: AtomicUsize::new(0),
            files: AtomicUsize::new(0),
            maps: Mutex::default(),
        }
    }

    /// For a node that a guest tells of.
    pub(crate) fn room(&self) -> Room {
        let ColdMemory { used, most } = &*self.memory;
        let used = used.load(Ordering::Relaxed);
        // All sessions, the new ones too: whoever has taken the rest has not taken theirs.
        let alive = Arc::strong_count(&self.memory);
        match self.bytes.load(Ordering::Relaxed) {
            modest if modest <= most / (2 * alive) => Room::Whole,
            _ if used >= most.saturating_mul(2) => Room::Nothing,
            mine if mine >= COLD_BYTES_PER_SESSION_MAX || used >= *most => Room::Lost,
            _ => Room::Whole,
        }
    }

    fn takes(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.memory.used.fetch_add(bytes, Ordering::Relaxed);
    }

    fn gives(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.memory.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Whether any file may be met by its name.
    pub(crate) fn has_files(&self) -> bool {
        self.files.load(Ordering::Acquire) > 0
    }

    /// All that a file is known of.
    pub(crate) fn findable(&self) -> Vec<u64> {
        self.lock().by_file.iter().map(|&(_, id)| id).collect()
    }

    pub(crate) fn contains(&self, id: u64) -> bool {
        self.count() > 0 && self.lock().by_id.contains_key(&id)
    }

    /// What rebuilds the node; `None` for one that is not here.
    pub(crate) fn recipe(&self, id: u64) -> Option<Recipe> {
        if self.count() == 0 {
            return None;
        }
        let maps = self.lock();
        Recipe::unpack(&maps.by_id.get(&id)?.recipe)
    }

    /// The same, of a node that was resident here.
    pub(crate) fn own_recipe(&self, id: u64) -> Option<Recipe> {
        let maps = self.lock();
        Recipe::unpack(&maps.by_id.get(&id).filter(|entry| entry.ours)?.recipe)
    }

    /// The nodes that may be a file's, the newest first; the rest when these are disowned.
    pub(crate) fn ids_of(&self, file: FileKey) -> Vec<u64> {
        if !self.has_files() {
            return Vec::new();
        }
        let maps = self.lock();
        let ids = maps.by_file.range((file, 0)..=(file, u64::MAX)).rev();
        ids.take(TWINS_MAX).map(|&(_, id)| id).collect()
    }

    /// The number belongs to another file now: the node is stale, and stays so.
    pub(crate) fn disown(&self, file: FileKey, id: u64) {
        let mut maps = self.lock();
        maps.by_file.remove(&(file, id));
        self.count_again(&maps);
    }

    /// A node that was resident.
    pub(crate) fn insert(&self, id: u64, given: u64, recipe: &Recipe) {
        self.put(id, Some(key_of(recipe)), Entry { given, recipe: recipe.pack(), ours: true });
    }

    /// A node that a guest tells of.
    pub(crate) fn insert_told(&self, id: u64, given: u64, recipe: &Recipe) {
        self.put(id, Some(key_of(recipe)), Entry { given, recipe: recipe.pack(), ours: false });
    }

    /// A node that nothing leads to: it is known, and stale.
    pub(crate) fn insert_lost(&self, id: u64, given: u64) {
        self.put(id, None, Entry { given, recipe: Box::default(), ours: false });
    }

    fn put(&self, id: u64, key: Option<FileKey>, entry: Entry) {
        let mut maps = self.lock();
        if let Some(key) = key {
            maps.by_file.insert((key, id));
        }
        self.takes(entry.bytes());
        if let Some(old) = maps.by_id.insert(id, entry) {
            self.gives(old.bytes());
        }
        self.count_again(&maps);
    }

    /// Takes a node out; how many lookups the guest has of it, and what rebuilds it.
    pub(crate) fn remove(&self, id: u64) -> Option<(u64, Option<Recipe>)> {
        self.take(&mut self.lock(), id)
    }

    /// The guest gives back lookups. `None`: unknown. Else how many it still has, and how many it
    /// gave back beyond what it had.
    pub(crate) fn forget(&self, id: u64, count: u64) -> Option<(u64, u64)> {
        if self.count() == 0 {
            return None;
        }
        let mut maps = self.lock();
        let entry = maps.by_id.get_mut(&id)?;
        let beyond = count.saturating_sub(entry.given);
        entry.given = entry.given.saturating_sub(count);
        let left = entry.given;
        if left == 0 {
            self.take(&mut maps, id);
        }
        Some((left, beyond))
    }

    fn take(&self, maps: &mut Maps, id: u64) -> Option<(u64, Option<Recipe>)> {
        let entry = maps.by_id.remove(&id)?;
        self.gives(entry.bytes());
        let recipe = Recipe::unpack(&entry.recipe);
        if let Some(recipe) = &recipe {
            maps.by_file.remove(&(key_of(recipe), id));
        }
        // A guest that walked through millions of files and forgot them has its memory back.
        if maps.by_id.len() * 4 < maps.by_id.capacity() {
            let room = maps.by_id.len() * 2;
            maps.by_id.shrink_to(room);
        }
        self.count_again(maps);
        Some((entry.given, recipe))
    }

    fn count_again(&self, maps: &Maps) {
        self.count.store(maps.by_id.len(), Ordering::Release);
        self.files.store(maps.by_file.len(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
