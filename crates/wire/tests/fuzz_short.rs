//! The fuzz targets' bodies on stable: random bytes, and good streams that were damaged and often
//! made good again around the damage. RINGFS_FUZZ_SECONDS says for how long (5), RINGFS_FUZZ_SEED
//! from where.

#[path = "../fuzz/bodies.rs"]
mod bodies;

use std::time::{Duration, Instant};

/// A small generator whose whole state is the seed (xorshift64*).
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }
}

fn damage(bytes: &mut Vec<u8>, rng: &mut Rng) {
    for _ in 0..1 + rng.below(4) {
        if bytes.is_empty() {
            return;
        }
        // Most that matters stands at the front.
        let near = [64, 400, usize::MAX][rng.below(3)].min(bytes.len());
        let at = rng.below(near);
        match rng.below(8) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][rng.below(5)],
            2 => {
                let word = [0, 1, 15, 16, 31, 32, u32::MAX, 1 << 20][rng.below(8)];
                let end = (at + 4).min(bytes.len());
                bytes[at..end].copy_from_slice(&word.to_le_bytes()[..end - at]);
            }
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(at..(at + 1 + rng.below(40)).min(bytes.len()))),
            5 => {
                let more = bytes[at..(at + 1 + rng.below(100)).min(bytes.len())].to_vec();
                bytes.splice(at..at, more);
            }
            6 => bytes.extend_from_within(at..),
            _ => bytes[at] = bytes[at].wrapping_add(1),
        }
        bytes.truncate(3 << 20);
    }
}

#[test]
fn no_bytes_break_the_wire() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let seconds = number("RINGFS_FUZZ_SECONDS").unwrap_or(5);
    let first: u64 = number("RINGFS_FUZZ_SEED").unwrap_or(1);
    let samples = bodies::samples();
    for sample in &samples {
        run(sample, "a sample");
    }
    let start = Instant::now();
    let mut rounds = 0u64;
    while start.elapsed() < Duration::from_secs(seconds) {
        let seed = first + rounds;
        let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let mut bytes = match rng.below(8) {
            0 => (0..rng.below(5000)).map(|_| rng.below(256) as u8).collect(),
            _ => samples[rng.below(samples.len())].clone(),
        };
        if !bytes.is_empty() {
            damage(&mut bytes, &mut rng);
        }
        if rng.below(3) > 0 {
            bodies::reseal(&mut bytes);
        }
        run(&bytes, &format!("RINGFS_FUZZ_SEED={seed}"));
        rounds += 1;
    }
    println!("{rounds} rounds");
    assert!(rounds > 10, "only {rounds} rounds in {seconds} s");
}

/// Says which bytes they were if one of the bodies panics.
fn run(bytes: &[u8], origin: &str) {
    struct Origin<'a>(&'a str);
    impl Drop for Origin<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("the bytes came from {}", self.0);
            }
        }
    }
    let _origin = Origin(origin);
    bodies::records(bytes);
    bodies::handshake(bytes);
    bodies::deframe(bytes);
    let cuts = [3, 17, 200, 1, 90, 255, 0, 40];
    bodies::deframe(&[&cuts, bytes].concat());
}
