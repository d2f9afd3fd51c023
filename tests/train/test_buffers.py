"""Buffers that the forward changes: integers do so alike in all shards, and steps without weight leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from samestep.launcher.contract import UsageError
from samestep.train.parallel.buffers import BufferCombiner
from samestep.train.parallel.group import SoloGroup
from samestep.train.parallel.shards import MicroBatch, StepPlan

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(
    ("shards", "ranks", "parts"),
    [
        (2, 1, 1),
        pytest.param(2, 2, 1, marks=pytest.mark.slow),
        pytest.param(2, 3, 1, marks=pytest.mark.slow),
        (1, 1, 2),
        (1, 2, 2),
    ],
)
def test_an_integer_buffer_that_counts_samples_is_named_in_the_step_where_shards_differ(
    start: Any, shards: int, ranks: int, parts: int
) -> None:
    """37 samples in batches of 8: shards of the fifth batch have 3 and 2. In batches of 7 those of the first differ."""
    flags = ("--run-dir", "run", "--counts", "samples", "--shards", shards, "--micro-batches", parts)
    for size, step, where in ((8, 5, "on average"), (7, 1, "in another")):
        ended = start("counting", *flags, "--global-batch-size", size, ranks=ranks, cwd=f"batch-{size}")
        assert ended.codes == [2] * ranks, ended.stderrs
        said, _, hint = ended.stderr.partition("\nhint: ")
        assert "error: integer buffer seen " in said
        assert f"after step {step} " in said
        assert where in said
        assert "number of steps" in hint


def test_an_integer_buffer_that_counts_steps_ends_alike_and_one_that_stays_keeps_its_bits(trained: Any) -> None:
    for shards, ranks, parts in ((1, 1, 1), (2, 1, 1), (2, 2, 1), (3, 2, 2)):
        flags = ("--shards", shards, "--micro-batches", parts)
        weights = trained("counting", *flags, ranks=ranks, cwd=f"{shards}-{ranks}-{parts}").weights
        assert weights["seen"].tolist() == [0, 5]
        assert weights["large"].tolist() == [2**62 + 1, 7]
        assert weights["norm.num_batches_tracked"].item() == 5


@pytest.mark.parametrize("shards", [1, 3])
def test_a_changing_integer_that_no_float64_holds_keeps_every_bit(shards: int) -> None:
    model = nn.Module()
    model.register_buffer("hashed", torch.tensor([2**62 + 1, -(2**53) - 1]))
    combiner = BufferCombiner(model, SoloGroup(rank=0, world_size=2), shards)  # the other rank has nothing
    combiner.owned = (0, shards)
    for step in range(3):
        plan = StepPlan(step, 0, 0, 7 * shards, shards)
        combiner.begin(plan)
        total = torch.zeros(combiner.width, dtype=torch.float64)
        for shard in range(shards):
            (part,) = plan.parts(shard)
            combiner.before(part)
            combiner.buffers["hashed"] += 2
            combiner.after(part)
            total += combiner.of_shard()
        combiner.finish(total)
    assert combiner.buffers["hashed"].tolist() == [2**62 + 7, -(2**53) + 5]


def test_with_one_shard_in_one_part_an_integer_buffer_may_count_samples(trained: Any) -> None:
    for ranks in (1, 2):
        ended = trained("counting", "--counts", "samples", "--shards", 1, ranks=ranks, cwd=f"W{ranks}")
        assert ended.weights["seen"].tolist() == [0, 37]


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_buffer_that_is_put_anew_is_one_that_changes(trained: Any, parts: int) -> None:
    """`self.mean = …` in forward, on any number of ranks; a view that nobody writes to is left alone."""
    flags = ("--shards", 4, "--micro-batches", parts)
    in_place = trained("centered", *flags, cwd="in-place").bits
    for ranks in (1, 2, 3):
        assert trained("centered", *flags, "--assigned", ranks=ranks, cwd=f"on-{ranks}").bits == in_place


@pytest.mark.parametrize("assigned", [False, True])
@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_buffer_that_no_state_dict_has_goes_on_after_a_stop(trained: Any, assigned: bool, shards: int) -> None:
    flags = ("--shards", shards, "--no-persistent", *["--assigned"] * assigned)
    whole = trained("centered", *flags, cwd="whole").bits
    trained("centered", *flags, "--max-steps", 3, ranks=shards)
    assert trained("centered", *flags).bits == whole
    assert whole["losses"] == trained("centered", *flags[:2], cwd="persistent").bits["losses"]


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int32))


def test_a_complex_buffer_that_changes_is_named() -> None:
    """Its mean over shards was that of its real part."""
    model = nn.Module()
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    combiner = BufferCombiner(model, SoloGroup(), 2)
    plan = StepPlan(0, 0, 0, 4, 2)
    combiner.begin(plan)
    for shard in (0, 1):
        (part,) = plan.parts(shard)
        combiner.before(part)
        model.get_buffer("phase").add_(1j)
        combiner.after(part)
        combiner.of_shard()
    with pytest.raises(UsageError, match="phase is complex"):
        combiner.finish(torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("deleted", [False, True])
def test_a_buffer_that_a_forward_takes_away_is_named(deleted: bool, step: int) -> None:
    model = Buffered()
    combiner = BufferCombiner(model, SoloGroup(), 1)
    for number in range(step):
        run_step(combiner, number, [1])
    plan = StepPlan(step, 0, 0, 2, 1)
    combiner.begin(plan)
    combiner.before(plan.parts(0)[0])
    if deleted:
        del model.mean
    else:
        model.mean = None  # type: ignore[assignment]
    with pytest.raises(UsageError, match="but mean is None, or gone"):
        combiner.after(plan.parts(0)[0])


class Masked(nn.Module):
    """Makes a mask in each forward: of one size, or of that of the batch."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.rows = rows
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mask = torch.ones(len(x) if self.rows else 4)
        return self.layer(x) * self.mask[: len(x), None]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("rows", [False, True])
def test_a_buffer_that_is_made_from_the_batch_each_time_is_left_to_the_forward(rows: bool, shards: int) -> None:
    model = Masked(rows)
    combiner = BufferCombiner(model, SoloGroup(), shards)
    for step, samples in enumerate((4, 4, 3)):
        plan = StepPlan(step, 0, 0, samples, shards)
        combiner.begin(plan, keep=True)
        total, left = torch.zeros(combiner.width, dtype=torch.float64), 0
        for shard in plan.present((0, shards)):
            (part,) = plan.parts(shard)
            left = part.samples if rows else 4
            combiner.before(part)
            model(torch.ones(part.samples, 3))
            combiner.after(part)
            if combiner.width:
                total = total + combiner.of_shard()
        combiner.finish(total)
        assert model.mask.tolist() == [1.0] * left
    assert combiner.changing == []


def run_step(combiner: BufferCombiner, step: int, added: list[int]) -> None:
    """One shard of two samples for each number, on one rank."""
    plan = StepPlan(step, 0, 0, 2 * len(added), len(added))
    combiner.begin(plan)
    total = torch.zeros(combiner.width, dtype=torch.float64)
    for shard, number in enumerate(added):
        (part,) = plan.parts(shard)
        combiner.before(part)
        combiner.buffers["counts"][2] += number
        combiner.buffers["mean"][0] += 1
        combiner.after(part)
        total += combiner.of_shard()
    combiner.finish(total)


def test_shards_that_differ_are_seen_where_their_mean_is_that_of_one_of_them() -> None:
    combiner = BufferCombiner(Buffered(), SoloGroup(), 3)
    run_step(combiner, 0, [1, 1, 1])
    run_step(combiner, 1, [4, 4, 4])
    with pytest.raises(UsageError, match=r"buffer counts .* after step 3 it is 6.* and 7 on average"):
        run_step(combiner, 2, [2, 1, 3])


@pytest.mark.parametrize(
    ("value", "said"), [(5, "it is 7 .* and 8 on average"), (2**40, f"it is {2**40 + 2} .* another")]
)
def test_a_large_number_that_differs_is_named_as_it_is(value: int, said: str) -> None:
    model = Buffered()
    model.register_buffer("counts", torch.tensor([0, 0, value]))
    with pytest.raises(UsageError, match=f"after step 1 it is {value + 1} .* {value + 2} in another"):
        run_step(BufferCombiner(model, SoloGroup(), 3), 0, [1, 2, 3])
    model.register_buffer("counts", torch.tensor([0, 0, value]))
    combiner = BufferCombiner(model, SoloGroup(), 3)
    run_step(combiner, 0, [1, 1, 1])
    with pytest.raises(UsageError, match=f"buffer counts .* after step 2 {said}"):
        run_step(combiner, 1, [1, 2, 3])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("step", [0, 2])
def test_a_buffer_of_a_checkpoint_that_is_put_anew_in_another_type_is_named(shards: int, step: int) -> None:
    """A checkpoint's values would be rounded on their way back into the model that `build` makes."""
    model = Buffered()
    model.register_buffer("counts", torch.zeros(3, dtype=torch.int64))
    combiner = BufferCombiner(model, SoloGroup(), shards)
    for number in range(step):
        run_step(combiner, number, [1] * shards)
    before = combiner.before

    def assigned(part: MicroBatch) -> None:
        before(part)
        model.counts = combiner.buffers["counts"] = model.get_buffer("counts") + 0.5

    combiner.before = assigned  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=rf"type, but counts was put anew .* in step {step + 1}"):
        run_step(combiner, step, [1] * shards)


def test_what_is_read_late_is_named_with_the_step_in_which_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    combiner = BufferCombiner(Buffered(), SoloGroup(), 3)
    settle = combiner.settle
    monkeypatch.setattr(combiner, "settle", lambda: None)  # as on a GPU, where nothing is read in a step
    for step, added in enumerate(([1, 1, 1], [1, 1, 1], [2, 1, 3], [1, 1, 1])):
        run_step(combiner, step, added)
    with pytest.raises(UsageError, match=r"buffer counts .* after step 3 "):
        settle()
    settle()


def test_a_step_without_weight_leaves_no_trace_in_buffers_whatever_the_policy(trained: Any) -> None:
    flags = ("--weightless", "--global-batch-size", 2, "--shards", 2)
    runs = [
        trained("counting", *flags, "--nan-policy", policy, ranks=ranks, cwd=f"{policy}-{ranks}")
        for policy in ("stop", "skip")
        for ranks in (1, 2)
    ]
    assert all(run.bits == runs[0].bits for run in runs)
    empty = [event for event in runs[0].events("warning") if "no weight" in event["text"]]
    assert 0 < len(empty) < 19
    assert runs[0].weights["norm.num_batches_tracked"].item() == 19 - len(empty)
    alone = trained("counting", *flags[:-1], 1, cwd="alone")
    assert alone.weights["norm.num_batches_tracked"].item() == 19 - len(empty)


@pytest.mark.parametrize("assigned", ["--assigned", pytest.param("--no-assigned", marks=pytest.mark.slow)])
def test_a_buffer_that_few_steps_change_is_one_that_changes(trained: Any, assigned: str) -> None:
    """Also after a stop, whatever the first step does that then comes."""
    flags = ("--shards", 4, assigned)
    whole = trained("observed", *flags, cwd="whole").bits
    assert trained("observed", *flags, ranks=3, cwd="ranks").bits == whole
    for steps, ranks in ((2, 3), (6, 1)):
        trained("observed", *flags, "--max-steps", steps, ranks=ranks)
    assert trained("observed", *flags).bits == whole


@pytest.mark.parametrize("assigned", ["--assigned", "--no-assigned"])
def test_a_buffer_of_a_checkpoint_that_the_first_step_writes_as_it_was_is_one_that_changes(
    trained: Any, assigned: str
) -> None:
    """0.3 is more than the first shards have."""
    flags = ("--shards", 4, assigned, "--first", 0.3)
    whole = trained("observed", *flags, cwd="whole")
    assert whole.weights["top"].item() > 0.3
    assert trained("observed", *flags, ranks=3, cwd="ranks").bits == whole.bits


def test_a_spectral_norm_whose_vectors_stand_still_at_first_ends_in_the_same_bits(trained: Any, tmp_path: Any) -> None:
    recipe = tmp_path / "spectral.py"
    recipe.write_text(SPECTRAL)
    runs = [trained(recipe, "--shards", 3, ranks=ranks, cwd=f"on-{ranks}").bits for ranks in (1, 2)]
    assert runs[0] == runs[1]


SPECTRAL = """
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

from samestep.train import Components, supervised, train


def build(config):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(8, 1)))
    return Components(
        model=model, loss=supervised(nn.MSELoss()), optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=TensorDataset(torch.randn(64, 4), torch.randn(64, 1)),
    )


if __name__ == "__main__":
    train(build)
"""


@pytest.mark.parametrize("persistent", [False, True])
def test_a_buffer_that_changes_late_is_named(persistent: bool) -> None:
    """One of a checkpoint where the first step did not write it, another one also where it wrote the same values."""
    model = nn.Module()
    model.register_buffer("top", torch.ones(2), persistent=persistent)
    combiner = BufferCombiner(model, SoloGroup(), 2)

    def step(number: int, value: float | None) -> None:
        plan = StepPlan(number, 0, 0, 4, 2)
        combiner.begin(plan)
        total = torch.zeros(combiner.width, dtype=torch.float64)
        for shard in range(2):
            (part,) = plan.parts(shard)
            combiner.before(part)
            if value is not None:
                combiner.buffers["top"].fill_(value)
            combiner.after(part)
            if combiner.width:
                total += combiner.of_shard()
        combiner.finish(total)

    step(0, None if persistent else 1.0)
    step(1, None if persistent else 1.0)
    with pytest.raises(UsageError, match="top changed first in step 3"):
        step(2, 2.0)
