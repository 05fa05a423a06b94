//! Names: LOOKUP, FORGET, making, removing, renaming and linking.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::Arc;

use ringfs_wire::abi;
use rustix::io::Errno;
use zerocopy::FromBytes;

use crate::creds::{CredsError, SuppGroups};
use crate::dispatch::{Request, name_alone, name_first, name_pair, text_first};
use crate::fdops;
use crate::fs::{CacheMode, Fs};
use crate::nodes::{Backing, Node};
use crate::passthrough::{Found, Stat};
use crate::reply::{put, put_bytes};

/// Supplementary groups of one request; the kernel sends at most one.
const GROUPS_MAX: usize = 256;
const TARGET_BYTES_MAX: usize = libc::PATH_MAX as usize - 1;

/// Finds a name.
pub fn lookup(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let name = name_alone(request.args)?;
    let parent = fs.nodes.find(request.nodeid)?;
    fs.nodes.check_fds()?;
    match fs.backend.lookup(parent.inode()?, name) {
        Ok(found) => reply_entry(fs, request, &found, (&parent, name), out),
        // Node id 0: "there is no such name, and you may remember that".
        Err(Errno::NOENT) if fs.options.cache == CacheMode::Always => {
            let entry_valid = crate::fs::valid_secs(fs.options.cache);
            put(out, &abi::EntryOut { entry_valid, ..abi::EntryOut::default() })
        }
        Err(error) => Err(error),
    }
}

/// FORGET as a request; sessions pass it to [`Fs::forget`] instead.
pub fn forget(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let forget: abi::ForgetIn = request.head()?;
    fs.forget(std::iter::once((request.nodeid, forget.nlookup)));
    Ok(0)
}

/// BATCH_FORGET as a request.
pub fn batch_forget(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let (head, rest): (abi::BatchForgetIn, _) = request.head_rest()?;
    let each = rest.chunks_exact(size_of::<abi::ForgetOne>()).take(head.count as usize);
    let each = each.filter_map(|bytes| abi::ForgetOne::read_from_bytes(bytes).ok());
    fs.forget(each.map(|one| (one.nodeid, one.nlookup)));
    Ok(0)
}

/// The target of a symbolic link.
pub fn readlink(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let node = fs.nodes.find(request.nodeid)?;
    if node.kind() != libc::S_IFLNK {
        return Err(Errno::INVAL);
    }
    put_bytes(out, &fs.backend.readlink(node.inode()?)?)
}

/// Makes a symbolic link: name, then target.
pub fn symlink(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let (name, rest) = name_first(request.args)?;
    let (target, rest) = text_first(rest)?;
    if !rest.is_empty() || target.is_empty() {
        return Err(Errno::INVAL);
    }
    if target.count_bytes() > TARGET_BYTES_MAX {
        return Err(Errno::NAMETOOLONG);
    }
    let parent = parent_for_new(fs, request)?;
    let _groups = groups(fs, request)?;
    let found = fs.backend.symlink(request.caller(fs)?, target, parent.inode()?, name)?;
    reply_entry(fs, request, &found, (&parent, name), out)
}

/// Makes a node that is no directory.
pub fn mknod(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let (mknod, rest): (abi::MknodIn, _) = request.head_rest()?;
    let name = name_alone(rest)?;
    let kind = match mknod.mode & libc::S_IFMT {
        0 => libc::S_IFREG,
        kind @ (libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK) => kind,
        kind @ (libc::S_IFCHR | libc::S_IFBLK) if fs.options.device_nodes => kind,
        libc::S_IFCHR | libc::S_IFBLK | libc::S_IFDIR => return Err(Errno::PERM),
        _ => return Err(Errno::INVAL),
    };
    let parent = parent_for_new(fs, request)?;
    let bits = fs.file_bits(mknod.mode & 0o7777);
    let mode = kind | fs.masked(&parent, bits, mknod.umask)?;
    let _groups = groups(fs, request)?;
    let caller = request.caller(fs)?;
    let found = fs.backend.mknod(caller, parent.inode()?, name, mode, mknod.rdev)?;
    reply_entry(fs, request, &found, (&parent, name), out)
}

/// Makes a directory.
pub fn mkdir(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let (mkdir, rest): (abi::MkdirIn, _) = request.head_rest()?;
    let name = name_alone(rest)?;
    let parent = parent_for_new(fs, request)?;
    let mode = fs.masked(&parent, mkdir.mode & 0o7777, mkdir.umask)?;
    let _groups = groups(fs, request)?;
    let found = fs.backend.mkdir(request.caller(fs)?, parent.inode()?, name, mode)?;
    reply_entry(fs, request, &found, (&parent, name), out)
}

/// Removes a file's name.
pub fn unlink(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let name = name_alone(request.args)?;
    let parent = fs.nodes.find(request.nodeid)?;
    let _held = fs.nodes.hold(&[(&parent, name)])?;
    fs.backend.unlink(parent.inode()?, name)?;
    Ok(0)
}

/// Removes an empty directory.
pub fn rmdir(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let name = name_alone(request.args)?;
    let parent = fs.nodes.find(request.nodeid)?;
    let _held = fs.nodes.hold(&[(&parent, name)])?;
    fs.backend.rmdir(parent.inode()?, name)?;
    Ok(0)
}

/// RENAME.
pub fn rename(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let (rename, rest): (abi::RenameIn, _) = request.head_rest()?;
    rename_to(fs, request, rename.newdir, 0, name_pair(rest)?)
}

/// RENAME2: with flags.
pub fn rename2(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    let (rename, rest): (abi::Rename2In, _) = request.head_rest()?;
    // RENAME_WHITEOUT would make a device node.
    if rename.flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
        return Err(Errno::INVAL);
    }
    rename_to(fs, request, rename.newdir, rename.flags, name_pair(rest)?)
}

fn rename_to(
    fs: &Fs,
    request: &Request<'_>,
    newdir: u64,
    flags: u32,
    (old, new): (&CStr, &CStr),
) -> Result<usize, Errno> {
    let from = fs.nodes.find(request.nodeid)?;
    let to = fs.nodes.find(newdir)?;
    let _held = fs.nodes.hold(&[(&from, old), (&to, new)])?;
    fs.backend.rename((from.inode()?, old), (to.inode()?, new), flags)?;
    let notes = fs.notes_of(request);
    fs.nodes.moved(&to, new, notes);
    if flags & libc::RENAME_EXCHANGE != 0 {
        fs.nodes.moved(&from, old, notes);
    }
    Ok(0)
}

/// LINK: one more name for a node; an unnamed file gets its first.
pub fn link(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let (link, rest): (abi::LinkIn, _) = request.head_rest()?;
    let name = name_alone(rest)?;
    let node = fs.nodes.find(link.oldnodeid)?;
    let parent = fs.nodes.find(request.nodeid)?;
    let directory = parent.inode()?;
    match node.backing()? {
        Backing::Crate(inode) => {
            let found = fs.backend.link(inode, directory, name)?;
            reply_entry(fs, request, &found, (&parent, name), out)
        }
        Backing::Fd(fd) => {
            fdops::link_fd(fd, fs.backend.path_fd(directory)?.as_fd(), name)?;
            let found = fs.backend.lookup(directory, name)?;
            let ours = Stat::of(fd)?;
            if (ours.dev, ours.ino) != (found.stat.dev, found.stat.ino) {
                // Somebody replaced the name at once: it is no longer this file's.
                fs.backend.forget(found.inode, 1);
                return Err(Errno::STALE);
            }
            let given = fs.nodes.give_named(&node, &found, &parent, name)?;
            fs.note(request, &given, &found, &parent, name);
            put(out, &fs.entry(given.node.id, &found.stat))
        }
    }
}

/// The directory in which something shall appear; refuses before anything is made where the
/// session has no room for one more node.
pub(crate) fn parent_for_new(fs: &Fs, request: &Request<'_>) -> Result<Arc<Node>, Errno> {
    fs.nodes.check_room()?;
    fs.nodes.find(request.nodeid)
}

fn reply_entry(
    fs: &Fs,
    request: &Request<'_>,
    found: &Found,
    (parent, name): (&Node, &CStr),
    out: &mut [u8],
) -> Result<usize, Errno> {
    let (_, entry) = fs.give(request, found, parent, name)?;
    put(out, &entry)
}

/// Takes on the groups that the extension names, for this thread and one call: those and no
/// others, since the daemon's own would open directories to a guest's user.
pub(crate) fn groups(fs: &Fs, request: &Request<'_>) -> Result<Option<SuppGroups>, Errno> {
    let mut groups = parse_groups(request.ext)?;
    for group in &mut groups {
        *group = fs.options.ids.groups.to_host(*group)?;
    }
    // An unprivileged daemon impersonates nobody.
    if fs.backend.squashes() || groups.is_empty() && !fs.has_groups {
        return Ok(None);
    }
    SuppGroups::set(&groups).map(Some).map_err(CredsError::errno)
}

/// Extensions are a chain of headers that count themselves and their padding.
fn parse_groups(mut ext: &[u8]) -> Result<Vec<u32>, Errno> {
    let mut groups = Vec::new();
    while !ext.is_empty() {
        let (head, _) = abi::ExtHeader::read_from_prefix(ext).map_err(|_| Errno::INVAL)?;
        let size = head.size as usize;
        if size < size_of::<abi::ExtHeader>() || size > ext.len() {
            return Err(Errno::INVAL);
        }
        let (this, rest) = ext.split_at(size);
        ext = rest;
        if head.type_ != abi::FUSE_EXT_GROUPS {
            continue;
        }
        let body = &this[size_of::<abi::ExtHeader>()..];
        let (count, body) = u32::read_from_prefix(body).map_err(|_| Errno::INVAL)?;
        let count = count as usize;
        if count > GROUPS_MAX || body.len() < count * 4 {
            return Err(Errno::INVAL);
        }
        let each = body.chunks_exact(4).take(count);
        groups.extend(each.filter_map(|bytes| u32::read_from_bytes(bytes).ok()));
    }
    Ok(groups)
}
