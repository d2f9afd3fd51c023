"""Ranks that were given no address find rank zero through the run directory, whatever an earlier start left there."""

from __future__ import annotations

import datetime as dt
import json
import stat
import threading
from typing import Any

import pytest
import torch.distributed as dist

from samestep.launcher.contract import UsageError, WorkerEnv
from samestep.train.parallel.meet import meet

LONG = dt.timedelta(seconds=60)


def rank(number, world_size=2):
    return WorkerEnv(rank=number, world_size=world_size, local_world_size=world_size, distributed=True, job="mpi-1")


def dead_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def both_meet(folder):
    environ: list[dict[str, str]] = [{}, {}]
    found: dict[str, Any] = {}
    other = threading.Thread(target=lambda: found.update(one=meet(rank(1), folder, environ[1], LONG)))
    other.start()
    store, published = meet(rank(0), folder, environ[0], LONG)
    other.join(60)
    store.set("from", "zero")
    assert found["one"][0].get("from") == b"zero"
    return published, environ


def test_ranks_meet_and_learn_torchruns_names(tmp_path):
    published, environ = both_meet(tmp_path)
    assert [env["RANK"] for env in environ] == ["0", "1"]
    assert {env["MASTER_ADDR"] for env in environ} == {"127.0.0.1"}
    assert len({env["MASTER_PORT"] for env in environ}) == 1
    assert {env["GLOO_SOCKET_IFNAME"] for env in environ} == {"lo"}
    assert stat.S_IMODE(published.stat().st_mode) == 0o600


def test_a_file_of_a_start_that_died_leads_nobody_astray(tmp_path):
    (tmp_path / "meeting-mpi-1.json").write_text(json.dumps({"address": "127.0.0.1", "port": dead_port()}))
    both_meet(tmp_path)


def test_a_store_of_an_earlier_start_that_still_lives_is_not_joined(tmp_path):
    old = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    old.add("samestep/place/1", 1)
    (tmp_path / "meeting-mpi-1.json").write_text(json.dumps({"address": "127.0.0.1", "port": old.port}))
    both_meet(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"address": 1}'])
def test_a_torn_file_is_read_again(tmp_path, content):
    (tmp_path / "meeting-mpi-1.json").write_text(content)
    both_meet(tmp_path)


def test_a_run_directory_that_is_not_shared_is_named(tmp_path):
    with pytest.raises(UsageError, match="rank 1 is expected to find rank zero through") as caught:
        meet(rank(1), tmp_path, {}, dt.timedelta(seconds=0.2))
    assert "shared file system" in caught.value.hint
