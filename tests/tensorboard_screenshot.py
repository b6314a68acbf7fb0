"""Pictures of a folder of runs in TensorBoard, one PNG a tab, taken by a headless Chromium.

Run: python tensorboard_screenshot.py LOGDIR OUT [TAB]... with tensorboard (2.21.0) installed beside this Python and
`chromium` on the path. The tabs are those of TABS where none is named. Fails where a tab has no picture.
"""

import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

TABS = ["timeseries", "custom_scalars", "hparams", "text", "images", "histograms"]
# As wide as five hyper-parameters and five metrics in the table.
SIZE = "2400,1300"
# Virtual time runs as fast as the page allows; waiting requests hold it, so the charts are drawn by its end.
VIRTUAL_MS = 20_000


def wait_for_runs(url):
    """TensorBoard answers before it has read the event files."""
    for _ in range(60):
        if len(urllib.request.urlopen(f"{url}data/runs").read()) > len("[]\n"):
            return
        time.sleep(1)
    sys.exit("tensorboard found no run in a minute")


def picture(url, tab, out):
    # A container's root has no sandbox, and TensorBoard is local. Curves that WebGL draws miss the picture.
    options = ["--headless", "--no-sandbox", "--disable-3d-apis", "--hide-scrollbars", f"--window-size={SIZE}"]
    options += [f"--virtual-time-budget={VIRTUAL_MS}", f"--screenshot={out / tab}.png"]
    with tempfile.TemporaryDirectory() as profile:
        # The curves as they were logged: TIME SERIES reads the first of the two, the other tabs the second.
        page = f"{url}?smoothing=0#{tab}&_smoothingWeight=0"
        command = ["chromium", *options, f"--user-data-dir={profile}", page]
        subprocess.run(command, check=True, timeout=120, stderr=subprocess.DEVNULL)


logdir, out, *tabs = sys.argv[1:]
out = Path(out).resolve()
out.mkdir(parents=True, exist_ok=True)
command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--port", "0"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
try:
    found = next(filter(None, (re.search(r"at (http://\S+)", line) for line in server.stderr)), None)
    assert found, "tensorboard did not start"
    wait_for_runs(found[1])
    for tab in tabs or TABS:
        picture(found[1], tab, out)
        assert (out / f"{tab}.png").stat().st_size > 0, f"no picture of {tab}"
        print(out / f"{tab}.png")
finally:
    server.terminate()
