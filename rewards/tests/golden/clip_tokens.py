"""Golden ids for `clip::Tokenizer`: open_clip's own tokenizer on plain and on hard texts.

    python rewards/tests/golden/clip_tokens.py > rewards/tests/golden/clip_tokens.json

Made with open_clip_torch 3.3.0 and ftfy 6.3.1. The first texts' ids are stored whole, without their padding of zeros; of the
others a checksum of all 77 as little-endian 16-bit numbers.
"""
import json
import random
import zlib

import ftfy
import numpy as np
import open_clip

N_WHOLE = 60
N_MIXED = 900

CLASSES = ["circle", "square", "triangle", "star", "cross", "ring", "bicycle", "toothbrush"]
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
PLAIN = [f"a photo of a {color} {CLASSES[at % 8]}" for at, color in enumerate(COLORS)]
PLAIN += [f"a photo of {count} {name}s" for count, name in zip(("two", "three", "four", "five"), CLASSES)]
PLAIN += [f"a photo of a {a} {relation} a {b}" for a, relation, b in (
    ("dog", "left of", "bench"), ("cup", "right of", "knife"), ("cat", "above", "car"), ("tie", "below", "kite"))]
PLAIN += [
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
    "\u201ccurly\u201d \u2018quotes\u2019 \u00abguillemets\u00bb", "\ufb01sh \ufb02ower o\ufb03ce", "full \uff37\uff49\uff44\uff45 width",
]

ACCENTED = ["caf\u00e9", "na\u00efve", "\u00fcber", "se\u00f1or", "\u0142\u00f3d\u017a", "stra\u00dfe", "\u0130stanbul", "\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2",
            "e\u0301t\u0065\u0301", "n\u0303o", "A\u030angstro\u0308m", "Vi\u1ec7t Nam", "Tr\u1eaf\u006eg", "\u01c4ungla", "\u1e9e", "\u017ft"]
SCRIPTS = ["\u732b\u3068\u72ac", "\u7ea2\u8272\u7684\u5706", "\ud55c\uad6d\uc5b4 \uace0\uc591\uc774", "\u0643\u0644\u0628 \u0623\u0628\u064a\u0636", "\u05db\u05dc\u05d1 \u05d7\u05d5\u05dd",
           "\u043a\u043e\u0448\u043a\u0430", "\u0915\u0941\u0924\u094d\u0924\u093e", "\u0e41\u0e21\u0e27", "\u10d9\u10d0\u10e2\u10d0", "\uff76\uff80\uff76\uff85", "\u0561\u057c\u0575\u0578\u0582\u056e", "\u1820\u1821"]
EMOJI = ["\U0001f600", "\u2764\ufe0f", "\U0001f44d\U0001f3fd", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7", "\u26a1", "\u00a9", "\u2122", "\U0001f9d1\u200d\U0001f680"]
ENTITIES = ["&amp;", "&lt;", "&gt;", "&quot;", "&#39;", "&#x27;", "&nbsp;", "&eacute;", "&hellip;", "&mdash;", "&amp;amp;", "&amp;lt;b&amp;gt;",
            "&copy;", "&Eacute;", "&unknown;", "&", "& ", "&#8217;", "&#x1F600;", "AT&T", "R&D;", "&rsquo;", "&frac12;", "&times;"]
CURLY = ["\u2018a\u2019", "\u201cb\u201d", "don\u2019t", "it\u2018s", "\u201elow\u201c", "\u2032", "\u00ab x \u00bb", "\u2026", "\u2013", "\u2014", "\u02bc"]
LIGATURES = ["\ufb01", "\ufb02", "\ufb00ect", "\ufb03ce", "\ufb04", "\ufb06op", "\u0132ssel", "\u01c6"]
WIDE = ["\uff21\uff22\uff23", "\uff11\uff12", "\uff01", "\u3000", "\uff5e", "\uff0f", "\uffe5"]
SPACES = ["\t", "\n", "\r\n", "\u00a0", "\u2003", "\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\u200b", "\ufeff", "\u202f", "\u205f", "\u1680"]
CONTROLS = ["\x00", "\x01", "\x08", "\x1b[31mred\x1b[0m", "\x1b", "\x7f", "\x1f", "\ufff9", "\u206a", "\U000e0001", "\x80", "\x85", "\x9c", "\u200e", "\u202a"]
NUMBERS = ["3.14", "1,000", "\u00bd", "\u00b2", "\u2460", "\u2167", "\u0663", "\u096b", "10%", "#1", "2\u00d72", "1\ufe0f\u20e3"]
SYMBOLS = ["!!!", "?!", "...", "--", "__x__", "a/b", "\\n", "@me", "$5", "~", "`", "^", "|", "<b>", "{}", "[]", "()", "*", "=>", "'", "\"", "''s", "'S", "'LL", "<end_of_text>", "\ufffd"]
UNTERMINATED = ["&amp chips", "&copy 2024", "&#39s", "&#x27t go", "&notit;", "&timesb", "&lt", "caf&eacute au lait", "&ampamp;", "&#8217 ",
                "&AMP", "&Amp;", "&frac12cup", "&hellip more", "&#0;", "&#128;", "&#x110000;", "&#1;", "&#xfdd0;", "&nbspx", "&#x;", "&#;",
                "&NotEqualTilde;", "a &lt b &gt c", "&#99999999999;", "&acE;", "<b> &amp; &copy", "&zwnj;x", "&lang;y&rang;"]
WORDS = ["a", "photo", "of", "red", "Circle", "and", "TWO", "stars", "oil", "painting", "it's", "they'll", "unbelievably", "bokeh", "8k", "o'clock"]
RARE = [chr(point) for point in (0x1, 0x300, 0x345, 0x378, 0x590, 0x0aff, 0x1f19, 0x2126, 0x212b, 0x2c2f, 0xa7c7, 0xab70, 0xe000, 0xfdfa, 0xfe0f, 0xffff, 0x10400, 0x1d400, 0x1e900, 0x2f800, 0x10ffff)]


def garbled(text, draw):
    """Text whose bytes were read in the wrong encoding, once or twice."""
    for _ in range(draw.choice([1, 1, 1, 2])):
        encoding = draw.choice(["latin-1", "windows-1252", "windows-1251", "macroman", "cp437", "iso-8859-2"])
        text = text.encode("utf-8").decode(encoding, errors=draw.choice(["replace", "ignore"]))
    return text


def mixed(draw):
    """A few pieces of several kinds, now and then garbled or very long."""
    kinds = [ACCENTED, SCRIPTS, EMOJI, ENTITIES, CURLY, LIGATURES, WIDE, SPACES, CONTROLS, NUMBERS, SYMBOLS, RARE]
    n_pieces = draw.choice([1, 2, 3, 5, 8, 8, 40])
    chosen = draw.sample(kinds, 3)
    pieces = [draw.choice(draw.choice([WORDS, WORDS, *chosen])) for _ in range(n_pieces)]
    text = draw.choice(["", " ", " ", " "]).join(pieces)
    return garbled(text, draw) if draw.random() < 0.35 else text


def texts():
    draw = random.Random(0)
    every = PLAIN + [piece for kind in (ACCENTED, SCRIPTS, EMOJI, ENTITIES, CURLY, LIGATURES, WIDE, SPACES, CONTROLS, NUMBERS, SYMBOLS, RARE) for piece in kind]
    every += [garbled(f"the {word} is here", draw) for word in ACCENTED + SCRIPTS + EMOJI + CURLY]
    every += [f"{word}{symbol}" for word in WORDS for symbol in draw.sample(SYMBOLS, 4)]
    return list(dict.fromkeys(every + [mixed(draw) for _ in range(N_MIXED)] + UNTERMINATED))


if __name__ == "__main__":
    tokenizer = open_clip.get_tokenizer("ViT-H-14")
    cases = texts()
    ids = tokenizer(cases).numpy()
    assert (ids >= 0).all() and (ids < 2**16).all()
    whole = [np.trim_zeros(row, "b").tolist() for row in ids[:N_WHOLE]]
    checksums = [f"{zlib.adler32(row.astype('<u2').tobytes()):08x}" for row in ids]
    versions = {"open_clip": open_clip.__version__, "ftfy": ftfy.__version__}
    print(json.dumps({"versions": versions, "texts": cases, "ids": whole, "checksums": checksums}))
