//! SVG charts of the figures: one of the goals, one for each kind of metric. Text stays text, so no
//! font is needed to draw them.

use crate::goals::{Bound, GOALS, Goal};
use crate::samples::Samples;
use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Colours of contenders, in their order.
pub const COLOURS: [RGBColor; 8] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
    RGBColor(227, 119, 194),
    RGBColor(127, 127, 127),
];
const WIDTH: u32 = 1050;
const ROW: i32 = 16;
const TOP: i32 = 46;
const LEFT: i32 = 400;
const RIGHT: i32 = 110;

/// One bar: a median, and how far the rounds lay apart.
struct Bar {
    value: f64,
    min: f64,
    max: f64,
    colour: RGBColor,
    text: String,
}

/// Bars that belong together, and a mark that they are held against.
struct Group {
    title: String,
    mark: Option<f64>,
    bars: Vec<Bar>,
}

/// How far each contender is on the way to each goal: 1 is the goal, more is better.
pub fn goals(samples: &Samples, names: &[String]) -> Result<Option<String>> {
    let mut groups = Vec::new();
    for goal in GOALS {
        let bars: Vec<Bar> = names
            .iter()
            .enumerate()
            .filter_map(|(i, name)| goal_bar(goal, samples, name, COLOURS[i % COLOURS.len()]))
            .collect();
        if !bars.is_empty() {
            let title = format!("{} ({})", goal.what, goal.bound_text());
            groups.push(Group { title, mark: Some(1.0), bars });
        }
    }
    draw("Goals: 1 is the goal, more is better", &groups, names)
}

fn goal_bar(goal: &Goal, samples: &Samples, name: &str, colour: RGBColor) -> Option<Bar> {
    let standing = goal.standing(samples, name)?;
    // Nothing at all where nothing is allowed is as good as it gets, not infinitely good.
    let reach = |value: f64| match goal.bound {
        Bound::AtLeast(least) => value / least,
        Bound::AtMost(most) => most / value.max(most / 4.0),
    };
    let spread = standing.spread;
    let (one, two) = (reach(spread.min), reach(spread.max));
    Some(Bar {
        value: reach(spread.median),
        min: one.min(two),
        max: one.max(two),
        colour,
        text: crate::table::number(spread.median),
    })
}

/// Ratios to `base` of all rows with that metric.
pub fn ratios(
    samples: &Samples,
    names: &[String],
    metric: &str,
    base: &str,
) -> Result<Option<String>> {
    let mut groups = Vec::new();
    for row in samples.rows.iter().filter(|row| row.metric == metric) {
        let bar = |(i, name): (usize, &String)| {
            // The bare directory is so far off that nothing else would be seen beside it.
            let ratio = row.ratio(name, base).filter(|_| name != base && name != "bare")?;
            Some(Bar {
                value: ratio.median,
                min: ratio.min,
                max: ratio.max,
                colour: COLOURS[i % COLOURS.len()],
                text: crate::table::number(ratio.median),
            })
        };
        let bars: Vec<Bar> = names.iter().enumerate().filter_map(bar).collect();
        if !bars.is_empty() {
            groups.push(Group { title: row.work.to_owned(), mark: Some(1.0), bars });
        }
    }
    draw(&format!("{metric}: x {base}, median and range of the rounds"), &groups, names)
}

fn draw(title: &str, groups: &[Group], names: &[String]) -> Result<Option<String>> {
    let bars: usize = groups.iter().map(|group| group.bars.len()).sum();
    if bars == 0 {
        return Ok(None);
    }
    let height = TOP + ROW * bars as i32 + 10 * groups.len() as i32 + 20;
    // A single outlier must not press all else flat.
    let highest = groups.iter().flat_map(|group| &group.bars).map(|bar| bar.value);
    let limit = highest.fold(1.2, f64::max).min(4.0) * 1.05;
    let x = |value: f64| {
        let width = f64::from(WIDTH as i32 - LEFT - RIGHT);
        LEFT + (value.clamp(0.0, limit) / limit * width) as i32
    };
    let mut out = String::new();
    {
        let area = SVGBackend::with_string(&mut out, (WIDTH, height as u32)).into_drawing_area();
        area.fill(&WHITE).map_err(|error| anyhow!("draw: {error}"))?;
        let text = |text: &str, at: (i32, i32), style: &TextStyle<'_>| {
            area.draw(&Text::new(text.to_owned(), at, style.clone()))
                .map_err(|error| anyhow!("draw: {error}"))
        };
        let font = ("sans-serif", 15).into_font();
        let left = TextStyle::from(font.clone()).pos(Pos::new(HPos::Left, VPos::Center));
        let right = TextStyle::from(font.clone()).pos(Pos::new(HPos::Right, VPos::Center));
        text(title, (10, 12), &TextStyle::from(("sans-serif", 19).into_font()).pos(left.pos))?;
        legend(&area, names, &left)?;
        let shape = |points: [(i32, i32); 2], style: ShapeStyle| {
            area.draw(&Rectangle::new(points, style)).map_err(|error| anyhow!("draw: {error}"))
        };
        let mut y = TOP;
        for group in groups {
            let bottom = y + ROW * group.bars.len() as i32;
            text(&group.title, (LEFT - 8, (y + bottom) / 2), &right)?;
            for bar in &group.bars {
                shape([(LEFT, y + 1), (x(bar.value), y + ROW - 1)], bar.colour.mix(0.75).filled())?;
                let middle = y + ROW / 2;
                shape([(x(bar.min), middle), (x(bar.max), middle + 1)], BLACK.filled())?;
                text(&bar.text, (x(bar.max.max(bar.value)) + 5, middle), &left)?;
                y += ROW;
            }
            if let Some(mark) = group.mark {
                shape(
                    [(x(mark), bottom - ROW * group.bars.len() as i32), (x(mark) + 1, bottom)],
                    RED.filled(),
                )?;
            }
            y += 10;
        }
        area.present().map_err(|error| anyhow!("draw: {error}"))?;
    }
    Ok(Some(out))
}

fn legend<DB: DrawingBackend>(
    area: &DrawingArea<DB, plotters::coord::Shift>,
    names: &[String],
    style: &TextStyle<'_>,
) -> Result<()> {
    let mut at = 10;
    for (i, name) in names.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()].mix(0.75).filled();
        area.draw(&Rectangle::new([(at, 26), (at + 10, 36)], colour))
            .map_err(|error| anyhow!("draw: {error}"))?;
        area.draw(&Text::new(name.clone(), (at + 14, 31), style.clone()))
            .map_err(|error| anyhow!("draw: {error}"))?;
        at += 38 + 8 * name.len() as i32;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::Metric;

    #[test]
    fn charts_are_drawn_of_what_is_there() {
        let mut samples = Samples::default();
        let names = ["local".to_owned(), "ringfs".to_owned()];
        assert!(goals(&samples, &names).unwrap().is_none());
        for (name, value) in [("local", 100.0), ("ringfs", 80.0)] {
            let metric = Metric { name: "rate", unit: "IOPS", value };
            samples.add("randread-4k-d1", name, 0, &[metric]);
        }
        let svg = goals(&samples, &names[1..]).unwrap().unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("depth 1") && svg.contains("0.80"));
        let svg = ratios(&samples, &names, "rate", "local").unwrap().unwrap();
        assert!(svg.contains("randread-4k-d1"));
        assert!(ratios(&samples, &names, "cpu", "local").unwrap().is_none());
    }
}
