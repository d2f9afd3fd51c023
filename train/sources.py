"""The recipe's own code, by content: an edited loss or layer can fit what was saved, and moves its bits.

What pip installs is known by its version, and where there is no file, as in a notebook, there is nothing to compare.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

_INSTALLED = frozenset({"site-packages", "dist-packages"})
_NAMED = 8


def of_recipe() -> dict[str, str]:
    """sha256 of the file that was started and of the imported modules that lie beside or below it, by relative path."""
    main = sys.modules.get("__main__")
    started = getattr(main, "__file__", None)
    if started is None:
        return {}
    file = Path(started).absolute()
    spec = getattr(main, "__spec__", None)  # of python -m; what is beside its outermost package is other code
    folder = file.parents[max(0, spec.name.count(".") - 1)] if spec is not None else file.parent
    standard = Path(sysconfig.get_path("stdlib"))
    found = {file.relative_to(folder).as_posix(): file}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__dict__", {}).get("__file__")  # asking the module itself could import what is lazy
        if not isinstance(path, str) or not path.endswith(".py") or name.startswith("samestep."):
            continue
        beside = Path(path).absolute()
        if beside.is_relative_to(folder) and not beside.is_relative_to(standard):
            inner = beside.relative_to(folder)
            if _INSTALLED.isdisjoint(inner.parts):
                found[inner.as_posix()] = beside
    hashed = {name: _sha256(path) for name, path in sorted(found.items())}
    return {name: sha for name, sha in hashed.items() if sha}


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The files whose content differs, in words; empty where all are the same, or one side has none."""
    if not before or not now:
        return ""
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    told = [name + (" (new)" if name not in before else " (gone)" if name not in now else "") for name in names]
    return ", ".join(told[:_NAMED]) + (f" and {len(told) - _NAMED} more" if len(told) > _NAMED else "")
