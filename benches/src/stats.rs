//! Medians, spreads and percentiles. Pure.

/// Least, median and most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Least.
    pub min: f64,
    /// Median; of an even number the mean of the two in the middle.
    pub median: f64,
    /// Most.
    pub max: f64,
}

impl Spread {
    /// Of those values that are finite; `None` when there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            (values[middle - 1] + values[middle]) / 2.0
        } else {
            values[middle]
        };
        Some(Spread { min, median, max })
    }

    /// Of the ratios of each pair that has both.
    pub fn of_ratios(ours: &[f64], base: &[f64]) -> Option<Spread> {
        Spread::of(ours.iter().zip(base).map(|(ours, base)| ours / base))
    }
}

/// The value that `share` (0 to 1) of the sorted values do not exceed: nearest rank.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1).min(sorted.len().saturating_sub(1))).map_or(f64::NAN, |v| *v)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_nothing() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied());
        let median = |values: &[f64]| spread(values).map(|spread| spread.median);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[f64::NAN, 7.0, f64::INFINITY]), Some(7.0));
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(Spread { min: 1.0, median: 2.0, max: 3.0 }));
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let spread = Spread::of_ratios(&[5.0, 20.0, 10.0], &[10.0, 20.0, 40.0]);
        assert_eq!(spread, Some(Spread { min: 0.25, median: 0.5, max: 1.0 }));
        // A round that one of them lacks counts for nothing.
        let spread = Spread::of_ratios(&[5.0, f64::NAN], &[10.0, 20.0, 40.0]);
        assert_eq!(spread, Some(Spread { min: 0.5, median: 0.5, max: 0.5 }));
        assert_eq!(Spread::of_ratios(&[], &[1.0]), None);
    }

    #[test]
    fn percentiles_by_nearest_rank() {
        let values: Vec<f64> = (1..=1000).map(f64::from).collect();
        assert_eq!(percentile(&values, 0.5), 500.0);
        assert_eq!(percentile(&values, 0.99), 990.0);
        assert_eq!(percentile(&values, 0.999), 999.0);
        assert_eq!(percentile(&values, 1.0), 1000.0);
        assert_eq!(percentile(&[7.0], 0.5), 7.0);
        assert!(percentile(&[], 0.5).is_nan());
    }
}
