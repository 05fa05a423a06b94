//! The rounds: within each, every contender does the work once; another begins each time.

use crate::samples::Samples;
use crate::site::{Place, Site};
use crate::watchdog;
use crate::work::{COUNTED, Scale, Work};
use anyhow::{Context, Result, bail, ensure};
use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Does all works in all rounds. A work that fails is told and counts for nothing; a contender that
/// has gone ends the run. What was measured before stands in `samples`.
pub fn run(
    sites: &mut [Site],
    works: &[Work],
    rounds: usize,
    place: &Place<'_>,
    scale: &Scale,
    samples: &Mutex<Samples>,
) -> Result<()> {
    let start = Instant::now();
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
                    "[{}/{} {:>4} s] {}: round {}/{rounds}, {name}",
                    index + 1,
                    works.len(),
                    start.elapsed().as_secs(),
                    work.name,
                    round + 1,
                );
                progress(&line, round == 0 && turn == 0);
                let what = format!("{} on {name}", work.name);
                watchdog::begin(&what);
                site.check().context(what.clone())?;
                let metrics = work.run(site, place, scale).context(what.clone());
                site.check().with_context(|| format!("after {what}"))?;
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
    watchdog::begin("the report");
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
) -> Result<()> {
    for work in works.iter().filter(|work| work.costed()) {
        for site in sites.iter_mut() {
            if watchdog::stopping() {
                bail!("stopped; what was measured so far is reported");
            }
            let what = format!("counting {} on {}", work.name, site.spec.name);
            progress(&what, false);
            watchdog::begin(&what);
            site.counting = true;
            let metrics = work.run(site, place, scale).context(what.clone());
            site.counting = false;
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
    watchdog::begin("the report");
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
