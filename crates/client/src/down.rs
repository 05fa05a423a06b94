//! Host to guest: what becomes of the batches of a connection.
//!
//! A reply goes to the kernel from where it was received: its record header is overwritten by
//! `fuse_out_header`. Invariant: a batch is acknowledged after its last record was acted on, and a
//! reply leaves by the device of the lane whose slot it names.

use crate::conn::{Conn, ConnRx};
use crate::expire::{Name, names_of_record};
use crate::handshake::goodbye_text;
use crate::kept::Kept;
use crate::known::{Asked, tag_of};
use crate::lane::{Control, InFlight, Lane, LaneCounters};
use crate::lift::{Lift, Lifted};
use crate::session::{End, Session};
use fuser_fork::frame::{error_reply, out_header};
use fuser_fork::notify::NotifyOutcome;
use ringfs_wire::abi::{NotifyStoreOut, Opcode};
use ringfs_wire::batch::{Cursor, Kind, RecordHeader, notify};
use ringfs_wire::hello::Reason;
use ringfs_wire::limits::{RECORD_HEADER_BYTES, STORE_BYTES_MAX};
use ringfs_wire::session::LinkError;
use ringfs_wire::slot::SlotUse;
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use zerocopy::FromBytes;

/// The kernel takes errors of 1 to 511 from a file system.
const ERRNO_MAX: u32 = 511;

/// Acts on every whole batch that was received.
pub fn take_batches(
    session: &Session,
    lane: &Lane,
    conn: &Conn,
    half: &mut ConnRx,
    kept: &mut Kept,
    lift: &mut Lift,
) -> Result<(), End> {
    if let Some(Lifted { header, record, .. }) = lift.whole() {
        half.rx.count(&header);
        take_lifted(session, lane, kept, record, lift)?;
        conn.set_received(half.rx.received());
    }
    while let Some(bytes) = half.deframer.next_batch().map_err(LinkError::from)? {
        let header = half.rx.accept(bytes, conn.sent())?;
        let mut cursor = Cursor::new(&header);
        while let Some((record, span)) = cursor.next(bytes) {
            if record.kind == Kind::Reply as u8 {
                take_reply(session, lane, kept, record, &mut bytes[span])?;
            } else {
                take_record(session, lane, record, &mut bytes[span])?;
            }
        }
        conn.set_received(half.rx.received());
    }
    Ok(())
}

/// Acts on one record of a batch, which `bytes` hold, and which is no reply.
pub fn take_record(
    session: &Session,
    lane: &Lane,
    record: RecordHeader,
    bytes: &mut [u8],
) -> Result<(), End> {
    match Kind::from_u8(record.kind) {
        Some(Kind::Node) => {
            session.nodes_seen.fetch_add(1, Ordering::Relaxed);
            let heard = session.known.hear(&bytes[RECORD_HEADER_BYTES..]);
            heard.map_err(|_| End::Protocol("a NODE that cannot be"))
        }
        Some(Kind::Notify) if record.code == notify::GIVE_BACK => {
            session.prune.ask(&lane.device, &bytes[RECORD_HEADER_BYTES..]);
            Ok(())
        }
        Some(Kind::Notify) if record.code == notify::STORE && session.stores => {
            let stored = store(session, lane, bytes);
            stored.ok_or(End::Protocol("a NOTIFY STORE that cannot be"))
        }
        // A daemon that sends another one knows more than we.
        Some(Kind::Notify) => {
            session.records_skipped.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        Some(Kind::Ping) => {
            lane.queue(Control::Pong);
            Ok(())
        }
        Some(Kind::Pong | Kind::Session) => Ok(()),
        Some(Kind::Goodbye) => Err(End::Goodbye {
            reason: Reason::from_u32(record.code),
            text: goodbye_text(&bytes[RECORD_HEADER_BYTES..]),
        }),
        Some(
            Kind::Hello
            | Kind::Welcome
            | Kind::Reply
            | Kind::Request
            | Kind::Forget
            | Kind::Cancel
            | Kind::Restore
            | Kind::Unsure,
        ) => Err(End::Protocol("a record that only a guest sends, or a second handshake")),
        None if Kind::is_optional(record.kind) => {
            session.records_skipped.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        None => Err(End::Protocol("a record of an unknown kind: update ringfs")),
    }
}

/// Puts what a file holds into the kernel's page cache: its record is written over by the
/// notification. `None`: it is none.
fn store(session: &Session, lane: &Lane, bytes: &mut [u8]) -> Option<()> {
    let (head, content) = NotifyStoreOut::read_from_prefix(&bytes[RECORD_HEADER_BYTES..]).ok()?;
    let is_whole = head.offset == 0 && content.len() == head.size as usize;
    if !is_whole || !(1..=STORE_BYTES_MAX).contains(&content.len()) {
        return None;
    }
    session.known.unless_opened(head.nodeid, || {
        // Where it is not done the pages are read.
        let stored = fuser_fork::notify::store(&lane.device, bytes);
        let is_done = matches!(stored, Ok(NotifyOutcome::Done));
        LaneCounters::add(&lane.counters.stored, usize::from(is_done));
    });
    Some(())
}

fn take_reply(
    session: &Session,
    lane: &Lane,
    kept: &mut Kept,
    record: RecordHeader,
    bytes: &mut [u8],
) -> Result<(), End> {
    if record.lane != lane.index {
        return Err(End::Protocol("a reply for a lane of another connection"));
    }
    let at = SlotUse { slot: record.slot, seq: record.slot_seq };
    let Some(owed) = complete(session, lane, kept, record, bytes)? else { return Ok(()) };
    let Owed { unique, opcode, doubted } = owed;
    if opcode == Opcode::Init as u32 {
        take_init(session, lane, unique, record.code, &bytes[RECORD_HEADER_BYTES..])?;
    } else if record.code == 0 {
        let header = out_header(unique, bytes.len() - RECORD_HEADER_BYTES);
        bytes[..RECORD_HEADER_BYTES].copy_from_slice(&header);
        lane.answer(bytes);
    } else {
        lane.answer_error(unique, errno_of(record.code));
    }
    settled(session, lane, at);
    session.doubt_names(lane, doubted);
    Ok(())
}

/// The kernel has what it is owed.
fn settled(session: &Session, lane: &Lane, at: SlotUse) {
    lane.settled(at);
    session.known.settled(lane.index);
}

/// What the kernel is owed for a reply.
struct Owed {
    unique: u64,
    opcode: u32,
    /// Names that are to be looked up again once it is told; of a READ none.
    doubted: Vec<Name>,
}

/// A whole reply is in the pipe.
fn take_lifted(
    session: &Session,
    lane: &Lane,
    kept: &mut Kept,
    record: RecordHeader,
    lift: &mut Lift,
) -> Result<(), End> {
    match complete(session, lane, kept, record, &[]) {
        Ok(Some(Owed { unique, .. })) => {
            // Before it is there: who reads it may look at once.
            LaneCounters::add(&lane.counters.replies_spliced, 1);
            if !lift.deliver(lane, unique) {
                lane.counters.replies_spliced.fetch_sub(1, Ordering::Relaxed);
            }
            settled(session, lane, SlotUse { slot: record.slot, seq: record.slot_seq });
            Ok(())
        }
        end => {
            lift.discard();
            end.map(drop)
        }
    }
}

/// Ends the request of a reply. `bytes`: the record, or nothing of a READ's.
fn complete(
    session: &Session,
    lane: &Lane,
    kept: &mut Kept,
    record: RecordHeader,
    bytes: &[u8],
) -> Result<Option<Owed>, End> {
    let at = SlotUse { slot: record.slot, seq: record.slot_seq };
    let request = lane.complete(at)?;
    let body = bytes.get(RECORD_HEADER_BYTES..).unwrap_or_default();
    let asked = kept.record(at.slot);
    let doubted = match request.may_have_run(record.code) {
        true => asked.map(names_of_record).unwrap_or_default(),
        false => Vec::new(),
    };
    let tag = tag_of(lane.index, at);
    match request {
        InFlight::Request { opcode, .. } => {
            if opcode == Opcode::Write as u32
                && request.may_have_run(record.code)
                && let Some(asked) = asked.and_then(Asked::of_record)
            {
                session.known.doubt_write(&asked);
            }
            let asked = || asked.and_then(Asked::of_record);
            session.known.answered(tag, opcode, asked, record.code, body);
        }
        InFlight::Forget => {
            session.known.forgotten(tag, asked.map_or(&[], |asked| &asked[RECORD_HEADER_BYTES..]));
        }
        // What it gave the daemon takes back.
        InFlight::Abandoned => {}
    }
    lane.counted();
    if request == InFlight::Forget {
        session.turn();
    }
    kept.release(at.slot);
    let InFlight::Request { unique, opcode, .. } = request else {
        settled(session, lane, at);
        session.doubt_names(lane, doubted);
        return Ok(None);
    };
    lane.delivering(at);
    LaneCounters::add(&lane.counters.replies, 1);
    LaneCounters::add(&lane.counters.bytes_down, record.len as usize);
    Ok(Some(Owed { unique, opcode, doubted }))
}

/// A reply's body, or its errno.
pub fn outcome_of(record: RecordHeader, bytes: &[u8]) -> Result<&[u8], i32> {
    match record.code {
        0 => Ok(&bytes[RECORD_HEADER_BYTES..]),
        code => Err(errno_of(code).raw_os_error()),
    }
}

/// The daemon's errno, if the kernel would take it.
pub fn errno_of(code: u32) -> Errno {
    match i32::try_from(code) {
        Ok(errno) if code <= ERRNO_MAX => Errno::from_raw_os_error(errno),
        _ => Errno::IO,
    }
}

/// The kernel gets of the daemon's answer what all three agree on.
fn take_init(
    session: &Session,
    lane: &Lane,
    unique: u64,
    code: u32,
    body: &[u8],
) -> Result<(), End> {
    let agreed = match code {
        0 => session.agree_init(body),
        errno => Err(End::InitRefused(errno)),
    };
    match agreed {
        Ok(agreed) => {
            let body = agreed.body();
            lane.answer(&[&out_header(unique, body.len())[..], body].concat());
            session.init_is_answered();
            Ok(())
        }
        Err(end) => {
            lane.answer(&error_reply(unique, Errno::PROTO.raw_os_error()));
            Err(end)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errnos_the_kernel_takes() {
        for (code, expected) in [
            (2, Errno::NOENT),
            (511, Errno::from_raw_os_error(511)),
            (512, Errno::IO),
            (u32::MAX, Errno::IO),
        ] {
            assert_eq!(errno_of(code), expected);
        }
    }
}
