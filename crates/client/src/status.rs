//! What a mount tells about itself, and `ringfs status`, which asks.
//!
//! Each client process listens on `/run/ringfs/PID-MINOR.sock` (users: below `XDG_RUNTIME_DIR`, or
//! `/run/user/UID`), reads one line ([`Ask`]) and writes one JSON document. The minor number of the
//! mount's device is there as containers that share the directory have pids of their own.
//! Invariant: a mount point is never touched, since the mount may be dead; what is mounted comes
//! from the mount table.

use crate::lane::LaneCounters;
use crate::resume::Outlook;
use crate::session::Session;
use fuser_fork::mountinfo::{MountInfo, find_mounts};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a client may take to answer who only looks.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// Clients that are asked at the same time.
const ASKED_AT_ONCE: usize = 256;
/// Bytes of an answer that are read.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// Clients that are asked.
const CLIENTS_MAX: usize = 4096;

/// Where clients of root listen, and where users have a directory of their own.
const ROOTS_DIR: &str = "/run/ringfs";
const USERS_DIRS: &str = "/run/user";

/// How long an asker may take to say what it wants; one that says nothing wants the status.
const WORD_LIMIT: Duration = Duration::from_millis(200);
/// How often it is said by one that took longer.
const WORD_TRIES: usize = 5;
/// How long nobody is heard where the system has no fd to give.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Askers that wait for connections at the same time.
const WAITERS_MAX: usize = 64;

/// What a client is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Its state.
    Status,
    /// To join all its connections anew; it answers before they are.
    Reconnect,
    /// To answer once all its lanes have their connections.
    WaitResumed,
}

impl Ask {
    const ALL: [Ask; 3] = [Ask::Status, Ask::Reconnect, Ask::WaitResumed];

    fn word(self) -> &'static str {
        match self {
            Ask::Status => "status\n",
            Ask::Reconnect => "reconnect\n",
            Ask::WaitResumed => "wait-resumed\n",
        }
    }
}

/// How many were asked for and granted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Granted {
    pub asked: u16,
    pub got: u16,
    /// Why there are fewer.
    pub why: Option<String>,
}

/// What came of the wish for FUSE-over-io_uring.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Rings {
    pub asked: bool,
    /// Queues that are served, one a possible CPU; 0: frames come by `/dev/fuse`.
    pub queues: u16,
    pub entries_per_queue: u16,
    /// Memory that payloads can come to use.
    pub payloads_bytes_max: u64,
    /// Why there are none.
    pub why: Option<String>,
}

/// What stays as it was when the mount came about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Facts {
    pub pid: u32,
    pub source: String,
    pub mountpoint: PathBuf,
    /// Of the mount's device: finds it again where it was moved, or became the root.
    pub dev_minor: Option<u32>,
    pub share: String,
    pub subdir: String,
    pub address: String,
    pub connected_since_unix_s: u64,
    pub epoch: u64,
    pub lanes: Granted,
    pub slots_per_lane: u16,
    pub spin: u32,
    pub rings: Rings,
    pub cache: String,
    pub read_only: bool,
    pub writeback: bool,
    pub checksum: bool,
    /// Clients that have died before this one.
    #[serde(default)]
    pub takeovers: u32,
    /// Why nobody would take over from this one; none: another one would.
    #[serde(default)]
    pub alone_why: Option<String>,
    /// The service manager has what the next one needs, too (fd_store.rs).
    #[serde(default)]
    pub is_stored: bool,
    /// The lists of `-o`.
    #[serde(default)]
    pub options: Vec<String>,
}

/// Everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Report {
    #[serde(flatten)]
    pub facts: Facts,
    pub in_flight: u64,
    pub parked: u64,
    pub parked_bytes: u64,
    pub parked_total: u64,
    pub requests: u64,
    pub replies: u64,
    /// Those that went from the connection to the kernel without a copy.
    #[serde(default)]
    pub replies_spliced: u64,
    /// Small files whose content came with their OPEN.
    #[serde(default)]
    pub stored: u64,
    pub refused_replies: u64,
    pub forgets: u64,
    pub interrupts: u64,
    pub cancels: u64,
    pub batches_up: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub nodes_seen: u64,
    /// What a daemon that does not know the session would be told.
    pub nodes_known: u64,
    pub handles_known: u64,
    /// How often one was; and what the last one was told: nodes, those of them that nothing finds,
    /// open files, in how many bytes on the wire and how much time since the connect.
    pub rebuilds: u64,
    pub nodes_restored: u64,
    pub nodes_lost: u64,
    pub handles_restored: u64,
    pub rebuild_bytes: u64,
    pub rebuild_us: u64,
    pub records_skipped: u64,
    /// All lanes have their connections (else `resuming`), and since when it is as it is.
    pub connected: bool,
    pub resuming: bool,
    pub state_since_unix_s: u64,
    pub lanes_without_connection: u64,
    /// Connections lost and joined anew.
    pub cuts: u64,
    pub resumes: u64,
    pub last_cut: Option<String>,
    /// Requests answered here whose end the daemon has not told yet; and all so far.
    pub abandoned: u64,
    pub abandoned_total: u64,
    /// Writes behind an append that may have been done: they fail here.
    pub writes_refused: u64,
}

/// A mount as `ringfs status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Where.
    pub mountpoint: PathBuf,
    /// What.
    pub source: String,
    /// What its client says; `null` if none answers.
    pub client: Option<Report>,
    /// Where that listens.
    #[serde(skip)]
    pub socket: Option<PathBuf>,
    /// As the kernel has it.
    #[serde(skip)]
    pub is_read_only: bool,
    /// Of its device.
    #[serde(skip)]
    pub dev_minor: u32,
}

impl Report {
    /// The state of now.
    pub fn of(facts: &Facts, session: &Session) -> Report {
        let Outlook { missing, since_unix_s, last_cut, rebuilds, restored } =
            session.resume.outlook();
        let (nodes_known, handles_known) = session.known.totals();
        let mut report = Report {
            facts: facts.clone(),
            connected: missing == 0,
            resuming: missing > 0,
            state_since_unix_s: since_unix_s,
            lanes_without_connection: missing as u64,
            cuts: session.resume.cuts.load(Ordering::Relaxed),
            resumes: session.resume.resumes.load(Ordering::Relaxed),
            last_cut,
            nodes_seen: session.nodes_seen.load(Ordering::Relaxed),
            nodes_known,
            handles_known,
            rebuilds,
            nodes_restored: restored.nodes,
            nodes_lost: restored.nodes_lost,
            handles_restored: restored.handles,
            rebuild_bytes: restored.bytes,
            rebuild_us: restored.took_us,
            records_skipped: session.records_skipped.load(Ordering::Relaxed),
            writes_refused: session.writes_refused.load(Ordering::Relaxed),
            ..Report::default()
        };
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        for lane in &session.lanes {
            let (parked, parked_bytes) = lane.parked();
            report.in_flight += lane.in_flight() as u64;
            report.abandoned += lane.abandoned() as u64;
            report.parked += parked as u64;
            report.parked_bytes += parked_bytes as u64;
            let counters: &LaneCounters = &lane.counters;
            report.parked_total += read(&counters.parked_total);
            report.requests += read(&counters.requests);
            report.replies += read(&counters.replies);
            report.replies_spliced += read(&counters.replies_spliced);
            report.stored += read(&counters.stored);
            report.refused_replies += read(&counters.refused_replies);
            report.forgets += read(&counters.forgets);
            report.interrupts += read(&counters.interrupts);
            report.cancels += read(&counters.cancels);
            report.abandoned_total += read(&counters.abandoned_total);
            report.batches_up += read(&counters.batches);
            report.bytes_up += read(&counters.bytes_up);
            report.bytes_down += read(&counters.bytes_down);
        }
        report
    }
}

/// The socket of one client process; gone when dropped.
#[derive(Debug)]
pub struct Publisher {
    listener: UnixListener,
    path: PathBuf,
    /// They asked [`Ask::WaitResumed`].
    waiters: Vec<UnixStream>,
    /// Who has come cannot be heard before.
    rests_until: Option<Instant>,
}

impl Publisher {
    /// Listens in `dir`, which is made if need be, for the mount with that number.
    pub fn bind(dir: &Path, dev_minor: Option<u32>) -> io::Result<Publisher> {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
        let minor = dev_minor.map(|minor| format!("-{minor}")).unwrap_or_default();
        let path = dir.join(format!("{}{minor}.sock", std::process::id()));
        // Of a process that had our numbers and died: the mount that has this one is ours.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        let publisher = Publisher { listener, path, waiters: Vec::new(), rests_until: None };
        std::fs::set_permissions(&publisher.path, PermissionsExt::from_mode(0o600))?;
        publisher.listener.set_nonblocking(true)?;
        Ok(publisher)
    }

    /// Hears who has come; `act` does what was asked and gives the answer. Errors are the asker's.
    pub fn hear(&mut self, act: impl FnOnce(Ask) -> Report) {
        use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Whoever has come stays there, and would be looked at over and over.
                if !matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock) {
                    self.rests_until = Some(Instant::now() + ACCEPT_PAUSE);
                }
                return;
            }
        };
        match hear(&stream) {
            Ask::WaitResumed if self.waiters.len() < WAITERS_MAX => self.waiters.push(stream),
            // One too many: it is answered nothing.
            Ask::WaitResumed => {}
            ask @ (Ask::Status | Ask::Reconnect) => tell(stream, &act(ask)),
        }
    }

    /// What tells that somebody has come, or how long that is of no use.
    pub fn events(&self) -> Result<BorrowedFd<'_>, Duration> {
        let rests = self.rests_until.map(|until| until.saturating_duration_since(Instant::now()));
        match rests {
            Some(left) if !left.is_zero() => Err(left),
            _ => Ok(self.listener.as_fd()),
        }
    }

    /// Whether somebody waits for connections.
    pub fn has_waiters(&self) -> bool {
        !self.waiters.is_empty()
    }

    /// All lanes have their connections.
    pub fn tell_waiters(&mut self, report: &Report) {
        self.waiters.drain(..).for_each(|stream| tell(stream, report));
    }
}

fn hear(mut stream: &UnixStream) -> Ask {
    let mut line = [0; 16];
    let mut len = 0;
    let limited = stream.set_nonblocking(false);
    if limited.and_then(|()| stream.set_read_timeout(Some(WORD_LIMIT))).is_err() {
        return Ask::Status;
    }
    while len < line.len() && !line[..len].ends_with(b"\n") {
        match stream.read(&mut line[len..]) {
            Ok(n) if n > 0 => len += n,
            _ => break,
        }
    }
    let found = Ask::ALL.into_iter().find(|ask| ask.word().as_bytes() == &line[..len]);
    found.unwrap_or(Ask::Status)
}

fn tell(mut stream: UnixStream, report: &Report) {
    let done = stream
        .set_write_timeout(Some(ANSWER_LIMIT))
        .and_then(|()| stream.write_all(&serde_json::to_vec(report)?));
    if let Err(error) = done {
        tracing::debug!(%error, "somebody asked and did not listen");
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        // Whoever finds it removes it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Where clients of this user listen.
pub fn own_dir() -> PathBuf {
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        return PathBuf::from(ROOTS_DIR);
    }
    let users = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    users.unwrap_or_else(|| Path::new(USERS_DIRS).join(uid.to_string())).join("ringfs")
}

/// Where clients that may be asked listen. Not those of other users: what they say of a mount need
/// not be true.
pub fn dirs() -> Vec<PathBuf> {
    let mut dirs = vec![PathBuf::from(ROOTS_DIR), own_dir()];
    dirs.dedup();
    dirs
}

/// Seconds since 1970.
pub fn unix_now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The ringfs mounts of this mount namespace, each with what its client says.
pub fn collect(dirs: &[PathBuf]) -> io::Result<Vec<Entry>> {
    let mut entries = mounts()?;
    each_client(dirs, &mut entries, ANSWER_LIMIT, |_| {});
    Ok(entries)
}

/// The same, their clients not asked.
pub fn mounts() -> io::Result<Vec<Entry>> {
    let entry = |mount: MountInfo| {
        let source = mount.source.to_string_lossy().into_owned();
        let (is_read_only, dev_minor) = (mount.is_read_only(), mount.dev_minor);
        let mountpoint = mount.mount_point;
        Entry { mountpoint, source, client: None, socket: None, is_read_only, dev_minor }
    };
    Ok(find_mounts()?.into_iter().map(entry).collect())
}

/// Asks clients until each of those mounts has one that has answered, or no more answer comes
/// within `limit`; `found` is told of each at once, so that nobody waits for one that is stuck.
pub fn each_client(
    dirs: &[PathBuf],
    entries: &mut [Entry],
    limit: Duration,
    mut found: impl FnMut(&Entry),
) {
    let files = dirs.iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flatten();
    let sockets = files
        .filter_map(|file| Some(file.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "sock"));
    let sockets: Vec<PathBuf> = sockets.take(CLIENTS_MAX).collect();
    for some in sockets.chunks(ASKED_AT_ONCE) {
        let asked = some.iter().filter_map(|path| Some((path, say(path, Ask::Status).ok()?)));
        let mut asked: Vec<(&PathBuf, UnixStream)> = asked.collect();
        let deadline = Instant::now() + limit;
        while !asked.is_empty() && entries.iter().any(|entry| entry.client.is_none()) {
            let Some(ready) = first_ready(&asked, deadline) else { break };
            let (path, stream) = asked.swap_remove(ready);
            let Ok(mut report) = answer(stream, Some(ANSWER_LIMIT)) else { continue };
            let is_its = |entry: &&mut Entry| {
                let facts = &report.facts;
                let here = match facts.dev_minor {
                    Some(minor) => entry.dev_minor == minor,
                    None => entry.mountpoint == facts.mountpoint,
                };
                entry.client.is_none() && entry.source == facts.source && here
            };
            if let Some(entry) = entries.iter_mut().find(is_its) {
                // A remount changes it, and its client need not know.
                report.facts.read_only = entry.is_read_only;
                (entry.client, entry.socket) = (Some(report), Some(path.clone()));
                found(entry);
            }
        }
    }
}

/// Which of them has something to say, or has gone.
fn first_ready(asked: &[(&PathBuf, UnixStream)], deadline: Instant) -> Option<usize> {
    let mut fds: Vec<PollFd<'_>> =
        asked.iter().map(|(_, stream)| PollFd::new(stream, PollFlags::IN)).collect();
    let left = deadline.saturating_duration_since(Instant::now());
    let limit = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    // A signal ends this command anyway.
    rustix::event::poll(&mut fds, Some(&limit)).ok()?;
    fds.iter().position(|fd| !fd.revents().is_empty())
}

/// Asks one client; `None`: for as long as it takes.
pub fn ask(socket: &Path, what: Ask, limit: Option<Duration>) -> io::Result<Report> {
    answer(in_time(|| say(socket, what))?, limit)
}

/// Says it again where it took so long that it may have been answered as if nothing had been said:
/// the status alone does not tell that something was done, or has come about.
fn in_time(mut say: impl FnMut() -> io::Result<UnixStream>) -> io::Result<UnixStream> {
    for _ in 0..WORD_TRIES {
        let begun = Instant::now();
        let said = say()?;
        if begun.elapsed() < WORD_LIMIT {
            return Ok(said);
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Whether the process lives that a client's socket is named after.
fn is_of_living(socket: &Path) -> bool {
    let stem = socket.file_stem().and_then(|stem| stem.to_str());
    let number = stem.and_then(|stem| stem.split('-').next()?.parse().ok());
    number.and_then(Pid::from_raw).is_some_and(|pid| test_kill_process(pid) != Err(Errno::SRCH))
}

fn say(socket: &Path, what: Ask) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).inspect_err(|error| {
        // A client that is between bind(2) and listen(2) refuses too.
        if error.kind() == io::ErrorKind::ConnectionRefused && !is_of_living(socket) {
            // If the file is not ours, it stays.
            let _ = std::fs::remove_file(socket);
        }
    })?;
    stream.set_write_timeout(Some(ANSWER_LIMIT))?;
    stream.write_all(what.word().as_bytes())?;
    Ok(stream)
}

fn answer(stream: UnixStream, limit: Option<Duration>) -> io::Result<Report> {
    stream.set_read_timeout(limit)?;
    let mut bytes = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let facts = Facts { pid: 7, cache: "auto".into(), ..Facts::default() };
        Report { facts, requests: 12, last_cut: Some("reset".into()), ..Report::default() }
    }

    #[test]
    fn a_client_answers_and_a_dead_one_is_removed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut publisher = Publisher::bind(dir.path(), Some(7)).expect("bind");
        let dirs = [dir.path().to_owned()];
        let dead = dir.path().join(format!("{}-9.sock", i32::MAX));
        let unready = dir.path().join("1-8.sock");
        drop(UnixListener::bind(&unready).expect("bind"));
        drop(UnixListener::bind(&dead).expect("bind"));
        let stuck = UnixListener::bind(dir.path().join("0.sock")).expect("bind");
        let entry = |source: &str| Entry {
            mountpoint: PathBuf::new(),
            source: source.into(),
            client: None,
            socket: None,
            is_read_only: false,
            dev_minor: 0,
        };
        let asked = std::thread::scope(|scope| {
            let asked = scope.spawn(|| {
                let mut entries = [entry("another's"), entry("")];
                let mut told = Vec::new();
                each_client(&dirs, &mut entries, ANSWER_LIMIT, |e| told.push(e.clone()));
                assert_eq!(told, entries[1..]);
                assert_eq!(entries[0], entry("another's"));
                told.remove(0)
            });
            let mut fds =
                [rustix::event::PollFd::new(&publisher.listener, rustix::event::PollFlags::IN)];
            let limit = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
            assert_eq!(rustix::event::poll(&mut fds, Some(&limit)), Ok(1));
            publisher.hear(|ask| {
                assert_eq!(ask, Ask::Status);
                report()
            });
            asked.join().expect("asker")
        });
        assert_eq!((asked.client, asked.socket), (Some(report()), Some(publisher.path.clone())));
        assert!(!dead.exists());
        drop((publisher, stuck));
        for alone in [dir.path().join("0.sock"), unready] {
            std::fs::remove_file(alone).expect("the stuck one's is left alone, and a new one's");
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("dir").count(), 0);
    }

    /// As in two containers.
    #[test]
    fn clients_of_one_number_are_heard_both() {
        let dir = tempfile::tempdir().expect("tempdir");
        let bind = |minor| Publisher::bind(dir.path(), Some(minor)).expect("bind");
        for publisher in [bind(7), bind(8)] {
            assert!(say(&publisher.path, Ask::Status).is_ok(), "{}", publisher.path.display());
        }
    }

    #[test]
    fn who_was_too_slow_to_be_heard_says_it_again() {
        let dir = tempfile::tempdir().expect("tempdir");
        let publisher = Publisher::bind(dir.path(), Some(7)).expect("bind");
        let mut times = 0;
        let said = in_time(|| {
            times += 1;
            if times == 1 {
                // A machine that stands still.
                std::thread::sleep(WORD_LIMIT);
            }
            say(&publisher.path, Ask::WaitResumed)
        });
        assert!(said.is_ok() && times > 1, "said {times} times");
    }

    #[test]
    fn who_waits_is_told_when_it_is_time() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut publisher = Publisher::bind(dir.path(), Some(7)).expect("bind");
        let path = publisher.path.clone();
        for what in [Ask::Reconnect, Ask::WaitResumed] {
            let path = path.clone();
            let asker = std::thread::spawn(move || ask(&path, what, None));
            let mut fds =
                [rustix::event::PollFd::new(&publisher.listener, rustix::event::PollFlags::IN)];
            assert_eq!(rustix::event::poll(&mut fds, None), Ok(1));
            let mut heard = None;
            publisher.hear(|ask| {
                heard = Some(ask);
                report()
            });
            assert_eq!(heard, Some(what).filter(|&what| what == Ask::Reconnect));
            assert_eq!(publisher.has_waiters(), what == Ask::WaitResumed);
            publisher.tell_waiters(&report());
            assert_eq!(asker.join().expect("asker").expect("an answer"), report());
        }
        // Without a listener who waits is not left alone.
        let asker = std::thread::spawn(move || ask(&path, Ask::WaitResumed, None));
        let mut fds =
            [rustix::event::PollFd::new(&publisher.listener, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut fds, None), Ok(1));
        publisher.hear(|_| report());
        drop(publisher);
        assert!(asker.join().expect("asker").is_err());
    }
}
