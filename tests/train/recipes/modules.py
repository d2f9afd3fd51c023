"""Modules of torch that keep something to themselves, or are made of hooks, one after the other."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(
            spectral_norm(nn.Linear(8, 8)),
            parametrizations.spectral_norm(nn.Linear(8, 8)),
            parametrizations.weight_norm(nn.Linear(8, 8)),
            parametrizations.orthogonal(nn.Linear(8, 8)),
            nn.BatchNorm1d(8),
            nn.Dropout(0.1),
            nn.RReLU(),
        )
        self.image = nn.Sequential(
            nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 3, padding=1), nn.InstanceNorm1d(4, track_running_stats=True)
        )
        self.attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.whole = nn.TransformerEncoder(self.attention, 2, enable_nested_tensor=False)
        self.cells = nn.ModuleList([nn.GRUCell(4, 4), nn.LSTMCell(4, 4)])
        self.recurrent = nn.LSTM(4, 4, 2, batch_first=True, dropout=0.1, bidirectional=True)
        self.table = nn.Embedding(5, 8, max_norm=None, padding_idx=0)
        self.last = nn.Bilinear(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.whole(self.attention(self.image(self.before(x))))
        step = self.cells[0](hidden[:, 0])
        step, _ = self.cells[1](step)
        hidden, _ = self.recurrent(hidden + step.unsqueeze(1))
        out: Tensor = self.last(hidden.mean(1), self.table(x.argmax(1) % 5))
        return out


def build(config: TrainConfig) -> Components:
    model, x = Model(), torch.randn(64, 8)
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        train_data=TensorDataset(x, x.sum(1, keepdim=True)),
    )


if __name__ == "__main__":
    train(build)
