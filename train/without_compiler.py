"""torch without its compiler, until somebody compiles: importing that takes as long as torch itself (1.8 s here).

torch imports torch._dynamo with deterministic mode, the first optimizer and the first DistributedDataParallel, to tell
it what is not to be traced. Before it is imported nothing is traced, so there is nothing to tell. Whoever else asks for
it gets it, and from then on everything here goes torch's own way.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

DETERMINISTIC = "TORCHINDUCTOR_DETERMINISTIC"  # read when torch._inductor.config is imported
_COMPILER = "torch._dynamo"
_CONFIG = "torch._inductor.config"
_KNOWN = "__dynamo_disable"  # where a function of torch keeps what stands for it once the compiler is there


def use_deterministic_algorithms(mode: bool, *, warn_only: bool = False) -> None:
    """`torch.use_deterministic_algorithms`, also for whatever is compiled later."""
    if _CONFIG in sys.modules:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        return
    torch.set_deterministic_debug_mode(("warn" if warn_only else "error") if mode else "default")
    os.environ[DETERMINISTIC] = "1" if mode else "0"


def keep_unloaded() -> None:
    """From now on optimizers import no compiler."""
    for entry in (
        Optimizer.add_param_group,
        Optimizer.zero_grad,
        Optimizer.state_dict,
        Optimizer.load_state_dict,
    ):
        function = getattr(entry, "__wrapped__", None)  # torch's own is behind an entry that asks for the compiler
        if function is not None and getattr(function, _KNOWN, None) is None and _COMPILER not in sys.modules:
            setattr(function, _KNOWN, _until_there(function, entry))


def _until_there(function: Callable[..., Any], entry: Any) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        if _COMPILER not in sys.modules:
            return function(*arguments, **named)
        setattr(function, _KNOWN, None)  # the entry asks anew
        return entry(*arguments, **named)

    return call


class _Absent:
    """Stands for a module of the compiler while a model is wrapped; asked for what it does not know, it imports it."""

    def __init__(self, module: str, **known: Any) -> None:
        self._module = module
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


@contextmanager
def wrapping() -> Iterator[None]:
    """Inside, a model is wrapped in DDP without the compiler."""
    if _COMPILER in sys.modules:
        yield
        return
    utils = _Absent(f"{_COMPILER}.utils", get_optimize_ddp_mode=lambda: "ddp_optimizer")  # the default
    absent: Any = _Absent(_COMPILER, utils=utils)
    torch._dynamo = absent
    try:
        yield
    finally:
        if vars(torch).get("_dynamo") is absent:  # another thread may have imported it
            del torch._dynamo
