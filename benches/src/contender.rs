//! Those that are compared: each serves the same directory at a place of its own.

use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Who.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The directory itself.
    Bare,
    /// libfuse's passthrough_ll with cloned fds: the same work without a socket between.
    Local,
    /// ringfs over a Unix socket, as it comes.
    Ringfs,
}

impl Kind {
    /// In the order of the columns.
    pub const ALL: [Kind; 3] = [Kind::Bare, Kind::Local, Kind::Ringfs];

    /// The column's name.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Bare => "bare",
            Kind::Local => "local",
            Kind::Ringfs => "ringfs",
        }
    }
}

/// One that runs. Dropping it unmounts and stops it.
pub struct Contender {
    kind: Kind,
    path: PathBuf,
    command: String,
    mounted: bool,
    /// Ended in reverse order.
    children: Vec<Child>,
}

impl Contender {
    /// Starts serving `backing` at `mountpoint`.
    pub fn start(
        kind: Kind,
        backing: &Path,
        mountpoint: &Path,
        tools: &Path,
        bin: &Path,
        options: Option<&str>,
    ) -> Result<Contender> {
        let mut contender = Contender {
            kind,
            path: mountpoint.to_owned(),
            command: String::from("(no program)"),
            mounted: false,
            children: Vec::new(),
        };
        match kind {
            Kind::Bare => contender.path = backing.to_owned(),
            Kind::Local => {
                std::fs::create_dir(mountpoint)?;
                let program = build_passthrough(tools)?;
                let source = format!("source={},cache=auto,timeout=1", backing.display());
                let mut command = Command::new(program);
                command.args(["-f", "-o", "clone_fd", "-o", "allow_other,default_permissions"]);
                command.args(["-o", &source]).arg(mountpoint);
                contender.spawn(command)?;
                contender.wait_mounted()?;
            }
            Kind::Ringfs => {
                std::fs::create_dir(mountpoint)?;
                let socket = tools.join("socket");
                let mut daemon = Command::new(bin.join("ringfsd"));
                daemon.arg("--share").arg(format!("bench={}", backing.display()));
                daemon.arg("--listen").arg(format!("unix:{}", socket.display()));
                contender.spawn(daemon)?;
                contender.wait_for("the daemon's socket", || socket.exists())?;
                let mut mount = Command::new(bin.join("ringfs"));
                mount.arg("mount").arg(format!("bench@unix:{}", socket.display()));
                mount.arg(mountpoint).arg("--foreground");
                mount.args(options.iter().flat_map(|options| ["-o", options]));
                contender.spawn(mount)?;
                contender.wait_mounted()?;
            }
        }
        Ok(contender)
    }

    /// The column's name.
    pub fn name(&self) -> &'static str {
        self.kind.name()
    }

    /// Where the work is done.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was started.
    pub fn command(&self) -> &str {
        &self.command
    }

    fn spawn(&mut self, mut command: Command) -> Result<()> {
        let shown = format!("{command:?}").replace('"', "");
        self.command =
            if self.children.is_empty() { shown } else { format!("{} + {shown}", self.command) };
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        command.env("RUST_LOG", "warn");
        let child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
        self.children.push(child);
        Ok(())
    }

    fn wait_mounted(&mut self) -> Result<()> {
        let mountpoint = self.path.canonicalize()?.display().to_string();
        self.mounted = true;
        self.wait_for("the mount", || {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            mounts.lines().any(|line| line.split(' ').nth(4) == Some(&mountpoint))
        })
    }

    fn wait_for(&mut self, what: &str, mut ready: impl FnMut() -> bool) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(10);
        while !ready() {
            for child in &mut self.children {
                if let Some(status) = child.try_wait()? {
                    bail!("{} ended with {status} while waiting for {what}", self.command);
                }
            }
            ensure!(Instant::now() < until, "{what} did not appear within 10 s");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        if self.mounted {
            let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
        }
        for child in self.children.iter_mut().rev() {
            let pid = rustix::process::Pid::from_child(child);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let until = Instant::now() + Duration::from_secs(5);
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Builds libfuse's example, which Debian ships as source.
fn build_passthrough(tools: &Path) -> Result<PathBuf> {
    let program = tools.join("passthrough_ll");
    if program.exists() {
        return Ok(program);
    }
    let examples = Path::new("/usr/share/doc/libfuse3-dev/examples");
    let mut source = examples.join("passthrough_ll.c");
    if !source.exists() {
        let packed = examples.join("passthrough_ll.c.gz");
        ensure!(
            packed.exists(),
            "passthrough_ll.c is not in {examples:?}: apt-get install libfuse3-dev gcc pkg-config"
        );
        source = tools.join("passthrough_ll.c");
        let out = Command::new("gunzip").arg("-c").arg(packed).output()?;
        std::fs::write(&source, out.stdout)?;
        std::fs::copy(examples.join("passthrough_helpers.h"), tools.join("passthrough_helpers.h"))?;
    }
    let flags = Command::new("pkg-config").args(["--cflags", "--libs", "fuse3"]).output()?;
    let flags = String::from_utf8(flags.stdout)?;
    let status = Command::new("gcc")
        .args(["-O2", "-o"])
        .arg(&program)
        .arg(&source)
        .arg(format!("-I{}", examples.display()))
        .args(flags.split_whitespace())
        .status()
        .context("cannot run gcc")?;
    ensure!(status.success(), "gcc could not build passthrough_ll");
    Ok(program)
}
