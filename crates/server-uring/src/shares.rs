//! What a worker serves: its shares, by the names that guests give; they come and go.
//!
//! Invariant: a guest can narrow how a share is served to it, and never widen it. A share that
//! takes another one's place changes nothing for sessions that are open, but for their limits.

use crate::fs::FsOptions;
use crate::limits::OPENINGS_PER_SHARE_MAX;
use crate::share::ShareRoot;
use crate::status::ShareStatus;
use ringfs_wire::hello::{Hello, feature, mount_flag};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A directory that guests may mount.
pub struct Share {
    /// What guests call it.
    pub name: String,
    /// Where it is.
    pub dir: PathBuf,
    /// Its root, opened by the parent.
    pub root: ShareRoot,
    /// How it is served.
    pub options: FsOptions,
    /// Sessions of it that are being opened now.
    pub opening: AtomicUsize,
}

/// A session of a share that is being opened; dropped when it is, or is not.
pub(crate) struct Opening(Arc<Share>);

impl Share {
    /// For people; without its sessions.
    pub fn status(&self) -> ShareStatus {
        ShareStatus {
            name: self.name.clone(),
            path: self.dir.clone(),
            read_only: self.options.read_only,
            limits: self.options.quota.status(),
            ..Default::default()
        }
    }

    /// How it is served to who says this.
    pub(crate) fn options_for(&self, hello: &Hello) -> FsOptions {
        let has = |flag| hello.mount_flags & flag != 0;
        let mut options = self.options.clone();
        options.cache = hello.cache;
        options.writeback = has(mount_flag::WRITEBACK);
        options.read_only |= has(mount_flag::READ_ONLY);
        options.acl &= has(mount_flag::POSIX_ACL);
        options.recipes = hello.features & feature::RESTORE != 0;
        options.stores = hello.features & feature::STORE != 0;
        options
    }

    /// `None`: so many are being opened that its file system seems to be stuck.
    pub(crate) fn begin_opening(self: &Arc<Share>) -> Option<Opening> {
        let others = self.opening.fetch_add(1, Ordering::Relaxed);
        let opening = Opening(self.clone());
        (others < OPENINGS_PER_SHARE_MAX).then_some(opening)
    }
}

impl Opening {
    /// Of which share.
    pub(crate) fn share(&self) -> &Share {
        &self.0
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.0.opening.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What there is to mount.
#[derive(Default)]
pub struct Shares(RwLock<Known>);

#[derive(Default)]
struct Known {
    all: Vec<Arc<Share>>,
    /// Names of those that are to be served, and whose directories cannot be had now.
    away: Vec<String>,
}

impl Shares {
    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Known> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them now.
    pub fn all(&self) -> Vec<Arc<Share>> {
        self.read().all.clone()
    }

    pub(crate) fn find(&self, name: &str) -> Option<Arc<Share>> {
        self.read().all.iter().find(|share| share.name == name).cloned()
    }

    pub(crate) fn is_away(&self, name: &str) -> bool {
        self.read().away.iter().any(|other| other == name)
    }

    /// Adds one, or puts it in the place of the one of its name.
    pub fn put(&self, mut share: Share) {
        let Known { all, away } = &mut *self.write();
        away.retain(|name| *name != share.name);
        match all.iter_mut().find(|old| old.name == share.name) {
            Some(old) => {
                // Sessions that are open go by the new limits, and go on counting with new ones.
                let quota = Arc::clone(&old.options.quota);
                quota.follow(&share.options.quota);
                share.options.quota = quota;
                *old = Arc::new(share);
            }
            None => all.push(Arc::new(share)),
        }
    }

    /// Nobody mounts it any more.
    pub fn remove(&self, name: &str) {
        let Known { all, away } = &mut *self.write();
        away.retain(|other| other != name);
        all.retain(|share| share.name != name);
    }

    /// Who has it waits until it is put.
    pub fn set_away(&self, name: &str) {
        self.write().away.push(name.to_owned());
    }
}
