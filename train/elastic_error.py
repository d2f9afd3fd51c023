"""What a failed rank leaves for torchrun and `accelerate launch`: the block that ends their run tells the cause by it.

The form is that of torch.distributed.elastic.multiprocessing.errors (ErrorHandler.record_exception), without its
`py_callstack`, in whose place the message is shown: the traceback has been printed before. The first of all failures by
timestamp, in whole seconds, is called the root cause, so times are rounded up where a rank only followed another.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from samestep.launcher.contract import ENV_LAUNCHED, ErrorRecord, UsageError
from samestep.launcher.heartbeat import where

_NS = 1_000_000_000
FOLLOWED = "stopped: the connection to another rank broke"


def below_agent(environ: Mapping[str, str]) -> bool:
    """Whether torchrun or `accelerate launch` started this rank."""
    return bool(environ.get("TORCHELASTIC_RUN_ID")) and not environ.get(ENV_LAUNCHED)


def write(record: ErrorRecord, environ: Mapping[str, str]) -> None:
    """Put a record where the agent of this rank reads, if one started it; a full disk hides no failure."""
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or not below_agent(environ):
        return
    seconds = -(-record.time_ns // _NS) if record.consequence else record.time_ns // _NS
    message = {"message": _sentence(record), "errorCode": record.exit_code, "extraInfo": {"timestamp": str(seconds)}}
    try:
        Path(path).write_text(json.dumps({"message": message}))
    except OSError as problem:
        sys.stderr.write(f"warning: no error record in {path}: {problem}\n")


def _sentence(record: ErrorRecord) -> str:
    if record.consequence and not record.final:
        return FOLLOWED
    usage = record.kind == UsageError.__name__
    what = record.message if usage else f"{record.kind}: {record.message}".removesuffix(": ")
    place = [f"at {record.frame}" if record.frame else "", where(record.step, record.phase), f"phase {record.phase}"]
    found = "" if usage else ", ".join(filter(None, place))
    return "\n".join(filter(None, [what, found, f"hint: {record.hint}" if record.hint else ""]))
