//! The host daemon: one io_uring ring a core around `PassthroughFs`.

pub mod caller;
pub mod dispatch;
pub mod fs;
pub mod handles;
pub mod nodes;
pub mod ops;
pub mod passthrough;
pub mod reply;
