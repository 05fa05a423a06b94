//! Who stands still for a while, as a machine that is suspended, or a process of it: `SIGSTOP`, and
//! for the proxy a gate that nothing passes.
//!
//! Invariant: whoever was stopped goes on, whatever becomes of the run. Nobody may lose more by it
//! than connections.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::checker::Account;
use super::rng::Rng;
use super::run::Run;
use crate::rig;

/// Most are short; the others are longer than a handshake may take, and its client waits.
const SHORT_MS: u64 = 1000;
const LONG_MS: u64 = 9000;
/// Longer than anything that either end waits for, but a session's grace time.
const LONGEST_MS: u64 = 20_000;

/// Who stands still.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Client,
    Parent,
    Worker,
    Proxy,
    Ends,
    All,
}

const VICTIMS: [Victim; 6] =
    [Victim::Client, Victim::Parent, Victim::Worker, Victim::Proxy, Victim::Ends, Victim::All];

/// Processes that are stopped as long as this lives.
struct Stopped(Vec<Pid>);

impl Stopped {
    fn stop(pids: Vec<Pid>) -> Self {
        // One that was killed meanwhile needs nothing.
        for pid in &pids {
            let _ = kill_process(*pid, Signal::STOP);
        }
        Self(pids)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill_process(*pid, Signal::CONT);
        }
    }
}

impl Run<'_> {
    /// Stops somebody every so often, until it is over.
    pub(super) fn stall(
        &self,
        over: &mpsc::Receiver<()>,
        every: Duration,
        dir: &Path,
        account: &Account,
    ) {
        let mut rng = Rng::of(&[self.seed, self.stalls.load(Relaxed)]);
        let every = every.as_millis() as u64;
        loop {
            let pause = Duration::from_millis(every / 2 + rng.below(every));
            let victim = *rng.pick(&VICTIMS);
            let most = match rng.below(16) {
                0..10 => SHORT_MS,
                10..15 => LONG_MS,
                _ => LONGEST_MS,
            };
            let length = Duration::from_millis(rng.below(most));
            if over.recv_timeout(pause) != Err(mpsc::RecvTimeoutError::Timeout) {
                return;
            }
            let is_over = self.stand_still(victim, length, over, dir);
            match is_over.with_context(|| format!("{victim:?} was to stand still")) {
                Ok(false) => {}
                Ok(true) => return,
                Err(error) => return account.problem(format!("{error:#}")),
            }
        }
    }

    /// Whether it is over.
    fn stand_still(
        &self,
        victim: Victim,
        length: Duration,
        over: &mpsc::Receiver<()>,
        dir: &Path,
    ) -> Result<bool> {
        let (parent, workers) = self.daemon_pids()?;
        let client = rig::client_of(dir)?;
        let pids: Vec<Pid> = match victim {
            Victim::Client => client.into_iter().collect(),
            Victim::Parent => vec![parent],
            Victim::Worker => workers,
            Victim::Proxy => Vec::new(),
            Victim::Ends | Victim::All => {
                client.into_iter().chain([parent]).chain(workers).collect()
            }
        };
        self.stalls.fetch_add(1, Relaxed);
        self.proxy.note(&format!("{victim:?} stands still for {length:?}"));
        let _shut = matches!(victim, Victim::Proxy | Victim::All).then(|| self.proxy.freeze());
        let _stopped = Stopped::stop(pids);
        Ok(over.recv_timeout(length) != Err(mpsc::RecvTimeoutError::Timeout))
    }
}
