//! The bytes of a handshake: the first batch of a connection, and what is sent before there is a
//! link.
//!
//! Invariant: what comes in was verified as a whole before anything of it is read, and what goes
//! out fits a socket's empty buffer: nobody waits here.

use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader, peek_len};
use ringfs_wire::hello::{Hello, Reason, VERSION_MAX, VERSION_MIN, common_version};
use ringfs_wire::limits::*;
use ringfs_wire::session::{LinkRx, LinkTx};
use std::os::fd::OwnedFd;

/// What a refused peer is told.
pub(crate) struct Refusal {
    reason: Reason,
    /// For people.
    text: String,
}

/// A refusal.
pub(crate) fn refuse(reason: Reason, text: impl Into<String>) -> Refusal {
    Refusal { reason, text: text.into() }
}

impl Refusal {
    /// Tells a peer that has not been welcomed.
    pub(crate) fn tell(&self, socket: &OwnedFd, peer: &str) {
        let Refusal { reason, text } = self;
        tracing::warn!(peer, ?reason, "refused: {text}");
        let text = &text[..text.floor_char_boundary(GOODBYE_TEXT_BYTES_MAX)];
        let mut tx = LinkTx::new(true);
        send(socket, &mut tx, 1, &[(Kind::Goodbye, *reason as u32, text.as_bytes())]);
    }
}

/// Why there is no HELLO.
pub(crate) enum Unread {
    /// Its bytes are not what the guest sent, or it is none of ours. It hears nothing, which is a
    /// cut to it: it comes again.
    Damaged(String),
    /// It is a HELLO, or should be one.
    Refused(Refusal),
}

impl From<Refusal> for Unread {
    fn from(refusal: Refusal) -> Unread {
        Unread::Refused(refusal)
    }
}

impl Unread {
    /// Tells a peer that sent no HELLO.
    pub(crate) fn tell(&self, socket: &OwnedFd, peer: &str) {
        match self {
            Unread::Damaged(what) => tracing::warn!(peer, "no HELLO but damaged bytes: {what}"),
            Unread::Refused(refusal) => refusal.tell(socket, peer),
        }
    }
}

/// Whether the bytes are one whole batch.
pub(crate) fn is_whole(bytes: &[u8]) -> Result<bool, Unread> {
    match peek_len(bytes) {
        Err(error) => Err(Unread::Damaged(error.to_string())),
        Ok(Some(len)) if len > HELLO_BYTES_MAX || bytes.len() > len => {
            Err(Unread::Damaged("more than one HELLO".into()))
        }
        Ok(Some(len)) => Ok(bytes.len() == len),
        Ok(None) => Ok(false),
    }
}

/// The HELLO of a batch that is whole.
pub(crate) fn read_hello(rx: &mut LinkRx, bytes: &[u8]) -> Result<Hello, Unread> {
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

/// Sends records in a batch of their own: kind, code and body. Small enough for any socket's empty
/// buffer: a peer that cannot take it is given up.
pub(crate) fn send(
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
