//! Takes a node in again from what the guest remembers of it: a daemon that restarted, or closed
//! fds for want of them, finds the same file, or says ESTALE for this one node.
//!
//! Two ways, the cheap one first:
//! ```text
//! parent fd + name -> openat2, one component --------------------------.
//! file handle -> open_by_handle_at -> /proc/self/fd -> path below root -+-> identity compared
//! ```
//! A [`Recipe`] comes from a guest and may be forged, the handle too (it is two small numbers).
//!
//! Invariants: the fd that is given back was reached by a walk from the share's root (or from a
//! parent that was) with openat2, RESOLVE_BENEATH and no symbolic links: a path read from the
//! kernel only proposes the walk. It is `O_PATH`, so that a forged recipe opens no FIFO and no
//! device. Another file never takes the place of the one that is gone.
//!
//! It must not keep node ids or counts (that is `nodes.rs`) or call the pass-through crate.
//!
//! Exception to the rule that raw libc stands in `ring.rs` alone: `mod sys` at the end holds the
//! file handle calls and FS_IOC_GETVERSION, which rustix lacks.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use zerocopy::little_endian::{I32, I64, U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::fdops::{self, ProcPath};

pub use sys::HANDLE_BYTES_MAX;

/// File systems of one share that handles can be opened on; beyond them nodes come back by name.
pub const MOUNTS_MAX: usize = 256;

/// RESOLVE_BENEATH answers EAGAIN when a rename anywhere may have disturbed it (openat2(2)).
const WALK_TRIES_MAX: usize = 16;

/// `handle_type` of overlayfs (`OVL_FILEID_V1`, fs/overlayfs/overlayfs.h): the file system and
/// handle of the layer that the file first came from.
const OVERLAY_HANDLE: i32 = 0xf8;

/// Type, link count, inode number and birth time.
const IDENTITY_MASK: u32 = 0x0001 | 0x0004 | 0x0100 | 0x0800;

const O_PATH: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Why a node could not be taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// Removed, or moved where neither way finds it, or another file has its name or number.
    #[error("the file is gone or another one stands in its place")]
    Stale,
    /// It exists, but no way leads to it from the share's root. To the guest this is the same.
    #[error("the file lies outside of the share")]
    Outside,
    /// The host could not look, for a reason that says nothing about the file: it may be tried
    /// again.
    #[error("the host could not look for the file: {0}")]
    Host(#[source] Errno),
}

impl ImportError {
    /// What the guest is told. Gone and outside are not told apart.
    pub const fn errno(self) -> Errno {
        match self {
            ImportError::Stale | ImportError::Outside => Errno::STALE,
            ImportError::Host(errno) => errno,
        }
    }

    fn from_walk(errno: Errno) -> ImportError {
        match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE | Errno::ACCESS => {
                ImportError::Stale
            }
            Errno::XDEV => ImportError::Outside,
            other => ImportError::Host(other),
        }
    }
}

/// What a file handle is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandleKind {
    /// `AT_HANDLE_CONNECTABLE` (Linux 6.13): opens to a true path, also when nothing is cached.
    Connectable,
    /// Opens; a path is known for directories, and for files that the host has cached.
    Plain,
    /// `AT_HANDLE_FID` (Linux 6.5): cannot be opened, only compared.
    IdentityOnly,
}

/// A file handle: inode number and generation in the file system's own form.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Handle {
    kind: HandleKind,
    raw_type: i32,
    bytes: Box<[u8]>,
}

impl Handle {
    /// From a record of a peer; `None` beyond [`HANDLE_BYTES_MAX`] bytes.
    pub fn new(kind: HandleKind, raw_type: i32, bytes: &[u8]) -> Option<Handle> {
        let fits = bytes.len() <= HANDLE_BYTES_MAX;
        fits.then(|| Handle { kind, raw_type, bytes: bytes.into() })
    }

    /// What it is good for.
    pub const fn kind(&self) -> HandleKind {
        self.kind
    }

    /// `handle_type` of `struct file_handle`.
    pub const fn raw_type(&self) -> i32 {
        self.raw_type
    }

    /// The opaque bytes, at most [`HANDLE_BYTES_MAX`].
    pub const fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The upper half of the type are the kernel's own flags (`FILEID_IS_CONNECTABLE` and others),
    /// which may differ between kernels.
    const fn file_system_type(&self) -> i32 {
        self.raw_type & 0xffff
    }

    const fn is_overlay(&self) -> bool {
        self.file_system_type() == OVERLAY_HANDLE
    }

    fn same_file(&self, other: &Handle) -> bool {
        self.file_system_type() == other.file_system_type() && self.bytes == other.bytes
    }

    /// The best handle that the kernel and the file system give for `name` in `dir`, which `fd`
    /// is; `None` where there is none. Needs no privilege. Source: name_to_handle_at(2).
    pub fn of(dir: BorrowedFd<'_>, name: &CStr, fd: BorrowedFd<'_>) -> Option<Handle> {
        use HandleKind::{Connectable, IdentityOnly, Plain};
        let mut kinds = [Connectable, Plain, IdentityOnly].into_iter();
        kinds.find_map(|kind| Handle::of_kind(kind, dir, name, fd))
    }

    /// One that does not depend on the name: the same for all links of a file.
    fn nameless(fd: BorrowedFd<'_>) -> Option<Handle> {
        use HandleKind::{IdentityOnly, Plain};
        [Plain, IdentityOnly].into_iter().find_map(|kind| Handle::of_kind(kind, fd, c"", fd))
    }

    /// The bytes of one that does not depend on the name, of `name` in `dir`: its type and length.
    pub(crate) fn read(
        kind: HandleKind,
        dir: BorrowedFd<'_>,
        name: &CStr,
        into: &mut [u8; HANDLE_BYTES_MAX],
    ) -> Result<(i32, usize), Errno> {
        let flags = match kind {
            HandleKind::Connectable => 0x2,
            HandleKind::Plain => 0,
            HandleKind::IdentityOnly => 0x200,
        };
        let (raw_type, len, _mount_id) = sys::name_to_handle(dir, name, flags, into)?;
        Ok((raw_type, len))
    }

    fn of_kind(
        kind: HandleKind,
        dir: BorrowedFd<'_>,
        name: &CStr,
        fd: BorrowedFd<'_>,
    ) -> Option<Handle> {
        let mut bytes = [0; HANDLE_BYTES_MAX];
        let got = match kind {
            // Excludes AT_EMPTY_PATH. If another file takes the name just now, handle and inode
            // number disagree, and the import ends in ESTALE.
            HandleKind::Connectable => sys::name_to_handle(dir, name, 0x2, &mut bytes),
            HandleKind::Plain => sys::name_to_handle(fd, c"", 0x1000, &mut bytes),
            HandleKind::IdentityOnly => sys::name_to_handle(fd, c"", 0x1200, &mut bytes),
        };
        let (raw_type, len, _mount_id) = got.ok()?;
        Handle::new(kind, raw_type, bytes.get(..len)?)
    }
}

/// Which file system: `f_fsid` of statfs(2) stays over remounts for ext4 and btrfs; the device
/// number tells apart, while they are mounted, what has no such id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MountIdentity {
    /// `f_fsid`; 0 where the file system has none.
    pub fs_id: u64,
    /// Major and minor device number of statx(2).
    pub device: (u32, u32),
}

/// What rebuilds one node: the content of a NODE record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// Where the file system has one.
    pub handle: Option<Handle>,
    /// The file system.
    pub mount: MountIdentity,
    /// Inode number on the host.
    pub ino: u64,
    /// `S_IFMT` bits: a file does not change its kind.
    pub kind: u16,
    /// Birth time, seconds and nanoseconds, where the file system keeps it.
    pub btime: Option<(i64, u32)>,
    /// FS_IOC_GETVERSION; only asked for without a handle (which contains it).
    pub generation: Option<u32>,
    /// The guest's id of the directory that it was found in.
    pub parent: u64,
    /// Its name there: one component.
    pub name: CString,
}

impl Recipe {
    /// Describes `name` in `dir` (which the guest knows as `parent`).
    ///
    /// # Errors
    /// [`ImportError::Stale`] if it is not there; [`ImportError::Host`], with `EINVAL` for what is
    /// not one component.
    pub fn of(dir: BorrowedFd<'_>, name: &CStr, parent: u64) -> Result<Recipe, ImportError> {
        fdops::check_name(name).map_err(ImportError::Host)?;
        let fd =
            rustix::fs::openat(dir, name, O_PATH, Mode::empty()).map_err(ImportError::from_walk)?;
        Recipe::of_fd(dir, name, parent, fd.as_fd())
    }

    /// As [`Recipe::of`], with the fd of the file in hand: spares the open.
    ///
    /// # Errors
    /// As there.
    pub fn of_fd(
        dir: BorrowedFd<'_>,
        name: &CStr,
        parent: u64,
        fd: BorrowedFd<'_>,
    ) -> Result<Recipe, ImportError> {
        Recipe::with(Handle::of(dir, name, fd), name, parent, fd)
    }

    /// As [`Recipe::of`], for as long as this daemon runs: the handle does not depend on the name,
    /// so that any link of the file can be compared with it.
    ///
    /// # Errors
    /// As there.
    pub fn brief(dir: BorrowedFd<'_>, name: &CStr, parent: u64) -> Result<Recipe, ImportError> {
        fdops::check_name(name).map_err(ImportError::Host)?;
        let fd =
            rustix::fs::openat(dir, name, O_PATH, Mode::empty()).map_err(ImportError::from_walk)?;
        Recipe::with(Handle::nameless(fd.as_fd()), name, parent, fd.as_fd())
    }

    /// As [`Recipe::brief`] with the file's fd, for a name that cannot be looked at now: whether it
    /// leads there the import will see.
    ///
    /// # Errors
    /// As there.
    pub fn brief_of_fd(
        fd: BorrowedFd<'_>,
        name: &CStr,
        parent: u64,
    ) -> Result<Recipe, ImportError> {
        Recipe::with(Handle::nameless(fd), name, parent, fd)
    }

    /// Whether it tells its file from another one that got the same inode number.
    pub fn proves_identity(&self) -> bool {
        self.handle.is_some() || self.btime.is_some() || self.generation.is_some()
    }

    fn with(
        handle: Option<Handle>,
        name: &CStr,
        parent: u64,
        fd: BorrowedFd<'_>,
    ) -> Result<Recipe, ImportError> {
        let seen = Seen::of(fd).map_err(ImportError::Host)?;
        let generation = if handle.is_none() { generation(fd, seen.kind) } else { None };
        let mount =
            MountIdentity { fs_id: fs_id(fd).map_err(ImportError::Host)?, device: seen.device };
        let Seen { ino, kind, btime, .. } = seen;
        Ok(Recipe { handle, mount, ino, kind, btime, generation, parent, name: name.into() })
    }

    /// Is the file at its name in `dir`, open as `fd`, the one that was described?
    ///
    /// # Errors
    /// The host could not look.
    pub fn describes(&self, dir: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> Result<bool, Errno> {
        let seen = Seen::of(fd)?;
        if seen.links == 0 || seen.kind != self.kind {
            return Ok(false);
        }
        let now = self.handle.as_ref().and_then(|h| Handle::of_kind(h.kind, dir, &self.name, fd));
        match (&self.handle, now) {
            // The first write to a lower file gives it another birth time, and this handle stays.
            (Some(handle), Some(now)) if handle.is_overlay() => Ok(handle.same_file(&now)),
            // Inode number, generation and birth time: enough on whatever device it is now.
            (Some(handle), Some(now)) => Ok(handle.same_file(&now) && self.resembles(&seen)),
            (Some(_) | None, _) => {
                // Where a handle cannot be had now, it proves nothing.
                if self.btime.is_none() && self.generation.is_none() {
                    return Ok(false);
                }
                let same_generation =
                    self.generation.is_none() || self.generation == generation(fd, seen.kind);
                Ok(self.resembles(&seen) && same_generation && fs_id(fd)? == self.mount.fs_id)
            }
        }
    }

    /// In few bytes: [`Packed`], the handle, the name.
    pub fn pack(&self) -> Box<[u8]> {
        let handle = self.handle.as_ref();
        let handle = handle.map(|handle| (handle.kind, handle.raw_type, &*handle.bytes));
        let mut packed = Vec::with_capacity(size_of::<Packed>() + 32 + self.name.count_bytes());
        Packed::new(self.mount, self.ino, self.kind, self.parent)
            .born(self.btime)
            .generation(self.generation)
            .write(handle, &self.name, &mut packed);
        packed.into()
    }

    /// The opposite of [`Recipe::pack`]; `None` for what it did not make.
    pub fn unpack(bytes: &[u8]) -> Option<Recipe> {
        let (head, rest) = Packed::read_from_prefix(bytes).ok()?;
        if head.form != FORM {
            return None;
        }
        let (handle, name) = rest.split_at_checked(head.handle_bytes.into())?;
        let handle_kind = match head.handle_kind {
            1 => Some(HandleKind::Connectable),
            2 => Some(HandleKind::Plain),
            3 => Some(HandleKind::IdentityOnly),
            _ => None,
        };
        let handle = handle_kind.map(|kind| Handle::new(kind, head.handle_type.get(), handle));
        Some(Recipe {
            handle: handle.flatten(),
            mount: MountIdentity {
                fs_id: head.fs_id.get(),
                device: (head.device[0].get(), head.device[1].get()),
            },
            ino: head.ino.get(),
            kind: head.kind.get(),
            btime: (head.has & 1 != 0).then_some((head.btime_sec.get(), head.btime_nsec.get())),
            generation: (head.has & 2 != 0).then_some(head.generation.get()),
            parent: head.parent.get(),
            name: CString::new(name).ok()?,
        })
    }

    fn resembles(&self, seen: &Seen) -> bool {
        let same_birth = self.btime.is_none() || self.btime == seen.btime;
        seen.links > 0 && (self.ino, self.kind) == (seen.ino, seen.kind) && same_birth
    }
}

/// Which layout of [`Packed`] this is: recipes outlive the daemon that made them.
const FORM: u8 = 1;

/// The head of a packed recipe, before the handle and the name; see [`Recipe`] for the fields.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Packed {
    ino: U64,
    fs_id: U64,
    device: [U32; 2],
    btime_sec: I64,
    btime_nsec: U32,
    generation: U32,
    parent: U64,
    handle_type: I32,
    kind: U16,
    /// 0: there is none.
    handle_kind: u8,
    /// Bit 0: a birth time; bit 1: a generation.
    has: u8,
    handle_bytes: u8,
    /// [`FORM`].
    form: u8,
}

/// The longest that [`Packed::write`] makes fits a NODE.
const _: () = assert!(
    size_of::<Packed>() + HANDLE_BYTES_MAX + fdops::NAME_BYTES_MAX
        <= ringfs_wire::limits::RECIPE_BYTES_MAX
);

impl Packed {
    pub(crate) fn new(mount: MountIdentity, ino: u64, kind: u16, parent: u64) -> Packed {
        Packed {
            ino: ino.into(),
            fs_id: mount.fs_id.into(),
            device: [mount.device.0.into(), mount.device.1.into()],
            parent: parent.into(),
            kind: kind.into(),
            form: FORM,
            ..Packed::new_zeroed()
        }
    }

    pub(crate) fn born(self, btime: Option<(i64, u32)>) -> Packed {
        let Some((sec, nsec)) = btime else { return self };
        Packed { btime_sec: sec.into(), btime_nsec: nsec.into(), has: self.has | 1, ..self }
    }

    fn generation(self, generation: Option<u32>) -> Packed {
        let Some(generation) = generation else { return self };
        Packed { generation: generation.into(), has: self.has | 2, ..self }
    }

    pub(crate) fn write(
        mut self,
        handle: Option<(HandleKind, i32, &[u8])>,
        name: &CStr,
        out: &mut Vec<u8>,
    ) {
        let mut bytes = &[][..];
        if let Some((kind, raw_type, handle)) = handle {
            self.handle_type = raw_type.into();
            self.handle_bytes = handle.len() as u8;
            self.handle_kind = match kind {
                HandleKind::Connectable => 1,
                HandleKind::Plain => 2,
                HandleKind::IdentityOnly => 3,
            };
            bytes = handle;
        }
        out.extend_from_slice(self.as_bytes());
        out.extend_from_slice(bytes);
        out.extend_from_slice(name.to_bytes());
    }
}

/// What one statx tells.
pub(crate) struct Seen {
    ino: u64,
    kind: u16,
    links: u32,
    btime: Option<(i64, u32)>,
    device: (u32, u32),
}

impl Seen {
    fn of(fd: BorrowedFd<'_>) -> Result<Seen, Errno> {
        let got = fdops::statx(fd, IDENTITY_MASK, 0)?;
        let btime = (got.btime.tv_sec, got.btime.tv_nsec);
        Ok(Seen {
            ino: got.ino,
            kind: got.mode & 0o170_000,
            links: got.nlink,
            btime: (got.mask & 0x0800 != 0).then_some(btime),
            device: (got.dev_major, got.dev_minor),
        })
    }
}

fn fs_id(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    Ok(rustix::fs::fstatvfs(fd)?.f_fsid)
}

/// Wants a real fd, so only for what may be opened without harm.
fn generation(fd: BorrowedFd<'_>, kind: u16) -> Option<u32> {
    let harmless = [FileType::RegularFile, FileType::Directory];
    if !harmless.contains(&FileType::from_raw_mode(kind.into())) {
        return None;
    }
    let real = fdops::reopen(fd, OFlags::RDONLY | OFlags::NONBLOCK).ok()?;
    sys::generation(real.as_fd()).ok()
}

struct Mount {
    identity: MountIdentity,
    /// Not `O_PATH`: open_by_handle_at wants a real fd.
    dir: OwnedFd,
}

/// The root of a share and the file systems below it that handles can be opened on.
pub struct Root {
    dir: OwnedFd,
    cross_mounts: bool,
    /// Nothing on another device than this one is part of the share.
    only_device: Option<(u32, u32)>,
    mounts: Vec<Mount>,
}

/// A file found again; the fd is `O_PATH`.
#[derive(Debug)]
pub enum Found {
    /// Under the parent and name of the recipe.
    ByName(OwnedFd),
    /// By these components below the root; none of them is the root itself.
    ByPath(OwnedFd, Vec<CString>),
}

impl Found {
    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Found::ByName(fd) | Found::ByPath(fd, _) => fd.as_fd(),
        }
    }
}

impl Root {
    /// For a directory (the fd may be `O_PATH`). `cross_mounts`: are files on file systems mounted
    /// below it part of the share?
    ///
    /// # Errors
    /// [`ImportError::Host`].
    pub fn new(dir: BorrowedFd<'_>, cross_mounts: bool) -> Result<Root, ImportError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let real = fdops::reopen(dir, flags).map_err(ImportError::Host)?;
        let mut root = Root { dir: real, cross_mounts, only_device: None, mounts: Vec::new() };
        root.add_mount(dir)?;
        Ok(root)
    }

    /// Refuses what lies on another device than the root: for a share whose mounts below could
    /// not be hidden.
    pub fn stay_on_device(mut self) -> Root {
        self.only_device = self.mounts.first().map(|mount| mount.identity.device);
        self
    }

    /// The root itself.
    pub(crate) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// The root's file system.
    pub(crate) fn identity(&self) -> Option<MountIdentity> {
        self.mounts.first().map(|mount| mount.identity)
    }

    /// The same file system as it is mounted now: device numbers change over a reboot.
    pub(crate) fn identity_now(&self, then: MountIdentity) -> MountIdentity {
        self.mount_of(&then).map_or(then, |mount| mount.identity)
    }

    /// Makes handles of the file system of `dir` resolvable. For the root of each mount below the
    /// share, before the first import: two mounts of copies of one image are only told apart where
    /// both are known. Returns whether it was new.
    ///
    /// # Errors
    /// [`ImportError::Host`], with `ENOSPC` beyond [`MOUNTS_MAX`].
    pub fn add_mount(&mut self, dir: BorrowedFd<'_>) -> Result<bool, ImportError> {
        let host = ImportError::Host;
        let device = Seen::of(dir).map_err(host)?.device;
        let identity = MountIdentity { fs_id: fs_id(dir).map_err(host)?, device };
        if self.mounts.iter().any(|mount| mount.identity == identity) {
            return Ok(false);
        }
        if self.mounts.len() >= MOUNTS_MAX {
            return Err(host(Errno::NOSPC));
        }
        let dir = fdops::reopen(dir, OFlags::RDONLY | OFlags::DIRECTORY).map_err(host)?;
        self.mounts.push(Mount { identity, dir });
        Ok(true)
    }

    /// Finds the file of a recipe: under its name in `parent` (which the caller has imported
    /// already), else by its handle.
    ///
    /// # Errors
    /// See [`ImportError`].
    pub fn resolve(
        &self,
        recipe: &Recipe,
        parent: Option<BorrowedFd<'_>>,
    ) -> Result<Found, ImportError> {
        if let Some(parent) = parent {
            match self.by_name(recipe, parent) {
                Err(ImportError::Stale | ImportError::Outside) => {}
                other => return other,
            }
        }
        self.by_handle(recipe)
    }

    /// By parent and name alone: no privilege needed.
    ///
    /// # Errors
    /// See [`ImportError`].
    pub fn by_name(&self, recipe: &Recipe, parent: BorrowedFd<'_>) -> Result<Found, ImportError> {
        fdops::check_name(&recipe.name).map_err(|_| ImportError::Stale)?;
        let fd = self.walk(parent, &recipe.name)?;
        self.check_device(fd.as_fd())?;
        let same = recipe.describes(parent, fd.as_fd()).map_err(ImportError::Host)?;
        if same { Ok(Found::ByName(fd)) } else { Err(ImportError::Stale) }
    }

    /// The file, whatever its name, and wherever it is: not for guests.
    pub(crate) fn open_handle(&self, recipe: &Recipe) -> Result<(OwnedFd, Seen), ImportError> {
        let Some(handle) = &recipe.handle else { return Err(ImportError::Stale) };
        if handle.kind == HandleKind::IdentityOnly {
            return Err(ImportError::Stale);
        }
        let mount = self.mount_of(&recipe.mount).ok_or(ImportError::Stale)?;
        let flags = (libc::O_PATH | libc::O_NOFOLLOW) | libc::O_CLOEXEC;
        let open = || sys::open_by_handle(mount.dir.as_fd(), handle.raw_type, &handle.bytes, flags);
        let opened = fdops::retry_on_nomem(open).map_err(|errno| match errno {
            Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::IO | Errno::INTR => {
                ImportError::Host(errno)
            }
            // ESTALE; EPERM without the capability; EINVAL, EOPNOTSUPP for a forged one, or one
            // of a newer kernel.
            _ => ImportError::Stale,
        })?;
        let seen = Seen::of(opened.as_fd()).map_err(ImportError::Host)?;
        if !recipe.resembles(&seen) {
            return Err(ImportError::Stale);
        }
        Ok((opened, seen))
    }

    /// By the handle alone: finds renamed files and moved directories too. Wants
    /// CAP_DAC_READ_SEARCH; without it everything is [`ImportError::Stale`].
    ///
    /// # Errors
    /// See [`ImportError`].
    pub fn by_handle(&self, recipe: &Recipe) -> Result<Found, ImportError> {
        let (opened, seen) = self.open_handle(recipe)?;
        let components = self.path_below(opened.as_fd())?;
        let fd = self.walk(self.dir.as_fd(), &joined(&components)?)?;
        self.check_device(fd.as_fd())?;
        let walked = Seen::of(fd.as_fd()).map_err(ImportError::Host)?;
        // Both are open, so equal numbers are one file.
        if (walked.device, walked.ino) != (seen.device, seen.ino) {
            return Err(ImportError::Stale);
        }
        Ok(Found::ByPath(fd, components))
    }

    /// The only mount with this file system's id. Device numbers do not decide: they change hands
    /// with a remount, and copies of one image (which have one id, and equal handles) would be
    /// taken for each other; with two alike, only names and their mount points tell.
    fn mount_of(&self, wanted: &MountIdentity) -> Option<&Mount> {
        let mut alike = self.mounts.iter().filter(|mount| {
            let same_id = mount.identity.fs_id == wanted.fs_id;
            same_id && (wanted.fs_id != 0 || mount.identity == *wanted)
        });
        let only = alike.next()?;
        alike.next().is_none().then_some(only)
    }

    fn check_device(&self, fd: BorrowedFd<'_>) -> Result<(), ImportError> {
        let Some(only) = self.only_device else { return Ok(()) };
        let seen = Seen::of(fd).map_err(ImportError::Host)?;
        if seen.device == only { Ok(()) } else { Err(ImportError::Outside) }
    }

    /// The components that the kernel names, as a proposal: a walk decides.
    ///
    /// # Errors
    /// See [`ImportError`].
    pub fn path_below(&self, fd: BorrowedFd<'_>) -> Result<Vec<CString>, ImportError> {
        let root = path_of(self.dir.as_fd())?;
        let path = path_of(fd)?;
        let root = root.to_bytes().strip_suffix(b"/").unwrap_or(root.to_bytes());
        let below = path.to_bytes().strip_prefix(root).and_then(|rest| rest.strip_prefix(b"/"));
        let below = below.ok_or(ImportError::Outside)?;
        let components = below.split(|&byte| byte == b'/').map(|component| {
            let name = CString::new(component).map_err(|_| ImportError::Stale)?;
            fdops::check_name(&name).map_err(|_| ImportError::Stale)?;
            Ok(name)
        });
        components.collect()
    }

    fn walk(&self, from: BorrowedFd<'_>, path: &CStr) -> Result<OwnedFd, ImportError> {
        let mut how =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        if !self.cross_mounts {
            how |= ResolveFlags::NO_XDEV;
        }
        for _ in 0..WALK_TRIES_MAX {
            match rustix::fs::openat2(from, path, O_PATH, Mode::empty(), how) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other.map_err(ImportError::from_walk),
            }
        }
        Err(ImportError::Host(Errno::AGAIN))
    }
}

fn joined(components: &[CString]) -> Result<CString, ImportError> {
    let parts: Vec<&[u8]> = components.iter().map(|name| name.to_bytes()).collect();
    CString::new(parts.join(&b'/')).map_err(|_| ImportError::Stale)
}

/// Longer than PATH_MAX: no path is known, which the name may cure.
fn path_of(fd: BorrowedFd<'_>) -> Result<CString, ImportError> {
    let path = rustix::fs::readlinkat(CWD, ProcPath::of(fd).as_c_str(), Vec::new());
    path.map_err(|errno| match errno {
        Errno::NAMETOOLONG => ImportError::Stale,
        other => ImportError::Host(other),
    })
}

/// The raw calls; see the head of the file for why each is here.
#[allow(unsafe_code, reason = "system calls that rustix lacks")]
mod sys {
    use std::ffi::CStr;
    use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

    use rustix::io::{Errno, Result};

    /// Bytes of a file handle at most (`MAX_HANDLE_SZ`, linux/exportfs.h).
    pub const HANDLE_BYTES_MAX: usize = 128;

    /// `struct file_handle` with room for the longest one.
    #[repr(C)]
    struct RawHandle {
        handle_bytes: u32,
        handle_type: i32,
        bytes: [u8; HANDLE_BYTES_MAX],
    }

    fn last_errno() -> Errno {
        Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
    }

    /// name_to_handle_at(2): writes the handle's bytes, returns (type, length, mount id).
    pub(super) fn name_to_handle(
        dir: BorrowedFd<'_>,
        name: &CStr,
        flags: i32,
        into: &mut [u8; HANDLE_BYTES_MAX],
    ) -> Result<(i32, usize, i32)> {
        let mut raw = RawHandle {
            handle_bytes: HANDLE_BYTES_MAX as u32,
            handle_type: 0,
            bytes: [0; HANDLE_BYTES_MAX],
        };
        let mut mount_id = 0i32;
        // SAFETY: the fd is open, the name ends in NUL; `raw` has the layout of struct file_handle
        // with `handle_bytes` bytes behind its header, and both pointers are valid for the call.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                dir.as_raw_fd(),
                name.as_ptr(),
                &raw mut raw,
                &raw mut mount_id,
                flags,
            )
        };
        if rc != 0 {
            return Err(last_errno());
        }
        let len = (raw.handle_bytes as usize).min(HANDLE_BYTES_MAX);
        *into = raw.bytes;
        Ok((raw.handle_type, len, mount_id))
    }

    /// open_by_handle_at(2). Wants CAP_DAC_READ_SEARCH; `mount` is any fd on the file system.
    pub(super) fn open_by_handle(
        mount: BorrowedFd<'_>,
        handle_type: i32,
        handle: &[u8],
        flags: i32,
    ) -> Result<OwnedFd> {
        let mut raw = RawHandle { handle_bytes: 0, handle_type, bytes: [0; HANDLE_BYTES_MAX] };
        let target = raw.bytes.get_mut(..handle.len()).ok_or(Errno::INVAL)?;
        target.copy_from_slice(handle);
        raw.handle_bytes = handle.len() as u32;
        // SAFETY: the fd is open; `raw` has the layout of struct file_handle and holds
        // `handle_bytes` bytes; the kernel only reads it, during the call.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                &raw const raw,
                flags | libc::O_CLOEXEC,
            )
        };
        match i32::try_from(fd) {
            // SAFETY: the kernel has just made this fd for us; nobody else owns it.
            Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(last_errno()),
        }
    }

    /// FS_IOC_GETVERSION: the inode's generation. Not on `O_PATH` fds.
    pub(super) fn generation(fd: BorrowedFd<'_>) -> Result<u32> {
        // The request is _IOR('v', 1, long), but every file system writes an int; a long's room
        // is right for either.
        let mut version: libc::c_long = 0;
        // SAFETY: the fd is open; the pointer is valid for writes of a long during the call.
        let rc =
            unsafe { libc::ioctl(fd.as_raw_fd(), libc::FS_IOC_GETVERSION as _, &raw mut version) };
        if rc == 0 { Ok(version as u32) } else { Err(last_errno()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fdops::{FsKind, LocalFs};
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    #[test]
    fn a_file_that_is_gone_is_stale_also_while_a_new_one_gets_its_number() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| dir.path().join(name);
        let opened = std::fs::File::open(dir.path()).expect("open");
        if fdops::fs_kind(opened.as_fd()) == Ok(FsKind::Local(LocalFs::Tmpfs)) {
            eprintln!("SKIPPED: the temporary directory is in memory, where no number comes again");
            return;
        }
        let root = Root::new(opened.as_fd(), false).expect("a root");
        std::fs::write(path("gone"), "").expect("write");
        let recipe = Recipe::of(opened.as_fd(), c"gone", 1).expect("a recipe");
        std::fs::remove_file(path("gone")).expect("remove");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Relaxed) {
                    std::fs::write(path("new"), "").expect("write");
                    std::fs::remove_file(path("new")).expect("remove");
                }
            });
            let found = (0..20_000).map(|_| root.open_handle(&recipe).err());
            let wrong = found.filter(|found| !matches!(found, Some(ImportError::Stale))).count();
            over.store(true, Relaxed);
            assert_eq!(wrong, 0);
        });
    }
}
