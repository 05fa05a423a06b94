//! Landlock: files are opened, made and removed below the shares and in the state directory alone,
//! whatever fd or path leads to them; no socket is connected, and no process outside is sent a
//! signal.

use super::Offered;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// The newest that is asked for; an older kernel does what it can.
const NEWEST: ABI = ABI::V6;

/// Restricts the calling thread, and those that it makes, to what is below `shares`, in a root of
/// its own. Where the kernel has no landlock it says so and goes on.
///
/// # Errors
/// What landlock says.
pub fn restrict(shares: &Path, state: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let shares = PathFd::new(shares).map_err(io::Error::other)?;
    if !lay(&[Offered { dir: shares.as_fd(), read_only: false }], state)? {
        tracing::warn!(
            "this kernel has no landlock: the sandbox stands without it (docs/security.md)"
        );
    }
    Ok(())
}

/// The same to these directories, where nothing else stands before the host's files. Of two that
/// are one, or that lie in each other, a file has the rights of both.
///
/// # Errors
/// What landlock says; `Unsupported` where the kernel has none.
pub fn restrict_to(shares: &[Offered<'_>], state: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let none = "this kernel has no landlock (Linux 5.13, and lsm=..,landlock at its start)";
    match lay(shares, state)? {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::Unsupported, none)),
    }
}

/// Whether the kernel has it.
fn lay(shares: &[Offered<'_>], state: Option<BorrowedFd<'_>>) -> io::Result<bool> {
    let all = AccessFs::from_all(NEWEST);
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
            .add_rule(PathBeneath::new(proc, looks))?;
        let dirs = shares.iter().map(|share| (share.dir, share.read_only));
        let dirs = dirs.chain(state.map(|dir| (dir, false)));
        let rules = dirs.map(|(dir, read_only)| {
            let rights = if read_only { looks } else { files };
            Ok::<_, RulesetError>(PathBeneath::new(dir, rights))
        });
        created.add_rules(rules)?.restrict_self()
    };
    let status: Result<_, RulesetError> = ruleset();
    let status = status.map_err(io::Error::other)?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}
