//! Whose job a pool thread does next, and when.
//!
//! Jobs wait in one queue a peer, and the queues take turns; of the threads one peer has a share at
//! most. While peers compete for the CPUs ([`Pace`]) each has its part of them: a peer pays for the
//! CPU time of its jobs, times its rivals, and has no further one begun before that is paid for.
//! What a job is likely to cost is paid when it begins, or many would begin at once; what it did
//! cost, when it ends. Jobs that wait for a disk cost little, and as many begin as threads allow.
//! What gives something back, and is cheap, begins before the others and whatever is owed, and is
//! paid for later: as long as it waits, what it gives back is missing to all.
//!
//! Pure: times are given, in nanoseconds of one clock.

use std::collections::VecDeque;

/// Who was idle may have so much at once.
const BURST_NS: u64 = 100_000;

/// How many peers compete for how many CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Peers; 1: nobody competes, and nothing has to be paid for.
    pub peers: u64,
    /// CPUs on which the threads may run.
    pub cpus: u64,
}

impl Pace {
    /// Nobody competes.
    pub const ALONE: Pace = Pace { peers: 1, cpus: 1 };

    /// How long so much CPU time keeps a peer from more: it has its part of all CPUs, but of the
    /// one of its shard half of that, as the shard works for it there, too.
    fn price(self, cpu_ns: u64) -> u64 {
        let Pace { peers, cpus } = self;
        if peers > 1 { cpu_ns.saturating_mul(2 * peers) / (2 * cpus.max(1) - 1) } else { 0 }
    }
}

#[derive(Debug)]
struct Turn<T> {
    owner: u64,
    running: usize,
    /// Begins unpaid.
    returns: VecDeque<T>,
    waiting: VecDeque<T>,
    /// When all that has begun is paid for.
    paid_at: u64,
    /// CPU time of the last job that was paid for when it began.
    cost_ns: u64,
}

impl<T> Turn<T> {
    fn is_over(&self, now: u64) -> bool {
        self.running == 0 && self.waits() == 0 && self.paid_at <= now
    }

    fn waits(&self) -> usize {
        self.returns.len() + self.waiting.len()
    }
}

/// A job to be done.
#[derive(Debug)]
pub struct Begun<T> {
    /// Whose.
    pub owner: u64,
    /// What.
    pub task: T,
    /// What was paid for it; `None`: it gives something back, and pays later.
    price: Option<u64>,
}

/// The bill of a job, to be given to [`Jobs::ended`].
#[derive(Clone, Copy, Debug)]
pub struct Bill {
    owner: u64,
    price: Option<u64>,
}

impl<T> Begun<T> {
    /// The job, and who pays what.
    pub fn into_parts(self) -> (T, Bill) {
        let Begun { owner, task, price } = self;
        (task, Bill { owner, price })
    }
}

/// What a thread is to do.
#[derive(Debug)]
pub enum Next<T> {
    /// This.
    Task(Begun<T>),
    /// Nothing before then.
    At(u64),
    /// Nothing.
    Nothing,
}

/// All that waits.
#[derive(Debug)]
pub struct Jobs<T> {
    /// Peers with jobs, in the order of their turns.
    turns: VecDeque<Turn<T>>,
    /// Threads that one peer may have.
    share: usize,
}

impl<T> Jobs<T> {
    /// None.
    pub fn new(share: usize) -> Jobs<T> {
        Jobs { turns: VecDeque::new(), share }
    }

    /// Queues a job; whether its peer may have another thread.
    pub fn push(&mut self, owner: u64, task: T) -> bool {
        let share = self.share;
        let turn = self.turn_of(owner);
        turn.waiting.push_back(task);
        turn.running < share
    }

    /// The same with one that gives something back in a moment.
    pub fn push_return(&mut self, owner: u64, task: T) -> bool {
        let share = self.share;
        let turn = self.turn_of(owner);
        turn.returns.push_back(task);
        turn.running < share
    }

    fn turn_of(&mut self, owner: u64) -> &mut Turn<T> {
        let known = self.turns.iter().position(|turn| turn.owner == owner);
        let at = known.unwrap_or_else(|| {
            let (returns, waiting) = (VecDeque::new(), VecDeque::new());
            let turn = Turn { owner, running: 0, returns, waiting, paid_at: 0, cost_ns: 0 };
            self.turns.push_back(turn);
            self.turns.len() - 1
        });
        &mut self.turns[at]
    }

    /// Whose turn it is, and what.
    pub fn next(&mut self, now: u64, pace: Pace) -> Next<T> {
        let mut at = None;
        for index in 0..self.turns.len() {
            let turn = &self.turns[index];
            if turn.running >= self.share || turn.waits() == 0 {
                continue;
            }
            if pace.peers > 1 && turn.paid_at > now && turn.returns.is_empty() {
                at = Some(at.unwrap_or(u64::MAX).min(turn.paid_at));
                continue;
            }
            let Some(mut turn) = self.turns.remove(index) else { break };
            let (task, price) = match turn.returns.pop_front() {
                Some(task) => (Some(task), None),
                None => (turn.waiting.pop_front(), Some(pace.price(turn.cost_ns))),
            };
            let Some(task) = task else { break };
            turn.running += 1;
            let paid_at = turn.paid_at.max(now.saturating_sub(BURST_NS));
            turn.paid_at = paid_at.saturating_add(price.unwrap_or(0));
            let owner = turn.owner;
            self.turns.push_back(turn);
            return Next::Task(Begun { owner, task, price });
        }
        at.map_or(Next::Nothing, Next::At)
    }

    /// A job has ended, which took so much CPU time.
    pub fn ended(&mut self, Bill { owner, price }: Bill, cpu_ns: u64, now: u64, pace: Pace) {
        if let Some(turn) = self.turns.iter_mut().find(|turn| turn.owner == owner) {
            turn.running -= 1;
            // What gives back is cheap, and tells nothing of the others.
            turn.cost_ns = if price.is_some() { cpu_ns } else { turn.cost_ns };
            let owed = turn.paid_at.saturating_add(pace.price(cpu_ns));
            turn.paid_at = owed.saturating_sub(price.unwrap_or(0));
        }
        self.turns.retain(|turn| !turn.is_over(now));
    }

    /// Takes a job out that has not begun, and gives nothing back.
    pub fn remove(&mut self, owner: u64, now: u64, is_it: impl Fn(&T) -> bool) -> Option<T> {
        let at = self.turns.iter().position(|turn| turn.owner == owner)?;
        let index = self.turns[at].waiting.iter().position(is_it)?;
        let task = self.turns[at].waiting.remove(index);
        if self.turns[at].is_over(now) {
            self.turns.remove(at);
        }
        task
    }

    /// Jobs that run, and jobs that wait.
    pub fn load(&self) -> (usize, usize) {
        let sum = |pick: fn(&Turn<T>) -> usize| self.turns.iter().map(pick).sum();
        (sum(|turn| turn.running), sum(Turn::waits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Pace = Pace::ALONE;
    const TWO: Pace = Pace { peers: 2, cpus: 1 };
    /// Long after the clock's start.
    const START: u64 = 1_000_000_000;

    fn task(next: Next<u32>) -> (u32, Bill) {
        match next {
            Next::Task(begun) => begun.into_parts(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn peers_take_turns_and_none_has_more_than_its_share() {
        let mut jobs = Jobs::new(2);
        let pushed: Vec<bool> = (0..4).map(|n| jobs.push(1, n)).collect();
        assert_eq!(pushed, [true; 4], "nothing runs yet");
        jobs.push(2, 10);
        let (first, bill) = task(jobs.next(START, ALONE));
        assert_eq!(first, 0);
        assert_eq!(task(jobs.next(START, ALONE)).0, 10);
        assert_eq!(task(jobs.next(START, ALONE)).0, 1);
        assert!(matches!(jobs.next(START, ALONE), Next::Nothing), "two of two");
        assert!(!jobs.push(1, 4));
        jobs.ended(bill, 1_000_000, START, ALONE);
        assert_eq!(task(jobs.next(START, ALONE)).0, 2);
        assert_eq!(jobs.load(), (3, 2));
        let mut remove = || jobs.remove(1, START, |&n| n == 4);
        assert_eq!((remove(), remove()), (Some(4), None));
    }

    /// One peer's jobs of that CPU time, on threads that do them one after the other: the part of
    /// a CPU that they have.
    fn part_of(pace: Pace, threads: u64, cpu_ns: u64) -> f64 {
        let mut jobs = Jobs::new(8);
        for n in 0..10_000 {
            jobs.push(1, n);
        }
        let (mut now, mut done) = (START, 0u64);
        let mut running = VecDeque::new();
        while now < START + 100_000_000 {
            while running.len() < threads as usize {
                match jobs.next(now, pace) {
                    Next::Task(begun) => running.push_back(begun.into_parts().1),
                    Next::At(_) | Next::Nothing => break,
                }
            }
            let Some(bill) = running.pop_front() else {
                now += 10_000;
                continue;
            };
            now += cpu_ns;
            done += cpu_ns;
            jobs.ended(bill, cpu_ns, now, pace);
        }
        done as f64 / (now - START) as f64
    }

    #[test]
    fn who_has_rivals_has_a_part_of_the_cpus() {
        for (pace, threads, cpu_ns, expected) in [
            (ALONE, 8, 400_000, 1.0),
            (TWO, 8, 400_000, 0.25),
            (TWO, 1, 20_000, 0.25),
            (Pace { peers: 4, cpus: 1 }, 8, 100_000, 0.125),
            (Pace { peers: 2, cpus: 2 }, 8, 100_000, 0.75),
            (Pace { peers: 2, cpus: 8 }, 8, 100_000, 1.0),
        ] {
            let part = part_of(pace, threads, cpu_ns);
            assert!((part - expected).abs() < 0.05, "{pace:?} {threads} {cpu_ns}: {part}");
        }
    }

    #[test]
    fn what_waits_for_a_disk_is_not_held_up() {
        let mut jobs = Jobs::new(8);
        for n in 0..20 {
            jobs.push(1, n);
        }
        let (_, bill) = task(jobs.next(START, TWO));
        jobs.ended(bill, 20_000, START, TWO);
        // Each begins before the ones before it have ended.
        let at_once = (0..8).map(|_| jobs.next(START, TWO));
        assert_eq!(at_once.filter(|next| matches!(next, Next::Task(_))).count(), 1);
        let Next::At(at) = jobs.next(START, TWO) else { panic!("a burst is over") };
        assert!(at - START <= 80_000, "{}", at - START);
        let later = (1..10).filter(|n| matches!(jobs.next(START + n * 80_000, TWO), Next::Task(_)));
        assert_eq!(later.count(), 7, "eight threads are busy");
    }

    #[test]
    fn what_gives_back_begins_unpaid_and_is_paid_for() {
        let mut jobs = Jobs::new(2);
        jobs.push(1, 1);
        let (_, bill) = task(jobs.next(START, TWO));
        jobs.ended(bill, 1_000_000, START, TWO);
        let Next::Nothing = jobs.next(START, TWO) else { panic!("nothing waits") };
        jobs.push(1, 2);
        jobs.push_return(1, 10);
        jobs.push_return(1, 11);
        let Next::Task(begun) = jobs.next(START, TWO) else { panic!("it begins at once") };
        let (first, bill) = begun.into_parts();
        assert_eq!((first, task(jobs.next(START, TWO)).0), (10, 11));
        assert!(matches!(jobs.next(START, TWO), Next::Nothing), "two of two");
        jobs.ended(bill, 0, START, TWO);
        let Next::At(before) = jobs.next(START, TWO) else { panic!("the debt is as it was") };
        jobs.push_return(1, 12);
        let (_, bill) = task(jobs.next(START, TWO));
        jobs.ended(bill, 1_000_000, START, TWO);
        let Next::At(at) = jobs.next(START, TWO) else { panic!("it owes more") };
        assert_eq!(at - before, TWO.price(1_000_000));
    }

    /// Whoever owes must not make his dear calls look cheap.
    #[test]
    fn what_gives_back_tells_nothing_of_the_price_of_others() {
        let mut jobs = Jobs::new(8);
        jobs.push(1, 1);
        let (_, bill) = task(jobs.next(START, TWO));
        jobs.ended(bill, 1_000_000, START, TWO);
        jobs.push_return(1, 10);
        let (_, bill) = task(jobs.next(START, TWO));
        jobs.ended(bill, 1_000, START, TWO);
        for n in 2..10 {
            jobs.push(1, n);
        }
        let Next::At(at) = jobs.next(START, TWO) else { panic!("it owes") };
        task(jobs.next(at + BURST_NS, TWO));
        assert!(matches!(jobs.next(at + BURST_NS, TWO), Next::At(_)), "one such call in a burst");
    }

    #[test]
    fn who_owes_is_remembered_and_who_does_not_is_forgotten() {
        let mut jobs = Jobs::new(8);
        for (pace, left) in [(TWO, 1), (ALONE, 0)] {
            jobs.push(1, 1);
            let (_, bill) = task(jobs.next(START, ALONE));
            jobs.ended(bill, 1_000_000, START, pace);
            assert_eq!(jobs.turns.len(), left, "{pace:?}");
            // To take back what has not begun pays for nothing.
            jobs.push(1, 2);
            assert_eq!(jobs.remove(1, START, |_| true), Some(2));
            assert_eq!(jobs.turns.len(), left, "{pace:?}");
            jobs.turns.clear();
        }
    }
}
