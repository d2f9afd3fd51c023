"""P1: one script, four launchers, the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHERS = ("python", "torchrun", "accelerate", "samestep")

pytestmark = pytest.mark.processes
RECIPE_FOLDER = Path(__file__).parents[2] / "scripts" / "recipes"
RECIPES = {
    "seed_linear.py": ("--epochs", "1"),
    "digits_cnn.py": ("--epochs", "1"),
    "char_lm.py": ("--max-steps", "12"),
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "recipe",
    ["seed_linear.py", *(pytest.param(name, marks=pytest.mark.slow) for name in ("digits_cnn.py", "char_lm.py"))],
)
def test_four_launchers_end_in_the_same_weights(start, recipe):
    outcomes = {}
    for launcher in LAUNCHERS:
        world_size = 1 if launcher == "python" else 2
        outcome = start(launcher, world_size, recipe, "--shards", "2", *RECIPES[recipe], run_dir=launcher)
        (started,) = outcome.of("run_started")
        assert started["world_size"] == world_size
        assert [rank["rank"] for rank in started["ranks"]] == list(range(world_size))
        outcomes[launcher] = outcome
    assert len({outcome.digest for outcome in outcomes.values()}) == 1
    assert len({tuple(outcome.losses) for outcome in outcomes.values()}) == 1


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_accelerate_that_starts_fewer_processes_than_asked_is_named(tmp_path):
    argv: list[str | Path] = [
        Path(sys.executable).parent / "accelerate",
        "launch",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    argv += ["--mixed_precision", "no", "--dynamo_backend", "no", RECIPE_FOLDER / "seed_linear.py", "--max-steps", "1"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    done = subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "accelerate launch was asked for 2 processes, but started this one alone" in done.stderr
