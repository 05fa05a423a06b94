//! A client's end of the keeper's socket (keeper.rs), and the signals that it gets.
//!
//! Invariant: where the service manager has what the next keeper needs (fd_store.rs), a client
//! does not outlive its keeper, whatever it is at: it dies as by a kill, which the next one goes on
//! from. To unmount then would be to lose what is kept.

use crate::keeper::{Channel, Message, SHORT_OF_FDS};
use crate::mount_cmd::{Failure, system};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::process::{Signal, getpid, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How far apart keeper and client may get one signal that was sent to both.
const SAME_LIMIT: Duration = Duration::from_secs(1);

/// What the keeper wants of a client.
#[derive(Debug)]
pub struct Service {
    channel: Channel,
    /// Another client has died.
    pub is_takeover: bool,
    /// Somebody waits for the keeper's end.
    is_foreground: bool,
    /// The service manager has the fds too.
    pub is_stored: bool,
    /// The keeper is there.
    is_kept: bool,
    /// The pipe that tells whether keeper or client are there, once it has come.
    pub alive: Option<[OwnedFd; 2]>,
    signals: UnixStream,
    /// Signals that are to be heeded.
    pending: u32,
    /// Who got the last one, and when, if the other one may get the same.
    last: Option<(Whose, Instant)>,
    /// The keeper's, but for those that it has been told to take back.
    of_keeper: u32,
}

/// Who got a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Ours,
    Keepers,
}

/// What a client goes on with.
#[derive(Debug)]
pub struct HandedOver {
    /// Where it was mounted.
    pub mountpoint: OsString,
    /// The file that was left, and the devices.
    pub fds: Vec<OwnedFd>,
}

/// Signals as bytes to read.
pub fn catch_signals(signals: &[i32]) -> io::Result<UnixStream> {
    let (receiver, sender) = UnixStream::pair()?;
    for &signal in signals {
        signal_hook::low_level::pipe::register(signal, sender.try_clone()?)?;
    }
    receiver.set_nonblocking(true)?;
    Ok(receiver)
}

impl Service {
    /// Of the keeper at the other end of standard input.
    pub fn inherited(is_takeover: bool, is_foreground: bool) -> io::Result<Service> {
        Ok(Service {
            channel: Channel::inherited()?,
            is_takeover,
            is_foreground,
            is_stored: false,
            is_kept: true,
            alive: None,
            signals: catch_signals(&[SIGINT, SIGTERM, SIGHUP])?,
            pending: 0,
            last: None,
            of_keeper: 0,
        })
    }

    /// Waits for what the client before has left.
    pub fn take_over(&mut self) -> Result<HandedOver, Failure> {
        let message = self.channel.receive(RecvFlags::empty());
        let Message { bytes, fds, .. } =
            message.map_err(|errno| system("hear the keeper")(errno.into()))?;
        self.is_stored = bytes.get(1) == Some(&1);
        let mountpoint = OsString::from_vec(bytes.get(2..).unwrap_or_default().to_vec());
        Ok(HandedOver { mountpoint, fds })
    }

    /// It is mounted there.
    pub fn tell_mounted(&self, as_what: Option<(u32, u32)>, path: &OsStr) -> Result<(), Failure> {
        self.told(self.channel.tell_mounted(as_what, path))
    }

    /// The mount serves, and these take it over; or why nobody can.
    pub fn tell_ready(&self, heirs: Result<&[BorrowedFd<'_>], &str>) -> Result<(), Failure> {
        self.told(match heirs {
            Ok(fds) => self.channel.tell_ready(fds),
            Err(why) => self.channel.tell_alone(why),
        })
    }

    fn told(&self, told: Result<(), Errno>) -> Result<(), Failure> {
        if told.is_err() {
            self.leave_to_next();
        }
        told.map_err(|errno| system("tell the keeper")(errno.into()))
    }

    /// What a sleep has to be ended by.
    pub fn events(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let keeper = self.is_kept.then(|| self.channel.as_fd());
        std::iter::once(self.signals.as_fd()).chain(keeper)
    }

    /// Whether the mount is to end.
    pub fn is_asked(&self) -> bool {
        self.pending > 0 || self.is_forsaken()
    }

    /// Signals that nobody has heeded.
    pub fn take_signals(&mut self) -> u32 {
        std::mem::take(&mut self.pending)
    }

    /// The keeper is gone, and whoever waited for it takes the mount for ended.
    pub fn is_forsaken(&self) -> bool {
        self.is_foreground && !self.is_kept
    }

    /// The unmount has failed: the next client is not to try it for the signals that came so far.
    pub fn tell_failed(&mut self) {
        self.last = None;
        if self.is_kept {
            // Its death is heard of.
            let _ = self.channel.tell_failed(std::mem::take(&mut self.of_keeper));
        }
    }

    /// One signal to both is one.
    fn note_signal(&mut self, whose: Whose) {
        self.of_keeper += u32::from(whose == Whose::Keepers);
        let is_same = |(other, at): (Whose, Instant)| other != whose && at.elapsed() < SAME_LIMIT;
        let is_same = self.last.is_some_and(is_same);
        self.last = (!is_same).then(|| (whose, Instant::now()));
        self.pending += u32::from(!is_same);
    }

    /// Takes what has come; `Some`: why nobody takes over from now on.
    pub fn hear(&mut self) -> Option<&'static str> {
        if (&self.signals).read(&mut [0; 16]).is_ok_and(|n| n > 0) {
            self.note_signal(Whose::Ours);
        }
        let mut why_alone = None;
        while self.is_kept {
            match self.channel.receive(RecvFlags::DONTWAIT) {
                Ok(message) => match message.bytes.first() {
                    Some(b'S') => self.note_signal(Whose::Keepers),
                    Some(b'K') => self.is_stored = true,
                    Some(b'A') => why_alone = Some(SHORT_OF_FDS),
                    Some(b'L') => self.alive = message.fds.try_into().ok(),
                    _ => {}
                },
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(_) => {
                    self.leave_to_next();
                    self.is_kept = false;
                    let why = "the keeper was killed";
                    match self.is_foreground {
                        true => tracing::error!("{why}: the mount ends"),
                        false => {
                            tracing::error!("{why}: if this client dies too, the mount is dead");
                        }
                    }
                    return Some(why);
                }
            }
        }
        why_alone
    }

    /// The keeper is gone. If the service manager starts another one, nobody else may be there.
    fn leave_to_next(&self) {
        if self.is_stored {
            tracing::warn!("the keeper was killed: the service manager starts the next one");
            // It cannot fail, and does not return.
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }
}
