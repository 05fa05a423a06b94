//! A small daemon for tests: the wire over real Unix sockets, a tree in memory, faults on demand.
//!
//! Files of the root: `hello` (text), `big` (a pattern), `hang` (a READ is answered only when it is
//! cancelled), and, not listed, `n0` and so on. It checks what a daemon may rely on: slots and
//! their sequence, whole batches, tickets, the order of a rebuild, counts of lookups.
//! Its table of slots outlives connections, with every reply; a request runs once.

use ringfs_wire::abi::*;
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader, cancel};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::hello::{Hello, Reason, Ticket, Welcome, feature, welcome_flag};
use ringfs_wire::limits::{BATCH_BYTES_MAX, RECORD_HEADER_BYTES};
use ringfs_wire::restore::{End, Restore, Restores, push_node};
use ringfs_wire::session::{LinkRx, LinkTx};
use ringfs_wire::slot::SlotUse;
use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

mod tree;

use tree::answer;
pub use tree::big_byte;

pub const HELLO_TEXT: &[u8] = b"hello from the host\n";
pub const BIG_BYTES: usize = 5 << 20;
const EACH_FILE: [(&str, u64); 3] = [("hello", 2), ("big", 3), ("hang", 4)];
/// The node of `n0`.
const NUMBERED: u64 = 1000;

/// What the host grants and how it misbehaves.
#[derive(Clone, Debug)]
pub struct Terms {
    pub lanes: u16,
    pub conns: u16,
    pub slots: u16,
    pub features: u64,
    pub init_errno: u32,
    /// Offered beside what all hosts offer.
    pub init_flags: u64,
    pub answers_root: bool,
    /// To a HELLO that resumes: `Some` refuses.
    pub refuses: Option<Reason>,
}

impl Default for Terms {
    fn default() -> Terms {
        let (lanes, conns, slots) = (8, 8, 1024);
        let (init_errno, init_flags, answers_root, refuses) = (0, 0, true, None);
        let features = u64::MAX;
        Terms { lanes, conns, slots, features, init_errno, init_flags, answers_root, refuses }
    }
}

/// What the host has seen.
#[derive(Debug, Default)]
pub struct Seen {
    pub hellos: Vec<Hello>,
    /// HELLOs that resumed, and those that were refused.
    pub resumes: u64,
    pub refusals: u64,
    /// Requests executed, and those that came again: running, and with a kept reply.
    pub requests: u64,
    pub writes: u64,
    pub repeats_running: u64,
    pub repeats_ended: u64,
    pub hanging: Vec<(u8, SlotUse)>,
    pub cancels: u64,
    pub abandons: u64,
    pub forgets: Vec<ForgetOne>,
    /// Replies that were lost by order.
    pub lost: u64,
    /// Bytes that came in while the host was told to be silent.
    pub unheard: u64,
    pub pings: u64,
    pub pongs: u64,
    pub goodbyes: u64,
    pub written: u64,
    pub faults: Vec<String>,
    pub closed: u64,
    /// Rebuilds begun, the last one still under way or not.
    pub rebuilds: Vec<Rebuild>,
    /// Lookups that the guest has of each node.
    pub lookups: HashMap<u64, i64>,
}

/// What a guest told of its session.
#[derive(Clone, Debug, Default)]
pub struct Rebuild {
    /// Node ids, with lookups and recipe.
    pub nodes: Vec<(u64, u64, Vec<u8>)>,
    /// Handles, with node, flags, and whether of a directory.
    pub handles: Vec<(u64, u64, u32, bool)>,
    pub records: u64,
    pub end: Option<End>,
}

/// The recipe of a node.
pub fn recipe(nodeid: u64) -> Vec<u8> {
    format!("where {nodeid} is").into_bytes()
}

/// How the host treats what comes and goes, from now on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mood {
    #[default]
    Fair,
    /// It executes, and its replies are lost.
    LosesReplies,
    /// The same for replies that give a node alone: LOOKUP's.
    LosesEntries,
    /// The same for those to FORGETs.
    LosesForgets,
    /// Half of the next reply leaves, then its connection is cut.
    CutsReply,
    /// The next connection that brings something is cut before that is looked at, most likely in
    /// the middle of a large batch.
    CutsRequest,
    /// The next RESTORE is not taken, and its connection is cut.
    CutsRestore,
    /// The next RESTORE is refused.
    RefusesRestore,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    /// After a rebuild: whatever comes is the next one.
    is_new: bool,
    /// It only counts (LOOKUP, FORGET): what it did went with the daemon that did it.
    counts: bool,
    /// And so its last one does.
    runs_again: bool,
    next: u32,
    busy: bool,
    reply: Option<(u32, Vec<u8>)>,
    /// By which connection its request last came: the reply leaves by no other.
    came_by: u64,
}

struct Shared {
    terms: Mutex<Terms>,
    mood: Mutex<Mood>,
    seen: Mutex<Seen>,
    changed: Condvar,
    slots: Mutex<Vec<Vec<Slot>>>,
    /// The newest connection of each lane.
    conns: Mutex<HashMap<u8, Arc<Conn>>>,
    /// The number in the newest ticket.
    ticket: Mutex<u8>,
    /// The connection that the newest ticket was for: the one that the guest has shown last is good
    /// for it still.
    ticket_for: AtomicU64,
    ticket_shown: AtomicU64,
    epoch: AtomicU64,
    /// Of the next connection.
    serial: AtomicU64,
    /// The session has to be rebuilt: the slots that the next daemon knows.
    unknown: Mutex<Option<Vec<Vec<Slot>>>>,
    /// A rebuild is under way: what came on other connections than the first.
    held: Mutex<Option<Vec<Held>>>,
    /// Nodes whose recipes were sent.
    noted: Mutex<HashSet<u64>>,
    next_fh: AtomicU64,
}

type Held = (Arc<Conn>, RecordHeader, Vec<u8>);

struct Conn {
    tx: Mutex<(LinkTx, u64)>,
    stream: UnixStream,
    serial: u64,
    is_silent: AtomicBool,
    /// Another one has taken its place: what it brings counts no more.
    is_old: AtomicBool,
    /// Its number, once it has said HELLO.
    number: AtomicU64,
}

pub struct Host {
    pub path: PathBuf,
    shared: Arc<Shared>,
}

impl Host {
    pub fn start(dir: &Path, terms: Terms) -> Host {
        let path = dir.join("host.sock");
        let listener = UnixListener::bind(&path).expect("bind");
        let shared = Arc::new(Shared {
            terms: Mutex::new(terms),
            mood: Mutex::default(),
            ticket: Mutex::new(1),
            ticket_for: AtomicU64::new(u64::MAX),
            ticket_shown: AtomicU64::new(1),
            seen: Mutex::default(),
            changed: Condvar::new(),
            slots: Mutex::default(),
            conns: Mutex::default(),
            epoch: AtomicU64::new(3),
            serial: AtomicU64::new(0),
            unknown: Mutex::default(),
            held: Mutex::default(),
            noted: Mutex::default(),
            next_fh: AtomicU64::new(1),
        });
        let accepting = Arc::clone(&shared);
        // It ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(stream), shared) = (stream, Arc::clone(&accepting)) else { return };
                std::thread::spawn(move || {
                    if let Err(fault) = serve(&shared, stream) {
                        shared.note(|seen| seen.faults.push(fault));
                    }
                    shared.note(|seen| seen.closed += 1);
                });
            }
        });
        Host { path, shared }
    }

    /// Waits until `look` finds something in what was seen.
    pub fn wait_for<T>(&self, what: &str, mut look: impl FnMut(&mut Seen) -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut seen = self.shared.seen.lock().expect("seen");
        loop {
            if let Some(found) = look(&mut seen) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} did not come: {seen:?}");
            seen = self.shared.changed.wait_timeout(seen, left).expect("seen").0;
        }
    }

    pub fn slots_in_use(&self) -> usize {
        self.shared.slots.lock().expect("slots").iter().flatten().filter(|slot| slot.busy).count()
    }

    /// Sends a record of that kind on every connection.
    pub fn say(&self, kind: u8, code: u32, body: &[u8]) {
        for conn in self.shared.conns.lock().expect("conns").values() {
            let header = RecordHeader { kind, code, ..Default::default() };
            conn.send(header, body, false);
        }
    }

    pub fn goodbye(&self, reason: Reason, text: &str) {
        self.say(Kind::Goodbye as u8, reason as u32, text.as_bytes());
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        for conn in self.shared.conns.lock().expect("conns").values() {
            conn.cut();
        }
    }

    /// Another daemon is there, which does not know the session, and the slots only if it is told
    /// to. It is found out by a connection that is cut: that of `lane`, or all.
    pub fn restart(&self, knows_slots: bool, lane: Option<u8>) {
        let mut slots = self.shared.slots.lock().expect("slots").clone();
        if !knows_slots {
            let new = Slot { is_new: true, ..Slot::default() };
            slots.iter_mut().flatten().for_each(|slot| *slot = new.clone());
        }
        for slot in slots.iter_mut().flatten() {
            // Its requests in work died with the old one.
            slot.busy = false;
            slot.runs_again = slot.counts;
        }
        *self.shared.unknown.lock().expect("unknown") = Some(slots);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        let conns = self.shared.conns.lock().expect("conns");
        conns
            .iter()
            .filter(|(its, _)| lane.is_none_or(|lane| lane == **its))
            .for_each(|c| c.1.cut());
    }

    /// The connections that there are look alive and are dead.
    pub fn go_silent(&self) {
        for conn in self.shared.conns.lock().expect("conns").values() {
            conn.is_silent.store(true, Ordering::SeqCst);
        }
    }

    /// What is no batch comes from every connection.
    pub fn babble(&self) {
        for conn in self.shared.conns.lock().expect("conns").values() {
            let _ = (&conn.stream).write_all(&[0x55; 64]);
        }
    }

    /// Nobody can connect any more, as long as what this gives lives.
    pub fn hide(&self) -> Hidden {
        let hidden = self.path.with_extension("hidden");
        std::fs::rename(&self.path, &hidden).expect("rename");
        Hidden { hidden, path: self.path.clone() }
    }

    pub fn set_mood(&self, mood: Mood) {
        *self.shared.mood.lock().expect("mood") = mood;
    }

    /// What HELLOs get from now on.
    pub fn grant(&self, terms: Terms) {
        *self.shared.terms.lock().expect("terms") = terms;
    }

    /// Whether HELLOs that resume are refused from now on.
    pub fn refuse(&self, reason: Option<Reason>) {
        self.shared.terms.lock().expect("terms").refuses = reason;
    }

    /// Answers a READ of `hang` with an errno.
    pub fn answer_hanging(&self, lane: u8, at: SlotUse, errno: u32) {
        self.shared.finish(lane, at, (errno, Vec::new()));
    }

    /// What no test may end with.
    pub fn assert_no_faults(&self) {
        let faults = self.wait_for("faults", |seen| Some(seen.faults.clone()));
        assert_eq!(faults, [""; 0]);
    }
}

/// A socket that has another name for a while.
pub struct Hidden {
    hidden: PathBuf,
    path: PathBuf,
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = std::fs::rename(&self.hidden, &self.path);
    }
}

impl Shared {
    fn note(&self, edit: impl FnOnce(&mut Seen)) {
        // A failed test has poisoned it; the other threads go on.
        edit(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// A request ended: its reply is kept, and leaves by the lane's connection.
    fn finish(&self, lane: u8, at: SlotUse, reply: (u32, Vec<u8>)) {
        let mut slots = self.slots.lock().expect("slots");
        let slot = &mut slots[usize::from(lane)][usize::from(at.slot)];
        assert!(slot.busy && slot.next == at.seq, "a request in work: {slot:?} {at:?}");
        let next = at.seq.wrapping_add(1);
        let (counts, came_by, reply_kept) = (slot.counts, slot.came_by, Some(reply.clone()));
        *slot = Slot { counts, next, came_by, reply: reply_kept, ..Slot::default() };
        drop(slots);
        self.reply(lane, at, &reply, came_by);
    }

    fn reply(&self, lane: u8, at: SlotUse, (errno, body): &(u32, Vec<u8>), came_by: u64) {
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
            | Mood::LosesForgets
            | Mood::CutsRequest
            | Mood::CutsRestore
            | Mood::RefusesRestore => {
                conn.send(header, body, false);
            }
            Mood::LosesEntries if body.len() != size_of::<EntryOut>() => {
                conn.send(header, body, false);
            }
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
    fn cut(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    fn send(&self, header: RecordHeader, body: &[u8], is_half: bool) {
        let mut buffer = vec![0; BATCH_BYTES_MAX];
        let mut builder = BatchBuilder::new();
        assert!(builder.push(&mut buffer, header, body));
        let mut tx = self.tx.lock().expect("tx");
        let received = tx.1;
        let mut bytes = &*tx.0.seal(&mut builder, &mut buffer, received);
        if is_half {
            bytes = &bytes[..bytes.len() / 2];
        }
        if !self.is_silent.load(Ordering::SeqCst) {
            // The guest may be gone.
            let _ = (&self.stream).write_all(bytes);
        }
        if is_half {
            self.cut();
        }
    }
}

fn serve(shared: &Shared, stream: UnixStream) -> Result<(), String> {
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
    let shown = Ticket([shared.ticket_shown.load(Ordering::SeqCst) as u8; 16]);
    // The WELCOME may be lost with the client that it was for, and the next client's too.
    let is_again =
        hello.ticket == shown && shared.ticket_for.load(Ordering::SeqCst) == u64::from(hello.conn);
    if !is_new && hello.ticket != Ticket([*ticket; 16]) && !is_again {
        return refused(Reason::UnknownSession, "wrong ticket");
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
        if let Some(slots) = unknown.take() {
            *shared.slots.lock().expect("slots") = slots;
        }
        *shared.held.lock().expect("held") = Some(Vec::new());
        shared.noted.lock().expect("noted").clear();
        shared.note(|seen| {
            seen.rebuilds.push(Rebuild::default());
            seen.lookups.clear();
        });
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

fn take(
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
                match answer(shared, record.code, nodeid, args) {
                    Ok(body) => {
                        give(shared, conn, record.code, &body);
                        shared.finish(lane, at, (0, body));
                    }
                    Err(HANG) => shared.note(|seen| seen.hanging.push((lane, at))),
                    Err(errno) => shared.finish(lane, at, (errno, Vec::new())),
                }
            }
            Begun::New => {
                let forgets = <[ForgetOne]>::ref_from_bytes(body).map_err(|e| e.to_string())?;
                shared.note(|seen| {
                    seen.forgets.extend(forgets);
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
                let mood = *shared.mood.lock().expect("mood");
                if mood == Mood::LosesForgets {
                    *shared.mood.lock().expect("mood") = Mood::LosesReplies;
                }
                shared.finish(lane, at, (0, Vec::new()));
                *shared.mood.lock().expect("mood") = mood;
            }
            Begun::Running => shared.note(|seen| seen.repeats_running += 1),
            Begun::Ended(errno, body) => {
                shared.note(|seen| seen.repeats_ended += 1);
                shared.reply(lane, at, &(errno, body), conn.serial);
            }
        },
        Some(Kind::Cancel) if record.code == cancel::ABANDON => {
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
        }
        Some(Kind::Cancel) => {
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

const HANG: u32 = u32::MAX;
const ENOENT: u32 = 2;
const ENOSYS: u32 = 38;
