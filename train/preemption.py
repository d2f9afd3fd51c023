"""How a run ends that was asked to stop: what is on disk decides the exit status, the same on every rank."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from samestep.launcher import manifest
from samestep.launcher.contract import ExitCode, RunDir
from samestep.train.loop import Run
from samestep.train.parallel.group import gather_json


def verdict(step: int, newest: int | None, signum: int) -> ExitCode:
    """Exit status of a run that stopped after `step` for `signum`; `newest` is the newest committed step. Pure."""
    if newest is None:
        return ExitCode.INTERRUPTED if signum == signal.SIGINT else ExitCode.TERMINATED
    return ExitCode.PREEMPTED_SAVED if newest == step else ExitCode.PREEMPTED_KEPT


def leave_if_stopped(run: Run, run_dir: RunDir) -> None:
    """End the process if training was stopped before its end, or its last state could not be saved in time.

    Rank zero looks, after it has waited for the commit as long as the grace time allows. A collective.

    Raises:
        SystemExit: the run was stopped; 75, 76, or 130 and 143 where nothing was ever saved.
    """
    stop, step = run.agreement.stop, run.state.step
    if not stop:
        return
    committed = manifest.committed(run_dir.checkpoints)
    seen = manifest.step_of(committed[0]) if committed else None
    newest: int | None = gather_json(run.agreement.group, seen)[0]
    if step >= run.max_steps and newest == step:
        return
    run.reporter.preempted(step, signal.Signals(stop).name, newest)
    run.agreement.group.barrier()  # nobody leaves while somebody still needs it
    code = verdict(step, newest, stop)
    if run.saver.wait(run.reporter):
        raise SystemExit(int(code))
    _leave_the_writer_behind(code)


def _leave_the_writer_behind(code: ExitCode) -> NoReturn:
    """A thread still writes, and the interpreter would wait for it; what it leaves is no checkpoint to anybody."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
