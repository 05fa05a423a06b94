//! What a server holds and uses while nothing is asked of it, and for what it must remember.

use super::{Metric, Scale, forget_names};
use crate::contender::Kind;
use crate::proc::{Snapshot, memory};
use crate::site::{Daemon, Place, Site};
use anyhow::{Result, ensure};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;

/// Names looked up before memory is looked at, so that what grows once has grown.
const WARM: usize = 2000;
/// Of the names, so few that a server holds a file for each.
const FEW: usize = 5000;

/// CPU and wake-ups a second of a mount that nobody uses.
pub fn idle(site: &Site, scale: &Scale) -> Result<Vec<Metric>> {
    let pids = site.pids();
    if pids.is_empty() {
        return Ok(Vec::new());
    }
    site.settle();
    let before = Snapshot::take(&pids);
    let time = scale.runtime * 2;
    thread::sleep(time);
    let usage = Snapshot::take(&pids).since(&before);
    let seconds = time.as_secs_f64();
    Ok(vec![
        Metric { name: "cpu", unit: "us/s", value: usage.cpu.as_secs_f64() * 1e6 / seconds },
        Metric { name: "wakeups", unit: "/s", value: usage.wakeups as f64 / seconds },
    ])
}

/// A fresh server: its memory idle, a further session's, a known name's.
pub fn run(site: &Site, place: &Place<'_>, scale: &Scale) -> Result<Vec<Metric>> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    if site.spec.kind == Kind::Bare {
        return Ok(Vec::new());
    }
    let mut scale = *scale;
    if site.spec.kind != Kind::Ringfs {
        // It holds a descriptor for each.
        scale.nodes = scale.nodes.min(crate::files_limit() / 2);
    }
    let scale = &scale;
    let label = format!("footprint-{}", NEXT.fetch_add(1, Relaxed));
    let behind = place.backing.join(&label);
    fs::create_dir(&behind)?;
    for i in 0..WARM + scale.nodes {
        fs::File::create(behind.join(i.to_string()))?;
    }
    let place = Place { label: &label, backing: &behind, ..*place };
    let metrics = if site.spec.kind == Kind::Ringfs {
        of_ringfs(site, &place, scale)
    } else {
        let fresh = Site::start(&site.spec, &place)?;
        let idle = memory(&fresh.pids()).0;
        let mut metrics = vec![mib("rss-idle", idle)];
        metrics.extend(of_nodes(&fresh.pids(), fresh.path(), scale)?);
        Ok(metrics)
    };
    fs::remove_dir_all(&behind)?;
    forget_names()?;
    metrics
}

fn of_ringfs(site: &Site, place: &Place<'_>, scale: &Scale) -> Result<Vec<Metric>> {
    let daemon = Daemon::start(&site.spec, place, &[("bench", place.backing)])?;
    let pids = [daemon.server.pid()];
    let at = |i: usize| place.scratch.join(format!("{}-{i}", place.label));
    let (mount, client) = daemon.mount("bench", &at(0))?;
    fs::metadata(mount.at())?;
    let idle = memory(&pids).0;
    let mut metrics = vec![mib("rss-idle", idle), mib("rss-client", memory(&[client.pid()]).0)];
    let mut others = Vec::new();
    for i in 1..=scale.sessions {
        let other = daemon.mount("bench", &at(i))?;
        fs::metadata(other.0.at())?;
        others.push(other);
    }
    let more = memory(&pids).0.saturating_sub(idle) as f64 / scale.sessions as f64;
    metrics.push(Metric { name: "rss-session", unit: "KiB", value: more / 1024.0 });
    drop(others);
    metrics.extend(of_nodes(&pids, mount.at(), scale)?);
    Ok(metrics)
}

/// What a name costs that the guest's kernel holds on to: the first ones, and all on average.
fn of_nodes(pids: &[i32], at: &Path, scale: &Scale) -> Result<Vec<Metric>> {
    let look = |from: usize, count: usize| {
        (from..from + count).try_for_each(|i| fs::metadata(at.join(i.to_string())).map(drop))
    };
    look(0, WARM)?;
    let before = memory(pids);
    let few = FEW.min(scale.nodes);
    look(WARM, few)?;
    let first = memory(pids);
    look(WARM + few, scale.nodes - few)?;
    let now = memory(pids);
    ensure!(now.0 > 0, "the server has ended");
    let each = |now: u64, before: u64, count| now.saturating_sub(before) as f64 / count as f64;
    Ok(vec![
        Metric { name: "rss-node-few", unit: "B", value: each(first.0, before.0, few) },
        Metric { name: "rss-node", unit: "B", value: each(now.0, before.0, scale.nodes) },
        Metric { name: "fds-node", unit: "", value: each(now.1, before.1, scale.nodes) },
    ])
}

fn mib(name: &'static str, bytes: u64) -> Metric {
    Metric { name, unit: "MiB", value: bytes as f64 / f64::from(1 << 20) }
}
