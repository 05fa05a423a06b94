//! Random requests, most of them well formed, some with a wrong bit: no panic, no bound exceeded,
//! nothing outside the share touched. The share is a small tmpfs, so that a wrong length cannot
//! fill the disk.

use std::collections::BTreeMap;
use std::path::Path;

use ringfs_server::dispatch::Request;
use ringfs_server::fs::FsOptions;
use ringfs_wire::abi::{self, Opcode};
use zerocopy::IntoBytes;

use crate::support::{Guest, Lcg, Mounted, ROOT, is_root, listed, named};

const ROUNDS: u32 = 200_000;
const NAMES: [&[u8]; 9] =
    [b"a", b"b", b"c", b"dir", b"sub", b"x", b"y", b"\xff\xfe", b"name of no great length"];
const HOSTILE_NAMES: [&[u8]; 5] = [b"..", b".", b"../x", b"/", b""];

/// What a guest holds, and how it makes requests of it.
struct Player {
    random: Lcg,
    /// Node ids, once for each count.
    nodes: Vec<u64>,
    /// Open files and directories with their nodes.
    files: Vec<(u64, u64)>,
    dirs: Vec<(u64, u64)>,
}

impl Player {
    fn below(&mut self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    fn node(&mut self) -> u64 {
        let at = self.below(self.nodes.len() as u64 + 4) as usize;
        self.nodes.get(at).copied().unwrap_or(ROOT)
    }

    fn held(&mut self, dirs: bool) -> (u64, u64) {
        let count = if dirs { self.dirs.len() } else { self.files.len() };
        let at = self.below(count as u64 + 1) as usize;
        let held = if dirs { &self.dirs } else { &self.files };
        held.get(at).copied().unwrap_or((ROOT, 7))
    }

    fn name(&mut self) -> &'static [u8] {
        if self.below(40) == 0 {
            return HOSTILE_NAMES[self.below(HOSTILE_NAMES.len() as u64) as usize];
        }
        NAMES[self.below(NAMES.len() as u64) as usize]
    }

    /// Small mostly, sometimes at an edge.
    fn offset(&mut self) -> u64 {
        match self.below(12) {
            0 => u64::MAX - self.below(4096),
            1 => i64::MAX as u64 - self.below(4096),
            2 => 1 << self.below(64),
            _ => self.below(100_000),
        }
    }

    fn bits(&mut self) -> u32 {
        self.random.next() as u32 & self.random.next() as u32
    }

    /// Opcode, node id, arguments.
    fn request(&mut self) -> (u32, u64, Vec<u8>) {
        use Opcode as Op;
        let opcode = Opcode::ALL[self.below(Opcode::ALL.len() as u64) as usize];
        let (name, other) = (self.name(), self.name());
        let node = self.node();
        let (mode, umask) = (self.bits() & 0o7777, 0o022);
        let mut on = node;
        let args = match opcode {
            Op::Lookup | Op::Unlink | Op::Rmdir => named(&[], name),
            Op::Mkdir => named(abi::MkdirIn { mode: mode | 0o700, umask }.as_bytes(), name),
            Op::Mknod => {
                let mode = mode | (self.below(16) as u32) << 12;
                let rdev = self.bits();
                named(abi::MknodIn { mode, rdev, umask, padding: 0 }.as_bytes(), name)
            }
            Op::Create | Op::Tmpfile => {
                let flags = self.open_flags();
                let open_flags = self.below(2) as u32;
                named(abi::CreateIn { flags, mode, umask, open_flags }.as_bytes(), name)
            }
            Op::Open | Op::Opendir => {
                abi::OpenIn { flags: self.open_flags(), open_flags: self.below(2) as u32 }
                    .as_bytes()
                    .to_vec()
            }
            Op::Symlink => named(&named(&[], name), other),
            Op::Link => named(abi::LinkIn { oldnodeid: self.node() }.as_bytes(), name),
            Op::Rename => {
                let head = abi::RenameIn { newdir: self.node() };
                named(&named(head.as_bytes(), name), other)
            }
            Op::Rename2 => {
                let head =
                    abi::Rename2In { newdir: self.node(), flags: self.below(5) as u32, padding: 0 };
                named(&named(head.as_bytes(), name), other)
            }
            Op::Setattr => self.setattr(),
            Op::Setxattr => {
                let value = vec![b'v'; self.below(300) as usize];
                let head = abi::SetxattrIn { size: value.len() as u32, flags: 0 };
                [&named(head.as_bytes(), b"user.x")[..], &value].concat()
            }
            Op::Getxattr => {
                let size = (self.below(3) as u32).wrapping_mul(self.bits());
                named(abi::GetxattrIn { size, padding: 0 }.as_bytes(), b"user.x")
            }
            Op::Removexattr => named(&[], b"user.x"),
            _ => {
                let (owner, args) = self.on_handle(opcode);
                on = owner.unwrap_or(node);
                args
            }
        };
        (opcode as u32, on, args)
    }

    fn open_flags(&mut self) -> u32 {
        let one_bit = if self.below(3) == 0 { 1 << self.below(24) } else { 0 };
        self.below(3) as u32 | one_bit
    }

    fn setattr(&mut self) -> Vec<u8> {
        let setattr = abi::SetattrIn {
            valid: self.bits() & 0xfff,
            fh: self.held(false).1,
            size: self.offset(),
            atime: self.offset(),
            mtime: self.offset(),
            mode: self.bits() & 0o7777 | 0o600,
            uid: self.below(3) as u32,
            gid: self.below(3) as u32,
            ..Default::default()
        };
        setattr.as_bytes().to_vec()
    }

    /// Requests about an open file: its node, and the arguments.
    fn on_handle(&mut self, opcode: Opcode) -> (Option<u64>, Vec<u8>) {
        use Opcode as Op;
        let dirs = matches!(opcode, Op::Readdir | Op::Readdirplus | Op::Releasedir | Op::Fsyncdir);
        let (owner, fh) = self.held(dirs);
        let (offset, size) = (self.offset(), self.below(70_000) as u32);
        let args = match opcode {
            Op::Read | Op::Readdir | Op::Readdirplus => {
                let offset = if dirs { self.below(2) * offset } else { offset };
                abi::ReadIn { fh, offset, size, ..Default::default() }.as_bytes().to_vec()
            }
            Op::Write => {
                let payload = vec![b'w'; self.below(9000) as usize];
                let size = payload.len() as u32;
                let write_flags = self.below(8) as u32;
                let head = abi::WriteIn { fh, offset, size, write_flags, ..Default::default() };
                [head.as_bytes(), &payload].concat()
            }
            Op::Fallocate => {
                let (length, mode) = (self.offset(), self.below(32) as u32);
                abi::FallocateIn { fh, offset, length, mode, padding: 0 }.as_bytes().to_vec()
            }
            Op::Lseek => {
                let whence = self.below(6) as u32;
                abi::LseekIn { fh, offset, whence, padding: 0 }.as_bytes().to_vec()
            }
            Op::CopyFileRange | Op::CopyFileRange64 => {
                let (nodeid_out, fh_out) = self.held(false);
                let (off_out, len, off_in) = (self.offset(), self.offset(), offset);
                let flags = self.below(20) / 19;
                let ask = abi::CopyFileRangeIn {
                    fh_in: fh,
                    off_in,
                    nodeid_out,
                    fh_out,
                    off_out,
                    len,
                    flags,
                };
                ask.as_bytes().to_vec()
            }
            Op::Getattr | Op::Statx => {
                let flags = self.below(2) as u32;
                let ask = abi::StatxIn {
                    getattr_flags: flags,
                    fh,
                    sx_mask: self.bits(),
                    sx_flags: self.bits(),
                    ..Default::default()
                };
                return ((flags == 1).then_some(owner), ask.as_bytes().to_vec());
            }
            Op::Access | Op::Statfs | Op::Readlink | Op::Listxattr => {
                return (None, self.bits().to_le_bytes().repeat(2));
            }
            // Closing is rare, so that enough is open.
            Op::Release | Op::Releasedir if self.below(3) != 0 => return (None, vec![0; 24]),
            _ => [&fh.to_le_bytes()[..], &[0; 40]].concat(),
        };
        (Some(owner), args)
    }

    /// Remembers what a reply gave, and what a request took.
    fn learn(&mut self, request: &Request<'_>, reply: &[u8]) {
        use Opcode as Op;
        let word = |bytes: &[u8], at: usize| {
            let word = bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            word.map_or(0, u64::from_le_bytes)
        };
        match Opcode::from_u32(request.opcode) {
            Some(Op::Lookup | Op::Mkdir | Op::Mknod | Op::Symlink | Op::Link) => {
                self.nodes.push(word(reply, 0));
            }
            Some(Op::Create | Op::Tmpfile) => {
                self.nodes.push(word(reply, 0));
                self.files.push((word(reply, 0), word(reply, 128)));
            }
            Some(Op::Open) => self.files.push((request.nodeid, word(reply, 0))),
            Some(Op::Opendir) => self.dirs.push((request.nodeid, word(reply, 0))),
            Some(Op::Readdirplus) => {
                let given = listed(reply, true).into_iter().map(|entry| entry.nodeid);
                self.nodes.extend(given.filter(|&id| id != 0));
            }
            Some(Op::Release) => {
                self.files.retain(|&held| held != (request.nodeid, word(request.args, 0)));
            }
            Some(Op::Releasedir) => {
                self.dirs.retain(|&held| held != (request.nodeid, word(request.args, 0)));
            }
            _ => {}
        }
    }

    /// Gives back all but a few, as a kernel short of memory does.
    fn shrink(&mut self, guest: &Guest, keep: usize) {
        for (id, fh) in self.files.drain(keep.min(self.files.len())..) {
            guest.release(id, fh).expect("ours");
        }
        for (id, fh) in self.dirs.drain(keep.min(self.dirs.len())..) {
            guest.releasedir(id, fh).expect("ours");
        }
        let keep = keep.min(self.nodes.len());
        guest.fs.forget(self.nodes.drain(keep..).map(|id| (id, 1)));
    }
}

/// Runs one request as a session would.
fn run(guest: &Guest, request: &Request<'_>) -> Option<Vec<u8>> {
    drop(guest.fs.route(request));
    let mut out = vec![0; guest.fs.reply_bytes_max(request)];
    assert!(out.len() <= 1 << 20);
    let used = guest.fs.execute(request, &mut out).ok()?;
    assert!(used <= out.len());
    out.truncate(used);
    Some(out)
}

#[test]
fn random_requests_do_no_harm() {
    let outer = tempfile::tempdir().expect("directory");
    let share = outer.path().join("share");
    std::fs::create_dir(&share).expect("host");
    std::fs::write(outer.path().join("x"), b"untouched").expect("host");
    let mounted = is_root().then(|| Mounted::tmpfs(share.clone()));
    play(outer.path(), &share, mounted.is_some());
}

fn play(outer: &Path, share: &Path, may_allocate: bool) {
    let options =
        FsOptions { nodes_max: 200, handles_max: 40, device_nodes: true, ..FsOptions::default() };
    let guest = Guest::new(share, options);
    let before = guest.fs.counts();
    let mut player = Player { random: Lcg(20_261_123), nodes: vec![], files: vec![], dirs: vec![] };
    let mut worked: BTreeMap<u32, u32> = BTreeMap::new();
    for _ in 0..ROUNDS {
        let (opcode, nodeid, args) = player.request();
        let mut body = guest.body(nodeid, &args, &[]);
        let mutated = player.below(8) == 0;
        if mutated && player.below(4) == 0 {
            body.truncate(player.below(body.len() as u64 + 1) as usize);
        } else if mutated {
            let at = player.below(body.len() as u64) as usize;
            body[at] ^= 1 << player.below(8);
        }
        let skipped = [Opcode::Syncfs, Opcode::Forget, Opcode::BatchForget];
        let allocates = opcode == Opcode::Fallocate as u32 && !may_allocate;
        // SYNCFS flushes the machine's disks; a mutated FORGET is for the other tests.
        if allocates || skipped.iter().any(|&skip| skip as u32 == opcode) {
            continue;
        }
        if let Some(request) = Request::parse(opcode, &body)
            && let Some(reply) = run(&guest, &request)
        {
            *worked.entry(opcode).or_default() += 1;
            player.learn(&request, &reply);
        }
        let counts = guest.fs.counts();
        assert!(counts.nodes <= 200 && counts.handles <= 40, "{counts:?}");
        if counts.nodes > 180 || counts.handles > 36 {
            player.shrink(&guest, 10);
        }
    }
    player.shrink(&guest, 0);
    assert_eq!(guest.fs.counts(), before, "all that was given came back");
    // All that can succeed has done so, many times.
    let never = [
        Opcode::Forget,
        Opcode::BatchForget,
        Opcode::Getlk,
        Opcode::Setlk,
        Opcode::Setlkw,
        Opcode::Bmap,
        Opcode::Poll,
        Opcode::Ioctl,
        Opcode::Setupmapping,
        Opcode::Removemapping,
        Opcode::Syncfs,
        Opcode::Init,
        Opcode::Fallocate,
    ];
    for &opcode in Opcode::ALL.iter().filter(|opcode| !never.contains(opcode)) {
        let times = worked.get(&(opcode as u32)).copied().unwrap_or(0);
        assert!(times > 20, "{opcode:?} worked {times} times: {worked:?}");
    }
    let left = std::fs::read_dir(outer).expect("host").count();
    assert_eq!(left, 2, "nothing appeared beside the share");
    assert_eq!(std::fs::read(outer.join("x")).expect("host"), b"untouched");
    assert_eq!(rustix::process::geteuid(), rustix::process::getuid());
}
