"""Names of metrics as MLflow takes them; of one that it refuses it would refuse the whole point."""

from __future__ import annotations

import re
from collections.abc import Collection

_LONGEST = 250
_REFUSED = re.compile(r"[^/\w.\- :]")


def legal(name: str, taken: Collection[str]) -> str:
    """`name` itself, or the nearest that MLflow takes and that is not in `taken`: `eval/acc@1` -> `eval/acc_1`.

    It takes words, spaces and `_ - . : /`, and slashes only as in a path that goes down. Its store of files has a file
    for a name and a folder for what is before a slash, so beside `eval/acc`, `eval/acc/top1` becomes `eval/acc_top1`.
    """
    parts = ["_" if part in ("", ".", "..") else part for part in _REFUSED.sub("_", name).split("/")]
    nearest = "/".join(parts)
    if len(nearest) > _LONGEST:
        nearest = nearest[:_LONGEST].rstrip("/.")
    for other in sorted(taken, key=len):
        if nearest.startswith(f"{other}/"):
            nearest = f"{other}_{nearest[len(other) + 1 :]}"
    found, number = nearest, 1
    while found in taken or any(other.startswith(f"{found}/") for other in taken):
        number += 1
        found = f"{nearest[: _LONGEST - 6]}_{number}"
    return found
