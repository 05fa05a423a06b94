//! A batch: what one send carries. A header, then records, all little endian.
//!
//! ```text
//!  0        4        6        8        16       24          28            32
//!  | len    | magic  | count  | seq    | ack    | head_crc  | payload_crc | records ...
//!
//!  a record, at a multiple of 8:
//!  0        4      5      6      8           12     16
//!  | len    | kind | lane | slot | slot_seq  | code | body ... | zeros to a multiple of 8
//! ```
//!
//! `len` counts the header in both. `code` is a REQUEST's opcode, a REPLY's errno, a GOODBYE's
//! reason, a CANCEL's kind. The record header is as long as `fuse_out_header` and as the first
//! three fields of `fuse_in_header`: it is written over them, so frames travel where the kernel
//! wrote them.
//!
//! `head_crc` (CRC32C) covers the batch header without itself and the first
//! [`RECORD_HEAD_BYTES`] of every record; `payload_crc` covers what the records have beyond that,
//! and is 0 where the session does not use it.
//!
//! [`verify`] checks all of it once; [`Cursor`] then walks what was checked.

use crate::limits::*;
use std::ops::Range;
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `RF`, in the fifth and sixth byte of each batch.
pub const BATCH_MAGIC: u16 = u16::from_le_bytes(*b"RF");

/// What the head checksum covers of a batch of one large record.
pub const BATCH_FRONT_BYTES: usize = BATCH_HEADER_BYTES + RECORD_HEAD_BYTES;

/// Heads a batch.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct BatchHeader {
    /// Bytes of the batch, this header included.
    pub len: u32,
    /// [`BATCH_MAGIC`].
    pub magic: u16,
    /// Number of records.
    pub count: u16,
    /// Position of this batch on its connection and direction, from 0.
    pub seq: u64,
    /// How many of the peer's batches on this connection the sender has processed.
    pub ack: u64,
    /// CRC32C of the header (without this field) and of the head of every record.
    pub head_crc: u32,
    /// CRC32C of what the records have beyond their heads, or 0.
    pub payload_crc: u32,
}

/// Heads a record.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct RecordHeader {
    /// Bytes of the record, this header included, the padding not.
    pub len: u32,
    /// A [`Kind`].
    pub kind: u8,
    /// The lane that owns `slot`.
    pub lane: u8,
    /// The slot that the request occupies.
    pub slot: u16,
    /// How often the slot was used before, wrapping.
    pub slot_seq: u32,
    /// Opcode, errno, reason or kind of CANCEL; 0 for other records.
    pub code: u32,
}

const _: () = assert!(size_of::<BatchHeader>() == BATCH_HEADER_BYTES);
const _: () = assert!(size_of::<RecordHeader>() == RECORD_HEADER_BYTES);

/// What a record is. Numbers from 128 up are optional: who does not know them skips them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Guest: opens a session, or joins or resumes one.
    Hello = 1,
    /// Host: the session's terms.
    Welcome = 2,
    /// Guest: a FUSE request.
    Request = 3,
    /// Host: its answer.
    Reply = 4,
    /// Guest: node ids given back; answered by an empty REPLY.
    Forget = 5,
    /// Guest: nobody waits for the request in that slot any more; `code` is one of [`cancel`].
    Cancel = 6,
    /// Host: what rebuilds a node elsewhere.
    Node = 7,
    /// Guest: nodes and handles of a session that a new daemon takes over.
    Restore = 8,
    /// Host: a notification for the guest's kernel.
    Notify = 9,
    /// Either: are you there?
    Ping = 10,
    /// Either: yes.
    Pong = 11,
    /// Either: the end, with a reason.
    Goodbye = 12,
    /// Guest: the request of that use of a slot, which comes next, may have run before.
    Unsure = 128,
    /// Host, behind a WELCOME: what its log calls the session, a u64.
    Session = 129,
}

impl Kind {
    /// `None` for a number that this version does not know.
    pub const fn from_u8(value: u8) -> Option<Kind> {
        Some(match value {
            1 => Kind::Hello,
            2 => Kind::Welcome,
            3 => Kind::Request,
            4 => Kind::Reply,
            5 => Kind::Forget,
            6 => Kind::Cancel,
            7 => Kind::Node,
            8 => Kind::Restore,
            9 => Kind::Notify,
            10 => Kind::Ping,
            11 => Kind::Pong,
            12 => Kind::Goodbye,
            128 => Kind::Unsure,
            129 => Kind::Session,
            _ => return None,
        })
    }

    /// Whether an unknown kind may be skipped.
    pub const fn is_optional(value: u8) -> bool {
        value >= 128
    }
}

/// The code of a CANCEL.
pub mod cancel {
    /// A FUSE_INTERRUPT: the reply is awaited all the same, and may be EINTR.
    pub const INTERRUPT: u32 = 0;
    /// ABANDON: nobody will take the reply. Answered by a REPLY with EINTR; docs/sessions.md.
    pub const ABANDON: u32 = 1;
}

/// The code of a NOTIFY. Others are skipped.
pub mod notify {
    /// GIVE_BACK: nodes, by their ids (u64), that nobody has used lately and the daemon would like
    /// to have back, as FORGETs. A wish: lost with its connection, and answered by nothing else.
    pub const GIVE_BACK: u32 = 1;
    /// STORE: what a file held when an OPEN was executed whose REPLY comes next, for the guest's
    /// page cache: `fuse_notify_store_out`, and the bytes. Lost with its connection: then they are
    /// read.
    pub const STORE: u32 = 2;
}

/// Why bytes are no batch. All of them end the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum BatchError {
    #[error("not a ringfs batch (magic {0:#06x}); does the peer speak ringfs?")]
    Magic(u16),
    #[error("batch of {0} bytes (bounds: {BATCH_HEADER_BYTES} to {BATCH_BYTES_MAX})")]
    Length(u32),
    #[error("batch of {0} records (at most {BATCH_RECORDS_MAX})")]
    Count(u16),
    #[error("record of {len} bytes at offset {offset} does not fit its batch")]
    Record { offset: usize, len: u32 },
    #[error("{0} bytes behind the last record of a batch")]
    Trailing(usize),
    #[error("head checksum {found:#010x}, computed {computed:#010x}")]
    HeadCrc { found: u32, computed: u32 },
    #[error("payload checksum {found:#010x}, computed {computed:#010x}")]
    PayloadCrc { found: u32, computed: u32 },
}

/// The length of the batch that `bytes` begin with, or `None` while too few bytes are there.
pub fn peek_len(bytes: &[u8]) -> Result<Option<usize>, BatchError> {
    let Some((head, _)) = bytes.split_first_chunk::<8>() else { return Ok(None) };
    let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
    let magic = u16::from_le_bytes([head[4], head[5]]);
    if magic != BATCH_MAGIC {
        return Err(BatchError::Magic(magic));
    }
    if !(BATCH_HEADER_BYTES..=BATCH_BYTES_MAX).contains(&(len as usize)) {
        return Err(BatchError::Length(len));
    }
    Ok(Some(len as usize))
}

/// Checks one whole batch: bounds of every record, and the checksums.
pub fn verify(bytes: &[u8], payload_crc: bool) -> Result<BatchHeader, BatchError> {
    let short = BatchError::Length(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    let (header, _) = BatchHeader::read_from_prefix(bytes).map_err(|_| short)?;
    if peek_len(bytes)? != Some(bytes.len()) {
        return Err(BatchError::Length(header.len));
    }
    if header.count as usize > BATCH_RECORDS_MAX {
        return Err(BatchError::Count(header.count));
    }
    let mut at = BATCH_HEADER_BYTES;
    for _ in 0..header.count {
        let outside = |len| BatchError::Record { offset: at, len };
        let (record, _) = RecordHeader::read_from_prefix(&bytes[at..]).map_err(|_| outside(0))?;
        let len = record.len as usize;
        if !(RECORD_HEADER_BYTES..=RECORD_BYTES_MAX).contains(&len)
            || len.next_multiple_of(RECORD_ALIGN) > bytes.len() - at
        {
            return Err(outside(record.len));
        }
        at += len.next_multiple_of(RECORD_ALIGN);
    }
    if at != bytes.len() {
        return Err(BatchError::Trailing(bytes.len() - at));
    }
    let crcs = checksums(bytes, header.count, payload_crc);
    if header.payload_crc != crcs.payload {
        let (found, computed) = (header.payload_crc, crcs.payload);
        return Err(BatchError::PayloadCrc { found, computed });
    }
    let computed = crcs.head(bytes);
    if header.head_crc != computed {
        return Err(BatchError::HeadCrc { found: header.head_crc, computed });
    }
    Ok(header)
}

/// The headers of a batch of one large record without padding or payload checksum, of which the
/// front is there; `None`: it is another one, or is harmed.
pub fn verify_front(front: &[u8; BATCH_FRONT_BYTES]) -> Option<(BatchHeader, RecordHeader)> {
    let (header, rest) = BatchHeader::read_from_prefix(front).ok()?;
    let (record, _) = RecordHeader::read_from_prefix(rest).ok()?;
    let len = record.len as usize;
    let fits = (RECORD_HEAD_BYTES..=RECORD_BYTES_MAX).contains(&len)
        && len.is_multiple_of(RECORD_ALIGN)
        && peek_len(front) == Ok(Some(BATCH_HEADER_BYTES + len));
    let heads = crc32c::crc32c(&front[BATCH_HEADER_BYTES..]);
    let is_whole = header.head_crc == Checksums { heads, payload: 0 }.head(front);
    (fits && is_whole && header.count == 1 && header.payload_crc == 0).then_some((header, record))
}

/// Walks the records of a batch that [`verify`] accepted. It holds no borrow, so that a record may
/// be rewritten where it lies before the next one is taken.
#[derive(Clone, Debug)]
pub struct Cursor {
    at: usize,
    left: u16,
}

impl Cursor {
    /// Before the first record.
    pub fn new(header: &BatchHeader) -> Cursor {
        Cursor { at: BATCH_HEADER_BYTES, left: header.count }
    }

    /// The next record's header and its place in `bytes`, header included.
    pub fn next(&mut self, bytes: &[u8]) -> Option<(RecordHeader, Range<usize>)> {
        self.left = self.left.checked_sub(1)?;
        let (header, _) = RecordHeader::read_from_prefix(bytes.get(self.at..)?).ok()?;
        let span = self.at..self.at + header.len as usize;
        self.at = span.end.next_multiple_of(RECORD_ALIGN);
        Some((header, span))
    }
}

/// Puts records into a lent buffer; the buffer is passed to each call and must be the same one
/// until [`BatchBuilder::finish`].
#[derive(Debug)]
pub struct BatchBuilder {
    len: usize,
    count: u16,
}

impl Default for BatchBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl BatchBuilder {
    /// An empty batch.
    pub const fn new() -> BatchBuilder {
        BatchBuilder { len: BATCH_HEADER_BYTES, count: 0 }
    }

    /// Walks the records so far.
    pub const fn records(&self) -> Cursor {
        Cursor { at: BATCH_HEADER_BYTES, left: self.count }
    }

    /// Whether no record was added.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes so far, the header included.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether the batch ought to be sent before another record is added.
    pub const fn is_due(&self) -> bool {
        self.len >= BATCH_HEADER_BYTES + BATCH_TARGET_BYTES
            || self.count as usize >= BATCH_RECORDS_MAX
    }

    /// Where the next record goes: whoever fills it leaves the first [`RECORD_HEADER_BYTES`] to
    /// [`BatchBuilder::commit`].
    pub fn spare<'b>(&self, buffer: &'b mut [u8]) -> &'b mut [u8] {
        buffer.get_mut(self.len..).unwrap_or_default()
    }

    /// Adds the record whose body stands in the spare room; `header.len` must count it all.
    ///
    /// # Panics
    /// When the record is outside the bounds or the buffer: our bug, never a peer's doing.
    pub fn commit(&mut self, buffer: &mut [u8], header: RecordHeader) {
        let len = header.len as usize;
        assert!((RECORD_HEADER_BYTES..=RECORD_BYTES_MAX).contains(&len), "record of {len} bytes");
        assert!(!self.is_due(), "a record behind a batch that is due");
        let padded = len.next_multiple_of(RECORD_ALIGN);
        let spare = &mut buffer[self.len..self.len + padded];
        spare[..RECORD_HEADER_BYTES].copy_from_slice(header.as_bytes());
        spare[len..].fill(0);
        self.len += padded;
        self.count += 1;
    }

    /// Copies a record in, if `buffer` has the room.
    pub fn push(&mut self, buffer: &mut [u8], header: RecordHeader, body: &[u8]) -> bool {
        let len = RECORD_HEADER_BYTES + body.len();
        if len.next_multiple_of(RECORD_ALIGN) > buffer.len().saturating_sub(self.len) {
            return false;
        }
        self.spare(buffer)[RECORD_HEADER_BYTES..len].copy_from_slice(body);
        self.commit(buffer, RecordHeader { len: len as u32, ..header });
        true
    }

    /// Writes the batch's header; the builder is empty again. What is returned can be sent.
    pub fn finish<'b>(
        &mut self,
        buffer: &'b mut [u8],
        seq: u64,
        ack: u64,
        payload_crc: bool,
    ) -> &'b mut [u8] {
        let done = std::mem::take(self);
        let bytes = &mut buffer[..done.len];
        let mut header = BatchHeader {
            len: done.len as u32,
            magic: BATCH_MAGIC,
            count: done.count,
            seq,
            ack,
            head_crc: 0,
            payload_crc: 0,
        };
        let crcs = checksums(bytes, done.count, payload_crc);
        header.payload_crc = crcs.payload;
        bytes[..BATCH_HEADER_BYTES].copy_from_slice(header.as_bytes());
        header.head_crc = crcs.head(bytes);
        bytes[..BATCH_HEADER_BYTES].copy_from_slice(header.as_bytes());
        bytes
    }
}

struct Checksums {
    heads: u32,
    payload: u32,
}

impl Checksums {
    /// The head checksum: of the records' heads, then of the batch header around its own field.
    fn head(&self, bytes: &[u8]) -> u32 {
        let crc = crc32c::crc32c_append(self.heads, &bytes[..24]);
        crc32c::crc32c_append(crc, &bytes[28..32])
    }
}

fn checksums(bytes: &[u8], count: u16, payload_crc: bool) -> Checksums {
    let mut crcs = Checksums { heads: 0, payload: 0 };
    let mut cursor = Cursor { at: BATCH_HEADER_BYTES, left: count };
    while let Some((_, span)) = cursor.next(bytes) {
        let record = &bytes[span];
        let (head, rest) = record.split_at(record.len().min(RECORD_HEAD_BYTES));
        crcs.heads = crc32c::crc32c_append(crcs.heads, head);
        if payload_crc && !rest.is_empty() {
            crcs.payload = crc32c::crc32c_append(crcs.payload, rest);
        }
    }
    crcs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(bodies: &[usize], payload_crc: bool) -> Vec<u8> {
        let mut buffer = vec![0xAA; BATCH_BYTES_MAX];
        let mut builder = BatchBuilder::new();
        for (i, &n) in bodies.iter().enumerate() {
            let header = RecordHeader {
                kind: Kind::Request as u8,
                slot: i as u16,
                code: 15,
                ..Default::default()
            };
            let body: Vec<u8> = (0..n).map(|b| b as u8).collect();
            assert!(builder.push(&mut buffer, header, &body));
        }
        builder.finish(&mut buffer, 7, 3, payload_crc).to_vec()
    }

    #[test]
    fn what_is_built_verifies_and_reads_back() {
        for bodies in [&[][..], &[0], &[1, 2, 3], &[24, 1 << 20], &[300, 0, 65_000, 1 << 20]] {
            for payload_crc in [false, true] {
                let bytes = sample(bodies, payload_crc);
                let header = verify(&bytes, payload_crc).expect("built by us");
                assert_eq!((header.seq, header.ack), (7, 3));
                let mut cursor = Cursor::new(&header);
                for (i, &n) in bodies.iter().enumerate() {
                    let (record, span) = cursor.next(&bytes).expect("counted");
                    assert_eq!((record.slot, record.code), (i as u16, 15));
                    assert_eq!(span.len(), RECORD_HEADER_BYTES + n);
                    assert!(
                        bytes[span.start + 16..span.end]
                            .iter()
                            .enumerate()
                            .all(|(b, &v)| v == b as u8)
                    );
                }
                assert!(cursor.next(&bytes).is_none());
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = sample(&[5, 700, 24], true);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // Padding carries nothing, so it is not covered.
            let noticed = verify(&bad, true).is_err();
            let padding = [32 + 21..32 + 24, 56 + 716..56 + 720];
            let in_padding = padding.iter().any(|p| p.contains(&(bit / 8)));
            assert_eq!(noticed, !in_padding, "bit {bit}");
        }
    }

    #[test]
    fn the_front_of_one_large_record_is_known() {
        let front = |bytes: &[u8]| *bytes.first_chunk().expect("a front");
        let bytes = sample(&[1 << 20], false);
        let (header, record) = verify_front(&front(&bytes)).expect("built by us");
        assert_eq!(header, verify(&bytes, false).expect("built by us"));
        assert_eq!((record.len, record.code), ((1 << 20) + 16, 15));
        for bit in 0..BATCH_FRONT_BYTES * 8 {
            let mut bad = front(&bytes);
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(verify_front(&bad), None, "bit {bit}");
        }
        for others in [&[300, 8][..], &[301], &[8, 300]] {
            assert_eq!(verify_front(&front(&sample(others, false))), None, "{others:?}");
        }
        assert_eq!(verify_front(&front(&sample(&[1 << 20], true))), None);
        assert!(verify_front(&front(&sample(&[240], false))).is_some());
    }

    #[test]
    fn impossible_lengths_are_refused() {
        let check = |edit: &dyn Fn(&mut Vec<u8>), expected: BatchError| {
            let mut bytes = sample(&[8, 8], false);
            edit(&mut bytes);
            assert_eq!(verify(&bytes, false).err(), Some(expected));
        };
        check(&|b| b.truncate(16), BatchError::Length(16));
        check(&|b| b.truncate(40), BatchError::Length(80));
        check(&|b| b[4] = 0, BatchError::Magic(0x4600));
        check(&|b| b[..4].copy_from_slice(&31u32.to_le_bytes()), BatchError::Length(31));
        check(&|b| b[..4].copy_from_slice(&u32::MAX.to_le_bytes()), BatchError::Length(u32::MAX));
        check(&|b| b[6..8].copy_from_slice(&[0xff, 0xff]), BatchError::Count(0xffff));
        check(&|b| b[6] = 3, BatchError::Record { offset: 80, len: 0 });
        check(&|b| b[6] = 1, BatchError::Trailing(24));
        check(&|b| b[32] = 15, BatchError::Record { offset: 32, len: 15 });
        check(&|b| b[56] = 25, BatchError::Record { offset: 56, len: 25 });
    }

    #[test]
    fn golden_bytes() {
        let mut buffer = [0u8; 128];
        let mut builder = BatchBuilder::new();
        let header = RecordHeader {
            kind: Kind::Reply as u8,
            lane: 2,
            slot: 0x0304,
            slot_seq: 0x0506_0708,
            code: 2,
            len: 0,
        };
        assert!(builder.push(&mut buffer, header, b"abc"));
        let bytes = builder.finish(&mut buffer, 1, 0x0102, true);
        let golden = [
            "38000000524601000100000000000000", // len 56, RF, 1 record, seq 1
            "02010000000000009539332800000000", // ack 0x102, head crc, payload crc
            "13000000040204030807060502000000", // len 19, REPLY, lane 2, slot, slot_seq, ENOENT
            "6162630000000000",                 // abc and padding
        ];
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, golden.concat());
    }
}
