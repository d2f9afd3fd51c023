"""Pure: a workload, a network and failures -> what a run on W ranks would be like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from samestep.launcher.scale.faults import Faults, daly, goodput, run_mttf
from samestep.launcher.scale.network import Machines, exposed

Scaling = Literal["weak", "strong"]


@dataclass(frozen=True, slots=True)
class Workload:
    """One step of a measured run. Times are seconds, sizes are bytes, both of one rank.

    Attributes:
        batch: samples of a step, over all ranks.
        ranks: on which it was measured.
        share: of a batch, that the measured rank computes; the same for all if it is 1 / ranks.
        data, forward, backward, optimizer: time of the phases; forward and backward grow with the rank's samples.
        gradients: bytes that are summed over the ranks.
        weights, state, activations: memory of weights, optimizer state, and all else that a step needs.
        samples: to train on in all, epochs included.
    """

    batch: int
    ranks: int
    share: float
    data: float
    forward: float
    backward: float
    optimizer: float
    gradients: float
    weights: float
    state: float
    activations: float
    samples: int


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about each number of ranks; `scaling`: the batch grows with the ranks (weak), or stays (strong)."""

    machines: Machines
    scaling: Scaling
    exact: bool
    bucket: float
    rank_hours: float
    save: float
    restart: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """A run on `ranks` ranks. Times in seconds, memory in bytes of one rank.

    `efficiency`: samples/s of a rank against one rank alone, failures left out. `goodput`: share of time in steps that
    last. `days`: wall time of the whole training, failures and saves included.
    """

    ranks: int
    batch: int
    step: float
    communication: float
    exposed: float
    algorithm: str
    samples_per_s: float
    efficiency: float
    memory: float
    mttf: float
    checkpoint_every: float
    goodput: float
    days: float


def predict(work: Workload, question: Question, ranks: int) -> Prediction:
    """The step as the slowest rank sees it, then failures on top of it."""
    step, communication, not_hidden, algorithm, batch = _step(work, question, ranks)
    alone, _, _, _, alone_batch = _step(work, question, 1)
    rate = batch / step
    faults = Faults(run_mttf(question.rank_hours, ranks), question.save, question.restart)
    every = max(step, daly(faults))
    useful = goodput(faults, every)
    seconds = max(step, work.samples / rate)
    return Prediction(
        ranks=ranks,
        batch=batch,
        step=step,
        communication=communication,
        exposed=not_hidden,
        algorithm=algorithm,
        samples_per_s=rate,
        efficiency=rate / ranks / (alone_batch / alone),
        memory=memory(work, question, ranks),
        mttf=faults.mttf,
        checkpoint_every=every,
        goodput=useful,
        days=seconds / useful / 86_400 if useful else math.inf,
    )


def _step(work: Workload, question: Question, ranks: int) -> tuple[float, float, float, str, int]:
    batch = max(1, round(work.batch / work.ranks * ranks)) if question.scaling == "weak" else work.batch
    share = math.ceil(batch / ranks) / (work.batch * work.share)  # the slowest rank's samples, in those of the measured
    backward = share * work.backward
    sent = exposed(ranks, work.gradients, question.bucket, backward, question.machines, exact=question.exact)
    computing = share * (work.data + work.forward) + backward + work.optimizer
    return computing + sent.exposed, sent.total, sent.exposed, sent.algorithm, batch


def memory(work: Workload, question: Question, ranks: int) -> float:
    """Bytes of one rank, at most: all buckets of an exact sum may be in flight, received and summed, at once."""
    share = 1.0 if question.scaling == "weak" else math.ceil(work.batch / ranks) / (work.batch * work.share)
    copies = 2 if question.exact and ranks > 2 else 0
    return work.weights + work.state + (1 + copies) * work.gradients + share * work.activations
