//! The greeter: waits for the HELLO of each new connection, finds or opens the session that it
//! names, and hands the connection to the shard that has it.
//!
//! The only place that reads from a peer that nothing is known of: bounded bytes, bounded time,
//! bounded number at once. Runs on a thread of its own, on the worker's side of the sandbox; what
//! may wait for a share's file system is on further ones, bounded for each share. The bytes
//! themselves: handshake.rs.

use crate::accept::Accepted;
use crate::fs::Fs;
use crate::handshake::{Refusal, is_whole, read_hello, refuse, send};
use crate::limits::*;
use crate::link::Numbers;
use crate::mailbox::Mail;
use crate::registry::{Registry, Shown};
use crate::session::{Session, Terms, let_go};
use crate::shares::{Opening, Share, Shares};
use ringfs_wire::batch::Kind;
use ringfs_wire::hello::{Hello, Reason, Ticket, Welcome, feature, welcome_flag};
use ringfs_wire::limits::*;
use ringfs_wire::session::{LinkRx, LinkTx};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

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
    /// By what it came.
    pub shown: Shown,
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
                        turn_away(&oldest.accepted, &refusal);
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
        let mut chunk = [0; HELLO_BYTES_MAX];
        let read = match ready {
            true => rustix::io::read(&greeting.accepted.socket, &mut chunk),
            false => Err(Errno::AGAIN),
        };
        match read {
            Ok(0) => return None,
            Ok(n) => greeting.bytes.extend_from_slice(&chunk[..n]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return None,
        }
        match is_whole(&greeting.bytes) {
            // Not before what is there was read: it may be we who have stood still.
            Ok(false) if Instant::now() >= greeting.until => {
                let text = format!("no HELLO within {HELLO_TIMEOUT_MS} ms");
                turn_away(&greeting.accepted, &refuse(Reason::Timeout, text));
                None
            }
            Ok(false) => Some(greeting),
            Ok(true) => {
                self.greet(greeting);
                None
            }
            Err(unread) => {
                unread.tell(&greeting.accepted.socket, &greeting.accepted.peer);
                None
            }
        }
    }

    fn greet(self: &Arc<Self>, greeting: Greeting) {
        let Greeting { accepted, bytes, .. } = greeting;
        let mut rx = LinkRx::new(true);
        let hello = match read_hello(&mut rx, &bytes) {
            Ok(hello) => hello,
            Err(unread) => return unread.tell(&accepted.socket, &accepted.peer),
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
            return turn_away(&hailed.accepted, &refuse(Reason::UnknownSession, text));
        }
        if is_rebuild(&hailed.hello) && hailed.hello.conn != 0 {
            return self.ask_for_first(&hailed);
        }
        match self.opening_for(&hailed) {
            Ok(opening) => self.begin_opening(hailed, opening),
            Err(refusal) => turn_away(&hailed.accepted, &refusal),
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

    /// Whether the share may be mounted by who names it, and can be now.
    fn opening_for(&self, hailed: &Hailed) -> Result<Opening, Refusal> {
        let name = &hailed.hello.share;
        let is_offered = hailed.accepted.is_offered(name);
        if is_offered && self.shares.is_away(name) {
            return Err(refuse(Reason::Internal, "the share's directory cannot be had now"));
        }
        let Some(share) = self.shares.find(name).filter(|_| is_offered) else {
            return Err(refuse(Reason::UnknownShare, format!("there is no share {name:?} here")));
        };
        let stuck = "the file system of this share does not answer";
        share.begin_opening().ok_or_else(|| refuse(Reason::Limit, stuck))
    }

    /// Opens a session on a thread of its own: the share's file system may be stuck, and others
    /// have shares that are not.
    fn begin_opening(self: &Arc<Self>, hailed: Hailed, opening: Opening) {
        let greeter = self.clone();
        let thread = std::thread::Builder::new().name("ringfs-open".into());
        let spawned = thread.spawn(move || {
            let session = greeter.open(&hailed, opening.share());
            drop(opening);
            greeter.join(hailed, session);
        });
        if let Err(error) = spawned {
            // The connection went with the closure.
            tracing::error!(%error, "no thread for a new session: the guest is cut off");
        }
    }

    /// Hands the connection to the shard that has it already, or will have it.
    fn join(&self, hailed: Hailed, session: Result<(Arc<Session>, Ticket), Refusal>) {
        let Hailed { accepted, hello, rx } = hailed;
        let (session, ticket) = match session {
            Ok(found) => found,
            Err(refusal) => return turn_away(&accepted, &refusal),
        };
        let shard = self.registry.shard(&session, hello.conn).cloned();
        let Some(shard) = shard.filter(|_| hello.conns == session.terms.conns) else {
            let text = format!("this session has {} connections", session.terms.conns);
            turn_away(&accepted, &refuse(Reason::Protocol, text));
            return let_go(session);
        };
        shard.post(Mail::Join(Box::new(Newcomer {
            socket: accepted.socket,
            peer: accepted.peer,
            session,
            conn: hello.conn,
            version: hello.common_version().unwrap_or_default(),
            shown: Shown { ticket, nth: hello.nth },
            numbers: Numbers { tx: LinkTx::new(true), rx },
        })));
    }

    fn open(&self, hailed: &Hailed, share: &Share) -> Result<(Arc<Session>, Ticket), Refusal> {
        let Hailed { accepted, hello, .. } = hailed;
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
        let fs = Fs::on(root, share.options_for(hello)).map_err(|error| {
            tracing::error!(share = share.name, dir = %share.dir.display(), %error, "cannot serve");
            refuse(Reason::Internal, "the share cannot be served; the daemon's log says why")
        })?;
        if let Some(init) = &hello.init {
            fs.serve_init(init).map_err(|field| refuse(Reason::Incompatible, field))?;
        }
        let opened = self.registry.open(terms_of(hailed), fs).map_err(|reason| match reason {
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

fn terms_of(Hailed { accepted, hello, .. }: &Hailed) -> Terms {
    Terms {
        share: hello.share.clone(),
        peer: accepted.peer.clone(),
        owner: accepted.owner,
        lanes: hello.lanes,
        conns: hello.conns,
        slots: hello.slots.min(SLOTS_PER_LANE_DEFAULT as u16),
        features: hello.features & feature::KNOWN,
        rebuilt: is_rebuild(hello),
        epoch: hello.epoch_seen,
        subdir: hello.subdir.clone(),
        presented: Some(hello.ticket).filter(|&ticket| ticket != Ticket::NONE),
    }
}

/// Whether the guest will tell what its session was: another daemon's, or another guest's too.
fn is_rebuild(hello: &Hello) -> bool {
    let had_one = hello.ticket != Ticket::NONE || hello.init.is_some();
    had_one && hello.features & feature::RESTORE != 0
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: i64::from(duration.subsec_nanos()) }
}

fn turn_away(accepted: &Accepted, refusal: &Refusal) {
    refusal.tell(&accepted.socket, &accepted.peer);
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfs_wire::batch::{BatchBuilder, Cursor, RecordHeader};
    use ringfs_wire::hello::{VERSION_MAX, VERSION_MIN};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    /// What a peer is told that has sent `bytes` when its time was over.
    fn told_late(bytes: &[u8]) -> u32 {
        let registry = Arc::new(Registry::new(Duration::ZERO, None));
        let greeter = Arc::new(Greeter { shares: Arc::default(), registry });
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        ours.set_nonblocking(true).expect("non-blocking");
        theirs.write_all(bytes).expect("sent");
        let (peer, owner, offers) = ("test".to_owned(), 0, Vec::new());
        let accepted = Accepted { socket: ours.into(), peer, owner, offers };
        let until = Instant::now();
        assert!(greeter.go_on(Greeting { accepted, bytes: Vec::new(), until }, true).is_none());
        let mut answer = Vec::new();
        theirs.read_to_end(&mut answer).expect("an answer");
        let header = LinkRx::new(true).accept(&answer, 1).expect("a batch");
        Cursor::new(&header).next(&answer).expect("a GOODBYE").0.code
    }

    #[test]
    fn a_hello_that_is_there_is_not_late() {
        let mut buffer = [0; HELLO_BYTES_MAX];
        let mut builder = BatchBuilder::new();
        let hello = Hello {
            versions: (VERSION_MIN, VERSION_MAX),
            features: 0,
            ticket: Ticket::NONE,
            epoch_seen: 0,
            lanes: 1,
            conn: 0,
            conns: 1,
            slots: 1,
            mount_flags: 0,
            cache: Default::default(),
            share: "none of ours".into(),
            subdir: Vec::new(),
            init: None,
            nth: 0,
        };
        let header = RecordHeader { kind: Kind::Hello as u8, ..Default::default() };
        assert!(builder.push(&mut buffer, header, &hello.encode()));
        let bytes = LinkTx::new(true).seal(&mut builder, &mut buffer, 0);
        assert_eq!(told_late(bytes), Reason::UnknownShare as u32);
        assert_eq!(told_late(&bytes[..20]), Reason::Timeout as u32);
    }
}
