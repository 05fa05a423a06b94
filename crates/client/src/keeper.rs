//! The keeper: a small process that starts the one that serves a mount, holds copies of its fds,
//! and starts another one when it dies; where that cannot be, it cleans up and says so.
//!
//! Between the two is a socket of whole messages, the client's standard input:
//!
//! ```text
//! client -> keeper   M mount_id dev_minor path    mounted: this is to be cleaned up
//!                    R text | fds                 ready; fds: how to take over, none: why not
//! keeper -> client   T path | fds                 take over: the file that was left, and devices
//!                    S                            a signal: unmount
//! ```
//!
//! Invariant: a mount whose client has died is either taken over or unmounted, and whichever it is
//! stands in the log. A client that ends by itself has cleaned up by itself. The keeper must not
//! look at what it holds, nor touch the mount.

use crate::background;
use crate::mount_cmd::catch_signals;
use fuser_fork::mount::unmount_identity;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGKILL, SIGTERM};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Fds of one message: the file and a device a lane, and room.
const FDS_MAX: usize = 16;
const MESSAGE_BYTES_MAX: usize = 4608;
/// Deaths by faults of its own, each this soon after the one before, that are no use to go on from.
const FAULTS_MAX: u32 = 5;
const FAULT_AGE: Duration = Duration::from_secs(10);
/// Kills in a row before a client was ready.
const EARLY_KILLS_MAX: u32 = 100;

/// Why there is nobody to serve a mount.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum KeeperError {
    #[error("cannot {what}")]
    System { what: &'static str, source: io::Error },
    #[error("the client of {path} died ({status}) and nobody can take over ({why}): {done}")]
    Dead { path: String, status: ExitStatus, why: String, done: String, was_ready: bool },
    #[error("the client died before anything was mounted ({0})")]
    Early(ExitStatus),
}

fn system(what: &'static str) -> impl Fn(io::Error) -> KeeperError {
    move |source| KeeperError::System { what, source }
}

/// A message, and the fds that came with it.
pub struct Message {
    /// Its first byte says what it is.
    pub bytes: Vec<u8>,
    /// The fds.
    pub fds: Vec<OwnedFd>,
}

/// One end of the socket.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    fn pair() -> Result<(Channel, OwnedFd), Errno> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Channel(ours), theirs))
    }

    /// The client's end: its standard input.
    pub fn inherited() -> io::Result<Channel> {
        Ok(Channel(io::stdin().as_fd().try_clone_to_owned()?))
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOBIG);
        }
        let flags = SendFlags::NOSIGNAL;
        rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags).map(drop)
    }

    /// The next message, if one is there; an error is the other one's end, if not `EAGAIN`.
    pub fn receive(&self, flags: RecvFlags) -> Result<Message, Errno> {
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        let got =
            rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = message {
                fds.extend(some);
            }
        }
        if got.bytes == 0 {
            return Err(Errno::PIPE);
        }
        bytes.truncate(got.bytes);
        Ok(Message { bytes, fds })
    }

    /// It is mounted.
    pub fn tell_mounted(&self, identity: Option<(u32, u32)>, path: &OsStr) -> Result<(), Errno> {
        let (mount_id, dev_minor) = identity.unwrap_or_default();
        let head = [&b"M"[..], &mount_id.to_ne_bytes(), &dev_minor.to_ne_bytes()].concat();
        self.send(&[&head, path.as_bytes()].concat(), &[])
    }

    /// It is ready, and these take it over.
    pub fn tell_ready(&self, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        self.send(b"R", fds)
    }

    /// It is ready, and cannot be taken over.
    pub fn tell_alone(&self, why: &str) -> Result<(), Errno> {
        self.send(&[b"R", why.as_bytes()].concat(), &[])
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What the keeper knows of the mount.
#[derive(Debug, Default)]
struct Held {
    mounted: Option<(u32, u32, PathBuf)>,
    is_ready: bool,
    fds: Vec<OwnedFd>,
    why: String,
}

impl Held {
    fn hear(&mut self, message: Message) {
        let Some((&kind, rest)) = message.bytes.split_first() else { return };
        match kind {
            b'M' => {
                let Some((numbers, path)) = rest.split_first_chunk::<8>() else { return };
                let [a, b, c, d, e, f, g, h] = *numbers;
                let mount_id = u32::from_ne_bytes([a, b, c, d]);
                let dev_minor = u32::from_ne_bytes([e, f, g, h]);
                self.mounted = Some((mount_id, dev_minor, OsStr::from_bytes(path).into()));
            }
            b'R' => {
                self.is_ready = true;
                self.why = String::from_utf8_lossy(rest).into_owned();
                self.fds = message.fds;
            }
            _ => {}
        }
    }
}

/// Deaths, to tell bad luck from a client that cannot live.
#[derive(Debug, Default)]
struct Deaths {
    faults: u32,
    early: u32,
}

impl Deaths {
    /// Whether to try again after a client that lived so long has died by `signal`.
    fn allow(&mut self, signal: i32, was_ready: bool, lived: Duration) -> bool {
        let is_fault = signal != SIGKILL;
        self.faults = match (is_fault, lived < FAULT_AGE) {
            (true, true) => self.faults + 1,
            (true, false) => 1,
            (false, _) => self.faults,
        };
        self.early = if was_ready { 0 } else { self.early + 1 };
        self.faults <= FAULTS_MAX && self.early <= EARLY_KILLS_MAX
    }
}

/// Starts a client with these arguments, and further ones as they are needed; how the last one
/// ended. `log`: where standard error goes from when the mount is ready.
pub fn run(args: &[OsString], is_background: bool, log: Option<&File>) -> Result<i32, KeeperError> {
    let catch = |signals: &[i32]| catch_signals(signals).map_err(system("catch signals"));
    let (signals, children) = (catch(&[SIGINT, SIGTERM, SIGHUP])?, catch(&[SIGCHLD])?);
    let mut held = Held::default();
    let mut deaths = Deaths::default();
    let (mut signals_sent, mut has_left) = (0, false);
    loop {
        let (channel, theirs) = Channel::pair().map_err(|e| system("make a socket")(e.into()))?;
        let is_takeover = held.is_ready;
        let started = Instant::now();
        let mut child = start(args, theirs, is_takeover)
            .map_err(system("start the client; is /proc mounted?"))?;
        if is_takeover {
            let fds: Vec<_> = held.fds.iter().map(AsFd::as_fd).collect();
            // What it asked for before goes on being asked for.
            let path = held.mounted.as_ref().map_or(&[][..], |its| its.2.as_os_str().as_bytes());
            let told = channel.send(&[b"T", path].concat(), &fds);
            let told =
                told.and_then(|()| (0..signals_sent).try_for_each(|_| channel.send(b"S", &[])));
            if let Err(errno) = told {
                tracing::debug!(%errno, "the client has died already");
            }
        }
        let (mut was_ready, mut hung_up) = (false, false);
        let status = loop {
            let ended = child.try_wait().map_err(system("wait for the client"))?;
            while !hung_up {
                match channel.receive(RecvFlags::DONTWAIT) {
                    Ok(message) => {
                        was_ready |= message.bytes.first() == Some(&b'R');
                        held.hear(message);
                    }
                    Err(Errno::AGAIN | Errno::INTR) => break,
                    Err(_) => hung_up = true,
                }
            }
            if was_ready && !std::mem::replace(&mut has_left, true) {
                leave(is_background, log).map_err(system("leave the terminal"))?;
            }
            if let Some(status) = ended {
                break status;
            }
            let wait = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
            let mut fds = [wait(signals.as_fd()), wait(children.as_fd()), wait(channel.as_fd())];
            // The end of the socket is followed by the child's.
            match poll(&mut fds[..if hung_up { 2 } else { 3 }], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(system("wait")(errno.into())),
            }
            is_signalled(&children);
            if is_signalled(&signals) {
                signals_sent += 1;
                // It may have died; the next one is told.
                let _ = channel.send(b"S", &[]);
            }
        };
        let Some(signal) = status.signal() else { return Ok(status.code().unwrap_or(1)) };
        let Some((mount_id, dev_minor, path)) = &held.mounted else {
            return Err(KeeperError::Early(status));
        };
        let lived = started.elapsed();
        let can_go_on = held.is_ready && !held.fds.is_empty();
        if can_go_on && deaths.allow(signal, was_ready, lived) {
            let path = path.display();
            tracing::error!(%path, %status, "the client died: another one takes the mount over");
            continue;
        }
        let why = match (can_go_on, held.is_ready) {
            (true, _) => "it dies again and again".to_owned(),
            (false, true) => held.why.clone(),
            (false, false) => "it was not ready yet".to_owned(),
        };
        let done = match unmount_identity(path, (*mount_id, *dev_minor)) {
            Ok(()) => "it is unmounted, and what was in flight has failed".to_owned(),
            Err(error) => format!("it stays behind, dead: {error}"),
        };
        let (path, was_ready) = (path.display().to_string(), held.is_ready);
        return Err(KeeperError::Dead { path, status, why, done, was_ready });
    }
}

fn start(args: &[OsString], channel: OwnedFd, is_takeover: bool) -> io::Result<Child> {
    // The same program, also after an upgrade: what it reads another version may not have written.
    let mut command = Command::new("/proc/self/exe");
    // By its name a system that is shutting down tells what its root lives on.
    let name = std::env::args_os().next().unwrap_or_else(|| "ringfs".into());
    command.arg0(name).arg("mount").arg("--worker").stdin(Stdio::from(channel));
    if is_takeover {
        command.arg("--take-over").stdout(Stdio::null());
    }
    command.args(args);
    // The terminal's signals are ours, to be passed on.
    command.process_group(0).spawn()
}

/// The mount is ready: whoever waits for us need wait no more.
fn leave(is_background: bool, log: Option<&File>) -> io::Result<()> {
    match is_background {
        true => background::detach(log),
        false => background::redirect_errors(log),
    }
}

fn is_signalled(mut signals: &UnixStream) -> bool {
    signals.read(&mut [0; 16]).is_ok_and(|n| n > 0)
}
