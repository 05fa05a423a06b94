//! Connections of the small daemon: batches in and out, the handshake, tickets, replies.

use super::requests::take;
use super::*;

impl Shared {
    pub(super) fn note(&self, edit: impl FnOnce(&mut Seen)) {
        // A failed test has poisoned it; the other threads go on.
        edit(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// A request ended: its reply is kept, and leaves by the lane's connection.
    pub(super) fn finish(&self, lane: u8, at: SlotUse, reply: (u32, Vec<u8>)) {
        self.finish_in(None, lane, at, reply);
    }

    /// The same; in the mood `losing` its reply is lost.
    pub(super) fn finish_in(
        &self,
        losing: Option<Mood>,
        lane: u8,
        at: SlotUse,
        reply: (u32, Vec<u8>),
    ) {
        let mood = *self.mood.lock().expect("mood");
        let is_lost = losing == Some(mood) || mood == Mood::LosesFirstReplies;
        let mut slots = self.slots.lock().expect("slots");
        let slot = &mut slots[usize::from(lane)][usize::from(at.slot)];
        assert!(slot.busy && slot.next == at.seq, "a request in work: {slot:?} {at:?}");
        let next = at.seq.wrapping_add(1);
        let (counts, came_by, reply_kept) = (slot.counts, slot.came_by, Some(reply.clone()));
        *slot = Slot { counts, next, came_by, reply: reply_kept, ..Slot::default() };
        drop(slots);
        if is_lost {
            return self.note(|seen| seen.lost += 1);
        }
        self.reply(lane, at, &reply, came_by);
    }
    pub(super) fn reply(
        &self,
        lane: u8,
        at: SlotUse,
        (errno, body): &(u32, Vec<u8>),
        came_by: u64,
    ) {
        let Some(conn) = self.conns.lock().expect("conns").get(&lane).cloned() else { return };
        if conn.serial != came_by {
            return;
        }
        let kind = Kind::Reply as u8;
        let (slot, slot_seq) = (at.slot, at.seq);
        let header = RecordHeader { len: 0, kind, lane, slot, slot_seq, code: *errno };
        let mood = *self.mood.lock().expect("mood");
        match mood {
            Mood::Fair
            | Mood::LosesFirstReplies
            | Mood::LosesForgets
            | Mood::LosesRemovals
            | Mood::LosesLateAppends
            | Mood::CutsRequest
            | Mood::CutsRestore
            | Mood::LosesWelcome
            | Mood::RefusesHello
            | Mood::RefusesRestore => {
                conn.send(header, body, false);
            }
            Mood::LosesEntries if body.len() != size_of::<EntryOut>() => {
                conn.send(header, body, false);
            }
            Mood::CutsLarge(_) | Mood::Crumbles(_) if body.len() < LARGE_BYTES => {
                conn.send(header, body, false);
            }
            Mood::CutsLarge(bytes) => {
                *self.mood.lock().expect("mood") = Mood::Fair;
                conn.send_some(header, body, bytes);
                conn.cut();
                self.note(|seen| seen.lost += 1);
            }
            Mood::Crumbles(bytes) => conn.send_pieces(header, body, bytes, usize::MAX),
            Mood::LosesReplies | Mood::LosesEntries => self.note(|seen| seen.lost += 1),
            Mood::CutsReply => {
                *self.mood.lock().expect("mood") = Mood::Fair;
                conn.send(header, body, true);
                self.note(|seen| seen.lost += 1);
            }
        }
    }
}

impl Conn {
    pub(super) fn cut(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    pub(super) fn send(&self, header: RecordHeader, body: &[u8], is_half: bool) {
        let limit = if is_half { (RECORD_HEADER_BYTES + body.len()) / 2 } else { usize::MAX };
        self.send_some(header, body, limit);
        if is_half {
            self.cut();
        }
    }

    /// Sends at most so many bytes of a batch.
    pub(super) fn send_some(&self, header: RecordHeader, body: &[u8], limit: usize) {
        self.send_pieces(header, body, usize::MAX, limit);
    }

    fn send_pieces(&self, header: RecordHeader, body: &[u8], piece: usize, limit: usize) {
        let mut buffer = vec![0; BATCH_BYTES_MAX];
        let mut builder = BatchBuilder::new();
        assert!(builder.push(&mut buffer, header, body));
        let mut tx = self.tx.lock().expect("tx");
        let received = tx.1;
        let bytes = &*tx.0.seal(&mut builder, &mut buffer, received);
        if !self.is_silent.load(Ordering::SeqCst) {
            // The guest may be gone.
            let mut pieces = bytes[..limit.min(bytes.len())].chunks(piece);
            let _ = pieces.try_for_each(|piece| (&self.stream).write_all(piece));
        }
    }
}

pub(super) fn serve(shared: &Shared, stream: UnixStream) -> Result<(), String> {
    let conn = Arc::new(Conn {
        stream: stream.try_clone().expect("dup"),
        tx: Mutex::new((LinkTx::new(true), 0)),
        serial: shared.serial.fetch_add(1, Ordering::SeqCst),
        is_silent: AtomicBool::new(false),
        is_old: AtomicBool::new(false),
        number: AtomicU64::new(u64::MAX),
    });
    let mut rx = LinkRx::new(true);
    let mut deframer = Deframer::new();
    loop {
        while let Some(bytes) = deframer.next_batch().map_err(|e| e.to_string())? {
            if conn.is_silent.load(Ordering::SeqCst) {
                shared.note(|seen| seen.unheard += bytes.len() as u64);
                continue;
            }
            let sent = conn.tx.lock().expect("tx").0.sent();
            let header = rx.accept(bytes, sent).map_err(|e| e.to_string())?;
            conn.tx.lock().expect("tx").1 = rx.received();
            let mut cursor = Cursor::new(&header);
            while let Some((record, span)) = cursor.next(bytes) {
                let body = &bytes[span][RECORD_HEADER_BYTES..];
                if record.kind == Kind::Hello as u8 {
                    let crc = welcome(shared, &conn, body)?;
                    rx.set_payload_crc(crc);
                } else if let Err(fault) = take(shared, &conn, record, body) {
                    return match conn.is_old.load(Ordering::SeqCst) {
                        true => Ok(()),
                        false => Err(fault),
                    };
                }
            }
        }
        match (&stream).read(deframer.spare()) {
            Ok(0) | Err(_) => return Ok(()),
            Ok(n) => deframer.filled(n),
        }
        let mut mood = shared.mood.lock().expect("mood");
        if *mood == Mood::CutsRequest {
            *mood = Mood::Fair;
            conn.cut();
            return Ok(());
        }
    }
}

fn welcome(shared: &Shared, conn: &Arc<Conn>, body: &[u8]) -> Result<bool, String> {
    let hello = Hello::decode(body).map_err(|e| e.to_string())?;
    let refused = |reason: Reason, text: &str| {
        let (kind, code) = (Kind::Goodbye as u8, reason as u32);
        conn.send(RecordHeader { kind, code, ..Default::default() }, text.as_bytes(), false);
        shared.note(|seen| seen.refusals += 1);
        Ok(false)
    };
    if hello.share != "data" {
        return refused(Reason::UnknownShare, "there is: data");
    }
    let terms = shared.terms.lock().expect("terms").clone();
    let is_new = hello.ticket == Ticket::NONE;
    let mut conns = shared.conns.lock().expect("conns");
    if is_new {
        conns.clear();
    }
    let mut unknown = shared.unknown.lock().expect("unknown");
    // Until it was told all, the first connection begins anew.
    let is_untold = shared.held.lock().expect("held").is_some() && hello.conn == 0;
    let rebuilds = !is_new && (unknown.is_some() || is_untold);
    let resumes = conns.contains_key(&(hello.conn as u8)) || rebuilds;
    let mut ticket = shared.ticket.lock().expect("ticket");
    let is_again = is_shown_again(shared, &hello);
    if !is_new && hello.ticket != Ticket([*ticket; 16]) && !is_again {
        return refused(Reason::UnknownSession, "wrong ticket");
    }
    let mut mood = shared.mood.lock().expect("mood");
    if *mood == Mood::RefusesHello {
        *mood = Mood::Fair;
        return refused(Reason::Timeout, "not now, by order");
    }
    if let Some(reason) = terms.refuses.filter(|_| resumes || hello.init.is_some()) {
        return refused(reason, "by order");
    }
    if resumes {
        let shown = if is_again { hello.ticket.0[0] } else { *ticket };
        shared.ticket_shown.store(shown.into(), Ordering::SeqCst);
        *ticket = ticket.wrapping_add(1).max(1);
        shared.ticket_for.store(hello.conn.into(), Ordering::SeqCst);
        if hello.init.is_none() {
            return Err("a HELLO that resumes, without the INIT in force".to_owned());
        }
    }
    if resumes && *mood == Mood::LosesWelcome {
        *mood = Mood::RefusesHello;
        conns.values().chain([conn]).for_each(|conn| conn.cut());
        return Ok(false);
    }
    drop(mood);
    let welcome = Welcome {
        version: 1,
        lanes: hello.lanes.min(terms.lanes),
        conns: hello.conns.min(terms.conns),
        slots: hello.slots.min(terms.slots),
        features: hello.features & terms.features,
        ticket: Ticket([*ticket; 16]),
        epoch: shared.epoch.load(Ordering::SeqCst),
        grace_s: 600,
        flags: match (rebuilds, resumes) {
            (true, _) => welcome_flag::REBUILD,
            (false, true) => welcome_flag::RESUMED,
            (false, false) => 0,
        },
    };
    if rebuilds {
        conns.drain().for_each(|(_, old)| old.is_old.store(true, Ordering::SeqCst));
        begin_rebuild(shared, unknown.take());
    }
    conn.number.store(hello.conn.into(), Ordering::SeqCst);
    if is_new {
        let slots = vec![vec![Slot::default(); welcome.slots.into()]; welcome.lanes.into()];
        *shared.slots.lock().expect("slots") = slots;
    }
    let kind = Kind::Welcome as u8;
    conn.send(RecordHeader { kind, ..Default::default() }, welcome.as_bytes(), false);
    let crc = welcome.features & 1 != 0;
    conn.tx.lock().expect("tx").0.set_payload_crc(crc);
    if let Some(old) = conns.insert(hello.conn as u8, Arc::clone(conn)) {
        old.is_old.store(true, Ordering::SeqCst);
    }
    shared.note(|seen| {
        seen.resumes += u64::from(resumes);
        seen.hellos.push(hello);
    });
    Ok(crc)
}

/// The WELCOME may be lost with the client that it was for, and the next client's too.
fn is_shown_again(shared: &Shared, hello: &Hello) -> bool {
    let shown = Ticket([shared.ticket_shown.load(Ordering::SeqCst) as u8; 16]);
    hello.ticket == shown && shared.ticket_for.load(Ordering::SeqCst) == u64::from(hello.conn)
}

/// The guest has to tell all; `slots`: those that the next daemon knows, if it is another one.
fn begin_rebuild(shared: &Shared, slots: Option<Vec<Vec<Slot>>>) {
    if let Some(slots) = slots {
        *shared.slots.lock().expect("slots") = slots;
    }
    *shared.held.lock().expect("held") = Some(Vec::new());
    shared.noted.lock().expect("noted").clear();
    shared.note(|seen| {
        seen.rebuilds.push(Rebuild::default());
        seen.lookups.clear();
    });
}
