"""The recipe that RECIPE in the environment names; each rank as the only one of its machine, on the same GPU."""

import os
import runpy
import sys

if "RANK" in os.environ:
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NCCL_HOSTID": f"machine-{os.environ['RANK']}"}

if __name__ == "__main__":
    sys.argv[0] = os.environ["RECIPE"]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))  # noqa: PTH120 (as python does)
    runpy.run_path(sys.argv[0], run_name="__main__")
