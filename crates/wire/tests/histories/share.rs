//! What a session does on its share: operations that tell whether they ran twice, and the lookups
//! and handles that they give.

use crate::host::Session;
use crate::link::{Fault, Record};
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::batch::Kind;
use ringfs_wire::restore::{Restore, Restores};
use ringfs_wire::table::Given;
use std::collections::{BTreeMap, BTreeSet};
use zerocopy::IntoBytes;

pub const EINTR: u32 = 4;
pub const EIO: u32 = 5;
pub const EEXIST: u32 = 17;

/// What outlives daemons: what was done, by whose session.
#[derive(Default)]
pub struct Truth {
    ran: BTreeMap<(u64, u32), u32>,
    /// Those that a daemon may not run again for want of knowledge.
    once: BTreeSet<u64>,
    made: BTreeSet<u64>,
}

impl Truth {
    fn runs(&mut self, session: u32, tag: u64) -> Result<(), Fault> {
        let ran = self.ran.entry((tag, session)).or_default();
        *ran += 1;
        match *ran {
            1 => Ok(()),
            n => Err(format!("{tag:x} ran {n} times in session {session}")),
        }
    }

    pub fn has_run_in(&self, session: u32, request: &Record) -> bool {
        self.ran.contains_key(&(word(&request.body, 0), session))
    }

    pub fn runs_once(&self, tag: u64) -> bool {
        self.once.contains(&tag)
    }

    /// In how many sessions it has run.
    pub fn runs_of(&self, tag: u64) -> usize {
        self.ran.range((tag, 0)..=(tag, u32::MAX)).count()
    }
}

/// Whether it has an intent.
pub fn runs_once(opcode: u32) -> bool {
    [Opcode::Write, Opcode::Mkdir, Opcode::Create].iter().any(|&once| once as u32 == opcode)
}

pub fn word(body: &[u8], n: usize) -> u64 {
    let bytes = body.get(n * 8..n * 8 + 8).and_then(|bytes| bytes.try_into().ok());
    u64::from_le_bytes(bytes.unwrap_or_default())
}

impl Session {
    pub fn give_back(&mut self, given: Given, planted: bool) -> Result<(), Fault> {
        if planted {
            return Ok(());
        }
        for id in given.nodes {
            self.forget(id, 1)?;
        }
        match given.handle {
            Some(fh) if !self.handles.remove(&fh) => {
                Err(format!("handle {fh} is given back twice"))
            }
            _ => Ok(()),
        }
    }

    fn forget(&mut self, id: u64, n: u64) -> Result<(), Fault> {
        let left = self.nodes.get(&id).and_then(|count| count.checked_sub(n));
        match left.ok_or_else(|| format!("node {id} is given back once too often"))? {
            0 => self.nodes.remove(&id),
            left => self.nodes.insert(id, left),
        };
        Ok(())
    }

    pub fn restore(&mut self, body: &[u8]) -> Result<(), Fault> {
        for entry in Restores::new(body) {
            if self.is_ready {
                return Err("RESTORE behind its end".into());
            }
            match entry.map_err(|error| error.to_string())? {
                Restore::Node { id, count, .. } => {
                    self.came.0 += 1;
                    if self.nodes.insert(id, count).is_some() {
                        return Err(format!("node {id} is restored twice"));
                    }
                }
                Restore::Handle { fh, .. } => {
                    self.came.1 += 1;
                    if !self.handles.insert(fh) {
                        return Err(format!("handle {fh} is restored twice"));
                    }
                }
                Restore::End(end) => {
                    if (end.nodes, end.handles) != self.came {
                        return Err("RESTORE has other totals".into());
                    }
                    (self.fh_max, self.is_ready) = (end.fh_max, true);
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, nodeid: u64, tag: u64) -> abi::EntryOut {
        *self.nodes.entry(nodeid).or_default() += 1;
        let mut entry = abi::EntryOut { nodeid, ..Default::default() };
        entry.attr.ino = tag;
        entry
    }

    fn open(&mut self, tag: u64) -> abi::OpenOut {
        self.fh_max += 1;
        self.handles.insert(self.fh_max);
        abi::OpenOut { fh: self.fh_max, open_flags: tag as u32, ..Default::default() }
    }

    /// Runs a request, or, where it was done before, gives again what it gave.
    pub fn perform(
        &mut self,
        request: &Record,
        truth: &mut Truth,
        is_done: bool,
    ) -> Result<(u32, Vec<u8>), Fault> {
        let (tag, arg) = (word(&request.body, 0), word(&request.body, 1));
        if request.header.kind == Kind::Forget as u8 {
            if !is_done {
                truth.runs(self.id, tag)?;
            }
            for n in 1..request.body.len() / 16 + 1 {
                let (id, count) = (word(&request.body, 2 * n - 1), word(&request.body, 2 * n));
                if id != 0 {
                    self.forget(id, count)?;
                }
            }
            return Ok((0, Vec::new()));
        }
        let opcode = Opcode::from_u32(request.header.code).ok_or("an unknown opcode")?;
        if !opcode.may_rerun() && !is_done {
            truth.runs(self.id, tag)?;
            truth.once.extend(Some(tag).filter(|_| runs_once(opcode as u32)));
        }
        let made = 1000 + (tag >> 32) * 100_000 + (tag & 0xffff);
        let mut body = Vec::new();
        match opcode {
            Opcode::Getattr | Opcode::Write => body.extend_from_slice(&tag.to_le_bytes()),
            Opcode::Mkdir | Opcode::Create => {
                if !is_done && !truth.made.insert(tag) {
                    return Ok((EEXIST, body));
                }
                body.extend_from_slice(self.entry(made, tag).as_bytes());
                if opcode == Opcode::Create {
                    body.extend_from_slice(self.open(tag).as_bytes());
                }
            }
            Opcode::Lookup => body.extend_from_slice(self.entry(2 + arg % 6, tag).as_bytes()),
            Opcode::Open => body.extend_from_slice(self.open(tag).as_bytes()),
            Opcode::Readdirplus => {
                for n in 0..arg % 4 {
                    let entry_out = self.entry(2 + (arg + n * n) % 6, tag);
                    let dirent = abi::Dirent { namelen: 1, ..Default::default() };
                    let plus = abi::DirentPlus { entry_out, dirent };
                    body.extend_from_slice(plus.as_bytes());
                    body.extend_from_slice(b"x\0\0\0\0\0\0\0");
                }
            }
            Opcode::Release => {
                if !self.handles.remove(&arg) {
                    return Err(format!("handle {arg} is not open"));
                }
            }
            other => return Err(format!("{other:?} is not of this test")),
        }
        Ok((0, body))
    }
}
