"""From an empty or used run directory to the point where training begins or goes on."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from samestep.launcher.contract import RankInfo, RunDir, UsageError
from samestep.train import environment
from samestep.train.config import TrainConfig
from samestep.train.loop import Run
from samestep.train.parallel.group import Membership
from samestep.train.state import checkpoint

# Options that may change between two starts of a run without anybody noticing.
_FREE = frozenset(
    "epochs max_steps log_every eval_every checkpoint_every checkpoint_seconds keep_checkpoints "
    "resume run_dir num_workers config shards threads weights best".split()
)
# Events that describe starts and faults, not training: they stay when a resume cuts what is done again.
_LIFECYCLE = frozenset({"run_started", "restarted", "resumed", "worker_failed", "warning"})


def make(run_dir: RunDir) -> None:
    """Create the run directory and see that it can be written.

    Raises:
        UsageError: it can't.
    """
    try:
        for folder in (run_dir.path, run_dir.logs, run_dir.checkpoints, run_dir.errors):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = run_dir.path / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"--run-dir is expected to be a folder that can be written, but {run_dir.path}: {error.strerror}",
            "pass --run-dir with another folder",
        ) from None


def stored_config(run_dir: RunDir) -> dict[str, Any]:
    """What an earlier start of this run wrote; empty for a new one."""
    try:
        stored = json.loads(run_dir.config.read_text())
        return stored if isinstance(stored, dict) else {}
    except (OSError, ValueError):
        return {}


def choose_shards(config: TrainConfig, stored: dict[str, Any], world_size: int) -> int:
    """V: as at the first launch; by default the world size of that launch.

    Raises:
        UsageError: `--shards` says another number than the first launch.
    """
    known = stored.get("shards")
    if known is not None and config.shards not in (None, known):
        raise UsageError(
            f"--shards is expected to stay {known}, as at the first launch of this run, but is {config.shards}",
            "leave --shards out, or start a new run with another --run-dir",
        )
    return int(known or config.shards or world_size)


def choose_checkpoint(
    run_dir: RunDir, config: TrainConfig, member: Membership
) -> tuple[checkpoint.Snapshot | None, str, list[str]]:
    """The state to go on from, its folder's name, and warnings; rank zero looks, all ranks load. A collective.

    Raises:
        UsageError: see `checkpoint.find`.
    """
    found: dict[str, Any] = {"path": "", "warnings": []}
    if member.group.rank == 0:
        checkpoint.remove_unfinished(run_dir)
        path, damaged = checkpoint.find(run_dir, config.resume)
        for folder, problem in damaged:
            aside = checkpoint.set_aside(folder)
            found["warnings"].append(f"checkpoint {folder.name} is damaged ({problem}); set aside as {aside.name}")
        found["path"] = str(path or "")
    found = json.loads(member.group.gather_bytes(json.dumps(found).encode())[0])
    if not found["path"]:
        if member.group.rank == 0:
            cut_events(run_dir, 0, 0)
        return None, "", found["warnings"]
    snapshot = checkpoint.load(Path(found["path"]))
    if member.group.rank == 0:
        cut_events(run_dir, snapshot.state["events_offset"], snapshot.step)
    return snapshot, Path(found["path"]).name, found["warnings"]


def cut_events(run_dir: RunDir, offset: int, step: int) -> None:
    """Drop events of what comes after `step` and will be done again; what tells of starts and faults stays.

    A checkpoint's own event, and the end of a run that ended with it, were written behind the offset that it holds.
    """
    if not run_dir.events.exists():
        return
    content = run_dir.events.read_bytes()
    kept = [line for line in content[offset:].splitlines(keepends=True) if _is_kept(line, step)]
    temporary = run_dir.events.with_suffix(".tmp")
    temporary.write_bytes(content[:offset] + b"".join(kept))
    temporary.rename(run_dir.events)


def _is_kept(line: bytes, step: int) -> bool:
    try:
        event = json.loads(line)
        done = {"checkpoint": "step", "run_finished": "steps"}.get(event.get("event"))
        kept = event[done] <= step if done else event.get("event") in _LIFECYCLE
    except (ValueError, AttributeError, KeyError, TypeError):
        return False
    return line.endswith(b"\n") and bool(kept)


def restore(run: Run, snapshot: checkpoint.Snapshot, source: str) -> None:
    """Load a snapshot into the parts of a run.

    Raises:
        UsageError: seed, order or dataset are not those of the snapshot, or the model has other names or shapes.
    """
    for name in ("seed", "order", "dataset"):
        before, now = snapshot.facts.get(name), run.state.facts[name]
        if before != now:
            raise UsageError(
                f"{name} is expected to be as in {source}, but changed from {before} to {now}",
                "samples would be repeated and left out: restore it, or start a new run with another --run-dir",
            )
    try:
        run.state.restore(snapshot)
    except (RuntimeError, ValueError, KeyError) as error:
        first = " ".join(str(error).split())[:300]
        raise UsageError(
            f"model and optimizer are expected to fit {source}, but do not: {first}",
            "restore the code of the first launch, or start a new run with another --run-dir",
        ) from error


def changes(config: TrainConfig, stored: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Sentences about settings that are not as at the last start and can change bits, though not order or shapes."""
    before, after = stored.get("config", {}), plain(config)
    differing = [(f"--{name.replace('_', '-')}", before[name], after[name]) for name in after if name in before]
    differing = [(name, old, new) for name, old, new in differing if name[2:].replace("-", "_") not in _FREE]
    differing += [(name, old, record.get(name)) for name, old in stored.get("environment", {}).items()]
    return [
        f"{name} changed from {old} to {new} since the last start: the bits of the following steps can differ"
        for name, old, new in differing
        if old != new and name != "python"
    ]


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Start from a plain state_dict in safetensors; nothing else is accepted, since only it can't run code.

    Raises:
        UsageError: not such a file, or other names and shapes than the model's.
    """
    try:
        weights = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(
            f"--weights is expected to be a safetensors file, but {path} is not one ({error})",
            "convert a trusted pickle once: safetensors.torch.save_file(state_dict, path)",
        ) from None
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UsageError(
            f"--weights is expected to fit the model, but {path} does not: {' '.join(str(error).split())[:300]}"
        ) from None


def announce(run: Run, run_dir: RunDir, member: Membership, shards: int, generation: int) -> None:
    """Write config.json and the first event; needs every rank's place. A collective."""
    here = RankInfo(rank=member.env.rank, local_rank=member.env.local_rank, host=socket.gethostname(), pid=os.getpid())
    ranks = [json.loads(part) for part in member.group.gather_bytes(json.dumps(here).encode())]
    if member.group.rank == 0:
        content = {
            "config": plain(run.config),
            "shards": shards,
            "total_steps": run.max_steps,
            "samples": run.sampler.samples,
            "threads": torch.get_num_threads(),
            "seed": run.config.seed,
            "dataset": run.state.facts["dataset"],
            "environment": environment.record(member.device),
        }
        run_dir.config.write_text(json.dumps(content, indent=1) + "\n")
    run.reporter.started(max(generation, run.state.restarts), shards, ranks)


def plain(config: TrainConfig) -> dict[str, Any]:
    """The options as JSON values."""
    values = asdict(config)
    return {n: v if isinstance(v, bool | int | float | str | list | dict | None) else str(v) for n, v in values.items()}
