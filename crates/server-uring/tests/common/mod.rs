//! A real daemon in a process of its own, and a raw guest that speaks the wire by hand, so that it
//! can also speak it wrongly.
#![allow(dead_code, reason = "each test program uses its part")]

mod daemon;
mod rebuild;
mod undisturbed;

pub use daemon::Daemon;
#[allow(unused_imports, reason = "each test program uses its part")]
pub use rebuild::rebuilt;
#[allow(unused_imports, reason = "each test program uses its part")]
pub use undisturbed::{Stalls, undisturbed};

use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader, cancel};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::hello::{CacheMode, Hello, Reason, Ticket, Welcome, feature, welcome_flag};
use ringfs_wire::limits::*;
use ringfs_wire::restore::Nodes;
use ringfs_wire::session::{LinkRx, LinkTx};
use ringfs_wire::slot::{ClientSlots, SlotUse};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// No test waits longer for anything.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Waits for `what`, a state of another process that nothing announces.
pub fn until<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A process that does not outlive its test, however that ends.
pub struct Held(pub Child);

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn kill(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).expect("a pid"), signal).expect("kill");
}

/// A session with the daemon that listens there, or why there is none.
pub fn mount(socket: &Path, share: &str) -> Result<Guest, Reason> {
    Guest::greet(connect(socket), &hello(share)).map_err(|end| match end {
        End::Goodbye(Some(reason), _) => reason,
        end => panic!("{end:?}"),
    })
}

/// Ends a session as an unmount does.
pub fn goodbye(mut guest: Guest) {
    let none = SlotUse { slot: 0, seq: 0 };
    guest.add(Kind::Goodbye as u8, none, Reason::Unmounted as u32, &[]);
    guest.flush();
    guest.ending();
}

/// A connection to the daemon that listens there.
pub fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("the daemon listens");
    stream.set_read_timeout(Some(LIMIT)).expect("timeout");
    stream.set_write_timeout(Some(LIMIT)).expect("timeout");
    stream
}

/// A HELLO as a well-behaved guest with one lane says it.
pub fn hello(share: &str) -> Hello {
    Hello {
        versions: (1, 1),
        features: feature::PAYLOAD_CRC,
        ticket: Ticket::NONE,
        epoch_seen: 0,
        lanes: 1,
        conn: 0,
        conns: 1,
        slots: 128,
        mount_flags: 0,
        cache: CacheMode::Auto,
        share: share.into(),
        subdir: Vec::new(),
        init: None,
        nth: 0,
    }
}

/// The `fuse_in_header` part of a request and its arguments.
pub fn body(nodeid: u64, args: &[u8]) -> Vec<u8> {
    let mut body = nodeid.to_le_bytes().to_vec();
    body.extend_from_slice(&[0; 16]);
    body.extend_from_slice(args);
    body
}

pub fn name(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

pub type Record = (RecordHeader, Vec<u8>);

/// What the other end did instead of answering.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// It said goodbye.
    Goodbye(Option<Reason>, String),
    /// The stream ended.
    Closed,
}

/// One connection, seen from the guest.
pub struct Guest {
    pub stream: UnixStream,
    pub tx: LinkTx,
    pub rx: LinkRx,
    pub welcome: Welcome,
    pub lane: u8,
    /// Who its requests say that they are of.
    pub uid: u32,
    /// The recipes of its nodes, for one that keeps what rebuilds its session; it answers PINGs.
    pub recipes: Option<BTreeMap<u64, Vec<u8>>>,
    pub slots: ClientSlots<()>,
    deframer: Deframer,
    inbox: VecDeque<Record>,
    builder: BatchBuilder,
    buffer: Vec<u8>,
}

impl Guest {
    /// The handshake.
    pub fn greet(stream: UnixStream, hello: &Hello) -> Result<Guest, End> {
        let mut guest = Guest::hail(stream, hello);
        guest.await_welcome()?;
        guest.slots = ClientSlots::new(guest.welcome.slots);
        Ok(guest)
    }

    /// Says HELLO.
    pub fn hail(stream: UnixStream, hello: &Hello) -> Guest {
        let mut guest = Guest {
            stream,
            tx: LinkTx::new(true),
            rx: LinkRx::new(true),
            welcome: Welcome::default(),
            lane: hello.conn as u8,
            uid: 0,
            recipes: None,
            slots: ClientSlots::new(0),
            deframer: Deframer::new(),
            inbox: VecDeque::new(),
            builder: BatchBuilder::new(),
            buffer: vec![0; BATCH_BYTES_MAX],
        };
        guest.add(Kind::Hello as u8, SlotUse { slot: 0, seq: 0 }, 0, &hello.encode());
        guest.flush();
        guest
    }

    pub fn await_welcome(&mut self) -> Result<(), End> {
        let (record, body) = self.receive()?;
        assert_eq!(record.kind, Kind::Welcome as u8);
        self.welcome = Welcome::decode(&body).expect("a good WELCOME");
        // What its log calls the session comes in the same batch, and is the client's to know.
        self.inbox.retain(|(record, _)| record.kind != Kind::Session as u8);
        let crc = self.welcome.features & feature::PAYLOAD_CRC != 0;
        self.tx.set_payload_crc(crc);
        self.rx.set_payload_crc(crc);
        Ok(())
    }

    pub fn cut(&self) {
        self.stream.shutdown(std::net::Shutdown::Both).expect("cut");
    }

    /// Cuts the connection and goes on with another one: the slots stay as they are. Gives the
    /// old stream, for those who let it live.
    pub fn resume(&mut self, stream: UnixStream, hello: &Hello) -> Result<UnixStream, End> {
        let hello = Hello { ticket: self.welcome.ticket, ..hello.clone() };
        let mut next = Guest::hail(stream, &hello);
        next.slots = std::mem::replace(&mut self.slots, ClientSlots::new(0));
        next.lane = self.lane;
        let old = std::mem::replace(self, next).stream;
        self.await_welcome()?;
        assert_eq!(self.welcome.flags, welcome_flag::RESUMED);
        Ok(old)
    }

    /// The same, where the old stream is closed first.
    pub fn cut_and_resume(&mut self, daemon: &Daemon) {
        self.cut();
        self.resume(daemon.connect(), &hello("share")).expect("resumed");
    }

    /// Waits for a PING and answers it.
    pub fn answer_ping(&mut self) {
        let (record, _) = self.receive().expect("a PING");
        assert_eq!(record.kind, Kind::Ping as u8);
        self.add(Kind::Pong as u8, SlotUse { slot: 0, seq: 0 }, record.code, &[]);
        self.flush();
    }

    /// Adds a request on a slot that is taken already.
    pub fn again(&mut self, at: SlotUse, opcode: Opcode, nodeid: u64, args: &[u8]) {
        assert!(self.add(Kind::Request as u8, at, opcode as u32, &body(nodeid, args)));
    }

    /// Gives up a request, and waits for the answer.
    pub fn abandon(&mut self, at: SlotUse) {
        self.add(Kind::Cancel as u8, at, cancel::ABANDON, &[]);
        self.flush();
        assert_eq!(self.reply().expect("an answer"), (at, Err(libc::EINTR as u32)));
    }

    /// Puts a record into the batch that is being built; false where it has no room.
    pub fn add(&mut self, kind: u8, at: SlotUse, code: u32, body: &[u8]) -> bool {
        let (lane, slot, slot_seq) = (self.lane, at.slot, at.seq);
        let header = RecordHeader { kind, lane, slot, slot_seq, code, ..Default::default() };
        self.builder.push(&mut self.buffer, header, body)
    }

    /// The batch that was built.
    pub fn seal(&mut self) -> Vec<u8> {
        let received = self.rx.received();
        self.tx.seal(&mut self.builder, &mut self.buffer, received).to_vec()
    }

    /// Sends what was built. A daemon that hung up meanwhile is noticed by who reads.
    pub fn flush(&mut self) -> bool {
        if self.builder.is_empty() {
            return true;
        }
        let bytes = self.seal();
        self.stream.write_all(&bytes).is_ok()
    }

    /// Takes a slot and adds the request.
    pub fn start(&mut self, opcode: Opcode, nodeid: u64, args: &[u8]) -> SlotUse {
        let at = self.slots.claim(()).expect("a free slot");
        if self.builder.is_due() {
            self.flush();
        }
        let mut body = body(nodeid, args);
        body[8..12].copy_from_slice(&self.uid.to_le_bytes());
        assert!(self.add(Kind::Request as u8, at, opcode as u32, &body));
        at
    }

    pub fn has_free(&self) -> bool {
        self.slots.has_free()
    }

    pub fn claim(&mut self) -> SlotUse {
        self.slots.claim(()).expect("a free slot")
    }

    pub fn complete(&mut self, at: SlotUse) {
        self.slots.complete(at).expect("in flight");
    }

    /// The next record, whatever it is.
    pub fn receive(&mut self) -> Result<Record, End> {
        loop {
            if let Some((record, body)) = self.inbox.pop_front() {
                if record.kind == Kind::Goodbye as u8 {
                    let text = String::from_utf8(body).expect("a GOODBYE's text is UTF-8");
                    return Err(End::Goodbye(Reason::from_u32(record.code), text));
                }
                if self.kept(&record, &body) {
                    continue;
                }
                return Ok((record, body));
            }
            let n = match self.stream.read(self.deframer.spare()) {
                Ok(0) => return Err(End::Closed),
                Ok(n) => n,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Err(End::Closed);
                }
                // Of a machine that was stopped meanwhile.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => panic!("the daemon is silent: {error}"),
            };
            self.deframer.filled(n);
            while let Some(bytes) = self.deframer.next_batch().expect("a batch") {
                let header = self.rx.accept(bytes, self.tx.sent()).expect("a good batch");
                let mut cursor = Cursor::new(&header);
                while let Some((record, span)) = cursor.next(bytes) {
                    let body = bytes[span][RECORD_HEADER_BYTES..].to_vec();
                    self.inbox.push_back((record, body));
                }
            }
        }
    }

    /// Whether that was no answer, but something that a guest which keeps its session deals with.
    fn kept(&mut self, record: &RecordHeader, body: &[u8]) -> bool {
        let Some(recipes) = &mut self.recipes else { return false };
        if record.kind == Kind::Node as u8 {
            for node in Nodes::new(body) {
                let node = node.expect("a good entry");
                recipes.insert(node.id, node.recipe.to_vec());
            }
            return true;
        }
        let is_ping = record.kind == Kind::Ping as u8;
        if is_ping {
            self.add(Kind::Pong as u8, SlotUse { slot: 0, seq: 0 }, record.code, &[]);
            self.flush();
        }
        is_ping
    }

    /// The next reply: whose, and errno or body.
    pub fn reply(&mut self) -> Result<(SlotUse, Result<Vec<u8>, u32>), End> {
        let (record, body) = loop {
            let (record, body) = self.receive()?;
            match Kind::from_u8(record.kind) {
                // A daemon that keeps us waiting says that it is there; one that has to keep many
                // nodes asks for some.
                Some(Kind::Pong | Kind::Notify) => {}
                _ => break (record, body),
            }
        };
        assert_eq!((record.kind, record.lane), (Kind::Reply as u8, self.lane));
        let at = SlotUse { slot: record.slot, seq: record.slot_seq };
        self.slots.complete(at).expect("a reply to a request in flight");
        if record.code == 0 {
            return Ok((at, Ok(body)));
        }
        assert!(body.is_empty(), "an errno has no body");
        Ok((at, Err(record.code)))
    }

    /// Sends one request and waits for its answer, with nothing else in flight.
    pub fn try_call(
        &mut self,
        opcode: Opcode,
        nodeid: u64,
        args: &[u8],
    ) -> Result<Result<Vec<u8>, u32>, End> {
        let at = self.start(opcode, nodeid, args);
        self.flush();
        let (answered, result) = self.reply()?;
        assert_eq!(answered, at);
        Ok(result)
    }

    pub fn call(&mut self, opcode: Opcode, nodeid: u64, args: &[u8]) -> Result<Vec<u8>, u32> {
        self.try_call(opcode, nodeid, args).expect("the daemon serves")
    }

    pub fn lookup(&mut self, parent: u64, file: &str) -> Result<abi::EntryOut, u32> {
        let body = self.call(Opcode::Lookup, parent, &name(file))?;
        Ok(abi::EntryOut::read_from_bytes(&body).expect("an entry"))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, u32> {
        let open = abi::OpenIn { flags: flags as u32, open_flags: 0 };
        let body = self.call(Opcode::Open, node, open.as_bytes())?;
        Ok(abi::OpenOut::read_from_bytes(&body).expect("opened").fh)
    }

    /// Makes a file and leaves it open: node and handle.
    pub fn create(&mut self, file: &str) -> Result<(u64, u64), u32> {
        let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
        let create = abi::CreateIn { flags, mode: 0o100_644, umask: 0o22, open_flags: 0 };
        let args = [create.as_bytes(), &name(file)].concat();
        let body = self.call(Opcode::Create, 1, &args)?;
        let (entry, rest) = abi::EntryOut::read_from_prefix(&body).expect("an entry");
        Ok((entry.nodeid, abi::OpenOut::read_from_bytes(rest).expect("opened").fh))
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, u32> {
        self.call(Opcode::Read, node, &read_args(fh, offset, size))
    }

    pub fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, u32> {
        let body = self.call(Opcode::Write, node, &write_args(fh, offset, data))?;
        Ok(abi::WriteOut::read_from_bytes(&body).expect("written").size)
    }

    pub fn release(&mut self, node: u64, fh: u64) -> Result<(), u32> {
        let release = abi::ReleaseIn { fh, ..Default::default() };
        self.call(Opcode::Release, node, release.as_bytes()).map(drop)
    }

    /// Gives lookups back and waits for the empty reply.
    pub fn forget(&mut self, forgets: &[(u64, u64)]) {
        let at = self.claim();
        let ones: Vec<abi::ForgetOne> =
            forgets.iter().map(|&(nodeid, nlookup)| abi::ForgetOne { nodeid, nlookup }).collect();
        self.add(Kind::Forget as u8, at, 0, ones.as_bytes());
        self.flush();
        assert_eq!(self.reply().expect("an answer"), (at, Ok(Vec::new())));
    }

    /// Reads until the end: why it came.
    pub fn ending(&mut self) -> End {
        loop {
            if let Err(end) = self.receive() {
                return end;
            }
        }
    }

    /// The same, where only the reason matters.
    pub fn ended_for(&mut self) -> Option<Reason> {
        match self.ending() {
            End::Goodbye(reason, _) => reason,
            End::Closed => None,
        }
    }
}

pub fn read_args(fh: u64, offset: u64, size: u32) -> Vec<u8> {
    abi::ReadIn { fh, offset, size, ..Default::default() }.as_bytes().to_vec()
}

pub fn write_args(fh: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let size = data.len() as u32;
    let write = abi::WriteIn { fh, offset, size, ..Default::default() };
    [write.as_bytes(), data].concat()
}

/// Bytes that are told apart by seed and place.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| ((seed + 1) * 251 + i * 7 + (i >> 8) * 13) as u8).collect()
}
