"""P1: one script, four launchers, the same weights."""

import pytest

LAUNCHERS = ("python", "torchrun", "accelerate", "samestep")

pytestmark = pytest.mark.processes
RECIPES = {
    "seed_linear.py": ("--epochs", "1"),
    "digits_cnn.py": ("--epochs", "1"),
    "char_lm.py": ("--max-steps", "12"),
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("recipe", RECIPES)
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
