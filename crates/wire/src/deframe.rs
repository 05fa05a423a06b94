//! A stream of bytes, cut into whole batches.
//!
//! One buffer of fixed size: bytes are received into [`Deframer::spare`], counted by
//! [`Deframer::filled`], and leave as whole batches by [`Deframer::next`], which lends them where
//! they lie. It must be asked until it gives `None` before `spare` is asked again.

use crate::batch::{BatchError, peek_len};
use crate::limits::BATCH_BYTES_MAX;
use std::ops::Range;

/// The receiving end of a connection that owns its buffer.
#[derive(Debug)]
pub struct Deframer {
    buffer: Vec<u8>,
    filled: Range<usize>,
}

impl Default for Deframer {
    fn default() -> Self {
        Self::new()
    }
}

impl Deframer {
    /// Room for one batch of the largest size and something behind it.
    pub fn new() -> Deframer {
        Deframer { buffer: vec![0; BATCH_BYTES_MAX + (64 << 10)], filled: 0..0 }
    }

    /// The same bytes in the memory of another one, whose own are over: pages that were needed
    /// once are there already.
    pub fn within(self, mut other: Deframer) -> Deframer {
        let bytes = &self.buffer[self.filled];
        other.buffer[..bytes.len()].copy_from_slice(bytes);
        other.filled = 0..bytes.len();
        other
    }

    /// Where to receive; never empty.
    pub fn spare(&mut self) -> &mut [u8] {
        if self.filled.start > 0 {
            self.buffer.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        &mut self.buffer[self.filled.end..]
    }

    /// `n` bytes were received into what `spare` gave.
    ///
    /// # Panics
    /// When `n` is more than `spare` had.
    pub fn filled(&mut self, n: usize) {
        assert!(n <= self.buffer.len() - self.filled.end, "more bytes than room");
        self.filled.end += n;
    }

    /// Bytes that wait for the rest of their batch.
    pub fn pending(&self) -> usize {
        self.filled.len()
    }

    /// The next whole batch, not yet verified.
    pub fn next_batch(&mut self) -> Result<Option<&mut [u8]>, BatchError> {
        let bytes = &self.buffer[self.filled.clone()];
        match peek_len(bytes)? {
            Some(len) if len <= bytes.len() => {
                let start = self.filled.start;
                self.filled.start += len;
                Ok(Some(&mut self.buffer[start..start + len]))
            }
            _ => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{BatchBuilder, RecordHeader, verify};
    use proptest::prelude::*;

    fn stream(sizes: &[usize]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut buffer = vec![0; BATCH_BYTES_MAX];
        for (seq, &size) in sizes.iter().enumerate() {
            let mut builder = BatchBuilder::new();
            assert!(builder.push(&mut buffer, RecordHeader::default(), &vec![seq as u8; size]));
            out.extend_from_slice(builder.finish(&mut buffer, seq as u64, 0, true));
        }
        out
    }

    #[test]
    fn what_came_goes_on_in_the_memory_of_another_one() {
        let bytes = stream(&[100, 3000]);
        let take = |deframer: &mut Deframer, from: &[u8]| {
            deframer.spare()[..from.len()].copy_from_slice(from);
            deframer.filled(from.len());
        };
        let (mut old, mut new) = (Deframer::new(), Deframer::new());
        take(&mut old, &bytes[..1000]);
        let place = old.buffer.as_ptr();
        take(&mut new, &bytes[..2000]);
        let first = new.next_batch().expect("well formed").expect("whole").len();
        let mut deframer = new.within(old);
        assert_eq!(deframer.buffer.as_ptr(), place);
        assert_eq!(deframer.pending(), 2000 - first);
        take(&mut deframer, &bytes[2000..]);
        let batch = deframer.next_batch().expect("well formed").expect("whole");
        assert_eq!(verify(batch, true).expect("unharmed").seq, 1);
        assert_eq!(deframer.pending(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn splits_do_not_matter(
            sizes in prop::collection::vec(prop_oneof![0usize..2000, 60_000usize..1_000_000], 1..6),
            cuts in prop::collection::vec(1usize..200_000, 1..64),
        ) {
            let bytes = stream(&sizes);
            let mut deframer = Deframer::new();
            let (mut at, mut seq) = (0, 0u64);
            for cut in cuts.iter().cycle() {
                let spare = deframer.spare();
                let n = (*cut).min(spare.len()).min(bytes.len() - at);
                spare[..n].copy_from_slice(&bytes[at..at + n]);
                deframer.filled(n);
                at += n;
                while let Some(batch) = deframer.next_batch().expect("well formed") {
                    prop_assert_eq!(verify(batch, true).expect("unharmed").seq, seq);
                    seq += 1;
                }
                if at == bytes.len() {
                    break;
                }
            }
            prop_assert_eq!(seq as usize, sizes.len());
            prop_assert_eq!(deframer.pending(), 0);
        }
    }
}
