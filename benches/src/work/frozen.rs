//! One share lies on a frozen ext4 while its guest writes: how long another guest's GETATTR takes.
//!
//! Only a server of several guests has anything to lose here, so it is asked of ringfs alone.

use super::probe::{Latencies, after, getattr};
use super::{Metric, Scale, joined};
use crate::backing::{loop_ext4, run as run_command};
use crate::contender::Kind;
use crate::site::{Daemon, Place, Site};
use crate::undo::{Guard, Undo};
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// More than any pool has threads to lose.
const WRITERS: usize = 32;
/// How long things that should be quick may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A daemon of its own with two shares and two mounts.
pub fn run(site: &Site, place: &Place<'_>, scale: &Scale) -> Result<Vec<Metric>> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    if site.spec.kind != Kind::Ringfs {
        return Ok(Vec::new());
    }
    let label = format!("frozen-{}", NEXT.fetch_add(1, Relaxed));
    let ground = loop_ext4(place.scratch, &format!("{label}-ext4"), 64)?;
    let place = Place { label: &label, ..*place };
    let shares = [("frozen", ground.dir()), ("free", place.backing)];
    let daemon = Daemon::start(&site.spec, &place, &shares)?;
    let (frozen, _client) = daemon.mount("frozen", &place.scratch.join(format!("{label}-a")))?;
    let (free, _other) = daemon.mount("free", &place.scratch.join(format!("{label}-b")))?;
    let probed = File::open(free.at().join(super::DATA_FILE))?;
    let p99 = || -> Result<f64> {
        Ok(Latencies::of(after(scale.runtime), || getattr(&probed))?.percentile(0.99))
    };
    let before = p99()?;
    let during = while_frozen(frozen.at(), ground.dir(), &probed, scale)?;
    let after = p99()?;
    let usual = f64::midpoint(before, after);
    fs::metadata(frozen.at()).context("the thawed share")?;
    Ok(vec![
        Metric { name: "p99-ratio", unit: "x", value: during / usual },
        Metric { name: "p99-free", unit: "us", value: usual },
        Metric { name: "p99-frozen", unit: "us", value: during },
    ])
}

/// The 99th percentile while writers hang on the frozen file system below `mount`.
fn while_frozen(mount: &Path, below: &Path, probed: &File, scale: &Scale) -> Result<f64> {
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let mut writers = Vec::new();
        for i in 0..WRITERS {
            let (stop, written) = (&stop, &written);
            writers.push(scope.spawn(move || -> Result<()> {
                let file = File::create(mount.join(format!("file-{i}")))?;
                while !stop.load(Relaxed) {
                    file.write_all_at(&[0x5a; 4096], 0)?;
                    written.fetch_add(1, Relaxed);
                }
                Ok(())
            }));
        }
        let p99 = frozen(below, &written, probed, scale);
        // Thawed now, whatever happened.
        stop.store(true, Relaxed);
        writers.into_iter().try_for_each(|writer| joined(writer.join())).context("a writer")?;
        p99
    })
}

fn frozen(below: &Path, written: &AtomicU64, probed: &File, scale: &Scale) -> Result<f64> {
    let patience = Instant::now() + PATIENCE;
    while written.load(Relaxed) < WRITERS as u64 {
        ensure!(Instant::now() < patience, "the writers do not write");
        thread::sleep(Duration::from_millis(2));
    }
    let thaw = Guard::new(Undo::Thaw(below.to_owned()));
    run_command(Command::new("fsfreeze").arg("-f").arg(below))?;
    let mut last = written.load(Relaxed);
    let patience = Instant::now() + PATIENCE;
    loop {
        thread::sleep(Duration::from_millis(50));
        let now = written.load(Relaxed);
        if now == last {
            break;
        }
        ensure!(Instant::now() < patience, "a frozen file system goes on taking writes");
        last = now;
    }
    thread::scope(|scope| {
        let (done, ended) = mpsc::channel();
        let prober = scope.spawn(move || {
            let latencies = Latencies::at_least(1, after(scale.runtime), || getattr(probed));
            let _ = done.send(());
            latencies
        });
        // Where the frozen share holds the other guest up too, only a thaw lets its call end: that
        // call's time is then the percentile, and the goal is missed by far.
        let _ = ended.recv_timeout(scale.runtime + PATIENCE);
        let wrote = written.load(Relaxed) - last;
        drop(thaw);
        let latencies = joined(prober.join())?;
        ensure!(wrote == 0, "a frozen file system took {wrote} writes");
        Ok(latencies.percentile(0.99))
    })
}
