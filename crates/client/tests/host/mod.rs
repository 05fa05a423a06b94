//! A small daemon for tests: the wire over real Unix sockets, a tree in memory, faults on demand.
//!
//! Files of the root: `hello` (text), `big` (a pattern), `hang` (a READ is answered only when it is
//! cancelled). It checks what a daemon may rely on: slots and their sequence, whole batches.

use ringfs_wire::abi::*;
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::hello::{Hello, Reason, Ticket, Welcome};
use ringfs_wire::limits::{BATCH_BYTES_MAX, RECORD_HEADER_BYTES};
use ringfs_wire::session::{LinkRx, LinkTx};
use ringfs_wire::slot::{ServerSlots, SlotUse};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

pub const HELLO_TEXT: &[u8] = b"hello from the host\n";
pub const BIG_BYTES: usize = 5 << 20;
const TICKET: Ticket = Ticket([0x5A; 16]);
const EACH_FILE: [(&str, u64); 3] = [("hello", 2), ("big", 3), ("hang", 4)];

/// What the host grants and how it misbehaves.
#[derive(Clone, Debug)]
pub struct Terms {
    pub lanes: u16,
    pub conns: u16,
    pub slots: u16,
    pub features: u64,
    pub init_errno: u32,
    pub answers_root: bool,
}

impl Default for Terms {
    fn default() -> Terms {
        let (lanes, conns, slots) = (8, 8, 1024);
        Terms { lanes, conns, slots, features: u64::MAX, init_errno: 0, answers_root: true }
    }
}

/// What the host has seen.
#[derive(Debug, Default)]
pub struct Seen {
    pub hellos: Vec<Hello>,
    pub requests: u64,
    pub hanging: Vec<(u8, SlotUse)>,
    pub cancels: u64,
    pub forgets: Vec<ForgetOne>,
    pub pongs: u64,
    pub goodbyes: u64,
    pub written: u64,
    pub faults: Vec<String>,
    pub closed: u64,
}

struct Shared {
    terms: Terms,
    seen: Mutex<Seen>,
    changed: Condvar,
    slots: Mutex<Vec<ServerSlots>>,
    conns: Mutex<Vec<Arc<Conn>>>,
}

struct Conn {
    tx: Mutex<(LinkTx, u64)>,
    stream: UnixStream,
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
            terms,
            seen: Mutex::default(),
            changed: Condvar::new(),
            slots: Mutex::default(),
            conns: Mutex::default(),
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
        self.shared.slots.lock().expect("slots").iter().map(ServerSlots::in_use).sum()
    }

    /// Sends a record of that kind on every connection.
    pub fn say(&self, kind: u8, code: u32, body: &[u8]) {
        for conn in self.shared.conns.lock().expect("conns").iter() {
            let header = RecordHeader { kind, code, ..Default::default() };
            conn.send(header, body);
        }
    }

    pub fn goodbye(&self, reason: Reason, text: &str) {
        self.say(Kind::Goodbye as u8, reason as u32, text.as_bytes());
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        for conn in self.shared.conns.lock().expect("conns").iter() {
            let _ = conn.stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Answers a READ of `hang` with an errno.
    pub fn answer_hanging(&self, lane: u8, at: SlotUse, errno: u32) {
        let conn = Arc::clone(&self.shared.conns.lock().expect("conns")[0]);
        self.shared.finish(lane, at);
        conn.reply(lane, at, errno, &[]);
    }
}

impl Shared {
    fn note(&self, edit: impl FnOnce(&mut Seen)) {
        // A failed test has poisoned it; the other threads go on.
        edit(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn finish(&self, lane: u8, at: SlotUse) {
        let done = self.slots.lock().expect("slots")[usize::from(lane)].finish(at);
        done.expect("a request in work");
    }
}

impl Conn {
    fn send(&self, header: RecordHeader, body: &[u8]) {
        let mut buffer = vec![0; BATCH_BYTES_MAX];
        let mut builder = BatchBuilder::new();
        assert!(builder.push(&mut buffer, header, body));
        let mut tx = self.tx.lock().expect("tx");
        let received = tx.1;
        let bytes = tx.0.seal(&mut builder, &mut buffer, received);
        // The guest may be gone.
        let _ = (&self.stream).write_all(bytes);
    }

    fn reply(&self, lane: u8, at: SlotUse, errno: u32, body: &[u8]) {
        let kind = Kind::Reply as u8;
        let (slot, slot_seq) = (at.slot, at.seq);
        self.send(RecordHeader { len: 0, kind, lane, slot, slot_seq, code: errno }, body);
    }
}

fn serve(shared: &Shared, stream: UnixStream) -> Result<(), String> {
    let conn = Arc::new(Conn {
        stream: stream.try_clone().expect("dup"),
        tx: Mutex::new((LinkTx::new(true), 0)),
    });
    let mut rx = LinkRx::new(true);
    let mut deframer = Deframer::new();
    loop {
        while let Some(bytes) = deframer.next_batch().map_err(|e| e.to_string())? {
            let sent = conn.tx.lock().expect("tx").0.sent();
            let header = rx.accept(bytes, sent).map_err(|e| e.to_string())?;
            conn.tx.lock().expect("tx").1 = rx.received();
            let mut cursor = Cursor::new(&header);
            while let Some((record, span)) = cursor.next(bytes) {
                let body = &bytes[span][RECORD_HEADER_BYTES..];
                if record.kind == Kind::Hello as u8 {
                    let crc = welcome(shared, &conn, body)?;
                    rx.set_payload_crc(crc);
                } else {
                    take(shared, &conn, record, body)?;
                }
            }
        }
        match (&stream).read(deframer.spare()) {
            Ok(0) | Err(_) => return Ok(()),
            Ok(n) => deframer.filled(n),
        }
    }
}

fn welcome(shared: &Shared, conn: &Arc<Conn>, body: &[u8]) -> Result<bool, String> {
    let hello = Hello::decode(body).map_err(|e| e.to_string())?;
    let refused = |reason: Reason, text: &str| {
        let (kind, code) = (Kind::Goodbye as u8, reason as u32);
        conn.send(RecordHeader { kind, code, ..Default::default() }, text.as_bytes());
        Ok(false)
    };
    if hello.share != "data" {
        return refused(Reason::UnknownShare, "there is: data");
    }
    let joins = hello.conn > 0;
    if hello.ticket != if joins { TICKET } else { Ticket::NONE } {
        return refused(Reason::UnknownSession, "wrong ticket");
    }
    let terms = &shared.terms;
    let welcome = Welcome {
        version: 1,
        lanes: hello.lanes.min(terms.lanes),
        conns: hello.conns.min(terms.conns),
        slots: hello.slots.min(terms.slots),
        features: hello.features & terms.features,
        ticket: TICKET,
        epoch: 3,
        grace_s: 600,
        flags: 0,
    };
    if !joins {
        let slots = (0..welcome.lanes).map(|_| ServerSlots::new(welcome.slots)).collect();
        *shared.slots.lock().expect("slots") = slots;
    }
    let kind = Kind::Welcome as u8;
    conn.send(RecordHeader { kind, ..Default::default() }, welcome.as_bytes());
    let crc = welcome.features & 1 != 0;
    conn.tx.lock().expect("tx").0.set_payload_crc(crc);
    shared.conns.lock().expect("conns").push(Arc::clone(conn));
    shared.note(|seen| seen.hellos.push(hello));
    Ok(crc)
}

fn take(shared: &Shared, conn: &Conn, record: RecordHeader, body: &[u8]) -> Result<(), String> {
    let (lane, at) = (record.lane, SlotUse { slot: record.slot, seq: record.slot_seq });
    let begin = || {
        let mut slots = shared.slots.lock().expect("slots");
        let table = slots.get_mut(usize::from(lane)).ok_or("a lane beyond those granted")?;
        table.begin(at).map_err(|e| e.to_string())
    };
    match Kind::from_u8(record.kind) {
        Some(Kind::Request) => {
            begin()?;
            shared.note(|seen| seen.requests += 1);
            let (nodeid, args) = (u64::read_from_prefix(body).expect("nodeid").0, &body[24..]);
            let answer = answer(shared, record.code, nodeid, args);
            if answer == Err(HANG) {
                shared.note(|seen| seen.hanging.push((lane, at)));
                return Ok(());
            }
            shared.finish(lane, at);
            match answer {
                Ok(body) => conn.reply(lane, at, 0, &body),
                Err(errno) => conn.reply(lane, at, errno, &[]),
            }
        }
        Some(Kind::Forget) => {
            begin()?;
            let forgets = <[ForgetOne]>::ref_from_bytes(body).map_err(|e| e.to_string())?;
            shared.note(|seen| seen.forgets.extend(forgets));
            shared.finish(lane, at);
            conn.reply(lane, at, 0, &[]);
        }
        Some(Kind::Cancel) => {
            let running = shared.slots.lock().expect("slots")[usize::from(lane)].is_running(at);
            if running {
                shared.finish(lane, at);
                conn.reply(lane, at, 4, &[]);
            }
            shared.note(|seen| seen.cancels += 1);
        }
        Some(Kind::Pong) => shared.note(|seen| seen.pongs += 1),
        Some(Kind::Goodbye) => shared.note(|seen| seen.goodbyes += u64::from(record.code == 1)),
        kind => return Err(format!("{kind:?} from a guest")),
    }
    Ok(())
}

const HANG: u32 = u32::MAX;
const ENOENT: u32 = 2;
const ENOSYS: u32 = 38;

fn attr(nodeid: u64) -> Option<Attr> {
    let size = match nodeid {
        1 => 0,
        2 => HELLO_TEXT.len(),
        3 => BIG_BYTES,
        4 => 4096,
        _ => return None,
    };
    let mode = if nodeid == 1 { 0o40755 } else { 0o100666 };
    Some(Attr { ino: nodeid, size: size as u64, mode, nlink: 1, blksize: 4096, ..Attr::default() })
}

pub fn big_byte(offset: usize) -> u8 {
    ((offset / 7) ^ (offset >> 13)) as u8
}

fn answer(shared: &Shared, opcode: u32, nodeid: u64, args: &[u8]) -> Result<Vec<u8>, u32> {
    match Opcode::from_u32(opcode).ok_or(ENOSYS)? {
        Opcode::Init => init(shared.terms.init_errno),
        Opcode::Lookup => {
            let name = args.strip_suffix(b"\0").ok_or(22u32)?;
            let found = EACH_FILE.iter().find(|(file, _)| file.as_bytes() == name);
            let &(_, nodeid) = found.ok_or(ENOENT)?;
            let attr = attr(nodeid).ok_or(ENOENT)?;
            Ok(EntryOut { nodeid, attr, ..EntryOut::default() }.as_bytes().to_vec())
        }
        Opcode::Getattr if nodeid == 1 && !shared.terms.answers_root => Err(HANG),
        Opcode::Getattr => {
            let attr = attr(nodeid).ok_or(ENOENT)?;
            Ok(AttrOut { attr, ..AttrOut::default() }.as_bytes().to_vec())
        }
        Opcode::Open | Opcode::Opendir => {
            let open_flags = fopen::DIRECT_IO;
            Ok(OpenOut { fh: nodeid, open_flags, backing_id: 0 }.as_bytes().to_vec())
        }
        Opcode::Read => read(nodeid, args),
        Opcode::Write => {
            let (write, data) = WriteIn::read_from_prefix(args).map_err(|_| 22u32)?;
            let at = write.offset as usize;
            if data.iter().enumerate().any(|(i, &byte)| byte != big_byte(at + i)) {
                return Err(5);
            }
            shared.note(|seen| seen.written += data.len() as u64);
            Ok(WriteOut { size: data.len() as u32, padding: 0 }.as_bytes().to_vec())
        }
        Opcode::Readdir => readdir(args),
        Opcode::Release | Opcode::Releasedir | Opcode::Flush => Ok(Vec::new()),
        _ => Err(ENOSYS),
    }
}

fn init(errno: u32) -> Result<Vec<u8>, u32> {
    if errno != 0 {
        return Err(errno);
    }
    let flags = init::MAX_PAGES | init::BIG_WRITES | init::ASYNC_DIO | init::PARALLEL_DIROPS;
    Ok(InitOut {
        major: 7,
        minor: 45,
        max_readahead: 1 << 20,
        flags: flags as u32,
        max_background: 64,
        max_write: 1 << 20,
        time_gran: 1,
        max_pages: 256,
        ..InitOut::default()
    }
    .as_bytes()
    .to_vec())
}

fn read(nodeid: u64, args: &[u8]) -> Result<Vec<u8>, u32> {
    let (read, _) = ReadIn::read_from_prefix(args).map_err(|_| 22u32)?;
    let (at, end) = (read.offset as usize, read.offset as usize + read.size as usize);
    match nodeid {
        2 => Ok(HELLO_TEXT[at.min(HELLO_TEXT.len())..end.min(HELLO_TEXT.len())].to_vec()),
        3 => Ok((at.min(BIG_BYTES)..end.min(BIG_BYTES)).map(big_byte).collect()),
        4 => Err(HANG),
        _ => Err(21),
    }
}

fn readdir(args: &[u8]) -> Result<Vec<u8>, u32> {
    let (read, _) = ReadIn::read_from_prefix(args).map_err(|_| 22u32)?;
    let mut body = Vec::new();
    for (index, (name, ino)) in EACH_FILE.iter().enumerate().skip(read.offset as usize) {
        let (off, namelen) = (index as u64 + 1, name.len() as u32);
        body.extend_from_slice(Dirent { ino: *ino, off, namelen, type_: 8 }.as_bytes());
        body.extend_from_slice(name.as_bytes());
        body.resize(body.len().next_multiple_of(8), 0);
    }
    Ok(body)
}
