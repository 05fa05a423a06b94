//! Limits of a share and of each of its sessions, and who has used how much.
//!
//! Rates delay, and never refuse: each request has a moment from which on it may run, and a shard
//! reads its connection no further until then (shard.rs). A rate is one number, the moment at
//! which all that was let through so far is paid for; whoever comes adds to it. So those who wait
//! have their turns in the order in which they came, one request of each connection at a time.
//! What cannot be delayed without end is refused: files beyond a bound are ENFILE.
//!
//! A share's limits can change while it is served: all numbers are read where they are used. Where
//! nothing is limited a request costs one load ([`Quota::is_limited`]).

use crate::status::LimitStatus;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Who was idle may have so much of a rate at once.
const BURST: Duration = Duration::from_millis(100);
/// What a connection may always have in flight: one of the largest replies.
const IN_FLIGHT_MIN: u64 = 64 << 10;

/// What a share and its sessions may have. Nothing said: no limit but the daemon's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Limits {
    /// Requests a second of each session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<Amount>,
    /// Bytes a second that each session reads and writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Amount>,
    /// Bytes of replies that each session may have in flight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<Amount>,
    /// Files and directories that each session may hold open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_files: Option<Amount>,
    /// Inodes that each session may know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<Amount>,
    /// As `ops`, of all sessions of the share together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_ops: Option<Amount>,
    /// As `bytes`, of all sessions of the share together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<Amount>,
    /// As `open_files`, of all sessions of the share together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_open_files: Option<Amount>,
}

/// A number above 0, such as `5000`, or with K, M or G behind it: times 1024, 1024² or 1024³.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "u64")]
pub struct Amount(u64);

/// As it may stand in a file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(u64),
    Text(String),
}

impl TryFrom<Written> for Amount {
    type Error = String;

    fn try_from(written: Written) -> Result<Amount, String> {
        match written {
            Written::Number(number) => number.to_string().parse(),
            Written::Text(text) => text.parse(),
        }
    }
}

impl From<Amount> for u64 {
    fn from(amount: Amount) -> u64 {
        amount.0
    }
}

impl std::str::FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Amount, String> {
        let (digits, shift) = match text.as_bytes().last() {
            Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
            Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
            Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
            _ => (text, 0),
        };
        let number = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
        let good = number.filter(|&n| n > 0 && n <= 1 << 48).map(Amount);
        good.ok_or(format!("{text:?} is no limit: a number above 0, such as 5000, 64K, 100M or 2G"))
    }
}

impl Limits {
    /// One limit as an option of a share says it; `None` for a name that is none.
    pub fn say(&mut self, name: &str, value: &str) -> Option<Result<(), String>> {
        let place = match name {
            "ops" => &mut self.ops,
            "bytes" => &mut self.bytes,
            "in-flight" => &mut self.in_flight,
            "open-files" => &mut self.open_files,
            "nodes" => &mut self.nodes,
            "total-ops" => &mut self.total_ops,
            "total-bytes" => &mut self.total_bytes,
            "total-open-files" => &mut self.total_open_files,
            _ => return None,
        };
        Some(value.parse().map(|amount| *place = Some(amount)))
    }

    /// Nothing is said.
    pub fn is_none(&self) -> bool {
        *self == Limits::default()
    }

    /// These, and where they say nothing, the others.
    #[must_use]
    pub fn or(self, others: Limits) -> Limits {
        Limits {
            ops: self.ops.or(others.ops),
            bytes: self.bytes.or(others.bytes),
            in_flight: self.in_flight.or(others.in_flight),
            open_files: self.open_files.or(others.open_files),
            nodes: self.nodes.or(others.nodes),
            total_ops: self.total_ops.or(others.total_ops),
            total_bytes: self.total_bytes.or(others.total_bytes),
            total_open_files: self.total_open_files.or(others.total_open_files),
        }
    }
}

/// Each limit, by its place in what is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ops,
    Bytes,
    TotalOps,
    TotalBytes,
    InFlight,
    OpenFiles,
    Nodes,
    TotalOpenFiles,
}

impl Kind {
    const ALL: [Kind; 8] = [
        Kind::Ops,
        Kind::Bytes,
        Kind::TotalOps,
        Kind::TotalBytes,
        Kind::InFlight,
        Kind::OpenFiles,
        Kind::Nodes,
        Kind::TotalOpenFiles,
    ];

    /// As it is configured.
    const fn name(self) -> &'static str {
        match self {
            Kind::Ops => "ops",
            Kind::Bytes => "bytes",
            Kind::TotalOps => "total-ops",
            Kind::TotalBytes => "total-bytes",
            Kind::InFlight => "in-flight",
            Kind::OpenFiles => "open-files",
            Kind::Nodes => "nodes",
            Kind::TotalOpenFiles => "total-open-files",
        }
    }
}

/// What one limit did.
#[derive(Debug, Default)]
struct Account {
    delayed: AtomicU64,
    delayed_us: AtomicU64,
    refused: AtomicU64,
}

/// A number a second. 0: as many as there are.
#[derive(Debug, Default)]
struct Rate(AtomicU64);

/// When all that was let through is paid for, in nanoseconds of this process.
#[derive(Debug, Default)]
struct Paid(AtomicU64);

impl Paid {
    /// From when on something that costs so much may run.
    fn take(&self, rate: &Rate, cost: u64, now: u64) -> u64 {
        let rate = rate.0.load(Relaxed);
        if rate == 0 || cost == 0 {
            return now;
        }
        let nanos = (u128::from(cost) * 1_000_000_000 / u128::from(rate)) as u64;
        let earliest = now.saturating_sub(BURST.as_nanos() as u64);
        let after = |paid: u64| Some(paid.max(earliest).saturating_add(nanos));
        let before = self.0.fetch_update(Relaxed, Relaxed, after).unwrap_or_default();
        before.max(earliest)
    }

    /// Until when nothing more is let through.
    fn until(&self, rate: &Rate) -> u64 {
        if rate.0.load(Relaxed) == 0 { 0 } else { self.0.load(Relaxed) }
    }
}

/// Nanoseconds since this process first asked.
pub(crate) fn now_ns() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    // So that a burst lies after the start.
    BURST.as_nanos() as u64 + START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// Of one share: what is allowed, and what all its sessions have used together.
#[derive(Debug, Default)]
pub struct ShareQuota {
    limited: AtomicBool,
    ops: Rate,
    bytes: Rate,
    total_ops: Rate,
    total_bytes: Rate,
    in_flight: AtomicU64,
    open_files: AtomicUsize,
    nodes: AtomicUsize,
    total_open_files: AtomicUsize,
    paid_ops: Paid,
    paid_bytes: Paid,
    /// How often the limits have changed: what was owed under others is forgiven.
    changes: AtomicU64,
    open: AtomicUsize,
    accounts: [Account; Kind::ALL.len()],
}

impl ShareQuota {
    /// With these limits.
    pub fn new(limits: &Limits) -> Arc<ShareQuota> {
        let quota = Arc::new(ShareQuota::default());
        quota.set(limits);
        quota
    }

    /// From now on what another one says holds here, for sessions that are open too.
    pub fn follow(&self, new: &ShareQuota) {
        let rates = [
            (&self.ops, &new.ops),
            (&self.bytes, &new.bytes),
            (&self.total_ops, &new.total_ops),
            (&self.total_bytes, &new.total_bytes),
        ];
        rates.iter().for_each(|(old, new)| old.0.store(new.0.load(Relaxed), Relaxed));
        let counts = [
            (&self.open_files, &new.open_files),
            (&self.nodes, &new.nodes),
            (&self.total_open_files, &new.total_open_files),
        ];
        counts.iter().for_each(|(old, new)| old.store(new.load(Relaxed), Relaxed));
        self.in_flight.store(new.in_flight.load(Relaxed), Relaxed);
        self.limited.store(new.limited.load(Relaxed), Relaxed);
        self.paid_ops.0.store(0, Relaxed);
        self.paid_bytes.0.store(0, Relaxed);
        self.changes.fetch_add(1, Relaxed);
    }

    /// What each limit is and did; those that are neither set nor were ever met are left out.
    pub fn status(&self) -> Vec<LimitStatus> {
        let amount = |kind: Kind| match kind {
            Kind::Ops => self.ops.0.load(Relaxed),
            Kind::Bytes => self.bytes.0.load(Relaxed),
            Kind::TotalOps => self.total_ops.0.load(Relaxed),
            Kind::TotalBytes => self.total_bytes.0.load(Relaxed),
            Kind::InFlight => self.in_flight.load(Relaxed),
            Kind::OpenFiles => self.open_files.load(Relaxed) as u64,
            Kind::Nodes => self.nodes.load(Relaxed) as u64,
            Kind::TotalOpenFiles => self.total_open_files.load(Relaxed) as u64,
        };
        let status = |kind: &Kind| LimitStatus {
            name: kind.name().into(),
            amount: amount(*kind),
            delayed: self.account(*kind).delayed.load(Relaxed),
            delayed_us: self.account(*kind).delayed_us.load(Relaxed),
            refused: self.account(*kind).refused.load(Relaxed),
        };
        let all = Kind::ALL.iter().map(status);
        all.filter(|one| one.amount + one.delayed + one.refused > 0).collect()
    }

    fn account(&self, kind: Kind) -> &Account {
        &self.accounts[kind as usize]
    }

    fn delayed(&self, kind: Kind, by: Duration) {
        self.account(kind).delayed.fetch_add(1, Relaxed);
        self.account(kind).delayed_us.fetch_add(by.as_micros() as u64, Relaxed);
    }

    /// Whether there is room within a bound; 0: there is none.
    fn is_within(&self, kind: Kind, used: usize, bound: &AtomicUsize) -> bool {
        let bound = bound.load(Relaxed);
        let is_within = bound == 0 || used < bound;
        self.account(kind).refused.fetch_add(u64::from(!is_within), Relaxed);
        is_within
    }

    /// These hold.
    fn set(&self, limits: &Limits) {
        let number = |amount: Option<Amount>| amount.map_or(0, u64::from);
        let count = |amount| usize::try_from(number(amount)).unwrap_or(usize::MAX);
        self.ops.0.store(number(limits.ops), Relaxed);
        self.bytes.0.store(number(limits.bytes), Relaxed);
        self.total_ops.0.store(number(limits.total_ops), Relaxed);
        self.total_bytes.0.store(number(limits.total_bytes), Relaxed);
        self.in_flight.store(number(limits.in_flight), Relaxed);
        self.open_files.store(count(limits.open_files), Relaxed);
        self.nodes.store(count(limits.nodes), Relaxed);
        self.total_open_files.store(count(limits.total_open_files), Relaxed);
        self.limited.store(!limits.is_none(), Relaxed);
    }
}

/// Of one session.
#[derive(Debug, Default)]
pub struct Quota {
    share: Arc<ShareQuota>,
    paid_ops: Paid,
    paid_bytes: Paid,
    /// The change of limits under which that was paid.
    change: AtomicU64,
}

impl Quota {
    /// Nothing used yet.
    pub fn new(share: &Arc<ShareQuota>) -> Quota {
        Quota { share: Arc::clone(share), ..Quota::default() }
    }

    /// Whether anything is limited at all.
    pub fn is_limited(&self) -> bool {
        self.share.limited.load(Relaxed)
    }

    /// Counts changes of the limits: how long a request has to wait holds under one alone.
    pub fn change(&self) -> u64 {
        let change = self.share.changes.load(Relaxed);
        if self.change.swap(change, Relaxed) != change {
            self.paid_ops.0.store(0, Relaxed);
            self.paid_bytes.0.store(0, Relaxed);
        }
        change
    }

    /// Lets one request through that moves so many bytes; how long it has to wait. It is paid for
    /// from now on.
    pub fn take(&self, bytes: u64) -> Duration {
        self.change();
        let (share, now) = (&*self.share, now_ns());
        let from = [
            (self.paid_ops.take(&share.ops, 1, now), Kind::Ops),
            (self.paid_bytes.take(&share.bytes, bytes, now), Kind::Bytes),
            (share.paid_ops.take(&share.total_ops, 1, now), Kind::TotalOps),
            (share.paid_bytes.take(&share.total_bytes, bytes, now), Kind::TotalBytes),
        ];
        let (from, kind) = from.into_iter().max_by_key(|(from, _)| *from).unwrap_or((0, Kind::Ops));
        let wait = Duration::from_nanos(from.saturating_sub(now));
        if !wait.is_zero() {
            share.delayed(kind, wait);
        }
        wait
    }

    /// A connection is read no further for its replies in flight.
    pub fn is_full(&self) {
        if self.share.in_flight.load(Relaxed) > 0 {
            self.share.delayed(Kind::InFlight, Duration::ZERO);
        }
    }

    /// How long nothing more of this session would run: what is large is not even received.
    pub fn in_debt_for(&self) -> Duration {
        self.change();
        let share = &*self.share;
        let until = [
            self.paid_ops.until(&share.ops),
            self.paid_bytes.until(&share.bytes),
            share.paid_ops.until(&share.total_ops),
            share.paid_bytes.until(&share.total_bytes),
        ];
        let until = until.into_iter().max().unwrap_or(0);
        Duration::from_nanos(until.saturating_sub(now_ns()))
    }

    /// Bytes of replies that one of so many connections may have in flight; `most` without a limit.
    pub fn in_flight(&self, conns: u16, most: usize) -> usize {
        match self.share.in_flight.load(Relaxed) {
            0 => most,
            all => ((all / u64::from(conns.max(1))).max(IN_FLIGHT_MIN) as usize).min(most),
        }
    }

    /// Whether a session that has so many files open may open another one; `most` without a limit.
    pub fn may_open(&self, open: usize, most: usize) -> bool {
        let share = &*self.share;
        share.is_within(Kind::OpenFiles, open, &share.open_files)
            && share.is_within(
                Kind::TotalOpenFiles,
                share.open.load(Relaxed),
                &share.total_open_files,
            )
            && open < most
    }

    /// How many inodes a session may know; `most` without a limit.
    pub fn nodes_max(&self, most: usize) -> usize {
        match self.share.nodes.load(Relaxed) {
            0 => most,
            nodes => nodes.min(most),
        }
    }

    /// Whether a session that knows so many inodes may learn of another one.
    pub fn may_know(&self, nodes: usize, most: usize) -> bool {
        self.share.is_within(Kind::Nodes, nodes, &self.share.nodes) && nodes < most
    }

    /// So many files were opened.
    pub fn opened(&self, count: usize) {
        self.share.open.fetch_add(count, Relaxed);
    }

    /// So many were closed.
    pub fn closed(&self, count: usize) {
        self.share.open.fetch_sub(count, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(words: &[(&str, &str)]) -> Limits {
        let mut limits = Limits::default();
        for (name, value) in words {
            limits.say(name, value).expect("a limit").expect("an amount");
        }
        limits
    }

    #[test]
    fn amounts() {
        let check = |text: &str, expected: Option<u64>| {
            assert_eq!(text.parse::<Amount>().ok().map(u64::from), expected, "{text:?}");
        };
        check("5000", Some(5000));
        check("64K", Some(64 << 10));
        check("100M", Some(100 << 20));
        check("2g", Some(2 << 30));
        for bad in ["", "0", "K", "-1", "1.5M", "1T", "99999999999G", "18446744073709551616"] {
            check(bad, None);
        }
        let toml: Limits = toml::from_str("ops = 5000\nbytes = '100M'\n").expect("limits");
        assert_eq!(toml, limits(&[("ops", "5000"), ("bytes", "100M")]));
        assert_eq!(toml::from_str(&toml::to_string(&toml).expect("text")), Ok(toml));
        assert!(toml::from_str::<Limits>("ops = 0").is_err());
        assert!(toml::from_str::<Limits>("opps = 1").is_err());
        assert!(Limits::default().say("cpus", "1").is_none());
    }

    #[test]
    fn a_rate_lets_a_burst_through_and_then_its_number() {
        let (paid, rate) = (Paid::default(), Rate(AtomicU64::new(1000)));
        let now = 5_000_000_000;
        let starts: Vec<u64> = (0..300).map(|_| paid.take(&rate, 1, now)).collect();
        let at_once = starts.iter().filter(|&&start| start <= now).count();
        // A tenth of a second's number, and the one that is due now.
        assert_eq!(at_once, 101);
        assert_eq!(starts[299] - starts[200], 99_000_000);
        assert_eq!(paid.until(&rate), starts[299] + 1_000_000);
        // Who waits long has no more at once.
        let later = now + 60_000_000_000;
        let starts = (0..300).map(|_| paid.take(&rate, 1, later));
        assert_eq!(starts.filter(|&start| start <= later).count(), 101);
        assert_eq!(paid.take(&Rate::default(), 1, now), now, "no rate");
    }

    #[test]
    fn sessions_of_a_share_pay_for_themselves_and_together() {
        let share = ShareQuota::new(&limits(&[("ops", "1"), ("total-ops", "1000")]));
        let (one, two) = (Quota::new(&share), Quota::new(&share));
        assert!(one.is_limited());
        assert!(one.take(0).is_zero());
        assert!(one.take(0) > Duration::from_millis(500));
        assert!(two.take(0).is_zero(), "the other's own");
        assert!(one.in_debt_for() > two.in_debt_for());
        let status = share.status();
        assert_eq!((&*status[0].name, status[0].amount, status[0].refused), ("ops", 1, 0));
        assert!(status[0].delayed >= 1 && status[0].delayed_us > 500_000, "{status:?}");
        assert_eq!((&*status[1].name, status[1].delayed, status.len()), ("total-ops", 0, 2));
        share.set(&Limits::default());
        assert!(!one.is_limited() && one.take(0).is_zero() && one.in_debt_for().is_zero());
        share.set(&limits(&[("total-bytes", "1M")]));
        assert_eq!((0..8).filter(|_| !one.take(1 << 20).is_zero()).count(), 7);
        assert!(two.take(1) > Duration::from_secs(5), "they share it");
    }

    #[test]
    fn files_and_nodes_are_counted_by_session_and_share() {
        let words = [("open-files", "2"), ("total-open-files", "3"), ("nodes", "5")];
        let share = ShareQuota::new(&limits(&words));
        let (one, two) = (Quota::new(&share), Quota::new(&share));
        one.opened(2);
        assert!(!one.may_open(2, 100) && two.may_open(0, 100));
        two.opened(1);
        assert!(!two.may_open(1, 100), "three of three");
        one.closed(1);
        assert!(two.may_open(1, 100) && !two.may_open(1, 1));
        assert!(one.may_know(4, 100) && !one.may_know(5, 100) && !one.may_know(4, 4));
        let refused = share.status().into_iter().map(|one| (one.name, one.refused));
        let expected = [("open-files", 1), ("nodes", 1), ("total-open-files", 1)];
        assert!(refused.eq(expected.map(|(name, n)| (name.to_owned(), n))));
        assert_eq!(one.in_flight(4, 8 << 20), 8 << 20);
        share.set(&limits(&[("in-flight", "4M")]));
        assert_eq!((one.in_flight(4, 8 << 20), one.in_flight(1, 1 << 20)), (1 << 20, 1 << 20));
    }
}
