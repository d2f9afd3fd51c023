"""The model as DistributedDataParallel."""

from __future__ import annotations

import contextlib
import gc
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.parallel import DistributedDataParallel

from samestep.train import without_compiler

BUCKET_MB = 25.0  # of what DDP sends at once, unless something else is asked for: torch's own default


class Replicas:
    """Makes the model's replica, anew for other layers that train and for buckets of another size.

    Attributes:
        current: DDP, None until one was made.
        called: whether its forward ran in this step.
        find_unused: what to make the next one with; None until it is known.
    """

    def __init__(self, model: nn.Module, state: Any, hook: Any, *, find_unused: bool | None) -> None:
        self.current: DistributedDataParallel | None = None
        self.called = False
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
        self.called = False
        if self._resized and self.current is not None:
            self.set_aside()
            self.release()
            self.wrap()

    def wrap(self) -> None:
        """Make it. A collective."""
        self._resized = False
        replica = replicate(self._model, bucket_mb=self._bucket_mb, find_unused=bool(self.find_unused))
        replica.register_comm_hook(*self._communicate)
        replica.register_forward_pre_hook(self._note_call)
        self.current = replica

    def set_aside(self) -> None:
        """Have none from now on, and keep what there is until `release`: a forward may have been through it."""
        self._former, self.current = self.current, None

    def release(self) -> None:
        """Let go of what was set aside."""
        if self._former is not None:
            self._former = None
            gc.collect()  # a part of a cycle, and its hooks would go on

    def _note_call(self, *_: Any) -> None:
        self.called = True


def replicate(model: nn.Module, *, find_unused: bool, bucket_mb: float) -> DistributedDataParallel:
    """Wrap `model`, which lies on one device, where its inputs are put too. A collective.

    Not with static_graph, which gained nothing where it was measured (1.00 to 1.10 times the time of a step).
    """
    with without_compiler.wrapping(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers
        return _Replica(
            model,
            bucket_cap_mb=cast(int, bucket_mb),  # torch takes any number
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=find_unused,
        )


def look_from(replica: Any, loss: Tensor) -> None:
    """Have DDP look for what is unused in the graph of the loss: it has looked from the outputs of the last forward."""
    replica.reducer.prepare_for_backward([loss])


class _Replica(DistributedDataParallel):
    """Has the attributes of the model too, so that a loss finds them on any number of ranks."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's. DDP's own begin of a forward is not made for tensors inside of torch.func's transforms."""
        if torch._C._are_functorch_transforms_active():
            with temporarily_clear_interpreter_stack():
                if torch.is_grad_enabled():
                    self.reducer._rebuild_buckets()
                    self.reducer.prepare_for_backward([])
            return self.module(*inputs, **kwargs)
        return super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]

    def _inside_ddp_forward(self) -> Any:
        """Nothing: torch's compiler would see DDP here, and cut graphs at its buckets. One rank has none to cut at."""
        return contextlib.nullcontext()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)
