//! An old client and this daemon: a session that was recorded when wire version 1 was young is
//! played again, byte for byte, and must be answered as it was.
//!
//! Invariant: nothing here comes from the crate `wire`: offsets are those of docs/wire.md and of
//! the kernel's fuse.h, so a change of the format cannot change this test with it. In the bytes of
//! the guest only what the daemon chose is exchanged: node ids, handles, places in a directory and
//! acknowledgements, and the checksum over them.

mod common;

use common::Daemon;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

const BATCH: usize = 32;
const RECORD: usize = 16;
/// What stands before the arguments of a request: node id, uid, gid, pid.
const IN: usize = 24;
/// `fuse_entry_out`.
const ENTRY: usize = 128;
const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const REQUEST: u8 = 3;
const REPLY: u8 = 4;
const FORGET: u8 = 5;
const GOODBYE: u8 = 12;
const VERSION_REASON: u32 = 3;
const ATOMIC_O_TRUNC: u32 = 1 << 3;

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKDIR: u32 = 9;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const GETXATTR: u32 = 22;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const CREATE: u32 = 35;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// One record: where its header stands, and its fields.
#[derive(Clone, Debug)]
struct Record {
    at: usize,
    kind: u8,
    slot: (u16, u32),
    code: u32,
    body: Vec<u8>,
}

fn records(batch: &[u8]) -> Vec<Record> {
    let mut at = BATCH;
    let mut found = Vec::new();
    for _ in 0..u16::from_le_bytes([batch[6], batch[7]]) {
        let len = u32_at(batch, at) as usize;
        found.push(Record {
            at,
            kind: batch[at + 4],
            slot: (u16::from_le_bytes([batch[at + 6], batch[at + 7]]), u32_at(batch, at + 8)),
            code: u32_at(batch, at + 12),
            body: batch[at + RECORD..at + len].to_vec(),
        });
        at += len.next_multiple_of(8);
    }
    found
}

/// CRC32C (RFC 3720, appendix B.4), bit by bit.
fn crc32c(bytes: impl Iterator<Item = u8>) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0x82f6_3b78 };
    !bytes.fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(byte), step))
}

fn seal(batch: &mut [u8]) {
    let mut summed = Vec::new();
    for record in records(batch) {
        let len = u32_at(batch, record.at) as usize;
        summed.extend_from_slice(&batch[record.at..record.at + len.min(256)]);
    }
    summed.extend_from_slice(&batch[..24]);
    summed.extend_from_slice(&batch[28..32]);
    let crc = crc32c(summed.into_iter());
    batch[24..28].copy_from_slice(&crc.to_le_bytes());
}

fn recording() -> Vec<(bool, Vec<u8>)> {
    let text = include_str!("recorded/wire1.hex");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let parsed = lines.map(|line| {
        let (mark, hex) = line.split_once(' ').expect("a mark and bytes");
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex");
        (mark == ">", (0..hex.len()).step_by(2).map(byte).collect())
    });
    parsed.collect()
}

/// The other end of a connection, and what it chose where the recorded one chose otherwise.
struct Replay {
    stream: UnixStream,
    pending: Vec<u8>,
    received: u64,
    answers: Vec<Record>,
    /// Recorded node ids, handles and places in directories, and those of now.
    nodes: BTreeMap<u64, u64>,
    handles: BTreeMap<u64, u64>,
    places: BTreeMap<u64, u64>,
    /// The opcodes of requests, by their slots.
    asked: BTreeMap<(u16, u32), u32>,
    checked: BTreeSet<u32>,
}

impl Replay {
    fn new(stream: UnixStream) -> Replay {
        Replay {
            stream,
            pending: Vec::new(),
            received: 0,
            answers: Vec::new(),
            nodes: BTreeMap::from([(0, 0), (1, 1)]),
            handles: BTreeMap::new(),
            places: BTreeMap::from([(0, 0)]),
            asked: BTreeMap::new(),
            checked: BTreeSet::new(),
        }
    }

    fn send(&mut self, mut batch: Vec<u8>) {
        for record in records(&batch) {
            let body = record.at + RECORD;
            let mut exchange = |at: usize, map: &BTreeMap<u64, u64>| {
                let old = u64_at(&batch, body + at);
                let new = map.get(&old).unwrap_or_else(|| panic!("{old:#x} was never given"));
                batch[body + at..body + at + 8].copy_from_slice(&new.to_le_bytes());
            };
            match record.kind {
                FORGET => (0..record.body.len()).step_by(16).for_each(|at| {
                    exchange(at, &self.nodes);
                }),
                REQUEST => {
                    self.asked.insert(record.slot, record.code);
                    if record.code != INIT {
                        exchange(0, &self.nodes);
                    }
                    match record.code {
                        READDIR | READDIRPLUS => {
                            exchange(IN, &self.handles);
                            exchange(IN + 8, &self.places);
                        }
                        READ | WRITE | RELEASE | RELEASEDIR | FLUSH => exchange(IN, &self.handles),
                        // With FUSE_GETATTR_FH.
                        GETATTR if u32_at(&record.body, IN) & 1 != 0 => {
                            exchange(IN + 8, &self.handles);
                        }
                        RENAME2 => exchange(IN, &self.nodes),
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        batch[16..24].copy_from_slice(&self.received.to_le_bytes());
        seal(&mut batch);
        self.stream.write_all(&batch).expect("the daemon takes it");
    }

    /// The record that `wanted` says; others are kept.
    fn await_record(&mut self, wanted: impl Fn(&Record) -> bool) -> Record {
        loop {
            if let Some(at) = self.answers.iter().position(&wanted) {
                return self.answers.remove(at);
            }
            let mut bytes = vec![0; 1 << 16];
            let n = self.stream.read(&mut bytes).expect("an answer in time");
            assert!(n > 0, "the daemon closed the connection");
            self.pending.extend_from_slice(&bytes[..n]);
            while self.pending.len() >= BATCH
                && self.pending.len() >= u32_at(&self.pending, 0) as usize
            {
                let rest = self.pending.split_off(u32_at(&self.pending, 0) as usize);
                self.answers.extend(records(&self.pending));
                self.received += 1;
                self.pending = rest;
            }
        }
    }

    /// Waits for what the daemon answered then, and compares.
    fn expect(&mut self, old: &Record) {
        match old.kind {
            WELCOME | GOODBYE => {
                let new = self.await_record(|record| record.kind == old.kind);
                assert_eq!(new.code, old.code);
                if old.kind == WELCOME {
                    // Version, and what was granted.
                    assert_eq!(new.body.len(), old.body.len());
                    assert_eq!(new.body[..16], old.body[..16], "version, lanes, slots, features");
                }
            }
            REPLY => {
                let new = self.await_record(|it| it.kind == REPLY && it.slot == old.slot);
                // A FORGET is no request with an opcode.
                let opcode = self.asked.remove(&old.slot).unwrap_or(0);
                self.compare(opcode, old, &new);
                self.checked.insert(opcode);
            }
            _ => {}
        }
    }

    fn compare(&mut self, opcode: u32, old: &Record, new: &Record) {
        let said = |record: &Record| format!("{} with {} bytes", record.code, record.body.len());
        if opcode == GETXATTR {
            // ENODATA, or a file system without such attributes.
            assert!([61, 95].contains(&new.code), "opcode 22: {}", said(new));
            return;
        }
        assert_eq!(said(new), said(old), "opcode {opcode}");
        if old.code != 0 {
            return;
        }
        let same = |from: usize, len: usize| {
            let span = from..from + len;
            assert_eq!(new.body[span.clone()], old.body[span], "opcode {opcode}, offset {from}");
        };
        let attr_at = match opcode {
            LOOKUP | SYMLINK | MKDIR | CREATE => Some(40),
            GETATTR => Some(16),
            _ => None,
        };
        if let Some(at) = attr_at {
            same(at + 60, 4); // mode
            if u32_at(&old.body, at + 60) & 0o170_000 != 0o040_000 {
                same(at + 8, 8); // size
                same(at + 64, 4); // nlink
            }
        }
        match opcode {
            INIT => {
                same(0, 12);
                // A guest is told whatever holds now, and this one is not wanted any more.
                let granted = u32_at(&old.body, 12) & !ATOMIC_O_TRUNC;
                assert_eq!(u32_at(&new.body, 12), granted, "flags");
                same(16, old.body.len() - 16);
            }
            READ | READLINK | WRITE => same(0, old.body.len()),
            LOOKUP | SYMLINK | MKDIR => self.learn_entry(&old.body, &new.body),
            OPEN | OPENDIR => {
                same(8, 4); // open_flags
                self.handles.insert(u64_at(&old.body, 0), u64_at(&new.body, 0));
            }
            CREATE => {
                self.learn_entry(&old.body, &new.body);
                same(ENTRY + 8, 4);
                self.handles.insert(u64_at(&old.body, ENTRY), u64_at(&new.body, ENTRY));
            }
            READDIRPLUS => {
                let (old, new) = (entries(&old.body), entries(&new.body));
                assert_eq!(
                    old.iter().map(|entry| &entry.name).collect::<BTreeSet<_>>(),
                    new.iter().map(|entry| &entry.name).collect::<BTreeSet<_>>()
                );
                for (old, at_same_place) in old.iter().zip(&new) {
                    self.places.insert(old.place, at_same_place.place);
                    let same_name = new.iter().find(|new| new.name == old.name);
                    self.nodes.insert(old.node, same_name.expect("compared above").node);
                }
            }
            GETATTR => same(0, 8), // attr_valid
            STATFS | READDIR | RELEASE | RELEASEDIR | FLUSH => {}
            _ => {}
        }
    }

    /// `fuse_entry_out`: how long it is believed, and its node id.
    fn learn_entry(&mut self, old: &[u8], new: &[u8]) {
        assert_eq!(new[16..40], old[16..40], "entry_valid and attr_valid");
        self.nodes.insert(u64_at(old, 0), u64_at(new, 0));
    }
}

struct Entry {
    node: u64,
    place: u64,
    name: Vec<u8>,
}

/// `fuse_direntplus`, one behind the other.
fn entries(body: &[u8]) -> Vec<Entry> {
    let mut at = 0;
    let mut found = Vec::new();
    while at < body.len() {
        let name_len = u32_at(body, at + ENTRY + 16) as usize;
        let name_at = at + ENTRY + 24;
        found.push(Entry {
            node: u64_at(body, at),
            place: u64_at(body, at + ENTRY + 8),
            name: body[name_at..name_at + name_len].to_vec(),
        });
        at = (name_at + name_len).next_multiple_of(8);
    }
    found
}

#[test]
fn a_recorded_session_is_answered_as_it_was() {
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start(engine);
        std::fs::write(daemon.share().join("hello"), "recorded\n").expect("write");
        std::fs::create_dir(daemon.share().join("dir")).expect("mkdir");
        std::fs::write(daemon.share().join("dir/inner"), "x").expect("write");
        let mut replay = Replay::new(daemon.connect());
        for (from_guest, batch) in recording() {
            match from_guest {
                true => replay.send(batch),
                false => records(&batch).iter().for_each(|record| replay.expect(record)),
            }
        }
        assert_eq!(replay.stream.read(&mut [0]).expect("the end"), 0, "it hangs on");
        for opcode in [INIT, LOOKUP, GETATTR, OPEN, READ, WRITE, CREATE, READDIRPLUS, RENAME2] {
            assert!(replay.checked.contains(&opcode), "the recording lost opcode {opcode}");
        }
        let left: Vec<_> = std::fs::read_dir(daemon.share()).expect("the share").collect();
        assert_eq!(left.len(), 2, "the recorded guest removed what it made");
        daemon.stop_well();
    }
}

#[test]
fn recorded_versions_without_a_common_one_are_told() {
    let daemon = Daemon::start("uring");
    let (_, hello) = recording().swap_remove(0);
    assert_eq!(records(&hello)[0].kind, HELLO);
    for (versions, words) in [([0u16, 0], "0 to 0"), ([2, 9], "2 to 9"), ([u16::MAX; 2], "65535")] {
        let mut hello = hello.clone();
        for (at, version) in versions.into_iter().enumerate() {
            let at = BATCH + RECORD + 2 * at;
            hello[at..at + 2].copy_from_slice(&version.to_le_bytes());
        }
        let mut replay = Replay::new(daemon.connect());
        replay.send(hello);
        let goodbye = replay.await_record(|_| true);
        assert_eq!((goodbye.kind, goodbye.code), (GOODBYE, VERSION_REASON), "{versions:?}");
        let text = String::from_utf8_lossy(&goodbye.body);
        assert!(text.contains(words) && text.contains("this daemon 1 to 1"), "{text}");
        assert_eq!(replay.stream.read(&mut [0]).expect("the end"), 0);
    }
    daemon.stop_well();
}
