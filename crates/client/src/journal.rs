//! A log in shared memory of what the kernel was given and has given back, for the client that
//! comes next: one for each shard of `known`, written before the table changes.
//!
//! ```text
//! word: half << 63 | bytes      two halves: entries one after the other
//! entry: kind u8, bits u8, recipe_len u16, extra u32, a u64, b u64, c u64, recipe, padding
//! ```
//!
//! Invariant: what the word counts is whole entries; it is stored after they are. A half that is
//! full is written anew, without what is over, into the other one, and the word then changes once.
//! What reads it must bear any bytes: a client that died may have written anything. It must not
//! know what entries mean.

use ringfs_mapping::Part;
use rustix::fs::{FallocateFlags, fallocate};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Virtual bytes of one half; pages cost memory when they are first written.
pub const HALF_BYTES: usize = 96 << 20;
/// A half that is no longer is not worth to be written anew. Each of many logs may be so long.
const SMALL_BYTES: usize = 8 << 10;
const HALF_BIT: u64 = 1 << 63;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct Head {
    kind: u8,
    directory: u8,
    recipe_len: u16,
    extra: u32,
    a: u64,
    b: u64,
    c: u64,
}
const HEAD_BYTES: usize = size_of::<Head>();
const _: () = assert!(HEAD_BYTES == 32);

/// One change. A `tag` names the request whose reply made it; 0: none that is not over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "known.rs says what they mean")]
pub enum Entry<'a> {
    /// A NODE record's.
    Heard {
        id: u64,
        recipe: &'a [u8],
    },
    /// A whole node, where a half begins.
    Node {
        id: u64,
        count: u64,
        recipe: &'a [u8],
    },
    Given {
        id: u64,
        tag: u64,
    },
    Opened {
        fh: u64,
        node: u64,
        flags: u32,
        directory: bool,
        doubted: bool,
        tag: u64,
    },
    Closed {
        fh: u64,
    },
    /// `index`: which of the FORGET's.
    Forgotten {
        id: u64,
        lookups: u64,
        index: u32,
        tag: u64,
    },
    /// The reply did not reach the kernel.
    Undone {
        tag: u64,
    },
    /// The highest numbers so far, where a half begins.
    Highest {
        node_id: u64,
        fh: u64,
    },
}

impl<'a> Entry<'a> {
    fn parts(&self) -> (Head, &'a [u8]) {
        let head = Head::default();
        match *self {
            Entry::Heard { id, recipe } => (Head { kind: 1, a: id, ..head }, recipe),
            Entry::Node { id, count, recipe } => {
                (Head { kind: 2, a: id, b: count, ..head }, recipe)
            }
            Entry::Given { id, tag } => (Head { kind: 3, a: id, b: tag, ..head }, &[]),
            Entry::Opened { fh, node, flags, directory, doubted, tag } => {
                let directory = u8::from(directory) | u8::from(doubted) << 1;
                (Head { kind: 4, directory, extra: flags, a: fh, b: node, c: tag, ..head }, &[])
            }
            Entry::Closed { fh } => (Head { kind: 5, a: fh, ..head }, &[]),
            Entry::Forgotten { id, lookups, index, tag } => {
                (Head { kind: 6, extra: index, a: id, b: lookups, c: tag, ..head }, &[])
            }
            Entry::Undone { tag } => (Head { kind: 7, a: tag, ..head }, &[]),
            Entry::Highest { node_id, fh } => (Head { kind: 8, a: node_id, b: fh, ..head }, &[]),
        }
    }

    /// The first of `bytes`, and what is behind it; `None` where nothing sound is.
    fn first(bytes: &[u8]) -> Option<(Entry<'_>, &[u8])> {
        let (head, rest) = Head::read_from_prefix(bytes).ok()?;
        let len = usize::from(head.recipe_len);
        let (padded, rest) = rest.split_at_checked(len.next_multiple_of(8))?;
        let Head { kind, directory, extra, a, b, c, .. } = head;
        let entry = match kind {
            1 => Entry::Heard { id: a, recipe: &padded[..len] },
            2 => Entry::Node { id: a, count: b, recipe: &padded[..len] },
            3 => Entry::Given { id: a, tag: b },
            4 => {
                let (directory, doubted) = (directory & 1 != 0, directory & 2 != 0);
                Entry::Opened { fh: a, node: b, flags: extra, directory, doubted, tag: c }
            }
            5 => Entry::Closed { fh: a },
            6 => Entry::Forgotten { id: a, lookups: b, index: extra, tag: c },
            7 => Entry::Undone { tag: a },
            8 => Entry::Highest { node_id: a, fh: b },
            _ => return None,
        };
        Some((entry, rest))
    }
}

/// One half, and where it is in the file.
#[derive(Debug)]
pub struct Half {
    /// Its memory.
    pub bytes: Part<u8>,
    /// Its offset in the file.
    pub offset: u64,
}

/// A log.
#[derive(Debug)]
pub struct Log {
    file: Arc<OwnedFd>,
    word: Part<AtomicU64>,
    halves: [Half; 2],
    half: usize,
    len: usize,
    /// Bytes at which it is written anew.
    limit: usize,
}

impl Log {
    /// The log at that place of the file, with what is in it.
    pub fn new(file: Arc<OwnedFd>, word: Part<AtomicU64>, halves: [Half; 2]) -> Log {
        let mut log = Log { file, word, halves, half: 0, len: 0, limit: SMALL_BYTES };
        let word = log.word().load(Ordering::Acquire);
        log.half = usize::from(word & HALF_BIT != 0);
        log.len = ((word & !HALF_BIT) as usize).min(log.halves[log.half].bytes.as_ref().len());
        log.limit = (2 * log.len).clamp(SMALL_BYTES, HALF_BYTES);
        log
    }

    /// What is in it is of no use to anybody: it looks damaged from now on.
    pub fn spoil(&self) {
        self.word().store(1, Ordering::Release);
    }

    fn word(&self) -> &AtomicU64 {
        &self.word.as_ref()[0]
    }

    /// Its entries, in order; `None` is the last where the rest is damaged.
    pub fn entries(&self) -> impl Iterator<Item = Option<Entry<'_>>> {
        let mut rest = &self.halves[self.half].bytes.as_ref()[..self.len];
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let first = Entry::first(rest);
            rest = first.map_or(&[], |(_, rest)| rest);
            Some(first.map(|(entry, _)| entry))
        })
    }

    /// Adds an entry; false: it has to be written anew first.
    pub fn append(&mut self, entry: &Entry<'_>) -> bool {
        let (half, limit) = (self.half, self.limit);
        let Some(len) = self.put(half, self.len, limit, entry) else { return false };
        self.publish(half, len);
        true
    }

    fn put(&mut self, half: usize, at: usize, limit: usize, entry: &Entry<'_>) -> Option<usize> {
        let (mut head, recipe) = entry.parts();
        head.recipe_len = u16::try_from(recipe.len()).ok()?;
        let end = at + HEAD_BYTES + recipe.len().next_multiple_of(8);
        let place = self.halves[half].bytes.as_mut().get_mut(at..end).filter(|_| end <= limit)?;
        place[..HEAD_BYTES].copy_from_slice(head.as_bytes());
        place[HEAD_BYTES..HEAD_BYTES + recipe.len()].copy_from_slice(recipe);
        Some(end)
    }

    fn publish(&mut self, half: usize, len: usize) {
        let bit = if half == 1 { HALF_BIT } else { 0 };
        self.word().store(bit | len as u64, Ordering::Release);
        (self.half, self.len) = (half, len);
    }

    /// Writes it anew; false: it is too much, and the log as it was is good still.
    pub fn rewrite<'e>(&mut self, entries: impl Iterator<Item = Entry<'e>>) -> bool {
        let (old, new) = (self.half, 1 - self.half);
        let mut len = 0;
        for entry in entries {
            // Room is left for more.
            match self.put(new, len, HALF_BYTES / 2, &entry) {
                Some(end) => len = end,
                None => return false,
            }
        }
        self.publish(new, len);
        self.limit = (2 * len).clamp(SMALL_BYTES, HALF_BYTES);
        let Half { bytes, offset } = &self.halves[old];
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A refusal costs memory alone.
        let _ = fallocate(&self.file, flags, *offset, bytes.as_ref().len() as u64);
        true
    }
}
