//! What became of a request that a daemon left which was killed: found out by looking.
//!
//! The table of what is compared and what stays ambiguous is in docs/sessions.md: the only list of
//! errors that an application may see of a daemon's death. Invariants: what has happened is not
//! made again, and what has not is not said to have; where the host's files do not tell, the answer
//! is EIO, and a line in the log. What is made here beyond looking completes a call that has begun:
//! the rest of an append, the open of a file that a CREATE made.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::table::{Cell, Past, replies};
use rustix::fs::OFlags;
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::dispatch::{Request, XATTR_BYTES_MAX, name_alone, name_first, text_first};
use crate::fdops;
use crate::fs::Fs;
use crate::intent::{Intent, Moved, Named, Nanos, made_name, nanos};
use crate::nodes::Node;
use crate::ops::{io, xattrs};
use crate::passthrough::Found;
use crate::reply::put;
use crate::state_dir::IntentPlace;

/// Of what a dead daemon's requests were found to be the makers; one for each session, whose
/// requests may name the same files. Bounded by the session's slots.
#[derive(Default)]
pub struct Claims(Mutex<Claimed>);

#[derive(Default)]
struct Claimed {
    /// Inode numbers, each with the latest birth that the file can have had.
    made: HashMap<u64, Nanos>,
    /// (directory, name) of links.
    linked: HashSet<(u64, Vec<u8>)>,
    /// (inode number, length before) of appends.
    appended: HashSet<(u64, u64)>,
}

impl Claims {
    fn lock(&self) -> std::sync::MutexGuard<'_, Claimed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the replies that are there say to have made is nobody else's.
    pub fn of_replies(&self, cells: &[Cell]) {
        let mut claimed = self.lock();
        for (opcode, reply) in replies(cells) {
            let makes = matches!(
                Opcode::from_u32(opcode),
                Some(Opcode::Mkdir | Opcode::Mknod | Opcode::Symlink | Opcode::Create)
            );
            if let Ok((entry, _)) = abi::EntryOut::read_from_prefix(reply)
                && makes
            {
                let attr = &entry.attr;
                claimed.made.insert(attr.ino, nanos(attr.ctime as i64, attr.ctimensec));
            }
        }
    }

    /// Whether the file is this request's: the first one's that says so.
    fn make(&self, ino: u64, born: Nanos) -> bool {
        let mut claimed = self.lock();
        if claimed.made.get(&ino).is_some_and(|&latest| born <= latest) {
            return false;
        }
        claimed.made.insert(ino, born);
        true
    }
}

/// What looking has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It had been done; the reply's body, of this length, was written.
    Done(usize),
    /// It had not, or may run again: run it.
    NotRun,
    /// Nobody can tell.
    Unknown,
}

/// How a request that a dead daemon left has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It had been done before.
    Done,
    /// It was run, for the first time or as one that may run again.
    Run,
    /// Nobody can tell: EIO.
    Ambiguous,
}

impl Fs {
    /// Ends a request that a dead daemon left: on a thread that may wait, like [`Fs::execute`], and
    /// with as much room. `place` is where the intent of this use of the slot is.
    pub fn recover(
        &self,
        request: &Request<'_>,
        past: Past<'_>,
        place: &IntentPlace,
        out: &mut [u8],
    ) -> (Outcome, Result<usize, Errno>) {
        let bytes_max = self.reply_bytes_max(request);
        let Some(out) = out.get_mut(..bytes_max) else {
            return (Outcome::Run, Err(Errno::OVERFLOW));
        };
        match self.decide(request, past, place.read().as_ref(), place.claims(), out) {
            Verdict::Done(len) => (Outcome::Done, Ok(len)),
            Verdict::NotRun => {
                if let Some(intent) = self.intent(request) {
                    place.write(&intent);
                }
                (Outcome::Run, self.execute(request, out))
            }
            Verdict::Unknown => {
                let opcode = Opcode::from_u32(request.opcode);
                let name = opcode.map(|opcode| names_of(opcode, request)).unwrap_or_default();
                tracing::warn!(
                    ?opcode,
                    node = request.nodeid,
                    name,
                    "nobody can tell whether a daemon that died had done this: answered EIO"
                );
                (Outcome::Ambiguous, Err(Errno::IO))
            }
        }
    }

    /// Finds out what became of a request. `intent` is what was noted before it ran.
    pub fn decide(
        &self,
        request: &Request<'_>,
        past: Past<'_>,
        intent: Option<&Intent>,
        claims: &Claims,
        out: &mut [u8],
    ) -> Verdict {
        let Some(opcode) = Opcode::from_u32(request.opcode) else { return Verdict::NotRun };
        let verdict = match (past, intent) {
            (Past::Done(reply), _) => self.give_anew(opcode, request, reply, out),
            // An intent is whole before its call is made.
            (Past::Running, None) => Ok(Verdict::NotRun),
            (Past::Running, Some(intent)) if intent.opcode != request.opcode || !intent.known => {
                Ok(Verdict::Unknown)
            }
            (Past::Running, Some(intent)) => self.look_after(opcode, request, intent, claims, out),
        };
        verdict.unwrap_or(Verdict::Unknown)
    }

    /// What the reply said stands on the host; what it gave of the daemon's own is given again.
    fn give_anew(
        &self,
        opcode: Opcode,
        request: &Request<'_>,
        reply: &[u8],
        out: &mut [u8],
    ) -> Result<Verdict, Errno> {
        match opcode {
            Opcode::Mkdir | Opcode::Mknod | Opcode::Symlink | Opcode::Create | Opcode::Link => {
                let name = made_name(opcode, request)?;
                let (was, _) = abi::EntryOut::read_from_prefix(reply).map_err(|_| Errno::IO)?;
                let now = self.named(request.nodeid, name)?;
                // Another file may have the number by now.
                let latest = nanos(was.attr.ctime as i64, was.attr.ctimensec);
                if now.ino == 0 || now.born > latest {
                    return Ok(Verdict::Unknown);
                }
                self.give_made(opcode, request, name, now, out, |found| {
                    self.guest_ino(found.stat.dev, found.stat.ino) == was.attr.ino
                })
                .map(|given| given.unwrap_or(Verdict::Unknown))
            }
            // What it cut off is cut off, and may have been written since.
            Opcode::Open => {
                let mut open: abi::OpenIn = request.head()?;
                open.flags &= !(libc::O_TRUNC as u32);
                let again = Request { args: open.as_bytes(), ..*request };
                self.execute(&again, out).map(Verdict::Done)
            }
            _ => Ok(Verdict::NotRun),
        }
    }

    fn look_after(
        &self,
        opcode: Opcode,
        request: &Request<'_>,
        intent: &Intent,
        claims: &Claims,
        out: &mut [u8],
    ) -> Result<Verdict, Errno> {
        match opcode {
            Opcode::Mkdir | Opcode::Mknod | Opcode::Symlink | Opcode::Create => {
                self.was_made(opcode, request, intent, claims, out)
            }
            Opcode::Link => self.was_linked(request, intent, claims, out),
            Opcode::Unlink | Opcode::Rmdir => self.was_removed(request, intent),
            Opcode::Rename | Opcode::Rename2 => self.was_moved(opcode, request, intent),
            Opcode::Setxattr => self.was_set(request, intent),
            Opcode::Removexattr => {
                let (name, _) = xattrs::host_name(self, request.args)?;
                let gone = intent.size == 1 && !self.has_xattr(request.nodeid, &name)?;
                Ok(if gone { Verdict::Done(0) } else { Verdict::NotRun })
            }
            Opcode::Write => self.was_appended(request, intent, claims, out),
            _ => Ok(Verdict::NotRun),
        }
    }

    /// The name is there, and was not before: this request has made it, or one that nobody knows
    /// of. What differs from what was asked for is somebody else's.
    fn was_made(
        &self,
        opcode: Opcode,
        request: &Request<'_>,
        intent: &Intent,
        claims: &Claims,
        out: &mut [u8],
    ) -> Result<Verdict, Errno> {
        let name = made_name(opcode, request)?;
        let now = self.named(request.nodeid, name)?;
        // A file that is older was moved there. Only this host's clock can be compared.
        let older = self.local && now.born != 0 && now.born < intent.when;
        if now.ino == 0 || intent.target.ino != 0 || older {
            return Ok(Verdict::NotRun);
        }
        let given = self.give_made(opcode, request, name, now, out, |found| {
            self.is_as_asked(opcode, request, found) && claims.make(now.ino, now.born)
        });
        Ok(given?.unwrap_or(Verdict::NotRun))
    }

    fn is_as_asked(&self, opcode: Opcode, request: &Request<'_>, found: &Found) -> bool {
        let (stat, kind) = (&found.stat, found.stat.mode & libc::S_IFMT);
        let is = match opcode {
            Opcode::Mkdir => kind == libc::S_IFDIR,
            Opcode::Create => kind == libc::S_IFREG,
            Opcode::Mknod => request.head::<abi::MknodIn>().is_ok_and(|mknod| {
                let asked = match mknod.mode & libc::S_IFMT {
                    0 => libc::S_IFREG,
                    asked => asked,
                };
                let device = matches!(kind, libc::S_IFCHR | libc::S_IFBLK);
                kind == asked && (!device || stat.rdev == u64::from(mknod.rdev))
            }),
            Opcode::Symlink => {
                let target = name_first(request.args).and_then(|(_, rest)| text_first(rest));
                let now = self.backend.readlink(found.inode);
                kind == libc::S_IFLNK
                    && target.is_ok_and(|(target, _)| now.is_ok_and(|now| now == target.to_bytes()))
            }
            _ => false,
        };
        // A server may have ids of its own for whoever asks.
        is && (self.backend.squashes() || !self.local || self.is_of_caller(request, stat.uid))
    }

    fn is_of_caller(&self, request: &Request<'_>, uid: u32) -> bool {
        self.options.ids.users.to_host(request.uid) == Ok(uid)
    }

    /// Answers with the file at `name`, if it is still the one seen as `now` and `accept` says that
    /// it is the one.
    fn give_made(
        &self,
        opcode: Opcode,
        request: &Request<'_>,
        name: &CStr,
        now: Named,
        out: &mut [u8],
        accept: impl FnOnce(&Found) -> bool,
    ) -> Result<Option<Verdict>, Errno> {
        self.nodes.check_room()?;
        if opcode == Opcode::Create {
            self.handles.check_room()?;
        }
        let parent = self.nodes.find(request.nodeid)?;
        let found = self.backend.lookup(parent.inode()?, name)?;
        if found.stat.ino != now.ino || !accept(&found) {
            self.backend.forget(found.inode, 1);
            return Ok(None);
        }
        let len = self.reply_made(opcode, request, &found, (&parent, name), out)?;
        Ok(Some(Verdict::Done(len)))
    }

    fn reply_made(
        &self,
        opcode: Opcode,
        request: &Request<'_>,
        found: &Found,
        (parent, name): (&Node, &CStr),
        out: &mut [u8],
    ) -> Result<usize, Errno> {
        let (node, entry) = self.give(request, found, parent, name)?;
        if opcode != Opcode::Create {
            return put(out, &entry);
        }
        let id = node.id;
        let opened = io::open_made(self, request, node, found.inode, &entry, out);
        if opened.is_err() {
            self.forget(std::iter::once((id, 1)));
        }
        opened
    }

    fn was_linked(
        &self,
        request: &Request<'_>,
        intent: &Intent,
        claims: &Claims,
        out: &mut [u8],
    ) -> Result<Verdict, Errno> {
        let name = made_name(Opcode::Link, request)?;
        let now = self.named(request.nodeid, name)?;
        if intent.target.ino != 0 || now.ino != intent.other.ino {
            return Ok(Verdict::NotRun);
        }
        let given = self.give_made(Opcode::Link, request, name, now, out, |_| {
            claims.lock().linked.insert((request.nodeid, name.to_bytes().to_vec()))
        });
        Ok(given?.unwrap_or(Verdict::NotRun))
    }

    /// Gone, or another file has the name.
    fn was_removed(&self, request: &Request<'_>, intent: &Intent) -> Result<Verdict, Errno> {
        let before = intent.target;
        let now = self.named(request.nodeid, name_alone(request.args)?)?;
        let there = before.ino == 0 || now == before;
        Ok(if there { Verdict::NotRun } else { Verdict::Done(0) })
    }

    fn was_moved(
        &self,
        opcode: Opcode,
        request: &Request<'_>,
        intent: &Intent,
    ) -> Result<Verdict, Errno> {
        let (from, to) = (intent.target, intent.other);
        let Moved { newdir, flags, old, new } = Moved::of(opcode, request)?;
        let now = (self.named(request.nodeid, old)?, self.named(newdir, new)?);
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        let fails = match flags {
            libc::RENAME_EXCHANGE => to.ino == 0,
            libc::RENAME_NOREPLACE => to.ino != 0,
            _ => false,
        };
        // It failed, or is nothing to do; or nothing has moved.
        if fails || from.ino == 0 || from == to || now.0 == from {
            return Ok(Verdict::NotRun);
        }
        let done = if exchange { now == (to, from) } else { now.1 == from };
        if !done {
            return Ok(Verdict::Unknown);
        }
        let notes = self.notes_of(request);
        self.nodes.moved(&*self.nodes.find(newdir)?, new, notes);
        if exchange {
            self.nodes.moved(&*self.nodes.find(request.nodeid)?, old, notes);
        }
        Ok(Verdict::Done(0))
    }

    /// With XATTR_CREATE: there was none, and the one that is there has our value.
    fn was_set(&self, request: &Request<'_>, intent: &Intent) -> Result<Verdict, Errno> {
        let (_, rest): (abi::SetxattrIn, _) = request.head_rest()?;
        let (name, value) = xattrs::host_name(self, rest)?;
        if intent.size == 1 || !self.has_xattr(request.nodeid, &name)? {
            return Ok(Verdict::NotRun);
        }
        let now = self.xattr(request.nodeid, &name, XATTR_BYTES_MAX as u32)?;
        Ok(if now == *xattrs::host_value(self, &name, value)? {
            Verdict::Done(0)
        } else {
            Verdict::NotRun
        })
    }

    /// The file has grown by what was to be written, or by the first part of it, which the daemon
    /// was killed over: then the rest follows.
    fn was_appended(
        &self,
        request: &Request<'_>,
        intent: &Intent,
        claims: &Claims,
        out: &mut [u8],
    ) -> Result<Verdict, Errno> {
        self.open_named(Opcode::Write, request)?;
        let file = io::written(self, request)?;
        let data = io::payload(request)?;
        let seen = rustix::fs::fstat(&*file)?;
        let grown = (seen.st_size as u64).checked_sub(intent.size);
        let Some(grown) = grown.filter(|&grown| grown <= data.len() as u64) else {
            return Ok(Verdict::Unknown);
        };
        if grown == 0 {
            return Ok(Verdict::NotRun);
        }
        let reader = fdops::reopen(file.as_fd(), OFlags::RDONLY)?;
        let (there, rest) = data.split_at(grown as usize);
        let mut stored = vec![0; there.len()];
        let read = fdops::read_at(reader.as_fd(), intent.size, &mut stored)?;
        let ours = read == there.len() && stored == there;
        if !ours || !claims.lock().appended.insert((seen.st_ino, intent.size)) {
            return Ok(Verdict::Unknown);
        }
        if !rest.is_empty() {
            // Nothing that O_DIRECT asks of memory: the rest is seldom aligned.
            let end = fdops::reopen(file.as_fd(), OFlags::WRONLY | OFlags::APPEND)?;
            let n = fdops::write_all_at(end.as_fd(), intent.size + grown, rest, true)?;
            debug_assert_eq!(n, rest.len());
        }
        let size = data.len() as u32;
        put(out, &abi::WriteOut { size, padding: 0 }).map(Verdict::Done)
    }
}

/// For the log.
fn names_of(opcode: Opcode, request: &Request<'_>) -> String {
    let text = |name: &CStr| name.to_string_lossy().into_owned();
    match opcode {
        Opcode::Rename | Opcode::Rename2 => Moved::of(opcode, request)
            .map(|moved| format!("{} -> {}", text(moved.old), text(moved.new))),
        Opcode::Unlink | Opcode::Rmdir => name_alone(request.args).map(text),
        _ => made_name(opcode, request).map(text),
    }
    .unwrap_or_default()
}
