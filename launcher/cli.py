"""The `samestep` command: words in, one exit code out. Anything slow to import is imported where it is needed."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from samestep.launcher.command_line import stdout
from samestep.launcher.command_line.pages import PAGES
from samestep.launcher.contract import ExitCode, UsageError

if TYPE_CHECKING:
    from samestep.launcher.command_line.argv import Recipe

Config = TypeVar("Config")

USAGE = """\
usage: samestep run [options] recipe.py [recipe options]
       samestep submit slurm|kubernetes [options] recipe.py [...] | samestep verify|chaos [options] recipe.py
       samestep watch|stacks|plan RUN_DIR | samestep report RUN_DIR ... | samestep digest [--state] [--json] PATH
       samestep doctor | samestep completion SHELL | samestep run --help | samestep --version | samestep --help"""

HELP = f"""\
{USAGE}

Distributed PyTorch training whose runs come out the same.

  run      start a recipe on several processes of this machine: torchrun's options, accelerate's names as aliases
  verify   run the first steps of a recipe at several world sizes and with stops, and compare the bits
  chaos    strike a recipe with faults while it trains, and compare the bits with those of an undisturbed run
  digest   print the sha256 of the weights in a run directory, checkpoint folder or .safetensors file;
           --state: of everything that training goes on from
  submit   hand a recipe to Slurm, or to Kubernetes as an Indexed Job, a JobSet or a Kubeflow TrainJob; --dry-run prints
           what would be submitted
  plan     what a measured run would be like on 1 to 16384 ranks: step, communication, memory, failures, time to train
  stacks   print what every rank of a run that goes on now is doing, thread by thread
  watch    show how a run stands, until it ends; --once: now
  report   make one HTML page of one run, or of several to compare; needs no network
  doctor   look at this machine: devices, limits, disk, network, and a real measurement between two ranks
  completion
           print a script for bash, zsh or fish that completes commands and options:
           eval "$(samestep completion bash)" in ~/.bashrc

samestep run recipe.py --help also shows the recipe's own options; --print-config in its place shows every value and
where it came from. stdout holds data, stderr what is for people; NO_COLOR is respected.
"""


def main() -> None:
    """Entry point of the console command."""
    stdout.prepare()
    code = run(sys.argv[1:])
    from samestep.launcher.supervise.signals import hear_none

    hear_none()
    raise SystemExit(code)


def run(argv: Sequence[str]) -> int:
    """Do what `argv` says and return the exit code; mistakes become two lines, our own bugs a traceback and 70."""
    try:
        with stdout.flushed():
            return _dispatch(argv)
    except UsageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        stdout.mute()  # nobody listens: nothing is left to say
        return ExitCode.DONE
    except stdout.RefusedError as error:
        stdout.mute()
        print(f"error: stdout is expected to take what is written, but: {error}", file=sys.stderr)
        return ExitCode.FAILED
    except Exception:  # noqa: BLE001 (the last line of defence: the user gets a sentence and exit code 70)
        traceback.print_exc()
        print("samestep: this is a bug of samestep, not of your recipe; please report the lines above", file=sys.stderr)
        return ExitCode.BUG


def _dispatch(argv: Sequence[str]) -> int:
    if not argv:
        print(USAGE, file=sys.stderr)
        return ExitCode.USAGE
    word, rest = argv[0], argv[1:]
    if word in ("--help", "-h"):
        print(HELP, end="")
        return ExitCode.DONE
    if word == "--version":
        print(f"samestep {_version()}")
        return ExitCode.DONE
    known = commands()
    if word not in known:
        raise _unknown(word, set(known))
    if word in PAGES and list(rest) in (["--help"], ["-h"]):
        print(PAGES[word], end="")
        return ExitCode.DONE
    return known[word](rest)


def commands() -> dict[str, Callable[[Sequence[str]], int]]:
    """What each word does."""
    return {
        "run": _run,
        "verify": _verify,
        "chaos": _chaos,
        "digest": _digest,
        "doctor": _doctor,
        "stacks": _stacks,
        "completion": _completion,
        "watch": _watch,
        "report": _report,
        "submit": _submit,
        "plan": _plan,
    }


def _unknown(word: str, words: set[str]) -> UsageError:
    if word.endswith(".py"):
        return UsageError(f"{word} is expected to be a command, but is a file", f"samestep run {word}")
    from samestep.launcher.command_line.options import nearest_hint

    known = words | {"--help", "--version"}
    return UsageError(f"unknown command {word}", nearest_hint(word, known) or "samestep --help lists the commands")


def _doctor(argv: Sequence[str]) -> int:
    from samestep.launcher.command_line.options import load
    from samestep.launcher.doctor.examine import DoctorConfig, doctor

    return doctor(load(DoctorConfig, argv, {}, program="samestep doctor"), os.environ, print)


def _completion(argv: Sequence[str]) -> int:
    from samestep.launcher.command_line.completion import script

    if len(argv) > 1:
        raise UsageError(f"completion is expected to name one shell, but names {len(argv)}", "samestep completion bash")
    print(script(argv[0] if argv else ""))
    return ExitCode.DONE


def _version() -> str:
    from importlib.metadata import version

    return version("samestep")


def _run(argv: Sequence[str]) -> int:
    from samestep.launcher.command_line.argv import Kind, Recipe, split
    from samestep.launcher.command_line.options import load, question
    from samestep.launcher.command_line.recipe_options import answer
    from samestep.launcher.config import LaunchConfig
    from samestep.launcher.launch import dry_run, launch
    from samestep.launcher.recipe_file import trains

    own, words = split(argv)
    options, asked = question(own)  # also what is asked of the recipe, further down

    def configure(more: Sequence[str] = ()) -> LaunchConfig:
        return load(
            LaunchConfig,
            [*options, *more],
            os.environ,
            prefixes=("PET_",),
            program="samestep run",
            operands="recipe.py [RECIPE OPTIONS]",
        )

    config = configure()
    if not words:
        if own:
            configure([asked] if asked else [])
            raise UsageError("a recipe is expected after the options, but there is none", USAGE.splitlines()[0])
        print(USAGE, file=sys.stderr)
        return ExitCode.USAGE
    kind = Kind.MODULE if config.module else Kind.COMMAND if config.no_python else Kind.SCRIPT
    recipe = Recipe(words[0], tuple(words[1:]), kind)
    of_recipe = question(words[1:])[1]
    if (asked or of_recipe) and trains(recipe):
        return answer(recipe, configure, asked or of_recipe, os.environ)
    if asked:
        configure([asked])
    if config.dry_run:
        print(dry_run(config, recipe, os.environ))
        return ExitCode.DONE
    result = launch(config, recipe, os.environ)
    if config.json:
        from samestep.launcher.command_line.result import as_json

        print(as_json(result), flush=True)
    return result.exit_code


def _verify(argv: Sequence[str]) -> int:
    from samestep.launcher.verify import VerifyConfig, verify

    config, recipe = _asked_of_recipe(VerifyConfig, "verify", argv)
    return verify(config, recipe, os.environ, print)


def _asked_of_recipe(cls: type[Config], command: str, argv: Sequence[str]) -> tuple[Config, Recipe]:
    from samestep.launcher.command_line.argv import Recipe, split
    from samestep.launcher.command_line.options import load
    from samestep.launcher.recipe_file import check

    program = f"samestep {command}"
    own, words = split(argv, cls, program)
    config = load(cls, own, {}, program=program, operands="recipe.py [RECIPE OPTIONS]")
    if not words:
        problem = f"{command} is expected to be followed by a recipe, but is not"
        raise UsageError(problem, f"{program} recipe.py")
    recipe = Recipe(words[0], tuple(words[1:]))
    check(recipe, program)
    _refuse_behind(recipe, program)
    return config, recipe


# What verify and chaos choose for each of their runs, and which option of theirs says it, if one does.
_CHOSEN = {
    "samestep verify": {"shards": "--shards", "max-steps": "--steps", "run-dir": "--keep", "resume": ""},
    "samestep chaos": {"log-every": "", "run-dir": "--keep", "resume": ""},
}


def _refuse_behind(recipe: Recipe, program: str) -> None:
    from samestep.launcher.command_line.options import peek, question

    _, asked = question(recipe.arguments)
    if asked:
        problem = f"{asked} is expected before the recipe, but is after it"
        raise UsageError(problem, f"{program} {asked}; samestep run {recipe.target} {asked} shows the recipe's options")
    for name, own in _CHOSEN[program].items():
        if peek(recipe.arguments, name) is not None:
            problem = f"--{name} is expected to be left to {program}, but is after the recipe"
            raise UsageError(problem, f"put {own} before the recipe" if own else "leave it out")


def _submit(argv: Sequence[str]) -> int:
    from samestep.launcher.cluster.submit import submit

    return submit(argv, os.environ, print)


def _plan(argv: Sequence[str]) -> int:
    from samestep.launcher.scale.command import plan

    return plan(argv, print)


def _chaos(argv: Sequence[str]) -> int:
    from samestep.launcher.chaos.run import ChaosConfig, chaos

    config, recipe = _asked_of_recipe(ChaosConfig, "chaos", argv)
    return chaos(config, recipe, os.environ, print)


def _digest(argv: Sequence[str]) -> int:
    from samestep.launcher.command_line.argv import one_word
    from samestep.launcher.digest import path_digest

    usage = "samestep digest [--state] [--json] PATH"
    path, flags = one_word(argv, "digest", "path", usage, ("--state", "--json"))
    found = path_digest(Path(path), whole_state="--state" in flags)
    print(json.dumps({"path": path, "digest": found}) if "--json" in flags else found)
    return ExitCode.DONE


def _stacks(argv: Sequence[str]) -> int:
    from samestep.launcher.command_line.argv import one_word
    from samestep.launcher.diagnosis.live import stacks_of_run

    print(stacks_of_run(Path(one_word(argv, "stacks", "run directory", "samestep stacks RUN_DIR")[0])), end="")
    return ExitCode.DONE


def _watch(argv: Sequence[str]) -> int:
    from samestep.launcher.view.command import command

    return command(argv)


def _report(argv: Sequence[str]) -> int:
    from samestep.launcher.report.command import command

    print(command(argv))
    return ExitCode.DONE
