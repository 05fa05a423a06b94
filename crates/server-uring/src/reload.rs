//! The configuration in force, and how another one takes its place while guests are served.
//!
//! The parent's side: it opens directories and binds sockets. Invariant: all that can fail is done
//! before anything changes, so that a configuration is taken whole or not at all.

use crate::accept::{Door, ListenError};
use crate::channel::Part;
use crate::config::{Config, Fault, ListenConfig, ShareConfig, Source};
use crate::entrance::Entrance;
use crate::fds::Fds;
use crate::fs::{Fs, FsError};
use crate::share::ShareDir;
use crate::status::ConfigState;
use rustix::fs::Mode;
use rustix::process::umask;
use std::collections::BTreeMap;
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
    /// What the worker was to have and cannot, and why. Shares of it are tried by each reload.
    lacks: BTreeMap<Part, String>,
}

/// A share as the parent has it: each worker gets a copy.
pub struct Shared {
    /// As it was told.
    pub config: ShareConfig,
    /// What it gives.
    pub dir: ShareDir,
}

/// What a worker has to be told.
pub enum Change {
    /// A share is new, or another one of its name.
    Share(Box<Shared>),
    /// One is no more.
    ShareGone {
        /// What guests called it.
        name: String,
        /// Its sessions end.
        ends_sessions: bool,
    },
    /// From which time on a request is slow; 0: none is.
    Slow(Duration),
}

/// Opens a directory that is to be shared; tried once, so that what can never be served is said.
///
/// # Errors
/// See [`FsError`].
pub fn open_share(config: &ShareConfig, fds: &Arc<Fds>) -> Result<Shared, FsError> {
    let dir = ShareDir::open(&config.path, config.submounts, config.ro)?;
    let root = dir.root().map_err(FsError::Root)?;
    // The crate clears the umask, which is of the whole process.
    let told = umask(Mode::RWXG | Mode::RWXO);
    let tried = Fs::on(root, config.options(fds));
    umask(told);
    tried?;
    Ok(Shared { config: config.clone(), dir })
}

impl InForce {
    /// What the daemon has started with.
    pub fn new(source: Source, config: Config, fds: Arc<Fds>) -> InForce {
        let file = source.file().map(ToOwned::to_owned);
        let pid = std::process::id();
        let state = ConfigState { file, loaded_unix_s: now_unix_s(), pid, ..Default::default() };
        InForce { source, config, fds, state, lacks: BTreeMap::new() }
    }

    /// A worker that runs cannot have something that is in force.
    pub fn worker_lacks(&mut self, part: Part, why: String) {
        tracing::error!("the worker is without {part}: {why}");
        self.lacks.insert(part, why);
    }

    /// It has it after all, or is not to have it any more.
    pub fn worker_is_well(&mut self, part: &Part) {
        self.lacks.remove(part);
    }

    /// Another worker, which lacks nothing yet.
    pub fn next_worker(&mut self) {
        self.lacks.clear();
    }

    /// For people and tools: what is in force, and what became of the last reload.
    pub fn state(&self, entrances: &[Entrance]) -> ConfigState {
        let guests = entrances.iter().filter(|one| one.door() == Door::Guests);
        let listeners = guests.map(|one| one.config().address.to_string()).collect();
        let lacks = self.lacks.iter().map(|(part, why)| format!("{part} ({why})")).collect();
        ConfigState { listeners, lacks, ..self.state.clone() }
    }

    /// One line, for a service manager's status.
    pub fn summary(&self) -> String {
        let shares = self.config.shares.len();
        match self.state.errors.first() {
            Some(error) => format!("{shares} shares; THE LAST RELOAD FAILED: {error}"),
            None => format!("{shares} shares"),
        }
    }

    /// Reads the configuration again; what the worker is to be told, besides the new state. If
    /// anything is wrong with it the old one stays in force. Either way the log is told.
    pub fn reload(&mut self, entrances: &mut Vec<Entrance>) -> Vec<Change> {
        self.state.reloads += 1;
        match self.take(entrances) {
            Ok((changed, changes)) => {
                let waits = &self.state.needs_restart;
                tracing::info!(?changed, "configuration reloaded");
                if !waits.is_empty() {
                    tracing::warn!("not before the next start: {}", waits.join(", "));
                }
                self.state.changed = changed;
                self.state.loaded_unix_s = now_unix_s();
                (self.state.failed_unix_s, self.state.errors) = (None, Vec::new());
                changes
            }
            Err(error) => {
                tracing::error!("the old configuration stays in force: {error}");
                self.state.failed_unix_s = Some(now_unix_s());
                self.state.errors = match error {
                    ReloadError::Config(faults) => faults.iter().map(Fault::to_string).collect(),
                    other => vec![other.to_string()],
                };
                Vec::new()
            }
        }
    }

    /// Reads the configuration and opens the shares that are new in it, or that the worker lacks.
    /// On a thread of its own: a file system that does not answer must not keep the parent from
    /// accepting.
    fn read(&self) -> Result<(Config, Vec<Shared>), ReloadError> {
        let (source, fds) = (self.source.clone(), self.fds.clone());
        let lacks = |share: &ShareConfig| self.lacks.contains_key(&Part::Share(share.name.clone()));
        let known = self.config.shares.iter().filter(|share| !lacks(share));
        let known: Vec<_> = known.cloned().collect();
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
        entrances: &mut Vec<Entrance>,
    ) -> Result<(Vec<String>, Vec<Change>), ReloadError> {
        let (new, opened) = self.read()?;
        let old = &self.config;
        let at = |listen: &ListenConfig, all: &[ListenConfig]| {
            all.iter().any(|one| one.address == listen.address)
        };
        let bound = |listen: &ListenConfig| {
            entrances.iter().any(|one| one.config().address == listen.address)
        };
        let mut opened_entrances = Vec::new();
        for listen in new.listen.iter().filter(|listen| !bound(listen)) {
            opened_entrances.push(Entrance::open(Door::Guests, listen)?);
        }
        // Nothing fails from here on.
        let (mut changed, mut changes) = (Vec::new(), Vec::new());
        for share in opened {
            let name = &share.config.name;
            let how = match old.shares.iter().find(|old| old.name == *name) {
                None => "new",
                Some(old) if *old == share.config => "once more",
                Some(_) => "changed",
            };
            changed.push(format!("{how} share {name}"));
            changes.push(Change::Share(Box::new(share)));
        }
        let gone = old.shares.iter().filter(|old| !new.shares.iter().any(|s| s.name == old.name));
        for share in gone {
            changed.push(format!("removed share {}", share.name));
            let ends_sessions = new.drop_removed;
            changes.push(Change::ShareGone { name: share.name.clone(), ends_sessions });
        }
        let is_guests = |one: &Entrance| one.door() == Door::Guests;
        for one in &opened_entrances {
            one.say_listening();
            changed.push(format!("new listener {}", one.config().address));
        }
        entrances.retain(|one| {
            let stays = !is_guests(one) || one.is_passed() || at(one.config(), &new.listen);
            if !stays {
                changed.push(format!("removed listener {}", one.config().address));
            }
            stays
        });
        for one in entrances.iter_mut().filter(|one| is_guests(one)) {
            let told = new.listen.iter().find(|told| told.address == one.config().address);
            if let Some(told) = told.filter(|told| *told != one.config()) {
                changed.push(format!("changed listener {}", told.address));
                one.change(told);
            }
        }
        entrances.extend(opened_entrances);
        if old.slow_op != new.slow_op {
            changed.push(format!("slow-op {} ms", new.slow_op.as_millis()));
            changes.push(Change::Slow(new.slow_op));
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
            nodes_with_fd: old.nodes_with_fd,
            log: old.log.clone(),
            log_format: old.log_format,
            sandbox: old.sandbox,
            subordinate_ids: old.subordinate_ids,
            file_handles: old.file_handles,
            ..new
        };
        Ok((changed, changes))
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
        ("nodes-with-fd", old.nodes_with_fd != new.nodes_with_fd),
        ("log", old.log != new.log),
        ("log-format", old.log_format != new.log_format),
        ("sandbox", old.sandbox != new.sandbox),
        ("subordinate-ids", old.subordinate_ids != new.subordinate_ids),
        ("file-handles", old.file_handles != new.file_handles),
    ];
    differ.iter().filter(|(_, differs)| *differs).map(|(name, _)| (*name).to_owned()).collect()
}

fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
