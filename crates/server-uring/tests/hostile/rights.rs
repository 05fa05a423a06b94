//! More than a guest may have: device nodes, privileges left on a host's files, flags, and sizes
//! that nobody has.

use crate::common::*;
use crate::{MIB, on_both};
use ringfs_wire::abi::{self, Opcode, fattr};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use zerocopy::{FromBytes, IntoBytes};

fn errno(result: Result<Vec<u8>, u32>) -> i32 {
    result.err().map_or(0, |errno| errno as i32)
}

#[test]
fn no_device_is_made() {
    on_both(|scene| {
        let mut foe = scene.daemon.guest();
        let kinds = [
            (libc::S_IFCHR, libc::EPERM),
            (libc::S_IFBLK, libc::EPERM),
            (libc::S_IFDIR, libc::EPERM),
            (libc::S_IFLNK, libc::EINVAL),
            (libc::S_IFMT, libc::EINVAL),
            (0o030_000, libc::EINVAL),
        ];
        for (kind, expected) in kinds {
            for rdev in [0, 0x103, u32::MAX] {
                let mknod = abi::MknodIn { mode: kind | 0o666, rdev, ..Default::default() };
                let args = [mknod.as_bytes(), &name("node")].concat();
                assert_eq!(errno(foe.call(Opcode::Mknod, 1, &args)), expected, "{kind:o}");
            }
        }
        // A whiteout is a device, too.
        let (node, fh) = foe.create("file").expect("create");
        for flags in [libc::RENAME_WHITEOUT, libc::RENAME_WHITEOUT | libc::RENAME_NOREPLACE] {
            let head = abi::Rename2In { newdir: 1, flags, padding: 0 };
            let args = [head.as_bytes(), &name("file"), &name("moved")].concat();
            assert_eq!(errno(foe.call(Opcode::Rename2, 1, &args)), libc::EINVAL);
        }
        foe.release(node, fh).expect("release");
        // One that the host has is seen, and opens for nobody.
        if rustix::process::geteuid().is_root() {
            let path = scene.daemon.share().join("zero");
            let mut mknod = std::process::Command::new("mknod");
            assert!(mknod.arg(&path).args(["c", "1", "5"]).status().expect("mknod").success());
            let zero = foe.lookup(1, "zero").expect("seen").nodeid;
            assert_eq!(foe.open(zero, libc::O_RDONLY), Err(libc::ENXIO as u32));
            std::fs::remove_file(path).expect("remove");
        }
    });
}

#[test]
fn set_id_bits_do_not_outlive_a_users_change() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: not root");
    }
    on_both(|scene| {
        let path = scene.daemon.share().join("tool");
        let mut foe = scene.daemon.guest();
        let (node, fh) = foe.create("tool").expect("create");
        let mode = || std::fs::metadata(&path).expect("stat").mode() & 0o7777;
        let arm = || std::fs::set_permissions(&path, PermissionsExt::from_mode(0o6755));
        let write_flags = abi::FUSE_WRITE_KILL_SUIDGID;
        for size in [1, 200_000] {
            arm().expect("chmod");
            let write = abi::WriteIn { fh, size, write_flags, ..Default::default() };
            let args = [write.as_bytes(), &pattern(1, size as usize)].concat();
            foe.call(Opcode::Write, node, &args).expect("write");
            assert_eq!(mode(), 0o755, "a write of {size}");
        }
        arm().expect("chmod");
        let valid = fattr::SIZE | fattr::KILL_SUIDGID;
        let cut = abi::SetattrIn { valid, size: 1, ..Default::default() };
        foe.call(Opcode::Setattr, node, cut.as_bytes()).expect("truncate");
        assert_eq!(mode(), 0o755);
        arm().expect("chmod");
        let flags = (libc::O_RDWR | libc::O_TRUNC) as u32;
        let open = abi::OpenIn { flags, open_flags: abi::FUSE_OPEN_KILL_SUIDGID };
        let _ = foe.call(Opcode::Open, node, open.as_bytes()).expect("open");
        arm().expect("chmod");
        // These carry no such flag: who is not root changes like any user.
        let ask = abi::FallocateIn { fh, length: 4096, ..Default::default() };
        foe.uid = 1000;
        foe.call(Opcode::Fallocate, node, ask.as_bytes()).expect("fallocate");
        assert_eq!(mode(), 0o755);
    });
}

#[test]
fn flags_open_no_more_than_a_file() {
    on_both(|scene| {
        let mut foe = scene.daemon.guest();
        let (node, fh) = foe.create("file").expect("create");
        foe.write(node, fh, 0, b"text").expect("write");
        for bit in 0..32 {
            let flags = 1i32 << bit;
            for access in [libc::O_RDONLY, libc::O_RDWR, libc::O_ACCMODE] {
                // Whatever it opens is this file, as it is.
                if let Ok(fh) = foe.open(node, flags | access) {
                    let read = foe.read(node, fh, 0, 10).unwrap_or_default();
                    assert!(read.is_empty() || read == b"text", "{flags:o}");
                    foe.release(node, fh).expect("release");
                }
                let create = abi::CreateIn { flags: (flags | access) as u32, ..Default::default() };
                let args = [create.as_bytes(), &name("made")].concat();
                if let Ok(body) = foe.call(Opcode::Create, 1, &args) {
                    let (entry, rest) = abi::EntryOut::read_from_prefix(&body).expect("an entry");
                    let opened = abi::OpenOut::read_from_bytes(rest).expect("opened");
                    foe.release(entry.nodeid, opened.fh).expect("release");
                    foe.forget(&[(entry.nodeid, 1)]);
                    foe.call(Opcode::Unlink, 1, &name("made")).expect("unlink");
                }
                if flags & libc::O_TRUNC != 0 {
                    foe.write(node, fh, 0, b"text").expect("write");
                }
            }
            let read = abi::ReadIn { fh, size: 9, flags: flags as u32, ..Default::default() };
            assert_eq!(foe.call(Opcode::Read, node, read.as_bytes()), Ok(b"text".to_vec()));
            let write = abi::WriteIn { fh, size: 1, flags: flags as u32, ..Default::default() };
            let args = [write.as_bytes(), b"t"].concat();
            foe.call(Opcode::Write, node, &args).expect("at its place, not at the end");
        }
        assert_eq!(std::fs::read(scene.daemon.share().join("file")).expect("read"), b"text");
    });
}

#[test]
fn sizes_of_gigabytes_cost_nothing() {
    on_both(|scene| {
        let memory = scene.daemon.memory_kib();
        let mut foe = scene.daemon.guest();
        let (node, fh) = foe.create("file").expect("create");
        foe.write(node, fh, 0, &pattern(1, 3 * MIB as usize / 2)[..MIB as usize]).expect("write");
        let opened = foe.call(Opcode::Opendir, 1, &[0; 8]).expect("opendir");
        let dir = abi::OpenOut::read_from_bytes(&opened).expect("opened").fh;
        let get = |size| abi::GetxattrIn { size, padding: 0 };
        for size in [u32::MAX, 1 << 31, (1 << 31) - 1, MIB + 1] {
            let read = foe.read(node, fh, 0, size).expect("read");
            assert_eq!(read.len(), MIB as usize);
            for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
                let list = foe.call(opcode, 1, &read_args(dir, 0, size)).expect("list");
                assert!(list.len() <= MIB as usize);
            }
            let value = [get(size).as_bytes(), &name("user.x")].concat();
            assert_eq!(errno(foe.call(Opcode::Getxattr, node, &value)), libc::ENODATA);
            assert!(foe.call(Opcode::Listxattr, node, get(size).as_bytes()).is_ok());
            let write = abi::WriteIn { fh, size, ..Default::default() };
            let args = [write.as_bytes(), b"short"].concat();
            assert_eq!(errno(foe.call(Opcode::Write, node, &args)), libc::EINVAL);
            let set = abi::SetxattrIn { size, flags: 0 };
            let args = [set.as_bytes(), &name("user.x"), b"x"].concat();
            assert_eq!(errno(foe.call(Opcode::Setxattr, node, &args)), libc::E2BIG);
        }
        for offset in [u64::MAX, 1 << 63, (1 << 63) - 1] {
            assert!(foe.read(node, fh, offset, MIB).is_err());
            assert!(foe.write(node, fh, offset, &[0; 4096]).is_err());
            let listed = foe.call(Opcode::Readdir, 1, &read_args(dir, offset, MIB));
            assert!(listed.is_err() || offset >> 63 == 0 && listed == Ok(Vec::new()));
            let size = abi::SetattrIn { valid: fattr::SIZE, size: offset, ..Default::default() };
            assert!(foe.call(Opcode::Setattr, node, size.as_bytes()).is_err());
            for length in [1, u64::MAX, 1 << 63] {
                let ask = abi::FallocateIn { fh, offset, length, ..Default::default() };
                assert!(foe.call(Opcode::Fallocate, node, ask.as_bytes()).is_err());
            }
            let seek = abi::LseekIn { fh, offset, whence: libc::SEEK_DATA as u32, padding: 0 };
            assert!(foe.call(Opcode::Lseek, node, seek.as_bytes()).is_err());
            let copy = abi::CopyFileRangeIn {
                fh_in: fh,
                off_in: offset,
                nodeid_out: node,
                fh_out: fh,
                len: u64::MAX,
                ..Default::default()
            };
            assert!(foe.call(Opcode::CopyFileRange, node, copy.as_bytes()).is_err());
        }
        // Counts that are larger than what follows them.
        let flood = abi::BatchForgetIn { count: u32::MAX, dummy: 0 };
        let _ = foe.call(Opcode::BatchForget, 0, flood.as_bytes());
        let grown = scene.daemon.memory_kib().saturating_sub(memory);
        assert!(grown < 24 << 10, "{grown} KiB for sizes alone");
    });
}
