//! A step of cached decoding on the CPU allocates nothing: an image or a text of more tokens takes no more allocations.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

mod counting;

use std::sync::Arc;

use candle_core::Device;
use counting::counted;
use grpo::{Policy, Prompt, Request, Seed};
use grpo_policies::cosmos::{Cosmos, CosmosConfig};
use grpo_policies::decoder::{Decoder, DecoderConfig};
use grpo_policies::simplear::{Grid, Law, SimpleAr, TextTokenizer};
use grpo_policies::text_lm::{TextLaw, TextLm, Tokenizer};

const PROMPTS: [&str; 3] = ["a photo of a red star", "star", "a star"];
const WORDS: [&str; 5] = ["a", "photo", "of", "red", "star"];
const N_ROWS: usize = 21;

/// Rows of a tile each, or, with weights that no cache holds, threads that share columns.
const WIDTHS: [(usize, usize); 2] = [(32, 48), (256, 2_000)];

fn decoder(vocab_size: usize, (hidden_size, intermediate_size): (usize, usize)) -> Decoder {
    let config = DecoderConfig {
        vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 128,
        ..DecoderConfig::default()
    };
    Decoder::init(config, Seed::new(2)).unwrap()
}

fn requests(prompts: &[Prompt]) -> Vec<Request<'_>> {
    let of = |row: usize| Request { prompt: &prompts[row % prompts.len()], seed: Seed::new(7).fold(row as u64) };
    (0..N_ROWS).map(of).collect()
}

/// Allocations that images of this size take beyond what the first of them makes in every thread.
fn by_images(widths: (usize, usize), law: &Law, grid: Grid) -> usize {
    let config = CosmosConfig { channels: 8, levels: vec![8, 8, 8], embedding_dim: 3, ..CosmosConfig::shapes() };
    let cosmos = Arc::new(Cosmos::init(config, Seed::new(1), &Device::Cpu).unwrap());
    let text = Arc::new(TextTokenizer::of_words(WORDS).unwrap());
    let decoder = decoder(text.n_ids() as usize + cosmos.n_codes() as usize, widths);
    let policy = SimpleAr::new(decoder, cosmos, text, grid).unwrap().with_law(law.clone()).unwrap();
    let prompts = PROMPTS.map(Prompt::new);
    let requests = requests(&prompts);
    counted(|| drop(policy.draw(&requests).unwrap())).1
}

/// Allocations that texts take which end after so many tokens, or before, without those of turning ids into text.
fn by_texts(widths: (usize, usize), law: TextLaw) -> (usize, usize) {
    let tokenizer = Arc::new(Tokenizer::of_words(WORDS, &["<end>"]).unwrap());
    let end = tokenizer.id_of("<end>").into_iter().collect();
    let decoder = decoder(tokenizer.n_ids(), widths);
    let policy = TextLm::new(decoder, tokenizer.clone(), end).unwrap().with_law(law).unwrap();
    let prompts = PROMPTS.map(Prompt::new);
    let requests = requests(&prompts);
    let mut drawn = Vec::new();
    let (_, all) = counted(|| drawn = policy.sample(&requests).unwrap());
    let (_, texts) = counted(|| drawn.iter().for_each(|drawn| drop(tokenizer.text(&drawn.trace.ids).unwrap())));
    (all - texts, drawn.iter().map(|drawn| drawn.trace.ids.len()).max().unwrap())
}

#[test]
fn more_tokens_take_no_more_allocations() {
    let plain = Law::default();
    let laws = [
        plain.clone(),
        Law { guidance: 3.0, temperature: 0.8, ..plain.clone() },
        Law { top_k: Some(50), top_p: 0.9, min_p: 0.01, ..plain.clone() },
        Law { greedy: true, guidance: 2.0, ..plain },
    ];
    // One pool to the end, since threads of one that is dropped end later and allocate as they do. It has one thread, for
    // a thread of several makes its own memory whenever it first gets work.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for widths in WIDTHS {
        for law in &laws {
            let [_, long, short] = [(6, 7), (6, 7), (2, 2)].map(|grid| pool.install(|| by_images(widths, law, grid)));
            assert_eq!(long, short, "38 more steps of {widths:?} under {law:?}");
        }
        let texts =
            |max_new_tokens: usize| pool.install(|| by_texts(widths, TextLaw { max_new_tokens, ..TextLaw::default() }));
        let [_, (long, n_long), (short, n_short)] = [40, 40, 3].map(texts);
        assert!(n_short == 3 && n_long > 10, "{n_long} tokens");
        assert_eq!(long, short, "more steps of {widths:?} of texts");
    }
}
