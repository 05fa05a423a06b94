//! What kind of file system a file is on: which of its calls may wait for ever.
//!
//! Invariant: what is not known counts as one that waits.

use std::os::fd::BorrowedFd;

use rustix::io::Result;

/// A local file system whose calls wait for nothing but the disk and its own locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LocalFs {
    /// ext2, ext3 and ext4 have one magic.
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// F2FS.
    F2fs,
    /// tmpfs (also memfd and shmem).
    Tmpfs,
}

/// What kind of file system holds a file: may its calls be made on a shard's thread?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FsKind {
    /// Known, local.
    Local(LocalFs),
    /// Behind a network: any call may wait for ever.
    Network,
    /// Behind a user's process: any call may wait for ever.
    Fuse,
    /// Unknown (the magic number), overlay included: treat it as one that waits.
    Other(u64),
}

impl FsKind {
    /// The kind for a `f_type` of statfs(2) (linux/magic.h).
    pub const fn from_magic(magic: u64) -> FsKind {
        match magic {
            0xef53 => FsKind::Local(LocalFs::Ext4),
            0x5846_5342 => FsKind::Local(LocalFs::Xfs),
            0x9123_683e => FsKind::Local(LocalFs::Btrfs),
            0xf2f5_2010 => FsKind::Local(LocalFs::F2fs),
            0x0102_1994 => FsKind::Local(LocalFs::Tmpfs),
            0x6573_5546 => FsKind::Fuse,
            // NFS, SMB, SMB2, CIFS, 9p, Ceph, AFS (two), Coda, GFS2, OCFS2, Lustre, GPFS, vboxsf
            0x6969 | 0x517b | 0xfe53_4d42 | 0xff53_4d42 | 0x0102_1997 | 0x00c3_6400
            | 0x5346_414f | 0x6b41_4653 | 0x7375_7245 | 0x0116_1970 | 0x7461_636f | 0x0bd0_0bd0
            | 0x4750_4653 | 0x786f_4256 => FsKind::Network,
            other => FsKind::Other(other),
        }
    }

    /// May metadata calls run inline on a shard's thread?
    pub const fn is_local(self) -> bool {
        matches!(self, FsKind::Local(_))
    }

    /// Does [`try_read_nowait`](super::try_read_nowait) work there? (tmpfs never sets
    /// `FMODE_NOWAIT`.)
    pub const fn supports_nowait(self) -> bool {
        matches!(self, FsKind::Local(fs) if !matches!(fs, LocalFs::Tmpfs))
    }
}

/// The kind of file system of `fd`, which may be `O_PATH`. Itself may wait on a dead network or
/// FUSE mount: ask once a share or device, not on a shard's thread. Source: fstatfs(2).
///
/// # Errors
/// The call's errno.
pub fn fs_kind(fd: BorrowedFd<'_>) -> Result<FsKind> {
    let magic = rustix::fs::fstatfs(fd)?.f_type;
    // Magics are 32 bits; a signed word would carry 0xff534d42 as a negative number elsewhere.
    Ok(FsKind::from_magic(u64::from(magic as u32)))
}
