"""Integer, float and list states of torchmetrics, on a batch size that leaves shards of unequal size."""

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanSquaredError, PearsonCorrCoef
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassConfusionMatrix

from samestep.train import Components, StateMetric, TrainConfig, supervised, train


class OffDiagonal(MulticlassConfusionMatrix):
    """Wrong answers: integers, so any order of adding gives the same."""

    def compute(self) -> torch.Tensor:
        matrix: torch.Tensor = super().compute()
        return matrix.sum() - matrix.diagonal().sum()


def build(config: TrainConfig) -> Components:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(150, 5, generator=generator)
    y = (x.sum(1) > 0.3).long() + (x[:, 0] > 1).long()
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    return Components(
        model=model,
        loss=supervised(nn.CrossEntropyLoss()),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        train_data=TensorDataset(x, y),
        eval_data=TensorDataset(x[:77], y[:77]),
        metrics={
            "accuracy": MulticlassAccuracy(3, average="micro"),
            "wrong": OffDiagonal(3),
            "mse": StateMetric(MeanSquaredError(), lambda net, batch: (net(batch[0])[:, 0], batch[1].float())),
            "pearson": StateMetric(PearsonCorrCoef(), lambda net, batch: (net(batch[0])[:, 1], batch[1].float())),
            "auroc": StateMetric(
                BinaryAUROC(), lambda net, batch: (net(batch[0])[:, 2].sigmoid(), (batch[1] > 1).long())
            ),
        },
    )


if __name__ == "__main__":
    train(build)
