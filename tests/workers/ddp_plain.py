"""A hand-written DDP script that knows nothing of samestep; `--fail-rank N` raises in its third step."""

import argparse
import gc
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main(fail_rank: int) -> None:
    """Train, in a function, so that nothing holds the model afterwards."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(10, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        if step == 2 and dist.get_rank() == fail_rank:
            raise ValueError(f"bad sample on rank {fail_rank}")
        optimizer.zero_grad()
        model(torch.randn(32, 10)).mean().backward()
        optimizer.step()
    if dist.get_rank() == 0:
        print(f"trained on {dist.get_world_size()} ranks, restart {os.environ['TORCHELASTIC_RESTART_COUNT']}")


parser = argparse.ArgumentParser()
parser.add_argument("--fail-rank", type=int, default=-1)
args = parser.parse_args()
dist.init_process_group("gloo")
main(args.fail_rank)
gc.collect()  # a DDP object that lives at interpreter exit aborts now and then in torch, under any launcher
dist.destroy_process_group()
