//! The daemon of a user without rights: it shuts its worker in all the same, by a user namespace,
//! and finds files again without their handles. And what it says where there are none.

mod common;

use common::*;
use ringfs_wire::abi::{Opcode, SetattrIn, fattr};
use ringfs_wire::hello::{Hello, Reason, feature};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use zerocopy::IntoBytes;

const UID: u32 = 4711;
const GID: u32 = 4712;
/// That user is in this group, too.
const OTHER_GID: u32 = 4713;

/// To run as that user; false, and said, where we cannot.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: to be another user takes root");
    }
    root
}

/// A daemon of that user over a share of his, with options. `script` is what root does before, in
/// mounts of its own; `$1` is the share.
fn daemon_of_user(engine: &str, script: &str, options: &[&str]) -> Daemon {
    Daemon::start_as(engine, |program, share| {
        for path in [share, share.parent().expect("a parent")] {
            chown(path, Some(UID), Some(GID)).expect("chown");
        }
        let mut command = Command::new("unshare");
        let script = format!("{script}\nshift; exec \"$@\"");
        command.args(["-m", "sh", "-ec", &script, "sh"]).arg(share);
        command.args(["setpriv", &format!("--reuid={UID}"), &format!("--regid={GID}")]);
        command.args([&format!("--groups={OTHER_GID}"), "--", program]).args(options);
        if !options.iter().any(|option| option.starts_with("--state-dir")) {
            command.arg("--state-dir=none");
        }
        command
    })
}

/// A directory of that user, with these in it.
fn dirs_of_user(names: [&str; 2]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("directory");
    chown(dir.path(), Some(UID), Some(GID)).expect("chown");
    for path in names.map(|name| dir.path().join(name)) {
        std::fs::create_dir(&path).expect("mkdir");
        chown(&path, Some(UID), Some(GID)).expect("chown");
    }
    dir
}

/// A configuration file, and the option that names it.
fn config_in(dir: &Path, text: &str) -> (PathBuf, String) {
    let file = dir.join("ringfsd.toml");
    std::fs::write(&file, text).expect("write");
    let option = format!("--config={}", file.display());
    (file, option)
}

/// A share, as it stands there.
fn table(name: &str, path: &Path) -> String {
    format!("[share.{name}]\npath = {path:?}\n")
}

fn proc_of_worker(daemon: &Daemon, file: &str) -> String {
    let path = format!("/proc/{}/{file}", daemon.worker_pid());
    std::fs::read_to_string(path).expect("the worker's /proc")
}

/// What can be had through a session: made, written, read, found, renamed, removed.
fn serves(daemon: &Daemon) {
    let mut guest = daemon.guest();
    let (node, fh) = guest.create("file").expect("create");
    assert_eq!(guest.write(node, fh, 0, b"data"), Ok(4));
    guest.release(node, fh).expect("release");
    let fh = guest.open(node, libc::O_RDONLY).expect("open");
    assert_eq!(guest.read(node, fh, 0, 10), Ok(b"data".to_vec()));
    let made = std::fs::metadata(daemon.share().join("file")).expect("made");
    assert_eq!((made.uid(), made.gid()), (UID, GID));
}

#[test]
fn its_worker_is_shut_in_and_serves() {
    if !is_root() {
        return;
    }
    for engine in ["uring", "threads"] {
        let daemon = daemon_of_user(engine, "", &[]);
        serves(&daemon);
        let map = proc_of_worker(&daemon, "uid_map");
        let map: Vec<u32> = map.split_whitespace().map(|n| n.parse().expect("a number")).collect();
        assert_eq!(map, [UID, UID, 1], "the worker is its user and nobody else");
        let status = proc_of_worker(&daemon, "status");
        let line = |name| status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        for set in ["CapEff:", "CapPrm:", "CapBnd:", "CapInh:", "CapAmb:"] {
            assert_eq!(line(set).trim().trim_matches('0'), "", "{set}");
        }
        assert_eq!((line("NoNewPrivs:").trim(), line("Seccomp:").trim()), ("1", "2"));
        no_directory_is_from_outside(&daemon);
        gives_nothing_away(&daemon);
        daemon.stop_well();
    }
}

/// It has a copy of its own, which is locked with its parent's against other daemons.
#[test]
fn its_state_directory_leads_nowhere() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    chown(dir.path(), Some(UID), Some(GID)).expect("chown");
    let state = dir.path().join("state");
    let option = format!("--state-dir={}", state.display());
    let daemon = daemon_of_user("uring", "", &[&option, "--grace=60"]);
    let files = || std::fs::read_dir(&state).expect("the state directory").count();
    for sessions in 1..=2 {
        daemon.guest().create(&format!("file{sessions}")).expect("create");
        assert_eq!(files(), sessions, "a file a session");
        no_directory_is_from_outside(&daemon);
        assert!(has_locked(&daemon, &state), "whoever is left of the daemon has it");
        daemon.kill_worker();
    }
    let user = ["setpriv", &format!("--reuid={UID}"), &format!("--regid={GID}"), "--clear-groups"];
    let said = says_with(&user, dir.path(), &[&option, "--grace=60"]);
    assert!(said.contains("in use by another daemon"), "{said}");
    assert_eq!(without(&daemon), "");
    // Somebody has moved it: guests are served all the same.
    std::fs::rename(&state, dir.path().join("moved")).expect("rename");
    daemon.kill_worker();
    assert!(without(&daemon).contains("state-dir"), "{}", without(&daemon));
    daemon.guest().create("file").expect("create");
    daemon.stop_well();
}

/// Whether the worker itself has a lock on that directory.
fn has_locked(daemon: &Daemon, dir: &Path) -> bool {
    let worker = format!("/proc/{}", daemon.worker_pid());
    let ino = |path: &Path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    let mut fds = std::fs::read_dir(format!("{worker}/fd")).expect("fds").flatten();
    fds.any(|fd| {
        let info = format!("{worker}/fdinfo/{}", fd.file_name().display());
        let info = std::fs::read_to_string(info).unwrap_or_default();
        ino(&fd.path()) == ino(dir) && info.contains("FLOCK") && info.contains("READ")
    })
}

/// What the worker lacks, as the daemon's status has it for people.
fn without(daemon: &Daemon) -> String {
    let status = daemon.command(&["status"]).stdout;
    let status = String::from_utf8(status).expect("text");
    let lines = status.lines().filter_map(|line| line.split_once("THE WORKER IS WITHOUT "));
    lines.map(|(_, part)| part).collect::<Vec<_>>().join("; ")
}

/// Each worker finds the shares anew. One whose directory is not there keeps nobody from others,
/// its guests wait, and it comes back with a reload.
#[test]
fn a_share_that_is_away_costs_the_others_nothing() {
    if !is_root() {
        return;
    }
    let dir = dirs_of_user(["stays", "goes"]);
    let share = |name: &str| table(name, &dir.path().join(name));
    let (_, option) = config_in(dir.path(), &(share("goes") + &share("stays")));
    let daemon = daemon_of_user("uring", "", &[&option]);
    daemon.mount("goes").expect("a session").create("file").expect("create");
    let away = dir.path().join("away");
    std::fs::rename(dir.path().join("goes"), &away).expect("rename");
    std::fs::create_dir(dir.path().join("goes")).expect("another");
    daemon.kill_worker();
    daemon.mount("stays").expect("a session").create("file").expect("create");
    let refused = daemon.mount("goes").err();
    assert!(refused.is_some_and(Reason::is_passing), "{refused:?}");
    let said = without(&daemon);
    assert!(said.starts_with("share goes (") && said.contains("another directory"), "{said}");
    std::fs::remove_dir(dir.path().join("goes")).expect("rmdir");
    let output = daemon.command(&["reload"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    std::fs::rename(&away, dir.path().join("goes")).expect("rename");
    assert_eq!(daemon.reload(), "once more share goes\n");
    assert_eq!(without(&daemon), "");
    let mut guest = daemon.mount("goes").expect("it is there again");
    guest.lookup(1, "file").expect("its file");
    drop(guest);
    daemon.stop_well();
}

/// As without a namespace of users: who copies owners too goes on.
fn gives_nothing_away(daemon: &Daemon) {
    let mut guest = daemon.guest();
    let node = guest.lookup(1, "file").expect("a file").nodeid;
    let give = SetattrIn { valid: fattr::UID, uid: 0, ..Default::default() };
    let given = guest.call(Opcode::Setattr, node, give.as_bytes());
    assert_eq!(given, Err(libc::EPERM as u32));
}

/// By a directory of the host's mounts the worker could climb out of its root.
fn no_directory_is_from_outside(daemon: &Daemon) {
    let mounts = proc_of_worker(daemon, "mountinfo");
    let mounts: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').next()).collect();
    let worker = format!("/proc/{}", daemon.worker_pid());
    let mut directories = 0;
    for fd in std::fs::read_dir(format!("{worker}/fd")).expect("fds").flatten() {
        if !std::fs::metadata(fd.path()).is_ok_and(|meta| meta.is_dir()) {
            continue;
        }
        let info = format!("{worker}/fdinfo/{}", fd.file_name().display());
        // Closed meanwhile, or the descriptor of a call.
        let Ok(info) = std::fs::read_to_string(info) else { continue };
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:\t")).expect("mnt_id");
        // Of its root, or of a mount that is nowhere, where the way up ends.
        let ino = |path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
        let leads_up = ino(fd.path()) != ino(fd.path().join(".."));
        let there = std::fs::read_link(fd.path());
        assert!(mounts.contains(&mount) || !leads_up, "{there:?}");
        directories += 1;
    }
    assert!(directories > 0, "the share");
}

#[test]
fn what_is_mounted_below_its_share_is_hidden() {
    if !is_root() {
        return;
    }
    let script = "mkdir \"$1/below\"; mount -t tmpfs none \"$1/below\"";
    let daemon = daemon_of_user("uring", script, &[]);
    serves(&daemon);
    let mut guest = daemon.guest();
    assert_eq!(guest.lookup(1, "below").map(|entry| entry.nodeid), Err(libc::EXDEV as u32));
    drop(guest);
    daemon.stop_well();
}

#[test]
fn shares_come_and_go_while_it_serves() {
    if !is_root() {
        return;
    }
    let dir = dirs_of_user(["one", "two"]);
    std::fs::write(dir.path().join("two/file"), "of two").expect("write");
    let share = |name: &str| table(name, &dir.path().join(name));
    let (file, config) = config_in(dir.path(), "");
    for (sandbox, expected) in [("namespace", true), ("landlock", false)] {
        std::fs::write(&file, share("one")).expect("write");
        let sandbox = format!("--sandbox={sandbox}");
        let daemon = daemon_of_user("uring", "", &[&config, &sandbox]);
        serves(&daemon);
        let mut one = daemon.mount("one").expect("a session");
        one.create(&format!("{expected}")).expect("create");
        assert!(daemon.mount("two").is_err());
        std::fs::write(&file, share("two")).expect("write");
        let said = daemon.reload();
        assert_eq!(said.contains("the worker is without share two"), !expected, "{said}");
        // It is a worker's directories that landlock settles at its start: the next one has it.
        let two = daemon.mount("two");
        assert_eq!(two.is_ok(), expected, "{sandbox}");
        if let Ok(mut two) = two {
            let node = two.lookup(1, "file").expect("its file").nodeid;
            let fh = two.open(node, libc::O_RDONLY).expect("open");
            assert_eq!(two.read(node, fh, 0, 10), Ok(b"of two".to_vec()));
        }
        assert!(daemon.mount("one").is_err());
        drop(one);
        daemon.stop_well();
    }
}

/// Which directories landlock lets a worker open, and write to, is settled when it begins: what was
/// refused once is refused again, and the next worker has it.
#[test]
fn landlock_keeps_a_worker_to_what_it_began_with() {
    if !is_root() {
        return;
    }
    let dir = dirs_of_user(["looked-at", "later"]);
    let share = |name: &str, more: &str| table(name, &dir.path().join(name)) + more + "\n";
    let (file, config) = config_in(dir.path(), &share("looked-at", "ro = true"));
    let daemon = daemon_of_user("uring", "", &[&config, "--sandbox=landlock"]);
    let waits = |text: String, expected: &[&str]| {
        std::fs::write(&file, text).expect("write");
        let said = daemon.reload();
        let has = |name: &&str| said.contains(&format!("without share {name} (by --sandbox"));
        let waiting: Vec<_> = ["looked-at", "later"].into_iter().filter(has).collect();
        assert_eq!(waiting, expected, "{said}");
    };
    waits(share("looked-at", "ro = true\nnosuid = true"), &[]);
    let both = share("looked-at", "") + &share("later", "");
    waits(both.clone(), &["looked-at", "later"]);
    waits(both, &["looked-at", "later"]);
    assert!(without(&daemon).contains("read-only stays so"), "{}", without(&daemon));
    waits(
        share("looked-at", "nosuid = true") + &share("later", "nosuid = true"),
        &["looked-at", "later"],
    );
    let mut guest = daemon.mount("looked-at").expect("as it was");
    assert_eq!(guest.create("file").err(), Some(libc::EROFS as u32));
    drop(guest);
    assert!(daemon.mount("later").is_err());
    daemon.kill_worker();
    assert_eq!(without(&daemon), "");
    daemon.mount("looked-at").expect("of the next worker").create("file").expect("create");
    daemon.mount("later").expect("of the next worker").create("file").expect("create");
    daemon.stop_well();
}

/// Another daemon, which knows nothing of the session and may open no handle.
#[test]
fn files_are_found_again_by_their_names() {
    if !is_root() {
        return;
    }
    let features = feature::PAYLOAD_CRC | feature::RESTORE;
    let first = daemon_of_user("uring", "", &[]);
    let mut guest =
        Guest::greet(first.connect(), &Hello { features, ..hello("share") }).expect("welcome");
    guest.recipes = Some(Default::default());
    for file in ["stays", "moves", "goes"] {
        let (node, fh) = guest.create(file).expect("create");
        guest.write(node, fh, 0, file.as_bytes()).expect("write");
    }
    let nodes: Vec<u64> =
        ["stays", "moves", "goes"].map(|file| guest.lookup(1, file).expect("a file").nodeid).into();
    let recipes = guest.recipes.as_ref().expect("recipes");
    let nodes: Vec<_> = nodes.iter().map(|node| (*node, recipes[node].clone())).collect();
    // While no daemon runs.
    let share = first.share();
    std::fs::rename(share.join("moves"), share.join("moved")).expect("rename");
    std::fs::remove_file(share.join("goes")).expect("rm");
    std::fs::write(share.join("goes"), "another").expect("write");
    drop(guest);
    let option = format!("--share=old={}", share.display());
    let second = daemon_of_user("uring", "", &[&option]);
    let handles: Vec<_> = nodes.iter().map(|(id, _)| (1000 + id, *id, libc::O_RDWR)).collect();
    let mut guest = rebuilt(&second, &hello("old"), &nodes, &handles);
    let read = |guest: &mut Guest, n: usize| guest.read(nodes[n].0, handles[n].0, 0, 10);
    assert_eq!(read(&mut guest, 0), Ok(b"stays".to_vec()));
    // Root's daemon finds this one by its handle.
    assert!(read(&mut guest, 1).is_err());
    let gone = guest.call(Opcode::Getattr, nodes[1].0, &[0; 16]);
    assert_eq!(gone, Err(libc::ESTALE as u32));
    // Another file never takes the place of the one that is gone.
    let gone = guest.call(Opcode::Getattr, nodes[2].0, &[0; 16]);
    assert_eq!(gone, Err(libc::ESTALE as u32));
    drop(guest);
    second.stop_well();
    first.stop_well();
}

#[test]
fn it_serves_more_files_than_it_may_open() {
    if !is_root() {
        return;
    }
    const FILES: usize = 600;
    for engine in ["uring", "threads"] {
        let daemon = daemon_of_user(engine, "ulimit -n 256", &[]);
        for n in 0..FILES {
            std::fs::write(daemon.share().join(format!("f{n}")), n.to_string()).expect("write");
        }
        let mut guest = daemon.guest();
        let nodes: Vec<u64> =
            (0..FILES).map(|n| guest.lookup(1, &format!("f{n}")).expect("lookup").nodeid).collect();
        assert!(daemon.counters()["nodes_with_fd"] < 256);
        for (n, &node) in nodes.iter().enumerate() {
            let fh = guest.open(node, libc::O_RDONLY).expect("found again by its name");
            assert_eq!(guest.read(node, fh, 0, 10), Ok(n.to_string().into_bytes()));
            guest.release(node, fh).expect("release");
        }
        drop(guest);
        daemon.stop_well();
    }
}

#[test]
fn a_container_that_hides_parts_of_its_proc_lends_it() {
    if !is_root() {
        return;
    }
    // Another /proc that is whole, as in a chroot on this machine, would do for the kernel.
    let script = r#"
        while read -r _ at kind _; do
            case $kind:$at in proc:/proc) ;; proc:*) umount -l "$at" ;; esac
        done < /proc/mounts
        mount -t tmpfs none /proc/fs"#;
    let daemon = daemon_of_user("uring", script, &[]);
    serves(&daemon);
    assert!(proc_of_worker(&daemon, "mountinfo").contains(" /proc/fs "), "it is the container's");
    daemon.stop_well();
}

/// What lends ids to the user, in mounts of whoever does it.
fn lends_ids(dir: &Path) -> Option<String> {
    if Command::new("newuidmap").output().is_err() {
        eprintln!("SKIPPED, NOT TESTED: subordinate ids: there is no newuidmap");
        return None;
    }
    let mut script = String::new();
    for (of, line) in [
        ("passwd", format!("somebody:x:{UID}:{GID}::/:/bin/sh\n")),
        ("subuid", "somebody:500000:1000\n".to_owned()),
        ("subgid", "somebody:600000:1000\n".to_owned()),
    ] {
        let file = dir.join(of);
        std::fs::write(&file, line).expect("write");
        let file = file.display();
        script += &format!("[ -e /etc/{of} ] || touch /etc/{of}; mount --bind {file} /etc/{of}\n");
    }
    Some(script)
}

/// In the worker with lent ids the user is in none of its other groups: what is reached by them is
/// refused at once, and not when the next worker needs it.
#[test]
fn with_lent_ids_other_groups_do_not_count() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let Some(script) = lends_ids(dir.path()) else { return };
    let (top, below) = (dir.path().join("top"), dir.path().join("top/below"));
    let mode = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    std::fs::set_permissions(dir.path(), mode(0o755)).expect("chmod");
    std::fs::create_dir_all(&below).expect("mkdir");
    std::fs::set_permissions(&top, mode(0o770)).expect("chmod");
    chown(&top, None, Some(OTHER_GID)).expect("chown");
    chown(&below, Some(UID), Some(GID)).expect("chown");
    let script = format!(
        "{script}exec setpriv --reuid={UID} --regid={GID} \\
        --groups={OTHER_GID} \"$@\""
    );
    let user = ["unshare", "-m", "sh", "-ec", &script, "sh"];
    let says = |options: &[&str], share: &Path| {
        let said = says_with(&user, share, &[options, &["--subordinate-ids"]].concat());
        assert!(said.contains("other groups") && said.contains("do not count"), "{said}");
        said
    };
    assert!(says(&[], &below).contains("cannot have share x"));
    let own = dir.path().join("own");
    std::fs::create_dir(&own).expect("mkdir");
    chown(&own, Some(UID), Some(GID)).expect("chown");
    let state = format!("--state-dir={}", top.join("state").display());
    let said = says(&[&state, "--grace=60"], &own);
    assert!(said.contains("cannot have state-dir"), "{said}");

    let script = lends_ids(dir.path()).expect("as before");
    let (config, option) = config_in(dir.path(), "");
    let daemon = daemon_of_user("uring", &script, &["--subordinate-ids", &option]);
    std::fs::write(&config, table("more", &below)).expect("write");
    daemon.reload();
    let said = without(&daemon);
    assert!(said.starts_with("share more (") && said.contains("do not count"), "{said}");
    serves(&daemon);
    daemon.stop_well();
}

/// With what the host lends to a user guests have users of their own.
#[test]
fn guests_users_are_those_that_are_lent_to_it() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let Some(script) = lends_ids(dir.path()) else { return };
    let (config, option) = config_in(dir.path(), "");
    let daemon = daemon_of_user("uring", &script, &["--subordinate-ids", &option]);
    let uid_of = |file: &str| {
        let meta = std::fs::metadata(daemon.share().join(file)).expect("a file");
        (meta.uid(), meta.gid())
    };
    let mut guest = daemon.guest();
    let (node, _) = guest.create("of-root").expect("create");
    assert_eq!(uid_of("of-root"), (UID, GID), "its root is the daemon's user");
    // The share's directory is that user's: others need its leave, as on any disk.
    let set = SetattrIn { valid: fattr::MODE, mode: 0o777, ..Default::default() };
    guest.call(Opcode::Setattr, 1, set.as_bytes()).expect("chmod");
    guest.uid = 7;
    guest.create("of-seven").expect("create");
    assert_eq!(uid_of("of-seven").0, 500_006);
    guest.uid = 0;
    let give = SetattrIn { valid: fattr::UID, uid: 9, ..Default::default() };
    guest.call(Opcode::Setattr, node, give.as_bytes()).expect("chown");
    assert_eq!(uid_of("of-root").0, 500_008);
    // Nobody beyond those.
    guest.uid = 1001;
    assert!(guest.create("of-nobody").is_err());
    assert!(proc_of_worker(&daemon, "uid_map").contains("500000"));
    // It has had ids that are not its parent's.
    std::fs::write(&config, table("more", &daemon.share())).expect("write");
    daemon.reload();
    let mut more = daemon.mount("more").expect("a new share");
    more.lookup(1, "of-seven").expect("its file");
    drop(more);
    no_directory_is_from_outside(&daemon);
    drop(guest);
    daemon.stop_well();
}

/// `ringfsd` of whoever `before` makes it, that must not start; what it says.
fn says(before: &[&str], share: &Path) -> String {
    says_with(before, share, &[])
}

fn says_with(before: &[&str], share: &Path, options: &[&str]) -> String {
    let socket = share.join("s");
    let has_state = options.iter().any(|option| option.starts_with("--state-dir"));
    let output = Command::new(before[0])
        .args(&before[1..])
        .arg(env!("CARGO_BIN_EXE_ringfsd"))
        .arg(format!("--share=x={}", share.display()))
        .arg(format!("--listen=unix:{}", socket.display()))
        .arg("--control=none")
        .args(options)
        .args(Some("--state-dir=none").filter(|_| !has_state))
        .stdin(Stdio::null())
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).expect("text")
}

#[test]
fn who_cannot_have_namespaces_is_told_the_cure() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    // A host without user namespaces, for those who are in this one. It is root outside.
    let no_more = "echo 0 > /proc/sys/user/max_user_namespaces; \
        exec setpriv --ambient-caps=-all --inh-caps=-all \"$@\"";
    let own = ["unshare", "-U", "--map-user=1000", "--map-group=1000", "--keep-caps"];
    let own = [&own[..], &["sh", "-ec", no_more, "sh"]].concat();
    let said = says(&own, dir.path());
    for word in ["sysctl user.max_user_namespaces=15000", "--sandbox=landlock"] {
        assert!(said.contains(word), "{word} in {said}");
    }
    let own = format!("--reuid={UID}");
    chown(dir.path(), Some(UID), Some(GID)).expect("chown");
    let own = ["setpriv", &own, "--clear-groups", "--regid=4712"];
    let said = says_with(&own, dir.path(), &["--subordinate-ids"]);
    assert!(said.contains("usermod --add-subuids") && said.contains("/etc/subuid"), "{said}");
    let said = says(&["setpriv", "--bounding-set=-sys_admin"], dir.path());
    for word in ["CAP_SYS_ADMIN", "--sandbox=landlock"] {
        assert!(said.contains(word), "{word} in {said}");
    }
}

/// What a container has whose root has neither CAP_SYS_ADMIN nor namespaces.
#[test]
fn root_without_rights_is_shut_in_by_landlock() {
    if !is_root() {
        return;
    }
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start_as(engine, |program, share| {
            chown(share, Some(UID), None).expect("chown");
            let mut command = Command::new("setpriv");
            command.args(["--bounding-set=-sys_admin,-dac_read_search,-sys_resource", program]);
            command.args(["--sandbox=landlock", "--state-dir=none"]);
            command
        });
        let mut guest = daemon.guest();
        guest.uid = UID;
        let (node, fh) = guest.create("file").expect("create");
        assert_eq!(guest.write(node, fh, 0, b"data"), Ok(4));
        let made = std::fs::metadata(daemon.share().join("file")).expect("made");
        assert_eq!(made.uid(), UID, "it serves all users");
        let status = proc_of_worker(&daemon, "status");
        let line = |name| status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        assert_eq!((line("NoNewPrivs:").trim(), line("Seccomp:").trim()), ("1", "2"));
        assert_eq!(daemon.status().sessions.len(), 1);
        drop(guest);
        daemon.stop_well();
    }
}

/// Where all shares are read-only by landlock there are no system calls that change attributes: its
/// state directory takes none.
#[test]
fn who_has_read_only_shares_alone_serves_them() {
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start_with_file(|dir| {
            std::fs::write(dir.join("share/file"), "of the host").expect("write");
            format!(
                "engine = {engine:?}\nsandbox = \"landlock\"\ngrace = 60\nstate-dir = {:?}\n\
                 [[listen]]\naddress = \"unix:{}\"\n[share.share]\npath = {:?}\nro = true\n",
                dir.join("state"),
                dir.join("s").display(),
                dir.join("share")
            )
        });
        let mut guest = daemon.guest();
        let node = guest.lookup(1, "file").expect("a file").nodeid;
        let fh = guest.open(node, libc::O_RDONLY).expect("open");
        assert_eq!(guest.read(node, fh, 0, 20), Ok(b"of the host".to_vec()));
        guest.release(node, fh).expect("release");
        let read_only = Some(libc::EROFS as u32);
        assert_eq!(guest.create("new").err(), read_only);
        let set = SetattrIn { valid: fattr::MODE, mode: 0o777, ..Default::default() };
        assert_eq!(guest.call(Opcode::Setattr, node, set.as_bytes()).err(), read_only);
        assert_eq!(std::fs::read_dir(daemon.path("state")).expect("the state").count(), 1);
        drop(guest);
        daemon.stop_well();
    }
}
