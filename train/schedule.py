"""A scheduler that is over before the run is: told before the first step where it can be, else where it ends."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import ChainedScheduler, OneCycleLR

from samestep.launcher.contract import UsageError

_OVER = "Tried to step "  # how torch's OneCycleLR begins to say so


def require_length(scheduler: Any, done: int, coming: int, unit: str) -> None:
    """See whether a scheduler can be stepped `coming` times more, in a run that has done so many steps or epochs.

    Raises:
        UsageError: it was made for fewer.
    """
    parts = scheduler._schedulers if isinstance(scheduler, ChainedScheduler) else [scheduler]
    for part in parts:
        if isinstance(part, OneCycleLR) and part.last_epoch + coming > part.total_steps:
            raise _too_short(part, f"all {done + coming} {unit} of this run, but was made for {part.total_steps}", done)


def advance(scheduler: Any) -> None:
    """`scheduler.step()`.

    Raises:
        UsageError: it was made for fewer steps: one inside another one does not tell before.
    """
    try:
        scheduler.step()
    except ValueError as error:
        if not str(error).startswith(_OVER):
            raise
        said = str(error).replace("Tried", "tried").replace(". The", ", and the")
        what = f"the whole run, whose steps are total_steps in its config.json, but {said}"
        raise _too_short(scheduler, what, 0) from error


def _too_short(scheduler: Any, what: str, done: int) -> UsageError:
    fix = "make it for as many steps as the run has, or let the run have fewer: --epochs, --max-steps"
    if done:
        fix = "a resumed run keeps the schedule that it began with: ask for no more than that, or begin a new run"
    return UsageError(f"the scheduler {type(scheduler).__name__} is expected to last for {what}", fix)
