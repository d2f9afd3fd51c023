"""`samestep run recipe.py --help` and `--print-config`: the launcher's options, then the recipe's own.

The recipe knows its options, so it is run once with that one question, as a single process; it answers before it joins
or creates anything.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from samestep.launcher.command_line.argv import Kind, Recipe
from samestep.launcher.command_line.options import question

_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def answer(recipe: Recipe, show_own: Callable[[Sequence[str]], object], word: str, environ: Mapping[str, str]) -> int:
    """Print the launcher's answer to `word` by `show_own`, then the recipe's; the recipe's exit code."""
    try:
        show_own([word])
    except SystemExit:
        sys.stdout.flush()
    arguments, _ = question(recipe.arguments)
    start = [environ.get("PYTHON_EXEC") or sys.executable, *(["-m"] if recipe.kind is Kind.MODULE else [])]
    alone = {name: value for name, value in environ.items() if name not in _RANK}
    return subprocess.run([*start, recipe.target, *arguments, word], env=alone, check=False).returncode
