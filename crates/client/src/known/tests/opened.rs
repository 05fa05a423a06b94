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
    known.hear(&node(8, b"of 8")).expect("a NODE");
    assert!(!is_unopened(&known, 8), "the kernel has not got it yet");
    answer(&known, Setattr, Asked::new(7, fattr::MODE.as_bytes()), 0, &[]);
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
    check(|known| answer(known, Setattr, Asked::new(7, fattr::SIZE.as_bytes()), 0, &[]));
    check(|known| answer(known, Setattr, Asked::new(7, fattr::SIZE.as_bytes()), 5, &[]));
    assert!(!is_unopened(&Known::new(false), 7));
}
