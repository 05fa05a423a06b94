//! The service manager as a second keeper: what the first one holds of a session is in systemd's
//! fd store too, so that its death is survived (sd_notify(3), sd_listen_fds(3)).
//!
//! ```text
//! ringfs-file       the memory file that a client leaves
//! ringfs-device-N   the session's /dev/fuse (0), and its clones
//! ```
//!
//! Invariant: the store holds all of one session or nothing that is believed. Whoever speaks the
//! same protocol may be the manager; what it gives back is looked at, as it may be of another
//! mount or another version. It must not serve anything.

use crate::keep::Keep;
use crate::rings::with_causes;
use crate::status::{self, Entry};
use fuser_fork::device::is_over;
use fuser_fork::mount::{mount_at, unmount_identity};
use fuser_fork::mountinfo::find_mounts;
use fuser_fork::passed;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, IoSlice};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use rustix::pipe::{PipeFlags, pipe_with};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;

const FILE: &str = "ringfs-file";
const DEVICE: &str = "ringfs-device-";
/// How long the manager may take; it is asked once a mount.
const LIMIT: Duration = Duration::from_secs(5);

/// Why there is no store.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum FdStoreError {
    #[error("--fd-store is for a service with Type=notify: there is no NOTIFY_SOCKET")]
    NoManager,
    #[error("cannot reach the service manager at {socket}")]
    Manager { socket: String, source: Errno },
    #[error("the service manager keeps {room} fds and {fds} are needed: FileDescriptorStoreMax=16")]
    Room { room: usize, fds: usize },
    #[error("the service manager does not answer")]
    Silent,
}

/// What was in the store of a mount that lives.
#[derive(Debug)]
pub struct Stored {
    /// The file, and the devices in their order.
    pub fds: Vec<OwnedFd>,
    /// Mount id, number of the connection, and where it is.
    pub mounted: (u32, u32, PathBuf),
}

/// The manager of this service.
#[derive(Debug)]
pub struct FdStore {
    manager: OwnedFd,
    /// Names that are in the store, as far as we know.
    names: Vec<String>,
}

fn send(manager: &OwnedFd, text: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOBIG);
    }
    let text = [IoSlice::new(text.as_bytes())];
    rustix::net::sendmsg(manager, &text, &mut control, SendFlags::NOSIGNAL).map(drop)
}

impl FdStore {
    /// The manager that the environment names.
    pub fn from_environment() -> Result<FdStore, FdStoreError> {
        let path = std::env::var_os("NOTIFY_SOCKET").ok_or(FdStoreError::NoManager)?;
        let connected = connect(&path).map_err(|source| {
            let socket = path.to_string_lossy().into_owned();
            FdStoreError::Manager { socket, source }
        });
        Ok(FdStore { manager: connected?, names: Vec::new() })
    }

    /// What a keeper before us has stored of a mount that lives and is of `source`; anything else
    /// is let go. `mountpoint`: where it is if nobody can tell.
    pub fn take(&mut self, source: &OsStr, mountpoint: &Path) -> Option<Stored> {
        let stored = self.take_living(source, mountpoint);
        if stored.is_none() {
            self.forget();
            remove_dead(source, mountpoint);
        }
        stored
    }

    fn take_living(&mut self, source: &OsStr, mountpoint: &Path) -> Option<Stored> {
        let mut file = None;
        let mut devices = BTreeMap::new();
        for (name, fd) in passed::take() {
            let number = name.strip_prefix(DEVICE).and_then(|number| number.parse::<u8>().ok());
            match number {
                Some(number) => drop(devices.insert(number, fd)),
                None if name == FILE => file = Some(fd),
                None => continue,
            }
            self.names.push(name);
        }
        let (file, session) = (file?, devices.remove(&0)?);
        if is_over(session.as_fd()) {
            tracing::warn!("the mount that was kept is gone: mounting anew");
            return None;
        }
        let identity = Keep::mounted_as(&file).unwrap_or_default();
        let place = place_of(identity);
        if let Some((its_source, its_path)) = &place
            && its_source != source
        {
            let path = its_path.display();
            tracing::warn!(%path, ?its_source, "what was kept is another share's: removing it");
            remove(its_path, identity);
            return None;
        }
        let path = place.map_or_else(|| mountpoint.to_owned(), |(_, path)| path);
        let fds = [file, session].into_iter().chain(devices.into_values()).collect();
        Some(Stored { fds, mounted: (identity.0, identity.1, path) })
    }

    /// Puts a session's fds into the store, the file first; once it returns they are there.
    pub fn keep(&mut self, fds: &[OwnedFd]) -> Result<(), FdStoreError> {
        if !self.names.is_empty() {
            return Ok(());
        }
        let room = std::env::var("FDSTORE").ok().and_then(|room| room.parse().ok());
        if let Some(room) = room.filter(|&room| room < fds.len()) {
            return Err(FdStoreError::Room { room, fds: fds.len() });
        }
        let device = |number: usize| format!("{DEVICE}{number}");
        let names = std::iter::once(FILE.to_owned()).chain((0..).map(device));
        for (name, fd) in names.zip(fds) {
            // To look at a device for us would wake the manager at each request.
            let text = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
            send(&self.manager, &text, &[fd.as_fd()]).map_err(|_| FdStoreError::Silent)?;
            self.names.push(name);
        }
        self.barrier()
    }

    /// Waits until the manager has taken all that it was sent: it looks at who sends, so it must
    /// not be behind our death.
    fn barrier(&self) -> Result<(), FdStoreError> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(|_| FdStoreError::Silent)?;
        send(&self.manager, "BARRIER=1", &[write.as_fd()]).map_err(|_| FdStoreError::Silent)?;
        drop(write);
        let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
        loop {
            match poll(&mut [PollFd::new(&read, PollFlags::IN)], Some(&limit)) {
                Ok(1..) => return Ok(()),
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => return Err(FdStoreError::Silent),
            }
        }
    }

    /// The mount is over: the store is to hold nothing of it.
    pub fn forget(&mut self) {
        for name in std::mem::take(&mut self.names) {
            self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
        }
    }

    /// The mount serves.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// The mount has ended, as it was asked to: told before that, the manager would kill what it
    /// serves still.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    fn tell(&self, text: &str) {
        if let Err(errno) = send(&self.manager, text, &[]) {
            tracing::warn!(%errno, text, "cannot tell the service manager");
        }
    }
}

fn connect(path: &OsStr) -> Result<OwnedFd, Errno> {
    let address = match path.as_bytes().split_first() {
        Some((b'@', name)) => SocketAddrUnix::new_abstract_name(name)?,
        _ => SocketAddrUnix::new(path)?,
    };
    let (kind, flags) = (SocketType::DGRAM, SocketFlags::CLOEXEC);
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    set_socket_timeout(&socket, Timeout::Send, Some(LIMIT))?;
    Ok(socket)
}

/// What is mounted by that identity, and where; `None`: it is detached, or cannot be seen.
fn place_of(identity: (u32, u32)) -> Option<(OsString, PathBuf)> {
    let mounts = find_mounts().ok()?;
    let mut ours = mounts.into_iter().filter(|its| (its.mount_id, its.dev_minor) == identity);
    ours.next().map(|its| (its.source, its.mount_point))
}

/// A mount of ours that nobody serves is in the way of the next one; of the service nobody else is
/// alive.
fn remove_dead(source: &OsStr, mountpoint: &Path) {
    let Ok(mount) = mount_at(mountpoint) else { return };
    let Ok(mounts) = status::collect(&status::dirs()) else { return };
    let is_served = |its: &Entry| its.dev_minor == mount.dev_minor && its.client.is_some();
    if mount.source == source && !mounts.iter().any(is_served) {
        let path = mount.mount_point.display();
        tracing::warn!(%path, "nobody serves the mount that is there: removing it");
        remove(&mount.mount_point, (mount.mount_id, mount.dev_minor));
    }
}

fn remove(path: &Path, identity: (u32, u32)) {
    if let Err(error) = unmount_identity(path, identity) {
        tracing::error!(error = with_causes(&error), "it stays behind, dead");
    }
}
