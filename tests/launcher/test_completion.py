"""The completion script, asked as the shell asks it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from samestep.launcher import cli
from samestep.launcher.command_line.completion import SHELLS, application, script

ASK = """
source "$1"; shift
function=$(complete -p samestep | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
"$function" samestep "${!#}" ""
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """`bash(*words)`: what is offered in place of the last word."""
    file = tmp_path_factory.mktemp("completion") / "samestep.bash"
    file.write_text(script("bash"))

    def offer(*words):
        command = ["bash", "--norc", "-c", ASK, "bash", str(file), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=file.parent).stdout.split()

    return offer


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("samestep", "ver"), ["verify"]),
        (("samestep", "run", "--nproc"), ["--nproc-per-node"]),
        (("samestep", "verify", "--world"), ["--world-sizes"]),
        (("samestep", "completion", ""), [*SHELLS]),
        (("samestep", "submit", ""), ["kubernetes", "slurm"]),
        (("samestep", "submit", "slurm", "--ti"), ["--time"]),
        (("samestep", "run", "samestep.b"), ["samestep.bash"]),
        (("samestep", "run", "--nproc-per-node", "2", "samestep.b"), ["samestep.bash"]),
    ],
    ids=" ".join,
)
def test_bash_is_offered(bash, words, offered):
    assert bash(*words) == offered


def test_every_command_is_completed(bash):
    assert set(bash("samestep", "")) == set(cli.commands())
    assert set(cli.commands()) <= set(application())
    assert all(application()[name].help for name in cli.commands())


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shutil.which(shell)])
def test_the_shell_itself_finds_no_mistake_in_the_script(shell, tmp_path):
    (tmp_path / "script").write_text(script(shell))
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


@pytest.mark.parametrize(("word", "hint"), [("fsh", "did you mean fish?"), ("", "~/.bashrc")])
def test_an_unknown_shell_is_a_usage_error(samestep, word, hint):
    ended = samestep("completion", *([word] if word else []))
    assert (ended.code, ended.stdout) == (2, "")
    assert hint in ended.stderr
