"""`samestep run --pdb RANK`: one rank has the terminal, the others wait, whoever types types into pdb."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
RECIPE = """
import os
import torch
from torch import nn
from torch.utils.data import TensorDataset
from samestep.train import Components, supervised, train

calls = 0


def loss(model, batch):
    global calls
    calls += 1
    secret = 6 * 7
    if calls == 3 and os.environ["RANK"] == os.environ["BREAK"]:
        breakpoint()
    if calls == 5 and os.environ["RANK"] == os.environ["RAISE"]:
        raise KeyError("label")
    return supervised(nn.MSELoss())(model, batch)


def build(config):
    model = nn.Linear(10, 1)
    data = TensorDataset(torch.arange(960.0).reshape(96, 10) / 960, torch.ones(96, 1))
    return Components(model=model, loss=loss, optimizer=torch.optim.Adam(model.parameters()), train_data=data)


if __name__ == "__main__":
    train(build)
"""
SAMESTEP = [sys.executable, "-m", "samestep.launcher", "run", "--nproc-per-node", "2"]
TRAIN = ["recipe.py", "--run-dir", "run", "--global-batch-size", "16", "--epochs", "2", "--device", "cpu"]


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAMESTEP_", "PET_"))}
    return kept | {"PYTHONWARNINGS": "ignore", "TERM": "dumb", "BREAK": "-", "RAISE": "-"} | more


def piped(folder, typed, *options, **about):
    (folder / "recipe.py").write_text(RECIPE)
    argv = [*SAMESTEP, *options, *TRAIN]
    return subprocess.run(
        argv, cwd=folder, env=environment(**about), input=typed, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("options", [["--pdb", "1"], pytest.param(["--pdb", "1", "--no-warm"], marks=pytest.mark.slow)])
def test_a_breakpoint_of_a_rank_reads_what_is_piped_in_and_the_run_goes_on_to_its_end(options, tmp_path):
    done = piped(tmp_path, "p secret + 1000\nup\nc\n", *options, BREAK="1")
    assert done.returncode == 0, done.stderr
    assert "(Pdb) 1042" in done.stdout
    assert "Pdb" not in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    log = (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    assert "are the terminal's of samestep run --pdb" in log
    assert "Pdb" not in log


@pytest.mark.slow
def test_an_exception_is_looked_at_before_it_ends_the_run(tmp_path):
    typed = "p secret + 1000\nimport pathlib\np sorted(map(str, pathlib.Path('run/errors').glob('rank-*.json')))\nq\n"
    done = piped(tmp_path, typed, "--pdb", "0", RAISE="0")
    assert done.returncode == 1
    assert "(Pdb) 1042" in done.stdout
    assert "(Pdb) []" in done.stdout  # no rank has left a record yet
    assert "samestep: rank 0 failed: KeyError: 'label'" in done.stderr
    assert "restart" not in done.stderr


@pytest.mark.slow
def test_only_the_chosen_rank_is_looked_at(tmp_path):
    done = piped(tmp_path, "p secret + 1000\nq\n", "--pdb", "0", RAISE="1")
    assert done.returncode == 1
    assert "Pdb" not in done.stdout
    assert "samestep: rank 1 failed: KeyError: 'label'" in done.stderr


@pytest.mark.slow
def test_leaving_pdb_ends_the_run_without_asking_a_second_time(tmp_path):
    done = piped(tmp_path, "q\np 'again'\n", "--pdb", "1", BREAK="1")
    assert done.returncode == 1
    assert done.stdout.count("(Pdb)") == 1
    assert "samestep: rank 1 failed: BdbQuit" in done.stderr


class Terminal:
    """A launcher on a terminal of its own, and what can be read there."""

    def __init__(self, folder, *options, **about):
        (folder / "recipe.py").write_text(RECIPE)
        self._ours, self._theirs = pty.openpty()
        self.before = termios.tcgetattr(self._theirs)
        argv = [*SAMESTEP, *options, *TRAIN]
        self.run = subprocess.Popen(
            argv,
            cwd=folder,
            env=environment(TERM="xterm", **about),
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
        )
        self.seen, self._taken = "", 0

    def type(self, words):
        os.write(self._ours, f"{words}\n".encode())

    def until(self, text):
        """Read on until `text` comes."""
        end = time.monotonic() + 60
        while text not in self.seen[self._taken :]:
            assert time.monotonic() < end, self.seen
            if select.select([self._ours], [], [], 1)[0]:
                self.seen += os.read(self._ours, 4096).decode(errors="replace")
        self._taken = self.seen.index(text, self._taken) + len(text)

    @property
    def settings(self):
        return termios.tcgetattr(self._theirs)

    def close(self):
        self.run.kill()
        self.run.wait()
        os.close(self._ours)
        os.close(self._theirs)


@pytest.mark.slow
def test_pdb_works_on_a_terminal(tmp_path):
    with contextlib.closing(Terminal(tmp_path, "--pdb", "0", BREAK="0", RAISE="0")) as terminal:
        for awaited, typed in (
            ("(Pdb) ", "p secret + 1000"),
            ("1042", None),
            ("(Pdb) ", "c"),
            ("raised KeyError: 'label'", None),
            ("(Pdb) ", "p calls * 1000"),
            ("5000", None),
            ("(Pdb) ", "q"),
            ("rank 0 failed: KeyError: 'label'", None),
            ("exit code 1", None),
        ):
            terminal.until(awaited)
            if typed:
                terminal.type(typed)
        assert terminal.run.wait(timeout=60) == 1
        assert "\x1b[2K" not in terminal.seen  # nothing is redrawn over what somebody types


@pytest.mark.slow
def test_a_terminal_is_as_before_when_a_rank_dies_while_another_one_is_at_the_prompt(tmp_path):
    with contextlib.closing(Terminal(tmp_path, "--pdb", "0", BREAK="0")) as terminal:
        terminal.until("(Pdb) ")
        terminal.type("1000 + 42")
        terminal.until("1042")
        terminal.until("(Pdb) ")
        end = time.monotonic() + 60
        while terminal.settings == terminal.before:  # readline has it
            assert time.monotonic() < end
            time.sleep(0.01)
        first = (tmp_path / "run" / "logs" / "rank-1.log").read_text().splitlines()[0]
        os.kill(int(first.partition(", pid ")[2].partition(",")[0]), signal.SIGKILL)
        terminal.until("rank 1 failed: killed by SIGKILL")
        assert terminal.run.wait(timeout=60) == 1
        assert terminal.settings == terminal.before


@pytest.mark.parametrize(("rank", "words"), [("2", "a rank below 2, but is 2"), ("-1", "a rank, from 0, but is -1")])
def test_a_rank_that_is_not_there_is_a_mistake(rank, words, tmp_path):
    done = piped(tmp_path, "", "--pdb", rank)
    assert done.returncode == 2
    assert f"--pdb is expected to be {words}" in done.stderr
    assert not (tmp_path / "run").exists()
