//! `cargo xtask e2e`: both ends on real mounts, from a first write to hostile bytes.
//!
//! Invariant: every case starts from a daemon of its own on a directory of its own on ext4,
//! unmounts what it mounted, and the daemon must then hold what it held before the case. A case is
//! a plain function; what it needs more than the rig it makes itself.

mod bad;
mod guest;
mod identity;
mod limits;
pub mod load;
mod signals;
mod smoke;
mod traces;
mod trees;
mod versions;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::deps;
use crate::guard;
use crate::paths::Bins;
use crate::rig::{self, Daemon, Mount};
use crate::sandbox::{LoopFs, LoopShape, Sandbox};

const IMAGE_BYTES: u64 = 4 << 30;
/// The slowest case takes well under a minute; more is a hang.
const CASE_LIMIT: Duration = Duration::from_secs(180);

/// What `cargo xtask e2e` takes.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Only cases whose name holds this
    #[arg(default_value = "")]
    pattern: String,
    /// Arguments for ringfsd besides the shares and sockets
    #[arg(long, default_value = "")]
    daemon_args: String,
    /// Print the names and end
    #[arg(long)]
    list: bool,
}

type Case = (&'static str, fn(&Rig) -> Result<()>);

const GROUPS: &[(&str, &[Case])] = &[
    ("smoke", smoke::CASES),
    ("trees", trees::CASES),
    ("load", load::CASES),
    ("bad", bad::CASES),
    ("guest", guest::CASES),
    ("identity", identity::CASES),
    ("limits", limits::CASES),
    ("traces", traces::CASES),
];

/// What a case is given: a running daemon with the share `d` over `backing`.
pub struct Rig {
    /// A scratch place for this case.
    pub sandbox: Sandbox,
    /// The daemon.
    pub daemon: Daemon,
    /// The directory that is shared as `d`, and read-only as `ro`.
    pub backing: PathBuf,
    /// Both programs.
    pub bins: Bins,
}

impl Rig {
    /// Mounts the share `d` with `options` on a directory called `name`.
    pub fn mount(&self, name: &str, options: &str) -> Result<Mount> {
        self.daemon.mount(&self.sandbox, "d", name, options)
    }
}

/// Runs the cases; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    let cases = || {
        let named = |(group, cases): &'static (&str, &[Case])| {
            cases.iter().map(move |(name, case)| (format!("{group}::{name}"), case))
        };
        GROUPS.iter().flat_map(named).filter(|(name, _)| name.contains(&args.pattern))
    };
    if args.list {
        cases().for_each(|(name, _)| println!("{name}"));
        return Ok(format!("{} cases", cases().count()));
    }
    deps::all()?;
    let bins = Bins::build()?;
    let place = Sandbox::new()?;
    let disk = LoopFs::new(&place, "disk", LoopShape::ext4(IMAGE_BYTES))?;
    let (mut passed, mut failed) = (0, 0);
    for (name, case) in cases() {
        let begun = Instant::now();
        let backing = disk.dir.join(name.replace("::", "-"));
        let extra: Vec<&str> = args.daemon_args.split_whitespace().collect();
        match run_case(*case, &bins, backing, &extra) {
            Ok(()) => {
                passed += 1;
                println!("e2e: {name} ... ok ({:.1?})", begun.elapsed());
            }
            Err(error) => {
                failed += 1;
                println!("e2e: {name} ... FAILED ({:.1?})\n{error:#}", begun.elapsed());
            }
        }
    }
    let closing = format!("{passed} passed, {failed} failed");
    ensure!(passed + failed > 0, "no case is called {}", args.pattern);
    if failed > 0 {
        bail!("e2e: {closing}");
    }
    Ok(closing)
}

fn run_case(
    case: fn(&Rig) -> Result<()>,
    bins: &Bins,
    backing: PathBuf,
    extra: &[&str],
) -> Result<()> {
    fs::create_dir(&backing).with_context(|| format!("create {}", backing.display()))?;
    let sandbox = Sandbox::new()?;
    let shares = [rig::share("d", &backing), format!("{},ro", rig::share("ro", &backing))];
    let daemon = Daemon::start(&sandbox, bins, "d", &shares, extra)?;
    let start = daemon.counters_at_rest()?;
    let rig = Rig { sandbox, daemon, backing, bins: bins.clone() };
    guard::with_limit(CASE_LIMIT, || case(&rig))
        .with_context(|| format!("the daemon's log ends:\n{}\n", rig.daemon.log_tail()))?;
    let Rig { daemon, sandbox, .. } = rig;
    daemon.assert_back_at(&start)?;
    daemon.stop()?;
    drop(sandbox);
    Ok(())
}
