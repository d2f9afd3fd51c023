"""Ranks sum the weights of a loss, as on a GPU: sent as they are, before backward; each says what it has then."""

import os

import torch

from samestep.launcher import who_started
from samestep.train.observe.tally import StepTally
from samestep.train.parallel.exchange import BackendExchange, Exchange, TreeExchange
from samestep.train.parallel.join import join, pick_device
from samestep.train.parallel.shard_sums import ShardSums
from samestep.train.parallel.shards import StepPlan
from samestep.train.recipe import Weighted

if __name__ == "__main__":
    env = who_started.worker(os.environ)
    device = pick_device("cpu", env)
    group = join(env, device).group
    rank, world = env.rank, env.world_size
    plan = StepPlan(5, 0, 0, 8, world)
    exchanges: list[Exchange] = [TreeExchange(rank, world, world), BackendExchange(rank, world, world)]
    for exchange in exchanges:
        tally = StepTally(group, device)
        tally._reads, tally.extras, tally.own_weights = False, [], True  # as on a GPU, after the first step
        tally.begin(plan, [rank])
        weight = torch.tensor(3.0 + rank, dtype=torch.float64)
        tally.add(Weighted(torch.tensor(6.0, requires_grad=True), weight), plan.parts(rank)[0])
        sums = ShardSums(group, exchange, world, device)
        sums.begin(plan, tally.width)
        sums.push(rank, tally.of_shard())
        print(sums.finish().item(), float(tally.mine[0][1]), weight.item())
    group.barrier()
