//! The configuration in force, and how another one takes its place while guests are served.
//!
//! The parent's side: it opens directories and binds sockets. Invariant: all that can fail is done
//! before anything changes, so that a configuration is taken whole or not at all.

use crate::accept::{Door, ListenError, Listener};
use crate::config::{Config, Fault, ListenConfig, ShareConfig, Source};
use crate::fds::Fds;
use crate::fs::{Fs, FsError, ShareRoot};
use crate::greet::Share;
use crate::status::ConfigState;
use crate::worker::{Update, Worker};
use std::sync::{Arc, mpsc};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// Why the configuration stays as it was.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ReloadError {
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Config(Vec<Fault>),
    #[error("cannot serve the share {name:?}: {source}")]
    Share { name: String, source: FsError },
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("the configuration cannot be read in {READ_LIMIT:?}: does a share not answer?")]
    Stuck,
    #[error("no thread to read the configuration: {0}")]
    Thread(#[source] std::io::Error),
}

/// How long reading a configuration and opening its shares may take.
const READ_LIMIT: Duration = Duration::from_secs(10);

/// What the parent keeps of its configuration.
pub struct InForce {
    source: Source,
    config: Config,
    fds: Arc<Fds>,
    state: ConfigState,
}

/// Opens a directory that is to be shared; tried once, so that what can never be served is said.
///
/// # Errors
/// See [`FsError`].
pub fn open_share(config: &ShareConfig, fds: &Arc<Fds>) -> Result<Share, FsError> {
    let options = config.options(fds);
    let root = ShareRoot::open(&config.path, options.submounts)?;
    root.try_clone().and_then(|root| Fs::on(root, options.clone()))?;
    let (name, dir) = (config.name.clone(), config.path.clone());
    Ok(Share { name, dir, root, options, opening: 0.into() })
}

impl InForce {
    /// What the daemon has started with.
    pub fn new(source: Source, config: Config, fds: Arc<Fds>) -> InForce {
        let file = source.file().map(ToOwned::to_owned);
        let state = ConfigState { file, loaded_unix_s: now_unix_s(), ..Default::default() };
        InForce { source, config, fds, state }
    }

    /// For people and tools: what is in force, and what became of the last reload.
    pub fn state(&self, listeners: &[(Door, Listener)]) -> ConfigState {
        let guests = listeners.iter().filter(|(door, _)| *door == Door::Guests);
        let listeners = guests.map(|(_, listener)| listener.address().to_string()).collect();
        ConfigState { listeners, ..self.state.clone() }
    }

    /// One line, for a service manager's status.
    pub fn summary(&self) -> String {
        let shares = self.config.shares.len();
        match self.state.errors.first() {
            Some(error) => format!("{shares} shares; THE LAST RELOAD FAILED: {error}"),
            None => format!("{shares} shares"),
        }
    }

    /// Reads the configuration again and serves by it. If anything is wrong with it the old one
    /// stays in force. Either way the worker is told, and the log.
    pub fn reload(&mut self, listeners: &mut Vec<(Door, Listener)>, worker: &Worker) {
        self.state.reloads += 1;
        match self.take(listeners, worker) {
            Ok(changed) => {
                let waits = &self.state.needs_restart;
                tracing::info!(?changed, "configuration reloaded");
                if !waits.is_empty() {
                    tracing::warn!("not before the next start: {}", waits.join(", "));
                }
                self.state.changed = changed;
                self.state.loaded_unix_s = now_unix_s();
                (self.state.failed_unix_s, self.state.errors) = (None, Vec::new());
            }
            Err(error) => {
                tracing::error!("the old configuration stays in force: {error}");
                self.state.failed_unix_s = Some(now_unix_s());
                self.state.errors = match error {
                    ReloadError::Config(faults) => faults.iter().map(Fault::to_string).collect(),
                    other => vec![other.to_string()],
                };
            }
        }
        worker.update(Update::Config(self.state(listeners)));
    }

    /// Reads the configuration and opens the shares that are new in it. On a thread of its own: a
    /// file system that does not answer must not keep the parent from accepting.
    fn read(&self) -> Result<(Config, Vec<Share>), ReloadError> {
        let (source, fds) = (self.source.clone(), self.fds.clone());
        let known = self.config.shares.clone();
        let (tell, told) = mpsc::channel();
        let read = move || {
            let new = source.config().map_err(ReloadError::Config)?;
            let mut opened = Vec::new();
            for share in new.shares.iter().filter(|share| !known.contains(share)) {
                let failed = |source| ReloadError::Share { name: share.name.clone(), source };
                opened.push(open_share(share, &fds).map_err(failed)?);
            }
            Ok((new, opened))
        };
        let thread = std::thread::Builder::new().name("ringfs-reload".into());
        thread.spawn(move || drop(tell.send(read()))).map_err(ReloadError::Thread)?;
        told.recv_timeout(READ_LIMIT).map_err(|_| ReloadError::Stuck)?
    }

    fn take(
        &mut self,
        listeners: &mut Vec<(Door, Listener)>,
        worker: &Worker,
    ) -> Result<Vec<String>, ReloadError> {
        let (new, opened) = self.read()?;
        let old = &self.config;
        let has = |listen: &ListenConfig| {
            listeners.iter().any(|(_, bound)| *bound.address() == listen.address)
        };
        let is_new = |listen: &&ListenConfig| !old.listen.contains(listen) && !has(listen);
        let mut bound = Vec::new();
        for listen in new.listen.iter().filter(is_new) {
            bound.push((Door::Guests, Listener::bind(listen.address.clone())?));
        }
        // Nothing fails from here on.
        let mut changed = Vec::new();
        for share in opened {
            let known = old.shares.iter().any(|old| old.name == share.name);
            changed.push(format!("{} share {}", if known { "changed" } else { "new" }, share.name));
            worker.update(Update::Share(share));
        }
        let gone = old.shares.iter().filter(|old| !new.shares.iter().any(|s| s.name == old.name));
        for share in gone {
            changed.push(format!("removed share {}", share.name));
            let ends_sessions = new.drop_removed;
            worker.update(Update::ShareGone { name: share.name.clone(), ends_sessions });
        }
        changed.extend(bound.iter().map(|(_, new)| format!("new listener {}", new.address())));
        for listen in old.listen.iter().filter(|listen| !new.listen.contains(listen)) {
            changed.push(format!("removed listener {}", listen.address));
            let stays = |one: &Listener| one.is_passed() || *one.address() != listen.address;
            listeners.retain(|(_, bound)| stays(bound));
        }
        listeners.extend(bound);
        if old.slow_op != new.slow_op {
            changed.push(format!("slow-op {} ms", new.slow_op.as_millis()));
            worker.update(Update::Slow(new.slow_op));
        }
        self.state.needs_restart = needs_restart(old, &new);
        // What needs a restart stays as it is, and is said again by the next reload.
        self.config = Config {
            cpus: old.cpus.clone(),
            nice: old.nice,
            ioprio: old.ioprio,
            engine: old.engine,
            spin: old.spin,
            grace: old.grace,
            state_dir: old.state_dir.clone(),
            control: old.control.clone(),
            metrics: old.metrics.clone(),
            log: old.log.clone(),
            log_format: old.log_format,
            ..new
        };
        Ok(changed)
    }
}

fn needs_restart(old: &Config, new: &Config) -> Vec<String> {
    let differ = [
        ("cpus", old.cpus != new.cpus),
        ("nice", old.nice != new.nice),
        ("ioprio", old.ioprio != new.ioprio),
        ("engine", old.engine != new.engine),
        ("spin", old.spin != new.spin),
        ("grace", old.grace != new.grace),
        ("state-dir", old.state_dir != new.state_dir),
        ("control", old.control != new.control),
        ("metrics", old.metrics != new.metrics),
        ("log", old.log != new.log),
        ("log-format", old.log_format != new.log_format),
    ];
    differ.iter().filter(|(_, differs)| *differs).map(|(name, _)| (*name).to_owned()).collect()
}

fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
