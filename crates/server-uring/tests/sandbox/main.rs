//! What each layer of the sandbox stops: tried, in processes that have that layer alone, and in one
//! that has them all.
//!
//! A child is made as a worker is (fork.rs), lays layers on by the functions that a worker calls,
//! and then does what somebody would who has taken it over. It says what came of it by its exit
//! code; one that the kernel kills says it by the signal. Without a harness: a process that forks
//! must have one thread.
//!
//! Root's daemon first, then that of another user, whose namespaces are in one of users.
#![allow(unsafe_code, reason = "system calls that no safe crate would make for us")]

mod place;

use place::{Came, Place, With, is_root};
use ringfs_server::fs::Submounts;
use ringfs_server::sandbox::filter;
use ringfs_server::share::ShareDir;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdirat, renameat, symlinkat, unlinkat};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// What is tried on a share.
type Try<'a> = &'a dyn Fn(&Path) -> Result<(), Errno>;

const KILLED: Came = Came::Killed;

fn no(errno: Errno) -> Came {
    Came::Refused(errno)
}

fn call(number: i64, arguments: [usize; 6]) -> Result<(), Errno> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: each caller gives what lives as long as the call and is as large as it says, or what
    // no kernel takes for an address.
    let done = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if done >= 0 { Ok(()) } else { Err(last()) }
}

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).expect("an errno")
}

fn open(path: &Path) -> Result<(), Errno> {
    rustix::fs::open(path, OFlags::RDONLY, Mode::empty()).map(drop)
}

fn main() {
    let of_root: [(&str, fn()); 7] = [
        ("files_of_the_host", files_of_the_host),
        ("a_handle_of_a_file_outside_of_the_share", a_handle_of_a_file_outside_of_the_share),
        ("other_processes", other_processes),
        ("sockets", sockets),
        ("the_machine", the_machine),
        (
            "a_read_only_share_is_one_for_the_kernel_too",
            a_read_only_share_is_one_for_the_kernel_too,
        ),
        ("a_read_only_share_by_landlock", a_read_only_share_by_landlock),
    ];
    let of_a_user: [(&str, fn()); 6] = [
        ("files_of_the_host", files_of_the_host),
        ("a_users_handles", a_users_handles),
        ("other_processes", other_processes),
        ("sockets", sockets),
        ("what_a_user_may_in_a_namespace_of_users", what_a_user_may_in_a_namespace_of_users),
        ("a_read_only_share_by_landlock", a_read_only_share_by_landlock),
    ];
    let tests = if is_root() { &of_root[..] } else { &of_a_user };
    for (name, test) in tests {
        test();
        println!("test {name} ... ok");
    }
    if is_root() {
        as_another_user();
    }
}

/// All of it once more by somebody who has no rights.
fn as_another_user() {
    let mut command = std::process::Command::new("setpriv");
    command.args(["--reuid=4711", "--regid=4712", "--clear-groups", "--"]);
    let status = command.arg(std::env::current_exe().expect("this program")).status();
    let status = status.expect("setpriv of util-linux");
    assert!(status.success(), "as another user: {status}");
}

use With::*;

fn files_of_the_host() {
    let place = Place::new();
    let passwd = |_: &Path| open(Path::new("/etc/passwd"));
    place.check(
        &passwd,
        &[
            (Nothing, Came::Done),
            (Root, no(Errno::NOENT)),
            (Caps, Came::Done),
            (Landlock, no(Errno::ACCESS)),
            (Seccomp, Came::Done),
            (All, no(Errno::NOENT)),
            (AllButNamespaces, no(Errno::ACCESS)),
        ],
    );
    let climb = |share: &Path| open(&share.join("../outside"));
    place.check(
        &climb,
        &[
            (Nothing, Came::Done),
            (Root, no(Errno::NOENT)),
            (Landlock, no(Errno::ACCESS)),
            (All, no(Errno::NOENT)),
            (AllButNamespaces, no(Errno::ACCESS)),
        ],
    );
    // By the share's fd. Root's is of a mount of its own, so that `..` leads nowhere whatever layer
    // is on; who cannot copy mounts keeps none in namespaces, and has landlock alone without.
    let fd = place.fd.as_raw_fd();
    let by_fd = |_: &Path| {
        // SAFETY: the fd was kept for the child.
        let dir = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        let flags = OFlags::RDONLY;
        rustix::fs::openat(dir, "../outside", flags, Mode::empty()).map(drop)
    };
    let (before, by_landlock) = match is_root() {
        true => (no(Errno::NOENT), no(Errno::NOENT)),
        false => (Came::Done, no(Errno::ACCESS)),
    };
    place.check(&by_fd, &[(Nothing, before), (All, by_landlock), (AllButNamespaces, by_landlock)]);
    // What it is there for goes on.
    let inside = |share: &Path| {
        open(&share.join("inside"))?;
        let written = std::fs::write(share.join("new"), "new");
        written.map_err(|error| Errno::from_io_error(&error).expect("an errno"))?;
        renameat(CWD, share.join("new"), CWD, share.join("old"))?;
        mkdirat(CWD, share.join("dir"), Mode::RWXU)?;
        renameat(CWD, share.join("old"), CWD, share.join("dir/old"))?;
        unlinkat(CWD, share.join("dir/old"), AtFlags::empty())?;
        unlinkat(CWD, share.join("dir"), AtFlags::REMOVEDIR)
    };
    let done = Came::Done;
    let all = [Nothing, Landlock, Seccomp, All, AllButNamespaces];
    place.check(&inside, &all.map(|with| (with, done)));
}

/// struct file_handle of name_to_handle_at(2).
fn handle_of(file: &Path) -> [u32; 2 + 32] {
    // Room, type, bytes.
    let mut handle = [0u32; 2 + 32];
    handle[0] = 128;
    let mut mount = 0;
    let path = std::ffi::CString::new(file.to_str().expect("text")).expect("a path");
    // SAFETY: the path has its NUL, the handle says how long it is, and the mount's id is an int.
    let named = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            path.as_ptr(),
            handle.as_mut_ptr(),
            &raw mut mount,
            0,
        )
    };
    assert_eq!(named, 0, "{}", last());
    handle
}

fn open_by_handle(mut handle: [u32; 2 + 32], mount: &Path) -> Result<(), Errno> {
    let dir = rustix::fs::open(mount, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
    let arguments = [dir.as_raw_fd() as usize, handle.as_mut_ptr() as usize, 0, 0, 0, 0];
    call(libc::SYS_open_by_handle_at, arguments)
}

fn a_handle_of_a_file_outside_of_the_share() {
    let place = Place::new();
    let handle = handle_of(&place.dir.path().join("outside"));
    let by_handle = |share: &Path| open_by_handle(handle, share);
    // The capability that it takes is what tells: landlock (on newer kernels) takes a file that
    // the copy of a mount can be asked for, and does not hold, for one that lies in it.
    place.check(
        &by_handle,
        &[
            (Nothing, Came::Done),
            (Root, Came::Done),
            (Caps, Came::Done),
            (Seccomp, Came::Done),
            (CapsWithoutHandles, no(Errno::PERM)),
            (AllWithoutHandles, no(Errno::PERM)),
        ],
    );
    // Another file system has no mount to be asked by: what a worker has are its shares.
    let elsewhere = |_: &Path| open_by_handle(handle, Path::new("/"));
    place.check(&elsewhere, &[(Root, no(Errno::STALE)), (All, no(Errno::ACCESS))]);
}

/// Who has no rights has no handles, of files inside or outside.
fn a_users_handles() {
    let place = Place::new();
    for file in ["share/inside", "outside"] {
        let handle = handle_of(&place.dir.path().join(file));
        let by_handle = |share: &Path| open_by_handle(handle, share);
        let refused = no(Errno::PERM);
        let all = [Nothing, All, AllButNamespaces];
        place.check(&by_handle, &all.map(|with| (with, refused)));
    }
}

/// In a user namespace everybody has all capabilities at first: over what is in it, and then none.
fn what_a_user_may_in_a_namespace_of_users() {
    let place = Place::new();
    let mount = |share: &Path| {
        rustix::mount::mount("none", share, "tmpfs", rustix::mount::MountFlags::empty(), None)
    };
    let expected =
        [(Nothing, no(Errno::PERM)), (Root, Came::Done), (All, KILLED), (AllButNamespaces, KILLED)];
    place.check(&mount, &expected);
    let device = |share: &Path| {
        let kind = rustix::fs::FileType::CharacterDevice;
        rustix::fs::mknodat(CWD, share.join("null"), kind, Mode::RUSR, rustix::fs::makedev(1, 3))
    };
    place.check(&device, &[Nothing, Root, All].map(|with| (with, no(Errno::PERM))));
    // There is no other user to become, or to give files to.
    let root = |_: &Path| call(libc::SYS_setresuid, [0; 6]);
    let expected = [(Nothing, no(Errno::PERM)), (Root, no(Errno::INVAL)), (All, no(Errno::INVAL))];
    place.check(&root, &expected);
    let give = |share: &Path| {
        let nobody = Some(rustix::fs::Uid::from_raw(65534));
        rustix::fs::chownat(CWD, share.join("inside"), nobody, None, AtFlags::empty())
    };
    let expected = [(Nothing, no(Errno::PERM)), (Root, no(Errno::INVAL)), (All, no(Errno::INVAL))];
    place.check(&give, &expected);
    let shadow = |_: &Path| open(Path::new("/etc/shadow"));
    place.check(&shadow, &[(Nothing, no(Errno::ACCESS)), (Root, no(Errno::NOENT))]);
    let users = |_: &Path| call(libc::SYS_unshare, [libc::CLONE_NEWUSER as usize, 0, 0, 0, 0, 0]);
    let expected = [(Nothing, Came::Done), (All, KILLED), (AllButNamespaces, KILLED)];
    place.check(&users, &expected);
}

fn other_processes() {
    let place = Place::new();
    let mut victim = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
    let pid = victim.id() as usize;
    let signal = move |_: &Path| call(libc::SYS_kill, [pid, 0, 0, 0, 0, 0]);
    place.check(
        &signal,
        &[
            (Nothing, Came::Done),
            (Root, no(Errno::SRCH)),
            (Landlock, no(Errno::PERM)),
            (Seccomp, KILLED),
            (All, KILLED),
            (AllButNamespaces, KILLED),
        ],
    );
    let attach =
        move |_: &Path| call(libc::SYS_ptrace, [libc::PTRACE_SEIZE as usize, pid, 0, 0, 0, 0]);
    place.check(
        &attach,
        &[
            (Nothing, Came::Done),
            (Root, no(Errno::SRCH)),
            (Caps, no(Errno::PERM)),
            (Landlock, no(Errno::PERM)),
            (Seccomp, KILLED),
            (All, KILLED),
            (AllButNamespaces, KILLED),
        ],
    );
    let execute = |_: &Path| {
        let arguments = [c"/bin/true".as_ptr(), std::ptr::null()];
        let none = [std::ptr::null::<u8>()];
        call(
            libc::SYS_execve,
            [arguments[0] as usize, arguments.as_ptr() as usize, none.as_ptr() as usize, 0, 0, 0],
        )
    };
    place.check(
        &execute,
        &[
            (Nothing, Came::Done),
            (Root, no(Errno::NOENT)),
            (Landlock, no(Errno::ACCESS)),
            (Seccomp, KILLED),
            (All, KILLED),
            (AllButNamespaces, KILLED),
        ],
    );
    let fork = |_: &Path| call(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0, 0, 0]);
    place.check(&fork, &[(Seccomp, no(Errno::NOSYS)), (All, no(Errno::NOSYS))]);
    victim.kill().expect("kill");
    victim.wait().expect("wait");
}

fn sockets() {
    let place = Place::new();
    let internet = |_: &Path| {
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::DGRAM,
            None,
        )?;
        let address = std::net::SocketAddrV4::new(std::net::Ipv4Addr::new(127, 0, 0, 1), 9);
        rustix::net::connect(&socket, &address)
    };
    place.check(
        &internet,
        &[(Nothing, Came::Done), (Root, no(Errno::NETUNREACH)), (Seccomp, KILLED), (All, KILLED)],
    );
    // In the abstract name space, which is the network namespace's.
    let name = format!("ringfs-test-{}", std::process::id());
    let address =
        <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(
            &name,
        )
        .expect("a name");
    let _listener = UnixListener::bind_addr(&address).expect("bind");
    let abstract_one = |_: &Path| {
        let address = rustix::net::SocketAddrUnix::new_abstract_name(name.as_bytes())?;
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            None,
        )?;
        rustix::net::connect(&socket, &address)
    };
    place.check(
        &abstract_one,
        &[
            (Nothing, Came::Done),
            (Root, no(Errno::CONNREFUSED)),
            (Landlock, no(Errno::PERM)),
            (Seccomp, KILLED),
            (All, KILLED),
            (AllButNamespaces, KILLED),
        ],
    );
}

fn the_machine() {
    let place = Place::new();
    let mount = |share: &Path| {
        rustix::mount::mount("none", share, "tmpfs", rustix::mount::MountFlags::empty(), None)
    };
    // In a namespace of its own, which goes with the child.
    place.check(
        &mount,
        &[
            (Root, Came::Done),
            (Caps, no(Errno::PERM)),
            (Landlock, no(Errno::PERM)),
            (Seccomp, KILLED),
            (All, KILLED),
            (AllButNamespaces, KILLED),
        ],
    );
    let device = |share: &Path| {
        let mode = Mode::RUSR;
        let kind = rustix::fs::FileType::CharacterDevice;
        rustix::fs::mknodat(CWD, share.join("null"), kind, mode, rustix::fs::makedev(1, 3))?;
        let opened = open(&share.join("null"));
        unlinkat(CWD, share.join("null"), AtFlags::empty())?;
        opened
    };
    place.check(
        &device,
        &[
            (Nothing, Came::Done),
            // It can be made, and not opened: the share's mount is nodev.
            (Root, no(Errno::ACCESS)),
            (Caps, no(Errno::PERM)),
            (Landlock, Came::Done),
            (All, no(Errno::PERM)),
        ],
    );
    let link = |share: &Path| {
        symlinkat("inside", CWD, share.join("link"))?;
        let opened = open(&share.join("link"));
        unlinkat(CWD, share.join("link"), AtFlags::empty())?;
        opened
    };
    // Whoever wins a race against our checks still follows no link of a guest's.
    place.check(&link, &[(Nothing, Came::Done), (Root, no(Errno::LOOP)), (All, no(Errno::LOOP))]);
    let program = |_: &Path| {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, mprotect};
        // SAFETY: nothing runs or reads what is mapped.
        unsafe {
            let at =
                mmap_anonymous(std::ptr::null_mut(), 4096, ProtFlags::WRITE, MapFlags::PRIVATE)?;
            mprotect(at, 4096, rustix::mm::MprotectFlags::EXEC)
        }
    };
    place.check(
        &program,
        &[(Nothing, Came::Done), (Seccomp, no(Errno::NOSYS)), (All, no(Errno::NOSYS))],
    );
    for number in [libc::SYS_bpf, libc::SYS_unshare, libc::SYS_keyctl, libc::SYS_userfaultfd] {
        let it = move |_: &Path| call(number, [usize::MAX; 6]);
        place.check(&it, &[(Seccomp, KILLED), (All, KILLED)]);
    }
    // One that this kernel does not have yet.
    let newer = |_: &Path| call(9999, [0; 6]);
    place.check(&newer, &[(Seccomp, no(Errno::NOSYS)), (All, no(Errno::NOSYS))]);
    // A ring that lacks the restrictions of those that the worker has.
    let ring = |_: &Path| {
        filter::seal().map_err(|_| Errno::IO)?;
        call(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0, 0])
    };
    place.check(&ring, &[(Nothing, KILLED), (All, KILLED)]);
}

fn a_read_only_share_is_one_for_the_kernel_too() {
    let dir = tempfile::tempdir().expect("directory");
    std::fs::write(dir.path().join("file"), "x").expect("file");
    let copy = ShareDir::open(dir.path(), Submounts::Hide, true).expect("share").copy();
    let copy: OwnedFd = copy.expect("copy").into();
    let write = OFlags::WRONLY;
    let opened = rustix::fs::openat(&copy, "file", write, Mode::empty());
    assert_eq!(opened.err(), Some(Errno::ROFS));
}

/// Where no mount is read-only: writing is landlock's to refuse, and what it knows nothing of does
/// not exist.
fn a_read_only_share_by_landlock() {
    let place = Place::new();
    let file = |share: &Path| share.join("inside");
    let writes: [(&str, Try<'_>); 6] = [
        ("open", &|share| rustix::fs::open(file(share), OFlags::WRONLY, Mode::empty()).map(drop)),
        ("truncate", &|share| {
            let flags = OFlags::RDONLY | OFlags::TRUNC;
            rustix::fs::open(file(share), flags, Mode::empty()).map(drop)
        }),
        ("mkdir", &|share| {
            mkdirat(CWD, share.join("dir"), Mode::RWXU)?;
            unlinkat(CWD, share.join("dir"), AtFlags::REMOVEDIR)
        }),
        ("symlink", &|share| {
            symlinkat("inside", CWD, share.join("link"))?;
            unlinkat(CWD, share.join("link"), AtFlags::empty())
        }),
        ("rename", &|share| {
            renameat(CWD, file(share), CWD, share.join("other"))?;
            renameat(CWD, share.join("other"), CWD, file(share))
        }),
        ("link", &|share| {
            rustix::fs::linkat(CWD, file(share), CWD, share.join("other"), AtFlags::empty())?;
            unlinkat(CWD, share.join("other"), AtFlags::empty())
        }),
    ];
    for (what, write) in writes {
        println!("  {what}");
        let refused = no(Errno::ACCESS);
        let all = [(AllButNamespaces, Came::Done), (LooksHere, refused), (LooksOnly, refused)];
        place.check(write, &all);
    }
    let (owner, mode) = (rustix::process::geteuid(), Mode::from_raw_mode(0o644));
    let now = rustix::fs::Timestamps {
        last_access: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 },
        last_modification: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 },
    };
    let attributes: [(&str, Try<'_>); 6] = [
        ("chmod", &|share| rustix::fs::chmod(file(share), mode)),
        ("fchmod", &|share| {
            let fd = rustix::fs::open(file(share), OFlags::RDONLY, Mode::empty())?;
            rustix::fs::fchmod(&fd, mode)
        }),
        ("chown", &|share| rustix::fs::chown(file(share), Some(owner), None)),
        ("utimens", &|share| rustix::fs::utimensat(CWD, file(share), &now, AtFlags::empty())),
        ("setxattr", &|share| {
            let flags = rustix::fs::XattrFlags::empty();
            rustix::fs::setxattr(file(share), c"user.x", b"x", flags)
        }),
        ("removexattr", &|share| match rustix::fs::removexattr(file(share), c"user.x") {
            Err(Errno::NODATA) => Ok(()),
            other => other,
        }),
    ];
    for (what, change) in attributes {
        println!("  {what}");
        let (done, none) = (Came::Done, no(Errno::NOSYS));
        place.check(change, &[(AllButNamespaces, done), (LooksHere, done), (LooksOnly, none)]);
    }
    let read = |share: &Path| open(&file(share));
    place.check(&read, &[(LooksHere, Came::Done), (LooksOnly, Came::Done)]);
    let write_beside = |share: &Path| {
        let beside = share.with_file_name("beside").join("new");
        let flags = OFlags::WRONLY | OFlags::CREATE;
        rustix::fs::open(beside, flags, Mode::RUSR | Mode::WUSR).map(drop)
    };
    place.check(&write_beside, &[(LooksHere, Came::Done), (LooksOnly, no(Errno::ACCESS))]);
}
