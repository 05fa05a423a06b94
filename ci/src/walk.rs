//! `cargo xtask walk`: a newcomer's walk, from an empty Debian to a mounted share by the README's
//! commands alone, timed.
//!
//! Debian's smallest system (debootstrap, kept in `target/walk`) under an overlay that is thrown
//! away, in namespaces of its own. What the README takes for granted is given: git, gcc and a Rust
//! toolchain, which is this machine's. Invariant: every further command is a line of the README,
//! in its order; nothing is left but the cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::deps;
use crate::guard::{Guard, Undo};
use crate::paths;
use crate::proc::Cmd;

const SUITE: &str = "bookworm";
const BASE_LIMIT: Duration = Duration::from_secs(900);
/// A build from nothing on a busy machine, with the tool that makes packages.
const WALK_LIMIT: Duration = Duration::from_secs(3600);
/// What the README asks a newcomer to have.
const PREREQUISITES: &str = "git gcc";

/// What `cargo xtask walk` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Make the packages out here and begin where they are installed: a minute instead of ten
    #[arg(long)]
    quick: bool,
}

/// Walks; gives the closing line.
pub fn run(args: &Args) -> Result<String> {
    deps::debian(&["debootstrap", "util-linux"])?;
    let place = paths::target().join("walk");
    fs::create_dir_all(&place)?;
    let base = base(&place)?;
    if args.quick {
        paths::cargo().args(["xtask", "package"]).limit(WALK_LIMIT).show()?;
    }
    let own = place.join(format!("run.{}", std::process::id()));
    fs::create_dir(&own)?;
    let _guard = Guard::new(Undo::Dir(own.clone()));
    let readme = fs::read_to_string(paths::root().join("README.md"))?;
    let script = script(&readme, args.quick)?;
    fs::write(own.join("walk.sh"), &script)?;
    let outer = ["--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"];
    let enter = Cmd::new("unshare").args(outer).args(["sh", "-euc", ENTER, "walk"]);
    let home = std::env::home_dir().context("no home directory")?;
    let enter = enter.arg(&base).arg(&own).arg(paths::root()).arg(home);
    enter.limit(WALK_LIMIT).show().context("the walk ends here")?;
    let seconds = fs::read_to_string(own.join("up/took")).context("the walk has no end")?;
    Ok(format!("a share is mounted after {} s", seconds.trim()))
}

/// The empty system, made once.
fn base(place: &Path) -> Result<PathBuf> {
    let base = place.join(SUITE);
    if !base.exists() {
        let half = place.join(format!("{SUITE}.half"));
        if half.exists() {
            fs::remove_dir_all(&half)?;
        }
        println!("walk: debootstrap {SUITE}, once");
        let made = Cmd::new("debootstrap").args(["--variant=minbase", SUITE]).arg(&half);
        made.limit(BASE_LIMIT).run()?;
        fs::rename(&half, &base)?;
    }
    Ok(base)
}

/// `$1` the base, `$2` a place of ours, `$3` the repository, `$4` who has the toolchain. The root
/// becomes a mount of its own, as a container's is. Whom this machine trusts for its network, an
/// inspecting proxy for one, is trusted inside too.
const ENTER: &str = r#"
mkdir $2/up $2/work $2/root
mount -t overlay overlay -o lowerdir=$1,upperdir=$2/up,workdir=$2/work $2/root
root=$2/root
cp $2/walk.sh $root/walk.sh
cp /etc/resolv.conf $root/etc/resolv.conf
trust=
if [ -n "${SSL_CERT_FILE:-}" ]; then
  cp "$SSL_CERT_FILE" $root/etc/trust.crt
  trust=SSL_CERT_FILE=/etc/trust.crt
fi
mkdir -p $root/root/.rustup $root/root/.cargo/bin $root/root/.cargo/registry $root/old
mount --rbind /dev $root/dev
mount -t proc proc $root/proc
mount -t tmpfs tmpfs $root/tmp
mount --bind $4/.rustup $root/root/.rustup
mount --bind $4/.cargo/bin $root/root/.cargo/bin
mount --bind $4/.cargo/registry $root/root/.cargo/registry
git clone -q --no-hardlinks $3 $root/root/ringfs
if [ -d $3/target/packages ]; then
  mkdir -p $root/root/ringfs/target/packages
  cp $3/target/packages/*.deb $root/root/ringfs/target/packages
fi
cd $root
pivot_root . old
umount -l old
path=/root/.cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec env -i HOME=/root PATH=$path $trust sh -eu /walk.sh
"#;

const BEGIN: &str = r#"
begun=$(date +%s)
said() { printf '%4s s  $ %s\n' "$(($(date +%s) - begun))" "$*"; }
cd /root/ringfs
"#;

/// What is in the share is in the mount, and what is written there is in the share.
const END: &str = r#"
date +%s.%N >/srv/src/from-host
cmp /srv/src/from-host /mnt/from-host
cp /mnt/from-host /mnt/from-guest
cmp /srv/src/from-guest /mnt/from-guest
expr $(date +%s) - $begun >/took
"#;

/// All that is done inside.
fn script(readme: &str, quick: bool) -> Result<String> {
    let mut out = BEGIN.to_owned();
    let mut say = |line: &str, run: &str| {
        out.push_str(&format!("said '{}'\n{run}\n", line.replace('\'', "'\\''")));
    };
    let quiet = "export DEBIAN_FRONTEND=noninteractive";
    let install = format!("apt-get -qq update && apt-get -qq install {PREREQUISITES} >/dev/null");
    if !quick {
        say(&install, &format!("{quiet}\n{install} 2>&1"));
    }
    let lines = commands(readme, "## Install").into_iter().chain(commands(readme, "## Use"));
    let mut is_mounted = false;
    for line in lines.filter(|line| !(quick && line.starts_with("cargo "))) {
        if line.starts_with("ringfsd ") {
            // It stays in the foreground: another terminal.
            let socket = line.split("unix:").nth(1).context("the daemon's socket")?;
            let wait = format!("until [ -S {socket} ]; do sleep 0.1; done");
            say(&line, &format!("{line} 2>/tmp/ringfsd.log &\n{wait}"));
        } else if line.starts_with("ringfs mount ") {
            say(&line, &format!("{line}\n{END}"));
            is_mounted = true;
        } else {
            say(&line, &line);
        }
    }
    ensure!(is_mounted, "the README has no `ringfs mount`");
    Ok(out)
}

/// The lines of a section's code, without their remarks.
fn commands(text: &str, heading: &str) -> Vec<String> {
    let section = text.lines().skip_while(|line| *line != heading).skip(1);
    let mut is_code = false;
    let mut found = Vec::new();
    for line in section.take_while(|line| !line.starts_with("## ")) {
        if line.starts_with("```") {
            is_code = !is_code;
        } else if is_code {
            let command = line.split(" #").next().unwrap_or_default().trim();
            found.extend((!command.is_empty()).then(|| command.to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_the_lines_of_code() {
        let text = "## One\n```\nno\n```\n## Two\nword\n```\na b   # why\n\nc\n```\nd\n## Three\n";
        assert_eq!(commands(text, "## Two"), ["a b", "c"]);
        assert!(commands(text, "## Four").is_empty());
    }

    #[test]
    fn the_readme_leads_to_a_mount() {
        let readme = fs::read_to_string(paths::root().join("README.md")).unwrap();
        let all = script(&readme, false).unwrap();
        for word in ["cargo xtask package", "dpkg -i", "ringfsd --share", "ringfs umount"] {
            assert!(all.contains(word), "{word}: {all}");
        }
        assert!(!script(&readme, true).unwrap().contains("cargo "));
    }
}
