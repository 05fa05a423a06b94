//! The frames of the requests in flight, by slot, as they were sent: what a resume sends again.
//!
//! A small frame is copied, into a buffer that stays with its slot if it is short: slots that are
//! seldom used would else each hold what one write once took. A large one is not: it is the last
//! record of its batch, and the batch's buffer stays with the slot until the reply, while the
//! lane goes on with another one. Invariant: a slot in use has its frame here from when it is in a
//! batch; what is kept is bounded. It must not do I/O; one thread owns it.

use crate::lift::LIFT_BYTES_MIN;
use ringfs_wire::abi::{InHeader, Opcode, ReadIn};
use ringfs_wire::batch::RecordHeader;
use ringfs_wire::limits::{BATCH_BYTES_MAX, BATCH_TARGET_BYTES, RECORD_HEADER_BYTES};
use std::ops::Range;
use zerocopy::FromBytes;

/// Bytes of frames in flight; with more, requests wait in the park.
pub const KEPT_BYTES_MAX: usize = 16 << 20;
/// A copy's buffer that stays with its slot is no larger.
const SLOT_BYTES_MAX: usize = 1 << 10;
/// Larger ones that stay while no frame is in them.
const SPARE_COPIES_MAX: usize = 8;
/// What a batch's buffer has in memory at least: small frames up to the target, and one more.
const TOUCHED_MIN: usize = 2 * BATCH_TARGET_BYTES;
/// Batch buffers that stay in any case while no frame is in them; as many as were needed at once
/// lately, if those are more.
const SPARE_BUFFERS_MIN: usize = 1;
const SPARE_BUFFERS_MAX: usize = KEPT_BYTES_MAX / BATCH_BYTES_MAX;
/// Lately: in the last so many large frames, and up to as many before them.
const LATELY: usize = 64;

#[derive(Debug)]
enum Place {
    Nothing,
    /// In the slot's buffer.
    Copied,
    /// In the batch that is being made or sent, which has at most one such.
    InBatch(Range<usize>),
    /// In a batch's buffer that is the slot's now.
    Large(Vec<u8>, Range<usize>),
}

#[derive(Debug)]
struct Frame {
    copy: Vec<u8>,
    place: Place,
    is_large_read: bool,
}

/// What one lane has in flight.
#[derive(Debug)]
pub struct Kept {
    frames: Vec<Frame>,
    in_batch: Option<u16>,
    spare: Vec<Vec<u8>>,
    /// Batch buffers that slots have.
    large: usize,
    /// As many as they were at once, at most: in the last whole [`LATELY`], and since.
    peaks: [usize; 2],
    /// Large frames since.
    since: usize,
    /// Buffers of copies that are no slot's.
    copies: Vec<Vec<u8>>,
    /// Of frames in flight.
    bytes: usize,
    /// READs whose replies can be large.
    large_reads: usize,
    /// Of a new batch buffer: room for the largest frame so far, wherever it begins.
    touched: usize,
}

/// What of a frame's header a record's header leaves.
const ARGS_AT: usize = size_of::<InHeader>() - RECORD_HEADER_BYTES;

const PAGE_BYTES: usize = 4096;

/// A buffer for a batch, of which the first `touched` bytes are in memory.
fn batch_buffer(touched: usize) -> Vec<u8> {
    let mut buffer = vec![0; BATCH_BYTES_MAX];
    touch(&mut buffer[..touched]);
    buffer
}

/// Has the pages of a buffer be there before the device is read into it: a client that is killed
/// while the kernel makes one of them fails the request that was being copied (EIO).
pub fn touch(buffer: &mut [u8]) {
    buffer.chunks_mut(PAGE_BYTES).for_each(|page| page[0] = std::hint::black_box(0));
}

fn is_large_read(record: &[u8]) -> bool {
    let Ok((header, body)) = RecordHeader::read_from_prefix(record) else { return false };
    let args = body.get(ARGS_AT..).map(ReadIn::read_from_prefix);
    header.code == Opcode::Read as u32
        && matches!(args, Some(Ok((read, _))) if read.size as usize >= LIFT_BYTES_MIN)
}

impl Kept {
    /// Nothing is in flight.
    pub fn new(slots: u16) -> Kept {
        let frame = || Frame { copy: Vec::new(), place: Place::Nothing, is_large_read: false };
        Kept {
            frames: (0..slots).map(|_| frame()).collect(),
            in_batch: None,
            spare: Vec::new(),
            large: 0,
            peaks: [0; 2],
            since: 0,
            copies: Vec::new(),
            bytes: 0,
            large_reads: 0,
            touched: TOUCHED_MIN,
        }
    }

    /// The first batch's buffer. `is_late`: another client was there before, and so may frames of
    /// any size be at once.
    pub fn first_buffer(&self, is_late: bool) -> Vec<u8> {
        batch_buffer(if is_late { BATCH_BYTES_MAX } else { self.touched })
    }

    /// Whether a READ is in flight whose reply can be large.
    pub fn has_large_reads(&self) -> bool {
        self.large_reads > 0
    }

    /// Whether a further request has to wait.
    pub fn is_full(&self) -> bool {
        self.bytes >= KEPT_BYTES_MAX
    }

    /// The record in `span` of the batch that is being made has taken that slot.
    pub fn keep(&mut self, slot: u16, batch: &[u8], span: Range<usize>) {
        self.release(slot);
        let Some(frame) = self.frames.get_mut(usize::from(slot)) else { return };
        frame.is_large_read = is_large_read(&batch[span.clone()]);
        self.large_reads += usize::from(frame.is_large_read);
        if span.len() > BATCH_TARGET_BYTES {
            let touched = (BATCH_TARGET_BYTES + span.len()).min(BATCH_BYTES_MAX);
            self.touched = self.touched.max(touched);
            self.bytes += BATCH_BYTES_MAX;
            frame.place = Place::InBatch(span);
            self.in_batch = Some(slot);
            return;
        }
        self.bytes += span.len();
        if span.len() > SLOT_BYTES_MAX
            && let Some(copy) = self.copies.pop()
        {
            frame.copy = copy;
        }
        frame.copy.clear();
        if span.len() > SLOT_BYTES_MAX {
            // Not twice as much as is needed, which the next larger one may need.
            frame.copy.reserve_exact(span.len());
        }
        frame.copy.extend_from_slice(&batch[span]);
        frame.place = Place::Copied;
    }

    /// The record that another client had in that slot.
    pub fn adopt(&mut self, slot: u16, record: &[u8]) {
        let mut buffer = match record.len() > BATCH_TARGET_BYTES {
            true => batch_buffer(record.len()),
            false => return self.keep(slot, record, 0..record.len()),
        };
        buffer[..record.len()].copy_from_slice(record);
        self.keep(slot, &buffer, 0..record.len());
        self.retire(&mut buffer);
    }

    /// The batch has left, or never will: its buffer stays with the slot of its large frame, if it
    /// has one, and `buffer` is another one then.
    pub fn retire(&mut self, buffer: &mut Vec<u8>) {
        let Some(slot) = self.in_batch.take() else { return };
        let frame = &mut self.frames[usize::from(slot)];
        if let Place::InBatch(span) = &frame.place {
            let span = span.clone();
            let next = self.spare.pop().unwrap_or_else(|| batch_buffer(self.touched));
            frame.place = Place::Large(std::mem::replace(buffer, next), span);
            self.large += 1;
            self.since += 1;
            self.peaks[1] = self.peaks[1].max(self.large);
            if self.since >= LATELY {
                (self.peaks, self.since) = ([self.peaks[1], self.large], 0);
            }
        }
    }

    /// How many batch buffers there may be, in slots and to spare.
    fn needed(&self) -> usize {
        self.peaks[0].max(self.peaks[1]).clamp(SPARE_BUFFERS_MIN, SPARE_BUFFERS_MAX)
    }

    /// The slot is free, or nobody wants its request any more.
    pub fn release(&mut self, slot: u16) {
        let Some(frame) = self.frames.get_mut(usize::from(slot)) else { return };
        self.large_reads -= usize::from(std::mem::take(&mut frame.is_large_read));
        match std::mem::replace(&mut frame.place, Place::Nothing) {
            Place::Nothing => {}
            Place::Copied => {
                self.bytes -= frame.copy.len();
                if frame.copy.capacity() > SLOT_BYTES_MAX {
                    let copy = std::mem::take(&mut frame.copy);
                    if self.copies.len() < SPARE_COPIES_MAX {
                        self.copies.push(copy);
                    }
                }
            }
            Place::InBatch(_) => {
                self.bytes -= BATCH_BYTES_MAX;
                self.in_batch = None;
            }
            Place::Large(buffer, _) => {
                self.bytes -= BATCH_BYTES_MAX;
                self.large -= 1;
                if self.large + self.spare.len() < self.needed() {
                    self.spare.push(buffer);
                }
            }
        }
    }

    /// The record of a slot, as it was sent; `None` while it is in the batch.
    pub fn record(&self, slot: u16) -> Option<&[u8]> {
        let frame = self.frames.get(usize::from(slot))?;
        match &frame.place {
            Place::Nothing | Place::InBatch(_) => None,
            Place::Copied => Some(&frame.copy),
            Place::Large(buffer, span) => buffer.get(span.clone()),
        }
    }

    /// The lane is idle: gives back what only work needs.
    pub fn shrink(&mut self) {
        self.spare = Vec::new();
        self.copies = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep(kept: &mut Kept, slot: u16, buffer: &mut [u8], span: Range<usize>) {
        buffer[span.clone()].fill((slot as u8).wrapping_add(1));
        kept.keep(slot, buffer, span);
    }

    #[test]
    fn small_frames_are_copied_and_their_buffers_stay() {
        let mut kept = Kept::new(2);
        let mut buffer = batch_buffer(0);
        keep(&mut kept, 1, &mut buffer, 32..112);
        buffer.fill(0);
        kept.retire(&mut buffer);
        assert_eq!(kept.record(1), Some(&[2; 80][..]));
        let place = kept.frames[1].copy.as_ptr();
        kept.release(1);
        assert_eq!((kept.record(1), kept.bytes), (None, 0));
        keep(&mut kept, 1, &mut buffer, 32..112);
        assert_eq!(kept.frames[1].copy.as_ptr(), place, "the same memory");
        assert_eq!(kept.record(0), None);
    }

    #[test]
    fn large_frames_take_their_batch_along() {
        let mut kept = Kept::new(40);
        let mut buffer = batch_buffer(0);
        for slot in 0..40 {
            assert_eq!(kept.is_full(), usize::from(slot) * BATCH_BYTES_MAX >= KEPT_BYTES_MAX);
            keep(&mut kept, slot, &mut buffer, 200..200 + (1 << 20));
            assert_eq!(kept.record(slot), None, "it is still being sent");
            let place = buffer.as_ptr();
            kept.retire(&mut buffer);
            assert_ne!(buffer.as_ptr(), place);
            assert_eq!(buffer.len(), BATCH_BYTES_MAX);
            let record = kept.record(slot).expect("kept");
            assert!(record.len() == 1 << 20 && record.iter().all(|&byte| byte == slot as u8 + 1));
        }
        (0..40).for_each(|slot| kept.release(slot));
        assert_eq!((kept.bytes, kept.spare.len()), (0, SPARE_BUFFERS_MAX));
        kept.shrink();
        assert_eq!(kept.spare.len(), 0);
        let mut pass = |kept: &mut Kept, slots: Range<u16>| {
            for slot in slots.clone() {
                keep(kept, slot, &mut buffer, 200..200 + (1 << 20));
                kept.retire(&mut buffer);
            }
            slots.for_each(|slot| kept.release(slot));
        };
        // Four at a time, and all of their buffers stay; then one: the others go one by one.
        for _ in 0..LATELY {
            pass(&mut kept, 0..4);
        }
        assert_eq!((kept.needed(), kept.spare.len()), (4, 4));
        for passed in 1..=2 * LATELY {
            pass(&mut kept, 0..1);
            assert!(kept.spare.len() == 4 || passed > LATELY, "{passed}");
        }
        assert_eq!((kept.needed(), kept.spare.len(), kept.large), (1, SPARE_BUFFERS_MIN, 0));
    }

    #[test]
    fn a_reply_before_the_batch_has_left_leaves_the_buffer_with_the_lane() {
        let mut kept = Kept::new(2);
        let mut buffer = batch_buffer(0);
        keep(&mut kept, 0, &mut buffer, 32..200_000);
        let place = buffer.as_ptr();
        kept.release(0);
        kept.retire(&mut buffer);
        assert_eq!((buffer.as_ptr(), kept.bytes, kept.record(0)), (place, 0, None));
    }

    #[test]
    fn what_free_slots_hold_is_bounded() {
        let mut kept = Kept::new(1024);
        let mut buffer = batch_buffer(0);
        for bytes in [SLOT_BYTES_MAX, BATCH_TARGET_BYTES, SLOT_BYTES_MAX / 2] {
            for slot in 0..1024 {
                keep(&mut kept, slot, &mut buffer, 32..32 + bytes);
            }
            assert_eq!(kept.is_full(), bytes == BATCH_TARGET_BYTES);
            (0..1024).for_each(|slot| kept.release(slot));
            let held: usize = kept.frames.iter().map(|frame| frame.copy.capacity()).sum();
            assert!(held <= 1024 * SLOT_BYTES_MAX && kept.bytes == 0, "{held}");
            assert!(kept.copies.len() <= SPARE_COPIES_MAX);
        }
    }

    #[test]
    fn slots_that_do_not_exist_are_nobodys() {
        let mut kept = Kept::new(1);
        kept.keep(9, &[0; 64], 0..16);
        kept.release(9);
        assert_eq!((kept.record(9), kept.bytes), (None, 0));
    }
}
