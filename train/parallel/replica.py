"""The model as DistributedDataParallel, made by accelerate."""

from __future__ import annotations

import warnings
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Of what DDP sends at once; no bit depends on it. 1 to 100 made no difference that could be told from noise (gloo on
# two cores), so it is what people tune networks for.
BUCKET_MB = 25


def replicate(model: nn.Module, accelerator: Accelerator, *, find_unused: bool) -> DistributedDataParallel:
    """Wrap `model`. A collective."""
    accelerator.ddp_handler = DistributedDataParallelKwargs(
        bucket_cap_mb=BUCKET_MB,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # accelerate passes broadcast_buffers, which torch renames
        replica = cast(Any, accelerator.prepare_model(model))
    replica.__class__ = _Replica  # prepare_model makes torch's own class
    return cast(DistributedDataParallel, replica)


def look_from(replica: Any, loss: Tensor) -> None:
    """Have DDP look for what is unused in the graph of the loss: it has looked from the outputs of the last forward."""
    replica.reducer.prepare_for_backward([loss])


class _Replica(DistributedDataParallel):
    """Has the attributes of the model too, so that a loss finds them on any number of ranks."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)
