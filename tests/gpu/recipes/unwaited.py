"""Steps in which torch refuses every wait of the host for the device, once the first ones are over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, Weighted, train
from samestep.train.parallel.agreement import Agreement
from samestep.train.step import OptimizerStep

FIRST = 6  # steps of a start that may wait: they are checked, and ranks agree on what follows


@dataclass
class UnwaitedConfig(TrainConfig):
    global_batch_size: int = 32
    max_steps: int | None = 30
    log_every: int = 100
    weigh: str = "samples"
    average: bool = False


def strict(method: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def called(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        torch.cuda.set_sync_debug_mode("error" if calls > FIRST else "default")
        try:
            return method(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return called


def build(config: UnwaitedConfig) -> Components:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(2048, 64, generator=generator), torch.randint(0, 8, (2048,), generator=generator)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor | Weighted:
        each = nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")
        match config.weigh:
            case "samples":
                return each
            case "numbers":
                return Weighted(each.sum(), 2.5 * len(each), {"accuracy": 0.5})
            case "host":
                return Weighted(each.sum(), torch.tensor(1.5))
            case "mean":
                return each.mean()
        weights = (batch[1] != 3).float()
        return Weighted((each * weights).sum(), weights.sum(), {"seen": weights.mean()})

    return Components(
        model=model,
        loss=loss,
        optimizer=optimizer,
        train_data=TensorDataset(x, y),
        ema=0.9 if config.average else None,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5),
    )


if __name__ == "__main__":
    setattr(OptimizerStep, "__call__", strict(OptimizerStep.__call__))  # noqa: B010
    setattr(Agreement, "after_step", strict(Agreement.after_step))  # noqa: B010
    train(build, UnwaitedConfig)
