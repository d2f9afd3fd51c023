"""What the process that calls `train` had before and gets back: notebooks, scripts and tests go on after it.

Random streams: who draws the next options from them would get the same ones after each call. What training pins, since
other code may need a kernel that has no deterministic form. accelerate's state, of which a process has one.
Environment variables that are read once stay: CUBLAS_WORKSPACE_CONFIG, and KINETO_LOG_LEVEL (see profile).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState

from samestep.launcher.contract import UsageError
from samestep.train import without_compiler
from samestep.train.data.rng import streams_restored
from samestep.train.data.shield import kill_the_rest

_running: dict[int, object] = {}  # by process: a fork has no part in the call that it was forked in


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, modes of torch that the caller is in don't count; afterwards all is as it was.

    Raises:
        UsageError: another call is going on in this process, with which this one would share all of that.
    """
    me = object()
    if _running.setdefault(os.getpid(), me) is not me:
        raise UsageError(
            "train is expected to be called once at a time, but another call goes on in this process",
            "wait for it, or start a process for each: they would draw from the same random streams",
        )
    try:
        with ExitStack() as stack:
            for given_back in (_accelerate, _pinned, streams_restored, _streams_of_gpus, _outside_autocast):
                stack.enter_context(given_back())
            for mode in (torch.inference_mode(False), torch.enable_grad()):
                stack.enter_context(mode)
            stack.callback(kill_the_rest)
            yield
    finally:
        del _running[os.getpid()]


@contextmanager
def _pinned() -> Iterator[None]:
    threads, cudnn, filling = torch.get_num_threads(), torch.backends.cudnn, torch.utils.deterministic
    on, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before = cudnn.benchmark, cudnn.deterministic, filling.fill_uninitialized_memory  # type: ignore[attr-defined]
    of_compiler = os.environ.get(without_compiler.DETERMINISTIC)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        without_compiler.use_deterministic_algorithms(on, warn_only=warn)
        os.environ.pop(without_compiler.DETERMINISTIC, None)
        if of_compiler is not None:
            os.environ[without_compiler.DETERMINISTIC] = of_compiler
        cudnn.benchmark, cudnn.deterministic, filling.fill_uninitialized_memory = before  # type: ignore[attr-defined]


@contextmanager
def _outside_autocast() -> Iterator[None]:
    """As where no autocast is around: only the outermost one drops its copies of weights, which each step changes."""
    kinds = ("cpu", "cuda")
    on = [torch.is_autocast_enabled(kind) for kind in kinds]
    around = torch.autocast_increment_nesting() - 1
    for _ in range(around + 1):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for _ in range(around):
            torch.autocast_increment_nesting()
        for kind, enabled in zip(kinds, on, strict=True):
            torch.set_autocast_enabled(kind, enabled)


@contextmanager
def _streams_of_gpus() -> Iterator[None]:
    states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        if states is not None:
            torch.cuda.set_rng_state_all(states)


@contextmanager
def _accelerate() -> Iterator[None]:
    """Where a process group has come to be, what accelerate knows of it stays."""
    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    try:
        yield
    finally:
        if not dist.is_initialized():
            for state, known in zip(shared, before, strict=True):
                state.clear()
                state.update(known)
