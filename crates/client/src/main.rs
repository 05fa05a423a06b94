//! `ringfs`: mounts directories that a host shares, over vsock or a Unix socket.
//!
//! The way of a frame: the kernel's FUSE device -> [`up`] -> [`batcher`] -> a connection
//! ([`transport`]) -> the daemon -> [`down`] -> the same FUSE device. [`pump`] is the thread that
//! does it, [`lane`] what others see of it, [`session`] what all lanes share; [`mount_cmd`] is a
//! mount's life from [`handshake`] to unmount. Here stand the command line and the exit codes
//! alone.

mod apart;
mod ask;
mod background;
mod batcher;
mod begin;
mod conn;
mod connector;
mod doctor;
mod down;
mod expire;
mod fd_store;
mod forgets;
mod groups;
mod handshake;
mod heart;
mod helper;
mod interrupts;
mod journal;
mod keep;
mod keeper;
mod kept;
mod known;
mod lane;
mod life;
mod lift;
mod mount_cmd;
mod options;
mod prune;
mod pump;
mod rebuild;
mod remount;
mod resume;
mod rings;
mod service;
mod session;
mod status;
mod status_text;
mod takeover;
mod transport;
mod up;
mod uring_lane;

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use fd_store::{FdStore, Stored};
use keeper::Orders;
use mount_cmd::{Failure, Request};
use options::Options;
use remount::RemountError;
use service::Service;
use status::Facts;
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tracing_subscriber::EnvFilter;
use transport::Target;

const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 2;
const EXIT_LOST: u8 = 3;
const EXIT_TIMEOUT: u8 = 4;
/// mount(8)'s "incorrect invocation or permissions".
const EXIT_HELPER_USAGE: u8 = 1;
/// mount(8)'s "mount failure".
const EXIT_HELPER_FAILED: u8 = 32;

const EXAMPLES: &str = "\
Examples:
  ringfs mount data@vsock:2:5640 /mnt            in a VM: share `data` of the host, CID 2
  ringfs mount data/src@unix:/run/r.sock /mnt    a sub-directory, over a Unix socket
  ringfs mount data@vsock:2:5640 /mnt -o ro,cache=always,lanes=2
  mount -t ringfs data@vsock:2:5640 /mnt         with this program linked as /sbin/mount.ringfs
  data@vsock:2:5640 /mnt ringfs _netdev 0 0      the same in /etc/fstab
  ringfs doctor data@vsock:2:5640                what is missing here, and how to get it
  ringfs status; ringfs umount /mnt
  ringfs reconnect && ringfs wait --resumed --timeout 10   after a VM's snapshot was restored

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 the mount was ready and was lost later
(--foreground); 4 `wait` ran out of time; as mount.ringfs those of mount(8): 0, 1 for wrong
usage, 32 for a failed mount.
RUST_LOG=debug logs more (to standard error or --log).";

const RECONNECT_HELP: &str = "\
A mount survives the loss of its connections by itself: requests wait, and go on with the next
connection. But a restored snapshot does not always tell the guest that its connections are gone.
Call this after a restore: it drops them even if they look alive, and joins new ones at once.
It returns before they are there; `ringfs wait --resumed` waits for that.

Exit codes: 0 all mounts that were meant have been asked; 1 there is no such mount, or its client
does not answer.";

const WAIT_HELP: &str = "\
Returns once every lane of the mount has its connection; at once if that is so already.

Exit codes: 0 connected; 1 there is no such mount, or it ended meanwhile; 4 the time is over (the
mount goes on trying).";

const DOCTOR_HELP: &str = "\
Looks at the kernel, /dev/fuse, rights, mount(8), FUSE-over-io_uring, limits and vsock; with SOURCE
it says hello to the daemon and leaves at once. It changes nothing.

Exit codes: 0 nothing fails (there may be warnings); 1 something does; 2 wrong usage.";

const MOUNT_HELP: &str = "\
Options of -o (comma-separated, may be repeated):
  ro, rw                 read-only, or read and write (default)
  cache=MODE             how long the kernel believes what it knows:
                           never     nothing; reads and writes go straight through
                           metadata  names and attributes, not data
                           auto      both for a second, data until a file changes (default)
                           always    for a day: for shares that nobody else changes
  hard                   requests wait for a lost connection as long as it takes (default); killed
                         processes get out at once
  soft,timeout=SECONDS   after so long without a connection requests fail (EIO), until there is one
  strict                 a daemon that does not know the mount (it was restarted) ends it; without
                         this the mount goes on, and what cannot be found again fails alone
  nokeep                 if this client dies the mount is removed. By default (keep) another one
                         takes it over and nothing is lost: Linux 6.9, not with uring=on
  writeback              the kernel keeps dirty pages: faster writes, unseen by others until later
  acl                    the kernel goes by POSIX ACLs, where the share has them (ringfsd's share
                         option acl)
  lanes=N                readers of the FUSE device, each with a thread and a connection (default:
                         CPUs, at most 8)
  slots=N                requests in flight on each lane (default 128)
  spin=N                 looks for work before a lane sleeps (default 100): less time a request for
                         more CPU; 0: none. An idle mount sleeps either way
  uring=off|on|auto      off (default): frames come by /dev/fuse. on: by FUSE-over-io_uring where
                         the kernel has it (6.14, fuse.enable_uring=Y), else by /dev/fuse with a
                         warning; auto: the same without the warning. Rings are faster and cost
                         less CPU, but for one deep queue (docs/performance.md)
  checksum=on|off        checksums over file data (default: on for vsock, off for unix)
  allow_other, noallow_other   whether other users get in (default: if root mounts)
  nodefault_permissions  the kernel does not check permissions
  max_read=BYTES noatime nodiratime noexec sync dirsync   as in mount(8); always nosuid, nodev
  remount                changes a mount that stands: ro, rw, noexec, noatime, nodiratime, sync;
                         all else has to be as it is
  _netdev nofail noauto user=NAME defaults x-*   accepted for fstab

Users who may not mount do it by `fusermount3` (package fuse3): on a directory of their own, seen by
them alone; `allow_other` needs the line user_allow_other in /etc/fuse.conf.

Ctrl-C or SIGTERM unmounts; if files are in use the mount is detached and served until they are
closed (where it is mounted elsewhere too it is served there); a second signal ends it at once. What
cannot be unmounted at all (another mount covers it) goes on, and the next signal tries it again,
until `systemctl stop` of a service has its limit.";

#[derive(Debug, Parser)]
#[command(name = "ringfs", version, about = "Mount directories that a host shares (see ringfsd)")]
#[command(after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Debug, Subcommand)]
enum Cmd {
    /// Mount a share: NAME[/SUB]@vsock:CID:PORT or NAME[/SUB]@unix:PATH
    #[command(after_help = MOUNT_HELP)]
    Mount(MountArgs),
    /// Unmount a ringfs mount, also a dead one
    Umount {
        /// The mount point
        dir: PathBuf,
        /// Detach it at once, even if it is in use
        #[arg(short, long)]
        lazy: bool,
    },
    /// Drop a mount's connections and join new ones: the hook after a snapshot's restore
    #[command(after_help = RECONNECT_HELP)]
    Reconnect {
        /// The mount point (default: all ringfs mounts)
        dir: Option<PathBuf>,
    },
    /// Wait until a mount has its connections
    #[command(after_help = WAIT_HELP)]
    Wait {
        /// Until all lanes are connected (the only thing to wait for so far)
        #[arg(long, required = true)]
        resumed: bool,
        /// Give up after so many seconds (default: never)
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
        /// The mount point (default: all ringfs mounts)
        dir: Option<PathBuf>,
    },
    /// Tell what this machine lacks for a mount, and how to get it
    #[command(after_help = DOCTOR_HELP)]
    Doctor {
        /// The share that is to be mounted: its daemon is asked too
        source: Option<OsString>,
        /// Mount options, as for `mount`
        #[arg(short = 'o', value_name = "OPTIONS")]
        options: Vec<String>,
        /// As JSON: {ok, version, wire, checks: [{name, level, found, fix}]}
        #[arg(long)]
        json: bool,
    },
    /// Print the completions of a shell, to be put where it looks for them
    Completions { shell: clap_complete::Shell },
    /// Internal: whether the root of a mount answers
    #[command(hide = true)]
    Answers { dir: PathBuf },
    /// Internal: tells the kernel which names to look up again
    #[command(hide = true)]
    Expire {
        #[arg(long)]
        dev_minor: Option<u32>,
        #[arg(long)]
        drops: bool,
    },
    /// Write the man pages into a directory
    #[command(hide = true)]
    ManPages { dir: PathBuf },
    /// Show the ringfs mounts and what they do
    Status {
        /// As JSON: a list of {mountpoint, source, client}
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
struct MountArgs {
    /// The share, as in data@vsock:2:5640
    source: OsString,
    /// The mount point, an existing directory
    dir: PathBuf,
    /// Mount options, see below
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Stay in the foreground; a line on standard output says when the mount is ready
    #[arg(short, long)]
    foreground: bool,
    /// Append warnings and errors to a file (default: standard error until the mount is ready)
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// As a service: the service manager keeps the mount's fds, so that it survives a kill of all
    /// of its processes (systemd: Type=notify, FileDescriptorStoreMax=16)
    #[arg(long, requires = "foreground")]
    fd_store: bool,
    /// Ignore unknown mount options
    #[arg(short, long)]
    sloppy: bool,
    /// Internal: this is the background process
    #[arg(long, hide = true)]
    background_child: bool,
    /// Internal: this process serves the mount, for the one that has started it
    #[arg(long, hide = true)]
    worker: bool,
    /// Internal: another one has served it before
    #[arg(long, hide = true)]
    take_over: bool,
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    let mut args = std::env::args_os();
    if args.next().is_some_and(|name| helper::is_helper_name(&name)) {
        return report(run_helper(args), EXIT_HELPER_FAILED);
    }
    let done = match Cli::parse().command {
        Cmd::Mount(args) => run_mount(&args),
        Cmd::Umount { dir, lazy } => {
            let path = std::path::absolute(&dir).unwrap_or(dir);
            mount_cmd::unmount(&path, lazy).map_err(anyhow::Error::from)
        }
        Cmd::Reconnect { dir } => tell_none(ask::reconnect(dir.as_deref())),
        Cmd::Wait { resumed: _, timeout, dir } => {
            tell_none(ask::wait_resumed(dir.as_deref(), timeout.map(Duration::from_secs)))
        }
        Cmd::Doctor { source, options, json } => {
            match run_doctor(source.as_deref(), &options, json) {
                Ok(true) => return ExitCode::SUCCESS,
                Ok(false) => return ExitCode::from(EXIT_FAILED),
                Err(error) => Err(error),
            }
        }
        Cmd::Answers { dir } => return apart::look(&dir),
        Cmd::Expire { dev_minor, drops } => return expire::run(dev_minor, drops),
        Cmd::Completions { shell } => {
            let mut out = std::io::stdout();
            clap_complete::generate(shell, &mut Cli::command(), "ringfs", &mut out);
            Ok(())
        }
        Cmd::ManPages { dir } => {
            clap_mangen::generate_to(Cli::command(), dir).map_err(anyhow::Error::from)
        }
        Cmd::Status { json } => run_status(json),
    };
    report(done, EXIT_FAILED)
}

/// No mount is no failure: a hook need not know whether there are any.
fn tell_none(asked: Result<usize, ask::AskError>) -> anyhow::Result<()> {
    if asked? == 0 {
        eprintln!("ringfs: no ringfs mounts");
    }
    Ok(())
}

/// Usage errors that only our own parsers find.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct Usage(anyhow::Error);

fn report(done: anyhow::Result<()>, failed: u8) -> ExitCode {
    let Err(error) = done else { return ExitCode::SUCCESS };
    if let Some(Said(code)) = error.downcast_ref() {
        return ExitCode::from(u8::try_from(*code).unwrap_or(failed));
    }
    // The background process has said its words already.
    if !matches!(error.downcast_ref(), Some(background::BackgroundError::Child(_))) {
        eprintln!("ringfs: {error:#}");
    }
    let is_dead = error.downcast_ref().is_some_and(keeper::KeeperError::is_late);
    let late = is_dead || error.downcast_ref::<Failure>().is_some_and(Failure::is_late);
    let timed_out = error.downcast_ref::<ask::AskError>().is_some_and(ask::AskError::is_timeout);
    ExitCode::from(match failed {
        EXIT_FAILED if error.is::<Usage>() => EXIT_USAGE,
        _ if error.is::<Usage>() => EXIT_HELPER_USAGE,
        EXIT_FAILED if late => EXIT_LOST,
        EXIT_FAILED if timed_out => EXIT_TIMEOUT,
        failed => failed,
    })
}

fn parse_request(args: &MountArgs) -> anyhow::Result<Request> {
    let target = Target::parse(&args.source).map_err(usage)?;
    let options = Options::parse(target.source(), &args.options, args.sloppy).map_err(usage)?;
    let mountpoint = std::path::absolute(&args.dir).context("the mount point")?;
    Ok(Request { target, mountpoint, options, lists: args.options.clone() })
}

fn usage(error: impl Into<anyhow::Error>) -> Usage {
    Usage(error.into())
}

fn run_remount(args: &MountArgs, fake: bool) -> anyhow::Result<()> {
    let path = std::path::absolute(&args.dir).context("the mount point")?;
    match remount::run(&path, &args.options, args.sloppy, fake) {
        Err(error @ RemountError::Options(_)) => Err(usage(error).into()),
        done => Ok(done?),
    }
}

fn run_mount(args: &MountArgs) -> anyhow::Result<()> {
    if remount::is_wanted(&args.options) {
        return run_remount(args, false);
    }
    let request = parse_request(args)?;
    if args.worker {
        return serve(args, &request);
    }
    let mut child: Vec<OsString> = Vec::new();
    if let Some(log) = &args.log {
        child.extend(["--log".into(), std::path::absolute(log).context("the log")?.into()]);
    }
    for list in &args.options {
        child.extend(["-o".into(), list.into()]);
    }
    if args.sloppy {
        child.push("--sloppy".into());
    }
    child.extend(["--".into(), request.target.source(), request.mountpoint.clone().into()]);
    if args.foreground || args.background_child {
        let store = args.fd_store.then(FdStore::from_environment).transpose().map_err(usage)?;
        let store = store.map(|mut store| {
            let stored = store.take(&request.target.source(), &request.mountpoint);
            (store, stored)
        });
        return keep(args, child, store);
    }
    // In an initramfs it mounts what the system that comes then lives on.
    let for_root = options::words(&args.options).any(|word| word == "x-initrd.mount")
        || Path::new("/etc/initrd-release").exists();
    let child = [&["mount".into(), "--background-child".into()], &child[..]].concat();
    Ok(background::spawn(&child, for_root)?)
}

/// Has the mount served by a process of its own.
fn keep(
    args: &MountArgs,
    mut child: Vec<OsString>,
    store: Option<(FdStore, Option<Stored>)>,
) -> anyhow::Result<()> {
    if args.background_child {
        background::leave_terminal();
    }
    let log = args.log.as_deref().map(background::open_log).transpose().context("the log")?;
    child.insert(0, if args.background_child { "--background-child" } else { "-f" }.into());
    let is_background = args.background_child;
    match keeper::run(Orders { args: &child, is_background, log: log.as_ref(), store })? {
        0 => Ok(()),
        code => Err(Said(code).into()),
    }
}

/// How the process ended that has said why.
#[derive(Debug, thiserror::Error)]
#[error("exit code {0}")]
struct Said(i32);

fn serve(args: &MountArgs, request: &Request) -> anyhow::Result<()> {
    let service = Service::inherited(args.take_over, !args.background_child)
        .context("the keeper's socket, and signals")?;
    let log = args.log.as_deref().map(background::open_log).transpose().context("the log")?;
    mount_cmd::run(request, service, |facts| {
        tell_ready(&mut std::io::stdout(), facts)?;
        match args.background_child {
            true => background::detach(log.as_ref()),
            false => background::redirect_errors(log.as_ref()),
        }
    })?;
    Ok(())
}

/// In one write(2): who waits in the background leaves with the first byte, and what is written
/// after that fails.
fn tell_ready(out: &mut impl Write, facts: &Facts) -> std::io::Result<()> {
    let line = format!("{} is mounted on {}\n", facts.source, facts.mountpoint.display());
    out.write_all(line.as_bytes())?;
    out.flush()
}

fn run_helper(args: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    let parsed = helper::parse(args).map_err(usage)?;
    if let Some(namespace) = &parsed.namespace {
        helper::check_namespace(namespace).map_err(usage)?;
    }
    let args = MountArgs {
        source: parsed.source,
        dir: parsed.dir.into(),
        options: parsed.options,
        foreground: false,
        log: None,
        fd_store: false,
        sloppy: parsed.sloppy,
        background_child: false,
        worker: false,
        take_over: false,
    };
    if parsed.verbose {
        eprintln!("mount.ringfs: {} on {}", args.source.display(), args.dir.display());
    }
    match parsed.fake {
        true if remount::is_wanted(&args.options) => run_remount(&args, true),
        true => parse_request(&args).map(drop),
        false => run_mount(&args),
    }
}

/// Whether nothing fails.
fn run_doctor(source: Option<&OsStr>, lists: &[String], json: bool) -> anyhow::Result<bool> {
    let target = source.map(Target::parse).transpose().map_err(usage)?;
    let options = Options::parse("doctor", lists, false).map_err(usage)?;
    let findings = doctor::examine(target.as_ref(), &options);
    let text = match json {
        true => serde_json::to_string_pretty(&findings)? + "\n",
        false => doctor::render(&findings),
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(findings.ok)
}

fn run_status(json: bool) -> anyhow::Result<()> {
    let entries = status::collect(&status::dirs()).context("/proc/self/mountinfo")?;
    let text = match json {
        true => serde_json::to_string_pretty(&entries)? + "\n",
        false => status_text::render(&entries, status::unix_now_s()),
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_tells_of_a_mount_is_one_write() {
        #[derive(Default)]
        struct Writes(Vec<Vec<u8>>);
        impl Write for Writes {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.push(bytes.to_vec());
                Ok(bytes.len())
            }

            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        for len in [10, 4000] {
            let mountpoint = std::path::PathBuf::from("/".repeat(len));
            let facts = Facts { source: "d@unix:/s".into(), mountpoint, ..Facts::default() };
            // As standard output is.
            let mut out = std::io::LineWriter::new(Writes::default());
            tell_ready(&mut out, &facts).expect("written");
            assert_eq!(out.get_ref().0.len(), 1, "{len}");
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        let cli =
            Cli::try_parse_from(["ringfs", "mount", "d@unix:/s", "m", "-o", "ro", "-fo", "rw"]);
        let Ok(Cli { command: Cmd::Mount(args) }) = cli else { panic!("{cli:?}") };
        let request = parse_request(&args).expect("sound");
        assert!(request.mountpoint.is_absolute() && args.foreground && args.options.len() == 2);
    }
}
