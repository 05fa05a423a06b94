//! All figures by work, metric, contender and round.

use crate::stats::Spread;
use crate::work::Metric;
use serde_json::{Map, Value, json};

/// Everything measured so far.
#[derive(Debug, Default)]
pub struct Samples {
    /// In the order measured.
    pub rows: Vec<Row>,
}

/// One metric of one work.
#[derive(Debug)]
pub struct Row {
    /// The work.
    pub work: &'static str,
    /// The metric.
    pub metric: &'static str,
    /// Of the values.
    pub unit: &'static str,
    /// Contender, and its value in each round; NaN where a round lacks it.
    pub of: Vec<(String, Vec<f64>)>,
}

impl Samples {
    /// What one run gave.
    pub fn add(&mut self, work: &'static str, contender: &str, round: usize, metrics: &[Metric]) {
        for metric in metrics {
            let found = self.rows.iter().position(|r| r.work == work && r.metric == metric.name);
            let index = found.unwrap_or_else(|| {
                let (metric, unit) = (metric.name, metric.unit);
                // Beside the work's others, though they may have come long before.
                let last = self.rows.iter().rposition(|row| row.work == work);
                let at = last.map_or(self.rows.len(), |last| last + 1);
                self.rows.insert(at, Row { work, metric, unit, of: Vec::new() });
                at
            });
            self.rows[index].add(contender, round, metric.value);
        }
    }

    /// The row of a metric.
    pub fn row(&self, work: &str, metric: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.work == work && row.metric == metric)
    }

    /// With every round's values, and the ratios to `base`.
    pub fn to_json(&self, base: &str) -> Value {
        let rows = self.rows.iter().map(|row| {
            let contenders = row.of.iter().map(|(name, values)| {
                let ratio = row.ratio(name, base).map(|r| json!([r.median, r.min, r.max]));
                let median = row.spread(name).map(|spread| spread.median);
                let told = json!({ "values": values, "median": median, "ratio": ratio });
                (name.clone(), told)
            });
            let contenders: Map<String, Value> = contenders.collect();
            let (work, metric, unit) = (row.work, row.metric, row.unit);
            json!({ "work": work, "metric": metric, "unit": unit, "contenders": contenders })
        });
        rows.collect()
    }
}

impl Row {
    fn add(&mut self, contender: &str, round: usize, value: f64) {
        let found = self.of.iter().position(|(name, _)| name == contender);
        let index = found.unwrap_or_else(|| {
            self.of.push((contender.to_owned(), Vec::new()));
            self.of.len() - 1
        });
        let values = &mut self.of[index].1;
        values.resize(round, f64::NAN);
        values.push(value);
    }

    /// A contender's values.
    pub fn values(&self, contender: &str) -> Option<&[f64]> {
        self.of.iter().find(|(name, _)| name == contender).map(|(_, values)| values.as_slice())
    }

    /// Their spread over the rounds.
    pub fn spread(&self, contender: &str) -> Option<Spread> {
        Spread::of(self.values(contender)?.iter().copied())
    }

    /// The spread of the ratios within each round.
    pub fn ratio(&self, contender: &str, base: &str) -> Option<Spread> {
        Spread::of_ratios(self.values(contender)?, self.values(base)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(value: f64) -> [Metric; 1] {
        [Metric { name: "rate", unit: "IOPS", value }]
    }

    #[test]
    fn rounds_are_paired_even_if_one_is_missing() {
        let mut samples = Samples::default();
        samples.add("w", "local", 0, &rate(10.0));
        samples.add("w", "local", 1, &rate(20.0));
        samples.add("w", "local", 2, &rate(40.0));
        samples.add("w", "ringfs", 0, &rate(5.0));
        samples.add("w", "ringfs", 2, &rate(40.0));
        let row = samples.row("w", "rate").unwrap();
        let ratio = row.ratio("ringfs", "local").unwrap();
        assert_eq!((ratio.min, ratio.median, ratio.max), (0.5, 0.75, 1.0));
        assert_eq!(row.spread("local").unwrap().median, 20.0);
        assert!(row.ratio("nobody", "local").is_none());
        samples.add("v", "local", 0, &rate(1.0));
        samples.add("w", "local", 0, &[Metric { name: "cpu", unit: "us/op", value: 1.0 }]);
        let order: Vec<_> = samples.rows.iter().map(|row| (row.work, row.metric)).collect();
        assert_eq!(order, [("w", "rate"), ("w", "cpu"), ("v", "rate")]);
        let json = samples.to_json("local");
        assert_eq!(json[0]["contenders"]["ringfs"]["ratio"][0], 0.75);
        assert!(json[0]["contenders"]["ringfs"]["values"][1].is_null());
    }
}
