//! `cargo xtask find`: a guest walks over more files than its daemon may open.
//!
//! Invariant: find sees each file once and nobody hears of too many open files, though the daemon
//! never has more than its limit; files that lost their fd meanwhile are found again. Memory is
//! that of the daemon's two processes together, at their peak.

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, getrlimit};

use crate::deps;
use crate::guard;
use crate::paths::Bins;
use crate::proc::Cmd;
use crate::rig::{self, Daemon, Mount};
use crate::sandbox::Sandbox;
use crate::survive::memory::mib;

const FILES_A_DIR: usize = 1000;
const LOOK: Duration = Duration::from_millis(100);
/// A million files on two busy cores.
const LIMIT: Duration = Duration::from_secs(1800);
/// The daemon as a shell starts it, whose root may not raise its own limit again.
const LIMITED: &str = "#!/bin/sh
ulimit -n FDS
exec setpriv --bounding-set=-sys_resource RINGFSD \"$@\"
";

/// What `cargo xtask find` takes.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Args {
    /// Empty files, in memory: about 1 KiB each
    #[arg(long, default_value_t = 1_000_000)]
    files: usize,
    /// Files that the daemon may open (ulimit -n); at most what this shell may
    #[arg(long, default_value_t = 65_536)]
    fds: u64,
}

/// Short enough for CI.
pub fn run_short() -> Result<String> {
    run(&Args { files: 20_000, fds: 1024 })
}

/// Runs it; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    deps::debian(deps::TEST_PACKAGES)?;
    let bins = Bins::build()?;
    let sandbox = Sandbox::in_memory()?;
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let fds = args.fds.min(hard);
    if fds < args.fds {
        println!("find: {fds} files for the daemon: the hard limit here (ulimit -Hn)");
    }
    let done = guard::with_limit(LIMIT, || Find { files: args.files, fds }.run(&sandbox, &bins));
    sandbox.logged("find", done)
}

struct Find {
    files: usize,
    fds: u64,
}

/// The most that was seen.
#[derive(Clone, Copy, Debug, Default)]
struct Peak {
    /// Of one process.
    fds: usize,
    nodes: u64,
}

impl Find {
    fn run(&self, sandbox: &Sandbox, bins: &Bins) -> Result<String> {
        let share = sandbox.make_dir("share")?;
        self.make_files(&share)?;
        let ringfsd = self.limited(sandbox, &bins.ringfsd)?;
        let bins = Bins { ringfsd, ringfs: bins.ringfs.clone() };
        let daemon = Daemon::start(sandbox, &bins, "d", &[rig::share("x", &share)], &[])?;
        let start = daemon.counters_at_rest()?;
        let mount = daemon.mount(sandbox, "x", "mnt", "")?;
        let begun = Instant::now();
        let peak = watched(&daemon, || self.find(&mount))?;
        let took = begun.elapsed().as_secs_f64();
        // Those that were seen first have lost their fd first.
        for dir in 0..self.files.div_ceil(FILES_A_DIR) {
            let file = mount.dir.join(format!("{dir}/0"));
            ensure!(fs::read(&file).with_context(|| file.display().to_string())?.is_empty());
        }
        let resident: u64 =
            processes(&daemon)?.into_iter().map(peak_resident).sum::<Result<_>>()?;
        mount.umount()?;
        daemon.assert_back_at(&start)?;
        let log = fs::read_to_string(daemon.log())?;
        ensure!(!log.contains("oo many open files"), "the daemon's log: {}", daemon.log_tail());
        daemon.stop()?;
        ensure!(peak.fds as u64 <= self.fds, "{peak:?} is beyond the limit");
        let Find { files, fds } = self;
        let Peak { fds: used, nodes } = peak;
        let (rate, resident) = (*files as f64 / took, mib(resident));
        Ok(format!(
            "{files} files in {took:.1} s ({rate:.0} a second) by a daemon that may open {fds}: at \
             its peak it knew {nodes} nodes, had {used} fds and {resident:.0} MiB resident"
        ))
    }

    fn make_files(&self, share: &Path) -> Result<()> {
        for n in 0..self.files {
            let dir = share.join((n / FILES_A_DIR).to_string());
            if n % FILES_A_DIR == 0 {
                fs::create_dir(&dir)?;
            }
            File::create(dir.join((n % FILES_A_DIR).to_string()))?;
        }
        Ok(())
    }

    fn limited(&self, sandbox: &Sandbox, ringfsd: &Path) -> Result<std::path::PathBuf> {
        let path = sandbox.path("ringfsd.sh");
        let ringfsd = fs::canonicalize(ringfsd)?;
        let script = LIMITED.replace("RINGFSD", &ringfsd.display().to_string());
        fs::write(&path, script.replace("FDS", &self.fds.to_string()))?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(path)
    }

    /// Each file's size is looked at, so that the daemon has to know it.
    fn find(&self, mount: &Mount) -> Result<()> {
        let find = Cmd::new("find").arg(&mount.dir).args(["-type", "f", "-size", "0"]);
        let seen = find.args(["-printf", "x"]).limit(LIMIT).run().context("find")?.len();
        ensure!(seen == self.files, "find saw {seen} of {} files", self.files);
        Ok(())
    }
}

/// Does it, and looks meanwhile at what the daemon has.
fn watched(daemon: &Daemon, work: impl FnOnce() -> Result<()>) -> Result<Peak> {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| -> Result<Peak> {
            let mut peak = Peak::default();
            while !is_over.load(Ordering::Relaxed) {
                for pid in processes(daemon)? {
                    peak.fds = peak.fds.max(open_files(pid)?);
                }
                peak.nodes = peak.nodes.max(daemon.counters()?.nodes);
                thread::sleep(LOOK);
            }
            Ok(peak)
        });
        let done = work();
        is_over.store(true, Ordering::Relaxed);
        let peak = watch.join().expect("it does not panic");
        done.and(peak)
    })
}

/// The parent and its worker.
fn processes(daemon: &Daemon) -> Result<Vec<i32>> {
    let pid = daemon.process().pid().as_raw_nonzero().get();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    Ok(std::iter::once(pid).chain(children).collect())
}

fn open_files(pid: i32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// In bytes.
fn peak_resident(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.with_context(|| format!("process {pid} has no VmHWM"))? << 10)
}
