//! Curves of a run as an SVG: for a README or a mail, where TensorBoard is not at hand.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use serde_json::Value;

use crate::{Error, Result, RunFolder};

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 200.0;
const LEFT: f64 = 52.0;
const TOP: f64 = 30.0;
const RIGHT: f64 = 12.0;
const BOTTOM: f64 = 32.0;

/// Points of one metric, `(step, value)`, in the order of the log.
pub type Curve = Vec<(f64, f64)>;

/// Every metric of a run's `metrics.jsonl`, by name.
pub fn curves(run: &RunFolder) -> Result<BTreeMap<String, Curve>> {
    let path = run.metrics();
    let text = fs::read_to_string(&path).map_err(|error| Error::file(&path, error))?;
    let mut curves: BTreeMap<String, Curve> = BTreeMap::new();
    for line in text.lines() {
        let line: BTreeMap<String, Value> = serde_json::from_str(line)
            .map_err(|error| Error::file(&path, format!("a line is not a JSON object: {error}")))?;
        let Some(step) = line.get("step").and_then(Value::as_f64) else { continue };
        for (name, value) in line.iter().filter(|(name, _)| *name != "step") {
            if let Some(value) = value.as_f64() {
                curves.entry(name.clone()).or_default().push((step, value));
            }
        }
    }
    Ok(curves)
}

/// Charts of these metrics side by side; a metric that the run has not is left out.
pub fn chart(curves: &BTreeMap<String, Curve>, names: &[&str]) -> String {
    let shown: Vec<(&str, &Curve)> =
        names.iter().filter_map(|name| curves.get(*name).filter(|c| !c.is_empty()).map(|c| (*name, c))).collect();
    let width = WIDTH * shown.len().max(1) as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"11\">\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>"
    );
    for (at, (name, curve)) in shown.iter().enumerate() {
        let _ = write!(svg, "<g transform=\"translate({} 0)\">{}</g>", at as f64 * WIDTH, plot(name, curve));
    }
    svg + "</svg>\n"
}

fn plot(name: &str, curve: &Curve) -> String {
    let bounds = |of: fn(&(f64, f64)) -> f64| {
        let values = || curve.iter().map(of).filter(|value| value.is_finite());
        let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        if low < high { (low, high) } else { (low - 0.5, low + 0.5) }
    };
    let ((x0, x1), (y0, y1)) = (bounds(|p| p.0), bounds(|p| p.1));
    let x = |step: f64| LEFT + (step - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| TOP + (y1 - value) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    let (floor, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    let mut svg = format!(
        "<text x=\"{LEFT}\" y=\"18\" font-size=\"13\">{}</text>\
         <path d=\"M{LEFT} {TOP}V{floor}H{right}\" fill=\"none\" stroke=\"#999\"/>\
         <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{y1:.3}</text><text x=\"{}\" y=\"{floor}\" text-anchor=\"end\">{y0:.3}</text>\
         <text x=\"{LEFT}\" y=\"{}\">{x0}</text><text x=\"{right}\" y=\"{}\" text-anchor=\"end\">{x1} steps</text>",
        escaped(name),
        LEFT - 6.0,
        TOP + 8.0,
        LEFT - 6.0,
        floor + 16.0,
        floor + 16.0
    );
    let points: Vec<String> = curve
        .iter()
        .filter(|(_, value)| value.is_finite())
        .map(|&(step, value)| format!("{:.1},{:.1}", x(step), y(value)))
        .collect();
    let _ = write!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#1f6feb\" stroke-width=\"1.5\"/>",
        points.join(" ")
    );
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_spans_its_chart_and_a_flat_one_is_no_division_by_zero() {
        let curves = BTreeMap::from([
            ("up".to_string(), vec![(0.0, 1.0), (10.0, 3.0)]),
            ("flat".to_string(), vec![(0.0, 1.0), (1.0, 1.0)]),
        ]);
        let svg = chart(&curves, &["up", "absent", "flat"]);
        assert!(svg.contains("points=\"52.0,168.0 348.0,30.0\""), "{svg}");
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
