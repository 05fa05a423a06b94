//! What a shard has in flight: a closed set of operations on sockets and files.
//!
//! An [`Op`] owns all that the kernel may touch while it runs: the fd and the memory. The ring
//! takes it whole and gives it back whole with the result.

use crate::buffers::Buf;
use crate::handles::OpenFile;
use ringfs_wire::batch::RecordHeader;
use ringfs_wire::slot::SlotUse;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// One operation, and whose it is.
#[derive(Debug)]
pub struct Op {
    /// What is done.
    pub io: Io,
    /// Who waits for it.
    pub tag: Tag,
}

/// What is done.
#[derive(Debug)]
#[allow(missing_docs, reason = "the fields are the arguments of the call")]
pub enum Io {
    /// Receive at least a byte into `buf[range]`.
    Recv { socket: Arc<OwnedFd>, buf: Buf, range: Range<usize> },
    /// Send `buf[range]`, all of it.
    Send { socket: Arc<OwnedFd>, buf: Buf, range: Range<usize> },
    /// Wait until most of what was sent has been taken.
    Room { socket: Arc<OwnedFd> },
    /// Read into `buf[range]`.
    Read { file: Arc<OpenFile>, buf: Buf, range: Range<usize>, offset: u64 },
    /// Write `buf[range]`.
    Write { file: Arc<OpenFile>, buf: Arc<Buf>, range: Range<usize>, offset: u64 },
    /// Bring data to the disk.
    Fsync { file: Arc<OpenFile>, data_only: bool },
    /// Wait until the eventfd is written to.
    Wake { event: Arc<OwnedFd>, count: Box<[u8; 8]> },
}

impl Io {
    /// The fd that it works on.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Io::Recv { socket, .. } | Io::Send { socket, .. } | Io::Room { socket } => {
                socket.as_fd()
            }
            Io::Read { file, .. } | Io::Write { file, .. } | Io::Fsync { file, .. } => file.as_fd(),
            Io::Wake { event, .. } => event.as_fd(),
        }
    }
}

impl Op {
    /// It works on a file.
    pub(crate) fn is_on_file(&self) -> bool {
        match &self.io {
            Io::Read { .. } | Io::Write { .. } | Io::Fsync { .. } => true,
            Io::Recv { .. } | Io::Send { .. } | Io::Room { .. } | Io::Wake { .. } => false,
        }
    }
}

/// Who waits for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// The shard itself.
    Shard,
    /// The stream of this connection.
    Stream(usize),
    /// A request.
    Request(RequestTag),
}

impl Tag {
    /// The peer for whom it is done.
    pub(crate) fn owner(&self) -> u64 {
        match self {
            Tag::Request(tag) => tag.owner,
            Tag::Shard | Tag::Stream(_) => 0,
        }
    }
}

/// Where a request's reply goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestTag {
    /// Key of the connection in its shard.
    pub conn: usize,
    /// The peer that has it, where the ring does the request: threads are shared by peers.
    pub owner: u64,
    /// The lane that owns the slot.
    pub lane: u8,
    /// The slot that the reply frees.
    pub at: SlotUse,
    /// Reply bytes that were set aside for it.
    pub reserved: u32,
    /// Bytes that a WRITE has stored so far.
    pub stored: u32,
    /// A WRITE of pages: all or an error.
    pub pages: bool,
    /// The kind of request.
    pub opcode: u8,
    /// Where it runs.
    pub place: Place,
    /// When the shard took it up, in units of 2048 ns of its clock: enough for hours, and for what
    /// is not over at once.
    pub begun: u32,
    /// The node that it names.
    pub node: u64,
}

/// Where a request runs, for people who ask where it was slow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// On the shard's thread.
    #[default]
    Shard,
    /// On the ring: a disk, or a file system that takes its time.
    Ring,
    /// On a thread of the pool.
    Pool,
    /// Put off until the peer had room for a large reply.
    Peer,
}

impl Place {
    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Place::Shard => "shard",
            Place::Ring => "ring",
            Place::Pool => "pool",
            Place::Peer => "peer",
        }
    }
}

impl RequestTag {
    /// Of a request that a record brought or names.
    pub fn of(conn: usize, record: &RecordHeader) -> RequestTag {
        let at = SlotUse { slot: record.slot, seq: record.slot_seq };
        RequestTag {
            conn,
            owner: 0,
            lane: record.lane,
            at,
            reserved: 0,
            stored: 0,
            pages: false,
            opcode: u8::try_from(record.code).unwrap_or(u8::MAX),
            place: Place::Shard,
            begun: 0,
            node: 0,
        }
    }
}
