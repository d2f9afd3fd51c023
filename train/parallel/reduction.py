"""From the shards' gradients to `p.grad`, the same on every rank: sum over the tree, not yet divided by the weight.

Backward of earlier shards of a rank is `torch.autograd.grad`, which leaves `p.grad` alone and DDP asleep. That of the
last one wakes DistributedDataParallel, whose communication hook adds the pending partial sums and exchanges bucket by
bucket while backward goes on. Where one shard is all there is, its gradient is the sum and plain backward leaves it. A
shard that runs in several parts adds up their gradients from left to right, in the same ways.
Where some rank has nothing to do in a step, layers begin or end to train, or parameters may stay unused for all that is
known (the first step), all shards take the first way and the exchange follows backward; the bits are the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket

from samestep.train import direct
from samestep.train.parallel.bucket_flights import BucketFlights
from samestep.train.parallel.exchange import Exchange, present_roots
from samestep.train.parallel.group import Group
from samestep.train.parallel.hooks import CompressionHook
from samestep.train.parallel.layout import dense, flat, like, numbers, views
from samestep.train.parallel.missing_gradients import (
    incomplete_backward,
    refuse_reentrant_checkpoints,
    refuse_uncalled_hooks,
    require_some,
)
from samestep.train.parallel.replica import Replicas
from samestep.train.parallel.shards import Fold, MicroBatch, Span, StepPlan, owned_span
from samestep.train.parallel.used import anywhere

Gradients = list[Tensor]


def _add(left: Gradients, right: Gradients) -> Gradients:
    return list(torch._foreach_add(left, right))


class GradientReducer:
    """Sums gradients of all shards of a step; used as begin, backward for each part of each shard, finish.

    After `finish`, `p.grad` of every trainable parameter is the sum over all shards, or None where no shard used it.
    Without `through_ddp` no backward touches a `p.grad`, of this model or of others in the graph, and whatever code in
    between leaves there counts for nothing; the exchange then follows the last backward.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        exchange: Exchange,
        shards: int,
        find_unused_parameters: bool | None,
        compress: CompressionHook | None = None,
        *,
        through_ddp: bool = True,
    ) -> None:
        self.group = group
        self.exchange = exchange
        self.owned = owned_span(group.rank, group.world_size, shards)
        self.shards = shards
        self._every = dict(model.named_parameters())  # also those that are frozen now
        self._compress = compress
        self._ddp = through_ddp
        self.replicas = Replicas(model, self, _communication_hook, find_unused=find_unused_parameters)
        self._looked = False  # at the graphs of this rank's first step
        self._done: Callable[[], None] = lambda: None  # told when this rank's gradients are computed
        self.flights = BucketFlights()
        self._train([p.requires_grad for p in self._every.values()])

    def _train(self, trained: list[bool]) -> None:
        """Sum the gradients of these of the parameters from now on; DDP is made anew for others."""
        self._trained = trained
        named = [pair for pair, trains in zip(self._every.items(), trained, strict=True) if trains]
        self.names, self.parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self._position = {id(p): index for index, p in enumerate(self.parameters)}
        if self.replicas.current is not None:
            self.replicas.set_aside()
            self.overlaps = False

    # One step: begin, then for each owned shard backward, then finish.

    def begin(self, plan: StepPlan) -> None:
        """Prepare for the shards of one step: no gradient is left of the one before, whoever holds the parameter."""
        for parameter in self._every.values():
            parameter.grad = None
        self.replicas.begin()
        self.mine = plan.present(self.owned)
        self.present = min(plan.samples, self.shards)
        self._step = plan.step
        self._alone = self._ddp and self.group.world_size == 1 and self.present == 1
        self.overlaps = self.replicas.current is not None and plan.everyone_works(self.group.world_size)
        if self.overlaps:
            self.replicas.begin_forward()
        self.sends_after = self.mine[-1] if self.overlaps or self.group.world_size == 1 else None  # see StepSums
        if self._alone:
            return
        spans = present_roots(self.group.world_size, self.shards, self.present)[self.group.rank]
        self._folds: dict[Span, Fold[Gradients]] = {span: Fold(span, _add) for span in spans}
        self._used = [False] * len(self.parameters)  # by some shard of this rank
        self._skipped = False  # some shard of this rank left a parameter unused
        self._results: list[tuple[list[Tensor], Tensor]] = []
        self._leaf: Gradients | None = None  # of the parts so far of the shard that runs

    def backward(self, part: MicroBatch, total: Tensor, start: Tensor, done: Callable[[], None]) -> None:
        """Take the gradient of one part's unnormalised loss; backward starts from `start`.

        `done` is called when this rank has computed it, before anything waits for other ranks. What trains in this
        step is seen here, since only a forward can freeze a layer or thaw it.
        """
        if part.first and part.shard == self.mine[0]:
            trained = [p.requires_grad for p in self._every.values()]
            if trained != self._trained:
                self._train(trained)
                self._used = [False] * len(self.parameters)
        if self._alone:
            direct.backward(total, start)
            done()
            return
        if self._through_ddp(part):
            self._done = done
            self.replicas.begin_backward(total)
            direct.backward(total, start)
            if self._compress is not None:  # hooks of torch wait by themselves
                self._done()
            return
        if not self._looked:
            refuse_reentrant_checkpoints(total)
            refuse_uncalled_hooks(total, self._every.values())
        gradients = direct.gradients(total, self.parameters, start)
        leaf = []
        for index, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            self._used[index] |= gradient is not None
            self._skipped |= gradient is None
            leaf.append(self._absent(parameter) if gradient is None else dense(self.names[index], gradient))
        self._leaf = leaf if self._leaf is None else _add(self._leaf, leaf)
        if part.last:
            self._fold_of(part.shard).push(part.shard, self._leaf)
            self._leaf = None
        done()

    def finish(self) -> Gradients:
        """Leave the sums in `p.grad` and return those that are not None.

        Raises:
            UsageError: all are.
        """
        if self._alone:
            return self._of_one_shard()
        self._looked |= bool(self.mine)
        if self.overlaps:
            self._collect()
        elif self.group.world_size == 1:
            self._assign_solo()
        else:
            self._exchange_all()
        # gradients of this step must be free when the next ones are made
        self._folds, self._results, self._leaf = {}, [], None
        self.replicas.release()
        if self._ddp and self.replicas.current is None and self.group.world_size > 1:
            self.replicas.wrap()
        return self._left()

    # Without other ranks, or after backward.

    def _assign_solo(self) -> None:
        (fold,) = self._folds.values()
        for shard in range(self.present, self.shards):
            fold.push(shard, None)
        sums = fold.total
        assert sums is not None
        for parameter, gradient, used in zip(self.parameters, sums, self._used, strict=True):
            parameter.grad = like(gradient, parameter) if used else None

    def _exchange_all(self) -> None:
        used = self._used_anywhere()
        for span, fold in self._folds.items():
            for shard in range(max(self.present, span[0]), span[1]):
                fold.push(shard, None)
        totals = [fold.total for fold in self._folds.values()]
        for kind in {(p.dtype, p.device): None for p in self.parameters}:
            members = [i for i, p in enumerate(self.parameters) if (p.dtype, p.device) == kind]
            parameters = [self.parameters[i] for i in members]
            mine = [flat([total[i] for i in members], parameters) for total in totals if total is not None]
            size = sum(map(numbers, parameters))
            like_them = mine[0] if mine else torch.empty(size, dtype=kind[0].to_real(), device=kind[1])
            whole = self.exchange.start(mine, like_them, self.present).finish()
            for i, parameter, view in zip(members, parameters, views(whole, parameters), strict=True):
                parameter.grad = view if used[i] else None

    def _used_anywhere(self) -> list[bool]:
        device = self.parameters[0].device
        trained, used = anywhere(self.group, self._trained, self._used, device, ran=bool(self.mine))
        if trained != self._trained:
            self._train(trained)
            for parameter, trains in zip(self._every.values(), trained, strict=True):
                parameter.requires_grad_(trains)
        if self.replicas.find_unused is None:
            skipped = torch.tensor([self._skipped], dtype=torch.uint8, device=device)
            self.replicas.find_unused = bool(self.group.gather(skipped).any())
        return used

    # Through DistributedDataParallel.

    def _through_ddp(self, part: MicroBatch) -> bool:
        return self.overlaps and part.last and part.shard == self.mine[-1]

    def on_bucket(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Add this rank's partial sums to the last shard's bucket and send it; advance the one before."""
        parameters, buffer = bucket.parameters(), bucket.buffer()
        last = self.mine[-1]
        partials = self._fold_of(last).pending(last) + ([self._leaf] if self._leaf is not None else [])
        one_of_many = partials or len(self._folds) > 1
        positions = [self._position[id(p)] for p in parameters] if one_of_many else []
        for partial in reversed(partials):
            torch._foreach_add_(views(buffer, parameters), [partial[i] for i in positions])
        if self._compress is not None:
            return self._compressed(bucket, parameters, self._compress)
        flats = []
        for span, fold in self._folds.items():
            if span[0] <= last < span[1]:
                flats.append(buffer)
            else:
                total = fold.total
                assert total is not None
                flats.append(flat([total[i] for i in positions], parameters))
        future = self.flights.send(self.exchange.start(flats, buffer, self.present), parameters, buffer.device)
        if bucket.is_last():
            self._done()
            self._results += self.flights.land()
        return future

    def _compressed(
        self, bucket: GradBucket, parameters: list[Tensor], compress: CompressionHook
    ) -> torch.futures.Future[Tensor]:
        for span, fold in self._folds.items():
            if not span[0] <= self.mine[-1] < span[1] and (total := fold.total) is not None:
                ours = views(bucket.buffer(), parameters)
                torch._foreach_add_(ours, [total[self._position[id(p)]] for p in parameters])

        def keep(done: torch.futures.Future[Tensor]) -> Tensor:
            self._results.append((parameters, done.value()))
            return done.value()

        return compress(bucket).then(keep)

    def _collect(self) -> None:
        if not self._results or self.flights.sent:
            self.flights.sent.clear()
            missing = [name for name, p in zip(self.names, self.parameters, strict=True) if p.grad is None]
            raise incomplete_backward(self._step, missing)
        if not self.replicas.find_unused:
            return
        for parameters, total in self._results:
            for parameter, view in zip(parameters, views(total, parameters), strict=True):
                self._used[self._position[id(parameter)]] |= parameter.grad is not None
                parameter.grad = view
        used = self._used_anywhere()
        for parameter, kept in zip(self.parameters, used, strict=True):
            if not kept:
                parameter.grad = None

    def _of_one_shard(self) -> Gradients:
        gradients = self._left()
        if any(gradient.layout != torch.strided for gradient in gradients):
            for index, parameter in enumerate(self.parameters):
                if parameter.grad is not None:
                    dense(self.names[index], parameter.grad)
        return gradients

    def _left(self) -> Gradients:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        require_some(gradients, self._step)
        return gradients

    def _fold_of(self, shard: int) -> Fold[Gradients]:
        return next(fold for span, fold in self._folds.items() if span[0] <= shard < span[1])

    def _absent(self, parameter: Tensor) -> Tensor:
        """What stands for no gradient. With one shard plain backward adds nothing at all, and -0.0 keeps every bit."""
        return torch.full_like(parameter, -0.0) if self.shards == 1 else torch.zeros_like(parameter)


# torch reads these annotations at run time, so this file does not postpone their evaluation.
def _communication_hook(state: GradientReducer, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    return state.on_bucket(bucket)
