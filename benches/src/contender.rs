//! Those that are compared: the table of who there is, and which of them this machine can run.
//!
//! Each serves the same directory at a place of its own. A contender that cannot run is left out
//! loudly, never replaced by another.

use crate::server::said;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};

/// How it is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The directory itself.
    Bare,
    /// libfuse's passthrough_ll with cloned fds: the same work without a socket between.
    Local,
    /// A passthrough of ours on the crate `fuser`, with as many threads.
    Fuser,
    /// sshfs to sftp-server over a socket pair.
    Sshfs,
    /// ringfs over a Unix socket.
    Ringfs,
    /// A mount that somebody else made and serves.
    Mounted,
}

/// Who, and with what arguments.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The column's name.
    pub name: String,
    /// How it is started.
    pub kind: Kind,
    /// ringfs: further `-o` options of the mount; empty for none.
    pub options: String,
    /// ringfs: further arguments of the daemon.
    pub daemon_args: Vec<String>,
    /// Needs /sys/module/fuse/parameters/enable_uring.
    pub kernel_uring: bool,
    /// ringfs: where `ringfs` and `ringfsd` are.
    pub bin: PathBuf,
    /// Where it is mounted, if that is done already.
    pub mounted: PathBuf,
    /// Another mount of the same directory, to make files behind its back.
    pub behind: PathBuf,
}

struct Entry {
    name: &'static str,
    kind: Kind,
    options: &'static str,
    daemon_args: &'static [&'static str],
    kernel_uring: bool,
}

const fn plain(name: &'static str, kind: Kind) -> Entry {
    Entry { name, kind, options: "", daemon_args: &[], kernel_uring: false }
}

/// Everybody, in the order of the columns.
const TABLE: &[Entry] = &[
    plain("bare", Kind::Bare),
    plain("local", Kind::Local),
    plain("ringfs", Kind::Ringfs),
    Entry { options: "spin=0", daemon_args: &["--spin", "0"], ..plain(NO_SPIN, Kind::Ringfs) },
    Entry { options: "uring=on", kernel_uring: true, ..plain("ringfs-uring", Kind::Ringfs) },
    plain("fuser", Kind::Fuser),
    plain("sshfs", Kind::Sshfs),
];

/// The contender that ratios are taken to.
pub const BASE: &str = "local";

/// The setting that never spins.
pub const NO_SPIN: &str = "ringfs-nospin";

/// What runs unless it is chosen.
pub const DEFAULT: &str = "bare,local,ringfs,ringfs-nospin,ringfs-uring,fuser,sshfs";
/// The same for --quick.
pub const QUICK: &str = "bare,local,ringfs,ringfs-nospin";

/// The same for --goals.
pub const GOALS: &str = "bare,local,ringfs,ringfs-nospin,ringfs-uring";

/// The contenders by these names, with the programs in `bin`.
pub fn by_names(names: &[String], bin: &Path) -> Result<Vec<Spec>> {
    let known: Vec<&str> = TABLE.iter().map(|entry| entry.name).collect();
    for name in names {
        ensure!(known.contains(&name.as_str()), "no contender `{name}`; there are {known:?}");
    }
    let chosen = TABLE.iter().filter(|entry| names.iter().any(|name| name == entry.name));
    Ok(chosen.map(|entry| entry.spec(entry.name, bin)).collect())
}

/// Whether that name is of one that goals are not set for.
pub fn is_peer(name: &str) -> bool {
    TABLE.iter().any(|entry| entry.name == name && entry.kind != Kind::Ringfs)
}

impl Entry {
    fn spec(&self, name: &str, bin: &Path) -> Spec {
        Spec {
            name: name.to_owned(),
            kind: self.kind,
            options: self.options.to_owned(),
            daemon_args: self.daemon_args.iter().map(|&arg| arg.to_owned()).collect(),
            kernel_uring: self.kernel_uring,
            bin: bin.to_owned(),
            mounted: PathBuf::new(),
            behind: PathBuf::new(),
        }
    }
}

impl Spec {
    /// Reads `LABEL=[DIR][;MOUNT OPTIONS[;DAEMON ARGUMENTS]]`, as `--ab` takes it.
    pub fn parse_ab(text: &str, bin: &Path) -> Result<Spec> {
        let usage = "--ab takes LABEL=[DIR][;MOUNT OPTIONS[;DAEMON ARGUMENTS]]";
        let (name, rest) = text.split_once('=').context(usage)?;
        ensure!(!name.is_empty() && !name.contains(['/', ';', ',']), "{usage}: the label `{name}`");
        let mut parts = rest.splitn(3, ';');
        let dir = parts.next().filter(|dir| !dir.is_empty()).map_or(bin, Path::new);
        let options = parts.next().unwrap_or_default().trim().to_owned();
        let args = parts.next().unwrap_or_default();
        Ok(Spec {
            name: name.to_owned(),
            kind: Kind::Ringfs,
            kernel_uring: options.split(',').any(|option| option == "uring=on"),
            options,
            daemon_args: args.split_whitespace().map(str::to_owned).collect(),
            bin: dir.to_owned(),
            mounted: PathBuf::new(),
            behind: PathBuf::new(),
        })
    }

    /// Reads `NAME=DIR`, as `--mounted` takes it; `behind` shows the same directory.
    pub fn parse_mounted(text: &str, behind: &Path) -> Result<Spec> {
        let usage = "--mounted takes NAME=DIR";
        let (name, dir) = text.split_once('=').context(usage)?;
        ensure!(!name.is_empty() && Path::new(dir).is_absolute(), "{usage}, not `{text}`");
        let (mounted, behind) = (dir.into(), behind.to_owned());
        Ok(Spec { mounted, behind, ..plain("", Kind::Mounted).spec(name, Path::new("")) })
    }

    /// Why it cannot run here; `None` if it can.
    pub fn obstacle(&self, tools: &Tools) -> Option<String> {
        match self.kind {
            Kind::Bare | Kind::Local | Kind::Mounted => None,
            Kind::Fuser if tools.fuser().is_file() => None,
            Kind::Fuser => Some(format!("{:?} is not built (cargo xtask bench does)", tools.peers)),
            Kind::Sshfs if sshfs_version().is_some() && sftp_server().is_some() => None,
            Kind::Sshfs => Some("apt-get install sshfs openssh-sftp-server".into()),
            Kind::Ringfs => self.ringfs_obstacle().err().map(|error| format!("{error:#}")),
        }
    }

    fn ringfs_obstacle(&self) -> Result<()> {
        for program in ["ringfs", "ringfsd"] {
            ensure!(self.bin.join(program).is_file(), "there is no {:?}", self.bin.join(program));
        }
        let help = said(&self.bin.join("ringfs"), &["mount", "--help"]);
        for option in self.options.split(',').filter(|option| !option.is_empty()) {
            let key = option.split_inclusive('=').next().unwrap_or(option);
            ensure!(help.contains(key), "this `ringfs mount` has no option `{key}`");
        }
        let help = said(&self.bin.join("ringfsd"), &["--help"]);
        for arg in self.daemon_args.iter().filter(|arg| arg.starts_with("--")) {
            let key = arg.split('=').next().unwrap_or(arg);
            ensure!(help.contains(key), "this `ringfsd` has no argument `{key}`");
        }
        if self.kernel_uring && !Path::new(ENABLE_URING).exists() {
            bail!("this kernel has no FUSE over io_uring ({ENABLE_URING})");
        }
        Ok(())
    }

    /// Its version, as it says itself.
    pub fn version(&self, tools: &Tools) -> String {
        let first = |text: String, word: &str| {
            let line = text.lines().find(|line| line.contains(word)).unwrap_or("?");
            line.trim().to_owned()
        };
        match self.kind {
            Kind::Bare => "(no program)".into(),
            Kind::Mounted => "(mounted before)".into(),
            Kind::Local => {
                let text = said(&tools.passthrough(), &["--version"]);
                format!("libfuse {}", first(text, "FUSE library version"))
            }
            Kind::Fuser => first(said(&tools.fuser(), &["--version"]), "fuser"),
            Kind::Sshfs => sshfs_version().unwrap_or_default(),
            Kind::Ringfs => first(said(&self.bin.join("ringfsd"), &["--version"]), "ringfs"),
        }
    }
}

/// The kernel's switch for FUSE over io_uring.
pub const ENABLE_URING: &str = "/sys/module/fuse/parameters/enable_uring";

/// Where programs that are not ringfs's are built.
#[derive(Clone, Debug)]
pub struct Tools {
    /// Of this run; removed at its end.
    pub scratch: PathBuf,
    /// The programs of `benches/peers`.
    pub peers: PathBuf,
}

impl Tools {
    /// libfuse's example, once built.
    pub fn passthrough(&self) -> PathBuf {
        self.scratch.join("passthrough_ll")
    }

    /// Our passthrough on the crate `fuser`.
    pub fn fuser(&self) -> PathBuf {
        self.peers.join("peer-fuser")
    }
}

/// What sshfs is, if it is there.
fn sshfs_version() -> Option<String> {
    let text = said(Path::new("sshfs"), &["--version"]);
    text.lines().find(|line| line.contains("SSHFS")).map(str::to_owned)
}

/// OpenSSH's SFTP server.
pub fn sftp_server() -> Option<PathBuf> {
    let places = ["/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server"];
    places.map(PathBuf::from).into_iter().find(|place| place.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ab_is_read() {
        let bin = Path::new("/bins");
        let spec = Spec::parse_ab("new=/other;spin=0,lanes=2;--spin 0", bin).unwrap();
        assert_eq!((spec.name.as_str(), spec.bin.as_path()), ("new", Path::new("/other")));
        assert_eq!((spec.options.as_str(), spec.daemon_args.len()), ("spin=0,lanes=2", 2));
        let spec = Spec::parse_ab("old=", bin).unwrap();
        assert_eq!((spec.bin.as_path(), spec.options.as_str()), (bin, ""));
        assert!(Spec::parse_ab("x=;uring=on", bin).unwrap().kernel_uring);
        for wrong in ["", "nodir", "=/x", "a/b=/x"] {
            assert!(Spec::parse_ab(wrong, bin).is_err(), "{wrong}");
        }
    }

    #[test]
    fn mounted_is_read() {
        let behind = Path::new("/mnt/behind");
        let spec = Spec::parse_mounted("9p=/mnt/9p", behind).unwrap();
        assert_eq!((spec.name.as_str(), spec.kind), ("9p", Kind::Mounted));
        assert_eq!((spec.mounted.as_path(), spec.behind.as_path()), (Path::new("/mnt/9p"), behind));
        for wrong in ["", "9p", "=/mnt", "9p=relative"] {
            assert!(Spec::parse_mounted(wrong, behind).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_are_checked_and_keep_the_tables_order() {
        let names = |text: &str| -> Vec<String> { text.split(',').map(str::to_owned).collect() };
        let specs = by_names(&names("ringfs,bare"), Path::new("/b")).unwrap();
        assert_eq!(
            specs.iter().map(|spec| spec.kind).collect::<Vec<_>>(),
            [Kind::Bare, Kind::Ringfs]
        );
        assert!(by_names(&names("bare,nobody"), Path::new("/b")).is_err());
        for list in [DEFAULT, QUICK] {
            by_names(&names(list), Path::new("/b")).unwrap();
        }
    }
}
