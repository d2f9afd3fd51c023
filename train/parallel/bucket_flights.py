"""DDP's buckets on their way to the other ranks, one after the other, and the waits that backward has for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from samestep.train.parallel.exchange import Flight


def _nobody(phase: str) -> None:
    """Nobody wants to know."""


class BucketFlights:
    """Used from DDP's communication hook: send for each bucket, land after the last one."""

    def __init__(self) -> None:
        self.enter: Callable[[str], None] = _nobody  # told where backward waits for other ranks
        self.sent: list[tuple[Flight, list[Tensor], torch.futures.Future[Tensor]]] = []

    def send(self, flight: Flight, parameters: list[Tensor], device: torch.device) -> torch.futures.Future[Tensor]:
        """Take a bucket of `parameters` that was started, and advance the one before; the future is for DDP."""
        devices: list[int | str | torch.device] | None = [device] if device.type == "cuda" else None
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        self.sent.append((flight, parameters, future))
        if len(self.sent) > 1:
            self.enter("sync")
            self.sent[-2][0].advance()
            self.enter("backward")
        return future

    def land(self) -> list[tuple[list[Tensor], Tensor]]:
        """Parameters and total of each bucket."""
        self.enter("sync")
        totals = []
        for flight, parameters, future in self.sent:
            flight.advance()
            total = flight.finish()
            totals.append((parameters, total))
            future.set_result(total)
        self.sent.clear()
        self.enter("backward")
        return totals
