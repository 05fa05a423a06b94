//! A guest's kernel in a few lines: builds requests as bytes and reads the replies.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use ringfs_server::dispatch::{Request, Route};
use ringfs_server::fs::{Fs, FsOptions};
use ringfs_server::notes::Notes;
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::restore::Nodes;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub const ROOT: u64 = abi::FUSE_ROOT_ID;
pub const O_RDWR: u32 = libc::O_RDWR as u32;
pub const O_WRONLY: u32 = libc::O_WRONLY as u32;
pub const O_EXCL: u32 = libc::O_EXCL as u32;

/// Everything that a kernel of today offers.
pub const ALL_FLAGS: u64 = !abi::init::INIT_RESERVED;

pub fn share() -> (tempfile::TempDir, Guest) {
    share_with(FsOptions::default())
}

pub fn share_with(options: FsOptions) -> (tempfile::TempDir, Guest) {
    let dir = tempfile::tempdir().expect("directory");
    let guest = Guest::new(dir.path(), options);
    (dir, guest)
}

/// A file system and the caller whose requests it gets.
pub struct Guest {
    pub fs: Fs,
    pub uid: u32,
    pub gid: u32,
    /// What it would keep for another daemon.
    pub memory: Mutex<Memory>,
}

/// Nodes with the lookups that the guest has, and what NODE said of them last.
#[derive(Clone, Default)]
pub struct Memory {
    pub counts: HashMap<u64, u64>,
    pub recipes: HashMap<u64, Vec<u8>>,
}

impl Memory {
    fn keep(&mut self, opcode: Opcode, reply: &[u8], notes: Notes) {
        let mut given = Vec::new();
        match opcode {
            Opcode::Lookup
            | Opcode::Mknod
            | Opcode::Mkdir
            | Opcode::Symlink
            | Opcode::Link
            | Opcode::Create
            | Opcode::Tmpfile => {
                given.extend(abi::EntryOut::read_from_prefix(reply).map(|(entry, _)| entry.nodeid));
            }
            Opcode::Readdirplus => {
                given.extend(listed(reply, true).into_iter().map(|entry| entry.nodeid));
            }
            _ => {}
        }
        for id in given.into_iter().filter(|&id| id > ROOT) {
            *self.counts.entry(id).or_default() += 1;
        }
        for node in Nodes::new(&notes.body()) {
            let node = node.expect("a NODE of ours");
            self.recipes.insert(node.id, node.recipe.to_vec());
        }
    }
}

impl Guest {
    pub fn new(root: &Path, options: FsOptions) -> Guest {
        let guest = Guest::uninitialised(root, options);
        guest.init();
        guest
    }

    pub fn uninitialised(root: &Path, options: FsOptions) -> Guest {
        Guest::of(Fs::new(root, options).expect("fs"))
    }

    pub fn of(fs: Fs) -> Guest {
        Guest { fs, uid: 0, gid: 0, memory: Mutex::default() }
    }

    pub fn init(&self) -> abi::InitOut {
        let init = abi::InitIn {
            major: 7,
            minor: 45,
            max_readahead: 128 << 10,
            flags: ALL_FLAGS as u32,
            flags2: (ALL_FLAGS >> 32) as u32,
            unused: [0; 11],
        };
        self.ask_one(Opcode::Init, 0, init.as_bytes()).expect("init")
    }

    pub fn body(&self, nodeid: u64, args: &[u8], ext: &[u8]) -> Vec<u8> {
        let mut body = nodeid.to_le_bytes().to_vec();
        for word in [self.uid, self.gid, 4711] {
            body.extend(word.to_le_bytes());
        }
        body.extend(((ext.len() / 8) as u16).to_le_bytes());
        body.extend([0; 2]);
        body.extend(args);
        body.extend(ext);
        body
    }

    /// Runs a request, with all the room that it may need.
    pub fn ask(&self, opcode: Opcode, nodeid: u64, args: &[u8]) -> Result<Vec<u8>, Errno> {
        self.ask_ext(opcode, nodeid, args, &[])
    }

    pub fn ask_ext(
        &self,
        opcode: Opcode,
        nodeid: u64,
        args: &[u8],
        ext: &[u8],
    ) -> Result<Vec<u8>, Errno> {
        let body = self.body(nodeid, args, ext);
        let notes = Notes::new();
        let request = Request::parse(opcode as u32, &body).expect("whole request").noting(&notes);
        let mut out = vec![0xee; self.fs.reply_bytes_max(&request)];
        let used = self.fs.execute(&request, &mut out)?;
        out.truncate(used);
        self.memory.lock().expect("memory").keep(opcode, &out, notes);
        Ok(out)
    }

    /// Runs a request whose reply is one structure.
    pub fn ask_one<T: FromBytes + KnownLayout + Immutable>(
        &self,
        opcode: Opcode,
        nodeid: u64,
        args: &[u8],
    ) -> Result<T, Errno> {
        let reply = self.ask(opcode, nodeid, args)?;
        Ok(T::read_from_bytes(&reply).expect("size of the reply"))
    }

    pub fn route(&self, opcode: Opcode, nodeid: u64, args: &[u8]) -> String {
        let body = self.body(nodeid, args, &[]);
        let request = Request::parse(opcode as u32, &body).expect("whole request");
        match self.fs.route(&request) {
            Route::Inline => "inline".into(),
            Route::Pool => "pool".into(),
            Route::Read { offset, len, .. } => format!("read {offset}+{len}"),
            Route::Write { offset, payload, .. } => format!("write {offset} {payload:?}"),
            Route::Fsync { data_only, .. } => format!("fsync {data_only}"),
            Route::Release { fh, directory } => format!("release {fh} {directory}"),
            Route::Refuse(errno) => format!("errno {}", errno.raw_os_error()),
            Route::NoReply => "none".into(),
        }
    }

    pub fn lookup(&self, parent: u64, name: &str) -> Result<abi::EntryOut, Errno> {
        self.ask_one(Opcode::Lookup, parent, &named(&[], name.as_bytes()))
    }

    pub fn forget(&self, nodeid: u64, count: u64) {
        self.fs.forget([(nodeid, count)].into_iter());
        let mut memory = self.memory.lock().expect("memory");
        let left = memory.counts.get_mut(&nodeid).map(|left| {
            *left = left.saturating_sub(count);
            *left
        });
        if left == Some(0) {
            memory.counts.remove(&nodeid);
            memory.recipes.remove(&nodeid);
        }
    }

    pub fn getattr(&self, nodeid: u64) -> Result<abi::Attr, Errno> {
        let reply: abi::AttrOut =
            self.ask_one(Opcode::Getattr, nodeid, abi::GetattrIn::default().as_bytes())?;
        Ok(reply.attr)
    }

    pub fn setattr(&self, nodeid: u64, setattr: abi::SetattrIn) -> Result<abi::Attr, Errno> {
        let reply: abi::AttrOut = self.ask_one(Opcode::Setattr, nodeid, setattr.as_bytes())?;
        Ok(reply.attr)
    }

    pub fn mkdir(&self, parent: u64, name: &str) -> Result<abi::EntryOut, Errno> {
        let head = abi::MkdirIn { mode: 0o755, umask: 0o022 };
        self.ask_one(Opcode::Mkdir, parent, &named(head.as_bytes(), name.as_bytes()))
    }

    pub fn create(
        &self,
        parent: u64,
        name: &str,
        flags: u32,
    ) -> Result<(abi::EntryOut, u64), Errno> {
        let create = abi::CreateIn { flags, mode: 0o100_644, umask: 0o022, open_flags: 0 };
        let args = named(create.as_bytes(), name.as_bytes());
        let reply = self.ask(Opcode::Create, parent, &args)?;
        Ok(split_created(&reply))
    }

    pub fn open(&self, nodeid: u64, flags: u32) -> Result<abi::OpenOut, Errno> {
        self.ask_one(Opcode::Open, nodeid, abi::OpenIn { flags, open_flags: 0 }.as_bytes())
    }

    pub fn opendir(&self, nodeid: u64) -> Result<abi::OpenOut, Errno> {
        self.ask_one(Opcode::Opendir, nodeid, abi::OpenIn::default().as_bytes())
    }

    pub fn release(&self, nodeid: u64, fh: u64) -> Result<Vec<u8>, Errno> {
        let release = abi::ReleaseIn { fh, ..Default::default() };
        self.ask(Opcode::Release, nodeid, release.as_bytes())
    }

    pub fn releasedir(&self, nodeid: u64, fh: u64) -> Result<Vec<u8>, Errno> {
        let release = abi::ReleaseIn { fh, ..Default::default() };
        self.ask(Opcode::Releasedir, nodeid, release.as_bytes())
    }

    pub fn read(&self, nodeid: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let read = abi::ReadIn { fh, offset, size, ..Default::default() };
        self.ask(Opcode::Read, nodeid, read.as_bytes())
    }

    pub fn write(&self, nodeid: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        self.write_flags(nodeid, fh, offset, data, 0)
    }

    pub fn write_flags(
        &self,
        nodeid: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        write_flags: u32,
    ) -> Result<u32, Errno> {
        let size = data.len() as u32;
        let write = abi::WriteIn { fh, offset, size, write_flags, ..Default::default() };
        let args = [write.as_bytes(), data].concat();
        let reply: abi::WriteOut = self.ask_one(Opcode::Write, nodeid, &args)?;
        Ok(reply.size)
    }

    pub fn unlink(&self, parent: u64, name: &str) -> Result<Vec<u8>, Errno> {
        self.ask(Opcode::Unlink, parent, &named(&[], name.as_bytes()))
    }

    pub fn link(&self, nodeid: u64, parent: u64, name: &str) -> Result<abi::EntryOut, Errno> {
        let head = abi::LinkIn { oldnodeid: nodeid };
        self.ask_one(Opcode::Link, parent, &named(head.as_bytes(), name.as_bytes()))
    }

    pub fn rename(
        &self,
        (parent, old): (u64, &str),
        (newdir, new): (u64, &str),
        flags: u32,
    ) -> Result<Vec<u8>, Errno> {
        let head = abi::Rename2In { newdir, flags, padding: 0 };
        let args = named(&named(head.as_bytes(), old.as_bytes()), new.as_bytes());
        self.ask(Opcode::Rename2, parent, &args)
    }

    pub fn readdir(
        &self,
        opcode: Opcode,
        (nodeid, fh): (u64, u64),
        offset: u64,
        size: u32,
    ) -> Result<Vec<Listed>, Errno> {
        let read = abi::ReadIn { fh, offset, size, ..Default::default() };
        let reply = self.ask(opcode, nodeid, read.as_bytes())?;
        assert!(reply.len() <= size as usize);
        Ok(listed(&reply, opcode == Opcode::Readdirplus))
    }

    /// All entries of a directory, read in pieces of `size` bytes.
    pub fn list(&self, nodeid: u64, opcode: Opcode, size: u32) -> Vec<Listed> {
        let fh = self.opendir(nodeid).expect("opendir").fh;
        let mut all: Vec<Listed> = Vec::new();
        loop {
            let offset = all.last().map_or(0, |entry| entry.next);
            let part = self.readdir(opcode, (nodeid, fh), offset, size).expect("readdir");
            if part.is_empty() {
                break;
            }
            all.extend(part);
        }
        self.releasedir(nodeid, fh).expect("releasedir");
        all
    }

    pub fn setxattr(&self, nodeid: u64, name: &[u8], value: &[u8]) -> Result<Vec<u8>, Errno> {
        let head = abi::SetxattrIn { size: value.len() as u32, flags: 0 };
        self.ask(Opcode::Setxattr, nodeid, &[&named(head.as_bytes(), name), value].concat())
    }

    pub fn getxattr(&self, nodeid: u64, name: &[u8], size: u32) -> Result<Vec<u8>, Errno> {
        let head = abi::GetxattrIn { size, padding: 0 };
        self.ask(Opcode::Getxattr, nodeid, &named(head.as_bytes(), name))
    }
}

/// One entry of a directory's listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: Vec<u8>,
    pub ino: u64,
    pub next: u64,
    pub type_: u32,
    pub nodeid: u64,
}

/// A structure, then a name with its NUL.
pub fn named(head: &[u8], name: &[u8]) -> Vec<u8> {
    [head, name, b"\0"].concat()
}

pub fn split_created(reply: &[u8]) -> (abi::EntryOut, u64) {
    let (entry, rest) = abi::EntryOut::read_from_prefix(reply).expect("entry");
    (entry, abi::OpenOut::read_from_bytes(rest).expect("open").fh)
}

pub fn listed(mut reply: &[u8], plus: bool) -> Vec<Listed> {
    let mut all = Vec::new();
    while !reply.is_empty() {
        let mut nodeid = 0;
        if plus {
            let (entry, rest) = abi::EntryOut::read_from_prefix(reply).expect("entry");
            nodeid = entry.nodeid;
            reply = rest;
        }
        let (head, rest) = abi::Dirent::read_from_prefix(reply).expect("dirent");
        let name = rest[..head.namelen as usize].to_vec();
        reply = &rest[name.len().next_multiple_of(8)..];
        let abi::Dirent { ino, off: next, type_, .. } = head;
        all.push(Listed { name, ino, next, type_, nodeid });
    }
    all
}

/// A number generator, repeatable from its seed (Knuth's constants).
pub struct Lcg(pub u64);

impl Lcg {
    pub fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 16
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// How many fds of this process stand on the file at `path`, in whatever mount.
pub fn fds_on(path: &Path) -> usize {
    let host = std::fs::symlink_metadata(path).expect("host");
    let all = std::fs::read_dir("/proc/self/fd").expect("proc").flatten();
    let same = all.filter(|fd| {
        std::fs::metadata(fd.path())
            .is_ok_and(|seen| (seen.dev(), seen.ino()) == (host.dev(), host.ino()))
    });
    same.count()
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A tmpfs somewhere; gone when dropped, also after a failed assertion.
pub struct Mounted(pub PathBuf);

impl Mounted {
    pub fn tmpfs(path: PathBuf) -> Mounted {
        rustix::mount::mount(
            "tmpfs",
            &path,
            "tmpfs",
            MountFlags::empty(),
            c"size=16m,nr_inodes=20000",
        )
        .expect("mount");
        Mounted(path)
    }

    /// An ext4 of its own at `path`, on a loop device that detaches itself with its mount. `None`,
    /// with a line that says why, where there is no loop device.
    pub fn ext4(image: &Path, path: PathBuf) -> Option<Mounted> {
        Mounted::ext4_of(image, path, "256")
    }

    /// Its inodes have no room for the time of birth.
    pub fn ext4_without_births(image: &Path, path: PathBuf) -> Option<Mounted> {
        Mounted::ext4_of(image, path, "128")
    }

    /// The same file system with nothing in the host's caches; nobody may use it.
    pub fn mount_again(&self, image: &Path) {
        rustix::mount::unmount(&self.0, UnmountFlags::empty()).expect("unmount");
        Mounted::loop_mount(image, &self.0);
    }

    fn loop_mount(image: &Path, path: &Path) {
        let mut mount = Command::new("mount");
        let status = mount.args(["-o", "loop"]).arg(image).arg(path).status();
        assert!(status.expect("run").success());
    }

    fn ext4_of(image: &Path, path: PathBuf, inode_bytes: &str) -> Option<Mounted> {
        if !is_root() || !Path::new("/dev/loop-control").exists() {
            println!("SKIPPED: loop devices need root and /dev/loop-control");
            return None;
        }
        let file = std::fs::File::create(image).expect("image");
        file.set_len(64 << 20).expect("length of the image");
        let run = |command: &mut Command| assert!(command.status().expect("run").success());
        run(Command::new("mkfs.ext4")
            .args(["-q", "-F", "-I", inode_bytes, "-N", "16384"])
            .arg(image));
        Mounted::loop_mount(image, &path);
        Some(Mounted(path))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}
