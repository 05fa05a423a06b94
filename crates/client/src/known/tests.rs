//! Tests of what is known.

use super::asked::NAME_BYTES_MAX;
use super::shard::{
    EARLY_PER_SHARD_MAX, EARLY_TURNS, HANDLES_PER_SHARD_MAX, LATE_PER_SHARD_MAX,
    NODES_PER_SHARD_MAX, SMALL_TABLE,
};
use super::*;
use crate::keep::Keep;
use ringfs_wire::abi::{
    Attr, CreateIn, Dirent, DirentPlus, FUSE_WRITE_CACHE, OpenIn, ReadIn, ReleaseIn, WriteIn,
};
use ringfs_wire::restore::{Restores, push_node};
use rustix::fs::OFlags;
use std::collections::BTreeMap;
use std::time::Instant;
use zerocopy::IntoBytes;

mod opened;

type Told = (BTreeMap<u64, (u64, Vec<u8>)>, BTreeMap<u64, Handle>, End);

/// What a daemon would be told.
fn told(known: &Known) -> Told {
    let (mut nodes, mut handles, mut end) = (BTreeMap::new(), BTreeMap::new(), None);
    let restored = known.restore(|body| {
        for entry in Restores::new(body) {
            assert_eq!(end, None, "the end mark is the last");
            match entry.expect("well formed") {
                Restore::Node { id, count, recipe } => {
                    assert_eq!(nodes.insert(id, (count, recipe.to_vec())), None);
                }
                Restore::Handle { fh, node, flags, directory } => {
                    assert_eq!(
                        handles.insert(fh, Handle { node, flags, directory, doubted: false }),
                        None
                    );
                }
                Restore::End(mark) => end = Some(mark),
            }
        }
        Ok::<(), ()>(())
    });
    let (restored, end) = (restored.expect("sent"), end.expect("an end mark"));
    assert_eq!((end.nodes, end.handles), (nodes.len() as u64, handles.len() as u64));
    assert_eq!((end.nodes, end.handles), (restored.nodes, restored.handles));
    let lost = nodes.values().filter(|(_, recipe)| recipe.is_empty()).count();
    assert_eq!(restored.nodes_lost, lost as u64);
    (nodes, handles, end)
}

fn counts(known: &Known) -> Vec<(u64, u64)> {
    told(known).0.into_iter().map(|(id, (count, _))| (id, count)).collect()
}

fn attr() -> Attr {
    Attr { mode: 0o100644, ..Attr::default() }
}

fn entry(nodeid: u64) -> Vec<u8> {
    EntryOut { nodeid, attr: attr(), ..EntryOut::default() }.as_bytes().to_vec()
}

fn opened(fh: u64) -> Vec<u8> {
    OpenOut { fh, ..OpenOut::default() }.as_bytes().to_vec()
}

fn listing(entries: &[(&str, u64)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, nodeid) in entries {
        let entry_out = EntryOut { nodeid: *nodeid, attr: attr(), ..EntryOut::default() };
        let dirent = Dirent { namelen: name.len() as u32, ..Dirent::default() };
        body.extend_from_slice(DirentPlus { entry_out, dirent }.as_bytes());
        body.extend_from_slice(name.as_bytes());
        body.resize(body.len().next_multiple_of(8), 0);
    }
    body
}

fn answer(known: &Known, opcode: Opcode, asked: Asked, errno: u32, body: &[u8]) {
    known.answered(1, opcode as u32, || Some(asked), errno, body);
}

fn list(known: &Known, size: usize, body: &[u8]) {
    let asked = ReadIn { size: size as u32, ..ReadIn::default() };
    answer(known, Opcode::Readdirplus, Asked::new(1, asked.as_bytes()), 0, body);
}

fn forget(known: &Known, one: &[(u64, u64)]) {
    let body: Vec<u8> = one
        .iter()
        .flat_map(|&(nodeid, nlookup)| ForgetOne { nodeid, nlookup }.as_bytes().to_vec())
        .collect();
    known.forgotten(1, &body);
}

fn node(id: u64, recipe: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    assert!(push_node(&mut body, id, |out| out.extend(recipe)));
    body
}

fn open(known: &Known, opcode: Opcode, node: u64, flags: OFlags, fh: u64) {
    let asked = OpenIn { flags: flags.bits(), open_flags: 0 };
    answer(known, opcode, Asked::new(node, asked.as_bytes()), 0, &opened(fh));
}

fn release(known: &Known, opcode: Opcode, fh: u64, errno: u32) {
    let asked = ReleaseIn { fh, ..ReleaseIn::default() };
    answer(known, opcode, Asked::new(2, asked.as_bytes()), errno, &[]);
}

#[test]
fn each_reply_gives_what_the_kernel_takes_of_it() {
    let nothing = Asked::new(1, &[]);
    let check = |opcode, errno, body: &[u8], expected: &[(u64, u64)]| {
        let known = Known::new(true);
        answer(&known, opcode, nothing, errno, body);
        assert_eq!(counts(&known), expected, "{opcode:?} {errno} {}", body.len());
    };
    use Opcode::*;
    for opcode in [Lookup, Mknod, Mkdir, Symlink, Link] {
        check(opcode, 0, &entry(7), &[(7, 1)]);
        check(opcode, 2, &entry(7), &[]);
        // Negative, the root, what no daemon could restore.
        for id in [0, 1, NUMBER_MAX + 1, u64::MAX] {
            check(opcode, 0, &entry(id), &[]);
        }
        check(opcode, 0, &entry(7)[..127], &[]);
        check(opcode, 0, &[&entry(7)[..], &[0]].concat(), &[]);
        let bad = |attr| EntryOut { nodeid: 7, attr, ..EntryOut::default() };
        check(opcode, 0, bad(Attr { mode: 0o644, ..attr() }).as_bytes(), &[]);
        check(opcode, 0, bad(Attr { size: 1 << 63, ..attr() }).as_bytes(), &[]);
    }
    for opcode in [Create, Tmpfile] {
        check(opcode, 0, &[entry(7), opened(3)].concat(), &[(7, 1)]);
        check(opcode, 0, &entry(7), &[]);
        check(opcode, 0, &[&entry(7)[..], &opened(3), &[0]].concat(), &[]);
    }
    for opcode in [Getattr, Read, Readdir, Statx, Rename2, Init] {
        check(opcode, 0, &entry(7), &[]);
    }
    check(Create, 0, &[], &[]);
}

#[test]
fn listings_are_walked_as_the_kernel_walks_them() {
    let check = |entries: &[(&str, u64)], expected: &[(u64, u64)]| {
        let known = Known::new(true);
        let body = listing(entries);
        list(&known, body.len(), &body);
        assert_eq!(counts(&known), expected, "{entries:?}");
        // More than was asked for: the kernel refuses it as a whole.
        let known = Known::new(true);
        list(&known, body.len().saturating_sub(1), &body);
        assert_eq!(counts(&known), []);
    };
    check(&[(".", 1), ("..", 9), ("a", 5), ("ab", 5), ("c", 6)], &[(5, 2), (6, 1)]);
    check(&[("no attributes", 0), (".hidden", 4), ("...", 3)], &[(3, 1), (4, 1)]);
    check(&[("a", 5), ("b/c", 6), ("d", 7)], &[(5, 1)]);
    check(&[("a", 5), ("", 6), ("d", 7)], &[(5, 1)]);
    let long = "n".repeat(NAME_BYTES_MAX + 1);
    check(&[("a", 5), (&long, 6), ("d", 7)], &[(5, 1)]);
    check(&[(&long[1..], 6)], &[(6, 1)]);

    let body = listing(&[("first", 5), ("second", 6)]);
    for cut in 0..body.len() {
        let known = Known::new(true);
        list(&known, 4096, &body[..cut]);
        let whole = if cut >= body.len() / 2 { &[(5, 1)][..] } else { &[] };
        assert_eq!(counts(&known), whole, "cut at {cut}");
    }
    let mut wild = body;
    wild[128 + 16..128 + 20].copy_from_slice(&u32::MAX.to_le_bytes());
    let known = Known::new(true);
    list(&known, 4096, &wild);
    assert_eq!(counts(&known), []);
}

#[test]
fn the_first_write_behind_an_append_that_may_have_been_done_is_known() {
    let known = Known::new(true);
    open(&known, Opcode::Open, 9, OFlags::RDWR | OFlags::APPEND, 3);
    open(&known, Opcode::Open, 9, OFlags::RDWR, 4);
    let write = |fh, write_flags| {
        let asked = WriteIn { fh, write_flags, ..WriteIn::default() };
        Asked::new(9, asked.as_bytes())
    };
    let is_doubted = |asked| known.is_doubted(|| asked).is_some();
    // One at a place may run again, and a page has its place.
    known.doubt_write(&write(4, 0));
    known.doubt_write(&write(3, FUSE_WRITE_CACHE));
    assert!(!is_doubted(write(3, 0)) && !is_doubted(write(4, 0)));
    for _ in 0..2 {
        known.doubt_write(&write(3, 0));
        known.doubt_write(&write(3, 0));
        assert!(is_doubted(write(3, 0)) && !is_doubted(write(4, 0)));
        assert!(!is_doubted(write(3, FUSE_WRITE_CACHE)));
        known.doubt_is_told(&write(3, 0));
        known.doubt_is_told(&write(3, 0));
        assert!(!is_doubted(write(3, 0)));
    }
    known.doubt_write(&write(3, 0));
    release(&known, Opcode::Release, 3, 0);
    assert!(!is_doubted(write(3, 0)));
    assert_eq!(known.doubts.load(Ordering::Relaxed), 0);
}

#[test]
fn handles_are_as_they_were_opened_and_go_with_their_release() {
    let known = Known::new(true);
    let once = OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC | OFlags::NOCTTY;
    let kept = OFlags::RDWR | OFlags::APPEND | OFlags::NOFOLLOW;
    open(&known, Opcode::Open, 9, kept | once, 3);
    open(&known, Opcode::Opendir, 1, OFlags::DIRECTORY, 4);
    let asked = CreateIn { flags: (OFlags::WRONLY | once).bits(), ..CreateIn::default() };
    let body = [entry(7), opened(5)].concat();
    answer(&known, Opcode::Create, Asked::new(1, asked.as_bytes()), 0, &body);
    let handle = |node, flags: OFlags, directory| Handle {
        node,
        flags: flags.bits(),
        directory,
        doubted: false,
    };
    let all = BTreeMap::from([
        (3, handle(9, kept, false)),
        (4, handle(1, OFlags::DIRECTORY, true)),
        (5, handle(7, OFlags::WRONLY, false)),
    ]);
    let (nodes, handles, end) = told(&known);
    assert_eq!((nodes.len(), handles, end.fh_max, end.node_id_max), (1, all, 5, 7));
    // What the kernel refuses, or nobody could restore.
    answer(&known, Opcode::Open, Asked::new(9, &[]), 0, &opened(6)[..15]);
    answer(&known, Opcode::Open, Asked::new(9, &[]), 24, &opened(6));
    for fh in [0, NUMBER_MAX + 1] {
        open(&known, Opcode::Open, 9, kept, fh);
    }
    assert_eq!(told(&known).1.len(), 3);
    for (opcode, fh, errno) in [
        (Opcode::Release, 3, 0),
        (Opcode::Releasedir, 4, 5),
        (Opcode::Release, 99, 0),
        (Opcode::Release, 5, 4),
    ] {
        release(&known, opcode, fh, errno);
    }
    let (_, handles, end) = told(&known);
    assert_eq!((handles.len(), end.fh_max), (0, 5));
}

#[test]
fn requests_are_read_where_they_lie_in_their_records() {
    let mut record = vec![0; 40];
    record[16..24].copy_from_slice(&9u64.to_le_bytes());
    record.extend_from_slice(OpenIn { flags: 0x8002, open_flags: 1 }.as_bytes());
    let asked = Asked::of_record(&record).expect("whole");
    assert_eq!((asked.nodeid, asked.flags()), (9, 0x8002));
    assert_eq!(Asked::of_record(&record[..39]), None);
    let asked = Asked::of_record(&record[..40]).expect("no arguments");
    assert_eq!((asked.nodeid, asked.fh(), asked.size()), (9, 0, 0));
    let release = ReleaseIn { fh: 0x0102_0304_0506_0708, ..ReleaseIn::default() };
    assert_eq!(Asked::new(1, release.as_bytes()).fh(), release.fh);
    let read = ReadIn { size: 4096, ..ReadIn::default() };
    assert_eq!(Asked::new(1, read.as_bytes()).size(), 4096);
}

#[test]
fn recipes_come_before_after_and_again() {
    let known = Known::new(true);
    let looked_up = |id| answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
    known.hear(&node(5, b"before")).expect("well formed");
    assert_eq!(told(&known).0, BTreeMap::new(), "no reply has given it");
    looked_up(5);
    looked_up(6);
    known.hear(&[node(6, b"after"), node(5, b"renamed")].concat()).expect("well formed");
    looked_up(6);
    looked_up(8);
    let all = [(5, (1, b"renamed".to_vec())), (6, (2, b"after".to_vec())), (8, (1, vec![]))];
    assert_eq!(told(&known).0, BTreeMap::from(all));
    forget(&known, &[(5, 1), (6, 1), (8, 7), (77, 1)]);
    assert_eq!(counts(&known), [(6, 1)]);
    assert_eq!(told(&known).2.node_id_max, 8);
    assert!(known.hear(&[1, 2, 3]).is_err() && known.hear(&node(1, b"")).is_err());
}

/// The daemon has made the reply to a LOOKUP, without the recipe, which had left before; then
/// it takes a FORGET, and the reply to that is here first.
#[test]
fn a_recipe_stays_where_a_reply_is_overtaken_by_that_to_a_forget() {
    let known = Known::new(true);
    let looked_up = |id| answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
    for round in 0..3 {
        known.hear(&node(5, b"first")).expect("well formed");
        looked_up(5);
        forget(&known, &[(5, 1)]);
        // Others come and go meanwhile.
        for id in 100..110 + (SHARDS * EARLY_PER_SHARD_MAX / 2) as u64 {
            known.hear(&node(id, b"other")).expect("well formed");
            looked_up(id);
        }
        assert!(!told(&known).0.contains_key(&5), "nothing of it is told");
        looked_up(5);
        assert_eq!(told(&known).0[&5], (1, b"first".to_vec()), "{round}");
        forget(&known, &[(5, 1)]);
    }
}

/// As the kernel forgets one file after the other for long.
#[test]
fn recipes_go_when_all_is_over_that_was_in_flight() {
    let known = Known::new(true);
    let looked_up = |id| answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
    let held = || {
        let shards = known.shards.iter().map(|shard| lock(&shard.0));
        shards
            .map(|shard| (shard.nodes.len(), shard.early.len() + shard.late.len()))
            .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    };
    for id in 2..20_000 {
        known.hear(&node(id, b"passing")).expect("well formed");
        looked_up(id);
        forget(&known, &[(id, 1)]);
        if id % 64 == 0 {
            known.next_turn();
        }
    }
    let (nodes, early) = held();
    let most = SHARDS * 2 * (EARLY_TURNS as usize + 1) * 4;
    assert!(nodes <= early && early < most, "{nodes} {early}");
    // What was heard or given back in this turn or the two before is there.
    for turn in 0..EARLY_TURNS {
        known.hear(&node(30_000 + turn, b"late")).expect("well formed");
        known.hear(&node(40_000 + turn, b"back")).expect("well formed");
        looked_up(40_000 + turn);
        forget(&known, &[(40_000 + turn, 1)]);
        (50_000..50_500).for_each(|id| known.hear(&node(id, b"other")).expect("well formed"));
        if turn + 1 < EARLY_TURNS {
            known.next_turn();
        }
    }
    (0..EARLY_TURNS).for_each(|turn| looked_up(30_000 + turn));
    (0..EARLY_TURNS).for_each(|turn| looked_up(40_000 + turn));
    let (nodes, ..) = told(&known);
    assert!((nodes.len(), nodes.values().all(|(_, recipe)| recipe.len() == 4)) == (6, true));
}

/// The kernel gives back all that it has, while a request is in flight for long that may give one
/// of it again; also where the next client gets the reply.
#[test]
fn many_that_are_given_back_at_once_push_out_none() {
    const OTHERS: u64 = 100_000;
    let held = |known: &Known| {
        known.shards.iter().map(|shard| lock(&shard.0).nodes.len() as u64).sum::<u64>()
    };
    for is_next in [false, true] {
        let (mut keep, mut known) = kept();
        let mut seq = 0;
        let mut tag = || {
            seq += 1;
            tag_of(0, SlotUse { slot: 0, seq })
        };
        let looked_up = |known: &Known, tag, id| {
            known.answered(tag, Opcode::Lookup as u32, || None, 0, &entry(id));
        };
        for (id, recipe) in [(5, "first")].into_iter().chain((0..OTHERS).map(|n| (100 + n, "x"))) {
            known.hear(&node(id, recipe.as_bytes())).expect("well formed");
            looked_up(&known, tag(), id);
            known.forgotten(tag(), ForgetOne { nodeid: id, nlookup: 1 }.as_bytes());
        }
        if is_next {
            drop(known);
            (keep, known) = taken_over(&keep);
        }
        assert_eq!((known.totals(), held(&known)), ((0, 0), OTHERS + 1));
        looked_up(&known, tag(), 5);
        assert_eq!(told(&known).0, BTreeMap::from([(5, (1, b"first".to_vec()))]));
        // The request is over.
        (0..EARLY_TURNS).for_each(|_| known.next_turn());
        for id in 1_000_000..1_002_000 {
            known.hear(&node(id, b"x")).expect("well formed");
            looked_up(&known, tag(), id);
            known.forgotten(tag(), ForgetOne { nodeid: id, nlookup: 1 }.as_bytes());
        }
        assert!(held(&known) < 2_300, "{}", held(&known));
        drop(keep);
    }
}

/// However long a request is in flight, and however often a node comes and goes.
#[test]
fn what_was_given_back_is_bounded() {
    let known = Known::new(true);
    for n in 0..200_000 {
        let id = 2 + n % 3;
        known.hear(&node(id, b"some")).expect("well formed");
        answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
        forget(&known, &[(id, 1)]);
    }
    let most = known.shards.iter().map(|shard| lock(&shard.0).late.len()).max();
    assert_eq!(most, Some(LATE_PER_SHARD_MAX));
    assert_eq!(known.shards.iter().map(|shard| lock(&shard.0).nodes.len()).sum::<usize>(), 3);
}

/// Whatever the key is: none of the locks has much more than its part, or none at all.
#[test]
fn numbers_that_follow_each_other_are_spread() {
    for _ in 0..1000 {
        let (key, mut counts) = (Keyed::new(), [0; SHARDS]);
        (2..2 + 64 * SHARDS as u64).for_each(|id| counts[shard_of(key.hash_one(id))] += 1);
        assert!(counts.iter().all(|count| (8..192).contains(count)), "{key:?}: {counts:?}");
    }
}

/// The kernel gives back all that it has, and nothing comes any more.
#[test]
fn what_was_given_back_goes_also_where_nothing_comes() {
    let (_keep, known) = kept();
    let tag = |seq| tag_of(0, SlotUse { slot: 0, seq });
    for n in 0..10_000 {
        known.hear(&node(2 + n, b"some")).expect("well formed");
        known.answered(tag(1), Opcode::Lookup as u32, || None, 0, &entry(2 + n));
        known.forgotten(tag(2), ForgetOne { nodeid: 2 + n, nlookup: 1 }.as_bytes());
    }
    let held = || known.shards.iter().map(|shard| lock(&shard.0).nodes.len()).sum::<usize>();
    known.sweep();
    assert_eq!(held(), 10_000);
    (0..EARLY_TURNS).for_each(|_| known.next_turn());
    known.sweep();
    assert_eq!(held(), 0);
}

/// What the kernel has comes before what it has given back.
#[test]
fn what_was_given_back_makes_room() {
    let (key, recipe) = (Keyed::new(), [7; 8]);
    let mut shard = Shard::new(key);
    let most = NODES_PER_SHARD_MAX as u64;
    for id in 2..2 + most {
        shard.hear(id, &recipe);
        shard.give(Given { id, is_file: true }, 1);
    }
    (2..4).for_each(|id| shard.forget(id, 1, 0, 2));
    for id in [most + 10, most + 11, most + 12] {
        shard.hear(id, &recipe);
        shard.give(Given { id, is_file: true }, 3);
    }
    let has = |id| shard.nodes.get(&id).map(|node| (node.count, node.recipe.len()));
    assert_eq!([most + 10, most + 11].map(has), [Some((1, 8)); 2]);
    assert_eq!([2, 3, most + 12].map(has), [None; 3], "all that is left counts");
}

#[test]
fn what_no_reply_gives_is_bounded() {
    let known = Known::new(true);
    for id in 2..200_000 {
        known.hear(&node(id, &[7; 400])).expect("well formed");
    }
    let nodes: u64 = known.shards.iter().map(|shard| lock(&shard.0).nodes.len() as u64).sum();
    assert!(nodes <= (SHARDS * EARLY_PER_SHARD_MAX) as u64, "{nodes}");
    assert_eq!(counts(&known), []);
    // The last ones are there, and stay when their replies have come.
    for id in 199_000..200_000 {
        answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
    }
    for id in 200_000..400_000 {
        known.hear(&node(id, b"x")).expect("well formed");
    }
    let (nodes, ..) = told(&known);
    assert_eq!(nodes.len(), 1000);
    assert!(nodes.values().all(|(_, recipe)| recipe.len() == 400));
}

#[test]
fn who_does_not_want_it_has_nothing() {
    let known = Known::new(false);
    known.hear(b"nonsense").expect("not looked at");
    answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(5));
    open(&known, Opcode::Open, 5, OFlags::RDONLY, 3);
    release(&known, Opcode::Release, 3, 0);
    forget(&known, &[(5, 1)]);
    assert_eq!(known.totals(), (0, 0));
}

/// Numbers from a seed (splitmix64).
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ mixed >> 31) % end
    }
}

#[test]
fn random_sequences_come_to_what_a_plain_model_says() {
    for seed in 0..20 {
        let mut random = Seeded(seed);
        let known = Known::new(true);
        let mut nodes: BTreeMap<u64, (u64, Vec<u8>)> = BTreeMap::new();
        let mut handles: BTreeMap<u64, Handle> = BTreeMap::new();
        let mut next_fh = 1;
        let give = |nodes: &mut BTreeMap<u64, (u64, Vec<u8>)>, id| {
            nodes.entry(id).or_insert((0, Vec::new())).0 += 1;
        };
        for _ in 0..3000 {
            let id = 2 + random.below(60);
            match random.below(8) {
                0..=2 => {
                    answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
                    give(&mut nodes, id);
                }
                3 => {
                    let ids: Vec<u64> = (0..random.below(9)).map(|n| 2 + (id + n) % 60).collect();
                    let entries: Vec<_> = ids.iter().map(|&id| ("name", id)).collect();
                    list(&known, 4096, &listing(&entries));
                    ids.into_iter().for_each(|id| give(&mut nodes, id));
                }
                4 => {
                    let recipe = vec![random.below(256) as u8; random.below(100) as usize + 1];
                    if let Some(known_node) = nodes.get_mut(&id) {
                        known.hear(&node(id, &recipe)).expect("well formed");
                        known_node.1 = recipe;
                    }
                }
                5 => {
                    let entry = nodes.get_mut(&id).filter(|entry| entry.0 > 0);
                    let Some(entry) = entry else { continue };
                    let n = 1 + random.below(entry.0);
                    forget(&known, &[(id, n)]);
                    // Its recipe stays.
                    entry.0 -= n;
                }
                6 => {
                    open(&known, Opcode::Open, id, OFlags::RDWR, next_fh);
                    let flags = OFlags::RDWR.bits();
                    handles.insert(
                        next_fh,
                        Handle { node: id, flags, directory: false, doubted: false },
                    );
                    next_fh += 1;
                }
                _ => {
                    let fh = random.below(next_fh) + 1;
                    release(&known, Opcode::Release, fh, 0);
                    handles.remove(&fh);
                }
            }
        }
        nodes.retain(|_, (count, _)| *count > 0);
        let (found_nodes, found_handles, end) = told(&known);
        assert_eq!(found_nodes, nodes, "seed {seed}");
        assert_eq!((found_handles, end.fh_max), (handles, next_fh - 1), "seed {seed}");
    }
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).map_or(0, |kib: u64| kib << 10)
}

#[test]
fn a_million_nodes() {
    const NODES: u64 = 1_000_000;
    let before = resident_bytes();
    let known = Known::new(true);
    let begun = Instant::now();
    for id in 2..NODES + 2 {
        known.hear(&node(id, &[id as u8; 90])).expect("well formed");
        answer(&known, Opcode::Lookup, Asked::new(1, &[]), 0, &entry(id));
    }
    let filled = begun.elapsed();
    let held = resident_bytes().saturating_sub(before);
    let begun = Instant::now();
    let (mut records, mut bytes) = (0, 0);
    let restored = known.restore(|body| {
        (records, bytes) = (records + 1, bytes + body.len());
        Ok::<(), ()>(())
    });
    assert_eq!(restored.expect("sent").nodes, NODES);
    let told = begun.elapsed();
    println!(
        "{NODES} nodes with recipes of 90 bytes: {} MiB held, {filled:?} to come, {told:?} to \
         tell in {records} records of {} MiB",
        held >> 20,
        bytes >> 20
    );
    for id in 2..NODES + 2 {
        forget(&known, &[(id, 1)]);
        if id % 1000 == 0 {
            known.next_turn();
        }
    }
    assert_eq!(known.totals(), (0, 0));
    let room: usize = known.shards.iter().map(|s| lock(&s.0).nodes.capacity()).sum();
    assert!(room <= SHARDS * SMALL_TABLE * 2, "{room}");
}

/// What the next client finds.
fn taken_over(keep: &Keep) -> (Keep, Known) {
    taken_over_owing(keep, 0)
}

/// The same, where the kernel may not have a reply.
fn taken_over_owing(keep: &Keep, owed: u64) -> (Keep, Known) {
    let file = keep.file().try_clone_to_owned().expect("dup");
    let (keep, places) = Keep::open(file).expect("ready");
    let key = keep.terms().key;
    let known = Known::replayed(places.logs, key, |tag| tag == owed);
    (keep, known.expect("sound"))
}

fn kept() -> (Keep, Known) {
    let (keep, places) = Keep::create().expect("a file");
    let (known, key) = Known::kept(places.logs);
    keep.change(|terms| (terms.key, terms.lanes, terms.slots) = (key, 1, 1));
    keep.set_ready();
    (keep, known)
}

#[test]
fn another_client_knows_the_same_whatever_was_done() {
    let (mut keep, mut known) = kept();
    let mut random = Keyed::new().hash_one(7);
    let mut next = |below: u64| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) % below
    };
    let mut seq = 0;
    for round in 0..40 {
        for _ in 0..4000 {
            seq += 1;
            let tag = tag_of(next(3) as u8, SlotUse { slot: next(4) as u16, seq });
            let id = 2 + next(300);
            match next(6) {
                0 => known.hear(&node(id, &vec![7; next(200) as usize])).expect("sound"),
                1 | 2 => known.answered(tag, Opcode::Lookup as u32, || None, 0, &entry(id)),
                3 => known.forgotten(tag, ForgetOne { nodeid: id, nlookup: 2 }.as_bytes()),
                4 => {
                    let asked = OpenIn { flags: 2, open_flags: 0 };
                    let asked = Asked::new(id, asked.as_bytes());
                    let opcode = Opcode::Open as u32;
                    known.answered(tag, opcode, || Some(asked), 0, &opened(1 + next(300)));
                }
                _ => release(&known, Opcode::Release, 1 + next(300), 0),
            }
            // The kernel has it, and may give it back by another lane.
            (0..3).for_each(|lane| known.settled(lane));
        }
        let before = told(&known);
        assert!(before.0.len() > 50 && before.1.len() > 50, "{round}");
        drop(known);
        (keep, known) = taken_over(&keep);
        assert_eq!(told(&known), before, "{round}");
    }
}

#[test]
fn a_reply_that_did_not_get_through_is_taken_back_and_counts_when_it_comes_again() {
    let at = SlotUse { slot: 1, seq: 9 };
    let (tag, other) = (tag_of(0, at), tag_of(1, at));
    for rewrites in [false, true] {
        let (keep, known) = kept();
        let create = |known: &Known| {
            known.hear(&node(7, b"seven")).expect("sound");
            let asked = Asked::new(1, OpenIn { flags: 2, open_flags: 0 }.as_bytes());
            let body = [entry(7), opened(3)].concat();
            known.answered(tag, Opcode::Create as u32, || Some(asked), 0, &body);
        };
        create(&known);
        known.answered(other, Opcode::Lookup as u32, || None, 0, &entry(7));
        if rewrites {
            for _ in 0..100_000 {
                known.answered(other + 1, Opcode::Lookup as u32, || None, 0, &entry(8));
                known.forgotten(other + 2, ForgetOne { nodeid: 8, nlookup: 1 }.as_bytes());
            }
        }
        drop(known);
        let (keep, known) = taken_over_owing(&keep, tag);
        assert_eq!((counts(&known), known.totals().1), (vec![(7, 2)], 1));
        known.undo(tag);
        drop(known);
        // Killed again, before it came.
        let (keep, known) = taken_over_owing(&keep, tag);
        known.undo(tag);
        assert_eq!((counts(&known), known.totals().1), (vec![(7, 1)], 0), "{rewrites}");
        create(&known);
        drop(known);
        let (_keep, known) = taken_over_owing(&keep, tag);
        let (nodes, handles, _) = told(&known);
        assert_eq!(nodes[&7], (2, b"seven".to_vec()));
        assert_eq!(handles.keys().collect::<Vec<_>>(), [&3]);
    }
}

#[test]
fn a_forget_whose_reply_was_half_done_is_ended_and_not_sent_again() {
    let (keep, known) = kept();
    let tag = tag_of(2, SlotUse { slot: 0, seq: 5 });
    for id in 2..40 {
        known.answered(1, Opcode::Lookup as u32, || None, 0, &entry(id));
        known.answered(1, Opcode::Lookup as u32, || None, 0, &entry(id));
    }
    let forgets: Vec<_> = (2..40).map(|nodeid| ForgetOne { nodeid, nlookup: 1 }).collect();
    assert!(!known.end_forget(tag, &forgets), "no reply has come");
    // As far as a killed client came.
    known.forgotten(tag, forgets[..20].as_bytes());
    drop(known);
    let (_keep, known) = taken_over_owing(&keep, tag);
    assert!(known.end_forget(tag, &forgets) && known.end_forget(tag, &forgets));
    assert_eq!(counts(&known), (2..40).map(|id| (id, 1)).collect::<Vec<_>>());
}

#[test]
fn what_one_lane_gave_and_another_took_back_does_not_come_again() {
    let tag = |lane, seq| tag_of(lane, SlotUse { slot: 0, seq });
    let (keep, known) = kept();
    let looked_up = |known: &Known, tag, id| {
        known.answered(tag, Opcode::Lookup as u32, || None, 0, &entry(id));
        known.settled((tag >> 48) as u8);
    };
    let forgotten = |known: &Known, tag, nodeid| {
        known.forgotten(tag, ForgetOne { nodeid, nlookup: 1 }.as_bytes());
        known.settled((tag >> 48) as u8);
    };
    for id in [5, 6] {
        looked_up(&known, tag(0, 1), id);
        forgotten(&known, tag(1, 1), id);
    }
    looked_up(&known, tag(2, 1), 6);
    // Each log is written anew.
    for n in 0..100_000 {
        looked_up(&known, tag(3, 2 * n), 100 + u64::from(n % 1000));
        forgotten(&known, tag(3, 2 * n + 1), 100 + u64::from(n % 1000));
    }
    drop(known);
    let (_keep, known) = taken_over(&keep);
    assert_eq!(counts(&known), [(6, 1)]);
}

#[test]
fn what_is_known_of_a_handle_changes_also_where_there_is_no_room_for_another() {
    let mut shard = Shard::new(Keyed::new());
    let flags = OFlags::APPEND.bits();
    let handle = Handle { node: 5, flags, directory: false, doubted: false };
    let most = HANDLES_PER_SHARD_MAX as u64;
    (1..=most).for_each(|fh| shard.open(fh, handle, 1));
    for doubted in [true, false] {
        assert!(shard.doubt(1, doubted));
        assert_eq!(shard.handles[&1].doubted, doubted);
    }
    shard.open(most + 1, handle, 1);
    assert!(!shard.handles.contains_key(&(most + 1)));
}

/// A lane has many requests in flight, and the reply to one of them was on its way.
#[test]
fn what_a_reply_has_changed_is_known_whichever_request_is_looked_at_first() {
    let tag = |slot| tag_of(0, SlotUse { slot, seq: 3 });
    for is_first in [false, true] {
        let order = if is_first { [1, 0, 2] } else { [0, 2, 1] };
        let (keep, known) = kept();
        known.answered(tag(1), Opcode::Lookup as u32, || None, 0, &entry(5));
        drop(known);
        let (_keep, known) = taken_over_owing(&keep, tag(1));
        order.into_iter().for_each(|slot| known.undo(tag(slot)));
        assert_eq!(counts(&known), [], "{order:?}");

        let (keep, known) = kept();
        let forgets = [5, 6].map(|nodeid| ForgetOne { nodeid, nlookup: 1 });
        for id in [5, 5, 6, 6] {
            known.answered(tag(4), Opcode::Lookup as u32, || None, 0, &entry(id));
        }
        known.forgotten(tag(1), forgets[..1].as_bytes());
        drop(known);
        let (_keep, known) = taken_over_owing(&keep, tag(1));
        for slot in order {
            assert_eq!(known.end_forget(tag(slot), &forgets), slot == 1, "{order:?}");
        }
        assert_eq!(counts(&known), [(5, 1), (6, 1)], "{order:?}");
    }
}
