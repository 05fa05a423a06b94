//! How to mount: one plain struct, and the words of `-o` lists that set it.
//!
//! Invariant: `nosuid` and `nodev` are on whatever anybody asks. It must not look at the machine,
//! but for who we are.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;

use rustix::mount::MountFlags;

use crate::device::DEVICE_PATH;
use crate::fusermount;

/// What the root of the mount is; the mount point must be of the same kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RootKind {
    /// A directory.
    #[default]
    Directory,
    /// A single regular file.
    File,
}

/// Who mounts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// mount(2), and `fusermount3` where it is not permitted.
    #[default]
    Auto,
    /// mount(2) only.
    Direct,
    /// `fusermount3` only.
    Fusermount,
}

/// How to mount. `nosuid` and `nodev` are always on.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// What the mount table names as source: `share@vsock:2:5640`.
    pub source: OsString,
    /// The kind of the root.
    pub root: RootKind,
    /// Who mounts.
    pub method: Method,
    /// `ro`.
    pub read_only: bool,
    /// `noexec`.
    pub noexec: bool,
    /// `noatime`.
    pub noatime: bool,
    /// `nodiratime`.
    pub nodiratime: bool,
    /// `sync`.
    pub sync: bool,
    /// `dirsync`.
    pub dirsync: bool,
    /// Whether other users than the mounting one get in; `None`: if root mounts.
    pub allow_other: Option<bool>,
    /// Whether the kernel checks permissions by mode, owner and group.
    pub default_permissions: bool,
    /// Largest READ, bytes: the `max_write` that INIT will ask for.
    pub max_read: Option<u32>,
    /// The FUSE device.
    pub device: PathBuf,
    /// The program that mounts for users.
    pub fusermount: PathBuf,
}

impl MountOptions {
    /// The defaults: a directory, read and write, `default_permissions`.
    pub fn new(source: impl Into<OsString>) -> MountOptions {
        MountOptions {
            source: source.into(),
            root: RootKind::default(),
            method: Method::default(),
            read_only: false,
            noexec: false,
            noatime: false,
            nodiratime: false,
            sync: false,
            dirsync: false,
            allow_other: None,
            default_permissions: true,
            max_read: None,
            device: DEVICE_PATH.into(),
            fusermount: fusermount::PROGRAM.into(),
        }
    }

    /// Takes one word of a `-o` list, as fstab and mount(8) write it. `false`: none of ours, or
    /// one that we do not grant (`suid`, `dev`).
    pub fn apply_word(&mut self, word: &str) -> bool {
        match word {
            "ro" => self.read_only = true,
            "rw" => self.read_only = false,
            "noexec" => self.noexec = true,
            "exec" => self.noexec = false,
            "noatime" => self.noatime = true,
            "atime" | "relatime" => self.noatime = false,
            "nodiratime" => self.nodiratime = true,
            "diratime" => self.nodiratime = false,
            "sync" => self.sync = true,
            "async" => self.sync = false,
            "dirsync" => self.dirsync = true,
            "allow_other" => self.allow_other = Some(true),
            "noallow_other" => self.allow_other = Some(false),
            "default_permissions" => self.default_permissions = true,
            "nodefault_permissions" => self.default_permissions = false,
            // What is always so, and what only mount(8) and systemd act on.
            "nosuid" | "nodev" | "defaults" | "auto" | "noauto" | "user" | "users" | "nouser"
            | "owner" | "group" | "nofail" | "_netdev" => {}
            _ => match word.strip_prefix("max_read=").map(str::parse) {
                Some(Ok(bytes)) => self.max_read = Some(bytes),
                Some(Err(_)) => return false,
                None => return word.starts_with("x-") || word.starts_with("X-"),
            },
        }
        true
    }

    /// Whether others than who mounted get in.
    pub fn allows_other(&self) -> bool {
        self.allow_other.unwrap_or_else(|| rustix::process::geteuid().is_root())
    }

    /// The switches that mount(2) takes as flags and `fusermount3` as words.
    pub(crate) fn flags(&self) -> impl Iterator<Item = (MountFlags, &'static str)> {
        [
            (true, MountFlags::NOSUID, "nosuid"),
            (true, MountFlags::NODEV, "nodev"),
            (self.read_only, MountFlags::RDONLY, "ro"),
            (self.noexec, MountFlags::NOEXEC, "noexec"),
            (self.noatime, MountFlags::NOATIME, "noatime"),
            (self.nodiratime, MountFlags::NODIRATIME, "nodiratime"),
            (self.sync, MountFlags::SYNCHRONOUS, "sync"),
            (self.dirsync, MountFlags::DIRSYNC, "dirsync"),
        ]
        .into_iter()
        .filter_map(|(on, flag, word)| on.then_some((flag, word)))
    }

    /// The options of the FUSE file system that both ways share, each with a comma before it.
    pub(crate) fn fuse_words(&self) -> String {
        let mut words = String::new();
        if self.default_permissions {
            words.push_str(",default_permissions");
        }
        if self.allows_other() {
            words.push_str(",allow_other");
        }
        if let Some(bytes) = self.max_read {
            // Writing to a String cannot fail.
            let _ = write!(words, ",max_read={bytes}");
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_option_lists() {
        let mut options = MountOptions::new("s@unix:/x");
        for word in ["ro", "noexec", "noatime", "_netdev", "x-systemd.automount", "max_read=4096"] {
            assert!(options.apply_word(word), "{word}");
        }
        for word in ["suid", "dev", "max_read=", "max_read=-1", "", "RO", "uring=on"] {
            assert!(!options.apply_word(word), "{word}");
        }
        let words: Vec<_> = options.flags().map(|(_, word)| word).collect();
        assert_eq!(words, ["nosuid", "nodev", "ro", "noexec", "noatime"]);
        assert!(options.apply_word("noallow_other"));
        assert_eq!(options.fuse_words(), ",default_permissions,max_read=4096");
        assert!(options.apply_word("allow_other"));
        assert!(options.fuse_words().contains(",allow_other"));
    }
}
