//! `cargo xtask vm`: ringfs in a real guest, over real AF_VSOCK.
//!
//! QEMU (TCG: no KVM is needed, and none is used) boots Debian's kernels with an initramfs made
//! here; the guest's port 5640 reaches the host's daemon through vhost-device-vsock. For
//! correctness only: no time that is printed here says anything about speed.
//!
//! The steps are in `ci/guest/step`, their order and limits in `vm/scenario.rs`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};

use self::guest::Extras;
use self::host::Host;
use self::kernel::Series;
use self::protocol::Outcome;
use self::scenario::{Scenario, Step};
use self::tools::Tools;
pub use self::tools::static_program;
use crate::guard::{Guard, Undo};

pub mod bench;
mod guest;
mod host;
mod initramfs;
mod kernel;
mod process;
mod protocol;
mod scenario;
mod tools;

/// Arguments of `cargo xtask vm`.
#[derive(Args, Clone, Debug)]
pub struct VmArgs {
    /// What to run.
    #[arg(value_enum, default_value = "smoke")]
    scenario: Scenario,
    /// The guest's kernel; `full` runs all, the others 6.12.
    #[arg(long)]
    kernel: Option<KernelChoice>,
    /// Run this step too (with the scenario `none`: only the steps named so).
    #[arg(long = "step", value_name = "NAME")]
    steps: Vec<String>,
    /// List the steps and exit.
    #[arg(long)]
    list: bool,
    /// Keep the run's directory (logs, share, initramfs) also when all went well.
    #[arg(long)]
    keep: bool,
}

impl VmArgs {
    /// What CI runs: one mount at work, and a root file system on one.
    pub fn short() -> [VmArgs; 2] {
        [Scenario::Smoke, Scenario::Rootfs].map(VmArgs::of)
    }

    fn of(scenario: Scenario) -> VmArgs {
        VmArgs { scenario, kernel: None, steps: Vec::new(), list: false, keep: false }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum KernelChoice {
    #[value(name = "6.12")]
    V6_12,
    #[value(name = "6.1")]
    V6_1,
    All,
}

/// Runs the command; an error if any step failed.
///
/// # Errors
/// A failed step, or what keeps the guest from being started.
pub fn run(args: VmArgs) -> anyhow::Result<()> {
    if args.list {
        for Step { name, limit_s, from, .. } in scenario::STEPS {
            println!("{name:<20} {from:?} and larger, at most {limit_s} s");
        }
        return Ok(());
    }
    let plan = scenario::plan(args.scenario, &args.steps)
        .map_err(|name| anyhow::anyhow!("no step {name:?} (see `cargo xtask vm --list`)"))?;
    if plan.is_empty() {
        bail!("no steps to run: name some with --step");
    }
    let root = repository()?;
    let cache = root.join("target/vm");
    remove_stale_runs(&cache)?;
    let start = Instant::now();
    let tools = Tools::ready(&root, &plan)?;
    let mut kernels = Vec::new();
    for series in series(&args) {
        kernels.push(kernel::fetch(series, &cache)?);
    }
    println!("vm: tools and kernels ready after {:.1} s", start.elapsed().as_secs_f64());
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for kernel in &kernels {
        println!("vm: booting {} for {} steps", kernel.package, plan.len());
        let run_dir = cache.join(format!("run-{}", std::process::id()));
        let made = make_run_dir(&run_dir)?;
        let boot = Instant::now();
        let failed_before = failed;
        for (_, outcome, _) in run_one(kernel, &tools, &plan, &run_dir)? {
            match outcome {
                Outcome::Ok(_) => passed += 1,
                Outcome::Failed(_) => failed += 1,
                Outcome::Skipped(_) => skipped += 1,
            }
        }
        println!("vm: {} took {:.1} s", kernel.package, boot.elapsed().as_secs_f64());
        tidy_run(&run_dir, made, args.keep || failed > failed_before)?;
    }
    println!("vm: {passed} passed, {failed} failed, {skipped} skipped");
    if failed > 0 {
        bail!("{failed} steps failed in the guest");
    }
    Ok(())
}

fn run_one(
    kernel: &kernel::Kernel,
    tools: &Tools,
    plan: &[Step],
    run_dir: &Path,
) -> anyhow::Result<guest::Results> {
    let daemon = tools.product.as_ref().map(|product| product.daemon.as_path());
    let mut host = Host::start(run_dir, daemon)?;
    if plan.iter().any(|step| step.stage == scenario::Stage::NewRoot) {
        host.make_root(&tools.busybox)?;
    }
    let results = guest::boot(kernel, tools, plan, &mut host, run_dir, &Extras::default())?;
    if results.iter().any(|(_, outcome, _)| matches!(outcome, Outcome::Failed(_)))
        && let Some(log) = host.daemon_log()
    {
        println!("  end of the daemon's log:\n{log}");
    }
    Ok(results)
}

/// Makes it, empty, until the guard is dropped.
fn make_run_dir(run_dir: &Path) -> anyhow::Result<Guard> {
    if run_dir.exists() {
        std::fs::remove_dir_all(run_dir)?;
    }
    std::fs::create_dir_all(run_dir)?;
    Ok(Guard::new(Undo::Dir(run_dir.to_owned())))
}

fn series(args: &VmArgs) -> Vec<Series> {
    match (args.kernel, args.scenario) {
        (Some(KernelChoice::V6_12), _) => vec![Series::V6_12],
        (Some(KernelChoice::V6_1), _) => vec![Series::V6_1],
        (Some(KernelChoice::All), _) | (None, Scenario::Full) => vec![Series::V6_12, Series::V6_1],
        (None, Scenario::Boot | Scenario::Smoke | Scenario::Rootfs | Scenario::None) => {
            vec![Series::V6_12]
        }
    }
}

/// Keeps what explains a failure under its own name; the next run's directory is another.
fn tidy_run(run_dir: &Path, made: Guard, keep: bool) -> anyhow::Result<()> {
    if !keep {
        return Ok(()); // with the guard
    }
    let kept = run_dir.with_file_name(format!(
        "kept-{}",
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs()
    ));
    std::fs::rename(run_dir, &kept)?;
    made.disarm();
    println!("vm: logs and share are kept in {}", kept.display());
    Ok(())
}

/// A run that was killed leaves its directory; its process id tells whether it still runs. Of the
/// kept ones the last few stay.
fn remove_stale_runs(cache: &Path) -> anyhow::Result<()> {
    const KEPT_MAX: usize = 3;
    std::fs::create_dir_all(cache)?;
    let mut kept = Vec::new();
    for entry in std::fs::read_dir(cache)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        if let Some(pid) = name.strip_prefix("run-") {
            if !Path::new("/proc").join(pid).exists() {
                std::fs::remove_dir_all(entry.path())?;
            }
        } else if name.starts_with("kept-") {
            kept.push(entry.path());
        }
    }
    kept.sort(); // by the second of their end
    let old = kept.len().saturating_sub(KEPT_MAX);
    for dir in kept.into_iter().take(old) {
        std::fs::remove_dir_all(dir)?;
    }
    Ok(())
}

fn repository() -> anyhow::Result<PathBuf> {
    let ci = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(ci.parent().context("the crate ci has no parent directory")?.to_owned())
}
