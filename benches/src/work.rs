//! What is done: fio jobs, and loops over names. Each gives one rate a run: more is better.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

const DATA_FILE: &str = "bench-data";
const DATA_BYTES: u64 = 256 << 20;

/// One kind of work.
pub struct Work {
    name: &'static str,
    unit: &'static str,
    what: What,
}

enum What {
    /// fio with these arguments on the data file; the rate is IOPS or MiB/s.
    Fio { args: &'static [&'static str], seconds: u32, bytes: bool },
    /// A loop over so many names.
    Names { count: usize, step: Step },
}

#[derive(Clone, Copy)]
enum Step {
    /// create + write 4 KiB + close
    Create,
    /// stat, of names that the kernel does not know
    Stat,
    /// open + read 4 KiB + close
    Read,
    /// a name that is not there
    Absent,
    /// all names of the directory with their attributes
    List,
    Rename,
    Unlink,
}

impl Work {
    /// All of it, in the order of the report.
    pub fn all(quick: bool) -> Vec<Work> {
        let seconds = if quick { 1 } else { 2 };
        let count = if quick { 2_000 } else { 10_000 };
        let fio =
            |name, unit, bytes, args| Work { name, unit, what: What::Fio { args, seconds, bytes } };
        let names = |name, step| Work { name, unit: "files/s", what: What::Names { count, step } };
        vec![
            fio(
                "4k randread, direct, depth 1",
                "IOPS",
                false,
                &["--rw=randread", "--bs=4k", "--direct=1"],
            ),
            fio(
                "4k randread, direct, 4 jobs",
                "IOPS",
                false,
                &["--rw=randread", "--bs=4k", "--direct=1", "--numjobs=4"],
            ),
            fio(
                "4k randread, direct, depth 16",
                "IOPS",
                false,
                &["--rw=randread", "--bs=4k", "--direct=1", "--ioengine=io_uring", "--iodepth=16"],
            ),
            fio(
                "4k randwrite, direct, depth 1",
                "IOPS",
                false,
                &["--rw=randwrite", "--bs=4k", "--direct=1"],
            ),
            fio(
                "4k randwrite, direct, 4 jobs",
                "IOPS",
                false,
                &["--rw=randwrite", "--bs=4k", "--direct=1", "--numjobs=4"],
            ),
            fio("1M read, direct", "MiB/s", true, &["--rw=read", "--bs=1M", "--direct=1"]),
            fio("1M write, direct", "MiB/s", true, &["--rw=write", "--bs=1M", "--direct=1"]),
            fio(
                "1M read, buffered, cold",
                "MiB/s",
                true,
                &["--rw=read", "--bs=1M", "--invalidate=1"],
            ),
            names("create+write+close", Step::Create),
            names("stat, cold", Step::Stat),
            names("open+read+close", Step::Read),
            names("stat, absent", Step::Absent),
            names("readdir+stat", Step::List),
            names("rename", Step::Rename),
            names("unlink", Step::Unlink),
        ]
    }

    /// For the report's row.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Of the rate.
    pub fn unit(&self) -> &'static str {
        self.unit
    }

    /// Makes what all contenders share, on the bare directory.
    pub fn prepare(&self, backing: &Path) -> Result<()> {
        if matches!(self.what, What::Fio { .. }) {
            let chunk = vec![0x5a; 1 << 20];
            let mut file = fs::File::create(backing.join(DATA_FILE))?;
            for _ in 0..DATA_BYTES >> 20 {
                std::io::Write::write_all(&mut file, &chunk)?;
            }
        }
        Ok(())
    }

    /// Removes it again.
    pub fn clean(&self, backing: &Path) -> Result<()> {
        match fs::remove_file(backing.join(DATA_FILE)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// Does it once in `dir`.
    pub fn run(&self, dir: &Path) -> Result<f64> {
        match &self.what {
            What::Fio { args, seconds, bytes } => run_fio(dir, args, *seconds, *bytes),
            What::Names { count, step } => run_names(dir, *count, *step),
        }
    }
}

fn run_fio(dir: &Path, args: &[&str], seconds: u32, bytes: bool) -> Result<f64> {
    let file = dir.join(DATA_FILE);
    let output = Command::new("fio")
        .args(["--name=bench", "--output-format=json", "--group_reporting", "--time_based"])
        .args(["--randrepeat=0", "--norandommap", "--thread"])
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--size={DATA_BYTES}"))
        .arg(format!("--filename={}", file.display()))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .context("cannot run fio: apt-get install fio")?;
    ensure!(output.status.success(), "fio failed: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map(|at| &text[at..]).unwrap_or_default();
    let json: Value = serde_json::from_str(json).context("cannot read fio's report")?;
    let job = &json["jobs"][0];
    let sum = |field: &str| {
        ["read", "write"].iter().filter_map(|rw| job[rw][field].as_f64()).sum::<f64>()
    };
    Ok(if bytes { sum("bw_bytes") / f64::from(1 << 20) } else { sum("iops") })
}

fn run_names(dir: &Path, count: usize, step: Step) -> Result<f64> {
    // A directory of its own each time: no kernel knows its names.
    let home = dir.join(format!("names-{}", std::process::id()));
    let name = |i: usize| home.join(format!("file-{i:06}"));
    fs::create_dir(&home)?;
    if !matches!(step, Step::Create | Step::Absent) {
        // Made behind the back of the contender's kernel, where that is possible.
        for i in 0..count {
            fs::write(name(i), [0x5a; 4096])?;
        }
        forget_cached()?;
    }
    let start = Instant::now();
    match step {
        Step::Create => (0..count).try_for_each(|i| fs::write(name(i), [0x5a; 4096]))?,
        Step::Stat => (0..count).try_for_each(|i| fs::symlink_metadata(name(i)).map(drop))?,
        Step::Read => (0..count).try_for_each(|i| fs::read(name(i)).map(drop))?,
        Step::Absent => {
            let found = (0..count).filter(|&i| fs::symlink_metadata(name(i)).is_ok()).count();
            ensure!(found == 0, "{found} names that were never made are there");
        }
        Step::List => {
            let mut seen = 0;
            for entry in fs::read_dir(&home)? {
                entry?.metadata()?;
                seen += 1;
            }
            ensure!(seen == count, "{seen} of {count} names listed");
        }
        Step::Rename => {
            (0..count).try_for_each(|i| fs::rename(name(i), home.join(format!("other-{i:06}"))))?;
        }
        Step::Unlink => (0..count).try_for_each(|i| fs::remove_file(name(i)))?,
    }
    let rate = count as f64 / start.elapsed().as_secs_f64();
    fs::remove_dir_all(&home)?;
    Ok(rate)
}

/// Drops what kernels remember of names and attributes; data of tmpfs stays.
fn forget_cached() -> Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "2").context("cannot drop caches: run as root")
}
