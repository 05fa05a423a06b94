//! Large reads, whose replies go from the connection to the kernel without a copy: who reads sees
//! none of it, however they come. Needs root and FUSE.

#[allow(dead_code, reason = "the other tests use more of it")]
mod bench;
#[allow(dead_code, reason = "the other tests use more of it")]
mod host;

use bench::uses::*;
use bench::*;
use host::{BIG_BYTES, Mood, Terms, big_byte};
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;
use rustix::process::{Pid, Signal, kill_process};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;

/// What goes by the pipe that the unprivileged have.
const LARGE: usize = 512 << 10;

/// Reads so much of `big`, or up to its end, in one read(2).
fn read(bench: &Bench, at: usize, bytes: usize) {
    let path = bench.file("big");
    within("a read", move || {
        let mut buffer = vec![0; bytes];
        let file = File::open(path).expect("open");
        let n = file.read_at(&mut buffer, at as u64).expect("read");
        assert_eq!(n, bytes.min(BIG_BYTES - at));
        let wrong = (0..n).find(|&i| buffer[i] != big_byte(at + i));
        assert_eq!(wrong, None, "of {bytes} bytes at {at}");
    });
}

/// How many replies went by the pipe.
fn lifted(bench: &Bench) -> u64 {
    status_of(bench)["replies_spliced"].as_u64().expect("a status")
}

/// Has it done again until a reply went by the pipe: one that comes behind another does not.
fn until_lifted(bench: &Bench, what: &str, mut work: impl FnMut()) {
    wait_until(what, || {
        let before = lifted(bench);
        work();
        lifted(bench) > before
    });
}

/// Data of a file that hangs: no more than the pipe takes that `cat` writes to.
fn hung_data() -> Vec<u8> {
    (0..64 << 10).map(big_byte).collect()
}

#[test]
fn what_is_read_is_right() {
    for (options, lifts) in
        [("lanes=2", true), ("lanes=1,spin=0", true), ("lanes=2,checksum=on", false)]
    {
        let bench = Bench::new(Terms::default());
        let client = bench.mount(options);
        for (at, bytes, is_large) in [
            (0, 64 << 10, true),
            (4096, 128 << 10, true),
            (1, 300_000, true),
            (7, LARGE, true),
            // A record that ends within eight bytes, and short ones.
            (0, 99_999, false),
            (0, 4096, false),
            (BIG_BYTES - 100_000, LARGE, true),
            (BIG_BYTES - 100, LARGE, false),
            (BIG_BYTES, LARGE, false),
        ] {
            let what = format!("{bytes} at {at}, {options}");
            if is_large && lifts {
                until_lifted(&bench, &what, || read(&bench, at, bytes));
                continue;
            }
            let before = lifted(&bench);
            read(&bench, at, bytes);
            assert_eq!(lifted(&bench), before, "{what}");
        }
        std::thread::scope(|scope| {
            for bytes in [LARGE, 100_000, 4096, 128 << 10] {
                let bench = &bench;
                scope.spawn(move || {
                    for at in (0..BIG_BYTES).step_by(200_000) {
                        read(bench, at, bytes);
                    }
                });
            }
        });
        umount(&bench, client);
    }
}

#[test]
fn a_reply_that_is_cut_comes_again() {
    let bench = Bench::new(Terms::default());
    let client = bench.mount("lanes=2");
    // The front that is received first has 288 bytes, the batch of a whole reply 48 and the data.
    for bytes in [1, 47, 287, 288, 289, 5000, 70_000, 700_000, LARGE + 30] {
        until_lifted(&bench, &format!("a cut behind {bytes}"), || {
            let lost = bench.host.wait_for("losses", |seen| Some(seen.lost));
            bench.host.set_mood(Mood::CutsLarge(bytes));
            read(&bench, bytes, LARGE);
            bench.host.wait_for("the loss", |seen| (seen.lost == lost + 1).then_some(()));
        });
    }
    umount(&bench, client);
}

#[test]
fn a_reply_that_comes_in_crumbs_is_right() {
    let bench = Bench::new(Terms::default());
    let client = bench.mount("lanes=1");
    // A pipe has 512 places at most, and each of these bytes' pieces takes one.
    for (piece, fits) in [(500, false), (40_000, true), (100, false), (100_001, true)] {
        bench.host.set_mood(Mood::Crumbles(piece));
        if fits {
            until_lifted(&bench, &format!("pieces of {piece}"), || read(&bench, 0, LARGE));
            continue;
        }
        let before = lifted(&bench);
        read(&bench, 0, LARGE);
        assert_eq!(lifted(&bench), before, "{piece}");
    }
    umount(&bench, client);
}

/// Stops a process, and waits until each of its threads stands.
fn stop(pid: Pid) {
    kill_process(pid, Signal::STOP).expect("stop");
    wait_until("all threads stopped", || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the client lives");
        tasks.flatten().all(|task| {
            let status = std::fs::read_to_string(task.path().join("status"));
            status.is_ok_and(|status| status.contains("State:\tT"))
        })
    });
}

#[test]
fn errors_and_readers_that_are_killed() {
    let bench = Bench::new(Terms::default());
    let client = bench.mount("lanes=1");
    let reader = hanging(&bench);
    let last = |seen: &mut host::Seen| seen.hanging.last().copied();
    let (lane, at) = bench.host.wait_for("a read", last);
    read(&bench, 0, LARGE);
    bench.host.answer_hanging(lane, at, 13);
    let words = String::from_utf8_lossy(&reader.wait().stderr).into_owned();
    assert!(words.contains("Permission denied"), "{words}");
    let reader = hanging(&bench);
    let (lane, at) = bench.host.wait_for("a read", last);
    let pid = worker(&bench);
    stop(pid);
    reader.kill();
    bench.host.give_hanging(lane, at, hung_data());
    kill_process(pid, Signal::CONT).expect("go on");
    assert_eq!(reader.wait().status.signal(), Some(9));
    read(&bench, 0, LARGE);
    umount(&bench, client);
}

#[test]
fn the_next_client_has_it_from_the_device_that_read_the_request() {
    if !kernel_resends("the_next_client_has_it_from_the_device_that_read_the_request") {
        return;
    }
    let bench = Bench::new(Terms::default());
    let client = bench.mount("lanes=2");
    until_lifted(&bench, "what a dead client has read", || {
        let reader = hanging(&bench);
        let last = |seen: &mut host::Seen| {
            Some((*seen.hanging.last()?, seen.hanging.len(), seen.repeats_running))
        };
        let ((lane, at), reads, repeats) = bench.host.wait_for("a read", last);
        kill_worker(&bench, Signal::KILL);
        wait_repeats(&bench, repeats + 1);
        bench.host.give_hanging(lane, at, hung_data());
        let more = |seen: &mut host::Seen| seen.hanging.get(reads).copied();
        let (lane, at) = bench.host.wait_for("the read of what follows", more);
        bench.host.give_hanging(lane, at, Vec::new());
        assert_eq!(reader.wait().stdout, hung_data());
    });
    umount(&bench, client);
}

/// This thread, and whoever it starts, does not splice with these flags.
fn forbid_splice(flags: SpliceFlags) {
    let (len, flags) = (SeccompCmpArgLen::Dword, u64::from(flags.bits()));
    let is_so = SeccompCondition::new(5, len, SeccompCmpOp::Eq, flags).expect("a condition");
    let rule = SeccompRule::new(vec![is_so]).expect("a rule");
    let denied = SeccompAction::Errno(Errno::PERM.raw_os_error().unsigned_abs());
    let arch = std::env::consts::ARCH.try_into().expect("a known machine");
    let rules = [(nix::libc::SYS_splice, vec![rule])].into();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, denied, arch).expect("a filter");
    let program: BpfProgram = filter.try_into().expect("a program");
    seccompiler::apply_filter(&program).expect("seccomp");
}

#[test]
fn where_splice_is_forbidden_nothing_is_cut_and_nobody_hangs() {
    // From the socket the first one, to the device the second.
    for flags in [SpliceFlags::NONBLOCK, SpliceFlags::empty()] {
        let bench = Bench::new(Terms::default());
        let client = std::thread::scope(|scope| {
            let mounted = scope.spawn(|| {
                forbid_splice(flags);
                bench.mount("lanes=1")
            });
            mounted.join().expect("a mount")
        });
        if flags.is_empty() {
            // The request that the kernel was not told of fails.
            wait_until("a refusal", || {
                let file = File::open(bench.file("big")).expect("open");
                let read = within("a read", move || file.read_at(&mut vec![0; LARGE], 0));
                assert!(read.is_ok() || read.is_err_and(|error| error.raw_os_error() == Some(5)));
                status_of(&bench)["refused_replies"].as_u64().expect("a status") > 0
            });
        }
        for at in 0..4 {
            read(&bench, at, LARGE);
        }
        assert_eq!(lifted(&bench), 0, "{flags:?}");
        assert_eq!(bench.host.wait_for("losses", |seen| Some(seen.lost)), 0, "{flags:?}");
        umount(&bench, client);
    }
}
