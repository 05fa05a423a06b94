//! One connection after its handshake: what its lane's thread and others share of it.
//!
//! Invariant: batches leave one after the other, whole. The lane's thread sends them; a GOODBYE of
//! the main thread's goes between two, or not at all. It must not know requests.

use crate::handshake::Joined;
use crate::lane::lock;
use crate::transport::Socket;
use ringfs_wire::batch::{BatchBuilder, Kind, RecordHeader};
use ringfs_wire::deframe::Deframer;
use ringfs_wire::hello::Reason;
use ringfs_wire::session::{LinkRx, LinkTx};
use rustix::io::Errno;
use rustix::net::{AddressFamily, sockopt};
use rustix::time::{ClockId, clock_gettime};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// One connection.
#[derive(Debug)]
pub struct Conn {
    socket: Socket,
    tx: Mutex<LinkTx>,
    /// A batch is sealed and has not left whole.
    is_sending: AtomicBool,
    sent: AtomicU64,
    received: AtomicU64,
}

/// What only the lane's thread holds.
#[derive(Debug)]
pub struct ConnRx {
    /// Checks sequence numbers and sums.
    pub rx: LinkRx,
    /// The bytes that came and are not a whole batch yet.
    pub deframer: Deframer,
    /// Bytes can leave the socket without a copy, and nobody has to see them.
    pub can_lift: bool,
}

impl Conn {
    /// Takes a connection apart after its handshake.
    pub fn new(joined: Joined) -> (Conn, ConnRx) {
        let is_unix = sockopt::socket_domain(&joined.socket) == Ok(AddressFamily::UNIX);
        let can_lift = is_unix && !joined.rx.has_payload_crc();
        let conn = Conn {
            sent: AtomicU64::new(joined.tx.sent()),
            received: AtomicU64::new(joined.rx.received()),
            is_sending: AtomicBool::new(false),
            socket: joined.socket,
            tx: Mutex::new(joined.tx),
        };
        (conn, ConnRx { rx: joined.rx, deframer: joined.deframer, can_lift })
    }

    /// Completes a batch in `buffer`: its length. It must be sent next, and
    /// [`Conn::has_sent`] called then.
    pub fn seal(&self, builder: &mut BatchBuilder, buffer: &mut [u8]) -> usize {
        let mut tx = lock(&self.tx);
        self.is_sending.store(true, Ordering::Relaxed);
        self.seal_locked(&mut tx, builder, buffer).len()
    }

    /// The batch that was sealed last has left whole.
    pub fn has_sent(&self) {
        self.is_sending.store(false, Ordering::Release);
    }

    fn seal_locked<'b>(
        &self,
        tx: &mut LinkTx,
        builder: &mut BatchBuilder,
        buffer: &'b mut [u8],
    ) -> &'b [u8] {
        let bytes = tx.seal(builder, buffer, self.received.load(Ordering::Acquire));
        // Before the bytes leave: the answer may acknowledge them at once.
        self.sent.store(tx.sent(), Ordering::Release);
        bytes
    }

    /// Sends what the transport takes now; `EAGAIN`: nothing.
    pub fn try_send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        self.socket.try_send(bytes)
    }

    /// Receives what is there; `EAGAIN`: nothing. 0: the peer has closed.
    pub fn try_receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        self.socket.try_receive(buffer)
    }

    /// What is polled for input and room.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Batches sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Acquire)
    }

    /// Batches accepted so far: acknowledged by the next batch that goes out.
    pub fn set_received(&self, batches: u64) {
        self.received.store(batches, Ordering::Release);
    }

    /// Ends it: its thread wakes.
    pub fn shutdown(&self) {
        self.socket.shutdown();
    }

    /// A GOODBYE, if no batch is half sent.
    pub fn say_goodbye(&self, reason: Reason) {
        let Ok(mut tx) = self.tx.try_lock() else { return };
        let mut buffer = [0; 64];
        let mut builder = BatchBuilder::new();
        let header =
            RecordHeader { kind: Kind::Goodbye as u8, code: reason as u32, ..Default::default() };
        if !self.is_sending.load(Ordering::Acquire) && builder.push(&mut buffer, header, &[]) {
            // Without room for it the daemon learns it when the session's grace is over.
            let bytes = self.seal_locked(&mut tx, &mut builder, &mut buffer);
            let _ = self.socket.try_send(bytes);
        }
    }
}

/// The time since some start, to some milliseconds and without a system call.
pub fn coarse_now() -> Duration {
    let now = clock_gettime(ClockId::MonotonicCoarse);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}
