//! A whole shard on the simulated ring, with guests in the same thread: whatever the seed does to
//! the operations, each request is answered once by its own reply, files hold what was written,
//! nothing is left behind, and the same seed gives the same history. Guests whose connection is cut
//! at any point resume it: then too each request has happened once, and what a guest holds is what
//! the daemon holds for it.

use ringfs_server::fs::{Fs, FsOptions};
use ringfs_server::greet::Newcomer;
use ringfs_server::link::Numbers;
use ringfs_server::mailbox::{Mail, Mailbox};
use ringfs_server::pool::Pool;
use ringfs_server::ring_sim::{Faults, Rng, SimRing};
use ringfs_server::session::{Registry, Session, Terms};
use ringfs_server::shard::{Shard, Shared};
use ringfs_server::stats::ShardStats;
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader, cancel};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::hello::{Reason, Ticket, Welcome, welcome_flag};
use ringfs_wire::limits::*;
use ringfs_wire::session::{LinkRx, LinkTx};
use ringfs_wire::slot::{ClientSlots, SlotUse};
use rustix::thread::{CpuSet, sched_getaffinity};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

const CELLS: usize = 24;
const CELL_BYTES: usize = (1 << 20) + 8192;

/// What a guest waits for.
#[derive(Clone, Debug)]
enum Asked {
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
struct Frame {
    asked: Asked,
    kind: Kind,
    code: u32,
    body: Vec<u8>,
}

/// A guest with a file of its own, in cells with at most one request on each.
struct Guest {
    id: usize,
    session: Arc<Session>,
    ticket: Ticket,
    door: Arc<Mailbox>,
    stream: UnixStream,
    welcomed: bool,
    known: bool,
    tx: LinkTx,
    rx: LinkRx,
    slots: ClientSlots<Frame>,
    /// What is sent again on a new connection, before anything else.
    again: VecDeque<SlotUse>,
    deframer: Deframer,
    builder: BatchBuilder,
    buffer: Vec<u8>,
    out: Vec<u8>,
    cells: Vec<(bool, Vec<u8>)>,
    file: Option<(u64, u64)>,
    to_forget: Vec<u64>,
    left: usize,
    pings: usize,
    made: usize,
    pool: bool,
    cuts: usize,
    resumes: bool,
    ended: bool,
}

/// What one seed is about.
#[derive(Clone, Copy)]
struct Plan {
    guests: usize,
    requests: usize,
    /// With requests that run on the pool's threads, whose pace is nobody's.
    pool: bool,
    /// Guests come back after a cut, and cut their connections themselves so often in a thousand
    /// ticks.
    cuts: Option<usize>,
    faults: Faults,
}

impl Guest {
    fn new(
        id: usize,
        (session, ticket): (Arc<Session>, Ticket),
        door: &Arc<Mailbox>,
        plan: &Plan,
    ) -> Guest {
        let mut guest = Guest {
            id,
            session,
            ticket,
            door: Arc::clone(door),
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
    fn connect(&mut self) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        ours.set_nonblocking(true).expect("non-blocking");
        self.stream = ours;
        (self.tx, self.rx) = (LinkTx::new(true), LinkRx::new(true));
        // In place of a HELLO: both count one batch.
        let hello = self.tx.seal(&mut BatchBuilder::new(), &mut self.buffer, 0);
        let mut numbers = Numbers { tx: LinkTx::new(true), rx: LinkRx::new(true) };
        numbers.rx.accept(hello, 0).expect("a good batch");
        self.door.post(Mail::Join(Box::new(Newcomer {
            socket: theirs.into(),
            peer: "sim".into(),
            session: Arc::clone(&self.session),
            conn: 0,
            version: 1,
            ticket: self.ticket,
            numbers,
        })));
        self.welcomed = false;
        (self.deframer, self.builder) = (Deframer::new(), BatchBuilder::new());
        self.out.clear();
        self.pings = 0;
        self.again = self.slots.in_flight().map(|(at, _)| at).collect();
    }

    fn is_done(&self) -> bool {
        self.ended || (self.left + self.pings + self.slots.in_use() == 0)
    }

    /// One tick: asks, sends a part, receives a part.
    fn live(&mut self, rng: &mut Rng, history: &mut Vec<String>) {
        if self.ended {
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
                (self.welcomed, self.known) = (true, true);
                continue;
            }
            if record.kind == Kind::Goodbye as u8 && self.file.is_none() {
                // Cut before its first request came: such a session is not kept.
                return self.ended = true;
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

/// Runs one seed to its end and gives its history.
fn run(seed: u64, plan: Plan, place: &Path) -> Vec<String> {
    let share = place.join(format!("{seed}"));
    let _ = std::fs::remove_dir_all(&share);
    std::fs::create_dir(&share).expect("the share");
    std::fs::write(share.join("known"), b"x").expect("a file");
    let mailbox = Mailbox::new().expect("a mailbox");
    let stats = Arc::new(ShardStats::default());
    let grace = Duration::from_secs(if plan.cuts.is_some() { 600 } else { 0 });
    let registry = Arc::new(Registry::new(grace, None));
    registry.set_shards(vec![mailbox.clone()]);
    let cpus: CpuSet = sched_getaffinity(None).expect("CPUs");
    let pool = Pool::new(2, cpus);
    let mut guests = Vec::new();
    let mut sessions = Vec::new();
    for id in 0..plan.guests {
        let terms = Terms {
            share: "share".into(),
            peer: "sim".into(),
            owner: 0,
            lanes: 1,
            conns: 1,
            slots: 16,
            features: 1,
            rebuilt: false,
            subdir: Vec::new(),
            presented: None,
        };
        let fs = Fs::new(&share, FsOptions::default()).expect("a file system");
        let session = registry.open(terms, fs).expect("a session");
        sessions.push(session.0.clone());
        guests.push(Guest::new(id, session, &mailbox, &plan));
    }
    let mut history = Vec::new();
    let mut stopping = false;
    let world = |rng: &mut Rng| {
        guests.iter_mut().for_each(|guest| guest.live(rng, &mut history));
        if guests.iter().all(Guest::is_done) {
            // All hang up; when the shard has noticed, it is told to end.
            for guest in &mut guests {
                let _ = guest.stream.shutdown(std::net::Shutdown::Both);
                guest.ended = true;
            }
            if stats.connections.load(Relaxed) == 0 && !stopping {
                stopping = true;
                mailbox.post(Mail::Shutdown);
            }
        }
    };
    let shared = Shared {
        registry: registry.clone(),
        pool: pool.clone(),
        mailbox: mailbox.clone(),
        stats: stats.clone(),
    };
    let mut shard = Shard::new(SimRing::new(seed, plan.faults, world), shared, 0);
    shard.run().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    drop(shard);
    pool.close();
    let gauges = [&stats.connections, &stats.slots_in_use, &stats.buffers_in_use];
    assert_eq!(gauges.map(|gauge| gauge.load(Relaxed)), [0; 3], "seed {seed}");
    assert_eq!(stats.protocol_errors.load(Relaxed), 0, "seed {seed}");
    assert!(registry.totals().iter().all(|(_, n)| *n == 0), "{:?}", registry.totals());
    for (guest, session) in guests.iter().zip(sessions) {
        let Some(_) = guest.file else { continue };
        let kept = std::fs::read(share.join(format!("guest-{}", guest.id))).expect("the file");
        for (cell, (busy, bytes)) in guest.cells.iter().enumerate().filter(|(_, c)| !c.0) {
            let found = kept.get(cell * CELL_BYTES..).unwrap_or_default();
            assert!(!busy && found.starts_with(bytes), "seed {seed}: cell {cell} differs");
        }
        // Known: the root, the file, and what was looked up and not given back.
        let (known, lookups) = (guest.to_forget.iter(), guest.file.iter().map(|(node, _)| node));
        if guest.slots.in_use() == 0 {
            session.fs.forget(known.chain(lookups).map(|&id| (id, 1)));
            let counts = session.fs.counts();
            assert_eq!(
                (counts.nodes, counts.handles),
                (1, 1),
                "seed {seed}: more than it knows of"
            );
        }
        assert_eq!(session.fs.counts().overdrawn, 0, "seed {seed}");
    }
    std::fs::remove_dir_all(&share).expect("clean up");
    history
}

const GENTLE: Faults = Faults { short: 0, again: 0, io_error: 0, reset: 0, full: 0, delay: 0 };
const ROUGH: Faults =
    Faults { short: 400, again: 100, io_error: 30, reset: 0, full: 50, delay: 40 };

fn seeds() -> std::ops::Range<u64> {
    let given = std::env::var("RINGFS_SIM_SEEDS").ok().and_then(|n| n.parse().ok());
    0..given.unwrap_or(8)
}

fn place() -> tempfile::TempDir {
    // On tmpfs, so that disks have no say in the time that this takes.
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
}

#[test]
fn every_request_is_answered_once_by_its_own_reply() {
    let place = place();
    for seed in seeds() {
        for (guests, faults) in [(1, GENTLE), (1, ROUGH), (4, ROUGH)] {
            let plan = Plan { guests, requests: 120, pool: false, cuts: None, faults };
            let history = run(seed, plan, place.path());
            let answers = history.iter().filter(|line| !line.contains("cut")).count();
            assert_eq!(answers, guests * 121, "seed {seed}");
        }
    }
}

#[test]
fn the_same_seed_is_the_same_history() {
    let place = place();
    for seed in seeds().take(4) {
        let plan = Plan { guests: 3, requests: 80, pool: false, cuts: None, faults: ROUGH };
        let first = run(seed, plan, place.path());
        assert!(first == run(seed, plan, place.path()), "seed {seed} has two histories");
        assert!(first != run(seed + 1000, plan, place.path()), "the seed is not used");
    }
}

#[test]
fn jobs_of_the_pool_are_answered_too() {
    let place = place();
    for seed in seeds() {
        let plan = Plan { guests: 3, requests: 60, pool: true, cuts: None, faults: ROUGH };
        assert_eq!(run(seed, plan, place.path()).len(), 183, "seed {seed}");
    }
}

#[test]
fn connections_that_are_reset_leave_nothing() {
    let place = place();
    let faults = Faults { reset: 4, ..ROUGH };
    let mut cut = 0;
    for seed in seeds() {
        let plan = Plan { guests: 4, requests: 100, pool: seed % 2 == 0, cuts: None, faults };
        let history = run(seed, plan, place.path());
        cut += history.iter().filter(|line| line.ends_with("cut")).count();
    }
    assert!(cut > 0, "no connection was cut");
}

#[test]
fn cut_sessions_go_on_and_each_request_has_happened_once() {
    let place = place();
    let (mut cut, mut resumed, mut abandoned) = (0, 0, 0);
    for seed in seeds() {
        for (guests, reset) in [(1, 0), (3, 4)] {
            let faults = Faults { reset, ..ROUGH };
            let plan = Plan { guests, requests: 150, pool: seed % 2 == 0, cuts: Some(3), faults };
            let history = run(seed, plan, place.path());
            let count = |what: &str| history.iter().filter(|line| line.ends_with(what)).count();
            cut += count("cut");
            resumed += count("resumed");
            abandoned += count("abandoned");
        }
    }
    assert!(cut > 20 && resumed > 20 && abandoned > 0, "{cut} cut, {resumed}, {abandoned}");
}
