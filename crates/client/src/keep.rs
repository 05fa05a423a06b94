//! What a client leaves to the one that comes after it: a memory file, mapped, that the keeper
//! (keeper.rs) holds besides the session's fds. takeover.rs reads it.
//!
//! ```text
//! words     state: READY once the mount can be taken over; turn: which of the terms count
//! terms     twice
//! lane      each: a cell a slot, the forgets that wait, the forgets in flight of each slot
//! shards    of what the kernel knows: each a log (journal.rs)
//! ```
//!
//! Invariant: whatever instruction is a client's last, what it leaves is right. A cell's word, the
//! turn and a log's word are each stored last, after what they tell of. It must not do I/O: a
//! request costs stores, no system call.

use crate::journal::{HALF_BYTES, Half, Log};
use crate::known::SHARDS;
use crate::lane::lock;
use fuser_fork::init::Negotiated;
use ringfs_mapping::{Part, Parts};
use ringfs_wire::abi::{ForgetOne, InitOut};
use ringfs_wire::hello::Welcome;
use ringfs_wire::limits::{FORGETS_PER_RECORD_MAX, LANES_MAX, SLOTS_PER_LANE_MAX};
use ringfs_wire::slot::SlotUse;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Names this layout, and this version of the program: what another one has left cannot be taken
/// over, as the service manager may start one that was installed meanwhile.
const READY: u64 = {
    let sizes = [LAYOUT, size_of::<Terms>() as u64, size_of::<Cell>() as u64, FILE_BYTES as u64];
    let (mut hash, mut at) = (hash_of(b"ringfs", FNV_START), 0);
    while at < sizes.len() {
        hash = hash_of(&sizes[at].to_le_bytes(), hash);
        at += 1;
    }
    hash_of(env!("CARGO_PKG_VERSION").as_bytes(), hash)
};
/// One more with each change of what a word means.
const LAYOUT: u64 = 4;
/// FNV-1a of 64 bits.
const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

const fn hash_of(bytes: &[u8], start: u64) -> u64 {
    let (mut hash, mut at) = (start, 0);
    while at < bytes.len() {
        hash = (hash ^ bytes[at] as u64).wrapping_mul(FNV_PRIME);
        at += 1;
    }
    hash
}

/// Forgets that wait, of one lane; what comes beyond is forgotten with the client.
const WAITING_MAX: usize = 1 << 17;
const PAGE_BYTES: usize = 4096;

/// What all lanes have in common, and what the next client cannot find out.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Terms {
    /// The newest.
    pub welcome: Welcome,
    pub out: InitOut,
    pub served: InitOut,
    pub flags: u64,
    pub offered: u64,
    /// The key by which nodes and handles are spread over shards.
    pub key: [u64; 2],
    pub since_unix_s: u64,
    /// 0 where there is none.
    pub mount_id: u32,
    pub dev_minor: u32,
    pub lanes: u32,
    pub slots: u32,
    /// Those of the first HELLO.
    pub asked_lanes: u32,
    /// As `connector::Terms` has them.
    pub hellos: u32,
    pub takeovers: u32,
    /// As `connector::Terms` has them.
    pub joined: u32,
    pub is_untold: u32,
    /// The connection whose handshake has begun and not ended, plus 1; 0: none.
    pub trying: u32,
}

impl Terms {
    /// INIT, as it was agreed.
    pub fn set_init(&mut self, agreed: &Negotiated) {
        (self.out, self.served) = (agreed.out, agreed.served);
        (self.flags, self.offered) = (agreed.flags, agreed.offered);
    }

    /// The same, given back.
    pub fn init(&self) -> Negotiated {
        let Terms { out, served, flags, offered, .. } = *self;
        Negotiated { out, served, flags, offered, dropped: 0 }
    }
}

/// How a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Free; the seq is that of its next use.
    Free,
    /// A request whose reply has not come.
    Request,
    /// Its reply is on its way to the kernel.
    Delivering,
    /// Node ids on their way back.
    Forget,
    /// Answered here.
    Abandoned,
    /// As [`State::Request`], sent before the session was rebuilt.
    Unsure,
}

/// One slot.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes)]
pub struct Cell {
    /// `seq | opcode << 32 | state << 48`
    word: AtomicU64,
    /// The kernel's id of a request; of a FORGET how many forgets, and the move that brought them.
    other: AtomicU64,
}

impl Cell {
    /// State, seq, opcode and the other number.
    pub fn load(&self) -> (State, u32, u32, u64) {
        let word = self.word.load(Ordering::Acquire);
        let state = match word >> 48 {
            1 => State::Request,
            2 => State::Delivering,
            3 => State::Forget,
            4 => State::Abandoned,
            5 => State::Unsure,
            _ => State::Free,
        };
        (state, word as u32, (word >> 32) as u32 & 0xffff, self.other.load(Ordering::Acquire))
    }

    fn store(&self, state: State, seq: u32, opcode: u32) {
        let word = u64::from(seq) | u64::from(opcode & 0xffff) << 32 | (state as u64) << 48;
        self.word.store(word, Ordering::Release);
    }
}

/// Forgets that wait, and those in flight.
#[derive(Debug)]
struct Forgets {
    /// `moves << 32 | waiting`
    word: Part<AtomicU64>,
    waiting: Part<ForgetOne>,
    in_flight: Part<ForgetOne>,
}

/// What one lane leaves.
#[derive(Debug)]
pub struct LaneKeep {
    cells: Part<Cell>,
    forgets: Mutex<Forgets>,
}

impl LaneKeep {
    /// One slot.
    pub fn cell(&self, slot: u16) -> &Cell {
        &self.cells.as_ref()[usize::from(slot)]
    }

    /// A request has the slot.
    pub fn claimed(&self, at: SlotUse, unique: u64, opcode: u32) {
        self.claimed_as(State::Request, at, unique, opcode);
    }

    /// The same, of one that a client before has left.
    pub fn claimed_as(&self, state: State, at: SlotUse, unique: u64, opcode: u32) {
        let cell = self.cell(at.slot);
        cell.other.store(unique, Ordering::Release);
        cell.store(state, at.seq, opcode);
    }

    /// The session is rebuilt, and the request is from before.
    pub fn doubted(&self, at: SlotUse, opcode: u32) {
        self.cell(at.slot).store(State::Unsure, at.seq, opcode);
    }

    /// The request is answered here, or never will be.
    pub fn abandoned(&self, at: SlotUse) {
        self.cell(at.slot).store(State::Abandoned, at.seq, 0);
    }

    /// The reply goes to the kernel next.
    pub fn delivering(&self, at: SlotUse) {
        self.cell(at.slot).store(State::Delivering, at.seq, 0);
    }

    /// The request is over; `next`: whether the slot's next use is another one.
    pub fn freed(&self, at: SlotUse, next: bool) {
        self.cell(at.slot).store(State::Free, at.seq.wrapping_add(u32::from(next)), 0);
    }

    /// So many forgets were waiting, and now all of these are.
    pub fn waiting(&self, before: usize, forgets: &[ForgetOne]) {
        let mut keep = lock(&self.forgets);
        let end = forgets.len().min(WAITING_MAX);
        if before < end {
            keep.waiting.as_mut()[before..end].copy_from_slice(&forgets[before..end]);
        }
        let word = &keep.word.as_ref()[0];
        word.store(word.load(Ordering::Relaxed) >> 32 << 32 | end as u64, Ordering::Release);
    }

    /// The last of the forgets that wait have got a slot; `rest` still wait.
    pub fn forgets_claimed(&self, at: SlotUse, forgets: &[ForgetOne], rest: usize) {
        let mut keep = lock(&self.forgets);
        let moves = (keep.word.as_ref()[0].load(Ordering::Relaxed) >> 32).wrapping_add(1);
        let start = usize::from(at.slot) * FORGETS_PER_RECORD_MAX;
        keep.in_flight.as_mut()[start..start + forgets.len()].copy_from_slice(forgets);
        let cell = self.cell(at.slot);
        let rest = rest.min(WAITING_MAX);
        // 12 bits, 20 bits, 32 bits.
        let other = forgets.len() as u64 | (rest as u64) << 12 | moves << 32;
        cell.other.store(other, Ordering::Release);
        cell.store(State::Forget, at.seq, 0);
        keep.word.as_ref()[0].store(moves << 32 | rest as u64, Ordering::Release);
    }

    /// The forgets of a slot in that state.
    pub fn forgets_of(&self, slot: u16) -> Vec<ForgetOne> {
        let (_, _, _, other) = self.cell(slot).load();
        let len = (other as usize & 0xfff).min(FORGETS_PER_RECORD_MAX);
        let start = usize::from(slot) * FORGETS_PER_RECORD_MAX;
        lock(&self.forgets).in_flight.as_ref()[start..start + len].to_vec()
    }

    /// The forgets that wait. A move that was cut short, between the slot's word and this one, is
    /// ended first.
    pub fn forgets_waiting(&self) -> Vec<ForgetOne> {
        let keep = lock(&self.forgets);
        let word = &keep.word.as_ref()[0];
        let (mut len, moves) = {
            let word = word.load(Ordering::Acquire);
            (word as u32 as usize, word >> 32)
        };
        for cell in self.cells.as_ref() {
            let (state, _, _, other) = cell.load();
            if state == State::Forget && other >> 32 == moves.wrapping_add(1) & 0xffff_ffff {
                len = (other >> 12) as usize & 0xf_ffff;
                word.store((moves + 1) << 32 | len as u64, Ordering::Release);
            }
        }
        keep.waiting.as_ref()[..len.min(WAITING_MAX)].to_vec()
    }
}

const _: () = assert!(FORGETS_PER_RECORD_MAX < 1 << 12 && WAITING_MAX < 1 << 20);

/// The file and its parts.
#[derive(Debug)]
pub struct Keep {
    file: Arc<OwnedFd>,
    words: Part<AtomicU64>,
    terms: Mutex<Part<Terms>>,
}

/// The parts for the lanes, and the logs for what is known.
#[derive(Debug)]
pub struct Places {
    /// One a lane.
    pub lanes: Vec<LaneKeep>,
    /// One a shard.
    pub logs: Vec<Log>,
}

/// Cuts a mapping, and knows where it is.
struct Cutter {
    parts: Parts,
    at: usize,
}

impl Cutter {
    fn take<T: FromBytes + IntoBytes>(&mut self, len: usize) -> Result<Part<T>, Errno> {
        self.at += len * size_of::<T>();
        self.parts.take(len).ok_or(Errno::INVAL)
    }

    fn align(&mut self) -> Result<(), Errno> {
        self.take::<u8>(self.at.next_multiple_of(PAGE_BYTES) - self.at).map(drop)
    }
}

const LANE_BYTES: usize = SLOTS_PER_LANE_MAX * size_of::<Cell>()
    + 8
    + WAITING_MAX * size_of::<ForgetOne>()
    + SLOTS_PER_LANE_MAX * FORGETS_PER_RECORD_MAX * size_of::<ForgetOne>();
/// Virtual: a page costs memory when it is first written.
const FILE_BYTES: usize =
    LANES_MAX * LANE_BYTES + SHARDS * (PAGE_BYTES + 2 * HALF_BYTES) + 16 * PAGE_BYTES;

/// Nobody is to run it: where `vm.memfd_noexec` is 2 no other can be had. Before Linux 6.3 there is
/// no such flag.
fn memory_file() -> Result<OwnedFd, Errno> {
    match memfd_create("ringfs", MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => memfd_create("ringfs", MemfdFlags::CLOEXEC),
        made => made,
    }
}

impl Keep {
    /// A new file.
    pub fn create() -> Result<(Keep, Places), Errno> {
        // To go beyond it would be a signal.
        let limit = getrlimit(Resource::Fsize).current;
        if limit.is_some_and(|limit| limit < FILE_BYTES as u64) {
            return Err(Errno::FBIG);
        }
        let file = memory_file()?;
        ftruncate(&file, FILE_BYTES as u64)?;
        Keep::map(file)
    }

    /// That of another client, which is no more; `INVAL`: nothing can be taken over by it.
    pub fn open(file: OwnedFd) -> Result<(Keep, Places), Errno> {
        if rustix::fs::fstat(&file)?.st_size != FILE_BYTES as i64 {
            return Err(Errno::INVAL);
        }
        let (keep, places) = Keep::map(file)?;
        let terms = keep.terms();
        let fits = terms.lanes as usize <= LANES_MAX && terms.slots as usize <= SLOTS_PER_LANE_MAX;
        match keep.is_ready() && fits && terms.lanes > 0 && terms.slots > 0 {
            true => Ok((keep, places)),
            false => Err(Errno::INVAL),
        }
    }

    /// The identity of the mount that a client has left, if its file tells one.
    pub fn mounted_as(file: &OwnedFd) -> Option<(u32, u32)> {
        let (keep, _) = Keep::open(file.try_clone().ok()?).ok()?;
        let Terms { mount_id, dev_minor, .. } = keep.terms();
        (mount_id != 0).then_some((mount_id, dev_minor))
    }

    fn map(file: OwnedFd) -> Result<(Keep, Places), Errno> {
        let mut cut = Cutter { parts: Parts::of(file.as_fd(), FILE_BYTES)?, at: 0 };
        let file = Arc::new(file);
        let (words, terms) = (cut.take(2)?, cut.take(2)?);
        let lane = |cut: &mut Cutter| -> Result<LaneKeep, Errno> {
            let cells = cut.take(SLOTS_PER_LANE_MAX)?;
            let (word, waiting) = (cut.take(1)?, cut.take(WAITING_MAX)?);
            let in_flight = cut.take(SLOTS_PER_LANE_MAX * FORGETS_PER_RECORD_MAX)?;
            Ok(LaneKeep { cells, forgets: Mutex::new(Forgets { word, waiting, in_flight }) })
        };
        let lanes = (0..LANES_MAX).map(|_| lane(&mut cut)).collect::<Result<_, _>>()?;
        let log = |cut: &mut Cutter| -> Result<Log, Errno> {
            let word = cut.take(1)?;
            cut.align()?;
            let mut half = || -> Result<Half, Errno> {
                Ok(Half { offset: cut.at as u64, bytes: cut.take(HALF_BYTES)? })
            };
            let halves = [half()?, half()?];
            Ok(Log::new(Arc::clone(&file), word, halves))
        };
        let logs = (0..SHARDS).map(|_| log(&mut cut)).collect::<Result<_, _>>()?;
        Ok((Keep { file, words, terms: Mutex::new(terms) }, Places { lanes, logs }))
    }

    fn state(&self) -> &AtomicU64 {
        &self.words.as_ref()[0]
    }

    fn turn(&self) -> &AtomicU64 {
        &self.words.as_ref()[1]
    }

    /// The file, for whoever holds it.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// From now on another client can take over.
    pub fn set_ready(&self) {
        self.state().store(READY, Ordering::Release);
    }

    fn is_ready(&self) -> bool {
        self.state().load(Ordering::Acquire) == READY
    }

    /// The terms in force.
    pub fn terms(&self) -> Terms {
        lock(&self.terms).as_ref()[self.turn().load(Ordering::Acquire) as usize & 1]
    }

    /// Changes them, as a whole.
    pub fn change(&self, change: impl FnOnce(&mut Terms)) {
        let mut terms = lock(&self.terms);
        let turn = self.turn().load(Ordering::Acquire);
        let mut next = terms.as_ref()[turn as usize & 1];
        change(&mut next);
        terms.as_mut()[turn.wrapping_add(1) as usize & 1] = next;
        self.turn().store(turn.wrapping_add(1), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reopen(keep: &Keep) -> (Keep, Places) {
        let file = keep.file().try_clone_to_owned().expect("dup");
        Keep::open(file).expect("ready and sound")
    }

    fn forget(nodeid: u64) -> ForgetOne {
        ForgetOne { nodeid, nlookup: 1 }
    }

    #[test]
    fn nobody_can_run_the_file() {
        let has_flag = memfd_create("x", MemfdFlags::NOEXEC_SEAL).is_ok();
        let (keep, _places) = Keep::create().expect("a file");
        let mode = rustix::fs::fstat(keep.file()).expect("stat").st_mode;
        assert_eq!(mode & 0o111 == 0, has_flag, "{mode:o}");
    }

    #[test]
    fn nothing_is_taken_over_before_it_is_ready() {
        let (keep, _places) = Keep::create().expect("a file");
        let open = || Keep::open(keep.file().try_clone_to_owned().expect("dup")).err();
        assert_eq!(open(), Some(Errno::INVAL));
        keep.change(|terms| (terms.lanes, terms.slots) = (2, 128));
        assert_eq!(open(), Some(Errno::INVAL));
        keep.set_ready();
        assert_eq!(open(), None);
        keep.state().store(READY + 1, Ordering::Relaxed);
        assert_eq!(open(), Some(Errno::INVAL), "another version's");
        keep.set_ready();
        keep.change(|terms| terms.lanes = 9);
        assert_eq!(open(), Some(Errno::INVAL));
        let other = memfd_create("x", MemfdFlags::CLOEXEC).expect("a file");
        assert_eq!(Keep::open(other).err(), Some(Errno::INVAL));
    }

    #[test]
    fn what_a_lane_puts_down_is_there_for_the_next_client() {
        let (keep, mut places) = Keep::create().expect("a file");
        keep.change(|terms| (terms.lanes, terms.slots, terms.joined) = (1, 8, 5));
        keep.set_ready();
        let lane = places.lanes.remove(0);
        let at = |slot, seq| SlotUse { slot, seq };
        lane.claimed(at(0, 3), 77, 15);
        lane.claimed(at(1, 0), 79, 16);
        lane.delivering(at(1, 0));
        lane.claimed(at(2, u32::MAX), 81, 16);
        lane.freed(at(2, u32::MAX), true);
        lane.claimed(at(3, 1), 83, 16);
        lane.abandoned(at(3, 1));
        let forgets: Vec<_> = (2..10).map(forget).collect();
        lane.waiting(0, &forgets[..3]);
        lane.waiting(3, &forgets);
        lane.forgets_claimed(at(4, 9), &forgets[5..], 5);
        drop(lane);
        let (keep, places) = reopen(&keep);
        assert_eq!(keep.terms().joined, 5);
        let lane = &places.lanes[0];
        let cells: Vec<_> = (0..5).map(|slot| lane.cell(slot).load()).collect();
        let told = |(state, seq, ..): (State, u32, u32, u64)| (state, seq);
        assert_eq!(cells[0], (State::Request, 3, 15, 77));
        assert_eq!(told(cells[1]), (State::Delivering, 0));
        assert_eq!(told(cells[2]), (State::Free, 0));
        assert_eq!((told(cells[3]), cells[3].3), ((State::Abandoned, 1), 83));
        assert_eq!(told(cells[4]), (State::Forget, 9));
        assert_eq!(lane.forgets_of(4), forgets[5..]);
        assert_eq!(lane.forgets_waiting(), forgets[..5]);
    }

    #[test]
    fn forgets_whose_move_was_cut_short_are_not_there_twice() {
        let (_keep, places) = Keep::create().expect("a file");
        let lane = &places.lanes[0];
        let forgets: Vec<_> = (2..10).map(forget).collect();
        lane.waiting(0, &forgets);
        let before = lock(&lane.forgets).word.as_ref()[0].load(Ordering::Relaxed);
        lane.forgets_claimed(SlotUse { slot: 1, seq: 0 }, &forgets[6..], 6);
        // Killed before the last store.
        lock(&lane.forgets).word.as_ref()[0].store(before, Ordering::Relaxed);
        assert_eq!(lane.forgets_waiting(), forgets[..6]);
        assert_eq!(lane.forgets_waiting(), forgets[..6]);
        assert_eq!(lane.forgets_of(1), forgets[6..]);
        // Killed before the slot's word: it is free, and all of them wait.
        lane.freed(SlotUse { slot: 1, seq: 0 }, false);
        lane.waiting(0, &forgets);
        assert_eq!(lane.forgets_waiting(), forgets);
    }
}
