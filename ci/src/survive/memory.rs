//! What memory processes use, and what both ends may use at most, from the product's own bounds.
//!
//! Nothing of the product is linked in: its bounds are written down here once more, so that memory
//! which grows beyond them is seen even where they have grown with it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use ringfs_wire::limits::{BATCH_BYTES_MAX, RECORD_BYTES_MAX};

const MIB: u64 = 1 << 20;
/// Frames in flight that a lane keeps (`client/src/kept.rs`), with the one that exceeds it.
const KEPT_BYTES_MAX: u64 = 16 * MIB + BATCH_BYTES_MAX as u64;
/// Buffers that stay with free slots, and batch buffers without a frame.
const IDLE_BYTES_MAX: u64 = MIB + 4 * BATCH_BYTES_MAX as u64;
/// What a lane parks (`client/src/lane.rs`), with the frame that exceeds it.
const PARK_BYTES_MAX: u64 = 4 * MIB + RECORD_BYTES_MAX as u64;
/// Node ids that wait to be given back (`client/src/up.rs`), in a table that doubles.
const FORGETS_BYTES_MAX: u64 = 2 * 16 * 2048 * 16;
/// A lane's batch on its way, and what it has received.
const IN_HAND_BYTES_MAX: u64 = 2 * BATCH_BYTES_MAX as u64;

/// By how much a client can grow while it has no daemon.
pub fn client_growth_max(lanes: u64) -> u64 {
    let slots = KEPT_BYTES_MAX + IDLE_BYTES_MAX;
    lanes * (slots + PARK_BYTES_MAX + FORGETS_BYTES_MAX + IN_HAND_BYTES_MAX)
}

/// Of a slot: the reply that is kept, with its mark (`wire/src/table/cell.rs`).
const CELL_BYTES: u64 = 176;
/// Of a slot: the intent (`server-uring/src/intent.rs`).
const INTENT_BYTES: u64 = 64;
const HEADER_BYTES: u64 = 4096;

/// The replies that a daemon keeps for a session.
pub fn replies_max(lanes: u64, slots: u64) -> u64 {
    lanes * slots * CELL_BYTES
}

/// A session's file in the state directory.
pub fn state_file_max(lanes: u64, slots: u64) -> u64 {
    (HEADER_BYTES + replies_max(lanes, slots) + lanes * slots * INTENT_BYTES).next_multiple_of(4096)
}

/// Resident bytes of a process.
pub fn resident(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.with_context(|| format!("process {pid} has no VmRSS"))? << 10)
}

/// The same of a process and its children: a daemon's parent and its worker.
pub fn resident_with_children(pid: u32) -> Result<u64> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    // One that has just ended has nothing.
    Ok(resident(pid)? + children.map(|child| resident(child).unwrap_or(0)).sum::<u64>())
}

/// Files below a directory and their bytes.
pub fn files_in(dir: &Path) -> Result<(u64, u64)> {
    let mut sum = (0, 0);
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let found = entry?.metadata()?;
        if found.is_file() && found.len() > 0 {
            sum = (sum.0 + 1, sum.1 + found.len());
        }
    }
    Ok(sum)
}

/// In MiB, for people.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_are_resident_and_bounds_grow_with_lanes() {
        assert!(resident(std::process::id()).unwrap() > 1 << 20);
        assert!(resident(0).is_err());
        assert_eq!(client_growth_max(2), 2 * client_growth_max(1));
        assert_eq!(state_file_max(2, 128), 65536);
    }
}
