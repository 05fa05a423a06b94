//! A guest that lies: every hole that we know of, races, and random bytes.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};

use ringfs_server::dispatch::Request;
use ringfs_server::fs::FsOptions;
use ringfs_wire::abi::{self, Opcode, fattr};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::support::{Guest, Lcg, O_RDWR, ROOT, fds_on, named, share, share_with};

#[test]
fn names_stay_in_their_directory() {
    let (dir, guest) = share();
    guest.mkdir(ROOT, "dir").expect("mkdir");
    guest.create(ROOT, "file", O_RDWR).expect("create");
    let long = "x".repeat(256);
    let names: [(&[u8], Errno); 8] = [
        (b"", Errno::INVAL),
        (b".", Errno::INVAL),
        (b"..", Errno::INVAL),
        (b"../file", Errno::INVAL),
        (b"a/b", Errno::INVAL),
        (b"/etc", Errno::INVAL),
        (b"fi\0le", Errno::INVAL),
        (long.as_bytes(), Errno::NAMETOOLONG),
    ];
    let heads: [(Opcode, &[u8]); 10] = [
        (Opcode::Lookup, &[]),
        (Opcode::Unlink, &[]),
        (Opcode::Rmdir, &[]),
        (Opcode::Mkdir, &[0; 8]),
        (Opcode::Mknod, &[0; 16]),
        (Opcode::Create, &[0; 16]),
        (Opcode::Link, &[1, 0, 0, 0, 0, 0, 0, 0]),
        (Opcode::Rename, &[1, 0, 0, 0, 0, 0, 0, 0]),
        (Opcode::Rename2, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (Opcode::Symlink, &[]),
    ];
    for (name, errno) in names {
        for (opcode, head) in heads {
            let mut args = named(head, name);
            if matches!(opcode, Opcode::Rename | Opcode::Rename2 | Opcode::Symlink) {
                args.extend(b"other\0");
            }
            assert_eq!(guest.ask(opcode, ROOT, &args), Err(errno), "{opcode:?} {name:?}");
            if matches!(opcode, Opcode::Rename | Opcode::Rename2) {
                let args = named(&named(head, b"file"), name);
                assert_eq!(guest.ask(opcode, ROOT, &args), Err(errno), "{opcode:?} to {name:?}");
            }
            // No NUL at the end.
            let open_end = [head, b"file"].concat();
            assert_eq!(guest.ask(opcode, ROOT, &open_end), Err(Errno::INVAL), "{opcode:?}");
        }
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).expect("host").flatten().collect();
    assert_eq!(left.len(), 2);
    // 255 bytes are a name.
    guest.mkdir(ROOT, &"y".repeat(255)).expect("mkdir");
}

#[test]
fn a_directory_moved_out_of_the_share_leads_nowhere() {
    let outer = tempfile::tempdir().expect("directory");
    let share = outer.path().join("share");
    std::fs::create_dir_all(share.join("in")).expect("host");
    std::fs::write(outer.path().join("secret"), b"").expect("host");
    let guest = Guest::new(&share, FsOptions::default());
    let id = guest.lookup(ROOT, "in").expect("lookup").nodeid;
    std::fs::rename(share.join("in"), outer.path().join("out")).expect("host");
    assert_eq!(guest.lookup(id, ".."), Err(Errno::INVAL));
    assert_eq!(guest.lookup(ROOT, ".."), Err(Errno::INVAL));
    assert_eq!(guest.lookup(ROOT, "secret"), Err(Errno::NOENT));
}

#[test]
fn a_link_is_never_followed_on_the_host() {
    let outer = tempfile::tempdir().expect("directory");
    let share = outer.path().join("share");
    std::fs::create_dir(&share).expect("host");
    let secret = outer.path().join("secret");
    std::fs::write(&secret, b"secret").expect("host");
    std::os::unix::fs::symlink(&secret, share.join("link")).expect("host");
    std::os::unix::fs::symlink(outer.path(), share.join("up")).expect("host");
    let before = std::fs::metadata(&secret).expect("host");
    let guest = Guest::new(&share, FsOptions::default());
    let link = guest.lookup(ROOT, "link").expect("lookup").nodeid;
    let up = guest.lookup(ROOT, "up").expect("lookup").nodeid;
    for bits in [fattr::MODE, fattr::SIZE, fattr::UID, fattr::GID, fattr::ATIME | fattr::MTIME] {
        let set = abi::SetattrIn { valid: bits, mode: 0o777, uid: 9, gid: 9, ..Default::default() };
        let _ = guest.setattr(link, set);
    }
    for name in [&b"user.x"[..], b"trusted.x", b"security.x"] {
        let _ = guest.setxattr(link, name, b"x");
        assert!(guest.getxattr(link, b"user.x", 100).is_err());
    }
    assert_eq!(guest.open(link, O_RDWR), Err(Errno::LOOP));
    assert_eq!(guest.opendir(up), Err(Errno::NOTDIR));
    assert_eq!(guest.lookup(up, "secret"), Err(Errno::NOTDIR));
    assert_eq!(guest.create(up, "new", O_RDWR), Err(Errno::NOTDIR));
    assert_eq!(guest.create(ROOT, "link", O_RDWR), Err(Errno::LOOP));
    assert_eq!(guest.link(link, ROOT, "twin").expect("link").nodeid, link, "the link itself");
    let after = std::fs::metadata(&secret).expect("host");
    assert_eq!((after.mode(), after.uid(), after.len()), (before.mode(), before.uid(), 6));
    let times = |meta: &std::fs::Metadata| (meta.ctime(), meta.ctime_nsec(), meta.nlink());
    assert_eq!(times(&after), times(&before), "no attribute of any kind was set");
    assert_eq!(std::fs::read_dir(outer.path()).expect("host").count(), 2);
}

#[test]
fn flags_pass_a_list() {
    let (_dir, guest) = share();
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).expect("create");
    let id = entry.nodeid;
    for flag in [libc::O_PATH, libc::O_TMPFILE, libc::O_ACCMODE] {
        assert_eq!(guest.open(id, flag as u32), Err(Errno::INVAL), "{flag:o}");
        assert_eq!(guest.create(ROOT, "x", flag as u32), Err(Errno::INVAL), "{flag:o}");
    }
    for flag in [libc::O_CREAT, libc::O_EXCL, libc::O_NOCTTY, libc::O_NOATIME, libc::O_NONBLOCK] {
        let open = guest.open(id, O_RDWR | flag as u32).expect("left out");
        guest.release(id, open.fh).expect("release");
    }
    // O_TRUNC in CREATE of an existing file is honoured, in READ and WRITE nothing is.
    guest.write(id, fh, 0, b"text").expect("write");
    let read = abi::ReadIn { fh, size: 9, flags: u32::MAX, ..Default::default() };
    assert_eq!(guest.ask(Opcode::Read, id, read.as_bytes()).expect("read"), b"text");
    let write = abi::WriteIn { fh, size: 1, flags: libc::O_APPEND as u32, ..Default::default() };
    guest.ask(Opcode::Write, id, &[write.as_bytes(), b"T"].concat()).expect("write");
    assert_eq!(guest.read(id, fh, 0, 9).expect("read"), b"Text");
    for flags in [libc::RENAME_WHITEOUT, 8, u32::MAX] {
        assert_eq!(guest.rename((ROOT, "file"), (ROOT, "x"), flags), Err(Errno::INVAL));
    }
    guest.create(ROOT, "other", O_RDWR).expect("create");
    let renamed = guest.rename((ROOT, "file"), (ROOT, "other"), libc::RENAME_NOREPLACE);
    assert_eq!(renamed, Err(Errno::EXIST));
    guest.rename((ROOT, "file"), (ROOT, "other"), libc::RENAME_EXCHANGE).expect("exchange");
    assert_eq!(guest.lookup(ROOT, "other").expect("lookup").nodeid, id);
}

#[test]
fn handles_and_nodes_of_others_are_refused() {
    let (_dir, guest) = share();
    let before = guest.fs.counts();
    let (a, fh) = guest.create(ROOT, "a", O_RDWR).expect("create");
    let (b, _) = guest.create(ROOT, "b", O_RDWR).expect("create");
    for (id, fh) in [(b.nodeid, fh), (ROOT, fh), (a.nodeid, 0), (a.nodeid, u64::MAX)] {
        assert_eq!(guest.read(id, fh, 0, 1), Err(Errno::BADF));
        assert_eq!(guest.write(id, fh, 0, b"x"), Err(Errno::BADF));
        assert_eq!(guest.release(id, fh), Err(Errno::BADF));
        assert_eq!(guest.releasedir(id, fh), Err(Errno::BADF));
        let refused = guest.readdir(Opcode::Readdir, (id, fh), 0, 4096);
        assert_eq!(refused, Err(Errno::BADF));
    }
    let body = guest.body(a.nodeid, &[], &[]);
    let unknown = Request::parse(7, &body).expect("whole");
    assert_eq!(guest.fs.execute(&unknown, &mut []), Err(Errno::NOSYS));
    let unknown = Request::parse(u32::MAX, &body).expect("whole");
    assert_eq!(guest.fs.execute(&unknown, &mut []), Err(Errno::NOSYS));
    assert!(Request::parse(3, &body[..23]).is_none());
    for id in [0, 2, 12345, u64::MAX] {
        assert_eq!(guest.getattr(id), Err(Errno::STALE));
        assert_eq!(guest.lookup(id, "a"), Err(Errno::STALE));
        guest.forget(id, 1);
    }
    guest.forget(ROOT, u64::MAX);
    guest.getattr(ROOT).expect("the root stays");
    guest.forget(a.nodeid, u64::MAX);
    guest.forget(a.nodeid, 1);
    let after = guest.fs.counts();
    assert_eq!((after.nodes, after.overdrawn), (before.nodes + 1, 6));
    // A file that is still open lives without its node.
    assert_eq!(guest.read(a.nodeid, fh, 0, 1).expect("read"), b"");
}

#[test]
fn a_session_has_bounds() {
    let options = FsOptions { nodes_max: 3, handles_max: 2, ..FsOptions::default() };
    let (dir, guest) = share_with(options);
    for name in ["a", "b", "c"] {
        std::fs::write(dir.path().join(name), b"").expect("host");
    }
    let a = guest.lookup(ROOT, "a").expect("lookup").nodeid;
    let b = guest.lookup(ROOT, "b").expect("lookup").nodeid;
    assert_eq!(guest.lookup(ROOT, "c"), Err(Errno::NFILE));
    assert_eq!(guest.lookup(ROOT, "a").expect("known").nodeid, a);
    assert_eq!(guest.mkdir(ROOT, "d"), Err(Errno::NFILE));
    assert!(!dir.path().join("d").exists(), "refused before it was made");
    guest.open(a, O_RDWR).expect("open");
    guest.opendir(ROOT).expect("opendir");
    assert_eq!(guest.open(b, O_RDWR), Err(Errno::NFILE));
    assert_eq!(guest.opendir(ROOT), Err(Errno::NFILE));
    guest.forget(b, 1);
    guest.lookup(ROOT, "c").expect("room again");
    let body = guest.body(a, &[0; 16], &[]);
    let getattr = Request::parse(Opcode::Getattr as u32, &body).expect("whole");
    assert_eq!(guest.fs.execute(&getattr, &mut [0; 8]), Err(Errno::OVERFLOW));
}

#[test]
fn lookups_race_forgets() {
    let (dir, guest) = share();
    for name in 0..4 {
        std::fs::write(dir.path().join(name.to_string()), b"").expect("host");
    }
    std::fs::hard_link(dir.path().join("0"), dir.path().join("link")).expect("host");
    let before = guest.fs.counts();
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let guest = &guest;
            scope.spawn(move || {
                let mut random = Lcg(seed);
                let mut held: Vec<u64> = Vec::new();
                for _ in 0..20_000 {
                    let name = random.below(5);
                    let name = if name == 4 { "link".into() } else { name.to_string() };
                    let entry = guest.lookup(ROOT, &name).expect("lookup");
                    // Ours at least until we give it back.
                    guest.getattr(entry.nodeid).expect("getattr");
                    held.push(entry.nodeid);
                    if random.below(2) == 0 {
                        guest.fs.forget(held.drain(..).map(|id| (id, 1)));
                    }
                }
                guest.fs.forget(held.drain(..).map(|id| (id, 1)));
            });
        }
    });
    assert_eq!(guest.fs.counts(), before);
    for name in 0..4 {
        let path = dir.path().join(name.to_string());
        assert_eq!(fds_on(&path), 0, "the crate was given all its counts back");
        let node = guest.lookup(ROOT, &name.to_string()).expect("lookup").nodeid;
        assert_eq!(fds_on(&path), 1);
        guest.forget(node, 1);
    }
}

#[test]
fn large_deleted_files_are_freed_with_their_node() {
    let (dir, guest) = share();
    let (entry, fh) = guest.create(ROOT, "large", O_RDWR).expect("create");
    let (small, _) = guest.create(ROOT, "small", O_RDWR).expect("create");
    let ask = abi::FallocateIn { fh, length: 64 << 20, ..Default::default() };
    guest.ask(Opcode::Fallocate, entry.nodeid, ask.as_bytes()).expect("fallocate");
    guest.unlink(ROOT, "large").expect("unlink");
    guest.unlink(ROOT, "small").expect("unlink");
    guest.release(entry.nodeid, fh).expect("release");
    let both = [(small.nodeid, 1), (entry.nodeid, 1)];
    let mut released = guest.fs.forget_later(both.into_iter());
    let dear = released.take_dear(64 << 10);
    assert_eq!((released.len(), dear.len()), (1, 1));
    assert_eq!((released.take_dear(0).len(), released.len()), (1, 0));
    drop((released, dear));
    assert!(guest.fs.forget_later([(entry.nodeid, 1)].into_iter()).is_empty());
    assert_eq!(std::fs::read_dir(dir.path()).expect("host").count(), 0);
}

#[test]
fn one_name_for_an_unnamed_file_races_lookups() {
    let (_dir, guest) = share();
    let before = guest.fs.counts();
    for round in 0..200 {
        let head = abi::CreateIn { flags: O_RDWR, mode: 0o600, umask: 0, open_flags: 0 };
        let reply = guest.ask(Opcode::Tmpfile, ROOT, &named(head.as_bytes(), b"/"));
        let (entry, fh) = crate::support::split_created(&reply.expect("tmpfile"));
        let (name, done) = (format!("name-{round}"), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    if let Ok(seen) = guest.lookup(ROOT, &name) {
                        guest.forget(seen.nodeid, 1);
                    }
                }
            });
            let linked = guest.link(entry.nodeid, ROOT, &name).expect("link");
            guest.forget(linked.nodeid, 1);
            done.store(true, Ordering::Relaxed);
        });
        guest.release(entry.nodeid, fh).expect("release");
        guest.forget(entry.nodeid, 1);
    }
    assert_eq!(guest.fs.counts(), before);
}
