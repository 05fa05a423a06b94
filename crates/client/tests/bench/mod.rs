//! A host, mounts of it by the real program, and what cleans up. Needs root and FUSE.

pub mod uses;

use super::host::{Host, Terms};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;
use tempfile::TempDir;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_ringfs");
pub const LIMIT: Duration = Duration::from_secs(30);

/// Runs something that may hang with a mount; fails the test instead.
pub fn within<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("{what} takes too long"))
}

/// A scratch directory with a host's socket and a mount point; cleans up however the test ends.
pub struct Bench {
    pub host: Host,
    pub mountpoint: PathBuf,
    pub dir: TempDir,
}

impl Bench {
    pub fn new(terms: Terms) -> Bench {
        let dir = tempfile::tempdir().expect("tempdir");
        let mountpoint = dir.path().canonicalize().expect("dir").join("mnt");
        std::fs::create_dir(&mountpoint).expect("mkdir");
        Bench { host: Host::start(dir.path(), terms), mountpoint, dir }
    }

    pub fn source(&self, share: &str) -> String {
        format!("{share}@unix:{}", self.host.path.display())
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(args).stdin(Stdio::null());
        command
    }

    /// A client in the foreground, ready.
    pub fn mount(&self, options: &str) -> Client {
        self.mount_with(options, &[])
    }

    /// The same, with other arguments besides.
    pub fn mount_with(&self, options: &str, args: &[&str]) -> Client {
        let source = self.source("data");
        let mut command =
            self.command(&[&["mount", "-f", "-o", options], args, &[&source]].concat());
        command.arg(&self.mountpoint).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("spawn");
        let stdout = child.stdout.take().expect("piped");
        let client = Client { child: Some(child) };
        let line = within("the mount", move || {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line).map(|_| line)
        });
        let line = line.expect("a line");
        if !line.contains("is mounted on") {
            let (status, stderr) = client.wait();
            panic!("no mount: {line}{status} {stderr}");
        }
        client
    }

    pub fn run(&self, args: &[&str]) -> Output {
        let mut command = self.command(args);
        within("a command", move || command.output()).expect("run")
    }

    pub fn umount(&self, args: &[&str]) -> Output {
        let path = self.mountpoint.display().to_string();
        self.run(&[&["umount"], args, &[path.as_str()]].concat())
    }

    pub fn is_mounted(&self) -> bool {
        is_mounted(&self.mountpoint)
    }

    /// Its line of the mount table.
    pub fn mount_line(&self) -> String {
        mount_line(&self.mountpoint).expect("it is mounted")
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.mountpoint.join(name)
    }

    pub fn cat(&self, name: &str) -> Reader {
        let mut command = Command::new("cat");
        command.arg(self.file(name)).stdout(Stdio::piped()).stderr(Stdio::piped());
        Reader { child: command.spawn().expect("cat") }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        while self.is_mounted() {
            if unmount(&self.mountpoint, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_err() {
                break;
            }
        }
        let _ = &self.dir;
    }
}

/// A host, and a mount of it.
pub fn mounted(terms: Terms, options: &str) -> (Bench, Client) {
    let bench = Bench::new(terms);
    let client = bench.mount(options);
    (bench, client)
}

pub fn is_mounted(path: &Path) -> bool {
    mount_line(path).is_some()
}

fn mount_line(path: &Path) -> Option<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let mut lines = table.lines().filter(|line| line.split(' ').nth(4) == path.to_str());
    lines.next().map(str::to_owned)
}

/// What a command said of its failure.
pub fn stderr_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub struct Client {
    pub child: Option<Child>,
}

impl Client {
    pub fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("running"))
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("kill");
    }

    /// The next line of standard error, which [`Client::wait`] then does not see.
    pub fn next_words(&mut self) -> String {
        let stderr = self.child.as_mut().and_then(|child| child.stderr.take()).expect("piped");
        within("words", move || {
            let mut line = String::new();
            BufReader::new(stderr).read_line(&mut line).expect("utf-8");
            line
        })
    }

    /// Standard error from behind the line that has `words`, which [`Client::wait`] does not see.
    pub fn words_until(&mut self, words: &'static str) -> impl Read + use<> {
        let stderr = self.child.as_mut().and_then(|child| child.stderr.take()).expect("piped");
        within(words, move || {
            let (mut stderr, mut text) = (BufReader::new(stderr), String::new());
            while !text.contains(words) {
                let read = stderr.read_line(&mut text).expect("utf-8");
                assert!(read > 0, "no such words, but: {text}");
            }
            stderr
        })
    }

    /// Standard error as it comes, which [`Client::wait`] does not see.
    pub fn words(&mut self) -> Words {
        let stderr = self.child.as_mut().and_then(|child| child.stderr.take()).expect("piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
            lines.try_for_each(|line| sender.send(line))
        });
        Words(lines)
    }

    pub fn wait(mut self) -> (ExitStatus, String) {
        let mut child = self.child.take().expect("running");
        let pid = Pid::from_child(&child);
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            let mut text = String::new();
            let _ = child.stderr.take().map(|mut stderr| stderr.read_to_string(&mut text));
            sender.send((child.wait().expect("wait"), text))
        });
        receiver.recv_timeout(LIMIT).unwrap_or_else(|_| {
            let _ = kill_process(pid, Signal::KILL);
            panic!("the client does not end")
        })
    }
}

/// What a client says.
pub struct Words(Receiver<String>);

impl Words {
    /// The next line that has `words`.
    pub fn until(&mut self, words: &str) -> String {
        loop {
            let line = self.0.recv_timeout(LIMIT);
            let line = line.unwrap_or_else(|error| panic!("no \"{words}\": {error}"));
            if line.contains(words) {
                return line;
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub struct Reader {
    pub child: Child,
}

impl Reader {
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("kill");
    }

    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    pub fn wait(self) -> Output {
        within("a reader", move || self.child.wait_with_output()).expect("wait")
    }
}

/// For what gives no event: processes that are not our children, the mount table.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + LIMIT;
    while !done() {
        assert!(std::time::Instant::now() < deadline, "{what} does not come");
        std::thread::yield_now();
    }
}

/// How long something takes, but for times in which the machine stands still: a tick that comes
/// late counts as one.
pub struct Awake(Arc<AtomicU32>);

const TICK: Duration = Duration::from_millis(10);

impl Awake {
    pub fn begin() -> Awake {
        let ticks = Arc::new(AtomicU32::new(0));
        let counted = Arc::downgrade(&ticks);
        std::thread::spawn(move || {
            while let Some(ticks) = counted.upgrade() {
                ticks.fetch_add(1, Ordering::Relaxed);
                drop(ticks);
                std::thread::sleep(TICK);
            }
        });
        Awake(ticks)
    }

    pub fn elapsed(&self) -> Duration {
        self.0.load(Ordering::Relaxed) * TICK
    }
}

/// A program that catches SIGUSR1 without SA_RESTART, and tells what its system calls say.
pub fn signalled(bench: &Bench, code: &str) -> Reader {
    let mut command = Command::new("perl");
    let code = format!("$SIG{{USR1}} = sub {{ $n++ }}; {code}");
    command.args(["-e", &code, "--"]).arg(&bench.mountpoint);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Reader { child: command.spawn().expect("perl") }
}

/// What the client of a mount says. Where the machine stands still, it may not say it within the
/// second that the command gives it, and is asked again.
pub fn status_of(bench: &Bench) -> serde_json::Value {
    let mut status = status_now(bench);
    let deadline = std::time::Instant::now() + LIMIT;
    while status.is_null() && bench.is_mounted() && std::time::Instant::now() < deadline {
        status = status_now(bench);
    }
    status
}

/// The same, asked once; `null`: nobody answers, or nothing is mounted.
pub fn status_now(bench: &Bench) -> serde_json::Value {
    let output = bench.run(&["status", "--json"]);
    let entries: serde_json::Value = serde_json::from_slice(&output.stdout).expect("json");
    let path = bench.mountpoint.to_str().expect("utf-8");
    let entries = entries.as_array().expect("a list");
    let found = entries.iter().find(|entry| entry["mountpoint"] == path);
    found.map_or(serde_json::Value::Null, |entry| entry["client"].clone())
}
