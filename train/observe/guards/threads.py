"""The number of CPU threads, on which the order of sums and so the bits depend."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from samestep.train.observe.guards.check import Check, Finding


class KeptThreads(Check):
    """Compares it before and after each loss."""

    def __init__(self) -> None:
        self._before = 0

    def before_loss(self, batch: object, samples: int) -> tuple[()]:  # noqa: ARG002
        """Remember it."""
        self._before = torch.get_num_threads()
        return ()

    def after_loss(self) -> Iterator[Finding]:
        """Compare."""
        now = torch.get_num_threads()
        if now != self._before:
            yield Finding(
                f"the loss changes the number of threads from {self._before} to {now}",
                "bits depend on it, and a resumed run would begin with another one: leave torch.set_num_threads out, "
                "--threads sets it",
            )
