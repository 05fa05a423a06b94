//! Credentials of the calling thread, changed for one call and restored: supplementary groups,
//! the capability CAP_FSETID, effective user and group.
//!
//! Each guard changes the calling thread only. The kernel keeps credentials per thread; glibc's
//! setresuid and setgroups signal all threads to follow, so the raw calls are used (rustix's
//! `set_thread_*`).
//!
//! Invariant: when a guard is gone, the thread's credentials are what they were before it. A guard
//! that cannot restore **aborts the process**: the thread would go on to serve other guests with
//! one guest's ids, or with fewer checks; there is nobody to hand that error to (drop returns
//! nothing), and a restarted daemon rebuilds its sessions, while a wrong owner stays on disk.
//!
//! Guards nest; drop them in the reverse order (locals do). While one lives: no submission to a
//! ring (a ring's work would run with these ids), no await, no hand-over to another thread (guards
//! are `!Send`). This file must not open or create anything itself.

use std::marker::PhantomData;

use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid, getgroups};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

/// Supplementary groups at most (`NGROUPS_MAX`, linux/limits.h).
pub const GROUPS_MAX: usize = 65536;

/// So many groups are converted without allocation: FUSE sends at most one.
const GROUPS_INLINE: usize = 32;

/// Why a thread's credentials could not be changed. Nothing was changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CredsError {
    /// More than [`GROUPS_MAX`].
    #[error("{0} supplementary groups, the kernel takes at most 65536")]
    TooManyGroups(usize),
    /// `u32::MAX` means "leave it" to the kernel.
    #[error("4294967295 is no user or group id")]
    InvalidId,
    /// getgroups or setgroups.
    #[error("cannot set supplementary groups (CAP_SETGID is needed): {0}")]
    Groups(#[source] Errno),
    /// setresgid.
    #[error(
        "cannot set the effective group (CAP_SETGID and, in a user namespace, a mapping of \
             the id are needed): {0}"
    )]
    Gid(#[source] Errno),
    /// setresuid.
    #[error(
        "cannot set the effective user (CAP_SETUID and, in a user namespace, a mapping of \
             the id are needed): {0}"
    )]
    Uid(#[source] Errno),
    /// capget or capset.
    #[error("cannot change capabilities: {0}")]
    Capabilities(#[source] Errno),
}

impl CredsError {
    /// What the guest is told.
    pub const fn errno(self) -> Errno {
        match self {
            CredsError::TooManyGroups(_) | CredsError::InvalidId => Errno::INVAL,
            CredsError::Groups(errno)
            | CredsError::Gid(errno)
            | CredsError::Uid(errno)
            | CredsError::Capabilities(errno) => errno,
        }
    }
}

/// Makes a guard `!Send`: its drop must run on the thread that it changed.
type OnThisThread = PhantomData<*const ()>;

/// The thread's supplementary groups, replaced while this lives.
#[must_use = "the groups are restored when this is dropped"]
#[derive(Debug)]
pub struct SuppGroups {
    before: Vec<Gid>,
    thread: OnThisThread,
}

impl SuppGroups {
    /// Replaces the supplementary groups of the calling thread. An empty list takes all away.
    /// Source: setgroups(2), "C library/kernel differences".
    ///
    /// # Errors
    /// [`CredsError::TooManyGroups`], [`CredsError::InvalidId`], [`CredsError::Groups`].
    pub fn set(groups: &[u32]) -> Result<SuppGroups, CredsError> {
        if groups.len() > GROUPS_MAX {
            return Err(CredsError::TooManyGroups(groups.len()));
        }
        let before = getgroups().map_err(CredsError::Groups)?;
        let mut inline = [Gid::ROOT; GROUPS_INLINE];
        let mut many = Vec::new();
        let wanted = match inline.get_mut(..groups.len()) {
            Some(few) => few,
            None => {
                many.resize(groups.len(), Gid::ROOT);
                many.as_mut_slice()
            }
        };
        for (slot, &id) in wanted.iter_mut().zip(groups) {
            *slot = gid(id)?;
        }
        set_thread_groups(wanted).map_err(CredsError::Groups)?;
        Ok(SuppGroups { before, thread: PhantomData })
    }
}

impl Drop for SuppGroups {
    fn drop(&mut self) {
        if let Err(errno) = set_thread_groups(&self.before) {
            cannot_restore("supplementary groups", errno);
        }
    }
}

/// CAP_FSETID out of the thread's effective set while this lives.
///
/// With it the kernel keeps set-user-id and set-group-id bits on a write, truncate or chown and
/// lets a set-group-id bit stand for a group that the owner is not in; a guest that asks for
/// FUSE_WRITE_KILL_SUIDGID, FATTR_KILL_SUIDGID or FUSE_OPEN_KILL_SUIDGID wants them cleared.
/// Source: capabilities(7).
#[must_use = "the capability is raised again when this is dropped"]
#[derive(Debug)]
pub struct NoFsetid {
    /// None: it was not effective, so nothing is to be restored.
    before: Option<CapabilitySets>,
    thread: OnThisThread,
}

impl NoFsetid {
    /// Takes CAP_FSETID out of the calling thread's effective set.
    ///
    /// # Errors
    /// [`CredsError::Capabilities`].
    pub fn enter() -> Result<NoFsetid, CredsError> {
        let before = capabilities(None).map_err(CredsError::Capabilities)?;
        if !before.effective.contains(CapabilitySet::FSETID) {
            return Ok(NoFsetid { before: None, thread: PhantomData });
        }
        let mut without = before;
        without.effective -= CapabilitySet::FSETID;
        set_capabilities(None, without).map_err(CredsError::Capabilities)?;
        Ok(NoFsetid { before: Some(before), thread: PhantomData })
    }
}

impl Drop for NoFsetid {
    fn drop(&mut self) {
        let Some(before) = self.before else { return };
        if let Err(errno) = set_capabilities(None, before) {
            cannot_restore("CAP_FSETID", errno);
        }
    }
}

/// The thread's effective (and with them file system) user and group, replaced while this lives.
///
/// A switch from user 0 to another empties the effective capabilities, so the host's permission
/// checks hold for that user: with its supplementary groups only if [`SuppGroups`] was set before.
/// A daemon that is not user 0 but has capabilities keeps them. Source: setresuid(2),
/// capabilities(7).
#[must_use = "the ids are restored when this is dropped"]
#[derive(Debug)]
pub struct EffectiveIds {
    uid_before: Option<Uid>,
    gid_before: Option<Gid>,
    /// The way back to user 0 raises every permitted capability: also one that an outer guard
    /// has lowered. So the exact sets are put back.
    caps_before: Option<CapabilitySets>,
    thread: OnThisThread,
}

impl EffectiveIds {
    /// Takes on a user and a group; what the thread has already is not set again.
    ///
    /// # Errors
    /// [`CredsError::InvalidId`], [`CredsError::Gid`], [`CredsError::Uid`],
    /// [`CredsError::Capabilities`].
    pub fn switch(user: u32, group: u32) -> Result<EffectiveIds, CredsError> {
        if user == u32::MAX {
            return Err(CredsError::InvalidId);
        }
        let (user, group) = (Uid::from_raw(user), gid(group)?);
        let (uid_now, gid_now) = (geteuid(), getegid());
        let mut guard = EffectiveIds {
            uid_before: None,
            gid_before: None,
            caps_before: None,
            thread: PhantomData,
        };
        // The group first: without user 0 the thread may no longer set it. On an error below, the
        // guard's drop puts back what was done.
        if group != gid_now {
            set_thread_res_gid(None, group, None).map_err(CredsError::Gid)?;
            guard.gid_before = Some(gid_now);
        }
        if user != uid_now {
            let caps = capabilities(None).map_err(CredsError::Capabilities)?;
            set_thread_res_uid(None, user, None).map_err(CredsError::Uid)?;
            guard.uid_before = Some(uid_now);
            guard.caps_before = Some(caps);
        }
        Ok(guard)
    }
}

impl Drop for EffectiveIds {
    fn drop(&mut self) {
        // The reverse order: user 0 has the right to set the group.
        if let Some(uid) = self.uid_before
            && let Err(errno) = set_thread_res_uid(None, uid, None)
        {
            cannot_restore("effective user", errno);
        }
        if let Some(gid) = self.gid_before
            && let Err(errno) = set_thread_res_gid(None, gid, None)
        {
            cannot_restore("effective group", errno);
        }
        if let Some(caps) = self.caps_before
            && let Err(errno) = set_capabilities(None, caps)
        {
            cannot_restore("capabilities", errno);
        }
    }
}

fn gid(id: u32) -> Result<Gid, CredsError> {
    if id == u32::MAX { Err(CredsError::InvalidId) } else { Ok(Gid::from_raw(id)) }
}

/// See the head of the file for why this is the end of the process.
fn cannot_restore(what: &str, errno: Errno) -> ! {
    tracing::error!(
        "cannot restore the thread's {what} ({errno}); aborting, as it would serve \
                     other guests with them"
    );
    std::process::abort();
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
    use std::sync::mpsc;

    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    struct Creds {
        uid: u32,
        gid: u32,
        groups: Vec<u32>,
        effective: CapabilitySet,
    }

    fn now() -> Creds {
        Creds {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
            groups: getgroups().expect("getgroups").iter().map(|g| g.as_raw()).collect(),
            effective: capabilities(None).expect("capget").effective,
        }
    }

    fn root() -> bool {
        let root = geteuid().is_root();
        if !root {
            println!("SKIPPED: changing credentials needs root");
        }
        root
    }

    #[test]
    fn guards_change_this_thread_only_and_restore_it() {
        if !root() {
            return;
        }
        // The other thread exists before the guards, so that it does not inherit from them.
        let (ask, asked) = mpsc::channel::<()>();
        let (answer, answered) = mpsc::channel();
        let other = std::thread::spawn(move || {
            for () in asked {
                answer.send(now()).expect("the asker waits");
            }
        });
        let before = now();
        {
            let _groups = SuppGroups::set(&[2000, 2001]).expect("groups");
            let _fsetid = NoFsetid::enter().expect("capability");
            let lowered = now();
            assert_eq!(lowered.effective, before.effective - CapabilitySet::FSETID);
            {
                let _ids = EffectiveIds::switch(1000, 1001).expect("ids");
                let inside = now();
                assert_eq!((inside.uid, inside.gid), (1000, 1001));
                assert_eq!(inside.groups, [2000, 2001]);
                assert!(inside.effective.is_empty());
                ask.send(()).expect("the thread lives");
                assert_eq!(answered.recv().expect("an answer"), before);
            }
            assert_eq!(now(), lowered, "the way back raised what an outer guard had lowered");
        }
        assert_eq!(now(), before);
        drop(ask);
        other.join().expect("the thread ended well");
    }

    #[test]
    fn files_get_the_owner_and_keep_or_lose_bits() {
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().expect("temp dir");
        // A directory of group 2000 with the set-group-id bit, writable by that group alone.
        let shared = dir.path().join("shared");
        std::fs::create_dir(&shared).expect("mkdir");
        std::os::unix::fs::chown(&shared, Some(0), Some(2000)).expect("chown");
        let mode = |m| std::fs::Permissions::from_mode(m);
        std::fs::set_permissions(&shared, mode(0o2770)).expect("chmod");
        std::fs::set_permissions(dir.path(), mode(0o755)).expect("chmod");
        let create = |name: &str| {
            std::fs::File::options()
                .write(true)
                .create_new(true)
                .mode(0o2755)
                .open(shared.join(name))
        };
        {
            let _ids = EffectiveIds::switch(1000, 1000).expect("ids");
            let refused = create("refused").expect_err("not a member");
            assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
        }
        {
            let _groups = SuppGroups::set(&[2000]).expect("groups");
            let _ids = EffectiveIds::switch(1000, 1000).expect("ids");
            let meta = create("member").expect("a member").metadata().expect("metadata");
            assert_eq!((meta.uid(), meta.gid()), (1000, 2000));
        }
        let file = shared.join("suid");
        for lose in [false, true] {
            std::fs::write(&file, b"x").expect("write");
            std::fs::set_permissions(&file, mode(0o6777)).expect("chmod");
            let guard = lose.then(|| NoFsetid::enter().expect("capability"));
            std::fs::write(&file, b"y").expect("write");
            drop(guard);
            let bits = std::fs::metadata(&file).expect("metadata").mode() & 0o7777;
            assert_eq!(bits, if lose { 0o777 } else { 0o6777 });
        }
    }

    #[test]
    fn impossible_ids_change_nothing() {
        let before = now();
        assert_eq!(EffectiveIds::switch(u32::MAX, 0).map(drop), Err(CredsError::InvalidId));
        assert_eq!(EffectiveIds::switch(0, u32::MAX).map(drop), Err(CredsError::InvalidId));
        assert_eq!(SuppGroups::set(&[1, u32::MAX]).map(drop), Err(CredsError::InvalidId));
        let many = vec![1; GROUPS_MAX + 1];
        let refused = SuppGroups::set(&many).map(drop);
        assert_eq!(refused, Err(CredsError::TooManyGroups(GROUPS_MAX + 1)));
        assert_eq!(CredsError::InvalidId.errno(), Errno::INVAL);
        if root() {
            drop(SuppGroups::set(&many[..40]).expect("more than the inline ones"));
            drop(SuppGroups::set(&[]).expect("none"));
        }
        assert_eq!(now(), before);
    }

    #[test]
    fn a_switch_that_is_refused_half_way_is_undone() {
        if !root() {
            return;
        }
        let mut sets = capabilities(None).expect("capget");
        sets.effective -= CapabilitySet::SETUID;
        // This thread only, which ends with the test.
        set_capabilities(None, sets).expect("capset");
        let before = now();
        let refused = EffectiveIds::switch(1000, 1000).map(drop);
        assert_eq!(refused, Err(CredsError::Uid(Errno::PERM)));
        assert_eq!(now(), before);
    }

    #[test]
    fn a_guard_that_cannot_restore_aborts() {
        use std::os::unix::process::ExitStatusExt;

        const CHILD: &str = "RINGFS_TEST_CREDS_ABORT";
        if !root() {
            return;
        }
        if std::env::var_os(CHILD).is_some() {
            let guard = SuppGroups::set(&[2000]).expect("groups");
            let mut sets = capabilities(None).expect("capget");
            sets.effective -= CapabilitySet::SETGID;
            set_capabilities(None, sets).expect("capset");
            drop(guard);
            return;
        }
        let output = std::process::Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", "creds::tests::a_guard_that_cannot_restore_aborts"])
            .env(CHILD, "1")
            .output()
            .expect("the child ran");
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
    }
}
