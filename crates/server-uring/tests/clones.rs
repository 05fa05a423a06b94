//! Many copies of one guest's memory that come at once, as clones of a snapshot do: at most one of
//! them has the session, each other one is refused and rebuilds a session of its own, and none
//! finds anything of another's.

mod common;

use common::*;
use ringfs_wire::abi::{self, ForgetOne, Opcode};
use ringfs_wire::batch::Kind;
use ringfs_wire::hello::{Hello, Reason, Ticket, feature, welcome_flag};
use ringfs_wire::limits::RESTORE_BODY_BYTES_MAX;
use ringfs_wire::restore::{End as Totals, Restore, push_restore};
use ringfs_wire::slot::{ClientSlots, SlotUse};
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

const CLONES: u64 = 24;
const FILES: u64 = 8;
const FILE_BYTES: usize = 5000;
/// From a clone's first HELLO to the answer to its first request.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// Before a clone comes again that was told to, times its number: they do not come in step.
const AGAIN_US: u64 = 500;
const NONE: SlotUse = SlotUse { slot: 0, seq: 0 };

/// What a guest has in its memory.
#[derive(Clone)]
struct Memory {
    hello: Hello,
    slots: ClientSlots<()>,
    recipes: BTreeMap<u64, Vec<u8>>,
    /// Node and handle of each file.
    files: Vec<(u64, u64)>,
}

fn open_for_clones(daemon: &Daemon) -> (Guest, Memory) {
    let features = feature::PAYLOAD_CRC | feature::RESTORE;
    let mut hello = Hello { features, ..hello("share") };
    let mut guest = Guest::greet(daemon.connect(), &hello).expect("welcome");
    guest.recipes = Some(BTreeMap::new());
    let asked = abi::InitIn {
        major: 7,
        minor: 45,
        max_readahead: 128 << 10,
        flags: abi::init::INIT_EXT as u32,
        ..Default::default()
    };
    let answer = guest.call(Opcode::Init, 0, asked.as_bytes()).expect("INIT");
    hello.init = Some(abi::InitOut::read_from_bytes(&answer).expect("an INIT answer"));
    hello.ticket = guest.welcome.ticket;
    let files = (0..FILES).map(|n| {
        let (node, fh) = guest.create(&format!("file-{n}")).expect("create");
        let data = pattern(n, FILE_BYTES);
        assert_eq!(guest.write(node, fh, 0, &data), Ok(FILE_BYTES as u32));
        (node, fh)
    });
    let files = files.collect();
    let recipes = guest.recipes.clone().unwrap_or_default();
    assert_eq!(recipes.len() as u64, FILES, "nodes that nothing finds again");
    let memory = Memory { hello, slots: guest.slots.clone(), recipes, files };
    (guest, memory)
}

impl Memory {
    /// What the daemon has to be told, before any request.
    fn tell(&self, guest: &mut Guest) {
        let flags = libc::O_RDWR as u32;
        let nodes = self.recipes.iter().map(|(&id, recipe)| Restore::Node { id, count: 1, recipe });
        let handles = self.files.iter().map(|&(node, fh)| Restore::Handle {
            fh,
            node,
            flags,
            directory: false,
        });
        let end = Restore::End(Totals {
            nodes: FILES,
            handles: FILES,
            node_id_max: self.files.iter().map(|file| file.0).max().unwrap_or(0),
            fh_max: self.files.iter().map(|file| file.1).max().unwrap_or(0),
        });
        let mut body = Vec::with_capacity(RESTORE_BODY_BYTES_MAX);
        for entry in nodes.chain(handles).chain([end]) {
            assert!(push_restore(&mut body, &entry), "one record is enough");
        }
        assert!(guest.add(Kind::Restore as u8, NONE, 0, &body));
        assert!(guest.flush());
    }

    /// Comes to a daemon that does not have the session any more.
    fn come_rebuilt(&self, daemon: &Daemon, epoch_seen: u64, ticket: Ticket) -> Guest {
        let hello = Hello { epoch_seen, ticket, ..self.hello.clone() };
        let mut guest = Guest::greet(daemon.connect(), &hello).expect("welcome");
        assert_eq!(guest.welcome.flags, welcome_flag::REBUILD);
        (guest.slots, guest.recipes) = (self.slots.clone(), Some(self.recipes.clone()));
        self.tell(&mut guest);
        guest
    }

    /// Comes as a guest does that has lost its connection; whether it has the session itself.
    fn come(&self, daemon: &Daemon, n: u64) -> (Guest, bool) {
        let mut hello = self.hello.clone();
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < LIMIT, "neither resumed nor rebuilt");
            match Guest::greet(daemon.connect(), &hello) {
                Ok(mut guest) => {
                    let is_own = guest.welcome.flags == welcome_flag::RESUMED;
                    assert_ne!(guest.welcome.ticket, self.hello.ticket);
                    guest.slots = self.slots.clone();
                    guest.recipes = Some(self.recipes.clone());
                    if !is_own {
                        assert_eq!(guest.welcome.flags, welcome_flag::REBUILD);
                        self.tell(&mut guest);
                    }
                    return (guest, is_own);
                }
                // It is another one's.
                Err(End::Goodbye(Some(Reason::UnknownSession), _)) => hello.ticket = Ticket::NONE,
                // Another one came while this one waited.
                Err(End::Goodbye(Some(reason), _)) if reason.is_passing() => {
                    std::thread::sleep(Duration::from_micros(AGAIN_US * (1 + n)));
                }
                Err(end) => panic!("{end:?}"),
            }
        }
    }

    /// A life of its own: the files of before, and one that no other clone has.
    fn live(&self, guest: &mut Guest, n: u64) {
        for (of, &(node, fh)) in self.files.iter().enumerate() {
            let data = guest.read(node, fh, 0, FILE_BYTES as u32);
            assert_eq!(data, Ok(pattern(of as u64, FILE_BYTES)), "clone {n}, file {of}");
        }
        let (node, fh) = guest.create(&format!("clone-{n}")).expect("create");
        assert!(self.files.iter().all(|file| file.0 != node && file.1 != fh), "given twice");
        let data = pattern(1000 + n, FILE_BYTES);
        assert_eq!(guest.write(node, fh, 0, &data), Ok(FILE_BYTES as u32));
        assert_eq!(guest.read(node, fh, 0, FILE_BYTES as u32), Ok(data));
        let entry = guest.lookup(1, &format!("clone-{n}")).expect("there");
        assert_eq!((entry.nodeid, entry.attr.size), (node, FILE_BYTES as u64));
        guest.release(node, fh).expect("release");
    }
}

fn mkdir(name: &str) -> Vec<u8> {
    [&[0xED, 1, 0, 0, 0, 0, 0, 0][..], name.as_bytes(), &[0]].concat()
}

/// Asks what another session of that guest may have been asked.
fn ask_again(guest: &mut Guest, opcode: Opcode, node: u64, args: &[u8]) -> Result<Vec<u8>, u32> {
    let at = guest.claim();
    guest.add(Kind::Unsure as u8, at, 0, &[]);
    guest.again(at, opcode, node, args);
    guest.flush();
    let (answered, result) = guest.reply().expect("an answer");
    assert_eq!(answered, at);
    result
}

/// All clones at once; how many have the original's session, and the longest time to an answer.
fn clones_come(daemon: &Daemon, memory: &Memory) -> (usize, Duration) {
    let (begin, lived) = (Barrier::new(CLONES as usize), AtomicU64::new(0));
    let clone = |n: u64| {
        begin.wait();
        let begun = Instant::now();
        let (mut guest, is_own) = memory.come(daemon, n);
        let (node, fh) = memory.files[0];
        assert!(guest.read(node, fh, 0, 1).is_ok(), "clone {n}");
        let took = begun.elapsed();
        assert!(took < ANSWER_LIMIT, "clone {n} was answered after {took:?}");
        memory.live(&mut guest, n);
        // Nobody leaves before all have lived; who is there answers when it is asked.
        lived.fetch_add(1, Ordering::Relaxed);
        while lived.load(Ordering::Relaxed) < CLONES {
            assert!(guest.read(node, fh, 0, 1).is_ok(), "clone {n}");
            assert!(begun.elapsed() < LIMIT, "clone {n} is left alone");
        }
        goodbye(guest);
        (is_own, took)
    };
    std::thread::scope(|scope| {
        let clones: Vec<_> = (0..CLONES).map(|n| scope.spawn(move || clone(n))).collect();
        clones.into_iter().fold((0, Duration::ZERO), |(own, slowest), clone| {
            let (is_own, took) = clone.join().expect("a clone");
            (own + usize::from(is_own), slowest.max(took))
        })
    })
}

/// Ends the original's life also where a clone has failed: nobody waits for it for ever.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A guest whose session this daemon cannot have known, and one whose session it must have known:
/// that is a clone.
#[test]
fn what_a_lost_daemon_may_have_done_is_not_done_again_but_for_a_clone() {
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start_with_grace(engine, 600);
        let (original, memory) = open_for_clones(&daemon);
        let (epoch, ticket) = (original.welcome.epoch, Ticket([7; 16]));
        goodbye(original);
        let path = |name: &str| daemon.share().join(name);
        let file = memory.files[0];
        let second = Hello {
            lanes: 2,
            conns: 2,
            conn: 1,
            epoch_seen: epoch ^ 1,
            ticket,
            ..memory.hello.clone()
        };
        let sent_back = Guest::greet(daemon.connect(), &second).expect("welcome").welcome;
        assert_eq!((sent_back.flags, sent_back.epoch), (welcome_flag::REBUILD, epoch ^ 1));
        let mut heir = memory.come_rebuilt(&daemon, epoch ^ 1, ticket);
        assert_eq!(ask_again(&mut heir, Opcode::Mkdir, 1, &mkdir("made")), Err(libc::EIO as u32));
        assert!(!path("made").exists());
        // What may run twice does, and what was sent to this daemon first.
        assert!(ask_again(&mut heir, Opcode::Lookup, 1, &name("file-1")).is_ok());
        assert!(
            ask_again(&mut heir, Opcode::Write, file.0, &write_args(file.1, 0, b"again")).is_ok()
        );
        assert!(heir.call(Opcode::Mkdir, 1, &mkdir("new")).is_ok() && path("new").exists());
        assert_eq!(daemon.counters()["ambiguous"], 1);
        goodbye(heir);
        for (n, ticket) in [ticket, Ticket::NONE].into_iter().enumerate() {
            let mut clone = memory.come_rebuilt(&daemon, epoch, ticket);
            let name = format!("clone-{n}");
            assert!(ask_again(&mut clone, Opcode::Mkdir, 1, &mkdir(&name)).is_ok());
            assert!(path(&name).exists());
            goodbye(clone);
        }
        assert_eq!(daemon.counters()["ambiguous"], 1);
        daemon.stop_well();
    }
}

/// The session is over with its connection, but the guest that comes again is no clone.
#[test]
fn what_ran_for_a_session_without_a_grace_time_is_not_done_again() {
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start_with_grace(engine, 0);
        let (mut original, memory) = open_for_clones(&daemon);
        let epoch = original.welcome.epoch;
        original.start(Opcode::Mkdir, 1, &mkdir("made"));
        original.flush();
        let made = daemon.share().join("made");
        until("the directory", || made.exists().then_some(()));
        drop(original);
        until("the session's end", || (daemon.counters()["sessions"] == 0).then_some(()));
        std::fs::remove_dir(&made).expect("remove");
        let mut heir = memory.come_rebuilt(&daemon, epoch, memory.hello.ticket);
        let again = ask_again(&mut heir, Opcode::Mkdir, 1, &mkdir("made"));
        assert_eq!((again, made.exists()), (Err(libc::EIO as u32), false));
        assert_eq!(daemon.counters()["ambiguous"], 1);
        goodbye(heir);
        daemon.stop_well();
    }
}

/// What it gave back is told again, as not given back: its FORGET has to run for each daemon.
#[test]
fn a_forget_from_before_a_rebuild_runs_for_the_daemon_after_the_next_one_too() {
    for engine in ["uring", "threads"] {
        let state = tempfile::tempdir().expect("a temporary directory");
        let daemon = Daemon::start_as(engine, |program, _| {
            let mut command = Command::new(program);
            command.arg("--grace=600").arg("--state-dir").arg(state.path().join("state"));
            command
        });
        let (original, memory) = open_for_clones(&daemon);
        let epoch = original.welcome.epoch;
        goodbye(original);
        let mut heir = memory.come_rebuilt(&daemon, epoch ^ 1, Ticket([7; 16]));
        let one = ForgetOne { nodeid: memory.files[0].0, nlookup: 1 };
        let give_back = |heir: &mut Guest| {
            let at = heir.claim();
            heir.release(memory.files[0].0, memory.files[0].1).expect("release");
            // Nodes are found one by one after a rebuild; one in between is not counted.
            let all = 1 + FILES;
            until("its nodes", || (daemon.counters()["nodes_with_fd"] == all).then_some(()));
            heir.add(Kind::Unsure as u8, at, 0, &[]);
            heir.add(Kind::Forget as u8, at, 0, one.as_bytes());
            heir.flush();
            assert_eq!(heir.reply().expect("an answer"), (at, Ok(Vec::new())));
            until("its end", || (daemon.counters()["nodes"] == all - 1).then_some(()));
        };
        give_back(&mut heir);
        let (epoch, ticket) = (heir.welcome.epoch, heir.welcome.ticket);
        daemon.kill_worker();
        assert_eq!(heir.ending(), End::Closed);
        let mut heir = memory.come_rebuilt(&daemon, epoch, ticket);
        give_back(&mut heir);
        goodbye(heir);
        daemon.stop_well();
    }
}

fn twenty_four_clones(original_lives: bool) {
    for engine in ["uring", "threads"] {
        undisturbed(|| clones_of_one(engine, original_lives));
    }
}

fn clones_of_one(engine: &str, original_lives: bool) {
    let daemon = Daemon::start_with_grace(engine, 600);
    let before = daemon.gauges_at_rest();
    let (original, memory) = open_for_clones(&daemon);
    let over = AtomicBool::new(false);
    let resumed = std::thread::scope(|scope| {
        let original = original_lives.then_some(original);
        // One that lives goes on asking, and by that answers for itself.
        let life = original.map(|mut original| {
            let (over, files) = (&over, &memory.files);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let (node, fh) = files[1];
                    let data = original.read(node, fh, 0, FILE_BYTES as u32);
                    assert_eq!(data, Ok(pattern(1, FILE_BYTES)), "the original");
                }
                original
            })
        });
        let over = Over(&over);
        let (resumed, slowest) = clones_come(&daemon, &memory);
        println!("{engine}: {CLONES} clones, {resumed} resumed, the slowest answer {slowest:?}");
        drop(over);
        if let Some(life) = life {
            goodbye(life.join().expect("the original"));
        }
        resumed
    });
    assert!(resumed <= usize::from(!original_lives), "{resumed} have one session");
    let counters = daemon.counters();
    assert_eq!(counters["rebuilds"], CLONES - resumed as u64);
    assert_eq!(counters["protocol_errors"], 0);
    for n in 0..CLONES {
        let made = std::fs::read(daemon.share().join(format!("clone-{n}"))).expect("made");
        assert!(made == pattern(1000 + n, FILE_BYTES), "clone {n}");
    }
    daemon.settles_at(&before);
    daemon.stop_well();
}

#[test]
fn twenty_four_clones_of_a_dead_guest_come_at_once() {
    twenty_four_clones(false);
}

#[test]
fn twenty_four_clones_of_a_living_guest_come_at_once() {
    twenty_four_clones(true);
}
