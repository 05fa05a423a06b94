//! One share lies on a frozen ext4 while its guest writes: how long another guest's GETATTR takes.
//!
//! Only a server of several guests has anything to lose here, so it is asked of ringfs alone.

use super::probe::{Latencies, after, getattr};
use super::{Metric, Scale, joined};
use crate::backing::loop_ext4;
use crate::contender::Kind;
use crate::site::{Daemon, Place, Site};
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// More than any pool has threads to lose.
const WRITERS: usize = 32;
/// How long things that should be quick may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Thawed after that by itself.
const FROZEN_MAX: Duration = Duration::from_secs(20);

/// A daemon of its own with two shares and two mounts. With `create` the guest on the frozen share
/// makes new files, otherwise it writes to files that it has.
pub fn run(site: &Site, create: bool, place: &Place<'_>, scale: &Scale) -> Result<Vec<Metric>> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    if site.spec.kind != Kind::Ringfs {
        return Ok(Vec::new());
    }
    let label = format!("frozen-{}", NEXT.fetch_add(1, Relaxed));
    let ground = loop_ext4(place.scratch, &format!("{label}-ext4"), 64)?;
    let freezer = Freezer::new(ground.dir())?;
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
    let during = while_frozen(frozen.at(), create, freezer, &probed, scale)?;
    let after = p99()?;
    let usual = f64::midpoint(before, after);
    Ok(vec![
        Metric { name: "p99-ratio", unit: "x", value: during / usual },
        Metric { name: "p99-free", unit: "us", value: usual },
        Metric { name: "p99-frozen", unit: "us", value: during },
    ])
}

/// A shell that freezes a file system when told, and thaws it when told or when we are gone.
///
/// It must run before files on the mount are open: starting a program closes its copies of them,
/// and closing a file on a mount whose server is held up would wait for the thaw itself.
struct Freezer {
    child: Child,
    told: ChildStdin,
    says: BufReader<ChildStdout>,
}

impl Freezer {
    fn new(dir: &Path) -> Result<Freezer> {
        // Whoever it tells may be gone, or cannot go: a killed bench waits for its own writers.
        let script = format!(
            "trap '' PIPE; read go || exit; fsfreeze -f \"$0\" && echo frozen; \
            (sleep {}; fsfreeze -u \"$0\") </dev/null >/dev/null 2>&1 & \
            read go; fsfreeze -u \"$0\" && echo thawed; kill $!",
            FROZEN_MAX.as_secs()
        );
        let mut command = Command::new("sh");
        command.args(["-c", &script]).arg(dir).stdin(Stdio::piped()).stdout(Stdio::piped());
        // Not ended by the terminal's Ctrl-C: it must live to thaw.
        let mut child = command.process_group(0).spawn().context("cannot run sh")?;
        let told = child.stdin.take().context("no pipe to sh")?;
        let says = BufReader::new(child.stdout.take().context("no pipe from sh")?);
        Ok(Freezer { child, told, says })
    }

    fn step(&mut self, expected: &str) -> Result<()> {
        self.told.write_all(b"go\n")?;
        let mut line = String::new();
        self.says.read_line(&mut line)?;
        ensure!(line.trim() == expected, "fsfreeze did not make it {expected}");
        Ok(())
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        // A second word does no harm if it has thawed already.
        let _ = self.told.write_all(b"go\ngo\n");
        let _ = self.child.wait();
    }
}

/// The 99th percentile while writers hang on the frozen file system below `mount`.
fn while_frozen(
    mount: &Path,
    create: bool,
    mut freezer: Freezer,
    probed: &File,
    scale: &Scale,
) -> Result<f64> {
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let begun = Barrier::new(WRITERS + 1);
    thread::scope(|scope| {
        let mut writers = Vec::new();
        for i in 0..WRITERS {
            let (stop, written, begun) = (&stop, &written, &begun);
            let path = move |n: u64| mount.join(format!("file-{i}-{}", n % 16));
            writers.push(scope.spawn(move || -> Result<()> {
                let first = File::create(path(0));
                // Also after an error: nobody may wait for ever.
                begun.wait();
                let mut file = first?;
                for n in 1.. {
                    if stop.load(Relaxed) {
                        break;
                    }
                    if create {
                        file = File::create(path(n))?;
                    }
                    file.write_all_at(&[0x5a; 4096], 0)?;
                    written.fetch_add(1, Relaxed);
                }
                Ok(())
            }));
        }
        begun.wait();
        let p99 = frozen(&mut freezer, &written, probed, scale);
        // Thawed, whatever happened.
        drop(freezer);
        stop.store(true, Relaxed);
        writers.into_iter().try_for_each(|writer| joined(writer.join())).context("a writer")?;
        p99
    })
}

fn frozen(freezer: &mut Freezer, written: &AtomicU64, probed: &File, scale: &Scale) -> Result<f64> {
    freezer.step("frozen")?;
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
        freezer.step("thawed")?;
        let latencies = joined(prober.join())?;
        ensure!(wrote == 0, "a frozen file system took {wrote} writes");
        Ok(latencies.percentile(0.99))
    })
}
