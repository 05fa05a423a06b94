//! What is done to a connection, and where: decided by the seed alone.
//!
//! Invariant: a decision follows from the seed, the number of the connection, the direction and the
//! index of the record in it, never from time; so the same seed makes the same decisions, whatever
//! reaches the point where they are due. Records are counted from 0, which is HELLO or WELCOME.

use super::rng::Rng;

/// Which way the bytes of a pump go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the guest to the daemon.
    Up,
    /// From the daemon to the guest.
    Down,
}

impl Direction {
    /// How the log shows it.
    pub fn arrow(self) -> char {
        match self {
            Direction::Up => '>',
            Direction::Down => '<',
        }
    }
}

/// A fault of the connection. The positions that it needs come from [`Event::dice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Both ends see EOF; the record did not pass, what stands before it in its batch did.
    CutBefore,
    /// The same, in the midst of the record.
    CutInside,
    /// The same, right behind the record.
    CutAfter,
    /// Closed with bytes unread, so that an end that sent some sees ECONNRESET.
    CutUnread,
    /// The batch passes up to some byte, then both ends see EOF.
    Truncate,
    /// The daemon sees EOF, the guest nothing at all.
    SilentToGuest,
    /// The guest sees EOF, the daemon nothing at all.
    SilentToDaemon,
    /// One bit of the batch is turned over.
    Flip,
    /// The batch comes twice.
    Double,
    /// The batch comes behind the next one.
    Swap,
    /// The batch's tail is lost and the connection goes on.
    Lose,
    /// Nothing passes for less than a heartbeat.
    Stall,
    /// Nothing passes for longer than a heartbeat allows.
    StallLong,
}

impl Fault {
    /// All, each with how often it is chosen. Those that cost seconds are rare.
    pub const ALL: &[(Fault, u64)] = &[
        (Fault::CutBefore, 14),
        (Fault::CutInside, 22),
        (Fault::CutAfter, 14),
        (Fault::CutUnread, 14),
        (Fault::Truncate, 6),
        (Fault::SilentToGuest, 1),
        (Fault::SilentToDaemon, 4),
        (Fault::Flip, 6),
        (Fault::Double, 5),
        (Fault::Swap, 4),
        (Fault::Lose, 2),
        (Fault::Stall, 6),
        (Fault::StallLong, 1),
    ];

    /// Whether it ought to cost the connection.
    pub fn is_cut(self) -> bool {
        !matches!(self, Fault::Stall | Fault::StallLong | Fault::Swap)
    }

    /// Whether it changes bytes that only a payload checksum covers.
    fn needs_checksum(self) -> bool {
        matches!(self, Fault::Flip | Fault::Lose)
    }

    /// Its place in [`Fault::ALL`].
    pub fn index(self) -> usize {
        Fault::ALL.iter().position(|(fault, _)| *fault == self).unwrap_or_default()
    }
}

/// A fault that is due at a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The record's index in its direction of the connection.
    pub record: u64,
    /// What to do.
    pub fault: Fault,
    /// Where in the record or batch, and how long.
    pub dice: u64,
}

/// What no end may notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Benign {
    /// The batch comes that many milliseconds later.
    Delay(u64),
    /// The batch comes in pieces of that many bytes.
    Split(usize),
}

/// How a run's decisions are made.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Of the whole run.
    pub seed: u64,
    /// At most that many records lie between two faults of a direction.
    pub gap_max: u64,
    /// Only what no end may notice.
    pub calm: bool,
    /// Only what is noticed without payload checksums.
    pub unchecked: bool,
}

impl Schedule {
    /// What is due in one direction of connection `conn`.
    pub fn plan(&self, conn: u64, direction: Direction) -> Plan {
        let rng = Rng::of(&[self.seed, conn, direction as u64]);
        let mut plan = Plan { rng, schedule: *self, next: None };
        plan.next = plan.draw(0);
        plan
    }

    /// By what a direction goes on later than others, where all stood still.
    pub fn straggle(&self, conn: u64, direction: Direction, batch: u64) -> Rng {
        Rng::of(&[self.seed, conn, direction as u64, batch, 2])
    }

    /// What no end may notice, at that record.
    pub fn benign(&self, conn: u64, direction: Direction, record: u64) -> Option<Benign> {
        let mut rng = Rng::of(&[self.seed, conn, direction as u64, record, 1]);
        if !rng.once_in(if self.calm { 24 } else { 96 }) {
            return None;
        }
        Some(match rng.below(3) {
            0 => Benign::Delay(1 + rng.magnitude(20)),
            _ => Benign::Split(*rng.pick(&[1, 2, 3, 7, 16, 31])),
        })
    }
}

/// The faults of one direction of one connection, in their order.
#[derive(Clone, Debug)]
pub struct Plan {
    rng: Rng,
    schedule: Schedule,
    next: Option<Event>,
}

impl Plan {
    fn draw(&mut self, from: u64) -> Option<Event> {
        let Schedule { gap_max, calm, unchecked, .. } = self.schedule;
        if calm {
            return None;
        }
        let record = from + self.rng.magnitude(gap_max);
        let weights = Fault::ALL.iter().map(|(fault, weight)| match unchecked {
            true if fault.needs_checksum() => 0,
            _ => *weight,
        });
        let index = self.rng.weighted(weights);
        Some(Event { record, fault: Fault::ALL[index].0, dice: self.rng.next() })
    }

    /// The fault that is due at `record`. Must be asked with rising numbers; those passed over are
    /// void.
    pub fn due(&mut self, record: u64) -> Option<Event> {
        while let Some(event) = self.next.filter(|event| event.record <= record) {
            self.next = self.draw(event.record + 1);
            if event.record == record {
                return Some(event);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEDULE: Schedule = Schedule { seed: 42, gap_max: 500, calm: false, unchecked: false };

    fn events(schedule: &Schedule, conn: u64, direction: Direction) -> Vec<Event> {
        let mut plan = schedule.plan(conn, direction);
        (0..5000).filter_map(|record| plan.due(record)).collect()
    }

    #[test]
    fn decisions_follow_from_seed_connection_direction_and_record() {
        let once = events(&SCHEDULE, 3, Direction::Up);
        assert_eq!(once, events(&SCHEDULE, 3, Direction::Up));
        assert!(once.len() > 5);
        assert_ne!(once, events(&SCHEDULE, 3, Direction::Down));
        assert_ne!(once, events(&SCHEDULE, 4, Direction::Up));
        assert_ne!(once, events(&Schedule { seed: 43, ..SCHEDULE }, 3, Direction::Up));
        // Whoever skips records finds the later decisions unchanged.
        let mut plan = SCHEDULE.plan(3, Direction::Up);
        assert_eq!(plan.due(once[2].record), Some(once[2]));
        let benign = |record| SCHEDULE.benign(3, Direction::Up, record);
        assert!((0..2000).filter(|record| benign(*record).is_some()).count() > 5);
        assert!((0..2000).all(|record| benign(record) == benign(record)));
    }

    #[test]
    fn every_fault_comes_and_the_handshake_is_hit() {
        let mut seen = [0; Fault::ALL.len()];
        let mut handshakes = 0;
        for conn in 0..500 {
            for event in events(&SCHEDULE, conn, Direction::Down) {
                seen[event.fault.index()] += 1;
                handshakes += u64::from(event.record == 0);
            }
        }
        assert!(seen.iter().all(|count| *count > 10), "{seen:?}");
        assert!(handshakes > 10, "{handshakes}");
        let unchecked = Schedule { unchecked: true, ..SCHEDULE };
        for conn in 0..100 {
            let events = events(&unchecked, conn, Direction::Down);
            assert!(events.iter().all(|event| !event.fault.needs_checksum()));
        }
        let calm = Schedule { calm: true, ..SCHEDULE };
        assert!((0..100).all(|conn| events(&calm, conn, Direction::Up).is_empty()));
    }
}
