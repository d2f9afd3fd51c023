"""sha256 of what a safetensors file holds: the number by which two runs are compared.

Canonical form, for every tensor in the order of its sorted name: `name NUL dtype NUL d0,d1,... NUL bytes`, where name
is without the wrappers `module.` and `_orig_mod.`, dtype is the format's own word (F32, BF16, I64, ...) and bytes are
little endian, row major. File format: 8 bytes header length, JSON header {name: {dtype, shape, data_offsets}}, data;
see https://huggingface.co/docs/safetensors/index#format. Standard library only, so anybody can check a file with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from samestep.launcher.contract import MANIFEST, OPTIMIZER, STATE, WEIGHTS, ExitCode, RunDir, UsageError
from samestep.launcher.manifest import CHUNK_BYTES, newest_valid, verify

ALIASES = "samestep.aliases"  # metadata key: names of tied tensors that repeat another name's tensor
_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod)\.")
_NAME_ONE = "name a run directory, a checkpoint folder or a .safetensors file"
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit


def clean_name(name: str) -> str:
    """Parameter name without the wrappers of DistributedDataParallel and torch.compile."""
    while True:
        shorter = _WRAPPERS.sub(r"\1", name)
        if shorter == name:
            return name
        name = shorter


def tensor_header(name: str, dtype: str, shape: Iterable[int]) -> bytes:
    """What precedes a tensor's bytes in the canonical form."""
    return f"{clean_name(name)}\0{dtype}\0{','.join(map(str, shape))}\0".encode()


def file_digest(path: Path) -> str:
    """64 hex characters for one safetensors file.

    Raises:
        ValueError: the file is not in safetensors format, or shorter than its header says.
        OSError: it can't be read.
    """
    sha = hashlib.sha256()
    for _, part in _canonical(path):
        sha.update(part)
    return sha.hexdigest()


def tensor_digests(path: Path) -> dict[str, str]:
    """sha256 of each tensor of a safetensors file by its clean name, to find which one differs.

    Raises:
        ValueError: the file is not in safetensors format.
        OSError: it can't be read.
    """
    shas: dict[str, Any] = {}
    for name, part in _canonical(path):
        shas.setdefault(name, hashlib.sha256()).update(part)
    return {name: sha.hexdigest() for name, sha in shas.items()}


def _canonical(path: Path) -> Iterator[tuple[str, bytes]]:
    """The canonical form in parts, each with the clean name of the tensor that it belongs to."""
    with path.open("rb") as file:
        header, data_start = _read_header(file, path)
        for name in sorted(header, key=clean_name):
            entry = header[name]
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end:
                raise ValueError(f"{path} has no bytes {begin} to {end} for tensor {name}")
            yield clean_name(name), tensor_header(name, entry["dtype"], entry["shape"])
            file.seek(data_start + begin)
            remaining = end - begin
            while remaining > 0:
                chunk = file.read(min(CHUNK_BYTES, remaining))
                if not chunk:
                    raise ValueError(f"{path} ends inside tensor {name}")
                yield clean_name(name), chunk
                remaining -= len(chunk)


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    size = int.from_bytes(file.read(8), "little")
    if not 0 < size <= _MAX_HEADER_BYTES:
        raise ValueError(f"{path} is not a safetensors file")
    try:
        header = json.loads(file.read(size))
    except ValueError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    for alias in json.loads(metadata.get(ALIASES, "{}")):
        header.pop(alias, None)
    return header, 8 + size


def state_digest(folder: Path) -> str:
    """Digest of all of a checkpoint's state that training depends on: weights, optimizer, scheduler, scaler, position.

    Times, restarts and the place in the event file are left out: they differ between runs that are the same.
    """
    state = json.loads((folder / STATE).read_text())
    kept = {name: state[name] for name in ("model", "aliases", "trees", "tree_aliases")}
    position = {name: state["counters"][name] for name in ("step", "epoch", "cursor")}
    text = json.dumps([file_digest(folder / WEIGHTS), file_digest(folder / OPTIMIZER), kept, position], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def path_digest(path: Path, *, whole_state: bool = False) -> str:
    """Digest of a run directory (its newest valid checkpoint), a checkpoint folder or a safetensors file.

    With `whole_state` not of the weights alone, but see `state_digest`; a safetensors file then is not enough.

    Raises:
        UsageError: `path` is none of these or can't be read, or (exit code 78) what it holds is damaged.
    """
    try:
        if path.is_dir():
            folder = _sound(path) if (path / MANIFEST).exists() else _newest(path)
            return state_digest(folder) if whole_state else file_digest(folder / WEIGHTS)
        if whole_state:
            problem = f"--state is expected to go with a run directory or checkpoint folder, but {path} is neither"
            raise UsageError(problem, "leave --state out for the weights alone")
        return file_digest(path)
    except OSError as error:
        raise UsageError(f"{error.filename or path} can't be read: {error.strerror}", _NAME_ONE) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(str(error), _NAME_ONE) from None


def _sound(checkpoint: Path) -> Path:
    problem = verify(checkpoint)
    if problem:
        raise UsageError(
            f"{checkpoint} is not a valid checkpoint: {problem}",
            "name its run directory for the newest that is valid",
            ExitCode.NO_CHECKPOINT,
        )
    return checkpoint


def _newest(run: Path) -> Path:
    newest, damaged = newest_valid(RunDir(run).checkpoints)
    if newest is None:
        reason = "; ".join(f"{bad.name}: {why}" for bad, why in damaged) or "it has no checkpoint"
        code = ExitCode.NO_CHECKPOINT if damaged else ExitCode.USAGE
        raise UsageError(f"{run} is expected to hold a valid checkpoint, but {reason}", _NAME_ONE, code)
    return newest
