//! One boot: builds the initramfs, starts the vsock device and QEMU, and follows the guest's words.
//!
//! Every wait has a limit: the boot, each step (the guest's own limit and some grace), the end.
//! Whatever happens, the result has one entry for each planned step.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::host::{ECHO_PORT, Host, LOOP_PORT, PORT, SHARE, UDS_BASE};
use super::initramfs::Initramfs;
use super::kernel::Kernel;
use super::process::{Process, tail};
use super::protocol::{Event, Outcome, parse};
use super::scenario::{self, Step};
use super::tools::Tools;
use crate::guard;

const VHOST_SOCKET: &str = "vhost.sock";
const GUEST_CID: u32 = 3;
const MEMORY_MIB: u32 = 2048;
const LISTEN_LIMIT: Duration = Duration::from_secs(20);
/// Without KVM, on a machine where others build: 3-7 s were measured on an idle one.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// From one step to the next, and over a step's own limit.
const STEP_GRACE: Duration = Duration::from_secs(60);
const POWEROFF_LIMIT: Duration = Duration::from_secs(60);
/// Bounds what a guest can make us hold; a line is read at once.
const LINES_QUEUED_MAX: usize = 1024;

/// How the planned steps ended, with the time each took.
pub type Results = Vec<(&'static str, Outcome, Duration)>;

/// What a boot has beside the plan's needs.
#[derive(Default)]
pub struct Extras {
    /// Further arguments of QEMU.
    pub devices: Vec<String>,
    /// Further files below the guest's /run/guest, by name.
    pub files: Vec<(&'static str, String)>,
}

/// Boots `kernel` in `run_dir` and runs `plan`.
pub fn boot(
    kernel: &Kernel,
    tools: &Tools,
    plan: &[Step],
    host: &mut Host,
    run_dir: &Path,
    extras: &Extras,
) -> anyhow::Result<Results> {
    std::fs::write(initrd(run_dir), build_initramfs(kernel, tools, plan, extras)?)?;
    let mut vhost = Process::start(
        "vhost-device-vsock",
        &tools.vhost_vsock,
        &vhost_arguments(),
        run_dir,
        false,
    )?;
    vhost.wait_for(&run_dir.join(VHOST_SOCKET), LISTEN_LIMIT)?;
    let started = Instant::now();
    let arguments = qemu_arguments(kernel, run_dir, extras);
    let mut qemu = Process::start("qemu", &tools.qemu, &arguments, run_dir, true)?;
    let lines = read_lines(&mut qemu)?;
    let mut run = Run { plan, host, results: Vec::new(), running: None, started };
    let end = run.follow(&mut qemu, &lines);
    guard::rest_if_ending();
    if end.is_ok() && !qemu.wait_end(POWEROFF_LIMIT) {
        println!("  the guest did not power off; it is killed");
    }
    drop(qemu);
    let why = end.err().map(|error| format!("{error:#}"));
    if let Some(why) = &why {
        println!("  {why}");
        println!("  end of the guest's console:\n{}", tail(&run_dir.join("console.log"), 25));
        println!("  vhost-device-vsock:\n{}", vhost.log_tail(8));
    }
    Ok(run.finish(why.as_deref().unwrap_or("the guest never ran it")))
}

/// What is known while the guest runs.
struct Run<'a> {
    plan: &'a [Step],
    host: &'a mut Host,
    results: Results,
    running: Option<(&'static str, Instant)>,
    started: Instant,
}

impl Run<'_> {
    /// Reads the guest's words until it is done.
    fn follow(&mut self, qemu: &mut Process, lines: &Receiver<String>) -> anyhow::Result<()> {
        let mut deadline = Instant::now() + BOOT_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match lines.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    anyhow::bail!("the guest says nothing within the limit: it hangs")
                }
                Err(RecvTimeoutError::Disconnected) => {
                    self.host.check_running()?;
                    anyhow::bail!("the guest has stopped before it was done")
                }
            };
            match parse(&line) {
                Some(Event::Boot { release, uptime }) => {
                    let after = self.started.elapsed().as_secs_f64();
                    println!("  Linux {release}: init after {after:.1} s (uptime {uptime} s)");
                    deadline = Instant::now() + STEP_GRACE + BOOT_LIMIT;
                }
                Some(Event::Begin(name)) => {
                    let step = self.plan.iter().find(|step| step.name == name);
                    let step =
                        step.with_context(|| format!("the guest runs unplanned {name:?}"))?;
                    self.running = Some((step.name, Instant::now()));
                    let limit = Duration::from_secs(u64::from(step.limit_s));
                    deadline = Instant::now() + limit + STEP_GRACE;
                }
                Some(Event::Step(name, outcome)) => {
                    self.step_ended(name, outcome)?;
                    deadline = Instant::now() + STEP_GRACE;
                }
                Some(Event::Note(text)) => println!("      {text}"),
                Some(Event::Fact(key, value)) => println!("    {key}: {value}"),
                Some(Event::Ask(request)) => {
                    let answer = self.host.answer(request);
                    let input = qemu.child().stdin.as_mut().context("qemu without stdin")?;
                    writeln!(input, "{answer}")?;
                    input.flush()?;
                }
                Some(Event::Done) => return Ok(()),
                Some(Event::Fatal(why)) => anyhow::bail!("the guest gave up: {why}"),
                None => {} // firmware writes to serial ports too
            }
        }
    }

    fn step_ended(&mut self, name: &str, outcome: Outcome) -> anyhow::Result<()> {
        let (running, since) = self.running.take().context("a step ended that never began")?;
        anyhow::ensure!(running == name, "step {name:?} ended while {running} ran");
        let took = since.elapsed();
        print_step(running, &outcome, took);
        self.results.push((running, outcome, took));
        Ok(())
    }

    /// Steps without an end have failed.
    fn finish(mut self, why: &str) -> Results {
        for step in self.plan {
            if !self.results.iter().any(|(name, _, _)| *name == step.name) {
                let took = match self.running {
                    Some((name, since)) if name == step.name => since.elapsed(),
                    _ => Duration::ZERO,
                };
                let outcome = Outcome::Failed(why.to_owned());
                print_step(step.name, &outcome, took);
                self.results.push((step.name, outcome, took));
            }
        }
        self.results
    }
}

fn print_step(name: &str, outcome: &Outcome, took: Duration) {
    let (how, why) = match outcome {
        Outcome::Ok(why) => ("ok", why),
        Outcome::Failed(why) => ("FAILED", why),
        Outcome::Skipped(why) => ("skipped", why),
    };
    println!("  {name:<20} {how:<8} {:>6.1} s  {why}", took.as_secs_f64());
}

fn read_lines(qemu: &mut Process) -> anyhow::Result<Receiver<String>> {
    let output = qemu.child().stdout.take().context("qemu without stdout")?;
    let (sender, lines) = sync_channel(LINES_QUEUED_MAX);
    std::thread::spawn(move || {
        for bytes in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            // The other end is gone when the run is over.
            if sender.send(String::from_utf8_lossy(&bytes).into_owned()).is_err() {
                return;
            }
        }
    });
    Ok(lines)
}

fn initrd(run_dir: &Path) -> PathBuf {
    run_dir.join("initrd")
}

fn build_initramfs(
    kernel: &Kernel,
    tools: &Tools,
    plan: &[Step],
    extras: &Extras,
) -> anyhow::Result<Vec<u8>> {
    let read =
        |path: &Path| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
    let mut root = Initramfs::default();
    for dir in ["bin", "guest", "modules"] {
        root.directory(dir);
    }
    root.file("init", include_bytes!("../../guest/init"));
    root.file("bin/busybox", &read(&tools.busybox)?);
    let mut order = String::new();
    for module in &kernel.modules {
        root.file(&format!("modules/{}.ko", module.name), &module.object);
        order.push_str(&module.name);
        order.push('\n');
    }
    root.file("modules/order", order.as_bytes());
    root.file("guest/stage", include_bytes!("../../guest/stage"));
    root.file("guest/shutdown", include_bytes!("../../guest/shutdown"));
    root.file("guest/step", include_bytes!("../../guest/step"));
    root.file("guest/pjdfstest.toml", include_bytes!("../../guest/pjdfstest.toml"));
    root.file("guest/plan", scenario::as_text(plan).as_bytes());
    let programs = host_programs(tools)?;
    root.file("guest/env", environment(&programs).as_bytes());
    let lines: String =
        programs.iter().map(|(name, path)| format!("{name} {}\n", path.display())).collect();
    root.file("guest/programs", lines.as_bytes());
    for (name, text) in &extras.files {
        root.file(&format!("guest/{name}"), text.as_bytes());
    }
    if let Some(product) = &tools.product {
        root.file("guest/ringfs", &read(&product.client)?);
    }
    Ok(root.finish())
}

/// Variables of `ci/guest/step`: what both sides have to agree on.
fn environment(programs: &[(&str, PathBuf)]) -> String {
    let mut text =
        format!("SHARE={SHARE}\nPORT={PORT}\nECHO_PORT={ECHO_PORT}\nLOOP_PORT={LOOP_PORT}\n");
    for (name, _) in programs {
        text.push_str(&format!("{}=/run/guest/bin/{name}\n", name.to_uppercase()));
    }
    text
}

/// Programs that the guest takes from the host's root, under the names that steps know them by.
fn host_programs(tools: &Tools) -> anyhow::Result<Vec<(&'static str, PathBuf)>> {
    let daemon = tools.product.as_ref().map(|product| &product.daemon);
    let ourselves = std::env::current_exe()?;
    let all = [
        ("ping", Some(&tools.ping)),
        ("xtask", Some(&ourselves)),
        ("ringfsd", daemon),
        ("pjdfstest", tools.pjdfstest.as_ref()),
        ("bench", tools.bench.as_ref().map(|bench| &bench.program)),
    ];
    let mut programs = Vec::new();
    for (name, path) in all {
        if let Some(path) = path {
            // The guest sees the host's root through 9p, where links would leave it.
            programs.push((name, path.canonicalize()?));
        }
    }
    Ok(programs)
}

/// What vhost-device-vsock is started with.
pub fn vhost_arguments() -> [String; 3] {
    [
        format!("--guest-cid={GUEST_CID}"),
        format!("--socket={VHOST_SOCKET}"),
        format!("--uds-path={UDS_BASE}"),
    ]
}

/// What QEMU is started with.
pub fn qemu_arguments(kernel: &Kernel, run_dir: &Path, extras: &Extras) -> Vec<String> {
    let memory = format!("memory-backend-memfd,id=mem0,size={MEMORY_MIB}M,share=on");
    let text = |path: &Path| path.display().to_string();
    let megabytes = MEMORY_MIB.to_string();
    let (image, initrd) = (text(&kernel.image), text(&initrd(run_dir)));
    let vhost = format!("socket,id=vs,path={VHOST_SOCKET}");
    [
        "-M q35 -accel tcg,thread=multi -cpu max -smp 2 -nodefaults -no-user-config -no-reboot",
        "-display none -monitor none -nic none -serial file:console.log -serial stdio",
        "-numa node,memdev=mem0 -device vhost-user-vsock-pci,chardev=vs",
        "-virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
    ]
    .iter()
    .flat_map(|arguments| arguments.split(' '))
    .chain(["-m", &megabytes, "-object", &memory, "-chardev", &vhost])
    .chain(["-kernel", &image, "-initrd", &initrd])
    // A panic must stop the machine: panic=-1 reboots, and -no-reboot turns that into an end.
    .chain(["-append", "console=ttyS0 quiet panic=-1 oops=panic"])
    .map(str::to_owned)
    .chain(extras.devices.iter().cloned())
    .collect()
}
