//! Landlock: files are opened, made and removed below the shares and in the state directory alone,
//! whatever fd or path leads to them; no socket is connected, and no process outside is sent a
//! signal.

use super::Offered;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
    Scope,
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
    if lay(&[Offered { dir: shares.as_fd(), read_only: false }], state)?.is_none() {
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
    let Some(kernel) = lay(shares, state)? else {
        return Err(io::Error::new(io::ErrorKind::Unsupported, none));
    };
    if lets_truncate(&kernel) && shares.iter().any(|share| share.read_only) {
        tracing::warn!(
            "before Linux 6.2 landlock does not keep a worker that was taken over from truncating \
             files of a read-only share"
        );
    }
    Ok(())
}

/// Files are truncated by who may not write to them: it knows no right for that.
fn lets_truncate(kernel: &LandlockStatus) -> bool {
    matches!(kernel, LandlockStatus::Available { effective_abi: ABI::V1 | ABI::V2, .. })
}

/// What the kernel has of it; `None`: nothing.
fn lay(
    shares: &[Offered<'_>],
    state: Option<BorrowedFd<'_>>,
) -> io::Result<Option<LandlockStatus>> {
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
    Ok(Some(status.landlock).filter(|_| status.ruleset != RulesetStatus::NotEnforced))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncation_is_a_right_from_the_third_abi_on() {
        let of = |effective_abi| LandlockStatus::Available { effective_abi, kernel_abi: None };
        for (abi, lets) in [(ABI::V1, true), (ABI::V2, true), (ABI::V3, false), (NEWEST, false)] {
            let handled = AccessFs::from_all(abi).contains(AccessFs::Truncate);
            assert_eq!((lets_truncate(&of(abi)), handled), (lets, !lets), "{abi:?}");
        }
    }
}
