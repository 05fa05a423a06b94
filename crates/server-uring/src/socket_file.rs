//! The file of a Unix socket: where it is bound, who may connect by it, and its end.
//!
//! Its directory may be a VMM's, whose user puts there what he likes at any moment, and this
//! process has all rights. Invariants: below the directory that the operator has named, no symbolic
//! link is followed; and a file gets a mode or an owner, or is removed, by its fd or as what was
//! bound here, never because it has the name.
//!
//! Of two daemons that start at once one gets the name: who binds has the lock of the directory
//! until it listens. Anybody who may read the directory may have that lock, and keep it. So nobody
//! waits for it long, nor fails without it; and there is none in a VMM's directory, whose user
//! could have the daemon wait again and again.

use crate::accept::ListenError;
use crate::config::{FileMode, ListenConfig};
use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Gid, Mode, OFlags};
use rustix::fs::{ResolveFlags, Stat, Uid};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::ffi::OsString;
use std::fmt::{self, Display, Formatter};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// What a file is bound with: until it has its own mode nobody may connect, and no other socket is
/// like it, which somebody could put in its place. Bits of the umask are not among it.
const UNDRESSED: Mode = Mode::SVTX;
/// Who connects waits among so many to be accepted.
const QUEUE: i32 = 128;
/// Who binds has a directory's lock for less than a pause.
const TURN_TRIES_MAX: u32 = 500;
const TURN_PAUSE: Duration = Duration::from_millis(1);

/// The place of a socket's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spot {
    path: PathBuf,
    /// The operator's: links are followed in it.
    trusted: PathBuf,
    /// Directories below that one: none of them may be a link.
    below: PathBuf,
    name: OsString,
}

impl Spot {
    /// All directories of the path are the operator's.
    pub(crate) fn new(path: &Path) -> Spot {
        Spot::below(path.parent().unwrap_or(Path::new("")), path)
    }

    /// Those of `trusted` are, with which the path begins.
    pub(crate) fn below(trusted: &Path, path: &Path) -> Spot {
        let dirs = path.parent().unwrap_or(Path::new(""));
        let below = dirs.strip_prefix(trusted).unwrap_or(dirs).to_owned();
        let name = path.file_name().unwrap_or_default().to_owned();
        let trusted = match trusted.as_os_str().is_empty() {
            true => Path::new("."),
            false => trusted,
        };
        Spot { path: path.to_owned(), trusted: trusted.to_owned(), below, name }
    }

    fn directory(&self) -> Result<OwnedFd, Errno> {
        let trusted = rustix::fs::openat(CWD, &self.trusted, DIRECTORY, Mode::empty())?;
        if self.below.as_os_str().is_empty() {
            return Ok(trusted);
        }
        let how = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
        rustix::fs::openat2(&trusted, &self.below, DIRECTORY, Mode::empty(), how)
    }

    /// The lock of the directory, for who may take a name in it away. `None`: somebody keeps it, or
    /// the directory is not ours to read, or a VMM's.
    fn turn(&self, directory: &OwnedFd) -> Option<OwnedFd> {
        if !self.below.as_os_str().is_empty() {
            return None;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = rustix::fs::openat(directory, ".", flags, Mode::empty()).ok()?;
        for n in 0..TURN_TRIES_MAX {
            if n > 0 {
                // There is no waiting for a lock that ends by itself.
                std::thread::sleep(TURN_PAUSE);
            }
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Some(lock),
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(_) => return None,
            }
        }
        tracing::warn!(path = ?self.path, "somebody keeps the lock of its directory");
        None
    }

    /// How the kernel is told where to bind: people find it by `ss`, unless the path may lead
    /// elsewhere by then.
    fn address(&self, directory: &OwnedFd) -> Result<SocketAddrUnix, Errno> {
        match self.below.as_os_str().is_empty() {
            true => SocketAddrUnix::new(&self.path),
            false => SocketAddrUnix::new(by_fd(directory.as_fd()).join(&self.name)),
        }
    }

    /// What has the name, as it is.
    fn look(&self, directory: &OwnedFd) -> Result<Stat, Errno> {
        rustix::fs::statat(directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// The file of the name, if it is that one.
    fn find(&self, directory: &OwnedFd, is_it: impl Fn(&Stat) -> bool) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(directory, &self.name, flags, Mode::empty())?;
        match is_it(&rustix::fs::fstat(&file)?) {
            true => Ok(file),
            false => Err(io::Error::other("something else has its name now")),
        }
    }

    fn error(&self, source: impl Into<io::Error>, hint: &'static str) -> ListenError {
        ListenError::Unix { path: self.path.clone(), source: source.into(), hint }
    }
}

/// A path of what an fd is of.
pub(crate) fn by_fd(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// A socket's file that was bound here.
#[derive(Debug)]
pub(crate) struct SocketFile {
    spot: Spot,
    /// Device and inode, which no other file can have as long as the socket is open.
    identity: (u64, u64),
}

impl SocketFile {
    /// Binds, gives the file its mode and owner, and listens: nobody gets in before. A file that
    /// nobody listens on any more is taken over.
    pub(crate) fn bind(
        spot: Spot,
        config: &ListenConfig,
    ) -> Result<(OwnedFd, SocketFile), ListenError> {
        const DRESS: &str = " (its mode, owner or group)";
        let dress = Dress::of(config).map_err(|source| spot.error(source, DRESS))?;
        let directory = spot.directory().map_err(|errno| spot.error(errno, hint(errno)))?;
        let _turn = spot.turn(&directory);
        let socket = bind(&spot, &directory)?;
        let file = spot.find(&directory, is_undressed);
        let file = file.and_then(|fd| Ok((identity(&rustix::fs::fstat(&fd)?), fd)));
        let (identity, fd) = file.map_err(|source| spot.error(source, ""))?;
        let file = SocketFile { spot, identity };
        let dressed = dress.put_on(fd.as_fd()).and_then(|()| net::listen(&socket, QUEUE));
        match dressed {
            Ok(()) => Ok((socket, file)),
            Err(errno) => {
                file.remove();
                Err(file.spot.error(errno, DRESS))
            }
        }
    }

    /// Whether it is still there.
    pub(crate) fn is_in_place(&self) -> bool {
        self.spot.directory().is_ok_and(|directory| self.is_in(&directory))
    }

    fn is_in(&self, directory: &OwnedFd) -> bool {
        self.spot.look(directory).is_ok_and(|stat| identity(&stat) == self.identity)
    }

    /// Who may connect now.
    pub(crate) fn access(&self) -> Option<Access> {
        Access::at(&self.spot)
    }

    /// Gives it another mode and owner; what else has its name by now keeps what it has.
    ///
    /// # Errors
    /// It is not there, or what the kernel says.
    pub(crate) fn change(&self, config: &ListenConfig) -> io::Result<()> {
        let dress = Dress::of(config)?;
        let directory = self.spot.directory()?;
        let file = self.spot.find(&directory, |stat| identity(stat) == self.identity)?;
        Ok(dress.put_on(file.as_fd())?)
    }

    /// Takes it away, if it is still there.
    pub(crate) fn remove(&self) {
        if let Ok(directory) = self.spot.directory()
            && self.is_in(&directory)
        {
            let _ = rustix::fs::unlinkat(&directory, &self.spot.name, AtFlags::empty());
        }
    }
}

/// Who may connect, as a socket's file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) mode: FileMode,
    pub(crate) owner: (u32, u32),
}

impl Access {
    /// Of the file that is there.
    pub(crate) fn at(spot: &Spot) -> Option<Access> {
        let stat = spot.look(&spot.directory().ok()?).ok()?;
        let mode = FileMode(stat.st_mode & 0o777);
        Some(Access { mode, owner: (stat.st_uid, stat.st_gid) })
    }
}

impl Display for Access {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Access { mode, owner: (uid, gid) } = self;
        write!(f, "mode {mode} of {uid}:{gid}")
    }
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// As [`bind`] makes it. Two names: somebody has another one for it, and could have had it before.
fn is_undressed(stat: &Stat) -> bool {
    let mode = stat.st_mode;
    FileType::from_raw_mode(mode) == FileType::Socket
        && Mode::from_raw_mode(mode) == UNDRESSED
        && stat.st_nlink == 1
}

/// What a socket's file is given.
struct Dress {
    mode: Mode,
    owner: Option<Uid>,
    group: Option<Gid>,
}

impl Dress {
    fn of(config: &ListenConfig) -> io::Result<Dress> {
        let id = |name: &Option<String>, table| {
            name.as_deref().map(|name| id_of(name, table)).transpose()
        };
        let FileMode(mode) = config.socket_mode();
        Ok(Dress {
            mode: Mode::from_raw_mode(mode),
            owner: id(&config.owner, "/etc/passwd")?.map(Uid::from_raw),
            group: id(&config.group, "/etc/group")?.map(Gid::from_raw),
        })
    }

    fn put_on(&self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        let Dress { mode, owner, group } = *self;
        if owner.is_some() || group.is_some() {
            rustix::fs::chownat(file, "", owner, group, AtFlags::EMPTY_PATH)?;
        }
        // fchmod is not for an fd that only names a file, and fchmodat2 is of Linux 6.6.
        rustix::fs::chmod(by_fd(file), mode)
    }
}

/// The id of a user or group: a number, or a name of the table.
pub(crate) fn id_of(name: &str, table: &str) -> io::Result<u32> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let text = std::fs::read_to_string(table)?;
    let mut lines = text.lines().map(|line| line.split(':'));
    let found = lines.find_map(|mut line| (line.next() == Some(name)).then(|| line.nth(1))?);
    let unknown = || io::Error::other(format!("{name:?} is not in {table}"));
    found.and_then(|id| id.parse().ok()).ok_or_else(unknown)
}

/// Bound, and not listening yet.
fn bind(spot: &Spot, directory: &OwnedFd) -> Result<OwnedFd, ListenError> {
    let error = |errno: Errno, hint| spot.error(errno, hint);
    let address = spot
        .address(directory)
        .map_err(|e| error(e, " (the path of a Unix socket has at most 107 bytes)"))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| error(e, ""))?;
    // The file is made with it: no name is needed for that, which could lead elsewhere by then.
    rustix::fs::fchmod(&socket, UNDRESSED).map_err(|e| error(e, ""))?;
    let bound = match net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            // Connecting to what is no socket is refused too, and it is not ours to remove.
            let is_socket = spot
                .look(directory)
                .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket);
            if !is_socket {
                return Err(error(Errno::ADDRINUSE, " (something else has this name)"));
            }
            if is_alive(&address) {
                return Err(error(Errno::ADDRINUSE, " (another daemon listens there)"));
            }
            tracing::info!(path = ?spot.path, "taking over a socket that nobody listens on");
            rustix::fs::unlinkat(directory, &spot.name, AtFlags::empty())
                .map_err(|e| error(e, ""))?;
            net::bind(&socket, &address)
        }
        other => other,
    };
    bound.map_err(|errno| error(errno, hint(errno)))?;
    Ok(socket)
}

fn hint(errno: Errno) -> &'static str {
    match errno {
        Errno::NOENT => " (its directory does not exist)",
        Errno::ACCESS => " (no right to make a file there)",
        Errno::LOOP => " (a symbolic link is in the place of a directory)",
        _ => "",
    }
}

/// Whether somebody listens on the socket file.
fn is_alive(address: &SocketAddrUnix) -> bool {
    // Who listens but does not accept must not hold this up.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let Ok(probe) = probe else { return true };
    net::connect(&probe, address) != Err(Errno::CONNREFUSED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    /// A directory of a VMM's, with a victim beside it.
    fn place() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (vm, victim) = (dir.path().join("vm"), dir.path().join("victim"));
        std::fs::create_dir(&vm).expect("mkdir");
        std::fs::write(&victim, "").expect("write");
        std::fs::set_permissions(&victim, PermissionsExt::from_mode(0o600)).expect("chmod");
        (dir, vm, victim)
    }

    fn mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).expect("stat").mode() & 0o7777
    }

    #[test]
    fn a_file_is_nobodys_until_it_has_its_mode() {
        let (_dir, vm, _) = place();
        let spot = Spot::new(&vm.join("s"));
        let directory = spot.directory().expect("open");
        let _socket = bind(&spot, &directory).expect("bound");
        assert_eq!(mode(&vm.join("s")), UNDRESSED.bits(), "whatever the umask is");
        spot.find(&directory, is_undressed).expect("what was bound");
    }

    #[test]
    fn what_is_put_in_the_place_of_a_new_socket_is_not_touched() {
        let (_dir, vm, victim) = place();
        let at = vm.join("s");
        let tricks: [(&str, &dyn Fn()); 5] = [
            ("a link", &|| symlink(&victim, &at).expect("ln -s")),
            ("another name", &|| std::fs::hard_link(&victim, &at).expect("ln")),
            ("a socket", &|| drop(UnixListener::bind(&at).expect("bind"))),
            ("a socket by a link", &|| {
                drop(UnixListener::bind(vm.join("other")).expect("bind"));
                symlink(vm.join("other"), &at).expect("ln -s");
            }),
            ("nothing", &|| {}),
        ];
        for (what, trick) in tricks {
            let spot = Spot::new(&at);
            let directory = spot.directory().expect("open");
            let _socket = bind(&spot, &directory).expect("bound");
            std::fs::remove_file(&at).expect("rm");
            trick();
            assert!(spot.find(&directory, is_undressed).is_err(), "{what}");
            let _ = std::fs::remove_file(&at);
        }
        // A second name for the socket itself.
        let spot = Spot::new(&at);
        let directory = spot.directory().expect("open");
        let _socket = bind(&spot, &directory).expect("bound");
        std::fs::hard_link(&at, vm.join("second")).expect("ln");
        assert!(spot.find(&directory, is_undressed).is_err());
        assert_eq!(mode(&victim), 0o600);
    }

    #[test]
    fn who_keeps_the_lock_of_a_directory_keeps_nobody_out() {
        let (dir, vm, _) = place();
        let config = ListenConfig::default();
        let kept = std::fs::File::open(&vm).expect("open");
        rustix::fs::flock(&kept, FlockOperation::LockExclusive).expect("flock");
        let (_socket, file) =
            SocketFile::bind(Spot::new(&vm.join("s")), &config).expect("bound all the same");
        assert!(file.is_in_place());
        file.remove();
        rustix::fs::flock(&kept, FlockOperation::Unlock).expect("flock");
        let spot = Spot::new(&vm.join("s"));
        let directory = spot.directory().expect("open");
        let turn = spot.turn(&directory).expect("free");
        let shared = FlockOperation::NonBlockingLockShared;
        assert_eq!(rustix::fs::flock(&kept, shared), Err(Errno::WOULDBLOCK));
        drop(turn);
        let spot = Spot::below(dir.path(), &vm.join("s"));
        assert!(spot.turn(&spot.directory().expect("open")).is_none(), "a VMM's");
        assert_eq!(rustix::fs::flock(&kept, shared), Ok(()));
    }

    #[test]
    fn links_are_followed_in_the_operators_directories_alone() {
        let (dir, vm, _) = place();
        let config = ListenConfig::default();
        let elsewhere = dir.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).expect("mkdir");
        symlink(&vm, dir.path().join("srv")).expect("ln -s");
        symlink(&elsewhere, vm.join("run")).expect("ln -s");
        let (trusted, path) = (dir.path().join("srv"), dir.path().join("srv/run/s"));
        let bound = |spot: Spot| {
            SocketFile::bind(spot, &config).map(|(socket, file)| {
                assert!(file.is_in_place() && elsewhere.join("s").exists());
                (socket, file)
            })
        };
        let (_socket, file) = bound(Spot::new(&path)).expect("the operator's link");
        file.remove();
        assert!(!elsewhere.join("s").exists());
        bound(Spot::below(&trusted, &path)).expect_err("a VMM's link");
        assert!(!elsewhere.join("s").exists());
        std::fs::rename(vm.join("run"), vm.join("link")).expect("mv");
        std::fs::create_dir(vm.join("run")).expect("mkdir");
        let (_socket, file) =
            SocketFile::bind(Spot::below(&trusted, &path), &config).expect("a directory");
        assert!(file.is_in_place());
        std::os::unix::net::UnixStream::connect(&path).expect("it listens");
        // The directory goes elsewhere, and a link to it has its name.
        std::fs::remove_dir(&elsewhere).expect("rmdir");
        std::fs::rename(vm.join("run"), &elsewhere).expect("mv");
        std::fs::rename(vm.join("link"), vm.join("run")).expect("mv");
        assert!(path.exists() && !file.is_in_place());
        assert!(file.change(&config).is_err());
        file.remove();
        assert!(path.exists());
    }
}
