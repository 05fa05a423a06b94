//! `ringfsd`: shares host directories with guests.

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use ringfs_server::accept::Address;
use ringfs_server::daemon::{self, Config, Engine, ShareConfig};
use ringfs_server::limits::GRACE_SECS_DEFAULT;
use ringfs_server::sandbox::Sandbox;
use ringfs_server::state_dir::StateOption;
use ringfs_wire::spin::SPIN_TRIES_DEFAULT;
use std::path::PathBuf;
use std::time::Duration;

/// Shares host directories with guests that mount them by `ringfs`.
///
/// One thread and one io_uring a CPU serve all guests; the CPUs are those of the affinity mask
/// (cpuset, taskset) or of --cpus. The daemon stays in the foreground and logs to stderr; RUST_LOG
/// sets how much (RUST_LOG=debug).
#[derive(Parser)]
#[command(name = "ringfsd", version, args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

const EXAMPLES: &str = "\
Examples:
  ringfsd --share src=/srv/src --listen unix:/run/ringfs.sock
      then: ringfs mount src@unix:/run/ringfs.sock /mnt
  ringfsd --share home=/srv/home,ro --listen unix:/run/vm1/v.sock_5640
      for a Firecracker guest whose vsock uds_path is /run/vm1/v.sock;
      in the guest: ringfs mount home@vsock:2:5640 /mnt
  ringfsd --share home=/srv/home --listen vsock:3:5640
      for a QEMU guest with vhost-vsock and CID 3

Exit codes: 0 after SIGTERM or SIGINT, 1 on failure, 2 on wrong arguments.";

#[derive(Args)]
struct Serve {
    /// Directory to share, and the name that guests mount it by. May be given several times.
    ///
    /// Options: ro (guests may not change it); direct_io=pass (a guest's O_DIRECT reaches the
    /// host's disk; by default, buffered, it bypasses the guest's cache only); submounts=merge
    /// (what is mounted below DIR on the host is seen; by default, hide, the directory underneath
    /// is); dev (guests may make device nodes, which no guest can open through the share).
    #[arg(long = "share", value_name = "NAME=DIR[,OPTION...]")]
    shares: Vec<ShareConfig>,
    /// Where guests connect. May be given several times.
    #[arg(long = "listen", value_name = "unix:PATH|vsock:[CID:]PORT")]
    listen: Vec<Address>,
    /// CPUs to serve on, such as 0-3,8; at most those that the process may use.
    #[arg(long, value_name = "LIST")]
    cpus: Option<CpuList>,
    /// How files and sockets are driven.
    #[arg(long, value_enum, default_value = "uring")]
    engine: EngineArg,
    /// How often a thread that has just served looks for more, giving its CPU away in between,
    /// before it sleeps. 0: it sleeps at once, which costs the least CPU and more time a request.
    /// An idle daemon sleeps either way.
    #[arg(long, value_name = "N", default_value_t = SPIN_TRIES_DEFAULT)]
    spin: u32,
    /// How long the session of a guest that has lost its connections is kept, so that it can go on
    /// where it was cut: its files stay open and its nodes known. 0: it ends with the last
    /// connection.
    #[arg(long, value_name = "SECONDS", default_value_t = GRACE_SECS_DEFAULT)]
    grace: u32,
    /// Directory in memory (a tmpfs) that tells the next daemon which requests were running if this
    /// one is killed, so that none is lost or done twice. Of this daemon alone: it is made with
    /// mode 0700, and another daemon that names it ends at once. none: there is none. [default: one
    /// below /run/ringfsd, by the listeners]
    #[arg(long, value_name = "DIR|none")]
    state_dir: Option<StateOption>,
    /// What the process that serves guests is kept from. namespace: it sees the shares and nothing
    /// else of the host, in namespaces of its own, with few capabilities and system calls
    /// (docs/security.md). none: it has the rights that the daemon was started with.
    #[arg(long, value_name = "namespace|none", default_value = "namespace")]
    sandbox: Sandbox,
    /// Unix socket that gives whoever connects one JSON object of counters.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum EngineArg {
    /// io_uring.
    Uring,
    /// Blocking threads, where io_uring is forbidden.
    Threads,
}

#[derive(Subcommand)]
enum Command {
    /// Print the counters of a running daemon as JSON.
    Status {
        /// The daemon's --control socket.
        #[arg(long, value_name = "PATH")]
        control: PathBuf,
    },
}

#[derive(Clone)]
struct CpuList(Vec<usize>);

impl std::str::FromStr for CpuList {
    type Err = String;
    fn from_str(text: &str) -> Result<CpuList, String> {
        daemon::parse_cpus(text).map(CpuList)
    }
}

fn main() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .init();
    if let Err(error) = run(Cli::parse()) {
        eprintln!("ringfsd: {error:#}");
        std::process::exit(1);
    }
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Some(Command::Status { control }) => status(&control),
        None => serve(cli.serve),
    }
}

fn status(control: &PathBuf) -> Result<()> {
    let mut stream = std::os::unix::net::UnixStream::connect(control)
        .with_context(|| format!("cannot connect to {control:?}; is a daemon running with it?"))?;
    std::io::copy(&mut stream, &mut std::io::stdout()).context("cannot read the counters")?;
    Ok(())
}

fn serve(args: Serve) -> Result<()> {
    if args.shares.is_empty() {
        bail!("nothing to share: give at least one --share NAME=DIR (see --help)");
    }
    if args.listen.is_empty() {
        bail!("nowhere to listen: give at least one --listen unix:PATH or vsock:PORT (see --help)");
    }
    let config = Config {
        shares: args.shares,
        listen: args.listen,
        cpus: args.cpus.map(|list| list.0),
        engine: match args.engine {
            EngineArg::Uring => Engine::Uring,
            EngineArg::Threads => Engine::Threads,
        },
        spin: args.spin,
        grace: Duration::from_secs(u64::from(args.grace)),
        state_dir: args.state_dir.unwrap_or_default(),
        control: args.control,
        sandbox: args.sandbox,
    };
    daemon::run(config)?;
    Ok(())
}
