//! Nodes that the guest knows and no fd of ours stands behind: what remains of them in memory.
//!
//! Each is one short piece of bytes (`form.rs`, `slots.rs`) that two tables of numbers lead to: by
//! node id, and by the file's device and inode number, so that a LOOKUP that meets the file again
//! gives the same id. Several may have one number: of files that are gone, which the guest has open
//! still, and of the file that has the number now; a guest may make up any number of them.
//! nodes.rs moves nodes in and out under its own locks; nothing here calls the kernel.

mod form;
mod slots;
mod table;

use std::collections::BTreeSet;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::import::Recipe;
use crate::limits::{COLD_BYTES_PER_SESSION_MAX, COLD_NODE_BYTES};
use form::{Form, Mounts};
use slots::{At, Slots};
use table::Table;

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

struct Maps {
    slots: Slots<{ form::BYTES_MAX }>,
    mounts: Mounts,
    by_id: Table,
    /// One node of each file.
    by_file: Table,
    /// All others.
    twins: BTreeSet<(FileKey, u64)>,
    /// Which one [`Cold::some`] names next.
    hand: At,
    hasher: RandomState,
}

impl Default for Maps {
    fn default() -> Maps {
        Maps {
            slots: Slots::new(),
            mounts: Mounts::default(),
            by_id: Table::new(),
            by_file: Table::new(),
            twins: BTreeSet::new(),
            hand: At::default(),
            hasher: RandomState::new(),
        }
    }
}

/// Of the memory that is bounded.
fn told_bytes(node: Form<'_>) -> usize {
    if node.is_ours() { 0 } else { COLD_NODE_BYTES + node.len() }
}

impl Maps {
    fn node(&self, at: At) -> Form<'_> {
        Form::of(self.slots.get(at))
    }

    fn find(&self, id: u64) -> Option<At> {
        let hash = self.hasher.hash_one(id);
        self.by_id.find(hash, |at| self.node(at).id() == id)
    }

    fn find_file(&self, file: FileKey) -> Option<At> {
        let is_it = |at| self.node(at).file(&self.mounts) == Some(file);
        self.by_file.find(self.hasher.hash_one(file), is_it)
    }

    /// The nodes of a file, the newest first.
    fn ids_of(&self, file: FileKey) -> Vec<u64> {
        let Some(first) = self.find_file(file) else { return Vec::new() };
        let mut ids = vec![self.node(first).id()];
        if !self.twins.is_empty() {
            let twins = self.twins.range((file, 0)..=(file, u64::MAX)).rev();
            ids.extend(twins.take(TWINS_MAX).map(|&(_, id)| id));
            ids.sort_unstable_by_key(|&id| std::cmp::Reverse(id));
            ids.truncate(TWINS_MAX);
        }
        ids
    }

    fn insert(&mut self, id: u64, bytes: &[u8]) -> Option<At> {
        let at = self.slots.insert(bytes)?;
        let Maps { slots, mounts, by_id, by_file, twins, hasher, .. } = self;
        let of = |at| Form::of(slots.get(at));
        by_id.insert(hasher.hash_one(id), at, |at| hasher.hash_one(of(at).id()));
        if let Some(file) = of(at).file(mounts) {
            let hash = hasher.hash_one(file);
            if by_file.find(hash, |at| of(at).file(mounts) == Some(file)).is_some() {
                twins.insert((file, id));
            } else {
                let file_of = |at| of(at).file(mounts).unwrap_or_default();
                by_file.insert(hash, at, |at| hasher.hash_one(file_of(at)));
            }
        }
        Some(at)
    }

    /// From now on nobody finds the node by its file.
    fn disown(&mut self, file: FileKey, id: u64) {
        if self.twins.remove(&(file, id)) {
            return;
        }
        let next = self.twins.range((file, 0)..=(file, u64::MAX)).next_back().copied();
        let next = next.and_then(|twin| Some((twin, self.find(twin.1)?)));
        let Maps { slots, mounts, by_file, twins, hasher, .. } = self;
        let of = |at| Form::of(slots.get(at));
        let hash = hasher.hash_one(file);
        let is_it = |at| of(at).id() == id && of(at).file(mounts) == Some(file);
        let Some(found) = by_file.find(hash, is_it) else { return };
        match next {
            Some((twin, at)) => {
                by_file.replace(hash, found, at);
                twins.remove(&twin);
            }
            None => {
                let file_of = |at| of(at).file(mounts).unwrap_or_default();
                by_file.remove(hash, found, |at| hasher.hash_one(file_of(at)));
            }
        }
    }

    fn remove(&mut self, id: u64, at: At) {
        if let Some(file) = self.node(at).file(&self.mounts) {
            self.disown(file, id);
        }
        let Maps { slots, by_id, hasher, .. } = self;
        let id_of = |at| Form::of(slots.get(at)).id();
        by_id.remove(hasher.hash_one(id), at, |at| hasher.hash_one(id_of(at)));
        if let Some(from) = slots.remove(at) {
            self.moved(from, at);
        }
        if self.by_id.len() == 0 {
            self.mounts.clear();
        }
    }

    /// What was at `from` is at `to`.
    fn moved(&mut self, from: At, to: At) {
        let (id, file) = (self.node(to).id(), self.node(to).file(&self.mounts));
        let Maps { by_id, by_file, hasher, .. } = self;
        by_id.replace(hasher.hash_one(id), from, to);
        if let Some(file) = file {
            by_file.replace(hasher.hash_one(file), from, to);
        }
    }

    fn files(&self) -> usize {
        self.by_file.len() + self.twins.len()
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
        let maps = self.lock();
        let first = maps.by_file.iter().map(|at| maps.node(at).id());
        first.chain(maps.twins.iter().map(|&(_, id)| id)).collect()
    }

    /// Some nodes, of each length the oldest first; from where it ended the last time, or from the
    /// start where that was the end.
    pub(crate) fn some(&self, most: usize) -> Vec<u64> {
        let mut maps = self.lock();
        let from = maps.slots.places(maps.hand).next().unwrap_or_default();
        let (ids, next) = {
            let mut places = maps.slots.places(from);
            let ids = places.by_ref().take(most).map(|at| maps.node(at).id()).collect();
            (ids, places.next())
        };
        maps.hand = next.unwrap_or_default();
        ids
    }

    pub(crate) fn contains(&self, id: u64) -> bool {
        self.count() > 0 && self.lock().find(id).is_some()
    }

    /// What rebuilds the node; `None` for one that is not here.
    pub(crate) fn recipe(&self, id: u64) -> Option<Recipe> {
        if self.count() == 0 {
            return None;
        }
        let maps = self.lock();
        maps.node(maps.find(id)?).recipe(&maps.mounts)
    }

    /// The same, of a node that was resident here.
    pub(crate) fn own_recipe(&self, id: u64) -> Option<Recipe> {
        let maps = self.lock();
        let node = maps.node(maps.find(id)?);
        node.is_ours().then(|| node.recipe(&maps.mounts)).flatten()
    }

    /// The nodes that may be a file's, the newest first; the rest when these are disowned.
    pub(crate) fn ids_of(&self, file: FileKey) -> Vec<u64> {
        if self.has_files() { self.lock().ids_of(file) } else { Vec::new() }
    }

    /// The one of them that was resident here, is of this kind and has this handle (its type and
    /// bytes), which opens the file.
    pub(crate) fn id_by_handle(
        &self,
        file: FileKey,
        kind: u16,
        handle: (i32, &[u8]),
    ) -> Option<u64> {
        let maps = self.lock();
        let mut ids = maps.ids_of(file).into_iter();
        let is_it = |at| maps.node(at).has_own_handle(kind, handle);
        ids.find(|&id| maps.find(id).is_some_and(is_it))
    }

    /// The number belongs to another file now: the node is stale, and stays so.
    pub(crate) fn disown(&self, file: FileKey, id: u64) {
        let mut maps = self.lock();
        maps.disown(file, id);
        self.count_again(&maps);
    }

    /// A node that was resident. `false`: there is no room for it.
    pub(crate) fn insert(&self, id: u64, given: u64, noted: u64, recipe: &Recipe) -> bool {
        form::fits(recipe) && self.put(id, (given, noted), Some(recipe), true)
    }

    /// A node that a guest tells of. `false`: there is no room for it.
    pub(crate) fn insert_told(&self, id: u64, given: u64, recipe: &Recipe) -> bool {
        self.put(id, (given, 0), Some(recipe).filter(|recipe| form::fits(recipe)), false)
    }

    /// A node that nothing leads to: it is known, and stale. `false`: there is no room for it.
    pub(crate) fn insert_lost(&self, id: u64, given: u64) -> bool {
        self.put(id, (given, 0), None, false)
    }

    fn put(
        &self,
        id: u64,
        (given, noted): (u64, u64),
        recipe: Option<&Recipe>,
        ours: bool,
    ) -> bool {
        let mut maps = self.lock();
        if let Some(old) = maps.find(id) {
            self.take(&mut maps, id, old);
        }
        let bytes = form::write(id, given, noted, recipe, ours, &mut maps.mounts);
        let Some(at) = maps.insert(id, &bytes) else { return false };
        self.takes(told_bytes(maps.node(at)));
        self.count_again(&maps);
        true
    }

    /// Takes a node out; how many lookups the guest has of it, how it is noted, and what rebuilds
    /// it.
    pub(crate) fn remove(&self, id: u64) -> Option<(u64, u64, Option<Recipe>)> {
        let mut maps = self.lock();
        let at = maps.find(id)?;
        let node = maps.node(at);
        let taken = (node.given(), node.noted(), node.recipe(&maps.mounts));
        self.take(&mut maps, id, at);
        Some(taken)
    }

    /// The guest gives back lookups. `None`: unknown. Else how many it still has, and how many it
    /// gave back beyond what it had.
    pub(crate) fn forget(&self, id: u64, count: u64) -> Option<(u64, u64)> {
        if self.count() == 0 {
            return None;
        }
        let mut maps = self.lock();
        let at = maps.find(id)?;
        let given = maps.node(at).given();
        let left = given.saturating_sub(count);
        if left == 0 {
            self.take(&mut maps, id, at);
        } else {
            form::set_given(maps.slots.get_mut(at), left);
        }
        Some((left, count.saturating_sub(given)))
    }

    fn take(&self, maps: &mut Maps, id: u64, at: At) {
        self.gives(told_bytes(maps.node(at)));
        maps.remove(id, at);
        self.count_again(maps);
    }

    fn count_again(&self, maps: &Maps) {
        self.count.store(maps.by_id.len(), Ordering::Release);
        self.files.store(maps.files(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
