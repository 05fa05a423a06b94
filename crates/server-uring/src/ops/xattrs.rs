//! Extended attributes: at most 64 KiB of value or list, names up to 255 bytes.
//!
//! A share may give them other names on the host (xattrmap.rs).
//!
//! POSIX ACLs are refused unless share and mount have agreed on them (FUSE_POSIX_ACL): with an ACL
//! on the host the mode's group bits are its mask, which a guest that knows nothing of it would
//! grant as rights. No map renames them, and the ids in them are translated like any others.

use std::borrow::Cow;
use std::ffi::{CStr, CString};

use ringfs_wire::abi;
use rustix::io::Errno;

use crate::dispatch::{Request, XATTR_BYTES_MAX, text_first};
use crate::fdops;
use crate::fs::Fs;
use crate::idmap::Ids;
use crate::nodes::Backing;
use crate::ops::no_fsetid;
use crate::passthrough::Xattr;
use crate::reply::{put, put_bytes};

/// File capabilities: rights of whoever runs the file.
const CAPABILITY: &CStr = c"security.capability";

const ACL_NAMES: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// SETXATTR: header, name, value.
pub fn setxattr(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    check_served(fs)?;
    let (set, rest): (abi::SetxattrIn, _) = request.head_rest()?;
    let (name, value) = host_name(fs, rest)?;
    if set.flags & !(libc::XATTR_CREATE | libc::XATTR_REPLACE) as u32 != 0 {
        return Err(Errno::INVAL);
    }
    let size = set.size as usize;
    if size > XATTR_BYTES_MAX {
        return Err(Errno::TOOBIG);
    }
    if size != value.len() {
        return Err(Errno::INVAL);
    }
    if fs.options.nosuid && *name == *CAPABILITY {
        return Err(Errno::PERM);
    }
    let value = &*host_value(fs, &name, value)?;
    let node = fs.nodes.find(request.nodeid)?;
    // An ACL takes set-group-id away where its owner is not of the group; the kernel that knows
    // does not say so (SETXATTR_EXT), so it is taken from all but root.
    let _fsetid = no_fsetid(is_acl(&name) && request.uid != 0)?;
    match node.backing()? {
        Backing::Crate(inode) => fs.backend.setxattr(inode, &name, value, set.flags)?,
        Backing::Fd(fd) => fdops::setxattr(fd, &name, value, set.flags)?,
    }
    Ok(0)
}

/// GETXATTR: the value, or with size 0 its length.
pub fn getxattr(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    check_served(fs)?;
    let (get, rest): (abi::GetxattrIn, _) = request.head_rest()?;
    let (name, rest) = host_name(fs, rest)?;
    if !rest.is_empty() {
        return Err(Errno::INVAL);
    }
    let size = get.size.min(XATTR_BYTES_MAX as u32);
    let node = fs.nodes.find(request.nodeid)?;
    let mut answer = match node.backing()? {
        Backing::Crate(inode) => fs.backend.getxattr(inode, &name, size)?,
        Backing::Fd(fd) => {
            let mut value = vec![0; size as usize];
            let count = fdops::getxattr(fd, &name, &mut value)?;
            sized(value, count, size)
        }
    };
    if let Xattr::Bytes(value) = &mut answer
        && is_acl(&name)
        && !fs.options.ids.is_identity()
    {
        let Ids { users, groups } = &*fs.options.ids;
        Ids::in_acl(value, |id| Ok(users.to_guest(id)), |id| Ok(groups.to_guest(id)))?;
    }
    reply(&answer, out)
}

/// LISTXATTR: the names, or with size 0 their length.
pub fn listxattr(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    check_served(fs)?;
    let list: abi::GetxattrIn = request.head()?;
    let size = list.size.min(XATTR_BYTES_MAX as u32);
    let node = fs.nodes.find(request.nodeid)?;
    let answer = match node.backing()? {
        Backing::Crate(inode) => fs.backend.listxattr(inode, size)?,
        Backing::Fd(fd) => {
            let mut names = vec![0; size as usize];
            let count = fdops::listxattr(fd, &mut names)?;
            sized(names, count, size)
        }
    };
    let Xattr::Bytes(names) = answer else { return reply(&answer, out) };
    let each = names.split_inclusive(|&byte| byte == 0);
    let shown = each.filter_map(|name| {
        let name = name.strip_suffix(b"\0").unwrap_or(name);
        match &fs.options.xattr_map {
            _ if ACL_NAMES.contains(&name) => Some(name).filter(|_| has_acls(fs)),
            Some(map) => map.to_guest(name),
            None => Some(name),
        }
    });
    let shown: Vec<u8> = shown.flat_map(|name| [name, b"\0"].concat()).collect();
    reply(&Xattr::Bytes(shown), out)
}

/// REMOVEXATTR.
pub fn removexattr(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    check_served(fs)?;
    let (name, rest) = host_name(fs, request.args)?;
    if !rest.is_empty() {
        return Err(Errno::INVAL);
    }
    let node = fs.nodes.find(request.nodeid)?;
    match node.backing()? {
        Backing::Crate(inode) => fs.backend.removexattr(inode, &name)?,
        Backing::Fd(fd) => fdops::removexattr(fd, &name)?,
    }
    Ok(0)
}

/// ENOSYS sticks in the guest's kernel, which then never asks again.
fn check_served(fs: &Fs) -> Result<(), Errno> {
    if fs.options.xattr { Ok(()) } else { Err(Errno::NOSYS) }
}

/// ACLs are in force for this mount.
fn has_acls(fs: &Fs) -> bool {
    fs.negotiated() & abi::init::POSIX_ACL != 0
}

fn is_acl(name: &CStr) -> bool {
    ACL_NAMES.contains(&name.to_bytes())
}

/// A value as the host is to have it: the ids in an ACL are the host's.
pub(crate) fn host_value<'a>(
    fs: &Fs,
    name: &CStr,
    value: &'a [u8],
) -> Result<Cow<'a, [u8]>, Errno> {
    if !is_acl(name) || value.is_empty() || fs.options.ids.is_identity() {
        return Ok(Cow::Borrowed(value));
    }
    let Ids { users, groups } = &*fs.options.ids;
    let mut value = value.to_vec();
    Ids::in_acl(&mut value, |id| users.to_host(id), |id| groups.to_host(id))?;
    Ok(Cow::Owned(value))
}

/// The name that the host has for what a guest says, and what follows it.
pub(crate) fn host_name<'a>(fs: &Fs, bytes: &'a [u8]) -> Result<(Cow<'a, CStr>, &'a [u8]), Errno> {
    let (name, rest) = checked_name(bytes)?;
    if is_acl(name) {
        return if has_acls(fs) { Ok((Cow::Borrowed(name), rest)) } else { Err(Errno::OPNOTSUPP) };
    }
    let name = match &fs.options.xattr_map {
        None => Cow::Borrowed(name),
        Some(map) => {
            let name = map.to_host(name.to_bytes())?;
            // What a map makes of the guest's name may be one that it must not say itself.
            let name = CString::new(name).map_err(|_| Errno::INVAL)?;
            if is_acl(&name) {
                return Err(Errno::OPNOTSUPP);
            }
            Cow::Owned(name)
        }
    };
    Ok((name, rest))
}

fn checked_name(bytes: &[u8]) -> Result<(&CStr, &[u8]), Errno> {
    let (name, rest) = text_first(bytes)?;
    let text = name.to_bytes();
    if text.is_empty() || text.len() > 255 {
        return Err(Errno::RANGE);
    }
    Ok((name, rest))
}

fn sized(mut bytes: Vec<u8>, count: usize, size: u32) -> Xattr {
    if size == 0 {
        return Xattr::Length(count as u32);
    }
    bytes.truncate(count);
    Xattr::Bytes(bytes)
}

fn reply(answer: &Xattr, out: &mut [u8]) -> Result<usize, Errno> {
    match answer {
        Xattr::Bytes(bytes) => put_bytes(out, bytes),
        &Xattr::Length(size) => put(out, &abi::GetxattrOut { size, padding: 0 }),
    }
}
