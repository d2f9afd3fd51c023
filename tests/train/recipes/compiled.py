"""Runs the recipe PROGRAM, and fails if no more was compiled for it than the line that tries the compiler."""

import os
import runpy
import sys

sys.argv[0] = os.environ["PROGRAM"]
runpy.run_path(sys.argv[0], run_name="__main__")

import torch._dynamo.utils  # noqa: E402 (after it was imported or not)

assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
