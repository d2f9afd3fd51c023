"""Random numbers drawn where no key decides them: in the update, after the last shard of this rank."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from samestep.train.observe.guards.check import Check, Finding, Subject, hooked_update
from samestep.train.parallel.shards import StepPlan


class KeyedRandomness(Check):
    """Forward and backward draw from streams keyed by shard; whoever draws later goes on in the last shard's."""

    def __init__(self, subject: Subject) -> None:
        self._before: dict[str, Any] = {}
        self._hook = hooked_update(subject.optimizer.register_step_pre_hook, self._on_update)

    def before_step(self, plan: StepPlan) -> tuple[()]:  # noqa: ARG002
        """Forget the step before."""
        self._before = {}
        return ()

    def after_step(self, plan: StepPlan) -> Iterator[Finding]:  # noqa: ARG002
        """Compare with the moment before the update."""
        now = streams() if self._before else {}
        drawn = [name for name, state in self._before.items() if state != now[name]]
        if drawn:
            yield Finding(
                f"the optimizer or the scheduler draws from the global random numbers of {' and '.join(drawn)}",
                "each rank would draw others there: give it a generator of its own, seeded from config.seed, and "
                "draw from that",
            )

    def close(self) -> None:
        """Take the hook away."""
        self._hook.remove()

    def _on_update(self, *_: Any) -> None:
        self._before = streams()


def streams() -> dict[str, Any]:
    """The state of each global generator, comparable."""
    _, keys, position, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (np.asarray(keys).tobytes(), position, *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return states
