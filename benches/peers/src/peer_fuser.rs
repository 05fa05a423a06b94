//! `peer-fuser DIR MOUNTPOINT`: a plain passthrough on the crate `fuser`, with as many threads as
//! CPUs and a clone of /dev/fuse for each; the same work as libfuse's passthrough_ll.
//!
//! It holds an O_PATH descriptor for each node that the kernel knows, and answers nothing that the
//! bench does not ask. It is a peer to measure, not a file system to use.

use anyhow::{Context, Result};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, SessionACL, TimeOrNow, WriteFlags,
};
use rustix::fs::{
    AtFlags, Dir, Mode, OFlags, Stat, fstat, fsync, ftruncate, mkdirat, open, openat, renameat,
    statat, unlinkat,
};
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// As passthrough_ll is told: names and attributes are believed for a second.
const TTL: Duration = Duration::from_secs(1);
const MAX_WRITE: u32 = 1 << 20;

type Answer<T> = std::result::Result<T, Errno>;

struct Node {
    fd: OwnedFd,
    lookups: AtomicU64,
}

/// A directory's entries, read when it is opened: name, inode number, kind.
type Entries = Vec<(OsString, u64, FileType)>;

enum Open {
    File(File),
    Dir(Entries),
}

#[derive(Default)]
struct Nodes {
    by_id: HashMap<u64, Arc<Node>>,
    /// Device and inode number to our number.
    known: HashMap<(u64, u64), u64>,
    next: u64,
}

struct Passthrough {
    nodes: RwLock<Nodes>,
    open: RwLock<HashMap<u64, Arc<Open>>>,
    next_handle: AtomicU64,
}

fn main() -> Result<()> {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "--version") {
        println!("passthrough on fuser 0.18.0, n_threads = CPUs, clone_fd");
        return Ok(());
    }
    let [dir, mountpoint] = &args[..] else { anyhow::bail!("usage: peer-fuser DIR MOUNTPOINT") };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = open(dir.as_os_str(), flags, Mode::empty()).context("open the directory")?;
    let root = Arc::new(Node { fd, lookups: AtomicU64::new(1) });
    let nodes = Nodes { by_id: HashMap::from([(1, root)]), next: 2, ..Nodes::default() };
    let fs = Passthrough {
        nodes: RwLock::new(nodes),
        open: RwLock::default(),
        next_handle: AtomicU64::new(1),
    };
    let mut config = Config::default();
    config.n_threads = Some(std::thread::available_parallelism()?.get());
    config.clone_fd = true;
    config.acl = SessionACL::All;
    config.mount_options = vec![
        MountOption::FSName("peer-fuser".into()),
        MountOption::Subtype("peer-fuser".into()),
        MountOption::DefaultPermissions,
    ];
    fuser::mount(fs, mountpoint, &config).context("mount")
}

impl Passthrough {
    fn node(&self, id: INodeNo) -> Answer<Arc<Node>> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.by_id.get(&id.0).cloned().ok_or(Errno::ESTALE)
    }

    fn opened(&self, handle: FileHandle) -> Answer<Arc<Open>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.get(&handle.0).cloned().ok_or(Errno::EBADF)
    }

    fn keep(&self, one: Open) -> FileHandle {
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        open.insert(handle, Arc::new(one));
        FileHandle(handle)
    }

    fn drop_handle(&self, handle: FileHandle) {
        self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&handle.0);
    }

    /// Looks a name up, counts it, and gives its attributes.
    fn find(&self, parent: INodeNo, name: &OsStr) -> Answer<FileAttr> {
        let parent = self.node(parent)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(&parent.fd, name, flags, Mode::empty()).map_err(errno)?;
        let stat = fstat(&fd).map_err(errno)?;
        let key = (stat.st_dev, stat.st_ino);
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        let nodes = &mut *nodes;
        let id = *nodes.known.entry(key).or_insert_with(|| {
            nodes.next += 1;
            nodes.next - 1
        });
        let node = nodes.by_id.entry(id);
        let node = node.or_insert_with(|| Arc::new(Node { fd, lookups: AtomicU64::new(0) }));
        node.lookups.fetch_add(1, Ordering::Relaxed);
        Ok(attributes(&stat, id))
    }

    fn stat(&self, id: INodeNo) -> Answer<FileAttr> {
        let stat = fstat(&self.node(id)?.fd).map_err(errno)?;
        Ok(attributes(&stat, id.0))
    }

    fn open_file(&self, id: INodeNo, flags: OpenFlags) -> Answer<FileHandle> {
        let node = self.node(id)?;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&node.fd));
        let mut flags = OFlags::from_bits_retain(flags.0 as u32) | OFlags::CLOEXEC;
        flags.remove(OFlags::NOFOLLOW | OFlags::CREATE | OFlags::EXCL);
        let fd = open(path, flags, Mode::empty()).map_err(errno)?;
        Ok(self.keep(Open::File(File::from(fd))))
    }

    fn list(&self, id: INodeNo) -> Answer<FileHandle> {
        let node = self.node(id)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(&node.fd, ".", flags, Mode::empty()).map_err(errno)?;
        let mut entries = Vec::new();
        for entry in Dir::new(fd).map_err(errno)? {
            let entry = entry.map_err(errno)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
            entries.push((name, entry.ino(), kind(entry.file_type())));
        }
        Ok(self.keep(Open::Dir(entries)))
    }

    fn make(&self, parent: INodeNo, name: &OsStr, mode: u32, flags: i32) -> Answer<FileHandle> {
        let parent = self.node(parent)?;
        let flags = OFlags::from_bits_retain(flags as u32) | OFlags::CREATE | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let fd = openat(&parent.fd, name, flags | OFlags::NOFOLLOW, mode).map_err(errno)?;
        Ok(self.keep(Open::File(File::from(fd))))
    }

    fn file<T>(
        &self,
        handle: FileHandle,
        work: impl FnOnce(&File) -> std::io::Result<T>,
    ) -> Answer<T> {
        match &*self.opened(handle)? {
            Open::File(file) => work(file).map_err(Errno::from),
            Open::Dir(_) => Err(Errno::EISDIR),
        }
    }
}

/// Answers with the value, or with the errno.
macro_rules! answer {
    ($result:expr, $reply:ident, $value:pat => $then:expr) => {
        match $result {
            Ok($value) => $then,
            Err(error) => $reply.error(error),
        }
    };
}

impl Filesystem for Passthrough {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Each one is taken where the kernel has it.
        for flag in [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_AUTO_INVAL_DATA,
        ] {
            let _ = config.add_capabilities(flag);
        }
        let _ = config.set_max_write(MAX_WRITE);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        answer!(self.find(parent, name), reply, attr => reply.entry(&TTL, &attr, Generation(0)));
    }

    fn forget(&self, _req: &Request, id: INodeNo, lookups: u64) {
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        let Some(node) = nodes.by_id.get(&id.0) else { return };
        if node.lookups.fetch_sub(lookups, Ordering::Relaxed) > lookups || id.0 == 1 {
            return;
        }
        if let Ok(stat) = fstat(&node.fd) {
            nodes.known.remove(&(stat.st_dev, stat.st_ino));
        }
        nodes.by_id.remove(&id.0);
    }

    fn getattr(&self, _req: &Request, id: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        answer!(self.stat(id), reply, attr => reply.attr(&TTL, &attr));
    }

    fn setattr(
        &self,
        _req: &Request,
        id: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let done = match (size, fh) {
            (Some(size), Some(fh)) => self.file(fh, |file| Ok(ftruncate(file, size)?)),
            (Some(size), None) => {
                self.open_file(id, OpenFlags(OFlags::WRONLY.bits() as i32)).and_then(|fh| {
                    let done = self.file(fh, |file| Ok(ftruncate(file, size)?));
                    self.drop_handle(fh);
                    done
                })
            }
            (None, _) => Ok(()),
        };
        answer!(done.and_then(|()| self.stat(id)), reply, attr => reply.attr(&TTL, &attr));
    }

    fn mkdir(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.node(parent).and_then(|parent| {
            mkdirat(&parent.fd, name, Mode::from_raw_mode(mode & 0o7777)).map_err(errno)
        });
        let found = made.and_then(|()| self.find(parent, name));
        answer!(found, reply, attr => reply.entry(&TTL, &attr, Generation(0)));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self
            .node(parent)
            .and_then(|parent| unlinkat(&parent.fd, name, AtFlags::empty()).map_err(errno));
        answer!(done, reply, () => reply.ok());
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self
            .node(parent)
            .and_then(|parent| unlinkat(&parent.fd, name, AtFlags::REMOVEDIR).map_err(errno));
        answer!(done, reply, () => reply.ok());
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let both = self.node(parent).and_then(|from| Ok((from, self.node(newparent)?)));
        let done =
            both.and_then(|(from, to)| renameat(&from.fd, name, &to.fd, newname).map_err(errno));
        answer!(done, reply, () => reply.ok());
    }

    fn open(&self, _req: &Request, id: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        answer!(self.open_file(id, flags), reply, fh => reply.opened(fh, FopenFlags::empty()));
    }

    fn read(
        &self,
        _req: &Request,
        _id: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut data = vec![0; size as usize];
        let read = self.file(fh, |file| file.read_at(&mut data, offset));
        answer!(read, reply, n => reply.data(&data[..n]));
    }

    fn write(
        &self,
        _req: &Request,
        _id: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self.file(fh, |file| file.write_at(data, offset));
        answer!(written, reply, n => reply.written(n as u32));
    }

    fn flush(
        &self,
        _req: &Request,
        _id: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // As passthrough_ll does: closing a copy tells what a close would.
        let closed = self.file(fh, |file| file.try_clone().map(drop));
        answer!(closed, reply, () => reply.ok());
    }

    fn release(
        &self,
        _req: &Request,
        _id: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.drop_handle(fh);
        reply.ok();
    }

    fn fsync(
        &self,
        _req: &Request,
        _id: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        answer!(self.file(fh, |file| Ok(fsync(file)?)), reply, () => reply.ok());
    }

    fn opendir(&self, _req: &Request, id: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        answer!(self.list(id), reply, fh => reply.opened(fh, FopenFlags::empty()));
    }

    fn readdir(
        &self,
        _req: &Request,
        _id: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let Ok(open) = self.opened(fh) else { return reply.error(Errno::EBADF) };
        let Open::Dir(entries) = &*open else { return reply.error(Errno::ENOTDIR) };
        for (i, (name, ino, kind)) in entries.iter().enumerate().skip(offset as usize) {
            if reply.add(INodeNo(*ino), i as u64 + 1, *kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        req: &Request,
        id: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let Ok(open) = self.opened(fh) else { return reply.error(Errno::EBADF) };
        let Open::Dir(entries) = &*open else { return reply.error(Errno::ENOTDIR) };
        let Ok(dir) = self.node(id) else { return reply.error(Errno::ESTALE) };
        for (i, (name, _, _)) in entries.iter().enumerate().skip(offset as usize) {
            let dots = name == "." || name == "..";
            let found = if dots {
                // The kernel takes no node from these two, so none is counted.
                let stat = statat(&dir.fd, name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW);
                stat.map(|stat| attributes(&stat, stat.st_ino)).map_err(errno)
            } else {
                self.find(id, name)
            };
            // A name that vanished meanwhile is left out.
            let Ok(attr) = found else { continue };
            let next = i as u64 + 1;
            if reply.add(attr.ino, next, name, &TTL, &attr, Generation(0)) {
                if !dots {
                    self.forget(req, attr.ino, 1);
                }
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _id: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.drop_handle(fh);
        reply.ok();
    }

    fn create(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let made = self.make(parent, name, mode, flags);
        let made = made.and_then(|fh| Ok((fh, self.find(parent, name)?)));
        answer!(made, reply, (fh, attr) => {
            reply.created(&TTL, &attr, Generation(0), fh, FopenFlags::empty())
        });
    }
}

fn errno(errno: rustix::io::Errno) -> Errno {
    Errno::from_i32(errno.raw_os_error())
}

fn kind(file_type: rustix::fs::FileType) -> FileType {
    use rustix::fs::FileType as Type;
    match file_type {
        Type::Directory => FileType::Directory,
        Type::Symlink => FileType::Symlink,
        Type::Fifo => FileType::NamedPipe,
        Type::Socket => FileType::Socket,
        Type::CharacterDevice => FileType::CharDevice,
        Type::BlockDevice => FileType::BlockDevice,
        Type::RegularFile | Type::Unknown => FileType::RegularFile,
    }
}

fn attributes(stat: &Stat, id: u64) -> FileAttr {
    let time =
        |seconds: i64, nanos: u64| UNIX_EPOCH + Duration::new(seconds.max(0) as u64, nanos as u32);
    FileAttr {
        ino: INodeNo(id),
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime as i64, stat.st_atime_nsec as u64),
        mtime: time(stat.st_mtime as i64, stat.st_mtime_nsec as u64),
        ctime: time(stat.st_ctime as i64, stat.st_ctime_nsec as u64),
        crtime: UNIX_EPOCH,
        kind: kind(rustix::fs::FileType::from_raw_mode(stat.st_mode)),
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev as u32,
        blksize: stat.st_blksize as u32,
        flags: 0,
    }
}
