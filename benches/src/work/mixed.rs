//! Mixed load: how long small requests wait while streams and fsyncs go on.

use super::probe::{Latencies, Places, after, getattr, read_block};
use super::{Block, DATA_BYTES, DATA_FILE, Metric, Scale, joined};
use crate::site::Site;
use anyhow::{Context, Result, ensure};
use rustix::fs::OFlags;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Instant;

const STREAMS: u64 = 8;
const SYNCERS: usize = 2;
const STREAM_BYTES: usize = 1 << 20;

/// Runs all at once, and gives the percentiles of the small requests and the rates of the load.
pub fn run(site: &Site, scale: &Scale) -> Result<Vec<Metric>> {
    let data = site.path().join(DATA_FILE);
    let logs: Vec<PathBuf> = (0..SYNCERS).map(|i| site.path().join(format!("log-{i}"))).collect();
    let load = Load::default();
    let (time, start) = (scale.runtime * 2, Instant::now());
    let (getattrs, reads, seconds) = thread::scope(|scope| -> Result<_> {
        let streams: Vec<_> = (0..STREAMS)
            .map(|i| {
                scope.spawn({
                    let (data, load) = (&data, &load);
                    move || stream(data, i, load)
                })
            })
            .collect();
        let syncers: Vec<_> = logs
            .iter()
            .map(|log| {
                scope.spawn({
                    let load = &load;
                    move || sync(log, load)
                })
            })
            .collect();
        let getattrs = scope.spawn(|| {
            let file = File::open(&data)?;
            Latencies::of(after(time), || getattr(&file)).context("GETATTR")
        });
        let reads = scope.spawn(|| {
            let (file, mut block) = (open_direct(&data)?, Block::new(4096));
            let mut places = Places::new(7);
            let mut read = || read_block(&file, &mut block, places.next(DATA_BYTES / 4096));
            Latencies::of(after(time), &mut read).context("read of 4 KiB")
        });
        let (getattrs, reads) = (joined(getattrs.join()), joined(reads.join()));
        load.stop.store(true, Relaxed);
        let seconds = start.elapsed().as_secs_f64();
        streams.into_iter().chain(syncers).try_for_each(|one| joined(one.join()))?;
        Ok((getattrs?, reads?, seconds))
    })?;
    logs.iter().try_for_each(std::fs::remove_file)?;
    let mib = load.stream_bytes.load(Relaxed) as f64 / f64::from(1 << 20);
    let syncs = load.syncs.load(Relaxed) as f64;
    ensure!(mib > 0.0 && syncs > 0.0, "the load did nothing: {mib} MiB, {syncs} fsyncs");
    Ok(vec![
        Metric { name: "getattr-p99", unit: "us", value: getattrs.percentile(0.99) },
        Metric { name: "getattr-p50", unit: "us", value: getattrs.percentile(0.5) },
        Metric { name: "getattr-p99.9", unit: "us", value: getattrs.percentile(0.999) },
        Metric { name: "read-4k-p50", unit: "us", value: reads.percentile(0.5) },
        Metric { name: "read-4k-p99", unit: "us", value: reads.percentile(0.99) },
        Metric { name: "read-4k-p99.9", unit: "us", value: reads.percentile(0.999) },
        Metric { name: "streams", unit: "MiB/s", value: mib / seconds },
        Metric { name: "fsyncs", unit: "/s", value: syncs / seconds },
    ])
}

#[derive(Default)]
struct Load {
    stop: AtomicBool,
    stream_bytes: AtomicU64,
    syncs: AtomicU64,
}

fn open_direct(path: &Path) -> Result<File> {
    let flags = OFlags::DIRECT.bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path);
    file.with_context(|| format!("open {path:?} with O_DIRECT"))
}

fn stream(data: &Path, number: u64, load: &Load) -> Result<()> {
    let (file, mut block) = (open_direct(data)?, Block::new(STREAM_BYTES));
    let blocks = DATA_BYTES / STREAM_BYTES as u64;
    // Each begins elsewhere in the file.
    let mut index = number * blocks / STREAMS;
    while !load.stop.load(Relaxed) {
        read_block(&file, &mut block, index % blocks)?;
        load.stream_bytes.fetch_add(STREAM_BYTES as u64, Relaxed);
        index += 1;
    }
    Ok(())
}

fn sync(log: &Path, load: &Load) -> Result<()> {
    let file = File::create(log).with_context(|| format!("create {log:?}"))?;
    let content = [0x5a; 4096];
    for index in 0_u64.. {
        if load.stop.load(Relaxed) {
            break;
        }
        file.write_all_at(&content, index % 1024 * 4096)?;
        file.sync_all()?;
        load.syncs.fetch_add(1, Relaxed);
    }
    Ok(())
}
