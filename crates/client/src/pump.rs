//! The thread of a lane: frames from the device to the connection, replies back.
//!
//! One thread for both directions, so that a request wakes each end once. Invariant: the thread
//! sleeps only when the device and the connection have nothing, and never in a send alone: while
//! the daemon takes no more, its replies are taken, or both ends could wait for each other for
//! ever.

use crate::batcher::{Step, View, next_step};
use crate::down;
use crate::lane::{Lane, LaneCounters, PARK_BYTES_MAX, PARK_FRAMES_MAX};
use crate::session::{Conn, ConnRx, End, Session};
use crate::up::{FORGETS_WAITING_MAX, Intake};
use fuser_fork::device::ReadOutcome;
use ringfs_wire::limits::{BATCH_TARGET_BYTES, FORGETS_PER_RECORD_MAX, RECORD_BYTES_MAX};
use ringfs_wire::spin::{Look, Spin, YIELD_LIMIT};
use rustix::event::epoll;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::thread::sched_yield;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

const DEVICE: u64 = 0;
const KICK: u64 = 1;
const SOCKET: u64 = 2;

/// With so many frames in one batch there is work for a second lane. With fewer, it takes the CPU
/// from those who ask, and makes batches smaller.
const FRAMES_FOR_TWO: usize = 8;

/// The state of one lane's thread.
struct Pump<'s> {
    session: &'s Session,
    lane: &'s Lane,
    conn: &'s Conn,
    half: ConnRx,
    /// The connection may still bring something.
    is_open: bool,
    intake: Intake<'s>,
    /// The kick and the connection.
    few: OwnedFd,
    /// These, and the device.
    all: OwnedFd,
    spin: Spin,
    dry: bool,
    /// Frames read since the last batch left.
    frames: usize,
}

/// Serves the lane until the mount is gone or the session stops.
pub fn run(session: &Arc<Session>, lane: usize, half: ConnRx, spin: u32) {
    session.watch.wake();
    let done =
        Pump::new(session, lane, half, spin).map_err(End::Thread).and_then(|mut pump| pump.serve());
    if !session.watch.sleep() {
        session.watch.call_help(&session.lanes);
    }
    if let Err(end) = done {
        session.end(end);
    }
}

impl<'s> Pump<'s> {
    fn new(session: &'s Session, lane: usize, half: ConnRx, spin: u32) -> io::Result<Pump<'s>> {
        let (lane, conn) = (&session.lanes[lane], &session.conns[lane]);
        let watch = || -> io::Result<OwnedFd> {
            let fd = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            let kick = epoll::EventData::new_u64(KICK);
            epoll::add(&fd, lane.kick_fd(), kick, epoll::EventFlags::IN)?;
            let socket = epoll::EventData::new_u64(SOCKET);
            epoll::add(&fd, conn.socket(), socket, epoll::EventFlags::IN)?;
            Ok(fd)
        };
        let (few, all) = (watch()?, watch()?);
        // One sleeping lane is woken for a frame, not all of them.
        let device_events = epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE;
        epoll::add(&all, &*lane.device, epoll::EventData::new_u64(DEVICE), device_events)?;
        Ok(Pump {
            session,
            lane,
            conn,
            half,
            is_open: true,
            intake: Intake::new(session, lane),
            few,
            all,
            spin: Spin::new(spin),
            dry: false,
            frames: 0,
        })
    }

    fn serve(&mut self) -> Result<(), End> {
        // What came behind the WELCOME.
        self.take_batches();
        while !self.session.is_stopping() {
            if self.lane.take_kick() {
                self.intake.kicked();
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

    fn view(&self) -> View {
        let intake = &self.intake;
        let forgets_due = self.dry || intake.forgets.len() >= FORGETS_PER_RECORD_MAX;
        View {
            batch_due: intake.builder.is_due(),
            batch_empty: intake.builder.is_empty(),
            backlog: intake.look
                || !intake.forgets.is_empty() && !intake.forgets_blocked && forgets_due,
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
        if !self.is_open {
            return false;
        }
        match self.conn.try_receive(self.half.deframer.spare()) {
            Ok(0) => self.lose(End::Closed { conn: self.lane.index.into() }),
            Ok(bytes) => {
                self.half.deframer.filled(bytes);
                let held = self.half.deframer.pending();
                self.take_batches();
                // While large replies come on and on, what is asked must not wait for the last one.
                let large = held - self.half.deframer.pending() >= BATCH_TARGET_BYTES;
                self.dry &= !large || self.lane.in_flight() == 0;
            }
            Err(Errno::AGAIN | Errno::INTR) => return false,
            Err(errno) => self.lose(End::Lost { conn: self.lane.index.into(), errno }),
        }
        true
    }

    fn take_batches(&mut self) {
        if let Err(end) = down::take_batches(self.session, self.lane, self.conn, &mut self.half) {
            self.lose(end);
        }
    }

    /// The connection is over. The lane goes on: it has to answer what the kernel still asks.
    fn lose(&mut self, end: End) {
        if std::mem::replace(&mut self.is_open, false) {
            // An error would say that it is not in there.
            let _ = epoll::delete(&self.few, self.conn.socket());
            let _ = epoll::delete(&self.all, self.conn.socket());
        }
        self.session.end(end);
    }

    fn send(&mut self) {
        if std::mem::take(&mut self.frames) >= FRAMES_FOR_TWO || self.intake.builder.is_due() {
            self.session.watch.call_help(&self.session.lanes);
        }
        let (sending, bytes) = self.intake.seal(self.conn);
        let mut at = 0;
        let mut tries = 0;
        while at < bytes {
            match self.conn.try_send(self.intake.sealed(at..bytes)) {
                Ok(n) => (at, tries) = (at + n, 0),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if self.is_open => {
                    if !self.receive() {
                        self.wait_for_room(&mut tries);
                    }
                }
                Err(errno) => {
                    // What was in the batch has slots, so the end answers it.
                    drop(sending);
                    return self.lose(End::Lost { conn: self.lane.index.into(), errno });
                }
            }
        }
        LaneCounters::add(&self.lane.counters.batches, 1);
        LaneCounters::add(&self.lane.counters.bytes_up, bytes);
    }

    fn wait_for_room(&self, tries: &mut u32) {
        if *tries < self.spin.tries_max() {
            *tries += 1;
            return sched_yield();
        }
        let mut fds = [PollFd::new(self.conn.socket(), PollFlags::IN | PollFlags::OUT)];
        self.leave_device();
        // Whatever it says, the send is tried again.
        let _ = poll(&mut fds, None);
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
            if self.expects_bytes() && self.receive() || self.read()? || self.lane.is_kicked() {
                return Ok(Look::Found);
            }
            let now = Instant::now();
            if now - last > YIELD_LIMIT {
                return Ok(Look::Crowded);
            }
            last = now;
        }
        Ok(Look::Nothing)
    }

    fn expects_bytes(&self) -> bool {
        self.half.deframer.pending() > 0 || self.lane.in_flight() > 0
    }

    fn sleep(&mut self) -> Result<(), End> {
        let empty =
            epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        let mut events = [empty; 3];
        self.lane.set_spare(true);
        let epoll = if self.session.watch.sleep() { &self.few } else { &self.all };
        let woken = epoll::wait(epoll, &mut events, None);
        self.session.watch.wake();
        self.lane.set_spare(false);
        let n = match woken {
            Ok(n) => n,
            Err(Errno::INTR) => 0,
            Err(errno) => return Err(End::Thread(errno.into())),
        };
        for event in &events[..n] {
            match event.data.u64() {
                KICK => self.lane.drain_kick(),
                SOCKET => drop(self.receive()),
                _ => self.dry = false,
            }
        }
        Ok(())
    }

    /// Sleeps without the device: somebody else has to watch it.
    fn leave_device(&self) {
        if !self.session.watch.sleep() {
            self.session.watch.call_help(&self.session.lanes);
        }
    }

    /// No frame could be taken in: only a reply helps.
    fn wait_for_slot(&mut self) -> Result<(), End> {
        let kick = PollFd::from_borrowed_fd(self.lane.kick_fd(), PollFlags::IN);
        let mut fds = [kick, PollFd::new(self.conn.socket(), PollFlags::IN)];
        let fds = if self.is_open { &mut fds[..] } else { &mut fds[..1] };
        self.leave_device();
        let woken = poll(fds, None);
        self.session.watch.wake();
        match woken {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(End::Thread(errno.into())),
        }
        let readable = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let (kicked, received) = (readable(&fds[0]), fds.get(1).is_some_and(readable));
        if kicked {
            self.lane.drain_kick();
        }
        if received {
            self.receive();
        }
        Ok(())
    }
}
