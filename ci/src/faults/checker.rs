//! Threads that work on a mount, each result held against what must have happened.
//!
//! Invariant: a thread's own tree and its names in the shared directory are changed by it alone, so
//! that every result is known beforehand; what all change is checked at the end (`shared.rs`). A
//! thread ends with its first problem, because its model is then void. At the end all is compared
//! on the mount and on the directory behind it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::real::Real;
use super::rng::Rng;
use super::shared::{self, History};
use super::workload::Workload;
use super::world::{Step, World};

/// Problems that are kept; the rest is counted.
const PROBLEMS_MAX: usize = 20;

/// Longer than names are good for with `cache=auto`.
const NAMES_GOOD: Duration = Duration::from_millis(1100);

/// What a block holds that was never written, but lies before one that was.
const EMPTY_BLOCK: [u8; shared::BLOCK_BYTES] = [0; shared::BLOCK_BYTES];

/// No run takes longer.
const RUN_MAX: Duration = Duration::from_secs(24 * 3600);

/// What is known of a run while it goes on.
#[derive(Debug, Default)]
pub struct Account {
    /// Operations done.
    pub ops: AtomicU64,
    /// The longest of them, in milliseconds.
    pub slowest_ms: AtomicU64,
    /// Errors that were allowed because the daemon was killed.
    pub tolerated: AtomicU64,
    /// The daemon leaves nothing of what it has done: see [`World::with_parts`].
    pub in_parts: bool,
    /// Threads that have not ended.
    pub working: AtomicU64,
    /// How often the daemon was killed.
    pub kills: AtomicU64,
    /// Problems found.
    pub count: AtomicU64,
    problems: Mutex<Vec<String>>,
    quiet: Mutex<()>,
}

impl Account {
    /// Nothing yet.
    pub fn new(in_parts: bool) -> Account {
        Account { in_parts, ..Account::default() }
    }

    /// Something that must not be.
    pub fn problem(&self, what: String) {
        self.count.fetch_add(1, Relaxed);
        let mut problems = lock(&self.problems);
        if problems.len() < PROBLEMS_MAX {
            println!("faults: PROBLEM {what}");
            problems.push(what);
        }
    }

    /// Keeps the daemon alive meanwhile: what a kill would fail is nobody's to settle.
    pub fn quiet(&self) -> MutexGuard<'_, ()> {
        lock(&self.quiet)
    }

    /// The problems found so far, the first of them.
    pub fn problems(&self) -> Vec<String> {
        lock(&self.problems).clone()
    }

    fn tolerate(&self, what: &str) {
        self.tolerated.fetch_add(1, Relaxed);
        println!("faults: allowed after a kill: {what}");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// One thread's part.
struct Worker<'a> {
    thread: u64,
    threads: u64,
    shared: PathBuf,
    rng: Rng,
    own: World<Real>,
    common: World<Real>,
    log: Option<File>,
    blocks: File,
    block_seq: u64,
    history: History,
    /// It ended with a problem: its trees are not known any more.
    void: bool,
    account: &'a Account,
}

/// Prepares the directory `name` of a mount for `threads`.
fn prepare(root: &Path, threads: u64) -> Result<()> {
    fs::create_dir(root).with_context(|| format!("create {}", root.display()))?;
    fs::create_dir(root.join("shared"))?;
    for thread in 0..threads {
        fs::create_dir(root.join(format!("t{thread}")))?;
    }
    fs::write(root.join("shared/log"), "")?;
    fs::write(root.join("shared/blocks"), "")?;
    Ok(())
}

impl<'a> Worker<'a> {
    fn new(
        root: &Path,
        seed: u64,
        thread: u64,
        threads: u64,
        account: &'a Account,
    ) -> Result<Self> {
        let prefix = format!("t{thread}-");
        let shared = root.join("shared");
        let own = Real::new(root.join(format!("t{thread}")), "");
        let common = Real::new(shared.clone(), &prefix);
        let blocks = File::options().read(true).write(true).open(shared.join("blocks"))?;
        Ok(Self {
            thread,
            threads,
            rng: Rng::of(&[seed, thread, 99]),
            own: World::new(own, Workload::new(seed, thread, ""))
                .with_names_good(NAMES_GOOD)
                .with_parts(account.in_parts),
            common: World::new(common, Workload::new(seed, thread, &prefix))
                .with_names_good(NAMES_GOOD)
                .with_parts(account.in_parts),
            log: None,
            blocks,
            block_seq: 0,
            history: History::default(),
            void: false,
            shared,
            account,
        })
    }

    fn work(&mut self, stop: &AtomicBool) {
        while !stop.load(Relaxed) {
            let begun = Instant::now();
            let done = self.step();
            let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.account.slowest_ms.fetch_max(took, Relaxed);
            self.account.ops.fetch_add(1, Relaxed);
            if let Err(problem) = done {
                self.account.problem(format!("thread {}: {problem}", self.thread));
                self.tell_story();
                self.void = true;
                return;
            }
        }
    }

    /// What led to a problem.
    fn tell_story(&self) {
        for (whose, world) in [("its own", &self.own), ("the shared", &self.common)] {
            for line in world.story() {
                println!("faults: thread {} in {whose} tree: {line}", self.thread);
            }
        }
    }

    fn step(&mut self) -> Result<(), String> {
        let killed = || self.account.kills.load(Relaxed) > 0;
        let step = match self.rng.below(100) {
            0..55 => self.own.step(killed)?,
            55..78 => self.common.step(killed)?,
            78..87 => return self.append(),
            87..96 => return self.block(),
            _ => return self.claim(),
        };
        if let Step::Tolerated(what) = step {
            self.account.tolerate(&what);
        }
        Ok(())
    }

    /// Whether an error of what is shared is allowed; counts it.
    fn allowed(&self, what: &str, error: &std::io::Error) -> bool {
        let killed = self.account.kills.load(Relaxed) > 0;
        let allowed = killed && error.raw_os_error() == Some(Errno::IO.raw_os_error());
        if allowed {
            self.account.tolerate(&format!("{what}: {error}"));
        }
        allowed
    }

    /// One record at the end of the log, in one write.
    fn append(&mut self) -> Result<(), String> {
        if self.rng.once_in(20) {
            self.log = None;
        }
        if self.log.is_none() {
            let opened = File::options().append(true).open(self.shared.join("log"));
            self.log = Some(opened.map_err(|error| format!("open the log: {error}"))?);
        }
        let Some(log) = &mut self.log else { return Ok(()) };
        let seq = self.history.records;
        self.history.records += 1;
        match log.write(&shared::record(self.thread, seq)) {
            Ok(shared::RECORD_BYTES) => {}
            Ok(n) => return Err(format!("append of record {seq}: {n} bytes alone")),
            Err(error) => {
                self.history.unsure.insert(seq);
                self.log = None;
                if !self.allowed("append", &error) {
                    return Err(format!("append of record {seq}: {error}"));
                }
            }
        }
        if self.rng.once_in(50)
            && let Some(log) = &self.log
        {
            log.sync_data().map_err(|error| format!("fsync of the log: {error}"))?;
        }
        Ok(())
    }

    /// Writes or reads one of this thread's blocks.
    fn block(&mut self) -> Result<(), String> {
        let number = self.rng.below(shared::BLOCKS_EACH);
        let at = shared::block_at(self.thread, self.threads, number);
        if self.rng.once_in(2) {
            let before = self.history.blocks.get(&number).copied().unwrap_or(0);
            self.block_seq += 1;
            let seq = self.block_seq;
            self.history.blocks.insert(number, seq);
            self.history.blocks_before.remove(&number);
            match self.blocks.write_at(&shared::block(self.thread, seq), at) {
                Ok(shared::BLOCK_BYTES) => return Ok(()),
                Ok(n) => return Err(format!("write of block {number}: {n} bytes alone")),
                Err(error) => {
                    self.history.blocks_before.insert(number, before);
                    if self.allowed("write of a block", &error) {
                        return Ok(());
                    }
                    return Err(format!("write of block {number}: {error}"));
                }
            }
        }
        let Some(seq) = self.history.blocks.get(&number) else { return Ok(()) };
        let mut found = vec![0; shared::BLOCK_BYTES];
        let read = self.blocks.read_exact_at(&mut found, at);
        read.map_err(|error| format!("read of block {number}: {error}"))?;
        let before = self.history.blocks_before.get(&number);
        let is = |seq| found == shared::block(self.thread, seq);
        let is_before = |before| if before == 0 { found == EMPTY_BLOCK } else { is(before) };
        if is(*seq) || before.is_some_and(|before| is_before(*before)) {
            return Ok(());
        }
        let author = super::op::author(&found);
        Err(format!("block {number} holds (thread, write) {author:?}, not {seq}"))
    }

    /// Tries to get a name that all threads try to get.
    fn claim(&mut self) -> Result<(), String> {
        let claim = self.history.tried;
        self.history.tried += 1;
        let path = self.shared.join(format!("claim-{claim}"));
        match File::options().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(mut file) => {
                self.history.won.insert(claim);
                match file.write(&shared::record(self.thread, claim)) {
                    Ok(shared::RECORD_BYTES) => Ok(()),
                    Ok(n) => Err(format!("write of claim {claim}: {n} bytes alone")),
                    Err(error) => {
                        self.history.won.remove(&claim);
                        self.history.perhaps.insert(claim);
                        if self.allowed("write of a claim", &error) {
                            return Ok(());
                        }
                        Err(format!("write of claim {claim}: {error}"))
                    }
                }
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            Err(error) => {
                self.history.perhaps.insert(claim);
                if self.allowed("claim", &error) {
                    return Ok(());
                }
                Err(format!("claim {claim}: {error}"))
            }
        }
    }
}

/// Works for `time`, and as long as `more` says yes, below a new directory `name`; then compares
/// there and below `behind`, the same directory without the mount.
pub fn run(
    place: (&Path, &Path, &str),
    seed: u64,
    threads: u64,
    time: Duration,
    more: impl Fn() -> bool,
    account: &Account,
) -> Result<()> {
    let (mount, behind, name) = place;
    let root = mount.join(name);
    let quiet = account.quiet();
    prepare(&root, threads)?;
    let workers = (0..threads).map(|thread| Worker::new(&root, seed, thread, threads, account));
    let mut workers = workers.collect::<Result<Vec<_>>>()?;
    drop(quiet);
    let stop = AtomicBool::new(false);
    account.working.store(threads, Relaxed);
    thread::scope(|scope| {
        let running: Vec<_> = workers
            .iter_mut()
            .map(|worker| {
                let stop = &stop;
                scope.spawn(move || {
                    worker.work(stop);
                    account.working.fetch_sub(1, Relaxed);
                })
            })
            .collect();
        let begun = Instant::now();
        let over = || {
            let time_over = begun.elapsed() >= time && !more();
            Ok(time_over || account.working.load(Relaxed) == 0)
        };
        let waited = crate::guard::poll_until(RUN_MAX, over);
        stop.store(true, Relaxed);
        for thread in running {
            if thread.join().is_err() {
                account.problem("a thread panicked".into());
            }
        }
        waited.map(drop)
    })?;
    finish(&mut workers, &root, &behind.join(name), account)
}

fn finish(workers: &mut [Worker<'_>], root: &Path, behind: &Path, account: &Account) -> Result<()> {
    let killed = account.kills.load(Relaxed) > 0;
    for worker in workers.iter_mut().filter(|worker| !worker.void) {
        let closing = [worker.own.close(killed), worker.common.close(killed)].concat();
        closing.into_iter().for_each(|problem| account.problem(problem));
    }
    let histories: Vec<History> = workers.iter().map(|worker| worker.history.clone()).collect();
    for (place, root) in [("the mount", root), ("the host", behind)] {
        for worker in workers.iter().filter(|worker| !worker.void) {
            let own = root.join(format!("t{}", worker.thread));
            let prefix = format!("t{}-", worker.thread);
            let mut own = Real::new(own, "");
            let mut common = Real::new(root.join("shared"), &prefix);
            let found = [
                super::world::compare(worker.own.model(), &mut own),
                super::world::compare(worker.common.model(), &mut common),
            ];
            for problem in found.concat() {
                account
                    .problem(format!("thread {}, at the end on {place}: {problem}", worker.thread));
            }
        }
        let shared = root.join("shared");
        let found = [
            shared::check_log(&bytes(&shared.join("log"))?, &histories),
            shared::check_blocks(&bytes(&shared.join("blocks"))?, &histories),
            shared::check_claims(&claims(&shared)?, &histories),
        ];
        for problem in found.concat() {
            account.problem(format!("at the end on {place}: {problem}"));
        }
    }
    Ok(())
}

fn bytes(path: &Path) -> Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty());
    let mut bytes = Vec::new();
    File::from(fd.with_context(|| format!("open {}", path.display()))?).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The wanted names that are there, with their content.
fn claims(shared: &Path) -> Result<BTreeMap<u64, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(shared)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(claim) = name.strip_prefix("claim-").and_then(|number| number.parse().ok()) {
            found.insert(claim, bytes(&entry.path())?);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Sandbox;

    #[test]
    fn a_bare_directory_has_no_problem() {
        let sandbox = Sandbox::new().unwrap();
        let dir = sandbox.make_dir("bare").unwrap();
        let account = Account::default();
        let enough = || account.ops.load(Relaxed) < 8000;
        run((&dir, &dir, "work"), 1, 4, Duration::ZERO, enough, &account).unwrap();
        assert_eq!(account.problems(), [""; 0]);
        let shared = dir.join("work/shared");
        // The same histories do not hold for a directory that was changed behind them.
        assert!(!bytes(&shared.join("log")).unwrap().is_empty());
        assert!(claims(&shared).unwrap().len() > 10);
    }

    #[test]
    fn what_changes_behind_the_threads_is_found() {
        let sandbox = Sandbox::new().unwrap();
        let mount = sandbox.make_dir("mount").unwrap();
        let behind = sandbox.make_dir("behind").unwrap();
        // What stands behind is a copy in which one record is doubled.
        let account = Account::default();
        let copy = || {
            let enough = account.ops.load(Relaxed) >= 2000;
            if enough && !behind.join("work").exists() {
                fs::create_dir_all(behind.join("work/shared")).unwrap();
                fs::write(behind.join("work/shared/log"), shared::record(0, 0).repeat(2)).unwrap();
                fs::write(behind.join("work/shared/blocks"), "").unwrap();
            }
            !enough
        };
        run((&mount, &behind, "work"), 1, 2, Duration::ZERO, copy, &account).unwrap();
        let problems = account.problems().join("\n");
        assert!(problems.contains("on the host") && !problems.contains("on the mount"));
    }
}
