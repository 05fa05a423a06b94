//! Mounting and unmounting: what is wrong with a mount point is said with its cure, guards take
//! down what they mounted, and users without rights go through `fusermount3`.

mod common;

use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::*;
use fuser_fork::mount::{Method, MountError, MountOptions, RootKind, Unmounted};
use fuser_fork::mount::{mount, unmount_by_force, unmount_path};
use fuser_fork::mountinfo::find_mounts;
use fuser_fork::reader::Clones;
use ringfs_wire::abi::Opcode;

const NOBODY: u32 = 65534;

/// Says that mounting failed as it should: with the path (or none), and the words of the cure.
fn check(path: &Path, options: &MountOptions, expected: &str) {
    let error = mount(path, options).expect_err(expected);
    let text = error.to_string();
    assert!(text.contains(expected), "{text:?} lacks {expected:?}");
}

#[test]
fn mount_points_that_are_none() {
    bounded("mount_points_that_are_none", |dir| {
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("file");
        symlink("loop", dir.path().join("loop")).expect("link");
        symlink("nowhere", dir.path().join("dangling")).expect("link");
        let missing = dir.path().join("missing");
        check(&missing, &options(), &format!("mkdir -p {}", missing.display()));
        check(&missing.join("deeper"), &options(), "mkdir -p");
        check(&dir.path().join("dangling"), &options(), "does not exist");
        check(&dir.path().join("loop"), &options(), "symbolic links");
        check(&file, &options(), "is not a directory");
        check(&file.join("below"), &options(), "does not exist");
        check(&dir.path().join(".."), &options(), "ends in `..`");
        check(&dir.mnt(), &MountOptions { root: RootKind::File, ..options() }, "regular file");
        let no_device = MountOptions { device: "/nonexistent/fuse".into(), ..options() };
        check(&dir.mnt(), &no_device, "modprobe fuse");
        let no_fuse = MountOptions { device: "/dev/null".into(), ..options() };
        check(&dir.mnt(), &no_fuse, "not the FUSE device");
        let no_program = MountOptions {
            method: Method::Fusermount,
            fusermount: "/nonexistent/fusermount3".into(),
            ..options()
        };
        check(&dir.mnt(), &no_program, "package fuse3");
        let error = unmount_path(&dir.mnt(), false).expect_err("not mounted").to_string();
        assert!(error.contains("no ringfs mount"), "{error}");
        assert!(matches!(
            unmount_path(&missing.join("deeper"), true),
            Err(MountError::Missing { .. })
        ));
        assert!(!dir.is_mounted());
    });
}

#[test]
fn a_taken_mount_point_is_refused_dead_or_not() {
    bounded("a_taken_mount_point_is_refused_dead_or_not", |dir| {
        // Not even INIT is answered: a stat would hang.
        let (_device, guard) = mount(&dir.mnt(), &options()).expect("mount");
        symlink(dir.mnt(), dir.path().join("link")).expect("link");
        for path in [dir.mnt(), dir.path().join("link")] {
            check(&path, &options(), "mount point already (of share@vsock:2:5640)");
        }
        assert_eq!(guard.unmount().expect("unmount"), Unmounted::Clean);
    });
}

#[test]
fn the_mount_table_shows_what_was_asked() {
    bounded("the_mount_table_shows_what_was_asked", |dir| {
        let mut asked = options();
        for word in ["ro", "noexec", "noatime"] {
            assert!(asked.apply_word(word));
        }
        let (device, guard) = mount(&dir.mnt(), &asked).expect("mount");
        let mounts = find_mounts().expect("mountinfo");
        let ours = mounts.iter().find(|mount| mount.mount_point == dir.mnt()).expect("ours");
        assert_eq!(ours.source, "share@vsock:2:5640");
        assert_eq!(guard.dev_minor(), Some(ours.dev_minor));
        assert_eq!(guard.mountpoint(), dir.mnt());
        for word in ["ro", "nosuid", "nodev", "noexec", "noatime"] {
            assert!(ours.options.split(',').any(|have| have == word), "{word}: {ours:?}");
        }
        for word in ["allow_other", "default_permissions", "user_id=0", "max_read=65536"] {
            assert!(ours.super_options.split(',').any(|have| have == word), "{word}: {ours:?}");
        }
        drop(guard);
        assert!(!dir.is_mounted());
        drop(device);
    });
}

#[test]
fn guards_take_down_their_own_mount_only() {
    bounded("guards_take_down_their_own_mount_only", |dir| {
        // In use by this process: detached.
        let (device, guard) = mounted(dir);
        let lane = serve(Arc::new(device));
        let open = std::fs::File::open(dir.mnt().join("hello")).expect("open");
        assert!(matches!(unmount_path(&dir.mnt(), false), Err(MountError::Busy { .. })));
        assert_eq!(guard.unmount().expect("unmount"), Unmounted::Detached);
        assert!(!dir.is_mounted());
        drop(open);
        lane.join().expect("lane");
        // Unmounted by somebody else, and mounted again: the old guard leaves the new mount alone.
        let (old_device, old) = mounted(dir);
        unmount_path(&dir.mnt(), false).expect("unmount");
        assert!(!old.is_mounted());
        let (new_device, new) = mounted(dir);
        drop(old);
        assert!(new.is_mounted());
        drop(old_device);
        // Covered by another file system: nothing is unmounted, and the error says why.
        let flags = rustix::mount::MountFlags::empty();
        let session = Arc::new(new_device);
        let lane = serve(Arc::clone(&session));
        rustix::mount::mount("none", dir.mnt(), "tmpfs", flags, None).expect("tmpfs");
        let path = unmount_path(&dir.mnt(), true);
        let number = new.dev_minor().expect("a connection number");
        let forced = unmount_by_force(session.as_fd(), number);
        let none = rustix::mount::UnmountFlags::empty();
        rustix::mount::unmount(dir.mnt(), none).expect("tmpfs");
        assert!(matches!(path, Err(MountError::Covered { .. })), "{path:?}");
        assert!(matches!(forced, Err(MountError::Covered { .. })), "{forced:?}");
        let force = || unmount_by_force(session.as_fd(), number).expect("unmount");
        assert!(new.is_mounted() && force());
        assert!(!dir.is_mounted() && !force());
        lane.join().expect("lane");
    });
}

#[test]
fn a_single_file_can_be_the_root() {
    bounded("a_single_file_can_be_the_root", |dir| {
        let file = dir.path().join("one");
        std::fs::write(&file, "below").expect("file");
        let asked = MountOptions { root: RootKind::File, ..options() };
        let (device, guard) = mount(&file, &asked).expect("mount");
        answer_init(&device);
        assert!(guard.is_mounted());
        assert_eq!(guard.unmount().expect("unmount"), Unmounted::Clean);
        assert_eq!(std::fs::read(&file).expect("read"), b"below");
    });
}

/// Where the user of the next test finds his mount point; set only in the process of that user.
const USER_DIR: &str = "RINGFS_TEST_USER_DIR";

const FAILING_PROGRAM: &str = r#"cat <<'END'
#!/bin/sh
echo 'fusermount3: failed to open /dev/fuse: Permission denied' >&2
exit 1
END"#;

/// Makes a program of what `script` prints. A shell does it: a file that this process itself has
/// open for writing may be inherited by what another thread starts, and is then "busy".
fn make(program: &Path, script: &str) {
    let script = format!("({script}\n) > \"$1\"; chmod 755 \"$1\"");
    let mut shell = Command::new("sh");
    let status = shell.args(["-ec", &script, "sh"]).arg(program).status().expect("sh");
    assert!(status.success());
}

#[test]
fn a_device_closed_to_users_is_said_with_its_cure() {
    bounded("a_device_closed_to_users_is_said_with_its_cure", |dir| {
        // fusermount3 opens the device with its user's rights.
        let program = dir.path().join("fusermount");
        make(&program, FAILING_PROGRAM);
        let asked = MountOptions { method: Method::Fusermount, fusermount: program, ..options() };
        check(&dir.mnt(), &asked, "chmod 666 /dev/fuse");
        let silent = MountOptions { fusermount: "true".into(), ..asked };
        check(&dir.mnt(), &silent, "passed no device back");
        let fails = MountOptions { fusermount: "false".into(), ..silent };
        check(&dir.mnt(), &fails, "exit status: 1");
    });
}

/// Puts a device that is open to users in the place of the machine's, and goes on as told.
const IN_NAMESPACE: &str =
    r#"mknod "$1" c 10 229; chmod 666 "$1"; mount --bind "$1" /dev/fuse; shift; exec "$@""#;

#[test]
fn users_mount_by_fusermount3() {
    bounded("users_mount_by_fusermount3", |dir| {
        let skip = |why: &str| println!("SKIPPED users_mount_by_fusermount3: {why}");
        if !rustix::process::geteuid().is_root() {
            return skip("needs root to become another user");
        }
        for program in ["unshare", "setpriv", "fusermount3"] {
            if Command::new(program).arg("--version").output().is_err() {
                return skip(&format!("{program} is not installed"));
            }
        }
        // The user may not reach the build directory: give him a copy of this program.
        let exe = dir.path().join("user test");
        make(&exe, &format!("cat {:?}", std::env::current_exe().expect("exe")));
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).expect("chmod");
        if let Err(error) = chown(dir.mnt(), Some(NOBODY), Some(NOBODY)) {
            return skip(&format!("no other user in this user namespace: {error}"));
        }
        // A mount namespace of its own, where the device is open to users as udev makes it.
        let output = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "--", "sh", "-ec", IN_NAMESPACE, "sh"])
            .arg(dir.path().join("fuse"))
            .args(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(&exe)
            .args(["--exact", "as_the_user", "--nocapture"])
            .env(USER_DIR, dir.mnt())
            .output()
            .expect("unshare");
        let stdout = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr);
        println!("{stdout}{stderr}");
        assert!(output.status.success(), "the user's part failed");
        assert!(stdout.contains("the user has mounted, read and unmounted"));
        assert!(!dir.is_mounted());
    });
}

/// The part of [`users_mount_by_fusermount3`] that runs as another user; nothing by itself.
#[test]
fn as_the_user() {
    let Some(mnt) = std::env::var_os(USER_DIR).map(PathBuf::from) else { return };
    bounded("as_the_user", move |_| {
        let direct = MountOptions { method: Method::Direct, ..options() };
        let error = mount(&mnt, &direct).expect_err("no rights");
        assert!(matches!(error, MountError::Permission { .. }), "{error}");
        let no_program =
            MountOptions { fusermount: "/nonexistent/fusermount3".into(), ..options() };
        check(&mnt, &no_program, "package fuse3");
        // Not his directory.
        check(Path::new("/usr"), &options(), "fusermount3 failed at /usr");
        let (device, guard) = mount(&mnt, &options()).expect("mount");
        answer_init(&device);
        let ours = |mount: &fuser_fork::mountinfo::MountInfo| mount.mount_point == mnt;
        let mounts = find_mounts().expect("mountinfo");
        let info = mounts.iter().find(|mount| ours(mount)).expect("a ringfs mount");
        assert_eq!(info.source, "share@vsock:2:5640");
        assert!(!info.super_options.contains("allow_other"), "{info:?}");
        let clones = Clones::open(device, 2);
        assert!(clones.shortfall().is_none(), "{:?}", clones.shortfall());
        let lanes: Vec<_> = clones.devices().iter().cloned().map(serve).collect();
        let read = read_aside(mnt.join("hello")).join().expect("task").expect("read");
        assert_eq!(read, HELLO);
        assert_eq!(guard.unmount().expect("unmount"), Unmounted::Clean);
        for lane in lanes {
            assert!(lane.join().expect("lane").keys().all(|&code| code != Opcode::Init as u32));
        }
        let (device, guard) = mount(&mnt, &options()).expect("mount again");
        guard.leave();
        unmount_path(&mnt, true).expect("lazy unmount");
        assert!(!find_mounts().expect("mountinfo").iter().any(ours));
        drop(device);
        println!("the user has mounted, read and unmounted");
    });
}
