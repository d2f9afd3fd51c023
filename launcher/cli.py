"""The `samestep` command: words in, one exit code out. Anything slow to import is imported where it is needed."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from samestep.launcher.contract import ExitCode, UsageError

USAGE = """\
usage: samestep run [options] recipe.py [recipe options]
       samestep verify [options] recipe.py | samestep digest [--state] PATH
       samestep submit kubernetes [options] recipe.py [recipe options] | samestep plan [options] [RUN_DIR]
       samestep --version | samestep --help | samestep run --help"""

HELP = f"""\
{USAGE}

Distributed PyTorch training whose runs come out the same.

  run      start a recipe on several processes of this machine: torchrun's options, accelerate's names as aliases
  verify   run the first steps of a recipe at several world sizes and with stops, and compare the bits
  digest   print the sha256 of the weights in a run directory, checkpoint folder or .safetensors file;
           --state: of everything that training goes on from
  submit   hand a recipe to Kubernetes: an Indexed Job, a JobSet or a Kubeflow TrainJob; --dry-run prints the manifests
  plan     what a measured run would be like on 1 to 16384 ranks: step, communication, memory, failures, time to train
"""


def main() -> None:
    """Entry point of the console command."""
    raise SystemExit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Do what `argv` says and return the exit code; mistakes become two lines, our own bugs a traceback and 70."""
    try:
        return _dispatch(argv)
    except UsageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody listens: nothing is left to say
        return ExitCode.DONE
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
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "run": _run,
        "verify": _verify,
        "digest": _digest,
        "submit": _submit,
        "plan": _plan,
    }
    if word not in commands:
        raise _unknown(word, set(commands))
    return commands[word](rest)


def _unknown(word: str, commands: set[str]) -> UsageError:
    if word.endswith(".py"):
        return UsageError(f"{word} is expected to be a command, but is a file", f"samestep run {word}")
    from samestep.launcher.options import nearest_hint

    known = commands | {"--help", "--version"}
    return UsageError(f"unknown command {word}", nearest_hint(word, known) or "samestep --help lists the commands")


def _version() -> str:
    from importlib.metadata import version

    return version("samestep")


def _run(argv: Sequence[str]) -> int:
    from samestep.launcher.argv import Kind, Recipe, split
    from samestep.launcher.config import LaunchConfig
    from samestep.launcher.launch import dry_run, launch
    from samestep.launcher.options import load

    own, words = split(argv)
    config = load(LaunchConfig, own, os.environ, prefixes=("PET_",), program="samestep run")
    if not words:
        if own:
            raise UsageError("a recipe is expected after the options, but there is none", USAGE.splitlines()[0])
        print(USAGE, file=sys.stderr)
        return ExitCode.USAGE
    kind = Kind.MODULE if config.module else Kind.COMMAND if config.no_python else Kind.SCRIPT
    recipe = Recipe(words[0], tuple(words[1:]), kind)
    if config.dry_run:
        print(dry_run(config, recipe, os.environ))
        return ExitCode.DONE
    result = launch(config, recipe, os.environ)
    if config.json:
        failure = result.failure.to_dict() if result.failure else None
        about = {"exit_code": int(result.exit_code), "run_dir": str(result.run_dir), "generations": result.generations}
        print(json.dumps(about | {"failure": failure}), flush=True)
    return result.exit_code


def _verify(argv: Sequence[str]) -> int:
    from samestep.launcher.argv import Recipe, split
    from samestep.launcher.options import load
    from samestep.launcher.recipe_file import check
    from samestep.launcher.verify import VerifyConfig, verify

    own, words = split(argv, VerifyConfig)
    config = load(VerifyConfig, own, {}, program="samestep verify")
    if not words:
        raise UsageError("verify is expected to be followed by a recipe, but is not", "samestep verify recipe.py")
    recipe = Recipe(words[0], tuple(words[1:]))
    check(recipe)
    return verify(config, recipe, os.environ, print)


def _submit(argv: Sequence[str]) -> int:
    from samestep.launcher.cluster.submit import submit

    return submit(argv, os.environ, print)


def _plan(argv: Sequence[str]) -> int:
    from samestep.launcher.scale.command import plan

    return plan(argv, print)


def _digest(argv: Sequence[str]) -> int:
    from samestep.launcher.digest import path_digest

    if len(argv) == 1 and argv[0] in ("--help", "-h"):
        print(HELP, end="")
        return ExitCode.DONE
    paths = [word for word in argv if word != "--state"]
    if len(paths) != 1 or paths[0].startswith("-"):
        raise UsageError(
            f"digest is expected to be followed by one path, but got {len(paths)} words",
            "samestep digest [--state] PATH",
        )
    print(path_digest(Path(paths[0]), whole_state=len(paths) < len(argv)))
    return ExitCode.DONE
