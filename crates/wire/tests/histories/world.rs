//! What guests and daemon live in: connections, the seed, and what goes wrong.

use crate::guest::{Guest, Manners};
use crate::host::{Daemon, Session};
use crate::link::{End, Fault, Pipe, Rng, Way};
use crate::share::Truth;
use ringfs_wire::hello::Ticket;
use std::cell::RefCell;

/// A fault that is put in on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    None,
    /// The daemon works on what it had accepted before a cut, which comes again.
    HalfBatchStays,
    /// The daemon does not count connections.
    TableNotCut,
    /// The daemon sends replies that nobody has asked for on this connection.
    RepliesUnasked,
    /// What an abandoned request gave is not taken back.
    AbandonedKeepsLookups,
    /// Nor what the lost reply to a listing gave.
    RerunKeepsLookups,
    /// A ticket is good until the next one is used in a HELLO, whatever was done since.
    OldTicketStays,
    /// It is good for any connection until then.
    OldTicketAnywhere,
    /// A HELLO counts also when its connection is over, though its guest does not count them.
    LateHellosCount,
    /// A HELLO counts also when a later one of its guest's was welcomed.
    HellosOvertake,
    /// What was running when a daemon died is run without a look.
    OrphansRunAgain,
    /// What a dead daemon's reply gave is not given anew.
    KeptGivesNothing,
    /// Requests run before the session is restored.
    NotHeldUntilRestored,
    /// The guest sends again what it has answered.
    AbandonedAreResent,
    /// The guest tells a new daemon less than what it will give back.
    ForgetsCountEarly,
    /// Any bytes of an old connection show that its peer lives.
    LateBytesCount,
    /// Its answer counts for who came after it was asked, too.
    LateAnswersCount,
    /// What may have run for a daemon that left nothing is run again.
    UnsureRunAgain,
}

impl Plant {
    pub const ALL: [Plant; 17] = [
        Plant::HalfBatchStays,
        Plant::TableNotCut,
        Plant::RepliesUnasked,
        Plant::AbandonedKeepsLookups,
        Plant::RerunKeepsLookups,
        Plant::OldTicketStays,
        Plant::OldTicketAnywhere,
        Plant::LateHellosCount,
        Plant::HellosOvertake,
        Plant::OrphansRunAgain,
        Plant::KeptGivesNothing,
        Plant::NotHeldUntilRestored,
        Plant::AbandonedAreResent,
        Plant::ForgetsCountEarly,
        Plant::LateBytesCount,
        Plant::LateAnswersCount,
        Plant::UnsureRunAgain,
    ];
}

/// How often what was seen.
#[derive(Debug, Default)]
pub struct Seen {
    histories: usize,
    cuts: usize,
    resumes: usize,
    clones: usize,
    kills: usize,
    reaped: usize,
    rebuilds: usize,
    damaged: usize,
    decided: usize,
}

impl Seen {
    pub fn add(self, other: Seen) -> Seen {
        Seen {
            histories: self.histories + other.histories,
            cuts: self.cuts + other.cuts,
            resumes: self.resumes + other.resumes,
            clones: self.clones + other.clones,
            kills: self.kills + other.kills,
            reaped: self.reaped + other.reaped,
            rebuilds: self.rebuilds + other.rebuilds,
            damaged: self.damaged + other.damaged,
            decided: self.decided + other.decided,
        }
    }

    /// All of it happens.
    pub fn check(&self) {
        let least = [self.cuts, self.resumes, self.clones, self.kills, self.rebuilds, self.damaged];
        assert!(least.iter().all(|&n| n > self.histories / 20), "{self:?}");
        assert!(self.reaped > 0 && self.decided > self.histories / 100, "{self:?}");
    }
}

thread_local! {
    /// Ends have large buffers.
    static SPARE: RefCell<Vec<End>> = const { RefCell::new(Vec::new()) };
}

/// Connections, numbers, and the story.
pub struct Net<'t> {
    pub rng: Rng,
    pub pipes: Vec<Pipe>,
    /// Connections that the daemon has not accepted.
    pub calls: Vec<usize>,
    plant: Plant,
    /// The guests count no HELLOs, as those of old, and nobody between keeps one back: that is not
    /// theirs to get over.
    pub is_old: bool,
    /// How often somebody looked what a dead daemon had done.
    pub decided: usize,
    numbers: u64,
    story: Option<&'t mut Vec<String>>,
}

impl Net<'_> {
    pub fn is_planted(&self, plant: Plant) -> bool {
        self.plant == plant
    }

    /// The host can see that the guest has let go of a connection.
    pub fn is_over(&self, pipe: usize) -> bool {
        let pipe = &self.pipes[pipe];
        pipe.is_cut && (!pipe.is_silent || self.is_old)
    }

    pub fn say(&mut self, line: impl FnOnce() -> String) {
        if let Some(story) = &mut self.story {
            story.push(line());
        }
    }

    pub fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub fn ticket(&mut self) -> Ticket {
        let mut ticket = Ticket::NONE;
        ticket.0[..8].copy_from_slice(&self.number().to_be_bytes());
        ticket
    }

    pub fn pipe(&mut self) -> usize {
        self.pipes.push(Pipe::default());
        self.pipes.len() - 1
    }

    pub fn end(&mut self) -> End {
        SPARE.with_borrow_mut(Vec::pop).unwrap_or_else(End::new)
    }

    /// An end that received `way` is no longer used.
    pub fn close(&mut self, pipe: usize, end: End, way: Way) {
        let pipe = &mut self.pipes[pipe];
        pipe.cut(&mut self.rng, false);
        // The other end may still read what is left; this one takes its own.
        let end = end.renew(pipe, way);
        SPARE.with_borrow_mut(|spare| spare.push(end));
    }
}

/// What a seed is about.
struct Plan {
    steps: usize,
    cuts: usize,
    silent: usize,
    clones: usize,
    kills: usize,
    reaps: usize,
    damage: usize,
    keeps_state: bool,
}

impl Plan {
    fn new(rng: &mut Rng) -> Plan {
        let mut often = |n: usize, most: usize| if rng.below(n) == 0 { rng.below(most) } else { 0 };
        Plan {
            cuts: 4 + often(2, 30),
            silent: often(4, 1000),
            clones: often(3, 20),
            kills: often(3, 15),
            reaps: often(8, 10),
            damage: often(4, 10),
            keeps_state: often(1, 2) > 0,
            steps: 150 + often(1, 350),
        }
    }
}

/// Runs one seed to its end.
pub fn run(
    seed: u64,
    plant: Plant,
    ops: Option<usize>,
    story: Option<&mut Vec<String>>,
    seen: &mut Seen,
) -> Result<(), Fault> {
    let mut rng = Rng::new(seed);
    let plan = Plan::new(&mut rng);
    let lanes = [(1, 1), (1, 1), (2, 2), (2, 1)][rng.below(4)];
    let left = ops.unwrap_or(4 + rng.below(20));
    let manners = Manners { repeats_cancels: rng.one_of(500), abandons_live: rng.one_of(300) };
    let is_old = seed % 4 == 3 || plant == Plant::LateHellosCount;
    let (pipes, calls) = Default::default();
    let net = Net { rng, pipes, calls, plant, is_old, decided: 0, numbers: 0, story };
    let guests = vec![Guest::new(1, lanes, left, manners)];
    let (daemon, truth) = (Daemon::default(), Truth::default());
    let mut world = World { net, guests, daemon, truth };
    world.live(&plan, seen)?;
    world.settle()?;
    seen.histories += 1;
    seen.decided += world.net.decided;
    for guest in &world.guests {
        seen.rebuilds += guest.rebuilds;
        seen.resumes += guest.resumes;
    }
    world.end()
}

struct World<'t> {
    net: Net<'t>,
    guests: Vec<Guest>,
    daemon: Daemon,
    truth: Truth,
}

impl World<'_> {
    fn step(&mut self) -> Result<(), Fault> {
        while let Some(pipe) = self.net.calls.pop() {
            let end = self.net.end();
            self.daemon.accept(pipe, end);
        }
        let at = self.net.rng.below(self.guests.len());
        self.guests[at].step(&mut self.net, &self.truth)?;
        for _ in 0..2 {
            self.daemon.step(&mut self.net, &mut self.truth)?;
        }
        Ok(())
    }

    fn live(&mut self, plan: &Plan, seen: &mut Seen) -> Result<(), Fault> {
        for _ in 0..plan.steps {
            self.step()?;
            let mut one_of = |often| self.net.rng.one_of(often);
            let [cut, clone, kill, reap, damage] =
                [plan.cuts, plan.clones, plan.kills, plan.reaps, plan.damage].map(&mut one_of);
            let is_silent = one_of(plan.silent);
            let g = self.net.rng.below(self.guests.len());
            if cut {
                let pipes = self.guests[g].pipes();
                if !pipes.is_empty() {
                    let pipe = pipes[self.net.rng.below(pipes.len())];
                    self.net.pipes[pipe].cut(&mut self.net.rng, is_silent);
                    self.net.say(|| format!("-- cut, silent: {is_silent}"));
                    seen.cuts += 1;
                }
            }
            if damage {
                let pipes = self.guests[g].pipes();
                for pipe in pipes.into_iter().take(1) {
                    let pipe = &mut self.net.pipes[pipe];
                    if pipe.damage(&mut self.net.rng) {
                        // Who hears nothing for too long hangs up; here at once, behind the bytes.
                        pipe.ends_behind();
                        seen.damaged += 1;
                    }
                }
            }
            let session = self.daemon.session_of(self.guests[g].ticket);
            // Until each connection has been joined, no ticket is new at a join.
            let whole = session.is_none_or(Session::is_whole) && self.guests[g].has_session();
            if clone && self.guests.len() < 3 && whole {
                self.net.say(|| format!("-- guest {g} is copied"));
                self.copy(g, is_silent)?;
                seen.clones += 1;
            }
            if kill {
                let keeps = plan.keeps_state;
                self.net.say(|| format!("-- the daemon is killed; its state stays: {keeps}"));
                for guest in &mut self.guests {
                    guest.may_be_rebuilt = true;
                    guest.may_run_twice |= !keeps;
                }
                self.daemon.kill(&mut self.net, keeps);
                seen.kills += 1;
            }
            if reap && self.daemon.reap(&mut self.net) {
                self.net.say(|| "-- a session is over".into());
                for guest in &mut self.guests {
                    (guest.may_be_rebuilt, guest.may_run_twice) = (true, true);
                }
                seen.reaped += 1;
            }
            self.daemon.check()?;
        }
        Ok(())
    }

    /// A snapshot: it cuts all connections, also those of the machine that goes on.
    fn copy(&mut self, g: usize, is_silent: bool) -> Result<(), Fault> {
        for pipe in self.guests[g].pipes() {
            self.net.pipes[pipe].cut(&mut self.net.rng, is_silent);
        }
        let id = self.guests.len() as u32 + 1;
        let mut copy = self.guests[g].copy(id);
        for conn in 0..copy.conns() {
            copy.lose(conn)?;
        }
        self.guests.push(copy);
        Ok(())
    }

    /// Until all is quiet.
    fn settle(&mut self) -> Result<(), Fault> {
        for guest in &mut self.guests {
            guest.left = 0;
        }
        for n in 0..60_000 {
            self.step()?;
            let silent = |g: &Guest| g.pipes().iter().all(|&pipe| self.net.pipes[pipe].is_idle());
            if n % 16 == 0
                && self.guests.iter().all(silent)
                && self.guests.iter().all(Guest::is_quiet)
                && self.daemon.is_quiet(&self.net)
            {
                return Ok(());
            }
        }
        let guests: Vec<_> = self.guests.iter().map(|guest| (guest.id, guest.is_quiet())).collect();
        let daemon = self.daemon.state(&self.net);
        Err(format!("it does not come to rest: guests {guests:?}, daemon {daemon}"))
    }

    fn end(self) -> Result<(), Fault> {
        self.daemon.check()?;
        for guest in &self.guests {
            guest.check(&self.truth)?;
            let session =
                self.daemon.session_of(guest.ticket).ok_or("a guest without a session")?;
            if (&session.nodes, &session.handles) != (&guest.nodes, &guest.handles) {
                return Err(format!(
                    "guest {:x} has {:?} {:?}, the daemon {:?} {:?}",
                    guest.id, guest.nodes, guest.handles, session.nodes, session.handles
                ));
            }
            if session.guest != guest.id {
                return Err(format!("guest {:x} has another's session", guest.id));
            }
        }
        Ok(())
    }
}
