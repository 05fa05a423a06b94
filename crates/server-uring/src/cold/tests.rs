//! Twins, bounds, and what memory is given back, held against what cold.rs promises; no kernel.

use super::*;
use crate::import::{Handle, HandleKind, MountIdentity};

fn recipe(ino: u64) -> Recipe {
    let handle = [&ino.to_le_bytes()[..], &[7; 4]].concat();
    Recipe {
        handle: Handle::new(HandleKind::Plain, 1, &handle),
        other: None,
        mount: MountIdentity { fs_id: 1, device: (0, 31) },
        ino,
        kind: 0o100_000,
        btime: Some((1_800_000_000, 5)),
        generation: None,
        parent: 1_800_000_000_000_000_000,
        name: c"name".into(),
    }
}

fn file(ino: u64) -> FileKey {
    (rustix::fs::makedev(0, 31), ino)
}

fn cold() -> Cold {
    Cold::new(&ColdMemory::new(1 << 20))
}

#[test]
fn the_newest_of_one_file_come_first_and_the_rest_when_these_are_disowned() {
    let cold = cold();
    let most = TWINS_MAX as u64;
    // Neither in the order of their ids nor in the opposite one.
    let ids: Vec<u64> = (0..2 * most).map(|n| 100 + n * 7 % (2 * most)).collect();
    for &id in &ids {
        assert!(cold.insert(id, 1, 0, &recipe(5)) && cold.insert(id + 1000, 1, 0, &recipe(id)));
    }
    let newest: Vec<u64> = (100 + most..100 + 2 * most).rev().collect();
    assert_eq!(cold.ids_of(file(5)), newest);
    newest.iter().for_each(|&id| cold.disown(file(5), id));
    let oldest: Vec<u64> = (100..100 + most).rev().collect();
    assert_eq!(cold.ids_of(file(5)), oldest);
    // A disowned one is known still, and its end takes nobody else's place.
    assert_eq!(cold.recipe(newest[0]), Some(recipe(5)));
    assert_eq!(cold.forget(newest[0], 1), Some((0, 0)));
    oldest.iter().for_each(|&id| assert_eq!(cold.remove(id), Some((1, 0, Some(recipe(5))))));
    assert!(cold.ids_of(file(5)).is_empty());
    assert_eq!(cold.ids_of(file(100)), [1100]);
    assert_eq!(cold.findable().len(), 2 * TWINS_MAX);
    assert_eq!(cold.count(), 3 * TWINS_MAX - 1);
}

#[test]
fn a_handle_finds_what_was_resident_here_alone() {
    let cold = cold();
    assert!(cold.insert_told(1, 1, &recipe(5)));
    let handle = recipe(5).handle.expect("a handle");
    let id_of = |file, kind, handle: &[u8]| cold.id_by_handle(file, kind, (1, handle));
    assert_eq!(id_of(file(5), 0o100_000, handle.bytes()), None);
    assert_eq!(cold.own_recipe(1), None);
    assert!(cold.insert(2, 1, 0, &recipe(5)));
    assert_eq!(id_of(file(5), 0o100_000, handle.bytes()), Some(2));
    assert_eq!(id_of(file(5), 0o100_000, &[0; 12]), None);
    assert_eq!(id_of(file(6), 0o100_000, handle.bytes()), None);
    assert_eq!(id_of(file(5), 0o120_000, handle.bytes()), None, "a file does not change its kind");
    assert_eq!(cold.own_recipe(2), Some(recipe(5)));
}

#[test]
fn lookups_are_given_back_to_the_last_one() {
    let cold = cold();
    let given = u64::MAX - 1;
    assert!(cold.insert(1, given, 0, &recipe(5)) && cold.insert_lost(2, 3));
    assert_eq!(cold.forget(1, given - 2), Some((2, 0)));
    assert_eq!(cold.recipe(1), Some(recipe(5)));
    assert_eq!(cold.forget(1, 5), Some((0, 3)));
    assert_eq!(cold.forget(1, 1), None);
    assert!(cold.ids_of(file(5)).is_empty());
    assert_eq!((cold.contains(2), cold.has_files()), (true, false));
    assert_eq!(cold.forget(2, 3), Some((0, 0)));
    assert_eq!(cold.count(), 0);
}

#[test]
fn only_what_is_told_counts_and_all_of_it_comes_back() {
    let memory = ColdMemory::new(64 << 10);
    let (cold, other) = (Cold::new(&memory), Cold::new(&memory));
    let used = || memory.used.load(Ordering::Relaxed);
    assert!((1..=1000).all(|id| cold.insert(id, 1, 0, &recipe(id))));
    assert_eq!((used(), cold.room()), (0, Room::Whole));
    let first = (2000..).find(|&id| {
        assert!(cold.insert_told(id, 1, &recipe(9)));
        cold.room() != Room::Whole
    });
    assert_eq!((cold.room(), other.room()), (Room::Lost, Room::Whole));
    assert!(used() >= 64 << 10 && used() < 65 << 10, "{} bytes", used());
    assert!((5000..).any(|id| {
        assert!(cold.insert_lost(id, 1));
        cold.room() == Room::Nothing
    }));
    // One that is put down again does not count twice.
    let before = used();
    assert!(cold.insert_told(2000, 1, &recipe(9)));
    assert_eq!(used(), before);
    assert!(cold.remove(first.expect("an end")).is_some());
    assert!(used() < before);
    drop(cold);
    assert_eq!(used(), 0);
}

/// What 10,000 take, tables and all, and that it is given back.
#[test]
fn many_take_little_memory_and_give_it_back() {
    const COUNT: u64 = 10_000;
    let cold = cold();
    let parent = recipe(0).parent;
    assert!((0..COUNT).all(|n| cold.insert(parent + n, 1, 0, &recipe(1000 + n * 3))));
    let allocated =
        |maps: &Maps| maps.slots.allocated() + maps.by_id.allocated() + maps.by_file.allocated();
    let each = allocated(&cold.lock()) as u64 / COUNT;
    assert!(each <= 75, "{each} bytes each");
    // No insertion moves many, nor does a removal.
    let moved_max = |maps: &Maps| maps.by_id.fullest().max(maps.by_file.fullest());
    let moved = moved_max(&cold.lock());
    assert!(moved <= COUNT as usize / 16, "{moved} at once");
    for n in (0..COUNT).filter(|n| n % 100 > 0) {
        assert_eq!(cold.remove(parent + n), Some((1, 0, Some(recipe(1000 + n * 3)))));
    }
    for n in (0..COUNT).step_by(100) {
        assert_eq!(cold.ids_of(file(1000 + n * 3)), [parent + n]);
        assert_eq!(cold.recipe(parent + n), Some(recipe(1000 + n * 3)));
    }
    let left = allocated(&cold.lock()) as u64;
    assert!(left <= COUNT / 100 * 150, "{left} bytes are left");
}

#[test]
fn some_at_a_time_are_named_once_a_round() {
    let cold = cold();
    assert!(cold.some(10).is_empty());
    let long = || Recipe { name: c"a name that is longer than the other ones".into(), ..recipe(5) };
    assert!((1..=10).all(|id| cold.insert(id, 1, 0, &recipe(id))));
    assert!((11..=20).all(|id| cold.insert(id, 1, 0, &long())));
    assert_eq!(cold.some(4), [1, 2, 3, 4]);
    assert_eq!(cold.some(12), [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
    assert_eq!(cold.some(12), [17, 18, 19, 20]);
    assert_eq!(cold.some(20), (1..=20).collect::<Vec<_>>());
    assert_eq!(cold.some(15).len(), 15);
    // What it would go on with is gone.
    assert!((11..=20).all(|id| cold.remove(id).is_some()));
    assert_eq!(cold.some(2), [1, 2]);
}
