//! Ends the bench when a piece of work hangs, or when the user insists.
//!
//! A thread that waits on a hung mount cannot be called back; the process can end, and the reaper
//! (undo.rs) then aborts the mount.

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What one run of a work may take that is expected to take no time.
pub const LIMIT: Duration = Duration::from_secs(90);
/// The same where another kind of machine is emulated, maybe beside builds.
pub const LIMIT_EMULATED: Duration = Duration::from_secs(240);
/// What a run may take beyond that, as a multiple of what is expected: the slowest contender beside
/// builds is no hang.
const SLOWEST: u32 = 20;
/// What the current one may take once the user has asked for the end.
const GRACE: Duration = Duration::from_secs(10);

struct Now {
    what: String,
    until: Option<Instant>,
    limit: Duration,
}

static NOW: Mutex<Now> = Mutex::new(Now { what: String::new(), until: None, limit: LIMIT });
static STOP: AtomicBool = AtomicBool::new(false);

/// Starts it. A second signal ends the bench at once. `last` is what is still done before an end
/// by force; it must not touch a mount.
pub fn start(limit: Duration, last: fn()) -> std::io::Result<()> {
    NOW.lock().unwrap_or_else(PoisonError::into_inner).limit = limit;
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::spawn(move || {
        for (nth, _) in signals.forever().enumerate() {
            STOP.store(true, Ordering::Relaxed);
            if nth > 0 {
                end("stopped at once", last);
            }
            let mut now = NOW.lock().unwrap_or_else(PoisonError::into_inner);
            now.until = Some(Instant::now() + GRACE);
            eprintln!("\nstopping after this piece of work; once more to stop at once");
        }
    });
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_millis(250));
            let now = NOW.lock().unwrap_or_else(PoisonError::into_inner);
            if now.until.is_some_and(|until| Instant::now() > until) {
                end(&format!("{} takes too long", now.what), last);
            }
        }
    });
    Ok(())
}

fn end(why: &str, last: fn()) -> ! {
    last();
    eprintln!("\nringfs-bench: {why}; cleaning up");
    std::process::exit(1)
}

/// A piece of work begins that is expected to take so long; it has a limit until the next begins.
pub fn begin(what: &str, expected: Duration) {
    let mut now = NOW.lock().unwrap_or_else(PoisonError::into_inner);
    now.what = what.to_owned();
    if !stopping() {
        now.until = Some(Instant::now() + now.limit + expected * SLOWEST);
    }
}

/// Whether the user has asked for the end.
pub fn stopping() -> bool {
    STOP.load(Ordering::Relaxed)
}
