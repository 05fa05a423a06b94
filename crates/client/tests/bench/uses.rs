//! What tests do with a mount, and see of it: reads that hang, files held open, clients that are
//! killed, and what is left at the end.

use super::{Bench, Client, Reader, status_of, stderr_of, wait_until, within};
use crate::host::{HELLO_TEXT, Mood, Seen, big_byte};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Data of one write(2): one WRITE, or two where it begins within a page.
pub const WRITE_BYTES: usize = 1 << 20;

/// Whether the kernel sends requests again that a dead client had read.
pub fn kernel_resends(test: &str) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("/proc");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    let resends = (numbers.next(), numbers.next()) >= (Some(6u32), Some(9));
    if !resends {
        println!("SKIPPED {test}: Linux {} is older than 6.9", release.trim());
        eprintln!("SKIPPED {test}: Linux {} is older than 6.9", release.trim());
    }
    resends
}

pub fn use_mount(bench: &Bench) {
    let path = bench.file("hello");
    within("a read", move || assert_eq!(std::fs::read(path).expect("hello"), HELLO_TEXT));
}

/// Unmounts. A child that another test has just forked has our files open for a moment, until it
/// becomes another program.
pub fn wait_unmounted(bench: &Bench) {
    wait_until("the unmount", || bench.umount(&[]).status.success());
}

/// The mount goes as any other does, and nothing is left.
pub fn umount(bench: &Bench, client: Client) -> String {
    wait_unmounted(bench);
    let stderr = ended(bench, client);
    assert_nothing_left(bench);
    stderr
}

/// The client ends well, and so does the mount: what it said.
pub fn ended(bench: &Bench, client: Client) -> String {
    let (status, stderr) = client.wait();
    assert!(status.success() && !bench.is_mounted(), "{status} {stderr}");
    stderr
}

/// The client cannot go on, and cleans up: it says why.
pub fn failed(bench: &Bench, client: Client, words: &str) {
    let (status, stderr) = client.wait();
    assert_eq!(status.code(), Some(3), "{words}: {stderr}");
    assert!(stderr.contains(words) && !bench.is_mounted(), "{words}: {stderr}");
}

/// Two signals take off a mount that is in use, and fail what the host does not answer.
pub fn end_by_signals(bench: &Bench, client: Client, reader: Reader) {
    client.signal(Signal::TERM);
    wait_until("the detached mount", || !bench.is_mounted());
    client.signal(Signal::TERM);
    let output = reader.wait();
    assert!(!output.status.success(), "{output:?}");
    failed(bench, client, "aborted by a second signal");
}

pub fn assert_nothing_left(bench: &Bench) {
    // The host may have to read yet what came last.
    wait_until("the end of all requests", || bench.host.slots_in_use() == 0);
    bench.host.assert_no_faults();
}

/// A read that the host does not answer.
pub fn hanging(bench: &Bench) -> Reader {
    let before = bench.host.wait_for("reads", |seen| Some(seen.hanging.len()));
    let reader = bench.cat("hang");
    bench.host.wait_for("a read", |seen| (seen.hanging.len() > before).then_some(()));
    reader
}

/// The host answers the first read that hangs, and its reader is told.
pub fn deny_read(bench: &Bench, reader: Reader) {
    let (lane, at) = bench.host.wait_for("a read", |seen| seen.hanging.first().copied());
    bench.host.answer_hanging(lane, at, 13);
    let words = stderr_of(&reader.wait());
    assert!(words.contains("Permission denied"), "{words}");
}

/// The request that hangs has come again: only then may a reply leave by the new connection.
pub fn wait_repeats(bench: &Bench, at_least: u64) {
    let repeats = |seen: &mut Seen| (seen.repeats_running >= at_least).then_some(());
    bench.host.wait_for("the request again", repeats);
}

/// Writes the pattern to the start of `big` until it is told to stop: bytes written.
pub fn writer(bench: &Bench, stop: &'static AtomicBool) -> JoinHandle<u64> {
    let path = bench.file("big");
    std::thread::spawn(move || {
        let file = File::options().write(true).open(path).expect("open");
        let mut written = 0;
        while !stop.load(Ordering::Relaxed) {
            let data: Vec<u8> = (0..WRITE_BYTES).map(big_byte).collect();
            assert_eq!(file.write_at(&data, 0).expect("write"), WRITE_BYTES);
            written += WRITE_BYTES as u64;
        }
        written
    })
}

/// A process that removes a name.
pub fn unlink(bench: &Bench, name: &str) -> Reader {
    let mut command = Command::new("unlink");
    command.arg(bench.file(name)).stdout(Stdio::piped()).stderr(Stdio::piped());
    Reader { child: command.spawn().expect("unlink") }
}

/// Has the host remove `hello`, which the kernel knows, and the answer be lost.
pub fn unlink_unanswered(bench: &Bench) -> Reader {
    let path = bench.file("hello");
    within("a look", move || std::fs::metadata(path)).expect("hello");
    bench.host.set_mood(Mood::LosesRemovals);
    let before = bench.host.wait_for("replies", |seen| Some(seen.lost));
    let remover = unlink(bench, "hello");
    bench.host.wait_for("a lost reply", |seen| (seen.lost > before).then_some(()));
    bench.host.set_mood(Mood::Fair);
    remover
}

/// The kernel knows that `hello` is gone.
pub fn wait_unlinked(bench: &Bench) {
    wait_until("the end of the name", || {
        let path = bench.file("hello");
        let found = within("a look", move || std::fs::metadata(path));
        found.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
    });
}

/// Appends to `big` in one write(2), of which the kernel makes several requests; the daemon is lost
/// over the second one.
pub fn append_halfway(bench: &Bench) -> File {
    let path = bench.file("big");
    let file = within("an open", move || File::options().append(true).open(path));
    let file = file.expect("open");
    bench.host.set_mood(Mood::LosesLateAppends);
    let before = bench.host.wait_for("replies", |seen| Some(seen.lost));
    let appending = file.try_clone().expect("dup");
    let writer = std::thread::spawn(move || (&appending).write(&vec![7; 2 * WRITE_BYTES]));
    bench.host.wait_for("a lost reply", |seen| (seen.lost > before).then_some(()));
    bench.host.set_mood(Mood::Fair);
    bench.host.restart(false, None);
    let written = within("the append", move || writer.join().expect("a thread"));
    // As much as the pages of one request hold of a buffer that may begin within a page.
    let written = written.expect("the first part");
    assert!((WRITE_BYTES - 4096..=WRITE_BYTES).contains(&written), "{written}");
    file
}

/// Appends the rest: it fails, as the host may have it; what comes then does not.
pub fn append_rest(bench: &Bench, file: &File) {
    let append = || {
        let file = file.try_clone().expect("dup");
        within("an append", move || (&file).write(&vec![7; WRITE_BYTES]))
    };
    let before = bench.host.wait_for("writes", |seen| Some(seen.writes));
    let error = append().expect_err("the host may have it");
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    assert_eq!(bench.host.wait_for("writes", |seen| Some(seen.writes)), before);
    assert_eq!(status_of(bench)["writes_refused"], 1);
    assert_eq!(append().expect("what follows"), WRITE_BYTES);
}

/// A process that has a file open: other tests drop the kernel's caches. This process must not have
/// it, or each program that it starts would close it first, and wait while the mount is cut.
pub struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn hold(bench: &Bench, names: &[&str]) -> Vec<Holder> {
    let paths: Vec<_> = names.iter().map(|name| bench.file(name)).collect();
    let holder = |path: &PathBuf| {
        let mut command = Command::new("sleep");
        command.arg("600").stdin(File::open(path).expect("open"));
        Holder(command.spawn().expect("sleep"))
    };
    within("opens", move || paths.iter().map(holder).collect())
}

/// Another file system over a mount, which then cannot be unmounted.
pub struct Cover(PathBuf);

impl Cover {
    pub fn over(path: &Path) -> Cover {
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", path, "tmpfs", flags, None).expect("mount a tmpfs");
        Cover(path.to_owned())
    }
}

impl Drop for Cover {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::NOFOLLOW;
        rustix::mount::unmount(&self.0, flags).expect("unmount the tmpfs");
    }
}

/// The same mount at another path.
pub struct Bound(PathBuf);

impl Bound {
    pub fn of(bench: &Bench) -> Bound {
        let path = bench.dir.path().join("bound");
        std::fs::create_dir(&path).expect("mkdir");
        rustix::mount::mount_bind(&bench.mountpoint, &path).expect("bind");
        Bound(path)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        rustix::mount::unmount(&self.0, flags).expect("unmount what is bound");
    }
}

/// Whether a process has ended, though nobody may have waited for it.
pub fn is_over(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid()));
    stat.map_or(true, |stat| stat.rsplit(')').next().is_some_and(|s| s.trim().starts_with('Z')))
}

/// Has the kernel forget every file that nobody holds.
pub fn drop_caches() {
    std::fs::write("/proc/sys/vm/drop_caches", "2").expect("root");
}

/// Drops the caches until the kernel has given the files back: one that is just being closed is
/// passed over.
pub fn forget_until(what: &str, mut done: impl FnMut() -> bool) {
    wait_until(what, || {
        drop_caches();
        done()
    });
}

/// Lookups that are left of the nodes beside the root.
pub fn lookups(bench: &Bench) -> BTreeMap<u64, i64> {
    bench.host.wait_for("lookups", |seen| {
        Some(seen.lookups.iter().filter(|l| *l.1 != 0).map(|(id, count)| (*id, *count)).collect())
    })
}

/// Nodes and open files that the client would tell.
pub fn known(bench: &Bench) -> (u64, u64) {
    let status = status_of(bench);
    let number = |name: &str| status[name].as_u64().unwrap_or(u64::MAX);
    (number("nodes_known"), number("handles_known"))
}

pub fn wait_connected(bench: &Bench) {
    wait_until("the connections", || status_of(bench)["connected"] == true);
}

/// Who serves the mount; `None`: it is not mounted any more.
fn worker_if_mounted(bench: &Bench) -> Option<Pid> {
    let mut found = None;
    wait_until("a client", || {
        found = status_of(bench)["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32));
        found.is_some() || !bench.is_mounted()
    });
    found
}

/// Who serves the mount.
pub fn worker(bench: &Bench) -> Pid {
    worker_if_mounted(bench).expect("the mount has ended")
}

/// Kills whoever serves the mount; the next one is there when this returns, or the mount has ended.
pub fn kill_worker(bench: &Bench, signal: Signal) {
    let Some(pid) = worker_if_mounted(bench) else { return };
    kill_process(pid, signal).expect("kill");
    wait_until("the next client", || worker_if_mounted(bench) != Some(pid));
}

/// No fd can be had by a keeper that has what it is to hold: all numbers below the limit are taken.
pub fn without_fds(pid: Pid, lanes: usize) -> Rlimit {
    let table = || std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_pid())).expect("/proc");
    let fds = || table().map(|fd| fd.expect("fd").path());
    let is_device = |fd: &PathBuf| fd.read_link().is_ok_and(|to| to == Path::new("/dev/fuse"));
    wait_until("what the keeper holds", || fds().filter(is_device).count() == lanes);
    let number = |fd: PathBuf| fd.file_name()?.to_str()?.parse().ok();
    let fds: BTreeSet<u64> = fds().map(|fd| number(fd).expect("a number")).collect();
    let free = (0..).find(|number| !fds.contains(number));
    let limit = Rlimit { current: free, ..getrlimit(Resource::Nofile) };
    prlimit(Some(pid), Resource::Nofile, limit).expect("the keeper is ours")
}
