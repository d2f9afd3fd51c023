"""Names of metrics as MLflow takes them; of one that it refuses it would refuse the whole point."""

from __future__ import annotations

import re
from collections.abc import Collection

_LONGEST = 250
_REFUSED = re.compile(r"[^/\w.\- :]")


def legal(name: str, taken: Collection[str]) -> str:
    """`name` itself, or the nearest that MLflow takes and that is not in `taken`: `eval/acc@1` -> `eval/acc_1`.

    It takes words, spaces and `_ - . : /`, and slashes only as in a path that goes down.
    """
    parts = ["_" if part in ("", ".", "..") else part for part in _REFUSED.sub("_", name).split("/")]
    nearest = "/".join(parts)
    if len(nearest) > _LONGEST:
        nearest = nearest[:_LONGEST].rstrip("/.")
    found, number = nearest, 1
    while found in taken:
        number += 1
        found = f"{nearest[: _LONGEST - 6]}_{number}"
    return found
