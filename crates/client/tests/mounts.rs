//! Real mounts of the real program, against a small daemon in this process. Needs root and FUSE.

#[allow(dead_code, reason = "the other tests use more of it")]
mod bench;
#[allow(dead_code, reason = "the other tests use more of it")]
mod host;

use bench::uses::*;
use bench::*;
use host::{BIG_BYTES, HANG, HELLO_TEXT, Host, Terms, big_byte};
use ringfs_wire::abi::{NotifyStoreOut, fopen};
use ringfs_wire::batch::{Kind, notify};
use ringfs_wire::hello::{Reason, feature};
use ringfs_wire::restore::push_node;
use rustix::process::{Pid, Resource, Signal, kill_process, prlimit};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use zerocopy::IntoBytes;

#[test]
fn files_are_read_and_written_through_the_mount() {
    for options in ["lanes=2", "lanes=2,spin=0,checksum=on", "lanes=4,slots=1", "lanes=1,ro"] {
        let (bench, client) = mounted(Terms::default(), options);
        let root = bench.mountpoint.clone();
        within("the use of the mount", move || {
            assert_eq!(std::fs::read(root.join("hello")).expect("hello"), HELLO_TEXT, "{options}");
            let names = std::fs::read_dir(&root).expect("list").map(|e| e.expect("e").file_name());
            assert_eq!(names.collect::<Vec<_>>(), ["hello", "big", "hang"]);
            let missing = std::fs::metadata(root.join("missing")).expect_err("missing");
            assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let path = root.join("big");
                    scope.spawn(move || read_big(&path, thread));
                }
            });
        });
        if !options.contains("ro") {
            let path = bench.file("big");
            within("a write", move || {
                let file = File::options().write(true).open(path).expect("open");
                let data: Vec<u8> = (0..3 << 20).map(big_byte).collect();
                file.write_all_at(&data, 0).expect("write");
            });
            let written = bench.host.wait_for("writes", |seen| Some(seen.written));
            assert_eq!(written, 3 << 20);
        }
        wait_unmounted(&bench);
        let (status, stderr) = client.wait();
        assert!(status.success(), "{status} {stderr}");
        assert_eq!(stderr, "");
        let conns = bench.host.wait_for("farewells", |seen| {
            let conns = seen.hellos.len() as u64;
            (seen.goodbyes == conns && seen.closed == conns).then_some(conns)
        });
        assert_eq!(conns, lanes_of(options));
        assert_eq!(bench.host.slots_in_use(), 0);
        let faults = bench.host.wait_for("faults", |seen| Some(seen.faults.clone()));
        assert_eq!(faults, [""; 0]);
        assert!(!bench.is_mounted());
    }
}

fn lanes_of(options: &str) -> u64 {
    let digit = options.strip_prefix("lanes=").and_then(|rest| rest.chars().next());
    digit.and_then(|digit| digit.to_digit(10)).expect("lanes=N first").into()
}

fn read_big(path: &Path, thread: usize) {
    let file = File::open(path).expect("big");
    let sizes = [4096, 1 << 20, 100, 300_000];
    let mut buffer = vec![0; sizes[thread]];
    let mut at = 0;
    while at < BIG_BYTES && at < sizes[thread] * 400 {
        let n = file.read_at(&mut buffer, at as u64).expect("read");
        assert!(n > 0 && buffer[..n].iter().enumerate().all(|(i, &b)| b == big_byte(at + i)));
        at += n;
    }
}

#[test]
fn what_the_kernel_forgets_is_given_back() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let path = bench.file("hello");
    within("a stat", move || assert!(std::fs::metadata(path).is_ok()));
    let forgets = || bench.host.wait_for("forgets", |seen| Some(seen.forgets.clone()));
    forget_until("a forget", || !forgets().is_empty());
    assert_eq!(forgets()[0].nodeid, 2);
    umount(&bench, client);
}

#[test]
fn in_the_background_the_command_returns_when_the_mount_answers() {
    let bench = Bench::new(Terms::default());
    let helper = bench.dir.path().join("mount.ringfs");
    std::os::unix::fs::symlink(PROGRAM, &helper).expect("symlink");
    let path = bench.mountpoint.display().to_string();
    let source = bench.source("data/sub/dir");
    let direct = [PROGRAM, "mount", "-o", "ro", &source, &path];
    let by_helper = [helper.to_str().expect("utf-8"), &source, &path, "-n", "-o", "ro,_netdev"];
    for line in [&direct[..], &by_helper] {
        let mut command = Command::new(line[0]);
        command.args(&line[1..]);
        let output = within("mount", move || command.output()).expect("run");
        assert!(output.status.success(), "{output:?}");
        assert!(bench.is_mounted());
        use_mount(&bench);
        let subdir =
            bench.host.wait_for("hello", |seen| seen.hellos.first().map(|h| h.subdir.clone()));
        assert_eq!(subdir, b"sub/dir");

        let status = bench.run(&["status", "--json"]);
        let entries: serde_json::Value = serde_json::from_slice(&status.stdout).expect("json");
        let entries = entries.as_array().expect("a list");
        let entry = entries.iter().find(|e| e["mountpoint"] == path.as_str()).expect("ours");
        assert_eq!(entry["source"], source.as_str());
        let client = &entry["client"];
        assert_eq!((&client["share"], &client["epoch"]), (&"data".into(), &3.into()), "{client}");
        assert!(client["requests"].as_u64() > Some(3) && client["read_only"] == true, "{client}");
        let text = String::from_utf8(bench.run(&["status"]).stdout).expect("text");
        assert!(text.contains(&format!("{source} on {path}")), "{text}");

        let pid = client["pid"].as_i64().expect("pid") as i32;
        let pid = Pid::from_raw(pid).expect("pid");
        wait_unmounted(&bench);
        bench.host.wait_for("farewell", |seen| (seen.goodbyes > 0).then(|| seen.goodbyes = 0));
        wait_until("the client's end", || rustix::process::test_kill_process(pid).is_err());
        bench.host.wait_for("reset", |seen| Some(std::mem::take(&mut seen.hellos)));
    }
}

#[test]
fn a_refused_mount_says_why_and_leaves_nothing() {
    let check = |terms: Terms, share: &str, mount_args: &[&str], expected: &str| {
        let bench = Bench::new(terms);
        let path = bench.mountpoint.display().to_string();
        let source = bench.source(share);
        for background in [&["-f"][..], &[]] {
            let args = [&["mount"], background, mount_args, &[&source, &path]].concat();
            let output = bench.run(&args);
            let stderr = stderr_of(&output);
            assert!(stderr.contains(expected), "{expected}: {stderr}");
            assert!(!output.status.success() && !bench.is_mounted(), "{output:?}");
            assert_eq!(stderr.lines().count(), 1, "{stderr}");
        }
    };
    let terms = Terms::default;
    check(terms(), "nothing", &[], "no share of that name");
    check(Terms { init_errno: 95, ..terms() }, "data", &[], "errno 95 for INIT");
    // The kernel takes more errnos than fit an exit code: 0 and EACCES are none of these.
    for root_errno in [5, 256, 256 + 13] {
        check(Terms { root_errno, ..terms() }, "data", &[], "root cannot be read: Input/output");
    }
    check(terms(), "data", &["-o", "lane=3"], "did you mean `lanes=`?");
    check(terms(), "da\u{7}ta", &[], "no share of that name");
}

#[test]
fn a_peer_that_does_not_answer_is_given_up() {
    let bench = Bench::new(Terms { root_errno: HANG, ..Terms::default() });
    let path = bench.mountpoint.display().to_string();
    let output = bench.run(&["mount", &bench.source("data"), &path]);
    let stderr = stderr_of(&output);
    assert!(stderr.contains("did not answer the first GETATTR"), "{stderr}");
    assert!(!output.status.success() && !bench.is_mounted());

    let socket = bench.dir.path().join("mute.sock");
    let mute = UnixListener::bind(&socket).expect("bind");
    let output = bench.run(&["mount", &format!("data@unix:{}", socket.display()), &path]);
    let stderr = stderr_of(&output);
    assert!(stderr.contains("did not answer within 5 s"), "{stderr}");
    assert!(!output.status.success() && !bench.is_mounted());
    drop(mute);
}

#[test]
fn bad_places_are_refused_before_anything_is_mounted() {
    let bench = Bench::new(Terms::default());
    let run = |source: &str, path: &Path| {
        let output = bench.run(&["mount", source, path.to_str().expect("utf-8")]);
        assert!(!output.status.success());
        stderr_of(&output)
    };
    let gone = run("data@unix:/nonexistent/s", &bench.mountpoint);
    assert!(gone.contains("unix:/nonexistent/s") && gone.contains("start `ringfsd"), "{gone}");
    let missing = run(&bench.source("data"), &bench.file("missing"));
    assert!(missing.contains("does not exist"), "{missing}");
    let file = run(&bench.source("data"), &bench.host.path);
    assert!(file.contains("not a directory"), "{file}");
    let client = bench.mount("lanes=1");
    let taken = run(&bench.source("data"), &bench.mountpoint);
    assert!(taken.contains("mount point already"), "{taken}");
    umount(&bench, client);
    let none = bench.umount(&[]);
    assert!(String::from_utf8_lossy(&none.stderr).contains("no ringfs mount at"));
}

#[test]
fn a_killed_reader_gets_out_and_the_daemon_is_told() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let reader = hanging(&bench);
    reader.kill();
    assert_eq!(reader.wait().status.signal(), Some(9));
    // One for the READ, and one for the FLUSH of a killed process if the kernel is quick enough.
    bench.host.wait_for("a cancel", |seen| (seen.cancels >= 1).then_some(()));
    umount(&bench, client);
}

#[test]
fn a_parked_reader_gets_out_without_the_daemon() {
    let (bench, client) = mounted(Terms { slots: 1, ..Terms::default() }, "lanes=1");
    let first = hanging(&bench);
    // It parks with its LOOKUP.
    let second = bench.cat("hang");
    wait_until("the park", || status_of(&bench)["parked"] == 1);
    second.kill();
    assert_eq!(second.wait().status.signal(), Some(9));
    wait_until("the empty park", || status_of(&bench)["parked"] == 0);
    assert_eq!(bench.host.wait_for("cancels", |seen| Some(seen.cancels)), 0);
    first.kill();
    assert_eq!(first.wait().status.signal(), Some(9));
    wait_unmounted(&bench);
    assert!(client.wait().0.success());
}

#[test]
fn a_caught_signal_disturbs_neither_what_is_parked_nor_what_is_in_flight() {
    let (bench, client) = mounted(Terms { slots: 1, ..Terms::default() }, "lanes=1");
    let read = "open F, '<', \"$ARGV[0]/hang\"; sysread F, $b, 9; print $!+0, \" $n\\n\"";
    let first = signalled(&bench, read);
    let (lane, at) = bench.host.wait_for("a read", |seen| seen.hanging.first().copied());
    let stat =
        |name| signalled(&bench, &format!("stat \"$ARGV[0]/{name}\"; print $!+0, \" $n\\n\""));
    let (second, third) = (stat("hello"), stat("big"));
    wait_until("the park", || status_of(&bench)["parked"] == 2);
    for reader in [&first, &second, &third] {
        reader.signal(Signal::USR1);
    }
    // A later SIGKILL is not announced by the kernel any more.
    wait_until("the interrupts", || status_of(&bench)["interrupts"] == 3);
    third.kill();
    let killed = Awake::begin();
    assert_eq!(third.wait().status.signal(), Some(9));
    assert!(killed.elapsed() < Duration::from_secs(2), "after {:?}", killed.elapsed());
    wait_until("the park", || status_of(&bench)["parked"] == 1);
    assert_eq!(bench.host.wait_for("cancels", |seen| Some(seen.cancels)), 0);
    bench.host.answer_hanging(lane, at, 121);
    let said = |reader: Reader| {
        let output = reader.wait();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    assert_eq!((said(first), said(second)), ("121 1".to_owned(), "0 1".to_owned()));
    umount(&bench, client);
}

#[test]
fn a_reader_that_is_killed_after_another_signal_is_told_of() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let reader = signalled(&bench, "open F, '<', \"$ARGV[0]/hang\"; sysread F, $b, 9");
    bench.host.wait_for("a read", |seen| seen.hanging.first().copied());
    reader.signal(Signal::USR1);
    wait_until("the interrupt", || status_of(&bench)["interrupts"] == 1);
    reader.kill();
    assert_eq!(reader.wait().status.signal(), Some(9));
    assert!(bench.host.wait_for("a cancel", |seen| (seen.cancels > 0).then_some(seen.cancels)) > 0);
    umount(&bench, client);
}

#[test]
fn many_waiting_requests_are_parked_and_all_answered() {
    let (bench, client) = mounted(Terms { slots: 2, ..Terms::default() }, "lanes=2");
    let path = bench.file("big");
    within("40 readers", move || {
        std::thread::scope(|scope| {
            for _ in 0..40 {
                let path = &path;
                scope.spawn(move || read_big(path, 2));
            }
        });
    });
    umount(&bench, client);
}

#[test]
fn a_daemon_that_breaks_the_protocol_or_refuses_to_go_on_ends_the_mount() {
    let goodbye: fn(&Host) = |host| host.goodbye(Reason::Denied, "maintenance");
    let unknown: fn(&Host) = |host| host.say(77, 0, &[]);
    let guest_only: fn(&Host) = |host| host.say(Kind::Forget as u8, 0, &[]);
    let invented: fn(&Host) = |host| host.say(Kind::Reply as u8, 0, &[]);
    // Whose length is another one than it says.
    let store_short: fn(&Host) = |host| store(host, &stored(2, 0, b"hello")[1..]);
    let store_beyond: fn(&Host) = |host| store(host, &stored(2, 4096, b"hello"));
    let forgotten: fn(&Host) = |host| {
        host.refuse(Some(Reason::UnknownSession));
        host.cut();
    };
    for (fault, expected) in [
        (goodbye, "may not have that share (maintenance)"),
        (unknown, "unknown kind"),
        (guest_only, "only a guest sends"),
        (invented, "broke the protocol"),
        (store_short, "a NOTIFY STORE that cannot be"),
        (store_beyond, "a NOTIFY STORE that cannot be"),
        (forgotten, "does not know this session"),
    ] {
        let (bench, client) = mounted(Terms::default(), "lanes=2");
        let reader = hanging(&bench);
        fault(&bench.host);
        let output = reader.wait();
        let words = stderr_of(&output);
        assert!(words.contains("Input/output error"), "{expected}: {output:?}");
        failed(&bench, client, expected);
    }
}

fn stored(nodeid: u64, offset: u64, content: &[u8]) -> Vec<u8> {
    let head = NotifyStoreOut { nodeid, offset, size: content.len() as u32, padding: 0 };
    [head.as_bytes(), content].concat()
}

fn store(host: &Host, body: &[u8]) {
    host.say(Kind::Notify as u8, notify::STORE, body);
}

#[test]
fn content_is_taken_for_files_that_were_not_opened_and_for_no_others() {
    let (open_flags, names_valid) = (fopen::KEEP_CACHE, 60);
    let terms = Terms { open_flags, names_valid, ..Terms::default() };
    let (bench, client) = mounted(terms, "lanes=1");
    let path = bench.file("hello");
    let text = HELLO_TEXT.to_ascii_uppercase();
    let files_stored = || status_of(&bench)["stored"].as_u64().expect("a status");
    let heard = |what: &str| {
        let before = bench.host.wait_for("pongs", |seen| Some(seen.pongs));
        bench.host.say(Kind::Ping as u8, 0, &[]);
        bench.host.wait_for(what, |seen| (seen.pongs > before).then_some(()));
    };
    // A file that the kernel does not know.
    store(&bench.host, &stored(2, 0, &text));
    heard("content of a file that is not known");
    assert_eq!(files_stored(), 0);

    let stat = path.clone();
    within("a stat", move || assert!(std::fs::metadata(stat).is_ok()));
    store(&bench.host, &stored(2, 0, &text));
    heard("content");
    assert_eq!(files_stored(), 1);
    let read = path.clone();
    let seen = within("a read", move || std::fs::read(read));
    assert_eq!(seen.expect("content"), text, "not what the host would have read");

    store(&bench.host, &stored(2, 0, HELLO_TEXT));
    heard("content of a file that was opened");
    assert_eq!(files_stored(), 1);
    let seen = within("a read", move || std::fs::read(path));
    assert_eq!(seen.expect("content"), text, "written over");
    umount(&bench, client);
}

#[test]
fn pings_are_answered_and_optional_records_skipped() {
    let (bench, client) = mounted(Terms::default(), "lanes=2,checksum=on");
    bench.host.wait_for("both connections", |seen| (seen.hellos.len() == 2).then_some(()));
    bench.host.say(Kind::Ping as u8, 0, &[]);
    bench.host.say(200, 0, b"from the future");
    let mut node = Vec::new();
    assert!(push_node(&mut node, 99, |recipe| recipe.push(1)));
    bench.host.say(Kind::Node as u8, 0, &node);
    bench.host.say(Kind::Notify as u8, 0, &[]);
    bench.host.wait_for("pongs", |seen| (seen.pongs >= 1).then_some(()));
    wait_until("the counters", || {
        let status = status_of(&bench);
        status["nodes_seen"] == 2 && status["records_skipped"] == 4
    });
    let features = bench.host.wait_for("hello", |seen| Some(seen.hellos[0].features));
    assert_eq!(features, feature::PAYLOAD_CRC | feature::RESTORE | feature::STORE);
    umount(&bench, client);
}

#[test]
fn a_signal_unmounts_and_a_busy_mount_is_served_until_it_is_free() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    client.signal(Signal::INT);
    ended(&bench, client);

    let (bench, mut client) = mounted(Terms::default(), "lanes=2");
    let path = bench.file("big");
    let file = within("open", move || File::open(path)).expect("open");
    client.signal(Signal::TERM);
    let words = client.next_words();
    assert!(words.contains("is in use") && !bench.is_mounted(), "{words}");
    within("a late read", move || {
        let mut buffer = [0; 16];
        file.read_at(&mut buffer, 0).expect("still served");
    });
    let (status, stderr) = client.wait();
    assert!(status.success(), "{status} {stderr}");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let reader = hanging(&bench);
    end_by_signals(&bench, client, reader);
}

#[test]
fn a_mount_that_cannot_be_unmounted_is_served_until_it_can() {
    for (busy, last) in [(false, 1), (true, 2)] {
        let (bench, mut client) = mounted(Terms::default(), "lanes=2");
        let path = bench.file("big");
        let file = busy.then(|| within("open", move || File::open(path)).expect("open"));
        let cover = Cover::over(&bench.mountpoint);
        let mut words = client.words();
        for pid in [worker(&bench), client.pid(), worker(&bench)] {
            kill_process(pid, Signal::TERM).expect("kill");
            words.until("the mount goes on");
        }
        drop(cover);
        use_mount(&bench);
        for nth in 1..=last {
            client.signal(Signal::INT);
            if nth < last {
                words.until("is in use");
            }
        }
        let (status, _) = client.wait();
        let code = if busy { 3 } else { 0 };
        assert!(status.code() == Some(code) && !bench.is_mounted(), "{status}");
        drop(file);
    }
}

#[test]
fn one_signal_to_both_processes_is_one() {
    for client_first in [false, true] {
        let (bench, client) = mounted(Terms::default(), "lanes=2");
        let held = hold(&bench, &["big"]);
        let mut pids = [client.pid(), worker(&bench)];
        pids.sort_by_key(|pid| (*pid == client.pid()) == client_first);
        pids.into_iter().for_each(|pid| kill_process(pid, Signal::TERM).expect("kill"));
        wait_until("the detached mount", || !bench.is_mounted());
        drop(held);
        ended(&bench, client);
    }
}

#[test]
fn a_mount_that_is_elsewhere_too_is_served_there() {
    let (bench, mut client) = mounted(Terms::default(), "lanes=2");
    let elsewhere = Bound::of(&bench);
    let mut words = client.words();
    client.signal(Signal::TERM);
    words.until("served where it is still mounted");
    assert!(!bench.is_mounted());
    client.signal(Signal::TERM);
    words.until("aborted by a second signal");
    let (status, _) = client.wait();
    assert_eq!(status.code(), Some(3));
    drop(elsewhere);

    let (bench, mut client) = mounted(Terms::default(), "lanes=2");
    let elsewhere = Bound::of(&bench);
    let mut words = client.words();
    client.signal(Signal::TERM);
    words.until("served where it is still mounted");
    drop(elsewhere);
    ended(&bench, client);
}

#[test]
fn a_client_in_the_foreground_ends_with_its_keeper() {
    let check = |hinder: fn(&Bench) -> Box<dyn std::any::Any>| {
        let (bench, client) = mounted(Terms::default(), "lanes=2");
        let pid = worker(&bench);
        let hindrance = hinder(&bench);
        client.signal(Signal::KILL);
        wait_until("the client's end", || is_over(pid));
        drop(hindrance);
    };
    check(|_| Box::new(()));
    check(|bench| Box::new(hold(bench, &["big"])));
    check(|bench| Box::new(Bound::of(bench)));
    check(|bench| Box::new(Cover::over(&bench.mountpoint)));
}

#[test]
fn whoever_has_stopped_listening_is_told_nothing() {
    let (bench, mut client) = mounted(Terms::default(), "lanes=2");
    drop(client.child.as_mut().expect("running").stderr.take());
    let path = bench.file("big");
    let file = within("open", move || File::open(path)).expect("open");
    client.signal(Signal::TERM);
    wait_until("the detached mount", || !bench.is_mounted());
    within("a late read", move || {
        let mut buffer = [0; 16];
        file.read_at(&mut buffer, 0).expect("still served");
    });
    let (status, _) = client.wait();
    assert!(status.success(), "{status}");
}

#[test]
fn a_dead_mount_can_be_removed() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let worker = worker(&bench);
    // Nobody is left to clean up.
    client.signal(Signal::STOP);
    kill_process(worker, Signal::KILL).expect("kill");
    client.signal(Signal::KILL);
    assert_eq!(client.wait().0.signal(), Some(9));
    assert!(bench.is_mounted());
    assert_eq!(status_now(&bench), serde_json::Value::Null);
    assert!(bench.umount(&["-l"]).status.success());
    assert!(!bench.is_mounted());
}

#[test]
fn a_late_answer_to_a_hanging_read_arrives() {
    let (bench, client) = mounted(Terms::default(), "lanes=1");
    let reader = hanging(&bench);
    deny_read(&bench, reader);
    umount(&bench, client);
}

/// Ticks that the main thread of a process has computed.
fn ticks(pid: Pid) -> u64 {
    let pid = pid.as_raw_pid();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/stat")).expect("stat");
    let numbers = stat.rsplit(')').next().expect("numbers").split_whitespace();
    numbers.skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("a number")).sum()
}

#[test]
fn who_asks_a_client_that_can_have_no_fd_is_answered_later_and_costs_nothing() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let pid = worker(&bench);
    let minor = status_of(&bench)["dev_minor"].as_u64().expect("a number");
    let before = without_fds(pid, 2);
    let path = format!("/run/ringfs/{}-{minor}.sock", pid.as_raw_pid());
    let mut asker = UnixStream::connect(path).expect("connect");
    asker.write_all(b"status\n").expect("ask");
    let begun = ticks(pid);
    // To be measured: nothing is waited for.
    std::thread::sleep(Duration::from_secs(1));
    let taken = ticks(pid) - begun;
    prlimit(Some(pid), Resource::Nofile, before).expect("the client is ours");
    let answer = within("the answer", move || {
        let mut answer = String::new();
        asker.read_to_string(&mut answer).map(|_| answer)
    });
    let answer = answer.expect("an answer");
    assert!(answer.contains(&format!("\"pid\":{}", pid.as_raw_pid())), "{answer}");
    assert!(taken < 10, "{taken} ticks in a second");
    umount(&bench, client);
}
