"""Where each value came from: a configuration as a TOML file with a comment a line.

What is printed can be read back with `--config`: options that are not set, and the file's own name, are comments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

DEFAULT = "default"


def sources(
    flags: Mapping[str, Sequence[str]], tokens: Sequence[str], chain: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, str]:
    """Which source won, by option: the flag as typed, a name of `chain` (strongest first), or `default`.

    Args:
        flags: every spelling of an option's flag, by the option's name with dashes.
        tokens: the command line.
        chain: (source, values by name) in the order in which they are asked.
    """
    typed = {token.partition("=")[0] for token in tokens}
    found = {}
    for name, spellings in flags.items():
        flag = next((word for word in spellings if word in typed), None)
        below = next((source for source, values in chain if name in values), DEFAULT)
        found[name] = below if flag is None else f"flag {flag}"
    return found


def render(values: Mapping[str, Any], origin: Mapping[str, str], title: str, *, readable: bool = True) -> str:
    """Lines `name = value  # source`; with `readable` False all of them are comments, which `--config` skips."""
    rows = []
    for name, value in values.items():
        text = _toml(value)
        line = f"{name} = {'not set' if text is None else text}"
        rows.append((line if text is not None and name != "config" and readable else f"# {line}", origin[name]))
    width = max((len(line) for line, _ in rows), default=0)
    return "\n".join([f"# {title}", *(f"{line:<{width}}  # {source}" for line, source in rows)])


def _toml(value: Any) -> str | None:
    """A TOML 1.0 value; None for what TOML has no word for."""
    if value is None:
        return None
    if isinstance(value, bool | int | float):
        return str(value).lower()  # inf and nan are words of TOML too
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_quoted(k)} = {_toml(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str):
        return "[" + ", ".join(text for text in map(_toml, value) if text is not None) + "]"
    return _quoted(value)


def _quoted(value: Any) -> str:
    """A basic string: JSON's escapes are TOML's, but for DEL and for characters outside the basic plane."""
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
