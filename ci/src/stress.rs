//! `cargo xtask stress`: stress-ng's file-system stressors on mounts, with --verify.
//!
//! Invariant: after the guests have gone, sessions, nodes, handles, fds, slots and buffers of the
//! daemon are back at the start, by its own counters.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};

use crate::deps;
use crate::paths::Bins;
use crate::proc::Cmd;
use crate::rig::{self, Daemon};
use crate::sandbox::{LoopFs, LoopShape, Sandbox};

const IMAGE_BYTES: u64 = 4 << 30;

/// Stressors with the bounds that keep them within the image and give each its turn.
const STRESSORS: &[&str] = &[
    "--hdd 1 --hdd-bytes 32m --hdd-opts wr-rnd,rd-rnd,fsync",
    "--dentry 1 --dentries 512",
    "--dir 1 --dir-dirs 512",
    "--dirdeep 1 --dirdeep-inodes 1000",
    "--link 1",
    "--symlink 1",
    "--rename 1",
    "--fallocate 1 --fallocate-bytes 32m",
    "--fpunch 1",
    "--copy-file 1 --copy-file-bytes 128m",
    "--xattr 1",
    "--chmod 1",
    "--utime 1",
    "--seek 1 --seek-size 16m",
    "--getdent 1",
    "--fstat 1",
];

/// What `cargo xtask stress` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// How long each guest is stressed, in seconds
    #[arg(long, default_value_t = 30)]
    pub seconds: u32,
    /// Guests (mounts) at once
    #[arg(long, default_value_t = 2)]
    pub guests: u32,
    /// Run on the bare directory instead, to see what stress-ng itself says
    #[arg(long)]
    bare: bool,
}

impl Args {
    /// Short enough for CI.
    pub fn short() -> Self {
        Self { seconds: 10, guests: 2, bare: false }
    }
}

/// Stresses one guest, then several at once; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    deps::all()?;
    let sandbox = Sandbox::new()?;
    let backing = LoopFs::new(&sandbox, "backing", LoopShape::ext4(IMAGE_BYTES))?;
    if args.bare {
        stress(&backing.dir, args.seconds)?;
        return Ok(format!("{} s on the bare directory", args.seconds));
    }
    let bins = Bins::build()?;
    let daemon = Daemon::start(&sandbox, &bins, "d", &[rig::share("s", &backing.dir)], &[])?;
    let start = daemon.counters_at_rest()?;
    let mut rounds = vec![1, args.guests.max(1)];
    rounds.dedup();
    for guests in &rounds {
        let mounts = (0..*guests)
            .map(|n| daemon.mount(&sandbox, "s", &format!("mnt{guests}-{n}"), "allow_other"))
            .collect::<Result<Vec<_>>>()?;
        thread::scope(|scope| {
            let runs: Vec<_> = mounts
                .iter()
                .map(|mount| scope.spawn(|| stress(&mount.dir, args.seconds)))
                .collect();
            let joined = runs.into_iter().map(|run| run.join().map_err(|_| anyhow!("panicked"))?);
            joined.collect::<Result<Vec<()>>>()
        })?;
        for mount in mounts {
            mount.umount()?;
        }
        daemon.assert_back_at(&start)?;
        println!("stress: {guests} guests for {} s: counters are back", args.seconds);
    }
    let served: u64 = daemon.counters()?.ops.values().sum();
    daemon.stop()?;
    Ok(format!(
        "{} s with {rounds:?} guests, {served} operations served, nothing left",
        args.seconds
    ))
}

fn stress(dir: &Path, seconds: u32) -> Result<()> {
    let stress = Cmd::new("stress-ng").args(STRESSORS.iter().flat_map(|s| s.split(' ')));
    let stress = stress.args(["--verify", "--metrics-brief", "--timeout"]).arg(seconds.to_string());
    // A hung file system shows as this limit.
    let limit = Duration::from_secs(u64::from(seconds) * 3 + 120);
    let text = stress.arg("--temp-path").arg(dir).limit(limit).run()?;
    // Failures of verification are also in the exit status; a stressor that could not run is not.
    let skipped: Vec<&str> = text.lines().filter(|line| line.contains("skipped:")).collect();
    ensure!(skipped.iter().all(|line| line.contains("skipped: 0")), "{skipped:?}");
    if let Some(line) = text.lines().rfind(|line| line.contains("run completed")) {
        println!("stress: {line}");
    }
    Ok(())
}
