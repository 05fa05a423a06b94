//! 256 workers on 1024 files of 4 KiB, all at once: what a build or a package manager does.

use super::{Metric, costs, forget_names, joined};
use crate::site::{Measured, Site};
use crate::stats::Spread;
use anyhow::{Result, ensure};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

const WORKERS: usize = 256;
const FILES: usize = 1024;
const PASSES: usize = 5;
const STACK_BYTES: usize = 128 << 10;
const CONTENT: [u8; 4096] = [0x5a; 4096];

/// What is done to each file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// open + read + close
    Read,
    /// open + write + fsync + close
    WriteSync,
}

/// Several passes, each in a fresh directory; the median counts.
pub fn run(site: &Site, step: Step) -> Result<Vec<Metric>> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut passes: Vec<Measured> = Vec::new();
    for _ in 0..PASSES {
        let label = format!("workers-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let behind = site.backing().join(&label);
        fs::create_dir(&behind)?;
        let first = if step == Step::Read { CONTENT } else { [0; 4096] };
        (0..FILES).try_for_each(|i| fs::write(behind.join(i.to_string()), first))?;
        forget_names()?;
        passes.push(pass(site, &site.path().join(&label), step)?);
        for i in 0..FILES {
            let right = fs::read(behind.join(i.to_string()))? == CONTENT;
            ensure!(right, "file {i} does not hold what was written");
        }
        fs::remove_dir_all(&behind)?;
    }
    let times = passes.iter().map(|pass| pass.elapsed.as_secs_f64());
    let median = Spread::of(times).map_or(f64::NAN, |spread| spread.median);
    let mut metrics = vec![
        Metric { name: "rate", unit: "files/s", value: FILES as f64 / median },
        Metric { name: "time", unit: "ms", value: median * 1e3 },
    ];
    if let Some(sum) = passes.into_iter().reduce(|mut sum, pass| {
        sum.add(&pass);
        sum
    }) {
        metrics.extend(costs((FILES * PASSES) as f64, &sum));
    }
    Ok(metrics)
}

fn pass(site: &Site, home: &Path, step: Step) -> Result<Measured> {
    let (next, barrier) = (AtomicUsize::new(0), Barrier::new(WORKERS + 1));
    let worker = || -> Result<()> {
        barrier.wait();
        let mut outcome = Ok(());
        while outcome.is_ok() {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= FILES {
                break;
            }
            outcome = one(&home.join(i.to_string()), step);
        }
        // Also after an error: nobody may wait for ever.
        barrier.wait();
        outcome
    };
    thread::scope(|scope| {
        let mut workers = Vec::new();
        for _ in 0..WORKERS {
            let builder = thread::Builder::new().stack_size(STACK_BYTES);
            // A thread too few would leave the others at the barrier: there is no way on.
            let spawned = builder.spawn_scoped(scope, worker);
            workers.push(spawned.unwrap_or_else(|error| panic!("256 threads: {error}")));
        }
        let ((), done) = site.measure(|| {
            barrier.wait();
            barrier.wait();
            Ok(())
        })?;
        workers.into_iter().try_for_each(|worker| joined(worker.join()))?;
        Ok(done)
    })
}

fn one(path: &Path, step: Step) -> Result<()> {
    match step {
        Step::Read => {
            // Not fs::read, which asks for the time of birth: a request that only ringfs is sent.
            let (mut file, mut bytes) = (File::open(path)?, [0; 2 * CONTENT.len()]);
            let read = file.read(&mut bytes)? + file.read(&mut bytes)?;
            ensure!(bytes[..read] == CONTENT, "{path:?} gave {read} bytes or wrong ones");
        }
        Step::WriteSync => {
            let mut file = File::options().write(true).open(path)?;
            file.write_all(&CONTENT)?;
            file.sync_all()?;
        }
    }
    Ok(())
}
