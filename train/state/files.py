"""Files that are whole or an OSError: what a full disk leaves is no file to anybody."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file and see it to the disk.

    Raises:
        OSError: it could not be written; safetensors has an exception of its own for that.
    """
    try:
        save_file(tensors, path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error
    sync(path)


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
