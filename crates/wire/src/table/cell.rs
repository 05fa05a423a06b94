//! One slot's cell: what became of its last request, and the reply that is kept.
//!
//! Plain bytes, so that a table can lie in a file and outlive connections and the daemon, which may
//! be killed at any instruction. Invariant: what the next one must not find half done is one store
//! of the mark, and the reply is whole before a mark says so. `table.rs` decides what follows.

use crate::abi;
use std::sync::atomic::{AtomicU64, Ordering};
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// The longest reply that is kept: an entry and an open handle, and some room.
pub const REPLY_KEPT_BYTES_MAX: usize = 160;

const _: () =
    assert!(REPLY_KEPT_BYTES_MAX >= size_of::<abi::EntryOut>() + size_of::<abi::OpenOut>());

pub(super) const EIO: u32 = 5;
pub(super) const EINTR: u32 = 4;

/// One slot. All zero: never used.
///
/// ```text
///  0      8      12      16
///  | mark | link | spare | reply ... 176
/// ```
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout)]
pub struct Cell {
    /// A [`Mark`].
    mark: AtomicU64,
    /// The connection, by its number in this lane's life, on which the request came last.
    pub(super) link: u32,
    spare: u32,
    reply: [u8; REPLY_KEPT_BYTES_MAX],
}

const _: () = assert!(size_of::<Cell>() == 176);

/// What a cell says, but for the bytes of its reply: in 64 bits from the lowest seq 32, errno 12,
/// length of the reply 8, opcode 8, state 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// Of the request that is running, or was the last; while fresh, of the first.
    pub(super) seq: u32,
    pub(super) errno: u32,
    pub(super) len: usize,
    /// Its low byte: all opcodes that we know are below, and one that we do not is not kept apart.
    pub(super) opcode: u32,
    pub(super) state: State,
}

const OPCODE_UNKNOWN: u32 = 0xff;
const _: () = assert!(REPLY_KEPT_BYTES_MAX <= 0xff);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// Never used.
    Fresh = 0,
    /// Its request is being executed.
    Running = 1,
    /// The same, and nobody will take the reply.
    Abandoned = 2,
    /// Its request is over, and the reply is here.
    Kept = 3,
    /// Its request is over, and may run again.
    Rerun = 4,
    /// Its request was running when its daemon died.
    Orphan = 5,
    /// Its request is over, and what its reply gave died with its daemon.
    Lost = 6,
    /// The same, and it is being given anew.
    Again = 7,
    /// Not used since the session was rebuilt; the guest knows how often it was before.
    Rebuilt = 8,
    /// The same; and its next request may have run for a daemon of which nothing is known.
    Unsure = 9,
}

impl Mark {
    pub(super) fn running(seq: u32, opcode: u32) -> Mark {
        Mark { seq, errno: 0, len: 0, opcode: opcode.min(OPCODE_UNKNOWN), state: State::Running }
    }

    fn pack(self) -> u64 {
        // No errno of the kernel is longer.
        u64::from(self.seq)
            | u64::from(self.errno & 0xfff) << 32
            | (self.len as u64) << 44
            | u64::from(self.opcode) << 52
            | (self.state as u64) << 60
    }

    /// Numbers that cannot be can only come from a damaged file: nothing may run on such a slot.
    fn unpack(bits: u64) -> Option<Mark> {
        use State::*;
        let states = [Fresh, Running, Abandoned, Kept, Rerun, Orphan, Lost, Again, Rebuilt, Unsure];
        let mark = Mark {
            seq: bits as u32,
            errno: (bits >> 32) as u32 & 0xfff,
            len: (bits >> 44) as usize & 0xff,
            opcode: (bits >> 52) as u32 & 0xff,
            state: *states.get((bits >> 60) as usize)?,
        };
        (mark.len <= REPLY_KEPT_BYTES_MAX).then_some(mark)
    }

    pub(super) fn is_busy(self) -> bool {
        matches!(self.state, State::Running | State::Abandoned | State::Again)
    }
}

impl Cell {
    pub(super) fn mark(&self) -> Option<Mark> {
        Mark::unpack(self.mark.load(Ordering::Relaxed))
    }

    /// With all that was written before.
    pub(super) fn set(&mut self, mark: Mark) {
        self.mark.store(mark.pack(), Ordering::Release);
    }

    pub(super) fn keep(&mut self, mark: Mark, errno: u32, body: &[u8]) {
        // None that is kept is longer (a test of dispatch.rs says so). Better an error than half.
        let (errno, body) =
            if body.len() > REPLY_KEPT_BYTES_MAX { (EIO, &[][..]) } else { (errno, body) };
        self.reply[..body.len()].copy_from_slice(body);
        self.set(Mark { errno, len: body.len(), state: State::Kept, ..mark });
    }

    pub(super) fn reply(&self, mark: Mark) -> &[u8] {
        self.reply.get(..mark.len).unwrap_or_default()
    }
}

/// The cells of one lane, of a table that its daemon left: whether all say what can be.
pub fn are_whole(cells: &[Cell]) -> bool {
    cells.iter().all(|cell| cell.mark().is_some())
}

/// Makes cells that are all zero those of a session that is rebuilt without what another daemon
/// kept of them: whichever use of a slot comes first is the next.
pub fn rebuild(cells: &mut [Cell]) {
    for cell in cells {
        cell.set(Mark { state: State::Rebuilt, ..Mark::running(0, 0) });
    }
}

/// The replies in cells of requests that succeeded, with their opcodes.
pub fn replies(cells: &[Cell]) -> impl Iterator<Item = (u32, &[u8])> {
    cells.iter().filter_map(|cell| {
        let mark = cell.mark()?;
        let over = matches!(mark.state, State::Kept | State::Lost | State::Again);
        (over && mark.errno == 0).then(|| (mark.opcode, cell.reply(mark)))
    })
}
#[cfg(test)]
mod tests {
    use super::super::SlotTable;
    use super::*;
    use crate::abi::Opcode;
    use zerocopy::FromZeros;

    const MKDIR: u32 = Opcode::Mkdir as u32;

    /// What the file holds at each store of a request's life; the reply is torn on purpose.
    #[test]
    fn killed_at_any_store_a_cell_is_idle_running_or_whole() {
        let reply: &[u8] = &[5; 128];
        let mut cell = Cell::new_zeroed();
        cell.set(Mark { state: State::Kept, len: 16, ..Mark::running(8, MKDIR) });
        cell.reply[..16].fill(1);
        let mut states = Vec::new();
        let mut see = |cell: &mut Cell| {
            let left = Cell::read_from_bytes(cell.as_mut_bytes()).expect("a cell");
            let table = SlotTable::adopt([left]);
            let mark = table.cells[0].mark().expect("a mark that can be");
            states.push((mark.seq, format!("{:?}", mark.state)));
            if mark.state == State::Lost {
                let whole = if mark.seq == 8 { &[1; 16][..] } else { reply };
                assert_eq!(table.cells[0].reply(mark), whole);
            }
        };
        see(&mut cell);
        cell.link = 4;
        see(&mut cell);
        cell.set(Mark::running(9, MKDIR));
        see(&mut cell);
        let mark = cell.mark().expect("running");
        for n in 1..=reply.len() {
            cell.reply[..n].copy_from_slice(&reply[..n]);
            see(&mut cell);
        }
        cell.keep(mark, 0, reply);
        see(&mut cell);
        states.dedup();
        let expected = [(8, "Lost"), (9, "Orphan"), (9, "Lost")];
        assert_eq!(states, expected.map(|(seq, state)| (seq, state.to_owned())));
    }

    #[test]
    fn a_mark_is_what_was_packed() {
        for state in 0..16 {
            let state = Mark::unpack(state << 60).map(|mark| mark.state);
            for (seq, errno, len, opcode) in [(0, 0, 0, 0), (u32::MAX, 0xfff, 160, 0xff)] {
                let Some(state) = state else { continue };
                let mark = Mark { seq, errno, len, opcode, state };
                assert_eq!(Mark::unpack(mark.pack()), Some(mark));
            }
        }
        assert_eq!(Mark::unpack(10 << 60), None);
        assert_eq!(Mark::unpack(161 << 44), None, "longer than what is kept");
    }
}
