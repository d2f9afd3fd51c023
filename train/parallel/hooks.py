"""torch's own gradient compression, for `--reduction fast` only: faster on slow networks, other bits."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from samestep.launcher.contract import UsageError

# Takes a bucket that holds this rank's sum, gives the sum over all ranks.
CompressionHook = Callable[[GradBucket], torch.futures.Future[Tensor]]


def without_effect(name: str | None, world_size: int) -> list[str]:
    """A sentence where `--comm-hook` names a hook that nothing will ask for."""
    if name is None or world_size > 1:
        return []
    return [f"--comm-hook {name} compresses nothing on one rank, which has nobody to send gradients to"]


def compression_hook(name: str | None, device: torch.device) -> CompressionHook | None:
    """The hook that `--comm-hook` names; torch's hooks average over the ranks, which is undone here.

    Raises:
        UsageError: the backend of this device has no such hook.
    """
    if name is None:
        return None
    if name == "bf16" and device.type != "cuda":
        raise UsageError(
            "--comm-hook bf16 is expected to run on NCCL, but this run is on gloo, which has no bf16 sum",
            "use --comm-hook fp16, or none",
        )
    hooks: dict[str, tuple[Callable[..., Any], Any]] = {
        "fp16": (default_hooks.fp16_compress_hook, None),
        "bf16": (default_hooks.bf16_compress_hook, None),
        "powersgd": (powerSGD_hook, None),
    }
    hook, state = hooks[name]
    if name == "powersgd":
        state = PowerSGDState(process_group=None, matrix_approximation_rank=2, start_powerSGD_iter=10)
    world_size = dist.get_world_size()

    def run(bucket: GradBucket) -> torch.futures.Future[Tensor]:
        average: torch.futures.Future[Tensor] = hook(state, bucket)
        return average.then(lambda done: done.value().mul_(world_size))

    return run
