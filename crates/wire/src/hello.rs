//! The handshake: HELLO, WELCOME, GOODBYE.
//!
//! A connection's first batch is one HELLO record of at most [`HELLO_BYTES_MAX`] bytes; the answer
//! is one WELCOME or GOODBYE. A HELLO with a zero ticket opens a session; with the ticket of a
//! WELCOME it adds a connection to that session, or resumes it.
//!
//! ```text
//! HELLO body:   [HelloFixed] share (UTF-8) | sub-directory | INIT answer in force (0 or 64)
//! WELCOME body: [Welcome]
//! GOODBYE body: text (UTF-8), `code` = [Reason]
//! ```

use crate::abi::InitOut;
use crate::limits::*;
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The wire versions that this code speaks.
pub const VERSION_MIN: u16 = 1;
/// See [`VERSION_MIN`].
pub const VERSION_MAX: u16 = 1;

/// Feature bits of HELLO and WELCOME; the WELCOME's are in force.
pub mod feature {
    /// Payload checksums in both directions.
    pub const PAYLOAD_CRC: u64 = 1 << 0;
    /// NODE and RESTORE: the guest keeps what rebuilds the session elsewhere.
    pub const RESTORE: u64 = 1 << 1;
    /// NOTIFY STORE: the content of small files comes with their first OPEN.
    pub const STORE: u64 = 1 << 2;
    /// All that this version knows.
    pub const KNOWN: u64 = PAYLOAD_CRC | RESTORE | STORE;
}

/// Mount options that the daemon acts on.
pub mod mount_flag {
    /// Refuse what would change the share.
    pub const READ_ONLY: u32 = 1 << 0;
    /// The guest's kernel may keep dirty pages.
    pub const WRITEBACK: u32 = 1 << 1;
    /// The guest's kernel goes by POSIX ACLs, where the share has them.
    pub const POSIX_ACL: u32 = 1 << 2;
    /// All that this version knows.
    pub const KNOWN: u32 = READ_ONLY | WRITEBACK | POSIX_ACL;
}

/// What a WELCOME to a HELLO with a ticket means; docs/sessions.md.
pub mod welcome_flag {
    /// The connection goes on where the one before it was cut.
    pub const RESUMED: u32 = 1 << 0;
    /// The daemon does not know the session: it is made anew from the guest's memory.
    pub const REBUILD: u32 = 1 << 1;
    /// All that this version knows.
    pub const KNOWN: u32 = RESUMED | REBUILD;
}

/// How long the guest's kernel may believe names, attributes and data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum CacheMode {
    /// Nothing is cached; reads and writes go straight through.
    Never = 0,
    /// Names and attributes are cached, data is not.
    Metadata = 1,
    /// Names and attributes for a second, data until the file is opened again after a change.
    #[default]
    Auto = 2,
    /// Everything, for a day: for shares that nobody else changes.
    Always = 3,
}

impl CacheMode {
    /// The mode with that number.
    pub const fn from_u8(value: u8) -> Option<CacheMode> {
        Some(match value {
            0 => CacheMode::Never,
            1 => CacheMode::Metadata,
            2 => CacheMode::Auto,
            3 => CacheMode::Always,
            _ => return None,
        })
    }
}

/// Names a session; whoever knows it may resume it. All zero: none yet.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(transparent)]
pub struct Ticket(pub [u8; 16]);

impl Ticket {
    /// Asks for a new session.
    pub const NONE: Ticket = Ticket([0; 16]);
}

impl std::fmt::Debug for Ticket {
    /// A ticket is a secret: logs show its first two bytes.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ticket({:02x}{:02x}..)", self.0[0], self.0[1])
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct HelloFixed {
    version_min: u16,
    version_max: u16,
    lanes: u16,
    conn: u16,
    features: u64,
    ticket: Ticket,
    epoch_seen: u64,
    conns: u16,
    slots: u16,
    mount_flags: u32,
    cache_mode: u8,
    reserved: [u8; 3],
    share_len: u16,
    subdir_len: u16,
    init_len: u16,
    reserved2: u16,
    nth: u32,
}
const _: () = assert!(size_of::<HelloFixed>() == 64);

/// What a guest wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Range of wire versions that the guest speaks.
    pub versions: (u16, u16),
    /// Features that the guest can use.
    pub features: u64,
    /// Zero, or the session that this connection belongs to.
    pub ticket: Ticket,
    /// Epoch of the last WELCOME, 0 without one.
    pub epoch_seen: u64,
    /// Lanes of the session.
    pub lanes: u16,
    /// Which of the session's connections this is.
    pub conn: u16,
    /// Connections of the session.
    pub conns: u16,
    /// Slots wanted for each lane.
    pub slots: u16,
    /// Bits of [`mount_flag`].
    pub mount_flags: u32,
    /// The cache mode of the mount.
    pub cache: CacheMode,
    /// The share's name.
    pub share: String,
    /// A directory below the share's root, or empty.
    pub subdir: Vec<u8>,
    /// The INIT answer in force, on a resume.
    pub init: Option<InitOut>,
    /// Which of its guest's HELLOs it is: more than those before. 0: the guest does not count.
    pub nth: u32,
}

/// A session's terms.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct Welcome {
    /// The version in force.
    pub version: u16,
    /// Lanes granted.
    pub lanes: u16,
    /// Slots of each lane.
    pub slots: u16,
    /// Connections granted.
    pub conns: u16,
    /// Features in force.
    pub features: u64,
    /// Names the session.
    pub ticket: Ticket,
    /// New at each start of the daemon.
    pub epoch: u64,
    /// How long a cut session is kept, in seconds.
    pub grace_s: u32,
    /// Bits of [`welcome_flag`].
    pub flags: u32,
}
const _: () = assert!(size_of::<Welcome>() == 48);

/// Why a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Reason {
    /// The mount is gone; the session can be dropped.
    Unmounted = 1,
    /// The daemon stops; the guest may come back.
    Shutdown = 2,
    /// No common wire version.
    Version = 3,
    /// No share of that name here.
    UnknownShare = 4,
    /// The sub-directory cannot be served.
    BadSubdir = 5,
    /// This peer may not have this share.
    Denied = 6,
    /// Too many sessions, connections or lanes.
    Limit = 7,
    /// The peer broke the protocol.
    Protocol = 8,
    /// The peer did not say HELLO in time.
    Timeout = 9,
    /// The ticket names no session here.
    UnknownSession = 10,
    /// The session cannot be taken over as it was.
    Incompatible = 11,
    /// The daemon failed.
    Internal = 12,
}

impl Reason {
    /// `None` for a number that this version does not know.
    pub fn from_u32(value: u32) -> Option<Reason> {
        use Reason::*;
        [
            Unmounted,
            Shutdown,
            Version,
            UnknownShare,
            BadSubdir,
            Denied,
            Limit,
            Protocol,
            Timeout,
            UnknownSession,
            Incompatible,
            Internal,
        ]
        .into_iter()
        .find(|&reason| reason as u32 == value)
    }

    /// Whether the same HELLO may be welcome later.
    pub fn is_passing(self) -> bool {
        matches!(self, Reason::Shutdown | Reason::Limit | Reason::Timeout | Reason::Internal)
    }
}

/// Why a handshake's bytes are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("malformed {message}: {what}")]
pub struct HelloError {
    /// HELLO or WELCOME.
    pub message: &'static str,
    /// The field at fault.
    pub what: &'static str,
}

const fn bad(what: &'static str) -> HelloError {
    HelloError { message: "HELLO", what }
}

/// The first field of any WELCOME, whatever version lays out the rest.
pub fn version_of(welcome: &[u8]) -> Option<u16> {
    u16::read_from_prefix(welcome).ok().map(|(version, _)| version)
}

impl Hello {
    /// The first two fields of any HELLO, `version_min` and `version_max`, whatever version lays
    /// out the rest.
    pub fn versions_of(body: &[u8]) -> Option<(u16, u16)> {
        <[u16; 2]>::read_from_prefix(body).ok().map(|([min, max], _)| (min, max))
    }

    /// The record's body.
    pub fn encode(&self) -> Vec<u8> {
        let init = self.init.as_ref().map_or(&[][..], |init| init.as_bytes());
        let fixed = HelloFixed {
            version_min: self.versions.0,
            version_max: self.versions.1,
            lanes: self.lanes,
            conn: self.conn,
            features: self.features,
            ticket: self.ticket,
            epoch_seen: self.epoch_seen,
            conns: self.conns,
            slots: self.slots,
            mount_flags: self.mount_flags,
            cache_mode: self.cache as u8,
            share_len: self.share.len() as u16,
            subdir_len: self.subdir.len() as u16,
            init_len: init.len() as u16,
            nth: self.nth,
            ..Default::default()
        };
        [fixed.as_bytes(), self.share.as_bytes(), &self.subdir, init].concat()
    }

    /// Checks and reads a record's body.
    pub fn decode(body: &[u8]) -> Result<Hello, HelloError> {
        let (fixed, rest) =
            HelloFixed::read_from_prefix(body).map_err(|_| bad("shorter than its fixed part"))?;
        let (share_len, subdir_len) = (fixed.share_len as usize, fixed.subdir_len as usize);
        if share_len == 0 || share_len > SHARE_NAME_BYTES_MAX {
            return Err(bad("length of the share's name"));
        }
        if subdir_len > SUBDIR_BYTES_MAX {
            return Err(bad("length of the sub-directory"));
        }
        if rest.len() != share_len + subdir_len + fixed.init_len as usize {
            return Err(bad("length does not match its parts"));
        }
        let (share, rest) = rest.split_at(share_len);
        let (subdir, init) = rest.split_at(subdir_len);
        if fixed.version_min > fixed.version_max {
            return Err(bad("version range"));
        }
        let lanes = fixed.lanes as usize;
        let conns = fixed.conns as usize;
        if lanes == 0
            || lanes > LANES_MAX
            || conns == 0
            || conns > lanes
            || fixed.conn >= fixed.conns
        {
            return Err(bad("number of lanes or connections"));
        }
        if fixed.slots == 0 || fixed.mount_flags & !mount_flag::KNOWN != 0 {
            return Err(bad("slots or mount flags"));
        }
        Ok(Hello {
            versions: (fixed.version_min, fixed.version_max),
            features: fixed.features,
            ticket: fixed.ticket,
            epoch_seen: fixed.epoch_seen,
            lanes: fixed.lanes,
            conn: fixed.conn,
            conns: fixed.conns,
            slots: fixed.slots,
            mount_flags: fixed.mount_flags,
            cache: CacheMode::from_u8(fixed.cache_mode).ok_or(bad("cache mode"))?,
            share: String::from_utf8(share.to_vec()).map_err(|_| bad("share's name: not UTF-8"))?,
            subdir: subdir.to_vec(),
            init: match init {
                [] => None,
                _ => Some(InitOut::read_from_bytes(init).map_err(|_| bad("INIT answer"))?),
            },
            nth: fixed.nth,
        })
    }

    /// The highest version that both speak.
    pub fn common_version(&self) -> Option<u16> {
        common_version(self.versions)
    }
}

/// The highest version of a range that we speak too.
pub fn common_version((min, max): (u16, u16)) -> Option<u16> {
    let version = max.min(VERSION_MAX);
    (version >= min.max(VERSION_MIN)).then_some(version)
}

impl Welcome {
    /// Checks and reads a record's body.
    pub fn decode(body: &[u8]) -> Result<Welcome, HelloError> {
        let bad = |what| HelloError { message: "WELCOME", what };
        let (welcome, _) = Welcome::read_from_prefix(body).map_err(|_| bad("too short"))?;
        if !(VERSION_MIN..=VERSION_MAX).contains(&welcome.version) {
            return Err(bad("version"));
        }
        if !(1..=LANES_MAX).contains(&(welcome.lanes as usize))
            || !(1..=welcome.lanes).contains(&welcome.conns)
        {
            return Err(bad("number of lanes or connections"));
        }
        if !(1..=SLOTS_PER_LANE_MAX).contains(&(welcome.slots as usize)) {
            return Err(bad("number of slots"));
        }
        if welcome.features & !feature::KNOWN != 0 {
            return Err(bad("features that were not asked for"));
        }
        if welcome.flags & !welcome_flag::KNOWN != 0 || welcome.flags == welcome_flag::KNOWN {
            return Err(bad("flags"));
        }
        Ok(welcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            versions: (1, 1),
            features: feature::PAYLOAD_CRC,
            ticket: Ticket([9; 16]),
            epoch_seen: 4,
            lanes: 2,
            conn: 1,
            conns: 2,
            slots: 128,
            mount_flags: mount_flag::READ_ONLY,
            cache: CacheMode::Always,
            share: "home".into(),
            subdir: b"a/\xff".to_vec(),
            init: Some(InitOut { major: 7, ..Default::default() }),
            nth: 258,
        }
    }

    #[test]
    fn a_hello_reads_back() {
        for init in [None, hello().init] {
            let hello = Hello { init, ..hello() };
            assert_eq!(Hello::decode(&hello.encode()).as_ref(), Ok(&hello));
        }
    }

    #[test]
    fn a_damaged_hello_is_refused_or_means_something_else() {
        let good = hello().encode();
        for n in 0..good.len() {
            assert!(Hello::decode(&good[..n]).is_err(), "cut at {n}");
        }
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let _ = Hello::decode(&bad); // must not panic
        }
    }

    #[test]
    fn versions_meet_or_do_not() {
        let check = |range, expected| {
            assert_eq!(Hello { versions: range, ..hello() }.common_version(), expected);
        };
        check((1, 1), Some(1));
        check((0, 9), Some(1));
        check((2, 9), None);
        check((0, 0), None);
    }

    #[test]
    fn golden_bytes() {
        let hex: String = hello().encode()[..70].iter().map(|b| format!("{b:02x}")).collect();
        let golden = [
            "01000100020001000100000000000000", // versions 1-1, 2 lanes, conn 1, features
            "09090909090909090909090909090909", // ticket
            "04000000000000000200800001000000", // epoch, 2 conns, 128 slots, read-only
            "03000000040003004000000002010000", // cache always, lengths 4, 3, 64, the 258th
            "686f6d65612f",
        ];
        assert_eq!(hex, golden.concat());
    }
}
