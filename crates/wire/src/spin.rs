//! How often to look again before a thread sleeps: pure.
//!
//! A thread that sleeps costs its peer a wake-up and itself a return from idle, more than the work
//! of a small request. So it may look a few times first, giving the CPU away in between. Invariant:
//! tries that find nothing become rare at once, so that an idle end sleeps and a slow one does not
//! burn its CPU; it must not look at a clock itself.

use std::time::Duration;

/// Tries before a wait, unless the user says otherwise: about the time of one slow wake-up.
pub const SPIN_TRIES_DEFAULT: u32 = 100;
/// More tries than this are not to be had.
pub const SPIN_TRIES_MAX: u32 = 10_000;

/// A `sched_yield` that takes longer gave the CPU to somebody who needs it: sleep.
pub const YIELD_LIMIT: Duration = Duration::from_micros(50);

/// A sleep that was shorter was hardly more than the time that it takes to wake up: tries pay.
const WORTH: Duration = Duration::from_micros(200);
/// Waits in a row that tries paid for; with none, there are no tries.
const WARMTH_MAX: u32 = 16;

/// What came of some tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// There was something.
    Found,
    /// There was nothing.
    Nothing,
    /// There was nothing, and others need the CPU.
    Crowded,
}

/// What a thread has learned about its waits.
#[derive(Clone, Debug)]
pub struct Spin {
    tries: u32,
    warmth: u32,
}

impl Spin {
    /// At most so many tries a wait; 0: none ever.
    pub fn new(tries: u32) -> Spin {
        Spin { tries: tries.min(SPIN_TRIES_MAX), warmth: 0 }
    }

    /// What it was made with.
    pub fn tries_max(&self) -> u32 {
        self.tries
    }

    /// How many tries are due before the wait that comes now. [`Spin::tried`] says what came of
    /// them, if there were any.
    pub fn tries(&self) -> u32 {
        if self.warmth > 0 { self.tries } else { 0 }
    }

    /// Whether waits should be timed for [`Spin::slept`].
    pub fn is_on(&self) -> bool {
        self.tries > 0
    }

    /// What came of the tries.
    pub fn tried(&mut self, look: Look) {
        match look {
            Look::Found => self.warmer(),
            Look::Nothing | Look::Crowded => self.warmth /= 2,
        }
    }

    /// A sleep took so long.
    pub fn slept(&mut self, time: Duration) {
        if time < WORTH {
            self.warmer();
        }
    }

    fn warmer(&mut self) {
        self.warmth = (self.warmth + 1).min(WARMTH_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_end_stops_looking() {
        let mut spin = Spin::new(20);
        assert_eq!(spin.tries(), 0);
        for _ in 0..1000 {
            spin.slept(Duration::from_micros(40));
        }
        let mut rounds = 0;
        while spin.tries() > 0 {
            spin.tried(Look::Nothing);
            spin.slept(Duration::from_millis(1));
            rounds += 1;
        }
        assert_eq!(rounds, 5);
        spin.slept(Duration::from_micros(40));
        assert_eq!(spin.tries(), 20);
        spin.tried(Look::Found);
        spin.tried(Look::Crowded);
        assert_eq!(spin.tries(), 20);
    }

    #[test]
    fn off_is_off() {
        let mut spin = Spin::new(0);
        spin.slept(Duration::ZERO);
        assert!(!spin.is_on());
        assert_eq!(spin.tries(), 0);
        assert_eq!(Spin::new(u32::MAX).tries_max(), SPIN_TRIES_MAX);
    }
}
