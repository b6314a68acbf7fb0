"""Golden values of turning a language model into a SimpleAR one: transformers' resize and SimpleAR's mean rule.

Made with torch 2.11.0, transformers 5.23.0, tokenizers 0.23.3, safetensors 0.8.0; run `python qwen2_resize.py` in this
folder. Writes two folders as `save_pretrained` leaves them (qwen2_resize/tied, qwen2_resize/untied): a tiny Qwen2 whose
embedding is padded beyond its tokenizer, and a byte-level BPE with Qwen2's pre-tokenizer, trained on SENTENCES; and
  resized.safetensors  embedding and head after 7 special tokens and CODES codes were added
  ids.json             ids of TEXTS by the extended tokenizer, its length before and after

The rule, in SimpleAR's words `smart_tokenizer_and_embedding_resize`: every row behind the old tokens is their mean.
"""

import json
import pathlib
import shutil

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CODES = 25
SPECIAL = ["<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>"]
TEXT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SENTENCES = ["a photo of a red star above a blue square", "a highly realistic image of two green dogs and a cat",
             "An image of aerial view, overexposed, low quality", "the quick brown fox jumps over the lazy dog"]
TEXTS = ["a photo of a red star", "", " leading and  double   spaces ", "one\ntwo\r\n\r\nthree\t!", "it's 1234 o'CLOCK",
         "naïve café", "cafe\u0301 with a combining accent", "日本語の文字と한글", "🦊🏳️‍🌈👩‍👩‍👧 zero-width\u200bjoined",
         "a <|soi|> inside", "<|im_start|>system<|im_end|>", "<|t2i |> is not one", "<|sov|><|sov|> twice",
         "\x00\x7f control", "𝒻𝒶𝓃𝒸𝓎 ½ ﬁ", "A" * 70, "…—“quotes”"]

torch.set_num_threads(1)


def train_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(
        vocab_size=300, min_frequency=2, initial_alphabet=alphabet, show_progress=False))
    # Qwen2.5 adds its special tokens behind the vocabulary, not in front.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in TEXT])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=TEXT[0], eos_token=TEXT[2])


def write(tied, folder):
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(4)
    tokenizer = train_tokenizer()
    old = len(tokenizer)
    config = Qwen2Config(
        vocab_size=old + 13, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=old - 3,
        eos_token_id=old - 1, rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value))
    model.generation_config.repetition_penalty = 1.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    # From here on only what was saved, and transformers' own resize.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == old < model.get_input_embeddings().weight.shape[0]
    assert tokenizer.add_tokens(SPECIAL, special_tokens=True) == 7
    model.resize_token_embeddings(len(tokenizer) + CODES, mean_resizing=False)
    resized = {}
    with torch.no_grad():
        for name, module in [("embed", model.get_input_embeddings()), ("head", model.get_output_embeddings())]:
            rows = module.weight.data
            assert rows.shape[0] == old + 7 + CODES
            if name == "embed" or not tied:
                rows[old:] = rows[:old].mean(dim=0, keepdim=True)
            resized[name] = rows.clone()
    save_file(resized, folder / "resized.safetensors")
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    (folder / "ids.json").write_text(json.dumps({
        "made_by": f"qwen2_resize.py, torch {torch.__version__}, transformers {transformers.__version__}, "
                   f"tokenizers {tokenizers.__version__}",
        "old": old, "new": len(tokenizer), "special": tokenizer.convert_tokens_to_ids(SPECIAL), "codes": CODES,
        "texts": TEXTS, "ids": ids,
    }))


write(True, pathlib.Path("qwen2_resize/tied"))
write(False, pathlib.Path("qwen2_resize/untied"))
