"""Errors of buffers that can't come out the same on any number of ranks, or after a resume."""

from __future__ import annotations

from samestep.launcher.contract import UsageError


def is_complex(name: str) -> UsageError:
    """A mean over shards is computed of real numbers."""
    return UsageError(
        f"buffers that change are expected to be real where shards share them, but {name} is complex",
        "register torch.view_as_real of it, and view_as_complex that in forward",
    )


def unlike(name: str, step: int, one: object, other: str) -> UsageError:
    """`one` is the value in a shard, `other` says what is in others; `step` counts from 0 here and below."""
    return UsageError(
        f"integer buffer {name} is expected to end alike in all shards and micro-batches of a step, "
        f"but after step {step + 1} it is {one} in one of them and {other}",
        "make it depend on the number of steps only, or floating point so that it can be averaged",
    )


def changed_late(name: str, step: int) -> UsageError:
    """Whether it changes was agreed in the first step."""
    return UsageError(
        f"buffers are expected to change in every step or never, but {name} changed first in step {step + 1}",
        "change it in every step, or keep it out of the model",
    )


def gone(name: str) -> UsageError:
    """What is not there can be neither combined nor saved."""
    return UsageError(
        f"buffers are expected to stay tensors, but {name} is None, or gone, since training began",
        "leave it there, zeroed or empty (persistent=False) where nothing is in it; or make it None in build, and keep "
        "what forward makes for itself in a plain attribute",
    )


def reshaped(name: str, step: int) -> UsageError:
    """The values of a checkpoint would not fit, or would be rounded, where the model is built again."""
    return UsageError(
        f"buffers that a checkpoint holds are expected to keep shape and type, but {name} was put anew in another one "
        f"in step {step + 1}",
        "register it with persistent=False if forward makes it for each batch, else in its full size and type",
    )
