"""P4: which samples each shard of each step consumes does not depend on ranks, workers or stops."""

import json

import pytest

from samestep.train.parallel.shards import StepPlan, owned_span

pytestmark = pytest.mark.timeout(120)
SHARDS, BATCH, SAMPLES = 4, 16, 70


def consumed(ended, ranks, first_step=0):
    """Ids by (step, shard), put together from what every rank wrote down."""
    seen = {}
    for rank in range(ranks):
        path = ended.cwd / f"ids-{rank}.jsonl"
        lines = iter(path.read_text().splitlines() if path.exists() else [])
        for step in range(first_step, len(ended.events("step"))):
            begin = step % 5 * BATCH
            plan = StepPlan(step, step // 5, begin, min(begin + BATCH, SAMPLES), SHARDS)
            for shard in plan.present(owned_span(rank, ranks, SHARDS)):
                seen[step, shard] = json.loads(next(lines))
        assert not list(lines)
        path.unlink(missing_ok=True)
    return seen


def test_every_shard_consumes_the_same_samples_on_any_ranks_and_workers_and_after_stops(trained):
    flags = ("--shards", SHARDS)
    whole = consumed(trained("consumed", *flags, cwd="whole"), 1)
    assert sorted(i for (step, _), ids in whole.items() if step < 5 for i in ids) == list(range(SAMPLES))
    for ranks, workers in ((2, 0), (3, 1), (4, 0), (5, 0)):
        ended = trained("consumed", *flags, "--num-workers", workers, ranks=ranks, cwd=f"{ranks}")
        assert consumed(ended, ranks) == whole
    stopped = consumed(trained("consumed", *flags, "--max-steps", 7, ranks=3, cwd="stopped"), 3)
    rest = consumed(trained("consumed", *flags, ranks=2, cwd="stopped"), 2, first_step=7)
    assert stopped | rest == whole
