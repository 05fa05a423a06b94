//! Random histories of sessions: guests and a daemon without sockets, over the real slots, tables,
//! batches and handshakes, with connections cut at any byte, guests' memories copied, daemons
//! killed between any two steps, and requests that nobody waits for any more.
//!
//! In each of them: what may happen once has happened once in a session, and did happen if a guest
//! was told so; each request has one answer, its own; in the end guest and daemon agree on every
//! lookup and handle; nothing between honest ends is a violation.
//!
//! `RINGFS_HISTORIES` says how many (100,000), `RINGFS_SEED` which one alone, with its story.

mod guest;
mod host;
mod link;
mod memory;
mod share;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use world::{Plant, Seen, run};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs one seed, or says what went wrong; a panic of the code under test is that too.
fn attempt(seed: u64, plant: Plant, ops: Option<usize>, seen: &mut Seen) -> Result<(), String> {
    let run = AssertUnwindSafe(|| run(seed, plant, ops, None, seen));
    catch_unwind(run).unwrap_or_else(|_| Err("panicked".into()))
}

/// The story of a history that fails, as short as another number of requests makes it.
fn story(seed: u64, plant: Plant) -> String {
    let mut best: Option<Vec<String>> = None;
    for ops in (1..24).map(Some).chain([None]) {
        let mut lines = Vec::new();
        let told =
            AssertUnwindSafe(|| run(seed, plant, ops, Some(&mut lines), &mut Seen::default()));
        let fault = match catch_unwind(told) {
            Ok(Ok(())) => continue,
            Ok(Err(fault)) => fault,
            Err(_) => "panicked".into(),
        };
        lines.push(format!("with at most {ops:?} requests: {fault}"));
        if best.as_ref().is_none_or(|best| lines.len() < best.len()) {
            best = Some(lines);
        }
    }
    let lines = best.unwrap_or_default();
    // Whoever wants more of it asks for that seed alone.
    let most = if number("RINGFS_SEED").is_some() { 1000 } else { 80 };
    lines[lines.len().saturating_sub(most)..].join("\n")
}

#[test]
fn every_history_is_right() {
    let given = number("RINGFS_SEED");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // The fixed ones, and one that nobody has tried: by the clock.
    let extra = now.as_nanos() as u64 >> 8;
    let count = if given.is_some() { 1 } else { number("RINGFS_HISTORIES").unwrap_or(100_000) };
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(8));
    println!("seeds 0 to {count} and RINGFS_SEED={extra}");
    let work = || {
        let mut seen = Seen::default();
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let seed = match given {
                Some(seed) if n == 0 => seed,
                None if n < count => n,
                None if n == count => extra,
                _ => return seen,
            };
            if let Err(fault) = attempt(seed, Plant::None, None, &mut seen) {
                next.store(u64::MAX / 2, Ordering::Relaxed);
                let story = story(seed, Plant::None);
                panic!("RINGFS_SEED={seed}: {fault}\n{story}");
            }
        }
    };
    let seen = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let all = workers.into_iter().map(|worker| worker.join().expect("a history that fails"));
        all.fold(Seen::default(), Seen::add)
    });
    println!("{seen:?}");
    if given.is_none() && count >= 1000 {
        seen.check();
    }
}

#[test]
fn planted_faults_are_found() {
    for plant in Plant::ALL {
        // The rarest need HELLOs that come late: near where they were found first.
        let rare = [(Plant::LateHellosCount, 206_900), (Plant::HellosOvertake, 88_600)];
        let first = rare.iter().find(|(rare, _)| *rare == plant).map_or(0, |(_, first)| *first);
        let found = (first..first + 400_000u64).find_map(|seed| {
            let fault = attempt(seed, plant, None, &mut Seen::default()).err()?;
            Some((seed, fault))
        });
        let (seed, fault) = found.unwrap_or_else(|| panic!("{plant:?} is not found"));
        println!("{plant:?}: seed {seed}: {fault}");
    }
}
