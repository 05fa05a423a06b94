//! Guest to host: what becomes of a frame that was read from the FUSE device.
//!
//! A frame is read straight into the batch, behind what is there, and its header is overwritten by
//! the record's. Invariant: after every read the frame is in the batch with a slot, in the park, or
//! answered; what has a slot is kept until its reply. It must not wait for anything.

use crate::conn::Conn;
use crate::forgets::SHARED_PER_RECORD_MAX;
use crate::groups;
use crate::kept::Kept;
use crate::known::Asked;
use crate::lane::{Claim, InFlight, Inherited, Lane, LaneCounters, Parked};
use crate::resume::{Resend, unsent};
use crate::session::{End, Session};
use fuser_fork::frame::{Frame, error_reply, out_header};
use ringfs_wire::abi::{ForgetOne, InHeader, Opcode};
use ringfs_wire::batch::{BatchBuilder, Kind, RecordHeader, cancel};
use ringfs_wire::limits::{FORGETS_PER_RECORD_MAX, RECORD_HEADER_BYTES};
use ringfs_wire::slot::SlotUse;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ops::Range;
use zerocopy::{FromBytes, IntoBytes};

/// Node ids to give back that may wait for a slot; with more, nothing further is read.
pub const FORGETS_WAITING_MAX: usize = 16 * FORGETS_PER_RECORD_MAX;

/// What a lane has read and not sent yet.
pub struct Intake<'s> {
    session: &'s Session,
    lane: &'s Lane,
    /// The batch that is being made.
    pub builder: BatchBuilder,
    buffer: Vec<u8>,
    /// What has not left of a batch that is complete.
    sending: Range<usize>,
    /// What was sent and is not answered.
    pub kept: Kept,
    /// What has to go first on a new connection.
    resends: VecDeque<Resend>,
    is_resending: bool,
    /// Node ids to give back.
    pub forgets: Vec<ForgetOne>,
    /// No slot was there for the forgets; a kick tells when one is.
    pub forgets_blocked: bool,
    /// Controls or parked requests may be there to send.
    pub look: bool,
    /// Something was parked, and may be still.
    pub has_parked: bool,
}

impl<'s> Intake<'s> {
    /// Nothing yet, but for what the client before has left.
    pub fn new(session: &'s Session, lane: &'s Lane, inherited: Inherited) -> Intake<'s> {
        let Inherited { records, forgets, .. } = inherited;
        let mut kept = Kept::new(lane.slots());
        records.iter().for_each(|(slot, record)| kept.adopt(*slot, record));
        lane.forgets_wait(0, &forgets);
        Intake {
            session,
            lane,
            builder: BatchBuilder::new(),
            buffer: kept.first_buffer(lane.is_inherited()),
            sending: 0..0,
            kept,
            resends: VecDeque::new(),
            is_resending: false,
            forgets,
            forgets_blocked: false,
            look: false,
            has_parked: false,
        }
    }

    /// Something may have become possible.
    pub fn kicked(&mut self) {
        self.look = true;
        self.forgets_blocked = false;
    }

    /// Where the next frame is read to.
    pub fn spare(&mut self) -> &mut [u8] {
        self.builder.spare(&mut self.buffer)
    }

    /// Completes the batch: its length. [`Intake::retire`] follows when it has left, or never will.
    pub fn seal(&mut self, conn: &Conn) -> usize {
        let bytes = conn.seal(&mut self.builder, &mut self.buffer);
        self.sending = 0..bytes;
        bytes
    }

    /// What has not left of the batch that was completed.
    pub fn to_send(&self) -> &[u8] {
        &self.buffer[self.sending.clone()]
    }

    /// So much of that has.
    pub fn has_sent(&mut self, bytes: usize) {
        self.sending.start += bytes;
    }

    /// The batch has left, or never will: what is in it is kept.
    pub fn retire(&mut self) {
        self.sending = 0..0;
        self.kept.retire(&mut self.buffer);
    }

    /// The connection is gone, and with it what the batch holds: the requests that no daemon has.
    pub fn cut(&mut self) -> Vec<SlotUse> {
        let unsent = unsent(&self.builder, &self.sending, &self.buffer, &self.resends);
        self.builder = BatchBuilder::new();
        self.resends.clear();
        self.is_resending = false;
        self.retire();
        unsent
    }

    /// There is a new connection.
    pub fn resume(&mut self) {
        self.resends = self.lane.resend();
        self.is_resending = true;
        self.look = true;
    }

    /// As [`Intake::take_frame`], of a frame that was read before there was a batch.
    pub fn take_old_frame(&mut self, frame: &[u8]) -> Result<(), End> {
        self.spare()[..frame.len()].copy_from_slice(frame);
        self.take_frame(frame.len())
    }

    /// A frame stands in the first `bytes` of the batch's spare room.
    pub fn take_frame(&mut self, bytes: usize) -> Result<(), End> {
        let spare = self.builder.spare(&mut self.buffer);
        let frame = match Frame::parse(&spare[..bytes]) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(lane = self.lane.index, %error, "a kernel's frame is dropped");
                return Ok(());
            }
        };
        let header = *frame.header();
        match frame.known_opcode() {
            Some(Opcode::Forget | Opcode::BatchForget) => match frame.forgets() {
                Ok(forgets) => {
                    let before = self.forgets.len();
                    self.forgets.extend(forgets);
                    self.lane.forgets_wait(before, &self.forgets);
                }
                Err(error) => tracing::error!(%error, "forgets of the kernel's are dropped"),
            },
            Some(Opcode::Interrupt) => match frame.interrupt_target() {
                Ok(target) => self.interrupt(header.unique, target.unwrap_or_default()),
                Err(error) => tracing::error!(%error, "an interrupt of the kernel's is dropped"),
            },
            // The answer to a RETRIEVE, which nobody asks for; the kernel waits for nothing.
            Some(Opcode::NotifyReply) => {}
            Some(Opcode::Init) => {
                let args = frame.args().to_vec();
                self.forward_init(&header, &args)?;
            }
            _ => self.forward(&header, bytes),
        }
        Ok(())
    }

    /// Puts the frame in the spare room into the batch, or parks it.
    fn forward(&mut self, header: &InHeader, mut bytes: usize) {
        if groups::matter_to(header.opcode, header.uid) && self.session.appends_groups() {
            let groups = groups::of_pid(header.pid);
            bytes = groups::append(self.builder.spare(&mut self.buffer), bytes, &groups);
        }
        let (unique, opcode, pid) = (header.unique, header.opcode, header.pid);
        let args = &self.builder.spare(&mut self.buffer)[size_of::<InHeader>()..bytes];
        if let Some(asked) = self.session.refuses(opcode, || Asked::new(header.nodeid, args)) {
            self.lane.answer_error(unique, Errno::IO);
            return self.session.refused(&asked);
        }
        let claim = match self.kept.is_full() {
            false => self.lane.claim(InFlight::request(unique, opcode, pid)),
            true => Claim::Full,
        };
        match claim {
            Claim::Slot(at) => {
                let record = self.lane.record(Kind::Request, at, opcode, bytes);
                let start = self.builder.len();
                self.builder.commit(&mut self.buffer, record);
                self.kept.keep(at.slot, &self.buffer, start..start + bytes);
                LaneCounters::add(&self.lane.counters.requests, 1);
            }
            Claim::Full => {
                let frame = self.builder.spare(&mut self.buffer)[..bytes].into();
                match self.lane.park(Parked { unique, opcode, pid, frame }) {
                    Ok(()) => self.has_parked = true,
                    Err(errno) => self.lane.answer_error(unique, errno),
                }
            }
            Claim::Closed => self.lane.answer_error(unique, Errno::NOTCONN),
        }
    }

    /// INIT goes to the daemon with what could not be passed on taken out.
    fn forward_init(&mut self, header: &InHeader, args: &[u8]) -> Result<(), End> {
        match self.session.offer_init(args) {
            Ok(Ok(offer)) => {
                let bytes = size_of::<InHeader>() + size_of_val(&offer);
                let spare = self.builder.spare(&mut self.buffer);
                spare[size_of::<InHeader>()..bytes].copy_from_slice(offer.as_bytes());
                self.forward(header, bytes);
                Ok(())
            }
            Ok(Err(ask_again)) => {
                let body = ask_again.as_bytes();
                let reply = [&out_header(header.unique, body.len())[..], body].concat();
                self.lane.answer(&reply);
                Ok(())
            }
            Err(error) => {
                self.lane.answer_error(header.unique, Errno::PROTO);
                Err(error.into())
            }
        }
    }

    /// The task that waits for `target` has a signal: another thread sees to it.
    fn interrupt(&self, unique: u64, target: u64) {
        if self.session.note_interrupt(target) {
            return;
        }
        if self.session.keep_early_interrupt(target) && self.session.note_interrupt(target) {
            return;
        }
        // Either answered by now, or read by a lane that has not put it down yet. EAGAIN has the
        // kernel send the interrupt again if it still has the request, by the clone that read it;
        // the other clones do not know it.
        let again = error_reply(unique, Errno::AGAIN.raw_os_error());
        self.session.lanes.iter().for_each(|lane| lane.answer(&again));
    }

    /// Resends, cancels and pongs, parked requests, forgets: as many as the batch and the slots
    /// take.
    pub fn put_backlog(&mut self) {
        while self.look && !self.builder.is_due() {
            self.look = self.put_resend() || self.put_control() || self.put_parked();
        }
        if !self.builder.is_due() {
            self.put_forgets();
        }
    }

    fn put_resend(&mut self) -> bool {
        match self.resends.pop_front() {
            Some(Resend::Frame(at)) => {
                // A hostile daemon may have answered what it was not sent yet.
                if let Some(record) = self.kept.record(at.slot)
                    && let Ok((header, body)) = RecordHeader::read_from_prefix(record)
                {
                    let fits = self.builder.push(&mut self.buffer, header, body);
                    debug_assert!(fits, "a kept frame of {} bytes", record.len());
                }
            }
            Some(Resend::Unsure(at)) => self.put_word(Kind::Unsure, at, 0),
            Some(Resend::Abandon(at)) => self.put_word(Kind::Cancel, at, cancel::ABANDON),
            None if std::mem::take(&mut self.is_resending) => self.lane.reopen(),
            None => return false,
        }
        true
    }

    /// A record without a body.
    fn put_word(&mut self, kind: Kind, at: SlotUse, code: u32) {
        let record = self.lane.record(kind, at, code, RECORD_HEADER_BYTES);
        self.builder.commit(&mut self.buffer, record);
    }

    fn put_control(&mut self) -> bool {
        let Some(record) = self.lane.next_control() else { return false };
        self.builder.commit(&mut self.buffer, record);
        true
    }

    fn put_parked(&mut self) -> bool {
        let next = if self.kept.is_full() { None } else { self.lane.unpark() };
        let Some((at, parked)) = next else {
            self.has_parked = self.lane.parked().0 > 0;
            if self.has_parked {
                self.lane.starve();
            }
            return false;
        };
        let record = self.lane.record(Kind::Request, at, parked.opcode, parked.frame.len());
        // There is room: the batch is not due, and the frame has been in it before.
        let body = &parked.frame[RECORD_HEADER_BYTES..];
        let start = self.builder.len();
        let fits = self.builder.push(&mut self.buffer, record, body);
        debug_assert!(fits, "a parked frame of {} bytes", parked.frame.len());
        self.kept.keep(at.slot, &self.buffer, start..start + parked.frame.len());
        LaneCounters::add(&self.lane.counters.requests, 1);
        true
    }

    fn put_forgets(&mut self) {
        if self.session.forgets.is_shared() && !self.forgets_blocked {
            self.share_forgets();
        }
        if self.forgets.is_empty() || self.forgets_blocked {
            return;
        }
        let most = match self.session.forgets.is_shared() {
            true => SHARED_PER_RECORD_MAX,
            false => FORGETS_PER_RECORD_MAX,
        };
        let n = self.forgets.len().min(most);
        let rest = self.forgets.len() - n;
        match self.lane.claim_forget(&self.forgets[rest..], rest) {
            Claim::Slot(at) => {
                let record = self.lane.record(Kind::Forget, at, 0, 0);
                let body = self.forgets[rest..].as_bytes();
                let (start, bytes) = (self.builder.len(), RECORD_HEADER_BYTES + body.len());
                let fits = self.builder.push(&mut self.buffer, record, body);
                debug_assert!(fits, "{n} forgets");
                self.kept.keep(at.slot, &self.buffer, start..start + bytes);
                self.forgets.truncate(rest);
                LaneCounters::add(&self.lane.counters.forgets, n);
            }
            Claim::Full => {
                self.forgets_blocked = true;
                if self.session.forgets.is_shared() {
                    self.session.forgets.put(&mut self.forgets);
                }
            }
            Claim::Closed => self.forgets.clear(),
        }
    }

    /// While the daemon has not answered the last ones, all that come are left to the lanes that it
    /// answers; then what those have not taken is ours again.
    fn share_forgets(&mut self) {
        if self.lane.has_forget() {
            self.session.forgets.put(&mut self.forgets);
            self.forgets_blocked = true;
            self.lane.starve();
        } else if !self.session.forgets.is_empty() {
            self.forgets.extend(self.session.forgets.take(SHARED_PER_RECORD_MAX));
        }
    }
}
