//! `cargo xtask fsx`: the file system exerciser, all operations weighted in, in every cache mode.
//!
//! Invariant: fsx keeps the true content in memory and compares at every read; a run is repeatable
//! from its seed, which every message carries. Both ends are up for all runs, so that what one run
//! leaks is found when the daemon's counters are compared at the end.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::deps;
use crate::guard::{Guard, Undo};
use crate::paths::{self, Bins};
use crate::proc::Cmd;
use crate::rig::{self, Daemon};
use crate::sandbox::{LoopFs, LoopShape, Sandbox};

/// The switch of FUSE-over-io_uring.
const RINGS: &str = "/sys/module/fuse/parameters/enable_uring";

/// Cache modes to show: nothing cached, the default, and everything with delayed writes; and the
/// same by FUSE's rings.
const MODES: &[(&str, &str)] = &[
    ("never", "cache=never"),
    ("auto", "cache=auto"),
    ("always+writeback", "cache=always,writeback"),
    ("rings+never", "uring=on,cache=never"),
    ("rings+writeback", "uring=on,cache=always,writeback"),
];

const IMAGE_BYTES: u64 = 1 << 30;
/// 100,000 operations take a minute or two.
const RUN_LIMIT: Duration = Duration::from_secs(900);

/// All operations fsx knows; sizes cross pages, the 128 KiB of a FUSE read, and odd bytes.
const CONFIG: &str = "
flen = 1048576
[opsize]
max = 262144
min = 1
[weights]
close_open = 1
read = 10
write = 10
mapread = 5
mapwrite = 5
invalidate = 1
truncate = 3
fsync = 0.5
fdatasync = 0.5
posix_fallocate = 3
punch_hole = 3
sendfile = 3
posix_fadvise = 2
copy_file_range = 5
";

/// What `cargo xtask fsx` takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Seeds 1..=N are run in each cache mode
    #[arg(long, default_value_t = 1)]
    pub seeds: u64,
    /// Operations a seed
    #[arg(long, default_value_t = 5000)]
    pub ops: u64,
    /// Run on the bare directory instead, to see what fsx itself says
    #[arg(long)]
    bare: bool,
}

impl Args {
    /// Short enough for CI.
    pub fn short() -> Self {
        Self { seeds: 1, ops: 5000, bare: false }
    }
}

/// Runs all seeds in all modes; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    deps::all()?;
    let sandbox = Sandbox::new()?;
    let backing = LoopFs::new(&sandbox, "backing", LoopShape::ext4(IMAGE_BYTES))?;
    if args.bare {
        for seed in 1..=args.seeds {
            exercise(&sandbox, &backing.dir, "bare", seed, args.ops)?;
        }
        return Ok(format!("{} seeds x {} operations on the bare directory", args.seeds, args.ops));
    }
    let bins = Bins::build()?;
    let daemon = Daemon::start(&sandbox, &bins, "d", &[rig::share("x", &backing.dir)], &[])?;
    let start = daemon.counters_at_rest()?;
    let mut modes = 0;
    for (mode, options) in MODES {
        let rings = options.contains("uring=on").then(switch_rings_on);
        if let Some(Err(why)) = &rings {
            println!("fsx: SKIPPED {mode}: FUSE-over-io_uring cannot be switched on: {why:#}");
            continue;
        }
        modes += 1;
        let mount = daemon.mount(&sandbox, "x", &format!("mnt-{mode}"), options)?;
        for seed in 1..=args.seeds {
            exercise(&sandbox, &mount.dir, mode, seed, args.ops)
                .with_context(|| daemon.log_tail())?;
        }
        mount.umount()?;
        daemon.assert_back_at(&start)?;
    }
    daemon.stop()?;
    Ok(format!("{} seeds x {} operations in {modes} modes", args.seeds, args.ops))
}

/// Rings are there for new mounts as long as the guard lives.
pub fn switch_rings_on() -> Result<Guard> {
    let before = fs::read_to_string(RINGS).context("Linux 6.14 is needed")?;
    let guard = Guard::new(Undo::Setting(RINGS.into(), before.trim().to_owned()));
    fs::write(RINGS, "Y").context("not allowed")?;
    Ok(guard)
}

/// One seed on one directory; the sandbox holds the configuration and what a failure leaves.
pub fn exercise(sandbox: &Sandbox, dir: &Path, mode: &str, seed: u64, ops: u64) -> Result<()> {
    let begun = Instant::now();
    let file = dir.join(format!("fsx-{seed}"));
    let artifacts = sandbox.path("");
    fs::write(sandbox.path("fsx.toml"), CONFIG)?;
    let fsx = Cmd::new(paths::tool("fsx")?).arg("-f").arg(sandbox.path("fsx.toml"));
    let fsx = fsx.arg("-P").arg(artifacts).args(["-N", &ops.to_string()]);
    let text = fsx.args(["-S", &seed.to_string()]).arg(&file).limit(RUN_LIMIT).run();
    let text = text.with_context(|| format!("fsx in mode {mode}, seed {seed}"))?;
    let closing = text.lines().last().unwrap_or_default();
    println!("fsx: {mode}, seed {seed}: {closing} ({ops} operations, {:.1?})", begun.elapsed());
    fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))
}
