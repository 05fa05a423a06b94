//! NODE entries that a request makes due: what finds its nodes again, on another daemon too.
//!
//! The caller of [`Fs::execute`] lends a [`Notes`] with the request ([`Request::noting`]) and
//! sends what is in it afterwards, with the reply or before. A session whose options do not ask
//! for recipes never writes into one.
//!
//! A recipe here is made by one system call and no open: a file handle by directory and name,
//! which tells the file from any later one with its inode number; where there is none, the time of
//! birth. The name may lead to another file by now: then handle and inode number disagree, and the
//! import ends in ESTALE.
//!
//! [`Fs::execute`]: crate::fs::Fs::execute
//! [`Request::noting`]: crate::dispatch::Request::noting

use std::cell::{Cell, RefCell};
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, Ordering};

use ringfs_wire::abi::{self, FUSE_ROOT_ID};
use ringfs_wire::limits::NODE_BODY_BYTES_MAX;
use ringfs_wire::restore::push_node;
use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use crate::dispatch::READDIRPLUS_BYTES_MAX;
use crate::import::{Handle, HandleKind, MountIdentity, OTHER_HEAD_BYTES, Packed};
use crate::nodes::{Node, NodeGiven, Nodes};
use crate::passthrough::Found;

/// A node's handles up to this are taken; of the file systems that we know btrfs has the longest
/// ones: 20 bytes, and 40 by another name.
const HANDLE_BYTES_NOTED_MAX: usize = 71;

// The request that gives most is a listing: the note of an entry is never longer than the entry.
const _: () = {
    assert!(READDIRPLUS_BYTES_MAX <= NODE_BODY_BYTES_MAX);
    assert!(16 + size_of::<Packed>() + HANDLE_BYTES_NOTED_MAX + 7 <= size_of::<abi::DirentPlus>());
};

/// The body of a NODE record that grows while a request is executed. At most
/// [`NODE_BODY_BYTES_MAX`]; nodes beyond (none, by the bounds of replies) would be lost alone.
#[derive(Debug)]
pub struct Notes {
    body: RefCell<Vec<u8>>,
    /// The body of a NOTIFY STORE that is due with it.
    content: RefCell<Vec<u8>>,
    all: Cell<bool>,
    conn: Cell<u16>,
    /// What is noted leaves before any later reply of that connection.
    in_order: bool,
}

impl Default for Notes {
    fn default() -> Notes {
        Notes::new()
    }
}

impl Notes {
    /// Empty; it allocates with the first entry, and keeps its room when it is cleared.
    pub fn new() -> Notes {
        let (body, content) = Default::default();
        Notes { body, content, all: Cell::new(false), conn: Cell::new(0), in_order: true }
    }

    /// For another thread, whose replies others may overtake.
    pub fn of_pool() -> Notes {
        Notes { in_order: false, ..Notes::new() }
    }

    /// What [`Notes::into_body`] gave on another thread.
    pub fn of(body: Vec<u8>) -> Notes {
        Notes { body: RefCell::new(body), ..Notes::new() }
    }

    /// By which connection the next request came, and whether it runs again because its reply was
    /// lost: what it gives may be known by now, and have been noted in that reply alone. Then all
    /// that it gives is noted.
    pub fn begin(&self, conn: u16, again: bool) {
        self.conn.set(conn);
        self.all.set(again);
    }

    /// Whether a node that is given is to be noted: not where an entry of it has left by this very
    /// connection. One that left by another may be lost with that, while this reply arrives.
    fn wants(&self, given: &NodeGiven, noted: Noted) -> bool {
        given.news || self.all.get() || !noted.has(self.conn.get())
    }

    /// Nothing is due.
    pub fn is_empty(&self) -> bool {
        self.body.borrow().is_empty() && self.content.borrow().is_empty()
    }

    /// The body of the NODE record that is due; `restore::split_nodes` makes several of it where a
    /// batch has less room. It stays until [`Notes::clear`].
    pub fn body(&self) -> std::cell::Ref<'_, [u8]> {
        std::cell::Ref::map(self.body.borrow(), Vec::as_slice)
    }

    pub(crate) fn len(&self) -> usize {
        self.body.borrow().len()
    }

    pub(crate) fn truncate(&self, len: usize) {
        self.body.borrow_mut().truncate(len);
    }

    /// It was sent.
    pub fn clear(&self) {
        self.body.borrow_mut().clear();
        self.content.borrow_mut().clear();
    }

    /// What is noted leaves before any later reply of that connection.
    pub(crate) const fn is_in_order(&self) -> bool {
        self.in_order
    }

    /// What a file holds, as `write` has put it after its head; `write` says whether all is there.
    pub(crate) fn store(&self, write: impl FnOnce(&mut Vec<u8>) -> bool) -> bool {
        let mut content = self.content.borrow_mut();
        content.clear();
        let is_whole = write(&mut content);
        if !is_whole {
            content.clear();
        }
        is_whole
    }

    /// The body of the NOTIFY STORE that is due; empty: none is.
    pub fn content(&self) -> std::cell::Ref<'_, [u8]> {
        std::cell::Ref::map(self.content.borrow(), Vec::as_slice)
    }

    /// To be sent by another thread.
    pub fn into_body(self) -> Vec<u8> {
        self.body.into_inner()
    }

    /// `false`: no room.
    pub(crate) fn push(&self, id: u64, write: impl FnOnce(&mut Vec<u8>)) -> bool {
        push_node(&mut self.body.borrow_mut(), id, write)
    }
}

/// By which connections an entry of a node has left, and in which life of them all.
#[derive(Clone, Copy)]
struct Noted {
    life: u32,
    conns: u8,
}

impl Noted {
    fn of(node: &Node, life: u32) -> Noted {
        let bits = node.noted.load(Ordering::Relaxed);
        let conns = if (bits >> 32) as u32 == life { bits as u8 } else { 0 };
        Noted { life, conns }
    }

    const fn has(self, conn: u16) -> bool {
        self.conns & 1 << (conn % 8) != 0
    }

    /// Two threads at once may lose one of both: then an entry more leaves later.
    fn add(self, node: &Node, conn: u16) {
        let conns = self.conns | 1 << (conn % 8);
        node.noted.store(u64::from(self.life) << 32 | u64::from(conns), Ordering::Relaxed);
    }
}

/// Which kind of handle the root's file system gives: asked for once.
#[derive(Debug, Default)]
pub(crate) struct HandleKinds(AtomicU8);

const KINDS: [HandleKind; 2] = [HandleKind::Plain, HandleKind::IdentityOnly];

impl HandleKinds {
    fn read(
        &self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        into: &mut [u8; crate::import::HANDLE_BYTES_MAX],
    ) -> Option<(HandleKind, i32, usize)> {
        loop {
            let tried = self.0.load(Ordering::Relaxed);
            let kind = *KINDS.get(usize::from(tried))?;
            match Handle::read(kind, dir, name, into) {
                Ok((raw_type, len)) if len <= HANDLE_BYTES_NOTED_MAX => {
                    return Some((kind, raw_type, len));
                }
                // Not here, or not by this kernel.
                Ok(_) | Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::OVERFLOW) => {
                    self.0.fetch_max(tried + 1, Ordering::Relaxed);
                }
                Err(_) => return None,
            }
        }
    }
}

impl Nodes {
    /// A connection is cut: what was noted by it, and is not yet where it is needed, is lost.
    pub(crate) fn noted_is_lost(&self) {
        self.noted_life.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes a node that is given where the guest may have no entry of it, or an old one.
    pub(crate) fn note_given(
        &self,
        given: &NodeGiven,
        found: &Found,
        parent: &Node,
        name: &CStr,
        notes: &Notes,
    ) {
        let noted = Noted::of(&given.node, self.noted_life.load(Ordering::Relaxed));
        if notes.wants(given, noted)
            && self.note(&given.node, found, parent, name, notes)
            && notes.in_order
        {
            noted.add(&given.node, notes.conn.get());
        }
    }

    /// Notes what finds `node` again: `found` is what the crate has just seen as `name` in
    /// `parent`. Nothing is noted where nothing would prove the file to be the same.
    pub(crate) fn note(
        &self,
        node: &Node,
        found: &Found,
        parent: &Node,
        name: &CStr,
        notes: &Notes,
    ) -> bool {
        // A node without a recipe is lost with this daemon, and only then.
        self.with_dir(parent, |dir| self.note_in(dir, node, found, parent, name, notes))
            .unwrap_or(false)
    }

    fn note_in(
        &self,
        dir: BorrowedFd<'_>,
        node: &Node,
        found: &Found,
        parent: &Node,
        name: &CStr,
        notes: &Notes,
    ) -> bool {
        let Some(mount) = self.mount_of(found) else { return false };
        let kind = (found.stat.mode & libc::S_IFMT) as u16;
        let packed = Packed::new(mount, found.stat.ino, kind, parent.id);
        let mut bytes = [0; crate::import::HANDLE_BYTES_MAX];
        let own = HandleKinds::default();
        let kinds = if self.is_on_roots_device(mount) { &self.handle_kinds } else { &own };
        if let Some((kind, raw_type, len)) = kinds.read(dir, name, &mut bytes) {
            let handle = Some((kind, raw_type, &bytes[..len]));
            let room = HANDLE_BYTES_NOTED_MAX - len;
            let fits = |other: &Handle| OTHER_HEAD_BYTES + other.bytes().len() <= room;
            let other = self.other_names.handle(node.id).filter(fits);
            return notes.push(node.id, |out| packed.write(handle, other.as_ref(), name, out));
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let Ok(seen) = rustix::fs::statx(dir, name, flags, StatxFlags::INO | StatxFlags::BTIME)
        else {
            return false;
        };
        let has_birth = seen.stx_mask & StatxFlags::BTIME.bits() != 0;
        if !has_birth || seen.stx_ino != found.stat.ino {
            return false;
        }
        let birth = Some((seen.stx_btime.tv_sec, seen.stx_btime.tv_nsec));
        notes.push(node.id, |out| packed.born(birth).write(None, None, name, out))
    }

    fn mount_of(&self, found: &Found) -> Option<MountIdentity> {
        let dev = found.stat.dev;
        let device = (rustix::fs::major(dev), rustix::fs::minor(dev));
        let root = self.root.identity()?;
        if root.device == device {
            return Some(root);
        }
        let fs_id = self.backend.statfs(found.inode).ok()?.f_fsid;
        Some(MountIdentity { fs_id, device })
    }

    fn is_on_roots_device(&self, mount: MountIdentity) -> bool {
        self.root.identity().is_some_and(|root| root.device == mount.device)
    }

    pub(crate) fn kept_dir<'a>(&'a self, dir: &'a Node) -> Option<BorrowedFd<'a>> {
        if dir.id == FUSE_ROOT_ID { Some(self.root.dir()) } else { dir.dir() }
    }

    /// A directory's fd, kept with the node while there are plenty: what a directory holds is
    /// mostly looked up together.
    pub(crate) fn with_dir<T>(
        &self,
        dir: &Node,
        then: impl FnOnce(BorrowedFd<'_>) -> T,
    ) -> Result<T, Errno> {
        if let Some(fd) = self.kept_dir(dir) {
            return Ok(then(fd));
        }
        let fd = self.backend.path_fd(dir.inode()?)?;
        if !self.fds.has_plenty() {
            return Ok(then(fd.as_fd()));
        }
        Ok(then(dir.keep_dir(fd)))
    }
}
