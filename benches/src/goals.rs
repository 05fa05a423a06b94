//! What must come out, and whether it did. Pure.

use crate::samples::Samples;
use crate::stats::Spread;

/// What a figure is held against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Versus {
    /// The local passthrough, in the same round.
    Local,
    /// The bare directory, in the same round.
    Bare,
    /// Nobody: the figure itself.
    Itself,
}

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

/// One row of the table of goals.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// For people.
    pub what: &'static str,
    /// The work it is measured by.
    pub work: &'static str,
    /// Its metric.
    pub metric: &'static str,
    /// Held against whom.
    pub versus: Versus,
    /// How much.
    pub bound: Bound,
    /// Set for the contender that does not spin, where that one ran.
    pub no_spin: bool,
}

const fn local(what: &'static str, work: &'static str, at_least: f64) -> Goal {
    let bound = Bound::AtLeast(at_least);
    Goal { what, work, metric: "rate", versus: Versus::Local, bound, no_spin: false }
}

const fn itself(what: &'static str, work: &'static str, metric: &'static str, most: f64) -> Goal {
    let bound = Bound::AtMost(most);
    Goal { what, work, metric, versus: Versus::Itself, bound, no_spin: false }
}

const fn cpu(what: &'static str, work: &'static str, most: f64) -> Goal {
    let bound = Bound::AtMost(most);
    Goal { what, work, metric: "cpu", versus: Versus::Local, bound, no_spin: true }
}

/// The goals, for tmpfs.
pub const GOALS: &[Goal] = &[
    local("4 KiB random read, O_DIRECT, depth 1", "randread-4k-d1", 0.75),
    local("4 KiB random read, O_DIRECT, 4 jobs", "randread-4k-j4", 0.8),
    local("4 KiB random read, O_DIRECT, depth 16", "randread-4k-d16", 1.0),
    local("4 KiB random write, O_DIRECT, depth 1", "randwrite-4k-d1", 0.75),
    local("4 KiB random write, O_DIRECT, 4 jobs", "randwrite-4k-j4", 1.2),
    local("1 MiB sequential read, O_DIRECT", "read-1m", 1.5),
    local("1 MiB sequential write, O_DIRECT", "write-1m", 0.6),
    local("sequential read, buffered, cold", "read-cold", 1.0),
    local("cold stat, 1 thread", "stat-cold", 0.7),
    local("cold stat, 4 threads", "stat-cold-t4", 1.5),
    local("ENOENT", "stat-absent", 0.65),
    local("create+write+close", "create-write-close", 1.0),
    local("open+read+close", "open-read-close", 1.0),
    local("rename", "rename", 0.7),
    local("unlink", "unlink", 0.7),
    local("readdir of 10,000 with attributes", "readdir-stat", 1.0),
    local("256 workers, 1024 x 4 KiB files, read", "workers-256-read", 1.5),
    Goal {
        what: "the same, time against the bare directory",
        metric: "time",
        versus: Versus::Bare,
        bound: Bound::AtMost(4.0),
        ..local("", "workers-256-read", 0.0)
    },
    Goal {
        what: "p99 of GETATTR under mixed load",
        metric: "getattr-p99",
        bound: Bound::AtMost(1.2),
        ..local("", "mixed", 0.0)
    },
    itself("another share frozen: p99 of GETATTR, x", "frozen", "p99-ratio", 2.0),
    itself("the same while its guest creates files", "frozen-create", "p99-ratio", 2.0),
    cpu("CPU of a 4 KiB read, depth 1, no spinning", "randread-4k-d1", 2.5),
    cpu("CPU of a 4 KiB read, 16 in flight, no spinning", "randread-4k-d16", 2.0),
    // None: what a heartbeat now and then costs is below a thousandth of a CPU.
    itself("CPU of an idle mount, us/s", "idle", "cpu", 1000.0),
    itself("daemon's RSS idle, one session, MiB", "footprint", "rss-idle", 24.0),
    itself("daemon's RSS an idle session more, KiB", "footprint", "rss-session", 1024.0),
    itself("daemon's RSS a known inode, B", "footprint", "rss-node", 200.0),
];

/// Whether a goal is set for that work.
pub fn is_for(work: &str) -> bool {
    GOALS.iter().any(|goal| goal.work == work)
}

/// A contender's standing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// What is held against the bound: ratios, or the figure itself.
    pub spread: Spread,
    /// By the median.
    pub met: bool,
}

impl Goal {
    /// As a person reads it.
    pub fn bound_text(&self) -> String {
        let (sign, value) = match self.bound {
            Bound::AtLeast(value) => (">=", value),
            Bound::AtMost(value) => ("<=", value),
        };
        let versus = match self.versus {
            Versus::Local => " x local",
            Versus::Bare => " x bare",
            Versus::Itself => "",
        };
        format!("{sign} {value}{versus}")
    }

    /// How that contender stands; `None` where it was not measured.
    pub fn standing(&self, samples: &Samples, contender: &str) -> Option<Standing> {
        let row = samples.row(self.work, self.metric)?;
        let spread = match self.versus {
            Versus::Local => row.ratio(contender, "local"),
            Versus::Bare => row.ratio(contender, "bare"),
            Versus::Itself => row.spread(contender),
        }?;
        let met = match self.bound {
            Bound::AtLeast(least) => spread.median >= least,
            Bound::AtMost(most) => spread.median <= most,
        };
        Some(Standing { spread, met })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::{Metric, Work};

    #[test]
    fn goals_name_works_that_exist() {
        let works: Vec<_> = Work::all().iter().map(|work| work.name).collect();
        for goal in GOALS {
            assert!(works.contains(&goal.work), "{}", goal.work);
            assert!(!goal.what.is_empty());
        }
    }

    #[test]
    fn bounds_hold_for_medians() {
        let mut samples = Samples::default();
        let add = |samples: &mut Samples, who: &str, round, value| {
            let metric = Metric { name: "rate", unit: "IOPS", value };
            samples.add("randread-4k-d1", who, round, &[metric]);
        };
        for (round, value) in [70.0, 80.0, 200.0].into_iter().enumerate() {
            add(&mut samples, "local", round, 100.0);
            add(&mut samples, "ringfs", round, value);
        }
        let standing = GOALS[0].standing(&samples, "ringfs").unwrap();
        assert!(standing.met && standing.spread.median == 0.8);
        assert!(GOALS[0].standing(&samples, "local").unwrap().met);
        assert_eq!(GOALS[1].standing(&samples, "ringfs"), None);
        let mut most = GOALS[0];
        most.bound = Bound::AtMost(0.75);
        assert!(!most.standing(&samples, "ringfs").unwrap().met);
        assert_eq!(most.bound_text(), "<= 0.75 x local");
    }
}
