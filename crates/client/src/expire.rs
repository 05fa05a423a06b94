//! Names that the kernel may be wrong about: it is asked to look them up again.
//!
//! A request that was told to have failed may have run all the same (docs/sessions.md): then the
//! kernel goes on with a name that is gone, as long as names are good. The notification takes the
//! directory's lock, which whoever asked has until the answer is there, and the next one then.
//!
//! Invariant: no thread of a client sends it. Who waits for that lock cannot be killed, and who has
//! it may wait for a reply of the next client (apart.rs). So another process sends it, with a copy
//! of the session's fd. That copy keeps the connection from ending with keeper and client; so that
//! process watches them, by a pipe that both hold, and ends the connection when they are gone.

use crate::keeper::Channel;
use crate::lane::lock;
use fuser_fork::device::{DEVICE_PATH, Device, DeviceError};
use fuser_fork::mount::{AbortOutcome, abort_or_unmount};
use fuser_fork::notify::{Notice, NotifyOutcome};
use ringfs_wire::abi::{InHeader, Opcode};
use ringfs_wire::batch::RecordHeader;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use zerocopy::FromBytes;

/// Names of one process.
const AT_ONCE_MAX: usize = 64;
/// Names that wait; what comes beyond is good until its time is over, as without all this.
const WAITING_MAX: usize = 4096;

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    parent: u64,
    name: Vec<u8>,
}

/// The names that a request makes or takes away; `args` is all behind its header.
pub fn names_of(opcode: u32, nodeid: u64, args: &[u8]) -> Vec<Name> {
    use Opcode::{Create, Link, Mkdir, Mknod, Rename, Rename2, Rmdir, Symlink, Unlink};
    let opcode = Opcode::from_u32(opcode);
    let fixed = match opcode {
        Some(Unlink | Rmdir | Symlink) => 0,
        Some(Mkdir | Link | Rename) => 8,
        Some(Mknod | Create | Rename2) => 16,
        Some(_) | None => return Vec::new(),
    };
    let is_move = matches!(opcode, Some(Rename | Rename2));
    let newdir = u64::read_from_prefix(args).map_or(0, |(newdir, _)| newdir);
    let parents = [Some(nodeid), is_move.then_some(newdir)].into_iter().flatten();
    let texts = args.get(fixed..).unwrap_or_default().split(|byte| *byte == 0);
    let named = parents.zip(texts).filter(|(_, text)| !text.is_empty());
    named.map(|(parent, text)| Name { parent, name: text.to_vec() }).collect()
}

/// The same of a REQUEST record, as it was sent.
pub fn names_of_record(record: &[u8]) -> Vec<Name> {
    let Ok((header, rest)) = RecordHeader::read_from_prefix(record) else { return Vec::new() };
    let Ok((nodeid, _)) = u64::read_from_prefix(rest) else { return Vec::new() };
    let args = record.get(size_of::<InHeader>()..).unwrap_or_default();
    names_of(header.code, nodeid, args)
}

/// How a mount's kernel is told.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manner {
    /// The number of the connection, to end it by.
    pub dev_minor: Option<u32>,
    /// The kernel knows no notification but one that drops the name (before 6.2).
    pub drops: bool,
}

/// Both ends of a pipe that keeper and client hold.
#[derive(Debug)]
struct Alive {
    watched: OwnedFd,
    _held: OwnedFd,
}

#[derive(Debug, Default)]
struct Waiting {
    names: Vec<Name>,
    is_running: bool,
}

/// What is to be looked up again.
#[derive(Debug, Default)]
pub struct Expire {
    waiting: Arc<Mutex<Waiting>>,
    alive: OnceLock<Arc<Alive>>,
    is_stored: AtomicBool,
}

impl Expire {
    /// The keeper has made the pipe, and holds it too. Without it nobody is told anything.
    pub fn watch(&self, [watched, held]: [OwnedFd; 2]) {
        let _ = self.alive.set(Arc::new(Alive { watched, _held: held }));
    }

    /// The service manager's next keeper goes on where both are gone.
    pub fn is_stored(&self) {
        self.is_stored.store(true, Ordering::Relaxed);
    }

    /// Has the kernel look these up again, some time after the answer that it waits for.
    pub fn look_again(&self, device: &Arc<Device>, manner: Manner, names: Vec<Name>) {
        let Some(alive) = self.alive.get() else { return };
        let mut waiting = lock(&self.waiting);
        let room = WAITING_MAX - waiting.names.len();
        waiting.names.extend(names.into_iter().take(room));
        if waiting.names.is_empty() || std::mem::replace(&mut waiting.is_running, true) {
            return;
        }
        let alive = (!self.is_stored.load(Ordering::Relaxed)).then(|| Arc::clone(alive));
        let (all, device) = (Arc::clone(&self.waiting), Arc::clone(device));
        let thread = std::thread::Builder::new().name("expire".into());
        let spawned = thread.spawn(move || {
            while let Some(names) = next_of(&all) {
                if let Err(error) = tell(&device, alive.as_deref(), manner, &names) {
                    tracing::warn!(%error, "the kernel may go on with names that are gone");
                }
            }
        });
        waiting.is_running = spawned.is_ok();
    }
}

/// What the next process is to tell; `None`: another thread will have to be started.
fn next_of(waiting: &Mutex<Waiting>) -> Option<Vec<Name>> {
    let mut waiting = lock(waiting);
    let n = waiting.names.len().min(AT_ONCE_MAX);
    waiting.is_running = n > 0;
    (n > 0).then(|| waiting.names.drain(..n).collect())
}

/// By another process, which may take as long as the directories' locks are held.
fn tell(device: &Device, alive: Option<&Alive>, manner: Manner, names: &[Name]) -> io::Result<()> {
    let (channel, mut teller) = start(manner)?;
    let watched = alive.map(|alive| alive.watched.as_fd());
    let fds: Vec<_> = std::iter::once(device.as_fd()).chain(watched).collect();
    let message = |Name { parent, name }: &Name| [&parent.to_ne_bytes()[..], name].concat();
    let sent = channel
        .send(b"fds", &fds)
        .and_then(|()| names.iter().try_for_each(|name| channel.send(&message(name), &[])));
    drop(channel);
    teller.wait()?;
    Ok(sent?)
}

fn start(manner: Manner) -> io::Result<(Channel, Child)> {
    let (channel, theirs) = Channel::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("ringfs").arg("expire").stdin(Stdio::from(theirs)).stdout(Stdio::null());
    if let Some(minor) = manner.dev_minor {
        command.arg("--dev-minor").arg(minor.to_string());
    }
    if manner.drops {
        command.arg("--drops");
    }
    Ok((channel, command.spawn()?))
}

/// What that process gets by its standard input: the device and perhaps the pipe, then the names,
/// each a message, which nobody else is to see as a command line would have it.
fn receive(drops: bool) -> io::Result<(Device, Option<OwnedFd>, Vec<Notice>)> {
    let channel = Channel::inherited()?;
    let mut fds = channel.receive(RecvFlags::empty())?.fds.into_iter();
    let device = Device::from_fd(fds.next().ok_or(Errno::BADF)?, DEVICE_PATH);
    let mut notices = Vec::new();
    while let Ok(message) = channel.receive(RecvFlags::empty()) {
        notices.extend(notice(&message.bytes, drops));
    }
    Ok((device, fds.next(), notices))
}

/// That process.
pub fn run(dev_minor: Option<u32>, drops: bool) -> ExitCode {
    let Ok((device, watched, notices)) = receive(drops) else { return ExitCode::FAILURE };
    let Ok(session) = device.as_fd().try_clone_to_owned() else { return ExitCode::FAILURE };
    let sender = std::thread::Builder::new().spawn(move || match send(&device, &notices) {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            tracing::warn!(%error, "the kernel may go on with names that are gone");
            std::process::exit(1);
        }
    });
    let Ok(sender) = sender else { return ExitCode::FAILURE };
    if let Some(watched) = watched {
        wait_for_end(&watched);
        end(&session, dev_minor);
    }
    let _ = sender.join();
    ExitCode::FAILURE
}

/// Of whoever has the other end.
fn wait_for_end(pipe: &OwnedFd) {
    let mut pipe = [PollFd::new(pipe, PollFlags::empty())];
    while poll(&mut pipe, None) == Err(Errno::INTR) {}
}

/// Of the connection.
fn end(session: &OwnedFd, dev_minor: Option<u32>) {
    let Some(minor) = dev_minor else { return };
    match abort_or_unmount(session.as_fd(), minor) {
        Ok(AbortOutcome::NoConnection) => {}
        Ok(ended) => tracing::warn!(?ended, "keeper and client are gone: the connection ends"),
        Err(error) => tracing::error!(
            %error,
            "keeper and client are gone, and without the control files of FUSE (fusectl at \
             /sys/fs/fuse/connections) the connection cannot be ended"
        ),
    }
}

fn notice(message: &[u8], drops: bool) -> Option<Notice> {
    let (parent, name) = message.split_first_chunk::<8>()?;
    let notice = if drops { Notice::inval_entry } else { Notice::expire_entry };
    notice(u64::from_ne_bytes(*parent), name).ok()
}

fn send(device: &Device, notices: &[Notice]) -> Result<(), DeviceError> {
    for notice in notices {
        if notice.send(device)? == NotifyOutcome::Unmounted {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_requests() {
        let check = |opcode: Opcode, fixed: &[u8], texts: &[u8], expected: &[(u64, &[u8])]| {
            let args = [fixed, texts].concat();
            let names = names_of(opcode as u32, 5, &args);
            let names: Vec<_> = names.iter().map(|its| (its.parent, &its.name[..])).collect();
            assert_eq!(names, expected, "{opcode:?}");
            let header = RecordHeader { code: opcode as u32, ..RecordHeader::default() };
            let mut record = [zerocopy::IntoBytes::as_bytes(&header), &5u64.to_le_bytes()].concat();
            record.resize(size_of::<InHeader>(), 0);
            record.extend_from_slice(&args);
            let again = names_of_record(&record);
            assert!(again.iter().map(|its| (its.parent, &its.name[..])).eq(names), "{opcode:?}");
        };
        let newdir = &7u64.to_le_bytes()[..];
        let newdir_flags = &[newdir, &[0; 8]].concat()[..];
        check(Opcode::Unlink, b"", b"a\0", &[(5, b"a")]);
        check(Opcode::Rmdir, b"", b"a\0", &[(5, b"a")]);
        check(Opcode::Symlink, b"", b"a\0target\0", &[(5, b"a")]);
        check(Opcode::Mkdir, newdir, b"a\0", &[(5, b"a")]);
        check(Opcode::Link, newdir, b"a\0", &[(5, b"a")]);
        check(Opcode::Mknod, newdir_flags, b"a\0", &[(5, b"a")]);
        // An extension may follow.
        check(Opcode::Create, newdir_flags, b"a\0\x18\0\0\0", &[(5, b"a")]);
        check(Opcode::Rename, newdir, b"a\0bc\0", &[(5, b"a"), (7, b"bc")]);
        check(Opcode::Rename2, newdir_flags, b"a\0bc\0", &[(5, b"a"), (7, b"bc")]);
        check(Opcode::Write, newdir_flags, b"a\0", &[]);
        check(Opcode::Rename2, newdir, b"", &[]);
        assert_eq!(names_of_record(&[0; 12]), []);
    }
}
