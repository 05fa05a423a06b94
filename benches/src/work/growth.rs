//! What becomes of rate and memory when there is more of something: sessions, lanes, names that the
//! guest's kernel knows, open files. Each run has a server of its own.

use super::probe::{Places, getattr, read_block};
use super::{Block, DATA_BYTES, DATA_FILE, Metric, Scale, forget_names, joined};
use crate::contender::Kind;
use crate::proc::memory;
use crate::server::{Mount, Server};
use crate::site::{Daemon, Place, Site};
use anyhow::{Result, ensure};
use rustix::fs::OFlags;
use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Instant;

/// What there is more of.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Guests of one daemon, each with a reader.
    Sessions(usize),
    /// Lanes of one mount, with four readers.
    Lanes(usize),
    /// Names that the guest's kernel knows.
    Known(usize),
    /// Files open at once.
    Open(usize),
}

/// The steps, as works; a million names only if asked for by name.
pub const STEPS: &[(&str, Step)] = &[
    ("growth-sessions-1", Step::Sessions(1)),
    ("growth-sessions-4", Step::Sessions(4)),
    ("growth-sessions-16", Step::Sessions(16)),
    ("growth-sessions-64", Step::Sessions(64)),
    ("growth-lanes-1", Step::Lanes(1)),
    ("growth-lanes-2", Step::Lanes(2)),
    ("growth-lanes-4", Step::Lanes(4)),
    ("growth-lanes-8", Step::Lanes(8)),
    ("growth-known-1k", Step::Known(1_000)),
    ("growth-known-10k", Step::Known(10_000)),
    ("growth-known-100k", Step::Known(100_000)),
    (BY_HAND, Step::Known(1_000_000)),
    ("growth-open-1", Step::Open(1)),
    ("growth-open-100", Step::Open(100)),
    ("growth-open-1k", Step::Open(1_000)),
    ("growth-open-10k", Step::Open(10_000)),
];

/// Takes minutes and gigabytes: must be asked for by its whole name.
pub const BY_HAND: &str = "growth-known-1m";

/// One run.
pub fn run(site: &Site, step: Step, place: &Place<'_>, scale: &Scale) -> Result<Vec<Metric>> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    if site.spec.kind == Kind::Bare {
        return Ok(Vec::new());
    }
    let label = format!("growth-{}", NEXT.fetch_add(1, Relaxed));
    let place = Place { label: &label, ..*place };
    // A passthrough holds a descriptor for each name, and one more for each open file.
    let held = match step {
        Step::Sessions(_) | Step::Lanes(_) => 0,
        Step::Known(_) if site.spec.kind == Kind::Ringfs => 0,
        Step::Known(count) => count,
        Step::Open(count) => count * 2,
    };
    let limit = crate::files_limit();
    if held + 100 > limit {
        eprintln!("\nLEFT OUT: {step:?} on {}: {limit} files may be open", site.spec.name);
        return Ok(Vec::new());
    }
    match step {
        Step::Sessions(_) | Step::Lanes(_) if site.spec.kind != Kind::Ringfs => Ok(Vec::new()),
        Step::Sessions(count) => sessions(site, count, &place, scale),
        Step::Lanes(count) => lanes(site, count, &place, scale),
        Step::Known(count) => with_files(count, &place, |place| known(site, count, place)),
        Step::Open(count) => with_files(count, &place, |place| open(site, count, place, scale)),
    }
}

fn sessions(site: &Site, count: usize, place: &Place<'_>, scale: &Scale) -> Result<Vec<Metric>> {
    let daemon = Daemon::start(&site.spec, place, &[("bench", place.backing)])?;
    let mount = |i| daemon.mount("bench", &place.scratch.join(format!("{}-{i}", place.label)));
    let mounts = (0..count).map(mount).collect::<Result<Vec<(Mount, Server)>>>()?;
    let paths: Vec<PathBuf> = mounts.iter().map(|(mount, _)| mount.at().join(DATA_FILE)).collect();
    let rate = readers(&paths, scale)?;
    Ok(vec![rate, rss(&[daemon.server.pid()])])
}

fn lanes(site: &Site, count: usize, place: &Place<'_>, scale: &Scale) -> Result<Vec<Metric>> {
    let mut spec = site.spec.clone();
    let comma = if spec.options.is_empty() { "" } else { "," };
    spec.options += &format!("{comma}lanes={count}");
    let site = Site::start(&spec, place)?;
    let path = site.path().join(DATA_FILE);
    let rate = readers(&[path.clone(), path.clone(), path.clone(), path], scale)?;
    Ok(vec![rate, rss(&site.pids())])
}

/// One thread a path, reading blocks of 4 KiB at random places past the cache.
fn readers(paths: &[PathBuf], scale: &Scale) -> Result<Metric> {
    let start = Instant::now();
    let reads = thread::scope(|scope| {
        let reader = |(i, path): (usize, &PathBuf)| {
            let path = path.clone();
            scope.spawn(move || -> Result<u64> {
                let flags = OFlags::DIRECT.bits() as i32;
                let file = File::options().read(true).custom_flags(flags).open(path)?;
                let (mut block, mut places) = (Block::new(4096), Places::new(i as u64 * 2 + 7));
                let mut reads = 0;
                while start.elapsed() < scale.runtime {
                    read_block(&file, &mut block, places.next(DATA_BYTES / 4096))?;
                    reads += 1;
                }
                Ok(reads)
            })
        };
        let threads: Vec<_> = paths.iter().enumerate().map(reader).collect();
        threads.into_iter().map(|thread| joined(thread.join())).sum::<Result<u64>>()
    })?;
    ensure!(reads > 0, "nothing was read");
    Ok(Metric { name: "rate", unit: "IOPS", value: reads as f64 / start.elapsed().as_secs_f64() })
}

/// Makes so many files in a directory that is then served, and removes them.
fn with_files(
    count: usize,
    place: &Place<'_>,
    work: impl FnOnce(&Place<'_>) -> Result<Vec<Metric>>,
) -> Result<Vec<Metric>> {
    let behind = place.backing.join(place.label);
    for i in 0..count {
        let file = name(&behind, i);
        if i % 1000 == 0 {
            fs::create_dir_all(file.parent().unwrap_or(&behind))?;
        }
        fs::write(file, b"1")?;
    }
    let metrics = work(&Place { backing: &behind, ..*place });
    fs::remove_dir_all(&behind)?;
    forget_names()?;
    metrics
}

/// A thousand to a directory.
fn name(home: &Path, i: usize) -> PathBuf {
    home.join(format!("{}/{}", i / 1000, i % 1000))
}

fn known(site: &Site, count: usize, place: &Place<'_>) -> Result<Vec<Metric>> {
    let site = Site::start(&site.spec, place)?;
    let start = Instant::now();
    (0..count).try_for_each(|i| fs::metadata(name(site.path(), i)).map(drop))?;
    let rate = count as f64 / start.elapsed().as_secs_f64();
    Ok(vec![Metric { name: "rate", unit: "files/s", value: rate }, rss(&site.pids())])
}

fn open(site: &Site, count: usize, place: &Place<'_>, scale: &Scale) -> Result<Vec<Metric>> {
    let site = Site::start(&site.spec, place)?;
    let start = Instant::now();
    let files = (0..count).map(|i| File::open(name(site.path(), i)));
    let files = files.collect::<std::io::Result<Vec<File>>>()?;
    let opened = count as f64 / start.elapsed().as_secs_f64();
    let (start, mut asked) = (Instant::now(), 0);
    while start.elapsed() < scale.runtime {
        getattr(&files[asked % count])?;
        asked += 1;
    }
    let rate = asked as f64 / start.elapsed().as_secs_f64();
    Ok(vec![
        Metric { name: "rate", unit: "GETATTR/s", value: rate },
        Metric { name: "opens", unit: "/s", value: opened },
        rss(&site.pids()),
    ])
}

/// Of the servers; the daemon alone where clients are many.
fn rss(pids: &[i32]) -> Metric {
    let value = memory(pids).0 as f64 / f64::from(1 << 20);
    Metric { name: "rss", unit: "MiB", value }
}
