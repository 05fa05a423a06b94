//! Can a node be taken in again, and what does it cost? Each case on a real file system: loop
//! devices with ext4, tmpfs, overlay. What these tests assert is what `docs/node-import.md` says.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use fuse_backend_rs::api::filesystem::{Context, FileSystem, FsOptions};
use fuse_backend_rs::passthrough::{Config, PassthroughFs};
use ringfs_server::creds::EffectiveIds;
use ringfs_server::fdops;
use ringfs_server::import::{Found, Handle, HandleKind, ImportError, Recipe, Root};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// A directory with what is mounted in it; all is unmounted when it goes, also on a panic. The
/// loop devices were set up by mount(8) and detach themselves with their mount.
struct Lab {
    mounted: Vec<PathBuf>,
    dir: tempfile::TempDir,
}

impl Lab {
    /// `None`, with a line that says why, where mounting is not possible.
    fn new() -> Option<Lab> {
        let lab = Lab { mounted: Vec::new(), dir: tempfile::tempdir().expect("temp dir") };
        let can = rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists();
        if !can {
            println!("SKIPPED: loop devices and mounts need root and /dev/loop-control");
        }
        can.then_some(lab)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self, name: &str) {
        let image = self.path(name);
        File::create(&image).and_then(|f| f.set_len(32 << 20)).expect("image");
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-I", "256", "-N", "16384"]).arg(image));
    }

    fn mount(&mut self, image: &str, at: &str) -> PathBuf {
        let target = self.path(at);
        fs::create_dir_all(&target).expect("mkdir");
        run(Command::new("mount").args(["-o", "loop"]).arg(self.path(image)).arg(&target));
        self.mounted.push(target.clone());
        target
    }

    fn mount_type(&mut self, kind: &str, options: &str, at: &str) -> Option<PathBuf> {
        let target = self.path(at);
        fs::create_dir_all(&target).expect("mkdir");
        let status =
            Command::new("mount").args(["-t", kind, "-o", options, kind]).arg(&target).status();
        if !status.expect("mount(8)").success() {
            println!("SKIPPED: cannot mount {kind} with {options}");
            return None;
        }
        self.mounted.push(target.clone());
        Some(target)
    }

    /// A real unmount: nothing of it stays cached, and it fails if an fd is still open. A child
    /// that another test has just forked has all fds for a moment, until it is exec'ed.
    fn unmount(&mut self, at: &str) {
        let target = self.path(at);
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()) {
                Err(Errno::BUSY) if Instant::now() < deadline => std::thread::yield_now(),
                end => break end.expect("unmount"),
            }
        }
        self.mounted.retain(|mounted| *mounted != target);
    }

    fn remount(&mut self, image: &str, at: &str) -> PathBuf {
        self.unmount(at);
        self.mount(image, at)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for target in self.mounted.iter().rev() {
            let done = rustix::mount::unmount(target, rustix::mount::UnmountFlags::DETACH);
            if let Err(errno) = done {
                eprintln!("left mounted: {}: {errno}", target.display());
            }
        }
    }
}

fn run(command: &mut Command) {
    let output = command.output().expect("the program is installed");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn open(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).expect("open")
}

fn root(path: &Path) -> Root {
    Root::new(open(path).as_fd(), false).expect("root")
}

fn name(text: &str) -> CString {
    CString::new(text).expect("no NUL")
}

fn recipe(dir: &Path, file: &str) -> Recipe {
    Recipe::of(open(dir).as_fd(), &name(file), 7).expect("recipe")
}

fn write(path: PathBuf, content: &str) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("mkdir");
    fs::write(path, content).expect("write");
}

fn content(found: &Found) -> String {
    let fd = fdops::reopen(found.fd(), OFlags::RDONLY).expect("reopen");
    std::io::read_to_string(File::from(fd)).expect("read")
}

#[derive(Debug, PartialEq, Eq)]
enum Got {
    Name(String),
    Path(String, String),
    Err(ImportError),
}

/// By name (the content) or by path (the path and the content).
fn got(result: Result<Found, ImportError>) -> Got {
    match result {
        Ok(found @ Found::ByName(_)) => Got::Name(content(&found)),
        Ok(ref found @ Found::ByPath(_, ref components)) => {
            let parts: Vec<_> = components.iter().map(|c| c.to_string_lossy()).collect();
            Got::Path(parts.join("/"), content(found))
        }
        Err(error) => Got::Err(error),
    }
}

fn path(path: &str, content: &str) -> Got {
    Got::Path(path.into(), content.into())
}

const STALE: Got = Got::Err(ImportError::Stale);

/// Cold cases by path need a handle that names its parent (Linux 6.13).
fn connectable(recipe: &Recipe) -> bool {
    let kind = recipe.handle.as_ref().map(Handle::kind);
    let yes = kind == Some(HandleKind::Connectable);
    if !yes {
        println!("SKIPPED a cold import by handle: the kernel gives {kind:?}");
    }
    yes
}

#[test]
fn a_cold_file_comes_back() {
    let Some(mut lab) = Lab::new() else { return };
    lab.image("img");
    let m = lab.mount("img", "m");
    write(m.join("share/a/b/f"), "f");
    let file = recipe(&m.join("share/a/b"), "f");
    let dir = recipe(&m.join("share/a"), "b");
    lab.remount("img", "m");
    let share = root(&m.join("share"));
    if connectable(&file) {
        assert_eq!(got(share.by_handle(&file)), path("a/b/f", "f"));
    }
    // A directory's handle always leads to a path.
    let found = share.by_handle(&dir).expect("a directory");
    assert!(matches!(found, Found::ByPath(_, ref c) if c.len() == 2), "{found:?}");
    let parent = open(&m.join("share/a/b"));
    assert_eq!(got(share.resolve(&file, Some(parent.as_fd()))), Got::Name("f".into()));

    // The same handle without its parent's half, as older kernels give it: no path when cold.
    drop((share, parent, found));
    lab.remount("img", "m");
    let share = root(&m.join("share"));
    let bytes = file.handle.as_ref().expect("ext4 has handles").bytes().to_vec();
    let handle = Handle::new(HandleKind::Plain, 1, &bytes[..8]);
    let plain = Recipe { handle, ..file.clone() };
    assert_eq!(got(share.by_handle(&plain)), Got::Err(ImportError::Outside));
    fs::metadata(m.join("share/a/b/f")).expect("now cached");
    assert_eq!(got(share.by_handle(&plain)), path("a/b/f", "f"));
    let parent = open(&m.join("share/a/b"));
    assert_eq!(got(share.resolve(&plain, Some(parent.as_fd()))), Got::Name("f".into()));
}

#[test]
fn one_of_two_hard_links_is_removed() {
    let Some(mut lab) = Lab::new() else { return };
    lab.image("img");
    let m = lab.mount("img", "m");
    for (case, other) in [("same", "same/g"), ("other", "elsewhere/g"), ("out", "../g")] {
        write(m.join("share/elsewhere/x"), "");
        write(m.join("share").join(case).join("f"), case);
        fs::hard_link(m.join("share").join(case).join("f"), m.join("share").join(other))
            .expect("link");
        let file = recipe(&m.join("share").join(case), "f");
        fs::remove_file(m.join("share").join(case).join("f")).expect("unlink");
        let share = root(&m.join("share"));
        let parent = open(&m.join("share").join(case));
        let hot = got(share.resolve(&file, Some(parent.as_fd())));
        drop((share, parent));
        lab.remount("img", "m");
        let share = root(&m.join("share"));
        let cold = got(share.by_handle(&file));
        println!("hard link, other name {other}: hot {hot:?}, cold {cold:?}");
        match case {
            // The parent in the handle still holds the inode, by another name.
            "same" if connectable(&file) => {
                assert_eq!((hot, cold), (path("same/g", case), path("same/g", case)));
            }
            "other" if connectable(&file) => {
                assert_eq!((hot, cold), (path("elsewhere/g", case), STALE));
            }
            // The kernel opens such a handle only below the fd that it is given: the share.
            "out" if connectable(&file) => assert_eq!((hot, cold), (STALE, STALE)),
            _ => {}
        }
        fs::remove_file(m.join("share").join(other)).expect("unlink");
    }
}

#[test]
fn the_host_renames_files_and_moves_directories() {
    let Some(mut lab) = Lab::new() else { return };
    lab.image("img");
    let m = lab.mount("img", "m");
    let share_dir = m.join("share");
    write(share_dir.join("a/f"), "renamed");
    write(share_dir.join("a/g"), "moved");
    write(share_dir.join("d/e/h"), "in a moved directory");
    write(share_dir.join("b/x"), "");
    let [renamed, moved] = ["f", "g"].map(|file| recipe(&share_dir.join("a"), file));
    let below = recipe(&share_dir.join("d/e"), "h");
    let dir = recipe(&share_dir.join("d"), "e");
    fs::rename(share_dir.join("a/f"), share_dir.join("a/f2")).expect("rename");
    fs::rename(share_dir.join("a/g"), share_dir.join("b/g")).expect("rename");
    fs::rename(share_dir.join("d"), share_dir.join("b/d2")).expect("rename");
    write(share_dir.join("a/f"), "an impostor");

    for cold in [false, true] {
        if cold {
            lab.remount("img", "m");
        }
        let share = root(&share_dir);
        let parent = open(&share_dir.join("a"));
        let found: Vec<_> = [&renamed, &moved]
            .map(|recipe| got(share.resolve(recipe, Some(parent.as_fd()))))
            .into_iter()
            .collect();
        let by_handle = got(share.by_handle(&below));
        println!("renamed, moved: {found:?}, below: {by_handle:?} (cold: {cold})");
        if connectable(&renamed) {
            assert_eq!(found[0], path("a/f2", "renamed"));
            assert_eq!(found[1], if cold { STALE } else { path("b/g", "moved") });
            assert_eq!(by_handle, path("b/d2/e/h", "in a moved directory"));
        }
        let dir_found = share.by_handle(&dir).expect("directories are always found");
        // Once its directory is imported, a file below needs no handle.
        let by_name = got(share.by_name(&below, dir_found.fd()));
        assert_eq!(by_name, Got::Name("in a moved directory".into()));
    }
}

#[test]
fn two_devices_with_equal_numbers_stay_apart() {
    let Some(mut lab) = Lab::new() else { return };
    lab.image("one");
    lab.image("two");
    for copies in [false, true] {
        if copies {
            // The same UUID, generation and birth time: only the device number differs.
            fs::copy(lab.path("one"), lab.path("two")).expect("copy");
        }
        let share_dir = lab.path("share");
        let mounts = [lab.mount("one", "share/x"), lab.mount("two", "share/y")];
        for (mount, text) in mounts.iter().zip(["x", "y"]) {
            write(mount.join("f"), text);
        }
        let [x, y] = [0, 1].map(|i| recipe(&mounts[i], "f"));
        assert_eq!(x.ino, y.ino, "the case that is to be shown");
        assert_eq!(x.mount.fs_id == y.mount.fs_id, copies);
        assert_eq!(x.handle == y.handle, copies, "generations are random");
        let mut share = Root::new(open(&share_dir).as_fd(), true).expect("root");
        assert_eq!(got(share.by_handle(&x)), STALE, "a mount that is not known yet");
        for mount in &mounts {
            assert_eq!(share.add_mount(open(mount).as_fd()), Ok(true));
            assert_eq!(share.add_mount(open(mount).as_fd()), Ok(false));
        }
        let found = [got(share.by_handle(&x)), got(share.by_handle(&y))];
        let apart = [path("x/f", "x"), path("y/f", "y")];
        assert_eq!(found, if copies { [STALE, STALE] } else { apart });
        let parent = open(&mounts[0]);
        assert_eq!(got(share.resolve(&x, Some(parent.as_fd()))), Got::Name("x".into()));
        drop(parent);
        let wrong_parent = open(&mounts[1]);
        let swapped = got(share.by_name(&x, wrong_parent.as_fd()));
        // A copy of the image has the same file in every respect that can be compared.
        assert_eq!(swapped, if copies { Got::Name("y".into()) } else { STALE });

        // Mounts below the share are hidden: no way leads across.
        let mut hidden = root(&share_dir);
        hidden.add_mount(open(&mounts[0]).as_fd()).expect("add");
        assert_eq!(got(hidden.by_handle(&x)), Got::Err(ImportError::Outside));
        drop((share, hidden, wrong_parent));
        lab.unmount("share/x");
        lab.unmount("share/y");

        // Mounted again the other way round, so that device numbers change hands.
        lab.mount("two", "share/y");
        lab.mount("one", "share/x");
        let mut share = Root::new(open(&share_dir).as_fd(), true).expect("root");
        for mount in &mounts {
            share.add_mount(open(mount).as_fd()).expect("add");
        }
        let again = [got(share.by_handle(&x)), got(share.by_handle(&y))];
        println!("two devices, mounted in another order (copies: {copies}): {again:?}");
        let found = [path("x/f", "x"), path("y/f", "y")];
        if copies {
            assert_eq!(again, [STALE, STALE], "never the other copy's file");
        } else if connectable(&x) {
            assert_eq!(again, found);
        }
        let parent = open(&mounts[1]);
        assert_eq!(got(share.resolve(&y, Some(parent.as_fd()))), Got::Name("y".into()));
        drop(parent);
        drop(share);
        lab.unmount("share/x");
        lab.unmount("share/y");
    }
}

#[test]
fn file_systems_without_handles_go_by_name() {
    let Some(mut lab) = Lab::new() else { return };
    let Some(tmpfs) = lab.mount_type("tmpfs", "size=1m", "tmpfs") else { return };
    write(tmpfs.join("a/f"), "tmpfs");
    let file = recipe(&tmpfs.join("a"), "f");
    println!("tmpfs: handle {:?}, btime {:?}", file.handle.as_ref().map(Handle::kind), file.btime);
    let share = root(&tmpfs);
    assert_eq!(got(share.by_handle(&file)), path("a/f", "tmpfs"));
    fs::rename(tmpfs.join("a/f"), tmpfs.join("g")).expect("rename");
    assert_eq!(got(share.by_handle(&file)), path("g", "tmpfs"));
    drop(share);

    for dir in ["tmpfs/lower", "tmpfs/upper", "tmpfs/work"] {
        fs::create_dir(lab.path(dir)).expect("mkdir");
    }
    write(tmpfs.join("lower/a/f"), "lower");
    write(tmpfs.join("lower/a/g"), "lower too");
    let at = |dir: &str| tmpfs.join(dir).display().to_string();
    let options =
        format!("lowerdir={},upperdir={},workdir={}", at("lower"), at("upper"), at("work"));
    let Some(overlay) = lab.mount_type("overlay", &options, "overlay") else { return };
    let dir = overlay.join("a");
    let file = recipe(&dir, "f");
    println!(
        "overlay: handle {:?}, btime {:?}, generation {:?}",
        file.handle, file.btime, file.generation
    );
    assert!(file.handle.as_ref().is_none_or(|h| h.kind() == HandleKind::IdentityOnly));
    let share = root(&overlay);
    let parent = open(&dir);
    assert_eq!(got(share.by_handle(&file)), STALE);
    assert_eq!(got(share.resolve(&file, Some(parent.as_fd()))), Got::Name("lower".into()));
    // The first write copies the file to the upper layer: a new inode below, birth time now.
    fs::write(dir.join("f"), "upper").expect("copy up");
    let after = recipe(&dir, "f");
    println!(
        "overlay after copy-up: ino {} -> {}, btime {:?} -> {:?}, handle kept: {}",
        file.ino,
        after.ino,
        file.btime,
        after.btime,
        file.handle == after.handle
    );
    assert_eq!(got(share.resolve(&file, Some(parent.as_fd()))), Got::Name("upper".into()));
    drop((share, parent));
    lab.unmount("overlay");
    lab.mount_type("overlay", &options, "overlay").expect("as before");
    let share = root(&overlay);
    let parent = open(&dir);
    let remounted = got(share.resolve(&file, Some(parent.as_fd())));
    println!("overlay after copy-up and a remount: {remounted:?}");
    fs::rename(dir.join("g"), dir.join("f")).expect("rename");
    assert_eq!(got(share.resolve(&file, Some(parent.as_fd()))), STALE);
}

#[test]
fn numbers_that_are_used_again_and_removed_files_are_stale() {
    let Some(mut lab) = Lab::new() else { return };
    lab.image("img");
    let m = lab.mount("img", "m");
    write(m.join("f"), "old");
    let file = recipe(&m, "f");
    let kept_open = File::open(m.join("f")).expect("open");
    fs::remove_file(m.join("f")).expect("unlink");
    let share = root(&m);
    let dir = open(&m);
    assert_eq!(got(share.resolve(&file, Some(dir.as_fd()))), STALE, "no name left");
    drop(kept_open);
    assert_eq!(got(share.resolve(&file, Some(dir.as_fd()))), STALE, "no inode left");
    drop((share, dir));
    lab.remount("img", "m");
    let (share, dir) = (root(&m), open(&m));
    assert_eq!(got(share.resolve(&file, Some(dir.as_fd()))), STALE, "nor after a remount");

    // ext4 gives the lowest free number: the new file has the old one's.
    let reused = (0..64).any(|i| {
        fs::write(m.join("f"), "new").expect("write");
        let same = fs::metadata(m.join("f")).expect("stat").ino() == file.ino;
        if !same {
            fs::rename(m.join("f"), m.join(format!("kept-{i}"))).expect("rename");
        }
        same
    });
    assert!(reused, "the case that is to be shown");
    assert_eq!(got(share.resolve(&file, Some(dir.as_fd()))), STALE);
    // Without the birth time the generation in the handle still tells.
    let now = recipe(&m, "f");
    let forged = Recipe { btime: now.btime, ..file.clone() };
    assert_eq!(got(share.resolve(&forged, Some(dir.as_fd()))), STALE);
    // Without a handle, birth time or generation. (Birth times are as coarse as the kernel's
    // tick, so the two files may well have been born "together".)
    let no_handle = Recipe { handle: None, btime: Some((1, 0)), ..now.clone() };
    assert_eq!(got(share.resolve(&no_handle, Some(dir.as_fd()))), STALE);
    let no_handle = Recipe { handle: None, generation: Some(1), ..now.clone() };
    assert_eq!(got(share.resolve(&no_handle, Some(dir.as_fd()))), STALE);
    let no_handle = Recipe { handle: None, ..now };
    assert_eq!(got(share.resolve(&no_handle, Some(dir.as_fd()))), Got::Name("new".into()));
}

#[test]
fn unprivileged_daemons_import_by_name() {
    let Some(mut lab) = Lab::new() else { return };
    lab.image("img");
    let m = lab.mount("img", "m");
    let open_to_all = || std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(lab.dir.path(), open_to_all()).expect("chmod");
    write(m.join("a/f"), "f");
    let file = {
        // User 65534 has no capability: handles can be asked for, not opened.
        let _ids = EffectiveIds::switch(65534, 65534).expect("ids");
        let file = recipe(&m.join("a"), "f");
        let share = root(&m);
        assert_eq!(got(share.by_handle(&file)), STALE);
        let parent = open(&m.join("a"));
        assert_eq!(got(share.resolve(&file, Some(parent.as_fd()))), Got::Name("f".into()));
        file
    };
    assert_eq!(file, recipe(&m.join("a"), "f"), "privilege changes nothing in a recipe");
    assert_eq!(got(root(&m).by_handle(&file)), path("a/f", "f"));
    fs::rename(m.join("a/f"), m.join("a/g")).expect("rename");
    let _ids = EffectiveIds::switch(65534, 65534).expect("ids");
    let parent = open(&m.join("a"));
    assert_eq!(got(root(&m).resolve(&file, Some(parent.as_fd()))), STALE);
}

#[test]
fn forged_recipes_stay_inside() {
    let Some(mut lab) = Lab::new() else { return };
    lab.image("img");
    let m = lab.mount("img", "m");
    write(m.join("share/a/f"), "inside");
    write(m.join("secret"), "outside");
    write(m.join("share-not/secret"), "outside");
    let share = root(&m.join("share"));
    for (dir, file) in [("", "secret"), ("share-not", "secret")] {
        let outside = recipe(&m.join(dir), file);
        let error = share.by_handle(&outside).map(drop);
        assert_eq!(error.map_err(ImportError::errno), Err(Errno::STALE));
        // The kernel opens this form wherever it is; the walk must refuse it.
        let bytes = outside.handle.as_ref().expect("ext4 has handles").bytes().to_vec();
        let handle = Handle::new(HandleKind::Plain, 1, &bytes[..8]);
        let error = share.by_handle(&Recipe { handle, ..outside }).map(drop);
        assert_eq!(error, Err(ImportError::Outside));
    }
    let root_itself = recipe(&m, "share");
    assert_eq!(got(share.by_handle(&root_itself)), Got::Err(ImportError::Outside));
    std::os::unix::fs::symlink("../../secret", m.join("share/a/l")).expect("symlink");
    let link = recipe(&m.join("share/a"), "l");
    let found = share.by_handle(&link).expect("the link itself");
    let kind = fdops::file_type(found.fd()).expect("stat");
    assert!(kind.is_symlink());

    let good = recipe(&m.join("share/a"), "f");
    let parent = open(&m.join("share/a"));
    for evil in [c"..", c".", c"", c"../../secret", c"l"] {
        let forged = Recipe { name: evil.into(), ..good.clone() };
        let error = share.by_name(&forged, parent.as_fd()).map(drop);
        assert_eq!(error, Err(ImportError::Stale), "{evil:?}");
    }
    assert_eq!(Handle::new(HandleKind::Plain, 0, &[0; 129]), None);
    let mut state = 1u64;
    for _ in 0..2000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let len = (state >> 57) as usize;
        let bytes: Vec<u8> = (0..len).map(|i| (state >> (i % 7 * 8)) as u8).collect();
        let kinds = [0, 1, 2, 0x10001, 0x10002, 0x20001, 0x7fff_0000, i32::MIN, -1];
        let raw_type = kinds[(state >> 40) as usize % kinds.len()];
        let handle = Handle::new(HandleKind::Connectable, raw_type, &bytes);
        let error = share.by_handle(&Recipe { handle, ..good.clone() }).map(drop);
        assert!(error.is_err());
    }
}

fn pass_through(root_dir: &Path) -> PassthroughFs {
    let root_dir = root_dir.display().to_string();
    let config = Config { root_dir, do_import: false, ..Config::default() };
    let fs = PassthroughFs::new(config).expect("pass-through");
    fs.import().expect("import");
    fs.init(FsOptions::empty()).expect("init");
    fs
}

/// One LOOKUP a component; each count but the last's is given back. Returns the crate's inode and
/// the host's inode number.
fn take_in(fs: &PassthroughFs, components: &[CString]) -> (u64, u64) {
    let context = Context::default();
    let (mut inode, mut host_ino) = (1, 0);
    for component in components {
        let entry = fs.lookup(&context, inode, component).expect("lookup");
        if inode != 1 {
            fs.forget(&context, inode, 1);
        }
        (inode, host_ino) = (entry.inode, entry.attr.st_ino);
    }
    (inode, host_ino)
}

#[test]
fn the_pass_through_crate_takes_the_path() {
    let Some(mut lab) = Lab::new() else { return };
    lab.image("img");
    let m = lab.mount("img", "m");
    write(m.join("share/1/2/3/4/5/6/7/f"), "f");
    let file = recipe(&m.join("share/1/2/3/4/5/6/7"), "f");
    if !connectable(&file) {
        return;
    }
    lab.remount("img", "m");
    let share = root(&m.join("share"));
    let fs = pass_through(&m.join("share"));
    let Ok(Found::ByPath(_, components)) = share.by_handle(&file) else { panic!("not found") };
    assert_eq!(components.len(), 8);
    let (_, ino) = take_in(&fs, &components);
    assert_eq!(ino, file.ino);
    cost("8 LOOKUPs of the crate and 8 FORGETs", 500, || {
        let (inode, _) = take_in(&fs, &components);
        fs.forget(&Context::default(), inode, 1);
    });
    // The usual case: the directory is imported, so one LOOKUP is left.
    let (parent, _) = take_in(&fs, &components[..7]);
    let parent_fd = open(&m.join("share/1/2/3/4/5/6/7"));
    cost("1 LOOKUP and FORGET", 500, || {
        let context = Context::default();
        let entry = fs.lookup(&context, parent, c"f").expect("lookup");
        fs.forget(&context, entry.inode, 1);
    });
    cost("a whole import by name: checked, LOOKUP, FORGET", 500, || {
        let context = Context::default();
        share.by_name(&file, parent_fd.as_fd()).expect("by name");
        let entry = fs.lookup(&context, parent, c"f").expect("lookup");
        assert_eq!(entry.attr.st_ino, file.ino);
        fs.forget(&context, entry.inode, 1);
    });
    drop(fs);
}

#[test]
fn a_bind_mount_is_a_root_like_any_other() {
    // As inside a sandbox: only the share is mounted there, under another path.
    let Some(mut lab) = Lab::new() else { return };
    lab.image("img");
    let m = lab.mount("img", "m");
    write(m.join("share/a/f"), "inside");
    write(m.join("secret"), "outside");
    let inside = recipe(&m.join("share/a"), "f");
    let outside = recipe(&m, "secret");
    let bind = lab.path("bind");
    fs::create_dir(&bind).expect("mkdir");
    rustix::mount::mount_bind(m.join("share"), &bind).expect("bind");
    lab.mounted.push(bind.clone());
    let share = root(&bind);
    assert_eq!(got(share.by_handle(&inside)), path("a/f", "inside"));
    let refused = share.by_handle(&outside).map(drop).map_err(ImportError::errno);
    assert_eq!(refused, Err(Errno::STALE));
    let bytes = outside.handle.as_ref().expect("ext4 has handles").bytes().to_vec();
    let handle = Handle::new(HandleKind::Plain, 1, &bytes[..8]);
    let error = share.by_handle(&Recipe { handle, ..outside }).map(drop);
    println!("a plain handle from outside of a bind mount: {error:?}");
    assert_eq!(error.map_err(ImportError::errno), Err(Errno::STALE));

    // The host renames the share's root while it is served.
    let direct = root(&m.join("share"));
    fs::rename(m.join("share"), m.join("renamed")).expect("rename");
    assert_eq!(got(direct.by_handle(&inside)), path("a/f", "inside"));
}

#[test]
fn the_guests_own_rename_needs_a_new_recipe() {
    // The guest's kernel looks nothing up after its rename: what it remembers is the old place.
    let Some(mut lab) = Lab::new() else { return };
    lab.image("img");
    let m = lab.mount("img", "m");
    write(m.join("a/f"), "f");
    fs::create_dir(m.join("b")).expect("mkdir");
    let before = recipe(&m.join("a"), "f");
    fs::rename(m.join("a/f"), m.join("b/g")).expect("rename");
    let after = recipe(&m.join("b"), "g");
    lab.remount("img", "m");
    let share = root(&m);
    assert_eq!(got(share.by_handle(&before)), STALE);
    if connectable(&after) {
        assert_eq!(got(share.by_handle(&after)), path("b/g", "f"));
        // The inode is cached now, with a path: the old handle finds it again.
        let hot = got(share.by_handle(&before));
        println!("the old handle, once the file is cached: {hot:?}");
    }
}

/// Microseconds a call: the least and the middle one of the means of eleven rounds, as others
/// use the machine too.
fn cost(what: &str, times: u32, mut call: impl FnMut()) {
    let mut rounds: Vec<f64> = (0..11)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..times {
                call();
            }
            start.elapsed().as_secs_f64() * 1e6 / f64::from(times)
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    println!("cost: {what:55} least {:7.2} us, median {:7.2} us", rounds[0], rounds[5]);
}

#[test]
fn what_it_costs() {
    let Some(mut lab) = Lab::new() else { return };
    lab.image("img");
    let m = lab.mount("img", "m");
    let deep = m.join("1/2/3/4/5/6/7");
    write(deep.join("f"), "f");
    write(m.join("f"), "f");
    let share = root(&m);
    let dir = open(&m);
    let fd = open(&m.join("f"));
    let (top, low) = (recipe(&m, "f"), recipe(&deep, "f"));
    let deep_dir = open(&deep);
    let name: &CStr = c"f";
    let o_path = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    cost("openat O_PATH + statx + close (a LOOKUP's calls)", 1000, || {
        let fd = rustix::fs::openat(&dir, name, o_path, Mode::empty()).expect("open");
        fdops::statx(fd.as_fd(), 0xfff, 0).expect("statx");
    });
    cost("name_to_handle_at, ext4", 1000, || {
        assert!(Handle::of(dir.as_fd(), name, fd.as_fd()).is_some());
    });
    let (proc_dir, proc_file) = (open(Path::new("/proc")), open(Path::new("/proc/version")));
    let in_proc = Handle::of(proc_dir.as_fd(), c"version", proc_file.as_fd());
    println!("a handle in /proc: {:?}", in_proc.map(|h| h.kind()));
    cost("name_to_handle_at, refused twice, then for identity", 1000, || {
        Handle::of(proc_dir.as_fd(), c"version", proc_file.as_fd());
    });
    cost("a whole recipe, fd in hand", 1000, || {
        Recipe::of_fd(dir.as_fd(), name, 1, fd.as_fd()).expect("recipe");
    });
    cost("generation: reopen + FS_IOC_GETVERSION + close", 1000, || {
        let real = fdops::reopen(fd.as_fd(), OFlags::RDONLY | OFlags::NONBLOCK).expect("open");
        let _ = rustix::fs::ioctl_getflags(&real);
    });
    cost("import by name", 1000, || {
        share.by_name(&low, deep_dir.as_fd()).expect("by name");
    });
    let wrong = Recipe { ino: 1, ..top.clone() };
    cost("open_by_handle_at + statx + close", 1000, || {
        share.by_handle(&wrong).expect_err("another number");
    });
    cost("import by handle, cached, depth 1", 1000, || {
        share.by_handle(&top).expect("by handle");
    });
    cost("import by handle, cached, depth 8", 1000, || {
        share.by_handle(&low).expect("by handle");
    });
    drop((share, dir, fd, deep_dir));

    for files in [10, 1000, 10_000] {
        cold_cost(&mut lab, &m, files);
    }
    // A directory at depth 8, by its handle.
    let dir = recipe(deep.parent().expect("a parent"), "7");
    lab.remount("img", "m");
    let share = root(&m);
    let start = Instant::now();
    share.by_handle(&dir).expect("a directory");
    println!("cost: a directory at depth 7 by handle, cold: {:?}", start.elapsed());
}

/// Ten imports out of a directory of so many files, after a remount (the device's own pages stay
/// cached, so this is the kernel's work without the disk's).
fn cold_cost(lab: &mut Lab, m: &Path, files: usize) {
    let wide = m.join(format!("wide-{files}"));
    fs::create_dir(&wide).expect("mkdir");
    for i in 0..files {
        File::create(wide.join(format!("f{i}"))).expect("create");
    }
    let recipes: Vec<_> = (0..10).map(|i| recipe(&wide, &format!("f{}", i * files / 10))).collect();
    for by_name in [false, true] {
        lab.remount("img", "m");
        let share = root(m);
        let wide_dir = by_name.then(|| open(&wide));
        let mut all: Vec<f64> = recipes
            .iter()
            .map(|recipe| {
                let start = Instant::now();
                let result = match &wide_dir {
                    Some(parent) => share.by_name(recipe, parent.as_fd()),
                    None => share.by_handle(recipe),
                };
                if by_name || connectable(recipe) {
                    result.expect("found");
                }
                start.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        all.sort_by(f64::total_cmp);
        let way = if by_name { "name" } else { "handle" };
        println!(
            "cost: by {way}, cold, directory of {files}: median {:.1} us, most {:.1} us",
            all[5], all[9]
        );
    }
}
