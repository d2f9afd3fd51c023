"""`samestep doctor`: gather, judge, print. What needs torch runs in other processes, the ranks through our launcher."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from samestep.launcher.command_line.options import Option
from samestep.launcher.contract import ENV_RUN_DIR, ExitCode, UsageError
from samestep.launcher.doctor import machine, verdict
from samestep.launcher.doctor.verdict import Row

_PROGRAM = "samestep.train.doctor"
_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Options of `samestep doctor`."""

    run_dir: Annotated[Path, Option("folder whose disk is measured", "folder")] = Path("runs")
    nproc_per_node: Annotated[int, Option("ranks that measure the way between them; 1: none", "ranks")] = 2
    timeout: Annotated[float, Option("time that each program which uses torch may take", "seconds")] = 120.0
    quiet: Annotated[bool, Option("show warnings and errors only", negative="")] = False
    json: Annotated[bool, Option("print rows and facts as JSON instead of a table", negative="")] = False

    def __post_init__(self) -> None:
        """Judge the numbers.

        Raises:
            UsageError: no ranks, or no time.
        """
        if self.nproc_per_node < 1:
            raise UsageError(
                f"--nproc-per-node is expected to be at least 1, but is {self.nproc_per_node}",
                "1 measures nothing between ranks; leave it out for 2",
            )
        if not self.timeout > 0:
            raise UsageError(
                f"--timeout is expected to be above 0 seconds, but is {self.timeout}", "leave it out for 120 seconds"
            )


def doctor(config: DoctorConfig, environ: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Print the table, or JSON; 1 if a row is an error."""
    facts = machine.inspect(environ, config.run_dir)
    alone = {name: value for name, value in environ.items() if name not in _RANK}
    facts["torch"] = _answer([sys.executable, "-m", _PROGRAM], alone, config.timeout)
    facts["links"] = {} if config.nproc_per_node < 2 else _links(config, facts["torch"], alone)
    rows = verdict.judge(facts)
    level = verdict.worst(rows)
    if config.json:
        say(json.dumps({"level": level, "rows": [asdict(row) for row in rows], "facts": facts}))
    else:
        for line in table([row for row in rows if not config.quiet or row.level != "ok"]):
            say(line)
    return ExitCode.FAILED if level == "error" else ExitCode.DONE


def table(rows: list[Row]) -> list[str]:
    """Lines for people; a hint goes below its row."""
    name = max((len(row.name) for row in rows), default=0)
    lines = []
    for row in rows:
        lines.append(f"{row.level:<7}  {row.name:<{name}}  {row.value}")
        if row.hint:
            lines.append(f"{'':<7}  {'':<{name}}  hint: {row.hint}")
    return lines


def _links(config: DoctorConfig, torch: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    backends = ["gloo"] if torch.get("gloo") else []
    if torch.get("nccl") and len(torch.get("devices", [])) >= config.nproc_per_node:
        backends.append("nccl")
    return {backend: _measure(backend, config, environ) for backend in backends}


def _measure(backend: str, config: DoctorConfig, environ: Mapping[str, str]) -> dict[str, Any]:
    """Ranks as `samestep run` starts them for a script: one program each, meeting on loopback."""
    with tempfile.TemporaryDirectory(prefix="samestep-doctor-") as folder:
        command = [sys.executable, "-m", "samestep.launcher", "run", "--nproc-per-node", str(config.nproc_per_node)]
        command += [
            "--max-restarts",
            "0",
            "--no-warm",
            *(["--cpu"] if backend == "gloo" else []),
            "-m",
            _PROGRAM,
            backend,
        ]
        found = _answer(command, dict(environ) | {ENV_RUN_DIR: str(Path(folder) / "run")}, config.timeout)
    return {"ranks": config.nproc_per_node} | found


def _answer(command: list[str], environ: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """The JSON object in the last line of a program's stdout, or {"problem": its last word}."""
    try:
        done = subprocess.run(
            command,
            env=dict(environ),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {
            "problem": f"no answer within {seconds:g} s of --timeout"
            if isinstance(error, subprocess.TimeoutExpired)
            else str(error)
        }
    lines = done.stdout.strip().splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 else {}
    except (ValueError, IndexError):
        answer = {}
    said = done.stderr.strip().splitlines()
    return answer or {"problem": said[-1] if said else f"exit code {done.returncode}"}
