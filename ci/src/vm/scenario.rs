//! Which steps a guest runs, in which order, under which time limits.
//!
//! A step is a shell function `step_NAME` in `ci/guest/step` and one line of [`STEPS`]. The limits
//! are for a guest without KVM on a busy machine of two cores: ten times what was measured.

use clap::ValueEnum;

/// How much is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Scenario {
    /// The guest and the way over vsock, without ringfs.
    Boot,
    /// The short form for CI: one mount at work.
    Smoke,
    /// All of it: a part of pjdfstest, fio with verify, both ends in the guest, errors.
    Full,
    /// A guest whose root file system is the share.
    Rootfs,
    /// Only what is named with `--step`.
    None,
}

/// Where in the guest's life a step runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Busybox and our static client only.
    Initramfs,
    /// The host's root under an overlay, with all its tools.
    Root,
    /// A root file system on the share, instead of the stage `root`; after `switch_root`.
    NewRoot,
    /// Behind that: back in memory, as systemd's `/run/initramfs/shutdown`.
    Exitrd,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Initramfs => "initramfs",
            Self::Root => "root",
            Self::NewRoot => "newroot",
            Self::Exitrd => "exitrd",
        }
    }
}

/// One entry of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The function `step_NAME` of `ci/guest/step`.
    pub name: &'static str,
    /// When it runs.
    pub stage: Stage,
    /// The guest ends it after so many seconds.
    pub limit_s: u32,
    /// The smallest scenario that holds it.
    pub from: Scenario,
}

const fn step(from: Scenario, stage: Stage, limit_s: u32, name: &'static str) -> Step {
    Step { name, stage, limit_s, from }
}

use Scenario::{Boot, Full, None as OnDemand, Rootfs, Smoke};
use Stage::{Exitrd, Initramfs, NewRoot, Root};

/// All steps in the order in which they run.
pub const STEPS: [Step; 44] = [
    step(Boot, Initramfs, 20, "modules"),
    step(Smoke, Initramfs, 120, "initramfs_mount"),
    step(Boot, Root, 120, "vsock_pieces_1k"),
    step(Boot, Root, 120, "vsock_pieces_32k"),
    step(Smoke, Root, 120, "mount"),
    step(Smoke, Root, 120, "from_host"),
    step(Smoke, Root, 300, "files"),
    step(Smoke, Root, 300, "copy_tree"),
    step(Smoke, Root, 300, "dd_checksum"),
    step(Smoke, Root, 300, "survive"),
    step(Full, Root, 600, "survive_more"),
    step(Full, Root, 120, "features"),
    step(Full, Root, 600, "fio_verify"),
    step(Full, Root, 600, "pjdfstest_chmod"),
    step(Full, Root, 600, "pjdfstest_link"),
    step(Full, Root, 600, "pjdfstest_open"),
    step(Full, Root, 600, "pjdfstest_rename"),
    step(Full, Root, 600, "pjdfstest_unlink"),
    step(Full, Root, 120, "wrong_port"),
    step(Full, Root, 120, "wrong_cid"),
    step(Full, Root, 120, "unknown_share"),
    step(Full, Root, 120, "missing_mountpoint"),
    step(Full, Root, 120, "bad_address"),
    step(Full, Root, 120, "still_works"),
    step(Smoke, Root, 120, "umount"),
    step(Smoke, Root, 120, "daemon_idle"),
    step(Full, Root, 120, "loop_mount"),
    step(Full, Root, 300, "loop_files"),
    step(Full, Root, 300, "loop_copy_tree"),
    step(Full, Root, 600, "loop_fio_verify"),
    step(Full, Root, 120, "loop_umount"),
    step(Full, Root, 300, "control_groups"),
    step(Rootfs, Initramfs, 60, "doctor"),
    step(Rootfs, Initramfs, 120, "root_mount"),
    step(Rootfs, NewRoot, 120, "root_runs"),
    step(Rootfs, Exitrd, 120, "root_unmounted"),
    step(OnDemand, Root, 1200, "pjdfstest_all"),
    step(OnDemand, Root, 120, "vsock_pieces_48k"),
    step(OnDemand, Root, 300, "plain_files"),
    step(OnDemand, Root, 300, "plain_copy_tree"),
    step(OnDemand, Root, 600, "plain_fio_verify"),
    step(OnDemand, Root, 600, "plain_pjdfstest"),
    step(OnDemand, Root, 120, "always_fails"),
    step(OnDemand, Root, 5, "never_ends"),
];

/// The step of `cargo xtask bench --vm`, which is in no scenario: it needs more than a guest.
pub const BENCH: Step = step(OnDemand, Root, 900, "bench");

/// The steps of a scenario, and those that `named` adds, in the order of [`STEPS`].
///
/// # Errors
/// The first name that is no step.
pub fn plan(scenario: Scenario, named: &[String]) -> Result<Vec<Step>, String> {
    if let Some(unknown) = named.iter().find(|name| !STEPS.iter().any(|s| s.name == **name)) {
        return Err(unknown.clone());
    }
    let wanted = |step: &&Step| {
        let in_scenario = match scenario {
            OnDemand => false,
            Rootfs => step.from == Rootfs || step.name == "modules",
            Boot | Smoke | Full => step.from <= scenario,
        };
        in_scenario || named.iter().any(|name| name == step.name)
    };
    Ok(STEPS.iter().filter(wanted).copied().collect())
}

/// The plan as the guest reads it: `stage name seconds`, one a line.
pub fn as_text(plan: &[Step]) -> String {
    plan.iter().map(|s| format!("{} {} {}\n", s.stage.name(), s.name, s.limit_s)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_its_function_and_every_function_its_step() {
        let script = include_str!("../../guest/step");
        let functions: Vec<&str> = script
            .lines()
            .filter_map(|line| line.strip_prefix("step_")?.split_once("()"))
            .map(|(name, _)| name)
            .collect();
        for step in STEPS.into_iter().chain([BENCH]) {
            assert!(functions.contains(&step.name), "no function step_{}", step.name);
        }
        for function in functions {
            let known = STEPS.iter().chain([&BENCH]).any(|s| s.name == function);
            assert!(known, "{function} is in no scenario");
        }
    }

    #[test]
    fn plans_grow_with_the_scenario() {
        fn check(scenario: Scenario, named: &[&str], expected_start: &str, holds: &[&str]) {
            let named: Vec<String> = named.iter().map(|&n| n.to_owned()).collect();
            let plan = plan(scenario, &named).expect("known names");
            assert!(as_text(&plan).starts_with(expected_start), "{}", as_text(&plan));
            for name in holds {
                assert!(plan.iter().any(|s| s.name == *name), "{name} in {scenario:?}");
            }
        }
        check(Boot, &[], "initramfs modules 20\nroot vsock_pieces_1k 120\n", &[]);
        check(Smoke, &["fio_verify"], "initramfs modules 20\n", &["mount", "fio_verify"]);
        check(Rootfs, &[], "initramfs modules 20\ninitramfs doctor 60\n", &["root_runs"]);
        check(OnDemand, &["umount", "mount"], "root mount 120\nroot umount 120\n", &[]);
        assert!(!plan(Full, &[]).expect("no names").iter().any(|s| s.from == OnDemand));
        assert_eq!(plan(Full, &["nonsense".into()]), Err("nonsense".into()));
    }
}
