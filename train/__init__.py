"""The worker: trains a recipe on one or many ranks so that its result does not depend on how many."""

from samestep.train.config import TrainConfig
from samestep.train.data.sampler import SameOrderSampler
from samestep.train.entry import train
from samestep.train.finish import Result
from samestep.train.own_loop.gradients import ShardGradients
from samestep.train.own_loop.loop import OwnLoop
from samestep.train.own_loop.step import Step
from samestep.train.recipe import Components, Weighted
from samestep.train.state_metrics import StateMetric
from samestep.train.supervised import supervised

__all__ = [
    "Components",
    "OwnLoop",
    "Result",
    "SameOrderSampler",
    "ShardGradients",
    "StateMetric",
    "Step",
    "TrainConfig",
    "Weighted",
    "supervised",
    "train",
]
