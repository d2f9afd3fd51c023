"""What else decides the bits: threads, kernels, versions. Pinned before the model is built, and written down."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import psutil
import torch

from samestep.launcher.contract import ENV_LAUNCHED, UsageError
from samestep.train import without_compiler
from samestep.train.data import rng

CUBLAS_WORKSPACE = ":4096:8"


def threads_for(shards: int) -> int:
    """CPU threads of a rank: a function of V, never of the number of ranks or the launcher (they give other bits)."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return max(1, cores // shards)


def pin(threads: int, allow_nondeterministic: bool) -> None:
    """Set thread count and deterministic kernels; has to run before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    torch.set_num_threads(threads)
    without_compiler.use_deterministic_algorithms(True, warn_only=allow_nondeterministic)
    # 25 ms for each 100 MB tensor, and no bit depends on it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


Built = TypeVar("Built")


def keeping_threads(build: Callable[[], Built], device: torch.device) -> tuple[Built, list[str]]:
    """What `build` makes, with the thread count as it was before, and a sentence where `build` had changed it.

    Raises:
        UsageError: see `require_default_device`; in place of what `build` raised, which came of it.
    """
    threads = torch.get_num_threads()
    try:
        built = build()
    finally:
        require_default_device(device)
    return built, threads_brought_back(threads, "build")


def threads_brought_back(threads: int, what: str) -> list[str]:
    """Set so many threads again; a sentence where there were others, which `what` has set."""
    found = torch.get_num_threads()
    if found == threads:
        return []
    torch.set_num_threads(threads)
    return [
        f"{what} sets {found} threads, but a rank goes on with {threads}: bits depend on it, so it follows from "
        "--threads or --shards alone"
    ]


def require_default_device(device: torch.device) -> None:
    """Judge where torch makes tensors unless told otherwise: samples and keys are drawn on the CPU.

    Raises:
        UsageError: neither there nor on `device`.
    """
    try:
        found = torch.get_default_device().type
    except (AssertionError, RuntimeError) as error:  # torch makes a tensor there to see
        found = f"one that is not there ({str(error).splitlines()[0]})"
    if found not in ("cpu", device.type):
        raise UsageError(
            f"torch's default device is expected to be cpu{'' if device.type == 'cpu' else ' or ' + device.type}, as "
            f"this rank computes on {device.type}, but the recipe has set {found}",
            "leave torch.set_default_device out: --device decides, and model and batches are moved there",
        )


@contextlib.contextmanager
def long_lived_objects_set_aside() -> Iterator[None]:
    """Keep the collector from walking all that was imported and built, again and again: 100 ms each time, on one rank.

    Objects that die later are found as ever. What a caller has set aside himself stays so, and nothing is added: all
    could only be taken back together. A rank of our launcher ends with the run, so there nothing has to be taken back.
    """
    before = gc.get_freeze_count()
    if not before or ENV_LAUNCHED in os.environ:
        gc.freeze()
    try:
        yield
    finally:
        if not before:
            gc.unfreeze()


def record(device: torch.device) -> dict[str, Any]:
    """What this process computes with; kept in config.json and in every checkpoint."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "random_numbers": rng.SPEC,
        "deterministic": not torch.is_deterministic_algorithms_warn_only_enabled(),
    }


def parent_command() -> list[str]:
    """Command line of the process that started this one; empty where it can't be seen."""
    try:
        words: list[str] = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []
    return words
