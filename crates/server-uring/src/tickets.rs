//! Tickets: by what a guest's connections name their session.
//!
//! Invariant: a ticket leads to one session, and a session has the ticket that its guest has shown
//! last, and at most one that is newer: the WELCOME that brought that one may be lost. Once the
//! newer one is shown, whoever has the older one is a copy of the guest from before, and must not
//! find what was done since. Pure but for the random bits; the registry (registry.rs) has the lock.

use crate::limits::GONE_TICKETS_MAX;
use crate::session::Session;
use ringfs_wire::hello::Ticket;
use std::collections::{HashMap, VecDeque};
use std::sync::Weak;

/// The tickets of one session.
pub(crate) struct Held {
    session: u64,
    /// The newest that the guest has used.
    shown: Ticket,
    /// One that it was given since, and by which connection.
    unused: Option<(Ticket, u16)>,
}

impl Held {
    /// What is written of them for the next daemon.
    pub(crate) fn all(&self) -> (Ticket, Option<Ticket>) {
        (self.shown, self.unused.map(|(unused, _)| unused))
    }
}

/// Which session each ticket leads to.
#[derive(Default)]
pub(crate) struct Tickets {
    live: HashMap<Ticket, u64>,
    /// The last tickets of sessions that ended while their guests may come again, the oldest first,
    /// and the sessions: as long as something of one runs, its shards hold it.
    gone: VecDeque<(Ticket, Weak<Session>)>,
}

impl Tickets {
    /// A new session is found by that ticket from now on.
    pub(crate) fn add(&mut self, session: u64, ticket: Ticket) -> Held {
        self.live.insert(ticket, session);
        Held { session, shown: ticket, unused: None }
    }

    /// The session that a guest names.
    pub(crate) fn find(&self, ticket: Ticket) -> Option<u64> {
        self.live.get(&ticket).copied()
    }

    /// The session that had that ticket last, and has ended without its guest's doing.
    pub(crate) fn gone(&self, ticket: Ticket) -> Option<&Weak<Session>> {
        self.gone.iter().find(|(its, _)| *its == ticket).map(|(_, session)| session)
    }

    /// A connection has come by `ticket`: by which one it may come the next time, another one if
    /// the ticket `is_renewed`. `None`: the ticket was used up meanwhile.
    pub(crate) fn join(
        &mut self,
        held: &mut Held,
        conn: u16,
        ticket: Ticket,
        is_renewed: bool,
    ) -> Option<Ticket> {
        let next = if is_renewed { fresh()? } else { ticket };
        // Who has not got the new one comes again for the same connection. For another one comes a
        // copy of the guest, which would share the session with it.
        let may_have_lost_it = held.unused.is_none_or(|(_, told)| told == conn);
        let is_good = self.prove(held, ticket) || may_have_lost_it && held.shown == ticket;
        if !is_good {
            return None;
        }
        if is_renewed {
            if let Some((lost, _)) = held.unused.replace((next, conn)) {
                self.live.remove(&lost);
            }
            self.live.insert(next, held.session);
        }
        Some(next)
    }

    /// That ticket has arrived. False: that was known, or it is an older one.
    pub(crate) fn prove(&mut self, held: &mut Held, ticket: Ticket) -> bool {
        let is_news = held.unused.is_some_and(|(unused, _)| unused == ticket);
        if is_news {
            self.live.remove(&held.shown);
            (held.shown, held.unused) = (ticket, None);
        }
        is_news
    }

    /// Nobody joins the session any more. It is remembered where its guest may come again.
    pub(crate) fn end(&mut self, held: &Held, remembered: Option<Weak<Session>>) {
        let (shown, unused) = held.all();
        for ticket in [Some(shown), unused].into_iter().flatten() {
            self.live.remove(&ticket);
            self.gone.extend(remembered.clone().map(|session| (ticket, session)));
        }
        let excess = self.gone.len().saturating_sub(GONE_TICKETS_MAX);
        self.gone.drain(..excess);
    }
}

/// 128 bits that nobody guesses; `None`: the kernel has none.
pub(crate) fn fresh() -> Option<Ticket> {
    let mut ticket = Ticket::NONE;
    let filled = rustix::rand::getrandom(&mut ticket.0, rustix::rand::GetRandomFlags::empty());
    (filled == Ok(ticket.0.len()) && ticket != Ticket::NONE).then_some(ticket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one() -> (Tickets, Held, Ticket) {
        let first = fresh().expect("random bits");
        let mut tickets = Tickets::default();
        let held = tickets.add(7, first);
        (tickets, held, first)
    }

    #[test]
    fn a_ticket_is_good_until_the_next_one_is_used() {
        let (mut tickets, mut held, first) = one();
        assert_eq!(tickets.join(&mut held, 0, first, false), Some(first));
        let mut resume = |ticket| {
            let next = tickets.join(&mut held, 0, ticket, true);
            (next, next.is_none() && tickets.find(ticket).is_some())
        };
        let lost = resume(first).0.expect("the first one");
        // The WELCOME that brought it was lost: the guest comes with what it has.
        let second = resume(first).0.expect("the first one again");
        assert!(second != lost && second != first);
        assert_eq!(resume(lost), (None, false));
        let third = resume(second).0.expect("the second");
        assert_eq!(resume(first), (None, false));
        assert!(resume(second).0.is_some() && resume(third).0.is_none());
        assert_eq!(tickets.find(second), Some(7));
        tickets.end(&held, None);
        assert!(tickets.live.is_empty() && tickets.gone.is_empty());
    }

    #[test]
    fn a_copy_of_the_guest_finds_nothing_that_was_done_since() {
        let (mut tickets, mut held, first) = one();
        for conn in [0, 1] {
            assert_eq!(tickets.join(&mut held, conn, first, false), Some(first));
        }
        // Guest and copy have the first ticket. Whoever resumes has the session to itself.
        let second = tickets.join(&mut held, 0, first, true).expect("the first ticket");
        assert_eq!(tickets.join(&mut held, 1, first, true), None, "half of a session");
        // Its first batch: the copy could go on with none of its connections.
        assert!(tickets.prove(&mut held, second));
        assert_eq!(tickets.join(&mut held, 0, first, true), None);
        assert_eq!((tickets.find(first), tickets.find(second)), (None, Some(7)));
        // A late word about an older connection changes nothing.
        let third = tickets.join(&mut held, 1, second, true).expect("the second");
        assert!(!tickets.prove(&mut held, second));
        assert!(tickets.join(&mut held, 0, third, true).is_some());
        tickets.end(&held, None);
        assert!(tickets.live.is_empty());
    }
}
