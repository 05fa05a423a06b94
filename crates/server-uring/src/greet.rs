//! The handshake: a connection's first batch, and which shard gets the connection.
//!
//! The only place that reads from a peer that nothing is known of: bounded bytes, bounded time,
//! bounded number at once. Runs on a thread of its own, on the worker's side of the sandbox; what
//! may wait for a share's file system is on further ones, bounded for each share.

use crate::accept::Accepted;
use crate::fs::{Fs, FsOptions};
use crate::limits::*;
use crate::link::Numbers;
use crate::mailbox::Mail;
use crate::registry::Registry;
use crate::session::{Session, Terms, let_go};
use crate::share::ShareRoot;
use crate::status::ShareStatus;
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader, peek_len};
use ringfs_wire::hello::{
    Hello, Reason, Ticket, VERSION_MAX, VERSION_MIN, Welcome, common_version, feature, mount_flag,
    welcome_flag,
};
use ringfs_wire::limits::*;
use ringfs_wire::session::{LinkRx, LinkTx};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// A directory that guests may mount.
pub struct Share {
    /// What guests call it.
    pub name: String,
    /// Where it is.
    pub dir: PathBuf,
    /// Its root, opened by the parent.
    pub root: ShareRoot,
    /// How it is served.
    pub options: FsOptions,
    /// Sessions of it that are being opened now.
    pub opening: AtomicUsize,
}

impl Share {
    /// For people; without its sessions.
    pub fn status(&self) -> ShareStatus {
        ShareStatus {
            name: self.name.clone(),
            path: self.dir.clone(),
            read_only: self.options.read_only,
            limits: self.options.quota.status(),
            ..Default::default()
        }
    }
}

/// What there is to mount; shares come and go.
#[derive(Default)]
pub struct Shares {
    all: RwLock<Vec<Arc<Share>>>,
    /// Names of those that are to be served, and whose directories cannot be had now.
    away: RwLock<Vec<String>>,
}

impl Shares {
    /// All of them now.
    pub fn all(&self) -> Vec<Arc<Share>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn find(&self, name: &str) -> Option<Arc<Share>> {
        let shares = self.all.read().unwrap_or_else(PoisonError::into_inner);
        shares.iter().find(|share| share.name == name).cloned()
    }

    /// Adds one, or puts it in the place of the one of its name.
    pub fn put(&self, mut share: Share) {
        self.change_away(|away| away.retain(|name| *name != share.name));
        let mut shares = self.all.write().unwrap_or_else(PoisonError::into_inner);
        match shares.iter_mut().find(|old| old.name == share.name) {
            Some(old) => {
                // Sessions that are open go by the new limits, and go on counting with new ones.
                let quota = Arc::clone(&old.options.quota);
                quota.follow(&share.options.quota);
                share.options.quota = quota;
                *old = Arc::new(share);
            }
            None => shares.push(Arc::new(share)),
        }
    }

    /// Nobody mounts it any more.
    pub fn remove(&self, name: &str) {
        self.change_away(|away| away.retain(|other| other != name));
        let mut shares = self.all.write().unwrap_or_else(PoisonError::into_inner);
        shares.retain(|share| share.name != name);
    }

    /// Who has it waits until it is put.
    pub fn set_away(&self, name: &str) {
        self.change_away(|away| away.push(name.to_owned()));
    }

    fn change_away(&self, change: impl FnOnce(&mut Vec<String>)) {
        change(&mut self.away.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn is_away(&self, name: &str) -> bool {
        let away = self.away.read().unwrap_or_else(PoisonError::into_inner);
        away.iter().any(|other| other == name)
    }
}

/// What is needed to welcome somebody.
pub struct Greeter {
    /// What there is to mount.
    pub shares: Arc<Shares>,
    /// Sessions.
    pub registry: Arc<Registry>,
}

/// A connection whose HELLO was read, on its way to the shard that welcomes it.
pub struct Newcomer {
    /// The stream; not blocking yet.
    pub socket: OwnedFd,
    /// The peer, for people.
    pub peer: String,
    /// The session that it names.
    pub session: Arc<Session>,
    /// Which of the session's connections it is.
    pub conn: u16,
    /// The version in force.
    pub version: u16,
    /// By which it came.
    pub ticket: Ticket,
    /// The HELLO was the first batch.
    pub numbers: Numbers,
}

/// A HELLO that was read.
struct Hailed {
    accepted: Accepted,
    hello: Hello,
    rx: LinkRx,
}

struct Greeting {
    accepted: Accepted,
    bytes: Vec<u8>,
    until: Instant,
}

/// What a refused peer is told.
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// For people.
    pub text: String,
}

/// A refusal.
pub fn refuse(reason: Reason, text: impl Into<String>) -> Refusal {
    Refusal { reason, text: text.into() }
}

impl Greeter {
    /// Greets what `accepted` brings until its sender is gone; `bell` is readable when it may have
    /// something.
    pub fn run(self: &Arc<Self>, accepted: &Receiver<Accepted>, bell: &Arc<OwnedFd>) {
        let mut greetings: Vec<Greeting> = Vec::new();
        loop {
            let mut fds = vec![PollFd::new(&**bell, PollFlags::IN)];
            fds.extend(greetings.iter().map(|g| PollFd::new(&g.accepted.socket, PollFlags::IN)));
            let patience = greetings.iter().map(|g| g.until).min();
            let patience =
                patience.map(|until| timespec(until.saturating_duration_since(Instant::now())));
            match poll(&mut fds, patience.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return tracing::error!(%error, "cannot wait for greetings"),
            }
            let rung = !fds[0].revents().is_empty();
            let ready: Vec<bool> = fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect();
            let waiting = std::mem::take(&mut greetings).into_iter().zip(ready);
            greetings = waiting.filter_map(|(g, ready)| self.go_on(g, ready)).collect();
            if rung {
                let _ = rustix::io::read(bell, &mut [0; 8]);
                if !self.take_in(accepted, &mut greetings) {
                    return;
                }
            }
        }
    }

    /// False once nobody can accept any more.
    fn take_in(
        self: &Arc<Self>,
        accepted: &Receiver<Accepted>,
        greetings: &mut Vec<Greeting>,
    ) -> bool {
        loop {
            match accepted.try_recv() {
                Ok(accepted) => {
                    let until = Instant::now() + Duration::from_millis(HELLO_TIMEOUT_MS);
                    let greeting = Greeting { accepted, bytes: Vec::new(), until };
                    // Most have said HELLO by now and never wait.
                    let Some(waits) = self.go_on(greeting, true) else { continue };
                    if greetings.len() >= GREETINGS_MAX {
                        // The oldest was silent longest: it must not keep newcomers out.
                        let oldest = greetings.remove(0);
                        let refusal = refuse(Reason::Limit, "too many greetings at once");
                        say_goodbye(&oldest.accepted, &refusal);
                    }
                    greetings.push(waits);
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Reads on; gives the greeting back while it is not complete.
    fn go_on(self: &Arc<Self>, mut greeting: Greeting, ready: bool) -> Option<Greeting> {
        if Instant::now() >= greeting.until {
            let text = format!("no HELLO within {HELLO_TIMEOUT_MS} ms");
            say_goodbye(&greeting.accepted, &refuse(Reason::Timeout, text));
            return None;
        }
        if !ready {
            return Some(greeting);
        }
        let mut chunk = [0; HELLO_BYTES_MAX];
        match rustix::io::read(&greeting.accepted.socket, &mut chunk) {
            Ok(0) => return None,
            Ok(n) => greeting.bytes.extend_from_slice(&chunk[..n]),
            Err(Errno::AGAIN | Errno::INTR) => return Some(greeting),
            Err(_) => return None,
        }
        match complete(&greeting.bytes) {
            Ok(false) => Some(greeting),
            Ok(true) => {
                self.greet(greeting);
                None
            }
            Err(unread) => {
                unread.answer(&greeting.accepted);
                None
            }
        }
    }

    fn greet(self: &Arc<Self>, greeting: Greeting) {
        let Greeting { accepted, bytes, .. } = greeting;
        let mut rx = LinkRx::new(true);
        let hello = match read_hello(&mut rx, &bytes) {
            Ok(hello) => hello,
            Err(unread) => return unread.answer(&accepted),
        };
        let hailed = Hailed { accepted, hello, rx };
        let ticket = hailed.hello.ticket;
        let found = self.registry.find(ticket);
        if let Some(session) =
            found.filter(|session| hailed.accepted.is_offered(&session.terms.share))
        {
            return self.join(hailed, Ok((session, ticket)));
        }
        if ticket != Ticket::NONE && !is_rebuild(&hailed.hello) {
            let text = "no such session here; mount again";
            return say_goodbye(&hailed.accepted, &refuse(Reason::UnknownSession, text));
        }
        if is_rebuild(&hailed.hello) && hailed.hello.conn != 0 {
            return self.ask_for_first(&hailed);
        }
        if let Err((accepted, refusal)) = self.begin_opening(hailed) {
            say_goodbye(&accepted, &refusal);
        }
    }

    /// A session is rebuilt on its first connection: has the guest come by that.
    fn ask_for_first(&self, hailed: &Hailed) {
        let Hailed { accepted, hello, .. } = hailed;
        let welcome = Welcome {
            version: hello.common_version().unwrap_or_default(),
            lanes: hello.lanes,
            slots: hello.slots,
            conns: hello.conns,
            features: hello.features & feature::KNOWN,
            ticket: hello.ticket,
            // The ticket is not ours: who had it from this daemon would be a clone.
            epoch: hello.epoch_seen,
            grace_s: 0,
            flags: welcome_flag::REBUILD,
        };
        // Whoever has not heard it comes again by any connection.
        let mut tx = LinkTx::new(true);
        send(&accepted.socket, &mut tx, 1, &[(Kind::Welcome, 0, welcome.as_bytes())]);
    }

    /// Opens a session on a thread of its own: the share's file system may be stuck, and others
    /// have shares that are not.
    fn begin_opening(self: &Arc<Self>, hailed: Hailed) -> Result<(), (Accepted, Refusal)> {
        let name = &hailed.hello.share;
        let is_offered = hailed.accepted.is_offered(name);
        if is_offered && self.shares.is_away(name) {
            let text = "the share's directory cannot be had now";
            return Err((hailed.accepted, refuse(Reason::Internal, text)));
        }
        let share = self.shares.find(name).filter(|_| is_offered);
        let Some(share) = share else {
            let text = format!("there is no share {name:?} here");
            return Err((hailed.accepted, refuse(Reason::UnknownShare, text)));
        };
        if share.opening.fetch_add(1, Ordering::Relaxed) >= OPENINGS_PER_SHARE_MAX {
            share.opening.fetch_sub(1, Ordering::Relaxed);
            let text = "the file system of this share does not answer";
            return Err((hailed.accepted, refuse(Reason::Limit, text)));
        }
        let (greeter, opened) = (self.clone(), share.clone());
        let thread = std::thread::Builder::new().name("ringfs-open".into());
        let spawned = thread.spawn(move || {
            let session = greeter.open(&hailed.hello, &opened, &hailed.accepted);
            opened.opening.fetch_sub(1, Ordering::Relaxed);
            greeter.join(hailed, session);
        });
        if let Err(error) = spawned {
            // The connection went with the closure.
            share.opening.fetch_sub(1, Ordering::Relaxed);
            tracing::error!(%error, "no thread for a new session: the guest is cut off");
        }
        Ok(())
    }

    /// Hands the connection to the shard that has it already, or will have it.
    fn join(&self, hailed: Hailed, session: Result<(Arc<Session>, Ticket), Refusal>) {
        let Hailed { accepted, hello, rx } = hailed;
        let (session, ticket) = match session {
            Ok(found) => found,
            Err(refusal) => return say_goodbye(&accepted, &refusal),
        };
        let shard = self.registry.shard(&session, hello.conn).cloned();
        let Some(shard) = shard.filter(|_| hello.conns == session.terms.conns) else {
            let text = format!("this session has {} connections", session.terms.conns);
            say_goodbye(&accepted, &refuse(Reason::Protocol, text));
            return let_go(session);
        };
        shard.post(Mail::Join(Box::new(Newcomer {
            socket: accepted.socket,
            peer: accepted.peer,
            session,
            conn: hello.conn,
            version: hello.common_version().unwrap_or_default(),
            ticket,
            numbers: Numbers { tx: LinkTx::new(true), rx },
        })));
    }

    fn open(
        &self,
        hello: &Hello,
        share: &Share,
        accepted: &Accepted,
    ) -> Result<(Arc<Session>, Ticket), Refusal> {
        if !self.registry.has_room(accepted.owner) {
            let text = format!(
                "too many sessions: a peer may have {SESSIONS_PER_PEER_MAX}, all together \
                 {SESSIONS_MAX}"
            );
            return Err(refuse(Reason::Limit, text));
        }
        let root = share.root.descend(&hello.subdir).map_err(|error| {
            let subdir = String::from_utf8_lossy(&hello.subdir);
            let text = format!("{subdir:?} in share {:?}: {error}", share.name);
            refuse(Reason::BadSubdir, text)
        })?;
        let mut options = share.options.clone();
        options.cache = hello.cache;
        options.writeback = hello.mount_flags & mount_flag::WRITEBACK != 0;
        options.read_only |= hello.mount_flags & mount_flag::READ_ONLY != 0;
        options.acl &= hello.mount_flags & mount_flag::POSIX_ACL != 0;
        options.recipes = hello.features & feature::RESTORE != 0;
        let rebuilt = is_rebuild(hello);
        let fs = Fs::on(root, options).map_err(|error| {
            tracing::error!(share = share.name, dir = %share.dir.display(), %error, "cannot serve");
            refuse(Reason::Internal, "the share cannot be served; the daemon's log says why")
        })?;
        if let Some(init) = &hello.init {
            fs.serve_init(init).map_err(|field| refuse(Reason::Incompatible, field))?;
        }
        let terms = Terms {
            share: share.name.clone(),
            peer: accepted.peer.clone(),
            owner: accepted.owner,
            lanes: hello.lanes,
            conns: hello.conns,
            slots: hello.slots.min(SLOTS_PER_LANE_DEFAULT as u16),
            features: hello.features & feature::KNOWN,
            rebuilt,
            epoch: hello.epoch_seen,
            subdir: hello.subdir.clone(),
            presented: Some(hello.ticket).filter(|&ticket| ticket != Ticket::NONE),
        };
        let opened = self.registry.open(terms, fs).map_err(|reason| match reason {
            Reason::Timeout => refuse(reason, "what was in flight before runs still; come again"),
            Reason::UnknownSession => refuse(reason, "that session is of something else"),
            _ => refuse(reason, "no further session can be opened"),
        });
        let (session, ticket) = opened?;
        let Terms { share, peer, rebuilt, .. } = &session.terms;
        let (id, adopted) = (session.id, session.is_adopted());
        tracing::info!(
            session = id,
            share,
            session.peer = peer,
            rebuilt,
            adopted,
            "session opened"
        );
        Ok((session, ticket))
    }
}

/// Whether the guest will tell what its session was: another daemon's, or another guest's too.
fn is_rebuild(hello: &Hello) -> bool {
    let had_one = hello.ticket != Ticket::NONE || hello.init.is_some();
    had_one && hello.features & feature::RESTORE != 0
}

/// Why there is no HELLO.
enum Unread {
    /// Its bytes are not what the guest sent, or it is none of ours. It hears nothing, which is a
    /// cut to it: it comes again.
    Damaged(String),
    Refused(Refusal),
}

impl From<Refusal> for Unread {
    fn from(refusal: Refusal) -> Unread {
        Unread::Refused(refusal)
    }
}

impl Unread {
    fn answer(self, accepted: &Accepted) {
        match self {
            Unread::Damaged(what) => {
                tracing::warn!(peer = accepted.peer, "no HELLO but damaged bytes: {what}");
            }
            Unread::Refused(refusal) => say_goodbye(accepted, &refusal),
        }
    }
}

/// Whether the bytes are one whole batch.
fn complete(bytes: &[u8]) -> Result<bool, Unread> {
    match peek_len(bytes) {
        Err(error) => Err(Unread::Damaged(error.to_string())),
        Ok(Some(len)) if len > HELLO_BYTES_MAX || bytes.len() > len => {
            Err(Unread::Damaged("more than one HELLO".into()))
        }
        Ok(Some(len)) => Ok(bytes.len() == len),
        Ok(None) => Ok(false),
    }
}

fn read_hello(rx: &mut LinkRx, bytes: &[u8]) -> Result<Hello, Unread> {
    let protocol = |text: String| Unread::Refused(refuse(Reason::Protocol, text));
    let header = rx.accept(bytes, 0).map_err(|error| Unread::Damaged(error.to_string()))?;
    let mut cursor = Cursor::new(&header);
    match (cursor.next(bytes), cursor.next(bytes)) {
        (Some((record, span)), None) if record.kind == Kind::Hello as u8 => {
            let body = &bytes[span][RECORD_HEADER_BYTES..];
            match Hello::versions_of(body) {
                // The rest may be laid out in another way.
                Some((min, max)) if common_version((min, max)).is_none() && min <= max => {
                    let text = format!(
                        "the guest speaks wire versions {min} to {max}, this daemon {VERSION_MIN} \
                         to {VERSION_MAX}"
                    );
                    return Err(refuse(Reason::Version, text).into());
                }
                _ => {}
            }
            Hello::decode(body).map_err(|error| protocol(error.to_string()))
        }
        _ => Err(protocol("the first batch is one HELLO".into())),
    }
}

fn say_goodbye(accepted: &Accepted, refusal: &Refusal) {
    say_no(&accepted.socket, &accepted.peer, refusal);
}

/// Refuses a peer that has not been welcomed.
pub fn say_no(socket: &OwnedFd, peer: &str, refusal: &Refusal) {
    let Refusal { reason, text } = refusal;
    tracing::warn!(peer, ?reason, "refused: {text}");
    let text = &text[..text.floor_char_boundary(GOODBYE_TEXT_BYTES_MAX)];
    let mut tx = LinkTx::new(true);
    send(socket, &mut tx, 1, &[(Kind::Goodbye, *reason as u32, text.as_bytes())]);
}

/// Sends records in a batch of their own: kind, code and body. Small enough for any socket's empty
/// buffer: a peer that cannot take it is given up.
pub fn send(
    socket: &OwnedFd,
    tx: &mut LinkTx,
    received: u64,
    records: &[(Kind, u32, &[u8])],
) -> bool {
    let mut buffer = [0; HELLO_BYTES_MAX];
    let mut builder = BatchBuilder::new();
    for &(kind, code, body) in records {
        let header = RecordHeader { kind: kind as u8, code, ..Default::default() };
        builder.push(&mut buffer, header, body);
    }
    let bytes = tx.seal(&mut builder, &mut buffer, received);
    let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
    rustix::net::send(socket, bytes, flags) == Ok(bytes.len())
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: i64::from(duration.subsec_nanos()) }
}
