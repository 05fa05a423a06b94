//! What ordinary programs do: files, names, attributes, extended attributes.

use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use ringfs_server::dispatch::Request;
use ringfs_server::fdops;
use ringfs_server::fds::Fds;
use ringfs_server::fs::{CacheMode, FsOptions};
use ringfs_server::notes::Notes;
use ringfs_server::quota::{Limits, ShareQuota};
use ringfs_wire::abi::{self, Opcode, fattr, fopen, init};
use ringfs_wire::limits::STORE_BYTES_MAX;
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::support::{
    Guest, O_EXCL, O_RDWR, O_WRONLY, ROOT, listed, named, share, share_with, split_created,
};

#[test]
fn life_of_a_file() {
    let (dir, guest) = share();
    let before = guest.fs.counts();
    assert_eq!(guest.lookup(ROOT, "file"), Err(Errno::NOENT));
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR | O_EXCL).expect("create");
    assert_eq!(guest.create(ROOT, "file", O_RDWR | O_EXCL), Err(Errno::EXIST));
    let id = entry.nodeid;
    assert_eq!(guest.write(id, fh, 0, b"hello"), Ok(5));
    assert_eq!(guest.write(id, fh, 5, b" world"), Ok(6));
    assert_eq!(guest.read(id, fh, 0, 100).expect("read"), b"hello world");
    assert_eq!(guest.read(id, fh, 6, 3).expect("read"), b"wor");
    assert_eq!(guest.read(id, fh, 11, 3).expect("read"), b"");
    let size = abi::SetattrIn { valid: fattr::SIZE | fattr::FH, fh, size: 5, ..Default::default() };
    assert_eq!(guest.setattr(id, size).expect("truncate").size, 5);
    assert_eq!(std::fs::read(dir.path().join("file")).expect("host"), b"hello");
    for opcode in [Opcode::Flush, Opcode::Fsync] {
        let mut args = abi::FlushIn { fh, ..Default::default() };
        args.unused = 0;
        assert_eq!(guest.ask(opcode, id, args.as_bytes()).expect("sync"), b"");
    }

    guest.mkdir(ROOT, "dir").expect("mkdir");
    let sub = guest.lookup(ROOT, "dir").expect("lookup").nodeid;
    guest.rename((ROOT, "file"), (sub, "renamed"), 0).expect("rename");
    let again = guest.lookup(sub, "renamed").expect("lookup");
    assert_eq!(again.nodeid, id, "a rename keeps the node");
    let linked = guest.link(id, ROOT, "second").expect("link");
    assert_eq!((linked.nodeid, linked.attr.nlink), (id, 2));
    assert_eq!(guest.lookup(ROOT, "second").expect("lookup").attr.ino, entry.attr.ino);

    guest.unlink(ROOT, "second").expect("unlink");
    guest.unlink(sub, "renamed").expect("unlink");
    assert_eq!(guest.read(id, fh, 0, 100).expect("unlinked, open"), b"hello");
    assert_eq!(guest.getattr(id).expect("getattr").nlink, 0);
    let mode = abi::SetattrIn { valid: fattr::MODE, mode: 0o600, ..Default::default() };
    assert_eq!(guest.setattr(id, mode).expect("chmod").mode & 0o777, 0o600);
    guest.release(id, fh).expect("release");
    assert_eq!(guest.read(id, fh, 0, 1), Err(Errno::BADF));

    let args = [&named(&[], b"link")[..], b"../some/where\0"].concat();
    let link: abi::EntryOut = guest.ask_one(Opcode::Symlink, ROOT, &args).expect("symlink");
    assert_eq!(guest.ask(Opcode::Readlink, link.nodeid, &[]).expect("readlink"), b"../some/where");
    assert_eq!(guest.open(link.nodeid, O_RDWR), Err(Errno::LOOP));
    guest.unlink(ROOT, "link").expect("unlink");
    let rmdir = |name: &str| guest.ask(Opcode::Rmdir, ROOT, &named(&[], name.as_bytes()));
    rmdir("dir").expect("rmdir");

    guest.forget(link.nodeid, 1);
    guest.forget(sub, 2);
    guest.forget(id, 4);
    assert_eq!(guest.fs.counts(), before);
    assert_eq!(guest.getattr(id), Err(Errno::STALE));
}

#[test]
fn ids_are_never_given_again() {
    let (_dir, guest) = share();
    let (first, fh) = guest.create(ROOT, "file", O_RDWR).expect("create");
    guest.release(first.nodeid, fh).expect("release");
    guest.forget(first.nodeid, 1);
    let second = guest.lookup(ROOT, "file").expect("lookup");
    assert!(second.nodeid > first.nodeid);
    assert_eq!(second.attr.ino, first.attr.ino);
}

#[test]
fn hard_links_share_a_node_and_notice_the_host() {
    let (dir, guest) = share();
    std::fs::write(dir.path().join("a"), b"one").expect("host");
    std::fs::hard_link(dir.path().join("a"), dir.path().join("b")).expect("host");
    let (a, b) = (guest.lookup(ROOT, "a").expect("a"), guest.lookup(ROOT, "b").expect("b"));
    assert_eq!((a.nodeid, a.attr.ino, a.attr.nlink), (b.nodeid, b.attr.ino, 2));
    std::fs::remove_file(dir.path().join("a")).expect("host");
    assert_eq!(guest.getattr(b.nodeid).expect("getattr").nlink, 1);
    // Replaced on the host: another inode, so another node.
    std::fs::write(dir.path().join("new"), b"two").expect("host");
    std::fs::rename(dir.path().join("new"), dir.path().join("b")).expect("host");
    assert_ne!(guest.lookup(ROOT, "b").expect("b").nodeid, b.nodeid);
    assert_eq!(guest.getattr(b.nodeid).expect("getattr").nlink, 0);
}

#[test]
fn every_attribute_can_be_set() {
    let (_dir, guest) = share();
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).expect("create");
    let id = entry.nodeid;
    for with_fh in [0, fattr::FH] {
        let set = |setattr: abi::SetattrIn| {
            let valid = setattr.valid | with_fh;
            guest.setattr(id, abi::SetattrIn { valid, fh, ..setattr })
        };
        let times = abi::SetattrIn {
            valid: fattr::ATIME | fattr::MTIME | fattr::CTIME,
            atime: -7_i64 as u64,
            atimensec: 999_999_999,
            mtime: 1 << 33,
            mtimensec: 3,
            ctime: 5,
            ..Default::default()
        };
        let attr = set(times).expect("times");
        assert_eq!((attr.atime as i64, attr.atimensec), (-7, 999_999_999));
        assert_eq!((attr.mtime, attr.mtimensec), (1 << 33, 3));
        assert_ne!(attr.ctime, 5, "the time of change is the host's");
        let now = abi::SetattrIn {
            valid: fattr::MTIME | fattr::MTIME_NOW,
            mtime: 1,
            ..Default::default()
        };
        let attr = set(now).expect("now");
        assert!(attr.mtime > 1_000_000_000 && attr.mtime < 1 << 33);
        assert_eq!(attr.atime as i64, -7, "left alone");
        let wrong =
            abi::SetattrIn { valid: fattr::ATIME, atimensec: 1_000_000_000, ..Default::default() };
        assert_eq!(set(wrong), Err(Errno::INVAL));
        let mode = abi::SetattrIn { valid: fattr::MODE, mode: 0o100_751, ..Default::default() };
        assert_eq!(set(mode).expect("mode").mode, 0o100_751);
        let size = abi::SetattrIn { valid: fattr::SIZE, size: 123, ..Default::default() };
        assert_eq!(set(size).expect("size").size, 123);
        let huge = abi::SetattrIn { valid: fattr::SIZE, size: 1 << 63, ..Default::default() };
        assert_eq!(set(huge), Err(Errno::FBIG));
        let nobody = abi::SetattrIn { valid: fattr::UID, uid: u32::MAX, ..Default::default() };
        assert_eq!(set(nobody), Err(Errno::INVAL));
        if rustix::process::geteuid().is_root() {
            let (valid, uid, gid) = (fattr::UID | fattr::GID, 1234, 5678);
            let owner = abi::SetattrIn { valid, uid, gid, ..Default::default() };
            let attr = set(owner).expect("owner");
            assert_eq!((attr.uid, attr.gid), (1234, 5678));
        }
    }
}

#[test]
fn sparse_files_beyond_four_tebibytes() {
    let (_dir, guest) = share();
    let (entry, fh) = guest.create(ROOT, "sparse", O_RDWR).expect("create");
    let (id, far) = (entry.nodeid, 5 << 40);
    assert_eq!(guest.write(id, fh, far, b"far"), Ok(3));
    assert_eq!(guest.getattr(id).expect("getattr").size, far + 3);
    assert_eq!(guest.read(id, fh, far - 2, 10).expect("read"), b"\0\0far");
    let seek = |offset, whence: i32| {
        let ask = abi::LseekIn { fh, offset, whence: whence as u32, padding: 0 };
        guest.ask_one::<abi::LseekOut>(Opcode::Lseek, id, ask.as_bytes()).map(|seek| seek.offset)
    };
    assert_eq!(seek(0, libc::SEEK_HOLE), Ok(0));
    let data = seek(0, libc::SEEK_DATA).expect("data");
    assert!(data > 0 && data <= far);
    assert_eq!(seek(far + 3, libc::SEEK_DATA), Err(Errno::NXIO));
    assert_eq!(seek(0, 77), Err(Errno::INVAL));

    let fallocate = |mode: i32, offset, length| {
        let ask = abi::FallocateIn { fh, offset, length, mode: mode as u32, padding: 0 };
        guest.ask(Opcode::Fallocate, id, ask.as_bytes()).map(drop)
    };
    fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, far, 3).expect("punch");
    assert_eq!(guest.read(id, fh, far, 3).expect("read"), b"\0\0\0");
    assert_eq!(fallocate(libc::FALLOC_FL_COLLAPSE_RANGE, 0, 4096), Err(Errno::OPNOTSUPP));
    assert_eq!(fallocate(0, u64::MAX - 1, 4096), Err(Errno::FBIG));
    assert_eq!(fallocate(0, 0, 0), Err(Errno::INVAL));
}

#[test]
fn copies_on_the_host() {
    let (_dir, guest) = share();
    let (from, fh_in) = guest.create(ROOT, "from", O_RDWR).expect("create");
    let (to, fh_out) = guest.create(ROOT, "to", O_RDWR).expect("create");
    guest.write(from.nodeid, fh_in, 0, b"0123456789").expect("write");
    let ask = abi::CopyFileRangeIn {
        fh_in,
        off_in: 2,
        nodeid_out: to.nodeid,
        fh_out,
        off_out: 1,
        len: u64::MAX / 4,
        flags: 0,
    };
    let short: abi::WriteOut =
        guest.ask_one(Opcode::CopyFileRange, from.nodeid, ask.as_bytes()).expect("copy");
    assert_eq!(short.size, 8);
    let long: abi::CopyFileRangeOut =
        guest.ask_one(Opcode::CopyFileRange64, from.nodeid, ask.as_bytes()).expect("copy");
    assert_eq!(long.bytes_copied, 8);
    assert_eq!(guest.read(to.nodeid, fh_out, 0, 100).expect("read"), b"\x0023456789");
    let crossed = abi::CopyFileRangeIn { nodeid_out: from.nodeid, ..ask };
    let refused = guest.ask(Opcode::CopyFileRange, from.nodeid, crossed.as_bytes());
    assert_eq!(refused, Err(Errno::BADF), "a handle of another node");
}

#[test]
fn appending_and_writeback() {
    let append = O_WRONLY | libc::O_APPEND as u32;
    let (dir, guest) = share();
    let (entry, fh) = guest.create(ROOT, "file", append).expect("create");
    std::fs::write(dir.path().join("file"), b"host").expect("host");
    guest.write(entry.nodeid, fh, 0, b"guest").expect("write");
    assert_eq!(std::fs::read(dir.path().join("file")).expect("host"), b"hostguest");
    assert_eq!(guest.read(entry.nodeid, fh, 0, 1), Err(Errno::BADF), "opened for writing only");
    // A dirty page of a mapping goes where it belongs, by whatever handle the kernel picks.
    let pages = abi::FUSE_WRITE_CACHE;
    guest.write_flags(entry.nodeid, fh, 0, b"HOST", pages).expect("a page");
    assert_eq!(std::fs::read(dir.path().join("file")).expect("host"), b"HOSTguest");
    guest.write(entry.nodeid, fh, 0, b"!").expect("write");
    assert_eq!(std::fs::read(dir.path().join("file")).expect("host"), b"HOSTguest!");

    // The guest's kernel owns the end of file, and reads to fill pages up.
    let (_dir, guest) = share_with(FsOptions { writeback: true, ..FsOptions::default() });
    let (entry, fh) = guest.create(ROOT, "file", append).expect("create");
    guest.write(entry.nodeid, fh, 0, b"guest").expect("write");
    guest.write(entry.nodeid, fh, 0, b"GUE").expect("write");
    assert_eq!(guest.read(entry.nodeid, fh, 0, 9).expect("read"), b"GUEst");
}

#[test]
fn open_truncates_only_when_asked() {
    let (dir, guest) = share();
    std::fs::write(dir.path().join("file"), b"content").expect("host");
    let id = guest.lookup(ROOT, "file").expect("lookup").nodeid;
    let truncate = O_RDWR | libc::O_TRUNC as u32;
    let args = |flags| abi::OpenIn { flags, open_flags: 0 };
    assert_eq!(guest.route(Opcode::Open, id, args(O_RDWR).as_bytes()), "inline");
    assert_eq!(guest.route(Opcode::Open, id, args(truncate).as_bytes()), "pool");
    let fh = guest.open(id, O_RDWR | O_EXCL).expect("open").fh;
    assert_eq!(guest.read(id, fh, 0, 9).expect("read"), b"content");
    let fh = guest.open(id, truncate).expect("open").fh;
    assert_eq!(guest.read(id, fh, 0, 9).expect("read"), b"");
}

#[test]
fn a_file_without_a_name_gets_one() {
    let (dir, guest) = share();
    let before = guest.fs.counts();
    let head = abi::CreateIn { flags: O_RDWR, mode: 0o100_640, umask: 0, open_flags: 0 };
    let reply = guest.ask(Opcode::Tmpfile, ROOT, &named(head.as_bytes(), b"/"));
    let (entry, fh) = split_created(&reply.expect("tmpfile"));
    let id = entry.nodeid;
    assert_eq!((entry.attr.nlink, entry.attr.mode), (0, 0o100_640));
    guest.write(id, fh, 0, b"text").expect("write");
    assert_eq!(guest.getattr(id).expect("getattr").size, 4);
    let again = guest.open(id, O_RDWR).expect("open").fh;
    assert_eq!(guest.read(id, again, 0, 9).expect("read"), b"text");
    let mode = abi::SetattrIn { valid: fattr::MODE, mode: 0o600, ..Default::default() };
    assert_eq!(guest.setattr(id, mode).expect("chmod").mode, 0o100_600);
    assert_eq!(guest.lookup(id, "x"), Err(Errno::NOENT));

    assert_eq!(guest.link(id, ROOT, "named").expect("link").nodeid, id);
    assert_eq!(std::fs::read(dir.path().join("named")).expect("host"), b"text");
    assert_eq!(guest.lookup(ROOT, "named").expect("lookup").nodeid, id);
    assert_eq!(guest.link(id, ROOT, "twice").expect("link").nodeid, id);
    guest.release(id, fh).expect("release");
    guest.release(id, again).expect("release");
    guest.forget(id, 4);
    assert_eq!(guest.fs.counts(), before);
}

#[test]
fn extended_attributes() {
    let (_dir, guest) = share();
    let (entry, _) = guest.create(ROOT, "file", O_RDWR).expect("create");
    let id = entry.nodeid;
    guest.setxattr(id, b"user.colour", b"green").expect("set");
    assert_eq!(guest.getxattr(id, b"user.colour", 100).expect("get"), b"green");
    assert_eq!(guest.getxattr(id, b"user.colour", u32::MAX).expect("get"), b"green");
    assert_eq!(guest.getxattr(id, b"user.colour", 2), Err(Errno::RANGE));
    let size = guest.getxattr(id, b"user.colour", 0).expect("size");
    assert_eq!(abi::GetxattrOut::read_from_bytes(&size).expect("layout").size, 5);
    let list =
        |size| guest.ask(Opcode::Listxattr, id, abi::GetxattrIn { size, padding: 0 }.as_bytes());
    let names = list(1000).expect("list");
    assert!(names.split(|&byte| byte == 0).any(|name| name == b"user.colour"));
    assert_eq!(list(0).expect("list").len(), 8);
    assert_eq!(guest.getxattr(id, b"user.none", 9), Err(Errno::NODATA));
    assert_eq!(guest.setxattr(id, b"system.posix_acl_access", b"x"), Err(Errno::OPNOTSUPP));
    assert_eq!(guest.setxattr(id, &[b'x'; 256], b"x"), Err(Errno::RANGE));
    assert_eq!(guest.setxattr(id, b"user.big", &[0; 65_537]), Err(Errno::TOOBIG));
    let wrong = named(abi::SetxattrIn { size: 9, flags: 0 }.as_bytes(), b"user.x");
    assert_eq!(guest.ask(Opcode::Setxattr, id, &wrong), Err(Errno::INVAL));
    guest.ask(Opcode::Removexattr, id, &named(&[], b"user.colour")).expect("remove");
    assert_eq!(guest.getxattr(id, b"user.colour", 100), Err(Errno::NODATA));

    let (_dir, guest) = share_with(FsOptions { xattr: false, ..FsOptions::default() });
    assert_eq!(guest.getxattr(ROOT, b"user.colour", 100), Err(Errno::NOSYS));
}

#[test]
fn statx_knows_the_birth() {
    let (dir, guest) = share();
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).expect("create");
    std::os::unix::fs::symlink("target", dir.path().join("link")).expect("host");
    let host = std::fs::metadata(dir.path().join("file")).expect("host");
    let ask = |nodeid, getattr_flags| {
        let ask = abi::StatxIn { getattr_flags, fh, sx_mask: u32::MAX, ..Default::default() };
        let reply: abi::StatxOut = guest.ask_one(Opcode::Statx, nodeid, ask.as_bytes())?;
        Ok::<_, Errno>(reply.stat)
    };
    for flags in [0, abi::FUSE_GETATTR_FH] {
        let stat = ask(entry.nodeid, flags).expect("statx");
        assert_eq!((stat.ino, u32::from(stat.mode)), (host.ino(), host.mode()));
        assert_eq!(stat.mask & 0x7ff, 0x7ff);
        if let Ok(born) = host.created() {
            let born = born.duration_since(std::time::UNIX_EPOCH).expect("after 1970");
            assert_eq!(stat.btime.tv_sec as u64, born.as_secs());
        }
    }
    let host = std::fs::symlink_metadata(dir.path().join("link")).expect("host");
    let link = guest.lookup(ROOT, "link").expect("lookup").nodeid;
    let (fifo, mode) = (dir.path().join("fifo"), rustix::fs::Mode::from_raw_mode(0o600));
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).expect("host");
    let fifo = guest.lookup(ROOT, "fifo").expect("lookup").nodeid;
    for (id, kind) in [(link, libc::S_IFLNK), (fifo, libc::S_IFIFO)] {
        let stat = ask(id, 0).expect("statx");
        assert_eq!(u32::from(stat.mode) & libc::S_IFMT, kind);
        assert_eq!(stat.mask & 0x800 != 0, host.created().is_ok(), "the time of birth");
    }
    if let Ok(born) = host.created() {
        let born = born.duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        assert_eq!(ask(link, 0).expect("statx").btime.tv_sec as u64, born.as_secs());
    }
    // Another file has the name now: what was asked for is still known, but for its birth.
    std::fs::rename(dir.path().join("link"), dir.path().join("away")).expect("host");
    std::fs::write(dir.path().join("link"), "a file").expect("host");
    let stat = ask(link, 0).expect("statx");
    assert_eq!((stat.ino, stat.mask & 0x800), (host.ino(), 0));
    assert_eq!(u32::from(stat.mode) & libc::S_IFMT, libc::S_IFLNK);
}

#[test]
fn statfs_access_and_the_rest() {
    let (_dir, guest) = share();
    let statfs: abi::StatfsOut = guest.ask_one(Opcode::Statfs, ROOT, &[]).expect("statfs");
    assert!(statfs.blocks > 0 && statfs.bsize > 0 && statfs.namelen >= 255);
    guest.ask(Opcode::Access, ROOT, abi::AccessIn { mask: 4, padding: 0 }.as_bytes()).expect("ok");
    guest.ask(Opcode::Syncfs, ROOT, &[0; 8]).expect("syncfs");
    guest.ask(Opcode::Destroy, 0, &[]).expect("destroy");
    for opcode in [Opcode::Getlk, Opcode::Setlkw, Opcode::Bmap, Opcode::Poll] {
        assert_eq!(guest.ask(opcode, ROOT, &[0; 64]), Err(Errno::NOSYS));
        assert_eq!(guest.route(opcode, ROOT, &[0; 64]), "errno 38");
    }
    assert_eq!(guest.ask(Opcode::Ioctl, ROOT, &[0; 64]), Err(Errno::NOTTY));
    assert_eq!(guest.route(Opcode::Interrupt, 0, &[0; 8]), "none");
}

#[test]
fn init_answers_what_both_have() {
    let (_dir, guest) = share();
    let reply = guest.init();
    assert_eq!((reply.major, reply.minor), (7, 45));
    assert_eq!((reply.max_write, reply.max_pages, reply.max_readahead), (1 << 20, 256, 128 << 10));
    let flags = abi::init_flags(reply.flags, reply.flags2);
    assert_eq!(flags, guest.fs.negotiated());
    assert_ne!(flags & init::AUTO_INVAL_DATA, 0);
    let never = init::POSIX_LOCKS | init::FLOCK_LOCKS | init::SETXATTR_EXT | init::SECURITY_CTX;
    assert_eq!(flags & (never | init::WRITEBACK_CACHE | init::CACHE_SYMLINKS), 0);

    // A kernel of 5.4: a short request without the second word of flags.
    let old = abi::InitIn { major: 7, minor: 31, flags: u32::MAX, ..Default::default() };
    let reply: abi::InitOut =
        guest.ask_one(Opcode::Init, 0, &old.as_bytes()[..16]).expect("old kernel");
    assert_eq!((reply.minor, reply.flags2), (31, 0));
    let older = abi::InitIn { minor: 30, ..old };
    assert_eq!(guest.ask(Opcode::Init, 0, &older.as_bytes()[..16]), Err(Errno::PROTO));
    let newer = abi::InitIn { major: 8, minor: 1, ..old };
    let reply: abi::InitOut = guest.ask_one(Opcode::Init, 0, newer.as_bytes()).expect("newer");
    assert_eq!((reply.major, reply.minor), (7, 45));
}

#[test]
fn cache_modes_decide_what_a_guest_keeps() {
    let cases = [
        (CacheMode::Never, 0, fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES, 0),
        (
            CacheMode::Metadata,
            86_400,
            fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES,
            fopen::KEEP_CACHE | fopen::CACHE_DIR,
        ),
        (CacheMode::Auto, 1, 0, 0),
        (CacheMode::Always, 86_400, fopen::KEEP_CACHE, fopen::KEEP_CACHE | fopen::CACHE_DIR),
    ];
    for (cache, secs, file, directory) in cases {
        let (_dir, guest) = share_with(FsOptions { cache, ..FsOptions::default() });
        let (entry, _) = guest.create(ROOT, "file", O_RDWR).expect("create");
        assert_eq!((entry.entry_valid, entry.attr_valid), (secs, secs), "{cache:?}");
        assert_eq!(guest.open(entry.nodeid, O_RDWR).expect("open").open_flags, file, "{cache:?}");
        assert_eq!(guest.opendir(ROOT).expect("opendir").open_flags, directory, "{cache:?}");
        let missing = guest.lookup(ROOT, "missing").map(|entry| (entry.nodeid, entry.entry_valid));
        let negative = cache == CacheMode::Always;
        assert_eq!(missing, if negative { Ok((0, 86_400)) } else { Err(Errno::NOENT) });
    }
}

#[test]
fn flush_is_spared_and_writes_run_side_by_side_where_nobody_can_tell() {
    let direct = fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES;
    for writeback in [false, true] {
        let (dir, guest) = share_with(FsOptions { writeback, ..FsOptions::default() });
        let root = std::fs::File::open(dir.path()).expect("open");
        let local = fdops::fs_kind(root.as_fd()).expect("kind").is_local();
        let silent = if local && !writeback { fopen::NOFLUSH } else { 0 };
        let o_direct = libc::O_DIRECT as u32;
        for (flags, expected) in [
            (0, silent),
            (O_WRONLY, silent),
            // It may be mapped for writing, and then a close stores pages.
            (O_RDWR, 0),
            (O_RDWR | o_direct, if writeback { 0 } else { direct }),
            (O_WRONLY | o_direct, if writeback { 0 } else { direct | silent }),
        ] {
            let (entry, fh) = guest.create(ROOT, "file", O_RDWR).expect("create");
            let opened = guest.open(entry.nodeid, flags).expect("open");
            assert_eq!(opened.open_flags, expected, "flags {flags:o}, writeback {writeback}");
            guest.release(entry.nodeid, fh).expect("release");
            guest.release(entry.nodeid, opened.fh).expect("release");
        }
    }
}

#[test]
fn reads_and_writes_are_routed_with_their_file() {
    let (_dir, guest) = share();
    let (entry, fh) = guest.create(ROOT, "file", O_RDWR).expect("create");
    let id = entry.nodeid;
    let read = abi::ReadIn { fh, offset: 7, size: u32::MAX, ..Default::default() };
    assert_eq!(guest.route(Opcode::Read, id, read.as_bytes()), "read 7+1048576");
    assert_eq!(guest.route(Opcode::Read, ROOT, read.as_bytes()), "errno 9");
    let overflow = abi::ReadIn { offset: u64::MAX - 3, ..read };
    assert_eq!(guest.route(Opcode::Read, id, overflow.as_bytes()), "errno 22");
    let write = abi::WriteIn { fh, offset: 9, size: 3, ..Default::default() };
    let args = |write: abi::WriteIn| [write.as_bytes(), b"abc"].concat();
    assert_eq!(guest.route(Opcode::Write, id, &args(write)), "write 9 40..43");
    let short = abi::WriteIn { size: 4, ..write };
    assert_eq!(guest.route(Opcode::Write, id, &args(short)), "errno 22");
    let far = abi::WriteIn { offset: i64::MAX as u64, ..write };
    assert_eq!(guest.route(Opcode::Write, id, &args(far)), "errno 27");
    let kill = abi::WriteIn { write_flags: abi::FUSE_WRITE_KILL_SUIDGID, ..write };
    assert_eq!(guest.route(Opcode::Write, id, &args(kill)), "pool");
    // The shard takes it out, deleted or not: the pool could not close what is in use still.
    guest.unlink(ROOT, "file").expect("unlink");
    let release = abi::ReleaseIn { fh, ..Default::default() };
    assert_eq!(guest.route(Opcode::Release, id, release.as_bytes()), format!("release {fh} false"));
    let fsync = abi::FsyncIn { fh, fsync_flags: 1, padding: 0 };
    assert_eq!(guest.route(Opcode::Fsync, id, fsync.as_bytes()), "fsync true");
}

#[test]
fn direct_io_reaches_the_host_when_passed() {
    // Tmpfs may refuse O_DIRECT; where it is accepted, the bytes must be right.
    let (dir, guest) = share_with(FsOptions { direct_io: true, ..FsOptions::default() });
    std::fs::write(dir.path().join("file"), vec![b'a'; 8192]).expect("host");
    let id = guest.lookup(ROOT, "file").expect("lookup").nodeid;
    let Ok(open) = guest.open(id, O_RDWR | libc::O_DIRECT as u32) else { return };
    guest.write(id, open.fh, 4096, &[b'b'; 4096]).expect("write");
    let all = guest.read(id, open.fh, 0, 8192).expect("read");
    assert_eq!((all[0], all[4095], all[4096], all[8191]), (b'a', b'a', b'b', b'b'));
    let mut host = [0; 2];
    let file = std::fs::File::open(dir.path().join("file")).expect("host");
    file.read_exact_at(&mut host, 4095).expect("host");
    assert_eq!(&host, b"ab");
    drop(listed(&[], false));
}

/// What an OPEN has sent before its reply, and the reply.
fn open_noting(guest: &Guest, node: u64, flags: u32) -> (Vec<u8>, abi::OpenOut) {
    let open = abi::OpenIn { flags, open_flags: 0 };
    let (body, notes) = (guest.body(node, open.as_bytes(), &[]), Notes::new());
    let request = Request::parse(Opcode::Open as u32, &body).expect("whole").noting(&notes);
    let mut out = vec![0; guest.fs.reply_bytes_max(&request)];
    let used = guest.fs.execute(&request, &mut out).expect("open");
    let reply = abi::OpenOut::read_from_bytes(&out[..used]).expect("a reply");
    (notes.content().to_vec(), reply)
}

#[test]
fn the_content_of_a_small_file_goes_with_its_first_open() {
    let stores = FsOptions { stores: true, ..FsOptions::default() };
    let (dir, guest) = share_with(stores.clone());
    let make = |name: &str, bytes: usize| {
        let content: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8).collect();
        std::fs::write(dir.path().join(name), &content).expect("host");
        content
    };
    let lookup = |name: &str| guest.lookup(ROOT, name).expect("lookup").nodeid;
    for bytes in [1, 4096, 5000, STORE_BYTES_MAX] {
        let name = format!("of {bytes}");
        let content = make(&name, bytes);
        let node = lookup(&name);
        let (sent, reply) = open_noting(&guest, node, 0);
        let (head, sent) = abi::NotifyStoreOut::read_from_prefix(&sent).expect("a head");
        assert_eq!((head.nodeid, head.offset, head.size as usize), (node, 0, bytes));
        assert!(sent == content, "{bytes} bytes");
        assert_ne!(reply.open_flags & fopen::KEEP_CACHE, 0);
        guest.release(node, reply.fh).expect("release");
        let (sent, reply) = open_noting(&guest, node, 0);
        assert_eq!((sent.len(), reply.open_flags & fopen::KEEP_CACHE), (0, 0), "the second");
    }
    let none = |guest: &Guest, node: u64, flags: u32, why: &str| {
        let (sent, reply) = open_noting(guest, node, flags);
        assert_eq!((sent.len(), reply.open_flags & fopen::KEEP_CACHE), (0, 0), "{why}");
    };
    for (name, bytes) in [("empty", 0), ("large", STORE_BYTES_MAX + 1)] {
        make(name, bytes);
        none(&guest, lookup(name), 0, name);
    }
    for (flags, name) in [(O_RDWR, "changed"), (O_WRONLY, "written")] {
        make(name, 10);
        none(&guest, lookup(name), flags, name);
        none(&guest, lookup(name), 0, "opened before");
    }
    let (made, fh) = guest.create(ROOT, "made", O_RDWR | O_EXCL).expect("create");
    guest.write(made.nodeid, fh, 0, b"content").expect("write");
    none(&guest, made.nodeid, 0, "the guest made it");

    let amount = "1M".parse().expect("an amount");
    let limits = ShareQuota::new(&Limits { ops: Some(amount), ..Limits::default() });
    let modes = [CacheMode::Never, CacheMode::Metadata];
    let cached = modes.map(|cache| FsOptions { cache, ..stores.clone() });
    let limited = FsOptions { quota: limits, ..stores.clone() };
    let writeback = FsOptions { writeback: true, ..stores.clone() };
    for options in cached.into_iter().chain([limited, writeback, FsOptions::default()]) {
        let why = format!("{options:?}");
        let guest = Guest::new(dir.path(), options);
        none(&guest, guest.lookup(ROOT, "of 4096").expect("lookup").nodeid, 0, &why);
    }
    // One that has lost its fd meanwhile: what was done with it before is not known any more.
    let fds = Fds::new(64);
    let guest = Guest::new(dir.path(), FsOptions { fds, recipes: true, ..stores });
    let node = guest.lookup(ROOT, "of 4096").expect("lookup").nodeid;
    for i in 0..256 {
        let name = format!("other {i}");
        make(&name, 1);
        guest.lookup(ROOT, &name).expect("lookup");
    }
    let get = abi::GetattrIn::default();
    assert_eq!(guest.route(Opcode::Getattr, node, get.as_bytes()), "pool", "it is resident");
    none(&guest, node, 0, "it was cold");
}
