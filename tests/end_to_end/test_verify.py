"""`samestep verify` says yes only where the bits are equal, and where they part if they are not."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from samestep.launcher.contract import RunDir, UsageError
from samestep.launcher.verify import VerifyConfig, legs_of, plan_rows, table, too_short

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
DEPENDS_ON_RANKS = """
import os, sys
sys.path.insert(0, {recipes!r})
import seed_linear
from samestep.train import train

def build(config):
    components = seed_linear.build(config)
    if os.environ.get("WORLD_SIZE") == "2":
        components.optimizer.param_groups[0]["lr"] *= 2
    return components

train(build, seed_linear.SeedConfig)
"""


def verify(tmp_path, *words):
    argv = [sys.executable, "-m", "samestep.launcher", "verify", *map(str, words)]
    return subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=110)


@pytest.mark.processes
def test_a_recipe_that_keeps_its_bits_is_told_so_in_one_table(tmp_path):
    recipe = RECIPES / "seed_linear.py"
    done = verify(tmp_path, "--world-sizes", "1,2", "--stops", "2,1", recipe, "--global-batch-size", 5000)
    assert done.returncode == 0, done.stderr
    header, one, two, stopped, verdict = done.stdout.splitlines()
    assert header.split()[0] == "ranks"
    assert one.split()[1] == two.split()[1] == stopped.split()[-2]
    assert stopped.startswith("2 -> 1")
    assert verdict == "3 runs at 2 shards: all end in the same bits"
    assert "ranks 2 -> 1: 6 steps ..." in done.stderr, "a recipe that ends before 24 steps is stopped before its end"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.processes
def test_a_folder_with_earlier_runs_is_refused_and_never_judged_again(tmp_path):
    words = ("--world-sizes", "1", "--stops", "", "--steps", 2, "--keep", "kept")
    recipe = tmp_path / "recipe.py"
    recipe.write_text((RECIPES / "seed_linear.py").read_text())
    first = verify(tmp_path, *words, recipe, "--global-batch-size", 50)
    assert first.returncode == 0, first.stderr
    recipe.write_text("from samestep.train import train\nraise RuntimeError('another recipe')\n")
    again = verify(tmp_path, *words, recipe)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: --keep is expected to name a folder without earlier runs, but kept/w1 is")


@pytest.mark.processes
def test_a_recipe_that_depends_on_the_ranks_is_told_the_first_step_and_tensor(tmp_path):
    recipe = tmp_path / "depends.py"
    recipe.write_text(DEPENDS_ON_RANKS.format(recipes=str(RECIPES)))
    done = verify(tmp_path, "--world-sizes", "1,2", "--stops", "", "--steps", 3, "--json", recipe)
    assert done.returncode == 1, done.stderr
    reference, other = json.loads(done.stdout)
    assert reference["difference"] == ""
    assert other["difference"] == "loss of step 2 differs, first tensor bias of model.safetensors"


def test_rows_are_one_a_world_size_and_one_with_stops_at_equal_parts(tmp_path):
    config = VerifyConfig(world_sizes="1,3", stops="4,2,3", steps=24)
    rows = plan_rows(config, tmp_path, 24)
    assert [row.legs for row in rows] == [((1, 24),), ((3, 24),), ((4, 8), (2, 16), (3, 24))]
    assert rows[-1].run_dir == RunDir(tmp_path / "stopped")
    assert (
        len(plan_rows(config, tmp_path, 0))
        == len(plan_rows(VerifyConfig(world_sizes="1,3", stops=""), tmp_path, 9))
        == 2
    )


@pytest.mark.parametrize(
    ("stops", "steps", "legs", "short"),
    [
        ((4, 2, 3), 24, ((4, 8), (2, 16), (3, 24)), ""),
        ((4, 2, 3), 9, ((4, 3), (2, 6), (3, 9)), ""),
        ((4, 2, 3), 8, ((4, 4), (2, 8)), "after 8 steps, and each start needs 3; it was stopped as 4 -> 2"),
        ((4, 2, 3), 6, ((4, 3), (2, 6)), "stopped as 4 -> 2 -> 3: it ends after 6 steps"),
        ((4, 2, 3), 5, (), "after 5 steps, and each start needs 3; it was not stopped"),
        ((2, 1), 1, (), "after 1 step, and each start needs 3; it was not stopped"),
        ((2, 1), 7, ((2, 3), (1, 7)), ""),
        ((2,), 1, ((2, 1),), ""),
        ((2,), 7, ((2, 7),), ""),
        ((), 7, (), ""),
    ],
)
def test_each_start_of_a_stopped_run_has_steps_of_every_kind_or_the_recipe_is_called_too_short(
    stops, steps, legs, short
):
    assert legs_of(stops, steps) == legs
    assert all(end - begin >= 3 for (_, begin), (_, end) in itertools.pairwise(((0, 0), *legs)) if len(legs) > 1)
    assert short in too_short(stops, steps)
    assert bool(short) == bool(too_short(stops, steps))


@pytest.mark.slow
@pytest.mark.processes
def test_a_recipe_that_is_too_short_to_be_stopped_is_told_so(tmp_path):
    recipe = RECIPES / "seed_linear.py"
    done = verify(tmp_path, "--world-sizes", "1", "--stops", "2,1", recipe, "--global-batch-size", 5000, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 runs at 2 shards: all end in the same bits"
    assert "note: the recipe is too short to be stopped as 2 -> 1: it ends after 2 steps" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"world_sizes": "1,two"},
        {"world_sizes": ""},
        {"world_sizes": "²"},
        {"world_sizes": "1,99999"},
        {"world_sizes": "2,2"},
        {"stops": "0"},
        {"steps": 2},
        {"steps": 8},
        {"steps": 0, "stops": ""},
        {"shards": 0},
    ],
)
def test_lists_that_are_no_numbers_of_ranks_are_refused(options):
    with pytest.raises(UsageError, match=r"is expected to .*\nhint: "):
        VerifyConfig(**options)


def test_more_ranks_than_a_machine_starts_are_refused_before_the_first_run(tmp_path):
    done = verify(tmp_path, "--world-sizes", "1,99999", RECIPES / "seed_linear.py")
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        [
            "error: --world-sizes is expected to name at most 4096 ranks, but names 99999",
            "hint: all of them start on this machine: --world-sizes 1,2,4",
        ],
    )


def test_the_table_marks_a_difference():
    results = [{"ranks": "1", "digest": "a" * 64}, {"ranks": "2", "digest": "b" * 64}]
    lines = table(results, {"2": "loss of step 3 differs"}, 2)
    assert lines[1].endswith("reference")
    assert lines[2].endswith("NO: loss of step 3 differs")
    assert lines[-1] == "2 runs at 2 shards: NOT the same bits"
