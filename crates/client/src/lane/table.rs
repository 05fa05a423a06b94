//! What waits in a lane: requests in flight by their slots, those that are parked, and what the
//! thread is to send besides.
//!
//! Part of [`Lane`]. Invariant: a slot is in use until the daemon has said what became of its
//! request; who is parked goes first, in order; without a connection nothing gets a slot.

use super::{
    CONTROLS_MAX, Claim, Control, InFlight, Inherited, Interrupted, Lane, LaneCounters, Parked,
    lock,
};
use crate::keep::LaneKeep;
use crate::resume::{Resend, resends};
use fuser_fork::device::Device;
use ringfs_wire::abi::{ForgetOne, Opcode};
use ringfs_wire::batch::{Kind, RecordHeader};
use ringfs_wire::limits::RECORD_HEADER_BYTES;
use ringfs_wire::slot::{ClientSlots, SlotError, SlotUse};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// Whether requests can leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// The connection is gone.
    Cut,
    /// There is a new one, and what was in flight goes first.
    Resending,
}

/// How long what waits may wait for a connection (`soft`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    /// Nobody has asked since the connection was lost.
    Whole,
    /// Until then.
    Until(Duration),
    /// No longer: it fails.
    Over,
}

#[derive(Debug)]
pub(super) struct Table {
    phase: Phase,
    /// Counts while it is cut.
    patience: Patience,
    slots: ClientSlots<InFlight>,
    /// Which slots were in use when the turn began and are still, by the same request; how many.
    before: Vec<bool>,
    before_left: usize,
    park: VecDeque<Parked>,
    park_bytes: usize,
    controls: VecDeque<Control>,
    /// Somebody waits for a slot.
    starved: bool,
    closed: bool,
}

impl Table {
    pub(super) fn new(slots: u16) -> Table {
        Table {
            phase: Phase::Open,
            patience: Patience::Whole,
            slots: ClientSlots::new(slots),
            before: vec![false; slots.into()],
            before_left: 0,
            park: VecDeque::new(),
            park_bytes: 0,
            controls: VecDeque::new(),
            starved: false,
            closed: false,
        }
    }

    /// Those in flight by whether the daemon has been told that their task is dying.
    fn waiting(&self, choose: impl Fn(bool) -> bool) -> impl Iterator<Item = (u64, u32)> {
        let parked = self.park.iter().map(|parked| (parked.unique, parked.pid));
        let in_flight = self.slots.in_flight().filter_map(move |(_, request)| match request {
            InFlight::Request { unique, pid, cancelled, .. } => {
                choose(*cancelled).then_some((*unique, *pid))
            }
            InFlight::Forget | InFlight::Abandoned => None,
        });
        parked.chain(in_flight)
    }

    /// Frees a slot, whose next use is the same one if its request was not sent.
    fn end(&mut self, at: SlotUse, is_sent: bool) -> Result<InFlight, SlotError> {
        let request = if is_sent { self.slots.complete(at) } else { self.slots.unclaim(at) }?;
        let was_before = self.before.get_mut(usize::from(at.slot)).map(std::mem::take);
        self.before_left -= usize::from(was_before == Some(true));
        Ok(request)
    }

    /// Has the requests that `choose` means answered here: their ids.
    fn abandon(
        &mut self,
        keep: Option<&LaneKeep>,
        choose: impl Fn(SlotUse, &InFlight) -> bool,
    ) -> Vec<u64> {
        let chosen = self.slots.in_flight_mut().filter(|(at, request)| choose(*at, request));
        let ids = chosen.filter_map(|(at, request)| {
            if let Some(keep) = keep {
                keep.abandoned(at);
            }
            match std::mem::replace(request, InFlight::Abandoned) {
                InFlight::Request { unique, .. } => Some(unique),
                InFlight::Forget | InFlight::Abandoned => None,
            }
        });
        ids.collect()
    }
}

/// Whether a task waits for that request.
fn is_waited_for(opcode: u32) -> bool {
    !matches!(Opcode::from_u32(opcode), Some(Opcode::Release | Opcode::Releasedir))
}

impl Lane {
    /// What another client has left of it: its slots, without a connection, and what its thread
    /// begins with. Requests that the kernel has sent again are answered by `resent_by`.
    pub fn inherit(
        &mut self,
        slots: Vec<(u32, Option<InFlight>)>,
        inherited: Inherited,
        resent_by: Arc<Device>,
    ) {
        let mut table = lock(&self.table);
        table.phase = Phase::Cut;
        table.slots = ClientSlots::restored(slots);
        drop(table);
        *lock(&self.inherited) = inherited;
        self.resent_by = Some(resent_by);
    }

    /// So many forgets were waiting for a slot; now all of these are.
    pub fn forgets_wait(&self, before: usize, forgets: &[ForgetOne]) {
        if let Some(keep) = &self.keep {
            keep.waiting(before, forgets);
        }
    }

    /// A slot for these forgets; `rest` wait further.
    pub fn claim_forget(&self, forgets: &[ForgetOne], rest: usize) -> Claim {
        let claim = self.claim(InFlight::Forget);
        if let (Claim::Slot(at), Some(keep)) = (claim, &self.keep) {
            keep.forgets_claimed(at, forgets, rest);
        }
        claim
    }

    fn put_down(&self, at: SlotUse, request: InFlight) {
        if let (InFlight::Request { unique, opcode, .. }, Some(keep)) = (request, &self.keep) {
            keep.claimed(at, unique, opcode);
        }
    }

    /// A slot for a request, behind those that are parked.
    pub fn claim(&self, request: InFlight) -> Claim {
        let mut table = lock(&self.table);
        if table.closed {
            return Claim::Closed;
        }
        if table.park.is_empty()
            && table.phase == Phase::Open
            && let Ok(at) = table.slots.claim(request)
        {
            self.put_down(at, request);
            self.trace(at, request, "asked");
            return Claim::Slot(at);
        }
        table.starved = true;
        Claim::Full
    }

    /// Keeps a request for which [`Lane::claim`] had no slot; an error is its answer.
    pub fn park(&self, parked: Parked) -> Result<(), Errno> {
        let mut table = lock(&self.table);
        if table.closed {
            return Err(Errno::NOTCONN);
        }
        if (table.phase, table.patience) == (Phase::Cut, Patience::Over)
            && is_waited_for(parked.opcode)
        {
            return Err(Errno::IO);
        }
        table.park_bytes += parked.frame.len();
        table.park.push_back(parked);
        table.starved = true;
        LaneCounters::add(&self.counters.parked_total, 1);
        Ok(())
    }

    /// The request that has been parked for longest, with a slot, if there are both.
    pub fn unpark(&self) -> Option<(SlotUse, Parked)> {
        let mut table = lock(&self.table);
        let front = table.park.front()?;
        let request = InFlight::request(front.unique, front.opcode, front.pid);
        let at = (table.phase == Phase::Open).then(|| table.slots.claim(request).ok()).flatten();
        let Some(at) = at else {
            table.starved = true;
            return None;
        };
        self.put_down(at, request);
        let parked = table.park.pop_front()?;
        table.park_bytes -= parked.frame.len();
        self.trace(at, request, "asked");
        Some((at, parked))
    }

    /// What a request is called on both sides: the daemon's log has the same `op`.
    fn trace(&self, at: SlotUse, request: InFlight, what: &str) {
        if tracing::enabled!(tracing::Level::TRACE) {
            let session = self.session.load(Ordering::Relaxed);
            let op = format_args!("{session}.{}.{}.{}", self.index, at.slot, at.seq);
            tracing::trace!(%op, ?request, "{what}");
        }
    }

    /// What is parked waits for something else than a slot, which the next reply may bring.
    pub fn starve(&self) {
        lock(&self.table).starved = true;
    }

    /// Requests and bytes parked.
    pub fn parked(&self) -> (usize, usize) {
        let table = lock(&self.table);
        (table.park.len(), table.park_bytes)
    }

    /// The id of the READ that has that use of a slot, unless it was answered here.
    pub fn read_in(&self, at: SlotUse) -> Option<u64> {
        match lock(&self.table).slots.get(at)? {
            InFlight::Request { unique, opcode, .. } if *opcode == Opcode::Read as u32 => {
                Some(*unique)
            }
            _ => None,
        }
    }

    /// Requests in flight, those that are abandoned included.
    pub fn in_flight(&self) -> usize {
        lock(&self.table).slots.in_use()
    }

    /// Whether the daemon has not answered yet what was given back last.
    pub fn has_forget(&self) -> bool {
        let table = lock(&self.table);
        table.slots.in_flight().any(|(_, request)| *request == InFlight::Forget)
    }

    /// Whether all is over that was in flight at the last [`Lane::begin_turn`].
    pub fn has_ended_turn(&self) -> bool {
        lock(&self.table).before_left == 0 && !self.counting.load(Ordering::Acquire)
    }

    /// A turn begins; the one before has ended.
    pub fn begin_turn(&self) {
        let Table { slots, before, before_left, .. } = &mut *lock(&self.table);
        slots.in_flight().for_each(|(at, _)| before[usize::from(at.slot)] = true);
        *before_left = slots.in_use();
    }

    /// Those of them that were answered here.
    pub fn abandoned(&self) -> usize {
        let table = lock(&self.table);
        table.slots.in_flight().filter(|(_, request)| **request == InFlight::Abandoned).count()
    }

    /// The connection is gone: nothing gets a slot until [`Lane::reopen`], and the tasks that are
    /// known to be dying get out. What was not `unsent` by it may have reached the daemon.
    pub fn cut(&self, unsent: &[SlotUse]) {
        let mut table = lock(&self.table);
        (table.phase, table.patience) = (Phase::Cut, Patience::Whole);
        table.controls.clear();
        for (at, request) in table.slots.in_flight_mut() {
            if let InFlight::Request { sent, .. } = request {
                *sent |= !unsent.contains(&at);
            }
        }
        let dying =
            |_, request: &InFlight| matches!(request, InFlight::Request { cancelled: true, .. });
        let out = table.abandon(self.keep.as_ref(), dying);
        drop(table);
        self.answer_abandoned(&out, Errno::INTR);
    }

    /// How long to wait at most for another connection, where requests wait `soft` for one, from
    /// the first call on; `None`: as long as it takes. When that is over all that waits is answered
    /// EIO, and what comes before the next connection too. Nobody waits for a RELEASE, and not to
    /// send it would leak a handle.
    pub fn patience(&self, soft: Option<Duration>, now: Duration) -> Option<Duration> {
        let mut table = lock(&self.table);
        if table.phase != Phase::Cut || table.closed || table.patience == Patience::Over {
            return None;
        }
        let until = match table.patience {
            Patience::Until(until) => until,
            Patience::Whole | Patience::Over => now + soft?,
        };
        table.patience = Patience::Until(until);
        let left = until.saturating_sub(now);
        if !left.is_zero() {
            return Some(left);
        }
        table.patience = Patience::Over;
        let out = table.abandon(
            self.keep.as_ref(),
            |_, request| {
                matches!(request, InFlight::Request { opcode, .. } if is_waited_for(*opcode))
            },
        );
        let all = std::mem::take(&mut table.park);
        let (parked, stay) = all.into_iter().partition(|parked| is_waited_for(parked.opcode));
        table.park = stay;
        table.park_bytes = table.park.iter().map(|parked| parked.frame.len()).sum();
        drop(table);
        tracing::warn!(lane = self.index, "no connection in time: requests fail (soft)");
        self.answer_abandoned(&out, Errno::IO);
        let parked: VecDeque<Parked> = parked;
        parked.iter().for_each(|parked| self.answer_error(parked.unique, Errno::IO));
        None
    }

    fn answer_abandoned(&self, uniques: &[u64], errno: Errno) {
        LaneCounters::add(&self.counters.abandoned_total, uniques.len());
        uniques.iter().for_each(|&unique| self.answer_error(unique, errno));
    }

    /// There will be a connection at once: to wait makes sense again.
    pub fn renew(&self) {
        lock(&self.table).patience = Patience::Whole;
    }

    /// There is a connection: what has to be sent on it before all else.
    pub fn resend(&self) -> VecDeque<Resend> {
        let mut table = lock(&self.table);
        table.phase = Phase::Resending;
        resends(table.slots.in_flight())
    }

    /// The session is rebuilt: whatever has been sent may have run, and only we know that it was.
    /// The connection by which it was is gone, of every lane.
    pub fn doubt(&self) {
        let mut table = lock(&self.table);
        for (at, request) in table.slots.in_flight_mut() {
            if let InFlight::Request { opcode, sent: true, unsure, .. } = request {
                *unsure = true;
                if let Some(keep) = &self.keep {
                    keep.doubted(at, *opcode);
                }
            }
        }
    }

    /// All of that is in batches: requests get slots again.
    pub fn reopen(&self) {
        lock(&self.table).phase = Phase::Open;
        self.kicked.store(true, Ordering::Release);
    }

    /// The reply to a request is here, as the lane's own thread finds.
    pub fn complete(&self, at: SlotUse) -> Result<InFlight, SlotError> {
        // Before the slot is free, and seen by whoever sees that.
        self.counting.store(true, Ordering::Relaxed);
        let mut table = lock(&self.table);
        let request = match table.end(at, true) {
            Ok(request) => request,
            Err(error) => {
                self.counted();
                return Err(error);
            }
        };
        self.slot_is_free(table);
        self.trace(at, request, "answered");
        Ok(request)
    }

    /// What that reply gives or takes back counts.
    pub fn counted(&self) {
        self.counting.store(false, Ordering::Release);
    }

    /// The request is not sent after all, as the lane's own thread finds: the slot is free for the
    /// same use, and a CANCEL that waits would be for whoever has that next. An error: the session
    /// has ended meanwhile, and the request with it.
    pub fn unclaim(&self, at: SlotUse) -> Result<InFlight, SlotError> {
        let mut table = lock(&self.table);
        let request = table.end(at, false)?;
        if let Some(keep) = &self.keep {
            keep.freed(at, false);
        }
        table.controls.retain(|control| *control != Control::Cancel(at));
        self.slot_is_free(table);
        Ok(request)
    }

    /// The request cannot be sent again, as the lane's own thread finds: it is answered here, and
    /// the daemon, which may have it, is to be told.
    pub fn give_up(&self, at: SlotUse) {
        let out = lock(&self.table).abandon(self.keep.as_ref(), |its, _| its == at);
        self.answer_abandoned(&out, Errno::IO);
    }

    fn slot_is_free(&self, mut table: MutexGuard<'_, Table>) {
        let starved = std::mem::take(&mut table.starved);
        drop(table);
        if starved {
            // Its own thread looks at this before it sleeps.
            self.kicked.store(true, Ordering::Release);
        }
    }

    /// The task that waits for the answer to `unique`, if that is parked or in flight here.
    pub fn waits(&self, unique: u64) -> Option<u32> {
        let table = lock(&self.table);
        table.waiting(|_| true).find(|(its, _)| *its == unique).map(|(_, pid)| pid)
    }

    /// All that is parked or in flight here and that nobody has interrupted, with the tasks that
    /// wait.
    pub fn waiting(&self) -> Vec<(u64, u32)> {
        let table = lock(&self.table);
        table.waiting(|cancelled| !cancelled).collect()
    }

    /// Nobody waits for `unique` any more: takes it from the park, or has the daemon told.
    pub fn interrupt(&self, unique: u64) -> Interrupted {
        let mut table = lock(&self.table);
        if let Some(at) = table.park.iter().position(|parked| parked.unique == unique)
            && let Some(parked) = table.park.remove(at)
        {
            table.park_bytes -= parked.frame.len();
            drop(table);
            // There is room for another one.
            self.kick();
            return Interrupted::Parked;
        }
        let is_cut = table.phase == Phase::Cut;
        let target = table.slots.in_flight_mut().find_map(|(at, request)| match request {
            InFlight::Request { unique: its, cancelled, .. } if *its == unique => {
                *cancelled = true;
                if is_cut {
                    if let Some(keep) = &self.keep {
                        keep.abandoned(at);
                    }
                    *request = InFlight::Abandoned;
                }
                Some(at)
            }
            InFlight::Request { .. } | InFlight::Forget | InFlight::Abandoned => None,
        });
        let Some(at) = target else { return Interrupted::Unknown };
        if is_cut {
            LaneCounters::add(&self.counters.abandoned_total, 1);
            return Interrupted::Abandoned;
        }
        let cancel = Control::Cancel(at);
        if table.controls.len() < CONTROLS_MAX && !table.controls.contains(&cancel) {
            table.controls.push_back(cancel);
        }
        drop(table);
        self.kick();
        Interrupted::Cancelled
    }

    /// Has the thread send a PING or a PONG: one of each, however often the peer has asked
    /// meanwhile, and behind as many cancels as there are.
    pub fn queue(&self, control: Control) {
        let mut table = lock(&self.table);
        if !table.controls.contains(&control) {
            table.controls.push_back(control);
        }
        drop(table);
        self.kick();
    }

    /// The record of the next that [`Lane::interrupt`] and [`Lane::queue`] left.
    pub fn next_control(&self) -> Option<RecordHeader> {
        let control = lock(&self.table).controls.pop_front()?;
        let nobody = SlotUse { slot: 0, seq: 0 };
        let (kind, at) = match control {
            Control::Cancel(at) => {
                LaneCounters::add(&self.counters.cancels, 1);
                (Kind::Cancel, at)
            }
            Control::Ping => (Kind::Ping, nobody),
            Control::Pong => (Kind::Pong, nobody),
        };
        Some(self.record(kind, at, 0, RECORD_HEADER_BYTES))
    }

    /// The session is over: nothing gets a slot any more, and all that waits is answered `errno`.
    pub fn close(&self, errno: Errno) {
        let mut table = lock(&self.table);
        table.closed = true;
        table.controls.clear();
        table.park_bytes = 0;
        let mut waiting: Vec<u64> = table.park.drain(..).map(|parked| parked.unique).collect();
        let in_flight: Vec<_> = table.slots.in_flight().map(|(at, _)| at).collect();
        for at in in_flight {
            if let Ok(InFlight::Request { unique, .. }) = table.end(at, true) {
                waiting.push(unique);
            }
        }
        drop(table);
        for unique in waiting {
            self.answer_error(unique, errno);
        }
        self.kick();
    }

    /// The reply to that use of a slot goes to the kernel next.
    pub fn delivering(&self, at: SlotUse) {
        if let Some(keep) = &self.keep {
            keep.delivering(at);
        }
    }

    /// All that the reply to that use of a slot changes is changed.
    pub fn settled(&self, at: SlotUse) {
        if let Some(keep) = &self.keep {
            keep.freed(at, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(slots: u16) -> Lane {
        let device = Device::open("/dev/fuse").expect("the tests need /dev/fuse");
        Lane::new(0, Arc::new(device), slots).expect("lane")
    }

    fn request(unique: u64) -> InFlight {
        InFlight::request(unique, 1, 0)
    }

    fn parked(unique: u64) -> Parked {
        Parked { unique, opcode: 1, pid: 77, frame: vec![0; 48].into() }
    }

    fn readable(lane: &Lane) -> bool {
        let mut fds =
            [rustix::event::PollFd::from_borrowed_fd(lane.kick_fd(), rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())).expect("poll") == 1
    }

    #[test]
    fn what_is_parked_goes_first_and_in_order() {
        let lane = lane(1);
        let Claim::Slot(first) = lane.claim(request(2)) else { panic!("no slot") };
        for unique in [4, 6] {
            assert_eq!(lane.claim(request(unique)), Claim::Full);
            lane.park(parked(unique)).expect("open");
        }
        assert_eq!(lane.parked(), (2, 96));
        assert!(lane.unpark().is_none());
        assert!(!lane.is_kicked());
        assert_eq!(lane.complete(first), Ok(request(2)));
        assert!(lane.take_kick() && !lane.take_kick() && !readable(&lane));
        // A newcomer has to wait its turn.
        assert_eq!(lane.claim(request(8)), Claim::Full);
        let (at, next) = lane.unpark().expect("a slot and a request");
        assert_eq!((next.unique, at.seq), (4, 1));
        assert!(lane.unpark().is_none());
        assert_eq!((lane.parked(), lane.in_flight()), ((1, 48), 1));
    }

    #[test]
    fn interrupts_find_their_target() {
        let lane = lane(1);
        let Claim::Slot(at) = lane.claim(request(2)) else { panic!("no slot") };
        lane.park(parked(4)).expect("open");
        assert!(matches!(lane.interrupt(9), Interrupted::Unknown));
        assert_eq!([9, 2, 4].map(|unique| lane.waits(unique)), [None, Some(0), Some(77)]);
        assert!(!readable(&lane));
        // Twice, and one cancel.
        assert!(matches!(lane.interrupt(2), Interrupted::Cancelled));
        assert!(matches!(lane.interrupt(2), Interrupted::Cancelled));
        assert!(readable(&lane));
        assert_eq!((lane.waits(2), lane.waiting()), (Some(0), vec![(4, 77)]));
        assert_eq!(lane.next_control(), Some(lane.record(Kind::Cancel, at, 0, 16)));
        assert_eq!(lane.next_control(), None);
        assert!(lane.take_kick() && !lane.is_kicked());
        assert!(matches!(lane.interrupt(4), Interrupted::Parked));
        assert!(lane.is_kicked());
        assert_eq!(lane.parked(), (0, 0));
        assert_eq!(lane.waits(4), None);
        assert!(matches!(lane.interrupt(4), Interrupted::Unknown));
    }

    #[test]
    fn what_is_not_sent_leaves_no_trace() {
        let lane = lane(1);
        let Claim::Slot(at) = lane.claim(request(2)) else { panic!("no slot") };
        lane.park(parked(4)).expect("open");
        lane.queue(Control::Pong);
        assert!(matches!(lane.interrupt(2), Interrupted::Cancelled));
        assert!(lane.take_kick());
        assert!(matches!(lane.unclaim(at), Ok(InFlight::Request { unique: 2, .. })));
        assert!(lane.take_kick(), "a parked request can have the slot");
        let (next, parked) = lane.unpark().expect("a slot and a request");
        assert_eq!((next, parked.unique), (at, 4));
        // The cancel named this use of the slot, and meant another request.
        assert_eq!(lane.next_control().map(|record| record.kind), Some(Kind::Pong as u8));
        assert_eq!(lane.next_control(), None);
    }

    #[test]
    fn a_turn_ends_with_the_last_request_from_before() {
        let lane = lane(4);
        let claimed = |unique| match lane.claim(request(unique)) {
            Claim::Slot(at) => at,
            claim => panic!("{claim:?}"),
        };
        let (first, second, third) = (claimed(2), claimed(4), claimed(6));
        assert!(lane.has_ended_turn(), "none has begun");
        lane.begin_turn();
        let later = claimed(8);
        lane.complete(first).expect("in flight");
        lane.complete(later).expect("in flight");
        assert_eq!(claimed(10).slot, later.slot);
        assert!(!lane.has_ended_turn());
        // Answered here it may still have given something.
        lane.cut(&[]);
        assert!(matches!(lane.interrupt(4), Interrupted::Abandoned));
        lane.complete(third).expect("in flight");
        lane.counted();
        assert!(!lane.has_ended_turn());
        lane.unclaim(second).expect("in flight");
        assert!(lane.has_ended_turn(), "the newcomer does not count");
        lane.begin_turn();
        assert!(!lane.has_ended_turn());
        lane.close(Errno::IO);
        assert!(lane.has_ended_turn());
    }

    #[test]
    fn a_turn_does_not_end_while_a_reply_is_not_counted() {
        let lane = lane(1);
        let Claim::Slot(at) = lane.claim(request(2)) else { panic!("no slot") };
        lane.begin_turn();
        lane.complete(at).expect("in flight");
        assert!(!lane.has_ended_turn(), "what it gives does not count yet");
        lane.counted();
        assert!(lane.has_ended_turn());
        assert!(lane.complete(at).is_err() && lane.has_ended_turn(), "a slot that is free");
    }

    #[test]
    fn pings_do_not_pile_up() {
        let lane = lane(1);
        for _ in 0..CONTROLS_MAX * 2 {
            lane.queue(Control::Pong);
        }
        assert_eq!(lane.next_control().map(|record| record.kind), Some(Kind::Pong as u8));
        assert_eq!(lane.next_control(), None);
    }

    #[test]
    fn a_closed_lane_takes_nothing() {
        let lane = lane(2);
        let Claim::Slot(at) = lane.claim(request(2)) else { panic!("no slot") };
        assert_eq!(lane.claim(InFlight::Forget), Claim::Slot(SlotUse { slot: 1, seq: 0 }));
        lane.close(Errno::IO);
        assert_eq!(lane.claim(request(4)), Claim::Closed);
        assert!(lane.park(parked(6)).is_err());
        assert_eq!(lane.in_flight(), 0);
        assert!(lane.complete(at).is_err());
        assert!(lane.take_kick());
    }

    #[test]
    fn while_cut_all_is_parked_and_the_dying_get_out() {
        let lane = lane(3);
        let Claim::Slot(dying) = lane.claim(request(2)) else { panic!("no slot") };
        let Claim::Slot(living) = lane.claim(request(4)) else { panic!("no slot") };
        let Claim::Slot(forget) = lane.claim(InFlight::Forget) else { panic!("no slot") };
        assert!(matches!(lane.interrupt(2), Interrupted::Cancelled));
        lane.cut(&[]);
        // It was answered; its slot stays, and its CANCEL was for the old connection.
        assert_eq!((lane.in_flight(), lane.abandoned(), lane.waits(2)), (3, 1, None));
        assert_eq!(lane.next_control(), None);
        assert!(matches!(lane.interrupt(2), Interrupted::Unknown));
        assert_eq!(lane.claim(request(6)), Claim::Full);
        lane.park(parked(6)).expect("open");
        assert!(lane.unpark().is_none());
        assert_eq!(
            lane.resend(),
            [Resend::Abandon(dying), Resend::Frame(living), Resend::Frame(forget)]
        );
        assert!(lane.unpark().is_none() && lane.claim(request(8)) == Claim::Full);
        lane.take_kick();
        lane.reopen();
        assert!(lane.take_kick(), "what is parked can go");
        assert_eq!(lane.complete(dying), Ok(InFlight::Abandoned));
        assert_eq!(lane.unpark().map(|(at, parked)| (at.slot, parked.unique)), Some((0, 6)));
        // In flight, and cut again: a task that dies meanwhile is let go at once.
        lane.cut(&[]);
        assert!(matches!(lane.interrupt(4), Interrupted::Abandoned));
        assert_eq!(lane.abandoned(), 1);
    }

    #[test]
    fn what_no_daemon_has_is_not_doubted() {
        let lane = lane(4);
        let claim = |unique| match lane.claim(request(unique)) {
            Claim::Slot(at) => at,
            full => panic!("{full:?}"),
        };
        let [old, waits] = [claim(2), claim(4)];
        lane.cut(&[waits]);
        // By the next connection it leaves.
        assert_eq!(lane.resend(), [Resend::Frame(old), Resend::Frame(waits)]);
        lane.reopen();
        let new = claim(6);
        lane.cut(&[old, new]);
        lane.doubt();
        let all = [old, waits].map(|at| [Resend::Unsure(at), Resend::Frame(at)]);
        assert_eq!(lane.resend(), [all.concat(), vec![Resend::Frame(new)]].concat());
    }

    #[test]
    fn what_cannot_be_sent_again_keeps_its_slot_until_the_daemon_has_spoken() {
        let lane = lane(1);
        let Claim::Slot(at) = lane.claim(request(2)) else { panic!("no slot") };
        lane.cut(&[]);
        assert_eq!(lane.resend(), [Resend::Frame(at)]);
        lane.give_up(at);
        lane.reopen();
        assert_eq!((lane.waits(2), lane.abandoned()), (None, 1));
        assert_eq!(lane.claim(request(4)), Claim::Full, "the daemon may have run this use of it");
        lane.cut(&[]);
        assert_eq!(lane.resend(), [Resend::Abandon(at)]);
        assert_eq!(lane.complete(at), Ok(InFlight::Abandoned));
    }

    #[test]
    fn a_cut_that_lasts_too_long_fails_what_somebody_waits_for() {
        let lane = lane(3);
        let release = Opcode::Release as u32;
        for request in [request(2), InFlight::request(4, release, 0), InFlight::Forget] {
            assert!(matches!(lane.claim(request), Claim::Slot(_)));
        }
        lane.park(parked(6)).expect("open");
        let [s1, s2, s3] = [1, 2, 3].map(Duration::from_secs);
        assert_eq!(lane.patience(Some(s2), s1), None, "it is not cut");
        lane.cut(&[]);
        lane.park(Parked { opcode: release, ..parked(8) }).expect("open");
        assert_eq!(lane.patience(None, s1), None, "hard");
        assert_eq!(lane.patience(Some(s2), s1), Some(s2));
        assert_eq!(lane.patience(Some(s2), s2), Some(s1));
        assert_eq!((lane.abandoned(), lane.parked().0), (0, 2));
        assert_eq!(lane.patience(Some(s2), s3), None);
        assert_eq!((lane.abandoned(), lane.parked()), (1, (1, 48)));
        assert_eq!(lane.park(parked(10)), Err(Errno::IO));
        lane.park(Parked { opcode: release, ..parked(12) }).expect("nobody waits for it");
        assert_eq!(lane.patience(Some(s2), s3), None);
        // There is a connection, which is lost before the lane has taken it.
        lane.renew();
        lane.park(parked(14)).expect("it is waited for again");
        assert_eq!(lane.patience(Some(s1), s2), Some(s1));
        assert_eq!(lane.patience(Some(s1), s3), None);
        assert_eq!(lane.park(parked(16)), Err(Errno::IO));
        assert_eq!(lane.resend().len(), 3);
        lane.reopen();
        lane.park(parked(18)).expect("a new connection");
    }
}
