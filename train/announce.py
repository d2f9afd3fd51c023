"""What is told before the first step: config.json, the first event, who started the ranks, and all warnings so far."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import torch

from samestep.launcher import who_started
from samestep.launcher.contract import RankInfo, WorkerEnv
from samestep.train import environment, sources
from samestep.train.accelerate_settings import fewer_than_asked, not_followed
from samestep.train.config import plain
from samestep.train.fused import fused_hint
from samestep.train.joined import Joined
from samestep.train.loop import Run
from samestep.train.observe.memory import memory_at_start
from samestep.train.parallel.group import gather_json
from samestep.train.prepared import Prepared
from samestep.train.start import Found


def announce(prepared: Prepared, joined: Joined) -> None:
    """Tell people and programs. A collective."""
    run, found, member = prepared.run, prepared.found, joined.member
    _record(run, found, joined)
    _say_who_started(member.env)
    alone = "" if member.env.distributed else fewer_than_asked(os.environ, environment.parent_command())
    for text in filter(None, [alone, *not_followed(run.config, os.environ), *prepared.warnings]):
        run.reporter.warning(text)
    if found.note:
        run.reporter.note(found.note)
    if found.snapshot is not None:
        run.reporter.resumed(run.state.step, run.state.epoch, found.source)
    if run.config.trackers:
        member.group.barrier()  # starting them takes rank zero seconds, which would count as the first step of others


def _record(run: Run, found: Found, joined: Joined) -> None:
    """Write config.json and the first event; needs every rank's place. A collective."""
    member, shards, run_dir = joined.member, joined.shards, joined.call.run_dir
    env, parts = member.env, run.step.micro_batches.agreed.count
    memory = memory_at_start(run.components.model, env.rank, env.world_size, shards, parts)
    host, pid = socket.gethostname(), os.getpid()
    here: RankInfo = {"rank": env.rank, "local_rank": env.local_rank, "host": host, "pid": pid, **memory}
    ranks = gather_json(member.group, here)
    problem = ""
    if member.group.rank == 0:
        content = {
            "config": plain(run.config),
            "begun": found.begun,
            "shards": shards,
            "micro_batches": parts,
            "total_steps": run.max_steps,
            "samples": run.sampler.samples,
            "threads": torch.get_num_threads(),
            "exchange": run.step.shards.reducer.exchange.through if env.world_size > 1 else "",
            "seed": run.config.seed,
            "dataset": run.state.facts["dataset"],
            "environment": environment.record(member.device),
            "code": sources.of_recipe(),
        }
        problem = _replace(run_dir.config, json.dumps(content, indent=1) + "\n")
    run.reporter.started(max(joined.call.generation, run.state.restarts), shards, ranks, run.max_steps)
    if problem:
        run.reporter.warning(f"{run_dir.config} could not be written ({problem}); training goes on")
    for hint in filter(None, [fused_hint(run.components.optimizer, member.device)]):
        run.reporter.note(hint)


def _replace(path: Path, text: str) -> str:
    """Write a file whole or leave the old one; why it could not be written, or an empty string."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(text)
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        return error.strerror or str(error)
    return ""


def _say_who_started(env: WorkerEnv) -> None:
    """Once, unless it is our own launcher, whose user knows."""
    if env.rank == 0 and env.started_by != "samestep run":
        print(who_started.describe(env), end="", file=sys.stderr, flush=True)
