//! A daemon that does not know the session is told of it, and whoever uses the mount sees nothing
//! of it: what is told, in which order, and when a mount ends instead. Needs root and FUSE.

#[allow(dead_code, reason = "the other tests use more of it")]
mod bench;
#[allow(dead_code, reason = "the other tests use more of it")]
mod host;

use bench::uses::*;
use bench::*;
use host::{Mood, Rebuild, Terms, big_byte, recipe};
use ringfs_wire::abi::init::DO_READDIRPLUS;
use ringfs_wire::hello::{Reason, feature};
use rustix::fs::OFlags;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// The `nth` rebuild of which the guest has told all. Others are begun, where another lane than
/// the first finds out.
fn rebuilt(bench: &Bench, nth: usize) -> Rebuild {
    bench.host.wait_for("a rebuild", |seen| {
        seen.rebuilds.iter().filter(|rebuild| rebuild.end.is_some()).nth(nth - 1).cloned()
    })
}

/// All that was told is well formed: totals, recipes.
fn check_told(told: &Rebuild) {
    let end = told.end.expect("an end mark");
    assert_eq!((end.nodes, end.handles), (told.nodes.len() as u64, told.handles.len() as u64));
    for (id, count, found) in &told.nodes {
        assert!(*count > 0 && *found == recipe(*id) && *id <= end.node_id_max, "{id} {count}");
    }
    assert!(told.handles.iter().all(|(fh, ..)| *fh <= end.fh_max));
}

#[test]
fn a_daemon_that_does_not_know_the_session_is_told_of_it() {
    for (options, knows_slots, cut_lane) in [
        ("lanes=2", false, None),
        ("lanes=2", true, None),
        ("lanes=3", false, Some(2)),
        ("lanes=1,checksum=on,spin=0", false, None),
    ] {
        let (bench, client) = mounted(Terms::default(), options);
        let path = bench.file("big");
        let flags = (OFlags::NONBLOCK | OFlags::EXCL).bits() as i32;
        let file = within("an open", move || {
            File::options().read(true).write(true).custom_flags(flags).open(path).expect("open")
        });
        let reader = hanging(&bench);
        let first = bench.host.wait_for("hellos", |seen| seen.hellos.last().cloned());
        for round in 1..4 {
            bench.host.restart(knows_slots, cut_lane);
            let told = rebuilt(&bench, round);
            check_told(&told);
            let mut nodes: Vec<u64> = told.nodes.iter().map(|node| node.0).collect();
            nodes.sort_unstable();
            assert_eq!(nodes, [3, 4]);
            let mut handles = told.handles;
            handles.sort_unstable_by_key(|handle| handle.1);
            assert_eq!(handles.iter().map(|h| h.1).collect::<Vec<_>>(), [3, 4]);
            let opened = OFlags::from_bits_retain(handles[0].2);
            assert!(opened.contains(OFlags::RDWR | OFlags::NONBLOCK) && !handles[0].3);
            assert!(!opened.intersects(OFlags::EXCL | OFlags::CREATE | OFlags::TRUNC));
            // The READ comes again, and on a daemon that knows the slot too.
            bench
                .host
                .wait_for("the read again", |seen| (seen.hanging.len() > round).then_some(()));
            let file = file.try_clone().expect("dup");
            within("the open file", move || {
                let mut bytes = [0; 5000];
                file.read_exact_at(&mut bytes, 100_000).expect("read");
                assert!(bytes.iter().enumerate().all(|(i, &b)| b == big_byte(100_000 + i)));
            });
            use_mount(&bench);
            wait_connected(&bench);
            forget_until("the forget", || lookups(&bench).keys().eq(&[3, 4]));
            wait_until("what is known", || known(&bench) == (2, 2));
        }
        // Each time with the word that it was sent before.
        bench.host.wait_for("the words", |seen| (seen.unsure >= 3).then_some(()));
        let begun = bench.host.wait_for("rebuilds", |seen| Some(seen.rebuilds.len()));
        assert!(begun == 6 || cut_lane.is_none(), "found out on lane 2, done on lane 0: {begun}");
        let hello = bench.host.wait_for("hellos", |seen| {
            let mut resumed = seen.hellos.iter().filter(|hello| hello.init.is_some());
            resumed.next().cloned()
        });
        assert!(hello.features & feature::RESTORE != 0 && hello.features == first.features);
        assert_eq!((hello.epoch_seen, hello.share.as_str()), (3, "data"));
        let init = hello.init.expect("in force");
        assert_eq!((init.max_write, init.max_pages), (1 << 20, 256));
        let status = status_of(&bench);
        assert_eq!((&status["rebuilds"], &status["nodes_restored"]), (&3.into(), &2.into()));
        assert_eq!((&status["handles_restored"], &status["nodes_lost"]), (&2.into(), &0.into()));
        let text = String::from_utf8(bench.run(&["status"]).stdout).expect("text");
        assert!(text.contains("rebuilds 3, the last one of 2 nodes (0 lost)"), "{text}");
        deny_read(&bench, reader);
        drop(file);
        let stderr = umount(&bench, client);
        assert!(stderr.contains("rebuilt"), "{stderr}");
    }
}

#[test]
fn a_daemon_that_knows_more_or_less_of_what_can_be_left_out_goes_on() {
    let without = Terms { features: !feature::STORE, ..Terms::default() };
    for (first, then) in [(Terms::default(), without.clone()), (without, Terms::default())] {
        let (bench, client) = mounted(first.clone(), "lanes=2");
        for (round, terms) in [then, first].into_iter().enumerate() {
            bench.host.grant(terms);
            bench.host.restart(false, None);
            check_told(&rebuilt(&bench, round + 1));
            use_mount(&bench);
        }
        bench.host.assert_no_faults();
        umount(&bench, client);
    }
}

#[test]
fn a_name_that_a_lost_daemon_may_have_removed_is_looked_up_again() {
    // It knows the slot, or has to be told that nobody knows.
    for knows_slots in [false, true] {
        let bench = Bench::new(Terms { names_valid: 86_400, ..Terms::default() });
        let client = bench.mount("lanes=2");
        // In use the name stays as long as it is good, whoever drops the kernel's caches.
        let held = hold(&bench, &["hello"]);
        let remover = unlink_unanswered(&bench);
        bench.host.restart(knows_slots, None);
        let words = stderr_of(&remover.wait());
        assert_eq!(words.contains("Input/output error"), !knows_slots, "{words}");
        wait_unlinked(&bench);
        drop(held);
        umount(&bench, client);
    }
}

#[test]
fn who_writes_on_behind_an_append_that_may_have_run_is_told() {
    let bench = Bench::new(Terms::default());
    let client = bench.mount("lanes=2");
    let file = append_halfway(&bench);
    // Others' writes, and those at a place, are not concerned.
    let path = bench.file("big");
    within("another's write", move || {
        let other = File::options().write(true).open(path).expect("open");
        assert_eq!(other.write_at(&[big_byte(0)], 0).expect("write"), 1);
    });
    append_rest(&bench, &file);
    drop(file);
    // Nobody is told who opens the file anew.
    let file = append_halfway(&bench);
    drop(file);
    let path = bench.file("big");
    within("an append by another one", move || {
        let mut file = File::options().append(true).open(path).expect("open");
        assert_eq!(file.write(b"more").expect("append"), 4);
    });
    umount(&bench, client);
}

#[test]
fn counts_are_what_the_kernel_gives_back() {
    let (bench, client) =
        mounted(Terms { init_flags: DO_READDIRPLUS, ..Terms::default() }, "lanes=2");
    let root = bench.mountpoint.clone();
    let look_around = move || {
        for _ in 0..3 {
            let names = std::fs::read_dir(&root).expect("list").map(|e| e.expect("e").file_name());
            assert_eq!(names.count(), 3);
            for name in ["hello", "big", "n1", "n2"] {
                std::fs::metadata(root.join(name)).expect("stat");
            }
        }
    };
    for round in 1..4 {
        let held = hold(&bench, &["hello", "big", "hang", "n1", "n2"]);
        let look = look_around.clone();
        within("a look around", look);
        let before = lookups(&bench);
        assert!(before.values().sum::<i64>() > 12, "{before:?}");
        bench.host.restart(round % 2 == 0, None);
        let told = rebuilt(&bench, round);
        check_told(&told);
        let counts = told.nodes.iter().map(|(id, count, _)| (*id, *count as i64));
        assert_eq!(counts.collect::<BTreeMap<_, _>>(), before);
        let look = look_around.clone();
        within("a look around", look);
        // Nothing is left, and nothing is given back twice.
        drop(held);
        wait_until("the closes", || known(&bench).1 == 0);
        forget_until("the forgets", || lookups(&bench).is_empty());
    }
    umount(&bench, client);
}

#[test]
fn what_was_lost_or_let_go_gives_nothing() {
    for knows_slots in [false, true] {
        let (bench, client) = mounted(Terms::default(), "lanes=1");
        let held = hold(&bench, &["hello"]);
        bench.host.set_mood(Mood::LosesEntries);
        let killed = bench.cat("n5");
        bench.host.wait_for("a lost reply", |seen| (seen.lost == 1).then_some(()));
        let hidden = bench.host.hide();
        bench.host.restart(knows_slots, None);
        wait_until("the cut", || status_of(&bench)["lanes_without_connection"] == 1);
        killed.kill();
        killed.wait();
        bench.host.set_mood(Mood::Fair);
        drop(hidden);
        let told = rebuilt(&bench, 1);
        check_told(&told);
        assert_eq!(told.nodes, [(2, 1, recipe(2))]);
        bench.host.wait_for("the ABANDON", |seen| (seen.abandons == 1).then_some(()));
        use_mount(&bench);
        drop(held);
        wait_until("the closes", || known(&bench).1 == 0);
        forget_until("the forgets", || lookups(&bench).is_empty());
        umount(&bench, client);
    }
}

#[test]
fn forgets_in_flight_are_told_as_not_given_back() {
    for knows_slots in [false, true] {
        let (bench, client) = mounted(Terms::default(), "lanes=1");
        let held = hold(&bench, &["hello"]);
        let before = lookups(&bench);
        bench.host.set_mood(Mood::LosesForgets);
        drop(held);
        wait_until("the close", || known(&bench).1 == 0);
        forget_until("the forget", || lookups(&bench).is_empty());
        bench.host.wait_for("its lost reply", |seen| (seen.lost > 0).then_some(()));
        bench.host.set_mood(Mood::Fair);
        bench.host.restart(knows_slots, None);
        let told = rebuilt(&bench, 1);
        assert_eq!(told.nodes, [(2, before[&2] as u64, recipe(2))]);
        wait_until("the forget again", || lookups(&bench).is_empty());
        wait_until("its end", || known(&bench) == (0, 0));
        umount(&bench, client);
    }
}

#[test]
fn a_rebuild_that_is_cut_begins_anew_with_the_newest_ticket() {
    const FILES: u64 = 5000;
    let (bench, client) = mounted(Terms::default(), "lanes=2");
    let root = bench.mountpoint.clone();
    within("many files", move || {
        for n in 0..FILES {
            std::fs::metadata(root.join(format!("n{n}"))).expect("stat");
        }
    });
    let mut most_records = 0;
    // More than three only where somebody else on this machine drops its caches each time.
    for round in 0..20 {
        if round >= 3 && most_records > 3 {
            break;
        }
        bench.host.set_mood(Mood::CutsRestore);
        bench.host.restart(false, None);
        let told = rebuilt(&bench, round + 1);
        check_told(&told);
        most_records = most_records.max(told.records);
        use_mount(&bench);
        wait_connected(&bench);
        forget_until("the forgets", || lookups(&bench).is_empty());
        let root = bench.mountpoint.clone();
        within("many files", move || {
            for n in 0..FILES {
                std::fs::metadata(root.join(format!("n{n}"))).expect("stat");
            }
        });
    }
    assert!(most_records > 3, "in parts: {most_records}");
    let tickets: Vec<_> = bench.host.wait_for("hellos", |seen| {
        Some(seen.hellos.iter().filter(|h| h.conn == 0).map(|h| h.ticket.0[0]).collect())
    });
    assert!(tickets.is_sorted_by(|a, b| a < b), "each with a newer ticket: {tickets:?}");
    umount(&bench, client);
}

#[test]
fn mounts_that_end_instead_say_why() {
    let strict: fn(&Bench) = |bench| bench.host.restart(true, None);
    let refused: fn(&Bench) = |bench| {
        bench.host.refuse(Some(Reason::Incompatible));
        bench.host.restart(true, None);
    };
    let unknown: fn(&Bench) = |bench| {
        bench.host.refuse(Some(Reason::UnknownSession));
        bench.host.restart(true, None);
    };
    let not_taken: fn(&Bench) = |bench| {
        bench.host.set_mood(Mood::RefusesRestore);
        bench.host.restart(true, None);
    };
    let fewer: fn(&Bench) = |bench| {
        bench.host.grant(Terms { slots: 7, ..Terms::default() });
        bench.host.restart(true, None);
    };
    let featureless: fn(&Bench) = |bench| {
        bench.host.grant(Terms { features: 0, ..Terms::default() });
        bench.host.restart(true, None);
    };
    for (options, fault, words) in [
        ("lanes=2,strict", strict, "`strict`"),
        ("lanes=2", refused, "cannot go on with the session as it was (by order)"),
        ("lanes=1", unknown, "does not know this session"),
        ("lanes=1", not_taken, "we broke the protocol (by order)"),
        ("lanes=2", fewer, "fewer slots"),
        ("lanes=2", featureless, "cannot have it rebuilt"),
    ] {
        let (bench, client) = mounted(Terms::default(), options);
        let reader = hanging(&bench);
        fault(&bench);
        failed(&bench, client, words);
        assert!(!reader.wait().status.success());
    }
    // A daemon that cannot do it is none that a mount has to do without.
    let (bench, client) = mounted(Terms { features: 0, ..Terms::default() }, "lanes=2");
    use_mount(&bench);
    let status = status_of(&bench);
    assert_eq!((&status["nodes_known"], &status["nodes_seen"]), (&0.into(), &0.into()));
    umount(&bench, client);
}
