"""How a rank joins: its device, the store where ranks meet, the process group.

Joining goes through accelerate, which picks device and backend; below `samestep run` the store is made first, on a
socket that the launcher bound to loopback.
"""

from __future__ import annotations

import datetime as dt
import os
import queue
import threading
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from samestep.launcher import environment_numbers
from samestep.launcher.contract import (
    ENV_PDB,
    ENV_STORE_ADDR,
    ENV_STORE_FD,
    ENV_STORE_PORT,
    UsageError,
    WorkerEnv,
)
from samestep.train.parallel.agent_store import JoinTimeoutError, agents_store
from samestep.train.parallel.group import Group, RankGroup, SoloGroup
from samestep.train.parallel.meet import meet
from samestep.train.parallel.shared_memory import Arena, open_arena

_PATIENCE = dt.timedelta(minutes=30)  # that collectives may take
_LOOKED_AT = dt.timedelta(days=7)  # the same, while somebody looks at one of the ranks
_TRUE = ("1", "true", "t", "yes", "y", "on")  # as accelerate reads it


@dataclass(frozen=True, slots=True)
class Membership:
    """Result of joining."""

    env: WorkerEnv
    group: Group
    accelerator: Accelerator

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        device: torch.device = self.accelerator.device
        return device


def pick_device(wanted: str, env: WorkerEnv, environ: Mapping[str, str] = os.environ) -> torch.device:
    """Device of this rank for `--device`; auto is the CPU where accelerate is kept on it.

    Raises:
        UsageError: no such device here, or not enough of them for the ranks of this node.
    """
    on_cpu = environ.get("ACCELERATE_USE_CPU", "").lower() in _TRUE
    if on_cpu and wanted.startswith("cuda"):
        raise UsageError(
            f"--device is expected to be cpu or auto, since ACCELERATE_USE_CPU is true, but is {wanted}",
            "leave out --device or accelerate's --cpu, or unset ACCELERATE_USE_CPU",
        )
    available = torch.cuda.device_count() if torch.cuda.is_available() and not on_cpu else 0
    kind = ("cuda" if available else "cpu") if wanted == "auto" else wanted
    try:
        device = torch.device(kind)
    except RuntimeError:
        raise UsageError(f"--device is expected to be auto, cpu, cuda or cuda:N, but is {wanted}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"--device is expected to be auto, cpu, cuda or cuda:N, but is {wanted}")
    indexed = device.index is not None  # torch's types say that it always is
    if indexed and env.world_size > 1:
        raise UsageError(
            f"--device is expected to name no index with {env.world_size} ranks, but is {wanted}",
            "set CUDA_VISIBLE_DEVICES, and pass --device cuda",
        )
    index = device.index if indexed else env.local_rank
    if index >= available:
        raise UsageError(
            f"--device {wanted} needs CUDA device {index} for local rank {env.local_rank}, but {available} are visible",
            "start fewer ranks, or pass --device cpu",
        )
    return torch.device("cuda", index)


def join(
    env: WorkerEnv, device: torch.device, run_dir: Path | None = None, environ: MutableMapping[str, str] = os.environ
) -> Membership:
    """Become one rank of the run; `run_dir` is where ranks meet that were given no address.

    Raises:
        UsageError: the world that was joined is not the one the environment asks for.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():  # by an earlier call, or by the recipe: it is judged below
        pass
    elif env.world_size > 1 and environ.get(ENV_STORE_PORT):
        _init_group(env, device, _launchers_store(env, environ), environ)
    elif env.world_size > 1 and env.job and not env.master_addr and run_dir is not None:
        store, published = meet(env, run_dir, environ, dt.timedelta(seconds=environment_numbers.JOIN_SECONDS))
        _init_group(env, device, store, environ)
        published.unlink(missing_ok=True)  # all ranks have met
    elif env.world_size > 1 and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _init_group(env, device, agents_store(env, _PATIENCE), environ, _PATIENCE)
    warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # the threads are ours to set
    accelerator = _accelerator(device, env.world_size)
    if accelerator.num_processes != env.world_size or accelerator.process_index != env.rank:
        raise UsageError(
            f"the process group is expected to be rank {env.rank} of {env.world_size}, "
            f"but is rank {accelerator.process_index} of {accelerator.num_processes}",
            "unset ACCELERATE_* variables that contradict the launcher",
        )
    if device.type == "cpu":
        # accelerate's is cpu:0 with several ranks, to torch another device: what is moved is copied, and shared no more
        accelerator.state.device = PartialState().device = torch.device("cpu")
    if env.world_size == 1:
        return Membership(env, SoloGroup(), accelerator)
    group = RankGroup(env.rank, env.world_size, device)
    if device.type == "cpu":
        patience = _LOOKED_AT if environ.get(ENV_PDB) else _PATIENCE
        group.arena = _arena(dist.group.WORLD, group, int(patience.total_seconds()))
    return Membership(env, group, accelerator)


def _accelerator(device: torch.device, world_size: int) -> Accelerator:
    """Accelerate that heeds no variables: it would put autocast or a compiler around the model on several ranks only.

    Raises:
        UsageError: on several ranks the recipe has made one itself, with other settings.
    """
    if world_size == 1 and not dist.is_initialized():
        # of an earlier run, or the caller's own: accelerate would keep to that device, or refuse another one
        for kind in (PartialState, AcceleratorState, GradientState):
            kind._shared_state.clear()
    try:
        return Accelerator(
            mixed_precision="no",
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            cpu=device.type == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise UsageError(
            "the recipe is expected to leave accelerate's settings to train(), but has made an Accelerator with others",
            "leave it out: --precision, --device and the launcher decide",
        ) from None


_arenas: dict[object, Arena | None] = {}


def _arena(process_group: object, group: RankGroup, patience: int) -> Arena | None:
    """One for each process group, however often it is joined. A collective."""
    if process_group not in _arenas:
        _arenas[process_group] = open_arena(group, patience)
    return _arenas[process_group]


def _launchers_store(env: WorkerEnv, environ: MutableMapping[str, str]) -> dist.Store:
    """Rank zero serves the store on the socket it inherited: no port is ever bound twice or beyond what was chosen."""
    seconds = environment_numbers.join_timeout(environ)
    listen_fd = int(environ[ENV_STORE_FD]) if env.rank == 0 and environ.get(ENV_STORE_FD) else None
    store = _within(
        seconds,
        lambda: dist.TCPStore(
            environ.get(ENV_STORE_ADDR) or "127.0.0.1",
            int(environ[ENV_STORE_PORT]),
            env.world_size,
            is_master=env.rank == 0,
            timeout=dt.timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listen_fd,
        ),
    )
    if store is None:
        raise JoinTimeoutError([0], seconds)
    _await_all(store, env, seconds)
    return store


def _init_group(
    env: WorkerEnv,
    device: torch.device,
    store: dist.Store,
    environ: Mapping[str, str],
    timeout: dt.timedelta | None = None,
) -> None:
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=env.rank,
        world_size=env.world_size,
        timeout=_LOOKED_AT if environ.get(ENV_PDB) else timeout,
        device_id=device if device.type == "cuda" else None,
    )


def _within(seconds: float, connect: Callable[[], dist.TCPStore]) -> dist.TCPStore | None:
    """The store; None if rank zero does not serve it in time.

    The socket is open before rank zero comes, so connecting succeeds, and torch's client then waits for an answer
    without regard to its timeout: on a thread, which an exit does not wait for.
    """
    answer: queue.SimpleQueue[dist.TCPStore | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(connect())
        except Exception as error:  # noqa: BLE001 (raised where it is waited for)
            answer.put(error)

    threading.Thread(target=ask, name="store", daemon=True).start()
    try:
        got = answer.get(timeout=seconds)
    except queue.Empty:
        return None
    if isinstance(got, Exception):
        raise got
    return got


def _await_all(store: dist.Store, env: WorkerEnv, seconds: float) -> None:
    """Return when every rank is at the store: what follows would wait for an absent one for half an hour."""
    names = [f"samestep/joined/{rank}" for rank in range(env.world_size)]
    store.set(names[env.rank], "")
    try:
        store.wait(names, dt.timedelta(seconds=seconds))
    except dist.DistStoreError as error:
        missing = [rank for rank, name in enumerate(names) if not store.check([name])]
        if not missing:
            return
        raise JoinTimeoutError(missing, seconds) from error
