"""Whether a notebook calls `train`, and whose flags it gets."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

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
