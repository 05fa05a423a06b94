//! A guest's program that takes what it can get: files held open, then inodes, until it is refused.
//!
//! Where a share has limits it shows that they hold, that they are told honestly (ENFILE, and
//! nothing is half made), and that what is given back can be had again. Invariant: no other error.
//! A process of its own, as [`super::work`], whose state it tells.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;

use super::work::State;
use crate::guard;

/// The kernel gives back what was closed or removed a little later.
const GIVEN_BACK: Duration = Duration::from_secs(30);
/// Refused so often, one time behind the other: nothing more is on its way back. Counted, as a
/// machine that stands still gives nothing back.
const REFUSALS: u32 = 30;
/// Between two.
const REFUSED: Duration = Duration::from_millis(10);

/// What `cargo xtask survive greedy` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// An empty directory of the mount, which is empty again at the end
    #[arg(long)]
    dir: PathBuf,
    /// It ends when this file is there; it must not lie on the mount
    #[arg(long)]
    stop: PathBuf,
    /// Files that the session may hold open
    #[arg(long)]
    open_files: usize,
    /// Inodes that it may know
    #[arg(long)]
    nodes: usize,
}

/// Takes until it is told to stop; an error if anything was wrong.
pub fn run(args: &Args) -> Result<String> {
    let mut state = State::default();
    while !args.stop.exists() {
        let begun = Instant::now();
        if let Err(error) = round(args) {
            state.problems.push(format!("greedy, round {}: {error:#}", state.steps));
        }
        state.steps += 1;
        state.slowest_ms = state.slowest_ms.max(begun.elapsed().as_millis() as u64);
        println!("{}", serde_json::json!(state));
        ensure!(state.problems.is_empty(), "{:?}", state.problems);
    }
    Ok(format!("{} rounds, the slowest {} ms", state.steps, state.slowest_ms))
}

fn round(args: &Args) -> Result<()> {
    take(args, "held", args.open_files, true)?;
    give_back(&args.dir)?;
    take(args, "known", args.nodes, false)?;
    give_back(&args.dir)
}

/// Creates files until no more may be had.
fn take(args: &Args, name: &str, most: usize, hold: bool) -> Result<()> {
    let (mut taken, mut held, mut refused) = (0, Vec::new(), 0);
    while !args.stop.exists() {
        match File::create_new(args.dir.join(format!("{name}-{taken}"))) {
            Ok(file) => {
                held.extend(Some(file).filter(|_| hold));
                (taken, refused) = (taken + 1, 0);
                // What is not held the kernel may give back, if somebody wants the memory.
                ensure!(taken <= most || !hold, "{taken} {name} were given: {most} may be");
                if taken >= 4 * most {
                    break;
                }
            }
            Err(error) if is_refusal(&error) => {
                refused += 1;
                if refused > REFUSALS {
                    break;
                }
                std::thread::sleep(REFUSED);
            }
            Err(error) => return Err(error).context(format!("{name} {taken}")),
        }
    }
    ensure!(args.stop.exists() || taken >= most / 2, "{taken} of {most} {name} were given");
    drop(held);
    // What was refused is not there.
    let path = args.dir.join(format!("{name}-{taken}"));
    let there = path.symlink_metadata().map(drop).map_err(|error| error.kind());
    ensure!(there == Err(ErrorKind::NotFound), "{}: {there:?}", path.display());
    Ok(())
}

fn is_refusal(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NFILE.raw_os_error())
}

/// Removes all, which must be possible however little may be had.
fn give_back(dir: &Path) -> Result<()> {
    let gone = guard::poll_until(GIVEN_BACK, || {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            // What was closed a moment ago may not have been given back.
            Err(error) if is_refusal(&error) => return Ok(false),
            Err(error) => return Err(error).context("list"),
        };
        let mut left = 0;
        for entry in entries {
            let path = entry.context("list")?.path();
            left += 1;
            match fs::remove_file(&path) {
                // The kernel has given it back, and others are still known: those go first.
                Err(error) if is_refusal(&error) => {}
                removed => removed.with_context(|| format!("unlink {}", path.display()))?,
            }
        }
        Ok(left == 0)
    })?;
    ensure!(gone, "files are left in {} after {GIVEN_BACK:?}", dir.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Sandbox;

    #[test]
    fn who_is_never_refused_is_given_too_much() {
        let sandbox = Sandbox::new().unwrap();
        let dir = sandbox.make_dir("bare").unwrap();
        let args = Args { dir: dir.clone(), stop: sandbox.path("no"), open_files: 3, nodes: 5 };
        let error = run(&args).unwrap_err();
        assert!(error.to_string().contains("4 held were given: 3 may be"), "{error:#}");
        give_back(&dir).unwrap();
    }
}
