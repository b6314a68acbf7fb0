//! Charts as SVG, in the width of a phone: intervals beside a line at zero, and curves with bands.
//!
//! Drawn by `plotters` without its font libraries, so text is measured roughly and laid out with room to spare.

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Width of a chart in pixels: that of a narrow phone, so that its letters are not made smaller there.
const WIDTH: u32 = 360;
const LETTERS: i32 = 15;
const INK: RGBColor = RGBColor(40, 40, 40);
const FAINT: RGBColor = RGBColor(215, 215, 215);

/// Colours that the colour-blind tell apart (Okabe and Ito, 2008), and a few further ones.
const COLOURS: [RGBColor; 10] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(128, 80, 20),
    RGBColor(120, 120, 120),
    RGBColor(90, 60, 160),
];

/// The colour of an arm by its place in the report.
fn colour(arm: usize) -> RGBColor {
    COLOURS.get(arm % COLOURS.len()).copied().unwrap_or(BLACK)
}

/// A row of an interval chart.
pub(super) struct Bar {
    pub(super) label: String,
    /// The arm's place in the report.
    pub(super) arm: usize,
    pub(super) mean: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

/// A curve.
pub(super) struct Line {
    pub(super) label: String,
    pub(super) arm: usize,
    /// Step, value, and the ends of the band.
    pub(super) points: Vec<(f64, f64, f64, f64)>,
}

impl Line {
    fn course(&self) -> Vec<(f64, f64)> {
        self.points.iter().map(|point| (point.0, point.1)).collect()
    }

    /// The band as an outline: along its upper end, and back along its lower one.
    fn band(&self) -> Vec<(f64, f64)> {
        let back = self.points.iter().rev().map(|point| (point.0, point.2));
        self.points.iter().map(|point| (point.0, point.3)).chain(back).collect()
    }
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

impl Bar {
    /// How far it reaches from zero.
    fn reach(&self) -> f64 {
        self.low.abs().max(self.high.abs())
    }

    /// Which side it lies on, where none of it is between these ends.
    fn beyond(&self, (low, high): (f64, f64)) -> Option<Side> {
        match (self.high < low, self.low > high) {
            (true, _) => Some(Side::Left),
            (_, true) => Some(Side::Right),
            _ => None,
        }
    }
}

enum Side {
    Left,
    Right,
}

/// So many times as far as the others reach is too far: an axis that held it would show of them nothing.
const FAR: f64 = 3.0;

/// The ends of the axis: of all bars and zero, or without those that reach far beyond the others.
fn ends(bars: &[Bar]) -> (f64, f64) {
    let of = |bars: &[&Bar]| range(bars.iter().flat_map(|bar| [bar.low, bar.high, 0.0]));
    let mut all: Vec<&Bar> = bars.iter().collect();
    all.sort_by(|a, b| a.reach().total_cmp(&b.reach()));
    let is_far = |pair: &[&Bar]| matches!(pair, [next, far] if far.reach() > FAR * next.reach());
    // Of three or more, at least two are others.
    let n_kept = (3..=all.len()).rev().find(|n| !is_far(&all[n - 2..*n])).unwrap_or(all.len().min(2));
    let (kept, far) = all.split_at(n_kept);
    let few = of(kept);
    if far.iter().all(|bar| bar.beyond(few).is_some()) { few } else { of(&all) }
}

/// Means with their intervals, a row each, beside a line at zero. One far beyond the others is an arrow with its mean.
pub(super) fn intervals(title: &str, bars: &[Bar]) -> Option<String> {
    let height = 62 + 24 * bars.len() as u32;
    drawn(height, title, |area| {
        let (low, high) = ends(bars);
        let n = bars.len() as f64;
        let longest = bars.iter().map(|bar| bar.label.chars().count()).max().unwrap_or(0) as u32;
        let mut chart = ChartBuilder::on(area)
            .margin_right(16)
            .margin_top(4)
            .x_label_area_size(24)
            .y_label_area_size((8 * longest + 12).clamp(40, 190))
            .build_cartesian_2d(low..high, -0.5..n - 0.5)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .bold_line_style(FAINT)
            .light_line_style(TRANSPARENT)
            .axis_style(FAINT)
            .x_labels(4)
            .x_label_formatter(&number)
            .y_labels(0)
            .label_style(("sans-serif", LETTERS, &INK))
            .draw()?;
        chart.draw_series(LineSeries::new([(0.0, -0.5), (0.0, n - 0.5)], INK.stroke_width(1)))?;
        for (row, bar) in bars.iter().enumerate() {
            let (y, colour) = (n - 1.0 - row as f64, colour(bar.arm));
            let style = ("sans-serif", LETTERS).into_font().color(&colour);
            let mean = number(&bar.mean);
            let arrow = match bar.beyond((low, high)) {
                Some(Side::Left) => Some((format!("◀ {mean}"), low, HPos::Left)),
                Some(Side::Right) => Some((format!("{mean} ▶"), high, HPos::Right)),
                None => None,
            };
            match arrow {
                Some((text, x, side)) => {
                    let style = style.pos(Pos::new(side, VPos::Center));
                    chart.draw_series([Text::new(text, (x, y), style)])?;
                }
                None => {
                    chart.draw_series(LineSeries::new([(bar.low, y), (bar.high, y)], colour.stroke_width(3)))?;
                    chart.draw_series([Circle::new((bar.mean, y), 4, colour.filled())])?;
                }
            }
            // Labels are written here: an axis of the library's own measures letters that it cannot see.
            let (_, pixel) = chart.backend_coord(&(low, y));
            let style = ("sans-serif", LETTERS).into_font().color(&INK);
            area.draw_text(&bar.label, &style, (8, pixel - LETTERS / 2 - area.get_base_pixel().1))?;
        }
        Ok(())
    })
}

/// Curves with bands and a legend.
pub(super) fn curves(title: &str, lines: &[Line]) -> Option<String> {
    let legend = legend_height(lines);
    drawn(220 + legend, title, |area| {
        let (legend_area, plot) = area.split_vertically(legend);
        let all = || lines.iter().flat_map(|line| &line.points);
        let (first, last) = range_exact(all().map(|point| point.0));
        let (low, high) = range(all().flat_map(|point| [point.1, point.2, point.3]));
        let mut chart = ChartBuilder::on(&plot)
            .margin_right(16)
            .margin_top(8)
            .x_label_area_size(24)
            .y_label_area_size(52)
            .build_cartesian_2d(first..last, low..high)?;
        draw_axes(&mut chart, &INK)?;
        for line in lines {
            let colour = colour(line.arm);
            chart.draw_series([Polygon::new(line.band(), colour.mix(0.13))])?;
            chart.draw_series(LineSeries::new(line.course(), colour.stroke_width(2)))?;
        }
        draw_legend(&legend_area, lines)
    })
}

/// Two curves over the same steps, each with its own axis: the first on the left, the second on the right and dashed.
pub(super) fn two_axes(title: &str, left: &Line, right: &Line) -> Option<String> {
    let second = colour(2);
    drawn(240, title, |area| {
        let (legend, plot) = area.split_vertically(36);
        let (first, last) = range_exact(left.points.iter().map(|point| point.0));
        let of = |line: &Line| range(line.points.iter().flat_map(|point| [point.1, point.2, point.3]));
        let ((low, high), (right_low, right_high)) = (of(left), of(right));
        let mut chart = ChartBuilder::on(&plot)
            .margin_top(8)
            .x_label_area_size(24)
            .y_label_area_size(52)
            .right_y_label_area_size(52)
            .build_cartesian_2d(first..last, low..high)?
            .set_secondary_coord(first..last, right_low..right_high);
        draw_axes(&mut chart, &colour(1))?;
        chart
            .configure_secondary_axes()
            .axis_style(FAINT)
            .y_labels(5)
            .y_label_formatter(&number)
            .label_style(("sans-serif", LETTERS, &second))
            .draw()?;
        chart.draw_series([Polygon::new(left.band(), colour(1).mix(0.13))])?;
        chart.draw_secondary_series([Polygon::new(right.band(), second.mix(0.13))])?;
        chart.draw_series(LineSeries::new(left.course(), colour(1).stroke_width(2)))?;
        chart.draw_secondary_series(DashedLineSeries::new(right.course(), 6, 4, second.stroke_width(2)))?;
        let style = |colour: &RGBColor| ("sans-serif", LETTERS).into_font().color(colour);
        legend.draw_text(&format!("left: {}", left.label), &style(&colour(1)), (8, 2))?;
        legend.draw_text(&format!("right, dashed: {}", right.label), &style(&second), (8, 20))?;
        Ok(())
    })
}

/// Steps below, values on the left, in this colour.
fn draw_axes(chart: &mut Plane<'_, '_>, letters: &RGBColor) -> Drawn {
    chart
        .configure_mesh()
        .bold_line_style(FAINT)
        .light_line_style(TRANSPARENT)
        .axis_style(FAINT)
        .x_labels(5)
        .y_labels(5)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&number)
        .label_style(("sans-serif", LETTERS, letters))
        .draw()?;
    Ok(())
}

/// A chart over numbers.
type Plane<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Entries of a legend in one row of it.
const PER_ROW: usize = 2;

fn legend_height(lines: &[Line]) -> u32 {
    18 * lines.len().div_ceil(PER_ROW) as u32
}

fn draw_legend<DB: DrawingBackend>(area: &DrawingArea<DB, Shift>, lines: &[Line]) -> Drawn
where
    DB::ErrorType: 'static,
{
    for (at, line) in lines.iter().enumerate() {
        let left = 8 + (at % PER_ROW) as i32 * (WIDTH as i32 - 16) / PER_ROW as i32;
        let top = 18 * (at / PER_ROW) as i32;
        let colour = colour(line.arm);
        area.draw(&Rectangle::new([(left, top + 5), (left + 14, top + 9)], colour.filled()))?;
        let style = ("sans-serif", LETTERS).into_font().color(&INK);
        area.draw_text(&line.label, &style, (left + 20, top))?;
    }
    Ok(())
}

/// An SVG of this height under its title; `None` where nothing can be drawn (no number, or one that is not finite).
fn drawn(height: u32, title: &str, draw: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> Drawn) -> Option<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE).ok()?;
        let style = ("sans-serif", 17).into_font().color(&INK);
        root.draw_text(title, &style, (8, 6)).ok()?;
        let (_, rest) = root.split_vertically(28);
        draw(&rest).ok()?;
        root.present().ok()?;
    }
    Some(svg)
}

/// The range of these numbers with a little room around them.
fn range(numbers: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = range_exact(numbers);
    let room = (high - low) * 0.06;
    (low - room, high + room)
}

fn range_exact(numbers: impl Iterator<Item = f64>) -> (f64, f64) {
    let ends = numbers.filter(|number| number.is_finite());
    let (low, high) = ends.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    match low < high {
        true => (low, high),
        false if low.is_finite() => (low - 0.5, low + 0.5),
        false => (0.0, 1.0),
    }
}

/// A number on an axis.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that an axis asks for")]
fn number(x: &f64) -> String {
    let text = match x.abs() {
        size if size >= 100.0 => format!("{x:.0}"),
        size if size >= 10.0 => format!("{x:.1}"),
        _ => format!("{x:.3}"),
    };
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    if text == "-0" { "0".into() } else { text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bars(ends: &[(f64, f64)]) -> Vec<Bar> {
        let bar = |(at, &(low, high)): (usize, &(f64, f64))| Bar {
            label: format!("arm {at}"),
            arm: at,
            mean: (low + high) / 2.0,
            low,
            high,
        };
        ends.iter().enumerate().map(bar).collect()
    }

    #[test]
    fn one_far_beyond_the_others_is_an_arrow() {
        let near = [(0.02, 0.05), (-0.02, 0.01), (0.01, 0.04)];
        let svg = |ends: &[(f64, f64)]| intervals("a", &bars(ends)).unwrap();
        assert_eq!(svg(&near).matches("<circle").count(), 3);
        let far = svg(&[near.as_slice(), &[(-0.6, -0.4)]].concat());
        assert_eq!(far.matches("<circle").count(), 3);
        assert!(far.contains("◀ -0.5"), "{far}");
        let right = svg(&[near.as_slice(), &[(0.4, 0.6)], &[(0.5, 0.7)]].concat());
        assert_eq!(right.matches("<circle").count(), 5, "two that reach as far are not alone");
        // One that reaches far and begins among the others cannot be left out of the axis.
        assert_eq!(svg(&[near.as_slice(), &[(0.0, 0.9)]].concat()).matches("<circle").count(), 4);
        assert!(intervals("none", &[]).is_some_and(|svg| !svg.contains("NaN")));
    }

    #[test]
    fn numbers_on_an_axis_are_short() {
        let check = |x: f64, expected: &str| assert_eq!(number(&x), expected);
        check(0.02, "0.02");
        check(-0.0, "0");
        check(118.0, "118");
        check(-0.5, "-0.5");
        check(12.34, "12.3");
    }

    #[test]
    fn curves_of_one_value_and_of_none_can_be_drawn() {
        let line = |points: &[(f64, f64, f64, f64)]| Line { label: "a".into(), arm: 0, points: points.to_vec() };
        let flat = line(&[(0.0, 1.0, 1.0, 1.0), (5.0, 1.0, 1.0, 1.0)]);
        for svg in [curves("a", &[flat]), curves("a", &[line(&[])]), two_axes("a", &line(&[]), &line(&[]))] {
            assert!(svg.is_some_and(|svg| !svg.contains("NaN") && !svg.contains("inf")));
        }
    }
}
