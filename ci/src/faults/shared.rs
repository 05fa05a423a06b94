//! What all threads change at once: a log that all append to, names that all want, a file of
//! blocks.
//!
//! Invariant: who did what is known from each thread's own results, so the end tells exactly:
//! each record once and in its writer's order, each wanted name with one owner, each block as its
//! owner wrote it last. The checks are pure: they take bytes and histories.

use std::collections::{BTreeMap, BTreeSet};

use super::op::{Tag, author, content};

/// Bytes of a record of the log.
pub const RECORD_BYTES: usize = 64;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
/// Blocks of a thread.
pub const BLOCKS_EACH: u64 = 16;

/// What one thread did to what is shared.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Records appended: sequence numbers 0 to this.
    pub records: u64,
    /// Those of them that failed in a way that is allowed: they may be there.
    pub unsure: BTreeSet<u64>,
    /// The last sequence number of each block that was written.
    pub blocks: BTreeMap<u64, u64>,
    /// Those of them that may hold what was there before; 0 is nothing.
    pub blocks_before: BTreeMap<u64, u64>,
    /// Wanted names that were tried: 0 to this.
    pub tried: u64,
    /// Those that this thread got.
    pub won: BTreeSet<u64>,
    /// Those that it may have got: the answer was an error that is allowed.
    pub perhaps: BTreeSet<u64>,
}

/// The bytes of a thread's record.
pub fn record(thread: u64, seq: u64) -> Vec<u8> {
    content(Tag { thread, seq, len: RECORD_BYTES })
}

/// The bytes of a thread's block.
pub fn block(thread: u64, seq: u64) -> Vec<u8> {
    content(Tag { thread, seq, len: BLOCK_BYTES })
}

/// Where a thread's block lies among those of all threads.
pub fn block_at(thread: u64, threads: u64, number: u64) -> u64 {
    (number * threads + thread) * BLOCK_BYTES as u64
}

/// Holds the log against who appended what.
pub fn check_log(bytes: &[u8], histories: &[History]) -> Vec<String> {
    let mut problems = Vec::new();
    let mut seen = vec![BTreeMap::<u64, u32>::new(); histories.len()];
    let mut last = vec![None; histories.len()];
    for (n, chunk) in bytes.chunks(RECORD_BYTES).enumerate() {
        let whole = author(chunk).filter(|(thread, seq)| chunk == record(*thread, *seq));
        let Some((thread, seq)) = whole.filter(|(thread, _)| *thread < histories.len() as u64)
        else {
            problems.push(format!("torn: record {n} of the log is nobody's"));
            continue;
        };
        let at = thread as usize;
        *seen[at].entry(seq).or_default() += 1;
        if last[at].is_some_and(|last| seq < last) {
            problems.push(format!("order: thread {thread}'s record {seq} comes too late"));
        }
        last[at] = Some(seq);
    }
    for (thread, (history, seen)) in histories.iter().zip(&seen).enumerate() {
        for seq in 0..history.records {
            match seen.get(&seq) {
                None if history.unsure.contains(&seq) => {}
                None => problems.push(format!("lost: thread {thread}'s record {seq}")),
                Some(1) => {}
                Some(n) => {
                    problems.push(format!("doubled: thread {thread}'s record {seq} is there {n}x"));
                }
            }
        }
        if let Some(seq) = seen.keys().find(|seq| **seq >= history.records) {
            problems.push(format!("invented: thread {thread} never wrote record {seq}"));
        }
    }
    problems
}

/// Holds the file of blocks against who wrote what last.
pub fn check_blocks(bytes: &[u8], histories: &[History]) -> Vec<String> {
    let mut problems = Vec::new();
    for (thread, history) in histories.iter().enumerate() {
        let (thread, threads) = (thread as u64, histories.len() as u64);
        for (number, seq) in &history.blocks {
            let at = block_at(thread, threads, *number) as usize;
            let found = bytes.get(at..at + BLOCK_BYTES).unwrap_or_default();
            let before = history.blocks_before.get(number);
            let is_before = |before: &u64| match before {
                0 => found.iter().all(|byte| *byte == 0),
                seq => found == block(thread, *seq),
            };
            if found == block(thread, *seq) || before.is_some_and(is_before) {
                continue;
            }
            problems.push(match author(found).filter(|(t, seq)| found == block(*t, *seq)) {
                Some((other, old)) => format!(
                    "lost: thread {thread}'s block {number} holds write {old} of thread {other}, \
                     not {seq}"
                ),
                None => format!("torn: thread {thread}'s block {number}, write {seq}"),
            });
        }
    }
    problems
}

/// Holds the wanted names that are there, each with its content, against who got what.
pub fn check_claims(names: &BTreeMap<u64, Vec<u8>>, histories: &[History]) -> Vec<String> {
    let mut problems = Vec::new();
    let tried = histories.iter().map(|history| history.tried).max().unwrap_or(0);
    for claim in 0..tried {
        let of = |pick: fn(&History) -> &BTreeSet<u64>| {
            let owners = histories.iter().enumerate().filter(|(_, h)| pick(h).contains(&claim));
            owners.map(|(thread, _)| thread as u64).collect::<Vec<_>>()
        };
        let (owners, perhaps) = (of(|h| &h.won), of(|h| &h.perhaps));
        match (owners[..].first(), owners.len(), names.get(&claim)) {
            (_, 2.., _) => problems.push(format!("doubled: claim {claim} was won by {owners:?}")),
            (Some(owner), 1, Some(bytes)) if *bytes == record(*owner, claim) => {}
            (None, _, None | Some(_)) if !perhaps.is_empty() => {}
            (Some(owner), 1, Some(_)) => {
                problems
                    .push(format!("torn: claim {claim} of thread {owner} holds something else"));
            }
            (Some(owner), _, None) => {
                problems.push(format!("lost: claim {claim} of thread {owner} is not there"));
            }
            _ => problems.push(format!("lost: claim {claim} was won by nobody")),
        }
    }
    if let Some((claim, _)) = names.iter().find(|(claim, _)| **claim >= tried) {
        problems.push(format!("invented: nobody made claim {claim}"));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrote(records: u64) -> History {
        History { records, ..History::default() }
    }

    fn log(records: &[(u64, u64)]) -> Vec<u8> {
        records.iter().flat_map(|(thread, seq)| record(*thread, *seq)).collect()
    }

    fn check(problems: &[String], expected: &[&str]) {
        assert_eq!(problems.len(), expected.len(), "{problems:?}");
        for (problem, word) in problems.iter().zip(expected) {
            assert!(problem.contains(word), "{problem} should hold {word}");
        }
    }

    #[test]
    fn a_log_with_a_wrong_history_is_found() {
        let both = [wrote(2), wrote(1)];
        check(&check_log(&log(&[(0, 0), (1, 0), (0, 1)]), &both), &[]);
        check(&check_log(&log(&[(0, 0), (0, 1)]), &both), &["lost: thread 1"]);
        check(&check_log(&log(&[(0, 0), (1, 0), (0, 1), (1, 0)]), &both), &["doubled: thread 1"]);
        check(&check_log(&log(&[(0, 1), (1, 0), (0, 0)]), &both), &["order: thread 0"]);
        check(&check_log(&log(&[(0, 0), (1, 0), (0, 1), (1, 1)]), &both), &["invented: thread 1"]);
        let mut torn = log(&[(0, 0), (1, 0), (0, 1)]);
        torn[100] ^= 1;
        check(&check_log(&torn, &both), &["torn: record 1", "lost: thread 1"]);
        let mut short = log(&[(0, 0), (1, 0), (0, 1)]);
        short.pop();
        check(&check_log(&short, &both), &["torn: record 2", "lost: thread 0"]);
        let unsure = [History { unsure: BTreeSet::from([1]), ..wrote(2) }];
        check(&check_log(&log(&[(0, 0)]), &unsure), &[]);
        check(&check_log(&log(&[(0, 0), (0, 1), (0, 1)]), &unsure), &["doubled"]);
    }

    #[test]
    fn blocks_that_are_stale_or_torn_are_found() {
        let of = |seq| History { blocks: BTreeMap::from([(0, seq)]), ..History::default() };
        let file = |a, b| [block(0, a), block(1, b)].concat();
        check(&check_blocks(&file(5, 6), &[of(5), of(6)]), &[]);
        check(&check_blocks(&file(5, 4), &[of(5), of(6)]), &["lost: thread 1's block 0"]);
        let mut torn = file(5, 6);
        torn[..2048].copy_from_slice(&block(0, 4)[..2048]);
        check(&check_blocks(&torn, &[of(5), of(6)]), &["torn: thread 0"]);
        check(&check_blocks(&[], &[of(5)]), &["torn"]);
        let unsure = History { blocks_before: BTreeMap::from([(0, 4)]), ..of(5) };
        check(&check_blocks(&block(0, 4), &[unsure]), &[]);
    }

    #[test]
    fn claims_without_one_owner_are_found() {
        let won = |claims: &[u64]| History {
            tried: 2,
            won: claims.iter().copied().collect(),
            ..History::default()
        };
        let names = |owners: &[(u64, u64)]| {
            owners.iter().map(|(claim, thread)| (*claim, record(*thread, *claim))).collect()
        };
        let there = names(&[(0, 0), (1, 1)]);
        check(&check_claims(&there, &[won(&[0]), won(&[1])]), &[]);
        check(&check_claims(&there, &[won(&[0]), won(&[])]), &["won by nobody"]);
        check(&check_claims(&there, &[won(&[0, 1]), won(&[1])]), &["doubled: claim 1"]);
        check(&check_claims(&names(&[(0, 0)]), &[won(&[0]), won(&[1])]), &["lost: claim 1"]);
        let other = names(&[(0, 0), (1, 0)]);
        check(&check_claims(&other, &[won(&[0]), won(&[1])]), &["torn: claim 1"]);
        let more = names(&[(0, 0), (1, 1), (2, 0)]);
        check(&check_claims(&more, &[won(&[0]), won(&[1])]), &["invented"]);
        let perhaps = History { perhaps: BTreeSet::from([1]), ..won(&[]) };
        check(&check_claims(&there, &[won(&[0]), perhaps]), &[]);
    }
}
