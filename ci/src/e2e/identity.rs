//! Whose files: ids that a share translates, POSIX ACLs, names of extended attributes.
//!
//! Each case is a shell script with a daemon of its own on the rig's ext4 directory: `$back` is the
//! directory, `$mnt` the mount, `fails WORD... ` wants an error and `as UID WORD...` runs as a user
//! with no groups but his own.

use std::time::Duration;

use anyhow::Result;

use super::{Case, Rig};
use crate::proc::Cmd;
use crate::rig::{self, Daemon};

pub const CASES: &[Case] = &[
    ("acls_are_the_hosts", acls),
    ("acls_are_refused_unless_asked_for", no_acls),
    ("ids_are_translated_both_ways", ids),
    ("ids_are_squashed_and_forbidden", squashed),
    ("acls_name_the_hosts_ids", acl_ids),
    ("set_id_bits_can_be_refused", nosuid),
    ("attributes_have_other_names", xattrs),
];

const LIMIT: Duration = Duration::from_secs(60);

const HEAD: &str = r#"
set -eu
umask 022
fails() { if "$@" 2>/dev/null; then echo "should fail: $*"; exit 1; fi; }
as() { u=$1; shift; setpriv --reuid=$u --regid=$u --clear-groups "$@"; }
is() { [ "$1" = "$2" ] || { echo "'$1' should be '$2'"; exit 1; }; }
"#;

/// Runs a script beside a mount of the directory with these options of share and mount.
fn script(rig: &Rig, share: &str, options: &str, script: &str) -> Result<()> {
    let shares = [format!("{}{share}", rig::share("own", &rig.backing))];
    let daemon = Daemon::start(&rig.sandbox, &rig.bins, "own", &shares, &[])?;
    let mount = daemon.mount(&rig.sandbox, "own", "own", options)?;
    let text = format!("{HEAD}{script}");
    let shell = Cmd::new("sh").args(["-c", &text]).limit(LIMIT);
    let dir = mount.dir.clone();
    shell.env("mnt", &dir).env("back", &rig.backing).run()?;
    mount.umount()?;
    // A case may mount more than once.
    std::fs::remove_dir(&dir)?;
    daemon.stop()
}

/// The same things done in the mount and on the bare disk give the same ACLs and modes.
fn acls(rig: &Rig) -> Result<()> {
    script(
        rig,
        ",acl",
        "acl",
        r#"
doit() {
  cd $1
  touch f; chown 1000:1000 f; chmod 640 f
  setfacl -m u:1001:r,g:1002:rw f
  touch masked; setfacl -m u:1001:rwx masked; chmod g=r masked
  mkdir d; setfacl -d -m u:1001:rwx,g::rx,o::- d
  (umask 077; touch d/file; mkdir d/dir; mkfifo d/fifo; ln -s file d/link)
  (umask 027; touch plain; mkdir plaindir)
  mkdir open; chmod 777 open; setfacl -d -m u:1000:rw open
  as 1003 touch open/by-user
  cp -p f copy
  setfacl -b masked; mkdir gone; setfacl -d -m u:5:x gone; setfacl -k gone
  touch sgid; chown 1000:7 sgid; chmod 2770 sgid; as 1000 setfacl -m u:1001:r sgid
  cd /
}
mkdir $mnt/a $back/b
doit $mnt/a; doit $back/b
cd $mnt/a; getfacl -Rnp . >/tmp/ringfs-acl-$$.a
cd $back/b; getfacl -Rnp . >/tmp/ringfs-acl-$$.b; cd /
diff /tmp/ringfs-acl-$$.a /tmp/ringfs-acl-$$.b || { rm /tmp/ringfs-acl-$$.?; exit 1; }
grep -q 'user:1001:rwx' /tmp/ringfs-acl-$$.a; rm /tmp/ringfs-acl-$$.?
# The guest's kernel goes by them.
is "$(as 1001 cat $mnt/a/f && echo read)" read
fails as 1003 cat $mnt/a/f
fails as 1001 sh -c "echo x >>$mnt/a/f"
"#,
    )
}

fn no_acls(rig: &Rig) -> Result<()> {
    let refused = r#"
touch $mnt/f; setfacl -m u:1001:r $back/f
fails setfacl -m u:1001:r $mnt/f
fails getfattr -n system.posix_acl_access $mnt/f
is "$(getfattr -m - $mnt/f)" ""
(umask 077; touch $mnt/private); is "$(stat -c %a $back/private)" 600
"#;
    script(rig, "", "acl", refused)?;
    script(rig, ",acl", "", refused)
}

fn ids(rig: &Rig) -> Result<()> {
    script(
        rig,
        ",uid-map=map:0:100000:65536,gid-map=map:0:200000:65536",
        "",
        r#"
own() { stat -c %u:%g "$1"; }
chown 100000:200000 $back; chmod 755 $back
touch $mnt/root; is $(own $mnt/root) 0:0; is $(own $back/root) 100000:200000
mkdir $mnt/open; chmod 777 $mnt/open
as 1000 sh -c "touch $mnt/open/f; mkdir $mnt/open/d; ln -s x $mnt/open/l; mkfifo $mnt/open/p"
for f in f d l p; do
  is $(own $mnt/open/$f) 1000:1000; is $(own $back/open/$f) 101000:201000
done
chown 5:6 $mnt/root; is $(own $back/root) 100005:200006; is $(own $mnt/root) 5:6
chown -h 7 $mnt/open/l; is $(own $back/open/l) 100007:201000
is "$(ls -ln $mnt/open | awk '$9 == "f" { print $3 ":" $4 }')" 1000:1000
chown 65536 $mnt/root; is $(own $back/root) 65536:200006
# A group that the caller has beside its own.
mkdir $mnt/shared; chgrp 3000 $mnt/shared; chmod 2770 $mnt/shared
setpriv --reuid=1000 --regid=1000 --groups=3000 touch $mnt/shared/f
is $(own $back/shared/f) 101000:203000
fails as 1001 touch $mnt/shared/g
"#,
    )
}

fn squashed(rig: &Rig) -> Result<()> {
    script(
        rig,
        ",uid-map=squash-guest:0:1234:4294967295,uid-map=squash-host:0:0:4294967295",
        "",
        r#"
chown 1234 $back; chmod 777 $back
touch $mnt/a; as 1000 sh -c ": >$mnt/b"
is "$(stat -c %u $back/a $back/b | xargs)" '1234 1234'
is "$(stat -c %u $mnt/a $mnt/b | xargs)" '0 0'
"#,
    )?;
    script(
        rig,
        ",uid-map=forbid-guest:0:1000,gid-map=forbid-guest:0:1",
        "",
        r#"
chmod 777 $back
fails touch $mnt/c; fails mkdir $mnt/c
as 1000 touch $mnt/c; as 1000 chmod 600 $mnt/c; is "$(stat -c %u $back/c)" 1000
fails chown 999 $mnt/c; fails chgrp 0 $mnt/c; chown 1001:1 $mnt/c
is "$(stat -c %u:%g $back/c)" 1001:1
"#,
    )
}

fn acl_ids(rig: &Rig) -> Result<()> {
    script(
        rig,
        ",acl,uid-map=map:0:100000:65536,gid-map=map:0:200000:65536",
        "acl",
        r#"
chown 100000:200000 $back; touch $mnt/f; setfacl -m u:1001:rw,g:1002:r $mnt/f
getfacl -cnp $mnt/f | grep -q '^user:1001:rw-$'; getfacl -cnp $mnt/f | grep -q '^group:1002:r--$'
getfacl -cnp $back/f | grep -q '^user:101001:rw-$'
getfacl -cnp $back/f | grep -q '^group:201002:r--$'
mkdir $mnt/d; setfacl -d -m u:7:rwx $mnt/d; touch $mnt/d/new
getfacl -cnp $back/d/new | grep -q '^user:100007:rwx'
getfacl -cnp $mnt/d/new | grep -q '^user:7:rwx'
"#,
    )
}

fn nosuid(rig: &Rig) -> Result<()> {
    script(
        rig,
        ",nosuid",
        "",
        r#"
cp /bin/true $mnt/tool; chmod 6755 $mnt/tool; is $(stat -c %a $back/tool) 755
mkdir $mnt/d; chmod 2755 $mnt/d; is $(stat -c %a $back/d) 2755
fails setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 $mnt/tool
"#,
    )?;
    script(rig, "", "", "touch $mnt/t; chmod 4755 $mnt/t; is $(stat -c %a $back/t) 4755")
}

fn xattrs(rig: &Rig) -> Result<()> {
    script(
        rig,
        ",xattr-map=:map::user.ringfs.:",
        "",
        r#"
get() { getfattr --only-values -n "$1" "$2"; }
touch $mnt/f
setfattr -n trusted.overlay -v yes $mnt/f; setfattr -n user.note -v text $mnt/f
setfattr -n trusted.host -v secret $back/f; setfattr -n user.other -v secret $back/f
is "$(get user.ringfs.trusted.overlay $back/f)" yes
is "$(get trusted.overlay $mnt/f)" yes
is "$(getfattr -m - $mnt/f | grep -v '^#' | xargs)" 'trusted.overlay user.note'
fails getfattr -n trusted.host $mnt/f; fails getfattr -n user.other $mnt/f
setfattr -x user.note $mnt/f; fails getfattr -n user.ringfs.user.note $back/f
"#,
    )?;
    script(
        rig,
        ",xattr-map=:map:trusted.:user.ringfs.:",
        "",
        r#"
touch $mnt/g; chmod 666 $mnt/g
setfattr -n trusted.x -v root $mnt/g
# Its own user cannot say what only root may.
fails as 1000 setfattr -n user.ringfs.trusted.x -v user $mnt/g
as 1000 setfattr -n user.x -v user $mnt/g
is "$(getfattr -m - $back/g | grep -v '^#' | xargs)" 'user.ringfs.trusted.x user.x'
is "$(getfattr -m - $mnt/g | grep -v '^#' | xargs)" 'trusted.x user.x'
"#,
    )
}
