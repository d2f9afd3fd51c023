"""One rank's life, where the moment is unlucky."""

import signal
import subprocess
import sys
from pathlib import Path

from samestep.launcher.plan import Command
from samestep.launcher.supervise.process import Worker


def test_a_rank_that_leads_no_process_group_yet_is_killed_all_the_same():
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # in the group of this process
    try:
        worker = Worker(Command(0, 0, (), {}, (), Path("log"), Path("error")), rank.pid, {})
        worker.kill()
        assert rank.wait(30) == -signal.SIGKILL
    finally:
        rank.kill()
        rank.wait()
