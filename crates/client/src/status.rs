//! What a mount tells about itself, and `ringfs status`, which asks.
//!
//! Each client process listens on `/run/ringfs/PID.sock` (users: below `XDG_RUNTIME_DIR`) and
//! writes one JSON document to whoever connects. Invariant: a mount point is never touched, since
//! the mount may be dead; what is mounted comes from the mount table.

use crate::lane::LaneCounters;
use crate::session::Session;
use fuser_fork::mountinfo::find_mounts;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long a client may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// Bytes of an answer that are read.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// Clients that are asked.
const CLIENTS_MAX: usize = 4096;

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
    pub refused_replies: u64,
    pub forgets: u64,
    pub interrupts: u64,
    pub cancels: u64,
    pub batches_up: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub nodes_seen: u64,
    pub records_skipped: u64,
    pub resumes: u64,
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
}

impl Report {
    /// The state of now.
    pub fn of(facts: &Facts, session: &Session) -> Report {
        let mut report = Report {
            facts: facts.clone(),
            nodes_seen: session.nodes_seen.load(Ordering::Relaxed),
            records_skipped: session.records_skipped.load(Ordering::Relaxed),
            ..Report::default()
        };
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        for lane in &session.lanes {
            let (parked, parked_bytes) = lane.parked();
            report.in_flight += lane.in_flight() as u64;
            report.parked += parked as u64;
            report.parked_bytes += parked_bytes as u64;
            let counters: &LaneCounters = &lane.counters;
            report.parked_total += read(&counters.parked_total);
            report.requests += read(&counters.requests);
            report.replies += read(&counters.replies);
            report.refused_replies += read(&counters.refused_replies);
            report.forgets += read(&counters.forgets);
            report.interrupts += read(&counters.interrupts);
            report.cancels += read(&counters.cancels);
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
}

impl Publisher {
    /// Listens in `dir`, which is made if need be.
    pub fn bind(dir: &Path) -> io::Result<Publisher> {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
        let path = dir.join(format!("{}.sock", std::process::id()));
        // Of a process that had our number and died.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        let publisher = Publisher { listener, path };
        std::fs::set_permissions(&publisher.path, PermissionsExt::from_mode(0o600))?;
        publisher.listener.set_nonblocking(true)?;
        Ok(publisher)
    }

    /// Answers who waits. Errors are the asker's.
    pub fn answer(&self, report: impl FnOnce() -> Report) {
        let Ok((mut stream, _)) = self.listener.accept() else { return };
        let done = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_write_timeout(Some(ANSWER_LIMIT)))
            .and_then(|()| stream.write_all(&serde_json::to_vec(&report())?));
        if let Err(error) = done {
            tracing::debug!(%error, "somebody asked for the status and did not listen");
        }
    }
}

impl AsFd for Publisher {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
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
    let users = std::env::var_os("XDG_RUNTIME_DIR");
    match users.filter(|_| !rustix::process::geteuid().is_root()) {
        Some(dir) => Path::new(&dir).join("ringfs"),
        None => PathBuf::from("/run/ringfs"),
    }
}

/// Seconds since 1970.
pub fn unix_now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The ringfs mounts of this mount namespace, each with what its client says.
pub fn collect(dirs: &[PathBuf]) -> io::Result<Vec<Entry>> {
    let mut reports: Vec<Report> = dirs.iter().flat_map(|dir| ask_all(dir)).collect();
    let entries = find_mounts()?.into_iter().map(|mount| {
        let source = mount.source.to_string_lossy().into_owned();
        let is_its =
            |r: &Report| r.facts.mountpoint == mount.mount_point && r.facts.source == source;
        let at = reports.iter().position(is_its);
        Entry {
            client: at.map(|at| reports.swap_remove(at)),
            source,
            mountpoint: mount.mount_point,
        }
    });
    Ok(entries.collect())
}

fn ask_all(dir: &Path) -> Vec<Report> {
    let Ok(files) = std::fs::read_dir(dir) else { return Vec::new() };
    let sockets = files
        .filter_map(|file| Some(file.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "sock"));
    sockets.take(CLIENTS_MAX).filter_map(|path| ask(&path)).collect()
}

fn ask(path: &Path) -> Option<Report> {
    let mut stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // Its process is dead; if the file is not ours, it stays.
            let _ = std::fs::remove_file(path);
            return None;
        }
        Err(_) => return None,
    };
    stream.set_read_timeout(Some(ANSWER_LIMIT)).ok()?;
    let mut bytes = Vec::new();
    (&mut stream).take(ANSWER_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The text of `ringfs status`.
pub fn render(entries: &[Entry], now_s: u64) -> String {
    if entries.is_empty() {
        return "no ringfs mounts; `ringfs mount --help` shows how to make one\n".to_owned();
    }
    let mut text = String::new();
    for entry in entries {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} on {}", entry.source, entry.mountpoint.display());
        let Some(Report { facts, .. }) = &entry.client else {
            let path = entry.mountpoint.display();
            let _ = writeln!(text, "  no client answers: dead, stuck, or another user's");
            let _ = writeln!(text, "  (to remove a dead mount: ringfs umount -l {path})");
            continue;
        };
        render_client(&mut text, facts, entry.client.as_ref(), now_s);
    }
    text
}

fn render_client(text: &mut String, facts: &Facts, report: Option<&Report>, now_s: u64) {
    let Some(report) = report else { return };
    let age = duration(now_s.saturating_sub(facts.connected_since_unix_s));
    let word = |on: bool, word: &'static str| if on { word } else { "" };
    let _ = writeln!(
        text,
        "  pid {}, connected for {age}, cache {}{}{}{}, resumes {}",
        facts.pid,
        facts.cache,
        word(facts.read_only, ", read-only"),
        word(facts.writeback, ", writeback"),
        word(facts.checksum, ", payload checksums"),
        report.resumes
    );
    let granted = |granted: &Granted| match &granted.why {
        Some(why) => format!("{} of {} ({why})", granted.got, granted.asked),
        None => granted.got.to_string(),
    };
    let lanes = granted(&facts.lanes);
    let _ = writeln!(
        text,
        "  lanes {lanes}, slots a lane {}, spin {}",
        facts.slots_per_lane, facts.spin
    );
    render_rings(text, &facts.rings);
    let _ = writeln!(
        text,
        "  requests {} ({} in flight, {} parked), batches {}, {} up, {} down",
        report.requests,
        report.in_flight,
        report.parked,
        report.batches_up,
        bytes(report.bytes_up),
        bytes(report.bytes_down)
    );
}

fn render_rings(text: &mut String, rings: &Rings) {
    if !rings.asked {
        return;
    }
    let _ = match rings {
        Rings { queues: 0, why, .. } => {
            let why = why.as_deref().unwrap_or("not ready yet");
            writeln!(text, "  rings none, frames come by /dev/fuse ({why})")
        }
        Rings { queues, entries_per_queue, payloads_bytes_max, .. } => writeln!(
            text,
            "  rings {queues} queues x {entries_per_queue} entries, buffers of at most {}",
            bytes(*payloads_bytes_max)
        ),
    };
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86400, seconds % 86400 / 3600),
    }
}

fn bytes(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..0x10_0000 => format!("{:.1} KiB", n as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", n as f64 / 1048576.0),
        _ => format!("{:.1} GiB", n as f64 / 1073741824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let lanes = Granted { asked: 4, got: 1, why: Some("no clones".into()) };
        let facts = Facts { pid: 7, cache: "auto".into(), lanes, ..Facts::default() };
        Report { facts, requests: 12, in_flight: 3, bytes_up: 2048, ..Report::default() }
    }

    #[test]
    fn a_client_answers_and_a_dead_one_is_removed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let publisher = Publisher::bind(dir.path()).expect("bind");
        let dead = dir.path().join("1.sock");
        drop(UnixListener::bind(&dead).expect("bind"));
        let asked = std::thread::scope(|scope| {
            let asked = scope.spawn(|| ask_all(dir.path()));
            let mut fds = [rustix::event::PollFd::new(&publisher, rustix::event::PollFlags::IN)];
            let limit = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
            assert_eq!(rustix::event::poll(&mut fds, Some(&limit)), Ok(1));
            publisher.answer(report);
            asked.join().expect("asker")
        });
        assert_eq!(asked, [report()]);
        assert!(!dead.exists());
        drop(publisher);
        assert_eq!(std::fs::read_dir(dir.path()).expect("dir").count(), 0);
    }

    #[test]
    fn texts() {
        let entry = |client| Entry { mountpoint: "/m".into(), source: "d@unix:/s".into(), client };
        let text = render(&[entry(Some(report())), entry(None)], 61);
        for expected in [
            "d@unix:/s on /m",
            "lanes 1 of 4 (no clones), slots a lane 0, spin 0",
            "connected for 1 min",
            "requests 12 (3 in flight, 0 parked)",
            "2.0 KiB up",
            "ringfs umount -l /m",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        assert!(render(&[], 0).starts_with("no ringfs mounts"));
        assert_eq!(duration(90_061), "1 d 1 h");
        assert_eq!(bytes(5 << 30), "5.0 GiB");
    }
}
