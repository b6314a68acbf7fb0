"""The line protocol by which a bench speaks to a peer; benches/peer/contender.rs is its other end.

A peer says `ready`, answers each `go` with {"seconds": s, "value": [numbers to compare]}, and `end` with its peak memory.
"""
import json
import os
import sys
import warnings


class Channel:
    """The bench's ear. What else is written to standard output goes to standard error, where it can break no answer."""

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w")
        self.notes = {}
        os.dup2(2, 1)

    def imported(self):
        """Notes how much of the peak is the libraries', before there is a model."""
        self.notes["libraries_bytes"] = peak_bytes()

    def say(self, text):
        print(text, file=self.answers, flush=True)

    def wait(self):
        """Whether another lap is wanted; the peak is told where none is."""
        if sys.stdin.readline().strip() == "go":
            return True
        self.say(json.dumps({"peak_bytes": peak_bytes(), "notes": self.notes}))
        return False

    def lap(self, seconds, value):
        self.say(json.dumps({"seconds": seconds, "value": value}))


def peak_bytes():
    """The most memory that the process has held, loading included."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def quiet():
    """Nothing is fetched, and nothing is told that no number of the bench hangs on."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
