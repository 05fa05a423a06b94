//! Two ends without a common wire version: each says so.
//!
//! Bytes come from the real client and the real daemon; only the version fields are changed and
//! the checksum is made anew. Offsets and checksum as in docs/wire.md.

use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::thread;

use anyhow::{Context, Result, ensure};

use super::Rig;
use super::bad::{client_hello, others_work, refused, send};
use crate::mounts;
use crate::proc::Cmd;
use crate::rig::SETTLE;

const BATCH_HEADER: usize = 32;
const RECORD_HEADER: usize = 16;
const COUNT_AT: usize = 6;
const HEAD_CRC_AT: usize = 24;
/// The body of a batch's only record.
const BODY_AT: usize = BATCH_HEADER + RECORD_HEADER;
const CODE_AT: usize = BATCH_HEADER + 12;
const KIND_AT: usize = BATCH_HEADER + 4;
const GOODBYE: u8 = 12;
const REASON_VERSION: u8 = 3;

/// CRC32C (RFC 3720, appendix B.4), bit by bit: a few hundred bytes have to be summed.
fn crc32c(parts: &[&[u8]]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0x82f6_3b78 };
    let byte = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), step);
    !parts.iter().copied().flatten().fold(!0, byte)
}

/// Makes the head checksum of a batch anew; its records have at most 256 bytes each.
fn seal(batch: &mut [u8]) -> Result<()> {
    let count = u16::from_le_bytes(batch[COUNT_AT..COUNT_AT + 2].try_into()?);
    let (mut parts, mut at) = (Vec::new(), BATCH_HEADER);
    for _ in 0..count {
        let head = batch.get(at..at + 4).context("a batch that ends early")?;
        let len = u32::from_le_bytes(head.try_into()?) as usize;
        let record = batch.get(at..at + len).filter(|_| len <= 256);
        parts.push(record.with_context(|| format!("a record of {len} bytes"))?);
        at += len.next_multiple_of(8);
    }
    parts.extend([&batch[..HEAD_CRC_AT], &batch[HEAD_CRC_AT + 4..BATCH_HEADER]]);
    let crc = crc32c(&parts);
    batch[HEAD_CRC_AT..HEAD_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    Ok(())
}

/// The daemon's answer to a HELLO: one batch.
fn answer_to(rig: &Rig, hello: &[u8]) -> Result<Vec<u8>> {
    let mut stream = send(rig, hello)?;
    stream.set_read_timeout(Some(SETTLE))?;
    let mut answer = vec![0; 4096];
    let len = stream.read(&mut answer).context("the daemon says nothing")?;
    ensure!(len > BODY_AT, "the daemon answers {len} bytes");
    answer.truncate(len);
    Ok(answer)
}

/// What the client says of a daemon that answers so.
fn client_says(rig: &Rig, answer: Vec<u8>, words: &str) -> Result<()> {
    let path = rig.sandbox.path("other-version.sock");
    let listener = UnixListener::bind(&path)?;
    let serve = thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(SETTLE))?;
        let _hello = stream.read(&mut [0; 4096])?;
        stream.write_all(&answer)
    });
    let dir = rig.sandbox.path("other-version");
    fs::create_dir_all(&dir)?;
    let source = format!("d@unix:{}", path.display());
    refused(Cmd::new(&rig.bins.ringfs).arg("mount").arg(source).arg(&dir), &[words])?;
    ensure!(mounts::at(&dir)?.is_empty(), "it left a mount");
    serve.join().ok().context("the false daemon panicked")??;
    fs::remove_file(&path).map_err(Into::into)
}

pub fn mismatch(rig: &Rig) -> Result<()> {
    let mut hello = client_hello(rig)?;
    let original = hello.clone();
    seal(&mut hello)?;
    ensure!(hello == original, "our checksum is not the client's");
    let mut welcome = answer_to(rig, &hello)?;
    ensure!(welcome[KIND_AT] == 2, "not welcome: kind {}", welcome[KIND_AT]);

    hello[BODY_AT..BODY_AT + 4].copy_from_slice(&[2, 0, 9, 0]);
    // Behind the versions nothing needs to be as we know it.
    hello[BODY_AT + 4..BODY_AT + 16].fill(0xff);
    seal(&mut hello)?;
    let goodbye = answer_to(rig, &hello)?;
    ensure!(goodbye[KIND_AT] == GOODBYE, "kind {} for versions 2 to 9", goodbye[KIND_AT]);
    ensure!(goodbye[CODE_AT] == REASON_VERSION, "reason {}", goodbye[CODE_AT]);
    let text = String::from_utf8_lossy(&goodbye[BODY_AT..]).into_owned();
    ensure!(text.contains("wire versions 2 to 9, this daemon 1 to 1"), "{text}");

    client_says(rig, goodbye, "update the older of ringfs and ringfsd (the guest speaks")?;
    welcome[BODY_AT..BODY_AT + 2].copy_from_slice(&[7, 0]);
    seal(&mut welcome)?;
    client_says(rig, welcome, "answers in wire version 7, and this ringfs speaks 1 to 1")?;
    others_work(rig, "others")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_crc32c() {
        assert_eq!(super::crc32c(&[b"1234", b"56789"]), 0xe306_9283);
    }
}
