"""`OwnLoop`: everything around a training loop whose steps are the user's own lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from samestep.launcher.contract import UsageError
from samestep.train import environment, preemption, start, without_compiler
from samestep.train.announce import announce
from samestep.train.called import check_config_type
from samestep.train.checks import check_among_ranks, check_materialised
from samestep.train.config import TrainConfig
from samestep.train.data.map_style import require_map_style
from samestep.train.data.rng import seed_everything
from samestep.train.finish import Result, already_closed, close
from samestep.train.joined import Joined, called, meet
from samestep.train.loop import Run, after_step, save_the_end, steps_to_go
from samestep.train.observe.tally import Values
from samestep.train.own_loop.buffers import AllBuffers
from samestep.train.own_loop.gradients import ShardGradients, column_of
from samestep.train.own_loop.kept import components_of, require_alike
from samestep.train.own_loop.step import Step
from samestep.train.own_loop.updates import watch_updates
from samestep.train.parallel.bucket_trial import FixedBuckets
from samestep.train.prepared import Prepared, prepare

Config = TypeVar("Config", bound=TrainConfig)

# Options of a recipe that say what happens inside of a step, or evaluate: here the user's lines do that.
_OF_RECIPES = "precision clip_grad_norm nan_policy micro_batches comm_hook compile eval_every best replay debug".split()


class OwnLoop(Generic[Config]):
    """Joins the ranks, seeds, pins what decides the bits; then `steps` does all that is due between steps.

    Use it as a context: `with OwnLoop(MyConfig) as loop:`. Models and optimizers are made inside of it, after seed and
    device are set, so that weights are the same on every rank and in every launch. Options are those of a recipe but
    for those that concern a step itself. What goes wrong inside is told and recorded as in a recipe.

    Args:
        config_type: TrainConfig, or a dataclass derived from it with options of one's own.
        argv: flags without the program's name; those of the process if None (none in a notebook).

    Attributes:
        config: the options.
        rank, world_size: this process among all.
        shards: V, the number of slices of a global batch.
        device: where this rank computes; models and batches are moved there.

    Raises:
        SystemExit: as `train`.
    """

    config: Config

    def __init__(
        self,
        config_type: type[Config] = TrainConfig,  # type: ignore[assignment]
        *,
        argv: Sequence[str] | None = None,
    ) -> None:
        self._called = called(
            lambda: check_config_type(config_type, "OwnLoop is expected to get {}", "OwnLoop(MyConfig)"),
            config_type,
            argv,
        )
        self._stack = ExitStack()
        self._gradients: list[ShardGradients] = []
        self._prepared: Prepared | None = None
        self._result: Result | None = None
        self._left_after = 0  # the step in which the user's lines left the loop

    def __enter__(self) -> OwnLoop[Config]:
        """Join. A collective."""
        with ExitStack() as stack:
            call = stack.enter_context(self._called)
            _refuse_options_of_recipes(call.config)
            call.config.micro_batches = 1
            self._joined: Joined = meet(call)
            self.config = call.config
            env = self._joined.member.env
            self.rank, self.world_size, self.shards = env.rank, env.world_size, self._joined.shards
            self.device: torch.device = self._joined.member.device
            self._found = start.find_state(call.run_dir, call.config, self._joined.member)
            self._threads = torch.get_num_threads()
            call.progress(0, "build")
            without_compiler.keep_unloaded()
            seed_everything(call.config.seed)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Tell and record what went wrong, and give the process back as it was."""
        if kind is not None or self._result is not None:
            return self._stack.__exit__(kind, error, trace)
        early = self._unfinished()
        self._stack.__exit__(UsageError, early, None)
        raise early

    @property
    def result(self) -> Result:
        """Outcome of the run.

        Raises:
            UsageError: it has not come to its end.
        """
        if self._result is None:
            raise self._unfinished()
        return self._result

    def gradients(self, model: nn.Module) -> ShardGradients:
        """Gradients of one model; the losses of the first one that is made are those of the run.

        Args:
            model: one of `keep`, itself: it is not wrapped.

        Raises:
            UsageError: the loop has begun.
        """
        if self._prepared is not None:
            raise UsageError(
                "loop.gradients is expected before loop.steps, but was called in the loop",
                "make it once for each model, before the loop: it lives through all steps",
            )
        self._gradients.append(ShardGradients(model))
        return self._gradients[-1]

    def steps(
        self, data: Any, *, keep: Mapping[str, Any], collate_fn: Callable[[list[Any]], Any] | None = None
    ) -> Iterator[Step]:
        """The steps that are left of the run, to be gone through to the end. A collective.

        Before the first one the newest checkpoint is loaded. After each one its losses are counted and, when it is
        due, reported and saved; after the last one weights are exported and the digest is told. Each epoch begins with
        all models of `keep` in train mode.

        Args:
            data: a map-style dataset, or a tensor or numpy array.
            keep: all that has state, under names: what a checkpoint has and a restart brings back.
            collate_fn: list of samples -> batch; torch's `default_collate` if None.

        Raises:
            UsageError: something does not fit; says what.
            SystemExit: the run was asked to stop (see `train`).
        """
        prepared, run = self._prepare(data, keep, collate_fn)
        call, member = self._joined.call, self._joined.member
        if prepared.is_over:
            digest = already_closed(run, call.run_dir, member, prepared.changed)
        else:
            announce(prepared, self._joined)
            with prepared.signals:
                with environment.long_lived_objects_set_aside():
                    for plan, batches, last in steps_to_go(run):
                        step = Step(plan, batches, run.sampler.owned)
                        step.seed_between(run.config.seed)
                        self._left_after = step.number
                        yield step
                        self._left_after = 0
                        step.finish()
                        if last or step.number % run.config.log_every == 0:
                            require_alike(keep, member.group, step.number)
                        after_step(run, plan, self._rows(run, step), last=last)
                    save_the_end(run)
                    preemption.leave_if_stopped(run, call.run_dir)
                digest = close(run, call.run_dir, member)
        self._result = Result(digest, run.state.step, {}, call.run_dir.path)

    def _prepare(self, data: Any, keep: Mapping[str, Any], collate_fn: Any) -> tuple[Prepared, Run]:
        if not hasattr(self, "_joined"):
            raise UsageError(
                "loop.steps is expected inside of the context of OwnLoop, but was called outside",
                "with OwnLoop(MyConfig) as loop: …",
            )
        if self._prepared is not None:
            raise UsageError(
                "loop.steps is expected to be gone through once, but was called again",
                "make another OwnLoop for another run, with another --run-dir",
            )
        joined = self._joined
        require_map_style(data, "the dataset")
        components = components_of(keep, data, collate_fn)
        models = components.model
        check_materialised(models)
        check_among_ranks(models, joined.shards, joined.member.env.world_size)
        self._require_kept(models)
        environment.require_default_device(joined.member.device)
        told = environment.threads_brought_back(self._threads, "the code before the loop")
        self._prepared = prepared = prepare(components, joined, self._found, told, guarded=False)
        run, setting = prepared.run, prepared.setting
        joined.call.progress.micro_batches = None
        for gradients in self._gradients:
            gradients.bind(run, setting)
        combiners = [gradients.shards.buffers for gradients in self._gradients]
        run.state.buffers = AllBuffers(combiners, run.state.buffers.known)
        run.buckets = FixedBuckets()
        run.step.guard.investigate.hint = "look at these samples and at the learning rate"
        for end in watch_updates(keep, self._gradients, run.reporter.warning):
            joined.call.ends.callback(end)
        return prepared, run

    def _unfinished(self) -> UsageError:
        where = f"in step {self._left_after}" if self._left_after else "before the first step"
        return UsageError(
            f"loop.steps is expected to be gone through to its end, but was left {where}: no weights are exported, and "
            "the run goes on from its last checkpoint where it is started again",
            "leave out break and return: --max-steps or --epochs end a run, on all ranks after the same step",
        )

    def _require_kept(self, models: nn.Module) -> None:
        if not self._gradients:
            raise UsageError(
                "loop.gradients is expected to be called for each model that trains, but was not called",
                "gradients = loop.gradients(model), before the loop",
            )
        known = {id(parameter) for parameter in models.parameters()}
        for gradients in self._gradients:
            model = gradients.model
            if not all(id(parameter) in known for parameter in model.parameters()):
                raise UsageError(
                    f"the model of loop.gradients is expected to be in keep, but {type(model).__name__} is not",
                    'keep={"model": model, "optimizer": optimizer}: a checkpoint has what keep names, and nothing else',
                )

    def _rows(self, run: Run, step: Step) -> Values:
        """What is reported of a step: losses of the first model, and the others' means as further averages."""
        for gradients in self._gradients:
            gradients.require_complete()
        first, *others = self._gradients
        rows = first.rows_of(step)
        if rows is None:
            raise UsageError(
                "each step is expected to have a pass over it with the first of loop.gradients, but "
                f"step {step.number} has none",
                "its loss is the one of the run: make the one first that has a pass in each step",
            )
        names = {id(model): name for name, model in run.components.model.named_children()}
        run.step.shards.tally.extras = [
            *(first.shards.tally.extras or []),
            *(names.get(id(g.model), "loss") for g in others),
        ]
        columns = [gradients.rows_of(step) for gradients in others]
        return [
            [*row, *(column_of(of[shard] if of else None, row[1], self.device) for of in columns)]
            for shard, row in enumerate(rows)
        ]


def _refuse_options_of_recipes(config: TrainConfig) -> None:
    default = TrainConfig()
    for name in _OF_RECIPES:
        value = getattr(config, name)
        if value != getattr(default, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is expected to be left out with a loop of one's own, but is {value}",
                "what happens inside of a step is for the lines of the loop",
            )
