//! What is done. A work runs once in a contender's place and gives metrics; each file here is one
//! kind of work.
//!
//! Invariant: a work proves that it did what it counts (bytes, names, errors), prepares its files
//! behind all contenders' backs, and times only the work itself.

pub mod fio;
pub mod footprint;
pub mod frozen;
pub mod growth;
pub mod mixed;
pub mod names;
pub mod probe;
pub mod stream;
pub mod tree;
pub mod workers;

use crate::site::{Measured, Place, Site};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// The file that data works share.
pub const DATA_FILE: &str = "bench-data";
/// Its size: larger than any CPU cache, small enough for memory.
pub const DATA_BYTES: u64 = 256 << 20;

/// One figure of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metric {
    /// Unique within the work.
    pub name: &'static str,
    /// Of the value.
    pub unit: &'static str,
    /// The figure.
    pub value: f64,
}

/// How much is done in one run.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Of works that run for a time.
    pub runtime: Duration,
    /// Names of works that go over names.
    pub names: usize,
    /// Entries of the directory that is listed.
    pub entries: usize,
    /// Nodes that the footprint makes the daemon know.
    pub nodes: usize,
    /// Further sessions of the footprint.
    pub sessions: usize,
}

impl Scale {
    /// For a claim.
    pub const FULL: Scale = Scale {
        runtime: Duration::from_millis(1500),
        names: 5_000,
        entries: 10_000,
        nodes: 50_000,
        sessions: 16,
    };
    /// To see that it works, or to compare two builds at once.
    pub const QUICK: Scale = Scale {
        runtime: Duration::from_millis(500),
        names: 1_000,
        entries: 10_000,
        nodes: 50_000,
        sessions: 4,
    };
    /// The same two in an emulated guest, where all is many times slower.
    pub const EMULATED: Scale =
        Scale { runtime: Duration::from_millis(1500), names: 400, entries: 1_000, ..Scale::FULL };
    /// To see that it works.
    pub const EMULATED_QUICK: Scale =
        Scale { runtime: Duration::from_millis(500), names: 150, entries: 1_000, ..Scale::QUICK };
}

/// One kind of work.
pub struct Work {
    /// Short, unique, without spaces.
    pub name: &'static str,
    /// Left out by --quick.
    pub long: bool,
    /// Done by --growth, or if asked for.
    pub growth: bool,
    /// Runs in so many rounds at most; those that start servers of their own take long.
    pub rounds_max: usize,
    what: What,
}

enum What {
    Fio(fio::Job),
    Stream,
    Names(names::Step),
    Workers(workers::Step),
    Mixed,
    Frozen { create: bool },
    Idle,
    Footprint,
    Tree,
    Growth(growth::Step),
}

/// What is done on mounts that others made, unless it is chosen.
pub const ON_MOUNTED: &[&str] = &[
    "randread-4k-d1",
    "randread-4k-j4",
    "randwrite-4k-d1",
    "read-1m",
    "write-1m",
    "stat-cold",
    "create-write-close",
    "open-read-close",
    "unlink",
    "readdir",
];

/// Metrics that a pass of its own counts.
pub const COUNTED: &[&str] = &["syscalls", "wire", "batch"];

impl Work {
    /// All of it, in the order of the report.
    pub fn all() -> Vec<Work> {
        use names::Step;
        let work =
            |name, what| Work { name, what, long: false, growth: false, rounds_max: usize::MAX };
        let long = |work| Work { long: true, ..work };
        let few = |work, rounds_max| Work { rounds_max, ..work };
        let fio = |(name, job)| work(name, What::Fio(job));
        let mut all: Vec<Work> = fio::GOALS.iter().copied().map(fio).collect();
        all.push(work("read-cold", What::Stream));
        let names = [
            ("stat-cold", Step::Stat { threads: 1 }),
            ("stat-cold-t4", Step::Stat { threads: 4 }),
            ("stat-absent", Step::Absent),
            ("create-write-close", Step::Create),
            ("open-read-close", Step::Read),
            ("rename", Step::Rename),
            ("unlink", Step::Unlink),
            ("readdir-stat", Step::List { attributes: true }),
            ("readdir", Step::List { attributes: false }),
        ];
        all.extend(names.map(|(name, step)| work(name, What::Names(step))));
        all.push(work("workers-256-read", What::Workers(workers::Step::Read)));
        all.push(long(work("workers-256-write", What::Workers(workers::Step::WriteSync))));
        all.push(work("mixed", What::Mixed));
        all.push(few(work("frozen", What::Frozen { create: false }), 3));
        all.push(few(work("frozen-create", What::Frozen { create: true }), 3));
        all.push(few(work("idle", What::Idle), 3));
        all.push(few(work("footprint", What::Footprint), 3));
        all.extend(growth::STEPS.iter().map(|&(name, step)| Work {
            growth: true,
            rounds_max: 5,
            ..work(name, What::Growth(step))
        }));
        all.push(few(long(work("tree", What::Tree)), 5));
        all.extend(fio::FURTHER.iter().copied().map(fio).map(long));
        all
    }

    /// Whether it says what an operation costs; such works need nothing but a mount.
    pub fn costed(&self) -> bool {
        matches!(self.what, What::Fio(_) | What::Stream | What::Names(_) | What::Workers(_))
    }

    /// About how long one run takes with its preparation: what is left of a bench is told by it.
    pub fn expected(&self, scale: &Scale) -> Duration {
        let names = |count: usize| Duration::from_micros(60) * count as u32;
        let more = Duration::from_millis(400);
        more + match &self.what {
            What::Fio(_) | What::Stream => scale.runtime,
            What::Names(names::Step::List { .. }) => names(scale.entries),
            What::Names(_) => names(scale.names),
            What::Workers(_) => Duration::from_secs(1),
            What::Mixed | What::Idle | What::Frozen { .. } => scale.runtime * 2,
            What::Footprint => names(scale.nodes),
            What::Growth(_) => scale.runtime * 3,
            What::Tree => Duration::from_secs(10),
        }
    }

    /// Does it once in `site`; `None` where it says nothing about that contender. `place` is where
    /// servers of the work's own may run.
    pub fn run(&self, site: &Site, place: &Place<'_>, scale: &Scale) -> Result<Vec<Metric>> {
        match &self.what {
            What::Fio(job) => fio::run(site, place.scratch, job, scale),
            What::Stream => stream::run(site, scale),
            What::Names(step) => names::run(site, *step, scale),
            What::Workers(step) => workers::run(site, *step),
            What::Mixed => mixed::run(site, scale),
            What::Frozen { create } => frozen::run(site, *create, place, scale),
            What::Idle => footprint::idle(site, scale),
            What::Growth(step) => growth::run(site, *step, place, scale),
            What::Tree => tree::run(site, place),
            What::Footprint => footprint::run(site, place, scale),
        }
    }
}

/// A rate, and what one operation cost the servers.
fn rate(name: &'static str, unit: &'static str, operations: f64, done: &Measured) -> Vec<Metric> {
    let value = operations / done.elapsed.as_secs_f64();
    let mut metrics = vec![Metric { name, unit, value }];
    metrics.extend(costs(operations, done));
    metrics
}

/// What one operation cost the servers; nothing of the bare directory.
fn costs(operations: f64, done: &Measured) -> Vec<Metric> {
    let Some(usage) = done.usage else { return Vec::new() };
    let each = |value: f64| value / operations.max(1.0);
    let cpu = each(usage.cpu.as_secs_f64() * 1e6);
    let mut metrics = vec![
        Metric { name: "cpu", unit: "us/op", value: cpu },
        Metric { name: "wakeups", unit: "/op", value: each(usage.wakeups as f64) },
        Metric { name: "preempted", unit: "/op", value: each(usage.preempted as f64) },
    ];
    let counted = &done.counted;
    let mut more = |name, unit, value: Option<f64>| {
        metrics.extend(value.map(|value| Metric { name, unit, value }));
    };
    more("syscalls", "/op", counted.syscalls.map(|n| each(n as f64)));
    more("wire", "B/op", counted.wire.map(|n| each(n as f64)));
    let batch = counted.batches.filter(|(_, batches)| *batches > 0);
    more("batch", "records", batch.map(|(records, batches)| records as f64 / batches as f64));
    metrics
}

/// Makes the file that data works share.
pub fn make_data(backing: &Path) -> Result<()> {
    let mut file = fs::File::create(backing.join(DATA_FILE)).context("make the data file")?;
    let chunk: Vec<u8> =
        (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for _ in 0..DATA_BYTES >> 20 {
        file.write_all(&chunk)?;
    }
    Ok(())
}

/// What a thread gave; its panic is an error.
fn joined<T>(end: thread::Result<Result<T>>) -> Result<T> {
    end.unwrap_or_else(|_| bail!("a thread of the work panicked"))
}

/// A block at a place that O_DIRECT takes.
pub struct Block {
    bytes: Vec<u8>,
    at: usize,
    length: usize,
}

impl Block {
    /// Of that length.
    pub fn new(length: usize) -> Block {
        const PAGE: usize = 4096;
        let bytes = vec![0x5a; length + PAGE];
        let at = bytes.as_ptr().align_offset(PAGE);
        Block { bytes, at, length }
    }

    /// What it holds.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.at..self.at + self.length]
    }
}

/// Drops what kernels remember of names and attributes; the data of tmpfs stays.
fn forget_names() -> Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "2").context("cannot drop caches: run as root")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn blocks_are_aligned() {
        let mut block = Block::new(8192);
        assert_eq!(block.bytes().as_ptr().align_offset(4096), 0);
        assert_eq!(block.bytes().len(), 8192);
    }

    #[test]
    fn works_have_names_of_their_own() {
        let all = Work::all();
        let names: BTreeSet<_> = all.iter().map(|work| work.name).collect();
        assert_eq!(names.len(), all.len());
        assert!(names.iter().all(|name| !name.contains([' ', ',', '/'])));
        let known = |name| all.iter().any(|work| work.name == name && work.costed());
        assert!(ON_MOUNTED.iter().all(|&name| known(name)));
    }
}
