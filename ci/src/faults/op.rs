//! One operation on a tree of files, and what it gave.
//!
//! Invariant: an operation is plain data, so that the model and the file system do the same, and a
//! message can show it. Content follows from who wrote it and when ([`content`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use rustix::io::Errno;

use super::rng::Rng;

/// Names from the root of the tree; empty is the root itself.
pub type Path = Vec<String>;
/// Number of an open file, chosen by whoever opens it.
pub type Handle = u32;

/// Bytes that tell who wrote them and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The thread.
    pub thread: u64,
    /// Counted by the thread.
    pub seq: u64,
    /// How many.
    pub len: usize,
}

/// What a rename must find at its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renaming {
    /// Anything or nothing.
    Plain,
    /// RENAME_NOREPLACE: nothing.
    NoReplace,
    /// RENAME_EXCHANGE: something, which goes where the other came from.
    Exchange,
}

/// What a setxattr must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// The value there or not.
    Any,
    /// XATTR_CREATE: not there.
    Create,
    /// XATTR_REPLACE: there.
    Replace,
}

/// An operation. Paths are never followed through a symbolic link at their end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Create {
        path: Path,
        handle: Handle,
    },
    Open {
        path: Path,
        handle: Handle,
        append: bool,
    },
    Close {
        handle: Handle,
    },
    Write {
        handle: Handle,
        at: u64,
        tag: Tag,
    },
    Read {
        handle: Handle,
    },
    Resize {
        handle: Handle,
        len: u64,
    },
    StatHandle {
        handle: Handle,
    },
    Fsync {
        handle: Handle,
    },
    /// Opens, appends in one write, closes.
    AppendTo {
        path: Path,
        tag: Tag,
    },
    ReadAll {
        path: Path,
    },
    /// O_TMPFILE beside `path`, one write, and the name by linkat.
    TmpLink {
        path: Path,
        tag: Tag,
    },
    Mkdir {
        path: Path,
    },
    Rmdir {
        path: Path,
    },
    Unlink {
        path: Path,
    },
    Symlink {
        path: Path,
        target: String,
    },
    Readlink {
        path: Path,
    },
    Link {
        old: Path,
        new: Path,
    },
    Rename {
        old: Path,
        new: Path,
        how: Renaming,
    },
    Chmod {
        path: Path,
        mode: u32,
    },
    Stat {
        path: Path,
    },
    Readdir {
        path: Path,
    },
    FsyncDir {
        path: Path,
    },
    SetXattr {
        path: Path,
        name: String,
        tag: Tag,
        how: Setting,
    },
    Xattr {
        path: Path,
        name: String,
    },
    ListXattr {
        path: Path,
    },
    RemoveXattr {
        path: Path,
        name: String,
    },
}

impl Op {
    /// Whether it changes anything but open files.
    pub fn changes(&self) -> bool {
        match self {
            Op::Create { .. }
            | Op::Write { .. }
            | Op::Resize { .. }
            | Op::AppendTo { .. }
            | Op::TmpLink { .. }
            | Op::Mkdir { .. }
            | Op::Rmdir { .. }
            | Op::Unlink { .. }
            | Op::Symlink { .. }
            | Op::Link { .. }
            | Op::Rename { .. }
            | Op::Chmod { .. }
            | Op::SetXattr { .. }
            | Op::RemoveXattr { .. } => true,
            Op::Open { .. }
            | Op::Close { .. }
            | Op::Read { .. }
            | Op::StatHandle { .. }
            | Op::Fsync { .. }
            | Op::ReadAll { .. }
            | Op::Readlink { .. }
            | Op::Stat { .. }
            | Op::Readdir { .. }
            | Op::FsyncDir { .. }
            | Op::Xattr { .. }
            | Op::ListXattr { .. } => false,
        }
    }

    /// The same with the first `len` bytes of what it writes.
    pub fn cut(&self, len: usize) -> Op {
        let mut op = self.clone();
        if let Op::Write { tag, .. } | Op::AppendTo { tag, .. } = &mut op {
            tag.len = len;
        }
        op
    }

    /// The open file that it uses or makes.
    pub fn handle(&self) -> Option<Handle> {
        match self {
            Op::Create { handle, .. }
            | Op::Open { handle, .. }
            | Op::Close { handle }
            | Op::Write { handle, .. }
            | Op::Read { handle }
            | Op::Resize { handle, .. }
            | Op::StatHandle { handle }
            | Op::Fsync { handle } => Some(*handle),
            _ => None,
        }
    }
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Link,
}

/// What an operation gave.
#[derive(Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Done,
    /// It failed.
    Fail(Errno),
    /// So many bytes were told to be written; the next write failed.
    Part(usize, Errno),
    /// Content.
    Bytes(Vec<u8>),
    /// Attributes; `size` is 0 for a directory.
    Stat { kind: Kind, size: u64, nlink: u64, mode: u32 },
    /// A listing of a directory.
    Names(BTreeMap<String, Kind>),
    /// A listing of extended attributes.
    Keys(BTreeSet<String>),
    /// A symbolic link's target.
    Text(String),
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Done => write!(f, "done"),
            Outcome::Fail(errno) => write!(f, "{errno}"),
            Outcome::Part(bytes, errno) => write!(f, "{bytes} bytes, then {errno}"),
            Outcome::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Outcome::Stat { kind, size, nlink, mode } => {
                write!(f, "{kind:?} of {size} bytes, nlink {nlink}, mode {mode:o}")
            }
            Outcome::Names(names) => write!(f, "{names:?}"),
            Outcome::Keys(keys) => write!(f, "{keys:?}"),
            Outcome::Text(text) => write!(f, "{text:?}"),
        }
    }
}

/// Whoever performs operations.
pub trait Subject {
    /// Performs it.
    fn apply(&mut self, op: &Op) -> Outcome;
}

const MAGIC: &[u8; 4] = b"RFtg";

/// The bytes of a tag: the tag itself in the first 16, then what follows from it.
pub fn content(tag: Tag) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(tag.len + 16);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&(tag.thread as u32).to_le_bytes());
    bytes.extend_from_slice(&tag.seq.to_le_bytes());
    let mut rng = Rng::of(&[tag.thread, tag.seq]);
    while bytes.len() < tag.len {
        bytes.extend_from_slice(&rng.next().to_le_bytes());
    }
    bytes.truncate(tag.len);
    bytes
}

/// Who wrote what begins here: thread and sequence.
pub fn author(bytes: &[u8]) -> Option<(u64, u64)> {
    let (head, _) = bytes.split_first_chunk::<16>()?;
    let (magic, rest) = head.split_first_chunk::<4>()?;
    let (thread, seq) = rest.split_first_chunk::<4>()?;
    let seq = u64::from_le_bytes(seq.try_into().ok()?);
    (magic == MAGIC).then_some((u32::from_le_bytes(*thread).into(), seq))
}

/// How two outcomes differ, in words.
pub fn differ(expected: &Outcome, found: &Outcome) -> String {
    let (Outcome::Bytes(expected), Outcome::Bytes(found)) = (expected, found) else {
        return format!("expected {expected:?}, got {found:?}");
    };
    let at = expected.iter().zip(found).position(|(a, b)| a != b);
    let at = at.unwrap_or(expected.len().min(found.len()));
    let whose = |bytes: &[u8]| {
        let from = (0..=at.min(bytes.len())).rev();
        match from
            .map(|start| (start, &bytes[start..]))
            .find_map(|(start, rest)| author(rest).map(|(thread, seq)| (start, thread, seq)))
        {
            Some((start, thread, seq)) => format!("thread {thread}'s write {seq} at {start}"),
            None => "no write".into(),
        }
    };
    format!(
        "expected {} bytes, got {}; they differ from byte {at} on: {} expected, {} found",
        expected.len(),
        found.len(),
        whose(expected),
        whose(found)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_tells_its_author() {
        let tag = Tag { thread: 3, seq: 9, len: 1000 };
        assert_eq!((content(tag).len(), author(&content(tag))), (1000, Some((3, 9))));
        assert_eq!(content(Tag { len: 5, ..tag }), content(tag)[..5]);
        assert_ne!(content(Tag { seq: 10, ..tag })[16..], content(tag)[16..]);
        assert_eq!(author(&[0; 40]), None);
        let doubled = [content(tag), content(tag)].concat();
        let text = differ(&Outcome::Bytes(content(tag)), &Outcome::Bytes(doubled));
        assert!(text.contains("from byte 1000") && text.contains("write 9"), "{text}");
    }
}
