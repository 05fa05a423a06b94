//! Guests that break the protocol, stall, or vanish: each ends its own connection only, with the
//! reason that the specification gives, and leaves nothing behind in the daemon.

use crate::common::*;
use crate::{MIB, Scene, on_both};
use ringfs_server::limits::{GREETINGS_MAX, HELLO_TIMEOUT_MS};
use ringfs_wire::abi::Opcode;
use ringfs_wire::batch::Kind;
use ringfs_wire::hello::{Hello, Reason, Ticket};
use ringfs_wire::limits::*;
use ringfs_wire::slot::SlotUse;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

const FIRST: SlotUse = SlotUse { slot: 0, seq: 0 };

/// What a stream of bytes after a good handshake is answered with.
fn after_welcome(scene: &Scene, attack: impl FnOnce(&mut Guest)) -> End {
    let mut foe = scene.daemon.guest();
    attack(&mut foe);
    foe.ending()
}

fn is_protocol_error(end: End, what: &str) {
    assert!(matches!(end, End::Goodbye(Some(Reason::Protocol), _)), "{what}: {end:?}");
}

#[test]
fn broken_batches_end_the_connection() {
    on_both(|scene| {
        type Attack = fn(&mut Vec<u8>);
        let attacks: &[(&str, Attack)] = &[
            ("garbage", |b| b.iter_mut().enumerate().for_each(|(i, v)| *v = (i * 37) as u8)),
            ("magic", |b| b[4] ^= 1),
            ("length of a batch: short", |b| b[..4].copy_from_slice(&31u32.to_le_bytes())),
            ("length of a batch: long", |b| b[..4].copy_from_slice(&u32::MAX.to_le_bytes())),
            ("one byte too long", |b| {
                b[..4].copy_from_slice(&(BATCH_BYTES_MAX as u32 + 1).to_le_bytes())
            }),
            ("count", |b| b[6..8].copy_from_slice(&u16::MAX.to_le_bytes())),
            ("one record too many", |b| b[6] += 1),
            ("one record too few", |b| b[6] -= 1),
            ("sequence", |b| b[8] += 1),
            ("acknowledgement", |b| b[16] += 9),
            ("head checksum", |b| b[24] ^= 1),
            ("payload checksum", |b| b[28] ^= 1),
            ("record: short", |b| b[32..36].copy_from_slice(&15u32.to_le_bytes())),
            ("record: long", |b| b[32..36].copy_from_slice(&u32::MAX.to_le_bytes())),
            ("kind", |b| b[36] = 99),
            ("slot", |b| b[38] = 77),
            ("payload", |b| b[32 + 300] ^= 4),
        ];
        for (what, attack) in attacks {
            let end = after_welcome(scene, |foe| {
                let name = name(&"n".repeat(400));
                foe.start(Opcode::Lookup, 1, &name);
                let mut bytes = foe.seal();
                attack(&mut bytes);
                foe.stream.write_all(&bytes).expect("sent");
            });
            // Such bytes are not what a peer sent: a cut, without a word.
            assert_eq!(end, End::Closed, "{what}");
        }
    });
}

#[test]
fn a_sealed_lie_ends_the_connection() {
    on_both(|scene| {
        type Attack = fn(&mut Guest);
        fn add(foe: &mut Guest, kind: Kind, at: SlotUse, body: &[u8]) {
            foe.add(kind as u8, at, Opcode::Lookup as u32, body);
        }
        let attacks: &[(&str, Attack)] = &[
            ("acknowledgement of what was not sent", |foe| {
                let mut batch = [0; BATCH_HEADER_BYTES];
                let mut builder = ringfs_wire::batch::BatchBuilder::new();
                let bytes = foe.tx.seal(&mut builder, &mut batch, 99);
                foe.stream.write_all(bytes).expect("sent");
            }),
            ("an unknown kind of CANCEL", |foe| {
                foe.add(Kind::Cancel as u8, FIRST, 2, &[]);
            }),
            ("an ABANDON of the future", |foe| {
                foe.add(Kind::Cancel as u8, SlotUse { slot: 0, seq: 1 }, 1, &[]);
            }),
            ("an ABANDON of the past", |foe| {
                let _ = (foe.lookup(1, "x"), foe.lookup(1, "x"));
                foe.add(Kind::Cancel as u8, FIRST, 1, &[]);
            }),
            ("an ABANDON out of range", |foe| {
                foe.add(Kind::Cancel as u8, SlotUse { slot: 500, seq: 0 }, 1, &[]);
            }),
            ("slot out of range", |foe| {
                add(foe, Kind::Request, SlotUse { slot: 128, seq: 0 }, &body(1, &name("x")))
            }),
            ("slot_seq of the future", |foe| {
                add(foe, Kind::Request, SlotUse { slot: 0, seq: 1 }, &body(1, &name("x")))
            }),
            ("slot_seq of the past", |foe| {
                let _ = foe.lookup(1, "x");
                add(foe, Kind::Request, FIRST, &body(1, &name("x")))
            }),
            ("another connection's lane", |foe| {
                foe.lane = 1;
                add(foe, Kind::Request, FIRST, &body(1, &name("x")))
            }),
            ("a lane beyond all", |foe| {
                foe.lane = 255;
                add(foe, Kind::Forget, FIRST, &[0; 16])
            }),
            ("a request without its header", |foe| add(foe, Kind::Request, FIRST, &[0; 23])),
            ("a FORGET of no whole entries", |foe| add(foe, Kind::Forget, FIRST, &[0; 17])),
            ("a FORGET of too many", |foe| {
                add(foe, Kind::Forget, FIRST, &[0; 16 * (FORGETS_PER_RECORD_MAX + 1)])
            }),
            ("a FORGET out of range", |foe| {
                add(foe, Kind::Forget, SlotUse { slot: 999, seq: 0 }, &[0; 16])
            }),
            ("unknown critical kind", |foe| {
                foe.add(127, FIRST, 0, &[]);
            }),
            ("HELLO twice", |foe| add(foe, Kind::Hello, FIRST, &hello("share").encode())),
            ("WELCOME", |foe| add(foe, Kind::Welcome, FIRST, &[])),
            ("REPLY", |foe| add(foe, Kind::Reply, FIRST, &[])),
            ("NODE", |foe| add(foe, Kind::Node, FIRST, &[])),
            ("RESTORE", |foe| add(foe, Kind::Restore, FIRST, &[])),
            ("NOTIFY", |foe| add(foe, Kind::Notify, FIRST, &[])),
        ];
        for (what, attack) in attacks {
            let end = after_welcome(scene, |foe| {
                attack(foe);
                foe.flush();
            });
            is_protocol_error(end, what);
        }
    });
}

#[test]
fn a_batch_out_of_order_is_a_cut() {
    on_both(|scene| {
        let end = after_welcome(scene, |foe| {
            let mut builder = ringfs_wire::batch::BatchBuilder::new();
            foe.tx.seal(&mut builder, &mut [0; BATCH_HEADER_BYTES], 1);
            foe.add(Kind::Ping as u8, FIRST, 0, &[]);
            foe.flush();
        });
        assert_eq!(end, End::Closed);
    });
}

#[test]
fn a_busy_slot_cannot_be_used_twice() {
    on_both(|scene| {
        // SYNCFS runs in the pool: its slot is busy when the second record is looked at.
        let end = after_welcome(scene, |foe| {
            for _ in 0..2 {
                foe.add(Kind::Request as u8, FIRST, Opcode::Syncfs as u32, &body(1, &[0; 8]));
            }
            foe.flush();
        });
        is_protocol_error(end, "busy");
    });
}

#[test]
fn handshakes_are_refused_for_the_right_reason() {
    on_both(|scene| {
        std::fs::create_dir_all(scene.daemon.share().join("sub/deep")).expect("mkdir");
        std::fs::write(scene.daemon.share().join("file"), b"").expect("write");
        for (target, link) in [("/etc", "out"), ("sub", "in"), ("..", "up")] {
            std::os::unix::fs::symlink(target, scene.daemon.share().join(link)).expect("link");
        }
        let check = |hello: Hello, expected: Reason| {
            let end = Guest::greet(scene.daemon.connect(), &hello).err();
            let said = matches!(&end, Some(End::Goodbye(Some(reason), _)) if *reason == expected);
            assert!(said, "{hello:?}: {end:?}, expected {expected:?}");
        };
        check(Hello { versions: (2, 9), ..hello("share") }, Reason::Version);
        check(Hello { versions: (0, 0), ..hello("share") }, Reason::Version);
        check(Hello { versions: (2, 1), ..hello("share") }, Reason::Protocol);
        check(hello("nothing"), Reason::UnknownShare);
        check(hello("share/"), Reason::UnknownShare);
        check(hello(&"s".repeat(256)), Reason::Protocol);
        check(hello(""), Reason::Protocol);
        check(Hello { ticket: Ticket([7; 16]), ..hello("share") }, Reason::UnknownSession);
        check(Hello { lanes: 0, ..hello("share") }, Reason::Protocol);
        check(Hello { lanes: 9, ..hello("share") }, Reason::Protocol);
        check(Hello { conns: 2, ..hello("share") }, Reason::Protocol);
        check(Hello { conn: 1, ..hello("share") }, Reason::Protocol);
        check(Hello { slots: 0, ..hello("share") }, Reason::Protocol);
        check(Hello { mount_flags: 1 << 31, ..hello("share") }, Reason::Protocol);
        let long = "é".repeat(1000);
        let subdirs: &[&[u8]] = &[
            b"..",
            b"../share",
            b"/",
            b"/etc",
            b"out",
            b"in",
            b"up",
            b"in/deep",
            b"sub/../..",
            b"none",
            b"file",
            b"sub/\0x",
            b"a\0",
            b"sub/deep/../../..",
            b"\xff\xfe",
            long.as_bytes(),
        ];
        for subdir in subdirs {
            check(Hello { subdir: subdir.to_vec(), ..hello("share") }, Reason::BadSubdir);
        }
        let deep = Hello { subdir: b"sub".to_vec(), ..hello("share") };
        let mut guest = Guest::greet(scene.daemon.connect(), &deep).expect("a good one");
        assert!(guest.lookup(1, "deep").is_ok());
        assert!(guest.lookup(1, "file").is_err());
        let mut reader = Guest::greet(scene.daemon.connect(), &hello("ro")).expect("a good one");
        assert_eq!(reader.create("x").err(), Some(libc::EROFS as u32));
    });
}

#[test]
fn greetings_of_damaged_bytes_hear_nothing() {
    on_both(|scene| {
        let hello_bytes = |edit: &dyn Fn(&mut Vec<u8>)| {
            let mut guest = scene.daemon.guest(); // only for its way to seal
            guest.tx = ringfs_wire::session::LinkTx::new(true);
            guest.rx = ringfs_wire::session::LinkRx::new(true);
            guest.add(Kind::Hello as u8, FIRST, 0, &hello("share").encode());
            let mut bytes = guest.seal();
            edit(&mut bytes);
            bytes
        };
        let check = |what: &str, bytes: &[u8]| {
            let mut stream = scene.daemon.connect();
            let _ = stream.write_all(bytes);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            assert!(answer.is_empty(), "{what}: {answer:?}");
        };
        check("garbage", &[0x55; 64]);
        check("more than a HELLO has", &[0; HELLO_BYTES_MAX * 4]);
        check("two batches", &hello_bytes(&|b| b.extend_from_within(..)));
        check("checksum", &hello_bytes(&|b| b[24] ^= 1));
        check("sequence", &hello_bytes(&|b| b[8] = 1));
        check("kind", &hello_bytes(&|b| b[36] = 3));
        check("too long", &hello_bytes(&|b| b[..4].copy_from_slice(&8192u32.to_le_bytes())));
        // Byte by byte is slow, but good.
        let mut stream = scene.daemon.connect();
        for byte in hello_bytes(&|_| ()) {
            stream.write_all(&[byte]).expect("sent");
        }
        let mut answer = [0; 48];
        stream.read_exact(&mut answer).expect("an answer");
        assert_eq!(answer[36], Kind::Welcome as u8);
    });
}

#[test]
fn an_open_connections_index_is_not_given_twice() {
    on_both(|scene| {
        let first = Hello { lanes: 2, conns: 2, ..hello("share") };
        let mut one = Guest::greet(scene.daemon.connect(), &first).expect("welcome");
        let ticket = one.welcome.ticket;
        let other = Hello { ticket, conns: 1, lanes: 2, ..first.clone() };
        let end = Guest::greet(scene.daemon.connect(), &other).err();
        is_protocol_error(end.expect("refused"), "another number of connections");
        let second = Hello { ticket, conn: 1, ..first.clone() };
        let mut two = Guest::greet(scene.daemon.connect(), &second).expect("welcome");
        for hello in [&first, &second] {
            let hello = Hello { ticket, ..hello.clone() };
            let mut clone = Guest::hail(scene.daemon.connect(), &hello);
            // All connections of the session are asked.
            one.answer_ping();
            two.answer_ping();
            assert_eq!(clone.ended_for(), Some(Reason::UnknownSession));
        }
        // It may be asked once more, and then answers by itself.
        two.recipes = Some(Default::default());
        drop(one);
        // The session lives on in its other connection, and the index is free again.
        let again = Guest::greet(scene.daemon.connect(), &Hello { ticket, ..first.clone() });
        let again = again.expect("welcome");
        assert!(two.lookup(1, "friend").is_ok());
        drop((two, again));
        until("the session's end", || {
            let hello = Hello { ticket, ..first.clone() };
            let end = Guest::greet(scene.daemon.connect(), &hello).err()?;
            matches!(end, End::Goodbye(Some(Reason::UnknownSession), _)).then_some(())
        });
    });
}

#[test]
fn silent_connections_do_not_keep_others_out() {
    on_both(|scene| {
        let silent: Vec<_> = (0..300).map(|_| scene.daemon.connect()).collect();
        let mut some: Vec<_> = (0..20).map(|_| scene.daemon.connect()).collect();
        some.iter_mut().for_each(|stream| stream.write_all(&[120, 0, 0, 0]).expect("sent"));
        let start = Instant::now();
        let mut guest = scene.daemon.guest();
        assert!(guest.lookup(1, "friend").is_ok());
        assert!(start.elapsed() < Duration::from_secs(3), "kept out by silent ones");
        // Whoever says nothing is told goodbye in the end: in time, or by those who came later.
        let mut reasons = Vec::new();
        for mut stream in silent.into_iter().chain(some) {
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            assert!(answer.len() >= 48 && answer[36] == Kind::Goodbye as u8, "no GOODBYE");
            reasons.push(answer[44]);
        }
        let late = reasons.iter().filter(|&&reason| reason == Reason::Timeout as u8).count();
        // The guest above may have pushed some more out.
        let expected = GREETINGS_MAX - 2..=GREETINGS_MAX;
        assert!(expected.contains(&late), "{late} waited to the end: {reasons:?}");
        assert!(start.elapsed() > Duration::from_millis(HELLO_TIMEOUT_MS - 1000));
    });
}

#[test]
fn a_guest_that_never_reads_holds_up_nobody() {
    on_both(|scene| {
        let memory = scene.daemon.memory_kib();
        let mut foes = Vec::new();
        for i in 0..24 {
            let mut foe = scene.daemon.guest();
            let (node, fh) = foe.create("large").expect("create");
            if i == 0 {
                assert_eq!(foe.write(node, fh, 0, &pattern(1, MIB as usize)), Ok(MIB));
            }
            while foe.has_free() {
                foe.start(Opcode::Read, node, &read_args(fh, 0, MIB));
            }
            foe.flush();
            foes.push(foe);
        }
        scene.friend_is_served(9);
        let grown = scene.daemon.memory_kib().saturating_sub(memory);
        assert!(grown < 400 << 10, "{grown} KiB for guests that do not read");
        drop(foes);
    });
}

#[test]
fn half_a_batch_holds_up_nobody() {
    on_both(|scene| {
        let mut foes = Vec::new();
        for _ in 0..220 {
            let mut foe = scene.daemon.guest();
            let data = vec![0; MIB as usize];
            foe.start(Opcode::Write, 1, &write_args(0, 0, &data));
            let bytes = foe.seal();
            foe.stream.write_all(&bytes[..100_000]).expect("sent");
            foes.push(foe);
        }
        scene.friend_is_served(5);
    });
}

#[test]
fn a_flood_that_is_not_read_is_bounded() {
    on_both(|scene| {
        let memory = scene.daemon.memory_kib();
        for kind in [Kind::Ping, Kind::Forget] {
            let mut foe = scene.daemon.guest();
            foe.stream.set_write_timeout(Some(Duration::from_secs(1))).expect("timeout");
            let mut seq = 0;
            // 80 MB of records; their answers are as many bytes.
            'flood: for _ in 0..1280 {
                for _ in 0..4096 {
                    foe.add(kind as u8, SlotUse { slot: 0, seq }, 0, &[]);
                    seq += 1;
                }
                if !foe.flush() {
                    break 'flood; // not read any further: as it should be
                }
            }
            let grown = scene.daemon.memory_kib().saturating_sub(memory);
            assert!(grown < 40 << 10, "{grown} KiB for a flood of {kind:?}");
        }
    });
}

#[test]
fn a_connection_that_is_closed_need_not_be_read() {
    on_both(|scene| {
        let mut foe = scene.daemon.guest();
        let (node, fh) = foe.create("large").expect("create");
        assert_eq!(foe.write(node, fh, 0, &pattern(1, MIB as usize)), Ok(MIB));
        for _ in 0..6 {
            foe.start(Opcode::Read, node, &read_args(fh, 0, MIB));
        }
        foe.add(Kind::Notify as u8, FIRST, 0, &[]);
        foe.flush();
        // It keeps its end open and reads nothing; the daemon gives it up all the same.
        scene.check();
        drop(foe);
    });
}

#[test]
fn guests_that_vanish_leave_nothing() {
    on_both(|scene| {
        for round in 0..12usize {
            let mut foe = scene.daemon.guest();
            let (node, fh) = foe.create("victim").expect("create");
            for i in 0..100u64 {
                match i % 5 {
                    0 => foe.start(Opcode::Read, node, &read_args(fh, 0, MIB)),
                    1 => foe.start(Opcode::Write, node, &write_args(fh, 0, &pattern(i, 70_000))),
                    2 => foe.start(Opcode::Syncfs, 1, &[0; 8]),
                    3 => foe.start(Opcode::Fsync, node, &{
                        let mut args = fh.to_le_bytes().to_vec();
                        args.extend([0; 8]);
                        args
                    }),
                    _ => foe.start(Opcode::Lookup, 1, &name("victim")),
                };
            }
            let bytes = foe.seal();
            let cut = bytes.len() * (round + 1) / 12;
            foe.stream.write_all(&bytes[..cut]).expect("sent");
            if round % 2 == 0 {
                let _ = foe.stream.read(&mut [0; 1000]);
            } else if round % 4 == 1 {
                foe.stream.shutdown(std::net::Shutdown::Write).expect("shutdown");
                foe.ending();
            }
        }
    });
}

#[test]
fn hundreds_of_connections_come_and_go() {
    on_both(|scene| {
        let mut guests: Vec<Guest> = (0..150).map(|_| scene.daemon.guest()).collect();
        for guest in &mut guests {
            assert!(guest.lookup(1, "friend").is_ok());
        }
        scene.friend_is_served(1);
        assert_eq!(scene.daemon.counters()["connections"], 151);
    });
}

#[test]
fn a_daemon_ends_well_under_load() {
    for engine in ["uring", "threads"] {
        undisturbed(|| {
            let daemon = Daemon::start(engine);
            let mut busy = daemon.guest();
            let (node, fh) = busy.create("file").expect("create");
            assert_eq!(busy.write(node, fh, 0, &pattern(1, MIB as usize)), Ok(MIB));
            let load = std::thread::spawn(move || {
                loop {
                    while busy.has_free() {
                        busy.start(Opcode::Read, node, &read_args(fh, 0, MIB));
                    }
                    busy.flush();
                    if let Err(end) = busy.reply() {
                        return end;
                    }
                }
            });
            let mut stuck = daemon.guest();
            while stuck.has_free() {
                stuck.start(Opcode::Syncfs, 1, &[0; 8]);
            }
            stuck.flush();
            let _silent = daemon.connect();
            until("some load", || (daemon.counters()["bytes_read"] > 50 << 20).then_some(()));
            let start = Instant::now();
            daemon.stop_well();
            assert!(start.elapsed() < Duration::from_secs(8), "{:?} to end", start.elapsed());
            let end = load.join().expect("the load");
            assert!(
                matches!(end, End::Goodbye(Some(Reason::Shutdown), _) | End::Closed),
                "{end:?}"
            );
        });
    }
}

/// A daemon in a mount namespace of its own, in which `script` has mounted something at `$1`.
/// Only root can have that.
fn daemon_with_mounts(engine: &str, script: &str) -> Daemon {
    Daemon::start_as(engine, |daemon, share| {
        let mut command = std::process::Command::new("unshare");
        let script = format!("set -e; {script}; d=$2; shift 2; exec \"$d\" \"$@\"");
        command.args(["--mount", "sh", "-c", &script, "sh"]).arg(share).arg(daemon);
        command
    })
}

#[test]
fn what_is_mounted_below_a_share_is_never_seen() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: not root");
    }
    let script = "mkdir -p \"$1/sub/inner\"; mount --bind /etc \"$1/sub/inner\"";
    let daemon = daemon_with_mounts("uring", script);
    let inner = Hello { subdir: b"sub/inner".to_vec(), ..hello("share") };
    let mut guest = Guest::greet(daemon.connect(), &inner).expect("the directory underneath");
    assert_eq!(guest.lookup(1, "passwd"), Err(libc::ENOENT as u32));
    drop(guest);
    let sub = Hello { subdir: b"sub".to_vec(), ..hello("share") };
    let mut guest = Guest::greet(daemon.connect(), &sub).expect("no mount");
    let inner = guest.lookup(1, "inner").expect("the directory underneath");
    assert_eq!(guest.lookup(inner.nodeid, "passwd"), Err(libc::ENOENT as u32));
    daemon.stop_well();
}

#[test]
fn large_replies_of_the_pool_arrive_whole() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: not root");
    }
    // On ramfs, which the daemon does not know as local, metadata is the pool's business.
    let names = (0..4000).map(|i| format!("a-file-with-a-long-name-{i:05}"));
    for engine in ["uring", "threads"] {
        let daemon = daemon_with_mounts(engine, "mount -t ramfs none \"$1\"");
        let before = daemon.gauges_at_rest();
        let mut guest = daemon.guest();
        for name in names.clone() {
            let (node, fh) = guest.create(&name).expect("create");
            guest.release(node, fh).expect("release");
            guest.forget(&[(node, 1)]);
        }
        let opened = guest.call(Opcode::Opendir, 1, &[0; 8]).expect("opendir");
        let fh = u64::from_le_bytes(opened[..8].try_into().expect("8 bytes"));
        let entries = guest.call(Opcode::Readdir, 1, &read_args(fh, 0, MIB)).expect("readdir");
        assert!(entries.len() > 150_000, "{} bytes of entries", entries.len());
        let found = names
            .clone()
            .filter(|name| entries.windows(name.len()).any(|window| window == name.as_bytes()));
        assert_eq!(found.take(20).count(), 20);
        drop(guest);
        daemon.settles_at(&before);
        daemon.stop_well();
    }
}
