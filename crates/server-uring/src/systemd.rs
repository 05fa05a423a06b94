//! What systemd and a daemon tell each other, without its library: sockets that were bound for it
//! (sd_listen_fds(3)), and how it is (sd_notify(3)). Whoever speaks the same way may start it.

use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// The first fd that is passed.
const FIRST_FD: i32 = 3;

/// How many sockets this process was started with.
pub fn passed() -> usize {
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    let ours = number("LISTEN_PID") == Some(std::process::id());
    if ours { number("LISTEN_FDS").unwrap_or(0) as usize } else { 0 }
}

/// The sockets, with their names (`FileDescriptorName=`); one without a name is `unknown`.
///
/// # Errors
/// One is not there.
pub fn take() -> rustix::io::Result<Vec<(String, OwnedFd)>> {
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').filter(|name| !name.is_empty());
    let passed = passed();
    if passed == 0 {
        return Ok(Vec::new());
    }
    let process = pidfd_open(getpid(), PidfdFlags::empty())?;
    let sockets = (0..passed).map(|at| {
        let name = names.next().unwrap_or("unknown").to_owned();
        let fd = FIRST_FD + i32::try_from(at).unwrap_or(i32::MAX - FIRST_FD);
        Ok((name, pidfd_getfd(&process, fd, PidfdGetfdFlags::empty())?))
    });
    sockets.collect()
}

/// Whoever wants to know how the daemon is, if anybody.
pub struct Notify {
    to: Option<(OwnedFd, SocketAddrUnix)>,
    /// How often it wants to hear that the daemon lives.
    pub watchdog: Option<Duration>,
}

impl Notify {
    /// As the environment says.
    pub fn from_environment() -> Notify {
        let to = std::env::var_os("NOTIFY_SOCKET").and_then(|path| connect(&path));
        let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|&us| ours && us > 0 && to.is_some());
        Notify { to, watchdog: watchdog.map(|us| Duration::from_micros(us / 2)) }
    }

    /// It serves: `status` is for people.
    pub fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\nSTATUS={status}"));
    }

    /// It reads its configuration again; [`Notify::ready`] comes after that.
    pub fn reloading(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let us = now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000;
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={us}"));
    }

    /// It ends.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// It lives.
    pub fn alive(&self) {
        if self.watchdog.is_some() {
            self.tell("WATCHDOG=1");
        }
    }

    fn tell(&self, what: &str) {
        let Some((socket, to)) = &self.to else { return };
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        if let Err(error) = rustix::net::sendto(socket, what.as_bytes(), flags, to) {
            tracing::warn!(%error, "cannot tell the service manager {what:?}");
        }
    }
}

fn connect(path: &OsStr) -> Option<(OwnedFd, SocketAddrUnix)> {
    let to = match path.as_bytes().split_first()? {
        (b'@', name) => SocketAddrUnix::new_abstract_name(name).ok()?,
        (_, _) => SocketAddrUnix::new(path).ok()?,
    };
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None);
    Some((socket.ok()?, to))
}
