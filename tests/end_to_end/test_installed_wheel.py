"""The built wheel works from a folder that holds a user's own `train.py` and `launcher/`: neither shadows the other."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]

TRAIN = """
import torch
from launcher import mine
from samestep.train import Components, supervised, train
from torch import nn
from torch.utils.data import TensorDataset

assert mine.NAME == "the user's own"


def build(config):
    x, model = torch.randn(64, 4), nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return Components(model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=data)


if __name__ == "__main__":
    train(build)
"""


def run(*words, cwd):
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder of programs of an environment that has the wheel, and all else from this one."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("launcher", "train"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, source, cwd=place)
    (wheel,) = place.glob("*.whl")
    venv.create(place / "venv", symlinks=True)
    python = place / "venv" / "bin" / "python"
    (site,) = (place / "venv").glob("lib/python*/site-packages")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=place)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_users_names_and_ours_do_not_meet(installed, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "mine.py").write_text('NAME = "the user\'s own"\n')
    run(installed / "samestep", "run", "--nproc-per-node", 2, "train.py", "--run-dir", "a", cwd=tmp_path)
    run(installed / "samestep", "run", "--nproc-per-node", 2, "-m", "train", "--run-dir", "b", cwd=tmp_path)
    run(installed / "python", "train.py", "--shards", 2, "--run-dir", "c", cwd=tmp_path)
    assert len({run(installed / "samestep", "digest", name, cwd=tmp_path) for name in "abc"}) == 1
    assert (tmp_path / "a" / "report.html").exists()  # the page's parts are in the wheel
    where = "import samestep.train, samestep.launcher; print(samestep.train.__file__, samestep.launcher.__file__)"
    for path in run(installed / "python", "-c", where, cwd=tmp_path).split():
        assert Path(path).is_relative_to(installed.parent)


def test_types_are_shipped(installed):
    for package in ("launcher", "train"):
        assert list(installed.parent.glob(f"lib/python*/site-packages/samestep/{package}/py.typed"))
