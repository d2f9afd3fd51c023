"""A buffer that hooks of backward change, on tensors whose way back leads to no parameter."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, train


@dataclass
class ListeningConfig(TrainConfig):
    hook: Literal["leaf", "module", "behind", "accumulated", "between", "penalty", "none"] = "none"
    global_batch_size: int = 8
    epochs: int = 1


class Net(nn.Module):
    def __init__(self, hook: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.register_buffer("slope", torch.ones(()))
        self.slope: Tensor
        self.hook = hook
        if hook == "module":
            self.first.register_full_backward_hook(self.note_of_module)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.hook != "none":
            x = x.clone().requires_grad_()
        if x.requires_grad and self.hook == "leaf":
            x.register_hook(self.note)
        if x.requires_grad and self.hook == "accumulated":
            x.register_post_accumulate_grad_hook(self.note)
        doubled = x * 2
        if x.requires_grad and self.hook == "between":
            doubled.register_hook(self.note)
        hidden = torch.tanh(self.first(doubled))
        if x.requires_grad and self.hook == "behind":
            hidden.register_hook(self.note)
        output: Tensor = self.last(hidden) / self.slope
        return output

    def note_of_module(self, _module: nn.Module, inputs: Any, _outputs: Any) -> None:
        self.note(inputs[0])

    def note(self, gradient: Tensor) -> None:
        self.slope.mul_(0.9).add_(0.1 + gradient.norm())


def loss(model: Any, batch: Any) -> Tensor:
    x, y = batch
    if model.hook != "penalty" or not torch.is_grad_enabled():
        each: Tensor = (model(x) - y).square().mean(1)
        return each
    x = x.clone().requires_grad_()
    each = (model(x) - y).square().mean(1)
    (slope,) = torch.autograd.grad(each.sum(), x, create_graph=True)
    return each + (slope.norm(dim=1) - 1).square()


def build(config: ListeningConfig) -> Components:
    model = Net(config.hook)
    data = TensorDataset(torch.randn(44, 3), torch.randn(44, 2))
    return Components(model=model, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), train_data=data)


if __name__ == "__main__":
    train(build, ListeningConfig)
