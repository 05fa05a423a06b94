//! The rounds: within each, every contender does the work once; another begins each time.

use crate::samples::Samples;
use crate::site::{Place, Site};
use crate::watchdog;
use crate::work::{COUNTED, Scale, Work};
use anyhow::{Context, Result, bail, ensure};
use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How much of a run is done, and how much is left.
pub struct Pace {
    start: Instant,
    /// Of works whose turn has come and gone, and of all, as expected.
    done: Duration,
    all: Duration,
}

impl Pace {
    /// Nothing is done yet of so much.
    pub fn new(all: Duration) -> Pace {
        Pace { start: Instant::now(), done: Duration::ZERO, all }
    }

    /// What is done has taken `elapsed`: what is left, at the same pace.
    fn left(&self, elapsed: Duration) -> Duration {
        let left = self.all.saturating_sub(self.done);
        // A start says little.
        if self.done < Duration::from_secs(5) {
            return left;
        }
        left.mul_f64(elapsed.as_secs_f64() / self.done.as_secs_f64())
    }

    /// For people.
    fn text(&self) -> String {
        let elapsed = self.start.elapsed();
        let left = self.left(elapsed).as_secs();
        let left = match left {
            0..90 => format!("{left} s"),
            _ => format!("{} min", left.div_ceil(60)),
        };
        format!("{} s, about {left} left", elapsed.as_secs())
    }
}

/// What [`run`] will take, as expected.
pub fn expected(works: &[Work], rounds: usize, sites: usize, scale: &Scale) -> Duration {
    let rounds = |work: &Work| rounds.min(work.rounds_max) * sites;
    works.iter().map(|work| work.expected(scale) * rounds(work) as u32).sum()
}

/// What [`count`] will take.
pub fn expected_count(works: &[Work], sites: usize, scale: &Scale) -> Duration {
    let costed = works.iter().filter(|work| work.costed());
    costed.map(|work| work.expected(scale) * sites as u32).sum()
}

/// Does all works in all rounds. A work that fails is told and counts for nothing; a contender that
/// has gone ends the run. What was measured before stands in `samples`.
pub fn run(
    sites: &mut [Site],
    works: &[Work],
    rounds: usize,
    place: &Place<'_>,
    scale: &Scale,
    samples: &Mutex<Samples>,
    pace: &mut Pace,
) -> Result<()> {
    let mut failures = Vec::new();
    for (index, work) in works.iter().enumerate() {
        let rounds = rounds.min(work.rounds_max);
        for round in 0..rounds {
            for turn in 0..sites.len() {
                if watchdog::stopping() {
                    bail!("stopped; what was measured so far is reported");
                }
                let site = &mut sites[(round + turn) % sites.len()];
                let name = site.spec.name.clone();
                let line = format!(
                    "[{}/{}; {}] {}: round {}/{rounds}, {name}",
                    index + 1,
                    works.len(),
                    pace.text(),
                    work.name,
                    round + 1,
                );
                progress(&line, round == 0 && turn == 0);
                let what = format!("{} on {name}", work.name);
                watchdog::begin(&what, work.expected(scale));
                site.check().context(what.clone())?;
                let metrics = work.run(site, place, scale).context(what.clone());
                site.check().with_context(|| format!("after {what}"))?;
                pace.done += work.expected(scale);
                let metrics = match metrics {
                    Ok(metrics) => metrics,
                    Err(error) => {
                        failures.push(format!("{error:#}"));
                        eprintln!("\nFAILED: {error:#}");
                        continue;
                    }
                };
                let mut samples = samples.lock().unwrap_or_else(PoisonError::into_inner);
                samples.add(work.name, &name, round, &metrics);
            }
        }
    }
    progress("", false);
    watchdog::begin("the report", Duration::ZERO);
    ensure!(failures.is_empty(), "{} runs failed:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

/// One more pass of each work that counts what disturbs; its times are thrown away.
pub fn count(
    sites: &mut [Site],
    works: &[Work],
    place: &Place<'_>,
    scale: &Scale,
    samples: &Mutex<Samples>,
    pace: &mut Pace,
) -> Result<()> {
    let mut first = true;
    for work in works.iter().filter(|work| work.costed()) {
        for site in sites.iter_mut() {
            if watchdog::stopping() {
                bail!("stopped; what was measured so far is reported");
            }
            let what = format!("counting {} on {}", work.name, site.spec.name);
            progress(&format!("[{}] {what}", pace.text()), std::mem::take(&mut first));
            watchdog::begin(&what, work.expected(scale));
            site.counting = true;
            let metrics = work.run(site, place, scale).context(what.clone());
            site.counting = false;
            pace.done += work.expected(scale);
            site.check().with_context(|| format!("after {what}"))?;
            let metrics = metrics.map(|mut metrics| {
                metrics.retain(|metric| COUNTED.contains(&metric.name));
                metrics
            });
            match metrics {
                Ok(metrics) => {
                    let mut samples = samples.lock().unwrap_or_else(PoisonError::into_inner);
                    samples.add(work.name, &site.spec.name, 0, &metrics);
                }
                Err(error) => eprintln!("\nNOT COUNTED: {error:#}"),
            }
        }
    }
    progress("", false);
    watchdog::begin("the report", Duration::ZERO);
    Ok(())
}

/// One line that is written over on a terminal; a log gets each work's first one alone.
fn progress(line: &str, first: bool) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{line}");
    } else if first {
        eprintln!("{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_the_pace() {
        let s = Duration::from_secs;
        let mut pace = Pace::new(s(100));
        assert_eq!(pace.left(s(1)), s(100));
        pace.done = s(25);
        // Twice as slow as expected.
        assert_eq!(pace.left(s(50)), s(150));
        pace.done = s(120);
        assert_eq!(pace.left(s(200)), s(0));
    }

    #[test]
    fn the_whole_is_known_before() {
        let works = Work::all();
        let one = expected(&works[..1], 1, 1, &Scale::QUICK);
        assert_eq!(expected(&works[..1], 3, 4, &Scale::QUICK), one * 12);
        let few: Vec<Work> = works.into_iter().filter(|work| work.rounds_max == 3).collect();
        let (three, seven) =
            (expected(&few, 3, 1, &Scale::FULL), expected(&few, 7, 1, &Scale::FULL));
        assert!(!few.is_empty() && three == seven);
    }
}
