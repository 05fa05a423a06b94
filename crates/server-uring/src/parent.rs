//! The parent: it stays outside of the sandbox, and reads nothing that a guest sent.
//!
//! It takes connections, tells who the peer is and hands the fd to the worker; it hears the
//! signals, reads the configuration again, and ends the worker. A worker that dies is said loudly
//! and another one made: guests come again and go on with it (docs/sessions.md).
//!
//! Invariant: one thread, which waits in one place.

use crate::accept::{Accepted, Door, Listener};
use crate::cgroup::{Limits, Placement};
use crate::channel::{Channel, Part, ToParent, ToWorker};
use crate::config::Engine;
use crate::daemon::DaemonError;
use crate::entrance::Entrance;
use crate::fds::Fds;
use crate::fork::{self, Child, Spaces};
use crate::inside;
use crate::reload::{Change, InForce, Shared};
use crate::sandbox::Walls;
use crate::sandbox::users::NotInside;
use crate::share::{Given, ShareRoot};
use crate::state_hold::Held;
use crate::systemd::Notify;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between the end of a worker and the start of the next one: doubled as long as none lives.
const BACK_OFF_MIN: Duration = Duration::from_millis(50);
const BACK_OFF_MAX: Duration = Duration::from_secs(10);
/// A worker that has lived so long was a good one.
const LIVED: Duration = Duration::from_secs(60);
/// Out of fds: the listeners stay readable, so they are left alone for a while.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// What a worker is made of.
pub struct Plan {
    /// What there is to mount.
    pub shares: Vec<Shared>,
    /// How many shards, and where they run.
    pub placement: Placement,
    /// Why there are so many.
    pub limits: Limits,
    /// How files and sockets are driven.
    pub engine: Engine,
    /// Looks for input before a thread sleeps.
    pub spin: u32,
    /// How long a session without connections is kept.
    pub grace: Duration,
    /// What outlives a worker.
    pub state: Option<Held>,
    /// What it is shut in by.
    pub walls: Walls,
    /// It may open files by their handles.
    pub file_handles: bool,
    /// From which time on a request is slow; 0: none is.
    pub slow_op: Duration,
    /// The bound of its fds.
    pub fds: Arc<Fds>,
}

/// What the parent has.
pub struct Parent {
    /// Where guests and questions come from.
    pub entrances: Vec<Entrance>,
    /// Readable when the daemon is to end.
    pub stop: UnixStream,
    /// Readable when the configuration is to be read again.
    pub hangup: UnixStream,
    /// Whoever wants to know how the daemon is.
    pub notify: Notify,
    /// What each worker is made of.
    pub plan: Plan,
    /// The configuration.
    pub in_force: InForce,
    /// Directories that the worker began with.
    pub begun_with: Vec<Given>,
}

enum End {
    /// By our wish.
    Stopped,
    /// By itself; whether it had served.
    Died { served: bool, failed: Option<String> },
}

/// What waits for room in the channel.
type Unsent = VecDeque<(ToWorker, Option<OwnedFd>)>;

impl Parent {
    /// Makes workers until the daemon is to end.
    ///
    /// # Errors
    /// [`DaemonError::Worker`]: the first one cannot serve.
    pub fn run(mut self) -> Result<(), DaemonError> {
        let mut has_served = false;
        let mut pause = BACK_OFF_MIN;
        loop {
            let begun = Instant::now();
            let mut child = self.start(!has_served)?;
            let end = self.serve(&mut child, &mut has_served)?;
            let how = child.wait();
            let (served, failed) = match end {
                End::Stopped if how.is_empty() => return Ok(()),
                End::Stopped => return Err(DaemonError::Worker(format!("the worker: {how}"))),
                End::Died { served, failed } => (served, failed.unwrap_or(how)),
            };
            if !has_served {
                return Err(DaemonError::Worker(failed));
            }
            if served && begun.elapsed() >= LIVED {
                pause = BACK_OFF_MIN;
            }
            tracing::error!(
                "the worker has died ({failed}): its guests are cut off and come again; the next \
                 one starts in {pause:?}"
            );
            if self.stops_within(pause)? {
                return Ok(());
            }
            pause = (pause * 2).min(BACK_OFF_MAX);
        }
    }

    fn start(&mut self, is_first: bool) -> std::io::Result<Child> {
        let walls = self.plan.walls;
        self.in_force.next_worker();
        self.begun_with = self.plan.shares.iter().map(|share| share.dir.given()).collect();
        let own_users = walls.ids();
        // There the worker makes its own.
        let shares = self.plan.shares.iter().filter(|_| own_users.is_none());
        let roots = shares.map(|share| match root_for(share, walls) {
            Err(error) if !is_first => Ok(Err(error.to_string())),
            other => other.map(Ok),
        });
        let roots = roots.collect::<std::io::Result<Vec<_>>>()?;
        let mut keep: Vec<_> = roots.iter().flatten().map(AsFd::as_fd).collect();
        let state = self.plan.state.as_ref().filter(|_| own_users.is_none());
        keep.extend(state.map(AsFd::as_fd));
        let spaces = walls.has_root().then_some(Spaces { own_users });
        let state = self.in_force.state(&self.entrances);
        Child::start(&keep, self.plan.shares.len(), spaces, |channel| {
            match inside::work(&self.plan, &roots, state, is_first, &channel) {
                Ok(()) => 0,
                Err(error) => fork::fail(&channel, &error),
            }
        })
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
    fn serve(&mut self, child: &mut Child, has_served: &mut bool) -> Result<End, DaemonError> {
        let (mut served, mut stopping, mut failed) = (false, false, None);
        let mut unsent = Unsent::new();
        let mut exhausted = false;
        loop {
            let to_worker = if unsent.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            let mut fds = vec![PollFd::new(&child.channel, PollFlags::IN | to_worker)];
            if !stopping {
                fds.push(PollFd::new(&self.stop, PollFlags::IN));
            }
            // Who connects before there is a worker waits in the listener's queue.
            let takes = served && !stopping && unsent.is_empty();
            if takes {
                fds.push(PollFd::new(&self.hangup, PollFlags::IN));
            }
            if takes && !exhausted {
                let sockets = self.listeners().map(|(_, listener)| listener.as_fd());
                let events = self.entrances.iter().filter_map(Entrance::events);
                let all = sockets.chain(events);
                fds.extend(all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            }
            // A worker that hangs is no reason for a service manager to end its sessions too.
            self.notify.alive();
            let pause = exhausted.then_some(EXHAUSTED_PAUSE).or(self.notify.watchdog);
            let pause = pause.map(timespec);
            match poll(&mut fds, pause.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            let heard = fds[0].revents() & !PollFlags::OUT;
            drop(fds);
            exhausted = false;
            if !heard.is_empty() {
                match child.channel.receive::<ToParent>() {
                    // It has had no guest yet, and is believed; later it is not.
                    Ok(Some((ToParent::Lacks(part, why), _))) if !served => {
                        self.in_force.worker_lacks(part, why);
                    }
                    Ok(Some((ToParent::Ready, _))) if !served => {
                        served = true;
                        self.is_ready(child);
                        let state = self.in_force.state(&self.entrances);
                        unsent.push_back((ToWorker::Config(state), None));
                        self.say_listening(has_served);
                    }
                    Ok(Some((ToParent::Failed(text), _))) => failed = Some(text),
                    Ok(Some((ToParent::Ready | ToParent::Lacks(..) | ToParent::Pid(_), _))) => {}
                    Ok(None) | Err(_) if stopping => return Ok(End::Stopped),
                    Ok(None) | Err(_) => return Ok(End::Died { served, failed }),
                }
            }
            if !stopping && ready[1] {
                stopping = true;
                self.notify.stopping();
                tracing::info!("stopping");
                self.entrances.clear();
                unsent.clear();
                unsent.push_back((ToWorker::Stop, None));
            }
            if takes && !stopping {
                let mut ready_ones = ready.iter().skip(3);
                for ((door, listener), _) in
                    self.listeners().zip(&mut ready_ones).filter(|(_, ready)| **ready)
                {
                    exhausted |= take(door, listener, &mut unsent);
                }
                let patterns = self.entrances.iter_mut().filter(|one| one.events().is_some());
                for (pattern, _) in patterns.zip(ready_ones).filter(|(_, ready)| **ready) {
                    pattern.look();
                }
                if ready[2] {
                    self.reload(child, &mut unsent);
                }
            }
            flush(&child.channel, &mut unsent);
        }
    }

    fn listeners(&self) -> impl Iterator<Item = (Door, &Listener)> {
        self.entrances.iter().flat_map(|one| one.listeners().map(|socket| (one.door(), socket)))
    }

    /// The worker's root stands as it will.
    fn is_ready(&self, child: &mut Child) {
        let walls = self.plan.walls;
        if walls.has_root()
            && let Err(error) = child.serves(walls.ids().is_some())
        {
            tracing::warn!(%error, "no share can be added while this worker runs");
        }
    }

    fn say_listening(&self, has_served: &mut bool) {
        if !std::mem::replace(has_served, true) {
            for one in self.entrances.iter().filter(|one| one.door() == Door::Guests) {
                one.say_listening();
            }
            let Plan { placement, limits, engine, walls, .. } = &self.plan;
            let Placement { cpus, shards, large_buffers, .. } = placement;
            tracing::info!(shards, ?cpus, large_buffers, ?limits, ?engine, ?walls, "serving");
            self.notify.ready(&self.in_force.summary());
        }
    }

    fn reload(&mut self, child: &mut Child, unsent: &mut Unsent) {
        while self.hangup.read(&mut [0; 64]).is_ok_and(|n| n > 0) {}
        self.notify.reloading();
        for change in self.in_force.reload(&mut self.entrances) {
            match change {
                Change::Share(share) => {
                    let name = share.config.name.clone();
                    let part = Part::Share(name.clone());
                    // Each share may take its time.
                    self.notify.alive();
                    match hand_over(&share, child, self.plan.walls, &self.begun_with) {
                        Ok(message) => {
                            self.in_force.worker_is_well(&part);
                            unsent.push_back(message);
                        }
                        Err(error) => self.in_force.worker_lacks(part, fork::with_causes(&error)),
                    }
                    self.plan.shares.retain(|old| old.config.name != name);
                    self.plan.shares.push(*share);
                }
                Change::Slow(from) => {
                    self.plan.slow_op = from;
                    unsent.push_back((ToWorker::Slow(from), None));
                }
                Change::ShareGone { name, ends_sessions } => {
                    self.plan.shares.retain(|old| old.config.name != name);
                    self.in_force.worker_is_well(&Part::Share(name.clone()));
                    unsent.push_back((ToWorker::ShareGone { name, ends_sessions }, None));
                }
            }
        }
        unsent.push_back((ToWorker::Config(self.in_force.state(&self.entrances)), None));
        self.notify.ready(&self.in_force.summary());
    }
}

fn root_for(share: &Shared, walls: Walls) -> std::io::Result<ShareRoot> {
    if !walls.has_root() {
        return Ok(share.dir.root()?);
    }
    share.dir.copy().map_err(|errno| {
        let text = "the mount of a share cannot be copied for a root of its own; \
            --sandbox=landlock does without";
        std::io::Error::other(format!("{text}: {errno}"))
    })
}

/// A copy of the share for a worker that runs: put into its root, or lent by its fd.
fn hand_over(
    share: &Shared,
    child: &mut Child,
    walls: Walls,
    begun_with: &[Given],
) -> std::io::Result<(ToWorker, Option<OwnedFd>)> {
    let given = share.dir.given();
    let (index, hidden, fd) = match walls {
        Walls::Namespaces => {
            let root = root_for(share, walls)?;
            (Some(child.attach(root.as_fd())?), root.hidden(), None)
        }
        Walls::OwnUsers(ids) => {
            let part = Part::Share(share.config.name.clone());
            let failed = |source| NotInside::of(part, share.dir.path(), ids, source);
            let attached = child.attach_in_own_users(&share.dir, ids);
            let (index, hidden) = attached.map_err(|error| std::io::Error::other(failed(error)))?;
            (Some(index), hidden, None)
        }
        // Which directories it may open, and write to, is settled when it begins.
        Walls::Landlock if !begun_with.iter().any(|begun| begun.covers(given)) => {
            let text = match begun_with.iter().any(|begun| begun.is_of(given)) {
                true => "by --sandbox=landlock what it began with read-only stays so",
                false => "by --sandbox=landlock it has the directories that it began with",
            };
            return Err(std::io::Error::other(text));
        }
        Walls::Landlock | Walls::None => {
            let root = root_for(share, walls)?;
            (None, root.hidden(), Some(root.into()))
        }
    };
    let (name, config) = (share.config.name.clone(), share.config.clone());
    Ok((ToWorker::Share { name, config, index, hidden }, fd))
}

/// Takes one connection in; whether there are no fds.
fn take(door: Door, listener: &Listener, unsent: &mut Unsent) -> bool {
    match listener.accept() {
        Ok(Some(Accepted { socket, peer, owner, offers })) => {
            let message = match door {
                Door::Guests => ToWorker::Guest { peer, owner, offers },
                Door::Control => ToWorker::Control,
                Door::Metrics => ToWorker::Metrics,
            };
            unsent.push_back((message, Some(socket)));
            false
        }
        Ok(None) => false,
        Err(error) => {
            let listener = listener.address();
            tracing::warn!(%listener, %error, "cannot accept (too few open files?)");
            true
        }
    }
}

/// Sends what there is room for.
fn flush(worker: &Channel, unsent: &mut Unsent) {
    while let Some((message, fd)) = unsent.front() {
        match worker.send(message, fd.as_ref().map(AsFd::as_fd)) {
            Err(Errno::AGAIN) => return,
            // A worker that is gone is found out by its end of the channel.
            Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => {}
            Err(error) => tracing::warn!(%error, "the worker cannot be told"),
        }
        unsent.pop_front();
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: i64::from(duration.subsec_nanos()) }
}
