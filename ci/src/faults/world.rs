//! A model and the tree that it stands for, changed together.
//!
//! Invariant: after each operation both gave the same, or it is a problem. Where an error is
//! allowed (docs/faults.md: only after the daemon was killed), the tree must then be as it was
//! before the operation or as it had to be after it, and the model becomes that.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::model::Model;
use super::op::{Op, Outcome, Subject, differ};
use super::real::Real;
use super::workload::Workload;

const PAGE_BYTES: usize = 4096;
/// Until a name is looked at again that may be gone.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Of each tree so many operations are remembered.
const STORY_MAX: usize = 400;

/// A tree under work.
#[derive(Debug)]
pub struct World<S> {
    model: Model,
    subject: S,
    workload: Workload,
    /// How long a kernel may go on with a name that it does not know to be gone.
    names_good: Duration,
    /// Of an append that failed the kernel may have made several requests, of which the first ones
    /// were done, and one may have been cut short: both at the end of a page.
    in_parts: bool,
    /// The last operations, and how they ended where that was an error.
    story: VecDeque<String>,
}

/// How an operation went.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// As the model says.
    Same,
    /// It failed as it may after a kill; the tree is whole.
    Tolerated(String),
}

/// A subject that can let go of an open file.
pub trait Forget: Subject {
    /// Lets go of it, however it is.
    fn forget(&mut self, handle: u32);
}

impl Forget for Real {
    fn forget(&mut self, handle: u32) {
        Real::forget(self, handle);
    }
}

impl<S: Forget> World<S> {
    /// An empty tree.
    pub fn new(subject: S, workload: Workload) -> Self {
        Self {
            model: Model::default(),
            subject,
            workload,
            names_good: Duration::ZERO,
            in_parts: false,
            story: VecDeque::new(),
        }
    }

    /// The last operations, for whoever asks how a problem came about.
    pub fn story(&self) -> impl Iterator<Item = &str> {
        self.story.iter().map(String::as_str)
    }

    /// On a mount whose names are good for that long.
    pub fn with_names_good(self, names_good: Duration) -> Self {
        Self { names_good, ..self }
    }

    /// Nobody ends an append that a daemon was killed over.
    pub fn with_parts(self, in_parts: bool) -> Self {
        Self { in_parts, ..self }
    }

    /// The tree as it must be.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Does one more operation. Where the daemon was `killed`, also meanwhile, errors are allowed.
    pub fn step(&mut self, killed: impl Fn() -> bool) -> Result<Step, String> {
        let op = self.workload.next(&self.model);
        let before = self.model.clone();
        let expected = self.model.apply(&op);
        let found = self.subject.apply(&op);
        self.note(&op, &found);
        if expected == found {
            return Ok(Step::Same);
        }
        let what = format!("{op:?}: {}", differ(&expected, &found));
        let (errno, told) = match found {
            Outcome::Fail(errno) => (errno, 0),
            Outcome::Part(told, errno) => (errno, told),
            _ => return Err(what),
        };
        if !killed() || !allowed(&op, errno, &before) {
            return Err(what);
        }
        let told = if errno == Errno::IO { told } else { 0 };
        self.settle(before, &op, told).map_err(|more| format!("{what}; then {more}"))?;
        Ok(Step::Tolerated(what))
    }

    fn note(&mut self, op: &Op, found: &Outcome) {
        if self.story.len() == STORY_MAX {
            self.story.pop_front();
        }
        self.story.push_back(match found {
            Outcome::Fail(errno) => format!("{op:?}: {errno}"),
            _ => format!("{op:?}"),
        });
    }

    /// Finds out whether an operation that failed was done, and goes on from there. Of what it was
    /// to write so many bytes were `told` to be.
    fn settle(&mut self, before: Model, op: &Op, told: usize) -> Result<(), String> {
        let mut all = self.could_be(before, op, told);
        if let Some(handle) = op.handle() {
            self.subject.forget(handle);
            for model in &mut all {
                // Not all of them have ever had it.
                let _ = model.apply(&Op::Close { handle });
            }
        }
        // The kernel is soon told that a name may be gone, and knows some time later in any case.
        let is_late = matches!(op, Op::Unlink { .. } | Op::Rmdir { .. } | Op::Rename { .. });
        let limit = Instant::now() + if is_late { self.names_good } else { Duration::ZERO };
        loop {
            let is_last = Instant::now() >= limit;
            let mut problems = Vec::new();
            for model in &all {
                match compare(model, &mut self.subject).into_iter().next() {
                    Some(problem) => problems.push(problem),
                    None => {
                        self.model = model.clone();
                        return Ok(());
                    }
                }
            }
            if is_last {
                return Err(format!("neither done nor undone: {}", problems.join("; ")));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// What the tree may be by then: as it was, or as it had to be.
    fn could_be(&self, before: Model, op: &Op, told: usize) -> Vec<Model> {
        let mut all = Vec::new();
        if self.in_parts
            && let Some((at, tag)) = before.appending(op)
        {
            let ends = |len: &usize| *len == told || (at + len).is_multiple_of(PAGE_BYTES);
            all.extend((told.max(1)..tag.len).filter(ends).map(|len| {
                let mut model = before.clone();
                let _ = model.apply(&op.cut(len));
                model
            }));
        }
        if told == 0 {
            all.insert(0, before);
        }
        all.push(self.model.clone());
        all
    }

    /// Closes what is open; gives what went wrong.
    pub fn close(&mut self, killed: bool) -> Vec<String> {
        let mut problems = Vec::new();
        for handle in self.model.handles() {
            let op = Op::Close { handle };
            let expected = self.model.apply(&op);
            let found = self.subject.apply(&op);
            if expected != found && !killed {
                problems.push(format!("{op:?}: {}", differ(&expected, &found)));
            }
        }
        problems
    }
}

/// Whether an operation may end with that error after the daemon was killed.
fn allowed(op: &Op, errno: Errno, before: &Model) -> bool {
    match errno {
        // It ran or did not, and nothing tells.
        Errno::IO => op.changes(),
        // A file without a name cannot be opened again, nor one that is to be given its name.
        Errno::STALE if matches!(op, Op::TmpLink { .. }) => true,
        Errno::STALE => op.handle().is_some_and(|handle| before.nameless(handle)),
        _ => false,
    }
}

/// How `subject` differs from `model`, in all that is below the root.
pub fn compare(model: &Model, subject: &mut impl Subject) -> Vec<String> {
    let mut model = model.clone();
    let mut problems = Vec::new();
    for path in model.paths() {
        let mut ops = vec![Op::Readdir { path: path.clone() }];
        if !path.is_empty() {
            let xattrs = model.xattrs_at(&path).into_iter();
            ops.extend(xattrs.map(|name| Op::Xattr { path: path.clone(), name }));
            ops.extend([
                Op::Stat { path: path.clone() },
                Op::ReadAll { path: path.clone() },
                Op::Readlink { path: path.clone() },
                Op::ListXattr { path },
            ]);
        }
        for op in ops {
            let (expected, found) = (model.apply(&op), subject.apply(&op));
            if expected != found {
                problems.push(format!("{op:?}: {}", differ(&expected, &found)));
            }
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::op::Kind;
    use crate::sandbox::Sandbox;
    use std::cell::Cell;
    use std::fs;

    const OPS: u64 = 1500;

    #[test]
    fn the_model_does_what_the_kernel_does() {
        let sandbox = Sandbox::new().unwrap();
        for seed in 0..4 {
            let root = sandbox.make_dir(&format!("tree{seed}")).unwrap();
            let prefix = if seed % 2 == 0 { "" } else { "t1-" };
            fs::write(root.join("other"), "").unwrap();
            if prefix.is_empty() {
                fs::remove_file(root.join("other")).unwrap();
            }
            let real = Real::new(root, prefix);
            let mut world = World::new(real, Workload::new(seed, 1, prefix));
            for n in 0..OPS {
                assert_eq!(world.step(|| false), Ok(Step::Same), "seed {seed}, operation {n}");
            }
            assert_eq!(world.close(false), [""; 0]);
            assert_eq!(compare(&world.model, &mut world.subject), [""; 0]);
            assert!(world.model().paths().len() > 10);
        }
    }

    #[test]
    fn operations_succeed_and_fail_in_every_way() {
        let mut model = Model::default();
        let mut workload = Workload::new(5, 1, "");
        let mut errors = std::collections::BTreeMap::new();
        for _ in 0..20_000 {
            let op = workload.next(&model);
            if let Outcome::Fail(errno) = model.apply(&op) {
                *errors.entry(errno.raw_os_error()).or_insert(0) += 1;
            }
        }
        let total: u32 = errors.values().sum();
        assert!((2000..14_000).contains(&total), "{errors:?}");
        let wanted = [Errno::NOENT, Errno::EXIST, Errno::NOTDIR, Errno::ISDIR, Errno::NOTEMPTY];
        for errno in [&wanted[..], &[Errno::INVAL, Errno::PERM, Errno::LOOP]].concat() {
            assert!(errors.contains_key(&errno.raw_os_error()), "{errno}: {errors:?}");
        }
    }

    /// What a broken file system does to an operation.
    type Sabotage = fn(&mut Real, &Op) -> Option<Outcome>;

    struct Broken {
        real: Real,
        sabotage: Sabotage,
        /// Operations until it breaks.
        patience: Cell<u32>,
    }

    impl Subject for Broken {
        fn apply(&mut self, op: &Op) -> Outcome {
            if self.patience.get() > 0 {
                self.patience.set(self.patience.get() - 1);
                return self.real.apply(op);
            }
            (self.sabotage)(&mut self.real, op).unwrap_or_else(|| self.real.apply(op))
        }
    }

    impl Forget for Broken {
        fn forget(&mut self, handle: u32) {
            self.real.forget(handle);
        }
    }

    /// Works on a file system that breaks; gives what was found.
    fn found_with(sabotage: Sabotage, killed: bool) -> (Vec<String>, u32) {
        found_in_parts(sabotage, killed, false)
    }

    fn found_in_parts(sabotage: Sabotage, killed: bool, in_parts: bool) -> (Vec<String>, u32) {
        let sandbox = Sandbox::new().unwrap();
        let real = Real::new(sandbox.make_dir("tree").unwrap(), "");
        let broken = Broken { real, sabotage, patience: Cell::new(300) };
        let mut world = World::new(broken, Workload::new(1, 1, "")).with_parts(in_parts);
        let mut tolerated = 0;
        for _ in 0..OPS {
            match world.step(|| killed) {
                Ok(Step::Same) => {}
                Ok(Step::Tolerated(_)) => tolerated += 1,
                Err(problem) => return (vec![problem], tolerated),
            }
        }
        (compare(&world.model, &mut world.subject), tolerated)
    }

    #[test]
    fn planted_bugs_are_found() {
        let plants: &[(&str, Sabotage)] = &[
            ("an append is done twice", |real, op| match op {
                Op::AppendTo { .. } => {
                    real.apply(op);
                    Some(real.apply(op))
                }
                _ => None,
            }),
            ("a create is sent again", |real, op| match op {
                Op::Create { .. } | Op::Mkdir { .. } | Op::Link { .. } => {
                    real.apply(op);
                    Some(real.apply(op))
                }
                _ => None,
            }),
            ("an unlink is sent again", |real, op| match op {
                Op::Unlink { .. } | Op::RemoveXattr { .. } => {
                    real.apply(op);
                    Some(real.apply(op))
                }
                _ => None,
            }),
            ("an exchange is done twice", |real, op| match op {
                Op::Rename { .. } => {
                    let first = real.apply(op);
                    real.apply(op);
                    Some(first)
                }
                _ => None,
            }),
            ("a write is lost", |_, op| match op {
                Op::Write { .. } => Some(Outcome::Done),
                _ => None,
            }),
            ("a chmod is lost", |_, op| match op {
                Op::Chmod { .. } => Some(Outcome::Done),
                _ => None,
            }),
            ("an attribute is lost", |_, op| match op {
                Op::SetXattr { .. } => Some(Outcome::Done),
                _ => None,
            }),
            ("a write is torn", |real, op| match op {
                Op::AppendTo { path, tag } => {
                    let tag = super::super::op::Tag { len: tag.len / 2, ..*tag };
                    Some(real.apply(&Op::AppendTo { path: path.clone(), tag }))
                }
                _ => None,
            }),
            ("a name is missing", |real, op| match real.apply(op) {
                Outcome::Names(mut names) => {
                    names.pop_first();
                    Some(Outcome::Names(names))
                }
                other => Some(other),
            }),
            ("the connection is lost", |_, _| Some(Outcome::Fail(Errno::NOTCONN))),
        ];
        for (what, sabotage) in plants {
            let (problems, _) = found_with(*sabotage, false);
            assert!(!problems.is_empty(), "not found: {what}");
        }
        assert_eq!(found_with(|_, _| None, false), (vec![], 0));
    }

    /// Appends what `len` says of the tag's bytes, to a file of so many.
    fn append_some(real: &mut Real, op: &Op, len: fn(usize, usize) -> usize) -> Option<usize> {
        let Op::AppendTo { path, tag } = op else { return None };
        let stat = real.apply(&Op::Stat { path: path.clone() });
        let Outcome::Stat { kind: Kind::File, size, .. } = stat else { return None };
        let len = len(size as usize, tag.len);
        if len > 0 {
            real.apply(&op.cut(len));
        }
        Some(len)
    }

    /// Up to the first end of a page.
    fn page(at: usize, len: usize) -> usize {
        (PAGE_BYTES - at % PAGE_BYTES).min(len)
    }

    #[test]
    fn an_append_that_failed_may_be_there_up_to_a_page() {
        let fails: Sabotage = |real, op| {
            append_some(real, op, page)?;
            Some(Outcome::Fail(Errno::IO))
        };
        let told: Sabotage = |real, op| {
            let len = append_some(real, op, page)?;
            Some(Outcome::Part(len, Errno::IO))
        };
        for sabotage in [fails, told] {
            let (problems, tolerated) = found_in_parts(sabotage, true, true);
            assert!(problems.is_empty() && tolerated > 10, "{tolerated} {problems:?}");
            assert!(!found_in_parts(sabotage, false, true).0.is_empty());
            // A daemon that leaves what it has done has the rest follow.
            assert!(!found_in_parts(sabotage, true, false).0.is_empty());
        }
        let lost: Sabotage = |real, op| {
            append_some(real, op, |_, _| 0)?;
            Some(Outcome::Part(1, Errno::IO))
        };
        let torn: Sabotage = |real, op| {
            append_some(real, op, |at, len| (page(at, len) / 2).max(1))?;
            Some(Outcome::Fail(Errno::IO))
        };
        let doubled: Sabotage = |real, op| {
            append_some(real, op, page)?;
            append_some(real, op, |_, len| len)?;
            Some(Outcome::Fail(Errno::IO))
        };
        let untold: Sabotage = |real, op| {
            append_some(real, op, |_, len| len)?;
            Some(Outcome::Fail(Errno::MSGSIZE))
        };
        for (what, sabotage) in
            [("lost", lost), ("torn", torn), ("doubled", doubled), ("untold", untold)]
        {
            let (problems, _) = found_in_parts(sabotage, true, true);
            assert!(!problems.is_empty(), "not found: {what}");
        }
    }

    #[test]
    fn after_a_kill_errors_are_settled_by_looking_and_only_then() {
        let undone: Sabotage = |_, op| op.changes().then_some(Outcome::Fail(Errno::IO));
        let done: Sabotage = |real, op| match op {
            Op::Mkdir { .. } | Op::AppendTo { .. } => {
                real.apply(op);
                Some(Outcome::Fail(Errno::IO))
            }
            _ => None,
        };
        for sabotage in [undone, done] {
            let (problems, tolerated) = found_with(sabotage, true);
            assert!(problems.is_empty() && tolerated > 50, "{tolerated} {problems:?}");
            assert!(!found_with(sabotage, false).0.is_empty());
        }
        let half: Sabotage = |real, op| match op {
            Op::AppendTo { path, tag } => {
                let tag = super::super::op::Tag { len: tag.len / 2, ..*tag };
                real.apply(&Op::AppendTo { path: path.clone(), tag });
                Some(Outcome::Fail(Errno::IO))
            }
            _ => None,
        };
        assert!(found_with(half, true).0[0].contains("neither done nor undone"));
        let stale: Sabotage =
            |_, op| matches!(op, Op::ReadAll { .. }).then_some(Outcome::Fail(Errno::STALE));
        assert!(!found_with(stale, true).0.is_empty());
    }
}
