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
        let spawned = thread.spawn(move || {
            match Notice::prune(&ids).send(&device) {
                Ok(NotifyOutcome::Unsupported) => {
                    return tracing::debug!("the kernel forgets by itself alone");
                }
                Ok(NotifyOutcome::Unmounted) => return,
                Ok(NotifyOutcome::Done | NotifyOutcome::NotCached | NotifyOutcome::InUse) => {}
                Err(error) => tracing::warn!(%error, "cannot ask the kernel to forget"),
            }
            prune.0.store(false, Ordering::Release);
        });
        if spawned.is_err() {
            self.0.store(false, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fuser_fork::device::DEVICE_PATH;
    use std::time::{Duration, Instant};

    #[test]
    fn it_is_asked_again_after_an_error() {
        let (reader, _writer) = rustix::pipe::pipe().expect("a pipe");
        let device = Arc::new(Device::from_fd(reader, DEVICE_PATH));
        let prune = Prune::default();
        prune.ask(&device, &7u64.to_le_bytes());
        let deadline = Instant::now() + Duration::from_secs(10);
        while prune.0.load(Ordering::Acquire) {
            assert!(Instant::now() < deadline, "it is never asked again");
            std::thread::yield_now();
        }
    }
}
