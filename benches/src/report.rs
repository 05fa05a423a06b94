//! The report: a directory with a page to look at, its charts, and all figures as JSON.

use crate::samples::Samples;
use crate::{charts, growth_charts, table};
use anyhow::{Context, Result};
use serde_json::json;
use std::fs;
use std::path::Path;

/// Metrics that get a chart of ratios.
const CHARTED: &[(&str, &str)] = &[
    ("rate", "Rates: more is better"),
    ("cpu", "CPU of client and daemon: less is better"),
    ("wakeups", "Wake-ups of client and daemon: less is better"),
    ("syscalls", "System calls of client and daemon: less is better"),
    ("time", "Times: less is better"),
    ("getattr-p99", "p99 of GETATTR under mixed load: less is better"),
    ("read-4k-p99", "p99 of 4 KiB reads under mixed load: less is better"),
];

/// What a report says beside the figures.
pub struct About<'a> {
    /// What the reader must know first, such as that nothing here is fast; empty for nothing.
    pub label: &'a str,
    /// Contenders, versions, command lines, the machine.
    pub introduction: &'a str,
    /// In the order of the columns.
    pub names: &'a [String],
    /// Those that goals are set for.
    pub held: &'a [String],
    /// Whom ratios are taken to.
    pub base: &'a str,
}

/// Writes it into `dir`, which is made.
pub fn write(dir: &Path, samples: &Samples, about: &About<'_>) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {dir:?}"))?;
    let put = |name: &str, text: &str| {
        fs::write(dir.join(name), text).with_context(|| format!("cannot write {name} in {dir:?}"))
    };
    let figures = json!({
        "label": about.label,
        "introduction": about.introduction.lines().collect::<Vec<_>>(),
        "base": about.base,
        "figures": samples.to_json(about.base),
    });
    put("results.json", &serde_json::to_string_pretty(&figures)?)?;
    let mut page = String::from(HEAD);
    if !about.label.is_empty() {
        page += &format!("<p><strong>{}</strong></p>\n", escape(about.label));
    }
    page += &format!("<pre>{}</pre>\n", escape(about.introduction));
    if let Some(svg) = charts::goals(samples, about.held)? {
        put("goals.svg", &svg)?;
        page += &format!("<h2>Goals</h2>\n{svg}\n");
        page += &format!("<pre>{}</pre>\n", escape(&table::goals(samples, about.held)));
    }
    for (metric, title) in CHARTED {
        if let Some(svg) = charts::ratios(samples, about.names, metric, about.base)? {
            put(&format!("{metric}.svg"), &svg)?;
            page += &format!("<h2>{title}</h2>\n{svg}\n");
        }
    }
    let growth = growth_charts::all(samples, about.names)?;
    if !growth.is_empty() {
        page += "<h2>Growth</h2>\n";
    }
    for (name, svg) in growth {
        put(&format!("{name}.svg"), &svg)?;
        page += &format!("{svg}\n");
    }
    let all = escape(&table::works(samples, about.names, about.base));
    page += &format!("<h2>All figures</h2>\n<pre>{all}</pre>\n</body></html>\n");
    put("index.html", &page)
}

const HEAD: &str = "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">
<title>ringfs bench</title><style>
body { font: 15px sans-serif; max-width: 1100px; margin: 2em auto; color: #222 }
pre { font-size: 12px; overflow-x: auto; background: #f6f6f6; padding: 1em }
</style></head><body><h1>ringfs bench</h1>
<p>Contenders did the same work in turn within each round of one run. Ratios are taken within a
round; what is quoted is their median, then the least and the most.</p>
";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// `20261124-021500`, in UTC, from seconds since 1970.
pub fn stamp(seconds: u64) -> String {
    // Days to a date in the proleptic Gregorian calendar, with years that begin in March.
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let era_day = days % 146_097;
    let year_of_era = (era_day - era_day / 1460 + era_day / 36_524 - era_day / 146_096) / 365;
    let day_of_year = era_day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = days / 146_097 * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_dates() {
        assert_eq!(stamp(0), "19700101-000000");
        assert_eq!(stamp(951_827_696), "20000229-123456");
        assert_eq!(stamp(1_795_485_300), "20261124-015500");
    }

    #[test]
    fn a_report_is_written_even_of_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("new");
        let (introduction, names, held) = ("<who>", &[], &[]);
        let about = About { label: "<slow>", introduction, names, held, base: "local" };
        write(&at, &Samples::default(), &about).unwrap();
        assert!(fs::read_to_string(at.join("index.html")).unwrap().contains("&lt;who&gt;"));
        assert!(fs::read_to_string(at.join("index.html")).unwrap().contains("<strong>&lt;slow"));
        assert!(at.join("results.json").is_file());
    }
}
