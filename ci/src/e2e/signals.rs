//! Signals to programs that wait for a daemon that does not answer: a caught one must not be seen
//! in what their system calls say, as on a disk, and a killed program is gone.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use super::Rig;
use crate::guard;
use crate::proc::{Cmd, Process};
use crate::rig::{Mount, SETTLE};

/// A killed process that waits in the park must be gone within this.
const KILL_LIMIT: Duration = Duration::from_secs(2);

/// A program that catches SIGUSR1 without SA_RESTART, does `code` to the file, and tells the errno
/// and how many signals it caught.
fn program(rig: &Rig, mount: &Mount, name: &str, code: &str) -> Result<(Process, PathBuf)> {
    let code = format!("$SIG{{USR1}} = sub {{ $n++ }}; $! = 0; {code}; print $!+0, \" $n\\n\"");
    let log = rig.sandbox.path(&format!("{name}.log"));
    let cmd = Cmd::new("perl").args(["-e", &code, "--"]).arg(mount.dir.join(name).join("file"));
    Ok((cmd.spawn(&log)?, log))
}

/// Waits until the mount's client counts `want` of `what`.
fn wait_for(rig: &Rig, mount: &Mount, what: &str, want: u64) -> Result<()> {
    let mut last = None;
    guard::poll_until(SETTLE, || {
        let text = Cmd::new(&rig.bins.ringfs).args(["status", "--json"]).run()?;
        let all: serde_json::Value = serde_json::from_str(&text)?;
        let path = mount.dir.to_str().context("utf-8")?;
        let all = all.as_array().context("no list")?;
        let ours = all.iter().find(|entry| entry["mountpoint"] == path);
        last = ours.and_then(|entry| entry["client"][what].as_u64());
        Ok(last == Some(want))
    })?;
    ensure!(last == Some(want), "{what} is {last:?}, not {want}");
    Ok(())
}

pub fn while_the_daemon_is_stopped(rig: &Rig) -> Result<()> {
    // One request is in flight, all others wait in the client.
    let mount = rig.mount("mnt", "lanes=1,slots=1,cache=always")?;
    for name in ["read", "stat", "unlink", "killed", "killed-later"] {
        // Known directories, one for each: in one alone they would wait for its lock instead.
        fs::create_dir(mount.dir.join(name))?;
        fs::write(rig.backing.join(name).join("file"), "content")?;
    }
    rig.daemon.process().signal_all(Signal::STOP)?;
    let outcome = disturb(rig, &mount);
    rig.daemon.process().signal_all(Signal::CONT)?;
    let living = outcome?;
    for (name, mut process, log) in living {
        let status = process.wait(SETTLE)?.with_context(|| format!("{name} does not go on"))?;
        let said = fs::read_to_string(&log)?;
        ensure!(
            status.success() && said == "0 1\n",
            "{name}: {status}, errno and signals {said:?}"
        );
    }
    ensure!(!rig.backing.join("unlink/file").exists(), "the unlink was lost");
    mount.umount()
}

fn disturb(rig: &Rig, mount: &Mount) -> Result<Vec<(&'static str, Process, PathBuf)>> {
    let mut living = Vec::new();
    let read = "sysopen(F, $ARGV[0], 0) and sysread(F, $b, 99) == 7 or $! ||= 5";
    let codes = [("stat", "stat $ARGV[0]"), ("read", read), ("unlink", "unlink $ARGV[0]")];
    let (mut waiting, mut signals) = (0, 0);
    for (name, code) in codes {
        let (process, log) = program(rig, mount, name, code)?;
        // One by one, so that the first is the one in flight.
        wait_for(rig, mount, if waiting == 0 { "in_flight" } else { "parked" }, waiting.max(1))?;
        waiting += 1;
        living.push((name, process, log));
    }
    let (mut killed, _) = program(rig, mount, "killed", "stat $ARGV[0]")?;
    wait_for(rig, mount, "parked", waiting)?;
    let (mut later, _) = program(rig, mount, "killed-later", "stat $ARGV[0]")?;
    wait_for(rig, mount, "parked", waiting + 1)?;
    for process in living.iter().map(|(_, process, _)| process).chain([&later]) {
        process.signal(Signal::USR1)?;
        signals += 1;
    }
    wait_for(rig, mount, "interrupts", signals)?;
    for (name, process) in [("killed", &mut killed), ("killed-later", &mut later)] {
        let begun = Instant::now();
        process.signal(Signal::KILL)?;
        if process.wait(KILL_LIMIT)?.is_none() {
            bail!("{name} is there {:?} after its SIGKILL", begun.elapsed());
        }
    }
    for (name, process, log) in &mut living {
        let ended = process.wait(Duration::ZERO)?;
        ensure!(ended.is_none(), "{name} ended early: {:?}", fs::read_to_string(log)?);
    }
    Ok(living)
}
