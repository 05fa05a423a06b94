//! The control socket. Who connects writes one line of JSON, `{"ask":"status"}`,
//! `{"ask":"counters"}` or `{"ask":"reconnect","session":7}`, and is given one line of JSON; then
//! the connection ends.
//!
//! The worker's side serves a connected stream ([`serve`]); it is the parent's that binds and
//! accepts. Whoever may connect may end the daemon too (mode 0600), but does not hold it up: what
//! he asks is bounded in bytes and time.

use crate::config::Place;
use crate::status::Status;
use crate::worker::Counters;
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ask {
    /// The sums of all counters, one flat object.
    Counters,
    /// See [`Status`].
    Status,
    /// To drop the connections of a session, so that its guest joins new ones: how many there were,
    /// as `{"connections":2}`, or an error.
    Reconnect,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    ask: Ask,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    session: Option<u64>,
}

#[derive(Deserialize)]
struct Reconnected {
    #[serde(default)]
    connections: u32,
    error: Option<String>,
}

/// Where those are that nobody has named.
pub const DEFAULT_ABOVE: &str = "/run/ringfsd";
const DEFAULT_PREFIX: &str = "control-";
/// What it is called where a unit names it.
const UNIT_NAME: &str = "control";
/// An ask has at most so many bytes.
const ASK_BYTES_MAX: u64 = 1 << 10;
/// And takes at most so long.
const ASK_LIMIT: Duration = Duration::from_secs(1);
/// An answer is never larger.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// Answers whoever is at the other end.
pub fn serve(socket: OwnedFd, counters: &Counters) {
    let mut stream = UnixStream::from(socket);
    if let Err(error) = answer(&mut stream, counters) {
        tracing::debug!(%error, "cannot answer on the control socket");
    }
}

fn answer(stream: &mut UnixStream, counters: &Counters) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(ASK_LIMIT))?;
    let Some(line) = read_line(stream)? else { return Ok(()) };
    let reply = match serde_json::from_slice(&line) {
        Ok(Request { ask: Ask::Counters, .. }) => counters.totals().to_json(),
        Ok(Request { ask: Ask::Status, .. }) => line_of(&counters.status())?,
        Ok(Request { ask: Ask::Reconnect, session }) => {
            line_of(&match session.and_then(|id| counters.reconnect(id)) {
                Some(n) => serde_json::json!({ "connections": n }),
                None => serde_json::json!({ "error": "there is no such session" }),
            })?
        }
        Err(error) => line_of(&serde_json::json!({ "error": error.to_string() }))?,
    };
    stream.write_all(reply.as_bytes())
}

/// What was asked; `None`: nothing, by somebody who only looks whether there is a daemon.
fn read_line(stream: &mut UnixStream) -> io::Result<Option<Vec<u8>>> {
    let until = Instant::now() + ASK_LIMIT;
    let mut line = Vec::new();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || line.len() as u64 > ASK_BYTES_MAX {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let mut chunk = [0; 256];
        match stream.read(&mut chunk)? {
            0 if line.is_empty() => return Ok(None),
            0 => return Ok(Some(line)),
            n => line.extend_from_slice(&chunk[..n]),
        }
        if let Some(end) = line.iter().position(|&byte| byte == b'\n') {
            line.truncate(end);
            return Ok(Some(line));
        }
    }
}

fn line_of(value: &impl Serialize) -> io::Result<String> {
    Ok(serde_json::to_string(value)? + "\n")
}

/// Asks the daemon whose control socket is there.
///
/// # Errors
/// Nobody listens there, or answers.
pub fn ask(path: &Path, ask: Ask) -> io::Result<String> {
    request(path, &Request { ask, session: None })
}

fn request(path: &Path, request: &Request) -> io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(line_of(request)?.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_line(&mut answer)?;
    match answer.is_empty() {
        true => Err(io::ErrorKind::UnexpectedEof.into()),
        false => Ok(answer),
    }
}

/// [`Ask::Status`], understood.
///
/// # Errors
/// As [`ask`], or the answer is none.
pub fn ask_status(path: &Path) -> io::Result<Status> {
    Ok(serde_json::from_str(&ask(path, Ask::Status)?)?)
}

/// [`Ask::Reconnect`]: how many connections were dropped.
///
/// # Errors
/// As [`ask`], or there is no such session (`NotFound`).
pub fn ask_reconnect(path: &Path, session: u64) -> io::Result<u32> {
    let asked = Request { ask: Ask::Reconnect, session: Some(session) };
    let answer: Reconnected = serde_json::from_str(&request(path, &asked)?)?;
    match answer.error {
        None => Ok(answer.connections),
        Some(error) => Err(io::Error::new(io::ErrorKind::NotFound, error)),
    }
}

/// The control socket's path; what dead daemons left of default ones goes. `None`: there is to be
/// none, or none was named and there is no place for it.
pub fn path(option: &Place) -> Option<PathBuf> {
    match option {
        Place::None => None,
        Place::At(path) => Some(path.clone()),
        Place::Default => {
            let above = Path::new(DEFAULT_ABOVE);
            let made =
                std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o755)
                    .recursive(true)
                    .create(above);
            if let Err(error) = made {
                tracing::debug!(%error, "no control socket: {DEFAULT_ABOVE} cannot be made");
                return None;
            }
            running(true);
            Some(above.join(format!("{DEFAULT_PREFIX}{}", std::process::id())))
        }
    }
}

/// Whether the process lives that a default control socket is named after.
fn names_a_process(name: &OsStr) -> bool {
    let number = name.to_str().and_then(|name| name.strip_prefix(DEFAULT_PREFIX)?.parse().ok());
    number.and_then(Pid::from_raw).is_some_and(|pid| test_kill_process(pid) != Err(Errno::SRCH))
}

/// The control sockets below /run on which daemons answer: default ones, and those of the systemd
/// units. `sweep`: default ones whose daemon is gone are removed.
pub fn running(sweep: bool) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(DEFAULT_ABOVE) else { return Vec::new() };
    let mut alive = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let is_default = name.to_str().is_some_and(|name| name.starts_with(DEFAULT_PREFIX));
        let path = match is_default || name == UNIT_NAME {
            true => entry.path(),
            false => entry.path().join(UNIT_NAME),
        };
        match UnixStream::connect(&path) {
            Ok(_) => alive.push(path),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => alive.push(path),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                // One that is just being made is refused too.
                if sweep && is_default && !names_a_process(&name) {
                    let _ = std::fs::remove_file(&path);
                }
            }
            Err(_) => {}
        }
    }
    alive.sort();
    alive
}
