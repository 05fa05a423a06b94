//! A file system that stands still: who is served from it waits, and nobody else.

mod common;

use common::*;
use ringfs_wire::abi::{self, Opcode};
use rustix::mount::{UnmountFlags, unmount};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use zerocopy::IntoBytes;

/// An ext4 of its own on a loop device, which thaws and goes with its test.
struct Disk {
    path: PathBuf,
    frozen: bool,
}

impl Disk {
    /// `None`, with a line that says why, where there is no loop device.
    fn at(dir: &Path, name: &str) -> Option<Disk> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
            println!("SKIPPED: loop devices need root and /dev/loop-control");
            return None;
        }
        let (image, path) = (dir.join(format!("{name}.img")), dir.join(name));
        let file = std::fs::File::create(&image).expect("image");
        file.set_len(64 << 20).expect("length of the image");
        std::fs::create_dir(&path).expect("mkdir");
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-N", "4096"]).arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&path));
        Some(Disk { path, frozen: false })
    }

    fn freeze(&mut self) {
        run(Command::new("fsfreeze").arg("--freeze").arg(&self.path));
        self.frozen = true;
    }

    fn thaw(&mut self) {
        if std::mem::take(&mut self.frozen) {
            run(Command::new("fsfreeze").arg("--unfreeze").arg(&self.path));
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.thaw();
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}

fn run(command: &mut Command) {
    assert!(command.status().expect("run").success(), "{command:?}");
}

/// A shard of one CPU, two shares, and a listener for each of two guests: so they are two peers.
fn daemon(engine: &str, shares: [&Path; 2]) -> Daemon {
    Daemon::start_with_file(|dir| {
        let [s, t] = ["s", "t"].map(|name| dir.join(name).display().to_string());
        let [a, b] = shares.map(Path::display);
        format!(
            "grace = 0\nstate-dir = 'none'\nengine = '{engine}'\ncpus = '0'\n\
             [[listen]]\naddress = 'unix:{s}'\n[[listen]]\naddress = 'unix:{t}'\n\
             [share.a]\npath = '{a}'\n[share.b]\npath = '{b}'\n"
        )
    })
}

fn files_of(guest: &mut Guest, count: usize) -> Vec<(u64, u64)> {
    (0..count).map(|n| guest.create(&format!("file{n}")).expect("create")).collect()
}

/// One guest's WRITEs hang, more than there are threads for, each to a file of its own; those of
/// another one go on, whatever file they are to.
fn others_write_while_one_hangs(engine: &str) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let Some(mut frozen) = Disk::at(dir.path(), "a") else { return };
    let Some(other) = Disk::at(dir.path(), "b") else { return };
    let daemon = daemon(engine, [&frozen.path, &other.path]);
    let before = daemon.gauges_at_rest();
    let mut foe = mount(&daemon.path("s"), "a").expect("welcome");
    let mut friend = mount(&daemon.path("t"), "b").expect("welcome");
    let (stuck, free) = (files_of(&mut foe, 100), files_of(&mut friend, 64));
    frozen.freeze();
    let data = pattern(1, 1024);
    let start = |guest: &mut Guest, files: &[(u64, u64)], offset| {
        files.iter().for_each(|&(node, fh)| {
            guest.start(Opcode::Write, node, &write_args(fh, offset, &data));
        });
        guest.flush();
    };
    // All in one turn: so a thread of the kernel that takes what waits may take of both guests.
    daemon.while_stopped(|| {
        start(&mut foe, &stuck, 0);
        start(&mut friend, &free, 4096);
    });
    let begun = Instant::now();
    free.iter().for_each(|_| assert!(friend.reply().expect("an answer").1.is_ok()));
    for &(node, fh) in &free {
        assert_eq!(friend.write(node, fh, 0, &data), Ok(1024));
        let fsync = abi::FsyncIn { fh, ..Default::default() };
        friend.call(Opcode::Fsync, node, fsync.as_bytes()).expect("fsync");
        assert!(begun.elapsed() < LIMIT, "a friend is held up");
    }
    println!("{engine}: the friend took {:?}", begun.elapsed());
    frozen.thaw();
    for _ in &stuck {
        let (_, result) = foe.reply().expect("an answer");
        assert!(result.is_ok(), "{result:?}");
    }
    for &(node, fh) in &stuck {
        assert!(foe.read(node, fh, 0, 1024) == Ok(data.clone()));
    }
    goodbye(foe);
    goodbye(friend);
    daemon.settles_at(&before);
    daemon.stop_well();
}

#[test]
fn others_write_while_one_hangs_uring() {
    others_write_while_one_hangs("uring");
}

#[test]
fn others_write_while_one_hangs_threads() {
    others_write_while_one_hangs("threads");
}
