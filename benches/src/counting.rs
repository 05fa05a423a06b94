//! What cannot be counted without disturbing: system calls (by perf), bytes on the wire (by a relay
//! between client and daemon), records a batch (by the daemon's own counters).
//!
//! Invariant: used in passes of their own, whose times count for nothing.

use crate::undo::{Guard, Undo};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

/// What was counted during one piece of work.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counted {
    /// System calls of all servers.
    pub syscalls: Option<u64>,
    /// Replies that the daemon sent, and the batches that it sent them in.
    pub batches: Option<(u64, u64)>,
    /// Bytes in both directions.
    pub wire: Option<u64>,
}

/// perf at work on some processes.
struct Perf {
    child: Child,
    guard: Guard,
    control: File,
    answers: BufReader<File>,
    output: PathBuf,
}

impl Perf {
    fn start(pids: &[i32], scratch: &Path) -> Result<Perf> {
        let [control, answers, output] =
            ["perf.ctl", "perf.ack", "perf.out"].map(|name| scratch.join(name));
        for fifo in [&control, &answers] {
            let _ = fs::remove_file(fifo);
            let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
            rustix::fs::mkfifoat(rustix::fs::CWD, fifo, mode)?;
        }
        let pids: Vec<String> = crate::proc::tree(pids).iter().map(i32::to_string).collect();
        let mut command = Command::new("perf");
        command.args(["stat", "-x,", "-e", "raw_syscalls:sys_enter", "-D", "-1", "-p"]);
        command.arg(pids.join(",")).arg("-o").arg(&output).arg("--control");
        command.arg(format!("fifo:{},{}", control.display(), answers.display()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // Open both ends ourselves, so that a perf that fails leaves nobody waiting.
        let both = |path: &Path| File::options().read(true).write(true).open(path);
        let (control, answers) = (both(&control)?, BufReader::new(both(&answers)?));
        let child = command.spawn().context("cannot run perf: apt-get install linux-perf")?;
        let guard = Guard::new(Undo::Process(child.id() as i32));
        let mut perf = Perf { child, guard, control, answers, output };
        perf.tell("enable")?;
        Ok(perf)
    }

    fn tell(&mut self, word: &str) -> Result<()> {
        self.control.write_all(format!("{word}\n").as_bytes())?;
        let fd = rustix::event::PollFd::new(self.answers.get_ref(), rustix::event::PollFlags::IN);
        let limit = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
        let ready = rustix::event::poll(&mut [fd], Some(&limit))?;
        ensure!(ready > 0, "perf does not answer (are tracepoints readable here?)");
        self.answers.read_line(&mut String::new())?;
        Ok(())
    }

    fn end(mut self) -> Result<u64> {
        self.tell("disable")?;
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        self.child.wait()?;
        self.guard.disarm();
        parse_perf(&fs::read_to_string(&self.output)?)
    }
}

/// The count of perf's one line of CSV.
fn parse_perf(text: &str) -> Result<u64> {
    let line = text.lines().find(|line| line.contains("raw_syscalls:sys_enter"));
    let count = line.and_then(|line| line.split(',').next()).context("perf counted nothing")?;
    // An idle process is "not counted".
    Ok(count.parse().unwrap_or(0))
}

/// Whether perf can count system calls here.
pub fn can_count(scratch: &Path) -> bool {
    let me = [std::process::id() as i32];
    Perf::start(&me, scratch).and_then(Perf::end).is_ok_and(|count| count > 0)
}

/// Counts while `work` runs.
pub fn during<T>(
    pids: &[i32],
    control: Option<&Path>,
    relay: Option<&Relay>,
    scratch: &Path,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Counted)> {
    let before = (control.map(batches).transpose()?, relay.map(Relay::bytes));
    let perf = if pids.is_empty() { None } else { Some(Perf::start(pids, scratch)?) };
    let value = work()?;
    let syscalls = perf.map(Perf::end).transpose()?;
    let now = control.map(batches).transpose()?;
    let batches = now.zip(before.0).map(|(now, before)| (now.0 - before.0, now.1 - before.1));
    let wire = relay.map(Relay::bytes).zip(before.1).map(|(now, before)| now - before);
    Ok((value, Counted { syscalls, batches, wire }))
}

/// Records and batches that a daemon has sent.
fn batches(control: &Path) -> Result<(u64, u64)> {
    let mut text = String::new();
    let mut stream = UnixStream::connect(control)?;
    // Older daemons, to compare with, tell without being asked, and may have ended by now.
    let _ = stream.write_all(b"{\"ask\":\"counters\"}\n");
    stream.take(1 << 20).read_to_string(&mut text)?;
    let told: Value = serde_json::from_str(&text).context("read the daemon's counters")?;
    let number = |name: &str| told[name].as_u64().with_context(|| format!("no counter {name}"));
    Ok((number("records_out")?, number("batches_out")?))
}

/// A socket between client and daemon that counts what passes.
#[derive(Clone, Debug)]
pub struct Relay {
    bytes: Arc<AtomicU64>,
}

impl Relay {
    /// Listens at `at` and passes all on to `to`. Its threads end with the connections, and the
    /// one that listens with the process.
    pub fn start(at: &Path, to: &Path) -> Result<Relay> {
        let listener = UnixListener::bind(at).with_context(|| format!("listen at {at:?}"))?;
        let relay = Relay { bytes: Arc::default() };
        let (bytes, to) = (relay.bytes.clone(), to.to_owned());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A daemon that is gone shows as a connection that ends at once.
                let _ = pass(client, &to, &bytes);
            }
        });
        Ok(relay)
    }

    /// Both directions, so far.
    fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }
}

fn pass(client: UnixStream, to: &Path, bytes: &Arc<AtomicU64>) -> Result<()> {
    let daemon = UnixStream::connect(to)?;
    let ways = [(client.try_clone()?, daemon.try_clone()?), (daemon, client)];
    for (mut from, mut to) in ways {
        let bytes = bytes.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 256 << 10];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                bytes.fetch_add(n as u64, Relaxed);
                if to.write_all(&buffer[..n]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perfs_line_is_read() {
        let text = "# started\n\n1234,,raw_syscalls:sys_enter,99,100.00,,\n";
        assert_eq!(parse_perf(text).unwrap(), 1234);
        assert_eq!(parse_perf("<not counted>,,raw_syscalls:sys_enter,0,0,,").unwrap(), 0);
        assert!(parse_perf("").is_err());
    }

    #[test]
    fn a_relay_counts_both_ways() {
        let dir = tempfile::tempdir().unwrap();
        let (at, to) = (dir.path().join("at"), dir.path().join("to"));
        let server = UnixListener::bind(&to).unwrap();
        let relay = Relay::start(&at, &to).unwrap();
        let mut client = UnixStream::connect(&at).unwrap();
        let (mut served, _) = server.accept().unwrap();
        client.write_all(b"12345").unwrap();
        served.read_exact(&mut [0; 5]).unwrap();
        served.write_all(b"123").unwrap();
        client.read_exact(&mut [0; 3]).unwrap();
        assert_eq!(relay.bytes(), 8);
    }
}
