//! An fd of `/dev/fuse`: open it, clone its session, read a frame, write a reply.
//!
//! Invariant: one method is one system call (opening makes two), and what the kernel answers in the
//! normal life of a session (nothing there, request gone, unmounted) is an outcome, not an error.
//! It must not look into frames beyond the header of a reply, and must not retry by itself.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ringfs_wire::abi::OutHeader;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};
use zerocopy::FromBytes;

use crate::sys;

/// Where the driver's node is.
pub const DEVICE_PATH: &str = "/dev/fuse";

/// The character device 10:229 (`FUSE_MINOR` in `include/linux/miscdevice.h`).
const DEVICE_NUMBER: (u32, u32) = (10, 229);

/// The kernel's `FUSE_MIN_READ_BUFFER`, bytes.
pub const READ_BUFFER_BYTES_MIN: usize = 8192;

/// Room beyond `max_write` for the header and arguments of a request, bytes.
pub const READ_BUFFER_HEADROOM_BYTES: usize = 4096;

/// The kernel takes errors of -511..=0 from us; what lies below is its own.
pub(crate) const ERRNO_MAX: i32 = 511;

/// How many bytes a buffer for [`Device::read_frame`] needs: with fewer the kernel says `EINVAL`.
pub const fn read_buffer_bytes(max_write: u32) -> usize {
    let wanted = max_write as usize + READ_BUFFER_HEADROOM_BYTES;
    if wanted < READ_BUFFER_BYTES_MIN { READ_BUFFER_BYTES_MIN } else { wanted }
}

/// Why a device cannot be opened, cloned, read or written.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The node is missing.
    #[error(
        "{path} does not exist: load the driver (`modprobe fuse`) or, where it is built in, make \
         the node (`mknod {path} c 10 229`)"
    )]
    Missing {
        /// What was opened.
        path: PathBuf,
    },
    /// The node is closed to this user.
    #[error("no permission to open {path}: run as root, or open it to users (`chmod 666 {path}`)")]
    Permission {
        /// What was opened.
        path: PathBuf,
    },
    /// The node is there and nothing is behind it.
    #[error("{path} has no driver behind it: load it (`modprobe fuse`)")]
    NoDriver {
        /// What was opened.
        path: PathBuf,
    },
    /// The path leads to something else.
    #[error("{path} is not the FUSE device (a character device 10:229)")]
    NotFuse {
        /// What was opened.
        path: PathBuf,
    },
    /// Any other failure to open it.
    #[error("cannot open {path}")]
    Open {
        /// What was opened.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// `FUSE_DEV_IOC_CLONE` failed.
    #[error("the kernel does not clone the session (needs a mounted session and Linux 4.2)")]
    Clone {
        /// `EINVAL`: not mounted; `ENOTTY`: no clones in this kernel.
        source: io::Error,
    },
    /// `EINVAL` from a read: the kernel wants more room than this.
    #[error("a read buffer of {len} bytes is too short: max_write + 4096 and 8192 are the least")]
    BufferTooShort {
        /// The buffer that was given, bytes.
        len: usize,
    },
    /// `EPERM`: no mount stands behind this fd yet.
    #[error("the device has no session: mount it first")]
    NoSession,
    /// The reply contradicts itself; nothing was written, the request still waits.
    #[error("malformed reply: {why}")]
    Malformed {
        /// What is wrong with it.
        why: &'static str,
    },
    /// Anything else that the kernel says.
    #[error("cannot {what} the FUSE device")]
    Io {
        /// `read`, `write`, `poll`, ...
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What a read of the device gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOutcome {
    /// A request stands in the first so many bytes of the buffer.
    Frame(usize),
    /// Nothing is there now (non-blocking fds only).
    WouldBlock,
    /// A signal came, or the request vanished while it was read (`ENOENT`): read again.
    Interrupted,
    /// The mount is gone (`ENODEV`), or its connection was aborted (`ECONNABORTED`): the end.
    Unmounted,
}

/// What became of a reply.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyOutcome {
    /// The kernel took it.
    Delivered,
    /// `ENOENT`: this clone has no such request (answered before, aborted, read by another clone),
    /// or the connection is closed, which the next read tells. Nobody waits for the reply.
    Gone,
    /// `EINVAL`: the body has a wrong length for its request. The kernel has answered `EIO` to the
    /// task instead; the request is over.
    Refused,
    /// `ENODEV` or `ECONNABORTED`: the mount is gone.
    Unmounted,
}

/// What [`Device::wait_readable`] saw; both false: the time is over, or a signal came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// A frame is there, or the mount is gone: a read does not block. Another clone's reader may
    /// still be faster: only a non-blocking fd is safe to read after a wait.
    pub device: bool,
    /// The kick is readable, or its other end is closed.
    pub kick: bool,
}

/// An fd of `/dev/fuse`: the session's first one, or a clone of it.
///
/// All methods take `&self`: one thread may read while another writes. Dropping a device fails
/// the requests which it has read and not answered; dropping a session's last one aborts the mount.
/// (The session's first fd is closed only when its `Mount` guard is gone too: the guard needs it to
/// tell its mount from another one.)
#[derive(Debug)]
pub struct Device {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    /// Replies that somebody owed and dropped (see `reader::Owed`).
    pub(crate) dropped_replies: AtomicU64,
}

impl Device {
    /// Opens the device at `path`, usually [`DEVICE_PATH`]; it is of no session yet.
    pub fn open(path: impl AsRef<Path>) -> Result<Device, DeviceError> {
        let path = path.as_ref();
        // The standard library opens everything close-on-exec.
        let opened = File::options().read(true).write(true).open(path);
        let file = opened.map_err(|source| open_error(path, source))?;
        let meta = file
            .metadata()
            .map_err(|source| DeviceError::Open { path: path.to_owned(), source })?;
        let number = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
        if !meta.file_type().is_char_device() || number != DEVICE_NUMBER {
            return Err(DeviceError::NotFuse { path: path.to_owned() });
        }
        Ok(Device::from_fd(file.into(), path))
    }

    /// Takes an fd that somebody else opened (`fusermount3`, a parent); `path` is for clones.
    pub fn from_fd(fd: OwnedFd, path: impl Into<PathBuf>) -> Device {
        Device { fd: Arc::new(fd), path: path.into(), dropped_replies: AtomicU64::new(0) }
    }

    /// A further fd of the same session, with its own queue of requests in work.
    ///
    /// The session must be mounted; INIT may be still to come. A reply is taken only by the fd
    /// that read the request. FORGET and INTERRUPT come by any fd.
    pub fn clone_of(session: &Device) -> Result<Device, DeviceError> {
        let new = Device::open(&session.path)?;
        sys::fuse_dev_clone(new.as_fd(), session.as_fd())
            .map_err(|errno| DeviceError::Clone { source: errno.into() })?;
        Ok(new)
    }

    /// Chooses whether reads block. Needed before an fd is polled or read through io_uring: a
    /// blocking read there can park the ring's thread in the kernel and hang the mount.
    ///
    /// Each clone has a choice of its own.
    pub fn set_nonblocking(&self, nonblocking: bool) -> Result<(), DeviceError> {
        rustix::io::ioctl_fionbio(&self.fd, nonblocking).map_err(|errno| io_error("set up", errno))
    }

    /// read(2): one whole request into `buf`, of at least [`read_buffer_bytes`].
    pub fn read_frame(&self, buf: &mut [u8]) -> Result<ReadOutcome, DeviceError> {
        let len = buf.len();
        match rustix::io::read(&self.fd, buf) {
            Ok(len) => Ok(ReadOutcome::Frame(len)),
            Err(Errno::AGAIN) => Ok(ReadOutcome::WouldBlock),
            Err(Errno::INTR | Errno::NOENT) => Ok(ReadOutcome::Interrupted),
            Err(Errno::NODEV | Errno::CONNABORTED) => Ok(ReadOutcome::Unmounted),
            Err(Errno::INVAL) => Err(DeviceError::BufferTooShort { len }),
            Err(Errno::PERM) => Err(DeviceError::NoSession),
            Err(errno) => Err(io_error("read", errno)),
        }
    }

    /// write(2): one whole reply, header and body.
    ///
    /// The header is checked first ([`DeviceError::Malformed`]): the kernel would refuse it without
    /// finding the request, and the request would wait for ever.
    pub fn reply(&self, frame: &[u8]) -> Result<ReplyOutcome, DeviceError> {
        check_reply(frame, frame.len())?;
        reply_outcome(rustix::io::write(&self.fd, frame), frame.len())
    }

    /// writev(2): one whole reply in parts; the first holds at least the 16 bytes of the header.
    pub fn reply_vectored(&self, parts: &[IoSlice<'_>]) -> Result<ReplyOutcome, DeviceError> {
        let len = parts.iter().map(|part| part.len()).sum();
        check_reply(parts.first().map_or(&[], |part| part), len)?;
        reply_outcome(rustix::io::writev(&self.fd, parts), len)
    }

    /// splice(2): one whole reply, header and body, which is all that the pipe holds.
    ///
    /// Of what the kernel did not take there may be something left in the pipe. Never with
    /// `SPLICE_F_MOVE`: FUSE would make the pages its own, and they can be those of the host's page
    /// cache. Without it FUSE copies.
    pub fn reply_spliced(
        &self,
        pipe: BorrowedFd<'_>,
        header: &[u8; size_of::<OutHeader>()],
    ) -> Result<ReplyOutcome, DeviceError> {
        let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        check_reply(header, len)?;
        let written = splice(pipe, None, &self.fd, None, len, SpliceFlags::empty());
        reply_outcome(written, len)
    }

    /// write(2) of a notification; `Err` is the errno as the kernel gave it.
    pub(crate) fn write_notice(&self, frame: &[u8]) -> Result<usize, Errno> {
        rustix::io::write(&self.fd, frame)
    }

    /// poll(2) until a frame is there, `kick` is readable, or `timeout` is over (`None`: no limit).
    ///
    /// Every clone that is polled wakes for every request: let few threads wait at once.
    pub fn wait_readable(
        &self,
        kick: Option<BorrowedFd<'_>>,
        timeout: Option<Duration>,
    ) -> Result<Ready, DeviceError> {
        let timeout = timeout.map(|limit| Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        let device = PollFd::new(&self.fd, PollFlags::IN);
        let mut both = [device.clone(), device];
        let fds = match kick {
            Some(kick) => {
                both[1] = PollFd::from_borrowed_fd(kick, PollFlags::IN);
                &mut both[..]
            }
            None => &mut both[..1],
        };
        match poll(fds, timeout.as_ref()) {
            Ok(_) => Ok(Ready {
                device: !fds[0].revents().is_empty(),
                kick: fds.get(1).is_some_and(|kick| !kick.revents().is_empty()),
            }),
            Err(Errno::INTR) => Ok(Ready::default()),
            Err(errno) => Err(io_error("poll", errno)),
        }
    }

    /// A handle on the fd by which a mount guard asks how the session is.
    pub(crate) fn session(&self) -> Session {
        Session(Arc::clone(&self.fd))
    }

    /// How many owed replies were dropped unspent, and answered `EIO`: each is a bug of ours.
    pub fn dropped_replies(&self) -> u64 {
        self.dropped_replies.load(Ordering::Relaxed)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether the session of that fd is over: unmounted, and used by nobody any more.
pub fn is_over(session: BorrowedFd<'_>) -> bool {
    connection_of(session) == Connection::Ended
}

/// The session's first fd, in the hands of its mount guard.
#[derive(Debug)]
pub(crate) struct Session(Arc<OwnedFd>);

/// How a session is, as its fd tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Connection {
    /// Its file system lives (mounted somewhere, or detached and in use).
    Alive,
    /// Aborted: dead, but perhaps still in the mount table.
    Aborted,
    /// Unmounted.
    Ended,
}

impl Session {
    pub(crate) fn connection(&self) -> Connection {
        connection_of(self.0.as_fd())
    }
}

/// Never blocks: only a connection that has ended is read, and that stays ended.
pub(crate) fn connection_of(fd: BorrowedFd<'_>) -> Connection {
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut polled, Some(&now)) {
        Ok(_) if polled[0].revents().contains(PollFlags::ERR) => {}
        _ => return Connection::Alive,
    }
    // The kernel looks at the length before anything else.
    let mut buf = vec![0; read_buffer_bytes(1 << 20)];
    match rustix::io::read(fd, &mut buf) {
        Err(Errno::NODEV) => Connection::Ended,
        _ => Connection::Aborted,
    }
}

fn open_error(path: &Path, source: io::Error) -> DeviceError {
    let path = path.to_owned();
    match Errno::from_io_error(&source) {
        Some(Errno::NOENT) => DeviceError::Missing { path },
        Some(Errno::ACCESS | Errno::PERM) => DeviceError::Permission { path },
        Some(Errno::NODEV | Errno::NXIO) => DeviceError::NoDriver { path },
        _ => DeviceError::Open { path, source },
    }
}

pub(crate) fn io_error(what: &'static str, errno: Errno) -> DeviceError {
    DeviceError::Io { what, source: errno.into() }
}

/// The checks of `fuse_dev_do_write` that come before the kernel looks for the request.
fn check_reply(head: &[u8], len: usize) -> Result<(), DeviceError> {
    let malformed = |why| Err(DeviceError::Malformed { why });
    let Ok((header, _)) = OutHeader::read_from_prefix(head) else {
        return malformed("shorter than its header");
    };
    if usize::try_from(header.len) != Ok(len) {
        return malformed("its length field is not its length");
    }
    if header.unique == 0 {
        return malformed("unique 0 is for notifications");
    }
    if !(-ERRNO_MAX..=0).contains(&header.error) {
        return malformed("its error is not in -511..=0");
    }
    if header.error != 0 && len != size_of::<OutHeader>() {
        return malformed("an error with a body");
    }
    Ok(())
}

fn reply_outcome(written: Result<usize, Errno>, len: usize) -> Result<ReplyOutcome, DeviceError> {
    match written {
        Ok(written) if written == len => Ok(ReplyOutcome::Delivered),
        Ok(_) => Err(io_error("write the whole of a reply to", Errno::IO)),
        Err(Errno::NOENT) => Ok(ReplyOutcome::Gone),
        Err(Errno::INVAL) => Ok(ReplyOutcome::Refused),
        Err(Errno::NODEV | Errno::CONNABORTED) => Ok(ReplyOutcome::Unmounted),
        Err(Errno::PERM) => Err(DeviceError::NoSession),
        Err(errno) => Err(io_error("write", errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{error_reply, out_header};

    #[test]
    fn read_buffers_hold_what_the_kernel_wants() {
        for (max_write, expected) in [(0, 8192), (4096, 8192), (4097, 8193), (1 << 20, 1052672)] {
            assert_eq!(read_buffer_bytes(max_write), expected);
        }
    }

    #[test]
    fn opening_names_path_and_cure() {
        let check = |path: &str, expected: &str| {
            let error = Device::open(path).expect_err(path).to_string();
            assert!(error.contains(path) && error.contains(expected), "{error}");
        };
        check("/nonexistent/fuse", "modprobe fuse");
        check("/dev/null", "not the FUSE device");
        check("/", "cannot open");
    }

    #[test]
    fn malformed_replies_are_not_written() {
        // A device without a session answers EPERM to every write that reaches the kernel.
        let device = Device::open(DEVICE_PATH).expect("open");
        let check = |frame: &[u8], expected: &str| {
            let error = device.reply(frame).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
            let error = device.reply_vectored(&[IoSlice::new(frame)]).expect_err(expected);
            assert!(error.to_string().contains(expected), "{error}");
        };
        check(&[], "shorter");
        check(&[0; 15], "shorter");
        check(&[0; 16], "length field");
        check(&out_header(5, 4), "length field");
        check(&error_reply(0, 2), "unique 0");
        let mut positive = error_reply(5, 2);
        positive[4..8].copy_from_slice(&2i32.to_le_bytes());
        check(&positive, "error is not");
        let mut with_body = [0; 20];
        with_body[..16].copy_from_slice(&error_reply(5, 2));
        with_body[..4].copy_from_slice(&20u32.to_le_bytes());
        check(&with_body, "with a body");
        check(&error_reply(5, 2), "no session");
    }

    #[test]
    fn clones_need_a_mounted_session() {
        let device = Device::open(DEVICE_PATH).expect("open");
        assert!(matches!(Device::clone_of(&device), Err(DeviceError::Clone { .. })));
        let read = device.read_frame(&mut vec![0; READ_BUFFER_BYTES_MIN]);
        assert!(matches!(read, Err(DeviceError::NoSession)), "{read:?}");
    }

    #[test]
    fn a_kick_wakes_the_waiter() {
        let device = Device::open(DEVICE_PATH).expect("open");
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        drop(writer);
        // A device without a session polls as an error, which counts as readable.
        let ready = device.wait_readable(Some(reader.as_fd()), Some(Duration::from_secs(5)));
        assert_eq!(ready.expect("poll"), Ready { device: true, kick: true });
    }
}
