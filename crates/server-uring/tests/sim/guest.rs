//! A guest: what it asks, what it must be told, and what it keeps until then.

use crate::Plan;
use crate::host::Host;
use ringfs_server::greet::Newcomer;
use ringfs_server::link::Numbers;
use ringfs_server::mailbox::Mail;
use ringfs_server::registry::Shown;
use ringfs_server::ring_sim::Rng;
use ringfs_server::session::Session;
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader, cancel};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::hello::{Reason, Ticket, Welcome, welcome_flag};
use ringfs_wire::limits::*;
use ringfs_wire::restore::{End, Nodes, Restore, push_restore};
use ringfs_wire::session::{LinkRx, LinkTx};
use ringfs_wire::slot::{ClientSlots, SlotUse};
use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use zerocopy::{FromBytes, IntoBytes};

pub const CELLS: usize = 24;
pub const CELL_BYTES: usize = (1 << 20) + 8192;

/// What a guest waits for.
#[derive(Clone, Debug)]
pub enum Asked {
    Create,
    Write {
        cell: usize,
        at: usize,
        data: Vec<u8>,
    },
    Read {
        cell: usize,
        at: usize,
        len: usize,
    },
    Fsync,
    Lookup {
        there: bool,
    },
    Forget,
    Getattr,
    Syncfs,
    /// Fails if it runs twice.
    Mkdir,
    /// The same, with its answer left to the daemon.
    Abandoned,
}

/// What is in flight: what for, and the record as it goes out, again after a cut.
#[derive(Clone, Debug)]
pub struct Frame {
    pub asked: Asked,
    pub kind: Kind,
    pub code: u32,
    pub body: Vec<u8>,
}

/// A guest with a file of its own, in cells with at most one request on each.
pub struct Guest {
    pub id: usize,
    /// None while no daemon runs.
    pub host: Option<Arc<Host>>,
    pub session: Option<Arc<Session>>,
    pub ticket: Ticket,
    /// What finds the nodes that it has.
    pub recipes: BTreeMap<u64, Vec<u8>>,
    pub stream: UnixStream,
    pub welcomed: bool,
    pub known: bool,
    pub tx: LinkTx,
    pub rx: LinkRx,
    pub slots: ClientSlots<Frame>,
    /// What is sent again on a new connection, before anything else.
    pub again: VecDeque<SlotUse>,
    pub deframer: Deframer,
    pub builder: BatchBuilder,
    pub buffer: Vec<u8>,
    pub out: Vec<u8>,
    pub cells: Vec<(bool, Vec<u8>)>,
    pub file: Option<(u64, u64)>,
    pub to_forget: Vec<u64>,
    pub left: usize,
    pub pings: usize,
    pub made: usize,
    pub pool: bool,
    pub cuts: usize,
    pub resumes: bool,
    pub ended: bool,
}

impl Guest {
    pub fn new(id: usize, host: &Arc<Host>, plan: &Plan) -> Guest {
        let mut guest = Guest {
            id,
            host: Some(Arc::clone(host)),
            session: None,
            ticket: Ticket::NONE,
            recipes: BTreeMap::new(),
            stream: UnixStream::pair().expect("a pair").0,
            welcomed: false,
            known: false,
            tx: LinkTx::new(true),
            rx: LinkRx::new(true),
            slots: ClientSlots::new(16),
            again: VecDeque::new(),
            deframer: Deframer::new(),
            builder: BatchBuilder::new(),
            buffer: vec![0; BATCH_BYTES_MAX],
            out: Vec::new(),
            cells: vec![(false, Vec::new()); CELLS],
            file: None,
            to_forget: Vec::new(),
            left: plan.requests,
            pings: 0,
            made: 0,
            pool: plan.pool,
            cuts: plan.cuts.unwrap_or(0),
            resumes: plan.cuts.is_some(),
            ended: false,
        };
        guest.connect();
        guest
    }

    /// A new connection in place of the one there was.
    pub fn connect(&mut self) {
        // Until the next daemon runs.
        let Some(host) = self.host.take_if(|host| !host.stops.load(Relaxed)) else {
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
            (self.host, self.session) = (None, None);
            return;
        };
        self.session = None;
        self.welcomed = false;
        let Some((session, ticket)) = host.session(self.ticket, self.file.is_none()) else {
            // Which it finds out when it looks.
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
            (self.out, self.deframer) = (Vec::new(), Deframer::new());
            self.builder = BatchBuilder::new();
            self.host = Some(host);
            return;
        };
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        ours.set_nonblocking(true).expect("non-blocking");
        self.stream = ours;
        (self.tx, self.rx) = (LinkTx::new(true), LinkRx::new(true));
        // In place of a HELLO: both count one batch.
        let hello = self.tx.seal(&mut BatchBuilder::new(), &mut self.buffer, 0);
        let mut numbers = Numbers { tx: LinkTx::new(true), rx: LinkRx::new(true) };
        numbers.rx.accept(hello, 0).expect("a good batch");
        host.mailbox.post(Mail::Join(Box::new(Newcomer {
            socket: theirs.into(),
            peer: "sim".into(),
            session: Arc::clone(&session),
            conn: 0,
            version: 1,
            shown: Shown { ticket, nth: 0 },
            numbers,
        })));
        (self.host, self.session) = (Some(host), Some(session));
        (self.deframer, self.builder) = (Deframer::new(), BatchBuilder::new());
        self.out.clear();
        self.pings = 0;
        self.again = self.slots.in_flight().map(|(at, _)| at).collect();
    }

    pub fn is_done(&self) -> bool {
        self.ended || (self.welcomed && self.left + self.pings + self.slots.in_use() == 0)
    }

    /// One tick: asks, sends a part, receives a part.
    pub fn live(&mut self, rng: &mut Rng, history: &mut Vec<String>) {
        if self.ended || self.host.is_none() {
            return;
        }
        // Whoever has never been welcomed knows no ticket to come back with.
        if self.known && self.file.is_some() && self.left > 0 && rng.one_of(self.cuts) {
            return self.end(history);
        }
        if self.welcomed {
            self.send_again(rng);
        }
        let free = self.welcomed && self.again.is_empty() && self.slots.has_free();
        if self.left > 0 && free && rng.one_of(400) {
            self.ask(rng);
        }
        if rng.one_of(300) && !self.builder.is_empty() {
            let received = self.rx.received();
            let bytes = self.tx.seal(&mut self.builder, &mut self.buffer, received);
            self.out.extend_from_slice(bytes);
        }
        if !self.out.is_empty() && rng.one_of(700) {
            let most = [10, 1000, 400_000][rng.below(3)];
            let len = 1 + rng.below(most).min(self.out.len() - 1);
            match self.stream.write(&self.out[..len]) {
                Ok(n) => drop(self.out.drain(..n)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return self.end(history),
            }
        }
        if rng.one_of(600) {
            let spare = self.deframer.spare();
            let most = [10, 5000, 400_000][rng.below(3)];
            let len = 1 + rng.below(most).min(spare.len() - 1);
            match self.stream.read(&mut spare[..len]) {
                Ok(0) => return self.end(history),
                Ok(n) => self.deframer.filled(n),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return self.end(history),
            }
            self.take_in(history);
        }
    }

    fn end(&mut self, history: &mut Vec<String>) {
        history.push(format!("{} cut", self.id));
        match self.resumes {
            true => self.connect(),
            false => self.ended = true,
        }
    }

    /// What was in flight at the cut, or ABANDON in its place.
    fn send_again(&mut self, rng: &mut Rng) {
        while !self.builder.is_due()
            && let Some(at) = self.again.pop_front()
        {
            let mut frame = self.slots.unclaim(at).expect("in flight");
            if matches!(frame.asked, Asked::Lookup { .. } | Asked::Mkdir) && rng.one_of(200) {
                let (asked, code) = (Asked::Abandoned, cancel::ABANDON);
                frame = Frame { asked, kind: Kind::Cancel, code, body: Vec::new() };
            }
            self.push(at, &frame);
            // The slot that was freed last is taken first.
            assert_eq!(self.slots.claim(frame).ok(), Some(at));
        }
    }

    fn push(&mut self, at: SlotUse, frame: &Frame) {
        let header = RecordHeader {
            kind: frame.kind as u8,
            slot: at.slot,
            slot_seq: at.seq,
            code: frame.code,
            ..Default::default()
        };
        assert!(self.builder.push(&mut self.buffer, header, &frame.body));
    }

    fn take_in(&mut self, history: &mut Vec<String>) {
        let mut records = Vec::new();
        while let Some(bytes) = self.deframer.next_batch().expect("a batch") {
            let header = self.rx.accept(bytes, self.tx.sent()).expect("a good batch");
            let mut cursor = Cursor::new(&header);
            while let Some((record, span)) = cursor.next(bytes) {
                records.push((record, bytes[span][RECORD_HEADER_BYTES..].to_vec()));
            }
        }
        for (record, body) in records {
            if record.kind == Kind::Welcome as u8 {
                let welcome = Welcome::decode(&body).expect("a good WELCOME");
                self.ticket = welcome.ticket;
                if welcome.flags & welcome_flag::RESUMED != 0 {
                    history.push(format!("{} resumed", self.id));
                }
                if welcome.flags & welcome_flag::REBUILD != 0 {
                    history.push(format!("{} rebuilt", self.id));
                    self.tell_all();
                }
                (self.welcomed, self.known) = (true, true);
                continue;
            }
            if record.kind == Kind::Session as u8 {
                continue;
            }
            if record.kind == Kind::Node as u8 {
                for node in Nodes::new(&body) {
                    let node = node.expect("a good NODE");
                    self.recipes.insert(node.id, node.recipe.to_vec());
                }
                continue;
            }
            if record.kind == Kind::Goodbye as u8 && self.file.is_none() {
                // Cut before its first request came: such a session is not kept.
                return self.ended = true;
            }
            let stops = self.host.as_ref().is_some_and(|host| host.keeps);
            if record.kind == Kind::Goodbye as u8 && record.code == Reason::Shutdown as u32 && stops
            {
                // Until the next daemon runs.
                let _ = self.stream.shutdown(std::net::Shutdown::Both);
                (self.host, self.session) = (None, None);
                return;
            }
            if record.kind == Kind::Goodbye as u8
                && Reason::from_u32(record.code).is_some_and(Reason::is_passing)
            {
                return self.end(history);
            }
            if record.kind == Kind::Goodbye as u8 {
                let text = String::from_utf8_lossy(&body);
                panic!("guest {}: {:?} {text}", self.id, Reason::from_u32(record.code));
            }
            if record.kind == Kind::Pong as u8 {
                self.pings -= 1;
                history.push(format!("{} pong", self.id));
                continue;
            }
            assert_eq!(record.kind, Kind::Reply as u8);
            let at = SlotUse { slot: record.slot, seq: record.slot_seq };
            let frame = self.slots.complete(at).expect("the reply of something in flight");
            let line = self.check(frame.asked, record.code, &body);
            history.push(format!("{} {at:?} {line}", self.id));
        }
    }

    /// What the session was. What is given back counts until that is answered.
    fn tell_all(&mut self) {
        let mut nodes = BTreeMap::<u64, u64>::new();
        let going = self.slots.in_flight().filter(|(_, frame)| frame.kind == Kind::Forget);
        let going = going.flat_map(|(_, frame)| frame.body.chunks(16).map(|one| &one[..8]));
        let going: Vec<u64> =
            going.filter_map(|id| Some(u64::from_le_bytes(id.try_into().ok()?))).collect();
        let file = self.file.iter().map(|(node, _)| *node);
        for id in file.chain(self.to_forget.iter().copied()).chain(going) {
            *nodes.entry(id).or_default() += 1;
        }
        let mut body = Vec::new();
        for (&id, &count) in &nodes {
            let recipe = self.recipes.get(&id).map_or(&[][..], Vec::as_slice);
            assert!(push_restore(&mut body, &Restore::Node { id, count, recipe }));
        }
        if let Some((node, fh)) = self.file {
            let flags = libc::O_RDWR as u32;
            let handle = Restore::Handle { fh, node, flags, directory: false };
            assert!(push_restore(&mut body, &handle));
        }
        let end = End {
            nodes: nodes.len() as u64,
            handles: self.file.iter().len() as u64,
            node_id_max: nodes.keys().last().copied().unwrap_or(0),
            fh_max: self.file.map_or(0, |(_, fh)| fh),
        };
        assert!(push_restore(&mut body, &Restore::End(end)));
        let header = RecordHeader { kind: Kind::Restore as u8, ..Default::default() };
        assert!(self.builder.push(&mut self.buffer, header, &body));
        // Its answer says that the daemon has all of it.
        let ping = RecordHeader { kind: Kind::Ping as u8, ..Default::default() };
        assert!(self.builder.push(&mut self.buffer, ping, &[]));
        self.pings += 1;
    }

    fn ask(&mut self, rng: &mut Rng) {
        if self.builder.is_due() {
            return;
        }
        let Some((node, fh)) = self.file else {
            if self.slots.in_use() == 0 {
                self.create();
            }
            return;
        };
        self.left -= 1;
        let cell = rng.below(CELLS);
        let kinds = if self.pool { 10 } else { 9 };
        let asked = match rng.below(kinds) {
            0..3 if !self.cells[cell].0 => {
                let len = size(rng);
                let at = rng.below(8192);
                let seed = rng.below(256);
                let data = (0..len).map(|i| (i * 7 + (i >> 8) + seed) as u8).collect();
                Asked::Write { cell, at, data }
            }
            3..6 if !self.cells[cell].0 => {
                Asked::Read { cell, at: rng.below(8192), len: size(rng) }
            }
            6 => Asked::Fsync,
            7 => Asked::Lookup { there: rng.below(2) == 0 },
            9 => Asked::Syncfs,
            8 if self.resumes => Asked::Mkdir,
            _ if !self.to_forget.is_empty() => Asked::Forget,
            _ if rng.below(4) == 0 => {
                let ping = RecordHeader { kind: Kind::Ping as u8, ..Default::default() };
                assert!(self.builder.push(&mut self.buffer, ping, &[]));
                self.pings += 1;
                return;
            }
            _ => Asked::Getattr,
        };
        let place = |cell: usize, at: usize| (cell * CELL_BYTES + at) as u64;
        let (opcode, nodeid, args) = match &asked {
            Asked::Create | Asked::Abandoned => return,
            Asked::Mkdir => {
                self.made += 1;
                let name = format!("made-{}-{}\0", self.id, self.made);
                let mkdir = abi::MkdirIn { mode: 0o755, umask: 0 };
                (Opcode::Mkdir, 1, [mkdir.as_bytes(), name.as_bytes()].concat())
            }
            Asked::Write { cell, at, data } => {
                let (offset, size) = (place(*cell, *at), data.len() as u32);
                let head = abi::WriteIn { fh, offset, size, ..Default::default() };
                (Opcode::Write, node, [head.as_bytes(), data].concat())
            }
            Asked::Read { cell, at, len } => {
                let (offset, size) = (place(*cell, *at), *len as u32);
                let read = abi::ReadIn { fh, offset, size, ..Default::default() };
                (Opcode::Read, node, read.as_bytes().to_vec())
            }
            Asked::Fsync => {
                let fsync = abi::FsyncIn { fh, ..Default::default() };
                (Opcode::Fsync, node, fsync.as_bytes().to_vec())
            }
            Asked::Lookup { there: true } => (Opcode::Lookup, 1, b"known\0".to_vec()),
            Asked::Lookup { there: false } => (Opcode::Lookup, 1, b"unknown\0".to_vec()),
            Asked::Getattr => {
                (Opcode::Getattr, node, abi::GetattrIn::default().as_bytes().to_vec())
            }
            Asked::Syncfs => (Opcode::Syncfs, 1, vec![0; 8]),
            Asked::Forget => (Opcode::Forget, 0, Vec::new()),
        };
        if let Asked::Write { cell, .. } | Asked::Read { cell, .. } = asked {
            self.cells[cell].0 = true;
        }
        self.send(opcode, nodeid, &args, asked);
    }

    fn create(&mut self) {
        let flags = (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL) as u32;
        let create = abi::CreateIn { flags, mode: 0o100_600, umask: 0, open_flags: 0 };
        let name = format!("guest-{}\0", self.id);
        let args = [create.as_bytes(), name.as_bytes()].concat();
        self.send(Opcode::Create, 1, &args, Asked::Create);
    }

    fn send(&mut self, opcode: Opcode, nodeid: u64, args: &[u8], asked: Asked) {
        let forget = matches!(asked, Asked::Forget);
        let (kind, body) = if forget {
            let ids = std::mem::take(&mut self.to_forget).into_iter();
            let ones: Vec<_> = ids.map(|nodeid| abi::ForgetOne { nodeid, nlookup: 1 }).collect();
            (Kind::Forget, ones.as_bytes().to_vec())
        } else {
            let head = [&nodeid.to_le_bytes()[..], &[0; 16]].concat();
            (Kind::Request, [&head[..], args].concat())
        };
        let frame = Frame { asked, kind, code: opcode as u32, body };
        let at = self.slots.claim(frame.clone()).expect("a free slot");
        self.push(at, &frame);
    }

    /// The reply must be the one to this request; gives a line for the history.
    fn check(&mut self, asked: Asked, code: u32, body: &[u8]) -> String {
        const EIO: u32 = libc::EIO as u32;
        match asked {
            Asked::Create => {
                assert_eq!(code, 0);
                let (entry, rest) = abi::EntryOut::read_from_prefix(body).expect("an entry");
                let fh = abi::OpenOut::read_from_bytes(rest).expect("opened").fh;
                self.file = Some((entry.nodeid, fh));
                "created".into()
            }
            Asked::Write { cell, at, data } => {
                self.cells[cell].0 = false;
                if code == EIO {
                    return format!("write {cell} EIO");
                }
                assert_eq!(code, 0);
                let n = abi::WriteOut::read_from_bytes(body).expect("WriteOut").size as usize;
                assert!(n <= data.len() && (n > 0 || data.is_empty()));
                let kept = &mut self.cells[cell].1;
                if n > 0 {
                    kept.resize(kept.len().max(at + n), 0);
                    kept[at..at + n].copy_from_slice(&data[..n]);
                }
                format!("write {cell} {n}")
            }
            Asked::Read { cell, at, len } => {
                self.cells[cell].0 = false;
                if code == EIO {
                    return format!("read {cell} EIO");
                }
                assert_eq!(code, 0);
                let kept = &self.cells[cell].1;
                // Later cells may or may not have made the file longer: zeros, or nothing.
                let known = kept.get(at..kept.len().min(at + len)).unwrap_or_default();
                let same = body.len().min(known.len());
                assert!(body[..same] == known[..same], "cell {cell} has other bytes");
                assert!(body[same..].iter().all(|&b| b == 0) && body.len() <= len);
                format!("read {cell} {same}")
            }
            Asked::Lookup { there } => {
                assert_eq!(code, if there { 0 } else { libc::ENOENT as u32 });
                if there {
                    let entry = abi::EntryOut::read_from_bytes(body).expect("an entry");
                    self.to_forget.push(entry.nodeid);
                }
                format!("lookup {there}")
            }
            Asked::Fsync => {
                assert!(code == 0 || code == EIO);
                format!("fsync {code}")
            }
            Asked::Getattr => {
                assert_eq!((code, body.len()), (0, size_of::<abi::AttrOut>()));
                "getattr".into()
            }
            Asked::Mkdir => {
                assert_eq!(code, 0, "made twice");
                let entry = abi::EntryOut::read_from_bytes(body).expect("an entry");
                self.to_forget.push(entry.nodeid);
                "made".into()
            }
            Asked::Abandoned => {
                assert_eq!((code, body.len()), (libc::EINTR as u32, 0));
                "abandoned".into()
            }
            Asked::Forget | Asked::Syncfs => {
                assert_eq!((code, body.len()), (0, 0));
                "empty".into()
            }
        }
    }
}

fn size(rng: &mut Rng) -> usize {
    let len = [1, 500, 20_000, 60_000, 1 << 20][rng.below(5)];
    if rng.one_of(200) { len } else { rng.below(len + 1) }
}
