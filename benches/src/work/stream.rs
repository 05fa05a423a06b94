//! A whole file read in order through the guest's cache, which knows none of it.

use super::{DATA_BYTES, DATA_FILE, Metric, Scale, rate};
use crate::site::{Measured, Site};
use anyhow::{Result, ensure};
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::io::Read;

/// Reads the data file in 1 MiB blocks until the time is over, forgetting it before each pass.
/// (tmpfs forgets nothing: for the bare directory it is the speed of memory.)
pub fn run(site: &Site, scale: &Scale) -> Result<Vec<Metric>> {
    let mut passes = 1;
    let mut sum = pass(site)?;
    while sum.elapsed < scale.runtime {
        sum.add(&pass(site)?);
        passes += 1;
    }
    Ok(rate("rate", "MiB/s", f64::from(passes) * (DATA_BYTES >> 20) as f64, &sum))
}

fn pass(site: &Site) -> Result<Measured> {
    let mut block = vec![0; 1 << 20];
    let mut file = File::open(site.path().join(DATA_FILE))?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    let (bytes, done) = site.measure(|| {
        let mut bytes = 0;
        loop {
            match file.read(&mut block)? {
                0 => return Ok(bytes),
                n => bytes += n as u64,
            }
        }
    })?;
    ensure!(bytes == DATA_BYTES, "{bytes} of {DATA_BYTES} bytes were read");
    Ok(done)
}
