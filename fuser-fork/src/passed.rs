//! Fds that a service manager has passed to this process, with their names (sd_listen_fds(3)): a
//! session's, which it has kept over the death of the process before.
//!
//! Invariant: what was meant for another process is not touched. It must not know what they are.

use crate::sys;
use std::os::fd::OwnedFd;

/// More than any session has.
const FDS_MAX: u16 = 64;

/// The fds and their names; one without a name has none. None at the second call.
pub fn take() -> Vec<(String, OwnedFd)> {
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").and_then(|count| u16::try_from(count).ok());
    let Some(count) = count.filter(|&count| count <= FDS_MAX) else { return Vec::new() };
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let fds = sys::take_passed(count).into_iter();
    fds.map(|fd| (names.next().unwrap_or_default().to_owned(), fd)).collect()
}
