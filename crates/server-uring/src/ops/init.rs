//! INIT, DESTROY, and the answers to what is not served.

use std::sync::atomic::Ordering;

use ringfs_wire::abi::{self, init as flag};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::dispatch::{IO_BYTES_MAX, Request};
use crate::fs::{CacheMode, Fs};
use crate::reply::put;

/// Pages of a request, as many as [`IO_BYTES_MAX`] has.
const MAX_PAGES: u16 = 256;
/// The least that a guest's page has.
const PAGE_BYTES: u32 = 4096;
const READAHEAD_BYTES_MAX: u32 = 1 << 20;
/// RELEASE, readahead and writeback are background requests: a low bound makes closes pile up.
const MAX_BACKGROUND: u16 = 512;
const CONGESTION_THRESHOLD: u16 = 384;

/// Flags that every share wants where the kernel has them.
///
/// Not wanted, and why: EXPORT_SUPPORT (`..` is never looked up), POSIX_LOCKS and FLOCK_LOCKS
/// (locks are the guest kernel's own), NO_OPEN_SUPPORT (the host must see opens), SETXATTR_EXT and
/// SECURITY_CTX (the crate cannot parse them), ATOMIC_O_TRUNC (the OPEN is sent before the kernel
/// looks whether the file is being executed: ETXTBSY would come when all is lost).
const WANTED: u64 = flag::ASYNC_READ
    | flag::BIG_WRITES
    | flag::DO_READDIRPLUS
    | flag::READDIRPLUS_AUTO
    | flag::ASYNC_DIO
    | flag::PARALLEL_DIROPS
    | flag::HANDLE_KILLPRIV_V2
    | flag::MAX_PAGES
    | flag::INIT_EXT
    | flag::CREATE_SUPP_GROUP
    // Files that bypass the cache (all in two cache modes, O_DIRECT ones in the others): without
    // it their mmap(MAP_SHARED) fails.
    | flag::DIRECT_IO_ALLOW_MMAP
    | flag::HAS_EXPIRE_ONLY;

/// Answers INIT: the flags that both ends have, and our limits.
pub fn init(fs: &Fs, request: &Request<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    let offer = parse(request.args)?;
    if offer.major < abi::FUSE_KERNEL_VERSION
        || offer.major == abi::FUSE_KERNEL_VERSION
            && offer.minor < abi::FUSE_KERNEL_MINOR_VERSION_MIN
    {
        return Err(Errno::PROTO);
    }
    let mut reply = abi::InitOut {
        major: abi::FUSE_KERNEL_VERSION,
        minor: offer.minor.min(abi::FUSE_KERNEL_MINOR_VERSION),
        ..abi::InitOut::default()
    };
    if offer.major > abi::FUSE_KERNEL_VERSION {
        // The kernel reads our version from this and asks again.
        reply.minor = abi::FUSE_KERNEL_MINOR_VERSION;
        return put(out, &reply);
    }
    let flags = abi::init_flags(offer.flags, offer.flags2) & wanted(fs);
    reply.max_readahead = offer.max_readahead.min(READAHEAD_BYTES_MAX);
    reply.flags = flags as u32;
    reply.flags2 = (flags >> 32) as u32;
    reply.max_background = MAX_BACKGROUND;
    reply.congestion_threshold = CONGESTION_THRESHOLD;
    reply.max_write = IO_BYTES_MAX as u32;
    reply.time_gran = 1;
    if flags & flag::MAX_PAGES != 0 {
        reply.max_pages = MAX_PAGES;
    }
    fs.negotiated.store(flags, Ordering::Relaxed);
    put(out, &reply)
}

/// An INIT answer that another daemon gave, and that this session is to go by.
///
/// # Errors
/// The first field that this share cannot be served by, as it is now.
pub(crate) fn serve(fs: &Fs, init: &abi::InitOut) -> Result<(), &'static str> {
    let flags = abi::init_flags(init.flags, init.flags2);
    let minors = abi::FUSE_KERNEL_MINOR_VERSION_MIN..=abi::FUSE_KERNEL_MINOR_VERSION;
    let pages = u32::from(init.max_pages) * PAGE_BYTES;
    let wrong = [
        ("major", init.major != abi::FUSE_KERNEL_VERSION),
        ("minor", !minors.contains(&init.minor)),
        // One by one: a file system that changed its cache mode must not keep the old one's.
        // Daemons before this one offered ATOMIC_O_TRUNC.
        ("flags", flags & !(wanted(fs) | flag::INIT_EXT | flag::ATOMIC_O_TRUNC) != 0),
        ("max_write", !(PAGE_BYTES..=IO_BYTES_MAX as u32).contains(&init.max_write)),
        ("max_pages", pages > IO_BYTES_MAX as u32),
        ("time_gran", init.time_gran != 1),
        ("map_alignment", init.map_alignment != 0),
        ("max_stack_depth", init.max_stack_depth != 0),
    ];
    if let Some((field, _)) = wrong.into_iter().find(|&(_, wrong)| wrong) {
        return Err(field);
    }
    fs.negotiated.store(flags, Ordering::Relaxed);
    Ok(())
}

fn wanted(fs: &Fs) -> u64 {
    let mut flags = WANTED;
    match fs.options.cache {
        CacheMode::Never | CacheMode::Metadata => {}
        CacheMode::Auto => flags |= flag::AUTO_INVAL_DATA,
        // Others may replace a link at any time; only here does nobody.
        CacheMode::Always => flags |= flag::CACHE_SYMLINKS,
    }
    if fs.options.acl {
        // A default ACL of the directory stands in the place of the task's umask.
        flags |= flag::POSIX_ACL | flag::DONT_MASK;
    }
    let caches_data = matches!(fs.options.cache, CacheMode::Auto | CacheMode::Always);
    if fs.options.writeback && caches_data && !fs.options.read_only {
        flags |= flag::WRITEBACK_CACHE;
    }
    flags
}

/// Kernels before 5.17 send 16 bytes, later ones 64.
fn parse(args: &[u8]) -> Result<abi::InitIn, Errno> {
    if args.len() < 16 {
        return Err(Errno::INVAL);
    }
    let mut bytes = abi::InitIn::default();
    let known = args.len().min(size_of::<abi::InitIn>());
    bytes.as_mut_bytes()[..known].copy_from_slice(&args[..known]);
    abi::InitIn::read_from_bytes(bytes.as_bytes()).map_err(|_| Errno::INVAL)
}

/// The guest unmounts: it gives back nothing more, and the session's end frees all.
pub fn destroy(_: &Fs, _: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    Ok(0)
}

/// For what is never answered.
pub fn nothing(_: &Fs, _: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    Ok(0)
}

/// The kernel remembers it and never asks again.
pub fn nosys(_: &Fs, _: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    Err(Errno::NOSYS)
}

/// IOCTL: no file of a share is a device.
pub fn notty(_: &Fs, _: &Request<'_>, _: &mut [u8]) -> Result<usize, Errno> {
    Err(Errno::NOTTY)
}
