//! A tiny raw file system for the tests, and what keeps them bounded and clean.
//!
//! The tree: the root (node 1) with one file `hello` (node 2). INIT goes through the crate's own
//! negotiation, the "daemon" being a constant. Invariant: a test ends within its time, and no
//! mount below its directory outlives it.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use fuser_fork::device::{Device, ReadOutcome, ReplyOutcome, read_buffer_bytes};
use fuser_fork::frame::Frame;
use fuser_fork::init::{self, Limits, Negotiated};
use fuser_fork::mount::{Mount, MountOptions, mount};
use fuser_fork::mountinfo::find_mounts;
use fuser_fork::reader::Owed;
use fuser_fork::uring::available;
use ringfs_wire::abi::{
    Attr, AttrOut, Dirent, EntryOut, InitOut, Opcode, OpenOut, ReadIn, StatfsOut, init as flag,
};
use rustix::fs::{FlockOperation, flock};
use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Rings are switched on while this lives; then the switch is as it was.
pub struct SwitchedOn {
    before: String,
    /// Other programs that switch it wait for each other by this.
    _lock: File,
    _alone: MutexGuard<'static, ()>,
}

impl SwitchedOn {
    /// `None`, said aloud: rings cannot be had here.
    pub fn new(test: &str) -> Option<SwitchedOn> {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let skipped = |why: &dyn std::fmt::Display| {
            println!("SKIPPED {test}: FUSE-over-io_uring cannot be used here: {why}");
            eprintln!("SKIPPED {test}: FUSE-over-io_uring cannot be used here: {why}");
        };
        let lock = File::open(SWITCH).map_err(|error| skipped(&error)).ok()?;
        flock(&lock, FlockOperation::LockExclusive).expect("a lock");
        let switched =
            fs::read_to_string(SWITCH).and_then(|before| fs::write(SWITCH, "Y").map(|()| before));
        let before = switched.map_err(|error| skipped(&error)).ok()?;
        let switched = SwitchedOn { before, _lock: lock, _alone: alone };
        available().map_err(|error| skipped(&error)).ok()?;
        Some(switched)
    }
}

impl Drop for SwitchedOn {
    fn drop(&mut self) {
        let _ = fs::write(SWITCH, self.before.trim());
    }
}

/// The time that a test may take.
const LIMIT: Duration = Duration::from_secs(60);

pub const MAX_WRITE: u32 = 65536;
pub const HELLO: &[u8] = b"hello, raw frames\n";
pub const HELLO_NODE: u64 = 2;
pub const ENOENT: i32 = 2;
pub const EINTR: i32 = 4;
pub const ENOSYS: i32 = 38;

/// A directory whose mounts go when it goes, also when a test panics.
pub struct Dir {
    dir: TempDir,
    real: PathBuf,
}

impl Dir {
    pub fn new() -> Dir {
        let dir = tempfile::Builder::new().prefix("ringfs fuse ").tempdir().expect("tempdir");
        let real = dir.path().canonicalize().expect("real path");
        std::fs::create_dir(real.join("mnt")).expect("mount point");
        Dir { dir, real }
    }

    pub fn path(&self) -> &Path {
        &self.real
    }

    /// The mount point.
    pub fn mnt(&self) -> PathBuf {
        self.real.join("mnt")
    }

    /// Whether the mount table has a ringfs mount at our mount point.
    pub fn is_mounted(&self) -> bool {
        find_mounts().expect("mountinfo").iter().any(|mount| mount.mount_point == self.mnt())
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        detach_below(&self.real);
    }
}

/// Lazily unmounts all ringfs mounts below `top`.
fn detach_below(top: &Path) {
    for mount in find_mounts().unwrap_or_default() {
        if mount.mount_point.starts_with(top) {
            let done = unmount(&mount.mount_point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
            eprintln!("left mounted: {}: {done:?}", mount.mount_point.display());
        }
    }
}

/// Runs a test with a directory of its own; if it takes too long, its mounts are detached and the
/// whole test process ends, which closes the sessions and frees whoever hangs in them.
pub fn bounded(name: &'static str, test: impl FnOnce(&Dir) + Send + 'static) {
    let (done, wait) = channel::<()>();
    let (tell, hear) = channel();
    let thread = std::thread::spawn(move || {
        let _done = done;
        let dir = Dir::new();
        tell.send(dir.path().to_owned()).expect("watchdog");
        test(&dir);
    });
    let top = hear.recv_timeout(LIMIT).expect("test directory");
    match wait.recv_timeout(LIMIT) {
        Ok(()) | Err(RecvTimeoutError::Disconnected) => {}
        Err(RecvTimeoutError::Timeout) => {
            eprintln!("{name}: no end within {LIMIT:?}; detaching its mounts and giving up");
            detach_below(&top);
            std::process::abort();
        }
    }
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// The same with rings switched on, which may have to be waited for: that is not the test's time.
pub fn with_rings(name: &'static str, test: impl FnOnce(&Dir) + Send + 'static) {
    let Some(_on) = SwitchedOn::new(name) else { return };
    bounded(name, test);
}

pub fn options() -> MountOptions {
    let mut options = MountOptions::new("share@vsock:2:5640");
    options.max_read = Some(MAX_WRITE);
    options
}

/// Mounts and answers INIT.
pub fn mounted(dir: &Dir) -> (Device, Mount) {
    let (device, guard) = mount(&dir.mnt(), &options()).expect("mount");
    answer_init(&device);
    (device, guard)
}

/// What the daemon of the tests answers to INIT.
fn daemon_answer() -> InitOut {
    let flags = flag::ASYNC_READ | flag::BIG_WRITES | flag::PARALLEL_DIROPS | flag::SPLICE_READ;
    InitOut {
        major: 7,
        minor: 45,
        max_readahead: MAX_WRITE,
        flags: flags as u32,
        max_background: 256,
        max_write: 1 << 20,
        time_gran: 1,
        ..InitOut::default()
    }
}

pub fn buffer() -> Vec<u8> {
    vec![0; read_buffer_bytes(MAX_WRITE)]
}

/// Reads the session's first frame and answers it.
pub fn answer_init(device: &Device) {
    answer_init_with(device, false);
}

/// The same, agreeing on rings or not.
pub fn answer_init_with(device: &Device, rings: bool) -> Negotiated {
    let mut buf = buffer();
    let len = next_len(device, &mut buf).expect("INIT");
    let frame = Frame::parse(&buf[..len]).expect("frame");
    assert_eq!(frame.known_opcode(), Some(Opcode::Init));
    let limits = Limits { max_write: MAX_WRITE, rings, ..Limits::default() };
    let kernel = init::parse_in(frame.args()).expect("init request");
    let answer = init::negotiate(&kernel, &daemon_answer(), &limits).expect("negotiated");
    assert_eq!((answer.out.max_write, answer.dropped), (MAX_WRITE, flag::SPLICE_READ));
    let header = fuser_fork::frame::out_header(frame.unique(), answer.body().len());
    let outcome = device.reply(&[&header, answer.body()].concat()).expect("reply");
    assert_eq!(outcome, ReplyOutcome::Delivered);
    assert_eq!(answer.flags & flag::OVER_IO_URING != 0, rings);
    answer
}

/// The length of the next frame; `None` once the mount is gone.
pub fn next_len(device: &Device, buf: &mut [u8]) -> Option<usize> {
    loop {
        match device.read_frame(buf).expect("read") {
            ReadOutcome::Frame(len) => return Some(len),
            ReadOutcome::Unmounted => return None,
            ReadOutcome::WouldBlock | ReadOutcome::Interrupted => {
                device.wait_readable(None, Some(Duration::from_secs(1))).expect("poll");
            }
        }
    }
}

/// What the file system answers: a body, or an errno.
pub fn answer(frame: &Frame<'_>) -> Result<Vec<u8>, i32> {
    let Some(opcode) = frame.known_opcode() else { return Err(ENOSYS) };
    match opcode {
        Opcode::Lookup if frame.args() == b"hello\0" => Ok(entry().as_bytes().to_vec()),
        Opcode::Lookup => Err(ENOENT),
        Opcode::Getattr => {
            let attr = attr(frame.header().nodeid);
            Ok(AttrOut { attr_valid: 60, attr, ..AttrOut::default() }.as_bytes().to_vec())
        }
        Opcode::Open | Opcode::Opendir => {
            Ok(OpenOut { fh: 9, ..OpenOut::default() }.as_bytes().to_vec())
        }
        Opcode::Read => {
            let (read, _) = ReadIn::read_from_prefix(frame.args()).expect("READ");
            let from = (read.offset as usize).min(HELLO.len());
            let to = (from + read.size as usize).min(HELLO.len());
            Ok(HELLO[from..to].to_vec())
        }
        Opcode::Readdir => Ok(directory(frame)),
        Opcode::Statfs => Ok(StatfsOut { bsize: 4096, ..StatfsOut::default() }.as_bytes().to_vec()),
        Opcode::Release | Opcode::Releasedir | Opcode::Flush | Opcode::Destroy => Ok(Vec::new()),
        _ => Err(ENOSYS),
    }
}

fn directory(frame: &Frame<'_>) -> Vec<u8> {
    let (read, _) = ReadIn::read_from_prefix(frame.args()).expect("READDIR");
    if read.offset != 0 {
        return Vec::new();
    }
    let entry = Dirent { ino: HELLO_NODE, off: 1, namelen: 5, type_: 8 };
    [entry.as_bytes(), b"hello\0\0\0"].concat()
}

pub fn entry() -> EntryOut {
    let attr = attr(HELLO_NODE);
    EntryOut { nodeid: HELLO_NODE, entry_valid: 60, attr_valid: 60, attr, ..EntryOut::default() }
}

fn attr(nodeid: u64) -> Attr {
    let (mode, size) =
        if nodeid == HELLO_NODE { (0o100644, HELLO.len() as u64) } else { (0o40755, 0) };
    Attr { ino: nodeid, size, mode, nlink: 1, blksize: 4096, ..Attr::default() }
}

/// Replies by the device that read the frame.
pub fn serve_one(device: &Arc<Device>, frame: &Frame<'_>) -> Option<ReplyOutcome> {
    let owed = Owed::of(device, frame)?;
    Some(match answer(frame) {
        Ok(body) => owed.reply(&body).expect("reply"),
        Err(errno) => owed.error(errno).expect("reply"),
    })
}

/// What one device read: how often each opcode.
pub type Seen = BTreeMap<u32, u64>;

/// A thread that serves `device` until the mount is gone.
pub fn serve(device: Arc<Device>) -> JoinHandle<Seen> {
    std::thread::spawn(move || {
        let (mut buf, mut seen) = (buffer(), Seen::new());
        while let Some(len) = next_len(&device, &mut buf) {
            let frame = Frame::parse(&buf[..len]).expect("frame");
            *seen.entry(frame.opcode()).or_default() += 1;
            // A task that was killed meanwhile waits for nothing: every outcome is right.
            let _outcome = serve_one(&device, &frame);
        }
        seen
    })
}

/// Serves `device` on this thread until a frame of `opcode` comes; gives that one unanswered.
pub fn serve_until(device: &Arc<Device>, opcode: Opcode) -> Vec<u8> {
    let mut buf = buffer();
    loop {
        let len = next_len(device, &mut buf).expect("a living mount");
        let frame = Frame::parse(&buf[..len]).expect("frame");
        if frame.known_opcode() == Some(opcode) {
            return buf[..len].to_vec();
        }
        let _outcome = serve_one(device, &frame);
    }
}

/// Reads `path` on a thread of its own.
pub fn read_aside(path: PathBuf) -> JoinHandle<std::io::Result<Vec<u8>>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        File::open(path)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    })
}
