//! `engine-ab [DIR..]`: one loop of random 4 KiB reads on pread, on tokio-uring, and on a plain
//! ring driven as the shard of ringfsd drives its own, over one file, in interleaved rounds.
//!
//! The shard's `UringRing` takes files that only a session opens, so the loop here repeats its way
//! of submitting: one issuer, deferred task work, operations that lie still in a table whose key is
//! `user_data`, one enter a turn, completions copied out before they are stepped. The only unsafe
//! code is the push of an entry, whose memory the table owns.

#![allow(unsafe_code, reason = "an entry carries pointers into buffers that the table owns")]

use anyhow::{Context, Result, ensure};
use io_uring::{IoUring, opcode, types};
use std::cell::Cell;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

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
    for dir in dirs {
        let path = dir.join(format!("ringfs-engine-ab.{}", std::process::id()));
        let outcome = compare(&dir, &path);
        let _ = fs::remove_file(&path);
        outcome?;
    }
    Ok(())
}

fn compare(dir: &Path, path: &Path) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("create {path:?}"))?;
    let chunk = vec![0x5a; 1 << 20];
    for _ in 0..FILE_BYTES >> 20 {
        file.write_all(&chunk)?;
    }
    for depth in DEPTHS {
        let (mut rates, mut ratios) = ([vec![], vec![], vec![]], vec![]);
        for round in 0..ROUNDS {
            let mut now = [0.0; 3];
            // Another one begins each round.
            for turn in 0..3 {
                let who = (round + turn) % 3;
                now[who] = match who {
                    0 => by_pread(path)?,
                    1 => by_tokio(path, depth)?,
                    _ => by_ring(path, depth)?,
                };
            }
            (0..3).for_each(|who| rates[who].push(now[who]));
            ratios.push(now[2] / now[1]);
        }
        let [pread, tokio, ring] = rates.map(|mut rates| median(&mut rates) / 1e3);
        let ratio = median(&mut ratios);
        let (least, most) = (ratios[0], ratios[ROUNDS - 1]);
        println!(
            "{:<12} {depth:>5} {pread:>8.0} {tokio:>12.0} {ring:>9.0}   \
             ring / tokio-uring {ratio:.2} ({least:.2}-{most:.2})",
            dir.display(),
        );
    }
    Ok(())
}

/// Sorts, and gives the one in the middle: rounds are odd.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn rate(reads: u64, start: Instant) -> Result<f64> {
    ensure!(reads > 0, "nothing was read");
    Ok(reads as f64 / start.elapsed().as_secs_f64())
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

fn by_ring(path: &Path, depth: usize) -> Result<f64> {
    let file = File::open(path)?;
    let mut uring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        .build(256)
        .context("a ring")?;
    let mut table: Vec<(Vec<u8>, Places)> =
        (0..depth).map(|task| (vec![0; BLOCK], Places(task as u64 * 2 + 7))).collect();
    let (start, mut reads, mut in_flight) = (Instant::now(), 0, 0);
    let mut due: Vec<usize> = (0..depth).collect();
    let mut done = Vec::with_capacity(depth);
    loop {
        let over = start.elapsed() >= RUN;
        for key in due.drain(..).filter(|_| !over) {
            let (buffer, places) = &mut table[key];
            let fd = types::Fd(file.as_raw_fd());
            let read = opcode::Read::new(fd, buffer.as_mut_ptr(), BLOCK as u32);
            let entry = read.offset(places.next()).build().user_data(key as u64);
            // SAFETY: buffer and file outlive the operation: the table is neither moved nor shrunk,
            // each key has one read in flight, and the function returns only when none is left or
            // aborts the process.
            unsafe { uring.submission().push(&entry) }
                .unwrap_or_else(|_| abort("the ring is full"));
            in_flight += 1;
        }
        if in_flight == 0 {
            return rate(reads, start);
        }
        uring.submit_and_wait(1).unwrap_or_else(|_| abort("the ring cannot be entered"));
        done.extend(uring.completion().map(|cqe| (cqe.user_data() as usize, cqe.result())));
        for (key, result) in done.drain(..) {
            if result != BLOCK as i32 {
                abort("a read failed or was short");
            }
            (reads, in_flight) = (reads + 1, in_flight - 1);
            due.push(key);
        }
    }
}

/// An early return with reads in flight would free memory that the kernel writes to.
fn abort(why: &str) -> ! {
    eprintln!("engine-ab: {why}");
    std::process::abort()
}
