//! Whose turn it is, and for how long: sessions that share a core have as much of it each.
//!
//! Part of [`Shard`]. As long as one session alone has something to say it is worked for until it
//! has nothing more, up to a bound of records. With others beside it each session's time is
//! counted, and a session that is ahead of the one that had least waits, but for a turn of
//! [`TURN`]. Who has said nothing for [`ABSENT`] is not waited for: that is longer than a guest
//! takes to go on, or one that always has something to say would have all the time in between.
//! (That it was not looked at for so long says nothing: one operation may take longer.)
//! Who comes back begins where the others are, and has saved nothing.
//!
//! Rates (quota.rs) make connections wait, too: they stand in a list until their time has come.

use super::*;

/// How far a session may be ahead of another one.
const TURN: Duration = Duration::from_micros(60);
/// Who has said nothing for so long has left the core to the others.
const ABSENT: Duration = Duration::from_micros(150);
/// Who waits for a rate is looked at again after so long.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// After so long without another session the clock is not looked at any more.
const ALONE: Duration = Duration::from_millis(5);

/// A session that has had something to say lately.
#[derive(Debug)]
struct Active {
    session: u64,
    /// Its peer.
    owner: u64,
    /// Its time on this core, from where the others were when it came.
    had: Duration,
    seen: Instant,
}

/// What the shard knows of sessions that take turns; nothing while one is alone.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// The session that was looked at last.
    last: u64,
    /// Until when there are several.
    shared_until: Option<Instant>,
    /// Sorted by session.
    active: Vec<Active>,
    /// The connection that is looked at first, of those that have something to say.
    first: usize,
    /// Room for the peers among them.
    owners: Vec<u64>,
    /// What the end of a pool job took lately, in nanoseconds.
    ending_ns: u32,
}

/// One connection's turn.
#[derive(Clone, Copy)]
pub(super) struct Turn {
    begun: Instant,
}

impl Turn {
    pub(super) fn is_over(self) -> bool {
        self.begun.elapsed() >= TURN
    }
}

impl Turns {
    fn is_shared(&self) -> bool {
        self.shared_until.is_some()
    }

    /// Who of the sessions that are here had least.
    fn least(&self) -> Duration {
        self.active.iter().map(|active| active.had).min().unwrap_or_default()
    }

    fn see(&mut self, session: u64, owner: u64, now: Instant) {
        match self.active.binary_search_by_key(&session, |active| active.session) {
            Ok(at) => self.active[at].seen = now,
            Err(at) => {
                let had = self.least();
                self.active.insert(at, Active { session, owner, had, seen: now });
            }
        }
    }

    /// These have something to say now; the others may have left. In this order: who is here is
    /// not taken for absent because one operation of another one took so long, and has saved that.
    fn look(&mut self, here: impl Iterator<Item = (u64, u64)>, now: Instant) {
        here.for_each(|(session, owner)| self.see(session, owner, now));
        self.active.retain(|active| now.saturating_duration_since(active.seen) < ABSENT);
    }

    /// How many peers have sessions here.
    fn peers(&mut self) -> usize {
        self.owners.clear();
        self.owners.extend(self.active.iter().map(|active| active.owner));
        self.owners.sort_unstable();
        self.owners.dedup();
        self.owners.len()
    }
}

impl<R: Ring> Shard<R> {
    /// These connections have something to say: which sessions are there, and in which order.
    pub(super) fn begin_turns(&mut self, touched: &mut [usize]) {
        // What is simulated must not depend on the clock.
        if touched.is_empty() || self.ring.takes_all() {
            return;
        }
        let Shard { turns, conns, shared, .. } = self;
        let sessions = touched.iter().filter_map(|&key| Some(&conns.get(key)?.session));
        let several = sessions.clone().any(|session| session.id != turns.last);
        if !several && !turns.is_shared() {
            return;
        }
        let now = Instant::now();
        if several {
            turns.shared_until = Some(now + ALONE);
            turns.last = sessions.clone().next_back().map_or(0, |session| session.id);
        } else if turns.shared_until.is_some_and(|until| until <= now) {
            turns.shared_until = None;
            return turns.active.clear();
        }
        turns.look(sessions.map(|session| (session.id, session.terms.owner)), now);
        if several {
            let peers = turns.peers();
            if peers > 1 {
                shared.pool.shared_by(peers, ALONE);
            }
        }
        // Connections of one session have its time in turn.
        let at = touched.partition_point(|&key| key < turns.first);
        touched.rotate_left(at % touched.len());
        turns.first = touched[0] + 1;
    }

    /// Whether a connection is worked for now. Else it is looked at again.
    pub(super) fn has_turn(&mut self, key: usize) -> bool {
        let Shard { turns, conns, touched, .. } = self;
        if !turns.is_shared() {
            return true;
        }
        let session = conns[key].session.id;
        let Ok(at) = turns.active.binary_search_by_key(&session, |active| active.session) else {
            return true;
        };
        if turns.active[at].had <= turns.least() + TURN {
            return true;
        }
        touched.push(key);
        false
    }

    /// `None` where nobody waits for the end of it.
    pub(super) fn begin_turn(&self) -> Option<Turn> {
        self.turns.is_shared().then(|| Turn { begun: Instant::now() })
    }

    /// The session has had that time.
    pub(super) fn end_turn(&mut self, key: usize, turn: Option<Turn>) {
        let Shard { turns, conns, .. } = self;
        if let (Some(turn), Some(conn)) = (turn, conns.get(key))
            && let session = conn.session.id
            && let Ok(at) = turns.active.binary_search_by_key(&session, |active| active.session)
        {
            turns.active[at].had += turn.begun.elapsed();
        }
    }

    /// A pool job is done. The session has that time, too.
    pub(super) fn end_job(&mut self, done: Done) {
        let (key, turn) = (done.tag.conn, self.begin_turn());
        self.executed(done);
        self.end_turn(key, turn);
        if let Some(turn) = turn {
            let took = u32::try_from(turn.begun.elapsed().as_nanos()).unwrap_or(u32::MAX);
            self.turns.ending_ns = self.turns.ending_ns / 8 * 7 + took / 8;
        }
    }

    /// What a pool job takes of the shard's time: its peer pays for that, too. It takes about as
    /// long to be taken up as to be ended.
    pub(super) fn job_ns(&self) -> u32 {
        if self.turns.is_shared() { self.turns.ending_ns.saturating_mul(2) } else { 0 }
    }

    /// Receives nothing large for a session that has to wait for a rate.
    pub(super) fn hold_large(&mut self, key: usize) {
        let conn = &mut self.conns[key];
        let quota = &conn.session.fs.quota;
        // Its turn comes, whatever its other connections take meanwhile.
        conn.link.hold_large = quota.is_limited()
            && match conn.large_at {
                Some(at) => at > Instant::now(),
                None => !quota.in_debt_for().is_zero(),
            };
    }

    /// The next request of a connection waits for a rate.
    pub(super) fn delay(&mut self, key: usize) {
        let conn = &mut self.conns[key];
        let now = Instant::now();
        let quota = &conn.session.fs.quota;
        let until = match conn.runs_at {
            Some((runs_at, _)) => runs_at,
            None => *conn.large_at.get_or_insert_with(|| now + quota.in_debt_for()),
        };
        // The limits may be others by then.
        let until = until.min(now + LOOK_AGAIN);
        self.delayed_until = Some(self.delayed_until.map_or(until, |at| at.min(until)));
        if !std::mem::replace(&mut conn.delayed, true) {
            self.delayed.push(key);
            self.plan_sweep();
        }
    }

    /// Looks at those whose time has come; the others say again when theirs does.
    pub(super) fn go_on_with_delayed(&mut self) {
        if self.delayed_until.is_none_or(|until| until > Instant::now()) {
            return;
        }
        self.delayed_until = None;
        for key in std::mem::take(&mut self.delayed) {
            if let Some(conn) = self.conns.get_mut(key) {
                conn.delayed = false;
                self.touched.push(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_through_a_long_operation_is_not_absent() {
        let (friend, foe) = ((1, 10), (2, 20));
        let (mut turns, begun) = (Turns::default(), Instant::now());
        let long = ABSENT * 2;
        turns.look([friend, foe].into_iter(), begun);
        turns.active[1].had += long;
        turns.look([friend, foe].into_iter(), begun + long);
        let had = |turns: &Turns| turns.active.iter().map(|a| a.had).collect::<Vec<_>>();
        assert_eq!(had(&turns), [Duration::ZERO, long], "it has saved that");
        // Who is not there after it is; and has saved nothing when it comes back.
        turns.active[1].had += long;
        turns.look([foe].into_iter(), begun + long * 2);
        assert_eq!(had(&turns), [long * 2]);
        turns.look([friend, foe].into_iter(), begun + long * 2);
        assert_eq!(had(&turns), [long * 2; 2]);
    }
}
