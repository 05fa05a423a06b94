//! Limits of a share and of each session, on a real daemon: rates delay, all else refuses, and a
//! reload changes them for sessions that are open.

mod common;

use common::*;
use ringfs_wire::abi::Opcode;
use ringfs_wire::batch::Kind;
use ringfs_wire::hello::Hello;
use std::path::Path;
use std::time::{Duration, Instant};

const NFILE: u32 = libc::ENFILE as u32;

/// A daemon whose shares have these limits, each a table of the file.
fn daemon(limits: &str) -> Daemon {
    Daemon::start_with_file(|dir| file(dir, limits))
}

fn file(dir: &Path, limits: &str) -> String {
    let (share, socket) = (dir.join("share"), dir.join("s"));
    format!(
        "grace = 0\nstate-dir = 'none'\n{limits}\n[[listen]]\naddress = 'unix:{}'\n\
         [share.share]\npath = '{}'\n[share.other]\npath = '{}'\n\
         limits = {{ open-files = 1000, bytes = '1G' }}\n",
        socket.display(),
        share.display(),
        share.display(),
    )
}

fn reload(daemon: &Daemon, limits: &str) {
    let path = daemon.path("ringfsd.toml");
    std::fs::write(&path, file(path.parent().expect("a directory"), limits)).expect("write");
    daemon.reload();
}

/// How long so many requests take that do nothing.
fn time_for(guest: &mut Guest, mut requests: usize) -> Duration {
    let begun = Instant::now();
    let mut in_flight = 0;
    while requests + in_flight > 0 {
        while requests > 0 && guest.has_free() {
            guest.start(Opcode::Lookup, 1, &name("none"));
            (requests, in_flight) = (requests - 1, in_flight + 1);
        }
        guest.flush();
        assert_eq!(guest.reply().expect("an answer").1, Err(libc::ENOENT as u32));
        in_flight -= 1;
    }
    begun.elapsed()
}

// That a rate is kept shows in the least time that requests take, never in the most.
#[test]
fn operations_and_bytes_a_second_are_delayed_and_none_is_lost() {
    let daemon = daemon("[limits]\nops = 500\n");
    let mut guest = daemon.guest();
    // A tenth of a second's number comes at once.
    assert!(time_for(&mut guest, 250) >= Duration::from_millis(390));
    // Another session has its own; on another share, too.
    let mut second = daemon.guest();
    let mut other = daemon.mount("other").expect("welcome");
    for guest in [&mut second, &mut other] {
        assert!(time_for(guest, 100) >= Duration::from_millis(90));
    }
    reload(&daemon, "[limits]\nbytes = '1M'\n");
    let (node, fh) = guest.create("file").expect("create");
    let begun = Instant::now();
    for n in 0..8u64 {
        let data = pattern(n, 100_000);
        assert_eq!(guest.write(node, fh, n * 100_000, &data), Ok(100_000));
        assert!(guest.read(node, fh, n * 100_000, 100_000) == Ok(data));
    }
    // 1.6 MB, of which a tenth of a second's and the last one come at once.
    assert!(begun.elapsed() >= Duration::from_millis(1200), "{:?}", begun.elapsed());
    // One that is larger than a second's number comes through, too.
    let data = pattern(9, 1 << 20);
    assert_eq!(guest.write(node, fh, 0, &data), Ok(1 << 20));
    reload(&daemon, "");
    assert!(guest.read(node, fh, 0, 1 << 20) == Ok(data));
    let status = daemon.command(&["status"]);
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains(" ops: ") && status.contains(" bytes: "), "{status}");
    assert!(status.contains(" delayed (by ") && !status.contains("refused"), "{status}");
    drop((guest, second, other));
    daemon.stop_well();
}

/// A guest whose write is not read cannot ask behind it, and would take the daemon for dead.
#[test]
fn who_is_kept_waiting_is_told_that_somebody_is_there() {
    let daemon = daemon("[limits]\nbytes = '64K'\n");
    let mut guest = daemon.guest();
    let (node, fh) = guest.create("file").expect("create");
    for _ in 0..2 {
        guest.start(Opcode::Write, node, &write_args(fh, 0, &[0; 1 << 20]));
    }
    guest.flush();
    for told in 0..3 {
        let is_word =
            |guest: &mut Guest| guest.receive().expect("a record").0.kind == Kind::Pong as u8;
        assert!((0..2).any(|_| is_word(&mut guest)), "told {told} times");
    }
    drop(guest);
    daemon.stop_well();
}

#[test]
fn sessions_share_what_all_of_them_may_have() {
    let daemon = daemon("[limits]\ntotal-ops = 500\ntotal-open-files = 6\n");
    let mut guests: Vec<Guest> = (0..4).map(|_| daemon.guest()).collect();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        guests.iter_mut().for_each(|guest| drop(scope.spawn(|| time_for(guest, 75))));
    });
    assert!(begun.elapsed() >= Duration::from_millis(480), "{:?}", begun.elapsed());
    let mut open = Vec::new();
    for n in 0..12 {
        match guests[n % 4].create(&format!("file-{n}")) {
            Ok(file) => open.push((n % 4, file)),
            Err(errno) => assert_eq!(errno, NFILE),
        }
    }
    assert_eq!(open.len(), 6);
    // What one gives back another may have; what a session leaves behind, too.
    let (of, (node, fh)) = open.remove(0);
    guests[of].release(node, fh).expect("release");
    guests[3].create("one-more").expect("room");
    assert_eq!(guests[2].create("none-more").err(), Some(NFILE));
    drop(guests.remove(3));
    until("room again", || guests[2].create("again").ok());
    drop(guests);
    daemon.stop_well();
}

#[test]
fn files_and_nodes_of_a_session_are_bounded() {
    let daemon = daemon("[limits]\nopen-files = 3\nnodes = 10\nin-flight = '64K'\n");
    for n in 0..20 {
        std::fs::write(daemon.share().join(format!("file-{n}")), [n; 100]).expect("write");
    }
    let mut guest = daemon.guest();
    let mut nodes = Vec::new();
    for n in 0..20 {
        match guest.lookup(1, &format!("file-{n}")) {
            Ok(entry) => nodes.push(entry.nodeid),
            Err(errno) => assert_eq!(errno, NFILE),
        }
    }
    assert_eq!(nodes.len(), 9, "the root is one");
    let open: Vec<u64> = nodes.iter().filter_map(|&node| guest.open(node, 0).ok()).collect();
    assert_eq!(open.len(), 3);
    assert_eq!(guest.open(nodes[0], 0), Err(NFILE));
    // The share that says something else has that.
    let mut other = daemon.mount("other").expect("welcome");
    let node = other.lookup(1, "file-1").expect("there").nodeid;
    assert!((0..20).all(|_| other.open(node, 0).is_ok()));
    // More now, for the session that is there.
    reload(&daemon, "[limits]\nopen-files = 5\nnodes = 15\n");
    let more = nodes.iter().filter(|&&node| guest.open(node, 0).is_ok()).count();
    assert_eq!(more, 2);
    assert!(guest.lookup(1, "file-19").is_ok());
    let status = daemon.command(&["status"]);
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains(" nodes: 11 refused"), "{status}");
    // Three of nine, one more, and two of nine.
    assert!(status.contains(" open-files: 14 refused"), "{status}");
    drop((guest, other));
    daemon.stop_well();
}

#[test]
fn large_requests_that_wait_keep_no_buffers_from_others() {
    // Far more connections with a large write that has to wait than a shard has large buffers.
    let daemon = daemon("[limits]\nbytes = '64K'\n");
    let lanes = |conn| Hello { lanes: 8, conns: 8, conn, ..hello("share") };
    let mut foes = Vec::new();
    for n in 0..26 {
        let mut first = Guest::greet(daemon.connect(), &lanes(0)).expect("welcome");
        let ticket = first.welcome.ticket;
        let (node, fh) = first.create(&format!("foe-{n}")).expect("create");
        let others = (1..8).map(|conn| {
            let hello = Hello { ticket, ..lanes(conn) };
            Guest::greet(daemon.connect(), &hello).expect("welcome")
        });
        for mut foe in others.chain([first]) {
            foe.stream.set_write_timeout(Some(Duration::from_millis(5))).expect("timeout");
            for _ in 0..2 {
                foe.start(Opcode::Write, node, &write_args(fh, 0, &[0; 1 << 20]));
                foe.flush();
            }
            foes.push(foe);
        }
    }
    let mut friend = daemon.mount("other").expect("welcome");
    let (node, fh) = friend.create("friend").expect("create");
    let data = pattern(1, 1 << 20);
    assert_eq!(friend.write(node, fh, 0, &data), Ok(1 << 20));
    assert!(friend.read(node, fh, 0, 1 << 20) == Ok(data));
    drop((foes, friend));
    daemon.stop_well();
}
