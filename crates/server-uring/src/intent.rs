//! What must be known of the host's files before a call, to find out afterwards whether it was
//! made: for the daemon that comes after one that was killed. decide.rs reads it.
//!
//! Written before the call, by the thread that makes it. Invariants: a call that has an intent is
//! made only when that is whole, so where there is none the call was not made; what cannot be
//! looked up is noted as unknown, never left out. Cost: none for what may run again (READ, GETATTR,
//! LOOKUP, a WRITE at an offset, ...); one statx for each name that is made, taken away or moved,
//! and for the file of a LINK; one fstat for an append; one getxattr for SETXATTR with XATTR_CREATE
//! and for REMOVEXATTR. The clock is read without a system call.

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
    /// What the name led to; RENAME: the old name.
    pub target: Named,
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
/// The stamp, from the lowest bit: seq 32, opcode 8, known 1, written 1. It is 0 while the rest is
/// written.
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout)]
pub struct IntentCell {
    stamp: AtomicU64,
    words: [AtomicU64; 7],
}

const _: () = assert!(size_of::<IntentCell>() == 64);

const KNOWN: u64 = 1 << 40;
const WRITTEN: u64 = 1 << 41;

impl IntentCell {
    /// Of use `seq` of the slot.
    pub fn write(&self, seq: u32, intent: &Intent) {
        for (n, word) in stores(seq, intent) {
            self.store(n, word);
        }
    }

    /// In the order of instructions: a Release store comes after all that were before.
    fn store(&self, n: usize, word: u64) {
        let to = if n == 0 { Some(&self.stamp) } else { self.words.get(n - 1) };
        to.into_iter().for_each(|to| to.store(word, Ordering::Release));
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
            target: Named { ino, born },
            other: Named { ino: other, born: other_born },
            size,
        })
    }
}

/// What is stored where, in 8 bytes each: at any instruction the cell is that of the use before,
/// none, or whole.
fn stores(seq: u32, intent: &Intent) -> [(usize, u64); 8] {
    let Intent { target, other, size, .. } = *intent;
    let known = if intent.known { KNOWN } else { 0 };
    let stamp = u64::from(seq) | u64::from(intent.opcode & 0xff) << 32 | known | WRITTEN;
    let [before, after] = [(0, 0), (0, stamp)];
    let files = [(2, target.ino), (3, target.born), (4, other.ino), (5, other.born)];
    let [a, b, c, d] = files;
    [before, (1, intent.when), a, b, c, d, (6, size), after]
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
    /// Whether there would be an intent of it: it must not run twice.
    pub fn runs_once(&self, request: &Request<'_>) -> bool {
        match Opcode::from_u32(request.opcode) {
            Some(Opcode::Setxattr) => {
                let set = request.head::<abi::SetxattrIn>();
                set.is_ok_and(|set| set.flags & libc::XATTR_CREATE as u32 != 0)
            }
            // Pages that are written back have their place.
            Some(Opcode::Write) => request.head::<abi::WriteIn>().is_ok_and(|write| {
                let pages = write.write_flags & abi::FUSE_WRITE_CACHE != 0;
                !pages && self.handles.appends(write.fh)
            }),
            Some(_) | None => is_needed(request.opcode),
        }
    }

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
            // A time of birth would not tell: the clock of inodes stands still for milliseconds.
            Opcode::Mkdir | Opcode::Mknod | Opcode::Symlink | Opcode::Create => {
                let target = self.named(request.nodeid, made_name(opcode, request)?)?;
                Intent { target, ..known }
            }
            Opcode::Link => {
                let (link, rest): (abi::LinkIn, _) = request.head_rest()?;
                let target = self.named(request.nodeid, name_alone(rest)?)?;
                let node = self.nodes.find(link.oldnodeid)?;
                let stat = match node.backing()? {
                    Backing::Crate(inode) => self.backend.getattr(inode)?,
                    Backing::Fd(fd) => Stat::of(fd)?,
                };
                Intent { target, other: Named { ino: stat.ino, born: 0 }, ..known }
            }
            Opcode::Unlink | Opcode::Rmdir => {
                let target = self.named(request.nodeid, name_alone(request.args)?)?;
                Intent { target, ..known }
            }
            Opcode::Rename | Opcode::Rename2 => {
                let Moved { newdir, old, new, .. } = Moved::of(opcode, request)?;
                let target = self.named(request.nodeid, old)?;
                Intent { target, other: self.named(newdir, new)?, ..known }
            }
            Opcode::Setxattr => {
                let (set, rest): (abi::SetxattrIn, _) = request.head_rest()?;
                if set.flags & libc::XATTR_CREATE as u32 == 0 {
                    return Ok(None);
                }
                let (name, _) = xattrs::host_name(self, rest)?;
                Intent { size: self.has_xattr(request.nodeid, &name)?.into(), ..known }
            }
            Opcode::Removexattr => {
                let (name, _) = xattrs::host_name(self, request.args)?;
                Intent { size: self.has_xattr(request.nodeid, &name)?.into(), ..known }
            }
            Opcode::Write => {
                self.open_named(opcode, request)?;
                let file = io::written(self, request)?;
                return Ok(file.append.then(|| of_append(&file)));
            }
            _ => return Ok(None),
        };
        Ok(Some(intent))
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

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn a_daemon_killed_at_any_store_leaves_no_half_intent() {
        let named = |ino| Named { ino, born: ino + 1 };
        let make = |n| Intent {
            opcode: Opcode::Rename2 as u32,
            known: n % 2 == 0,
            when: n,
            target: named(n + 10),
            other: named(n + 20),
            size: n + 30,
        };
        let cell = IntentCell::new_zeroed();
        assert_eq!(cell.read(0), None, "never written");
        let (old, new) = (make(100), make(201));
        cell.write(0, &old);
        assert_eq!((cell.read(0), cell.read(1)), (Some(old), None));
        // The same use again: a daemon has found that it had not run.
        for seq in [1, 0] {
            cell.write(0, &old);
            let stores = stores(seq, &new);
            for (n, &(at, word)) in stores.iter().enumerate() {
                cell.store(at, word);
                let whole = n + 1 == stores.len();
                assert_eq!(cell.read(seq), whole.then_some(new), "{seq}: store {n}");
                assert!(cell.read(1 - seq).is_none());
            }
        }
    }
}
