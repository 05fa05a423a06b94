//! `ringfs mount --fd-store`: all processes of a mount are killed, and the service manager starts
//! it again with the fds that it has kept. The manager here is a small one, by the protocol that
//! systemd speaks (sd_notify(3), sd_listen_fds(3)). Needs root, FUSE, bash, and Linux 6.9.

#[allow(dead_code, reason = "the other tests use more of it")]
mod bench;
#[allow(dead_code, reason = "the other tests use more of it")]
mod host;

use bench::uses::*;
use bench::*;
use host::Terms;
use rustix::io::{FdFlags, IoSliceMut, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What a service may store (`FileDescriptorStoreMax=`).
const STORE_MAX: usize = 16;
/// In the manager's process the fds of a new service wait from here on.
const APART: i32 = 100;
/// Ends the manager's thread; no service says it.
const OVER: &[u8] = b"X_TEST_OVER=1";

/// A service that is started gets fds that are not close-on-exec for a moment: nothing else may be
/// started in that time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same for a test that kills clients.
fn killing(test: &str) -> Option<MutexGuard<'static, ()>> {
    kernel_resends(test).then(alone)
}

/// A mount that is a service, ready.
fn serving(options: &str) -> (Bench, Manager, Client) {
    let bench = Bench::new(Terms::default());
    let manager = Manager::new(&bench);
    let keeper = manager.start(&bench, "data", options);
    manager.wait_ready(1);
    (bench, manager, keeper)
}

#[derive(Debug, Default)]
struct Unit {
    main: Option<Pid>,
    store: Vec<(String, OwnedFd)>,
    ready: u32,
    stopping: u32,
    barriers: u32,
    /// Messages that a manager with `NotifyAccess=main` would not take, or not understand.
    wrong: Vec<String>,
}

impl Unit {
    fn take(&mut self, bytes: &[u8], mut fds: Vec<OwnedFd>, sender: Option<Pid>) {
        let text = String::from_utf8_lossy(bytes).into_owned();
        if sender.is_none() || sender != self.main {
            return self.wrong.push(format!("{sender:?} says {text}"));
        }
        let words: BTreeMap<&str, &str> =
            text.lines().filter_map(|line| line.split_once('=')).collect();
        let name = words.get("FDNAME").copied().unwrap_or("stored").to_owned();
        if words.contains_key("BARRIER") {
            // Its end is closed with this: alone in its message, with one fd.
            self.barriers += 1;
            let is_fine = words.len() == 1 && fds.len() == 1;
            return if is_fine { drop(fds) } else { self.wrong.push(text) };
        }
        if words.contains_key("FDSTOREREMOVE") {
            return self.store.retain(|(its, _)| *its != name);
        }
        if words.contains_key("FDSTORE") {
            if words.get("FDPOLL") != Some(&"0") || fds.len() != 1 || self.store.len() >= STORE_MAX
            {
                return self.wrong.push(text);
            }
            self.store.extend(fds.pop().map(|fd| (name, fd)));
        }
        self.ready += u32::from(words.contains_key("READY"));
        self.stopping += u32::from(words.contains_key("STOPPING"));
    }
}

/// A service manager with one service: the mount.
struct Manager {
    path: PathBuf,
    unit: Arc<Mutex<Unit>>,
    thread: Option<JoinHandle<()>>,
}

impl Manager {
    fn new(bench: &Bench) -> Manager {
        let path = bench.dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("bind");
        set_socket_passcred(&socket, true).expect("passcred");
        let unit = Arc::new(Mutex::new(Unit::default()));
        let its = Arc::clone(&unit);
        let thread = std::thread::spawn(move || {
            while let Some((bytes, fds, sender)) = receive(&socket) {
                its.lock().expect("unit").take(&bytes, fds, sender);
            }
        });
        Manager { path, unit, thread: Some(thread) }
    }

    fn see<T>(&self, look: impl FnOnce(&mut Unit) -> T) -> T {
        look(&mut self.unit.lock().expect("unit"))
    }

    fn names(&self) -> Vec<String> {
        self.see(|unit| unit.store.iter().map(|(name, _)| name.clone()).collect())
    }

    /// Starts the mount as systemd does: stored fds from 3 on, in the order of the store.
    fn start(&self, bench: &Bench, share: &str, options: &str) -> Client {
        let (mut script, mut apart, mut names) = (String::new(), Vec::new(), Vec::new());
        self.see(|unit| {
            for (at, (name, fd)) in unit.store.iter().enumerate() {
                let fd = fcntl_dupfd_cloexec(fd, APART).expect("dup");
                fcntl_setfd(&fd, FdFlags::empty()).expect("setfd");
                let from = fd.as_raw_fd();
                script += &format!("exec {}<&{from} {from}<&-\n", 3 + at);
                names.push(name.clone());
                apart.push(fd);
            }
        });
        script += &format!("export LISTEN_PID=$$ LISTEN_FDS={}\n", names.len());
        script += "exec \"$0\" mount -f --fd-store \"$@\"";
        let mut command = Command::new("bash");
        command.args(["-c", &script, PROGRAM, "-o", options, &bench.source(share)]);
        command.arg(&bench.mountpoint).env("NOTIFY_SOCKET", &self.path);
        command.env("LISTEN_FDNAMES", names.join(":"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // Whoever it is, it may speak only when we know it.
        self.see(|unit| {
            let child = command.spawn().expect("bash");
            unit.main = Some(Pid::from_child(&child));
            Client { child: Some(child) }
        })
    }

    fn wait_ready(&self, times: u32) {
        wait_until("READY", || self.see(|unit| unit.ready >= times));
        assert_eq!(self.see(|unit| std::mem::take(&mut unit.wrong)), [""; 0]);
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let over = UnixDatagram::unbound().and_then(|socket| socket.send_to(OVER, &self.path));
        if let (Ok(_), Some(thread)) = (over, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

/// A message, its fds, its sender; `None`: it is over.
fn receive(socket: &UnixDatagram) -> Option<(Vec<u8>, Vec<OwnedFd>, Option<Pid>)> {
    let mut bytes = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags).ok()?;
    let (mut fds, mut sender) = (Vec::new(), None);
    for message in control.drain() {
        match message {
            RecvAncillaryMessage::ScmRights(some) => fds.extend(some),
            RecvAncillaryMessage::ScmCredentials(its) => sender = Some(its.pid),
            _ => {}
        }
    }
    bytes.truncate(got.bytes);
    (bytes != OVER).then_some((bytes, fds, sender))
}

/// The processes of the mount, as a cgroup would know them. `status` is the file that can be read
/// of a process that hangs in a mount.
fn processes(bench: &Bench) -> Vec<Pid> {
    let ours = |pid: &i32| {
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}"));
        let status = read("status").unwrap_or_default();
        let lives = !status.contains("State:\tZ") && !status.contains("State:\tX");
        let path = bench.mountpoint.to_str().expect("utf-8");
        lives
            && status.starts_with("Name:\tringfs\n")
            && read("cmdline").is_ok_and(|line| line.contains("mount\0") && line.contains(path))
    };
    let all = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(ours).filter_map(Pid::from_raw).collect()
}

/// As `kill -9` of a whole cgroup, in one order or the other.
fn kill_all(bench: &Bench, keeper: Client, keeper_first: bool) -> String {
    let mut all = processes(bench);
    all.sort_by_key(|pid| (*pid == keeper.pid()) != keeper_first);
    for pid in all {
        // The client may have gone with the keeper.
        let _ = kill_process(pid, Signal::KILL);
    }
    // A client that the keeper has just started goes by itself.
    let (_, stderr) = keeper.wait();
    wait_until("the end of all", || processes(bench).is_empty());
    stderr
}

/// Writes what is there already to the start of `big`, until there is a file `stop`. A process of
/// its own: ours could start no other one while the mount is not served.
fn writing(bench: &Bench) -> Reader {
    let code = "open($f, '+<', $ARGV[0]) or die \"open $!\"; \
                $r = sysread($f, $d, 1 << 20); $r == 1 << 20 or die \"read $r $!\"; \
                $n = 0; while (! -e $ARGV[1]) { sysseek($f, 0, 0); \
                syswrite($f, $d) == 1 << 20 or die \"write $!\"; $n += 1 << 20 } print $n";
    let mut command = Command::new("perl");
    command.args(["-e", code]).arg(bench.file("big")).arg(bench.dir.path().join("stop"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Reader { child: command.spawn().expect("perl") }
}

fn written(writer: Reader) -> u64 {
    let output = writer.wait();
    let stderr = stderr_of(&output);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8_lossy(&output.stdout).parse().expect("bytes")
}

fn stop(bench: &Bench, manager: &Manager, keeper: Client) {
    keeper.signal(Signal::TERM);
    ended(bench, keeper);
    // Both were sent before its end.
    wait_until("the store's end", || manager.names().is_empty());
    assert_eq!(manager.see(|unit| (unit.stopping, unit.wrong.len())), (1, 0));
    assert_nothing_left(bench);
}

#[test]
fn a_kill_of_all_its_processes_is_survived() {
    let Some(_alone) = killing("a_kill_of_all_its_processes_is_survived") else { return };
    for (options, keeper_first) in [("lanes=2", true), ("lanes=3,cache=never", false)] {
        let (bench, manager, mut keeper) = serving(options);
        let lanes = status_of(&bench)["lanes"]["got"].as_u64().expect("lanes") as usize;
        assert_eq!(manager.names().len(), 1 + lanes);
        assert_eq!(manager.see(|unit| unit.barriers), 1);
        let status = status_of(&bench);
        assert!(status["alone_why"].is_null() && status["is_stored"] == true, "{status}");
        let line = bench.mount_line();
        let held = hold(&bench, &["hello"]);
        let reader = hanging(&bench);
        for round in 1..4 {
            let stderr = kill_all(&bench, keeper, keeper_first);
            assert!(!stderr.contains("unmounted"), "{stderr}");
            assert_eq!(bench.mount_line(), line);
            keeper = manager.start(&bench, "data", options);
            manager.wait_ready(round as u32 + 1);
            wait_repeats(&bench, round);
            use_mount(&bench);
            // A client alone is the keeper's to replace, also of one that began with stored fds.
            kill_worker(&bench, Signal::KILL);
            use_mount(&bench);
            // They are there once.
            assert_eq!(manager.names().len(), 1 + lanes);
        }
        assert_eq!(bench.host.wait_for("reads", |seen| Some(seen.hanging.len())), 1);
        deny_read(&bench, reader);
        drop(held);
        assert_eq!(bench.mount_line(), line);
        stop(&bench, &manager, keeper);
    }
}

#[test]
fn what_was_given_up_is_stored_no_more() {
    let Some(_alone) = killing("what_was_given_up_is_stored_no_more") else { return };
    let (bench, manager, keeper) = serving("lanes=2");
    assert!(!manager.names().is_empty());
    for _ in 0..6 {
        kill_worker(&bench, Signal::ABORT);
    }
    failed(&bench, keeper, "it dies again and again");
    wait_until("the store's end", || manager.names().is_empty());
}

#[test]
fn a_service_stops_when_its_mount_has_ended() {
    let Some(_alone) = killing("a_service_stops_when_its_mount_has_ended") else { return };
    let (bench, manager, mut keeper) = serving("lanes=2");
    let mut words = keeper.words();
    let cover = Cover::over(&bench.mountpoint);
    keeper.signal(Signal::TERM);
    words.until("the mount goes on");
    drop(cover);
    kill_all(&bench, keeper, true);
    assert_eq!(manager.see(|unit| unit.stopping), 0);
    let keeper = manager.start(&bench, "data", "lanes=2");
    manager.wait_ready(2);
    stop(&bench, &manager, keeper);
}

#[test]
fn a_service_that_is_stopped_without_a_client_leaves_nothing() {
    let Some(_alone) = killing("a_service_that_is_stopped_without_a_client_leaves_nothing") else {
        return;
    };
    for signal_first in [false, true] {
        let (bench, manager, mut keeper) = serving("lanes=2");
        let (pid, reader) = (worker(&bench), hanging(&bench));
        if signal_first {
            keeper.signal(Signal::TERM);
            // It is in use, so it is detached, and served.
            wait_until("the unmount", || !bench.is_mounted());
        }
        without_fds(keeper.pid(), 2);
        kill_process(pid, Signal::KILL).expect("kill");
        let mut rest = String::new();
        if !signal_first {
            let mut stderr = keeper.words_until("cannot start the next client: trying again");
            keeper.signal(Signal::TERM);
            stderr.read_to_string(&mut rest).expect("utf-8");
        }
        let (status, stderr) = keeper.wait();
        rest += &stderr;
        assert_eq!(status.code(), Some(3), "{rest}");
        assert!(rest.contains("gives up: it is unmounted") && !bench.is_mounted(), "{rest}");
        // Nor has it waited for what nobody wants any more.
        assert!(!rest.contains("trying again"), "{rest}");
        assert!(!reader.wait().status.success());
        wait_until("the store's end", || manager.names().is_empty());
        assert_eq!(manager.see(|unit| unit.stopping), 1);
    }
}

#[test]
fn kills_of_all_under_load_lose_and_double_nothing() {
    let Some(_alone) = killing("kills_of_all_under_load_lose_and_double_nothing") else { return };
    let (bench, manager, mut keeper) = serving("lanes=2,cache=never");
    let writers: Vec<_> = (0..3).map(|_| writing(&bench)).collect();
    for round in 1..13 {
        let stderr = kill_all(&bench, keeper, round % 2 == 0);
        assert!(bench.is_mounted(), "{stderr}");
        keeper = manager.start(&bench, "data", "lanes=2,cache=never");
        manager.wait_ready(round + 1);
    }
    std::fs::write(bench.dir.path().join("stop"), "").expect("stop");
    let written: u64 = writers.into_iter().map(written).sum();
    assert_eq!(bench.host.wait_for("writes", |seen| Some(seen.written)), written);
    stop(&bench, &manager, keeper);
}

#[test]
fn a_client_does_not_outlive_its_keeper() {
    let Some(_alone) = killing("a_client_does_not_outlive_its_keeper") else { return };
    let (bench, manager, keeper) = serving("lanes=2");
    let line = bench.mount_line();
    keeper.signal(Signal::KILL);
    let (_, stderr) = keeper.wait();
    wait_until("the client's end", || processes(&bench).is_empty());
    assert!(stderr.contains("the service manager starts the next one"), "{stderr}");
    assert_eq!(bench.mount_line(), line);
    let keeper = manager.start(&bench, "data", "lanes=2");
    manager.wait_ready(2);
    use_mount(&bench);
    assert_eq!(bench.mount_line(), line);
    stop(&bench, &manager, keeper);
}

#[test]
fn what_cannot_be_taken_over_is_removed_and_mounted_anew() {
    let Some(_alone) = killing("what_cannot_be_taken_over_is_removed_and_mounted_anew") else {
        return;
    };
    let check = |fault: fn(&Bench, &Manager), share: &str, words: &str, starts: u32| {
        let (bench, manager, mut keeper) = serving("lanes=2");
        let line = bench.mount_line();
        kill_all(&bench, keeper, true);
        fault(&bench, &manager);
        let mut said = String::new();
        for _ in 1..starts {
            let (status, stderr) = manager.start(&bench, share, "lanes=2").wait();
            assert_eq!(status.code(), Some(3), "{stderr}");
            wait_until("the store's end", || manager.names().is_empty());
            said += &stderr;
        }
        keeper = manager.start(&bench, share, "lanes=2");
        manager.wait_ready(2);
        use_mount(&bench);
        // The kernel may give the same numbers again, not to another source.
        assert!(share == "data" || bench.mount_line() != line);
        assert_eq!(manager.names().len(), 3, "those of the new mount");
        keeper.signal(Signal::TERM);
        said += &ended(&bench, keeper);
        assert!(said.contains(words), "{said}");
        wait_until("the store's end", || manager.names().is_empty());
    };
    let unmount = |bench: &Bench, _: &Manager| {
        assert!(bench.umount(&["--lazy"]).status.success());
    };
    check(unmount, "data", "is gone: mounting anew", 1);
    check(|_, _| (), "data/sub", "another share's: removing it", 1);
    // As `systemctl stop` of a service whose processes are all dead.
    let empty = |_: &Bench, manager: &Manager| manager.see(|unit| unit.store.clear());
    check(empty, "data", "nobody serves the mount that is there: removing it", 1);
    // One that manager or kernel took for the same as another.
    let lose = |_: &Bench, manager: &Manager| {
        manager.see(|unit| unit.store.retain(|(name, _)| !name.ends_with("device-1")));
    };
    check(lose, "data", "had 2 lanes and has left 1 fds", 2);
    let update = |_: &Bench, manager: &Manager| {
        let file = manager.see(|unit| {
            let file = unit.store.iter().find(|(name, _)| name == "ringfs-file");
            file.expect("stored").1.try_clone().expect("dup")
        });
        File::from(file).write_all_at(&[7; 8], 0).expect("another version's");
    };
    check(update, "data", "has left nothing that this one can read", 2);
}

#[test]
fn a_mount_that_cannot_be_taken_over_says_that_it_is_not_stored() {
    let _alone = alone();
    let (bench, manager, keeper) = serving("lanes=2,nokeep");
    assert!(manager.names().is_empty() && status_of(&bench)["is_stored"] == false);
    keeper.signal(Signal::TERM);
    let stderr = ended(&bench, keeper);
    assert!(stderr.contains("nothing is kept by the service manager why=\"nokeep\""), "{stderr}");
}

#[test]
fn without_a_manager_it_is_refused() {
    let bench = Bench::new(Terms::default());
    let path = bench.mountpoint.display().to_string();
    let output = bench.run(&["mount", "-f", "--fd-store", &bench.source("data"), &path]);
    let stderr = stderr_of(&output);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("NOTIFY_SOCKET") && !bench.is_mounted(), "{stderr}");
    let output = bench.run(&["mount", "--fd-store", &bench.source("data"), &path]);
    assert_eq!(output.status.code(), Some(2));
}
