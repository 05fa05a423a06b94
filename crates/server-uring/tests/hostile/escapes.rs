//! Ways out of the share: names, links, races, and what another session or another daemon is said
//! to have given. What lies outside is watched: it must stay as it is, and never be read.

use crate::common::*;
use crate::{Scene, on_both};
use ringfs_server::import::Recipe;
use ringfs_wire::abi::{self, Opcode, fattr};
use ringfs_wire::hello::{Hello, feature};
use std::collections::BTreeSet;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use zerocopy::{FromBytes, IntoBytes};

const SECRET: &[u8] = b"not for guests";
const RDWR: i32 = libc::O_RDWR;

/// A directory beside the share, that no guest may reach.
struct Outside {
    dir: PathBuf,
    before: (u32, u64, u64, i64, i64, u64),
}

impl Outside {
    fn of(daemon: &Daemon) -> Outside {
        let dir = daemon.path("outside");
        std::fs::create_dir(&dir).expect("directory");
        std::fs::write(dir.join("secret"), SECRET).expect("file");
        let before = Outside::state(&dir);
        Outside { dir, before }
    }

    fn state(dir: &Path) -> (u32, u64, u64, i64, i64, u64) {
        let meta = std::fs::metadata(dir.join("secret")).expect("the secret is there");
        let entries = std::fs::read_dir(dir).expect("list").count() as u64;
        (meta.mode(), meta.nlink(), meta.size(), meta.ctime(), meta.ctime_nsec(), entries)
    }

    fn is_untouched(&self) {
        assert_eq!(Outside::state(&self.dir), self.before, "something reached {:?}", self.dir);
        assert_eq!(std::fs::read(self.dir.join("secret")).expect("read"), SECRET);
    }
}

fn entry(body: Result<Vec<u8>, u32>) -> Result<abi::EntryOut, u32> {
    body.map(|body| abi::EntryOut::read_from_prefix(&body).expect("an entry").0)
}

/// CREATE in any directory: node and handle.
fn create_in(foe: &mut Guest, parent: u64, file: &str) -> Result<(u64, u64), u32> {
    let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
    let create = abi::CreateIn { flags, mode: 0o100_644, umask: 0, open_flags: 0 };
    let args = [create.as_bytes(), &name(file)].concat();
    let body = foe.call(Opcode::Create, parent, &args)?;
    let (entry, rest) = abi::EntryOut::read_from_prefix(&body).expect("an entry");
    Ok((entry.nodeid, abi::OpenOut::read_from_bytes(rest).expect("opened").fh))
}

/// Everything that could be done to a directory or a file behind a node.
fn try_all(foe: &mut Guest, node: u64) {
    let call = |foe: &mut Guest, opcode, args: &[u8]| {
        let body = foe.call(opcode, node, args).unwrap_or_default();
        assert!(!body.windows(SECRET.len()).any(|part| part == SECRET), "{opcode:?} read it");
        body
    };
    for flags in [libc::O_RDONLY, libc::O_RDWR | libc::O_TRUNC, libc::O_PATH, libc::O_APPEND] {
        let open = abi::OpenIn { flags: flags as u32, open_flags: 0 };
        let body = call(foe, Opcode::Open, open.as_bytes());
        if let Ok(opened) = abi::OpenOut::read_from_bytes(&body) {
            call(foe, Opcode::Read, &read_args(opened.fh, 0, 4096));
            foe.release(node, opened.fh).expect("release");
        }
    }
    let opened = foe.call(Opcode::Opendir, node, &[0; 8]);
    assert!(opened.is_err(), "a link was opened as a directory");
    for file in ["secret", "outside", "share", "etc", "1"] {
        assert!(foe.lookup(node, file).is_err(), "{file} was found behind a link");
        call(foe, Opcode::Unlink, &name(file));
        call(foe, Opcode::Rmdir, &name(file));
    }
    assert!(create_in(foe, node, "planted").is_err());
    call(foe, Opcode::Mkdir, &[&[0; 8], &*name("planted")].concat());
    call(foe, Opcode::Mknod, &[&[0; 16], &*name("planted")].concat());
    call(foe, Opcode::Symlink, &[name("planted"), name("x")].concat());
    call(foe, Opcode::Link, &[&node.to_le_bytes()[..], &name("planted")].concat());
    for valid in [fattr::MODE, fattr::SIZE, fattr::UID | fattr::GID, fattr::ATIME | fattr::MTIME] {
        let set = abi::SetattrIn { valid, mode: 0o777, uid: 9, gid: 9, ..Default::default() };
        call(foe, Opcode::Setattr, set.as_bytes());
    }
    for attribute in ["user.x", "trusted.x", "security.x"] {
        let set = abi::SetxattrIn { size: 1, flags: 0 };
        call(foe, Opcode::Setxattr, &[set.as_bytes(), &name(attribute), b"x"].concat());
        call(foe, Opcode::Getxattr, &[&[64, 0, 0, 0, 0, 0, 0, 0], &*name(attribute)].concat());
    }
}

#[test]
fn a_link_leads_nowhere_whatever_it_says() {
    on_both(|scene| {
        let outside = Outside::of(&scene.daemon);
        let mut foe = scene.daemon.guest();
        let mut targets = vec![
            "..".to_owned(),
            "../outside".into(),
            "../outside/secret".into(),
            "/".into(),
            outside.dir.display().to_string(),
            outside.dir.join("secret").display().to_string(),
            "/proc/self/root".into(),
            "/proc/self/cwd".into(),
            format!("/proc/{}/root", scene.daemon.pid()),
            "/proc/self/exe".into(),
        ];
        targets.extend((0..24).map(|fd| format!("/proc/self/fd/{fd}")));
        for (n, target) in targets.iter().enumerate() {
            let link = format!("link-{n}");
            // One that the guest has made, and one that the host has.
            let made = [name(&link), name(target)].concat();
            let node = entry(foe.call(Opcode::Symlink, 1, &made)).expect("a link").nodeid;
            try_all(&mut foe, node);
            symlink(target, scene.daemon.share().join(format!("host-{n}"))).expect("link");
            let host = foe.lookup(1, &format!("host-{n}")).expect("there").nodeid;
            try_all(&mut foe, host);
            assert_eq!(create_in(&mut foe, 1, &link).err(), Some(libc::ELOOP as u32));
        }
        outside.is_untouched();
    });
}

#[test]
fn names_lead_into_their_own_directory_alone() {
    on_both(|scene| {
        let outside = Outside::of(&scene.daemon);
        let mut foe = scene.daemon.guest();
        let (_, fh) = foe.create("own").expect("create");
        let long = "n".repeat(256);
        let heads: [(Opcode, usize, bool); 10] = [
            (Opcode::Lookup, 0, false),
            (Opcode::Unlink, 0, false),
            (Opcode::Rmdir, 0, false),
            (Opcode::Mkdir, 8, false),
            (Opcode::Mknod, 16, false),
            (Opcode::Create, 16, false),
            (Opcode::Link, 8, false),
            (Opcode::Rename, 8, true),
            (Opcode::Rename2, 16, true),
            (Opcode::Symlink, 0, true),
        ];
        for bad in ["", ".", "..", "/", "../outside", "../outside/secret", "a/b", "own/", &long] {
            for (opcode, head, two) in heads {
                let mut args = vec![0; head];
                args.iter_mut().take(1).for_each(|byte| *byte = 1);
                let second = if two { name("other") } else { Vec::new() };
                let args = [args, name(bad), second].concat();
                let errno = foe.call(opcode, 1, &args).expect_err("refused");
                let expected = if bad == long { libc::ENAMETOOLONG } else { libc::EINVAL };
                assert_eq!(errno, expected as u32, "{opcode:?} {bad:?}");
            }
            // A NUL within, and none at the end.
            for tail in [&b"own\0x"[..], b"own"] {
                assert_eq!(foe.call(Opcode::Lookup, 1, tail), Err(libc::EINVAL as u32));
            }
        }
        let attribute = abi::GetxattrIn { size: 100, padding: 0 };
        let args = [attribute.as_bytes(), b"user.\xff/../x"].concat();
        assert!(foe.call(Opcode::Getxattr, 1, &args).is_err(), "a name without an end");
        assert_eq!(foe.read(1, fh, 0, 10), Err(libc::EBADF as u32), "another node's handle");
        outside.is_untouched();
    });
}

/// Guests and host swap a directory and a link to the outside while others walk through it.
#[test]
fn a_race_of_links_and_directories_is_not_won() {
    const ROUNDS: usize = 1500;
    let scene = Scene::new("uring");
    let outside = Outside::of(&scene.daemon);
    let share = scene.daemon.share();
    std::fs::create_dir(share.join("d")).expect("directory");
    std::fs::write(share.join("d/secret"), "public").expect("file");
    symlink(&outside.dir, share.join("l")).expect("link");
    std::fs::create_dir(share.join("h")).expect("directory");
    std::fs::write(share.join("h/secret"), "public").expect("file");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut swapper = scene.daemon.guest();
            let head = abi::Rename2In { newdir: 1, flags: libc::RENAME_EXCHANGE, padding: 0 };
            let args = [head.as_bytes(), &name("d"), &name("l")].concat();
            while !done.load(Ordering::Relaxed) {
                swapper.call(Opcode::Rename2, 1, &args).expect("both are there");
            }
        });
        scope.spawn(|| {
            // The host moves a directory out of the share and back, and puts a link in its place.
            let (here, there) = (share.join("h"), scene.daemon.path("moved"));
            while !done.load(Ordering::Relaxed) {
                std::fs::rename(&here, &there).expect("out");
                symlink(&outside.dir, &here).expect("link");
                std::fs::remove_file(&here).expect("no link");
                std::fs::rename(&there, &here).expect("back");
            }
        });
        let mut foe = scene.daemon.guest();
        let (mut inside, mut refused) = (0, 0);
        for round in 0..ROUNDS {
            for dir in ["d", "l", "h"] {
                let Ok(found) = foe.lookup(1, dir) else { continue };
                let mut hold = vec![(found.nodeid, 1)];
                if let Ok(file) = foe.lookup(found.nodeid, "secret") {
                    hold.push((file.nodeid, 1));
                    if let Ok(fh) = foe.open(file.nodeid, RDWR) {
                        assert_eq!(foe.read(file.nodeid, fh, 0, 64), Ok(b"public".to_vec()));
                        foe.release(file.nodeid, fh).expect("release");
                        inside += 1;
                    }
                }
                assert!(foe.lookup(found.nodeid, "..").is_err());
                match create_in(&mut foe, found.nodeid, &format!("new-{round}")) {
                    Ok((node, fh)) => {
                        foe.release(node, fh).expect("release");
                        hold.push((node, 1));
                        let file = name(&format!("new-{round}"));
                        let _ = foe.call(Opcode::Unlink, found.nodeid, &file);
                    }
                    Err(_) => refused += 1,
                }
                foe.forget(&hold);
            }
        }
        done.store(true, Ordering::Relaxed);
        println!("{inside} reads inside, {refused} creations refused");
        assert!(inside > 0 && refused > 0, "there was no race");
    });
    outside.is_untouched();
    drop(scene.friend);
    scene.daemon.stop_well();
}

#[test]
fn what_one_session_has_is_worth_nothing_to_another() {
    on_both(|scene| {
        std::fs::create_dir(scene.daemon.share().join("sub")).expect("directory");
        let mut owner = scene.daemon.guest();
        let (node, fh) = owner.create("owned").expect("create");
        owner.write(node, fh, 0, b"private").expect("write");
        let of = |share: &str, subdir: &[u8]| {
            let hello = Hello { subdir: subdir.to_vec(), ..hello(share) };
            Guest::greet(scene.daemon.connect(), &hello).expect("welcome")
        };
        for mut foe in [of("share", b""), of("ro", b""), of("share", b"sub")] {
            let stale = Err(libc::ESTALE as u32);
            let bad = Err(libc::EBADF as u32);
            for id in (node - 40..node + 40).chain([0, 2, u64::MAX]) {
                assert_eq!(foe.call(Opcode::Getattr, id, &[0; 16]), stale, "{id}");
                let fhs = (fh - 2..fh + 3).chain([0, u64::MAX]);
                for fh in fhs {
                    assert_eq!(foe.read(id, fh, 0, 10), bad);
                    assert_eq!(foe.release(id, fh), bad.clone().map(|_: Vec<u8>| ()));
                }
            }
            let _ = foe.write(node, fh, 0, b"changed").expect_err("no handle of its own");
            foe.forget(&[(node, 1), (node, u64::MAX), (1, u64::MAX)]);
            assert!(foe.call(Opcode::Getattr, 1, &[0; 16]).is_ok(), "the root stays");
        }
        assert_eq!(owner.read(node, fh, 0, 10), Ok(b"private".to_vec()));
        // A read-only share is one whatever its guest asks for.
        let mut reader = of("ro", b"");
        let own = reader.lookup(1, "owned").expect("there").nodeid;
        let rofs = Err(libc::EROFS as u32);
        for flags in [libc::O_RDWR, libc::O_WRONLY, libc::O_RDONLY | libc::O_TRUNC] {
            assert_eq!(reader.open(own, flags), rofs.clone().map(|_: Vec<u8>| 0));
        }
        let fh = reader.open(own, libc::O_RDONLY).expect("open");
        let set = abi::SetattrIn { valid: fattr::SIZE, ..Default::default() };
        assert_eq!(reader.call(Opcode::Setattr, own, set.as_bytes()), rofs);
        assert_eq!(reader.call(Opcode::Write, own, &write_args(fh, 0, b"x")), rofs);
        assert_eq!(reader.call(Opcode::Unlink, 1, &name("owned")), rofs);
        assert_eq!(reader.call(Opcode::Fallocate, own, &[0; 32]), rofs);
        assert_eq!(std::fs::read(scene.daemon.share().join("owned")).expect("read"), b"private");
    });
}

/// What could be said of a file, true and twisted.
fn recipes_of(dir: &OwnedFd, file: &CStr) -> Vec<Vec<u8>> {
    let mut recipes = Vec::new();
    let whole = Recipe::of(dir.as_fd(), file, 1).expect("recipe");
    let brief = Recipe::brief(dir.as_fd(), file, 1).expect("recipe");
    for recipe in [whole, brief] {
        for parent in [1, 2, 3, u64::MAX] {
            for name in [file, c"..", c".", c"", c"way", c"way/secret", c"../outside", c"d"] {
                let twisted = Recipe { parent, name: name.to_owned(), ..recipe.clone() };
                recipes.push(Recipe { handle: None, ..twisted.clone() }.pack().to_vec());
                recipes.push(twisted.pack().to_vec());
            }
        }
    }
    recipes
}

#[test]
fn a_made_up_recipe_leads_nowhere() {
    on_both(|scene| {
        let outside = Outside::of(&scene.daemon);
        let share = scene.daemon.share();
        std::fs::create_dir_all(share.join("sub/d")).expect("directories");
        std::fs::create_dir(share.join("sibling")).expect("directory");
        std::fs::write(share.join("sibling/secret"), SECRET).expect("file");
        symlink(&outside.dir, share.join("way")).expect("link");
        symlink(share.join("sibling"), share.join("sub/way")).expect("link");
        let at = |path: &Path| OwnedFd::from(std::fs::File::open(path).expect("directory"));
        let above = at(share.parent().expect("a parent"));
        let beyond = [recipes_of(&above, c"outside"), recipes_of(&at(&outside.dir), c"secret")];
        // To a guest of `sub` the rest of the share is as far as the rest of the host.
        let beside = [recipes_of(&at(&share), c"sibling"), recipes_of(&at(&share), c"friend")];
        let beside = [beside.concat(), recipes_of(&at(&share.join("sibling")), c"secret")];
        let sub = Hello { subdir: b"sub".to_vec(), ..hello("share") };
        for (hello, recipes) in [(hello("share"), beyond), (sub, beside)] {
            let recipes = recipes.concat();
            let inodes: BTreeSet<u64> = [&*outside.dir, &share.join("sibling"), &share]
                .into_iter()
                .flat_map(|dir| [dir.to_owned(), dir.join("secret"), dir.join("friend")])
                .filter_map(|path| Some(std::fs::metadata(path).ok()?.ino()))
                .collect();
            let nodes: Vec<_> = (2..).zip(recipes).collect();
            let handles: Vec<_> = nodes.iter().map(|(id, _)| (1000 + id, *id, RDWR)).collect();
            let mut foe = rebuilt(&scene.daemon, &hello, &nodes, &handles);
            for &(fh, id, _) in &handles {
                // A name within the share may lead to what is there: never to what was meant.
                match foe.call(Opcode::Getattr, id, &[0; 16]) {
                    Ok(body) => {
                        let attr = abi::AttrOut::read_from_bytes(&body).expect("attributes").attr;
                        assert!(!inodes.contains(&attr.ino), "node {id} leads out");
                    }
                    Err(errno) => assert_eq!(errno, libc::ESTALE as u32, "node {id}"),
                }
                assert!(foe.lookup(id, "secret").is_err());
                assert!(foe.read(id, fh, 0, 64).is_err());
                assert!(foe.write(id, fh, 0, b"changed").is_err());
            }
        }
        outside.is_untouched();
        assert_eq!(std::fs::read(share.join("sibling/secret")).expect("read"), SECRET);
    });
}

#[test]
fn a_recipe_that_is_replayed_elsewhere_gives_no_more_rights() {
    on_both(|scene| {
        let share = scene.daemon.share();
        std::fs::write(share.join("kept"), b"as it was").expect("file");
        let features = feature::PAYLOAD_CRC | feature::RESTORE;
        let whole = Hello { features, ..hello("share") };
        let mut owner = Guest::greet(scene.daemon.connect(), &whole).expect("welcome");
        owner.recipes = Some(Default::default());
        let node = owner.lookup(1, "kept").expect("there").nodeid;
        let recipe = owner.recipes.as_ref().and_then(|all| all.get(&node)).expect("a recipe");
        let nodes = [(node, recipe.clone())];
        // It may be read where the share may be, and written nowhere.
        let flags = RDWR | libc::O_TRUNC | libc::O_CREAT;
        let mut reader = rebuilt(&scene.daemon, &hello("ro"), &nodes, &[(7, node, flags)]);
        assert!(reader.call(Opcode::Write, node, &write_args(7, 0, b"changed")).is_err());
        assert!(reader.read(node, 7, 0, 64).is_err(), "it was never open for writing there");
        let fh = reader.open(node, libc::O_RDONLY).expect("open");
        assert_eq!(reader.read(node, fh, 0, 64), Ok(b"as it was".to_vec()));
        for flags in [libc::O_PATH, libc::O_ACCMODE] {
            let mut foe = rebuilt(&scene.daemon, &hello("share"), &nodes, &[(7, node, flags)]);
            assert!(foe.read(node, 7, 0, 64).is_err(), "{flags:o}");
        }
        // O_TRUNC is not done again.
        let flags = RDWR | libc::O_TRUNC;
        let mut foe = rebuilt(&scene.daemon, &hello("share"), &nodes, &[(7, node, flags)]);
        assert_eq!(foe.read(node, 7, 0, 64), Ok(b"as it was".to_vec()));
    });
}
