//! Which operation comes next: at random from a seed, with an eye on what is there.
//!
//! Invariant: what is chosen follows from the seed and the model alone, so a thread's operations
//! are the same in each run as long as they give the same. Few names and small depths make them
//! meet: about a third of the operations is meant to fail.

use super::model::Model;
use super::op::{Handle, Kind, Op, Path, Renaming, Setting, Tag};
use super::rng::Rng;

const NAMES: &[&str] = &["a", "b", "c", "d", "e", "f"];
const XATTRS: &[&str] = &["user.one", "user.two", "user.three"];
const DEPTH_MAX: u64 = 3;
const HANDLES_MAX: usize = 6;
/// No write begins behind this.
const OFFSET_MAX: u64 = 192 << 10;
/// Files that have grown to this are cut short.
const FILE_BYTES_MAX: usize = 1 << 20;

/// Chooses operations for one tree.
#[derive(Clone, Debug)]
pub struct Workload {
    rng: Rng,
    thread: u64,
    seq: u64,
    next_handle: Handle,
    /// Begins the names in the root.
    prefix: String,
}

/// Operations with how often each is chosen.
const WEIGHTS: &[(&str, u64)] = &[
    ("create", 8),
    ("open", 6),
    ("close", 5),
    ("write", 9),
    ("read", 4),
    ("resize", 3),
    ("stat handle", 3),
    ("fsync", 1),
    ("append", 9),
    ("read all", 5),
    ("tmpfile", 3),
    ("mkdir", 7),
    ("rmdir", 3),
    ("unlink", 8),
    ("symlink", 3),
    ("readlink", 2),
    ("link", 5),
    ("rename", 9),
    ("chmod", 3),
    ("stat", 6),
    ("readdir", 4),
    ("fsync dir", 1),
    ("set xattr", 4),
    ("xattr", 2),
    ("list xattr", 1),
    ("remove xattr", 2),
];

impl Workload {
    /// For the tree of `thread` whose root's names begin with `prefix`.
    pub fn new(seed: u64, thread: u64, prefix: &str) -> Self {
        let rng = Rng::of(&[seed, thread, prefix.len() as u64]);
        Self { rng, thread, seq: 0, next_handle: 0, prefix: prefix.into() }
    }

    fn tag(&mut self, len: usize) -> Tag {
        self.seq += 1;
        Tag { thread: self.thread, seq: self.seq, len }
    }

    /// A length: mostly some hundred bytes, at times much more than a page.
    fn len(&mut self) -> usize {
        1 + self.rng.magnitude(if self.rng.clone().once_in(12) { 300_000 } else { 9000 }) as usize
    }

    fn name(&mut self, depth: u64) -> String {
        let name = *self.rng.pick(NAMES);
        if depth == 0 { format!("{}{name}", self.prefix) } else { name.into() }
    }

    /// A path of one to some names; those before the last are mostly directories.
    fn path(&mut self, model: &Model) -> Path {
        let depth = 1 + self.rng.below(DEPTH_MAX);
        let mut path = Path::new();
        for n in 0..depth {
            // Tries again for a directory, unless a wrong way is wanted.
            let tries = if n + 1 < depth && !self.rng.once_in(12) { 6 } else { 1 };
            for last in (0..tries).rev() {
                path.push(self.name(n));
                if last == 0 || model.kind_at(&path) == Some(Kind::Dir) {
                    break;
                }
                path.pop();
            }
        }
        path
    }

    /// A path that mostly stands for something that `wanted` accepts.
    fn found(&mut self, model: &Model, wanted: fn(Kind) -> bool) -> Path {
        for _ in 0..12 {
            let path = self.path(model);
            if model.kind_at(&path).is_some_and(wanted) {
                return path;
            }
        }
        self.path(model)
    }

    fn handle(&mut self, model: &Model) -> Option<Handle> {
        let handles = model.handles();
        (!handles.is_empty()).then(|| *self.rng.pick(&handles))
    }

    fn new_handle(&mut self) -> Handle {
        self.next_handle += 1;
        self.next_handle
    }

    /// The next operation on the tree as `model` has it.
    pub fn next(&mut self, model: &Model) -> Op {
        if model.handles().len() >= HANDLES_MAX
            && let Some(handle) = self.handle(model)
        {
            return Op::Close { handle };
        }
        loop {
            let index = self.rng.weighted(WEIGHTS.iter().map(|(_, weight)| *weight));
            let name = WEIGHTS[index].0;
            let op = self.on_handle(name, model).or_else(|| self.on_path(name, model));
            if let Some(op) = op {
                return op;
            }
        }
    }

    fn on_handle(&mut self, name: &str, model: &Model) -> Option<Op> {
        let handle = match name {
            "close" | "write" | "read" | "resize" | "stat handle" | "fsync" => {
                self.handle(model)?
            }
            _ => return None,
        };
        Some(match name {
            "close" => Op::Close { handle },
            "write" if model.len_of(handle) < FILE_BYTES_MAX => {
                let (at, len) = (self.rng.magnitude(OFFSET_MAX), self.len());
                Op::Write { handle, at, tag: self.tag(len) }
            }
            "write" | "resize" => Op::Resize { handle, len: self.rng.magnitude(OFFSET_MAX) },
            "read" => Op::Read { handle },
            "stat handle" => Op::StatHandle { handle },
            _ => Op::Fsync { handle },
        })
    }

    fn on_path(&mut self, name: &str, model: &Model) -> Option<Op> {
        let file = |kind| kind == Kind::File;
        let any = |_| true;
        Some(match name {
            "create" => Op::Create { path: self.path(model), handle: self.new_handle() },
            "open" => {
                let (path, append) = (self.found(model, file), self.rng.once_in(3));
                Op::Open { path, handle: self.new_handle(), append }
            }
            "append" => {
                let (path, len) = (self.found(model, file), self.len());
                Op::AppendTo { path, tag: self.tag(len) }
            }
            "read all" => Op::ReadAll { path: self.found(model, file) },
            "tmpfile" => {
                let (path, len) = (self.path(model), self.len());
                Op::TmpLink { path, tag: self.tag(len) }
            }
            "mkdir" => Op::Mkdir { path: self.path(model) },
            "rmdir" => Op::Rmdir { path: self.found(model, |kind| kind == Kind::Dir) },
            "unlink" => Op::Unlink { path: self.found(model, |kind| kind != Kind::Dir) },
            "symlink" => {
                let target = format!("nowhere/{}", self.rng.below(1000));
                Op::Symlink { path: self.path(model), target }
            }
            "readlink" => Op::Readlink { path: self.found(model, |kind| kind == Kind::Link) },
            "link" => Op::Link { old: self.found(model, any), new: self.path(model) },
            "rename" => {
                let how = [Renaming::Plain, Renaming::NoReplace, Renaming::Exchange];
                let (old, how) = (self.found(model, any), *self.rng.pick(&how));
                let exchange = how == Renaming::Exchange;
                let new = if exchange { self.found(model, any) } else { self.path(model) };
                Op::Rename { old, new, how }
            }
            "chmod" => {
                let mode = *self.rng.pick(&[0o600, 0o640, 0o644, 0o700, 0o755, 0o400]);
                Op::Chmod { path: self.found(model, any), mode }
            }
            "stat" => Op::Stat { path: self.found(model, any) },
            "readdir" if self.rng.once_in(3) => Op::Readdir { path: Path::new() },
            "readdir" => Op::Readdir { path: self.found(model, |kind| kind == Kind::Dir) },
            "fsync dir" => Op::FsyncDir { path: self.found(model, |kind| kind == Kind::Dir) },
            _ => return self.on_xattr(name, model),
        })
    }

    fn on_xattr(&mut self, operation: &str, model: &Model) -> Option<Op> {
        let path = self.found(model, |kind| kind != Kind::Link);
        let name = (*self.rng.pick(XATTRS)).to_owned();
        Some(match operation {
            "set xattr" => {
                let how = *self.rng.pick(&[Setting::Any, Setting::Create, Setting::Replace]);
                let len = 1 + self.rng.below(200) as usize;
                Op::SetXattr { path, name, tag: self.tag(len), how }
            }
            "xattr" => Op::Xattr { path, name },
            "list xattr" => Op::ListXattr { path },
            "remove xattr" => Op::RemoveXattr { path, name },
            _ => return None,
        })
    }
}
