//! The daemon's own bounds; the wire's are in `ringfs_wire::limits`.

use ringfs_wire::limits::{BATCH_BYTES_MAX, BATCH_TARGET_BYTES};
use std::time::Duration;

/// Alignment of buffers, and of the data in them: enough for O_DIRECT on any block size in use.
pub const BUFFER_ALIGN: usize = 4096;
/// A buffer for batches of small records.
pub const SMALL_BUFFER_BYTES: usize = BATCH_TARGET_BYTES + 2 * BUFFER_ALIGN;
/// A buffer for the largest batch, with its payload at an aligned place.
pub const LARGE_BUFFER_BYTES: usize = BATCH_BYTES_MAX.next_multiple_of(BUFFER_ALIGN) + BUFFER_ALIGN;
/// Free small buffers that a shard keeps instead of giving them back to the allocator.
pub const SMALL_BUFFERS_KEPT: usize = 64;
/// Large buffers that a shard keeps once it has used them, registered with its ring.
pub const LARGE_BUFFERS_KEPT: usize = 8;
/// Large buffers of a shard that are out at once; requests that need one more wait.
pub const LARGE_BUFFERS_MAX: usize = 96;
/// As many there are wherever memory is short: enough for what comes in, and for its answers.
pub const LARGE_BUFFERS_MIN: usize = 8;
/// The part of a memory limit that large buffers may take together.
pub const LARGE_BUFFERS_OF_MEMORY: u64 = 4;
/// How often it is looked whether the daemon may use other CPUs.
pub const CPUS_LOOKED_AT_MS: u64 = 1_000;
/// Bytes of replies, made or being made, that one connection may have before it is read no further.
pub const REPLY_BYTES_PER_CONN_MAX: usize = 8 << 20;
/// Records of one connection that a shard steps through before it looks at the next connection.
pub const RECORDS_A_TURN_MAX: usize = 128;
/// Bytes of large replies from memory that a shard makes before it looks who else has come.
pub const BULK_BYTES_A_TURN: usize = 256 << 10;
/// A reply up to this size is made in the connection's own batch, a larger one in its own buffer.
pub const REPLY_INLINE_BYTES_MAX: usize = 32 << 10;
/// Replies from this size on are spliced from the page cache into the socket.
pub const SPLICE_BYTES_MIN: usize = 64 << 10;
/// What a Unix socket may hold (in the kernel's count) so that it takes such a reply at once.
pub const SPLICE_SEND_BUFFER_BYTES: usize = 2304 << 10;
/// Sockets of one shard that may hold so much; the others are sent copies.
pub const SPLICE_SOCKETS_MAX: usize = 64;
/// Connections that a shard looks at before it sleeps; the others are the ring's alone.
pub const LISTENING_MAX: usize = 16;
/// Connections of one shard.
pub const CONNS_PER_SHARD_MAX: usize = 4096;
/// Connections that have not said HELLO yet.
pub const GREETINGS_MAX: usize = 64;
/// Time to say HELLO.
pub const HELLO_TIMEOUT_MS: u64 = 5_000;
/// Where others wait for its buffers, or where it is being closed: time for a peer to take or to
/// complete one batch before it is cut off.
pub const STALL_LIMIT_MS: u64 = 5_000;
/// How often stalled peers are looked for while anybody waits.
pub const SWEEP_INTERVAL_MS: u64 = 500;
/// Sessions of one daemon.
pub const SESSIONS_MAX: usize = 1024;
/// Those of them that belong to one peer.
pub const SESSIONS_PER_PEER_MAX: usize = SESSIONS_MAX / 4;
/// Sessions that have lost all their connections and are kept for a while.
pub const DETACHED_MAX: usize = SESSIONS_MAX / 2;
/// Those of them that belong to one peer.
pub const DETACHED_PER_PEER_MAX: usize = 64;
/// Tickets of sessions that have ended, which tell their guests from clones.
pub const GONE_TICKETS_MAX: usize = 2 * SESSIONS_MAX;
/// How long such a session is kept, where nobody says otherwise.
pub const GRACE_SECS_DEFAULT: u32 = 600;
/// Time for the old connection of a newcomer to answer whether it lives.
pub const PROBE: Duration = Duration::from_millis(500);
/// When it is looked at whether it takes what is on its way to it.
pub const PROBE_LOOK: Duration = Duration::from_millis(100);
/// The same while it brings something else, or takes what was sent before the question: less than
/// a newcomer waits for its WELCOME.
pub const PROBE_BUSY: Duration = Duration::from_secs(4);
/// Newcomers of one connection that wait for that.
pub const NEWCOMERS_MAX: usize = 32;
/// All of them in a shard; the connection that most wait for is the one that has to do with less.
pub const NEWCOMERS_PER_SHARD_MAX: usize = CONNS_PER_SHARD_MAX;
/// From when on a request is slow, where nobody says otherwise.
pub const SLOW_OP_MS_DEFAULT: u32 = 1000;
/// Those who wait to be answered on the control socket, and on that of metrics.
pub const VISITORS_MAX: usize = 16;
/// Threads for calls that may block long.
pub const POOL_THREADS_MAX: usize = 16;
/// Threads of one shard for file operations that the ring does not do.
pub const FILE_THREADS_MAX: usize = 8;
/// Operations of two peers that the ring has had for so long, or twice that: what the kernel's
/// threads have not begun goes to those.
pub const RING_LOOK_MS: u32 = 100;
/// How much less important they are than shards (nice(2)).
pub const POOL_NICE: i32 = 5;
/// A request up to this size that waits for a pool thread is copied; a larger one keeps the buffer
/// that it came in.
pub const POOL_COPY_BYTES_MAX: usize = 8 << 10;
/// Nodes of a rebuilt session that a pool thread takes in before others have their turn.
pub const WARMED_A_TURN_MAX: usize = 64;
/// Bytes that are kept of a session's nodes without fds, before what its guest tells of further
/// ones is not kept: enough for 3,000,000 of ordinary names.
pub const COLD_BYTES_PER_SESSION_MAX: usize = 512 << 20;
/// What one of them takes at most besides its own bytes: those it is rounded up by, a number in a
/// table that is less than half full, and an entry in a set where the guest tells of its file more
/// than once.
pub const COLD_NODE_BYTES: usize = 80;
/// Inodes that have an fd, where nobody says otherwise, before those that were not used for the
/// longest time are let go: they take 350 bytes each, and others 75.
pub const NODES_WITH_FD_DEFAULT: usize = 20_000;
/// The part of the memory that the daemon may have which is for that of all sessions.
pub const COLD_BYTES_OF_MEMORY: u64 = 4;
/// Sessions of one share that are being opened at once; with more, its file system is stuck.
pub const OPENINGS_PER_SHARE_MAX: usize = 64;
/// Entries of a shard's submission queue.
pub const RING_ENTRIES: u32 = 512;

const _: () = assert!(SMALL_BUFFER_BYTES > BATCH_TARGET_BYTES + REPLY_INLINE_BYTES_MAX / 8);
const _: () = assert!(REPLY_BYTES_PER_CONN_MAX > 2 * LARGE_BUFFER_BYTES);
const _: () = assert!(LARGE_BUFFERS_MAX * LARGE_BUFFER_BYTES < 128 << 20);
