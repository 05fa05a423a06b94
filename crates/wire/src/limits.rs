//! Every bound of the wire, and how the bounds relate.
//!
//! Nothing is allocated for a peer before its size was held against one of these.

/// Payload of one READ, WRITE or directory listing.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Room beside a payload: headers, arguments, names, extensions.
pub const FRAME_OVERHEAD_BYTES_MAX: usize = 4096;
/// One record with its header; also the largest FUSE frame, whose header the record's replaces.
pub const RECORD_BYTES_MAX: usize = PAYLOAD_BYTES_MAX + FRAME_OVERHEAD_BYTES_MAX;
/// Bytes of a batch header.
pub const BATCH_HEADER_BYTES: usize = 32;
/// Bytes of a record header.
pub const RECORD_HEADER_BYTES: usize = 16;
/// Records start at multiples of this within a batch.
pub const RECORD_ALIGN: usize = 8;
/// A sender closes a batch that has grown to this; one more record may still lie behind it.
pub const BATCH_TARGET_BYTES: usize = 64 << 10;
/// One batch with its header.
pub const BATCH_BYTES_MAX: usize = BATCH_HEADER_BYTES + BATCH_TARGET_BYTES + RECORD_BYTES_MAX;
/// Records of one batch.
pub const BATCH_RECORDS_MAX: usize = 4096;
/// The head checksum covers this much of each record from its start, the payload checksum the rest.
pub const RECORD_HEAD_BYTES: usize = 256;
/// Node ids that one FORGET record gives back.
pub const FORGETS_PER_RECORD_MAX: usize = 2048;
/// What finds one node again.
pub const RECIPE_BYTES_MAX: usize = 512;
/// Content of one NOTIFY STORE.
pub const STORE_BYTES_MAX: usize = 16 << 10;
/// Body of one NODE record.
pub const NODE_BODY_BYTES_MAX: usize = 96 << 10;
/// Body of one RESTORE record.
pub const RESTORE_BODY_BYTES_MAX: usize = 32 << 10;
/// A connection's first batch, in either direction.
pub const HELLO_BYTES_MAX: usize = 4096;
/// Bytes of a share's name (UTF-8).
pub const SHARE_NAME_BYTES_MAX: usize = 255;
/// Bytes of a sub-directory's path within a share.
pub const SUBDIR_BYTES_MAX: usize = 2048;
/// Bytes of the text of a GOODBYE.
pub const GOODBYE_TEXT_BYTES_MAX: usize = 512;
/// Lanes of one session.
pub const LANES_MAX: usize = 8;
/// Connections of one session.
pub const CONNS_MAX: usize = LANES_MAX;
/// Slots of one lane that a daemon may grant.
pub const SLOTS_PER_LANE_MAX: usize = 1024;
/// Slots of one lane that are asked for and granted by default.
pub const SLOTS_PER_LANE_DEFAULT: usize = 128;

const _: () = {
    assert!(RECORD_BYTES_MAX.is_multiple_of(RECORD_ALIGN));
    assert!(BATCH_HEADER_BYTES.is_multiple_of(RECORD_ALIGN));
    assert!(BATCH_TARGET_BYTES.is_multiple_of(RECORD_ALIGN));
    assert!(BATCH_RECORDS_MAX * RECORD_HEADER_BYTES >= BATCH_TARGET_BYTES);
    assert!(FORGETS_PER_RECORD_MAX * 16 + RECORD_HEADER_BYTES < BATCH_TARGET_BYTES);
    assert!(NODE_BODY_BYTES_MAX + RECORD_HEADER_BYTES < RECORD_BYTES_MAX);
    assert!(RESTORE_BODY_BYTES_MAX + RECORD_HEADER_BYTES < BATCH_TARGET_BYTES);
    assert!(
        HELLO_BYTES_MAX
            >= BATCH_HEADER_BYTES
                + RECORD_HEADER_BYTES
                + 256
                + SHARE_NAME_BYTES_MAX
                + SUBDIR_BYTES_MAX
    );
    assert!(LANES_MAX <= u8::MAX as usize && SLOTS_PER_LANE_MAX <= u16::MAX as usize);
};
