//! A tree of the size of a real project: unpacked, looked at by git, find and grep, built, removed.
//!
//! The tree is made once a process, from a seed, and packed with its git history, so that all
//! contenders unpack the same bytes.

use super::{Metric, forget_names};
use crate::backing::run as run_command;
use crate::site::{Place, Site};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

const DIRS: usize = 120;
const FILES_EACH: usize = 20;
const FILES: usize = DIRS * FILES_EACH;

/// Each step's time; the first metric is their sum.
pub fn run(site: &Site, place: &Place<'_>) -> Result<Vec<Metric>> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let packed = packed(place.scratch)?;
    let label = format!("tree-{}", NEXT.fetch_add(1, Relaxed));
    let (home, behind) = (site.path().join(&label), site.backing().join(&label));
    fs::create_dir(&behind)?;
    forget_names()?;
    fs::metadata(&home)?;
    let mut metrics = Vec::new();
    let mut step = |name: &'static str, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let ((), done) = site.measure(work).context(name)?;
        metrics.push(Metric { name, unit: "s", value: done.elapsed.as_secs_f64() });
        Ok(())
    };
    let tree = home.join("tree");
    step("tar-x", &mut || {
        let mut tar = Command::new("tar");
        run_command(tar.arg("-xf").arg(&packed).arg("-C").arg(&home)).map(drop)
    })?;
    forget_names()?;
    for name in ["git-status-1", "git-status-2"] {
        step(name, &mut || {
            let said = run_command(&mut git(&tree, &["status", "--porcelain"]))?;
            ensure!(said.is_empty(), "git sees changes: {said}");
            Ok(())
        })?;
    }
    forget_names()?;
    step("find", &mut || {
        let mut find = Command::new("find");
        let said = run_command(find.arg(tree.join("src")).args(["-type", "f", "-size", "+0"]))?;
        ensure!(said.lines().count() == FILES, "find saw {} files", said.lines().count());
        Ok(())
    })?;
    forget_names()?;
    step("grep-r", &mut || {
        let mut grep = Command::new("grep");
        let said = run_command(grep.args(["-rl", "needle"]).arg(tree.join("src")))?;
        ensure!(said.lines().count() == DIRS, "grep found {} files", said.lines().count());
        Ok(())
    })?;
    step("build", &mut || {
        let mut rustc = Command::new("rustc");
        rustc.arg(tree.join("main.rs")).arg("--out-dir").arg(&tree);
        run_command(&mut rustc)?;
        let said = run_command(&mut Command::new(tree.join("main")))?;
        ensure!(said.trim() == "built", "the built program said {said}");
        Ok(())
    })?;
    step("rm-rf", &mut || run_command(Command::new("rm").arg("-rf").arg(&tree)).map(drop))?;
    ensure!(!behind.join("tree").exists(), "rm -rf left the tree");
    fs::remove_dir_all(&behind)?;
    let value = metrics.iter().map(|metric| metric.value).sum();
    metrics.insert(0, Metric { name: "time", unit: "s", value });
    Ok(metrics)
}

fn git(tree: &Path, args: &[&str]) -> Command {
    let mut git = Command::new("git");
    git.arg("-C").arg(tree).args(["-c", "safe.directory=*", "-c", "user.name=bench"]);
    git.args(["-c", "user.email=bench@localhost", "-c", "core.fsmonitor=false"]).args(args);
    git
}

/// The packed tree; made when it is first asked for.
fn packed(scratch: &Path) -> Result<PathBuf> {
    let packed = scratch.join("tree.tar");
    if packed.exists() {
        return Ok(packed);
    }
    let tree = scratch.join("tree");
    for d in 0..DIRS {
        let dir = tree.join(format!("src/part-{:02}/module-{d}", d % 12));
        fs::create_dir_all(&dir)?;
        for f in 0..FILES_EACH {
            fs::write(dir.join(format!("file_{f}.rs")), content(d, f))?;
        }
    }
    fs::write(tree.join("main.rs"), "fn main() { println!(\"built\") }\n")?;
    for args in [&["init", "-q"][..], &["add", "-A"], &["commit", "-q", "-m", "tree"]] {
        run_command(&mut git(&tree, args))?;
    }
    let mut tar = Command::new("tar");
    // Under another name first: half an archive must not be taken for one.
    let half = scratch.join("tree.tar.half");
    run_command(tar.arg("-cf").arg(&half).arg("-C").arg(scratch).arg("tree"))?;
    fs::rename(half, &packed)?;
    fs::remove_dir_all(tree)?;
    Ok(packed)
}

/// 1 to 16 KiB of lines; one file of each directory holds what grep looks for.
fn content(d: usize, f: usize) -> String {
    let lines = 20 + (d * 7 + f * 13) % 300;
    let mut text = String::new();
    for line in 0..lines {
        text += &format!("let value_{line} = compute({d}, {f}, {});\n", line * d + f);
    }
    if f == d % FILES_EACH {
        text += "// needle\n";
    }
    text
}
