//! Every function of `fdops` on real files, and what each must refuse.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use ringfs_server::fdops::{self, DirEntries, FsKind, LocalFs, SetTime};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

fn temp() -> tempfile::TempDir {
    tempfile::tempdir().expect("temp dir")
}

fn file(dir: &Path, name: &str, content: &[u8]) -> File {
    std::fs::write(dir.join(name), content).expect("write");
    File::options().read(true).write(true).open(dir.join(name)).expect("open")
}

fn o_path(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .expect("O_PATH")
}

#[test]
fn copies_in_the_host_and_says_honestly_what_it_cannot() {
    let dir = temp();
    let from = file(dir.path(), "from", b"0123456789");
    let to = file(dir.path(), "to", b"");
    let copy = fdops::copy_file_range;
    assert_eq!(copy(from.as_fd(), 2, to.as_fd(), 1, 5), Ok(5));
    assert_eq!(std::fs::read(dir.path().join("to")).expect("read"), b"\x0023456");
    assert_eq!(copy(from.as_fd(), 8, to.as_fd(), 0, 100), Ok(2));
    assert_eq!(copy(from.as_fd(), 10, to.as_fd(), 0, 100), Ok(0));
    assert_eq!(copy(from.as_fd(), 0, from.as_fd(), 1, 5), Err(Errno::INVAL), "overlap");
    assert_eq!(copy(from.as_fd(), u64::MAX, to.as_fd(), 0, 5), Err(Errno::OVERFLOW));
    assert_eq!(copy(from.as_fd(), 0, to.as_fd(), i64::MAX as u64, 5), Err(Errno::OVERFLOW));
    let read_only = File::open(dir.path().join("to")).expect("open");
    assert_eq!(copy(from.as_fd(), 0, read_only.as_fd(), 0, 5), Err(Errno::BADF));

    // Another file system: the guest's kernel copies by itself on this very errno.
    let shm = tempfile::tempdir_in("/dev/shm").expect("tmpfs");
    let elsewhere = file(shm.path(), "to", b"");
    if fdops::fs_kind(from.as_fd()) == fdops::fs_kind(elsewhere.as_fd()) {
        println!("SKIPPED the copy across file systems: the temp dir is on tmpfs too");
        return;
    }
    assert_eq!(copy(from.as_fd(), 0, elsewhere.as_fd(), 0, 5), Err(Errno::XDEV));
}

#[test]
fn statx_has_the_birth_time_and_only_bits_that_fuse_has() {
    let dir = temp();
    let f = file(dir.path(), "f", b"hello");
    let meta = f.metadata().expect("metadata");
    for fd in [f.as_fd(), o_path(&dir.path().join("f")).as_fd()] {
        let got = fdops::statx(fd, u32::MAX, !0x6000).expect("statx");
        assert_eq!((got.ino, got.size, u32::from(got.mode)), (meta.ino(), 5, meta.mode()));
        let mtime = (got.mtime.tv_sec, i64::from(got.mtime.tv_nsec));
        assert_eq!(mtime, (meta.mtime(), meta.mtime_nsec()));
        assert_eq!(got.mask & !0xfff, 0);
        assert_ne!(got.mask & 0x800, 0, "no birth time here");
        let born = meta.created().expect("btime").duration_since(std::time::UNIX_EPOCH);
        assert_eq!(got.btime.tv_sec as u64, born.expect("after 1970").as_secs());
    }
    assert!(fdops::statx(f.as_fd(), 0x7ff, 0x6000).is_err(), "FORCE and DONT together");
    assert!(fdops::statx(f.as_fd(), 0x7ff, 0x2000).is_ok(), "a forced sync that was asked for");
}

#[test]
fn a_nameless_file_is_made_changed_and_linked() {
    let dir = temp();
    for dir_fd in [File::open(dir.path()).expect("dir").into(), o_path(dir.path())] {
        let evil = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::PATH;
        let mode = Mode::from_raw_mode(0o600);
        let f = fdops::open_tmpfile(dir_fd.as_fd(), evil, mode).expect("tmpfile");
        assert_eq!(fdops::write_at(f.as_fd(), 0, b"abcdef"), Ok(6));
        fdops::truncate_fd(f.as_fd(), 3).expect("truncate");
        fdops::chmod_fd(f.as_fd(), 0o4640).expect("chmod");
        fdops::utimens_fd(f.as_fd(), SetTime::Omit, SetTime::At(-5, 7)).expect("utimens");
        let got = fdops::statx(f.as_fd(), 0xfff, 0).expect("statx");
        assert_eq!((got.nlink, got.size, got.mode & 0o7777), (0, 3, 0o4640));
        assert_eq!((got.mtime.tv_sec, got.mtime.tv_nsec), (-5, 7));
        fdops::link_fd(f.as_fd(), dir_fd.as_fd(), c"named").expect("link");
        assert_eq!(std::fs::read(dir.path().join("named")).expect("read"), b"abc");
        assert_eq!(fdops::link_fd(f.as_fd(), dir_fd.as_fd(), c"named"), Err(Errno::EXIST));
        std::fs::remove_file(dir.path().join("named")).expect("unlink");
    }
    let dir_fd = o_path(dir.path());
    let read_only = fdops::open_tmpfile(dir_fd.as_fd(), OFlags::RDONLY, Mode::RUSR);
    assert_eq!(read_only.map(drop), Err(Errno::INVAL));
    let excl = fdops::open_tmpfile(dir_fd.as_fd(), OFlags::RDWR | OFlags::EXCL, Mode::RUSR);
    let refused = fdops::link_fd(excl.expect("tmpfile").as_fd(), dir_fd.as_fd(), c"named");
    assert_eq!(refused, Err(Errno::NOENT));
}

#[test]
fn link_falls_back_to_proc_without_the_capability() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let dir = temp();
    let f = file(dir.path(), "f", b"x");
    let fd = o_path(&dir.path().join("f"));
    let dir_fd = o_path(dir.path());
    // This thread only, which ends with the test. The fd was opened by other credentials, so
    // AT_EMPTY_PATH is refused on every kernel.
    let mut sets = capabilities(None).expect("capget");
    sets.effective -= CapabilitySet::DAC_READ_SEARCH;
    set_capabilities(None, sets).expect("capset");
    fdops::link_fd(fd.as_fd(), dir_fd.as_fd(), c"g").expect("link");
    assert_eq!(f.metadata().expect("metadata").nlink(), 2);
}

#[test]
fn names_are_one_component() {
    for (name, expected) in [
        (c"a", Ok(())),
        (c"..a", Ok(())),
        (c"", Err(Errno::INVAL)),
        (c".", Err(Errno::INVAL)),
        (c"..", Err(Errno::INVAL)),
        (c"a/b", Err(Errno::INVAL)),
        (c"/", Err(Errno::INVAL)),
    ] {
        assert_eq!(fdops::check_name(name), expected, "{name:?}");
    }
    let long = CString::new(vec![b'a'; 256]).expect("no NUL");
    assert_eq!(fdops::check_name(&long), Err(Errno::NAMETOOLONG));
}

#[test]
fn seeks_data_and_holes() {
    let dir = temp();
    let f = file(dir.path(), "f", b"");
    f.write_all_at(b"x", 1 << 20).expect("write");
    let fd = f.as_fd();
    assert_eq!(fdops::seek(fd, 0, 3), Ok(1 << 20));
    assert_eq!(fdops::seek(fd, 0, 4), Ok(0));
    assert_eq!(fdops::seek(fd, 1 << 20, 4), Ok((1 << 20) + 1));
    assert_eq!(fdops::seek(fd, 1 << 30, 3), Err(Errno::NXIO));
    assert_eq!(fdops::seek(fd, 5, 0), Ok(5));
    assert_eq!(fdops::seek(fd, 2, 1), Ok(7));
    assert_eq!(fdops::seek(fd, (-1i64).cast_unsigned(), 2), Ok(1 << 20));
    assert_eq!(fdops::seek(fd, u64::MAX, 3), Err(Errno::INVAL));
    assert_eq!(fdops::seek(fd, 0, 5), Err(Errno::INVAL));
    let dir_file = File::open(dir.path()).expect("dir");
    assert_eq!(fdops::seek(dir_file.as_fd(), 0, 3), Err(Errno::ISDIR));
}

#[test]
fn fallocate_takes_what_fuse_sends() {
    let dir = temp();
    let f = file(dir.path(), "f", &[7; 16384]);
    let run = |mode, offset, len| fdops::fallocate(f.as_fd(), mode, offset, len);
    let size = || f.metadata().expect("metadata").len();
    assert_eq!((run(0, 0, 20000), size()), (Ok(()), 20000));
    assert_eq!((run(1, 0, 40000), size()), (Ok(()), 20000));
    assert_eq!((run(3, 0, 4096), size()), (Ok(()), 20000));
    let mut head = [1; 4097];
    assert_eq!(fdops::read_at(f.as_fd(), 0, &mut head), Ok(4097));
    assert_eq!((head[0], head[4095], head[4096]), (0, 0, 7));
    for mode in [2, 4, 8, 0x12, 0x13, 0x20, 0x40, 0x80, u32::MAX] {
        assert_eq!(run(mode, 0, 4096), Err(Errno::OPNOTSUPP), "{mode:#x}");
    }
    match run(0x11, 8192, 1) {
        Ok(()) => assert_eq!(run(0x10, 20000, 1).map(|()| size()), Ok(20001)),
        Err(errno) => assert_eq!(errno, Errno::OPNOTSUPP, "ZERO_RANGE"),
    }
    assert_eq!(run(0, u64::MAX, 1), Err(Errno::FBIG));
    assert_eq!(run(0, 0, 0), Err(Errno::INVAL));
}

#[test]
fn flush_and_syncfs_leave_the_fd_open() {
    let dir = temp();
    let f = file(dir.path(), "f", b"x");
    for _ in 0..2000 {
        fdops::flush(f.as_fd()).expect("flush");
    }
    fdops::syncfs(f.as_fd()).expect("syncfs");
    assert_eq!(fdops::read_at(f.as_fd(), 0, &mut [0; 4]), Ok(1));
}

#[test]
fn attributes_change_through_o_path_too() {
    let dir = temp();
    let f = file(dir.path(), "f", b"x");
    let fd = o_path(&dir.path().join("f"));
    fdops::chmod_fd(fd.as_fd(), 0o100_601).expect("chmod");
    fdops::utimens_fd(fd.as_fd(), SetTime::At(9, 0), SetTime::Now).expect("utimens");
    let meta = f.metadata().expect("metadata");
    assert_eq!((meta.mode() & 0o7777, meta.atime()), (0o601, 9));
    if rustix::process::geteuid().is_root() {
        fdops::chown_fd(fd.as_fd(), Some(1234), None).expect("chown");
        fdops::chown_fd(f.as_fd(), None, Some(4321)).expect("chown");
        let meta = f.metadata().expect("metadata");
        assert_eq!((meta.uid(), meta.gid()), (1234, 4321));
    } else {
        println!("SKIPPED chown: needs root");
    }
    assert_eq!(fdops::chown_fd(fd.as_fd(), Some(u32::MAX), None), Err(Errno::INVAL));
    assert_eq!(fdops::truncate_fd(fd.as_fd(), 1), Err(Errno::BADF));
    assert_eq!(fdops::truncate_fd(f.as_fd(), u64::MAX), Err(Errno::FBIG));
    let bad = SetTime::At(0, 1_000_000_000);
    assert_eq!(fdops::utimens_fd(fd.as_fd(), bad, SetTime::Omit), Err(Errno::INVAL));
}

#[test]
fn extended_attributes_by_any_fd() {
    let dir = temp();
    let f = file(dir.path(), "f", b"x");
    let path_fd = o_path(&dir.path().join("f"));
    let name = c"user.ringfs";
    if fdops::setxattr(f.as_fd(), name, b"probe", 0) == Err(Errno::OPNOTSUPP) {
        println!("SKIPPED extended attributes: the temp dir's file system has none");
        return;
    }
    fdops::removexattr(f.as_fd(), name).expect("remove");
    for fd in [f.as_fd(), path_fd.as_fd()] {
        fdops::setxattr(fd, name, b"value", 0).expect("set");
        assert_eq!(fdops::setxattr(fd, name, b"value", 1), Err(Errno::EXIST));
        let mut value = [0; 16];
        assert_eq!(fdops::getxattr(fd, name, &mut []), Ok(5));
        assert_eq!(fdops::getxattr(fd, name, &mut value), Ok(5));
        assert_eq!(&value[..5], b"value");
        assert_eq!(fdops::getxattr(fd, name, &mut value[..2]), Err(Errno::RANGE));
        let mut list = [0; 256];
        let listed = fdops::listxattr(fd, &mut list).expect("list");
        assert_eq!(fdops::listxattr(fd, &mut []), Ok(listed));
        let wanted = name.to_bytes_with_nul();
        assert!(list[..listed].windows(wanted.len()).any(|w| w == wanted));
        fdops::removexattr(fd, name).expect("remove");
        assert_eq!(fdops::getxattr(fd, name, &mut value), Err(Errno::NODATA));
        assert_eq!(fdops::removexattr(fd, name), Err(Errno::NODATA));
        assert_eq!(fdops::setxattr(fd, name, b"", 4), Err(Errno::INVAL));
        assert_eq!(fdops::setxattr(fd, name, &vec![0; 65537], 0), Err(Errno::TOOBIG));
        assert_eq!(fdops::getxattr(fd, c"", &mut value), Err(Errno::RANGE));
    }
    // A symbolic link's own attributes: the target's must not answer.
    fdops::setxattr(f.as_fd(), name, b"target", 0).expect("set");
    std::os::unix::fs::symlink("f", dir.path().join("l")).expect("symlink");
    let link = o_path(&dir.path().join("l"));
    assert_eq!(fdops::getxattr(link.as_fd(), name, &mut [0; 8]), Err(Errno::NODATA));
}

#[test]
fn reopens_files_and_directories_only() {
    let dir = temp();
    let f = file(dir.path(), "f", b"keep");
    std::fs::remove_file(dir.path().join("f")).expect("unlink");
    let all = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC | OFlags::NOFOLLOW;
    let again = fdops::reopen(f.as_fd(), all).expect("reopen");
    assert_eq!(fdops::read_at(again.as_fd(), 0, &mut [0; 8]), Ok(4), "not truncated");
    let fifo = dir.path().join("fifo");
    rustix::fs::mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR).expect("fifo");
    let refused = fdops::reopen(o_path(&fifo).as_fd(), OFlags::RDONLY);
    assert_eq!(refused.map(drop), Err(Errno::INVAL), "must not wait for a writer");
    let dir_again = fdops::reopen(o_path(dir.path()).as_fd(), OFlags::TMPFILE).expect("reopen");
    assert!(File::from(dir_again).metadata().expect("metadata").is_dir());
    std::os::unix::fs::symlink("f", dir.path().join("l")).expect("symlink");
    let link = fdops::reopen(o_path(&dir.path().join("l")).as_fd(), OFlags::RDONLY);
    assert_eq!(link.map(drop), Err(Errno::INVAL));
}

#[test]
fn nowait_reads_answer_from_the_cache_or_not_at_all() {
    let dir = temp();
    let f = file(dir.path(), "f", b"cached");
    let kind = fdops::fs_kind(f.as_fd()).expect("statfs");
    let mut buf = [0; 16];
    let got = fdops::try_read_nowait(f.as_fd(), 0, &mut buf);
    if kind.supports_nowait() {
        assert_eq!(got, Ok(6), "{kind:?}");
    }
    assert_eq!(fdops::try_read_nowait(f.as_fd(), u64::MAX, &mut buf), Err(Errno::INVAL));
    assert_eq!(fdops::try_write_nowait(f.as_fd(), u64::MAX, &buf), Err(Errno::INVAL));
    assert_eq!(fdops::read_at(f.as_fd(), u64::MAX, &mut buf), Err(Errno::INVAL));

    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let shm = File::from(rustix::fs::memfd_create(c"ringfs-test", flags).expect("memfd"));
    shm.write_all_at(b"x", 0).expect("write");
    let kind = fdops::fs_kind(shm.as_fd()).expect("statfs");
    assert_eq!(kind, FsKind::Local(LocalFs::Tmpfs));
    assert!(!kind.supports_nowait() && kind.is_local());
    let got = fdops::try_read_nowait(shm.as_fd(), 0, &mut buf);
    println!("tmpfs and RWF_NOWAIT: {got:?}");
}

#[test]
fn magics_are_known() {
    let check = |magic, expected| assert_eq!(FsKind::from_magic(magic), expected, "{magic:#x}");
    check(0xef53, FsKind::Local(LocalFs::Ext4));
    check(0x5846_5342, FsKind::Local(LocalFs::Xfs));
    check(0x9123_683e, FsKind::Local(LocalFs::Btrfs));
    check(0x6969, FsKind::Network);
    check(0xff53_4d42, FsKind::Network);
    check(0x6573_5546, FsKind::Fuse);
    check(0x794c_7630, FsKind::Other(0x794c_7630));
    let proc_fd = o_path(Path::new("/proc"));
    let kind = fdops::fs_kind(proc_fd.as_fd()).expect("statfs");
    assert_eq!(kind, FsKind::Other(0x9fa0));
}

fn list(dir: BorrowedFd<'_>, buffer_bytes: usize) -> Vec<(u64, Vec<u8>)> {
    let mut buffer = vec![0; buffer_bytes];
    let mut all = Vec::new();
    loop {
        let entries = fdops::getdents(dir, &mut buffer).expect("getdents");
        if entries.is_empty() {
            return all;
        }
        for entry in entries {
            let entry = entry.expect("entry");
            all.push((entry.next_offset, entry.name.to_vec()));
        }
    }
}

#[test]
fn directories_are_listed_in_pieces_and_from_the_middle() {
    let dir = temp();
    for i in 0..300 {
        file(dir.path(), &format!("file-{i}"), b"");
    }
    let long = "n".repeat(255);
    file(dir.path(), &long, b"");
    let fd = File::open(dir.path()).expect("dir");
    let whole = list(fd.as_fd(), 65536);
    assert_eq!(whole.len(), 303);
    assert!(whole.iter().any(|(_, name)| name == long.as_bytes()));
    fdops::seek(fd.as_fd(), 0, 0).expect("rewind");
    assert_eq!(list(fd.as_fd(), 280), whole);
    fdops::seek(fd.as_fd(), whole[149].0, 0).expect("seek");
    assert_eq!(list(fd.as_fd(), 4096), whole[150..]);
    fdops::seek(fd.as_fd(), 0, 0).expect("rewind");
    assert_eq!(fdops::getdents(fd.as_fd(), &mut [0; 8]).map(drop), Err(Errno::INVAL));
    let f = file(dir.path(), "f", b"");
    assert_eq!(fdops::getdents(f.as_fd(), &mut [0; 512]).map(drop), Err(Errno::NOTDIR));
}

/// One record of getdents64, written by hand.
fn record(len: u16, name: &[u8]) -> Vec<u8> {
    let mut bytes = [1u64.to_ne_bytes(), 2u64.to_ne_bytes()].concat();
    bytes.extend(len.to_ne_bytes());
    bytes.push(8);
    bytes.extend(name);
    bytes
}

#[test]
fn impossible_records_are_one_error_and_the_end() {
    let check = |bytes: &[u8], good: usize, ends_well: bool| {
        let items: Vec<_> = DirEntries::new(bytes).collect();
        assert!(items[..good].iter().all(Result::is_ok), "{bytes:?}");
        let rest: &[_] = if ends_well { &[] } else { &[Err(Errno::IO)] };
        assert_eq!(&items[good..], rest, "{bytes:?}");
    };
    let good = record(24, b"name\0");
    check(&[], 0, true);
    check(&good, 1, true);
    check(&[good.clone(), good.clone()].concat(), 2, true);
    for bad in [
        record(25, b"name\0"),                            // longer than the buffer
        record(0, b"name\0"),                             // would never move on
        record(19, b"name\0"),                            // no room for a name
        record(23, b"name\0"),                            // NUL outside of it
        record(24, b"name!"),                             // no NUL
        record(24, b"\0ame\0"),                           // empty
        record(24, b"n/me\0"),                            // not one component
        record(276, &[&[b'a'; 256][..], b"\0"].concat()), // too long
        good[..18].to_vec(),
    ] {
        check(&bad, 0, false);
        check(&[good.clone(), bad].concat(), 1, false);
    }
    // Random bytes come to an end, and never panic.
    let mut state = 1u64;
    for len in 0..2000 {
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8 & 0x1f
        };
        let bytes: Vec<u8> = std::iter::repeat_with(next).take(len).collect();
        assert!(DirEntries::new(&bytes).count() <= len / 20 + 1);
    }
}
