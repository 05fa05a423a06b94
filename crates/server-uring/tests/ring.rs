//! Both rings, by the same tests: file operations against a model, sockets with partial data,
//! wake-ups, more operations than a queue holds, and a ring that is dropped with some in flight.

use proptest::prelude::*;
use ringfs_server::buffers::{Buf, BufferPool};
use ringfs_server::fds::Fds;
use ringfs_server::handles::{OpenFile, Waits};
use ringfs_server::import;
use ringfs_server::nodes::{Bound, Nodes};
use ringfs_server::op::{Io, Op, RequestTag, Tag};
use ringfs_server::passthrough::Backend;
use ringfs_server::ring::{IoResult, Ring, UringRing};
use ringfs_server::ring_threads::ThreadRing;
use ringfs_wire::batch::RecordHeader;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(20);

fn on_both(check: impl Fn(&mut dyn Ring)) {
    check(&mut UringRing::new().expect("io_uring"));
    check(&mut ThreadRing::new().expect("threads"));
}

/// Waits until `n` operations are done.
fn finish(ring: &mut dyn Ring, n: usize) -> Vec<(Op, IoResult)> {
    let start = Instant::now();
    let mut done = Vec::new();
    while done.len() < n {
        ring.enter(Some(Duration::from_millis(100))).expect("enter");
        ring.reap(&mut done);
        assert!(start.elapsed() < LIMIT, "{} of {n} done", done.len());
    }
    assert_eq!(done.len(), n, "more done than was asked for");
    done
}

/// One that the ring has no room for is offered again when some have ended.
fn submit(ring: &mut dyn Ring, op: Op, done: &mut Vec<(Op, IoResult)>) {
    let mut op = op;
    let start = Instant::now();
    while let Err(refused) = ring.submit(op) {
        assert!(start.elapsed() < LIMIT, "never taken");
        ring.enter(Some(Duration::from_millis(1))).expect("enter");
        ring.reap(done);
        op = refused;
    }
}

fn one(ring: &mut dyn Ring, io: Io) -> (Io, IoResult) {
    assert!(ring.submit(Op { io, tag: Tag::Shard }).is_ok());
    let (op, result) = finish(ring, 1).pop().expect("one");
    assert_eq!(ring.in_flight(), 0);
    (op.io, result)
}

fn file_in(dir: &Path) -> Arc<OpenFile> {
    let backend = Arc::new(Backend::new(dir, false).expect("a backend"));
    let opened = std::fs::File::open(dir).expect("the directory");
    let root = import::Root::new(opened.as_fd(), false).expect("a root");
    let bound = Bound { most: 10, quota: Default::default() };
    let node = Nodes::new(backend, root, &Fds::new(1024), bound, false).find(1).expect("the root");
    let mut options = std::fs::File::options();
    let file = options.read(true).write(true).create(true).truncate(false);
    let file = file.open(dir.join("file")).expect("a file");
    Arc::new(OpenFile::new(node, file.into(), libc::O_RDWR as u32, Waits::Nowait))
}

/// A directory on the disk, and one on tmpfs.
fn places() -> Vec<tempfile::TempDir> {
    let disk = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let made = [disk, Path::new("/dev/shm")].map(tempfile::tempdir_in);
    made.map(|dir| dir.expect("a temporary directory")).into()
}

#[derive(Clone, Debug)]
enum Step {
    Read {
        at: u64,
        len: usize,
    },
    Write {
        at: u64,
        len: usize,
        seed: u8,
    },
    Sync {
        data_only: bool,
    },
    /// All that is in flight ends before what follows.
    Barrier,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = 0..300_000u64;
    let len = prop_oneof![0..100usize, 4000..70_000usize, 900_000..1_050_000usize];
    let step = prop_oneof![
        3 => (at.clone(), len.clone()).prop_map(|(at, len)| Step::Read { at, len }),
        3 => (at, len, any::<u8>()).prop_map(|(at, len, seed)| Step::Write { at, len, seed }),
        1 => any::<bool>().prop_map(|data_only| Step::Sync { data_only }),
        2 => Just(Step::Barrier),
    ];
    prop::collection::vec(step, 1..40)
}

fn buffer(buffers: &mut BufferPool, len: usize) -> Buf {
    buffers.for_bytes(len).expect("a buffer")
}

/// Operations between two barriers run in any order, so writes among them must not touch what
/// others touch: such an operation gets a barrier before it.
fn run_steps(ring: &mut dyn Ring, dir: &Path, steps: &[Step]) {
    let file = file_in(dir);
    let mut model: Vec<u8> = std::fs::read(dir.join("file")).expect("the file");
    let mut buffers = BufferPool::default();
    let mut flying: Vec<(u64, u64, bool)> = Vec::new();
    let mut expected: HashMap<usize, Vec<u8>> = HashMap::new();
    let settle = |ring: &mut dyn Ring,
                  buffers: &mut BufferPool,
                  flying: &mut Vec<(u64, u64, bool)>,
                  expected: &mut HashMap<usize, Vec<u8>>| {
        for (op, result) in finish(ring, flying.len()) {
            let Tag::Stream(key) = op.tag else { panic!("another's tag {:?}", op.tag) };
            match op.io {
                Io::Read { buf, range, .. } => {
                    let bytes = &buf[range.start..range.start + result.expect("read")];
                    assert!(bytes == expected.remove(&key).expect("read once"), "wrong bytes");
                    buffers.give(buf);
                }
                Io::Write { buf, range, .. } => {
                    assert_eq!(result, Ok(range.len()));
                    buffers.give_shared(buf);
                }
                _ => assert_eq!(result, Ok(0)),
            }
        }
        flying.clear();
        assert_eq!((ring.in_flight(), expected.len(), buffers.in_use()), (0, 0, 0));
    };
    for (key, step) in steps.iter().enumerate() {
        let (at, len, writes) = match *step {
            Step::Read { at, len } => (at, len, false),
            Step::Write { at, len, .. } => (at, len, true),
            Step::Sync { .. } => (0, 0, false),
            Step::Barrier => {
                settle(ring, &mut buffers, &mut flying, &mut expected);
                continue;
            }
        };
        let end = at + len as u64;
        // A write that makes the file longer also changes what reads behind the end see.
        let meets = |&(a, b, w): &(u64, u64, bool)| (w || writes) && at < b && a < end;
        let grows = writes && end > model.len() as u64;
        if flying.iter().any(meets) || grows {
            settle(ring, &mut buffers, &mut flying, &mut expected);
        }
        let io = match *step {
            Step::Read { .. } => {
                let from = (at as usize).min(model.len());
                let to = (end as usize).min(model.len());
                expected.insert(key, model[from..to].to_vec());
                let buf = buffer(&mut buffers, len);
                Io::Read { file: file.clone(), buf, range: 7..7 + len, offset: at }
            }
            Step::Write { seed, .. } => {
                let mut buf = buffer(&mut buffers, len);
                let range = 4096 - 40..4096 - 40 + len;
                buf[range.clone()].iter_mut().enumerate().for_each(|(i, b)| {
                    *b = (i as u8).wrapping_mul(31).wrapping_add(seed);
                });
                if len > 0 && model.len() < end as usize {
                    model.resize(end as usize, 0);
                }
                if len > 0 {
                    model[at as usize..end as usize].copy_from_slice(&buf[range.clone()]);
                }
                Io::Write { file: file.clone(), buf: Arc::new(buf), range, offset: at }
            }
            Step::Sync { data_only } => Io::Fsync { file: file.clone(), data_only },
            Step::Barrier => continue,
        };
        assert!(ring.submit(Op { io, tag: Tag::Stream(key) }).is_ok());
        flying.push((at, end, writes));
        if grows {
            settle(ring, &mut buffers, &mut flying, &mut expected);
        }
    }
    settle(ring, &mut buffers, &mut flying, &mut expected);
    assert!(std::fs::read(dir.join("file")).expect("the file") == model, "the file differs");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24, failure_persistence: None, ..Default::default()
    })]
    #[test]
    fn files_are_as_pread_and_pwrite_make_them(steps in steps()) {
        for place in places() {
            run_steps(&mut UringRing::new().expect("io_uring"), place.path(), &steps);
        }
        for place in places() {
            run_steps(&mut ThreadRing::new().expect("threads"), place.path(), &steps);
        }
    }
}

fn pair() -> (Arc<OwnedFd>, UnixStream) {
    // Several tests make hundreds at once.
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    setrlimit(Resource::Nofile, raised).expect("the hard limit is allowed");
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    theirs.set_read_timeout(Some(LIMIT)).expect("timeout");
    theirs.set_write_timeout(Some(LIMIT)).expect("timeout");
    (Arc::new(OwnedFd::from(ours)), theirs)
}

#[test]
fn sockets_carry_parts_and_tell_the_end() {
    on_both(|ring| {
        let (socket, mut peer) = pair();
        let mut buffers = BufferPool::default();
        // A receive gives what is there, where it was told to, and nothing else is touched.
        let mut buf = buffers.small();
        buf.fill(0xEE);
        let (range, waiting) = (100..200, socket.clone());
        let recv = Io::Recv { socket: waiting, buf, range };
        assert!(ring.submit(Op { io: recv, tag: Tag::Stream(1) }).is_ok());
        ring.enter(Some(Duration::ZERO)).expect("enter");
        let mut none = Vec::new();
        ring.reap(&mut none);
        assert!(none.is_empty() && ring.in_flight() == 1);
        peer.write_all(b"hello").expect("write");
        let (op, result) = finish(ring, 1).pop().expect("one");
        assert_eq!((result, op.tag), (Ok(5), Tag::Stream(1)));
        let Io::Recv { buf, range, .. } = op.io else { panic!("{:?}", op.io) };
        assert_eq!((&buf[100..105], range), (&b"hello"[..], 100..200));
        assert!(buf[..100].iter().chain(&buf[105..]).all(|&b| b == 0xEE));
        // More than asked for stays in the socket.
        peer.write_all(&[7; 300]).expect("write");
        let (io, result) = one(ring, Io::Recv { socket: socket.clone(), buf, range: 0..200 });
        assert_eq!(result, Ok(200));
        let Io::Recv { buf, .. } = io else { panic!("{io:?}") };
        let (io, result) = one(ring, Io::Recv { socket: socket.clone(), buf, range: 0..200 });
        assert_eq!(result, Ok(100));
        drop(peer);
        let Io::Recv { buf, .. } = io else { panic!("{io:?}") };
        let (io, result) = one(ring, Io::Recv { socket: socket.clone(), buf, range: 0..200 });
        assert_eq!(result, Ok(0));
        let Io::Recv { buf, .. } = io else { panic!("{io:?}") };
        // No SIGPIPE; it would end this process.
        let (_, result) = one(ring, Io::Send { socket, buf, range: 0..10 });
        assert_eq!(result, Err(Errno::PIPE));
    });
}

#[test]
fn a_send_that_fills_the_socket_goes_on_when_the_peer_reads() {
    on_both(|ring| {
        let (socket, mut peer) = pair();
        let mut buffers = BufferPool::default();
        let mut buf = buffers.large().expect("a buffer");
        let bytes: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
        buf[50..50 + bytes.len()].copy_from_slice(&bytes);
        let reader = std::thread::spawn(move || {
            let mut got = vec![0; 1_000_000];
            peer.read_exact(&mut got).expect("all of it");
            got
        });
        let mut range = 50..50 + bytes.len();
        while !range.is_empty() {
            let (io, result) = one(ring, Io::Send { socket: socket.clone(), buf, range });
            let Io::Send { buf: back, range: sent, .. } = io else { panic!("{io:?}") };
            range = sent.start + result.expect("sent")..sent.end;
            buf = back;
        }
        assert!(reader.join().expect("the reader") == bytes);
    });
}

#[test]
fn shutting_a_socket_down_ends_what_waits_on_it() {
    on_both(|ring| {
        let (socket, peer) = pair();
        let mut buffers = BufferPool::default();
        let (small, large) = (buffers.small(), buffers.large().expect("a buffer"));
        let recv = Io::Recv { socket: socket.clone(), buf: small, range: 0..10 };
        let send = Io::Send { socket: socket.clone(), buf: large, range: 0..1_000_000 };
        assert!(ring.submit(Op { io: recv, tag: Tag::Stream(1) }).is_ok());
        assert!(ring.submit(Op { io: send, tag: Tag::Stream(2) }).is_ok());
        ring.enter(Some(Duration::ZERO)).expect("enter");
        rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both).expect("shutdown");
        for (op, result) in finish(ring, 2) {
            match op.tag {
                Tag::Stream(1) => assert_eq!(result, Ok(0)),
                // Some of it may have gone before.
                _ => assert!(result.unwrap_or(0) < 1_000_000, "{result:?}"),
            }
        }
        drop(peer);
    });
}

#[test]
fn a_wake_comes_from_another_thread() {
    on_both(|ring| {
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd"));
        for round in 1..4u64 {
            let wake = Io::Wake { event: event.clone(), count: Box::default() };
            assert!(ring.submit(Op { io: wake, tag: Tag::Shard }).is_ok());
            let bell = event.clone();
            let ringer = std::thread::spawn(move || {
                rustix::io::write(&bell, &round.to_ne_bytes()).expect("write");
            });
            let (op, result) = loop {
                // For ever: only the wake ends it.
                ring.enter(None).expect("enter");
                let mut done = Vec::new();
                ring.reap(&mut done);
                if let Some(found) = done.pop() {
                    break found;
                }
            };
            ringer.join().expect("the ringer");
            let Io::Wake { count, .. } = op.io else { panic!("{:?}", op.io) };
            assert_eq!((result, *count), (Ok(8), round.to_ne_bytes()));
        }
    });
}

#[test]
fn waiting_ends_in_time_when_nothing_happens() {
    on_both(|ring| {
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd"));
        let wake = Io::Wake { event, count: Box::default() };
        assert!(ring.submit(Op { io: wake, tag: Tag::Shard }).is_ok());
        let start = Instant::now();
        ring.enter(Some(Duration::from_millis(30))).expect("enter");
        let waited = start.elapsed();
        assert!(waited >= Duration::from_millis(29) && waited < Duration::from_secs(5));
        let mut done = Vec::new();
        ring.reap(&mut done);
        assert!(done.is_empty());
    });
}

#[test]
fn more_operations_than_the_queue_has_entries() {
    on_both(|ring| {
        let mut buffers = BufferPool::default();
        let place = tempfile::tempdir().expect("a temporary directory");
        let file = file_in(place.path());
        std::fs::write(place.path().join("file"), vec![5; 10_000]).expect("write");
        const OPS: usize = 5000;
        let (mut done, mut peers) = (Vec::new(), BTreeMap::new());
        for key in 0..OPS {
            let io = if key % 10 == 0 && peers.len() < 300 {
                let (socket, peer) = pair();
                peers.insert(key, peer);
                Io::Recv { socket, buf: buffers.small(), range: 0..1 }
            } else {
                let offset = key as u64;
                Io::Read { file: file.clone(), buf: buffers.small(), range: 0..10, offset }
            };
            submit(ring, Op { io, tag: Tag::Stream(key) }, &mut done);
        }
        for peer in peers.values_mut() {
            peer.write_all(b"x").expect("write");
        }
        done.extend(finish(ring, OPS - done.len()));
        let mut seen: Vec<usize> = Vec::new();
        for (op, result) in done {
            let Tag::Stream(key) = op.tag else { panic!("{:?}", op.tag) };
            match op.io {
                Io::Recv { buf, .. } => {
                    assert_eq!((result, buf[0]), (Ok(1), b'x'));
                    buffers.give(buf);
                }
                Io::Read { buf, .. } => {
                    assert_eq!((result, &buf[..10]), (Ok(10), &[5; 10][..]));
                    buffers.give(buf);
                }
                io => panic!("{io:?}"),
            }
            seen.push(key);
        }
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..OPS), "each once");
        assert_eq!((ring.in_flight(), buffers.in_use()), (0, 0));
    });
}

/// A WRITE that hangs holds up none but its own peer's.
#[test]
fn a_write_does_not_wait_for_that_of_another_peer() {
    let place = tempfile::tempdir().expect("a temporary directory");
    let (file, mut buffers) = (file_in(place.path()), BufferPool::default());
    let mut ring = UringRing::new().expect("io_uring");
    let none = RequestTag::of(0, &RecordHeader::default());
    let mut write = |owner, offset| {
        let (file, buf) = (file.clone(), Arc::new(buffers.small()));
        let io = Io::Write { file, buf, range: 0..100, offset };
        assert!(ring.submit(Op { io, tag: Tag::Request(RequestTag { owner, ..none }) }).is_ok());
    };
    // It is not entered, so that those that it has itself do not begin.
    [(1, 0), (1, 100), (2, 200)].into_iter().for_each(|(owner, offset)| write(owner, offset));
    let bytes = || std::fs::metadata(place.path().join("file")).expect("the file").len();
    let start = Instant::now();
    while bytes() != 300 {
        assert!(start.elapsed() < LIMIT, "{} bytes", bytes());
        std::thread::sleep(Duration::from_millis(1));
    }
    finish(&mut ring, 3).iter().for_each(|(_, result)| assert_eq!(*result, Ok(100)));
    assert_eq!(ring.in_flight(), 0);
}

fn dropped_in_flight(mut ring: impl Ring, place: &Path) {
    let file = file_in(place);
    let mut buffers = BufferPool::default();
    let mut peers = Vec::new();
    let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd"));
    for key in 0..1500usize {
        let buf = buffers.small();
        let (socket, peer) = pair();
        let io = match key % 5 {
            0 => Io::Recv { socket, buf, range: 0..100 },
            1 => Io::Send { socket, buf, range: 0..70_000 },
            2 => Io::Write { file: file.clone(), buf: Arc::new(buf), range: 0..70_000, offset: 0 },
            3 => Io::Fsync { file: file.clone(), data_only: key % 2 == 0 },
            _ => Io::Wake { event: event.clone(), count: Box::default() },
        };
        peers.push(peer);
        assert!(ring.submit(Op { io, tag: Tag::Stream(key) }).is_ok());
    }
    if place.ends_with("entered") {
        ring.enter(Some(Duration::ZERO)).expect("enter");
    }
    let start = Instant::now();
    drop(ring);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?} to drop a ring", start.elapsed());
    // The ring has let go of the file, and of the sockets: what their peers send goes nowhere.
    assert_eq!(Arc::strong_count(&file), 1);
    assert_eq!(Arc::strong_count(&event), 1);
    for (key, peer) in peers.iter_mut().enumerate() {
        let end = peer.write_all(b"late").map_err(|error| error.kind());
        assert_eq!(end, Err(std::io::ErrorKind::BrokenPipe), "the socket of {key} is open");
    }
}

#[test]
fn a_ring_is_dropped_with_operations_in_flight() {
    for name in ["entered", "not-entered"] {
        // In memory: a disk that is slow with its 600 flushes is given up, which is right as well.
        let place = tempfile::tempdir_in("/dev/shm").expect("a directory in /dev/shm");
        let place = place.path().join(name);
        std::fs::create_dir(&place).expect("mkdir");
        dropped_in_flight(UringRing::new().expect("io_uring"), &place);
        dropped_in_flight(ThreadRing::new().expect("threads"), &place);
    }
}

#[test]
fn errors_come_back_as_errnos() {
    on_both(|ring| {
        let place = tempfile::tempdir().expect("a temporary directory");
        let node = file_in(place.path()).node.clone();
        let only = |write: bool| {
            let mut options = std::fs::File::options();
            let file = options.read(!write).write(write).open(place.path().join("file"));
            let fd = file.expect("open").into();
            Arc::new(OpenFile::new(node.clone(), fd, libc::O_RDWR as u32, Waits::Nowait))
        };
        let mut buffers = BufferPool::default();
        let (a, b, c) = (buffers.small(), buffers.small(), buffers.small());
        let read = Io::Read { file: only(true), buf: a, range: 0..10, offset: 0 };
        assert_eq!(one(ring, read).1, Err(Errno::BADF));
        let buf = Arc::new(b);
        let write = Io::Write { file: only(false), buf, range: 0..10, offset: 0 };
        assert_eq!(one(ring, write).1, Err(Errno::BADF));
        let far = Io::Read { file: only(false), buf: c, range: 0..10, offset: i64::MAX as u64 - 5 };
        assert!(one(ring, far).1.is_err());
    });
}
