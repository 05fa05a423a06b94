//! A daemon that does not know the session is told of it: RESTORE, before anything else is asked.
//!
//! The connector does it, on the connection of lane 0, while that belongs to nobody else and no
//! lane holds another one: so nothing changes what is told. Invariant: a rebuild that is cut
//! short is done anew on the next connection, from the start. It must not touch requests; each
//! lane sends what it has in flight as on any resume.

use crate::handshake::{HandshakeError, Joined, LIMIT, goodbye_text, io_error};
use crate::known::{Known, Restored};
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader};
use ringfs_wire::hello::Reason;
use ringfs_wire::limits::{
    BATCH_HEADER_BYTES, RECORD_ALIGN, RECORD_HEADER_BYTES, RESTORE_BODY_BYTES_MAX,
};
use rustix::io::Errno;

const BUFFER_BYTES: usize =
    BATCH_HEADER_BYTES + RECORD_HEADER_BYTES + RESTORE_BODY_BYTES_MAX + RECORD_ALIGN;

/// Sends all that is known, the end mark last. The daemon answers nothing, but it may refuse.
pub fn tell(joined: &mut Joined, known: &Known) -> Result<Restored, HandshakeError> {
    joined.socket.set_limit(Some(LIMIT)).map_err(io_error)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut bytes = 0;
    let told = known.restore(|body| {
        bytes += send(joined, &mut buffer, body)? as u64;
        Ok(())
    });
    match told {
        Ok(restored) => {
            joined.socket.set_limit(None).map_err(io_error)?;
            Ok(Restored { bytes, ..restored })
        }
        Err(errno) => Err(refusal(joined).unwrap_or_else(|| io_error(errno))),
    }
}

/// Gives the length of the batch.
fn send(joined: &mut Joined, buffer: &mut [u8], body: &[u8]) -> Result<usize, Errno> {
    let mut builder = BatchBuilder::new();
    let header = RecordHeader { kind: Kind::Restore as u8, ..Default::default() };
    let fits = builder.push(buffer, header, body);
    debug_assert!(fits, "a body of {} bytes", body.len());
    let batch = joined.tx.seal(&mut builder, buffer, joined.rx.received());
    joined.socket.send_all(batch)?;
    Ok(batch.len())
}

/// Why the daemon takes no more, if it has said so.
fn refusal(joined: &mut Joined) -> Option<HandshakeError> {
    while let Ok(bytes @ 1..) = joined.socket.try_receive(joined.deframer.spare()) {
        joined.deframer.filled(bytes);
        while let Some(batch) = joined.deframer.next_batch().ok()? {
            let header = joined.rx.accept(batch, joined.tx.sent()).ok()?;
            let mut cursor = Cursor::new(&header);
            while let Some((record, span)) = cursor.next(batch) {
                if record.kind == Kind::Goodbye as u8 {
                    let text = goodbye_text(&batch[span][RECORD_HEADER_BYTES..]);
                    let reason = Reason::from_u32(record.code);
                    return Some(HandshakeError::Refused { reason, text });
                }
            }
        }
    }
    None
}
