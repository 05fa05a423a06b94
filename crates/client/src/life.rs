//! A mount that is being served: its threads, what it waits for, how it becomes ready, how it ends.
//!
//! Invariant: no mount and no thread stays when it has ended. The main thread never waits without a
//! limit for anything but a signal or the session's events, and never touches the mount point
//! itself.
//!
//! Signals: one asks for the same whoever gets it, client or keeper; one to each within a second
//! is one. It unmounts. Another one ends what is served still: detached, mounted elsewhere, or
//! hanging in its unmount. An unmount that fails takes all signals back that came before, from the
//! keeper's count too, and the mount goes on. The death of the keeper of a mount in the foreground
//! is no signal: it unmounts too, and the client ends whatever comes of that.

use crate::connector::{self, Terms};
use crate::keep::Keep;
use crate::mount_cmd::{Failure, READY_LIMIT, system};
use crate::rings::{Rings, place_of};
use crate::service::Service;
use crate::session::{End, Session};
use crate::status::{Ask, Facts, Publisher, Report, own_dir};
use crate::{apart, interrupts, pump, takeover, uring_lane};
use fuser_fork::mount::{Mount, MountError, Unmounted, abort, mount_at};
use ringfs_wire::hello::Reason;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SendError, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the last unmount may take before the connection is aborted.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(10);
/// How long an end waits for an unmount that has begun, and for the kernel to tell of it.
const SECOND_LIMIT: Duration = Duration::from_secs(1);

/// A mount, given back by who was to unmount it, and what came of that.
type Unmounting = Receiver<(Mount, Result<Unmounted, MountError>)>;

/// What a mount is begun with.
pub struct Parts {
    /// Lanes and connections, nothing running yet.
    pub session: Session,
    /// The keeper.
    pub service: Service,
    /// For the next client.
    pub keep: Option<Arc<Keep>>,
    /// For the connector.
    pub terms: Terms,
    /// Which lanes may get queues.
    pub rings: Rings,
    /// For `ringfs status`.
    pub facts: Facts,
    /// Unmounts when it is dropped.
    pub mount: Mount,
}

/// A mount that is being served.
pub struct Life {
    session: Arc<Session>,
    service: Service,
    keep: Option<Arc<Keep>>,
    threads: Vec<JoinHandle<()>>,
    /// The lanes that have no thread yet.
    waiting: VecDeque<usize>,
    /// For the connector, until it runs.
    terms: Option<Terms>,
    rings: Rings,
    /// What the mount is.
    pub facts: Facts,
    publisher: Option<Publisher>,
    /// `None`: a thread unmounts it, or it is unmounted or detached.
    mount: Option<Mount>,
    unmounting: Option<Unmounting>,
    /// When the session ends, if it is not unmounted by then.
    end_due: Option<Instant>,
    mountpoint: PathBuf,
    dev_minor: Option<u32>,
}

impl Life {
    /// Of what there is, without a thread yet.
    pub fn of(parts: Parts) -> Life {
        let Parts { session, service, keep, terms, rings, facts, mount } = parts;
        if let Some(minor) = mount.dev_minor() {
            let _ = session.dev_minor.set(minor);
        }
        Life {
            waiting: (0..session.lanes.len()).collect(),
            session: Arc::new(session),
            service,
            keep,
            threads: Vec::new(),
            terms: Some(terms),
            rings,
            facts,
            publisher: None,
            mountpoint: mount.mountpoint().to_owned(),
            dev_minor: mount.dev_minor(),
            mount: Some(mount),
            unmounting: None,
            end_due: None,
        }
    }

    /// Lanes and connector, where the mount has been ready for long.
    pub fn go_on(&mut self) -> Result<(), Failure> {
        self.session.resume.begin();
        self.spawn("interrupts".to_owned(), interrupts::run)?;
        while !self.waiting.is_empty() {
            self.spawn_lane()?;
        }
        self.spawn_connector()?;
        self.publish();
        let Facts { source, takeovers, .. } = &self.facts;
        tracing::warn!(source, takeovers, "the mount is taken over");
        Ok(())
    }

    /// The keeper gets what it needs if we die.
    pub fn tell_keeper(&mut self) -> Result<(), Failure> {
        let session = &self.session;
        let agreed = session.agreed();
        let offered = agreed.map_or(0, |agreed| agreed.offered);
        let why_not = match &self.keep {
            None => self.facts.alone_why.clone(),
            Some(_) if !takeover::is_possible(offered) => {
                Some("the kernel does not send requests again: it is older than 6.9".to_owned())
            }
            Some(_) => None,
        };
        let told = match (&self.keep, &why_not) {
            (Some(keep), None) => {
                if let Some(agreed) = agreed {
                    keep.change(|kept| kept.set_init(&agreed));
                }
                keep.set_ready();
                let devices = session.lanes.iter().map(|lane| lane.device.as_fd());
                let fds: Vec<_> = std::iter::once(keep.file()).chain(devices).collect();
                self.service.tell_ready(Ok(&fds))
            }
            (_, why) => {
                session.known.stop_keeping();
                self.service.tell_ready(Err(why.as_deref().unwrap_or_default()))
            }
        };
        self.facts.alone_why = why_not;
        told
    }

    fn publish(&mut self) {
        match Publisher::bind(&own_dir(), self.dev_minor) {
            Ok(publisher) => self.publisher = Some(publisher),
            Err(error) => {
                let dir = own_dir();
                tracing::warn!(
                    dir = %dir.display(), %error,
                    "`ringfs status` cannot ask this mount (users: set XDG_RUNTIME_DIR)"
                );
            }
        }
    }

    fn spawn_first(&mut self) -> Result<(), Failure> {
        let rings = self.rings.choose(self.session.lanes.len());
        let spin = self.facts.spin;
        for lane in std::mem::take(&mut self.waiting) {
            let Some(place) = place_of(lane, rings) else {
                self.waiting.push_back(lane);
                continue;
            };
            let (orders, done) = self.rings.add();
            self.spawn(format!("ring{lane}"), move |session| {
                uring_lane::run(session, place, spin, &orders, &done);
            })?;
        }
        if self.rings.are_made() {
            self.session.offer_rings();
        }
        self.spawn("interrupts".to_owned(), interrupts::run)?;
        self.spawn_lane()
    }

    /// Starts the next lane's thread.
    fn spawn_lane(&mut self) -> Result<(), Failure> {
        let Some(lane) = self.waiting.pop_front() else { return Ok(()) };
        let spin = self.facts.spin;
        self.spawn(format!("lane{lane}"), move |session| pump::run(session, lane, spin))
    }

    fn spawn_connector(&mut self) -> Result<(), Failure> {
        let Some(terms) = self.terms.take() else { return Ok(()) };
        self.spawn_loose("connector", move |session| connector::run(session, terms))
    }

    /// Nobody waits for its end: it may sit in a connect(2) for seconds, or wait for a process that
    /// hangs until ours has ended, and holds nothing.
    fn spawn_loose(
        &self,
        name: &str,
        work: impl FnOnce(&Arc<Session>) + Send + 'static,
    ) -> Result<(), Failure> {
        let session = Arc::clone(&self.session);
        let thread = std::thread::Builder::new().name(name.to_owned());
        thread.spawn(move || work(&session)).map(drop).map_err(system("start a thread"))
    }

    fn spawn(
        &mut self,
        name: String,
        work: impl FnOnce(&Arc<Session>) + Send + 'static,
    ) -> Result<(), Failure> {
        let session = Arc::clone(&self.session);
        let thread = std::thread::Builder::new().name(name).spawn(move || work(&session));
        self.threads.push(thread.map_err(system("start a thread"))?);
        Ok(())
    }

    /// INIT, the other lanes, and the first GETATTR of the root.
    pub fn become_ready(&mut self) -> Result<(), Failure> {
        self.spawn_first()?;
        let deadline = Instant::now() + READY_LIMIT;
        let agreed = self.wait_until(deadline, "INIT", |life| life.session.answered())?;
        let started = self.rings.start(&agreed);
        self.facts.rings = self.rings.facts.clone();
        if let Err(error) = started {
            // Requests may be where no lane of the device fetches them.
            self.session.end(End::Uring(error));
            self.rings.dismiss();
        }
        while !self.waiting.is_empty() {
            self.spawn_lane()?;
        }
        let (sender, answers) = channel();
        let path = self.mountpoint.clone();
        self.spawn_loose("probe", move |session| {
            let _ = sender.send(apart::ask(&path));
            session.notify();
        })?;
        let answered =
            self.wait_until(deadline, "the first GETATTR", |_| answers.try_recv().ok())?;
        // A user's own mount may deny the root to root; it has answered all the same.
        if let Err(errno) = answered
            && errno != Errno::ACCESS
        {
            return Err(Failure::Root(errno));
        }
        self.session.resume.begin();
        self.spawn_connector()?;
        self.publish();
        let (source, mountpoint) = (&self.facts.source, self.mountpoint.display());
        tracing::info!(source, %mountpoint, lanes = self.session.lanes.len(), "mounted");
        Ok(())
    }

    fn wait_until<T>(
        &mut self,
        deadline: Instant,
        what: &'static str,
        mut look: impl FnMut(&mut Life) -> Option<T>,
    ) -> Result<T, Failure> {
        loop {
            if let Some(found) = look(self) {
                return Ok(found);
            }
            if let Some(end) = self.session.ended() {
                return Err(Failure::Early(end));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::Silent { what });
            }
            if self.wait(Some(left))? {
                return Err(Failure::Interrupted);
            }
        }
    }

    /// Sleeps until something happens; whether the mount is to end.
    fn wait(&mut self, limit: Option<Duration>) -> Result<bool, Failure> {
        let watch = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let (asker, rests) = match self.publisher.as_ref().map(Publisher::events).transpose() {
            Ok(asker) => (asker, None),
            Err(left) => (None, Some(left)),
        };
        let all = asker.into_iter().chain([self.session.events()]).chain(self.service.events());
        let mut fds: Vec<_> = all.map(watch).collect();
        let limit = limit.into_iter().chain(rests).min().map(|limit| Timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: limit.subsec_nanos().into(),
        });
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(system("wait")(errno.into())),
        }
        let is_asked = asker.is_some() && !fds[0].revents().is_empty();
        self.session.drain_events();
        if let Some(why) = self.service.hear() {
            self.facts.alone_why = Some(why.to_owned());
        }
        self.facts.is_stored = self.service.is_stored;
        if self.service.is_stored {
            self.session.expire.is_stored();
        }
        if let Some(pipe) = self.service.alive.take() {
            self.session.expire.watch(pipe);
        }
        self.answer_askers(is_asked);
        Ok(self.service.is_asked())
    }

    fn answer_askers(&mut self, is_asked: bool) {
        let (facts, session) = (&self.facts, &self.session);
        let Some(publisher) = &mut self.publisher else { return };
        if is_asked {
            publisher.hear(|ask| {
                if ask == Ask::Reconnect {
                    session.resume.reconnect();
                }
                Report::of(facts, session)
            });
        }
        if publisher.has_waiters() && session.resume.outlook().missing == 0 {
            publisher.tell_waiters(&Report::of(facts, session));
        }
    }

    pub fn wait_for_end(&mut self) -> Result<(), Failure> {
        loop {
            if let Some(end) = self.session.ended() {
                return match *end {
                    End::Unmounted => Ok(()),
                    _ => Err(Failure::Over(end)),
                };
            }
            self.heed_signals();
            self.look_at_unmount();
            let limit = self.end_due.map(|due| due.saturating_duration_since(Instant::now()));
            if limit.is_some_and(|limit| limit.is_zero()) {
                self.session.end(match self.service.is_forsaken() {
                    true => End::Forsaken,
                    false => End::Aborted,
                });
                continue;
            }
            self.wait(limit)?;
        }
    }

    /// Who is asked to end unmounts first; see the module.
    fn heed_signals(&mut self) {
        for _ in 0..self.service.take_signals() {
            match self.mount.is_some() {
                true => self.begin_unmount(),
                false => self.end_soon(),
            }
        }
        if self.service.is_forsaken() {
            self.begin_unmount();
            self.end_soon();
        }
    }

    fn end_soon(&mut self) {
        let hangs = self.unmounting.is_some();
        let patience = if hangs { SECOND_LIMIT } else { Duration::ZERO };
        self.end_due.get_or_insert(Instant::now() + patience);
    }

    /// By a thread of its own: it may take as long as the daemon takes (apart.rs), and this thread
    /// has signals to see.
    fn begin_unmount(&mut self) {
        let Some(mut mount) = self.mount.take() else { return };
        let (sender, outcome) = channel();
        self.unmounting = Some(outcome);
        let spawned = self.spawn_loose("unmount", move |session| {
            let done = mount.unmount_by(apart::unmount);
            // Who does not want it any more does the rest by itself.
            if let Err(SendError((mount, _))) = sender.send((mount, done)) {
                mount.leave();
            }
            session.notify();
        });
        if let Err(error) = spawned {
            tracing::error!(%error, "cannot unmount");
            self.session.end(End::Aborted);
        }
    }

    fn look_at_unmount(&mut self) {
        let Some(unmounting) = &self.unmounting else { return };
        let path = self.mountpoint.display();
        let after = |patience| self.end_due.map(|_| Instant::now() + patience);
        let at_once = after(Duration::ZERO);
        self.end_due = match unmounting.try_recv() {
            Ok((_, Ok(Unmounted::Clean))) => after(SECOND_LIMIT),
            Ok((_, Ok(Unmounted::AlreadyGone))) | Err(TryRecvError::Disconnected) => at_once,
            Ok((_, Ok(Unmounted::Detached))) => {
                say(format_args!(
                    "{path} is in use: it is detached now, and served until its last user is done \
                     (a second signal ends it at once)"
                ));
                at_once
            }
            Ok((_, Ok(Unmounted::Elsewhere))) => {
                say(format_args!(
                    "{path} is unmounted, and served where it is still mounted: in another \
                     namespace, or at another path (a second signal ends it at once)"
                ));
                at_once
            }
            Ok((mount, Err(error))) => {
                self.mount = Some(mount);
                let is_forsaken = self.service.is_forsaken();
                if !is_forsaken {
                    self.service.tell_failed();
                    say(format_args!("{error}; the mount goes on (another signal tries it again)"));
                }
                at_once.filter(|_| is_forsaken)
            }
            Err(TryRecvError::Empty) => return,
        };
        self.unmounting = None;
    }

    /// The end of everything, whatever has happened: no mount and no thread stays.
    pub fn finish(mut self, outcome: Result<(), Failure>) -> Result<(), Failure> {
        self.publisher = None;
        // A mount that is still in the table although the kernel let go was aborted.
        let aborted = outcome.is_ok()
            && self.mount.as_ref().is_some_and(|m| m.dev_minor().is_some() && m.is_mounted());
        match outcome {
            Ok(()) => self.session.resume.say_goodbye(Reason::Unmounted),
            // Whatever waits gets an answer, so that the unmount cannot hang.
            Err(_) => self.session.end(End::Aborted),
        }
        self.begin_unmount();
        if let Some(unmounting) = self.unmounting.take() {
            self.wait_for_unmount(&unmounting);
        }
        self.session.stop();
        self.rings.dismiss();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of this mount has panicked");
            }
        }
        if aborted { Err(Failure::AbortedOutside) } else { outcome }
    }

    fn wait_for_unmount(&self, unmounting: &Unmounting) {
        let done = match unmounting.recv_timeout(UNMOUNT_LIMIT) {
            Ok((_, Ok(_))) | Err(RecvTimeoutError::Disconnected) => return,
            Ok((mut mount, Err(error))) => {
                tracing::warn!(%error, "the unmount failed; trying lazily, and aborting");
                // First, as of an aborted one nobody can tell whether it is mounted.
                let done = mount.unmount_by(|path, _| apart::unmount(path, true));
                mount.leave();
                self.abort();
                done.map(drop)
            }
            Err(RecvTimeoutError::Timeout) => {
                tracing::warn!("the unmount hangs; aborting");
                self.abort();
                let done = apart::unmount(&self.mountpoint, true);
                let is_there = mount_at(&self.mountpoint).is_ok();
                if is_there { done } else { Ok(()) }
            }
        };
        if let Err(error) = done {
            let path = self.mountpoint.display();
            say(format_args!("a dead mount stays behind: {error}; then `ringfs umount {path}`"));
        }
    }

    /// Without control files the end of this process does the same.
    fn abort(&self) {
        let Some(first) = self.session.lanes.first() else { return };
        let outcome = self.dev_minor.map(|minor| abort(first.device.as_fd(), minor));
        tracing::debug!(?outcome, "aborted");
    }
}

/// To whoever listens still.
fn say(words: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "ringfs: {words}");
}
