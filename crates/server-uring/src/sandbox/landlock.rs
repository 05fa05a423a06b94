//! Landlock: files are opened, made and removed below the shares and in the state directory alone,
//! whatever fd or path leads to them; no socket is connected, and no process outside is sent a
//! signal.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

/// The newest that is asked for; an older kernel does what it can.
const NEWEST: ABI = ABI::V6;

/// Restricts the calling thread, and those that it makes, to what is below `shares`.
/// Where the kernel has no landlock it says so and goes on.
///
/// # Errors
/// What landlock says.
pub fn restrict(shares: &Path, state: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let all = AccessFs::from_all(NEWEST);
    let shares = PathFd::new(shares).map_err(io::Error::other)?;
    let proc = PathFd::new("/proc").map_err(io::Error::other)?;
    // Nothing is run, and no device driven.
    let files = all & !(AccessFs::Execute | AccessFs::IoctlDev);
    let looks: BitFlags<AccessFs> = AccessFs::ReadDir | AccessFs::ReadFile;
    let ruleset = || {
        let created = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(all)?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?
            .add_rule(PathBeneath::new(shares, files))?
            .add_rule(PathBeneath::new(proc, looks))?;
        let created = match state {
            Some(dir) => created.add_rule(PathBeneath::new(dir, files))?,
            None => created,
        };
        created.restrict_self()
    };
    let status: Result<_, landlock::RulesetError> = ruleset();
    let status = status.map_err(io::Error::other)?;
    if status.ruleset == RulesetStatus::NotEnforced {
        tracing::warn!(
            "this kernel has no landlock: the sandbox stands without it (docs/security.md)"
        );
    }
    Ok(())
}
