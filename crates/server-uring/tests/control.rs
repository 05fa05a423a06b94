//! The control socket: what a daemon tells, and reloads while guests go on.

mod common;

use common::*;
use ringfs_server::control;
use ringfs_wire::hello::Reason;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

fn status(daemon: &Daemon) -> ringfs_server::status::Status {
    daemon.status()
}

#[test]
fn it_tells_who_has_mounted_what() {
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start(engine);
        let mode = std::fs::metadata(daemon.path("c")).expect("the socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut guest = daemon.guest();
        guest.create("file").expect("create");
        let told = status(&daemon);
        assert_eq!(told.pid, daemon.pid());
        let shares: Vec<_> =
            told.shares.iter().map(|s| (&*s.name, s.sessions, s.read_only)).collect();
        assert_eq!(shares, [("share", 1, false), ("ro", 0, true)]);
        let session = &told.sessions[0];
        assert_eq!((session.share.as_str(), session.lanes, session.cut_s), ("share", 1, None));
        assert_eq!((session.nodes, session.handles, session.in_flight), (2, 1, 0));
        assert!(session.requests >= 1 && session.peer.contains("pid"), "{session:?}");
        assert_eq!(told.config.listeners, [format!("unix:{}", daemon.path("s").display())]);
        let table = String::from_utf8(daemon.command(&["status"]).stdout).expect("text");
        let peer = format!("pid {}", std::process::id());
        let row = table.lines().find(|line| line.ends_with(&peer)).expect("the session's row");
        assert!(row.contains("share") && row.contains("connected"), "{table}");
        let screen = daemon.command(&["top", "--once", "--interval=0.1"]);
        assert!(screen.status.success(), "{screen:?}");
        let screen = String::from_utf8(screen.stdout).expect("text");
        assert!(screen.contains("1 sessions, 0 busy") && !screen.contains('\x1b'), "{screen}");
        assert!(screen.lines().any(|line| line.starts_with("share ")), "{screen}");
        drop(guest);
        until("the end of the session", || status(&daemon).sessions.is_empty().then_some(()));
        daemon.stop_well();
    }
}

#[test]
fn an_orchestrator_has_guests_join_anew_and_waits_for_them() {
    for engine in ["uring", "threads"] {
        let daemon = Daemon::start_with_grace(engine, 60);
        let code = |words: &[&str]| daemon.command(words).status.code();
        assert_eq!(code(&["reconnect"]), Some(0), "nobody is there");
        assert_eq!(code(&["wait", "--resumed", "7"]), Some(1));
        let mut guest = daemon.guest();
        guest.create("file").expect("create");
        let session = status(&daemon).sessions[0].clone();
        let id = session.id.to_string();
        assert!(session.is_connected() && session.connections == 1);
        assert_eq!(code(&["wait", "--resumed", &id]), Some(0));
        assert_eq!(code(&["reconnect", "--share", "ro"]), Some(1));
        let told = daemon.command(&["reconnect", &id]);
        assert!(told.status.success(), "{told:?}");
        assert!(String::from_utf8_lossy(&told.stdout).contains("1 connections dropped"));
        // This guest comes when it is told.
        assert_eq!(code(&["wait", "--resumed", "--timeout", "0", "--share", "share"]), Some(4));
        until("the cut", || status(&daemon).sessions[0].cut_s);
        assert_eq!(guest.ended_for(), None, "no GOODBYE: it is to come again");
        guest.resume(daemon.connect(), &hello("share")).expect("resumed");
        assert_eq!(code(&["wait", "--resumed"]), Some(0));
        guest.create("another").expect("it goes on");
        drop(guest);
        daemon.stop_well();
    }
}

#[test]
fn whoever_asks_badly_is_told_and_holds_nobody_up() {
    let daemon = Daemon::start("uring");
    let ask = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(daemon.path("c")).expect("the control socket");
        stream.set_read_timeout(Some(LIMIT)).expect("timeout");
        let _ = stream.write_all(bytes);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    };
    for bad in ["x\n", "{}\n", "{\"ask\":\"money\"}\n", "{\"ask\":\"status\",\"x\":1}\n"] {
        assert!(ask(bad.as_bytes()).starts_with("{\"error\":"), "{bad}");
    }
    assert_eq!(ask(&[b'x'; 5000]), "");
    // More than may wait, none of whom says a word.
    let silent: Vec<_> =
        (0..20).map(|_| UnixStream::connect(daemon.path("c")).expect("connect")).collect();
    let mut guest = daemon.guest();
    guest.create("file").expect("guests are served meanwhile");
    drop(silent);
    // Once those have been seen to be gone; until then there may be no place to wait.
    let told = until("a status", || control::ask_status(&daemon.path("c")).ok());
    assert_eq!(told.sessions.len(), 1);
    drop(guest);
    daemon.stop_well();
}

fn file(dir: &Path, shares: &[&str], listeners: &[&str], top: &str) -> String {
    let mut text = format!("state-dir = \"none\"\n{top}\n");
    for name in listeners {
        text += &format!("[[listen]]\naddress = \"unix:{}\"\n", dir.join(name).display());
    }
    for name in shares {
        text += &format!("[share.{name}]\npath = \"{}\"\n", dir.join("share").display());
    }
    text
}

#[test]
fn a_reload_changes_shares_and_listeners_under_running_sessions() {
    let daemon = Daemon::start_with_file(|dir| file(dir, &["a", "b"], &["s", "t"], "grace = 5"));
    let dir = daemon.path("");
    let reload = |text: String| {
        std::fs::write(daemon.path("ringfsd.toml"), text).expect("write");
        let output = daemon.command(&["reload"]);
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let mut a = mount(&daemon.path("t"), "a").expect("a session");
    let (node, fh) = a.create("file").expect("create");

    // Wrong files change nothing.
    for (bad, why) in [
        (file(&dir, &["a"], &["s"], "spinn = 1"), "did you mean `spin`?"),
        (file(&dir, &["a"], &["s", "none/s"], ""), "its directory does not exist"),
        (file(&dir, &["c"], &[], ""), "nowhere to listen"),
    ] {
        let (code, _, said) = reload(bad);
        assert!(code == Some(2) && said.contains(why), "{code:?} {said}");
        let told = status(&daemon);
        assert!(told.config.errors.iter().any(|error| error.contains(why)), "{told:?}");
        assert!(told.to_text(None).contains("THE LAST RELOAD FAILED"));
        assert_eq!((told.shares.len(), told.config.listeners.len()), (2, 2));
        drop(mount(&daemon.path("s"), "b").expect("b is shared still"));
    }

    // A share and a listener go, others come, and what cannot change says so.
    let (code, said, _) = reload(file(&dir, &["b", "c"], &["s", "u"], "grace = 6\nspin = 3"));
    assert_eq!(code, Some(0), "{said}");
    for line in ["new share c", "removed share a", "not before the next start: spin, grace"] {
        assert!(said.lines().any(|found| found == line), "{line} in {said}");
    }
    let told = status(&daemon);
    assert_eq!((told.config.errors.len(), told.config.reloads), (0, 4));
    assert!(!daemon.path("t").exists() && daemon.path("u").exists());
    drop(mount(&daemon.path("u"), "c").expect("c is shared"));
    assert_eq!(mount(&daemon.path("u"), "a").err(), Some(Reason::UnknownShare));
    // Who has it mounted goes on.
    assert_eq!(a.write(node, fh, 0, b"still here"), Ok(10));
    let gone = told.shares.iter().find(|share| share.name == "a").expect("a");
    assert!(gone.removed && gone.sessions == 1, "{gone:?}");

    // Unless that is not wanted.
    let mut b = mount(&daemon.path("s"), "b").expect("a session");
    let text = file(&dir, &["c"], &["s"], "grace = 5\ndrop-removed = true");
    let (code, said, _) = reload(text);
    assert_eq!((code, said.contains("removed share b")), (Some(0), true), "{said}");
    assert_eq!(b.ended_for(), Some(Reason::UnknownShare));
    assert_eq!(a.read(node, fh, 0, 100), Ok(b"still here".to_vec()));
    drop((a, b));
    daemon.stop_well();
}

#[test]
fn a_share_that_is_served_otherwise_is_so_for_those_who_come() {
    let text = |dir: &Path| file(dir, &["a"], &["s"], "grace = 0");
    let daemon = Daemon::start_with_file(text);
    let mut old = mount(&daemon.path("s"), "a").expect("a session");
    std::fs::write(daemon.path("ringfsd.toml"), text(&daemon.path("")) + "ro = true\n").expect("w");
    assert_eq!(daemon.reload(), "changed share a\n");
    let mut new = mount(&daemon.path("s"), "a").expect("a session");
    assert_eq!(new.create("new").err(), Some(libc::EROFS as u32));
    assert!(old.create("old").is_ok());
    drop((old, new));
    daemon.stop_well();
}
