"""Where ranks meet below torchrun and `accelerate launch`: a part of the agent's store that no earlier start has used.

The agent serves one store for all its starts of the ranks, and torch takes it to be a new one each time. So a restarted
rank finds addresses there that gloo left for ranks that are dead, and waits for them, often for ever. Nor does the
agent's number of restarts tell starts apart: a change of members leaves it as it is.

Rank zero draws a name for each start. Who finds its place under that name taken belongs to a later start, and looks for
the next name. A start is complete when all places are taken.

Source: torch/distributed/rendezvous.py, _create_c10d_store.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
import time

import torch.distributed as dist

from samestep.launcher.contract import WorkerEnv

_NEWEST = "samestep/newest"
_LOOK_AGAIN = dt.timedelta(seconds=0.2)


class JoinTimeoutError(Exception):
    """Some ranks never came; `missing` are their numbers."""

    def __init__(self, missing: list[int], seconds: float) -> None:
        self.missing = missing
        ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
        super().__init__(f"{ranks} did not join within {seconds:g} s")


def agents_store(env: WorkerEnv, timeout: dt.timedelta) -> dist.Store:
    """This start's part of the store that the agent serves.

    Raises:
        JoinTimeoutError: some ranks did not come in time.
        DistNetworkError: nobody serves a store at the address.
    """
    store = dist.TCPStore(
        env.master_addr, env.master_port, env.world_size, is_master=False, timeout=timeout, wait_for_workers=False
    )
    return meet_anew(store, env.rank, env.world_size, timeout.total_seconds())


def meet_anew(store: dist.Store, rank: int, world_size: int, seconds: float) -> dist.Store:
    """A part of `store` in which only ranks of this start write.

    Raises:
        JoinTimeoutError: some ranks did not come in time; rank zero knows which.
    """
    return _open(store, world_size, seconds) if rank == 0 else _find(store, rank, seconds)


def _open(store: dist.Store, world_size: int, seconds: float) -> dist.Store:
    name = f"samestep/{secrets.token_hex(8)}"
    store.set(_NEWEST, name)
    places = [_place(name, rank) for rank in range(1, world_size)]
    try:
        store.wait(places, dt.timedelta(seconds=seconds))
    except dist.DistStoreError as error:
        missing = [rank for rank, place in enumerate(places, 1) if not store.check([place])]
        if missing:
            raise JoinTimeoutError(missing, seconds) from error
    store.set(f"{name}/complete", "")
    return dist.PrefixStore(name, store)


def _find(store: dist.Store, rank: int, seconds: float) -> dist.Store:
    end, name, ours = time.monotonic() + seconds, "", False
    while time.monotonic() < end:
        with contextlib.suppress(dist.DistStoreError):  # nobody has come yet
            store.wait([f"{name}/complete" if ours else _NEWEST], _LOOK_AGAIN)
            if ours:
                return dist.PrefixStore(name, store)
        newest = store.get(_NEWEST).decode() if store.check([_NEWEST]) else ""
        if newest != name:
            name, ours = newest, store.add(_place(newest, rank), 1) == 1
        elif not ours:
            time.sleep(_LOOK_AGAIN.total_seconds() / 4)  # an earlier start's: rank zero of ours is still to come
    raise JoinTimeoutError([0], seconds)


def _place(name: str, rank: int) -> str:
    return f"{name}/place/{rank}"
