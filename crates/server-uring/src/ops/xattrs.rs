//! Extended attributes: at most 64 KiB of value or list, names up to 255 bytes.
//!
//! POSIX ACLs are refused: the guest's kernel was not told of them (no FUSE_POSIX_ACL), and with
//! an ACL on the host the mode's group bits are its mask, which the guest would grant as rights.

use std::ffi::CStr;

use ringfs_wire::abi;
use rustix::io::Errno;

use crate::dispatch::{Request, XATTR_BYTES_MAX, text_first};
use crate::fdops;
use crate::fs::Fs;
use crate::nodes::Backing;
use crate::passthrough::Xattr;
use crate::reply::{put, put_bytes};

const ACL_NAMES: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// SETXATTR: header, name, value.
pub fn setxattr(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    check_served(fs)?;
    let (set, rest): (abi::SetxattrIn, _) = request.head_rest()?;
    let (name, value) = checked_name(rest)?;
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
    let node = fs.nodes.find(request.nodeid)?;
    match node.backing()? {
        Backing::Crate(inode) => fs.backend.setxattr(inode, name, value, set.flags)?,
        Backing::Fd(fd) => fdops::setxattr(fd, name, value, set.flags)?,
    }
    Ok(0)
}

/// GETXATTR: the value, or with size 0 its length.
pub fn getxattr(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    check_served(fs)?;
    let (get, rest): (abi::GetxattrIn, _) = request.head_rest()?;
    let (name, rest) = checked_name(rest)?;
    if !rest.is_empty() {
        return Err(Errno::INVAL);
    }
    let size = get.size.min(XATTR_BYTES_MAX as u32);
    let node = fs.nodes.find(request.nodeid)?;
    let answer = match node.backing()? {
        Backing::Crate(inode) => fs.backend.getxattr(inode, name, size)?,
        Backing::Fd(fd) => {
            let mut value = vec![0; size as usize];
            let count = fdops::getxattr(fd, name, &mut value)?;
            sized(value, count, size)
        }
    };
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
    let shown = each.filter(|name| !ACL_NAMES.contains(&name.strip_suffix(b"\0").unwrap_or(name)));
    reply(&Xattr::Bytes(shown.flatten().copied().collect()), out)
}

/// REMOVEXATTR.
pub fn removexattr(fs: &Fs, request: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    check_served(fs)?;
    let (name, rest) = checked_name(request.args)?;
    if !rest.is_empty() {
        return Err(Errno::INVAL);
    }
    let node = fs.nodes.find(request.nodeid)?;
    match node.backing()? {
        Backing::Crate(inode) => fs.backend.removexattr(inode, name)?,
        Backing::Fd(fd) => fdops::removexattr(fd, name)?,
    }
    Ok(0)
}

/// ENOSYS sticks in the guest's kernel, which then never asks again.
fn check_served(fs: &Fs) -> Result<(), Errno> {
    if fs.options.xattr { Ok(()) } else { Err(Errno::NOSYS) }
}

pub(crate) fn checked_name(bytes: &[u8]) -> Result<(&CStr, &[u8]), Errno> {
    let (name, rest) = text_first(bytes)?;
    let text = name.to_bytes();
    if text.is_empty() || text.len() > 255 {
        return Err(Errno::RANGE);
    }
    if ACL_NAMES.contains(&text) {
        return Err(Errno::OPNOTSUPP);
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
