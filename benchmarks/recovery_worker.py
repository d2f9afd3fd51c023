"""What benchmarks/recovery.py starts: the same small job as a recipe, and as the script one writes without samestep.

    recovery_worker.py recipe …flags of a recipe…
    recovery_worker.py script FOLDER

Each rank appends `time pid rank what` to the file that STAMPS names: `script` when its program begins, `build` when the
model is made, `loss` whenever a step begins, `exit` when it leaves because there is a file `leave-RANK` beside STAMPS.
IGNORE_TERM=1 makes ranks ignore SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

STAMPS = os.open(os.environ["STAMPS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
RANK = os.environ.get("RANK", "0")
LEAVE = Path(os.environ["STAMPS"]).with_name(f"leave-{RANK}")
STEPS, SAVE_EVERY, BATCH = 10**9, 20, 32


def stamp(what: str) -> None:
    os.write(STAMPS, f"{time.time()} {os.getpid()} {RANK} {what}\n".encode())


def begin_step() -> None:
    if LEAVE.exists():
        LEAVE.unlink()
        stamp("exit")
        os._exit(3)
    stamp("loss")


stamp("script")
if os.environ.get("IGNORE_TERM"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

import torch  # noqa: E402 (after the stamp: importing torch is a part of what is measured)
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset  # noqa: E402


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100_000, 10, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))


def recipe() -> None:
    from samestep.train import Components, supervised, train

    squared = supervised(nn.MSELoss())

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
        begin_step()
        return squared(net, batch)

    def build(config: object) -> Components:
        stamp("build")
        net = model()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        return Components(model=net, loss=loss, optimizer=optimizer, train_data=data())  # type: ignore[arg-type]

    train(build, argv=sys.argv[2:])


def script(folder: Path) -> None:
    """Joins, loads the newest checkpoint, trains, and saves through a temporary file: as careful people do."""
    dist.init_process_group("gloo")
    stamp("build")
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(model())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    dataset = data()
    sampler: DistributedSampler[object] = DistributedSampler(dataset)
    loader = DataLoader(dataset, BATCH // dist.get_world_size(), sampler=sampler)
    newest, epoch, step = folder / "checkpoint.pt", 0, 0
    if newest.exists():
        state = torch.load(newest, weights_only=True)
        net.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, step = state["epoch"], state["step"]
    while step < STEPS:
        sampler.set_epoch(epoch)
        for x, y in loader:
            begin_step()
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
            step += 1
            if step % SAVE_EVERY == 0 and dist.get_rank() == 0:
                state = {"model": net.module.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "epoch": epoch, "step": step}, newest.with_suffix(".tmp"))
                newest.with_suffix(".tmp").replace(newest)
        epoch += 1


if __name__ == "__main__":
    if sys.argv[1] == "recipe":
        recipe()
    else:
        script(Path(sys.argv[2]))
