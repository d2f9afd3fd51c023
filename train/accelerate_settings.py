"""What `accelerate launch`, its configuration file or variables left in a shell ask for, and a recipe decides itself.

The recipe's own flags alone decide the bits, so that they are the same under every launcher. What accelerate was asked
for besides is never obeyed in silence, nor dropped: it is named with the flag that does it, or refused.

Source: accelerate/utils/launch.py, which turns flags into variables.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from accelerate.commands.config.config_args import load_config_from_file

from samestep.launcher.command_line import options
from samestep.launcher.contract import UsageError
from samestep.train.config import TrainConfig

_OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}


def refuse_other_engines(environ: Mapping[str, str]) -> None:
    """Refuse what cuts a model over the ranks: each rank of a recipe holds all of it.

    Raises:
        UsageError: names the variable.
    """
    for name, engine in _OTHER_ENGINES.items():
        if environ.get(name, "").lower() == "true":
            raise UsageError(
                f"{name} is expected to be unset, since each rank holds the whole model, but asks for {engine}",
                f"unset {name}, or give accelerate launch --multi_gpu in place of {engine}",
            )


def not_followed(config: TrainConfig, environ: Mapping[str, str]) -> list[str]:
    """A sentence for each wish of accelerate's that the recipe's flags do not share."""

    def asked(name: str, nothing: str) -> str:
        return environ.get(f"ACCELERATE_{name}", "").lower() or nothing

    precision, backend = asked("MIXED_PRECISION", "no"), asked("DYNAMO_BACKEND", "no")
    parts, clip = asked("GRADIENT_ACCUMULATION_STEPS", "1"), asked("GRADIENT_CLIPPING", "none")
    flag = f"--precision {precision}" if precision in ("fp16", "bf16") else "--precision fp16 or bf16"
    size = config.global_batch_size
    wishes = [
        (precision in ("no", config.precision), "MIXED_PRECISION", precision, f"--precision {config.precision}", flag),
        (backend == "no" or config.compile, "DYNAMO_BACKEND", backend, "without --compile", "--compile"),
        (parts == "1", "GRADIENT_ACCUMULATION_STEPS", parts, f"a step of {size} samples", "--global-batch-size"),
        (clip == "none" or config.clip_grad_norm, "GRADIENT_CLIPPING", clip, "without clipping", "--clip-grad-norm"),
    ]
    return [
        f"ACCELERATE_{name} asks for {wanted}, but the recipe's flags decide ({now}): give {flag} after the recipe"
        for followed, name, wanted, now, flag in wishes
        if not followed
    ]


def fewer_than_asked(environ: Mapping[str, str], parent: Sequence[str]) -> str:
    """A sentence where `accelerate launch` was asked for several processes and started this one alone; else empty.

    Without GPUs it does so silently unless `--multi_gpu` is given. `parent` is the command line of the parent process.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environ or "launch" not in parent:
        return ""
    asked = options.peek(parent, "num-processes") or _in_its_file(options.peek(parent, "config-file"))
    if not asked.isdigit() or int(asked) < 2:
        return ""
    return (
        f"accelerate launch was asked for {asked} processes, but started this one alone; "
        "pass --multi_gpu, which is its way to start several, on CPUs too"
    )


def _in_its_file(path: str | None) -> str:
    """Processes that accelerate's configuration asks for, its default file without a path; empty where none says so."""
    with contextlib.suppress(Exception):  # the launcher has read it, and complained where there was reason to
        return str(load_config_from_file(path).num_processes)
    return ""
