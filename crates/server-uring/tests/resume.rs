//! Sessions whose connections are cut, over real sockets and on both engines: each request happens
//! once, whoever comes back finds all as it was, clones find nothing, and nothing is left behind.

mod common;

use common::*;
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::batch::Kind;
use ringfs_wire::hello::{Hello, Reason, Ticket, welcome_flag};
use ringfs_wire::limits::{BATCH_HEADER_BYTES, RECORD_HEADER_BYTES};
use ringfs_wire::session::LinkTx;
use ringfs_wire::slot::SlotUse;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

const MIB: usize = 1 << 20;
const GRACE: u32 = 600;
/// What a peer that does something has to answer whether it lives (limits.rs).
const PROBE_BUSY: Duration = Duration::from_secs(4);

/// Runs a check on a daemon of each engine; the sessions of its guests must have been ended.
fn on_both(check: impl Fn(&Daemon)) {
    for engine in ["uring", "threads"] {
        undisturbed(|| {
            let daemon = Daemon::start_with_grace(engine, GRACE);
            let before = daemon.gauges_at_rest();
            check(&daemon);
            daemon.settles_at(&before);
            assert_eq!(daemon.counters()["sessions_detached"], 0);
            daemon.stop_well();
        });
    }
}

fn create_args(file: &str) -> Vec<u8> {
    let flags = (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL) as u32;
    let create = abi::CreateIn { flags, mode: 0o100_644, umask: 0o22, open_flags: 0 };
    [create.as_bytes(), &name(file)].concat()
}

fn mkdir_args(dir: &str) -> Vec<u8> {
    [abi::MkdirIn { mode: 0o755, umask: 0 }.as_bytes(), &name(dir)].concat()
}

fn node_of(body: &[u8]) -> u64 {
    abi::EntryOut::read_from_prefix(body).expect("an entry").0.nodeid
}

/// Requests that show whether they ran twice: they fail, or leave more behind.
fn telling_requests(round: usize, log: (u64, u64)) -> Vec<(Opcode, u64, Vec<u8>)> {
    vec![
        (Opcode::Mkdir, 1, mkdir_args(&format!("dir-{round}"))),
        (Opcode::Create, 1, create_args(&format!("file-{round}"))),
        (Opcode::Write, log.0, write_args(log.1, 0, b"abc")),
        (Opcode::Lookup, 1, name("log")),
        (Opcode::Unlink, 1, name(&format!("old-{round}"))),
        (Opcode::Syncfs, 1, vec![0; 8]),
    ]
}

/// A session of two connections, and how each says HELLO.
fn two_connections(daemon: &Daemon) -> ([Guest; 2], [Hello; 2]) {
    let first = Hello { lanes: 2, conns: 2, ..hello("share") };
    let one = Guest::greet(daemon.connect(), &first).expect("welcome");
    let second = Hello { ticket: one.welcome.ticket, conn: 1, ..first.clone() };
    let two = Guest::greet(daemon.connect(), &second).expect("welcome");
    ([one, two], [first, second])
}

#[test]
fn a_request_happens_once_wherever_the_cut_is() {
    const ROUNDS: usize = 32;
    on_both(|daemon| {
        for round in 0..ROUNDS {
            std::fs::write(daemon.share().join(format!("old-{round}")), b"").expect("a file");
        }
        std::fs::write(daemon.share().join("log"), b"").expect("a file");
        let mut guest = daemon.guest();
        let node = guest.lookup(1, "log").expect("there").nodeid;
        let fh = guest.open(node, libc::O_WRONLY | libc::O_APPEND).expect("open");
        for round in 0..ROUNDS {
            let asked: Vec<_> = telling_requests(round, (node, fh))
                .into_iter()
                .map(|(opcode, node, args)| (guest.start(opcode, node, &args), opcode, node, args))
                .collect();
            let bytes = guest.seal();
            let sent = if round % 4 == 0 { bytes.len() / 2 } else { bytes.len() };
            guest.stream.write_all(&bytes[..sent]).expect("sent");
            // Replies that arrive and are lost all the same: so far, the guest has none.
            let heard = [0, 0, 1, asked.len()][round % 4];
            (0..heard).for_each(|_| drop(guest.receive().expect("a reply")));
            guest.cut_and_resume(daemon);
            for (at, opcode, node, args) in &asked {
                guest.again(*at, *opcode, *node, args);
            }
            guest.flush();
            let (mut held, mut opened) = (Vec::new(), Vec::new());
            for _ in 0..asked.len() {
                let (at, result) = guest.reply().expect("a reply");
                let opcode = asked.iter().find(|asked| asked.0 == at).expect("asked").1;
                let body = result.unwrap_or_else(|errno| panic!("{round} {opcode:?}: {errno}"));
                if matches!(opcode, Opcode::Mkdir | Opcode::Create | Opcode::Lookup) {
                    held.push((node_of(&body), 1));
                }
                if opcode == Opcode::Create {
                    let fh = abi::OpenOut::read_from_bytes(&body[128..]).expect("opened").fh;
                    opened.push((node_of(&body), fh));
                }
            }
            for (node, fh) in opened {
                guest.release(node, fh).expect("release");
            }
            guest.forget(&held);
        }
        let log = std::fs::read(daemon.share().join("log")).expect("the log");
        assert_eq!(log, b"abc".repeat(ROUNDS));
        guest.release(node, fh).expect("release");
        guest.forget(&[(node, 1)]);
        let counters = daemon.counters();
        // What is known of another session is the root.
        assert_eq!((counters["nodes"], counters["handles"]), (1, 0), "lookups given and lost");
        assert_eq!(counters["resumes"], ROUNDS as u64);
        assert!(counters["replayed"] > 0 && counters["protocol_errors"] == 0);
        goodbye(guest);
    });
}

#[test]
fn large_reads_and_writes_in_flight_survive() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        let (node, fh) = guest.create("large").expect("create");
        let write = |i: u64| write_args(fh, i * MIB as u64, &pattern(i, MIB));
        let read = |i: u64| read_args(fh, i * MIB as u64, MIB as u32);
        for round in 0..6u64 {
            let writes: Vec<_> =
                (0..8).map(|i| (guest.start(Opcode::Write, node, &write(i)), i)).collect();
            guest.flush();
            guest.cut_and_resume(daemon);
            for &(at, i) in &writes {
                guest.again(at, Opcode::Write, node, &write(i));
                guest.flush();
            }
            for _ in &writes {
                assert!(guest.reply().expect("a reply").1.is_ok());
            }
            let reads: Vec<_> =
                (0..8).map(|i| (guest.start(Opcode::Read, node, &read(i)), i)).collect();
            guest.flush();
            if round % 2 == 0 {
                let _ = guest.stream.read(&mut [0; 70_000]);
            }
            guest.cut_and_resume(daemon);
            for &(at, i) in &reads {
                guest.again(at, Opcode::Read, node, &read(i));
            }
            guest.flush();
            for _ in &reads {
                let (at, result) = guest.reply().expect("a reply");
                let i = reads.iter().find(|read| read.0 == at).expect("asked").1;
                assert!(result == Ok(pattern(i, MIB)), "read {i}");
            }
        }
        goodbye(guest);
    });
}

#[test]
fn a_listing_that_was_lost_is_given_back() {
    on_both(|daemon| {
        for i in 0..50 {
            std::fs::write(daemon.share().join(format!("entry-{i}")), b"").expect("a file");
        }
        let mut guest = daemon.guest();
        let opened = guest.call(Opcode::Opendir, 1, &[0; 8]).expect("opendir");
        let fh = u64::from_le_bytes(opened[..8].try_into().expect("8 bytes"));
        let args = read_args(fh, 0, 64 << 10);
        let at = guest.start(Opcode::Readdirplus, 1, &args);
        guest.flush();
        guest.receive().expect("a reply that is lost");
        for _ in 0..3 {
            guest.cut_and_resume(daemon);
            guest.again(at, Opcode::Readdirplus, 1, &args);
            guest.flush();
            guest.receive().expect("another one");
        }
        guest.cut_and_resume(daemon);
        guest.again(at, Opcode::Readdirplus, 1, &args);
        guest.flush();
        let (_, body) = guest.reply().expect("a reply");
        let given = ringfs_wire::table::Given::by(44, &body.expect("entries")).nodes;
        assert_eq!(given.len(), 50);
        assert_eq!(daemon.counters()["reruns"], 4);
        guest.forget(&given.iter().map(|&node| (node, 1)).collect::<Vec<_>>());
        assert_eq!(daemon.counters()["nodes"], 1, "lookups given and lost");
        // The same, and nobody wants it.
        let at = guest.start(Opcode::Readdirplus, 1, &args);
        guest.flush();
        guest.receive().expect("a reply that is lost");
        guest.cut_and_resume(daemon);
        guest.abandon(at);
        until("the lookups", || (daemon.counters()["nodes"] == 1).then_some(()));
        goodbye(guest);
    });
}

#[test]
fn what_an_abandoned_request_gave_is_taken_back() {
    on_both(|daemon| {
        std::fs::write(daemon.share().join("file"), b"x").expect("a file");
        let mut guest = daemon.guest();
        let node = guest.lookup(1, "file").expect("there").nodeid;
        let open = abi::OpenIn { flags: libc::O_RDONLY as u32, open_flags: 0 };
        let give: &[(Opcode, u64, Vec<u8>)] = &[
            (Opcode::Lookup, 1, name("file")),
            (Opcode::Mkdir, 1, mkdir_args("dir")),
            (Opcode::Create, 1, create_args("new")),
            (Opcode::Open, node, open.as_bytes().to_vec()),
            (Opcode::Opendir, 1, vec![0; 8]),
            (Opcode::Lookup, 1, name("none")),
        ];
        for cut_first in [false, true] {
            let asked: Vec<_> =
                give.iter().map(|(op, node, args)| guest.start(*op, *node, args)).collect();
            guest.flush();
            if !cut_first {
                asked.iter().for_each(|_| drop(guest.receive().expect("a reply that is lost")));
            }
            guest.cut_and_resume(daemon);
            asked.iter().for_each(|&at| guest.abandon(at));
            // Once more: the answer may have been lost.
            let at = guest.start(Opcode::Mkdir, 1, &mkdir_args("never"));
            let _unsent = guest.seal();
            guest.cut_and_resume(daemon);
            guest.add(Kind::Cancel as u8, at, 1, &[]);
            guest.flush();
            guest.receive().expect("an answer that is lost");
            guest.cut_and_resume(daemon);
            guest.abandon(at);
            until("what was given", || {
                let counters = daemon.counters();
                ((counters["nodes"], counters["handles"]) == (2, 0)).then_some(())
            });
        }
        assert!(!daemon.share().join("never").exists(), "an abandoned request has run");
        assert!(guest.lookup(1, "file").is_ok());
        goodbye(guest);
    });
}

#[test]
fn tickets_change_and_the_welcome_may_be_lost() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        let first = guest.welcome.ticket;
        assert!(guest.lookup(1, "none").is_err());
        guest.cut_and_resume(daemon);
        let second = guest.welcome.ticket;
        assert_ne!(first, second);
        // The daemon welcomes somebody who is not there any more.
        for _ in 0..3 {
            guest.cut();
            let lost = Hello { ticket: second, ..hello("share") };
            drop(Guest::hail(daemon.connect(), &lost));
        }
        guest.cut_and_resume(daemon);
        assert_ne!(guest.welcome.ticket, second);
        let old = Hello { ticket: first, ..hello("share") };
        assert_eq!(Guest::hail(daemon.connect(), &old).ended_for(), Some(Reason::UnknownSession));
        assert!(guest.lookup(1, "none").is_err());
        goodbye(guest);
    });
}

/// By a transport that brings things twice: the second one does not say that the WELCOME came.
#[test]
fn a_hello_that_comes_twice_uses_up_no_ticket() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        assert!(guest.lookup(1, "none").is_err());
        guest.cut();
        let hello = Hello { ticket: guest.welcome.ticket, ..hello("share") };
        let mut twice = Guest::greet(daemon.connect(), &hello).expect("welcome");
        twice.tx = LinkTx::new(true);
        twice.add(Kind::Hello as u8, SlotUse { slot: 0, seq: 0 }, 0, &hello.encode());
        assert!(twice.flush());
        assert_eq!(twice.ending(), End::Closed);
        let mut again = Guest::greet(daemon.connect(), &hello).expect("the ticket is good");
        assert_eq!(again.welcome.flags, welcome_flag::RESUMED);
        assert!(again.lookup(1, "none").is_err());
        goodbye(again);
    });
}

/// Whoever stands between may bring a HELLO when its guest has let go of it and come again.
#[test]
fn a_hello_that_comes_behind_a_later_one_takes_nothing() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        let (node, fh) = guest.create("file").expect("create");
        guest.cut();
        let numbered = |ticket, nth| Hello { ticket, nth, ..hello("share") };
        let first = guest.welcome.ticket;
        guest.resume(daemon.connect(), &numbered(first, 2)).expect("resumed");
        // Nothing has come by the new ticket: the one before is good.
        let mut late = Guest::hail(daemon.connect(), &numbered(first, 1));
        let asked = Instant::now();
        assert_eq!(late.ended_for(), Some(Reason::Timeout), "a passing reason");
        assert!(asked.elapsed() < Duration::from_millis(400), "the guest's peer was asked");
        guest.resume(daemon.connect(), &numbered(Ticket::NONE, 3)).expect("its ticket is good");
        assert_eq!(guest.write(node, fh, 0, b"abc"), Ok(3));
        goodbye(guest);
    });
}

/// The same by another connection of the session, whose ticket is not new when it joins.
#[test]
fn a_late_hello_of_one_connection_takes_nothing_from_the_others() {
    on_both(|daemon| {
        let ([mut one, two], [first, second]) = two_connections(daemon);
        assert!(one.lookup(1, "none").is_err());
        drop(two);
        until("the cut", || (daemon.counters()["connections"] == 1).then_some(()));
        let ticket = one.welcome.ticket;
        let mut two = Guest::greet(daemon.connect(), &Hello { ticket, nth: 2, ..second.clone() })
            .expect("resumed");
        let mut late = Guest::hail(daemon.connect(), &Hello { ticket, nth: 1, ..second });
        assert_eq!(late.ended_for(), Some(Reason::Timeout));
        one.cut();
        one.welcome.ticket = two.welcome.ticket;
        one.resume(daemon.connect(), &Hello { nth: 3, ..first }).expect("resumed");
        two.welcome.ticket = one.welcome.ticket;
        assert!(one.lookup(1, "none").is_err());
        goodbye(one);
    });
}

#[test]
fn a_copy_of_the_guest_that_comes_late_finds_nothing() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        let first = guest.welcome.ticket;
        assert!(guest.lookup(1, "none").is_err());
        guest.cut_and_resume(daemon);
        // Its first request shows that it has the new ticket, though it has not come back by it.
        let (node, fh) = guest.create("file").expect("create");
        guest.cut();
        let copy = Hello { ticket: first, ..hello("share") };
        assert_eq!(Guest::hail(daemon.connect(), &copy).ended_for(), Some(Reason::UnknownSession));
        guest.cut_and_resume(daemon);
        assert_eq!(guest.write(node, fh, 0, b"abc"), Ok(3));
        goodbye(guest);
    });
}

#[test]
fn a_silent_old_connection_is_taken_for_dead() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        let (node, fh) = guest.create("file").expect("create");
        let start = Instant::now();
        let mut old = guest.resume(daemon.connect(), &hello("share")).expect("resumed");
        assert!(start.elapsed() > Duration::from_millis(400), "the old one was not asked");
        old.read_to_end(&mut Vec::new()).expect("the old stream is closed");
        assert_eq!(guest.write(node, fh, 0, b"abc"), Ok(3));
        goodbye(guest);
    });
}

/// A restored guest has lost all its connections, and comes for them in turn: it must not wait
/// for each as long as for the first.
#[test]
fn all_connections_are_asked_when_somebody_comes_for_one() {
    on_both(|daemon| {
        let ([mut one, mut two], [first, second]) = two_connections(daemon);
        let (node, fh) = one.create("file").expect("create");
        one.resume(daemon.connect(), &first).expect("resumed");
        // The answer to that counts for then, and not for when somebody comes for this one.
        two.answer_ping();
        let ticket = one.welcome.ticket;
        let mut clone = Guest::hail(daemon.connect(), &Hello { ticket, ..second.clone() });
        two.answer_ping();
        assert_eq!(clone.ended_for(), Some(Reason::UnknownSession));
        one.resume(daemon.connect(), &first).expect("resumed");
        two.welcome.ticket = one.welcome.ticket;
        let mut old = two.resume(daemon.connect(), &second).expect("resumed");
        let mut bytes = Vec::new();
        old.read_to_end(&mut bytes).expect("the old stream is closed");
        let ping = BATCH_HEADER_BYTES + RECORD_HEADER_BYTES;
        assert_eq!(bytes.len(), ping, "it was asked more than once");
        assert_eq!(two.write(node, fh, 0, b"abc"), Ok(3));
        goodbye(one);
        drop(two);
    });
}

#[test]
fn a_clone_is_refused_while_the_original_lives() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        let (node, fh) = guest.create("file").expect("create");
        let ticket = guest.welcome.ticket;
        for n in 1..=3 {
            let mut clone = Guest::hail(daemon.connect(), &Hello { ticket, ..hello("share") });
            guest.answer_ping();
            assert_eq!(clone.ended_for(), Some(Reason::UnknownSession));
            assert_eq!(daemon.counters()["clones_refused"], n);
        }
        // A PONG that nobody asked for is none.
        guest.add(Kind::Pong as u8, SlotUse { slot: 0, seq: 0 }, 0, &[]);
        // Bytes alone are no answer, but they give time for one.
        let mut clone = Guest::hail(daemon.connect(), &Hello { ticket, ..hello("share") });
        let (record, _) = guest.receive().expect("a PING");
        assert_eq!(record.kind, Kind::Ping as u8);
        assert_eq!(guest.write(node, fh, 0, b"abc"), Ok(3));
        pong(&mut guest);
        assert_eq!(clone.ended_for(), Some(Reason::UnknownSession));
        goodbye(guest);
    });
}

fn pong(guest: &mut Guest) {
    guest.add(Kind::Pong as u8, SlotUse { slot: 0, seq: 0 }, 0, &[]);
    assert!(guest.flush());
}

#[test]
fn late_bytes_of_a_dead_connection_are_no_life() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        let (node, fh) = guest.create("file").expect("create");
        let ticket = guest.welcome.ticket;
        let hello = Hello { ticket, ..hello("share") };
        let mut newcomer = Guest::hail(daemon.connect(), &hello);
        let (ping, _) = guest.receive().expect("a PING");
        assert_eq!(ping.kind, Kind::Ping as u8);
        assert_eq!(guest.write(node, fh, 0, b"late"), Ok(4));
        newcomer.await_welcome().expect("welcome");
        assert_eq!(newcomer.welcome.flags, welcome_flag::RESUMED);
        drop(guest);
        goodbye(newcomer);
    });
}

/// A link of so many bytes a second, one way, until it is told to stand still.
fn slow_link(daemon: &Daemon, stands_still: Arc<AtomicBool>) -> UnixStream {
    const BYTES_A_SECOND: f64 = (1 << 20) as f64;
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let far = daemon.connect();
    let (mut up_from, mut up_to) =
        (theirs.try_clone().expect("dup"), far.try_clone().expect("dup"));
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut up_from, &mut up_to);
        let _ = up_to.shutdown(Shutdown::Both);
    });
    std::thread::spawn(move || {
        let (mut far, mut theirs, mut piece) = (far, theirs, [0; 16384]);
        let mut due = Instant::now();
        while !stands_still.load(Ordering::Relaxed) {
            let n = far.read(&mut piece).unwrap_or(0);
            if n == 0 || theirs.write_all(&piece[..n]).is_err() {
                let _ = theirs.shutdown(Shutdown::Both);
                return;
            }
            // What it was idle is lost.
            due = due.max(Instant::now()) + Duration::from_secs_f64(n as f64 / BYTES_A_SECOND);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        // Neither end learns of it.
        std::mem::forget((far, theirs));
    });
    ours.set_read_timeout(Some(LIMIT)).expect("timeout");
    ours
}

#[test]
fn a_guest_lives_that_takes_what_is_on_its_way_to_it() {
    on_both(|daemon| {
        let stands_still = Arc::new(AtomicBool::new(false));
        let link = slow_link(daemon, stands_still.clone());
        let mut guest = Guest::greet(link, &hello("share")).expect("welcome");
        let (node, fh) = guest.create("file").expect("create");
        assert_eq!(guest.write(node, fh, 0, &pattern(1, MIB)), Ok(MIB as u32));
        let hello = Hello { ticket: guest.welcome.ticket, ..hello("share") };
        let ask = |guest: &mut Guest| {
            let before = daemon.counters()["bytes_read"];
            let at = guest.start(Opcode::Read, node, &read_args(fh, 0, MIB as u32));
            guest.flush();
            until("the read", || (daemon.counters()["bytes_read"] > before).then_some(()));
            at
        };
        ask(&mut guest);
        let mut clone = Guest::hail(daemon.connect(), &hello);
        let mut read = guest.reply();
        assert!(read.is_ok_and(|(_, data)| data == Ok(pattern(1, MIB))), "it was cut off");
        guest.answer_ping();
        assert_eq!(clone.ended_for(), Some(Reason::UnknownSession));
        // One that takes no more is dead, however much is on its way to it.
        let at = ask(&mut guest);
        stands_still.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        guest.resume(daemon.connect(), &hello).expect("resumed");
        assert!(begun.elapsed() < PROBE_BUSY, "it was taken for alive");
        guest.again(at, Opcode::Read, node, &read_args(fh, 0, MIB as u32));
        guest.flush();
        read = guest.reply();
        assert!(read.is_ok_and(|(_, data)| data == Ok(pattern(1, MIB))));
        goodbye(guest);
    });
}

#[test]
fn an_answer_says_nothing_of_who_came_after_the_question() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        assert!(guest.lookup(1, "none").is_err());
        let hello = Hello { ticket: guest.welcome.ticket, ..hello("share") };
        let mut clone = Guest::hail(daemon.connect(), &hello);
        let (ping, _) = guest.receive().expect("a PING");
        assert_eq!(ping.kind, Kind::Ping as u8);
        // It may be itself, and its answer from before.
        let mut second = Guest::hail(daemon.connect(), &hello);
        pong(&mut guest);
        assert_eq!(clone.ended_for(), Some(Reason::UnknownSession));
        let (ping, _) = guest.receive().expect("a PING for the second one");
        assert_eq!(ping.kind, Kind::Ping as u8);
        second.await_welcome().expect("welcome");
        assert_eq!(second.welcome.flags, welcome_flag::RESUMED);
        drop(guest);
        goodbye(second);
    });
}

#[test]
fn a_flood_of_resumes_leaves_one() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        assert!(guest.lookup(1, "none").is_err());
        let ticket = guest.welcome.ticket;
        let hello = Hello { ticket, ..hello("share") };
        let flood: Vec<_> = (0..60).map(|_| Guest::hail(daemon.connect(), &hello)).collect();
        let mut welcomed = 0;
        for mut foe in flood {
            match foe.await_welcome() {
                Ok(()) => welcomed += 1,
                Err(End::Goodbye(Some(Reason::Timeout | Reason::UnknownSession), _)) => {}
                Err(end) => panic!("{end:?}"),
            }
        }
        assert!(welcomed >= 1, "nobody got the silent guest's connection");
        guest.ending();
        let mut last = Guest::greet(daemon.connect(), &hello).expect("the old ticket still");
        assert!(last.lookup(1, "none").is_err());
        goodbye(last);
    });
}

#[test]
fn a_session_that_nobody_resumes_is_dropped_after_its_grace_time() {
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start_with_grace(engine, 1);
        let before = daemon.gauges_at_rest();
        let ([mut one, mut other], [first, _]) = two_connections(&daemon);
        let ticket = one.welcome.ticket;
        let (node, fh) = one.create("file").expect("create");
        for i in 0..40 {
            other.start(Opcode::Read, node, &read_args(fh, 0, MIB as u32));
            one.start(Opcode::Mkdir, 1, &mkdir_args(&format!("dir-{i}")));
        }
        one.flush();
        other.flush();
        drop(one);
        assert!(daemon.counters()["sessions"] == 1);
        drop(other);
        daemon.settles_at(&before);
        let late = Hello { ticket, ..first };
        assert_eq!(Guest::hail(daemon.connect(), &late).ended_for(), Some(Reason::UnknownSession));
        daemon.stop_well();
    }
}

#[test]
fn a_session_with_one_of_two_connections_goes_on() {
    let check = |daemon: &Daemon| {
        let ([mut one, mut two], [first, second]) = two_connections(daemon);
        let (node, fh) = one.create("file").expect("create");
        for round in 0..5 {
            one.cut();
            assert_eq!(two.write(node, fh, round, b"x"), Ok(1));
            one.welcome.ticket = two.welcome.ticket;
            one.resume(daemon.connect(), &first).expect("resumed");
            assert_eq!(one.read(node, fh, round, 1), Ok(b"x".to_vec()));
            two.cut();
            two.welcome.ticket = one.welcome.ticket;
            two.resume(daemon.connect(), &second).expect("resumed");
        }
        goodbye(one);
        drop(two);
    };
    on_both(check);
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start_with_grace(engine, 0);
        check(&daemon);
        daemon.stop_well();
    }
}

#[test]
fn a_record_that_comes_twice_on_one_connection_ends_the_session() {
    on_both(|daemon| {
        for finished in [false, true] {
            let mut guest = daemon.guest();
            let at = guest.start(Opcode::Lookup, 1, &name("none"));
            guest.flush();
            guest.receive().expect("a reply that is lost");
            guest.cut_and_resume(daemon);
            guest.again(at, Opcode::Lookup, 1, &name("none"));
            if finished {
                guest.flush();
                guest.receive().expect("the reply again");
            }
            guest.again(at, Opcode::Lookup, 1, &name("none"));
            guest.flush();
            let ticket = guest.welcome.ticket;
            assert_eq!(guest.ended_for(), Some(Reason::Protocol));
            let late = Hello { ticket, ..hello("share") };
            let end = Guest::hail(daemon.connect(), &late).ended_for();
            assert_eq!(end, Some(Reason::UnknownSession));
        }
    });
}

#[test]
fn damaged_bytes_are_a_cut() {
    on_both(|daemon| {
        let mut guest = daemon.guest();
        assert!(guest.lookup(1, "none").is_err());
        let at = guest.start(Opcode::Mkdir, 1, &mkdir_args("dir"));
        let mut bytes = guest.seal();
        let last = bytes.len() - 9;
        bytes[last] ^= 1;
        guest.stream.write_all(&bytes).expect("sent");
        assert_eq!(guest.ending(), End::Closed);
        guest.cut_and_resume(daemon);
        guest.again(at, Opcode::Mkdir, 1, &mkdir_args("dir"));
        guest.flush();
        assert!(guest.reply().expect("a reply").1.is_ok());
        goodbye(guest);
    });
}

#[test]
fn a_session_without_requests_is_not_kept() {
    on_both(|daemon| {
        drop(two_connections(daemon));
    });
}
