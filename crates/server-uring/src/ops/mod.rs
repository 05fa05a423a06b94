//! The handlers, one file a family; dispatch.rs says which opcode runs which.
//!
//! A handler has the shape `fn(&Fs, &Request, &mut [u8]) -> Result<usize, Errno>`: it checks each
//! field before anything acts on it, and writes the reply's body to `out`, whose length is the
//! rule's bound.

pub mod attrs;
pub mod dirs;
pub mod init;
pub mod io;
pub mod names;
pub mod xattrs;

use rustix::io::Errno;

use crate::creds::{CredsError, NoFsetid};

/// For a call that must clear suid and sgid where an ordinary user's would.
pub(crate) fn no_fsetid(kill: bool) -> Result<Option<NoFsetid>, Errno> {
    kill.then(NoFsetid::enter).transpose().map_err(CredsError::errno)
}
