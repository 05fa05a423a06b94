//! One guest's programs: threads that read, write, sync, lock, list and rename, each of which knows
//! what it must find.
//!
//! A process of its own, so that whoever cuts its connections holds no file of the mount.
//! Invariant: no operation may fail and no byte may differ, whatever happens to connections and
//! daemons; no file is removed while it is open, which no daemon after a killed one can find again.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{Advice, fadvise};
use serde::{Deserialize, Serialize};

use crate::faults::rng::Rng;

const BLOCK_BYTES: usize = 16 << 10;
const BLOCKS: u64 = 64;
const RECORD_BYTES: usize = 100;
const RECORDS_MAX: u64 = 256;
const NAMES_MAX: usize = 200;
const STREAM_BYTES: usize = 1 << 20;
const STREAM_PIECES: u64 = 4;
/// How often the stop file is looked for, and the state is told.
const LOOK: Duration = Duration::from_millis(100);
const TELL: Duration = Duration::from_millis(500);

/// What `cargo xtask survive work` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// An empty directory of the mount, which is empty again at the end
    #[arg(long)]
    dir: PathBuf,
    /// The work ends when this file is there; it must not lie on the mount
    #[arg(long)]
    stop: PathBuf,
    #[arg(long, default_value_t = 7)]
    threads: u64,
    /// More threads, each with a write of 1 MiB in flight all the time
    #[arg(long, default_value_t = 0)]
    floods: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Each thread rests so long between two steps, in milliseconds
    #[arg(long, default_value_t = 0)]
    rest_ms: u64,
}

/// What is told of the work, one line of JSON each time.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Steps done; each is several operations.
    pub steps: u64,
    /// The longest so far.
    pub slowest_ms: u64,
    /// What went wrong.
    pub problems: Vec<String>,
}

/// The newest line of a log of this program.
pub fn newest(log: &Path) -> Option<State> {
    let text = fs::read_to_string(log).ok()?;
    text.lines().rev().find_map(|line| serde_json::from_str(line).ok())
}

#[derive(Debug, Default)]
struct Account {
    steps: AtomicU64,
    slowest_ms: AtomicU64,
    /// Times that the lock was held.
    locked: AtomicU64,
    problems: Mutex<Vec<String>>,
}

impl Account {
    fn state(&self) -> State {
        let problems = self.problems.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        State {
            steps: self.steps.load(Relaxed),
            slowest_ms: self.slowest_ms.load(Relaxed),
            problems: problems.clone(),
        }
    }

    fn problem(&self, what: String) {
        eprintln!("work: PROBLEM {what}");
        self.problems.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(what);
    }
}

/// Works until it is told to stop; an error if anything was wrong.
pub fn run(args: &Args) -> Result<String> {
    let counter = args.dir.join("counter");
    fs::write(&counter, 0u64.to_le_bytes())?;
    let (account, stop) = (Account::default(), AtomicBool::new(false));
    let works =
        (0..args.threads + args.floods).map(|n| Work::new(args, n)).collect::<Result<Vec<_>>>()?;
    thread::scope(|scope| {
        for work in works {
            let (account, stop) = (&account, &stop);
            scope.spawn(move || work.until(stop, args.rest_ms, account));
        }
        let mut told = Instant::now();
        while !args.stop.exists() {
            thread::sleep(LOOK);
            if told.elapsed() >= TELL {
                told = Instant::now();
                println!("{}", serde_json::json!(account.state()));
            }
        }
        stop.store(true, Relaxed);
    });
    let held = u64::from_le_bytes(fs::read(&counter)?.try_into().unwrap_or_default());
    let locked = account.locked.load(Relaxed);
    if held != locked {
        account.problem(format!("the counter is {held}: it was raised {locked} times"));
    }
    fs::remove_file(&counter)?;
    let left: Vec<_> = fs::read_dir(&args.dir)?.flatten().map(|entry| entry.file_name()).collect();
    let state = account.state();
    println!("{}", serde_json::json!(state));
    ensure!(state.problems.is_empty(), "{} problems", state.problems.len());
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(format!("{} steps, the slowest {} ms", state.steps, state.slowest_ms))
}

/// What one thread does.
#[derive(Debug)]
enum Kind {
    /// Random writes and reads of one file; what each block holds.
    Blocks(File, Vec<u64>),
    /// Records at the end of a file.
    Log(File, u64),
    Names,
    /// The names in a directory.
    Listing(BTreeSet<String>),
    /// A counter that only who holds its lock raises.
    Lock(File),
    /// Large pieces, and another file each time.
    Stream,
    /// One large piece again and again.
    Flood(File),
}

#[derive(Debug)]
struct Work {
    thread: u64,
    dir: PathBuf,
    rng: Rng,
    turn: u64,
    kind: Kind,
}

fn pattern(parts: [u64; 3], bytes: usize) -> Vec<u8> {
    Rng::of(&parts).next().to_le_bytes().repeat(bytes.div_ceil(8))[..bytes].to_vec()
}

fn is_gone(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).context("look for what was removed"),
        Ok(_) => bail!("{} is still there", path.display()),
    }
}

impl Work {
    fn new(args: &Args, thread: u64) -> Result<Self> {
        let dir = args.dir.join(format!("t{thread}"));
        fs::create_dir(&dir)?;
        let kind = match thread % 7 {
            _ if thread >= args.threads => Kind::Flood(Self::open(&dir.join("flood"))?),
            0 => Kind::Blocks(Self::open(&dir.join("blocks"))?, vec![0; BLOCKS as usize]),
            1 => Kind::Log(Self::open_log(&dir)?, 0),
            2 => Kind::Names,
            3 => Kind::Listing(BTreeSet::new()),
            // Two at least, or there is nothing to lock.
            4 | 5 => Kind::Lock(Self::open(&args.dir.join("counter"))?),
            _ => Kind::Stream,
        };
        Ok(Self { thread, dir, rng: Rng::of(&[args.seed, thread]), turn: 0, kind })
    }

    fn open(path: &Path) -> Result<File> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        file.with_context(|| format!("open {}", path.display()))
    }

    fn open_log(dir: &Path) -> Result<File> {
        Ok(File::options().read(true).append(true).create(true).open(dir.join("log"))?)
    }

    fn until(mut self, stop: &AtomicBool, rest_ms: u64, account: &Account) {
        while !stop.load(Relaxed) {
            let begun = Instant::now();
            if let Err(error) = self.step(account) {
                let (thread, turn, kind) = (self.thread, self.turn, self.name());
                return account
                    .problem(format!("thread {thread} ({kind}), step {turn}: {error:#}"));
            }
            let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            account.slowest_ms.fetch_max(took, Relaxed);
            account.steps.fetch_add(1, Relaxed);
            thread::sleep(Duration::from_millis(rest_ms));
        }
        self.kind = Kind::Names; // lets go of the file
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            account.problem(format!("thread {}: at the end: {error}", self.thread));
        }
    }

    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Blocks(..) => "blocks",
            Kind::Log(..) => "log",
            Kind::Names => "names",
            Kind::Listing(_) => "listing",
            Kind::Lock(_) => "lock",
            Kind::Stream => "stream",
            Kind::Flood(_) => "flood",
        }
    }

    fn step(&mut self, account: &Account) -> Result<()> {
        self.turn += 1;
        let (dir, rng, thread, turn) = (&self.dir, &mut self.rng, self.thread, self.turn);
        match &mut self.kind {
            Kind::Blocks(file, held) => {
                if rng.once_in(50) {
                    *file = Self::open(&dir.join("blocks"))?;
                }
                blocks(file, held, rng, thread, turn)
            }
            Kind::Log(file, records) => {
                if rng.once_in(50) {
                    *file = Self::open_log(dir)?;
                }
                log(file, records, rng, thread)
            }
            Kind::Names => names(dir, thread, turn),
            Kind::Listing(held) => listing(dir, held, rng),
            Kind::Lock(file) => lock(file).map(|()| {
                account.locked.fetch_add(1, Relaxed);
            }),
            Kind::Stream => stream(dir, rng, thread, turn),
            Kind::Flood(file) => flood(file, rng, thread, turn),
        }
    }
}

/// Has the next read ask the daemon.
fn forget_pages(file: &File) -> Result<()> {
    fadvise(file, 0, None, Advice::DontNeed).context("drop pages")
}

fn blocks(file: &File, held: &mut [u64], rng: &mut Rng, thread: u64, turn: u64) -> Result<()> {
    let block = rng.below(BLOCKS);
    file.write_all_at(&pattern([thread, block, turn], BLOCK_BYTES), block * BLOCK_BYTES as u64)
        .context("write")?;
    held[block as usize] = turn;
    if rng.once_in(20) {
        file.sync_data().context("fdatasync")?;
    }
    if rng.once_in(3) {
        forget_pages(file)?;
    }
    let block = rng.below(BLOCKS);
    let by = held[block as usize];
    if by > 0 {
        let mut data = vec![0; BLOCK_BYTES];
        file.read_exact_at(&mut data, block * BLOCK_BYTES as u64).context("read")?;
        ensure!(data == pattern([thread, block, by], BLOCK_BYTES), "block {block} differs");
    }
    Ok(())
}

fn log(file: &mut File, records: &mut u64, rng: &mut Rng, thread: u64) -> Result<()> {
    file.write_all(&pattern([thread, *records, 1], RECORD_BYTES)).context("append")?;
    *records += 1;
    if rng.once_in(16) {
        file.sync_all().context("fsync")?;
    }
    if *records < RECORDS_MAX {
        return Ok(());
    }
    let mut data = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut data).context("read the log")?;
    let all: Vec<u8> =
        (0..*records).flat_map(|record| pattern([thread, record, 1], RECORD_BYTES)).collect();
    ensure!(data == all, "{} bytes of {} differ", data.len(), all.len());
    file.set_len(0).context("truncate")?;
    *records = 0;
    Ok(())
}

fn names(dir: &Path, thread: u64, turn: u64) -> Result<()> {
    let path = |what: &str| dir.join(format!("{what}-{}", turn % 8));
    let [first, second, third] = ["first", "second", "third"].map(path);
    let data = pattern([thread, turn, 2], 1 + (turn as usize * 31) % 3000);
    let mut file = File::create_new(&first).context("create")?;
    file.write_all(&data).context("write")?;
    drop(file);
    fs::rename(&first, &second).context("rename")?;
    is_gone(&first)?;
    fs::hard_link(&second, &third).context("link")?;
    fs::set_permissions(&third, Permissions::from_mode(0o640)).context("chmod")?;
    let found = second.symlink_metadata().context("stat")?;
    ensure!(found.len() == data.len() as u64 && found.mode() & 0o777 == 0o640, "{found:?}");
    ensure!(fs::read(&third).context("read")? == data, "a small file differs");
    fs::remove_file(&second).context("unlink")?;
    ensure!(fs::read(&third).context("read again")? == data, "it differs after an unlink");
    fs::remove_file(&third).context("unlink the last")?;
    is_gone(&third)?;
    fs::create_dir(&first).context("mkdir")?;
    symlink("nowhere", first.join("link")).context("symlink")?;
    ensure!(fs::read_link(first.join("link")).context("readlink")? == Path::new("nowhere"));
    fs::remove_file(first.join("link")).context("unlink a link")?;
    fs::remove_dir(&first).context("rmdir")?;
    is_gone(&first)
}

fn listing(dir: &Path, held: &mut BTreeSet<String>, rng: &mut Rng) -> Result<()> {
    for _ in 0..1 + rng.below(8) {
        let name = format!("entry-{}", rng.below(2 * NAMES_MAX as u64));
        if held.remove(&name) {
            fs::remove_file(dir.join(&name)).with_context(|| format!("unlink {name}"))?;
        } else if held.len() < NAMES_MAX {
            File::create_new(dir.join(&name)).with_context(|| format!("create {name}"))?;
            held.insert(name);
        }
    }
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir).context("open the directory")? {
        let name = entry.context("list")?.file_name().to_string_lossy().into_owned();
        ensure!(found.insert(name.clone()), "{name} is listed twice");
    }
    let missing: Vec<_> = held.difference(&found).collect();
    let excess: Vec<_> = found.difference(held).collect();
    ensure!(missing.is_empty() && excess.is_empty(), "missing {missing:?}, too many {excess:?}");
    Ok(())
}

fn lock(file: &File) -> Result<()> {
    file.lock().context("flock")?;
    let raised = || -> Result<()> {
        let mut count = [0; 8];
        file.read_exact_at(&mut count, 0).context("read the counter")?;
        let next = u64::from_le_bytes(count) + 1;
        file.write_all_at(&next.to_le_bytes(), 0).context("write the counter")
    };
    let raised = raised();
    file.unlock().context("unlock")?;
    raised
}

fn stream(dir: &Path, rng: &mut Rng, thread: u64, turn: u64) -> Result<()> {
    let path = dir.join(format!("stream-{}", rng.below(4)));
    let mut file = File::create(&path).context("create")?;
    for piece in 0..STREAM_PIECES {
        file.write_all(&pattern([thread, turn, piece], STREAM_BYTES)).context("write")?;
    }
    if rng.once_in(4) {
        file.sync_all().context("fsync")?;
    }
    drop(file);
    let mut file = File::open(&path).context("open")?;
    forget_pages(&file)?;
    let mut data = vec![0; STREAM_BYTES];
    for piece in 0..STREAM_PIECES {
        file.read_exact(&mut data).context("read")?;
        ensure!(data == pattern([thread, turn, piece], STREAM_BYTES), "piece {piece} differs");
    }
    drop(file);
    if rng.once_in(4) {
        fs::remove_file(&path).context("unlink")?;
    }
    Ok(())
}

fn flood(file: &File, rng: &mut Rng, thread: u64, turn: u64) -> Result<()> {
    let sent = pattern([thread, turn, 3], STREAM_BYTES);
    file.write_all_at(&sent, 0).context("write")?;
    if rng.once_in(16) {
        forget_pages(file)?;
        let mut data = vec![0; STREAM_BYTES];
        file.read_exact_at(&mut data, 0).context("read")?;
        ensure!(data == sent, "it differs");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Sandbox;

    #[test]
    fn on_a_bare_directory_all_is_well_and_nothing_is_left() {
        let sandbox = Sandbox::new().unwrap();
        let dir = sandbox.make_dir("bare").unwrap();
        let stop = sandbox.path("stop");
        let args = Args {
            dir: dir.clone(),
            stop: stop.clone(),
            threads: 9,
            floods: 1,
            seed: 1,
            rest_ms: 0,
        };
        thread::scope(|scope| {
            let work = scope.spawn(|| run(&args));
            // Each kind has had its turn when the slowest, a stream, has left a file.
            let streams = || fs::read_dir(dir.join("t6")).map(Iterator::count).unwrap_or(0) > 1;
            crate::guard::poll_until(Duration::from_secs(60), || Ok(streams())).unwrap();
            fs::write(&stop, "").unwrap();
            work.join().unwrap().unwrap();
        });
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn what_changes_behind_it_is_found() {
        let sandbox = Sandbox::new().unwrap();
        let dir = sandbox.make_dir("bare").unwrap();
        let mut held = BTreeSet::from(["gone".to_owned()]);
        let error = listing(&dir, &mut held, &mut Rng::of(&[1])).unwrap_err();
        assert!(error.to_string().contains("missing [\"gone\"]"), "{error:#}");
        let file = Work::open(&dir.join("blocks")).unwrap();
        file.set_len(BLOCKS * BLOCK_BYTES as u64).unwrap();
        let mut held = vec![9; BLOCKS as usize];
        let error = blocks(&file, &mut held, &mut Rng::of(&[1]), 0, 1).unwrap_err();
        assert!(error.to_string().contains("differs"), "{error:#}");
    }
}
