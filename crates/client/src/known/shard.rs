//! One shard of what is known: its nodes and open files, and its log.
//!
//! Invariant: a node that does not count is in one of two queues: `early` has those whose recipe
//! has come before the reply, `late` those that were given back, as a reply that gives one again
//! may have been overtaken by that to its FORGET. It goes when no such reply can come any more, or
//! when there are too many. The kernel gives back all that it has at once, but asks for few at a
//! time.

use super::asked::Given;
use crate::journal::{Entry as Change, Log};
use ringfs_wire::limits::LANES_MAX;
use ringfs_wire::restore::NUMBER_MAX;
use rustix::fs::OFlags;
use std::collections::hash_map::{Entry, RandomState};
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Nodes of one shard: 4 million in all. What comes beyond is lost with the daemon, and only then.
pub(super) const NODES_PER_SHARD_MAX: usize = 1 << 16;
/// Open files of one shard: a million in all.
pub(super) const HANDLES_PER_SHARD_MAX: usize = 1 << 14;
/// Recipes of one shard whose reply is yet to come.
pub(super) const EARLY_PER_SHARD_MAX: usize = 256;
/// Nodes of one shard that were given back: a million in all.
pub(super) const LATE_PER_SHARD_MAX: usize = 1 << 14;
/// A recipe whose node does not count is of no use so many turns later: by the second one all
/// requests are over that were in flight; another one for those that came while a request was
/// that nobody waits for any more, and were given the node because of it.
pub(super) const EARLY_TURNS: u64 = 3;
/// A table with room for so many stays as large as it is.
pub(super) const SMALL_TABLE: usize = 1024;

#[derive(Debug)]
pub(super) struct Node {
    /// Lookups; 0: a reply that gives it may be yet to come.
    pub(super) count: u64,
    /// How many had been given back with it; 0: it was not, or has come again.
    pub(super) late: u32,
    /// The kernel may have pages of it: an OPEN was answered, its length changes, it is no regular
    /// file, or nobody knows, as of all that a log tells.
    pub(super) opened: bool,
    pub(super) recipe: Box<[u8]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Handle {
    pub(super) node: u64,
    pub(super) flags: u32,
    pub(super) directory: bool,
    /// The last append by it was answered with an error, and may have been done.
    pub(super) doubted: bool,
}

/// What the last reply of a lane has changed in a shard: should it not have reached the kernel.
#[derive(Debug, Default)]
pub(super) struct Recent {
    tag: u64,
    given: Vec<u64>,
    opened: Vec<u64>,
    /// Which of a FORGET's node ids are done.
    pub(super) forgotten: Vec<u32>,
}

impl Recent {
    /// Becomes that of another reply, if it is one.
    fn renew(&mut self, tag: u64) {
        if self.tag != tag {
            self.tag = tag;
            self.given.clear();
            self.opened.clear();
            self.forgotten.clear();
        }
    }
}

/// The reply of each lane that the kernel may not have yet; 0: none. A lane takes one after the
/// other, so whatever came before it is there.
#[derive(Debug, Default)]
pub(super) struct Undecided([OnLine; LANES_MAX]);

/// Each lane writes its own: they share no cache line.
#[derive(Debug, Default)]
#[repr(align(64))]
struct OnLine(AtomicU64);

impl Undecided {
    pub(super) fn set(&self, tag: u64) {
        if tag != 0 {
            self.0[lane_of(tag)].0.store(tag, Ordering::Release);
        }
    }

    pub(super) fn clear(&self, lane: u8) {
        self.0[usize::from(lane) % LANES_MAX].0.store(0, Ordering::Release);
    }
}

/// What a shard needs for the client that takes over.
#[derive(Debug)]
pub(super) struct Journal {
    log: Log,
    pub(super) recent: [Recent; LANES_MAX],
    undecided: Arc<Undecided>,
}

fn lane_of(tag: u64) -> usize {
    (tag >> 48) as usize % LANES_MAX
}

fn recent_of(recent: &mut [Recent; LANES_MAX], tag: u64) -> &mut Recent {
    let recent = &mut recent[lane_of(tag)];
    recent.renew(tag);
    recent
}

#[derive(Debug)]
pub(super) struct Shard {
    /// `None`: nobody takes over.
    pub(super) journal: Option<Box<Journal>>,
    pub(super) nodes: HashMap<u64, Node, Keyed>,
    pub(super) handles: HashMap<u64, Handle, Keyed>,
    /// Nodes whose recipe came before they counted, the oldest first, and in which turn; some of
    /// them count by now.
    pub(super) early: VecDeque<(u64, u64)>,
    /// Nodes that were given back, likewise, and as which one.
    pub(super) late: VecDeque<(u64, u64, u32)>,
    given_back: u32,
    /// There was no room for some node that counts.
    has_lost: bool,
    /// As the one who holds the lock has seen it.
    pub(super) turn: u64,
    pub(super) node_id_max: u64,
    pub(super) fh_max: u64,
}

impl Shard {
    pub(super) fn new(key: Keyed) -> Shard {
        Shard {
            journal: None,
            nodes: HashMap::with_hasher(key),
            handles: HashMap::with_hasher(key),
            early: VecDeque::new(),
            late: VecDeque::new(),
            given_back: 0,
            has_lost: false,
            turn: 0,
            node_id_max: 0,
            fh_max: 0,
        }
    }

    /// Has all changes put down from now on.
    pub(super) fn keeping(mut self, log: Log, undecided: &Arc<Undecided>) -> Shard {
        let (recent, undecided) = (Default::default(), Arc::clone(undecided));
        self.journal = Some(Box::new(Journal { log, recent, undecided }));
        self
    }

    /// Puts a change down, before it is made. What cannot be put down is not kept from then on,
    /// and nothing else of the shard.
    fn log(&mut self, change: &Change<'_>) {
        let Some(journal) = &mut self.journal else { return };
        if journal.log.append(change) {
            return;
        }
        let Some(mut journal) = self.journal.take() else { return };
        if self.rewrite(&mut journal) && journal.log.append(change) {
            self.journal = Some(journal);
        } else {
            journal.log.spoil();
            tracing::error!("too much to keep: nobody can take this mount over any more");
        }
    }

    /// The log anew: what is, and what of it may not have reached the kernel.
    fn rewrite(&self, journal: &mut Journal) -> bool {
        let Journal { log, recent, undecided } = journal;
        for (recent, newest) in recent.iter_mut().zip(&undecided.0) {
            // What the kernel has had it may have given back by another lane.
            recent.renew(newest.0.load(Ordering::Acquire));
        }
        let undecided = |id: u64| -> u64 {
            let given = |recent: &Recent| recent.given.iter().filter(|&&its| its == id).count();
            recent.iter().map(|recent| given(recent) as u64).sum()
        };
        let has_recent = recent.iter().any(|recent| !recent.given.is_empty());
        let nodes = self.nodes.iter().filter(|(_, node)| node.count > 0).map(|(&id, node)| {
            let undecided = if has_recent { undecided(id) } else { 0 };
            Change::Node { id, count: node.count.saturating_sub(undecided), recipe: &node.recipe }
        });
        let early = self.early().into_iter().filter_map(|id| {
            let recipe = &self.nodes.get(&id)?.recipe;
            Some(Change::Heard { id, recipe })
        });
        let opened_by = |fh: u64| recent.iter().find(|recent| recent.opened.contains(&fh));
        let handles = self.handles.iter().map(|(&fh, handle)| {
            let Handle { node, flags, directory, doubted } = *handle;
            let tag = opened_by(fh).map_or(0, |recent| recent.tag);
            Change::Opened { fh, node, flags, directory, doubted, tag }
        });
        let recent = recent.iter().flat_map(|recent| {
            let tag = recent.tag;
            let given = recent.given.iter().map(move |&id| Change::Given { id, tag });
            // They have been taken off.
            let forgotten = recent.forgotten.iter();
            let forgotten =
                forgotten.map(move |&index| Change::Forgotten { id: 0, lookups: 0, index, tag });
            given.chain(forgotten)
        });
        let highest = Change::Highest { node_id: self.node_id_max, fh: self.fh_max };
        let all = std::iter::once(highest).chain(nodes).chain(early).chain(handles).chain(recent);
        log.rewrite(all)
    }

    /// Does again all that the log says; false: it is damaged. Some of it is of a reply that may
    /// not have reached the kernel.
    pub(super) fn replay(&mut self, may_be_owed: impl Fn(u64) -> bool) -> bool {
        let Some(mut journal) = self.journal.take() else { return true };
        for change in journal.log.entries() {
            let Some(change) = change else { return false };
            self.redo(&change, &mut journal.recent);
        }
        for recent in &mut journal.recent {
            match may_be_owed(recent.tag) {
                true => journal.undecided.set(recent.tag),
                false => recent.renew(0),
            }
        }
        self.journal = Some(journal);
        true
    }

    fn redo(&mut self, change: &Change<'_>, recent: &mut [Recent; LANES_MAX]) {
        match *change {
            // Whichever queue it was in.
            Change::Heard { id, recipe } => {
                if self.put_recipe(id, recipe) {
                    self.keep_late(id);
                }
            }
            Change::Node { id, count, recipe } => {
                self.nodes.insert(id, Node { count, late: 0, opened: true, recipe: recipe.into() });
            }
            Change::Given { id, tag } => {
                recent_of(recent, tag).given.push(id);
                self.count_up(id);
            }
            Change::Opened { fh, node, flags, directory, doubted, tag } => {
                if tag != 0 {
                    recent_of(recent, tag).opened.push(fh);
                }
                self.put_handle(fh, Handle { node, flags, directory, doubted });
            }
            Change::Closed { fh } => {
                self.handles.remove(&fh);
            }
            Change::Forgotten { id, lookups, index, tag } => {
                recent_of(recent, tag).forgotten.push(index);
                self.count_down(id, lookups);
            }
            Change::Undone { tag } => {
                let recent = &mut recent[lane_of(tag)];
                if recent.tag == tag {
                    let undone = std::mem::take(recent);
                    self.take_back(&undone);
                }
            }
            Change::Highest { node_id, fh } => {
                self.node_id_max = self.node_id_max.max(node_id);
                self.fh_max = self.fh_max.max(fh);
            }
        }
    }

    /// Where what a reply changes is put down.
    fn recent(&mut self, tag: u64) -> Option<&mut Recent> {
        self.journal.as_mut().map(|journal| recent_of(&mut journal.recent, tag))
    }

    /// What that reply has changed, if it was the lane's last one.
    pub(super) fn changed_by(&mut self, tag: u64) -> Option<&mut Recent> {
        let recent = &mut self.journal.as_mut()?.recent[lane_of(tag)];
        (recent.tag == tag).then_some(recent)
    }

    pub(super) fn undo(&mut self, tag: u64) {
        let Some(recent) = self.changed_by(tag) else { return };
        if recent.given.is_empty() && recent.opened.is_empty() {
            return;
        }
        self.log(&Change::Undone { tag });
        if let Some(undone) = self.changed_by(tag).map(std::mem::take) {
            self.take_back(&undone);
        }
    }

    fn take_back(&mut self, undone: &Recent) {
        for id in &undone.given {
            if let Some(node) = self.nodes.get_mut(id).filter(|node| node.count > 0) {
                node.count -= 1;
                if node.count == 0 {
                    self.keep_early(*id);
                }
            }
        }
        for fh in &undone.opened {
            self.handles.remove(fh);
        }
    }

    pub(super) fn open(&mut self, fh: u64, handle: Handle, tag: u64) {
        let Handle { node, flags, directory, doubted } = handle;
        self.log(&Change::Opened { fh, node, flags, directory, doubted, tag });
        if let Some(recent) = self.recent(tag) {
            recent.opened.push(fh);
        }
        self.put_handle(fh, handle);
    }

    /// The kernel may have pages of it from now on.
    pub(super) fn mark_opened(&mut self, id: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.opened = true;
        }
    }

    fn put_handle(&mut self, fh: u64, handle: Handle) {
        self.fh_max = self.fh_max.max(fh);
        if self.handles.len() < HANDLES_PER_SHARD_MAX || self.handles.contains_key(&fh) {
            self.handles.insert(fh, handle);
        }
    }

    /// What it was.
    pub(super) fn close(&mut self, fh: u64) -> Option<Handle> {
        let known = self.handles.get(&fh).copied()?;
        self.log(&Change::Closed { fh });
        self.handles.remove(&fh);
        Some(known)
    }

    /// Whether the handle is one to append by, and was not `doubted` so far.
    pub(super) fn doubt(&mut self, fh: u64, doubted: bool) -> bool {
        let appends = |its: &Handle| OFlags::from_bits_retain(its.flags).contains(OFlags::APPEND);
        let known = self.handles.get(&fh).copied().filter(appends);
        let Some(known) = known.filter(|its| its.doubted != doubted) else { return false };
        let Handle { node, flags, directory, .. } = known;
        self.log(&Change::Opened { fh, node, flags, directory, doubted, tag: 0 });
        self.put_handle(fh, Handle { doubted, ..known });
        true
    }

    pub(super) fn hear(&mut self, id: u64, recipe: &[u8]) {
        if self.nodes.get(&id).is_some_and(|node| *node.recipe == *recipe) {
            return;
        }
        self.log(&Change::Heard { id, recipe });
        if self.put_recipe(id, recipe) {
            self.keep_early(id);
        }
    }

    /// Whether the node is there and does not count.
    fn put_recipe(&mut self, id: u64, recipe: &[u8]) -> bool {
        self.node_id_max = self.node_id_max.max(id);
        let is_full = self.is_full();
        match self.nodes.entry(id) {
            Entry::Occupied(mut known) => {
                let node = known.get_mut();
                node.recipe = recipe.into();
                node.count == 0
            }
            Entry::Vacant(_) if is_full => false,
            Entry::Vacant(room) => {
                room.insert(Node { count: 0, late: 0, opened: true, recipe: recipe.into() });
                true
            }
        }
    }

    /// Nodes that do not count.
    pub(super) fn early(&self) -> HashSet<u64> {
        let counts = |id: &u64| self.nodes.get(id).is_none_or(|node| node.count > 0);
        let early = self.early.iter().map(|(id, _)| *id);
        let all = early.chain(self.late.iter().map(|(id, ..)| *id));
        all.filter(|id| !counts(id)).collect()
    }

    /// Keeps a node whose reply is yet to come.
    fn keep_early(&mut self, id: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.late = 0;
        }
        self.early.push_back((id, self.turn));
        self.sweep();
    }

    /// Keeps a node that was given back.
    fn keep_late(&mut self, id: u64) {
        self.given_back = self.given_back.checked_add(1).unwrap_or(1);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.late = self.given_back;
        }
        self.late.push_back((id, self.turn, self.given_back));
        self.sweep();
    }

    /// Drops what no reply can give any more, and what is too much.
    pub(super) fn sweep(&mut self) {
        while let Some(&(oldest, turn)) = self.early.front()
            && (self.turn >= turn + EARLY_TURNS || self.early.len() > EARLY_PER_SHARD_MAX)
        {
            self.early.pop_front();
            if self.nodes.get(&oldest).is_some_and(|node| node.count == 0 && node.late == 0)
                && !self.early.iter().any(|(id, _)| *id == oldest)
            {
                self.drop_node(oldest);
            }
        }
        while let Some(&(_, turn, _)) = self.late.front()
            && (self.turn >= turn + EARLY_TURNS || self.late.len() > LATE_PER_SHARD_MAX)
        {
            self.drop_oldest_late();
        }
        let (len, room) = (self.late.len(), self.late.capacity());
        if room > SMALL_TABLE && len < room / 8 {
            self.late.shrink_to(len * 2);
        }
    }

    /// Whether there was one in the queue.
    fn drop_oldest_late(&mut self) -> bool {
        let Some((oldest, _, which)) = self.late.pop_front() else { return false };
        let goes = |node: &Node| node.count == 0 && node.late == which;
        if self.nodes.get(&oldest).is_some_and(goes) {
            self.drop_node(oldest);
        }
        true
    }

    /// Whether there is no room for another node, also in the place of one that was given back.
    fn is_full(&mut self) -> bool {
        while self.nodes.len() >= NODES_PER_SHARD_MAX {
            if !self.drop_oldest_late() {
                return true;
            }
        }
        false
    }

    fn drop_node(&mut self, id: u64) {
        self.nodes.remove(&id);
        let (len, room) = (self.nodes.len(), self.nodes.capacity());
        if room > SMALL_TABLE && len < room / 8 {
            self.nodes.shrink_to(len * 2);
        }
    }

    pub(super) fn give(&mut self, Given { id, is_file }: Given, tag: u64) {
        self.log(&Change::Given { id, tag });
        if let Some(recent) = self.recent(tag) {
            recent.given.push(id);
        }
        self.count_up(id);
        // The kernel had it not so far, unless it is of those that found no room.
        if let Some(node) = self.nodes.get_mut(&id).filter(|node| node.count == 1) {
            node.opened = !is_file || self.has_lost;
        }
    }

    fn count_up(&mut self, id: u64) {
        self.node_id_max = self.node_id_max.max(id);
        let is_full = self.is_full();
        match self.nodes.entry(id) {
            Entry::Occupied(mut known) => {
                let node = known.get_mut();
                (node.count, node.late) = ((node.count + 1).min(NUMBER_MAX), 0);
            }
            Entry::Vacant(room) if !is_full => {
                room.insert(Node { count: 1, late: 0, opened: true, recipe: Box::default() });
            }
            Entry::Vacant(_) => self.has_lost = true,
        }
    }

    pub(super) fn forget(&mut self, id: u64, lookups: u64, index: u32, tag: u64) {
        if self.nodes.contains_key(&id) {
            self.log(&Change::Forgotten { id, lookups, index, tag });
            if let Some(recent) = self.recent(tag) {
                recent.forgotten.push(index);
            }
            self.count_down(id, lookups);
        }
    }

    fn count_down(&mut self, id: u64, lookups: u64) {
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.count > 0) else { return };
        node.count = node.count.saturating_sub(lookups);
        match node.count {
            // A reply that gives it again may have been made before the FORGET was taken, and is
            // still on its way; the daemon has not sent the recipe with it, which we had.
            0 if !node.recipe.is_empty() => self.keep_late(id),
            0 => self.drop_node(id),
            _ => {}
        }
    }
}

/// Hashes numbers that a daemon chose, by a key that it does not know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keyed {
    pub(super) start: u64,
    pub(super) factor: u64,
}

impl Keyed {
    pub(super) fn new() -> Keyed {
        let random = RandomState::new();
        Keyed { start: random.hash_one(1), factor: random.hash_one(2) | 1 }
    }
}

impl BuildHasher for Keyed {
    type Hasher = Mixer;

    fn build_hasher(&self) -> Mixer {
        Mixer(*self)
    }
}

/// A folded multiplication a word, and one at the end: numbers that follow each other, as a daemon
/// gives them, are not spread by the first one alone where the factor is an unlucky one.
#[derive(Debug)]
pub(super) struct Mixer(Keyed);

/// 2^64 by the golden ratio: its multiples lie as far apart as any can.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

fn fold(number: u64, factor: u64) -> u64 {
    let product = u128::from(number) * u128::from(factor);
    product as u64 ^ (product >> 64) as u64
}

impl Hasher for Mixer {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(byte.into()));
    }

    fn write_u64(&mut self, number: u64) {
        self.0.start = fold(self.0.start ^ number, self.0.factor);
    }

    fn finish(&self) -> u64 {
        fold(self.0.start, GOLDEN)
    }
}
