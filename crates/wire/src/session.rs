//! One direction each of one connection: sequence numbers and acknowledgements.
//!
//! The two halves may live on two threads; the only thing that passes between them is a number:
//! [`LinkRx::received`] of the one is the `ack` that the other seals into its batches.

use crate::batch::{self, BATCH_FRONT_BYTES, BatchBuilder, BatchError, BatchHeader, RecordHeader};
use thiserror::Error;

/// Why a received batch ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum LinkError {
    #[error(transparent)]
    Batch(#[from] BatchError),
    #[error(
        "batch {found} where {expected} was due: the transport lost, doubled or reordered data"
    )]
    Sequence { found: u64, expected: u64 },
    #[error("acknowledged {found} batches of {sent} sent")]
    Ack { found: u64, sent: u64 },
}

/// The sending half.
#[derive(Debug)]
pub struct LinkTx {
    sent: u64,
    payload_crc: bool,
}

impl LinkTx {
    /// Before the first batch.
    pub fn new(payload_crc: bool) -> LinkTx {
        LinkTx { sent: 0, payload_crc }
    }

    /// Batches sealed so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// The handshake's result: payload checksums from the next batch on.
    pub fn set_payload_crc(&mut self, on: bool) {
        self.payload_crc = on;
    }

    /// Completes the batch that `builder` made in `buffer`; what is returned must be sent next.
    pub fn seal<'b>(
        &mut self,
        builder: &mut BatchBuilder,
        buffer: &'b mut [u8],
        received: u64,
    ) -> &'b mut [u8] {
        let seq = self.sent;
        self.sent += 1;
        builder.finish(buffer, seq, received, self.payload_crc)
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct LinkRx {
    received: u64,
    acked: u64,
    payload_crc: bool,
}

impl LinkRx {
    /// Before the first batch.
    pub fn new(payload_crc: bool) -> LinkRx {
        LinkRx { received: 0, acked: 0, payload_crc }
    }

    /// Batches accepted so far: what the sending half acknowledges.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Whether payload checksums are checked.
    pub fn has_payload_crc(&self) -> bool {
        self.payload_crc
    }

    /// How many of our batches the peer has processed.
    pub fn acked(&self) -> u64 {
        self.acked
    }

    /// The handshake's result: payload checksums from the next batch on.
    pub fn set_payload_crc(&mut self, on: bool) {
        self.payload_crc = on;
    }

    /// Checks one whole batch; `sent` is how many batches went to the peer on this connection.
    pub fn accept(&mut self, bytes: &[u8], sent: u64) -> Result<BatchHeader, LinkError> {
        let header = batch::verify(bytes, self.payload_crc)?;
        self.check(&header, sent)?;
        self.count(&header);
        Ok(header)
    }

    /// Looks at the front of the next batch; `None`: it is not of one large record, or would not be
    /// accepted. Once its rest is there as well, [`LinkRx::count`] must be called.
    pub fn look_at_front(
        &self,
        front: &[u8; BATCH_FRONT_BYTES],
        sent: u64,
    ) -> Option<(BatchHeader, RecordHeader)> {
        let found = batch::verify_front(front).filter(|_| !self.payload_crc)?;
        self.check(&found.0, sent).ok().map(|()| found)
    }

    /// A batch that [`LinkRx::look_at_front`] has seen is accepted.
    pub fn count(&mut self, header: &BatchHeader) {
        self.received += 1;
        self.acked = header.ack;
    }

    fn check(&self, header: &BatchHeader, sent: u64) -> Result<(), LinkError> {
        if header.seq != self.received {
            return Err(LinkError::Sequence { found: header.seq, expected: self.received });
        }
        if header.ack > sent || header.ack < self.acked {
            return Err(LinkError::Ack { found: header.ack, sent });
        }
        Ok(())
    }
}
