"""What `--help` shows of commands that have words to follow, and hardly an option."""

from __future__ import annotations

from collections.abc import Mapping

PAGES: Mapping[str, str] = {
    "digest": """\
usage: samestep digest [--state] [--json] PATH

Print the sha256 of the weights in PATH, a run directory, a checkpoint folder or a .safetensors file.

  --state  of everything that training goes on from
  --json   as JSON, with the path
""",
    "stacks": """\
usage: samestep stacks RUN_DIR

Print what every rank of a run that goes on now is doing, thread by thread.
""",
    "completion": """\
usage: samestep completion bash|zsh|fish

Print a script that completes commands and options in that shell: eval "$(samestep completion bash)" in ~/.bashrc
""",
    "submit": """\
usage: samestep submit slurm|kubernetes [options] recipe.py [recipe options]

Hand a recipe to Slurm, or to Kubernetes as an Indexed Job, a JobSet or a Kubeflow TrainJob.
samestep submit slurm --help and samestep submit kubernetes --help list the options; --dry-run submits nothing.
""",
}
