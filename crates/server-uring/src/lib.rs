//! The host daemon of ringfs: io_uring shards around `PassthroughFs`. See ARCHITECTURE.md.

pub mod caller;
pub mod creds;
pub mod dispatch;
pub mod fdops;
pub mod fs;
pub mod handles;
pub mod import;
pub mod nodes;
pub mod ops;
pub mod passthrough;
pub mod reply;
