"""The ranks of a run as one object: a process group, or the null object of a single process.

Both have the same methods, so nothing above asks whether there are other ranks. Joining goes through accelerate, which
picks device and backend; below `samestep run` the store is made first, on a socket that the launcher bound to loopback.
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
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from samestep.launcher.contract import (
    ENV_JOIN_TIMEOUT,
    ENV_PDB,
    ENV_STORE_ADDR,
    ENV_STORE_FD,
    ENV_STORE_PORT,
    UsageError,
    WorkerEnv,
)
from samestep.train.parallel.meet import meet
from samestep.train.parallel.shared_memory import LETTER_BYTES, Arena, open_arena

# torch 2.13 gave the collective a new name and warns about the old one.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_PATIENCE = dt.timedelta(minutes=30)  # that collectives may take
_LOOKED_AT = dt.timedelta(days=7)  # the same, while somebody looks at one of the ranks
JOIN_SECONDS = 120.0  # where no launcher of ours says how long


class JoinTimeoutError(Exception):
    """Some ranks never came; `missing` are their numbers."""

    def __init__(self, missing: list[int], seconds: float) -> None:
        self.missing = missing
        ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
        super().__init__(f"{ranks} did not join within {seconds:g} s")


class Group(Protocol):
    """What the parts need of the other ranks. Every method is a collective: all ranks call it in the same order."""

    rank: int
    world_size: int

    @property
    def arena(self) -> Arena | None:
        """Memory of all ranks, where they compute on the CPU of one host."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Equal-shaped tensors of all ranks, stacked: shape (world_size, *tensor.shape)."""

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Any bytes of each rank, without pickle."""

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def collectives(self) -> int:
        """How many collectives this rank has entered, whoever called them. Not a collective."""


@dataclass(slots=True)
class SoloGroup:
    """One process that talks to nobody."""

    rank: int = 0
    world_size: int = 1
    arena: None = None

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensor itself, with a leading dimension of one."""
        return tensor.unsqueeze(0)

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """The bytes themselves."""
        return [data]

    def barrier(self) -> None:
        """Nobody to wait for."""

    def collectives(self) -> int:
        """None."""
        return 0


@dataclass(slots=True)
class RankGroup:
    """The default process group of torch.distributed; tensors live on `device`."""

    rank: int
    world_size: int
    device: torch.device
    arena: Arena | None = None

    def gather(self, tensor: Tensor) -> Tensor:
        """One all_gather."""
        if self.arena is not None and tensor.numel() * tensor.element_size() <= LETTER_BYTES:
            return self.arena.gather(tensor)
        out = tensor.new_empty((self.world_size, *tensor.shape))
        all_gather(out.view(-1), tensor.contiguous().view(-1))
        return out

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Two all_gathers: lengths, then bytes padded to the longest."""
        lengths = self.gather(torch.tensor([len(data)], device=self.device)).flatten().tolist()
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8, device=self.device)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        rows = self.gather(padded).cpu().numpy()
        return [rows[rank, : lengths[rank]].tobytes() for rank in range(self.world_size)]

    def barrier(self) -> None:
        """Smallest gather: also works where a backend's own barrier would pick another device.

        It is read, since NCCL makes the device wait for others, and not the host.
        """
        self.gather(torch.zeros(1, device=self.device)).cpu()

    def collectives(self) -> int:
        """The backend's own count, 0.14 us, and that of meetings."""
        group: Any = dist.group.WORLD
        meetings = self.arena.meetings if self.arena is not None else 0
        return int(group._get_sequence_number_for_group()) + meetings


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


def pick_device(wanted: str, env: WorkerEnv) -> torch.device:
    """Device of this rank for `--device`.

    Raises:
        UsageError: no such device here, or not enough of them for the ranks of this node.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
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
    if env.world_size > 1 and environ.get(ENV_STORE_PORT):
        _init_group(env, device, _launchers_store(env, environ), environ)
    elif env.world_size > 1 and env.job and not env.master_addr and run_dir is not None:
        store, published = meet(env, run_dir, environ, dt.timedelta(seconds=JOIN_SECONDS))
        _init_group(env, device, store, environ)
        published.unlink(missing_ok=True)  # all ranks have met
    warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # the threads are ours to set
    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
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


_arenas: dict[object, Arena | None] = {}


def _arena(process_group: object, group: RankGroup, patience: int) -> Arena | None:
    """One for each process group, however often it is joined. A collective."""
    if process_group not in _arenas:
        _arenas[process_group] = open_arena(group, patience)
    return _arenas[process_group]


def _launchers_store(env: WorkerEnv, environ: MutableMapping[str, str]) -> dist.Store:
    """Rank zero serves the store on the socket it inherited: no port is ever bound twice or beyond what was chosen."""
    seconds = float(environ.get(ENV_JOIN_TIMEOUT) or JOIN_SECONDS)
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


def _init_group(env: WorkerEnv, device: torch.device, store: dist.Store, environ: Mapping[str, str]) -> None:
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=env.rank,
        world_size=env.world_size,
        timeout=_LOOKED_AT if environ.get(ENV_PDB) else None,
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
