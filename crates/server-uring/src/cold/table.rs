//! A table of places by hash, in parts: one that is full moves all that it has, each by a look at
//! its piece, while its session waits, so that no part is more than a small piece of the whole.
//!
//! Invariant: a place stands in the part that its hash names; the caller knows what it is of.

use hashbrown::HashTable;

use super::slots::At;

/// Of a million nodes each moves 32,000 at once, in some milliseconds.
const PARTS: usize = 32;
/// Parts give no room back below so many places.
const ROOM_KEPT: usize = 4;

pub(super) struct Table {
    parts: [HashTable<At>; PARTS],
    count: usize,
}

/// By bits that the parts themselves leave alone: they take the lowest and the highest ones.
fn part_of(hash: u64) -> usize {
    (hash >> 32) as usize % PARTS
}

impl Table {
    pub(super) const fn new() -> Table {
        Table { parts: [const { HashTable::new() }; PARTS], count: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = At> {
        self.parts.iter().flatten().copied()
    }

    pub(super) fn find(&self, hash: u64, is_it: impl Fn(At) -> bool) -> Option<At> {
        self.parts[part_of(hash)].find(hash, |&at| is_it(at)).copied()
    }

    pub(super) fn insert(&mut self, hash: u64, at: At, hash_of: impl Fn(At) -> u64) {
        self.count += 1;
        self.parts[part_of(hash)].insert_unique(hash, at, |&at| hash_of(at));
    }

    /// What was at `from` is at `to`; `false` where it does not stand here.
    pub(super) fn replace(&mut self, hash: u64, from: At, to: At) -> bool {
        let found = self.parts[part_of(hash)].find_mut(hash, |&at| at == from);
        found.map(|at| *at = to).is_some()
    }

    /// A guest that walked through millions of files and forgot them has its memory back.
    pub(super) fn remove(&mut self, hash: u64, at: At, hash_of: impl Fn(At) -> u64) {
        let part = &mut self.parts[part_of(hash)];
        if let Ok(found) = part.find_entry(hash, |&other| other == at) {
            found.remove();
            self.count -= 1;
        }
        if part.is_empty() || (part.capacity() > ROOM_KEPT && part.len() * 4 < part.capacity()) {
            part.shrink_to(part.len() * 2, |&at| hash_of(at));
        }
    }

    #[cfg(test)]
    pub(super) fn allocated(&self) -> usize {
        self.parts.iter().map(HashTable::allocation_size).sum()
    }

    /// Places of the fullest part.
    #[cfg(test)]
    pub(super) fn fullest(&self) -> usize {
        self.parts.iter().map(HashTable::len).max().unwrap_or_default()
    }
}
