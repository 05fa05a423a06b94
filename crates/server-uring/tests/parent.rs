//! What the parent does beside its worker, seen from outside of a whole daemon: another worker
//! where one dies, sockets that come and go with their directories, shares that a SIGHUP brings and
//! takes.

mod common;

use common::*;
use ringfs_wire::abi::Opcode;
use ringfs_wire::hello::{Hello, Reason, feature};
use rustix::process::{Pid, Signal, test_kill_process};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

#[test]
fn a_worker_that_dies_is_replaced_and_its_guests_go_on() {
    for sandbox in ["namespace", "landlock", "none"] {
        let daemon = Daemon::start_as("uring", |program, _| {
            let mut command = Command::new(program);
            command.args(["--grace=60", "--state-dir=none", &format!("--sandbox={sandbox}")]);
            command.env("RUST_LOG", "off");
            command
        });
        let features = feature::PAYLOAD_CRC | feature::RESTORE;
        let asked = Hello { features, ..hello("share") };
        let mut guest = Guest::greet(daemon.connect(), &asked).expect("welcome");
        guest.recipes = Some(Default::default());
        let (node, fh) = guest.create("file").expect("create");
        assert_eq!(guest.write(node, fh, 0, b"before"), Ok(6));
        let nodes = vec![(node, guest.recipes.as_ref().expect("recipes")[&node].clone())];

        let session = || daemon.status().sessions[0].id;
        let mut names = vec![session()];
        for deaths in 1..=3 {
            daemon.kill_worker();
            assert_eq!(guest.ending(), End::Closed);
            guest = rebuilt(&daemon, &asked, &nodes, &[(fh, node, libc::O_RDWR)]);
            let text = format!("after {deaths}");
            assert_eq!(guest.write(node, fh, 0, text.as_bytes()), Ok(text.len() as u32));
            assert_eq!(guest.read(node, fh, 0, 100), Ok(text.into_bytes()));
            assert!(!names.contains(&session()), "{names:?}: one name for two sessions in the log");
            names.push(session());
        }
        drop(guest);
        daemon.stop_well();
    }
}

#[test]
fn a_worker_ends_with_its_parent() {
    for sandbox in ["namespace", "landlock", "none"] {
        let daemon = Daemon::start_as("uring", |program, _| {
            let mut command = Command::new(program);
            command.args(["--state-dir=none", &format!("--sandbox={sandbox}")]);
            command
        });
        let (worker, mut guest) = (daemon.worker_pid(), daemon.guest());
        guest.create("file").expect("create");
        kill(daemon.pid(), Signal::KILL);
        let worker = Pid::from_raw(worker as i32).expect("a pid");
        until("the worker's end", || test_kill_process(worker).is_err().then_some(()));
        assert_eq!(guest.ending(), End::Closed);
    }
}

/// A configuration with these shares, each of its own directory, and a pattern of sockets.
fn file(dir: &Path, shares: &[&str], pattern: &str) -> String {
    let mut text = String::from("state-dir = \"none\"\ngrace = 0\n");
    text += &format!("[[listen]]\naddress = \"unix:{}\"\n", dir.join(pattern).display());
    for name in shares {
        let path = dir.join("share").join(name);
        std::fs::create_dir_all(&path).expect("the share's directory");
        std::fs::write(path.join("of"), name).expect("write");
        text += &format!("[share.{name}]\npath = {path:?}\n");
    }
    text
}

/// The share is served, and it is this one.
fn reads_its_file(guest: &mut Guest, share: &str) {
    let node = guest.lookup(1, "of").expect("its file").nodeid;
    let fh = guest.open(node, libc::O_RDONLY).expect("open");
    assert_eq!(guest.read(node, fh, 0, 100), Ok(share.into()));
    guest.release(node, fh).expect("release");
}

fn appears(socket: &Path) {
    until("a socket", || UnixStream::connect(socket).ok());
}

fn vanishes(socket: &Path) {
    until("the end of a socket", || (!socket.exists()).then_some(()));
}

#[test]
fn sockets_of_a_pattern_come_and_go_with_their_directories() {
    let daemon = Daemon::start_with_file(|dir| file(dir, &["a"], "vm/*/v.sock_5640"));
    let vm = |name: &str| daemon.path("vm").join(name);
    let socket = |name: &str| vm(name).join("v.sock_5640");
    let listeners = || {
        let text = daemon.command(&["status"]).stdout;
        String::from_utf8(text).expect("text")
    };
    // Not even the directory above is there at first.
    std::fs::create_dir_all(vm("1")).expect("mkdir");
    appears(&socket("1"));
    let mut first = mount(&socket("1"), "a").expect("a session");
    reads_its_file(&mut first, "a");
    std::fs::create_dir(vm("2")).expect("mkdir");
    appears(&socket("2"));
    reads_its_file(&mut mount(&socket("2"), "a").expect("a session"), "a");
    assert!(listeners().contains("vm/*/v.sock_5640"), "{}", listeners());

    // A VM is gone, and another one has its name.
    // Between its two steps the socket may come again.
    until("rm -r", || std::fs::remove_dir_all(vm("1")).ok());
    vanishes(&socket("1"));
    reads_its_file(&mut first, "a");
    std::fs::create_dir(vm("1")).expect("mkdir");
    appears(&socket("1"));
    reads_its_file(&mut mount(&socket("1"), "a").expect("a session"), "a");
    // Somebody tidies a socket away, or moves its directory.
    std::fs::remove_file(socket("2")).expect("rm");
    appears(&socket("2"));
    std::fs::rename(vm("2"), vm("3")).expect("mv");
    vanishes(&socket("2"));
    // The old socket has moved too: who comes by it before the parent has looked is cut off.
    let mut moved = until("a socket that stays", || {
        let stream = UnixStream::connect(socket("3")).ok()?;
        Guest::greet(stream, &hello("a")).ok()
    });
    reads_its_file(&mut moved, "a");
    reads_its_file(&mut first, "a");

    // The worker dies: the sockets are the parent's, and stay.
    daemon.kill_worker();
    reads_its_file(&mut mount(&socket("1"), "a").expect("a session"), "a");
    reads_its_file(&mut mount(&socket("3"), "a").expect("a session"), "a");
    drop((first, moved));

    daemon.signal_to_end();
    for name in ["1", "3"] {
        vanishes(&socket(name));
    }
}

#[test]
fn shares_and_patterns_come_and_go_by_sighup() {
    let daemon = Daemon::start_with_file(|dir| file(dir, &["a"], "vm/*/s"));
    let dir = daemon.path("");
    let [one, other] = ["vm/1", "other/1"].map(|name| {
        std::fs::create_dir_all(daemon.path(name)).expect("mkdir");
        daemon.path(name).join("s")
    });
    appears(&one);
    let mut a = mount(&one, "a").expect("a session");
    let reloads = || daemon.status().config.reloads;
    let reload = |text: String| {
        std::fs::write(daemon.path("ringfsd.toml"), text).expect("write");
        let before = reloads();
        daemon.signal_to_reload();
        until("the reload", || (reloads() > before).then_some(()));
    };
    // They are mounted inside the worker's root while it serves, and can be used at once.
    for round in 0..5 {
        let name = format!("b{round}");
        reload(file(&dir, &["a", &name], "vm/*/s"));
        reads_its_file(&mut mount(&one, &name).expect("a new share"), &name);
        assert_eq!(mount(&one, &format!("b{}", round + 1)).err(), Some(Reason::UnknownShare));
        reload(file(&dir, &["a"], "vm/*/s"));
        assert_eq!(mount(&one, &name).err(), Some(Reason::UnknownShare));
        reads_its_file(&mut a, "a");
    }
    // Another pattern: its sockets come, and those of the first go.
    assert!(!other.exists());
    reload(file(&dir, &["a", "c"], "other/*/s"));
    appears(&other);
    vanishes(&one);
    reads_its_file(&mut mount(&other, "c").expect("a session"), "c");
    // A worker that comes now has what is in force now.
    daemon.kill_worker();
    reads_its_file(&mut mount(&other, "c").expect("a session"), "c");
    assert_eq!(mount(&other, "b0").err(), Some(Reason::UnknownShare));
    assert!(a.try_call(Opcode::Getattr, 1, &[0; 16]).is_err(), "it was cut off");
    daemon.signal_to_end();
    vanishes(&other);
}

#[test]
fn a_ticket_opens_nothing_that_its_listener_does_not_offer() {
    let daemon = Daemon::start_as("uring", |program, dir| {
        let mut command = Command::new(program);
        let only = dir.join("../only");
        command.args(["--grace=60", "--state-dir=none"]);
        command.args(["--listen", &format!("unix:{},shares=ro", only.display())]);
        command
    });
    let features = feature::PAYLOAD_CRC | feature::RESTORE;
    let mut guest =
        Guest::greet(daemon.connect(), &Hello { features, ..hello("share") }).expect("welcome");
    guest.recipes = Some(Default::default());
    let (node, fh) = guest.create("file").expect("create");
    let ticket = guest.welcome.ticket;
    let come = |share: &str, features| {
        let asked = Hello { features, ticket, ..hello(share) };
        let refused = Guest::greet(connect(&daemon.path("only")), &asked).err();
        match refused.expect("the session is of another share") {
            End::Goodbye(Some(reason), _) => reason,
            end => panic!("{end:?}"),
        }
    };
    assert_eq!(come("ro", features), Reason::UnknownSession, "that share for this one's ticket");
    assert_eq!(come("share", features), Reason::UnknownShare);
    assert_eq!(come("share", feature::PAYLOAD_CRC), Reason::UnknownSession);
    assert_eq!(guest.write(node, fh, 0, b"still"), Ok(5));
    let other = mount(&daemon.path("only"), "ro").expect("what is offered");
    goodbye(other);
    goodbye(guest);
    daemon.stop_well();
}

/// What it makes for others to connect by has the mode that was told, whatever else it makes has no
/// more than its umask lets it have; and what guests make the mode that they say.
#[test]
fn no_mode_is_wider_than_it_was_told() {
    let daemon = Daemon::start_as("uring", |program, dir| {
        // The only way to give a child another umask by safe means.
        let mut command = Command::new("sh");
        command.args(["-c", "umask 027; exec \"$0\" \"$@\"", program]);
        std::fs::write(dir.join("../more.toml"), "state-dir = \"none\"\n").expect("write");
        command.arg("--config").arg(dir.join("../more.toml"));
        command.args(["--listen", &format!("unix:{},mode=0777", dir.join("../open").display())]);
        command
    });
    let mode = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(daemon.path(name)).expect("stat").mode() & 0o7777
    };
    let umask = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        let line = status.lines().find_map(|line| line.strip_prefix("Umask:")).expect("umask");
        line.trim().to_owned()
    };
    let check = |sockets: &[(&str, u32)]| {
        for &(name, expected) in sockets {
            assert_eq!(format!("{:o}", mode(name)), format!("{expected:o}"), "{name}");
        }
        assert_eq!(
            (umask(daemon.pid()), umask(daemon.worker_pid())),
            ("0027".into(), "0000".into())
        );
    };
    let first = [("s", 0o600), ("open", 0o777), ("c", 0o600)];
    check(&first);
    let mut guest = daemon.guest();
    guest.create("file").expect("create");
    check(&first);
    // A reload opens shares too.
    let text = format!(
        "state-dir = \"none\"\n[share.new]\npath = {:?}\n[[listen]]\naddress = \"unix:{}\"\n",
        daemon.path("share"),
        daemon.path("vm/*/s").display()
    );
    std::fs::create_dir_all(daemon.path("vm/1")).expect("mkdir");
    std::fs::write(daemon.path("more.toml"), text).expect("write");
    daemon.signal_to_reload();
    appears(&daemon.path("vm/1/s"));
    mount(&daemon.path("vm/1/s"), "new").expect("a new share");
    check(&[("vm/1/s", 0o600)]);
    check(&first);
    // Another worker, after that.
    daemon.kill_worker();
    mount(&daemon.path("vm/1/s"), "new").expect("served again");
    check(&first);
    daemon.signal_to_end();
}

/// Where the root is no mount, as in a chroot: the worker has one of its own all the same, and gets
/// shares while it runs.
#[test]
fn a_daemon_in_a_chroot_shuts_its_worker_in_too() {
    let dir = tempfile::tempdir().expect("directory");
    let (root, share) = (dir.path().join("root"), dir.path().join("new"));
    for path in [&root, &share] {
        std::fs::create_dir(path).expect("mkdir");
    }
    std::fs::write(share.join("of"), "new").expect("write");
    let config = dir.path().join("ringfsd.toml");
    std::fs::write(&config, "").expect("write");
    let script = r#"
        root=$1; shift
        for dir in /*; do
            if [ -L "$dir" ]; then cp -P "$dir" "$root/"
            elif [ -d "$dir" ]; then mkdir "$root$dir"; mount --rbind "$dir" "$root$dir"
            fi
        done
        exec chroot "$root" "$@""#;
    let daemon = Daemon::start_as("uring", |program, _| {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-ec", script, "sh"]).arg(&root).arg(program);
        command.arg("--config").arg(&config).arg("--state-dir=none");
        command
    });
    let mut guest = daemon.guest();
    guest.create("file").expect("create");
    assert!(daemon.share().join("file").exists());
    let mounts = format!("/proc/{}/mountinfo", daemon.worker_pid());
    let mounts = std::fs::read_to_string(mounts).expect("mountinfo");
    let shown: Vec<_> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    assert!(shown.contains(&"/shares/0") && !shown.contains(&"/usr"), "{shown:?}");
    let text = format!("[share.new]\npath = {share:?}\n");
    std::fs::write(&config, text).expect("write");
    daemon.reload();
    reads_its_file(&mut daemon.mount("new").expect("a new share"), "new");
    drop(guest);
    daemon.stop_well();
}

/// Each worker gets copies of the shares' mounts, and of one that was taken away there is none.
#[test]
fn a_share_that_was_unmounted_costs_the_others_nothing() {
    let dir = tempfile::tempdir().expect("directory");
    let share = dir.path().join("usb");
    std::fs::create_dir(&share).expect("mkdir");
    let config = dir.path().join("ringfsd.toml");
    std::fs::write(&config, format!("[share.usb]\npath = {share:?}\n")).expect("write");
    let mount = "mount -t tmpfs none \"$1\"; echo usb > \"$1/of\"";
    // In mounts of the daemon's, which go with it.
    let script = format!("{mount}; shift; exec \"$@\"");
    let daemon = Daemon::start_as("uring", |program, _| {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-ec", &script, "sh"]).arg(&share).arg(program);
        command.arg("--config").arg(&config).arg("--state-dir=none");
        command
    });
    let there = |script: &str| {
        let mounts = format!("--mount=/proc/{}/ns/mnt", daemon.pid());
        let mut command = Command::new("nsenter");
        let status = command.args([&mounts, "sh", "-ec", script, "sh"]).arg(&share).status();
        assert!(status.expect("nsenter").success(), "{script}");
    };
    let usb = || mount_and_look(&daemon, "usb");
    assert!(usb().is_ok());
    there("umount -l \"$1\"");
    daemon.kill_worker();
    daemon.guest().create("file").expect("create");
    assert!(usb().is_err_and(Reason::is_passing), "its guests wait");
    let lacks = || daemon.status().config.lacks;
    assert!(matches!(&lacks()[..], [one] if one.starts_with("share usb (")), "{:?}", lacks());
    there(mount);
    daemon.reload();
    assert_eq!((usb(), lacks()), (Ok(()), Vec::<String>::new()));
    daemon.stop_well();
}

fn mount_and_look(daemon: &Daemon, share: &str) -> Result<(), Reason> {
    daemon.mount(share)?.lookup(1, "of").expect("its file");
    Ok(())
}

/// As in a container, to whose processes those of the host have no number.
#[test]
fn peers_outside_of_its_pid_namespace_are_served() {
    let daemon = Daemon::start_as("uring", |program, _| {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--mount-proc", "--fork", "--kill-child", program]);
        command.args(["--state-dir=none", "--sandbox=landlock"]);
        command
    });
    let mut guest = daemon.guest();
    guest.create("file").expect("create");
    let told = daemon.status();
    assert!(told.sessions[0].peer.ends_with(" pid 0"), "{}", told.sessions[0].peer);
}
