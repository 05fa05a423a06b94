//! A share, and processes that have layers of the sandbox on and try something.

use ringfs_server::channel::ToParent;
use ringfs_server::fork::{Child, Spaces};
use ringfs_server::fs::Submounts;
use ringfs_server::sandbox::users::Ids;
use ringfs_server::sandbox::{self, Needs, Offered, Walls, caps, filter, landlock, root};
use ringfs_server::share::ShareDir;
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Layers, in the order in which a worker lays them on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum With {
    Nothing,
    /// Namespaces and the root of its own; those of users too where we are not root.
    Root,
    Caps,
    Landlock,
    Seccomp,
    All,
    /// Those two with `--file-handles=false`.
    CapsWithoutHandles,
    AllWithoutHandles,
    /// `--sandbox=landlock`, and where the share is read-only: beside one that is not, or alone.
    AllButNamespaces,
    LooksHere,
    LooksOnly,
}

use With::*;

impl With {
    fn walls(self) -> Walls {
        match self {
            Root | All | AllWithoutHandles if is_root() => Walls::Namespaces,
            Root | All | AllWithoutHandles => Walls::OwnUsers(Ids::Own),
            AllButNamespaces | LooksHere | LooksOnly => Walls::Landlock,
            Nothing | Caps | Landlock | Seccomp | CapsWithoutHandles => Walls::None,
        }
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// What came of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    Done,
    Refused(Errno),
    Killed,
}

pub struct Place {
    pub dir: tempfile::TempDir,
    share: ShareDir,
    /// Which may be written to.
    beside: OwnedFd,
    /// Opened before any layer: what a worker of root has.
    pub fd: OwnedFd,
}

impl Place {
    pub fn new() -> Place {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("share");
        std::fs::create_dir(&path).expect("share");
        std::fs::write(path.join("inside"), "inside").expect("inside");
        std::fs::write(dir.path().join("outside"), "outside").expect("outside");
        let share = ShareDir::open(&path, Submounts::Hide, false).expect("share");
        let fd = share.root().expect("a root").into();
        let beside = dir.path().join("beside");
        std::fs::create_dir(&beside).expect("another share");
        let beside = std::fs::File::open(beside).expect("another share").into();
        Place { dir, share, beside, fd }
    }

    /// Tries `what` with these layers; it is given the share's directory.
    pub fn attempt(&self, with: With, what: &dyn Fn(&Path) -> Result<(), Errno>) -> Came {
        let walls = with.walls();
        let own_users = walls.ids();
        let outside = self.share.root().expect("a root");
        let spaces = walls.has_root().then_some(Spaces { own_users });
        let keep = [outside.as_fd(), self.beside.as_fd(), self.fd.as_fd()];
        let child = Child::start(&keep, 1, spaces, |channel| {
            let copied = own_users.map(|_| self.share.copy_in_own_users().expect("a copy"));
            let dir = copied.as_ref().unwrap_or(&outside).as_fd();
            let read_only = matches!(with, LooksHere | LooksOnly);
            let beside = Offered { dir: self.beside.as_fd(), read_only: false };
            let shares = [Offered { dir, read_only }, beside];
            let shares = if with == LooksHere { &shares[..] } else { &shares[..1] };
            let file_handles = with != AllWithoutHandles;
            let needs = Needs { walls, shares, state: None, device_nodes: false, file_handles };
            let outside = self.dir.path().join("share");
            let path = if walls.has_root() { Path::new("/shares/0") } else { &outside };
            match with {
                Nothing => {}
                Root => root::build(&[dir]).expect("a root"),
                Caps => caps::cut(caps::kept(false, true)).expect("capabilities"),
                CapsWithoutHandles => caps::cut(caps::kept(false, false)).expect("capabilities"),
                Landlock => landlock::restrict(path, None).expect("landlock"),
                Seccomp => filter::install(false).expect("a filter"),
                All | AllWithoutHandles | AllButNamespaces | LooksHere | LooksOnly => {
                    sandbox::enter(&needs).expect("the sandbox");
                }
            }
            let _ = channel.send(&ToParent::Ready, None);
            match what(path) {
                Ok(()) => 0,
                Err(errno) => errno.raw_os_error(),
            }
        });
        let mut child = child.expect("a child");
        let how = child.wait();
        let ready = matches!(child.channel.receive(), Ok(Some((ToParent::Ready, None))));
        assert!(ready, "{with:?}: the layers could not be laid on: {how}");
        match how.split_once(' ') {
            None => Came::Done,
            Some(("signal", "31")) => Came::Killed,
            Some(_) => {
                let code = how.rsplit(' ').next().and_then(|code| code.parse().ok());
                let code = code.unwrap_or_else(|| panic!("{how}"));
                Came::Refused(Errno::from_raw_os_error(code))
            }
        }
    }

    /// The same try with each of the layers; that of capabilities is root's.
    pub fn check(&self, what: &dyn Fn(&Path) -> Result<(), Errno>, expected: &[(With, Came)]) {
        let ours = |with| is_root() || !matches!(with, Caps | CapsWithoutHandles);
        for &(with, came) in expected.iter().filter(|(with, _)| ours(*with)) {
            assert_eq!(self.attempt(with, what), came, "with {with:?}");
        }
    }
}
