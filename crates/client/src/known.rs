//! The nodes and open files that the guest's kernel has of a session: what a daemon that does not
//! know the session is told of it (rebuild.rs, docs/sessions.md).
//!
//! A reply counts before the kernel gets it; a FORGET or a RELEASE when the daemon has answered
//! it. So at a cut this is what the daemon has to start from for all that is in flight to come
//! out right. Invariant: a node counts exactly while lookups of it were given and not given back,
//! and what the kernel would refuse gives nothing. Recipes alone are here besides, and few: those
//! whose reply is yet to come, and those of nodes that were just given back, as a reply that gives
//! one again may have been overtaken by that to its FORGET. All of it is bounded. It must not do
//! I/O. Where the client is to be taken over (takeover.rs), each change is in a log first, with the
//! request that made it.

use crate::journal::Log;
use crate::lane::lock;
pub use asked::Asked;
use asked::{ANY, ENTRY, Given, LISTING, OPEN, RELEASE, entry_of, is_in, listed, open_of};
use ringfs_wire::abi::{EntryOut, FUSE_ROOT_ID, ForgetOne, Opcode, OpenOut};
use ringfs_wire::limits::{RECIPE_BYTES_MAX, RESTORE_BODY_BYTES_MAX};
use ringfs_wire::restore::{End, NUMBER_MAX, Nodes, Restore, RestoreError, push_restore};
use ringfs_wire::slot::SlotUse;
use shard::{Handle, Keyed, Node, Shard, Undecided};
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use zerocopy::FromBytes;

mod asked;
mod shard;
#[cfg(test)]
mod tests;

/// Locks: a node may be found by one lane and forgotten by another.
pub const SHARDS: usize = 64;
/// An entry of a RESTORE: its head, and the longest recipe.
const ENTRY_BYTES_MAX: usize = 24 + RECIPE_BYTES_MAX;

/// Names the use of a slot whose reply changes something; never 0.
pub fn tag_of(lane: u8, at: SlotUse) -> u64 {
    1 << 63 | u64::from(lane) << 48 | u64::from(at.slot) << 32 | u64::from(at.seq)
}

/// A shard on cache lines of its own.
#[derive(Debug)]
#[repr(align(64))]
struct Apart(Mutex<Shard>);

/// Nodes and open files.
#[derive(Debug)]
pub struct Known {
    /// Empty: nobody wants to know.
    shards: Vec<Apart>,
    key: Keyed,
    turn: AtomicU64,
    /// Open files that are doubted.
    doubts: AtomicUsize,
    undecided: Arc<Undecided>,
}

/// How much was told to a daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Nodes.
    pub nodes: u64,
    /// Those of them that nothing finds again.
    pub nodes_lost: u64,
    /// Open files and directories.
    pub handles: u64,
    /// On the wire, with all headers.
    pub bytes: u64,
    /// From the connect of the connection that tells it to the last byte sent, in microseconds.
    pub took_us: u64,
}

impl Known {
    /// Nothing yet; with `is_on` false nothing ever.
    pub fn new(is_on: bool) -> Known {
        let key = Keyed::new();
        let shards = (0..if is_on { SHARDS } else { 0 }).map(|_| Shard::new(key));
        Known::of(shards.collect(), key, Arc::default())
    }

    fn of(shards: Vec<Shard>, key: Keyed, undecided: Arc<Undecided>) -> Known {
        let doubted = |shard: &Shard| shard.handles.values().filter(|its| its.doubted).count();
        let doubts = AtomicUsize::new(shards.iter().map(doubted).sum());
        let shards = shards.into_iter().map(|shard| Apart(Mutex::new(shard))).collect();
        Known { shards, key, turn: AtomicU64::new(0), doubts, undecided }
    }

    /// Nothing yet, and changes go into these logs; and the key that finds them again.
    pub fn kept(logs: Vec<Log>) -> (Known, [u64; 2]) {
        let (key, undecided) = (Keyed::new(), Arc::default());
        let shards = logs.into_iter().map(|log| Shard::new(key).keeping(log, &undecided));
        (Known::of(shards.collect(), key, Arc::clone(&undecided)), [key.start, key.factor])
    }

    /// What the logs of another client tell; `None`: they are damaged. The kernel may not have the
    /// replies to requests of these tags, one a lane at most.
    pub fn replayed(
        logs: Vec<Log>,
        key: [u64; 2],
        may_be_owed: impl Fn(u64) -> bool,
    ) -> Option<Known> {
        let key = Keyed { start: key[0], factor: key[1] };
        let undecided = Arc::default();
        let shards = logs.into_iter().map(|log| {
            let mut shard = Shard::new(key).keeping(log, &undecided);
            shard.replay(&may_be_owed).then_some(shard)
        });
        let shards = shards.collect::<Option<Vec<_>>>()?;
        Some(Known::of(shards, key, Arc::clone(&undecided)))
    }

    /// The last reply of that lane has reached the kernel, or what it gave is undone.
    pub fn settled(&self, lane: u8) {
        self.undecided.clear(lane);
    }

    /// A turn begins: to be called when all is over that was in flight when the one before began.
    pub fn next_turn(&self) {
        self.turn.fetch_add(1, Ordering::AcqRel);
    }

    /// Drops what was kept for turns that are over, where nothing comes that would.
    pub fn sweep(&self) {
        for shard in &self.shards {
            let mut shard = lock(&shard.0);
            shard.turn = self.turn.load(Ordering::Acquire);
            shard.sweep();
        }
    }

    /// Nobody will take over.
    pub fn stop_keeping(&self) {
        self.shards.iter().for_each(|shard| lock(&shard.0).journal = None);
    }

    /// The reply of that request has not reached the kernel: what it gave was not given.
    pub fn undo(&self, tag: u64) {
        self.shards.iter().for_each(|shard| lock(&shard.0).undo(tag));
    }

    /// Whether the reply to that FORGET is known to have come; then all of it is done now.
    pub fn end_forget(&self, tag: u64, forgets: &[ForgetOne]) -> bool {
        let has_come = |shard: &Apart| {
            let mut shard = lock(&shard.0);
            shard.changed_by(tag).is_some_and(|changed| !changed.forgotten.is_empty())
        };
        let has_come = self.shards.iter().any(has_come);
        if has_come {
            for (index, &ForgetOne { nodeid, nlookup }) in forgets.iter().enumerate() {
                let mut shard = self.shard(nodeid);
                let index = index as u32;
                if !shard.changed_by(tag).is_some_and(|its| its.forgotten.contains(&index)) {
                    shard.forget(nodeid, nlookup, index, tag);
                }
            }
        }
        has_come
    }

    /// The body of a NODE record.
    pub fn hear(&self, body: &[u8]) -> Result<(), RestoreError> {
        if self.shards.is_empty() {
            return Ok(());
        }
        for node in Nodes::new(body) {
            let node = node?;
            self.shard(node.id).hear(node.id, node.recipe);
        }
        Ok(())
    }

    /// The daemon has answered a request, and the kernel will have the answer: to be called before.
    pub fn answered(
        &self,
        tag: u64,
        opcode: u32,
        asked: impl FnOnce() -> Option<Asked>,
        errno: u32,
        body: &[u8],
    ) {
        if !is_in(ANY, opcode) || self.shards.is_empty() {
            return;
        }
        self.undecided.set(tag);
        if is_in(RELEASE, opcode) {
            // Whatever came of it: the kernel has forgotten the handle.
            if let Some(fh) = asked().map(|asked| asked.fh()) {
                let closed = self.shard(fh).close(fh);
                if closed.is_some_and(|its| its.doubted) {
                    self.doubts.fetch_sub(1, Ordering::AcqRel);
                }
            }
            return;
        }
        if errno != 0 {
            return;
        }
        if is_in(LISTING, opcode) {
            if asked().is_some_and(|asked| body.len() <= asked.size()) {
                listed(body, |entry| self.give(tag, entry));
            }
            return;
        }
        let (entry, open) = match (is_in(ENTRY, opcode), is_in(OPEN, opcode)) {
            (true, _) => (entry_of(body, 0), None),
            (_, true) => (None, open_of(body)),
            (false, false) => {
                let (head, tail) = body.split_at(body.len().min(size_of::<EntryOut>()));
                (entry_of(head, tail.len().abs_diff(size_of::<OpenOut>())), open_of(tail))
            }
        };
        if let Some(entry) = entry {
            self.give(tag, entry);
        }
        if let (Some(fh), Some(asked)) = (open, asked()) {
            let made = entry.map(|entry| entry.id);
            let node = if is_in(OPEN, opcode) { Some(asked.nodeid) } else { made };
            let directory = opcode == Opcode::Opendir as u32;
            if let Some(node) = node {
                self.shard(node).mark_opened(node);
                self.open(
                    tag,
                    fh,
                    Handle { node, flags: asked.flags(), directory, doubted: false },
                );
            }
        }
    }

    /// A WRITE is about to be answered with an error although it may have been done. The kernel
    /// makes several of one write(2), and tells a short count and no error where an earlier one was
    /// done: who then appends the rest could have it there twice. So the next one fails too.
    pub fn doubt_write(&self, asked: &Asked) {
        if self.shards.is_empty() || asked.is_of_cache() {
            return;
        }
        if self.shard(asked.fh()).doubt(asked.fh(), true) {
            self.doubts.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Whether a WRITE is the first one by such a file, and is to fail.
    pub fn is_doubted(&self, asked: impl FnOnce() -> Asked) -> Option<Asked> {
        if self.doubts.load(Ordering::Acquire) == 0 {
            return None;
        }
        let asked = asked();
        let is_doubted = |fh| self.shard(fh).handles.get(&fh).is_some_and(|its| its.doubted);
        (!asked.is_of_cache() && is_doubted(asked.fh())).then_some(asked)
    }

    /// The kernel has the error: the next one need not fail.
    pub fn doubt_is_told(&self, asked: &Asked) {
        if self.shard(asked.fh()).doubt(asked.fh(), false) {
            self.doubts.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// A SETATTR has come: whatever becomes of it, what a file held before is not to be stored any
    /// more where its length changes.
    pub fn is_changed(&self, asked: &Asked) {
        if asked.sets_size() && !self.shards.is_empty() {
            self.shard(asked.nodeid).mark_opened(asked.nodeid);
        }
    }

    /// Does it where the kernel has no page of that node: of a regular file of which no OPEN was
    /// answered so far, and none is while it is done, nor was its length changed. So no page of it
    /// can be locked by a READ that waits for this very lane, nor hold what was written.
    pub fn unless_opened(&self, node: u64, then: impl FnOnce()) {
        if self.shards.is_empty() {
            return;
        }
        let shard = self.shard(node);
        if shard.nodes.get(&node).is_some_and(|its| its.count > 0 && !its.opened) {
            then();
        }
    }

    /// The daemon has taken node ids back: the body of a FORGET record.
    pub fn forgotten(&self, tag: u64, body: &[u8]) {
        if self.shards.is_empty() {
            return;
        }
        self.undecided.set(tag);
        for (index, one) in body.chunks_exact(size_of::<ForgetOne>()).enumerate() {
            if let Ok(ForgetOne { nodeid, nlookup }) = ForgetOne::read_from_bytes(one) {
                self.shard(nodeid).forget(nodeid, nlookup, index as u32, tag);
            }
        }
    }

    /// Nodes that count, and open files.
    pub fn totals(&self) -> (u64, u64) {
        self.shards.iter().fold((0, 0), |(nodes, handles), shard| {
            let shard = lock(&shard.0);
            let counting = shard.nodes.len() - shard.early().len();
            (nodes + counting as u64, handles + shard.handles.len() as u64)
        })
    }

    /// Gives all of it as bodies of RESTORE records, the end mark last. Nothing may change
    /// meanwhile, which is not checked. Memory is that of a body and of one shard's numbers, and no
    /// lock is held while a body is sent.
    pub fn restore<E>(&self, send: impl FnMut(&[u8]) -> Result<(), E>) -> Result<Restored, E> {
        let mut bodies = Bodies { body: Vec::new(), send };
        let (mut done, mut end) = (Restored::default(), End::default());
        for shard in &self.shards {
            let ids: Vec<u64> = lock(&shard.0).nodes.keys().copied().collect();
            for id in ids {
                bodies.make_room()?;
                let shard = lock(&shard.0);
                if let Some(Node { count: count @ 1.., recipe, .. }) = shard.nodes.get(&id) {
                    done.nodes += 1;
                    done.nodes_lost += u64::from(recipe.is_empty());
                    bodies.put(&Restore::Node { id, count: *count, recipe });
                }
            }
        }
        for shard in &self.shards {
            let shard = lock(&shard.0);
            end.node_id_max = end.node_id_max.max(shard.node_id_max);
            end.fh_max = end.fh_max.max(shard.fh_max);
            let handles: Vec<(u64, Handle)> =
                shard.handles.iter().map(|(&fh, &handle)| (fh, handle)).collect();
            drop(shard);
            for (fh, Handle { node, flags, directory, .. }) in handles {
                bodies.make_room()?;
                done.handles += 1;
                bodies.put(&Restore::Handle { fh, node, flags, directory });
            }
        }
        (end.nodes, end.handles) = (done.nodes, done.handles);
        bodies.make_room()?;
        bodies.put(&Restore::End(end));
        bodies.flush()?;
        Ok(done)
    }

    fn give(&self, tag: u64, entry: Given) {
        // The root's lookups are not counted; the kernel refuses 0, and no daemon could count on
        // from what is larger.
        if (FUSE_ROOT_ID + 1..=NUMBER_MAX).contains(&entry.id) {
            self.shard(entry.id).give(entry, tag);
        }
    }

    fn open(&self, tag: u64, fh: u64, handle: Handle) {
        if (1..=NUMBER_MAX).contains(&fh) {
            self.shard(fh).open(fh, handle, tag);
        }
    }

    /// The shard of a node or a handle; there are some.
    fn shard(&self, number: u64) -> MutexGuard<'_, Shard> {
        let mut shard = lock(&self.shards[shard_of(self.key.hash_one(number))].0);
        shard.turn = self.turn.load(Ordering::Acquire);
        shard
    }
}

/// The table in a shard goes by the lowest bits and the seven highest.
fn shard_of(hash: u64) -> usize {
    (hash >> 40) as usize % SHARDS
}

/// RESTORE bodies that are sent as they fill.
struct Bodies<S> {
    body: Vec<u8>,
    send: S,
}

impl<E, S: FnMut(&[u8]) -> Result<(), E>> Bodies<S> {
    /// Has the next entry fit.
    fn make_room(&mut self) -> Result<(), E> {
        if self.body.len() + ENTRY_BYTES_MAX > RESTORE_BODY_BYTES_MAX {
            self.flush()
        } else {
            Ok(())
        }
    }

    fn put(&mut self, entry: &Restore<'_>) {
        let fits = push_restore(&mut self.body, entry);
        debug_assert!(fits, "an entry whose parts were bounded when they came");
    }

    fn flush(&mut self) -> Result<(), E> {
        (self.send)(&self.body)?;
        self.body.clear();
        Ok(())
    }
}
