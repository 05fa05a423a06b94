//! The READ loop on a ring that knows the file, the buffers or both beforehand, against one that is
//! told them with each read: on files in the page cache, and with `O_DIRECT`, where the pages of an
//! unknown buffer are pinned for each read.

#![allow(unsafe_code, reason = "an entry carries pointers into buffers that the function owns")]

use super::{BLOCK, DEPTHS, Measured, Places, RUN, abort, rate, ring, rounds};
use anyhow::{Context, Result};
use io_uring::{opcode, squeue, types};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

/// What the ring knows, and how the file is read.
#[derive(Clone, Copy)]
pub struct How {
    file: bool,
    buffers: bool,
    direct: bool,
}

/// As the shard does it.
pub const PLAIN: How = How { file: false, buffers: false, direct: false };

#[derive(Clone)]
#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

/// Names the columns of [`compare`].
pub fn head() {
    println!("\nthe ring: k/s plain; registered : plain, median (least-most)");
    println!(
        "{:<12} {:>8} {:>5} {:>6}   {:<18} {:<18} both",
        "directory", "", "depth", "plain", "file", "buffers"
    );
}

/// Plain, file, buffers, both.
pub fn compare(dir: &Path, path: &Path) -> Result<()> {
    for (direct, name) in [(false, "cached"), (true, "O_DIRECT")] {
        for depth in DEPTHS {
            let measured: Measured<4> = rounds(|who| {
                let how = How { file: who & 1 != 0, buffers: who & 2 != 0, direct };
                run(path, depth, how)
            })?;
            let [file, buffers, both] = [1, 2, 3].map(|who| measured.ratio(who, 0));
            let (dir, plain) = (dir.display(), measured.rates[0]);
            println!(
                "{dir:<12} {name:>8} {depth:>5} {plain:>6.0}   {file:<18} {buffers:<18} {both}"
            );
        }
    }
    Ok(())
}

/// Reads a second.
pub fn run(path: &Path, depth: usize, how: How) -> Result<f64> {
    let file = open(path, how.direct)?;
    let mut blocks = vec![Block([0; BLOCK]); depth];
    let mut places: Vec<_> = (0..depth).map(|task| Places(task as u64 * 2 + 7)).collect();
    let mut uring = ring()?;
    if how.file {
        uring.submitter().register_files(&[file.as_raw_fd()])?;
    }
    if how.buffers {
        let all = libc::iovec { iov_base: blocks.as_mut_ptr().cast(), iov_len: depth * BLOCK };
        // SAFETY: `blocks` is neither moved nor shrunk, and dropped after the ring.
        unsafe { uring.submitter().register_buffers(&[all]) }.context("RLIMIT_MEMLOCK?")?;
    }
    let (start, mut reads, mut in_flight) = (Instant::now(), 0, 0);
    let mut due: Vec<usize> = (0..depth).collect();
    let mut done = Vec::with_capacity(depth);
    loop {
        let over = start.elapsed() >= RUN;
        for key in due.drain(..).filter(|_| !over) {
            let read = entry(&file, blocks[key].0.as_mut_ptr(), places[key].next(), how);
            // SAFETY: file and block outlive the read: each key has one in flight, and the function
            // returns only when none is left or aborts the process.
            unsafe { uring.submission().push(&read.user_data(key as u64)) }
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

fn open(path: &Path, direct: bool) -> Result<File> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    opened.with_context(|| format!("open {path:?}"))
}

fn entry(file: &File, to: *mut u8, offset: u64, how: How) -> squeue::Entry {
    const LEN: u32 = BLOCK as u32;
    let fd = types::Fd(file.as_raw_fd());
    match (how.file, how.buffers) {
        (false, false) => opcode::Read::new(fd, to, LEN).offset(offset).build(),
        (true, false) => opcode::Read::new(types::Fixed(0), to, LEN).offset(offset).build(),
        (false, true) => opcode::ReadFixed::new(fd, to, LEN, 0).offset(offset).build(),
        (true, true) => opcode::ReadFixed::new(types::Fixed(0), to, LEN, 0).offset(offset).build(),
    }
}
