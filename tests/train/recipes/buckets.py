"""Sends gradients in buckets of BUCKET_MB from the environment, or tries several; prints how many there were."""

import os

import torch
from torch import nn
from torch.distributed import GradBucket
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train
from samestep.train.parallel import bucket_trial, reduction, replica

sizes = tuple(map(float, os.environ["BUCKET_MB"].split()))
replica.BUCKET_MB, bucket_trial.SIZES_MB = sizes[0], sizes
bucket_trial.STEPS = bucket_trial.SETTLING = 1
on_bucket = reduction.GradientReducer.on_bucket
sent = 0


def counted(self: reduction.GradientReducer, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    global sent
    sent += 1
    return on_bucket(self, bucket)


def build(config: TrainConfig) -> Components:
    reduction.GradientReducer.on_bucket = counted  # type: ignore[method-assign]
    layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(64, 1))
    x = torch.randn(10 * config.global_batch_size, 64)
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=torch.optim.AdamW(model.parameters()),
        train_data=TensorDataset(x, x.sin().sum(1, keepdim=True)),
    )


if __name__ == "__main__":
    train(build)
    print(f"buckets: {sent}")
