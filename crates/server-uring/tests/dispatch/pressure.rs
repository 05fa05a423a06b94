//! Fewer fds than files: nodes lose theirs, and the guest does not notice.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use ringfs_server::fds::Fds;
use ringfs_server::fs::FsOptions;
use ringfs_wire::abi::{self, Opcode};
use rustix::io::Errno;

use crate::support::{Guest, Lcg, Listed, O_RDWR, ROOT, is_root, share_with};

const FDS: usize = 64;
const FILES: usize = 1_000;

fn options() -> (Arc<Fds>, FsOptions) {
    let fds = Fds::new(FDS);
    // With recipes directories have a second fd.
    (Arc::clone(&fds), FsOptions { fds, recipes: true, ..FsOptions::default() })
}

fn files(dir: &Path, count: usize) {
    for i in 0..count {
        std::fs::write(dir.join(format!("f{i}")), i.to_string()).expect("file");
    }
}

fn ino(path: &Path) -> u64 {
    std::fs::symlink_metadata(path).expect("host").ino()
}

/// Looks so many other files up that whatever is not in use has lost its fd.
fn press(guest: &Guest, dir: u64) {
    for i in 0..4 * FDS {
        let _ = guest.lookup(dir, &format!("f{i}"));
    }
}

fn is_cold(guest: &Guest, node: u64) -> bool {
    guest.route(Opcode::Getattr, node, &[0; size_of::<abi::GetattrIn>()]) == "pool"
}

/// Whether a LOOKUP that meets the node tells the guest what finds it again.
fn is_told(guest: &Guest, name: &str, node: u64) -> bool {
    guest.memory.lock().expect("memory").recipes.clear();
    assert_eq!(guest.lookup(ROOT, name).expect("lookup").nodeid, node);
    guest.memory.lock().expect("memory").recipes.contains_key(&node)
}

#[test]
fn the_guest_knows_more_files_than_there_are_fds() {
    let (fds, options) = options();
    let (dir, guest) = share_with(options);
    files(dir.path(), FILES);
    let entries: Vec<_> =
        (0..FILES).map(|i| guest.lookup(ROOT, &format!("f{i}")).expect("lookup")).collect();
    assert_eq!(guest.fs.counts().nodes, FILES + 1);
    assert!(fds.used() <= FDS + FDS / 16, "{} fds", fds.used());
    for (i, entry) in entries.iter().enumerate() {
        let attr = guest.getattr(entry.nodeid).expect("attributes");
        assert_eq!(attr.ino, ino(&dir.path().join(format!("f{i}"))));
        let fh = guest.open(entry.nodeid, O_RDWR).expect("open").fh;
        assert_eq!(guest.read(entry.nodeid, fh, 0, 64).expect("read"), i.to_string().as_bytes());
        guest.release(entry.nodeid, fh).expect("release");
    }
    // Looked up again, each has its old id.
    for (i, entry) in entries.iter().enumerate() {
        let again = guest.lookup(ROOT, &format!("f{i}")).expect("lookup");
        assert_eq!(again.nodeid, entry.nodeid);
    }
    for entry in &entries {
        guest.forget(entry.nodeid, 2);
    }
    let counts = guest.fs.counts();
    assert_eq!((counts.nodes, counts.overdrawn), (1, 0));
    assert_eq!(fds.used(), 1, "the root's");
}

/// The same by the bound of memory: it refuses nothing, keeps what is in use, and holds.
#[test]
fn no_more_nodes_keep_an_fd_than_may() {
    if !is_root() {
        // Files are found by their handles: without the right to open these nothing is let go.
        return;
    }
    let fds = Fds::of_process(None, FDS);
    let options = FsOptions { fds: Arc::clone(&fds), recipes: true, ..FsOptions::default() };
    let (dir, guest) = share_with(options);
    files(dir.path(), FILES);
    let resident = || guest.fs.counts().nodes_with_fd;
    let nodes: Vec<u64> = (0..FILES)
        .map(|i| {
            let node = guest.lookup(ROOT, &format!("f{i}")).expect("lookup").nodeid;
            assert!(resident() <= FDS + 1, "{} nodes", resident());
            node
        })
        .collect();
    assert!(resident() > FDS / 4 && guest.fs.counts().nodes == FILES + 1);
    // What the host moves is found, and what it replaces is another file.
    std::fs::rename(dir.path().join("f0"), dir.path().join("moved")).expect("rename");
    std::fs::write(dir.path().join("new"), "another").expect("write");
    std::fs::rename(dir.path().join("new"), dir.path().join("f1")).expect("rename");
    assert_eq!(guest.getattr(nodes[0]).expect("attributes").ino, ino(&dir.path().join("moved")));
    assert_eq!(guest.getattr(nodes[1]).map(|_| ()), Err(Errno::STALE));
    assert_ne!(guest.lookup(ROOT, "f1").expect("lookup").nodeid, nodes[1]);
    // Twice as many open as may have an fd, half of them without a name then.
    let open = |&node: &u64| guest.open(node, O_RDWR).expect("open").fh;
    let open: Vec<(usize, u64)> = (2..2 + 2 * FDS).map(|i| (i, open(&nodes[i]))).collect();
    for &(i, _) in &open[..FDS] {
        guest.unlink(ROOT, &format!("f{i}")).expect("unlink");
    }
    for (i, &node) in nodes.iter().enumerate().skip(2 + 2 * FDS) {
        let name = format!("f{i}");
        assert_eq!(guest.lookup(ROOT, &name).expect("lookup").nodeid, node);
        assert_eq!(guest.getattr(node).expect("attributes").ino, ino(&dir.path().join(name)));
        assert!(resident() <= 3 * FDS, "{} nodes", resident());
    }
    for &(i, fh) in &open {
        assert_eq!(guest.read(nodes[i], fh, 0, 64).expect("read"), i.to_string().as_bytes());
        let links = guest.getattr(nodes[i]).expect("attributes").nlink;
        assert_eq!(links, u32::from(i >= 2 + FDS));
        guest.release(nodes[i], fh).expect("release");
    }
    for &(i, _) in &open[FDS..] {
        assert_eq!(guest.lookup(ROOT, &format!("f{i}")).expect("lookup").nodeid, nodes[i]);
    }
    // What the guest has open without a name is never let go, though nobody uses it now.
    for &(i, _) in &open[..FDS] {
        assert_eq!(guest.getattr(nodes[i]).expect("attributes").nlink, 0);
    }
    for &node in &nodes {
        guest.forget(node, 2);
    }
    assert_eq!(guest.fs.counts().overdrawn, (2 + FDS) as u64);
}

#[test]
fn what_a_guest_has_of_a_node_is_not_told_again_after_it_was_cold() {
    let (_fds, options) = options();
    let (dir, guest) = share_with(options);
    files(dir.path(), FILES);
    let node = guest.lookup(ROOT, "f999").expect("lookup").nodeid;
    let is_told_after_it_was_cold = || {
        press(&guest, ROOT);
        assert!(is_cold(&guest, node));
        is_told(&guest, "f999", node)
    };
    assert!(!is_told_after_it_was_cold());
    // The connection by which it was told is cut; the guest gives back a lookup, which may cross.
    guest.fs.noted_is_lost();
    assert!(is_told_after_it_was_cold());
    assert!(!is_told_after_it_was_cold());
    press(&guest, ROOT);
    guest.forget(node, 1);
    assert!(is_told_after_it_was_cold());
    press(&guest, ROOT);
    std::fs::rename(dir.path().join("f999"), dir.path().join("moved")).expect("rename");
    assert!(is_cold(&guest, node) && is_told(&guest, "moved", node), "another name");
}

/// Else its recipe has the old name, and without handles the next daemon does not find the file.
#[test]
fn a_place_that_the_daemon_has_found_by_itself_is_told() {
    let (_fds, options) = options();
    let (dir, guest) = share_with(options);
    files(dir.path(), FILES);
    let rename = |from: &str, to: &str| {
        std::fs::rename(dir.path().join(from), dir.path().join(to)).expect("rename");
    };
    let node = guest.lookup(ROOT, "f999").expect("lookup").nodeid;
    rename("f999", "moved");
    press(&guest, ROOT);
    assert!(is_cold(&guest, node));
    assert!(is_told(&guest, "moved", node), "let go by it");
    assert!(!is_told(&guest, "moved", node));
    if !is_root() {
        // The host finds by its handle what has moved since.
        return;
    }
    press(&guest, ROOT);
    rename("moved", "again");
    assert!(is_cold(&guest, node));
    guest.getattr(node).expect("found by its handle");
    assert!(is_told(&guest, "again", node), "taken in by it");
    assert!(!is_told(&guest, "again", node));
}

#[test]
fn names_change_on_the_shard_while_other_nodes_have_no_fd() {
    // In memory, where nothing has to be waited for.
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return };
    let (_fds, options) = options();
    let guest = Guest::new(dir.path(), options);
    files(dir.path(), FILES);
    let sub = guest.mkdir(ROOT, "sub").expect("mkdir").nodeid;
    press(&guest, ROOT);
    let rename = [&sub.to_le_bytes()[..], b"f999\0new\0"].concat();
    assert_eq!(guest.route(Opcode::Rename, ROOT, &rename), "pool", "its directory is cold");
    guest.getattr(sub).expect("attributes");
    assert_eq!(guest.route(Opcode::Rename, ROOT, &rename), "inline");
    assert_eq!(guest.route(Opcode::Unlink, ROOT, b"f999\0"), "inline");
}

#[test]
fn a_listing_with_attributes_of_more_than_there_are_fds() {
    let (fds, options) = options();
    let (dir, guest) = share_with(options);
    files(dir.path(), FILES);
    let all = guest.list(ROOT, Opcode::Readdirplus, 32 << 10);
    let ids: HashSet<u64> = all.iter().map(|entry| entry.nodeid).filter(|&id| id > ROOT).collect();
    assert_eq!(ids.len(), FILES, "each entry has a node of its own");
    assert!(fds.used() <= FDS + FDS / 16);
    for Listed { nodeid, ino, .. } in all.iter().filter(|entry| entry.nodeid > ROOT) {
        assert_eq!(guest.getattr(*nodeid).expect("attributes").ino, *ino);
        guest.forget(*nodeid, 1);
    }
    assert_eq!((guest.fs.counts().nodes, guest.fs.counts().overdrawn), (1, 0));
}

#[test]
fn requests_about_cold_nodes_go_to_the_pool() {
    let (_fds, options) = options();
    let (dir, guest) = share_with(options);
    files(dir.path(), FILES);
    let node = guest.lookup(ROOT, "f999").expect("lookup").nodeid;
    press(&guest, ROOT);
    let args = [0; size_of::<abi::GetattrIn>()];
    assert_eq!(guest.route(Opcode::Getattr, node, &args), "pool");
    guest.getattr(node).expect("attributes");
    assert_eq!(guest.route(Opcode::Getattr, node, &args), "inline");
}

#[test]
fn what_the_guest_renames_and_links_is_found_by_its_new_name() {
    let (_fds, options) = options();
    let (dir, guest) = share_with(options);
    files(dir.path(), FILES);
    let sub = guest.mkdir(ROOT, "sub").expect("mkdir").nodeid;
    let deep = guest.mkdir(sub, "deep").expect("mkdir").nodeid;
    let node = guest.create(deep, "old", O_RDWR).map(|(entry, fh)| {
        guest.release(entry.nodeid, fh).expect("release");
        entry.nodeid
    });
    let node = node.expect("create");
    let file = ino(&dir.path().join("sub/deep/old"));
    let seen = || guest.getattr(node).expect("attributes").ino;
    // Renamed while cold, renamed while resident, its directories renamed, linked and unlinked.
    press(&guest, ROOT);
    guest.rename((deep, "old"), (sub, "new"), 0).expect("rename");
    assert_eq!(seen(), file);
    guest.rename((sub, "new"), (deep, "newer"), 0).expect("rename");
    press(&guest, ROOT);
    assert_eq!(seen(), file);
    press(&guest, ROOT);
    guest.rename((sub, "deep"), (ROOT, "moved"), 0).expect("rename");
    press(&guest, ROOT);
    assert_eq!(seen(), file);
    press(&guest, ROOT);
    assert_eq!(guest.link(node, sub, "link").expect("link").nodeid, node);
    press(&guest, ROOT);
    guest.unlink(deep, "newer").expect("unlink");
    press(&guest, ROOT);
    assert_eq!(seen(), file);
    // The last name goes: an fd keeps the file as long as the guest knows it.
    press(&guest, ROOT);
    guest.unlink(sub, "link").expect("unlink");
    press(&guest, ROOT);
    assert_eq!(guest.getattr(node).expect("attributes").nlink, 0);
    guest.forget(node, 2);
    assert_eq!(guest.getattr(node).map(|_| ()), Err(Errno::STALE));
}

#[test]
fn a_replaced_file_stays_what_it_was() {
    let (_fds, options) = options();
    let (dir, guest) = share_with(options);
    files(dir.path(), FILES);
    let (old, new) = (guest.lookup(ROOT, "f998"), guest.lookup(ROOT, "f999"));
    let (old, new) = (old.expect("lookup").nodeid, new.expect("lookup").nodeid);
    let numbers = (ino(&dir.path().join("f998")), ino(&dir.path().join("f999")));
    press(&guest, ROOT);
    guest.rename((ROOT, "f999"), (ROOT, "f998"), 0).expect("rename");
    press(&guest, ROOT);
    let (first, second) = (guest.getattr(old), guest.getattr(new));
    let (first, second) = (first.expect("replaced"), second.expect("renamed"));
    assert_eq!(
        ((first.ino, first.nlink), (second.ino, second.nlink)),
        ((numbers.0, 0), (numbers.1, 1))
    );
}

#[test]
fn what_the_host_does_behind_our_back_ends_in_estale_or_the_same_file() {
    let (_fds, options) = options();
    let (dir, guest) = share_with(options);
    files(dir.path(), FILES);
    let [gone, moved, swapped] =
        ["f997", "f998", "f999"].map(|name| guest.lookup(ROOT, name).expect("lookup").nodeid);
    let number = ino(&dir.path().join("f998"));
    press(&guest, ROOT);
    std::fs::remove_file(dir.path().join("f997")).expect("remove");
    std::fs::rename(dir.path().join("f998"), dir.path().join("elsewhere")).expect("rename");
    std::fs::write(dir.path().join("new"), "another").expect("write");
    std::fs::rename(dir.path().join("new"), dir.path().join("f999")).expect("rename");
    assert_eq!(guest.getattr(gone).map(|_| ()), Err(Errno::STALE));
    assert_eq!(guest.getattr(swapped).map(|_| ()), Err(Errno::STALE));
    match guest.getattr(moved) {
        Ok(attr) => assert_eq!(attr.ino, number),
        Err(errno) => assert_eq!(errno, Errno::STALE, "a host without file handles"),
    }
    // The new file is a new node, whatever inode number it has.
    let fresh = guest.lookup(ROOT, "f999").expect("lookup").nodeid;
    assert!(fresh != swapped && fresh != gone);
}

#[test]
fn deep_directories_are_let_go_and_found_again() {
    const DEPTH: u64 = 200;
    let (fds, options) = options();
    let (dir, guest) = share_with(options.clone());
    let other = Guest::new(dir.path(), options);
    let mut deepest = Vec::new();
    for chain in 0..4 {
        let mut parent = guest.mkdir(ROOT, &format!("chain{chain}")).expect("mkdir").nodeid;
        for _ in 0..DEPTH {
            parent = guest.mkdir(parent, "d").expect("mkdir").nodeid;
            assert!(fds.used() <= FDS + FDS / 16, "{} fds", fds.used());
        }
        deepest.push(parent);
        let seen = other.lookup(ROOT, &format!("chain{chain}")).expect("another guest's lookup");
        other.forget(seen.nodeid, 1);
    }
    for node in deepest {
        guest.getattr(node).expect("the deepest directory");
        guest.mkdir(node, "below").expect("mkdir");
    }
}

#[test]
fn renamed_links_and_pipes_are_let_go_too() {
    let (fds, options) = options();
    let (dir, guest) = share_with(options.clone());
    let nodes: Vec<u64> = (0..4 * FDS)
        .map(|i| {
            let args = [b"new\0".as_slice(), format!("target{i}").as_bytes(), b"\0"].concat();
            let made: abi::EntryOut = guest.ask_one(Opcode::Symlink, ROOT, &args).expect("symlink");
            guest.rename((ROOT, "new"), (ROOT, &format!("link{i}")), 0).expect("rename");
            made.nodeid
        })
        .collect();
    assert!(fds.used() <= FDS + FDS / 16, "{} fds", fds.used());
    for (i, &node) in nodes.iter().enumerate() {
        let target = guest.ask(Opcode::Readlink, node, &[]).expect("readlink");
        assert_eq!(target, format!("target{i}").as_bytes());
    }
    Guest::new(dir.path(), options).lookup(ROOT, "link1").expect("another guest's lookup");
}

/// There are four times as many links as fds: some are needed again and again.
#[test]
fn links_below_cold_directories_are_let_go_too() {
    let (fds, options) = options();
    let (dir, guest) = share_with(options);
    files(dir.path(), FILES);
    let links: Vec<u64> = (0..4 * FDS)
        .map(|i| {
            let sub = guest.mkdir(ROOT, &format!("sub{i}")).expect("mkdir").nodeid;
            let args = [b"link\0".as_slice(), b"target\0"].concat();
            let made: abi::EntryOut = guest.ask_one(Opcode::Symlink, sub, &args).expect("symlink");
            made.nodeid
        })
        .collect();
    press(&guest, ROOT);
    assert!(fds.used() <= FDS + FDS / 16, "{} fds", fds.used());
    for link in links {
        assert_eq!(guest.ask(Opcode::Readlink, link, &[]).expect("readlink"), b"target");
    }
}

#[test]
fn a_session_that_pins_all_fds_leaves_some_to_others() {
    let (_fds, options) = options();
    let (dir, greedy) = share_with(options.clone());
    let modest = Guest::new(dir.path(), options);
    files(dir.path(), FILES);
    let mut refused = None;
    for i in 0..FILES {
        // Files without names keep their fds.
        let name = format!("f{i}");
        let known = greedy.lookup(ROOT, &name).map(|_| greedy.unlink(ROOT, &name));
        if let Err(errno) = known {
            refused = Some(errno);
            break;
        }
    }
    assert_eq!(refused, Some(Errno::NFILE));
    modest.lookup(ROOT, "f999").expect("another guest's lookup");
}

#[test]
fn files_in_use_keep_their_fds() {
    let (fds, options) = options();
    let (dir, guest) = share_with(options);
    files(dir.path(), FILES);
    let open: Vec<_> = (0..FDS / 4)
        .map(|i| {
            let node = guest.lookup(ROOT, &format!("f{i}")).expect("lookup").nodeid;
            (node, guest.open(node, O_RDWR).expect("open").fh)
        })
        .collect();
    press(&guest, ROOT);
    for i in 0..FDS / 4 {
        std::fs::remove_file(dir.path().join(format!("f{i}"))).expect("remove");
    }
    for (i, &(node, fh)) in open.iter().enumerate() {
        assert_eq!(guest.read(node, fh, 0, 64).expect("read"), i.to_string().as_bytes());
        assert_eq!(guest.getattr(node).expect("attributes").nlink, 0);
    }
    // No session may have all fds in open files.
    let mut refused = None;
    for i in FDS..FILES {
        let node = guest.lookup(ROOT, &format!("f{i}")).expect("lookup").nodeid;
        if let Err(errno) = guest.open(node, O_RDWR) {
            refused = Some(errno);
            break;
        }
    }
    assert_eq!(refused, Some(Errno::NFILE));
    assert!(fds.used() <= FDS + FDS / 16);
}

#[test]
fn the_session_with_most_nodes_gives_way() {
    let (fds, options) = options();
    let (dir, greedy) = share_with(options.clone());
    files(dir.path(), FILES);
    for i in 0..FILES {
        greedy.lookup(ROOT, &format!("f{i}")).expect("lookup");
    }
    let modest = Guest::new(dir.path(), options);
    let nodes: Vec<_> =
        (0..8).map(|i| modest.lookup(ROOT, &format!("f{i}")).expect("lookup").nodeid).collect();
    for i in 0..FILES {
        greedy.lookup(ROOT, &format!("f{i}")).expect("lookup");
    }
    let args = [0; size_of::<abi::GetattrIn>()];
    for node in nodes {
        assert_eq!(modest.route(Opcode::Getattr, node, &args), "inline");
    }
    assert!(fds.used() <= FDS + FDS / 16);
}

#[test]
fn threads_use_rename_and_forget_under_pressure() {
    let (fds, options) = options();
    let (dir, guest) = share_with(options);
    files(dir.path(), FILES);
    let numbers: Vec<u64> = (0..FILES).map(|i| ino(&dir.path().join(format!("f{i}")))).collect();
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (guest, numbers) = (&guest, &numbers);
            scope.spawn(move || {
                let mut lcg = Lcg(thread + 1);
                for _ in 0..4_000 {
                    // Each thread renames its own files, and all look at all.
                    let i = lcg.below(FILES as u64);
                    let Ok(entry) = guest.lookup(ROOT, &format!("f{i}")) else { continue };
                    let attr = guest.getattr(entry.nodeid).expect("attributes");
                    assert_eq!(attr.ino, entry.attr.ino);
                    if i % 4 == thread {
                        let (name, other) = (format!("f{i}"), format!("t{i}"));
                        guest.rename((ROOT, &name), (ROOT, &other), 0).expect("rename");
                        assert_eq!(
                            guest.getattr(entry.nodeid).expect("mine").ino,
                            numbers[i as usize]
                        );
                        guest.rename((ROOT, &other), (ROOT, &name), 0).expect("rename back");
                    }
                    guest.forget(entry.nodeid, 1);
                }
            });
        }
    });
    let counts = guest.fs.counts();
    assert_eq!((counts.nodes, counts.overdrawn), (1, 0));
    assert_eq!(fds.used(), 1);
}
