//! Regular files: opening, reading, writing, syncing, closing.
//!
//! Flags of open(2) pass an allow list, and READ and WRITE use no flags of theirs at all.

use std::os::fd::AsFd;
use std::sync::Arc;

use ringfs_wire::abi::{self, fopen};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::creds::{CredsError, EffectiveIds};
use crate::dispatch::{IO_BYTES_MAX, Request, Route, name_alone};
use crate::fdops;
use crate::fs::{CacheMode, Fs};
use crate::handles::{Handle, OpenFile};
use crate::nodes::{Backing, Node};
use crate::ops::names::{groups, parent_for_new};
use crate::ops::no_fsetid;
use crate::passthrough::{Caller, Stat};
use crate::reply::put;
use crate::store;

const O_APPEND: u32 = libc::O_APPEND as u32;
const O_CREAT: u32 = libc::O_CREAT as u32;
const O_DIRECT: u32 = libc::O_DIRECT as u32;
const O_EXCL: u32 = libc::O_EXCL as u32;
const O_PATH: u32 = libc::O_PATH as u32;
const O_RDWR: u32 = libc::O_RDWR as u32;
const O_SYNC: u32 = libc::O_SYNC as u32;
const O_DSYNC: u32 = libc::O_DSYNC as u32;
const O_TRUNC: u32 = libc::O_TRUNC as u32;
const O_WRONLY: u32 = libc::O_WRONLY as u32;
const ACCESS: u32 = libc::O_ACCMODE as u32;
/// The bit that makes O_TMPFILE of O_DIRECTORY.
const TMPFILE_BIT: u32 = libc::O_TMPFILE as u32 & !(libc::O_DIRECTORY as u32);
/// What O_DIRECT may ask memory to be aligned to.
const DIRECT_ALIGN: usize = 4096;

/// Flags for the host's open(2), or why not. What is not in the list (O_CREAT, O_EXCL, O_NOCTTY,
/// O_NOATIME, O_NONBLOCK, ...) is left out: it has no meaning for an OPEN, or none for us.
fn host_flags(fs: &Fs, flags: u32) -> Result<u32, Errno> {
    if flags & (O_PATH | TMPFILE_BIT) != 0 || flags & ACCESS == ACCESS {
        return Err(Errno::INVAL);
    }
    if fs.options.read_only && (flags & ACCESS != 0 || flags & O_TRUNC != 0) {
        return Err(Errno::ROFS);
    }
    // The guest's kernel says O_TRUNC in a CREATE, as somebody else may have made the file; in an
    // OPEN where the INIT answer of an older daemon asks for it.
    let mut kept = flags & (ACCESS | O_APPEND | O_SYNC | O_DSYNC | O_TRUNC);
    if fs.options.direct_io {
        kept |= flags & O_DIRECT;
    }
    if fs.writeback() {
        // The guest's kernel knows where the end is, and reads what it fills up pages with.
        kept &= !O_APPEND;
        if kept & ACCESS == O_WRONLY {
            kept = kept & !ACCESS | O_RDWR;
        }
    }
    Ok(kept)
}

/// Flags of the answer: what the guest's kernel may cache, and what it need not ask. `flags` are
/// the guest's own.
///
/// An `O_DIRECT` file bypasses the guest's cache as a whole, because only then does its kernel let
/// writes run side by side; where shared mappings of such a file are allowed, no program can tell.
///
/// No FLUSH where none has anything to say: a local file system keeps no error for close(2), locks
/// are the guest kernel's own, and this handle cannot have left anything behind, since each write
/// has told its error and a file opened for reading or for writing alone has no shared writable
/// mapping. A file opened for both may have one, whose pages a close stores.
fn fopen_flags(fs: &Fs, flags: u32) -> u32 {
    let direct = fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES;
    let mmap = fs.negotiated() & abi::init::DIRECT_IO_ALLOW_MMAP != 0;
    let cached = match fs.options.cache {
        CacheMode::Never | CacheMode::Metadata => direct,
        // Not with `always`: kernels before the fix of xfstests' generic/209 may keep a page that
        // was read beside such a write, and only a check of the mtime drops it.
        CacheMode::Auto if flags & O_DIRECT != 0 && mmap && !fs.writeback() => direct,
        CacheMode::Auto => 0,
        CacheMode::Always => fopen::KEEP_CACHE,
    };
    let silent = fs.local && !fs.writeback() && flags & ACCESS != O_RDWR;
    if silent { cached | fopen::NOFLUSH } else { cached }
}

/// True for an OPEN that may free many blocks.
pub fn truncates(_: &Fs, request: &Request<'_>) -> bool {
    request.head::<abi::OpenIn>().is_ok_and(|open| open.flags & O_TRUNC != 0)
}

/// OPEN of a regular file.
pub fn open(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let open: abi::OpenIn = request.head()?;
    fs.handles.check_room()?;
    let node = fs.nodes.find(request.nodeid)?;
    check_regular(&node)?;
    let flags = host_flags(fs, open.flags)?;
    let kill = open.open_flags & abi::FUSE_OPEN_KILL_SUIDGID != 0;
    let fd = match node.backing()? {
        Backing::Crate(inode) => fs.backend.open(inode, flags, kill)?,
        Backing::Fd(fd) => {
            let _fsetid = no_fsetid(kill)?;
            let again = fdops::reopen(fd, OFlags::from_bits_retain(flags))?;
            if flags & O_TRUNC != 0 {
                fdops::truncate_fd(again.as_fd(), 0)?;
            }
            again
        }
    };
    let (file, is_first) = fs.opened(node, fd, flags);
    let mut open_flags = fopen_flags(fs, open.flags);
    if is_first && store::content_of(fs, request, &file, open_flags) {
        open_flags |= fopen::KEEP_CACHE;
    }
    let fh = fs.handles.insert(Handle::File(Arc::new(file)));
    put(out, &abi::OpenOut { fh, open_flags, backing_id: 0 })
}

/// The file of a handle that was open before: nothing is made, cut off or asked anew.
pub(crate) fn open_again(fs: &Fs, nodeid: u64, flags: u32) -> Result<Handle, Errno> {
    let flags = host_flags(fs, flags & !(O_CREAT | O_EXCL | O_TRUNC | TMPFILE_BIT))?;
    let node = fs.nodes.find(nodeid)?;
    check_regular(&node)?;
    let fd = fs.backend.open(node.inode()?, flags, false)?;
    Ok(fs.file_handle(node, fd, flags))
}

fn check_regular(node: &Node) -> Result<(), Errno> {
    match node.kind() {
        libc::S_IFREG => Ok(()),
        libc::S_IFDIR => Err(Errno::ISDIR),
        libc::S_IFLNK => Err(Errno::LOOP),
        // Pipes, sockets and devices are the guest kernel's own business.
        _ => Err(Errno::NXIO),
    }
}

/// CREATE: makes and opens; or opens what somebody else has just made, unless O_EXCL is set.
pub fn create(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let (create, rest): (abi::CreateIn, _) = request.head_rest()?;
    let name = name_alone(rest)?;
    fs.handles.check_room()?;
    let flags = host_flags(fs, create.flags)?;
    let parent = parent_for_new(fs, request)?;
    let mode = fs.masked(&parent, fs.file_bits(create.mode & 0o7777), create.umask)?;
    let caller = request.caller(fs)?;
    let _groups = groups(fs, request)?;
    let made = fs.backend.create(caller, parent.inode()?, name, flags | O_CREAT, mode);
    let (node, entry, fd) = match made {
        Ok((found, fd)) => {
            let (node, entry) = fs.give(request, &found, &parent, name)?;
            (node, entry, fd)
        }
        Err(Errno::EXIST) if create.flags & O_EXCL == 0 => {
            let found = fs.backend.lookup(parent.inode()?, name)?;
            let (node, entry) = fs.give(request, &found, &parent, name)?;
            let kill = create.open_flags & abi::FUSE_OPEN_KILL_SUIDGID != 0;
            let opened = check_regular(&node).and_then(|()| {
                // The guest's kernel checked the directory only, so the host checks the file.
                let _ids = act_as(fs, caller)?;
                fs.backend.open(found.inode, flags, kill)
            });
            match opened {
                Ok(fd) => (node, entry, fd),
                Err(error) => {
                    fs.forget(std::iter::once((node.id, 1)));
                    return Err(error);
                }
            }
        }
        Err(error) => return Err(error),
    };
    let fh = fs.insert_file(node, fd, flags);
    reply_created(fs, &entry, fh, create.flags, out)
}

/// Answers a CREATE with the file that it made before, opened as it is: who makes a file may open
/// it, whatever its mode.
pub(crate) fn open_made(
    fs: &Fs,
    request: &Request<'_>,
    node: Arc<Node>,
    inode: u64,
    entry: &abi::EntryOut,
    out: &mut [u8],
) -> Result<usize, Errno> {
    let create: abi::CreateIn = request.head()?;
    check_regular(&node)?;
    let flags = host_flags(fs, create.flags & !O_TRUNC)?;
    let fd = fs.backend.open(inode, flags, false)?;
    let fh = fs.insert_file(node, fd, flags);
    reply_created(fs, entry, fh, create.flags, out)
}

/// TMPFILE: a file without a name; the name in the request means nothing.
pub fn tmpfile(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let create: abi::CreateIn = request.head()?;
    fs.handles.check_room()?;
    let flags = host_flags(fs, create.flags & !(TMPFILE_BIT | O_TRUNC))?;
    let parent = parent_for_new(fs, request)?;
    let mode = fs.masked(&parent, fs.file_bits(create.mode & 0o7777), create.umask)?;
    let directory = fs.backend.path_fd(parent.inode()?)?;
    let fd = {
        let _groups = groups(fs, request)?;
        let _ids = act_as(fs, request.caller(fs)?)?;
        // With O_EXCL it can never get a name.
        let flags = OFlags::from_bits_retain(flags | create.flags & O_EXCL);
        fdops::open_tmpfile(directory.as_fd(), flags, Mode::from_raw_mode(mode))?
    };
    let stat = Stat::of(&fd)?;
    let node = fs.nodes.give_unnamed(rustix::io::fcntl_dupfd_cloexec(&fd, 0)?)?;
    let entry = fs.entry(node.id, &stat);
    let fh = fs.insert_file(node, fd, flags);
    reply_created(fs, &entry, fh, create.flags, out)
}

/// The host shall decide as for this user. An unprivileged daemon impersonates nobody.
fn act_as(fs: &Fs, caller: Caller) -> Result<Option<EffectiveIds>, Errno> {
    if fs.backend.squashes() {
        return Ok(None);
    }
    EffectiveIds::switch(caller.uid, caller.gid).map(Some).map_err(CredsError::errno)
}

fn reply_created(
    fs: &Fs,
    entry: &abi::EntryOut,
    fh: u64,
    flags: u32,
    out: &mut [u8],
) -> Result<usize, Errno> {
    let open_flags = fopen_flags(fs, flags);
    let used = put(out, entry)?;
    Ok(used + put(&mut out[used..], &abi::OpenOut { fh, open_flags, backing_id: 0 })?)
}

/// READ, checked: file, offset and length.
fn checked_read(fs: &Fs, request: &Request<'_>) -> Result<(Arc<OpenFile>, u64, u32), Errno> {
    let read: abi::ReadIn = request.head()?;
    let file = fs.handles.file(read.fh, request.nodeid)?;
    if !file.readable {
        return Err(Errno::BADF);
    }
    let len = read.size.min(IO_BYTES_MAX as u32);
    check_range(read.offset, u64::from(len), Errno::INVAL)?;
    Ok((file, read.offset, len))
}

/// Where a READ goes.
pub fn route_read(fs: &Fs, request: &Request<'_>) -> Result<Route, Errno> {
    let (file, offset, len) = checked_read(fs, request)?;
    Ok(Route::Read { file, offset, len })
}

/// READ on this thread.
pub fn read(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let (file, offset, len) = checked_read(fs, request)?;
    let out = out.get_mut(..len as usize).ok_or(Errno::OVERFLOW)?;
    if !file.direct {
        return fdops::read_at(file.as_fd(), offset, out);
    }
    let mut bounce = vec![0; out.len() + DIRECT_ALIGN];
    let start = bounce.as_ptr().align_offset(DIRECT_ALIGN).min(DIRECT_ALIGN);
    let aligned = &mut bounce[start..start + out.len()];
    let count = fdops::read_at(file.as_fd(), offset, aligned)?;
    out[..count].copy_from_slice(&aligned[..count]);
    Ok(count)
}

/// A WRITE, checked.
struct Write {
    file: Arc<OpenFile>,
    offset: u64,
    /// Within the request's arguments.
    payload: std::ops::Range<usize>,
    kill: bool,
    /// Pages that the guest's kernel writes back: it looks at the error only, not at the count.
    pages: bool,
}

fn checked_write(fs: &Fs, request: &Request<'_>) -> Result<Write, Errno> {
    let (write, rest): (abi::WriteIn, _) = request.head_rest()?;
    let file = fs.handles.file(write.fh, request.nodeid)?;
    if !file.writable {
        return Err(Errno::BADF);
    }
    let size = write.size as usize;
    if size > IO_BYTES_MAX || size > rest.len() {
        return Err(Errno::INVAL);
    }
    check_range(write.offset, size as u64, Errno::FBIG)?;
    let start = size_of::<abi::WriteIn>();
    let pages = write.write_flags & abi::FUSE_WRITE_CACHE != 0;
    Ok(Write {
        file: if pages { file.for_pages()? } else { file },
        pages,
        offset: write.offset,
        payload: start..start + size,
        kill: write.write_flags & abi::FUSE_WRITE_KILL_SUIDGID != 0,
    })
}

/// The file that a WRITE goes to.
pub(crate) fn written(fs: &Fs, request: &Request<'_>) -> Result<Arc<OpenFile>, Errno> {
    checked_write(fs, request).map(|write| write.file)
}

/// The bytes of a WRITE.
pub(crate) fn payload<'a>(request: &Request<'a>) -> Result<&'a [u8], Errno> {
    let (write, rest): (abi::WriteIn, _) = request.head_rest()?;
    rest.get(..write.size as usize).ok_or(Errno::INVAL)
}

/// Where a WRITE goes: one that must clear suid and sgid runs without CAP_FSETID, on a thread.
pub fn route_write(fs: &Fs, request: &Request<'_>) -> Result<Route, Errno> {
    let Write { file, offset, payload, kill, pages } = checked_write(fs, request)?;
    if kill {
        return Ok(Route::Pool);
    }
    Ok(Route::Write { file, offset, payload, pages })
}

/// WRITE on this thread.
pub fn write(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let Write { file, offset, payload, kill, pages } = checked_write(fs, request)?;
    let data = request.args.get(payload).ok_or(Errno::INVAL)?;
    let _fsetid = no_fsetid(kill)?;
    let count = if file.direct {
        let mut bounce = vec![0; data.len() + DIRECT_ALIGN];
        let start = bounce.as_ptr().align_offset(DIRECT_ALIGN).min(DIRECT_ALIGN);
        let aligned = &mut bounce[start..start + data.len()];
        aligned.copy_from_slice(data);
        fdops::write_all_at(file.as_fd(), offset, aligned, pages)?
    } else {
        fdops::write_all_at(file.as_fd(), offset, data, pages)?
    };
    put(out, &abi::WriteOut { size: count as u32, padding: 0 })
}

/// `offset + len` must stay within what a file can have.
fn check_range(offset: u64, len: u64, error: Errno) -> Result<(), Errno> {
    match offset.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        Some(_) | None => Err(error),
    }
}

fn checked_fsync(fs: &Fs, request: &Request<'_>) -> Result<(Arc<OpenFile>, bool), Errno> {
    let fsync: abi::FsyncIn = request.head()?;
    let file = fs.handles.file(fsync.fh, request.nodeid)?;
    Ok((file, fsync.fsync_flags & abi::FUSE_FSYNC_FDATASYNC != 0))
}

/// Where an FSYNC goes.
pub fn route_fsync(fs: &Fs, request: &Request<'_>) -> Result<Route, Errno> {
    let (file, data_only) = checked_fsync(fs, request)?;
    Ok(Route::Fsync { file, data_only })
}

/// FSYNC on this thread.
pub fn fsync(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let (file, data_only) = checked_fsync(fs, request)?;
    if data_only {
        rustix::fs::fdatasync(file.as_ref())?;
    } else {
        rustix::fs::fsync(file.as_ref())?;
    }
    Ok(0)
}

/// FLUSH: errors that the file system keeps for close(2). Local ones keep none.
pub fn flush(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let flush: abi::FlushIn = request.head()?;
    let file = fs.handles.file(flush.fh, request.nodeid)?;
    if !fs.local {
        fdops::flush(file.as_fd())?;
    }
    Ok(0)
}

/// RELEASE: the fd closes when the last operation on it ends.
pub fn release(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let release: abi::ReleaseIn = request.head()?;
    fs.handles.remove(release.fh, request.nodeid, false)?;
    Ok(0)
}

/// FALLOCATE: allocate, punch, zero.
pub fn fallocate(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let ask: abi::FallocateIn = request.head()?;
    let file = writable(fs, ask.fh, request.nodeid)?;
    check_range(ask.offset, ask.length, Errno::FBIG)?;
    // The kernel says nothing of suid here; an ordinary user's change must clear it.
    let _fsetid = no_fsetid(request.uid != 0)?;
    fdops::fallocate(file.as_fd(), ask.mode, ask.offset, ask.length)?;
    Ok(0)
}

fn writable(fs: &Fs, fh: u64, nodeid: u64) -> Result<Arc<OpenFile>, Errno> {
    let file = fs.handles.file(fh, nodeid)?;
    if file.writable { Ok(file) } else { Err(Errno::BADF) }
}

/// LSEEK: holes and data; the fd's own position has no meaning to anybody.
pub fn lseek(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let ask: abi::LseekIn = request.head()?;
    let file = fs.handles.file(ask.fh, request.nodeid)?;
    put(out, &abi::LseekOut { offset: fdops::seek(file.as_fd(), ask.offset, ask.whence)? })
}

/// COPY_FILE_RANGE, whose reply counts in 32 bits.
pub fn copy_file_range(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let copied = copy(fs, request)?;
    put(out, &abi::WriteOut { size: copied as u32, padding: 0 })
}

/// COPY_FILE_RANGE_64.
pub fn copy_file_range_64(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let bytes_copied = copy(fs, request)?;
    put(out, &abi::CopyFileRangeOut { bytes_copied })
}

/// At most [`fdops::COPY_BYTES_MAX`], so 32 bits are enough.
fn copy(fs: &Fs, request: &Request<'_>) -> Result<u64, Errno> {
    let ask: abi::CopyFileRangeIn = request.head()?;
    let from = fs.handles.file(ask.fh_in, request.nodeid)?;
    let to = writable(fs, ask.fh_out, ask.nodeid_out)?;
    if ask.flags != 0 {
        return Err(Errno::INVAL);
    }
    if !from.readable {
        return Err(Errno::BADF);
    }
    let _fsetid = no_fsetid(request.uid != 0)?;
    fdops::copy_file_range(from.as_fd(), ask.off_in, to.as_fd(), ask.off_out, ask.len)
}

/// SYNCFS: the whole file system of the share's root.
pub fn syncfs(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    fs.nodes.find(request.nodeid)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(&fs.root, c".", flags, Mode::empty())?;
    fdops::syncfs(root.as_fd())?;
    Ok(0)
}
