"""The same training written in five ways: samestep, by hand with and without DDP, Accelerate, Lightning Fabric.

Each is made once for a workload and gives a function that trains so many steps more. The hand-written loops are what a
careful person writes (whole-batch indexing where the data are tensors); the peers' loops are those of their guides.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from samestep.launcher.contract import RunDir
from samestep.train import Components, TrainConfig, leave, supervised
from samestep.train.assemble import Setting, assemble
from samestep.train.loop import run_to_the_end
from samestep.train.parallel.join import Membership
from samestep.train.state.saver import Saver

Steps = Callable[[int], None]
RECIPES = Path(__file__).resolve().parent.parent / "scripts" / "recipes"


@dataclass(frozen=True)
class Workload:
    """`make` gives fresh components; `mean_loss` is what a hand-written loop minimises."""

    make: Callable[[], Components]
    mean_loss: Callable[[Any, Any], Tensor]
    batch: int
    steps: int  # of a round; not much fewer than the 100 after which losses are read


STEPS_PER_EPOCH = 320  # as in the seed's job


def mlp(width: int, depth: int, batch: int) -> Callable[[], Components]:
    def make() -> Components:
        torch.manual_seed(0)
        hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
        model = nn.Sequential(*hidden, nn.Linear(width, 10))
        data = TensorDataset(torch.randn(STEPS_PER_EPOCH * batch, width), torch.randn(STEPS_PER_EPOCH * batch, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        return Components(model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=data)

    return make


def recipe(name: str, config: str) -> Callable[[], Components]:
    """What a recipe of ours builds; peers train its model with its optimizer on its data."""

    def make() -> Components:
        spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        components: Components = module.build(getattr(module, config)())
        return components

    return make


def squared(model: Any, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def classes(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def characters(model: Any, lines: Tensor) -> Tensor:
    return F.cross_entropy(model(lines[:, :-1]).flatten(0, 1), lines[:, 1:].flatten(), ignore_index=0)


class Transformer(nn.Module):
    """85 million parameters in 12 layers, 512 tokens a line."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1024, 768)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(768, 1024)

    def forward(self, ids: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.head(self.layers(self.tokens(ids), mask=mask, is_causal=True))


def transformer() -> Components:
    torch.manual_seed(0)
    model = Transformer()
    data = torch.randint(1, 1024, (STEPS_PER_EPOCH * 8, 513))
    return Components(
        model=model,
        loss=characters,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        train_data=data,
    )


WORKLOADS = {
    "MLP 0.2 ms": Workload(mlp(32, 1, 32), squared, 32, 400),
    "MLP 1 ms": Workload(mlp(256, 2, 64), squared, 64, 100),
    "MLP 5 ms": Workload(mlp(512, 2, 192), squared, 192, 100),
    "digits CNN": Workload(recipe("digits_cnn", "DigitsConfig"), classes, 64, 46),
    "char LM": Workload(recipe("char_lm", "CharConfig"), characters, 16, 15),
    "transformer 85M": Workload(transformer, characters, 8, 20),  # for a GPU
}


def samestep(workload: Workload, member: Membership, folder: Path, **more: Any) -> Steps:
    """The loop that `train` runs, with its reports; only the checkpoint at the end is left out."""
    components = workload.make()
    components.model.to(member.device)
    config = TrainConfig(global_batch_size=workload.batch, max_steps=0, epochs=10**6, num_workers=0, **more)
    folder.mkdir(exist_ok=True)
    setting = Setting(config, member, RunDir(folder), member.group.world_size, 0, {"seed": 0})
    components.eval_data = None
    run = assemble(components, setting, lambda step, phase: None)
    run.saver = Saver(run.saver.schedule)
    if member.group.rank == 0:
        run.reporter.stream = io.StringIO()  # type: ignore[attr-defined]
        run.reporter.started(0, member.group.world_size, [], 0)
    leave.end_hard(run)

    def train(steps: int) -> None:
        assert config.max_steps is not None
        config.max_steps += steps
        run_to_the_end(run)

    return train


def hand_written_ddp(workload: Workload, member: Membership, folder: Path) -> Steps:
    """The script for any number of ranks, which makes DDP on a single one too."""
    components = workload.make()
    if not dist.is_initialized():  # samestep needs no group for one rank
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    wrapped = components.model.to(member.device)
    model = DistributedDataParallel(wrapped, gradient_as_bucket_view=True, broadcast_buffers=False)
    leave.end_hard(model)
    return _by_hand(workload, components, model, member)


def hand_written(workload: Workload, member: Membership, folder: Path) -> Steps:
    """The script for one rank: no DDP."""
    components = workload.make()
    return _by_hand(workload, components, components.model.to(member.device), member)


def _by_hand(workload: Workload, components: Components, model: Any, member: Membership) -> Steps:
    rank, world_size = member.group.rank, member.group.world_size
    optimizer, scheduler = components.optimizer, components.scheduler
    data: Any = components.train_data

    def indexed() -> Iterator[Any]:
        for epoch in itertools.count():
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch))
            for begin in range(0, len(data) - workload.batch + 1, workload.batch):
                yield data[order[begin : begin + workload.batch][rank::world_size]]

    whole = isinstance(data, Tensor) or type(data) is TensorDataset
    batches = indexed() if whole else _batches(_plain_loader(components, workload, member))
    if member.device.type == "cuda":
        batches = _copied(batches, member.device)
    backward = Tensor.backward
    return _steps(batches, lambda batch: workload.mean_loss(model, batch), backward, optimizer, scheduler)


def accelerate_loop(workload: Workload, member: Membership, folder: Path) -> Steps:
    from accelerate import Accelerator

    components = workload.make()
    accelerator = Accelerator(cpu=member.device.type == "cpu")
    loader = _shuffled(components, workload, member)
    model, optimizer, loader, scheduler = accelerator.prepare(
        components.model, components.optimizer, loader, components.scheduler
    )
    leave.end_hard(model)
    batches = _batches(loader)
    backward = accelerator.backward
    return _steps(batches, lambda batch: workload.mean_loss(model, batch), backward, optimizer, scheduler)


def fabric_loop(workload: Workload, member: Membership, folder: Path) -> Steps:
    from lightning_fabric import Fabric

    components = workload.make()
    world_size = member.group.world_size
    strategy = "ddp" if world_size > 1 else "auto"
    fabric: Any = Fabric(accelerator=member.device.type, devices=world_size, strategy=strategy)
    fabric.launch()
    model, optimizer = fabric.setup(components.model, components.optimizer)
    leave.end_hard(model)
    plain = fabric.setup_dataloaders(_shuffled(components, workload, member))
    batches, scheduler = _batches(plain), components.scheduler
    backward = fabric.backward
    return _steps(batches, lambda batch: workload.mean_loss(model, batch), backward, optimizer, scheduler)


def _steps(
    batches: Iterator[Any],
    loss_of: Callable[[Any], Tensor],
    backward: Callable[[Tensor], None],
    optimizer: Any,
    scheduler: Any,
) -> Steps:
    def train(steps: int) -> None:
        for number in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(next(batches))
            backward(loss)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if number % 100 == 99:
                loss.item()  # what would be printed

    return train


def _share(workload: Workload, member: Membership) -> int:
    return workload.batch // member.group.world_size


def _shuffled(components: Components, workload: Workload, member: Membership) -> Any:
    pinned = member.device.type == "cuda"
    share = _share(workload, member)
    return DataLoader(components.train_data, share, shuffle=True, drop_last=True, pin_memory=pinned)


def _copied(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """On the device, from pinned memory, so that the host does not wait."""
    for batch in batches:
        yield pytree.tree_map_only(Tensor, lambda part: part.pin_memory().to(device, non_blocking=True), batch)


def _plain_loader(components: Components, workload: Workload, member: Membership) -> Any:
    sampler: Any = torch.utils.data.DistributedSampler(
        components.train_data, member.group.world_size, member.group.rank, drop_last=True
    )
    return DataLoader(components.train_data, _share(workload, member), sampler=sampler, drop_last=True)


def _batches(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
