//! `ringfs-bench`: the same work on the bare directory, on other file systems and on ringfs, in
//! interleaved rounds of one run.
//!
//! This machine's speed changes from minute to minute, so the figure to quote is the median over
//! the rounds of the ratio to the local passthrough within a round, never an absolute time.

mod backing;
mod charts;
mod contender;
mod counting;
mod goals;
mod growth_charts;
mod proc;
mod report;
mod rounds;
mod samples;
mod server;
mod site;
mod stats;
mod table;
mod undo;
mod watchdog;
mod work;

use anyhow::{Context, Result, bail, ensure};
use backing::{Backing, Ground, build_passthrough, temporary_dir};
use clap::Parser;
use contender::{BASE, Kind, Spec, Tools};
use report::About;
use rounds::Pace;
use samples::Samples;
use site::{Place, Site};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};
use work::growth::BY_HAND;
use work::{Scale, Work};

/// Times ringfs against the bare directory, a local libfuse passthrough and other file systems.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Cli {
    /// Interleaved rounds; 7 or more for a claim
    #[arg(long)]
    rounds: Option<usize>,
    /// Short works, few contenders, 3 rounds: under 3 minutes
    #[arg(long)]
    quick: bool,
    /// What the shared directory lies on: tmpfs, ext4 (a loop device), or a directory
    #[arg(long, default_value = "tmpfs")]
    backing: Backing,
    /// Who takes part, comma-separated
    #[arg(long, value_delimiter = ',')]
    contenders: Vec<String>,
    /// A further ringfs, as LABEL=[DIR][;MOUNT OPTIONS[;DAEMON ARGUMENTS]]; may be repeated. Only
    /// `local` takes part beside unless --contenders says so
    #[arg(long, value_name = "LABEL=DIR")]
    ab: Vec<String>,
    /// Only what goals are set for, with all that they need: ringfs by its defaults, without
    /// spinning, and over rings, beside `bare` and `local`. The last table says which are met
    #[arg(long, conflicts_with_all = ["ab", "growth", "mounted"])]
    goals: bool,
    /// Only works whose name holds one of these, comma-separated
    #[arg(long, value_delimiter = ',')]
    work: Vec<String>,
    /// Where `ringfs` and `ringfsd` are
    #[arg(long, alias = "bin", default_value = "target/release")]
    ringfs_bin: PathBuf,
    /// Where the programs of benches/peers are
    #[arg(long, default_value = "target/peers/release")]
    peers: PathBuf,
    /// Whom ratios are taken to
    #[arg(long, default_value = BASE)]
    base: String,
    /// The directory of the report (index.html, results.json) [default: target/bench/TIME]
    #[arg(long)]
    report: Option<PathBuf>,
    /// A mount that is there already and shows the directory given as --backing; may be repeated.
    /// No other takes part; works are short and few, as for a slow guest
    #[arg(long, value_name = "NAME=DIR", conflicts_with_all = ["contenders", "ab", "growth"])]
    mounted: Vec<String>,
    /// Told first: a file whose first line the report has as its label, and the rest beside the
    /// versions
    #[arg(long, value_name = "FILE")]
    about: Option<PathBuf>,
    /// Count system calls, bytes on the wire and records a batch in a pass of their own; always
    /// without --quick and --goals
    #[arg(long)]
    costs: bool,
    /// Instead: rates and memory with 1 to 64 sessions, 1 to 8 lanes, up to 100,000 known names
    /// (a million: --work growth-known-1m), up to 10,000 open files
    #[arg(long)]
    growth: bool,
    /// Instead: one READ loop on pread, on tokio-uring and on our way of driving a ring; the same
    /// with registered files and buffers; multishot receives
    #[arg(long)]
    engine_ab: bool,
    /// Print the names of works and end
    #[arg(long)]
    list: bool,
}

const EXAMPLES: &str = "Examples:
  ringfs-bench --quick
  ringfs-bench --goals
  ringfs-bench --ab old=/tmp/old --ab new=target/release --work randread,stat --rounds 5 --quick
  ringfs-bench --ab 'spin=;spin=20;--spin 20' --ab 'none=;spin=0;--spin 0' --base none
  ringfs-bench --backing ext4 --contenders bare,local,ringfs --work tree";

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringfs-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> Result<()> {
    if std::env::args().nth(1).as_deref() == Some(undo::REAPER_ARG) {
        return undo::reap();
    }
    let cli = CLI.get_or_init(Cli::parse);
    if cli.list {
        Work::all().iter().for_each(|work| println!("{}", work.name));
        return Ok(());
    }
    if cli.engine_ab {
        let program = cli.peers.join("engine-ab");
        let status = std::process::Command::new(&program).status();
        let status =
            status.with_context(|| format!("{program:?} (cargo xtask bench builds it)"))?;
        ensure!(status.success(), "engine-ab ended with {status}");
        return Ok(());
    }
    let emulated = !cli.mounted.is_empty();
    let limit = if emulated { watchdog::LIMIT_EMULATED } else { watchdog::LIMIT };
    watchdog::start(limit, || drop(report()))?;
    raise_files_limit();
    let (scratch, _guard) = temporary_dir(&std::env::temp_dir())?;
    let outcome = run(cli, &scratch);
    report().and(outcome)
}

/// The arguments; here, so that the watchdog can report too.
static CLI: OnceLock<Cli> = OnceLock::new();
/// Who takes part.
static NAMES: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// What was measured so far.
static SAMPLES: Mutex<Samples> = Mutex::new(Samples { rows: Vec::new() });

/// What the reader must know first.
static LABEL: OnceLock<String> = OnceLock::new();
/// Who takes part, for people.
static INTRODUCTION: Mutex<String> = Mutex::new(String::new());

/// Tells what was measured so far. Touches no mount.
fn report() -> Result<()> {
    let Some(cli) = CLI.get() else { return Ok(()) };
    let names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    let samples = SAMPLES.lock().unwrap_or_else(PoisonError::into_inner);
    let introduction = INTRODUCTION.lock().unwrap_or_else(PoisonError::into_inner);
    if samples.rows.is_empty() {
        return Ok(());
    }
    let held: Vec<String> =
        names.iter().filter(|name| !contender::is_peer(name)).cloned().collect();
    let label = LABEL.get().map_or("", String::as_str);
    if !label.is_empty() {
        println!("\n{label}");
    }
    print!("{}", table::works(&samples, &names, &cli.base));
    print!("{}", table::goals(&samples, &held));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let dir =
        cli.report.clone().unwrap_or_else(|| Path::new("target/bench").join(report::stamp(now)));
    let base = cli.base.as_str();
    let about = About { label, introduction: &introduction, names: &names, held: &held, base };
    report::write(&dir, &samples, &about)?;
    println!("report: {}", dir.join("index.html").display());
    Ok(())
}

fn run(cli: &Cli, scratch: &Path) -> Result<()> {
    let works = cli.works()?;
    let tools = Tools { scratch: scratch.to_owned(), peers: cli.peers.clone() };
    let specs = cli.specs(&tools)?;
    if specs.iter().any(|spec| spec.kind == Kind::Local) {
        build_passthrough(&tools.passthrough(), scratch)?;
    }
    ensure!(specs.iter().any(|spec| spec.name == cli.base), "`{}` must take part", cli.base);
    let ground = Ground::new(&cli.backing, scratch)?;
    let backing = ground.dir().join("backing");
    fs::create_dir(&backing)?;
    work::make_data(&backing)?;
    let any_uring = specs.iter().any(|spec| spec.kernel_uring);
    let _uring = if any_uring { site::enable_uring()? } else { None };
    let mut sites = Vec::new();
    for spec in &specs {
        watchdog::begin(&format!("the start of {}", spec.name), Duration::ZERO);
        let place =
            Place { backing: &backing, scratch, tools: &tools, label: &spec.name, relayed: false };
        let site = Site::start(spec, &place);
        sites.push(site.with_context(|| format!("cannot start {}", spec.name))?);
        NAMES.lock().unwrap_or_else(PoisonError::into_inner).push(spec.name.clone());
    }
    same_readahead(&sites)?;
    introduce(&sites, &tools, cli.about.as_deref())?;
    let scale = cli.scale();
    let rounds = cli.rounds.unwrap_or(if cli.quick { 3 } else { 7 });
    let place = Place { backing: &backing, scratch, tools: &tools, label: "", relayed: false };
    let counts = cli.mounted.is_empty() && (cli.costs || !cli.quick && !cli.goals);
    let mut all = rounds::expected(&works, rounds, sites.len(), &scale);
    if counts {
        all += rounds::expected_count(&works, sites.len(), &scale);
    }
    let mut pace = Pace::new(all);
    rounds::run(&mut sites, &works, rounds, &place, &scale, &SAMPLES, &mut pace)?;
    if counts {
        count(&specs, sites, &works, &place, &scale, &mut pace)?;
    }
    Ok(())
}

/// System calls, bytes on the wire and records a batch, in a pass of their own.
fn count(
    specs: &[Spec],
    mut sites: Vec<Site>,
    works: &[Work],
    place: &Place<'_>,
    scale: &Scale,
    pace: &mut Pace,
) -> Result<()> {
    if !counting::can_count(place.scratch) {
        eprintln!("LEFT OUT: system calls, wire and batches: perf cannot count them here");
        return Ok(());
    }
    // ringfs is counted through a relay, the others where they are.
    sites.retain(|site| !matches!(site.spec.kind, Kind::Bare | Kind::Ringfs));
    for spec in specs.iter().filter(|spec| spec.kind == Kind::Ringfs) {
        let label = format!("{}-relayed", spec.name);
        sites.push(Site::start(spec, &Place { label: &label, relayed: true, ..*place })?);
    }
    rounds::count(&mut sites, works, place, scale, &SAMPLES, pace)
}

impl Cli {
    fn scale(&self) -> Scale {
        match (self.mounted.is_empty(), self.quick) {
            (true, true) => Scale::QUICK,
            (true, false) => Scale::FULL,
            (false, true) => Scale::EMULATED_QUICK,
            (false, false) => Scale::EMULATED,
        }
    }

    fn works(&self) -> Result<Vec<Work>> {
        let wanted = |work: &Work| {
            let named = self.work.iter().any(|part| named(work.name, part));
            let usual = work.growth == self.growth && !(self.quick && work.long);
            let by_hand = work.name != BY_HAND || self.work.iter().any(|part| part == BY_HAND);
            let usual = match self.mounted.is_empty() {
                true => usual && by_hand,
                false => work::ON_MOUNTED.contains(&work.name),
            };
            let possible = self.mounted.is_empty() || work.costed();
            let possible = possible && (!self.goals || goals::is_for(work.name));
            possible && if self.work.is_empty() { usual } else { named && by_hand }
        };
        let mut works: Vec<Work> = Work::all().into_iter().filter(wanted).collect();
        for work in works.iter_mut().filter(|work| self.quick && work.rounds_max < usize::MAX) {
            work.rounds_max = 1;
        }
        ensure!(!works.is_empty(), "no work is named like {:?}; see --list", self.work);
        Ok(works)
    }

    /// Who takes part and can; those who cannot are named.
    fn specs(&self, tools: &Tools) -> Result<Vec<Spec>> {
        let usual = match (self.ab.is_empty(), self.goals, self.quick) {
            (false, ..) => BASE,
            (true, true, _) => contender::GOALS,
            (true, false, true) => contender::QUICK,
            (true, false, false) => contender::DEFAULT,
        };
        if !self.mounted.is_empty() {
            let Backing::Dir(behind) = &self.backing else {
                bail!("--mounted needs --backing DIR")
            };
            return self.mounted.iter().map(|text| Spec::parse_mounted(text, behind)).collect();
        }
        let chosen: Vec<String> = match self.contenders.is_empty() {
            true => usual.split(',').map(str::to_owned).collect(),
            false => self.contenders.clone(),
        };
        let mut specs = contender::by_names(&chosen, &self.ringfs_bin)?;
        for text in &self.ab {
            let spec = Spec::parse_ab(text, &self.ringfs_bin)?;
            ensure!(specs.iter().all(|other| other.name != spec.name), "two are `{}`", spec.name);
            // Whom one asks for by hand must be there.
            if let Some(why) = spec.obstacle(tools) {
                bail!("{} cannot run: {why}", spec.name);
            }
            specs.push(spec);
        }
        specs.retain(|spec| match spec.obstacle(tools) {
            Some(why) => {
                eprintln!("LEFT OUT: {}: {why}", spec.name);
                false
            }
            None => true,
        });
        Ok(specs)
    }
}

/// A whole name means that work alone; else every work whose name holds the part.
fn named(name: &str, part: &str) -> bool {
    let whole = Work::all().iter().any(|work| work.name == part);
    if whole { name == part } else { name.contains(part) }
}

/// Gives every mount the readahead of the first ringfs, or of the first mount.
fn same_readahead(sites: &[Site]) -> Result<()> {
    let first = sites.iter().find(|site| site.spec.kind == Kind::Ringfs);
    let first = first.or_else(|| sites.iter().find(|site| site.mount().is_some()));
    let Some(mount) = first.and_then(Site::mount) else { return Ok(()) };
    let kib = fs::read_to_string(mount.readahead_file()?).context("read the readahead")?;
    for mount in sites.iter().filter_map(Site::mount) {
        fs::write(mount.readahead_file()?, kib.trim()).context("set the readahead")?;
    }
    println!("readahead of every mount: {} KiB", kib.trim());
    Ok(())
}

/// Who takes part: what `about` tells, names, versions, command lines.
fn introduce(sites: &[Site], tools: &Tools, about: Option<&Path>) -> Result<()> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let cpus = std::thread::available_parallelism()?;
    let mut text = format!("Linux {}, {cpus} CPUs\n", kernel.trim());
    if let Some(file) = about {
        let told = fs::read_to_string(file).with_context(|| format!("read {file:?}"))?;
        let (label, rest) = told.split_once('\n').unwrap_or((&told, ""));
        text.push_str(rest);
        LABEL.get_or_init(|| label.to_owned());
    }
    for site in sites {
        text += &format!("{:<14} {}\n", site.spec.name, site.spec.version(tools));
        site.lines().iter().for_each(|line| text += &format!("{:<14} $ {line}\n", ""));
    }
    print!("{text}");
    *INTRODUCTION.lock().unwrap_or_else(PoisonError::into_inner) = text;
    Ok(())
}

/// How many files a server may hold open.
pub fn files_limit() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

/// A passthrough holds a descriptor for each name that the kernel knows; servers inherit this.
fn raise_files_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let most = fs::read_to_string("/proc/sys/fs/nr_open").ok();
    let most = most.and_then(|text| text.trim().parse().ok());
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most });
    if most.is_none() || raised.is_err() {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}
