//! What `-o` says.
//!
//! Words of the mount itself (`ro`, `noexec`, ..) go to fuser-fork; what only mount(8) and systemd
//! act on is taken and ignored; a word that nobody knows is an error that names the nearest known.

use fuser_fork::mount::MountOptions;
use ringfs_wire::hello::CacheMode;
use ringfs_wire::limits::{LANES_MAX, SLOTS_PER_LANE_DEFAULT, SLOTS_PER_LANE_MAX};
use ringfs_wire::spin::{SPIN_TRIES_DEFAULT, SPIN_TRIES_MAX};
use std::ffi::OsString;
use std::time::Duration;
use thiserror::Error;

/// The words that help shows; also what misspelt ones are compared with.
const KNOWN: &[&str] = &[
    "ro",
    "rw",
    "lanes=",
    "slots=",
    "spin=",
    "cache=",
    "uring=",
    "writeback",
    "acl",
    "hard",
    "soft",
    "timeout=",
    "strict",
    "checksum=",
    "max_read=",
    "allow_other",
    "noallow_other",
    "default_permissions",
    "nodefault_permissions",
    "noatime",
    "nodiratime",
    "noexec",
    "nosuid",
    "nodev",
    "sync",
    "dirsync",
    "nofail",
    "_netdev",
    "defaults",
];

/// The longest `timeout=`: half a day.
const TIMEOUT_S_MAX: usize = 43_200;

/// Taken and without an effect here, beside those that fuser-fork ignores.
const IGNORED: &[&str] = &[
    "strictatime",
    "nostrictatime",
    "norelatime",
    "lazytime",
    "nolazytime",
    "silent",
    "loud",
    "mand",
    "nomand",
];

/// How a mount is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// What mount(2) is told.
    pub mount: MountOptions,
    /// Lanes; `None`: one a CPU, at most 8.
    pub lanes: Option<u16>,
    /// Requests in flight on each lane.
    pub slots: u16,
    /// Looks for work before a lane sleeps; 0: none.
    pub spin: u32,
    /// How long names, attributes and data are believed.
    pub cache: CacheMode,
    /// Whether the kernel keeps dirty pages.
    pub writeback: bool,
    /// Whether the kernel goes by POSIX ACLs, where the share has them.
    pub acl: bool,
    /// Whether frames come by FUSE-over-io_uring.
    pub uring: Uring,
    /// How long requests wait for a lost connection; `None`: as long as it takes.
    pub soft: Option<Duration>,
    /// Whether a daemon that does not know the session ends the mount.
    pub strict: bool,
    /// Whether another client goes on when this one dies.
    pub keep: bool,
    is_soft: bool,
    timeout_s: Option<u64>,
    /// Payload checksums; `None`: over vsock only.
    pub checksum: Option<bool>,
}

/// By what way frames come from the kernel and replies go back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uring {
    /// `/dev/fuse`.
    Off,
    /// Queues of FUSE-over-io_uring where the kernel has them, else `/dev/fuse` with a warning.
    On,
    /// The same without the warning.
    Auto,
}

/// The words of option lists.
pub fn words<S: AsRef<str>>(lists: &[S]) -> impl Iterator<Item = &str> {
    lists.iter().flat_map(|list| list.as_ref().split(',')).map(str::trim).filter(|w| !w.is_empty())
}

fn did_you_mean(nearest: Option<&str>) -> String {
    nearest.map(|word| format!("; did you mean `{word}`?")).unwrap_or_default()
}

/// Why an option list is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum OptionError {
    #[error("unknown mount option `{word}`{}", did_you_mean(*nearest))]
    Unknown { word: String, nearest: Option<&'static str> },
    #[error("mount option `{word}`: expected {expected}")]
    Value { word: String, expected: String },
    #[error("mount option `{0}` is not granted: ringfs always mounts nosuid and nodev")]
    Denied(String),
    #[error("timeout=SECONDS says how long `soft` waits: use them together, as soft,timeout=60")]
    Soft,
    #[error("writeback needs a data cache: use it with cache=auto or cache=always")]
    Writeback,
}

impl Options {
    /// The defaults for that source.
    pub fn new(source: impl Into<OsString>) -> Options {
        Options {
            mount: MountOptions::new(source),
            lanes: None,
            slots: SLOTS_PER_LANE_DEFAULT as u16,
            spin: SPIN_TRIES_DEFAULT,
            cache: CacheMode::Auto,
            writeback: false,
            acl: false,
            uring: Uring::Off,
            soft: None,
            strict: false,
            keep: true,
            is_soft: false,
            timeout_s: None,
            checksum: None,
        }
    }

    /// Reads option lists; with `sloppy` (mount -s) unknown words are ignored.
    pub fn parse<S: AsRef<str>>(
        source: impl Into<OsString>,
        lists: &[S],
        sloppy: bool,
    ) -> Result<Options, OptionError> {
        Options::new(source).and(lists, sloppy)
    }

    /// These options, and further lists that overrule them.
    pub fn and<S: AsRef<str>>(mut self, lists: &[S], sloppy: bool) -> Result<Options, OptionError> {
        for word in words(lists) {
            match self.apply(word) {
                Err(OptionError::Unknown { word, .. }) if sloppy => {
                    tracing::warn!(word, "an unknown mount option is ignored");
                }
                done => done?,
            }
        }
        let has_data_cache = matches!(self.cache, CacheMode::Auto | CacheMode::Always);
        if self.writeback && !has_data_cache {
            return Err(OptionError::Writeback);
        }
        self.soft = match (self.is_soft, self.timeout_s) {
            (true, Some(seconds)) => Some(Duration::from_secs(seconds)),
            (true, None) => return Err(OptionError::Soft),
            // A list that was overruled by a later `hard` may have left its timeout.
            (false, _) => None,
        };
        Ok(self)
    }

    fn apply(&mut self, word: &str) -> Result<(), OptionError> {
        let (key, value) = word.split_once('=').map_or((word, None), |(k, v)| (k, Some(v)));
        match (key, value) {
            ("lanes", Some(_)) => self.lanes = Some(number(word, LANES_MAX)?),
            ("slots", Some(_)) => self.slots = number(word, SLOTS_PER_LANE_MAX)?,
            ("spin", Some(tries)) => {
                let tries = tries.parse().ok().filter(|&n| n <= SPIN_TRIES_MAX);
                self.spin = tries.ok_or_else(|| {
                    bad_value(word, &format!("a number of 0 to {SPIN_TRIES_MAX}"))
                })?;
            }
            ("cache", Some(mode)) => {
                self.cache = cache_mode(mode)
                    .ok_or_else(|| bad_value(word, "never, metadata, auto or always"))?;
            }
            ("uring", Some("off")) => self.uring = Uring::Off,
            ("uring", Some("on")) => self.uring = Uring::On,
            ("uring", Some("auto")) => self.uring = Uring::Auto,
            ("uring", _) => return Err(bad_value(word, "uring=off, uring=on or uring=auto")),
            ("checksum", Some("on")) => self.checksum = Some(true),
            ("checksum", Some("off")) => self.checksum = Some(false),
            ("checksum", _) => return Err(bad_value(word, "checksum=on or checksum=off")),
            ("hard", None) => self.is_soft = false,
            ("soft", None) => self.is_soft = true,
            ("timeout", Some(_)) => self.timeout_s = Some(number(word, TIMEOUT_S_MAX)?.into()),
            ("timeout", None) => return Err(OptionError::Soft),
            ("strict", None) => self.strict = true,
            ("nostrict", None) => self.strict = false,
            ("keep", None) => self.keep = true,
            ("nokeep", None) => self.keep = false,
            ("writeback", None) => self.writeback = true,
            ("nowriteback", None) => self.writeback = false,
            ("acl", None) => self.acl = true,
            ("noacl", None) => self.acl = false,
            ("suid" | "dev", None) => return Err(OptionError::Denied(word.to_owned())),
            ("comment" | "user" | "uhelper", Some(_)) => {}
            (word, None) if IGNORED.contains(&word) => {}
            _ if self.mount.apply_word(word) => {}
            ("max_read", _) => return Err(bad_value(word, "a number of bytes")),
            _ => {
                return Err(OptionError::Unknown { word: word.to_owned(), nearest: nearest(key) });
            }
        }
        Ok(())
    }

    /// Lanes to ask for.
    pub fn lanes(&self) -> u16 {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        self.lanes.unwrap_or(cpus.min(LANES_MAX) as u16)
    }
}

/// The word for a cache mode.
pub fn cache_word(mode: CacheMode) -> &'static str {
    match mode {
        CacheMode::Never => "never",
        CacheMode::Metadata => "metadata",
        CacheMode::Auto => "auto",
        CacheMode::Always => "always",
    }
}

fn cache_mode(word: &str) -> Option<CacheMode> {
    (0..=3).filter_map(CacheMode::from_u8).find(|&mode| cache_word(mode) == word)
}

fn number(word: &str, max: usize) -> Result<u16, OptionError> {
    let value = word.split_once('=').and_then(|(_, value)| value.parse::<u16>().ok());
    value
        .filter(|&n| n >= 1 && usize::from(n) <= max)
        .ok_or_else(|| bad_value(word, &format!("a number of 1 to {max}")))
}

fn bad_value(word: &str, expected: &str) -> OptionError {
    OptionError::Value { word: word.to_owned(), expected: expected.to_owned() }
}

/// The known word with the fewest edits, if it is near at all.
fn nearest(word: &str) -> Option<&'static str> {
    let distance = |known: &str| edits(word.as_bytes(), known.trim_end_matches('=').as_bytes());
    let best = KNOWN.iter().copied().min_by_key(|known| distance(known))?;
    (distance(best) <= 1 + word.len() / 4).then_some(best)
}

/// Levenshtein's distance.
fn edits(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &str) -> Result<Options, OptionError> {
        Options::parse("s@unix:/s", &[list], false)
    }

    #[test]
    fn lists() {
        let options = parse("").expect("empty");
        assert_eq!(
            (options.slots, options.cache, options.writeback),
            (128, CacheMode::Auto, false)
        );
        assert!((1..=8).contains(&options.lanes()) && options.spin > 0);
        let options = parse(
            "rw,ro,lanes=3,spin=0,slots=7,cache=never,checksum=on,noexec,x-a=b,_netdev,nofail",
        )
        .expect("known words");
        assert_eq!((options.lanes(), options.spin, options.slots), (3, 0, 7));
        assert_eq!((options.cache, options.checksum), (CacheMode::Never, Some(true)));
        assert!(options.mount.read_only && options.mount.noexec);
        assert!(parse("cache=always,writeback").expect("both").writeback);
        for (word, expected) in [("off", Uring::Off), ("on", Uring::On), ("auto", Uring::Auto)] {
            assert_eq!(parse(&format!("uring={word}")).expect("a mode").uring, expected);
        }
        assert_eq!(parse("").expect("empty").uring, Uring::Off);
        assert!(parse("strict").expect("a word").strict && !parse("").expect("empty").strict);
        assert_eq!(parse("hard").expect("the default").soft, None);
        let soft = parse("soft,timeout=90").expect("soft").soft;
        assert_eq!(soft, Some(Duration::from_secs(90)));
        assert_eq!(parse("soft,timeout=90,hard").expect("the last counts").soft, None);
        let options = Options::parse("s@unix:/s", &["ro", "rw,max_read=65536"], false);
        let options = options.expect("two lists");
        assert!(!options.mount.read_only && options.mount.max_read == Some(65536));
    }

    #[test]
    fn refusals_say_what_is_right() {
        let check = |list: &str, expected: &str| {
            let error = parse(list).expect_err(list).to_string();
            assert!(error.contains(expected), "{list}: {error}");
        };
        check("lane=2", "unknown mount option `lane=2`; did you mean `lanes=`?");
        check("cashe=auto", "did you mean `cache=`?");
        check("write_back", "did you mean `writeback`?");
        check("allow_others", "did you mean `allow_other`?");
        check("uring=yes", "uring=off, uring=on or uring=auto");
        check("uring", "uring=off");
        check("lanes=0", "a number of 1 to 8");
        check("lanes=9", "a number of 1 to 8");
        check("slots=many", "a number of 1 to 1024");
        check("cache=all", "never, metadata, auto or always");
        check("checksum=yes", "checksum=on or checksum=off");
        check("checksum", "checksum=on or checksum=off");
        check("soft", "soft,timeout=60");
        check("timeout", "soft,timeout=60");
        check("soft,timeout=0", "a number of 1 to 43200");
        check("max_read=x", "a number of bytes");
        check("suid", "always mounts nosuid");
        check("spin=-1", "a number of 0 to");
        check("spin=10001", "a number of 0 to");
        check("cache=never,writeback", "cache=auto or cache=always");
        assert!(!parse("zzzzzz").expect_err("unknown").to_string().contains("did you mean"));
        assert!(Options::parse("s", &["zzzzzz,ro"], true).expect("sloppy").mount.read_only);
    }

    #[test]
    fn distances() {
        for (a, b, expected) in
            [("", "", 0), ("a", "", 1), ("kitten", "sitting", 3), ("ro", "rw", 1)]
        {
            assert_eq!(edits(a.as_bytes(), b.as_bytes()), expected);
        }
    }
}
