//! The same operations on a directory of a real file system.
//!
//! Invariant: each operation is the system call that it names, made once; what it fails with is
//! given as it is. An interrupted or short transfer is no success.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, Stat, XattrFlags, chmod, fstat, fsync,
    ftruncate, getxattr, linkat, listxattr, lstat, mkdir, open, readlink, removexattr,
    renameat_with, rmdir, setxattr, symlink, unlink,
};
use rustix::io::{Errno, pread, pwrite, write};

use super::op::{Handle, Kind, Op, Outcome, Renaming, Setting, Subject, content};

/// More than any file here holds.
const FILE_BYTES_MAX: usize = 4 << 20;
/// More than any value or list of extended attributes holds.
const XATTR_BYTES_MAX: usize = 64 << 10;

/// A directory and the files open below it.
#[derive(Debug)]
pub struct Real {
    root: PathBuf,
    open: BTreeMap<Handle, OwnedFd>,
    /// In the root only names that begin so are ours.
    prefix: String,
}

impl Real {
    /// Operations below `root`; in the root itself only names that begin with `prefix` are listed.
    pub fn new(root: PathBuf, prefix: &str) -> Self {
        Self { root, open: BTreeMap::new(), prefix: prefix.into() }
    }

    /// Lets go of an open file, whatever close says.
    pub fn forget(&mut self, handle: Handle) {
        self.open.remove(&handle);
    }

    fn path(&self, path: &[String]) -> PathBuf {
        path.iter().fold(self.root.clone(), |path, name| path.join(name))
    }

    fn fd(&self, handle: Handle) -> Result<&OwnedFd, Errno> {
        self.open.get(&handle).ok_or(Errno::BADF)
    }

    fn perform(&mut self, op: &Op) -> Result<Outcome, Errno> {
        match op {
            Op::Create { path, handle } => {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
                let fd = open(self.path(path), flags | OPEN, Mode::from_raw_mode(0o600))?;
                self.open.insert(*handle, fd);
            }
            Op::Open { path, handle, append } => {
                let more = if *append { OFlags::APPEND } else { OFlags::empty() };
                let fd = open(self.path(path), OFlags::RDWR | OPEN | more, Mode::empty())?;
                self.open.insert(*handle, fd);
            }
            Op::Close { handle } => {
                // What close(2) says is not to be had without `unsafe`; fsync tells of writes.
                self.open.remove(handle).ok_or(Errno::BADF)?;
            }
            Op::Write { handle, at, tag } => {
                let (fd, bytes) = (self.fd(*handle)?, content(*tag));
                return whole(bytes.len(), |done| pwrite(fd, &bytes[done..], *at + done as u64));
            }
            Op::Read { handle } => return read_all(self.fd(*handle)?).map(Outcome::Bytes),
            Op::Resize { handle, len } => ftruncate(self.fd(*handle)?, *len)?,
            Op::StatHandle { handle } => return stat_of(&fstat(self.fd(*handle)?)?),
            Op::Fsync { handle } => fsync(self.fd(*handle)?)?,
            Op::AppendTo { path, tag } => {
                let flags = OFlags::WRONLY | OFlags::APPEND | OPEN;
                let fd = open(self.path(path), flags, Mode::empty())?;
                let bytes = content(*tag);
                return whole(bytes.len(), |done| write(&fd, &bytes[done..]));
            }
            Op::ReadAll { path } => {
                let fd = open(self.path(path), OFlags::RDONLY | OPEN, Mode::empty())?;
                return read_all(&fd).map(Outcome::Bytes);
            }
            Op::TmpLink { path, tag } => {
                let (_, parents) = path.split_last().ok_or(Errno::INVAL)?;
                let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
                let fd = open(self.path(parents), flags, Mode::from_raw_mode(0o600))?;
                let bytes = content(*tag);
                let written = whole(bytes.len(), |done| write(&fd, &bytes[done..]))?;
                if written != Outcome::Done {
                    return Ok(written);
                }
                let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
                linkat(CWD, name, CWD, self.path(path), AtFlags::SYMLINK_FOLLOW)?;
            }
            Op::Mkdir { path } => mkdir(self.path(path), Mode::from_raw_mode(0o700))?,
            Op::Rmdir { path } => rmdir(self.path(path))?,
            Op::Unlink { path } => unlink(self.path(path))?,
            Op::Symlink { path, target } => symlink(target, self.path(path))?,
            Op::Link { old, new } => {
                linkat(CWD, self.path(old), CWD, self.path(new), AtFlags::empty())?;
            }
            Op::Rename { old, new, how } => {
                let flags = match how {
                    Renaming::Plain => RenameFlags::empty(),
                    Renaming::NoReplace => RenameFlags::NOREPLACE,
                    Renaming::Exchange => RenameFlags::EXCHANGE,
                };
                renameat_with(CWD, self.path(old), CWD, self.path(new), flags)?;
            }
            Op::Chmod { path, mode } => chmod(self.path(path), Mode::from_raw_mode(*mode))?,
            Op::FsyncDir { path } => fsync(self.directory(path)?)?,
            Op::Stat { path } => return stat_of(&lstat(self.path(path))?),
            Op::Readlink { path } => {
                let target = readlink(self.path(path), Vec::new())?;
                return target.into_string().map(Outcome::Text).map_err(|_| Errno::ILSEQ);
            }
            Op::Readdir { path } => return self.list(path),
            Op::SetXattr { .. }
            | Op::Xattr { .. }
            | Op::ListXattr { .. }
            | Op::RemoveXattr { .. } => return self.xattr(op),
        }
        Ok(Outcome::Done)
    }

    fn xattr(&self, op: &Op) -> Result<Outcome, Errno> {
        let mut room = vec![0; XATTR_BYTES_MAX];
        match op {
            Op::SetXattr { path, name, tag, how } => {
                let flags = match how {
                    Setting::Any => XattrFlags::empty(),
                    Setting::Create => XattrFlags::CREATE,
                    Setting::Replace => XattrFlags::REPLACE,
                };
                setxattr(self.path(path), name, &content(*tag), flags)?;
                Ok(Outcome::Done)
            }
            Op::Xattr { path, name } => {
                let n = getxattr(self.path(path), name, &mut room[..])?;
                room.truncate(n);
                Ok(Outcome::Bytes(room))
            }
            Op::ListXattr { path } => {
                let n = listxattr(self.path(path), &mut room[..])?;
                let names = room[..n].split(|byte| *byte == 0).map(String::from_utf8_lossy);
                let ours = names.filter(|name| name.starts_with("user."));
                Ok(Outcome::Keys(ours.map(|name| name.into_owned()).collect::<BTreeSet<_>>()))
            }
            Op::RemoveXattr { path, name } => {
                removexattr(self.path(path), name)?;
                Ok(Outcome::Done)
            }
            _ => Err(Errno::NOSYS),
        }
    }

    fn directory(&self, path: &[String]) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        open(self.path(path), flags, Mode::empty())
    }

    fn list(&self, path: &[String]) -> Result<Outcome, Errno> {
        let mut names = BTreeMap::new();
        for entry in Dir::new(self.directory(path)?)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_string_lossy();
            let ours = !path.is_empty() || name.starts_with(&self.prefix);
            if name == "." || name == ".." || !ours {
                continue;
            }
            // A name that a listing gives twice must not be lost in the map.
            if names.insert(name.into_owned(), kind_of(entry.file_type())?).is_some() {
                return Err(Errno::NOTUNIQ);
            }
        }
        Ok(Outcome::Names(names))
    }
}

/// What every open has.
const OPEN: OFlags = OFlags::NOFOLLOW.union(OFlags::CLOEXEC);

impl Subject for Real {
    fn apply(&mut self, op: &Op) -> Outcome {
        self.perform(op).unwrap_or_else(Outcome::Fail)
    }
}

/// Writes with `put` from there on. The kernel makes several requests of one write(2): the error of
/// a later one comes with the next write(2). That there is none is an error itself.
fn whole(asked: usize, put: impl Fn(usize) -> Result<usize, Errno>) -> Result<Outcome, Errno> {
    let done = put(0)?;
    if done == asked {
        return Ok(Outcome::Done);
    }
    match put(done) {
        Err(errno) => Ok(Outcome::Part(done, errno)),
        Ok(_) => Err(Errno::MSGSIZE),
    }
}

fn read_all(fd: impl AsFd) -> Result<Vec<u8>, Errno> {
    let size = usize::try_from(fstat(&fd)?.st_size).map_err(|_| Errno::FBIG)?;
    // One byte more than it says, so that a longer file is seen.
    let mut bytes = vec![0; size.min(FILE_BYTES_MAX) + 1];
    let mut filled = 0;
    while filled < bytes.len() {
        match pread(&fd, &mut bytes[filled..], filled as u64)? {
            0 => break,
            n => filled += n,
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

fn kind_of(file_type: FileType) -> Result<Kind, Errno> {
    match file_type {
        FileType::RegularFile => Ok(Kind::File),
        FileType::Directory => Ok(Kind::Dir),
        FileType::Symlink => Ok(Kind::Link),
        _ => Err(Errno::PROTOTYPE),
    }
}

fn stat_of(stat: &Stat) -> Result<Outcome, Errno> {
    let kind = kind_of(FileType::from_raw_mode(stat.st_mode))?;
    let size = if kind == Kind::Dir { 0 } else { stat.st_size as u64 };
    Ok(Outcome::Stat { kind, size, nlink: stat.st_nlink, mode: stat.st_mode & 0o7777 })
}
