"""A reward in Python, run by ProcessReward: the share of red in an image's light, as in ten_line_reward.rs."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "rewards" / "python"))
from grpo_scorer import serve


def redness(prompt, image, columns):
    red, green, blue = (sum(channel.tobytes()) for channel in image.split())
    return red / max(red + green + blue, 1)


serve(redness, model="redness", version="1")
