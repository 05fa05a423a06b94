//! One frame shape: a checked view of a request's raw bytes, and the headers of replies.
//!
//! ```text
//! request:  | InHeader 40 | arguments .. | extensions: total_extlen * 8 bytes |   = len bytes
//! reply:    | OutHeader 16: len u32, error i32, unique u64 | body .. |            = len bytes
//! ```
//!
//! Invariant: the header is copied out once and checked against the bytes that are there; from
//! then on the copy is trusted. Opcodes stay raw numbers, so that an unknown one gets ENOSYS
//! instead of an error here. It must not read payloads, nor own or allocate memory.

use ringfs_wire::abi::{BatchForgetIn, ExtHeader, ForgetIn, ForgetOne, InHeader, InterruptIn};
use ringfs_wire::abi::{Opcode, OutHeader};
use zerocopy::{FromBytes, IntoBytes};

use crate::device::ERRNO_MAX;

/// Bit 63 of `unique`: the kernel sends this request again, after a RESEND notification (6.9).
pub const UNIQUE_RESEND: u64 = 1 << 63;

/// Why bytes are not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Fewer bytes than a header has.
    #[error("a frame of {len} bytes is shorter than its header")]
    NoHeader {
        /// Bytes that are there.
        len: usize,
    },
    /// The header's length is not that of the bytes.
    #[error("the header says {said} bytes, {len} are there")]
    Length {
        /// The header's `len`.
        said: u32,
        /// Bytes that are there.
        len: usize,
    },
    /// The extensions are longer than what follows the header.
    #[error("{ext_bytes} bytes of extensions do not fit into {room} bytes")]
    Extensions {
        /// `total_extlen`, in bytes.
        ext_bytes: usize,
        /// Bytes behind the header.
        room: usize,
    },
    /// The arguments do not have the shape of the opcode.
    #[error("malformed arguments of {what}: {len} bytes")]
    Arguments {
        /// What was parsed.
        what: &'static str,
        /// The arguments' length.
        len: usize,
    },
}

/// A request from the kernel, as a view of its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    header: InHeader,
    args: &'a [u8],
    extensions: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Checks that `bytes` are one whole request: lengths only, no opcode's own arguments.
    pub fn parse(bytes: &'a [u8]) -> Result<Frame<'a>, FrameError> {
        let len = bytes.len();
        let Ok((header, rest)) = InHeader::read_from_prefix(bytes) else {
            return Err(FrameError::NoHeader { len });
        };
        if usize::try_from(header.len) != Ok(len) {
            return Err(FrameError::Length { said: header.len, len });
        }
        let ext_bytes = usize::from(header.total_extlen) * 8;
        let room = rest.len();
        let Some(args_bytes) = room.checked_sub(ext_bytes) else {
            return Err(FrameError::Extensions { ext_bytes, room });
        };
        let (args, extensions) = rest.split_at(args_bytes);
        Ok(Frame { header, args, extensions })
    }

    /// The header, as copied out once.
    pub fn header(&self) -> &InHeader {
        &self.header
    }

    /// The opcode's number, known or not.
    pub fn opcode(&self) -> u32 {
        self.header.opcode
    }

    /// The opcode, if this version knows it.
    pub fn known_opcode(&self) -> Option<Opcode> {
        Opcode::from_u32(self.header.opcode)
    }

    /// The request's id, with the resend bit if it is set: the reply must repeat it as it is.
    pub fn unique(&self) -> u64 {
        self.header.unique
    }

    /// The id without the resend bit: the same for all sendings of a request.
    pub fn unique_original(&self) -> u64 {
        self.header.unique & !UNIQUE_RESEND
    }

    /// Whether the kernel sends this request again: it may have been executed already.
    pub fn is_resend(&self) -> bool {
        self.header.unique & UNIQUE_RESEND != 0
    }

    /// What follows the header, without extensions.
    pub fn args(&self) -> &'a [u8] {
        self.args
    }

    /// The extension area as it came (empty unless the flags of INIT asked for some).
    pub fn extensions(&self) -> &'a [u8] {
        self.extensions
    }

    /// Type and body of each extension; ends early where the area is malformed.
    pub fn extension_list(&self) -> impl Iterator<Item = (u32, &'a [u8])> + use<'a> {
        let mut rest = self.extensions;
        std::iter::from_fn(move || {
            let (header, _) = ExtHeader::read_from_prefix(rest).ok()?;
            let size = usize::try_from(header.size).ok()?;
            let body = rest.get(size_of::<ExtHeader>()..size)?;
            rest = rest.get(size.next_multiple_of(8)..).unwrap_or(&[]);
            Some((header.type_, body))
        })
    }

    /// Whether the kernel waits for a reply: to FORGET, BATCH_FORGET and INTERRUPT it takes none.
    pub fn wants_reply(&self) -> bool {
        !matches!(
            self.known_opcode(),
            Some(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt)
        )
    }

    /// What a FORGET or BATCH_FORGET gives back; empty for any other request.
    pub fn forgets(&self) -> Result<Forgets<'a>, FrameError> {
        let malformed = |what| FrameError::Arguments { what, len: self.args.len() };
        match self.known_opcode() {
            Some(Opcode::Forget) => {
                let (one, _) = ForgetIn::read_from_prefix(self.args)
                    .map_err(|_| malformed("a forget request"))?;
                let one = ForgetOne { nodeid: self.header.nodeid, nlookup: one.nlookup };
                Ok(Forgets { single: Some(one), rest: &[] })
            }
            Some(Opcode::BatchForget) => {
                let what = "a batch forget request";
                let (head, rest) =
                    BatchForgetIn::read_from_prefix(self.args).map_err(|_| malformed(what))?;
                let bytes = u64::from(head.count) * size_of::<ForgetOne>() as u64;
                if bytes != rest.len() as u64 {
                    return Err(malformed(what));
                }
                Ok(Forgets { single: None, rest })
            }
            _ => Ok(Forgets { single: None, rest: &[] }),
        }
    }

    /// The `unique` that an INTERRUPT is about, as its request carried it; `None` for others.
    ///
    /// The target may have been read by another clone, may be answered already, and may not have
    /// been read at all yet by us.
    pub fn interrupt_target(&self) -> Result<Option<u64>, FrameError> {
        if self.known_opcode() != Some(Opcode::Interrupt) {
            return Ok(None);
        }
        match InterruptIn::read_from_prefix(self.args) {
            Ok((body, _)) => Ok(Some(body.unique)),
            Err(_) => {
                let len = self.args.len();
                Err(FrameError::Arguments { what: "an interrupt request", len })
            }
        }
    }
}

/// The node ids of one FORGET or BATCH_FORGET; at most as many as the frame has bytes for.
#[derive(Clone, Debug)]
pub struct Forgets<'a> {
    single: Option<ForgetOne>,
    rest: &'a [u8],
}

impl Iterator for Forgets<'_> {
    type Item = ForgetOne;

    fn next(&mut self) -> Option<ForgetOne> {
        if let Some(one) = self.single.take() {
            return Some(one);
        }
        let (one, rest) = ForgetOne::read_from_prefix(self.rest).ok()?;
        self.rest = rest;
        Some(one)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let count = usize::from(self.single.is_some()) + self.rest.len() / size_of::<ForgetOne>();
        (count, Some(count))
    }
}

impl ExactSizeIterator for Forgets<'_> {}

/// The parts in which a ring gives a request (`struct fuse_uring_req_header`, and a payload):
///
/// ```text
/// headers: | in_out 128: InHeader 40 | op_in 128 | ring_ent_in_out 32 |     payload: | .. |
///          | .. commit_id u64 at 264, payload_sz u32 at 272           |
/// ```
///
/// The first argument stands in `op_in`, the others in the payload; how long the first one is
/// follows from the lengths, so no opcode needs to be known.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    headers: &'a [u8; 288],
    payload: &'a [u8],
    header: InHeader,
    op_in_bytes: usize,
}

const OP_IN_AT: usize = 128;
const OP_IN_BYTES_MAX: usize = 128;
const COMMIT_ID_AT: usize = 264;
const PAYLOAD_SZ_AT: usize = 272;

impl<'a> Parts<'a> {
    /// Checks that the lengths fit each other and the memory; `payload` is all there is room for.
    pub fn parse(headers: &'a [u8; 288], payload: &'a [u8]) -> Result<Parts<'a>, FrameError> {
        let len = headers.len();
        let Ok((header, _)) = InHeader::read_from_prefix(headers) else {
            return Err(FrameError::NoHeader { len });
        };
        let said = number(headers, PAYLOAD_SZ_AT);
        let wrong = FrameError::Length { said: header.len, len: said as usize };
        let payload = payload.get(..said as usize).ok_or(wrong)?;
        let args_bytes = (header.len as usize).checked_sub(size_of::<InHeader>()).ok_or(wrong)?;
        let op_in_bytes = args_bytes.checked_sub(payload.len()).ok_or(wrong)?;
        if op_in_bytes > OP_IN_BYTES_MAX {
            return Err(wrong);
        }
        Ok(Parts { headers, payload, header, op_in_bytes })
    }

    /// The header, as copied out once.
    pub fn header(&self) -> &InHeader {
        &self.header
    }

    /// The first argument, which is all that most opcodes have.
    pub fn first_arg(&self) -> &'a [u8] {
        &self.headers[OP_IN_AT..][..self.op_in_bytes]
    }

    /// By what a reply names the request to the ring.
    pub fn commit_id(&self) -> u64 {
        let low = u64::from(number(self.headers, COMMIT_ID_AT));
        low | u64::from(number(self.headers, COMMIT_ID_AT + 4)) << 32
    }

    /// The whole frame's length, bytes.
    pub fn frame_bytes(&self) -> usize {
        self.header.len as usize
    }

    /// Puts the frame together, the same bytes that `/dev/fuse` gives, at the start of `buffer`;
    /// `None` if it is too short.
    pub fn copy_to(&self, buffer: &mut [u8]) -> Option<usize> {
        let room = buffer.get_mut(..self.frame_bytes())?;
        let (header, args) = room.split_at_mut(size_of::<InHeader>());
        header.copy_from_slice(self.header.as_bytes());
        let (first, rest) = args.split_at_mut(self.op_in_bytes);
        first.copy_from_slice(self.first_arg());
        rest.copy_from_slice(self.payload);
        Some(self.frame_bytes())
    }
}

fn number(headers: &[u8; 288], at: usize) -> u32 {
    u32::from_ne_bytes([headers[at], headers[at + 1], headers[at + 2], headers[at + 3]])
}

/// Puts a reply into a ring entry: header first, then how long the payload is. An errno (positive)
/// stands for a reply without a body.
pub(crate) fn put_reply(
    headers: &mut [u8; 288],
    payload: &mut [u8],
    unique: u64,
    reply: Result<&[u8], i32>,
) {
    // The kernel takes no more than it gave room for.
    let too_long = Err(rustix::io::Errno::IO.raw_os_error());
    let reply = reply.and_then(|body| if body.len() > payload.len() { too_long } else { Ok(body) });
    let (header, bytes) = match reply {
        Ok(body) => {
            payload[..body.len()].copy_from_slice(body);
            (out_header(unique, body.len()), body.len() as u32)
        }
        Err(errno) => (error_reply(unique, errno), 0),
    };
    headers[..header.len()].copy_from_slice(&header);
    headers[PAYLOAD_SZ_AT..PAYLOAD_SZ_AT + 4].copy_from_slice(&bytes.to_ne_bytes());
}

/// The header of a good reply with `body_bytes` bytes behind it.
///
/// A body that no header can name gives a length that [`crate::device::Device::reply`] refuses.
pub fn out_header(unique: u64, body_bytes: usize) -> [u8; 16] {
    let len = u32::try_from(body_bytes.saturating_add(16)).unwrap_or(u32::MAX);
    bytes_of(OutHeader { len, error: 0, unique })
}

/// A whole reply that is an error. `errno` is positive, as in `errno.h`; what the kernel would
/// not take from us (0, negative, over 511) becomes `EIO`.
pub fn error_reply(unique: u64, errno: i32) -> [u8; 16] {
    let errno =
        if (1..=ERRNO_MAX).contains(&errno) { errno } else { rustix::io::Errno::IO.raw_os_error() };
    bytes_of(OutHeader { len: 16, error: -errno, unique })
}

fn bytes_of(header: OutHeader) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(header.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: Opcode, unique: u64, ext_words: u16, args: &[u8]) -> Vec<u8> {
        let header = InHeader {
            len: 40 + args.len() as u32,
            opcode: opcode as u32,
            unique,
            nodeid: 7,
            total_extlen: ext_words,
            ..InHeader::default()
        };
        [header.as_bytes(), args].concat()
    }

    fn batch(count: u32, items: &[(u64, u64)]) -> Vec<u8> {
        let mut args = BatchForgetIn { count, dummy: 0 }.as_bytes().to_vec();
        for &(nodeid, nlookup) in items {
            args.extend_from_slice(ForgetOne { nodeid, nlookup }.as_bytes());
        }
        request(Opcode::BatchForget, 2, 0, &args)
    }

    #[test]
    fn impossible_lengths_are_refused() {
        let good = request(Opcode::Read, 4, 0, &[0; 40]);
        assert!(Frame::parse(&good).is_ok());
        for len in 0..good.len() {
            let error = Frame::parse(&good[..len]).expect_err("cut");
            let expected = if len < 40 {
                FrameError::NoHeader { len }
            } else {
                FrameError::Length { said: 80, len }
            };
            assert_eq!(error, expected);
        }
        let longer = [&good[..], &[0]].concat();
        assert_eq!(Frame::parse(&longer).err(), Some(FrameError::Length { said: 80, len: 81 }));
        let ext = request(Opcode::Mkdir, 4, 3, &[0; 16]);
        let expected = FrameError::Extensions { ext_bytes: 24, room: 16 };
        assert_eq!(Frame::parse(&ext).err(), Some(expected));
    }

    #[test]
    fn extensions_are_cut_off_the_arguments() {
        let mut args = b"0123456701234567".to_vec();
        args.extend_from_slice(ExtHeader { size: 20, type_: 32 }.as_bytes());
        args.extend_from_slice(&[9; 12]);
        args.extend_from_slice(&[0; 4]);
        args.extend_from_slice(ExtHeader { size: 8, type_: 5 }.as_bytes());
        let bytes = request(Opcode::Mkdir, 4, 4, &args);
        let frame = Frame::parse(&bytes).expect("frame");
        assert_eq!(frame.args(), b"0123456701234567");
        let list: Vec<_> = frame.extension_list().collect();
        assert_eq!(list, [(32, &[9; 12][..]), (5, &[][..])]);
        // Sizes that lead nowhere or outside end the list.
        for size in [0, 7, 33, u32::MAX] {
            let mut bytes = bytes.clone();
            bytes[56..60].copy_from_slice(&size.to_le_bytes());
            assert_eq!(Frame::parse(&bytes).expect("frame").extension_list().count(), 0);
        }
    }

    #[test]
    fn forgets_are_counted_against_the_bytes() {
        let check = |bytes: &[u8], expected: Option<&[(u64, u64)]>| {
            let frame = Frame::parse(bytes).expect("frame");
            assert!(!frame.wants_reply());
            let list = frame.forgets().ok().map(|forgets| {
                let said = forgets.len();
                let list: Vec<_> = forgets.map(|one| (one.nodeid, one.nlookup)).collect();
                assert_eq!(said, list.len());
                list
            });
            assert_eq!(list.as_deref(), expected);
        };
        check(&request(Opcode::Forget, 2, 0, &3u64.to_le_bytes()), Some(&[(7, 3)]));
        check(&request(Opcode::Forget, 2, 0, &[0; 7]), None);
        check(&batch(0, &[]), Some(&[]));
        check(&batch(2, &[(5, 1), (6, u64::MAX)]), Some(&[(5, 1), (6, u64::MAX)]));
        check(&batch(3, &[(5, 1), (6, 2)]), None);
        check(&batch(1, &[(5, 1), (6, 2)]), None);
        check(&batch(u32::MAX, &[(5, 1)]), None);
        check(&request(Opcode::BatchForget, 2, 0, &[0; 4]), None);
    }

    #[test]
    fn interrupts_and_resends_name_their_request() {
        let bytes = request(Opcode::Interrupt, 5, 0, &4u64.to_le_bytes());
        let frame = Frame::parse(&bytes).expect("frame");
        assert_eq!(frame.interrupt_target(), Ok(Some(4)));
        assert!(!frame.wants_reply() && !frame.is_resend());
        let bytes = request(Opcode::Interrupt, 5, 0, &[0; 7]);
        assert!(Frame::parse(&bytes).expect("frame").interrupt_target().is_err());
        let bytes = request(Opcode::Getattr, 4 | UNIQUE_RESEND, 0, &[0; 16]);
        let frame = Frame::parse(&bytes).expect("frame");
        assert_eq!(frame.interrupt_target(), Ok(None));
        assert!(frame.is_resend() && frame.wants_reply());
        assert_eq!((frame.unique(), frame.unique_original()), (4 | UNIQUE_RESEND, 4));
    }

    #[test]
    fn unknown_opcodes_are_frames() {
        let mut bytes = request(Opcode::Getattr, 4, 0, &[]);
        bytes[4..8].copy_from_slice(&4096u32.to_le_bytes());
        let frame = Frame::parse(&bytes).expect("frame");
        assert_eq!((frame.opcode(), frame.known_opcode()), (4096, None));
        assert!(frame.wants_reply());
        assert_eq!(frame.forgets().map(|list| list.len()), Ok(0));
    }

    fn ring_parts(header_len: u32, payload_sz: u32) -> [u8; 288] {
        let mut headers = [0; 288];
        let header = InHeader { len: header_len, unique: 6, opcode: 16, ..InHeader::default() };
        headers[..40].copy_from_slice(header.as_bytes());
        for (n, byte) in headers[128..256].iter_mut().enumerate() {
            *byte = n as u8;
        }
        headers[264..272].copy_from_slice(&(6u64 | 1 << 63).to_ne_bytes());
        headers[272..276].copy_from_slice(&payload_sz.to_ne_bytes());
        headers
    }

    #[test]
    fn the_parts_of_a_ring_make_one_frame() {
        let headers = ring_parts(40 + 16 + 5, 5);
        let parts = Parts::parse(&headers, b"name\0 and room").expect("parts");
        assert_eq!(parts.commit_id(), 6 | 1 << 63);
        let mut buffer = [9; 80];
        assert_eq!(parts.copy_to(&mut buffer), Some(61));
        let frame = Frame::parse(&buffer[..61]).expect("frame");
        assert_eq!(
            (frame.unique(), &frame.args()[..3], &frame.args()[16..]),
            (6, &[0, 1, 2][..], &b"name\0"[..])
        );
        assert_eq!(parts.copy_to(&mut buffer[..60]), None);
        for (len, payload_sz, fits) in [
            (40, 0, true),
            (40 + 128, 0, true),
            (40 + 129, 0, false),
            (39, 0, false),
            (45, 6, false),
            (46, 6, true),
            (56, 16, true),
            (57, 17, false),
            (u32::MAX, 0, false),
            (40, u32::MAX, false),
        ] {
            let headers = ring_parts(len, payload_sz);
            assert_eq!(Parts::parse(&headers, &[0; 16]).is_ok(), fits, "{len} {payload_sz}");
        }
    }

    #[test]
    fn replies_into_a_ring() {
        let check = |reply: Result<&[u8], i32>, len: u32, error: i32, payload_sz: u32| {
            let (mut headers, mut payload) = ([0xff; 288], [0; 8]);
            put_reply(&mut headers, &mut payload, 9, reply);
            let (header, _) = OutHeader::read_from_prefix(&headers).expect("header");
            assert_eq!(header, OutHeader { len, error, unique: 9 });
            assert_eq!(number(&headers, PAYLOAD_SZ_AT), payload_sz);
            if let Ok(body) = reply
                && error == 0
            {
                assert_eq!(&payload[..body.len()], body);
            }
        };
        check(Ok(b"body"), 20, 0, 4);
        check(Ok(b""), 16, 0, 0);
        check(Ok(b"12345678"), 24, 0, 8);
        check(Ok(b"123456789"), 16, -5, 0);
        check(Err(2), 16, -2, 0);
        check(Err(600), 16, -5, 0);
    }

    #[test]
    fn reply_headers() {
        let check = |bytes: [u8; 16], len: u32, error: i32| {
            let header = OutHeader::read_from_bytes(&bytes).expect("header");
            assert_eq!(header, OutHeader { len, error, unique: 9 });
        };
        check(out_header(9, 0), 16, 0);
        check(out_header(9, 128), 144, 0);
        check(out_header(9, usize::MAX), u32::MAX, 0);
        check(error_reply(9, 2), 16, -2);
        for wrong in [0, -2, 512, i32::MIN, i32::MAX] {
            check(error_reply(9, wrong), 16, -5);
        }
    }
}
