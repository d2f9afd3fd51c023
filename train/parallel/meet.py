"""How ranks find each other whose launcher names no address (`mpirun`, `srun`): through the run directory they share.

Rank zero opens a socket, on loopback if all ranks are on its machine and on one chosen interface otherwise, and
publishes its address under the name of the job. A file of an earlier start may still lie there: who finds nobody
under its address, or its own place taken, looks again until rank zero has replaced it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import socket
import time
from collections.abc import MutableMapping
from pathlib import Path

import torch.distributed as dist

from samestep.launcher import interfaces
from samestep.launcher.contract import UsageError, WorkerEnv
from samestep.launcher.who_started import exported

_LOOK_AGAIN_S = 0.05


def meet(
    env: WorkerEnv, run_dir: Path, environ: MutableMapping[str, str], timeout: dt.timedelta
) -> tuple[dist.TCPStore, Path]:
    """The store of this start, and the file that led to it, which rank zero removes when all have met.

    `environ` gets torchrun's names for the rank, and gloo's interface.

    Raises:
        UsageError: rank zero has not been found in time.
    """
    path = run_dir / f"meeting-{env.job}.json"
    if env.rank == 0:
        store, address, port = _open(env, path, environ, timeout)
    else:
        store, address, port = _find(env, path, timeout)
    environ.update(exported(env, address, port))
    if not environ.get("GLOO_SOCKET_IFNAME"):
        environ["GLOO_SOCKET_IFNAME"] = interfaces.interface_toward(address, port) or "lo"
    return store, path


def _open(
    env: WorkerEnv, path: Path, environ: MutableMapping[str, str], timeout: dt.timedelta
) -> tuple[dist.TCPStore, str, int]:
    alone = env.local_world_size == env.world_size
    address = "127.0.0.1" if alone else interfaces.reachable_address(environ.get("MASTER_ADDR", ""))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, env.master_port), family=family, backlog=1024)
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        address,
        port,
        env.world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    temporary.write_text(json.dumps({"address": address, "port": port, "world_size": env.world_size}))
    temporary.chmod(0o600)
    temporary.rename(path)
    return store, address, port


def _find(env: WorkerEnv, path: Path, timeout: dt.timedelta) -> tuple[dist.TCPStore, str, int]:
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(path.read_text())
            address, port = str(found["address"]), int(found["port"])
            socket.create_connection((address, port), timeout=5).close()  # torch's client would wait for long
            store = dist.TCPStore(
                address, port, env.world_size, is_master=False, timeout=timeout, wait_for_workers=False
            )
            if store.add(f"samestep/place/{env.rank}", 1) == 1:
                return store, address, port
        time.sleep(_LOOK_AGAIN_S)
    raise UsageError(
        f"rank {env.rank} is expected to find rank zero through {path} within {timeout.total_seconds():.0f} s, "
        "but does not",
        "all machines need the same run directory: pass --run-dir with a folder on a shared file system",
    )
