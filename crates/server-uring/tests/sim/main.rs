//! A whole shard on the simulated ring, with guests in the same thread: whatever the seed does to
//! the operations, each request is answered once by its own reply, files hold what was written,
//! nothing is left behind, and the same seed gives the same history. Guests whose connection is cut
//! at any point resume it: then too each request has happened once, and what a guest holds is what
//! the daemon holds for it. The same where the daemon is stopped and another one goes on with what
//! it left and with what the guests tell. `RINGFS_SEED` runs one seed of each test alone.

mod guest;
mod host;

use guest::{CELL_BYTES, Guest};
use host::Host;
use ringfs_server::mailbox::Mail;
use ringfs_server::ring_sim::{Faults, Rng, SimRing};
use ringfs_server::shard::{Shard, Shared};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// What one seed is about.
#[derive(Clone, Copy)]
struct Plan {
    guests: usize,
    requests: usize,
    /// With requests that run on the pool's threads, whose pace is nobody's.
    pool: bool,
    /// Guests come back after a cut, and cut their connections themselves so often in a thousand
    /// ticks.
    cuts: Option<usize>,
    /// How often the daemon is stopped.
    restarts: usize,
    faults: Faults,
}

/// Until all guests are done, or the daemon is stopped in the middle.
fn run_life(
    seed: u64,
    plan: &Plan,
    host: &Host,
    guests: &mut [Guest],
    history: &mut Vec<String>,
    is_stopped: bool,
) {
    let Host { mailbox, stats, registry, pool, .. } = host;
    let mut stopping = false;
    let mut ticks = 0;
    let world = |rng: &mut Rng| {
        ticks += 1;
        guests.iter_mut().for_each(|guest| guest.live(rng, history));
        if is_stopped {
            if !stopping && ticks > 200 && rng.one_of(2) {
                stopping = true;
                host.stops.store(true, Relaxed);
                mailbox.post(Mail::Shutdown);
            }
            return;
        }
        if guests.iter().all(Guest::is_done) {
            // All hang up; when the shard has noticed, it is told to end.
            for guest in guests.iter_mut() {
                let _ = guest.stream.shutdown(std::net::Shutdown::Both);
                guest.ended = true;
            }
            if stats.connections.load(Relaxed) == 0 && !stopping {
                stopping = true;
                mailbox.post(Mail::Shutdown);
            }
        }
    };
    let shared = Shared {
        registry: registry.clone(),
        pool: pool.clone(),
        mailbox: mailbox.clone(),
        stats: stats.clone(),
        index: 0,
        large_buffers: usize::MAX,
    };
    let mut shard = Shard::new(SimRing::new(seed, plan.faults, world), shared, 0);
    shard.run().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    drop(shard);
    pool.close();
    let gauges = [&stats.connections, &stats.slots_in_use, &stats.buffers_in_use];
    assert_eq!(gauges.map(|gauge| gauge.load(Relaxed)), [0; 3], "seed {seed}");
    assert_eq!(stats.protocol_errors.load(Relaxed), 0, "seed {seed}");
    assert!(registry.totals().iter().all(|(_, n)| *n == 0), "{:?}", registry.totals());
}

/// Runs one seed to its end and gives its history.
fn run(seed: u64, plan: Plan, place: &Path) -> Vec<String> {
    let share = place.join(format!("{seed}"));
    let _ = std::fs::remove_dir_all(&share);
    std::fs::create_dir(&share).expect("the share");
    std::fs::write(share.join("known"), b"x").expect("a file");
    let mut host = Host::new(&share, &plan);
    let mut guests: Vec<_> = (0..plan.guests).map(|id| Guest::new(id, &host, &plan)).collect();
    let mut history = Vec::new();
    for life in 0..plan.restarts {
        run_life(seed + 7919 * life as u64, &plan, &host, &mut guests, &mut history, true);
        for guest in &mut guests {
            (guest.host, guest.session) = (None, None);
        }
        drop(host);
        host = Host::new(&share, &plan);
        history.push("restart".into());
        for guest in guests.iter_mut().filter(|guest| !guest.ended) {
            guest.host = Some(Arc::clone(&host));
            guest.connect();
        }
    }
    run_life(seed, &plan, &host, &mut guests, &mut history, false);
    for guest in &guests {
        let Some(session) = &guest.session else { panic!("seed {seed}: no session") };
        let Some(_) = guest.file else { continue };
        let kept = std::fs::read(share.join(format!("guest-{}", guest.id))).expect("the file");
        for (cell, (busy, bytes)) in guest.cells.iter().enumerate().filter(|(_, c)| !c.0) {
            let found = kept.get(cell * CELL_BYTES..).unwrap_or_default();
            assert!(!busy && found.starts_with(bytes), "seed {seed}: cell {cell} differs");
        }
        // Known: the root, the file, and what was looked up and not given back.
        let (known, lookups) = (guest.to_forget.iter(), guest.file.iter().map(|(node, _)| node));
        if guest.slots.in_use() == 0 {
            session.fs.forget(known.chain(lookups).map(|&id| (id, 1)));
            let counts = session.fs.counts();
            assert_eq!(
                (counts.nodes, counts.handles),
                (1, 1),
                "seed {seed}: more than it knows of"
            );
        }
        assert_eq!(session.fs.counts().overdrawn, 0, "seed {seed}");
    }
    std::fs::remove_dir_all(&share).expect("clean up");
    history
}

const GENTLE: Faults = Faults { short: 0, again: 0, io_error: 0, reset: 0, full: 0, delay: 0 };
const ROUGH: Faults =
    Faults { short: 400, again: 100, io_error: 30, reset: 0, full: 50, delay: 40 };

fn seeds() -> std::ops::Range<u64> {
    let given = std::env::var("RINGFS_SIM_SEEDS").ok().and_then(|n| n.parse().ok());
    if let Some(seed) = std::env::var("RINGFS_SEED").ok().and_then(|n| n.parse().ok()) {
        return seed..seed + 1;
    }
    0..given.unwrap_or(8)
}

fn place() -> tempfile::TempDir {
    // On tmpfs, so that disks have no say in the time that this takes.
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
}

#[test]
fn every_request_is_answered_once_by_its_own_reply() {
    let place = place();
    for seed in seeds() {
        for (guests, faults) in [(1, GENTLE), (1, ROUGH), (4, ROUGH)] {
            let plan = Plan { guests, requests: 120, pool: false, cuts: None, restarts: 0, faults };
            let history = run(seed, plan, place.path());
            let answers = history.iter().filter(|line| !line.contains("cut")).count();
            assert_eq!(answers, guests * 121, "seed {seed}");
        }
    }
}

#[test]
fn the_same_seed_is_the_same_history() {
    let place = place();
    for seed in seeds().take(4) {
        let plan =
            Plan { guests: 3, requests: 80, pool: false, cuts: None, restarts: 0, faults: ROUGH };
        let first = run(seed, plan, place.path());
        assert!(first == run(seed, plan, place.path()), "seed {seed} has two histories");
        assert!(first != run(seed + 1000, plan, place.path()), "the seed is not used");
    }
}

#[test]
fn jobs_of_the_pool_are_answered_too() {
    let place = place();
    for seed in seeds() {
        let plan =
            Plan { guests: 3, requests: 60, pool: true, cuts: None, restarts: 0, faults: ROUGH };
        assert_eq!(run(seed, plan, place.path()).len(), 183, "seed {seed}");
    }
}

#[test]
fn connections_that_are_reset_leave_nothing() {
    let place = place();
    let faults = Faults { reset: 4, ..ROUGH };
    let mut cut = 0;
    for seed in seeds() {
        let plan =
            Plan { guests: 4, requests: 100, pool: seed % 2 == 0, cuts: None, restarts: 0, faults };
        let history = run(seed, plan, place.path());
        cut += history.iter().filter(|line| line.ends_with("cut")).count();
    }
    assert!(cut > 0, "no connection was cut");
}

#[test]
fn cut_sessions_go_on_and_each_request_has_happened_once() {
    let place = place();
    let (mut cut, mut resumed, mut abandoned) = (0, 0, 0);
    for seed in seeds() {
        for (guests, reset) in [(1, 0), (3, 4)] {
            let faults = Faults { reset, ..ROUGH };
            let plan = Plan {
                guests,
                requests: 150,
                pool: seed % 2 == 0,
                cuts: Some(3),
                restarts: 0,
                faults,
            };
            let history = run(seed, plan, place.path());
            let count = |what: &str| history.iter().filter(|line| line.ends_with(what)).count();
            cut += count("cut");
            resumed += count("resumed");
            abandoned += count("abandoned");
        }
    }
    assert!(cut > 20 && resumed > 20 && abandoned > 0, "{cut} cut, {resumed}, {abandoned}");
}

#[test]
fn another_daemon_goes_on_with_what_the_first_one_left() {
    let place = place();
    let (mut rebuilt, mut answers) = (0, 0);
    for seed in seeds() {
        for (guests, restarts) in [(1, 2), (3, 1)] {
            let faults = Faults { reset: 2, ..ROUGH };
            let pool = seed % 2 == 0;
            let plan = Plan { guests, requests: 100, pool, cuts: Some(3), restarts, faults };
            let history = run(seed, plan, place.path());
            rebuilt += history.iter().filter(|line| line.ends_with("rebuilt")).count();
            answers += history.len();
        }
    }
    println!("{rebuilt} sessions rebuilt, {answers} lines");
    assert!(rebuilt > 0, "nothing was rebuilt");
}
