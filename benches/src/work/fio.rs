//! Data work by fio, from the job files beside this crate.

use super::{DATA_BYTES, DATA_FILE, Metric, Scale, rate};
use crate::site::Site;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// A job file, and what is counted.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    text: &'static str,
    unit: Unit,
}

#[derive(Clone, Copy, Debug)]
enum Unit {
    Operations,
    Mib,
}

macro_rules! job {
    ($name:literal, $unit:ident) => {
        ($name, Job { text: include_str!(concat!("../../fio/", $name, ".fio")), unit: Unit::$unit })
    };
}

/// Those that goals are set for.
pub const GOALS: &[(&str, Job)] = &[
    job!("randread-4k-d1", Operations),
    job!("randread-4k-j4", Operations),
    job!("randread-4k-d16", Operations),
    job!("randwrite-4k-d1", Operations),
    job!("randwrite-4k-j4", Operations),
    job!("read-1m", Mib),
    job!("write-1m", Mib),
];

/// Further ones.
pub const FURTHER: &[(&str, Job)] = &[
    job!("randread-64k-d1", Mib),
    job!("randwrite-64k-d1", Mib),
    job!("write-4k-buffered", Operations),
    job!("mmap-randread-4k", Operations),
];

/// Runs the job on the data file.
pub fn run(site: &Site, scratch: &Path, job: &Job, scale: &Scale) -> Result<Vec<Metric>> {
    let file = site.path().join(DATA_FILE);
    let size = fs::metadata(&file).with_context(|| format!("stat {file:?}"))?.len();
    ensure!(size == DATA_BYTES, "{file:?} has {size} bytes instead of {DATA_BYTES}");
    let job_file = scratch.join("job.fio");
    fs::write(&job_file, job.text)?;
    let mut command = Command::new("fio");
    command.args(["--output-format=json", &format!("{}", job_file.display())]);
    command.env("BENCH_FILE", &file).env("BENCH_SIZE", size.to_string());
    command.env("BENCH_RUNTIME", format!("{}ms", scale.runtime.as_millis()));
    command.stdin(Stdio::null()).current_dir(scratch);
    let (output, mut done) =
        site.measure(|| command.output().context("cannot run fio: apt-get install fio"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "fio ended with {}: {errors}", output.status);
    let told = parse(&String::from_utf8_lossy(&output.stdout))?;
    let least = scale.runtime.as_secs_f64() * 0.8;
    ensure!(told.seconds > least && told.operations > 0.0, "fio did too little: {told:?}");
    // fio's own start is no part of the rate; the servers rest meanwhile.
    done.elapsed = std::time::Duration::from_secs_f64(told.seconds);
    let metrics = rate("rate", "IOPS", told.operations, &done);
    Ok(match job.unit {
        Unit::Operations => metrics,
        Unit::Mib => {
            let value = told.bytes / told.seconds / f64::from(1 << 20);
            let rate = Metric { name: "rate", unit: "MiB/s", value };
            std::iter::once(rate).chain(metrics.into_iter().skip(1)).collect()
        }
    })
}

#[derive(Debug, PartialEq)]
struct Told {
    operations: f64,
    bytes: f64,
    seconds: f64,
}

/// Reads fio's JSON, before which it may write warnings.
fn parse(text: &str) -> Result<Told> {
    let json = text.find('{').map(|at| &text[at..]).unwrap_or_default();
    let json: Value = serde_json::from_str(json).context("cannot read fio's report")?;
    let job = &json["jobs"][0];
    ensure!(job["error"].as_i64() == Some(0), "fio met error {} of a job", job["error"]);
    let field = |rw: &str, name: &str| job[rw][name].as_f64().unwrap_or(0.0);
    let sum = |name: &str| field("read", name) + field("write", name);
    // With several jobs, `runtime` is the longest one's.
    let seconds = field("read", "runtime").max(field("write", "runtime")) / 1e3;
    Ok(Told { operations: sum("total_ios"), bytes: sum("io_bytes"), seconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fios_report_is_read() {
        let text = r#"fio: warning {not yet}"#;
        assert!(parse(text).is_err());
        let text = r#"note
            {"jobs":[{"error":0,"read":{"total_ios":10,"io_bytes":40960,"runtime":500},
            "write":{"total_ios":0,"io_bytes":0,"runtime":0}}]}"#;
        let told = Told { operations: 10.0, bytes: 40960.0, seconds: 0.5 };
        assert_eq!(parse(text).unwrap(), told);
        assert!(parse(&text.replace("\"error\":0", "\"error\":5")).is_err());
    }

    #[test]
    fn job_files_stay_within_the_data_file() {
        for (name, job) in GOALS.iter().chain(FURTHER) {
            for line in ["filename=${BENCH_FILE}", "size=${BENCH_SIZE}", "allow_file_create=0"] {
                assert!(job.text.contains(line), "{name} lacks {line}");
            }
        }
    }
}
