//! The place of FUSE-over-io_uring (kernel 6.14 and newer); nothing of it is built yet.
//!
//! `/dev/fuse` with clones is the main path: the kernels that microVM guests usually run (5.10 and
//! 6.1) have nothing else, and where both exist the ring wins for small metadata requests and
//! loses for one deep queue and for sequential reads. So it comes with the work on speed, as an
//! option chosen per mount, and only where a measurement of ours says that it helps. Until then
//! [`crate::init`] never lets `FUSE_OVER_IO_URING` through.
//!
//! What rules it (`Documentation/filesystems/fuse/fuse-io-uring.rst`, `fs/fuse/dev_uring.c`):
//!
//! - It must be enabled on the module (`/sys/module/fuse/parameters/enable_uring`) and agreed in
//!   INIT (bit 41). INIT, FORGET, INTERRUPT and notifications stay on `/dev/fuse`, so a lane that
//!   serves queues still has a reader.
//! - Every possible CPU has a queue, and each queue needs a registered entry before the first
//!   request, or the mount hangs; one thread may serve many queues. A refused REGISTER falls back
//!   to `/dev/fuse`.
//! - Commands need 128-byte submissions (`SETUP_SQE128`); an entry registers two buffers: one for
//!   headers (at least 288 bytes) and one for payload (at least `max_write`).
//! - A frame comes in three parts (`in_out`, `op_in`, payload) and concatenates to exactly the
//!   bytes that a read of `/dev/fuse` gives, so [`crate::frame::Frame`] is the one shape for both.
//! - A reply is a COMMIT_AND_FETCH on the queue that gave the request: the rule of the clones
//!   again.
