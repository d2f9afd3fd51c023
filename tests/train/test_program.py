"""Whether a notebook calls `train`, whose flags it gets, and from where the paths in them count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

from samestep.launcher.contract import UsageError, default_run_dir
from samestep.train import program

KERNELS = {  # as they are started, and what sys.argv is there
    "jupyter": (["-m", "ipykernel_launcher", "-f", "kernel.json"], ["/lib/ipykernel_launcher.py", "-f", "kernel.json"]),
    "colab": (
        ["-m", "colab_kernel_launcher", "-f", "kernel.json"],
        ["/lib/colab_kernel_launcher.py", "-f", "kernel.json"],
    ),
    "spyder": (
        ["-m", "spyder_kernels.console", "-f", "kernel.json"],
        ["/lib/console/__main__.py", "-f", "kernel.json"],
    ),
}


@pytest.fixture(params=KERNELS)
def cell(request: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A cell of a kernel: its module."""
    started, argv = KERNELS[request.param]
    module = ModuleType("__main__")
    shell = SimpleNamespace(kernel=object(), user_module=module)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", *started])
    monkeypatch.setattr(sys, "argv", argv)
    return module


def seen() -> tuple[bool, str, list[str]]:
    return program.in_notebook(), program.name(), list(program.arguments(None))


def test_the_flags_of_a_kernel_are_none_of_the_recipes(cell: ModuleType) -> None:
    assert seen() == (True, "notebook", [])
    assert program.arguments(["--epochs", "3"]) == ["--epochs", "3"]


@pytest.mark.parametrize(
    ("session", "editor", "run_dir"),
    [
        ("/home/me/first.ipynb", None, "runs/first"),
        ("work/second.try.ipynb", None, "runs/second.try"),
        ("Console 1", None, "runs/notebook"),
        ("3f0c-jvsc-7e.ipynb", "/home/me/third.ipynb", "runs/third"),
    ],
)
def test_each_notebook_has_a_run_directory_of_its_own(
    cell: ModuleType, monkeypatch: pytest.MonkeyPatch, session: str, editor: str | None, run_dir: str
) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", session)
    if editor is not None:
        cell.__dict__["__vsc_ipynb_file__"] = editor
    assert str(default_run_dir(program.name())) == run_dir


def test_flags_that_a_cell_puts_into_sys_argv_are(cell: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", "--epochs", "3"])
    assert seen() == (True, "recipe", ["--epochs", "3"])


def test_a_script_that_a_cell_runs_has_its_own(cell: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    assert seen() == (True, "recipe.py", [])


def test_ipython_on_a_terminal_is_no_notebook(cell: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = SimpleNamespace(user_module=cell)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--epochs", "3"])
    assert seen() == (False, "recipe.py", ["--epochs", "3"])


@pytest.mark.parametrize("argv", [["--epochs", 3], "--epochs 3", {"epochs": 3}])
def test_flags_that_are_no_words_are_refused(argv: Any) -> None:
    with pytest.raises(UsageError, match="argv is expected to be a list of words") as refused:
        program.arguments(argv)
    assert '["--epochs", "3"]' in str(refused.value)


@pytest.mark.parametrize("word", ["", "-", "-c"])
def test_a_program_without_a_file_has_a_plain_name(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    monkeypatch.setattr(sys, "argv", [word])
    assert program.name() == "run"


GOING = """
import os
os.chdir("elsewhere")
import torch
from torch import nn
from samestep.train import Components, supervised, train

def build(config):
    model = nn.Linear(3, 2)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Components(model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=data)

train(build)
"""
STARTS = {
    "python": [sys.executable, "going.py"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "going.py"],
    "samestep run": [sys.executable, "-m", "samestep.launcher", "run", "going.py"],
    "samestep run, an absolute path": [sys.executable, "-m", "samestep.launcher", "run", "{folder}/going.py"],
    "samestep run, a module": [sys.executable, "-m", "samestep.launcher", "run", "--no-warm", "-m", "going"],
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("start", STARTS)
def test_paths_count_from_where_the_command_was_typed_under_each_launcher(tmp_path: Path, start: str) -> None:
    """A recipe that goes elsewhere as it is imported had a lock in one folder and its checkpoints in the other."""
    from safetensors.torch import save_file

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "going.py").write_text(GOING)
    (tmp_path / "more.toml").write_text("epochs = 2\nweights = 'weights.safetensors'\n")
    save_file(nn.Linear(3, 2).state_dict(), tmp_path / "weights.safetensors")
    words = [word.format(folder=tmp_path) for word in STARTS[start]]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SAMESTEP_")}
    flags = ["--run-dir", "run", "--config", "more.toml", "--device", "cpu"]
    ended = subprocess.run([*words, *flags], cwd=tmp_path, capture_output=True, text=True, env=environ, check=False)
    assert ended.returncode == 0, ended.stderr
    assert not list((tmp_path / "elsewhere").iterdir())
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "run_finished"
    assert sum(event["event"] == "epoch" for event in events) == 2


def test_paths_of_flags_that_code_passes_count_from_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMESTEP_STARTED_IN", "/")
    assert program.folder(["--run-dir", "run"]) == tmp_path
    assert program.folder(None) == Path("/")
