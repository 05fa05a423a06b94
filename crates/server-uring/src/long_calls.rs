//! Calls that keep an inode's lock for long, of all sessions of a share: on tmpfs FALLOCATE and
//! truncation of a huge file, half a second a GiB.
//!
//! They run in the pool, but whoever wants that lock meanwhile sleeps as long: who writes to the
//! file or changes it; who removes it, with its directory's lock; and who then looks a name up
//! there. So while there are any, whatever may want such a lock goes to the pool too.
//!
//! Invariant: a call counts from when it is queued, before any thread can have the lock. On a disk
//! nothing is counted: what changes a file runs in the pool there, or in the ring. It must not look
//! at files.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many there are.
#[derive(Debug, Default)]
pub struct LongCalls(AtomicUsize);

impl LongCalls {
    /// Whether there is one.
    pub fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// One more, until what is given is dropped.
    pub fn begin(self: &Arc<Self>) -> LongCall {
        self.0.fetch_add(1, Ordering::Relaxed);
        LongCall(Arc::clone(self))
    }
}

/// One of them.
#[derive(Debug)]
pub struct LongCall(Arc<LongCalls>);

impl Drop for LongCall {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use crate::dispatch::{Request, Route};
    use crate::fs::{Fs, FsOptions};
    use ringfs_wire::abi::{self, Opcode, fattr};
    use zerocopy::{FromBytes, IntoBytes};

    const ROOT: u64 = abi::FUSE_ROOT_ID;

    fn body(node: u64, args: &[u8]) -> Vec<u8> {
        [&node.to_le_bytes()[..], &[0; 16], args].concat()
    }

    /// A session with an open file: its node and handle.
    fn session(dir: &std::path::Path, options: FsOptions) -> (Fs, u64, u64) {
        let fs = Fs::new(dir, options).expect("a session");
        let flags = libc::O_RDWR as u32;
        let create = abi::CreateIn { flags, mode: 0o100_644, umask: 0, open_flags: 0 };
        let body = body(ROOT, &[create.as_bytes(), b"file\0"].concat());
        let request = Request::parse(Opcode::Create as u32, &body).expect("a request");
        let mut out = vec![0; fs.reply_bytes_max(&request)];
        fs.execute(&request, &mut out).expect("a file");
        let (entry, rest) = abi::EntryOut::read_from_prefix(&out).expect("an entry");
        let opened = abi::OpenOut::read_from_prefix(rest).expect("opened").0;
        (fs, entry.nodeid, opened.fh)
    }

    /// Which of the requests run in the pool, in the order of [`NAMES`].
    fn in_pool((fs, node, fh): &(Fs, u64, u64)) -> Vec<&'static str> {
        let (node, fh) = (*node, *fh);
        let write = abi::WriteIn { fh, size: 1, ..Default::default() };
        let mode = abi::SetattrIn { valid: fattr::MODE, mode: 0o600, ..Default::default() };
        let read = abi::ReadIn { fh, size: 1, ..Default::default() };
        let lseek = abi::LseekIn { fh, whence: 3, ..Default::default() };
        let requests: [(&str, Opcode, u64, Vec<u8>); 8] = [
            ("write", Opcode::Write, node, [write.as_bytes(), b"x"].concat()),
            ("setattr", Opcode::Setattr, node, mode.as_bytes().to_vec()),
            ("unlink", Opcode::Unlink, ROOT, b"file\0".to_vec()),
            ("lookup", Opcode::Lookup, ROOT, b"file\0".to_vec()),
            ("lseek", Opcode::Lseek, node, lseek.as_bytes().to_vec()),
            ("read", Opcode::Read, node, read.as_bytes().to_vec()),
            ("getattr", Opcode::Getattr, node, abi::GetattrIn::default().as_bytes().to_vec()),
            ("statx", Opcode::Statx, node, abi::StatxIn::default().as_bytes().to_vec()),
        ];
        let pooled = requests.iter().filter(|(_, opcode, node, args)| {
            let body = body(*node, args);
            let request = Request::parse(*opcode as u32, &body).expect("a request");
            matches!(fs.route(&request), Route::Pool)
        });
        pooled.map(|(name, ..)| *name).collect()
    }

    #[test]
    fn what_may_want_the_lock_of_a_long_call_runs_in_the_pool() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a temporary directory");
        let options = FsOptions::default();
        let foe = session(dir.path(), options.clone());
        // Another guest of the share, and one of another share.
        let friend = session(dir.path(), options);
        let other = session(dir.path(), FsOptions::default());
        // LSEEK wants the lock on a disk too, where nothing is counted.
        assert_eq!(in_pool(&friend), ["lseek"]);
        let ask = abi::FallocateIn { fh: foe.2, length: 1, ..Default::default() };
        let fallocate = body(foe.1, ask.as_bytes());
        let ask = abi::SetattrIn { valid: fattr::SIZE, size: 0, ..Default::default() };
        let truncate = body(foe.1, ask.as_bytes());
        let ask = abi::OpenIn { flags: (libc::O_RDWR | libc::O_TRUNC) as u32, open_flags: 0 };
        let open = body(foe.1, ask.as_bytes());
        for (opcode, body) in
            [(Opcode::Fallocate, fallocate), (Opcode::Setattr, truncate), (Opcode::Open, open)]
        {
            let request = Request::parse(opcode as u32, &body).expect("a request");
            let long = foe.0.long_call(&request).expect("a long call");
            for guest in [&foe, &friend] {
                let expected = ["write", "setattr", "unlink", "lookup", "lseek"];
                assert_eq!(in_pool(guest), expected, "{opcode:?}");
            }
            assert_eq!(in_pool(&other), ["lseek"]);
            drop(long);
            assert_eq!(in_pool(&friend), ["lseek"]);
        }
    }
}
