//! Directories: OPENDIR, READDIR, READDIRPLUS, RELEASEDIR, FSYNCDIR.
//!
//! A directory is read with getdents64 on the handle's fd, and an entry's offset is the host's
//! `d_off`, so seeking works as it does there and each call reads on where the last one ended.
//! An entry that does not fit is not looked up: no count is given that the guest does not get.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, TryLockError};

use ringfs_wire::abi::{self, fopen};
use rustix::fs::{FileType, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use crate::dispatch::Request;
use crate::fdops;
use crate::fds::Counted;
use crate::fs::{CacheMode, Fs};
use crate::handles::{Handle, OpenDir};
use crate::passthrough::Stat;
use crate::reply::{put, put_bytes};
use zerocopy::IntoBytes;

/// getdents64 refuses a buffer that the next entry does not fit into: 19 + 256 bytes, and more
/// than that on none of the file systems that we know.
const SCRATCH_BYTES_MIN: usize = 1024;
const SCRATCH_BYTES_MAX: usize = 64 << 10;
/// About fifty entries with a LOOKUP each, and two thousand without one: more would hold a shard
/// up.
const PLUS_INLINE_BYTES_MAX: u32 = 8 << 10;
const INLINE_BYTES_MAX: u32 = 64 << 10;

/// OPENDIR.
pub fn opendir(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let _: abi::OpenIn = request.head()?;
    fs.handles.check_room()?;
    let fh = fs.handles.insert(open_dir(fs, request.nodeid)?);
    let open_flags = match fs.options.cache {
        CacheMode::Never | CacheMode::Auto => 0,
        CacheMode::Metadata | CacheMode::Always => fopen::KEEP_CACHE | fopen::CACHE_DIR,
    };
    put(out, &abi::OpenOut { fh, open_flags, backing_id: 0 })
}

/// A directory's fd at its start.
pub(crate) fn open_dir(fs: &Fs, nodeid: u64) -> Result<Handle, Errno> {
    let node = fs.nodes.find(nodeid)?;
    if !node.is_dir() {
        return Err(Errno::NOTDIR);
    }
    let flags = (libc::O_RDONLY | libc::O_DIRECTORY) as u32;
    let fd = fs.backend.open(node.inode()?, flags, false)?;
    let dev = Stat::of(&fd)?.dev;
    let dir = OpenDir {
        counted: Counted::new(&node.home().fds),
        node,
        fd,
        dev,
        position: Mutex::new(Some(0)),
    };
    Ok(Handle::Dir(Arc::new(dir)))
}

/// RELEASEDIR.
pub fn releasedir(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let release: abi::ReleaseIn = request.head()?;
    fs.handles.remove(release.fh, request.nodeid, true)?;
    Ok(0)
}

/// FSYNCDIR.
pub fn fsyncdir(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let fsync: abi::FsyncIn = request.head()?;
    let dir = fs.handles.dir(fsync.fh, request.nodeid)?;
    if fsync.fsync_flags & abi::FUSE_FSYNC_FDATASYNC != 0 {
        rustix::fs::fdatasync(&dir.fd)?;
    } else {
        rustix::fs::fsync(&dir.fd)?;
    }
    Ok(0)
}

/// READDIR: names, types and inode numbers; `.` and `..` too.
pub fn readdir(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let scratch_bytes = out.len();
    let (dir, offset) = checked(fs, request)?;
    fill(&dir, offset, scratch_bytes, |used, entry| {
        let bytes = size_of::<abi::Dirent>() + padded(entry.name);
        let Some(space) = out.get_mut(used..used + bytes) else { return Ok(0) };
        put_dirent(space, entry, guest_ino(fs, &dir, entry))?;
        Ok(bytes)
    })
}

/// True for a READDIR of many entries.
pub fn is_long(_: &Fs, request: &Request<'_>) -> bool {
    request.head::<abi::ReadIn>().is_ok_and(|read| read.size > INLINE_BYTES_MAX)
}

/// True for a READDIRPLUS with many LOOKUPs.
pub fn is_long_plus(_: &Fs, request: &Request<'_>) -> bool {
    request.head::<abi::ReadIn>().is_ok_and(|read| read.size > PLUS_INLINE_BYTES_MAX)
}

/// READDIRPLUS: each entry with the answer to its LOOKUP.
pub fn readdirplus(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    // An entry takes about six times the room that getdents64 needs.
    let scratch_bytes = out.len() / 6;
    let (dir, offset) = checked(fs, request)?;
    let parent = dir.node.inode()?;
    fill(&dir, offset, scratch_bytes, |used, entry| {
        let bytes = size_of::<abi::DirentPlus>() + padded(entry.name);
        let Some(space) = out.get_mut(used..used + bytes) else { return Ok(0) };
        let mut ino = guest_ino(fs, &dir, entry);
        let mut entry_out = abi::EntryOut::default();
        if !is_dot(entry.name) {
            // Gone in between, hidden, or no room: node id 0 tells the kernel to ask on its own.
            let found = fs.nodes.check_room();
            let found = found
                .and_then(|()| fs.backend.lookup(parent, entry.name))
                .and_then(|found| fs.give(request, &found, &dir.node, entry.name));
            if let Ok((_, given)) = found {
                ino = given.attr.ino;
                entry_out = given;
            }
        }
        let head = put(space, &entry_out)?;
        put_dirent(&mut space[head..], entry, ino)?;
        Ok(bytes)
    })
}

fn checked(fs: &Fs, request: &Request<'_>) -> Result<(Arc<OpenDir>, u64), Errno> {
    let read: abi::ReadIn = request.head()?;
    let dir = fs.handles.dir(read.fh, request.nodeid)?;
    if i64::try_from(read.offset).is_err() {
        return Err(Errno::INVAL);
    }
    Ok((dir, read.offset))
}

/// One entry as the host gave it.
struct HostEntry<'a> {
    name: &'a CStr,
    ino: u64,
    /// Where the next entry is.
    next: u64,
    kind: FileType,
}

/// Reads entries from `offset` on and hands each to `emit`, which is told how many bytes are used
/// and says how many it added; 0 means that the entry does not fit, and ends the call.
fn fill(
    dir: &OpenDir,
    offset: u64,
    scratch_bytes: usize,
    mut emit: impl FnMut(usize, &HostEntry<'_>) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    let own;
    let mut own_position = Some(0);
    let mut shared = match dir.position.try_lock() {
        Ok(position) => Some(position),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        // A thread of the pool may read for long. Nobody waits for it, and a shard must not: this
        // call has an fd of its own.
        Err(TryLockError::WouldBlock) => None,
    };
    let (fd, position) = match &mut shared {
        Some(position) => (dir.fd.as_fd(), &mut **position),
        None => {
            own = fdops::reopen(dir.fd.as_fd(), OFlags::RDONLY | OFlags::DIRECTORY)?;
            (own.as_fd(), &mut own_position)
        }
    };
    if *position != Some(offset) {
        rustix::fs::seek(fd, SeekFrom::Start(offset))?;
    }
    // Until we know where it stands: unknown.
    *position = None;
    let scratch_bytes = scratch_bytes.clamp(SCRATCH_BYTES_MIN, SCRATCH_BYTES_MAX);
    let mut scratch = Vec::<u8>::with_capacity(scratch_bytes);
    let mut entries = RawDir::new(fd, scratch.spare_capacity_mut());
    let (mut used, mut next) = (0, offset);
    loop {
        match entries.next() {
            None => {
                *position = Some(next);
                return Ok(used);
            }
            Some(Err(error)) if used == 0 => return Err(error),
            Some(Err(_)) => return Ok(used),
            Some(Ok(entry)) => {
                let entry = HostEntry {
                    name: entry.file_name(),
                    ino: entry.ino(),
                    next: entry.next_entry_cookie(),
                    kind: entry.file_type(),
                };
                match emit(used, &entry)? {
                    // An empty answer would mean the end of the directory.
                    0 if used == 0 => return Err(Errno::INVAL),
                    0 => return Ok(used),
                    bytes => used += bytes,
                }
                next = entry.next;
            }
        }
    }
}

/// The kernel pads each record to 8 bytes.
fn padded(name: &CStr) -> usize {
    name.count_bytes().next_multiple_of(8)
}

fn is_dot(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

/// `..` of the share's root must not tell what is above it.
fn guest_ino(fs: &Fs, dir: &OpenDir, entry: &HostEntry<'_>) -> u64 {
    if dir.node.id == abi::FUSE_ROOT_ID && is_dot(entry.name) {
        return fs.root_ino();
    }
    fs.guest_ino(dir.dev, entry.ino)
}

/// Fills `space` wholly: header, name, zeros.
fn put_dirent(space: &mut [u8], entry: &HostEntry<'_>, ino: u64) -> Result<(), Errno> {
    let name = entry.name.to_bytes();
    let type_ = match entry.kind {
        FileType::Unknown => 0,
        known => (known.as_raw_mode() & libc::S_IFMT) >> 12,
    };
    let head = abi::Dirent { ino, off: entry.next, namelen: name.len() as u32, type_ };
    space.fill(0);
    let used = put_bytes(space, head.as_bytes())?;
    put_bytes(&mut space[used..], name)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::FsOptions;
    use ringfs_wire::abi::{FUSE_ROOT_ID, Opcode};
    use std::sync::mpsc;
    use std::time::Duration;
    use zerocopy::FromBytes;

    fn ask(fs: &Fs, opcode: Opcode, args: &[u8]) -> Vec<u8> {
        let body = [&FUSE_ROOT_ID.to_le_bytes()[..], &[0; 16], args].concat();
        let request = Request::parse(opcode as u32, &body).expect("a request");
        let mut out = vec![0; fs.reply_bytes_max(&request)];
        let used = fs.execute(&request, &mut out).expect("a reply");
        out.truncate(used);
        out
    }

    #[test]
    fn who_reads_a_directory_waits_for_no_other_reader() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for i in 0..1000 {
            std::fs::write(dir.path().join(format!("file{i}")), "").expect("a file");
        }
        let fs = Fs::new(dir.path(), FsOptions::default()).expect("a session");
        let opened = ask(&fs, Opcode::Opendir, abi::OpenIn::default().as_bytes());
        let fh = abi::OpenOut::read_from_bytes(&opened).expect("opened").fh;
        let read = |offset| {
            let read = abi::ReadIn { fh, offset, size: 4096, ..Default::default() };
            ask(&fs, Opcode::Readdir, read.as_bytes())
        };
        let first = read(0);
        // Where its first entry ends the second begins.
        let next = abi::Dirent::read_from_prefix(&first).expect("an entry").0.off;
        let expected = [first, read(next)];
        let handle = fs.handles.dir(fh, FUSE_ROOT_ID).expect("a directory");
        let reading = handle.position.lock().expect("the lock");
        let (done, wait) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| done.send([read(0), read(next)]).expect("somebody waits"));
            let seen = wait.recv_timeout(Duration::from_secs(20));
            drop(reading);
            assert_eq!(seen.expect("an answer while another one reads"), expected);
        });
    }
}
