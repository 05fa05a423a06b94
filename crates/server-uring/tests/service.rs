//! The daemon as a service: what it tells its manager, sockets that it is passed, the CPUs that its
//! control group gives it, and the unit files.

mod common;

use common::*;
use ringfs_server::control;
use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Said where a test cannot be made, so that nobody takes it for one that was.
fn skipped(what: &str, why: impl std::fmt::Debug) {
    // Past the harness, which keeps what passing tests print to itself.
    let _ = writeln!(std::io::stderr(), "SKIPPED, NOT TESTED: {what}: {why:?}");
}

#[test]
fn a_manager_is_told_how_it_is() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let manager = UnixDatagram::bind(dir.path().join("notify")).expect("bind");
    manager.set_read_timeout(Some(LIMIT)).expect("timeout");
    let daemon = Daemon::start_as("uring", |program, _| {
        let mut command = Command::new(program);
        command.env("NOTIFY_SOCKET", dir.path().join("notify")).env("WATCHDOG_USEC", "50000");
        command
    });
    let hear = || {
        let mut bytes = [0; 4096];
        let n = manager.recv(&mut bytes).expect("a message");
        String::from_utf8(bytes[..n].to_vec()).expect("text")
    };
    let hear_other = || loop {
        let said = hear();
        if said != "WATCHDOG=1" {
            return said;
        }
    };
    assert_eq!(hear_other(), "READY=1\nSTATUS=2 shares");
    for _ in 0..3 {
        assert_eq!(hear(), "WATCHDOG=1");
    }
    daemon.signal_to_reload();
    let said = hear_other();
    assert!(said.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{said}");
    assert!(hear_other().starts_with("READY=1\n"));
    daemon.signal_to_end();
    assert_eq!(hear_other(), "STOPPING=1");
    daemon.stop_well();
}

#[test]
fn sockets_are_passed_to_it() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("share")).expect("mkdir");
    let guests = UnixListener::bind(at("s")).expect("bind");
    let asking = UnixListener::bind(at("c")).expect("bind");
    // Before there is a daemon.
    let early = UnixStream::connect(at("s")).expect("the socket is there");
    early.set_read_timeout(Some(LIMIT)).expect("timeout");
    let script = "exec 3<&0 4<&1 </dev/null >/dev/null; LISTEN_PID=$$ exec \"$0\" \"$@\"";
    let child = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_ringfsd"), "--grace=0", "--log=error"])
        .args(["--share", &format!("share={}", at("share").display())])
        .env("LISTEN_FDS", "2")
        .env("LISTEN_FDNAMES", "guests:control")
        .stdin(Stdio::from(OwnedFd::from(guests)))
        .stdout(Stdio::from(OwnedFd::from(asking)))
        .spawn()
        .expect("sh starts");
    let mut child = Held(child);
    let mut guest = Guest::greet(early, &hello("share")).expect("a session");
    guest.create("file").expect("create");
    let told = control::ask_status(&at("c")).expect("a status");
    assert_eq!((told.sessions.len(), told.pid), (1, child.0.id()));
    assert_eq!(told.config.listeners, [format!("unix:{}", at("s").display())]);
    drop(guest);
    kill(child.0.id(), rustix::process::Signal::TERM);
    assert!(child.0.wait().expect("wait").success());
    // They are not its to remove.
    assert!(at("s").exists() && at("c").exists());
}

/// A control group, removed at the end.
struct Group(PathBuf);

const V2: &str = "/sys/fs/cgroup/unified";

impl Group {
    /// Of version 1.
    fn new(controller: &str, files: &[(&str, &str)]) -> Result<Group, std::io::Error> {
        Group::at(Path::new("/sys/fs/cgroup").join(controller), controller, files)
    }

    /// Of version 2, where the kernel gives this controller to it and not to version 1.
    fn new_v2(controller: &str, files: &[(&str, &str)]) -> Result<Group, std::io::Error> {
        let root = [V2, "/sys/fs/cgroup"].map(PathBuf::from);
        let root = root.into_iter().find(|at| at.join("cgroup.controllers").exists());
        let root = root.ok_or_else(|| std::io::Error::other("no hierarchy of version 2"))?;
        let has = std::fs::read_to_string(root.join("cgroup.controllers"))?;
        if !has.split_whitespace().any(|name| name == controller) {
            let has = has.trim();
            return Err(std::io::Error::other(format!(
                "version 2 has no {controller} here: {has}"
            )));
        }
        std::fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"))?;
        Group::at(root, controller, files)
    }

    fn at(root: PathBuf, of: &str, files: &[(&str, &str)]) -> Result<Group, std::io::Error> {
        let group = Group(root.join(format!("ringfs-test-{}-{of}", std::process::id())));
        std::fs::create_dir(&group.0)?;
        for (file, text) in files {
            group.set(file, text)?;
        }
        Ok(group)
    }

    fn set(&self, file: &str, text: &str) -> std::io::Result<()> {
        std::fs::write(self.0.join(file), text)
    }

    fn tells(&self, file: &str) -> String {
        std::fs::read_to_string(self.0.join(file)).expect(file)
    }

    /// A daemon that is born in it.
    fn daemon(&self, engine: &str) -> Daemon {
        Daemon::start_as(engine, |program, _| {
            let mut command = Command::new("sh");
            let script = "echo $$ > \"$1\"/cgroup.procs || exit 9; shift; exec \"$@\"";
            command.args(["-c", script, "sh"]).arg(&self.0).arg(program);
            command
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..100 {
            match std::fs::remove_dir(&self.0) {
                Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                _ => return,
            }
        }
    }
}

/// Where the kernel lets each thread run, by the thread's name.
fn masks(daemon: &Daemon) -> BTreeMap<String, Vec<String>> {
    let mut masks: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.worker_pid())).expect("tasks");
    for task in tasks.flatten() {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let status = read("status");
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        if let Some(list) = line {
            masks.entry(read("comm").trim().into()).or_default().push(list.trim().into());
        }
    }
    masks
}

fn settles(daemon: &Daemon, what: &str, check: impl Fn(&BTreeMap<String, Vec<String>>) -> bool) {
    let start = std::time::Instant::now();
    loop {
        let masks = masks(daemon);
        if check(&masks) {
            return;
        }
        assert!(start.elapsed() < LIMIT, "not {what}: {masks:?}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn its_threads_run_where_its_cpuset_is_and_follow_it() {
    let files = [("cpuset.mems", "0"), ("cpuset.cpus", "0-1")];
    for (version, made) in [(1, Group::new("cpuset", &files)), (2, Group::new_v2("cpuset", &files))]
    {
        match made {
            Ok(group) => threads_follow(&group),
            Err(error) => skipped(&format!("a cpuset of version {version}"), error),
        }
    }
}

fn threads_follow(group: &Group) {
    for engine in ["uring", "threads"] {
        group.set("cpuset.cpus", "0").expect("one CPU");
        let daemon = group.daemon(engine);
        let all_on = |list: &'static str| {
            move |masks: &BTreeMap<String, Vec<String>>| masks.values().flatten().all(|m| m == list)
        };
        settles(&daemon, "all on CPU 0", all_on("0"));
        assert_eq!(daemon.status().shards, 1);
        let mut guest = daemon.guest();
        let (node, fh) = guest.create("file").expect("create");
        group.set("cpuset.cpus", "1").expect("another one");
        settles(&daemon, "all on CPU 1", all_on("1"));
        assert_eq!(guest.write(node, fh, 0, b"goes on"), Ok(7));
        drop(guest);
        daemon.stop_well();

        group.set("cpuset.cpus", "0-1").expect("both");
        let daemon = group.daemon(engine);
        let shards = |a: &'static str, b: &'static str| {
            move |masks: &BTreeMap<String, Vec<String>>| {
                masks.get("ringfs-shard-0").is_some_and(|masks| *masks == [a])
                    && masks.get("ringfs-shard-1").is_some_and(|masks| *masks == [b])
            }
        };
        settles(&daemon, "a shard on each", shards("0", "1"));
        group.set("cpuset.cpus", "0").expect("one is taken away");
        settles(&daemon, "all on CPU 0", all_on("0"));
        until("the status", || {
            let told = daemon.status();
            (told.cpus == [0] && told.shards == 2).then_some(())
        });
        group.set("cpuset.cpus", "0-1").expect("and comes back");
        settles(&daemon, "a shard on each again", shards("0", "1"));
        daemon.stop_well();
    }
}

#[test]
fn it_has_as_many_shards_as_its_quota_can_drive() {
    for (version, made) in [
        (1, Group::new("cpu", &[("cpu.cfs_quota_us", "80000")])),
        (2, Group::new_v2("cpu", &[("cpu.max", "80000 100000")])),
    ] {
        match made {
            Ok(group) => one_shard(&group),
            Err(error) => skipped(&format!("a CPU quota of version {version}"), error),
        }
    }
}

fn one_shard(group: &Group) {
    let daemon = group.daemon("uring");
    let told = daemon.status();
    assert_eq!(told.shards, 1);
    let all = std::fs::read_to_string("/proc/self/status").expect("status");
    let all = all.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    // It goes where there is room. A thread has its name once it has run.
    let all = all.expect("a list").trim();
    settles(&daemon, "where there is room", |masks| {
        masks.get("ringfs-shard-0").is_some_and(|masks| *masks == [all])
    });
    daemon.guest().create("file").expect("create");
    daemon.stop_well();
}

#[test]
fn its_buffers_fit_its_memory() {
    const MIB: u64 = 1 << 20;
    let limit = (96 * MIB).to_string();
    for (version, made) in [
        (1, Group::new("memory", &[("memory.limit_in_bytes", &limit)])),
        (2, Group::new_v2("memory", &[("memory.max", &limit)])),
    ] {
        match made {
            Ok(group) => stays_below(&group),
            Err(error) => skipped(&format!("a memory limit of version {version}"), error),
        }
    }
}

/// Guests that want more buffers than there are are served all the same, and nobody is killed.
fn stays_below(group: &Group) {
    const MIB: usize = 1 << 20;
    for engine in ["uring", "threads"] {
        let daemon = group.daemon(engine);
        let told = daemon.status();
        // A quarter of the limit, in pieces of a little more than 1 MiB.
        let all = told.large_buffers * told.shards;
        assert!((16..=24).contains(&all) && told.large_buffers >= 8, "{all} large buffers");
        let worker = daemon.worker_pid();
        let mut guests: Vec<Guest> = (0..6).map(|_| daemon.guest()).collect();
        let files: Vec<_> = guests
            .iter_mut()
            .enumerate()
            .map(|(n, guest)| guest.create(&format!("{engine}-{n}")).expect("create"))
            .collect();
        let data = vec![7; MIB];
        for piece in 0..8 {
            for (guest, &(node, fh)) in guests.iter_mut().zip(&files) {
                let args = write_args(fh, piece * MIB as u64, &data);
                guest.start(ringfs_wire::abi::Opcode::Write, node, &args);
                assert!(guest.flush());
            }
            for guest in &mut guests {
                guest.reply().expect("an answer").1.expect("written");
            }
        }
        for (guest, &(node, fh)) in guests.iter_mut().zip(&files) {
            for piece in 0..8 {
                let read = guest.read(node, fh, piece * MIB as u64, MIB as u32).expect("read");
                assert!(read == data, "piece {piece}");
            }
        }
        let events = ["memory.events", "memory.oom_control"];
        let events = events.iter().find(|file| group.0.join(file).exists()).expect("events");
        let told = group.tells(events);
        assert!(told.lines().any(|line| line == "oom_kill 0"), "{told}");
        assert_eq!(daemon.worker_pid(), worker);
        drop(guests);
        daemon.stop_well();
    }
}

#[test]
fn it_has_the_priorities_that_it_is_given() {
    let daemon = Daemon::start_as("uring", |program, _| {
        let mut command = Command::new(program);
        command.args(["--nice", "7", "--ioprio", "idle"]);
        command
    });
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.worker_pid())).expect("tasks");
    for task in tasks.flatten() {
        let stat = std::fs::read_to_string(task.path().join("stat")).expect("stat");
        let nice = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(16));
        assert_eq!(nice, Some("7"), "{stat}");
        let tid = task.file_name();
        match Command::new("ionice").arg("-p").arg(&tid).output() {
            Ok(told) => assert_eq!(String::from_utf8_lossy(&told.stdout).trim(), "idle"),
            Err(error) => skipped("the priority on the disk", error),
        }
    }
    daemon.stop_well();
}

#[test]
fn the_units_are_as_systemd_wants_them() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/systemd");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut units = Vec::new();
    for name in ["ringfsd.service", "ringfsd@.service", "ringfsd.socket"] {
        let text = std::fs::read_to_string(from.join(name)).expect(name);
        // That it is installed is not what is asked.
        let text = text.replace("/usr/bin/ringfsd", env!("CARGO_BIN_EXE_ringfsd"));
        std::fs::write(dir.path().join(name), text).expect("write");
        units.push(dir.path().join(name));
    }
    let mut verify = Command::new("systemd-analyze");
    let told = match verify.args(["verify", "--man=no"]).args(&units).output() {
        Ok(told) => told,
        Err(error) => return skipped("the unit files", error),
    };
    let said = String::from_utf8_lossy(&told.stderr);
    assert!(told.status.success() && said.trim().is_empty(), "{said}");
    // What they call must be there.
    for name in &units[..2] {
        let text = std::fs::read_to_string(name).expect("a unit");
        for line in text.lines().filter(|line| line.starts_with("Exec")) {
            let words: Vec<&str> = line.split(' ').skip(1).collect();
            let options = words.iter().filter(|word| word.starts_with("--"));
            let subcommand = words.first().filter(|word| !word.starts_with("--"));
            let mut help = Command::new(env!("CARGO_BIN_EXE_ringfsd"));
            let help = help.args(subcommand).arg("--help").output().expect("help");
            let help = String::from_utf8_lossy(&help.stdout);
            for option in options {
                assert!(help.contains(option), "{option} of {line}");
            }
        }
    }
}
