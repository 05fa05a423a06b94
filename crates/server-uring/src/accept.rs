//! Listeners and peers: the parent's side. It binds, accepts, tells who the peer is, and hands the
//! fd on; it reads no byte that a guest sent. That is [`crate::greet`]'s, on the worker's side.

use crate::address::{Address, CID_ANY};
use crate::config::ListenConfig;
use crate::fdops;
use crate::socket_file::{Access, SocketFile, Spot};
use crate::splice::SendBuffer;
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags};
use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why there is no listener.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ListenError {
    #[error("cannot listen on {path:?}{hint}")]
    Unix { path: PathBuf, source: std::io::Error, hint: &'static str },
    #[error(
        "{0:?} is no pattern of sockets: stars may stand in the directories of an absolute path \
         without .., the last name is the socket's"
    )]
    Pattern(PathBuf),
    #[error("cannot watch directories (fs.inotify.max_user_instances?)")]
    Watch(#[source] std::io::Error),
    #[error(
        "cannot listen on vsock port {port} (is the module vhost_vsock or vsock_loopback loaded?)"
    )]
    Vsock { port: u32, source: std::io::Error },
    #[error("a socket that was passed is none to accept on (Accept=no, ListenStream=)")]
    Passed(#[source] std::io::Error),
    #[error("cannot listen on tcp:{address}")]
    Tcp { address: SocketAddr, source: std::io::Error },
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
    config: ListenConfig,
    socket: OwnedFd,
    /// Of a Unix socket that was bound here.
    file: Option<SocketFile>,
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
    /// The shares that its listener offers; empty: all.
    pub offers: Vec<String>,
}

impl Accepted {
    /// Whether it may mount this one.
    pub fn is_offered(&self, share: &str) -> bool {
        self.offers.is_empty() || self.offers.iter().any(|name| name == share)
    }
}

impl Listener {
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
        let config = ListenConfig { address, ..Default::default() };
        Ok(Listener { config, socket, file: None, passed: true })
    }

    /// Somebody else has bound it.
    pub fn is_passed(&self) -> bool {
        self.passed
    }

    /// Binds. A socket file that nobody listens on any more is taken over.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn bind(config: &ListenConfig) -> Result<Listener, ListenError> {
        let (socket, file) = match &config.address {
            Address::Unix(path) => return Listener::bind_in(Spot::new(path), config),
            Address::Vsock { port, .. } => {
                let source = |source| ListenError::Vsock { port: *port, source };
                let listener = vsock::VsockListener::bind_with_cid_port(CID_ANY, *port);
                let listener = listener.map_err(source)?;
                listener.set_nonblocking(true).map_err(source)?;
                (OwnedFd::from(listener), None)
            }
            Address::Tcp(address) => {
                let source = |source| ListenError::Tcp { address: *address, source };
                let listener = TcpListener::bind(address).map_err(source)?;
                listener.set_nonblocking(true).map_err(source)?;
                (OwnedFd::from(listener), None)
            }
        };
        Ok(Listener { config: config.clone(), socket, file, passed: false })
    }

    /// Binds a Unix socket, whose directories are not all the operator's.
    pub(crate) fn bind_in(spot: Spot, config: &ListenConfig) -> Result<Listener, ListenError> {
        let (socket, file) = SocketFile::bind(spot, config)?;
        Ok(Listener { config: config.clone(), socket, file: Some(file), passed: false })
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.config.address
    }

    /// Whether its file is still there.
    pub fn is_in_place(&self) -> bool {
        match &self.config.address {
            Address::Unix(_) => self.file.as_ref().is_some_and(SocketFile::is_in_place),
            Address::Vsock { .. } | Address::Tcp(_) => true,
        }
    }

    /// Who may connect, where a file says so.
    pub(crate) fn access(&self) -> Option<Access> {
        match (&self.file, &self.config.address) {
            (Some(file), _) => file.access(),
            (None, Address::Unix(path)) => Access::at(&Spot::new(path)),
            (None, Address::Vsock { .. } | Address::Tcp(_)) => None,
        }
    }

    /// Other options for those who connect from now on; the address stays.
    ///
    /// # Errors
    /// The file is not there, or cannot have that mode or owner: all other options have changed.
    pub fn change(&mut self, config: &ListenConfig) -> std::io::Result<()> {
        let address = self.config.address.clone();
        self.config = ListenConfig { address, ..config.clone() };
        self.file.as_ref().map_or(Ok(()), |file| file.change(config))
    }

    /// Takes one connection; `None` when none waits or it may not come in.
    ///
    /// # Errors
    /// What accept4 says: most likely no fd is left.
    pub fn accept(&self) -> Result<Option<Accepted>, Errno> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = match net::accept_with(&self.socket, flags) {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        let greeted = match &self.config.address {
            Address::Unix(path) => self.look_at_process(path, socket),
            Address::Vsock { cid, .. } => self.look_at_vm(*cid, socket),
            Address::Tcp(address) => {
                Ok(Accepted { socket, peer: address.to_string(), owner: 0, offers: Vec::new() })
            }
        };
        Ok(greeted.map_err(|why| tracing::warn!(listener = %self.address(), "refused: {why}")).ok())
    }

    fn look_at_process(&self, path: &Path, socket: OwnedFd) -> Result<Accepted, String> {
        let may = &self.config;
        let (uid, gid, pid) = fdops::peer_of(socket.as_fd()).map_err(|error| error.to_string())?;
        for (list, name, value) in [
            (&may.allow_uid, "uid", uid),
            (&may.allow_gid, "gid", gid),
            (&may.allow_pid, "pid", pid),
        ] {
            if !list.is_empty() && !list.contains(&value) {
                return Err(format!("pid {pid}: its {name} {value} is not allowed"));
            }
        }
        // Beyond what the worker may ask for.
        let _ = SendBuffer::enlarge(socket.as_fd());
        let peer = format!("{} pid {pid}", path.display());
        let owner = owner_of(&peer);
        Ok(Accepted { socket, peer, owner, offers: may.shares.clone() })
    }

    fn look_at_vm(&self, only: u32, socket: OwnedFd) -> Result<Accepted, String> {
        let may = &self.config;
        let stream = vsock::VsockStream::from(socket);
        let peer = stream.peer_addr().map_err(|error| error.to_string())?;
        let cid = peer.cid();
        if only != CID_ANY && cid != only
            || !may.allow_cid.is_empty() && !may.allow_cid.contains(&cid)
        {
            return Err(format!("CID {cid} is not allowed"));
        }
        let owner = owner_of(&cid);
        let peer = format!("vsock:{cid}:{}", peer.port());
        Ok(Accepted { socket: stream.into(), peer, owner, offers: may.shares.clone() })
    }
}

fn owner_of(peer: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    peer.hash(&mut hasher);
    hasher.finish()
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.file.iter().for_each(SocketFile::remove);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_connect() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let address = format!("unix:{}", dir.path().join("s").display());
        let me = rustix::process::geteuid().as_raw();
        let check = |options: &str, expected: Option<&[&str]>| {
            let config: ListenConfig = format!("{address}{options}").parse().expect("a listener");
            let listener = Listener::bind(&config).expect("bound");
            let _guest = std::os::unix::net::UnixStream::connect(dir.path().join("s"));
            let accepted = listener.accept().expect("accepted");
            assert_eq!(
                accepted.map(|one| one.offers),
                expected
                    .map(|offers| { offers.iter().map(ToString::to_string).collect::<Vec<_>>() }),
                "{options}"
            );
        };
        check("", Some(&[]));
        check(",shares=a+b", Some(&["a", "b"]));
        check(&format!(",allow-uid={me}+4711,mode=0600"), Some(&[]));
        check(&format!(",allow-pid={}", std::process::id()), Some(&[]));
        check(",allow-pid=1", None);
        check(",allow-uid=4711", None);
        check(&format!(",allow-uid={me},allow-gid=4711"), None);
    }

    #[test]
    fn a_socket_has_the_mode_and_owner_that_were_asked_for() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("s");
        let listen = |options: &str| {
            let config: ListenConfig =
                format!("unix:{}{options}", path.display()).parse().expect("a listener");
            config
        };
        let is = |expected: u32| {
            let mode = std::fs::metadata(&path).expect("stat").mode();
            assert_eq!(mode & 0o7777, expected, "{mode:o}");
        };
        for (options, expected) in [
            ("", 0o600),
            (",shares=a", 0o600),
            (",owner=4711", 0o600),
            (",group=4711", 0o660),
            (",allow-uid=4711", 0o666),
            (",allow-gid=4711,mode=0660", 0o660),
            (",mode=0777", 0o777),
        ] {
            // Others' ids are root's to give.
            if rustix::process::geteuid().is_root() || !options.contains("=4711") {
                let mut listener = Listener::bind(&listen(options)).expect("bound");
                is(expected);
                listener.change(&listen(",mode=0640")).expect("changed");
                is(0o640);
                listener.change(&listen(options)).expect("changed");
                is(expected);
            }
        }
        let mut listener = Listener::bind(&listen(",mode=0620")).expect("bound");
        if rustix::process::geteuid().is_root() {
            listener.change(&listen(",owner=daemon,group=4711")).expect("changed");
            let meta = std::fs::metadata(&path).expect("stat");
            let daemon = crate::socket_file::id_of("daemon", "/etc/passwd").expect("id");
            assert_eq!((meta.uid(), meta.gid()), (daemon, 4711));
        }
        drop(listener);
        assert!(Listener::bind(&listen(",owner=nobody-of-this-name")).is_err());
        assert!(!path.exists(), "nothing is left");
    }

    /// Whoever the directory belongs to may put there what he likes.
    #[test]
    fn a_change_touches_nothing_but_the_socket() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        let listen = |options: &str| {
            let text = format!("unix:{}{options}", at("s").display());
            text.parse::<ListenConfig>().expect("a listener")
        };
        let victim = at("victim");
        std::fs::write(&victim, "").expect("write");
        std::fs::set_permissions(&victim, PermissionsExt::from_mode(0o600)).expect("chmod");
        let mut listener = Listener::bind(&listen("")).expect("bound");
        std::fs::rename(at("s"), at("moved")).expect("mv");
        let mode = |path: &Path| std::fs::symlink_metadata(path).expect("stat").mode() & 0o7777;
        let check = |listener: &mut Listener| {
            assert!(!listener.is_in_place());
            listener.change(&listen(",mode=0666,shares=a")).expect_err("it is not there");
            assert_eq!((mode(&victim), mode(&at("moved"))), (0o600, 0o600));
            // What is no matter of the file holds all the same.
            assert_eq!(listener.config.shares, ["a"]);
        };
        check(&mut listener);
        std::os::unix::fs::symlink(&victim, at("s")).expect("ln -s");
        check(&mut listener);
        std::fs::remove_file(at("s")).expect("rm");
        std::fs::hard_link(&victim, at("s")).expect("ln");
        check(&mut listener);
        drop(listener);
        assert_eq!(mode(&at("s")), 0o600, "it is not the daemon's to remove");
    }

    #[test]
    fn of_daemons_that_start_at_once_one_gets_the_name() {
        const DAEMONS: usize = 4;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("s");
        let config = ListenConfig { address: Address::Unix(path.clone()), ..Default::default() };
        for round in 0..200 {
            if round % 2 == 0 {
                drop(std::os::unix::net::UnixListener::bind(&path).expect("a stale one"));
            }
            let start = std::sync::Barrier::new(DAEMONS);
            let bound: Vec<_> = std::thread::scope(|scope| {
                let bind = || {
                    start.wait();
                    Listener::bind(&config)
                };
                let all: Vec<_> = (0..DAEMONS).map(|_| scope.spawn(bind)).collect();
                all.into_iter().map(|one| one.join().expect("no panic")).collect()
            });
            let all: Vec<Listener> = bound.into_iter().filter_map(Result::ok).collect();
            assert_eq!(all.len(), 1, "round {round}");
            assert!(all[0].is_in_place());
            std::os::unix::net::UnixStream::connect(&path).expect("it listens");
            assert!(all[0].accept().expect("accepted").is_some());
            drop(all);
            assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
        }
    }

    #[test]
    fn a_stale_socket_is_taken_over_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bind"));
        assert!(path.exists(), "std leaves the file: it is stale now");
        let config = ListenConfig { address: Address::Unix(path.clone()), ..Default::default() };
        let ours = Listener::bind(&config).expect("taken over");
        assert!(matches!(
            Listener::bind(&config),
            Err(ListenError::Unix { hint: " (another daemon listens there)", .. })
        ));
        drop(ours);
        assert!(!path.exists());
        std::fs::write(&path, "precious").expect("write");
        assert!(Listener::bind(&config).is_err());
        assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
    }
}
