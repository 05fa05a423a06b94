//! SVG charts of growth: rate and memory by how many there are, a line for each contender.

use crate::charts::COLOURS;
use crate::samples::Samples;
use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// What there is more of, as works are named: `growth-FAMILY-COUNT`.
const FAMILIES: &[&str] = &["sessions", "lanes", "known", "open"];

/// File name and SVG of each chart that has something to show.
pub fn all(samples: &Samples, names: &[String]) -> Result<Vec<(String, String)>> {
    let mut charts = Vec::new();
    for family in FAMILIES {
        for metric in ["rate", "rss"] {
            let lines = lines(samples, names, family, metric);
            if lines.iter().any(|(_, points)| points.len() > 1) {
                let unit = samples.rows.iter().find(|row| {
                    row.metric == metric && row.work.starts_with(&format!("growth-{family}-"))
                });
                let title = format!("{family}: {metric}, {}", unit.map_or("", |row| row.unit));
                charts.push((format!("growth-{family}-{metric}"), draw(&title, &lines)?));
            }
        }
    }
    Ok(charts)
}

type Line = (String, Vec<(f64, f64)>);

fn lines(samples: &Samples, names: &[String], family: &str, metric: &str) -> Vec<Line> {
    let prefix = format!("growth-{family}-");
    let line = |name: &String| {
        let rows = samples.rows.iter().filter(|row| row.metric == metric);
        let points = rows.filter_map(|row| {
            let count = count(row.work.strip_prefix(&prefix)?)?;
            Some((count, row.spread(name)?.median))
        });
        (name.clone(), points.collect())
    };
    names.iter().map(line).collect()
}

/// `16`, `10k`, `1m`.
fn count(text: &str) -> Option<f64> {
    let digits = text.trim_end_matches(['k', 'm']);
    let unit = match &text[digits.len()..] {
        "" => 1.0,
        "k" => 1e3,
        "m" => 1e6,
        _ => return None,
    };
    digits.parse::<f64>().ok().map(|number| number * unit)
}

fn draw(title: &str, lines: &[Line]) -> Result<String> {
    let points = || lines.iter().flat_map(|(_, points)| points);
    let least = points().map(|point| point.0).fold(f64::INFINITY, f64::min);
    let most = points().map(|point| point.0).fold(1.0, f64::max);
    let highest = points().map(|point| point.1).fold(f64::MIN_POSITIVE, f64::max) * 1.1;
    let mut out = String::new();
    {
        let fail = |error: &dyn std::fmt::Display| anyhow!("draw: {error}");
        let area = SVGBackend::with_string(&mut out, (640, 300)).into_drawing_area();
        area.fill(&WHITE).map_err(|error| fail(&error))?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 15))
            .margin(10)
            .x_label_area_size(28)
            .y_label_area_size(72)
            .build_cartesian_2d((least..most).log_scale(), 0.0..highest)
            .map_err(|error| fail(&error))?;
        chart.configure_mesh().x_labels(6).y_labels(6).draw().map_err(|error| fail(&error))?;
        for (i, (name, points)) in lines.iter().enumerate().filter(|(_, line)| !line.1.is_empty()) {
            let colour = COLOURS[i % COLOURS.len()];
            let series = LineSeries::new(points.iter().copied(), colour.stroke_width(2));
            let drawn = chart.draw_series(series.point_size(3)).map_err(|error| fail(&error))?;
            drawn.label(name).legend(move |(x, y)| {
                Rectangle::new([(x, y - 4), (x + 10, y + 4)], colour.filled())
            });
        }
        let mut labels = chart.configure_series_labels();
        labels.background_style(WHITE.mix(0.8)).position(SeriesLabelPosition::LowerLeft);
        labels.draw().map_err(|error| fail(&error))?;
        area.present().map_err(|error| fail(&error))?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::Metric;

    #[test]
    fn counts_are_read() {
        let counts = ["1", "16", "10k", "1m", "x", "1g"].map(count);
        assert_eq!(counts, [Some(1.0), Some(16.0), Some(1e4), Some(1e6), None, None]);
    }

    #[test]
    fn a_line_needs_two_points() {
        let mut samples = Samples::default();
        let names = ["ringfs".to_owned()];
        let rate = |value| [Metric { name: "rate", unit: "IOPS", value }];
        samples.add("growth-lanes-1", "ringfs", 0, &rate(5.0));
        assert!(all(&samples, &names).unwrap().is_empty());
        samples.add("growth-lanes-8", "ringfs", 0, &rate(9.0));
        let charts = all(&samples, &names).unwrap();
        assert_eq!(charts.len(), 1);
        assert!(charts[0].1.contains("lanes: rate, IOPS") && charts[0].1.contains("ringfs"));
    }
}
