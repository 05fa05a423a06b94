//! The daemon where there is nothing else: in the image of `packaging/Containerfile`, built and run
//! by podman where that is installed, and in a root that is made by hand.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};

use super::use_mount;
use crate::guard::poll_until;
use crate::proc::{Cmd, tail_of};
use crate::rig::SETTLE;
use crate::sandbox::Sandbox;

/// What `FROM scratch` gives the daemon: its program, a share, a place for its socket, and /proc.
pub fn by_hand(sandbox: &Sandbox, ringfsd: &Path, helper: &Path) -> Result<()> {
    let root = sandbox.make_dir("scratch")?;
    for dir in ["proc", "srv/data", "run/ringfs"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::copy(ringfsd, root.join("ringfsd"))?;
    fs::write(root.join("srv/data/file"), "of the host")?;
    let script = "mount -t proc proc \"$0/proc\" && exec chroot \"$0\" /ringfsd \
                  --share d=/srv/data --listen unix:/run/ringfs/s.sock --state-dir none";
    let unshare = Cmd::new("unshare").args(["--mount", "sh", "-c", script]).arg(&root);
    let daemon = unshare.spawn(&sandbox.path("scratch.log"))?;
    let socket = root.join("run/ringfs/s.sock");
    let up = poll_until(SETTLE, || Ok(socket.exists()))?;
    ensure!(up, "{}", tail_of(&sandbox.path("scratch.log")));
    use_mount(helper, &socket, &sandbox.make_dir("mnt-scratch")?)?;
    ensure!(daemon.stop(SETTLE)?.success(), "ringfsd did not end well in its empty root");
    println!("package: the daemon served from a root without any other file");
    Ok(())
}

/// How long podman may take for anything.
const PODMAN_LIMIT: Duration = Duration::from_secs(60);

/// podman with images of its own, which go with the sandbox.
struct Podman(PathBuf);

impl Podman {
    fn cmd(&self) -> Cmd {
        let at = |name: &str| self.0.join(name).display().to_string();
        Cmd::new("podman")
            .args(["--root", &at("root"), "--runroot", &at("run"), "--tmpdir", &at("tmp")])
            .args(["--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--runtime=runc"])
            .args(["--events-backend=none"])
            .limit(PODMAN_LIMIT)
    }

    /// With what a container has that nobody gives anything: no network, podman's capabilities and
    /// system calls, limits that need no right to be raised.
    fn run(&self) -> Cmd {
        self.cmd()
            .args(["run", "--rm", "--network=none"])
            .args(["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"])
    }
}

/// The image, as its file says. Said loudly where there is no podman to build it.
pub fn of_containerfile(sandbox: &Sandbox, out: &Path, helper: &Path) -> Result<()> {
    for program in ["podman", "runc"] {
        if Cmd::new(program).arg("--version").run().is_err() {
            println!("package: SKIPPED, NOT RUN: the Containerfile; there is no {program}");
            return Ok(());
        }
    }
    let podman = Podman(sandbox.make_dir("podman")?);
    podman.cmd().args(["build", "-q", "-t", "ringfsd"]).arg(out).run()?;
    let help = podman.run().arg("ringfsd").run()?;
    ensure!(help.contains("--share"), "the image's program says: {help}");

    let (data, run) = (sandbox.make_dir("data")?, sandbox.make_dir("socket")?);
    fs::write(data.join("file"), "of the host")?;
    let volume = |dir: &Path, at: &str| format!("--volume={}:{at}", dir.display());
    let volumes = [volume(&data, "/srv/data"), volume(&run, "/run/ringfs")];
    let serve = ["--share=d=/srv/data", "--listen=unix:/run/ringfs/s.sock", "--state-dir=none"];
    // Root there may make no namespaces: it says what does without them.
    let told = podman.run().args(&volumes).arg("ringfsd").args(serve).output()?;
    let said = told.text;
    ensure!(!told.status.success() && said.contains("--sandbox=landlock"), "it says: {said}");

    let log = sandbox.path("podman.log");
    let command = podman.run().args(&volumes).args(["--name=daemon", "ringfsd"]).args(serve);
    // Podman's list of system calls may have no io_uring.
    let command = command.args(["--sandbox=landlock", "--engine=threads"]);
    let mut daemon = command.spawn(&log)?;
    let socket = run.join("s.sock");
    let up =
        poll_until(PODMAN_LIMIT, || Ok(socket.exists() || daemon.wait(Duration::ZERO)?.is_some()))?;
    ensure!(up && socket.exists(), "{}", tail_of(&log));
    use_mount(helper, &socket, &sandbox.make_dir("mnt-podman")?)?;
    podman.cmd().args(["stop", "--time=10", "daemon"]).run()?;
    let ended = daemon.wait(PODMAN_LIMIT)?;
    ensure!(ended.is_some_and(|status| status.success()), "{ended:?}: {}", tail_of(&log));
    podman.cmd().args(["rmi", "--force", "--all"]).run()?;
    println!("package: the Containerfile was built by podman, run and mounted");
    Ok(())
}
