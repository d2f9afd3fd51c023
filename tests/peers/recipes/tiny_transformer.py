"""A transformers model made from a config, with tied embeddings, dropout and an output that is an object."""

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from samestep.train import Components, TrainConfig, Weighted, train


class Digits(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(12) * (index % 7 + 1) + index) % 32
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Weighted:
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    labels = batch["input_ids"][:, 1:].flatten()
    return Weighted(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), labels.numel())


def build(config: TrainConfig) -> Components:
    shape = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    return Components(model=model, loss=loss, optimizer=optimizer, train_data=Digits())


if __name__ == "__main__":
    train(build)
