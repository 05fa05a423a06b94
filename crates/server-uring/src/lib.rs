//! The host daemon of ringfs: io_uring shards around PassthroughFs. See ARCHITECTURE.md.

pub mod accept;
pub mod buffers;
mod cold;
pub mod connection;
pub mod control;
pub mod creds;
pub mod daemon;
pub mod dispatch;
mod evict;
pub mod fdops;
pub mod fds;
pub mod fs;
pub mod greet;
pub mod handles;
pub mod history;
pub mod import;
pub mod limits;
pub mod link;
pub mod mailbox;
pub mod nodes;
pub mod notes;
pub mod op;
pub mod ops;
pub mod passthrough;
pub mod pool;
pub mod reply;
pub mod restore;
pub mod ring;
#[doc(hidden)]
pub mod ring_sim;
pub mod ring_threads;
pub mod session;
pub mod shard;
pub mod splice;
pub mod stats;
pub mod worker;
