//! The control socket's other side: one JSON object of counters to whoever the parent hands over.

use crate::worker::Counters;
use rustix::io::Errno;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

/// The thread that answers; ends with this value.
pub struct Control {
    askers: Sender<OwnedFd>,
}

impl Control {
    /// Starts the thread.
    ///
    /// # Errors
    /// There is no thread.
    pub fn start(counters: Counters) -> std::io::Result<Control> {
        let (askers, asked) = channel();
        let thread = std::thread::Builder::new().name("ringfs-control".into());
        thread.spawn(move || asked.into_iter().for_each(|asker| answer(asker, &counters)))?;
        Ok(Control { askers })
    }

    /// Answers, when those before have been.
    pub fn answer(&self, asker: OwnedFd) {
        let _ = self.askers.send(asker);
    }
}

fn answer(asker: OwnedFd, counters: &Counters) {
    let mut stream = UnixStream::from(asker);
    // Who does not read is not waited for.
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
    if let Err(error) = stream.write_all(counters.totals().to_json().as_bytes())
        && error.raw_os_error() != Some(Errno::PIPE.raw_os_error())
    {
        tracing::debug!(%error, "cannot answer on the control socket");
    }
}
