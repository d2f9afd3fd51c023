"""`train(build)`: configuration, joining, building, the loop, leaving."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.amp.grad_scaler import GradScaler

from samestep.launcher import options
from samestep.launcher.contract import ENV_GENERATION, RankInfo, RunDir, UsageError, WorkerEnv, default_run_dir
from samestep.launcher.digest import path_digest
from samestep.train import environment, leave
from samestep.train.checks import check_components, check_shard_size
from samestep.train.config import TrainConfig
from samestep.train.data.loader import build_loader
from samestep.train.data.order import SPEC
from samestep.train.data.rng import seed_everything
from samestep.train.data.sampler import SameOrderSampler
from samestep.train.evaluate import Evaluator
from samestep.train.loop import Run, run_to_the_end
from samestep.train.observe.ledger import Ledger
from samestep.train.observe.phases import CudaClock, HostClock
from samestep.train.observe.reporter import EventLog, NullReporter, RankZeroReporter, Reporter
from samestep.train.observe.tally import StepTally
from samestep.train.parallel.buffers import BufferCombiner
from samestep.train.parallel.exchange import BackendExchange, TreeExchange
from samestep.train.parallel.group import Membership, join, pick_device
from samestep.train.parallel.reduction import GradientReducer
from samestep.train.recipe import Components
from samestep.train.state import checkpoint
from samestep.train.state.saver import Saver, Schedule, WritingSaver
from samestep.train.state.train_state import TrainState
from samestep.train.step import OptimizerStep

Config = TypeVar("Config", bound=TrainConfig)


@dataclass(frozen=True, slots=True)
class Result:
    """Outcome of a run, the same on every rank.

    Attributes:
        digest: sha256 of the final weights, 64 hex characters (see `samestep digest`).
        steps: optimizer steps of the whole run.
        metrics: values of the last evaluation; empty without `eval_data`.
        run_dir: where everything of the run lies.
    """

    digest: str
    steps: int
    metrics: dict[str, float]
    run_dir: Path


@dataclass(slots=True)
class _Progress:
    """Where this rank is, for its error record."""

    step: int = 0
    phase: str = "joining"

    def __call__(self, step: int, phase: str) -> None:
        self.step, self.phase = step, phase


def train(
    build: Callable[[Config], Components],
    config_type: type[Config] = TrainConfig,  # type: ignore[assignment]
    *,
    argv: Sequence[str] | None = None,
) -> Result:
    """Train what `build` makes, as flags, environment and TOML file say, on however many ranks were started.

    Args:
        build: makes the model, data and optimizer; runs on every rank, after device and seed are set.
        config_type: TrainConfig, or a dataclass derived from it with the recipe's own options.
        argv: flags without the program's name; those of the process if None (none in a notebook).

    Raises:
        SystemExit: a mistake in usage (2) or no valid checkpoint (78); printed once, without a traceback.
        Exception: whatever user code raised, after it was recorded for the launcher.
    """
    env, progress = WorkerEnv(), _Progress()
    run_dir = RunDir(Path(os.environ.get("SAMESTEP_RUN_DIR") or default_run_dir(_program())))
    generation = int(os.environ.get(ENV_GENERATION) or 0)
    try:
        env = WorkerEnv.from_environ(os.environ)
        config = options.load(config_type, _arguments(argv), os.environ, program=Path(_program()).name)
        run_dir = RunDir(config.run_dir or run_dir.path)
        return _train(build, config, env, run_dir, generation, progress)
    except UsageError as error:
        record = leave.error_record(error, env.rank, generation, progress.step, progress.phase)
        if run_dir.path.is_dir():
            leave.write_record(record, run_dir)
        if env.rank == 0 or not leave.said_by_rank_zero(record, run_dir):
            print(error if env.rank == 0 else f"[rank {env.rank}] {error}", file=sys.stderr, flush=True)
        raise SystemExit(int(error.exit_code)) from None
    except Exception as error:
        leave.write_record(leave.error_record(error, env.rank, generation, progress.step, progress.phase), run_dir)
        if leave.is_consequence(error):
            print(f"rank {env.rank} stopped: the connection to another rank broke", file=sys.stderr, flush=True)
            raise SystemExit(1) from error
        raise


def _train(
    build: Callable[[Config], Components],
    config: Config,
    env: WorkerEnv,
    run_dir: RunDir,
    generation: int,
    progress: _Progress,
) -> Result:
    _make(run_dir)
    stored = _stored_config(run_dir)
    shards = _shards(config, stored, env.world_size)
    threads = config.threads or stored.get("threads") or environment.threads_for(shards)
    environment.pin(threads, config.allow_nondeterministic)
    member = join(env, pick_device(config.device, env))
    environment.pin(threads, config.allow_nondeterministic)  # joining may have set the thread count
    leave.end_hard(member)

    progress(0, "build")
    seed_everything(config.seed)
    components = check_components(build(config))
    components.model.to(member.device)
    run = _assemble(components, config, member, run_dir, shards, generation, progress)
    leave.end_hard(run)
    _resume(run, run_dir, config, member)
    _announce(run, run_dir, config, member, shards, generation)

    begin = time.monotonic()
    already_finished = run.state.step >= run.max_steps and bool(checkpoint.manifest.committed(run_dir.checkpoints))
    metrics = run_to_the_end(run)
    progress(run.state.step, "closing")
    member.group.barrier()
    digest = path_digest(run_dir.checkpoint(run.state.step))
    if already_finished:
        run.reporter.already_finished(digest, run.state.step)
    else:
        goodput = min(1.0, run.state.useful_seconds / max(time.monotonic() - begin, 1e-9))
        run.reporter.finished(digest, run.state.step, generation, goodput)
    member.group.barrier()
    return Result(digest, run.state.step, metrics, run_dir.path)


def _assemble(
    components: Components,
    config: TrainConfig,
    member: Membership,
    run_dir: RunDir,
    shards: int,
    generation: int,
    progress: _Progress,
) -> Run:
    """Make every part of the run and connect them."""
    group, device = member.group, member.device
    exchange_type = TreeExchange if config.reduction == "exact" else BackendExchange
    exchange = exchange_type(group.rank, group.world_size, shards)
    autocast = _autocast(config.precision, device)
    scaler = GradScaler(device.type, enabled=config.precision == "fp16")
    sampler = _sampler(components.train_data, config, member, shards, shuffle=True)
    check_shard_size(components.model, sampler.samples, config.global_batch_size, shards)
    loader = build_loader(
        components.train_data,
        sampler,
        collate_fn=components.collate_fn,
        num_workers=config.num_workers,
        device=device,
    )
    evaluator = None
    if components.eval_data is not None:
        eval_sampler = _sampler(components.eval_data, config, member, shards, shuffle=False)
        eval_loader = build_loader(
            components.eval_data,
            eval_sampler,
            collate_fn=components.collate_fn,
            num_workers=config.num_workers,
            device=device,
        )
        functions = {"loss": components.loss, **components.metrics}
        evaluator = Evaluator(functions, eval_loader, eval_sampler, group, device, config.seed, autocast)
    reporter = _reporter(run_dir, config, sampler, group.rank)
    clock = CudaClock(time.perf_counter) if device.type == "cuda" else HostClock(time.perf_counter)
    step = OptimizerStep(
        components=components,
        seed=config.seed,
        device=device,
        clip_grad_norm=config.clip_grad_norm,
        autocast=autocast,
        scaler=scaler,
        reducer=GradientReducer(
            components.model, member.accelerator, group, exchange, shards, components.find_unused_parameters
        ),
        buffers=BufferCombiner(components.model, group, exchange, shards),
        tally=StepTally(group, shards, device),
        clock=clock,
        warn=reporter.warning,
    )
    facts = {"seed": config.seed, "shards": shards, "order": SPEC, "generation": generation}
    schedule = Schedule(config.checkpoint_every, config.checkpoint_seconds, group, device)
    saver = WritingSaver(schedule, run_dir, generation, config.keep_checkpoints) if group.rank == 0 else Saver(schedule)
    return Run(
        config=config,
        components=components,
        state=TrainState(components, scaler, facts),
        loader=loader,
        sampler=sampler,
        step=step,
        ledger=Ledger(group, device),
        evaluator=evaluator,
        saver=saver,
        reporter=reporter,
        progress=progress,
    )


def _sampler(dataset: Any, config: TrainConfig, member: Membership, shards: int, *, shuffle: bool) -> SameOrderSampler:
    return SameOrderSampler(
        dataset,
        num_replicas=member.group.world_size,
        rank=member.group.rank,
        shuffle=shuffle,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        shards=shards,
    )


def _reporter(run_dir: RunDir, config: TrainConfig, sampler: SameOrderSampler, rank: int) -> Reporter:
    if rank:
        return NullReporter()
    per_epoch = -(-sampler.samples // config.global_batch_size)
    total = per_epoch * config.epochs
    return RankZeroReporter(
        log=EventLog(run_dir.events, time.time),
        epochs=config.epochs,
        steps_per_epoch=per_epoch,
        total_steps=total if config.max_steps is None else min(total, config.max_steps),
        log_every=config.log_every,
    )


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    if precision == "no":
        return contextlib.nullcontext()
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    autocast: contextlib.AbstractContextManager[None] = torch.autocast(device.type, dtype=dtype)
    return autocast


def _resume(run: Run, run_dir: RunDir, config: TrainConfig, member: Membership) -> None:
    """Load what rank zero finds, on every rank."""
    found: dict[str, Any] = {"path": "", "damaged": []}
    if member.group.rank == 0:
        checkpoint.remove_unfinished(run_dir)
        path, damaged = checkpoint.find(run_dir, config.resume)
        for folder, problem in damaged:
            aside = checkpoint.set_aside(folder)
            run.reporter.warning(f"{folder.name} is damaged ({problem}); set aside as {aside.name}")
        found = {"path": str(path or "")}
    found = json.loads(member.group.gather_bytes(json.dumps(found).encode())[0])
    if not found["path"]:
        return
    snapshot = checkpoint.load(Path(found["path"]))
    run.state.restore(snapshot)
    run.reporter.resumed(run.state.step, run.state.epoch, Path(found["path"]).name)


def _announce(run: Run, run_dir: RunDir, config: TrainConfig, member: Membership, shards: int, generation: int) -> None:
    """Write config.json and the first event; needs every rank's place."""
    here = RankInfo(rank=member.env.rank, local_rank=member.env.local_rank, host=socket.gethostname(), pid=os.getpid())
    ranks = [json.loads(part) for part in member.group.gather_bytes(json.dumps(here).encode())]
    if member.group.rank == 0:
        content = {
            "config": {name: _plain(value) for name, value in _fields(config).items()},
            "shards": shards,
            "total_steps": run.max_steps,
            "samples": run.sampler.samples,
            "threads": torch.get_num_threads(),
            "environment": environment.record(member.device),
        }
        run_dir.config.write_text(json.dumps(content, indent=1) + "\n")
    run.reporter.started(generation, shards, ranks)


def _fields(config: TrainConfig) -> dict[str, Any]:
    return asdict(config) if is_dataclass(config) else vars(config)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | list | dict | None) else str(value)


def _make(run_dir: RunDir) -> None:
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


def _stored_config(run_dir: RunDir) -> dict[str, Any]:
    """What an earlier start of this run wrote; empty for a new one."""
    try:
        stored = json.loads(run_dir.config.read_text())
        return stored if isinstance(stored, dict) else {}
    except (OSError, ValueError):
        return {}


def _shards(config: TrainConfig, stored: dict[str, Any], world_size: int) -> int:
    """V: as at the first launch; by default the world size of that launch."""
    known = stored.get("shards")
    if known is not None and config.shards not in (None, known):
        raise UsageError(
            f"--shards is expected to stay {known}, as at the first launch of this run, but is {config.shards}",
            "leave --shards out, or start a new run with another --run-dir",
        )
    return int(known or config.shards or world_size)


def _program() -> str:
    """The recipe as it was started."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name not in ("__main__", "ipykernel_launcher"):
        return str(spec.name).removesuffix(".__main__")
    return "notebook" if _in_notebook() else (sys.argv[0] or "run")


def _arguments(argv: Sequence[str] | None) -> Sequence[str]:
    if argv is not None:
        return argv
    return [] if _in_notebook() else sys.argv[1:]


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules and Path(sys.argv[0]).name == "ipykernel_launcher.py"
