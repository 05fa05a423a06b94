//! The first words on a connection: HELLO, then WELCOME or GOODBYE.
//!
//! Invariant: what comes out is a connection whose two halves and buffer stand right behind the
//! handshake, with terms within what was asked. It must not retry.

use crate::transport::Socket;
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::hello::{
    Hello, HelloError, Reason, VERSION_MAX, VERSION_MIN, Welcome, feature, version_of,
};
use ringfs_wire::limits::{HELLO_BYTES_MAX, RECORD_HEADER_BYTES};
use ringfs_wire::session::{LinkError, LinkRx, LinkTx};
use rustix::io::Errno;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long the whole handshake may take.
pub const LIMIT: Duration = Duration::from_secs(5);

/// A connection after its handshake.
#[derive(Debug)]
pub struct Joined {
    /// The socket; its sends and receives wait without limit now.
    pub socket: Socket,
    /// The sending half.
    pub tx: LinkTx,
    /// The receiving half.
    pub rx: LinkRx,
    /// What was received behind the WELCOME.
    pub deframer: Deframer,
    /// The session's terms.
    pub welcome: Welcome,
    /// What the daemon's log calls the session; 0: it does not say.
    pub session: u64,
}

/// Why there is no session.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum HandshakeError {
    #[error("the daemon did not answer within {} s: is it ringfsd, and alive?", LIMIT.as_secs())]
    Timeout,
    #[error(
        "the peer closed the connection during the handshake: is it ringfsd? (Some VMMs accept for \
         ports that nobody serves)"
    )]
    Closed,
    #[error("the connection failed during the handshake: {0}")]
    Io(Errno),
    #[error("the peer's first answer cannot be read")]
    Link(#[from] LinkError),
    #[error("the peer's first answer cannot be read")]
    Hello(#[from] HelloError),
    #[error(
        "the daemon answers in wire version {0}, and this ringfs speaks {VERSION_MIN} to \
         {VERSION_MAX}: update the older of ringfs and ringfsd"
    )]
    Version(u16),
    #[error("the peer's first answer is {0} bytes (at most {HELLO_BYTES_MAX}): is it ringfsd?")]
    TooLong(usize),
    #[error("the peer's first record has kind {0}, not WELCOME: is it ringfsd?")]
    Unexpected(u8),
    #[error("the daemon grants more {0} than were asked for: update one of the two ends")]
    Excess(&'static str),
    #[error("{}", refusal(*.reason, .text))]
    Refused { reason: Option<Reason>, text: String },
}

/// What a GOODBYE means for the user.
pub fn refusal(reason: Option<Reason>, text: &str) -> String {
    let cure = match reason {
        Some(Reason::Unmounted) => "the daemon dropped the session",
        Some(Reason::Shutdown) => "the daemon is stopping; try again later",
        Some(Reason::Version) => "no common wire version: update the older of ringfs and ringfsd",
        Some(Reason::UnknownShare) => {
            "the daemon has no share of that name: correct it, or start ringfsd with --share \
             NAME=DIR"
        }
        Some(Reason::BadSubdir) => "that sub-directory of the share cannot be served",
        Some(Reason::Denied) => "this guest may not have that share",
        Some(Reason::Limit) => "the daemon is at its limit of sessions, connections or lanes",
        Some(Reason::Protocol) => "the daemon says that we broke the protocol",
        Some(Reason::Timeout) => "the daemon waited too long for us",
        Some(Reason::UnknownSession) => "the daemon does not know this session (any more)",
        Some(Reason::Incompatible) => "the daemon cannot go on with the session as it was",
        Some(Reason::Internal) => "the daemon failed; its log says more",
        None => "the daemon ended it for a reason that this version does not know",
    };
    // The peer's words may hold anything: nothing of them may steer a terminal.
    let text: String = text.chars().filter(|c| !c.is_control()).collect();
    if text.is_empty() { cure.to_owned() } else { format!("{cure} ({text})") }
}

/// Says HELLO on a fresh connection and reads the answer.
pub fn join(socket: Socket, hello: &Hello) -> Result<Joined, HandshakeError> {
    let deadline = Instant::now() + LIMIT;
    let (mut tx, mut rx) = (LinkTx::new(true), LinkRx::new(true));
    let mut buffer = vec![0; HELLO_BYTES_MAX];
    let mut builder = BatchBuilder::new();
    let header = RecordHeader { kind: Kind::Hello as u8, ..Default::default() };
    if !builder.push(&mut buffer, header, &hello.encode()) {
        return Err(HandshakeError::TooLong(hello.encode().len()));
    }
    socket.set_limit(Some(LIMIT)).map_err(io_error)?;
    socket.send_all(tx.seal(&mut builder, &mut buffer, 0)).map_err(io_error)?;
    let mut deframer = Deframer::new();
    let (welcome, session) = loop {
        if let Some(bytes) = deframer.next_batch().map_err(LinkError::from)? {
            if bytes.len() > HELLO_BYTES_MAX {
                return Err(HandshakeError::TooLong(bytes.len()));
            }
            let head = rx.accept(bytes, tx.sent())?;
            let mut cursor = Cursor::new(&head);
            let welcome = answer(cursor.next(bytes).map(|(header, span)| (header, &bytes[span])))?;
            let second = cursor.next(bytes).filter(|(it, _)| it.kind == Kind::Session as u8);
            break (welcome, second.map_or(0, |(_, span)| session_of(&bytes[span])));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(HandshakeError::Timeout);
        }
        socket.set_limit(Some(left)).map_err(io_error)?;
        match socket.receive(deframer.spare()).map_err(io_error)? {
            0 => return Err(HandshakeError::Closed),
            n => deframer.filled(n),
        }
    };
    check_terms(&welcome, hello)?;
    let payload_crc = welcome.features & feature::PAYLOAD_CRC != 0;
    tx.set_payload_crc(payload_crc);
    rx.set_payload_crc(payload_crc);
    socket.set_limit(None).map_err(io_error)?;
    Ok(Joined { socket, tx, rx, deframer, welcome, session })
}

fn session_of(record: &[u8]) -> u64 {
    let body = record.get(RECORD_HEADER_BYTES..).and_then(<[u8]>::first_chunk);
    body.copied().map_or(0, u64::from_le_bytes)
}

fn answer(record: Option<(RecordHeader, &[u8])>) -> Result<Welcome, HandshakeError> {
    let Some((header, bytes)) = record else { return Err(HandshakeError::Unexpected(0)) };
    let body = &bytes[size_of::<RecordHeader>()..];
    match Kind::from_u8(header.kind) {
        Some(Kind::Welcome) => match version_of(body) {
            // The rest may be laid out in another way.
            Some(version) if !(VERSION_MIN..=VERSION_MAX).contains(&version) => {
                Err(HandshakeError::Version(version))
            }
            _ => Ok(Welcome::decode(body)?),
        },
        Some(Kind::Goodbye) => Err(HandshakeError::Refused {
            reason: Reason::from_u32(header.code),
            text: goodbye_text(body),
        }),
        _ => Err(HandshakeError::Unexpected(header.kind)),
    }
}

/// The text of a GOODBYE, whatever bytes it is.
pub fn goodbye_text(body: &[u8]) -> String {
    let bytes = &body[..body.len().min(ringfs_wire::limits::GOODBYE_TEXT_BYTES_MAX)];
    String::from_utf8_lossy(bytes).into_owned()
}

fn check_terms(welcome: &Welcome, hello: &Hello) -> Result<(), HandshakeError> {
    for (granted, asked, what) in [
        (welcome.lanes, hello.lanes, "lanes"),
        (welcome.conns, hello.conns, "connections"),
        (welcome.slots, hello.slots, "slots"),
    ] {
        if granted > asked {
            return Err(HandshakeError::Excess(what));
        }
    }
    if welcome.features & !hello.features != 0 {
        return Err(HandshakeError::Excess("features"));
    }
    Ok(())
}

/// How a handshake fails by that.
pub fn io_error(errno: Errno) -> HandshakeError {
    match errno {
        Errno::AGAIN | Errno::TIMEDOUT => HandshakeError::Timeout,
        Errno::PIPE | Errno::CONNRESET => HandshakeError::Closed,
        errno => HandshakeError::Io(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfs_wire::hello::{CacheMode, Ticket};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use zerocopy::IntoBytes;

    fn hello() -> Hello {
        Hello {
            versions: (1, 1),
            features: 0,
            ticket: Ticket::NONE,
            epoch_seen: 0,
            lanes: 2,
            conn: 0,
            conns: 2,
            slots: 64,
            mount_flags: 0,
            cache: CacheMode::Auto,
            share: "data".into(),
            subdir: Vec::new(),
            init: None,
            nth: 0,
        }
    }

    fn batch(kind: Kind, code: u32, body: &[u8]) -> Vec<u8> {
        let mut buffer = vec![0; 8192];
        let mut builder = BatchBuilder::new();
        let header = RecordHeader { kind: kind as u8, code, ..Default::default() };
        assert!(builder.push(&mut buffer, header, body));
        LinkTx::new(true).seal(&mut builder, &mut buffer, 1).to_vec()
    }

    /// What `join` makes of a peer that reads the HELLO, says `answer` and closes.
    fn join_with(answer: &[u8]) -> Result<Joined, HandshakeError> {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        let answer = answer.to_vec();
        let peer = std::thread::spawn(move || {
            let mut hello = vec![0; 4096];
            let n = theirs.read(&mut hello).expect("hello");
            theirs.write_all(&answer).expect("answer");
            n
        });
        let joined = join(Socket::from_fd(ours.into()), &hello());
        assert!(peer.join().expect("peer") > 64);
        joined
    }

    fn welcome() -> Welcome {
        Welcome {
            version: 1,
            lanes: 2,
            slots: 64,
            conns: 1,
            ticket: Ticket([7; 16]),
            ..Default::default()
        }
    }

    #[test]
    fn a_welcome_is_taken_with_what_follows_it() {
        let mut bytes = batch(Kind::Welcome, 0, welcome().as_bytes());
        bytes.extend_from_slice(b"tail");
        let joined = join_with(&bytes).expect("welcome");
        assert_eq!(joined.welcome, welcome());
        assert_eq!((joined.deframer.pending(), joined.tx.sent(), joined.rx.received()), (4, 1, 1));
    }

    #[test]
    fn bad_answers_are_told_apart() {
        let check = |answer: &[u8], expected: &str| {
            let error = join_with(answer).expect_err(expected);
            let error = format!("{:#}", anyhow::Error::from(error));
            assert!(error.contains(expected), "{error}");
        };
        check(b"", "closed the connection");
        check(b"HTTP/1.1 400 Bad Request\r\n\r\n", "does the peer speak ringfs");
        check(&batch(Kind::Goodbye, 4, b"have: a, b\x1b[2J"), "--share NAME=DIR (have: a, b[2J)");
        check(&batch(Kind::Goodbye, 3, b""), "update the older");
        check(&batch(Kind::Goodbye, 999, b"x"), "does not know (x)");
        check(&batch(Kind::Reply, 0, b""), "kind 4");
        let other = Welcome { version: 7, ..welcome() };
        check(&batch(Kind::Welcome, 0, other.as_bytes()), "answers in wire version 7");
        check(&batch(Kind::Welcome, 0, &[9, 0]), "answers in wire version 9");
        check(&batch(Kind::Welcome, 0, b"\x01\0short"), "too short");
        check(&batch(Kind::Welcome, 0, &[0; 5000]), "5048 bytes");
        let excess = Welcome { slots: 65, ..welcome() };
        check(&batch(Kind::Welcome, 0, excess.as_bytes()), "more slots");
        let excess = Welcome { features: 1, ..welcome() };
        check(&batch(Kind::Welcome, 0, excess.as_bytes()), "more features");
        let mut corrupt = batch(Kind::Welcome, 0, welcome().as_bytes());
        corrupt[50] ^= 1;
        check(&corrupt, "head checksum");
    }

    #[test]
    fn a_daemon_may_say_what_it_calls_the_session() {
        let alone = batch(Kind::Welcome, 0, welcome().as_bytes());
        assert_eq!(join_with(&alone).expect("welcome").session, 0);
        for (name, expected) in [(&7u64.to_le_bytes()[..], 7), (&[1, 2], 0)] {
            let mut buffer = vec![0; 8192];
            let mut builder = BatchBuilder::new();
            for (kind, body) in [(Kind::Welcome, welcome().as_bytes()), (Kind::Session, name)] {
                let header = RecordHeader { kind: kind as u8, ..Default::default() };
                assert!(builder.push(&mut buffer, header, body));
            }
            let both = LinkTx::new(true).seal(&mut builder, &mut buffer, 1).to_vec();
            assert_eq!(join_with(&both).expect("welcome").session, expected);
        }
    }
}
