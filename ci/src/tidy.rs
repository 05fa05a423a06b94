//! `cargo xtask tidy`, also run by `cargo test`: proves the workspace's boundaries from its text.
//!
//! Invariant: each rule stands in one constant with its reason, and names every exception. The
//! rules read code with comments and literals blanked (see `lex`), and dependencies from cargo
//! metadata. They must not guess: what they cannot decide from text belongs to clippy.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::lex;
use crate::paths;

/// Columns of a line, and lines of a file before its tests: the aim, and the bound.
const COLUMNS_MAX: usize = 100;
const FILE_LINES_AIM: usize = 500;
const FILE_LINES_MAX: usize = 800;

/// Which of our packages each package may depend on: the way of a frame, and nothing back. The
/// fault proxy of xtask cuts at the boundaries of batches and records, so it knows the wire.
const OUR_DEPENDENCIES: &[(&str, &[&str])] = &[
    ("ringfs-wire", &[]),
    ("ringfs-mapping", &[]),
    ("fuser-fork", &["ringfs-wire"]),
    ("ringfs-client", &["ringfs-wire", "ringfs-mapping", "fuser-fork"]),
    ("ringfs-server-uring", &["ringfs-wire", "ringfs-mapping"]),
    ("ringfs-benches", &[]),
    ("xtask", &["ringfs-wire"]),
];

/// Foreign packages that only these of ours may use.
const FOREIGN_DEPENDENCIES: &[(&str, &[&str], &str)] = &[
    ("fuse-backend-rs", &["ringfs-server-uring"], "the guest never sees the host's file system"),
    ("io-uring", &["ringfs-server-uring", "fuser-fork"], "rings are driven in one file a side"),
    ("libc", &["ringfs-server-uring", "fuser-fork"], "all else uses rustix or vsock"),
    ("nix", &["ringfs-client"], "vsock's options and addresses alone; all else is rustix"),
    ("tokio", &[], "no runtime stands in the way of a frame"),
];

/// The files that may hold `unsafe`, call `libc` or name `io_uring`, and why.
const LOW_FILES: &[(&str, &str)] = &[
    ("crates/server-uring/src/ring.rs", "memory that the kernel holds: the ring"),
    ("crates/server-uring/src/passthrough.rs", "the crate's traits are stated in libc types"),
    ("crates/server-uring/src/fork.rs", "the worker's process: fork, close_range, signal"),
    ("crates/server-uring/src/handles.rs", "fds taken from the crate by a checked cast"),
    ("crates/server-uring/src/fdops/sys.rs", "system calls on an open fd that rustix lacks"),
    ("crates/server-uring/src/creds.rs", "credentials of one thread, which rustix refuses"),
    ("crates/server-uring/src/import/sys.rs", "file handles: name_to_handle_at, open_by_handle_at"),
    ("crates/server-uring/src/sandbox/filter.rs", "system calls by their numbers: no call"),
    ("crates/server-uring/src/sandbox/root.rs", "mount_setattr, which rustix lacks"),
    ("crates/server-uring/tests/sandbox/main.rs", "what whoever takes a worker over would call"),
    ("crates/mapping/src/lib.rs", "a session's file as memory, which mmap gives"),
    ("benches/peers/src/engine_ab/main.rs", "bare rings, to compare ways of driving one"),
    ("benches/peers/src/engine_ab/registered.rs", "the same: reads"),
    ("benches/peers/src/engine_ab/receive.rs", "the same: receives"),
    ("fuser-fork/src/sys.rs", "/dev/fuse: clones, queue entries lent to the kernel; mallopt"),
];

/// Files that name libc's types, and make no call, because the crate they use states them so.
const LIBC_TYPE_FILES: &[(&str, &str)] = &[
    ("crates/client/src/transport.rs", "nix's macro for the socket options of vsock"),
    ("crates/client/tests/lift.rs", "the number of the system call that seccomp is to forbid"),
];

/// Names that stand in one file alone.
const SINGLE_FILE: &[(&str, &str)] =
    &[("fuse_backend_rs", "crates/server-uring/src/passthrough.rs")];

/// Files that know the crate's traits besides passthrough.rs, and why.
const FUSE_BACKEND_FILES: &[(&str, &str)] = &[
    ("crates/server-uring/src/handles.rs", "the spy writer that takes the real fd"),
    ("crates/server-uring/tests/import_spike.rs", "proves how the crate treats imported nodes"),
];

/// Words that no code of ours holds.
const FORBIDDEN: &[(&str, &str)] = &[
    ("#[ignore", "a test that does not run proves nothing: make it run or delete it"),
    ("should_panic", "errors are values: check the error"),
    ("todo!", "commit what stands"),
    ("unimplemented!", "commit what stands"),
];

/// A broken rule.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation {
    /// File, relative to the workspace, or a package.
    pub place: String,
    /// Line from 1; 0 when the whole is meant.
    pub line: usize,
    /// What is wrong, and why it matters.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.place, self.line, self.what)
    }
}

/// Runs all rules, prints what is broken, and fails if anything is.
pub fn run() -> Result<()> {
    let root = paths::root();
    let files = rust_files(&root)?;
    let mut broken = check_dependencies(&metadata()?);
    let mut long = 0;
    for path in &files {
        let text = fs::read_to_string(root.join(path))
            .with_context(|| format!("read {}", path.display()))?;
        let place = path.to_string_lossy();
        check_file(&place, &text, &mut broken);
        let lines = lines_before_tests(&text);
        if lines > FILE_LINES_AIM {
            println!("tidy: {place} has {lines} lines before its tests, the aim is 500");
            long += 1;
        }
    }
    for violation in &broken {
        eprintln!("{violation}");
    }
    if !broken.is_empty() {
        bail!("tidy: {} violations", broken.len());
    }
    println!("tidy: {} files, no violation, {long} over the aim of length", files.len());
    Ok(())
}

/// Every Rust file of ours, relative to `root`, sorted.
fn rust_files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            let (entry, path) = entry.map(|entry| (entry.file_name(), entry.path()))?;
            let name = entry.to_string_lossy();
            let skip = name.starts_with('.') || name.contains("target");
            if path.is_dir() && !skip {
                dirs.push(path);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                found.insert(path.strip_prefix(root)?.to_path_buf());
            }
        }
    }
    Ok(found.into_iter().collect())
}

/// The rules that look at one file.
fn check_file(place: &str, text: &str, broken: &mut Vec<Violation>) {
    let mut say = |line: usize, what: String| {
        broken.push(Violation { place: place.to_string(), line, what });
    };
    if !text.starts_with("//!") && !text.starts_with("#!") {
        say(1, "opens without `//!`: say what the file is and must not do".into());
    }
    let lines = lines_before_tests(text);
    if lines > FILE_LINES_MAX {
        say(0, format!("{lines} lines before the tests, {FILE_LINES_MAX} are allowed: split it"));
    }
    for (number, line) in text.lines().enumerate() {
        if line.chars().count() > COLUMNS_MAX {
            say(number + 1, format!("wider than {COLUMNS_MAX} columns"));
        }
    }
    if place == "crates/wire/src/lib.rs" && !text.contains("#![forbid(unsafe_code)]") {
        say(1, "wire must say #![forbid(unsafe_code)]: it parses what a peer sends".into());
    }
    let code = lex::code_only(text);
    for (number, line) in code.lines().enumerate() {
        for what in check_line(place, line) {
            say(number + 1, what);
        }
    }
}

/// The rules that look at one line of code.
fn check_line(place: &str, line: &str) -> Vec<String> {
    let mut found = Vec::new();
    let low = LOW_FILES.iter().any(|(file, _)| *file == place);
    for name in ["unsafe", "libc", "io_uring"] {
        let types = LIBC_TYPE_FILES.iter().any(|(file, _)| *file == place);
        let constants = name == "libc" && (types || names_constants_alone(line));
        if !low && !constants && has_word(line, name) {
            found.push(format!("`{name}` stands outside the files that tidy.rs lists for it"));
        }
    }
    for (name, only) in SINGLE_FILE {
        let other = FUSE_BACKEND_FILES.iter().any(|(file, _)| *file == place);
        if has_word(line, name) && place != *only && !other {
            found.push(format!("`{name}` may be named in {only} alone"));
        }
    }
    if place.starts_with("fuser-fork/") {
        for (at, _) in line.match_indices("ringfs_wire") {
            if !line[at..].starts_with("ringfs_wire::abi") {
                found.push("fuser-fork may import `ringfs_wire::abi` alone".into());
            }
        }
    }
    for (word, why) in FORBIDDEN {
        if line.contains(word) {
            found.push(format!("`{word}`: {why}"));
        }
    }
    found
}

/// Whether every `libc::` of the line names a constant: the wire carries the kernel's numbers, and
/// to name them needs neither unsafe code nor a call.
fn names_constants_alone(line: &str) -> bool {
    let after = line.split("libc").skip(1);
    after.map(|rest| rest.strip_prefix("::").unwrap_or_default()).all(|name| {
        let len = name.bytes().take_while(|b| lex::is_word(*b)).count();
        let word = &name[..len];
        !word.is_empty() && !word.bytes().any(|b| b.is_ascii_lowercase())
    })
}

/// Whether `line` holds `word` as a whole identifier.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let bytes = line.as_bytes();
        let before = at.checked_sub(1).is_some_and(|i| lex::is_word(bytes[i]));
        let after = bytes.get(at + word.len()).is_some_and(|b| lex::is_word(*b));
        !before && !after
    })
}

fn lines_before_tests(text: &str) -> usize {
    let tests = text.lines().position(|line| line.starts_with("#[cfg(test)]"));
    tests.unwrap_or_else(|| text.lines().count())
}

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
}

fn metadata() -> Result<Metadata> {
    let metadata = paths::cargo().args(["metadata", "--no-deps", "--format-version", "1"]);
    let text = metadata.args(["--locked", "--quiet"]).run()?;
    serde_json::from_str(&text).context("read cargo metadata")
}

/// The rules on who depends on whom.
fn check_dependencies(metadata: &Metadata) -> Vec<Violation> {
    let mut broken = Vec::new();
    for package in &metadata.packages {
        let rule = OUR_DEPENDENCIES.iter().find(|(name, _)| *name == package.name);
        let Some((_, allowed)) = rule else {
            broken.push(violation(&package.name, "is not in the list of tidy.rs".into()));
            continue;
        };
        for dependency in &package.dependencies {
            let name = dependency.name.as_str();
            let ours = OUR_DEPENDENCIES.iter().any(|(package, _)| *package == name);
            if ours && !allowed.contains(&name) {
                broken.push(violation(&package.name, format!("must not depend on {name}")));
            }
            let foreign = FOREIGN_DEPENDENCIES.iter().find(|(foreign, _, _)| *foreign == name);
            if let Some((_, users, why)) = foreign
                && !users.contains(&package.name.as_str())
            {
                broken.push(violation(&package.name, format!("must not use {name}: {why}")));
            }
        }
    }
    broken
}

fn violation(package: &str, what: String) -> Violation {
    Violation { place: format!("package {package}"), line: 0, what }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_tidy() {
        run().unwrap();
    }

    fn check(place: &str, line: &str, expected: &[&str]) {
        let found = check_line(place, &lex::code_only(line));
        assert_eq!(found.len(), expected.len(), "{place}: {line}: {found:?}");
        for (what, part) in found.iter().zip(expected) {
            assert!(what.contains(part), "{what} should hold {part}");
        }
    }

    #[test]
    fn each_rule_bites_and_only_where_it_should() {
        check("crates/client/src/up.rs", "unsafe { x() }", &["unsafe"]);
        check("crates/server-uring/src/ring.rs", "unsafe { io_uring::x() }", &[]);
        check("crates/client/src/up.rs", "let unsafe_code = 1; // unsafe", &[]);
        check("crates/client/src/up.rs", "use libc::c_int;", &["libc"]);
        check("crates/client/src/up.rs", "a(libc::ENOENT, libc::O_RDWR)", &[]);
        check("crates/client/src/up.rs", "a(libc::ENOENT, libc::open(x))", &["libc"]);
        check("crates/client/src/up.rs", "use libc::{EIO, read};", &["libc"]);
        check("crates/server-uring/src/pool.rs", "use fuse_backend_rs::x;", &["passthrough.rs"]);
        check("fuser-fork/src/frame.rs", "use ringfs_wire::abi::InHeader;", &[]);
        check("fuser-fork/src/frame.rs", "use ringfs_wire::batch::X;", &["abi"]);
        check("crates/wire/src/slot.rs", "#[ignore = \"slow\"]", &["does not run"]);
        check("crates/wire/src/slot.rs", "todo!()", &["commit"]);
    }

    #[test]
    fn files_need_a_head_and_a_bound() {
        let mut broken = Vec::new();
        check_file("a.rs", "fn main() {}\n", &mut broken);
        check_file("b.rs", &format!("//! b\n{}", "x\n".repeat(900)), &mut broken);
        check_file("c.rs", &format!("//! c\n// {}\n", "x".repeat(100)), &mut broken);
        check_file("crates/wire/src/lib.rs", "//! wire\n", &mut broken);
        let places: Vec<&str> = broken.iter().map(|b| b.place.as_str()).collect();
        assert_eq!(places, ["a.rs", "b.rs", "c.rs", "crates/wire/src/lib.rs"]);
    }

    #[test]
    fn dependencies_follow_the_way_of_a_frame() {
        let package = |name: &str, dependencies: &[&str]| Package {
            name: name.into(),
            dependencies: dependencies.iter().map(|d| Dependency { name: (*d).into() }).collect(),
        };
        let metadata = Metadata {
            packages: vec![
                package("ringfs-client", &["fuser-fork", "ringfs-wire", "rustix"]),
                package("ringfs-server-uring", &["fuser-fork"]),
                package("ringfs-wire", &["libc"]),
                package("newcomer", &[]),
            ],
        };
        let broken: Vec<String> =
            check_dependencies(&metadata).into_iter().map(|b| b.place).collect();
        assert_eq!(broken.len(), 3);
        assert!(broken.iter().all(|place| !place.contains("client")));
    }
}
