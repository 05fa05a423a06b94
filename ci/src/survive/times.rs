//! `cargo xtask survive times`: from a reset, a kill or a restore to the first answer.
//!
//! Each answer is asked for after the connection was broken, so that none can come by the old one,
//! and is checked. Invariant: whoever holds files on a mount starts no process while the daemon is
//! away: that process would close them at its exec, and wait for the daemon.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;

use super::figures::{self, Row};
use crate::faults::proxy::Proxy;
use crate::faults::rng::Rng;
use crate::faults::schedule::Schedule;
use crate::guard;
use crate::paths::Bins;
use crate::rig::{self, Daemon, Mount, SETTLE, Told};
use crate::sandbox::Sandbox;

/// A connection that lived shorter leaves the client's back-off where it was.
const CALM: Duration = Duration::from_millis(1050);
/// Mounts whose connections are reset in turn, so that each rests for `CALM` while others work.
const RESET_MOUNTS: usize = 4;
const RESET_NODES: usize = 1000;
/// Operations that wait for one restore.
const PARALLEL: usize = 10;
const FILES_PER_DIR: usize = 1000;
const FILE_BYTES: usize = 512;
/// How long anything may take before the run is given up.
const LIMIT: Duration = Duration::from_secs(600);
const RESET_P99_MAX: Duration = Duration::from_millis(100);
const RESTART_P99_MAX: Duration = Duration::from_millis(500);
const RESTORE_MAX: Duration = Duration::from_secs(1);
/// How often a new daemon is asked whether it listens.
const LOOK: Duration = Duration::from_micros(500);

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Resets, the daemon lives
    Reset,
    /// The daemon is killed and started again
    Restart,
    /// `ringfs reconnect` on connections that are silently dead
    Restore,
}

/// What `cargo xtask survive times` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Resets of connections
    #[arg(long, default_value_t = 100)]
    resets: usize,
    /// Kills of the daemon
    #[arg(long, default_value_t = 20)]
    restarts: usize,
    /// Restores
    #[arg(long, default_value_t = 20)]
    restores: usize,
    /// Nodes known when the daemon is killed
    #[arg(long, default_value_t = 100_000)]
    nodes: usize,
    /// Files open when the daemon is killed
    #[arg(long, default_value_t = 1000)]
    open: usize,
    /// Threads that read all the while
    #[arg(long, default_value_t = 0)]
    load: usize,
    /// How long the daemon stays away after each kill, in milliseconds
    #[arg(long, default_value_t = 0)]
    away_ms: u64,
    /// This alone; may be given several times
    #[arg(long, value_enum)]
    only: Vec<What>,
    /// Answers are checked, times are printed and not held against anything
    #[arg(long)]
    no_bounds: bool,
}

impl Args {
    /// For CI: are the answers right?
    pub fn short() -> Self {
        Self {
            resets: 8,
            restarts: 2,
            restores: 2,
            nodes: 5000,
            open: 100,
            load: 2,
            away_ms: 0,
            only: Vec::new(),
            no_bounds: true,
        }
    }
}

/// Runs it; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    let bins = Bins::build()?;
    let mut rows = Vec::new();
    let mut told = None;
    for what in [What::Reset, What::Restart, What::Restore] {
        if !args.only.is_empty() && !args.only.contains(&what) {
            continue;
        }
        let done = guard::with_limit(LIMIT, || match what {
            What::Reset => {
                let place = Place::new(RESET_NODES)?;
                place.sandbox.logged("survive", resets(args, &bins, &place))
            }
            What::Restart => {
                let place = Place::new(args.nodes)?;
                let done = place.sandbox.logged("survive", restarts(args, &bins, &place));
                let (rows, last) = done?;
                told = Some(last);
                Ok(rows)
            }
            What::Restore => {
                let place = Place::new(RESET_NODES)?;
                place.sandbox.logged("survive", restores(args, &bins, &place))
            }
        });
        rows.extend(done.with_context(|| format!("{what:?}"))?);
    }
    let more = told.map(|told| {
        println!(
            "the last rebuild: {} nodes ({} lost) and {} open files, {} bytes on the wire, told in \
             {:.1} ms",
            told.nodes_restored,
            told.nodes_lost,
            told.handles_restored,
            told.rebuild_bytes,
            told.rebuild_us as f64 / 1000.0
        );
        json!({
            "nodes": told.nodes_restored,
            "open": told.handles_restored,
            "rebuild_bytes": told.rebuild_bytes,
            "rebuild_us": told.rebuild_us,
        })
    });
    figures::print(&rows, more.unwrap_or_default());
    if !args.no_bounds {
        figures::check(&rows)?;
    }
    Ok(format!("{} rows, all answers right", rows.len()))
}

/// What a file holds; its number is its name.
fn content(n: usize) -> Vec<u8> {
    format!("{n:08} ").repeat(FILE_BYTES / 9 + 1).into_bytes()[..FILE_BYTES].to_vec()
}

fn path(root: &Path, n: usize) -> PathBuf {
    root.join(format!("d{}/{n}", n / FILES_PER_DIR))
}

/// Makes files on the host.
fn make_files(root: &Path, count: usize) -> Result<()> {
    for n in 0..count {
        if n % FILES_PER_DIR == 0 {
            fs::create_dir(root.join(format!("d{}", n / FILES_PER_DIR)))?;
        }
        fs::write(path(root, n), content(n))?;
    }
    Ok(())
}

/// Has the guest know all of them.
fn know(root: &Path, count: usize) -> Result<()> {
    let dirs = count.div_ceil(FILES_PER_DIR);
    let mut seen = 0;
    for dir in 0..dirs {
        for entry in fs::read_dir(root.join(format!("d{dir}")))? {
            entry?.path().symlink_metadata()?;
            seen += 1;
        }
    }
    ensure!(seen == count, "{seen} of {count} files are seen");
    Ok(())
}

/// Looks one of them up by its name, which no cache answers, and checks what comes.
fn ask(root: &Path, behind: &Path, n: usize) -> Result<()> {
    let path_of = path(root, n);
    let found = path_of.symlink_metadata().with_context(|| format!("{}", path_of.display()))?;
    let is = fs::symlink_metadata(path(behind, n))?;
    let is_it = found.len() == FILE_BYTES as u64 && found.ino() == is.ino();
    ensure!(is_it, "file {n} is another one");
    Ok(())
}

/// Opens one of them, which no cache answers either, and reads it.
fn open(root: &Path, n: usize) -> Result<()> {
    let path_of = path(root, n);
    let data = fs::read(&path_of).with_context(|| format!("{}", path_of.display()))?;
    ensure!(data == content(n), "file {n} has other bytes");
    Ok(())
}

fn read(file: &File, n: usize) -> Result<()> {
    let mut data = vec![0; FILE_BYTES];
    file.read_exact_at(&mut data, 0).with_context(|| format!("read of file {n}"))?;
    ensure!(data == content(n), "file {n} has other bytes");
    Ok(())
}

/// A daemon's directory in memory with `count` files.
struct Place {
    sandbox: Sandbox,
    behind: PathBuf,
    count: usize,
}

impl Place {
    fn new(count: usize) -> Result<Self> {
        let sandbox = Sandbox::in_memory()?;
        let behind = sandbox.make_dir("backing")?;
        make_files(&behind, count)?;
        Ok(Self { sandbox, behind, count })
    }

    fn daemon(&self, bins: &Bins) -> Result<Daemon> {
        let state = self.sandbox.path("state").display().to_string();
        let shares = [rig::share("x", &self.behind)];
        Daemon::start(&self.sandbox, bins, "d", &shares, &["--state-dir", &state])
    }

    /// A mount behind a proxy, which knows all files.
    fn proxied(&self, daemon: &Daemon, n: usize) -> Result<(Mount, Proxy)> {
        let schedule = Schedule { seed: 0, gap_max: 1, calm: true, unchecked: false };
        let log = File::create(self.sandbox.path(&format!("p{n}.log")))?;
        let socket = self.sandbox.path(&format!("p{n}.sock"));
        let proxy = Proxy::start(&socket, &daemon.socket, schedule, log)?;
        let dir = self.sandbox.make_dir(&format!("m{n}"))?;
        let log = self.sandbox.path(&format!("m{n}.log"));
        let mount = daemon.mount_through(&proxy.socket, "x", &dir, "cache=never", &log)?;
        know(&mount.dir, self.count)?;
        Ok((mount, proxy))
    }

    /// Does `work` while `threads` read files of `mounts`, which must not fail.
    fn under_load<T>(
        &self,
        threads: usize,
        mounts: &[&Mount],
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let stop = AtomicBool::new(false);
        let reader = |thread: usize| -> Result<()> {
            let mut rng = Rng::of(&[thread as u64, 7]);
            while !stop.load(Relaxed) {
                let mount = mounts[thread % mounts.len()];
                open(&mount.dir, rng.below(self.count as u64) as usize)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let reader = &reader;
            let readers: Vec<_> =
                (0..threads).map(|thread| scope.spawn(move || reader(thread))).collect();
            let done = work();
            stop.store(true, Relaxed);
            for thread in readers {
                thread.join().map_err(|_| anyhow!("a reader panicked"))?.context("a reader")?;
            }
            done
        })
    }
}

fn loaded(threads: usize) -> String {
    if threads == 0 { String::new() } else { format!(", {threads} readers") }
}

/// Resets of all connections of one mount after the other, the daemon lives.
fn resets(args: &Args, bins: &Bins, place: &Place) -> Result<Vec<Row>> {
    let daemon = place.daemon(bins)?;
    let start = daemon.counters_at_rest()?;
    let pairs = (0..RESET_MOUNTS).map(|n| place.proxied(&daemon, n)).collect::<Result<Vec<_>>>()?;
    let what = format!("reset, same daemon, {RESET_NODES} nodes{}", loaded(args.load));
    let mut row = Row::new(what, Some(RESET_P99_MAX));
    let mounts: Vec<&Mount> = pairs.iter().map(|(mount, _)| mount).collect();
    place.under_load(args.load, &mounts, || {
        let mut rng = Rng::of(&[args.resets as u64]);
        let mut rested = [Instant::now(); RESET_MOUNTS];
        for turn in 0..args.resets {
            let (mount, proxy) = &pairs[turn % RESET_MOUNTS];
            let rested = &mut rested[turn % RESET_MOUNTS];
            thread::sleep(CALM.saturating_sub(rested.elapsed()));
            let n = rng.below(RESET_NODES as u64) as usize;
            let begun = Instant::now();
            proxy.cut();
            ask(&mount.dir, &place.behind, n)?;
            row.add(begun.elapsed());
            *rested = Instant::now();
        }
        Ok(())
    })?;
    let resumes = daemon.counters()?.others.get("resumes").and_then(serde_json::Value::as_u64);
    ensure!(resumes >= Some(args.resets as u64), "{resumes:?} resumes");
    // A client says goodbye when its mount has gone: proxies stay until the daemon has heard it.
    let (mounts, proxies): (Vec<Mount>, Vec<Proxy>) = pairs.into_iter().unzip();
    for mount in mounts {
        ensure!(mount.told()?.rebuilds == 0, "a session was rebuilt: it should have gone on");
        mount.umount()?;
    }
    daemon.assert_back_at(&start)?;
    for proxy in proxies {
        ensure!(proxy.findings().is_empty(), "{:?}", proxy.findings());
    }
    daemon.stop()?;
    Ok(vec![row])
}

/// The daemon is killed, and another one comes that knows nothing.
fn restarts(args: &Args, bins: &Bins, place: &Place) -> Result<(Vec<Row>, Told)> {
    let files_open = args.open.clamp(1, args.nodes);
    let mut daemon = place.daemon(bins)?;
    let start = daemon.counters_at_rest()?;
    daemon.make_spares(args.restarts as u32)?;
    let mount = daemon.mount(&place.sandbox, "x", "m", "cache=metadata")?;
    know(&mount.dir, args.nodes)?;
    let of = format!("{} nodes, {files_open} open files{}", args.nodes, loaded(args.load));
    let bound = Some(RESTART_P99_MAX);
    let mut rows = [
        Row::new(format!("new daemon listens to first answer, {of}"), bound),
        Row::new("kill -9 to first answer", None),
        Row::new("kill -9 to the new daemon listens", None),
        Row::new("the client tells what it knows (from connect)", None),
    ];
    let files =
        (0..files_open).map(|n| File::options().read(true).write(true).open(path(&mount.dir, n)));
    let files = files.collect::<std::io::Result<Vec<File>>>()?;
    let mut told = mount.told()?;
    ensure!(told.nodes_known >= args.nodes as u64, "{} nodes are known", told.nodes_known);
    ensure!(told.handles_known >= files_open as u64, "{} files are open", told.handles_known);
    place.under_load(args.load, &[&mount], || {
        let mut rng = Rng::of(&[args.restarts as u64, 3]);
        let mut rested = Instant::now();
        for turn in 0..args.restarts {
            thread::sleep(CALM.saturating_sub(rested.elapsed()));
            let away = Duration::from_millis(args.away_ms);
            let times = restart(&mut daemon, &files, turn % files_open, away)?;
            rested = Instant::now();
            for (row, time) in rows.iter_mut().zip(times) {
                row.add(time);
            }
            for _ in 0..200 {
                let n = rng.below(args.nodes as u64) as usize;
                open(&mount.dir, n)?;
                read(&files[n % files_open], n % files_open)?;
            }
            let before = told.rebuilds;
            told = mount.told()?;
            ensure!(told.rebuilds == before + 1, "{} rebuilds of {}", told.rebuilds, before + 1);
            ensure!(told.nodes_restored >= args.nodes as u64, "{} nodes", told.nodes_restored);
            ensure!(told.handles_restored >= files_open as u64, "{} files", told.handles_restored);
            ensure!(told.nodes_lost == 0, "{} nodes are lost", told.nodes_lost);
            rows[3].add(Duration::from_micros(told.rebuild_us));
        }
        Ok(())
    })?;
    for (n, file) in files.iter().enumerate() {
        read(file, n)?;
        file.write_all_at(b"still mine", 0).with_context(|| format!("write of file {n}"))?;
    }
    drop(files);
    for n in (files_open..args.nodes).step_by(10) {
        open(&mount.dir, n)?;
    }
    mount.umount()?;
    daemon.assert_back_at(&start)?;
    daemon.stop()?;
    Ok((rows.into(), told))
}

/// One kill: listening to answer, kill to answer, kill to listening.
fn restart(daemon: &mut Daemon, files: &[File], n: usize, away: Duration) -> Result<[Duration; 3]> {
    let killed = Instant::now();
    daemon.kill()?;
    thread::scope(|scope| {
        let asked = scope.spawn(move || read(&files[n], n).map(|()| Instant::now()));
        thread::sleep(away);
        daemon.start_again()?;
        while !daemon.accepts() {
            ensure!(killed.elapsed() < SETTLE + away, "no daemon:\n{}", daemon.log_tail());
            thread::sleep(LOOK);
        }
        let listens = Instant::now();
        let answered = asked.join().map_err(|_| anyhow!("a reader panicked"))??;
        daemon.wait_ready()?;
        let since = |time| answered.saturating_duration_since(time);
        Ok([since(listens), since(killed), listens - killed])
    })
}

/// Connections die without a word, as in a snapshot; the hook says so, and all is answered.
fn restores(args: &Args, bins: &Bins, place: &Place) -> Result<Vec<Row>> {
    let daemon = place.daemon(bins)?;
    let start = daemon.counters_at_rest()?;
    let (mount, proxy) = place.proxied(&daemon, 0)?;
    let mut asker = mount.asker(&place.sandbox, "m0")?;
    let all = proxy.live();
    let mut rows = Vec::new();
    for (host_too, how) in [(false, "closed on the host"), (true, "open on the host as well")] {
        let what = format!("restore signal to {PARALLEL} answers, connections {how}");
        let mut row = Row::new(what, Some(RESTORE_MAX));
        for turn in 0..args.restores {
            // What the turn before left has ended, and each lane has its connection.
            let whole = guard::poll_until(SETTLE, || Ok(proxy.live() >= all))?;
            ensure!(whole, "not all connections after {SETTLE:?}");
            proxy.silence(host_too);
            let took = thread::scope(|scope| {
                let waiting: Vec<_> = (0..PARALLEL)
                    .map(|n| {
                        let (dir, behind) = (&mount.dir, &place.behind);
                        let n = (turn * PARALLEL + n) % RESET_NODES;
                        scope.spawn(move || ask(dir, behind, n))
                    })
                    .collect();
                let begun = Instant::now();
                asker.reconnect()?;
                for answer in waiting {
                    answer.join().map_err(|_| anyhow!("a thread panicked"))??;
                }
                Ok::<_, anyhow::Error>(begun.elapsed())
            })?;
            row.add(took);
            proxy.end_silence();
        }
        rows.push(row);
    }
    let told = mount.told()?;
    ensure!(told.rebuilds == 0, "a session was rebuilt: it should have gone on");
    mount.umount()?;
    daemon.assert_back_at(&start)?;
    ensure!(proxy.findings().is_empty(), "{:?}", proxy.findings());
    daemon.stop()?;
    Ok(rows)
}
