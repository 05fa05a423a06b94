//! The daemon over a real socket: what a well-behaved guest gets, on both engines.

mod common;

use common::*;
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::batch::Kind;
use ringfs_wire::hello::Hello;
use std::collections::HashMap;
use zerocopy::{FromBytes, IntoBytes};

const MIB: usize = 1 << 20;

/// Runs a check on a daemon of each engine; afterwards it must hold nothing of it.
fn on_both(check: impl Fn(&Daemon)) {
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start(engine);
        let before = daemon.gauges_at_rest();
        check(&daemon);
        daemon.settles_at(&before);
        daemon.stop_well();
    }
}

#[test]
fn files_are_found_read_and_written() {
    on_both(|daemon| {
        std::fs::write(daemon.share().join("old"), b"hello").expect("write");
        let mut guest = daemon.guest();
        assert_eq!((guest.welcome.lanes, guest.welcome.slots, guest.welcome.conns), (1, 128, 1));
        assert_eq!(guest.lookup(1, "none"), Err(libc::ENOENT as u32));
        let old = guest.lookup(1, "old").expect("there");
        assert_eq!(old.attr.size, 5);
        let attr = guest.call(Opcode::Getattr, old.nodeid, abi::GetattrIn::default().as_bytes());
        let attr = abi::AttrOut::read_from_bytes(&attr.expect("attributes")).expect("AttrOut");
        assert_eq!(attr.attr.ino, old.attr.ino);
        let fh = guest.open(old.nodeid, libc::O_RDONLY).expect("open");
        assert_eq!(guest.read(old.nodeid, fh, 0, 4096), Ok(b"hello".to_vec()));
        assert_eq!(guest.read(old.nodeid, fh, 3, 1), Ok(b"l".to_vec()));
        assert_eq!(guest.read(old.nodeid, fh, 5, 100_000), Ok(Vec::new()));
        assert_eq!(guest.read(old.nodeid, fh, 0, 0), Ok(Vec::new()));
        assert_eq!(guest.read(old.nodeid, fh + 1, 0, 1), Err(libc::EBADF as u32));
        assert_eq!(guest.write(old.nodeid, fh, 0, b"x"), Err(libc::EBADF as u32));
        assert_eq!(guest.release(old.nodeid, fh), Ok(()));
        assert_eq!(guest.release(old.nodeid, fh), Err(libc::EBADF as u32));

        let (node, fh) = guest.create("new").expect("create");
        for (at, len) in [(0, 1), (1, 4096), (4097, 40_000), (44_097, MIB)] {
            let data = pattern(at, len);
            assert_eq!(guest.write(node, fh, at, &data), Ok(len as u32));
            assert_eq!(guest.read(node, fh, at, len as u32), Ok(data));
        }
        let fsync = abi::FsyncIn { fh, ..Default::default() };
        assert_eq!(guest.call(Opcode::Fsync, node, fsync.as_bytes()), Ok(Vec::new()));
        let whole = std::fs::read(daemon.share().join("new")).expect("read");
        assert_eq!(whole.len(), 44_097 + MIB);
        assert_eq!(whole[44_097..], pattern(44_097, MIB));
        assert_eq!(guest.read(node, fh, 44_097 + 10, MIB as u32), Ok(whole[44_107..].to_vec()));
        assert_eq!(guest.release(node, fh), Ok(()));
        assert_eq!(guest.call(Opcode::Unlink, 1, &name("new")), Ok(Vec::new()));
        guest.forget(&[(node, 1), (old.nodeid, 1)]);
        assert_eq!(guest.lookup(node, "x"), Err(libc::ESTALE as u32));
    });
}

#[test]
fn requests_are_pipelined_up_to_the_slots() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        let (node, fh) = guest.create("file").expect("create");
        let mut asked = HashMap::new();
        // More than one round of slots, all in as few batches as they fit into.
        for round in 0..6u64 {
            let mut i = 0;
            while guest.has_free() {
                let len = [1usize, 100, 5000][i % 3];
                let offset = (round * 128 + i as u64) * 5000;
                let data = pattern(offset, len);
                let at = guest.start(Opcode::Write, node, &write_args(fh, offset, &data));
                asked.insert(at, (offset, data));
                i += 1;
            }
            guest.flush();
            assert_eq!(i, 128);
            for _ in 0..i {
                let (at, result) = guest.reply().expect("a reply");
                let size = result.map(|b| abi::WriteOut::read_from_bytes(&b).expect("out").size);
                assert_eq!(size, Ok(asked[&at].1.len() as u32));
            }
        }
        let mut asked: Vec<_> = asked.into_values().collect();
        while !asked.is_empty() {
            let mut wait = HashMap::new();
            while guest.has_free() && !asked.is_empty() {
                let (offset, data) = asked.swap_remove(0);
                let args = read_args(fh, offset, data.len() as u32);
                wait.insert(guest.start(Opcode::Read, node, &args), data);
            }
            guest.flush();
            for _ in 0..wait.len() {
                let (at, result) = guest.reply().expect("a reply");
                assert_eq!(result.as_ref(), Ok(&wait[&at]));
            }
        }
    });
}

/// Without checksums of payload the pages of such files are spliced into the socket.
#[test]
fn large_reads_of_files_in_memory_are_whole_however_they_are_sent() {
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start_in_memory(engine);
        // Each shard keeps the pipe that it has made.
        let held = |gauges: Vec<(&'static str, u64)>| {
            gauges.into_iter().filter(|(name, _)| *name != "fds").collect::<Vec<_>>()
        };
        let before = held(daemon.gauges_at_rest());
        let whole = pattern(3, 3 * MIB + 77);
        std::fs::write(daemon.share().join("file"), &whole).expect("write");
        let hello = Hello { features: 0, ..hello("share") };
        let mut guest = Guest::greet(daemon.connect(), &hello).expect("a session");
        let node = guest.lookup(1, "file").expect("there").nodeid;
        let fh = guest.open(node, libc::O_RDONLY).expect("open");
        let expected = |offset: usize, len: usize| {
            let end = whole.len().min(offset + len);
            whole.get(offset..end).unwrap_or_default().to_vec()
        };
        // First one by one, when the socket has room; then more than it holds, at all places.
        for (offset, len) in [(0, MIB), (MIB, 128 << 10), (5, 70_001), (3 * MIB - 9, MIB)] {
            let read = guest.read(node, fh, offset as u64, len as u32);
            assert!(read.as_ref() == Ok(&expected(offset, len)), "{len} at {offset}");
        }
        for round in 0..3 {
            let mut wait = HashMap::new();
            for i in 0..40 {
                let offset = (i * 397 * 8 * 61 + i % 3 * round) % (3 * MIB + 500);
                let len = [MIB, 64 << 10, 100_003, 4096, 1 << 19][i % 5];
                let at = guest.start(Opcode::Read, node, &read_args(fh, offset as u64, len as u32));
                wait.insert(at, (offset, len));
            }
            guest.flush();
            while !wait.is_empty() {
                let (at, result) = guest.reply().expect("a reply");
                let (offset, len) = wait.remove(&at).expect("asked");
                assert!(result == Ok(expected(offset, len)), "{len} at {offset}");
            }
        }
        std::fs::write(daemon.share().join("file"), &whole[..100_000]).expect("shorter");
        let read = guest.read(node, fh, 0, MIB as u32).expect("read");
        assert!(read == whole[..100_000]);
        assert_eq!(guest.release(node, fh), Ok(()));
        guest.forget(&[(node, 1)]);
        drop(guest);
        until("rest", || (held(daemon.gauges()) == before).then_some(()));
        daemon.stop_well();
    }
}

/// One large reply or two may be on their way already, but not all that were asked for before.
#[test]
fn a_small_reply_overtakes_large_ones() {
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start_in_memory(engine);
        std::fs::write(daemon.share().join("file"), pattern(3, MIB)).expect("write");
        let hello = Hello { features: 0, ..hello("share") };
        let mut guest = Guest::greet(daemon.connect(), &hello).expect("a session");
        let node = guest.lookup(1, "file").expect("there").nodeid;
        let fh = guest.open(node, libc::O_RDONLY).expect("open");
        let reads = 8;
        (0..reads).for_each(|_| {
            guest.start(Opcode::Read, node, &read_args(fh, 0, MIB as u32));
        });
        // One comes with them, another one while they are being answered.
        for _ in 0..2 {
            let small = guest.start(Opcode::Getattr, node, abi::GetattrIn::default().as_bytes());
            guest.flush();
            let before = (0..=reads).find(|_| guest.reply().expect("a reply").0 == small);
            assert!(before.is_some_and(|large| large <= 3), "behind {before:?} on {engine}");
        }
        drop(guest);
        daemon.stop_well();
    }
}

#[test]
fn large_reads_and_writes_are_pipelined() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        let (node, fh) = guest.create("file").expect("create");
        const FILE: u64 = 16;
        let mut writes = 0;
        for i in 0..FILE {
            // Not aligned to anything, and with something small on each side.
            let data = pattern(i, MIB);
            guest.start(Opcode::Write, node, &write_args(fh, i * MIB as u64, &data));
            guest.start(Opcode::Getattr, node, abi::GetattrIn::default().as_bytes());
            writes += 2;
        }
        guest.flush();
        for _ in 0..writes {
            assert!(guest.reply().expect("a reply").1.is_ok());
        }
        let mut wait = HashMap::new();
        for i in 0..128u64 {
            let args = read_args(fh, (i % FILE) * MIB as u64, MIB as u32);
            wait.insert(guest.start(Opcode::Read, node, &args), i % FILE);
        }
        guest.flush();
        for _ in 0..128 {
            let (at, result) = guest.reply().expect("a reply");
            assert!(result == Ok(pattern(wait[&at], MIB)), "another's data in {at:?}");
        }
    });
}

#[test]
fn sessions_and_connections_are_served_at_once() {
    on_both(|daemon| {
        let threads: Vec<_> = (0..2u64)
            .map(|session| {
                let (a, b) = (daemon.connect(), daemon.connect());
                std::thread::spawn(move || {
                    let first = Hello { lanes: 3, conns: 2, ..hello("share") };
                    let mut one = Guest::greet(a, &first).expect("welcome");
                    let ticket = one.welcome.ticket;
                    let second = Hello { ticket, conn: 1, ..first };
                    let mut two = Guest::greet(b, &second).expect("welcome");
                    assert_eq!(one.welcome, two.welcome);
                    let (node, fh) = one.create(&format!("f{session}")).expect("create");
                    for i in 0..50u64 {
                        // Nodes and handles belong to the session: either connection uses them.
                        let len = [10, 3000, 70_000, 300_000][i as usize % 4];
                        let data = pattern(session * 100 + i, len);
                        let guest = if i % 3 == 0 { &mut two } else { &mut one };
                        assert_eq!(guest.write(node, fh, 0, &data), Ok(len as u32));
                        let other = if i % 2 == 0 { &mut two } else { &mut one };
                        assert!(other.read(node, fh, 0, len as u32) == Ok(data));
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().expect("a guest"));
    });
}

#[test]
fn pings_are_answered_and_optional_kinds_skipped() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        let none = ringfs_wire::slot::SlotUse { slot: 0, seq: 0 };
        guest.add(200, none, 7, b"from the future");
        guest.add(Kind::Ping as u8, none, 77, &[]);
        guest.add(Kind::Pong as u8, none, 0, &[]);
        guest.add(Kind::Cancel as u8, none, 0, &[]);
        guest.flush();
        let (record, _) = guest.receive().expect("a pong");
        assert_eq!((record.kind, record.code), (Kind::Pong as u8, 77));
        let counters = daemon.counters();
        assert_eq!(counters["batches_in"], 1);
        guest.add(Kind::Goodbye as u8, none, 1, b"bye");
        guest.flush();
        guest.ending();
    });
}

#[test]
fn cancelled_requests_are_answered_once_too() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        let mut interrupted = 0;
        for _ in 0..20 {
            let mut wait = Vec::new();
            while guest.has_free() {
                wait.push(guest.start(Opcode::Syncfs, 1, &[0; 8]));
            }
            for &at in wait.iter().rev() {
                guest.add(Kind::Cancel as u8, at, 0, &[]);
                // Once more, and one that is long over: neither may harm.
                guest.add(Kind::Cancel as u8, at, 0, &[]);
                let past = at.seq.wrapping_sub(1);
                let past = ringfs_wire::slot::SlotUse { seq: past, ..at };
                guest.add(Kind::Cancel as u8, past, 0, &[]);
            }
            guest.flush();
            for _ in 0..wait.len() {
                match guest.reply().expect("a reply").1 {
                    Ok(body) => assert!(body.is_empty()),
                    Err(errno) => {
                        assert_eq!(errno, libc::EINTR as u32);
                        interrupted += 1;
                    }
                }
            }
        }
        assert!(interrupted > 0, "no job was waiting when it was cancelled");
    });
}
