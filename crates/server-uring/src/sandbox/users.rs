//! Namespaces without rights: in a user namespace of its own any user may make the others.
//!
//! By default the worker has the daemon's user and group there and no others, and gives up every
//! capability that it has in it (mod.rs) once its root stands. Files of other owners are shown as
//! those of the overflow id (65534). With subordinate ids (subuid(5)) it is root there, which is
//! the daemon's user outside, and has the users that the host lends to that one besides.

use crate::channel::Part;
use rustix::process::{Gid, Pid, Uid};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Who there is in a worker's user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// The daemon's user and group, as outside.
    Own,
    /// As root, and those that are lent to that user.
    Lent(Lent),
}

/// What /etc/subuid and /etc/subgid lend to a user: the first id and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lent {
    users: (u32, u32),
    groups: (u32, u32),
}

/// Why a worker does not have a directory that its parent has.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be had in its user namespace{hint}", path.display())]
pub struct NotInside {
    /// What it is.
    pub part: Part,
    path: PathBuf,
    hint: &'static str,
    source: io::Error,
}

impl NotInside {
    /// Of what it is, where it is, and who the worker is.
    pub fn of(part: Part, path: &Path, ids: Ids, source: io::Error) -> NotInside {
        let hint = match (ids, source.kind()) {
            (Ids::Lent(_), io::ErrorKind::PermissionDenied) => {
                " (with --subordinate-ids the other groups of the daemon's user do not count)"
            }
            (_, io::ErrorKind::StaleNetworkFileHandle) => " (another directory is there by now)",
            _ => "",
        };
        NotInside { part, path: path.to_owned(), hint, source }
    }
}

impl Lent {
    /// What this process's user has.
    ///
    /// # Errors
    /// Nothing is lent to it.
    pub fn to_us() -> io::Result<Lent> {
        let uid = rustix::process::geteuid().as_raw();
        let name = name_of(uid);
        let of = |file: &str| {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            range_of(&text, uid, name.as_deref())
                .ok_or_else(|| io::Error::other(format!("{file} has no line for the user {uid}")))
        };
        Ok(Lent { users: of("/etc/subuid")?, groups: of("/etc/subgid")? })
    }

    /// Maps a process that is in a user namespace already; by who is not: `newuidmap` and
    /// `newgidmap` have the right to.
    ///
    /// # Errors
    /// They are not there, or say no.
    pub fn map(&self, pid: Pid, uid: Uid, gid: Gid) -> io::Result<()> {
        let ids =
            [("newuidmap", uid.as_raw(), self.users), ("newgidmap", gid.as_raw(), self.groups)];
        for (program, own, (first, count)) in ids {
            let mut command = Command::new(program);
            command.arg(pid.as_raw_pid().to_string()).args(["0", &own.to_string(), "1"]);
            command.args(["1", &first.to_string(), &count.to_string()]);
            let output = command.output().map_err(|error| {
                io::Error::new(error.kind(), format!("{program} (package uidmap): {error}"))
            })?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr);
                return Err(io::Error::other(format!("{program}: {}", said.trim())));
            }
        }
        Ok(())
    }
}

/// Of lines `USER:FIRST:COUNT`, where the user is a name or a number.
fn range_of(text: &str, uid: u32, name: Option<&str>) -> Option<(u32, u32)> {
    text.lines().find_map(|line| {
        let mut parts = line.split(':');
        let user = parts.next()?;
        let is_ours = Some(user) == name || user.parse() == Ok(uid);
        let range = (parts.next()?.trim().parse().ok()?, parts.next()?.trim().parse().ok()?);
        (is_ours && range.1 > 0).then_some(range)
    })
}

fn name_of(uid: u32) -> Option<String> {
    let text = std::fs::read_to_string("/etc/passwd").ok()?;
    text.lines().find_map(|line| {
        let mut parts = line.split(':');
        let name = parts.next()?;
        (parts.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

/// In a process that has just entered a user namespace: it is who it was before. Until then it has
/// no id there.
///
/// # Errors
/// What the kernel says of a map.
pub fn map_own(uid: Uid, gid: Gid) -> io::Result<()> {
    let at = Path::new("/proc/self");
    let write = |file: &str, text: String| std::fs::write(at.join(file), text);
    // Without it the kernel takes no group's map from who has no right to set groups.
    write("setgroups", "deny".into())?;
    write("gid_map", format!("{gid} {gid} 1"))?;
    write("uid_map", format!("{uid} {uid} 1"))
}

/// What stands in the way of a user namespace, or of mounts in it, and what is to be done.
pub fn why_not() -> &'static str {
    let sysctl = |name: &str| {
        let text = std::fs::read_to_string(Path::new("/proc/sys").join(name));
        text.ok().map(|text| text.trim().to_owned())
    };
    let is = |name: &str, value: &str| sysctl(name).as_deref() == Some(value);
    if is("user/max_user_namespaces", "0") {
        "the host allows no user namespaces: sysctl user.max_user_namespaces=15000, or \
         --sandbox=landlock, which does without namespaces"
    } else if is("kernel/unprivileged_userns_clone", "0") {
        "the host allows them to root alone: sysctl kernel.unprivileged_userns_clone=1, or \
         --sandbox=landlock, which does without namespaces"
    } else if is("kernel/apparmor_restrict_unprivileged_userns", "1") {
        "AppArmor keeps them from programs without a profile: give ringfsd one that says `userns,` \
         or sysctl kernel.apparmor_restrict_unprivileged_userns=0, or --sandbox=landlock, which \
         does without namespaces"
    } else {
        "a container's seccomp profile or a kernel without CONFIG_USER_NS may be why; \
         --sandbox=landlock does without namespaces"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lent_to_whom() {
        let text = "root:100000:65536\nsomebody:165536:65536\n4711:300000:10\nbad\nother:x:1\n";
        let check = |uid, name, expected| assert_eq!(range_of(text, uid, name), expected);
        check(1000, Some("somebody"), Some((165_536, 65_536)));
        check(4711, None, Some((300_000, 10)));
        check(0, Some("root"), Some((100_000, 65_536)));
        check(1, Some("bad"), None);
        check(1, Some("other"), None);
        check(1, None, None);
    }
}
