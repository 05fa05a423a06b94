//! The two sockets of one proxied connection, and how its two pumps are woken and ended.
//!
//! Invariant: the sockets are closed when both pumps have let go, so that bytes which they left
//! unread show to the peer as ECONNRESET; a shutdown before shows as EOF. No wait here is without
//! the link's wake-up beside it.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// One connection of a guest, and ours to the daemon for it.
#[derive(Debug)]
pub struct Link {
    /// Its number, in the order of accepts.
    pub conn: u64,
    /// To the guest.
    pub guest: UnixStream,
    /// To the daemon.
    pub daemon: UnixStream,
    dead: AtomicBool,
    /// The guest is left in silence: it believes the connection to live.
    muted: AtomicBool,
    /// Dropped when the pumps are to stop, which the other end shows to both.
    waker: Mutex<Option<UnixStream>>,
    woken: UnixStream,
    /// The same, for whoever holds a silent end.
    end_waker: Mutex<Option<UnixStream>>,
    ended: UnixStream,
}

impl Link {
    /// A link of those two, both made non-blocking.
    pub fn new(conn: u64, guest: UnixStream, daemon: UnixStream) -> io::Result<Self> {
        guest.set_nonblocking(true)?;
        daemon.set_nonblocking(true)?;
        let (waker, woken) = UnixStream::pair()?;
        let (end_waker, ended) = UnixStream::pair()?;
        let (waker, end_waker) = (Mutex::new(Some(waker)), Mutex::new(Some(end_waker)));
        let (dead, muted) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self { conn, guest, daemon, dead, muted, waker, woken, end_waker, ended })
    }

    /// Tells both pumps to stop, and leaves the sockets as they are.
    pub fn stop(&self) {
        self.dead.store(true, Relaxed);
        drop(self.waker.lock().map(|mut waker| waker.take()));
    }

    /// Whether the pumps were told to stop.
    pub fn stopped(&self) -> bool {
        self.dead.load(Relaxed)
    }

    /// Says whether the guest is left in silence.
    pub fn mute(&self, muted: bool) {
        self.muted.store(muted, Relaxed);
    }

    /// Whether the guest has reason to believe that the connection lives.
    pub fn seems_live(&self) -> bool {
        !self.stopped() || self.muted.load(Relaxed)
    }

    /// Both ends see EOF.
    pub fn cut(&self) {
        self.stop();
        // Who has gone already needs no EOF.
        let _ = self.guest.shutdown(Shutdown::Both);
        let _ = self.daemon.shutdown(Shutdown::Both);
    }

    /// The same, and a silent end is held no longer.
    pub fn end(&self) {
        self.cut();
        drop(self.end_waker.lock().map(|mut waker| waker.take()));
    }

    /// Waits for `time`; false when the link was stopped.
    pub fn pause(&self, time: Duration) -> bool {
        let mut fds = [PollFd::new(&self.woken, PollFlags::IN)];
        wait(&mut fds, Some(time));
        !self.stopped()
    }

    /// Waits until `side` has something to read, at most for `limit`; false when it has not.
    pub fn readable(&self, side: &UnixStream, limit: Option<Duration>) -> bool {
        let mut fds = [PollFd::new(side, PollFlags::IN), PollFd::new(&self.woken, PollFlags::IN)];
        wait(&mut fds, limit);
        !fds[0].revents().is_empty()
    }

    /// Waits a moment until at least one side has bytes that nobody will read.
    pub fn wait_unread(&self, limit: Duration) {
        let sides = [&self.guest, &self.daemon]
            .map(|side| PollFd::from_borrowed_fd(side.as_fd(), PollFlags::IN));
        let mut fds = sides;
        wait(&mut fds, Some(limit));
    }

    /// Writes it all; an error when the link was stopped or the peer has gone.
    pub fn send(&self, mut side: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.stopped() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            match side.write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [
                        PollFd::new(side, PollFlags::OUT),
                        PollFd::new(&self.woken, PollFlags::IN),
                    ];
                    wait(&mut fds, None);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Keeps one side open and silent until its peer closes it; true then, false when the run ends
    /// before. With `drain` what the peer sends is read and dropped.
    pub fn hold(&self, mut side: &UnixStream, drain: bool) -> bool {
        let mut sink = vec![0; 64 << 10];
        loop {
            let events = if drain { PollFlags::IN } else { PollFlags::empty() };
            let mut fds = [PollFd::new(side, events), PollFd::new(&self.ended, PollFlags::IN)];
            wait(&mut fds, None);
            if !fds[1].revents().is_empty() {
                return false;
            }
            if fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
                return true;
            }
            match side.read(&mut sink) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return true,
            }
        }
    }
}

/// Waits for one of them; `None` is for ever.
fn wait(fds: &mut [PollFd<'_>], limit: Option<Duration>) {
    let limit = limit.map(|limit| Timespec {
        tv_sec: limit.as_secs() as i64,
        tv_nsec: limit.subsec_nanos().into(),
    });
    while poll(fds, limit.as_ref()) == Err(Errno::INTR) {}
}
