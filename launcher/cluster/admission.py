"""The key of a run and the head's address, in `RUN_DIR/nodes.json` (0600), which every machine of the run must see.

Who can read the run directory may take part. `SAMESTEP_TOKEN`, if set, is needed besides: for file systems that others
can read.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from samestep.launcher.contract import ENV_TOKEN, RunDir


@dataclass(frozen=True, slots=True)
class Admission:
    """What a launcher needs to call the head."""

    key: bytes
    address: str
    port: int


def publish(run_dir: RunDir, environ: Mapping[str, str], address: str, port: int) -> Admission:
    """Make a new key and publish it; launchers of an earlier start are strangers from now on.

    Raises:
        OSError: the run directory can't be written.
    """
    token = secrets.token_hex(32)
    path = _path(run_dir)
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"token": token, "address": address, "port": port}, file)
    temporary.rename(path)
    return Admission(_key(token, environ), address, port)


def withdraw(run_dir: RunDir) -> None:
    """The run is over: nobody is to call any more."""
    _path(run_dir).unlink(missing_ok=True)


def read(run_dir: RunDir, environ: Mapping[str, str]) -> Admission | None:
    """What the head has published, None if there is nothing that can be read."""
    try:
        found = json.loads(_path(run_dir).read_text())
        return Admission(_key(str(found["token"]), environ), str(found["address"]), int(found["port"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _path(run_dir: RunDir) -> Path:
    return run_dir.path / "nodes.json"


def _key(token: str, environ: Mapping[str, str]) -> bytes:
    return hashlib.sha256(f"{token}\n{environ.get(ENV_TOKEN, '')}".encode()).digest()
