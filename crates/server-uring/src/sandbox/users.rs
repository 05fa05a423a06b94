//! Namespaces without rights: in a user namespace of its own any user may make the others.
//!
//! The worker has the daemon's user and group there and no others, and gives up every capability
//! that it has in it (mod.rs) once its root stands. Files of other owners are shown as those of the
//! overflow id (65534).

use rustix::process::{Gid, Uid};
use std::io;
use std::path::Path;

/// In a process that has just entered a user namespace: it is who it was before. Until then it has
/// no id there.
///
/// # Errors
/// What the kernel says of a map.
pub fn map(uid: Uid, gid: Gid) -> io::Result<()> {
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
