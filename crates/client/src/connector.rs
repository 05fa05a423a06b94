//! The connector: a thread that brings the connections that lanes have lost, one at a time, with
//! the newest ticket; a daemon that does not know the session is told of it first (rebuild.rs).
//!
//! Invariant: whatever becomes of a try, the newest ticket that we were given is the one that is
//! shown next, and is put down for the next client before anything else is done with it. It must
//! not touch requests.

use crate::handshake::{self, HandshakeError, Joined, join};
use crate::keep::Keep;
use crate::known::Restored;
use crate::lane::Lane;
use crate::rebuild;
use crate::rings::with_causes;
use crate::session::{End, Session};
use crate::transport::{Address, ConnectError, Socket};
use ringfs_wire::hello::{Hello, Reason, Ticket, Welcome, feature, welcome_flag};
use std::sync::Arc;
use std::time::Instant;
use thiserror::Error;

/// A daemon that refuses the ticket so often in a row, at first perhaps as it is just letting go
/// of the session, does not have it for us.
const UNKNOWN_MAX: u32 = 2;

/// How the daemon is asked again.
#[derive(Debug)]
pub struct Terms {
    address: Address,
    /// The first HELLO.
    hello: Hello,
    /// The newest WELCOME.
    welcome: Welcome,
    /// A daemon that does not know the session ends the mount.
    is_strict: bool,
    /// The ports that the session has had a connection of, one bit each.
    joined: u8,
    /// A daemon asked for a rebuild and has not been told all.
    is_untold: bool,
    /// So many HELLOs were said.
    hellos: u32,
    /// How often in a row a daemon would not know the session by its ticket.
    unknown: u32,
    /// Where the next client finds them.
    keep: Option<Arc<Keep>>,
}

impl Terms {
    /// After the first connections.
    pub fn new(address: &Address, hello: Hello, welcome: Welcome, is_strict: bool) -> Terms {
        Terms {
            address: address.clone(),
            hello,
            welcome,
            is_strict,
            joined: u8::MAX,
            is_untold: false,
            hellos: 0,
            unknown: 0,
            keep: None,
        }
    }

    /// They are put down there from now on.
    pub fn keeping(self, keep: Arc<Keep>) -> Terms {
        let terms = Terms { keep: Some(keep), ..self };
        terms.put_down(None);
        terms
    }

    /// As another client has left them.
    pub fn inherited(self, keep: Arc<Keep>) -> Terms {
        let kept = keep.terms();
        let (welcome, is_untold) = (kept.welcome, kept.is_untold != 0);
        let (joined, hellos) = (kept.joined as u8, kept.hellos);
        Terms { welcome, is_untold, joined, hellos, keep: Some(keep), ..self }
    }

    /// `unsure`: the connection by which a new ticket may be on its way.
    fn put_down(&self, unsure: Option<u16>) {
        let Some(keep) = &self.keep else { return };
        keep.change(|kept| {
            (kept.welcome, kept.joined) = (self.welcome, self.joined.into());
            (kept.is_untold, kept.hellos) = (self.is_untold.into(), self.hellos);
            kept.trying = unsure.map_or(0, |port| u32::from(port) + 1);
        });
    }

    /// The number of the next one.
    fn count_hello(&mut self) -> u32 {
        self.hellos = self.hellos.saturating_add(1);
        self.hellos
    }

    /// Whether it makes sense to ask for a session of our own instead.
    fn can_begin_anew(&self) -> bool {
        let restores = self.welcome.features & feature::RESTORE != 0;
        restores && !self.is_strict && self.welcome.ticket != Ticket::NONE
    }
}

/// Why one try came to nothing.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ResumeError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(
        "the daemon does not know the session (it was restarted, or the session's grace is over), \
         and the mount is `strict`: mount again"
    )]
    Strict,
    #[error(
        "the daemon does not know the session (it was restarted, or the session's grace is over), \
         and one of the two daemons cannot have it rebuilt: update ringfsd, and mount again"
    )]
    NoRestore,
    #[error("the daemon takes the connection for a new one: update ringfsd")]
    NotResumed,
    #[error("the daemon has other {0} than before")]
    Changed(&'static str),
    #[error("the daemon does not know the session, and grants fewer {0} than it has: mount again")]
    Fewer(&'static str),
    #[error("the mount ends, or no fd is left for another connection")]
    NotBegun,
    #[error("somebody asked for another try")]
    Overtaken,
}

impl ResumeError {
    /// Whether the ticket is no good there: somebody else, a clone of ours, has the session.
    fn is_unknown_session(&self) -> bool {
        let ResumeError::Handshake(HandshakeError::Refused { reason, .. }) = self else {
            return false;
        };
        *reason == Some(Reason::UnknownSession)
    }

    /// Whether the daemon may have welcomed us, and we do not know. `None`: this try says nothing
    /// of it, and one before may have been welcomed.
    fn leaves_unsure(&self) -> Option<bool> {
        match self {
            ResumeError::Connect(_) | ResumeError::NotBegun => None,
            ResumeError::Handshake(HandshakeError::Refused { .. }) => None,
            ResumeError::Handshake(_) => Some(true),
            ResumeError::Strict
            | ResumeError::NoRestore
            | ResumeError::NotResumed
            | ResumeError::Changed(_)
            | ResumeError::Fewer(_)
            | ResumeError::Overtaken => Some(false),
        }
    }

    /// Whether another try makes sense.
    fn is_passing(&self) -> bool {
        match self {
            ResumeError::Connect(_) | ResumeError::NotBegun | ResumeError::Overtaken => true,
            ResumeError::Handshake(error) => match error {
                HandshakeError::Refused { reason, .. } => {
                    reason.is_some_and(|reason| reason.is_passing())
                }
                HandshakeError::Version(_) | HandshakeError::Excess(_) => false,
                HandshakeError::Timeout
                | HandshakeError::Closed
                | HandshakeError::Io(_)
                | HandshakeError::Link(_)
                | HandshakeError::Hello(_)
                | HandshakeError::TooLong(_)
                | HandshakeError::Unexpected(_) => true,
            },
            ResumeError::Strict
            | ResumeError::NoRestore
            | ResumeError::NotResumed
            | ResumeError::Changed(_)
            | ResumeError::Fewer(_) => false,
        }
    }
}

/// The connector's thread: until the session is over.
pub fn run(session: &Session, mut terms: Terms) {
    let mut has_told = false;
    while let Some(port) = session.resume.next_job() {
        let tried = resume(session, &mut terms, port);
        let is_unsure = tried.as_ref().map_or_else(ResumeError::leaves_unsure, |()| Some(false));
        let unsure = session.resume.end_unsure(port, is_unsure);
        terms.put_down(unsure);
        match tried {
            Ok(()) => {
                session.lanes[usize::from(port)].kick();
                session.notify();
                terms.unknown = 0;
                has_told &= session.resume.outlook().missing > 0;
            }
            Err(ResumeError::Overtaken) => {}
            Err(error) if error.is_unknown_session() && terms.can_begin_anew() => {
                terms.unknown += 1;
                if terms.unknown == UNKNOWN_MAX {
                    tracing::warn!("the session is another guest's: asking for one of our own");
                    session.resume.leave_old_daemon(true);
                    terms.welcome.ticket = Ticket::NONE;
                    terms.put_down(None);
                }
            }
            Err(error) if error.is_passing() => {
                let why = with_causes(&error);
                // The first of an outage; the others would say the same.
                match std::mem::replace(&mut has_told, true) {
                    false => tracing::warn!(why, "no new connection yet; trying on"),
                    true => tracing::debug!(why, "no new connection yet"),
                }
            }
            Err(error) => return session.end(End::NotResumed(error)),
        }
    }
}

/// One try.
fn resume(session: &Session, terms: &mut Terms, port: u16) -> Result<(), ResumeError> {
    let resume = &session.resume;
    let begun = Instant::now();
    let socket = Socket::connect(&terms.address, handshake::LIMIT)?;
    if !resume.begin_try(&socket) {
        return Err(ResumeError::NotBegun);
    }
    let hello = Hello {
        ticket: terms.welcome.ticket,
        epoch_seen: terms.welcome.epoch,
        conn: port,
        init: session.agreed().map(|agreed| agreed.served),
        nth: terms.count_hello(),
        // What is in force: another daemon may know more.
        features: terms.welcome.features,
        ..terms.hello.clone()
    };
    terms.put_down(Some(port));
    let mut joined = match join(socket, &hello) {
        Ok(joined) => joined,
        Err(error) => {
            resume.end_try(port, None);
            return Err(error.into());
        }
    };
    let welcome = joined.welcome;
    let used = Used { lanes: session.lanes.len() as u16, slots: session.lanes[0].slots() };
    let is_rebuild = check_terms(terms, port, used, &welcome)?;
    // Whatever becomes of this connection: the daemon may know the new ticket alone by now.
    terms.welcome = welcome;
    terms.put_down(None);
    if is_rebuild && let Err(error) = rebuild(session, terms, port, &mut joined, begun) {
        resume.end_try(port, None);
        return Err(error);
    }
    terms.is_untold = false;
    terms.joined |= 1 << port;
    session.lanes[usize::from(port)].is_of(joined.session);
    match resume.end_try(port, Some(joined)) {
        true => {
            session.lanes[usize::from(port)].renew();
            Ok(())
        }
        false => Err(ResumeError::Overtaken),
    }
}

/// Tells the daemon of the session; the connection is that of lane 0 and goes on, or is of no use.
fn rebuild(
    session: &Session,
    terms: &mut Terms,
    port: u16,
    joined: &mut Joined,
    begun: Instant,
) -> Result<(), ResumeError> {
    (terms.is_untold, terms.joined) = (true, 0);
    terms.put_down(None);
    let is_first = port == 0;
    // What lanes still take from old connections would be told wrongly.
    if !session.resume.leave_old_daemon(!is_first) || !is_first {
        return Err(ResumeError::Overtaken);
    }
    session.lanes.iter().for_each(Lane::doubt);
    let restored = rebuild::tell(joined, &session.known)?;
    let took_us = begun.elapsed().as_micros() as u64;
    let restored = Restored { took_us, ..restored };
    session.resume.has_told(restored);
    Ok(())
}

/// What the mount has of its terms.
#[derive(Clone, Copy)]
struct Used {
    lanes: u16,
    slots: u16,
}

/// Whether the session is to be rebuilt; an error: it cannot go on.
fn check_terms(terms: &Terms, port: u16, used: Used, now: &Welcome) -> Result<bool, ResumeError> {
    let before = &terms.welcome;
    let is_rebuild = now.flags & welcome_flag::REBUILD != 0;
    let is_resumed = now.flags & welcome_flag::RESUMED != 0;
    let is_first_join = !is_resumed && terms.joined >> port & 1 == 0;
    if is_rebuild && terms.is_strict {
        return Err(ResumeError::Strict);
    }
    if is_rebuild && before.features & now.features & feature::RESTORE == 0 {
        return Err(ResumeError::NoRestore);
    }
    // Who was not told all does not go on as if.
    // A daemon that was not told all does not resume by the first connection: the client before us
    // had no time to put down that it had told it.
    let is_untold = terms.is_untold && !(is_resumed && port == 0);
    if !is_rebuild && (is_untold || !is_resumed && !is_first_join) {
        return Err(ResumeError::NotResumed);
    }
    let same = |is_same: bool, what| if is_same { Ok(()) } else { Err(ResumeError::Changed(what)) };
    same(before.version == now.version, "versions")?;
    // A daemon that stores nothing does no harm.
    same((before.features ^ now.features) & !feature::STORE == 0, "features")?;
    if is_rebuild {
        let enough =
            |is_enough: bool, what| if is_enough { Ok(()) } else { Err(ResumeError::Fewer(what)) };
        enough(now.lanes >= used.lanes && now.conns >= used.lanes, "lanes")?;
        enough(now.slots >= used.slots, "slots")?;
        return Ok(true);
    }
    same(before.lanes == now.lanes && before.conns == now.conns, "lanes")?;
    same(before.slots == now.slots, "slots")?;
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfs_wire::hello::CacheMode;

    fn terms(welcome: Welcome) -> Terms {
        let hello = Hello {
            versions: (1, 1),
            features: welcome.features,
            ticket: welcome.ticket,
            epoch_seen: 0,
            lanes: 2,
            conn: 0,
            conns: 2,
            slots: 8,
            mount_flags: 0,
            cache: CacheMode::Auto,
            share: "s".into(),
            subdir: Vec::new(),
            init: None,
            nth: 0,
        };
        Terms::new(&Address::Unix("/s".into()), hello, welcome, false)
    }

    #[test]
    fn terms_that_cannot_go_on() {
        let (flags, features) = (welcome_flag::RESUMED, feature::RESTORE);
        let before = Welcome {
            version: 1,
            lanes: 2,
            slots: 8,
            conns: 2,
            flags,
            features,
            ..Welcome::default()
        };
        let plain = terms(before);
        let check = |terms: &Terms, now: Welcome, expected: Result<bool, &str>| {
            let used = Used { lanes: 2, slots: 8 };
            let found = check_terms(terms, 1, used, &now).map_err(|error| {
                assert!(!error.is_passing());
                error.to_string()
            });
            match (&found, expected) {
                (Ok(is_rebuild), expected) => assert_eq!(Ok(*is_rebuild), expected),
                (Err(text), Err(part)) => assert!(text.contains(part), "{text}"),
                (Err(text), Ok(_)) => panic!("{text}"),
            }
        };
        check(&plain, Welcome { epoch: 9, ..before }, Ok(false));
        check(&plain, Welcome { flags: 0, ..before }, Err("update ringfsd"));
        check(&plain, Welcome { slots: 7, ..before }, Err("other slots"));
        check(&plain, Welcome { lanes: 1, ..before }, Err("other lanes"));
        check(&plain, Welcome { features: 3, ..before }, Err("other features"));
        let with_store = Welcome { features: features | feature::STORE, ..before };
        check(&plain, with_store, Ok(false));
        check(&terms(with_store), before, Ok(false));

        let rebuild = Welcome { flags: welcome_flag::REBUILD, ..before };
        check(&plain, rebuild, Ok(true));
        check(&plain, Welcome { lanes: 3, conns: 3, slots: 9, ..rebuild }, Ok(true));
        check(&plain, Welcome { lanes: 1, conns: 1, ..rebuild }, Err("fewer lanes"));
        check(&plain, Welcome { conns: 1, ..rebuild }, Err("fewer lanes"));
        check(&plain, Welcome { slots: 7, ..rebuild }, Err("fewer slots"));
        check(&plain, Welcome { features: 0, ..rebuild }, Err("cannot have it rebuilt"));
        check(&plain, Welcome { features: 3, ..rebuild }, Err("other features"));
        let old = terms(Welcome { features: 0, ..before });
        check(&old, rebuild, Err("cannot have it rebuilt"));
        check(&Terms { is_strict: true, ..terms(before) }, rebuild, Err("`strict`"));

        // After a rebuild the other connections join as those of a new session do, once.
        let told = |joined| Terms { joined, ..terms(rebuild) };
        check(&told(1), Welcome { flags: 0, ..before }, Ok(false));
        check(&told(1), before, Ok(false));
        check(&told(3), Welcome { flags: 0, ..before }, Err("update ringfsd"));
        let untold = || Terms { is_untold: true, ..told(0) };
        check(&untold(), rebuild, Ok(true));
        for flags in [0, welcome_flag::RESUMED] {
            check(&untold(), Welcome { flags, ..before }, Err("update ringfsd"));
        }
        // The client before this one was killed when it had told all.
        let used = Used { lanes: 2, slots: 8 };
        assert!(matches!(check_terms(&untold(), 0, used, &before), Ok(false)));
    }

    #[test]
    fn refusals_that_pass() {
        let refused = |reason| HandshakeError::Refused { reason, text: String::new() };
        for (error, expected) in [
            (refused(Some(Reason::Shutdown)), true),
            (refused(Some(Reason::Limit)), true),
            (refused(Some(Reason::UnknownSession)), false),
            (refused(Some(Reason::Denied)), false),
            (refused(None), false),
            (HandshakeError::Timeout, true),
            (HandshakeError::Closed, true),
            (HandshakeError::Version(9), false),
        ] {
            let error = ResumeError::from(error);
            assert_eq!(error.is_passing(), expected, "{error}");
        }
    }
}
