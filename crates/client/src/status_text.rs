//! The text of `ringfs status`.
//!
//! Invariant: a line tells one thing, and what is wrong tells what to do. It must not ask anybody.

use crate::status::{Entry, Facts, Granted, Report, Rings};
use std::fmt::Write as _;

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
    let state_age = duration(now_s.saturating_sub(report.state_since_unix_s));
    let word = |on: bool, word: &'static str| if on { word } else { "" };
    let _ = writeln!(
        text,
        "  pid {}, mounted for {age}, cache {}{}{}{}",
        facts.pid,
        facts.cache,
        word(facts.read_only, ", read-only"),
        word(facts.writeback, ", writeback"),
        word(facts.checksum, ", payload checksums")
    );
    let last_cut = match &report.last_cut {
        Some(why) => format!(", the last one: {why}"),
        None => String::new(),
    };
    let _ = writeln!(
        text,
        "  {} for {state_age}; cuts {}, resumes {}{last_cut}",
        if report.resuming { "RESUMING, requests wait," } else { "connected" },
        report.cuts,
        report.resumes
    );
    if report.rebuilds > 0 {
        let _ = writeln!(
            text,
            "  rebuilds {}, the last one of {} nodes ({} lost) and {} open files ({} in {} ms)",
            report.rebuilds,
            report.nodes_restored,
            report.nodes_lost,
            report.handles_restored,
            bytes(report.rebuild_bytes),
            report.rebuild_us / 1000
        );
    }
    let _ = match &facts.alone_why {
        None => writeln!(
            text,
            "  taken over {} times, and would be again{}",
            facts.takeovers,
            word(facts.is_stored, ", by the service manager if all its processes die")
        ),
        Some(why) => writeln!(text, "  if its client dies it is unmounted: {why}"),
    };
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
        "  requests {} ({} in flight, {} parked, {} abandoned), batches {}, {} up, {} down",
        report.requests,
        report.in_flight,
        report.parked,
        report.abandoned,
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
        Report {
            facts,
            requests: 12,
            in_flight: 3,
            bytes_up: 2048,
            resuming: true,
            state_since_unix_s: 40,
            cuts: 2,
            resumes: 1,
            last_cut: Some("reset".into()),
            rebuilds: 1,
            nodes_restored: 5,
            handles_restored: 2,
            rebuild_bytes: 4096,
            rebuild_us: 3500,
            ..Report::default()
        }
    }

    #[test]
    fn texts() {
        let source = "d@unix:/s".to_owned();
        let entry = |client| Entry {
            mountpoint: "/m".into(),
            source: source.clone(),
            client,
            socket: None,
            is_read_only: false,
            dev_minor: 0,
        };
        let text = render(&[entry(Some(report())), entry(None)], 61);
        for expected in [
            "d@unix:/s on /m",
            "lanes 1 of 4 (no clones), slots a lane 0, spin 0",
            "mounted for 1 min",
            "RESUMING, requests wait, for 21 s; cuts 2, resumes 1, the last one: reset",
            "rebuilds 1, the last one of 5 nodes (0 lost) and 2 open files (4.0 KiB in 3 ms)",
            "requests 12 (3 in flight, 0 parked, 0 abandoned)",
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
