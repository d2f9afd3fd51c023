"""The progress line: only for people, and never in the way of anybody's words."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time

from samestep.launcher.contract import RunDir
from samestep.launcher.supervise.console import Console
from samestep.launcher.supervise.progress import Progress

RECIPE = """
import json, os, sys, time
from pathlib import Path
run_dir = Path(os.environ["SAMESTEP_RUN_DIR"])
(run_dir / "config.json").write_text(json.dumps({"total_steps": 40}))
with (run_dir / "events.jsonl").open("a") as events:
    events.write(json.dumps({"event": "step", "time": time.time(), "step": 7, "epoch": 1, "loss": 0.5}) + "\\n")
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
    after_display = seen[seen.index(b"7/40") :]
    assert b"\r\x1b[2Klast line\r\n" in after_display
    end = after_display[after_display.rindex(b"7/40") :]
    assert re.search(rb"\r\x1b\[2K$|last line\r\n$", end)  # the display is gone, and the cursor where it began


def test_the_display_stays_below_the_words_of_ranks():
    reader, writer = os.pipe()
    console = Console(stdout=writer, stderr=writer)
    console.show_bar(["one", "two"])
    console.write("stdout", b"word\n")
    console.write("stdout", b"half")
    console.write("stdout", b" line\n")
    console.close()
    os.close(writer)
    clear, up = b"\r\x1b[2K", b"\x1b[1A"
    display = clear + b"one\ntwo"
    gone = clear + up + clear
    with os.fdopen(reader, "rb") as file:
        assert file.read() == display + gone + b"word\n" + display + gone + b"half" + b" line\n" + display + gone


def test_dumb_terminal_gets_plain_lines(samestep):
    assert run_on_terminal(samestep, environ={"TERM": "dumb"}) == b"a line\r\nlast line\r\n"


def test_no_color_is_respected(samestep):
    seen = run_on_terminal(samestep, environ={"NO_COLOR": "1"})
    assert b"7/40" in seen
    assert b"\x1b[3" not in seen
    assert b"\x1b[38" not in seen


def test_history_of_an_earlier_run_is_not_progress(tmp_path):
    run_dir = RunDir(tmp_path)
    step = {"event": "step", "time": time.time() - 60, "step": 3, "epoch": 1, "loss": None}
    run_dir.events.write_text(json.dumps(step) + "\n")
    progress = Progress(run_dir)
    assert progress.update() == []
    new = json.dumps(step | {"step": 4, "time": time.time() + 1}) + "\n"
    with run_dir.events.open("a") as events:
        events.write(new[:10])
        events.flush()
        assert progress.update() == []
        events.write(new[10:] + "not json\n")
        events.flush()
        assert "step 4" in progress.update()[0]
        events.write('{"event": "run_finished", "steps": 4, "digest": ""}\n')
    assert progress.update() == []


def test_words_of_others_begin_at_the_left_edge():
    reader, writer = os.pipe()
    console = Console(stdout=writer, stderr=writer)
    console.write("stderr", b"half")
    console.write_line("stderr", b"whole")
    console.say("message")
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == b"half\nwhole\nmessage\n"
