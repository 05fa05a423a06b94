//! A thread's rights for the length of one call: ids, supplementary groups, CAP_FSETID.
//!
//! Each guard changes the calling thread only (raw system calls, no signal to the other threads)
//! and undoes it when dropped. While one lives, the thread must do nothing but the one call that
//! it was made for: no io_uring submission, which would carry the changed credentials.

use rustix::io::Errno;
use rustix::process::{Gid, RawGid, Uid};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::passthrough::Caller;

/// Supplementary groups of the guest's process, for a call that creates.
pub struct GroupsGuard {
    active: bool,
}

impl GroupsGuard {
    /// Changes nothing where there are no groups.
    pub fn set(groups: &[RawGid]) -> Result<GroupsGuard, Errno> {
        if groups.is_empty() {
            return Ok(GroupsGuard { active: false });
        }
        let mut gids = Vec::with_capacity(groups.len());
        for &group in groups {
            gids.push(gid(group)?);
        }
        rustix::thread::set_thread_groups(&gids)?;
        Ok(GroupsGuard { active: true })
    }
}

impl Drop for GroupsGuard {
    fn drop(&mut self) {
        // The daemon itself runs without supplementary groups.
        if self.active
            && let Err(error) = rustix::thread::set_thread_groups(&[])
        {
            tracing::error!(%error, "cannot drop a caller's groups");
        }
    }
}

/// Acts as the guest's user on the host, for an open that the host shall decide.
pub struct IdsGuard {
    gid_changed: bool,
    uid_changed: bool,
}

impl IdsGuard {
    /// As the crate does it: group first, since a changed user may not change groups.
    pub fn set(caller: Caller) -> Result<IdsGuard, Errno> {
        let mut guard = IdsGuard { gid_changed: false, uid_changed: false };
        if caller.gid != 0 {
            let group = gid(caller.gid)?;
            rustix::thread::set_thread_res_gid(None::<Gid>, group, None::<Gid>)?;
            guard.gid_changed = true;
        }
        if caller.uid != 0 {
            let user = uid(caller.uid)?;
            rustix::thread::set_thread_res_uid(None::<Uid>, user, None::<Uid>)?;
            guard.uid_changed = true;
        }
        Ok(guard)
    }
}

impl Drop for IdsGuard {
    fn drop(&mut self) {
        if self.uid_changed
            && let Err(error) =
                rustix::thread::set_thread_res_uid(None::<Uid>, Uid::ROOT, None::<Uid>)
        {
            tracing::error!(%error, "cannot change back to root");
        }
        if self.gid_changed
            && let Err(error) =
                rustix::thread::set_thread_res_gid(None::<Gid>, Gid::ROOT, None::<Gid>)
        {
            tracing::error!(%error, "cannot change back to root's group");
        }
    }
}

/// Writes and truncations by this thread clear suid and sgid, as an ordinary user's do.
pub struct FsetidGuard {
    dropped: bool,
}

impl FsetidGuard {
    /// Changes nothing where `kill` is false, or where the capability is missing anyway.
    pub fn drop_if(kill: bool) -> Result<FsetidGuard, Errno> {
        if !kill {
            return Ok(FsetidGuard { dropped: false });
        }
        let mut sets = capabilities(None)?;
        let dropped = sets.effective.contains(CapabilitySet::FSETID);
        if dropped {
            sets.effective.remove(CapabilitySet::FSETID);
            set_capabilities(None, sets)?;
        }
        Ok(FsetidGuard { dropped })
    }
}

impl Drop for FsetidGuard {
    fn drop(&mut self) {
        if !self.dropped {
            return;
        }
        let raised = capabilities(None).and_then(|mut sets| {
            sets.effective.insert(CapabilitySet::FSETID);
            set_capabilities(None, sets)
        });
        if let Err(error) = raised {
            tracing::error!(%error, "cannot raise CAP_FSETID again");
        }
    }
}

/// `-1` means "leave it" to the system calls, and is nobody's id.
fn gid(raw: u32) -> Result<Gid, Errno> {
    if raw == u32::MAX { Err(Errno::INVAL) } else { Ok(Gid::from_raw(raw)) }
}

fn uid(raw: u32) -> Result<Uid, Errno> {
    if raw == u32::MAX { Err(Errno::INVAL) } else { Ok(Uid::from_raw(raw)) }
}
