//! Checks of what the daemon decides by the clock, on machines that may stand still.
//!
//! Whoever does not answer within half a second is dead (limits.rs): a guest of a test that could
//! not run for so long is treated as it should be, and the test has shown nothing. Invariant: what
//! fails counts where this process could run all the time, and always the last time.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A failure after less than this of standing still is one: a part of every limit that is checked.
const STALLED: Duration = Duration::from_millis(100);
const TRIES: u32 = 10;
const TICK: Duration = Duration::from_millis(5);

/// How long this process could not run while this lives.
pub struct Stalls {
    over: Arc<AtomicBool>,
    lost_us: Arc<AtomicU64>,
    ticker: Option<JoinHandle<()>>,
}

impl Stalls {
    pub fn watch() -> Stalls {
        let (over, lost_us) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ends, lost) = (Arc::clone(&over), Arc::clone(&lost_us));
        let ticker = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                let begun = Instant::now();
                std::thread::sleep(TICK);
                let late = begun.elapsed().saturating_sub(2 * TICK);
                lost.fetch_add(late.as_micros() as u64, Ordering::Relaxed);
            }
        });
        Stalls { over, lost_us, ticker: Some(ticker) }
    }

    /// In all, up to now.
    pub fn lost(&mut self) -> Duration {
        self.over.store(true, Ordering::Relaxed);
        // It may be about to tell of the longest one.
        self.ticker.take().into_iter().for_each(|ticker| ticker.join().expect("a ticker"));
        Duration::from_micros(self.lost_us.load(Ordering::Relaxed))
    }
}

impl Drop for Stalls {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Runs a check, and again where it failed while this process could not run.
pub fn undisturbed(check: impl Fn()) {
    for _ in 1..TRIES {
        let mut stalls = Stalls::watch();
        let Err(panic) = catch_unwind(AssertUnwindSafe(&check)) else { return };
        let lost = stalls.lost();
        if lost < STALLED {
            resume_unwind(panic);
        }
        eprintln!("it stood still for {lost:?} meanwhile, and is done again");
    }
    check();
}
