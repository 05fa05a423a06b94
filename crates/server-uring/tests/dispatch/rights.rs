//! Whose rights, whose bits, whose mounts. Most of it can only be tried by root.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use ringfs_server::fs::{Fs, FsOptions, Submounts};
use ringfs_server::share::ShareDir;
use ringfs_wire::abi::{self, Opcode, fattr};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::support::{
    Guest, Mounted, O_EXCL, O_RDWR, ROOT, is_root, named, share, share_with, split_created,
};

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("host");
}

/// The supplementary groups extension, as the kernel sends it.
fn groups_ext(groups: &[u32]) -> Vec<u8> {
    let mut body: Vec<u8> = (groups.len() as u32).to_le_bytes().to_vec();
    body.extend(groups.iter().flat_map(|group| group.to_le_bytes()));
    body.resize(body.len().next_multiple_of(8), 0);
    let head = abi::ExtHeader { size: body.len() as u32 + 8, type_: abi::FUSE_EXT_GROUPS };
    [head.as_bytes(), &body].concat()
}

fn mkdir_ext(guest: &Guest, parent: u64, name: &str, ext: &[u8]) -> Result<abi::Attr, Errno> {
    let args = named(abi::MkdirIn { mode: 0o40_755, umask: 0 }.as_bytes(), name.as_bytes());
    let reply = guest.ask_ext(Opcode::Mkdir, parent, &args, ext)?;
    Ok(abi::EntryOut::read_from_bytes(&reply).expect("entry").attr)
}

#[test]
fn what_a_user_makes_is_the_users() {
    if !is_root() {
        return;
    }
    let (dir, mut guest) = share();
    set_mode(dir.path(), 0o777);
    (guest.uid, guest.gid) = (1000, 1001);
    let (entry, _) = guest.create(ROOT, "file", O_RDWR).expect("create");
    assert_eq!((entry.attr.uid, entry.attr.gid), (1000, 1001));
    let sub = guest.mkdir(ROOT, "dir").expect("mkdir");
    assert_eq!((sub.attr.uid, sub.attr.gid), (1000, 1001));
    let mknod = abi::MknodIn { mode: libc::S_IFIFO | 0o644, ..Default::default() };
    let fifo = guest.ask_one::<abi::EntryOut>(Opcode::Mknod, ROOT, &named(mknod.as_bytes(), b"p"));
    let fifo = fifo.expect("mknod");
    assert_eq!((fifo.attr.uid, fifo.attr.mode), (1000, libc::S_IFIFO | 0o644));
    assert_eq!(guest.open(fifo.nodeid, O_RDWR), Err(Errno::NXIO));
    let head = abi::CreateIn { flags: O_RDWR, mode: 0o600, umask: 0, open_flags: 0 };
    let reply = guest.ask(Opcode::Tmpfile, ROOT, &named(head.as_bytes(), b"/"));
    assert_eq!(split_created(&reply.expect("tmpfile")).0.attr.uid, 1000);
    // The host decides, too.
    set_mode(dir.path(), 0o755);
    assert_eq!(guest.mkdir(ROOT, "more"), Err(Errno::ACCESS));
    assert_eq!(guest.create(ROOT, "more", O_RDWR), Err(Errno::ACCESS));
    assert_eq!(rustix::process::geteuid().as_raw(), 0, "this thread is root again");
}

#[test]
fn supplementary_groups_open_directories() {
    if !is_root() {
        return;
    }
    let (dir, mut guest) = share();
    chown(dir.path(), Some(0), Some(2000)).expect("host");
    set_mode(dir.path(), 0o2770);
    (guest.uid, guest.gid) = (1000, 1000);
    assert_eq!(mkdir_ext(&guest, ROOT, "a", &[]), Err(Errno::ACCESS));
    assert_eq!(mkdir_ext(&guest, ROOT, "a", &groups_ext(&[77])), Err(Errno::ACCESS));
    let attr = mkdir_ext(&guest, ROOT, "a", &groups_ext(&[2000])).expect("mkdir");
    // A sgid directory hands its group on, and directories the bit as well.
    assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (1000, 2000, 0o2755));
    assert_eq!(mkdir_ext(&guest, ROOT, "b", &[]), Err(Errno::ACCESS), "groups are dropped again");
    assert!(rustix::process::getgroups().expect("getgroups").is_empty());

    let head = abi::CreateIn { flags: O_RDWR, mode: 0o102_755, umask: 0, open_flags: 0 };
    let args = named(head.as_bytes(), b"file");
    let reply = guest.ask_ext(Opcode::Create, ROOT, &args, &groups_ext(&[2000])).expect("create");
    let attr = split_created(&reply).0.attr;
    assert_eq!((attr.uid, attr.gid, attr.mode & 0o777), (1000, 2000, 0o755));

    let wrong = [
        groups_ext(&[0; 257]),
        abi::ExtHeader { size: 0, type_: abi::FUSE_EXT_GROUPS }.as_bytes().to_vec(),
        abi::ExtHeader { size: 64, type_: abi::FUSE_EXT_GROUPS }.as_bytes().to_vec(),
        abi::ExtHeader { size: 8, type_: abi::FUSE_EXT_GROUPS }.as_bytes().to_vec(),
        groups_ext(&[u32::MAX]),
    ];
    for ext in wrong {
        assert_eq!(mkdir_ext(&guest, ROOT, "c", &ext), Err(Errno::INVAL), "{ext:?}");
    }
}

#[test]
fn ordinary_writes_clear_suid() {
    if !is_root() {
        return;
    }
    let (dir, guest) = share();
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).expect("create");
    let (id, path) = (entry.nodeid, dir.path().join("file"));
    let kill = abi::FUSE_WRITE_KILL_SUIDGID;
    let armed = || set_mode(&path, 0o6777);
    let mode = || std::fs::metadata(&path).expect("host").mode() & 0o7777;

    armed();
    guest.write(id, fh, 0, b"x").expect("write");
    assert_eq!(mode(), 0o6777, "root's own write keeps them");
    guest.write_flags(id, fh, 0, b"x", kill).expect("write");
    assert_eq!(mode(), 0o777);
    guest.write(id, fh, 0, b"x").expect("write");

    for with_fh in [0, fattr::FH] {
        armed();
        let valid = fattr::SIZE | with_fh;
        guest.setattr(id, abi::SetattrIn { valid, fh, ..Default::default() }).expect("truncate");
        assert_eq!(mode(), 0o6777);
        let valid = valid | fattr::KILL_SUIDGID;
        guest.setattr(id, abi::SetattrIn { valid, fh, ..Default::default() }).expect("truncate");
        assert_eq!(mode(), 0o777);
    }

    armed();
    let flags = O_RDWR | libc::O_TRUNC as u32;
    let open = abi::OpenIn { flags, open_flags: abi::FUSE_OPEN_KILL_SUIDGID };
    guest.ask(Opcode::Open, id, open.as_bytes()).expect("open");
    assert_eq!(mode(), 0o777);

    armed();
    let owner = abi::SetattrIn { valid: fattr::UID, uid: 1000, ..Default::default() };
    guest.setattr(id, owner).expect("chown");
    assert_eq!(mode(), 0o777);
    // The capability is back.
    armed();
    guest.write(id, fh, 0, b"x").expect("write");
    assert_eq!(mode(), 0o6777);
}

#[test]
fn create_of_what_exists_asks_the_host() {
    if !is_root() {
        return;
    }
    let (dir, mut guest) = share();
    std::fs::write(dir.path().join("secret"), b"root's").expect("host");
    set_mode(&dir.path().join("secret"), 0o600);
    std::fs::create_dir(dir.path().join("dir")).expect("host");
    set_mode(dir.path(), 0o777);
    let before = guest.fs.counts();
    (guest.uid, guest.gid) = (1000, 1000);
    assert_eq!(guest.create(ROOT, "secret", O_RDWR), Err(Errno::ACCESS));
    assert_eq!(guest.create(ROOT, "dir", O_RDWR), Err(Errno::ISDIR));
    assert_eq!(guest.fs.counts(), before, "a failed open gives nothing");
    guest.uid = 0;
    let (entry, fh) = guest.create(ROOT, "secret", O_RDWR).expect("create");
    assert_eq!(guest.read(entry.nodeid, fh, 0, 9).expect("read"), b"root's");
}

#[test]
fn a_read_only_share_stays_as_it_is() {
    let dir = tempfile::tempdir().expect("directory");
    std::fs::write(dir.path().join("file"), b"text").expect("host");
    let guest = Guest::new(dir.path(), FsOptions { read_only: true, ..FsOptions::default() });
    let id = guest.lookup(ROOT, "file").expect("lookup").nodeid;
    let fh = guest.open(id, 0).expect("open").fh;
    assert_eq!(guest.read(id, fh, 0, 9).expect("read"), b"text");
    let truncate = libc::O_TRUNC as u32;
    let refused = [
        guest.open(id, O_RDWR).map(drop),
        guest.open(id, truncate).map(drop),
        guest.create(ROOT, "new", O_EXCL).map(drop),
        guest.mkdir(ROOT, "new").map(drop),
        guest.unlink(ROOT, "file").map(drop),
        guest.link(id, ROOT, "new").map(drop),
        guest.rename((ROOT, "file"), (ROOT, "new"), 0).map(drop),
        guest.write(id, fh, 0, b"x").map(drop),
        guest.setxattr(id, b"user.x", b"x").map(drop),
        guest.setattr(id, abi::SetattrIn { valid: fattr::SIZE, ..Default::default() }).map(drop),
    ];
    for (index, result) in refused.into_iter().enumerate() {
        assert_eq!(result, Err(Errno::ROFS), "{index}");
    }
    let access = abi::AccessIn { mask: 2, padding: 0 };
    assert_eq!(guest.ask(Opcode::Access, id, access.as_bytes()), Err(Errno::ROFS));
    assert_eq!(guest.route(Opcode::Unlink, ROOT, b"file\0"), "errno 30");
    assert_eq!(std::fs::read(dir.path().join("file")).expect("host"), b"text");
}

#[test]
fn device_nodes_only_when_allowed() {
    let mknod = |guest: &Guest, mode, name: &[u8]| {
        let head = abi::MknodIn { mode, rdev: 0x0001_0305, ..Default::default() };
        guest.ask_one::<abi::EntryOut>(Opcode::Mknod, ROOT, &named(head.as_bytes(), name))
    };
    let (_dir, guest) = share();
    for mode in [libc::S_IFCHR, libc::S_IFBLK, libc::S_IFDIR] {
        assert_eq!(mknod(&guest, mode | 0o600, b"node"), Err(Errno::PERM));
    }
    assert_eq!(mknod(&guest, libc::S_IFLNK, b"node"), Err(Errno::INVAL));
    assert_eq!(mknod(&guest, 0o600, b"file").expect("file").attr.mode, libc::S_IFREG | 0o600);
    if is_root() {
        let (_dir, guest) = share_with(FsOptions { device_nodes: true, ..FsOptions::default() });
        let node = mknod(&guest, libc::S_IFCHR | 0o600, b"node").expect("device");
        assert_eq!(node.attr.rdev, 0x0001_0305);
        assert_eq!(guest.open(node.nodeid, O_RDWR), Err(Errno::NXIO));
    }
}

#[test]
fn mounts_below_a_share() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    for sub in ["early", "late"] {
        std::fs::create_dir(dir.path().join(sub)).expect("host");
        std::fs::write(dir.path().join(sub).join("under"), b"").expect("host");
    }
    // The share itself is a mount, and a shared one: what is mounted later would spread.
    rustix::mount::mount_bind(dir.path(), dir.path()).expect("mount");
    let _bind = Mounted(dir.path().to_owned());
    rustix::mount::mount_change(dir.path(), rustix::mount::MountPropagationFlags::SHARED)
        .expect("shared");
    let _early = Mounted::tmpfs(dir.path().join("early"));
    std::fs::write(dir.path().join("early/over"), b"").expect("host");
    let submounts = Submounts::Merge;
    let merge = Guest::new(dir.path(), FsOptions { submounts, ..FsOptions::default() });
    let root =
        ShareDir::open(dir.path(), Submounts::Hide, false).expect("open").root().expect("root");
    let second = root.try_clone().expect("clone");
    drop(Fs::on(root, FsOptions::default()).expect("a session that ends"));
    let hide = Guest::of(Fs::on(second, FsOptions::default()).expect("fs"));
    hide.init();
    let _late = Mounted::tmpfs(dir.path().join("late"));
    std::fs::write(dir.path().join("late/over"), b"").expect("host");

    for sub in ["early", "late"] {
        let below = hide.lookup(ROOT, sub).expect("lookup").nodeid;
        hide.lookup(below, "under").expect("what lies underneath");
        assert_eq!(hide.lookup(below, "over"), Err(Errno::NOENT));
        hide.create(below, "new", O_RDWR).expect("create");

        let above = merge.lookup(ROOT, sub).expect("lookup");
        let over = merge.lookup(above.nodeid, "over").expect("what is mounted");
        assert_eq!(merge.lookup(above.nodeid, "under"), Err(Errno::NOENT));
        let host = std::fs::metadata(dir.path().join(sub).join("over")).expect("host");
        assert_ne!(over.attr.ino, host.ino(), "folded with its device");
    }
    let ino = |sub| {
        let above = merge.lookup(ROOT, sub).expect("lookup").nodeid;
        merge.lookup(above, "over").expect("lookup").attr.ino
    };
    assert_ne!(ino("early"), ino("late"));
    assert_eq!(ino("early"), ino("early"));
}
