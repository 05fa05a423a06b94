//! A client goes on where another one has died: from the session's fds and the file that it left.
//!
//! The kernel is asked to send again all that was read and not answered (NOTIFY_RESEND); what comes
//! is matched with the slots that the file tells of, before any lane runs. Invariant: a request
//! that was in a slot goes on in it, with the same seq, so that the daemon executes it once;
//! whatever was in a slot and does not come again was answered, or its task is dead. All of it may
//! be cut short and begun anew by a third client. It must not ask the daemon anything.

use crate::groups;
use crate::keep::{Keep, LaneKeep, Places, State, Terms};
use crate::kept::touch;
use crate::known::{Known, tag_of};
use crate::lane::{InFlight, Inherited, Lane};
use fuser_fork::device::{Device, DeviceError, ReadOutcome, read_buffer_bytes};
use fuser_fork::frame::{Frame, FrameError, UNIQUE_RESEND, error_reply};
use fuser_fork::notify::{Notice, NotifyOutcome};
use ringfs_wire::abi::{InHeader, Opcode, init};
use ringfs_wire::batch::{Kind, RecordHeader};
use ringfs_wire::limits::{PAYLOAD_BYTES_MAX, RECORD_HEADER_BYTES};
use ringfs_wire::slot::SlotUse;
use rustix::io::Errno;
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use thiserror::Error;
use zerocopy::IntoBytes;

/// Frames that were in work when a client died; the kernel bounds them far below.
const FRAMES_MAX: usize = 1 << 16;

/// Why a mount cannot be taken over.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum TakeoverError {
    #[error("the client before has left nothing that this one can read ({0})")]
    File(Errno),
    #[error("what the client before has left is damaged")]
    Damaged,
    #[error("the client before had {lanes} lanes and has left {fds} fds")]
    Fds { lanes: usize, fds: usize },
    #[error("the kernel does not send requests again (it is older than 6.9)")]
    NoResend,
    #[error("the mount is gone")]
    Unmounted,
    #[error("the FUSE device failed")]
    Device(#[from] DeviceError),
    #[error("a frame of the kernel's cannot be read")]
    Frame(#[from] FrameError),
    #[error("cannot set up the lanes")]
    Lanes(#[source] io::Error),
}

/// What there is to go on with.
pub struct Taken {
    /// For the client after this one.
    pub keep: Arc<Keep>,
    /// As the other client had them.
    pub terms: Terms,
    /// With what was in flight.
    pub lanes: Vec<Lane>,
    /// What the kernel knows.
    pub known: Known,
}

/// Whether a kernel with that offer can be asked to send requests again.
pub const fn is_possible(offered: u64) -> bool {
    offered & init::HAS_RESEND != 0
}

/// A request that the kernel has sent again and that has a slot.
struct Again {
    unique: u64,
    opcode: u32,
    pid: u32,
    frame: Vec<u8>,
}

/// Takes the session over: `devices` are its fds, the first one first.
pub fn take(file: OwnedFd, devices: &[Arc<Device>]) -> Result<Taken, TakeoverError> {
    let (keep, Places { lanes: places, logs }) = Keep::open(file).map_err(TakeoverError::File)?;
    let terms = keep.terms();
    let lanes = terms.lanes as usize;
    if devices.len() != lanes {
        return Err(TakeoverError::Fds { lanes, fds: devices.len() });
    }
    let slots = terms.slots as u16;
    let places: Vec<LaneKeep> = places.into_iter().take(lanes).collect();
    let (mut busy, mut in_use) = (HashMap::new(), HashSet::new());
    for (lane, place) in places.iter().enumerate() {
        for slot in 0..slots {
            let (state, seq, _, unique) = place.cell(slot).load();
            if state != State::Free {
                in_use.insert(tag_of(lane as u8, SlotUse { slot, seq }));
            }
            match state {
                State::Request | State::Unsure | State::Delivering | State::Abandoned => {
                    busy.insert(unique & !UNIQUE_RESEND, (lane, slot));
                }
                State::Free | State::Forget => {}
            }
        }
    }
    let known = Known::replayed(logs, terms.key, |tag| in_use.contains(&tag));
    let known = known.ok_or(TakeoverError::Damaged)?;
    let groups = terms.offered & init::CREATE_SUPP_GROUP == 0;
    let (mut again, frames) = read_again(&devices[0], &busy, &places, groups)?;
    let mut made = Vec::new();
    let mut frames = Some(frames);
    for (index, place) in places.into_iter().enumerate() {
        let mut inherited = Inherited {
            forgets: place.forgets_waiting(),
            frames: frames.take().unwrap_or_default(),
            records: Vec::new(),
        };
        let mut table = Vec::new();
        for slot in 0..slots {
            let again = again.remove(&(index, slot));
            table.push(settle(&place, index as u8, slot, again, &known, &mut inherited));
        }
        known.settled(index as u8);
        let device = &devices[index];
        device.set_nonblocking(true)?;
        let lane = Lane::new(index as u8, Arc::clone(device), slots);
        let mut lane = lane.map_err(TakeoverError::Lanes)?.keeping(place);
        lane.inherit(table, inherited, Arc::clone(&devices[0]));
        made.push(lane);
    }
    keep.change(|terms| terms.takeovers += 1);
    Ok(Taken { keep: Arc::new(keep), terms, lanes: made, known })
}

type ByPlace = HashMap<(usize, u16), Again>;

/// All that the kernel sends again: by slot, and the frames that no slot has.
fn read_again(
    device: &Device,
    busy: &HashMap<u64, (usize, u16)>,
    places: &[LaneKeep],
    append_groups: bool,
) -> Result<(ByPlace, Vec<Vec<u8>>), TakeoverError> {
    device.set_nonblocking(true)?;
    match Notice::resend().send(device)? {
        NotifyOutcome::Done => {}
        NotifyOutcome::Unmounted => return Err(TakeoverError::Unmounted),
        NotifyOutcome::NotCached | NotifyOutcome::InUse | NotifyOutcome::Unsupported => {
            return Err(TakeoverError::NoResend);
        }
    }
    let mut buffer = vec![0; read_buffer_bytes(PAYLOAD_BYTES_MAX as u32)];
    touch(&mut buffer);
    let (mut again, mut frames) = (HashMap::new(), Vec::new());
    while frames.len() < FRAMES_MAX {
        let mut bytes = match device.read_frame(&mut buffer)? {
            ReadOutcome::Frame(bytes) => bytes,
            ReadOutcome::WouldBlock => break,
            ReadOutcome::Interrupted => continue,
            ReadOutcome::Unmounted => return Err(TakeoverError::Unmounted),
        };
        let header = *Frame::parse(&buffer[..bytes])?.header();
        let InHeader { unique, opcode, pid, uid, .. } = header;
        let is_message = matches!(
            Opcode::from_u32(opcode),
            Some(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt | Opcode::NotifyReply)
        );
        let is_again = !is_message && unique & UNIQUE_RESEND != 0;
        let place = busy.get(&(unique & !UNIQUE_RESEND)).filter(|_| is_again);
        let Some(&(lane, slot)) = place else {
            frames.push(buffer[..bytes].to_vec());
            if is_message || is_again {
                continue;
            }
            // What is sent again comes before all that is new.
            break;
        };
        if places[lane].cell(slot).load().0 == State::Abandoned {
            // The client before had no time to say so: a dying task sees no errno, and who has
            // waited for as long as a soft mount does is told EIO.
            let _ = device.reply(&error_reply(unique, Errno::IO.raw_os_error()))?;
            continue;
        }
        if append_groups && groups::matter_to(opcode, uid) {
            bytes = groups::append(&mut buffer, bytes, &groups::of_pid(pid));
        }
        let frame = buffer[..bytes].to_vec();
        again.insert((lane, slot), Again { unique, opcode, pid, frame });
    }
    Ok((again, frames))
}

/// What is in a slot, and what of it has happened already.
fn settle(
    place: &LaneKeep,
    lane: u8,
    slot: u16,
    again: Option<Again>,
    known: &Known,
    inherited: &mut Inherited,
) -> (u32, Option<InFlight>) {
    let (state, seq, _, _) = place.cell(slot).load();
    let at = SlotUse { slot, seq };
    let tag = tag_of(lane, at);
    let mut record = |kind: Kind, code: u32, body: &[u8]| {
        let len = (RECORD_HEADER_BYTES + body.len()) as u32;
        let header = RecordHeader { len, kind: kind as u8, lane, slot, slot_seq: seq, code };
        inherited.records.push((slot, [header.as_bytes(), body].concat()));
    };
    match (state, again) {
        (State::Free, _) => (seq, None),
        (State::Request | State::Unsure | State::Delivering, Some(again)) => {
            let Again { unique, opcode, pid, frame } = again;
            // A reply that has come did not get through, and will come again.
            known.undo(tag);
            let unsure = state == State::Unsure;
            let state = if unsure { State::Unsure } else { State::Request };
            place.claimed_as(state, at, unique, opcode);
            record(Kind::Request, opcode, &frame[RECORD_HEADER_BYTES..]);
            let cancelled = false;
            (seq, Some(InFlight::Request { unique, opcode, pid, cancelled, sent: true, unsure }))
        }
        (State::Request | State::Unsure, None) => {
            // Its task has been killed meanwhile.
            known.undo(tag);
            place.abandoned(at);
            (seq, Some(InFlight::Abandoned))
        }
        (State::Delivering, None) => {
            place.freed(at, true);
            (seq.wrapping_add(1), None)
        }
        (State::Abandoned, _) => (seq, Some(InFlight::Abandoned)),
        (State::Forget, _) => {
            let forgets = place.forgets_of(slot);
            if known.end_forget(tag, &forgets) {
                place.freed(at, true);
                return (seq.wrapping_add(1), None);
            }
            record(Kind::Forget, 0, forgets.as_bytes());
            (seq, Some(InFlight::Forget))
        }
    }
}
