//! `ringfsd top`: what happened between two looks at a daemon.

use crate::metrics::bound_ns;
use crate::status::{OperationStatus, ShareStatus, Status, bytes, span, table};
use std::fmt::Write;
use std::time::Duration;

/// One screen: of each share what was done in a second, how long it took, and by what kind.
pub fn screen(before: &Status, now: &Status, apart: Duration, width: Option<usize>) -> String {
    let mut out = String::new();
    let (pid, up, sessions) = (now.pid, span(now.up_s), now.sessions.len());
    let busy: u64 = now.sessions.iter().map(|session| session.in_flight).sum();
    let Status { fds, fds_max, .. } = now;
    let _ = writeln!(
        out,
        "ringfsd {pid}, up {up}: {sessions} sessions, {busy} busy, {fds} of {fds_max} files open"
    );
    let head = ["SHARE", "SESSIONS", "OP/S", "MEAN", "P50", "P99", "READ/S", "WRITTEN/S", "ERR/S"];
    let mut rows = Vec::new();
    for share in &now.shares {
        let old = before.shares.iter().find(|old| old.name == share.name);
        rows.extend(of_share(old.unwrap_or(&ShareStatus::default()), share, apart));
    }
    table(&mut out, &head, rows.into_iter(), width);
    out
}

/// As many lines as a terminal has, and how many are left out.
pub fn first_lines(screen: &str, most: usize) -> String {
    let lines: Vec<&str> = screen.lines().collect();
    if lines.len() <= most {
        return screen.to_owned();
    }
    let shown = most.saturating_sub(1);
    let left = lines.len() - shown;
    format!("{}\n... {left} more lines (--once shows all)", lines[..shown].join("\n"))
}

fn of_share(old: &ShareStatus, new: &ShareStatus, apart: Duration) -> Vec<Vec<String>> {
    let mut kinds = Vec::new();
    let mut all = OperationStatus::default();
    for operation in &new.operations {
        let before = old.operations.iter().find(|one| one.name == operation.name);
        let done = since(before, operation);
        all.sum_ns += done.sum_ns;
        all.buckets.resize(done.buckets.len().max(all.buckets.len()), 0);
        all.buckets.iter_mut().zip(&done.buckets).for_each(|(all, one)| *all += one);
        if done.count() > 0 {
            kinds.push(done);
        }
    }
    kinds.sort_by_key(|kind| std::cmp::Reverse(kind.count()));
    let rate = |n: u64, old: u64| (n.saturating_sub(old) as f64 / apart.as_secs_f64()) as u64;
    let mut first = vec![new.name.clone(), new.sessions.to_string()];
    first.extend(times(&all, apart));
    first.extend([
        bytes(rate(new.bytes_read, old.bytes_read)),
        bytes(rate(new.bytes_written, old.bytes_written)),
        rate(new.errors, old.errors).to_string(),
    ]);
    let mut rows = vec![first];
    for kind in kinds {
        let mut row = vec![format!("  {}", kind.name), String::new()];
        row.extend(times(&kind, apart));
        row.resize(rows[0].len(), String::new());
        rows.push(row);
    }
    rows
}

fn since(before: Option<&OperationStatus>, now: &OperationStatus) -> OperationStatus {
    let Some(before) = before else { return now.clone() };
    let mut done = now.clone();
    done.sum_ns = done.sum_ns.saturating_sub(before.sum_ns);
    for (count, old) in done.buckets.iter_mut().zip(&before.buckets) {
        *count = count.saturating_sub(*old);
    }
    done
}

/// Rate, mean, and the bounds below which a half and 99 of 100 lie.
fn times(done: &OperationStatus, apart: Duration) -> [String; 4] {
    let count = done.count();
    let rate = (count as f64 / apart.as_secs_f64()).round();
    match done.sum_ns.checked_div(count) {
        None => [format!("{rate}"), "-".into(), "-".into(), "-".into()],
        Some(mean) => [format!("{rate}"), time(mean), below(done, 50), below(done, 99)],
    }
}

fn below(done: &OperationStatus, percent: u64) -> String {
    let wanted = (done.count() * percent).div_ceil(100);
    let mut sum = 0;
    let reached = done.buckets.iter().position(|count| {
        sum += count;
        sum >= wanted
    });
    match reached.map(bound_ns) {
        Some(Some(ns)) => format!("<{}", time(ns)),
        Some(None) | None => "longer".into(),
    }
}

fn time(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{}.{}us", ns / 1000, ns / 100 % 10),
        10_000..10_000_000 => format!("{}us", ns / 1000),
        10_000_000..10_000_000_000 => format!("{}ms", ns / 1_000_000),
        _ => format!("{}s", ns / 1_000_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_done_meanwhile_is_shown() {
        let read = |counts: [u64; 3], sum_ns| OperationStatus {
            name: "read".into(),
            sum_ns,
            buckets: counts.into(),
        };
        let at = |operations, bytes_read| Status {
            shares: vec![ShareStatus {
                name: "src".into(),
                sessions: 2,
                bytes_read,
                operations,
                ..Default::default()
            }],
            ..Default::default()
        };
        let idle = OperationStatus { name: "write".into(), sum_ns: 5, buckets: vec![3, 0, 0] };
        let before = at(vec![read([5, 5, 0], 9_000), idle.clone()], 1 << 20);
        let now = at(vec![read([5, 103, 2], 209_000), idle], 41 << 20);
        let text = screen(&before, &now, Duration::from_secs(2), None);
        let lines: Vec<&str> = text.lines().skip(2).collect();
        let expected = [
            "SHARE   SESSIONS  OP/S   MEAN     P50     P99  READ/S  WRITTEN/S  ERR/S",
            "src            2    50  2.0us  <2.0us  <4.0us   20MiB         0B      0",
            "  read              50  2.0us  <2.0us  <4.0us",
        ];
        assert_eq!(lines, expected, "{text}");
        let text = screen(&now, &now, Duration::from_secs(1), None);
        let last = "src           2     0     -    -    -      0B         0B      0\n";
        assert!(text.ends_with(last), "{text}");
        assert_eq!(first_lines(&text, 4), text);
        let short = first_lines("1\n2\n3\n4\n5\n", 3);
        assert_eq!(short, "1\n2\n... 3 more lines (--once shows all)");
    }
}
