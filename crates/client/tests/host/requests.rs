//! What the small daemon does with the records of a guest: slots, rebuild, requests, forgets.

use super::tree::answer;
use super::*;
use rustix::fs::OFlags;

/// What a request's slot says of it.
enum Begun {
    New,
    Running,
    Ended(u32, Vec<u8>),
}

fn begin(
    shared: &Shared,
    came_by: u64,
    lane: u8,
    at: SlotUse,
    counts: bool,
) -> Result<Begun, String> {
    let mut slots = shared.slots.lock().expect("slots");
    let lane = slots.get_mut(usize::from(lane)).ok_or("a lane beyond those granted")?;
    let slot = lane.get_mut(usize::from(at.slot)).ok_or("a slot beyond those granted")?;
    let is_last = slot.next.wrapping_sub(1) == at.seq;
    match (&slot.reply, slot.busy) {
        (_, true) if slot.next == at.seq => {
            slot.came_by = came_by;
            Ok(Begun::Running)
        }
        (_, false) if slot.next == at.seq || slot.is_new || is_last && slot.runs_again => {
            *slot = Slot { counts, next: at.seq, busy: true, came_by, ..Slot::default() };
            Ok(Begun::New)
        }
        (Some((errno, body)), false) if is_last => Ok(Begun::Ended(*errno, body.clone())),
        _ => Err(format!("slot {} at {slot:?} has sequence {}", at.slot, at.seq)),
    }
}

/// A part of what the guest knows; with the last one, what was held runs.
fn restore(shared: &Shared, conn: &Conn, body: &[u8]) -> Result<(), String> {
    let mood = std::mem::take(&mut *shared.mood.lock().expect("mood"));
    match mood {
        Mood::CutsRestore => {
            conn.cut();
            // What came behind it in the same batch or the next.
            conn.is_silent.store(true, Ordering::SeqCst);
            return Ok(());
        }
        Mood::RefusesRestore => {
            let (kind, code) = (Kind::Goodbye as u8, Reason::Protocol as u32);
            conn.send(RecordHeader { kind, code, ..Default::default() }, b"by order", false);
            return Ok(());
        }
        mood => *shared.mood.lock().expect("mood") = mood,
    }
    if conn.number.load(Ordering::SeqCst) != 0 || shared.held.lock().expect("held").is_none() {
        return Err("a RESTORE out of place".to_owned());
    }
    let mut is_over = false;
    for entry in Restores::new(body) {
        let entry = entry.map_err(|error| error.to_string())?;
        is_over = matches!(entry, Restore::End(_));
        shared.note(|seen| match (entry, seen.rebuilds.last_mut().expect("begun")) {
            (Restore::Node { id, count, recipe }, rebuild) => {
                rebuild.nodes.push((id, count, recipe.to_vec()));
                seen.lookups.insert(id, count as i64);
            }
            (Restore::Handle { fh, node, flags, directory }, rebuild) => {
                rebuild.handles.push((fh, node, flags, directory));
            }
            (Restore::End(end), rebuild) => rebuild.end = Some(end),
        });
    }
    shared.note(|seen| seen.rebuilds.last_mut().expect("begun").records += 1);
    if is_over {
        let held = shared.held.lock().expect("held").take();
        for (conn, record, body) in held.into_iter().flatten() {
            take(shared, &conn, record, &body)?;
        }
    }
    Ok(())
}

/// A record that is no handshake.
pub(super) fn take(
    shared: &Shared,
    conn: &Arc<Conn>,
    record: RecordHeader,
    body: &[u8],
) -> Result<(), String> {
    let asks = [Kind::Request, Kind::Forget, Kind::Cancel].map(|kind| kind as u8);
    if asks.contains(&record.kind)
        && let Some(held) = &mut *shared.held.lock().expect("held")
    {
        if conn.number.load(Ordering::SeqCst) == 0 {
            return Err("something was asked before all was told".to_owned());
        }
        held.push((Arc::clone(conn), record, body.to_vec()));
        return Ok(());
    }
    let (lane, at) = (record.lane, SlotUse { slot: record.slot, seq: record.slot_seq });
    let kind = Kind::from_u8(record.kind);
    let counts = kind == Some(Kind::Forget) || record.code == Opcode::Lookup as u32;
    match kind {
        Some(Kind::Request | Kind::Forget) => match begin(shared, conn.serial, lane, at, counts)? {
            Begun::New if kind == Some(Kind::Request) => {
                let write = u64::from(record.code == Opcode::Write as u32);
                shared.note(|seen| {
                    (seen.requests, seen.writes) = (seen.requests + 1, seen.writes + write)
                });
                let (nodeid, args) = (u64::read_from_prefix(body).expect("nodeid").0, &body[24..]);
                let appended_at = appended_at(record.code, args);
                let is_unsure = shared.unsure.lock().expect("unsure").remove(&(lane, at.slot));
                match answer(shared, record.code, nodeid, args) {
                    // As a daemon of which nobody can tell what one before it has done.
                    Ok(_) if is_unsure && appended_at.is_some() => {
                        shared.finish(lane, at, (5, Vec::new()));
                    }
                    Ok(body) => {
                        give(shared, conn, record.code, &body);
                        let mood = match (record.code == Opcode::Unlink as u32, appended_at) {
                            (true, _) => Some(Mood::LosesRemovals),
                            (_, Some(at)) if at > BIG_BYTES => Some(Mood::LosesLateAppends),
                            _ => None,
                        };
                        shared.finish_in(mood, lane, at, (0, body));
                    }
                    Err(HANG) => shared.note(|seen| seen.hanging.push((lane, at))),
                    Err(errno) => shared.finish(lane, at, (errno, Vec::new())),
                }
            }
            Begun::New => forget(shared, lane, at, body)?,
            Begun::Running => shared.note(|seen| seen.repeats_running += 1),
            Begun::Ended(errno, body) => {
                shared.note(|seen| seen.repeats_ended += 1);
                shared.reply(lane, at, &(errno, body), conn.serial);
            }
        },
        Some(Kind::Cancel) if record.code == cancel::ABANDON => abandon(shared, conn, lane, at)?,
        Some(Kind::Cancel) => interrupt(shared, lane, at),
        // What it says of a request is for a daemon that has ended its session.
        Some(Kind::Unsure) => {
            shared.unsure.lock().expect("unsure").insert((lane, at.slot));
            shared.note(|seen| seen.unsure += 1);
        }
        Some(Kind::Restore) => restore(shared, conn, body)?,
        Some(Kind::Ping) => {
            let kind = Kind::Pong as u8;
            conn.send(RecordHeader { kind, ..Default::default() }, &[], false);
            shared.note(|seen| seen.pings += 1);
        }
        Some(Kind::Pong) => shared.note(|seen| seen.pongs += 1),
        Some(Kind::Goodbye) => shared.note(|seen| seen.goodbyes += u64::from(record.code == 1)),
        kind => return Err(format!("{kind:?} from a guest")),
    }
    Ok(())
}

/// Where a WRITE appends, as the guest sees it.
fn appended_at(opcode: u32, args: &[u8]) -> Option<usize> {
    let (write, _) = WriteIn::read_from_prefix(args).ok()?;
    let appends = OFlags::from_bits_retain(write.flags).contains(OFlags::APPEND);
    (opcode == Opcode::Write as u32 && appends).then_some(write.offset as usize)
}

/// Node ids come back.
fn forget(shared: &Shared, lane: u8, at: SlotUse, body: &[u8]) -> Result<(), String> {
    let forgets = <[ForgetOne]>::ref_from_bytes(body).map_err(|e| e.to_string())?;
    shared.note(|seen| {
        seen.forgets.extend(forgets);
        seen.forget_lanes.push(lane);
        for forget in forgets {
            let count = seen.lookups.entry(forget.nodeid).or_default();
            *count -= forget.nlookup as i64;
            if *count == 0 {
                shared.noted.lock().expect("noted").remove(&forget.nodeid);
            }
            if *count < 0 {
                seen.faults.push(format!("{forget:?} leaves {count}"));
            }
        }
    });
    shared.finish_in(Some(Mood::LosesForgets), lane, at, (0, Vec::new()));
    Ok(())
}

/// Nobody will take the reply.
fn abandon(shared: &Shared, conn: &Conn, lane: u8, at: SlotUse) -> Result<(), String> {
    let eintr = (4, Vec::new());
    match begin(shared, conn.serial, lane, at, false)? {
        Begun::New | Begun::Running => shared.finish(lane, at, eintr),
        Begun::Ended(_, given) => {
            // The only replies of this host that begin with one are LOOKUP's.
            if let Ok(entry) = EntryOut::read_from_bytes(&given) {
                shared.note(|seen| *seen.lookups.entry(entry.nodeid).or_default() -= 1);
            }
            shared.reply(lane, at, &eintr, conn.serial);
        }
    }
    shared.note(|seen| seen.abandons += 1);
    Ok(())
}

/// Who waits for the reply is dying.
fn interrupt(shared: &Shared, lane: u8, at: SlotUse) {
    let is_running = {
        let slots = shared.slots.lock().expect("slots");
        let slot = &slots[usize::from(lane)][usize::from(at.slot)];
        slot.busy && slot.next == at.seq
    };
    if is_running {
        shared.finish(lane, at, (4, Vec::new()));
    }
    shared.note(|seen| seen.cancels += 1);
}

/// Counts the lookups that a reply gives, and sends what finds its nodes again.
fn give(shared: &Shared, conn: &Conn, opcode: u32, reply: &[u8]) {
    let ids: Vec<u64> = match Opcode::from_u32(opcode) {
        Some(Opcode::Lookup) => {
            u64::read_from_prefix(reply).map(|(id, _)| id).into_iter().collect()
        }
        Some(Opcode::Readdirplus) => EACH_FILE.iter().map(|(_, id)| *id).collect(),
        _ => return,
    };
    if reply.is_empty() {
        return;
    }
    let is_wanted = shared.terms.lock().expect("terms").features & feature::RESTORE != 0;
    let mut body = Vec::new();
    for id in ids {
        shared.note(|seen| *seen.lookups.entry(id).or_default() += 1);
        if is_wanted && shared.noted.lock().expect("noted").insert(id) {
            assert!(push_node(&mut body, id, |out| out.extend(recipe(id))));
        }
    }
    if !body.is_empty() {
        let kind = Kind::Node as u8;
        conn.send(RecordHeader { kind, ..Default::default() }, &body, false);
    }
}
