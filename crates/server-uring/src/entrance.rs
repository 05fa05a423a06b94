//! Entrances: a listener, or one for each place that a pattern of paths matches now.
//!
//! `unix:/srv/vm/*/v.sock_5640`: in each directory that is there a socket is made, and goes with
//! the directory. The kernel tells when directories come and go (inotify); nothing is polled. The
//! parent's side.

use crate::accept::{Door, ListenError, Listener};
use crate::address::Address;
use crate::config::ListenConfig;
use crate::socket_file::{Spot, by_fd};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Sockets of one pattern at most.
const SOCKETS_MAX: usize = 8192;

const EVENTS: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

/// Where some connect.
pub struct Entrance {
    door: Door,
    config: ListenConfig,
    kind: Kind,
}

enum Kind {
    One(Listener),
    Many(Pattern),
}

struct Pattern {
    /// Where the path begins.
    from: PathBuf,
    dirs: Vec<OsString>,
    /// So many of them come before the first that stands for several. From that one on whoever may
    /// make one may put what he likes there, so that no link is followed.
    trusted: usize,
    /// The socket's name.
    name: OsString,
    events: OwnedFd,
    sockets: BTreeMap<PathBuf, Listener>,
    /// What could not be bound, and was said.
    refused: Vec<PathBuf>,
}

impl Entrance {
    /// Binds, or begins to look for places to bind in.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn open(door: Door, config: &ListenConfig) -> Result<Entrance, ListenError> {
        let kind = match &config.address {
            Address::Unix(path) if is_pattern(path.as_os_str()) => {
                let mut pattern = Pattern::new(path)?;
                pattern.look(config);
                Kind::Many(pattern)
            }
            _ => Kind::One(Listener::bind(config)?),
        };
        Ok(Entrance { door, config: config.clone(), kind })
    }

    /// One listener that is bound already.
    pub fn of(door: Door, config: ListenConfig, listener: Listener) -> Entrance {
        Entrance { door, config, kind: Kind::One(listener) }
    }

    /// What those who connect want.
    pub fn door(&self) -> Door {
        self.door
    }

    /// As it was told.
    pub fn config(&self) -> &ListenConfig {
        &self.config
    }

    /// Somebody else has bound it.
    pub fn is_passed(&self) -> bool {
        matches!(&self.kind, Kind::One(listener) if listener.is_passed())
    }

    /// The sockets now.
    pub fn listeners(&self) -> Box<dyn Iterator<Item = &Listener> + '_> {
        match &self.kind {
            Kind::One(listener) => Box::new(std::iter::once(listener)),
            Kind::Many(pattern) => Box::new(pattern.sockets.values()),
        }
    }

    /// Tells the log where it is and, where that is one file, who may connect.
    pub fn say_listening(&self) {
        let access = match &self.kind {
            Kind::One(listener) => listener.access(),
            Kind::Many(_) => None,
        };
        let access = access.map(tracing::field::display);
        tracing::info!(address = %self.config.address, access, "listening");
    }

    /// Readable when sockets may have to come or go.
    pub fn events(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::One(_) => None,
            Kind::Many(pattern) => Some(pattern.events.as_fd()),
        }
    }

    /// Looks again, after an event.
    pub fn look(&mut self) {
        if let Kind::Many(pattern) = &mut self.kind {
            pattern.drain();
            pattern.look(&self.config);
        }
    }

    /// The same address with other options: for those who connect from now on.
    pub fn change(&mut self, config: &ListenConfig) {
        self.config = config.clone();
        let listeners: Vec<&mut Listener> = match &mut self.kind {
            Kind::One(listener) => vec![listener],
            Kind::Many(pattern) => pattern.sockets.values_mut().collect(),
        };
        for listener in listeners {
            if let Err(error) = listener.change(config) {
                let listener = listener.address();
                tracing::error!(%listener, %error, "its mode and owner stay as they were");
            }
        }
    }
}

/// Whether a path stands for several.
pub fn is_pattern(path: &OsStr) -> bool {
    path.as_bytes().iter().any(|byte| matches!(byte, b'*' | b'?'))
}

impl Pattern {
    fn new(path: &Path) -> Result<Pattern, ListenError> {
        let bad = || ListenError::Pattern(path.to_owned());
        let (dir, name) = (path.parent().ok_or_else(bad)?, path.file_name().ok_or_else(bad)?);
        if is_pattern(name) {
            return Err(bad());
        }
        let (mut from, mut dirs) = (PathBuf::from("."), Vec::new());
        for component in dir.components() {
            match component {
                Component::RootDir => from = PathBuf::from("/"),
                Component::Normal(name) => dirs.push(name.to_owned()),
                Component::CurDir => {}
                Component::ParentDir | Component::Prefix(_) => return Err(bad()),
            }
        }
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        let events = events.map_err(|errno| ListenError::Watch(errno.into()))?;
        let name = name.to_owned();
        let trusted = dirs.iter().take_while(|dir| !is_pattern(dir)).count();
        let (sockets, refused) = Default::default();
        Ok(Pattern { from, dirs, trusted, name, events, sockets, refused })
    }

    /// What has happened does not matter: it is looked at as it is now.
    fn drain(&self) {
        let mut room = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.events, &mut room);
        while events.next().is_ok() {}
    }

    /// Binds where there is a place without a socket, and lets go where there is none any more.
    fn look(&mut self, config: &ListenConfig) {
        let mut places = Vec::new();
        self.walk(self.from.clone(), &self.from, 0, &mut places);
        if places.len() > SOCKETS_MAX {
            let listener = &config.address;
            tracing::error!(%listener, "more than {SOCKETS_MAX} places: the rest is left out");
            places.truncate(SOCKETS_MAX);
        }
        let wanted: Vec<PathBuf> = places.into_iter().map(|dir| dir.join(&self.name)).collect();
        let gone = |path: &PathBuf, listener: &Listener| {
            wanted.binary_search(path).is_err() || !listener.is_in_place()
        };
        self.sockets.retain(|path, listener| {
            let gone = gone(path, listener);
            if gone {
                tracing::info!(listener = %listener.address(), "gone");
            }
            !gone
        });
        self.refused.retain(|path| wanted.binary_search(path).is_ok());
        let trusted =
            self.dirs[..self.trusted].iter().fold(self.from.clone(), |to, dir| to.join(dir));
        for path in wanted {
            if self.sockets.contains_key(&path) {
                continue;
            }
            let address = Address::Unix(path.clone());
            let spot = Spot::below(&trusted, &path);
            match Listener::bind_in(spot, &ListenConfig { address, ..config.clone() }) {
                Ok(listener) => {
                    let access = listener.access().map(tracing::field::display);
                    tracing::info!(listener = %listener.address(), access, "new");
                    self.refused.retain(|refused| *refused != path);
                    self.sockets.insert(path, listener);
                }
                Err(error) if !self.refused.contains(&path) => {
                    let source = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::error!(%error, source, "a place of a pattern has no socket");
                    self.refused.push(path);
                }
                Err(_) => {}
            }
        }
    }

    /// The directories that match from the `level`-th component on, in order; the one above them is
    /// found `at`. Each that is passed is watched before it is looked into, so that nothing is
    /// missed.
    fn walk(&self, dir: PathBuf, at: &Path, level: usize, places: &mut Vec<PathBuf>) {
        match inotify::add_watch(&self.events, at, EVENTS) {
            Ok(_) => {}
            Err(Errno::NOENT | Errno::NOTDIR) => return,
            Err(error) => return tracing::error!(?dir, %error, "cannot be watched for new places"),
        }
        let Some(component) = self.dirs.get(level) else { return places.push(dir) };
        if level < self.trusted {
            let next = dir.join(component);
            return self.walk(next.clone(), &next, level + 1, places);
        }
        let mut names = vec![component.clone()];
        if is_pattern(component) {
            let Ok(entries) = std::fs::read_dir(at) else { return };
            names = entries.flatten().map(|entry| entry.file_name()).collect();
            names.retain(|name| matches(component.as_bytes(), name.as_bytes()));
            names.sort();
        }
        for name in names {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            if places.len() <= SOCKETS_MAX
                && let Ok(next) = rustix::fs::openat(CWD, at.join(&name), flags, Mode::empty())
            {
                self.walk(dir.join(&name), &by_fd(next.as_fd()), level + 1, places);
            }
        }
    }
}

/// `*` is any characters, `?` one; a name that begins with a dot is matched by none of them there.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    if name.first() == Some(&b'.') && pattern.first() != Some(&b'.') {
        return false;
    }
    // Where the last star was, and up to where of the name it has taken.
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&byte) if byte == b'?' || byte == name[n] => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, n) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_patterns() {
        let check = |pattern: &str, name: &str, expected: bool| {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        };
        for (pattern, name) in
            [("*", "a"), ("a*", "a"), ("*b*d", "abcbd"), ("?", "x"), ("vm-*", "vm-")]
        {
            check(pattern, name, true);
        }
        for (pattern, name) in
            [("*", ".a"), ("?", ""), ("?", "ab"), ("*b", "bc"), ("vm-*", "vm"), ("a", "b")]
        {
            check(pattern, name, false);
        }
        check(".*", ".a", true);
        check(&"*a".repeat(50), &"a".repeat(49), false);
    }

    #[test]
    fn sockets_come_and_go_with_their_directories() {
        let dir = tempfile::tempdir().expect("directory");
        let at = |name: &str| dir.path().join(name);
        let config: ListenConfig =
            format!("unix:{}/vm/*/run/s", dir.path().display()).parse().expect("a pattern");
        let mut entrance = Entrance::open(Door::Guests, &config).expect("an entrance");
        let mut settle = |expected: &[&str]| {
            let fd = entrance.events().expect("a pattern");
            let mut ready =
                [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN)];
            let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
            assert_eq!(rustix::event::poll(&mut ready, Some(&limit)), Ok(1), "nothing is told");
            entrance.look();
            let found: Vec<_> = entrance.listeners().map(|l| l.address().clone()).collect();
            let expected: Vec<_> = expected
                .iter()
                .map(|name| Address::Unix(at(&format!("vm/{name}/run/s"))))
                .collect();
            assert_eq!(found, expected);
        };
        std::fs::create_dir(at("vm")).expect("mkdir");
        settle(&[]);
        std::fs::create_dir_all(at("vm/1/run")).expect("mkdir");
        settle(&["1"]);
        std::os::unix::net::UnixStream::connect(at("vm/1/run/s")).expect("it listens");
        std::fs::create_dir_all(at("vm/.hidden/run")).expect("mkdir");
        std::fs::create_dir_all(at("vm/2")).expect("mkdir");
        settle(&["1"]);
        std::fs::create_dir_all(at("vm/2/run")).expect("mkdir");
        settle(&["1", "2"]);
        // Somebody tidies up, and the directory is moved.
        std::fs::remove_file(at("vm/1/run/s")).expect("rm");
        settle(&["1", "2"]);
        std::os::unix::net::UnixStream::connect(at("vm/1/run/s")).expect("it listens again");
        std::fs::rename(at("vm/1"), at("vm/3")).expect("mv");
        settle(&["2", "3"]);
        std::fs::remove_dir_all(at("vm")).expect("rm -r");
        settle(&[]);
    }

    /// A VMM's user may make one of any name in his directory.
    #[test]
    fn links_below_a_star_are_not_followed() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().expect("directory");
        let at = |name: &str| dir.path().join(name);
        for name in ["real/1/run", "real/2/run", "real/3", "elsewhere/run"] {
            std::fs::create_dir_all(at(name)).expect("mkdir");
        }
        symlink(at("real"), at("vm")).expect("the operator's");
        symlink(at("elsewhere/run"), at("real/3/run")).expect("ln -s");
        symlink(at("elsewhere"), at("real/4")).expect("ln -s");
        // Dead, and not the daemon's to take over.
        drop(std::os::unix::net::UnixListener::bind(at("elsewhere/run/s")).expect("bind"));
        let config: ListenConfig =
            format!("unix:{}/vm/*/run/s", dir.path().display()).parse().expect("a pattern");
        let mut entrance = Entrance::open(Door::Guests, &config).expect("an entrance");
        let found = |entrance: &Entrance| -> Vec<Address> {
            entrance.listeners().map(|listener| listener.address().clone()).collect()
        };
        let expected =
            |names: &[&str]| names.iter().map(|name| Address::Unix(at(name))).collect::<Vec<_>>();
        assert_eq!(found(&entrance), expected(&["vm/1/run/s", "vm/2/run/s"]));
        let dead = std::fs::metadata(at("elsewhere/run/s")).expect("it is left alone");
        // The directory of a socket that is there becomes a link.
        std::fs::rename(at("real/2/run"), at("real/2/was")).expect("mv");
        symlink(at("elsewhere/run"), at("real/2/run")).expect("ln -s");
        entrance.look();
        assert_eq!(found(&entrance), expected(&["vm/1/run/s"]));
        let same = std::fs::metadata(at("elsewhere/run/s")).expect("and still is");
        assert_eq!(file_of(&same), file_of(&dead));
    }

    fn file_of(meta: &std::fs::Metadata) -> (u64, i64, i64) {
        use std::os::unix::fs::MetadataExt;
        (meta.ino(), meta.ctime(), meta.ctime_nsec())
    }

    #[test]
    fn patterns_that_cannot_be() {
        for bad in ["unix:/run/*", "unix:/run/*/../s"] {
            let config: ListenConfig = bad.parse().expect("a path");
            assert!(Entrance::open(Door::Guests, &config).is_err(), "{bad}");
        }
    }
}
