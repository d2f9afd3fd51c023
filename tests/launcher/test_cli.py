"""The command itself: fast, without torch, and honest about its own bugs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest

from samestep.launcher import cli


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"], ["digest", "--help"]])
def test_help_is_printed_to_stdout(words, samestep):
    ended = samestep(*words)
    assert (ended.code, ended.stderr) == (0, "")
    assert "samestep" in ended.stdout


@pytest.mark.parametrize("word", ["digest", "stacks", "completion", "submit"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_a_page_of_its_own(word, flag, samestep):
    ended = samestep(word, flag)
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"usage: samestep {word} ")


@pytest.mark.parametrize("words", ["digest", "digest --json", "stacks", "report", "watch --once", "plan"])
def test_behind_two_dashes_a_run_directory_may_begin_with_a_dash(words, samestep):
    refused = samestep(*words.split(), "--", "-nosuch")
    assert (refused.code, "unknown option" in refused.stderr) == (2, False)
    assert "-nosuch" in refused.stderr.splitlines()[0]


def test_behind_two_dashes_no_word_is_a_flag(samestep, tmp_path):
    assert "but got 2 words" in samestep("digest", "--", "run", "--json").stderr
    assert "but got 0 words" in samestep("stacks", "--").stderr


def test_help_of_run_lists_every_option_with_its_other_names(samestep):
    shown = samestep("run", "--help").stdout
    for flag in ("--nproc-per-node", "--num-processes", "--main-process-port", "--max-restarts", "--dry-run", "-m"):
        assert flag in shown


@pytest.mark.alone
def test_help_takes_a_quarter_of_a_second_at_most():
    def seconds():
        since = time.monotonic()
        subprocess.run([sys.executable, "-m", "samestep.launcher", "--help"], check=True, capture_output=True)
        return time.monotonic() - since

    assert min(seconds() for _ in range(3)) < 0.25


def test_launcher_never_imports_torch_or_numpy():
    code = (
        "import sys, json; from samestep.launcher import cli, launch; "
        "print(json.dumps([name for name in ('torch', 'numpy', 'accelerate', 'rich') if name in sys.modules]))"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert [name for name in json.loads(shown.stdout) if name != "rich"] == []


def test_bug_of_ours_is_called_one(monkeypatch, capsys):
    def broken(_argv):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(cli, "_run", broken)
    assert cli.run(["run", "x.py"]) == 70
    printed = capsys.readouterr().err
    assert "RuntimeError: unforeseen" in printed
    assert "this is a bug of samestep" in printed.splitlines()[-1]


def test_digest_prints_64_hex_characters(samestep):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = samestep.cwd / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    ended = samestep("digest", path)
    assert (ended.code, ended.stderr) == (0, "")
    assert len(ended.stdout.strip()) == 64
    assert set(ended.stdout.strip()) <= set("0123456789abcdef")


def test_digest_as_json(samestep):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (samestep.cwd / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    plain = samestep("digest", "w.safetensors").stdout.strip()
    assert json.loads(samestep("digest", "--json", "w.safetensors").stdout) == {
        "path": "w.safetensors",
        "digest": plain,
    }


@pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("1", False)])
def test_colours_on_a_terminal_only_without_no_color(no_color, coloured):
    code = "import pty, sys; sys.exit(pty.spawn([sys.executable, '-m', 'samestep.launcher', 'run', '--help']) >> 8)"
    environ = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    environ |= {"TERM": "xterm-256color"} | ({"NO_COLOR": no_color} if no_color else {})
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, stdin=subprocess.DEVNULL, check=True, timeout=60
    )
    assert b"--nproc-per-node" in shown.stdout
    assert (re.search(rb"\x1b\[[0-9;]*3[0-9]m", shown.stdout) is not None) == coloured


LEAVING = """
import atexit, os, signal, sys
from samestep.launcher import cli
atexit.register(lambda: [os.kill(os.getpid(), signum) for signum in (15, 2, 1, 10, 3)])
sys.argv = ["samestep", "--version"]
cli.main()
"""


def test_who_is_about_to_leave_keeps_its_exit_code_whatever_signal_comes():
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
