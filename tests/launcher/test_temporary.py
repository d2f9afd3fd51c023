"""Folders of processes that live stay, those of dead ones go, and nobody else's is touched."""

import os
import subprocess
import sys

from samestep.launcher import temporary


def test_a_folder_lives_as_long_as_its_process(tmp_path):
    mine = temporary.folder(tmp_path)
    assert mine == temporary.folder(tmp_path)
    code = "import sys; from pathlib import Path; from samestep.launcher.temporary import folder; "
    code += "print(folder(Path(sys.argv[1])))"
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    theirs = tmp_path / shown.stdout.strip()
    (theirs / "listener-x").write_text("")
    (tmp_path / "samestep-somebody").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    linked = mine.with_name(mine.name.rpartition("-")[0] + "-7")
    linked.symlink_to(other)
    temporary.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, "samestep-somebody", "other", linked.name}


def test_a_number_that_is_used_again_is_another_process(tmp_path):
    mine = temporary.folder(tmp_path)
    mine.rename(mine.with_name(mine.name + "1"))  # as left by an earlier process of our number
    temporary.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert os.getpid()


def test_a_folder_that_somebody_else_put_there_is_not_used(tmp_path):
    mine = temporary.folder(tmp_path)
    mine.rmdir()
    mine.symlink_to(tmp_path)
    assert temporary.folder(tmp_path) is None


FULL = """
import resource, sys
from pathlib import Path
from samestep.launcher.temporary import folder
resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
print(folder(Path(sys.argv[1])))
"""


def test_a_process_out_of_descriptors_makes_no_folder_that_nobody_could_tell_from_that_of_a_living_one(tmp_path):
    shown = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert shown.stdout == "None\n"
    assert list(tmp_path.iterdir()) == []
