//! What /proc says of mounts and of the processes that serve them.
//!
//! Must not touch the mounts themselves: one whose server has died would hang us.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// `utime` and `stime` count ticks of this length; USER_HZ is 100 on every Linux.
const TICK_NS: u64 = 10_000_000;

/// One line of mountinfo.
#[derive(Clone, Debug, PartialEq)]
pub struct Mount {
    /// Minor number of its device: the FUSE connection's name.
    pub minor: u32,
    /// `major:minor`.
    pub device: String,
    /// Where.
    pub at: PathBuf,
    /// File system type.
    pub kind: String,
}

impl Mount {
    /// Whether a process serves it.
    pub fn is_fuse(&self) -> bool {
        self.kind == "fuse" || self.kind.starts_with("fuse.")
    }
}

/// All mounts at that very place, the oldest first.
pub fn mounts_at(at: &Path) -> Vec<Mount> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines().filter_map(parse_mount).filter(|mount| mount.at == at).collect()
}

/// All mounts at that place and below it.
pub fn mounts_below(dir: &Path) -> Vec<Mount> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines().filter_map(parse_mount).filter(|mount| mount.at.starts_with(dir)).collect()
}

fn parse_mount(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(2);
    let device = left.next()?.to_owned();
    let minor = device.split_once(':')?.1.parse().ok()?;
    let at = left.nth(1)?.replace("\\040", " ").into();
    Some(Mount { minor, device, at, kind: right.split(' ').next()?.to_owned() })
}

/// Whether a process runs; a zombie does not.
pub fn lives(pid: i32) -> bool {
    stat_fields(&format!("/proc/{pid}/stat")).is_some_and(|fields| fields[0] != "Z")
}

/// The fields of a stat file from the third on: state first.
fn stat_fields(path: &str) -> Option<Vec<String>> {
    let text = fs::read_to_string(path).ok()?;
    // The name may hold anything, so look for its end from behind.
    let fields: Vec<String> =
        text.rsplit_once(") ")?.1.split_whitespace().map(str::to_owned).collect();
    (fields.len() > 20).then_some(fields)
}

/// These processes and all that descend from them.
pub fn tree(roots: &[i32]) -> Vec<i32> {
    let mut all = Vec::new();
    let mut next: Vec<i32> = roots.to_vec();
    while let Some(pid) = next.pop() {
        if all.contains(&pid) {
            continue;
        }
        all.push(pid);
        for task in tasks(pid) {
            let path = format!("/proc/{pid}/task/{task}/children");
            let text = fs::read_to_string(path).unwrap_or_default();
            next.extend(text.split_whitespace().filter_map(|child| child.parse::<i32>().ok()));
        }
    }
    all
}

fn tasks(pid: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// What one thread has used.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Task {
    cpu_ns: u64,
    voluntary: u64,
    forced: u64,
}

/// What processes have used, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    tasks: BTreeMap<(i32, i32), Task>,
    /// CPU by process in ticks, which counts threads that have ended too.
    ticks: BTreeMap<i32, u64>,
}

/// What processes used between two moments.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// User and system time.
    pub cpu: Duration,
    /// Times that a thread waited for something: wake-ups.
    pub wakeups: u64,
    /// Times that a thread was put aside for another.
    pub preempted: u64,
}

impl Snapshot {
    /// Of these processes and their children.
    pub fn take(roots: &[i32]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for pid in tree(roots) {
            if let Some(fields) = stat_fields(&format!("/proc/{pid}/stat")) {
                let ticks = |i: usize| fields[i].parse::<u64>().unwrap_or(0);
                snapshot.ticks.insert(pid, ticks(11) + ticks(12));
            }
            for tid in tasks(pid) {
                let text = |file: &str| {
                    fs::read_to_string(format!("/proc/{pid}/task/{tid}/{file}")).unwrap_or_default()
                };
                let cpu = text("schedstat").split(' ').next().and_then(|ns| ns.parse().ok());
                let status = text("status");
                let task = Task {
                    cpu_ns: cpu.unwrap_or(0),
                    voluntary: status_number(&status, "voluntary_ctxt_switches:").unwrap_or(0),
                    forced: status_number(&status, "nonvoluntary_ctxt_switches:").unwrap_or(0),
                };
                snapshot.tasks.insert((pid, tid), task);
            }
        }
        snapshot
    }

    /// What was used since `before`. Nanoseconds where every thread of then still lives; a process
    /// that lost one is counted in ticks of 10 ms, which remember the dead.
    pub fn since(&self, before: &Snapshot) -> Usage {
        let mut usage = Usage::default();
        for (&pid, &ticks) in &self.ticks {
            let lost = before.tasks.keys().any(|key| key.0 == pid && !self.tasks.contains_key(key));
            let mut fine = 0;
            for (key, task) in self.tasks.iter().filter(|(key, _)| key.0 == pid) {
                let was = before.tasks.get(key).copied().unwrap_or_default();
                fine += task.cpu_ns.saturating_sub(was.cpu_ns);
                usage.wakeups += task.voluntary.saturating_sub(was.voluntary);
                usage.preempted += task.forced.saturating_sub(was.forced);
            }
            let coarse = ticks.saturating_sub(before.ticks.get(&pid).copied().unwrap_or(0));
            let ns = if lost { fine.max(coarse * TICK_NS) } else { fine };
            usage.cpu += Duration::from_nanos(ns);
        }
        usage
    }

    /// CPU of all threads so far, to see whether they rest.
    pub fn cpu_ns(&self) -> u64 {
        self.tasks.values().map(|task| task.cpu_ns).sum()
    }
}

/// The number after `key` at a line's start, as in /proc/PID/status.
fn status_number(text: &str, key: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Resident memory of these processes and their children, in bytes, and the descriptors they hold.
pub fn memory(roots: &[i32]) -> (u64, u64) {
    let mut sum = (0, 0);
    for pid in tree(roots) {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        sum.0 += status_number(&status, "VmRSS:").unwrap_or(0) * 1024;
        sum.1 += fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |fds| fds.count() as u64);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_read() {
        let line = r"36 35 0:53 / /mnt/a\040b rw,nosuid shared:1 - fuse.ringfs src rw,user_id=0";
        let mount = parse_mount(line).unwrap();
        assert_eq!((mount.minor, mount.device.as_str()), (53, "0:53"));
        assert_eq!(mount.at, Path::new("/mnt/a b"));
        assert!(mount.is_fuse());
        assert!(!parse_mount("1 1 8:1 / / rw - ext4 /dev/sda rw").unwrap().is_fuse());
        assert_eq!(parse_mount("nonsense"), None);
    }

    #[test]
    fn status_numbers_are_found_at_a_lines_start() {
        let text = "nonvoluntary_ctxt_switches:\t9\nvoluntary_ctxt_switches:\t4\nVmRSS:\t  12 kB\n";
        assert_eq!(status_number(text, "voluntary_ctxt_switches:"), Some(4));
        assert_eq!(status_number(text, "VmRSS:"), Some(12));
        assert_eq!(status_number(text, "VmHWM:"), None);
    }

    #[test]
    fn our_own_use_is_seen() {
        let me = [std::process::id() as i32];
        assert!(lives(me[0]));
        let before = Snapshot::take(&me);
        let mut sum = 0_u64;
        while Snapshot::take(&me).since(&before).cpu == Duration::ZERO {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(memory(&me).0 > 0 && memory(&me).1 > 2);
    }

    #[test]
    fn a_lost_thread_makes_ticks_count() {
        let task = |cpu_ns| Task { cpu_ns, voluntary: 1, forced: 0 };
        let before = Snapshot {
            tasks: [((1, 1), task(5)), ((1, 2), task(5))].into(),
            ticks: [(1, 0)].into(),
        };
        let now = Snapshot { tasks: [((1, 1), task(105))].into(), ticks: [(1, 3)].into() };
        assert_eq!(now.since(&before).cpu, Duration::from_millis(30));
        let whole = Snapshot {
            tasks: [((1, 1), task(105)), ((1, 2), task(5))].into(),
            ticks: [(1, 3)].into(),
        };
        assert_eq!(whole.since(&before).cpu, Duration::from_nanos(100));
    }
}
