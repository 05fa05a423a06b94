//! Work on names: each in a fresh directory whose names the contender's kernel has never seen.

use super::{Metric, Scale, forget_names, rate};
use crate::site::Site;
use anyhow::{Context, Result, ensure};
use rustix::fs::{AtFlags, CWD};
use rustix::io::Errno;
use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// What is done to each name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// create + write 4 KiB + close
    Create,
    /// stat, by so many threads that share the names out
    Stat {
        /// How many.
        threads: usize,
    },
    /// open + read 4 KiB + close
    Read,
    /// stat of a name that is not there
    Absent,
    /// one directory listed
    List {
        /// And each entry's attributes asked for.
        attributes: bool,
    },
    /// to another name of the same directory
    Rename,
    /// and the file with it
    Unlink,
}

/// What a file holds.
const CONTENT: [u8; 4096] = [0x5a; 4096];

/// Does it once.
pub fn run(site: &Site, step: Step, scale: &Scale) -> Result<Vec<Metric>> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let count = if matches!(step, Step::List { .. }) { scale.entries } else { scale.names };
    let label = format!("names-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let (behind, home) = (site.backing().join(&label), site.path().join(&label));
    fs::create_dir(&behind)?;
    if !matches!(step, Step::Create | Step::Absent) {
        (0..count).try_for_each(|i| fs::write(name(&behind, i), CONTENT))?;
    }
    // What the last work left in the kernel goes now, not in the middle of this one.
    forget_names()?;
    fs::metadata(&home).with_context(|| format!("{home:?} is not seen through the mount"))?;
    let ((), done) = site.measure(|| work(&home, step, count))?;
    verify(&behind, step, count)?;
    fs::remove_dir_all(&behind)?;
    Ok(rate("rate", "files/s", count as f64, &done))
}

fn name(home: &Path, i: usize) -> PathBuf {
    home.join(format!("file-{i:06}"))
}

fn renamed(home: &Path, i: usize) -> PathBuf {
    home.join(format!("other-{i:06}"))
}

fn work(home: &Path, step: Step, count: usize) -> Result<()> {
    match step {
        Step::Create => (0..count).try_for_each(|i| fs::write(name(home, i), CONTENT))?,
        Step::Stat { threads } => stat_all(home, count, threads)?,
        Step::Read => {
            for i in 0..count {
                let mut bytes = [0; 2 * CONTENT.len()];
                let mut file = fs::File::open(name(home, i))?;
                let read = file.read(&mut bytes)? + file.read(&mut bytes)?;
                ensure!(read == CONTENT.len(), "{read} bytes were read");
            }
        }
        Step::Absent => {
            for i in 0..count {
                let error = length(CWD, &name(home, i)).err();
                ensure!(error == Some(Errno::NOENT), "a name that was never made gave {error:?}");
            }
        }
        Step::List { attributes } => {
            let mut seen = 0;
            let dir = fs::File::open(home)?;
            for entry in fs::read_dir(home)? {
                let entry = entry?;
                if attributes {
                    let length = length(dir.as_fd(), Path::new(&entry.file_name()))?;
                    ensure!(length == CONTENT.len() as u64, "an entry has {length} bytes");
                }
                seen += 1;
            }
            ensure!(seen == count, "{seen} of {count} names were listed");
        }
        Step::Rename => {
            (0..count).try_for_each(|i| fs::rename(name(home, i), renamed(home, i)))?;
        }
        Step::Unlink => (0..count).try_for_each(|i| fs::remove_file(name(home, i)))?,
    }
    Ok(())
}

/// By newfstatat, as ls, find and git ask. What std asks has the birth time too, which is a request
/// of its own for each file, that passthrough_ll does not know and so is asked once.
fn length(dir: BorrowedFd<'_>, path: &Path) -> Result<u64, Errno> {
    let stat = rustix::fs::statat(dir, path, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(stat.st_size as u64)
}

fn stat_all(home: &Path, count: usize, threads: usize) -> Result<()> {
    let some = |first: usize| -> Result<()> {
        for i in (first..count).step_by(threads) {
            let length = length(CWD, &name(home, i))?;
            ensure!(length == CONTENT.len() as u64, "a file has {length} bytes");
        }
        Ok(())
    };
    if threads == 1 {
        return some(0);
    }
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|first| scope.spawn(move || some(first))).collect();
        all.into_iter().try_for_each(|one| super::joined(one.join()))
    })
}

/// Looks behind the contender's back whether the work was done.
fn verify(behind: &Path, step: Step, count: usize) -> Result<()> {
    let (names, last) = match step {
        Step::Create => (count, Some(name(behind, count - 1))),
        Step::Rename => (count, Some(renamed(behind, count - 1))),
        Step::Absent | Step::Unlink => (0, None),
        Step::Stat { .. } | Step::Read | Step::List { .. } => (count, None),
    };
    let found = fs::read_dir(behind)?.count();
    ensure!(found == names, "{found} names are there after {step:?}, not {names}");
    if let Some(last) = last {
        let length = fs::metadata(&last).with_context(|| format!("stat {last:?}"))?.len();
        ensure!(length == CONTENT.len() as u64, "{last:?} has {length} bytes");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Step; 7] = [
        Step::Create,
        Step::Stat { threads: 4 },
        Step::Read,
        Step::Absent,
        Step::List { attributes: true },
        Step::Rename,
        Step::Unlink,
    ];

    #[test]
    fn every_step_does_what_verify_looks_for() {
        for step in ALL {
            let dir = tempfile::tempdir().unwrap();
            if !matches!(step, Step::Create | Step::Absent) {
                (0..10).for_each(|i| fs::write(name(dir.path(), i), CONTENT).unwrap());
            }
            work(dir.path(), step, 10).unwrap();
            verify(dir.path(), step, 10).unwrap();
        }
    }

    #[test]
    fn work_that_was_not_done_is_found() {
        let dir = tempfile::tempdir().unwrap();
        assert!(verify(dir.path(), Step::Create, 3).is_err());
        assert!(work(dir.path(), Step::Stat { threads: 2 }, 3).is_err());
        assert!(work(dir.path(), Step::List { attributes: true }, 3).is_err());
        fs::write(name(dir.path(), 0), CONTENT).unwrap();
        assert!(work(dir.path(), Step::Absent, 3).is_err());
        assert!(verify(dir.path(), Step::Unlink, 3).is_err());
    }
}
