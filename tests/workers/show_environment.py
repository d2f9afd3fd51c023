"""Write what this rank was given to `environment-RANK.json`: variables, arguments, and what kind of standard input."""

import json
import os
import sys
from pathlib import Path

fd = os.environ.get("SAMESTEP_STORE_FD")
about = {
    "environ": dict(os.environ),
    "argv": sys.argv[1:],
    "session": os.getsid(0) == os.getpid(),
    "stdin_is_null": os.fstat(0).st_rdev == Path(os.devnull).stat().st_rdev,
    "store_port": None,
}
if fd:
    import socket

    about["store_port"] = socket.socket(fileno=int(fd)).getsockname()[1]
Path(f"environment-{os.environ['RANK']}.json").write_text(json.dumps(about))
