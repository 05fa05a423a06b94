//! `ringfs doctor [SOURCE]`: what this machine lacks for a mount, and how to get it.
//!
//! Invariant: it changes nothing. What is asked of a daemon is one HELLO, and its session is given
//! back at once; no mount point is touched. A check that cannot be made says so as a warning.

use crate::begin;
use crate::mount_cmd::{Failure, Request};
use crate::options::{Options, Uring};
use crate::transport::{Address, Target};
use fuser_fork::mountinfo::FS_TYPE;
use ringfs_wire::hello::{VERSION_MAX, VERSION_MIN};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Older kernels may work; these were tried.
const TRIED_FROM: (u32, u32) = (6, 1);
/// Lanes, clones, sockets and rings of one mount.
const FILES_WANTED: u64 = 128;
/// Number 229 of the miscellaneous devices, 10.
const FUSE_DEVICE: u64 = 10 << 8 | 229;
/// Of what was found, as people get it; a word that is longer stands in a line of its own.
const COLUMNS_MAX: usize = 100;
/// `VMADDR_CID_HOST`, and what a machine has without a transport.
const HOST_CID: u32 = 2;
const NO_CID: u32 = u32::MAX;

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Something will not work, or not as well.
    Warn,
    /// No mount without it.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it went.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub fix: Option<String>,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// Nothing failed.
    pub ok: bool,
    /// Of this program.
    pub version: &'static str,
    /// Wire versions that it speaks.
    pub wire: (u16, u16),
    /// In the order in which a mount needs them.
    pub checks: Vec<Check>,
}

fn check(name: &'static str, level: Level, found: impl Into<String>, fix: &str) -> Check {
    let fix = Some(fix.to_owned()).filter(|fix| !fix.is_empty());
    Check { name, level, found: found.into(), fix }
}

fn ok(name: &'static str, found: impl Into<String>) -> Check {
    check(name, Level::Ok, found, "")
}

/// Looks at this machine, and at the daemon of `source`.
pub fn examine(source: Option<&Target>, options: &Options) -> Findings {
    let machine =
        Machine { root: PathBuf::from("/"), is_root: rustix::process::geteuid().is_root() };
    let wants_vsock = source.map(|source| matches!(source.address, Address::Vsock { .. }));
    let mut checks = vec![
        machine.kernel(&rustix::system::uname().release().to_string_lossy()),
        machine.fuse(),
        machine.device(),
        machine.rights(),
        machine.allow_other(),
        machine.helper(),
        machine.rings(options.uring),
        files(),
        machine.vsock(wants_vsock, local_cid()),
    ];
    if let Some(source) = source {
        checks.push(daemon(source, options));
    }
    let ok = checks.iter().all(|check| check.level != Level::Fail);
    Findings { ok, version: env!("CARGO_PKG_VERSION"), wire: (VERSION_MIN, VERSION_MAX), checks }
}

/// The text for people.
pub fn render(findings: &Findings) -> String {
    let mut text = String::new();
    for Check { name, level, found, fix } in &findings.checks {
        let word = match level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        wrap(&mut text, &format!("{word:<5} {name:<12} "), found);
        if let Some(fix) = fix {
            // In one line, however long: there may be commands in it to be copied.
            let _ = writeln!(text, "{:<5} {:<12} -> {fix}", "", "");
        }
    }
    let count = |level| findings.checks.iter().filter(|check| check.level == level).count();
    let (failed, warned) = (count(Level::Fail), count(Level::Warn));
    let (version, (min, max)) = (findings.version, findings.wire);
    let _ = writeln!(text, "ringfs {version}, wire {min} to {max}: {failed} fail, {warned} warn");
    text
}

/// Writes the words of `said` behind `head`, in as many lines as it takes, of which those after the
/// first are indented as far.
fn wrap(text: &mut String, head: &str, said: &str) {
    let (indent, mut column) = (head.chars().count(), 0);
    for word in said.split(' ') {
        let width = word.chars().count();
        if column == 0 {
            text.push_str(head);
            column = indent;
        } else if column + 1 + width > COLUMNS_MAX {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent));
            column = indent;
        } else {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += width;
    }
    text.push('\n');
}

fn local_cid() -> Option<u32> {
    vsock::get_local_cid().ok().filter(|&cid| cid != NO_CID)
}

fn files() -> Check {
    match getrlimit(Resource::Nofile).current {
        Some(files) if files < FILES_WANTED => check(
            "open files",
            Level::Warn,
            format!(
                "the limit is {files}, a mount with 8 lanes and rings uses up to {FILES_WANTED}"
            ),
            "ulimit -n 1024, or fewer lanes (-o lanes=2)",
        ),
        Some(files) => ok("open files", format!("at most {files}")),
        None => ok("open files", "no limit"),
    }
}

fn daemon(target: &Target, options: &Options) -> Check {
    let mut options = options.clone();
    (options.lanes, options.slots) = (Some(1), 1);
    let (target, mountpoint, lists) = (target.clone(), PathBuf::new(), Vec::new());
    let request = Request { target, mountpoint, options, lists };
    let target = &request.target;
    let begun = Instant::now();
    match begin::probe(&request) {
        Ok(welcome) => ok(
            "daemon",
            format!(
                "{} gives `{}`: wire version {}, {:.1} ms to connect and to say hello",
                target.address,
                target.share,
                welcome.version,
                begun.elapsed().as_secs_f64() * 1e3
            ),
        ),
        Err(failure) => {
            let fix = match &failure {
                Failure::Connect(_) => {
                    "on the host: is ringfsd running, and listening there for this user (`ringfsd \
                     --listen ..,owner=`; its log has each socket's mode and owner)?"
                }
                // The words of the handshake name their cure.
                _ => "",
            };
            let found = format!("{:#}", anyhow::Error::from(failure));
            check("daemon", Level::Fail, found, fix)
        }
    }
}

/// What is looked at below a root, so that tests can have another.
struct Machine {
    root: PathBuf,
    is_root: bool,
}

impl Machine {
    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn text(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap_or_default()
    }

    fn kernel(&self, release: &str) -> Check {
        let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        let mut lacks = Vec::new();
        for (since, what) in [
            ((6, 3), "callers' groups come with the request"),
            ((6, 6), "times of birth"),
            ((6, 14), "FUSE-over-io_uring"),
        ] {
            if version < since {
                lacks.push(format!("{what} ({}.{})", since.0, since.1));
            }
        }
        let lacks = match lacks.is_empty() {
            true => String::new(),
            false => format!("; works without: {}", lacks.join(", ")),
        };
        match version < TRIED_FROM {
            true => check(
                "kernel",
                Level::Warn,
                format!("Linux {release}{lacks}"),
                "ringfs is tested on Linux 6.1 and later",
            ),
            false => ok("kernel", format!("Linux {release}{lacks}")),
        }
    }

    fn fuse(&self) -> Check {
        let known = self.text("/proc/filesystems");
        if known.is_empty() {
            return check(
                "fuse",
                Level::Warn,
                "/proc/filesystems cannot be read",
                "mount -t proc proc /proc (callers' groups and interrupts need it too)",
            );
        }
        match known.lines().any(|line| line.split_whitespace().last() == Some("fuse")) {
            true => ok("fuse", "the kernel knows FUSE"),
            false => check(
                "fuse",
                Level::Fail,
                "the kernel knows no FUSE file system",
                "modprobe fuse; without such a module: a kernel with CONFIG_FUSE_FS",
            ),
        }
    }

    fn device(&self) -> Check {
        const NAME: &str = "/dev/fuse";
        let path = self.at(NAME);
        match File::options().read(true).write(true).open(&path) {
            Ok(file) => match file.metadata().is_ok_and(|meta| meta.rdev() == FUSE_DEVICE) {
                true => ok(NAME, "can be opened"),
                false => check(
                    NAME,
                    Level::Fail,
                    "is not the device 10:229",
                    "rm /dev/fuse; mknod -m 666 /dev/fuse c 10 229",
                ),
            },
            Err(error) => {
                let fix = match Errno::from_io_error(&error) {
                    Some(Errno::NOENT) => "modprobe fuse, or mknod -m 666 /dev/fuse c 10 229",
                    Some(Errno::ACCESS) => "chmod 666 /dev/fuse, or run as root",
                    Some(Errno::PERM) => "a container: allow the device (--device /dev/fuse)",
                    Some(Errno::NXIO | Errno::NODEV) => "modprobe fuse",
                    _ => "",
                };
                check(NAME, Level::Fail, error.to_string(), fix)
            }
        }
    }

    fn rights(&self) -> Check {
        if self.is_root {
            let caps = self.text("/proc/self/status");
            let effective = caps.lines().find_map(|line| line.strip_prefix("CapEff:"));
            let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
            const SYS_ADMIN: u64 = 1 << 21;
            return match effective {
                Some(caps) if caps & SYS_ADMIN == 0 => check(
                    "may mount",
                    Level::Fail,
                    "root without CAP_SYS_ADMIN",
                    "a container: --cap-add SYS_ADMIN (and --device /dev/fuse)",
                ),
                _ => ok("may mount", "root"),
            };
        }
        let dirs = ["/usr/bin", "/bin", "/usr/local/bin"];
        let program = dirs.iter().map(|dir| self.at(dir).join("fusermount3"));
        let found = program.filter_map(|path| path.metadata().ok()).next();
        match found.map(|meta| meta.permissions().mode() & 0o4000 != 0) {
            Some(true) => ok("may mount", "by fusermount3"),
            Some(false) => check(
                "may mount",
                Level::Fail,
                "fusermount3 is not setuid root",
                "chmod 4755 the program, or run as root",
            ),
            None => check(
                "may mount",
                Level::Fail,
                "only root may, and fusermount3 is not there",
                "apt-get install fuse3, or run as root",
            ),
        }
    }

    fn allow_other(&self) -> Check {
        const NAME: &str = "other users";
        let allowed = self.text("/etc/fuse.conf").lines().any(|l| l.trim() == "user_allow_other");
        match (self.is_root, allowed) {
            (true, _) => ok(NAME, "root's mounts are for all users"),
            (false, true) => ok(NAME, "-o allow_other lets them in"),
            (false, false) => check(
                NAME,
                Level::Warn,
                "a mount of yours is for you alone",
                "for others: a line user_allow_other in /etc/fuse.conf, then -o allow_other",
            ),
        }
    }

    fn helper(&self) -> Check {
        const NAME: &str = "mount(8)";
        let names =
            [format!("mount.{}", FS_TYPE.trim_start_matches("fuse.")), format!("mount.{FS_TYPE}")];
        let missing = names.iter().filter(|name| !self.at("/sbin").join(name).exists());
        let missing: Vec<String> = missing.map(|name| format!("/sbin/{name}")).collect();
        if missing.is_empty() {
            return ok(NAME, "mount -t ringfs and fstab work");
        }
        let program = std::env::current_exe().unwrap_or_else(|_| Path::new("ringfs").to_owned());
        let links = missing.iter().map(|link| format!("ln -s {} {link}", program.display()));
        check(
            NAME,
            Level::Warn,
            format!("no {}: no fstab, no remount", missing.join(", no ")),
            &links.collect::<Vec<_>>().join("; "),
        )
    }

    fn rings(&self, wish: Uring) -> Check {
        const NAME: &str = "fuse rings";
        let wanted = match wish {
            Uring::On => Level::Warn,
            Uring::Off | Uring::Auto => Level::Ok,
        };
        let enabled = self.text("/sys/module/fuse/parameters/enable_uring");
        let forbidden = self.text("/proc/sys/kernel/io_uring_disabled");
        match (enabled.trim(), forbidden.trim()) {
            ("", _) => check(
                NAME,
                wanted,
                "this kernel has none; uring=on would go by /dev/fuse",
                "Linux 6.14 with CONFIG_FUSE_IO_URING",
            ),
            ("Y" | "1", "1" | "2") => check(
                NAME,
                wanted,
                "io_uring is forbidden here",
                "sysctl kernel.io_uring_disabled=0",
            ),
            ("Y" | "1", _) => ok(NAME, "-o uring=on works"),
            _ => check(
                NAME,
                wanted,
                "off in this kernel; uring=on would go by /dev/fuse",
                "only for -o uring=on: echo Y > /sys/module/fuse/parameters/enable_uring",
            ),
        }
    }

    /// `wanted`: whether the source is on vsock; `None` without a source.
    fn vsock(&self, wanted: Option<bool>, cid: Option<u32>) -> Check {
        const NAME: &str = "vsock";
        let missing = match wanted {
            Some(true) => Level::Fail,
            None => Level::Warn,
            Some(false) => return ok(NAME, "not needed for a Unix socket"),
        };
        if !self.at("/dev/vsock").exists() {
            return check(
                NAME,
                missing,
                "no /dev/vsock",
                "modprobe vmw_vsock_virtio_transport (a kernel with CONFIG_VIRTIO_VSOCKETS)",
            );
        }
        match cid {
            None => check(
                NAME,
                missing,
                "no CID: this machine has no vsock device",
                "modprobe vmw_vsock_virtio_transport, and a vsock device of the VMM (Firecracker: \
                 PUT /vsock; QEMU: -device vhost-vsock-pci,guest-cid=3)",
            ),
            Some(HOST_CID) => check(
                NAME,
                Level::Ok,
                "CID 2: this is a host",
                "guests reach it as vsock:2:PORT; from here use vsock:1:PORT or a Unix socket",
            ),
            Some(cid) => ok(NAME, format!("CID {cid}; the host is CID 2")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn machine(files: &[(&str, &str)], is_root: bool) -> (tempfile::TempDir, Machine) {
        let dir = tempfile::tempdir().expect("tempdir");
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, text).expect("a file");
        }
        let root = dir.path().to_owned();
        (dir, Machine { root, is_root })
    }

    #[track_caller]
    fn says(check: &Check, level: Level, found: &str, fix: &str) {
        assert_eq!(check.level, level, "{check:?}");
        assert!(check.found.contains(found), "{check:?}");
        assert!(check.fix.as_deref().unwrap_or_default().contains(fix), "{check:?}");
    }

    #[test]
    fn a_bare_machine_is_told_everything() {
        let (_dir, root) = machine(&[("proc/filesystems", "nodev\ttmpfs\n")], true);
        says(&root.kernel("5.10.0-8"), Level::Warn, "callers' groups", "6.1 and later");
        says(&root.kernel("6.1.2"), Level::Ok, "FUSE-over-io_uring (6.14)", "");
        says(&root.fuse(), Level::Fail, "no FUSE", "modprobe fuse");
        says(&root.device(), Level::Fail, "No such file", "mknod");
        says(&root.helper(), Level::Warn, "no /sbin/mount.ringfs", "/sbin/mount.fuse.ringfs");
        says(&root.rings(Uring::Off), Level::Ok, "has none", "6.14");
        says(&root.rings(Uring::On), Level::Warn, "has none", "6.14");
        says(&root.vsock(None, None), Level::Warn, "no /dev/vsock", "modprobe");
        says(&root.vsock(Some(true), None), Level::Fail, "no /dev/vsock", "modprobe");
        says(&root.vsock(Some(false), None), Level::Ok, "not needed", "");
        let (_dir, user) = machine(&[], false);
        says(&user.fuse(), Level::Warn, "cannot be read", "mount -t proc");
        says(&user.rights(), Level::Fail, "fusermount3 is not there", "apt-get install fuse3");
        says(&user.allow_other(), Level::Warn, "for you alone", "user_allow_other");
    }

    #[test]
    fn a_good_machine_is_fine() {
        let files = [
            ("proc/filesystems", "nodev\tfuse\n"),
            ("proc/self/status", "Name:\tx\nCapEff:\t000001ffffffffff\n"),
            ("proc/sys/kernel/io_uring_disabled", "0\n"),
            ("sys/module/fuse/parameters/enable_uring", "Y\n"),
            ("dev/vsock", ""),
            ("sbin/mount.ringfs", ""),
            ("etc/fuse.conf", "# none\nuser_allow_other\n"),
        ];
        let (dir, root) = machine(&files, true);
        symlink("mount.ringfs", dir.path().join("sbin/mount.fuse.ringfs")).expect("a link");
        let checks = [
            root.kernel("6.18.44-x"),
            root.fuse(),
            root.rights(),
            root.allow_other(),
            root.helper(),
            root.rings(Uring::On),
            root.vsock(Some(true), Some(3)),
        ];
        for check in &checks {
            says(check, Level::Ok, "", "");
            assert_eq!(check.fix, None, "{check:?}");
        }
        says(&root.vsock(Some(true), Some(2)), Level::Ok, "this is a host", "vsock:1");
        says(&root.device(), Level::Fail, "No such file", "mknod");
        let user = Machine { root: root.root.clone(), is_root: false };
        says(&user.allow_other(), Level::Ok, "", "");
        let (_dir, poor) = machine(&[("proc/self/status", "CapEff:\t0000000000000001\n")], true);
        says(&poor.rights(), Level::Fail, "without CAP_SYS_ADMIN", "--cap-add");
    }

    #[test]
    fn what_was_found_is_wrapped_and_what_to_do_is_one_line() {
        let (said, path) = (["some words"; 30].join(" "), "/x".repeat(90));
        let found = format!("{said} {path} {said}");
        let fix = ["ln -s /a/program /sbin/mount.ringfs"; 4].join("; ");
        let checks = vec![check("a", Level::Warn, found.clone(), &fix)];
        let text = render(&Findings { ok: true, version: "1", wire: (1, 1), checks });
        for line in text.lines().filter(|line| !line.contains(&path) && !line.contains(&fix)) {
            assert!(line.chars().count() <= COLUMNS_MAX, "{line}");
        }
        assert!(text.contains(&format!("-> {fix}\n")), "{text}");
        let indent = text.lines().nth(1).expect("a second line").find("w").expect("a word");
        assert!(indent == 19 || indent == 24, "{text}");
        let words: Vec<_> = text.split_whitespace().collect();
        assert!(words.join(" ").starts_with(&format!("warn a {found} -> {fix} ringfs")), "{text}");
    }

    #[test]
    fn the_text_names_each_fix() {
        let checks = vec![ok("a", "fine"), check("b", Level::Fail, "bad", "do this")];
        let findings = Findings { ok: false, version: "1", wire: (1, 2), checks };
        let text = render(&findings);
        let expected = "ok    a            fine\nFAIL  b            bad\n\
                        \x20                  -> do this\n\
                        ringfs 1, wire 1 to 2: 1 fail, 0 warn\n";
        assert_eq!(text, expected);
    }
}
