"""P3 as a tool: struck by seeded faults at every moment, every run ends in the bits of the undisturbed one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from samestep.launcher.chaos.kinds import KINDS, Aim

pytestmark = pytest.mark.processes
RECIPES = Path(__file__).parents[1] / "train" / "recipes"
SAMESTEP = [sys.executable, "-m", "samestep.launcher", "chaos", "--json"]
_QUICK = {Aim.RANK, Aim.ALL_RANKS, Aim.LOADER, Aim.SERVER}
FLAGS = ("--shards", "2", "--num-workers", "1", "--epochs", "4")
# launchers are not started again, which imports torch each time, and nothing has to be found by its silence
QUICK = ",".join(kind.name for kind in KINDS if kind.aim in _QUICK and kind.name != "rank-stop")


def environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAMESTEP", "PET_"))}
    return kept | {"PYTHONWARNINGS": "ignore", "ACCELERATE_USE_CPU": "true"}


def struck(tmp_path, *options, recipe="everything.py", flags=FLAGS, status=0, seconds=170.0):
    words = [*SAMESTEP, *map(str, options), str(RECIPES / recipe), *flags]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=seconds)
    verdict = json.loads(done.stdout) if done.stdout else done.stderr
    assert done.returncode == status, f"{wrong(verdict)}\n{done.stderr[-3000:]}"
    return verdict


def wrong(verdict):
    """Of a verdict with hundreds of faults, what it objects to."""
    if isinstance(verdict, str):
        return verdict
    runs = [run for run in verdict["runs"] if not run["same"] or run["left_behind"]]
    return runs, [fault for fault in hits(verdict) if not fault["survived"]]


def hits(verdict):
    return [fault for fault in verdict["faults"] if fault["hit"]]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("faults", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_faults_are_survived_in_the_same_bits(faults, tmp_path):
    verdict = struck(tmp_path, "--faults", faults, "--per-run", 6, "--seed", 2, "--kinds", QUICK)
    assert verdict["good"]
    assert all(run["same"] and not run["left_behind"] for run in verdict["runs"])
    assert len(hits(verdict)) >= 0.7 * faults  # a data loading process may not be there yet
    assert all(fault["survived"] for fault in hits(verdict))
    assert len({fault["moment"] for fault in hits(verdict)}) >= faults // 4
    assert verdict["recovery_seconds"]["count"] >= faults // 3
    assert verdict["host_growth"]["temporary files"] == 0


@pytest.mark.timeout(60)
def test_a_recipe_that_fails_undisturbed_is_refused(tmp_path):
    (tmp_path / "bad.py").write_text("from samestep.train import train\nimport no_such_module\n")
    assert "ended with exit code 1" in struck(tmp_path, recipe=tmp_path / "bad.py", status=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_hundred_faults_of_every_kind_are_survived_in_the_same_bits(tmp_path):
    verdict = struck(tmp_path, "--faults", 360, "--per-run", 6, "--seed", 7, seconds=3500)
    assert verdict["good"]
    assert len(hits(verdict)) >= 300
    assert len({fault["kind"] for fault in hits(verdict)}) >= 25


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_soak_stays_flat(tmp_path):
    flags = ("--shards", "2", "--num-workers", "1", "--epochs", "60")
    verdict = struck(tmp_path, "--minutes", 3, "--every", 4, "--kinds", QUICK, flags=flags, seconds=850)
    assert verdict["good"]
    assert verdict["host_growth"]["temporary files"] == 0
    assert abs(verdict["host_growth"]["own descriptors"]) <= 1
    assert all(run["growth"].get("launcher descriptors", 0) <= 2 for run in verdict["runs"])
    assert all(run["growth"].get("launcher KiB", 0) < 2_000 for run in verdict["runs"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_comes_out_different_is_told(tmp_path):
    recipe = tmp_path / "drifting.py"
    text = (RECIPES / "small.py").read_text()
    drift = "        if os.environ.get('SAMESTEP_GENERATION', '0') != '0': value = value * 1.5\n"
    recipe.write_text(text.replace('        if FAULT == "raise"', drift + '        if FAULT == "raise"'))
    words = ("--faults", 1, "--kinds", "rank-kill", "--seed", 3)
    verdict = struck(tmp_path, *words, recipe=recipe, flags=("--epochs", "6"), status=1)
    assert not verdict["good"]
    assert "differs" in verdict["runs"][0]["difference"]
