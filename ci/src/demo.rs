//! `cargo xtask demo`: a newcomer's first minute with ringfs, from a build to a verified copy.
//!
//! Invariant: it says what it does before it does it, writes into one new directory of the share
//! alone, and leaves neither that directory, nor a mount, nor a process behind. What it claims to
//! have verified was read through the mount after a fresh mount, so that no cache answered.

mod view;

use std::fs;
use std::io::{IsTerminal, stdout};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use self::view::View;
use crate::deps;
use crate::guard::{self, Guard, Undo};
use crate::paths::Bins;
use crate::proc::Cmd;
use crate::rig::{self, Daemon};
use crate::sandbox::Sandbox;

const TICK: Duration = Duration::from_secs(1);
const STEP_LIMIT: Duration = Duration::from_secs(300);
const SMALL_FILES: usize = 1000;
const LARGE_FILES: usize = 4;
const LARGE_BYTES: usize = 32 << 20;

/// What `cargo xtask demo` takes.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Directory to share [default: a sample tree in a temporary place]
    dir: Option<PathBuf>,
    /// Where to mount it [default: a temporary place]
    mountpoint: Option<PathBuf>,
    /// End after the verified copy instead of staying mounted until Ctrl-C
    #[arg(long)]
    once: bool,
}

impl Args {
    /// As CI runs it.
    pub fn once() -> Self {
        Self { once: true, ..Self::default() }
    }
}

/// Runs the demo; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    println!("ringfs demo: shares a directory, mounts it, and works on it.\n");
    println!("1. Building both ends (release; the first time takes some minutes)");
    deps::debian(deps::DEMO_PACKAGES)?;
    let bins = Bins::build()?;
    let sandbox = Sandbox::new()?;
    println!("2. Making a tree of {SMALL_FILES} small and {LARGE_FILES} large files to copy");
    let source = sandbox.make_dir("source")?;
    make_tree(&source)?;
    let share = match &args.dir {
        Some(dir) => dir.canonicalize().with_context(|| format!("open {}", dir.display()))?,
        None => sandbox.make_dir("share")?,
    };
    let mountpoint = match &args.mountpoint {
        Some(dir) => dir.canonicalize().with_context(|| format!("open {}", dir.display()))?,
        None => sandbox.make_dir("mnt")?,
    };
    let stage = Stage { share, mountpoint, source, inside: inside_name() };
    // On the host's side: it is there to be removed also when the mount is not.
    let inside_on_host = Guard::new(Undo::Dir(stage.share.join(&stage.inside)));

    println!("3. Starting the host's daemon and mounting the share, which is this:");
    let daemon =
        Daemon::start(&sandbox, &bins, "ringfs", &[rig::share("demo", &stage.share)], &[])?;
    let socket = daemon.socket.display();
    println!("     ringfsd --share demo={} --listen unix:{socket}", stage.share.display());
    println!("     ringfs mount demo@unix:{socket} {}\n", stage.mountpoint.display());
    let start = daemon.counters_at_rest()?;
    let closing = show(&daemon, &stage).with_context(|| daemon.log_tail())?;
    println!("\n   {closing}\n");
    if !args.once {
        stay(&daemon, &stage)?;
    }
    println!("5. Cleaning up");
    drop(inside_on_host);
    daemon.assert_back_at(&start)?;
    daemon.stop()?;
    drop(sandbox);
    println!("   Unmounted, both ends ended, nothing left. What to try next:");
    println!(
        "     cargo xtask demo DIR MOUNTPOINT   your own directory, at a place of your choice"
    );
    println!("     cargo xtask test                  everything that CI checks");
    println!("     target/release/ringfs mount --help");
    Ok(closing)
}

/// What the demo plays with.
struct Stage {
    share: PathBuf,
    mountpoint: PathBuf,
    source: PathBuf,
    /// The directory in the share that the demo writes into.
    inside: String,
}

fn inside_name() -> String {
    format!("ringfs-demo.{}", std::process::id())
}

fn make_tree(root: &Path) -> Result<()> {
    let fill = |seed: usize, len: usize| -> Vec<u8> {
        (0..len / 8).flat_map(|n| (n.wrapping_mul(0x9e37_79b9) ^ seed).to_le_bytes()).collect()
    };
    for n in 0..SMALL_FILES {
        let dir = root.join(format!("small/{:02}", n % 25));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(format!("file-{n}")), fill(n, 512 + (n * 97) % 16_384))?;
    }
    fs::create_dir_all(root.join("large"))?;
    for n in 0..LARGE_FILES {
        fs::write(root.join(format!("large/file-{n}")), fill(n, LARGE_BYTES))?;
    }
    Ok(())
}

/// The work, with the live picture beside it.
fn show(daemon: &Daemon, stage: &Stage) -> Result<String> {
    println!("4. Working through the mount");
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        let worker = scope.spawn(move || work(daemon, stage, &tell));
        let mut view = View::new(stdout().is_terminal());
        let mut doing = String::new();
        loop {
            match told.recv_timeout(TICK) {
                Ok(next) => {
                    doing = next;
                    view.say(&doing);
                }
                Err(mpsc::RecvTimeoutError::Timeout) => view.draw(&daemon.counters()?, &doing),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        view.draw(&daemon.counters()?, "done");
        worker.join().map_err(|_| anyhow!("the demo's work panicked"))?
    })
}

fn work(daemon: &Daemon, stage: &Stage, tell: &mpsc::Sender<String>) -> Result<String> {
    let say = |text: &str| {
        // The view may be gone already when the daemon is: then nobody needs the line.
        let _ = tell.send(text.to_string());
    };
    guard::with_limit(STEP_LIMIT, || {
        let mount = daemon.mount_on("demo", &stage.mountpoint, "")?;
        let inside = stage.mountpoint.join(&stage.inside);
        let bytes = tree_bytes(&stage.source)?;
        say(&format!("copying the tree in ({} MiB)", bytes >> 20));
        let begun = Instant::now();
        let copy = Cmd::new("cp").arg("-a").arg(&stage.source).arg(&inside);
        copy.limit(STEP_LIMIT).run()?;
        let copied = rate(bytes, begun);
        mount.umount()?;
        say("mounted afresh, so that nothing comes from the guest's cache; reading all of it back");
        let mount = daemon.mount_on("demo", &stage.mountpoint, "")?;
        let begun = Instant::now();
        let through = checksums(&inside)?;
        let read = rate(bytes, begun);
        say("comparing SHA-256 sums with the source's, and with what lies on the host");
        let expected = checksums(&stage.source)?;
        let files = expected.lines().count();
        ensure!(files == SMALL_FILES + LARGE_FILES, "{files} checksums");
        ensure!(through == expected, "the files read through the mount differ from the source");
        let host = checksums(&stage.share.join(&stage.inside))?;
        ensure!(host == expected, "the files on the host differ from the source");
        say("removing the copy, through the mount");
        fs::remove_dir_all(&inside)?;
        mount.umount()?;
        Ok(format!(
            "{files} files verified by SHA-256 on both sides; copied in at {copied}, \
             read back and summed at {read}"
        ))
    })
}

fn rate(bytes: u64, since: Instant) -> String {
    format!("{:.0} MiB/s", bytes as f64 / 1_048_576.0 / since.elapsed().as_secs_f64())
}

fn tree_bytes(root: &Path) -> Result<u64> {
    let mut sum = 0;
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if meta.is_dir() {
                dirs.push(entry.path());
            } else {
                sum += meta.len();
            }
        }
    }
    Ok(sum)
}

/// `sha256sum` of every file below `root`, sorted by path.
fn checksums(root: &Path) -> Result<String> {
    let script = "find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum";
    Cmd::new("sh").args(["-ec", script]).dir(root).limit(STEP_LIMIT).run()
}

/// Stays mounted with the live picture until Ctrl-C.
fn stay(daemon: &Daemon, stage: &Stage) -> Result<()> {
    let mount = daemon.mount_on("demo", &stage.mountpoint, "")?;
    let signal = guard::next_signal();
    println!("   {} is mounted: try it from another shell, such as", stage.mountpoint.display());
    println!("     cp -r /usr/include {}", stage.mountpoint.display());
    println!("   Ctrl-C unmounts and cleans up.\n");
    let mut view = View::new(stdout().is_terminal());
    while signal.recv_timeout(TICK) == Err(mpsc::RecvTimeoutError::Timeout) {
        view.draw(&daemon.counters()?, "mounted; Ctrl-C ends");
    }
    println!();
    mount.umount()
}
