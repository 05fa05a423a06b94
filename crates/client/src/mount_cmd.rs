//! The life of a mount: handshake, device, mount, lanes, INIT, readiness, the wait, the end.
//!
//! Invariant: nothing is mounted before the daemon has granted the share, and nothing stays mounted
//! when this returns or fails. The main thread never waits without a limit for anything but a
//! signal or the session's events, and never touches the mount point itself.

use crate::conn::{Conn, ConnRx};
use crate::handshake::{HandshakeError, join};
use crate::keep::{Keep, LaneKeep, Places};
use crate::keeper::Channel;
use crate::known::Known;
use crate::lane::Lane;
use crate::options::{Options, cache_word};
use crate::resume::{self, Resume, Terms};
use crate::rings::{Rings, place_of, with_causes};
use crate::session::{End, Session};
use crate::status::{Ask, Facts, Granted, Publisher, Report, own_dir, unix_now_s};
use crate::takeover::{Taken, TakeoverError};
use crate::transport::{Address, ConnectError, Socket, Target};
use crate::{handshake, interrupts, pump, status, takeover, uring_lane};
use fuser_fork::device::{DEVICE_PATH, Device};
use fuser_fork::init::Limits;
use fuser_fork::mount::{Mount, MountError, Unmounted, mount, unmount_path};
use fuser_fork::reader::Clones;
use ringfs_wire::abi;
use ringfs_wire::hello::{
    Hello, Reason, Ticket, VERSION_MAX, VERSION_MIN, Welcome, feature, mount_flag,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long INIT and the first GETATTR may take together.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// How long the last unmount may take before the connection is aborted.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(10);

/// What is to be mounted, where and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// The share.
    pub target: Target,
    /// The mount point, absolute.
    pub mountpoint: PathBuf,
    /// From `-o`.
    pub options: Options,
    /// The lists that those were read from.
    pub lists: Vec<String>,
}

/// Why a mount did not come about, or ended badly.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Failure {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("no session with the daemon at {address}")]
    Handshake { address: Address, source: HandshakeError },
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("cannot {what}")]
    System { what: &'static str, source: io::Error },
    #[error("the daemon did not answer {what} within {} s: is it stuck?", READY_LIMIT.as_secs())]
    Silent { what: &'static str },
    #[error("the mount's root cannot be read: {0}")]
    Root(Errno),
    #[error("cannot take the mount over")]
    TakeOver(#[from] TakeoverError),
    #[error("interrupted by a signal before the mount was ready")]
    Interrupted,
    #[error("the mount ended before it was ready")]
    Early(#[source] Arc<End>),
    #[error(transparent)]
    Over(Arc<End>),
    #[error("the FUSE connection was aborted from outside; the mount is removed")]
    AbortedOutside,
}

impl Failure {
    /// Whether the mount had been ready.
    pub fn is_late(&self) -> bool {
        matches!(self, Failure::Over(_) | Failure::TakeOver(_) | Failure::AbortedOutside)
    }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> Failure {
    move |source| Failure::System { what, source }
}

/// What the keeper wants of a client.
#[derive(Debug)]
pub struct Service {
    /// To the keeper.
    pub channel: Channel,
    /// Another client has died.
    pub is_takeover: bool,
    /// Somebody waits for the keeper's end.
    pub is_foreground: bool,
}

/// Mounts, or takes a mount over, calls `on_ready` once the mount answers, serves until it is
/// unmounted.
pub fn run(
    request: &Request,
    service: Service,
    on_ready: impl FnOnce(&Facts) -> io::Result<()>,
) -> Result<(), Failure> {
    // `ps` is to tell what it is.
    let _ = rustix::thread::set_name(c"ringfs");
    fuser_fork::return_large_memory();
    let signals = catch_signals(&[SIGINT, SIGTERM, SIGHUP]).map_err(system("catch signals"))?;
    let is_takeover = service.is_takeover;
    let mut life = match is_takeover {
        true => Life::take_over(request, signals, service)?,
        false => Life::start(request, signals, service)?,
    };
    let ready = match is_takeover {
        true => life.go_on(request),
        false => life.become_ready(request),
    };
    let started = ready
        .and_then(|()| life.tell_keeper())
        .and_then(|()| on_ready(&life.facts).map_err(system("tell that the mount is ready")));
    let outcome = match started {
        Ok(()) => life.wait_for_end(),
        Err(failure) => Err(failure),
    };
    life.finish(outcome)
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

/// A mount that is being served.
struct Life {
    session: Arc<Session>,
    signals: UnixStream,
    /// Signals that have come: to us, and to the keeper. A whole group may have got one.
    signalled: [u32; 2],
    service: Service,
    /// The keeper is there.
    is_kept: bool,
    keep: Option<Arc<Keep>>,
    threads: Vec<JoinHandle<()>>,
    /// The lanes that have no thread yet.
    waiting: VecDeque<usize>,
    /// For the connector, until it runs.
    terms: Option<Terms>,
    spin: u32,
    rings: Rings,
    facts: Facts,
    publisher: Option<Publisher>,
    /// `None` once a thread unmounts it.
    mount: Option<Mount>,
    unmounting: Option<Receiver<Result<Unmounted, MountError>>>,
    mountpoint: PathBuf,
    dev_minor: Option<u32>,
}

impl Life {
    /// Everything up to the thread of lane 0.
    fn start(request: &Request, signals: UnixStream, service: Service) -> Result<Life, Failure> {
        let rings = Rings::wished(&request.options);
        let hello = hello(request, rings.extra_lanes(request.options.lanes()));
        let address = &request.target.address;
        let (first, first_rx, welcome) = connect(address, &hello)?;
        let mut conns = Joined(vec![(first, first_rx)]);
        let (device, mount) = mount(&request.mountpoint, &request.options.mount)?;
        // From here on a failure drops `mount`, which unmounts; if we die, the keeper does.
        let told = service.channel.tell_mounted(mount.identity(), mount.mountpoint().as_os_str());
        told.map_err(|errno| system("tell the keeper")(errno.into()))?;
        // A lane has a clone and a connection of its own.
        let wanted = welcome.lanes.min(welcome.conns);
        let clones = Clones::open(device, usize::from(wanted));
        let lanes_got = clones.devices().len();
        let mut newest = welcome;
        for conn in 1..lanes_got as u16 {
            let hello =
                Hello { ticket: newest.ticket, epoch_seen: newest.epoch, conn, ..hello.clone() };
            let (conn, half, welcome) = connect(address, &hello)?;
            conns.0.push((conn, half));
            newest = welcome;
        }
        let mut facts = facts(request, &mount, &welcome, &clones);
        let has_restore = welcome.features & feature::RESTORE != 0;
        let alone_why = match (request.options.keep, rings.are_planned(), has_restore) {
            (false, _, _) => Some("nokeep"),
            (_, true, _) => Some("frames come by rings"),
            (_, _, false) => Some("the daemon cannot have it rebuilt"),
            (true, false, true) => None,
        };
        let (keep, places, known) = make_keep(alone_why.is_none(), has_restore);
        facts.alone_why = alone_why.or(Some("no memory file")).map(str::to_owned);
        let mut places = places.into_iter();
        let lanes = clones.devices().iter().enumerate().map(|(index, device)| {
            device.set_nonblocking(true).map_err(io::Error::other)?;
            let lane = Lane::new(index as u8, Arc::clone(device), welcome.slots)?;
            Ok(match places.next() {
                Some(place) => lane.keeping(place),
                None => lane,
            })
        });
        let lanes = lanes.collect::<io::Result<Vec<Lane>>>().map_err(system("set up the lanes"))?;
        if let Some(why) = &facts.lanes.why {
            let (got, asked) = (facts.lanes.got, facts.lanes.asked);
            tracing::warn!(got, asked, why, "fewer lanes than asked for");
        }
        let resume = Resume::new(std::mem::take(&mut conns.0), request.options.soft);
        let hello_lanes = hello.lanes;
        let mut terms = Terms::new(address, hello, newest, request.options.strict);
        if let Some(keep) = &keep {
            keep.change(|kept| {
                (kept.lanes, kept.slots) = (lanes_got as u32, welcome.slots.into());
                kept.asked_lanes = hello_lanes.into();
                (kept.mount_id, kept.dev_minor) = mount.identity().unwrap_or_default();
                kept.since_unix_s = facts.connected_since_unix_s;
            });
            terms = terms.keeping(Arc::clone(keep));
        }
        let session = Session::new(lanes, resume, known, limits(&request.options))
            .map_err(system("set up the session"))?;
        let mut life = Life {
            session: Arc::new(session),
            signals,
            signalled: [0; 2],
            service,
            is_kept: true,
            keep,
            threads: Vec::new(),
            waiting: (0..lanes_got).collect(),
            terms: Some(terms),
            spin: request.options.spin,
            rings,
            facts,
            publisher: None,
            mountpoint: mount.mountpoint().to_owned(),
            dev_minor: mount.dev_minor(),
            mount: Some(mount),
            unmounting: None,
        };
        match life.spawn_first() {
            Ok(()) => Ok(life),
            Err(failure) => life.finish(Err(failure)).and(Err(Failure::Interrupted)),
        }
    }

    /// Everything up to the threads, where another client has died.
    fn take_over(
        request: &Request,
        signals: UnixStream,
        service: Service,
    ) -> Result<Life, Failure> {
        let message = service.channel.receive(RecvFlags::empty());
        let message = message.map_err(|errno| system("hear the keeper")(errno.into()))?;
        let mut fds = message.fds.into_iter();
        let file = fds.next();
        let devices: Vec<Device> = fds.map(|fd| Device::from_fd(fd, DEVICE_PATH)).collect();
        let (Some(file), Some(first)) = (file, devices.first()) else {
            return Err(TakeoverError::File(Errno::INVAL).into());
        };
        let mountpoint = OsStr::from_bytes(message.bytes.get(1..).unwrap_or_default()).into();
        let identity = Keep::mounted_as(&file);
        // From here on a failure drops `mount`, which unmounts.
        let mount = Mount::adopt(mountpoint, first, identity);
        let clones = Clones::adopt(devices);
        let taken = match takeover::take(file, clones.devices()) {
            Err(TakeoverError::Unmounted) => return Err(Failure::Over(Arc::new(End::Unmounted))),
            taken => taken?,
        };
        let Taken { keep, terms: kept, lanes, known } = taken;
        let lanes_got = lanes.len();
        let options = &request.options;
        let mut facts = facts(request, &mount, &kept.welcome, &clones);
        facts.connected_since_unix_s = kept.since_unix_s;
        facts.takeovers = kept.takeovers + 1;
        let unsure = kept.trying.checked_sub(1).map(|port| port as u16);
        let resume = Resume::cut(lanes_got, options.soft, unsure);
        let session = Session::new(lanes, resume, known, limits(options))
            .map_err(system("set up the session"))?;
        session.inherit_init(kept.init());
        let asked = kept.asked_lanes as u16;
        let hello = Hello { lanes: asked, conns: asked, ..hello(request, 0) };
        let terms = Terms::new(&request.target.address, hello, kept.welcome, options.strict);
        Ok(Life {
            session: Arc::new(session),
            signals,
            signalled: [0; 2],
            service,
            is_kept: true,
            terms: Some(terms.inherited(Arc::clone(&keep))),
            keep: Some(keep),
            threads: Vec::new(),
            waiting: (0..lanes_got).collect(),
            spin: options.spin,
            rings: Rings::wished(options),
            facts,
            publisher: None,
            mountpoint: mount.mountpoint().to_owned(),
            dev_minor: mount.dev_minor(),
            mount: Some(mount),
            unmounting: None,
        })
    }

    /// Lanes and connector, where the mount has been ready for long.
    fn go_on(&mut self, request: &Request) -> Result<(), Failure> {
        self.session.resume.begin();
        self.spawn("interrupts".to_owned(), interrupts::run)?;
        while !self.waiting.is_empty() {
            self.spawn_lane()?;
        }
        self.spawn_connector()?;
        self.publish();
        let (source, takeovers) = (request.target.source(), self.facts.takeovers);
        tracing::warn!(source = %source.display(), takeovers, "the mount is taken over");
        Ok(())
    }

    /// The keeper gets what it needs if we die.
    fn tell_keeper(&mut self) -> Result<(), Failure> {
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
        let channel = &self.service.channel;
        let told = match (&self.keep, &why_not) {
            (Some(keep), None) => {
                if let Some(agreed) = agreed {
                    keep.change(|kept| kept.set_init(&agreed));
                }
                keep.set_ready();
                let devices = session.lanes.iter().map(|lane| lane.device.as_fd());
                let fds: Vec<_> = std::iter::once(keep.file()).chain(devices).collect();
                channel.tell_ready(&fds)
            }
            (_, why) => {
                session.known.stop_keeping();
                channel.tell_alone(why.as_deref().unwrap_or_default())
            }
        };
        self.facts.alone_why = why_not;
        told.map_err(|errno| system("tell the keeper")(errno.into()))
    }

    fn publish(&mut self) {
        match Publisher::bind(&own_dir()) {
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
        let spin = self.spin;
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
        let spin = self.spin;
        self.spawn(format!("lane{lane}"), move |session| pump::run(session, lane, spin))
    }

    /// Nobody waits for its end: it may sit in a connect(2) for seconds, and holds nothing.
    fn spawn_connector(&mut self) -> Result<(), Failure> {
        let Some(terms) = self.terms.take() else { return Ok(()) };
        let session = Arc::clone(&self.session);
        let thread = std::thread::Builder::new().name("connector".to_owned());
        let spawned = thread.spawn(move || resume::run(&session, terms));
        spawned.map(drop).map_err(system("start a thread"))
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
    fn become_ready(&mut self, request: &Request) -> Result<(), Failure> {
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
        // It may hang with the daemon; the end of the session lets it go.
        self.spawn("probe".to_owned(), move |session| {
            let _ = sender.send(rustix::fs::stat(&path).map(drop));
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
        let source = request.target.source();
        tracing::info!(
            source = %source.display(), mountpoint = %self.mountpoint.display(),
            lanes = self.session.lanes.len(), "mounted"
        );
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

    /// Sleeps until something happens; whether a signal came.
    fn wait(&mut self, limit: Option<Duration>) -> Result<bool, Failure> {
        let watch = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = vec![watch(self.signals.as_fd()), watch(self.session.events())];
        fds.extend(self.publisher.as_ref().map(|publisher| watch(publisher.as_fd())));
        if self.is_kept {
            fds.push(watch(self.service.channel.as_fd()));
        }
        let limit = limit.map(|limit| Timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: limit.subsec_nanos().into(),
        });
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(system("wait")(errno.into())),
        }
        let is_asked =
            self.publisher.is_some() && fds.get(2).is_some_and(|fd| !fd.revents().is_empty());
        self.session.drain_events();
        self.answer_askers(is_asked);
        let before = self.signals_seen();
        if (&self.signals).read(&mut [0; 16]).is_ok_and(|n| n > 0) {
            self.signalled[0] += 1;
        }
        self.hear_keeper();
        Ok(self.signals_seen() > before)
    }

    fn signals_seen(&self) -> u32 {
        self.signalled[0].max(self.signalled[1])
    }

    fn hear_keeper(&mut self) {
        while self.is_kept {
            match self.service.channel.receive(RecvFlags::DONTWAIT) {
                Ok(message) => self.signalled[1] += u32::from(message.bytes == b"S"),
                Err(Errno::AGAIN | Errno::INTR) => return,
                Err(_) => {
                    self.is_kept = false;
                    let why = "the keeper was killed";
                    self.facts.alone_why = Some(why.to_owned());
                    tracing::error!("{why}: if this client dies too, the mount is dead");
                    // Whoever waits for its end takes the mount for ended at once.
                    self.signalled[1] += if self.service.is_foreground { 2 } else { 0 };
                }
            }
        }
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

    fn wait_for_end(&mut self) -> Result<(), Failure> {
        loop {
            if let Some(end) = self.session.ended() {
                return match *end {
                    End::Unmounted => Ok(()),
                    _ => Err(Failure::Over(end)),
                };
            }
            self.look_at_unmount();
            if self.wait(None)? {
                match self.signals_seen() {
                    1 => self.begin_unmount(),
                    _ => self.session.end(End::Aborted),
                }
            }
        }
    }

    /// By a thread of its own: the kernel may write dirty pages back first, which takes as long as
    /// the daemon takes, and this thread has signals to see.
    fn begin_unmount(&mut self) {
        let Some(mount) = self.mount.take() else { return };
        let (sender, outcome) = channel();
        self.unmounting = Some(outcome);
        let spawned = self.spawn("unmount".to_owned(), move |session| {
            let _ = sender.send(mount.unmount());
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
        match unmounting.try_recv() {
            Ok(Ok(Unmounted::Detached)) => eprintln!(
                "ringfs: {path} is in use: it is detached now, and served until its last user is \
                 done (a second signal ends it at once)"
            ),
            Ok(Ok(Unmounted::Clean | Unmounted::AlreadyGone)) => {}
            Ok(Err(error)) => {
                eprintln!("ringfs: {error}; going on (a second signal ends it at once)");
            }
            Err(TryRecvError::Empty) => return,
            Err(TryRecvError::Disconnected) => {}
        }
        self.unmounting = None;
    }

    /// The end of everything, whatever has happened: no mount and no thread stays.
    fn finish(mut self, outcome: Result<(), Failure>) -> Result<(), Failure> {
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

    fn wait_for_unmount(&self, unmounting: &Receiver<Result<Unmounted, MountError>>) {
        match unmounting.recv_timeout(UNMOUNT_LIMIT) {
            Ok(Ok(_)) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(Err(error)) => tracing::warn!(%error, "the unmount failed; trying lazily"),
            Err(RecvTimeoutError::Timeout) => tracing::warn!("the unmount hangs; aborting"),
        }
        if let Some(minor) = self.dev_minor {
            // Without control files the end of this process does the same.
            let outcome = fuser_fork::mount::abort(minor);
            tracing::debug!(?outcome, "aborted");
        }
        if let Err(error) = unmount_path(&self.mountpoint, true) {
            tracing::debug!(%error, "nothing left to unmount");
        }
    }
}

/// What the next client needs, as far as it can be there; and what the kernel knows.
fn make_keep(is_wanted: bool, has_restore: bool) -> (Option<Arc<Keep>>, Vec<LaneKeep>, Known) {
    let made = (is_wanted && has_restore).then(Keep::create);
    match made {
        Some(Ok((keep, Places { lanes, logs }))) => {
            let (known, key) = Known::kept(logs);
            keep.change(|kept| kept.key = key);
            (Some(Arc::new(keep)), lanes, known)
        }
        Some(Err(errno)) => {
            tracing::warn!(%errno, "no memory file: if this client dies nobody takes over");
            (None, Vec::new(), Known::new(has_restore))
        }
        None => (None, Vec::new(), Known::new(has_restore)),
    }
}

/// Connections that no session of ours has yet: if it comes to nothing, the daemon is told.
struct Joined(Vec<(Conn, ConnRx)>);

impl Drop for Joined {
    fn drop(&mut self) {
        self.0.iter().for_each(|(conn, _)| conn.say_goodbye(Reason::Unmounted));
    }
}

fn connect(address: &Address, hello: &Hello) -> Result<(Conn, ConnRx, Welcome), Failure> {
    let socket = Socket::connect(address, handshake::LIMIT)?;
    let joined = join(socket, hello)
        .map_err(|source| Failure::Handshake { address: address.clone(), source })?;
    let welcome = joined.welcome;
    let (conn, half) = Conn::new(joined);
    Ok((conn, half, welcome))
}

/// Joins and leaves at once: what the daemon would grant.
pub fn probe(request: &Request) -> Result<Welcome, Failure> {
    let (conn, half, welcome) = connect(&request.target.address, &hello(request, 0))?;
    drop(Joined(vec![(conn, half)]));
    Ok(welcome)
}

fn hello(request: &Request, extra: u16) -> Hello {
    let options = &request.options;
    let over_vsock = matches!(request.target.address, Address::Vsock { .. });
    let checksum = options.checksum.unwrap_or(over_vsock);
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    Hello {
        versions: (VERSION_MIN, VERSION_MAX),
        features: feature::RESTORE | if checksum { feature::PAYLOAD_CRC } else { 0 },
        ticket: Ticket::NONE,
        epoch_seen: 0,
        lanes: options.lanes() + extra,
        conn: 0,
        conns: options.lanes() + extra,
        slots: options.slots,
        mount_flags: flag(options.mount.read_only, mount_flag::READ_ONLY)
            | flag(options.writeback, mount_flag::WRITEBACK)
            | flag(options.acl, mount_flag::POSIX_ACL),
        cache: options.cache,
        share: request.target.share.clone(),
        subdir: request.target.subdir.clone(),
        init: None,
    }
}

fn limits(options: &Options) -> Limits {
    let writeback = abi::init::WRITEBACK_CACHE;
    Limits {
        page_bytes: rustix::param::page_size() as u32,
        forbidden: if options.writeback { 0 } else { writeback },
        ..Limits::default()
    }
}

fn facts(request: &Request, mount: &Mount, welcome: &Welcome, clones: &Clones) -> Facts {
    let (target, options) = (&request.target, &request.options);
    let lanes_got = clones.devices().len() as u16;
    let lanes_why = match clones.shortfall() {
        Some(shortfall) => Some(with_causes(shortfall)),
        None if lanes_got < options.lanes() => Some("the daemon grants no more".to_owned()),
        None => None,
    };
    Facts {
        pid: std::process::id(),
        source: target.source().to_string_lossy().into_owned(),
        mountpoint: mount.mountpoint().to_owned(),
        dev_minor: mount.dev_minor(),
        share: target.share.clone(),
        subdir: String::from_utf8_lossy(&target.subdir).into_owned(),
        address: target.address.to_string(),
        connected_since_unix_s: unix_now_s(),
        epoch: welcome.epoch,
        lanes: Granted { asked: options.lanes(), got: lanes_got, why: lanes_why },
        spin: options.spin,
        slots_per_lane: welcome.slots,
        rings: status::Rings::default(),
        cache: cache_word(options.cache).to_owned(),
        read_only: options.mount.read_only,
        writeback: options.writeback,
        checksum: welcome.features & feature::PAYLOAD_CRC != 0,
        takeovers: 0,
        alone_why: Some("not ready yet".to_owned()),
        options: request.lists.clone(),
    }
}

/// `ringfs umount`: never touches the path of a mount that may be dead.
pub fn unmount(path: &Path, lazy: bool) -> Result<(), MountError> {
    unmount_path(path, lazy)
}
