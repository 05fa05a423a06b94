//! A tree of files in memory: what each operation must give, errno included.
//!
//! Invariant: it does what Linux does on ext4 or tmpfs, for what one process alone changes below
//! one directory. Checks come in the kernel's order, because the first that fails gives the errno.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rustix::io::Errno;

use super::op::{Handle, Kind, Op, Outcome, Renaming, Setting, Subject, Tag, content};

/// Number of an inode.
type Id = u64;

const ROOT: Id = 0;

#[derive(Clone, Debug)]
enum Body {
    File(Arc<Vec<u8>>),
    Dir(BTreeMap<String, Id>),
    Link(String),
}

#[derive(Clone, Debug)]
struct Node {
    body: Body,
    /// Names; of a directory it follows from its content.
    names: u64,
    mode: u32,
    xattrs: BTreeMap<String, Vec<u8>>,
}

impl Node {
    fn kind(&self) -> Kind {
        match self.body {
            Body::File(_) => Kind::File,
            Body::Dir(_) => Kind::Dir,
            Body::Link(_) => Kind::Link,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Open {
    id: Id,
    append: bool,
}

/// The tree. Cloning shares the contents of files.
#[derive(Clone, Debug)]
pub struct Model {
    nodes: BTreeMap<Id, Node>,
    next: Id,
    open: BTreeMap<Handle, Open>,
}

impl Default for Model {
    fn default() -> Self {
        let body = Body::Dir(BTreeMap::new());
        let root = Node { body, names: 1, mode: 0o755, xattrs: BTreeMap::new() };
        Self { nodes: BTreeMap::from([(ROOT, root)]), next: ROOT + 1, open: BTreeMap::new() }
    }
}

impl Subject for Model {
    fn apply(&mut self, op: &Op) -> Outcome {
        self.perform(op).unwrap_or_else(Outcome::Fail)
    }
}

type Given = Result<Outcome, Errno>;

impl Model {
    /// Open files.
    pub fn handles(&self) -> Vec<Handle> {
        self.open.keys().copied().collect()
    }

    /// Bytes of the file behind an open handle, or 0.
    pub fn len_of(&self, handle: Handle) -> usize {
        match self.open.get(&handle).map(|open| &self.nodes[&open.id].body) {
            Some(Body::File(data)) => data.len(),
            _ => 0,
        }
    }

    /// Whether the file behind an open handle has no name left.
    pub fn nameless(&self, handle: Handle) -> bool {
        self.open.get(&handle).is_some_and(|open| self.nodes[&open.id].names == 0)
    }

    /// Where an operation appends, and what; `None`: it does not.
    pub fn appending(&self, op: &Op) -> Option<(usize, Tag)> {
        let (id, tag) = match op {
            Op::AppendTo { path, tag } => (self.file(path).ok()?, *tag),
            Op::Write { handle, tag, .. } => {
                let open = self.opened(*handle).ok().filter(|open| open.append)?;
                (open.id, *tag)
            }
            _ => return None,
        };
        match &self.nodes[&id].body {
            Body::File(data) => Some((data.len(), tag)),
            Body::Dir(_) | Body::Link(_) => None,
        }
    }

    /// What stands at a path, without following its end.
    pub fn kind_at(&self, path: &[String]) -> Option<Kind> {
        self.find(path).ok().map(|id| self.nodes[&id].kind())
    }

    /// Every path, parents first.
    pub fn paths(&self) -> Vec<Vec<String>> {
        let mut found = vec![Vec::new()];
        let mut at = 0;
        while let Some(path) = found.get(at).cloned() {
            at += 1;
            let Ok(Body::Dir(entries)) = self.find(&path).map(|id| &self.nodes[&id].body) else {
                continue;
            };
            found.extend(entries.keys().map(|name| [path.clone(), vec![name.clone()]].concat()));
        }
        found
    }

    /// Names of the extended attributes at a path.
    pub fn xattrs_at(&self, path: &[String]) -> Vec<String> {
        let found = self.find(path).map(|id| self.nodes[&id].xattrs.keys().cloned().collect());
        found.unwrap_or_default()
    }

    fn perform(&mut self, op: &Op) -> Given {
        match op {
            Op::Create { path, handle } => {
                let id = self.make(path, Body::File(Arc::default()))?;
                self.open.insert(*handle, Open { id, append: false });
                Ok(Outcome::Done)
            }
            Op::Open { path, handle, append } => {
                let id = self.file(path)?;
                self.open.insert(*handle, Open { id, append: *append });
                Ok(Outcome::Done)
            }
            Op::Close { handle } => {
                let open = self.open.remove(handle).ok_or(Errno::BADF)?;
                self.drop_unused(open.id);
                Ok(Outcome::Done)
            }
            Op::Write { handle, at, tag } => {
                let open = self.opened(*handle)?;
                let data = self.data(open.id)?;
                let at = if open.append { data.len() } else { *at as usize };
                put(data, at, &content(*tag));
                Ok(Outcome::Done)
            }
            Op::Read { handle } => {
                let open = self.opened(*handle)?;
                Ok(Outcome::Bytes(self.data(open.id)?.to_vec()))
            }
            Op::Resize { handle, len } => {
                let open = self.opened(*handle)?;
                Arc::make_mut(self.data(open.id)?).resize(*len as usize, 0);
                Ok(Outcome::Done)
            }
            Op::StatHandle { handle } => Ok(self.stat(self.opened(*handle)?.id)),
            Op::Fsync { handle } => self.opened(*handle).map(|_| Outcome::Done),
            Op::AppendTo { path, tag } => {
                let id = self.file(path)?;
                let data = self.data(id)?;
                put(data, data.len(), &content(*tag));
                Ok(Outcome::Done)
            }
            Op::ReadAll { path } => {
                let id = self.file(path)?;
                Ok(Outcome::Bytes(self.data(id)?.to_vec()))
            }
            Op::TmpLink { path, tag } => {
                let id = self.make(path, Body::File(Arc::default()))?;
                put(self.data(id)?, 0, &content(*tag));
                Ok(Outcome::Done)
            }
            Op::Mkdir { path } => self.make(path, Body::Dir(BTreeMap::new())).map(done),
            Op::Symlink { path, target } => self.make(path, Body::Link(target.clone())).map(done),
            Op::Rmdir { path } => self.rmdir(path),
            Op::Unlink { path } => self.unlink(path),
            Op::Link { old, new } => self.link(old, new),
            Op::Rename { old, new, how } => self.rename(old, new, *how),
            Op::Readlink { .. }
            | Op::Chmod { .. }
            | Op::Stat { .. }
            | Op::Readdir { .. }
            | Op::FsyncDir { .. } => self.attributes(op),
            Op::SetXattr { .. }
            | Op::Xattr { .. }
            | Op::ListXattr { .. }
            | Op::RemoveXattr { .. } => self.xattr(op),
        }
    }

    fn attributes(&mut self, op: &Op) -> Given {
        match op {
            Op::Readlink { path } => match &self.nodes[&self.find(path)?].body {
                Body::Link(target) => Ok(Outcome::Text(target.clone())),
                Body::File(_) | Body::Dir(_) => Err(Errno::INVAL),
            },
            Op::Chmod { path, mode } => {
                let id = self.followed(path)?;
                self.node(id)?.mode = *mode;
                Ok(Outcome::Done)
            }
            Op::Stat { path } => Ok(self.stat(self.find(path)?)),
            Op::Readdir { path } => {
                let id = self.followed(path)?;
                let entries = self.entries(id)?;
                let kinds = entries.iter().map(|(name, id)| (name.clone(), self.nodes[id].kind()));
                Ok(Outcome::Names(kinds.collect()))
            }
            Op::FsyncDir { path } => {
                let id = self.followed(path)?;
                self.entries(id).map(|_| Outcome::Done)
            }
            _ => Err(Errno::NOSYS),
        }
    }

    fn xattr(&mut self, op: &Op) -> Given {
        match op {
            Op::SetXattr { path, name, tag, how } => {
                let id = self.followed(path)?;
                let xattrs = &mut self.node(id)?.xattrs;
                match (how, xattrs.contains_key(name)) {
                    (Setting::Create, true) => return Err(Errno::EXIST),
                    (Setting::Replace, false) => return Err(Errno::NODATA),
                    _ => xattrs.insert(name.clone(), content(*tag)),
                };
                Ok(Outcome::Done)
            }
            Op::Xattr { path, name } => {
                let id = self.followed(path)?;
                let value = self.node(id)?.xattrs.get(name).cloned();
                value.map(Outcome::Bytes).ok_or(Errno::NODATA)
            }
            Op::ListXattr { path } => {
                let id = self.followed(path)?;
                let keys: BTreeSet<String> = self.node(id)?.xattrs.keys().cloned().collect();
                Ok(Outcome::Keys(keys))
            }
            Op::RemoveXattr { path, name } => {
                let id = self.followed(path)?;
                self.node(id)?.xattrs.remove(name).map(|_| Outcome::Done).ok_or(Errno::NODATA)
            }
            _ => Err(Errno::NOSYS),
        }
    }

    fn node(&mut self, id: Id) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(&id).ok_or(Errno::NOENT)
    }

    fn opened(&self, handle: Handle) -> Result<Open, Errno> {
        self.open.get(&handle).copied().ok_or(Errno::BADF)
    }

    fn entries(&self, id: Id) -> Result<&BTreeMap<String, Id>, Errno> {
        match &self.nodes[&id].body {
            Body::Dir(entries) => Ok(entries),
            Body::File(_) => Err(Errno::NOTDIR),
            // All links point to nothing.
            Body::Link(_) => Err(Errno::NOENT),
        }
    }

    fn entries_mut(&mut self, id: Id) -> Result<&mut BTreeMap<String, Id>, Errno> {
        match &mut self.node(id)?.body {
            Body::Dir(entries) => Ok(entries),
            Body::File(_) | Body::Link(_) => Err(Errno::NOTDIR),
        }
    }

    fn data(&mut self, id: Id) -> Result<&mut Arc<Vec<u8>>, Errno> {
        match &mut self.node(id)?.body {
            Body::File(data) => Ok(data),
            Body::Dir(_) => Err(Errno::ISDIR),
            Body::Link(_) => Err(Errno::LOOP),
        }
    }

    fn find(&self, path: &[String]) -> Result<Id, Errno> {
        path.iter()
            .try_fold(ROOT, |id, name| self.entries(id)?.get(name).copied().ok_or(Errno::NOENT))
    }

    /// The same, for calls that follow a link at the end.
    fn followed(&self, path: &[String]) -> Result<Id, Errno> {
        let id = self.find(path)?;
        if self.nodes[&id].kind() == Kind::Link { Err(Errno::NOENT) } else { Ok(id) }
    }

    /// A regular file, opened without following.
    fn file(&self, path: &[String]) -> Result<Id, Errno> {
        let id = self.find(path)?;
        match self.nodes[&id].kind() {
            Kind::File => Ok(id),
            Kind::Dir => Err(Errno::ISDIR),
            Kind::Link => Err(Errno::LOOP),
        }
    }

    /// The directory of a path's last name, and the name.
    fn parent<'p>(&self, path: &'p [String]) -> Result<(Id, &'p String), Errno> {
        let (name, parents) = path.split_last().ok_or(Errno::BUSY)?;
        let id = self.find(parents)?;
        self.entries(id)?;
        Ok((id, name))
    }

    fn make(&mut self, path: &[String], body: Body) -> Result<Id, Errno> {
        let (parent, name) = self.parent(path)?;
        let id = self.next;
        let entries = self.entries_mut(parent)?;
        if entries.contains_key(name) {
            return Err(Errno::EXIST);
        }
        entries.insert(name.clone(), id);
        self.next += 1;
        let mode = match body {
            Body::File(_) => 0o600,
            Body::Dir(_) => 0o700,
            Body::Link(_) => 0o777,
        };
        self.nodes.insert(id, Node { body, names: 1, mode, xattrs: BTreeMap::new() });
        Ok(id)
    }

    fn child(&self, parent: Id, name: &str) -> Option<Id> {
        self.entries(parent).ok()?.get(name).copied()
    }

    fn rmdir(&mut self, path: &[String]) -> Given {
        let (parent, name) = self.parent(path)?;
        let id = self.child(parent, name).ok_or(Errno::NOENT)?;
        match &self.nodes[&id].body {
            Body::Dir(entries) if entries.is_empty() => self.remove(parent, name),
            Body::Dir(_) => Err(Errno::NOTEMPTY),
            Body::File(_) | Body::Link(_) => Err(Errno::NOTDIR),
        }
    }

    fn unlink(&mut self, path: &[String]) -> Given {
        let (parent, name) = self.parent(path)?;
        let id = self.child(parent, name).ok_or(Errno::NOENT)?;
        if self.nodes[&id].kind() == Kind::Dir {
            return Err(Errno::ISDIR);
        }
        self.remove(parent, name)
    }

    fn remove(&mut self, parent: Id, name: &str) -> Given {
        let id = self.entries_mut(parent)?.remove(name).ok_or(Errno::NOENT)?;
        self.node(id)?.names -= 1;
        self.drop_unused(id);
        Ok(Outcome::Done)
    }

    fn drop_unused(&mut self, id: Id) {
        let open = self.open.values().any(|open| open.id == id);
        if !open && self.nodes.get(&id).is_some_and(|node| node.names == 0) {
            self.nodes.remove(&id);
        }
    }

    fn link(&mut self, old: &[String], new: &[String]) -> Given {
        let id = self.find(old)?;
        let (parent, name) = self.parent(new)?;
        if self.child(parent, name).is_some() {
            return Err(Errno::EXIST);
        }
        if self.nodes[&id].kind() == Kind::Dir {
            return Err(Errno::PERM);
        }
        self.entries_mut(parent)?.insert(name.clone(), id);
        self.node(id)?.names += 1;
        Ok(Outcome::Done)
    }

    /// Whether `id` is `below` or one of the directories that it lies in.
    fn holds(&self, id: Id, below: Id) -> bool {
        id == below
            || self.entries(id).is_ok_and(|e| e.values().any(|child| self.holds(*child, below)))
    }

    fn rename(&mut self, old: &[String], new: &[String], how: Renaming) -> Given {
        let (from, old_name) = self.parent(old)?;
        let (to, new_name) = self.parent(new)?;
        let id = self.child(from, old_name).ok_or(Errno::NOENT)?;
        let target = self.child(to, new_name);
        match (how, target) {
            (Renaming::NoReplace, Some(_)) => return Err(Errno::EXIST),
            (Renaming::Exchange, None) => return Err(Errno::NOENT),
            _ => {}
        }
        if self.holds(id, to) {
            return Err(Errno::INVAL);
        }
        if target.is_some_and(|target| self.holds(target, from)) {
            return Err(if how == Renaming::Exchange { Errno::INVAL } else { Errno::NOTEMPTY });
        }
        if target == Some(id) {
            return Ok(Outcome::Done);
        }
        if let (Renaming::Exchange, Some(target)) = (how, target) {
            self.entries_mut(from)?.insert(old_name.clone(), target);
            self.entries_mut(to)?.insert(new_name.clone(), id);
            return Ok(Outcome::Done);
        }
        if let Some(target) = target {
            match (self.nodes[&id].kind(), &self.nodes[&target].body) {
                (Kind::Dir, Body::Dir(entries)) if !entries.is_empty() => {
                    return Err(Errno::NOTEMPTY);
                }
                (Kind::Dir, Body::File(_) | Body::Link(_)) => return Err(Errno::NOTDIR),
                (Kind::File | Kind::Link, Body::Dir(_)) => return Err(Errno::ISDIR),
                _ => {}
            }
            self.remove(to, new_name)?;
        }
        self.entries_mut(from)?.remove(old_name);
        self.entries_mut(to)?.insert(new_name.clone(), id);
        Ok(Outcome::Done)
    }

    fn stat(&self, id: Id) -> Outcome {
        let node = &self.nodes[&id];
        let (size, nlink) = match &node.body {
            Body::File(data) => (data.len(), node.names),
            Body::Link(target) => (target.len(), node.names),
            Body::Dir(entries) => {
                let dirs = entries.values().filter(|id| self.nodes[*id].kind() == Kind::Dir);
                (0, 2 + dirs.count() as u64)
            }
        };
        Outcome::Stat { kind: node.kind(), size: size as u64, nlink, mode: node.mode }
    }
}

fn done(_: Id) -> Outcome {
    Outcome::Done
}

fn put(data: &mut Arc<Vec<u8>>, at: usize, bytes: &[u8]) {
    let data = Arc::make_mut(data);
    if data.len() < at + bytes.len() {
        data.resize(at + bytes.len(), 0);
    }
    data[at..at + bytes.len()].copy_from_slice(bytes);
}
