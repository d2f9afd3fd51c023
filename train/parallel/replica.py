"""The model's DistributedDataParallel, which sends gradients while backward goes on, and does nothing else.

It has hooks on the model's parameters. Its own forward is never run: a loss gets the model itself, on any number of
ranks, for names of parameters, attributes, indexing and `isinstance` tell the wrapper from the model.
"""

from __future__ import annotations

import gc
import warnings
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from samestep.train import without_compiler

BUCKET_MB = 25.0  # of what DDP sends at once, unless something else is asked for: torch's own default


class Replicas:
    """Makes the model's replica, anew for other layers that train and for buckets of another size.

    Attributes:
        current: DDP, None until one was made.
        find_unused: what to make the next one with; None until it is known.
    """

    def __init__(self, model: nn.Module, state: Any, hook: Any, *, find_unused: bool | None) -> None:
        self.current: DistributedDataParallel | None = None
        self.find_unused = find_unused
        self._model = model
        self._communicate = state, hook
        self._former: nn.Module | None = None
        self._bucket_mb, self._resized = BUCKET_MB, False

    def resize(self, bucket_mb: float) -> None:
        """Send gradients in buckets of so many MB from the next step on; on all ranks alike."""
        self._resized |= bucket_mb != self._bucket_mb
        self._bucket_mb = bucket_mb

    def begin(self) -> None:
        """A step begins, and no gradient is left of the one before. A collective where buckets got another size."""
        if self._resized and self.current is not None:
            self.set_aside()
            self.release()
            self.wrap()

    def wrap(self) -> None:
        """Make it. A collective."""
        self._resized = False
        replica = replicate(self._model, bucket_mb=self._bucket_mb, find_unused=bool(self.find_unused))
        replica.register_comm_hook(*self._communicate)
        self.current = replica

    def begin_forward(self) -> None:
        """Before the forwards of a step whose last backward it takes. A collective, as DDP's own forward is.

        The buckets are laid out anew in the order of the first gradients, once, while there are no activations.
        """
        assert self.current is not None
        self.current.reducer.prepare_for_forward()
        self.current.reducer._rebuild_buckets()

    def begin_backward(self, loss: Tensor) -> None:
        """Take the gradients of the backward that follows, that of `loss`: unused parameters are not in its graph."""
        assert self.current is not None
        self.current.reducer.prepare_for_backward([loss] if self.find_unused else [])

    def set_aside(self) -> None:
        """Have none from now on, and keep what there is until `release`: its hooks may be on the graph of a forward."""
        self._former, self.current = self.current, None

    def release(self) -> None:
        """Let go of what was set aside."""
        if self._former is not None:
            self._former = None
            gc.collect()  # a part of a cycle, and its hooks would go on


def replicate(model: nn.Module, *, find_unused: bool, bucket_mb: float) -> DistributedDataParallel:
    """Wrap `model`, which lies on one device. A collective.

    Not with static_graph, which gained nothing where it was measured (1.00 to 1.10 times the time of a step).
    """
    with without_compiler.wrapping(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers
        return DistributedDataParallel(
            model,
            bucket_cap_mb=cast(int, bucket_mb),  # torch takes any number
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=find_unused,
        )
