"""What accelerate's variables ask for moves no bit, and is named or refused."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from samestep.launcher.contract import UsageError, WorkerEnv
from samestep.train.accelerate_settings import fewer_than_asked, not_followed
from samestep.train.config import TrainConfig
from samestep.train.parallel import join as join_module
from samestep.train.parallel.join import pick_device

ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}
pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_variables_of_accelerate_move_no_bit_on_any_number_of_ranks(trained, precision):
    wishes = {"MIXED_PRECISION": "bf16", "DYNAMO_BACKEND": "EAGER", "GRADIENT_ACCUMULATION_STEPS": "4"}
    environ = {f"ACCELERATE_{name}": wish for name, wish in wishes.items()}
    flags = ("--shards", 2, "--precision", precision)
    plain = trained("small", *flags, cwd="plain")
    for ranks in (1, 2):
        asked = trained("small", *flags, ranks=ranks, env=environ, cwd=f"asked-{ranks}")
        assert asked.bits == plain.bits
        named = [name for name in wishes if f"ACCELERATE_{name} asks for" in asked.stderr]
        assert named == [name for name in wishes if precision == "no" or name != "MIXED_PRECISION"]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_cuts_the_model_over_ranks_is_refused(start, engine):
    name = f"ACCELERATE_USE_{engine}"
    ended = start("small", ranks=2, env={name: "true"})
    assert ended.codes == [2, 2]
    assert f"error: {name} is expected to be unset" in ended.stderr
    assert "Traceback" not in ended.stderrs
    assert ended.stderrs.count("error: ") == 1


def test_what_the_recipes_flags_say_too_is_not_named():
    config = TrainConfig(precision="bf16", compile=True, clip_grad_norm=1.0)
    shared = {"MIXED_PRECISION": "bf16", "DYNAMO_BACKEND": "INDUCTOR", "GRADIENT_CLIPPING": "1.0"}
    assert not_followed(config, {f"ACCELERATE_{name}": wish for name, wish in shared.items()}) == []
    unset = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "GRADIENT_ACCUMULATION_STEPS": "1"}
    assert not_followed(TrainConfig(), {f"ACCELERATE_{name}": wish for name, wish in unset.items()}) == []


def test_an_accelerator_of_the_recipes_own_with_other_settings_is_refused_on_several_ranks():
    """Alone, ours takes its place while training goes on (see test_called_twice)."""
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(UsageError, match="leave accelerate's settings to train") as refused:
        join_module._accelerator(torch.device("cpu"), 2)
    assert "leave it out" in str(refused.value)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_kept_on_the_cpu_keeps_the_recipe_there():
    environ = {"ACCELERATE_USE_CPU": "True"}
    assert pick_device("auto", WorkerEnv(), environ).type == "cpu"
    with pytest.raises(UsageError, match="since ACCELERATE_USE_CPU is true, but is cuda"):
        pick_device("cuda", WorkerEnv(), environ)


def test_processes_that_only_accelerates_file_asks_for_are_missed_too(tmp_path):
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 3\nuse_cpu: true\n"
    )
    parent = ["python", "accelerate", "launch", "--config_file", str(file), "recipe.py"]
    assert "asked for 3 processes, but started this one alone" in fewer_than_asked(LAUNCHED, parent)
    assert fewer_than_asked(LAUNCHED, [*parent[:4], str(tmp_path / "none.yaml")]) == ""
    assert fewer_than_asked({}, parent) == ""
