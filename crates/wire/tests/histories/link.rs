//! One connection in memory: two streams of bytes that can be cut anywhere, and the ends that the
//! real wire code makes of them. A cut loses any number of the last bytes either way.

use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::limits::{BATCH_HEADER_BYTES, BATCH_TARGET_BYTES, RECORD_HEADER_BYTES};
use ringfs_wire::session::{LinkError, LinkRx, LinkTx};
use ringfs_wire::slot::SlotUse;
use std::collections::VecDeque;

/// What the model holds against the code, in words.
pub type Fault = String;

/// A small generator whose whole state is the seed (xorshift64*).
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        // Seeds in a row are far apart.
        Rng((seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }

    /// So often in a thousand.
    pub fn one_of(&mut self, often: usize) -> bool {
        self.below(1000) < often
    }
}

/// Which way bytes go.
#[derive(Clone, Copy)]
pub enum Way {
    Up = 0,
    Down = 1,
}

/// The two streams of one connection.
#[derive(Default)]
pub struct Pipe {
    bytes: [VecDeque<u8>; 2],
    lost: [VecDeque<u8>; 2],
    pub is_cut: bool,
    /// The host is told nothing of the cut.
    pub is_silent: bool,
}

impl Pipe {
    /// The connection is over: some of what is on its way still arrives.
    pub fn cut(&mut self, rng: &mut Rng, is_silent: bool) {
        if self.is_cut {
            return;
        }
        (self.is_cut, self.is_silent) = (true, is_silent);
        for way in [Way::Up, Way::Down] {
            let bytes = &mut self.bytes[way as usize];
            let left = rng.below(bytes.len() + 1);
            self.lost[way as usize] = bytes.split_off(left);
        }
    }

    /// Damages a byte on its way to the guest or the host.
    pub fn damage(&mut self, rng: &mut Rng) -> bool {
        let bytes = &mut self.bytes[rng.below(2)];
        let len = bytes.len();
        if len > 0 {
            bytes[rng.below(len)] ^= 1 << rng.below(8);
        }
        len > 0
    }

    /// Its end is not told, and nothing is left that comes before it.
    pub fn says_nothing(&self, way: Way) -> bool {
        self.is_silent && self.bytes[way as usize].is_empty()
    }

    pub fn is_idle(&self) -> bool {
        !self.is_cut && self.bytes.iter().all(VecDeque::is_empty)
    }

    /// What is on its way arrives, and nothing behind it.
    pub fn ends_behind(&mut self) {
        self.is_cut = true;
    }
}

/// A record as it was received.
#[derive(Clone)]
pub struct Record {
    pub header: RecordHeader,
    pub body: Vec<u8>,
}

impl Record {
    pub fn at(&self) -> SlotUse {
        SlotUse { slot: self.header.slot, seq: self.header.slot_seq }
    }
}

/// Why nothing more comes.
#[derive(Debug)]
pub enum Over {
    End,
    Damaged,
}

/// One end of a connection.
pub struct End {
    tx: LinkTx,
    rx: LinkRx,
    deframer: Deframer,
    builder: BatchBuilder,
    buffer: Vec<u8>,
    is_damaged: bool,
}

impl End {
    pub fn new() -> End {
        End {
            tx: LinkTx::new(true),
            rx: LinkRx::new(true),
            deframer: Deframer::new(),
            builder: BatchBuilder::new(),
            buffer: vec![0; BATCH_HEADER_BYTES + BATCH_TARGET_BYTES + (16 << 10)],
            is_damaged: false,
        }
    }

    /// Ready for another connection: what of the old one is still to come is taken and dropped, so
    /// that the large buffer can be used again.
    pub fn renew(mut self, pipe: &mut Pipe, way: Way) -> End {
        while !self.is_damaged {
            if pipe.bytes[way as usize].is_empty() {
                std::mem::swap(&mut pipe.bytes[way as usize], &mut pipe.lost[way as usize]);
            }
            if self.fill(pipe, way, usize::MAX) == 0 {
                break;
            }
            while !self.is_damaged {
                match self.deframer.next_batch() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => self.is_damaged = true,
                }
            }
        }
        if self.is_damaged || self.deframer.pending() > 0 {
            return End::new();
        }
        (self.tx, self.rx) = (LinkTx::new(true), LinkRx::new(true));
        self.builder = BatchBuilder::new();
        self
    }

    pub fn push(&mut self, kind: Kind, lane: u8, at: SlotUse, code: u32, body: &[u8]) {
        let header = RecordHeader {
            kind: kind as u8,
            lane,
            slot: at.slot,
            slot_seq: at.seq,
            code,
            ..Default::default()
        };
        assert!(self.builder.push(&mut self.buffer, header, body), "no room in a batch");
    }

    pub fn tell(&mut self, kind: Kind, code: u32, body: &[u8]) {
        self.push(kind, 0, SlotUse { slot: 0, seq: 0 }, code, body);
    }

    pub fn is_due(&self) -> bool {
        self.builder.is_due()
    }

    pub fn has_output(&self) -> bool {
        !self.builder.is_empty()
    }

    /// Sends what is there; into a cut connection it is lost.
    pub fn flush(&mut self, pipe: &mut Pipe, way: Way) {
        if self.builder.is_empty() {
            return;
        }
        let received = self.rx.received();
        let bytes = self.tx.seal(&mut self.builder, &mut self.buffer, received);
        if !pipe.is_cut {
            pipe.bytes[way as usize].extend(&*bytes);
        }
    }

    fn fill(&mut self, pipe: &mut Pipe, way: Way, most: usize) -> usize {
        let bytes = &mut pipe.bytes[way as usize];
        let spare = self.deframer.spare();
        let n = most.min(bytes.len()).min(spare.len());
        for (to, from) in spare.iter_mut().zip(bytes.drain(..n)) {
            *to = from;
        }
        self.deframer.filled(n);
        n
    }

    /// Takes at most so many bytes, and gives the records that are whole now.
    pub fn receive(
        &mut self,
        pipe: &mut Pipe,
        way: Way,
        most: usize,
        records: &mut VecDeque<Record>,
    ) -> Result<usize, Over> {
        let n = self.fill(pipe, way, most);
        if n == 0 && pipe.is_cut {
            return Err(Over::End);
        }
        loop {
            let Ok(batch) = self.deframer.next_batch() else {
                self.is_damaged = true;
                return Err(Over::Damaged);
            };
            let Some(bytes) = batch else { return Ok(n) };
            let header = match self.rx.accept(bytes, self.tx.sent()) {
                Ok(header) => header,
                Err(LinkError::Ack { found, sent }) => panic!("acknowledged {found} of {sent}"),
                Err(_) => {
                    self.is_damaged = true;
                    return Err(Over::Damaged);
                }
            };
            let mut cursor = Cursor::new(&header);
            while let Some((header, span)) = cursor.next(bytes) {
                let body = bytes[span][RECORD_HEADER_BYTES..].to_vec();
                records.push_back(Record { header, body });
            }
        }
    }
}
