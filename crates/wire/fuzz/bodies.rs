//! What the fuzz targets do with their bytes. Plain functions, so that a stable test drives them
//! too. Each asserts what must hold for any bytes at all.
#![allow(dead_code, reason = "each target uses its own")]

use ringfs_wire::batch::{BatchBuilder, BatchError, Cursor, Kind, RecordHeader, peek_len, verify};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::hello::{Hello, Ticket, Welcome};
use ringfs_wire::limits::*;
use ringfs_wire::restore::{End, Nodes, Restore, Restores, push_node, push_restore};
use ringfs_wire::session::{LinkError, LinkRx, LinkTx};
use ringfs_wire::slot::SlotUse;
use ringfs_wire::table::{Abandon, Begin, Fate, Given, SlotTable};

/// Bytes as they are, and with numbers and checksums made good, which no fuzzer guesses.
pub fn both(data: &[u8], body: fn(&[u8])) {
    body(data);
    let mut sealed = data.to_vec();
    reseal(&mut sealed);
    if sealed != data {
        body(&sealed);
    }
}

/// A stream, cut as its first bytes say: the cuts must not matter.
pub fn deframe(data: &[u8]) {
    let Some((cuts, stream)) = data.split_first_chunk::<8>() else { return };
    let whole = batches(stream, &mut std::iter::repeat(usize::MAX));
    let mut sizes = cuts.iter().cycle().map(|&cut| 1 + usize::from(cut) * usize::from(cut));
    assert_eq!(batches(stream, &mut sizes), whole, "the cuts of the stream matter");
}

/// The lengths of the batches of a stream, and what ends it.
fn batches(
    stream: &[u8],
    cuts: &mut impl Iterator<Item = usize>,
) -> (Vec<usize>, Option<BatchError>) {
    let mut deframer = Deframer::new();
    let (mut at, mut found) = (0, Vec::new());
    loop {
        loop {
            match deframer.next_batch() {
                Ok(Some(batch)) => {
                    assert!((BATCH_HEADER_BYTES..=BATCH_BYTES_MAX).contains(&batch.len()));
                    found.push(batch.len());
                }
                Ok(None) => break,
                Err(error) => return (found, Some(error)),
            }
        }
        if at == stream.len() {
            assert_eq!(found.iter().sum::<usize>() + deframer.pending(), stream.len());
            return (found, None);
        }
        let spare = deframer.spare();
        assert!(!spare.is_empty(), "no room for the rest of a batch");
        let n = cuts.next().unwrap_or(1).min(spare.len()).min(stream.len() - at);
        spare[..n].copy_from_slice(&stream[at..at + n]);
        deframer.filled(n);
        at += n;
    }
}

/// One batch: what is accepted has all its records within it, and can be built again.
pub fn records(data: &[u8]) {
    let _ = peek_len(data);
    for payload_crc in [false, true] {
        let Ok(header) = verify(data, payload_crc) else { continue };
        assert_eq!(header.len as usize, data.len());
        let mut cursor = Cursor::new(&header);
        let mut buffer = vec![0; data.len()];
        let mut builder = BatchBuilder::new();
        let (mut end, mut seen, mut due) = (BATCH_HEADER_BYTES, 0, false);
        while let Some((record, span)) = cursor.next(data) {
            assert_eq!(span.start, end.next_multiple_of(RECORD_ALIGN));
            assert_eq!(span.len(), record.len as usize);
            assert!(span.len() >= RECORD_HEADER_BYTES && span.len() <= RECORD_BYTES_MAX);
            end = span.end;
            seen += 1;
            // A sender may not go on behind a due batch, a receiver takes it all the same.
            due |= builder.is_due();
            if !due {
                let body = &data[span][RECORD_HEADER_BYTES..];
                assert!(builder.push(&mut buffer, record, body));
            }
        }
        assert_eq!((seen, end.next_multiple_of(RECORD_ALIGN)), (header.count, data.len()));
        if !due {
            let built = builder.finish(&mut buffer, header.seq, header.ack, payload_crc);
            let again = verify(built, payload_crc).expect("built by us");
            assert_eq!(again, header);
        }
    }
}

/// A whole session from its first byte, as the daemon takes it: HELLO, then records on slots.
pub fn handshake(data: &[u8]) {
    restore(data);
    let _ = Hello::decode(data);
    if let Ok(welcome) = Welcome::decode(data) {
        assert!(usize::from(welcome.lanes) <= LANES_MAX && welcome.conns <= welcome.lanes);
    }
    let mut deframer = Deframer::new();
    let n = data.len().min(deframer.spare().len());
    deframer.spare()[..n].copy_from_slice(&data[..n]);
    deframer.filled(n);
    let mut rx = LinkRx::new(true);
    let mut session = None;
    while let Ok(Some(bytes)) = deframer.next_batch() {
        let sent = u64::from(session.is_some());
        let before = (rx.received(), rx.acked());
        let Ok(header) = rx.accept(bytes, sent) else {
            assert_eq!((rx.received(), rx.acked()), before, "a refused batch left its mark");
            return;
        };
        assert!(rx.received() == before.0 + 1 && rx.acked() >= before.1 && rx.acked() <= sent);
        let mut cursor = Cursor::new(&header);
        while let Some((record, span)) = cursor.next(bytes) {
            let body = &bytes[span][RECORD_HEADER_BYTES..];
            restore(body);
            match &mut session {
                None => {
                    if Kind::from_u8(record.kind) != Some(Kind::Hello) {
                        return;
                    }
                    let Ok(hello) = Hello::decode(body) else { return };
                    assert!(usize::from(hello.lanes) <= LANES_MAX && hello.conn < hello.conns);
                    assert_eq!(Hello::decode(&hello.encode()).as_ref(), Ok(&hello));
                    if hello.common_version().is_none() {
                        return;
                    }
                    let slots = hello.slots.min(8);
                    session = Some(match hello.ticket == Ticket::NONE {
                        true => SlotTable::new(slots),
                        false => SlotTable::rebuilt(slots),
                    });
                }
                Some(slots) => request(slots, &record, body),
            }
        }
    }
}

/// Bodies of NODE and RESTORE: what is accepted is written again as it was.
pub fn restore(data: &[u8]) {
    let mut again = Vec::new();
    for node in Nodes::new(data).map_while(Result::ok) {
        assert!(node.id > 1 && node.recipe.len() <= RECIPE_BYTES_MAX);
        assert!(push_node(&mut again, node.id, |out| out.extend_from_slice(node.recipe)));
    }
    assert!(data.starts_with(&again));
    again.clear();
    for entry in Restores::new(data).map_while(Result::ok) {
        assert!(push_restore(&mut again, &entry));
    }
    assert!(data.starts_with(&again));
}

fn request(slots: &mut SlotTable, record: &RecordHeader, body: &[u8]) {
    let at = SlotUse { slot: record.slot, seq: record.slot_seq };
    let in_use = slots.in_use();
    let running = slots.is_running(at);
    let _ = Given::by(record.code, body);
    match record.kind {
        // As if the connection had been cut here.
        kind if kind == Kind::Ping as u8 => slots.cut(),
        kind if kind == Kind::Unsure as u8 => {
            let _ = slots.doubt(at);
            assert_eq!(slots.in_use(), in_use);
        }
        kind if kind == Kind::Cancel as u8 => match slots.abandon(at) {
            Ok(Abandon::Running) => assert!(running),
            Ok(Abandon::Over(_)) => assert_eq!(slots.abandon(at), Ok(Abandon::Void)),
            Ok(Abandon::Void) | Err(_) => {}
        },
        _ => match slots.begin(at, record.code) {
            Ok(Begin::Execute | Begin::Rerun(_)) => {
                assert!(!running && slots.is_running(at) && slots.in_use() == in_use + 1);
                if record.lane.is_multiple_of(2) {
                    assert_eq!(slots.finish(at, 0, body), Ok(Fate::Send));
                    assert!(slots.begin(at, record.code).is_err(), "the same use twice");
                }
            }
            Ok(Begin::Running) => assert!(running),
            Ok(Begin::Replay) => assert!(slots.kept(at).is_some()),
            Ok(Begin::Unsure) if record.lane.is_multiple_of(2) => {
                assert_eq!(slots.give_up(at), Ok(()));
                assert!(slots.kept(at).is_some_and(|(errno, _)| errno != 0));
            }
            Ok(Begin::Unsure) => {
                assert_eq!(slots.trust(at), Ok(()));
                assert_eq!(slots.begin(at, record.code), Ok(Begin::Execute));
            }
            Ok(Begin::Decide) => panic!("no daemon has died"),
            Err(_) => assert_eq!(slots.in_use(), in_use),
        },
    }
}

/// Streams that are in order, to start from.
pub fn samples() -> Vec<Vec<u8>> {
    let hello = Hello {
        versions: (1, 1),
        features: 1,
        ticket: Default::default(),
        epoch_seen: 0,
        lanes: 2,
        conn: 0,
        conns: 2,
        slots: 8,
        mount_flags: 0,
        cache: Default::default(),
        share: "share".into(),
        subdir: b"a/b".to_vec(),
        init: None,
        nth: 0,
    };
    let mut samples = vec![hello.encode(), vec![0; 48], nodes(), restores()];
    for bodies in [&[][..], &[0], &[24, 40, 300], &[70_000], &[5, 1 << 20], &[16; 600]] {
        let mut tx = LinkTx::new(true);
        let mut stream = Vec::new();
        let mut buffer = vec![0; BATCH_BYTES_MAX];
        let mut builder = BatchBuilder::new();
        let head = RecordHeader { kind: Kind::Hello as u8, ..Default::default() };
        assert!(builder.push(&mut buffer, head, &hello.encode()));
        stream.extend_from_slice(tx.seal(&mut builder, &mut buffer, 0));
        for (i, &len) in bodies.iter().enumerate() {
            let header = RecordHeader {
                kind: 3 + (i % 4) as u8,
                slot: (i % 8) as u16,
                slot_seq: (i / 8) as u32,
                code: i as u32 * 2,
                ..Default::default()
            };
            assert!(builder.push(&mut buffer, header, &vec![i as u8; len]));
            if i % 7 == 6 {
                stream.extend_from_slice(tx.seal(&mut builder, &mut buffer, 1));
            }
        }
        let last = tx.seal(&mut builder, &mut buffer, 1).to_vec();
        stream.extend_from_slice(&last);
        samples.extend([last, stream]);
    }
    samples
}

fn nodes() -> Vec<u8> {
    let mut body = Vec::new();
    for id in 2..40 {
        assert!(push_node(&mut body, id, |out| out.resize(out.len() + id as usize * 5, 7)));
    }
    body
}

fn restores() -> Vec<u8> {
    let mut body = Vec::new();
    let end = End { nodes: 12, handles: 12, node_id_max: 13, fh_max: 13 };
    for id in 2..14 {
        let node = Restore::Node { id, count: id * id, recipe: &[7; 100][..id as usize * 3] };
        let handle = Restore::Handle { fh: id, node: id, flags: 2, directory: id % 2 == 0 };
        assert!(push_restore(&mut body, &node) && push_restore(&mut body, &handle));
    }
    assert!(push_restore(&mut body, &Restore::End(end)));
    body
}

/// Makes the checksums and numbers of a stream good again, so that what was changed inside it is
/// looked at.
pub fn reseal(stream: &mut [u8]) {
    let (mut at, mut rx) = (0, LinkRx::new(true));
    while let Ok(Some(len)) = peek_len(&stream[at..]) {
        let Some(batch) = stream.get_mut(at..at + len) else { return };
        for _ in 0..4 {
            match rx.accept(batch, 1) {
                Err(LinkError::Batch(BatchError::PayloadCrc { computed, .. })) => {
                    batch[28..32].copy_from_slice(&computed.to_le_bytes());
                }
                Err(LinkError::Batch(BatchError::HeadCrc { computed, .. })) => {
                    batch[24..28].copy_from_slice(&computed.to_le_bytes());
                }
                Err(LinkError::Sequence { expected, .. }) => {
                    batch[8..16].copy_from_slice(&expected.to_le_bytes());
                }
                Err(LinkError::Ack { .. }) => batch[16..24].copy_from_slice(&1u64.to_le_bytes()),
                Err(LinkError::Batch(_)) => return,
                Ok(_) => break,
            }
        }
        at += len;
    }
}
