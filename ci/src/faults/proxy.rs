//! Stands between a guest and the daemon on Unix sockets, and breaks connections by a schedule.
//!
//! Invariant: every decision is the schedule's (`schedule.rs`), and each one that was carried out
//! stands in the log with its connection, direction, record and batch. Until it is armed, and after
//! it is disarmed, all passes unharmed; connections of before count their records from the arming.
//! What the ends send is itself held against the wire's rules: a batch that is not well formed, or
//! out of sequence, is a finding. Must not wait for an end that does not read: a pump can always be
//! woken by its link.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result};

use super::link::Link;
use super::pump::Pump;
use super::schedule::{Direction, Fault, Schedule};

/// Findings that are kept; the rest is counted.
const FINDINGS_MAX: usize = 20;

/// What was done so far.
#[derive(Debug, Default)]
pub struct Tally {
    /// By place in [`Fault::ALL`].
    pub faults: [AtomicU64; Fault::ALL.len()],
    /// Faults that hit HELLO or WELCOME.
    pub handshakes: AtomicU64,
    /// Batches that were delayed or came in pieces.
    pub benign: AtomicU64,
    /// Connections that the guest made.
    pub conns: AtomicU64,
    /// Connections for which the daemon was not there.
    pub refused: AtomicU64,
    /// Batches that passed.
    pub batches: AtomicU64,
    /// Records that passed.
    pub records: AtomicU64,
    /// Silent connections that were closed by the end that was left.
    pub silent_closed: AtomicU64,
}

impl Tally {
    /// Connections that a fault cost, as far as it was meant to.
    pub fn cuts(&self) -> u64 {
        let faults = Fault::ALL.iter().zip(&self.faults);
        faults.filter(|((fault, _), _)| fault.is_cut()).map(|(_, count)| count.load(Relaxed)).sum()
    }

    /// `CutInside 12, Flip 3`
    pub fn by_kind(&self) -> String {
        let faults = Fault::ALL.iter().zip(&self.faults);
        let counts = faults.map(|((fault, _), count)| format!("{fault:?} {}", count.load(Relaxed)));
        counts.collect::<Vec<_>>().join(", ")
    }
}

/// What all connections share.
#[derive(Debug)]
pub struct Shared {
    target: PathBuf,
    /// How decisions are made.
    pub schedule: Schedule,
    armed: AtomicBool,
    stop: AtomicBool,
    /// What was done.
    pub tally: Tally,
    log: Mutex<File>,
    begun: Instant,
    findings: Mutex<Vec<String>>,
    links: Mutex<Vec<Weak<Link>>>,
    /// Nothing passes, neither bytes nor ends, as long as this is so.
    frozen: Mutex<bool>,
    thawed: Condvar,
    /// Connections that are held open without a sign of life.
    silent: Mutex<Vec<Arc<Link>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Shared {
    /// Whether faults are made now.
    pub fn armed(&self) -> bool {
        self.armed.load(Relaxed)
    }

    /// One line for the log of decisions.
    pub fn log(&self, line: &str) {
        // A log that cannot be written must not change what happens to the connections.
        let _ = writeln!(lock(&self.log), "{:>9.3?} {line}", self.begun.elapsed());
    }

    /// Something that an end must not have done.
    pub fn finding(&self, what: String) {
        self.log(&format!("FINDING {what}"));
        let mut findings = lock(&self.findings);
        if findings.len() < FINDINGS_MAX {
            findings.push(what);
        }
    }

    /// Waits while the proxy stands still; whether it did.
    pub fn wait_thawed(&self) -> bool {
        let mut frozen = lock(&self.frozen);
        let stood_still = *frozen;
        while *frozen {
            frozen = self.thawed.wait(frozen).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        stood_still
    }

    fn freeze(&self, freeze: bool) {
        *lock(&self.frozen) = freeze;
        self.thawed.notify_all();
    }

    fn serve(self: &Arc<Self>, guest: UnixStream) -> Result<()> {
        let conn = self.tally.conns.fetch_add(1, Relaxed);
        let Ok(daemon) = UnixStream::connect(&self.target) else {
            self.tally.refused.fetch_add(1, Relaxed);
            self.log(&format!("conn {conn}: the daemon is not there"));
            return Ok(());
        };
        let link = Arc::new(Link::new(conn, guest, daemon)?);
        let mut links = lock(&self.links);
        links.retain(|link| link.strong_count() > 0);
        links.push(Arc::downgrade(&link));
        drop(links);
        for direction in [Direction::Up, Direction::Down] {
            let pump = Pump::new(self.clone(), link.clone(), direction);
            let name = format!("conn{conn}{}", direction.arrow());
            thread::Builder::new().name(name).spawn(move || pump.run())?;
        }
        Ok(())
    }
}

/// A running proxy; it ends, with all its connections, when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    /// Where guests connect.
    pub socket: PathBuf,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens on `socket` for guests of the daemon that listens on `target`; disarmed.
    pub fn start(socket: &Path, target: &Path, schedule: Schedule, log: File) -> Result<Self> {
        let listener = UnixListener::bind(socket)
            .with_context(|| format!("listen on {}", socket.display()))?;
        let shared = Arc::new(Shared {
            target: target.into(),
            schedule,
            armed: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            tally: Tally::default(),
            log: Mutex::new(log),
            begun: Instant::now(),
            findings: Mutex::default(),
            links: Mutex::default(),
            frozen: Mutex::default(),
            thawed: Condvar::new(),
            silent: Mutex::default(),
        });
        let accepting = shared.clone();
        let acceptor = thread::Builder::new().name("proxy".into()).spawn(move || {
            for guest in listener.incoming() {
                accepting.wait_thawed();
                if accepting.stop.load(Relaxed) {
                    break;
                }
                if let Err(error) =
                    guest.map_err(Into::into).and_then(|guest| accepting.serve(guest))
                {
                    accepting.finding(format!("the proxy cannot serve a guest: {error:#}"));
                }
            }
        })?;
        Ok(Self { shared, socket: socket.into(), acceptor: Some(acceptor) })
    }

    /// It stands still as long as what this gives lives.
    pub fn freeze(&self) -> Frozen {
        self.shared.freeze(true);
        Frozen(self.shared.clone())
    }

    /// Begins or ends making faults.
    pub fn arm(&self, armed: bool) {
        self.shared.log(if armed { "armed" } else { "disarmed" });
        self.shared.armed.store(armed, Relaxed);
    }

    /// What was done so far.
    pub fn tally(&self) -> &Tally {
        &self.shared.tally
    }

    /// Connections that the guest has reason to believe in.
    pub fn live(&self) -> usize {
        let links = lock(&self.shared.links);
        links.iter().filter_map(Weak::upgrade).filter(|link| link.seems_live()).count()
    }

    /// Ends all connections: both ends see EOF, now.
    pub fn cut(&self) {
        self.all().iter().for_each(|link| link.cut());
    }

    /// Leaves the guest in silence on all connections, as a restored snapshot is; the daemon sees
    /// EOF, or nothing either. They stay so until the guest leaves.
    pub fn silence(&self, daemon_too: bool) {
        for link in self.all() {
            link.mute(true);
            link.stop();
            if !daemon_too {
                // It may have gone already.
                let _ = link.daemon.shutdown(std::net::Shutdown::Both);
            }
            lock(&self.shared.silent).push(link);
        }
    }

    /// Connections left in silence are let go of: whoever is still there sees their end.
    pub fn end_silence(&self) {
        lock(&self.shared.silent).clear();
    }

    fn all(&self) -> Vec<Arc<Link>> {
        let links = lock(&self.shared.links);
        links.iter().filter_map(Weak::upgrade).filter(|link| !link.stopped()).collect()
    }

    /// What the ends must not have done.
    pub fn findings(&self) -> Vec<String> {
        lock(&self.shared.findings).clone()
    }

    /// A line for the log of decisions, such as what else happened at that point.
    pub fn note(&self, line: &str) {
        self.shared.log(line);
    }
}

/// A proxy that stands still.
#[derive(Debug)]
pub struct Frozen(Arc<Shared>);

impl Drop for Frozen {
    fn drop(&mut self) {
        self.0.freeze(false);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        // Wakes the acceptor; nobody else listens there.
        let _ = UnixStream::connect(&self.socket);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        for link in lock(&self.shared.links).drain(..).filter_map(|link| link.upgrade()) {
            link.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Sandbox;
    use ringfs_wire::batch::{BatchBuilder, Kind, RecordHeader};
    use ringfs_wire::limits::BATCH_BYTES_MAX;
    use std::io::Read;

    fn stream(batches: u64) -> Vec<u8> {
        let mut buffer = vec![0; BATCH_BYTES_MAX];
        let mut out = Vec::new();
        for seq in 0..batches {
            let mut builder = BatchBuilder::new();
            for n in 0..1 + seq % 3 {
                let kind = if seq == 0 { Kind::Hello } else { Kind::Request };
                let header = RecordHeader { kind: kind as u8, ..Default::default() };
                let body = vec![seq as u8; (seq * 37 + n * 11) as usize % 5000];
                assert!(builder.push(&mut buffer, header, &body));
            }
            out.extend_from_slice(builder.finish(&mut buffer, seq, 0, true));
        }
        out
    }

    /// Sends a stream through a proxy; gives what came out, and the proxy's account.
    fn pass(schedule: Schedule, sent: &[u8]) -> (Vec<u8>, u64, u64, Vec<String>, String) {
        let sandbox = Sandbox::new().unwrap();
        let target = sandbox.path("target");
        let listener = UnixListener::bind(&target).unwrap();
        let log = sandbox.path("log");
        let file = File::create(&log).unwrap();
        let proxy = Proxy::start(&sandbox.path("proxy"), &target, schedule, file).unwrap();
        proxy.arm(true);
        let mut guest = UnixStream::connect(&proxy.socket).unwrap();
        let (mut daemon, _) = listener.accept().unwrap();
        // One that is left in silence sees no end.
        daemon.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        let received = thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut bytes = Vec::new();
                // A connection that was cut may end in an error; what came before it counts.
                let _ = daemon.read_to_end(&mut bytes);
                bytes
            });
            let _ = guest.write_all(sent);
            let _ = guest.shutdown(std::net::Shutdown::Write);
            reader.join().unwrap()
        });
        let tally = proxy.tally();
        let counts = (tally.cuts(), tally.benign.load(Relaxed), proxy.findings());
        drop(guest);
        drop(proxy);
        let log = std::fs::read_to_string(log).unwrap();
        (received, counts.0, counts.1, counts.2, log)
    }

    #[test]
    fn without_cuts_every_byte_passes_in_pieces() {
        let sent = stream(300);
        let calm = Schedule { seed: 1, gap_max: 10, calm: true, unchecked: false };
        let (received, cuts, benign, findings, _) = pass(calm, &sent);
        assert!(received == sent && cuts == 0, "{} of {}", received.len(), sent.len());
        assert!(benign > 5 && findings.is_empty(), "{benign} {findings:?}");
    }

    #[test]
    fn faults_come_where_the_seed_says() {
        let sent = stream(100);
        let mut harmed = 0;
        for seed in 0..12 {
            let schedule = Schedule { seed, gap_max: 20, calm: false, unchecked: false };
            let first = pass(schedule, &sent);
            let again = pass(schedule, &sent);
            let decision = |log: &str| {
                let lines = log.lines().filter(|line| line.contains(" > record "));
                // All but the time.
                let decisions = lines.filter_map(|line| line.split_once("conn"));
                decisions.take(1).map(|(_, what)| what.to_owned()).collect::<Vec<_>>()
            };
            assert_eq!(decision(&first.4), decision(&again.4), "seed {seed}");
            harmed += usize::from(first.0 != sent && first.1 > 0);
        }
        assert!(harmed >= 6, "{harmed} of 12 were harmed");
    }

    #[test]
    fn what_an_end_sends_wrongly_is_found() {
        let calm = Schedule { seed: 1, gap_max: 10, calm: true, unchecked: false };
        let mut twice = stream(3);
        let first = stream(1);
        twice.splice(first.len()..first.len(), first.iter().copied());
        assert!(pass(calm, &twice).3[0].contains("sequence"));
        let mut flipped = stream(3);
        flipped[40] ^= 1;
        assert!(pass(calm, &flipped).3[0].contains("checksum"));
        assert!(pass(calm, b"GET / HTTP/1.0\r\n\r\n").3[0].contains("magic"));
    }
}
