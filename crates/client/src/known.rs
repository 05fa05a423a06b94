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

use crate::journal::{Entry as Change, Log};
use crate::lane::lock;
use ringfs_wire::abi::{Attr, DirentPlus, EntryOut, FUSE_ROOT_ID, ForgetOne, Opcode, OpenOut};
use ringfs_wire::limits::{LANES_MAX, RECIPE_BYTES_MAX, RESTORE_BODY_BYTES_MAX};
use ringfs_wire::restore::{End, NUMBER_MAX, Nodes, Restore, RestoreError, push_restore};
use ringfs_wire::slot::SlotUse;
use rustix::fs::{FileType, OFlags};
use std::collections::hash_map::{Entry, RandomState};
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use zerocopy::FromBytes;

/// Locks: a node may be found by one lane and forgotten by another.
pub const SHARDS: usize = 64;
/// Nodes of one shard: 4 million in all. What comes beyond is lost with the daemon, and only then.
const NODES_PER_SHARD_MAX: usize = 1 << 16;
/// Open files of one shard: a million in all.
const HANDLES_PER_SHARD_MAX: usize = 1 << 14;
/// Recipes of one shard whose nodes do not count: a reply that gives them may come.
const EARLY_PER_SHARD_MAX: usize = 256;
/// A recipe whose node does not count is of no use so many turns later: by the second one all
/// requests are over that were in flight; another one for those that came while a request was
/// that nobody waits for any more, and were given the node because of it.
const EARLY_TURNS: u64 = 3;
/// A table with room for so many stays as large as it is.
const SMALL_TABLE: usize = 1024;
/// The kernel takes no longer names in listings.
const NAME_BYTES_MAX: usize = 1024;
/// What of a request's arguments says what its reply means.
const ARGS_BYTES: usize = 24;
/// An entry of a RESTORE: its head, and the longest recipe.
const ENTRY_BYTES_MAX: usize = 24 + RECIPE_BYTES_MAX;
/// They are over with the open itself.
const FLAGS_ONCE: OFlags =
    OFlags::CREATE.union(OFlags::EXCL).union(OFlags::TRUNC).union(OFlags::NOCTTY);

const fn bits(opcodes: &[Opcode]) -> u64 {
    let (mut bits, mut at) = (0, 0);
    while at < opcodes.len() {
        bits |= 1 << opcodes[at] as u32;
        at += 1;
    }
    bits
}

/// Their replies are one entry.
const ENTRY: u64 =
    bits(&[Opcode::Lookup, Opcode::Mknod, Opcode::Mkdir, Opcode::Symlink, Opcode::Link]);
/// One entry and an open file.
const ENTRY_AND_OPEN: u64 = bits(&[Opcode::Create, Opcode::Tmpfile]);
const OPEN: u64 = bits(&[Opcode::Open, Opcode::Opendir]);
const RELEASE: u64 = bits(&[Opcode::Release, Opcode::Releasedir]);
const LISTING: u64 = bits(&[Opcode::Readdirplus]);
const ANY: u64 = ENTRY | ENTRY_AND_OPEN | OPEN | RELEASE | LISTING;

const fn is_in(set: u64, opcode: u32) -> bool {
    opcode < u64::BITS && set >> opcode & 1 != 0
}

/// What a request asked, as far as its reply needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    nodeid: u64,
    args: [u8; ARGS_BYTES],
}

impl Asked {
    /// Of a request's node and arguments; what is short is zeros.
    pub fn new(nodeid: u64, args: &[u8]) -> Asked {
        let mut first = [0; ARGS_BYTES];
        let len = args.len().min(ARGS_BYTES);
        first[..len].copy_from_slice(&args[..len]);
        Asked { nodeid, args: first }
    }

    /// Of a record as it was sent.
    pub fn of_record(record: &[u8]) -> Option<Asked> {
        let nodeid = u64::read_from_bytes(record.get(16..24)?).ok()?;
        Some(Asked::new(nodeid, record.get(40..)?))
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes([self.args[at], self.args[at + 1], self.args[at + 2], self.args[at + 3]])
    }

    /// The first argument of OPEN, OPENDIR, CREATE, TMPFILE.
    fn flags(&self) -> u32 {
        self.word(0) & !FLAGS_ONCE.bits()
    }

    /// The first argument of RELEASE and RELEASEDIR.
    fn fh(&self) -> u64 {
        u64::from(self.word(0)) | u64::from(self.word(4)) << 32
    }

    /// Bytes that a READDIRPLUS wants at most.
    fn size(&self) -> usize {
        self.word(16) as usize
    }
}

#[derive(Debug)]
struct Node {
    /// Lookups; 0: a reply that gives it may be yet to come.
    count: u64,
    recipe: Box<[u8]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Handle {
    node: u64,
    flags: u32,
    directory: bool,
}

/// Names the use of a slot whose reply changes something; never 0.
pub fn tag_of(lane: u8, at: SlotUse) -> u64 {
    1 << 63 | u64::from(lane) << 48 | u64::from(at.slot) << 32 | u64::from(at.seq)
}

/// What the last reply of a lane has changed in a shard: should it not have reached the kernel.
#[derive(Debug, Default)]
struct Recent {
    tag: u64,
    given: Vec<u64>,
    opened: Vec<u64>,
    /// Which of a FORGET's node ids are done.
    forgotten: Vec<u32>,
}

/// What a shard needs for the client that takes over.
#[derive(Debug)]
struct Journal {
    log: Log,
    recent: [Recent; LANES_MAX],
}

fn recent_of(recent: &mut [Recent; LANES_MAX], tag: u64) -> &mut Recent {
    let recent = &mut recent[(tag >> 48) as usize % LANES_MAX];
    if recent.tag != tag {
        recent.tag = tag;
        recent.given.clear();
        recent.opened.clear();
        recent.forgotten.clear();
    }
    recent
}

#[derive(Debug)]
struct Shard {
    /// `None`: nobody takes over.
    journal: Option<Box<Journal>>,
    nodes: HashMap<u64, Node, Keyed>,
    handles: HashMap<u64, Handle, Keyed>,
    /// Nodes whose recipe came before they counted, or is left, the oldest first, and in which
    /// turn; some of them count by now.
    early: VecDeque<(u64, u64)>,
    /// As the one who holds the lock has seen it.
    turn: u64,
    node_id_max: u64,
    fh_max: u64,
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
        let shards = if is_on { SHARDS } else { 0 };
        let shard = |_| Apart(Mutex::new(Shard::new(key, None)));
        Known { shards: (0..shards).map(shard).collect(), key, turn: AtomicU64::new(0) }
    }

    /// Nothing yet, and changes go into these logs; and the key that finds them again.
    pub fn kept(logs: Vec<Log>) -> (Known, [u64; 2]) {
        let key = Keyed::new();
        let shards = logs.into_iter().map(|log| Apart(Mutex::new(Shard::new(key, Some(log)))));
        let known = Known { shards: shards.collect(), key, turn: AtomicU64::new(0) };
        (known, [key.start, key.factor])
    }

    /// What the logs of another client tell; `None`: they are damaged.
    pub fn replayed(logs: Vec<Log>, key: [u64; 2]) -> Option<Known> {
        let key = Keyed { start: key[0], factor: key[1] };
        let shards = logs.into_iter().map(|log| {
            let mut shard = Shard::new(key, Some(log));
            shard.replay().then_some(Apart(Mutex::new(shard)))
        });
        Some(Known { shards: shards.collect::<Option<_>>()?, key, turn: AtomicU64::new(0) })
    }

    /// A turn begins: to be called when all is over that was in flight when the one before began.
    pub fn next_turn(&self) {
        self.turn.fetch_add(1, Ordering::AcqRel);
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
            let journal = shard.journal.as_mut();
            journal.is_some_and(|its| !recent_of(&mut its.recent, tag).forgotten.is_empty())
        };
        let has_come = self.shards.iter().any(has_come);
        if has_come {
            for (index, &ForgetOne { nodeid, nlookup }) in forgets.iter().enumerate() {
                let mut shard = self.shard(nodeid);
                let index = index as u32;
                if !shard.recent(tag).is_some_and(|recent| recent.forgotten.contains(&index)) {
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
        if is_in(RELEASE, opcode) {
            // Whatever came of it: the kernel has forgotten the handle.
            if let Some(fh) = asked().map(|asked| asked.fh()) {
                self.shard(fh).close(fh);
            }
            return;
        }
        if errno != 0 {
            return;
        }
        if is_in(LISTING, opcode) {
            if asked().is_some_and(|asked| body.len() <= asked.size()) {
                listed(body, |id| self.give(tag, id));
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
        if let Some(id) = entry {
            self.give(tag, id);
        }
        if let (Some(fh), Some(asked)) = (open, asked()) {
            let node = if is_in(OPEN, opcode) { Some(asked.nodeid) } else { entry };
            let directory = opcode == Opcode::Opendir as u32;
            if let Some(node) = node {
                self.open(tag, fh, Handle { node, flags: asked.flags(), directory });
            }
        }
    }

    /// The daemon has taken node ids back: the body of a FORGET record.
    pub fn forgotten(&self, tag: u64, body: &[u8]) {
        if self.shards.is_empty() {
            return;
        }
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
                if let Some(Node { count: count @ 1.., recipe }) = shard.nodes.get(&id) {
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
            for (fh, Handle { node, flags, directory }) in handles {
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

    fn give(&self, tag: u64, id: u64) {
        // The root's lookups are not counted; the kernel refuses 0, and no daemon could count on
        // from what is larger.
        if (FUSE_ROOT_ID + 1..=NUMBER_MAX).contains(&id) {
            self.shard(id).give(id, tag);
        }
    }

    fn open(&self, tag: u64, fh: u64, handle: Handle) {
        if (1..=NUMBER_MAX).contains(&fh) {
            self.shard(fh).open(fh, handle, tag);
        }
    }

    /// The shard of a node or a handle; there are some.
    fn shard(&self, number: u64) -> MutexGuard<'_, Shard> {
        let hash = self.key.hash_one(number);
        // The table in it goes by the lowest bits and the seven highest.
        let mut shard = lock(&self.shards[(hash >> 40) as usize % SHARDS].0);
        shard.turn = self.turn.load(Ordering::Acquire);
        shard
    }
}

impl Shard {
    fn new(key: Keyed, log: Option<Log>) -> Shard {
        let journal = log.map(|log| Box::new(Journal { log, recent: Default::default() }));
        Shard {
            journal,
            nodes: HashMap::with_hasher(key),
            handles: HashMap::with_hasher(key),
            early: VecDeque::new(),
            turn: 0,
            node_id_max: 0,
            fh_max: 0,
        }
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
        let Journal { log, recent, .. } = journal;
        let undecided = |id: u64| -> u64 {
            let given = |recent: &Recent| recent.given.iter().filter(|&&its| its == id).count();
            recent.iter().map(|recent| given(recent) as u64).sum()
        };
        let has_recent = recent.iter().any(|recent| !recent.given.is_empty());
        let nodes = self.nodes.iter().filter(|(_, node)| node.count > 0).map(|(&id, node)| {
            let undecided = if has_recent { undecided(id) } else { 0 };
            Change::Node { id, count: node.count.saturating_sub(undecided), recipe: &node.recipe }
        });
        let early = self.early.iter().filter_map(|(id, _)| {
            let node = self.nodes.get(id).filter(|node| node.count == 0)?;
            Some(Change::Heard { id: *id, recipe: &node.recipe })
        });
        let opened_by = |fh: u64| recent.iter().find(|recent| recent.opened.contains(&fh));
        let handles = self.handles.iter().map(|(&fh, handle)| {
            let Handle { node, flags, directory } = *handle;
            let tag = opened_by(fh).map_or(0, |recent| recent.tag);
            Change::Opened { fh, node, flags, directory, tag }
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

    /// Does again all that the log says; false: it is damaged.
    fn replay(&mut self) -> bool {
        let Some(journal) = self.journal.take() else { return true };
        let Journal { log, mut recent } = *journal;
        for change in log.entries() {
            let Some(change) = change else { return false };
            self.redo(&change, &mut recent);
        }
        self.journal = Some(Box::new(Journal { log, recent }));
        true
    }

    fn redo(&mut self, change: &Change<'_>, recent: &mut [Recent; LANES_MAX]) {
        match *change {
            Change::Heard { id, recipe } => self.put_recipe(id, recipe),
            Change::Node { id, count, recipe } => {
                self.nodes.insert(id, Node { count, recipe: recipe.into() });
            }
            Change::Given { id, tag } => {
                recent_of(recent, tag).given.push(id);
                self.count_up(id);
            }
            Change::Opened { fh, node, flags, directory, tag } => {
                if tag != 0 {
                    recent_of(recent, tag).opened.push(fh);
                }
                self.put_handle(fh, Handle { node, flags, directory });
            }
            Change::Closed { fh } => {
                self.handles.remove(&fh);
            }
            Change::Forgotten { id, lookups, index, tag } => {
                recent_of(recent, tag).forgotten.push(index);
                self.count_down(id, lookups);
            }
            Change::Undone { tag } => {
                let undone = std::mem::take(recent_of(recent, tag));
                self.take_back(&undone);
            }
            Change::Highest { node_id, fh } => {
                self.node_id_max = self.node_id_max.max(node_id);
                self.fh_max = self.fh_max.max(fh);
            }
        }
    }

    fn recent(&mut self, tag: u64) -> Option<&mut Recent> {
        self.journal.as_mut().map(|journal| recent_of(&mut journal.recent, tag))
    }

    fn undo(&mut self, tag: u64) {
        let Some(recent) = self.recent(tag) else { return };
        if recent.given.is_empty() && recent.opened.is_empty() {
            return;
        }
        self.log(&Change::Undone { tag });
        if let Some(undone) = self.recent(tag).map(std::mem::take) {
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

    fn open(&mut self, fh: u64, handle: Handle, tag: u64) {
        let Handle { node, flags, directory } = handle;
        self.log(&Change::Opened { fh, node, flags, directory, tag });
        if let Some(recent) = self.recent(tag) {
            recent.opened.push(fh);
        }
        self.put_handle(fh, handle);
    }

    fn put_handle(&mut self, fh: u64, handle: Handle) {
        self.fh_max = self.fh_max.max(fh);
        if self.handles.len() < HANDLES_PER_SHARD_MAX {
            self.handles.insert(fh, handle);
        }
    }

    fn close(&mut self, fh: u64) {
        if self.handles.contains_key(&fh) {
            self.log(&Change::Closed { fh });
            self.handles.remove(&fh);
        }
    }

    fn hear(&mut self, id: u64, recipe: &[u8]) {
        if self.nodes.get(&id).is_some_and(|node| *node.recipe == *recipe) {
            return;
        }
        self.log(&Change::Heard { id, recipe });
        self.put_recipe(id, recipe);
    }

    fn put_recipe(&mut self, id: u64, recipe: &[u8]) {
        self.node_id_max = self.node_id_max.max(id);
        let is_full = self.nodes.len() >= NODES_PER_SHARD_MAX;
        match self.nodes.entry(id) {
            Entry::Occupied(mut known) => {
                known.get_mut().recipe = recipe.into();
                if known.get().count > 0 {
                    return;
                }
            }
            Entry::Vacant(_) if is_full => return,
            Entry::Vacant(room) => {
                room.insert(Node { count: 0, recipe: recipe.into() });
            }
        }
        self.keep_early(id);
    }

    /// Nodes that do not count.
    fn early(&self) -> HashSet<u64> {
        let counts = |id: &u64| self.nodes.get(id).is_none_or(|node| node.count > 0);
        self.early.iter().map(|(id, _)| *id).filter(|id| !counts(id)).collect()
    }

    /// Keeps a node that does not count, as long as a reply may give it that is on its way.
    fn keep_early(&mut self, id: u64) {
        self.early.push_back((id, self.turn));
        while let Some(&(oldest, turn)) = self.early.front()
            && (self.turn >= turn + EARLY_TURNS || self.early.len() > EARLY_PER_SHARD_MAX)
        {
            self.early.pop_front();
            if self.nodes.get(&oldest).is_some_and(|node| node.count == 0)
                && !self.early.iter().any(|(id, _)| *id == oldest)
            {
                self.drop_node(oldest);
            }
        }
    }

    fn drop_node(&mut self, id: u64) {
        self.nodes.remove(&id);
        let (len, room) = (self.nodes.len(), self.nodes.capacity());
        if room > SMALL_TABLE && len < room / 8 {
            self.nodes.shrink_to(len * 2);
        }
    }

    fn give(&mut self, id: u64, tag: u64) {
        self.log(&Change::Given { id, tag });
        if let Some(recent) = self.recent(tag) {
            recent.given.push(id);
        }
        self.count_up(id);
    }

    fn count_up(&mut self, id: u64) {
        self.node_id_max = self.node_id_max.max(id);
        let is_full = self.nodes.len() >= NODES_PER_SHARD_MAX;
        match self.nodes.entry(id) {
            Entry::Occupied(mut known) => {
                let count = &mut known.get_mut().count;
                *count = (*count + 1).min(NUMBER_MAX);
            }
            Entry::Vacant(room) if !is_full => {
                room.insert(Node { count: 1, recipe: Box::default() });
            }
            Entry::Vacant(_) => {}
        }
    }

    fn forget(&mut self, id: u64, lookups: u64, index: u32, tag: u64) {
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
            0 if !node.recipe.is_empty() => self.keep_early(id),
            0 => self.drop_node(id),
            _ => {}
        }
    }
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

/// The node of an entry, if the kernel counts it; `excess` is by how much the reply's length is
/// wrong behind it.
fn entry_of(body: &[u8], excess: usize) -> Option<u64> {
    let entry = EntryOut::read_from_bytes(body).ok().filter(|_| excess == 0)?;
    is_valid(&entry.attr).then_some(entry.nodeid)
}

fn open_of(body: &[u8]) -> Option<u64> {
    Some(OpenOut::read_from_bytes(body).ok()?.fh)
}

/// As the kernel judges (`fuse_invalid_attr`).
fn is_valid(attr: &Attr) -> bool {
    let kind = FileType::from_raw_mode(attr.mode);
    kind != FileType::Unknown && i64::try_from(attr.size).is_ok()
}

/// Walks a READDIRPLUS's body as the kernel does (`parse_dirplusfile`): what it does not reach
/// gives nothing. An entry whose attributes it refuses counts, since it gives that back.
fn listed(mut body: &[u8], mut give: impl FnMut(u64)) {
    while let Ok((head, rest)) = DirentPlus::read_from_prefix(body) {
        let namelen = head.dirent.namelen as usize;
        let len = (size_of::<DirentPlus>() + namelen.min(body.len())).next_multiple_of(8);
        let (Some(name), Some(next)) = (rest.get(..namelen), body.get(len..)) else { return };
        if name.is_empty() || namelen > NAME_BYTES_MAX || name.contains(&b'/') {
            return;
        }
        if name != b"." && name != b".." {
            give(head.entry_out.nodeid);
        }
        body = next;
    }
}

/// Hashes numbers that a daemon chose, by a key that it does not know.
#[derive(Clone, Copy, Debug)]
struct Keyed {
    start: u64,
    factor: u64,
}

impl Keyed {
    fn new() -> Keyed {
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

/// A folded multiplication a word.
#[derive(Debug)]
struct Mixer(Keyed);

impl Hasher for Mixer {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(byte.into()));
    }

    fn write_u64(&mut self, number: u64) {
        let Keyed { start, factor } = self.0;
        let product = u128::from(start ^ number) * u128::from(factor);
        self.0.start = product as u64 ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.0.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keep::Keep;
    use ringfs_wire::abi::{CreateIn, Dirent, OpenIn, ReadIn, ReleaseIn};
    use ringfs_wire::restore::{Restores, push_node};
    use std::collections::BTreeMap;
    use std::time::Instant;
    use zerocopy::IntoBytes;

    type Told = (BTreeMap<u64, (u64, Vec<u8>)>, BTreeMap<u64, Handle>, End);

    /// What a daemon would be told.
    fn told(known: &Known) -> Told {
        let (mut nodes, mut handles, mut end) = (BTreeMap::new(), BTreeMap::new(), None);
        let restored = known.restore(|body| {
            for entry in Restores::new(body) {
                assert_eq!(end, None, "the end mark is the last");
                match entry.expect("well formed") {
                    Restore::Node { id, count, recipe } => {
                        assert_eq!(nodes.insert(id, (count, recipe.to_vec())), None);
                    }
                    Restore::Handle { fh, node, flags, directory } => {
                        assert_eq!(handles.insert(fh, Handle { node, flags, directory }), None);
                    }
                    Restore::End(mark) => end = Some(mark),
                }
            }
            Ok::<(), ()>(())
        });
        let (restored, end) = (restored.expect("sent"), end.expect("an end mark"));
        assert_eq!((end.nodes, end.handles), (nodes.len() as u64, handles.len() as u64));
        assert_eq!((end.nodes, end.handles), (restored.nodes, restored.handles));
        let lost = nodes.values().filter(|(_, recipe)| recipe.is_empty()).count();
        assert_eq!(restored.nodes_lost, lost as u64);
        (nodes, handles, end)
    }

    fn counts(known: &Known) -> Vec<(u64, u64)> {
        told(known).0.into_iter().map(|(id, (count, _))| (id, count)).collect()
    }

    fn attr() -> Attr {
        Attr { mode: 0o100644, ..Attr::default() }
    }

    fn entry(nodeid: u64) -> Vec<u8> {
        EntryOut { nodeid, attr: attr(), ..EntryOut::default() }.as_bytes().to_vec()
    }

    fn opened(fh: u64) -> Vec<u8> {
        OpenOut { fh, ..OpenOut::default() }.as_bytes().to_vec()
    }

    fn listing(entries: &[(&str, u64)]) -> Vec<u8> {
        let mut body = Vec::new();
        for (name, nodeid) in entries {
            let entry_out = EntryOut { nodeid: *nodeid, attr: attr(), ..EntryOut::default() };
            let dirent = Dirent { namelen: name.len() as u32, ..Dirent::default() };
            body.extend_from_slice(DirentPlus { entry_out, dirent }.as_bytes());
            body.extend_from_slice(name.as_bytes());
            body.resize(body.len().next_multiple_of(8), 0);
        }
        body
    }

    fn answer(known: &Known, opcode: Opcode, asked: Asked, errno: u32, body: &[u8]) {
        known.answered(1, opcode as u32, || Some(asked), errno, body);
    }

    fn list(known: &Known, size: usize, body: &[u8]) {
        let asked = ReadIn { size: size as u32, ..ReadIn::default() };
        answer(known, Opcode::Readdirplus, Asked::new(1, asked.as_bytes()), 0, body);
    }

    fn forget(known: &Known, one: &[(u64, u64)]) {
        let body: Vec<u8> = one
            .iter()
            .flat_map(|&(nodeid, nlookup)| ForgetOne { nodeid, nlookup }.as_bytes().to_vec())
            .collect();
        known.forgotten(1, &body);
    }

    fn node(id: u64, recipe: &[u8]) -> Vec<u8> {
        let mut body = Vec::new();
        assert!(push_node(&mut body, id, |out| out.extend(recipe)));
        body
    }

    fn open(known: &Known, opcode: Opcode, node: u64, flags: OFlags, fh: u64) {
        let asked = OpenIn { flags: flags.bits(), open_flags: 0 };
        answer(known, opcode, Asked::new(node, asked.as_bytes()), 0, &opened(fh));
    }

    fn release(known: &Known, opcode: Opcode, fh: u64, errno: u32) {
        let asked = ReleaseIn { fh, ..ReleaseIn::default() };
        answer(known, opcode, Asked::new(2, asked.as_bytes()), errno, &[]);
    }

    #[test]
    fn each_reply_gives_what_the_kernel_takes_of_it() {
        let nothing = Asked::new(1, &[]);
        let check = |opcode, errno, body: &[u8], expected: &[(u64, u64)]| {
            let known = Known::new(true);
            answer(&known, opcode, nothing, errno, body);
            assert_eq!(counts(&known), expected, "{opcode:?} {errno} {}", body.len());
        };
        use Opcode::*;
        for opcode in [Lookup, Mknod, Mkdir, Symlink, Link] {
            check(opcode, 0, &entry(7), &[(7, 1)]);
            check(opcode, 2, &entry(7), &[]);
            // Negative, the root, what no daemon could restore.
            for id in [0, 1, NUMBER_MAX + 1, u64::MAX] {
                check(opcode, 0, &entry(id), &[]);
            }
            check(opcode, 0, &entry(7)[..127], &[]);
            check(opcode, 0, &[&entry(7)[..], &[0]].concat(), &[]);
            let bad = |attr| EntryOut { nodeid: 7, attr, ..EntryOut::default() };
            check(opcode, 0, bad(Attr { mode: 0o644, ..attr() }).as_bytes(), &[]);
            check(opcode, 0, bad(Attr { size: 1 << 63, ..attr() }).as_bytes(), &[]);
        }
        for opcode in [Create, Tmpfile] {
            check(opcode, 0, &[entry(7), opened(3)].concat(), &[(7, 1)]);
            check(opcode, 0, &entry(7), &[]);
            check(opcode, 0, &[&entry(7)[..], &opened(3), &[0]].concat(), &[]);
        }
        for opcode in [Getattr, Read, Readdir, Statx, Rename2, Init] {
            check(opcode, 0, &entry(7), &[]);
        }
        check(Create, 0, &[], &[]);
    }

    #[test]
    fn listings_are_walked_as_the_kernel_walks_them() {
        let check = |entries: &[(&str, u64)], expected: &[(u64, u64)]| {
            let known = Known::new(true);
            let body = listing(entries);
            list(&known, body.len(), &body);
            assert_eq!(counts(&known), expected, "{entries:?}");
            // More than was asked for: the kernel refuses it as a whole.
            let known = Known::new(true);
            list(&known, body.len().saturating_sub(1), &body);
            assert_eq!(counts(&known), []);
        };
        check(&[(".", 1), ("..", 9), ("a", 5), ("ab", 5), ("c", 6)], &[(5, 2), (6, 1)]);
        check(&[("no attributes", 0), (".hidden", 4), ("...", 3)], &[(3, 1), (4, 1)]);
        check(&[("a", 5), ("b/c", 6), ("d", 7)], &[(5, 1)]);
        check(&[("a", 5), ("", 6), ("d", 7)], &[(5, 1)]);
        let long = "n".repeat(NAME_BYTES_MAX + 1);
        check(&[("a", 5), (&long, 6), ("d", 7)], &[(5, 1)]);
        check(&[(&long[1..], 6)], &[(6, 1)]);

        let body = listing(&[("first", 5), ("second", 6)]);
        for cut in 0..body.len() {
            let known = Known::new(true);
            list(&known, 4096, &body[..cut]);
            let whole = if cut >= body.len() / 2 { &[(5, 1)][..] } else { &[] };
            assert_eq!(counts(&known), whole, "cut at {cut}");
        }
        let mut wild = body;
        wild[128 + 16..128 + 20].copy_from_slice(&u32::MAX.to_le_bytes());
        let known = Known::new(true);
        list(&known, 4096, &wild);
        assert_eq!(counts(&known), []);
    }

    #[test]
    fn handles_are_as_they_were_opened_and_go_with_their_release() {
        let known = Known::new(true);
        let once = OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC | OFlags::NOCTTY;
        let kept = OFlags::RDWR | OFlags::APPEND | OFlags::NOFOLLOW;
        open(&known, Opcode::Open, 9, kept | once, 3);
        open(&known, Opcode::Opendir, 1, OFlags::DIRECTORY, 4);
        let asked = CreateIn { flags: (OFlags::WRONLY | once).bits(), ..CreateIn::default() };
        let body = [entry(7), opened(5)].concat();
        answer(&known, Opcode::Create, Asked::new(1, asked.as_bytes()), 0, &body);
        let handle =
            |node, flags: OFlags, directory| Handle { node, flags: flags.bits(), directory };
        let all = BTreeMap::from([
            (3, handle(9, kept, false)),
            (4, handle(1, OFlags::DIRECTORY, true)),
            (5, handle(7, OFlags::WRONLY, false)),
        ]);
        let (nodes, handles, end) = told(&known);
        assert_eq!((nodes.len(), handles, end.fh_max, end.node_id_max), (1, all, 5, 7));
        // What the kernel refuses, or nobody could restore.
        answer(&known, Opcode::Open, Asked::new(9, &[]), 0, &opened(6)[..15]);
        answer(&known, Opcode::Open, Asked::new(9, &[]), 24, &opened(6));
        for fh in [0, NUMBER_MAX + 1] {
            open(&known, Opcode::Open, 9, kept, fh);
        }
        assert_eq!(told(&known).1.len(), 3);
        for (opcode, fh, errno) in [
            (Opcode::Release, 3, 0),
            (Opcode::Releasedir, 4, 5),
            (Opcode::Release, 99, 0),
            (Opcode::Release, 5, 4),
        ] {
            release(&known, opcode, fh, errno);
        }
        let (_, handles, end) = told(&known);
        assert_eq!((handles.len(), end.fh_max), (0, 5));
    }

    #[test]
    fn requests_are_read_where_they_lie_in_their_records() {
        let mut record = vec![0; 40];
        record[16..24].copy_from_slice(&9u64.to_le_bytes());
        record.extend_from_slice(OpenIn { flags: 0x8002, open_flags: 1 }.as_bytes());
        let asked = Asked::of_record(&record).expect("whole");
        assert_eq!((asked.nodeid, asked.flags()), (9, 0x8002));
        assert_eq!(Asked::of_record(&record[..39]), None);
        let asked = Asked::of_record(&record[..40]).expect("no arguments");
        assert_eq!((asked.nodeid, asked.fh(), asked.size()), (9, 0, 0));
        let release = ReleaseIn { fh: 0x0102_0304_0506_0708, ..ReleaseIn::default() };
        assert_eq!(Asked::new(1, release.as_bytes()).fh(), release.fh);
        let read = ReadIn { size: 4096, ..ReadIn::default() };
        assert_eq!(Asked::new(1, read.as_bytes()).size(), 4096);
    }

    #[test]
    fn recipes_come_before_after_and_again() {
        let known = Known::new(true);
        let looked_up = |id| answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
        known.hear(&node(5, b"before")).expect("well formed");
        assert_eq!(told(&known).0, BTreeMap::new(), "no reply has given it");
        looked_up(5);
        looked_up(6);
        known.hear(&[node(6, b"after"), node(5, b"renamed")].concat()).expect("well formed");
        looked_up(6);
        looked_up(8);
        let all = [(5, (1, b"renamed".to_vec())), (6, (2, b"after".to_vec())), (8, (1, vec![]))];
        assert_eq!(told(&known).0, BTreeMap::from(all));
        forget(&known, &[(5, 1), (6, 1), (8, 7), (77, 1)]);
        assert_eq!(counts(&known), [(6, 1)]);
        assert_eq!(told(&known).2.node_id_max, 8);
        assert!(known.hear(&[1, 2, 3]).is_err() && known.hear(&node(1, b"")).is_err());
    }

    /// The daemon has made the reply to a LOOKUP, without the recipe, which had left before; then
    /// it takes a FORGET, and the reply to that is here first.
    #[test]
    fn a_recipe_stays_where_a_reply_is_overtaken_by_that_to_a_forget() {
        let known = Known::new(true);
        let looked_up = |id| answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
        for round in 0..3 {
            known.hear(&node(5, b"first")).expect("well formed");
            looked_up(5);
            forget(&known, &[(5, 1)]);
            // Others come and go meanwhile.
            for id in 100..110 + (SHARDS * EARLY_PER_SHARD_MAX / 2) as u64 {
                known.hear(&node(id, b"other")).expect("well formed");
                looked_up(id);
            }
            assert!(!told(&known).0.contains_key(&5), "nothing of it is told");
            looked_up(5);
            assert_eq!(told(&known).0[&5], (1, b"first".to_vec()), "{round}");
            forget(&known, &[(5, 1)]);
        }
    }

    /// As the kernel forgets one file after the other for long.
    #[test]
    fn recipes_go_when_all_is_over_that_was_in_flight() {
        let known = Known::new(true);
        let looked_up = |id| answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
        let held = || {
            let shards = known.shards.iter().map(|shard| lock(&shard.0));
            shards
                .map(|shard| (shard.nodes.len(), shard.early.len()))
                .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
        };
        for id in 2..20_000 {
            known.hear(&node(id, b"passing")).expect("well formed");
            looked_up(id);
            forget(&known, &[(id, 1)]);
            if id % 64 == 0 {
                known.next_turn();
            }
        }
        let (nodes, early) = held();
        let most = SHARDS * 2 * (EARLY_TURNS as usize + 1) * 4;
        assert!(nodes <= early && early < most, "{nodes} {early}");
        // What was heard or given back in this turn or the two before is there.
        for turn in 0..EARLY_TURNS {
            known.hear(&node(30_000 + turn, b"late")).expect("well formed");
            known.hear(&node(40_000 + turn, b"back")).expect("well formed");
            looked_up(40_000 + turn);
            forget(&known, &[(40_000 + turn, 1)]);
            (50_000..50_500).for_each(|id| known.hear(&node(id, b"other")).expect("well formed"));
            if turn + 1 < EARLY_TURNS {
                known.next_turn();
            }
        }
        (0..EARLY_TURNS).for_each(|turn| looked_up(30_000 + turn));
        (0..EARLY_TURNS).for_each(|turn| looked_up(40_000 + turn));
        let (nodes, ..) = told(&known);
        assert!((nodes.len(), nodes.values().all(|(_, recipe)| recipe.len() == 4)) == (6, true));
    }

    #[test]
    fn what_no_reply_gives_is_bounded() {
        let known = Known::new(true);
        for id in 2..200_000 {
            known.hear(&node(id, &[7; 400])).expect("well formed");
        }
        let nodes: u64 = known.shards.iter().map(|shard| lock(&shard.0).nodes.len() as u64).sum();
        assert!(nodes <= (SHARDS * EARLY_PER_SHARD_MAX) as u64, "{nodes}");
        assert_eq!(counts(&known), []);
        // The last ones are there, and stay when their replies have come.
        for id in 199_000..200_000 {
            answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
        }
        for id in 200_000..400_000 {
            known.hear(&node(id, b"x")).expect("well formed");
        }
        let (nodes, ..) = told(&known);
        assert_eq!(nodes.len(), 1000);
        assert!(nodes.values().all(|(_, recipe)| recipe.len() == 400));
    }

    #[test]
    fn who_does_not_want_it_has_nothing() {
        let known = Known::new(false);
        known.hear(b"nonsense").expect("not looked at");
        answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(5));
        open(&known, Opcode::Open, 5, OFlags::RDONLY, 3);
        release(&known, Opcode::Release, 3, 0);
        forget(&known, &[(5, 1)]);
        assert_eq!(known.totals(), (0, 0));
    }

    /// Numbers from a seed (splitmix64).
    struct Seeded(u64);

    impl Seeded {
        fn below(&mut self, end: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            (mixed ^ mixed >> 31) % end
        }
    }

    #[test]
    fn random_sequences_come_to_what_a_plain_model_says() {
        for seed in 0..20 {
            let mut random = Seeded(seed);
            let known = Known::new(true);
            let mut nodes: BTreeMap<u64, (u64, Vec<u8>)> = BTreeMap::new();
            let mut handles: BTreeMap<u64, Handle> = BTreeMap::new();
            let mut next_fh = 1;
            let give = |nodes: &mut BTreeMap<u64, (u64, Vec<u8>)>, id| {
                nodes.entry(id).or_insert((0, Vec::new())).0 += 1;
            };
            for _ in 0..3000 {
                let id = 2 + random.below(60);
                match random.below(8) {
                    0..=2 => {
                        answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
                        give(&mut nodes, id);
                    }
                    3 => {
                        let ids: Vec<u64> =
                            (0..random.below(9)).map(|n| 2 + (id + n) % 60).collect();
                        let entries: Vec<_> = ids.iter().map(|&id| ("name", id)).collect();
                        list(&known, 4096, &listing(&entries));
                        ids.into_iter().for_each(|id| give(&mut nodes, id));
                    }
                    4 => {
                        let recipe = vec![random.below(256) as u8; random.below(100) as usize + 1];
                        if let Some(known_node) = nodes.get_mut(&id) {
                            known.hear(&node(id, &recipe)).expect("well formed");
                            known_node.1 = recipe;
                        }
                    }
                    5 => {
                        let entry = nodes.get_mut(&id).filter(|entry| entry.0 > 0);
                        let Some(entry) = entry else { continue };
                        let n = 1 + random.below(entry.0);
                        forget(&known, &[(id, n)]);
                        // Its recipe stays.
                        entry.0 -= n;
                    }
                    6 => {
                        open(&known, Opcode::Open, id, OFlags::RDWR, next_fh);
                        let flags = OFlags::RDWR.bits();
                        handles.insert(next_fh, Handle { node: id, flags, directory: false });
                        next_fh += 1;
                    }
                    _ => {
                        let fh = random.below(next_fh) + 1;
                        release(&known, Opcode::Release, fh, 0);
                        handles.remove(&fh);
                    }
                }
            }
            nodes.retain(|_, (count, _)| *count > 0);
            let (found_nodes, found_handles, end) = told(&known);
            assert_eq!(found_nodes, nodes, "seed {seed}");
            assert_eq!((found_handles, end.fh_max), (handles, next_fh - 1), "seed {seed}");
        }
    }

    fn resident_bytes() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace()
            .nth(1)
            .and_then(|kib| kib.parse().ok())
            .map_or(0, |kib: u64| kib << 10)
    }

    #[test]
    fn a_million_nodes() {
        const NODES: u64 = 1_000_000;
        let before = resident_bytes();
        let known = Known::new(true);
        let begun = Instant::now();
        for id in 2..NODES + 2 {
            known.hear(&node(id, &[id as u8; 90])).expect("well formed");
            answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
        }
        let filled = begun.elapsed();
        let held = resident_bytes().saturating_sub(before);
        let begun = Instant::now();
        let (mut records, mut bytes) = (0, 0);
        let restored = known.restore(|body| {
            (records, bytes) = (records + 1, bytes + body.len());
            Ok::<(), ()>(())
        });
        assert_eq!(restored.expect("sent").nodes, NODES);
        let told = begun.elapsed();
        println!(
            "{NODES} nodes with recipes of 90 bytes: {} MiB held, {filled:?} to come, {told:?} to \
             tell in {records} records of {} MiB",
            held >> 20,
            bytes >> 20
        );
        for id in 2..NODES + 2 {
            forget(&known, &[(id, 1)]);
        }
        assert_eq!(known.totals(), (0, 0));
        let room: usize = known.shards.iter().map(|s| lock(&s.0).nodes.capacity()).sum();
        assert!(room <= SHARDS * SMALL_TABLE * 2, "{room}");
    }

    /// What the next client finds.
    fn taken_over(keep: &Keep) -> (Keep, Known) {
        let file = keep.file().try_clone_to_owned().expect("dup");
        let (keep, places) = Keep::open(file).expect("ready");
        let key = keep.terms().key;
        (keep, Known::replayed(places.logs, key).expect("sound"))
    }

    fn kept() -> (Keep, Known) {
        let (keep, places) = Keep::create().expect("a file");
        let (known, key) = Known::kept(places.logs);
        keep.change(|terms| (terms.key, terms.lanes, terms.slots) = (key, 1, 1));
        keep.set_ready();
        (keep, known)
    }

    #[test]
    fn another_client_knows_the_same_whatever_was_done() {
        let (mut keep, mut known) = kept();
        let mut random = Keyed::new().hash_one(7);
        let mut next = |below: u64| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) % below
        };
        let mut seq = 0;
        for round in 0..40 {
            for _ in 0..4000 {
                seq += 1;
                let tag = tag_of(next(3) as u8, SlotUse { slot: next(4) as u16, seq });
                let id = 2 + next(300);
                match next(6) {
                    0 => known.hear(&node(id, &vec![7; next(200) as usize])).expect("sound"),
                    1 | 2 => known.answered(tag, Opcode::Lookup as u32, || None, 0, &entry(id)),
                    3 => known.forgotten(tag, ForgetOne { nodeid: id, nlookup: 2 }.as_bytes()),
                    4 => {
                        let asked = OpenIn { flags: 2, open_flags: 0 };
                        let asked = Asked::new(id, asked.as_bytes());
                        let opcode = Opcode::Open as u32;
                        known.answered(tag, opcode, || Some(asked), 0, &opened(1 + next(300)));
                    }
                    _ => {
                        release(&known, Opcode::Release, 1 + next(300), 0);
                        known.undo(tag);
                    }
                }
            }
            let before = told(&known);
            assert!(before.0.len() > 50 && before.1.len() > 50, "{round}");
            drop(known);
            (keep, known) = taken_over(&keep);
            assert_eq!(told(&known), before, "{round}");
        }
    }

    #[test]
    fn a_reply_that_did_not_get_through_is_taken_back_and_counts_when_it_comes_again() {
        let at = SlotUse { slot: 1, seq: 9 };
        let (tag, other) = (tag_of(0, at), tag_of(1, at));
        for rewrites in [false, true] {
            let (keep, known) = kept();
            let create = |known: &Known| {
                known.hear(&node(7, b"seven")).expect("sound");
                let asked = Asked::new(1, OpenIn { flags: 2, open_flags: 0 }.as_bytes());
                let body = [entry(7), opened(3)].concat();
                known.answered(tag, Opcode::Create as u32, || Some(asked), 0, &body);
            };
            create(&known);
            known.answered(other, Opcode::Lookup as u32, || None, 0, &entry(7));
            if rewrites {
                for _ in 0..100_000 {
                    known.answered(other + 1, Opcode::Lookup as u32, || None, 0, &entry(8));
                    known.forgotten(other + 2, ForgetOne { nodeid: 8, nlookup: 1 }.as_bytes());
                }
            }
            drop(known);
            let (keep, known) = taken_over(&keep);
            assert_eq!((counts(&known), known.totals().1), (vec![(7, 2)], 1));
            known.undo(tag);
            drop(known);
            // Killed again, before it came.
            let (keep, known) = taken_over(&keep);
            known.undo(tag);
            assert_eq!((counts(&known), known.totals().1), (vec![(7, 1)], 0), "{rewrites}");
            create(&known);
            drop(known);
            let (_keep, known) = taken_over(&keep);
            let (nodes, handles, _) = told(&known);
            assert_eq!(nodes[&7], (2, b"seven".to_vec()));
            assert_eq!(handles.keys().collect::<Vec<_>>(), [&3]);
        }
    }

    #[test]
    fn a_forget_whose_reply_was_half_done_is_ended_and_not_sent_again() {
        let (keep, known) = kept();
        let tag = tag_of(2, SlotUse { slot: 0, seq: 5 });
        for id in 2..40 {
            known.answered(1, Opcode::Lookup as u32, || None, 0, &entry(id));
            known.answered(1, Opcode::Lookup as u32, || None, 0, &entry(id));
        }
        let forgets: Vec<_> = (2..40).map(|nodeid| ForgetOne { nodeid, nlookup: 1 }).collect();
        assert!(!known.end_forget(tag, &forgets), "no reply has come");
        // As far as a killed client came.
        known.forgotten(tag, forgets[..20].as_bytes());
        drop(known);
        let (_keep, known) = taken_over(&keep);
        assert!(known.end_forget(tag, &forgets) && known.end_forget(tag, &forgets));
        assert_eq!(counts(&known), (2..40).map(|id| (id, 1)).collect::<Vec<_>>());
    }
}
