//! FUSE-over-io_uring as the main thread sees it: whether there can be queues, which lanes get
//! them, and what those lanes' threads are told (`uring_lane`).
//!
//! Invariant: INIT agrees on rings only when every thread has made its own; from then on either all
//! of them serve, or the kernel itself has refused a queue and all lanes use the device, or the
//! session ends: once every queue has an entry, requests come by rings only. It must not touch
//! requests.

use crate::options::{Options, Uring};
use crate::status;
use crate::uring_lane::{Order, Place};
use fuser_fork::init::Negotiated;
use fuser_fork::uring::{self, Plan, UringError};
use ringfs_wire::abi;
use ringfs_wire::limits::{LANES_MAX, PAYLOAD_BYTES_MAX};
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// How long a thread may take to make or register its queues; it waits for nobody.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// What came of an order.
pub type Answer = Result<(), UringError>;
/// One thread's ends of what it is told and what it answers.
pub type Ends = (Receiver<Order>, Sender<Answer>);

/// The lanes of a mount that have queues, or are to get them.
#[derive(Debug, Default)]
pub struct Rings {
    /// Possible CPUs; `None`: no rings are wanted.
    queues: Option<u16>,
    /// Whoever asked wants to know that there are none.
    is_loud: bool,
    threads: Vec<(Sender<Order>, Receiver<Answer>)>,
    /// For `ringfs status`.
    pub facts: status::Rings,
}

impl Rings {
    /// What the options wish, if this kernel can do it.
    pub fn wished(options: &Options) -> Rings {
        let mut rings = Rings::default();
        match options.uring {
            Uring::Off => return rings,
            Uring::Auto | Uring::On => rings.facts.asked = true,
        }
        rings.is_loud = options.uring == Uring::On;
        let pages = (PAYLOAD_BYTES_MAX / 4096) as u16;
        let threads = (LANES_MAX - 1) as u16;
        let plan = uring::available()
            .and_then(|queues| Plan::new(queues, threads, PAYLOAD_BYTES_MAX as u32, pages, 4096));
        match plan {
            Ok(plan) => rings.queues = Some(plan.queues),
            Err(error) => rings.give_up(&with_causes(&error)),
        }
        rings
    }

    /// Whether this kernel could have them.
    pub fn are_planned(&self) -> bool {
        self.queues.is_some()
    }

    /// Lanes to ask for beside those of the options: one that reads the device.
    pub fn extra_lanes(&self, lanes: u16) -> u16 {
        u16::from(self.queues.is_some() && usize::from(lanes) < LANES_MAX)
    }

    /// How many lanes get queues: lane 0 reads the device whatever comes.
    pub fn choose(&mut self, lanes: usize) -> u16 {
        let Some(queues) = self.queues else { return 0 };
        let free = lanes.saturating_sub(1) as u16;
        if free == 0 {
            self.give_up("they need two lanes or more, each with a connection of its own");
        }
        queues.min(free)
    }

    /// The ends of one more thread.
    pub fn add(&mut self) -> Ends {
        let (orders, to_follow) = channel();
        let (tell, done) = channel();
        self.threads.push((orders, done));
        (to_follow, tell)
    }

    /// Whether INIT may agree on rings: all threads have made theirs.
    pub fn are_made(&mut self) -> bool {
        if self.threads.is_empty() {
            return false;
        }
        match self.answers() {
            Ok(()) => true,
            Err(error) => {
                self.give_up(&with_causes(&error));
                false
            }
        }
    }

    /// After INIT: the queues get their entries, or `/dev/fuse` is used. The kernel holds requests
    /// back until one of both has happened. After an error neither has for sure: the session must
    /// end, and then [`Rings::dismiss`] has the threads answer what their queues have got.
    pub fn start(&mut self, agreed: &Negotiated) -> Answer {
        if self.threads.is_empty() {
            return Ok(());
        }
        if self.facts.why.is_some() {
            self.use_device();
            return Ok(());
        }
        if agreed.flags & abi::init::OVER_IO_URING == 0 {
            self.give_up("the kernel does not offer them in INIT");
            self.use_device();
            return Ok(());
        }
        let (queues, threads) = (self.queues.unwrap_or(1), self.threads.len() as u16);
        let (max_write, max_pages) = (agreed.out.max_write, agreed.out.max_pages);
        let page_bytes = rustix::param::page_size() as u32;
        let plan = Plan::new(queues, threads, max_write, max_pages, page_bytes);
        // What INIT has agreed on must be refused by the kernel: it takes no entry without room.
        let refused = Plan { queues: threads, entries_per_queue: 1, payload_bytes: 0 };
        self.order(Order::Register(plan.as_ref().map_or(refused, |plan| *plan)));
        match (self.answers(), plan) {
            (Ok(()), Ok(plan)) => {
                self.order(Order::Serve);
                self.facts.queues = plan.queues;
                self.facts.entries_per_queue = plan.entries_per_queue;
                self.facts.payloads_bytes_max = plan.payloads_bytes() as u64;
            }
            // The plan is why the kernel had to refuse.
            (Err(refused), plan) if refused.leaves_device() => {
                self.give_up(&with_causes(&plan.err().unwrap_or(refused)));
                self.use_device();
            }
            (Err(error), _) | (Ok(()), Err(error)) => {
                self.facts.why = Some(with_causes(&error));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Threads that still wait for an order end, or answer what comes by their queues until the
    /// mount is gone.
    pub fn dismiss(&mut self) {
        self.threads.clear();
    }

    /// The lanes serve the device instead, from INIT's answer on.
    fn give_up(&mut self, why: &str) {
        if self.is_loud {
            tracing::warn!(why, "no FUSE-over-io_uring: frames come by /dev/fuse");
        }
        self.facts.why = Some(why.to_owned());
        self.queues = None;
    }

    fn use_device(&mut self) {
        self.order(Order::UseDevice);
        self.threads.clear();
    }

    fn order(&self, order: Order) {
        for (orders, _) in &self.threads {
            // A thread that is gone has ended the session.
            let _ = orders.send(order);
        }
    }

    /// What came of the last order, in all threads: the first error, or the first that leaves the
    /// device, since one queue without entries keeps the kernel from the rings.
    fn answers(&self) -> Answer {
        let mut outcome = Ok(());
        for (_, done) in &self.threads {
            let silent = || UringError::Enter(io::ErrorKind::TimedOut.into());
            let answer = done.recv_timeout(ANSWER_LIMIT).unwrap_or_else(|_| Err(silent()));
            let leaves_device = |answer: &Answer| matches!(answer, Err(e) if e.leaves_device());
            if outcome.is_ok() || leaves_device(&answer) && !leaves_device(&outcome) {
                outcome = answer;
            }
        }
        outcome
    }
}

/// Where the lane of connection `conn` has its place among the `rings`, if it has one.
pub fn place_of(conn: usize, rings: u16) -> Option<Place> {
    let ring = u16::try_from(conn.checked_sub(1)?).ok()?;
    (ring < rings).then_some(Place { lane: conn, ring, rings })
}

/// An error and what it was caused by, in one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_that_get_queues() {
        let check = |queues: Option<u16>, lanes: usize, expected: u16| {
            let mut rings = Rings { queues, ..Rings::default() };
            assert_eq!(rings.choose(lanes), expected, "{queues:?} {lanes}");
            assert_eq!(rings.facts.why.is_some(), queues.is_some() && expected == 0);
        };
        check(None, 3, 0);
        check(Some(2), 3, 2);
        check(Some(2), 8, 2);
        check(Some(64), 8, 7);
        check(Some(2), 1, 0);
        let places: Vec<_> =
            (0..4).map(|conn| place_of(conn, 2).map(|p| (p.lane, p.ring))).collect();
        assert_eq!(places, [None, Some((1, 0)), Some((2, 1)), None]);
    }

    fn refused() -> Answer {
        Err(UringError::Refused { qid: 0, source: io::ErrorKind::InvalidInput.into() })
    }

    /// What two threads that answer so are told in the end, and what comes of the start.
    fn started(first: Option<Answer>, second: Option<Answer>) -> (Answer, [Option<Order>; 2]) {
        let mut rings = Rings { queues: Some(2), ..Rings::default() };
        let ends = [first, second].map(|answer| {
            let (orders, done) = rings.add();
            // Who is gone is as silent as who is late.
            if let Some(answer) = answer {
                done.send(answer).expect("heard");
            }
            orders
        });
        let out = abi::InitOut { max_write: 1 << 20, max_pages: 256, ..Default::default() };
        let flags = abi::init::OVER_IO_URING;
        let outcome =
            rings.start(&Negotiated { out, flags, offered: flags, dropped: 0, served: out });
        assert_eq!(rings.facts.queues > 0, rings.facts.why.is_none());
        rings.dismiss();
        let last = ends.map(|orders| {
            assert!(matches!(orders.recv(), Ok(Order::Register(_))));
            let last = orders.recv().ok();
            assert!(orders.recv().is_err());
            last
        });
        (outcome, last)
    }

    #[test]
    fn only_a_refusal_leaves_the_device() {
        let failed = || Some(Err(UringError::Enter(io::ErrorKind::Other.into())));
        let (outcome, last) = started(Some(Ok(())), Some(Ok(())));
        assert!(outcome.is_ok() && matches!(last, [Some(Order::Serve), Some(Order::Serve)]));
        // Whatever became of the other one: the kernel waits for a queue that is not to come.
        for other in [Some(Ok(())), failed(), None] {
            let (outcome, last) = started(other, Some(refused()));
            assert!(outcome.is_ok());
            assert!(matches!(last, [Some(Order::UseDevice), Some(Order::UseDevice)]));
        }
        // All queues may have entries, and requests already.
        for other in [failed(), None] {
            let (outcome, last) = started(Some(Ok(())), other);
            assert!(matches!(outcome, Err(UringError::Enter(_))));
            assert!(matches!(last, [None, None]), "dismissed, to answer what has come");
        }
    }

    #[test]
    fn one_lane_more_reads_the_device() {
        let rings = Rings { queues: Some(2), ..Rings::default() };
        assert_eq!([1, 7, 8].map(|lanes| rings.extra_lanes(lanes)), [1, 1, 0]);
        assert_eq!(Rings::default().extra_lanes(2), 0);
    }
}
