//! Latencies of one kind of call, repeated by one thread, and their percentiles.

use super::Block;
use crate::stats::percentile;
use anyhow::{Result, ensure};
use rustix::fs::{AtFlags, StatxFlags, statx};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How long a slow server may take to give enough samples.
const PATIENCE: Duration = Duration::from_secs(30);

/// Sorted latencies in microseconds.
#[derive(Clone, Debug, Default)]
pub struct Latencies(Vec<f64>);

impl Latencies {
    /// Repeats `call` until `stop` says so and there are enough for a 99th percentile.
    pub fn of(stop: impl FnMut() -> bool, call: impl FnMut() -> Result<()>) -> Result<Self> {
        Latencies::at_least(100, stop, call)
    }

    /// The same with another number of samples that must be there.
    pub fn at_least(
        samples: usize,
        mut stop: impl FnMut() -> bool,
        mut call: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        let mut all = Vec::new();
        let last = Instant::now() + PATIENCE;
        while !stop() || (all.len() < samples && Instant::now() < last) {
            let start = Instant::now();
            call()?;
            all.push(start.elapsed().as_secs_f64() * 1e6);
        }
        ensure!(all.len() >= samples, "only {} samples in {PATIENCE:?}", all.len());
        all.sort_by(f64::total_cmp);
        Ok(Latencies(all))
    }

    /// The value that this share (0 to 1) does not exceed, in microseconds.
    pub fn percentile(&self, share: f64) -> f64 {
        percentile(&self.0, share)
    }
}

/// Says true once the time is over.
pub fn after(time: Duration) -> impl FnMut() -> bool {
    let until = Instant::now() + time;
    move || Instant::now() >= until
}

/// One GETATTR that no cache answers.
pub fn getattr(file: &File) -> Result<()> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
    let told = statx(file, c"", flags, StatxFlags::BASIC_STATS)?;
    ensure!(told.stx_size > 0, "statx told a size of 0");
    Ok(())
}

/// A cheap random place of a block in a file of so many blocks.
pub struct Places(u64);

impl Places {
    /// Starts anywhere.
    pub fn new(seed: u64) -> Places {
        Places(seed | 1)
    }

    /// xorshift: the next block.
    pub fn next(&mut self, blocks: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % blocks
    }
}

/// Reads one whole block at its place in a file that was opened with O_DIRECT.
pub fn read_block(file: &File, block: &mut Block, index: u64) -> Result<()> {
    let length = block.bytes().len();
    let read = file.read_at(block.bytes(), index * length as u64)?;
    ensure!(read == length, "{read} of {length} bytes were read at block {index}");
    Ok(())
}
