//! Mounting and unmounting: mount(2) where we may, `fusermount3` where not.
//!
//! Invariant: once mounted, the path is never touched again (a stat of a mount whose daemon is dead
//! parks its task in the kernel): what is mounted where comes from the mount table, and a path to
//! unmount is resolved by its parent alone. A [`Mount`] unmounts when dropped, and only what it
//! mounted. It must not serve the session: that is the holder of the [`Device`].

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::device::{Connection, Device, DeviceError, Session, connection_of};
use crate::fusermount;
use crate::mountinfo::{FS_TYPE, MountInfo, all_mounts, is_mounted_as, top_at};
pub use crate::options::{Method, MountOptions, RootKind};

/// Where the kernel's control files of FUSE connections are, if mounted.
pub const CONTROL_PATH: &str = "/sys/fs/fuse/connections";

/// The longest source string that we pass on, bytes (the kernel's page bounds it anyway).
const SOURCE_BYTES_MAX: usize = 1024;

/// Symbolic links followed on the way to a mount point.
const LINKS_MAX: usize = 8;

/// Why a mount or an unmount failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Nothing is there.
    #[error("mount point {path} does not exist: make it first (`mkdir -p {path}`)")]
    Missing {
        /// The mount point.
        path: PathBuf,
    },
    /// A file where a directory is needed.
    #[error("mount point {path} is not a directory: name a directory, best an empty one")]
    NotADirectory {
        /// The mount point.
        path: PathBuf,
    },
    /// A directory where a file is needed.
    #[error("mount point {path} is not a regular file, and the share is one: name a file")]
    NotAFile {
        /// The mount point.
        path: PathBuf,
    },
    /// A FUSE mount is there already, perhaps a dead one.
    #[error(
        "{path} is a mount point already (of {mounted}): unmount it first (`umount -l {path}`)"
    )]
    Taken {
        /// The mount point.
        path: PathBuf,
        /// The source of what is mounted.
        mounted: String,
    },
    /// The path cannot name a mount point.
    #[error("{path} cannot be a mount point: {why}")]
    BadPath {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The source cannot be passed on.
    #[error("the mount's source is empty, has a NUL or is longer than 1024 bytes")]
    BadSource,
    /// `EPERM`, and no other way was allowed.
    #[error("no permission to mount or unmount at {path}: run as root (CAP_SYS_ADMIN)")]
    Permission {
        /// The mount point.
        path: PathBuf,
    },
    /// The kernel has no FUSE.
    #[error("the kernel knows no FUSE file system: load it (`modprobe fuse`)")]
    NoFuse,
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No setuid helper for a user who may not mount.
    #[error(
        "only root may mount, and {program} is not installed: run as root, or install it (package \
         fuse3)"
    )]
    FusermountMissing {
        /// The program.
        program: PathBuf,
    },
    /// It could not be run.
    #[error("cannot run {program}")]
    FusermountStart {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It refused.
    #[error(
        "{program} failed at {path}: {message} (a user must own the mount point, and allow_other \
         needs user_allow_other in /etc/fuse.conf)"
    )]
    Fusermount {
        /// The program.
        program: PathBuf,
        /// The mount point.
        path: PathBuf,
        /// Its words.
        message: String,
    },
    /// Nothing of ours there.
    #[error("no ringfs mount at {path}: see `ringfs status` for those that are")]
    NotMounted {
        /// The path.
        path: PathBuf,
    },
    /// Another mount lies on top of ours.
    #[error("another mount covers the ringfs mount at {path}: unmount that one first")]
    Covered {
        /// The mount point.
        path: PathBuf,
    },
    /// `EBUSY`.
    #[error("{path} is in use: close what is open there (`fuser -m {path}`), or unmount lazily")]
    Busy {
        /// The mount point.
        path: PathBuf,
    },
    /// `EBUSY` of a remount.
    #[error(
        "{path} cannot become read-only: files are open for writing there (`fuser -vm {path}`)"
    )]
    Writers {
        /// The mount point.
        path: PathBuf,
    },
    /// Another process was to do it, and did not.
    #[error("cannot unmount {path}: {words}")]
    Elsewhere {
        /// The mount point.
        path: PathBuf,
        /// Its words.
        words: String,
    },
    /// No mount table.
    #[error("cannot read /proc/self/mountinfo: is /proc mounted?")]
    MountInfo {
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else that the kernel says.
    #[error("cannot {what} {path}")]
    Os {
        /// `mount`, `unmount`, ...
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
}

/// How an unmount went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// It is gone.
    Clean,
    /// It is gone here; another namespace has it, or it was bound to another path.
    Elsewhere,
    /// It was in use: detached from the tree, gone once its last user is.
    Detached,
    /// Somebody else had unmounted it.
    AlreadyGone,
}

/// What came of an abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortOutcome {
    /// All its requests fail now, waiting ones included; the mount stays, dead, to be unmounted.
    Aborted,
    /// It had ended, or was aborted before.
    NoConnection,
    /// The control files are not mounted (`mount -t fusectl none /sys/fs/fuse/connections`).
    /// Closing every fd of the session does the same.
    NoControl,
}

/// A mount of ours: unmounts lazily when dropped, unless it is gone.
///
/// Keep it until the lanes have ended, or drop it to end them: their reads then tell
/// `Unmounted`. [`Mount::unmount`] wants the lanes running, since the kernel may wait for whoever
/// reads the superblock (ustat(2), until its STATFS is answered). Where INIT agreed on
/// `ABORT_ERROR` it also takes down a mount that was aborted through its control file; without that
/// flag such a one cannot be told from one that is gone.
#[derive(Debug)]
pub struct Mount {
    mountpoint: PathBuf,
    /// Mount id and device minor; `None` where there was no mount table to read them from. The
    /// kernel gives both to the next mount as soon as ours is gone, so they count only together
    /// with what the session's fd says.
    identity: Option<(u32, u32)>,
    session: Session,
    fusermount: Option<PathBuf>,
    armed: bool,
}

/// Mounts a new session at `mountpoint`. The device has INIT to read next; until it is answered
/// every access of the mount waits.
pub fn mount(mountpoint: &Path, options: &MountOptions) -> Result<(Device, Mount), MountError> {
    let source = options.source.as_bytes();
    if source.is_empty() || source.len() > SOURCE_BYTES_MAX || source.contains(&0) {
        return Err(MountError::BadSource);
    }
    let path = resolve_target(mountpoint, options.root)?;
    let (device, fusermount) = match options.method {
        Method::Direct => (mount_direct(&path, options)?, None),
        Method::Fusermount => mount_by_program(&path, options)?,
        Method::Auto => match mount_direct(&path, options) {
            Ok(device) => (device, None),
            Err(
                MountError::Permission { .. } | MountError::Device(DeviceError::Permission { .. }),
            ) => mount_by_program(&path, options)?,
            Err(error) => return Err(error),
        },
    };
    let identity = match all_mounts() {
        Ok(mounts) => top_at(&mounts, &path)
            .filter(|mount| mount.is_ringfs())
            .map(|mount| (mount.mount_id, mount.dev_minor)),
        Err(error) => {
            tracing::warn!(%error, "no mount table: whether the mount is alive cannot be seen");
            None
        }
    };
    let session = device.session();
    Ok((device, Mount { mountpoint: path, identity, session, fusermount, armed: true }))
}

fn mount_direct(path: &Path, options: &MountOptions) -> Result<Device, MountError> {
    let device = Device::open(&options.device)?;
    let rootmode = match options.root {
        RootKind::Directory => "40000",
        RootKind::File => "100000",
    };
    let data = format!(
        "fd={},rootmode={rootmode},user_id={},group_id={}{}",
        device.as_fd().as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
        options.fuse_words()
    );
    let data = CString::new(data).map_err(|_| MountError::BadSource)?;
    let flags = options.flags().fold(MountFlags::empty(), |all, (flag, _)| all | flag);
    let source = options.source.as_os_str();
    rustix::mount::mount(source, path, FS_TYPE, flags, data.as_c_str()).map_err(|errno| {
        let path = path.to_owned();
        match errno {
            Errno::PERM | Errno::ACCESS => MountError::Permission { path },
            Errno::NODEV => MountError::NoFuse,
            Errno::NOENT => MountError::Missing { path },
            Errno::NOTDIR => MountError::NotADirectory { path },
            source => MountError::Os { what: "mount at", path, source },
        }
    })?;
    Ok(device)
}

fn mount_by_program(
    path: &Path,
    options: &MountOptions,
) -> Result<(Device, Option<PathBuf>), MountError> {
    let mut words = OsString::from("fsname=");
    words.push(escape_commas(&options.source));
    // The part of the type behind "fuse.".
    words.push(",subtype=ringfs");
    for (_, word) in options.flags() {
        words.push(",");
        words.push(word);
    }
    words.push(options.fuse_words());
    let fd = fusermount::mount(&options.fusermount, path, &words)?;
    Ok((Device::from_fd(fd, &options.device), Some(options.fusermount.clone())))
}

/// In an option list a comma or backslash of a value has a backslash before it.
fn escape_commas(value: &OsStr) -> OsString {
    let mut out = Vec::with_capacity(value.len());
    for &byte in value.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            out.push(b'\\');
        }
        out.push(byte);
    }
    OsString::from_vec(out)
}

/// The real path of a mount point that is to be used, without touching what may be a dead mount.
fn resolve_target(mountpoint: &Path, root: RootKind) -> Result<PathBuf, MountError> {
    // Without a mount table a dead mount cannot be told from a directory: go on without.
    let mounts = all_mounts().unwrap_or_default();
    let mut path = mountpoint.to_owned();
    for _ in 0..LINKS_MAX {
        let real = resolve_parent(&path)?;
        if let Some(mounted) = top_at(&mounts, &real).filter(|mounted| mounted.is_fuse()) {
            let mounted = mounted.source.to_string_lossy().into_owned();
            return Err(MountError::Taken { path: real, mounted });
        }
        let os = |path: &Path, error: io::Error| match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::NOTDIR) => MountError::Missing { path: mountpoint.into() },
            errno => {
                let source = errno.unwrap_or(Errno::IO);
                MountError::Os { what: "look at", path: path.into(), source }
            }
        };
        let kind = real.symlink_metadata().map_err(|error| os(&real, error))?.file_type();
        if kind.is_symlink() {
            let target = real.read_link().map_err(|error| os(&real, error))?;
            path = real.parent().unwrap_or(Path::new("/")).join(target);
            continue;
        }
        return match root {
            RootKind::Directory if !kind.is_dir() => Err(MountError::NotADirectory { path: real }),
            RootKind::File if !kind.is_file() => Err(MountError::NotAFile { path: real }),
            RootKind::Directory | RootKind::File => Ok(real),
        };
    }
    Err(MountError::BadPath { path: mountpoint.to_owned(), why: "too many symbolic links" })
}

/// The path with its parent resolved and its last component as it is.
fn resolve_parent(path: &Path) -> Result<PathBuf, MountError> {
    if path == Path::new("/") {
        return Ok(path.to_owned());
    }
    let bad = |why| MountError::BadPath { path: path.to_owned(), why };
    let name = path.file_name().ok_or_else(|| bad("it ends in `..` or is empty"))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    match parent.canonicalize() {
        Ok(parent) => Ok(parent.join(name)),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::NOTDIR) => Err(MountError::Missing { path: path.into() }),
            errno => {
                let source = errno.unwrap_or(Errno::IO);
                Err(MountError::Os { what: "resolve", path: parent.to_owned(), source })
            }
        },
    }
}

impl Mount {
    /// Where it was mounted, resolved.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// The number of the connection (for [`abort`]); `None` where no mount table was readable.
    pub fn dev_minor(&self) -> Option<u32> {
        self.identity.map(|(_, dev_minor)| dev_minor)
    }

    /// A mount that another process made: `session` is its first fd, `identity` what
    /// [`Mount::identity`] told there.
    pub fn adopt(mountpoint: PathBuf, session: &Device, identity: Option<(u32, u32)>) -> Mount {
        let session = session.session();
        let fusermount = Some(PathBuf::from(fusermount::PROGRAM));
        Mount { mountpoint, identity, session, fusermount, armed: true }
    }

    /// Mount id and number of the connection; `None` where no mount table was readable.
    pub fn identity(&self) -> Option<(u32, u32)> {
        self.identity
    }

    /// Whether it is still in the mount table (`true` where that cannot be seen).
    pub fn is_mounted(&self) -> bool {
        self.place().is_none_or(|place| place.is_some())
    }

    /// Unmounts: cleanly, or lazily where it is in use. The lanes should still be running.
    pub fn unmount(mut self) -> Result<Unmounted, MountError> {
        let program = self.fusermount.clone();
        let done = self.unmount_by(|path, lazy| take_down(path, lazy, program.as_deref()));
        self.leave();
        done
    }

    /// The same by what unmounts a path, `true`: lazily. With an error it may be tried again; else
    /// dropping does nothing any more.
    pub fn unmount_by(
        &mut self,
        mut by: impl FnMut(&Path, bool) -> Result<(), MountError>,
    ) -> Result<Unmounted, MountError> {
        let done = match self.take_down(false, &mut by) {
            Err(MountError::Busy { .. } | MountError::Elsewhere { .. }) => {
                self.take_down(true, &mut by)
            }
            done => done,
        };
        self.armed &= done.is_err();
        done
    }

    /// Leaves the mount to somebody else: dropping does nothing any more.
    pub fn leave(mut self) {
        self.armed = false;
    }

    /// Where it is now, and whether nothing covers it: `None` if nobody can tell, `Some(None)` if
    /// nowhere.
    fn place(&self) -> Option<Option<(PathBuf, bool)>> {
        if self.session.connection() == Connection::Ended {
            return Some(None);
        }
        let (mount_id, dev_minor) = self.identity?;
        let mounts = all_mounts().ok()?;
        let ours = |mount: &&MountInfo| mount.mount_id == mount_id && mount.dev_minor == dev_minor;
        Some(mounts.iter().find(ours).map(|ours| {
            let top = top_at(&mounts, &ours.mount_point);
            (ours.mount_point.clone(), top.is_some_and(|top| top.mount_id == mount_id))
        }))
    }

    fn take_down(
        &self,
        lazy: bool,
        by: &mut impl FnMut(&Path, bool) -> Result<(), MountError>,
    ) -> Result<Unmounted, MountError> {
        let path = match self.place() {
            None => self.mountpoint.clone(),
            Some(None) => return Ok(Unmounted::AlreadyGone),
            Some(Some((path, true))) => path,
            Some(Some((path, false))) => return Err(MountError::Covered { path }),
        };
        by(&path, lazy)?;
        Ok(match (lazy, self.session.connection()) {
            (true, _) => Unmounted::Detached,
            (false, Connection::Alive) => Unmounted::Elsewhere,
            (false, _) => Unmounted::Clean,
        })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let program = self.fusermount.as_deref();
        let by = &mut |path: &Path, lazy| take_down(path, lazy, program);
        if let Err(error) = self.take_down(true, by) {
            let path = self.mountpoint.display();
            tracing::warn!(%path, %error, "the mount stays behind");
        }
    }
}

/// Unmounts the ringfs mount at `path`, whoever mounted it, without touching it.
///
/// `lazy` detaches it at once, used or not; else [`MountError::Busy`] tells that it is in use.
pub fn unmount_path(path: &Path, lazy: bool) -> Result<(), MountError> {
    let mount = mount_at(path)?;
    take_down(&mount.mount_point, lazy, Some(Path::new(fusermount::PROGRAM)))
}

/// The ringfs mount at `path`, found without touching it.
pub fn mount_at(path: &Path) -> Result<MountInfo, MountError> {
    let mounts = all_mounts().map_err(|source| MountError::MountInfo { source })?;
    let find = |path: &Path| top_at(&mounts, path).filter(|mount| mount.is_ringfs()).cloned();
    // As it stands first: its parent may lie in a dead mount too.
    if let Some(found) = find(path) {
        return Ok(found);
    }
    let real = resolve_parent(path)?;
    find(&real).ok_or_else(|| {
        let covered = mounts.iter().any(|mount| mount.mount_point == real && mount.is_ringfs());
        match covered {
            true => MountError::Covered { path: real },
            false => MountError::NotMounted { path: real },
        }
    })
}

/// Gives a mount other flags: those of `options` that mount(2) changes (`ro`, `noexec`, `noatime`,
/// `nodiratime`, `sync`). All else of `options` is ignored, as the kernel does.
pub fn remount(mount: &MountInfo, options: &MountOptions) -> Result<(), MountError> {
    let flags = options.flags().fold(MountFlags::empty(), |all, (flag, _)| all | flag);
    let path = || mount.mount_point.clone();
    rustix::mount::mount_remount(&mount.mount_point, flags, c"").map_err(|errno| match errno {
        Errno::PERM | Errno::ACCESS => MountError::Permission { path: path() },
        Errno::BUSY => MountError::Writers { path: path() },
        source => MountError::Os { what: "remount", path: path(), source },
    })
}

/// Detaches the mount that [`Mount::identity`] told of, wherever it is by now; that it is gone is
/// fine. `(0, 0)`: whichever ringfs mount is at `path`.
pub fn unmount_identity(path: &Path, identity: (u32, u32)) -> Result<(), MountError> {
    if identity == (0, 0) {
        return unmount_path(path, true);
    }
    let mounts = all_mounts().map_err(|source| MountError::MountInfo { source })?;
    let is_ours = |mount: &&MountInfo| (mount.mount_id, mount.dev_minor) == identity;
    let Some(ours) = mounts.iter().find(is_ours).filter(|mount| mount.is_ringfs()) else {
        return Ok(());
    };
    let path = &ours.mount_point;
    if top_at(&mounts, path).is_none_or(|top| top.mount_id != ours.mount_id) {
        return Err(MountError::Covered { path: path.clone() });
    }
    take_down(path, true, Some(Path::new(fusermount::PROGRAM)))
}

/// umount2(2), and the setuid program where that is not permitted.
fn take_down(path: &Path, lazy: bool, program: Option<&Path>) -> Result<(), MountError> {
    let flags =
        UnmountFlags::NOFOLLOW | if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    let path_owned = || path.to_owned();
    match (rustix::mount::unmount(path, flags), program) {
        (Ok(()), _) => Ok(()),
        (Err(Errno::PERM), Some(program)) => match fusermount::unmount(program, path, lazy) {
            Err(MountError::Fusermount { message, .. }) if message.contains("busy") => {
                Err(MountError::Busy { path: path_owned() })
            }
            done => done,
        },
        (Err(Errno::PERM), None) => Err(MountError::Permission { path: path_owned() }),
        (Err(Errno::BUSY), _) => Err(MountError::Busy { path: path_owned() }),
        (Err(Errno::INVAL | Errno::NOENT), _) => Err(MountError::NotMounted { path: path_owned() }),
        (Err(source), _) => Err(MountError::Os { what: "unmount", path: path_owned(), source }),
    }
}

/// Aborts the connection of `session`, an fd of it, which has that number
/// ([`MountInfo::dev_minor`]): frees every task that hangs in it. The mount stays in the table and
/// answers ENOTCONN until it is unmounted. The number alone would not do: the kernel gives it to
/// the next mount as soon as this one is gone.
pub fn abort(session: BorrowedFd<'_>, dev_minor: u32) -> Result<AbortOutcome, MountError> {
    abort_at(Path::new(CONTROL_PATH), session, dev_minor)
}

/// [`abort`], and by a forced unmount where that cannot be: for who must not keep it alive by its
/// fd.
pub fn abort_or_unmount(
    session: BorrowedFd<'_>,
    dev_minor: u32,
) -> Result<AbortOutcome, MountError> {
    let done = abort(session, dev_minor);
    if matches!(done, Ok(AbortOutcome::Aborted | AbortOutcome::NoConnection)) {
        return done;
    }
    match unmount_by_force(session, dev_minor)? {
        true => Ok(AbortOutcome::Aborted),
        false => done,
    }
}

/// Aborts a connection by unmounting it somewhere, never what covers it there; whether it was in
/// the mount table.
pub fn unmount_by_force(session: BorrowedFd<'_>, dev_minor: u32) -> Result<bool, MountError> {
    let mounts = all_mounts().map_err(|source| MountError::MountInfo { source })?;
    // While it is alive the number is its own: so it was when the table was read.
    if connection_of(session) != Connection::Alive {
        return Ok(false);
    }
    let is_top = |mount: &MountInfo| {
        top_at(&mounts, &mount.mount_point).is_some_and(|top| top.mount_id == mount.mount_id)
    };
    let mut ours = mounts.iter().filter(|its| its.dev_minor == dev_minor && its.is_ringfs());
    let Some(first) = ours.clone().next() else { return Ok(false) };
    let Some(free) = ours.find(|mount| is_top(mount)) else {
        return Err(MountError::Covered { path: first.mount_point.clone() });
    };
    let (path, flags) = (&free.mount_point, UnmountFlags::FORCE | UnmountFlags::DETACH);
    match rustix::mount::unmount(path, flags | UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(true),
        Err(source) => Err(MountError::Os { what: "unmount", path: path.clone(), source }),
    }
}

/// [`abort`] by control files that are mounted elsewhere.
pub fn abort_at(
    control: &Path,
    session: BorrowedFd<'_>,
    dev_minor: u32,
) -> Result<AbortOutcome, MountError> {
    let path = control.join(dev_minor.to_string()).join("abort");
    // An open control file is of its connection for ever, also when another one has the number. If
    // the session is alive only then, the file is its own.
    let aborted = File::options().write(true).open(&path).and_then(|mut file| {
        let is_alive = connection_of(session) == Connection::Alive;
        if is_alive {
            file.write_all(b"1")?;
        }
        Ok(is_alive)
    });
    match aborted {
        Ok(true) => Ok(AbortOutcome::Aborted),
        Ok(false) => Ok(AbortOutcome::NoConnection),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::NODEV) if is_mounted_as(control, "fusectl") => {
                Ok(AbortOutcome::NoConnection)
            }
            Some(Errno::NOENT | Errno::NOTDIR) => Ok(AbortOutcome::NoControl),
            Some(Errno::ACCESS | Errno::PERM) => Err(MountError::Permission { path }),
            errno => {
                let source = errno.unwrap_or(Errno::IO);
                Err(MountError::Os { what: "write to", path, source })
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_with_commas() {
        assert_eq!(escape_commas(OsStr::new("a,b\\c@unix:/s")), "a\\,b\\\\c@unix:/s");
    }

    #[test]
    fn parents_are_resolved_and_last_components_are_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let real = dir.path().canonicalize().expect("real");
        std::os::unix::fs::symlink(&real, dir.path().join("link")).expect("link");
        std::os::unix::fs::symlink("nowhere", dir.path().join("dangling")).expect("link");
        let check = |path: &Path, expected: &Path| {
            assert_eq!(resolve_parent(path).expect("resolved"), expected);
        };
        check(&real.join("link/missing"), &real.join("missing"));
        check(&real.join("dangling"), &real.join("dangling"));
        check(&real.join("link/"), &real.join("link"));
        check(Path::new("/"), Path::new("/"));
        check(Path::new("src"), &std::env::current_dir().expect("cwd").join("src"));
        for bad in [real.join(".."), PathBuf::new()] {
            assert!(matches!(resolve_parent(&bad), Err(MountError::BadPath { .. })));
        }
    }

    #[test]
    fn a_source_that_cannot_be_passed_on() {
        for source in ["", "a\0b", &"x".repeat(SOURCE_BYTES_MAX + 1)] {
            let done = mount(Path::new("/nonexistent"), &MountOptions::new(source));
            assert!(matches!(done, Err(MountError::BadSource)));
        }
    }

    #[test]
    fn no_control_files_is_no_failure() {
        let dir = tempfile::tempdir().expect("tempdir");
        let session = File::open("/dev/null").expect("an fd");
        for control in [dir.path().to_owned(), dir.path().join("missing")] {
            let done = abort_at(&control, session.as_fd(), 1).expect("abort");
            assert_eq!(done, AbortOutcome::NoControl);
        }
    }
}
