//! `cargo xtask package`: what strangers install, in `target/packages`.
//!
//! Static programs (they run on any Linux of x86-64, also in an initramfs and an empty container),
//! man pages and completions as the programs themselves write them, as two Debian packages, a
//! tarball for guests, and the place that `packaging/Containerfile` builds from.
//! Invariant: nothing is installed on this machine; `--test` installs into a directory of its own.

mod container;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::deps;
use crate::guard::{Guard, Undo};
use crate::paths;
use crate::proc::Cmd;
use crate::rig::SETTLE;
use crate::sandbox::{Sandbox, wait_unmounted};
use crate::vm;

const CARGO_DEB: deps::CargoTool = ("cargo-deb", "3.8.0");

/// What `cargo xtask package` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Install the packages into a directory of their own, and mount with what stands there
    #[arg(long)]
    test: bool,
}

/// A program and the package of cargo that it is from.
const PROGRAMS: [(&str, &str); 2] =
    [("ringfs", "ringfs-client"), ("ringfsd", "ringfs-server-uring")];

/// Makes all of it; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    // gzip and tar are in every Debian; strip comes with the linker that cargo needs anyway.
    let cargo_deb = deps::cargo_tool(CARGO_DEB)?;
    let out = paths::root().join("target/packages");
    if out.exists() {
        fs::remove_dir_all(&out)?;
    }
    for (program, package) in PROGRAMS {
        let built = vm::static_program(&paths::root(), package, program)?;
        stage(&built, program, &out.join("stage").join(program))?;
    }
    let mut made = Vec::new();
    for (program, package) in PROGRAMS {
        let deb = Cmd::new(&cargo_deb).dir(paths::root()).args(["--no-build", "--no-strip", "-q"]);
        deb.args(["--package", package, "--output"]).arg(&out).run()?;
        made.push(made_deb(&out, program)?);
    }
    let version = env!("CARGO_PKG_VERSION");
    let tarball = out.join(format!("ringfs-{version}-x86_64-linux-static.tar.gz"));
    Cmd::new("tar")
        .args(["--owner=0", "--group=0", "--sort=name", "-czf"])
        .arg(&tarball)
        .arg("-C")
        .arg(out.join("stage/ringfs"))
        .arg("usr")
        .run()?;
    made.push(tarball);
    fs::copy(out.join("stage/ringfsd/usr/bin/ringfsd"), out.join("ringfsd"))?;
    fs::copy(paths::root().join("packaging/Containerfile"), out.join("Containerfile"))?;
    for file in made.iter().chain([&out.join("ringfsd")]) {
        let kib = fs::metadata(file)?.len().div_ceil(1024);
        println!("package: {} ({kib} KiB)", file.display());
    }
    if args.test {
        test(&out, &made)?;
        return Ok("made, installed, used and removed".into());
    }
    Ok(format!("{} packages in {}", made.len(), out.display()))
}

fn made_deb(out: &Path, program: &str) -> Result<PathBuf> {
    let start = format!("{program}_");
    let found = fs::read_dir(out)?.flatten().map(|entry| entry.path()).find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(&start) && name.ends_with(".deb")
    });
    found.with_context(|| format!("cargo-deb made no {program} package"))
}

/// Everything of one program as it is to stand below `/`.
fn stage(built: &Path, name: &str, root: &Path) -> Result<()> {
    let dir = |path: &str| -> Result<PathBuf> {
        let path = root.join(path);
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(path)
    };
    let program = dir("usr/bin")?.join(name);
    Cmd::new("strip").arg("-o").arg(&program).arg(built).run()?;
    let man = dir("usr/share/man/man1")?;
    Cmd::new(&program).arg("man-pages").arg(&man).run()?;
    for page in fs::read_dir(&man)?.flatten() {
        let text = fs::read_to_string(page.path())?;
        fs::write(page.path(), keep_lines(&text))?;
        Cmd::new("gzip").args(["-9n"]).arg(page.path()).run()?;
    }
    for (shell, place, file) in [
        ("bash", "usr/share/bash-completion/completions", name.to_owned()),
        ("zsh", "usr/share/zsh/vendor-completions", format!("_{name}")),
        ("fish", "usr/share/fish/vendor_completions.d", format!("{name}.fish")),
    ] {
        let text = Cmd::new(&program).args(["completions", shell]).run()?;
        fs::write(dir(place)?.join(file), text)?;
    }
    if name == "ringfs" {
        // As mount(8) looks for it: for `-t ringfs`, and for the kernel's name of a mounted one.
        let sbin = dir("usr/sbin")?;
        for link in ["mount.ringfs", "mount.fuse.ringfs"] {
            symlink("../bin/ringfs", sbin.join(link))?;
        }
        let unit = "ringfs@.service";
        let from = paths::root().join("packaging/systemd-guest").join(unit);
        fs::copy(from, dir("usr/lib/systemd/system")?.join(unit))?;
    }
    Ok(())
}

/// What stands behind the options in `--help` is laid out in lines: a man page keeps them.
fn keep_lines(page: &str) -> String {
    let Some((before, extra)) = page.split_once(".SH EXTRA\n") else { return page.to_owned() };
    let (extra, after) = match extra.split_once("\n.SH ") {
        Some((extra, after)) => (extra, format!("\n.SH {after}")),
        None => (extra, String::new()),
    };
    format!("{before}.SH NOTES\n.nf\n{extra}\n.fi{after}")
}

/// Installs the packages below a directory, mounts with what stands there, removes them again.
fn test(out: &Path, made: &[PathBuf]) -> Result<()> {
    let sandbox = Sandbox::new()?;
    let root = sandbox.make_dir("root")?;
    for dir in ["info", "updates", "triggers"] {
        fs::create_dir_all(root.join("var/lib/dpkg").join(dir))?;
    }
    for file in ["status", "available"] {
        File::create(root.join("var/lib/dpkg").join(file))?;
    }
    let dpkg = || Cmd::new("dpkg").arg(format!("--root={}", root.display()));
    let debs = made.iter().filter(|file| file.extension().is_some_and(|ext| ext == "deb"));
    dpkg().arg("-i").args(debs).run()?;
    dpkg().args(["--verify", "ringfs", "ringfsd"]).run()?;
    for (program, _) in PROGRAMS {
        let gz = root.join(format!("usr/share/man/man1/{program}.1.gz"));
        let page = Cmd::new("gzip").arg("-dc").arg(gz).run()?;
        ensure!(page.contains(".SH NOTES\n.nf\n"), "{program}.1 has no notes");
        let bash = root.join("usr/share/bash-completion/completions").join(program);
        Cmd::new("bash").arg("-n").arg(bash).run()?;
    }
    mounted(&sandbox, &root.join("usr/bin/ringfsd"), &root.join("usr/sbin/mount.ringfs"))?;
    println!("package: installed by dpkg, mounted by its mount.ringfs, unmounted");
    dpkg().args(["--purge", "ringfs", "ringfsd"]).run()?;
    ensure!(!root.join("usr/bin/ringfs").exists(), "dpkg left usr/bin/ringfs");
    let guest = sandbox.make_dir("guest")?;
    Cmd::new("tar").arg("-xzf").arg(&made[2]).arg("-C").arg(&guest).run()?;
    let helper = guest.join("usr/sbin/mount.ringfs");
    container::by_hand(&sandbox, &out.join("ringfsd"), &helper)?;
    container::of_containerfile(&sandbox, out, &helper)
}

fn mounted(sandbox: &Sandbox, ringfsd: &Path, helper: &Path) -> Result<()> {
    let (share, dir) = (sandbox.make_dir("share")?, sandbox.make_dir("mnt")?);
    fs::write(share.join("file"), "of the host")?;
    let socket = sandbox.path("s.sock");
    let mut daemon = Cmd::new(ringfsd)
        .args(["--share".to_owned(), format!("d={}", share.display())])
        .args(["--listen".to_owned(), format!("unix:{}", socket.display())])
        .args(["--state-dir", "none"])
        .spawn(&sandbox.path("ringfsd.log"))?;
    let up = crate::guard::poll_until(SETTLE, || {
        Ok(socket.exists() || daemon.wait(std::time::Duration::ZERO)?.is_some())
    })?;
    ensure!(up && socket.exists(), "{}", crate::proc::tail_of(&sandbox.path("ringfsd.log")));
    use_mount(helper, &socket, &dir)?;
    let status = daemon.stop(SETTLE)?;
    ensure!(status.success(), "ringfsd ended with {status}");
    Ok(())
}

fn use_mount(helper: &Path, socket: &Path, dir: &Path) -> Result<()> {
    let guard = Guard::new(Undo::Mount(dir.to_owned()));
    let source = format!("d@unix:{}", socket.display());
    Cmd::new(helper).arg(source).arg(dir).args(["-o", "rw,_netdev"]).limit(SETTLE).run()?;
    ensure!(fs::read(dir.join("file"))? == b"of the host", "other bytes");
    fs::write(dir.join("new"), "of the guest")?;
    Cmd::new("umount").arg(dir).limit(SETTLE).run()?;
    wait_unmounted(dir, SETTLE)?;
    guard.disarm();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::keep_lines;

    #[test]
    fn notes_keep_their_lines() {
        let page = "a\n.SH EXTRA\nx\n y\n.SH VERSION\nv1\n";
        assert_eq!(keep_lines(page), "a\n.SH NOTES\n.nf\nx\n y\n.fi\n.SH VERSION\nv1\n");
        assert_eq!(keep_lines("a\n.SH EXTRA\nx\n"), "a\n.SH NOTES\n.nf\nx\n\n.fi");
        assert_eq!(keep_lines("a\n"), "a\n");
    }
}
