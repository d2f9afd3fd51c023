"""Stdin, stdout and stderr may be closed, full, or a pipe whose reader has left."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = shlex.quote(sys.executable)
SAMESTEP = f"{PYTHON} -m samestep.launcher"
RECIPE = Path(__file__).parents[2] / "scripts" / "recipes" / "seed_linear.py"


def shell(samestep, line):
    environ = samestep.environ({"PYTHONIOENCODING": "utf-8:strict"})  # as where LANG is en_US.UTF-8
    return subprocess.run(
        ["bash", "-c", line],
        cwd=samestep.cwd,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        errors="replace",
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_descriptor_is_no_bug_and_ranks_run(closed, samestep):
    (samestep.cwd / "r.py").write_text(
        "import os, sys\nprint('said')\nopen('done', 'w').write(str(sys.stdin.read()))\n"
    )
    ended = shell(samestep, f"{SAMESTEP} run r.py {closed}")
    assert ended.returncode == 0, ended.stderr
    assert (samestep.cwd / "done").exists()
    assert "said" in (samestep.cwd / "runs/r/logs/rank-0.log").read_text()
    assert shell(samestep, f"{SAMESTEP} run --nosuch r.py {closed}").returncode == 2
    assert shell(samestep, f"{SAMESTEP} --help {closed}").returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "PYTHONUNBUFFERED=1 "])
@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--version",
        "run --help",
        "run --print-config",
        "run --dry-run r.py",
        "run --json r.py",
        "completion bash",
    ],
)
def test_a_full_stdout_is_one_sentence_and_exit_code_1(words, unbuffered, samestep):
    (samestep.cwd / "r.py").write_text("")
    ended = shell(samestep, f"{unbuffered}{SAMESTEP} {words} > /dev/full")
    assert ended.returncode == 1
    assert ended.stderr == "error: stdout is expected to take what is written, but: No space left on device\n"


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "run --help",
        "run {recipe} --help",
        pytest.param("run {recipe} --print-config", marks=pytest.mark.slow),
    ],
)
def test_a_reader_who_leaves_is_not_an_error(words, samestep):
    words = words.format(recipe=shlex.quote(str(RECIPE)))
    # read exits without reading on, so that what is written later finds nobody
    ended = shell(samestep, f"{SAMESTEP} {words} | read -r line; echo ${{PIPESTATUS[0]}}")
    assert (ended.stdout, ended.stderr) == ("0\n", "")


@pytest.mark.parametrize("word", ["--help", pytest.param("--print-config", marks=pytest.mark.slow)])
def test_a_recipe_whose_reader_leaves_its_pages_ends_with_0(word, samestep):
    ended = shell(samestep, f"{PYTHON} {shlex.quote(str(RECIPE))} {word} | true; echo ${{PIPESTATUS[0]}}")
    assert (ended.stdout, ended.stderr) == ("0\n", "")


def test_a_run_directory_whose_name_is_not_utf_8_has_a_report(samestep, made):
    made.run(samestep.cwd / "run", made.events())
    ended = shell(samestep, f"mv run $'r\\xff' && {SAMESTEP} report $'r\\xff' && ls $'r\\xff'/report.html >/dev/null")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.slow
def test_what_an_encoding_lacks_is_printed_as_escapes(samestep):
    (samestep.cwd / "own.py").write_text(
        "from dataclasses import dataclass\nfrom samestep.train import TrainConfig, train\n"
        "@dataclass\nclass Own(TrainConfig):\n    place: str = 'Köln'\n"
        "if __name__ == '__main__':\n    train(lambda config: None, Own)\n"
    )
    ended = shell(samestep, f"PYTHONIOENCODING=ascii:strict {SAMESTEP} run own.py --help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert r"K\xf6ln" in ended.stdout


@pytest.mark.parametrize("columns", [0, 1, 20])
def test_a_terminal_without_a_width_gets_a_page_of_help(samestep, columns):
    assert shell(samestep, f"COLUMNS={columns} {SAMESTEP} run --help").stdout.count("--nproc-per-node") == 1
