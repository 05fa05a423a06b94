//! A guest without a kernel: lanes over the real `ClientSlots`, what it keeps until a reply, what
//! it sends first on a new connection, and what its kernel has been told.

use crate::link::{End, Fault, Over, Record, Way};
use crate::memory::SLOTS;
use crate::share::{EEXIST, EINTR, EIO, Truth, word};
use crate::world::{Net, Plant};
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::batch::{Kind, cancel};
use ringfs_wire::hello::{Hello, Ticket, Welcome, welcome_flag};
use ringfs_wire::restore::{self, Restore, push_restore};
use ringfs_wire::slot::{ClientSlots, SlotUse};
use ringfs_wire::table::Given;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use zerocopy::FromBytes;

const PARK_MAX: usize = 16;

/// A request of the kernel's, as it is kept until its reply.
#[derive(Clone, Debug)]
struct Flight {
    tag: u64,
    opcode: Opcode,
    body: Vec<u8>,
    /// Answered here.
    abandoned: bool,
    cancelled: bool,
    /// Sent before the session was rebuilt.
    unsure: bool,
}

#[derive(Clone)]
struct Lane {
    slots: ClientSlots<Flight>,
    park: VecDeque<Flight>,
    /// What is sent before all else.
    again: VecDeque<SlotUse>,
    /// Interrupts that stand, behind that.
    cancels: VecDeque<SlotUse>,
}

struct Link {
    pipe: usize,
    end: End,
    /// What came with the WELCOME.
    early: VecDeque<Record>,
}

/// How this guest behaves where the rules leave it free.
#[derive(Clone, Copy, Default)]
pub struct Manners {
    /// Sends CANCEL again after a cut, where others abandon what was interrupted.
    pub repeats_cancels: bool,
    /// Abandons also while it is connected.
    pub abandons_live: bool,
}

/// One guest.
pub struct Guest {
    pub id: u32,
    manners: Manners,
    lanes: Vec<Lane>,
    links: Vec<Option<Link>>,
    trying: Option<(u16, Ticket, Link)>,
    /// Which was tried last, until it succeeds: only there is an older ticket good.
    retry: Option<usize>,
    pub ticket: Ticket,
    /// So many it has said.
    hellos: u32,
    /// As a RESTORE would tell: a FORGET and a RELEASE count when they are answered.
    pub nodes: BTreeMap<u64, u64>,
    pub handles: BTreeSet<u64>,
    /// What the kernel may still give back.
    held: BTreeMap<u64, u64>,
    open: BTreeSet<u64>,
    asked: u32,
    /// How often each was answered.
    answers: BTreeMap<u64, u32>,
    pub left: usize,
    /// Its daemon died, or another guest has the same memory.
    pub may_be_rebuilt: bool,
    /// And what its sessions were may be forgotten.
    pub may_run_twice: bool,
    /// Another one has the same memory, or had.
    is_copied: bool,
    /// Of the daemon that it has its ticket from.
    epoch: u64,
    pub rebuilds: usize,
    pub resumes: usize,
}

impl Guest {
    pub fn new(id: u32, (lanes, conns): (usize, usize), left: usize, manners: Manners) -> Guest {
        let lane = || Lane {
            slots: ClientSlots::new(SLOTS),
            park: VecDeque::new(),
            again: VecDeque::new(),
            cancels: VecDeque::new(),
        };
        Guest {
            id,
            manners,
            lanes: (0..lanes).map(|_| lane()).collect(),
            links: (0..conns).map(|_| None).collect(),
            trying: None,
            retry: None,
            ticket: Ticket::NONE,
            hellos: 0,
            nodes: BTreeMap::new(),
            handles: BTreeSet::new(),
            held: BTreeMap::new(),
            open: BTreeSet::new(),
            asked: 0,
            answers: BTreeMap::new(),
            left,
            may_be_rebuilt: false,
            may_run_twice: false,
            is_copied: false,
            epoch: 0,
            rebuilds: 0,
            resumes: 0,
        }
    }

    /// Its memory in another machine, where no connection is what it was.
    pub fn copy(&mut self, id: u32) -> Guest {
        (self.may_be_rebuilt, self.may_run_twice, self.is_copied) = (true, true, true);
        let mut copy = Guest::new(id, (0, self.links.len()), self.left, self.manners);
        copy.lanes.clone_from(&self.lanes);
        (copy.ticket, copy.retry, copy.hellos) = (self.ticket, self.retry, self.hellos);
        copy.nodes.clone_from(&self.nodes);
        copy.handles.clone_from(&self.handles);
        copy.held.clone_from(&self.held);
        copy.open.clone_from(&self.open);
        (copy.may_be_rebuilt, copy.may_run_twice, copy.is_copied) = (true, true, true);
        copy.epoch = self.epoch;
        copy.asked = self.asked;
        copy.answers.clone_from(&self.answers);
        copy.lanes.iter_mut().for_each(|lane| lane.again.clear());
        copy
    }

    /// The pipes that it uses now.
    pub fn pipes(&self) -> Vec<usize> {
        let trying = self.trying.iter().map(|(.., link)| link.pipe);
        self.links.iter().flatten().map(|link| link.pipe).chain(trying).collect()
    }

    pub fn conns(&self) -> usize {
        self.links.len()
    }

    pub fn has_session(&self) -> bool {
        self.ticket != Ticket::NONE
    }

    /// All that was asked has been answered, and nothing waits.
    pub fn is_quiet(&self) -> bool {
        let idle = |lane: &Lane| {
            lane.slots.in_use() == 0 && lane.park.is_empty() && lane.cancels.is_empty()
        };
        let connected = self.links.iter().all(Option::is_some) && self.trying.is_none();
        let said = self.links.iter().flatten().all(|link| !link.end.has_output());
        self.left == 0 && connected && said && self.lanes.iter().all(idle)
    }

    /// At the end.
    pub fn check(&self, truth: &Truth) -> Result<(), Fault> {
        for &tag in self.answers.keys().filter(|&&tag| truth.runs_of(tag) > 1) {
            if !self.may_run_twice || !self.is_copied && truth.runs_once(tag) {
                return Err(format!("{tag:x} ran in more than one session"));
            }
        }
        if self.answers.values().any(|&n| n != 1) || self.held != self.nodes {
            return Err(format!("guest {:x}: answers {:?}", self.id, self.answers));
        }
        Ok(())
    }

    fn answer(&mut self, tag: u64) -> Result<(), Fault> {
        match self.answers.get_mut(&tag) {
            Some(n @ 0) => *n = 1,
            other => return Err(format!("{tag:x} is answered, and was {other:?} times before")),
        }
        Ok(())
    }

    /// One of all that a guest may do next.
    pub fn step(&mut self, net: &mut Net, truth: &Truth) -> Result<(), Fault> {
        let conns = self.links.len();
        let c = net.rng.below(conns);
        match net.rng.below(16) {
            0..4 => self.ask(net),
            4..7 => self.send(c, net),
            7..9 => {
                self.send(c, net);
                if let Some(link) = &mut self.links[c] {
                    link.end.flush(&mut net.pipes[link.pipe], Way::Up);
                }
            }
            9..13 => self.receive(c, net, truth)?,
            13..15 => self.connect(net)?,
            _ => self.disturb(net)?,
        }
        Ok(())
    }

    fn ask(&mut self, net: &mut Net) {
        let l = net.rng.below(self.lanes.len());
        if self.left == 0 || self.lanes[l].park.len() >= PARK_MAX {
            return;
        }
        self.left -= 1;
        self.asked += 1;
        let tag = u64::from(self.id) << 32 | u64::from(self.asked);
        let mut body = tag.to_le_bytes().to_vec();
        let arg = net.rng.below(100) as u64;
        let mut opcode = [
            Opcode::Getattr,
            Opcode::Write,
            Opcode::Mkdir,
            Opcode::Lookup,
            Opcode::Create,
            Opcode::Open,
            Opcode::Readdirplus,
            Opcode::Release,
            Opcode::Forget,
        ][net.rng.below(9)];
        let handle = self.open.iter().nth(net.rng.below(1 + self.open.len())).copied();
        match (opcode, handle) {
            (Opcode::Release, Some(fh)) => {
                self.open.remove(&fh);
                body.extend_from_slice(&fh.to_le_bytes());
            }
            (Opcode::Forget, _) if !self.held.is_empty() => self.give_back(&mut body, net),
            (Opcode::Release | Opcode::Forget, _) => opcode = Opcode::Getattr,
            _ => body.extend_from_slice(&arg.to_le_bytes()),
        }
        self.answers.insert(tag, 0);
        let flight = Flight::new(tag, opcode, body);
        self.lanes[l].park.push_back(flight);
    }

    /// Some of the lookups that it has.
    fn give_back(&mut self, body: &mut Vec<u8>, net: &mut Net) {
        let ids: Vec<u64> = self.held.keys().copied().collect();
        for id in ids {
            let count = self.held[&id];
            if net.rng.one_of(500) {
                continue;
            }
            let n = 1 + net.rng.below(count as usize) as u64;
            match count - n {
                0 => self.held.remove(&id),
                left => self.held.insert(id, left),
            };
            body.extend_from_slice(&id.to_le_bytes());
            body.extend_from_slice(&n.to_le_bytes());
        }
    }

    fn is_open(&self, l: usize) -> bool {
        self.links[l % self.links.len()].is_some()
    }

    /// Puts into a batch what is to be sent on that connection.
    fn send(&mut self, c: usize, net: &mut Net) {
        let step = self.links.len();
        let Some(link) = &mut self.links[c] else { return };
        for (l, lane) in self.lanes.iter_mut().enumerate().skip(c).step_by(step) {
            while !link.end.is_due()
                && let Some(at) = lane.again.pop_front()
            {
                let Some((_, flight)) = lane.slots.in_flight().find(|(its, _)| *its == at) else {
                    continue;
                };
                let abandoned = flight.abandoned && !net.is_planted(Plant::AbandonedAreResent);
                if flight.unsure && !flight.abandoned {
                    link.end.push(Kind::Unsure, l as u8, at, 0, &[]);
                }
                link.push(l, at, flight, abandoned);
            }
            if !lane.again.is_empty() {
                continue;
            }
            while let Some(at) = lane.cancels.pop_front() {
                link.end.push(Kind::Cancel, l as u8, at, cancel::INTERRUPT, &[]);
            }
            while !link.end.is_due()
                && lane.slots.has_free()
                && let Some(flight) = lane.park.pop_front()
            {
                if let Ok(at) = lane.slots.claim(flight.clone()) {
                    net.say(|| {
                        format!("guest: {:x} {:?} at {l} {at:?}", flight.tag, flight.opcode)
                    });
                    link.push(l, at, &flight, false);
                }
            }
        }
    }

    fn receive(&mut self, c: usize, net: &mut Net, truth: &Truth) -> Result<(), Fault> {
        let Some(link) = &mut self.links[c] else { return Ok(()) };
        let mut records = std::mem::take(&mut link.early);
        let most = 1 + [20, 400, 4000][net.rng.below(3)];
        let got = link.end.receive(&mut net.pipes[link.pipe], Way::Down, most, &mut records);
        for record in records {
            match Kind::from_u8(record.header.kind) {
                Some(Kind::Reply) => self.take(&record, net, truth)?,
                Some(Kind::Ping) => {
                    if let Some(link) = &mut self.links[c] {
                        link.end.tell(Kind::Pong, 0, &[]);
                    }
                }
                Some(Kind::Pong) => {}
                other => return Err(format!("{other:?} from a daemon")),
            }
        }
        match got {
            Ok(_) => Ok(()),
            Err(Over::End | Over::Damaged) => self.cut(c, net),
        }
    }

    /// A connection is gone.
    fn cut(&mut self, c: usize, net: &mut Net) -> Result<(), Fault> {
        let Some(link) = self.links[c].take() else { return Ok(()) };
        net.say(|| format!("guest {:x}: connection {c} is cut", self.id));
        net.close(link.pipe, link.end, Way::Down);
        self.lose(c)
    }

    /// What a cut is for the lanes of a connection: the tasks that are dying get out.
    pub fn lose(&mut self, c: usize) -> Result<(), Fault> {
        let mut out = Vec::new();
        let step = self.links.len();
        for lane in self.lanes.iter_mut().skip(c).step_by(step) {
            lane.again.clear();
            lane.cancels.clear();
            if self.manners.repeats_cancels {
                continue;
            }
            for flight in lane.each() {
                if flight.cancelled && !flight.abandoned {
                    flight.abandoned = true;
                    out.push(flight.tag);
                }
            }
        }
        out.into_iter().try_for_each(|tag| self.answer(tag))
    }

    fn connect(&mut self, net: &mut Net) -> Result<(), Fault> {
        if let Some((conn, sent, mut link)) = self.trying.take() {
            let mut records = VecDeque::new();
            let most = 1 + net.rng.below(200);
            let got = link.end.receive(&mut net.pipes[link.pipe], Way::Down, most, &mut records);
            let Some(record) = records.pop_front() else {
                match got {
                    Ok(_) => self.trying = Some((conn, sent, link)),
                    Err(_) => net.close(link.pipe, link.end, Way::Down),
                }
                return Ok(());
            };
            if record.header.kind != Kind::Welcome as u8 {
                net.close(link.pipe, link.end, Way::Down);
                return Ok(());
            }
            link.early = records;
            let welcome = Welcome::decode(&record.body).map_err(|error| error.to_string())?;
            return self.welcomed(usize::from(conn), sent, welcome, link, net);
        }
        let missing = self.links.iter().position(Option::is_none);
        let Some(conn) = self.retry.or(missing) else { return Ok(()) };
        self.retry = Some(conn);
        self.hellos += 1;
        let mut link = Link { pipe: net.pipe(), end: net.end(), early: VecDeque::new() };
        let hello = Hello {
            versions: (1, 1),
            features: 0,
            ticket: self.ticket,
            epoch_seen: self.epoch,
            lanes: self.lanes.len() as u16,
            conn: conn as u16,
            conns: self.links.len() as u16,
            slots: SLOTS,
            mount_flags: 0,
            cache: Default::default(),
            share: format!("{:x}", self.id),
            subdir: Vec::new(),
            init: None,
            nth: if net.is_old { 0 } else { self.hellos },
        };
        link.end.tell(Kind::Hello, 0, &hello.encode());
        link.end.flush(&mut net.pipes[link.pipe], Way::Up);
        net.calls.push(link.pipe);
        self.trying = Some((conn as u16, self.ticket, link));
        Ok(())
    }

    fn welcomed(
        &mut self,
        c: usize,
        sent: Ticket,
        welcome: Welcome,
        mut link: Link,
        net: &mut Net,
    ) -> Result<(), Fault> {
        self.retry = None;
        let rebuild = welcome.flags & welcome_flag::REBUILD != 0;
        (self.ticket, self.epoch) = (welcome.ticket, welcome.epoch);
        if rebuild && welcome.ticket != sent {
            if !self.may_be_rebuilt {
                return Err(format!("guest {:x} has lost its session for nothing", self.id));
            }
            self.rebuilds += 1;
            for other in 0..self.links.len() {
                self.cut(other, net)?;
            }
            let all = self.lanes.iter_mut().flat_map(Lane::each);
            all.for_each(|flight| flight.unsure = flight.opcode != Opcode::Forget);
        }
        self.resumes += usize::from(welcome.flags & welcome_flag::RESUMED != 0);
        if rebuild && c == 0 {
            self.tell_all(&mut link.end, net);
        }
        let step = self.links.len();
        for lane in self.lanes.iter_mut().skip(c).step_by(step) {
            if welcome.flags == 0 && lane.slots.in_use() > 0 {
                return Err("a new session for one that was".into());
            }
            lane.again = lane.slots.in_flight().map(|(at, _)| at).collect();
            let stands = lane.slots.in_flight().filter(|(_, f)| f.cancelled && !f.abandoned);
            lane.cancels = stands.map(|(at, _)| at).collect();
        }
        self.links[c] = Some(link);
        Ok(())
    }

    /// What the session was, for a daemon that does not know it.
    fn tell_all(&mut self, end: &mut End, net: &Net) {
        let mut body = Vec::new();
        let early = net.is_planted(Plant::ForgetsCountEarly);
        let nodes = if early { &self.held } else { &self.nodes };
        for (&id, &count) in nodes {
            push_restore(&mut body, &Restore::Node { id, count, recipe: b"" });
        }
        for &fh in &self.handles {
            push_restore(&mut body, &Restore::Handle { fh, node: 1, flags: 0, directory: false });
        }
        push_restore(
            &mut body,
            &Restore::End(restore::End {
                nodes: nodes.len() as u64,
                handles: self.handles.len() as u64,
                node_id_max: 1 << 62,
                fh_max: self.handles.last().copied().unwrap_or(0) + 1000 * u64::from(self.asked),
            }),
        );
        end.tell(Kind::Restore, 0, &body);
    }

    /// Interrupts, kills, and waits that take too long.
    fn disturb(&mut self, net: &mut Net) -> Result<(), Fault> {
        let l = net.rng.below(self.lanes.len());
        let is_open = self.is_open(l);
        let (what, which) = (net.rng.below(8), net.rng.below(usize::from(SLOTS)));
        let live = self.manners.abandons_live && is_open && self.lanes[l].again.is_empty();
        let mut out = Vec::new();
        let lane = &mut self.lanes[l];
        match what {
            0..3 if is_open => {
                // A dying task: its request is in flight, and stays.
                let mut hit = None;
                if let Some(flight) = lane.each().nth(which)
                    && flight.is_waited_for()
                    && !flight.cancelled
                    && !flight.abandoned
                {
                    flight.cancelled = true;
                    hit = Some(flight.tag);
                }
                let hit = lane.slots.in_flight().find(|(_, f)| Some(f.tag) == hit);
                lane.cancels.extend(hit.map(|(at, _)| at));
            }
            3 => {
                // It had not been sent.
                let at = lane.park.iter().position(Flight::is_waited_for);
                out.extend(at.and_then(|at| lane.park.remove(at)).map(|flight| flight.tag));
            }
            4..6 if !is_open => out.extend(lane.each().nth(which).and_then(Flight::abandon)),
            6 if !is_open => {
                out.extend(lane.each().filter_map(Flight::abandon));
                let park = std::mem::take(&mut lane.park);
                let (gone, stay): (VecDeque<_>, _) =
                    park.into_iter().partition(Flight::is_waited_for);
                lane.park = stay;
                out.extend(gone.iter().map(|flight| flight.tag));
            }
            7 if live => {
                let tag = lane.each().nth(which).and_then(Flight::abandon);
                let hit = lane.slots.in_flight().find(|(_, f)| Some(f.tag) == tag);
                let c = l % self.links.len();
                if let (Some((at, _)), Some(link)) = (hit, &mut self.links[c]) {
                    link.end.push(Kind::Cancel, l as u8, at, cancel::ABANDON, &[]);
                }
                out.extend(tag);
            }
            _ => {}
        }
        out.into_iter().try_for_each(|tag| self.answer(tag))
    }

    /// A reply: for the kernel, or for the slot alone.
    fn take(&mut self, record: &Record, net: &mut Net, truth: &Truth) -> Result<(), Fault> {
        let (l, at, errno) = (usize::from(record.header.lane), record.at(), record.header.code);
        let lane = self.lanes.get_mut(l).ok_or("a lane that is not")?;
        let flight = lane.slots.complete(at).map_err(|error| error.to_string())?;
        lane.cancels.retain(|other| *other != at);
        net.say(|| format!("guest: {:x} {:?} {errno}", flight.tag, flight.opcode));
        let Flight { tag, opcode, ref body, abandoned, cancelled, .. } = flight;
        let given = match errno {
            0 => Given::by(opcode as u32, &record.body),
            _ => Given::default(),
        };
        if abandoned {
            if errno == 0 && !self.manners.abandons_live {
                return Err(format!("{tag:x} was abandoned, and has a reply"));
            }
            return self.take_for_nobody(l, &given);
        }
        self.answer(tag)?;
        let runs = truth.runs_of(tag);
        match errno {
            0 if !opcode.may_rerun() && runs == 0 => {
                return Err(format!("{tag:x} is said to be done"));
            }
            0 if !flight.is_answered_by(&record.body) => {
                return Err(format!("{tag:x} has another's reply"));
            }
            EINTR if !cancelled => return Err(format!("{tag:x} was interrupted by nobody")),
            EIO if !flight.unsure => return Err(format!("{tag:x} was not sent before")),
            EEXIST if runs < 2 => return Err(format!("{tag:x} ran twice")),
            0 | EINTR | EIO | EEXIST => {}
            other => return Err(format!("{tag:x} has error {other}")),
        }
        self.gain(&given);
        for id in &given.nodes {
            *self.held.entry(*id).or_default() += 1;
        }
        self.open.extend(given.handle);
        if opcode == Opcode::Forget {
            for n in 0..body.len() / 16 {
                let (id, count) = (word(body, 1 + 2 * n), word(body, 2 + 2 * n));
                match self.nodes.get_mut(&id) {
                    Some(left) if *left > count => *left -= count,
                    _ => drop(self.nodes.remove(&id)),
                }
            }
        }
        if opcode == Opcode::Release {
            self.handles.remove(&word(body, 1));
        }
        Ok(())
    }

    fn gain(&mut self, given: &Given) {
        for id in &given.nodes {
            *self.nodes.entry(*id).or_default() += 1;
        }
        self.handles.extend(given.handle);
    }

    /// An ABANDON came too late: what the reply gave is given back from here.
    fn take_for_nobody(&mut self, l: usize, given: &Given) -> Result<(), Fault> {
        self.gain(given);
        let mut ids = Vec::new();
        for id in &given.nodes {
            ids.extend_from_slice(&id.to_le_bytes());
            ids.extend_from_slice(&1u64.to_le_bytes());
        }
        let forget = (!ids.is_empty()).then_some((Opcode::Forget, ids));
        let handle = given.handle.map(|fh| (Opcode::Release, fh.to_le_bytes().to_vec()));
        for (opcode, args) in forget.into_iter().chain(handle) {
            self.asked += 1;
            let tag = u64::from(self.id) << 32 | u64::from(self.asked);
            self.answers.insert(tag, 0);
            let body = [&tag.to_le_bytes()[..], &args].concat();
            let flight = Flight::new(tag, opcode, body);
            self.lanes[l].park.push_back(flight);
        }
        Ok(())
    }
}

impl Lane {
    /// All that is in flight, to be changed.
    fn each(&mut self) -> impl Iterator<Item = &mut Flight> {
        self.slots.in_flight_mut().map(|(_, flight)| flight)
    }
}

impl Flight {
    fn new(tag: u64, opcode: Opcode, body: Vec<u8>) -> Flight {
        Flight { tag, opcode, body, abandoned: false, cancelled: false, unsure: false }
    }

    /// Whether a task waits for it, so that it can be killed.
    fn is_waited_for(&self) -> bool {
        !matches!(self.opcode, Opcode::Forget | Opcode::Release)
    }

    /// Answered here; its tag, if somebody waits for that.
    fn abandon(&mut self) -> Option<u64> {
        let may = self.is_waited_for() && !self.abandoned;
        self.abandoned |= may;
        may.then_some(self.tag)
    }

    fn is_answered_by(&self, body: &[u8]) -> bool {
        let entry = |body| abi::EntryOut::read_from_prefix(body).map(|(e, _)| e.attr.ino).ok();
        let opened = |body: &[u8]| {
            let open = abi::OpenOut::read_from_bytes(body).ok()?;
            Some(open.open_flags == self.tag as u32)
        };
        match self.opcode {
            Opcode::Getattr | Opcode::Write => body == self.tag.to_le_bytes(),
            Opcode::Mkdir | Opcode::Lookup => entry(body) == Some(self.tag),
            Opcode::Create => {
                entry(body) == Some(self.tag)
                    && opened(&body[size_of::<abi::EntryOut>()..]) == Some(true)
            }
            Opcode::Open => opened(body) == Some(true),
            Opcode::Readdirplus => body.is_empty() || entry(body) == Some(self.tag),
            _ => body.is_empty(),
        }
    }
}

impl Link {
    fn push(&mut self, l: usize, at: SlotUse, flight: &Flight, abandoned: bool) {
        let (kind, code, body) = match flight.opcode {
            _ if abandoned => (Kind::Cancel, cancel::ABANDON, &[][..]),
            Opcode::Forget => (Kind::Forget, 0, &flight.body[..]),
            opcode => (Kind::Request, opcode as u32, &flight.body[..]),
        };
        self.end.push(kind, l as u8, at, code, body);
    }
}
