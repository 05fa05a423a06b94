//! The keeper: a small process that starts the one that serves a mount, holds copies of its fds,
//! and starts another one when it dies; where that cannot be, it cleans up and says so.
//!
//! Between the two is a socket of whole messages, the client's standard input:
//!
//! ```text
//! client -> keeper   M mount_id dev_minor path    mounted: this is to be cleaned up
//!                    R text | fds                 ready; fds: how to take over, none: why not
//!                    F signals                    the unmount failed that so many S asked for
//! keeper -> client   T stored path | fds          take over: the file that was left, and devices
//!                    K                            from now on the service manager has them too
//!                    A                            nobody takes over: the fds of R did not fit
//!                    S                            a signal: unmount
//!                    L | fds                      a pipe: who has its other end, keeper or client,
//!                                                 is there (expire.rs)
//! ```
//!
//! Invariant: a mount whose client has died is either taken over or unmounted, and whichever it is
//! stands in the log. A client that ends by itself has cleaned up by itself. The keeper must not
//! look at what it holds, nor touch the mount. Where the service manager has it too (fd_store.rs)
//! the next keeper goes on; a client without one then leaves all as it is, by dying.

use crate::background;
use crate::fd_store::{FdStore, Stored};
use crate::rings::with_causes;
use crate::service::catch_signals;
use fuser_fork::device::is_over;
use fuser_fork::mount::unmount_identity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::pipe::PipeFlags;
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
/// Why nobody takes over from a client whose fds its keeper cannot have.
pub const SHORT_OF_FDS: &str = "the keeper may not have so many fds";
const MESSAGE_BYTES_MAX: usize = 4608;
/// Deaths by faults of its own, each this soon after the one before, that are no use to go on from.
const FAULTS_MAX: u32 = 5;
const FAULT_AGE: Duration = Duration::from_secs(10);
/// Kills in a row before a client was ready.
const EARLY_KILLS_MAX: u32 = 100;
/// To start the next client where the system is short of something; half a minute in all.
const START_TRIES_MAX: u32 = 300;
const START_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

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
    #[error("the keeper of {path} gives up: {done}")]
    GivenUp { path: String, done: String, was_ready: bool, source: Box<KeeperError> },
}

impl KeeperError {
    /// Whether it was a mount that had been ready.
    pub fn is_late(&self) -> bool {
        use KeeperError::{Dead, GivenUp};
        matches!(self, Dead { was_ready: true, .. } | GivenUp { was_ready: true, .. })
    }

    /// Whether it passes when others have given something back.
    fn is_passing(&self) -> bool {
        const SHORT: [Errno; 4] = [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE];
        let KeeperError::System { source, .. } = self else { return false };
        Errno::from_io_error(source).is_some_and(|errno| SHORT.contains(&errno))
    }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> KeeperError {
    move |source| KeeperError::System { what, source }
}

/// A message, and the fds that came with it.
pub struct Message {
    /// Its first byte says what it is.
    pub bytes: Vec<u8>,
    /// The fds: all of them or none.
    pub fds: Vec<OwnedFd>,
    /// There were more than this process may have.
    pub lacks_fds: bool,
}

/// One end of the socket.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// One end, and what is to be the other process's standard input.
    pub fn pair() -> Result<(Channel, OwnedFd), Errno> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Channel(ours), theirs))
    }

    /// The other process's end: its standard input.
    pub fn inherited() -> io::Result<Channel> {
        Ok(Channel(io::stdin().as_fd().try_clone_to_owned()?))
    }

    /// Sends a message: not an empty one, which would be taken for the end.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
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
        let lacks_fds = got.flags.contains(ReturnFlags::CTRUNC);
        if lacks_fds {
            fds.clear();
        }
        Ok(Message { bytes, fds, lacks_fds })
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

    /// The unmount that so many signals asked for has failed.
    pub fn tell_failed(&self, signals: u32) -> Result<(), Errno> {
        self.send(&[&b"F"[..], &signals.to_ne_bytes()].concat(), &[])
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
    /// The service manager has the fds too.
    is_stored: bool,
}

impl From<Stored> for Held {
    fn from(stored: Stored) -> Held {
        let Stored { fds, mounted } = stored;
        Held { mounted: Some(mounted), is_ready: true, fds, is_stored: true, ..Held::default() }
    }
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
                if message.lacks_fds {
                    self.why = SHORT_OF_FDS.to_owned();
                    let why = &self.why;
                    tracing::error!(why, "if the client dies nobody takes the mount over");
                }
            }
            _ => {}
        }
    }

    /// Has the next client take over.
    fn hand_over(&self, channel: &Channel) -> Result<(), Errno> {
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        let path = self.mounted.as_ref().map_or(&[][..], |its| its.2.as_os_str().as_bytes());
        channel.send(&[&[b'T', self.is_stored.into()], path].concat(), &fds)
    }

    /// Nobody takes over: the mount goes.
    fn give_up(&mut self, status: ExitStatus) -> KeeperError {
        let why = match (self.can_go_on(), self.is_ready) {
            (true, _) if status.signal().is_none() => "it could not begin".to_owned(),
            (true, _) => "it dies again and again".to_owned(),
            (false, true) => self.why.clone(),
            (false, false) => "it was not ready yet".to_owned(),
        };
        let was_ready = self.is_ready;
        match self.clean_up() {
            Some((path, done)) => KeeperError::Dead { path, status, why, done, was_ready },
            None => KeeperError::Early(status),
        }
    }

    /// With an error of our own: a mount that nobody keeps is to go.
    fn fail(&mut self, error: KeeperError) -> KeeperError {
        let was_ready = self.is_ready;
        match self.clean_up() {
            Some((path, done)) => {
                KeeperError::GivenUp { path, done, was_ready, source: Box::new(error) }
            }
            None => error,
        }
    }

    /// The mount goes, and what is held of it: which, and what became of it.
    fn clean_up(&mut self) -> Option<(String, String)> {
        let (mount_id, dev_minor, path) = self.mounted.take()?;
        // First, as all that follows needs an fd.
        self.fds.clear();
        let done = match unmount_identity(&path, (mount_id, dev_minor)) {
            Ok(()) => "it is unmounted, and what was in flight has failed".to_owned(),
            Err(error) => format!("it stays behind, dead: {error}"),
        };
        Some((path.display().to_string(), done))
    }

    fn can_go_on(&self) -> bool {
        self.is_ready && !self.fds.is_empty()
    }

    /// Whether the mount is gone that can be taken over.
    fn is_over(&self) -> bool {
        self.fds.get(1).is_none_or(|session| is_over(session.as_fd()))
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

/// What a keeper is started for.
pub struct Orders<'a> {
    /// The arguments of its clients.
    pub args: &'a [OsString],
    /// Whoever has started us waits until the mount is ready.
    pub is_background: bool,
    /// Where standard error goes from then on.
    pub log: Option<&'a File>,
    /// Who has the fds besides us, and what was kept there.
    pub store: Option<(FdStore, Option<Stored>)>,
}

/// Starts a client, and further ones as they are needed; how the last one ended.
pub fn run(orders: Orders<'_>) -> Result<i32, KeeperError> {
    let catch = |signals: &[i32]| catch_signals(signals).map_err(system("catch signals"));
    let (store, stored) = orders.store.unzip();
    let mut keeper = Keeper {
        args: orders.args,
        is_background: orders.is_background,
        log: orders.log,
        signals: catch(&[SIGINT, SIGTERM, SIGHUP])?,
        children: catch(&[SIGCHLD])?,
        store,
        held: stored.flatten().map(Held::from).unwrap_or_default(),
        signals_sent: 0,
        has_left: false,
        alive: rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(|e| system("make a pipe")(e.into()))?,
    };
    let ended = keeper.serve();
    // The manager's next keeper takes the mount, if it is not to end.
    let is_failure = matches!(ended, Err(KeeperError::System { .. }));
    if is_failure && keeper.held.is_stored && keeper.signals_sent == 0 {
        return ended;
    }
    if let Some(store) = &mut keeper.store {
        if keeper.signals_sent > 0 {
            store.stopping();
        }
        store.forget();
    }
    ended.map_err(|error| keeper.held.fail(error))
}

struct Keeper<'a> {
    args: &'a [OsString],
    is_background: bool,
    log: Option<&'a File>,
    signals: UnixStream,
    children: UnixStream,
    store: Option<FdStore>,
    held: Held,
    /// Those that came, but for those whose unmount failed.
    signals_sent: u32,
    has_left: bool,
    /// A pipe that the clients have too.
    alive: (OwnedFd, OwnedFd),
}

impl Keeper<'_> {
    /// One client after the other.
    fn serve(&mut self) -> Result<i32, KeeperError> {
        let mut deaths = Deaths::default();
        loop {
            let is_takeover = self.held.is_ready;
            let (mut child, channel) = self.start_next()?;
            let started = Instant::now();
            if is_takeover {
                // What it asked for before goes on being asked for.
                let signals = |()| (0..self.signals_sent).try_for_each(|_| channel.send(b"S", &[]));
                if let Err(errno) = self.held.hand_over(&channel).and_then(signals) {
                    tracing::debug!(%errno, "the client has died already");
                }
            }
            // It may have died; the next one gets it.
            let _ = channel.send(b"L", &[self.alive.0.as_fd(), self.alive.1.as_fd()]);
            let watched = self.watch(&mut child, &channel);
            if watched.is_err() {
                // Nobody would keep it: what is in flight is to fail, or to be the next keeper's.
                let _ = child.kill().and_then(|()| child.wait());
                while let Ok(message) = channel.receive(RecvFlags::DONTWAIT) {
                    self.hear(message);
                }
            }
            let (status, was_ready) = watched?;
            let Some(signal) = status.signal() else {
                let has_begun = !is_takeover || was_ready || status.success();
                return match has_begun || self.held.is_over() {
                    true => Ok(status.code().unwrap_or(1)),
                    // It may have ended before it had a mount to clean up.
                    false => Err(self.held.give_up(status)),
                };
            };
            let may_go_on = deaths.allow(signal, was_ready, started.elapsed());
            if !self.held.can_go_on() || !may_go_on {
                return Err(self.held.give_up(status));
            }
            let path = self.held.mounted.as_ref().map(|its| its.2.display().to_string());
            tracing::error!(?path, %status, "the client died: another one takes the mount over");
        }
    }

    /// Starts a client. A mount that has lost its own waits for what the system is short of, for a
    /// while, and until it is to end.
    fn start_next(&mut self) -> Result<(Child, Channel), KeeperError> {
        let (mut tries, mut said) = (0, false);
        loop {
            let error = match self.try_start() {
                Ok(started) => return Ok(started),
                Err(error) => error,
            };
            tries += 1;
            self.heed_signals();
            let may_wait = self.held.is_ready && self.signals_sent == 0;
            if !may_wait || !error.is_passing() || tries > START_TRIES_MAX {
                return Err(error);
            }
            if !std::mem::replace(&mut said, true) {
                let why = with_causes(&error);
                tracing::error!(why, "cannot start the next client: trying again");
            }
            let mut signals = [PollFd::new(&self.signals, PollFlags::IN)];
            let _ = poll(&mut signals, Some(&START_PAUSE));
        }
    }

    /// Whether a signal has come: one more for the clients.
    fn heed_signals(&mut self) -> bool {
        let has_come = is_signalled(&self.signals);
        if has_come {
            self.signals_sent += 1;
        }
        has_come
    }

    fn hear(&mut self, message: Message) {
        match message.bytes.split_first_chunk::<5>() {
            Some((&[b'F', a, b, c, d], _)) => {
                let in_vain = u32::from_ne_bytes([a, b, c, d]);
                self.signals_sent = self.signals_sent.saturating_sub(in_vain);
            }
            _ => self.held.hear(message),
        }
    }

    fn try_start(&self) -> Result<(Child, Channel), KeeperError> {
        let (channel, theirs) = Channel::pair().map_err(|e| system("make a socket")(e.into()))?;
        let child = start(self.args, theirs, self.held.is_ready, self.has_left)
            .map_err(system("start the client; is /proc mounted?"))?;
        Ok((child, channel))
    }

    /// A client's life: how it ended, and whether it was ready.
    fn watch(
        &mut self,
        child: &mut Child,
        channel: &Channel,
    ) -> Result<(ExitStatus, bool), KeeperError> {
        let (mut was_ready, mut hung_up) = (false, false);
        loop {
            let ended = child.try_wait().map_err(system("wait for the client"))?;
            while !hung_up {
                match channel.receive(RecvFlags::DONTWAIT) {
                    Ok(message) => {
                        let is_ready = message.bytes.first() == Some(&b'R');
                        if is_ready && message.lacks_fds {
                            // Its death is seen.
                            let _ = channel.send(b"A", &[]);
                        }
                        self.hear(message);
                        if is_ready && !std::mem::replace(&mut was_ready, true) {
                            self.is_ready(channel)?;
                        }
                    }
                    Err(Errno::AGAIN | Errno::INTR) => break,
                    Err(_) => hung_up = true,
                }
            }
            if let Some(status) = ended {
                return Ok((status, was_ready));
            }
            let wait = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
            let (signals, children) = (self.signals.as_fd(), self.children.as_fd());
            let mut fds = [wait(signals), wait(children), wait(channel.as_fd())];
            // The end of the socket is followed by the child's.
            match poll(&mut fds[..if hung_up { 2 } else { 3 }], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(system("wait")(errno.into())),
            }
            is_signalled(&self.children);
            if self.heed_signals() {
                // It may have died; the next one is told.
                let _ = channel.send(b"S", &[]);
            }
        }
    }

    /// The mount is ready: whoever waits for that is told, once.
    fn is_ready(&mut self, channel: &Channel) -> Result<(), KeeperError> {
        self.store_fds(channel);
        if !std::mem::replace(&mut self.has_left, true) {
            self.store.iter().for_each(FdStore::ready);
            leave(self.is_background, self.log).map_err(system("leave the terminal"))?;
        }
        Ok(())
    }

    /// What the next client needs goes to the service manager too, if it is not there.
    fn store_fds(&mut self, channel: &Channel) {
        let Some(store) = &mut self.store else { return };
        if self.held.is_stored {
            return;
        }
        if self.held.fds.is_empty() {
            let why = &self.held.why;
            return tracing::warn!(why, "nothing is kept by the service manager");
        }
        match store.keep(&self.held.fds) {
            Ok(()) => {
                self.held.is_stored = true;
                // It may have died; the next one is told.
                let _ = channel.send(b"K", &[]);
            }
            Err(error) => {
                store.forget();
                let why = with_causes(&error);
                tracing::error!(why, "if the keeper dies the mount is not taken over");
            }
        }
    }
}

/// `is_quiet`: nobody listens any more.
fn start(
    args: &[OsString],
    channel: OwnedFd,
    is_takeover: bool,
    is_quiet: bool,
) -> io::Result<Child> {
    // The same program, also after an upgrade: what it reads another version may not have written.
    let mut command = Command::new("/proc/self/exe");
    // By its name a system that is shutting down tells what its root lives on.
    let name = std::env::args_os().next().unwrap_or_else(|| "ringfs".into());
    command.arg0(name).arg("mount").arg("--worker").stdin(Stdio::from(channel));
    if is_takeover {
        command.arg("--take-over");
    }
    if is_quiet {
        command.stdout(Stdio::null());
    }
    for variable in ["NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        command.env_remove(variable);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_more_fds_than_can_be_had_none_is_kept() {
        let (ours, theirs) = Channel::pair().expect("a socket");
        let theirs = Channel(theirs);
        let fds = [ours.as_fd(); 2 * FDS_MAX];
        ours.tell_ready(&fds[..FDS_MAX]).expect("sent");
        let mut held = Held::default();
        held.hear(theirs.receive(RecvFlags::empty()).expect("a message"));
        assert!(held.can_go_on() && held.fds.len() == FDS_MAX);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2 * FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let sent =
            rustix::net::sendmsg(&ours, &[IoSlice::new(b"R")], &mut control, SendFlags::empty());
        sent.expect("sent");
        held.hear(theirs.receive(RecvFlags::empty()).expect("a message"));
        assert!(!held.can_go_on() && held.why == SHORT_OF_FDS);
    }
}
