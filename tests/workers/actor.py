"""A rank that plays a part: `actor.py 0=wait 1=ignore-term,raise`. Standard library only: it starts in 20 ms.

Every rank leaves its process id in the working directory and waits until all of them have; then the parts begin.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

RANK, WORLD_SIZE = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
GENERATION = os.environ.get("SAMESTEP_GENERATION", "0")


def note(name: str, pid: int) -> None:
    """Leave a process id where the test looks for it."""
    temporary = Path(f".{name}-{pid}")
    temporary.write_text(str(pid))
    temporary.rename(name)


def meet() -> None:
    """Wait until every rank of this generation is here."""
    note(f"rank-{RANK}.generation-{GENERATION}.pid", os.getpid())
    while len(list(Path().glob(f"rank-*.generation-{GENERATION}.pid"))) < WORLD_SIZE:
        time.sleep(0.002)


def record(kind: str, *, consequence: bool, exit_code: int = 1) -> None:
    """Leave the error record that samestep.train would."""
    about = {
        "rank": int(RANK),
        "host": "here",
        "pid": os.getpid(),
        "generation": int(GENERATION),
        "step": 40,
        "phase": "forward",
        "kind": kind,
        "message": "recorded",
        "frame": "recipe.py:12 in loss",
        "traceback": "",
        "exit_code": exit_code,
        "time_ns": time.time_ns(),
        "consequence": consequence,
        "hint": "a hint from the worker",
    }
    Path(os.environ["SAMESTEP_RUN_DIR"], "errors", f"rank-{RANK}.json").write_text(json.dumps(about))


def alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # gone, before or while it is read
        return False


def spawn(name: str, *, detached: bool) -> None:
    """Start a process that ignores SIGTERM and would live for an hour."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=detached)
    note(f"{name}-{RANK}.pid", child.pid)


def act(part: str) -> None:  # noqa: C901, PLR0912, PLR0915 (a list of one-liners)
    """Play one part of a comma-separated list."""
    word, _, value = part.partition(":")
    if word in ("first", "later"):  # only in the first generation, or only in those after it
        if (GENERATION == "0") == (word == "first"):
            act(value)
        return
    match word:
        case "wait":
            note(f"waiting-{RANK}.pid", os.getpid())
            threading.Event().wait()
        case "ignore-term":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        case "exit-on-term":
            signal.signal(signal.SIGTERM, lambda *_: os._exit(int(value)))
        case "raise":
            raise ValueError(value or "boom")
        case "victim":
            raise RuntimeError("gloo: Connection closed by peer [127.0.0.1]:4242")
        case "exit":
            sys.exit(int(value))
        case "signal":
            os.kill(os.getpid(), int(value))
        case "record":
            record(value, consequence=False)
        case "record-usage":
            record(value, consequence=False, exit_code=2)
        case "record-victim":
            record(value, consequence=True)
        case "spawn":
            spawn("child", detached=False)
        case "detach":
            spawn("detached", detached=True)
        case "eat":  # all the memory that there is
            eaten = [b"x" * 1_000_000 for _ in range(100_000)]
            print(len(eaten))
        case "say":
            print(value, flush=True)
        case "complain":
            print(value, file=sys.stderr, flush=True)
        case "await-death":
            pid = int(Path(f"rank-{value}.generation-{GENERATION}.pid").read_text())
            while alive(pid):
                time.sleep(0.002)
        case "await-waiting":
            while not Path(f"waiting-{value}.pid").exists():
                time.sleep(0.002)
        case _:
            raise SystemExit(f"unknown part {part}")


if __name__ == "__main__":
    meet()
    for argument in sys.argv[1:]:
        rank, equals, parts = argument.partition("=")
        if equals and rank in (RANK, "*"):
            for item in parts.split(","):
                act(item)
