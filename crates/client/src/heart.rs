//! Is the peer still there? Pure.
//!
//! A guest that is blocked in a receive may never learn that its connection is gone: a snapshot's
//! vsock tells nobody. So silence is measured, by a coarse clock that is read around sleeps alone.
//! Invariant: a connection is taken for dead only after a PING that nobody answered, so a pause of
//! our own ends none. It must not do I/O or look at a clock itself.

use std::time::Duration;

/// Silence while requests are in flight after which the peer is asked.
pub const PING_AFTER: Duration = Duration::from_secs(1);
/// The same while nothing is.
pub const IDLE_PING_AFTER: Duration = Duration::from_secs(30);
/// How long an answer to a PING, or anything else, may take.
pub const PONG_WITHIN: Duration = Duration::from_secs(1);

/// So many bytes of a batch that is not whole yet are a sign of life. With fewer, its rest may be
/// lost, and what comes instead are our PINGs' answers, which nobody can tell from it.
const ALIVE_BYTES: usize = 4096;

/// What came of a peer since its last sign of life.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heard {
    bytes: usize,
    batches: u64,
}

impl Heard {
    /// So many bytes came.
    pub fn bytes(&mut self, count: usize) {
        self.bytes += count;
    }

    /// Whether that is a sign of life, with so many batches on this connection so far.
    pub fn take(&mut self, batches: u64) -> bool {
        let is_alive = batches != self.batches || self.bytes >= ALIVE_BYTES;
        if is_alive {
            *self = Heard { bytes: 0, batches };
        }
        is_alive
    }
}

/// The next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// Look again after so long.
    Wait(Duration),
    /// Send PING.
    Ping,
    /// It is dead.
    Dead,
}

/// What is known of one connection's peer; times are of any clock that does not go back.
#[derive(Clone, Copy, Debug)]
pub struct Heart {
    /// It was heard, asked, or became due to answer then.
    since: Duration,
    is_asked: bool,
    is_expected: bool,
}

impl Heart {
    /// A peer that was heard at `now`.
    pub fn new(now: Duration) -> Heart {
        Heart { since: now, is_asked: false, is_expected: false }
    }

    /// Before a sleep: whether it was heard since the last call, and whether it owes an answer.
    pub fn beat(&mut self, now: Duration, heard: bool, is_expected: bool) -> Beat {
        self.is_asked &= !heard;
        if heard || is_expected && !self.is_expected && !self.is_asked {
            self.since = now;
        }
        self.is_expected = is_expected;
        let silence = now.saturating_sub(self.since);
        let limit = match (self.is_asked, is_expected) {
            (true, _) => PONG_WITHIN,
            (false, true) => PING_AFTER,
            (false, false) => IDLE_PING_AFTER,
        };
        if silence < limit {
            return Beat::Wait(limit - silence);
        }
        if std::mem::replace(&mut self.is_asked, true) {
            return Beat::Dead;
        }
        self.since = now;
        Beat::Ping
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_silent_peer_is_asked_and_then_dead() {
        let mut heart = Heart::new(ms(0));
        assert_eq!(heart.beat(ms(10), false, true), Beat::Wait(ms(1000)));
        assert_eq!(heart.beat(ms(910), false, true), Beat::Wait(ms(100)));
        assert_eq!(heart.beat(ms(1010), false, true), Beat::Ping);
        assert_eq!(heart.beat(ms(1011), false, true), Beat::Wait(ms(999)));
        // To owe nothing any more does not help who was asked.
        assert_eq!(heart.beat(ms(1510), false, false), Beat::Wait(ms(500)));
        assert_eq!(heart.beat(ms(2010), false, true), Beat::Dead);
    }

    #[test]
    fn whoever_says_something_lives() {
        let mut heart = Heart::new(ms(0));
        heart.beat(ms(0), false, true);
        assert_eq!(heart.beat(ms(1000), false, true), Beat::Ping);
        assert_eq!(heart.beat(ms(1500), true, true), Beat::Wait(ms(1000)));
        assert_eq!(heart.beat(ms(2500), false, true), Beat::Ping);
    }

    #[test]
    fn a_batch_whose_rest_is_lost_is_no_sign_of_life() {
        let mut heard = Heard::default();
        assert!(!heard.take(0));
        heard.bytes(48);
        assert!(heard.take(1) && !heard.take(1));
        // Answers to PINGs, one a second: dead long before they would do.
        (0..3).for_each(|_| heard.bytes(48));
        assert!(!heard.take(1));
        // A large one comes in pieces between which we sleep.
        heard.bytes(ALIVE_BYTES / 2);
        assert!(!heard.take(1));
        heard.bytes(ALIVE_BYTES / 2);
        assert!(heard.take(1) && !heard.take(1));
    }

    #[test]
    fn an_idle_peer_is_asked_rarely_and_a_first_request_waits_its_time() {
        let mut heart = Heart::new(ms(0));
        assert_eq!(heart.beat(ms(0), false, false), Beat::Wait(ms(30_000)));
        // 20 s of nothing are no silence of the peer's.
        assert_eq!(heart.beat(ms(20_000), false, true), Beat::Wait(ms(1000)));
        assert_eq!(heart.beat(ms(20_500), true, false), Beat::Wait(ms(30_000)));
        assert_eq!(heart.beat(ms(50_500), false, false), Beat::Ping);
        assert_eq!(heart.beat(ms(51_500), false, false), Beat::Dead);
    }

    #[test]
    fn a_pause_of_our_own_only_asks() {
        let mut heart = Heart::new(ms(0));
        heart.beat(ms(0), false, true);
        assert_eq!(heart.beat(ms(3_600_000), false, true), Beat::Ping);
        assert_eq!(heart.beat(ms(3_600_010), true, true), Beat::Wait(ms(1000)));
    }
}
