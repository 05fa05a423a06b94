//! The client itself is killed: another one takes the mount over, nobody who uses the mount sees
//! it, and nothing runs twice; where that cannot be, the mount is cleaned up. Needs root, FUSE, and
//! a kernel that sends requests again (6.9).

#[allow(dead_code, reason = "the other tests use more of it")]
mod bench;
#[allow(dead_code, reason = "the other tests use more of it")]
mod host;

use bench::uses::*;
use bench::*;
use host::{HANG, HELLO_TEXT, Mood, Terms, big_byte};
use ringfs_wire::abi::init::DO_READDIRPLUS;
use ringfs_wire::slot::SlotUse;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[test]
fn what_is_in_flight_goes_on_with_the_next_client() {
    if !kernel_resends("what_is_in_flight_goes_on_with_the_next_client") {
        return;
    }
    for options in ["lanes=2", "lanes=1,checksum=on,spin=0", "lanes=3,slots=2"] {
        let (bench, client) = mounted(Terms::default(), options);
        let reader = hanging(&bench);
        for round in 1..4 {
            let pid = worker(&bench);
            if round == 3 {
                kill_process(pid, Signal::STOP).expect("stop");
            }
            let signal = if round == 2 { Signal::ABORT } else { Signal::KILL };
            kill_process(pid, signal).expect("kill");
            wait_until("the next client", || worker(&bench) != pid);
            wait_repeats(&bench, round);
            use_mount(&bench);
        }
        wait_connected(&bench);
        let status = status_of(&bench);
        assert_eq!((&status["takeovers"], &status["alone_why"]), (&3.into(), &().into()));
        assert_eq!(bench.host.wait_for("reads", |seen| Some(seen.hanging.len())), 1, "{options}");
        deny_read(&bench, reader);
        let stderr = umount(&bench, client);
        assert!(stderr.contains("another one takes the mount over"), "{stderr}");
    }
}

#[test]
fn kills_under_load_lose_and_double_nothing() {
    if !kernel_resends("kills_under_load_lose_and_double_nothing") {
        return;
    }
    static STOP: AtomicBool = AtomicBool::new(false);
    let (bench, client) =
        mounted(Terms { init_flags: DO_READDIRPLUS, ..Terms::default() }, "lanes=2,cache=never");
    let writers: Vec<_> = (0..3).map(|_| writer(&bench, &STOP)).collect();
    let root = bench.mountpoint.clone();
    let looker = std::thread::spawn(move || {
        while !STOP.load(Ordering::Relaxed) {
            assert_eq!(std::fs::read_dir(&root).expect("list").count(), 3);
            for name in ["hello", "big", "n1", "n2"] {
                std::fs::metadata(root.join(name)).expect("stat");
            }
            let bytes = std::fs::read(root.join("hello")).expect("read");
            assert_eq!(bytes, HELLO_TEXT);
            // By the pipe: of what a dead client had in it the kernel has seen nothing.
            let mut large = vec![0; 128 << 10];
            let big = File::open(root.join("big")).expect("open");
            big.read_exact_at(&mut large, 4096).expect("read");
            assert!((4096..).zip(&large).all(|(at, &byte)| byte == big_byte(at)));
        }
    });
    for _ in 0..20 {
        if !bench.is_mounted() {
            let (status, stderr) = client.wait();
            panic!("the mount has ended: {status} {stderr}");
        }
        kill_worker(&bench, Signal::KILL);
    }
    STOP.store(true, Ordering::Relaxed);
    let written: u64 =
        within("the work", move || writers.into_iter().map(|w| w.join().expect("w")).sum());
    within("the looks", move || looker.join()).expect("they saw what is there");
    assert_eq!(bench.host.wait_for("writes", |seen| Some(seen.written)), written);
    wait_connected(&bench);
    // What the client knows of the kernel is what the daemon gave it.
    let before = lookups(&bench);
    bench.host.restart(false, None);
    let told = bench.host.wait_for("a rebuild", |seen| {
        seen.rebuilds.iter().find(|rebuild| rebuild.end.is_some()).cloned()
    });
    let counts = told.nodes.iter().map(|(id, count, _)| (*id, *count as i64));
    assert_eq!(counts.collect::<BTreeMap<_, _>>(), before);
    use_mount(&bench);
    umount(&bench, client);
}

#[test]
fn replies_and_forgets_that_were_on_their_way_count_once() {
    if !kernel_resends("replies_and_forgets_that_were_on_their_way_count_once") {
        return;
    }
    for mood in [Mood::LosesReplies, Mood::LosesEntries] {
        let (bench, client) = mounted(Terms::default(), "lanes=1");
        let held = hold(&bench, &["hello"]);
        bench.host.set_mood(mood);
        let reader = bench.cat("n5");
        bench.host.wait_for("a lost reply", |seen| (seen.lost > 0).then_some(()));
        bench.host.set_mood(Mood::Fair);
        kill_worker(&bench, Signal::KILL);
        // `n5` cannot be opened.
        let _ = reader.wait();
        drop(held);
        wait_until("the closes", || known(&bench).1 == 0);
        // The FORGETs' replies are lost too, with the client that waits for them.
        bench.host.set_mood(Mood::LosesForgets);
        let lost = bench.host.wait_for("losses", |seen| Some(seen.lost));
        // Others drop caches too: the ones above may be forgotten by now.
        let other = bench.file("n7");
        forget_until("a lost FORGET", || {
            std::fs::metadata(&other).expect("stat");
            bench.host.wait_for("losses", |seen| Some(seen.lost)) > lost
        });
        bench.host.set_mood(Mood::Fair);
        kill_worker(&bench, Signal::KILL);
        forget_until("the forgets", || lookups(&bench).is_empty());
        wait_until("their end", || known(&bench) == (0, 0));
        umount(&bench, client);
    }
}

/// Bytes of the file that a client leaves to the next one.
fn kept_bytes(bench: &Bench) -> u64 {
    let fds = format!("/proc/{}/fd", worker(bench).as_raw_pid());
    let is_it = |fd: &PathBuf| {
        std::fs::read_link(fd).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:ringfs"))
    };
    let mut fds = std::fs::read_dir(fds).expect("its fds").map(|fd| fd.expect("an fd").path());
    std::fs::metadata(fds.find(is_it).expect("the file")).expect("stat").blocks() * 512
}

#[test]
fn nodes_that_were_given_back_are_not_kept_for_ever() {
    if !kernel_resends("nodes_that_were_given_back_are_not_kept_for_ever") {
        return;
    }
    const NODES: u64 = 2000;
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let pass = |round: u64| {
        let root = bench.mountpoint.clone();
        within("lookups", move || {
            for n in round * NODES..(round + 1) * NODES {
                std::fs::metadata(root.join(format!("n{n}"))).expect("stat");
            }
        });
        forget_until("the forgets", || lookups(&bench).is_empty());
        wait_until("their end", || known(&bench) == (0, 0));
    };
    (0..2).for_each(pass);
    let before = kept_bytes(&bench);
    (2..12).for_each(pass);
    let after = kept_bytes(&bench);
    // Each of 64 logs may have 8 KiB that are over; all that was told is over 1 MiB.
    assert!(after <= before + 64 * (8 << 10), "{before} -> {after}");
    umount(&bench, client);
}

#[test]
fn who_is_killed_without_a_client_gets_out() {
    if !kernel_resends("who_is_killed_without_a_client_gets_out") {
        return;
    }
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let reader = hanging(&bench);
    // Stopped, the keeper sees nothing of the death.
    client.signal(Signal::STOP);
    let pid = worker(&bench);
    kill_process(pid, Signal::KILL).expect("kill");
    wait_until("the end", || status_now(&bench).is_null());
    reader.kill();
    client.signal(Signal::CONT);
    assert_eq!(reader.wait().status.signal(), Some(9));
    bench.host.wait_for("its end at the daemon", |seen| {
        (seen.cancels > 0 || seen.abandons > 0).then_some(())
    });
    wait_until("the slot", || status_of(&bench)["in_flight"] == 0);
    use_mount(&bench);
    umount(&bench, client);
}

#[test]
fn client_and_daemon_may_go_together() {
    if !kernel_resends("client_and_daemon_may_go_together") {
        return;
    }
    for knows_slots in [false, true] {
        let (bench, client) = mounted(Terms::default(), "lanes=2");
        let reader = hanging(&bench);
        bench.host.restart(knows_slots, None);
        kill_worker(&bench, Signal::KILL);
        let twice = |seen: &mut host::Seen| (seen.hanging.len() > 1).then_some(());
        bench.host.wait_for("the read again", twice);
        kill_worker(&bench, Signal::KILL);
        wait_repeats(&bench, 1);
        use_mount(&bench);
        deny_read(&bench, reader);
        umount(&bench, client);
    }
}

#[test]
fn what_a_soft_mount_waits_for_is_waited_for_no_longer_by_the_next_client() {
    if !kernel_resends("what_a_soft_mount_waits_for_is_waited_for_no_longer_by_the_next_client") {
        return;
    }
    let (bench, client) = mounted(Terms::default(), "lanes=2,soft,timeout=1");
    let in_flight = hanging(&bench);
    let hidden = bench.host.hide();
    let pid = worker(&bench);
    kill_process(pid, Signal::STOP).expect("stop");
    bench.host.cut();
    kill_process(pid, Signal::KILL).expect("kill");
    wait_until("the next client", || worker(&bench) != pid);
    for reader in [in_flight, bench.cat("hello")] {
        let words = stderr_of(&reader.wait());
        assert!(words.contains("Input/output error"), "{words}");
    }
    drop(hidden);
    wait_connected(&bench);
    use_mount(&bench);
    let stderr = umount(&bench, client);
    assert!(stderr.contains("(soft)"), "{stderr}");
}

#[test]
fn signals_reach_the_client_that_is_there() {
    if !kernel_resends("signals_reach_the_client_that_is_there") {
        return;
    }
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    kill_worker(&bench, Signal::KILL);
    client.signal(Signal::TERM);
    ended(&bench, client);
    bench.host.assert_no_faults();
}

#[test]
fn the_next_client_is_not_asked_for_what_has_failed() {
    if !kernel_resends("the_next_client_is_not_asked_for_what_has_failed") {
        return;
    }
    let (bench, mut client) = mounted(Terms::default(), "lanes=2");
    let mut words = client.words();
    let cover = Cover::over(&bench.mountpoint);
    for _ in 0..3 {
        client.signal(Signal::TERM);
        words.until("the mount goes on");
    }
    drop(cover);
    let held = hold(&bench, &["big"]);
    kill_worker(&bench, Signal::KILL);
    use_mount(&bench);
    client.signal(Signal::TERM);
    words.until("is in use");
    // It was the first one: who holds it is served.
    drop(held);
    ended(&bench, client);
}

/// Who reads the superblock, by ustat(2), which other machines do not have: no use of the mount,
/// but an unmount waits for it.
#[cfg(target_arch = "x86_64")]
fn stat_superblock(bench: &Bench) -> Reader {
    let dev = status_of(bench)["dev_minor"].as_u64().expect("a mount table");
    let dev = (dev & 0xff) | (dev & !0xff) << 12;
    let code = "my ($dev, $out) = ($ARGV[0] + 0, '0' x 32); syscall(136, $dev, $out)";
    let mut command = Command::new("perl");
    command.args(["-e", code, &dev.to_string()]);
    Reader { child: command.spawn().expect("perl") }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_client_may_die_while_its_mount_is_unmounted() {
    if !kernel_resends("a_client_may_die_while_its_mount_is_unmounted") {
        return;
    }
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let pid = worker(&bench);
    let asker = stat_superblock(&bench);
    let (lane, at) = bench.host.wait_for("a STATFS", |seen| seen.hanging.first().copied());
    client.signal(Signal::TERM);
    wait_until("the unmount", || !bench.is_mounted());
    kill_process(pid, Signal::KILL).expect("kill");
    wait_repeats(&bench, 1);
    bench.host.answer_hanging(lane, at, 5);
    asker.wait();
    let (status, stderr) = client.wait();
    assert!(status.success(), "{status} {stderr}");
    assert_nothing_left(&bench);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_second_signal_ends_an_unmount_that_hangs() {
    for killed in [false, true] {
        let (bench, client) = mounted(Terms::default(), "lanes=2");
        let (pid, asker) = (worker(&bench), stat_superblock(&bench));
        bench.host.wait_for("a STATFS", |seen| seen.hanging.first().copied());
        client.signal(Signal::TERM);
        wait_until("the unmount", || !bench.is_mounted());
        if killed && kernel_resends("a_second_signal_ends_an_unmount_that_hangs") {
            kill_process(pid, Signal::KILL).expect("kill");
            wait_repeats(&bench, 1);
        }
        client.signal(Signal::TERM);
        asker.wait();
        let (status, stderr) = client.wait();
        assert_eq!(status.code(), Some(3), "{stderr}");
    }
}

#[test]
fn a_mount_that_nobody_takes_over_is_cleaned_up_and_says_so() {
    let (bench, client) = mounted(Terms::default(), "lanes=2,nokeep");
    assert_eq!(status_of(&bench)["alone_why"], "nokeep");
    let reader = hanging(&bench);
    let begun = Awake::begin();
    kill_process(worker(&bench), Signal::KILL).expect("kill");
    assert!(!reader.wait().status.success());
    failed(&bench, client, "nobody can take over (nokeep): it is unmounted");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn who_is_killed_before_the_mount_is_ready_ends_and_is_cleaned_up() {
    let bench = Bench::new(Terms { root_errno: HANG, ..Terms::default() });
    let mut command = bench.command(&["mount", "-f", &bench.source("data")]);
    command.arg(&bench.mountpoint).stdout(Stdio::null()).stderr(Stdio::piped());
    let client = Client { child: Some(command.spawn().expect("spawn")) };
    bench.host.wait_for("the first GETATTR", |seen| seen.hanging.first().copied());
    let pid = client.pid().as_raw_pid();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let worker = children.expect("/proc").trim().parse().expect("one child");
    kill_process(Pid::from_raw(worker).expect("a pid"), Signal::KILL).expect("kill");
    let (status, stderr) = client.wait();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("(it was not ready yet): it is unmounted"), "{stderr}");
    assert!(!bench.is_mounted());
}

#[test]
fn a_keeper_that_cannot_start_the_next_client_waits_or_cleans_up() {
    if !kernel_resends("a_keeper_that_cannot_start_the_next_client_waits_or_cleans_up") {
        return;
    }
    for passes in [true, false] {
        let (bench, mut client) = mounted(Terms::default(), "lanes=2");
        let reader = hanging(&bench);
        let before = without_fds(client.pid(), 2);
        kill_process(worker(&bench), Signal::KILL).expect("kill");
        let mut stderr = client.words_until("cannot start the next client: trying again");
        assert!(bench.is_mounted());
        if passes {
            let back = prlimit(Some(client.pid()), Resource::Nofile, before);
            back.expect("the keeper is ours");
            use_mount(&bench);
            reader.kill();
            reader.wait();
            // Given up while its lane had no connection: with one, the daemon is told.
            wait_until("the slot", || status_of(&bench)["in_flight"] == 0);
            umount(&bench, client);
            continue;
        }
        client.signal(Signal::TERM);
        assert!(!reader.wait().status.success());
        let (status, _) = client.wait();
        let mut rest = String::new();
        stderr.read_to_string(&mut rest).expect("utf-8");
        assert_eq!(status.code(), Some(3), "{rest}");
        assert!(rest.contains("gives up: it is unmounted, and what was in flight"), "{rest}");
        assert!(!bench.is_mounted());
    }
}

#[test]
fn the_next_client_knows_of_an_append_that_may_have_run() {
    if !kernel_resends("the_next_client_knows_of_an_append_that_may_have_run") {
        return;
    }
    let bench = Bench::new(Terms::default());
    let client = bench.mount("lanes=2");
    let file = append_halfway(&bench);
    kill_worker(&bench, Signal::KILL);
    append_rest(&bench, &file);
    drop(file);
    umount(&bench, client);
}

/// Processes that tell the kernel of names, of the mount with that number.
fn tellers(minor: &str) -> usize {
    let is_teller = |entry: &std::fs::DirEntry| {
        let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
        let is_one = words.get(1) == Some(&&b"expire"[..]) && words.contains(&minor.as_bytes());
        // Whoever sees processes does not see names.
        assert!(!is_one || !words.contains(&&b"hello"[..]));
        is_one
    };
    let all = std::fs::read_dir("/proc").expect("/proc");
    all.filter_map(Result::ok).filter(is_teller).count()
}

/// The directory's lock is held by one who waits for the host, and who tells the kernel of a name
/// that is gone waits for that lock.
fn teller_waits(bench: &Bench) -> (Reader, (u8, SlotUse), String) {
    let minor = status_of(bench)["dev_minor"].as_u64().expect("a mount table").to_string();
    let first = unlink_unanswered(bench);
    let second = unlink(bench, "hang");
    let stat = format!("/proc/{}/stat", second.child.id());
    wait_until("who waits for the lock", || {
        let stat = std::fs::read_to_string(&stat).expect("a process");
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('D'))
    });
    bench.host.restart(false, None);
    assert!(!first.wait().status.success());
    let at = bench.host.wait_for("the second one", |seen| seen.hanging.first().copied());
    wait_until("who tells the kernel", || tellers(&minor) == 1);
    (second, at, minor)
}

#[test]
fn who_tells_of_a_name_hinders_no_takeover() {
    if !kernel_resends("who_tells_of_a_name_hinders_no_takeover") {
        return;
    }
    let bench = Bench::new(Terms { names_valid: 86_400, ..Terms::default() });
    let client = bench.mount("lanes=2");
    let held = hold(&bench, &["hello"]);
    let (second, (lane, at), minor) = teller_waits(&bench);
    kill_worker(&bench, Signal::KILL);
    bench.host.answer_hanging(lane, at, 13);
    let words = stderr_of(&second.wait());
    assert!(words.contains("Permission denied"), "{words}");
    wait_unlinked(&bench);
    wait_until("the end of who tells", || tellers(&minor) == 0);
    drop(held);
    umount(&bench, client);
}

#[test]
fn who_tells_of_a_name_keeps_nobody_waiting_for_ever() {
    let bench = Bench::new(Terms { names_valid: 86_400, ..Terms::default() });
    let client = bench.mount("lanes=2");
    let (second, _, minor) = teller_waits(&bench);
    let worker = worker(&bench);
    // Nobody is left but the one who tells, and has a copy of the session's fd.
    client.signal(Signal::STOP);
    kill_process(worker, Signal::KILL).expect("kill");
    client.signal(Signal::KILL);
    assert_eq!(client.wait().0.signal(), Some(9));
    assert!(!second.wait().status.success());
    wait_until("the end of who tells", || tellers(&minor) == 0);
}

#[test]
fn a_keeper_that_fails_leaves_no_client() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let (pid, reader) = (worker(&bench), hanging(&bench));
    // It does not end by itself when its keeper is gone.
    kill_process(pid, Signal::STOP).expect("stop");
    // Of more fds than a process may have poll(2) wants nothing; this has the keeper call it.
    let limit = Rlimit { current: Some(1), ..getrlimit(Resource::Nofile) };
    prlimit(Some(client.pid()), Resource::Nofile, limit).expect("the keeper is ours");
    client.signal(Signal::CHILD);
    let (status, stderr) = client.wait();
    assert!(kill_process(pid, Signal::KILL).is_err(), "the client lives: {stderr}");
    assert_eq!(status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("gives up: it"), "{stderr}");
    assert!(!reader.wait().status.success());
}

#[test]
fn a_client_that_cannot_live_is_given_up() {
    if !kernel_resends("a_client_that_cannot_live_is_given_up") {
        return;
    }
    let (bench, client) = mounted(Terms::default(), "lanes=1");
    let reader = hanging(&bench);
    for _ in 0..5 {
        kill_worker(&bench, Signal::ABORT);
    }
    kill_process(worker(&bench), Signal::ABORT).expect("kill");
    assert!(!reader.wait().status.success());
    failed(&bench, client, "it dies again and again");
}

#[test]
fn a_next_client_that_cannot_begin_leaves_no_mount() {
    if !kernel_resends("a_next_client_that_cannot_begin_leaves_no_mount") {
        return;
    }
    let bench = Bench::new(Terms::default());
    let logs = bench.dir.path().join("logs");
    std::fs::create_dir(&logs).expect("mkdir");
    let log = logs.join("log");
    let client = bench.mount_with("lanes=2", &["--log", log.to_str().expect("utf-8")]);
    let reader = hanging(&bench);
    // The next one cannot open its log.
    std::fs::remove_dir_all(&logs).expect("remove");
    kill_process(worker(&bench), Signal::KILL).expect("kill");
    assert!(!reader.wait().status.success());
    failed(&bench, client, "");
}

#[test]
fn a_keeper_that_may_not_have_the_fds_says_so_while_the_client_lives() {
    if !kernel_resends("a_keeper_that_may_not_have_the_fds_says_so_while_the_client_lives") {
        return;
    }
    let bench = Bench::new(Terms { root_errno: HANG, ..Terms::default() });
    let mut command = bench.command(&["mount", "-f", &bench.source("data")]);
    command.arg(&bench.mountpoint).stdout(Stdio::null()).stderr(Stdio::piped());
    let client = Client { child: Some(command.spawn().expect("spawn")) };
    let (lane, at) = bench.host.wait_for("the first GETATTR", |seen| seen.hanging.first().copied());
    // It may have one more.
    let set = |limit| prlimit(Some(client.pid()), Resource::Nofile, limit).expect("it is ours");
    let none = set(without_fds(client.pid(), 0));
    set(Rlimit { current: none.current.map(|most| most + 1), ..none });
    // To deny the root is to answer.
    bench.host.answer_hanging(lane, at, 13);
    let why = "the keeper may not have so many fds";
    wait_until("the words", || status_of(&bench)["alone_why"] == why);
    kill_process(worker(&bench), Signal::KILL).expect("kill");
    failed(&bench, client, &format!("nobody can take over ({why}): it is unmounted"));
}
