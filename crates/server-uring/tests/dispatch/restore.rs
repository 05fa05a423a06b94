//! A session that another daemon had: what the guest remembers of it is enough to go on.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringfs_server::dispatch::Request;
use ringfs_server::fds::Fds;
use ringfs_server::fs::{CacheMode, FsOptions};
use ringfs_server::import::{HandleKind, Recipe};
use ringfs_server::notes::Notes;
use ringfs_server::restore::Restoring;
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::restore::{End, Nodes, Restore, push_restore};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::restore_hostile::forged;
use crate::support::{Guest, Lcg, Memory, Mounted, O_RDWR, ROOT, is_root, named};

const O_CREAT: u32 = libc::O_CREAT as u32;
const O_TRUNC: u32 = libc::O_TRUNC as u32;
const O_APPEND: u32 = libc::O_APPEND as u32;

pub(crate) fn options() -> FsOptions {
    FsOptions { recipes: true, ..FsOptions::default() }
}

/// The same on a tmpfs, on an ext4, and where the temporary directory lies.
pub(crate) fn on_each(test: impl Fn(&Path)) {
    let dir = tempfile::tempdir().expect("directory");
    let make = |name: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir(&path).expect("directory");
        path
    };
    test(&make("plain"));
    if is_root() {
        let tmpfs = Mounted::tmpfs(make("tmpfs"));
        test(&tmpfs.0);
    }
    if let Some(ext4) = Mounted::ext4(&dir.path().join("image"), make("ext4")) {
        test(&ext4.0);
    }
}

/// An open file, as the guest knows it.
#[derive(Clone, Copy)]
pub(crate) struct Open {
    pub fh: u64,
    pub node: u64,
    pub flags: u32,
    pub directory: bool,
}

impl Open {
    fn entry(&self) -> Restore<'static> {
        let Open { fh, node, flags, directory } = *self;
        Restore::Handle { fh, node, flags, directory }
    }
}

/// RESTORE bodies for all of a memory.
pub(crate) fn bodies(memory: &Memory, open: &[Open]) -> Vec<Vec<u8>> {
    let mut all = vec![Vec::new()];
    let mut push = |entry: &Restore<'_>| {
        let last = all.last_mut().expect("one");
        if !push_restore(last, entry) {
            let mut next = Vec::new();
            assert!(push_restore(&mut next, entry));
            all.push(next);
        }
    };
    for (&id, &count) in &memory.counts {
        let recipe = memory.recipes.get(&id).map_or(&[][..], Vec::as_slice);
        push(&Restore::Node { id, count, recipe });
    }
    open.iter().for_each(|open| push(&open.entry()));
    push(&Restore::End(End {
        nodes: memory.counts.len() as u64,
        handles: open.len() as u64,
        node_id_max: memory.counts.keys().copied().max().unwrap_or(0),
        fh_max: open.iter().map(|open| open.fh).max().unwrap_or(0),
    }));
    all
}

/// Another daemon, with what the guest remembers.
pub(crate) fn taken_over(root: &Path, options: FsOptions, memory: &Memory, open: &[Open]) -> Guest {
    let guest = Guest::uninitialised(root, options.clone());
    let before = Guest::uninitialised(root, options).init();
    assert_eq!(guest.fs.serve_init(&before), Ok(()));
    let mut restoring = Restoring::default();
    let bodies = bodies(memory, open);
    for (i, body) in bodies.iter().enumerate() {
        assert_eq!(restoring.record(&guest.fs, body), Ok(i + 1 == bodies.len()));
    }
    *guest.memory.lock().expect("memory") = memory.clone();
    guest
}

/// The daemon ends, the next one takes over.
fn restart(guest: Guest, root: &Path, options: FsOptions, open: &[Open]) -> Guest {
    let memory = guest.memory.lock().expect("memory").clone();
    drop(guest);
    taken_over(root, options, &memory, open)
}

pub(crate) fn ino(path: &Path) -> u64 {
    std::fs::symlink_metadata(path).expect("host").ino()
}

pub(crate) fn result<T>(result: Result<T, Errno>) -> Result<(), Errno> {
    result.map(|_| ())
}

#[test]
fn nodes_and_handles_go_on() {
    on_each(|root| {
        let fds = Fds::new(4096);
        let options = FsOptions { fds: Arc::clone(&fds), ..options() };
        let guest = Guest::new(root, options.clone());
        let a = guest.mkdir(ROOT, "a").expect("mkdir").nodeid;
        let b = guest.mkdir(a, "b").expect("mkdir").nodeid;
        let flags = O_RDWR | O_CREAT | O_TRUNC;
        let (file, fh) = guest.create(b, "file", flags).expect("create");
        guest.write(file.nodeid, fh, 0, b"0123456789").expect("write");
        let append = guest.open(file.nodeid, O_RDWR | O_APPEND).expect("open").fh;
        assert_eq!(guest.link(file.nodeid, a, "link").expect("link").nodeid, file.nodeid);
        let args = [b"sym\0".as_slice(), b"target\0"].concat();
        let sym: abi::EntryOut = guest.ask_one(Opcode::Symlink, a, &args).expect("symlink");
        let fifo = abi::MknodIn { mode: libc::S_IFIFO | 0o600, rdev: 0, umask: 0, padding: 0 };
        let fifo: abi::EntryOut =
            guest.ask_one(Opcode::Mknod, a, &named(fifo.as_bytes(), b"fifo")).expect("mknod");
        // A listing that goes on after the restart.
        for i in 0..300 {
            std::fs::write(root.join("a/b").join(format!("entry{i}")), "").expect("file");
        }
        let dir = guest.opendir(b).expect("opendir").fh;
        let first = guest.readdir(Opcode::Readdir, (b, dir), 0, 4096).expect("readdir");
        let next = first.last().expect("entries").next;

        let open = [
            Open { fh, node: file.nodeid, flags, directory: false },
            Open { fh: append, node: file.nodeid, flags: O_RDWR | O_APPEND, directory: false },
            Open { fh: dir, node: b, flags: 0, directory: true },
        ];
        let guest = restart(guest, root, options, &open);
        let counts = guest.fs.counts();
        assert_eq!((counts.nodes, counts.nodes_with_fd, counts.handles), (6, 1, 3));
        assert_eq!(fds.used(), 1, "nothing is opened before it is used");
        let read = abi::ReadIn { fh, size: 4, ..Default::default() };
        assert_eq!(guest.route(Opcode::Read, file.nodeid, read.as_bytes()), "pool");
        assert_eq!(guest.read(file.nodeid, fh, 5, 4).expect("read"), b"5678");
        assert_eq!(guest.route(Opcode::Read, file.nodeid, read.as_bytes()), "read 0+4");
        assert_eq!(guest.write(file.nodeid, fh, 2, b"xx"), Ok(2));
        assert_eq!(guest.write(file.nodeid, append, 0, b"end"), Ok(3));
        let content = std::fs::read(root.join("a/b/file")).expect("host");
        assert_eq!(content, b"01xx456789end", "not cut off, and appended");

        let mut all = first;
        let mut offset = next;
        loop {
            let part = guest.readdir(Opcode::Readdir, (b, dir), offset, 4096).expect("readdir");
            let Some(last) = part.last() else { break };
            offset = last.next;
            all.extend(part);
        }
        let mut names: Vec<_> = all.iter().map(|entry| entry.name.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!((all.len(), names.len()), (303, 303), "each entry once");

        for (node, path) in [(a, "a"), (b, "a/b"), (sym.nodeid, "a/sym"), (fifo.nodeid, "a/fifo")] {
            assert_eq!(guest.getattr(node).expect(path).ino, ino(&root.join(path)));
        }
        assert_eq!(guest.ask(Opcode::Readlink, sym.nodeid, &[]).expect("readlink"), b"target");
        // Each name leads to the id that the guest knows.
        assert_eq!(guest.lookup(a, "link").expect("lookup").nodeid, file.nodeid);
        assert_eq!(guest.lookup(ROOT, "a").expect("lookup").nodeid, a);
        let new = guest.lookup(b, "entry7").expect("lookup").nodeid;
        assert!([a, b, file.nodeid, sym.nodeid, fifo.nodeid].iter().all(|&id| new > id));
        assert!(guest.opendir(b).expect("opendir").fh > dir);

        guest.release(file.nodeid, fh).expect("release");
        guest.release(file.nodeid, append).expect("release");
        guest.releasedir(b, dir).expect("releasedir");
        let memory = guest.memory.lock().expect("memory").counts.clone();
        memory.into_iter().for_each(|(id, count)| guest.forget(id, count));
        let counts = guest.fs.counts();
        assert_eq!((counts.nodes, counts.handles, counts.overdrawn), (1, 1, 0));
        drop(guest);
        assert_eq!(fds.used(), 0);
    });
}

#[test]
fn what_the_guest_renamed_is_found_by_its_last_name() {
    on_each(|root| {
        let guest = Guest::new(root, options());
        let dir = guest.mkdir(ROOT, "dir").expect("mkdir").nodeid;
        let deep = guest.mkdir(dir, "deep").expect("mkdir").nodeid;
        let other = guest.mkdir(ROOT, "other").expect("mkdir").nodeid;
        let [one, two, kept] = ["one", "two", "kept"].map(|name| {
            let (entry, fh) = guest.create(deep, name, O_RDWR).expect("create");
            guest.release(entry.nodeid, fh).expect("release");
            (entry.nodeid, entry.attr.ino)
        });
        guest.rename((deep, "one"), (other, "uno"), 0).expect("rename");
        guest.rename((deep, "two"), (other, "uno"), libc::RENAME_EXCHANGE).expect("exchange");
        guest.rename((ROOT, "dir"), (other, "moved"), 0).expect("rename of a directory");
        guest.link(kept.0, other, "kept2").expect("link");
        guest.unlink(deep, "kept").expect("unlink");
        let guest = restart(guest, root, options(), &[]);
        for (node, number) in [one, two, kept] {
            assert_eq!(guest.getattr(node).expect("found").ino, number);
        }
        assert_eq!(guest.lookup(deep, "two").expect("lookup").nodeid, one.0);
        assert_eq!(guest.lookup(other, "uno").expect("lookup").nodeid, two.0);
        // And again, by what the second daemon has said.
        guest.rename((other, "moved"), (ROOT, "back"), 0).expect("rename");
        guest.rename((other, "kept2"), (deep, "kept3"), 0).expect("rename");
        let guest = restart(guest, root, options(), &[]);
        for (node, number) in [one, two, kept] {
            assert_eq!(guest.getattr(node).expect("found").ino, number);
        }
    });
}

#[test]
fn a_file_is_found_by_the_name_that_is_left_where_nothing_is_cached() {
    let dir = tempfile::tempdir().expect("directory");
    let (image, root) = (dir.path().join("image"), dir.path().join("ext4"));
    std::fs::create_dir(&root).expect("directory");
    let Some(ext4) = Mounted::ext4(&image, root.clone()) else { return };
    std::fs::write(root.join("probe"), "").expect("file");
    let opened = std::fs::File::open(&root).expect("open");
    let probe = Recipe::of(opened.as_fd(), c"probe", ROOT).expect("recipe").handle;
    drop(opened);
    if probe.is_none_or(|handle| handle.kind() != HandleKind::Connectable) {
        println!("SKIPPED: the kernel has no handles that lead to a name");
        return;
    }
    let guest = Guest::new(&root, options());
    let [one, two] = ["one", "two"].map(|name| guest.mkdir(ROOT, name).expect("mkdir").nodeid);
    let create = |name| guest.create(one, name, O_RDWR).expect("create");
    let (newest_gone, oldest_gone, renamed) = (create("a"), create("b"), create("c"));
    guest.link(newest_gone.0.nodeid, two, "a").expect("link");
    guest.unlink(two, "a").expect("unlink");
    guest.link(oldest_gone.0.nodeid, two, "b").expect("link");
    guest.lookup(one, "b").expect("lookup");
    guest.unlink(one, "b").expect("unlink");
    guest.link(renamed.0.nodeid, two, "c").expect("link");
    guest.rename((two, "c"), (two, "c2"), 0).expect("rename");
    guest.unlink(two, "c2").expect("unlink");
    let files = [newest_gone, oldest_gone, renamed];
    let open =
        files.map(|(entry, fh)| Open { fh, node: entry.nodeid, flags: O_RDWR, directory: false });
    let mut guest = guest;
    // The guest may have forgotten the directory.
    guest.forget(two, 1);
    for n in 0..3 {
        let memory = guest.memory.lock().expect("memory").clone();
        drop(guest);
        ext4.mount_again(&image);
        guest = taken_over(&root, options(), &memory, &open);
        for (entry, fh) in files {
            assert_eq!(guest.getattr(entry.nodeid).expect("found").ino, entry.attr.ino);
            assert_eq!(guest.write(entry.nodeid, fh, n, b"x"), Ok(1));
        }
        // And by what this daemon says of a file that was found so.
        let two = guest.lookup(ROOT, "two").expect("lookup").nodeid;
        assert_eq!(guest.lookup(two, "b").expect("lookup").nodeid, oldest_gone.0.nodeid);
        guest.link(oldest_gone.0.nodeid, one, "b").expect("link");
        guest.unlink(one, "b").expect("unlink");
    }
    assert_eq!(std::fs::read(root.join("two/b")).expect("host"), b"xxx");
    drop(guest);
}

#[test]
fn a_file_is_found_whose_known_names_are_all_gone() {
    let dir = tempfile::tempdir().expect("directory");
    let (image, ext4) = (dir.path().join("image"), dir.path().join("ext4"));
    std::fs::create_dir(&ext4).expect("directory");
    let Some(mounted) = Mounted::ext4(&image, ext4.clone()) else { return };
    let root = ext4.join("share");
    std::fs::create_dir(&root).expect("directory");
    let guest = Guest::new(&root, options());
    let [one, two] = ["one", "two"].map(|name| guest.mkdir(ROOT, name).expect("mkdir").nodeid);
    let create = |name| guest.create(one, name, O_RDWR).expect("create");
    // The last name is in a directory that the guest forgets.
    let forgotten = create("a");
    guest.link(forgotten.0.nodeid, two, "a").expect("link");
    guest.unlink(one, "a").expect("unlink");
    // The first one of three is left.
    let third = create("b");
    guest.link(third.0.nodeid, two, "b").expect("link");
    guest.link(third.0.nodeid, one, "b3").expect("link");
    guest.unlink(one, "b3").expect("unlink");
    guest.unlink(two, "b").expect("unlink");
    // The host has moved it.
    let moved = create("c");
    std::fs::rename(root.join("one/c"), root.join("two/c2")).expect("rename");
    // It is there still, and not in the share.
    let outside = create("d");
    std::fs::hard_link(root.join("one/d"), ext4.join("d")).expect("link");
    guest.unlink(one, "d").expect("unlink");
    let files = [forgotten, third, moved, outside];
    let open =
        files.map(|(entry, fh)| Open { fh, node: entry.nodeid, flags: O_RDWR, directory: false });
    guest.forget(two, 1);
    let memory = guest.memory.lock().expect("memory").clone();
    drop(guest);
    mounted.mount_again(&image);
    let guest = taken_over(&root, options(), &memory, &open);
    let [found @ .., (lost, _)] = files;
    for (entry, fh) in found {
        assert_eq!(guest.getattr(entry.nodeid).expect("found").ino, entry.attr.ino);
        assert_eq!(guest.write(entry.nodeid, fh, 0, b"x"), Ok(1));
    }
    for _ in 0..100 {
        assert_eq!(guest.getattr(lost.nodeid).map(drop), Err(Errno::STALE));
    }
    for name in ["two/a", "one/b", "two/c2"] {
        assert_eq!(std::fs::read(root.join(name)).expect("host"), b"x", "{name}");
    }
    drop(guest);
}

#[test]
fn another_file_never_takes_the_place() {
    on_each(|root| {
        let guest = Guest::new(root, options());
        let path = |name: &str| root.join(name);
        let names = ["gone", "again", "swapped", "kind", "moved"];
        let nodes = names.map(|name| {
            let (entry, fh) = guest.create(ROOT, name, O_RDWR).expect("create");
            (entry.nodeid, fh)
        });
        let moved_ino = ino(&path("moved"));
        let open: Vec<Open> = nodes
            .iter()
            .map(|&(node, fh)| Open { fh, node, flags: O_RDWR, directory: false })
            .collect();
        let memory = guest.memory.lock().expect("memory").clone();
        drop(guest);
        std::fs::remove_file(path("gone")).expect("remove");
        // Most file systems use the inode number again at once.
        std::fs::remove_file(path("again")).expect("remove");
        std::fs::write(path("again"), "new").expect("write");
        std::fs::write(path("x"), "new").expect("write");
        std::fs::rename(path("x"), path("swapped")).expect("rename");
        std::fs::remove_file(path("kind")).expect("remove");
        std::fs::create_dir(path("kind")).expect("mkdir");
        std::fs::rename(path("moved"), path("elsewhere")).expect("rename");
        let guest = taken_over(root, options(), &memory, &open);
        for ((node, fh), name) in nodes.into_iter().zip(names).take(4) {
            assert_eq!(result(guest.getattr(node)), Err(Errno::STALE), "{name}");
            assert_eq!(result(guest.read(node, fh, 0, 8)), Err(Errno::STALE), "{name}");
            assert_eq!(guest.write(node, fh, 0, b"harm"), Err(Errno::STALE), "{name}");
            // Once lost, lost for good; and it can be closed.
            assert_eq!(guest.write(node, fh, 0, b"harm"), Err(Errno::STALE), "{name}");
            guest.release(node, fh).expect("release");
            assert_eq!(guest.write(node, fh, 0, b"harm"), Err(Errno::BADF), "{name}");
        }
        let (node, fh) = nodes[4];
        match guest.getattr(node) {
            Ok(attr) => {
                assert_eq!(attr.ino, moved_ino);
                assert_eq!(guest.write(node, fh, 0, b"data"), Ok(4));
            }
            Err(errno) => assert_eq!(errno, Errno::STALE, "a host without file handles"),
        }
        assert_eq!(std::fs::read(path("again")).expect("host"), b"new");
        assert_eq!(std::fs::read(path("swapped")).expect("host"), b"new");
        let fresh = guest.lookup(ROOT, "again").expect("lookup").nodeid;
        assert!(nodes.iter().all(|&(node, _)| node != fresh));
    });
}

#[test]
fn a_file_without_a_name_is_lost_alone() {
    on_each(|root| {
        let guest = Guest::new(root, options());
        let (gone, gone_fh) = guest.create(ROOT, "gone", O_RDWR).expect("create");
        let (here, here_fh) = guest.create(ROOT, "here", O_RDWR).expect("create");
        guest.unlink(ROOT, "gone").expect("unlink");
        let open = [(gone.nodeid, gone_fh), (here.nodeid, here_fh)].map(|(node, fh)| Open {
            fh,
            node,
            flags: O_RDWR,
            directory: false,
        });
        let guest = restart(guest, root, options(), &open);
        assert_eq!(guest.write(gone.nodeid, gone_fh, 0, b"x"), Err(Errno::STALE));
        assert_eq!(guest.write(here.nodeid, here_fh, 0, b"x"), Ok(1));
        // What loses its name now goes on, opened or not.
        let guest = restart(guest, root, options(), &open[1..]);
        guest.unlink(ROOT, "here").expect("unlink");
        assert_eq!(guest.write(here.nodeid, here_fh, 1, b"y"), Ok(1));
        assert_eq!(guest.read(here.nodeid, here_fh, 0, 8).expect("read"), b"xy");
    });
}

#[test]
fn a_number_that_two_files_had_leads_each_to_its_own() {
    on_each(|root| {
        let guest = Guest::new(root, options());
        let (gone, gone_fh) = guest.create(ROOT, "gone", O_RDWR).expect("create");
        guest.unlink(ROOT, "gone").expect("unlink");
        let of = |node, fh| Open { fh, node, flags: O_RDWR, directory: false };
        let open = [of(gone.nodeid, gone_fh)];
        // Its last fd closes, and ext4 uses its number again.
        let guest = restart(guest, root, options(), &open);
        let names: Vec<_> = (0..32).map(|n| format!("here{n}")).collect();
        let here = names.iter().map(|name| (name, guest.create(ROOT, name, O_RDWR)));
        let here = here.map(|(name, made)| (name, made.expect("create")));
        let Some((name, (here, fh))) =
            here.into_iter().find(|(_, (e, _))| e.attr.ino == gone.attr.ino)
        else {
            return;
        };
        let open = [open[0], of(here.nodeid, fh)];
        let mut guest = guest;
        // What is restored first is another one each time.
        for _ in 0..12 {
            guest = restart(guest, root, options(), &open);
            assert_eq!(guest.lookup(ROOT, name).expect("lookup").nodeid, here.nodeid);
            assert_eq!(guest.write(here.nodeid, fh, 0, b"x"), Ok(1));
            assert_eq!(guest.write(gone.nodeid, gone_fh, 0, b"x"), Err(Errno::STALE));
        }
        guest = restart(guest, root, options(), &open);
        guest.unlink(ROOT, name).expect("unlink");
        assert_eq!(guest.write(here.nodeid, fh, 1, b"y"), Ok(1), "its name was taken in first");
    });
}

#[test]
fn a_listing_gives_a_recipe_for_each_node() {
    on_each(|root| {
        for i in 0..2_000 {
            let name = format!("{}{i}", "n".repeat(1 + i % 200));
            std::fs::write(root.join(name), i.to_string()).expect("file");
        }
        let guest = Guest::new(root, options());
        let all = guest.list(ROOT, Opcode::Readdirplus, 64 << 10);
        let given = all.iter().filter(|entry| entry.nodeid > ROOT).count();
        assert!(given >= 2_000);
        assert_eq!(guest.memory.lock().expect("memory").recipes.len(), given);
        let guest = restart(guest, root, options(), &[]);
        for entry in all.iter().filter(|entry| entry.nodeid > ROOT) {
            assert_eq!(guest.getattr(entry.nodeid).expect("found").ino, entry.ino);
        }
        // Nobody pays who does not ask.
        let guest = Guest::new(root, FsOptions::default());
        guest.list(ROOT, Opcode::Readdirplus, 64 << 10);
        assert!(guest.memory.lock().expect("memory").recipes.is_empty());
    });
}

#[test]
fn a_reply_that_is_sent_again_is_noted_again() {
    let dir = tempfile::tempdir().expect("directory");
    let guest = Guest::new(dir.path(), options());
    let again = |opcode: Opcode, nodeid: u64, args: &[u8], reply: &[u8]| {
        let (notes, body) = (Notes::new(), guest.body(nodeid, args, &[]));
        let request = Request::parse(opcode as u32, &body).expect("whole request");
        guest.fs.note_again(&request, reply, &notes);
        let nodes: Vec<_> = Nodes::new(&notes.body())
            .map(|node| node.map(|node| (node.id, node.recipe.to_vec())).expect("a NODE"))
            .collect();
        nodes
    };
    let kept = |id| (id, guest.memory.lock().expect("memory").recipes[&id].clone());
    let sub = guest.mkdir(ROOT, "sub").expect("mkdir").nodeid;
    let (entry, fh) = guest.create(sub, "a", O_RDWR).expect("create");
    guest.release(entry.nodeid, fh).expect("release");
    let reply = entry.as_bytes();
    let found = again(Opcode::Create, sub, &named(&[0; 16], b"a"), reply);
    assert_eq!(found, [kept(entry.nodeid)]);
    guest.rename((sub, "a"), (ROOT, "b"), 0).expect("rename");
    let head = abi::Rename2In { newdir: ROOT, flags: 0, padding: 0 };
    let args = named(&named(head.as_bytes(), b"a"), b"b");
    assert_eq!(again(Opcode::Rename2, sub, &args, &[]), [kept(entry.nodeid)]);
    for cut in 0..args.len() {
        again(Opcode::Rename2, sub, &args[..cut], &[]);
        again(Opcode::Lookup, sub, &args, &reply[..cut.min(reply.len())]);
    }
    assert!(again(Opcode::Write, sub, &args, reply).is_empty());

    // An error gives nothing, and so notes nothing.
    std::fs::create_dir(dir.path().join("dir")).expect("directory");
    let create = abi::CreateIn { flags: O_RDWR, mode: 0o600, umask: 0, open_flags: 0 };
    let body = guest.body(ROOT, &named(create.as_bytes(), b"dir"), &[]);
    let request = Request::parse(Opcode::Create as u32, &body).expect("whole request");
    let (notes, mut out) = (Notes::new(), [0; 256]);
    assert_eq!(guest.fs.execute(&request.noting(&notes), &mut out), Err(Errno::ISDIR));
    assert!(notes.is_empty());

    // What runs again notes what it gives, known or not.
    let body = guest.body(ROOT, &named(&[], b"b"), &[]);
    let request = Request::parse(Opcode::Lookup as u32, &body).expect("whole request");
    for (again, expected) in [(false, 0), (true, 1)] {
        let notes = Notes::new();
        notes.begin(0, again);
        let mut out = [0; size_of::<abi::EntryOut>()];
        guest.fs.execute(&request.noting(&notes), &mut out).expect("lookup");
        assert_eq!(Nodes::new(&notes.body()).count(), expected);
    }
}

#[test]
fn an_init_answer_is_served_as_it_is_or_not_at_all() {
    let dir = tempfile::tempdir().expect("directory");
    let make = |cache, writeback, read_only| {
        let options = FsOptions { cache, writeback, read_only, ..options() };
        Guest::uninitialised(dir.path(), options)
    };
    let auto = make(CacheMode::Auto, false, false);
    let init = make(CacheMode::Auto, true, false).init();
    assert_eq!(auto.fs.serve_init(&init), Err("flags"), "write-back where it is off");
    let init = auto.init();
    let always = make(CacheMode::Always, false, false);
    assert_eq!(always.fs.serve_init(&init), Err("flags"), "another cache mode");
    let same = make(CacheMode::Auto, false, false);
    let check = |init, expected| assert_eq!(same.fs.serve_init(&init), expected);
    check(abi::InitOut { major: 8, ..init }, Err("major"));
    check(abi::InitOut { minor: 200, ..init }, Err("minor"));
    check(abi::InitOut { max_write: 2 << 20, ..init }, Err("max_write"));
    check(abi::InitOut { max_write: 0, ..init }, Err("max_write"));
    check(abi::InitOut { max_pages: u16::MAX, ..init }, Err("max_pages"));
    check(abi::InitOut { map_alignment: 12, ..init }, Err("map_alignment"));
    check(abi::InitOut { flags: u32::MAX, flags2: u32::MAX, ..init }, Err("flags"));
    assert_eq!(same.fs.negotiated(), 0, "nothing of what was refused");
    check(init, Ok(()));
    assert_eq!(same.fs.negotiated(), auto.fs.negotiated());
}

#[test]
fn a_read_only_share_opens_nothing_for_writing() {
    let dir = tempfile::tempdir().expect("directory");
    let guest = Guest::new(dir.path(), options());
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).expect("create");
    guest.write(entry.nodeid, fh, 0, b"data").expect("write");
    let open = [Open { fh, node: entry.nodeid, flags: O_RDWR, directory: false }];
    let guest = restart(guest, dir.path(), FsOptions { read_only: true, ..options() }, &open);
    assert_eq!(result(guest.read(entry.nodeid, fh, 0, 4)), Err(Errno::STALE));
    assert!(guest.getattr(entry.nodeid).is_ok());
}

#[test]
fn too_few_fds_are_no_reason_to_lose_a_handle() {
    let dir = tempfile::tempdir().expect("directory");
    let fds = Fds::new(16);
    let options = FsOptions { fds: Arc::clone(&fds), ..options() };
    let guest = Guest::new(dir.path(), options.clone());
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).expect("create");
    let open = [Open { fh, node: entry.nodeid, flags: O_RDWR, directory: false }];
    let guest = restart(guest, dir.path(), options, &open);
    let taken: Vec<_> = (0..20).map(|_| ringfs_server::fds::Counted::new(&fds)).collect();
    assert_eq!(guest.write(entry.nodeid, fh, 0, b"x"), Err(Errno::NFILE));
    drop(taken);
    assert_eq!(guest.write(entry.nodeid, fh, 0, b"x"), Ok(1));
}

#[test]
fn nodes_are_taken_in_before_they_are_used() {
    on_each(|root| {
        let guest = Guest::new(root, options());
        let dir = guest.mkdir(ROOT, "dir").expect("mkdir").nodeid;
        for i in 0..500 {
            std::fs::write(root.join("dir").join(format!("f{i}")), "").expect("file");
            guest.lookup(dir, &format!("f{i}")).expect("lookup");
        }
        std::fs::remove_file(root.join("dir/f7")).expect("remove");
        let guest = restart(guest, root, options(), &[]);
        let mut ids = guest.fs.cold_nodes();
        let mut slices = 0;
        while guest.fs.warm(&mut ids, 100) {
            slices += 1;
        }
        let counts = guest.fs.counts();
        assert_eq!((slices, counts.nodes, counts.nodes_with_fd), (5, 502, 501));
    });
    // Not at the cost of others.
    let dir = tempfile::tempdir().expect("directory");
    let options = FsOptions { fds: Fds::new(64), ..options() };
    let guest = Guest::new(dir.path(), options.clone());
    for i in 0..500 {
        std::fs::write(dir.path().join(format!("f{i}")), "").expect("file");
        guest.lookup(ROOT, &format!("f{i}")).expect("lookup");
    }
    let guest = restart(guest, dir.path(), options, &[]);
    let mut ids = guest.fs.cold_nodes();
    while guest.fs.warm(&mut ids, 100) {}
    assert_eq!(guest.fs.counts().nodes_with_fd, 32);
}

#[test]
fn random_work_over_restarts() {
    on_each(|root| {
        let mut lcg = Lcg(root.as_os_str().len() as u64);
        let mut guest = Guest::new(root, options());
        // What is there: (node, host's inode number, directory, name).
        let mut files: Vec<(u64, u64, u64, String)> = Vec::new();
        let dirs: Vec<u64> = (0..4)
            .map(|i| guest.mkdir(ROOT, &format!("dir{i}")).expect("mkdir").nodeid)
            .chain([ROOT])
            .collect();
        for step in 0..1_500 {
            let dir = dirs[lcg.below(dirs.len() as u64) as usize];
            let name = format!("n{step}");
            let some = lcg.below(1 + files.len() as u64) as usize;
            match (lcg.below(6), some < files.len()) {
                (0 | 1, _) | (_, false) => {
                    let (entry, fh) = guest.create(dir, &name, O_RDWR).expect("create");
                    guest.release(entry.nodeid, fh).expect("release");
                    files.push((entry.nodeid, entry.attr.ino, dir, name));
                }
                (2, true) => {
                    let (_, _, from, old) = files[some].clone();
                    guest.rename((from, &old), (dir, &name), 0).expect("rename");
                    (files[some].2, files[some].3) = (dir, name);
                }
                (3, true) => {
                    let (node, _, from, old) = files.swap_remove(some);
                    guest.unlink(from, &old).expect("unlink");
                    let count = guest.memory.lock().expect("memory").counts[&node];
                    guest.forget(node, count);
                }
                (4, true) => {
                    let (node, number, from, old) = files[some].clone();
                    guest.link(node, dir, &name).expect("link");
                    guest.unlink(from, &old).expect("unlink");
                    files[some] = (node, number, dir, name);
                }
                (_, true) => {
                    let (node, number, from, old) = files[some].clone();
                    assert_eq!(guest.lookup(from, &old).expect("lookup").nodeid, node);
                    assert_eq!(guest.getattr(node).expect("attributes").ino, number);
                }
            }
            if step % 250 == 249 {
                guest = restart(guest, root, options(), &[]);
                for (node, number, from, old) in &files {
                    let found = guest.getattr(*node).map(|attr| attr.ino);
                    assert_eq!(found, Ok(*number), "{old} in {from}");
                }
            }
        }
    });
}

#[test]
fn a_large_session_is_put_down_quickly() {
    const NODES: u64 = 100_000;
    let dir = tempfile::tempdir().expect("directory");
    let guest = Guest::new(dir.path(), options());
    let (entry, fh) = guest.create(ROOT, "file-of-a-usual-name.rs", O_RDWR).expect("create");
    let recipe = guest.memory.lock().expect("memory").recipes[&entry.nodeid].clone();
    guest.release(entry.nodeid, fh).expect("release");
    // The inode number stands first: as many files as nodes.
    let recipe = |i: u64| [&i.to_le_bytes(), &recipe[8..]].concat();
    let memory = forged((0..NODES).map(|i| (i + 2, recipe(i))));
    let open: Vec<Open> = (0..1_000)
        .map(|i| Open { fh: i + 1, node: i + 2, flags: O_RDWR, directory: false })
        .collect();
    let bodies = bodies(&memory, &open);
    let guest = Guest::new(dir.path(), options());
    let start = Instant::now();
    let mut restoring = Restoring::default();
    for body in &bodies {
        restoring.record(&guest.fs, body).expect("a restore");
    }
    let took = start.elapsed();
    let bytes: usize = bodies.iter().map(Vec::len).sum();
    println!("{NODES} nodes and 1,000 handles, {bytes} bytes: {took:?}");
    assert_eq!(guest.fs.counts().nodes, NODES as usize + 1);
}

/// Prints what a recipe costs: `cargo test --release --test dispatch cost -- --nocapture`.
#[test]
fn the_cost_of_a_recipe() {
    const FILES: usize = 2_000;
    on_each(|root| {
        let sub = root.join("sub");
        std::fs::create_dir(&sub).expect("directory");
        for i in 0..FILES {
            std::fs::write(sub.join(format!("f{i}")), "").expect("file");
        }
        let mut best = [Duration::MAX; 4];
        for round in 0..4 {
            let recipes = round % 2 == 1;
            let guest = Guest::new(root, FsOptions { recipes, ..FsOptions::default() });
            let dir = guest.lookup(ROOT, "sub").expect("lookup").nodeid;
            let mut time = |slot: usize| {
                let start = Instant::now();
                let notes = Notes::new();
                for i in 0..FILES {
                    let args = named(&[], format!("f{i}").as_bytes());
                    let body = guest.body(dir, &args, &[]);
                    let request = Request::parse(Opcode::Lookup as u32, &body).expect("request");
                    let mut out = [0; size_of::<abi::EntryOut>()];
                    guest.fs.execute(&request.noting(&notes), &mut out).expect("lookup");
                    notes.clear();
                }
                let slot = &mut best[slot + usize::from(recipes)];
                *slot = (*slot).min(start.elapsed() / FILES as u32);
            };
            time(0);
            time(2);
        }
        let kind = root.file_name().unwrap_or_default();
        let [new, new_with, known, known_with] = best;
        println!(
            "LOOKUP on {kind:?}: new {new:?}, with a recipe {new_with:?}; known {known:?}, \
             with recipes on {known_with:?}"
        );
    });
}
