"""Numbers that a process is told in its environment: mostly by a launcher, some by people, so each of them is judged.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping

from samestep.launcher.contract import (
    DEFAULT_GRACE_SECONDS,
    ENV_FENCE,
    ENV_GENERATION,
    ENV_GRACE,
    ENV_JOIN_TIMEOUT,
    UsageError,
)

JOIN_SECONDS = 120.0  # where no launcher of ours says how long


def integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The whole number in `name`; `default` where it is unset or empty.

    Raises:
        UsageError: it is none.
    """
    text = environ.get(name)
    if not text and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise UsageError(f"{name} is expected to be an integer, but is {text!r}", f"unset {name}") from None


def seconds(environ: Mapping[str, str], name: str, default: float, *, zero: bool = True) -> float:
    """The time in `name`; `default` where it is unset or empty.

    Raises:
        UsageError: it is no number, negative, infinite, or 0 where `zero` is False.
    """
    text = environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 <= value < float("inf") and (zero or value > 0):
        return value
    least = "at least 0 seconds" if zero else "above 0 seconds"
    raise UsageError(
        f"{name} is expected to be {least}, but is {text!r}", f"unset {name} for {default:g} seconds, or set a number"
    )


def grace(environ: Mapping[str, str]) -> float:
    """Seconds between the first request to stop and the end by force.

    Raises:
        UsageError: see `seconds`.
    """
    return seconds(environ, ENV_GRACE, DEFAULT_GRACE_SECONDS)


def join_timeout(environ: Mapping[str, str]) -> float:
    """Seconds that a rank waits for the others before training can begin.

    Raises:
        UsageError: see `seconds`.
    """
    return seconds(environ, ENV_JOIN_TIMEOUT, JOIN_SECONDS, zero=False)


def checked_generation(environ: Mapping[str, str]) -> int:
    """How often the run was started before; all that is asked for later is judged too, before a model is built in vain.

    Raises:
        UsageError: one of them is no such number.
    """
    grace(environ)
    join_timeout(environ)
    for name in (ENV_GENERATION, ENV_FENCE):
        if integer(environ, name, 0) < 0:
            raise UsageError(f"{name} is expected to be at least 0, but is {environ[name]}", f"unset {name}")
    return integer(environ, ENV_GENERATION, 0)
