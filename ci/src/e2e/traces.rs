//! One name for an operation on both ends, `SESSION.LANE.SLOT.SEQ`, in the guest's log and the
//! daemon's; no two operations of a daemon have the same.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{Case, Rig};
use crate::guard::{self, Guard, Undo};
use crate::proc::Cmd;
use crate::rig::{self, Daemon, SETTLE};

pub const CASES: &[Case] = &[("an_operation_has_one_name_on_both_ends", one_name)];

/// What a line of a log says of `key`.
fn word<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let after = |mark: &str| line.split_once(&format!(" {key}{mark}")).map(|(_, rest)| rest);
    after("=").or_else(|| after(": "))?.split([' ', ',']).next()
}

/// Of a log: which opcode each name had, in the lines with that message.
fn named(log: &Path, message: &str) -> Result<HashMap<String, String>> {
    let text = fs::read_to_string(log).with_context(|| format!("read {}", log.display()))?;
    let lines = text.lines().filter(|line| line.contains(message));
    let pairs =
        lines.filter_map(|line| Some((word(line, "op")?.into(), word(line, "opcode")?.into())));
    Ok(pairs.collect())
}

fn one_name(rig: &Rig) -> Result<()> {
    let shares = [rig::share("own", &rig.backing)];
    let daemon = Daemon::start(&rig.sandbox, &rig.bins, "own", &shares, &["--log=trace"])?;
    let one = of_a_guest(rig, &daemon, "own")?;
    let other = of_a_guest(rig, &daemon, "other")?;
    let twice = one.keys().find(|op| other.contains_key(*op));
    ensure!(twice.is_none(), "{twice:?} is an operation of both guests");
    daemon.stop()
}

/// Works in a mount; what its guest calls each operation, which the daemon calls the same.
fn of_a_guest(rig: &Rig, daemon: &Daemon, name: &str) -> Result<HashMap<String, String>> {
    let dir = rig.sandbox.make_dir(name)?;
    let log = rig.sandbox.path(&format!("{name}.guest.log"));
    let guard = Guard::new(Undo::Mount(dir.clone()));
    let mount = daemon.mount_cmd("own", &dir, "cache=never");
    mount.env("RUST_LOG", "trace").arg("--log").arg(&log).run()?;
    for n in 0..20 {
        let path = dir.join(format!("file-{n}"));
        fs::write(&path, "x")?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    }
    Cmd::new(&rig.bins.ringfs).arg("umount").arg(&dir).limit(SETTLE).run()?;
    guard.disarm();
    let answered = guard::poll_until(SETTLE, || {
        let (asked, answered) = (named(&log, "asked")?, named(daemon.log(), "answered")?);
        Ok(asked.len() > 60 && asked.keys().all(|op| answered.contains_key(op)))
    })?;
    let (asked, told) = (named(&log, "asked")?, named(daemon.log(), "answered")?);
    ensure!(answered, "asked {asked:?}\nanswered {told:?}");
    for (op, opcode) in &asked {
        ensure!(told.get(op) == Some(opcode), "{op} is {opcode} and {:?}", told.get(op));
    }
    Ok(asked)
}
