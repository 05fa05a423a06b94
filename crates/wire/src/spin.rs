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
const YIELD_LIMIT: Duration = Duration::from_micros(50);
/// One that takes longer may have given a whole turn of the CPU to somebody who computes:
/// milliseconds, where a sleeper would have been let in at once. That must stay rare.
const TURN: Duration = Duration::from_micros(3000);
/// Or to hundreds who ask, all of them: that happens once in a hundred waits or more. Who computes
/// takes a turn each time, so it has to be two within so many waits.
const LATELY: u32 = 8;
/// After turns that were lost so many waits go without tries, twice as many after each further one.
const SHY_MIN: u32 = 64;
/// At most so many.
const SHY_MAX: u32 = 4096;

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
    /// The same, and it took them a turn of it.
    Lost,
}

impl Look {
    /// What a `sched_yield` of that length ends the tries with, if it does and nothing is found.
    pub fn of_yield(time: Duration) -> Option<Look> {
        match time {
            _ if time > TURN => Some(Look::Lost),
            _ if time > YIELD_LIMIT => Some(Look::Crowded),
            _ => None,
        }
    }
}

/// What a thread has learned about its waits.
#[derive(Clone, Debug, Default)]
pub struct Spin {
    tries: u32,
    warmth: u32,
    /// A turn went to others, not the first one lately.
    lost: bool,
    /// For so many waits a turn that was lost counts as lost lately.
    lately: u32,
    /// Waits that go without tries, as the CPU is wanted by others.
    shy: u32,
    /// How many it were last time.
    shyness: u32,
}

impl Spin {
    /// At most so many tries a wait; 0: none ever.
    pub fn new(tries: u32) -> Spin {
        Spin { tries: tries.min(SPIN_TRIES_MAX), ..Spin::default() }
    }

    /// How many tries there are before a wait that is sure to be short, whatever was learned.
    pub fn tries_max(&self) -> u32 {
        if self.lost || self.shy > 0 { 0 } else { self.tries }
    }

    /// How many tries are due before the wait that comes now. [`Spin::tried`] says what came of
    /// them, if there were any.
    pub fn tries(&mut self) -> u32 {
        if std::mem::take(&mut self.lost) {
            self.shyness = (self.shyness * 2).clamp(SHY_MIN, SHY_MAX);
            self.shy = self.shyness;
            self.warmth = 0;
        }
        if self.warmth > 0 { self.tries_max() } else { 0 }
    }

    /// Whether waits should be timed for [`Spin::slept`].
    pub fn is_on(&self) -> bool {
        self.tries > 0
    }

    /// What came of the tries.
    pub fn tried(&mut self, look: Look) {
        let lately = self.lately;
        self.lately = lately.saturating_sub(1);
        match look {
            Look::Found => {
                self.shyness -= self.shyness.div_ceil(64);
                self.warmer();
            }
            Look::Nothing | Look::Crowded => self.warmth /= 2,
            Look::Lost => {
                self.lost = lately > 0;
                self.lately = LATELY;
                self.warmth /= 2;
            }
        }
    }

    /// A sleep took so long.
    pub fn slept(&mut self, time: Duration) {
        // Nobody had waited meanwhile.
        self.lost &= time < WORTH;
        if self.shy > 0 {
            self.shy -= 1;
        } else if time < WORTH {
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

    /// Waits that were all short, until there are tries again.
    fn waits_without(spin: &mut Spin) -> u32 {
        let mut waits = 0;
        while spin.tries() == 0 {
            spin.slept(Duration::from_micros(40));
            waits += 1;
        }
        waits
    }

    #[test]
    fn where_others_compute_tries_become_rare() {
        let mut spin = Spin::new(20);
        let look = Look::of_yield(Duration::from_millis(4)).expect("long");
        assert_eq!(look, Look::Lost);
        // Once may be by chance.
        spin.tried(Look::Found);
        spin.tried(look);
        assert_eq!((spin.tries_max(), waits_without(&mut spin)), (20, 1));
        let mut waits = Vec::new();
        for _ in 0..8 {
            spin.tried(Look::Found);
            spin.tried(look);
            assert_eq!((spin.tries(), spin.tries_max()), (0, 0));
            waits.push(waits_without(&mut spin));
            assert_eq!(spin.tries_max(), 20);
        }
        assert_eq!(waits[0], SHY_MIN + 1);
        assert!(waits.windows(2).all(|two| two[0] < two[1] || two[1] > SHY_MAX / 2), "{waits:?}");
        // They are gone, and forgotten in time.
        (0..500).for_each(|_| spin.tried(Look::Found));
        spin.tried(look);
        assert_eq!((spin.tries(), spin.tries_max()), (20, 20));
        spin.tried(look);
        assert_eq!(spin.tries_max(), 0);
        assert_eq!(waits_without(&mut spin), SHY_MIN + 1);
        // Nobody was held up by it.
        spin.tried(Look::Found);
        spin.tried(look);
        spin.slept(Duration::from_millis(1));
        assert!(waits_without(&mut spin) <= 1);
        // It is those who ask, now and then.
        for _ in 0..100 {
            (0..=LATELY).for_each(|_| spin.tried(Look::Found));
            spin.tried(look);
            assert_eq!((spin.tries(), spin.tries_max()), (20, 20));
        }
    }

    #[test]
    fn a_yield_tells_who_wants_the_cpu() {
        let looks = [10, 60, 3100].map(|us| Look::of_yield(Duration::from_micros(us)));
        assert_eq!(looks, [None, Some(Look::Crowded), Some(Look::Lost)]);
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
