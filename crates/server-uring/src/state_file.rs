//! The file of one session in the state directory: its layout, its tickets, its tables.
//!
//! ```text
//!  0        4096                        + lanes * slots * 176        + lanes * slots * 64
//!  | Header | cells, lane after lane    | intents, lane after lane   |
//! ```
//!
//! A file holds hashes of the one or two tickets that are good for its session: tickets are
//! secrets, also of a daemon that left. Invariants: at any instruction the ticket that a guest
//! holds leads to the file; a lane's cells are one table's at a time; nothing in a file is an
//! index, a length or a name before it was compared. Which files there are is state_dir.rs.

use std::ffi::CString;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ringfs_wire::hello::Ticket;
use ringfs_wire::limits::{LANES_MAX, SHARE_NAME_BYTES_MAX, SLOTS_PER_LANE_MAX};
use ringfs_wire::slot::SlotUse;
use ringfs_wire::table::{Cell, SlotTable, rebuild};
use rustix::io::Errno;
use zerocopy::{FromBytes, FromZeros, IntoBytes, KnownLayout};

use crate::decide::Claims;
use crate::intent::{Intent, IntentCell};
use crate::sha256::sha256;
use crate::state_dir::Shared;
use ringfs_mapping::{Part, Parts};

const MAGIC: [u8; 8] = *b"ringfsst";
/// Of this layout, and of what the cells and intents in it mean.
const VERSION: u32 = 1;
pub(crate) const HEADER_BYTES: usize = 4096;
const SUBDIR_BYTES_MAX: usize = 2048;

/// What a session is, and must be again where another daemon goes on with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateTerms {
    /// The share's name.
    pub share: String,
    /// The directory below it.
    pub subdir: Vec<u8>,
    /// Lanes, each with as many slots.
    pub lanes: u16,
    /// Slots of each lane.
    pub slots: u16,
    /// Connections.
    pub conns: u16,
}

#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout)]
pub(crate) struct Header {
    magic: [u8; 8],
    version: u32,
    header_bytes: u16,
    cell_bytes: u16,
    intent_bytes: u16,
    lanes: u16,
    slots: u16,
    conns: u16,
    /// The host's boot: what a dead host left of a file on a disk may be torn.
    boot: [u8; 40],
    share_bytes: u16,
    subdir_bytes: u16,
    spare: [u8; 4],
    share: [u8; 256],
    subdir: [u8; SUBDIR_BYTES_MAX],
    /// SHA-256 of all above.
    proof: [u8; 32],
    /// Bit n: `tickets[n]` is good.
    pub(crate) good: AtomicU64,
    /// SHA-256 of tickets.
    tickets: [[AtomicU64; 4]; 2],
    /// When a daemon first found that nobody had it, in seconds of the wall clock; else 0.
    pub(crate) left_at: AtomicU64,
    rest: [u8; HEADER_BYTES - 2488],
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);
const _: () = assert!(SHARE_NAME_BYTES_MAX < 256);
const PROVED_BYTES: usize = std::mem::offset_of!(Header, proof);

pub(crate) type TicketHash = [u64; 4];

pub(crate) fn hash_of(ticket: Ticket) -> TicketHash {
    let hash = sha256(&ticket.0);
    let word = |n: usize| hash[8 * n..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    [word(0), word(1), word(2), word(3)]
}

/// All zero where the kernel does not tell.
fn boot() -> [u8; 40] {
    let mut boot = [0; 40];
    if let Ok(text) = std::fs::read("/proc/sys/kernel/random/boot_id") {
        boot.iter_mut().zip(text).for_each(|(to, byte)| *to = byte);
    }
    boot
}

impl Header {
    pub(crate) fn of(terms: &StateTerms, ticket: Ticket) -> Option<Header> {
        let mut header = Header::new_zeroed();
        header.magic = MAGIC;
        header.version = VERSION;
        header.header_bytes = HEADER_BYTES as u16;
        header.cell_bytes = size_of::<Cell>() as u16;
        header.intent_bytes = size_of::<IntentCell>() as u16;
        (header.lanes, header.slots, header.conns) = (terms.lanes, terms.slots, terms.conns);
        header.boot = boot();
        header.share.get_mut(..terms.share.len())?.copy_from_slice(terms.share.as_bytes());
        header.share_bytes = terms.share.len() as u16;
        header.subdir.get_mut(..terms.subdir.len())?.copy_from_slice(&terms.subdir);
        header.subdir_bytes = terms.subdir.len() as u16;
        header.proof = header.prove();
        header.tickets[0] = hash_of(ticket).map(AtomicU64::new);
        header.good = AtomicU64::new(1);
        Some(header)
    }

    fn prove(&mut self) -> [u8; 32] {
        sha256(&self.as_mut_bytes()[..PROVED_BYTES])
    }

    /// What the file is of, if it is one of ours, of this version and whole.
    pub(crate) fn terms(&mut self) -> Option<StateTerms> {
        let layout = (self.magic, self.version, usize::from(self.header_bytes));
        let sizes = (usize::from(self.cell_bytes), usize::from(self.intent_bytes));
        let proof = self.prove();
        let ours = layout == (MAGIC, VERSION, HEADER_BYTES)
            && sizes == (size_of::<Cell>(), size_of::<IntentCell>())
            && self.boot == boot()
            && self.proof == proof;
        let terms = StateTerms {
            share: String::from_utf8(self.share.get(..self.share_bytes.into())?.to_vec()).ok()?,
            subdir: self.subdir.get(..self.subdir_bytes.into())?.to_vec(),
            lanes: self.lanes,
            slots: self.slots,
            conns: self.conns,
        };
        (ours && terms.file_bytes().is_some()).then_some(terms)
    }

    pub(crate) fn tickets(&self) -> impl Iterator<Item = TicketHash> {
        let good = self.good.load(Ordering::Acquire);
        let each = self.tickets.iter().enumerate().filter(move |(n, _)| good & 1 << n != 0);
        each.map(|(_, words)| words.each_ref().map(|word| word.load(Ordering::Relaxed)))
    }
}

impl StateTerms {
    fn cells(&self) -> usize {
        usize::from(self.lanes) * usize::from(self.slots)
    }

    /// `None` for what no session can be.
    pub(crate) fn file_bytes(&self) -> Option<usize> {
        let (lanes, slots) = (usize::from(self.lanes), usize::from(self.slots));
        let can_be = (1..=LANES_MAX).contains(&lanes) && (1..=SLOTS_PER_LANE_MAX).contains(&slots);
        let each = size_of::<Cell>() + size_of::<IntentCell>();
        can_be.then(|| (HEADER_BYTES + self.cells() * each).next_multiple_of(HEADER_BYTES))
    }
}
/// A file's parts.
pub(crate) struct Opened {
    pub(crate) header: Part<Header>,
    pub(crate) lanes: Vec<Part<Cell>>,
    intents: Part<IntentCell>,
}

impl Opened {
    pub(crate) fn map(
        file: BorrowedFd<'_>,
        terms: &StateTerms,
        bytes: usize,
    ) -> Result<Opened, Errno> {
        let mut parts = Parts::of(file, bytes)?;
        let mut taken = || {
            let header = parts.take(1)?;
            let lanes = (0..terms.lanes).map(|_| parts.take(terms.slots.into()));
            let lanes = lanes.collect::<Option<_>>()?;
            Some(Opened { header, lanes, intents: parts.take(terms.cells())? })
        };
        taken().ok_or(Errno::INVAL)
    }
}

/// The file of one session.
pub struct StateFile {
    shared: Arc<Shared>,
    pub(crate) name: CString,
    pub(crate) header: Part<Header>,
    lanes: Mutex<Vec<Option<Part<Cell>>>>,
    intents: Part<IntentCell>,
    slots: u16,
    /// A dead daemon had it.
    pub adopted: bool,
    /// What of the host's files the requests that it left have been found to be the makers of.
    pub claims: Claims,
}

impl StateFile {
    pub(crate) fn new(
        shared: Arc<Shared>,
        name: CString,
        opened: Opened,
        terms: &StateTerms,
        adopted: bool,
    ) -> Arc<StateFile> {
        shared.ours.fetch_add(1, Ordering::Relaxed);
        let claims = Claims::default();
        if adopted {
            opened.lanes.iter().for_each(|lane| claims.of_replies(lane.as_ref()));
        }
        Arc::new(StateFile {
            shared,
            name,
            header: opened.header,
            lanes: Mutex::new(opened.lanes.into_iter().map(Some).collect()),
            intents: opened.intents,
            slots: terms.slots,
            adopted,
            claims,
        })
    }

    /// The table of a lane. Whoever had it before must have dropped it; else, and for a lane that
    /// there is not, it is one in memory alone.
    pub fn table(self: &Arc<Self>, lane: u8) -> SlotTable<Cells> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let part = lanes.get_mut(usize::from(lane)).and_then(Option::take);
        drop(lanes);
        debug_assert!(part.is_some(), "the table of lane {lane} is somebody's");
        match part {
            Some(part) => {
                let home = Arc::clone(self);
                SlotTable::adopt(Cells::Mapped(Mapped { part: Some(part), home, lane }))
            }
            None => Cells::table(self.slots, self.adopted),
        }
    }

    /// Where the intent of one use of a slot goes.
    pub fn intent(self: &Arc<Self>, lane: u8, at: SlotUse) -> Option<IntentPlace> {
        self.intent_cell(lane, at.slot)?;
        Some(IntentPlace { file: Arc::clone(self), lane, at })
    }

    /// Writes it at once.
    pub fn intend(&self, lane: u8, at: SlotUse, intent: &Intent) {
        if let Some(cell) = self.intent_cell(lane, at.slot) {
            cell.write(at.seq, intent);
        }
    }

    /// What a daemon that died had written of this use of a slot. `None`: it had not come so far.
    pub fn intended(&self, lane: u8, at: SlotUse) -> Option<Intent> {
        self.intent_cell(lane, at.slot)?.read(at.seq)
    }

    fn intent_cell(&self, lane: u8, slot: u16) -> Option<&IntentCell> {
        let lane = usize::from(lane) * usize::from(self.slots);
        let known = slot < self.slots;
        self.intents.as_ref().get(lane + usize::from(slot)).filter(|_| known)
    }

    /// Says which tickets are good from now on: the newest that the guest has used, which was good
    /// before, and one that it was given since. To be said before the guest is given it.
    pub fn set_tickets(&self, used: Ticket, unused: Option<Ticket>) {
        let Some(header) = self.header.as_ref().first() else { return };
        let used = hash_of(used);
        let is_used = |words: &[AtomicU64; 4]| {
            words.iter().zip(used).all(|(word, used)| word.load(Ordering::Relaxed) == used)
        };
        let kept = header.tickets.iter().position(is_used);
        debug_assert!(kept.is_some(), "a ticket that was not given");
        let Some(kept) = kept else { return };
        // One of the two is good at any instruction.
        header.good.store(1 << kept, Ordering::Release);
        let Some(unused) = unused else { return };
        for (word, hash) in header.tickets[1 - kept].iter().zip(hash_of(unused)) {
            // Not before the old one is no good.
            word.store(hash, Ordering::Release);
        }
        header.good.store(0b11, Ordering::Release);
    }

    /// The session has ended: nobody will ask for it.
    pub fn remove(&self) {
        self.shared.unlink(&self.name);
    }
}

impl Drop for StateFile {
    fn drop(&mut self) {
        self.shared.ours.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where the intent of a request goes that another thread runs.
pub struct IntentPlace {
    file: Arc<StateFile>,
    lane: u8,
    at: SlotUse,
}

impl IntentPlace {
    /// What a daemon before this one had written there.
    pub fn read(&self) -> Option<Intent> {
        self.file.intended(self.lane, self.at)
    }

    /// The session's.
    pub fn claims(&self) -> &Claims {
        &self.file.claims
    }

    /// To be written before the request runs, by whoever runs it.
    pub fn write(&self, intent: &Intent) {
        self.file.intend(self.lane, self.at, intent);
    }
}

/// Cells of a lane in a session's file, which has them again when this is dropped.
pub struct Mapped {
    part: Option<Part<Cell>>,
    home: Arc<StateFile>,
    lane: u8,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let mut lanes = self.home.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lane) = lanes.get_mut(usize::from(self.lane)) {
            *lane = self.part.take();
        }
    }
}

/// The memory of a lane's table.
pub enum Cells {
    /// This process's alone.
    Owned(Box<[Cell]>),
    /// The file's.
    Mapped(Mapped),
}

impl Cells {
    /// A table without a file.
    pub fn table(slots: u16, rebuilt: bool) -> SlotTable<Cells> {
        let mut cells: Box<[Cell]> = (0..slots).map(|_| Cell::new_zeroed()).collect();
        if rebuilt {
            rebuild(&mut cells);
        }
        SlotTable::of(Cells::Owned(cells))
    }
}

impl AsRef<[Cell]> for Cells {
    fn as_ref(&self) -> &[Cell] {
        match self {
            Cells::Owned(cells) => cells,
            Cells::Mapped(mapped) => mapped.part.as_ref().map_or(&[], Part::as_ref),
        }
    }
}

impl AsMut<[Cell]> for Cells {
    fn as_mut(&mut self) -> &mut [Cell] {
        match self {
            Cells::Owned(cells) => cells,
            Cells::Mapped(mapped) => mapped.part.as_mut().map_or(&mut [], Part::as_mut),
        }
    }
}
