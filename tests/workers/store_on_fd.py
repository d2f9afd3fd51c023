"""Meet the other ranks through a TCPStore on the socket that the launcher handed to rank zero."""

import os

import torch.distributed as dist

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
fd = os.environ.get("SAMESTEP_STORE_FD")
store = dist.TCPStore(
    "127.0.0.1",
    int(os.environ["SAMESTEP_STORE_PORT"]),
    world_size,
    rank == 0,
    master_listen_fd=int(fd) if fd else None,
)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
dist.barrier()
if rank == 0:
    print("met")
dist.destroy_process_group()
