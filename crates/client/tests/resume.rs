//! Connections that are lost come again, by `/dev/fuse` (rings.rs has the same by rings): nobody
//! who uses the mount sees it, nothing runs twice, and what waits can be let go. Needs root and
//! FUSE.

#[allow(dead_code, reason = "the other tests use more of it")]
mod bench;
#[allow(dead_code, reason = "the other tests use more of it")]
mod host;

use bench::uses::*;
use bench::*;
use host::{Hidden, Host, Mood, Terms, big_byte};
use ringfs_wire::hello::Reason;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// As in lane.rs.
const PARK_FRAMES_MAX: usize = 512;

/// Writes one MiB at each of these, each by a thread of its own.
fn write(bench: &Bench, at: &[u64]) -> JoinHandle<()> {
    let path: PathBuf = bench.file("big");
    let places = at.to_vec();
    std::thread::spawn(move || {
        let file = File::options().write(true).open(path).expect("open");
        std::thread::scope(|scope| {
            for at in places {
                let file = &file;
                scope.spawn(move || {
                    let range = at as usize..at as usize + WRITE_BYTES;
                    let data: Vec<u8> = range.map(big_byte).collect();
                    assert_eq!(file.write_at(&data, at).expect("write"), WRITE_BYTES);
                });
            }
        });
    })
}

/// Processes that each have opened `big`, and do one thing with it when they are told to. (This one
/// must have no file of the mount open.)
struct Crowd(Reader);

impl Crowd {
    fn new(bench: &Bench, count: usize, what: &str) -> Crowd {
        let code = format!(
            "pipe R, W; pipe A, B; $| = 1;
            for (1..{count}) {{
                next if fork;
                close W; close A; open(F, '+<', $ARGV[0]) or exit 1;
                syswrite B, 'x'; close B; sysread R, $x, 1;
                exit({what} ? 0 : 1);
            }}
            close B; for ($n = 0; $n < {count}; $n += $more) {{ $more = sysread A, $x, 99 or die }}
            print \"open\\n\"; <STDIN>; close W; print \"told\\n\";
            $bad = 0; while (wait > 0) {{ $bad |= $? }} exit($bad != 0)"
        );
        let mut command = Command::new("perl");
        command.args(["-e", &code]).arg(bench.file("big"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut crowd = Crowd(Reader { child: command.spawn().expect("perl") });
        crowd.hear("open");
        crowd
    }

    fn reading(bench: &Bench, count: usize) -> Crowd {
        Crowd::new(bench, count, "sysread(F, $x, 4096)")
    }

    fn hear(&mut self, words: &'static str) {
        let mut stdout = self.0.child.stdout.take().expect("piped");
        let line = within(words, move || {
            let mut line = [0; 5];
            stdout.read_exact(&mut line).map(|()| (line, stdout))
        });
        let (line, stdout) = line.expect("a line");
        assert_eq!(&line[..4], words.as_bytes());
        self.0.child.stdout = Some(stdout);
    }

    fn go(&mut self) {
        drop(self.0.child.stdin.take());
        self.hear("told");
    }

    fn succeeds(self) -> bool {
        self.0.wait().status.success()
    }
}

fn join(what: &str, thread: JoinHandle<()>) {
    within(what, move || thread.join()).expect("it has what it wanted");
}

/// Both lanes lose their connections, and get no others while what this gives lives.
fn cut_off(bench: &Bench) -> Hidden {
    let hidden = bench.host.hide();
    bench.host.cut();
    wait_until("the cut", || status_of(bench)["lanes_without_connection"] == 2);
    hidden
}

fn wait_resumes(host: &Host, at_least: u64) {
    host.wait_for("resumes", |seen| (seen.resumes >= at_least).then_some(()));
}

#[test]
fn whoever_waits_goes_on_with_the_next_connection() {
    let cut: fn(&Host) = |host| host.cut();
    let goodbye: fn(&Host) = |host| host.goodbye(Reason::Shutdown, "maintenance");
    let babble: fn(&Host) = |host| host.babble();
    for (options, fault) in
        [("lanes=2", cut), ("lanes=1,checksum=on,spin=0", goodbye), ("lanes=2", babble)]
    {
        let (bench, client) = mounted(Terms::default(), options);
        let lanes = if options.contains("lanes=2") { 2 } else { 1 };
        let reader = hanging(&bench);
        for round in 1..4 {
            fault(&bench.host);
            wait_resumes(&bench.host, round * lanes);
            wait_repeats(&bench, round);
            use_mount(&bench);
            // What the host has welcomed the client may not have yet: cut then it is no cut.
            wait_connected(&bench);
        }
        deny_read(&bench, reader);
        let status = status_of(&bench);
        assert_eq!((&status["connected"], &status["resuming"]), (&true.into(), &false.into()));
        assert_eq!(
            (&status["cuts"], &status["resumes"]),
            (&(3 * lanes).into(), &(3 * lanes).into())
        );
        let stderr = umount(&bench, client);
        assert!(stderr.contains("resuming") && stderr.contains("resumed"), "{stderr}");
    }
}

#[test]
fn a_request_whose_reply_was_lost_runs_once() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    use_mount(&bench);
    // A large frame, and small ones before it: LOOKUP and OPEN.
    bench.host.set_mood(Mood::LosesFirstReplies);
    let writer = write(&bench, &[0]);
    for lost in 1..10 {
        bench.host.wait_for("a lost reply", |seen| (seen.lost >= lost).then_some(()));
        let writes = bench.host.wait_for("writes", |seen| Some(seen.writes));
        bench.host.cut();
        bench.host.wait_for("the request again", |seen| (seen.repeats_ended >= lost).then_some(()));
        if writes > 0 {
            break;
        }
    }
    bench.host.set_mood(Mood::Fair);
    bench.host.cut();
    join("the write", writer);
    let written = bench.host.wait_for("writes", |seen| Some(seen.written));
    assert_eq!(written, WRITE_BYTES as u64);
    umount(&bench, client);
}

#[test]
fn batches_are_cut_in_the_middle_both_ways() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    for (round, mood) in
        [Mood::CutsReply, Mood::CutsRequest].into_iter().cycle().take(20).enumerate()
    {
        let before = bench.host.wait_for("resumes", |seen| Some(seen.resumes));
        bench.host.set_mood(mood);
        let writer = write(&bench, &[(round as u64 % 4) << 20]);
        wait_resumes(&bench.host, before + 1);
        join("the write", writer);
    }
    let written = bench.host.wait_for("writes", |seen| Some(seen.written));
    assert_eq!(written, 20 << 20, "each runs once");
    umount(&bench, client);
}

#[test]
fn many_large_writes_are_kept() {
    let (bench, client) = mounted(Terms::default(), "lanes=1");
    // Warm, so that the replies lost are those of WRITEs.
    join("a write", write(&bench, &[0]));
    bench.host.set_mood(Mood::LosesReplies);
    let at: Vec<u64> = (0..24).map(|n| (n % 4) << 20).collect();
    let writer = write(&bench, &at);
    // Opens are lost too: cut until all are through.
    let mut cuts = 0;
    while !writer.is_finished() {
        let in_use = |seen: &mut host::Seen| (seen.lost > 0).then(|| seen.lost = 0);
        if cuts < 3 {
            bench.host.wait_for("lost replies", in_use);
        } else {
            bench.host.set_mood(Mood::Fair);
        }
        bench.host.cut();
        cuts += 1;
        wait_resumes(&bench.host, cuts);
        if cuts > 3 {
            break;
        }
    }
    join("the writes", writer);
    let writes = bench.host.wait_for("writes", |seen| Some(seen.written));
    assert_eq!(writes, 25 << 20, "each runs once");
    umount(&bench, client);
}

#[test]
fn a_refused_reconnect_is_tried_until_it_is_accepted() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let reader = hanging(&bench);
    bench.host.refuse(Some(Reason::Limit));
    bench.host.cut();
    bench.host.wait_for("refusals", |seen| (seen.refusals >= 4).then_some(()));
    let status = status_of(&bench);
    assert_eq!((&status["resuming"], &status["in_flight"]), (&true.into(), &1.into()), "{status}");
    let text = String::from_utf8(bench.run(&["status"]).stdout).expect("text");
    assert!(text.contains("RESUMING"), "{text}");
    bench.host.refuse(None);
    wait_resumes(&bench.host, 2);
    wait_repeats(&bench, 1);
    deny_read(&bench, reader);
    let stderr = umount(&bench, client);
    let tries = stderr.lines().filter(|line| line.contains("trying on")).count();
    assert!(tries == 1 && stderr.contains("at its limit"), "told once: {stderr}");
}

#[test]
fn a_refusal_does_not_say_where_an_older_ticket_is_good() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    // The WELCOME of lane 1 is lost with the connection of lane 0, and the next HELLO is refused.
    bench.host.set_mood(Mood::LosesWelcome);
    bench.host.cut_lane(1);
    wait_resumes(&bench.host, 2);
    use_mount(&bench);
    bench.host.wait_for("no rebuild", |seen| {
        assert_eq!((seen.refusals, seen.rebuilds.len()), (1, 0), "{:?}", seen.hellos);
        let conns = seen.hellos.iter().map(|hello| hello.conn);
        assert_eq!(conns.collect::<Vec<_>>(), [0, 1, 1, 0]);
        let numbers: Vec<u32> = seen.hellos.iter().map(|hello| hello.nth).collect();
        assert_eq!(numbers, [0, 0, 3, 4], "each is counted, the lost ones too");
        Some(())
    });
    umount(&bench, client);
}

#[test]
fn killed_processes_get_out_while_it_is_cut() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let in_flight = hanging(&bench);
    let hidden = cut_off(&bench);
    let parked = bench.cat("hello");
    wait_until("the park", || status_of(&bench)["parked"] == 1);
    for reader in [in_flight, parked] {
        let killed = Awake::begin();
        reader.kill();
        assert_eq!(reader.wait().status.signal(), Some(9));
        assert!(killed.elapsed() < Duration::from_secs(2), "after {:?}", killed.elapsed());
    }
    let status = status_of(&bench);
    assert_eq!((&status["abandoned"], &status["abandoned_total"]), (&1.into(), &1.into()));
    drop(hidden);
    wait_resumes(&bench.host, 2);
    bench.host.wait_for("the ABANDON", |seen| (seen.abandons == 1).then_some(()));
    wait_until("the slot", || status_of(&bench)["in_flight"] == 0);
    use_mount(&bench);
    assert_eq!(bench.host.wait_for("cancels", |seen| Some(seen.cancels)), 0);
    umount(&bench, client);
}

/// A cut mount of one lane that parks all that it may, and reads the device no more.
fn filled_up(options: &str) -> (Bench, Client, Crowd, Hidden, [Reader; 2]) {
    let (bench, client) = mounted(Terms::default(), options);
    let in_flight = hanging(&bench);
    let mut crowd = Crowd::reading(&bench, PARK_FRAMES_MAX + 8);
    let hidden = bench.host.hide();
    bench.host.cut();
    wait_until("the cut", || status_of(&bench)["lanes_without_connection"] == 1);
    let parked = fill_park(&bench, &mut crowd);
    (bench, client, crowd, hidden, [in_flight, parked])
}

/// Where no request gets a slot: all that may be parked is, and the device is read no more. One of
/// those that wait.
fn fill_park(bench: &Bench, crowd: &mut Crowd) -> Reader {
    let parked = bench.cat("hello");
    wait_until("the park", || status_of(bench)["parked"] == 1);
    crowd.go();
    wait_until("a full park", || status_of(bench)["parked"] == PARK_FRAMES_MAX);
    parked
}

#[test]
fn killed_processes_get_out_while_nothing_more_can_be_parked() {
    let (bench, client, crowd, hidden, [in_flight, parked]) = filled_up("lanes=1");
    let killed = Instant::now();
    parked.kill();
    assert_eq!(parked.wait().status.signal(), Some(9));
    assert!(killed.elapsed() < Duration::from_secs(4), "after {:?}", killed.elapsed());
    wait_until("one in its place", || status_of(&bench)["parked"] == PARK_FRAMES_MAX);
    // It has a file open: then there is a FLUSH, which nobody reads.
    in_flight.kill();
    wait_until("its answer", || status_of(&bench)["abandoned_total"] == 1);
    drop(hidden);
    assert_eq!(in_flight.wait().status.signal(), Some(9));
    assert!(crowd.succeeds());
    use_mount(&bench);
    umount(&bench, client);
}

#[test]
fn killed_processes_get_out_while_the_daemon_makes_no_room() {
    let (bench, client) = mounted(Terms { slots: 1, ..Terms::default() }, "lanes=1");
    let mut crowd = Crowd::reading(&bench, PARK_FRAMES_MAX + 8);
    let in_flight = hanging(&bench);
    let parked = fill_park(&bench, &mut crowd);
    parked.kill();
    assert_eq!(parked.wait().status.signal(), Some(9));
    deny_read(&bench, in_flight);
    assert!(crowd.succeeds());
    use_mount(&bench);
    umount(&bench, client);
    assert_eq!(bench.host.wait_for("resumes", |seen| Some(seen.resumes)), 0);
}

#[test]
fn a_soft_mount_fails_also_what_could_not_be_parked() {
    let (bench, client, crowd, hidden, readers) = filled_up("lanes=1,soft,timeout=8");
    assert!(readers.into_iter().all(|reader| !reader.wait().status.success()));
    assert!(!crowd.succeeds());
    drop(hidden);
    wait_resumes(&bench.host, 1);
    let path = bench.mountpoint.display().to_string();
    assert!(bench.run(&["wait", "--resumed", &path]).status.success());
    use_mount(&bench);
    umount(&bench, client);
}

#[test]
fn an_abort_is_seen_while_nothing_more_can_be_parked() {
    let (bench, client, crowd, hidden, readers) = filled_up("lanes=1");
    // It is in use, and aborted all the same.
    unmount(&bench.mountpoint, UnmountFlags::FORCE).expect_err("busy");
    assert!(readers.into_iter().all(|reader| !reader.wait().status.success()));
    assert!(!crowd.succeeds());
    client.wait();
    drop(hidden);
}

#[test]
fn a_killed_process_gets_out_when_the_cut_comes_after_its_cancel() {
    let (bench, client) = mounted(Terms::default(), "lanes=1");
    let reader = hanging(&bench);
    // The CANCEL is not heard.
    bench.host.go_silent();
    let hidden = bench.host.hide();
    reader.kill();
    bench.host.wait_for("the CANCEL", |seen| (seen.unheard > 0).then_some(()));
    bench.host.cut();
    assert_eq!(reader.wait().status.signal(), Some(9));
    drop(hidden);
    bench.host.wait_for("the ABANDON", |seen| (seen.abandons >= 1).then_some(()));
    umount(&bench, client);
}

#[test]
fn a_soft_mount_fails_what_waits_too_long_and_works_again_later() {
    let (bench, client) = mounted(Terms::default(), "lanes=2,soft,timeout=1");
    let in_flight = hanging(&bench);
    let hidden = cut_off(&bench);
    let parked = bench.cat("hello");
    for reader in [in_flight, parked] {
        let output = reader.wait();
        let words = stderr_of(&output);
        assert!(words.contains("Input/output error"), "{output:?}");
    }
    drop(hidden);
    wait_resumes(&bench.host, 2);
    bench.host.wait_for("the ABANDON", |seen| (seen.abandons >= 1).then_some(()));
    let path = bench.mountpoint.display().to_string();
    assert!(bench.run(&["wait", "--resumed", &path]).status.success());
    use_mount(&bench);
    wait_until("the slots", || bench.host.slots_in_use() == 0);
    let stderr = umount(&bench, client);
    assert!(stderr.contains("(soft)"), "{stderr}");
}

#[test]
fn reconnect_drops_what_looks_alive_and_wait_tells_when_it_is_done() {
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let path = bench.mountpoint.display().to_string();
    let reader = hanging(&bench);
    for round in 1..4 {
        assert!(bench.run(&["reconnect", &path]).status.success());
        let waited = bench.run(&["wait", "--resumed", "--timeout", "20", &path]);
        assert!(waited.status.success(), "{waited:?}");
        wait_resumes(&bench.host, 2 * round);
        assert_eq!(status_of(&bench)["resumes"], 2 * round);
        wait_repeats(&bench, round);
    }
    let hidden = bench.host.hide();
    assert!(bench.run(&["reconnect", &path]).status.success());
    let waited = bench.run(&["wait", "--resumed", "--timeout", "1", &path]);
    assert_eq!(waited.status.code(), Some(4), "{waited:?}");
    drop(hidden);
    assert!(bench.run(&["wait", "--resumed", &path]).status.success());
    wait_repeats(&bench, 4);
    deny_read(&bench, reader);
    let none = bench.run(&["wait", "--resumed", "/nonexistent"]);
    assert_eq!(none.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&none.stderr).contains("no ringfs mount at"), "{none:?}");
    assert_eq!(bench.run(&["reconnect", "/nonexistent"]).status.code(), Some(1));
    assert_eq!(bench.run(&["wait", &path]).status.code(), Some(2));
    umount(&bench, client);
}

#[test]
fn forgets_are_given_back_once() {
    let (bench, client) = mounted(Terms::default(), "lanes=1");
    let path = bench.file("hello");
    within("a stat", move || assert!(std::fs::metadata(path).is_ok()));
    bench.host.set_mood(Mood::LosesReplies);
    let forgets = || bench.host.wait_for("forgets", |seen| Some(seen.forgets.clone()));
    forget_until("a forget", || !forgets().is_empty());
    bench.host.wait_for("a lost reply", |seen| (seen.lost > 0).then_some(()));
    bench.host.set_mood(Mood::Fair);
    bench.host.cut();
    bench.host.wait_for("the forget again", |seen| (seen.repeats_ended > 0).then_some(()));
    wait_until("the slot", || status_of(&bench)["in_flight"] == 0);
    let forgets = forgets();
    assert_eq!(forgets.iter().filter(|f| f.nodeid == 2).count(), 1, "{forgets:?}");
    use_mount(&bench);
    umount(&bench, client);
}

#[test]
fn a_silent_death_is_found_by_asking() {
    let (bench, client) = mounted(Terms::default(), "lanes=1");
    let reader = hanging(&bench);
    bench.host.go_silent();
    let begun = Awake::begin();
    wait_resumes(&bench.host, 1);
    let found = begun.elapsed();
    // 2 s (heart.rs), and what a loaded machine takes to notice.
    assert!(found < Duration::from_secs(8), "after {found:?}");
    wait_repeats(&bench, 1);
    deny_read(&bench, reader);
    let stderr = umount(&bench, client);
    assert!(stderr.contains("silent"), "{stderr}");
}

#[test]
fn answers_that_fill_up_what_was_lost_of_a_batch_are_no_life() {
    let (bench, client) = mounted(Terms::default(), "lanes=1");
    let reader = hanging(&bench);
    bench.host.lose_a_tail();
    wait_resumes(&bench.host, 1);
    wait_repeats(&bench, 1);
    deny_read(&bench, reader);
    let stderr = umount(&bench, client);
    assert!(stderr.contains("silent"), "{stderr}");
}

#[test]
fn a_slow_daemon_that_answers_pings_is_not_cut() {
    let (bench, client) = mounted(Terms::default(), "lanes=1");
    let reader = hanging(&bench);
    bench.host.wait_for("pings", |seen| (seen.pings >= 3).then_some(()));
    deny_read(&bench, reader);
    assert_eq!(bench.host.wait_for("resumes", |seen| Some(seen.resumes)), 0);
    assert_eq!(umount(&bench, client), "");
}

#[test]
fn a_mount_that_is_cut_can_be_taken_off() {
    let by_command: fn(&Bench, &Client) = |bench, _| assert!(bench.umount(&[]).status.success());
    let by_signal: fn(&Bench, &Client) = |_, client| client.signal(Signal::TERM);
    for take_off in [by_command, by_signal] {
        let (bench, client) = mounted(Terms::default(), "lanes=2");
        let hidden = cut_off(&bench);
        take_off(&bench, &client);
        ended(&bench, client);
        drop(hidden);
    }
    // With somebody inside, a second signal ends it.
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let reader = hanging(&bench);
    let hidden = cut_off(&bench);
    end_by_signals(&bench, client, reader);
    drop(hidden);
}
