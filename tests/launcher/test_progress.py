"""The progress line: only for people, and never in the way of anybody's words."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

from samestep.launcher.contract import RunDir
from samestep.launcher.supervise.console import Console
from samestep.launcher.supervise.progress import ProgressLine

RECIPE = """
import json, os, sys, time
from pathlib import Path
run_dir = Path(os.environ["SAMESTEP_RUN_DIR"])
(run_dir / "config.json").write_text(json.dumps({"total_steps": 40}))
with (run_dir / "events.jsonl").open("a") as events:
    events.write(json.dumps({"event": "step", "step": 7, "epoch": 1, "loss": 0.5, "samples_per_s": 99.0}) + "\\n")
print("a line", flush=True)
release = Path("release")
while not release.exists():
    time.sleep(0.005)
print("last line", flush=True)
"""


def run_on_terminal(samestep, *options, environ=None):
    """Output of a run on a terminal; the recipe ends once its progress line was seen, if one is expected."""
    (samestep.cwd / "recipe.py").write_text(RECIPE)
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "samestep.launcher", "run", *options, "recipe.py"],
        cwd=samestep.cwd,
        env=samestep.environ({"TERM": "xterm", "COLUMNS": "100"} | (environ or {})),
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    )
    samestep.started.append(process)
    os.close(terminal)
    seen = b""
    while True:
        try:
            data = os.read(screen, 4096)
        except OSError:  # the last writer has gone
            break
        seen += data
        if b"7/40" in seen or "--quiet" in options or (environ or {}).get("TERM") == "dumb":
            (samestep.cwd / "release").touch()
    os.close(screen)
    assert process.wait(timeout=30) == 0
    return seen


def test_people_see_steps_and_no_line_is_torn(samestep):
    seen = run_on_terminal(samestep)
    assert b"step 7/40" in seen
    assert b"loss 0.5" in seen
    after_bar = seen[seen.rindex(b"7/40") :]
    assert b"\r\x1b[2Klast line\r\n" in after_bar
    assert seen.endswith(b"last line\r\n")


def test_dumb_terminal_gets_plain_lines(samestep):
    assert run_on_terminal(samestep, environ={"TERM": "dumb"}) == b"a line\r\nlast line\r\n"


def test_no_color_is_respected(samestep):
    seen = run_on_terminal(samestep, environ={"NO_COLOR": "1"})
    assert b"7/40" in seen
    assert b"\x1b[3" not in seen
    assert b"\x1b[38" not in seen


def test_history_of_an_earlier_run_is_not_progress(tmp_path):
    run_dir = RunDir(tmp_path)
    step = {"event": "step", "step": 3, "epoch": 1, "loss": None, "samples_per_s": 1.0}
    run_dir.events.write_text(json.dumps(step) + "\n")
    line = ProgressLine(run_dir)
    assert line.update() is None
    with run_dir.events.open("a") as events:
        events.write(json.dumps(step | {"step": 4})[:10])
        events.flush()
        assert line.update() is None
        events.write(json.dumps(step | {"step": 4})[10:] + "\nnot json\n")
        events.flush()
        assert "step 4" in (line.update() or "")
        events.write('{"event": "run_finished"}\n')
    assert line.update() is None


def test_words_of_others_begin_at_the_left_edge():
    reader, writer = os.pipe()
    console = Console(stdout=writer, stderr=writer)
    console.write("stderr", b"half")
    console.write_line("stderr", b"whole")
    console.say("message")
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == b"half\nwhole\nmessage\n"
