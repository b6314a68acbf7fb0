//! The CUSTOM SCALARS tab: which curves share a chart, and in what order the charts come.
//!
//! The message is that of `tensorboard/plugins/custom_scalar/layout.proto` at version 0, which proto3 does not write.

use super::{EventWriter, Message, plugin_value, string_tensor};
use crate::Result;

/// Charts under one heading, which a click folds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Category {
    /// The heading.
    pub title: String,
    /// The charts, in the order shown.
    pub charts: Vec<Chart>,
}

/// One chart: a curve for every run and every scalar that one of `tags` matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chart {
    /// Shown above the chart; no two charts of a category should share it.
    pub title: String,
    /// Regular expressions, matched from the start of a scalar's name: `reward` takes `rewards/clip/mean` too, and
    /// `reward$` does not.
    pub tags: Vec<String>,
}

impl EventWriter {
    /// Fills the CUSTOM SCALARS tab, where the curves of several runs and of several names overlay.
    ///
    /// TensorBoard shows every chart of every run's layout once. Give all runs of a folder the same layout: a chart
    /// that differs in a tag appears a second time.
    pub fn layout(&mut self, categories: &[Category]) -> Result<()> {
        let plugin = Message::new().text(1, "custom_scalars");
        let tensor = string_tensor(&encoded(categories).0);
        self.value(0, plugin_value("custom_scalars__config__", &plugin, &tensor))?;
        self.flush()
    }
}

fn encoded(categories: &[Category]) -> Message {
    let mut layout = Message::new();
    for Category { title, charts } in categories {
        let mut category = Message::new().text(1, title);
        for Chart { title, tags } in charts {
            let multiline = tags.iter().fold(Message::new(), |content, tag| content.text(1, tag));
            category = category.message(2, &Message::new().text(1, title).message(2, &multiline));
        }
        layout = layout.message(2, &category);
    }
    layout
}

#[cfg(test)]
mod tests {
    use super::super::golden;
    use super::*;

    #[test]
    fn a_layout_is_that_of_the_official_classes() {
        let chart = |title: &str, tags: &[&str]| Chart {
            title: title.into(),
            tags: tags.iter().map(|tag| tag.to_string()).collect(),
        };
        let held_out = chart("held-out means", &["held_out/.*/mean$"]);
        let train = [chart("reward", &["reward$"]), chart("policy", &["kl$", "entropy$"])];
        let categories = [
            Category { title: "held out".into(), charts: vec![held_out] },
            Category { title: "training".into(), charts: train.into() },
        ];
        assert_eq!(encoded(&categories).0, golden("layout"));
    }
}
