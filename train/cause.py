"""Pure: what an exception says to people: its kind, one message that names the sample, the user's frame.

An error in a data loading process arrives as text: torch re-creates it in the rank with the whole traceback as its
message (torch/_utils.py, ExceptionWrapper), and the frames that count are in that text.
"""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path

from samestep.launcher.diagnosis.traceback_text import is_ours, last_exception

_OURS = str(Path(__file__).parent) + os.sep
_MOST_CHARACTERS = 4000
_NOTE = "samestep: raised by "
_NOTED = re.compile(rf"^{_NOTE}(?P<what>.+)$", re.MULTILINE)
_CAUGHT = re.compile(r"^Caught (?P<kind>\S+) in DataLoader worker process (?P<worker>\d+)\.\s+Original ")


@dataclass(frozen=True, slots=True)
class Cause:
    """`frame` is "file:line in function", empty where none is the user's."""

    kind: str
    message: str
    frame: str


def blame(error: BaseException, what: str) -> None:
    """Note which part of the data raised `error`, which the caller raises again; the first to know wins.

    Raises:
        RuntimeError: in place of an exception that would not arrive: it ends a generator, or a data loading process.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return
    if isinstance(error, StopIteration | StopAsyncIteration) or not isinstance(error, Exception):
        told = RuntimeError(f"raised {type(error).__name__}" + (f": {error}" if str(error) else ""))
        blame(told, what)
        raise told.with_traceback(error.__traceback__) from None
    if not any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
        error.add_note(f"{_NOTE}{what}")


def cause_of(error: BaseException) -> Cause:
    """What to tell of an exception."""
    text = error.args[0] if isinstance(error, KeyError) and error.args and _CAUGHT.match(str(error.args[0])) else error
    message = str(text)
    caught = _CAUGHT.match(message)
    if caught is None:
        noted = _NOTED.search("\n".join(getattr(error, "__notes__", ())))
        told = _with(_cut(message), noted["what"] if noted else "")
        return Cause(type(error).__name__, told, _user_frame(error))
    said = last_exception(message.replace("Original Traceback", "Traceback", 1).splitlines())
    noted = _NOTED.search(message)
    where = [noted["what"]] if noted else []
    told = _with(
        _cut(said.message if said else message), ", ".join([*where, f"in DataLoader worker {caught['worker']}"])
    )
    return Cause(caught["kind"], told, said.frame if said else _user_frame(error))


def _cut(message: str) -> str:
    """What people read; an exception may quote a whole batch, and the log has all of it."""
    left = len(message) - _MOST_CHARACTERS
    return message if left <= 0 else f"{message[:_MOST_CHARACTERS]} ... and {left} characters more, in the log"


def _with(message: str, what: str) -> str:
    """The first line with what raised it, then the rest."""
    if not what:
        return message
    first, newline, rest = message.partition("\n")
    return f"{first} ({what}){newline}{rest}".strip()


def _user_frame(error: BaseException) -> str:
    """Innermost frame that is neither ours nor a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    others = (_OURS, sysconfig.get_path("stdlib") + os.sep, "<")
    own = [
        f for f in frames if not ("site-packages" in f.filename or is_ours(f.filename) or f.filename.startswith(others))
    ]
    if not own:
        return ""
    frame = own[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"
