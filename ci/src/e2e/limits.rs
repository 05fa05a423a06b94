//! Limits of a share as a guest's programs meet them.

use std::fs::{self, File};

use anyhow::{Result, ensure};

use super::{Case, Rig};
use crate::guard;
use crate::rig::{self, Daemon, SETTLE};

pub const CASES: &[Case] = &[("nodes_are_given_back_before_there_are_too_many", given_back)];

const NODES: u64 = 1000;
const DIRS: u64 = 10;
const FILES: u64 = 250;

/// Whether the kernel forgets nodes when it is asked to (`FUSE_NOTIFY_PRUNE`, Linux 6.18).
fn can_prune() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 18)
}

/// A walk through more files than the guest may know, a directory at a time.
fn given_back(rig: &Rig) -> Result<()> {
    for dir in 0..DIRS {
        fs::create_dir(rig.backing.join(format!("d{dir}")))?;
        for file in 0..FILES {
            File::create(rig.backing.join(format!("d{dir}/{file}")))?;
        }
    }
    let shares = [format!("{},nodes={NODES}", rig::share("own", &rig.backing))];
    let daemon = Daemon::start(&rig.sandbox, &rig.bins, "own", &shares, &[])?;
    // Names and attributes are kept: nothing is forgotten by itself.
    let mount = daemon.mount(&rig.sandbox, "own", "own", "cache=always")?;
    // In use all the time, so it stays.
    let held = File::open(mount.dir.join("d0/0"))?;
    let mut seen = 0;
    for dir in 0..DIRS {
        for file in 0..FILES {
            match fs::symlink_metadata(mount.dir.join(format!("d{dir}/{file}"))) {
                Ok(_) => seen += 1,
                Err(error) => ensure!(!can_prune(), "{dir}/{file}: {error}"),
            }
        }
        let has_room = || Ok(daemon.counters()?.nodes < NODES - FILES);
        let made = guard::poll_until(if can_prune() { SETTLE } else { SETTLE / 100 }, has_room)?;
        ensure!(made || !can_prune(), "{} nodes after {seen} files", daemon.counters()?.nodes);
    }
    ensure!(seen == DIRS * FILES || !can_prune(), "{seen} files");
    ensure!(held.metadata()?.len() == 0);
    drop(held);
    let limited = daemon.limited()?;
    ensure!((limited.refused == 0) == can_prune(), "{limited}");
    mount.umount()?;
    daemon.stop()
}
