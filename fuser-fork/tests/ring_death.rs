//! What the kernel does with rings whose process is killed while the session's fds live on: why a
//! client with rings is not taken over (docs/sessions.md has the figures).
//!
//! The server is this program once more, with the device as its standard input, to be killed. They
//! switch the module's parameter on while they run; where that cannot be done they say so.

mod common;

use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use common::*;
use fuser_fork::device::{Device, ReadOutcome};
use fuser_fork::frame::Frame;
use fuser_fork::mount::{Mount, mount};
use fuser_fork::notify::{Notice, NotifyOutcome};
use fuser_fork::uring::{Event, Plan, Ring, available};
use ringfs_wire::abi::Opcode;
use rustix::thread::{CpuSet, sched_setaffinity};

const SERVER: &str = "RINGFS_TEST_RING_SERVER";
/// Tasks that ask all the time, and how long none of them needs for one answer.
const TASKS: usize = 4;
const LONG: Duration = Duration::from_millis(400);

fn plan() -> Plan {
    Plan::new(available().expect("available"), 1, MAX_WRITE, (MAX_WRITE / 4096) as u16, 4096)
        .expect("plan")
}

/// The server's process: nothing, where it is not asked for.
#[test]
fn ring_server() {
    let Ok(holds) = env::var(SERVER) else { return };
    let device = io::stdin().as_fd().try_clone_to_owned().expect("the device");
    let device = Arc::new(Device::from_fd(device, "/dev/fuse"));
    let mut ring = Ring::new().expect("ring");
    ring.register(&device, plan(), 0..plan().queues).expect("register");
    io::stderr().write_all(b"ready\n").expect("told");
    while !ring.is_ended() {
        ring.wait().expect("wait");
        while let Some(event) = ring.next_event() {
            let Event::Request(id) = event else { panic!("{event:?}") };
            let parts = ring.request(id).expect("parts");
            let mut bytes = vec![0; parts.frame_bytes()];
            parts.copy_to(&mut bytes).expect("room");
            let frame = Frame::parse(&bytes).expect("frame");
            if holds == "lookups" && frame.known_opcode() == Some(Opcode::Lookup) {
                io::stderr().write_all(b"held\n").expect("told");
                continue;
            }
            let reply = answer(&frame);
            ring.reply(id, reply.as_deref().map_err(|errno| *errno)).expect("reply");
        }
    }
}

struct Server {
    child: Child,
    words: BufReader<std::process::ChildStderr>,
}

impl Server {
    fn start(device: &Device, holds: &str) -> Server {
        let device = device.as_fd().try_clone_to_owned().expect("dup");
        let mut command = Command::new(env::current_exe().expect("exe"));
        command.args(["--exact", "ring_server", "--nocapture"]).env(SERVER, holds);
        command.stdin(device).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("spawn");
        let words = BufReader::new(child.stderr.take().expect("piped"));
        let mut server = Server { child, words };
        server.hear("ready");
        server
    }

    fn hear(&mut self, word: &str) {
        let mut line = String::new();
        while self.words.read_line(&mut line).expect("words") > 0 {
            if line.trim() == word {
                return;
            }
            line.clear();
        }
        panic!("the server ended before it said {word}");
    }

    fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

fn mounted_for_rings(dir: &Dir) -> (Arc<Device>, Mount) {
    let (device, guard) = mount(&dir.mnt(), &options()).expect("mount");
    answer_init_with(&device, true);
    (Arc::new(device), guard)
}

#[test]
fn another_process_registers_again_and_serves() {
    with_rings("another_process_registers_again_and_serves", |dir| {
        let (device, guard) = mounted_for_rings(dir);
        for _ in 0..3 {
            let server = Server::start(&device, "nothing");
            let read = read_aside(dir.mnt().join("hello")).join().expect("task");
            assert_eq!(read.expect("read"), HELLO);
            server.kill();
        }
        drop(guard);
    });
}

#[test]
fn what_an_entry_held_is_not_sent_again() {
    with_rings("what_an_entry_held_is_not_sent_again", |dir| {
        let name = "what_an_entry_held_is_not_sent_again";
        let (device, guard) = mounted_for_rings(dir);
        let mut first = Server::start(&device, "lookups");
        let task = read_aside(dir.mnt().join("hello"));
        first.hear("held");
        first.kill();
        let second = Server::start(&device, "nothing");
        if Notice::resend().send(&device).expect("notify") != NotifyOutcome::Done {
            println!("SKIPPED {name}: no NOTIFY_RESEND here");
            return;
        }
        // The second server answers whoever asks now, and the first task waits.
        let missing = dir.mnt().join("missing");
        assert_eq!(fs::metadata(missing).expect_err("missing").raw_os_error(), Some(ENOENT));
        std::thread::sleep(LONG);
        assert!(!task.is_finished(), "this kernel sends it again: rings can be taken over");
        // Only the end of the session lets it go.
        guard.leave();
        second.kill();
        drop(device);
        assert!(task.join().expect("task").is_err());
    });
}

#[test]
fn the_device_gets_nothing_any_more() {
    with_rings("the_device_gets_nothing_any_more", |dir| {
        let (device, guard) = mounted_for_rings(dir);
        Server::start(&device, "nothing").kill();
        device.set_nonblocking(true).expect("set up");
        let task = read_aside(dir.mnt().join("hello"));
        std::thread::sleep(LONG);
        let read = device.read_frame(&mut buffer()).expect("read");
        assert_eq!(read, ReadOutcome::WouldBlock, "this kernel goes back to the device");
        guard.leave();
        drop(device);
        assert!(task.join().expect("task").is_err());
    });
}

/// Asks once a CPU and more: what waits in the kernel for an entry is fetched behind an answer.
fn nudge(dir: &Dir) {
    let missing = dir.mnt().join("missing");
    for cpu in 0..plan().queues {
        let missing = missing.clone();
        std::thread::spawn(move || {
            let mut set = CpuSet::new();
            set.set(cpu.into());
            sched_setaffinity(None, &set).expect("an online CPU");
            for _ in 0..2 * TASKS {
                let _ = fs::metadata(&missing);
            }
        });
    }
}

/// How many tasks hang for good after a kill, though another server is there: all of some that ask
/// all the time, or of as many that ask right behind the kill of a server that was idle.
fn lost_by_a_kill(dir: &Dir, are_busy: bool) -> usize {
    let (device, guard) = mounted_for_rings(dir);
    let mut first = Server::start(&device, "nothing");
    let over = Arc::new(AtomicBool::new(!are_busy));
    let start = Arc::new(Barrier::new(TASKS + 1));
    let task = |_| {
        let (over, start) = (Arc::clone(&over), Arc::clone(&start));
        let (path, done) = (dir.mnt().join("missing"), Arc::new(AtomicU64::new(0)));
        let count = Arc::clone(&done);
        let thread = std::thread::spawn(move || {
            start.wait();
            loop {
                let _ = fs::metadata(&path);
                count.fetch_add(1, Ordering::Relaxed);
                if over.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        (thread, done)
    };
    let tasks: Vec<_> = (0..TASKS).map(task).collect();
    let counts = || tasks.iter().map(|(_, done)| done.load(Ordering::Relaxed));
    if are_busy {
        start.wait();
        while counts().any(|count| count < 50) {
            std::thread::yield_now();
        }
        first.child.kill().expect("kill");
    } else {
        first.child.kill().expect("kill");
        start.wait();
    }
    first.kill();
    let second = Server::start(&device, "nothing");
    let before: Vec<_> = if are_busy { counts().collect() } else { vec![0; TASKS] };
    nudge(dir);
    std::thread::sleep(LONG);
    let stuck = counts().zip(&before).filter(|(now, before)| now == *before).count();
    over.store(true, Ordering::Relaxed);
    guard.leave();
    second.kill();
    drop(device);
    for (thread, _) in tasks {
        thread.join().expect("free, at the end of the session");
    }
    stuck
}

#[test]
fn how_many_requests_a_kill_loses() {
    let name = "how_many_requests_a_kill_loses";
    let Some(_on) = SwitchedOn::new(name) else { return };
    for (are_busy, words) in [(true, "that ask all the time"), (false, "right behind it")] {
        let (tell, stuck) = channel();
        for _ in 0..10 {
            let tell = tell.clone();
            bounded(name, move |dir| tell.send(lost_by_a_kill(dir, are_busy)).expect("told"));
        }
        drop(tell);
        let stuck: Vec<_> = stuck.iter().collect();
        // What this kernel does, for the document: it is not ours to promise.
        println!("of {TASKS} tasks {words} hang after a kill, ten times: {stuck:?}");
    }
}
