"""An option on the wrong side of the recipe: the launcher's own come before it, the recipe's after it."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

from samestep.launcher.command_line.options import spellings
from samestep.launcher.config import LaunchConfig


def before(flag: str) -> str:
    """A hint where a recipe was given an option of `samestep run`, else empty."""
    known = {name for names in spellings(LaunchConfig).values() for name in names}
    return f"{flag} belongs before the recipe: samestep run {flag} ... recipe.py" if flag in known else ""


def after(flag: str, program: str) -> str:
    """A hint where `program` was given an option of every recipe, else empty."""
    return f"{flag} belongs after the recipe: {program} recipe.py {flag} ..." if flag in _of_recipes() else ""


def _of_recipes() -> set[str]:
    """Options of a recipe, from the text that defines them: to import it would import torch."""
    found = find_spec("samestep.train")
    folder = next(iter(found.submodule_search_locations or ()), None) if found else None
    try:
        tree = ast.parse((Path(folder or "") / "config.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return set()
    fields = (
        item.target
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.AnnAssign)
    )
    return {f"--{target.id.replace('_', '-')}" for target in fields if isinstance(target, ast.Name)}
