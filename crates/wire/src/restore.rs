//! Bodies of NODE and RESTORE: what rebuilds a session on a daemon that does not know it.
//!
//! ```text
//! NODE, from the daemon: entries, each padded with zeros to a multiple of 8
//!  0       8            10       16
//!  | id    | recipe_len | 0 0 0  | recipe ...
//!
//! RESTORE, from the guest: entries of three kinds, each a multiple of 8
//!  0      1     2            4        8      16      24
//!  | kind | dir | recipe_len | flags  | id   | other | ...
//!   1 node:    0, length, 0;      node id, lookups that the guest has;   the recipe, zeros
//!   2 handle:  directory?, 0, flags of open(2);       fh, node id;       -
//!   3 end:     0, 0, 0;     nodes sent, handles sent;   highest node id, highest fh ever given
//! ```
//!
//! A recipe is what a daemon wrote and what a daemon reads; to the guest it is bytes. The guest
//! may lie about all of it: what is checked here is the layout, and that numbers leave a daemon
//! room to count on.

use crate::limits::{NODE_BODY_BYTES_MAX, RECIPE_BYTES_MAX, RECORD_ALIGN, RESTORE_BODY_BYTES_MAX};
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Node ids, handles and counts end here, so that a daemon can count on from any of them.
pub const NUMBER_MAX: u64 = i64::MAX as u64;
/// The root's node id: every session knows it, and nobody rebuilds it.
const ROOT: u64 = crate::abi::FUSE_ROOT_ID;

#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct NodeHead {
    id: u64,
    recipe_len: u16,
    reserved: [u8; 6],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct RestoreHead {
    kind: u8,
    directory: u8,
    recipe_len: u16,
    flags: u32,
    id: u64,
    other: u64,
}

const NODE: u8 = 1;
const HANDLE: u8 = 2;
const END: u8 = 3;

const _: () = assert!(size_of::<NodeHead>() == 16 && size_of::<RestoreHead>() == 24);

/// Why bytes are no NODE or RESTORE; all of them end the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RestoreError {
    /// It ends in the middle of an entry.
    #[error("the body ends in the middle of an entry")]
    Short,
    /// More than a body or a recipe may have.
    #[error("{0} bytes are more than a body or a recipe may have")]
    Long(usize),
    /// What must be 0 is not.
    #[error("reserved bytes that are not 0")]
    Reserved,
    /// No such kind of entry.
    #[error("unknown kind of entry {0}")]
    Kind(u8),
    /// The root's, 0, or beyond [`NUMBER_MAX`].
    #[error("number {0} cannot be an id, a handle or a count")]
    Number(u64),
}

/// What finds one node again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node<'a> {
    /// The node id.
    pub id: u64,
    /// Opaque to the guest, at most [`RECIPE_BYTES_MAX`] bytes; empty: nothing finds it.
    pub recipe: &'a [u8],
}

/// One entry of a RESTORE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restore<'a> {
    /// A node that the guest's kernel knows.
    Node {
        /// The node id.
        id: u64,
        /// How many lookups of it the guest has.
        count: u64,
        /// The last that NODE said of it.
        recipe: &'a [u8],
    },
    /// An open file or directory.
    Handle {
        /// The guest's number.
        fh: u64,
        /// Whose.
        node: u64,
        /// Those of the OPEN, CREATE or TMPFILE.
        flags: u32,
        /// From OPENDIR.
        directory: bool,
    },
    /// Nothing follows.
    End(End),
}

/// Totals, so that a part that is missing is noticed.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct End {
    /// Nodes before this.
    pub nodes: u64,
    /// Handles before this.
    pub handles: u64,
    /// The highest node id that the guest was ever given, forgotten ones too; 0: none.
    pub node_id_max: u64,
    /// The highest handle, likewise.
    pub fh_max: u64,
}

/// Appends an entry to a NODE's body; `write` appends the recipe. `false`, and nothing is changed,
/// where recipe or body would be too long.
pub fn push_node(body: &mut Vec<u8>, id: u64, write: impl FnOnce(&mut Vec<u8>)) -> bool {
    let start = body.len();
    let head = NodeHead { id, recipe_len: 0, reserved: [0; 6] };
    body.extend_from_slice(head.as_bytes());
    let recipe_at = body.len();
    write(body);
    let recipe_len = body.len() - recipe_at;
    let end = body.len().next_multiple_of(RECORD_ALIGN);
    if recipe_len > RECIPE_BYTES_MAX || end > NODE_BODY_BYTES_MAX {
        body.truncate(start);
        return false;
    }
    body.resize(end, 0);
    body[start + 8..start + 10].copy_from_slice(&(recipe_len as u16).to_le_bytes());
    true
}

/// Cuts a body that [`push_node`] made into several of at most `bytes_max` each, for a sender whose
/// batches have less room. No entry is cut: one alone may be longer, by the bound of a recipe.
pub fn split_nodes(body: &[u8], bytes_max: usize) -> impl Iterator<Item = &[u8]> {
    let mut rest = body;
    std::iter::from_fn(move || {
        let mut nodes = Nodes::new(rest);
        let mut end = 0;
        while let Some(Ok(_)) = nodes.next() {
            let here = rest.len() - nodes.rest.len();
            if here > bytes_max && end > 0 {
                break;
            }
            end = here;
        }
        let (first, behind) = rest.split_at(end);
        rest = behind;
        (end > 0).then_some(first)
    })
}

/// Appends an entry to a RESTORE's body. `false`, and nothing is changed, where it is full (or the
/// recipe is none): what is there is to be sent first.
pub fn push_restore(body: &mut Vec<u8>, entry: &Restore<'_>) -> bool {
    let (head, rest, tail) = match *entry {
        Restore::Node { id, count, recipe } => {
            let recipe_len = recipe.len() as u16;
            let head = RestoreHead { kind: NODE, recipe_len, id, other: count, ..head() };
            (head, recipe, [0; 2])
        }
        Restore::Handle { fh, node, flags, directory } => {
            let directory = u8::from(directory);
            let head =
                RestoreHead { kind: HANDLE, directory, flags, id: fh, other: node, ..head() };
            (head, &[][..], [0; 2])
        }
        Restore::End(end) => {
            let head = RestoreHead { kind: END, id: end.nodes, other: end.handles, ..head() };
            (head, &[][..], [end.node_id_max, end.fh_max])
        }
    };
    let tail = if head.kind == END { tail.as_bytes() } else { &[] };
    let len = size_of::<RestoreHead>() + rest.len().next_multiple_of(RECORD_ALIGN) + tail.len();
    if rest.len() > RECIPE_BYTES_MAX || body.len() + len > RESTORE_BODY_BYTES_MAX {
        return false;
    }
    let end = body.len() + len;
    body.extend_from_slice(head.as_bytes());
    body.extend_from_slice(rest);
    body.extend_from_slice(tail);
    body.resize(end, 0);
    true
}

fn head() -> RestoreHead {
    RestoreHead::default()
}

/// Walks a NODE's body; an error is the last item.
#[derive(Clone, Debug)]
pub struct Nodes<'a> {
    rest: &'a [u8],
}

impl<'a> Nodes<'a> {
    /// Over a record's body.
    pub const fn new(body: &'a [u8]) -> Nodes<'a> {
        Nodes { rest: body }
    }

    fn take(&mut self) -> Result<Node<'a>, RestoreError> {
        bounded(self.rest, NODE_BODY_BYTES_MAX)?;
        let (head, rest) =
            NodeHead::read_from_prefix(self.rest).map_err(|_| RestoreError::Short)?;
        if head.reserved != [0; 6] {
            return Err(RestoreError::Reserved);
        }
        checked(head.id, ROOT + 1)?;
        let (recipe, rest) = recipe(rest, head.recipe_len)?;
        self.rest = rest;
        Ok(Node { id: head.id, recipe })
    }
}

impl<'a> Iterator for Nodes<'a> {
    type Item = Result<Node<'a>, RestoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = (!self.rest.is_empty()).then(|| self.take());
        if matches!(entry, Some(Err(_))) {
            self.rest = &[];
        }
        entry
    }
}

/// Walks a RESTORE's body; an error is the last item.
#[derive(Clone, Debug)]
pub struct Restores<'a> {
    rest: &'a [u8],
}

impl<'a> Restores<'a> {
    /// Over a record's body.
    pub const fn new(body: &'a [u8]) -> Restores<'a> {
        Restores { rest: body }
    }

    fn take(&mut self) -> Result<Restore<'a>, RestoreError> {
        bounded(self.rest, RESTORE_BODY_BYTES_MAX)?;
        let (head, rest) =
            RestoreHead::read_from_prefix(self.rest).map_err(|_| RestoreError::Short)?;
        let RestoreHead { kind, directory, recipe_len, flags, id, other } = head;
        let zero = match kind {
            NODE => directory == 0 && flags == 0,
            HANDLE => directory <= 1 && recipe_len == 0,
            END => directory == 0 && recipe_len == 0 && flags == 0,
            unknown => return Err(RestoreError::Kind(unknown)),
        };
        if !zero {
            return Err(RestoreError::Reserved);
        }
        let (entry, rest) = match kind {
            NODE => {
                checked(id, ROOT + 1)?;
                checked(other, 1)?;
                let (recipe, rest) = recipe(rest, recipe_len)?;
                (Restore::Node { id, count: other, recipe }, rest)
            }
            HANDLE => {
                checked(id, 1)?;
                checked(other, ROOT)?;
                let directory = directory == 1;
                (Restore::Handle { fh: id, node: other, flags, directory }, rest)
            }
            _ => {
                let (tail, rest) =
                    <[u64; 2]>::read_from_prefix(rest).map_err(|_| RestoreError::Short)?;
                let [node_id_max, fh_max] = tail;
                checked(node_id_max, 0)?;
                checked(fh_max, 0)?;
                let end = End { nodes: id, handles: other, node_id_max, fh_max };
                (Restore::End(end), rest)
            }
        };
        self.rest = rest;
        Ok(entry)
    }
}

impl<'a> Iterator for Restores<'a> {
    type Item = Result<Restore<'a>, RestoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = (!self.rest.is_empty()).then(|| self.take());
        if matches!(entry, Some(Err(_))) {
            self.rest = &[];
        }
        entry
    }
}

fn bounded(body: &[u8], most: usize) -> Result<(), RestoreError> {
    if body.len() > most { Err(RestoreError::Long(body.len())) } else { Ok(()) }
}

fn checked(number: u64, least: u64) -> Result<(), RestoreError> {
    let good = (least..=NUMBER_MAX).contains(&number);
    if good { Ok(()) } else { Err(RestoreError::Number(number)) }
}

/// A recipe and what follows its padding.
fn recipe(rest: &[u8], len: u16) -> Result<(&[u8], &[u8]), RestoreError> {
    let len = usize::from(len);
    if len > RECIPE_BYTES_MAX {
        return Err(RestoreError::Long(len));
    }
    let padded = rest.split_at_checked(len.next_multiple_of(RECORD_ALIGN));
    let (padded, rest) = padded.ok_or(RestoreError::Short)?;
    let (recipe, padding) = padded.split_at(len);
    if padding.iter().any(|&byte| byte != 0) {
        return Err(RestoreError::Reserved);
    }
    Ok((recipe, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    const END_MARK: End = End { nodes: 2, handles: 1, node_id_max: 9, fh_max: 7 };

    fn restores() -> Vec<Restore<'static>> {
        vec![
            Restore::Node { id: 2, count: 3, recipe: b"abc" },
            Restore::Node { id: NUMBER_MAX, count: 1, recipe: b"" },
            Restore::Handle { fh: 7, node: 2, flags: 0x8002, directory: false },
            Restore::Handle { fh: 1, node: 1, flags: 0, directory: true },
            Restore::End(END_MARK),
        ]
    }

    fn restore_body() -> Vec<u8> {
        let mut body = Vec::new();
        assert!(restores().iter().all(|entry| push_restore(&mut body, entry)));
        body
    }

    #[test]
    fn golden_bytes_of_node() {
        let mut body = Vec::new();
        assert!(push_node(&mut body, 0x0102, |out| out.extend(b"recipe...")));
        assert!(push_node(&mut body, 3, |_| ()));
        let golden = [
            "02010000000000000900000000000000", // id, 9 bytes
            "7265636970652e2e2e00000000000000", // padded to 16
            "03000000000000000000000000000000",
        ];
        assert_eq!(hex(&body), golden.concat());
        let read: Result<Vec<_>, _> = Nodes::new(&body).collect();
        let expected = [Node { id: 0x0102, recipe: b"recipe..." }, Node { id: 3, recipe: b"" }];
        assert_eq!(read.as_deref(), Ok(&expected[..]));
    }

    #[test]
    fn a_long_body_is_cut_between_entries() {
        let mut body = Vec::new();
        let mut id = 2;
        while push_node(&mut body, id, |out| out.resize(out.len() + id as usize % 300, 1)) {
            id += 1;
        }
        let all: Vec<_> = Nodes::new(&body).map(|node| node.expect("ours").id).collect();
        for bytes_max in [1, 16, 1_000, 32 << 10, usize::MAX] {
            let parts: Vec<_> = split_nodes(&body, bytes_max).collect();
            assert_eq!(parts.concat(), body);
            let ids: Vec<_> = parts.iter().flat_map(|part| Nodes::new(part)).collect();
            assert!(
                ids.iter().map(|node| node.map(|node| node.id)).eq(all.iter().map(|&id| Ok(id)))
            );
            let fits = |part: &&[u8]| part.len() <= bytes_max || Nodes::new(part).count() == 1;
            assert!(parts.iter().all(fits), "{bytes_max}");
        }
        assert_eq!(split_nodes(&[], 100).count(), 0);
        assert_eq!(split_nodes(&[1; 100], 100).count(), 0, "not ours");
    }

    #[test]
    fn golden_bytes_of_restore() {
        let golden = [
            "0100030000000000020000000000000003000000000000006162630000000000",
            "0100000000000000ffffffffffffff7f0100000000000000",
            "020000000280000007000000000000000200000000000000",
            "020100000000000001000000000000000100000000000000",
            "03000000000000000200000000000000010000000000000009000000000000000700000000000000",
        ];
        assert_eq!(hex(&restore_body()), golden.concat());
        let body = restore_body();
        let read: Result<Vec<_>, _> = Restores::new(&body).collect();
        assert_eq!(read, Ok(restores()));
    }

    #[test]
    fn what_is_damaged_is_refused_or_means_something_else() {
        let body = restore_body();
        for n in 1..body.len() {
            let cut: Result<Vec<_>, _> = Restores::new(&body[..n]).collect();
            assert!(cut.is_err() || cut.is_ok_and(|all| all.len() < restores().len()), "{n}");
        }
        for bit in 0..body.len() * 8 {
            let mut bad = body.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let read: Result<Vec<_>, _> = Restores::new(&bad).collect();
            assert_ne!(read, Ok(restores()), "bit {bit} has no meaning");
        }
    }

    #[test]
    fn numbers_and_lengths_have_bounds() {
        let check = |entry: Restore<'_>, error| {
            let mut body = Vec::new();
            assert!(push_restore(&mut body, &entry));
            assert_eq!(Restores::new(&body).next(), Some(Err(error)));
        };
        let (recipe, number) = (&[][..], RestoreError::Number);
        for id in [0, 1, NUMBER_MAX + 1, u64::MAX] {
            check(Restore::Node { id, count: 1, recipe }, number(id));
        }
        for count in [0, NUMBER_MAX + 1, u64::MAX] {
            check(Restore::Node { id: 2, count, recipe }, number(count));
        }
        let handle = |fh, node| Restore::Handle { fh, node, flags: 0, directory: false };
        check(handle(0, 1), number(0));
        check(handle(u64::MAX, 1), number(u64::MAX));
        check(handle(1, 0), number(0));
        check(Restore::End(End { fh_max: u64::MAX, ..END_MARK }), number(u64::MAX));

        let long = vec![0; RECIPE_BYTES_MAX + 1];
        let mut body = Vec::new();
        assert!(!push_restore(&mut body, &Restore::Node { id: 2, count: 1, recipe: &long }));
        assert!(!push_node(&mut body, 2, |out| out.extend(&long)));
        assert!(body.is_empty());
        let most = Restore::Node { id: 2, count: 1, recipe: &long[1..] };
        while push_restore(&mut body, &most) {}
        assert!(body.len() <= RESTORE_BODY_BYTES_MAX);
        assert!(body.len() + RECIPE_BYTES_MAX + 32 > RESTORE_BODY_BYTES_MAX);
        assert!(Restores::new(&body).all(|entry| entry == Ok(most)));
        body.resize(RESTORE_BODY_BYTES_MAX + 1, 0);
        let long = RestoreError::Long(RESTORE_BODY_BYTES_MAX + 1);
        assert_eq!(Restores::new(&body).next(), Some(Err(long)));
    }
}
