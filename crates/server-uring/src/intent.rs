//! What must be known of the host's files before a call, to find out afterwards whether it was
//! made: for the daemon that comes after one that was killed. decide.rs reads it.
//!
//! Written before the call, by the thread that makes it. Invariants: a call that has an intent is
//! made only when that is whole, so where there is none the call was not made; what cannot be
//! looked up is noted as unknown, never left out. Cost: none for what may run again (READ, GETATTR,
//! LOOKUP, a WRITE at an offset, ...); the clock, which is no system call, for what makes a name;
//! one statx for each name that is taken away or moved, one fstat for an append, one getxattr for
//! SETXATTR with XATTR_CREATE and for REMOVEXATTR.

use std::ffi::CStr;
use std::sync::atomic::{AtomicU64, Ordering};

use ringfs_wire::abi::{self, Opcode};
use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

use crate::dispatch::{Request, name_alone, name_first, name_pair};
use crate::fdops;
use crate::fs::Fs;
use crate::handles::OpenFile;
use crate::nodes::Backing;
use crate::ops::{io, xattrs};
use crate::passthrough::{Stat, Xattr};

/// Nanoseconds of the wall clock.
pub(crate) type Nanos = u64;

/// A file that a name led to; number 0: there was none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// Its inode number.
    pub ino: u64,
    /// When it was born; 0 where the file system does not say.
    pub born: Nanos,
}

/// What was so before a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Intent {
    /// Of the request.
    pub opcode: u32,
    /// The rest could be found out.
    pub known: bool,
    /// The clock that the host's file system stamps births with, before.
    pub when: Nanos,
    /// What the name led to (RENAME: the old name), where that was asked for.
    pub target: Option<Named>,
    /// RENAME: what the new name led to. LINK: the file.
    pub other: Named,
    /// Append: the length of the file. Extended attributes: 1 where there was one.
    pub size: u64,
}

/// An intent in the state directory.
///
/// ```text
///  0       8      16           24        32          40        48     56      64
///  | stamp | when | target ino | its birth | other ino | its birth | size | spare |
/// ```
///
/// The stamp, from the lowest bit: seq 32, opcode 8, known 1, target asked for 1, written 1. It is
/// 0 while the rest is written.
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout)]
pub struct IntentCell {
    stamp: AtomicU64,
    words: [AtomicU64; 7],
}

const _: () = assert!(size_of::<IntentCell>() == 64);

const KNOWN: u64 = 1 << 40;
const ASKED: u64 = 1 << 41;
const WRITTEN: u64 = 1 << 42;

impl IntentCell {
    /// Of use `seq` of the slot.
    pub fn write(&self, seq: u32, intent: &Intent) {
        self.stamp.store(0, Ordering::Relaxed);
        let target = intent.target.unwrap_or_default();
        let (other, size) = (intent.other, intent.size);
        let words = [intent.when, target.ino, target.born, other.ino, other.born, size];
        for (to, word) in self.words.iter().zip(words) {
            // Behind the stamp's 0, in the order of instructions.
            to.store(word, Ordering::Release);
        }
        let bit = |bit, set| if set { bit } else { 0 };
        let stamp = u64::from(seq)
            | u64::from(intent.opcode & 0xff) << 32
            | bit(KNOWN, intent.known)
            | bit(ASKED, intent.target.is_some())
            | WRITTEN;
        self.stamp.store(stamp, Ordering::Release);
    }

    /// `None` where that of use `seq` is not there, or not whole.
    pub fn read(&self, seq: u32) -> Option<Intent> {
        let stamp = self.stamp.load(Ordering::Acquire);
        if stamp & WRITTEN == 0 || stamp as u32 != seq {
            return None;
        }
        let [when, ino, born, other, other_born, size, _] =
            self.words.each_ref().map(|word| word.load(Ordering::Relaxed));
        Some(Intent {
            opcode: (stamp >> 32) as u32 & 0xff,
            known: stamp & KNOWN != 0,
            when,
            target: (stamp & ASKED != 0).then_some(Named { ino, born }),
            other: Named { ino: other, born: other_born },
            size,
        })
    }
}

/// Whether requests of this kind have an intent. WRITE has where its file appends: a shard that has
/// the file in hand asks that.
pub fn is_needed(opcode: u32) -> bool {
    use Opcode::*;
    matches!(
        Opcode::from_u32(opcode),
        Some(Mkdir | Mknod | Symlink | Create | Link | Unlink | Rmdir | Rename | Rename2)
            | Some(Setxattr | Removexattr | Write)
    )
}

/// Of a write that appends.
pub fn of_append(file: &OpenFile) -> Intent {
    let unknown = Intent { opcode: Opcode::Write as u32, when: now(), ..Intent::default() };
    match Stat::of(file) {
        Ok(stat) => Intent { known: true, size: stat.size, ..unknown },
        Err(_) => unknown,
    }
}

/// The clock of inode times: read without a system call.
pub(crate) fn now() -> Nanos {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    nanos(now.tv_sec, now.tv_nsec as u32)
}

pub(crate) fn nanos(sec: i64, nsec: u32) -> Nanos {
    // Until the year 2554; nothing is born before 1970.
    u64::try_from(sec).unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(nsec.into())
}

impl Fs {
    /// What is to be known before this request runs. `None`: nothing, since it may run again.
    pub fn intent(&self, request: &Request<'_>) -> Option<Intent> {
        if !is_needed(request.opcode) {
            return None;
        }
        let opcode = Opcode::from_u32(request.opcode)?;
        let unknown = Intent { opcode: request.opcode, when: now(), ..Intent::default() };
        // Whatever is wrong with a request is found when it runs.
        match self.look_before(opcode, request, unknown) {
            Ok(intent) => intent,
            Err(_) => Some(unknown),
        }
    }

    fn look_before(
        &self,
        opcode: Opcode,
        request: &Request<'_>,
        unknown: Intent,
    ) -> Result<Option<Intent>, Errno> {
        let known = Intent { known: true, ..unknown };
        let intent = match opcode {
            // A birth since then tells who made it. Where there are none, whether it was there.
            Opcode::Mkdir | Opcode::Mknod | Opcode::Symlink | Opcode::Create => {
                let name = made_name(opcode, request)?;
                let target = match self.tells_births() {
                    true => None,
                    false => Some(self.named(request.nodeid, name)?),
                };
                Intent { target, ..known }
            }
            Opcode::Link => {
                let (link, rest): (abi::LinkIn, _) = request.head_rest()?;
                let target = Some(self.named(request.nodeid, name_alone(rest)?)?);
                let node = self.nodes.find(link.oldnodeid)?;
                let stat = match node.backing()? {
                    Backing::Crate(inode) => self.backend.getattr(inode)?,
                    Backing::Fd(fd) => Stat::of(fd)?,
                };
                Intent { target, other: Named { ino: stat.ino, born: 0 }, ..known }
            }
            Opcode::Unlink | Opcode::Rmdir => {
                let target = Some(self.named(request.nodeid, name_alone(request.args)?)?);
                Intent { target, ..known }
            }
            Opcode::Rename | Opcode::Rename2 => {
                let Moved { newdir, old, new, .. } = Moved::of(opcode, request)?;
                let target = Some(self.named(request.nodeid, old)?);
                Intent { target, other: self.named(newdir, new)?, ..known }
            }
            Opcode::Setxattr => {
                let (set, rest): (abi::SetxattrIn, _) = request.head_rest()?;
                if set.flags & libc::XATTR_CREATE as u32 == 0 {
                    return Ok(None);
                }
                let (name, _) = xattrs::checked_name(rest)?;
                Intent { size: self.has_xattr(request.nodeid, name)?.into(), ..known }
            }
            Opcode::Removexattr => {
                let (name, _) = xattrs::checked_name(request.args)?;
                Intent { size: self.has_xattr(request.nodeid, name)?.into(), ..known }
            }
            Opcode::Write => {
                let file = io::written(self, request)?;
                return Ok(file.append.then(|| of_append(&file)));
            }
            _ => return Ok(None),
        };
        Ok(Some(intent))
    }

    /// Births are told, and by the clock of this host.
    pub(crate) fn tells_births(&self) -> bool {
        self.local && self.has_births
    }

    /// What a name leads to now.
    pub(crate) fn named(&self, dir: u64, name: &CStr) -> Result<Named, Errno> {
        let dir = self.nodes.find(dir)?;
        let ask = StatxFlags::INO | StatxFlags::BTIME;
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let seen = self.nodes.with_dir(&dir, |fd| rustix::fs::statx(fd, name, flags, ask))?;
        match seen {
            Ok(seen) => {
                let tells = seen.stx_mask & StatxFlags::BTIME.bits() != 0;
                let born = nanos(seen.stx_btime.tv_sec, seen.stx_btime.tv_nsec);
                Ok(Named { ino: seen.stx_ino, born: if tells { born } else { 0 } })
            }
            Err(Errno::NOENT) => Ok(Named::default()),
            Err(errno) => Err(errno),
        }
    }

    pub(crate) fn has_xattr(&self, node: u64, name: &CStr) -> Result<bool, Errno> {
        match self.xattr(node, name, 0) {
            Ok(_) => Ok(true),
            Err(Errno::NODATA) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    pub(crate) fn xattr(&self, node: u64, name: &CStr, size: u32) -> Result<Vec<u8>, Errno> {
        let node = self.nodes.find(node)?;
        match node.backing()? {
            Backing::Crate(inode) => match self.backend.getxattr(inode, name, size)? {
                Xattr::Bytes(value) => Ok(value),
                Xattr::Length(_) => Ok(Vec::new()),
            },
            Backing::Fd(fd) => {
                let mut value = vec![0; size as usize];
                let count = fdops::getxattr(fd, name, &mut value)?;
                value.truncate(count);
                Ok(value)
            }
        }
    }
}

/// The name that a request makes.
pub(crate) fn made_name<'a>(opcode: Opcode, request: &Request<'a>) -> Result<&'a CStr, Errno> {
    match opcode {
        Opcode::Mkdir => name_alone(request.head_rest::<abi::MkdirIn>()?.1),
        Opcode::Mknod => name_alone(request.head_rest::<abi::MknodIn>()?.1),
        Opcode::Create => name_alone(request.head_rest::<abi::CreateIn>()?.1),
        Opcode::Link => name_alone(request.head_rest::<abi::LinkIn>()?.1),
        Opcode::Symlink => Ok(name_first(request.args)?.0),
        _ => Err(Errno::INVAL),
    }
}

/// A RENAME of either kind.
pub(crate) struct Moved<'a> {
    pub newdir: u64,
    pub flags: u32,
    pub old: &'a CStr,
    pub new: &'a CStr,
}

impl<'a> Moved<'a> {
    pub(crate) fn of(opcode: Opcode, request: &Request<'a>) -> Result<Moved<'a>, Errno> {
        let (newdir, flags, rest) = if opcode == Opcode::Rename {
            let (rename, rest): (abi::RenameIn, _) = request.head_rest()?;
            (rename.newdir, 0, rest)
        } else {
            let (rename, rest): (abi::Rename2In, _) = request.head_rest()?;
            (rename.newdir, rename.flags, rest)
        };
        let (old, new) = name_pair(rest)?;
        Ok(Moved { newdir, flags, old, new })
    }
}
