//! The file system side of the daemon, driven by requests as bytes, without a socket.

mod dirs;
mod hostile;
mod killed;
mod life;
mod pressure;
mod random;
mod restore;
mod restore_hostile;
mod rights;
mod support;
