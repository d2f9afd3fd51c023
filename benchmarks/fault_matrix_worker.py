"""What benchmarks/fault_matrix.py starts: one small job as a recipe, and as a careful script without samestep.

    fault_matrix_worker.py recipe …flags of a recipe…
    fault_matrix_worker.py script FOLDER

The script does all that is usually recommended: DistributedSampler with set_epoch, an atomic snapshot every SAVE_EVERY
steps of model, optimizer, every rank's random state, epoch and step, and a resume in mid-epoch that skips what was
used. Undisturbed or resumed cleanly it ends in the same bits on the same number of ranks. Each rank appends
`time pid rank what step` to the file STAMPS, and does what the file `fault-RANK` beside it says, once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import time
from pathlib import Path

STAMPS = os.open(os.environ["STAMPS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
RANK = os.environ.get("RANK", "0")
FAULT = Path(os.environ["STAMPS"]).with_name(f"fault-{RANK}")
EPOCHS, SAMPLES, BATCH, SAVE_EVERY = 4, 800, 32, 5
STEPS = EPOCHS * SAMPLES // BATCH


def stamp(what: str, step: int = 0) -> None:
    os.write(STAMPS, f"{time.time()} {os.getpid()} {RANK} {what} {step}\n".encode())


def suffer() -> None:
    if not FAULT.exists():
        return
    kind = FAULT.read_text()
    FAULT.unlink()
    if kind == "exception":
        raise RuntimeError("injected")
    if kind == "exit-0":
        sys.exit(0)
    if kind == "segfault":
        ctypes.string_at(0)


stamp("script")
suffer()

import torch  # noqa: E402 (a part of joining)
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset  # noqa: E402


class Lines(Dataset[tuple[Tensor, Tensor]]):
    """Samples one by one, from a process that loads them: tensors as a whole would need none."""

    def __init__(self) -> None:
        self.x = torch.randn(SAMPLES, 20, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.x[index].sum().unsqueeze(0)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))


def recipe() -> None:
    from samestep.train import Components, supervised, train

    squared = supervised(nn.MSELoss())

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
        suffer()
        stamp("loss")
        return squared(net, batch)

    def build(config: object) -> Components:
        stamp("build")
        net = model()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        return Components(model=net, loss=loss, optimizer=optimizer, train_data=Lines())  # type: ignore[arg-type]

    train(build, argv=sys.argv[2:])


def save(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, step: int) -> None:
    random = [torch.empty_like(torch.get_rng_state()) for _ in range(dist.get_world_size())]
    dist.all_gather(random, torch.get_rng_state())
    if dist.get_rank() == 0:
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "random": random}
        torch.save({**state, "epoch": epoch, "step": step}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)


def script(folder: Path) -> None:
    dist.init_process_group("gloo")
    stamp("build")
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(model())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    torch.manual_seed(dist.get_rank())
    dataset, newest, random, step = Lines(), folder / "snapshot.pt", None, 0
    if newest.exists():
        state = torch.load(newest, weights_only=True)
        net.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        random, step = state["random"][dist.get_rank()], state["step"]
    size, in_epoch = BATCH // dist.get_world_size(), SAMPLES // BATCH
    sampler: DistributedSampler[int] = DistributedSampler(dataset, seed=0)
    while step < STEPS:
        epoch = step // in_epoch
        sampler.set_epoch(epoch)
        rest = Subset(dataset, [*sampler][step % in_epoch * size :])
        if random is not None and step % in_epoch == 0:
            torch.set_rng_state(random)
        batches = iter(DataLoader(rest, size, num_workers=1))  # draws a seed for its worker
        if random is not None and step % in_epoch:
            torch.set_rng_state(random)
        random = None
        for x, y in batches:
            suffer()
            stamp("loss", step)
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
            step += 1
            stamp("step", step)
            if step % SAVE_EVERY == 0:
                save(newest, net.module, optimizer, epoch, step)
    if dist.get_rank() == 0:
        weights = b"".join(value.numpy().tobytes() for value in net.module.state_dict().values())
        (folder / "digest").write_text(hashlib.sha256(weights).hexdigest())
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "recipe":
        recipe()
    else:
        script(Path(sys.argv[2]))
