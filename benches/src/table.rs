//! The tables on the terminal.

use crate::contender::NO_SPIN;
use crate::goals::{GOALS, Goal};
use crate::samples::{Row, Samples};
use crate::stats::Spread;

/// Every metric of every work: medians, and ratios to `base` in the same round.
pub fn works(samples: &Samples, names: &[String], base: &str) -> String {
    let mut out = String::new();
    let mut last = "";
    for row in &samples.rows {
        let title = if row.work == last { "" } else { row.work };
        if !title.is_empty() {
            out.push('\n');
        }
        last = row.work;
        out += &format!("{title:<20} {:<14} {:>8}", row.metric, row.unit);
        for name in names {
            out += &format!("  {:<27}", cell(row, name, base));
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    format!("{}{out}", head("work", 45, names, base))
}

fn head(first: &str, width: usize, names: &[String], base: &str) -> String {
    let mut out = format!("\n{:<width$}", format!("{first} (x {base}: median, min-max)"));
    for name in names {
        out += &format!("  {name:<27}");
    }
    out.truncate(out.trim_end().len());
    out + "\n"
}

fn cell(row: &Row, name: &str, base: &str) -> String {
    let Some(median) = row.spread(name).map(|spread| number(spread.median)) else {
        return "-".into();
    };
    match row.ratio(name, base).filter(|_| name != base) {
        Some(ratio) => format!("{median:>9} {}", spread(&ratio)),
        None => format!("{median:>9}"),
    }
}

/// `1.02 (0.98-1.10)`.
pub fn spread(of: &Spread) -> String {
    format!("{} ({}-{})", number(of.median), number(of.min), number(of.max))
}

/// Three figures, or all of a whole number's.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Each goal that was measured, and how the contenders stand.
pub fn goals(samples: &Samples, names: &[String]) -> String {
    let measured = |goal: &&Goal| names.iter().any(|name| goal.standing(samples, name).is_some());
    let rows: Vec<&Goal> = GOALS.iter().filter(measured).collect();
    if rows.is_empty() {
        return String::new();
    }
    let mut out = format!("\n{:<48} {:<15}", "goal", "bound");
    names.iter().for_each(|name| out += &format!("  {name:<27}"));
    out = out.trim_end().to_owned() + "\n";
    for goal in rows {
        out += &format!("{:<48} {:<15}", goal.what, goal.bound_text());
        for name in names {
            let standing = goal.standing(samples, name).map_or("-".into(), |standing| {
                let verdict = verdict(goal, name, names, standing.met);
                format!("{verdict} {}", spread(&standing.spread))
            });
            out += &format!("  {standing:<27}");
        }
        out = out.trim_end().to_owned() + "\n";
    }
    let absent = GOALS.len() - GOALS.iter().filter(measured).count();
    if absent > 0 {
        out += &format!("{absent} further goals were not measured in this run\n");
    }
    out + &closing(samples, names)
}

/// A goal for the setting without spinning binds no other one, where that setting ran.
fn verdict(goal: &Goal, name: &str, names: &[String], met: bool) -> &'static str {
    let other = goal.no_spin && name != NO_SPIN && names.iter().any(|name| name == NO_SPIN);
    match (other, met) {
        (true, _) => "   ",
        (false, true) => "met",
        (false, false) => "NOT",
    }
}

/// One line for each contender that goals are set for.
fn closing(samples: &Samples, names: &[String]) -> String {
    let mut out = String::new();
    for name in names {
        let standings = GOALS.iter().filter_map(|goal| {
            let standing = goal.standing(samples, name)?;
            Some(verdict(goal, name, names, standing.met))
        });
        let verdicts: Vec<&str> = standings.filter(|verdict| *verdict != "   ").collect();
        let met = verdicts.iter().filter(|verdict| **verdict == "met").count();
        let all = verdicts.len();
        out += &format!("{name}: {met} of {all} measured goals are met\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::Metric;

    #[test]
    fn tables_say_ratios_and_verdicts() {
        let mut samples = Samples::default();
        for (name, value) in [("local", 100.0), ("ringfs", 80.0)] {
            let metric = Metric { name: "rate", unit: "IOPS", value };
            samples.add("randread-4k-d1", name, 0, &[metric]);
        }
        let names = ["local".to_owned(), "ringfs".to_owned()];
        let text = works(&samples, &names, "local");
        assert!(text.contains("80.0 0.80 (0.80-0.80)"), "{text}");
        let text = goals(&samples, &names[1..]);
        assert!(text.contains("met 0.80 (0.80-0.80)"), "{text}");
        assert!(text.contains("ringfs: 1 of 1 measured goals are met"), "{text}");
        assert_eq!(goals(&Samples::default(), &names), "");
    }

    #[test]
    fn numbers_have_three_figures() {
        let texts = [0.756, 12.34, 123456.7].map(number);
        assert_eq!(texts, ["0.76", "12.3", "123457"]);
    }
}
