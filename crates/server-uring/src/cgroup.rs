//! How much of the machine this daemon may have: the CPUs of its affinity mask, the CPU quota and
//! the memory limit of its control groups, of either version.
//!
//! A group's limits hold for all below it, so the smallest one on the way up counts. What cannot be
//! read limits nothing.

use crate::daemon::DaemonError;
use crate::limits::{
    LARGE_BUFFER_BYTES, LARGE_BUFFERS_MAX, LARGE_BUFFERS_MIN, LARGE_BUFFERS_OF_MEMORY,
};
use rustix::thread::{CpuSet, sched_getaffinity};
use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// What control groups allow.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limits {
    /// CPUs' worth of time.
    pub cpus: Option<f64>,
    /// Bytes of memory.
    pub memory: Option<u64>,
}

/// Of no limit, version 1 says a number near the largest.
const MEMORY_UNLIMITED: u64 = 1 << 60;

impl Limits {
    /// Of this process, where `root` is `/` (or holds a recorded `proc` and `sys`).
    pub fn read(root: &Path) -> Limits {
        let groups = Groups::read(root);
        let cpus = groups.smallest("cpu", |dir| {
            let v2 = read_to_string(dir.join("cpu.max")).ok();
            v2.map_or_else(|| quota_v1(dir), |text| quota_v2(&text))
        });
        let memory = groups.smallest("memory", |dir| {
            let text = read_to_string(dir.join("memory.max"));
            let text = text.or_else(|_| read_to_string(dir.join("memory.limit_in_bytes"))).ok()?;
            let bytes: u64 = text.trim().parse().ok()?;
            (bytes < MEMORY_UNLIMITED).then_some(bytes as f64)
        });
        Limits { cpus, memory: memory.map(|bytes| bytes as u64) }
    }

    /// How many shards to run on so many CPUs.
    pub fn shards(&self, cpus: usize) -> usize {
        let quota = self.cpus.map_or(cpus, |quota| quota.ceil() as usize);
        quota.clamp(1, cpus.max(1))
    }
}

/// Where the daemon's threads run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The CPUs that it may use.
    pub cpus: Vec<usize>,
    /// Shards: one a CPU, fewer where the quota is smaller.
    pub shards: usize,
    /// Large buffers of each.
    pub large_buffers: usize,
    /// What `--cpus` says.
    asked: Option<Vec<usize>>,
}

impl Placement {
    /// On the CPUs of this thread's mask, or those of them that were asked for.
    ///
    /// # Errors
    /// [`DaemonError::Cpu`]: one may not be used.
    pub fn new(asked: Option<Vec<usize>>, limits: &Limits) -> Result<Placement, DaemonError> {
        let allowed = allowed_cpus()?;
        let cpus = asked.clone().unwrap_or_else(|| allowed.clone());
        if let Some(&cpu) = cpus.iter().find(|cpu| !allowed.contains(cpu)) {
            return Err(DaemonError::Cpu(cpu, allowed));
        }
        let shards = limits.shards(cpus.len());
        let of_memory = limits.memory.map_or(usize::MAX, |bytes| {
            (bytes / LARGE_BUFFERS_OF_MEMORY) as usize / shards / LARGE_BUFFER_BYTES
        });
        let large_buffers = of_memory.clamp(LARGE_BUFFERS_MIN, LARGE_BUFFERS_MAX);
        Ok(Placement { cpus, shards, large_buffers, asked })
    }

    /// Looks again which CPUs there are; whether they are others. The shards stay as many.
    pub fn look(&mut self) -> bool {
        let Ok(allowed) = allowed_cpus() else { return false };
        let mut cpus = allowed.clone();
        if let Some(asked) = &self.asked {
            cpus.retain(|cpu| asked.contains(cpu));
        }
        // None of those asked for is left: better elsewhere than nowhere.
        let cpus = if cpus.is_empty() { allowed } else { cpus };
        std::mem::replace(&mut self.cpus, cpus) != self.cpus
    }

    /// All CPUs together.
    pub fn mask(&self) -> CpuSet {
        let mut set = CpuSet::new();
        self.cpus.iter().for_each(|&cpu| set.set(cpu));
        set
    }

    /// Where a shard runs: on a CPU of its own. Where there are fewer shards than CPUs on any of
    /// them, as it finds them free: other daemons of the machine have a quota too.
    pub fn mask_of(&self, shard: usize) -> CpuSet {
        if self.shards < self.cpus.len() || self.cpus.is_empty() {
            return self.mask();
        }
        let mut set = CpuSet::new();
        set.set(self.cpus[shard % self.cpus.len()]);
        set
    }
}

/// The CPUs of this thread's mask.
fn allowed_cpus() -> rustix::io::Result<Vec<usize>> {
    let mask = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|&cpu| mask.is_set(cpu)).collect())
}

/// `MAX PERIOD` or `max PERIOD`, in microseconds.
fn quota_v2(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    ratio(quota.parse().ok()?, period.parse().ok()?)
}

fn quota_v1(dir: &Path) -> Option<f64> {
    let number = |name: &str| read_to_string(dir.join(name)).ok()?.trim().parse::<f64>().ok();
    // -1 is no limit.
    ratio(number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?)
}

fn ratio(quota: f64, period: f64) -> Option<f64> {
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

/// Where the groups of this process are.
struct Groups {
    /// Of each hierarchy: its controllers (none: version 2), its mount, and the group below it.
    found: Vec<(Vec<String>, PathBuf, PathBuf)>,
}

impl Groups {
    fn read(root: &Path) -> Groups {
        let at = |path: &str| root.join(path.trim_start_matches('/'));
        let groups = read_to_string(at("/proc/self/cgroup")).unwrap_or_default();
        let mounts = read_to_string(at("/proc/self/mountinfo")).unwrap_or_default();
        let mut found = Vec::new();
        for line in groups.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
            let controllers: Vec<String> =
                controllers.split(',').filter(|name| !name.is_empty()).map(Into::into).collect();
            let mount = mounts.lines().find_map(|line| mount_of(line, &controllers));
            let Some((shown, mount)) = mount else { continue };
            // A mount may show a part of the hierarchy: that of the container.
            let below = Path::new(group).strip_prefix(shown).unwrap_or(Path::new(""));
            found.push((controllers, at(mount), below.to_owned()));
        }
        Groups { found }
    }

    /// The smallest limit from the process's group up to the mount, in the hierarchy that has this
    /// controller.
    fn smallest(&self, controller: &str, limit: impl Fn(&Path) -> Option<f64>) -> Option<f64> {
        let has = |names: &[String]| names.is_empty() || names.iter().any(|n| n == controller);
        let hierarchies = self.found.iter().filter(|(names, ..)| has(names));
        let dirs = hierarchies
            .flat_map(|(_, mount, below)| below.ancestors().map(|group| mount.join(group)));
        dirs.filter_map(|dir| limit(&dir)).reduce(f64::min)
    }
}

/// The shown root and the mount point, if this line of mountinfo is of a hierarchy with these
/// controllers.
fn mount_of<'a>(line: &'a str, controllers: &[String]) -> Option<(&'a str, &'a str)> {
    let (mount, kind) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (shown, at) = (mount.next()?, mount.next()?);
    let mut kind = kind.split(' ');
    let is_it = match kind.next()? {
        "cgroup2" => controllers.is_empty(),
        "cgroup" => {
            let options = kind.nth(1)?;
            let first = controllers.first()?;
            options.split(',').any(|option| option == first)
        }
        _ => false,
    };
    is_it.then_some((shown, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files as machines had them.
    fn limits(files: &[(&str, &str)]) -> Limits {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a directory")).expect("mkdir");
            std::fs::write(path, text).expect("write");
        }
        Limits::read(dir.path())
    }

    const V2: &str =
        "29 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "\
        35 30 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
        36 30 0:32 /docker/ab /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n\
        37 30 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_smallest_limit_on_the_way_up_counts() {
        let group = "0::/ringfs.slice/ringfsd@7.service\n";
        let v2 = |slice: &str, service: &str, memory: &str| {
            limits(&[
                ("proc/self/cgroup", group),
                ("proc/self/mountinfo", V2),
                ("sys/fs/cgroup/ringfs.slice/cpu.max", slice),
                ("sys/fs/cgroup/ringfs.slice/ringfsd@7.service/cpu.max", service),
                ("sys/fs/cgroup/ringfs.slice/memory.max", memory),
                ("sys/fs/cgroup/ringfs.slice/ringfsd@7.service/memory.max", "max\n"),
            ])
        };
        let of = |cpus, memory| Limits { cpus, memory };
        assert_eq!(v2("max 100000\n", "max 100000\n", "max\n"), of(None, None));
        assert_eq!(
            v2("max 100000\n", "150000 100000\n", "1048576\n"),
            of(Some(1.5), Some(1 << 20))
        );
        assert_eq!(v2("50000 100000\n", "400000 100000\n", "x\n"), of(Some(0.5), None));
        assert_eq!(limits(&[]), of(None, None));
    }

    #[test]
    fn version_1_has_a_hierarchy_for_each_controller() {
        let groups = "12:memory:/docker/ab/x\n4:cpu,cpuacct:/jobs\n3:cpuset:/\n0::/\n";
        let v1 = |quota: &str, memory: &str| {
            limits(&[
                ("proc/self/cgroup", groups),
                ("proc/self/mountinfo", V1),
                ("sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us", quota),
                ("sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_period_us", "100000\n"),
                ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
                ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", memory),
                ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "9223372036854771712\n"),
            ])
        };
        let of = |cpus, memory| Limits { cpus, memory };
        assert_eq!(v1("-1\n", "9223372036854771712\n"), of(None, None));
        assert_eq!(v1("250000\n", "268435456\n"), of(Some(2.5), Some(256 << 20)));
    }

    #[test]
    fn shards_have_a_cpu_each_or_share_all() {
        let place = |cpus: &[usize], shards| Placement {
            cpus: cpus.into(),
            shards,
            large_buffers: 8,
            asked: None,
        };
        let on = |place: Placement, shard| {
            let set = place.mask_of(shard);
            (0..8).filter(|&cpu| set.is_set(cpu)).collect::<Vec<_>>()
        };
        assert_eq!(on(place(&[2, 5], 2), 1), [5]);
        assert_eq!(on(place(&[2, 5, 6], 2), 1), [2, 5, 6]);
        assert_eq!(on(place(&[2], 3), 2), [2]);
    }

    #[test]
    fn buffers_are_a_part_of_the_memory() {
        let large = |memory| {
            let limits = Limits { cpus: Some(1.0), memory };
            Placement::new(None, &limits).expect("a placement").large_buffers
        };
        assert_eq!(large(None), LARGE_BUFFERS_MAX);
        assert_eq!(large(Some(128 << 20)), (32 << 20) / LARGE_BUFFER_BYTES);
        assert_eq!(large(Some(1 << 20)), LARGE_BUFFERS_MIN);
    }

    #[test]
    fn a_shard_for_each_cpu_that_may_be_used_up() {
        let shards = |quota: f64, cpus| Limits { cpus: Some(quota), memory: None }.shards(cpus);
        assert_eq!((shards(0.1, 8), shards(1.0, 8), shards(1.5, 8), shards(99.0, 8)), (1, 1, 2, 8));
        assert_eq!((Limits::default().shards(4), Limits::default().shards(0)), (4, 1));
    }
}
