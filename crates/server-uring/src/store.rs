//! The content of a small file leaves with the answer to its first OPEN: the guest's kernel puts it
//! into its page cache, and asks for none of it.
//!
//! Invariant: no page is written over that the guest has, or may have changed. So it is of files
//! that were not opened before, as far as is known, and goes in front of the OPEN's reply; the
//! guest drops it where another OPEN of the file was answered meanwhile, or a change of its length
//! was asked for (client known.rs). What is not in the page cache of the host, or changes right
//! now, is left to READs.

use ringfs_wire::abi::{NotifyStoreOut, fopen};
use ringfs_wire::limits::STORE_BYTES_MAX;
use zerocopy::IntoBytes;

use crate::dispatch::Request;
use crate::fs::Fs;
use crate::handles::{Cached, OpenFile};
use crate::notes::Notes;
use crate::passthrough::Stat;

/// Has the content of a file that was just opened for the first time, with this answer, sent before
/// it; whether there is any.
pub(crate) fn content_of(fs: &Fs, request: &Request<'_>, file: &OpenFile, open_flags: u32) -> bool {
    let is_cached = open_flags & fopen::DIRECT_IO == 0 && !fs.writeback();
    // A READ would be counted, and wait its turn.
    let is_free = fs.options.stores && !fs.quota.is_limited();
    let can = is_free && is_cached && !file.writable && (file.memory || file.nowait);
    let Some(notes) = request.notes.filter(|notes| can && notes.is_in_order()) else {
        return false;
    };
    let Ok(stat) = Stat::of(file) else { return false };
    let size = usize::try_from(stat.size).unwrap_or(usize::MAX);
    (1..=STORE_BYTES_MAX).contains(&size) && put(notes, file, request.nodeid, size)
}

fn put(notes: &Notes, file: &OpenFile, nodeid: u64, size: usize) -> bool {
    notes.store(|content| {
        let head = NotifyStoreOut { nodeid, offset: 0, size: size as u32, padding: 0 };
        content.extend_from_slice(head.as_bytes());
        let at = content.len();
        content.resize(at + size, 0);
        matches!(file.read_cached(&mut content[at..], 0), Cached::All(read) if read == size)
    })
}
