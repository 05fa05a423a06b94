//! The worker's root: a small tmpfs with the shares, an empty /proc but for the worker's own
//! processes, and nothing else.
//!
//! ```text
//! /            tmpfs, read-only
//! /proc        of the own pid namespace, subset=pid
//! /shares/0    a share's own copy of its mount: nosuid, nodev, nosymfollow, ro where it is
//! /shares/1
//! ```
//!
//! The shares stand below one directory so that landlock's rule for it holds for those too that
//! the parent adds later ([`Inside`]).

#![allow(unsafe_code, reason = "mount_setattr, which rustix lacks; unshare")]

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Where the shares are.
pub const SHARES: &str = "/shares";

/// In the tmpfs: directories, some of them for shares to come.
const ROOT_INODES: &str = "4096";

fn share_path(index: usize) -> String {
    format!("{SHARES}/{index}")
}

/// Makes the root and goes there. What was mounted before can be reached no more. The calling
/// process must have a mount and a pid namespace of its own.
///
/// # Errors
/// What the system calls say.
pub fn build(shares: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    // Nothing that happens from here on is seen outside. In a chroot the root is no mount: then it
    // is enough that what is mounted below is on one that is private.
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    let in_chroot = match mount_change("/", private) {
        Err(Errno::INVAL) => mount_change("/proc", private).map(|()| true)?,
        other => other.map(|()| false)?,
    };
    let root = fresh("tmpfs", &[("mode", "0555"), ("nr_inodes", ROOT_INODES), ("size", "64k")])?;
    // While the old one is in sight: a user namespace gets no other than it had.
    let proc = own_proc()?;
    let mode = Mode::from_raw_mode(0o555);
    rustix::fs::mkdirat(&root, "proc", mode)?;
    rustix::fs::mkdirat(&root, "shares", mode)?;
    // Any directory will do.
    put(root.as_fd(), CWD, "/proc")?;
    put(proc.as_fd(), root.as_fd(), "proc")?;
    rustix::process::fchdir(&root)?;
    if in_chroot {
        // There is nothing to take the place of. The old root is there still, and no way leads to
        // it for who has no fd of it and no right to change his root.
        rustix::process::chroot(".")?;
    } else {
        rustix::process::pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
    }
    rustix::process::chdir("/")?;
    shares.iter().enumerate().try_for_each(|(index, tree)| attach(root.as_fd(), *tree, index))?;
    change(root.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY, MountAttrFlags::empty(), None)
}

/// Puts a share's tree into the root that the calling process is in.
fn attach(root: BorrowedFd<'_>, tree: BorrowedFd<'_>, index: usize) -> Result<(), Errno> {
    let path = share_path(index);
    let path = path.trim_start_matches('/');
    match rustix::fs::mkdirat(root, path, Mode::from_raw_mode(0o555)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    put(tree, root, path)
}

/// Where a worker is, as its parent gets at it.
#[derive(Debug)]
pub struct Inside {
    /// Its mount namespace.
    pub mounts: OwnedFd,
    /// Its root in there.
    pub root: OwnedFd,
    /// Its user namespace, if it has one of its own. A kernel may know none.
    pub users: Option<OwnedFd>,
}

impl Inside {
    /// Of a process, which has a user namespace of its own or not.
    ///
    /// # Errors
    /// What open says.
    pub fn of(pid: i32, own_users: bool) -> Result<Inside, Errno> {
        let open = |name: &str, flags| {
            rustix::fs::open(format!("/proc/{pid}/{name}"), flags | OFlags::CLOEXEC, Mode::empty())
        };
        let root = open("root", OFlags::PATH | OFlags::DIRECTORY)?;
        let users = own_users.then(|| open("ns/user", OFlags::RDONLY)).transpose()?;
        Ok(Inside { mounts: open("ns/mnt", OFlags::RDONLY)?, root, users })
    }

    /// All that is held of it.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [&self.mounts, &self.root].into_iter().chain(&self.users).map(AsFd::as_fd)
    }

    /// In a process that ends then: enters the worker's user namespace and a copy of this process's
    /// mounts, which is where it may make copies of them for the worker's root.
    ///
    /// # Errors
    /// What the system calls say.
    pub fn enter_users(&self) -> Result<(), Errno> {
        let users = self.users.as_ref().ok_or(Errno::INVAL)?;
        move_into_link_name_space(users.as_fd(), Some(LinkNameSpaceType::User))?;
        // SAFETY: no fds are taken apart, and this process has one thread.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
    }

    /// The same as [`build`] does with each share, in a process that ends then.
    ///
    /// # Errors
    /// What the system calls say.
    pub fn attach(&self, tree: BorrowedFd<'_>, index: usize) -> Result<(), Errno> {
        let (ro, none) = (MountAttrFlags::MOUNT_ATTR_RDONLY, MountAttrFlags::empty());
        move_into_link_name_space(self.mounts.as_fd(), Some(LinkNameSpaceType::Mount))?;
        let root = self.root.as_fd();
        change(root, none, ro, None)?;
        attach(root, tree, index).and(change(root, ro, none, None))
    }
}

/// A share's directory in this root.
///
/// # Errors
/// What openat2 says.
pub fn open_share(index: usize) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let how = ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(CWD, share_path(index), flags, Mode::empty(), how)
}

/// Of the own processes; where that may not be had, in a container that hides parts of its /proc
/// from us, that one.
fn own_proc() -> Result<OwnedFd, Errno> {
    match fresh("proc", &[("subset", "pid")]) {
        Err(Errno::PERM) => {
            tracing::warn!("no /proc of its own: the worker sees that of the container");
            let flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE;
            open_tree(CWD, c"/proc", flags)
        }
        other => other,
    }
}

/// A new file system, mounted nowhere.
fn fresh(kind: &str, options: &[(&str, &str)]) -> Result<OwnedFd, Errno> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(context.as_fd(), *key, *value)?;
    }
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

fn put(tree: BorrowedFd<'_>, dir: BorrowedFd<'_>, path: &str) -> Result<(), Errno> {
    move_mount(tree, "", dir, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// What of a share holds for the host's kernel too: no device of it can be opened, no set-id bit
/// counts, no symbolic link is followed, whatever the daemon does; and nothing is written.
///
/// # Errors
/// What mount_setattr says (Linux 5.12).
pub fn harden(tree: BorrowedFd<'_>, read_only: bool, merged: bool) -> Result<(), Errno> {
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW;
    if read_only {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    // A copy of a shared mount would be given what is mounted on the original later.
    let propagation =
        if merged { MountPropagationFlags::DOWNSTREAM } else { MountPropagationFlags::PRIVATE };
    change(tree, attributes, MountAttrFlags::empty(), Some(propagation))
}

/// The directory as the root of a mount of its own, opened.
///
/// # Errors
/// What open_tree says: it wants CAP_SYS_ADMIN.
pub fn copy_of(dir: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(dir, c"", flags)?;
    harden(tree.as_fd(), false, false)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(&tree, ".", flags, Mode::empty())
}

fn change(
    tree: BorrowedFd<'_>,
    set: MountAttrFlags,
    clear: MountAttrFlags,
    propagation: Option<MountPropagationFlags>,
) -> Result<(), Errno> {
    let attributes = libc::mount_attr {
        attr_set: set.bits().into(),
        attr_clr: clear.bits().into(),
        propagation: propagation.map_or(0, |how| how.bits().into()),
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if propagation.is_some() { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a string with its NUL, and the structure is as long as is said; both
    // outlive the call, which writes nothing.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
