//! A language model as a Hugging Face folder.
//!
//! `config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`, and
//! `chat_template.jinja` where there is one.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use grpo::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{ChatTemplate, Template, TextLm, Tokenizer};
use crate::decoder::Decoder;
use crate::safetensors_file::Precision;

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// What a folder says that is not used here and is written back with the policy.
#[derive(Clone, Debug, Default)]
pub(super) struct Kept {
    tokenizer_config: Map<String, Value>,
    generation_config: Map<String, Value>,
}

impl TextLm {
    /// Reads a checkpoint folder, trainable; prompts are rendered by its chat template where it has one.
    ///
    /// Texts end at the `eos_token_id` of `generation_config.json`, or else of `config.json`. The law is the default one
    /// whatever `generation_config.json` says of sampling.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::file(
                folder,
                "there is no such folder; give one that holds config.json, tokenizer.json and the weights",
            ));
        }
        let decoder = Decoder::load(folder, device, true)?;
        let path = folder.join(TOKENIZER);
        let json = fs::read_to_string(&path).map_err(|error| Error::file(&path, error))?;
        let tokenizer = Tokenizer::from_json(&json).map_err(|error| Error::file(&path, error))?;
        let kept = Kept {
            tokenizer_config: object(folder, TOKENIZER_CONFIG)?,
            generation_config: object(folder, GENERATION)?,
        };
        let ends = ends(folder, &kept.generation_config)?;
        let template = template(folder, &kept.tokenizer_config)?;
        let policy = Self::new(decoder, Arc::new(tokenizer), ends).map_err(|error| Error::file(folder, error))?;
        Ok(Self { kept: Arc::new(kept), ..policy.with_template(template) })
    }

    /// Writes what [`TextLm::load`] and transformers read, the weights as bf16 or f32; a system message is not part of it.
    pub fn save(&self, folder: &Path, precision: Precision) -> Result<()> {
        self.decoder.save(folder, precision)?;
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).map_err(|error| Error::file(path, error))
        };
        let mut generation = self.kept.generation_config.clone();
        generation.insert("eos_token_id".into(), json!(&*self.ends));
        let mut tokenizer_config = self.kept.tokenizer_config.clone();
        tokenizer_config.entry("tokenizer_class").or_insert(json!("PreTrainedTokenizerFast"));
        // The file of its own is what transformers prefers.
        tokenizer_config.remove("chat_template");
        match &self.template {
            Template::Chat(chat) => write(TEMPLATE, chat.source())?,
            // One that another policy left here would be taken for this one's.
            Template::Plain => remove(&folder.join(TEMPLATE))?,
        }
        write(GENERATION, &format!("{:#}\n", Value::Object(generation)))?;
        write(TOKENIZER, self.tokenizer.json())?;
        write(TOKENIZER_CONFIG, &format!("{:#}\n", Value::Object(tokenizer_config)))
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::file(path, error)),
        _ => Ok(()),
    }
}

/// A JSON object of a folder; empty where there is no such file.
fn object(folder: &Path, name: &str) -> Result<Map<String, Value>> {
    let path = folder.join(name);
    if !path.exists() {
        return Ok(Map::new());
    }
    let json = fs::read_to_string(&path).map_err(|error| Error::file(&path, error))?;
    serde_json::from_str(&json).map_err(|error| Error::file(&path, format!("{error}; give a JSON object")))
}

/// One id or several, as in the files of published checkpoints.
#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Several(Vec<u32>),
}

fn ends(folder: &Path, generation: &Map<String, Value>) -> Result<Vec<u32>> {
    let config = object(folder, CONFIG)?;
    let files = [(GENERATION, generation), (CONFIG, &config)];
    let named = |(name, file): (&'static str, &Map<String, Value>)| {
        file.get("eos_token_id").filter(|ids| !ids.is_null()).map(|ids| (name, ids.clone()))
    };
    let Some((name, ids)) = files.into_iter().find_map(named) else {
        return Err(Error::file(folder, "no eos_token_id in generation_config.json or config.json; write it there"));
    };
    match serde_json::from_value(ids.clone()) {
        Ok(Ids::One(id)) => Ok(vec![id]),
        Ok(Ids::Several(ids)) => Ok(ids),
        Err(_) => Err(Error::file(
            folder.join(name),
            format!("eos_token_id is {ids}; give the id that ends a text, or a list of ids"),
        )),
    }
}

/// The template of its own file, else that of the tokenizer's configuration, else none.
fn template(folder: &Path, tokenizer_config: &Map<String, Value>) -> Result<Template> {
    let tokens: BTreeMap<String, String> = tokenizer_config.iter().filter_map(special_token).collect();
    let path = folder.join(TEMPLATE);
    if path.exists() {
        let source = fs::read_to_string(&path).map_err(|error| Error::file(&path, error))?;
        return Ok(Template::Chat(ChatTemplate::new(TEMPLATE, &source, tokens)?));
    }
    let refused = |what: &str| {
        Error::file(folder.join(TOKENIZER_CONFIG), format!("chat_template {what}; write the template to {TEMPLATE}"))
    };
    let source = match tokenizer_config.get("chat_template") {
        None | Some(Value::Null) => return Ok(Template::Plain),
        Some(Value::String(source)) => source,
        Some(Value::Array(entries)) => {
            let default = entries.iter().find(|entry| entry["name"] == "default");
            let source = default.and_then(|entry| entry["template"].as_str());
            source.ok_or_else(|| refused("has no entry named `default` with a template"))?
        }
        Some(_) => return Err(refused("is neither a template nor a list of them")),
    };
    Ok(Template::Chat(ChatTemplate::new(&format!("chat_template of {TOKENIZER_CONFIG}"), source, tokens)?))
}

/// A variable of the template: `"eos_token": "</s>"`, or an object with the token as its content.
fn special_token((name, value): (&String, &Value)) -> Option<(String, String)> {
    let token = value.as_str().or_else(|| value.get("content")?.as_str())?;
    name.ends_with("_token").then(|| (name.clone(), token.to_string()))
}
