//! Raw FUSE sessions: a mount, N clones of its `/dev/fuse` fd, frames in and out by the same fd.
//!
//! No file system trait and no dispatch: a request is a checked view of the kernel's bytes, a reply
//! is bytes that go back by the clone that read it. The way of a frame:
//!
//! - [`device`]: an fd of `/dev/fuse`; one method, one system call;
//! - [`mount`]: mount and unmount, directly or by `fusermount3`; [`mountinfo`]: what is mounted;
//! - [`init`]: the pure negotiation of INIT;
//! - [`reader`]: the clones of one session, and the debt of a reply to the clone that read;
//! - [`frame`]: what a request's bytes say, and the headers of replies;
//! - [`notify`]: what we tell the kernel unasked;
//! - [`passed`]: fds that the process was started with;
//! - [`uring`]: the same frames by FUSE-over-io_uring.
//!
//! Of the other crates it may see the kernel's layouts (`ringfs_wire::abi`) only. `unsafe` stands
//! in `sys.rs` alone.

pub mod device;
pub mod frame;
mod fusermount;
pub mod init;
pub mod mount;
pub mod mountinfo;
pub mod notify;
mod options;
pub mod passed;
pub mod reader;
mod sys;
pub mod uring;

pub use sys::return_large_memory;
