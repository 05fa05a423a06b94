//! The one file that names `fuse_backend_rs`: its `PassthroughFs`, with errnos for errors.
//!
//! Inodes here are the crate's own numbers; nodes.rs turns them into what the guest sees. Nothing
//! that arrives here comes from a guest unchecked: names, flags, sizes and modes were validated by
//! the ops. The crate's handles never live longer than one call: an open file is an fd of ours
//! (see [`Spy`]), which saves an fd and a lock for each file that a guest holds open.
#![allow(unsafe_code, reason = "the crate keeps its files private: see Spy")]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, SetattrValid,
    ZeroCopyWriter,
};
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use rustix::io::Errno;

use crate::fdops::SetTime;

/// The crate's number of the root directory.
pub const ROOT_INODE: u64 = 1;

/// Whose rights and ownership a call is made with.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// The caller's user id, as the guest sees it.
    pub uid: u32,
    /// The caller's group id.
    pub gid: u32,
}

/// What a name led to. The crate counts one lookup for each of these.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// The crate's inode number.
    pub inode: u64,
    /// Its attributes at that moment.
    pub stat: Stat,
}

/// Attributes of a file, from the crate or from an fd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "these are stat(2)'s fields")]
pub struct Stat {
    pub dev: u64,
    pub ino: u64,
    pub mode: u32,
    pub nlink: u64,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    pub size: u64,
    pub blksize: u64,
    pub blocks: u64,
    pub atime: (i64, u32),
    pub mtime: (i64, u32),
    pub ctime: (i64, u32),
}

/// libc's and rustix's structures are two types with the same fields.
macro_rules! stat {
    ($st:expr) => {
        Stat {
            dev: $st.st_dev,
            ino: $st.st_ino,
            mode: $st.st_mode,
            nlink: $st.st_nlink,
            uid: $st.st_uid,
            gid: $st.st_gid,
            rdev: $st.st_rdev,
            size: $st.st_size as u64,
            blksize: $st.st_blksize as u64,
            blocks: $st.st_blocks as u64,
            atime: ($st.st_atime, $st.st_atime_nsec as u32),
            mtime: ($st.st_mtime, $st.st_mtime_nsec as u32),
            ctime: ($st.st_ctime, $st.st_ctime_nsec as u32),
        }
    };
}

impl Stat {
    fn from_crate(st: &stat64) -> Stat {
        stat!(st)
    }

    /// The same from rustix's structure.
    pub fn from_rustix(st: &rustix::fs::Stat) -> Stat {
        stat!(st)
    }

    /// Blocks that are freed, and the inode, when the last fd of it closes.
    pub fn blocks_freed(&self) -> u64 {
        if self.nlink == 0 { self.blocks + 1 } else { 0 }
    }

    /// Of what a name leads to, which may be a link.
    pub(crate) fn at(dir: impl AsFd, name: &CStr) -> Result<Stat, Errno> {
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        Ok(Stat::from_rustix(&rustix::fs::statat(dir, name, flags)?))
    }

    /// `fstat(2)` of an fd of ours; an `O_PATH` one will do.
    pub fn of(fd: impl AsFd) -> Result<Stat, Errno> {
        Ok(Stat::from_rustix(&rustix::fs::fstat(fd)?))
    }
}

/// The fields that one SETATTR changes; `None` and `Omit` leave a field as it is.
#[derive(Clone, Copy, Debug)]
pub struct Changes {
    /// Permission bits, without the file type.
    pub mode: Option<u32>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New length in bytes.
    pub size: Option<u64>,
    /// Access time.
    pub atime: SetTime,
    /// Modification time.
    pub mtime: SetTime,
    /// Clear suid and sgid with the change of length.
    pub kill_suidgid: bool,
}

/// The crate's file system over one directory.
pub struct Backend {
    fs: PassthroughFs,
    /// The daemon has no right to change its ids: what guests create belongs to the daemon's user.
    squash: bool,
}

impl Backend {
    /// Serves the directory at `root`, which must be given as a path that `/proc` can reach.
    pub fn new(root: &Path, xattr: bool) -> io::Result<Backend> {
        let root_dir = root.to_str().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let config = Config {
            root_dir: root_dir.to_owned(),
            // Makes the crate check names too, and import the root in init().
            do_import: true,
            xattr,
            killpriv_v2: true,
            // We answer INIT, and compute timeouts and open flags: no policy of its own.
            cache_policy: CachePolicy::Auto,
            writeback: false,
            no_open: false,
            no_opendir: false,
            inode_file_handles: false,
            // Without this each forgotten inode leaves a map entry behind, for ever.
            use_host_ino: true,
            ..Config::default()
        };
        let fs = PassthroughFs::new(config)?;
        fs.init(FsOptions::HANDLE_KILLPRIV_V2)?;
        let squash = !rustix::process::geteuid().is_root();
        Ok(Backend { fs, squash })
    }

    /// Calls that switch ids get the caller's, all others the daemon's own.
    fn context(&self, caller: Caller) -> Context {
        if self.squash {
            return Context::default();
        }
        Context { uid: caller.uid, gid: caller.gid, pid: 0 }
    }

    /// True where files belong to the daemon's user whoever creates them.
    pub fn squashes(&self) -> bool {
        self.squash
    }

    /// Finds `name` in a directory.
    pub fn lookup(&self, parent: u64, name: &CStr) -> Result<Found, Errno> {
        self.fs.lookup(&Context::default(), parent, name).map(found).map_err(errno)
    }

    /// Gives back `count` lookups.
    pub fn forget(&self, inode: u64, count: u64) {
        self.fs.forget(&Context::default(), inode, count);
    }

    /// Attributes of an inode.
    pub fn getattr(&self, inode: u64) -> Result<Stat, Errno> {
        let (stat, _) = self.fs.getattr(&Context::default(), inode, None).map_err(errno)?;
        Ok(Stat::from_crate(&stat))
    }

    /// Changes attributes, and says what they are afterwards.
    pub fn setattr(&self, inode: u64, changes: &Changes) -> Result<Stat, Errno> {
        let mut valid = SetattrValid::empty();
        let mut stat = no_attributes();
        if let Some(mode) = changes.mode {
            valid |= SetattrValid::MODE;
            stat.st_mode = mode;
        }
        if let Some(uid) = changes.uid {
            valid |= SetattrValid::UID;
            stat.st_uid = uid;
        }
        if let Some(gid) = changes.gid {
            valid |= SetattrValid::GID;
            stat.st_gid = gid;
        }
        if let Some(size) = changes.size {
            valid |= SetattrValid::SIZE;
            stat.st_size = size as i64;
        }
        if changes.kill_suidgid {
            valid |= SetattrValid::KILL_SUIDGID;
        }
        match changes.atime {
            SetTime::Now => valid |= SetattrValid::ATIME | SetattrValid::ATIME_NOW,
            SetTime::At(sec, nsec) => {
                valid |= SetattrValid::ATIME;
                (stat.st_atime, stat.st_atime_nsec) = (sec, i64::from(nsec));
            }
            SetTime::Omit => {}
        }
        match changes.mtime {
            SetTime::Now => valid |= SetattrValid::MTIME | SetattrValid::MTIME_NOW,
            SetTime::At(sec, nsec) => {
                valid |= SetattrValid::MTIME;
                (stat.st_mtime, stat.st_mtime_nsec) = (sec, i64::from(nsec));
            }
            SetTime::Omit => {}
        }
        let answer = self.fs.setattr(&Context::default(), inode, stat, None, valid);
        answer.map(|(stat, _)| Stat::from_crate(&stat)).map_err(errno)
    }

    /// The target of a symbolic link.
    pub fn readlink(&self, inode: u64) -> Result<Vec<u8>, Errno> {
        self.fs.readlink(&Context::default(), inode).map_err(errno)
    }

    /// Makes a symbolic link.
    pub fn symlink(
        &self,
        caller: Caller,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> Result<Found, Errno> {
        let entry = self.fs.symlink(&self.context(caller), target, parent, name);
        entry.map(found).map_err(errno)
    }

    /// Makes a node that is no directory; `mode` holds type and bits, the umask already applied.
    pub fn mknod(
        &self,
        caller: Caller,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
    ) -> Result<Found, Errno> {
        let entry = self.fs.mknod(&self.context(caller), parent, name, mode, rdev, 0);
        entry.map(found).map_err(errno)
    }

    /// Makes a directory.
    pub fn mkdir(
        &self,
        caller: Caller,
        parent: u64,
        name: &CStr,
        mode: u32,
    ) -> Result<Found, Errno> {
        let entry = self.fs.mkdir(&self.context(caller), parent, name, mode, 0);
        entry.map(found).map_err(errno)
    }

    /// Removes a name that is no directory's.
    pub fn unlink(&self, parent: u64, name: &CStr) -> Result<(), Errno> {
        self.fs.unlink(&Context::default(), parent, name).map_err(errno)
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: u64, name: &CStr) -> Result<(), Errno> {
        self.fs.rmdir(&Context::default(), parent, name).map_err(errno)
    }

    /// `renameat2(2)`.
    pub fn rename(
        &self,
        (olddir, oldname): (u64, &CStr),
        (newdir, newname): (u64, &CStr),
        flags: u32,
    ) -> Result<(), Errno> {
        let context = Context::default();
        self.fs.rename(&context, olddir, oldname, newdir, newname, flags).map_err(errno)
    }

    /// Gives an inode one more name.
    pub fn link(&self, inode: u64, parent: u64, name: &CStr) -> Result<Found, Errno> {
        self.fs.link(&Context::default(), inode, parent, name).map(found).map_err(errno)
    }

    /// Makes a regular file and opens it; fails where the name exists, whatever `flags` say: the
    /// crate loses a lookup count where it then fails to open what is there.
    pub fn create(
        &self,
        caller: Caller,
        parent: u64,
        name: &CStr,
        flags: u32,
        mode: u32,
    ) -> Result<(Found, OwnedFd), Errno> {
        let flags = flags | libc::O_EXCL as u32;
        let args = CreateIn { flags, mode, umask: 0, fuse_flags: 0 };
        let answer = self.fs.create(&self.context(caller), parent, name, args);
        let (entry, handle, ..) = answer.map_err(errno)?;
        let found = found(entry);
        let fd = handle.ok_or(Errno::IO).and_then(|handle| self.take(found.inode, handle, flags));
        match fd {
            Ok(fd) => Ok((found, fd)),
            Err(error) => {
                self.forget(found.inode, 1);
                Err(error)
            }
        }
    }

    /// Opens a regular file or a directory. `O_PATH` is possible too: an fd that only names it.
    pub fn open(&self, inode: u64, flags: u32, kill_suidgid: bool) -> Result<OwnedFd, Errno> {
        let answer = self.fs.open(&Context::default(), inode, flags, u32::from(kill_suidgid));
        let (handle, ..) = answer.map_err(errno)?;
        self.take(inode, handle.ok_or(Errno::IO)?, flags)
    }

    /// An fd that names a regular file or a directory and can do nothing else (`O_PATH`).
    pub fn path_fd(&self, inode: u64) -> Result<OwnedFd, Errno> {
        self.open(inode, libc::O_PATH as u32, false)
    }

    /// Turns a handle of the crate into an fd of ours; the crate's is closed.
    fn take(&self, inode: u64, handle: u64, flags: u32) -> Result<OwnedFd, Errno> {
        let context = Context::default();
        let mut spy = Spy(None);
        // The same flags as at the open: other ones would reach fcntl(F_SETFL).
        let seen = self.fs.read(&context, inode, handle, &mut spy, 0, 0, None, flags);
        let released = self.fs.release(&context, inode, 0, handle, false, false, None);
        seen.and(released).map_err(errno)?;
        spy.0.ok_or(Errno::IO)?
    }

    /// Figures of the file system on which an inode lies.
    pub fn statfs(&self, inode: u64) -> Result<statvfs64, Errno> {
        self.fs.statfs(&Context::default(), inode).map_err(errno)
    }

    /// Checks permission bits as the guest's kernel asks.
    pub fn access(&self, caller: Caller, inode: u64, mask: u32) -> Result<(), Errno> {
        let context = Context { uid: caller.uid, gid: caller.gid, pid: 0 };
        self.fs.access(&context, inode, mask).map_err(errno)
    }

    /// Sets an extended attribute.
    pub fn setxattr(&self, inode: u64, name: &CStr, value: &[u8], flags: u32) -> Result<(), Errno> {
        self.fs.setxattr(&Context::default(), inode, name, value, flags).map_err(errno)
    }

    /// The value of an extended attribute, at most `size` bytes; with 0, only its length.
    pub fn getxattr(&self, inode: u64, name: &CStr, size: u32) -> Result<Xattr, Errno> {
        match self.fs.getxattr(&Context::default(), inode, name, size).map_err(errno)? {
            GetxattrReply::Value(value) => Ok(Xattr::Bytes(value)),
            GetxattrReply::Count(count) => Ok(Xattr::Length(count)),
        }
    }

    /// The names of all extended attributes, each with its NUL.
    pub fn listxattr(&self, inode: u64, size: u32) -> Result<Xattr, Errno> {
        match self.fs.listxattr(&Context::default(), inode, size).map_err(errno)? {
            ListxattrReply::Names(names) => Ok(Xattr::Bytes(names)),
            ListxattrReply::Count(count) => Ok(Xattr::Length(count)),
        }
    }

    /// Removes an extended attribute.
    pub fn removexattr(&self, inode: u64, name: &CStr) -> Result<(), Errno> {
        self.fs.removexattr(&Context::default(), inode, name).map_err(errno)
    }
}

/// What an extended attribute call gives: bytes, or how many there would be.
pub enum Xattr {
    /// The bytes asked for.
    Bytes(Vec<u8>),
    /// The caller gave no room: so many would have come.
    Length(u32),
}

/// A reader that reads nothing: the crate shows it the file behind a handle, and it keeps a
/// duplicate of the fd. Version 0.14.0 (pinned) always passes a `std::fs::File`, whose address is
/// the trait object's data pointer; [`crate::fs::Fs::new`] proves it on the root directory before
/// anything is served.
struct Spy(Option<Result<OwnedFd, Errno>>);

impl ZeroCopyWriter for Spy {
    fn write_from(
        &mut self,
        f: &mut dyn FileReadWriteVolatile,
        _count: usize,
        _off: u64,
    ) -> io::Result<usize> {
        if size_of_val(f) != size_of::<File>() || align_of_val(f) != align_of::<File>() {
            return Err(io::Error::other("the crate's open file is not a std::fs::File"));
        }
        let file = std::ptr::from_mut(f).cast::<File>();
        // SAFETY: PassthroughFs::read of the pinned version passes `&mut *ManuallyDrop<File>`, so
        // the data pointer is that of a live `File` (size and alignment were just compared, and
        // the self-test at start compares the identity of a known file). It is only borrowed, for
        // this call, while the crate's exclusive borrow is lent to us.
        let file = unsafe { &*file };
        self.0 = Some(rustix::io::fcntl_dupfd_cloexec(file, 0));
        Ok(0)
    }

    fn available_bytes(&self) -> usize {
        0
    }
}

impl io::Write for Spy {
    fn write(&mut self, _buf: &[u8]) -> io::Result<usize> {
        Ok(0)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn found(entry: Entry) -> Found {
    Found { inode: entry.inode, stat: Stat::from_crate(&entry.attr) }
}

fn no_attributes() -> stat64 {
    // The crate's own default entry holds a zeroed structure; every field is public and plain.
    Entry::default().attr
}

/// The errno of an error of the crate, which mostly passes on the kernel's.
fn errno(error: io::Error) -> Errno {
    match Errno::from_io_error(&error) {
        // To the guest's kernel ENOSYS means "never ask again", whatever file it was about.
        Some(Errno::NOSYS) => Errno::OPNOTSUPP,
        Some(errno) => errno,
        None => Errno::IO,
    }
}
