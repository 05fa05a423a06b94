//! The thread of a lane: frames from the device to the connection, replies back.
//!
//! One thread for both directions, so that a request wakes each end once. Invariant: the thread
//! sleeps only when the device and the connection have nothing, and never in a send alone: while
//! the daemon takes no more, its replies are taken, or both ends could wait for each other for
//! ever. Without a connection it goes on: frames go to the park, and a kick brings the next one.

use crate::batcher::{Step, View, next_step};
use crate::conn::{Conn, ConnRx, coarse_now};
use crate::down;
use crate::heart::{Beat, Heard, Heart, IDLE_PING_AFTER};
use crate::lane::{Control, Lane, LaneCounters, PARK_BYTES_MAX, PARK_FRAMES_MAX};
use crate::lift::Lift;
use crate::session::{End, Session};
use crate::up::{FORGETS_WAITING_MAX, Intake};
use fuser_fork::device::ReadOutcome;
use ringfs_wire::deframe::Deframer;
use ringfs_wire::limits::{BATCH_TARGET_BYTES, FORGETS_PER_RECORD_MAX, RECORD_BYTES_MAX};
use ringfs_wire::spin::{Look, Spin};
use rustix::event::epoll;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::thread::sched_yield;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

const DEVICE: u64 = 0;
const KICK: u64 = 1;
const SOCKET: u64 = 2;

/// With so many frames in one batch there is work for a second lane. With fewer, it takes the CPU
/// from those who ask, and makes batches smaller.
const FRAMES_FOR_TWO: usize = 8;

/// A batch that the daemon takes nothing of for so long, while it says nothing, is stuck for good.
/// A disk that is slow under large writes is no such thing.
const STUCK_AFTER: Duration = IDLE_PING_AFTER;

/// A connection, as its lane's thread holds it.
pub struct Link {
    /// What others share.
    pub conn: Arc<Conn>,
    /// The receiving half.
    pub half: ConnRx,
    /// Whether the peer is still there.
    pub heart: Heart,
    /// What came since the heart was asked.
    pub heard: Heard,
}

impl Link {
    /// The connection that the lane is to have, if there is one that it does not have yet. It
    /// receives where the one before did.
    pub fn take(session: &Session, lane: &Lane, before: &mut Option<Deframer>) -> Option<Link> {
        let (conn, mut half) = session.resume.take(lane.index)?;
        if let Some(before) = before.take() {
            half.deframer = half.deframer.within(before);
        }
        Some(Link { conn, half, heart: Heart::new(coarse_now()), heard: Heard::default() })
    }
}

/// How long a sleep may take.
pub enum Rest {
    /// There is something to do first.
    None,
    /// At most so long.
    For(Option<Duration>),
}

/// The state of one lane's thread.
struct Pump<'s> {
    session: &'s Session,
    lane: &'s Lane,
    /// `None` while it is cut.
    link: Option<Link>,
    /// A large reply on its way.
    lift: Lift,
    /// What the connection before has received into.
    before: Option<Deframer>,
    intake: Intake<'s>,
    /// The kick and the connection.
    few: OwnedFd,
    /// These, and the device.
    all: OwnedFd,
    spin: Spin,
    dry: bool,
    /// Frames read since the last batch left.
    frames: usize,
    /// Interrupts of what waits here may lie in the device.
    is_deaf: bool,
}

/// Serves the lane until the mount is gone or the session stops.
pub fn run(session: &Arc<Session>, lane: usize, spin: u32) {
    session.watch.wake();
    let done = Pump::new(session, lane, spin).and_then(|mut pump| pump.serve());
    if !session.watch.sleep() {
        session.watch.call_help(&session.lanes);
    }
    if let Err(end) = done {
        session.end(end);
    }
}

impl<'s> Pump<'s> {
    fn new(session: &'s Session, lane: usize, spin: u32) -> Result<Pump<'s>, End> {
        let lane = &session.lanes[lane];
        let watch = || -> io::Result<OwnedFd> {
            let fd = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            let kick = epoll::EventData::new_u64(KICK);
            epoll::add(&fd, lane.kick_fd(), kick, epoll::EventFlags::IN)?;
            Ok(fd)
        };
        let (few, all) = (watch().map_err(End::Thread)?, watch().map_err(End::Thread)?);
        // One sleeping lane is woken for a frame, not all of them.
        let device_events = epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE;
        epoll::add(&all, &*lane.device, epoll::EventData::new_u64(DEVICE), device_events)
            .map_err(|errno| End::Thread(errno.into()))?;
        let mut inherited = lane.take_inherited();
        let frames = std::mem::take(&mut inherited.frames);
        let mut intake = Intake::new(session, lane, inherited);
        for frame in frames {
            intake.take_old_frame(&frame)?;
        }
        Ok(Pump {
            session,
            lane,
            link: None,
            lift: Lift::default(),
            before: None,
            intake,
            few,
            all,
            spin: Spin::new(spin),
            dry: false,
            frames: 0,
            is_deaf: false,
        })
    }

    fn serve(&mut self) -> Result<(), End> {
        self.take_link()?;
        while !self.session.is_stopping() {
            if self.lane.take_kick() {
                self.intake.kicked();
                if self.link.is_none() {
                    self.take_link()?;
                }
            }
            match next_step(self.view()) {
                Step::Backlog => self.intake.put_backlog(),
                Step::Read => drop(self.read()?),
                Step::Send => self.send(),
                Step::Wait => self.wait()?,
                Step::WaitForSlot => self.wait_for_slot()?,
            }
        }
        Ok(())
    }

    /// Takes the next connection, if it is there.
    fn take_link(&mut self) -> Result<(), End> {
        let Some(link) = Link::take(self.session, self.lane, &mut self.before) else {
            return Ok(());
        };
        for fd in [&self.few, &self.all] {
            let socket = epoll::EventData::new_u64(SOCKET);
            let added = epoll::add(fd, link.conn.socket(), socket, epoll::EventFlags::IN);
            added.map_err(|errno| End::Thread(errno.into()))?;
        }
        self.link = Some(link);
        self.intake.resume();
        // What came behind the WELCOME.
        self.take_batches();
        Ok(())
    }

    fn view(&self) -> View {
        let intake = &self.intake;
        let forgets_due = self.dry || intake.forgets.len() >= FORGETS_PER_RECORD_MAX;
        let has_forgets = !intake.forgets.is_empty() || !self.session.forgets.is_empty();
        View {
            batch_due: intake.builder.is_due(),
            batch_empty: intake.builder.is_empty(),
            backlog: intake.look || has_forgets && !intake.forgets_blocked && forgets_due,
            dry: self.dry,
            park_full: self.is_park_full(),
        }
    }

    fn is_park_full(&self) -> bool {
        if self.intake.forgets.len() >= FORGETS_WAITING_MAX {
            return true;
        }
        if !self.intake.has_parked {
            return false;
        }
        let (frames, bytes) = self.lane.parked();
        frames >= PARK_FRAMES_MAX || bytes >= PARK_BYTES_MAX
    }

    /// Reads a frame; whether there was one.
    fn read(&mut self) -> Result<bool, End> {
        self.set_deaf(false);
        // A batch that is not due has room for the largest record.
        let spare = &mut self.intake.spare()[..RECORD_BYTES_MAX];
        let outcome = self.lane.device.read_frame(spare)?;
        self.dry = matches!(outcome, ReadOutcome::WouldBlock);
        match outcome {
            ReadOutcome::Frame(bytes) => {
                self.frames += 1;
                self.intake.take_frame(bytes)?;
            }
            ReadOutcome::WouldBlock | ReadOutcome::Interrupted => {}
            ReadOutcome::Unmounted => return Err(End::Unmounted),
        }
        Ok(!self.dry)
    }

    /// Receives what is there; whether there was something, the connection's end included.
    fn receive(&mut self) -> bool {
        let Some(link) = &mut self.link else { return false };
        let is_due = self.intake.kept.has_large_reads();
        match self.lift.receive(self.lane, &link.conn, &mut link.half, is_due) {
            Ok(0) => self.lose(End::Closed { conn: self.lane.index.into() }),
            Ok(bytes) => {
                link.heard.bytes(bytes);
                let held = link.half.deframer.pending() + self.lift.held();
                let left = self.take_batches();
                // While large replies come on and on, what is asked must not wait for the last one.
                let large = held - left >= BATCH_TARGET_BYTES;
                self.dry &= !large || self.lane.in_flight() == 0;
            }
            Err(Errno::AGAIN | Errno::INTR) => return false,
            Err(errno) => self.lose(End::Lost { conn: self.lane.index.into(), errno }),
        }
        true
    }

    /// Acts on whole batches; how many bytes wait for the rest of theirs.
    fn take_batches(&mut self) -> usize {
        let Some(link) = &mut self.link else { return 0 };
        let kept = &mut self.intake.kept;
        let half = &mut link.half;
        match down::take_batches(self.session, self.lane, &link.conn, half, kept, &mut self.lift) {
            Ok(()) => half.deframer.pending() + self.lift.held(),
            Err(end) => {
                self.lose(end);
                0
            }
        }
    }

    /// The connection is over. The lane goes on: there may be another one, and at the mount's end
    /// it has to answer what the kernel still asks.
    fn lose(&mut self, end: End) {
        let Some(link) = self.link.take() else { return };
        // An error would say that it is not in there.
        let _ = epoll::delete(&self.few, link.conn.socket());
        let _ = epoll::delete(&self.all, link.conn.socket());
        self.lift.discard();
        let unsent = self.intake.cut();
        self.before = Some(link.half.deframer);
        self.session.lost(self.lane, &link.conn, end, &unsent);
    }

    fn send(&mut self) {
        if std::mem::take(&mut self.frames) >= FRAMES_FOR_TWO || self.intake.builder.is_due() {
            self.session.watch.call_help(&self.session.lanes);
        }
        let Some(link) = &self.link else {
            // The session has ended meanwhile, which has answered what is in it.
            return drop(self.intake.cut());
        };
        let conn = Arc::clone(&link.conn);
        let bytes = self.intake.seal(&conn);
        let mut tries = 0;
        let mut stuck_at = None;
        while !self.intake.to_send().is_empty() {
            match conn.try_send(self.intake.to_send()) {
                Ok(n) => {
                    self.intake.has_sent(n);
                    (tries, stuck_at) = (0, None);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if self.receive() {
                        stuck_at = None;
                    } else {
                        self.wait_for_room(&conn, &mut tries, &mut stuck_at);
                    }
                    if self.link.is_none() {
                        return;
                    }
                }
                Err(errno) => {
                    return self.lose(End::Lost { conn: self.lane.index.into(), errno });
                }
            }
        }
        conn.has_sent();
        self.intake.retire();
        LaneCounters::add(&self.lane.counters.batches, 1);
        LaneCounters::add(&self.lane.counters.bytes_up, bytes);
    }

    fn wait_for_room(&mut self, conn: &Conn, tries: &mut u32, stuck_at: &mut Option<Duration>) {
        if *tries < self.spin.tries_max() {
            *tries += 1;
            let before = Instant::now();
            sched_yield();
            if let Some(look) = Look::of_yield(before.elapsed()) {
                self.spin.tried(look);
                *tries = u32::MAX;
            }
            return;
        }
        let now = coarse_now();
        if now - *stuck_at.get_or_insert(now) >= STUCK_AFTER {
            return self.lose(End::Silent { conn: self.lane.index.into() });
        }
        let mut fds = [PollFd::new(conn.socket(), PollFlags::IN | PollFlags::OUT)];
        self.leave_device();
        // Whatever it says, the send is tried again.
        let _ = poll(&mut fds, Some(&timespec(STUCK_AFTER)));
        self.session.watch.wake();
    }

    fn wait(&mut self) -> Result<(), End> {
        let tries = self.spin.tries();
        if tries > 0 {
            let look = self.look(tries)?;
            self.spin.tried(look);
            if look == Look::Found {
                return Ok(());
            }
        }
        let since = self.spin.is_on().then(Instant::now);
        self.sleep()?;
        if let Some(since) = since {
            self.spin.slept(since.elapsed());
        }
        Ok(())
    }

    /// So many looks at both sides, giving the CPU away before each.
    fn look(&mut self, tries: u32) -> Result<Look, End> {
        let mut last = Instant::now();
        for _ in 0..tries {
            sched_yield();
            let now = Instant::now();
            let long = Look::of_yield(now - last);
            last = now;
            if self.expects_bytes() && self.receive() || self.read()? || self.lane.is_kicked() {
                if long == Some(Look::Lost) {
                    // It would have been found long before.
                    self.spin.tried(Look::Lost);
                }
                return Ok(Look::Found);
            }
            if let Some(look) = long {
                return Ok(look);
            }
        }
        Ok(Look::Nothing)
    }

    fn expects_bytes(&self) -> bool {
        let Some(link) = &self.link else { return false };
        self.lift.held() > 0 || link.half.deframer.pending() > 0 || self.lane.in_flight() > 0
    }

    /// Before a sleep: how long it may be.
    fn rest(&mut self) -> Rest {
        let Some(link) = &mut self.link else {
            return Rest::For(self.lane.patience(self.session.resume.soft, coarse_now()));
        };
        let is_expected = self.lane.in_flight() > 0;
        let heard = link.heard.take(link.half.rx.received());
        match link.heart.beat(coarse_now(), heard, is_expected) {
            Beat::Wait(limit) => Rest::For(Some(limit)),
            Beat::Ping => {
                if !is_expected {
                    self.intake.kept.shrink();
                    self.lift.discard();
                    self.session.rest();
                }
                self.lane.queue(Control::Ping);
                Rest::None
            }
            Beat::Dead => {
                self.lose(End::Silent { conn: self.lane.index.into() });
                Rest::None
            }
        }
    }

    fn sleep(&mut self) -> Result<(), End> {
        let Rest::For(limit) = self.rest() else { return Ok(()) };
        self.lane.set_spare(true);
        let some_watch = self.session.watch.sleep();
        let woken = self.doze(!some_watch, limit);
        self.session.watch.wake();
        self.lane.set_spare(false);
        self.act_on(&woken?);
        Ok(())
    }

    /// Sleeps without the device: somebody else has to watch it.
    fn leave_device(&self) {
        if !self.session.watch.sleep() {
            self.session.watch.call_help(&self.session.lanes);
        }
    }

    /// No frame could be taken in: only a reply helps, or a kick. Where all lanes wait so, nobody
    /// reads whose tasks are killed, or that the mount is gone.
    fn wait_for_slot(&mut self) -> Result<(), End> {
        let Rest::For(mut limit) = self.rest() else { return Ok(()) };
        if !self.is_park_full() {
            // What waited too long has failed.
            return Ok(());
        }
        self.leave_device();
        if self.link.is_none() {
            self.set_deaf(true);
            // The device wakes who waits for that with each frame, so it is not among the few.
            let device = PollFd::new(&*self.lane.device, PollFlags::empty());
            let mut fds = [device, PollFd::new(&self.few, PollFlags::IN)];
            let _ = poll(&mut fds, limit.map(timespec).as_ref());
            limit = Some(Duration::ZERO);
        }
        let woken = self.doze(false, limit);
        self.session.watch.wake();
        let woken = woken?;
        self.act_on(&woken);
        if woken.1 == 0 {
            // A daemon that answers makes room soon; one that says nothing for a while may not.
            self.set_deaf(true);
            self.see_mount()?;
        }
        Ok(())
    }

    fn set_deaf(&mut self, is_deaf: bool) {
        if std::mem::replace(&mut self.is_deaf, is_deaf) != is_deaf {
            self.session.interrupts.set_deaf(self.lane.index, is_deaf);
        }
    }

    /// Whether the mount is gone, of which no lane is told that does not read.
    fn see_mount(&self) -> Result<(), End> {
        let mut device = [PollFd::new(&*self.lane.device, PollFlags::empty())];
        let _ = poll(&mut device, Some(&Timespec::default()));
        if device[0].revents().is_empty() { Ok(()) } else { Err(End::Unmounted) }
    }

    /// Waits for the kick and the connection, or the device as well.
    fn doze(&self, with_device: bool, limit: Option<Duration>) -> Result<Woken, End> {
        let empty =
            epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        let mut events = [empty; 3];
        let epoll = if with_device { &self.all } else { &self.few };
        let n = match epoll::wait(epoll, &mut events, limit.map(timespec).as_ref()) {
            Ok(n) => n,
            Err(Errno::INTR) => 0,
            Err(errno) => return Err(End::Thread(errno.into())),
        };
        Ok((events.map(|event| event.data.u64()), n))
    }

    fn act_on(&mut self, (events, n): &Woken) {
        for &event in &events[..*n] {
            match event {
                KICK => {
                    self.lane.drain_kick();
                    // Who calls for help has left something in the device.
                    self.dry = false;
                }
                SOCKET => drop(self.receive()),
                _ => self.dry = false,
            }
        }
    }
}

/// What woke a lane: so many of them.
type Woken = ([u64; 3], usize);

fn timespec(limit: Duration) -> Timespec {
    Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() }
}
