//! Where a share is, and the socket that leads there.
//!
//! `NAME[/SUB]@unix:PATH` or `NAME[/SUB]@vsock:CID:PORT`. Invariant: a [`Socket`] is connected,
//! blocking, and sends in pieces that its transport carries. It must not know batches or records.

use nix::libc;
use nix::sys::socket::{
    AddressFamily, SetSockOpt, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr,
};
use ringfs_wire::limits::{SHARE_NAME_BYTES_MAX, SUBDIR_BYTES_MAX};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, sockopt};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;

/// vhost-device-vsock loses connections that send more than 32 KiB at once.
const VSOCK_PIECE_BYTES: usize = 32 << 10;
/// Recent guest kernels reset a connection when some hundred small packets wait in the default
/// 256 KiB; 8 MiB are room for all replies that can be owed.
const VSOCK_BUFFER_BYTES: u64 = 8 << 20;

/// `VMADDR_CID_HOST`.
const HOST_CID: u32 = 2;

/// Holds the largest batch; the kernel doubles it, as it counts its own headers too.
const UNIX_SEND_BUFFER_BYTES: usize = 1152 << 10;

/// Where a daemon listens, as seen from here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// `AF_VSOCK`; the host is CID 2.
    Vsock {
        /// The machine.
        cid: u32,
        /// The port.
        port: u32,
    },
}

/// What to mount, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The share's name.
    pub share: String,
    /// A directory below the share's root (no leading slash), or empty.
    pub subdir: Vec<u8>,
    /// The daemon.
    pub address: Address,
}

/// Why a source does not name a share.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "`{source_text}` names no share: {why} (expected NAME[/SUB]@unix:PATH or \
     NAME[/SUB]@vsock:CID:PORT, as in `data@vsock:2:5640`)"
)]
pub struct TargetError {
    source_text: String,
    why: &'static str,
}

/// Why there is no connection.
#[derive(Debug, Error)]
#[error("cannot connect to {address}: {cause}{cure}")]
pub struct ConnectError {
    address: Address,
    cause: io::Error,
    cure: String,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

impl Target {
    /// Reads `NAME[/SUB]@ADDRESS`.
    pub fn parse(text: &OsStr) -> Result<Target, TargetError> {
        let bytes = text.as_bytes();
        let error = |why| TargetError { source_text: text.to_string_lossy().into_owned(), why };
        let find = |needle: &[u8]| bytes.windows(needle.len()).position(|at| at == needle);
        let (name, address) = match (find(b"@unix:"), find(b"@vsock:")) {
            (Some(at), vsock) if vsock.is_none_or(|vsock| at < vsock) => {
                (&bytes[..at], unix_address(&bytes[at + 6..]).map_err(error)?)
            }
            (_, Some(at)) => (&bytes[..at], vsock_address(&bytes[at + 7..]).map_err(error)?),
            _ => return Err(error("it has no `@unix:` or `@vsock:`")),
        };
        let (share, subdir) = match name.iter().position(|&byte| byte == b'/') {
            Some(slash) => (&name[..slash], &name[slash + 1..]),
            None => (name, &[][..]),
        };
        let share = std::str::from_utf8(share).map_err(|_| error("the name is not UTF-8"))?;
        if share.is_empty() || share.len() > SHARE_NAME_BYTES_MAX {
            return Err(error("the name must have 1 to 255 bytes"));
        }
        Ok(Target {
            share: share.to_owned(),
            subdir: subdirectory(subdir).map_err(error)?,
            address,
        })
    }

    /// What the mount table shows: the normal form of what was parsed.
    pub fn source(&self) -> OsString {
        let mut text = self.share.clone().into_bytes();
        if !self.subdir.is_empty() {
            text.push(b'/');
            text.extend_from_slice(&self.subdir);
        }
        text.push(b'@');
        match &self.address {
            Address::Unix(path) => {
                text.extend_from_slice(b"unix:");
                text.extend_from_slice(path.as_os_str().as_bytes());
            }
            Address::Vsock { .. } => text.extend_from_slice(self.address.to_string().as_bytes()),
        }
        OsString::from_vec(text)
    }
}

fn unix_address(path: &[u8]) -> Result<Address, &'static str> {
    if path.is_empty() {
        return Err("the socket's path is empty");
    }
    let path = Path::new(OsStr::from_bytes(path));
    // The command may go on in the background, in another directory.
    std::path::absolute(path).map(Address::Unix).map_err(|_| "the socket's path cannot be used")
}

fn vsock_address(text: &[u8]) -> Result<Address, &'static str> {
    let numbers = std::str::from_utf8(text).ok().and_then(|text| text.split_once(':'));
    let (cid, port) = numbers.ok_or("a vsock address is CID:PORT")?;
    Ok(Address::Vsock {
        cid: cid.parse().map_err(|_| "the CID is no number (the host is 2)")?,
        port: port.parse().map_err(|_| "the port is no number")?,
    })
}

fn subdirectory(path: &[u8]) -> Result<Vec<u8>, &'static str> {
    let parts: Vec<&[u8]> =
        path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&&b".."[..]) {
        return Err("the sub-directory has a `..`");
    }
    let path = parts.join(&b'/');
    if path.len() > SUBDIR_BYTES_MAX { Err("the sub-directory is too long") } else { Ok(path) }
}

/// A connected stream socket.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    piece_bytes: usize,
}

impl Socket {
    /// Connects; `limit` bounds this and, until [`Socket::set_limit`], each send and receive.
    pub fn connect(address: &Address, limit: Duration) -> Result<Socket, ConnectError> {
        let done = match address {
            Address::Unix(path) => connect_unix(path, limit),
            Address::Vsock { cid, port } => connect_vsock(*cid, *port, limit),
        };
        done.map_err(|errno| ConnectError {
            address: address.clone(),
            cause: errno.into(),
            cure: cure(address, errno),
        })
    }

    /// A socket that is connected already.
    pub fn from_fd(fd: OwnedFd) -> Socket {
        Socket { fd, piece_bytes: usize::MAX }
    }

    /// How long one send or receive may wait; `None`: for ever.
    pub fn set_limit(&self, limit: Option<Duration>) -> Result<(), Errno> {
        for which in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
            sockopt::set_socket_timeout(&self.fd, which, limit)?;
        }
        Ok(())
    }

    /// Sends all of `bytes`, in pieces that the transport carries.
    pub fn send_all(&self, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            let piece = &bytes[..bytes.len().min(self.piece_bytes)];
            match rustix::net::send(&self.fd, piece, SendFlags::NOSIGNAL) {
                Ok(0) => return Err(Errno::PIPE),
                Ok(n) => bytes = &bytes[n..],
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Receives what is there, at least a byte; 0: the peer has closed.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        loop {
            match rustix::net::recv(&self.fd, &mut *buffer, RecvFlags::empty()) {
                Ok((n, _)) => return Ok(n),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Sends what the transport takes now; `EAGAIN`: nothing.
    pub fn try_send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        let piece = &bytes[..bytes.len().min(self.piece_bytes)];
        rustix::net::send(&self.fd, piece, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    /// Receives what is there; `EAGAIN`: nothing. 0: the peer has closed.
    pub fn try_receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        rustix::net::recv(&self.fd, buffer, RecvFlags::DONTWAIT).map(|(n, _)| n)
    }

    /// Ends both directions: who waits in a send or receive is woken.
    pub fn shutdown(&self) {
        // An error says that it is over already.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn stream_socket(family: AddressFamily, limit: Duration) -> Result<OwnedFd, Errno> {
    let made = nix::sys::socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
    let fd = made.map_err(errno_of)?;
    for which in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
        sockopt::set_socket_timeout(&fd, which, Some(limit))?;
    }
    Ok(fd)
}

fn connect(fd: &OwnedFd, address: &dyn SockaddrLike) -> Result<(), Errno> {
    nix::sys::socket::connect(fd.as_raw_fd(), address).map_err(errno_of)
}

fn connect_unix(path: &Path, limit: Duration) -> Result<Socket, Errno> {
    let address = UnixAddr::new(path).map_err(errno_of)?;
    let fd = stream_socket(AddressFamily::Unix, limit)?;
    // Room for a whole 1 MiB write: the sender need not wait for the daemon half way. Without it
    // (no CAP_NET_ADMIN) all works, in more steps.
    if sockopt::set_socket_send_buffer_size_force(&fd, UNIX_SEND_BUFFER_BYTES).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(&fd, UNIX_SEND_BUFFER_BYTES);
    }
    connect(&fd, &address)?;
    Ok(Socket::from_fd(fd))
}

fn connect_vsock(cid: u32, port: u32, limit: Duration) -> Result<Socket, Errno> {
    let fd = stream_socket(AddressFamily::Vsock, limit)?;
    // Both before connect: the peer is told the buffer's size as credit when it is asked.
    VsockBufferMaxSize.set(&fd, &VSOCK_BUFFER_BYTES).map_err(errno_of)?;
    VsockBufferSize.set(&fd, &VSOCK_BUFFER_BYTES).map_err(errno_of)?;
    connect(&fd, &VsockAddr::new(cid, port))?;
    Ok(Socket { fd, piece_bytes: VSOCK_PIECE_BYTES })
}

fn errno_of(errno: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(errno as i32)
}

/// `include/uapi/linux/vm_sockets.h`; the options' level is the address family.
const SO_VM_SOCKETS_BUFFER_SIZE: libc::c_int = 0;
const SO_VM_SOCKETS_BUFFER_MAX_SIZE: libc::c_int = 2;

#[derive(Clone)]
struct VsockBufferMaxSize;
#[derive(Clone)]
struct VsockBufferSize;
nix::setsockopt_impl!(
    VsockBufferMaxSize,
    libc::AF_VSOCK,
    SO_VM_SOCKETS_BUFFER_MAX_SIZE,
    u64,
    nix::sys::socket::sockopt::SetStruct<u64>
);
nix::setsockopt_impl!(
    VsockBufferSize,
    libc::AF_VSOCK,
    SO_VM_SOCKETS_BUFFER_SIZE,
    u64,
    nix::sys::socket::sockopt::SetStruct<u64>
);

fn cure(address: &Address, errno: Errno) -> String {
    match (address, errno) {
        (Address::Vsock { cid: HOST_CID, port }, Errno::CONNRESET | Errno::CONNREFUSED) => {
            return format!(
                "; nobody serves port {port} of the host: start ringfsd there with `--listen \
                 unix:UDS_PATH_{port}` (Firecracker, Cloud Hypervisor, vhost-device-vsock; with \
                 `,owner=` the VMM's user, or that one may not connect) or `vsock:{port}` \
                 (vhost-vsock), or correct the port"
            );
        }
        (Address::Vsock { cid: HOST_CID, .. }, Errno::TIMEDOUT | Errno::AGAIN) => {
            "; the host did not answer: is the VM's vsock device served there?"
        }
        (Address::Vsock { cid: HOST_CID, .. }, Errno::NODEV | Errno::ADDRNOTAVAIL) => {
            "; this machine has no vsock device: give the VM one"
        }
        (Address::Unix(_), Errno::NOENT) => {
            "; no such socket: start `ringfsd --listen unix:PATH`, or correct the path"
        }
        (Address::Unix(_), Errno::CONNREFUSED) => "; nobody listens there: is ringfsd running?",
        (Address::Unix(path), Errno::ACCESS) => return who_may(path),
        (Address::Unix(_), Errno::NAMETOOLONG) => "; a socket's path has at most 107 bytes",
        (Address::Unix(_), Errno::AGAIN) => "; the listener accepts nobody: is ringfsd stuck?",
        (Address::Vsock { .. }, Errno::AFNOSUPPORT) => {
            "; this kernel has no vsock: load vmw_vsock_virtio_transport"
        }
        (Address::Vsock { .. }, Errno::NODEV | Errno::ADDRNOTAVAIL) => {
            "; this machine has no such CID (the host is 2)"
        }
        (Address::Vsock { .. }, Errno::CONNRESET | Errno::CONNREFUSED) => {
            "; nobody listens on that port of that CID (the host is 2): is ringfsd running there?"
        }
        (Address::Vsock { .. }, Errno::TIMEDOUT | Errno::AGAIN) => {
            "; no answer from that CID (the host is 2)"
        }
        _ => "",
    }
    .to_owned()
}

/// Why this user may not connect to a socket, and how he may.
fn who_may(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let cure = "on the host, ringfsd's `--listen unix:PATH,owner=USER` (or group=, mode=) lets \
                others in than the user it runs as";
    match std::fs::metadata(path) {
        Ok(meta) => {
            let (mode, uid, gid) = (meta.mode() & 0o777, meta.uid(), meta.gid());
            format!("; the socket has mode {mode:04o} of {uid}:{gid}, which keeps you out: {cure}")
        }
        Err(_) => "; a directory on the way to the socket keeps you out".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_that_name_a_share() {
        let check = |text: &str, share: &str, subdir: &str, address: &str, normal: &str| {
            let target = Target::parse(OsStr::new(text)).expect(text);
            assert_eq!(target.share, share, "{text}");
            assert_eq!(target.subdir, subdir.as_bytes(), "{text}");
            assert_eq!(target.address.to_string(), address, "{text}");
            assert_eq!(target.source(), normal, "{text}");
        };
        check("data@vsock:2:5640", "data", "", "vsock:2:5640", "data@vsock:2:5640");
        check("d/a//b/@unix:/s", "d", "a/b", "unix:/s", "d/a/b@unix:/s");
        check("d/./a@b@unix:/x@y", "d", "a@b", "unix:/x@y", "d/a@b@unix:/x@y");
        check("d/@vsock:1:2", "d", "", "vsock:1:2", "d@vsock:1:2");
        check("d@unix:/a@vsock:1:2", "d", "", "unix:/a@vsock:1:2", "d@unix:/a@vsock:1:2");
    }

    #[test]
    fn sources_that_name_none() {
        let long = format!("{}@unix:/s", "n".repeat(256));
        let cases = [
            ("", "no `@unix:`"),
            ("data", "no `@unix:`"),
            ("data:/x", "no `@unix:`"),
            ("data@tcp:1:2", "no `@unix:`"),
            ("@unix:/s", "1 to 255"),
            ("/sub@unix:/s", "1 to 255"),
            (&long, "1 to 255"),
            ("d@unix:", "path is empty"),
            ("d@vsock:2", "CID:PORT"),
            ("d@vsock:host:1", "the CID is no number"),
            ("d@vsock:2:-1", "the port is no number"),
            ("d/../x@unix:/s", "`..`"),
        ];
        for (text, expected) in cases {
            let error = Target::parse(OsStr::new(text)).expect_err(text).to_string();
            assert!(error.contains(expected) && error.contains("vsock:2:5640"), "{error}");
        }
    }

    #[test]
    fn a_failed_connect_names_address_and_cure() {
        let limit = Duration::from_secs(1);
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("s");
        let check = |path: &Path, expected: &str| {
            let error =
                Socket::connect(&Address::Unix(path.to_owned()), limit).expect_err(expected);
            let text = error.to_string();
            assert!(text.contains(expected) && text.contains("unix:"), "{text}");
        };
        check(&path, "start `ringfsd");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bind"));
        check(&path, "is ringfsd running");
        check(Path::new(&format!("/{}", "x".repeat(200))), "at most 107");
        // Root may connect to any: what others are told.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&path, mode).expect("chmod");
        let told = cure(&Address::Unix(path.clone()), Errno::ACCESS);
        assert!(told.contains("has mode 0600 of ") && told.contains(",owner=USER"), "{told}");
        let told = cure(&Address::Unix(path.join("s")), Errno::ACCESS);
        assert!(told.contains("a directory on the way"), "{told}");
        for (cid, errno, expected) in [
            (2, Errno::CONNRESET, "`--listen unix:UDS_PATH_5640`"),
            (2, Errno::TIMEDOUT, "the host did not answer"),
            (3, Errno::CONNRESET, "of that CID (the host is 2)"),
            (3, Errno::TIMEDOUT, "no answer from that CID"),
        ] {
            let cure = cure(&Address::Vsock { cid, port: 5640 }, errno);
            assert!(cure.contains(expected), "{cure}");
        }
    }
}
