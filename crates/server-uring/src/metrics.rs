//! What is counted of each share, cheaply enough to be counted always.
//!
//! A share has one [`ShareShard`] a shard, written by that shard's thread alone with plain stores;
//! readers add them up. The time of a request runs from when its shard takes it up until its reply
//! is made: the clock is read once a request, since the end of one is the beginning of the next.

use crate::stats::add;
use crate::status::{OperationStatus, SlowOp};
use ringfs_wire::abi::Opcode;
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Kinds of requests that are timed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "see `Family::of`")]
pub enum Family {
    Lookup,
    Attributes,
    Open,
    Read,
    Write,
    List,
    Change,
    Sync,
    Xattr,
    Other,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 10] = [
        Family::Lookup,
        Family::Attributes,
        Family::Open,
        Family::Read,
        Family::Write,
        Family::List,
        Family::Change,
        Family::Sync,
        Family::Xattr,
        Family::Other,
    ];

    /// As metrics and people name it.
    pub const fn name(self) -> &'static str {
        match self {
            Family::Lookup => "lookup",
            Family::Attributes => "attributes",
            Family::Open => "open",
            Family::Read => "read",
            Family::Write => "write",
            Family::List => "list",
            Family::Change => "change",
            Family::Sync => "sync",
            Family::Xattr => "xattr",
            Family::Other => "other",
        }
    }

    /// Of an opcode; unknown ones are `Other`.
    pub const fn of(opcode: u32) -> Family {
        use Opcode::*;
        match Opcode::from_u32(opcode) {
            Some(Lookup) => Family::Lookup,
            Some(Getattr | Statx | Setattr | Access | Readlink | Statfs) => Family::Attributes,
            Some(Open | Create | Tmpfile | Opendir | Release | Releasedir | Flush) => Family::Open,
            Some(Read) => Family::Read,
            Some(Write) => Family::Write,
            Some(Readdir | Readdirplus) => Family::List,
            Some(Symlink | Mknod | Mkdir | Unlink | Rmdir | Rename | Rename2 | Link) => {
                Family::Change
            }
            Some(Fsync | Fsyncdir | Syncfs) => Family::Sync,
            Some(Setxattr | Getxattr | Listxattr | Removexattr) => Family::Xattr,
            Some(Fallocate | CopyFileRange | CopyFileRange64 | Lseek | Forget | BatchForget) => {
                Family::Other
            }
            Some(Init | Destroy | Getlk | Setlk | Setlkw | Interrupt | Bmap | Ioctl | Poll) => {
                Family::Other
            }
            Some(NotifyReply | Setupmapping | Removemapping) | None => Family::Other,
        }
    }
}

/// Bounds of times: `1024 ns << i`, the last one about 17 s; beyond it is one more.
pub const BUCKETS: usize = 26;

/// The upper bound of a bucket in nanoseconds; `None` of the last one.
pub const fn bound_ns(bucket: usize) -> Option<u64> {
    if bucket + 1 < BUCKETS { Some(1024 << bucket) } else { None }
}

const fn bucket_of(ns: u64) -> usize {
    let above = (ns.saturating_sub(1) >> 10) as u32;
    let bucket = (u32::BITS - above.leading_zeros()) as usize;
    if ns > 1 << 41 || bucket >= BUCKETS { BUCKETS - 1 } else { bucket }
}

/// How often something took how long.
#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

/// Errnos that have a number of their own; the rest is counted at 0.
const ERRNOS: usize = 134;

/// What one shard counts of one share.
#[derive(Debug)]
#[repr(align(128))]
pub struct ShareShard {
    times: [Histogram; Family::ALL.len()],
    errors: [AtomicU64; ERRNOS],
    /// Payload bytes of READ replies.
    pub bytes_read: AtomicU64,
    /// Payload bytes that WRITEs stored.
    pub bytes_written: AtomicU64,
    slow: AtomicU64,
}

impl Default for ShareShard {
    fn default() -> ShareShard {
        ShareShard {
            times: Default::default(),
            errors: std::array::from_fn(|_| AtomicU64::new(0)),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            slow: AtomicU64::new(0),
        }
    }
}

impl ShareShard {
    /// A request is over.
    pub fn record(&self, opcode: u32, took: Duration, errno: u32) {
        let times = &self.times[Family::of(opcode) as usize];
        let ns = took.as_nanos() as u64;
        add(&times.buckets[bucket_of(ns)], 1);
        add(&times.sum_ns, ns as usize);
        if errno != 0 {
            let errno = errno as usize;
            add(&self.errors[if errno < ERRNOS { errno } else { 0 }], 1);
        }
    }

    /// It was a slow one.
    pub fn record_slow(&self) {
        add(&self.slow, 1);
    }
}

/// One share, by its name: reloads and new sessions go on counting.
#[derive(Debug)]
pub struct ShareMetrics {
    name: String,
    /// By the shards' order.
    pub shards: Box<[ShareShard]>,
}

/// Sums over the shards.
#[derive(Clone, Debug, Default)]
pub struct ShareTotals {
    /// By [`Family`].
    pub operations: Vec<OperationStatus>,
    /// Errno and how often, those that came.
    pub errors: Vec<(u32, u64)>,
    /// Payload bytes of READ replies.
    pub bytes_read: u64,
    /// Payload bytes that WRITEs stored.
    pub bytes_written: u64,
    /// Slow requests.
    pub slow: u64,
}

impl ShareMetrics {
    fn new(name: &str, shards: usize) -> ShareMetrics {
        let shards = (0..shards.max(1)).map(|_| ShareShard::default()).collect();
        ShareMetrics { name: name.to_owned(), shards }
    }

    /// The sums now.
    pub fn totals(&self) -> ShareTotals {
        let sum = |pick: &dyn Fn(&ShareShard) -> u64| self.shards.iter().map(pick).sum::<u64>();
        let operations = Family::ALL.iter().enumerate().map(|(family, of)| OperationStatus {
            name: of.name().into(),
            sum_ns: sum(&|shard| shard.times[family].sum_ns.load(Relaxed)),
            buckets: (0..BUCKETS)
                .map(|bucket| sum(&|shard| shard.times[family].buckets[bucket].load(Relaxed)))
                .collect(),
        });
        let errors = (0..ERRNOS)
            .map(|errno| (errno as u32, sum(&|shard| shard.errors[errno].load(Relaxed))));
        ShareTotals {
            operations: operations.collect(),
            errors: errors.filter(|(_, times)| *times > 0).collect(),
            bytes_read: sum(&|shard| shard.bytes_read.load(Relaxed)),
            bytes_written: sum(&|shard| shard.bytes_written.load(Relaxed)),
            slow: sum(&|shard| shard.slow.load(Relaxed)),
        }
    }
}

/// Requests that took long, the newest last.
const SLOW_KEPT: usize = 32;

/// What is counted of all shares, and what is slow.
#[derive(Debug, Default)]
pub struct Metrics {
    shares: Mutex<Vec<Arc<ShareMetrics>>>,
    slow_ns: AtomicU64,
    recent: Mutex<VecDeque<SlowOp>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Metrics {
    /// Of a share: what there is, or a new one.
    pub fn of(&self, name: &str, shards: usize) -> Arc<ShareMetrics> {
        let mut shares = lock(&self.shares);
        if let Some(known) = shares.iter().find(|share| share.name == name) {
            return known.clone();
        }
        let share = Arc::new(ShareMetrics::new(name, shards));
        shares.push(share.clone());
        share
    }

    /// What was counted of a share, if anything.
    pub fn totals(&self, name: &str) -> Option<ShareTotals> {
        let share = lock(&self.shares).iter().find(|share| share.name == name).cloned();
        share.map(|share| share.totals())
    }

    /// Forgets shares that nobody has mounted, but those that are to be `kept`.
    pub fn sweep(&self, kept: impl Fn(&str) -> bool) {
        lock(&self.shares).retain(|share| Arc::strong_count(share) > 1 || kept(&share.name));
    }

    /// From which time on a request is slow; 0: none is.
    pub fn set_slow(&self, from: Duration) {
        self.slow_ns.store(from.as_nanos() as u64, Relaxed);
    }

    /// Whether a request that took so long is slow.
    pub fn is_slow(&self, took: Duration) -> bool {
        let from = self.slow_ns.load(Relaxed);
        from != 0 && took.as_nanos() as u64 >= from
    }

    /// A slow request: into the log, and to be told.
    pub fn slow(&self, op: SlowOp) {
        let SlowOp {
            share, session, op: name, opcode, node, path, took_us, waited_us, place, ..
        } = &op;
        let path = path.as_deref().unwrap_or_default();
        tracing::warn!(
            share,
            session,
            op = name,
            opcode,
            node,
            path,
            took_us,
            waited_us,
            place,
            "slow operation"
        );
        let mut recent = lock(&self.recent);
        if recent.len() >= SLOW_KEPT {
            recent.pop_front();
        }
        recent.push_back(op);
    }

    /// The newest ones.
    pub fn recent_slow(&self) -> Vec<SlowOp> {
        lock(&self.recent).iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fall_into_their_buckets() {
        let check = |ns: u64, bucket: usize| {
            assert_eq!(bucket_of(ns), bucket, "{ns}");
            assert!(bound_ns(bucket).is_none_or(|bound| ns <= bound), "{ns}");
            assert!(bucket == 0 || bound_ns(bucket - 1).is_some_and(|bound| ns > bound), "{ns}");
        };
        check(0, 0);
        check(1024, 0);
        check(1025, 1);
        check(2048, 1);
        check(2049, 2);
        check(1_000_000, 10);
        check(1024 << 24, 24);
        check((1024 << 24) + 1, 25);
        check(u64::MAX, 25);
    }

    #[test]
    fn shares_are_counted_on_over_reloads_and_forgotten_when_unused() {
        let metrics = Metrics::default();
        let share = metrics.of("a", 2);
        share.shards[0].record(Opcode::Read as u32, Duration::from_micros(3), 0);
        share.shards[1].record(Opcode::Read as u32, Duration::from_micros(5), 5);
        share.shards[1].record(9999, Duration::ZERO, 5000);
        assert!(Arc::ptr_eq(&share, &metrics.of("a", 2)));
        let totals = metrics.totals("a").expect("a");
        let read = &totals.operations[Family::Read as usize];
        assert_eq!((read.count(), read.sum_ns), (2, 8000));
        assert_eq!(totals.errors, [(0, 1), (5, 1)]);
        metrics.sweep(|_| false);
        assert!(metrics.totals("a").is_some(), "somebody has it");
        drop(share);
        metrics.sweep(|name| name == "a");
        assert!(metrics.totals("a").is_some(), "it is kept");
        metrics.sweep(|_| false);
        assert!(metrics.totals("a").is_none());
    }
}
