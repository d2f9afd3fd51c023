"""What a step's event says, computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, get_args, get_origin, get_type_hints

import pytest

from samestep.launcher import contract
from samestep.train.observe.event_log import EventLog
from samestep.train.observe.ledger import StepRecords


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`written((now, records), ...)`: the step events of one flush after the other, which began at 90 s."""

    def write(*flushes: tuple[float, StepRecords]) -> list[dict[str, Any]]:
        clock = iter([90.0, *(now for now, _ in flushes)])
        log = EventLog(tmp_path / "events.jsonl", lambda: next(clock))
        for _, records in flushes:
            log.write_steps(records)
        return [json.loads(line) for line in log.path.read_text().splitlines()]

    return write


def test_each_step_has_the_time_of_its_own_end(written: Any, records: Any) -> None:
    first, second = records(walls=[1.0, 2.0, 3.0]), records(walls=[5.0, 0.5], begin=3)
    events = written((100.0, first), (101.0, second))
    times = [event["time"] for event in events]
    assert times == [95.0, 97.0, 100.0, 100.5, 101.0]
    late = written((91.0, records(walls=[1.0, 8.0])))
    assert [event["time"] for event in late][-2:] == [90.0, 91.0], "none before the start"


def test_slow_steps_have_a_speed_too(written: Any, records: Any) -> None:
    slow, slower, fast = written((9999.0, records(walls=[40.0, 3600.0, 1e-5], samples=1)))
    assert [event["samples_per_s"] for event in (slow, slower, fast)] == [0.025, pytest.approx(1 / 3600, rel=1e-6), 1e5]


def test_a_step_without_weight_is_told_from_one_that_is_not_finite(written: Any, records: Any) -> None:
    nan = float("nan")
    events = written((100.0, records(walls=[1.0] * 3, losses=[0.5, nan, nan], weightless=[False, True, False])))
    assert [(event["loss"], event.get("weightless")) for event in events] == [(0.5, None), (None, True), (None, None)]


def test_every_event_has_the_fields_that_the_contract_promises_and_no_others(trained: Any) -> None:
    kinds: dict[str, Any] = {}
    for kind in get_args(contract.Event):
        kinds |= dict.fromkeys(get_args(get_type_hints(kind)["event"]), kind)
    trained("small", "--max-steps", 5, "--checkpoint-every", 2, ranks=2)
    ended = trained("small", "--log-every", 3, env={"SAMESTEP_EPOCH": "3"})
    events = [json.loads(line) for line in (ended.run_dir / "events.jsonl").read_text().splitlines()]
    usual = {"run_started", "resumed", "step", "epoch", "eval", "checkpoint", "warning", "run_finished"}
    assert usual <= {event["event"] for event in events} <= kinds.keys()
    for event in events:
        fields = get_type_hints(kinds[event["event"]], include_extras=True)
        required = {name for name, hint in fields.items() if get_origin(hint) is not NotRequired}
        assert required <= event.keys() <= fields.keys(), event
