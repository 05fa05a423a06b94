//! The guest's end of an echo over AF_VSOCK: sends pieces, reads them back, compares.
//!
//! `vsock_ping CID PORT PIECE_BYTES MIB`. It proves the way through the vsock device before, and
//! without, the product, and shows which sizes of pieces the device bears. Every wait has a limit.

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use vsock::{VsockAddr, VsockStream};

/// A device that lost the connection answers nothing: give up, do not hang.
const SILENCE_MAX: Duration = Duration::from_secs(20);

fn main() {
    if let Err(error) = ping() {
        eprintln!("vsock_ping: {error}");
        std::process::exit(1);
    }
}

fn ping() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<u32> =
        std::env::args().skip(1).map(|a| a.parse()).collect::<Result<_, _>>()?;
    let &[cid, port, piece_bytes, mib] = arguments.as_slice() else {
        return Err("usage: vsock_ping CID PORT PIECE_BYTES MIB".into());
    };
    let mut stream = VsockStream::connect(&VsockAddr::new(cid, port))?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    let piece_bytes = usize::try_from(piece_bytes)?;
    let pieces = (usize::try_from(mib)? << 20).div_ceil(piece_bytes.max(1));
    let (mut sent, mut back) = (vec![0; piece_bytes], vec![0; piece_bytes]);
    let mut random = 0x5640_u64;
    let mut slowest = Duration::ZERO;
    let start = Instant::now();
    for number in 0..pieces {
        for chunk in sent.chunks_mut(8) {
            // xorshift: bytes that repeat nowhere, so that lost or doubled ones are seen
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            chunk.copy_from_slice(&random.to_le_bytes()[..chunk.len()]);
        }
        let turn = Instant::now();
        stream.write_all(&sent).map_err(|e| format!("piece {number} of {pieces}, send: {e}"))?;
        stream
            .read_exact(&mut back)
            .map_err(|e| format!("piece {number} of {pieces}, receive: {e}"))?;
        if sent != back {
            return Err(format!("piece {number} of {pieces} came back changed").into());
        }
        slowest = slowest.max(turn.elapsed());
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{pieces} pieces of {piece_bytes} bytes and back: {:.1} MiB/s each way, {:.2} ms a turn, \
         slowest {:.1} ms",
        f64::from(mib) / seconds,
        seconds * 1000.0 / pieces as f64,
        slowest.as_secs_f64() * 1000.0
    );
    Ok(())
}
