//! What the mounts and daemons of the steps are given besides, so that all of them run in each
//! setting that the bench offers: set once, before the first of them starts.

use std::sync::OnceLock;

use anyhow::{Result, bail};

use crate::fsx;
use crate::guard::Guard;

static MODE: OnceLock<Mode> = OnceLock::new();

/// A setting of both ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// As they are without options
    #[default]
    Defaults,
    /// Neither end looks before it sleeps
    NoSpin,
    /// FUSE-over-io_uring, where the kernel has it (6.14)
    Rings,
}

impl Mode {
    /// All that starts from now on is in this mode; rings are on while the guard lives.
    pub fn enter(self) -> Result<Option<Guard>> {
        if MODE.set(self).is_err() {
            bail!("a mode is set once");
        }
        (self == Mode::Rings).then(fsx::switch_rings_on).transpose()
    }

    /// The one that was entered.
    pub fn current() -> Mode {
        MODE.get().copied().unwrap_or_default()
    }

    /// Before the options that a step asks for, which win.
    pub fn mount_options(self) -> &'static str {
        match self {
            Mode::Defaults => "",
            Mode::NoSpin => "spin=0",
            Mode::Rings => "uring=on",
        }
    }

    /// Before the arguments that a step asks for.
    pub fn daemon_arguments(self) -> &'static [&'static str] {
        match self {
            Mode::NoSpin => &["--spin", "0"],
            Mode::Defaults | Mode::Rings => &[],
        }
    }
}
