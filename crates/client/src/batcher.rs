//! When is a batch due: pure.
//!
//! Invariant: nothing waits in a batch while the lane sleeps, and the lane sleeps only when there
//! is nothing to read and nothing to send. It must not do I/O.

/// What a lane's up thread sees before its next step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The batch has reached its target: a large frame, or many small ones.
    pub batch_due: bool,
    /// The batch has no record.
    pub batch_empty: bool,
    /// Something of ours (a cancel, a parked request, forgets) can go into the batch now.
    pub backlog: bool,
    /// The last read of the device found nothing, and nobody has woken us since.
    pub dry: bool,
    /// The park takes no further frame.
    pub park_full: bool,
}

/// The next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Put the backlog into the batch.
    Backlog,
    /// Read one frame.
    Read,
    /// Send the batch.
    Send,
    /// Sleep until a frame is there or somebody kicks.
    Wait,
    /// Sleep until somebody kicks: no frame could be taken in.
    WaitForSlot,
}

/// Send what is there when the device runs dry; never wait for more.
pub const fn next_step(view: View) -> Step {
    if view.batch_due {
        Step::Send
    } else if view.backlog {
        Step::Backlog
    } else if !view.dry && !view.park_full {
        Step::Read
    } else if !view.batch_empty {
        Step::Send
    } else if view.park_full {
        Step::WaitForSlot
    } else {
        Step::Wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps() {
        let idle = View { batch_empty: true, ..View::default() };
        let check = |view: View, expected: Step| assert_eq!(next_step(view), expected, "{view:?}");
        check(idle, Step::Read);
        check(View { dry: true, ..idle }, Step::Wait);
        check(View { dry: true, batch_empty: false, ..idle }, Step::Send);
        check(View { batch_empty: false, ..idle }, Step::Read);
        check(View { batch_due: true, backlog: true, batch_empty: false, ..idle }, Step::Send);
        check(View { backlog: true, dry: true, ..idle }, Step::Backlog);
        check(View { park_full: true, ..idle }, Step::WaitForSlot);
        check(View { park_full: true, batch_empty: false, ..idle }, Step::Send);
        check(View { park_full: true, dry: true, ..idle }, Step::WaitForSlot);
    }

    #[test]
    fn no_sleep_over_something_to_do() {
        for bits in 0..32u32 {
            let bit = |n: u32| bits >> n & 1 == 1;
            let view = View {
                batch_due: bit(0),
                batch_empty: bit(1),
                backlog: bit(2),
                dry: bit(3),
                park_full: bit(4),
            };
            if matches!(next_step(view), Step::Wait | Step::WaitForSlot) {
                assert!(view.batch_empty && !view.batch_due && !view.backlog, "{view:?}");
                assert!(view.dry || view.park_full, "{view:?}");
            }
        }
    }
}
