//! FUSE-over-io_uring on real mounts: queues served by one and by two threads, what stays on the
//! device, refused registrations, wrong lengths, and every end of a mount.
//!
//! They switch the module's parameter on while they run; where that cannot be done they say so.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use common::*;
use fuser_fork::device::{Device, ReadOutcome};
use fuser_fork::frame::Frame;
use fuser_fork::mount::{Mount, Unmounted, mount};
use fuser_fork::notify::{Notice, NotifyOutcome};
use fuser_fork::uring::{EntryId, Event, Plan, Ring, UringError, available};
use ringfs_wire::abi::Opcode;

/// A mount whose INIT has agreed on rings.
fn mounted_for_rings(dir: &Dir) -> (Arc<Device>, Mount, Plan) {
    let (device, guard) = mount(&dir.mnt(), &options()).expect("mount");
    let agreed = answer_init_with(&device, true);
    let queues = available().expect("available");
    let (max_write, max_pages) = (agreed.out.max_write, agreed.out.max_pages);
    let plan = Plan::new(queues, 1, max_write, max_pages, 4096).expect("plan");
    (Arc::new(device), guard, plan)
}

/// A thread that serves the `thread`th of `threads` shares of the queues until the mount is gone.
fn serve_ring(device: &Arc<Device>, plan: Plan, thread: u16, threads: u16) -> JoinHandle<Seen> {
    let (device, (tell, hear)) = (Arc::clone(device), channel());
    let server = std::thread::spawn(move || {
        let mut ring = Ring::new().expect("ring");
        ring.register(&device, plan, plan.queues_of(thread, threads)).expect("register");
        tell.send(()).expect("send");
        let mut seen = Seen::new();
        while !ring.is_ended() {
            ring.wait().expect("wait");
            while let Some(event) = ring.next_event() {
                let Event::Request(id) = event else { panic!("{event:?}") };
                let bytes = frame_of(&mut ring, id);
                let frame = Frame::parse(&bytes).expect("frame");
                *seen.entry(frame.opcode()).or_default() += 1;
                let reply = answer(&frame);
                ring.reply(id, reply.as_deref().map_err(|errno| *errno)).expect("reply");
            }
        }
        assert_eq!(ring.lost(), 0);
        seen
    });
    hear.recv_timeout(Duration::from_secs(10)).expect("registered");
    server
}

fn frame_of(ring: &mut Ring, id: EntryId) -> Vec<u8> {
    let parts = ring.request(id).expect("parts");
    let mut bytes = vec![0; parts.frame_bytes()];
    parts.copy_to(&mut bytes).expect("room");
    bytes
}

/// What a session sends for one tree of reads, by opcode, and that it is right.
fn use_mount(dir: &Dir) {
    let hello = dir.mnt().join("hello");
    let readers: Vec<_> = (0..64).map(|_| read_aside(hello.clone())).collect();
    for reader in readers {
        assert_eq!(reader.join().expect("reader").expect("read"), HELLO);
    }
    let names: Vec<_> = fs::read_dir(dir.mnt())
        .expect("opendir")
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    assert_eq!(names, ["hello"]);
    let missing = fs::metadata(dir.mnt().join("missing")).expect_err("missing");
    assert_eq!(missing.raw_os_error(), Some(ENOENT));
}

fn check_ring_mount(name: &'static str, threads: u16) {
    with_rings(name, move |dir| {
        let (device, guard, plan) = mounted_for_rings(dir);
        let servers: Vec<_> =
            (0..threads).map(|thread| serve_ring(&device, plan, thread, threads)).collect();
        let reader = serve(Arc::clone(&device));
        use_mount(dir);
        assert_eq!(guard.unmount().expect("unmount"), Unmounted::Clean);
        let by_ring: BTreeSet<u32> =
            servers.into_iter().flat_map(|s| s.join().expect("server").into_keys()).collect();
        let by_device = reader.join().expect("reader");
        for opcode in [Opcode::Lookup, Opcode::Open, Opcode::Read, Opcode::Readdir] {
            assert!(by_ring.contains(&(opcode as u32)), "{opcode:?} in {by_ring:?}");
            assert!(!by_device.contains_key(&(opcode as u32)), "{opcode:?} in {by_device:?}");
        }
        assert!(!dir.is_mounted());
    });
}

#[test]
fn one_thread_serves_all_queues() {
    check_ring_mount("one_thread_serves_all_queues", 1);
}

#[test]
fn two_threads_serve_a_share_each() {
    check_ring_mount("two_threads_serve_a_share_each", 2);
}

#[test]
fn a_refused_registration_leaves_the_device() {
    with_rings("a_refused_registration_leaves_the_device", |dir| {
        // Payloads that are too short, a queue that is not there, and a refusal asked for.
        for case in 0..3 {
            let (device, guard, mut plan) = mounted_for_rings(dir);
            let mut ring = Ring::new().expect("ring");
            match case {
                0 => plan.payload_bytes = 8192,
                1 => plan.queues += 1,
                _ => {}
            }
            if case == 2 {
                ring.refuse(&device).expect("refused");
            } else {
                let queues = plan.queues_of(plan.queues - 1, 1);
                let refused = ring.register(&device, plan, queues).expect_err("refused");
                assert!(matches!(refused, UringError::Refused { .. }), "{refused}");
                assert!(refused.to_string().contains("queue of CPU"), "{refused}");
            }
            drop(ring);
            let reader = serve(Arc::clone(&device));
            use_mount(dir);
            assert_eq!(guard.unmount().expect("unmount"), Unmounted::Clean);
            let seen = reader.join().expect("reader");
            assert!(seen.contains_key(&(Opcode::Read as u32)), "{case}: {seen:?}");
        }
    });
}

#[test]
fn interrupts_and_forgets_come_by_the_device() {
    with_rings("interrupts_and_forgets_come_by_the_device", |dir| {
        let (device, guard, plan) = mounted_for_rings(dir);
        let mut ring = Ring::new().expect("ring");
        ring.register(&device, plan, 0..plan.queues).expect("register");
        let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("fd");
        let watch = ring.watch(&kick).expect("watch");
        let mut cat = Command::new("cat")
            .arg(dir.mnt().join("hello"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("cat");
        // The LOOKUP waits in its entry while `cat` is killed.
        let (id, unique) = serve_until_by_ring(&mut ring, Opcode::Lookup);
        cat.kill().expect("kill");
        let mut buf = buffer();
        let len = next_len(&device, &mut buf).expect("an interrupt");
        let frame = Frame::parse(&buf[..len]).expect("frame");
        assert_eq!(frame.interrupt_target(), Ok(Some(unique)));
        ring.reply(id, Err(EINTR)).expect("reply");
        ring.submit().expect("submit");
        assert!(!cat.wait().expect("wait").success());
        // A whole read, then the entry is given back: FORGET comes by the device.
        let task = read_aside(dir.mnt().join("hello"));
        let told = kick.try_clone().expect("dup");
        let task = std::thread::spawn(move || {
            let read = task.join().expect("task");
            rustix::io::write(&told, &1u64.to_ne_bytes()).expect("kick");
            read
        });
        ring.arm(watch, false).expect("arm");
        serve_until_ready(&mut ring);
        assert_eq!(task.join().expect("task").expect("read"), HELLO);
        let notice = Notice::inval_entry(1, b"hello").expect("name");
        assert_eq!(notice.send(&device).expect("notify"), NotifyOutcome::Done);
        let len = next_len(&device, &mut buf).expect("a forget");
        let frame = Frame::parse(&buf[..len]).expect("frame");
        assert_eq!(
            frame.forgets().expect("forgets").next().map(|one| one.nodeid),
            Some(HELLO_NODE)
        );
        // The unmount's DESTROY needs a server; the ring sees the end itself.
        let unmount = std::thread::spawn(move || guard.unmount().expect("unmount"));
        while !ring.is_ended() {
            serve_events(&mut ring, None);
        }
        assert_eq!(unmount.join().expect("unmount"), Unmounted::Clean);
        assert_eq!(device.read_frame(&mut buf).expect("read"), ReadOutcome::Unmounted);
    });
}

/// Serves one turn; the entry and id of a request of `until`, which stays unanswered.
fn serve_events(ring: &mut Ring, until: Option<Opcode>) -> Option<(EntryId, u64)> {
    ring.wait().expect("wait");
    let mut found = None;
    while let Some(event) = ring.next_event() {
        let Event::Request(id) = event else { continue };
        let bytes = frame_of(ring, id);
        let frame = Frame::parse(&bytes).expect("frame");
        if until.is_some() && frame.known_opcode() == until && found.is_none() {
            found = Some((id, frame.unique()));
            continue;
        }
        let reply = answer(&frame);
        ring.reply(id, reply.as_deref().map_err(|errno| *errno)).expect("reply");
    }
    found
}

fn serve_until_by_ring(ring: &mut Ring, opcode: Opcode) -> (EntryId, u64) {
    loop {
        if let Some(found) = serve_events(ring, Some(opcode)) {
            return found;
        }
    }
}

fn serve_until_ready(ring: &mut Ring) {
    loop {
        ring.wait().expect("wait");
        while let Some(event) = ring.next_event() {
            let Event::Request(id) = event else { return ring.submit().expect("submit") };
            let bytes = frame_of(ring, id);
            let reply = answer(&Frame::parse(&bytes).expect("frame"));
            ring.reply(id, reply.as_deref().map_err(|errno| *errno)).expect("reply");
        }
    }
}

#[test]
fn a_ring_that_goes_while_a_request_waits_frees_the_task() {
    with_rings("a_ring_that_goes_while_a_request_waits_frees_the_task", |dir| {
        let (device, guard, plan) = mounted_for_rings(dir);
        let mut ring = Ring::new().expect("ring");
        ring.register(&device, plan, 0..plan.queues).expect("register");
        let task = read_aside(dir.mnt().join("hello"));
        let _waiting = serve_until_by_ring(&mut ring, Opcode::Lookup);
        guard.leave();
        // As when the process dies: ring and device go, in either order.
        drop(ring);
        drop(device);
        assert!(task.join().expect("task").is_err());
        assert!(dir.is_mounted(), "dead, and still in the table");
    });
}

#[test]
fn lengths_that_are_wrong_end_their_request_alone() {
    with_rings("lengths_that_are_wrong_end_their_request_alone", |dir| {
        let (device, guard, plan) = mounted_for_rings(dir);
        let mut ring = Ring::new().expect("ring");
        ring.register(&device, plan, 0..plan.queues).expect("register");
        for reply in [&b"too short"[..], &vec![7; plan.payload_bytes + 1]] {
            let task = read_aside(dir.mnt().join("hello"));
            let (id, _) = serve_until_by_ring(&mut ring, Opcode::Lookup);
            ring.reply(id, Ok(reply)).expect("reply");
            // A second reply to the same request is nobody's.
            ring.reply(id, Ok(reply)).expect("reply");
            ring.submit().expect("submit");
            assert!(task.join().expect("task").is_err());
        }
        assert_eq!(ring.lost(), 0);
        let unmount = std::thread::spawn(move || guard.unmount().expect("unmount"));
        while !ring.is_ended() {
            serve_events(&mut ring, None);
        }
        assert_eq!(unmount.join().expect("unmount"), Unmounted::Clean);
    });
}
