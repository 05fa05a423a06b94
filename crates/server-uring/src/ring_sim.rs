//! [`Ring`] without a kernel's freedom: one thread, one seed, one history.
//!
//! Operations end late, in any order, in parts, and with errors, as the seed says. Between them a
//! closure, the world, moves the other ends of the sockets. File operations are real ones, done at
//! the moment at which they end; sockets are real pairs, used without waiting, and what a pair
//! holds depends on nothing but what was done to it. For tests only.

use crate::op::{Io, Op};
use crate::ring::{IoResult, Ring};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

/// A small generator whose whole state is the seed (xorshift64*).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Any seed will do.
    pub fn new(seed: u64) -> Rng {
        // Neighbouring seeds shall not begin alike; zero would stay zero.
        Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }

    /// True `per_mille` times in a thousand.
    pub fn one_of(&mut self, per_mille: usize) -> bool {
        self.below(1000) < per_mille
    }
}

/// How often what goes wrong, in parts of a thousand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// A transfer moves only a part.
    pub short: usize,
    /// EINTR or EAGAIN.
    pub again: usize,
    /// A file operation fails with EIO and has done nothing.
    pub io_error: usize,
    /// A socket operation fails with ECONNRESET.
    pub reset: usize,
    /// The ring has no room for an operation.
    pub full: usize,
    /// Ticks that an operation takes at most.
    pub delay: usize,
}

/// Ticks without any completion after which a wait for one is called a deadlock.
const PATIENCE_TICKS: u64 = 200_000;

/// The simulated ring.
pub struct SimRing<W: FnMut(&mut Rng)> {
    rng: Rng,
    faults: Faults,
    tick: u64,
    flying: Vec<(u64, Op)>,
    done: Vec<(Op, IoResult)>,
    world: W,
}

impl<W: FnMut(&mut Rng)> SimRing<W> {
    /// `world` is called at every tick.
    pub fn new(seed: u64, faults: Faults, world: W) -> SimRing<W> {
        let (flying, done) = (Vec::new(), Vec::new());
        SimRing { rng: Rng::new(seed), faults, tick: 0, flying, done, world }
    }

    fn tick(&mut self) {
        self.tick += 1;
        (self.world)(&mut self.rng);
        let flying = std::mem::take(&mut self.flying);
        for (due, mut op) in flying {
            let result = if due > self.tick { None } else { self.attempt(&mut op) };
            match result {
                Some(result) => self.done.push((op, result)),
                None => self.flying.push((due, op)),
            }
        }
        for i in (1..self.done.len()).rev() {
            let other = self.rng.below(i + 1);
            self.done.swap(i, other);
        }
    }

    /// `None`: it has to wait.
    fn attempt(&mut self, op: &mut Op) -> Option<IoResult> {
        if !matches!(op.io, Io::Wake { .. }) && self.rng.one_of(self.faults.again) {
            return Some(Err([Errno::INTR, Errno::AGAIN][self.rng.below(2)]));
        }
        let result = match &mut op.io {
            Io::Recv { socket, buf, range } => {
                let len = self.part(range.len());
                let room = &mut buf[range.start..range.start + len];
                let received = rustix::net::recv(socket.as_fd(), room, RecvFlags::DONTWAIT);
                self.or_reset(received.map(|(n, _)| n))
            }
            Io::Send { socket, buf, range } => {
                let len = self.part(range.len());
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                let bytes = &buf[range.start..range.start + len];
                self.or_reset(rustix::net::send(socket.as_fd(), bytes, flags))
            }
            Io::Room { socket } => {
                let mut fds = [PollFd::new(&*socket, PollFlags::OUT)];
                let now = Timespec { tv_sec: 0, tv_nsec: 0 };
                match poll(&mut fds, Some(&now)) {
                    Ok(1) => Ok(0),
                    _ => Err(Errno::AGAIN),
                }
            }
            Io::Wake { event, count } => {
                let mut fds = [PollFd::new(&*event, PollFlags::IN)];
                let now = Timespec { tv_sec: 0, tv_nsec: 0 };
                match poll(&mut fds, Some(&now)) {
                    Ok(1) => rustix::io::read(event.as_fd(), &mut count[..]),
                    _ => Err(Errno::AGAIN),
                }
            }
            _ if self.rng.one_of(self.faults.io_error) => Err(Errno::IO),
            Io::Read { file, buf, range, offset } => {
                let len = self.part(range.len());
                let room = &mut buf[range.start..range.start + len];
                rustix::io::pread(file.as_fd(), room, *offset)
            }
            Io::Write { file, buf, range, offset } => {
                let len = self.part(range.len());
                let bytes = &buf[range.start..range.start + len];
                rustix::io::pwrite(file.as_fd(), bytes, *offset)
            }
            Io::Fsync { .. } => Ok(0),
        };
        match result {
            Err(Errno::AGAIN) => None,
            result => Some(result),
        }
    }

    fn part(&mut self, len: usize) -> usize {
        if len > 1 && self.rng.one_of(self.faults.short) { 1 + self.rng.below(len) } else { len }
    }

    fn or_reset(&mut self, result: IoResult) -> IoResult {
        if result.is_ok() && self.rng.one_of(self.faults.reset) {
            return Err(Errno::CONNRESET);
        }
        result
    }
}

impl<W: FnMut(&mut Rng)> Ring for SimRing<W> {
    fn submit(&mut self, op: Op) -> Result<(), Op> {
        if self.rng.one_of(self.faults.full) {
            return Err(op);
        }
        let due = self.tick + self.rng.below(self.faults.delay + 1) as u64;
        self.flying.push((due, op));
        Ok(())
    }

    fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.tick();
        let last = self.tick + PATIENCE_TICKS;
        while timeout.is_none() && self.done.is_empty() {
            if self.tick > last {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "nothing will ever happen"));
            }
            self.tick();
        }
        Ok(())
    }

    fn peek(&mut self) -> io::Result<bool> {
        self.enter(Some(Duration::ZERO))?;
        Ok(!self.done.is_empty())
    }

    fn reap(&mut self, done: &mut Vec<(Op, IoResult)>) {
        done.append(&mut self.done);
    }

    fn in_flight(&self) -> usize {
        self.flying.len() + self.done.len()
    }

    fn takes_all(&self) -> bool {
        true
    }
}
