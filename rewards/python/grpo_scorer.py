"""A reward in Python: `serve` answers a run's questions over standard input and output.

    from grpo_scorer import serve

    def score(prompt, image, columns):   # a text, a PIL image (PNG bytes without PIL), the data set's columns
        return 0.5                       # higher is better; an exception fails this sample alone

    serve(score, model="mine", version="1")

A score is a number; None or NaN, a text or a truth value fail their sample. A model that is faster on many pictures
takes lists, `serve(scores, batch=True)`, and returns one score each; an exception then fails all of its pictures.

A detector for GenEval is served by `serve_detector(detect)`: `detect(image)` returns a list of what it found, such as
{"class": "bench", "score": 0.93, "bbox": [10.5, 20, 300, 240]}, with "color" and "mask" where it knows them; an empty
one says that nothing is there, and an exception fails this picture alone.

What is printed goes to standard error: standard output belongs to the protocol (rewards/src/exchange/mod.rs).
"""

import io
import json
import os
import sys

try:
    from PIL import Image
except ImportError:
    Image = None

PROTOCOL = 1


def decode(data):
    return data if Image is None else Image.open(io.BytesIO(data)).convert("RGB")


def read_question(stream):
    """The header and the pictures' bytes, or None at the end of the stream."""
    line = stream.readline()
    if not line:
        return None
    header = json.loads(line)
    if header["protocol"] != PROTOCOL:
        raise ValueError(f"protocol {header['protocol']}; this file speaks {PROTOCOL}: take that of the same grpo")
    pictures = [stream.read(n_bytes) for n_bytes in header["images"]]
    if [len(picture) for picture in pictures] != header["images"]:
        raise ValueError("the pictures are shorter than announced")
    return header, pictures


def attempt(work, *arguments):
    """The result and no error, or no result and the error's text."""
    try:
        return work(*arguments), None
    except Exception as error:
        # A lone surrogate, as in a file name that is no UTF-8, has no JSON; it or a long text would cost the whole answer.
        return None, f"{type(error).__name__}: {error}"[:1000].encode("utf-8", "replace").decode()


def number(score):
    """A score as a float; Python would make one of texts and truth values too, of numpy's and torch's as well."""
    if isinstance(score, (str, bytes, bool)) or str(getattr(score, "dtype", "")).endswith("bool"):
        raise TypeError(f"scored {score!r}; return a number")
    return None if score is None else float(score)


def judge(score, header, pictures, batch):
    """The scores and errors of one question."""
    texts = [prompt["text"] for prompt in header["prompts"]]
    columns = [prompt["columns"] for prompt in header["prompts"]]
    if not batch:
        one = lambda text, data, values: number(score(text, decode(data), values))
        rows = [attempt(one, *row) for row in zip(texts, pictures, columns)]
        return [value for value, _ in rows], [error for _, error in rows]
    values, error = attempt(lambda: list(score(texts, [decode(data) for data in pictures], columns)))
    if error is not None:
        return [None] * len(texts), [error] * len(texts)
    rows = [attempt(number, value) for value in values]
    return [value for value, _ in rows], [error for _, error in rows]


def answer(score, header, pictures, model, version, batch):
    """The answer's JSON as bytes, one line without its end."""
    scores, errors = judge(score, header, pictures, batch)
    return written(header, model, version, errors, scores=scores)


def answer_detections(detect, header, pictures, model, version):
    """Likewise, with what was detected."""
    rows = [attempt(detections, detect, data) for data in pictures]
    return written(header, model, version, [error for _, error in rows], detections=[found for found, _ in rows])


def detections(detect, data):
    """What was found in a picture, if JSON in UTF-8 can hold it."""
    found = list(detect(decode(data)))
    json.dumps(found, ensure_ascii=False).encode()
    return found


def written(header, model, version, errors, **said):
    return json.dumps({"id": header["id"], **said, "errors": errors, "model": model, "version": version}).encode()


def serve(score, model=None, version=None, batch=False):
    """Answers with scores until the run closes standard input."""
    answer_all(lambda header, pictures: answer(score, header, pictures, model, version, batch))


def serve_detector(detect, model=None, version=None):
    """Answers with detections until the evaluation closes standard input."""
    answer_all(lambda header, pictures: answer_detections(detect, header, pictures, model, version))


def answer_all(answered):
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    questions = sys.stdin.buffer
    while (question := read_question(questions)) is not None:
        answers.write(answered(*question) + b"\n")
        answers.flush()
