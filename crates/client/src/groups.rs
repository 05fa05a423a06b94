//! The supplementary groups of a caller, for kernels that do not send them.
//!
//! A creation in a set-gid directory depends on them. Kernels from 6.3 put them behind the request
//! (`FUSE_EXT_GROUPS`); for older ones the same extension is written here, from /proc, and for
//! creations alone: reading /proc costs more than most requests.
//!
//! ```text
//! frame | ExtHeader { size, type 32 } | nr_groups: u32 | gids: u32 .. | zeros to a multiple of 8
//! ```
//!
//! Invariant: a frame leaves longer and whole, or as it came.

use ringfs_wire::abi::{ExtHeader, FUSE_EXT_GROUPS, InHeader, Opcode};
use std::mem::offset_of;
use zerocopy::IntoBytes;

/// Groups that are passed on; NFS gets by with 16.
pub const GROUPS_MAX: usize = 256;

/// Whether the groups of the caller matter to a request.
pub fn matter_to(opcode: u32, uid: u32) -> bool {
    let creates = matches!(
        Opcode::from_u32(opcode),
        Some(Opcode::Mknod | Opcode::Mkdir | Opcode::Symlink | Opcode::Create | Opcode::Tmpfile)
    );
    // Root may create with any group.
    creates && uid != 0
}

/// The supplementary groups of a process or thread; none if it is gone or of another pid namespace.
pub fn of_pid(pid: u32) -> Vec<u32> {
    if pid == 0 {
        return Vec::new();
    }
    match std::fs::read(format!("/proc/{pid}/status")) {
        Ok(status) => parse(&status),
        Err(_) => Vec::new(),
    }
}

fn parse(status: &[u8]) -> Vec<u32> {
    let lines = status.split(|&byte| byte == b'\n');
    let line = lines.filter_map(|line| line.strip_prefix(b"Groups:")).next().unwrap_or_default();
    let words = line.split(|byte| byte.is_ascii_whitespace());
    words.filter_map(|word| std::str::from_utf8(word).ok()?.parse().ok()).take(GROUPS_MAX).collect()
}

/// Writes the extension behind the frame in the first `len` bytes of `buffer`; the new length.
pub fn append(buffer: &mut [u8], len: usize, groups: &[u32]) -> usize {
    const EXTLEN: usize = offset_of!(InHeader, total_extlen);
    let size = (size_of::<ExtHeader>() + 4 + 4 * groups.len()).next_multiple_of(8);
    let has_some = buffer.get(EXTLEN..EXTLEN + 2).is_none_or(|extlen| extlen != [0, 0]);
    if groups.is_empty() || groups.len() > GROUPS_MAX || has_some {
        return len;
    }
    let Some(room) = buffer.get_mut(len..len + size) else { return len };
    room.fill(0);
    let header = ExtHeader { size: size as u32, type_: FUSE_EXT_GROUPS };
    room[..8].copy_from_slice(header.as_bytes());
    room[8..12].copy_from_slice(&(groups.len() as u32).to_le_bytes());
    for (place, group) in room[12..].chunks_exact_mut(4).zip(groups) {
        place.copy_from_slice(&group.to_le_bytes());
    }
    buffer[EXTLEN..EXTLEN + 2].copy_from_slice(&((size / 8) as u16).to_le_bytes());
    let new_len = len + size;
    buffer[..4].copy_from_slice(&(new_len as u32).to_le_bytes());
    new_len
}

#[cfg(test)]
mod tests {
    use super::*;
    use fuser_fork::frame::Frame;

    #[test]
    fn status_files() {
        let check = |text: &str, expected: &[u32]| assert_eq!(parse(text.as_bytes()), expected);
        check("Name:\tx\nGroups:\t4 24 1000 \nNStgid:\t1\n", &[4, 24, 1000]);
        check("Name:\tx\nGroups:\t \n", &[]);
        check("Name:\tx\n", &[]);
        check("Groups:\t1 x -3 4294967295 4294967296", &[1, u32::MAX]);
        let many: Vec<String> = (0..1000).map(|gid| gid.to_string()).collect();
        assert_eq!(parse(format!("Groups:\t{}", many.join(" ")).as_bytes()).len(), GROUPS_MAX);
    }

    #[test]
    fn processes() {
        assert!(of_pid(0).is_empty());
        assert!(of_pid(u32::MAX).is_empty());
        let groups = rustix::process::getgroups().expect("getgroups");
        let expected: Vec<u32> = groups.iter().map(|gid| gid.as_raw()).collect();
        assert_eq!(of_pid(std::process::id()), expected);
    }

    #[test]
    fn an_extended_frame_reads_back() {
        for groups in [&[][..], &[5], &[5, 6], &[1, 2, 3]] {
            let header = InHeader { len: 43, opcode: 9, unique: 2, ..InHeader::default() };
            let mut buffer = [0xAA; 128];
            buffer[..40].copy_from_slice(header.as_bytes());
            buffer[40..43].copy_from_slice(b"d1\0");
            let len = append(&mut buffer, 43, groups);
            let frame = Frame::parse(&buffer[..len]).expect("whole");
            assert_eq!(frame.args(), b"d1\0");
            let found: Vec<_> = frame.extension_list().collect();
            if groups.is_empty() {
                assert_eq!((len, found.len()), (43, 0));
                continue;
            }
            let [(FUSE_EXT_GROUPS, body)] = found[..] else { panic!("{found:?}") };
            assert_eq!(body[..4], (groups.len() as u32).to_le_bytes());
            let gids = body[4..].chunks_exact(4).take(groups.len());
            assert!(gids.zip(groups).all(|(bytes, gid)| bytes == gid.to_le_bytes()));
            // A second extension would need another form: left as it is.
            assert_eq!(append(&mut buffer, len, &[7]), len);
        }
        let mut short = [0u8; 44];
        assert_eq!(append(&mut short, 43, &[1]), 43);
    }

    #[test]
    fn creations_by_users() {
        for opcode in Opcode::ALL {
            let creates = ["Mknod", "Mkdir", "Symlink", "Create", "Tmpfile"]
                .contains(&format!("{opcode:?}").as_str());
            assert_eq!(matter_to(*opcode as u32, 1000), creates, "{opcode:?}");
            assert!(!matter_to(*opcode as u32, 0));
        }
    }
}
