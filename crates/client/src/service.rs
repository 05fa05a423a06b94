//! A client's end of the keeper's socket (keeper.rs), and the signals that it gets.
//!
//! Invariant: where the service manager has what the next keeper needs (fd_store.rs), a client
//! does not outlive its keeper, whatever it is at: it dies as by a kill, which the next one goes on
//! from. To unmount then would be to lose what is kept.

use crate::keeper::{Channel, Message};
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
    /// Signals that have come: to us, and to the keeper. A whole group may have got one.
    signalled: [u32; 2],
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
            signalled: [0; 2],
        })
    }

    /// Waits for what the client before has left.
    pub fn take_over(&mut self) -> Result<HandedOver, Failure> {
        let message = self.channel.receive(RecvFlags::empty());
        let Message { bytes, fds } =
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

    /// Signals so far.
    pub fn signals_seen(&self) -> u32 {
        self.signalled[0].max(self.signalled[1])
    }

    /// Takes what has come; `Some`: why nobody takes over from now on.
    pub fn hear(&mut self) -> Option<&'static str> {
        if (&self.signals).read(&mut [0; 16]).is_ok_and(|n| n > 0) {
            self.signalled[0] += 1;
        }
        while self.is_kept {
            match self.channel.receive(RecvFlags::DONTWAIT) {
                Ok(message) => match message.bytes.first() {
                    Some(b'S') => self.signalled[1] += 1,
                    Some(b'K') => self.is_stored = true,
                    Some(b'L') => self.alive = message.fds.try_into().ok(),
                    _ => {}
                },
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(_) => {
                    self.leave_to_next();
                    self.is_kept = false;
                    let why = "the keeper was killed";
                    tracing::error!("{why}: if this client dies too, the mount is dead");
                    // Whoever waits for its end takes the mount for ended at once.
                    self.signalled[1] += if self.is_foreground { 2 } else { 0 };
                    return Some(why);
                }
            }
        }
        None
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
