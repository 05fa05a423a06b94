//! Mounts with `uring=on`, against the small daemon of these tests. Needs root, FUSE, and a kernel
//! with FUSE-over-io_uring (6.14): where that is missing they say that they are skipped.
//!
//! They switch the module's parameter while they run, and back afterwards.

#[allow(dead_code, reason = "the other tests use more of it")]
mod bench;
#[allow(dead_code, reason = "the other tests use more of it")]
mod host;

use bench::uses::{
    self, deny_read, drop_caches, end_by_signals, ended, forget_until, hanging, known, lookups,
    umount, wait_connected,
};
use bench::*;
use host::{BIG_BYTES, HELLO_TEXT, Mood, Terms, big_byte};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The module's parameter has a value while this lives; then it is as it was.
struct Switched {
    before: String,
    /// Other programs that switch it wait for each other by this.
    _lock: Option<File>,
    _alone: MutexGuard<'static, ()>,
}

impl Switched {
    fn to(value: &str, test: &str) -> Option<Switched> {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let lock = File::open(SWITCH).ok();
        lock.iter().for_each(|lock| flock(lock, FlockOperation::LockExclusive).expect("a lock"));
        let switched = std::fs::read_to_string(SWITCH)
            .and_then(|before| std::fs::write(SWITCH, value).map(|()| before));
        match switched {
            Ok(before) => Some(Switched { before, _lock: lock, _alone: alone }),
            Err(error) => {
                println!("SKIPPED {test}: FUSE-over-io_uring cannot be switched on: {error}");
                eprintln!("SKIPPED {test}: FUSE-over-io_uring cannot be switched on: {error}");
                None
            }
        }
    }
}

impl Drop for Switched {
    fn drop(&mut self) {
        let _ = std::fs::write(SWITCH, self.before.trim());
    }
}

fn rings(bench: &Bench) -> serde_json::Value {
    status_of(bench)["rings"].clone()
}

fn read_all(path: &Path, size: usize) {
    let file = File::open(path).expect("open");
    let mut buffer = vec![0; size];
    let mut at = 0;
    while at < BIG_BYTES.min(size * 100) {
        let n = file.read_at(&mut buffer, at as u64).expect("read");
        assert!(n > 0 && buffer[..n].iter().enumerate().all(|(i, &b)| b == big_byte(at + i)));
        at += n;
    }
}

fn use_mount(bench: &Bench) {
    let root = bench.mountpoint.clone();
    within("work on the mount", move || {
        assert_eq!(std::fs::read(root.join("hello")).expect("hello"), HELLO_TEXT);
        let names = std::fs::read_dir(&root).expect("list").map(|e| e.expect("e").file_name());
        assert_eq!(names.collect::<Vec<_>>(), ["hello", "big", "hang"]);
        let missing = std::fs::metadata(root.join("missing")).expect_err("missing");
        assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);
        std::thread::scope(|scope| {
            for thread in 0..64 {
                let path = root.join("big");
                let size =
                    [1 << 20, 300_000].get(thread).copied().unwrap_or([4096, 100][thread % 2]);
                scope.spawn(move || read_all(&path, size));
            }
        });
        let file = File::options().write(true).open(root.join("big")).expect("open");
        let data: Vec<u8> = (0..3 << 20).map(big_byte).collect();
        file.write_all_at(&data, 0).expect("write");
    });
    assert_eq!(bench.host.wait_for("writes", |seen| Some(seen.written)), 3 << 20);
}

#[test]
fn rings_serve_a_mount() {
    let Some(_on) = Switched::to("Y", "rings_serve_a_mount") else { return };
    for (options, terms) in [
        ("uring=on", Terms::default()),
        ("uring=on,lanes=1,checksum=on", Terms::default()),
        ("uring=on,cache=never", Terms { slots: 2, ..Terms::default() }),
    ] {
        let (bench, client) = mounted(terms, options);
        use_mount(&bench);
        let rings = rings(&bench);
        assert!(rings["queues"].as_u64() >= Some(1) && rings["why"].is_null(), "{rings}");
        let text = String::from_utf8(bench.run(&["status"]).stdout).expect("text");
        assert!(text.contains("entries, buffers of at most"), "{text}");
        umount(&bench, client);
    }
}

#[test]
fn without_rings_the_device_serves_and_says_why() {
    let Some(_off) = Switched::to("N", "without_rings_the_device_serves_and_says_why") else {
        return;
    };
    let (bench, client) = mounted(Terms::default(), "uring=on,lanes=2");
    use_mount(&bench);
    let rings = rings(&bench);
    let why = rings["why"].as_str().unwrap_or_default().to_owned();
    assert!(rings["queues"] == 0 && why.contains("echo Y"), "{rings}");
    let stderr = umount(&bench, client);
    assert!(stderr.contains("frames come by /dev/fuse"), "{stderr}");
}

#[test]
fn one_connection_is_not_enough_for_rings() {
    let Some(_on) = Switched::to("Y", "one_connection_is_not_enough_for_rings") else { return };
    let terms = Terms { lanes: 1, conns: 1, ..Terms::default() };
    let (bench, client) = mounted(terms, "uring=on");
    use_mount(&bench);
    let rings = rings(&bench);
    assert!(rings["queues"] == 0 && rings["why"].as_str().is_some(), "{rings}");
    umount(&bench, client);
}

#[test]
fn killed_readers_get_out_and_the_daemon_is_told() {
    let Some(_on) = Switched::to("Y", "killed_readers_get_out_and_the_daemon_is_told") else {
        return;
    };
    // With few slots some wait in their entries: their interrupts come before their slots.
    for slots in [64_u16, 2] {
        let (bench, client) = mounted(Terms { slots, ..Terms::default() }, "uring=on,lanes=1");
        let readers: Vec<Reader> = (0..6).map(|_| bench.cat("hang")).collect();
        // A signal that comes while the kernel hands a request to its entry is not told by Linux
        // 6.18 (docs/operations.md): all of them are with the client before they are killed.
        let hanging = usize::from(slots.min(6));
        bench.host.wait_for("reads", |seen| (seen.hanging.len() == hanging).then_some(()));
        wait_until("the other requests", || status_of(&bench)["parked"] == 6 - hanging);
        readers.iter().for_each(Reader::kill);
        for reader in readers {
            assert_eq!(reader.wait().status.signal(), Some(9));
        }
        assert!(bench.host.wait_for("cancels", |seen| Some(seen.cancels)) >= 1);
        umount(&bench, client);
    }
}

#[test]
fn whoever_waits_goes_on_with_the_next_connection() {
    let name = "whoever_waits_goes_on_with_the_next_connection";
    let Some(_on) = Switched::to("Y", name) else { return };
    let (bench, client) = mounted(Terms::default(), "uring=on");
    let path = bench.mountpoint.display().to_string();
    let lanes = bench.host.wait_for("hellos", |seen| Some(seen.hellos.len() as u64));
    let reader = hanging(&bench);
    for round in 1..4 {
        // Silence, that only a PING finds, in the last one.
        if round == 3 {
            bench.host.go_silent()
        } else {
            bench.host.cut()
        }
        uses::wait_repeats(&bench, round);
        if round == 3 {
            assert!(bench.run(&["reconnect", &path]).status.success(), "the idle lanes too");
        }
        let waited = bench.run(&["wait", "--resumed", "--timeout", "20", &path]);
        assert!(waited.status.success(), "{waited:?}");
        uses::use_mount(&bench);
    }
    let status = status_of(&bench);
    assert!(status["resumes"].as_u64() >= Some(2 * lanes), "{status}");
    bench.host.set_mood(Mood::LosesReplies);
    let path = bench.file("big");
    let writer = std::thread::spawn(move || {
        let file = File::options().write(true).open(path).expect("open");
        let data: Vec<u8> = (0..1 << 20).map(big_byte).collect();
        file.write_all_at(&data, 0).expect("write");
    });
    bench.host.wait_for("a lost reply", |seen| (seen.lost > 0).then_some(()));
    bench.host.set_mood(Mood::CutsRequest);
    bench.host.cut();
    within("the write", move || writer.join()).expect("written");
    assert_eq!(bench.host.wait_for("writes", |seen| Some(seen.written)), 1 << 20);
    // By the connection that the lane has now.
    bench.host.wait_for("repeats", |seen| {
        (seen.repeats_ended > 0 && seen.repeats_running >= 4).then_some(())
    });
    deny_read(&bench, reader);
    wait_until("the slots", || bench.host.slots_in_use() == 0);
    umount(&bench, client);
}

#[test]
fn killed_and_overdue_readers_get_out_while_it_is_cut() {
    let name = "killed_and_overdue_readers_get_out_while_it_is_cut";
    let Some(_on) = Switched::to("Y", name) else { return };
    for options in ["uring=on", "uring=on,soft,timeout=1"] {
        let is_soft = options.contains("soft");
        let (bench, client) = mounted(Terms::default(), options);
        let in_flight = hanging(&bench);
        let hidden = bench.host.hide();
        bench.host.cut();
        wait_until("the cut", || status_of(&bench)["resuming"] == true);
        let parked = bench.cat("hello");
        if !is_soft {
            wait_until("the park", || status_of(&bench)["parked"] == 1);
            in_flight.kill();
            parked.kill();
        }
        for reader in [in_flight, parked] {
            let output = reader.wait();
            let words = stderr_of(&output);
            assert_eq!(words.contains("Input/output error"), is_soft, "{output:?}");
        }
        assert!(status_of(&bench)["abandoned"].as_u64() >= Some(1));
        drop(hidden);
        bench.host.wait_for("the ABANDON", |seen| (seen.abandons >= 1).then_some(()));
        let path = bench.mountpoint.display().to_string();
        assert!(bench.run(&["wait", "--resumed", &path]).status.success());
        uses::use_mount(&bench);
        wait_until("the slots", || bench.host.slots_in_use() == 0);
        umount(&bench, client);
    }
}

#[test]
fn what_the_device_lane_cannot_give_back_others_do() {
    let name = "what_the_device_lane_cannot_give_back_others_do";
    let Some(_on) = Switched::to("Y", name) else { return };
    let (bench, client) = mounted(Terms::default(), "uring=on");
    let look = |name: &str| {
        let file = bench.file(name);
        within("a look", move || file.metadata().expect("there").len())
    };
    let lanes = || bench.host.wait_for("lanes", |seen| Some(seen.forget_lanes.clone()));
    bench.host.set_mood(Mood::LosesForgets);
    look("hello");
    forget_until("a forget", || !lanes().is_empty());
    // Lane 0 waits for the answer; the lane that brings new nodes takes some back.
    wait_until("another lane's", || {
        look("big");
        drop_caches();
        lanes().len() > 1
    });
    let by = lanes();
    assert!(by[0] == 0 && by[1..].iter().all(|&lane| lane != 0), "{by:?}");
    bench.host.set_mood(Mood::Fair);
    bench.host.cut();
    bench.host.wait_for("both again", |seen| (seen.repeats_ended >= 2).then_some(()));
    wait_connected(&bench);
    use_mount(&bench);
    forget_until("all", || lookups(&bench).is_empty() && known(&bench) == (0, 0));
    wait_until("the slots", || bench.host.slots_in_use() == 0);
    umount(&bench, client);
}

#[test]
fn signals_end_it() {
    let Some(_on) = Switched::to("Y", "signals_end_it") else { return };
    let (bench, client) = mounted(Terms::default(), "uring=on");
    client.signal(Signal::INT);
    ended(&bench, client);

    // The second one ends a request that hangs.
    let (bench, client) = mounted(Terms::default(), "uring=on");
    let reader = hanging(&bench);
    end_by_signals(&bench, client, reader);
}

#[test]
fn a_killed_client_leaves_tasks_free_and_no_mount() {
    let name = "a_killed_client_leaves_tasks_free_and_no_mount";
    let Some(_on) = Switched::to("Y", name) else { return };
    let (bench, client) = mounted(Terms::default(), "uring=on");
    let reader = hanging(&bench);
    client.signal(Signal::KILL);
    assert_eq!(client.wait().0.signal(), Some(9));
    let output = reader.wait();
    assert!(!output.status.success(), "{output:?}");
    wait_until("the unmount", || !bench.is_mounted());
}
