//! The parent: it stays outside of the sandbox, and reads nothing that a guest sent.
//!
//! It takes connections, tells who the peer is and hands the fd to the worker; it hears the signals
//! and ends the worker. A worker that dies is said loudly and another one made: guests come again
//! and go on with it (docs/sessions.md).
//!
//! Invariant: one thread, which waits in one place.

use crate::accept::{Accepted, Listener};
use crate::channel::{Channel, ToParent, ToWorker};
use crate::daemon::DaemonError;
use crate::fork::Child;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Between the end of a worker and the start of the next one: doubled as long as none lives.
const BACK_OFF_MIN: Duration = Duration::from_millis(50);
const BACK_OFF_MAX: Duration = Duration::from_secs(10);
/// A worker that has lived so long was a good one.
const LIVED: Duration = Duration::from_secs(60);
/// Out of fds: the listeners stay readable, so they are left alone for a while.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// What the parent has.
pub struct Parent {
    /// Where guests connect.
    pub listeners: Vec<Listener>,
    /// Where questions come from.
    pub control: Option<Listener>,
    /// Readable when the daemon is to end.
    pub stop: OwnedFd,
}

enum End {
    /// By our wish.
    Stopped,
    /// By itself; whether it had served.
    Died { served: bool, failed: Option<String> },
}

impl Parent {
    /// Makes workers by `start` until the daemon is to end. `ready` is called when the first one
    /// serves.
    ///
    /// # Errors
    /// [`DaemonError::Worker`]: the first one cannot serve.
    pub fn run(
        &self,
        start: impl Fn() -> io::Result<Child>,
        ready: impl FnOnce(),
    ) -> Result<(), DaemonError> {
        let mut ready = Some(ready);
        let mut pause = BACK_OFF_MIN;
        loop {
            let begun = Instant::now();
            let mut child = start()?;
            let mut on_ready = || {
                if let Some(ready) = ready.take() {
                    ready();
                }
            };
            let end = self.serve(&child.channel, &mut on_ready)?;
            let how = child.wait();
            let (served, failed) = match end {
                End::Stopped if how.is_empty() => return Ok(()),
                End::Stopped => return Err(DaemonError::Worker(how)),
                End::Died { served, failed } => (served, failed.unwrap_or(how)),
            };
            if ready.is_some() {
                return Err(DaemonError::Worker(failed));
            }
            if served && begun.elapsed() >= LIVED {
                pause = BACK_OFF_MIN;
            }
            tracing::error!(
                "the worker has died ({failed}): guests are cut off; another one starts in {pause:?}"
            );
            if self.stops_within(pause)? {
                return Ok(());
            }
            pause = (pause * 2).min(BACK_OFF_MAX);
        }
    }

    fn stops_within(&self, pause: Duration) -> Result<bool, DaemonError> {
        let until = Instant::now() + pause;
        loop {
            let left = timespec(until.saturating_duration_since(Instant::now()));
            match poll(&mut [PollFd::new(&self.stop, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Hands connections to one worker until it ends.
    fn serve(&self, worker: &Channel, on_ready: &mut dyn FnMut()) -> Result<End, DaemonError> {
        let (mut served, mut stopping, mut failed) = (false, false, None);
        let mut unsent: Option<(ToWorker, Option<OwnedFd>)> = None;
        let mut exhausted = false;
        loop {
            let to_worker = if unsent.is_some() { PollFlags::OUT } else { PollFlags::empty() };
            let mut fds = vec![PollFd::new(worker, PollFlags::IN | to_worker)];
            if !stopping {
                fds.push(PollFd::new(&self.stop, PollFlags::IN));
            }
            // Who connects before there is a worker waits in the listener's queue.
            let listens = served && !stopping && unsent.is_none() && !exhausted;
            if listens {
                fds.extend(self.all().map(|l| PollFd::from_borrowed_fd(l.as_fd(), PollFlags::IN)));
            }
            let pause = timespec(EXHAUSTED_PAUSE);
            match poll(&mut fds, exhausted.then_some(&pause)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
            drop(fds);
            exhausted = false;
            if ready[0].intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                match worker.receive::<ToParent>() {
                    Ok(Some((ToParent::Ready, _))) => {
                        served = true;
                        on_ready();
                    }
                    Ok(Some((ToParent::Failed(text), _))) => failed = Some(text),
                    Ok(Some((ToParent::Pid(_), _))) => {}
                    Ok(None) | Err(_) if stopping => return Ok(End::Stopped),
                    Ok(None) | Err(_) => return Ok(End::Died { served, failed }),
                }
            }
            if !stopping && !ready[1].is_empty() {
                stopping = true;
                tracing::info!("stopping");
                // What has not been handed over is cut off.
                unsent = Some((ToWorker::Stop, None));
            }
            if listens && !stopping {
                for (listener, _) in self.all().zip(&ready[2..]).filter(|(_, r)| !r.is_empty()) {
                    if unsent.is_none() {
                        (unsent, exhausted) = self.take(listener, worker);
                    }
                }
            }
            if let Some((message, fd)) = unsent.take() {
                unsent = send(worker, message, fd);
            }
        }
    }

    fn all(&self) -> impl Iterator<Item = &Listener> {
        self.listeners.iter().chain(&self.control)
    }

    /// Takes one connection in and hands it on; what the worker has no room for, and whether there
    /// are no fds.
    fn take(
        &self,
        listener: &Listener,
        worker: &Channel,
    ) -> (Option<(ToWorker, Option<OwnedFd>)>, bool) {
        let is_control =
            self.control.as_ref().is_some_and(|control| std::ptr::eq(control, listener));
        match listener.accept() {
            Ok(Some(Accepted { socket, peer, owner })) => {
                let message = match is_control {
                    true => ToWorker::Control,
                    false => ToWorker::Guest { peer, owner },
                };
                (send(worker, message, Some(socket)), false)
            }
            Ok(None) => (None, false),
            Err(error) => {
                let listener = listener.address();
                tracing::warn!(%listener, %error, "cannot accept (too few open files?)");
                (None, true)
            }
        }
    }
}

/// Gives back what must wait for room.
fn send(
    worker: &Channel,
    message: ToWorker,
    fd: Option<OwnedFd>,
) -> Option<(ToWorker, Option<OwnedFd>)> {
    match worker.send(&message, fd.as_ref().map(AsFd::as_fd)) {
        Err(Errno::AGAIN | Errno::TOOMANYREFS) => Some((message, fd)),
        // A worker that is gone is found out by its end of the channel.
        Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => None,
        Err(error) => {
            tracing::warn!(%error, "a connection cannot be handed to the worker: it is cut off");
            None
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: i64::from(duration.subsec_nanos()) }
}
