"""What the last start left is read with care, also where it was edited by hand; what changed since is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from samestep.launcher.contract import UsageError
from samestep.train import TrainConfig, environment
from samestep.train.config import plain
from samestep.train.data import rng
from samestep.train.last_start import changes, settings

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "small.py"


@pytest.mark.parametrize("name", ["shards", "threads", "micro_batches"])
@pytest.mark.parametrize("value", [-4, 0, 1.5, "2", True, [1], {}, 10**30])
def test_what_is_no_number_from_1_is_named_with_its_file_and_value(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({name: value}))
    with pytest.raises(UsageError) as refused:
        settings(tmp_path / "config.json")
    expected = f"{name} in {tmp_path / 'config.json'} is expected to be a whole number from 1, but is"
    assert refused.value.message == f"{expected} {json.dumps(value)}"
    assert refused.value.hint


@pytest.mark.parametrize("name", ["config", "environment"])
@pytest.mark.parametrize("value", [5, "x", [1]])
def test_what_is_no_object_is_named(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({name: value}))
    with pytest.raises(UsageError, match=f"{name} in .* is expected to be an object, but is"):
        settings(tmp_path / "config.json")


@pytest.mark.parametrize("text", [b"{", b"", b"[1]", b"\xff", b"[" * 100_000, b'{"threads": null}'])
def test_what_is_no_json_object_or_null_tells_nothing(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    assert settings(tmp_path / "config.json") == {}


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("file", ["config.json", "micro_batches.json"])
def test_a_run_with_an_edited_file_ends_with_2_and_is_said_once_by_two_ranks(
    rank_server: Any, tmp_path: Path, file: str
) -> None:
    flags = (RECIPE, "--run-dir", "run", "--max-steps")
    first = rank_server(tmp_path, *flags, 2, ranks=2)
    path = first.run_dir / file
    content = json.loads(path.read_text()) if path.exists() else {}
    name = "threads" if file == "config.json" else "micro_batches"
    path.write_text(json.dumps(content | {name: -4}))
    ended = rank_server(tmp_path, *flags, 4, ranks=2)
    assert ended.codes == [2, 2]
    assert ended.stderrs.count(f"error: {name} in ") == 1
    assert "but is -4\nhint: " in ended.stderr
    assert "Traceback" not in ended.stderrs


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_settings_that_config_json_lacks_come_from_the_checkpoint(rank_server: Any, tmp_path: Path) -> None:
    flags = (RECIPE, "--run-dir", "run", "--max-steps")
    first = rank_server(tmp_path, *flags, 2, "--shards", 3, "--threads", 1)
    content = json.loads((first.run_dir / "config.json").read_text())
    for name in ("shards", "threads"):
        del content[name]
    (first.run_dir / "config.json").write_text(json.dumps(content))
    assert set(rank_server(tmp_path, *flags, 4).codes) == {0}
    after = json.loads((first.run_dir / "config.json").read_text())
    assert (after["shards"], after["threads"]) == (3, 1)


def test_when_evaluations_come_is_a_change_of_bits_where_the_learning_rate_follows_them():
    config, stored = TrainConfig(eval_every=3), {"config": {"eval_every": 5}}
    assert changes(config, stored, {}) == []
    (text,) = changes(config, stored, {}, follows_evaluations=True)
    assert text.startswith("--eval-every changed from 5 to 3 since the last start")


def test_a_run_that_drew_other_random_numbers_is_told_so() -> None:
    now = environment.record(torch.device("cpu"))
    assert now["random_numbers"] == rng.SPEC
    before = {name: value for name, value in now.items() if name != "random_numbers"}
    config = TrainConfig()
    for known, was in ((before, None), (before | {"random_numbers": "other/1"}, "other/1")):
        told = changes(config, {"config": plain(config), "environment": known}, now)
        assert told == [f"random_numbers changed from {was} to {rng.SPEC} since the last start"]
