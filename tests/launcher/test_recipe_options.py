"""--help and --print-config of a recipe below `samestep run`: both groups, once, and nothing is started or created."""

from __future__ import annotations

import tomllib

import pytest

from samestep.launcher.command_line import provenance

# Options as a recipe has them, without the seconds that importing torch takes; tests/train/ asks real recipes.
RECIPE = '''
"""Looks like a recipe:
from samestep.train import train
"""
import os, sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from samestep.launcher.contract import UsageError
from samestep.launcher.command_line.options import Option, load

@dataclass
class Base:
    epochs: Annotated[int, Option("total epochs", "epochs")] = 1
    seed: int = 0
    config: Path | None = None

@dataclass
class Own(Base):
    width: Annotated[int, Option("width of the layer", "features")] = 64

try:
    load(Own, sys.argv[1:], os.environ, program="recipe.py")
except UsageError as error:
    sys.exit(print(error, file=sys.stderr) or 2)
print("trained")
'''


@pytest.fixture
def recipe(samestep):
    (samestep.cwd / "recipe.py").write_text(RECIPE)
    return "recipe.py"


@pytest.mark.parametrize(
    "words", [("recipe.py", "--help"), ("recipe.py", "-h"), ("--help", "recipe.py"), ("recipe.py", "--seed", "3", "-h")]
)
def test_help_shows_the_launchers_options_and_the_recipes(samestep, recipe, words):
    ended = samestep("run", "--nproc-per-node", "2", *words)
    assert (ended.code, ended.stderr) == (0, "")
    launcher, recipes = ended.stdout.split("Usage: recipe.py")
    assert launcher.startswith("Usage: samestep run [OPTIONS] recipe.py [RECIPE OPTIONS]\n")
    assert "--nproc-per-node" in launcher
    common, own = recipes.split("Options of this recipe alone")
    assert "--epochs" in common
    assert "[epochs]" in common
    assert "--width" in own
    assert "[features]" in own
    assert "--nproc" not in recipes
    assert sorted(path.name for path in samestep.cwd.iterdir()) == ["recipe.py"], "nothing was created"


def test_print_config_says_where_each_value_came_from(samestep, recipe):
    (samestep.cwd / "run.toml").write_text("seed = 7\nepochs = 9\n")
    ended = samestep(
        *("run", "--num-processes", "2", recipe, "--print-config", "--width=3", "--config", "run.toml"),
        env={"SAMESTEP_EPOCHS": "4", "PET_MAX_RESTARTS": "1"},
    )
    assert (ended.code, ended.stderr) == (0, "")
    lines = {tuple(part.strip() for part in line.rsplit("  # ", 1)) for line in ended.stdout.splitlines()}
    assert {
        ('# nproc-per-node = "2"', "flag --num-processes"),
        ("# max-restarts = 1", "environment"),
        ("# dry-run = false", "default"),
        ("epochs = 4", "environment"),
        ("seed = 7", "run.toml"),
        ("width = 3", "flag --width"),
    } <= lines
    assert tomllib.loads(ended.stdout) == {"epochs": 4, "seed": 7, "width": 3}, "can be read back by --config"


def test_an_option_that_the_recipe_does_not_have_is_named(samestep, recipe):
    ended = samestep("run", recipe, "--print-config", "--widht", "3")
    assert ended.code == 2
    assert "did you mean --width?" in ended.stderr


def test_help_of_a_script_that_is_no_recipe_belongs_to_the_script(samestep):
    (samestep.cwd / "plain.py").write_text("import sys; print(sys.argv[1:])")
    assert samestep("run", "plain.py", "--help").stdout == "['--help']\n"
    assert "--nproc-per-node" in samestep("run", "--help", "plain.py").stdout


VALUES = {
    "text": 'a"b\\c\x7f\n\u00fc\U0001f600',
    "whole": 3,
    "part": 1e-3,
    "yes": True,
    "many": ("a", "b"),
    "inf": float("inf"),
}


def test_printed_values_read_back_equal():
    shown = provenance.render(VALUES | {"nothing": None}, dict.fromkeys([*VALUES, "nothing"], "x"), "title")
    assert tomllib.loads(shown) == VALUES | {"many": ["a", "b"]}
    assert "# nothing = not set" in shown


@pytest.mark.parametrize("no_color", ["", "1"])
def test_help_in_a_pipe_has_no_colours(samestep, no_color):
    ended = samestep("run", "--help", env={"NO_COLOR": no_color} if no_color else {})
    assert b"\x1b" not in ended.out
