//! The pure negotiation of INIT: what the kernel offers, the daemon answers and the client allows.
//!
//! The client forwards INIT to the daemon ([`offer`] trims what it offers), and clamps the answer
//! before the kernel sees it ([`negotiate`]).
//!
//! Invariant: no flag reaches the kernel that it did not offer, that the limits forbid, or whose
//! meaning this crate does not serve; no size exceeds the smallest of the three. It must not do
//! I/O, and must not add what the daemon has to carry out (only `wanted`, the client's own).

use ringfs_wire::abi::{
    FUSE_KERNEL_MINOR_VERSION, FUSE_KERNEL_MINOR_VERSION_MIN, FUSE_KERNEL_VERSION, InitIn, InitOut,
    init, init_flags,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// The kernel's own floor of `max_write`, bytes.
pub const MAX_WRITE_BYTES_MIN: u32 = 4096;

/// Without `MAX_PAGES` the kernel sends at most 32 pages in a request.
const PAGES_WITHOUT_MAX_PAGES: u32 = 32;

/// Flags that this version passes to nobody:
/// splicing (frames are read into memory), passthrough (not built), rings (ours alone to ask for:
/// [`Limits::rings`]), DAX and its
/// alignment, the long SETXATTR (our layouts have the short one), id mapping (it changes what uids
/// mean, and ends the mount where `default_permissions` is off), and request timeouts (the kernel
/// would abort the whole mount while a session waits for its daemon).
pub const NEVER: u64 = init::SPLICE_WRITE
    | init::SPLICE_MOVE
    | init::SPLICE_READ
    | init::MAP_ALIGNMENT
    | init::HAS_INODE_DAX
    | init::PASSTHROUGH
    | init::SETXATTR_EXT
    | init::ALLOW_IDMAP
    | init::OVER_IO_URING
    | init::REQUEST_TIMEOUT
    | init::INIT_RESERVED;

/// Every flag that has a name here; others are dropped.
const KNOWN: u64 = (1 << 43) - 1;

/// What the client allows and asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest WRITE, bytes; the buffers of the readers follow from it.
    pub max_write: u32,
    /// Largest readahead, bytes.
    pub max_readahead: u32,
    /// Background requests (readahead, writeback, RELEASE) in flight; 0: as the daemon says.
    pub max_background: u16,
    /// Background requests at which the kernel calls the mount congested; 0: three quarters.
    pub congestion_threshold: u16,
    /// The kernel's page, bytes (`rustix::param::page_size()`): `max_pages` counts in it.
    pub page_bytes: u32,
    /// Set where the kernel offers them, whatever the daemon says: flags that concern only the
    /// kernel and the client.
    pub wanted: u64,
    /// Never set: `WRITEBACK_CACHE` unless the mount asks for it.
    pub forbidden: u64,
    /// Whether to agree on FUSE-over-io_uring where the kernel offers it. Whoever says so must
    /// register queues right after the answer, or have a registration refused: the kernel holds
    /// all requests back until then.
    pub rings: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_write: 1 << 20,
            max_readahead: 1 << 20,
            max_background: 512,
            congestion_threshold: 0,
            page_bytes: 4096,
            wanted: init::ABORT_ERROR,
            forbidden: init::WRITEBACK_CACHE,
            rings: false,
        }
    }
}

/// Why no session comes about. The INIT is then answered with an error and the mount fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InitError {
    /// The kernel's request is cut.
    #[error("an init request of {len} bytes is too short")]
    RequestShort {
        /// Its length behind the header.
        len: usize,
    },
    /// The daemon's answer is cut or too long.
    #[error("an init answer of {len} bytes (24 to 64 are right)")]
    AnswerLength {
        /// Its length.
        len: usize,
    },
    /// The kernel is too old.
    #[error("the kernel speaks FUSE {major}.{minor}, we need 7.31: use Linux 5.4 or newer")]
    KernelTooOld {
        /// Its version.
        major: u32,
        /// Its version.
        minor: u32,
    },
    /// A newer major version: answer `VersionAnswer` first; negotiation follows the next INIT.
    #[error("the kernel speaks FUSE {major}, and must ask again in version 7")]
    MustAskAgain {
        /// Its version.
        major: u32,
    },
    /// The daemon answers with a version that we cannot pass on.
    #[error("the daemon speaks FUSE {major}.{minor}, we need 7.31 or newer: update ringfsd")]
    Daemon {
        /// Its version.
        major: u32,
        /// Its version.
        minor: u32,
    },
    /// The daemon, or our own limits, allow no write at all.
    #[error("max_write {bytes} is under the kernel's least, 4096 bytes")]
    MaxWrite {
        /// What came out.
        bytes: u32,
    },
}

/// What to do about the version in the kernel's INIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Go on, with this minor version at most.
    Speak {
        /// The smaller of the kernel's and ours.
        minor: u32,
    },
    /// The kernel's major version is newer: reply this (it names version 7) and wait for another
    /// INIT.
    AskAgain(InitOut),
}

/// The answer for the kernel, and what follows from it for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// What the kernel gets.
    pub out: InitOut,
    /// The flags in force.
    pub flags: u64,
    /// What the kernel offered: it says what else it understands (`HAS_RESEND`,
    /// `HAS_EXPIRE_ONLY`).
    pub offered: u64,
    /// Flags of the daemon's answer that were taken out; worth a line in the log.
    pub dropped: u64,
    /// What is in force of the daemon's answer, for a daemon that takes over: without what kernel
    /// and client have agreed on by themselves.
    pub served: InitOut,
}

impl Negotiated {
    /// The body of the reply to INIT, in the length that this minor version has.
    pub fn body(&self) -> &[u8] {
        let bytes = self.out.as_bytes();
        &bytes[..bytes.len().min(out_bytes(self.out.minor))]
    }
}

/// The length of INIT's answer (`FUSE_COMPAT_INIT_OUT_SIZE`, `FUSE_COMPAT_22_INIT_OUT_SIZE`).
const fn out_bytes(minor: u32) -> usize {
    match minor {
        0..5 => 8,
        5..23 => 24,
        _ => 64,
    }
}

/// The kernel's INIT, from the arguments of its frame. Kernels before 7.36 send 16 bytes; what
/// they do not send is zero, and what a newer one adds is left out.
pub fn parse_in(args: &[u8]) -> Result<InitIn, InitError> {
    if args.len() < 16 {
        return Err(InitError::RequestShort { len: args.len() });
    }
    Ok(padded(args))
}

/// The daemon's answer, from the body of its reply.
pub fn parse_out(body: &[u8]) -> Result<InitOut, InitError> {
    if !(24..=64).contains(&body.len()) {
        return Err(InitError::AnswerLength { len: body.len() });
    }
    Ok(padded(body))
}

fn padded<T: FromZeros + FromBytes + IntoBytes>(bytes: &[u8]) -> T {
    let mut value = T::new_zeroed();
    let room = value.as_mut_bytes();
    let len = bytes.len().min(room.len());
    room[..len].copy_from_slice(&bytes[..len]);
    value
}

/// Looks at the version alone: before the daemon is asked.
pub fn version_of(kernel: &InitIn) -> Result<Version, InitError> {
    let (major, minor) = (kernel.major, kernel.minor);
    if major > FUSE_KERNEL_VERSION {
        return Ok(Version::AskAgain(InitOut {
            major: FUSE_KERNEL_VERSION,
            minor: FUSE_KERNEL_MINOR_VERSION,
            ..InitOut::default()
        }));
    }
    if major < FUSE_KERNEL_VERSION || minor < FUSE_KERNEL_MINOR_VERSION_MIN {
        return Err(InitError::KernelTooOld { major, minor });
    }
    Ok(Version::Speak { minor: minor.min(FUSE_KERNEL_MINOR_VERSION) })
}

/// What the daemon is offered: the kernel's INIT without what could not be passed on.
pub fn offer(kernel: &InitIn, limits: &Limits) -> InitIn {
    let allowed = KNOWN & !NEVER & !limits.forbidden;
    let (flags, flags2) = split(init_flags(kernel.flags, kernel.flags2) & allowed);
    InitIn {
        major: kernel.major,
        minor: kernel.minor.min(FUSE_KERNEL_MINOR_VERSION),
        max_readahead: kernel.max_readahead.min(limits.max_readahead),
        flags,
        flags2,
        unused: [0; 11],
    }
}

/// The answer that the kernel gets: never more than each of the three allows.
pub fn negotiate(
    kernel: &InitIn,
    daemon: &InitOut,
    limits: &Limits,
) -> Result<Negotiated, InitError> {
    let minor = match version_of(kernel)? {
        Version::Speak { minor } => minor,
        Version::AskAgain(_) => return Err(InitError::MustAskAgain { major: kernel.major }),
    };
    if daemon.major != FUSE_KERNEL_VERSION || daemon.minor < FUSE_KERNEL_MINOR_VERSION_MIN {
        return Err(InitError::Daemon { major: daemon.major, minor: daemon.minor });
    }
    let offered = init_flags(kernel.flags, kernel.flags2);
    // The two that only say how the rest is coded are ours.
    let coding = init::MAX_PAGES | init::INIT_EXT;
    let answered = init_flags(daemon.flags, daemon.flags2);
    let agreed = (answered | limits.wanted | init::MAX_PAGES)
        & offered
        & KNOWN
        & !NEVER
        & !limits.forbidden
        & !init::INIT_EXT;
    // Between the kernel and us: the daemon is neither asked nor heard.
    let rings = if limits.rings { init::OVER_IO_URING } else { 0 };
    let agreed = agreed | rings & offered;
    let (flags_low, flags_high) = split(agreed);
    let (max_write, max_pages) = sizes(daemon, limits, agreed & init::MAX_PAGES != 0)?;
    let (max_background, congestion_threshold) = background(daemon, limits);
    let time_gran = daemon.time_gran;
    let out = InitOut {
        major: FUSE_KERNEL_VERSION,
        minor: minor.min(daemon.minor),
        max_readahead: kernel.max_readahead.min(daemon.max_readahead).min(limits.max_readahead),
        flags: flags_low,
        max_background,
        congestion_threshold,
        max_write,
        time_gran: if (1..=1_000_000_000).contains(&time_gran) { time_gran } else { 1 },
        max_pages,
        map_alignment: 0,
        flags2: flags_high,
        max_stack_depth: 0,
        request_timeout: 0,
        unused: [0; 11],
    };
    let flags = init_flags(flags_low, flags_high);
    let (low, high) = split(agreed & (answered | init::MAX_PAGES));
    let served = InitOut { flags: low, flags2: high, ..out };
    Ok(Negotiated { out, flags, offered, dropped: answered & !agreed & !coding, served })
}

/// The two words of a set of flags; `INIT_EXT` is set where the second one counts.
fn split(flags: u64) -> (u32, u32) {
    let low = (flags & 0xffff_ffff & !init::INIT_EXT) as u32;
    let high = (flags >> 32) as u32;
    if high == 0 { (low, 0) } else { (low | init::INIT_EXT as u32, high) }
}

/// `max_write` in bytes and `max_pages` in the kernel's pages.
///
/// `max_pages` follows from `max_write` alone: the daemon does not know the guest's page. It bounds
/// READs as well, together with the mount option `max_read`.
fn sizes(daemon: &InitOut, limits: &Limits, max_pages: bool) -> Result<(u32, u16), InitError> {
    let page_bytes = limits.page_bytes.max(4096);
    let mut bytes = daemon.max_write.min(limits.max_write);
    if !max_pages {
        bytes = bytes.min(page_bytes.saturating_mul(PAGES_WITHOUT_MAX_PAGES));
    }
    if bytes < MAX_WRITE_BYTES_MIN {
        return Err(InitError::MaxWrite { bytes });
    }
    let pages = u16::try_from(bytes.div_ceil(page_bytes)).unwrap_or(u16::MAX);
    Ok((bytes, if max_pages { pages } else { 0 }))
}

/// `max_background` and `congestion_threshold`. A zero leaves the choice to the other side; both
/// zero leave it to the kernel, whose 12 are too few for closes over a network.
fn background(daemon: &InitOut, limits: &Limits) -> (u16, u16) {
    let smaller = |a: u16, b: u16| if a == 0 || b == 0 { a.max(b) } else { a.min(b) };
    let max = smaller(daemon.max_background, limits.max_background);
    if max == 0 {
        return (0, 0);
    }
    let three_quarters = max - max / 4;
    let threshold = smaller(daemon.congestion_threshold, limits.congestion_threshold);
    (max, smaller(threshold, three_quarters))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel of 6.18: every flag, 128 KiB of readahead.
    fn kernel() -> InitIn {
        let (flags, flags2) = split(KNOWN & !init::INIT_RESERVED);
        let (major, minor) = (7, 45);
        InitIn { major, minor, max_readahead: 131072, flags, flags2, unused: [0; 11] }
    }

    fn daemon(flags: u64) -> InitOut {
        let (flags, flags2) = split(flags);
        InitOut {
            major: 7,
            minor: 45,
            max_readahead: 1 << 20,
            flags,
            flags2,
            max_background: 256,
            max_write: 1 << 20,
            time_gran: 1,
            max_pages: 256,
            ..InitOut::default()
        }
    }

    fn good(kernel: &InitIn, daemon: &InitOut, limits: &Limits) -> Negotiated {
        let done = negotiate(kernel, daemon, limits).expect("negotiated");
        assert_eq!(done.flags & !done.offered, 0, "never more than offered");
        let rings = if limits.rings { init::OVER_IO_URING } else { 0 };
        assert_eq!(done.flags & NEVER & !rings, 0);
        assert_eq!(done.out.flags2 != 0, done.flags & init::INIT_EXT != 0);
        assert_eq!(done.body().len(), 64);
        done
    }

    #[test]
    fn versions() {
        let check = |(major, minor), expected: Result<Option<u32>, InitError>| {
            let kernel = InitIn { major, minor, ..kernel() };
            let got = version_of(&kernel).map(|version| match version {
                Version::Speak { minor } => Some(minor),
                Version::AskAgain(out) => {
                    assert_eq!((out.major, out.minor, out.flags), (7, 45, 0));
                    None
                }
            });
            assert_eq!(got, expected);
            let done = negotiate(&kernel, &daemon(0), &Limits::default());
            match expected {
                Ok(Some(minor)) => assert_eq!(done.map(|done| done.out.minor), Ok(minor)),
                Ok(None) => assert_eq!(done, Err(InitError::MustAskAgain { major })),
                Err(error) => assert_eq!(done, Err(error)),
            }
        };
        check((7, 31), Ok(Some(31)));
        check((7, 45), Ok(Some(45)));
        check((7, 99), Ok(Some(45)));
        check((8, 0), Ok(None));
        check((u32::MAX, 3), Ok(None));
        check((7, 30), Err(InitError::KernelTooOld { major: 7, minor: 30 }));
        check((6, 45), Err(InitError::KernelTooOld { major: 6, minor: 45 }));
        check((0, 0), Err(InitError::KernelTooOld { major: 0, minor: 0 }));
    }

    #[test]
    fn a_daemon_of_another_version_is_refused() {
        for (major, minor, expected) in
            [(7, 31, Some(31)), (7, 99, Some(45)), (7, 30, None), (8, 45, None), (0, 0, None)]
        {
            let daemon = InitOut { major, minor, ..daemon(0) };
            let done = negotiate(&kernel(), &daemon, &Limits::default());
            match expected {
                Some(minor) => assert_eq!(done.map(|done| done.out.minor), Ok(minor)),
                None => assert_eq!(done, Err(InitError::Daemon { major, minor })),
            }
        }
    }

    #[test]
    fn flags() {
        use init::*;
        const PLAIN: u64 = MAX_PAGES | ABORT_ERROR;
        let check = |offered: u64, answered: u64, limits: &Limits, expected: u64, dropped: u64| {
            let (flags, flags2) = split(offered);
            let kernel = InitIn { flags, flags2, ..kernel() };
            let done = good(&kernel, &daemon(answered), limits);
            assert_eq!((done.flags, done.dropped), (expected, dropped));
            let served = init_flags(done.served.flags, done.served.flags2) & !INIT_EXT;
            assert_eq!(served, expected & (answered | MAX_PAGES) & !INIT_EXT);
        };
        let all = KNOWN & !INIT_RESERVED;
        let limits = Limits::default();
        let writeback = Limits { forbidden: 0, ..limits };
        let bare = Limits { wanted: 0, forbidden: MAX_PAGES, ..limits };
        check(all, 0, &limits, PLAIN, 0);
        check(all, ASYNC_READ | BIG_WRITES, &limits, PLAIN | ASYNC_READ | BIG_WRITES, 0);
        check(all, WRITEBACK_CACHE, &limits, PLAIN, WRITEBACK_CACHE);
        check(all, WRITEBACK_CACHE, &writeback, PLAIN | WRITEBACK_CACHE, 0);
        check(all, NEVER & !INIT_RESERVED, &limits, PLAIN, NEVER & !INIT_RESERVED);
        check(all, 1 << 60, &limits, PLAIN, 1 << 60);
        // The second word, and INIT_EXT with it, only where something of it is agreed.
        check(all, DIRECT_IO_ALLOW_MMAP, &limits, PLAIN | DIRECT_IO_ALLOW_MMAP | INIT_EXT, 0);
        check(all, OVER_IO_URING, &limits, PLAIN, OVER_IO_URING);
        // Rings are ours to ask for, and the kernel's to offer.
        let rings = Limits { rings: true, ..limits };
        check(all, 0, &rings, PLAIN | OVER_IO_URING | INIT_EXT, 0);
        check(all & !OVER_IO_URING, 0, &rings, PLAIN, 0);
        check(MAX_PAGES, DIRECT_IO_ALLOW_MMAP, &limits, MAX_PAGES, DIRECT_IO_ALLOW_MMAP);
        // Not offered, not answered.
        check(0, ASYNC_READ, &limits, 0, ASYNC_READ);
        check(ASYNC_READ, ASYNC_READ | MAX_PAGES, &limits, ASYNC_READ, 0);
        check(all, MAX_PAGES, &bare, 0, 0);
    }

    #[test]
    fn sizes_are_the_smallest_of_all() {
        let check = |daemon_bytes, own: Limits, expected: Result<(u32, u16), u32>| {
            let daemon = InitOut { max_write: daemon_bytes, ..daemon(0) };
            let got = negotiate(&kernel(), &daemon, &own);
            let got = got.map(|done| (done.out.max_write, done.out.max_pages));
            assert_eq!(got, expected.map_err(|bytes| InitError::MaxWrite { bytes }));
        };
        let own = Limits::default();
        let big_page = Limits { page_bytes: 65536, ..own };
        let no_pages = Limits { forbidden: init::MAX_PAGES, ..own };
        check(1 << 20, own, Ok((1 << 20, 256)));
        check(u32::MAX, own, Ok((1 << 20, 256)));
        check(4096, own, Ok((4096, 1)));
        check(5000, own, Ok((5000, 2)));
        check(4095, own, Err(4095));
        check(0, own, Err(0));
        check(1 << 20, Limits { max_write: 65536, ..own }, Ok((65536, 16)));
        check(u32::MAX, Limits { max_write: u32::MAX, ..own }, Ok((u32::MAX, u16::MAX)));
        check(1 << 20, big_page, Ok((1 << 20, 16)));
        check(4096, big_page, Ok((4096, 1)));
        check(1 << 20, no_pages, Ok((131072, 0)));
        check(8192, Limits { page_bytes: 0, ..own }, Ok((8192, 2)));
    }

    #[test]
    fn background_requests_and_the_rest() {
        let check = |daemon_pair: (u16, u16), own: (u16, u16), expected: (u16, u16)| {
            let daemon = InitOut {
                max_background: daemon_pair.0,
                congestion_threshold: daemon_pair.1,
                ..daemon(0)
            };
            let limits =
                Limits { max_background: own.0, congestion_threshold: own.1, ..Limits::default() };
            let out = good(&kernel(), &daemon, &limits).out;
            assert_eq!((out.max_background, out.congestion_threshold), expected);
        };
        check((256, 0), (512, 0), (256, 192));
        check((1024, 0), (512, 0), (512, 384));
        check((0, 0), (512, 0), (512, 384));
        check((256, 0), (0, 0), (256, 192));
        check((0, 5), (0, 5), (0, 0));
        check((256, 100), (512, 0), (256, 100));
        check((256, 255), (512, 300), (256, 192));
        check((u16::MAX, u16::MAX), (u16::MAX, 0), (u16::MAX, 49152));
        check((1, 0), (512, 0), (1, 1));
        for (time_gran, expected) in [(0, 1), (1, 1), (1_000_000_000, 1_000_000_000), (!0, 1)] {
            let daemon = InitOut {
                time_gran,
                max_readahead: 4096,
                map_alignment: 3,
                max_stack_depth: 2,
                request_timeout: 9,
                unused: [1; 11],
                ..daemon(0)
            };
            let out = good(&kernel(), &daemon, &Limits::default()).out;
            assert_eq!((out.time_gran, out.max_readahead), (expected, 4096));
            assert_eq!((out.map_alignment, out.max_stack_depth, out.request_timeout), (0, 0, 0));
            assert_eq!(out.unused, [0; 11]);
        }
    }

    #[test]
    fn the_daemon_is_offered_what_may_pass() {
        let limits = Limits { max_readahead: 65536, ..Limits::default() };
        let limits = Limits { rings: true, ..limits };
        let offered = offer(&InitIn { minor: 99, ..kernel() }, &limits);
        let flags = init_flags(offered.flags, offered.flags2);
        assert_eq!(flags & (NEVER | init::WRITEBACK_CACHE), 0);
        assert_ne!(flags & init::ASYNC_READ, 0);
        assert_eq!((offered.minor, offered.max_readahead), (45, 65536));
        // A kernel without a second word has none after it.
        let old = InitIn { flags: init::ASYNC_READ as u32, flags2: !0, ..kernel() };
        assert_eq!(offer(&old, &limits).flags2, 0);
    }

    #[test]
    fn lengths_of_old_and_new() {
        for len in 0..16 {
            assert_eq!(parse_in(&[0; 16][..len]), Err(InitError::RequestShort { len }));
        }
        let old = parse_in(&kernel().as_bytes()[..16]).expect("old");
        assert_eq!((old.minor, old.flags2), (45, 0));
        let new = [kernel().as_bytes(), &[7; 64]].concat();
        assert_eq!(parse_in(&new), Ok(kernel()));
        let answer = daemon(init::ASYNC_READ);
        assert_eq!(parse_out(answer.as_bytes()), Ok(answer));
        let short = parse_out(&answer.as_bytes()[..24]).expect("short");
        assert_eq!((short.max_write, short.max_pages), (1 << 20, 0));
        for len in [0, 8, 23, 65, 1000] {
            assert_eq!(parse_out(&vec![0; len]), Err(InitError::AnswerLength { len }));
        }
        for (minor, expected) in [(4, 8), (5, 24), (22, 24), (23, 64), (45, 64), (u32::MAX, 64)] {
            assert_eq!(out_bytes(minor), expected);
        }
    }
}
