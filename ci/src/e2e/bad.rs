//! Bad input at both ends: a clear error or a closed session, and everybody else keeps working.
//!
//! Bytes for the daemon are made from a HELLO that the real client sent to a socket of ours, so
//! that nothing of the wire format stands here.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use super::{Case, Rig, signals, versions};
use crate::guard::{self, Guard, Undo};
use crate::mounts;
use crate::proc::{Cmd, Process};
use crate::rig::{self, Daemon, Mount, SETTLE};
use crate::sandbox::wait_unmounted;

pub const CASES: &[Case] = &[
    ("wrong_address_or_share", wrong_address),
    ("wrong_mountpoint", wrong_mountpoint),
    ("no_dev_fuse_or_permission", no_device),
    ("daemon_refuses_wrong_arguments", daemon_arguments),
    ("garbage_on_the_socket", garbage),
    ("broken_hello", broken_hello),
    ("version_mismatch", versions::mismatch),
    ("half_open_connections", half_open),
    ("a_guest_that_never_reads", never_reads),
    ("a_daemon_that_talks_nonsense", false_daemon),
    ("a_stopped_guest", stopped_guest),
    ("a_killed_guest", killed_guest),
    ("a_killed_daemon", killed_daemon),
    ("a_share_that_hangs", hanging_share),
    ("signals_unmount", unmount_signals),
    ("signals_while_the_daemon_is_stopped", signals::while_the_daemon_is_stopped),
];

/// A refusal must come within this, whatever is wrong.
const REFUSAL_LIMIT: Duration = Duration::from_secs(40);

/// Runs a command that must fail by itself, with a message that holds one of `words`.
pub fn refused(cmd: Cmd, words: &[&str]) -> Result<()> {
    let line = cmd.line();
    let output = cmd.limit(REFUSAL_LIMIT).output()?;
    ensure!(!output.status.success(), "`{line}` succeeded");
    ensure!(output.status.code().is_some(), "`{line}` was killed: {}", output.status);
    let text = output.text.to_lowercase();
    ensure!(!text.contains("panicked"), "`{line}` panicked:\n{text}");
    let found = words.is_empty() || words.iter().any(|word| text.contains(word));
    ensure!(found && !text.trim().is_empty(), "`{line}` said none of {words:?}:\n{text}");
    Ok(())
}

/// One more guest mounts, works and goes.
pub fn others_work(rig: &Rig, name: &str) -> Result<()> {
    let mount = rig.mount(name, "")?;
    let data = name.repeat(1000);
    fs::write(mount.dir.join(name), &data)?;
    ensure!(fs::read(mount.dir.join(name))? == data.as_bytes(), "{name} reads something else");
    mount.umount()
}

fn wrong_address(rig: &Rig) -> Result<()> {
    let dir = rig.sandbox.make_dir("mnt")?;
    let socket = rig.daemon.socket.display().to_string();
    let no_socket = format!("d@unix:{}", rig.sandbox.path("no.sock").display());
    let sources = [
        (no_socket, &["no.sock", "connect", "no such file"][..]),
        (format!("unknown@unix:{socket}"), &["unknown", "share"]),
        (format!("d/no/such@unix:{socket}"), &["no/such", "no such", "not found", "share"]),
        (format!("d/../..@unix:{socket}"), &[]),
        (format!("@unix:{socket}"), &[]),
        (format!("d@tcp:{socket}"), &[]),
        ("d@unix:".into(), &[]),
        ("d@vsock:x:y".into(), &[]),
        ("d".into(), &[]),
        (format!("d@unix:/{}", "x".repeat(300)), &[]),
        (format!("{}@unix:{socket}", "n".repeat(5000)), &[]),
    ];
    for (source, words) in sources {
        let mount = Cmd::new(&rig.bins.ringfs).arg("mount").arg(&source).arg(&dir);
        refused(mount, words)?;
        ensure!(mounts::at(&dir)?.is_empty(), "{source} left a mount");
    }
    let option = rig.daemon.mount_cmd("d", &dir, "no_such_option=1");
    refused(option, &["no_such_option"])?;
    refused(rig.daemon.mount_cmd("d", &dir, "lanes=0"), &[])?;
    refused(rig.daemon.mount_cmd("d", &dir, "lanes=100000000000"), &[])?;
    ensure!(mounts::at(&dir)?.is_empty(), "a refused option left a mount");
    others_work(rig, "others")
}

fn wrong_mountpoint(rig: &Rig) -> Result<()> {
    let file = rig.sandbox.path("file");
    fs::write(&file, "")?;
    refused(rig.daemon.mount_cmd("d", &rig.sandbox.path("missing"), ""), &["missing"])?;
    refused(rig.daemon.mount_cmd("d", &file, ""), &["file", "directory"])?;
    let mount = rig.mount("mnt", "")?;
    refused(rig.daemon.mount_cmd("d", &mount.dir, ""), &["busy", "already", "mounted"])?;
    ensure!(mounts::at(&mount.dir)?.len() == 1, "mounted twice");
    mount.umount()?;
    let plain = rig.sandbox.make_dir("plain")?;
    refused(Cmd::new(&rig.bins.ringfs).arg("umount").arg(&plain), &["not", "no "])?;
    others_work(rig, "others")
}

fn no_device(rig: &Rig) -> Result<()> {
    let dir = rig.sandbox.make_dir("mnt")?;
    let source = format!("d@unix:{}", rig.daemon.socket.display());
    // A /dev without fuse, in a mount namespace of its own.
    let hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec \"$@\"";
    let hidden = Cmd::new("unshare").args(["--mount", "sh", "-c", hide, "sh"]);
    let hidden = hidden.arg(&rig.bins.ringfs).arg("mount").arg(&source).arg(&dir);
    refused(hidden, &["/dev/fuse"])?;
    ensure!(mounts::at(&dir)?.is_empty());
    // The binary may stand where nobody may look: give it a place where they may.
    let binary = rig.sandbox.path("ringfs");
    fs::copy(&rig.bins.ringfs, &binary)?;
    let nobody = Cmd::new("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    refused(nobody.arg(&binary).arg("mount").arg(&source).arg(&dir), &[])?;
    ensure!(mounts::at(&dir)?.is_empty());
    others_work(rig, "others")
}

fn daemon_arguments(rig: &Rig) -> Result<()> {
    let daemon = || Cmd::new(&rig.bins.ringfsd);
    let listen = format!("unix:{}", rig.sandbox.path("new.sock").display());
    let good = rig::share("d", &rig.backing);
    let with = |share: &str| daemon().args(["--share", share, "--listen", &listen]);
    refused(with("d=/no/such/directory"), &["/no/such/directory"])?;
    refused(with("d"), &[])?;
    refused(with(&format!("a/b={}", rig.backing.display())), &[])?;
    refused(with(&good).args(["--share", &good]), &[])?;
    refused(with(&good).args(["--cpus", "9999"]), &[])?;
    let taken = format!("unix:{}", rig.daemon.socket.display());
    refused(daemon().args(["--share", &good, "--listen", &taken]), &["use", "busy", "another"])?;
    refused(daemon().args(["--share", &good, "--listen", "unix:/no/such/dir/s"]), &["/no/such"])?;
    others_work(rig, "others")
}

/// Bytes that look random and are the same in every run.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Sends `bytes` to the daemon; it may close at any point, which is its right.
pub fn send(rig: &Rig, bytes: &[u8]) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(&rig.daemon.socket)?;
    stream.set_write_timeout(Some(Duration::from_secs(2)))?;
    match stream.write_all(bytes) {
        Ok(()) => {}
        Err(error) => match error.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::WouldBlock => {}
            _ => return Err(error).context("send to the daemon"),
        },
    }
    Ok(stream)
}

/// Fails unless the daemon closes `stream` in time; what it sends before is not looked at.
fn assert_closed(stream: &mut UnixStream, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "the daemon keeps the connection after {limit:?}");
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                bail!("the daemon keeps the connection after {limit:?}")
            }
            Err(error) => return Err(error).context("read from the daemon"),
        }
    }
}

fn garbage(rig: &Rig) -> Result<()> {
    let busy = rig.mount("busy", "")?;
    for seed in 0..64 {
        let len = [1, 7, 16, 64, 4096, 100_000, 3_000_000][seed % 7];
        let bytes = if seed % 8 == 7 { vec![seed as u8; len] } else { noise(seed as u64, len) };
        let mut stream = send(rig, &bytes)?;
        // Whoever has sent less than a header may still be about to send the rest.
        if len >= 64 {
            assert_closed(&mut stream, REFUSAL_LIMIT)?;
        }
        fs::write(busy.dir.join("alive"), [seed as u8])?;
    }
    busy.umount()?;
    others_work(rig, "others")
}

/// The bytes with which the real client opens a connection.
pub fn client_hello(rig: &Rig) -> Result<Vec<u8>> {
    let path = rig.sandbox.path("own.sock");
    let listener = UnixListener::bind(&path)?;
    let dir = rig.sandbox.make_dir("hello")?;
    let source = format!("d@unix:{}", path.display());
    let _guard = Guard::new(Undo::Mount(dir.clone()));
    let mount = Cmd::new(&rig.bins.ringfs).args(["mount", "-f"]).arg(source).arg(&dir);
    let client = mount.spawn(&rig.sandbox.path("hello.log"))?;
    listener.set_nonblocking(true)?;
    let mut accepted = None;
    guard::poll_until(SETTLE, || {
        accepted = listener.accept().ok();
        Ok(accepted.is_some())
    })?;
    let (mut stream, _) = accepted.context("the client does not connect")?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(SETTLE))?;
    let mut hello = vec![0; 65536];
    let len = stream.read(&mut hello).context("the client says nothing")?;
    hello.truncate(len);
    // First the stream: a client that waits for an answer does not hear a SIGTERM.
    drop(stream);
    drop(client);
    Ok(hello)
}

fn broken_hello(rig: &Rig) -> Result<()> {
    let hello = client_hello(rig)?;
    ensure!(hello.len() >= 32, "a HELLO of {} bytes", hello.len());
    let busy = rig.mount("busy", "")?;
    for at in 0..hello.len() {
        drop(send(rig, &hello[..at])?);
        let mut flipped = hello.clone();
        flipped[at] ^= 0x41;
        // It may be a valid HELLO still, or a prefix of a longer one: what counts is what follows.
        drop(send(rig, &flipped)?);
    }
    for seed in 0..32 {
        let bytes = [hello.clone(), noise(seed, 100_000)].concat();
        assert_closed(&mut send(rig, &bytes)?, REFUSAL_LIMIT)
            .with_context(|| format!("garbage after a HELLO, seed {seed}"))?;
    }
    fs::write(busy.dir.join("alive"), "1")?;
    busy.umount()?;
    others_work(rig, "others")
}

fn half_open(rig: &Rig) -> Result<()> {
    let mut silent = (0..100)
        .map(|_| UnixStream::connect(&rig.daemon.socket).context("connect"))
        .collect::<Result<Vec<_>>>()?;
    others_work(rig, "while-open")?;
    for stream in &mut silent {
        assert_closed(stream, REFUSAL_LIMIT)?;
    }
    others_work(rig, "after")
}

/// Says HELLO and never reads again: bounded in the daemon, and nobody waits for it.
fn never_reads(rig: &Rig) -> Result<()> {
    let hello = client_hello(rig)?;
    let streams = (0..8).map(|_| send(rig, &hello)).collect::<Result<Vec<_>>>()?;
    for n in 0..3 {
        others_work(rig, &format!("others{n}"))?;
    }
    drop(streams);
    Ok(())
}

fn false_daemon(rig: &Rig) -> Result<()> {
    let path = rig.sandbox.path("false.sock");
    let listener = UnixListener::bind(&path)?;
    let answers = [noise(1, 100_000), vec![0; 4096], vec![0xff; 64], Vec::new()];
    let count = answers.len();
    let serve = thread::spawn(move || {
        for (n, answer) in answers.iter().enumerate() {
            let Ok((mut stream, _)) = listener.accept() else { return };
            // The client may well hang up in the middle.
            let _ = stream.write_all(answer);
            if n + 1 == answers.len() {
                // Accepts and says nothing: the client must give up by itself.
                let _ = stream.set_read_timeout(Some(REFUSAL_LIMIT * 2));
                let _ = stream.read_to_end(&mut Vec::new());
            }
        }
    });
    let dir = rig.sandbox.make_dir("mnt")?;
    for _ in 0..count {
        let source = format!("d@unix:{}", path.display());
        refused(Cmd::new(&rig.bins.ringfs).arg("mount").arg(source).arg(&dir), &[])?;
        ensure!(mounts::at(&dir)?.is_empty(), "it left a mount");
    }
    drop(serve);
    others_work(rig, "others")
}

/// A mount whose client runs in the foreground, so that its process is at hand.
fn foreground(
    rig: &Rig,
    daemon: &Daemon,
    name: &str,
) -> Result<(Process, std::path::PathBuf, Guard)> {
    let dir = rig.sandbox.make_dir(name)?;
    let guard = Guard::new(Undo::Mount(dir.clone()));
    let log = rig.sandbox.path(&format!("{name}.log"));
    let client = daemon.mount_cmd("d", &dir, "").arg("-f").spawn(&log)?;
    // It serves before it says so; a signal in between finds a mount that is not ready.
    let is_ready = || Ok(fs::read_to_string(&log)?.contains("is mounted on"));
    let up = guard::poll_until(SETTLE, is_ready)?;
    ensure!(up, "not mounted: {}", crate::proc::tail_of(&log));
    fs::write(dir.join(name), "x")?;
    Ok((client, dir, guard))
}

fn stopped_guest(rig: &Rig) -> Result<()> {
    let (client, dir, guard) = foreground(rig, &rig.daemon, "stopped")?;
    let reading = dir.join("stopped");
    client.signal_all(Signal::STOP)?;
    let waiting = Cmd::new("sh").args(["-c", "echo more >> \"$1\"", "sh"]).arg(&reading);
    let mut waiting = waiting.spawn(&rig.sandbox.path("waiting.log"))?;
    for n in 0..3 {
        others_work(rig, &format!("others{n}"))?;
    }
    client.signal_all(Signal::CONT)?;
    let ended = waiting.wait(SETTLE)?.context("the guest does not go on")?;
    ensure!(ended.success() && fs::read(&reading)? == b"xmore\n", "the guest lost a write");
    umount_foreground(rig, client, &dir, guard)
}

fn umount_foreground(rig: &Rig, mut client: Process, dir: &Path, guard: Guard) -> Result<()> {
    Cmd::new(&rig.bins.ringfs).arg("umount").arg(dir).limit(SETTLE).run()?;
    wait_unmounted(dir, SETTLE)?;
    let status: ExitStatus = client.wait(SETTLE)?.context("the client stays after umount")?;
    ensure!(status.success(), "the client ended with {status}");
    guard.disarm();
    Ok(())
}

/// Nobody tells the daemon that such a guest will not come back: its session stays for the grace
/// time, and no longer.
fn killed_guest(rig: &Rig) -> Result<()> {
    let shares = [rig::share("d", &rig.backing)];
    let daemon = Daemon::start(&rig.sandbox, &rig.bins, "patient", &shares, &["--grace=1"])?;
    let (mut client, dir, guard) = foreground(rig, &daemon, "killed")?;
    // Else the one that is left for an instant unmounts.
    client.signal_all(Signal::STOP)?;
    client.signal_all(Signal::KILL)?;
    client.wait(SETTLE)?.context("it survives SIGKILL")?;
    daemon.counters_at_rest().context("the daemon keeps the session")?;
    // The mount is dead: umount must not touch what is behind it.
    Cmd::new(&rig.bins.ringfs).arg("umount").arg(&dir).limit(SETTLE).run()?;
    wait_unmounted(&dir, SETTLE)?;
    guard.disarm();
    daemon.stop()?;
    others_work(rig, "others")
}

/// While a killed daemon is away the mount waits, and whoever is killed gets out; what waits goes
/// on with the next daemon, which has the session rebuilt.
fn killed_daemon(rig: &Rig) -> Result<()> {
    let shares = [rig::share("d", &rig.backing)];
    let daemon = Daemon::start(&rig.sandbox, &rig.bins, "mortal", &shares, &[])?;
    let mount: Mount = daemon.mount(&rig.sandbox, "d", "mnt", "cache=never")?;
    fs::write(mount.dir.join("f"), "x")?;
    daemon.process().signal(Signal::KILL)?;
    drop(daemon);
    let mut killed = Cmd::new("cat").arg(mount.dir.join("f")).spawn(&rig.sandbox.path("killed"))?;
    let mut waits = Cmd::new("cat").arg(mount.dir.join("f")).spawn(&rig.sandbox.path("waits"))?;
    ensure!(waits.wait(Duration::from_secs(1))?.is_none(), "it does not wait for the daemon");
    killed.signal(Signal::KILL)?;
    killed.wait(REFUSAL_LIMIT)?.context("a killed program waits for a dead daemon")?;
    let daemon = Daemon::start(&rig.sandbox, &rig.bins, "mortal", &shares, &[])?;
    let status = waits.wait(REFUSAL_LIMIT)?.context("it waits for a daemon that is there")?;
    ensure!(status.success(), "it does not go on with the next daemon: {status}");
    ensure!(fs::read(mount.dir.join("f"))? == b"x", "the mount reads something else now");
    mount.umount()?;
    daemon.stop()
}

/// A share on a mount whose own daemon is stopped: whoever wants it waits and gives up, and guests
/// of other shares come in and look at files, also where that wants fds back which its guests have.
fn hanging_share(rig: &Rig) -> Result<()> {
    let below = rig.mount("below", "cache=never")?;
    let good = rig.sandbox.make_dir("good")?;
    for dir in [&rig.backing, &good] {
        (0..HUNG_FILES).try_for_each(|n| fs::write(dir.join(format!("file-{n}")), ""))?;
    }
    let shares = [rig::share("hung", &below.dir), rig::share("d", &good)];
    let few = format!("--nodes-with-fd={}", HUNG_FILES / 4);
    let daemon = Daemon::start(&rig.sandbox, &rig.bins, "upper", &shares, &[&few])?;
    let walked = daemon.mount(&rig.sandbox, "hung", "walked", "")?;
    walk(&walked.dir)?;
    let outcome =
        rig.daemon.process().signal_all(Signal::STOP).and_then(|()| beside_hung(rig, &daemon));
    // Before anything else, also after a failure: threads of the upper daemon wait for it.
    rig.daemon.process().signal_all(Signal::CONT)?;
    outcome?;
    daemon.mount(&rig.sandbox, "hung", "recovered", "")?.umount()?;
    walk(&walked.dir)?;
    walked.umount()?;
    daemon.counters_at_rest()?;
    daemon.stop()?;
    below.umount()
}

const HUNG_FILES: usize = 400;

fn walk(dir: &Path) -> Result<()> {
    let look = |n| fs::symlink_metadata(dir.join(format!("file-{n}"))).map(drop);
    Ok((0..HUNG_FILES).try_for_each(look)?)
}

fn beside_hung(rig: &Rig, daemon: &Daemon) -> Result<()> {
    let dir = rig.sandbox.make_dir("waits")?;
    let waits = daemon.mount_cmd("hung", &dir, "").spawn(&rig.sandbox.path("waits.log"))?;
    for n in 0..3 {
        let mount = daemon.mount(&rig.sandbox, "d", &format!("beside{n}"), "")?;
        fs::write(mount.dir.join("f"), "x")?;
        walk(&mount.dir)?;
        mount.umount()?;
    }
    drop(waits);
    refused(daemon.mount_cmd("hung", &dir, ""), &["did not answer within"])
}

fn unmount_signals(rig: &Rig) -> Result<()> {
    for (name, signal) in [("term", Signal::TERM), ("int", Signal::INT), ("hup", Signal::HUP)] {
        let (mut client, dir, guard) = foreground(rig, &rig.daemon, name)?;
        client.signal(signal)?;
        let status = client.wait(SETTLE)?.with_context(|| format!("{name} does not end it"))?;
        ensure!(status.success(), "after {name} the client ended with {status}");
        wait_unmounted(&dir, SETTLE)?;
        guard.disarm();
    }
    Ok(())
}
