"""Restarts that share the store of one agent, as below torchrun: each meets in a part of it that is new."""

import datetime as dt
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from samestep.train.parallel.agent_store import JoinTimeoutError, meet_anew

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def client():
    """`client()`: the agent's store as one more process sees it."""
    agents = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", agents.port, is_master=False, timeout=dt.timedelta(seconds=20))


@pytest.fixture
def pool():
    with ThreadPoolExecutor() as threads:
        yield threads


def test_a_start_sees_nothing_of_an_earlier_one_whoever_comes_first(client, pool):
    for start in range(4):
        asked = threading.Event()

        def join(rank, start=start, asked=asked):
            store = client()
            first = start % 2
            if rank == first:
                asked.set()
            else:
                asked.wait()
            found = meet_anew(store, rank, 2, 20)
            assert not found.check([f"address/{1 - rank}"]) or found.get(f"address/{1 - rank}") == f"{start}".encode()
            found.set(f"address/{rank}", f"{start}")
            return found.get(f"address/{1 - rank}")

        assert list(pool.map(join, range(2))) == [f"{start}".encode()] * 2


def test_a_start_that_never_was_complete_takes_no_rank_of_the_next_with_it(client, pool):
    with pytest.raises(JoinTimeoutError, match="rank 1 did not join"):
        meet_anew(client(), 0, 2, 0.1)
    late = pool.submit(meet_anew, client(), 1, 2, 20)  # finds the name that nobody serves any more
    first = meet_anew(client(), 0, 2, 20)
    first.set("here", "0")
    assert late.result().get("here") == b"0"


def test_ranks_that_do_not_come_are_named(client, pool):
    present = pool.submit(meet_anew, client(), 2, 4, 1)
    with pytest.raises(JoinTimeoutError, match="ranks 1, 3 did not join within 1 s"):
        meet_anew(client(), 0, 4, 1)
    with pytest.raises(JoinTimeoutError, match="rank 0 did not join"):
        present.result()
