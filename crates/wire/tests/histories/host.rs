//! A daemon without sockets: registry, connections and operations by the rules of docs/sessions.md,
//! over the real `SlotTable`. Each step that a daemon can die between is a call of its own.

use crate::link::{End, Fault, Over, Record, Way};
use crate::memory::{File, Memory, SLOTS, Table};
use crate::share::{EINTR, EIO, Truth, runs_once};
use crate::world::{Net, Plant};
use ringfs_wire::abi::Opcode;
use ringfs_wire::batch::{Kind, RecordHeader, cancel};
use ringfs_wire::hello::{Hello, Reason, Ticket, Welcome, welcome_flag};
use ringfs_wire::slot::SlotUse;
use ringfs_wire::table::{Abandon, Begin, Fate, Past, SlotTable, rebuild};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use zerocopy::IntoBytes;

/// What a daemon leaves of a session.
#[derive(Clone)]
struct State {
    id: u32,
    ticket: Ticket,
    unused: Option<(Ticket, u16)>,
    /// Of each connection's lanes.
    files: Vec<Vec<File>>,
}

struct Newcomer {
    pipe: usize,
    end: End,
    ticket: Ticket,
    guest: u32,
    conn: u16,
    nth: u32,
}

struct Link {
    pipe: usize,
    end: End,
    /// Of batches that were accepted, and not worked through.
    accepted: VecDeque<Record>,
    ticket: Ticket,
    is_proven: bool,
    /// A PING is on its way.
    is_asked: bool,
    /// Something has come since.
    heard: bool,
}

struct Running {
    lane: u8,
    at: SlotUse,
    request: Record,
    /// Of one that a dead daemon had: running, or done with this reply.
    done: Option<Option<Vec<u8>>>,
    result: Option<(u32, Vec<u8>)>,
}

struct Conn {
    lanes: Vec<Table>,
    known: bool,
    link: Option<Link>,
    running: Vec<Running>,
    /// Who says that it is his.
    waiting: Vec<Newcomer>,
    /// So many of them had come when the PING was sent.
    asked_for: usize,
    half: VecDeque<Record>,
}

pub struct Session {
    pub id: u32,
    pub guest: u32,
    ticket: Ticket,
    /// The next one, until something shows that it has arrived, and the connection that was told.
    unused: Option<(Ticket, u16)>,
    /// The last HELLO that was welcomed.
    nth: u32,
    /// Connections that have been joined once.
    joined: BTreeSet<u16>,
    is_rebuilt: bool,
    pub is_ready: bool,
    /// Nodes and handles that were restored.
    pub came: (u64, u64),
    pub nodes: BTreeMap<u64, u64>,
    pub handles: BTreeSet<u64>,
    pub fh_max: u64,
    conns: Vec<Conn>,
    files: Vec<Vec<File>>,
    was_adopted: bool,
    /// What its guest had in flight may have run for that guest.
    is_heir: bool,
    ended: bool,
}

#[derive(Default)]
pub struct Daemon {
    sessions: Vec<Session>,
    greeting: Vec<(usize, End)>,
    /// The state directory.
    states: Vec<State>,
    epoch: u64,
    /// Of sessions that ended without their guests' doing.
    gone: Vec<Ticket>,
}

impl Daemon {
    /// A connection comes in.
    pub fn accept(&mut self, pipe: usize, end: End) {
        self.greeting.push((pipe, end));
    }

    /// It dies: whatever it had is gone, but what it wrote.
    pub fn kill(&mut self, net: &mut Net, keeps_state: bool) {
        for at in 0..self.sessions.len() {
            if !self.sessions[at].ended {
                let session = &self.sessions[at];
                self.states.extend(session.is_ready.then(|| session.state()));
                self.end_session(at, net);
            }
        }
        if !keeps_state {
            self.states.clear();
        }
        for (pipe, end) in std::mem::take(&mut self.greeting) {
            net.close(pipe, end, Way::Up);
        }
        self.sessions.clear();
        self.gone.clear();
        self.epoch += 1;
    }

    pub fn session_of(&self, ticket: Ticket) -> Option<&Session> {
        self.sessions.iter().find(|s| !s.ended && s.has(ticket))
    }

    /// A session that has no connection is over.
    pub fn reap(&mut self, net: &mut Net) -> bool {
        let cut = |s: &Session| !s.ended && s.conns.iter().all(|c| c.link.is_none());
        let at = self.sessions.iter().position(cut);
        at.is_some_and(|at| {
            let session = &self.sessions[at];
            self.gone.extend(
                [Some(session.ticket), session.unused.map(|(ticket, _)| ticket)]
                    .into_iter()
                    .flatten(),
            );
            self.end_session(at, net);
            true
        })
    }

    /// For people.
    pub fn state(&self, net: &Net) -> String {
        let conns = self
            .sessions
            .iter()
            .flat_map(|session| session.conns.iter().map(move |conn| (session, conn)));
        let lines = conns.map(|(session, conn)| {
            let link = conn.link.as_ref().map(|link| {
                let pipe = &net.pipes[link.pipe];
                (pipe.is_cut, pipe.is_silent, link.accepted.len(), link.end.has_output())
            });
            let (ended, ready) = (session.ended, session.is_ready);
            let waiting = conn.waiting.len();
            format!("{} {ended} {ready}: {link:?} {} {waiting}", session.id, conn.running.len())
        });
        format!("{} greeting, {:?}", self.greeting.len(), lines.collect::<Vec<_>>())
    }

    /// Nothing is to be done, but for guests that are gone without a word.
    pub fn is_quiet(&self, net: &Net) -> bool {
        let idle = |c: &Conn| {
            let there = c.link.as_ref().filter(|link| !net.pipes[link.pipe].is_silent);
            let said = there.is_none_or(|l| l.accepted.is_empty() && !l.end.has_output());
            c.running.is_empty() && c.waiting.is_empty() && said
        };
        self.greeting.is_empty() && self.sessions.iter().all(|s| s.conns.iter().all(idle))
    }

    fn end_session(&mut self, at: usize, net: &mut Net) {
        let session = &mut self.sessions[at];
        session.ended = true;
        if session.is_heir && !session.is_ready {
            self.gone.push(session.ticket);
            self.gone.extend(session.unused.map(|(ticket, _)| ticket));
        }
        if session.was_adopted && !session.is_ready {
            // Nothing was done: the next try finds it as it was.
            self.states.push(session.state());
        }
        for conn in &mut session.conns {
            conn.running.clear();
            if let Some(link) = conn.link.take() {
                net.close(link.pipe, link.end, Way::Up);
            }
            for newcomer in conn.waiting.drain(..) {
                net.close(newcomer.pipe, newcomer.end, Way::Up);
            }
        }
    }

    /// One of all that a daemon may do next.
    pub fn step(&mut self, net: &mut Net, truth: &mut Truth) -> Result<(), Fault> {
        if !self.greeting.is_empty() && net.rng.one_of(200) {
            return self.greet(net);
        }
        if self.sessions.is_empty() {
            return Ok(());
        }
        let at = net.rng.below(self.sessions.len());
        let session = &self.sessions[at];
        if session.ended {
            return Ok(());
        }
        let c = net.rng.below(session.conns.len());
        match net.rng.below(8) {
            0 | 1 => self.receive(at, c, net)?,
            2 | 3 => self.work(at, c, net)?,
            4 => self.execute(at, c, net, truth)?,
            5 => self.finish(at, c, net)?,
            6 => {
                if let Some(link) = &mut self.sessions[at].conns[c].link {
                    link.end.flush(&mut net.pipes[link.pipe], Way::Down);
                }
            }
            _ => self.probe(at, c, net),
        }
        Ok(())
    }

    fn greet(&mut self, net: &mut Net) -> Result<(), Fault> {
        let at = net.rng.below(self.greeting.len());
        let (pipe, mut end) = self.greeting.swap_remove(at);
        // Who stands between may bring it late, and the end of it later still.
        if net.pipes[pipe].is_silent && !net.is_old && !net.rng.one_of(50) {
            self.greeting.push((pipe, end));
            return Ok(());
        }
        let mut records = VecDeque::new();
        let most = 1 + net.rng.below(200);
        let got = end.receive(&mut net.pipes[pipe], Way::Up, most, &mut records);
        if got.is_err() {
            net.close(pipe, end, Way::Up);
            return Ok(());
        }
        let Some(record) = records.pop_front() else {
            self.greeting.push((pipe, end));
            return Ok(());
        };
        let hello = Hello::decode(&record.body).map_err(|error| error.to_string())?;
        let guest = u32::from_str_radix(&hello.share, 16).map_err(|_| "no guest")?;
        let (ticket, conn, nth) = (hello.ticket, hello.conn, hello.nth);
        let newcomer = Newcomer { pipe, end, ticket, guest, conn, nth };
        let known = self.sessions.iter().position(|s| !s.ended && s.has(ticket));
        match known {
            None => {
                let is_heir = hello.epoch_seen != self.epoch || self.gone.contains(&ticket);
                self.open(newcomer, (hello.lanes, hello.conns), is_heir, net);
            }
            Some(at) => self.meet(at, newcomer, net),
        }
        Ok(())
    }

    /// A session of its own, made anew from the guest's memory if it had one.
    fn open(
        &mut self,
        newcomer: Newcomer,
        (lanes, conns): (u16, u16),
        is_heir: bool,
        net: &mut Net,
    ) {
        let is_rebuilt = newcomer.ticket != Ticket::NONE;
        let ticket = newcomer.ticket;
        let state = self.states.iter().position(|state| {
            state.ticket == ticket || state.unused.is_some_and(|(unused, _)| unused == ticket)
        });
        let state = state.map(|at| self.states.swap_remove(at));
        let was_adopted = state.is_some();
        let lanes_of = |c: u16| (c..lanes).step_by(usize::from(conns));
        let files: Vec<Vec<File>> = match &state {
            Some(state) => state.files.clone(),
            None => (0..conns).map(|c| lanes_of(c).map(|_| File::default()).collect()).collect(),
        };
        let table = |file: &File| match (was_adopted, is_rebuilt) {
            (true, _) => SlotTable::adopt(Memory::new(file)),
            (false, is_rebuilt) => {
                let mut memory = Memory::new(file);
                if is_rebuilt {
                    rebuild(memory.as_mut());
                }
                SlotTable::of(memory)
            }
        };
        let conn = |c: u16| Conn {
            lanes: files[usize::from(c)].iter().map(table).collect(),
            known: false,
            link: None,
            running: Vec::new(),
            waiting: Vec::new(),
            asked_for: 0,
            half: VecDeque::new(),
        };
        let fresh = net.ticket();
        // Where there is a state the ticket is one that is not known to have arrived.
        let (ticket, unused) = match &state {
            Some(_) => (ticket, Some((fresh, newcomer.conn))),
            None => (fresh, None),
        };
        let conns = (0..conns).map(conn).collect();
        self.sessions.push(Session {
            id: state.map_or_else(|| net.number() as u32, |state| state.id),
            guest: newcomer.guest,
            ticket,
            unused,
            nth: 0,
            joined: BTreeSet::new(),
            is_rebuilt,
            is_ready: !is_rebuilt,
            came: (0, 0),
            nodes: BTreeMap::new(),
            handles: BTreeSet::new(),
            fh_max: 0,
            conns,
            files,
            was_adopted,
            is_heir: is_heir && is_rebuilt,
            ended: false,
        });
        let at = self.sessions.len() - 1;
        self.greet_back(at, newcomer, fresh, welcome_flag::REBUILD * u32::from(is_rebuilt), net);
    }

    fn meet(&mut self, at: usize, newcomer: Newcomer, net: &mut Net) {
        if self.sessions[at].is_late(&newcomer, net) {
            return Self::have_come_again(newcomer, net);
        }
        let session = &mut self.sessions[at];
        let conn = &mut session.conns[usize::from(newcomer.conn)];
        if !conn.known || conn.link.is_none() {
            let resumes = conn.known;
            self.welcome(at, newcomer, resumes, net);
            return;
        }
        conn.waiting.push(newcomer);
        // Who has lost one without our knowing has lost them all.
        session.conns.iter_mut().for_each(|conn| conn.ask(net));
    }

    /// The peer of a connection was there when it was asked: who had come by then are clones.
    fn ponged(&mut self, at: usize, c: usize, net: &mut Net) {
        let session = &mut self.sessions[at];
        let conns = session.conns.len() as u16;
        let lanes = session.conns.iter().map(|conn| conn.lanes.len() as u16).sum();
        let conn = &mut session.conns[c];
        let Some(link) = &mut conn.link else { return };
        if !std::mem::take(&mut link.is_asked) {
            return;
        }
        let answered = match net.is_planted(Plant::LateAnswersCount) {
            true => conn.waiting.len(),
            false => conn.asked_for,
        };
        let clones: Vec<Newcomer> = conn.waiting.drain(..answered).collect();
        if !conn.waiting.is_empty() {
            conn.ask(net);
        }
        for clone in clones {
            net.say(|| format!("host: guest {} is a clone", clone.guest));
            self.open(clone, (lanes, conns), false, net);
        }
    }

    /// Whether the peer of a connection that others say is theirs takes too long to answer.
    fn probe(&mut self, at: usize, c: usize, net: &mut Net) {
        let conn = &mut self.sessions[at].conns[c];
        let (Some(link), false) = (&conn.link, conn.waiting.is_empty()) else { return };
        let pipe = &net.pipes[link.pipe];
        if link.heard && net.is_planted(Plant::LateBytesCount) {
            conn.asked_for = conn.waiting.len();
            self.ponged(at, c, net);
        } else if pipe.is_cut && pipe.says_nothing(Way::Up) || net.rng.one_of(2) {
            net.say(|| format!("host: connection {at}.{c} is silent"));
            self.hang_up(at, c, net);
        }
    }

    /// As `Registry::join`.
    fn join(&mut self, at: usize, newcomer: &Newcomer, resumes: bool, net: &mut Net) -> bool {
        let session = &mut self.sessions[at];
        let (ticket, conn) = (newcomer.ticket, newcomer.conn);
        let other = |told: u16| told != conn && !net.is_planted(Plant::OldTicketAnywhere);
        match session.unused {
            Some((unused, _)) if unused == ticket => session.prove(ticket),
            // Who has not got the new one comes again for the same connection.
            Some((_, told)) if other(told) => return false,
            Some(_) | None if session.ticket != ticket => return false,
            Some(_) | None => {}
        }
        session.joined.insert(conn);
        if resumes {
            session.unused = Some((net.ticket(), conn));
            session.guest = newcomer.guest;
        }
        true
    }

    /// False: he is gone.
    fn welcome(&mut self, at: usize, newcomer: Newcomer, resumes: bool, net: &mut Net) -> bool {
        // A ticket for somebody who has given up would void the one that he has got since.
        if net.is_over(newcomer.pipe) && !net.is_planted(Plant::LateHellosCount) {
            net.close(newcomer.pipe, newcomer.end, Way::Up);
            return false;
        }
        if self.sessions[at].is_late(&newcomer, net) {
            Self::have_come_again(newcomer, net);
            return false;
        }
        if !self.join(at, &newcomer, resumes, net) {
            let conns = self.sessions[at].conns.len() as u16;
            let lanes = self.sessions[at].conns.iter().map(|conn| conn.lanes.len() as u16).sum();
            self.open(newcomer, (lanes, conns), false, net);
            return false;
        }
        let session = &self.sessions[at];
        let fresh = session.unused.filter(|_| resumes).map_or(newcomer.ticket, |(fresh, _)| fresh);
        let flags = match (resumes, session.is_rebuilt) {
            (true, _) => welcome_flag::RESUMED,
            (false, true) => welcome_flag::REBUILD,
            (false, false) => 0,
        };
        self.greet_back(at, newcomer, fresh, flags, net);
        true
    }

    fn greet_back(
        &mut self,
        at: usize,
        newcomer: Newcomer,
        fresh: Ticket,
        flags: u32,
        net: &mut Net,
    ) {
        let session = &mut self.sessions[at];
        let Newcomer { pipe, mut end, conn, guest, nth, .. } = newcomer;
        session.joined.insert(conn);
        session.nth = session.nth.max(nth);
        let welcome = Welcome {
            version: 1,
            lanes: session.conns.iter().map(|conn| conn.lanes.len() as u16).sum(),
            slots: SLOTS,
            conns: session.conns.len() as u16,
            ticket: fresh,
            epoch: self.epoch,
            flags,
            ..Welcome::default()
        };
        net.say(|| format!("host: guest {guest:x} conn {conn}: {:?}", welcome.flags));
        end.tell(Kind::Welcome, 0, welcome.as_bytes());
        end.flush(&mut net.pipes[pipe], Way::Down);
        let conn = &mut session.conns[usize::from(conn)];
        let accepted = std::mem::take(&mut conn.half);
        conn.known = true;
        let ticket = fresh;
        let (is_proven, is_asked, heard) = (false, false, false);
        conn.link = Some(Link { pipe, end, accepted, ticket, is_proven, is_asked, heard });
    }

    fn receive(&mut self, at: usize, c: usize, net: &mut Net) -> Result<(), Fault> {
        let session = &mut self.sessions[at];
        let Some(link) = &mut session.conns[c].link else { return Ok(()) };
        let pipe = &mut net.pipes[link.pipe];
        // What is left of who is gone without a word comes late.
        if pipe.says_nothing(Way::Up) || pipe.is_silent && !net.rng.one_of(50) {
            return Ok(());
        }
        let most = 1 + [20, 400, 4000][net.rng.below(3)];
        let before = link.accepted.len();
        match link.end.receive(pipe, Way::Up, most, &mut link.accepted) {
            Ok(n) => link.heard |= n > 0,
            Err(Over::End | Over::Damaged) => {
                self.hang_up(at, c, net);
                return Ok(());
            }
        }
        // Whoever has sent something has the WELCOME.
        if link.accepted.len() > before && !std::mem::replace(&mut link.is_proven, true) {
            let ticket = link.ticket;
            if !net.is_planted(Plant::OldTicketStays) {
                session.prove(ticket);
            }
        }
        Ok(())
    }

    fn hang_up(&mut self, at: usize, c: usize, net: &mut Net) {
        let conn = &mut self.sessions[at].conns[c];
        let Some(link) = conn.link.take() else { return };
        if net.is_planted(Plant::HalfBatchStays) {
            conn.half = link.accepted;
        }
        net.close(link.pipe, link.end, Way::Up);
        if !net.is_planted(Plant::TableNotCut) {
            conn.lanes.iter_mut().for_each(Table::cut);
        }
        net.say(|| format!("host: connection {at}.{c} is detached"));
        if !self.sessions[at].is_ready {
            return self.end_session(at, net);
        }
        let mut waiting = std::mem::take(&mut self.sessions[at].conns[c].waiting);
        while let Some(last) = waiting.pop()
            && !self.welcome(at, last, true, net)
        {}
        for other in waiting {
            Self::have_come_again(other, net);
        }
    }

    fn have_come_again(mut newcomer: Newcomer, net: &mut Net) {
        newcomer.end.tell(Kind::Goodbye, Reason::Timeout as u32, b"");
        newcomer.end.flush(&mut net.pipes[newcomer.pipe], Way::Down);
        net.close(newcomer.pipe, newcomer.end, Way::Up);
    }

    /// Works on one record.
    fn work(&mut self, at: usize, c: usize, net: &mut Net) -> Result<(), Fault> {
        let session = &mut self.sessions[at];
        let conns = session.conns.len();
        let Session { conns: all, .. } = session;
        let conn = &mut all[c];
        let Some(link) = &mut conn.link else { return Ok(()) };
        let Some(front) = link.accepted.front() else { return Ok(()) };
        let kind = Kind::from_u8(front.header.kind).ok_or("an unknown kind")?;
        let asks = !matches!(kind, Kind::Restore | Kind::Ping | Kind::Pong);
        if asks && !session.is_ready && !net.is_planted(Plant::NotHeldUntilRestored) {
            return Ok(());
        }
        let Some(record) = link.accepted.pop_front() else { return Ok(()) };
        let (header, use_of) = (record.header, record.at());
        if asks && usize::from(header.lane) % conns != c {
            return Err(format!("lane {} on connection {c}", header.lane));
        }
        let table = &mut conn.lanes[usize::from(header.lane) / conns];
        let refused = |error| format!("protocol error between honest ends: {error}");
        match kind {
            Kind::Request | Kind::Forget => {
                let opcode = if kind == Kind::Forget { Opcode::Forget as u32 } else { header.code };
                let begun = table.begin(use_of, opcode).map_err(refused)?;
                net.say(|| format!("host: {at}.{c} {use_of:?} {begun:?}"));
                let mut done = None;
                let run = match begun {
                    Begin::Execute => true,
                    Begin::Decide => {
                        net.decided += 1;
                        done = match table.past(use_of).ok_or("nothing to decide")? {
                            Past::Running => Some(None),
                            Past::Done(reply) => Some(Some(reply.to_vec())),
                        };
                        true
                    }
                    Begin::Unsure
                        if runs_once(opcode) && !net.is_planted(Plant::UnsureRunAgain) =>
                    {
                        table.give_up(use_of).map_err(refused)?;
                        reply(link, &header, EIO, &[], net);
                        false
                    }
                    Begin::Unsure => {
                        table.trust(use_of).map_err(refused)?;
                        table.begin(use_of, opcode).map_err(refused)? == Begin::Execute
                    }
                    Begin::Running => false,
                    Begin::Replay => {
                        let (errno, body) = table.kept(use_of).ok_or("nothing is kept")?;
                        reply(link, &header, errno, body, net);
                        false
                    }
                    Begin::Rerun(given) => {
                        let plant = net.is_planted(Plant::RerunKeepsLookups);
                        session.give_back(given, plant)?;
                        true
                    }
                };
                if run {
                    let lane = header.lane;
                    let result = None;
                    let running = Running { lane, at: use_of, request: record, done, result };
                    session.conns[c].running.push(running);
                }
            }
            Kind::Cancel if header.code == cancel::ABANDON => {
                let abandoned = table.abandon(use_of).map_err(refused)?;
                net.say(|| format!("host: {at}.{c} {use_of:?} abandon: {abandoned:?}"));
                match abandoned {
                    Abandon::Over(given) => {
                        reply(link, &header, EINTR, &[], net);
                        session.give_back(given, net.is_planted(Plant::AbandonedKeepsLookups))?;
                    }
                    Abandon::Running => interrupt(conn, &header),
                    Abandon::Void => {}
                }
            }
            Kind::Cancel => {
                if table.is_running(use_of) {
                    interrupt(conn, &header);
                }
            }
            Kind::Unsure if session.is_heir => table.doubt(use_of).map_err(refused)?,
            Kind::Unsure => {}
            Kind::Ping => link.tell(Kind::Pong, net),
            Kind::Pong => self.ponged(at, c, net),
            Kind::Restore => session.restore(&record.body)?,
            _ => return Err(format!("{kind:?} from a guest")),
        }
        Ok(())
    }

    /// An operation runs; its end is not written down yet.
    fn execute(
        &mut self,
        at: usize,
        c: usize,
        net: &mut Net,
        truth: &mut Truth,
    ) -> Result<(), Fault> {
        let session = &mut self.sessions[at];
        let count = session.conns[c].running.len();
        if count == 0 {
            return Ok(());
        }
        let n = net.rng.below(count);
        if session.conns[c].running[n].result.is_some() {
            return Ok(());
        }
        let request = session.conns[c].running[n].request.clone();
        if let Some(Some(reply)) = &session.conns[c].running[n].done
            && net.is_planted(Plant::KeptGivesNothing)
        {
            session.conns[c].running[n].result = Some((0, reply.clone()));
            return Ok(());
        }
        let is_done = match &session.conns[c].running[n].done {
            None => false,
            Some(Some(_)) => true,
            // As somebody would find who looks.
            Some(None) => {
                !net.is_planted(Plant::OrphansRunAgain) && truth.has_run_in(session.id, &request)
            }
        };
        let result = session.perform(&request, truth, is_done)?;
        net.say(|| format!("host: {at}.{c} {:?} ran: {}", request.at(), result.0));
        session.conns[c].running[n].result = Some(result);
        Ok(())
    }

    fn finish(&mut self, at: usize, c: usize, net: &mut Net) -> Result<(), Fault> {
        let session = &mut self.sessions[at];
        let conns = session.conns.len();
        let conn = &mut session.conns[c];
        if conn.running.is_empty() {
            return Ok(());
        }
        let n = net.rng.below(conn.running.len());
        if conn.running[n].result.is_none() {
            return Ok(());
        }
        let Running { lane, at: use_of, request, result, .. } = conn.running.swap_remove(n);
        let (errno, body) = result.unwrap_or_default();
        let table = &mut conn.lanes[usize::from(lane) / conns];
        let fate = table.finish(use_of, errno, &body).map_err(|error| error.to_string())?;
        net.say(|| format!("host: {at}.{c} {use_of:?} ends: {fate:?}"));
        let late = net.is_planted(Plant::RepliesUnasked) && conn.link.is_some();
        match (fate, &mut conn.link) {
            (Fate::Send, Some(link)) => reply(link, &request.header, errno, &body, net),
            (Fate::Send, None) => return Err("a reply for nobody".into()),
            (Fate::Keep, Some(link)) if late => reply(link, &request.header, errno, &body, net),
            (Fate::Keep, _) => {}
            (Fate::GiveBack { given, send }, link) => {
                if send {
                    let link = link.as_mut().ok_or("an EINTR for nobody")?;
                    reply(link, &request.header, EINTR, &[], net);
                }
                session.give_back(given, net.is_planted(Plant::AbandonedKeepsLookups))?;
            }
        }
        Ok(())
    }

    /// Holds what is kept against its bounds.
    pub fn check(&self) -> Result<(), Fault> {
        for conn in self.sessions.iter().flat_map(|session| &session.conns) {
            let slots = conn.lanes.len() * usize::from(SLOTS);
            let in_use: usize = conn.lanes.iter().map(Table::in_use).sum();
            if in_use > slots || conn.running.len() > slots {
                return Err(format!("{in_use} slots in use of {slots}"));
            }
            let accepted = conn.link.as_ref().map_or(0, |link| link.accepted.len());
            // Requests, an ABANDON, a CANCEL and an UNSURE of each, RESTOREs and PINGs.
            if accepted > 5 * slots + 8 {
                return Err(format!("{accepted} records wait"));
            }
        }
        Ok(())
    }
}

impl Conn {
    /// Asks its peer whether it lives; one PING is on its way at a time.
    fn ask(&mut self, net: &mut Net) {
        if let Some(link) = self.link.as_mut().filter(|link| !link.is_asked) {
            (link.is_asked, link.heard) = (true, false);
            link.tell(Kind::Ping, net);
            self.asked_for = self.waiting.len();
        }
    }
}

impl Link {
    fn tell(&mut self, kind: Kind, net: &mut Net) {
        if self.end.is_due() {
            self.end.flush(&mut net.pipes[self.pipe], Way::Down);
        }
        self.end.tell(kind, 0, &[]);
    }
}

fn reply(link: &mut Link, header: &RecordHeader, errno: u32, body: &[u8], net: &mut Net) {
    if link.end.is_due() {
        link.end.flush(&mut net.pipes[link.pipe], Way::Down);
    }
    let at = SlotUse { slot: header.slot, seq: header.slot_seq };
    link.end.push(Kind::Reply, header.lane, at, errno, if errno == 0 { body } else { &[] });
}

/// What has not begun need not run.
fn interrupt(conn: &mut Conn, header: &RecordHeader) {
    let at = SlotUse { slot: header.slot, seq: header.slot_seq };
    let running = conn.running.iter_mut().find(|r| r.at == at && r.lane == header.lane);
    // FORGET and RELEASE cannot be refused.
    let may = |r: &&mut Running| {
        r.request.header.kind == Kind::Request as u8
            && r.request.header.code != Opcode::Release as u32
    };
    if let Some(running) = running.filter(may) {
        running.result.get_or_insert((EINTR, Vec::new()));
    }
}

impl Session {
    fn has(&self, ticket: Ticket) -> bool {
        self.ticket == ticket || self.unused.is_some_and(|(unused, _)| unused == ticket)
    }

    /// Its guest has come again since, and was welcomed.
    fn is_late(&self, newcomer: &Newcomer, net: &Net) -> bool {
        newcomer.nth != 0 && newcomer.nth < self.nth && !net.is_planted(Plant::HellosOvertake)
    }

    fn state(&self) -> State {
        let Session { id, ticket, unused, .. } = *self;
        State { id, ticket, unused, files: self.files.clone() }
    }

    /// A ticket has arrived: all others are a clone's.
    fn prove(&mut self, ticket: Ticket) {
        if self.unused.is_some_and(|(unused, _)| unused == ticket) {
            (self.ticket, self.unused) = (ticket, None);
        }
    }

    /// Whether each of its connections has been joined.
    pub fn is_whole(&self) -> bool {
        self.joined.len() == self.conns.len()
    }
}
