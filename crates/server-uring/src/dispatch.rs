//! From an opcode to what happens: ONE exhaustive match, [`rule`], and the only place of it.
//!
//! A rule says where a request runs, whether it changes the share, how long its reply can be and
//! which handler serves it. [`Fs::route`] decides without touching a disk; [`Fs::execute`] runs
//! any request synchronously on any thread. Whatever the bytes: an errno, never a panic.

use std::ffi::CStr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use ringfs_wire::abi::{self, Opcode};
use rustix::io::Errno;
use zerocopy::{FromBytes, KnownLayout};

use crate::fdops;
use crate::fs::Fs;
use crate::handles::{OpenFile, Waits};
use crate::long_calls::LongCall;
use crate::notes::Notes;
use crate::ops::{attrs, dirs, init, io, names, xattrs};
use crate::passthrough::Caller;

/// The longest READ, WRITE and READDIR.
pub const IO_BYTES_MAX: usize = 1 << 20;
/// The longest READDIRPLUS: its counts must be replayable.
pub const READDIRPLUS_BYTES_MAX: usize = 64 << 10;
/// The longest value or list of extended attributes (the kernel's XATTR_SIZE_MAX).
pub const XATTR_BYTES_MAX: usize = fdops::XATTR_VALUE_BYTES_MAX;
/// The last 24 bytes of `fuse_in_header`.
pub const REQUEST_HEAD_BYTES: usize = 24;

/// A request as it comes out of a record: nodeid u64, uid u32, gid u32, pid u32, total_extlen u16,
/// padding u16, then the opcode's arguments, then extensions.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The number, which need not be one that we know.
    pub opcode: u32,
    /// The node it is about.
    pub nodeid: u64,
    /// The caller's user.
    pub uid: u32,
    /// The caller's group.
    pub gid: u32,
    /// The caller's process, as the guest counts.
    pub pid: u32,
    /// The opcode's arguments.
    pub args: &'a [u8],
    /// Extensions behind the arguments.
    pub ext: &'a [u8],
    /// Where nodes that are new to the guest are noted.
    pub notes: Option<&'a Notes>,
}

impl<'a> Request<'a> {
    /// `None` where the body is too short for what its header claims.
    pub fn parse(opcode: u32, body: &'a [u8]) -> Option<Request<'a>> {
        let (head, rest) = body.split_first_chunk::<REQUEST_HEAD_BYTES>()?;
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        // The kernel counts extensions in units of 8 bytes.
        let ext_bytes = usize::from(u16::from_le_bytes([head[20], head[21]])) * 8;
        let (args, ext) = rest.split_at(rest.len().checked_sub(ext_bytes)?);
        let nodeid = u64::from(word(0)) | u64::from(word(4)) << 32;
        let (uid, gid, pid) = (word(8), word(12), word(16));
        Some(Request { opcode, nodeid, uid, gid, pid, args, ext, notes: None })
    }

    /// The same, for a guest that wants recipes: see notes.rs.
    pub const fn noting(self, notes: &'a Notes) -> Request<'a> {
        Request { notes: Some(notes), ..self }
    }

    /// The arguments' leading structure.
    pub(crate) fn head<T: FromBytes + KnownLayout>(&self) -> Result<T, Errno> {
        self.head_rest().map(|(head, _)| head)
    }

    /// The arguments' leading structure, and what follows it.
    pub(crate) fn head_rest<T: FromBytes + KnownLayout>(&self) -> Result<(T, &'a [u8]), Errno> {
        T::read_from_prefix(self.args).map_err(|_| Errno::INVAL)
    }

    pub(crate) fn caller(&self, fs: &Fs) -> Result<Caller, Errno> {
        fs.caller(self.uid, self.gid)
    }
}

/// Where a request runs.
pub enum Route {
    /// `execute` on the shard's own thread; does not block for long.
    Inline,
    /// `execute` on a thread of the pool.
    Pool,
    /// A read of the file at an offset; the reply's body is what was read.
    Read {
        /// Open for reading.
        file: Arc<OpenFile>,
        /// Where in the file.
        offset: u64,
        /// At most [`IO_BYTES_MAX`].
        len: u32,
    },
    /// A write; the reply's body is `WriteOut { size }`.
    Write {
        /// Open for writing.
        file: Arc<OpenFile>,
        /// Where in the file (no meaning where the file appends).
        offset: u64,
        /// The bytes, within `Request::args`.
        payload: Range<usize>,
        /// Pages written back: all of them are stored, or the answer is an error.
        pages: bool,
    },
    /// fsync or fdatasync; the reply's body is empty.
    Fsync {
        /// Which file.
        file: Arc<OpenFile>,
        /// fdatasync.
        data_only: bool,
    },
    /// A handle is given back: the shard takes it out, and sees to it that no shard closes what
    /// takes long.
    Release {
        /// The handle.
        fh: u64,
        /// Of a directory.
        directory: bool,
    },
    /// An error is the whole answer.
    Refuse(Errno),
    /// Nothing is answered at all.
    NoReply,
}

/// Where a rule's requests run.
enum Place {
    /// On the shard where the backing file system is local, else in the pool; what changes it only
    /// on the shard where there is no disk behind.
    Metadata,
    /// As `Metadata`, and wants no lock that a long call may have.
    Looks,
    /// As `Metadata`, and in the pool where such calls have taken long: they may free many blocks.
    Frees,
    /// On the shard: it touches no file.
    Shard,
    /// In the pool.
    Pool,
    /// In the pool where the function says so, else as `Metadata`.
    PoolIf(fn(&Fs, &Request<'_>) -> bool),
    /// To the ring.
    Read,
    /// To the ring, but for writes that must clear suid and sgid.
    Write,
    /// To the ring.
    Fsync,
    /// Handed back where the backing file system is local, else in the pool: a close may wait.
    Release,
    /// Not answered.
    NoReply,
    /// Not served.
    Refuse(Errno),
}

/// How long a reply can be.
enum Bound {
    /// At most so many bytes.
    Fixed(usize),
    /// The u32 of the arguments at this offset, but no more than `most`; 0 asks for a length.
    Asked { at: usize, most: usize },
}

type Handler = fn(&Fs, &Request<'_>, &mut [u8]) -> Result<usize, Errno>;

struct Rule {
    place: Place,
    /// It would change the share: EROFS on a read-only one. (OPEN decides by its flags.)
    changes: bool,
    bound: Bound,
    run: Handler,
}

const ENTRY: usize = size_of::<abi::EntryOut>();
const OPENED: usize = size_of::<abi::OpenOut>();
const ATTR: usize = size_of::<abi::AttrOut>();

/// The table: every opcode that a kernel of today may send.
#[rustfmt::skip]
fn rule(opcode: Opcode) -> Rule {
    use Opcode as Op;
    use Place::{Frees, Fsync, Looks, Metadata, NoReply, Pool, PoolIf, Read};
    use Place::{Refuse, Release, Shard, Write};
    let rule = |place, changes, bytes, run| {
        Rule { place, changes, bound: Bound::Fixed(bytes), run }
    };
    let asked = |place, at, most, run| {
        Rule { place, changes: false, bound: Bound::Asked { at, most }, run }
    };
    match opcode {
        Op::Lookup => rule(Metadata, false, ENTRY, names::lookup),
        Op::Forget => rule(NoReply, false, 0, names::forget),
        Op::BatchForget => rule(NoReply, false, 0, names::batch_forget),
        Op::Getattr => rule(Looks, false, ATTR, attrs::getattr),
        Op::Setattr => rule(PoolIf(attrs::may_truncate), true, ATTR, attrs::setattr),
        Op::Statx => rule(Looks, false, size_of::<abi::StatxOut>(), attrs::statx),
        Op::Access => rule(Looks, false, 0, attrs::access),
        Op::Statfs => rule(Looks, false, size_of::<abi::StatfsOut>(), attrs::statfs),
        Op::Readlink => rule(Looks, false, libc::PATH_MAX as usize, names::readlink),
        Op::Symlink => rule(Metadata, true, ENTRY, names::symlink),
        Op::Mknod => rule(Metadata, true, ENTRY, names::mknod),
        Op::Mkdir => rule(Metadata, true, ENTRY, names::mkdir),
        // Mostly short: the blocks of a file that the guest knows are freed with its last fd, in
        // FORGET or RELEASE, which look.
        Op::Unlink => rule(Frees, true, 0, names::unlink),
        Op::Rmdir => rule(Metadata, true, 0, names::rmdir),
        Op::Rename => rule(Frees, true, 0, names::rename),
        Op::Rename2 => rule(Frees, true, 0, names::rename2),
        Op::Link => rule(Metadata, true, ENTRY, names::link),
        Op::Open => rule(PoolIf(io::truncates), false, OPENED, io::open),
        Op::Create => rule(Metadata, true, ENTRY + OPENED, io::create),
        Op::Tmpfile => rule(Metadata, true, ENTRY + OPENED, io::tmpfile),
        Op::Read => asked(Read, 16, IO_BYTES_MAX, io::read),
        Op::Write => rule(Write, true, size_of::<abi::WriteOut>(), io::write),
        Op::Fsync => rule(Fsync, false, 0, io::fsync),
        Op::Flush => rule(Looks, false, 0, io::flush),
        Op::Release => rule(Release, false, 0, io::release),
        Op::Fallocate => rule(Pool, true, 0, io::fallocate),
        Op::Lseek => rule(Pool, false, size_of::<abi::LseekOut>(), io::lseek),
        Op::CopyFileRange =>
            rule(Pool, true, size_of::<abi::WriteOut>(), io::copy_file_range),
        Op::CopyFileRange64 =>
            rule(Pool, true, size_of::<abi::CopyFileRangeOut>(), io::copy_file_range_64),
        Op::Syncfs => rule(Pool, false, 0, io::syncfs),
        Op::Opendir => rule(Looks, false, OPENED, dirs::opendir),
        Op::Readdir => asked(PoolIf(dirs::is_long), 16, IO_BYTES_MAX, dirs::readdir),
        Op::Readdirplus =>
            asked(PoolIf(dirs::is_long_plus), 16, READDIRPLUS_BYTES_MAX, dirs::readdirplus),
        Op::Releasedir => rule(Release, false, 0, dirs::releasedir),
        Op::Fsyncdir => rule(Pool, false, 0, dirs::fsyncdir),
        Op::Setxattr => rule(Metadata, true, 0, xattrs::setxattr),
        Op::Getxattr => asked(Metadata, 0, XATTR_BYTES_MAX, xattrs::getxattr),
        Op::Listxattr => asked(Metadata, 0, XATTR_BYTES_MAX, xattrs::listxattr),
        Op::Removexattr => rule(Metadata, true, 0, xattrs::removexattr),
        Op::Init => rule(Shard, false, size_of::<abi::InitOut>(), init::init),
        Op::Destroy => rule(Shard, false, 0, init::destroy),
        // Cancelling is the session's business (CANCEL), and answers to notifications are ours to
        // ask for: nothing here.
        Op::Interrupt | Op::NotifyReply => rule(NoReply, false, 0, init::nothing),
        // Never offered in INIT: locks stay local to each guest's kernel.
        Op::Getlk | Op::Setlk | Op::Setlkw => rule(Refuse(Errno::NOSYS), false, 0, init::nosys),
        Op::Bmap | Op::Poll | Op::Setupmapping | Op::Removemapping =>
            rule(Refuse(Errno::NOSYS), false, 0, init::nosys),
        Op::Ioctl => rule(Refuse(Errno::NOTTY), false, 0, init::notty),
    }
}

impl Fs {
    /// Decides where a request runs, without touching the disk.
    pub fn route(&self, request: &Request<'_>) -> Route {
        let Some(opcode) = Opcode::from_u32(request.opcode) else {
            return Route::Refuse(Errno::NOSYS);
        };
        let rule = rule(opcode);
        if rule.changes && self.options.read_only {
            return Route::Refuse(Errno::ROFS);
        }
        if self.names_unopened(opcode, request) {
            return Route::Pool;
        }
        // To take a node in may need a search of the disk. What changes a file system waits for its
        // journal at times, and as long as somebody has it frozen.
        let second = second_node(opcode, request);
        let cold = [Some(request.nodeid), second].into_iter().flatten();
        let cold = { cold }.any(|id| self.nodes.is_cold(id));
        let quick = self.local && !cold && !(rule.changes && self.waits != Waits::Never);
        let held = self.waits == Waits::Never && self.options.long_calls.any();
        let metadata = if quick && !held { Route::Inline } else { Route::Pool };
        let route = match rule.place {
            Place::Metadata => Ok(metadata),
            Place::Looks if quick => Ok(Route::Inline),
            Place::Looks => Ok(Route::Pool),
            Place::Frees if self.history.is_slow(Instant::now()) => Ok(Route::Pool),
            Place::Frees => Ok(metadata),
            Place::Shard => Ok(Route::Inline),
            Place::Pool => Ok(Route::Pool),
            Place::PoolIf(pool) if pool(self, request) => Ok(Route::Pool),
            Place::PoolIf(_) => Ok(metadata),
            Place::Read => io::route_read(self, request),
            Place::Write if held => Ok(Route::Pool),
            Place::Write => io::route_write(self, request),
            Place::Fsync => io::route_fsync(self, request),
            Place::Release if !self.local => Ok(Route::Pool),
            Place::Release => request.head().map(|release: abi::ReleaseIn| Route::Release {
                fh: release.fh,
                directory: opcode == Opcode::Releasedir,
            }),
            Place::NoReply => Ok(Route::NoReply),
            Place::Refuse(errno) => Err(errno),
        };
        route.unwrap_or_else(Route::Refuse)
    }

    /// For a request that the pool gets: counts it, if it may keep a lock for long, until what is
    /// given is dropped.
    pub fn long_call(&self, request: &Request<'_>) -> Option<LongCall> {
        let is_long = self.waits == Waits::Never
            && match Opcode::from_u32(request.opcode)? {
                Opcode::Fallocate => true,
                Opcode::Setattr => attrs::may_truncate(self, request),
                Opcode::Open => io::truncates(self, request),
                _ => false,
            };
        is_long.then(|| self.options.long_calls.begin())
    }

    /// The longest body that `execute` may write for this request: lend at least as much.
    pub fn reply_bytes_max(&self, request: &Request<'_>) -> usize {
        let Some(opcode) = Opcode::from_u32(request.opcode) else { return 0 };
        match rule(opcode).bound {
            Bound::Fixed(bytes) => bytes,
            Bound::Asked { at, most } => match request.args.get(at..at + 4) {
                // A length takes 8 bytes (GETXATTR, LISTXATTR with size 0).
                Some(&[a, b, c, d]) => (u32::from_le_bytes([a, b, c, d]) as usize).clamp(8, most),
                _ => 0,
            },
        }
    }

    /// Runs a request to its end on this thread: READ, WRITE and FSYNC too. `Ok` holds the length
    /// of the reply's body in `out`.
    ///
    /// # Errors
    /// The errno for the guest; `EOVERFLOW` (our bug) where `out` is shorter than
    /// [`Fs::reply_bytes_max`], and then nothing has happened.
    pub fn execute(&self, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
        let opcode = Opcode::from_u32(request.opcode).ok_or(Errno::NOSYS)?;
        let rule = rule(opcode);
        if rule.changes && self.options.read_only {
            return Err(Errno::ROFS);
        }
        let bytes_max = self.reply_bytes_max(request);
        let out = out.get_mut(..bytes_max).ok_or(Errno::OVERFLOW)?;
        self.open_named(opcode, request)?;
        let noted = request.notes.map_or(0, Notes::len);
        let begun = matches!(rule.place, Place::Frees).then(Instant::now);
        let result = (rule.run)(self, request, out);
        if let Some(begun) = begun {
            self.history.done(begun, Instant::now());
        }
        if let (Err(_), Some(notes)) = (&result, request.notes) {
            // What it would have given was taken back.
            notes.truncate(noted);
        }
        result
    }
}

/// The other node of a request that names two.
fn second_node(opcode: Opcode, request: &Request<'_>) -> Option<u64> {
    use Opcode as Op;
    let names_two = matches!(opcode, Op::Rename | Op::Rename2 | Op::Link);
    let first = names_two.then(|| request.args.first_chunk()).flatten()?;
    Some(u64::from_le_bytes(*first))
}

/// One name that fills `bytes` up to its NUL at the end.
pub(crate) fn name_alone(bytes: &[u8]) -> Result<&CStr, Errno> {
    let (name, rest) = name_first(bytes)?;
    if rest.is_empty() { Ok(name) } else { Err(Errno::INVAL) }
}

/// Two names, one after the other.
pub(crate) fn name_pair(bytes: &[u8]) -> Result<(&CStr, &CStr), Errno> {
    let (first, rest) = name_first(bytes)?;
    Ok((first, name_alone(rest)?))
}

/// A name, and what follows its NUL. A name never leads anywhere but into its own directory.
pub(crate) fn name_first(bytes: &[u8]) -> Result<(&CStr, &[u8]), Errno> {
    let (name, rest) = text_first(bytes)?;
    fdops::check_name(name)?;
    Ok((name, rest))
}

/// Bytes up to a NUL, which must be there.
pub(crate) fn text_first(bytes: &[u8]) -> Result<(&CStr, &[u8]), Errno> {
    let text = CStr::from_bytes_until_nul(bytes).map_err(|_| Errno::INVAL)?;
    Ok((text, &bytes[text.count_bytes() + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfs_wire::table::REPLY_KEPT_BYTES_MAX;

    #[test]
    fn a_reply_that_must_be_kept_fits_its_cell() {
        for &opcode in Opcode::ALL.iter().filter(|opcode| !opcode.may_rerun()) {
            match rule(opcode).bound {
                Bound::Fixed(bytes) => assert!(bytes <= REPLY_KEPT_BYTES_MAX, "{opcode:?}"),
                Bound::Asked { .. } => panic!("{opcode:?} has no bound that is small"),
            }
        }
    }
}
