//! The daemon's half of the session table: what became of the last request of each slot.
//!
//! Each request runs once, however often it comes: a slot's cell says that it is running, keeps its
//! reply, or says that it may run again. A cell outlives connections, and is plain bytes, so that a
//! table can lie in a file and outlive the daemon. Invariant: a reply leaves only by a connection
//! on which its request came or was named, and once at most by each.

use crate::abi::{self, Opcode};
use crate::slot::{SlotError, SlotUse};
use std::collections::HashMap;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The longest reply that is kept: an entry and an open handle, and some room.
pub const REPLY_KEPT_BYTES_MAX: usize = 160;

const _: () =
    assert!(REPLY_KEPT_BYTES_MAX >= size_of::<abi::EntryOut>() + size_of::<abi::OpenOut>());

const EIO: u32 = 5;
const EINTR: u32 = 4;

/// One slot. All zero: never used.
///
/// ```text
///  0      4      8        12      16    18      19      20      24
///  | seq  | link | opcode | errno | len | state | spare | spare | reply ... 184
/// ```
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Cell {
    /// Of the request that is running, or was the last; while fresh, of the first.
    seq: u32,
    /// The connection, by its number in this lane's life, on which the request came last.
    link: u32,
    opcode: u32,
    /// With `reply[..len]` the kept reply.
    errno: u32,
    len: u16,
    /// One of [`State`].
    state: u8,
    spare: u8,
    spare2: u32,
    reply: [u8; REPLY_KEPT_BYTES_MAX],
}

const _: () = assert!(size_of::<Cell>() == 184);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum State {
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
    /// Not used since the session was rebuilt; the guest knows how often it was before.
    Rebuilt = 5,
}

impl Cell {
    /// A number that none has can only come from a damaged file: nothing may run on such a slot.
    fn state(&self) -> Option<State> {
        use State::*;
        [Fresh, Running, Abandoned, Kept, Rerun, Rebuilt]
            .into_iter()
            .find(|&s| s as u8 == self.state)
    }

    fn is_busy(&self) -> bool {
        matches!(self.state(), Some(State::Running | State::Abandoned))
    }

    fn keep(&mut self, errno: u32, body: &[u8]) {
        // None that is kept is longer (a test of dispatch.rs says so). Better an error than half.
        let (errno, body) =
            if body.len() > REPLY_KEPT_BYTES_MAX { (EIO, &[][..]) } else { (errno, body) };
        self.reply[..body.len()].copy_from_slice(body);
        self.errno = errno;
        self.len = body.len() as u16;
        self.state = State::Kept as u8;
    }
}

/// What to do with a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Begin {
    /// It is new: execute it.
    Execute,
    /// It is running already: its reply will leave by this connection.
    Running,
    /// It is over: send [`SlotTable::kept`].
    Replay,
    /// It is over and may run again, once this is given back.
    Rerun(Given),
}

/// What to do with a reply.
#[derive(Debug, PartialEq, Eq)]
pub enum Fate {
    /// It leaves by the connection that there is.
    Send,
    /// Nobody there has asked for it: it stays in the table.
    Keep,
    /// Nobody wants it: this is to be given back, and where `send` says so the answer is EINTR.
    GiveBack {
        /// What the reply gave.
        given: Given,
        /// Whether an EINTR is sent.
        send: bool,
    },
}

/// What to do with an ABANDON.
#[derive(Debug, PartialEq, Eq)]
pub enum Abandon {
    /// The request never came, or is over: answer EINTR, and give this back.
    Over(Given),
    /// It is running: the answer comes when it ends.
    Running,
    /// Its reply has left by this very connection, and counts.
    Void,
}

/// What a reply gives that must be given back some day.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// One lookup of each.
    pub nodes: Vec<u64>,
    /// An open file or directory.
    pub handle: Option<u64>,
}

impl Given {
    /// Reads a reply without error.
    pub fn by(opcode: u32, body: &[u8]) -> Given {
        let opened = |body: &[u8]| abi::OpenOut::read_from_prefix(body).ok().map(|(o, _)| o.fh);
        let mut given = Given::default();
        match Opcode::from_u32(opcode) {
            Some(
                Opcode::Lookup | Opcode::Symlink | Opcode::Mknod | Opcode::Mkdir | Opcode::Link,
            ) => given.entry(body),
            Some(Opcode::Create | Opcode::Tmpfile) => {
                given.entry(body);
                given.handle = body.get(size_of::<abi::EntryOut>()..).and_then(opened);
            }
            Some(Opcode::Open | Opcode::Opendir) => given.handle = opened(body),
            Some(Opcode::Readdirplus) => given.entries(body),
            Some(_) | None => {}
        }
        given
    }

    /// Node id 0 says that there is no such name.
    fn entry(&mut self, body: &[u8]) {
        let entry = abi::EntryOut::read_from_prefix(body).ok();
        self.nodes.extend(entry.map(|(entry, _)| entry.nodeid).filter(|&id| id != 0));
    }

    fn entries(&mut self, mut body: &[u8]) {
        while let Ok((plus, rest)) = abi::DirentPlus::read_from_prefix(body) {
            self.nodes.extend(Some(plus.entry_out.nodeid).filter(|&id| id != 0));
            let name = (plus.dirent.namelen as usize).next_multiple_of(8);
            body = rest.get(name..).unwrap_or_default();
        }
    }

    /// Nothing at all.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.handle.is_none()
    }
}

/// The slots of one lane.
pub struct SlotTable {
    cells: Box<[Cell]>,
    /// Number of the connection that the lane has, or will have next.
    link: u32,
    in_use: usize,
    /// What the last READDIRPLUS of a slot gave; bounded by the size of its reply.
    given: HashMap<u16, Given>,
}

impl SlotTable {
    /// `granted` slots, all at their first use.
    pub fn new(granted: u16) -> SlotTable {
        let cells = vec![Cell::new_zeroed(); usize::from(granted)];
        SlotTable { cells: cells.into(), link: 0, in_use: 0, given: HashMap::new() }
    }

    /// `granted` slots of a session that is rebuilt without what another daemon kept of them:
    /// whichever use of a slot comes first is the next.
    pub fn rebuilt(granted: u16) -> SlotTable {
        let mut table = SlotTable::new(granted);
        table.cells.iter_mut().for_each(|cell| cell.state = State::Rebuilt as u8);
        table
    }

    /// The connection is gone: what is asked for from now on is asked for by another one.
    pub fn cut(&mut self) {
        self.link = self.link.wrapping_add(1);
    }

    /// A request came in on `at`.
    pub fn begin(&mut self, at: SlotUse, opcode: u32) -> Result<Begin, SlotError> {
        let (link, cell) = (self.link, self.cell(at.slot)?);
        let (seen, asked) = (cell.link == link, cell.seq);
        let next = SlotUse { seq: cell.seq.wrapping_add(1), ..at };
        match cell.state().ok_or(SlotError::Busy { slot: at.slot })? {
            State::Rebuilt => {}
            State::Fresh if at.seq == asked => {}
            State::Fresh => return Err(wrong(at, asked)),
            State::Running if at.seq == asked && !seen => {
                cell.link = link;
                return Ok(Begin::Running);
            }
            State::Running | State::Abandoned => return Err(SlotError::Busy { slot: at.slot }),
            State::Kept | State::Rerun if at == next => {}
            State::Kept if at.seq == asked && !seen => {
                cell.link = link;
                return Ok(Begin::Replay);
            }
            State::Rerun if at.seq == asked && !seen => {
                self.run(at, opcode);
                return Ok(Begin::Rerun(self.given.remove(&at.slot).unwrap_or_default()));
            }
            State::Kept | State::Rerun => return Err(wrong(at, next.seq)),
        }
        self.run(at, opcode);
        if !self.given.is_empty() {
            self.given.remove(&at.slot);
        }
        Ok(Begin::Execute)
    }

    fn run(&mut self, at: SlotUse, opcode: u32) {
        let cell = &mut self.cells[usize::from(at.slot)];
        (cell.seq, cell.link, cell.opcode) = (at.seq, self.link, opcode);
        cell.state = State::Running as u8;
        self.in_use += 1;
    }

    /// The request is over; `body` may be left out where the opcode may run again, but for
    /// READDIRPLUS.
    pub fn finish(&mut self, at: SlotUse, errno: u32, body: &[u8]) -> Result<Fate, SlotError> {
        let (link, cell) = (self.link, self.cell(at.slot)?);
        if cell.seq != at.seq {
            return Err(wrong(at, cell.seq));
        }
        if !cell.is_busy() {
            return Err(SlotError::Idle { slot: at.slot });
        }
        let abandoned = cell.state() == Some(State::Abandoned);
        let (wanted, opcode) = (cell.link == link, cell.opcode);
        let plus = opcode == Opcode::Readdirplus as u32;
        if abandoned {
            cell.keep(EINTR, &[]);
        } else if Opcode::from_u32(opcode).is_some_and(Opcode::may_rerun) {
            cell.state = State::Rerun as u8;
        } else {
            cell.keep(errno, body);
        }
        self.in_use -= 1;
        let given = || if errno == 0 { Given::by(opcode, body) } else { Given::default() };
        if abandoned {
            return Ok(Fate::GiveBack { given: given(), send: wanted });
        }
        if plus {
            self.given.insert(at.slot, given());
        }
        Ok(if wanted { Fate::Send } else { Fate::Keep })
    }

    /// The reply that is kept: errno and body.
    pub fn kept(&self, at: SlotUse) -> Option<(u32, &[u8])> {
        let cell = self.cells.get(usize::from(at.slot))?;
        let kept = cell.state() == Some(State::Kept) && cell.seq == at.seq;
        let body = cell.reply.get(..usize::from(cell.len))?;
        kept.then_some((cell.errno, body))
    }

    /// Nobody will take the reply to that use of a slot.
    pub fn abandon(&mut self, at: SlotUse) -> Result<Abandon, SlotError> {
        let (link, cell) = (self.link, self.cell(at.slot)?);
        let (seen, asked) = (cell.link == link, cell.seq);
        let next = cell.seq.wrapping_add(1);
        let state = cell.state().ok_or(SlotError::Busy { slot: at.slot })?;
        let mut given = Given::default();
        match state {
            State::Rebuilt => {}
            State::Fresh if at.seq == asked => {}
            State::Fresh => return Err(wrong(at, asked)),
            State::Running | State::Abandoned if at.seq == asked => {
                cell.link = link;
                cell.state = State::Abandoned as u8;
                return Ok(Abandon::Running);
            }
            State::Running | State::Abandoned => return Err(SlotError::Busy { slot: at.slot }),
            State::Kept | State::Rerun if at.seq == asked && seen => return Ok(Abandon::Void),
            State::Kept if at.seq == asked && cell.errno == 0 => {
                let body = cell.reply.get(..usize::from(cell.len)).unwrap_or_default();
                given = Given::by(cell.opcode, body);
            }
            State::Kept | State::Rerun if at.seq == asked || at.seq == next => {}
            State::Kept | State::Rerun => return Err(wrong(at, next)),
        }
        (cell.seq, cell.link) = (at.seq, link);
        cell.keep(EINTR, &[]);
        // The list of an earlier use was taken by the guest, and is its own to give back.
        let listed = self.given.remove(&at.slot).filter(|_| at.seq == asked);
        given.nodes.extend(listed.into_iter().flat_map(|listed| listed.nodes));
        Ok(Abandon::Over(given))
    }

    /// Whether that use is being executed now: a CANCEL may name one that is over.
    pub fn is_running(&self, at: SlotUse) -> bool {
        let cell = self.cells.get(usize::from(at.slot));
        cell.is_some_and(|cell| cell.is_busy() && cell.seq == at.seq)
    }

    /// Requests being executed.
    pub fn in_use(&self) -> usize {
        self.in_use
    }

    fn cell(&mut self, slot: u16) -> Result<&mut Cell, SlotError> {
        let granted = self.cells.len() as u16;
        self.cells.get_mut(usize::from(slot)).ok_or(SlotError::Range { slot, granted })
    }
}

fn wrong(at: SlotUse, expected: u32) -> SlotError {
    SlotError::Sequence { slot: at.slot, seq: at.seq, expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MKDIR: u32 = Opcode::Mkdir as u32;
    const READ: u32 = Opcode::Read as u32;
    const PLUS: u32 = Opcode::Readdirplus as u32;

    /// What happens to a slot, and what the table says.
    #[derive(Clone, Copy)]
    enum Event {
        Ask(u32, u32),
        End(u32, u32, &'static [u8]),
        Leave(u32),
        Cut,
    }
    use Event::{Ask, Cut, End, Leave};

    fn entry(nodeid: u64) -> Vec<u8> {
        abi::EntryOut { nodeid, ..Default::default() }.as_bytes().to_vec()
    }

    fn said(table: &mut SlotTable, event: Event) -> String {
        let at = |seq| SlotUse { slot: 0, seq };
        let text = match event {
            Ask(seq, opcode) => table.begin(at(seq), opcode).map(|begin| match begin {
                Begin::Execute => "execute".into(),
                Begin::Running => "running".into(),
                Begin::Replay => format!("replay {:?}", table.kept(at(seq)).expect("kept").0),
                Begin::Rerun(given) => format!("rerun {:?}", given.nodes),
            }),
            End(seq, errno, body) => table.finish(at(seq), errno, body).map(|fate| match fate {
                Fate::Send => "send".into(),
                Fate::Keep => "keep".into(),
                Fate::GiveBack { given, send } => format!("back {:?} {send}", given.nodes),
            }),
            Leave(seq) => table.abandon(at(seq)).map(|abandon| match abandon {
                Abandon::Over(given) => format!("over {:?}", given.nodes),
                Abandon::Running => "running".into(),
                Abandon::Void => "void".into(),
            }),
            Cut => {
                table.cut();
                Ok("cut".into())
            }
        };
        text.unwrap_or_else(|error| match error {
            SlotError::Range { .. } => "range".into(),
            SlotError::Sequence { expected, .. } => format!("expected {expected}"),
            SlotError::Idle { .. } => "idle".into(),
            SlotError::Busy { .. } => "busy".into(),
        })
    }

    #[test]
    fn a_request_runs_once_however_often_it_comes() {
        let made: &'static [u8] = entry(7).leak();
        let plus = abi::DirentPlus {
            entry_out: abi::EntryOut { nodeid: 8, ..Default::default() },
            dirent: abi::Dirent { namelen: 3, ..Default::default() },
        };
        let plus = [plus.as_bytes(), b"abc\0\0\0\0\0"].concat();
        let dot = abi::DirentPlus {
            dirent: abi::Dirent { namelen: 1, ..Default::default() },
            ..Default::default()
        };
        let listed: &'static [u8] = [dot.as_bytes(), &[0; 8], &plus, &plus].concat().leak();
        let check = |name: &str, story: &[(Event, &str)]| {
            let mut table = SlotTable::new(1);
            for (step, &(event, expected)) in story.iter().enumerate() {
                assert_eq!(said(&mut table, event), expected, "{name}: step {step}");
            }
        };
        check(
            "one after the other",
            &[
                (Ask(1, MKDIR), "expected 0"),
                (End(0, 0, &[]), "idle"),
                (Ask(0, MKDIR), "execute"),
                (Ask(0, MKDIR), "busy"),
                (Ask(1, MKDIR), "busy"),
                (End(1, 0, made), "expected 0"),
                (End(0, 0, made), "send"),
                (Ask(0, MKDIR), "expected 1"),
                (Ask(2, MKDIR), "expected 1"),
                (Ask(1, READ), "execute"),
                (End(1, 0, &[]), "send"),
                (Ask(1, READ), "expected 2"),
                (Ask(2, READ), "execute"),
            ],
        );
        check(
            "the cut while it runs",
            &[
                (Ask(0, MKDIR), "execute"),
                (Cut, "cut"),
                (Ask(0, MKDIR), "running"),
                (Ask(0, MKDIR), "busy"),
                (End(0, 17, &[]), "send"),
                (Ask(0, MKDIR), "expected 1"),
                (Cut, "cut"),
                (Ask(0, MKDIR), "replay 17"),
                (Ask(0, MKDIR), "expected 1"),
                (Ask(1, MKDIR), "execute"),
            ],
        );
        check(
            "it ends before it is asked for again",
            &[
                (Ask(0, MKDIR), "execute"),
                (Cut, "cut"),
                (End(0, 0, made), "keep"),
                (Ask(0, MKDIR), "replay 0"),
                (Cut, "cut"),
                (Cut, "cut"),
                (Ask(0, MKDIR), "replay 0"),
            ],
        );
        check(
            "what may run again",
            &[
                (Ask(0, READ), "execute"),
                (End(0, 0, &[]), "send"),
                (Cut, "cut"),
                (Ask(0, READ), "rerun []"),
                (Cut, "cut"),
                (Ask(0, READ), "running"),
                (End(0, 0, &[]), "send"),
                (Ask(1, PLUS), "execute"),
                (End(1, 0, listed), "send"),
                (Cut, "cut"),
                (Ask(1, PLUS), "rerun [8, 8]"),
                (End(1, 0, listed), "send"),
                (Ask(2, READ), "execute"),
                (End(2, 0, &[]), "send"),
                (Cut, "cut"),
                (Ask(2, READ), "rerun []"),
            ],
        );
        check(
            "abandoned",
            &[
                (Leave(1), "expected 0"),
                (Leave(0), "over []"),
                (Leave(0), "void"),
                (Ask(0, MKDIR), "expected 1"),
                (Ask(1, MKDIR), "execute"),
                (Leave(0), "busy"),
                (Cut, "cut"),
                (Leave(1), "running"),
                (Leave(1), "running"),
                (Ask(1, MKDIR), "busy"),
                (End(1, 0, made), "back [7] true"),
                (Cut, "cut"),
                (Leave(1), "over []"),
                (Ask(2, MKDIR), "execute"),
                (End(2, 0, made), "send"),
                (Leave(2), "void"),
                (Cut, "cut"),
                (Leave(2), "over [7]"),
                (Cut, "cut"),
                (Leave(2), "over []"),
                (Ask(2, MKDIR), "expected 3"),
                (Ask(3, PLUS), "execute"),
                (End(3, 0, listed), "send"),
                (Leave(4), "over []"),
                (Ask(5, PLUS), "execute"),
                (Leave(5), "running"),
                (Cut, "cut"),
                (End(5, 0, listed), "back [8, 8] false"),
                (Ask(5, PLUS), "replay 4"),
                (Ask(6, PLUS), "execute"),
                (Cut, "cut"),
                (End(6, 0, listed), "keep"),
                (Leave(6), "over [8, 8]"),
            ],
        );
    }

    #[test]
    fn what_a_reply_gives() {
        let check = |opcode: Opcode, body: &[u8], nodes: &[u64], handle: Option<u64>| {
            let given = Given::by(opcode as u32, body);
            assert_eq!((&given.nodes[..], given.handle), (nodes, handle), "{opcode:?}");
            for n in 0..body.len() {
                let _ = Given::by(opcode as u32, &body[..n]); // must not panic
            }
        };
        let opened = abi::OpenOut { fh: 5, ..Default::default() };
        let made = [&entry(3)[..], opened.as_bytes()].concat();
        check(Opcode::Lookup, &entry(3), &[3], None);
        check(Opcode::Lookup, &entry(0), &[], None);
        check(Opcode::Create, &made, &[3], Some(5));
        check(Opcode::Tmpfile, &made, &[3], Some(5));
        check(Opcode::Opendir, opened.as_bytes(), &[], Some(5));
        check(Opcode::Getattr, &made, &[], None);
        check(Opcode::Readdirplus, &[0xff; 400], &[u64::MAX], None);
    }

    #[test]
    fn a_cell_of_no_known_state_runs_nothing() {
        let mut table = SlotTable::new(1);
        table.cells[0].state = 77;
        let at = SlotUse { slot: 0, seq: 0 };
        assert_eq!(table.begin(at, MKDIR), Err(SlotError::Busy { slot: 0 }));
        assert_eq!(table.abandon(at), Err(SlotError::Busy { slot: 0 }));
        assert_eq!(table.finish(at, 0, &[]), Err(SlotError::Idle { slot: 0 }));
        assert!(table.kept(at).is_none() && !table.is_running(at));
        let far = SlotUse { slot: 1, seq: 0 };
        assert_eq!(table.begin(far, MKDIR), Err(SlotError::Range { slot: 1, granted: 1 }));
    }
}
