//! Real sessions: two clones with a thread each, replies by the right and the wrong clone, what
//! arrives on another clone than expected, notifications, and the end of a mount.

mod common;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::*;
use fuser_fork::device::{Device, DeviceError, ReadOutcome, ReplyOutcome};
use fuser_fork::frame::{Frame, error_reply, out_header};
use fuser_fork::mount::{AbortOutcome, Unmounted, abort_at, unmount_by_force, unmount_path};
use fuser_fork::notify::{Notice, NotifyOutcome};
use fuser_fork::reader::{Clones, Owed};
use ringfs_wire::abi::{FUSE_ROOT_ID, Opcode};
use rustix::fs::Advice;
use rustix::mount::{MountFlags, UnmountFlags};
use zerocopy::IntoBytes;

/// A child that has just been forked has all files open until it becomes another program, and keeps
/// a mount in use: held while one is made, and by who counts on the end of a use.
static FORKS: Mutex<()> = Mutex::new(());

/// Whether a frame is there within five seconds.
fn readable(device: &Device) -> bool {
    device.wait_readable(None, Some(Duration::from_secs(5))).expect("poll").device
}

fn read_one(device: &Device) -> Vec<u8> {
    let mut buf = buffer();
    let len = next_len(device, &mut buf).expect("a living mount");
    buf.truncate(len);
    buf
}

#[test]
fn two_clones_serve_a_mount() {
    bounded("two_clones_serve_a_mount", |dir| {
        let (device, guard) = mounted(dir);
        let clones = Clones::open(device, 2);
        assert!(clones.shortfall().is_none());
        let devices: Vec<Arc<Device>> = clones.devices().to_vec();
        let lanes: Vec<_> = devices.iter().cloned().map(serve).collect();
        let forks = FORKS.lock().unwrap_or_else(PoisonError::into_inner);
        let hello = dir.mnt().join("hello");
        let readers: Vec<_> = (0..8).map(|_| read_aside(hello.clone())).collect();
        for reader in readers {
            assert_eq!(reader.join().expect("reader").expect("read"), HELLO);
        }
        let names: Vec<_> = std::fs::read_dir(dir.mnt())
            .expect("opendir")
            .map(|entry| entry.expect("entry").file_name())
            .collect();
        assert_eq!(names, ["hello"]);
        let missing = std::fs::metadata(dir.mnt().join("missing")).expect_err("missing");
        assert_eq!(missing.raw_os_error(), Some(ENOENT));
        assert!(guard.is_mounted());
        assert_eq!(guard.unmount().expect("unmount"), Unmounted::Clean);
        drop(forks);
        let seen: BTreeSet<u32> =
            lanes.into_iter().flat_map(|lane| lane.join().expect("lane").into_keys()).collect();
        for opcode in [Opcode::Lookup, Opcode::Open, Opcode::Read, Opcode::Readdir] {
            assert!(seen.contains(&(opcode as u32)), "{opcode:?} in {seen:?}");
        }
        assert_eq!(clones.dropped_replies(), 0);
        assert!(!dir.is_mounted());
    });
}

#[test]
fn refused_clones_leave_fewer_readers() {
    bounded("refused_clones_leave_fewer_readers", |dir| {
        let (device, _guard) = mounted(dir);
        // The same fd in a process which cannot reach the device's node.
        let fd = device.as_fd().try_clone_to_owned().expect("dup");
        let clones = Clones::open(Device::from_fd(fd, "/nonexistent/fuse"), 4);
        let short = clones.shortfall().expect("fewer");
        assert_eq!((clones.devices().len(), short.have, short.wanted), (1, 1, 4));
        assert!(matches!(short.source, DeviceError::Missing { .. }));
        assert!(short.to_string().starts_with("1 of 4 readers"), "{short}");
    });
}

#[test]
fn a_reply_by_the_wrong_clone_is_refused() {
    bounded("a_reply_by_the_wrong_clone_is_refused", |dir| {
        let (device, guard) = mounted(dir);
        let clones = Clones::open(device, 2);
        let [a, b] = clones.devices() else { panic!("two clones") };
        let task = read_aside(dir.mnt().join("hello"));
        let bytes = serve_until(a, Opcode::Lookup);
        let frame = Frame::parse(&bytes).expect("frame");
        let header = out_header(frame.unique(), entry().as_bytes().len());
        let reply = [&header, entry().as_bytes()].concat();
        assert_eq!(b.reply(&reply).expect("reply"), ReplyOutcome::Gone);
        assert_eq!(a.reply(&reply).expect("reply"), ReplyOutcome::Delivered);
        assert_eq!(a.reply(&reply).expect("reply"), ReplyOutcome::Gone, "a second reply");
        let lane = serve(Arc::clone(b));
        assert_eq!(task.join().expect("task").expect("read"), HELLO);
        drop(guard);
        lane.join().expect("lane");
    });
}

#[test]
fn a_body_of_wrong_length_ends_its_request_alone() {
    bounded("a_body_of_wrong_length_ends_its_request_alone", |dir| {
        let (device, guard) = mounted(dir);
        let device = Arc::new(device);
        let task = read_aside(dir.mnt().join("hello"));
        let bytes = serve_until(&device, Opcode::Lookup);
        let owed = Owed::of(&device, &Frame::parse(&bytes).expect("frame")).expect("owed");
        assert_eq!(owed.reply(b"too short").expect("reply"), ReplyOutcome::Refused);
        let error = task.join().expect("task").expect_err("an error");
        assert_eq!(error.raw_os_error(), Some(5));
        // A debt that is dropped pays itself, and is counted.
        let task = read_aside(dir.mnt().join("hello"));
        let bytes = serve_until(&device, Opcode::Lookup);
        drop(Owed::of(&device, &Frame::parse(&bytes).expect("frame")));
        let error = task.join().expect("task").expect_err("an error");
        assert_eq!(error.raw_os_error(), Some(5));
        assert_eq!(device.dropped_replies(), 1);
        drop(guard);
    });
}

#[test]
fn interrupts_and_forgets_come_by_any_clone() {
    bounded("interrupts_and_forgets_come_by_any_clone", |dir| {
        let (device, _guard) = mounted(dir);
        let clones = Clones::open(device, 2);
        let [a, b] = clones.devices() else { panic!("two clones") };
        a.set_nonblocking(true).expect("nonblocking");
        // INTERRUPT: A has read the LOOKUP, nobody but B reads on.
        let forks = FORKS.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cat = Command::new("cat")
            .arg(dir.mnt().join("hello"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("cat");
        drop(forks);
        let bytes = serve_until(a, Opcode::Lookup);
        let lookup = Frame::parse(&bytes).expect("frame");
        cat.kill().expect("kill");
        let bytes = read_one(b);
        let interrupt = Frame::parse(&bytes).expect("frame");
        assert_eq!(interrupt.known_opcode(), Some(Opcode::Interrupt));
        assert_eq!(interrupt.interrupt_target(), Ok(Some(lookup.unique())));
        assert!(Owed::of(b, &interrupt).is_none());
        let reply = error_reply(lookup.unique(), EINTR);
        assert_eq!(b.reply(&reply).expect("reply"), ReplyOutcome::Gone);
        assert_eq!(a.reply(&reply).expect("reply"), ReplyOutcome::Delivered);
        assert!(!cat.wait().expect("wait").success());
        let task = read_aside(dir.mnt().join("hello"));
        while !task.is_finished() {
            let mut buf = buffer();
            a.wait_readable(None, Some(Duration::from_millis(50))).expect("poll");
            if let ReadOutcome::Frame(len) = a.read_frame(&mut buf).expect("read") {
                let _outcome = serve_one(a, &Frame::parse(&buf[..len]).expect("frame"));
            }
        }
        assert_eq!(task.join().expect("task").expect("read"), HELLO);
        // FORGET: A gave the entry, B reads that it is given back.
        let notice = Notice::inval_entry(FUSE_ROOT_ID, b"hello").expect("name");
        assert_eq!(notice.send(a).expect("notify"), NotifyOutcome::Done);
        loop {
            assert!(readable(b), "no FORGET came");
            let bytes = read_one(b);
            let frame = Frame::parse(&bytes).expect("frame");
            let forgets: Vec<_> = frame.forgets().expect("forgets").collect();
            let Some(one) = forgets.first() else {
                let _outcome = serve_one(b, &frame);
                continue;
            };
            assert_eq!((forgets.len(), one.nodeid, one.nlookup), (1, HELLO_NODE, 1));
            break;
        }
    });
}

#[test]
fn notifications() {
    bounded("notifications", |dir| {
        let (device, guard) = mounted(dir);
        let device = Arc::new(device);
        let lane = serve(Arc::clone(&device));
        let hello = dir.mnt().join("hello");
        let read = || read_aside(hello.clone()).join().expect("task").expect("read");
        let send = |notice: Notice| notice.send(&device).expect("notify");
        let name = |made: Result<Notice, _>| made.expect("name");
        assert_eq!(send(Notice::inval_inode(HELLO_NODE, 0, 0)), NotifyOutcome::NotCached);
        assert_eq!(read(), HELLO);
        assert_eq!(send(Notice::inval_inode(HELLO_NODE, 0, 0)), NotifyOutcome::Done);
        assert_eq!(send(name(Notice::expire_entry(1, b"hello"))), NotifyOutcome::Done);
        assert_eq!(send(name(Notice::inval_entry(1, b"nothing"))), NotifyOutcome::NotCached);
        assert_eq!(send(name(Notice::inval_entry(77, b"hello"))), NotifyOutcome::NotCached);
        assert_eq!(read(), HELLO);
        assert_eq!(send(name(Notice::delete(1, HELLO_NODE, b"hello"))), NotifyOutcome::Done);
        assert_eq!(read(), HELLO);
        // Newer than the oldest kernel that we serve: done, or said to be unknown.
        for notice in [Notice::resend(), Notice::inc_epoch()] {
            let outcome = send(notice);
            println!("resend, inc_epoch: {outcome:?}");
            assert!(matches!(outcome, NotifyOutcome::Done | NotifyOutcome::Unsupported));
        }
        assert_eq!(read(), HELLO);
        drop(guard);
        lane.join().expect("lane");
        let outcome = Notice::inval_inode(HELLO_NODE, 0, 0).send(&device).expect("notify");
        assert!(matches!(outcome, NotifyOutcome::Unmounted | NotifyOutcome::NotCached));
    });
}

/// A task in the kernel cannot be killed while it waits for a page: whether a client that is killed
/// meanwhile ends, and can be followed by another one, hangs on which notices wait.
#[test]
fn a_page_in_flight_is_waited_for_by_inval_inode_and_not_by_prune() {
    bounded("a_page_in_flight_is_waited_for_by_inval_inode_and_not_by_prune", |dir| {
        let (device, guard) = mounted(dir);
        let device = Arc::new(device);
        let hello = dir.mnt().join("hello");
        let reader = std::thread::spawn(move || {
            let file = std::fs::File::open(hello).expect("open");
            rustix::fs::fadvise(&file, 0, None, Advice::WillNeed).expect("read ahead");
        });
        let read = serve_until(&device, Opcode::Read);
        let flush = serve_until(&device, Opcode::Flush);
        assert!(serve_one(&device, &Frame::parse(&flush).expect("frame")).is_some());
        reader.join().expect("reader");
        // The page is locked, and nobody has the file open.
        let send = |notice: Notice| {
            let (device, (tell, hear)) = (Arc::clone(&device), channel());
            std::thread::spawn(move || {
                tell.send(Err(rustix::thread::gettid())).expect("send");
                tell.send(Ok(notice.send(&device).expect("notify"))).expect("send");
            });
            (hear.recv().expect("a thread").expect_err("its id"), hear)
        };
        let soon = Duration::from_secs(30);
        let (_, pruned) = send(Notice::prune(&[HELLO_NODE]));
        let outcome = pruned.recv_timeout(soon).expect("PRUNE waits for no page");
        println!("prune: {outcome:?}");
        assert!(matches!(outcome, Ok(NotifyOutcome::Done | NotifyOutcome::Unsupported)));
        let (waiter, invalidated) = send(Notice::inval_inode(HELLO_NODE, 0, 0));
        let stat = format!("/proc/self/task/{waiter}/stat");
        while !std::fs::read_to_string(&stat).expect("it waits").contains(") D ") {
            std::thread::yield_now();
        }
        assert!(serve_one(&device, &Frame::parse(&read).expect("frame")).is_some());
        let outcome = invalidated.recv_timeout(soon).expect("the page is there");
        assert_eq!(outcome, Ok(NotifyOutcome::Done));
        drop(guard);
    });
}

#[test]
fn a_resent_request_says_so() {
    bounded("a_resent_request_says_so", |dir| {
        let (device, guard) = mounted(dir);
        let clones = Clones::open(device, 2);
        let [a, b] = clones.devices() else { panic!("two clones") };
        let task = read_aside(dir.mnt().join("hello"));
        let first = serve_until(a, Opcode::Lookup);
        let first = Frame::parse(&first).expect("frame");
        assert!(!first.is_resend());
        if Notice::resend().send(a).expect("notify") == NotifyOutcome::Unsupported {
            println!("SKIPPED a_resent_request_says_so: this kernel has no NOTIFY_RESEND (6.9)");
            drop(guard);
            return;
        }
        let again = read_one(b);
        let again = Frame::parse(&again).expect("frame");
        assert!(again.is_resend());
        assert_eq!(again.unique_original(), first.unique());
        // It belongs to the clone that read it last.
        let old = error_reply(first.unique(), ENOENT);
        assert_eq!(a.reply(&old).expect("reply"), ReplyOutcome::Gone);
        assert_eq!(serve_one(b, &again), Some(ReplyOutcome::Delivered));
        let lane = serve(Arc::clone(b));
        assert_eq!(task.join().expect("task").expect("read"), HELLO);
        drop(guard);
        lane.join().expect("lane");
    });
}

#[test]
fn an_unmount_ends_blocked_reads() {
    bounded("an_unmount_ends_blocked_reads", |dir| {
        let (device, guard) = mounted(dir);
        let clones = Clones::open(device, 3);
        let (tell, hear) = channel();
        let lanes: Vec<_> = clones
            .devices()
            .iter()
            .map(|device| {
                let (device, tell) = (Arc::clone(device), tell.clone());
                std::thread::spawn(move || {
                    let mut buf = buffer();
                    tell.send(()).expect("send");
                    loop {
                        match device.read_frame(&mut buf).expect("read") {
                            ReadOutcome::Frame(len) => {
                                let frame = Frame::parse(&buf[..len]).expect("frame");
                                let _outcome = serve_one(&device, &frame);
                            }
                            ReadOutcome::Interrupted => {}
                            outcome => return outcome,
                        }
                    }
                })
            })
            .collect();
        lanes.iter().for_each(|_| hear.recv().expect("started"));
        assert_eq!(guard.unmount().expect("unmount"), Unmounted::Clean);
        for lane in lanes {
            assert_eq!(lane.join().expect("lane"), ReadOutcome::Unmounted);
        }
        let reply = clones.devices()[0].reply(&error_reply(99, ENOENT)).expect("reply");
        assert!(matches!(reply, ReplyOutcome::Gone | ReplyOutcome::Unmounted), "{reply:?}");
    });
}

#[test]
fn reads_of_every_outcome() {
    bounded("reads_of_every_outcome", |dir| {
        let (device, guard) = mounted(dir);
        let clone = Device::clone_of(&device).expect("clone");
        clone.set_nonblocking(true).expect("nonblocking");
        let read = |buf: &mut [u8]| clone.read_frame(buf);
        assert_eq!(read(&mut buffer()).expect("read"), ReadOutcome::WouldBlock);
        let short = read(&mut [0; 8192]);
        assert!(matches!(short, Err(DeviceError::BufferTooShort { len: 8192 })), "{short:?}");
        let ready = clone.wait_readable(None, Some(Duration::ZERO)).expect("poll");
        assert!(!ready.device && !ready.kick);
        assert_eq!(guard.unmount().expect("unmount"), Unmounted::Clean);
        assert!(readable(&clone));
        assert_eq!(read(&mut buffer()).expect("read"), ReadOutcome::Unmounted);
    });
}

#[test]
fn a_dead_mount_is_unmounted_without_touching_it() {
    bounded("a_dead_mount_is_unmounted_without_touching_it", |dir| {
        let (device, guard) = mounted(dir);
        // Nobody serves: this task hangs in the mount, in use for ever.
        let task = read_aside(dir.mnt().join("hello"));
        assert!(readable(&device));
        guard.leave();
        assert!(dir.is_mounted());
        // Through a symbolic link in the parent, and with a path that would hang in a stat.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).expect("link");
        unmount_path(&link.join("mnt"), true).expect("unmount");
        assert!(!dir.is_mounted());
        let error = unmount_path(&dir.mnt(), true).expect_err("gone").to_string();
        assert!(error.contains("no ringfs mount"), "{error}");
        // The last fd of the session frees the task.
        drop(device);
        assert!(task.join().expect("task").is_err());
    });
}

#[test]
fn a_hung_mount_is_aborted() {
    bounded("a_hung_mount_is_aborted", |dir| {
        let control = dir.path().join("control");
        std::fs::create_dir(&control).expect("mkdir");
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        if let Err(errno) = rustix::mount::mount("none", &control, "fusectl", flags, None) {
            println!("SKIPPED a_hung_mount_is_aborted: fusectl cannot be mounted: {errno}");
            return;
        }
        struct Control<'a>(&'a std::path::Path);
        impl Drop for Control<'_> {
            fn drop(&mut self) {
                let done = rustix::mount::unmount(self.0, UnmountFlags::DETACH);
                assert!(done.is_ok() || std::thread::panicking(), "{done:?}");
            }
        }
        let _control = Control(&control);
        let (device, guard) = mounted(dir);
        let number = guard.dev_minor().expect("a connection number");
        let task = read_aside(dir.mnt().join("hello"));
        assert!(readable(&device));
        let abort =
            |device: &Device, number| abort_at(&control, device.as_fd(), number).expect("abort");
        assert_eq!(abort(&device, number), AbortOutcome::Aborted);
        assert!(task.join().expect("task").is_err(), "the task is free");
        assert_eq!(device.read_frame(&mut buffer()).expect("read"), ReadOutcome::Unmounted);
        assert!(guard.is_mounted(), "dead, and still in the table");
        assert_eq!(guard.unmount().expect("unmount"), Unmounted::Clean);
        assert_eq!(abort(&device, u32::MAX), AbortOutcome::NoConnection);
        // The number is another mount's by now, whichever it was given to.
        let (_other, new) = mounted(dir);
        let number = new.dev_minor().expect("a connection number");
        assert_eq!(abort(&device, number), AbortOutcome::NoConnection);
        assert!(!unmount_by_force(device.as_fd(), number).expect("unmount"));
        assert_eq!(new.unmount().expect("unmount"), Unmounted::Clean);
    });
}
