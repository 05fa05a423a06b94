//! `cargo xtask pjdfstest`: the POSIX suite on a directory and on a mount of it, case by case.
//!
//! Invariant: no case may fail on the mount that passes on the backing, but those that
//! `ci/pjdfstest-exceptions.toml` lists with the kernel's rule; a listed case that passes fails the
//! command too, so that the list cannot rot. Both runs use the same program, configuration and
//! backing file system, with every feature on that Linux has.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::deps;
use crate::paths::{self, Bins};
use crate::proc::{self, Cmd};
use crate::rig::{self, Daemon};
use crate::sandbox::{LoopFs, LoopShape, Sandbox};

/// One run takes 5-15 s; a hang must not take the whole of CI's time.
const RUN_LIMIT: Duration = Duration::from_secs(300);
/// Some cases fill a file system or need many inodes.
const IMAGE_BYTES: u64 = 1 << 30;
const SECOND_IMAGE_BYTES: u64 = 64 << 20;
/// What the host has as the guest's root, with `--map`.
const MAPPED_FROM: u32 = 100_000;
/// The suite has this many; fewer means that our reading of its output is wrong.
const CASES: usize = 398;

/// Debian's own users, so that none must be created. `nap` is over ext4's tick of 4-10 ms.
const CONFIG: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
stat_st_birthtime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
allow_remount = @REMOUNT@
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// What `cargo xtask pjdfstest` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What is compared with the bare ext4 directory
    #[arg(long, value_enum, default_value_t = Peer::Ringfs)]
    on: Peer,
    /// Mount options of ringfs, besides default_permissions and allow_other
    #[arg(long, default_value = "")]
    options: String,
    /// Guest ids are others on the host: 0 to 65535 are those from 100000 on
    #[arg(long)]
    map: bool,
    /// Only cases whose name holds this
    #[arg(default_value = "")]
    pattern: String,
}

/// The file system under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Peer {
    /// A ringfs mount over a Unix socket
    Ringfs,
    /// libfuse's passthrough_ll: shows what the comparison finds in another file system
    PassthroughLl,
}

impl Default for Args {
    fn default() -> Self {
        Self { on: Peer::Ringfs, options: String::new(), map: false, pattern: String::new() }
    }
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

type Outcomes = BTreeMap<String, Outcome>;

/// Runs the suite on both and compares; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    deps::all()?;
    let sandbox = Sandbox::new()?;
    let backing = LoopFs::new(&sandbox, "backing", LoopShape::ext4(IMAGE_BYTES))?;
    let second = LoopFs::new(&sandbox, "second", LoopShape::ext4(SECOND_IMAGE_BYTES))?;
    let suite = Suite::new(&sandbox, &second.dir, &args.pattern)?;

    let bare = suite.run_on(&backing.dir).context("pjdfstest on the bare directory")?;
    println!("pjdfstest: bare ext4:  {}", summary(&bare));
    let share = backing.dir.join("share");
    fs::create_dir(&share)?;
    fs::set_permissions(&share, fs::Permissions::from_mode(0o755))?;
    let mounted = match args.on {
        Peer::Ringfs => on_ringfs(&sandbox, &suite, &share, args)?,
        Peer::PassthroughLl => {
            let program = paths::tool("passthrough_ll")?;
            let dir = sandbox.path("mnt");
            let _mount = rig::mount_passthrough(&program, &share, &dir)?;
            suite.run_on(&dir)?
        }
    };
    println!("pjdfstest: the mount:  {}", summary(&mounted));
    let mut exceptions = read_exceptions(&paths::root().join("ci/pjdfstest-exceptions.toml"))?;
    exceptions.retain(|test, _| test.contains(&args.pattern));
    let mut findings = compare(&bare, &mounted, &exceptions);
    if args.map {
        // Device nodes are the host's root's to make, and who is mapped is another user there.
        let is_refused_device = |finding: &String| {
            let name = finding.split(' ').next().unwrap_or_default();
            let is_device = ["::block", "::char"].iter().any(|kind| name.ends_with(kind));
            is_device && finding.contains("EPERM")
        };
        findings.retain(|finding| !is_refused_device(finding));
    }
    for finding in &findings {
        println!("pjdfstest: {finding}");
    }
    ensure!(args.pattern.is_empty() == (bare.len() == CASES), "{} cases ran", bare.len());
    if !findings.is_empty() {
        bail!("pjdfstest: {} findings", findings.len());
    }
    Ok(format!("{} on the mount, {} exceptions", summary(&mounted), exceptions.len()))
}

fn on_ringfs(sandbox: &Sandbox, suite: &Suite, dir: &Path, args: &Args) -> Result<Outcomes> {
    let bins = Bins::build()?;
    let mut share = rig::share("pj", dir) + ",dev";
    if args.map {
        for ids in ["uid", "gid"] {
            share += &format!(",{ids}-map=map:0:{MAPPED_FROM}:65536");
        }
        chown(dir, Some(MAPPED_FROM), Some(MAPPED_FROM))?;
    }
    let daemon = Daemon::start(sandbox, &bins, "d", &[share], &[])?;
    let start = daemon.counters_at_rest()?;
    let mut all = "default_permissions,allow_other".to_string();
    if !args.options.is_empty() {
        all = format!("{all},{}", args.options);
    }
    let mount = daemon.mount(sandbox, "pj", "mnt", &all)?;
    let made = mount.dir.join("made");
    fs::create_dir(&made)?;
    let owner = dir.join("made").symlink_metadata()?.uid();
    ensure!(owner == if args.map { MAPPED_FROM } else { 0 }, "the host's owner is {owner}");
    fs::remove_dir(&made)?;
    let outcomes = suite.run_on(&mount.dir).with_context(|| daemon.log_tail())?;
    mount.umount()?;
    daemon.assert_back_at(&start)?;
    daemon.stop()?;
    Ok(outcomes)
}

/// The program with its configurations.
struct Suite {
    program: PathBuf,
    plain: PathBuf,
    remounting: PathBuf,
    shim_path: String,
    second: PathBuf,
    pattern: String,
}

impl Suite {
    fn new(sandbox: &Sandbox, second: &Path, pattern: &str) -> Result<Self> {
        let write = |name: &str, remount: &str| -> Result<PathBuf> {
            let path = sandbox.path(name);
            fs::write(&path, CONFIG.replace("@REMOUNT@", remount))?;
            Ok(path)
        };
        // mount(8) hands a remount of FUSE to mount.fuse3, which would start a new file system;
        // `-i` makes it ask the kernel alone, as it does for ext4.
        let shim = sandbox.make_dir("shim")?;
        fs::write(shim.join("mount"), "#!/bin/sh\nexec /bin/mount -i \"$@\"\n")?;
        fs::set_permissions(shim.join("mount"), fs::Permissions::from_mode(0o755))?;
        let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".into());
        Ok(Self {
            program: paths::tool("pjdfstest")?,
            plain: write("plain.toml", "false")?,
            remounting: write("remount.toml", "true")?,
            shim_path: format!("{}:{path}", shim.display()),
            second: second.to_path_buf(),
            pattern: pattern.to_string(),
        })
    }

    /// All cases on `dir`. Those that remount run alone: in one process with the others they find
    /// the file system busy, on bare ext4 too, with files that earlier cases left open.
    fn run_on(&self, dir: &Path) -> Result<Outcomes> {
        let mut outcomes = self.run_once(&self.plain, dir, &self.pattern)?;
        let remounting = self.run_once(&self.remounting, dir, "erofs")?;
        for (name, outcome) in remounting {
            if name.contains(&self.pattern) {
                outcomes.insert(name, outcome);
            }
        }
        Ok(outcomes)
    }

    fn run_once(&self, config: &Path, dir: &Path, pattern: &str) -> Result<Outcomes> {
        let cmd = Cmd::new(&self.program).arg("-c").arg(config).arg("-p").arg(dir);
        let mut cmd = cmd.arg("-s").arg(&self.second).env("PATH", &self.shim_path);
        cmd = cmd.env("NO_COLOR", "1").env("RUST_BACKTRACE", "0").limit(RUN_LIMIT);
        if !pattern.is_empty() {
            cmd = cmd.arg(pattern);
        }
        let output = cmd.output()?;
        // It ends with 1 when a case fails: what counts is that it came to its summary, and that
        // we read as many outcomes as it counted.
        let total = output.text.lines().find_map(total_of).with_context(|| {
            format!("pjdfstest broke off ({}):\n{}", output.status, proc::tail(&output.text))
        })?;
        let outcomes = parse(&output.text);
        ensure!(outcomes.len() == total, "read {} outcomes of {total}", outcomes.len());
        Ok(outcomes)
    }
}

/// `Summary: 0 failed, 0 skipped, 13 passed, 0 expected failures, 13 total`
fn total_of(line: &str) -> Option<usize> {
    let rest = line.strip_prefix("Summary: ")?.strip_suffix(" total")?;
    rest.rsplit(' ').next()?.parse().ok()
}

/// Reads `name   ok|FAILED|skipped` lines; an indented line after one says why.
fn parse(text: &str) -> Outcomes {
    let mut outcomes = Outcomes::new();
    let mut last: Option<String> = None;
    for line in text.lines() {
        if let Some(why) = line.strip_prefix('\t') {
            let outcome = last.take().and_then(|name| outcomes.get_mut(&name));
            if let Some(Outcome::Failed(text) | Outcome::Skipped(text)) = outcome {
                *text = why.trim().to_string();
            }
            continue;
        }
        let mut words = line.split_whitespace();
        let (Some(name), Some(verdict), None) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let outcome = match verdict {
            "ok" => Outcome::Passed,
            "FAILED" => Outcome::Failed(String::new()),
            "skipped" => Outcome::Skipped(String::new()),
            _ => continue,
        };
        last = Some(name.to_string());
        outcomes.insert(name.to_string(), outcome);
    }
    outcomes
}

fn summary(outcomes: &Outcomes) -> String {
    let count = |want: fn(&Outcome) -> bool| outcomes.values().filter(|o| want(o)).count();
    format!(
        "{} cases: {} passed, {} failed, {} skipped",
        outcomes.len(),
        count(|o| matches!(o, Outcome::Passed)),
        count(|o| matches!(o, Outcome::Failed(_))),
        count(|o| matches!(o, Outcome::Skipped(_))),
    )
}

/// What is wrong: worse than the backing and not listed, listed and not worse, or not comparable.
fn compare(
    bare: &Outcomes,
    mounted: &Outcomes,
    exceptions: &BTreeMap<String, String>,
) -> Vec<String> {
    let mut findings = Vec::new();
    let names: BTreeSet<&String> = bare.keys().chain(mounted.keys()).collect();
    for name in names {
        let listed = exceptions.contains_key(name);
        match (bare.get(name), mounted.get(name)) {
            (Some(Outcome::Passed), Some(Outcome::Passed)) if listed => {
                findings.push(format!("{name} passes: take it off the exceptions"));
            }
            (Some(Outcome::Passed), Some(Outcome::Failed(why))) if !listed => {
                findings.push(format!("{name} fails on the mount alone: {why}"));
            }
            (Some(Outcome::Passed), Some(Outcome::Skipped(why))) if !listed => {
                findings.push(format!("{name} is skipped on the mount alone: {why}"));
            }
            (None, Some(_)) | (Some(_), None) => {
                findings.push(format!("{name} ran on one side alone"));
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
    }
    let unknown = exceptions.keys().filter(|name| !bare.contains_key(*name));
    findings.extend(unknown.map(|name| format!("exception {name}: there is no such case")));
    findings
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExceptionFile {
    #[serde(default)]
    exception: Vec<Exception>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exception {
    test: String,
    rule: String,
}

fn read_exceptions(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let file: ExceptionFile =
        toml::from_str(&text).with_context(|| format!("read {}", path.display()))?;
    let mut map = BTreeMap::new();
    for exception in file.exception {
        ensure!(exception.rule.len() > 10, "{} names no rule of the kernel", exception.test);
        let before = map.insert(exception.test.clone(), exception.rule);
        ensure!(before.is_none(), "{} is listed twice", exception.test);
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "a::b      ok\nBacktrace:\n   0: x\n  at ./csu/../x:360:3\n\
        c::d   FAILED\n\tassertion `left == right` failed\n  left: 1\n right: 2\n\
        e::f  skipped\n\trequires features: chflags\n\trequires root\n\n\
        Summary: 1 failed, 1 skipped, 1 passed, 0 expected failures, 3 total\n";

    #[test]
    fn the_suites_output_is_read() {
        let outcomes = parse(OUTPUT);
        assert_eq!(outcomes.len(), OUTPUT.lines().find_map(total_of).unwrap());
        assert_eq!(outcomes["a::b"], Outcome::Passed);
        assert_eq!(outcomes["c::d"], Outcome::Failed("assertion `left == right` failed".into()));
        assert_eq!(outcomes["e::f"], Outcome::Skipped("requires features: chflags".into()));
    }

    fn check(bare: &str, mounted: &str, excepted: &[&str], expected: &[&str]) {
        let exceptions = excepted.iter().map(|t| (t.to_string(), "rule".to_string())).collect();
        let findings = compare(&parse(bare), &parse(mounted), &exceptions);
        assert_eq!(findings.len(), expected.len(), "{findings:?}");
        for (finding, part) in findings.iter().zip(expected) {
            assert!(finding.contains(part), "{finding} should hold {part}");
        }
    }

    #[test]
    fn only_what_is_worse_and_unlisted_or_listed_and_no_worse_is_found() {
        check("a ok\nb FAILED", "a ok\nb FAILED", &[], &[]);
        check("a ok\nb FAILED", "a ok\nb ok", &[], &[]);
        check("a ok", "a FAILED", &[], &["fails on the mount alone"]);
        check("a ok", "a FAILED", &["a"], &[]);
        check("a ok", "a ok", &["a"], &["take it off"]);
        check("a ok", "a skipped", &[], &["skipped on the mount alone"]);
        check("a ok", "a skipped", &["a"], &[]);
        check("a ok\nb ok", "a ok", &[], &["one side alone"]);
        check("a ok", "a ok", &["z"], &["no such case"]);
    }

    #[test]
    fn the_checked_in_exceptions_are_well_formed() {
        read_exceptions(&paths::root().join("ci/pjdfstest-exceptions.toml")).unwrap();
    }
}
