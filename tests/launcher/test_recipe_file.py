"""Which programs are recipes: known from their text, and from that of files beside them, without running any."""

from __future__ import annotations

import py_compile
import zipfile
from pathlib import Path

import pytest

from samestep.launcher.command_line.argv import Kind, Recipe
from samestep.launcher.recipe_file import trains

TRAINS = "from samestep.train import train\n"
FILES: dict[str, tuple[dict[str, str], bool]] = {
    "itself": ({"main.py": TRAINS}, True),
    "the package alone": ({"main.py": "import torch\nimport samestep.train\n"}, True),
    "nothing of ours": ({"main.py": "import torch\n"}, False),
    "a file beside it": ({"main.py": "import os, lib\n", "lib.py": TRAINS}, True),
    "a file beside that": ({"main.py": "import lib\n", "lib.py": "from more import run\n", "more.py": TRAINS}, True),
    "a package": (
        {"main.py": "from jobs.digits import main\n", "jobs/__init__.py": "", "jobs/digits.py": TRAINS},
        True,
    ),
    "a module of a package": ({"main.py": "from jobs import digits\n", "jobs/digits.py": TRAINS}, True),
    "inside the package": (
        {
            "main.py": "import jobs\n",
            "jobs/__init__.py": "from .a import b\n",
            "jobs/a.py": "from jobs import c",
            "jobs/c.py": TRAINS,
        },
        True,
    ),
    "a file that is not imported": ({"main.py": "import torch\n", "lib.py": TRAINS}, False),
    "each other": ({"main.py": "import a\n", "a.py": "import b\n", "b.py": "import a\n"}, False),
    "what is no Python": ({"main.py": "import lib\ndef\n", "lib.py": TRAINS}, False),
}


@pytest.mark.parametrize(("text", "expected"), [(TRAINS, True), ("import torch\n", False)])
@pytest.mark.parametrize("compression", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_recipe_that_is_compiled_or_an_archive_is_known_too(tmp_path, text, expected, compression):
    source, path = tmp_path / "main.py", tmp_path / "main.app"
    source.write_text(text)
    if compression is None:
        py_compile.compile(str(source), str(path))
    else:
        path.write_bytes(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(path, "a", compression) as archive:
            archive.write(source, "__main__.py")
    assert trains(Recipe(str(path))) == expected


@pytest.mark.parametrize("content", [b"\0", b"PK\x03\x04\0broken", b"\x7fELF\0"])
def test_what_is_neither_is_no_recipe(tmp_path, content):
    (tmp_path / "main.app").write_bytes(content)
    assert not trains(Recipe(str(tmp_path / "main.app")))


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("name", FILES)
def test_a_program_that_trains_through_other_files_is_a_recipe(tmp_path: Path, name: str) -> None:
    files, expected = FILES[name]
    write(tmp_path, files)
    assert trains(Recipe(str(tmp_path / "main.py"))) is expected


def test_a_module_finds_its_package_from_where_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"jobs/__init__.py": "", "jobs/__main__.py": "from jobs.lib import main\n", "jobs/lib.py": TRAINS})
    monkeypatch.chdir(tmp_path)
    assert trains(Recipe("jobs", kind=Kind.MODULE))


def test_a_package_that_is_found_elsewhere_is_looked_at_where_it_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, expected in (("src", True), ("venv/site-packages", False)):
        name = f"engine_{place[:3]}"
        write(tmp_path, {f"{place}/{name}/__init__.py": "", f"{place}/{name}/core.py": TRAINS})
        write(tmp_path, {f"scripts/{name}.cli.py": f"from {name}.core import main\n"})
        monkeypatch.syspath_prepend(tmp_path / place)
        assert trains(Recipe(str(tmp_path / "scripts" / f"{name}.cli.py"))) is expected
        write(tmp_path, {f"{place}/{name}/cli.py": f"from {name}.core import main\n"})
        assert trains(Recipe(f"{name}.cli", kind=Kind.MODULE)), "a module's own package is the user's, wherever it is"


def test_a_command_is_none(tmp_path: Path) -> None:
    write(tmp_path, {"main.py": TRAINS})
    assert not trains(Recipe(str(tmp_path / "main.py"), kind=Kind.COMMAND))
