//! The daemon's half of the session table: what becomes of each request that comes on a slot.
//!
//! Each request runs once, however often it comes: a slot's cell (`table/cell.rs`) says that it is
//! running, keeps its reply, or says that it may run again. What nobody took is given back
//! (`table/given.rs`). Invariant: a reply leaves only by a connection on which its request came or
//! was named, and once at most by each.

mod cell;
mod given;

pub use cell::{Cell, REPLY_KEPT_BYTES_MAX, are_whole, rebuild, replies};
pub use given::Given;

use crate::abi::Opcode;
use crate::slot::{SlotError, SlotUse};
use cell::{EINTR, EIO, Mark, State};
use std::collections::HashMap;
use zerocopy::FromZeros;

/// What became of a request whose daemon died; see [`Begin::Decide`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past<'a> {
    /// It was running: nobody knows.
    Running,
    /// It had succeeded with this reply, and what that gave died with the daemon.
    Done(&'a [u8]),
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
    /// It was begun by a daemon that died: find out what became of it ([`SlotTable::past`]), run it
    /// where it did not, and end it.
    Decide,
    /// It may have run, and nothing tells: [`SlotTable::trust`] it and begin again, or
    /// [`SlotTable::give_up`].
    Unsure,
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

/// The slots of one lane, in memory `C`.
pub struct SlotTable<C = Box<[Cell]>> {
    cells: C,
    /// Number of the connection that the lane has, or will have next.
    link: u32,
    in_use: usize,
    /// What the last READDIRPLUS of a slot gave; bounded by the size of its reply.
    given: HashMap<u16, Given>,
}

impl SlotTable {
    /// `granted` slots, all at their first use.
    pub fn new(granted: u16) -> SlotTable {
        SlotTable::of((0..granted).map(|_| Cell::new_zeroed()).collect())
    }

    /// The same for a session that is rebuilt; see [`rebuild`].
    pub fn rebuilt(granted: u16) -> SlotTable {
        let mut table = SlotTable::new(granted);
        rebuild(&mut table.cells);
        table
    }
}

impl<C: AsRef<[Cell]> + AsMut<[Cell]>> SlotTable<C> {
    /// Of cells that are all zero.
    pub fn of(cells: C) -> SlotTable<C> {
        SlotTable { cells, link: 0, in_use: 0, given: HashMap::new() }
    }

    /// Of cells that a daemon left which died. What was running is to be decided, what a reply gave
    /// is to be given anew, and what nobody would have taken is over.
    pub fn adopt(mut cells: C) -> SlotTable<C> {
        for cell in cells.as_mut() {
            cell.link = 0;
            let Some(mark) = cell.mark() else { continue };
            let may_rerun = Opcode::from_u32(mark.opcode).is_some_and(Opcode::may_rerun);
            let state = match mark.state {
                State::Running if may_rerun => State::Rerun,
                State::Running => State::Orphan,
                State::Again => State::Lost,
                State::Kept if mark.errno == 0 && dies(mark.opcode) => State::Lost,
                State::Abandoned => {
                    cell.keep(mark, EINTR, &[]);
                    continue;
                }
                State::Fresh
                | State::Rebuilt
                | State::Unsure
                | State::Kept
                | State::Rerun
                | State::Orphan
                | State::Lost => continue,
            };
            cell.set(Mark { state, ..mark });
        }
        SlotTable { cells, link: 1, in_use: 0, given: HashMap::new() }
    }

    /// The connection is gone: what is asked for from now on is asked for by another one.
    pub fn cut(&mut self) {
        self.link = self.link.wrapping_add(1);
    }

    /// A request came in on `at`.
    pub fn begin(&mut self, at: SlotUse, opcode: u32) -> Result<Begin, SlotError> {
        let (link, cell) = (self.link, self.cell(at.slot)?);
        let mark = cell.mark().ok_or(SlotError::Busy { slot: at.slot })?;
        let (seen, asked) = (cell.link == link, mark.seq);
        let next = SlotUse { seq: mark.seq.wrapping_add(1), ..at };
        match mark.state {
            State::Rebuilt => {}
            State::Fresh if at.seq == asked => {}
            State::Fresh => return Err(wrong(at, asked)),
            State::Running | State::Again if at.seq == asked && !seen => {
                cell.link = link;
                return Ok(Begin::Running);
            }
            State::Running | State::Again | State::Abandoned => {
                return Err(SlotError::Busy { slot: at.slot });
            }
            State::Kept | State::Rerun | State::Lost if at == next => {}
            State::Kept if at.seq == asked && !seen => {
                cell.link = link;
                return Ok(Begin::Replay);
            }
            State::Rerun if at.seq == asked && !seen => {
                self.run(at, Mark::running(at.seq, opcode));
                return Ok(Begin::Rerun(self.given.remove(&at.slot).unwrap_or_default()));
            }
            State::Orphan | State::Lost if at.seq == asked && mark.opcode == opcode => {
                let lost = mark.state == State::Lost;
                let state = if lost { State::Again } else { State::Running };
                self.run(at, Mark { state, ..mark });
                return Ok(Begin::Decide);
            }
            State::Unsure if at.seq == asked => return Ok(Begin::Unsure),
            State::Kept | State::Rerun | State::Lost => return Err(wrong(at, next.seq)),
            State::Orphan | State::Unsure => return Err(wrong(at, asked)),
        }
        self.run(at, Mark::running(at.seq, opcode));
        if !self.given.is_empty() {
            self.given.remove(&at.slot);
        }
        Ok(Begin::Execute)
    }

    /// The request of that use comes next, and may have run before the session was rebuilt. What
    /// has come since is known better.
    pub fn doubt(&mut self, at: SlotUse) -> Result<(), SlotError> {
        let cell = self.cell(at.slot)?;
        if let Some(mark) = cell.mark().filter(|mark| mark.state == State::Rebuilt) {
            cell.set(Mark { seq: at.seq, state: State::Unsure, ..mark });
        }
        Ok(())
    }

    /// The request that [`SlotTable::begin`] was unsure of may run, though it may have before.
    pub fn trust(&mut self, at: SlotUse) -> Result<(), SlotError> {
        let cell = self.cell(at.slot)?;
        if let Some(mark) = cell.mark().filter(|mark| mark.state == State::Unsure) {
            cell.set(Mark { state: State::Rebuilt, ..mark });
        }
        Ok(())
    }

    /// It must not, and nobody will know: its reply, which is kept, is EIO.
    pub fn give_up(&mut self, at: SlotUse) -> Result<(), SlotError> {
        let (link, cell) = (self.link, self.cell(at.slot)?);
        if let Some(mark) = cell.mark().filter(|mark| mark.state == State::Unsure) {
            cell.link = link;
            cell.keep(mark, EIO, &[]);
        }
        Ok(())
    }

    fn run(&mut self, at: SlotUse, mark: Mark) {
        let cell = &mut self.cells.as_mut()[usize::from(at.slot)];
        cell.link = self.link;
        cell.set(mark);
        self.in_use += 1;
    }

    /// What is known of a request that [`SlotTable::begin`] leaves to decide, as long as it has not
    /// ended.
    pub fn past(&self, at: SlotUse) -> Option<Past<'_>> {
        let cell = self.cells.as_ref().get(usize::from(at.slot))?;
        let mark = cell.mark().filter(|mark| mark.seq == at.seq)?;
        match mark.state {
            State::Again => Some(Past::Done(cell.reply(mark))),
            State::Running => Some(Past::Running),
            _ => None,
        }
    }

    /// The request is over; `body` may be left out where the opcode may run again, but for
    /// READDIRPLUS.
    pub fn finish(&mut self, at: SlotUse, errno: u32, body: &[u8]) -> Result<Fate, SlotError> {
        let (link, cell) = (self.link, self.cell(at.slot)?);
        let mark = cell.mark().ok_or(SlotError::Idle { slot: at.slot })?;
        if mark.seq != at.seq {
            return Err(wrong(at, mark.seq));
        }
        if !mark.is_busy() {
            return Err(SlotError::Idle { slot: at.slot });
        }
        let abandoned = mark.state == State::Abandoned;
        let (wanted, opcode) = (cell.link == link, mark.opcode);
        let plus = opcode == Opcode::Readdirplus as u32;
        if abandoned {
            cell.keep(mark, EINTR, &[]);
        } else if Opcode::from_u32(opcode).is_some_and(Opcode::may_rerun) {
            cell.set(Mark { state: State::Rerun, ..mark });
        } else {
            cell.keep(mark, errno, body);
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
        let cell = self.cells.as_ref().get(usize::from(at.slot))?;
        let mark = cell.mark()?;
        let kept = mark.state == State::Kept && mark.seq == at.seq;
        kept.then(|| (mark.errno, cell.reply(mark)))
    }

    /// Nobody will take the reply to that use of a slot.
    pub fn abandon(&mut self, at: SlotUse) -> Result<Abandon, SlotError> {
        let (link, cell) = (self.link, self.cell(at.slot)?);
        let mark = cell.mark().ok_or(SlotError::Busy { slot: at.slot })?;
        let (seen, asked) = (cell.link == link, mark.seq);
        let next = mark.seq.wrapping_add(1);
        let mut given = Given::default();
        match mark.state {
            State::Rebuilt => {}
            State::Fresh if at.seq == asked => {}
            State::Fresh => return Err(wrong(at, asked)),
            State::Running | State::Again | State::Abandoned if at.seq == asked => {
                cell.link = link;
                cell.set(Mark { state: State::Abandoned, ..mark });
                return Ok(Abandon::Running);
            }
            State::Running | State::Again | State::Abandoned => {
                return Err(SlotError::Busy { slot: at.slot });
            }
            State::Kept | State::Rerun if at.seq == asked && seen => return Ok(Abandon::Void),
            State::Kept if at.seq == asked && mark.errno == 0 => {
                given = Given::by(mark.opcode, cell.reply(mark));
            }
            State::Kept | State::Rerun | State::Lost if at.seq == asked || at.seq == next => {}
            // Done or not: what it gave is gone.
            State::Orphan | State::Unsure if at.seq == asked => {}
            State::Kept | State::Rerun | State::Lost => return Err(wrong(at, next)),
            State::Orphan | State::Unsure => return Err(wrong(at, asked)),
        }
        cell.link = link;
        cell.keep(Mark { seq: at.seq, ..mark }, EINTR, &[]);
        // The list of an earlier use was taken by the guest, and is its own to give back.
        let listed = self.given.remove(&at.slot).filter(|_| at.seq == asked);
        given.nodes.extend(listed.into_iter().flat_map(|listed| listed.nodes));
        Ok(Abandon::Over(given))
    }

    /// Whether that use is being executed now: a CANCEL may name one that is over.
    pub fn is_running(&self, at: SlotUse) -> bool {
        let cell = self.cells.as_ref().get(usize::from(at.slot));
        let mark = cell.and_then(Cell::mark);
        mark.is_some_and(|mark| mark.is_busy() && mark.seq == at.seq)
    }

    /// Whether any slot has ever been used.
    pub fn is_used(&self) -> bool {
        let used = |cell: &Cell| cell.mark().is_none_or(|mark| mark.state != State::Fresh);
        self.cells.as_ref().iter().any(used)
    }

    /// Requests being executed.
    pub fn in_use(&self) -> usize {
        self.in_use
    }

    fn cell(&mut self, slot: u16) -> Result<&mut Cell, SlotError> {
        let cells = self.cells.as_mut();
        let granted = cells.len() as u16;
        cells.get_mut(usize::from(slot)).ok_or(SlotError::Range { slot, granted })
    }
}

/// Whether what it does, or gives, is in the memory of a daemon.
fn dies(opcode: u32) -> bool {
    use Opcode::*;
    matches!(
        Opcode::from_u32(opcode),
        Some(Lookup | Symlink | Mknod | Mkdir | Link | Create | Tmpfile | Open | Opendir)
            | Some(Forget | BatchForget | Release | Releasedir)
    )
}

fn wrong(at: SlotUse, expected: u32) -> SlotError {
    SlotError::Sequence { slot: at.slot, seq: at.seq, expected }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi;
    use zerocopy::{FromBytes, IntoBytes};

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
                Begin::Decide => format!("decide {:?}", table.past(at(seq)).expect("past")),
                Begin::Unsure => "unsure".into(),
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
    fn what_may_have_run_for_another_daemon_is_asked_about() {
        let at = |seq| SlotUse { slot: 0, seq };
        let doubted = |seq| {
            let mut table = SlotTable::rebuilt(1);
            table.doubt(at(seq)).expect("granted");
            assert_eq!(table.begin(at(seq), MKDIR), Ok(Begin::Unsure));
            table
        };
        // It may run: as whichever comes first on a rebuilt slot.
        let mut table = doubted(7);
        assert_eq!(table.begin(at(8), MKDIR), Err(wrong(at(8), 7)));
        table.trust(at(7)).expect("granted");
        assert_eq!(table.begin(at(7), MKDIR), Ok(Begin::Execute));
        table.doubt(at(7)).expect("granted");
        assert_eq!(table.finish(at(7), 0, b"made"), Ok(Fate::Send), "what has come is known");
        table.cut();
        table.doubt(at(7)).expect("granted");
        assert_eq!(table.begin(at(7), MKDIR), Ok(Begin::Replay));
        // It must not: EIO, once by each connection, and for a daemon after this one.
        let mut table = doubted(u32::MAX);
        table.give_up(at(u32::MAX)).expect("granted");
        assert_eq!(table.kept(at(u32::MAX)), Some((EIO, &[][..])));
        assert!(table.begin(at(u32::MAX), MKDIR).is_err());
        let mut table = SlotTable::adopt(table.cells);
        assert_eq!(table.begin(at(u32::MAX), MKDIR), Ok(Begin::Replay));
        assert_eq!(table.begin(at(0), MKDIR), Ok(Begin::Execute));
        // Killed before it was settled; or nobody waits for it.
        let mut table = SlotTable::adopt(doubted(3).cells);
        assert_eq!(table.begin(at(3), MKDIR), Ok(Begin::Unsure));
        assert_eq!(table.abandon(at(3)), Ok(Abandon::Over(Given::default())));
        assert_eq!(table.begin(at(4), MKDIR), Ok(Begin::Execute));
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
    fn what_a_daemon_leaves_is_decided_given_anew_or_over() {
        let made: &'static [u8] = entry(7).leak();
        let check = |name: &str, story: &[Event], then: &[(Event, &str)]| {
            let mut table = SlotTable::new(1);
            story.iter().for_each(|&event| drop(said(&mut table, event)));
            assert!(are_whole(&table.cells));
            let mut next = SlotTable::adopt(table.cells);
            for (step, &(event, expected)) in then.iter().enumerate() {
                assert_eq!(said(&mut next, event), expected, "{name}: step {step}");
            }
            assert_eq!(next.in_use(), usize::from(next.is_running(SlotUse { slot: 0, seq: 0 })));
        };
        const UNLINK: u32 = Opcode::Unlink as u32;
        const FORGET: u32 = Opcode::Forget as u32;
        check("never used", &[], &[(Ask(1, MKDIR), "expected 0"), (Ask(0, MKDIR), "execute")]);
        check(
            "running",
            &[Ask(0, MKDIR)],
            &[
                (Ask(1, MKDIR), "expected 0"),
                (Ask(0, UNLINK), "expected 0"),
                (Ask(0, MKDIR), "decide Running"),
                (Ask(0, MKDIR), "busy"),
                (Cut, "cut"),
                (Ask(0, MKDIR), "running"),
                (End(0, 0, made), "send"),
                (Cut, "cut"),
                (Ask(0, MKDIR), "replay 0"),
                (Ask(1, MKDIR), "execute"),
                (End(1, 0, made), "send"),
            ],
        );
        let lost = format!("decide {:?}", Past::Done(made));
        let gave: &[(Event, &str)] = &[
            (Ask(0, MKDIR), &lost),
            (Cut, "cut"),
            (Ask(0, MKDIR), "running"),
            (End(0, 0, made), "send"),
            (Ask(1, UNLINK), "execute"),
            (End(1, 0, &[]), "send"),
        ];
        check("what it gave is lost", &[Ask(0, MKDIR), End(0, 0, made)], gave);
        check(
            "and nobody wants it any more",
            &[Ask(0, MKDIR), End(0, 0, made)],
            &[(Ask(1, UNLINK), "execute"), (End(1, 0, &[]), "send")],
        );
        check(
            "it was an error, or gave nothing",
            &[Ask(0, MKDIR), End(0, 17, &[])],
            &[(Ask(0, MKDIR), "replay 17"), (Cut, "cut"), (Ask(0, MKDIR), "replay 17")],
        );
        check(
            "what a daemon has in memory",
            &[Ask(0, FORGET), End(0, 0, &[])],
            &[(Ask(0, FORGET), "decide Done([])"), (End(0, 0, &[]), "send")],
        );
        check(
            "what may run again",
            &[Ask(0, READ)],
            &[(Ask(0, READ), "rerun []"), (End(0, 0, &[]), "send")],
        );
        let over: &[(Event, &str)] = &[(Leave(0), "over []"), (Leave(0), "void"), (Cut, "cut")];
        check("nobody takes what was lost", &[Ask(0, MKDIR), End(0, 0, made)], over);
        check("nobody waits for what ran", &[Ask(0, MKDIR)], over);
        check("nobody waited for it", &[Ask(0, MKDIR), Cut, Leave(0)], over);
    }

    #[test]
    fn a_daemon_that_dies_while_it_decides_leaves_it_to_the_next() {
        let made: &'static [u8] = entry(7).leak();
        let lost = format!("decide {:?}", Past::Done(made));
        for (end, expected) in [(None, "decide Running"), (Some(End(0, 0, made)), &*lost)] {
            let mut table = SlotTable::new(1);
            said(&mut table, Ask(0, MKDIR));
            end.into_iter().for_each(|end| drop(said(&mut table, end)));
            for _ in 0..3 {
                table = SlotTable::adopt(table.cells);
                assert_eq!(said(&mut table, Ask(0, MKDIR)), expected);
            }
        }
    }

    #[test]
    fn a_cell_of_no_known_state_runs_nothing() {
        let cells: Box<[Cell]> = Box::new([Cell::read_from_bytes(&[0xff; 176]).expect("a cell")]);
        let mut table = SlotTable::of(cells);
        let at = SlotUse { slot: 0, seq: 0 };
        assert_eq!(table.begin(at, MKDIR), Err(SlotError::Busy { slot: 0 }));
        assert_eq!(table.abandon(at), Err(SlotError::Busy { slot: 0 }));
        assert_eq!(table.finish(at, 0, &[]), Err(SlotError::Idle { slot: 0 }));
        assert!(table.kept(at).is_none() && !table.is_running(at));
        let far = SlotUse { slot: 1, seq: 0 };
        assert_eq!(table.begin(far, MKDIR), Err(SlotError::Range { slot: 1, granted: 1 }));
    }
}
