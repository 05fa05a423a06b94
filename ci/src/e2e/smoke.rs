//! What any file system must do, one small case each, always compared with the backing directory.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink,
};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom as Seek64,
    StatxFlags, XattrFlags,
};
use rustix::io::Errno;

use super::{Case, Rig};
use crate::guard::{Guard, Undo};
use crate::rig::{self, Daemon};
use crate::sandbox::{LoopFs, LoopShape};

pub const CASES: &[Case] = &[
    ("write_and_read", write_and_read),
    ("rename_and_unlink", rename_and_unlink),
    ("hard_links_keep_inode_and_nlink", hard_links),
    ("symlinks_and_special_files", special_files),
    ("names_of_all_kinds", names),
    ("attributes", attributes),
    ("set_id_bits_go_on_write", set_id_bits),
    ("programs_that_run_stay_whole", running_program),
    ("xattrs", xattrs),
    ("sparse_over_4_tib", sparse),
    ("append_is_atomic", append),
    ("unlinked_open_file_lives", unlinked_open),
    ("unnamed_temporary_file", tmpfile),
    ("copy_file_range", copy_file_range),
    ("rename_flags", rename_flags),
    ("statfs_is_the_backings", statfs),
    ("big_directory", big_directory),
    ("sub_directory_and_read_only", sub_directory),
    ("two_mounts_see_each_other", two_mounts),
    ("equal_inode_numbers_of_two_disks", two_disks),
    ("mount_below_a_share_is_hidden", mount_below),
    ("remount_finds_everything", remount),
];

fn write_and_read(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let path = mount.dir.join("file");
    // Sizes around a page, a READ of 128 KiB, and a record of 1 MiB.
    for len in [0usize, 1, 4095, 4096, 4097, 131_072, 1_048_575, 1_048_576, 1_048_577, 5_000_011] {
        let data: Vec<u8> = (0..len).map(|i| (i * 31 + i / 4096) as u8).collect();
        fs::write(&path, &data)?;
        ensure!(fs::read(&path)? == data, "{len} bytes differ through the mount");
        ensure!(fs::read(rig.backing.join("file"))? == data, "{len} bytes differ on the host");
    }
    File::options().write(true).open(&path)?.set_len(10)?;
    ensure!(fs::metadata(&path)?.len() == 10 && fs::read(&path)?.len() == 10);
    let missing = fs::read(mount.dir.join("missing")).map_err(|e| e.kind());
    ensure!(missing == Err(std::io::ErrorKind::NotFound));
    mount.umount()
}

fn rename_and_unlink(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let at = |name: &str| mount.dir.join(name);
    fs::create_dir_all(at("a/b"))?;
    fs::write(at("a/b/f"), "1")?;
    fs::rename(at("a/b/f"), at("a/g"))?;
    ensure!(fs::read(at("a/g"))? == b"1" && !at("a/b/f").try_exists()?);
    fs::rename(at("a"), at("c"))?;
    ensure!(fs::read(at("c/g"))? == b"1" && !at("a").try_exists()?);
    ensure!(fs::remove_dir(at("c")).map_err(|e| e.raw_os_error()).is_err());
    fs::remove_file(at("c/g"))?;
    fs::remove_dir_all(at("c"))?;
    ensure!(fs::read_dir(&rig.backing)?.next().is_none(), "the host still has something");
    mount.umount()
}

fn hard_links(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let (first, second) = (mount.dir.join("first"), mount.dir.join("second"));
    fs::write(&first, "x")?;
    fs::hard_link(&first, &second)?;
    let (one, two) = (fs::metadata(&first)?, fs::metadata(&second)?);
    ensure!(one.ino() == two.ino() && one.nlink() == 2 && two.nlink() == 2, "not one file");
    ensure!(one.ino() == fs::metadata(rig.backing.join("first"))?.ino(), "not the host's inode");
    fs::remove_file(&first)?;
    ensure!(fs::metadata(&second)?.nlink() == 1);
    mount.umount()
}

fn special_files(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let at = |name: &str| mount.dir.join(name);
    symlink("target/that/is not", at("link"))?;
    ensure!(fs::read_link(at("link"))? == Path::new("target/that/is not"));
    rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::from(0o640), 0)?;
    ensure!(fs::symlink_metadata(at("fifo"))?.file_type().is_fifo());
    drop(std::os::unix::net::UnixListener::bind(at("socket"))?);
    ensure!(fs::symlink_metadata(rig.backing.join("socket"))?.file_type().is_socket());
    // A FIFO works between processes of one guest: the kernel serves it.
    let talk = "cat \"$1\" & printf through > \"$1\"; wait";
    let said = crate::proc::Cmd::new("sh").args(["-c", talk, "sh"]).arg(at("fifo")).run()?;
    ensure!(said == "through", "the FIFO gave {said}");
    mount.umount()
}

fn names(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let mut names: Vec<OsString> =
        ["a space", "newline\n", "ünïcode", "-rf", "...", "\u{1}"].map(OsString::from).to_vec();
    names.push(OsString::from_vec(vec![0xff, 0xfe, b'x', 0x80]));
    names.push(OsString::from("n".repeat(255)));
    for name in &names {
        fs::write(mount.dir.join(name), name.as_bytes())?;
    }
    let list = |dir: &Path| -> Result<BTreeSet<OsString>> {
        Ok(fs::read_dir(dir)?.map(|e| e.map(|e| e.file_name())).collect::<Result<_, _>>()?)
    };
    let expected: BTreeSet<OsString> = names.into_iter().collect();
    ensure!(list(&mount.dir)? == expected && list(&rig.backing)? == expected, "names differ");
    let too_long = fs::write(mount.dir.join("n".repeat(256)), "");
    ensure!(too_long.map_err(|e| e.raw_os_error()) == Err(Some(Errno::NAMETOOLONG.raw_os_error())));
    mount.umount()
}

fn attributes(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let (path, host) = (mount.dir.join("f"), rig.backing.join("f"));
    fs::write(&path, vec![7; 5000])?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4751))?;
    std::os::unix::fs::chown(&path, Some(1234), Some(5678))?;
    let times = fs::FileTimes::new();
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(4_000_000_000, 123_456_789);
    File::open(&path)?.set_times(times.set_modified(time).set_accessed(time))?;
    let all = |path: &Path| -> Result<_> {
        let m = fs::symlink_metadata(path)?;
        Ok([
            m.ino(),
            m.nlink(),
            u64::from(m.mode()),
            u64::from(m.uid()),
            u64::from(m.gid()),
            m.size(),
            m.blocks(),
            m.mtime() as u64,
            m.mtime_nsec() as u64,
            m.atime() as u64,
            m.ctime() as u64,
            m.ctime_nsec() as u64,
        ])
    };
    let (guest, on_host) = (all(&path)?, all(&host)?);
    ensure!(guest == on_host, "attributes differ: {guest:?} and {on_host:?}");
    let birth = |path: &Path| -> Result<_> {
        let stat = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::BTIME)?;
        ensure!(stat.stx_mask & StatxFlags::BTIME.bits() != 0, "no birth time: {path:?}");
        Ok((stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec))
    };
    ensure!(birth(&path)? == birth(&host)?, "birth times differ");
    mount.umount()
}

/// A write by somebody without CAP_FSETID takes set-uid and set-gid away; one by root does not.
fn set_id_bits(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "allow_other,default_permissions")?;
    let path = mount.dir.join("f");
    let mode = |path: &Path| fs::metadata(path).map(|m| m.mode() & 0o7777);
    let set = || -> Result<()> {
        fs::write(&path, "x")?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777))?;
        ensure!(mode(&path)? == 0o6777);
        Ok(())
    };
    for change in ["echo y >> \"$1\"", "echo y > \"$1\"", "truncate -s 5 \"$1\""] {
        set()?;
        let nobody = crate::proc::Cmd::new("setpriv").args(["--reuid=65534", "--regid=65534"]);
        let nobody = nobody.args(["--clear-groups", "sh", "-c", change, "sh"]);
        nobody.arg(&path).run()?;
        ensure!(mode(&path)? == 0o777, "`{change}` left {:o}", mode(&path)?);
        ensure!(mode(&rig.backing.join("f"))? == 0o777, "the host kept the bits");
    }
    mount.umount()
}

/// O_TRUNC without writing: the kernel asks for the file first, and refuses then.
fn running_program(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let path = mount.dir.join("sleep");
    let len = fs::copy("/bin/sleep", &path)?;
    let mut child = std::process::Command::new(&path).arg("60").spawn()?;
    let refused = rustix::fs::open(&path, OFlags::RDONLY | OFlags::TRUNC, Mode::empty());
    let lives = child.try_wait();
    child.kill()?;
    child.wait()?;
    ensure!(refused.is_err_and(|errno| errno == Errno::TXTBSY), "opened while it runs");
    ensure!(lives?.is_none() && fs::metadata(rig.backing.join("sleep"))?.len() == len, "cut off");
    mount.umount()
}

fn xattrs(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let (path, host) = (mount.dir.join("f"), rig.backing.join("f"));
    fs::write(&path, "")?;
    let value: Vec<u8> = (0..2000u32).map(|i| i as u8).collect();
    rustix::fs::setxattr(&path, "user.large", &value, XattrFlags::CREATE)?;
    rustix::fs::setxattr(&path, "user.empty", b"", XattrFlags::empty())?;
    let again = rustix::fs::setxattr(&path, "user.empty", b"", XattrFlags::CREATE);
    ensure!(again == Err(Errno::EXIST));
    let mut buffer = vec![0; 4096];
    for at in [&path, &host] {
        let len = rustix::fs::getxattr(at, "user.large", &mut buffer[..])?;
        ensure!(buffer[..len] == value[..], "value differs at {at:?}");
    }
    ensure!(rustix::fs::getxattr(&path, "user.large", &mut buffer[..10]) == Err(Errno::RANGE));
    let len = rustix::fs::listxattr(&path, &mut buffer[..])?;
    let names: BTreeSet<&[u8]> =
        buffer[..len].split(|b| *b == 0).filter(|n| !n.is_empty()).collect();
    ensure!(names == BTreeSet::from([&b"user.large"[..], b"user.empty"]), "names: {names:?}");
    rustix::fs::removexattr(&path, "user.large")?;
    let gone = rustix::fs::getxattr(&host, "user.large", &mut buffer[..]);
    ensure!(gone == Err(Errno::NODATA));
    mount.umount()
}

fn sparse(rig: &Rig) -> Result<()> {
    const FAR: u64 = 5 << 40;
    let mount = rig.mount("mnt", "")?;
    let path = mount.dir.join("sparse");
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    file.write_all_at(b"near", 0)?;
    file.write_all_at(b"far", FAR)?;
    file.sync_all()?;
    let meta = file.metadata()?;
    ensure!(meta.len() == FAR + 3 && meta.blocks() < 100, "not sparse: {} blocks", meta.blocks());
    let mut bytes = [0; 3];
    file.read_exact_at(&mut bytes, FAR)?;
    ensure!(&bytes == b"far");
    let data = rustix::fs::seek(&file, Seek64::Data(1 << 20))?;
    ensure!(data == FAR, "SEEK_DATA says {data}");
    let hole = rustix::fs::seek(&file, Seek64::Hole(0))?;
    ensure!(hole <= 65536, "SEEK_HOLE says {hole}");
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, FAR, 4096)?;
    file.read_exact_at(&mut bytes, FAR)?;
    ensure!(bytes == [0; 3] && file.metadata()?.len() == FAR + 3);
    rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 0, 4096)?;
    let mut near = [1; 4];
    file.read_exact_at(&mut near, 0)?;
    ensure!(near == [0; 4]);
    drop(file);
    mount.umount()
}

/// Two descriptors that append by turns never write over each other, in every cache mode.
fn append(rig: &Rig) -> Result<()> {
    for (name, options) in [("plain", ""), ("back", "cache=always,writeback")] {
        let mount = rig.mount(name, options)?;
        let path = mount.dir.join(name);
        let open = || OpenOptions::new().append(true).create(true).open(&path);
        let (mut one, mut two) = (open()?, open()?);
        let mut expected = Vec::new();
        for n in 0..200 {
            let line = format!("line {n}\n");
            let file = if n % 2 == 0 { &mut one } else { &mut two };
            file.write_all(line.as_bytes())?;
            expected.extend_from_slice(line.as_bytes());
        }
        drop((one, two));
        ensure!(fs::read(&path)? == expected, "appended lines differ ({name})");
        mount.umount()?;
        ensure!(fs::read(rig.backing.join(name))? == expected, "the host's differ ({name})");
    }
    Ok(())
}

fn unlinked_open(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let path = mount.dir.join("f");
    let mut file = File::options().read(true).write(true).create_new(true).open(&path)?;
    file.write_all(b"before")?;
    fs::remove_file(&path)?;
    file.write_all(b" and after")?;
    file.seek(SeekFrom::Start(0))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    ensure!(text == "before and after" && file.metadata()?.nlink() == 0);
    fs::write(&path, "new")?;
    let to = mount.dir.join("moved");
    let mut open = File::options().read(true).append(true).open(&path)?;
    fs::rename(&path, &to)?;
    open.write_all(b"er")?;
    ensure!(fs::read(&to)? == b"newer");
    drop((file, open));
    mount.umount()
}

fn tmpfile(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let flags = OFlags::TMPFILE.union(OFlags::RDWR).bits() as i32;
    let mut file =
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(&mount.dir)?;
    file.write_all(b"unnamed")?;
    ensure!(fs::read_dir(&mount.dir)?.next().is_none());
    let fd = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    rustix::fs::linkat(CWD, fd, CWD, mount.dir.join("named"), AtFlags::SYMLINK_FOLLOW)?;
    ensure!(fs::read(rig.backing.join("named"))? == b"unnamed");
    drop(file);
    mount.umount()
}

fn copy_file_range(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i / 7) as u8).collect();
    fs::write(mount.dir.join("from"), &data)?;
    let from = File::open(mount.dir.join("from"))?;
    let to = File::create(mount.dir.join("to"))?;
    let (mut from_at, mut to_at) = (0, 0);
    let before = rig.daemon.counters()?.bytes_read;
    while from_at < data.len() as u64 {
        let left = data.len() - from_at as usize;
        let n =
            rustix::fs::copy_file_range(&from, Some(&mut from_at), &to, Some(&mut to_at), left)?;
        ensure!(n > 0, "copied nothing at {from_at}");
    }
    let moved = rig.daemon.counters()?.bytes_read - before;
    drop((from, to));
    ensure!(moved == 0, "{moved} bytes went through the guest: not copied on the host");
    ensure!(fs::read(rig.backing.join("to"))? == data);
    mount.umount()
}

fn rename_flags(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let at = |name: &str| mount.dir.join(name);
    fs::write(at("a"), "a")?;
    fs::write(at("b"), "b")?;
    let rename = |flags| rustix::fs::renameat_with(CWD, at("a"), CWD, at("b"), flags);
    ensure!(rename(RenameFlags::NOREPLACE) == Err(Errno::EXIST));
    rename(RenameFlags::EXCHANGE)?;
    ensure!(fs::read(at("a"))? == b"b" && fs::read(at("b"))? == b"a", "not exchanged");
    mount.umount()
}

fn statfs(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "")?;
    let of = |path: &Path| -> Result<[u64; 4]> {
        let stat = rustix::fs::statvfs(path)?;
        Ok([stat.f_blocks, stat.f_bsize, stat.f_files, stat.f_namemax])
    };
    let (guest, host) = (of(&mount.dir)?, of(&rig.backing)?);
    ensure!(guest == host, "{guest:?} and {host:?}");
    mount.umount()
}

/// 100,000 entries, made on the host: listed whole through both readdir and readdirplus, each with
/// its attributes, as `ls -l` asks for them; twice, so that what lost its fd is asked for again.
fn big_directory(rig: &Rig) -> Result<()> {
    const ENTRIES: usize = 100_000;
    let dir = rig.backing.join("big");
    fs::create_dir(&dir)?;
    for n in 0..ENTRIES {
        File::create(dir.join(format!("entry-{n:06}")))?;
    }
    let mount = rig.mount("mnt", "")?;
    let seen: BTreeSet<OsString> = fs::read_dir(mount.dir.join("big"))?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    ensure!(seen.len() == ENTRIES, "{} entries of {ENTRIES}", seen.len());
    ensure!(seen.contains(OsStr::new("entry-099999")));
    for _ in 0..2 {
        for name in &seen {
            let meta = fs::symlink_metadata(mount.dir.join("big").join(name))?;
            ensure!(meta.is_file() && meta.len() == 0, "{name:?} is {meta:?}");
        }
    }
    mount.umount()
}

fn sub_directory(rig: &Rig) -> Result<()> {
    fs::create_dir_all(rig.backing.join("a/b"))?;
    fs::write(rig.backing.join("a/b/f"), "x")?;
    let sub = rig.daemon.mount(&rig.sandbox, "d/a/b", "sub", "")?;
    ensure!(fs::read(sub.dir.join("f"))? == b"x");
    // Above the root of a mount is the guest's own tree, never the share's.
    ensure!(!sub.dir.join("../a").try_exists()?);
    let read_only = |error: std::io::Result<()>| {
        error.map_err(|e| e.raw_os_error()) == Err(Some(Errno::ROFS.raw_os_error()))
    };
    for (share, name, options) in [("ro", "share-ro", ""), ("d", "option-ro", "ro")] {
        let mount = rig.daemon.mount(&rig.sandbox, share, name, options)?;
        ensure!(fs::read(mount.dir.join("a/b/f"))? == b"x");
        ensure!(read_only(fs::write(mount.dir.join("new"), "")), "{name}: a write was let pass");
        ensure!(read_only(fs::remove_file(mount.dir.join("a/b/f"))), "{name}: unlink passed");
        mount.umount()?;
    }
    sub.umount()
}

fn two_mounts(rig: &Rig) -> Result<()> {
    let one = rig.mount("one", "cache=never")?;
    let two = rig.mount("two", "cache=never")?;
    for n in 0..100 {
        let name = format!("f{}", n % 10);
        let text = format!("round {n}");
        fs::write(one.dir.join(&name), &text)?;
        ensure!(fs::read(two.dir.join(&name))? == text.as_bytes(), "two reads something else");
        fs::write(two.dir.join(&name), "back")?;
        ensure!(fs::read(one.dir.join(&name))? == b"back", "one reads something else");
        if n % 3 == 0 {
            fs::remove_file(two.dir.join(&name))?;
            ensure!(!one.dir.join(&name).try_exists()?, "one still has it");
        }
    }
    ensure!(rig.daemon.counters()?.sessions == 2);
    one.umount()?;
    ensure!(two.dir.join("f1").try_exists()?, "the other mount is gone too");
    two.umount()
}

/// Two fresh ext4 file systems give the same inode numbers: their files must not be mixed up.
fn two_disks(rig: &Rig) -> Result<()> {
    let shape = LoopShape::ext4(64 << 20);
    let disks =
        [LoopFs::new(&rig.sandbox, "disk-a", shape)?, LoopFs::new(&rig.sandbox, "disk-b", shape)?];
    let shares = [rig::share("a", &disks[0].dir), rig::share("b", &disks[1].dir)];
    let daemon = Daemon::start(&rig.sandbox, &rig.bins, "two", &shares, &[])?;
    let a = daemon.mount(&rig.sandbox, "a", "mnt-a", "")?;
    let b = daemon.mount(&rig.sandbox, "b", "mnt-b", "")?;
    for n in 0..20 {
        fs::write(a.dir.join(format!("f{n}")), format!("a{n}"))?;
        fs::write(b.dir.join(format!("f{n}")), format!("b{n}"))?;
    }
    for n in 0..20 {
        let (of_a, of_b) = (a.dir.join(format!("f{n}")), b.dir.join(format!("f{n}")));
        ensure!(fs::metadata(&of_a)?.ino() == fs::metadata(&of_b)?.ino(), "no equal numbers");
        ensure!(fs::read(of_a)? == format!("a{n}").as_bytes(), "a's file {n} is another");
        ensure!(fs::read(of_b)? == format!("b{n}").as_bytes(), "b's file {n} is another");
    }
    a.umount()?;
    b.umount()?;
    daemon.stop()
}

/// `submounts=hide`, the default: the directory under the mount is served, not the other disk.
fn mount_below(rig: &Rig) -> Result<()> {
    let below = rig.backing.join("below");
    fs::create_dir(&below)?;
    fs::write(below.join("under"), "under")?;
    let disk = LoopFs::new(&rig.sandbox, "disk", LoopShape::ext4(64 << 20))?;
    fs::write(disk.dir.join("over"), "over")?;
    let bind = rustix::mount::mount_bind(&disk.dir, &below);
    bind.with_context(|| format!("bind on {}", below.display()))?;
    let _guard = Guard::new(Undo::Mount(below.clone()));
    let shares = [rig::share("d", &rig.backing)];
    let daemon = Daemon::start(&rig.sandbox, &rig.bins, "below", &shares, &[])?;
    let mount = daemon.mount(&rig.sandbox, "d", "mnt", "")?;
    let seen = fs::read_dir(mount.dir.join("below"))?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<Vec<_>, _>>()?;
    ensure!(seen == ["under"], "below the mount stands {seen:?}");
    mount.umount()?;
    daemon.stop()
}

fn remount(rig: &Rig) -> Result<()> {
    for round in 0..5 {
        let mount = rig.mount(&format!("mnt{round}"), "")?;
        for before in 0..round {
            let path = mount.dir.join(format!("dir{before}/f"));
            ensure!(fs::read(&path)? == [before as u8], "{path:?}");
        }
        fs::create_dir(mount.dir.join(format!("dir{round}")))?;
        fs::write(mount.dir.join(format!("dir{round}/f")), [round as u8])?;
        mount.umount()?;
    }
    Ok(())
}
