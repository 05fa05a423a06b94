//! What a daemon tells about itself: the answer to `ringfsd status`, as JSON and as tables.
//!
//! Numbers and names only. The reader may be older or newer than the daemon: what it does not know
//! it skips, what is missing is zero.

use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Of the daemon.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Seconds since its start.
    pub up_s: u64,
    /// Threads that serve, each with a ring.
    pub shards: usize,
    /// CPUs that they may use.
    pub cpus: Vec<usize>,
    /// Buffers of 1 MiB that each of them may have at once.
    pub large_buffers: usize,
    /// Open file descriptors.
    pub fds: u64,
    /// As many it may have.
    pub fds_max: u64,
    /// What is in force, and what became of the last reload.
    pub config: ConfigState,
    /// What can be mounted.
    pub shares: Vec<ShareStatus>,
    /// Who has mounted.
    pub sessions: Vec<SessionStatus>,
    /// Requests that took long, the newest last.
    pub slow: Vec<SlowOp>,
}

/// The configuration in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConfigState {
    /// The daemon's process: the parent's.
    pub pid: u32,
    /// Where it is from; `None`: from the command line alone.
    pub file: Option<PathBuf>,
    /// When it came into force, in seconds of Unix time.
    pub loaded_unix_s: u64,
    /// Reloads asked for since the start.
    pub reloads: u64,
    /// What the last good one changed.
    pub changed: Vec<String>,
    /// Settings that it changed and that wait for the next start.
    pub needs_restart: Vec<String>,
    /// What the worker was to have and cannot, and why; a reload tries it again.
    pub lacks: Vec<String>,
    /// When the last one failed; `None` once one was good.
    pub failed_unix_s: Option<u64>,
    /// Why it failed.
    pub errors: Vec<String>,
    /// Where guests connect.
    pub listeners: Vec<String>,
}

/// One share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShareStatus {
    /// What guests call it.
    pub name: String,
    /// The directory.
    pub path: PathBuf,
    /// Guests may not change it.
    pub read_only: bool,
    /// It was removed by a reload, and sessions of it go on.
    pub removed: bool,
    /// Sessions of it.
    pub sessions: u64,
    /// What its limits are and did.
    pub limits: Vec<LimitStatus>,
    /// Payload bytes of READ replies.
    pub bytes_read: u64,
    /// Payload bytes that WRITEs stored.
    pub bytes_written: u64,
    /// Requests answered with an errno.
    pub errors: u64,
    /// Requests that took longer than `slow-op`.
    pub slow: u64,
    /// What was done, by kind.
    pub operations: Vec<OperationStatus>,
}

/// One limit of a share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LimitStatus {
    /// As it is configured.
    pub name: String,
    /// 0: it is not set any more.
    pub amount: u64,
    /// Requests that waited for it; of `in-flight` how often a connection was read no further.
    pub delayed: u64,
    /// How long, in microseconds; not known of `in-flight`.
    pub delayed_us: u64,
    /// Files that were not opened, or not made known, for it.
    pub refused: u64,
}

/// How often a kind of request took how long.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OperationStatus {
    /// The kind.
    pub name: String,
    /// All times together.
    pub sum_ns: u64,
    /// How many took at most `1024 ns << index`, and longer than the one before; the last one has
    /// all that took longer.
    pub buckets: Vec<u64>,
}

/// A request that took long.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SlowOp {
    /// When it was over, in seconds of Unix time.
    pub unix_s: u64,
    /// Whose.
    pub share: String,
    /// Whose.
    pub session: u64,
    /// `session.lane.slot.seq`: what the guest calls the same request.
    pub op: String,
    /// The kind.
    pub opcode: String,
    /// The node that it names; 0: none.
    pub node: u64,
    /// Where in the share that was seen last, if that is known.
    pub path: Option<String>,
    /// From when it was taken up until its reply was made.
    pub took_us: u64,
    /// Of that, waiting for a thread of the pool.
    pub waited_us: u64,
    /// Where it ran: shard, ring, pool; or peer: its reply waited until the guest had room.
    pub place: String,
}

impl OperationStatus {
    /// How many.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// One session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SessionStatus {
    /// Counts up, in each worker from a random number on.
    pub id: u64,
    /// What it has mounted.
    pub share: String,
    /// The directory below it.
    pub subdir: String,
    /// The listener and who is at the other end.
    pub peer: String,
    /// Seconds since it was opened here.
    pub age_s: u64,
    /// Seconds since its last connection was lost, if none is there.
    pub cut_s: Option<u64>,
    /// Lanes.
    pub lanes: u16,
    /// Connections that are there.
    pub connections: u32,
    /// Connections that were there and are to come again.
    pub connections_cut: u32,
    /// Requests begun.
    pub requests: u64,
    /// Those of them that are being executed.
    pub in_flight: u64,
    /// Inodes that the guest knows.
    pub nodes: u64,
    /// Files and directories that it has open.
    pub handles: u64,
}

impl Status {
    /// For people; with a width no line of a table is longer.
    pub fn to_text(&self, width: Option<usize>) -> String {
        let mut out = String::new();
        let cpus: Vec<String> = self.cpus.iter().map(ToString::to_string).collect();
        let Status { version, pid, fds, fds_max, shards, large_buffers, .. } = self;
        let up = span(self.up_s);
        let cpus = cpus.join(",");
        let _ =
            writeln!(out, "ringfsd {version}, pid {pid}, up {up}, {shards} shards on CPUs {cpus}");
        let _ = writeln!(
            out,
            "open files: {fds} of {fds_max}; at most {large_buffers} buffers of 1MiB a shard"
        );
        self.config.write(&mut out);
        let rows = self.shares.iter().map(ShareStatus::row);
        let head = ["SHARE", "SESSIONS", "DONE", "ERRORS", "SLOW", "READ", "WRITTEN", "PATH", ""];
        table(&mut out, &head, rows, width);
        if !self.sessions.is_empty() {
            let head = [
                "SESSION", "SHARE", "STATE", "AGE", "LANES", "BUSY", "DONE", "NODES", "OPEN",
                "PEER",
            ];
            table(&mut out, &head, self.sessions.iter().map(SessionStatus::row), width);
        }
        if !self.slow.is_empty() {
            let head = ["SLOW", "SESSION", "SHARE", "OP", "OPCODE", "TOOK", "WAITED", "AT", "PATH"];
            table(&mut out, &head, self.slow.iter().rev().map(SlowOp::row), width);
        }
        out
    }
}

impl ConfigState {
    fn write(&self, out: &mut String) {
        let file =
            self.file.as_ref().map_or("the command line".into(), |f| f.display().to_string());
        let _ = writeln!(out, "configuration: {file}, {} reloads", self.reloads);
        for error in &self.errors {
            let _ = writeln!(out, "  THE LAST RELOAD FAILED, the old one is in force: {error}");
        }
        if !self.needs_restart.is_empty() {
            let _ = writeln!(out, "  not before the next start: {}", self.needs_restart.join(", "));
        }
        for lack in &self.lacks {
            let _ = writeln!(out, "  THE WORKER IS WITHOUT {lack}");
        }
        let _ = writeln!(out, "listening: {}", self.listeners.join(" "));
    }
}

impl ShareStatus {
    fn row(&self) -> Vec<String> {
        let marks = match (self.removed, self.read_only) {
            (true, _) => "removed",
            (false, true) => "ro",
            (false, false) => "",
        };
        let path = self.path.display().to_string();
        let mut marks = marks.to_owned();
        for LimitStatus { name, delayed, delayed_us, refused, .. } in &self.limits {
            if *delayed > 0 {
                let by = Duration::from_micros(delayed_us / delayed);
                let _ = write!(marks, " {name}: {delayed} delayed (by {by:.1?})");
            }
            if *refused > 0 {
                let _ = write!(marks, " {name}: {refused} refused");
            }
        }
        let marks = marks.trim_start().to_owned();
        let done: u64 = self.operations.iter().map(OperationStatus::count).sum();
        let numbers = [self.sessions, done, self.errors, self.slow];
        let mut row = vec![self.name.clone()];
        row.extend(numbers.iter().map(ToString::to_string));
        row.extend([bytes(self.bytes_read), bytes(self.bytes_written), path, marks]);
        row
    }
}

impl SlowOp {
    fn row(&self) -> Vec<String> {
        let ms = |us: u64| format!("{}ms", us / 1000);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        vec![
            format!("{} ago", span(now.saturating_sub(self.unix_s))),
            self.session.to_string(),
            self.share.clone(),
            self.op.clone(),
            self.opcode.clone(),
            ms(self.took_us),
            ms(self.waited_us),
            self.place.clone(),
            self.path.clone().unwrap_or_else(|| format!("node {}", self.node)),
        ]
    }
}

impl SessionStatus {
    /// Whether all its connections are there.
    pub fn is_connected(&self) -> bool {
        self.connections > 0 && self.connections_cut == 0
    }

    fn row(&self) -> Vec<String> {
        let share = match self.subdir.as_str() {
            "" => self.share.clone(),
            subdir => format!("{}/{subdir}", self.share),
        };
        let state = match self.cut_s {
            Some(seconds) => format!("cut {}", span(seconds)),
            None => "connected".into(),
        };
        let done = self.requests.saturating_sub(self.in_flight);
        let numbers = [u64::from(self.lanes), self.in_flight, done, self.nodes, self.handles];
        let mut row = vec![self.id.to_string(), share, state, span(self.age_s)];
        row.extend(numbers.iter().map(ToString::to_string));
        row.push(self.peer.clone());
        row
    }
}

/// Columns as wide as they must be, numbers to the right; where a width is given the longest words
/// lose of their middle. What peers have named holds no control characters here.
pub(crate) fn table(
    out: &mut String,
    head: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
    width: Option<usize>,
) {
    let head = head.iter().map(|name| (*name).to_owned()).collect();
    let mut rows: Vec<Vec<String>> = std::iter::once(head).chain(rows.map(printable)).collect();
    let columns = rows[0].len();
    let widest = |rows: &[Vec<String>], column: usize| {
        rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
    };
    let mut widths: Vec<usize> = (0..columns).map(|column| widest(&rows, column)).collect();
    let mut over = width.map_or(0, |width| {
        (widths.iter().sum::<usize>() + 2 * (columns - 1)).saturating_sub(width)
    });
    while over > 0 {
        let Some(longest) = widths.iter_mut().max().filter(|longest| **longest > WORD_KEPT) else {
            break;
        };
        *longest -= 1;
        over -= 1;
    }
    for row in &mut rows {
        row.iter_mut().zip(&widths).for_each(|(cell, &width)| shorten(cell, width));
    }
    let is_number = |cell: &String| cell.is_empty() || cell.starts_with(NUMBERS);
    let numbers: Vec<bool> = (0..columns)
        .map(|column| rows.len() > 1 && rows[1..].iter().all(|row| is_number(&row[column])))
        .collect();
    out.push('\n');
    for row in &rows {
        let cells = row.iter().zip(&widths).zip(&numbers);
        let cells = cells.map(|((cell, &width), number)| match number {
            true => format!("{cell:>width$}"),
            false => format!("{cell:width$}"),
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        let _ = writeln!(out, "{}", line.trim_end());
    }
}

/// A word keeps at least so many characters.
const WORD_KEPT: usize = 12;
/// How a number begins.
const NUMBERS: &[char] = &['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', '<', '-'];

/// Of a path both ends tell more than the middle.
fn shorten(cell: &mut String, width: usize) {
    let chars: Vec<char> = cell.chars().collect();
    if chars.len() > width {
        let (first, last) = (width / 3, width - width / 3 - 1);
        let kept = chars[..first].iter().chain(&['~']).chain(&chars[chars.len() - last..]);
        *cell = kept.collect();
    }
}

fn printable(row: Vec<String>) -> Vec<String> {
    let clean = |cell: String| cell.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    row.into_iter().map(clean).collect()
}

/// Bytes, for people.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..units.len() - 1).take_while(|unit| n >> (10 * (unit + 1)) >= 10).count();
    format!("{}{}", n >> (10 * unit), units[unit])
}

/// Seconds, for people.
pub(crate) fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_for_people() {
        let session = SessionStatus {
            id: 7,
            share: "src".into(),
            peer: "/run/v.sock_5640 pid 12\x1b[2J".into(),
            age_s: 3725,
            cut_s: Some(61),
            requests: 12,
            in_flight: 2,
            ..Default::default()
        };
        let share = ShareStatus { name: "src".into(), path: "/srv".into(), ..Default::default() };
        let (shares, sessions) = (vec![share], vec![session]);
        let config = ConfigState { errors: vec!["x:3: bad".into()], ..Default::default() };
        let text = Status { shares, sessions, config, ..Default::default() }.to_text(None);
        let lines: Vec<&str> = text.lines().collect();
        let row = "      7  src    cut 1m01s  1h02m      0     2    10      0     0  \
                   /run/v.sock_5640 pid 12?[2J";
        assert_eq!(lines.last(), Some(&row));
        assert!(lines.iter().any(|line| line.contains("RELOAD FAILED") && line.contains("x:3")));
        let row = "src           0     0       0     0    0B       0B  /srv";
        assert!(lines.contains(&row), "{text}");
        for (n, said) in [(0, "0B"), (10_239, "10239B"), (10_240, "10KiB"), (20 << 30, "20GiB")] {
            assert_eq!(bytes(n), said);
        }
    }

    #[test]
    fn a_table_is_as_wide_as_the_terminal() {
        let row = |path: &str, n: &str| vec![path.to_owned(), n.to_owned()];
        let long = "/srv/machines/a-long-name/v.sock_5640 pid 4711";
        let mut text = String::new();
        table(&mut text, &["PATH", "N"], [row(long, "7"), row("/x", "12")].into_iter(), Some(34));
        let lines: Vec<&str> = text.lines().skip(1).collect();
        let expected = [
            "PATH                             N",
            "/srv/machi~/v.sock_5640 pid 4711  7",
            "/x                               12",
        ];
        assert!(lines.iter().all(|line| line.len() <= 34), "{text}");
        let expected = expected.map(|line| line.split_whitespace().next_back());
        assert_eq!(
            lines.iter().map(|l| l.split_whitespace().next_back()).collect::<Vec<_>>(),
            expected
        );
        assert!(text.contains("pid 4711") && text.contains("/srv/") && !text.contains("a-long"));
        // What could not be read any more is wider all the same.
        let mut text = String::new();
        table(&mut text, &["PATH", "N"], [row(long, "7")].into_iter(), Some(5));
        assert_eq!(text.lines().next_back(), Some("/srv~id 4711  7"), "{text}");
    }

    #[test]
    fn older_and_newer_ones_are_understood() {
        let newer = r#"{"pid": 3, "colour": "red", "sessions": [{"id": 1, "mood": "good"}]}"#;
        let status: Status = serde_json::from_str(newer).expect("understood");
        assert_eq!((status.pid, status.sessions[0].id, status.shares.len()), (3, 1, 0));
    }
}
