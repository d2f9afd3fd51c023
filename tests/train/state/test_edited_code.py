"""A run that is resumed with other code says in which files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "small.py"
FLAGS = ("--run-dir", "run", "--shards", "1", "--max-steps")
EDITED = "since the last start: the bits of the following steps can differ"


@pytest.fixture
def job(rank_server, tmp_path):
    """`job(steps, *flags)` goes on in one folder, in which its recipe and a module lie."""
    folder = tmp_path / "job"
    (folder / "parts").mkdir(parents=True)
    shutil.copy(RECIPE, folder / "recipe.py")
    (folder / "parts" / "layers.py").write_text("WIDTH = 8\n")
    (folder / "unused.py").write_text("")
    text = (folder / "recipe.py").read_text()
    path = "import sys\nsys.path[:0] = [{!r}, {!r}]\n".format(str(folder), str(folder / "site-packages"))
    (folder / "recipe.py").write_text(text.replace("import torch\n", f"{path}import parts.layers\nimport torch\n", 1))

    def start(steps, *flags, ranks=1):
        ended = rank_server(folder, folder / "recipe.py", *FLAGS, steps, *flags, ranks=ranks)
        assert set(ended.codes) == {0}, ended.stderrs
        return ended

    return folder, start


def warned(ended):
    return [event["text"] for event in ended.events("warning")]


def test_an_edited_recipe_is_named_once_and_the_run_goes_on(job):
    folder, start = job
    start(3)
    text = (folder / "recipe.py").read_text()
    assert "nn.Tanh()" in text
    (folder / "recipe.py").write_text(text.replace("nn.Tanh()", "nn.ReLU()"))
    edited = start(6, ranks=2)
    assert warned(edited) == [f"the recipe's code changed in recipe.py {EDITED}"]
    assert edited.stderrs.count("the recipe's code changed") == 1
    assert [event["step"] for event in edited.events("step")] == [1, 2, 3, 4, 5, 6]
    assert warned(start(7)) == warned(edited)  # that of the second start: the third one's code is the second's


def test_a_module_beside_the_recipe_counts_and_what_is_not_imported_does_not(job):
    folder, start = job
    start(3)
    (folder / "unused.py").write_text("WIDTH = 9\n")
    assert warned(start(4)) == []
    (folder / "parts" / "layers.py").write_text("WIDTH = 9\n")
    assert warned(start(5)) == [f"the recipe's code changed in parts/layers.py {EDITED}"]


def test_what_is_installed_below_the_recipe_does_not_count(job):
    folder, start = job
    (folder / "site-packages").mkdir()
    (folder / "parts").rename(folder / "site-packages" / "parts")
    start(3)
    (folder / "site-packages" / "parts" / "layers.py").write_text("WIDTH = 9\n")
    assert warned(start(4)) == []
