//! Attributes: GETATTR, SETATTR, STATX, ACCESS, STATFS.

use std::os::fd::BorrowedFd;

use ringfs_wire::abi::{self, fattr};
use rustix::fs::{AtFlags, StatxFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;

use crate::caller::FsetidGuard;
use crate::dispatch::Request;
use crate::fs::Fs;
use crate::nodes::{Backing, Node};
use crate::passthrough::{Changes, Stat, Time};
use crate::reply::put;

/// What STATX may ask for: the basic fields and the time of birth.
const STATX_ASKED: u32 = 0xfff;
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
pub fn may_truncate(request: &Request<'_>) -> bool {
    request.head::<abi::SetattrIn>().is_ok_and(|setattr| setattr.valid & fattr::SIZE != 0)
}

/// SETATTR; the time of change is the host's own and cannot be set.
pub fn setattr(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let setattr: abi::SetattrIn = request.head()?;
    let node = fs.nodes.find(request.nodeid)?;
    let changes = changes(&setattr)?;
    let stat = if setattr.valid & fattr::FH != 0 {
        let file = fs.handles.file(setattr.fh, request.nodeid)?;
        change_fd(std::os::fd::AsFd::as_fd(file.as_ref()), &changes)?
    } else {
        match node.backing()? {
            Backing::Crate(inode) => fs.backend.setattr(inode, &changes)?,
            Backing::Fd(fd) => change_fd(fd, &changes)?,
        }
    };
    put(out, &fs.attr_out(&stat))
}

fn changes(setattr: &abi::SetattrIn) -> Result<Changes, Errno> {
    let asked = |bit| setattr.valid & bit != 0;
    let id = |bit, id: u32| match (asked(bit), id) {
        (false, _) => Ok(None),
        // To the system call it would mean "leave it".
        (true, u32::MAX) => Err(Errno::INVAL),
        (true, id) => Ok(Some(id)),
    };
    let time = |bit, now, sec: u64, nsec: u32| match (asked(bit), asked(now)) {
        (false, _) => Ok(None),
        (true, true) => Ok(Some(Time::Now)),
        (true, false) if nsec < 1_000_000_000 => Ok(Some(Time::At(sec as i64, nsec))),
        (true, false) => Err(Errno::INVAL),
    };
    if asked(fattr::SIZE) && i64::try_from(setattr.size).is_err() {
        return Err(Errno::FBIG);
    }
    Ok(Changes {
        mode: asked(fattr::MODE).then_some(setattr.mode & 0o7777),
        uid: id(fattr::UID, setattr.uid)?,
        gid: id(fattr::GID, setattr.gid)?,
        size: asked(fattr::SIZE).then_some(setattr.size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, setattr.atime, setattr.atimensec)?,
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, setattr.mtime, setattr.mtimensec)?,
        kill_suidgid: asked(fattr::KILL_SUIDGID),
    })
}

/// In the order of the crate: mode, owner, size, times.
fn change_fd(fd: BorrowedFd<'_>, changes: &Changes) -> Result<Stat, Errno> {
    if let Some(mode) = changes.mode {
        rustix::fs::fchmod(fd, rustix::fs::Mode::from_raw_mode(mode))?;
    }
    if changes.uid.is_some() || changes.gid.is_some() {
        let user = changes.uid.map(rustix::process::Uid::from_raw);
        let group = changes.gid.map(rustix::process::Gid::from_raw);
        rustix::fs::fchown(fd, user, group)?;
    }
    if let Some(size) = changes.size {
        let _fsetid = FsetidGuard::drop_if(changes.kill_suidgid)?;
        rustix::fs::ftruncate(fd, size)?;
    }
    if changes.atime.is_some() || changes.mtime.is_some() {
        let times = Timestamps {
            last_access: timespec(changes.atime),
            last_modification: timespec(changes.mtime),
        };
        rustix::fs::futimens(fd, &times)?;
    }
    Stat::of(fd)
}

fn timespec(time: Option<Time>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(Time::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(Time::At(sec, nsec)) => Timespec { tv_sec: sec, tv_nsec: i64::from(nsec) },
    }
}

/// STATX: with the time of birth for regular files and directories, where the host knows it.
pub fn statx(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let ask: abi::StatxIn = request.head()?;
    let node = fs.nodes.find(request.nodeid)?;
    let stat = if ask.getattr_flags & abi::FUSE_GETATTR_FH != 0 {
        let file = fs.handles.file(ask.fh, request.nodeid)?;
        statx_fd(fs, std::os::fd::AsFd::as_fd(file.as_ref()), &ask)?
    } else {
        match node.backing()? {
            Backing::Crate(inode) if matches!(node.kind, libc::S_IFREG | libc::S_IFDIR) => {
                let fd = fs.backend.path_fd(inode)?;
                statx_fd(fs, std::os::fd::AsFd::as_fd(&fd), &ask)?
            }
            Backing::Crate(inode) => statx_basic(fs, &fs.backend.getattr(inode)?),
            Backing::Fd(fd) => statx_fd(fs, fd, &ask)?,
        }
    };
    let attr_valid = crate::fs::valid_secs(fs.options.cache);
    put(out, &abi::StatxOut { attr_valid, stat, ..abi::StatxOut::default() })
}

fn statx_fd(fs: &Fs, fd: BorrowedFd<'_>, ask: &abi::StatxIn) -> Result<abi::Statx, Errno> {
    let mask = StatxFlags::from_bits_retain((ask.sx_mask & STATX_ASKED) | STATX_BASIC);
    let seen = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, mask)?;
    let dev = rustix::fs::makedev(seen.stx_dev_major, seen.stx_dev_minor);
    let time = |time: rustix::fs::StatxTimestamp| abi::SxTime {
        tv_sec: time.tv_sec,
        tv_nsec: time.tv_nsec,
        reserved: 0,
    };
    Ok(abi::Statx {
        mask: seen.stx_mask & STATX_ASKED,
        blksize: seen.stx_blksize,
        attributes: seen.stx_attributes.bits(),
        nlink: seen.stx_nlink,
        uid: seen.stx_uid,
        gid: seen.stx_gid,
        mode: seen.stx_mode,
        ino: fs.guest_ino(dev, seen.stx_ino),
        size: seen.stx_size,
        blocks: seen.stx_blocks,
        attributes_mask: seen.stx_attributes_mask.bits(),
        atime: time(seen.stx_atime),
        btime: time(seen.stx_btime),
        ctime: time(seen.stx_ctime),
        mtime: time(seen.stx_mtime),
        rdev_major: seen.stx_rdev_major,
        rdev_minor: seen.stx_rdev_minor,
        ..abi::Statx::default()
    })
}

fn statx_basic(fs: &Fs, stat: &Stat) -> abi::Statx {
    let time = |(tv_sec, tv_nsec)| abi::SxTime { tv_sec, tv_nsec, reserved: 0 };
    abi::Statx {
        mask: STATX_BASIC,
        blksize: u32::try_from(stat.blksize).unwrap_or(4096),
        nlink: u32::try_from(stat.nlink).unwrap_or(u32::MAX),
        uid: stat.uid,
        gid: stat.gid,
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
    let caller = crate::passthrough::Caller { uid: request.uid, gid: request.gid };
    match node.backing()? {
        Backing::Crate(inode) => fs.backend.access(caller, inode, access.mask)?,
        // Whoever reaches an unnamed file has made it.
        Backing::Fd(_) => {}
    }
    Ok(0)
}

/// STATFS: the figures of the host's file system.
pub fn statfs(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let node = fs.nodes.find(request.nodeid)?;
    let reply = match node.backing()? {
        Backing::Crate(inode) => {
            let seen = fs.backend.statfs(inode)?;
            abi::StatfsOut {
                blocks: seen.f_blocks,
                bfree: seen.f_bfree,
                bavail: seen.f_bavail,
                files: seen.f_files,
                ffree: seen.f_ffree,
                bsize: seen.f_bsize as u32,
                namelen: seen.f_namemax as u32,
                frsize: seen.f_frsize as u32,
                ..abi::StatfsOut::default()
            }
        }
        Backing::Fd(fd) => {
            let seen = rustix::fs::fstatvfs(fd)?;
            abi::StatfsOut {
                blocks: seen.f_blocks,
                bfree: seen.f_bfree,
                bavail: seen.f_bavail,
                files: seen.f_files,
                ffree: seen.f_ffree,
                bsize: seen.f_bsize as u32,
                namelen: seen.f_namemax as u32,
                frsize: seen.f_frsize as u32,
                ..abi::StatfsOut::default()
            }
        }
    };
    put(out, &reply)
}
