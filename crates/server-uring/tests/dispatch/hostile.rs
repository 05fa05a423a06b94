//! A guest that lies: every hole that we know of, races, and random bytes.

use std::sync::atomic::{AtomicBool, Ordering};

use ringfs_server::dispatch::Request;
use ringfs_server::fs::{Fs, FsOptions};
use ringfs_wire::abi::{self, Opcode};
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

/// Arguments that are valid often enough to get deep, with wrong bits here and there.
fn random_request(random: &mut Lcg, ids: &[u64], handles: &[u64]) -> (u32, u64, Vec<u8>) {
    let one_of = |random: &mut Lcg, all: &[u64]| all[random.below(all.len() as u64) as usize];
    let opcode = match random.below(20) {
        0 => random.below(100) as u32,
        1 => random.next() as u32,
        _ => Opcode::ALL[random.below(Opcode::ALL.len() as u64) as usize] as u32,
    };
    let mut args = Vec::new();
    for _ in 0..random.below(12) {
        match random.below(9) {
            0 => args.extend(random.next().to_le_bytes()),
            1 => args.extend(one_of(random, ids).to_le_bytes()),
            2 | 3 => args.extend(one_of(random, handles).to_le_bytes()),
            4 => args.extend(random.below(64).to_le_bytes()),
            5 => args.extend((random.below(70_000) as u32).to_le_bytes()),
            6 => args.extend([0; 8]),
            7 => args.extend(0_u64.wrapping_sub(random.below(9)).to_le_bytes()),
            _ => args.extend((O_RDWR | 0o600).to_le_bytes()),
        }
    }
    for _ in 0..random.below(3) {
        let names: [&[u8]; 10] =
            [b"a", b"b", b"c", b"dir", b"..", b".", b"../x", b"/", b"", b"user.x"];
        args.extend(names[random.below(10) as usize]);
        args.push(0);
    }
    if random.below(10) == 0 {
        args.truncate(random.below(args.len() as u64 + 1) as usize);
    }
    (opcode, one_of(random, ids), args)
}

/// Runs one request as a session would, and keeps what it gives.
/// True where it succeeded.
fn run(fs: &Fs, request: &Request<'_>, ids: &mut Vec<u64>, handles: &mut Vec<u64>) -> bool {
    drop(fs.route(request));
    let mut out = vec![0; fs.reply_bytes_max(request)];
    assert!(out.len() <= 1 << 20);
    let Ok(used) = fs.execute(request, &mut out) else { return false };
    assert!(used <= out.len());
    let word = |at: usize| out.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    let (first, last) = (word(0).map(u64::from_le_bytes), word(128).map(u64::from_le_bytes));
    match Opcode::from_u32(request.opcode) {
        Some(Opcode::Lookup | Opcode::Mkdir | Opcode::Mknod | Opcode::Symlink | Opcode::Link) => {
            ids.extend(first);
        }
        Some(Opcode::Create | Opcode::Tmpfile) => {
            ids.extend(first);
            handles.extend(last);
        }
        Some(Opcode::Open | Opcode::Opendir) => handles.extend(first),
        _ => {}
    }
    if ids.len() > 40 {
        ids.drain(2..20);
    }
    if handles.len() > 40 {
        handles.drain(1..20);
    }
    true
}

#[test]
fn random_requests_do_no_harm() {
    let outer = tempfile::tempdir().expect("directory");
    let share = outer.path().join("share");
    std::fs::create_dir_all(share.join("dir")).expect("host");
    std::fs::write(outer.path().join("x"), b"untouched").expect("host");
    let options = FsOptions { nodes_max: 300, handles_max: 50, ..FsOptions::default() };
    let guest = Guest::new(&share, options);
    let mut random = Lcg(20_260_712);
    let (mut ids, mut handles) = (vec![ROOT, 0], vec![0]);
    let mut successes = 0;
    for round in 0..200_000 {
        let (opcode, nodeid, args) = random_request(&mut random, &ids, &handles);
        let mut body = guest.body(nodeid, &args, &[]);
        if random.below(50) == 0 {
            let at = random.below(body.len() as u64) as usize;
            body[at] ^= 1 << random.below(8);
        }
        // SYNCFS would flush the machine's disks for nothing.
        if opcode == Opcode::Syncfs as u32 {
            continue;
        }
        if let Some(request) = Request::parse(opcode, &body) {
            successes += u32::from(run(&guest.fs, &request, &mut ids, &mut handles));
        }
        let counts = guest.fs.counts();
        assert!(counts.nodes <= 301 && counts.handles <= 51, "{counts:?}");
        if counts.handles >= 50 {
            close_all(&guest, &ids, &handles);
        }
        if round % 5000 == 0 {
            assert_eq!(std::fs::read(outer.path().join("x")).expect("host"), b"untouched");
        }
    }
    assert!(successes > 10_000, "{successes}: too few get past the checks");
    let left: Vec<_> = std::fs::read_dir(outer.path()).expect("host").flatten().collect();
    assert_eq!(left.len(), 2, "nothing appeared beside the share");
    assert_eq!(std::fs::read(outer.path().join("x")).expect("host"), b"untouched");
    assert_eq!(rustix::process::geteuid(), rustix::process::getuid());
}

fn close_all(guest: &Guest, ids: &[u64], handles: &[u64]) {
    for &fh in handles {
        for &id in ids {
            let _ = guest.release(id, fh);
            let _ = guest.releasedir(id, fh);
        }
    }
}
