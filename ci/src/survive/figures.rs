//! Times taken, as a table for people and as JSON for programs, held against their bounds.

use std::time::Duration;

use anyhow::{Result, bail};
use serde::Serialize;

/// One row: what was timed, and how long it took each time.
#[derive(Debug)]
pub struct Row {
    what: String,
    times: Vec<Duration>,
    /// The 99th of 100 must be below it.
    p99_max: Option<Duration>,
}

/// The same, summed up.
#[derive(Debug, Serialize)]
struct Sums<'a> {
    what: &'a str,
    times: usize,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    bound_p99_ms: Option<f64>,
}

impl Row {
    /// No time yet.
    pub fn new(what: impl Into<String>, p99_max: Option<Duration>) -> Self {
        Self { what: what.into(), times: Vec::new(), p99_max }
    }

    /// One more.
    pub fn add(&mut self, time: Duration) {
        self.times.push(time);
    }

    /// The time that `part` of all do not exceed; of few, rounded up: the largest.
    fn at(&self, part: f64) -> Duration {
        let mut sorted = self.times.clone();
        sorted.sort_unstable();
        let place = (part * sorted.len() as f64).ceil() as usize;
        sorted.get(place.saturating_sub(1)).copied().unwrap_or_default()
    }

    fn sums(&self) -> Sums<'_> {
        Sums {
            what: &self.what,
            times: self.times.len(),
            p50_ms: ms(self.at(0.5)),
            p99_ms: ms(self.at(0.99)),
            max_ms: ms(self.at(1.0)),
            bound_p99_ms: self.p99_max.map(ms),
        }
    }

    fn is_missed(&self) -> bool {
        self.p99_max.is_some_and(|max| self.at(0.99) > max)
    }
}

/// In milliseconds, to the microsecond.
pub fn ms(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

/// Prints the rows that have times; `more` goes into the JSON beside them.
pub fn print(rows: &[Row], more: serde_json::Value) {
    println!("{:<64} {:>5} {:>9} {:>9} {:>9} {:>9}", "ms", "times", "p50", "p99", "max", "bound");
    let rows: Vec<Sums<'_>> =
        rows.iter().filter(|row| !row.times.is_empty()).map(Row::sums).collect();
    for row in &rows {
        let bound = row.bound_p99_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.0}"));
        println!(
            "{:<64} {:>5} {:>9.1} {:>9.1} {:>9.1} {bound:>9}",
            row.what, row.times, row.p50_ms, row.p99_ms, row.max_ms
        );
    }
    println!("json: {}", serde_json::json!({ "rows": rows, "more": more }));
}

/// Fails if a row misses its bound.
pub fn check(rows: &[Row]) -> Result<()> {
    let missed: Vec<&str> =
        rows.iter().filter(|row| row.is_missed()).map(|row| row.what.as_str()).collect();
    if !missed.is_empty() {
        bail!("over the bound: {}", missed.join("; "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_of_the_99th_of_100() {
        let row = |times: &[u64], bound| Row {
            times: times.iter().copied().map(Duration::from_millis).collect(),
            ..Row::new("r", Some(Duration::from_millis(bound)))
        };
        let hundred: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(row(&hundred, 0).at(0.5), Duration::from_millis(50));
        assert_eq!(row(&hundred, 0).at(0.99), Duration::from_millis(99));
        assert_eq!(row(&[7], 0).at(0.5), Duration::from_millis(7));
        assert_eq!(row(&[], 0).at(0.5), Duration::ZERO);
        assert!(check(&[row(&hundred, 99), row(&[], 0)]).is_ok());
        let error = check(&[row(&hundred, 98)]).unwrap_err();
        assert!(error.to_string().contains("over the bound: r"), "{error}");
        // Of few the largest counts.
        assert!(check(&[row(&[1, 2, 3], 2)]).is_err());
    }
}
