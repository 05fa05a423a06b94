//! A daemon that was killed in the middle of a request: the next one finds out what became of it.
//!
//! Each request is run on a real directory up to the point at which its daemon dies; what the
//! state directory's file, the host's directory and the guest's memory then hold is all that the
//! next daemon gets. The measure is a run that nobody disturbed: the same answer, the same files.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringfs_server::decide::Outcome;
use ringfs_server::dispatch::Request;
use ringfs_server::state_dir::{StateDir, StateError, StateFile, StateTerms};
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::hello::Ticket;
use ringfs_wire::slot::SlotUse;
use ringfs_wire::table::{Begin, Given};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::restore::{Open, on_each, options, taken_over};
use crate::support::{Guest, Memory, Mounted, O_EXCL, O_RDWR, O_WRONLY, ROOT, is_root, named};

const O_CREAT: u32 = libc::O_CREAT as u32;
const O_TRUNC: u32 = libc::O_TRUNC as u32;
const O_APPEND: u32 = libc::O_APPEND as u32;
const GRACE: Duration = Duration::from_secs(600);
const AT: SlotUse = SlotUse { slot: 2, seq: 0 };
const TICKET: Ticket = Ticket([7; 16]);

pub(crate) fn terms() -> StateTerms {
    StateTerms { share: "share".into(), subdir: b"sub".to_vec(), lanes: 2, slots: 4, conns: 1 }
}

/// A request, and what the guest has open.
struct Ask {
    opcode: Opcode,
    node: u64,
    args: Vec<u8>,
    open: Vec<Open>,
}

fn ask(opcode: Opcode, node: u64, args: Vec<u8>) -> Ask {
    Ask { opcode, node, args, open: Vec::new() }
}

/// How far a request had come.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Killed {
    /// It was begun in the table.
    Begun,
    /// What must be known before was noted.
    Intended,
    /// The call was made.
    Called,
    /// Its reply was in the table.
    Replied,
}

/// What the next daemon made of it.
type Ended = (String, Result<Vec<u8>, Errno>);

/// What a daemon leaves: a directory of the host, a file of the state directory, a guest.
struct Life<'a> {
    root: &'a Path,
    state: tempfile::TempDir,
    memory: Memory,
    ask: Ask,
}

impl<'a> Life<'a> {
    fn new(root: &'a Path, prepare: impl Fn(&Guest, &Path) -> Ask, killed: Killed) -> Life<'a> {
        let state = tempfile::tempdir().expect("directory");
        let dir = taken(&state);
        let file = dir.create(&terms(), TICKET, false).expect("a session's file");
        let guest = Guest::new(root, options());
        let ask = prepare(&guest, root);
        // The guest never sees the reply.
        let memory = guest.memory.lock().expect("memory").clone();
        run_until(&guest, &file, AT, &ask, killed);
        Life { root, state, memory, ask }
    }

    fn next(&self) -> (StateDir, Arc<StateFile>, Guest) {
        let dir = taken(&self.state);
        assert_eq!(dir.left(), 1);
        let file = dir.adopt(TICKET, &terms()).expect("the file");
        let guest = taken_over(self.root, options(), &self.memory, &self.ask.open);
        (dir, file, guest)
    }
}

/// The state directory. A child that another test has forked may hold its lock for a moment, until
/// it becomes another program.
fn taken(dir: &tempfile::TempDir) -> StateDir {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match StateDir::open(&dir.path().join("state"), GRACE) {
            Err(StateError::InUse { .. }) if Instant::now() < until => std::thread::yield_now(),
            opened => return opened.expect("state directory"),
        }
    }
}

fn run_until(guest: &Guest, file: &Arc<StateFile>, at: SlotUse, ask: &Ask, killed: Killed) {
    let body = guest.body(ask.node, &ask.args, &[]);
    let request = Request::parse(ask.opcode as u32, &body).expect("whole");
    let mut table = file.table(1);
    assert_eq!(table.begin(at, ask.opcode as u32), Ok(Begin::Execute));
    if killed >= Killed::Intended
        && let Some(intent) = guest.fs.intent(&request)
    {
        assert!(intent.known, "{:?}", ask.opcode);
        file.intent(1, at).expect("a place").write(&intent);
    }
    if killed < Killed::Called {
        return;
    }
    let mut out = vec![0; guest.fs.reply_bytes_max(&request)];
    let result = guest.fs.execute(&request, &mut out);
    if killed < Killed::Replied {
        return;
    }
    let (errno, len) = match result {
        Ok(len) => (0, len),
        Err(errno) => (errno.raw_os_error() as u32, 0),
    };
    table.finish(at, errno, &out[..len]).expect("running");
}

/// The guest sends it again.
fn resend(guest: &Guest, file: &Arc<StateFile>, at: SlotUse, ask: &Ask) -> Ended {
    let body = guest.body(ask.node, &ask.args, &[]);
    let request = Request::parse(ask.opcode as u32, &body).expect("whole");
    let mut out = vec![0; guest.fs.reply_bytes_max(&request)];
    let mut table = file.table(1);
    let (how, result) = match table.begin(at, ask.opcode as u32).expect("the same use") {
        Begin::Decide => {
            let place = file.intent(1, at).expect("a place");
            let past = table.past(at).expect("to decide");
            let (outcome, result) = guest.fs.recover(&request, past, &place, &mut out);
            (format!("{outcome:?}"), result)
        }
        Begin::Execute | Begin::Rerun(_) => ("Run".into(), guest.fs.execute(&request, &mut out)),
        Begin::Replay => {
            let (errno, body) = table.kept(at).expect("kept");
            let result = match errno {
                0 => Ok(body.to_vec()),
                errno => Err(Errno::from_raw_os_error(errno as i32)),
            };
            return ("Kept".into(), result);
        }
        Begin::Running | Begin::Unsure => panic!("nothing runs, and the table knows"),
    };
    let (errno, len) = match result {
        Ok(len) => (0, len),
        Err(errno) => (errno.raw_os_error() as u32, 0),
    };
    table.finish(at, errno, &out[..len]).expect("running");
    (how, result.map(|len| out[..len].to_vec()))
}

/// All that can be seen of a tree, but for times and numbers.
fn tree(root: &Path) -> Vec<String> {
    let mut seen = Vec::new();
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).expect("list") {
            let path = entry.expect("entry").path();
            let stat = std::fs::symlink_metadata(&path).expect("stat");
            let what = if stat.is_dir() {
                dirs.push(path.clone());
                String::new()
            } else if stat.is_symlink() {
                format!("{:?}", std::fs::read_link(&path).expect("link"))
            } else if stat.is_file() {
                String::from_utf8_lossy(&std::fs::read(&path).expect("read")).into_owned()
            } else {
                String::new()
            };
            let mut value = [0; 16];
            let xattr = rustix::fs::lgetxattr(&path, c"user.x", &mut value[..])
                .map(|len| value[..len].to_vec());
            let name = path.strip_prefix(root).expect("below").display().to_string();
            let links = if stat.is_dir() { 0 } else { stat.nlink() };
            seen.push(format!("{name} {:o} {links} {what:?} {xattr:?}", stat.mode()));
        }
    }
    seen.sort();
    seen
}

fn share(root: &Path, name: &str) -> std::path::PathBuf {
    let share = root.join(name);
    std::fs::create_dir(&share).expect("directory");
    share
}

/// What of a reply is the same on every daemon.
fn shown(result: &Result<Vec<u8>, Errno>) -> Result<(usize, u32), Errno> {
    let reply = result.as_ref().map_err(|&errno| errno)?;
    let mode = abi::EntryOut::read_from_prefix(reply).map_or(0, |(entry, _)| entry.attr.mode);
    Ok((reply.len(), mode))
}

type Prepare = fn(&Guest, &Path) -> Ask;

fn text(name: &str) -> Vec<u8> {
    named(&[], name.as_bytes())
}

fn file(guest: &Guest, root: &Path, name: &str) -> u64 {
    std::fs::write(root.join(name), format!("what {name} has")).expect("file");
    guest.lookup(ROOT, name).expect("lookup").nodeid
}

fn opened(guest: &Guest, root: &Path, name: &str, flags: u32) -> Open {
    let node = file(guest, root, name);
    let fh = guest.open(node, flags).expect("open").fh;
    Open { fh, node, flags, directory: false }
}

fn mkdir(guest: &Guest, _: &Path) -> Ask {
    let parent = guest.mkdir(ROOT, "parent").expect("mkdir").nodeid;
    let head = abi::MkdirIn { mode: 0o750, umask: 0 };
    ask(Opcode::Mkdir, parent, named(head.as_bytes(), b"new"))
}

fn mknod(kind: u32) -> Ask {
    let head = abi::MknodIn { mode: kind | 0o600, ..Default::default() };
    ask(Opcode::Mknod, ROOT, named(head.as_bytes(), b"new"))
}

fn symlink(_: &Guest, _: &Path) -> Ask {
    ask(Opcode::Symlink, ROOT, b"new\0where/to\0".to_vec())
}

fn create(flags: u32) -> Ask {
    // A mode that nobody else could open it by.
    let head = abi::CreateIn { flags, mode: 0o100_400, umask: 0, open_flags: 0 };
    ask(Opcode::Create, ROOT, named(head.as_bytes(), b"new"))
}

fn link(guest: &Guest, root: &Path) -> Ask {
    let head = abi::LinkIn { oldnodeid: file(guest, root, "file") };
    ask(Opcode::Link, ROOT, named(head.as_bytes(), b"new"))
}

fn unlink(guest: &Guest, root: &Path) -> Ask {
    file(guest, root, "file");
    ask(Opcode::Unlink, ROOT, text("file"))
}

fn rename(flags: u32) -> Ask {
    let head = abi::Rename2In { newdir: ROOT, flags, padding: 0 };
    let args = named(&named(head.as_bytes(), b"file"), b"other");
    ask(Opcode::Rename2, ROOT, args)
}

fn setxattr(guest: &Guest, root: &Path, flags: u32) -> Ask {
    let node = file(guest, root, "file");
    let head = abi::SetxattrIn { size: 3, flags };
    ask(Opcode::Setxattr, node, [&named(head.as_bytes(), b"user.x"), &b"abc"[..]].concat())
}

fn removexattr(guest: &Guest, root: &Path) -> Ask {
    ask(Opcode::Removexattr, file(guest, root, "file"), text("user.x"))
}

fn has_xattr(root: &Path) {
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(root.join("file"), c"user.x", b"before", flags).expect("setxattr");
}

fn write(open: Open, offset: u64, data: &[u8]) -> Ask {
    let size = data.len() as u32;
    let head = abi::WriteIn { fh: open.fh, offset, size, ..Default::default() };
    let args = [head.as_bytes(), data].concat();
    Ask { open: vec![open], ..ask(Opcode::Write, open.node, args) }
}

fn append(guest: &Guest, root: &Path) -> Ask {
    write(opened(guest, root, "file", O_WRONLY | O_APPEND), 0, b"-and more")
}

fn fallocate(guest: &Guest, root: &Path, mode: i32) -> Ask {
    let open = opened(guest, root, "file", O_RDWR);
    let (offset, length) = (5, 100);
    let head = abi::FallocateIn { fh: open.fh, offset, length, mode: mode as u32, padding: 0 };
    let args = head.as_bytes().to_vec();
    Ask { open: vec![open], ..ask(Opcode::Fallocate, open.node, args) }
}

fn copy(guest: &Guest, root: &Path) -> Ask {
    let (from, to) = (opened(guest, root, "a", O_RDWR), opened(guest, root, "b", O_RDWR));
    let head = abi::CopyFileRangeIn {
        fh_in: from.fh,
        nodeid_out: to.node,
        fh_out: to.fh,
        off_out: 3,
        len: 4,
        ..Default::default()
    };
    let args = head.as_bytes().to_vec();
    Ask { open: vec![from, to], ..ask(Opcode::CopyFileRange, from.node, args) }
}

fn truncated(guest: &Guest, root: &Path) -> Ask {
    let valid = abi::fattr::SIZE;
    let head = abi::SetattrIn { valid, size: 4, ..Default::default() };
    ask(Opcode::Setattr, file(guest, root, "file"), head.as_bytes().to_vec())
}

fn open(guest: &Guest, root: &Path) -> Ask {
    let head = abi::OpenIn { flags: O_RDWR | O_TRUNC, open_flags: 0 };
    ask(Opcode::Open, file(guest, root, "file"), head.as_bytes().to_vec())
}

fn tmpfile(_: &Guest, _: &Path) -> Ask {
    Ask { opcode: Opcode::Tmpfile, ..create(O_RDWR) }
}

/// Whether looking is what tells that it was done; all others run again.
const CASES: &[(&str, bool, Prepare)] = &[
    ("mkdir", true, mkdir),
    ("mkdir of what is there", false, |guest, root| {
        let ask = mkdir(guest, root);
        std::fs::create_dir(root.join("parent/new")).expect("directory");
        ask
    }),
    ("mknod of a pipe", true, |_, _| mknod(libc::S_IFIFO)),
    ("mknod of a file", true, |_, _| mknod(0)),
    ("symlink", true, symlink),
    ("create", true, |_, _| create(O_RDWR | O_CREAT)),
    ("create anew", true, |_, _| create(O_RDWR | O_CREAT | O_EXCL | O_TRUNC)),
    ("create of what is there", false, |guest, root| {
        file(guest, root, "new");
        create(O_RDWR | O_CREAT | O_TRUNC)
    }),
    ("create anew of what is there", false, |guest, root| {
        file(guest, root, "new");
        create(O_RDWR | O_CREAT | O_EXCL)
    }),
    ("tmpfile", false, tmpfile),
    ("link", true, link),
    ("link over what is there", false, |guest, root| {
        file(guest, root, "new");
        link(guest, root)
    }),
    ("link over itself", false, |guest, root| {
        let ask = link(guest, root);
        std::fs::hard_link(root.join("file"), root.join("new")).expect("link");
        ask
    }),
    ("unlink", true, unlink),
    ("unlink of nothing", false, |_, _| ask(Opcode::Unlink, ROOT, text("file"))),
    ("unlink of one of two", true, |guest, root| {
        let ask = unlink(guest, root);
        std::fs::hard_link(root.join("file"), root.join("other")).expect("link");
        ask
    }),
    ("rmdir", true, |guest, _| {
        guest.mkdir(ROOT, "dir").expect("mkdir");
        ask(Opcode::Rmdir, ROOT, text("dir"))
    }),
    ("rmdir of a full one", false, |guest, _| {
        let dir = guest.mkdir(ROOT, "dir").expect("mkdir").nodeid;
        guest.mkdir(dir, "full").expect("mkdir");
        ask(Opcode::Rmdir, ROOT, text("dir"))
    }),
    ("rename", true, |guest, root| {
        file(guest, root, "file");
        rename(0)
    }),
    ("rename over another", true, |guest, root| {
        file(guest, root, "other");
        file(guest, root, "file");
        rename(0)
    }),
    ("rename over itself", false, |guest, root| {
        file(guest, root, "file");
        std::fs::hard_link(root.join("file"), root.join("other")).expect("link");
        rename(0)
    }),
    ("rename of nothing", false, |_, _| rename(0)),
    ("rename, not over another", true, |guest, root| {
        file(guest, root, "file");
        rename(libc::RENAME_NOREPLACE)
    }),
    ("rename, not over what is there", false, |guest, root| {
        file(guest, root, "file");
        file(guest, root, "other");
        rename(libc::RENAME_NOREPLACE)
    }),
    ("exchange", true, |guest, root| {
        file(guest, root, "file");
        file(guest, root, "other");
        rename(libc::RENAME_EXCHANGE)
    }),
    ("exchange with nothing", false, |guest, root| {
        file(guest, root, "file");
        rename(libc::RENAME_EXCHANGE)
    }),
    ("setxattr", false, |guest, root| setxattr(guest, root, 0)),
    ("setxattr anew", true, |guest, root| setxattr(guest, root, libc::XATTR_CREATE as u32)),
    ("setxattr anew of what is there", false, |guest, root| {
        let ask = setxattr(guest, root, libc::XATTR_CREATE as u32);
        has_xattr(root);
        ask
    }),
    ("setxattr in place of another", false, |guest, root| {
        let ask = setxattr(guest, root, libc::XATTR_REPLACE as u32);
        has_xattr(root);
        ask
    }),
    ("setxattr in place of none", false, |guest, root| {
        setxattr(guest, root, libc::XATTR_REPLACE as u32)
    }),
    ("removexattr", true, |guest, root| {
        let ask = removexattr(guest, root);
        has_xattr(root);
        ask
    }),
    ("removexattr of none", false, removexattr),
    ("write", false, |guest, root| write(opened(guest, root, "file", O_RDWR), 5, b"over it")),
    ("append", true, append),
    ("append of nothing", false, |guest, root| {
        write(opened(guest, root, "file", O_RDWR | O_APPEND), 0, b"")
    }),
    ("fallocate", false, |guest, root| fallocate(guest, root, 0)),
    ("fallocate beyond the end", false, |guest, root| {
        fallocate(guest, root, libc::FALLOC_FL_KEEP_SIZE)
    }),
    ("punch a hole", false, |guest, root| {
        fallocate(guest, root, libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE)
    }),
    ("zero a range", false, |guest, root| fallocate(guest, root, libc::FALLOC_FL_ZERO_RANGE)),
    ("copy_file_range", false, copy),
    ("truncate", false, truncated),
    ("open and cut off", false, open),
    ("lookup", false, |guest, root| {
        file(guest, root, "file");
        ask(Opcode::Lookup, ROOT, text("file"))
    }),
    ("ioctl", false, |guest, root| ask(Opcode::Ioctl, file(guest, root, "file"), vec![0; 32])),
];

fn all_cases(root: &Path) {
    for (n, &(name, looks, prepare)) in CASES.iter().enumerate() {
        let undisturbed = share(root, &format!("{n}"));
        let guest = Guest::new(&undisturbed, options());
        let ask = prepare(&guest, &undisturbed);
        let result = guest.ask(ask.opcode, ask.node, &ask.args);
        let expected = shown(&result);
        let reply = result.unwrap_or_default();
        let expected_tree = tree(&undisturbed);
        for killed in [Killed::Begun, Killed::Intended, Killed::Called, Killed::Replied] {
            let root = share(root, &format!("{n}{killed:?}"));
            let life = Life::new(&root, prepare, killed);
            let (_dir, file, guest) = life.next();
            let ended = resend(&guest, &file, AT, &life.ask);
            let opcode = life.ask.opcode;
            let gives = expected.is_ok() && !Given::by(opcode as u32, &reply).is_empty();
            let runs = matches!(opcode, Opcode::Lookup | Opcode::Tmpfile);
            let how = match killed {
                Killed::Begun | Killed::Intended => "Run",
                Killed::Called if looks => "Done",
                Killed::Called => "Run",
                Killed::Replied if !gives => "Kept",
                Killed::Replied if runs => "Run",
                Killed::Replied => "Done",
            };
            assert_eq!((&*ended.0, shown(&ended.1)), (how, expected), "{name}, {killed:?}");
            assert_eq!(tree(&root), expected_tree, "{name}, {killed:?}");
            if let (Opcode::Link, Ok(reply)) = (opcode, &ended.1) {
                let given = abi::EntryOut::read_from_prefix(reply).expect("entry").0.nodeid;
                assert_eq!(life.ask.args[..8], given.to_le_bytes(), "another node");
            }
            // The lost reply of the next daemon is its own affair.
            if how == "Done" || how == "Run" {
                let mut table = file.table(1);
                table.cut();
                assert!(table.begin(SlotUse { seq: 1, ..AT }, 3).is_ok(), "{name}, {killed:?}");
            }
        }
    }
}

#[test]
fn whenever_its_daemon_was_killed_a_request_has_happened_once() {
    on_each(all_cases);
}

/// Inode numbers are all that there is.
#[test]
fn also_where_files_have_no_birth() {
    let dir = tempfile::tempdir().expect("directory");
    let mount = share(dir.path(), "ext4");
    if let Some(ext4) = Mounted::ext4_without_births(&dir.path().join("image"), mount) {
        all_cases(&ext4.0);
    }
}

/// Others work in the directory between the death and the next daemon, or before it.
#[test]
fn what_others_did_meanwhile() {
    struct Case {
        name: &'static str,
        prepare: Prepare,
        killed: Killed,
        meanwhile: fn(&Path),
        how: Outcome,
        errno: Option<Errno>,
    }
    let case = |name, prepare: Prepare, killed, meanwhile: fn(&Path), how, errno| Case {
        name,
        prepare,
        killed,
        meanwhile,
        how,
        errno,
    };
    use Killed::{Called, Intended, Replied};
    use Outcome::{Ambiguous, Done, Run};
    let exclusive: Prepare = |_, _| create(O_RDWR | O_CREAT | O_EXCL);
    let renamed: Prepare = |guest, root| {
        file(guest, root, "file");
        rename(0)
    };
    let make =
        |root: &Path, name: &str| std::fs::write(root.join(name), "another's").expect("file");
    let _ = make;
    fn another(root: &Path, name: &str) {
        std::fs::write(root.join(name), "another's").expect("file");
    }
    let cases = [
        // Of another kind, or with another target: not ours.
        case(
            "a file, not a pipe",
            |_, _| mknod(libc::S_IFIFO),
            Intended,
            |root| another(root, "new"),
            Run,
            Some(Errno::EXIST),
        ),
        case(
            "another link",
            symlink,
            Intended,
            |root| {
                std::os::unix::fs::symlink("elsewhere", root.join("new")).expect("link");
            },
            Run,
            Some(Errno::EXIST),
        ),
        // Another's user.
        case(
            "another user's file",
            exclusive,
            Intended,
            |root| {
                another(root, "new");
                if is_root() {
                    std::os::unix::fs::chown(root.join("new"), Some(4711), None).expect("chown");
                } else {
                    std::fs::remove_file(root.join("new")).expect("remove");
                    std::fs::create_dir(root.join("new")).expect("directory");
                }
            },
            Run,
            Some(Errno::EXIST),
        ),
        case(
            "gone again, and the guest has been told",
            exclusive,
            Replied,
            |root| {
                std::fs::remove_file(root.join("new")).expect("remove");
            },
            Ambiguous,
            Some(Errno::IO),
        ),
        case(
            "another one at its place",
            exclusive,
            Replied,
            |root| {
                another(root, "else");
                std::fs::rename(root.join("else"), root.join("new")).expect("rename");
            },
            Ambiguous,
            Some(Errno::IO),
        ),
        case(
            "a new file of the name that was removed",
            unlink,
            Called,
            |root| another(root, "file"),
            Done,
            None,
        ),
        case(
            "moved away",
            renamed,
            Called,
            |root| {
                std::fs::rename(root.join("other"), root.join("third")).expect("rename");
            },
            Ambiguous,
            Some(Errno::IO),
        ),
        case(
            "moved away before",
            renamed,
            Intended,
            |root| {
                std::fs::rename(root.join("file"), root.join("third")).expect("rename");
            },
            Ambiguous,
            Some(Errno::IO),
        ),
        case(
            "another file at the old name",
            renamed,
            Called,
            |root| another(root, "file"),
            Done,
            None,
        ),
        case(
            "others have appended",
            append,
            Called,
            |root| {
                let old = std::fs::read(root.join("file")).expect("read");
                std::fs::write(root.join("file"), [&old[..], b"x"].concat()).expect("write");
            },
            Ambiguous,
            Some(Errno::IO),
        ),
        case(
            "others have appended as much",
            append,
            Intended,
            |root| {
                let old = std::fs::read(root.join("file")).expect("read");
                std::fs::write(root.join("file"), [&old[..], b"*********"].concat())
                    .expect("write");
            },
            Ambiguous,
            Some(Errno::IO),
        ),
        case(
            "cut off",
            append,
            Called,
            |root| std::fs::write(root.join("file"), "").expect("write"),
            Ambiguous,
            Some(Errno::IO),
        ),
        case(
            "another value",
            |g, r| setxattr(g, r, libc::XATTR_CREATE as u32),
            Intended,
            has_xattr,
            Run,
            Some(Errno::EXIST),
        ),
        case(
            "written since it was cut off",
            open,
            Replied,
            |root| another(root, "file"),
            Done,
            None,
        ),
    ];
    on_each(|root| {
        for (n, case) in cases.iter().enumerate() {
            let root = share(root, &format!("{n}"));
            let life = Life::new(&root, case.prepare, case.killed);
            (case.meanwhile)(&root);
            let before = tree(&root);
            let (_dir, file, guest) = life.next();
            let (how, result) = resend(&guest, &file, AT, &life.ask);
            let expected = (format!("{:?}", case.how), case.errno);
            assert_eq!((how, result.err()), expected, "{}", case.name);
            assert_eq!(tree(&root), before, "{}", case.name);
        }
    });
}

/// The daemon was killed over a large append: the rest follows, once.
#[test]
fn an_append_that_was_cut_short_is_completed() {
    fn large(guest: &Guest, root: &Path) -> Ask {
        let data: Vec<u8> = (0..300_000_u32).map(|n| b'a' + (n % 23) as u8).collect();
        write(opened(guest, root, "file", O_WRONLY | O_APPEND), 0, &data)
    }
    on_each(|root| {
        for stored in [1, 4096, 299_999, 300_000] {
            let root = share(root, &format!("{stored}"));
            let life = Life::new(&root, large, Killed::Intended);
            let data = life.ask.args[size_of::<abi::WriteIn>()..].to_vec();
            let host = std::fs::File::options().write(true).open(root.join("file")).expect("open");
            let before = std::fs::read(root.join("file")).expect("read");
            host.write_all_at(&data[..stored], before.len() as u64).expect("write");
            // Killed again over the rest, and again.
            for _ in 0..2 {
                let (_dir, file, guest) = life.next();
                let mut table = file.table(1);
                assert_eq!(table.begin(AT, Opcode::Write as u32), Ok(Begin::Decide));
                drop((table, guest));
            }
            let (_dir, file, guest) = life.next();
            let (how, result) = resend(&guest, &file, AT, &life.ask);
            let reply = abi::WriteOut::read_from_bytes(&result.expect("written")).expect("reply");
            assert_eq!((how.as_str(), reply.size), ("Done", 300_000));
            let after = std::fs::read(root.join("file")).expect("read");
            assert_eq!(after, [before, data].concat());
        }
    });
}

/// The same of a large write at an offset, which runs again as a whole.
#[test]
fn a_write_that_was_cut_short_is_whole_afterwards() {
    fn large(guest: &Guest, root: &Path) -> Ask {
        write(opened(guest, root, "file", O_RDWR), 5, &[b'z'; 300_000])
    }
    on_each(|root| {
        for stored in [1, 4096, 299_999] {
            let root = share(root, &format!("{stored}"));
            let life = Life::new(&root, large, Killed::Intended);
            let host = std::fs::File::options().write(true).open(root.join("file")).expect("open");
            host.write_all_at(&vec![b'z'; stored], 5).expect("write");
            let (_dir, file, guest) = life.next();
            let (how, result) = resend(&guest, &file, AT, &life.ask);
            assert_eq!((how.as_str(), result.map(|reply| reply.len())), ("Run", Ok(8)));
            let after = std::fs::read(root.join("file")).expect("read");
            assert!(after.starts_with(b"what zz") && after.len() == 300_005);
            assert!(after[5..].iter().all(|&byte| byte == b'z'));
        }
    });
}

/// Two requests for one name, both cut: one has made it, the other one is told that it exists.
#[test]
fn what_one_request_has_made_no_other_one_has() {
    let second = SlotUse { slot: 3, seq: 0 };
    on_each(|root| {
        for (n, (prepare, errno)) in
            [(mkdir as Prepare, Errno::EXIST), (link, Errno::EXIST), (append, Errno::IO)]
                .into_iter()
                .enumerate()
        {
            let root = share(root, &format!("{n}"));
            let life = Life::new(&root, prepare, Killed::Intended);
            // The other one, in the same daemon's life: both have their intents, one its call.
            let state = taken(&life.state);
            let file = state.adopt(TICKET, &terms()).expect("the file");
            let guest = taken_over(&root, options(), &life.memory, &life.ask.open);
            run_until(&guest, &file, second, &life.ask, Killed::Called);
            drop((guest, file, state));
            let (_dir, file, guest) = life.next();
            let first = resend(&guest, &file, AT, &life.ask);
            assert_eq!((first.0.as_str(), first.1.err()), ("Done", None), "{n}");
            let other = resend(&guest, &file, second, &life.ask);
            assert_eq!(other.1.err(), Some(errno), "{n}");
        }
        // It has answered; the other one has not run.
        let root = share(root, "answered");
        let life = Life::new(&root, mkdir, Killed::Replied);
        let state = taken(&life.state);
        let file = state.adopt(TICKET, &terms()).expect("the file");
        let guest = taken_over(&root, options(), &life.memory, &life.ask.open);
        let body = guest.body(life.ask.node, &life.ask.args, &[]);
        let request = Request::parse(life.ask.opcode as u32, &body).expect("whole");
        let mut intent = guest.fs.intent(&request).expect("an intent");
        intent.when = 0;
        let mut table = file.table(1);
        assert_eq!(table.begin(second, life.ask.opcode as u32), Ok(Begin::Execute));
        file.intent(1, second).expect("a place").write(&intent);
        drop((table, guest, file, state));
        let (_dir, file, guest) = life.next();
        let other = resend(&guest, &file, second, &life.ask);
        assert_eq!((other.0.as_str(), other.1.err()), ("Run", Some(Errno::EXIST)));
    });
}
