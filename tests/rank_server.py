"""Forks ranks from one process that has imported torch: dozens of small runs would spend their time on imports.

Reads one JSON job a line: script, argv, cwd, ranks, env, seconds, to_the_end. Each rank is a fork that runs the script
as `python script argv…` does. Answers {"codes": […]}; output is in rank-N.out and rank-N.err. This process runs no
tensor operation, so its forks can. Taking a forked interpreter apart copies all its pages (0.4 s a rank, several with
many), so a rank ends after its exit handlers, unless the job says `to_the_end`.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
import traceback

import samestep.train  # noqa: F401 (imported once for all ranks)

if sys.argv[1:] == ["compiler"]:
    import torch._dynamo
    import torch._inductor.config  # noqa: F401


def fork_rank(job: dict, rank: int, listener: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.chdir(job["cwd"])
    for descriptor, name in ((1, f"rank-{rank}.out"), (2, f"rank-{rank}.err")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    world = job["ranks"]
    if world > 1:
        port = listener.getsockname()[1]
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SAMESTEP_STORE_PORT=str(port))
        if rank == 0:
            os.environ["SAMESTEP_STORE_FD"] = str(os.dup(listener.fileno()))
    listener.close()
    os.environ.update(job["env"])
    sys.argv = [job["script"], *job["argv"]]
    return 0


def wait_for(pids: list[int], seconds: float) -> list[int]:
    """Exit statuses as subprocess gives them; who is not done in time, or 10 s after another's failure, is killed."""
    codes: dict[int, int] = {}
    handles = {os.pidfd_open(pid): pid for pid in pids}
    end = time.monotonic() + seconds
    while handles:
        ready, _, _ = select.select(list(handles), [], [], max(0.0, end - time.monotonic()))
        if not ready:
            for handle in handles:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            end = time.monotonic() + 60
        for handle in ready:
            pid = handles.pop(handle)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(handle)
            if codes[pid]:
                end = min(end, time.monotonic() + 10)
    return [codes[pid] for pid in pids]


def run_and_leave(script: str) -> None:
    """Run the script and end with its status, without taking the interpreter apart."""
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001 (as the interpreter does)
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> dict:
    """Serve until standard input ends ({} is returned), or return the job in a rank."""
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
            pids = []
            for rank in range(job["ranks"]):
                pid = fork_rank(job, rank, listener)
                if not pid:
                    return job
                pids.append(pid)
        print(json.dumps({"codes": wait_for(pids, job["seconds"])}), flush=True)
    return {}


gc.collect()
gc.freeze()  # otherwise every rank copies all pages when it collects and ends
mine = main()
if mine.get("to_the_end"):
    runpy.run_path(mine["script"], run_name="__main__")
elif mine:
    run_and_leave(mine["script"])
