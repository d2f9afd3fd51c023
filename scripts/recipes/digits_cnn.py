"""Handwritten digits (1797 real 8x8 images that ship inside scikit-learn), a small convolutional net, random shifts."""

import random
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train


@dataclass
class DigitsConfig(TrainConfig):
    epochs: int = 15
    global_batch_size: int = 64
    log_every: int = 10


class Shifted(TensorDataset):
    """Each image moved by up to one pixel, differently in each epoch."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = super().__getitem__(index)
        row, column = random.randint(0, 2), random.randint(0, 2)
        return nn.functional.pad(image, (1, 1, 1, 1))[:, row : row + 8, column : column + 8], label


def block(width_in: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]


def accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0]).argmax(1) == batch[1]


def build(config: DigitsConfig) -> Components:
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    test = torch.arange(len(y)) % 5 == 0
    head = [nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 16, 10)]
    model = nn.Sequential(*block(1, 32), *block(32, 32), nn.MaxPool2d(2), *head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.01)
    steps = config.epochs * len(range(0, int((~test).sum()), config.global_batch_size))
    return Components(
        model=model,
        loss=supervised(nn.CrossEntropyLoss()),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
        train_data=Shifted(x[~test], y[~test]),
        eval_data=TensorDataset(x[test], y[test]),
        metrics={"accuracy": accuracy},
    )


if __name__ == "__main__":
    train(build, DigitsConfig)
