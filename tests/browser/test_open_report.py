"""Proves that open_report.py can fail: breaks example.html in one way at a time and expects these faults, and no other.

Run: python test_open_report.py beside open_report.py and example.html, with what open_report.py needs.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import open_report

HERE = Path(__file__).parent
EXAMPLE = (HERE / "example.html").read_text()
AWAY = "https://example.com/a"
SRC = r'src="data:[^"]*"'
LINE = r"<polyline[^>]*/>"
BOX = 'viewBox="0 0 360 200"'
WORD = '<text x="52" y="18">reward</text>'
# A place for something more, in body text and at the end.
BODY = "<p>The reward"
END = "</main>"


def script(code):
    return f"</main><script>{code}</script>"


# What is broken: at which width, the pattern, what takes its place, and how the faults begin that must be told.
BREAKAGES = {
    "an image that is a file": ("phone", SRC, 'src="a.png"', ["request", "console", "image: <img#drawn>"]),
    "an image elsewhere": ("phone", SRC, f'src="{AWAY}"', ["request", "console", "image: <img#drawn>"]),
    "a style elsewhere": ("phone", "<style>", f'<link rel="stylesheet" href="{AWAY}"><style>', ["request", "console"]),
    "a font elsewhere": (
        "phone",
        "<style>",
        f"<style>@font-face {{ font-family: a; src: url({AWAY}) }} h1 {{ font-family: a }}",
        ["request", "console"],
    ),
    "a request by a script": ("phone", END, script(f"fetch('{AWAY}').catch(() => 0)"), ["request", "console"]),
    "a request on scrolling": (
        "phone",
        END,
        '<div style="height: 3000px"></div>'
        + script(f"onscroll = () => scrollY > 900 && fetch('{AWAY}').catch(() => 0)"),
        ["request", "console"],
    ),
    "a missing icon": ("phone", "<style>", '<link rel="icon" href="a.ico"><style>', ["request", "console: .*a.ico"]),
    "a warning": ("phone", END, script("console.warn('late')"), ["console: warning: late"]),
    "an error of a script": ("phone", END, script("nothing()"), ["script: nothing is not defined"]),
    "a broken data URI": ("phone", "base64,.{40}", "base64,AAAA", ["image: <img#drawn> .* did not load"]),
    "an image without source": ("phone", SRC, "", ["image: <img#drawn> .* did not load"]),
    "an image without alt": ("phone", 'alt="[^"]*"', 'alt=" "', ["image: <img#drawn> .* has no alt"]),
    "a missing image": ("phone", "<img[^>]*>", "", ["count: <main> states data-images=1, found 0"]),
    "a missing chart": ("phone", "(?s)<svg.*</svg>", "", ["count: <main> states data-charts=1, found 0"]),
    "a wrong count": ("phone", 'data-images="1"', 'data-images="2"', ["count: <main> states data-images=2, found 1"]),
    "no count": ("phone", 'data-charts="1"', "", ["count: <main> states data-charts=null, found 1"]),
    "no chart, as stated": (
        "phone",
        '(?s)"1"( .*) class="chart"',
        r'"0"\1',
        ["count: <main> states data-charts=0, found 0"],
    ),
    "an empty chart": ("phone", LINE, "", ["chart: <svg> .* draws no mark"]),
    "a line without points": ("phone", 'points="[^"]*"', "", ["chart: <svg> .* draws no mark"]),
    "a line without colour": ("phone", 'stroke="#1f6feb"', "", ["chart: <svg> .* draws no mark"]),
    "a line of NaN": ("phone", 'points="', 'points="NaN,', ["console: error", "chart: <svg> .* draws no mark"]),
    "a chart without title": ("phone", "<title>Reward.*?</title>", "", ["chart: <svg> .* neither <title>"]),
    "a chart that is too low": ("phone", BOX, 'viewBox="0 0 360 90"', ["chart: <svg> .* is 358 x 90 px", "cut text"]),
    "a chart that is too narrow": (
        "phone",
        BOX,
        f'style="width: 190px" {BOX}',
        ["chart: <svg> .* is 190 x 106 px", "small text: <text> .* is 6.3 px"],
    ),
    "too wide a box": ("phone", END, f'<div id="a" style="width: 376px">a</div>{END}', ["width: <div#a> .* 392 px"]),
    "too wide an image": ("desktop", 'width="64"', 'width="1500"', ["width: <img#drawn>"]),
    "no viewport for a phone": ("phone", '<meta name="viewport".*?>', "", ["width: .* 980 px wide"]),
    "tiny text": ("phone", "<h1>", '<h1 style="font-size: 8.9px">', ["small text: <h1> .* is 8.9 px, at least 9"]),
    "tiny text in closed details": (
        "phone",
        "<figure><img",
        '<small style="font-size: 8px">a</small>\\g<0>',
        ["small"],
    ),
    "small body text": ("phone", "<p>", '<p style="font-size: 13px">', ["small text: <p> .* 13.0 px, at least 14"]),
    "text that a transform shrinks": ("phone", "<p>", '<p style="scale: 0.5">', ["small text: <p> .* is 8.0 px"]),
    "text that a chart shrinks": ("phone", 'font-size="12"', 'font-size="8"', ["small text: <text> .* is 8.0 px"]),
    "text that a group shrinks": (
        "phone",
        WORD,
        f'<g transform="scale(0.5)">{WORD}</g>',
        ['small text: <text> "reward" in #reward is 6.0 px'],
    ),
    "text past the side": ("phone", '"end"', '"start"', ['cut text: <text> "10 steps" in #reward .* past the right']),
    "text past the top": ("phone", 'y="18"', 'y="6"', ['cut text: <text> "reward" .* past the top']),
}
# What must pass, or authors would have to work around the test.
ALLOWED = {
    "a chart that scrolls in its figure": ("phone", BOX, f'{BOX} style="width: 900px"', []),
    "small type in an enlarged chart": ("desktop", 'font-size="12"', 'font-size="8"', []),
    "a lazy image far aside in its scroller": (
        "phone",
        "<figure><img",
        '<figure class="wide" style="white-space: nowrap"><i style="padding-left: 20000px"></i><img',
        [],
    ),
    "a footnote's mark": ("phone", BODY, f'<p><sup style="font-size: 10px">1</sup></p>{BODY}', []),
    "text that is not shown": ("phone", BODY, f'<p hidden style="font-size: 1px">a</p>{BODY}', []),
    "text that is invisible": ("phone", "<p>", '<p style="visibility: hidden; font-size: 1px">', []),
    "a data URI in a style": ("phone", "<h1>", '<h1 style="background: url(data:image/svg+xml,%3Csvg/%3E)">', []),
    "a link elsewhere": ("phone", BODY, f'<p><a href="{AWAY}">elsewhere</a></p>{BODY}', []),
}


def check(browser, folder, what, width, pattern, new, expected):
    """Tells what was noticed, and returns whether that was all of `expected` and nothing else."""
    report = folder / "broken.html"
    broken = re.sub(pattern, new, EXAMPLE, count=1)
    assert broken != EXAMPLE, f"nothing to break: {pattern}"
    report.write_text(broken)
    faults = open_report.examine(browser, report, width)["faults"]
    missed = [start for start in expected if not any(re.match(start, fault) for fault in faults)]
    other = [fault for fault in faults if not any(re.match(start, fault) for start in expected)]
    print(f"{what}: {faults[0] if faults else 'no fault'}")
    for line in [f"missed: {start}" for start in missed] + [f"unexpected: {fault}" for fault in other]:
        print(f"  {line}", file=sys.stderr)
    return not missed and not other


def exit_code(report, out):
    command = [sys.executable, HERE / "open_report.py", report, out]
    return subprocess.run(command, capture_output=True).returncode


with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    with open_report.chromium() as browser:
        cases = BREAKAGES | ALLOWED
        wrong = [what for what, case in cases.items() if not check(browser, folder, what, *case)]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(cases)} cases went wrong: {', '.join(wrong)}")
    assert exit_code(HERE / "example.html", folder) == 0, "the example fails"
    (folder / "broken.html").write_text(EXAMPLE.replace('data-images="1"', 'data-images="2"'))
    assert exit_code(folder / "broken.html", folder) == 1, "a broken page passes"
    pictures = sorted(file.name for file in folder.glob("*.png") if file.stat().st_size > 0)
    assert pictures == ["desktop-top.png", "desktop.png", "phone-top.png", "phone.png"], pictures
print(f"{len(BREAKAGES)} breakages noticed, {len(ALLOWED)} pages allowed")
