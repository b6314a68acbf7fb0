"""Golden ids for `clip::Tokenizer`: open_clip's own tokenizer.

    python rewards/tests/golden/clip_tokens.py > rewards/tests/golden/clip_tokens.json

Made with open_clip_torch 3.3.0 (ftfy 6.3.1). Texts that only `ftfy` changes (mojibake, curly quotes) are left out.
"""
import json

import open_clip

CLASSES = ["circle", "square", "triangle", "star", "cross", "ring", "bicycle", "toothbrush"]
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
TEXTS = [f"a photo of a {color} {CLASSES[at % 8]}" for at, color in enumerate(COLORS)]
TEXTS += [f"a photo of {count} {name}s" for count, name in zip(("two", "three", "four", "five"), CLASSES)]
TEXTS += [f"a photo of a {a} {relation} a {b}" for a, relation, b in (
    ("dog", "left of", "bench"), ("cup", "right of", "knife"), ("cat", "above", "car"), ("tie", "below", "kite"))]
TEXTS += [
    "", " ", "a", "A PHOTO OF A CAT", "  spaces   and\ttabs\nand lines  ", "it's, that's, we've, I'll, you'd, they're, I'm",
    "don't can't won't", "rock 'n' roll", "100 apples", "3.14159", "1,234,567 stars", "50% off!!!", "a-b_c/d\\e",
    "e-mail: someone@example.org", "https://example.org/a?b=c&d=e", "&lt;b&gt;bold&lt;/b&gt;", "fish &amp; chips",
    "twice &amp;amp; escaped", "&eacute;t&eacute;", "caf\u00e9 na\u00efve \u00fcber stra\u00dfe", "\u00c9COLE \u00c5NGSTR\u00d6M",
    "\u732b\u3068\u72ac", "\u0643\u0644\u0628 \u0648\u0642\u0637\u0629", "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u0440\u0443\u0433",
    "\u03b1\u03b2\u03b3", "\U0001f600\U0001f680\U0001f1e9\U0001f1ea", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "supercalifragilisticexpialidocious", "x" * 300, "word " * 100, "a red circle and " * 30, "!?.,;:" * 20,
    "<start_of_text> hello <end_of_text>", "pneumonoultramicroscopicsilicovolcanoconiosis", "C++ and C# and F#",
    "#hashtag $dollar ^caret *star* ~tilde~ `tick` |bar|", "(a) [b] {c}", "\u00bd \u00b2 \u2460 \u2167", "a\u00a0b\u2003c",
    "oil painting of a fox, in the style of Monet, 4k, highly detailed, trending",
]
tokenizer = open_clip.get_tokenizer("ViT-H-14")
cases = []
for text in TEXTS:
    ids = tokenizer([text])[0].tolist()
    # Padding is zeros and need not be stored.
    assert all(id == 0 for id in ids[max(at for at, id in enumerate(ids) if id) + 1 :])
    cases.append({"text": text, "ids": ids[: max(at for at, id in enumerate(ids) if id) + 1]})
print(json.dumps({"versions": {"open_clip": open_clip.__version__}, "cases": cases}))
