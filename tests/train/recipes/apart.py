"""The recipe that RECIPE in the environment names, on ranks that share no memory, as on several machines."""

import os
import runpy
import sys
from pathlib import Path

import torch

from samestep.train.parallel import join

vars(join)["open_arena"] = lambda *_: None
vars(torch.cuda)["stream"] = None  # ranks that compute on a CPU do not start CUDA on a machine that has it

if __name__ == "__main__":
    sys.argv[0] = str(Path(__file__).with_name(f"{os.environ['RECIPE']}.py"))
    runpy.run_path(sys.argv[0], run_name="__main__")
