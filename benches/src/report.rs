//! Rates by work, contender and round; the table and JSON of them.

use serde_json::{Value, json};

/// The contender that ratios are taken to.
const BASE: &str = "local";

/// All measured rates.
#[derive(Default)]
pub struct Report {
    rows: Vec<Row>,
}

struct Row {
    work: &'static str,
    unit: &'static str,
    /// Contender, and its rate in each round.
    rates: Vec<(&'static str, Vec<f64>)>,
}

impl Report {
    /// One run.
    pub fn add(
        &mut self,
        work: &'static str,
        unit: &'static str,
        contender: &'static str,
        round: usize,
        rate: f64,
    ) {
        if self.rows.last().is_none_or(|row| row.work != work) {
            self.rows.push(Row { work, unit, rates: Vec::new() });
        }
        let Some(row) = self.rows.last_mut() else { return };
        if !row.rates.iter().any(|(name, _)| *name == contender) {
            row.rates.push((contender, Vec::new()));
        }
        if let Some((_, rates)) = row.rates.iter_mut().find(|(name, _)| *name == contender) {
            rates.resize(round, f64::NAN);
            rates.push(rate);
        }
    }

    /// Medians, and the ratio to the base: median, least and most over the rounds.
    pub fn print(&self) {
        println!(
            "\n{:<32} {:>8} {:>10} {:>12}   ratio to local: median (min-max)",
            "work", "unit", "who", "median"
        );
        for row in &self.rows {
            let mut rates: Vec<_> = row.rates.iter().collect();
            rates.sort_by_key(|(name, _)| {
                super::Kind::ALL.iter().position(|kind| kind.name() == *name)
            });
            for (name, of) in rates {
                let ratio = row
                    .ratios(name)
                    .map_or(String::new(), |r| format!("{:.2} ({:.2}-{:.2})", r.1, r.0, r.2));
                println!(
                    "{:<32} {:>8} {:>10} {:>12.0}   {ratio}",
                    row.work,
                    row.unit,
                    name,
                    spread(of.iter().copied()).1
                );
            }
        }
    }

    /// The same with every round's rate.
    pub fn to_json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let contenders = row.rates.iter().map(|(name, rates)| {
                let ratio = row.ratios(name).map(|(min, median, max)| json!([median, min, max]));
                (name.to_string(), json!({ "rates": rates, "ratio_to_local": ratio }))
            });
            let contenders: serde_json::Map<String, Value> = contenders.collect();
            json!({ "work": row.work, "unit": row.unit, "contenders": contenders })
        });
        json!({ "works": rows.collect::<Vec<_>>() })
    }
}

impl Row {
    /// Least, median and most of the per-round ratios to the base.
    fn ratios(&self, name: &str) -> Option<(f64, f64, f64)> {
        let of = |name: &str| self.rates.iter().find(|(n, _)| *n == name).map(|(_, rates)| rates);
        let (ours, base) = (of(name)?, of(BASE)?);
        let ratios = spread(ours.iter().zip(base).map(|(a, b)| a / b));
        (name != BASE && ratios.1.is_finite()).then_some(ratios)
    }
}

fn spread(values: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let nan = f64::NAN;
    let at = |i: usize| values.get(i).copied().unwrap_or(nan);
    let middle = values.len() / 2;
    let median = if values.len().is_multiple_of(2) && !values.is_empty() {
        (at(middle - 1) + at(middle)) / 2.0
    } else {
        at(middle)
    };
    (at(0), median, values.last().copied().unwrap_or(nan))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios() {
        let mut report = Report::default();
        for (round, (local, ringfs)) in
            [(10.0, 5.0), (20.0, 20.0), (40.0, 10.0)].into_iter().enumerate()
        {
            report.add("w", "IOPS", "local", round, local);
            report.add("w", "IOPS", "ringfs", round, ringfs);
        }
        assert_eq!(report.rows[0].ratios("ringfs"), Some((0.25, 0.5, 1.0)));
        assert_eq!(report.rows[0].ratios("local"), None);
        assert_eq!(spread([4.0, 1.0].into_iter()), (1.0, 2.5, 4.0));
        assert!(spread(std::iter::empty()).1.is_nan());
    }
}
