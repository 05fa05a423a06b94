//! What a request asked and what its reply gives, as the kernel will judge both.
//!
//! Pure: it takes bytes. Invariant: what the kernel refuses gives nothing.

use ringfs_wire::abi::{Attr, DirentPlus, EntryOut, FUSE_WRITE_CACHE, Opcode, OpenOut, fattr};
use rustix::fs::{FileType, OFlags};
use zerocopy::FromBytes;

/// The kernel takes no longer names in listings.
pub(super) const NAME_BYTES_MAX: usize = 1024;
/// What of a request's arguments says what its reply means.
const ARGS_BYTES: usize = 24;
/// They are over with the open itself.
const FLAGS_ONCE: OFlags =
    OFlags::CREATE.union(OFlags::EXCL).union(OFlags::TRUNC).union(OFlags::NOCTTY);

const fn bits(opcodes: &[Opcode]) -> u64 {
    let (mut bits, mut at) = (0, 0);
    while at < opcodes.len() {
        bits |= 1 << opcodes[at] as u32;
        at += 1;
    }
    bits
}

/// Their replies are one entry.
pub(super) const ENTRY: u64 =
    bits(&[Opcode::Lookup, Opcode::Mknod, Opcode::Mkdir, Opcode::Symlink, Opcode::Link]);
/// One entry and an open file.
const ENTRY_AND_OPEN: u64 = bits(&[Opcode::Create, Opcode::Tmpfile]);
pub(super) const OPEN: u64 = bits(&[Opcode::Open, Opcode::Opendir]);
pub(super) const RELEASE: u64 = bits(&[Opcode::Release, Opcode::Releasedir]);
pub(super) const LISTING: u64 = bits(&[Opcode::Readdirplus]);
pub(super) const ANY: u64 = ENTRY | ENTRY_AND_OPEN | OPEN | RELEASE | LISTING;

pub(super) const fn is_in(set: u64, opcode: u32) -> bool {
    opcode < u64::BITS && set >> opcode & 1 != 0
}

/// What a request asked, as far as its reply needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    pub(super) nodeid: u64,
    args: [u8; ARGS_BYTES],
}

impl Asked {
    /// Of a request's node and arguments; what is short is zeros.
    pub fn new(nodeid: u64, args: &[u8]) -> Asked {
        let mut first = [0; ARGS_BYTES];
        let len = args.len().min(ARGS_BYTES);
        first[..len].copy_from_slice(&args[..len]);
        Asked { nodeid, args: first }
    }

    /// Of a record as it was sent.
    pub fn of_record(record: &[u8]) -> Option<Asked> {
        let nodeid = u64::read_from_bytes(record.get(16..24)?).ok()?;
        Some(Asked::new(nodeid, record.get(40..)?))
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes([self.args[at], self.args[at + 1], self.args[at + 2], self.args[at + 3]])
    }

    /// The first argument of OPEN, OPENDIR, CREATE, TMPFILE.
    pub(super) fn flags(&self) -> u32 {
        self.word(0) & !FLAGS_ONCE.bits()
    }

    /// The first argument of RELEASE, RELEASEDIR and WRITE.
    pub(super) fn fh(&self) -> u64 {
        u64::from(self.word(0)) | u64::from(self.word(4)) << 32
    }

    /// Whether a SETATTR changes the length.
    pub(super) fn sets_size(&self) -> bool {
        self.word(0) & fattr::SIZE != 0
    }

    /// Whether a WRITE is of pages that are written back.
    pub(super) fn is_of_cache(&self) -> bool {
        self.word(20) & FUSE_WRITE_CACHE != 0
    }

    /// Bytes that a READDIRPLUS wants at most.
    pub(super) fn size(&self) -> usize {
        self.word(16) as usize
    }
}

/// A node that a reply gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) id: u64,
    /// A regular file.
    pub(super) is_file: bool,
}

impl Given {
    fn of(entry: &EntryOut) -> Given {
        let kind = FileType::from_raw_mode(entry.attr.mode);
        Given { id: entry.nodeid, is_file: kind == FileType::RegularFile }
    }
}

/// The node of an entry, if the kernel counts it; `excess` is by how much the reply's length is
/// wrong behind it.
pub(super) fn entry_of(body: &[u8], excess: usize) -> Option<Given> {
    let entry = EntryOut::read_from_bytes(body).ok().filter(|_| excess == 0)?;
    is_valid(&entry.attr).then(|| Given::of(&entry))
}

pub(super) fn open_of(body: &[u8]) -> Option<u64> {
    Some(OpenOut::read_from_bytes(body).ok()?.fh)
}

/// As the kernel judges (`fuse_invalid_attr`).
fn is_valid(attr: &Attr) -> bool {
    let kind = FileType::from_raw_mode(attr.mode);
    kind != FileType::Unknown && i64::try_from(attr.size).is_ok()
}

/// Walks a READDIRPLUS's body as the kernel does (`parse_dirplusfile`): what it does not reach
/// gives nothing. An entry whose attributes it refuses counts, since it gives that back.
pub(super) fn listed(mut body: &[u8], mut give: impl FnMut(Given)) {
    while let Ok((head, rest)) = DirentPlus::read_from_prefix(body) {
        let namelen = head.dirent.namelen as usize;
        let len = (size_of::<DirentPlus>() + namelen.min(body.len())).next_multiple_of(8);
        let (Some(name), Some(next)) = (rest.get(..namelen), body.get(len..)) else { return };
        if name.is_empty() || namelen > NAME_BYTES_MAX || name.contains(&b'/') {
            return;
        }
        if name != b"." && name != b".." {
            give(Given::of(&head.entry_out));
        }
        body = next;
    }
}
