//! The wire format of ringfs: bytes and time in, bytes out.
//!
//! No fd, thread, clock or logger lives here, and no unsafe code: both ends, the fuzz targets and
//! the simulations drive the same state machines. The way of the bytes:
//!
//! - [`abi`]: the kernel's FUSE layouts, which travel unchanged inside records;
//! - [`limits`]: every bound, and how the bounds relate;
//! - [`batch`]: what one send carries; a checked view of it, and a writer into a lent buffer;
//! - [`deframe`]: a stream of bytes, cut into whole batches;
//! - [`hello`]: the handshake's messages;
//! - [`restore`]: what rebuilds a session on a daemon that does not know it;
//! - [`slot`]: the session table: what is in flight, and exactly once;
//! - [`table`]: the daemon's half of it, which outlives connections;
//! - [`session`]: one connection's sequence numbers and acknowledgements;
//! - [`spin`]: how often either end looks again before it sleeps.
#![forbid(unsafe_code)]

pub mod abi;
pub mod batch;
pub mod deframe;
pub mod hello;
pub mod limits;
pub mod restore;
pub mod session;
pub mod slot;
pub mod spin;
pub mod table;
