//! Frames that no kernel would send, into the dispatch of a real share: whatever the bytes, an
//! answer or an errno, never a panic; nothing outside of the share is touched or reached, and what
//! the session holds stays within its bounds and goes with it. RINGFS_FUZZ_SECONDS says for how
//! long (5), RINGFS_FUZZ_SEED from where.

use ringfs_server::decide::{Claims, Verdict};
use ringfs_server::dispatch::{Request, Route};
use ringfs_server::fs::{Fs, FsOptions};
use ringfs_server::ring_sim::Rng;
use ringfs_wire::abi::{self, Opcode};
use ringfs_wire::table::Past;
use rustix::io::Errno;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

const NODES_MAX: usize = 300;
const HANDLES_MAX: usize = 60;

const NAMES: &[&[u8]] = &[
    b"a",
    b"b",
    b"dir",
    b"out",
    b"up",
    b"etc",
    b"deep",
    b"",
    b".",
    b"..",
    b"a/b",
    b"../outside",
    b"/etc/passwd",
    b"\xff\xfe",
    b"x y",
    b"dir/../../outside",
    b"proc",
];

/// What the guest was given, so that frames are about something.
#[derive(Default)]
struct Known {
    nodes: Vec<u64>,
    handles: Vec<(u64, u64)>,
}

fn share_in(root: &Path) {
    let share = root.join("share");
    std::fs::create_dir_all(share.join("dir/deep")).expect("mkdir");
    std::fs::create_dir(root.join("outside")).expect("mkdir");
    std::fs::write(root.join("outside/secret"), b"secret").expect("write");
    std::fs::write(share.join("a"), vec![7; 10_000]).expect("write");
    std::fs::write(share.join("dir/b"), b"b").expect("write");
    symlink(root.join("outside"), share.join("out")).expect("link");
    symlink("..", share.join("up")).expect("link");
    symlink("/etc", share.join("etc")).expect("link");
    symlink("/proc/self/root", share.join("proc")).expect("link");
}

/// All that a stat tells of what lies outside.
fn outside(root: &Path) -> Vec<(String, u64, u32, u32, i64, i64, u64)> {
    let mut found = Vec::new();
    for path in ["", "outside", "outside/secret"] {
        let meta = std::fs::symlink_metadata(root.join(path)).expect("outside is there");
        let (mtime, ctime) = (meta.mtime_nsec(), meta.ctime_nsec());
        let stat = (meta.size(), meta.mode(), meta.uid(), mtime, ctime, meta.nlink());
        found.push((path.to_owned(), stat.0, stat.1, stat.2, stat.3, stat.4, stat.5));
    }
    let names = |dir: &str| std::fs::read_dir(root.join(dir)).expect("readable").count() as u64;
    found.push(("names".into(), names(""), 0, 0, 0, 0, names("outside")));
    found
}

fn devices(dir: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let each = entries.flatten().map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => devices(&entry.path()),
        Ok(kind) => usize::from(kind.is_char_device() || kind.is_block_device()),
        Err(_) => 0,
    });
    each.sum()
}

fn pick(rng: &mut Rng, from: &[u64]) -> u64 {
    match rng.below(10) {
        0 => [0, 1, 2, u64::MAX, 1 << 63][rng.below(5)],
        1..4 => 1,
        _ if from.is_empty() => 1,
        _ => from[rng.below(from.len())],
    }
}

fn name(rng: &mut Rng) -> Vec<u8> {
    let mut name = match rng.below(20) {
        0 => vec![b'n'; 1 + rng.below(400)],
        1 => format!("f{}", rng.below(1000)).into_bytes(),
        _ => NAMES[rng.below(NAMES.len())].to_vec(),
    };
    name.push(0);
    name
}

/// A number as a hostile guest would choose it, or a sensible one.
fn number(rng: &mut Rng) -> u64 {
    match rng.below(6) {
        0 => [u64::MAX, i64::MAX as u64, 1 << 40, u64::from(u32::MAX)][rng.below(4)],
        1 => 0,
        2 => rng.below(1 << 20) as u64,
        _ => rng.below(5000) as u64,
    }
}

/// Arguments of about the right shape: a length that fits the opcode, fields of use, and noise.
fn args(rng: &mut Rng, opcode: u32, fh: u64, known: &Known) -> Vec<u8> {
    let mut args: Vec<u8>;
    // No file grows past what a test may take on the disk: these two allocate for real.
    let len = number(rng).min(1 << 16);
    match Opcode::from_u32(opcode) {
        Some(Opcode::Lookup | Opcode::Unlink | Opcode::Rmdir | Opcode::Removexattr) => {
            args = name(rng);
        }
        Some(Opcode::Symlink) => args = [name(rng), name(rng)].concat(),
        Some(Opcode::Mknod) => {
            let kind = [libc::S_IFREG, libc::S_IFCHR, libc::S_IFBLK, libc::S_IFIFO, libc::S_IFDIR];
            let mode = kind[rng.below(5)] | rng.below(0o10000) as u32;
            args = abi::MknodIn { mode, rdev: 0x103, ..Default::default() }.as_bytes().to_vec();
            args.extend(name(rng));
        }
        Some(Opcode::Mkdir) => {
            args = abi::MkdirIn { mode: 0o755, umask: rng.below(512) as u32 }.as_bytes().to_vec();
            args.extend(name(rng));
        }
        Some(Opcode::Rename | Opcode::Link) => {
            args = pick(rng, &known.nodes).to_le_bytes().to_vec();
            args.extend([name(rng), name(rng)].concat());
        }
        Some(Opcode::Rename2) => {
            let newdir = pick(rng, &known.nodes);
            let flags = rng.below(8) as u32;
            args = abi::Rename2In { newdir, flags, padding: 0 }.as_bytes().to_vec();
            args.extend([name(rng), name(rng)].concat());
        }
        Some(Opcode::Open | Opcode::Opendir) => {
            let flags = [0, 1, 2, 3, libc::O_TRUNC, libc::O_PATH, -1][rng.below(7)] as u32;
            args = abi::OpenIn { flags, open_flags: 0 }.as_bytes().to_vec();
        }
        Some(Opcode::Create | Opcode::Tmpfile) => {
            let flags = [libc::O_RDWR | libc::O_CREAT, libc::O_EXCL | 2, -1][rng.below(3)] as u32;
            let create = abi::CreateIn { flags, mode: 0o644, umask: 0, open_flags: 0 };
            args = [create.as_bytes(), &name(rng)].concat();
        }
        Some(Opcode::Write) => {
            let data = vec![rng.below(256) as u8; rng.below(5000)];
            let size = if rng.one_of(900) { data.len() as u32 } else { number(rng) as u32 };
            let offset = number(rng).min(1 << 30);
            let write = abi::WriteIn { fh, offset, size, ..Default::default() };
            args = [write.as_bytes(), &data].concat();
        }
        Some(Opcode::Read | Opcode::Readdir | Opcode::Readdirplus) => {
            let (offset, size) = (number(rng), number(rng) as u32);
            args = abi::ReadIn { fh, offset, size, ..Default::default() }.as_bytes().to_vec();
        }
        Some(Opcode::Setattr) => {
            let valid = rng.below(1 << 12) as u32;
            let mode = rng.below(0o10000) as u32;
            let (size, atime) = (number(rng), number(rng));
            let (uid, gid) = (number(rng) as u32, number(rng) as u32);
            let mut set = abi::SetattrIn { valid, fh, size, mode, ..Default::default() };
            (set.uid, set.gid, set.atime, set.atimensec) = (uid, gid, atime, number(rng) as u32);
            args = set.as_bytes().to_vec();
        }
        Some(Opcode::Fallocate) => {
            let (offset, length, mode) = (len, len, rng.below(128) as u32);
            let ask = abi::FallocateIn { fh, offset, length, mode, padding: 0 };
            return ask.as_bytes().to_vec();
        }
        Some(Opcode::CopyFileRange | Opcode::CopyFileRange64) => {
            let to = known.handles.get(rng.below(known.handles.len() + 1));
            let (nodeid_out, fh_out) = to.copied().unwrap_or((1, fh));
            let (off_in, off_out, flags) = (number(rng), number(rng), 0);
            let len = len.min(4096);
            let ask =
                abi::CopyFileRangeIn { fh_in: fh, off_in, nodeid_out, fh_out, off_out, len, flags };
            return ask.as_bytes().to_vec();
        }
        Some(Opcode::Setxattr) => {
            let size = rng.below(300) as u32;
            args = abi::SetxattrIn { size, flags: rng.below(4) as u32 }.as_bytes().to_vec();
            args.extend([b"user.x\0".to_vec(), vec![1; rng.below(300)]].concat());
        }
        Some(Opcode::Getxattr | Opcode::Listxattr) => {
            args = abi::GetxattrIn { size: number(rng) as u32, padding: 0 }.as_bytes().to_vec();
            args.extend(b"user.x\0");
        }
        _ => {
            args = fh.to_le_bytes().to_vec();
            args.extend((0..rng.below(80)).map(|_| rng.below(256) as u8));
        }
    }
    // Damage, but not to the offsets and lengths that were bounded above.
    if rng.one_of(150) && !args.is_empty() {
        match rng.below(3) {
            0 => args.truncate(rng.below(args.len())),
            1 => args.extend((0..rng.below(50)).map(|_| rng.below(256) as u8)),
            _ => {
                let at = rng.below(args.len().min(8));
                args[at] = rng.below(256) as u8;
            }
        }
    }
    args
}

fn frame(rng: &mut Rng, known: &Known) -> (u32, u64, Vec<u8>) {
    let opcode = match rng.below(20) {
        0 => rng.below(80) as u32,
        1 => [0, u32::MAX, 4096, 7, 19][rng.below(5)],
        _ => Opcode::ALL[rng.below(Opcode::ALL.len())] as u32,
    };
    let handle = match rng.below(4) {
        0 => (pick(rng, &known.nodes), number(rng)),
        _ if known.handles.is_empty() => (pick(rng, &known.nodes), 0),
        _ => known.handles[rng.below(known.handles.len())],
    };
    let by_handle = [15, 16, 18, 20, 25, 28, 29, 30, 43, 44, 46, 47, 53].contains(&opcode);
    let nodeid = if by_handle { handle.0 } else { pick(rng, &known.nodes) };
    let args = args(rng, opcode, handle.1, known);
    let mut body = nodeid.to_le_bytes().to_vec();
    let ids = [0, 0, 1000, 65534, u32::MAX];
    let (uid, gid, pid) = (ids[rng.below(5)], ids[rng.below(5)], 1u32);
    body.extend([uid, gid, pid].iter().flat_map(|word| word.to_le_bytes()));
    let ext = if rng.one_of(100) { rng.below(40) as u16 } else { 0 };
    body.extend(ext.to_le_bytes());
    body.extend([0; 2]);
    body.extend(args);
    if ext > 0 && rng.one_of(700) {
        body.extend((0..usize::from(ext) * 8).map(|_| rng.below(40) as u8));
    }
    (opcode, nodeid, body)
}

/// Remembers what a reply gave.
fn learn(known: &mut Known, opcode: u32, nodeid: u64, reply: &[u8]) {
    let entry = abi::EntryOut::read_from_prefix(reply);
    match (Opcode::from_u32(opcode), entry) {
        (
            Some(Opcode::Lookup | Opcode::Mkdir | Opcode::Mknod | Opcode::Symlink | Opcode::Link),
            Ok((entry, _)),
        ) => known.nodes.push(entry.nodeid),
        (Some(Opcode::Create | Opcode::Tmpfile), Ok((entry, rest))) => {
            known.nodes.push(entry.nodeid);
            let opened = abi::OpenOut::read_from_bytes(rest).expect("OpenOut");
            known.handles.push((entry.nodeid, opened.fh));
        }
        (Some(Opcode::Open | Opcode::Opendir), _) => {
            let opened = abi::OpenOut::read_from_bytes(reply).expect("OpenOut");
            known.handles.push((nodeid, opened.fh));
        }
        _ => {}
    }
    if known.nodes.len() > 400 {
        known.nodes.drain(..100);
    }
}

/// As if a daemon that died had begun it, and left what it liked.
fn recovered(
    fs: &Fs,
    rng: &mut Rng,
    request: &Request<'_>,
    out: &mut [u8],
) -> Result<usize, Errno> {
    let intent = fs.intent(request).map(|mut intent| {
        intent.target.ino *= rng.below(2) as u64;
        intent.other.ino *= rng.below(2) as u64;
        intent.when *= rng.below(2) as u64;
        intent.size = intent.size.saturating_sub(if rng.one_of(500) { number(rng) } else { 0 });
        intent
    });
    let reply: Vec<u8> = match rng.below(3) {
        0 => (0..rng.below(160)).map(|_| rng.below(256) as u8).collect(),
        1 => out.iter().take(160).copied().collect(),
        _ => vec![0xff; 128],
    };
    let past = if rng.one_of(500) { Past::Done(&reply) } else { Past::Running };
    match fs.decide(request, past, intent.as_ref(), &Claims::default(), out) {
        Verdict::Done(len) => Ok(len),
        Verdict::NotRun => fs.execute(request, out),
        Verdict::Unknown => Err(Errno::IO),
    }
}

/// One frame, as a shard would take it.
fn step(fs: &Fs, rng: &mut Rng, known: &mut Known, out: &mut [u8]) -> bool {
    let (opcode, nodeid, body) = frame(rng, known);
    if opcode == Opcode::Syncfs as u32 && !rng.one_of(5) {
        return false;
    }
    let Some(request) = Request::parse(opcode, &body) else { return false };
    let bytes_max = fs.reply_bytes_max(&request);
    assert!(bytes_max <= 1 << 20);
    let route = fs.route(&request);
    match &route {
        Route::Read { len, .. } => assert!(*len as usize <= bytes_max),
        Route::Write { payload, .. } => assert!(request.args.get(payload.clone()).is_some()),
        _ => {}
    }
    drop(route);
    // Just the room that was promised to be enough, and a guard behind it.
    out[bytes_max..bytes_max + 8].fill(0xA5);
    let result = match rng.below(4) {
        0 => recovered(fs, rng, &request, &mut out[..bytes_max]),
        _ => fs.execute(&request, &mut out[..bytes_max]),
    };
    assert!(out[bytes_max..bytes_max + 8].iter().all(|&byte| byte == 0xA5));
    // copy_file_range(2) says EOVERFLOW by itself, of offsets that run past the end of all numbers.
    let copies = [Opcode::CopyFileRange as u32, Opcode::CopyFileRange64 as u32];
    if !copies.contains(&opcode) {
        assert_ne!(result, Err(rustix::io::Errno::OVERFLOW), "the bound of {opcode} is too low");
    }
    if let Ok(len) = result {
        assert!(len <= bytes_max);
        learn(known, opcode, nodeid, &out[..len]);
    }
    if rng.one_of(30) && !known.nodes.is_empty() {
        let id = known.nodes.swap_remove(rng.below(known.nodes.len()));
        fs.forget(std::iter::once((id, number(rng))));
    }
    if known.handles.len() > 40 {
        let (node, fh) = known.handles.swap_remove(0);
        let release = abi::ReleaseIn { fh, ..Default::default() };
        let body = [&node.to_le_bytes()[..], &[0; 16], release.as_bytes()].concat();
        for opcode in [Opcode::Release, Opcode::Releasedir] {
            let request = Request::parse(opcode as u32, &body).expect("long enough");
            let _ = fs.execute(&request, out);
        }
    }
    let counts = fs.counts();
    assert!(counts.nodes <= NODES_MAX && counts.handles <= HANDLES_MAX, "{counts:?}");
    result.is_ok()
}

fn fds() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("proc").count()
}

/// The root's directory entries' inode number as the guest sees them must never be the outside's.
fn secret_is_not_reached(fs: &Fs, known: &Known, root: &Path) {
    let secret = std::fs::metadata(root.join("outside/secret")).expect("there").ino();
    let directory = std::fs::metadata(root.join("outside")).expect("there").ino();
    let mut out = [0; 200];
    for &node in &known.nodes {
        let body = [&node.to_le_bytes()[..], &[0; 16], &[0; 16]].concat();
        let request = Request::parse(Opcode::Getattr as u32, &body).expect("long enough");
        let Ok(len) = fs.execute(&request, &mut out) else { continue };
        let attr = abi::AttrOut::read_from_bytes(&out[..len]).expect("AttrOut").attr;
        assert!(attr.ino != secret && attr.ino != directory, "the guest is outside");
    }
}

fn run(seed: u64, steps: usize, options: FsOptions, out: &mut [u8]) -> usize {
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    share_in(place.path());
    let read_only = options.read_only;
    let before = (outside(place.path()), fds());
    let fs = Fs::new(&place.path().join("share"), options).expect("a file system");
    let (mut rng, mut known) = (Rng::new(seed), Known::default());
    let served = (0..steps).filter(|_| step(&fs, &mut rng, &mut known, out)).count();
    secret_is_not_reached(&fs, &known, place.path());
    drop(fs);
    assert_eq!((outside(place.path()), fds()), before, "seed {seed}: outside, or fds");
    assert_eq!(devices(&place.path().join("share")), 0, "seed {seed}: a device node was made");
    if read_only {
        let same = std::fs::read(place.path().join("share/a")).expect("there") == vec![7; 10_000];
        assert!(same, "seed {seed}: a read-only share was changed");
    }
    served
}

#[test]
fn no_frame_breaks_the_dispatch() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let seconds = number("RINGFS_FUZZ_SECONDS").unwrap_or(5);
    let first: u64 = number("RINGFS_FUZZ_SEED").unwrap_or(1);
    let options =
        FsOptions { nodes_max: NODES_MAX, handles_max: HANDLES_MAX, ..FsOptions::default() };
    let mut out = vec![0; (1 << 20) + 8];
    let start = Instant::now();
    let (mut rounds, mut served) = (0u64, 0);
    const STEPS: usize = 1500;
    while start.elapsed() < Duration::from_secs(seconds) {
        let seed = first + rounds;
        println!("RINGFS_FUZZ_SEED={seed}");
        let read_only = seed.is_multiple_of(5);
        let direct_io = seed.is_multiple_of(3);
        served += run(seed, STEPS, FsOptions { read_only, direct_io, ..options.clone() }, &mut out);
        rounds += 1;
    }
    println!("{rounds} rounds of {STEPS} frames, {served} served");
    assert!(served as u64 > rounds * STEPS as u64 / 20, "hardly a frame was served: {served}");
}
