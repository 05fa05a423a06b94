//! Many short pieces of bytes without an allocator's head each: pieces of nearly one length lie
//! side by side, and a number of 32 bits names one.
//!
//! Invariant: there are no holes. The last one of a length takes the place of one that goes, so
//! that memory is given back as soon as it is not needed; whoever removes is told which moved.

/// Lengths are rounded up to this.
const STEP: usize = 8;
/// Pieces that are allocated at once: so many, fewer where they are long.
const PER_CHUNK_MAX: usize = 64;
const CHUNK_BYTES_MAX: usize = 4096;
const INDEX_BITS: u32 = 25;

/// Where a piece is. The default is before all others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct At(u32);

impl At {
    fn new(class: usize, index: usize) -> At {
        At((class as u32) << INDEX_BITS | index as u32)
    }

    fn parts(self) -> (usize, usize) {
        ((self.0 >> INDEX_BITS) as usize, (self.0 & ((1 << INDEX_BITS) - 1)) as usize)
    }
}

#[derive(Default)]
struct Class {
    chunks: Vec<Box<[u8]>>,
    count: usize,
}

/// Pieces of up to `MOST` bytes.
pub(super) struct Slots<const MOST: usize> {
    classes: Vec<Class>,
}

impl<const MOST: usize> Slots<MOST> {
    const CLASSES: usize = MOST.div_ceil(STEP) + 1;
    const FIT: () = assert!(Self::CLASSES <= 1 << (32 - INDEX_BITS));

    pub(super) const fn new() -> Self {
        const { Self::FIT }
        Slots { classes: Vec::new() }
    }

    fn per_chunk(class: usize) -> usize {
        (CHUNK_BYTES_MAX / (class * STEP).max(1)).clamp(1, PER_CHUNK_MAX)
    }

    /// `None`: it is too long, or there are 2^25 of its length.
    pub(super) fn insert(&mut self, bytes: &[u8]) -> Option<At> {
        let number = bytes.len().div_ceil(STEP);
        if number >= Self::CLASSES {
            return None;
        }
        if self.classes.len() <= number {
            self.classes.resize_with(number + 1, Class::default);
        }
        let class = self.classes.get_mut(number)?;
        let index = class.count;
        if index >= 1 << INDEX_BITS {
            return None;
        }
        if index.is_multiple_of(Self::per_chunk(number)) {
            let bytes = number * STEP * Self::per_chunk(number);
            class.chunks.push(vec![0; bytes].into());
        }
        class.count += 1;
        let at = At::new(number, index);
        let slot = self.get_mut(at);
        slot[..bytes.len()].copy_from_slice(bytes);
        Some(at)
    }

    fn place(at: At) -> (usize, usize, std::ops::Range<usize>) {
        let (class, index) = at.parts();
        let per_chunk = Self::per_chunk(class);
        let from = index % per_chunk * class * STEP;
        (class, index / per_chunk, from..from + class * STEP)
    }

    /// A piece that is here, and what it was rounded up by.
    pub(super) fn get(&self, at: At) -> &[u8] {
        let (class, chunk, range) = Self::place(at);
        &self.classes[class].chunks[chunk][range]
    }

    pub(super) fn get_mut(&mut self, at: At) -> &mut [u8] {
        let (class, chunk, range) = Self::place(at);
        &mut self.classes[class].chunks[chunk][range]
    }

    /// Takes a piece out. The one that was at the place that is returned is now at `at`.
    pub(super) fn remove(&mut self, at: At) -> Option<At> {
        let (number, index) = at.parts();
        let class = &mut self.classes[number];
        class.count -= 1;
        let last = At::new(number, class.count);
        let moved = (index != class.count).then_some(last);
        if moved.is_some() {
            let (_, from_chunk, from) = Self::place(last);
            let (_, to_chunk, to) = Self::place(at);
            if from_chunk == to_chunk {
                class.chunks[to_chunk].copy_within(from, to.start);
            } else {
                let [to_chunk, from_chunk] = class
                    .chunks
                    .get_disjoint_mut([to_chunk, from_chunk])
                    .expect("two chunks that are there");
                to_chunk[to].copy_from_slice(&from_chunk[from]);
            }
        }
        if class.count.is_multiple_of(Self::per_chunk(number)) {
            class.chunks.pop();
            if class.chunks.len() * 4 < class.chunks.capacity() {
                class.chunks.shrink_to(class.chunks.len() * 2);
            }
        }
        moved
    }

    /// Where there are pieces, from this place on.
    pub(super) fn places(&self, from: At) -> impl Iterator<Item = At> {
        let (first, index) = from.parts();
        let classes = self.classes.iter().enumerate().skip(first);
        classes.flat_map(move |(number, class)| {
            let index = if number == first { index } else { 0 };
            (index..class.count).map(move |index| At::new(number, index))
        })
    }

    /// Bytes that are allocated for pieces.
    #[cfg(test)]
    pub(super) fn allocated(&self) -> usize {
        self.classes.iter().flat_map(|class| &class.chunks).map(|chunk| chunk.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn pieces_stay_what_they_are(
            steps in proptest::collection::vec((0_usize..100, 2_usize..40, 0_usize..4), 1..800),
        ) {
            let mut slots = Slots::<40>::new();
            let mut kept: HashMap<u32, Vec<u8>> = HashMap::new();
            for (n, (pick, len, what)) in steps.into_iter().enumerate() {
                let known = kept.keys().copied().nth(pick);
                if let (0, Some(known)) = (what, known) {
                    kept.remove(&known);
                    if let Some(moved) = slots.remove(At(known)) {
                        let bytes = kept.remove(&moved.0).expect("what moved was there");
                        kept.insert(known, bytes);
                    }
                } else {
                    let bytes = vec![n as u8; len];
                    let at = slots.insert(&bytes).expect("room");
                    prop_assert!(kept.insert(at.0, bytes).is_none());
                }
                let places: Vec<_> = slots.places(At::default()).map(|at| at.0).collect();
                let mut known: Vec<_> = kept.keys().copied().collect();
                known.sort_unstable();
                prop_assert_eq!(places, known);
                for (&at, bytes) in &kept {
                    prop_assert_eq!(&slots.get(At(at))[..bytes.len()], &bytes[..]);
                }
            }
            let mut all: Vec<_> = kept.into_keys().collect();
            // From the end, so that nothing moves.
            all.sort_unstable();
            for at in all.into_iter().rev() {
                prop_assert_eq!(slots.remove(At(at)), None);
            }
            prop_assert_eq!(slots.allocated(), 0);
        }
    }

    #[test]
    fn one_of_each_length_takes_a_page_at_most() {
        let mut slots = Slots::<800>::new();
        assert!((1..=800).step_by(STEP).all(|len| slots.insert(&vec![0; len]).is_some()));
        assert!(slots.allocated() <= 100 * CHUNK_BYTES_MAX, "{} bytes", slots.allocated());
    }

    #[test]
    fn what_is_too_long_is_refused() {
        assert!(Slots::<40>::new().insert(&[0; 40]).is_some());
        assert!(Slots::<40>::new().insert(&[0; 41]).is_none());
    }
}
