//! Attributes: GETATTR, SETATTR, STATX, ACCESS, STATFS.

use std::os::fd::{AsFd, BorrowedFd};

use ringfs_wire::abi::{self, fattr};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::dispatch::Request;
use crate::fdops::{self, SetTime};
use crate::fs::Fs;
use crate::idmap::{IdMap, Ids};
use crate::nodes::{Backing, Node};
use crate::ops::no_fsetid;
use crate::passthrough::{Caller, Changes, Stat};
use crate::reply::put;

/// What GETATTR gives too.
const STATX_BASIC: u32 = 0x7ff;

/// GETATTR, of an open file by its fd.
pub fn getattr(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let getattr: abi::GetattrIn = request.head()?;
    let stat = if getattr.getattr_flags & abi::FUSE_GETATTR_FH != 0 {
        Stat::of(fs.handles.file(getattr.fh, request.nodeid)?.as_ref())?
    } else {
        let node = fs.nodes.find(request.nodeid)?;
        stat_of(fs, &node)?
    };
    put(out, &fs.attr_out(&stat))
}

fn stat_of(fs: &Fs, node: &Node) -> Result<Stat, Errno> {
    match node.backing()? {
        Backing::Crate(inode) => fs.backend.getattr(inode),
        Backing::Fd(fd) => Stat::of(fd),
    }
}

/// True for what may free many blocks.
pub fn may_truncate(_: &Fs, request: &Request<'_>) -> bool {
    request.head::<abi::SetattrIn>().is_ok_and(|setattr| setattr.valid & fattr::SIZE != 0)
}

/// SETATTR; the time of change is the host's own and cannot be set.
pub fn setattr(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let setattr: abi::SetattrIn = request.head()?;
    let node = fs.nodes.find(request.nodeid)?;
    let changes = changes(fs, &node, &setattr)?;
    let stat = if setattr.valid & fattr::FH != 0 {
        let file = fs.handles.file(setattr.fh, request.nodeid)?;
        change_fd(file.as_fd(), &changes)
    } else {
        match node.backing()? {
            Backing::Crate(inode) => fs.backend.setattr(inode, &changes),
            Backing::Fd(fd) => change_fd(fd, &changes),
        }
    };
    // In a user namespace that is what the kernel says of an id that is nobody's there. Programs
    // that copy owners too know that they may not, and not this.
    let is_owner = setattr.valid & (fattr::UID | fattr::GID) != 0;
    let stat = stat.map_err(|errno| match errno {
        Errno::INVAL if is_owner => Errno::PERM,
        other => other,
    })?;
    put(out, &fs.attr_out(&stat))
}

fn changes(fs: &Fs, node: &Node, setattr: &abi::SetattrIn) -> Result<Changes, Errno> {
    let asked = |bit| setattr.valid & bit != 0;
    let id = |bit, id: u32, map: &IdMap| match (asked(bit), id) {
        (false, _) => Ok(None),
        // To the system call it would mean "leave it".
        (true, u32::MAX) => Err(Errno::INVAL),
        (true, id) => map.to_host(id).map(Some),
    };
    let ids = &*fs.options.ids;
    let mode = setattr.mode & 0o7777;
    let mode = if node.is_dir() { mode } else { fs.file_bits(mode) };
    let time = |bit, now, sec: u64, nsec: u32| match (asked(bit), asked(now)) {
        (false, _) => Ok(SetTime::Omit),
        (true, true) => Ok(SetTime::Now),
        (true, false) if nsec < 1_000_000_000 => Ok(SetTime::At(sec as i64, nsec)),
        (true, false) => Err(Errno::INVAL),
    };
    if asked(fattr::SIZE) && i64::try_from(setattr.size).is_err() {
        return Err(Errno::FBIG);
    }
    Ok(Changes {
        mode: asked(fattr::MODE).then_some(mode),
        uid: id(fattr::UID, setattr.uid, &ids.users)?,
        gid: id(fattr::GID, setattr.gid, &ids.groups)?,
        size: asked(fattr::SIZE).then_some(setattr.size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, setattr.atime, setattr.atimensec)?,
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, setattr.mtime, setattr.mtimensec)?,
        kill_suidgid: asked(fattr::KILL_SUIDGID),
    })
}

/// In the order of the crate: mode, owner, size, times.
fn change_fd(fd: BorrowedFd<'_>, changes: &Changes) -> Result<Stat, Errno> {
    if let Some(mode) = changes.mode {
        fdops::chmod_fd(fd, mode)?;
    }
    if changes.uid.is_some() || changes.gid.is_some() {
        fdops::chown_fd(fd, changes.uid, changes.gid)?;
    }
    if let Some(size) = changes.size {
        let _fsetid = no_fsetid(changes.kill_suidgid)?;
        fdops::truncate_fd(fd, size)?;
    }
    let times = [&changes.atime, &changes.mtime];
    if times.iter().any(|time| !matches!(time, SetTime::Omit)) {
        fdops::utimens_fd(fd, changes.atime, changes.mtime)?;
    }
    Stat::of(fd)
}

/// STATX: with the time of birth, where the host knows it.
pub fn statx(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let ask: abi::StatxIn = request.head()?;
    let node = fs.nodes.find(request.nodeid)?;
    let stat = if ask.getattr_flags & abi::FUSE_GETATTR_FH != 0 {
        let file = fs.handles.file(ask.fh, request.nodeid)?;
        statx_fd(fs, file.as_fd(), &ask)?
    } else {
        match node.backing()? {
            Backing::Crate(inode) if matches!(node.kind(), libc::S_IFREG | libc::S_IFDIR) => {
                let fd = fs.backend.path_fd(inode)?;
                statx_fd(fs, fd.as_fd(), &ask)?
            }
            Backing::Crate(inode) => {
                let basic = fs.backend.getattr(inode)?;
                statx_named(fs, &node, &basic, &ask).unwrap_or_else(|| statx_basic(fs, &basic))
            }
            Backing::Fd(fd) => statx_fd(fs, fd, &ask)?,
        }
    };
    let attr_valid = crate::fs::valid_secs(fs.options.cache);
    put(out, &abi::StatxOut { attr_valid, stat, ..abi::StatxOut::default() })
}

fn statx_fd(fs: &Fs, fd: BorrowedFd<'_>, ask: &abi::StatxIn) -> Result<abi::Statx, Errno> {
    let seen = fdops::statx(fd, ask.sx_mask | STATX_BASIC, ask.sx_flags)?;
    let dev = rustix::fs::makedev(seen.dev_major, seen.dev_minor);
    // The guest shows its own mount's device, and the host's is not its business.
    let ino = fs.guest_ino(dev, seen.ino);
    let (uid, gid) = fs.shown_ids(seen.uid, seen.gid);
    Ok(abi::Statx { ino, uid, gid, dev_major: 0, dev_minor: 0, ..seen })
}

/// The crate opens neither links nor special files: found by the name where it was seen last, if
/// that still leads to it. Only in a directory that is there: a shard runs this, and to take one in
/// may take a search of the disk.
fn statx_named(fs: &Fs, node: &Node, basic: &Stat, ask: &abi::StatxIn) -> Option<abi::Statx> {
    let place = node.place();
    let parent = fs.nodes.find_resident(place.parent)?.inode().ok()?;
    let directory = fs.backend.path_fd(parent).ok()?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(&directory, &*place.name, flags, Mode::empty()).ok()?;
    let seen = Stat::of(&fd).ok()?;
    let same =
        (seen.dev, seen.ino) == (basic.dev, basic.ino) && seen.mode & libc::S_IFMT == node.kind();
    if same { statx_fd(fs, fd.as_fd(), ask).ok() } else { None }
}

fn statx_basic(fs: &Fs, stat: &Stat) -> abi::Statx {
    let time = |(tv_sec, tv_nsec)| abi::SxTime { tv_sec, tv_nsec, reserved: 0 };
    let (uid, gid) = fs.shown_ids(stat.uid, stat.gid);
    abi::Statx {
        mask: STATX_BASIC,
        blksize: u32::try_from(stat.blksize).unwrap_or(4096),
        nlink: u32::try_from(stat.nlink).unwrap_or(u32::MAX),
        uid,
        gid,
        mode: stat.mode as u16,
        ino: fs.guest_ino(stat.dev, stat.ino),
        size: stat.size,
        blocks: stat.blocks,
        atime: time(stat.atime),
        ctime: time(stat.ctime),
        mtime: time(stat.mtime),
        rdev_major: rustix::fs::major(stat.rdev),
        rdev_minor: rustix::fs::minor(stat.rdev),
        ..abi::Statx::default()
    }
}

/// ACCESS; the guest mounts with `default_permissions` and so hardly ever asks.
pub fn access(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let access: abi::AccessIn = request.head()?;
    let node = fs.nodes.find(request.nodeid)?;
    if fs.options.read_only && access.mask & libc::W_OK as u32 != 0 {
        return Err(Errno::ROFS);
    }
    let Ids { users, groups } = &*fs.options.ids;
    let caller = Caller { uid: users.to_host(request.uid)?, gid: groups.to_host(request.gid)? };
    match node.backing()? {
        Backing::Crate(inode) => fs.backend.access(caller, inode, access.mask)?,
        // Whoever reaches an unnamed file has made it.
        Backing::Fd(_) => {}
    }
    Ok(0)
}

/// STATFS: the figures of the host's file system.
pub fn statfs(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    // Two types with the same fields.
    macro_rules! reply {
        ($seen:expr) => {
            abi::StatfsOut {
                blocks: $seen.f_blocks,
                bfree: $seen.f_bfree,
                bavail: $seen.f_bavail,
                files: $seen.f_files,
                ffree: $seen.f_ffree,
                bsize: $seen.f_bsize as u32,
                namelen: $seen.f_namemax as u32,
                frsize: $seen.f_frsize as u32,
                ..abi::StatfsOut::default()
            }
        };
    }
    let node = fs.nodes.find(request.nodeid)?;
    let reply = match node.backing()? {
        Backing::Crate(inode) => {
            let seen = fs.backend.statfs(inode)?;
            reply!(seen)
        }
        Backing::Fd(fd) => {
            let seen = rustix::fs::fstatvfs(fd)?;
            reply!(seen)
        }
    };
    put(out, &reply)
}
