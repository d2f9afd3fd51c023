"""A loss or gradient that is NaN or infinite: all ranks do the same in the same step, and nothing of it is saved."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from samestep.launcher.contract import ErrorRecord
from samestep.train.data.order import permute
from samestep.train.finite import start_of_backward
from samestep.train.finite_gradients import any_not_finite

pytestmark = pytest.mark.timeout(120)
KINDS = ("input", "constant", "gradient", "weighted")
SAMPLE = 37


def step_of(sample: int, epoch: int) -> int:
    """The step, counted from 1, of an epoch of 120 samples in batches of 18 that has `sample`."""
    order = permute(np.arange(120, dtype=np.int64), 120, 0, epoch).tolist()
    return epoch * 7 + order.index(sample) // 18 + 1


BAD_STEPS = [step_of(SAMPLE, 0), step_of(SAMPLE, 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_stop_names_step_rank_and_samples_and_saves_nothing_of_it(start: Any, kind: str, ranks: int) -> None:
    flags = ("--run-dir", "run", "--shards", "3", "--checkpoint-every", "1", "--keep-checkpoints", "99")
    ended = start("poisoned", *flags, ranks=ranks, env={"POISON": f"{kind}:{SAMPLE}"})
    assert set(ended.codes) == {1}, ended.stderrs
    about = json.loads((ended.run_dir / "errors" / f"not-finite-step-{BAD_STEPS[0]:08d}.json").read_text())
    assert about["step"] == BAD_STEPS[0]
    assert SAMPLE in about["samples"]
    assert len(about["samples"]) == (18 if kind == "gradient" else 6)
    assert f"step {BAD_STEPS[0]}" in ended.stderrs
    assert "Traceback" not in ended.stderrs
    records = [ErrorRecord.from_json((ended.run_dir / "errors" / f"rank-{r}.json").read_text()) for r in range(ranks)]
    guilty = about["ranks"] or [0]
    assert [record.rank for record in records if not record.consequence] == guilty
    assert all(record.final for record in records)
    saved = sorted(path.name for path in (ended.run_dir / "checkpoints").iterdir() if path.suffix == "")
    assert saved in [[f"step-{step:08d}" for step in range(1, last)] for last in (BAD_STEPS[0] - 1, BAD_STEPS[0])]


@pytest.mark.parametrize(
    "kind", ["weighted", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gradient", "input", "constant"))]
)
def test_skip_and_rewind_come_to_the_same_bits_on_any_number_of_ranks(trained: Any, kind: str) -> None:
    env = {"POISON": f"{kind}:{SAMPLE}"}
    runs = []
    for policy, ranks in (("skip", 1), ("skip", 2), ("skip", 3), ("rewind", 1), ("rewind", 2), ("rewind", 3)):
        flags = ("--nan-policy", policy, "--shards", "3", "--checkpoint-every", "4")
        runs.append(trained("poisoned", *flags, ranks=ranks, cwd=f"{policy}-{ranks}", env=env))
        assert [event["step"] for event in runs[-1].events("step")] == list(range(1, 15))
        warnings = [event["text"] for event in runs[-1].events("warning")]
        assert len(warnings) == 2
        for step, text in zip(BAD_STEPS, warnings, strict=True):
            assert f"step {step} " in text
            assert str(SAMPLE) in text or kind == "gradient"
    assert all(run.bits == runs[0].bits for run in runs)
    assert all(torch.isfinite(tensor).all() for tensor in runs[0].weights.values())
    assert runs[0].events("epoch")[0]["loss"] is not None


@pytest.mark.parametrize("policy", [pytest.param("skip", marks=pytest.mark.slow), "rewind"])
def test_a_resume_after_a_step_was_left_out_ends_in_the_same_bits(trained: Any, policy: str) -> None:
    flags, env = ("--nan-policy", policy, "--shards", "2"), {"POISON": f"input:{SAMPLE}"}
    whole = trained("poisoned", *flags, cwd="whole", env=env)
    for stop in sorted({BAD_STEPS[0] - 1, BAD_STEPS[0], BAD_STEPS[0] + 1} - {0}):
        trained("poisoned", *flags, "--max-steps", stop, cwd=f"stop-{stop}", ranks=2, env=env)
        ended = trained("poisoned", *flags, cwd=f"stop-{stop}", env=env)
        assert ended.bits == whole.bits
        assert ended.events("run_finished")[-1]["restarts"] == 1, "to go back is no restart, and undoes none"


def test_the_policy_moves_no_bit_of_a_run_that_stays_finite(trained: Any) -> None:
    policies = ("stop", "skip", "rewind")
    runs = [trained("poisoned", "--nan-policy", policy, "--shards", "2", ranks=2, cwd=policy) for policy in policies]
    assert all(run.bits == runs[0].bits for run in runs)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_run_that_is_never_finite_is_given_up(start: Any, policy: str) -> None:
    ended = start("poisoned", "--run-dir", "run", "--nan-policy", policy, ranks=2, env={"POISON": "all:"})
    assert set(ended.codes) == {1}, ended.stderrs
    assert "neither were the 10 steps before it" in ended.stderrs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_anywhere_is_found(dtype: torch.dtype, value: float) -> None:
    good = [torch.tensor([1.0, -0.0, 1e-45, 3e38]).to(dtype), torch.ones(3, dtype=torch.float64)]
    before = [tensor.clone() for tensor in good]
    assert any_not_finite(good).item() == 0
    assert all(torch.equal(left, right) for left, right in zip(good, before, strict=True))
    assert any_not_finite([*good, torch.tensor([0, value]).to(dtype)]).item() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_in_a_large_gradient_is_found_and_a_sum_that_overflows_is_none(
    dtype: torch.dtype, value: float
) -> None:
    largest = 65504.0 if dtype is torch.float16 else 3e38
    good = torch.full((1 << 15,), largest).to(dtype)
    before = good.clone()
    assert any_not_finite([good]).item() == 0
    assert torch.equal(good, before)
    good[1 << 14] = value
    assert any_not_finite([good]).item() > 0
    both = torch.ones(1 << 15, dtype=dtype)
    both[0], both[1] = value, -value
    assert any_not_finite([torch.ones(3, dtype=dtype), both]).item() > 0


@pytest.mark.parametrize("large", [0, 1, 40])
@pytest.mark.parametrize("small", [0, 1, 40])
def test_one_bad_number_among_many_gradients_is_found_and_the_next_step_is_clear(small: int, large: int) -> None:
    gradients = [torch.ones(3) for _ in range(small)] + [torch.ones(1 << 14) for _ in range(large)]
    for bad in gradients:
        bad[-1] = float("nan")
        assert any_not_finite(gradients).item() > 0
        bad[-1] = 3e38
        assert any_not_finite(gradients).item() == 0


@pytest.mark.parametrize("loss", [0.0, -0.0, 1e-45, 3.4e38, -7.5])
def test_backward_of_a_finite_loss_starts_from_exactly_one(loss: float) -> None:
    assert torch.equal(start_of_backward(torch.tensor(loss)), torch.tensor(1.0))


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_backward_of_any_other_loss_starts_from_nan(loss: float) -> None:
    assert torch.isnan(start_of_backward(torch.tensor(loss)))
