//! `cargo xtask bench --vm`: ringfs over vsock, virtio-fs and 9p in one guest.
//!
//! One boot, one host directory in memory, three mounts of it: so `ringfs-bench`, run in the guest
//! from the host's root, has its interleaved rounds there too. QEMU emulates the processor, and its
//! threads and all servers share the host's CPUs: the report says that its figures are orders.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser as _;

use super::guest::{self, Extras};
use super::host::{self, Host};
use super::kernel::{self, Kernel, Series};
use super::process::Process;
use super::protocol::Outcome;
use super::scenario::{self, Step};
use super::tools::Tools;
use crate::paths;
use crate::proc::Cmd;
use crate::sandbox::Sandbox;

/// The report's first words.
const LABEL: &str = "emulated (QEMU TCG, no KVM): orders only, no claim about speed";
/// A contender, and the mount that makes and checks files behind all contenders' backs; the tag in
/// the guest, the name of process and socket, and what the guest may remember.
const VIRTIOFS: [Virtiofs; 2] = [
    Virtiofs { tag: "bench", name: "virtiofsd", cache: "auto" },
    Virtiofs { tag: "behind", name: "virtiofsd-behind", cache: "never" },
];
const LISTEN_LIMIT: Duration = Duration::from_secs(20);
/// Of the guest's step without `--quick`.
const LIMIT_S: u32 = 2400;

struct Virtiofs {
    tag: &'static str,
    name: &'static str,
    cache: &'static str,
}

impl Virtiofs {
    /// In the run's directory.
    fn socket(&self) -> String {
        format!("{}.sock", self.name)
    }

    /// As ringfs serves it: extended attributes, O_DIRECT left to the guest. It has no sandbox here
    /// because its guest is ours, and so it ends with one signal.
    fn arguments(&self, share: &Path) -> Vec<String> {
        let (share, socket) = (share.display().to_string(), self.socket());
        let all = ["--shared-dir", &share, "--socket-path", &socket, "--cache", self.cache];
        all.into_iter().chain(["--xattr", "--sandbox", "none"]).map(str::to_owned).collect()
    }

    fn start(&self, program: &Path, share: &Path, run_dir: &Path) -> anyhow::Result<Process> {
        let arguments = self.arguments(share);
        let mut process = Process::start(self.name, program, &arguments, run_dir, false)?;
        process.wait_for(&run_dir.join(self.socket()), LISTEN_LIMIT)?;
        Ok(process)
    }

    fn device(&self) -> [String; 4] {
        let Virtiofs { tag, name, .. } = self;
        [
            "-chardev".into(),
            format!("socket,id={name},path={}", self.socket()),
            "-device".into(),
            format!("vhost-user-fs-pci,queue-size=1024,chardev={name},tag={tag}"),
        ]
    }
}

/// What may be said beside `--vm`.
#[derive(Debug, clap::Parser)]
#[command(name = "cargo xtask bench --vm")]
struct Args {
    /// Smaller works, 3 rounds: about 5 minutes once the tools are built
    #[arg(long)]
    quick: bool,
    /// Interleaved rounds
    #[arg(long)]
    rounds: Option<u32>,
    /// Only works whose name holds one of these, comma-separated
    #[arg(long)]
    work: Option<String>,
    /// Keep the run's directory (logs, initramfs) also when all went well
    #[arg(long)]
    keep: bool,
}

impl Args {
    /// As `ringfs-bench` in the guest takes them, one a line.
    fn for_guest(&self) -> String {
        let mut lines = String::new();
        if self.quick {
            lines.push_str("--quick\n");
        }
        if let Some(rounds) = self.rounds {
            lines.push_str(&format!("--rounds={rounds}\n"));
        }
        if let Some(work) = &self.work {
            lines.push_str(&format!("--work={work}\n"));
        }
        lines
    }
}

/// Runs the command; `args` are those beside `--vm`.
pub fn run<'a>(args: impl Iterator<Item = &'a String>) -> anyhow::Result<()> {
    let args = args.map(String::as_str);
    let args = Args::parse_from(std::iter::once("cargo xtask bench --vm").chain(args));
    ensure!(args.work.as_ref().is_none_or(|work| !work.contains('\n')), "--work takes one line");
    let root = super::repository()?;
    let cache = root.join("target/vm");
    super::remove_stale_runs(&cache)?;
    let limit_s = if args.quick { scenario::BENCH.limit_s } else { LIMIT_S };
    let plan = [Step { limit_s, ..scenario::BENCH }];
    let tools = Tools::ready(&root, &plan)?;
    let kernel = kernel::fetch(Series::V6_12, &cache)?;
    let run_dir = cache.join(format!("run-{}", std::process::id()));
    let made = super::make_run_dir(&run_dir)?;
    println!("bench --vm: {LABEL}");
    let outcome = measure(&args, &kernel, &tools, &plan, &run_dir);
    super::tidy_run(&run_dir, made, args.keep || outcome.is_err())?;
    outcome
}

fn measure(
    args: &Args,
    kernel: &Kernel,
    tools: &Tools,
    plan: &[Step],
    run_dir: &Path,
) -> anyhow::Result<()> {
    let memory = Sandbox::in_memory()?;
    let share = memory.make_dir("share")?;
    let bench = tools.bench.as_ref().context("the bench's programs were not built")?;
    let product = tools.product.as_ref().context("ringfs was not built")?;
    let mut host = Host::serve(run_dir, &product.daemon, &share)?;
    let mut virtiofsds = Vec::new();
    for one in VIRTIOFS {
        virtiofsds.push(one.start(&bench.virtiofsd, &share, run_dir)?);
    }
    let mut extras = Extras { devices: devices(&share), files: Vec::new() };
    let about = about(kernel, tools, run_dir, &share, &extras)?;
    extras.files = vec![("bench-about", about), ("bench-arguments", args.for_guest())];
    let results = guest::boot(kernel, tools, plan, &mut host, run_dir, &extras)?;
    let report = take_report(&share);
    for (_, outcome, _) in results {
        if let Outcome::Failed(why) | Outcome::Skipped(why) = outcome {
            for virtiofsd in &virtiofsds {
                println!("  virtiofsd:\n{}", virtiofsd.log_tail(8));
            }
            println!("  ringfsd:\n{}", host.daemon_log().unwrap_or_default());
            anyhow::bail!("the bench in the guest: {why}");
        }
    }
    report
}

/// The contenders that QEMU has a part in, and the way behind their backs.
fn devices(share: &Path) -> Vec<String> {
    let share = share.display();
    let nine =
        format!("local,path={share},mount_tag=bench,security_model=passthrough,multidevs=remap");
    let devices = VIRTIOFS.iter().flat_map(Virtiofs::device);
    devices.chain(["-virtfs".into(), nine]).collect()
}

/// The label, then versions and command lines of what runs on the host.
fn about(
    kernel: &Kernel,
    tools: &Tools,
    run_dir: &Path,
    share: &Path,
    extras: &Extras,
) -> anyhow::Result<String> {
    let bench = tools.bench.as_ref().context("the bench's programs were not built")?;
    let product = tools.product.as_ref().context("ringfs was not built")?;
    let programs = [
        (&bench.virtiofsd, VIRTIOFS[0].arguments(share)),
        (&bench.virtiofsd, VIRTIOFS[1].arguments(share)),
        (&product.daemon, host::daemon_arguments(share, &host::direct_socket())),
        (&tools.vhost_vsock, guest::vhost_arguments().into()),
        (&tools.qemu, guest::qemu_arguments(kernel, run_dir, extras)),
    ];
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut text = format!("{LABEL}\nguest of {}, host Linux {}\n", kernel.package, host.trim());
    for (program, arguments) in programs {
        let said = Cmd::new(program).arg("--version").run()?;
        let version = said.lines().next().unwrap_or_default();
        text.push_str(&format!("{version}\n  $ {} {}\n", program.display(), arguments.join(" ")));
    }
    Ok(text)
}

/// Brings the report from the shared directory to where those of other runs are.
fn take_report(share: &Path) -> anyhow::Result<()> {
    let entry = fs::read_dir(share.join("report")).ok().and_then(|mut dir| dir.next());
    let from = entry.context("the guest wrote no report")??;
    let to = paths::target().join("bench").join(from.file_name());
    fs::create_dir_all(&to)?;
    for file in fs::read_dir(from.path())? {
        let file = file?;
        fs::copy(file.path(), to.join(file.file_name()))?;
    }
    println!("report of the guest: {}", to.join("index.html").display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_reach_the_guest_line_by_line() {
        fn check(args: &[&str], expected: &str) {
            let args = Args::try_parse_from(["x"].iter().chain(args)).expect("they parse");
            assert_eq!(args.for_guest(), expected);
        }
        check(&[], "");
        check(&["--quick", "--keep"], "--quick\n");
        check(&["--rounds", "5", "--work", "stat,read"], "--rounds=5\n--work=stat,read\n");
        assert!(Args::try_parse_from(["x", "--backing", "ext4"]).is_err());
    }

    #[test]
    fn all_serve_the_same_directory() {
        let share = Path::new("/dev/shm/x");
        for one in VIRTIOFS {
            assert!(one.arguments(share).contains(&"/dev/shm/x".to_owned()));
        }
        let devices = devices(share).join(" ");
        assert_eq!(devices.matches("path=/dev/shm/x,").count(), 1);
        assert_eq!(devices.matches("vhost-user-fs-pci").count(), VIRTIOFS.len());
    }
}
