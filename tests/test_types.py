"""Our types reach whoever trains with us, from an environment that ./scripts/install has made."""

from __future__ import annotations

import subprocess
import sys

import pytest

RECIPE = """\
from samestep.launcher.contract import RunDir
from samestep.train import TrainConfig

TrainConfig(epochs="three")
reveal_type(RunDir.events)
"""


@pytest.mark.slow
def test_mypy_finds_our_types_from_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    # torch's own types are no matter here, and take most of a minute
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,accelerate.*]\nfollow_imports = skip\n")
    words = [sys.executable, "-m", "mypy", "--no-incremental", "recipe.py"]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=110).stdout
    assert 'recipe.py:4: error: Argument "epochs" to "TrainConfig" has incompatible type "str"; expected "int"' in said
    assert "def (self: samestep.launcher.contract.RunDir) -> pathlib.Path" in said
