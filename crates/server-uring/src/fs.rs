//! The file system of one session: what a guest may do to one share.
//!
//! `Fs` is shared by all threads of the daemon; every method takes `&self`. It never sees a record
//! or a socket: requests come as parsed headers with their arguments, and bodies of replies go
//! into buffers of the caller. The handlers are in `ops`, and dispatch.rs says which opcode runs
//! which, and where.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use ringfs_wire::abi;
pub use ringfs_wire::hello::CacheMode;
use ringfs_wire::table::Given;
use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::dispatch::Request;
use crate::fdops::{self, FsKind, LocalFs};
use crate::fds::Fds;
use crate::handles::{Handle, Handles, OpenFile, Waits};
use crate::history::History;
use crate::idmap::Ids;
use crate::import::{self, ImportError};
use crate::limits::NODES_WITH_FD_DEFAULT;
use crate::long_calls::LongCalls;
use crate::nodes::{Bound, Node, NodeGiven, Nodes, Released};
use crate::notes::Notes;
use crate::passthrough::{Backend, Caller, Found, ROOT_INODE, Stat};
use crate::quota::{Quota, ShareQuota};
use crate::share::{ShareDir, ShareRoot};
use crate::xattrmap::XattrMap;

/// How long names and attributes are good for in the guest, in seconds.
pub(crate) fn valid_secs(cache: CacheMode) -> u64 {
    match cache {
        CacheMode::Never => 0,
        CacheMode::Auto => 1,
        CacheMode::Metadata | CacheMode::Always => 86_400,
    }
}

/// What a guest sees of host mounts below the share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Submounts {
    /// The directory underneath.
    #[default]
    Hide,
    /// What is mounted there.
    Merge,
}

/// Settings of one share, checked by the caller once.
#[derive(Clone, Debug)]
pub struct FsOptions {
    /// How far the guest may cache.
    pub cache: CacheMode,
    /// The guest's kernel collects writes; only where nobody else writes.
    pub writeback: bool,
    /// Everything that writes answers EROFS.
    pub read_only: bool,
    /// Open host files with O_DIRECT where the guest does (`direct_io=pass`).
    pub direct_io: bool,
    /// Extended attributes.
    pub xattr: bool,
    /// What the guest calls them.
    pub xattr_map: Option<Arc<XattrMap>>,
    /// POSIX ACLs, where the guest's mount asks for them.
    pub acl: bool,
    /// What the guest calls users and groups.
    pub ids: Arc<Ids>,
    /// Guests may leave no set-user-id, set-group-id or capabilities on files.
    pub nosuid: bool,
    /// Host mounts below the share.
    pub submounts: Submounts,
    /// Allow MKNOD of block and character devices.
    pub device_nodes: bool,
    /// Nodes that one session may know.
    pub nodes_max: usize,
    /// Files and directories that one session may hold open.
    pub handles_max: usize,
    /// Note what finds each node again (notes.rs): the guest can rebuild the session elsewhere.
    pub recipes: bool,
    /// The content of small files goes with their first OPEN (store.rs).
    pub stores: bool,
    /// The daemon's fds; sessions of one process share it.
    pub fds: Arc<Fds>,
    /// Limits of the share; its sessions share it.
    pub quota: Arc<ShareQuota>,
    /// Calls that keep others waiting; its sessions share it.
    pub long_calls: Arc<LongCalls>,
}

impl Default for FsOptions {
    fn default() -> Self {
        FsOptions {
            cache: CacheMode::Auto,
            writeback: false,
            read_only: false,
            direct_io: false,
            xattr: true,
            xattr_map: None,
            acl: false,
            ids: Arc::default(),
            nosuid: false,
            submounts: Submounts::Hide,
            device_nodes: false,
            nodes_max: 2_000_000,
            handles_max: 131_072,
            recipes: false,
            stores: false,
            fds: Fds::of_process(None, NODES_WITH_FD_DEFAULT),
            quota: Arc::default(),
            long_calls: Arc::default(),
        }
    }
}

/// Why a share cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The directory cannot be opened.
    #[error("cannot open the share's directory {path}: check that it exists and is a directory")]
    Open {
        /// The directory as configured.
        path: PathBuf,
        /// The kernel's answer.
        source: Errno,
    },
    /// The opened directory does not answer.
    #[error("cannot read the attributes of the share's directory")]
    Root(#[source] Errno),
    /// The crate refused.
    #[error("cannot start the file system: is /proc mounted?")]
    Backend(#[source] std::io::Error),
    /// The trick by which files are opened does not hold.
    #[error(
        "the self-test of open files failed: this build must not serve (wrong fuse-backend-rs)"
    )]
    SelfTest(#[source] Errno),
}

/// What a session holds; tests compare it before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsCounts {
    /// Nodes known, the root among them.
    pub nodes: usize,
    /// Those of them that have an fd.
    pub nodes_with_fd: usize,
    /// Files and directories open.
    pub handles: usize,
    /// FORGETs that named what the guest did not have.
    pub overdrawn: u64,
}

/// A path of more names is not told.
const KNOWN_PATH_NAMES_MAX: usize = 64;

/// One session's view of one share.
pub struct Fs {
    pub(crate) options: FsOptions,
    pub(crate) backend: Arc<Backend>,
    pub(crate) nodes: Arc<Nodes>,
    pub(crate) handles: Handles,
    /// What limits the session, and what it has used.
    pub(crate) quota: Arc<Quota>,
    /// The root of the share; with `submounts=hide` that of a private copy of its mount.
    pub(crate) root: OwnedFd,
    root_stat: Stat,
    /// Refuse what lies on another device: the mounts could not be hidden.
    one_device: bool,
    /// Calls that may free blocks.
    pub(crate) history: History,
    /// Metadata calls do not wait for a network or for another daemon.
    pub(crate) local: bool,
    /// What reads and writes of this file system wait for.
    pub(crate) waits: Waits,
    /// INIT flags in force.
    pub(crate) negotiated: AtomicU64,
    /// The daemon's own supplementary groups must not be lent to a guest's user.
    pub(crate) has_groups: bool,
    /// Devices other than the root's, in the order of their discovery.
    devices: RwLock<Vec<u64>>,
}

impl Fs {
    /// Starts to serve the directory `dir`.
    ///
    /// # Errors
    /// See [`FsError`]. `/proc` must be mounted.
    pub fn new(dir: &Path, options: FsOptions) -> Result<Fs, FsError> {
        let dir = ShareDir::open(dir, options.submounts, options.read_only)?;
        Fs::on(dir.root().map_err(FsError::Root)?, options)
    }

    /// Starts to serve a directory that was opened before, with the same `submounts`.
    ///
    /// # Errors
    /// See [`FsError`]. `/proc` must be mounted.
    pub fn on(root: ShareRoot, options: FsOptions) -> Result<Fs, FsError> {
        let hidden = root.hidden();
        let root = OwnedFd::from(root);
        let merged = options.submounts == Submounts::Merge;
        let root_stat = Stat::of(&root).map_err(FsError::Root)?;
        let kind = fdops::fs_kind(root.as_fd()).map_err(FsError::Root)?;
        // "/." makes the last step of the path a directory, which O_NOFOLLOW does not refuse.
        let path = format!("/proc/self/fd/{}/.", root.as_raw_fd());
        let backend = Backend::new(Path::new(&path), options.xattr).map_err(FsError::Backend)?;
        let backend = Arc::new(backend);
        self_test(&backend, &root_stat).map_err(FsError::SelfTest)?;
        let imports = import::Root::new(root.as_fd(), merged || !hidden);
        let mut imports = imports.map_err(|error| FsError::Root(ImportError::errno(error)))?;
        if !hidden {
            imports = imports.stay_on_device();
        }
        let quota = Arc::new(Quota::new(&options.quota));
        let bound = Bound { most: options.nodes_max, quota: Arc::clone(&quota) };
        // What is mounted below may be of another kind: then nothing is taken for granted.
        let local = kind.is_local() && !merged;
        Ok(Fs {
            nodes: Nodes::new(Arc::clone(&backend), imports, &options.fds, bound, !local),
            handles: Handles::new(options.handles_max, &options.fds, &quota),
            quota,
            one_device: !hidden,
            history: History::default(),
            options,
            backend,
            root,
            root_stat,
            local,
            waits: if merged { Waits::Maybe } else { waits(kind) },
            negotiated: AtomicU64::new(0),
            has_groups: rustix::process::getgroups().map_or(true, |groups| !groups.is_empty()),
            devices: RwLock::new(Vec::new()),
        })
    }

    /// The guest gives back lookups: (node id, count) each. Files whose last user this was are
    /// closed at once; see [`Fs::forget_later`] where that may take too long.
    pub fn forget(&self, forgets: impl Iterator<Item = (u64, u64)>) {
        drop(self.forget_later(forgets));
    }

    /// As [`Fs::forget`], but what must be closed is handed to the caller.
    pub fn forget_later(&self, forgets: impl Iterator<Item = (u64, u64)>) -> Released {
        let mut released = Released::default();
        for (id, count) in forgets {
            self.nodes.forget(id, count, &mut released);
        }
        released
    }

    /// A connection of the session is cut: what was noted by it may not have arrived.
    pub fn noted_is_lost(&self) {
        self.nodes.noted_is_lost();
    }

    /// Takes back what a reply gave that no guest will take. The caller closes it, on a thread
    /// that may wait.
    pub fn give_back(&self, given: &Given) -> (Released, Option<Handle>) {
        let released = self.forget_later(given.nodes.iter().map(|&id| (id, 1)));
        (released, given.handle.and_then(|fh| self.handles.take_back(fh)))
    }

    /// Blocks of 512 bytes, and inodes, that a shard may free itself: memory is freed in a moment
    /// (32 MiB), a disk's journal may have to be waited for.
    pub fn blocks_freed_at_once(&self) -> u64 {
        if self.waits == Waits::Never { 64 << 10 } else { 0 }
    }

    /// What the session holds now.
    pub fn counts(&self) -> FsCounts {
        FsCounts {
            nodes: self.nodes.count(),
            nodes_with_fd: self.nodes.resident(),
            handles: self.handles.count(),
            overdrawn: self.nodes.overdrawn(),
        }
    }

    /// Where in the share a node was seen last, as far as that is known without looking: for
    /// people. Names are bytes of the guest's.
    pub fn known_path(&self, id: u64) -> Option<String> {
        let mut names = Vec::new();
        let mut node = self.nodes.find_resident(id)?;
        while node.id != abi::FUSE_ROOT_ID {
            let place = node.place();
            names.push(place.name.to_string_lossy().into_owned());
            if names.len() > KNOWN_PATH_NAMES_MAX {
                return None;
            }
            node = self.nodes.find_resident(place.parent)?;
        }
        names.reverse();
        Some(format!("/{}", names.join("/")))
    }

    /// INIT flags in force (0 before INIT).
    pub fn negotiated(&self) -> u64 {
        self.negotiated.load(Ordering::Relaxed)
    }

    /// The guest's kernel keeps writes back, and so owns sizes, times and O_APPEND.
    pub(crate) fn writeback(&self) -> bool {
        self.negotiated() & abi::init::WRITEBACK_CACHE != 0
    }

    /// Gives what the crate found as `name` in `parent` to the guest: one count.
    pub(crate) fn give(
        &self,
        request: &Request<'_>,
        found: &Found,
        parent: &Node,
        name: &CStr,
    ) -> Result<(Arc<Node>, abi::EntryOut), Errno> {
        if self.one_device && found.stat.dev != self.root_stat.dev {
            self.backend.forget(found.inode, 1);
            return Err(Errno::XDEV);
        }
        let given = self.nodes.give(found, parent, name)?;
        self.note(request, &given, found, parent, name);
        let entry = self.entry(given.node.id, &found.stat);
        Ok((given.node, entry))
    }

    /// Where a guest that wants recipes has none of this node, or an old one.
    pub(crate) fn note(
        &self,
        request: &Request<'_>,
        given: &NodeGiven,
        found: &Found,
        parent: &Node,
        name: &CStr,
    ) {
        if let Some(notes) = self.notes_of(request) {
            self.nodes.note_given(given, found, parent, name, notes);
        }
    }

    /// Where this session's requests note nodes.
    pub(crate) fn notes_of<'a>(&self, request: &Request<'a>) -> Option<&'a Notes> {
        request.notes.filter(|_| self.options.recipes)
    }

    /// The entry of a node whose count was given already.
    pub(crate) fn entry(&self, nodeid: u64, stat: &Stat) -> abi::EntryOut {
        let valid = valid_secs(self.options.cache);
        abi::EntryOut {
            nodeid,
            // Ids are never reused, so a generation has nothing to tell apart.
            generation: 0,
            entry_valid: valid,
            attr_valid: valid,
            entry_valid_nsec: 0,
            attr_valid_nsec: 0,
            attr: self.attr(stat),
        }
    }

    fn attr(&self, stat: &Stat) -> abi::Attr {
        let mut attr = crate::reply::attr(stat, self.guest_ino(stat.dev, stat.ino));
        (attr.uid, attr.gid) = self.shown_ids(attr.uid, attr.gid);
        attr
    }

    /// What the guest calls a user and a group of the host.
    pub(crate) fn shown_ids(&self, uid: u32, gid: u32) -> (u32, u32) {
        let Ids { users, groups } = &*self.options.ids;
        (users.to_guest(uid), groups.to_guest(gid))
    }

    /// Attributes with their time of validity.
    pub(crate) fn attr_out(&self, stat: &Stat) -> abi::AttrOut {
        abi::AttrOut {
            attr_valid: valid_secs(self.options.cache),
            attr_valid_nsec: 0,
            dummy: 0,
            attr: self.attr(stat),
        }
    }

    /// The host's inode number; on another device than the root's (a merged mount, a btrfs
    /// subvolume) folded with the device's index, so that two files do not look like one.
    pub(crate) fn guest_ino(&self, dev: u64, ino: u64) -> u64 {
        if dev == self.root_stat.dev {
            return ino;
        }
        ino ^ (self.device_index(dev) << 48)
    }

    fn device_index(&self, dev: u64) -> u64 {
        let place = |devices: &[u64]| devices.iter().position(|&known| known == dev);
        let known = place(&self.devices.read().unwrap_or_else(PoisonError::into_inner));
        let index = known.unwrap_or_else(|| {
            let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
            place(&devices).unwrap_or_else(|| {
                // Far more devices than a share can have; past it they share the last index.
                if devices.len() < 4096 {
                    devices.push(dev);
                }
                devices.len() - 1
            })
        });
        index as u64 + 1
    }

    /// The root's inode number, which `..` of the root shows too.
    pub(crate) fn root_ino(&self) -> u64 {
        self.root_stat.ino
    }

    /// Numbers an opened file.
    pub(crate) fn insert_file(&self, node: Arc<Node>, fd: OwnedFd, flags: u32) -> u64 {
        self.handles.insert(self.file_handle(node, fd, flags))
    }

    pub(crate) fn file_handle(&self, node: Arc<Node>, fd: OwnedFd, flags: u32) -> Handle {
        Handle::File(Arc::new(self.opened(node, fd, flags).0))
    }

    /// A file that was just opened, and whether for the first time, as far as is known.
    pub(crate) fn opened(&self, node: Arc<Node>, fd: OwnedFd, flags: u32) -> (OpenFile, bool) {
        let is_first = node.take_unopened();
        (OpenFile::new(node, fd, flags, self.waits), is_first)
    }

    /// The caller of a creating call, as the host knows it. Where the daemon cannot change its ids,
    /// nobody is asked for.
    ///
    /// # Errors
    /// `EPERM`: the share is not for this user or group.
    pub(crate) fn caller(&self, uid: u32, gid: u32) -> Result<Caller, Errno> {
        let Ids { users, groups } = &*self.options.ids;
        let caller = Caller { uid: users.to_host(uid)?, gid: groups.to_host(gid)? };
        Ok(if self.backend.squashes() { Caller { uid: 0, gid: 0 } } else { caller })
    }

    /// Permission bits that a guest may give to a file that is no directory.
    pub(crate) fn file_bits(&self, mode: u32) -> u32 {
        let set_id = libc::S_ISUID | libc::S_ISGID;
        if self.options.nosuid { mode & !set_id } else { mode }
    }

    /// The mode of what is made in a directory. Where the guest's kernel leaves its task's umask to
    /// us (ACLs) it counts unless the directory has a default ACL, which stands in its place.
    pub(crate) fn masked(&self, parent: &Node, mode: u32, umask: u32) -> Result<u32, Errno> {
        let masked = mode & !(umask & 0o777);
        if self.negotiated() & abi::init::DONT_MASK == 0 {
            return Ok(masked);
        }
        let acl = self.backend.getxattr(parent.inode()?, c"system.posix_acl_default", 0);
        Ok(if acl.is_ok() { mode } else { masked })
    }
}

fn waits(kind: FsKind) -> Waits {
    match kind {
        FsKind::Local(LocalFs::Tmpfs) => Waits::Never,
        FsKind::Local(LocalFs::Ext4 | LocalFs::Xfs | LocalFs::Btrfs | LocalFs::F2fs) => {
            Waits::Nowait
        }
        FsKind::Network | FsKind::Fuse | FsKind::Other(_) => Waits::Maybe,
    }
}

/// Opens the root by the trick and compares identities: it must be the very same directory.
fn self_test(backend: &Backend, root: &Stat) -> Result<(), Errno> {
    let flags = (libc::O_RDONLY | libc::O_DIRECTORY) as u32;
    let fd = backend.open(ROOT_INODE, flags, false)?;
    let seen = rustix::fs::statx(&fd, c"", AtFlags::EMPTY_PATH, StatxFlags::INO)?;
    let dev = rustix::fs::makedev(seen.stx_dev_major, seen.stx_dev_minor);
    if (dev, seen.stx_ino) != (root.dev, root.ino) {
        return Err(Errno::BADF);
    }
    Ok(())
}
