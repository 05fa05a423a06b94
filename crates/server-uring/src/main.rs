//! `ringfsd`: shares host directories with guests.

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use ringfs_server::config::{Fault, Settings, Source};
use ringfs_server::daemon;
use std::path::PathBuf;
use std::process::ExitCode;

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
  ringfsd --config /etc/ringfs/ringfsd.toml
      the same from a file (ringfsd check-config --help shows one)

Exit codes: 0 after SIGTERM or SIGINT, 1 on failure, 2 on wrong arguments or configuration.";

const FILE_EXAMPLE: &str = "\
A file has the long options as keys, a table for each share and one for each listener:
  grace = 60
  cpus = \"0-3\"

  [[listen]]
  address = \"unix:/run/vm1/v.sock_5640\"

  [share.src]
  path = \"/srv/src\"
  ro = true                 # and: direct-io = \"pass\", submounts = \"merge\", dev = true

Exit codes: 0 the daemon could serve this, 2 it is wrong; each fault is told as FILE:LINE: what.";

#[derive(Args)]
struct Serve {
    /// Settings from a file; options of the command line win, shares and listeners add up.
    /// [default: /etc/ringfs/ringfsd.toml, if it exists and no --share is given]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Subcommand)]
enum Command {
    /// Print the counters of a running daemon as JSON.
    Status {
        /// The daemon's --control socket.
        #[arg(long, value_name = "PATH")]
        control: PathBuf,
    },
    /// Read a configuration file, print what would be in force, or what is wrong and where.
    #[command(after_help = FILE_EXAMPLE)]
    CheckConfig {
        /// The file. [default: /etc/ringfs/ringfsd.toml]
        #[arg(value_name = "FILE", default_value = ringfs_server::config::FILE_DEFAULT)]
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .init();
    run(Cli::parse()).unwrap_or_else(|error| {
        eprintln!("ringfsd: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Some(Command::Status { control }) => status(&control)?,
        Some(Command::CheckConfig { file }) => return Ok(check_config(file)),
        None => {
            let Serve { config, settings } = cli.serve;
            match Source::new(config, settings).config() {
                Ok(config) => daemon::run(config)?,
                Err(faults) => return Ok(tell(&faults)),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn tell(faults: &[Fault]) -> ExitCode {
    faults.iter().for_each(|fault| eprintln!("ringfsd: {fault}"));
    ExitCode::from(2)
}

fn check_config(file: PathBuf) -> ExitCode {
    let source = Source::new(Some(file), Settings::default());
    match source.config().and_then(|_| source.settings()) {
        Ok(settings) => {
            print!("{}", settings.to_toml());
            ExitCode::SUCCESS
        }
        Err(faults) => tell(&faults),
    }
}

fn status(control: &PathBuf) -> Result<()> {
    let mut stream = std::os::unix::net::UnixStream::connect(control)
        .with_context(|| format!("cannot connect to {control:?}; is a daemon running with it?"))?;
    std::io::copy(&mut stream, &mut std::io::stdout()).context("cannot read the counters")?;
    Ok(())
}
