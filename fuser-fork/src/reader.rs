//! The clones of one session, and the debt of a reply to the clone that read its request.
//!
//! Invariant: a reply leaves by the device that read the request ([`Owed`] holds that device), and
//! every debt is paid: one that is dropped unspent answers `EIO` and is counted. Clones that the
//! kernel or the machine refuses are fewer clones, said and explained, never a failed mount.
//! It must not dispatch, and keeps no table of requests.

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::device::{Device, DeviceError, ReplyOutcome};
use crate::frame::{Frame, error_reply, out_header};

/// More clones than this are never made.
pub const CLONES_MAX: usize = 64;

/// Fewer clones than were asked for.
#[derive(Debug, thiserror::Error)]
#[error("{have} of {wanted} readers: the session could not be cloned further")]
pub struct Shortfall {
    /// How many were asked for (at most [`CLONES_MAX`]).
    pub wanted: usize,
    /// How many there are, the session's own fd included.
    pub have: usize,
    /// Why the next one failed.
    pub source: DeviceError,
}

/// The fds of one session: its first one, and clones of it.
#[derive(Debug)]
pub struct Clones {
    devices: Vec<Arc<Device>>,
    shortfall: Option<Shortfall>,
}

impl Clones {
    /// Clones a mounted session until there are `wanted` fds (at least one, the session's own).
    pub fn open(session: Device, wanted: usize) -> Clones {
        let wanted = wanted.clamp(1, CLONES_MAX);
        let mut devices = vec![Arc::new(session)];
        while devices.len() < wanted {
            match Device::clone_of(&devices[0]) {
                Ok(clone) => devices.push(Arc::new(clone)),
                Err(source) => {
                    let have = devices.len();
                    let shortfall = Some(Shortfall { wanted, have, source });
                    return Clones { devices, shortfall };
                }
            }
        }
        Clones { devices, shortfall: None }
    }

    /// Those that another process has opened, the session's first fd first; at least one.
    pub fn adopt(devices: Vec<Device>) -> Clones {
        Clones { devices: devices.into_iter().map(Arc::new).collect(), shortfall: None }
    }

    /// One device a lane; the first is the session's own. All must live as long as the mount.
    pub fn devices(&self) -> &[Arc<Device>] {
        &self.devices
    }

    /// Why there are fewer than wanted, if so.
    pub fn shortfall(&self) -> Option<&Shortfall> {
        self.shortfall.as_ref()
    }

    /// Replies owed and dropped, over all devices.
    pub fn dropped_replies(&self) -> u64 {
        self.devices.iter().map(|device| device.dropped_replies()).sum()
    }
}

/// A reply that the kernel waits for: the request's id and the device that read it.
///
/// Must be spent by [`Owed::reply`], [`Owed::error`] or [`Owed::into_unique`]; a dropped one
/// answers `EIO`.
#[must_use = "the kernel waits for this reply"]
#[derive(Debug)]
pub struct Owed {
    device: Arc<Device>,
    unique: u64,
    spent: bool,
}

impl Owed {
    /// The debt for a request that `device` read; `None` where the kernel takes no reply.
    pub fn of(device: &Arc<Device>, frame: &Frame<'_>) -> Option<Owed> {
        let unique = frame.unique();
        frame.wants_reply().then(|| Owed { device: Arc::clone(device), unique, spent: false })
    }

    /// The request's id.
    pub fn unique(&self) -> u64 {
        self.unique
    }

    /// Replies `body`; one write, without a copy.
    pub fn reply(mut self, body: &[u8]) -> Result<ReplyOutcome, DeviceError> {
        self.spent = true;
        let header = out_header(self.unique, body.len());
        self.device.reply_vectored(&[IoSlice::new(&header), IoSlice::new(body)])
    }

    /// Replies an error (a positive errno).
    pub fn error(mut self, errno: i32) -> Result<ReplyOutcome, DeviceError> {
        self.spent = true;
        self.device.reply(&error_reply(self.unique, errno))
    }

    /// Hands the debt over to a table of the caller's: from now on it answers for the reply.
    pub fn into_unique(mut self) -> u64 {
        self.spent = true;
        self.unique
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        if self.spent {
            return;
        }
        self.device.dropped_replies.fetch_add(1, Ordering::Relaxed);
        let errno = rustix::io::Errno::IO.raw_os_error();
        let outcome = self.device.reply(&error_reply(self.unique, errno));
        tracing::error!(unique = self.unique, ?outcome, "a reply was dropped, answered EIO");
    }
}
