//! How fast a guest is served beside a hostile one: `cargo xtask hostile --rate`.
//!
//! A daemon with one shard serves a friend, who goes through a mix of small operations with eight
//! in flight, and one other guest in a process of its own, so a peer of its own. In each round the
//! other one is once well-behaved, with the friend's mix on as many connections and slots as a foe
//! has, and once one of the foes below, in turn first and second; what counts is the friend's rate
//! with the foe by its rate with the well-behaved one.
//! Not a test of CI: it says how fast, and a machine that does something else falsifies it.

#[path = "../tests/common/mod.rs"]
mod common;

use common::*;
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::batch::Kind;
use ringfs_wire::hello::Hello;
use ringfs_wire::slot::SlotUse;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

const ROUNDS: usize = 5;
const WINDOW: Duration = Duration::from_millis(300);
/// Until a foe is at full speed.
const WARM_UP: Duration = Duration::from_millis(150);
/// What must be left of the rate, in per cent.
const LEFT_MIN: f64 = 80.0;
const DEPTH: usize = 8;
const MIB: u32 = 1 << 20;
const NO_SLOT: SlotUse = SlotUse { slot: 0, seq: 0 };

/// Name, and what it does without end at the socket.
type Foe = (&'static str, fn(&Path));

const FOES: &[Foe] = &[
    ("a flood of PINGs", pings),
    ("lookups, all slots of 8 connections", |at| slots(at, lookup, 128)),
    ("1 MiB reads, all slots of 8 connections", |at| slots(at, read, 128)),
    ("1 MiB writes on 8 connections", |at| slots(at, write, 1)),
    ("short READDIRPLUS, all slots of 8 connections", |at| slots(at, list_short, 128)),
    ("long READDIRPLUS, all slots of 8 connections", |at| slots(at, list, 128)),
    ("fallocate on threads, all slots of 8 connections", |at| slots(at, allocate, 128)),
    ("1 MiB reads that it never takes", never_reads),
    ("sessions that come and go", storm),
    ("connections that say nothing or garbage", garbage),
];

fn main() {
    let mut args = std::env::args().skip(1);
    let only = args.next().unwrap_or_default();
    if let Some(socket) = args.next() {
        let socket = Path::new(&socket);
        return match FOES.iter().find(|foe| foe.0 == only) {
            Some(foe) => foe.1(socket),
            None => slots(socket, mixed, 128),
        };
    }
    let mut failed = false;
    println!("the friend's operations a second, medians of {ROUNDS} paired rounds");
    println!("{:<50}{:>12}{:>12}{:>9}", "beside", "well-behaved", "foe", "left");
    for &(name, _) in FOES.iter().filter(|foe| foe.0.contains(&only)) {
        let (mut well, mut foe, mut left) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let (a, b) = match round % 2 {
                0 => (rate("well-behaved"), rate(name)),
                _ => {
                    let foe = rate(name);
                    (rate("well-behaved"), foe)
                }
            };
            well.push(a);
            foe.push(b);
            left.push(100.0 * b / a);
        }
        let left = median(left);
        failed |= left < LEFT_MIN;
        let verdict = if left < LEFT_MIN { "  TOO LITTLE" } else { "" };
        println!("{name:<50}{:>12.0}{:>12.0}{left:>7.0} %{verdict}", median(well), median(foe));
    }
    std::process::exit(i32::from(failed));
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The friend's rate beside one other guest.
fn rate(other: &str) -> f64 {
    let daemon = Daemon::start_for_rate();
    for n in 0..1000 {
        std::fs::write(daemon.share().join(format!("file-{n}")), b"x").expect("file");
    }
    let mut friend = Mix::new(&daemon.path("s"), "friend");
    let other = Process::start(other, &daemon.path("s"));
    friend.run(WARM_UP);
    let begun = Instant::now();
    let done = friend.run(WINDOW);
    let rate = done as f64 / begun.elapsed().as_secs_f64();
    drop(other);
    rate
}

struct Process(Child);

impl Process {
    fn start(kind: &str, socket: &Path) -> Process {
        let mut command = Command::new(std::env::current_exe().expect("own path"));
        Process(command.arg(kind).arg(socket).stderr(Stdio::null()).spawn().expect("a process"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guest with a mix of small operations.
struct Mix {
    guest: Guest,
    node: u64,
    fh: u64,
    next: u64,
}

impl Mix {
    fn new(socket: &Path, file: &str) -> Mix {
        let mut guest = Guest::greet(connect(socket), &hello("share")).expect("welcome");
        let (node, fh) = guest.create(file).expect("create");
        assert_eq!(guest.write(node, fh, 0, &pattern(1, 1 << 16)), Ok(1 << 16));
        Mix { guest, node, fh, next: 0 }
    }

    fn start(&mut self) {
        let Mix { guest, node, fh, next } = self;
        *next += 1;
        ask_mixed(guest, *node, *fh, *next);
    }

    /// How many were answered within that time.
    fn run(&mut self, time: Duration) -> u64 {
        let (begun, mut done) = (Instant::now(), 0);
        let mut in_flight = 0;
        loop {
            let over = begun.elapsed() >= time;
            if over && in_flight == 0 {
                return done;
            }
            while !over && in_flight < DEPTH {
                self.start();
                in_flight += 1;
            }
            self.guest.flush();
            self.guest.reply().expect("the daemon serves").1.ok();
            (in_flight, done) = (in_flight - 1, done + 1);
        }
    }
}

fn pings(socket: &Path) {
    let mut foe = Guest::greet(connect(socket), &hello("share")).expect("welcome");
    loop {
        for _ in 0..2000 {
            foe.add(Kind::Ping as u8, NO_SLOT, 0, &[]);
        }
        foe.flush();
        (0..2000).for_each(|_| drop(foe.receive()));
    }
}

/// A file of its own, for all its connections.
struct Own {
    node: u64,
    fh: u64,
    dir: u64,
}

type Ask = fn(&mut Guest, &Own);

fn lookup(foe: &mut Guest, _: &Own) {
    foe.start(Opcode::Lookup, 1, &name("none"));
}

fn read(foe: &mut Guest, own: &Own) {
    foe.start(Opcode::Read, own.node, &read_args(own.fh, 0, MIB));
}

fn write(foe: &mut Guest, own: &Own) {
    foe.start(Opcode::Write, own.node, &write_args(own.fh, 0, &[0; MIB as usize]));
}

fn list_short(foe: &mut Guest, own: &Own) {
    foe.start(Opcode::Readdirplus, 1, &read_args(own.dir, 0, 8 << 10));
}

fn list(foe: &mut Guest, own: &Own) {
    foe.start(Opcode::Readdirplus, 1, &read_args(own.dir, 0, 64 << 10));
}

/// What the friend asks, too.
fn mixed(foe: &mut Guest, own: &Own) {
    ask_mixed(foe, own.node, own.fh, u64::from(foe.slots.in_use() as u32));
}

fn ask_mixed(guest: &mut Guest, node: u64, fh: u64, n: u64) {
    match n % 4 {
        0 => guest.start(Opcode::Getattr, node, &[0; 16]),
        1 => guest.start(Opcode::Lookup, 1, &name("none")),
        2 => guest.start(Opcode::Read, node, &read_args(fh, n % 15 * 4096, 4096)),
        _ => guest.start(Opcode::Write, node, &write_args(fh, 0, &[7; 4096])),
    };
}

fn allocate(foe: &mut Guest, own: &Own) {
    let ask = abi::FallocateIn { fh: own.fh, length: u64::from(MIB), ..Default::default() };
    foe.start(Opcode::Fallocate, own.node, ask.as_bytes());
}

/// The eight connections of one session.
fn session(socket: &Path) -> (Vec<Guest>, Own) {
    let of = |conn| Hello { lanes: 8, conns: 8, conn, ..hello("share") };
    let mut first = Guest::greet(connect(socket), &of(0)).expect("welcome");
    let ticket = first.welcome.ticket;
    let (node, fh) = first.create("foe").expect("create");
    first.write(node, fh, 0, &pattern(2, MIB as usize)).expect("write");
    let opened = first.call(Opcode::Opendir, 1, &[0; 8]).expect("opendir");
    let dir = u64::from_le_bytes(opened[..8].try_into().expect("8 bytes"));
    let mut conns = vec![first];
    for conn in 1..8 {
        let hello = Hello { ticket, ..of(conn) };
        conns.push(Guest::greet(connect(socket), &hello).expect("welcome"));
    }
    (conns, Own { node, fh, dir })
}

/// Keeps so many slots of all connections busy: of large requests one, since a batch that does not
/// fit the socket would wait for replies that are not taken meanwhile.
fn slots(socket: &Path, ask: Ask, most: usize) {
    let (mut conns, own) = session(socket);
    loop {
        for foe in &mut conns {
            let mut asked = 0;
            while asked < most && foe.has_free() {
                ask(foe, &own);
                asked += 1;
            }
            foe.flush();
        }
        for foe in &mut conns {
            (0..most.min(32)).for_each(|_| drop(foe.reply().expect("the daemon serves")));
        }
    }
}

fn never_reads(socket: &Path) {
    let (mut conns, own) = session(socket);
    loop {
        for foe in &mut conns {
            foe.stream.set_write_timeout(Some(Duration::from_millis(1))).expect("timeout");
            while foe.has_free() {
                read(foe, &own);
            }
            foe.flush();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn storm(socket: &Path) {
    loop {
        let mut foe = Guest::greet(connect(socket), &hello("share")).expect("welcome");
        foe.lookup(1, "file-1").expect("there");
    }
}

fn garbage(socket: &Path) {
    let mut silent = std::collections::VecDeque::new();
    loop {
        let mut stream = connect(socket);
        let _ = stream.write_all(&[0x55; 64]);
        silent.push_back(connect(socket));
        if silent.len() > 500 {
            silent.pop_front();
        }
    }
}
