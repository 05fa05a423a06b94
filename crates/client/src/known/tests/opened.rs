//! Whose pages the kernel cannot have yet.

use super::*;
use ringfs_wire::abi::fattr;

/// Whether its pages may be written.
fn is_unopened(known: &Known, node: u64) -> bool {
    let mut is_done = false;
    known.unless_opened(node, || is_done = true);
    is_done
}

#[test]
fn pages_are_written_of_nodes_that_no_open_was_answered_of() {
    use Opcode::*;
    let known = Known::new(true);
    assert!(!is_unopened(&known, 7), "not known");
    answer(&known, Lookup, Asked::new(1, &[]), 0, &entry(7));
    assert!(is_unopened(&known, 7) && is_unopened(&known, 7));
    answer(&known, Lookup, Asked::new(1, &[]), 0, &entry(7));
    assert!(is_unopened(&known, 7), "looked up again");
    let link = Attr { mode: 0o120777, ..attr() };
    let link = EntryOut { nodeid: 9, attr: link, ..EntryOut::default() };
    answer(&known, Lookup, Asked::new(1, &[]), 0, link.as_bytes());
    assert!(!is_unopened(&known, 9), "a READLINK may have its page");
    list(&known, 4096, &listing(&[("a", 11)]));
    assert!(is_unopened(&known, 11));
    known.hear(&node(8, b"of 8")).expect("a NODE");
    assert!(!is_unopened(&known, 8), "the kernel has not got it yet");
    known.is_changed(&Asked::new(7, fattr::MODE.as_bytes()));
    answer(&known, Open, Asked::new(7, &[]), 13, &[]);
    assert!(is_unopened(&known, 7), "no page is read or changed by these");
    let check = |change: fn(&Known)| {
        let known = Known::new(true);
        answer(&known, Lookup, Asked::new(1, &[]), 0, &entry(7));
        answer(&known, Lookup, Asked::new(1, &[]), 0, &entry(8));
        change(&known);
        assert!(!is_unopened(&known, 7) && is_unopened(&known, 8));
    };
    check(|known| open(known, Open, 7, OFlags::RDONLY, 3));
    check(|known| {
        open(known, Open, 7, OFlags::WRONLY, 3);
        release(known, Release, 3, 0);
    });
    check(|known| answer(known, Create, Asked::new(1, &[]), 0, &[entry(7), opened(3)].concat()));
    check(|known| known.is_changed(&Asked::new(7, (fattr::SIZE | fattr::FH).as_bytes())));
    // Given back and looked up again by its next name: the kernel has another inode of it.
    let known = Known::new(true);
    known.hear(&node(7, b"of 7")).expect("a NODE");
    answer(&known, Lookup, Asked::new(1, &[]), 0, &entry(7));
    open(&known, Open, 7, OFlags::RDONLY, 3);
    forget(&known, &[(7, 1)]);
    answer(&known, Lookup, Asked::new(1, &[]), 0, &entry(7));
    assert!(is_unopened(&known, 7));
    assert!(!is_unopened(&Known::new(false), 7));
}

#[test]
fn what_a_client_before_has_answered_is_not_known() {
    let (keep, known) = kept();
    answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(7));
    assert!(is_unopened(&known, 7));
    let (_keep, known) = taken_over(&keep);
    assert!(!is_unopened(&known, 7));
    answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(8));
    assert!(is_unopened(&known, 8), "new to both");
}

#[test]
fn a_node_that_found_no_room_may_be_open() {
    let mut shard = Shard::new(Keyed::new());
    let beyond = 2 + NODES_PER_SHARD_MAX as u64;
    let give = |shard: &mut Shard, id| {
        shard.give(Given { id, is_file: true }, 1);
        shard.nodes.get(&id).map(|node| node.opened)
    };
    assert!((2..beyond).all(|id| give(&mut shard, id) == Some(false)));
    assert_eq!(give(&mut shard, beyond), None);
    (2..4).for_each(|id| shard.forget(id, 1, 0, 2));
    // Looked up again, and it may have been opened meanwhile; nobody can tell which ones these are.
    assert_eq!([beyond, beyond + 1].map(|id| give(&mut shard, id)), [Some(true); 2]);
}
