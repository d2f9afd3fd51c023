"""The seed's job gives what a hand-written loop gives, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

RECIPE = Path(__file__).resolve().parents[2] / "scripts" / "recipes" / "seed_linear.py"


@pytest.mark.timeout(60)
def test_first_epoch_equals_a_hand_written_loop_bit_for_bit(
    trained: Any, slow_order: Callable[[int, int, int], list[int]]
) -> None:
    ended = trained(RECIPE, "--epochs", 1, "--threads", 1)

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10_000, 10, generator=generator), torch.randn(10_000, 1, generator=generator)
    model = nn.Linear(10, 1)
    first = trained(RECIPE, "--epochs", 0, "--threads", 1, cwd="untrained").weights
    model.load_state_dict(first)
    criterion, optimizer = nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.tensor(slow_order(10_000, 0, 0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    total = 0.0
    for ids in order.split(32):
        optimizer.zero_grad()
        loss = criterion(model(x[ids]), y[ids])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(ids)
    torch.set_num_threads(threads)

    (epoch,) = ended.events("epoch")
    assert epoch["loss_hex"] == (total / 10_000).hex()
    assert epoch["samples"] == 10_000
    for name, weight in model.state_dict().items():
        assert torch.equal(ended.weights[name], weight), name
    assert not torch.equal(first["weight"], model.weight)


@pytest.mark.timeout(60)
def test_initial_weights_are_a_function_of_the_seed(trained: Any) -> None:
    digests = [
        trained(RECIPE, "--epochs", 0, "--seed", seed, "--shards", 2, ranks=ranks, cwd=f"{seed}-{ranks}").digest
        for seed, ranks in ((0, 1), (0, 2), (1, 1))
    ]
    assert digests[0] == digests[1] != digests[2]
