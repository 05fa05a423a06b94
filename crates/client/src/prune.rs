//! Nodes that the daemon would like to have back: the kernel is asked to forget them (Linux 6.18).
//!
//! Invariant: no lane waits for it. The kernel drops thousands of nodes and their pages at once: so
//! a thread of its own asks, one at a time, and what comes meanwhile is dropped, since the daemon
//! asks again. A kernel that cannot is asked once. (It waits for no request: see apart.rs.)

use fuser_fork::device::Device;
use fuser_fork::notify::{Notice, NotifyOutcome};
use ringfs_wire::limits::FORGETS_PER_RECORD_MAX;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the kernel is being asked, or need not be.
#[derive(Clone, Debug, Default)]
pub struct Prune(Arc<AtomicBool>);

impl Prune {
    /// The body of a NOTIFY: node ids. More than a daemon asks for at once are left out.
    pub fn ask(&self, device: &Arc<Device>, body: &[u8]) {
        if self.0.swap(true, Ordering::AcqRel) {
            return;
        }
        let (ids, _) = body.as_chunks();
        let ids = ids.iter().take(FORGETS_PER_RECORD_MAX).map(|id| u64::from_le_bytes(*id));
        let (ids, device, prune) = (ids.collect::<Vec<_>>(), Arc::clone(device), self.clone());
        let thread = std::thread::Builder::new().name("prune".into());
        let spawned = thread.spawn(move || match Notice::prune(&ids).send(&device) {
            Ok(NotifyOutcome::Unsupported) => tracing::debug!("the kernel forgets by itself alone"),
            Ok(NotifyOutcome::Unmounted) => {}
            Ok(NotifyOutcome::Done | NotifyOutcome::NotCached | NotifyOutcome::InUse) => {
                prune.0.store(false, Ordering::Release);
            }
            Err(error) => tracing::warn!(%error, "cannot ask the kernel to forget"),
        });
        if spawned.is_err() {
            self.0.store(false, Ordering::Release);
        }
    }
}
