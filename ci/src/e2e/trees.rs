//! Whole trees through the mount: copied, compared, cloned by git.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, FileType, Mode, XattrFlags};

use super::{Case, Rig};
use crate::proc::Cmd;

pub const CASES: &[Case] = &[
    ("cp_a_and_diff", cp_a),
    ("git_clone_and_fsck", git),
    ("tar_out_and_in", tar),
    ("many_small_files", many_small),
];

const LIMIT: Duration = Duration::from_secs(120);

/// A tree with everything that a copy may lose: links, modes, owners, times, xattrs, FIFOs, holes.
fn make_tree(root: &Path) -> Result<()> {
    for d in 0..20 {
        let dir = root.join(format!("dir-{d}/deep/deeper"));
        fs::create_dir_all(&dir)?;
        for f in 0..10 {
            let len = (d * 7919 + f * 104_729) % 70_000;
            let data: Vec<u8> = (0..len).map(|i| (i * (d + 3) + f) as u8).collect();
            let path = dir.join(format!("file-{f}"));
            fs::write(&path, data)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600 + (f as u32 * 9) % 0o200))?;
        }
        symlink("deep/deeper/file-1", root.join(format!("dir-{d}/link")))?;
        fs::hard_link(dir.join("file-2"), root.join(format!("dir-{d}/hard")))?;
        std::os::unix::fs::chown(dir.join("file-3"), Some(1000 + d as u32), Some(2000))?;
        rustix::fs::setxattr(dir.join("file-4"), "user.note", b"kept", XattrFlags::empty())?;
    }
    symlink("/nowhere/at all", root.join("dangling"))?;
    rustix::fs::mknodat(CWD, root.join("fifo"), FileType::Fifo, Mode::from(0o640), 0)?;
    let sparse = File::create(root.join("sparse"))?;
    sparse.set_len(64 << 20)?;
    sparse.write_all_at(b"in the middle", 32 << 20)?;
    fs::create_dir(root.join("empty"))?;
    let time = std::time::UNIX_EPOCH + Duration::new(1_000_000_000, 987_654_321);
    File::open(root.join("empty"))?.set_modified(time)?;
    Ok(())
}

fn cp_a(rig: &Rig) -> Result<()> {
    let source = rig.sandbox.make_dir("source")?;
    make_tree(&source)?;
    let mount = rig.mount("mnt", "")?;
    let (inside, back) = (mount.dir.join("copy"), rig.sandbox.path("back"));
    let copy = |from: &Path, to: &Path| {
        Cmd::new("cp").args(["-a", "--sparse=auto"]).arg(from).arg(to).limit(LIMIT).run()
    };
    copy(&source, &inside)?;
    copy(&inside, &back)?;
    for copied in [&inside, &rig.backing.join("copy"), &back] {
        // To diff two FIFOs are never equal; `describe` compares their type.
        let diff = Cmd::new("diff").args(["-r", "--no-dereference", "--exclude=fifo"]);
        diff.arg(&source).arg(copied).limit(LIMIT).run()?;
        compare(&describe(&source)?, &describe(copied)?)
            .with_context(|| format!("{} is not as the source", copied.display()))?;
        let blocks = fs::metadata(copied.join("sparse"))?.blocks();
        ensure!(blocks < 1000, "{} holds {blocks} blocks: not sparse", copied.display());
    }
    fs::remove_dir_all(&inside)?;
    mount.umount()
}

/// What diff does not see: by path, the attributes that `cp -a` keeps.
fn describe(root: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let meta = fs::symlink_metadata(&path)?;
            let mut note = [0; 64];
            let noted = rustix::fs::lgetxattr(&path, "user.note", &mut note[..]).unwrap_or(0);
            let (links, size) = if meta.is_dir() { (0, 0) } else { (meta.nlink(), meta.size()) };
            let text = format!(
                "mode {:o} owner {}:{} links {links} size {size} mtime {}.{:09} note {:?}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.mtime(),
                meta.mtime_nsec(),
                String::from_utf8_lossy(&note[..noted]),
            );
            found.insert(path.strip_prefix(root)?.to_path_buf(), text);
            if meta.is_dir() {
                dirs.push(path);
            }
        }
    }
    Ok(found)
}

fn compare(left: &BTreeMap<PathBuf, String>, right: &BTreeMap<PathBuf, String>) -> Result<()> {
    for path in left.keys().chain(right.keys()) {
        let (one, two) = (left.get(path), right.get(path));
        ensure!(one == two, "{}: {one:?} and {two:?}", path.display());
    }
    Ok(())
}

fn git(rig: &Rig) -> Result<()> {
    let origin = rig.sandbox.make_dir("origin")?;
    let git = |dir: &Path, args: &[&str]| {
        let git = Cmd::new("git").arg("-C").arg(dir).env("GIT_CONFIG_GLOBAL", "/dev/null");
        let who = ["-c", "user.name=ringfs", "-c", "user.email=ringfs@localhost"];
        git.args(who).args(["-c", "safe.directory=*"]).args(args).limit(LIMIT).run()
    };
    git(&origin, &["init", "-q"])?;
    for commit in 0..10 {
        for f in 0..40 {
            let dir = origin.join(format!("src/m{}", f % 8));
            fs::create_dir_all(&dir)?;
            fs::write(dir.join(format!("f{f}.txt")), format!("{commit} {f}\n").repeat(200 + f))?;
        }
        git(&origin, &["add", "-A"])?;
        git(&origin, &["commit", "-q", "-m", &format!("commit {commit}")])?;
    }
    let mount = rig.mount("mnt", "")?;
    let url = format!("file://{}", origin.display());
    git(&mount.dir, &["clone", "-q", &url, "clone"])?;
    let clone = mount.dir.join("clone");
    git(&clone, &["fsck", "--full", "--strict"])?;
    let status = git(&clone, &["status", "--porcelain"])?;
    ensure!(status.is_empty(), "a fresh clone is dirty: {status}");
    fs::write(clone.join("new"), "new")?;
    git(&clone, &["add", "new"])?;
    git(&clone, &["commit", "-q", "-m", "in the mount"])?;
    git(&clone, &["gc", "-q", "--prune=now"])?;
    git(&clone, &["checkout", "-q", "HEAD~5"])?;
    git(&clone, &["fsck", "--full", "--strict"])?;
    mount.umount()?;
    git(&rig.backing.join("clone"), &["fsck", "--full", "--strict"]).map(drop)
}

fn tar(rig: &Rig) -> Result<()> {
    let mount = rig.mount("mnt", "cache=never")?;
    let tree = mount.dir.join("tree");
    fs::create_dir(&tree)?;
    make_tree(&tree)?;
    let archive = mount.dir.join("tree.tar");
    let pack = Cmd::new("tar").args(["--xattrs", "-S", "-C"]).arg(&mount.dir);
    pack.arg("-cf").arg(&archive).arg("tree").limit(LIMIT).run()?;
    let out = mount.dir.join("out");
    fs::create_dir(&out)?;
    let unpack = Cmd::new("tar").args(["--xattrs", "-C"]).arg(&out).arg("-xpf").arg(&archive);
    unpack.limit(LIMIT).run()?;
    compare(&describe(&tree)?, &describe(&out.join("tree"))?)?;
    mount.umount()
}

/// More files than the daemon may open, all known to the guest: created, listed, read, removed.
fn many_small(rig: &Rig) -> Result<()> {
    const FILES: usize = 30_000;
    let mount = rig.mount("mnt", "")?;
    let at = |n: usize| mount.dir.join(format!("d{}/f{n}", n % 50));
    for d in 0..50 {
        fs::create_dir(mount.dir.join(format!("d{d}")))?;
    }
    for n in 0..FILES {
        fs::write(at(n), n.to_string()).with_context(|| format!("file {n}"))?;
    }
    for n in 0..FILES {
        ensure!(fs::read(at(n))? == n.to_string().as_bytes(), "file {n} differs");
    }
    fs::remove_dir_all(mount.dir.join("d7"))?;
    for d in (0..50).filter(|d| *d != 7) {
        let found = fs::read_dir(mount.dir.join(format!("d{d}")))?.count();
        ensure!(found == FILES / 50, "d{d} lists {found}");
    }
    mount.umount()
}
