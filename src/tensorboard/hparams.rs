//! The HPARAMS tab: a row a run, with its hyper-parameters and the last value of the metrics to compare.
//!
//! The messages are those of `tensorboard/plugins/hparams/{plugin_data,api}.proto` at plug-in version 0, which
//! proto3 does not write. They travel as metadata of summaries, so the first of a tag counts and a later one is
//! ignored, even in another event file of the folder.

use std::collections::BTreeMap;

use super::{EventWriter, Message, plugin_value, seconds};
use crate::Result;

const STRING: u64 = 1;
const BOOL: u64 = 2;
const FLOAT64: u64 = 3;
const SUCCESS: u64 = 1;
const FAILURE: u64 = 2;

/// The value of a hyper-parameter, in the three kinds that TensorBoard can sort.
#[derive(Clone, Debug, PartialEq)]
pub enum HParam {
    /// Filtered by an interval; one that is not finite is shown as text.
    Number(f64),
    /// Shown as it is.
    Text(String),
    /// Filtered by two check boxes.
    Flag(bool),
}

impl HParam {
    /// The leaves of a configuration by their dotted names. A table below the `depth`-th is one text, and so is a list: runs of
    /// a folder need the same names, and such things may have others elsewhere.
    pub fn settings(table: &toml::Table, depth: usize) -> BTreeMap<String, Self> {
        let mut found = BTreeMap::new();
        table.iter().for_each(|(key, value)| flatten(key, value, depth, &mut found));
        found
    }
}

fn flatten(name: &str, value: &toml::Value, depth: usize, found: &mut BTreeMap<String, HParam>) {
    let leaf = match value {
        toml::Value::Table(section) if depth > 0 => {
            section.iter().for_each(|(key, value)| flatten(&format!("{name}.{key}"), value, depth - 1, found));
            return;
        }
        toml::Value::Integer(number) => HParam::Number(*number as f64),
        toml::Value::Float(number) => HParam::Number(*number),
        toml::Value::Boolean(flag) => HParam::Flag(*flag),
        toml::Value::String(text) => HParam::Text(text.clone()),
        other => HParam::Text(other.to_string()),
    };
    found.insert(name.to_string(), leaf);
}

impl EventWriter {
    /// Makes this run a row of the HPARAMS tab, with the latest value of each scalar in `metrics`.
    ///
    /// Runs of one `group` share a row with the mean of their metrics and the hyper-parameters of one of them: meant
    /// for seeds. A run whose `group` is empty has a row of its own. TensorBoard takes the columns from any one run,
    /// so give every run of a folder the same names and metrics; a cell without a value stays empty. It shows the
    /// first five hyper-parameters in name order and the first five metrics, and the others after a click.
    pub fn hparams(&mut self, hparams: &BTreeMap<String, HParam>, metrics: &[&str], group: &str) -> Result<()> {
        self.hparams_value("_hparams_/experiment", &experiment(hparams, metrics, seconds()))?;
        self.hparams_value("_hparams_/session_start_info", &session_start(hparams, group, seconds()))?;
        self.flush()
    }

    /// Marks the run as ended in the HPARAMS tab.
    ///
    /// The first mark of a run folder stays: a run that may be resumed is better left without one.
    pub fn session_end(&mut self, succeeded: bool) -> Result<()> {
        self.hparams_value("_hparams_/session_end_info", &session_end(succeeded, seconds()))?;
        self.flush()
    }

    fn hparams_value(&mut self, tag: &str, content: &Message) -> Result<()> {
        let plugin = Message::new().text(1, "hparams").message(2, content);
        self.value(0, plugin_value(tag, &plugin, &empty_tensor()))
    }
}

/// A float tensor of shape `[0]`, which keeps a summary that is all metadata valid.
fn empty_tensor() -> Message {
    const DT_FLOAT: u64 = 1;
    let shape = Message::new().message(2, &Message::new());
    Message::new().int(1, DT_FLOAT).message(2, &shape)
}

/// The columns. Only flags have a domain: a run knows no other run's values, and TensorBoard offers to filter by those
/// of the domain alone.
fn experiment(hparams: &BTreeMap<String, HParam>, metrics: &[&str], now: f64) -> Message {
    let mut experiment = Message::new().f64(3, now);
    for (name, value) in hparams {
        let column = Message::new().text(1, name);
        let column = match value {
            HParam::Number(number) if number.is_finite() => column.int(4, FLOAT64),
            HParam::Number(_) | HParam::Text(_) => column.int(4, STRING),
            HParam::Flag(_) => column.int(4, BOOL).message(5, &both_flags()),
        };
        experiment = experiment.message(4, &column);
    }
    for tag in metrics {
        let name = Message::new().text(2, tag);
        experiment = experiment.message(5, &Message::new().message(1, &name));
    }
    Message::new().message(2, &experiment)
}

fn both_flags() -> Message {
    [0, 1].into_iter().fold(Message::new(), |list, flag| list.message(1, &Message::new().int(4, flag)))
}

fn session_start(hparams: &BTreeMap<String, HParam>, group: &str, now: f64) -> Message {
    let mut start = Message::new();
    for (name, value) in hparams {
        let value = match value {
            HParam::Number(number) if number.is_finite() => Message::new().f64(2, *number),
            // TensorBoard answers with JSON, which has no such number: it would leave the cell empty.
            HParam::Number(number) => Message::new().text(3, &number.to_string()),
            HParam::Text(text) => Message::new().text(3, text),
            HParam::Flag(flag) => Message::new().int(4, u64::from(*flag)),
        };
        start = start.message(1, &Message::new().text(1, name).message(2, &value));
    }
    if !group.is_empty() {
        start = start.text(4, group);
    }
    Message::new().message(3, &start.f64(5, now))
}

fn session_end(succeeded: bool, now: f64) -> Message {
    let end = Message::new().int(1, if succeeded { SUCCESS } else { FAILURE }).f64(2, now);
    Message::new().message(4, &end)
}

#[cfg(test)]
mod tests {
    use super::super::golden;
    use super::*;

    fn example() -> BTreeMap<String, HParam> {
        let text = |text: &str| HParam::Text(text.into());
        let values = [
            ("lr", HParam::Number(1e-5)),
            ("clip", HParam::Number(f64::INFINITY)),
            ("kl_weight", HParam::Number(0.0)),
            ("policy", text("simplear")),
            ("resume", HParam::Flag(false)),
        ];
        values.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    #[test]
    fn columns_are_those_of_the_official_classes() {
        assert_eq!(experiment(&example(), &["reward", "held_out/clip/mean"], 1.5).0, golden("experiment"));
    }

    #[test]
    fn a_row_is_that_of_the_official_classes() {
        assert_eq!(session_start(&example(), "seeds", 1.5).0, golden("session_start"));
        assert_eq!(session_start(&BTreeMap::new(), "", 1.5).0, golden("session_start_alone"));
    }

    #[test]
    fn an_end_is_that_of_the_official_classes() {
        assert_eq!(session_end(true, 2.5).0, golden("session_success"));
        assert_eq!(session_end(false, 2.5).0, golden("session_failure"));
    }

    #[test]
    fn metadata_stands_beside_an_empty_tensor() {
        let plugin = Message::new().text(1, "hparams").message(2, &session_end(true, 2.5));
        let value = plugin_value("_hparams_/session_end_info", &plugin, &empty_tensor());
        assert_eq!(value.0, golden("session_end_value"));
    }
}
