"""Opens a report that is one HTML file as its reader does, without a network, at desktop and at phone width.

Run: python open_report.py REPORT.html OUT [--phone-only] with playwright (1.65.2) installed beside this Python and
`chromium` on the path. Fails, naming the element, where the page asks for another file, complains in the console, has
an image or a chart that shows nothing, scrolls sideways, or has text that is too small or cut. <main> states how many
images (`data-images`) and charts (`data-charts`) there are. Writes OUT/desktop.png, OUT/phone.png and their tops.
"""

import argparse
import contextlib
import re
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTHS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}
# A container's root has no sandbox, and no service of Chromium's is to be asked for anything.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]
TOP_PX = 1800
SHOWN_FAULTS = 20

CHECK = Path(__file__).with_suffix(".js").read_text()


@contextlib.contextmanager
def chromium():
    path = shutil.which("chromium") or sys.exit("no chromium on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


def photograph(page, out, name):
    """The whole page at one pixel a CSS pixel, and its top as sharp as the device shows it."""
    page.screenshot(path=out / f"{name}.png", full_page=True, scale="css")
    top = {"x": 0, "y": 0, "width": page.viewport_size["width"], "height": TOP_PX}
    page.screenshot(path=out / f"{name}-top.png", full_page=True, clip=top)


def complaint(message):
    place = f"{message.location['url'][-60:]}:{message.location['lineNumber'] + 1}"
    return f"console: {message.type}: {message.text[:200]} ({place})"


def examine(browser, report, name, out=None):
    """Counts and faults of the page at one of WIDTHS."""
    url = Path(report).resolve().as_uri()
    context = browser.new_context(offline=True, **WIDTHS[name])
    page = context.new_page()
    seen = []
    own = re.compile(re.escape(url) + "(#.*)?$|data:")
    page.on("request", lambda r: own.match(r.url) or seen.append(f"request: the page asks for {r.url[:120]}"))
    page.on("console", lambda m: m.type in ("error", "warning") and seen.append(complaint(m)))
    page.on("pageerror", lambda error: seen.append(f"script: {error}"))
    page.goto(url)
    found = page.evaluate(CHECK, WIDTHS[name]["viewport"]["width"])
    if out:
        photograph(page, out, name)
    context.close()
    return found | {"faults": seen + found["faults"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--phone-only", action="store_true")
    args = parser.parse_args()
    if not args.report.is_file():
        parser.error(f"{args.report} is no file")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = False
    with chromium() as browser:
        for name in ["phone"] if args.phone_only else WIDTHS:
            found = examine(browser, args.report, name, args.out)
            faults = found["faults"]
            failed |= bool(faults)
            verdict = f"{len(faults)} faults" if faults else "no request, no fault"
            print(f"{name}: {found['images']} images, {found['charts']} charts, {verdict}")
            for fault in faults[:SHOWN_FAULTS]:
                print(f"  {name}: {fault}", file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
