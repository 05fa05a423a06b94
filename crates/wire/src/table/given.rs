//! What a reply gives to the guest: lookups and open handles, each to be given back some day.
//!
//! Invariant: all of it is in the reply's own bytes, however they are cut off or damaged; reading
//! them changes nothing.

use crate::abi::{self, Opcode};
use zerocopy::FromBytes;

/// What a reply gives that must be given back some day.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// One lookup of each.
    pub nodes: Vec<u64>,
    /// An open file or directory.
    pub handle: Option<u64>,
}

impl Given {
    /// Reads a reply without error.
    pub fn by(opcode: u32, body: &[u8]) -> Given {
        let opened = |body: &[u8]| abi::OpenOut::read_from_prefix(body).ok().map(|(o, _)| o.fh);
        let mut given = Given::default();
        match Opcode::from_u32(opcode) {
            Some(
                Opcode::Lookup | Opcode::Symlink | Opcode::Mknod | Opcode::Mkdir | Opcode::Link,
            ) => given.entry(body),
            Some(Opcode::Create | Opcode::Tmpfile) => {
                given.entry(body);
                given.handle = body.get(size_of::<abi::EntryOut>()..).and_then(opened);
            }
            Some(Opcode::Open | Opcode::Opendir) => given.handle = opened(body),
            Some(Opcode::Readdirplus) => given.entries(body),
            Some(_) | None => {}
        }
        given
    }

    /// Node id 0 says that there is no such name.
    fn entry(&mut self, body: &[u8]) {
        let entry = abi::EntryOut::read_from_prefix(body).ok();
        self.nodes.extend(entry.map(|(entry, _)| entry.nodeid).filter(|&id| id != 0));
    }

    fn entries(&mut self, mut body: &[u8]) {
        while let Ok((plus, rest)) = abi::DirentPlus::read_from_prefix(body) {
            self.nodes.extend(Some(plus.entry_out.nodeid).filter(|&id| id != 0));
            let name = (plus.dirent.namelen as usize).next_multiple_of(8);
            body = rest.get(name..).unwrap_or_default();
        }
    }

    /// Nothing at all.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.handle.is_none()
    }
}
#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn what_a_reply_gives() {
        let check = |opcode: Opcode, body: &[u8], nodes: &[u64], handle: Option<u64>| {
            let given = Given::by(opcode as u32, body);
            assert_eq!((&given.nodes[..], given.handle), (nodes, handle), "{opcode:?}");
            for n in 0..body.len() {
                let _ = Given::by(opcode as u32, &body[..n]); // must not panic
            }
        };
        let entry = |nodeid| abi::EntryOut { nodeid, ..Default::default() }.as_bytes().to_vec();
        let opened = abi::OpenOut { fh: 5, ..Default::default() };
        let made = [&entry(3)[..], opened.as_bytes()].concat();
        check(Opcode::Lookup, &entry(3), &[3], None);
        check(Opcode::Lookup, &entry(0), &[], None);
        check(Opcode::Create, &made, &[3], Some(5));
        check(Opcode::Tmpfile, &made, &[3], Some(5));
        check(Opcode::Opendir, opened.as_bytes(), &[], Some(5));
        check(Opcode::Getattr, &made, &[], None);
        check(Opcode::Readdirplus, &[0xff; 400], &[u64::MAX], None);
    }
}
