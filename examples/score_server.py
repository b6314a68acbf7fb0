"""A reward of Python behind HTTP: put your model into `score`, start this, and name its address in the run.

    python3 examples/score_server.py 8000

A detector for GenEval is served beside it, at /detect: put yours into `detect`.

Standard library only; pictures are PIL images where PIL is installed, else their bytes. The message is that of
rewards/src/exchange/mod.rs, one question a request; rewards/python/grpo_scorer.py reads and answers it.
"""

import io
import struct
import sys
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "rewards" / "python"))
from grpo_scorer import answer, answer_detections, read_question

MAX_REQUEST_BYTES = 256 << 20
MODEL, VERSION = "picture_bytes", "1"  # a run stops where they change: name what decides a score
one_at_a_time = Lock()  # a model on one GPU gains nothing from threads


def score(prompt, image, columns):
    """Higher is better; an exception fails this picture alone. Here: how plain it is, by its bytes when compressed."""
    data = image if isinstance(image, bytes) else image.tobytes()
    return -len(zlib.compress(data)) / 1000


def detect(image):
    """What is in a picture; an empty list says nothing is, an exception fails it. Here: the picture itself."""
    size = struct.unpack(">II", image[16:24]) if isinstance(image, bytes) else image.size  # by a PNG's head
    return [{"class": "picture", "score": 1.0, "bbox": [0, 0, *size]}]


ANSWERS = {
    "/score": lambda header, pictures: answer(score, header, pictures, MODEL, VERSION, batch=False),
    "/detect": lambda header, pictures: answer_detections(detect, header, pictures, MODEL, VERSION),
}


class Handler(BaseHTTPRequestHandler):
    timeout = 60

    def do_POST(self):
        n_bytes = self.headers.get("Content-Length", "")
        if not n_bytes.isdecimal():
            return self.say(411, "text/plain", b"send a Content-Length")
        if int(n_bytes) > MAX_REQUEST_BYTES:
            self.close_connection = True
            return self.say(413, "text/plain", f"{n_bytes} bytes; at most {MAX_REQUEST_BYTES}".encode())
        body = self.rfile.read(int(n_bytes))
        if self.path not in ANSWERS:
            return self.say(404, "text/plain", f"only {' and '.join(ANSWERS)} are served".encode())
        try:
            question = read_question(io.BytesIO(body))
            with one_at_a_time:
                said = ANSWERS[self.path](*question)
        except (KeyError, TypeError, ValueError) as error:
            return self.say(400, "text/plain", f"not a question: {type(error).__name__}: {error}".encode())
        self.say(200, "application/json", said)

    def say(self, status, content_type, body):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8000), Handler)
    print("http://{}:{}/score".format(*server.server_address), flush=True)
    server.serve_forever()
