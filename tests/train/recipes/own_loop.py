"""A loop of its own, in the form that --case names."""

import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from samestep.train import Components, OwnLoop, SameOrderSampler, TrainConfig, Weighted, supervised, train


@dataclass
class OwnConfig(TrainConfig):
    case: str = "plain"
    epochs: int = 2
    global_batch_size: int = 12
    log_every: int = 3


def data():
    x = torch.arange(44 * 6, dtype=torch.float32).reshape(44, 6).sin()
    return TensorDataset(x, x.cos()[:, :1])


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def tokens(model, batch):
    """Samples weigh 0, 1 or 2."""
    x, y = batch
    weight = (x[:, 0] * 3).round().clamp(0, 2)
    return Weighted(((model(x) - y) ** 2).flatten().mul(weight).sum(), weight.sum(), log={"largest": x.max()})


def build(config):
    model = network()
    loss = tokens if config.case == "tokens of train" else supervised(nn.MSELoss())
    return Components(model=model, loss=loss, optimizer=adam(model), train_data=data())


def by_hand(config):
    """Two models in plain PyTorch, in the order of our sampler; prints their bits."""
    torch.manual_seed(0)
    one, two = nn.Linear(6, 1), nn.Linear(6, 1)
    of_one, of_two = adam(one), adam(two)
    x, y = data().tensors
    sampler = SameOrderSampler(x, 1, 0, global_batch_size=config.global_batch_size)
    for epoch in range(config.epochs):
        sampler.set_epoch(epoch)
        for ids in sampler:
            of_one.zero_grad()
            ((one(x[ids]) - y[ids]) ** 2).mean().backward()
            of_one.step()
            of_two.zero_grad()
            ((two(x[ids]) - one(x[ids])) ** 2).mean().backward()
            of_two.step()
    print(" ".join(tensor.detach().numpy().tobytes().hex() for tensor in (*one.parameters(), *two.parameters())))


def two_models(loop):
    torch.manual_seed(0)
    one, two = nn.Linear(6, 1), nn.Linear(6, 1)
    of_one, of_two = adam(one), adam(two)
    first, second = loop.gradients(one), loop.gradients(two)
    for step in loop.steps(data(), keep={"one": one, "two": two, "of_one": of_one, "of_two": of_two}):
        for x, y in first.over(step):
            first.backward(((one(x) - y) ** 2).mean())
        of_one.step()
        for x, _ in second.over(step):
            second.backward(((two(x) - one(x)) ** 2).mean())
        of_two.step()
    print(" ".join(tensor.detach().numpy().tobytes().hex() for tensor in (*one.parameters(), *two.parameters())))


def one_model(loop):  # noqa: C901, PLR0912, PLR0915 (a table of cases)
    case, model = loop.config.case, network()
    if loop.config.case == "hidden":
        model = nn.Sequential(Centred(), model)
    optimizer = adam(model)
    keep: Any = {"model": model, "optimizer": optimizer}
    if case == "scheduler":
        keep["scheduler"] = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    if case == "numbers in keep":
        keep["count"] = 3
    if case == "ddp in keep":
        keep["model"] = DistributedDataParallel.__new__(DistributedDataParallel)
    if case == "optimizer alone":
        keep = {"optimizer": optimizer, "other": network()}
    if case == "sgd":
        keep["optimizer"] = optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if case == "renamed":
        keep["renamed"] = keep.pop("optimizer")
    if case in ("beside another", "turned"):
        keep["another"] = nn.Linear(2, 2)
        keep["of_another"] = adam(keep["another"])
    if case == "turned":
        keep = dict(reversed(keep.items()))
    if case == "baseline":
        keep["baseline"] = Baseline()
    if case == "list":
        keep = [model, optimizer]
    gradients = None if case == "no gradients" else loop.gradients(nn.Linear(2, 2) if case == "not kept" else model)
    other = loop.gradients(model) if case in ("passes", "second only") else None
    if case == "eval":
        model.eval().train = lambda mode=True: model
    drawn = []
    collate_fn = (lambda items: (torch.zeros(0, 6), torch.zeros(0, 1))) if case == "nothing left" else None
    if case == "default device":
        torch.set_default_device("meta")
    for step in loop.steps(data(), keep=keep, collate_fn=collate_fn):
        if case == "hidden":
            model[0].moves = step.number % 3 == 1
        if case == "late":
            loop.gradients(model)
        between = torch.randn(()) if case == "between" else 0.0
        for x, y in (other if case == "second only" else gradients).over(step):
            if case == "raises" and step.number == 3 and loop.rank == loop.world_size - 1:
                raise ValueError("no such thing")
            if case == "stopped" and step.number == 3 and loop.rank == loop.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if case == "exits" and step.number == 3:
                sys.exit(0)
            if case == "leaves" and step.number == 3:
                break
            if case == "silent":
                continue
            if case == "passes":
                drawn.append(torch.rand(1).item())
            loss: Any = tokens(model, (x, y)) if case == "tokens" else mse_loss(model(x), y)
            if case == "plain backward before":
                ((model[4](torch.ones(1, 8)) - 1) ** 2).sum().backward()
            loss = loss * float("nan") if case == "nan" and step.number == 3 else loss
            loss = Weighted(loss * 0, 0) if case == "weightless" and step.number == 2 else loss
            loss = Weighted(loss * len(x), len(x)) if case == "weightless" and step.number != 2 else loss
            loss = loss + between if case == "between" else loss
            (other if case == "second only" else gradients).backward(loss)
            if case == "updates inside":
                optimizer.step()
            if case == "baseline":
                keep["baseline"].mean += loss.item()
            if case == "plain backward after":
                ((model[4](torch.ones(1, 8)) - 1) ** 2).sum().backward()
            if case == "twice":
                gradients.backward(loss)
        if case == "weightless" and step.number == 2:
            assert all(parameter.grad is None for parameter in model.parameters())
        if case == "between":
            with torch.no_grad():
                model[0].bias.add_(torch.randn(8) / 10)
        if case == "passes":
            first = [x for x, _ in passed(other, step, model, drawn)]
            again = [x for x, _ in passed(other, step, model, drawn)]
            assert all(map(torch.equal, first, again))
        if case == "cleared":
            optimizer.zero_grad()
        optimizer.step()
        if case == "scheduler":
            keep["scheduler"].step()
        if case == "breaks" and step.number == 3:
            break
    if case == "again":
        list(loop.steps(data(), keep=keep))
    if case == "passes":
        assert len(set(drawn)) == len(drawn)
    print("compiler", "torch._dynamo" in sys.modules)
    print("result", loop.result.steps, loop.result.digest)


def both_at_once(loop):
    """Two passes, then two updates, where the second loss also reaches the first model."""
    one, two = nn.Linear(6, 6), nn.Linear(6, 1)
    of_one, of_two = adam(one), adam(two)
    first, second = loop.gradients(two), loop.gradients(one)
    for step in loop.steps(data(), keep={"one": one, "two": two, "of_one": of_one, "of_two": of_two}):
        for x, y in first.over(step):
            first.backward(mse_loss(two(one(x).detach()), y))
        for x, _ in second.over(step):
            second.backward(-two(one(x)).mean())
        of_two.step()
        of_one.step()


class Centred(nn.Module):
    """Takes a mean away that no state_dict has, and that runs in some steps only."""

    moves = True
    mean: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.moves:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x - self.mean


class Baseline:
    """A mean that a rank takes over the batches that it has seen."""

    mean = 0.0

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def passed(gradients, step, model, drawn):
    """Batches of a further pass, whose gradients are of the loss times 0."""
    for x, y in gradients.over(step):
        drawn.append(torch.rand(1).item())
        gradients.backward(((model(x) - y) ** 2).mean() * 0)
        yield x, y


def main():
    case = sys.argv[sys.argv.index("--case") + 1] if "--case" in sys.argv else "plain"
    if case == "by hand":
        by_hand(OwnConfig())
    elif case in ("train", "tokens of train"):
        train(build, OwnConfig)
    elif case == "class":
        with OwnLoop(OwnConfig()):  # type: ignore[arg-type]
            pass
    else:
        with OwnLoop(OwnConfig) as loop:
            {"two": two_models, "of both at once": both_at_once}.get(case, one_model)(loop)


if __name__ == "__main__":
    main()
