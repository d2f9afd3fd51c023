"""Runs the recipe PROGRAM, and fails if torch's compiler was imported for it."""

import os
import runpy
import sys

sys.argv[0] = os.environ["PROGRAM"]
runpy.run_path(sys.argv[0], run_name="__main__")
assert "torch._dynamo" not in sys.modules
