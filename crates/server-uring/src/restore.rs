//! A session that another daemon had: its nodes and open files, put down as the guest says.
//!
//! Nothing is looked for before it is used. A node is put down cold (cold.rs) under the id that
//! the guest knows, a handle as what it was opened with; each fails alone, with ESTALE. So a
//! restore of any size costs memory and no system call.
//!
//! All of it is the guest's word. A recipe leads nowhere that a LOOKUP would not lead: import.rs
//! proves by a walk from the share's root that what it found lies there, whatever handle, name or
//! number was forged; an open asks no more rights than an OPEN has. Ids that are given later are
//! beyond all that were restored.

use ringfs_wire::abi::{self, Opcode, fattr};
use ringfs_wire::restore::{End, Restore, RestoreError, Restores};
use rustix::io::Errno;
use zerocopy::FromBytes;

use crate::cold::Room;
use crate::dispatch::{Request, name_pair};
use crate::fs::Fs;
use crate::handles::{Handle, Unopened};
use crate::import::Recipe;
use crate::nodes::Nodes;
use crate::notes::Notes;
use crate::ops::{dirs, init, io};

/// Why a session cannot be taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TakeOverError {
    /// No RESTORE.
    #[error("malformed RESTORE: {0}")]
    Malformed(#[from] RestoreError),
    /// Of a session that is not rebuilt.
    #[error("a RESTORE that was not asked for")]
    Uncalled,
    /// Of a session that ended meanwhile: the guest has done nothing wrong.
    #[error("a RESTORE for a session that was given up")]
    GivenUp,
    /// An id or a handle twice.
    #[error("RESTORE names {0} twice")]
    Twice(u64),
    /// More than a session may have.
    #[error("RESTORE has more nodes or handles than a session may have")]
    TooMany,
    /// Of all sessions together.
    #[error("the daemon has no memory for more nodes that are not open")]
    NoMemory,
    /// Totals that are not what came, or entries behind the last one.
    #[error("RESTORE has {came:?} and says {said:?}")]
    Totals {
        /// Nodes and handles that came.
        came: (u64, u64),
        /// What the end mark says.
        said: (u64, u64),
    },
}

/// How far the RESTORE records of one session have come.
#[derive(Clone, Copy, Debug, Default)]
pub struct Restoring {
    nodes: u64,
    handles: u64,
    complete: bool,
}

impl Restoring {
    /// Takes one record's body. `true` with the last one.
    ///
    /// # Errors
    /// See [`TakeOverError`]; the session is of no use then.
    pub fn record(&mut self, fs: &Fs, body: &[u8]) -> Result<bool, TakeOverError> {
        for entry in Restores::new(body) {
            let entry = entry?;
            if self.complete {
                return Err(self.totals((self.nodes, self.handles)));
            }
            match entry {
                Restore::Node { id, count, recipe } => {
                    fs.restore_node(id, count, recipe).map_err(|errno| refused(id, errno))?;
                    self.nodes += 1;
                }
                Restore::Handle { fh, node, flags, directory } => {
                    let was = Unopened { node, flags, directory };
                    fs.handles.restore(fh, was).map_err(|errno| refused(fh, errno))?;
                    self.handles += 1;
                }
                Restore::End(end) => self.end(fs, end)?,
            }
        }
        Ok(self.complete)
    }

    fn end(&mut self, fs: &Fs, end: End) -> Result<(), TakeOverError> {
        if (end.nodes, end.handles) != (self.nodes, self.handles) {
            return Err(self.totals((end.nodes, end.handles)));
        }
        fs.nodes.count_on_from(end.node_id_max);
        fs.handles.count_on_from(end.fh_max);
        self.complete = true;
        Ok(())
    }

    fn totals(&self, said: (u64, u64)) -> TakeOverError {
        TakeOverError::Totals { came: (self.nodes, self.handles), said }
    }
}

fn refused(number: u64, errno: Errno) -> TakeOverError {
    match errno {
        Errno::EXIST => TakeOverError::Twice(number),
        Errno::NOMEM => TakeOverError::NoMemory,
        _ => TakeOverError::TooMany,
    }
}

impl Nodes {
    /// Puts a node down cold, under an id that is neither 0 nor the root's, with `count` lookups,
    /// at least one. A recipe that means nothing, or that there is no room for, makes a node that
    /// is known and stale.
    ///
    /// # Errors
    /// `ENFILE`: too many nodes. `EEXIST`: the id is known. `ENOMEM`: not even for that.
    pub(crate) fn restore(&self, id: u64, count: u64, recipe: &[u8]) -> Result<(), Errno> {
        self.check_count()?;
        let ids = self.lock_id(id);
        if ids.get(id).is_some() || self.cold.contains(id) {
            return Err(Errno::EXIST);
        }
        let room = self.cold.room();
        if room == Room::Nothing {
            return Err(Errno::NOMEM);
        }
        let is_kept = match Recipe::unpack(recipe) {
            Some(mut recipe) if recipe.proves_identity() && room == Room::Whole => {
                recipe.mount = self.root.identity_now(recipe.mount);
                self.cold.insert_told(id, count, &recipe)
            }
            Some(_) | None => self.cold.insert_lost(id, count),
        };
        if !is_kept {
            return Err(Errno::NOMEM);
        }
        self.count_on_from(id);
        Ok(())
    }
}

impl Fs {
    /// Puts down a node that the guest has from another daemon; see [`Restoring::record`], which
    /// has checked the numbers.
    ///
    /// # Errors
    /// `ENFILE`, `EEXIST`, `ENOMEM`.
    pub fn restore_node(&self, id: u64, count: u64, recipe: &[u8]) -> Result<(), Errno> {
        if id <= abi::FUSE_ROOT_ID {
            return Err(Errno::EXIST);
        }
        self.nodes.restore(id, count, recipe)
    }

    /// Nodes that are cold now, for [`Fs::warm`].
    pub fn cold_nodes(&self) -> Vec<u64> {
        self.nodes.cold.findable()
    }

    /// Takes in some of these nodes before they are used; `false` when that is over: all were
    /// tried, or fds are no longer plenty. For the pool, a slice at a time, after a restore: while
    /// any node is cold, what changes names has to look for it. `ids` are this session's own.
    pub fn warm(&self, ids: &mut Vec<u64>, most: usize) -> bool {
        self.nodes.load_some(ids, most)
    }

    /// Puts down a handle that the guest has from another daemon: opened at its first use.
    ///
    /// # Errors
    /// `ENFILE`, `EEXIST`.
    pub fn restore_handle(&self, fh: u64, was: Unopened) -> Result<(), Errno> {
        self.handles.restore(fh, was)
    }

    /// Goes by the INIT answer that another daemon gave: the guest's kernel asks once a mount.
    ///
    /// # Errors
    /// The name of the first field that cannot be served.
    pub fn serve_init(&self, init: &abi::InitOut) -> Result<(), &'static str> {
        init::serve(self, init)
    }

    /// Notes again what the lost reply to this request had noted: `reply` is its body, which is
    /// sent again. For those that run again it is not needed: what they give is new again.
    pub fn note_again(&self, request: &Request<'_>, reply: &[u8], notes: &Notes) {
        let Some(opcode) = Opcode::from_u32(request.opcode) else { return };
        if !self.options.recipes {
            return;
        }
        match gives(opcode) {
            Gives::Nothing => {}
            Gives::Entry => {
                let Ok((entry, _)) = abi::EntryOut::read_from_prefix(reply) else { return };
                if let Some(recipe) = self.nodes.cold.recipe(entry.nodeid) {
                    notes.push(entry.nodeid, |out| out.extend_from_slice(&recipe.pack()));
                    return;
                }
                let Some(node) = self.nodes.find_resident(entry.nodeid) else { return };
                let place = node.place();
                let Some(parent) = self.nodes.find_resident(place.parent) else { return };
                self.nodes.moved(&parent, &place.name, Some(notes));
            }
            Gives::Moves { head, exchange } => {
                let Some((args, newdir)) = request.args.get(head..).zip(word(request.args, 0))
                else {
                    return;
                };
                let Ok((old, new)) = name_pair(args) else { return };
                let moved = |dir: u64, name| {
                    let Some(dir) = self.nodes.find_resident(dir) else { return };
                    self.nodes.moved(&dir, name, Some(notes));
                };
                moved(newdir, new);
                if exchange && word(request.args, 8).is_some_and(|flags| flags != 0) {
                    moved(request.nodeid, old);
                }
            }
        }
    }

    /// True for a request with a handle that is to be opened first, which may take a while.
    pub(crate) fn names_unopened(&self, opcode: Opcode, request: &Request<'_>) -> bool {
        self.handles.has_unopened()
            && handles_named(opcode, request)
                .into_iter()
                .flatten()
                .any(|fh| self.handles.unopened(fh).is_some())
    }

    /// Opens what a request names and a daemon before this one had open.
    ///
    /// # Errors
    /// What says nothing about the file: `ENFILE`, `ENOMEM`, ...; the next use tries again. A file
    /// that cannot be opened is lost for good, and its handle alone says so.
    pub(crate) fn open_named(&self, opcode: Opcode, request: &Request<'_>) -> Result<(), Errno> {
        if !self.handles.has_unopened() {
            return Ok(());
        }
        for fh in handles_named(opcode, request).into_iter().flatten() {
            let Some(was) = self.handles.unopened(fh) else { continue };
            let opened = self.nodes.check_fds().and_then(|()| self.open_as(was));
            match opened {
                Ok(handle) => self.handles.opened(fh, handle),
                Err(
                    passing @ (Errno::NFILE
                    | Errno::MFILE
                    | Errno::NOMEM
                    | Errno::INTR
                    | Errno::AGAIN
                    | Errno::IO),
                ) => return Err(passing),
                Err(errno) => {
                    tracing::debug!(fh, node = was.node, %errno, "a handle is lost");
                    self.handles.opened(fh, Handle::Lost(was));
                }
            }
        }
        Ok(())
    }

    fn open_as(&self, was: Unopened) -> Result<Handle, Errno> {
        match was.directory {
            true => dirs::open_dir(self, was.node),
            false => io::open_again(self, was.node, was.flags),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..)?.first_chunk::<8>()?;
    Some(u64::from_le_bytes(*bytes))
}

/// Handles for which a request needs an open file. RELEASE needs none.
fn handles_named(opcode: Opcode, request: &Request<'_>) -> [Option<u64>; 2] {
    use Opcode as Op;
    let args = request.args;
    let behind = |flag: u32| {
        let asked = args.first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes) & flag != 0);
        [word(args, 8).filter(|_| asked == Some(true)), None]
    };
    match opcode {
        Op::Read | Op::Write | Op::Fsync | Op::Flush | Op::Fallocate | Op::Lseek => {
            [word(args, 0), None]
        }
        Op::Readdir | Op::Readdirplus | Op::Fsyncdir => [word(args, 0), None],
        Op::CopyFileRange | Op::CopyFileRange64 => [word(args, 0), word(args, 24)],
        Op::Getattr | Op::Statx => behind(abi::FUSE_GETATTR_FH),
        Op::Setattr => behind(fattr::FH),
        Op::Release | Op::Releasedir => [None; 2],
        Op::Lookup | Op::Forget | Op::BatchForget | Op::Access | Op::Statfs | Op::Readlink => {
            [None; 2]
        }
        Op::Symlink | Op::Mknod | Op::Mkdir | Op::Unlink | Op::Rmdir | Op::Rename => [None; 2],
        Op::Rename2 | Op::Link | Op::Open | Op::Create | Op::Tmpfile | Op::Opendir => [None; 2],
        Op::Setxattr | Op::Getxattr | Op::Listxattr | Op::Removexattr | Op::Syncfs => [None; 2],
        Op::Init | Op::Destroy | Op::Interrupt | Op::NotifyReply | Op::Getlk => [None; 2],
        Op::Setlk | Op::Setlkw | Op::Bmap | Op::Poll | Op::Ioctl => [None; 2],
        Op::Setupmapping | Op::Removemapping => [None; 2],
    }
}

/// What a reply that is kept can have noted.
enum Gives {
    Nothing,
    /// It begins with an entry.
    Entry,
    /// It moved what is named behind `head` bytes of arguments.
    Moves {
        head: usize,
        exchange: bool,
    },
}

fn gives(opcode: Opcode) -> Gives {
    use Opcode as Op;
    match opcode {
        Op::Lookup | Op::Symlink | Op::Mknod | Op::Mkdir | Op::Link | Op::Create => Gives::Entry,
        Op::Rename => Gives::Moves { head: size_of::<abi::RenameIn>(), exchange: false },
        Op::Rename2 => Gives::Moves { head: size_of::<abi::Rename2In>(), exchange: true },
        // No name leads to it.
        Op::Tmpfile => Gives::Nothing,
        Op::Read | Op::Write | Op::Fsync | Op::Flush | Op::Fallocate | Op::Lseek => Gives::Nothing,
        Op::Readdir | Op::Readdirplus | Op::Fsyncdir | Op::Opendir => Gives::Nothing,
        Op::CopyFileRange | Op::CopyFileRange64 | Op::Getattr | Op::Statx => Gives::Nothing,
        Op::Setattr | Op::Release | Op::Releasedir | Op::Unlink | Op::Rmdir => Gives::Nothing,
        Op::Forget | Op::BatchForget | Op::Access | Op::Statfs | Op::Readlink => Gives::Nothing,
        Op::Open | Op::Setxattr | Op::Getxattr | Op::Listxattr | Op::Removexattr => Gives::Nothing,
        Op::Syncfs | Op::Init | Op::Destroy | Op::Interrupt | Op::NotifyReply => Gives::Nothing,
        Op::Getlk | Op::Setlk | Op::Setlkw | Op::Bmap | Op::Poll | Op::Ioctl => Gives::Nothing,
        Op::Setupmapping | Op::Removemapping => Gives::Nothing,
    }
}
