//! The control socket: one JSON object of counters to whoever connects.

use crate::accept::{Address, Listener};
use crate::daemon::DaemonError;
use crate::worker::Counters;
use rustix::io::Errno;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

/// The thread that answers; ends with this value.
pub struct Control {
    /// Closing it tells the thread to end.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Binds `path` and answers there.
    pub fn start(path: PathBuf, counters: Counters) -> Result<Control, DaemonError> {
        let listener = Listener::bind(Address::Unix(path)).map_err(DaemonError::Control)?;
        let (stop, stopped) = UnixStream::pair()?;
        let stopped = OwnedFd::from(stopped);
        let thread =
            std::thread::Builder::new().name("ringfs-control".into()).spawn(move || {
                crate::accept::run(&[listener], &stopped, |accepted| {
                    let mut stream = UnixStream::from(accepted.socket);
                    // Who does not read is not waited for.
                    let _ = stream.set_nonblocking(false);
                    let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
                    if let Err(error) = stream.write_all(counters.totals().to_json().as_bytes())
                        && error.raw_os_error() != Some(Errno::PIPE.raw_os_error())
                    {
                        tracing::debug!(%error, "cannot answer on the control socket");
                    }
                });
            })?;
        Ok(Control { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
