"""Follows the guide "Compare two rewards": writes its files, runs its commands at a small size, and looks for the reports.

    python tests/run_guide.py src/docs/compare_two_rewards.md target/debug FOLDER

A block that begins with a comment `# NAME` is the file NAME; every line of a `text` block is a command. Needs Pillow, and
`python3` on the path to be this Python.
"""
import pathlib
import re
import shlex
import subprocess
import sys

guide, programs, folder = map(pathlib.Path, sys.argv[1:])
root = guide.resolve().parents[2]
programs = programs.resolve()
folder.mkdir(parents=True)
for name in ("rewards", "examples"):
    (folder / name).symlink_to(root / name)

# What makes a command small, and nothing else of it another.
SMALL = "--set base.n_steps=2 --set base.rollout.prompts_per_step=2 --set base.log.held_out_every=1"
SMALL += " --set base.held_out.samples_per_prompt=2 --set quick.n_steps=1"
ADDED = {"ablate": SMALL.split()}


def arguments(command):
    words = shlex.split(command)
    if words[0] == "grpo":
        return [programs / "grpo", *words[1:], *ADDED.get(words[1], [])]
    if words[:4] == ["cargo", "run", "--release", "--example"]:
        return [programs / "examples" / words[4], "1"]
    return words


blocks = re.findall(r"```(\w+)\n(.*?)```", guide.read_text(), re.S)
files = {match[1]: text for _, text in blocks if (match := re.match(r"# (\S+)\n", text))}
commands = [line for kind, text in blocks if kind == "text" for line in text.splitlines()]
assert len(files) == 2 and len(commands) == 7, (list(files), commands)
for name, text in files.items():
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
for command in commands:
    print(f"$ {command}", flush=True)
    subprocess.run(arguments(command), cwd=folder, check=True)
reports = sorted(path.parent for path in folder.glob("**/report.html"))
assert len(reports) == 4, reports
for report in reports:
    text = (report / "report.md").read_text()
    assert "## What each arm did" in text and "Runs of one seed begin with the same held-out scores" in text, text[:2000]
