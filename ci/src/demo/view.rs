//! The live picture of a daemon at work, drawn from two readings of its counters.
//!
//! Invariant: on a terminal it redraws its own lines in place; elsewhere it prints one plain line a
//! reading, and none when nothing moved. It never waits.

use std::collections::VecDeque;
use std::io::{Write, stdout};
use std::time::Instant;

use crate::rig::Counters;

/// Kinds of operations shown at once, and readings in the history.
const KINDS: usize = 8;
const HISTORY: usize = 48;
const BAR: usize = 32;
/// Lines of the picture on a terminal: heading, two histories, kinds.
const LINES: usize = 3 + KINDS;

/// Draws rates.
#[derive(Debug)]
pub struct View {
    terminal: bool,
    last: Option<(Instant, Counters)>,
    drawn: bool,
    ops: VecDeque<f64>,
    bytes: VecDeque<f64>,
}

/// What happened between two readings, a second.
#[derive(Debug, PartialEq)]
struct Rates {
    ops: f64,
    read_mib: f64,
    write_mib: f64,
    kinds: Vec<(String, f64)>,
}

impl View {
    /// A view that draws in place if `terminal`.
    pub fn new(terminal: bool) -> Self {
        Self { terminal, last: None, drawn: false, ops: VecDeque::new(), bytes: VecDeque::new() }
    }

    /// Says what is being done; the picture goes on below.
    pub fn say(&mut self, text: &str) {
        self.drawn = false;
        println!("   {text}");
    }

    /// Draws the rates since the reading before.
    pub fn draw(&mut self, now: &Counters, doing: &str) {
        let taken = Instant::now();
        let last = self.last.replace((taken, now.clone()));
        let Some((before, counters)) = last else { return };
        let rates = rates(&counters, now, (taken - before).as_secs_f64());
        push(&mut self.ops, rates.ops);
        push(&mut self.bytes, rates.read_mib + rates.write_mib);
        let text = match self.terminal {
            true => self.picture(&rates, now, doing),
            false => plain(&rates),
        };
        self.drawn = self.terminal;
        // A closed pipe ends the picture, not the demo.
        let _ = stdout().write_all(text.as_bytes()).and_then(|()| stdout().flush());
    }

    fn picture(&self, rates: &Rates, now: &Counters, doing: &str) -> String {
        let mut lines = vec![format!(
            "   {doing}: {} open, {} nodes, {} in flight",
            now.handles, now.nodes, now.slots_in_use
        )];
        lines.push(format!("   {:>9.0} op/s   {}", rates.ops, spark(&self.ops)));
        let (read, write) = (rates.read_mib, rates.write_mib);
        let sum = format!("   {:>9.1} MiB/s  {}", read + write, spark(&self.bytes));
        lines.push(format!("{sum}  (read {read:.1}, written {write:.1})"));
        let most = rates.kinds.first().map_or(1.0, |(_, rate)| rate.max(1.0));
        for (kind, rate) in rates.kinds.iter().take(KINDS) {
            let bar = "█".repeat((rate / most * BAR as f64).round() as usize);
            lines.push(format!("   {rate:>9.0} {kind:<16} {bar}"));
        }
        lines.resize(LINES, String::new());
        let up = if self.drawn { format!("\x1b[{LINES}A") } else { String::new() };
        let cleared: String = lines.iter().map(|line| format!("\x1b[2K{line}\n")).collect();
        up + &cleared
    }
}

fn plain(rates: &Rates) -> String {
    if rates.ops < 0.5 {
        return String::new();
    }
    let kinds: Vec<String> =
        rates.kinds.iter().take(4).map(|(kind, rate)| format!("{kind} {rate:.0}")).collect();
    format!(
        "     {:.0} op/s, read {:.1} MiB/s, written {:.1} MiB/s ({})\n",
        rates.ops,
        rates.read_mib,
        rates.write_mib,
        kinds.join(", ")
    )
}

fn rates(before: &Counters, now: &Counters, seconds: f64) -> Rates {
    let seconds = seconds.max(1e-3);
    let per_second = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
    let mut kinds: Vec<(String, f64)> = now
        .ops
        .iter()
        .map(|(kind, count)| {
            (kind.clone(), per_second(*count, before.ops.get(kind).copied().unwrap_or(0)))
        })
        .filter(|(_, rate)| *rate > 0.0)
        .collect();
    kinds.sort_by(|a, b| b.1.total_cmp(&a.1));
    const MIB: f64 = 1_048_576.0;
    Rates {
        ops: kinds.iter().map(|(_, rate)| rate).sum(),
        read_mib: per_second(now.bytes_read, before.bytes_read) / MIB,
        write_mib: per_second(now.bytes_written, before.bytes_written) / MIB,
        kinds,
    }
}

fn push(history: &mut VecDeque<f64>, value: f64) {
    history.push_back(value);
    if history.len() > HISTORY {
        history.pop_front();
    }
}

/// The history as one line of blocks, scaled to its highest.
fn spark(history: &VecDeque<f64>) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = history.iter().copied().fold(1.0, f64::max);
    history.iter().map(|value| BLOCKS[((value / most * 7.0).round() as usize).min(7)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(read: u64, lookups: u64) -> Counters {
        let ops = [("LOOKUP".to_string(), lookups), ("READ".to_string(), 5)].into();
        Counters { ops, bytes_read: read, ..Counters::default() }
    }

    #[test]
    fn rates_are_differences_a_second_most_first() {
        let found = rates(&counters(0, 10), &counters(4 << 20, 30), 2.0);
        assert_eq!(found.kinds, [("LOOKUP".to_string(), 10.0)]);
        assert_eq!((found.ops, found.read_mib, found.write_mib), (10.0, 2.0, 0.0));
        // A daemon that was started anew counts from 0: no rate, no overflow.
        assert_eq!(rates(&counters(9, 9), &counters(0, 0), 1.0).ops, 0.0);
    }

    #[test]
    fn the_picture_has_always_as_many_lines() {
        let mut view = View::new(true);
        view.ops = (0..100).map(f64::from).collect();
        for lookups in [0, 1] {
            let rates = rates(&counters(0, 0), &counters(0, lookups), 1.0);
            let picture = view.picture(&rates, &counters(0, 0), "test");
            assert_eq!(picture.lines().count(), LINES);
        }
        assert_eq!(plain(&rates(&counters(0, 0), &counters(0, 0), 1.0)), "");
    }
}
