//! Listings: whole, in pieces, from the middle, with and without LOOKUPs.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use ringfs_server::fs::FsOptions;
use ringfs_wire::abi::{self, Opcode};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::support::{Guest, Listed, ROOT, share};

/// `count` files, some with names that are no UTF-8 and some of 255 bytes.
fn populated(count: usize) -> (tempfile::TempDir, Guest, HashSet<Vec<u8>>) {
    populate(tempfile::tempdir().expect("directory"), count)
}

fn populate(dir: tempfile::TempDir, count: usize) -> (tempfile::TempDir, Guest, HashSet<Vec<u8>>) {
    let guest = Guest::new(dir.path(), FsOptions::default());
    let mut names = HashSet::new();
    for index in 0..count {
        let name = match index % 100 {
            7 => [&b"\xff\xfe bytes "[..], index.to_string().as_bytes()].concat(),
            8 => format!("{index:0>255}").into_bytes(),
            _ => format!("file-{index}").into_bytes(),
        };
        std::fs::write(dir.path().join(OsStr::from_bytes(&name)), b"").expect("host");
        names.insert(name);
    }
    (dir, guest, names)
}

fn names_of(listing: &[Listed]) -> HashSet<Vec<u8>> {
    let names: HashSet<_> = listing.iter().map(|entry| entry.name.clone()).collect();
    assert_eq!(names.len(), listing.len(), "no entry twice");
    names
}

#[test]
fn ten_thousand_entries_with_small_buffers() {
    let (_dir, guest, mut names) = populated(10_000);
    names.extend([b".".to_vec(), b"..".to_vec()]);
    let before = guest.fs.counts();
    for size in [300, 4096, 1 << 20] {
        let listing = guest.list(ROOT, Opcode::Readdir, size);
        assert_eq!(names_of(&listing), names, "{size}");
        assert!(listing.iter().all(|entry| entry.type_ == 4 || entry.type_ == 8));
    }
    assert_eq!(guest.fs.counts(), before, "plain listings give no counts");
}

#[test]
fn a_hundred_thousand_entries() {
    // In memory, where it can be: making them is what takes long.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let (_dir, guest, mut names) = populate(dir.expect("directory"), 100_000);
    names.extend([b".".to_vec(), b"..".to_vec()]);
    assert_eq!(names_of(&guest.list(ROOT, Opcode::Readdir, 64 << 10)), names);
}

#[test]
fn plus_gives_counts_that_come_back() {
    let (_dir, guest, mut names) = populated(10_000);
    names.extend([b".".to_vec(), b"..".to_vec()]);
    let before = guest.fs.counts();
    for size in [512, 4096, 1 << 20] {
        let listing = guest.list(ROOT, Opcode::Readdirplus, size);
        assert_eq!(names_of(&listing), names, "{size}");
        let given: Vec<_> = listing.iter().filter(|entry| entry.nodeid != 0).collect();
        assert_eq!(given.len(), 10_000);
        assert_eq!(guest.fs.counts().nodes, before.nodes + 10_000);
        guest.fs.forget(given.iter().map(|entry| (entry.nodeid, 1)));
        assert_eq!(guest.fs.counts(), before, "{size}");
    }
}

#[test]
fn plus_is_clamped() {
    let (_dir, guest, _) = populated(2000);
    let fh = guest.opendir(ROOT).expect("opendir").fh;
    let read = abi::ReadIn { fh, size: 1 << 20, ..Default::default() };
    assert_eq!(guest.route(Opcode::Readdirplus, ROOT, read.as_bytes()), "pool");
    assert_eq!(guest.route(Opcode::Readdir, ROOT, read.as_bytes()), "pool");
    let usual = abi::ReadIn { fh, size: 64 << 10, ..Default::default() };
    assert_eq!(guest.route(Opcode::Readdir, ROOT, usual.as_bytes()), "inline");
    let reply = guest.ask(Opcode::Readdirplus, ROOT, read.as_bytes()).expect("readdirplus");
    assert!(reply.len() <= 64 << 10 && reply.len() > 60 << 10);
}

#[test]
fn offsets_lead_back_to_their_place() {
    let (_dir, guest, _) = populated(500);
    let whole = guest.list(ROOT, Opcode::Readdir, 1 << 20);
    let fh = guest.opendir(ROOT).expect("opendir").fh;
    for index in [400, 3, 250, 0, 498, 499] {
        let from = whole[index].next;
        let part = guest.readdir(Opcode::Readdir, (ROOT, fh), from, 2000).expect("readdir");
        assert_eq!(part.first(), whole.get(index + 1), "{index}");
        let again = guest.readdir(Opcode::Readdir, (ROOT, fh), from, 2000).expect("readdir");
        assert_eq!(part, again);
    }
    let rewound = guest.readdir(Opcode::Readdir, (ROOT, fh), 0, 1 << 20).expect("readdir");
    assert_eq!(rewound, whole);
    let wrong = guest.readdir(Opcode::Readdir, (ROOT, fh), u64::MAX, 4096);
    assert_eq!(wrong, Err(Errno::INVAL));
    let small = guest.readdir(Opcode::Readdir, (ROOT, fh), 0, 8);
    assert_eq!(small, Err(Errno::INVAL), "an empty reply would mean the end");
}

#[test]
fn readers_of_one_handle_do_not_disturb_each_other() {
    let (_dir, guest, mut names) = populated(2000);
    names.extend([b".".to_vec(), b"..".to_vec()]);
    let fh = guest.opendir(ROOT).expect("opendir").fh;
    std::thread::scope(|scope| {
        for size in [300, 700, 2000, 5000] {
            let (guest, names) = (&guest, &names);
            scope.spawn(move || {
                let mut all: Vec<Listed> = Vec::new();
                loop {
                    let offset = all.last().map_or(0, |entry| entry.next);
                    let part = guest.readdir(Opcode::Readdir, (ROOT, fh), offset, size);
                    let part = part.expect("readdir");
                    if part.is_empty() {
                        break;
                    }
                    all.extend(part);
                }
                assert_eq!(&names_of(&all), names);
            });
        }
    });
}

#[test]
fn the_roots_parent_is_not_shown() {
    let (_dir, guest) = share();
    let root = guest.getattr(ROOT).expect("getattr").ino;
    let sub = guest.mkdir(ROOT, "sub").expect("mkdir");
    let listing = guest.list(ROOT, Opcode::Readdir, 4096);
    let ino = |listing: &[Listed], name: &[u8]| {
        listing.iter().find(|entry| entry.name == name).map(|entry| entry.ino)
    };
    assert_eq!(ino(&listing, b".."), Some(root));
    assert_eq!(ino(&listing, b"."), Some(root));
    assert_eq!(ino(&listing, b"sub"), Some(sub.attr.ino));
    let below = guest.list(sub.nodeid, Opcode::Readdir, 4096);
    assert_eq!(ino(&below, b".."), Some(root));
}

#[test]
fn a_removed_directory_lists_empty_and_syncs() {
    let (dir, guest) = share();
    let sub = guest.mkdir(ROOT, "sub").expect("mkdir").nodeid;
    let fh = guest.opendir(sub).expect("opendir").fh;
    let fsync = abi::FsyncIn { fh, ..Default::default() };
    guest.ask(Opcode::Fsyncdir, sub, fsync.as_bytes()).expect("fsyncdir");
    std::fs::remove_dir(dir.path().join("sub")).expect("host");
    let listing = guest.readdir(Opcode::Readdir, (sub, fh), 0, 4096).unwrap_or_default();
    assert!(listing.iter().all(|entry| entry.name == b"." || entry.name == b".."));
    assert_eq!(guest.mkdir(sub, "below"), Err(Errno::NOENT));
    assert_eq!(guest.release(sub, fh), Err(Errno::BADF), "a directory's handle");
    guest.releasedir(sub, fh).expect("releasedir");
}
