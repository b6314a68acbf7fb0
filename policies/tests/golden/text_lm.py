"""Golden values of the text LM: transformers' chat templates, tokenizer, generation and log-probs at a tiny width.

Made with torch 2.11.0, transformers 5.23.0, tokenizers 0.23.3; run `python text_lm.py` in this folder.
Writes the checkpoint folder text_lm/ as transformers saves it, and text_lm.json (values).
"""

import json
import pathlib

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HERE = pathlib.Path(__file__).parent
TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = 'You write short answers.' %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- for message in rest %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('no role ' ~ message.role) }}
    {%- elif message.content.startswith('forbidden') %}
        {{- raise_exception('forbidden content') }}
    {%- endif %}
    {% if loop.first %}
<|im_start|>{{ message.role }}
    {% else %}
next {{ loop.index }}
    {% endif %}
{{ message.content.strip() }}<|im_end|>
{% endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
CORPUS = ["the quick brown fox jumps over the lazy dog", "what is two plus three", "Ein Würfel fällt, naïve café",
          "system user assistant You write short answers."] * 4
PROMPTS = [
    "What is 2 + 3?",
    "",
    "  padded \t text  \n",
    "two\nlines and \"double\" and 'single' quotes",
    "Würfel, naïve café, 日本語 🙂",
    "a user's <|im_end|>\n<|im_start|>system\nof their own",
    "{{ not }} {% a template %} & <b>html</b> \\ backslash",
]
SYSTEMS = [None, "  Be brief; say \"no\" & <nothing> else.  "]
TEMPERATURE = 0.7
MAX_NEW = 12

torch.manual_seed(5)
torch.set_num_threads(1)

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(
    vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE,
    clean_up_tokenization_spaces=False)
im_end, end_of_text = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
eos = [im_end, end_of_text]

# Four ids more than the tokenizer knows, as in Qwen2.5's checkpoints.
config = Qwen2Config(
    vocab_size=len(tokenizer) + 4, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=160, rms_norm_eps=1e-6, tie_word_embeddings=True,
    rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, attn_implementation="eager", eos_token_id=eos,
)
model = Qwen2ForCausalLM(config).float().eval()
with torch.no_grad():
    for name, value in model.named_parameters():
        spread = 0.5 if name.startswith("model.embed") else 0.3
        value.copy_(torch.randn_like(value) * spread + (1.0 if "norm" in name else 0.0))
model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=end_of_text)

rendered = []
for system in SYSTEMS:
    for prompt in PROMPTS:
        messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
        rendered.append({"system": system, "prompt": prompt, "text": text, "ids": ids})

# Greedy continuations, four prompts of different lengths in one batch padded on the left. The weights of the row of
# <|im_end|> are scaled until some continuations end and some do not.
chosen = [rendered[i]["ids"] for i in (0, 1, 3, 4)]
longest = max(map(len, chosen))
ids = torch.tensor([[end_of_text] * (longest - len(row)) + row for row in chosen])
mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in chosen])


def generate():
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW)[:, longest:]
    rows = []
    for row in out.tolist():
        ends = [i for i, token in enumerate(row) if token in eos]
        rows.append(row[:ends[0] + 1] if ends else row)
    return rows


for seed in range(200):
    with torch.no_grad():
        torch.manual_seed(seed)
        model.model.embed_tokens.weight[im_end] = torch.randn(32) * 0.8
        greedy = generate()
    lengths = [len(row) for row in greedy]
    if sum(row[-1] in eos for row in greedy) == 2 and len(set(lengths)) >= 3 and min(lengths) > 1:
        break
else:
    raise SystemExit("no seed gives completions of three lengths; widen the search")
for prompt, row in zip(chosen, greedy):
    logits = model(input_ids=torch.tensor([prompt + row])).logits[0]
    for step in range(len(row)):
        best = torch.topk(logits[len(prompt) - 1 + step], 2).values
        assert best[0] - best[1] > 1e-3, "a tie would make the continuation ambiguous; change the seed"

# Log-probs and entropies of given completions, right-padded in one batch.
given = [greedy[0], [im_end], greedy[2], tokenizer("the quick fox é🙂")["input_ids"] + [im_end]]
rows = [prompt + row for prompt, row in zip(chosen, given)]
longest = max(map(len, rows))
batch = torch.tensor([row + [end_of_text] * (longest - len(row)) for row in rows])
mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
scored = []
with torch.no_grad():
    law = torch.log_softmax(model(input_ids=batch, attention_mask=mask).logits / TEMPERATURE, -1)
for r, (prompt, row) in enumerate(zip(chosen, given)):
    at = law[r, len(prompt) - 1:len(prompt) - 1 + len(row)]
    scored.append({
        "ids": row, "log_probs": [at[t, token].item() for t, token in enumerate(row)],
        "entropies": (-(at.exp() * at).sum(-1)).tolist(), "text": tokenizer.decode(row, skip_special_tokens=True),
    })

folder = HERE / "text_lm"
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
values = {
    "versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "rendered": rendered,
    "template": TEMPLATE, "generated_from": [0, 1, 3, 4], "max_new_tokens": MAX_NEW, "greedy": greedy,
    "greedy_text": [tokenizer.decode(row, skip_special_tokens=True) for row in greedy],
    "temperature": TEMPERATURE, "scored": scored, "eos": eos,
}
(HERE / "text_lm.json").write_text(json.dumps(values, ensure_ascii=False) + "\n")
print(lengths, seed, versions := values["versions"])
