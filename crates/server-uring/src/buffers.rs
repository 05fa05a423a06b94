//! Buffers: a shard's pool of aligned memory in two sizes.
//!
//! A [`Buf`] is a move-only token: who holds it may touch the bytes, and while an operation is in
//! flight the ring holds it. A received batch is shared by the operations that write from it as an
//! `Arc<Buf>`, which nobody can change; the last holder brings the memory back.

use crate::limits::*;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Aligned memory of one of the two sizes.
#[derive(Debug)]
pub struct Buf {
    memory: Vec<u8>,
    start: usize,
    len: usize,
    slot: Option<u16>,
}

impl Buf {
    fn new(len: usize) -> Buf {
        // Zeroed memory of this size comes untouched from the kernel: it costs nothing until used.
        let memory = vec![0u8; len + BUFFER_ALIGN];
        let start = memory.as_ptr().align_offset(BUFFER_ALIGN);
        Buf { memory, start, len, slot: None }
    }

    /// The place in the ring's table of registered buffers that is this memory's for good, if it
    /// has one: such a buffer lives as long as its shard.
    pub fn slot(&self) -> Option<u16> {
        self.slot
    }

    /// Whether it holds the largest batch.
    pub fn is_large(&self) -> bool {
        self.len == LARGE_BUFFER_BYTES
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// The free buffers of one shard, and the count of those that are out.
#[derive(Debug)]
pub struct BufferPool {
    /// Large ones that may be out.
    large_max: usize,
    small: Vec<Buf>,
    large: Vec<Buf>,
    small_out: usize,
    large_out: usize,
    large_returned: u64,
    slots_given: u16,
}

impl Default for BufferPool {
    fn default() -> BufferPool {
        BufferPool::new(LARGE_BUFFERS_MAX)
    }
}

impl BufferPool {
    /// With so many large buffers, at most [`LARGE_BUFFERS_MAX`].
    pub fn new(large_max: usize) -> BufferPool {
        BufferPool {
            large_max: large_max.clamp(LARGE_BUFFERS_MIN, LARGE_BUFFERS_MAX),
            small: Vec::new(),
            large: Vec::new(),
            small_out: 0,
            large_out: 0,
            large_returned: 0,
            slots_given: 0,
        }
    }

    /// A buffer of [`SMALL_BUFFER_BYTES`]. How many are out follows from the bounds on connections
    /// and requests.
    pub fn small(&mut self) -> Buf {
        self.small_out += 1;
        self.small.pop().unwrap_or_else(|| Buf::new(SMALL_BUFFER_BYTES))
    }

    /// A buffer of [`LARGE_BUFFER_BYTES`], or `None` while too many are out.
    pub fn large(&mut self) -> Option<Buf> {
        if self.large_out >= self.large_max {
            return None;
        }
        self.large_out += 1;
        Some(self.large.pop().unwrap_or_else(|| {
            let mut buf = Buf::new(LARGE_BUFFER_BYTES);
            if usize::from(self.slots_given) < LARGE_BUFFERS_KEPT {
                buf.slot = Some(self.slots_given);
                self.slots_given += 1;
            }
            buf
        }))
    }

    /// As [`BufferPool::large`], but only from the first half: what came in must never hold all the
    /// buffers that its answers need.
    pub fn large_for_input(&mut self) -> Option<Buf> {
        if self.large_out >= self.large_max / 2 { None } else { self.large() }
    }

    /// Counts the large buffers that came back.
    pub fn large_returned(&self) -> u64 {
        self.large_returned
    }

    /// A buffer for `len` bytes behind an aligned start.
    pub fn for_bytes(&mut self, len: usize) -> Option<Buf> {
        if len + BUFFER_ALIGN <= SMALL_BUFFER_BYTES { Some(self.small()) } else { self.large() }
    }

    /// Takes a buffer back.
    pub fn give(&mut self, buf: Buf) {
        if buf.is_large() {
            self.large_out -= 1;
            self.large_returned += 1;
            // Those that the ring may know, and no others.
            if buf.slot.is_some() {
                self.large.push(buf);
            }
        } else {
            self.small_out -= 1;
            if self.small.len() < SMALL_BUFFERS_KEPT {
                self.small.push(buf);
            }
        }
    }

    /// Takes a shared buffer back if this was its last holder.
    pub fn give_shared(&mut self, buf: Arc<Buf>) {
        if let Some(buf) = Arc::into_inner(buf) {
            self.give(buf);
        }
    }

    /// Buffers that are out.
    pub fn in_use(&self) -> usize {
        self.small_out + self.large_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_memory_is_short_there_are_fewer() {
        for (asked, expected) in [(0, LARGE_BUFFERS_MIN), (20, 20), (9999, LARGE_BUFFERS_MAX)] {
            let mut pool = BufferPool::new(asked);
            let large: Vec<Buf> = std::iter::from_fn(|| pool.large()).collect();
            assert_eq!(large.len(), expected);
        }
    }

    #[test]
    fn buffers_are_aligned_bounded_and_come_back() {
        let mut pool = BufferPool::default();
        let large: Vec<Buf> = std::iter::from_fn(|| pool.large()).collect();
        assert_eq!(large.len(), LARGE_BUFFERS_MAX);
        let small = pool.for_bytes(4096).expect("small ones are not bounded here");
        for buf in large.iter().chain([&small]) {
            assert_eq!(buf.as_ptr().align_offset(BUFFER_ALIGN), 0);
        }
        assert!(!small.is_large() && pool.for_bytes(SMALL_BUFFER_BYTES).is_none());
        let shared = Arc::new(small);
        pool.give_shared(shared.clone());
        assert_eq!(pool.in_use(), LARGE_BUFFERS_MAX + 1);
        pool.give_shared(shared);
        large.into_iter().for_each(|buf| pool.give(buf));
        assert_eq!((pool.in_use(), pool.large.len()), (0, LARGE_BUFFERS_KEPT));
    }
}
