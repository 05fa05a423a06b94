//! What the daemon is told: one set of settings, filled by a file and by the command line.
//!
//! [`Settings`] is both: the same field is a key of `ringfsd.toml` and an option of `ringfsd`, and
//! its documentation is the help text. What is not said is `None`, so that one layer can stand over
//! another; [`Config`] is what is in force, with everything decided and checked once. Invariant:
//! what `ringfsd check-config` prints, read again, is the same configuration.
//!
//! A new setting is a field of `Settings`, its default ([`Settings::defaults`]), a line of
//! [`Settings::over`] and its place in `Config`; one of a share or a listener is a field of
//! [`ShareConfig`] or [`ListenConfig`] (config/entry.rs) alone.

mod entry;
mod fault;
mod written;

pub use entry::{
    DirectIo, Engine, FileMode, IoPriority, ListenConfig, LogFormat, MetricsAddress, ShareConfig,
};
pub use fault::{Fault, What};
pub use written::Place;

use crate::address::Address;
use crate::limits::{GRACE_SECS_DEFAULT, NODES_WITH_FD_DEFAULT, SLOW_OP_MS_DEFAULT};
use crate::quota::Limits;
use crate::sandbox::Sandbox;
use ringfs_wire::spin::SPIN_TRIES_DEFAULT;
use rustix::thread::CpuSet;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The file that is read where no other is named and the command line shares nothing.
pub const FILE_DEFAULT: &str = "/etc/ringfs/ringfsd.toml";

/// What one layer says.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Settings {
    /// CPUs to serve on, such as 0-3,8; at most those that the process may use. [default: all of
    /// them; a thread on each, fewer where the control group's CPU quota is smaller]
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,
    /// Priority on the CPU, -20 (first) to 19 (last), as nice(1) has it.
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub nice: Option<i32>,
    /// Priority on the disk, as ionice(1) has it.
    #[arg(long, value_name = "idle|be:N|rt:N")]
    pub ioprio: Option<IoPriority>,
    /// How files and sockets are driven. [default: uring]
    #[arg(long, value_enum)]
    pub engine: Option<Engine>,
    /// How often a thread that has just served looks for more, giving its CPU away in between,
    /// before it sleeps. 0: it sleeps at once, which costs the least CPU and more time a request.
    /// An idle daemon sleeps either way. [default: 100]
    #[arg(long, value_name = "N")]
    pub spin: Option<u32>,
    /// How long the session of a guest that has lost its connections is kept, so that it can go on
    /// where it was cut: its files stay open and its nodes known. 0: it ends with the last
    /// connection. [default: 600]
    #[arg(long, value_name = "SECONDS")]
    pub grace: Option<u32>,
    /// Directory in memory (a tmpfs) that tells the next daemon which requests were running if this
    /// one is killed, so that none is lost or done twice. Of this daemon alone: it is made with
    /// mode 0700, and another daemon that names it ends at once. none: there is none. [default: one
    /// below /run/ringfsd, by the listeners]
    #[arg(long, value_name = "DIR|none")]
    pub state_dir: Option<Place>,
    /// Unix socket of mode 0600 by which `ringfsd status` and `reload` ask this daemon. none: there
    /// is none. [default: one below /run/ringfsd, by the process]
    #[arg(long, value_name = "PATH|none")]
    pub control: Option<Place>,
    /// Metrics for Prometheus over HTTP, by a Unix socket of mode 0600 or an address that only this
    /// machine reaches.
    #[arg(long, value_name = "unix:PATH|tcp:127.0.0.1:PORT")]
    pub metrics: Option<MetricsAddress>,
    /// A request that takes so long is told in the log and by `ringfsd status`: whose, where it ran
    /// and waited. 0: none is. [default: 1000]
    #[arg(long, value_name = "MILLISECONDS")]
    pub slow_op: Option<u32>,
    /// Inodes that have an fd of the daemon's though nobody has them open. Where guests know more,
    /// those that were not used for the longest time have none: each takes a fifth of the memory,
    /// and is found again on its next use. [default: 20000]
    #[arg(long, value_name = "N")]
    pub nodes_with_fd: Option<usize>,
    /// How much is logged: error, warn, info, debug or trace, also by module as RUST_LOG has it
    /// (info,ringfs_server::join=debug). [default: what RUST_LOG says, or info]
    #[arg(long, value_name = "LEVEL")]
    pub log: Option<String>,
    /// How it is written. [default: text]
    #[arg(long, value_enum)]
    pub log_format: Option<LogFormat>,
    /// What the process that serves guests is kept from. namespace: it sees the shares and nothing
    /// else of the host, in namespaces of its own, with few capabilities and system calls
    /// (docs/security.md); who is not root has them by a user namespace. landlock: the same without
    /// namespaces, for containers that have none. none: it has the rights that the daemon was
    /// started with. [default: namespace]
    #[arg(long, value_enum)]
    pub sandbox: Option<Sandbox>,
    /// Guests' users are those that the host lends to the daemon's (/etc/subuid, /etc/subgid, and
    /// the program newuidmap): root in a guest is the daemon's user, its user N the N-th that is
    /// lent. For a daemon that is not root; without it all that guests make is its user's.
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub subordinate_ids: Option<bool>,
    /// Whether the process that serves guests may open files by their handles, which finds those
    /// again that were renamed while they had no fd. Whoever took that process over could so reach
    /// any file of the file systems that the shares lie on; without, he cannot.
    /// [default: true]
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub file_handles: Option<bool>,
    /// A share that a reload removes takes its sessions with it; otherwise they go on until they
    /// are unmounted.
    #[arg(long, num_args = 0..=1, default_missing_value = "true")]
    pub drop_removed: Option<bool>,
    /// What each share and each of its sessions may use, where the share says nothing else.
    #[arg(skip)]
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
    /// Where guests connect. May be given several times.
    ///
    /// With stars in its directories, as unix:/srv/vm/*/v.sock_5640, a PATH is a socket in each of
    /// them, which comes and goes with the directory. Options: mode=0660, owner=, group= of the
    /// socket (by default it is for its owner alone, for its group too where that is given, for all
    /// where a list says who may connect); who may connect, by allow-uid=, allow-gid=, allow-pid=
    /// (Unix) and allow-cid= (vsock), numbers with a + between them; shares=a+b: nothing else is
    /// offered there.
    #[arg(long, value_name = "unix:PATH|vsock:[CID:]PORT[,OPTION...]", display_order = 0)]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub listen: Vec<ListenConfig>,
    /// Directory to share, and the name that guests mount it by. May be given several times.
    ///
    /// Options: ro (guests may not change it); direct_io=pass (a guest's O_DIRECT reaches the
    /// host's disk; by default, buffered, it bypasses the guest's cache only); submounts=merge
    /// (what is mounted below DIR on the host is seen; by default, hide, the directory underneath
    /// is); dev (guests may make device nodes, which no guest can open through the share); nosuid
    /// (no set-id bits or file capabilities from guests); acl (POSIX ACLs, for mounts that ask for
    /// them).
    ///
    /// Whose files: uid-map=RULE, gid-map=RULE (map:GUEST:HOST:COUNT and others) and xattr-map=RULE
    /// give users, groups and extended attributes other names on the host (docs/operations.md).
    ///
    /// Limits of each session: ops=N and bytes=N a second, in-flight=N (bytes of replies),
    /// open-files=N, nodes=N (inodes known); of all sessions together: total-ops=N, total-bytes=N,
    /// total-open-files=N. Numbers may end in K, M or G. Rates delay, the others refuse (ENFILE).
    #[arg(long = "share", value_name = "NAME=DIR[,OPTION...]", display_order = 0)]
    #[serde(default, rename = "share", with = "entry::by_name")]
    pub shares: Vec<ShareConfig>,
}

/// All that is in force, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What to share.
    pub shares: Vec<ShareConfig>,
    /// Where to listen.
    pub listen: Vec<ListenConfig>,
    /// CPUs to use; all that are allowed by default.
    pub cpus: Option<Vec<usize>>,
    /// Priority on the CPU.
    pub nice: Option<i32>,
    /// Priority on the disk.
    pub ioprio: Option<IoPriority>,
    /// How files and sockets are driven.
    pub engine: Engine,
    /// Looks for input before a thread sleeps; 0: none.
    pub spin: u32,
    /// How long a session without connections is kept.
    pub grace: Duration,
    /// Where what is known of sessions outlives this daemon.
    pub state_dir: Place,
    /// The control socket.
    pub control: Place,
    /// Where metrics are told.
    pub metrics: Option<Address>,
    /// From when on a request is slow; 0: never.
    pub slow_op: Duration,
    /// Inodes that have an fd though nobody has them open.
    pub nodes_with_fd: usize,
    /// What is logged.
    pub log: Option<String>,
    /// And how.
    pub log_format: LogFormat,
    /// What a worker is kept from.
    pub sandbox: Sandbox,
    /// A worker has the ids that are lent to the daemon's user.
    pub subordinate_ids: bool,
    /// A worker may open files by their handles.
    pub file_handles: bool,
    /// Sessions of a share that is removed end.
    pub drop_removed: bool,
}

/// A list such as `0-3,8`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

impl Settings {
    /// What holds where nobody says anything.
    pub fn defaults() -> Settings {
        Settings {
            engine: Some(Engine::Uring),
            spin: Some(SPIN_TRIES_DEFAULT),
            grace: Some(GRACE_SECS_DEFAULT),
            slow_op: Some(SLOW_OP_MS_DEFAULT),
            nodes_with_fd: Some(NODES_WITH_FD_DEFAULT),
            log_format: Some(LogFormat::Text),
            sandbox: Some(Sandbox::Namespace),
            subordinate_ids: Some(false),
            file_handles: Some(true),
            drop_removed: Some(false),
            ..Settings::default()
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn read(path: &Path) -> Result<Settings, Fault> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|source| Fault::of(path, 0, What::Read(source)))?;
        toml::from_str(&text).map_err(|error| fault::of_toml(path, &text, &error))
    }

    /// This layer over another: what it says wins, its listeners come in addition, its shares in
    /// addition or in place of those of the same name.
    #[must_use]
    pub fn over(self, base: Settings) -> Settings {
        let mut shares = base.shares;
        shares.retain(|old| !self.shares.iter().any(|new| new.name == old.name));
        shares.extend(self.shares);
        let mut listen = base.listen;
        listen.extend(self.listen);
        Settings {
            cpus: self.cpus.or(base.cpus),
            nice: self.nice.or(base.nice),
            ioprio: self.ioprio.or(base.ioprio),
            engine: self.engine.or(base.engine),
            spin: self.spin.or(base.spin),
            grace: self.grace.or(base.grace),
            state_dir: self.state_dir.or(base.state_dir),
            control: self.control.or(base.control),
            metrics: self.metrics.or(base.metrics),
            slow_op: self.slow_op.or(base.slow_op),
            nodes_with_fd: self.nodes_with_fd.or(base.nodes_with_fd),
            log: self.log.or(base.log),
            log_format: self.log_format.or(base.log_format),
            sandbox: self.sandbox.or(base.sandbox),
            subordinate_ids: self.subordinate_ids.or(base.subordinate_ids),
            file_handles: self.file_handles.or(base.file_handles),
            drop_removed: self.drop_removed.or(base.drop_removed),
            limits: self.limits.or(base.limits),
            listen,
            shares,
        }
    }

    /// Decides what is not said, and checks how things go together.
    ///
    /// # Errors
    /// All that is wrong; `file` is where the places are looked for. `has_sockets`: there need not
    /// be an address to listen on.
    pub fn check(self, file: Option<&Path>, has_sockets: bool) -> Result<Config, Vec<Fault>> {
        let settings = self.over(Settings::defaults());
        let mut faults = settings.faults();
        if settings.listen.is_empty() && !has_sockets {
            faults.push(What::NoListener);
        }
        if !faults.is_empty() {
            let text = file.and_then(|path| Some((path, std::fs::read_to_string(path).ok()?)));
            return Err(faults.into_iter().map(|what| what.find_in(&text)).collect());
        }
        let mut shares = settings.shares;
        shares.iter_mut().for_each(|share| share.limits = share.limits.or(settings.limits));
        Ok(Config {
            shares,
            listen: settings.listen,
            cpus: settings.cpus.map(|list| list.0),
            nice: settings.nice,
            ioprio: settings.ioprio,
            engine: settings.engine.unwrap_or_default(),
            spin: settings.spin.unwrap_or_default(),
            grace: Duration::from_secs(settings.grace.unwrap_or_default().into()),
            state_dir: settings.state_dir.unwrap_or_default(),
            control: settings.control.unwrap_or_default(),
            metrics: settings.metrics.map(|metrics| metrics.0),
            slow_op: Duration::from_millis(settings.slow_op.unwrap_or_default().into()),
            nodes_with_fd: settings.nodes_with_fd.unwrap_or(NODES_WITH_FD_DEFAULT),
            log: settings.log,
            log_format: settings.log_format.unwrap_or_default(),
            sandbox: settings.sandbox.unwrap_or_default(),
            subordinate_ids: settings.subordinate_ids.unwrap_or_default(),
            file_handles: settings.file_handles.unwrap_or(true),
            drop_removed: settings.drop_removed.unwrap_or_default(),
        })
    }

    fn faults(&self) -> Vec<What> {
        let mut faults = Vec::new();
        if self.shares.is_empty() {
            faults.push(What::NoShare);
        }
        if let Some(log) = &self.log
            && let Err(error) = log.parse::<tracing_subscriber::EnvFilter>()
        {
            faults.push(What::Log { log: log.clone(), why: error.to_string() });
        }
        let mut names = HashSet::new();
        for share in &self.shares {
            let name = share.name.clone();
            if let Err(why) = share.check_name() {
                faults.push(What::ShareName { name: name.clone(), why });
            }
            if let Err(why) = share.ids() {
                faults.push(What::ShareIds { name: name.clone(), why });
            }
            let meta = std::fs::metadata(&share.path);
            let is_dir = meta.and_then(|meta| match meta.is_dir() {
                true => Ok(()),
                false => Err(std::io::ErrorKind::NotADirectory.into()),
            });
            if !names.insert(&share.name) {
                faults.push(What::ShareTwice(name));
            } else if let Err(source) = is_dir {
                let (path, hint) = (share.path.clone(), share.unknown_option());
                faults.push(What::Share { name, path, source, hint });
            }
        }
        let mut addresses: Vec<&Address> = Vec::new();
        for listen in &self.listen {
            if addresses.contains(&&listen.address) {
                faults.push(What::ListenTwice(listen.address.clone()));
            }
            addresses.push(&listen.address);
            for share in listen.shares.iter().filter(|share| !names.contains(share)) {
                let (address, share) = (listen.address.clone(), share.clone());
                faults.push(What::ListenShare { address, share });
            }
        }
        faults
    }

    /// As a file that says the same.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_else(|error| format!("# cannot be written: {error}\n"))
    }
}

/// Where settings come from: told once, read at the start and at each reload.
#[derive(Clone, Debug)]
pub struct Source {
    file: Option<PathBuf>,
    command_line: Settings,
    /// Where to listen may be said otherwise.
    has_sockets: bool,
}

impl Source {
    /// `file` is the one that was named. Where none was and the command line shares nothing, the
    /// default one is read.
    pub fn new(file: Option<PathBuf>, command_line: Settings) -> Source {
        let default = Path::new(FILE_DEFAULT);
        let file = file.or_else(|| {
            (command_line.shares.is_empty() && default.exists()).then(|| default.to_owned())
        });
        Source { file, command_line, has_sockets: false }
    }

    /// Somebody passes sockets to listen on (systemd.rs), so that none need be configured.
    #[must_use]
    pub fn with_sockets(self, has_sockets: bool) -> Source {
        Source { has_sockets, ..self }
    }

    /// The file, where there is one.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// What both say together, with the defaults.
    ///
    /// # Errors
    /// What is wrong with the file's text.
    pub fn settings(&self) -> Result<Settings, Vec<Fault>> {
        let base = match &self.file {
            Some(path) => Settings::read(path).map_err(|fault| vec![fault])?,
            None => Settings::default(),
        };
        Ok(self.command_line.clone().over(base).over(Settings::defaults()))
    }

    /// What is to be in force.
    ///
    /// # Errors
    /// All that is wrong.
    pub fn config(&self) -> Result<Config, Vec<Fault>> {
        self.settings()?.check(self.file(), self.has_sockets)
    }
}

impl std::str::FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<CpuList, String> {
        let bad = |_| format!("{text:?} is no list of CPUs such as 0-3,8");
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: usize = first.trim().parse().map_err(bad)?;
            let last: usize = last.trim().parse().map_err(bad)?;
            if first > last || last >= CpuSet::MAX_CPU {
                return Err(format!("{part:?} is no range of CPUs"));
            }
            cpus.extend(first..=last);
        }
        cpus.sort_unstable();
        cpus.dedup();
        Ok(CpuList(cpus))
    }
}

impl std::fmt::Display for CpuList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let runs = self.0.chunk_by(|a, b| a + 1 == *b);
        let runs = runs.filter_map(|run| Some((run.first()?, run.last()?)));
        let runs = runs.map(|(first, last)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        });
        f.write_str(&runs.collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Settings, Fault> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("ringfsd.toml");
        std::fs::write(&path, text).expect("write");
        Settings::read(&path)
    }

    const WHOLE: &str = r#"
cpus = "0-1,3"
engine = "threads"
spin = 7
grace = 9
state-dir = "none"
control = "/run/c"

[[listen]]
address = "unix:/run/s"

[[listen]]
address = "vsock:3:5640"

[share.src]
path = "/"
ro = true
direct-io = "pass"
submounts = "merge"
dev = true

[share.docs]
path = "/usr"
"#;

    #[test]
    fn what_is_printed_is_the_same_configuration() {
        for text in [WHOLE, "", "[share.a]\npath = \"/\"\n"] {
            let settings = read(text).expect("a configuration").over(Settings::defaults());
            let printed = settings.to_toml();
            let again = read(&printed).unwrap_or_else(|fault| panic!("{fault}\n{printed}"));
            assert_eq!((again.to_toml(), again), (printed, settings));
        }
    }

    #[test]
    fn the_command_line_stands_over_the_file() {
        let words = ["ringfsd", "--spin=3", "--share", "docs=/,ro", "--listen", "unix:/x"];
        let line = <Settings as clap::Args>::augment_args(clap::Command::new("ringfsd"));
        let line = line.try_get_matches_from(words).expect("arguments");
        let line = <Settings as clap::FromArgMatches>::from_arg_matches(&line).expect("settings");
        let config =
            line.over(read(WHOLE).expect("a configuration")).check(None, false).expect("good");
        assert_eq!((config.spin, config.grace), (3, Duration::from_secs(9)));
        let shares: Vec<_> = config.shares.iter().map(|s| (&*s.name, s.ro, &*s.path)).collect();
        assert_eq!(shares, [("src", true, Path::new("/")), ("docs", true, Path::new("/"))]);
        assert_eq!(config.listen.len(), 3);
        assert_eq!(config.cpus, Some(vec![0, 1, 3]));
    }

    #[test]
    fn what_is_wrong_has_a_line_and_a_remedy() {
        let check = |text: &str, line: usize, says: &[&str]| {
            let fault = match read(text) {
                Err(fault) => fault,
                Ok(settings) => {
                    let dir = tempfile::tempdir().expect("a temporary directory");
                    let path = dir.path().join("ringfsd.toml");
                    std::fs::write(&path, text).expect("write");
                    settings.check(Some(&path), false).expect_err(text).remove(0)
                }
            };
            let said = fault.to_string();
            assert_eq!(fault.line, line, "{said}");
            assert!(says.iter().all(|words| said.contains(words)), "{said}");
        };
        check("spin = 1\ngrce = 2\n", 2, &["`grce`", "did you mean `grace`?"]);
        check("state_dir = \"none\"\n", 1, &["did you mean `state-dir`?"]);
        check("[share.a]\npath = \"/\"\nr0 = true\n", 3, &["did you mean `ro`?"]);
        check("[share.a]\npath = \"/\"\n\nfrobnicate = 1\n", 4, &["known here: ", "`submounts`"]);
        check("[shares.a]\npath = \"/\"\n", 1, &["did you mean `share`?"]);
        check("[[listen]]\naddress = \"tcp:1\"\n", 2, &["unix:PATH"]);
        check("[[listen]]\nadress = \"vsock:1\"\n", 2, &["did you mean `address`?"]);
        check("spin = \"x\"\n", 1, &["expected u32"]);
        check("\ncpus = \"3-1\"\n", 2, &["no range of CPUs"]);
        check("engine = \"urin\"\n", 1, &["did you mean `uring`?"]);
        check("[share.a]\nro = true\n", 1, &["missing field `path`"]);
        check("spin = 1\nspin = 2\n", 2, &["duplicate key"]);
        check("[share.a\n", 1, &["unclosed table"]);
        let listen = "[[listen]]\naddress = \"vsock:1\"\n";
        check(&format!("{listen}\n[share.a]\npath = \"/none\"\n"), 4, &["\"a\"", "No such file"]);
        check(&format!("{listen}\n[share.\"a/b\"]\npath = \"/\"\n"), 4, &["no / or @"]);
        check(&format!("{listen}{listen}[share.a]\npath=\"/\"\n"), 3, &["given twice"]);
        check("metrics = \"tcp:0.0.0.0:1\"\n", 1, &["can be reached by others"]);
        let whole = format!("log = \"a=b=c\"\n{listen}[share.a]\npath=\"/\"\n");
        check(&whole, 1, &["says not what to log: error parsing"]);
        check(listen, 0, &["nothing to share"]);
        check("[share.a]\npath = \"/\"\n", 0, &["nowhere to listen"]);
    }

    #[test]
    fn cpu_lists() {
        let parse = |text: &str| text.parse::<CpuList>();
        assert_eq!(parse("0-2,5, 1"), Ok(CpuList(vec![0, 1, 2, 5])));
        for bad in ["", "x", "3-1", "0-99999999", "-1", "1,,2"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        for list in ["0", "0-3", "0-1,3,5-9"] {
            assert_eq!(parse(list).map(|list| list.to_string()), Ok(list.to_owned()));
        }
    }
}
