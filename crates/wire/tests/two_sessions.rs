//! Two ends of one lane on a seeded in-memory pipe: requests in batches one way, replies in another
//! order the other way, both streams cut at random. Every request is answered once, by its own
//! reply, and nothing is left behind.

use proptest::prelude::*;
use ringfs_wire::batch::{BatchBuilder, Cursor, Kind, RecordHeader};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::limits::*;
use ringfs_wire::session::{LinkRx, LinkTx};
use ringfs_wire::slot::{ClientSlots, SlotUse};
use ringfs_wire::table::{Begin, Fate, SlotTable};

/// A small generator whose whole state is the seed (xorshift64*).
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }
}

struct End {
    tx: LinkTx,
    rx: LinkRx,
    deframer: Deframer,
    builder: BatchBuilder,
    buffer: Vec<u8>,
    wire: Vec<u8>,
}

impl End {
    fn new() -> End {
        End {
            tx: LinkTx::new(true),
            rx: LinkRx::new(true),
            deframer: Deframer::new(),
            builder: BatchBuilder::new(),
            buffer: vec![0; BATCH_BYTES_MAX],
            wire: Vec::new(),
        }
    }

    fn flush(&mut self) {
        if !self.builder.is_empty() {
            let bytes = self.tx.seal(&mut self.builder, &mut self.buffer, self.rx.received());
            self.wire.extend_from_slice(bytes);
        }
    }

    fn push(&mut self, kind: Kind, at: SlotUse, code: u32, body: &[u8]) {
        if self.builder.is_due() {
            self.flush();
        }
        let header = RecordHeader {
            kind: kind as u8,
            slot: at.slot,
            slot_seq: at.seq,
            code,
            ..Default::default()
        };
        assert!(self.builder.push(&mut self.buffer, header, body));
    }

    /// Moves some of what `from` has sent, and gives the records that are whole now.
    fn receive(&mut self, from: &mut End, rng: &mut Rng) -> Vec<(RecordHeader, Vec<u8>)> {
        let spare = self.deframer.spare();
        let n = (1 + rng.below(100_000)).min(from.wire.len()).min(spare.len());
        spare[..n].copy_from_slice(&from.wire[..n]);
        from.wire.drain(..n);
        self.deframer.filled(n);
        let mut records = Vec::new();
        while let Some(bytes) = self.deframer.next_batch().expect("unharmed") {
            let header = self.rx.accept(bytes, self.tx.sent()).expect("in order");
            let mut cursor = Cursor::new(&header);
            while let Some((record, span)) = cursor.next(bytes) {
                records.push((record, bytes[span][RECORD_HEADER_BYTES..].to_vec()));
            }
        }
        records
    }
}

fn body_of(request: u32, rng: &mut Rng) -> Vec<u8> {
    let len = [0, 3, 24, 300, 5_000, 70_000][rng.below(6)] + rng.below(64);
    (0..len).map(|i| (request as usize * 31 + i) as u8).collect()
}

fn run(seed: u64) {
    let rng = &mut Rng(seed | 1);
    let (mut guest, mut host) = (End::new(), End::new());
    let mut slots = ClientSlots::new(16);
    let mut table = SlotTable::new(16);
    let mut running: Vec<(SlotUse, u32, Vec<u8>)> = Vec::new();
    let (mut sent, mut answered) = (0u32, 0u32);
    const TOTAL: u32 = 300;
    while answered < TOTAL {
        if sent < TOTAL && rng.below(2) == 0 {
            let body = body_of(sent, rng);
            if let Ok(at) = slots.claim((sent, body.clone())) {
                guest.push(Kind::Request, at, sent, &body);
                sent += 1;
            }
        }
        if rng.below(3) == 0 {
            guest.flush();
        }
        for (record, body) in host.receive(&mut guest, rng) {
            let at = SlotUse { slot: record.slot, seq: record.slot_seq };
            assert_eq!(table.begin(at, record.code), Ok(Begin::Execute));
            running.push((at, record.code, body));
        }
        if !running.is_empty() && rng.below(2) == 0 {
            let (at, code, body) = running.swap_remove(rng.below(running.len()));
            assert_eq!(table.finish(at, code, &[]), Ok(Fate::Send));
            host.push(Kind::Reply, at, code, &body);
        }
        if rng.below(3) == 0 {
            host.flush();
        }
        for (record, body) in guest.receive(&mut host, rng) {
            let at = SlotUse { slot: record.slot, seq: record.slot_seq };
            let (request, expected) = slots.complete(at).expect("in flight");
            assert_eq!((record.code, &body), (request, &expected), "another's reply");
            answered += 1;
        }
    }
    assert_eq!((slots.in_use(), table.in_use(), running.len()), (0, 0, 0));
    assert!(guest.rx.acked() <= guest.tx.sent() && host.rx.acked() <= host.tx.sent());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_request_is_answered_once(seed in any::<u64>()) {
        run(seed);
    }
}
