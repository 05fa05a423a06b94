//! `engine-ab [DIR..]`: one loop of random 4 KiB reads on pread, on tokio-uring, and on a plain
//! ring driven as the shard of ringfsd drives its own, over one file, in interleaved rounds.
//!
//! The shard's `UringRing` takes files that only a session opens, so the loop here repeats its way
//! of submitting: one issuer, deferred task work, operations that lie still in a table whose key is
//! `user_data`, one enter a turn, completions copied out before they are stepped.
//!
//! Then the same ring with what it does not use: registered files and buffers (`registered.rs`),
//! multishot receives into provided buffers (`receive.rs`).

use anyhow::{Context, Result, ensure};
use io_uring::IoUring;
use std::cell::Cell;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

mod receive;
mod registered;

const FILE_BYTES: u64 = 64 << 20;
const BLOCK: usize = 4096;
const RUN: Duration = Duration::from_millis(400);
const ROUNDS: usize = 7;
const DEPTHS: [usize; 3] = [1, 16, 64];

/// xorshift: places of blocks, the same for all.
#[derive(Clone)]
struct Places(u64);

impl Places {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % (FILE_BYTES / BLOCK as u64) * BLOCK as u64
    }
}

fn main() -> Result<()> {
    let mut dirs: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    if dirs.is_empty() {
        dirs = vec!["/dev/shm".into(), std::env::temp_dir()];
    }
    println!("4 KiB random reads of a cached file, k/s: median of {ROUNDS} rounds of {RUN:?}");
    println!(
        "{:<12} {:>5} {:>8} {:>12} {:>9}",
        "directory", "depth", "pread", "tokio-uring", "our ring"
    );
    for dir in &dirs {
        on_a_file(dir, compare)?;
    }
    registered::head();
    for dir in &dirs {
        on_a_file(dir, registered::compare)?;
    }
    receive::compare()
}

fn on_a_file(dir: &Path, compare: impl FnOnce(&Path, &Path) -> Result<()>) -> Result<()> {
    let path = dir.join(format!("ringfs-engine-ab.{}", std::process::id()));
    let outcome = fill(&path).and_then(|()| compare(dir, &path));
    let _ = fs::remove_file(&path);
    outcome
}

fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("create {path:?}"))?;
    let chunk = vec![0x5a; 1 << 20];
    for _ in 0..FILE_BYTES >> 20 {
        file.write_all(&chunk)?;
    }
    Ok(file.sync_all()?)
}

fn compare(dir: &Path, path: &Path) -> Result<()> {
    for depth in DEPTHS {
        let measured = rounds(|who| match who {
            0 => by_pread(path),
            1 => by_tokio(path, depth),
            _ => registered::run(path, depth, registered::PLAIN),
        })?;
        let [pread, tokio, ring] = measured.rates;
        let ratio = measured.ratio(2, 1);
        println!(
            "{:<12} {depth:>5} {pread:>8.0} {tokio:>12.0} {ring:>9.0}   ring / tokio-uring {ratio}",
            dir.display(),
        );
    }
    Ok(())
}

/// What `N` contenders did.
struct Measured<const N: usize> {
    /// Medians, in thousands a second.
    rates: [f64; N],
    rounds: Vec<[f64; N]>,
}

/// Has each of `N` contenders run in each round, another one first.
fn rounds<const N: usize>(run: impl Fn(usize) -> Result<f64>) -> Result<Measured<N>> {
    let mut rounds = vec![[0.0; N]; ROUNDS];
    for (round, now) in rounds.iter_mut().enumerate() {
        for turn in 0..N {
            let who = (round + turn) % N;
            now[who] = run(who)?;
        }
    }
    let rate = |who| median(&mut rounds.iter().map(|now| now[who]).collect::<Vec<_>>()) / 1e3;
    Ok(Measured { rates: std::array::from_fn(rate), rounds })
}

impl<const N: usize> Measured<N> {
    /// Of two contenders within a round: the median, the least and the most.
    fn ratio(&self, of: usize, to: usize) -> String {
        let mut ratios: Vec<_> = self.rounds.iter().map(|now| now[of] / now[to]).collect();
        let middle = median(&mut ratios);
        format!("{middle:.2} ({:.2}-{:.2})", ratios[0], ratios[ROUNDS - 1])
    }
}

/// Sorts, and gives the one in the middle: rounds are odd.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn rate(done: u64, start: Instant) -> Result<f64> {
    ensure!(done > 0, "nothing was done");
    Ok(done as f64 / start.elapsed().as_secs_f64())
}

fn ring() -> Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(256)
        .context("a ring")
}

fn by_pread(path: &Path) -> Result<f64> {
    let (file, mut buffer, mut places) = (File::open(path)?, vec![0; BLOCK], Places(7));
    let (start, mut reads) = (Instant::now(), 0);
    while start.elapsed() < RUN {
        file.read_exact_at(&mut buffer, places.next())?;
        reads += 1;
    }
    rate(reads, start)
}

fn by_tokio(path: &Path, depth: usize) -> Result<f64> {
    tokio_uring::start(async {
        let file = Rc::new(tokio_uring::fs::File::open(path).await?);
        let (reads, start) = (Rc::new(Cell::new(0)), Instant::now());
        let tasks: Vec<_> = (0..depth)
            .map(|task| {
                let (file, reads) = (file.clone(), reads.clone());
                tokio_uring::spawn(async move {
                    let (mut buffer, mut places) = (vec![0_u8; BLOCK], Places(task as u64 * 2 + 7));
                    while start.elapsed() < RUN {
                        let (read, back) = file.read_at(buffer, places.next()).await;
                        ensure!(read? == BLOCK, "a short read");
                        buffer = back;
                        reads.set(reads.get() + 1);
                    }
                    Ok(())
                })
            })
            .collect();
        for task in tasks {
            task.await.context("a task")??;
        }
        rate(reads.get(), start)
    })
}

/// An early return with reads in flight would free memory that the kernel writes to.
fn abort(why: &str) -> ! {
    eprintln!("engine-ab: {why}");
    std::process::abort()
}
