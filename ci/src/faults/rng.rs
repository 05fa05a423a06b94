//! Numbers that follow from a seed alone (splitmix64), so that a run can be repeated.
//!
//! Invariant: what is drawn depends on the parts that the generator was made of and on how often
//! it was asked, never on time or on another thread.

/// A sequence of numbers.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The sequence that belongs to `parts`, such as a seed, a connection and a direction.
    pub fn of(parts: &[u64]) -> Self {
        let mut rng = Self(0x5eed);
        for part in parts {
            rng.0 ^= part.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
            rng.0 = rng.next();
        }
        rng
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }

    /// Yes, once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of `choices`, which are not empty.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len() as u64) as usize]
    }

    /// The index of one of `weights`, by weight.
    pub fn weighted(&mut self, weights: impl Iterator<Item = u64> + Clone) -> usize {
        let mut left = self.below(weights.clone().sum());
        for (index, weight) in weights.enumerate() {
            if left < weight {
                return index;
            }
            left -= weight;
        }
        0
    }

    /// A number up to `max`, of each order of magnitude as often as of any other.
    pub fn magnitude(&mut self, max: u64) -> u64 {
        let unit = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        let value = ((max as f64 + 1.0).ln() * unit).exp() - 1.0;
        (value as u64).min(max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_parts_give_the_same_numbers_and_others_do_not() {
        let take = |parts: &[u64]| {
            let mut rng = Rng::of(parts);
            (0..100).map(|_| rng.next()).collect::<Vec<_>>()
        };
        assert_eq!(take(&[1, 2, 3]), take(&[1, 2, 3]));
        assert_ne!(take(&[1, 2, 3]), take(&[1, 3, 2]));
        assert_ne!(take(&[0, 0]), take(&[0]));
    }

    #[test]
    fn numbers_stay_in_bounds_and_reach_them() {
        let mut rng = Rng::of(&[7]);
        assert_eq!(rng.below(0), 0);
        let seen: Vec<u64> = (0..20_000).map(|_| rng.magnitude(1000)).collect();
        assert!(seen.iter().all(|n| *n <= 1000));
        for range in [0..1, 1..10, 10..100, 100..1001] {
            let hits = seen.iter().filter(|n| range.contains(*n)).count();
            assert!(hits > 1000, "{range:?}: {hits}");
        }
        let weighted: Vec<usize> = (0..1000).map(|_| rng.weighted([1, 0, 3].into_iter())).collect();
        assert!(!weighted.contains(&1) && weighted.iter().filter(|n| **n == 2).count() > 600);
    }
}
