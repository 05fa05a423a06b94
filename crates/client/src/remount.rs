//! `mount -o remount,..`: what can be changed of a mount that stands.
//!
//! Invariant: the kernel is asked only for what it can change (`ro`, `rw`, `noexec`, `noatime`,
//! `nodiratime`, `sync`); every other word must say what is so already, since mount(8) repeats the
//! words of fstab or of the mount table. The mount point is never touched.

use crate::options::{OptionError, Options, words};
use crate::status;
use fuser_fork::mount::{MountError, mount_at, remount};
use fuser_fork::mountinfo::MountInfo;
use std::io;
use std::path::Path;
use thiserror::Error;

/// Why a mount stays as it is.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum RemountError {
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Options(#[from] OptionError),
    #[error("cannot read the mount table")]
    Mounts(#[source] io::Error),
    #[error(
        "{what} cannot be changed while mounted: a remount changes ro, rw, noexec, noatime, \
         nodiratime and sync alone; unmount and mount again"
    )]
    Fixed { what: &'static str },
    #[error(
        "the mount was made with `ro`, so the daemon refuses writes: unmount and mount again with \
         `rw`"
    )]
    JoinedReadOnly,
}

/// Whether a list has the word `remount`.
pub fn is_wanted<S: AsRef<str>>(lists: &[S]) -> bool {
    words(lists).any(|word| word == "remount")
}

/// Changes the mount at `dir`; with `fake` all but that.
pub fn run(dir: &Path, lists: &[String], sloppy: bool, fake: bool) -> Result<(), RemountError> {
    let mount = mount_at(dir)?;
    let entries = status::collect(&status::dirs()).map_err(RemountError::Mounts)?;
    let ours = entries.into_iter().find(|entry| entry.mountpoint == mount.mount_point);
    // Without a client's word it was made with the defaults, as far as anybody knows.
    let made = ours.and_then(|entry| entry.client).map(|client| client.facts.options);
    let made = Options::parse(mount.source.clone(), &made.unwrap_or_default(), true)?;
    let wanted = plan(&made, &mount, lists, sloppy)?;
    if !fake {
        remount(&mount, &wanted.mount)?;
    }
    Ok(())
}

/// What the mount is to be: as it was `made`, as it is now, and then as `lists` say.
fn plan(
    made: &Options,
    mount: &MountInfo,
    lists: &[String],
    sloppy: bool,
) -> Result<Options, RemountError> {
    let mut now = made.clone();
    now.mount.read_only = mount.is_read_only();
    now.mount.noexec = mount.has("noexec");
    now.mount.noatime = mount.has("noatime");
    now.mount.nodiratime = mount.has("nodiratime");
    now.mount.sync = mount.has("sync");
    // mount(8) repeats what the kernel shows; who owns a mount nobody can change.
    let shown = |word: &&str| *word == "remount" || mount.has(word);
    let new: Vec<&str> = words(lists).filter(|word| !shown(word) || is_flag(word)).collect();
    let wanted = now.clone().and(&new, sloppy)?;
    if let Some(what) = difference(&now, &wanted) {
        return Err(RemountError::Fixed { what });
    }
    if made.mount.read_only && !wanted.mount.read_only {
        return Err(RemountError::JoinedReadOnly);
    }
    Ok(wanted)
}

/// `rw` may stand for the mount while its file system is `ro`: the last word counts.
fn is_flag(word: &str) -> bool {
    matches!(word, "ro" | "rw")
}

/// The first of the options that stay as they are which `wanted` has otherwise.
fn difference(now: &Options, wanted: &Options) -> Option<&'static str> {
    let fixed = [
        ("cache=", now.cache != wanted.cache),
        ("lanes=", now.lanes() != wanted.lanes()),
        ("slots=", now.slots != wanted.slots),
        ("spin=", now.spin != wanted.spin),
        ("uring=", now.uring != wanted.uring),
        ("writeback", now.writeback != wanted.writeback),
        ("acl", now.acl != wanted.acl),
        ("soft, hard and timeout=", now.soft != wanted.soft),
        ("strict", now.strict != wanted.strict),
        ("checksum=", now.checksum != wanted.checksum),
        ("dirsync", now.mount.dirsync != wanted.mount.dirsync),
        ("allow_other", now.mount.allows_other() != wanted.mount.allows_other()),
        ("default_permissions", now.mount.default_permissions != wanted.mount.default_permissions),
        ("max_read=", now.mount.max_read != wanted.mount.max_read),
    ];
    fixed.into_iter().find_map(|(what, differs)| differs.then_some(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(options: &str) -> MountInfo {
        MountInfo {
            mount_id: 1,
            parent_id: 0,
            dev_major: 0,
            dev_minor: 5,
            root: "/".into(),
            mount_point: "/m".into(),
            options: options.into(),
            fs_type: "fuse.ringfs".into(),
            source: "d@unix:/s".into(),
            super_options: "rw,user_id=0,group_id=0,default_permissions,allow_other".into(),
        }
    }

    fn plan_of(made: &str, now: &str, lists: &str) -> Result<Options, RemountError> {
        let made = Options::parse("d@unix:/s", &[made], false).expect("sound");
        plan(&made, &mount(now), &[lists.to_owned()], false)
    }

    #[test]
    fn flags_change_and_the_rest_may_be_repeated() {
        // As mount(8) of util-linux 2.38 calls the helper, with and without a line in fstab.
        let shown = "ro,nosuid,nodev,noatime,remount,user_id=0,group_id=0,default_permissions";
        let wanted = plan_of("noatime,lanes=1", "rw,nosuid,nodev,noatime", shown).expect("ro");
        assert!(wanted.mount.read_only && wanted.mount.noatime);
        let wanted = plan_of("lanes=1", "rw", "ro,remount,lanes=1,_netdev,nofail").expect("ro");
        assert!(wanted.mount.read_only && !wanted.mount.noexec);
        let wanted = plan_of("", "ro,noexec", "remount,rw").expect("rw again");
        assert!(!wanted.mount.read_only && wanted.mount.noexec, "the rest stays");
    }

    #[test]
    fn what_cannot_change_is_named() {
        let check = |made: &str, lists: &str, expected: &str| {
            let error = plan_of(made, "rw", lists).expect_err(lists).to_string();
            assert!(error.contains(expected), "{lists}: {error}");
        };
        check("", "remount,cache=never", "cache= cannot be changed");
        check("lanes=2", "remount,lanes=1", "lanes= cannot be changed");
        check("", "remount,soft,timeout=9", "timeout= cannot be changed");
        check("", "remount,nodefault_permissions,ro", "default_permissions");
        check("", "remount,dirsync", "dirsync");
        check("ro", "remount,rw", "made with `ro`");
        check("", "remount,lane=2", "did you mean `lanes=`");
    }
}
