//! What must be undone, whatever happens to the bench: panic, Ctrl-C, SIGKILL.
//!
//! Invariant: everything that outlives a function call (process, mount, loop device, directory,
//! kernel setting) is told to a second process, the *reaper*, from the moment it exists until it is
//! undone. When the bench ends in any way its pipe closes, and the reaper undoes what is left,
//! newest first. It must not touch a path on a mount that may be dead: FUSE is aborted first.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// The argument that makes this program the reaper.
pub const REAPER_ARG: &str = "--internal-reaper";
/// How long a process may take to follow SIGTERM before SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(4);

/// One thing to undo.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub enum Undo {
    /// SIGTERM, then SIGKILL, to one process.
    Process(i32),
    /// A mount point: aborted if it is FUSE, else thawed; then detached.
    Mount(PathBuf),
    /// A loop device, by its node.
    Loop(PathBuf),
    /// A directory that is ours, with all below it.
    Dir(PathBuf),
    /// A kernel setting: the file, and what it held.
    Setting(PathBuf, String),
}

struct Reaper {
    /// `None` where none could be started: guards alone undo then.
    pipe: Option<Mutex<ChildStdin>>,
    /// Held so that it is not lost; it ends by itself when the pipe closes.
    _child: Option<Child>,
    next: AtomicU64,
}

static REAPER: OnceLock<Reaper> = OnceLock::new();

/// Owns one entry; dropping it undoes the entry.
#[must_use = "dropping the guard undoes it at once"]
#[derive(Debug)]
pub struct Guard {
    id: u64,
    undo: Option<Undo>,
}

impl Guard {
    /// Tells the reaper of it.
    pub fn new(undo: Undo) -> Guard {
        let reaper = REAPER.get_or_init(Reaper::start);
        let id = reaper.next.fetch_add(1, Ordering::Relaxed);
        let text = serde_json::to_string(&undo).unwrap_or_default();
        reaper.say(&format!("+ {id} {text}\n"));
        Guard { id, undo: Some(undo) }
    }

    /// It has been undone by other means.
    pub fn disarm(mut self) {
        self.undo = None;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(undo) = self.undo.take() {
            undo.run();
        }
        if let Some(reaper) = REAPER.get() {
            reaper.say(&format!("- {}\n", self.id));
        }
    }
}

impl Reaper {
    fn start() -> Reaper {
        let child = std::env::current_exe().and_then(|program| {
            // A group of its own: the terminal's Ctrl-C must not reach it.
            let mut command = Command::new(program);
            command.arg(REAPER_ARG).process_group(0).stdin(Stdio::piped()).stdout(Stdio::null());
            command.spawn()
        });
        let mut child = child.ok();
        let pipe = child.as_mut().and_then(|child| child.stdin.take()).map(Mutex::new);
        Reaper { pipe, _child: child, next: AtomicU64::new(0) }
    }

    fn say(&self, line: &str) {
        if let Some(Ok(mut pipe)) = self.pipe.as_ref().map(Mutex::lock) {
            let _ = pipe.write_all(line.as_bytes());
        }
    }
}

/// The reaper's whole life: notes what its input says, and undoes the rest when that ends.
pub fn reap() -> Result<()> {
    let mut left = Vec::new();
    for line in std::io::stdin().lock().lines() {
        note(&mut left, &line.context("read the list")?);
    }
    for (_, undo) in left.into_iter().rev() {
        undo.run();
    }
    Ok(())
}

fn note(left: &mut Vec<(u64, Undo)>, line: &str) {
    let mut parts = line.splitn(3, ' ');
    let (sign, id) = (parts.next(), parts.next().and_then(|id| id.parse::<u64>().ok()));
    match (sign, id, parts.next()) {
        (Some("+"), Some(id), Some(text)) => {
            left.extend(serde_json::from_str(text).ok().map(|undo| (id, undo)));
        }
        (Some("-"), Some(id), None) => left.retain(|(other, _)| *other != id),
        _ => {}
    }
}

impl Undo {
    /// Undoes it; what fails is gone already, or nobody's to mend.
    pub fn run(&self) {
        match self {
            Undo::Process(pid) => end_process(*pid),
            Undo::Mount(at) => unmount_all(at),
            Undo::Loop(device) => {
                let _ = quietly(Command::new("losetup").arg("-d").arg(device));
            }
            Undo::Dir(dir) => {
                // Never through a mount: what lies behind it is somebody's.
                if crate::proc::mounts_below(dir).is_empty() {
                    let _ = fs::remove_dir_all(dir);
                }
            }
            Undo::Setting(file, text) => {
                let _ = fs::write(file, text);
            }
        }
    }
}

fn quietly(command: &mut Command) -> std::io::Result<std::process::ExitStatus> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()
}

fn end_process(pid: i32) {
    let Some(target) = rustix::process::Pid::from_raw(pid) else { return };
    let _ = rustix::process::kill_process(target, rustix::process::Signal::TERM);
    let until = Instant::now() + TERM_GRACE;
    while crate::proc::lives(pid) && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
    if crate::proc::lives(pid) {
        let _ = rustix::process::kill_process(target, rustix::process::Signal::KILL);
    }
}

/// Aborts or thaws, and detaches every mount at that place. A file system that is let go while it
/// is frozen stays so, holds its device for ever, and whoever writes to it with it.
fn unmount_all(at: &Path) {
    for mount in crate::proc::mounts_at(at) {
        if mount.is_fuse() {
            let abort = format!("/sys/fs/fuse/connections/{}/abort", mount.minor);
            let _ = fs::write(abort, "1");
        } else {
            let _ = quietly(Command::new("fsfreeze").arg("-u").arg(at));
        }
        let _ = rustix::mount::unmount(at, rustix::mount::UnmountFlags::DETACH);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reaper_keeps_what_was_not_undone() {
        let mut left = Vec::new();
        let mount = Undo::Mount("/mnt/with space".into());
        note(&mut left, &format!("+ 1 {}", serde_json::to_string(&mount).unwrap()));
        note(&mut left, &format!("+ 2 {}", serde_json::to_string(&Undo::Process(7)).unwrap()));
        note(&mut left, "- 2");
        note(&mut left, "+ 3 nonsense");
        note(&mut left, "");
        assert_eq!(left, [(1, mount)]);
    }

    #[test]
    fn directories_and_settings_are_undone() {
        let dir = tempfile::tempdir().unwrap();
        let (sub, setting) = (dir.path().join("sub"), dir.path().join("setting"));
        fs::create_dir(&sub).unwrap();
        fs::write(&setting, "new").unwrap();
        Undo::Dir(sub.clone()).run();
        Undo::Setting(setting.clone(), "old".into()).run();
        assert!(!sub.exists());
        assert_eq!(fs::read_to_string(setting).unwrap(), "old");
    }
}
