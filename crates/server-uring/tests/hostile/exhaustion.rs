//! Guests that take all that there is: sessions, connections, fds, threads, memory, time. Each has
//! a bound, whoever reaches it is refused, and others are served meanwhile.

use crate::common::*;
use crate::{MIB, Scene, on_both, on_each};
use ringfs_server::limits::{GREETINGS_MAX, POOL_THREADS_MAX, SESSIONS_PER_PEER_MAX};
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::hello::{Hello, Reason, Ticket};
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;
use zerocopy::IntoBytes;

/// Names the daemon's socket to a process that is another peer.
const PEER: &str = "RINGFS_TEST_PEER";

/// A guest of another process is served too: the test below, run by itself.
fn another_peer_is_served(daemon: &Daemon) {
    let output = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", "exhaustion::a_peer_of_its_own"])
        .env(PEER, daemon.path("s"))
        .output()
        .expect("the child ran");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_peer_of_its_own() {
    // Only another test runs it as a peer; by itself there is no daemon to be a peer of.
    let Some(socket) = std::env::var_os(PEER) else { return };
    let stream = connect(Path::new(&socket));
    let mut guest = Guest::greet(stream, &hello("share")).expect("welcome");
    let file = format!("peer-{}", std::process::id());
    let (node, fh) = guest.create(&file).expect("create");
    assert_eq!(guest.write(node, fh, 0, b"data"), Ok(4));
    assert_eq!(guest.read(node, fh, 0, 10), Ok(b"data".to_vec()));
    guest.release(node, fh).expect("release");
    guest.call(Opcode::Unlink, 1, &name(&file)).expect("unlink");
}

#[test]
fn sessions_of_one_peer_are_bounded_and_others_find_room() {
    let mut scene = Scene::new("uring");
    let memory = scene.daemon.memory_kib();
    let mut foes = Vec::new();
    let refused = loop {
        match Guest::greet(scene.daemon.connect(), &hello("share")) {
            Ok(foe) => foes.push(foe),
            Err(end) => break end,
        }
        assert!(foes.len() <= SESSIONS_PER_PEER_MAX, "no bound");
    };
    assert!(matches!(refused, End::Goodbye(Some(Reason::Limit), _)), "{refused:?}");
    // The friend's is one of them.
    assert_eq!(foes.len(), SESSIONS_PER_PEER_MAX - 1);
    another_peer_is_served(&scene.daemon);
    scene.friend_is_served(4);
    let each = scene.daemon.memory_kib().saturating_sub(memory) / foes.len() as u64;
    assert!(each < 512, "{each} KiB a session");
    foes.pop();
    until("room again", || Guest::greet(scene.daemon.connect(), &hello("share")).ok());
    drop(foes);
    scene.check();
    drop(scene.friend);
    scene.daemon.stop_well();
}

#[test]
fn half_open_connections_are_bounded() {
    on_both(|scene| {
        let (fds, threads) = (scene.daemon.counters()["fds"], scene.daemon.threads());
        let memory = scene.daemon.memory_kib();
        let mut foes = Vec::new();
        for n in 0..1500 {
            let mut stream = scene.daemon.connect();
            // Some say a little, none all of it.
            let _ = stream.write_all(&[120, 0, 0, 0, b'R', b'F'][..n % 7]);
            foes.push(stream);
        }
        scene.friend_is_served(5);
        assert!(scene.daemon.guest().lookup(1, "friend").is_ok());
        let now = scene.daemon.counters()["fds"];
        // The greeted ones, and what the listener and the control socket have at hand.
        assert!(now <= fds + GREETINGS_MAX as u64 + 32, "{fds} fds became {now}");
        assert!(scene.daemon.threads() <= threads + 2, "a thread for each");
        let grown = scene.daemon.memory_kib().saturating_sub(memory);
        assert!(grown < 8 << 10, "{grown} KiB for silence");
        drop(foes);
    });
}

#[test]
fn tickets_are_not_guessed_and_cost_nothing_to_refuse() {
    on_both(|scene| {
        let memory = scene.daemon.memory_kib();
        let own = scene.friend.welcome.ticket.0;
        for n in 0..400u32 {
            let mut ticket = own;
            // Near to a true one, and far from it.
            match n % 3 {
                0 => ticket[n as usize % 16] ^= 1 << (n / 16 % 8),
                1 => ticket[..4].copy_from_slice(&n.to_le_bytes()),
                _ => ticket = [n as u8; 16],
            }
            if ticket == own || ticket == [0; 16] {
                continue;
            }
            let hello = Hello { ticket: Ticket(ticket), ..hello("share") };
            let refused = Guest::greet(scene.daemon.connect(), &hello).err();
            let refused = refused.expect("a ticket that was never given");
            assert!(
                matches!(refused, End::Goodbye(Some(Reason::UnknownSession), _)),
                "{refused:?}"
            );
        }
        // Another share's name does not open the session that the true one names.
        let stolen = Hello { ticket: Ticket(own), ..hello("ro") };
        let mut foe = Guest::hail(scene.daemon.connect(), &stolen);
        scene.friend.answer_ping();
        assert_eq!(foe.ended_for(), Some(Reason::UnknownSession));
        let grown = scene.daemon.memory_kib().saturating_sub(memory);
        assert!(grown < 4 << 10, "{grown} KiB for guesses");
    });
}

/// Runs the daemon with so few fds, and without the right to take more.
fn daemon_with_fds(engine: &str, most: u32) -> Daemon {
    Daemon::start_as(engine, |daemon, _| {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]);
        command.args(["prlimit", &format!("--nofile={most}:{most}"), daemon]);
        command
    })
}

#[test]
fn who_takes_all_fds_is_refused_and_others_go_on() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: not root");
    }
    const MOST: u32 = 768;
    for engine in ["uring", "threads"] {
        let daemon = daemon_with_fds(engine, MOST);
        let mut friend = daemon.guest();
        let (node, fh) = friend.create("friend").expect("create");
        let before = daemon.gauges_at_rest();
        let mut foes: Vec<Guest> = (0..4).map(|_| daemon.guest()).collect();
        let mut refused = 0;
        for n in 0..1200 {
            let foe = &mut foes[n % 4];
            match foe.create(&format!("held-{n}")) {
                Ok(_) => assert!(n < MOST as usize, "more open files than fds"),
                Err(errno) => {
                    assert_eq!(errno, libc::ENFILE as u32);
                    refused += 1;
                }
            }
        }
        assert!(refused > 400, "only {refused} were refused");
        // Whoever has few finds room, by name and by handle, old guests and new ones.
        friend.write(node, fh, 0, b"data").expect("write");
        for n in 0..20 {
            let (node, fh) = friend.create(&format!("own-{n}")).expect("create");
            friend.release(node, fh).expect("release");
        }
        another_peer_is_served(&daemon);
        // Names that nobody holds open go in and out of what is left.
        for n in 0..800 {
            let found = friend.lookup(1, &format!("held-{}", n % 150)).expect("lookup");
            assert!(found.nodeid > 1);
        }
        assert!(daemon.counters()["fds"] <= u64::from(MOST));
        drop(foes);
        friend.release(node, fh).expect("release");
        drop(friend);
        let mut friend = daemon.guest();
        assert!(friend.create("friend-again").is_ok());
        drop(friend);
        until("all given back", || {
            let now = daemon.gauges();
            let value =
                |all: &[(&str, u64)], name| all.iter().find(|(n, _)| *n == name).map(|n| n.1);
            (value(&now, "fds") <= value(&before, "fds")).then_some(())
        });
        daemon.stop_well();
    }
}

#[test]
fn threads_and_memory_are_bounded_whatever_waits() {
    // In memory, so that it does not wait for the disk's journal: the threads are the same.
    on_each(Scene::in_memory, |scene| {
        let (threads, memory) = (scene.daemon.threads(), scene.daemon.memory_kib());
        let mut foes: Vec<Guest> = (0..16).map(|_| scene.daemon.guest()).collect();
        for (n, foe) in foes.iter_mut().enumerate() {
            let (node, fh) = foe.create(&format!("foe-{n}")).expect("create");
            foe.write(node, fh, 0, &pattern(n as u64, 64 << 10)).expect("write");
            let value = vec![0; 60 << 10];
            let set = abi::SetxattrIn { size: value.len() as u32, flags: 0 };
            let set = [set.as_bytes(), &name("user.large"), &value].concat();
            let ask = abi::FallocateIn { fh, length: 1 << 20, ..Default::default() };
            // All slots, with what runs on threads and with what is large.
            for at in 0.. {
                match at % 16 {
                    _ if !foe.has_free() => break,
                    0 => foe.start(Opcode::Read, node, &read_args(fh, 0, MIB)),
                    1..4 => foe.start(Opcode::Setxattr, node, &set),
                    _ => foe.start(Opcode::Fallocate, node, ask.as_bytes()),
                };
            }
            foe.flush();
        }
        let at_most = threads + POOL_THREADS_MAX + 4;
        let seen = scene.daemon.threads();
        assert!(seen <= at_most, "{threads} threads became {seen}");
        scene.friend_is_served(6);
        another_peer_is_served(&scene.daemon);
        let grown = scene.daemon.memory_kib().saturating_sub(memory);
        assert!(grown < 256 << 10, "{grown} KiB for what waits");
        drop(foes);
    });
}

#[test]
fn nodes_cost_little_and_are_given_back() {
    on_both(|scene| {
        const FILES: usize = 4000;
        for n in 0..FILES {
            std::fs::write(scene.daemon.share().join(format!("n-{n}")), b"").expect("file");
        }
        let memory = scene.daemon.memory_kib();
        let mut foe = scene.daemon.guest();
        for round in 0..3 {
            for n in 0..FILES {
                foe.lookup(1, &format!("n-{n}")).expect("there");
                if round == 2 {
                    assert_eq!(foe.lookup(1, &format!("m-{n}")), Err(libc::ENOENT as u32));
                }
            }
        }
        let grown = scene.daemon.memory_kib().saturating_sub(memory);
        assert!(grown < 2 * FILES as u64, "{grown} KiB for {FILES} files, known thrice");
        // More than it has, and what it never had.
        foe.forget(&[(u64::MAX, u64::MAX), (0, 1), (1, u64::MAX)]);
        drop(foe);
    });
}

/// Whoever comes and is refused has a line of the log, of the parent or of the worker; a flood of
/// them has some, is counted, and hides nothing of the others.
#[test]
fn a_flood_does_not_fill_the_log() {
    for engine in ["uring", "threads"] {
        let log = tempfile::NamedTempFile::new().expect("a file");
        let daemon = Daemon::start_as(engine, |program, share| {
            let closed = share.with_file_name("closed");
            let mut command = Command::new(program);
            command.args(["--log=info", "--log-format=json"]);
            command.arg(format!("--listen=unix:{},allow-uid=4711", closed.display()));
            command.stderr(log.reopen().expect("dup"));
            command
        });
        let lines_of = |target: &str| {
            let text = std::fs::read_to_string(log.path()).expect("the log");
            let lines = text.lines().filter_map(|line| serde_json::from_str(line).ok());
            lines.filter(|line: &serde_json::Value| line["target"] == target).collect::<Vec<_>>()
        };
        let (flood, begun) = (1500, Instant::now());
        for _ in 0..flood {
            // Ended by the parent, and by the worker.
            let mut ended = connect(&daemon.path("closed"));
            let _ = ended.read(&mut [0]);
            let mut stream = connect(&daemon.path("s"));
            let _ = stream.write_all(&[0x55; 64]).and_then(|()| stream.read(&mut [0]));
        }
        let most = 400 + 20 * (begun.elapsed().as_secs() as usize + 1);
        for target in ["ringfs_server::accept", "ringfs_server::handshake"] {
            let lines = lines_of(target).len();
            assert!(lines >= 100 && lines <= most, "{target}: {lines} of {most}");
        }
        // What others do is told, and with it what was left out.
        until("the lines that say so", || {
            goodbye(daemon.guest());
            connect(&daemon.path("closed"));
            let told = lines_of("ringfs_server::log::not_told");
            let left_out = |file: &str| {
                let of = told.iter().filter(|line| line["from"].as_str().unwrap().contains(file));
                of.map(|line| line["not_told"].as_u64().expect("a number") as usize).sum::<usize>()
            };
            let all = [left_out("accept.rs"), left_out("handshake.rs")];
            all.iter().all(|&lines| lines + most >= flood).then_some(())
        });
        daemon.stop_well();
    }
}
