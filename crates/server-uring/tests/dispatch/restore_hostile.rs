//! A guest that makes up what another daemon is said to have given it.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use ringfs_server::fds::Fds;
use ringfs_server::fs::FsOptions;
use ringfs_server::handles::Unopened;
use ringfs_server::import::{ImportError, Recipe, Root};
use ringfs_server::restore::{Restoring, TakeOverError};
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::restore::{End, NUMBER_MAX, Restore, RestoreError, push_restore};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::restore::{Open, ino, on_each, options, result, taken_over};
use crate::support::{Guest, Lcg, Memory, Mounted, O_RDWR, ROOT, is_root};

/// A memory that a hostile guest has made up: (id, recipe) each.
pub(crate) fn forged(recipes: impl IntoIterator<Item = (u64, Vec<u8>)>) -> Memory {
    let recipes: std::collections::HashMap<u64, Vec<u8>> = recipes.into_iter().collect();
    Memory { counts: recipes.keys().map(|&id| (id, 1)).collect(), recipes }
}

#[test]
fn no_recipe_leads_out_of_the_share() {
    on_each(|base| {
        let share = base.join("share");
        let inside = share.join("sub");
        std::fs::create_dir_all(&inside).expect("directories");
        std::fs::write(base.join("secret"), "secret").expect("file");
        std::fs::create_dir(base.join("outside")).expect("directory");
        std::fs::write(base.join("outside/file"), "secret").expect("file");
        std::fs::write(inside.join("file"), "public").expect("file");
        std::os::unix::fs::symlink(base.join("outside"), share.join("way")).expect("symlink");
        let at = |path: &Path| OwnedFd::from(std::fs::File::open(path).expect("directory"));
        let (base_fd, outside) = (at(base), at(&base.join("outside")));
        let mut recipes = Vec::new();
        // True recipes of what lies outside, full and brief, under every parent and name.
        for (dir, name) in [(&base_fd, c"secret"), (&base_fd, c"outside"), (&outside, c"file")] {
            let true_ones = [
                Recipe::of(dir.as_fd(), name, ROOT).expect("recipe"),
                Recipe::brief(dir.as_fd(), name, ROOT).expect("recipe"),
            ];
            for recipe in true_ones {
                for parent in [ROOT, 2, 3, 100, u64::MAX] {
                    for name in [name, c"..", c".", c"", c"way", c"way/file", c"../secret", c"sub"]
                    {
                        let (handle, name) = (recipe.handle.clone(), name.to_owned());
                        let whole = Recipe { parent, name, ..recipe.clone() };
                        recipes.push(Recipe { handle: None, ..whole.clone() }.pack().to_vec());
                        recipes
                            .push(Recipe { handle, btime: None, ..whole.clone() }.pack().to_vec());
                        recipes.push(whole.pack().to_vec());
                        let other = recipe.handle.clone();
                        recipes.push(Recipe { other, ..whole }.pack().to_vec());
                    }
                }
            }
        }
        let count = recipes.len();
        let memory = forged((0..).map(|i| i + 2).zip(recipes));
        let open: Vec<Open> = (0..count as u64)
            .map(|i| Open { fh: 1 + i, node: i + 2, flags: O_RDWR, directory: i % 2 == 0 })
            .collect();
        let guest = taken_over(&share, options(), &memory, &open);
        for Open { fh, node, directory, .. } in open {
            assert_eq!(result(guest.getattr(node)), Err(Errno::STALE));
            let used = match directory {
                true => result(guest.readdir(Opcode::Readdir, (node, fh), 0, 4096)),
                false => result(guest.read(node, fh, 0, 16)),
            };
            assert_eq!(used, Err(Errno::STALE));
            assert_eq!(result(guest.lookup(node, "file")), Err(Errno::STALE));
        }
        // What lies inside is found by the very same means.
        let own = Recipe::of(at(&inside).as_fd(), c"file", 12345).expect("recipe");
        let by_handle = own.handle.is_some() && is_root();
        let guest = taken_over(&share, options(), &forged([(9, own.pack().to_vec())]), &[]);
        if by_handle && let Ok(attr) = guest.getattr(9) {
            assert_eq!(attr.ino, ino(&inside.join("file")));
        }
        assert_eq!(std::fs::read(base.join("secret")).expect("host"), b"secret");
    });
}

#[test]
fn a_mount_below_is_no_way_out() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    std::fs::create_dir(dir.path().join("below")).expect("directory");
    let below = Mounted::tmpfs(dir.path().join("below"));
    std::fs::write(below.0.join("secret"), "secret").expect("file");
    let at = |path: &Path| OwnedFd::from(std::fs::File::open(path).expect("directory"));
    let mount = Recipe::of(at(dir.path()).as_fd(), c"below", ROOT).expect("recipe");
    let file = Recipe::of(at(&below.0).as_fd(), c"secret", 2).expect("recipe");
    let memory = forged([(2, mount.pack().to_vec()), (3, file.pack().to_vec())]);
    let guest = taken_over(dir.path(), options(), &memory, &[]);
    assert_eq!(result(guest.getattr(2)), Err(Errno::STALE));
    assert_eq!(result(guest.getattr(3)), Err(Errno::STALE));

    // Where mounts could not be hidden, the device decides.
    let top = at(dir.path());
    let cross = Root::new(top.as_fd(), true).expect("a root");
    assert!(cross.by_name(&mount, top.as_fd()).is_ok());
    let cross = cross.stay_on_device();
    let refused = cross.by_name(&mount, top.as_fd()).map(|_| ());
    assert_eq!(refused, Err(ImportError::Outside));
}

#[test]
fn what_a_guest_makes_up_ends_in_an_errno() {
    let dir = tempfile::tempdir().expect("directory");
    let options = FsOptions { nodes_max: 1_000, handles_max: 100, ..FsOptions::default() };
    let check = |entries: &[Restore<'_>], expected: Result<bool, TakeOverError>| {
        let guest = Guest::new(dir.path(), options.clone());
        let mut body = Vec::new();
        assert!(entries.iter().all(|entry| push_restore(&mut body, entry)));
        assert_eq!(Restoring::default().record(&guest.fs, &body), expected);
    };
    let node = |id| Restore::Node { id, count: NUMBER_MAX, recipe: b"nonsense" };
    let handle = |fh| Restore::Handle { fh, node: 77, flags: u32::MAX, directory: false };
    let end = |nodes, handles| {
        Restore::End(End { nodes, handles, node_id_max: NUMBER_MAX, fh_max: NUMBER_MAX })
    };
    let number = |number| Err(TakeOverError::Malformed(RestoreError::Number(number)));
    check(&[node(1)], number(1));
    check(&[Restore::Node { id: 2, count: u64::MAX, recipe: &[] }], number(u64::MAX));
    check(&[node(2), node(2)], Err(TakeOverError::Twice(2)));
    check(&[handle(2), handle(2)], Err(TakeOverError::Twice(2)));
    check(&[node(2), handle(5), end(1, 1)], Ok(true));
    let totals = |came, said| Err(TakeOverError::Totals { came, said });
    check(&[node(2), end(2, 0)], totals((1, 0), (2, 0)));
    check(&[end(0, 0), node(2)], totals((0, 0), (0, 0)));
    check(&[end(0, 0), end(0, 0)], totals((0, 0), (0, 0)));
    let many: Vec<_> = (2..1_002).map(node).collect();
    check(&many, Err(TakeOverError::TooMany));
    let many: Vec<_> = (2..103).map(handle).collect();
    check(&many, Err(TakeOverError::TooMany));

    // Ids go on where it says, and nothing wraps.
    let guest = Guest::new(dir.path(), options.clone());
    let mut body = Vec::new();
    let entries = [node(NUMBER_MAX), handle(NUMBER_MAX), end(1, 1)];
    assert!(entries.iter().all(|entry| push_restore(&mut body, entry)));
    assert_eq!(Restoring::default().record(&guest.fs, &body), Ok(true));
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).expect("create");
    assert!(entry.nodeid > NUMBER_MAX && fh > NUMBER_MAX);
    assert_eq!(result(guest.getattr(NUMBER_MAX)), Err(Errno::STALE));
    assert_eq!(result(guest.read(77, NUMBER_MAX, 0, 1)), Err(Errno::STALE));
    guest.forget(NUMBER_MAX, u64::MAX);
    assert_eq!(guest.fs.counts().nodes, 2);
    // A count that is high stays one.
    let was = Unopened { node: ROOT, flags: 0, directory: true };
    assert_eq!(guest.fs.restore_handle(7, was), Ok(()));
    assert_eq!(guest.fs.restore_node(ROOT, 1, &[]), Err(Errno::EXIST));
    assert_eq!(guest.fs.restore_node(entry.nodeid, 1, &[]), Err(Errno::EXIST));
    assert!(guest.readdir(Opcode::Readdir, (ROOT, 7), 0, 4096).is_ok());
}

#[test]
fn long_chains_and_circles_of_lost_directories_end_soon() {
    let dir = tempfile::tempdir().expect("directory");
    std::fs::create_dir(dir.path().join("d")).expect("directory");
    let at = OwnedFd::from(std::fs::File::open(dir.path()).expect("directory"));
    let good = Recipe::of(at.as_fd(), c"d", ROOT).expect("recipe");
    let recipe = |parent, ino| Recipe { parent, ino, ..good.clone() }.pack().to_vec();
    let chain = (2..60_000).map(|id| (id, recipe(id + 1, 1)));
    let circle = (70_000..70_100).map(|id| (id, recipe(70_000 + (id + 1) % 100, 1)));
    let memory = forged(chain.chain(circle));
    let guest = taken_over(dir.path(), options(), &memory, &[]);
    let start = Instant::now();
    assert_eq!(result(guest.getattr(2)), Err(Errno::STALE));
    assert_eq!(result(guest.getattr(70_000)), Err(Errno::STALE));
    println!("a chain of 60,000 lost directories: {:?}", start.elapsed());
}

/// A link whose directory a guest has made up, or hidden until the link was taken in: node 4, of
/// which it said that it lies in node 5, whose recipe leads to a directory now.
fn link_in_a_told_directory(base: &Path, options: FsOptions) -> Guest {
    let share = base.join("share");
    for path in ["share/sub", "share/told"] {
        std::fs::create_dir_all(base.join(path)).expect("directories");
    }
    std::os::unix::fs::symlink("nowhere", share.join("sub/link")).expect("symlink");
    let at = |path: &Path| OwnedFd::from(std::fs::File::open(path).expect("directory"));
    let link = Recipe::of(at(&share.join("sub")).as_fd(), c"link", 5).expect("recipe");
    let told = Recipe::of(at(&share).as_fd(), c"told", ROOT).expect("recipe");
    let memory = forged([(4, link.pack().to_vec()), (5, told.pack().to_vec())]);
    let guest = taken_over(&share, options, &memory, &[]);
    std::fs::rename(share.join("told"), base.join("away")).expect("rename");
    let number = ino(&share.join("sub/link"));
    assert_eq!(guest.getattr(4).expect("found by its handle").ino, number);
    std::fs::rename(base.join("away"), share.join("told")).expect("rename");
    guest
}

/// Fds run short on any guest's shard: what is let go then must not have the disk searched for what
/// this guest has made up.
#[test]
fn eviction_takes_no_directory_in_that_a_guest_tells_of() {
    if !is_root() {
        return;
    }
    on_each(|base| {
        let fds = Fds::new(64);
        let guest = link_in_a_told_directory(base, FsOptions { fds, ..options() });
        for i in 0..400 {
            std::fs::write(base.join(format!("share/f{i}")), "").expect("file");
            guest.lookup(ROOT, &format!("f{i}")).expect("lookup");
        }
        let args = abi::GetattrIn::default();
        assert_eq!(guest.route(Opcode::Getattr, 4, args.as_bytes()), "inline", "it stays");
        assert_eq!(guest.route(Opcode::Getattr, 5, args.as_bytes()), "pool", "it is cold still");
    });
}

/// Where STATX of a link runs is decided by the link alone, so it must not look for directories.
#[test]
fn statx_of_a_link_takes_no_directory_in() {
    if !is_root() {
        return;
    }
    on_each(|base| {
        let guest = link_in_a_told_directory(base, options());
        let number = ino(&base.join("share/sub/link"));
        let statx = abi::StatxIn::default();
        assert_eq!(guest.route(Opcode::Statx, 4, statx.as_bytes()), "inline");
        let out: abi::StatxOut =
            guest.ask_one(Opcode::Statx, 4, statx.as_bytes()).expect("attributes");
        assert_eq!(out.stat.ino, number);
        let args = abi::GetattrIn::default();
        assert_eq!(guest.route(Opcode::Getattr, 5, args.as_bytes()), "pool", "it is cold still");
    });
}

/// Names that no LOOKUP takes cost no memory, and what a guest tells beyond the bound is known and
/// stale, until there is no memory for that either: each file alone first, then who tells of them.
/// Others have their part.
#[test]
fn what_is_told_beyond_the_memory_for_it_is_not_kept() {
    let dir = tempfile::tempdir().expect("directory");
    std::fs::create_dir(dir.path().join("d")).expect("directory");
    let at = OwnedFd::from(std::fs::File::open(dir.path()).expect("directory"));
    let good = Recipe::of(at.as_fd(), c"d", ROOT).expect("recipe");
    let named = |len: usize| {
        let name = CString::new(vec![b'x'; len]).expect("a name");
        Recipe { name, ..good.clone() }.pack()
    };
    assert!(Recipe::unpack(&named(255)).is_some());
    assert_eq!(Recipe::unpack(&named(256)), None);

    let memory = 1 << 20;
    let options = FsOptions { fds: Fds::within(1000, memory), ..FsOptions::default() };
    let [old, new] = [(); 2].map(|()| Guest::new(dir.path(), options.clone()));
    let recipe = good.pack();
    let tell = |guest: &Guest| {
        let told = (2..).map(|id| (id, guest.fs.restore_node(id, 1, &recipe)));
        let (last, refused) = { told }.find(|(_, result)| result.is_err()).expect("an end");
        assert_eq!(refused, Err(Errno::NOMEM));
        last
    };
    let kept = tell(&old);
    let whole = old.fs.cold_nodes().len() as u64;
    // Each takes fewer bytes than its recipe, and what is beside them.
    let each = (memory / 4).div_ceil(whole);
    assert!(each > 80 && each <= 80 + recipe.len() as u64, "{each} bytes each");
    assert!(kept > 2 * whole, "{kept} and {whole}");
    assert!(old.getattr(2).is_ok());
    assert_eq!(result(old.getattr(kept - 1)), Err(Errno::STALE));
    // Who comes later has its own part all the same, all of it whole, and no more.
    let own = tell(&new);
    assert_eq!(new.fs.cold_nodes().len() as u64, own - 2);
    assert!(own > whole / 8 && own < whole, "{own} of {whole}");
    let mut body = Vec::new();
    assert!(push_restore(&mut body, &Restore::Node { id: 1 << 20, count: 1, recipe: &recipe }));
    let refused = Restoring::default().record(&new.fs, &body);
    assert_eq!(refused, Err(TakeOverError::NoMemory));
    drop((old, new));
    let next = Guest::new(dir.path(), options);
    assert_eq!(tell(&next), kept);
    next.forget(2, 1);
    assert_eq!(next.fs.restore_node(2, 1, &recipe), Ok(()));
}

#[test]
fn any_bytes_at_all() {
    let dir = tempfile::tempdir().expect("directory");
    std::fs::write(dir.path().join("f"), "x").expect("file");
    let guest = Guest::new(dir.path(), options());
    let known = guest.lookup(ROOT, "f").expect("lookup").nodeid;
    let good = guest.memory.lock().expect("memory").recipes[&known].clone();
    guest.forget(known, 1);
    let number = ino(&dir.path().join("f"));
    let mut lcg = Lcg(7);
    for _ in 0..5_000 {
        let mut recipe = good.clone();
        for _ in 0..lcg.below(4) {
            match lcg.below(3) {
                0 if !recipe.is_empty() => {
                    let at = lcg.below(recipe.len() as u64) as usize;
                    recipe[at] = lcg.next() as u8;
                }
                1 => recipe.truncate(lcg.below(1 + recipe.len() as u64) as usize),
                _ => recipe.extend((0..lcg.below(200)).map(|i| i as u8)),
            }
        }
        guest.fs.restore_node(2, 1, &recipe).expect("whatever it is");
        match guest.getattr(2) {
            Ok(attr) => assert_eq!(attr.ino, number, "{recipe:?}"),
            Err(errno) => assert_eq!(errno, Errno::STALE, "{recipe:?}"),
        }
        let looked_up = guest.lookup(ROOT, "f").expect("lookup");
        assert_eq!(looked_up.attr.ino, number);
        guest.forget(looked_up.nodeid, 1);
        guest.fs.forget([(2, 1)].into_iter());
        assert_eq!(guest.fs.counts().nodes, 1);
    }
}
