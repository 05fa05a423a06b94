//! A second way to a file that has several names.
//!
//! A recipe has the name that was seen last. Where the guest takes that one away, the file is there
//! still, and no name that a later daemon knows leads to it. So for a file that is met under a new
//! name a handle by the name before is kept: one that opens to a true path also where the host has
//! nothing in its cache (`HandleKind::Connectable`). Where host or file system have none, such a
//! file is found while the host has it cached.
//!
//! Invariant: an entry goes with its node, and where there is none nobody takes the lock.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, StatxFlags};

use crate::import::Handle;
use crate::node::{Node, Place};
use crate::nodes::Nodes;
use crate::passthrough::Found;

/// By node id.
#[derive(Default)]
pub(crate) struct OtherNames {
    count: AtomicUsize,
    handles: Mutex<HashMap<u64, Handle>>,
}

impl OtherNames {
    pub(crate) fn handle(&self, id: u64) -> Option<Handle> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        self.with(|handles| handles.get(&id).cloned())
    }

    pub(crate) fn put(&self, id: u64, handle: Handle) {
        self.with(|handles| handles.insert(id, handle));
    }

    pub(crate) fn remove(&self, id: u64) {
        if self.count.load(Ordering::Acquire) > 0 {
            self.with(|handles| handles.remove(&id));
        }
    }

    fn with<T>(&self, then: impl FnOnce(&mut HashMap<u64, Handle>) -> T) -> T {
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        let done = then(&mut handles);
        if handles.len() * 4 < handles.capacity() {
            let room = handles.len() * 2;
            handles.shrink_to(room);
        }
        self.count.store(handles.len(), Ordering::Release);
        done
    }
}

impl Nodes {
    /// A node was seen as `name` in `parent`; whether elsewhere before. The caller holds no lock.
    pub(crate) fn seen(&self, node: &Node, found: &Found, parent: &Node, name: &CStr) -> bool {
        let Some(before) = node.seen_at(parent.id, name) else { return false };
        if node.kind() != libc::S_IFDIR && found.stat.nlink > 1 {
            // Where the name before is gone, what was known besides is kept.
            if let Some(handle) = self.handle_at(&before, found) {
                self.other_names.put(node.id, handle);
            }
            // Forgotten meanwhile.
            if self.find_resident(node.id).is_none() {
                self.other_names.remove(node.id);
            }
        }
        true
    }

    /// By a place that leads to the file still.
    fn handle_at(&self, place: &Place, found: &Found) -> Option<Handle> {
        let directory = self.find_resident(place.parent)?;
        let handle = self.with_dir(&directory, |dir| handle_in(dir, &place.name, found.stat.ino));
        handle.ok().flatten()
    }
}

fn handle_in(dir: BorrowedFd<'_>, name: &CStr, ino: u64) -> Option<Handle> {
    let seen = rustix::fs::statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::INO).ok()?;
    if seen.stx_ino != ino {
        return None;
    }
    Handle::of_other_name(dir, name)
}
