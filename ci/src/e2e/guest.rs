//! What a guest's system does with `ringfs`: mount(8) and fstab, remounts, lazy unmounts, users.
//!
//! Invariant: /sbin, /etc/fstab, /etc/fuse.conf and /dev/fuse are the case's own, in a mount
//! namespace that ends with its shell; what runs there is the real mount(8), umount(8) and
//! fusermount3, and the user is a real one without rights.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};

use super::{Case, Rig};
use crate::proc::Cmd;

pub const CASES: &[Case] = &[
    ("mount_8_and_fstab", mount_8_and_fstab),
    ("remount_changes_flags_alone", remount),
    ("users_mount_by_fusermount3", users_mount),
    ("the_doctor_tells_what_is_missing", doctor),
];

/// Each script begins so: `$src` is the share, `$mnt` a place for it, `$ringfs` the program, also
/// as mount(8) looks for it; `says CODE WORDS COMMAND..` runs what must end with that code and say
/// that, in one line or in two. At its end no client is left.
const PRELUDE: &str = r#"
set -eu
here=${1%/}
ringfs=$here/ringfs src=d@unix:$2 mnt=$here/own/mnt
user() { setpriv --reuid=65534 --regid=65534 --clear-groups -- "$@"; }
says() {
    code=$1 words=$2 got=0; shift 2
    out=$("$@" 2>&1) || got=$?
    [ $got = $code ] || { echo "ended with $got, not $code: $*: $out"; exit 9; }
    folded=$(printf %s "$out" | tr -s ' \n' ' ')
    case "$folded" in *"$words"*) ;; *) echo "no '$words' from $*: $out"; exit 9 ;; esac
}
shown() { grep " $mnt " /proc/self/mountinfo; }
gone() {
    ! shown >/dev/null || { echo "it is still mounted: $(shown)"; exit 9; }
}
clients() {
    for exe in /proc/[0-9]*/exe; do
        if [ "$(readlink $exe)" = $ringfs ]; then exe=${exe%/exe}; echo ${exe#/proc/}; fi
    done
}
cleanup() {
    umount -l $mnt 2>/dev/null || :
    for _ in $(seq 100); do [ -n "$(clients)" ] || return 0; sleep 0.05; done
    echo "clients are left: $(clients)"; kill -9 $(clients); exit 9
}
trap cleanup EXIT
mount -t tmpfs -o mode=755 own $here/own
mkdir $here/own/upper $here/own/work $mnt
mount -t overlay -o lowerdir=/usr/sbin,upperdir=$here/own/upper,workdir=$here/own/work own /usr/sbin
ln -s $ringfs /usr/sbin/mount.ringfs
ln -s $ringfs /usr/sbin/mount.fuse.ringfs
fstab() { echo "$src $mnt ringfs $1 0 0" >$here/own/fstab; }
fstab noauto
mount --bind $here/own/fstab /etc/fstab
"#;

/// Runs a script behind the prelude in a mount namespace of its own.
fn script(rig: &Rig, text: &str) -> Result<()> {
    // Users cannot reach every build directory.
    let ringfs = rig.sandbox.path("ringfs");
    fs::copy(&rig.bins.ringfs, &ringfs)?;
    fs::create_dir(rig.sandbox.path("own"))?;
    fs::set_permissions(&rig.daemon.socket, fs::Permissions::from_mode(0o666))?;
    fs::write(rig.backing.join("file"), "of the host")?;
    let shell =
        Cmd::new("unshare").args(["--mount", "sh", "-c", &format!("{PRELUDE}{text}"), "sh"]);
    let output = shell.arg(rig.sandbox.path("")).arg(&rig.daemon.socket).output()?;
    ensure!(output.status.success(), "{}: {}", output.status, output.text);
    Ok(())
}

fn mount_8_and_fstab(rig: &Rig) -> Result<()> {
    script(
        rig,
        r#"
mount -t ringfs $src $mnt -o noatime,lanes=1
shown | grep -q 'nosuid,nodev,noatime.* fuse.ringfs '
[ "$(cat $mnt/file)" = 'of the host' ]
umount $mnt; gone
fstab lanes=1,_netdev,nofail,noauto,x-systemd.automount,x-systemd.requires=network.target,comment=a
mount $mnt; shown >/dev/null
says 32 'a mount point already' mount $mnt
umount $src; gone
fstab defaults,_netdev,X-mount.mkdir
mount -a -O _netdev; shown >/dev/null
says 0 '' mount -a
exec 5<$mnt/file
says 32 busy umount $mnt
umount -l $mnt; gone
[ "$(cat <&5)" = 'of the host' ] || { echo 'the open file is lost'; exit 9; }
exec 5<&-
# The codes are those of mount(8).
says 0 '' mount -f -t ringfs $src $mnt; gone
says 1 'did you mean `lanes=`' mount -t ringfs $src $mnt -o lane=1; gone
says 0 '' mount -s -t ringfs $src $mnt -o lane=1,lanes=1; umount $mnt; gone
says 1 'names no share' mount -t ringfs nothing $mnt
says 32 'no share of that name' mount -t ringfs n$src $mnt; gone
says 1 usage mount.ringfs one
says 0 "mount.ringfs: $src" mount -v -n -t ringfs $src $mnt; umount $mnt; gone
says 1 nsenter mount.ringfs $src $mnt -N /proc/self/ns/net
"#,
    )
}

fn remount(rig: &Rig) -> Result<()> {
    script(
        rig,
        r#"
fstab lanes=1,cache=never,noauto,_netdev
mount $mnt
mount -o remount,ro $mnt
shown | grep -q ' ro,.* ro,'
says 1 'Read-only' touch $mnt/new
$ringfs status --json | grep -q '"read_only": true'
mount -o remount,rw,noexec $mnt
shown | grep -q ' rw,.*noexec'
touch $mnt/new
# Without a line in fstab mount(8) repeats what the kernel shows.
: >$here/own/fstab
mount -o remount,noatime $mnt
shown | grep -q ' rw,.*noexec,noatime'
says 0 '' mount -t ringfs $src $mnt -o remount,lanes=1,sync
says 32 'cache= cannot be changed while mounted' mount -o remount,cache=always $mnt
says 1 'did you mean `lanes=`' mount -o remount,lane=1 $mnt
exec 5>$mnt/new
says 32 'open for writing' mount -o remount,ro $mnt
exec 5>&-
says 1 'no permission' user $ringfs mount $src $mnt -o remount,ro
umount $mnt; gone
says 1 'no ringfs mount' $ringfs mount $src $mnt -o remount,ro
# What the daemon was told at the start stays so.
mount -t ringfs $src $mnt -o ro
says 32 'the daemon refuses writes' mount -o remount,rw $mnt
umount $mnt; gone
"#,
    )
}

fn users_mount(rig: &Rig) -> Result<()> {
    script(
        rig,
        r#"
mknod -m 666 $here/own/fuse c 10 229
mount --bind $here/own/fuse /dev/fuse
: >$here/own/fuse.conf
mount --bind $here/own/fuse.conf /etc/fuse.conf
says 1 'no write access' user $ringfs mount $src $mnt
chown 65534:65534 $mnt
mkdir -m 700 $here/own/run; chown 65534 $here/own/run; export XDG_RUNTIME_DIR=$here/own/run
user $ringfs mount $src $mnt -o lanes=2
shown | grep -q 'nosuid,nodev.*user_id=65534,group_id=65534,default_permissions$'
[ "$(user cat $mnt/file)" = 'of the host' ]
user $ringfs status | grep -q ' lanes 2'
says 1 'Permission denied' cat $mnt/file
user $ringfs umount $mnt; gone
says 1 'user_allow_other' user $ringfs mount $src $mnt -o allow_other
echo user_allow_other >$here/own/fuse.conf
user $ringfs mount $src $mnt -o allow_other,noatime
[ "$(cat $mnt/file)" = 'of the host' ]
user $ringfs umount $mnt; gone
# The whole way: a user's mount(8), which becomes the user again before it calls us.
fstab user,noauto
user mount $mnt
shown | grep -q 'user_id=65534'
user $ringfs umount $mnt; gone
says 1 'package fuse3' user env PATH=/nonexistent $ringfs mount $src $mnt
chmod 600 $here/own/fuse
says 1 'chmod 666 /dev/fuse' user $ringfs mount $src $mnt
gone
"#,
    )
}

fn doctor(rig: &Rig) -> Result<()> {
    script(
        rig,
        r#"
says 0 ' 0 fail' $ringfs doctor $src
says 0 'wire version 1' $ringfs doctor $src
says 0 '"level": "ok"' $ringfs doctor $src --json
says 1 'has no share of that name' $ringfs doctor n$src
says 1 'is ringfsd running' $ringfs doctor d@unix:$here/none.sock
says 2 'names no share' $ringfs doctor nothing
mknod -m 600 $here/own/fuse c 10 229
mount --bind $here/own/fuse /dev/fuse
says 1 'chmod 666 /dev/fuse' user $ringfs doctor $src
mount --bind /dev/null /dev/fuse
says 1 '10:229' $ringfs doctor
umount /dev/fuse; chmod 666 $here/own/fuse
says 0 'by fusermount3' user $ringfs doctor $src
mount --bind /dev/null /usr/bin/fusermount3
says 1 'not setuid root' user $ringfs doctor $src
"#,
    )
}
