"""What makes a checkpoint folder valid: its MANIFEST.json and the files that it names.

MANIFEST.json is `{"format": 1, "step": ..., "files": {name: {"size": bytes, "sha256": hex}}, ..., "sha256": hex}` in
canonical JSON (sorted keys, indent 1), where the last key hashes the rest; a change of any byte is seen. Standard
library only: launcher and worker use the same code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samestep.launcher.contract import MANIFEST

FORMAT = 1
CHUNK_BYTES = 16 << 20  # large: a background thread asks for the interpreter lock once a chunk
_FOLDER = re.compile(r"step-(\d{8,})")


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def encode(content: Mapping[str, Any]) -> bytes:
    """Bytes of a manifest with `content` (without `sha256`, which is added)."""
    body = json.dumps(content, sort_keys=True, indent=1)
    return json.dumps(
        {**content, "sha256": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True, indent=1
    ).encode()


def read(folder: Path) -> dict[str, Any]:
    """Content of a folder's manifest.

    Raises:
        ValueError: it is missing, unreadable, changed since it was written, or of another format.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
        content = json.loads(raw)
        stored = content.pop("sha256", None)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{MANIFEST} can't be read ({type(error).__name__})") from None
    if content.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} has format {content.get('format')!r}, expected {FORMAT}")
    if stored is None or encode(content) != raw:
        raise ValueError(f"{MANIFEST} was changed after it was written")
    return dict(content)


def verify(folder: Path) -> str:
    """Why `folder` is not a valid checkpoint, or an empty string. Reads and hashes every byte."""
    try:
        content = read(folder)
    except ValueError as error:
        return str(error)
    named = _FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != content["step"]:
        return f"{MANIFEST} is of step {content['step']}"
    for name, entry in sorted(content["files"].items()):
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes, expected {entry['size']}"
            if file_sha256(path) != entry["sha256"]:
                return f"{name} was changed after it was written (sha256 differs)"
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
    return ""


def step_of(folder: Path) -> int:
    """Optimizer steps that a checkpoint folder's name says."""
    return int(folder.name.removeprefix("step-"))


def is_step(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint, not of one that was set aside."""
    return _FOLDER.fullmatch(folder.name) is not None


def committed(checkpoints: Path) -> list[Path]:
    """Checkpoint folders below `checkpoints`, newest first, verified or not."""
    try:
        found = [path for path in checkpoints.iterdir() if is_step(path) and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=step_of, reverse=True)


def newest_step(checkpoints: Path) -> int:
    """Optimizer steps of the newest checkpoint folder, verified or not; -1 where there is none."""
    newest = committed(checkpoints)
    return step_of(newest[0]) if newest else -1


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest folder that verifies, and the newer ones that do not, each with the reason."""
    damaged: list[tuple[Path, str]] = []
    for folder in committed(checkpoints):
        problem = verify(folder)
        if not problem:
            return folder, damaged
        damaged.append((folder, problem))
    return None, damaged
