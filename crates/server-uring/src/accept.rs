//! Listeners and peers: the parent's side. It binds, accepts, tells who the peer is, and hands the
//! fd on; it reads no byte that a guest sent. That is [`crate::greet`]'s, on the worker's side.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use thiserror::Error;

/// Where guests come from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// A Unix socket; for Firecracker and its kind, `<uds_path>_<port>`.
    Unix(PathBuf),
    /// AF_VSOCK; `cid` limits it to one peer, `u32::MAX` is any.
    Vsock {
        /// The guest that may connect.
        cid: u32,
        /// The port to listen on.
        port: u32,
    },
    /// TCP: for metrics alone, guests cannot come so.
    Tcp(SocketAddr),
}

/// Any CID.
pub const CID_ANY: u32 = u32::MAX;

/// Why there is no listener.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ListenError {
    #[error("cannot read the address {0:?}: it is unix:PATH, vsock:PORT or vsock:CID:PORT")]
    Address(String),
    #[error("cannot listen on {path:?}{hint}")]
    Unix { path: PathBuf, source: std::io::Error, hint: &'static str },
    #[error(
        "cannot listen on vsock port {port} (is the module vhost_vsock or vsock_loopback loaded?)"
    )]
    Vsock { port: u32, source: std::io::Error },
    #[error("a socket that was passed is none to accept on (Accept=no, ListenStream=)")]
    Passed(#[source] std::io::Error),
    #[error("cannot listen on tcp:{address}")]
    Tcp { address: SocketAddr, source: std::io::Error },
}

impl FromStr for Address {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Address, ListenError> {
        let bad = || ListenError::Address(text.to_owned());
        match text.split_once(':').ok_or_else(bad)? {
            ("unix", path) if !path.is_empty() => Ok(Address::Unix(path.into())),
            ("vsock", rest) => {
                let (cid, port) = match rest.split_once(':') {
                    Some((cid, port)) => (cid.parse().map_err(|_| bad())?, port),
                    None => (CID_ANY, rest),
                };
                Ok(Address::Vsock { cid, port: port.parse().map_err(|_| bad())? })
            }
            _ => Err(bad()),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = ListenError;
    fn try_from(text: String) -> Result<Address, ListenError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.to_string()
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Vsock { cid: CID_ANY, port } => write!(f, "vsock:{port}"),
            Address::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Address::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// What those who connect want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// A share.
    Guests,
    /// To ask about the daemon: see control.rs.
    Control,
    /// Metrics: see prometheus.rs.
    Metrics,
}

/// A bound socket. Its path goes with it, if it was bound here.
pub struct Listener {
    address: Address,
    socket: OwnedFd,
    passed: bool,
}

/// A connection of which nothing was read yet.
pub struct Accepted {
    /// The stream, non-blocking.
    pub socket: OwnedFd,
    /// The peer, for people: the listener and who is at the other end.
    pub peer: String,
    /// Equal for all connections of one peer while it lives: of a listener's path and a process (a
    /// VMM, or a client), or of a CID.
    pub owner: u64,
}

impl Listener {
    /// Binds. A socket file that nobody listens on any more is taken over.
    pub fn bind(address: Address) -> Result<Listener, ListenError> {
        Listener::bind_mode(address, None)
    }

    /// Binds so that only the daemon's user may connect.
    pub fn bind_private(address: Address) -> Result<Listener, ListenError> {
        Listener::bind_mode(address, Some(Mode::RUSR | Mode::WUSR))
    }

    /// A socket that somebody has bound, and goes on owning.
    ///
    /// # Errors
    /// It is none to listen on.
    pub fn passed(socket: OwnedFd) -> Result<Listener, ListenError> {
        let wrong = |what| ListenError::Passed(what);
        let listens = net::sockopt::socket_acceptconn(&socket).map_err(|e| wrong(e.into()))?;
        let name = net::getsockname(&socket).map_err(|e| wrong(e.into()))?;
        let address = if !listens {
            None
        } else if name.address_family() == AddressFamily::VSOCK {
            let listener = vsock::VsockListener::from(socket.try_clone().map_err(wrong)?);
            let port = listener.local_addr().map_err(wrong)?.port();
            Some(Address::Vsock { cid: CID_ANY, port })
        } else if let Ok(unix) = SocketAddrUnix::try_from(name.clone()) {
            let path = unix.path_bytes().map(|path| path.strip_suffix(b"\0").unwrap_or(path));
            path.map(|path| Address::Unix(OsStr::from_bytes(path).into()))
        } else {
            SocketAddr::try_from(name).ok().map(Address::Tcp)
        };
        let address = address.ok_or_else(|| wrong(std::io::ErrorKind::InvalidInput.into()))?;
        rustix::io::ioctl_fionbio(&socket, true).map_err(|e| wrong(e.into()))?;
        Ok(Listener { address, socket, passed: true })
    }

    /// Somebody else has bound it.
    pub fn is_passed(&self) -> bool {
        self.passed
    }

    /// Where it is bound.
    pub fn address(&self) -> &Address {
        &self.address
    }

    fn bind_mode(address: Address, mode: Option<Mode>) -> Result<Listener, ListenError> {
        let socket = match &address {
            Address::Unix(path) => bind_unix(path, mode)?,
            Address::Vsock { port, .. } => {
                let source = |source| ListenError::Vsock { port: *port, source };
                let listener = vsock::VsockListener::bind_with_cid_port(CID_ANY, *port);
                let listener = listener.map_err(source)?;
                listener.set_nonblocking(true).map_err(source)?;
                OwnedFd::from(listener)
            }
            Address::Tcp(address) => {
                let source = |source| ListenError::Tcp { address: *address, source };
                let listener = TcpListener::bind(address).map_err(source)?;
                listener.set_nonblocking(true).map_err(source)?;
                OwnedFd::from(listener)
            }
        };
        Ok(Listener { address, socket, passed: false })
    }

    /// Takes one connection; `None` when none waits or it may not come in.
    fn accept(&self) -> Result<Option<Accepted>, Errno> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match &self.address {
            Address::Unix(path) => {
                let socket = match net::accept_with(&self.socket, flags) {
                    Ok(socket) => socket,
                    Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(None),
                    Err(errno) => return Err(errno),
                };
                let peer = match net::sockopt::socket_peercred(&socket) {
                    Ok(cred) => format!("{} pid {}", path.display(), cred.pid.as_raw_pid()),
                    Err(_) => path.display().to_string(),
                };
                let owner = owner_of(&peer);
                Ok(Some(Accepted { socket, peer, owner }))
            }
            Address::Vsock { cid, port } => accept_vsock(&self.socket, *cid, *port),
            Address::Tcp(address) => match net::accept_with(&self.socket, flags) {
                Ok(socket) => Ok(Some(Accepted { socket, peer: address.to_string(), owner: 0 })),
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
                Err(errno) => Err(errno),
            },
        }
    }
}

fn accept_vsock(socket: &OwnedFd, cid: u32, port: u32) -> Result<Option<Accepted>, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = match net::accept_with(socket, flags) {
        Ok(socket) => socket,
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    let stream = vsock::VsockStream::from(socket);
    let Ok(peer) = stream.peer_addr() else { return Ok(None) };
    if cid != CID_ANY && peer.cid() != cid {
        tracing::warn!(port, cid = peer.cid(), "refused: the listener is for CID {cid}");
        return Ok(None);
    }
    let owner = owner_of(&peer.cid());
    let peer = format!("vsock:{}:{}", peer.cid(), peer.port());
    Ok(Some(Accepted { socket: stream.into(), peer, owner }))
}

fn owner_of(peer: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    peer.hash(&mut hasher);
    hasher.finish()
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address
            && !self.passed
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn bind_unix(path: &Path, mode: Option<Mode>) -> Result<OwnedFd, ListenError> {
    let error = |source: Errno, hint| ListenError::Unix {
        path: path.to_owned(),
        source: source.into(),
        hint,
    };
    let address = SocketAddrUnix::new(path)
        .map_err(|e| error(e, " (the path of a Unix socket has at most 107 bytes)"))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| error(e, ""))?;
    let bound = match net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            // Connecting to what is no socket is refused too, and it is not ours to remove.
            if !is_socket(path) {
                return Err(error(Errno::ADDRINUSE, " (something else has this name)"));
            }
            if is_alive(&address) {
                return Err(error(Errno::ADDRINUSE, " (another daemon listens there)"));
            }
            tracing::info!(?path, "taking over a socket that nobody listens on");
            std::fs::remove_file(path).map_err(|source| ListenError::Unix {
                path: path.to_owned(),
                source,
                hint: "",
            })?;
            net::bind(&socket, &address)
        }
        other => other,
    };
    bound.map_err(|e| match e {
        Errno::NOENT => error(e, " (its directory does not exist)"),
        Errno::ACCESS => error(e, " (no right to make a file there)"),
        _ => error(e, ""),
    })?;
    if let Some(mode) = mode {
        // Nobody gets in before it listens.
        rustix::fs::chmod(path, mode).map_err(|e| error(e, " (its mode cannot be set)"))?;
    }
    net::listen(&socket, 128).map_err(|e| error(e, ""))?;
    Ok(socket)
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
}

/// Whether somebody listens on the socket file.
fn is_alive(address: &SocketAddrUnix) -> bool {
    // Who listens but does not accept must not hold this up.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let Ok(probe) = probe else { return true };
    net::connect(&probe, address) != Err(Errno::CONNREFUSED)
}

/// Accepts until one of `wakes` becomes readable, and tells which; each connection goes to
/// `hand_on`, and every so `often` there is a `beat`. `None`: nothing can be waited for.
pub fn run(
    listeners: &[(Door, Listener)],
    wakes: &[&UnixStream],
    (often, beat): (Option<Duration>, &dyn Fn()),
    mut hand_on: impl FnMut(Door, Accepted),
) -> Option<usize> {
    let mut exhausted = false;
    loop {
        let mut fds: Vec<_> = wakes
            .iter()
            .map(|wake| PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN))
            .collect();
        if !exhausted {
            let sockets = listeners.iter().map(|(_, l)| l.socket.as_fd());
            fds.extend(sockets.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        }
        // Out of fds: the listeners stay readable, so they are left alone for a while.
        let pause = exhausted.then_some(Duration::from_millis(100)).or(often);
        let pause = pause.and_then(|pause| Timespec::try_from(pause).ok());
        beat();
        match poll(&mut fds, pause.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "cannot wait for connections");
                return None;
            }
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let (woken, ready) = ready.split_at(wakes.len());
        if let Some(wake) = woken.iter().position(|&woken| woken) {
            return Some(wake);
        }
        exhausted = false;
        for ((door, listener), _) in listeners.iter().zip(ready).filter(|(_, ready)| **ready) {
            match listener.accept() {
                Ok(Some(accepted)) => hand_on(*door, accepted),
                Ok(None) => {}
                Err(error) => {
                    let listener = &listener.address;
                    tracing::warn!(%listener, %error, "cannot accept (too few open files?)");
                    exhausted = true;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let check = |text: &str, expected: Option<Address>| {
            assert_eq!(text.parse::<Address>().ok(), expected, "{text}");
        };
        check("unix:/run/x", Some(Address::Unix("/run/x".into())));
        check("vsock:5640", Some(Address::Vsock { cid: CID_ANY, port: 5640 }));
        check("vsock:3:5640", Some(Address::Vsock { cid: 3, port: 5640 }));
        for bad in ["", "unix:", "vsock:", "vsock:x", "vsock:1:2:3", "tcp:1", "/run/x", "vsock:-1"]
        {
            check(bad, None);
        }
    }

    #[test]
    fn a_stale_socket_is_taken_over_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bind"));
        assert!(path.exists(), "std leaves the file: it is stale now");
        let ours = Listener::bind(Address::Unix(path.clone())).expect("taken over");
        assert!(matches!(
            Listener::bind(Address::Unix(path.clone())),
            Err(ListenError::Unix { hint: " (another daemon listens there)", .. })
        ));
        drop(ours);
        assert!(!path.exists());
        std::fs::write(&path, "precious").expect("write");
        assert!(Listener::bind(Address::Unix(path.clone())).is_err());
        assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
    }
}
