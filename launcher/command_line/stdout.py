"""What the command says goes to a stdout that may be closed, full, or read by somebody who has left."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_SPELLED = "samestep.spelled"  # name of a way to handle errors, as "strict" is


class RefusedError(Exception):
    """Stdout can't be written to; the text says why."""


def prepare() -> None:
    """Where stdin, stdout or stderr is closed, /dev/null takes its place: what is opened next would get its number.

    Paths that are not UTF-8 are printed as they are. With PYTHONUNBUFFERED, stdout gets a buffer of a line: without
    any, what could not be written would be forgotten, and `flushed` would not know.
    """
    open_all()
    if isinstance(sys.stdout, io.TextIOWrapper) and not isinstance(sys.stdout.buffer, io.BufferedWriter):
        sys.stdout = open(sys.stdout.fileno(), "w", 1, sys.stdout.encoding, closefd=False)  # noqa: SIM115 (see above)
    spell_out()


def open_all() -> None:
    """/dev/null takes the place of a descriptor that is closed, and of a stream that is closed or None."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, Path(os.devnull).open("w" if fd else "r"))  # noqa: SIM115 (as long as the process lives)


def spell_out() -> None:
    """What stdout's encoding lacks is printed as escapes, and the bytes of a path that is not UTF-8 as they are."""
    codecs.register_error(_SPELLED, _spelled)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_SPELLED)


def _spelled(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    escaped = (c.encode("utf-8", "surrogateescape") if "\udc80" <= c <= "\udcff" else _escape(c) for c in part)
    return b"".join(escaped), error.end


def _escape(character: str) -> bytes:
    return character.encode("ascii", "backslashreplace")


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """All that was printed is written on leaving.

    Raises:
        BrokenPipeError: the reader has left.
        RefusedError: it can't be written.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _blame(error)
        raise


def _blame(seen: OSError) -> None:
    """What could not be written stays in the buffer and fails again; what was too long for it is gone: a line fails."""
    try:
        sys.stdout.flush()
        if seen.filename is None and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            os.write(sys.stdout.fileno(), b"\n")
    except OSError as error:
        raise RefusedError(error.strerror or str(error)) from None


@contextlib.contextmanager
def until_the_reader_leaves() -> Iterator[None]:
    """A page of which `head` reads the beginning has been printed."""
    spell_out()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        mute()
    except SystemExit:
        pass  # rich has seen it, and has muted stdout


def mute() -> None:
    """Nothing that is still to be written is heard, or fails."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
