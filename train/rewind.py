"""`--nan-policy rewind`: back to the last checkpoint, and past the batch that was not finite.

The state of a checkpoint is all that a step depends on, so the steps in between come out as before; what goes is a
state that a fault outside of the data has spoilt.
"""

from __future__ import annotations

from dataclasses import replace

from samestep.launcher import manifest
from samestep.launcher.contract import RunDir
from samestep.train import start
from samestep.train.finite import BadStep, RewindError
from samestep.train.loop import Run, run_to_the_end
from samestep.train.parallel.join import Membership


def run_with_rewinds(run: Run, member: Membership, run_dir: RunDir) -> None:
    """As `run_to_the_end`, from the last checkpoint again after every RewindError. A collective."""
    if run.config.nan_policy == "rewind" and not manifest.committed(run_dir.checkpoints):
        run.saver.save(run.state, run.reporter)  # so that there always is one to go back to
    while True:
        try:
            run_to_the_end(run)
        except RewindError as error:
            _go_back(run, error.bad, member, run_dir)
        else:
            return


def _go_back(run: Run, bad: BadStep, member: Membership, run_dir: RunDir) -> None:
    run.saver.wait(run.reporter)
    found = start.find_state(run_dir, replace(run.config, resume="auto"), member)
    if found.snapshot is None:
        raise RuntimeError(f"{bad}, and there is no checkpoint to go back to")
    known = run.state.passed_over | {bad.step}  # the checkpoint may be older than others of them
    starts = run.state.restarts, run.state.started_at  # nothing is started
    start.restore(run.state, found.snapshot, found.source)
    run.state.restarts, run.state.started_at = starts
    run.state.passed_over.update(known)
    run.ledger.forget()
    run.guards.forget()
    run.step.clock.take()  # nobody reads the times of the step that was not finished
    run.reporter.warning(f"{bad}; back to {found.source}, and past that step")
