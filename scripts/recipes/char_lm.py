"""A small transformer that learns to write like two modules of Python's standard library, character by character."""

import inspect
import textwrap
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samestep.train import Components, TrainConfig, Weighted, train


@dataclass
class CharConfig(TrainConfig):
    epochs: int = 2
    global_batch_size: int = 16
    log_every: int = 10
    context: int = 64
    width: int = 64


class CharTransformer(nn.Module):
    def __init__(self, characters: int, context: int, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, characters, bias=False)
        self.head.weight = self.characters.weight  # tied

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.head(self.layers(self.characters(ids) + self.positions, mask=mask, is_causal=True))


def next_character_loss(model: nn.Module, lines: Tensor) -> Weighted:
    """Sum over characters, weighted by how many there are: short lines are padded with 0, which is not learned."""
    targets = lines[:, 1:]
    logits = model(lines[:, :-1])
    total = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum")
    return Weighted(total, (targets != 0).sum())


def build(config: CharConfig) -> Components:
    text = inspect.getsource(inspect) + inspect.getsource(textwrap)
    ids = {character: number for number, character in enumerate(sorted(set(text)), start=1)}
    lines = [line[: config.context + 1] for line in text.splitlines() if len(line) > 1]
    data = torch.zeros(len(lines), config.context + 1, dtype=torch.long)
    for row, line in enumerate(lines):
        data[row, : len(line)] = torch.tensor([ids[character] for character in line])
    model = CharTransformer(len(ids) + 1, config.context, config.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    return Components(model=model, loss=next_character_loss, optimizer=optimizer, train_data=data)


if __name__ == "__main__":
    train(build, CharConfig)
