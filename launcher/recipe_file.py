"""Does the recipe exist? Asked of files, modules and programs without importing or running any."""

from __future__ import annotations

import ast
import difflib
import re
import shutil
import sys
import warnings
from collections.abc import Collection, Sequence
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path

from samestep.launcher.command_line.argv import Kind, Recipe
from samestep.launcher.contract import UsageError

_TRAINS = re.compile(rb"^[ \t]*(from|import)[ \t]+samestep\b[ \t.\w]*\btrain\b", re.MULTILINE)
_COMPILED = re.compile(rb"samestep\.train")
_MOST_FILES = 100


def trains(recipe: Recipe) -> bool:
    """Whether it imports samestep.train, and so resumes where it was: itself, or through files beside it.

    A look at the text, no more.
    """
    if recipe.kind is Kind.COMMAND:
        return False
    path: str | None = recipe.target
    if recipe.kind is Kind.MODULE:
        spec = _find(recipe.target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = _find(f"{recipe.target}.__main__")
        path = spec.origin if spec is not None else None
    own = recipe.target.partition(".")[0] if recipe.kind is Kind.MODULE else ""
    root = Path.cwd() if recipe.kind is Kind.MODULE else Path(recipe.target).parent
    coming, seen = [Path(path)] if path is not None else [], set[Path]()
    while coming and len(seen) < _MOST_FILES:
        file = coming.pop(0)
        if file in seen or (text := _text(file)) is None:
            continue
        if any(map(_TRAINS.search, _texts(text))):
            return True
        seen.add(file)
        coming += _imported(text, {file.parent, root}, own)
    return False


def _text(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def is_text(content: bytes) -> bool:
    """Whether it can be Python's source: neither compiled nor an archive, both of which `python` runs too."""
    return b"\0" not in content


def _texts(content: bytes) -> list[bytes]:
    """Source in which to look: a file's, that of an archive's members, or what bytecode names as an import."""
    if is_text(content):
        return [content]
    import io
    import zipfile
    import zlib

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if name.endswith((".py", ".pyc"))]
            parts = [archive.read(name) for name in names[:_MOST_FILES]]
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error, EOFError, OSError):
        parts = [content]
    return [part if is_text(part) else b"import samestep.train" * bool(_COMPILED.search(part)) for part in parts]


def _imported(text: bytes, folders: Collection[Path], own: str) -> list[Path]:
    """Files that the text of a module may import: in these folders, or wherever the user's own code is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the user's own text are for the rank to tell
            statements = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        return []
    names: list[str] = []
    for statement in statements:
        if isinstance(statement, ast.Import):
            names += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom) and statement.level <= 1:
            module = f"{statement.module}." if statement.module else ""
            names += [statement.module or "", *(module + alias.name for alias in statement.names)]
    found = []
    for name in filter(None, names):
        for folder in {*folders, *_home(name.partition(".")[0], own)}:
            place = folder.joinpath(*name.split("."))
            found += [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    return found


@lru_cache(maxsize=256)
def _home(top: str, own: str) -> tuple[Path, ...]:
    """The folder in which a top-level module is, if it is the user's: `own`, or not installed beside everybody's."""
    if top in sys.stdlib_module_names or top == "samestep" or (spec := _find(top)) is None:
        return ()
    places = list(spec.submodule_search_locations or ()) or [spec.origin or ""]
    folders = [Path(place).parent for place in places if place]
    return tuple(f for f in folders if top == own or not {"site-packages", "dist-packages"} & set(f.parts))


def check(recipe: Recipe, program: str = "samestep run") -> None:
    """Find what the ranks are to run.

    Raises:
        UsageError: it is not there.
    """
    if recipe.kind is Kind.MODULE:
        _check_module(recipe.target)
    elif recipe.kind is Kind.COMMAND:
        if shutil.which(recipe.target) is None:
            raise UsageError(
                f"the command {recipe.target} is expected to be a program, but none is found",
                "give its path, and make it executable (chmod +x)",
            )
    else:
        _check_file(Path(recipe.target), program)


def _check_file(path: Path, program: str) -> None:
    if path.is_dir():
        raise UsageError(f"the recipe {path} is expected to be a file, but is a directory", "name the file in it")
    if path.is_file():
        return
    beside = [item.name for item in path.parent.glob("*.py")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    raise UsageError(
        f"the recipe {path} is expected to be a file, but does not exist",
        f"did you mean {path.parent / close[0]}?" if close else f"{program} [options] recipe.py [recipe options]",
    )


def _check_module(name: str) -> None:
    spec = _find(name)
    if spec is not None and spec.submodule_search_locations is not None and _find(f"{name}.__main__") is None:
        raise UsageError(
            f"the module {name} is expected to be one that runs, but is a package without __main__.py",
            f"name a module in it: {name}.train",
        )
    if spec is None:
        raise UsageError(
            f"the module {name} is expected to be importable, but is not found",
            "give a dotted name that python -m would take, or leave out -m for a file",
        )


def _find(name: str) -> ModuleSpec | None:
    """Like importlib.util.find_spec, which however imports the parents of `name`."""
    path: Sequence[str] | None = [str(Path.cwd()), *sys.path]  # python -m puts the working directory first
    spec = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        if path is None or not parts[depth - 1]:
            return None
        spec = _ask_finders(".".join(parts[:depth]), path, top=depth == 1)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _ask_finders(name: str, path: Sequence[str], *, top: bool) -> ModuleSpec | None:
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec(name, path)
    for finder in sys.meta_path if spec is None else ():
        spec = finder.find_spec(name, None if top else path)  # editable installs bring finders of their own
        if spec is not None:
            break
    return spec
