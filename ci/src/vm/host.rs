//! The host's side of a run: the share, the daemon, the echo peer, answers to the guest.
//!
//! vhost-device-vsock connects a guest's port P to the Unix socket `vs_P` in the run's directory.
//! Sockets are named relative to that directory: their paths stay under the limit of sun_path
//! wherever the repository lies.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use super::process::Process;
use super::tools;
use crate::faults::proxy::Proxy;
use crate::faults::schedule::Schedule;

/// The share's name in the guest's commands.
pub const SHARE: &str = "data";
/// The guest's port for the daemon.
pub const PORT: u32 = 5640;
/// The guest's port for the echo peer.
pub const ECHO_PORT: u32 = 5641;
/// The daemon's port inside the guest, on loopback.
pub const LOOP_PORT: u32 = 5642;
/// Sockets of vhost-device-vsock are this name, `_` and the port.
pub const UDS_BASE: &str = "vs";

const LISTEN_LIMIT: Duration = Duration::from_secs(20);
/// A closed connection reaches the daemon through two processes on a busy machine.
const IDLE_LIMIT: Duration = Duration::from_secs(20);
/// How often a state that is waited for is looked at.
const POLL: Duration = Duration::from_millis(50);
/// The daemon's counters, relative to the run's directory.
const CONTROL: &str = "ringfsd.ctl";
/// Where the daemon listens behind the proxy, and keeps its state; relative as well.
const BEHIND: &str = "behind.sock";
const STATE_DIR: &str = "state";
const STATUS_BYTES_MAX: u64 = 1 << 20;
const FILES_FROM_HOST: u32 = 150;

/// What runs on the host while a guest lives.
pub struct Host {
    share: PathBuf,
    daemon: Option<Daemon>,
    /// Between the guest and the daemon, so that connections can be cut.
    proxy: Option<Proxy>,
}

struct Daemon {
    process: Process,
    program: PathBuf,
    arguments: Vec<String>,
    run_dir: PathBuf,
    socket: PathBuf,
    control: PathBuf,
    /// Before any guest came.
    idle: Held,
}

impl Host {
    /// Makes the share and starts the echo peer, and the daemon if `ringfsd` is given.
    pub fn start(run_dir: &Path, ringfsd: Option<&Path>) -> anyhow::Result<Self> {
        let share = run_dir.join("share");
        make_share(&share)?;
        start_echo(&run_dir.join(format!("{UDS_BASE}_{ECHO_PORT}")))?;
        let Some(program) = ringfsd else { return Ok(Self { share, daemon: None, proxy: None }) };
        let daemon = start_daemon(program, run_dir, &share, BEHIND)?;
        let schedule = Schedule { seed: 0, gap_max: 1, calm: true, unchecked: false };
        let log = std::fs::File::create(run_dir.join("proxy.log"))?;
        let socket = run_dir.join(direct_socket());
        let proxy = Proxy::start(&socket, &run_dir.join(BEHIND), schedule, log)?;
        Ok(Self { share, daemon: Some(daemon), proxy: Some(proxy) })
    }

    /// Only the daemon, serving a directory that is there.
    pub fn serve(run_dir: &Path, ringfsd: &Path, share: &Path) -> anyhow::Result<Self> {
        let daemon = Some(start_daemon(ringfsd, run_dir, share, &direct_socket())?);
        Ok(Self { share: share.to_owned(), daemon, proxy: None })
    }

    /// Adds a root file system to the share: busybox, and an init.
    pub fn make_root(&self, busybox: &Path) -> anyhow::Result<()> {
        let root = self.share.join("root");
        for dir in ["bin", "dev", "etc", "proc", "run", "sbin", "sys", "tmp"] {
            std::fs::create_dir_all(root.join(dir))?;
        }
        std::fs::copy(busybox, root.join("bin/busybox"))?;
        for applet in
            ["sh", "cat", "cut", "grep", "mkdir", "readlink", "sleep", "timeout", "tail", "tr"]
        {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))?;
        }
        let init = root.join("sbin/init");
        std::fs::write(&init, include_bytes!("../../guest/root-init"))?;
        std::fs::set_permissions(&init, std::fs::Permissions::from_mode(0o755))?;
        std::fs::write(root.join("etc/hello"), "the host's root\n").map_err(Into::into)
    }

    /// Answers one request of the guest: `ok ...` or `failed ...`.
    pub fn answer(&mut self, request: &str) -> String {
        let words: Vec<&str> = request.split_whitespace().collect();
        let result = match words.as_slice() {
            ["checksum", name, expected] => self.checksum(name, expected),
            ["absent", name] => self.absent(name),
            ["daemon-idle"] => self.daemon_idle(),
            ["kill-daemon"] => self.kill_daemon(),
            ["cut"] => self.cut(),
            ["silence"] => self.silence(),
            _ => Err(anyhow::anyhow!("the host knows no request {request:?}")),
        };
        match result {
            Ok(said) => format!("ok {said}"),
            Err(error) => format!("failed {}", format!("{error:#}").replace('\n', " | ")),
        }
    }

    /// What is wrong on the host's side, for the output of a run that failed.
    pub fn check_running(&mut self) -> anyhow::Result<()> {
        self.daemon.as_mut().map_or(Ok(()), |daemon| daemon.process.check_running())
    }

    /// The end of the daemon's log.
    pub fn daemon_log(&self) -> Option<String> {
        self.daemon.as_ref().map(|daemon| daemon.process.log_tail(12))
    }

    fn checksum(&self, name: &str, expected: &str) -> anyhow::Result<String> {
        let text = tools::output(Command::new("sha256sum").arg(self.share.join(name)))?;
        let sum = text.split_whitespace().next().unwrap_or_default();
        ensure!(sum == expected, "{name} has sha256 {sum} on the host");
        Ok(format!("{name} equal"))
    }

    fn absent(&self, name: &str) -> anyhow::Result<String> {
        let path = self.share.join(name);
        ensure!(path.symlink_metadata().is_err(), "{name} is still there on the host");
        Ok(format!("{name} is gone"))
    }

    /// Without a warning; another one takes its place.
    fn kill_daemon(&mut self) -> anyhow::Result<String> {
        let Some(daemon) = self.daemon.as_mut() else { bail!("no daemon runs") };
        daemon.process.kill()?;
        daemon.process =
            Process::start("ringfsd", &daemon.program, &daemon.arguments, &daemon.run_dir, false)?;
        let end = Instant::now() + LISTEN_LIMIT;
        while UnixStream::connect(&daemon.socket).is_err() {
            daemon.process.check_running()?;
            ensure!(Instant::now() < end, "the next daemon does not listen");
            std::thread::sleep(POLL);
        }
        Ok("killed and started again".to_owned())
    }

    fn cut(&self) -> anyhow::Result<String> {
        let proxy = self.proxy.as_ref().context("no proxy runs")?;
        proxy.cut();
        ensure!(proxy.findings().is_empty(), "{:?}", proxy.findings());
        Ok("connections are cut".to_owned())
    }

    /// As a restored snapshot finds its connections.
    fn silence(&self) -> anyhow::Result<String> {
        let proxy = self.proxy.as_ref().context("no proxy runs")?;
        proxy.end_silence();
        proxy.silence(false);
        Ok("connections are dead, and nobody says so to the guest".to_owned())
    }

    /// After the last unmount the daemon must hold what it held before the first mount.
    fn daemon_idle(&mut self) -> anyhow::Result<String> {
        let Some(daemon) = self.daemon.as_mut() else { bail!("no daemon runs") };
        let end = Instant::now() + IDLE_LIMIT;
        loop {
            daemon.process.check_running()?;
            let now = Held::of(daemon)?;
            if now.gauges == daemon.idle.gauges {
                let (errors, before) = (now.protocol_errors, daemon.idle.protocol_errors);
                ensure!(errors == before, "{} protocol errors", errors - before);
                ensure!(now.operations > 0, "the daemon counted no operation");
                let gauges = now.gauges.iter().map(|(name, n)| format!("{name} {n}"));
                let gauges: Vec<String> = gauges.collect();
                return Ok(format!("{} operations; {}", now.operations, gauges.join(", ")));
            }
            let (now, idle) = (now.gauges, &daemon.idle.gauges);
            ensure!(Instant::now() < end, "it holds {now:?}, and {idle:?} at its start");
            std::thread::sleep(POLL);
        }
    }
}

/// What the daemon holds and has counted, from its control socket and from /proc.
#[derive(Debug, Default)]
struct Held {
    gauges: BTreeMap<String, u64>,
    protocol_errors: u64,
    operations: u64,
}

/// The counters that come back to their start when all guests have gone.
const GAUGES: [&str; 6] =
    ["sessions", "connections", "nodes", "handles", "slots_in_use", "buffers_in_use"];

impl Held {
    fn of(daemon: &Daemon) -> anyhow::Result<Self> {
        // Before the control connection, which is a descriptor of its own.
        let fds = open_fds(&daemon.process)?;
        let mut stream =
            UnixStream::connect(&daemon.control).context("ringfsd's control socket")?;
        stream.set_read_timeout(Some(LISTEN_LIMIT))?;
        stream.write_all(b"{\"ask\":\"counters\"}\n")?;
        let mut text = String::new();
        stream.take(STATUS_BYTES_MAX).read_to_string(&mut text)?;
        Self::parse(&text, fds).with_context(|| format!("counters of ringfsd: {text:?}"))
    }

    fn parse(text: &str, fds: u64) -> anyhow::Result<Self> {
        let json: serde_json::Value = serde_json::from_str(text)?;
        let number = |name: &str| json.get(name).and_then(serde_json::Value::as_u64);
        let mut gauges: BTreeMap<String, u64> =
            GAUGES.iter().filter_map(|name| Some(((*name).to_owned(), number(name)?))).collect();
        ensure!(!gauges.is_empty(), "none of {GAUGES:?} is there");
        gauges.insert("descriptors".into(), fds);
        let operations = json.get("ops").and_then(serde_json::Value::as_object);
        let operations = operations.map_or(0, |ops| ops.values().filter_map(|n| n.as_u64()).sum());
        let protocol_errors = number("protocol_errors").unwrap_or(0);
        Ok(Self { gauges, protocol_errors, operations })
    }
}

fn start_daemon(
    program: &Path,
    run_dir: &Path,
    share: &Path,
    socket: &str,
) -> anyhow::Result<Daemon> {
    let arguments = daemon_arguments(share, socket);
    let mut process = Process::start("ringfsd", program, &arguments, run_dir, false)?;
    let control = run_dir.join(CONTROL);
    process.wait_for(&run_dir.join(socket), LISTEN_LIMIT)?;
    process.wait_for(&control, LISTEN_LIMIT)?;
    // One visit that says nothing brings up what the daemon makes on its first connection.
    let socket = run_dir.join(socket);
    drop(UnixStream::connect(&socket).context("connecting to ringfsd")?);
    let (program, run_dir) = (program.to_owned(), run_dir.to_owned());
    let idle = Held::default();
    let mut daemon = Daemon { process, program, arguments, run_dir, socket, control, idle };
    daemon.idle = settled(&daemon)?;
    Ok(daemon)
}

/// Where vhost-device-vsock looks for whoever serves the guest.
pub fn direct_socket() -> String {
    format!("{UDS_BASE}_{PORT}")
}

/// What the daemon is started with.
pub fn daemon_arguments(share: &Path, socket: &str) -> Vec<String> {
    [
        "--share".to_owned(),
        format!("{SHARE}={},dev", share.display()),
        "--listen".to_owned(),
        format!("unix:{socket}"),
        "--control".to_owned(),
        CONTROL.to_owned(),
        "--state-dir".to_owned(),
        STATE_DIR.to_owned(),
    ]
    .into()
}

/// What it holds once that is the same in ten looks in a row.
fn settled(daemon: &Daemon) -> anyhow::Result<Held> {
    const LOOKS: u32 = 10;
    const LOOKS_MAX: u32 = 200;
    let (mut last, mut same) = (Held::of(daemon)?, 0);
    for _ in 0..LOOKS_MAX {
        std::thread::sleep(POLL);
        let now = Held::of(daemon)?;
        same = if now.gauges == last.gauges { same + 1 } else { 0 };
        last = now;
        if same >= LOOKS {
            return Ok(last);
        }
    }
    bail!("ringfsd does not come to rest after its start: {last:?}")
}

/// Of its worker.
fn open_fds(process: &Process) -> anyhow::Result<u64> {
    let children = format!("/proc/{0}/task/{0}/children", process.id());
    let children =
        std::fs::read_to_string(&children).with_context(|| format!("read {children}"))?;
    let mut count = 0;
    for pid in children.split_whitespace() {
        let dir = format!("/proc/{pid}/fd");
        count += std::fs::read_dir(&dir).with_context(|| format!("reading {dir}"))?.count();
    }
    Ok(u64::try_from(count)?)
}

/// A tree with known bytes, and its checksums beside it.
fn make_share(share: &Path) -> anyhow::Result<()> {
    let tree = share.join("from-host");
    std::fs::create_dir_all(tree.join("below"))?;
    let mut random = 0x5640_2026_u64;
    for number in 0..FILES_FROM_HOST {
        let dir = if number % 3 == 0 { tree.join("below") } else { tree.clone() };
        // Sizes around the limits of pages and of the packets of vsock, and one of some MiB.
        let bytes = match number % 6 {
            0 => 0,
            1 => 1,
            2 => 4095,
            3 => 4097,
            4 => 65_536,
            _ if number == 5 => 3 << 20,
            _ => 32_769,
        };
        std::fs::write(dir.join(format!("file{number}")), noise(&mut random, bytes))?;
    }
    let sums = std::fs::File::create(share.join("from-host.sha256"))?;
    tools::run(
        Command::new("find")
            .args([".", "-type", "f", "-exec", "sha256sum", "{}", "+"])
            .current_dir(&tree)
            .stdout(Stdio::from(sums)),
    )
}

/// Bytes without a pattern that repeats (xorshift64).
fn noise(state: &mut u64, bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// Sends back what comes, on as many connections as the guest makes (a few a run).
fn start_echo(socket: &Path) -> anyhow::Result<()> {
    let listener =
        UnixListener::bind(socket).with_context(|| format!("binding {}", socket.display()))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || echo(stream));
        }
    });
    Ok(())
}

fn echo(mut stream: UnixStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            return; // the guest sees the end and says so
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_as_far_as_they_are_there() {
        let text = r#"{"connections":1,"nodes":7,"protocol_errors":2,"ops":{"READ":3,"INIT":1}}"#;
        let held = Held::parse(text, 12).expect("counters");
        let gauges: Vec<(&str, u64)> = held.gauges.iter().map(|(k, v)| (k.as_str(), *v)).collect();
        assert_eq!(gauges, [("connections", 1), ("descriptors", 12), ("nodes", 7)]);
        assert_eq!((held.protocol_errors, held.operations), (2, 4));
        for garbage in ["", "[]", "{}", "{\"ops\":3}"] {
            assert!(Held::parse(garbage, 1).is_err(), "{garbage}");
        }
    }

    #[test]
    fn the_echo_peer_gives_back_what_it_got() {
        let socket = std::env::temp_dir().join(format!("ringfs-echo-{}", std::process::id()));
        start_echo(&socket).expect("it binds");
        let mut stream = UnixStream::connect(&socket).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a limit");
        let sent = noise(&mut 1, 100_000);
        let copy = sent.clone();
        let mut writer = stream.try_clone().expect("a second descriptor");
        let sender = std::thread::spawn(move || writer.write_all(&copy));
        let mut back = vec![0; sent.len()];
        stream.read_exact(&mut back).expect("all comes back");
        sender.join().expect("no panic").expect("all is sent");
        std::fs::remove_file(&socket).expect("clean up");
        assert_eq!(sent, back);
    }
}
