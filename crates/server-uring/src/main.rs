//! `ringfsd`: shares host directories with guests.

use anyhow::{Context, Result, bail};
use clap::{Args, CommandFactory, Parser, Subcommand};
use ringfs_server::config::{Fault, Settings, Source};
use ringfs_server::control::{self, Ask};
use ringfs_server::daemon;
use ringfs_server::fdops;
use ringfs_server::log;
use ringfs_server::status::{SessionStatus, Status};
use ringfs_server::systemd;
use ringfs_server::top;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Shares host directories with guests that mount them by `ringfs`.
///
/// One thread and one io_uring a CPU serve all guests; the CPUs are those of the affinity mask
/// (cpuset, taskset) or of --cpus. The daemon stays in the foreground and logs to stderr.
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

  ringfsd reconnect 7 && ringfsd wait --resumed --timeout 10 7
      after the VM of session 7 was restored; `ringfs reconnect` does the same in the guest

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
    #[arg(long, value_name = "FILE", display_order = 0)]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// How long a reload may take.
const RELOAD_LIMIT: Duration = Duration::from_secs(60);

#[derive(Args)]
struct Of {
    /// The daemon's control socket. [default: that of the only daemon below /run/ringfsd]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// Between two looks at what a daemon tells.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const EXIT_TIMEOUT: u8 = 4;

#[derive(Args)]
struct Which {
    /// The session, as `ringfsd status` numbers it. [default: all]
    session: Option<u64>,
    /// Those of a share.
    #[arg(long, value_name = "NAME", conflicts_with = "session")]
    share: Option<String>,
}

impl Which {
    /// Those that are meant; an error: none is that should be.
    fn of(&self, status: Status) -> Result<Vec<SessionStatus>> {
        let is_meant = |its: &SessionStatus| {
            self.session.is_none_or(|id| its.id == id)
                && self.share.as_ref().is_none_or(|share| its.share == *share)
        };
        let found: Vec<_> = status.sessions.into_iter().filter(is_meant).collect();
        match (self.session, &self.share) {
            (Some(id), _) if found.is_empty() => bail!("there is no session {id}"),
            (_, Some(share)) if found.is_empty() => bail!("share {share} has no session"),
            _ => Ok(found),
        }
    }
}

#[derive(Subcommand)]
enum Command {
    /// Tell what a running daemon does: shares, sessions, what became of the last reload.
    Status {
        #[command(flatten)]
        of: Of,
        /// As one line of JSON.
        #[arg(long)]
        json: bool,
        /// The sums of all counters, as one flat object of JSON.
        #[arg(long)]
        counters: bool,
    },
    /// Show what a running daemon does in each second: requests, bytes and times of each share.
    ///
    /// MEAN, P50 and P99 are times from when the daemon takes a request up until its reply is made;
    /// half of the requests, and 99 of 100, take less than P50 and P99 say. Below each share the
    /// kinds of requests that came. Ctrl-C ends it.
    Top {
        #[command(flatten)]
        of: Of,
        /// Seconds between two looks.
        #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
        interval: f64,
        /// Show one interval and end.
        #[arg(long)]
        once: bool,
    },
    /// Have a running daemon read its configuration again, as SIGHUP does, and tell what became
    /// of it.
    ///
    /// Shares and listeners come and go without a word to those who are connected. The sessions of
    /// a share that is gone go on until they are unmounted, unless drop-removed is set. A
    /// configuration with any fault changes nothing.
    Reload {
        #[command(flatten)]
        of: Of,
    },
    /// Drop the connections of guests, which then join new ones and go on: for an orchestrator that
    /// knows that they are dead (a VM that was restored or moved).
    ///
    /// It returns before they have come; `ringfsd wait --resumed` waits for that.
    Reconnect {
        #[command(flatten)]
        of: Of,
        #[command(flatten)]
        which: Which,
    },
    /// Wait until guests have all their connections; at once if that is so already.
    ///
    /// Exit codes: 0 connected; 1 there is no such session, or it has ended; 4 the time is over.
    Wait {
        #[command(flatten)]
        of: Of,
        /// Until all their connections are there (the only thing to wait for so far).
        #[arg(long, required = true)]
        resumed: bool,
        /// Give up after so many seconds. [default: never]
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
        #[command(flatten)]
        which: Which,
    },
    /// Print the completions of a shell, to be put where it looks for them.
    Completions {
        /// Its name
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a directory.
    #[command(hide = true)]
    ManPages {
        /// An existing one
        dir: PathBuf,
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
    run(Cli::parse()).unwrap_or_else(|error| {
        eprintln!("ringfsd: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Some(Command::Status { of, json, counters }) => status(&of, json, counters)?,
        Some(Command::Top { of, interval, once }) => top(&of, interval, once)?,
        Some(Command::Reload { of }) => return reload(&of),
        Some(Command::Reconnect { of, which }) => reconnect(&of, &which)?,
        Some(Command::Wait { of, resumed: _, timeout, which }) => {
            return wait_resumed(&of, &which, timeout.map(Duration::from_secs));
        }
        Some(Command::Completions { shell }) => {
            let mut out = std::io::stdout();
            clap_complete::generate(shell, &mut Cli::command(), "ringfsd", &mut out);
        }
        Some(Command::ManPages { dir }) => clap_mangen::generate_to(Cli::command(), dir)?,
        Some(Command::CheckConfig { file }) => return Ok(check_config(file)),
        None => {
            let Serve { config, settings } = cli.serve;
            let sockets = systemd::passed() > 0;
            let source = Source::new(config, settings).with_sockets(sockets);
            match source.config() {
                Ok(config) => {
                    log::start(&config);
                    daemon::run(config, source)?;
                }
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
    // Sockets may be passed to it (ringfsd.socket): that is not for the file to say.
    let source = Source::new(Some(file), Settings::default()).with_sockets(true);
    match source.config().and_then(|_| source.settings()) {
        Ok(settings) => {
            if settings.listen.is_empty() {
                eprintln!("ringfsd: no [[listen]]: guests come by sockets that systemd passes");
            }
            print!("{}", settings.to_toml());
            ExitCode::SUCCESS
        }
        Err(faults) => tell(&faults),
    }
}

fn status(of: &Of, json: bool, counters: bool) -> Result<()> {
    let path = of.path()?;
    let asked = if counters { Ask::Counters } else { Ask::Status };
    let answer = control::ask(&path, asked).map_err(|error| cannot_ask(&path, error))?;
    if json || counters {
        print!("{answer}");
        return Ok(());
    }
    let status: Status = serde_json::from_str(&answer).context("the daemon answers strangely")?;
    print!("{}", status.to_text(width()));
    Ok(())
}

fn ask(path: &Path) -> Result<Status> {
    control::ask_status(path).map_err(|error| cannot_ask(path, error))
}

fn cannot_ask(path: &Path, error: std::io::Error) -> anyhow::Error {
    let cure = match error.kind() {
        ErrorKind::NotFound => {
            "; there is no such socket: is a daemon running with this --control?"
        }
        ErrorKind::ConnectionRefused => "; its daemon is gone",
        ErrorKind::PermissionDenied => "; only the daemon's user and root may",
        ErrorKind::WouldBlock => "; the daemon does not answer",
        _ => "",
    };
    anyhow::Error::new(error).context(format!("cannot ask {path:?}{cure}"))
}

/// Columns of the terminal, where there is one.
fn width() -> Option<usize> {
    Some(rustix::termios::tcgetwinsize(std::io::stdout()).ok()?.ws_col.into()).filter(|&n| n > 0)
}

/// And its lines.
fn height() -> Option<usize> {
    Some(rustix::termios::tcgetwinsize(std::io::stdout()).ok()?.ws_row.into()).filter(|&n| n > 0)
}

fn top(of: &Of, interval: f64, once: bool) -> Result<()> {
    let interval = Duration::try_from_secs_f64(interval.max(0.05)).context("--interval")?;
    let path = of.path()?;
    let (mut before, mut since) = (ask(&path)?, Instant::now());
    loop {
        std::thread::sleep(interval);
        let (now, at) = (ask(&path)?, Instant::now());
        let mut screen = top::screen(&before, &now, at.duration_since(since), width());
        if !once && let Some(height) = height() {
            screen = top::first_lines(&screen, height - 1);
        }
        // Home, each line's rest cleared, and what is below.
        let clear = if once { String::new() } else { "\x1b[H".into() };
        let end = if once { "\n" } else { "\x1b[K\n" };
        let lines: String = screen.lines().map(|line| format!("{line}{end}")).collect();
        let mut out = std::io::stdout().lock();
        let shown = write!(out, "{clear}{lines}{}", if once { "" } else { "\x1b[J" });
        if once || shown.and_then(|()| out.flush()).is_err() {
            return Ok(());
        }
        (before, since) = (now, at);
    }
}

/// Whoever may connect may send the signal too: the socket is its user's.
fn reload(of: &Of) -> Result<ExitCode> {
    let path = of.path()?;
    let before = ask(&path)?.config.reloads;
    let stream = UnixStream::connect(&path).with_context(|| format!("connect to {path:?}"))?;
    let (_, _, pid) = fdops::peer_of(stream.as_fd()).context("whose socket is it?")?;
    let elsewhere =
        "the daemon is in another pid namespace: send it SIGHUP there (podman kill -s HUP)";
    let daemon = Pid::from_raw(pid.cast_signed()).context(elsewhere)?;
    kill_process(daemon, Signal::HUP).with_context(|| format!("cannot send SIGHUP to {pid}"))?;
    let until = Instant::now() + RELOAD_LIMIT;
    loop {
        let config = ask(&path)?.config;
        if config.reloads > before {
            config.changed.iter().filter(|_| config.errors.is_empty()).for_each(|what| {
                println!("{what}");
            });
            if !config.needs_restart.is_empty() {
                println!("not before the next start: {}", config.needs_restart.join(", "));
            }
            config.lacks.iter().for_each(|lack| println!("the worker is without {lack}"));
            config.errors.iter().for_each(|error| eprintln!("ringfsd: {error}"));
            return Ok(ExitCode::from(if config.errors.is_empty() { 0 } else { 2 }));
        }
        if Instant::now() > until {
            bail!("the daemon has not reloaded in {RELOAD_LIMIT:?}: does a share not answer?");
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

fn reconnect(of: &Of, which: &Which) -> Result<()> {
    let path = of.path()?;
    let status = ask(&path)?;
    for SessionStatus { id, share, .. } in which.of(status)? {
        match control::ask_reconnect(&path, id) {
            Ok(n) => println!("session {id} of {share}: {n} connections dropped"),
            // It has ended meanwhile.
            Err(error) if which.session.is_none() && error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("session {id}")),
        }
    }
    Ok(())
}

fn wait_resumed(of: &Of, which: &Which, timeout: Option<Duration>) -> Result<ExitCode> {
    let path = of.path()?;
    let begun = Instant::now();
    loop {
        let missing = which.of(ask(&path)?)?.iter().filter(|its| !its.is_connected()).count();
        if missing == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        if timeout.is_some_and(|timeout| begun.elapsed() >= timeout) {
            eprintln!("ringfsd: {missing} sessions are without connections still");
            return Ok(ExitCode::from(EXIT_TIMEOUT));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

impl Of {
    /// The socket that is meant: the one that is named, or the only one there is.
    fn path(&self) -> Result<PathBuf> {
        if let Some(path) = &self.control {
            return Ok(path.clone());
        }
        let mut running = control::running(false);
        match running.len() {
            0 => bail!(
                "no daemon is running that tells below {}; name its --control socket",
                control::DEFAULT_ABOVE
            ),
            1 => Ok(running.remove(0)),
            _ => bail!("several daemons are running; name one by --control: {running:?}"),
        }
    }
}
